"""Baselines against loops, closed forms and other solvers; bodies against numpy; all of them in one report"""
import sys
from itertools import product

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, softmax

from cryptoml.baselines import (BASELINES, CLASSES, LSTMPredictor, LinearPredictor, Samples, TransformerPredictor, boosting, fit_baselines, followed, frequencies,
                                har, logistic, momentum, past_class, persistence, positions, realised, softmax_regression, trend)
from cryptoml.tft import TFTConfig

BODIES = [LinearPredictor, LSTMPredictor, TransformerPredictor]
S, H = 3000, 2

@pytest.fixture(scope='module')
def samples():
    "Noise with labels that know nothing of it, a tenth of them missing"
    rng = np.random.default_rng(3)
    def some():
        labels = {k: rng.integers(0, n, (S, H)) for k, n in CLASSES.items()} | {k: rng.normal(size=(S, H)) for k in ('relative', 'volatility')}
        gone = rng.random((S, H)) < .1
        labels = {k: np.where(gone, -1 if k in CLASSES else np.nan, v) for k, v in labels.items()}
        har = np.concatenate([np.ones((S, 1)), rng.normal(size=(S, 3))], 1); har[:50] = np.nan
        return Samples(rng.normal(size=(S, 5)), rng.integers(-1, 3, (S, H)), rng.integers(-1, 4, S), rng.normal(size=(S, H)), har, rng.normal(size=(S, 2)), labels)
    return some(), some()

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(2, 4))
def test_followed_counts(seed, n_seen, classes):
    rng = np.random.default_rng(seed); seen, y = rng.integers(-1, n_seen, (40, 3)), rng.integers(-1, classes, (40, 3))
    forecast = followed(seen, y, n_seen, classes)(seen)
    for s, j in product(range(40), range(3)):
        mine = [b for a, b in zip(seen[:, j], y[:, j]) if b >= 0 and (seen[s, j] < 0 or a == seen[s, j])]
        assert np.allclose(forecast[s, j], [(mine.count(k) + 1) / (len(mine) + classes) for k in range(classes)])

def test_past_class_is_the_label_of_the_past():
    rng = np.random.default_rng(0); close = np.exp(rng.normal(0, .01, (2, 60)).cumsum(1)); close[0, 30] = np.nan; sigma = np.full((2, 60), .01)
    c = past_class(close, sigma, (1, 5), .0014)
    for n, t, (j, h) in product(range(2), range(60), enumerate((1, 5))):
        r, band = (np.log(close[n, t] / close[n, t - h]) if t >= h else np.nan), max(.0014, .25 * .01 * h ** .5)
        assert c[n, t, j] == (-1 if np.isnan(r) else 2 if r > band else 0 if r < -band else 1)

def test_realised_and_trend_are_their_formulas():
    rng = np.random.default_rng(1); close = np.exp(rng.normal(0, .01, (2, 500)).cumsum(1)); close[:, 200:204] = np.nan; sigma = rng.uniform(.01, .02, (2, 500))
    v, m = realised(close, 12), trend(close, sigma, 20)
    for t in (5, 6, 50, 205, 207, 400):
        r = np.diff(np.log(close[0, max(0, t - 12):t + 1])); there = r[np.isfinite(r)]
        assert np.isnan(v[0, t]) if len(there) < 6 else np.isclose(v[0, t], .5 * np.log((there ** 2).mean() + 1e-12))
        assert np.isclose(m[0, t], np.log(close[0, t] / close[0, t - 20]) / (sigma[0, t] * 20 ** .5), equal_nan=True) if t >= 20 else np.isnan(m[0, t])

def test_softmax_regression_is_the_minimum_another_solver_finds():
    rng = np.random.default_rng(2); x, y = rng.normal(size=(400, 3)), rng.integers(-1, 3, 400)
    w = softmax_regression(x, y, 3, .05)
    x1, y1 = np.concatenate([x, np.ones((400, 1))], 1)[y >= 0], y[y >= 0]
    def objective(w):
        w = w.reshape(4, 3)
        return -log_softmax(x1 @ w, 1)[np.arange(len(y1)), y1].mean() + .025 * (w[:-1] ** 2).sum()
    other = minimize(objective, np.zeros(12), method='BFGS').x.reshape(4, 3)
    assert np.allclose(softmax(x1 @ w, 1), softmax(x1 @ other, 1), atol=1e-3) and objective(w.ravel()) <= objective(other.ravel()) + 1e-6

