"""Baselines against loops, closed forms and other solvers; bodies against numpy; all of them in one report"""
from dataclasses import replace
from itertools import product

import numpy as np, pytest, torch
from examples import unrelated
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, softmax

from cryptoml.baselines import (
    N_CLASSES, PAST, LSTMPredictor, LinearPredictor, TransformerPredictor, book_scores, followed, frequencies,
    har_inputs, joined, momentum, past_class, past_volatility, positions, realised, softmax_regression, trend,
)
from cryptoml.tft import TFTConfig, quantile_loss

BODIES = [LinearPredictor, LSTMPredictor, TransformerPredictor]
S, H = 3000, 2


# ---- forecasts ---------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def samples(): return unrelated(3, S, H)

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(2, 4))
def test_followed_counts(seed, n_seen, classes):
    rng = np.random.default_rng(seed)
    seen, y = rng.integers(-1, n_seen, (40, 3)), rng.integers(-1, classes, (40, 3))
    forecast = followed(seen, y, n_seen, classes)(seen)
    for s, j in product(range(40), range(3)):
        now = seen[s, j]
        mine = [b for a, b in zip(seen[:, j], y[:, j]) if b >= 0 and (now < 0 or a == now)]
        assert np.allclose(forecast[s, j], [(mine.count(k) + 1) / (len(mine) + classes) for k in range(classes)])

def test_past_class_is_the_label_of_the_past():
    rng = np.random.default_rng(0)
    close, sigma = np.exp(rng.normal(0, .01, (2, 60)).cumsum(1)), np.full((2, 60), .01)
    close[0, 30] = np.nan
    c = past_class(close, sigma, (1, 5), .0014)
    for n, t, (j, h) in product(range(2), range(60), enumerate((1, 5))):
        r = np.log(close[n, t] / close[n, t - h]) if t >= h else np.nan
        band = max(.0014, .25 * .01 * h ** .5)
        side = 2 if r > band else 0 if r < -band else 1
        assert c[n, t, j] == (-1 if np.isnan(r) else side)

@pytest.fixture
def walk():
    "Closes with four missing bars, and a volatility"
    rng = np.random.default_rng(1)
    close = np.exp(rng.normal(0, .01, (2, 500)).cumsum(1))
    close[:, 200:204] = np.nan
    return close, rng.uniform(.01, .02, (2, 500))

@pytest.mark.parametrize('t', [5, 6, 50, 205, 207, 400])
def test_realised_is_its_formula(walk, t):
    close, _ = walk
    got = realised(close, 12)[0, t]
    r = np.diff(np.log(close[0, max(0, t - 12):t + 1]))
    there = r[np.isfinite(r)]
    assert np.isnan(got) if len(there) < 6 else np.isclose(got, .5 * np.log((there ** 2).mean() + 1e-12))

@pytest.mark.parametrize('timeframe, bars', [('1h', 336), ('4h', 84), ('1d', 14)])
@pytest.mark.parametrize('t', [5, 50, 205, 214, 400, 499])
def test_trend_is_its_formula(walk, timeframe, bars, t):
    close, sigma = walk
    got = trend(close, sigma, timeframe)[0, t]
    want = np.log(close[0, t] / close[0, t - bars]) / (sigma[0, t] * bars ** .5) if t >= bars else np.nan
    assert np.isclose(got, want, equal_nan=True)
    assert np.isclose(book_scores(close, sigma, timeframe)['momentum'][0, t], np.tanh(want), equal_nan=True)

@pytest.mark.parametrize('timeframe, bars', [
    ('15m', [24, 96, 672, 2880]),
    ('1h', [6, 24, 168, 720]),
    ('4h', [2, 6, 42, 180]),
    ('12h', [1, 2, 14, 60]),
    ('1d', [1, 7, 30, 90]),
    ('7d', [1, 4, 13]),
])
def test_har_looks_back_on_different_spans_of_time(walk, timeframe, bars):
    close, _ = walk
    x = har_inputs(close, np.full((500, 2), 7.), timeframe)
    assert x.shape == (2, 500, 1 + len(bars) + 2)
    assert (x[..., 0] == 1).all() and (x[..., -2:] == 7).all()
    for j, span in enumerate(bars): np.testing.assert_array_equal(x[..., 1 + j], realised(close, span))