def test_logistic_of_two_classes_is_the_sigmoid(samples):
    old, new = samples; p, y = logistic(old)(new)['relative_direction'], old.labels['relative_direction'][:, 0]
    w = softmax_regression(old.x, y, 2, 1e-2)
    assert np.allclose(p[:, 0, 1], expit(np.c_[new.x, np.ones(S)] @ (w[:, 1] - w[:, 0])))

def test_har_is_least_squares(samples):
    old, new = samples; forecast = har(old)(new)['volatility'][..., 0]
    for j in range(H):
        y = old.labels['volatility'][:, j]; ok = np.isfinite(y) & np.isfinite(old.har).all(1)
        b = np.linalg.solve(old.har[ok].T @ old.har[ok], old.har[ok].T @ y[ok])
        assert np.allclose(forecast[50:, j], new.har[50:] @ b) and np.isnan(forecast[:50, j]).all()

def test_momentum_of_an_unknown_trend_says_the_frequencies(samples):
    old, new = samples; new = Samples(**vars(new) | dict(trend=np.full((S, 2), np.nan))); said = momentum(old)(new)
    assert (said['relative'] == 0).all() and np.allclose(said['direction'][0, 1], frequencies(old.labels['direction'][:, 1], 3))

def test_trees_are_the_same_on_any_number_of_threads(samples):
    old, new = samples; threads = torch.get_num_threads(); said = []
    first = Samples(**vars(old) | dict(labels={k: v[:, :1] for k, v in old.labels.items()}))
    try:
        for n in (1, 2): torch.set_num_threads(n); said.append(boosting(first)(new))
    finally: torch.set_num_threads(threads)
    assert said[0].keys() == {'direction', 'relative_direction', 'relative', 'volatility'} and all((said[0][k] == said[1][k]).all() for k in said[0])

def test_trees_learn_from_labelled_samples_alone(samples):
    old, _ = samples; x0, up = old.x[:, 0], np.arange(S) % 2 == 0
    def forecast(hidden): return boosting(Samples(**vars(old) | dict(labels=old.labels | dict(relative=np.where(up, x0, hidden)[:, None] * np.ones((1, H))))))(old)['relative'][:, 0]
    assert np.corrcoef(forecast(np.nan), x0)[0, 1] > .95 > np.corrcoef(forecast(-x0), x0)[0, 1]

def test_one_interface(samples):
    old, new = samples; fitted, absent = fit_baselines(old); S_ = len(new.x)
    assert not absent and list(fitted) == list(BASELINES)
    shapes = dict(direction=(S_, H, 3), relative_direction=(S_, H, 2), regime=(S_, H, 4), relative=(S_, H), volatility=(S_, H, 1))
    for f in fitted.values():
        said, again = f(new), f(new)
        assert said and all(v.shape == shapes[k] and (v == again[k])[50:].all() for k, v in said.items())
        for k in said.keys() & CLASSES: assert np.allclose(said[k].sum(-1), 1) and (said[k] > 0).all()

def test_too_few_coins_leave_targets_out(samples):
    old, new = samples; labels = old.labels | dict(relative_direction=np.full((S, H), -1), relative=np.full((S, H), np.nan))
    fitted, _ = fit_baselines(Samples(**vars(old) | dict(labels=labels)))
    assert 'relative_direction' not in fitted['logistic'](new) and not {'relative_direction', 'relative'} & fitted['boosting'](new).keys()

def test_without_lightgbm_the_others_remain(samples, monkeypatch):
    monkeypatch.setitem(sys.modules, 'lightgbm', None)
    fitted, absent = fit_baselines(samples[0])
    assert fitted.keys() == BASELINES.keys() - {'boosting'} and absent == ['the boosting baseline needs lightgbm: pip install cryptoml[boosting]']


def config(**change): return TFTConfig(**dict(n_past=5, n_future=2, n_static=3, lookback=7, steps=4, d_model=8, n_heads=2, dropout=0.) | change)

def made(body, c, seed=0):
    torch.manual_seed(seed); model = body(c).double().eval()
    g = torch.Generator().manual_seed(1)
    return model, [torch.randn(6, *n, generator=g).double() if n[-1] else None for n in ((c.lookback, c.n_past), (c.steps, c.n_future), (c.n_static,))]

def numbers(module): return {k: v.detach().numpy() for k, v in module.state_dict().items()}
def affine(w, name, x): return x @ w[f'{name}.weight'].T + w[f'{name}.bias']

def test_linear_is_linear():
    c = config(); model, (past, future, static) = made(LinearPredictor, c); w = numbers(model); s = model(past, future, static).states.detach().numpy()
    x = np.concatenate([past[:, -1].numpy(), static.numpy()], 1)
    assert np.allclose(s, affine(w, 'now', x).reshape(6, 4, 8) + affine(w, 'future', future.numpy()))
    double = model(2 * past, 2 * future, 2 * static).states + model(0 * past, 0 * future, 0 * static).states
    assert np.allclose(double.detach().numpy(), 2 * s)

@pytest.mark.parametrize('layers', [1, 2])
def test_lstm_is_its_equations(layers):
    c = config(lstm_layers=layers); model, (past, future, static) = made(LSTMPredictor, c); w = numbers(model)
    first = np.tanh(affine(w, 'static', static.numpy())); h, k = np.split(first, 2, 1)
    state = [(h, k)] * layers
    def step(name, x):
        for l in range(layers):
            h, k = state[l]
            z = sum(a @ w[f'{name}.weight_{s}_l{l}'].T + w[f'{name}.bias_{s}_l{l}'] for a, s in ((x, 'ih'), (h, 'hh')))
            i, f, g, o = np.split(z, 4, 1)
            k = expit(f) * k + expit(i) * np.tanh(g); x = expit(o) * np.tanh(k); state[l] = (x, k)
        return x
    for t in range(7): step('encoder', affine(w, 'past', past[:, t].numpy()))
    at = positions(7, 4, 8).double().numpy()
    s = np.stack([step('decoder', affine(w, 'future.linear', future[:, t].numpy()) + at[t]) for t in range(4)], 1)
    assert np.allclose(model(past, future, static).states.detach().numpy(), s, atol=1e-6)

def test_transformer_is_its_equations():
    c = config(lstm_layers=2); model, (past, future, static) = made(TransformerPredictor, c); w = numbers(model)
    def norm(name, x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w[f'{name}.weight'] + w[f'{name}.bias']
    def attend(name, a, b, causal):
        (wq, wk, wv), (bq, bk, bv), out = np.split(w[f'{name}.in_proj_weight'], 3), np.split(w[f'{name}.in_proj_bias'], 3), np.zeros((*a.shape[:2], 8))
        q, k, v = a @ wq.T + bq, b @ wk.T + bk, b @ wv.T + bv
        for n, i, m in product(range(len(a)), range(a.shape[1]), (slice(0, 4), slice(4, 8))):
            seen = i + 1 if causal else b.shape[1]
            out[n, i, m] = softmax(k[n, :seen, m] @ q[n, i, m] / 2) @ v[n, :seen, m]     # sqrt(d / heads) = 2
        return affine(w, f'{name}.out_proj', out)
    def feed(name, x): return affine(w, f'{name}.linear2', np.maximum(affine(w, f'{name}.linear1', x), 0))
    x = affine(w, 'past.linear', past.numpy()) + positions(0, 7, 8).numpy() + affine(w, 'static', static.numpy())[:, None]
    for n in ('encoder.layers.0', 'encoder.layers.1'):
        y = norm(f'{n}.norm1', x); x = x + attend(f'{n}.self_attn', y, y, True); x = x + feed(n, norm(f'{n}.norm2', x))
    memory = norm('encoder.norm', x); x = affine(w, 'future.linear', future.numpy()) + positions(7, 4, 8).numpy()
    for n in ('decoder.layers.0', 'decoder.layers.1'):
        y = norm(f'{n}.norm1', x); x = x + attend(f'{n}.self_attn', y, y, True)
        x = x + attend(f'{n}.multihead_attn', norm(f'{n}.norm2', x), memory, False); x = x + feed(n, norm(f'{n}.norm3', x))
    out = model(past, future, static)
    assert np.allclose(out.states.detach().numpy(), norm('decoder.norm', x), atol=1e-6)
    with torch.no_grad(): assert torch.allclose(model(past, future, static).states, out.states, atol=1e-9)      # torch's fast path is the same
    a, b = (model.encoder.layers[i].self_attn.in_proj_weight for i in (0, 1)); assert not torch.equal(a, b)        # layers are no copies of one

@pytest.mark.parametrize('body, change', list(product(BODIES, [dict(), dict(n_static=0), dict(n_future=0), dict(n_future=0, n_static=0, lstm_layers=2), dict(d_model=3, n_heads=1, steps=1, lookback=1)])))
def test_no_later_input_and_no_neighbour_reaches_a_forecast(body, change):
    c = config(**change); model, (past, future, static) = made(body, c)
    with torch.no_grad(): q = model(past, future, static).quantiles
    assert q.shape == (6, c.steps, 3) and (q.diff(dim=-1) >= 0).all()
    with torch.no_grad(): assert torch.allclose(model(*(None if a is None else a[:1] for a in (past, future, static))).quantiles, q[:1])
    for k in range(c.steps if c.n_future else 0):
        moved = future.clone(); moved[:, k] += 1
        with torch.no_grad(): other = model(past, moved, static).quantiles
        assert torch.allclose(other[:, :k], q[:, :k], rtol=0, atol=1e-12) and not torch.allclose(other[:, k], q[:, k])

@pytest.mark.parametrize('body', BODIES)
def test_seeds_shapes_and_dropout(body):
    c = config(dropout=.5, lstm_layers=2); (a, inputs), (b, _), (other, _) = made(body, c), made(body, c), made(body, c, 1)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)) and not torch.equal(a(*inputs).states, other(*inputs).states)
    with torch.device('meta'): shapes = {k: v.shape for k, v in body(c).state_dict().items()}                  # a loader checks these before it allocates
    assert shapes == {k: v.shape for k, v in a.state_dict().items()}
    for x, n in zip((0, 1, 2), ('past', 'future', 'static')):
        with pytest.raises(ValueError, match=f'wrong shape: {n}'): a(*(t[..., :-1] if i == x else t for i, t in enumerate(inputs)))
    if body is not LinearPredictor: a.train(); assert not torch.equal(a(*inputs).states, a(*inputs).states)