@pytest.mark.parametrize('timeframe, least', [('15m', 24), ('1h', 6), ('1d', 6)])
def test_past_volatility_is_never_of_a_few_bars(walk, timeframe, least):
    close, _ = walk
    got = past_volatility(close, (1, 4, 48), timeframe)
    for j, bars in enumerate((least, least, 48)): np.testing.assert_array_equal(got[..., j], realised(close, bars))

def test_softmax_regression_is_the_minimum_another_solver_finds():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(400, 3)), rng.integers(-1, 3, 400)
    w = softmax_regression(x, y, 3, .05)
    there = y >= 0
    x1, y1 = np.concatenate([x, np.ones((400, 1))], 1)[there], y[there]
    def objective(w):
        w = w.reshape(4, 3)
        return -log_softmax(x1 @ w, 1)[np.arange(len(y1)), y1].mean() + .025 * (w[:-1] ** 2).sum()
    other = minimize(objective, np.zeros(12), method='BFGS').x.reshape(4, 3)
    assert np.allclose(softmax(x1 @ w, 1), softmax(x1 @ other, 1), atol=1e-3)
    assert objective(w.ravel()) <= objective(other.ravel()) + 1e-6

def test_softmax_regression_comes_down_a_narrow_valley():
    "Inputs that say nearly the same; more samples of a class than of the others; nearly no ridge"
    rng = np.random.default_rng(3)
    x = rng.normal(size=(500, 1)) + [0, 1, 2] + 1e-3 * rng.normal(size=(500, 3))
    y = (x[:, 0] + rng.normal(size=500) > 1.5).astype(int) * rng.integers(1, 3, 500)
    w = softmax_regression(x, y, 3, 1e-6)
    x1 = np.concatenate([x, np.ones((500, 1))], 1)
    slope = x1.T @ (softmax(x1 @ w, 1) - np.eye(3)[y]) / 500 + 1e-6 * w * [[1], [1], [1], [0]]
    assert abs(slope).max() < 1e-4

def test_joined_is_one_after_the_other(samples):
    old, held, _ = samples
    both = joined(old, held)
    for k, v in vars(both).items():
        if k != 'labels': np.testing.assert_array_equal(v, np.concatenate([getattr(old, k), getattr(held, k)]))
    for k, v in both.labels.items(): np.testing.assert_array_equal(v, np.concatenate([old.labels[k], held.labels[k]]))

def test_momentum_of_an_unknown_trend_says_the_frequencies(samples):
    old, _, new = samples
    said = momentum(old)(replace(new, trend=np.full((S, 2), np.nan)))
    assert (said['relative'] == 0).all()
    assert np.allclose(said['direction'][0, 1], frequencies(old.labels['direction'][:, 1], 3))

@pytest.mark.parametrize('name', PAST)
def test_one_interface(samples, name):
    old, held, new = samples
    fitted = PAST[name](joined(old, held))
    shapes = {k: (S, H, n) for k, n in N_CLASSES.items()} | dict(relative=(S, H), volatility=(S, H, 1))
    said, again = fitted(new), fitted(new)
    assert said
    for k, v in said.items():
        assert v.shape == shapes[k]
        assert (v == again[k]).all()
    for k in said.keys() & N_CLASSES:
        assert np.allclose(said[k].sum(-1), 1)
        assert (said[k] > 0).all()

# ---- bodies ------------------------------------------------------------------------------------------------

C = TFTConfig(n_past=5, n_future=2, n_static=3, lookback=7, steps=4, d_model=8, n_heads=2, dropout=0.)

def made(body, c, seed=0):
    "A body in float64, and past, future and static of six samples, None where there is no input"
    torch.manual_seed(seed)
    model = body(c).double().eval()
    g = torch.Generator().manual_seed(1)
    shapes = (c.lookback, c.n_past), (c.steps, c.n_future), (c.n_static,)
    return model, [torch.randn(6, *n, generator=g).double() if n[-1] else None for n in shapes]