@pytest.fixture(scope='module')
def judged():
    "Untrained forecasters, the parts of a small market"
    from dataclasses import replace
    from cryptoml.data import to_panel
    from cryptoml.forecaster import ForecasterConfig, begin, make_inputs, split
    from cryptoml.simulate import simulate
    from cryptoml.targets import make_targets
    market = simulate(n_symbols=3, n_bars=2600, seed=5); panel = to_panel(market.bars); inputs, targets = make_inputs(panel), make_targets(panel, (4, 12)); parts = split(panel, targets)
    c = ForecasterConfig(horizons=(4, 12)); rows = np.broadcast_to(parts['train'], panel.mask.shape)
    return [begin(inputs, rows, replace(c, seed=s)) for s in (0, 1)], inputs, targets, parts

def test_each_baseline_and_each_other_network_is_a_row(judged):
    from cryptoml.verdict import evaluate, gain_table
    (f, g), inputs, targets, parts = judged
    test = evaluate(f, inputs, targets, parts, others=dict(LSTM=g)); rows = test.rows(); gains = gain_table(rows)
    who = {t: {r['model'] for r in rows if r['target'] == t and r['horizon'] == 12} for t in {r['target'] for r in rows}}
    both, trees = {'network', 'LSTM'}, {'majority', 'momentum', 'logistic', 'boosting'}
    assert who == dict(direction=both | trees | {'persistence'}, up_or_down=both | trees | {'persistence'}, relative_direction=both | trees, regime=both | {'majority', 'persistence', 'logistic'},
                       volatility=both | {'persistence', 'HAR', 'boosting'}, relative=both | {'zero', 'momentum', 'boosting'}, size=both | {'hold', 'momentum', 'low volatility'})
    assert len(gains) == sum(len(c.forecasts) - 1 for c in test.comparisons) + len(test.books) - 1 and not test.absent
    alone = evaluate(f, inputs, targets, parts); scores = lambda rows: {(r['target'], r['horizon'], r['model'], r['metric']): r['value'] for r in rows}
    more, less = scores(rows), scores(alone.rows())
    assert {k: v for k, v in more.items() if 'LSTM' not in k and 'over LSTM' not in k[3]} == less            # another network changes no figure of these
    assert alone.verdict() == test.verdict()

def test_a_report_without_lightgbm_says_so_once(judged, monkeypatch):
    from cryptoml.verdict import evaluate
    (f, _), inputs, targets, parts = judged; monkeypatch.setitem(sys.modules, 'lightgbm', None)
    test = evaluate(f, inputs, targets, parts)
    assert len(test.absent) == 1 and 'cryptoml[boosting]' in test.absent[0] and not any('boosting' in c.forecasts for c in test.comparisons)

def test_a_taken_name_is_refused(judged):
    from cryptoml.verdict import evaluate
    (f, g), *rest = judged
    for name in ('network', 'HAR', 'hold'):
        with pytest.raises(ValueError, match=f'cannot be called {name}'): evaluate(f, *rest, others={name: g})