def numbers(module): return {k: v.detach().numpy() for k, v in module.state_dict().items()}
def affine(w, name, x): return x @ w[f'{name}.weight'].T + w[f'{name}.bias']

def test_linear_is_linear():
    model, (past, future, static) = made(LinearPredictor, C)
    w, s = numbers(model), model(past, future, static).states.detach().numpy()
    x = np.concatenate([past[:, -1].numpy(), static.numpy()], 1)
    assert np.allclose(s, affine(w, 'now', x).reshape(6, 4, 8) + affine(w, 'future', future.numpy()))
    double = model(2 * past, 2 * future, 2 * static).states + model(0 * past, 0 * future, 0 * static).states
    assert np.allclose(double.detach().numpy(), 2 * s)

@pytest.mark.parametrize('layers', [1, 2])
def test_lstm_is_its_equations(layers):
    model, (past, future, static) = made(LSTMPredictor, replace(C, lstm_layers=layers))
    w = numbers(model)
    h, k = np.split(np.tanh(affine(w, 'static', static.numpy())), 2, 1)
    state = [(h, k)] * layers
    def step(name, x):
        for l in range(layers):
            h, k = state[l]
            z = sum(a @ w[f'{name}.weight_{s}_l{l}'].T + w[f'{name}.bias_{s}_l{l}'] for a, s in ((x, 'ih'), (h, 'hh')))
            i, f, g, o = np.split(z, 4, 1)
            k = expit(f) * k + expit(i) * np.tanh(g)
            x = expit(o) * np.tanh(k)
            state[l] = x, k
        return x
    for t in range(7): step('encoder', affine(w, 'past', past[:, t].numpy()))
    at = positions(7, 4, 8).double().numpy()
    ahead = affine(w, 'future.linear', future.numpy()) + at
    s = np.stack([step('decoder', ahead[:, t]) for t in range(4)], 1)
    assert np.allclose(model(past, future, static).states.detach().numpy(), s, atol=1e-6)

class Transformer:
    "Its equations in numpy, a head and a position at a time; width 8, two heads"
    def __init__(self, w): self.w = w

    def norm(self, name, x):
        unit = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return unit * self.w[f'{name}.weight'] + self.w[f'{name}.bias']

    def attend(self, name, a, b, causal):
        weights, biases = (np.split(self.w[f'{name}.in_proj_{k}'], 3) for k in ('weight', 'bias'))
        q, k, v = (x @ weight.T + bias for x, weight, bias in zip((a, b, b), weights, biases))
        out = np.zeros((*a.shape[:2], 8))
        for n, i, head in product(range(len(a)), range(a.shape[1]), (slice(0, 4), slice(4, 8))):
            seen = i + 1 if causal else b.shape[1]
            share = softmax(k[n, :seen, head] @ q[n, i, head] / 2)                       # sqrt(d / heads) = 2
            out[n, i, head] = share @ v[n, :seen, head]
        return affine(self.w, f'{name}.out_proj', out)

    def feed(self, name, x):
        h = affine(self.w, f'{name}.linear1', x)
        return affine(self.w, f'{name}.linear2', np.maximum(h, 0))

    def __call__(self, past, future, static):
        x = affine(self.w, 'past.linear', past) + positions(0, 7, 8).numpy() + affine(self.w, 'static', static)[:, None]
        for n in ('encoder.layers.0', 'encoder.layers.1'):
            y = self.norm(f'{n}.norm1', x)
            x = x + self.attend(f'{n}.self_attn', y, y, True)
            x = x + self.feed(n, self.norm(f'{n}.norm2', x))
        memory = self.norm('encoder.norm', x)
        x = affine(self.w, 'future.linear', future) + positions(7, 4, 8).numpy()
        for n in ('decoder.layers.0', 'decoder.layers.1'):
            y = self.norm(f'{n}.norm1', x)
            x = x + self.attend(f'{n}.self_attn', y, y, True)
            x = x + self.attend(f'{n}.multihead_attn', self.norm(f'{n}.norm2', x), memory, False)
            x = x + self.feed(n, self.norm(f'{n}.norm3', x))
        return self.norm('decoder.norm', x)

def test_transformer_is_its_equations():
    model, given = made(TransformerPredictor, replace(C, lstm_layers=2))
    states = model(*given).states
    want = Transformer(numbers(model))(*(t.numpy() for t in given))
    assert np.allclose(states.detach().numpy(), want, atol=1e-6)
    with torch.no_grad(): fast = model(*given).states                                  # torch has a path of its own
    assert torch.allclose(fast, states, atol=1e-9)

def test_layers_are_no_copies_of_one():
    model, _ = made(TransformerPredictor, replace(C, lstm_layers=2))
    a, b = (layer.self_attn.in_proj_weight for layer in model.encoder.layers)
    assert not torch.equal(a, b)

@pytest.mark.parametrize('body', BODIES)
@pytest.mark.parametrize('change', [
    dict(),
    dict(n_static=0),
    dict(n_future=0),
    dict(n_future=0, n_static=0, lstm_layers=2),
    dict(d_model=3, n_heads=1, steps=1, lookback=1),
], ids=['all', 'no static', 'nothing ahead', 'past only', 'smallest'])
@torch.no_grad()
def test_no_later_input_and_no_neighbour_reaches_a_forecast(body, change):
    c = replace(C, **change)
    model, (past, future, static) = made(body, c)
    q = model(past, future, static).quantiles
    assert q.shape == (6, c.steps, 3)
    assert (q.diff(dim=-1) >= 0).all()
    alone = model(*(None if a is None else a[:1] for a in (past, future, static))).quantiles
    assert torch.allclose(alone, q[:1])
    for k in range(c.steps if c.n_future else 0):
        moved = future.clone()
        moved[:, k] += 1
        other = model(past, moved, static).quantiles
        assert torch.allclose(other[:, :k], q[:, :k], rtol=0, atol=1e-12)
        assert not torch.allclose(other[:, k], q[:, k])

@pytest.mark.parametrize('body', BODIES)
def test_equal_seeds_are_equal_weights(body):
    (a, inputs), (b, _), (other, _) = (made(body, C, seed) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not torch.equal(a(*inputs).states, other(*inputs).states)

@pytest.mark.parametrize('body', BODIES)
def test_shapes_are_known_before_anything_is_allocated(body):
    c = replace(C, lstm_layers=2)
    with torch.device('meta'): shapes = {k: v.shape for k, v in body(c).state_dict().items()}    # what a loader checks
    model, _ = made(body, c)
    assert shapes == {k: v.shape for k, v in model.state_dict().items()}

@pytest.mark.parametrize('body', BODIES)
@pytest.mark.parametrize('which, name', [(0, 'past'), (1, 'future'), (2, 'static')])
def test_a_wrong_shape_is_named(body, which, name):
    model, inputs = made(body, C)
    inputs[which] = inputs[which][..., :-1]
    with pytest.raises(ValueError, match=f'wrong shape: {name}'): model(*inputs)

@pytest.mark.parametrize('body', [LSTMPredictor, TransformerPredictor])
def test_dropout_drops_in_training(body):
    model, inputs = made(body, replace(C, dropout=.5, lstm_layers=2))
    assert torch.equal(model(*inputs).states, model(*inputs).states)
    model.train()
    assert not torch.equal(model(*inputs).states, model(*inputs).states)

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('body', [LSTMPredictor, TransformerPredictor])
def test_learns_one_batch_by_heart(body, seed, steps=400):
    "Over five seeds and three instruction sets at most .02 of the first loss was left"
    torch.manual_seed(seed)
    model, g = body(C), torch.Generator().manual_seed(5)
    inputs = torch.randn(8, 7, 5, generator=g), torch.randn(8, 4, 2, generator=g), torch.randn(8, 3, generator=g)
    y = torch.randn(8, 4, generator=g)
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    losses = []
    for _ in range(steps):
        losses.append(quantile_loss(model(*inputs).quantiles, y, C.quantiles))
        opt.zero_grad()
        losses[-1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        rate.step()
    assert losses[-1] < .05 * losses[0]
