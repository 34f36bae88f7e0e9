"Temporal Fusion Transformer against the paper's equations as plain loops, and what must hold for any configuration"
import math
from dataclasses import replace
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from cryptoml.tft import (
    TFTConfig, TemporalFusionTransformer, VariableSelection, attention_by_lag, ordered, permutation_importance,
    quantile_losses,
    quantile_loss, variable_importance,
)

Q = (.1, .5, .9)


def inputs(c, B=3, dtype=torch.float32, seed=0):
    r = draws(seed, dtype)
    return r(B, c.lookback, c.n_past), r(B, c.steps, c.n_future), r(B, c.n_static)


def draws(seed=1, dtype=torch.float64):
    "Standard normal numbers of a shape, one after another"
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)


def model(c, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return TemporalFusionTransformer(c).to(dtype)


def gap(a, b): return (a - b).abs().max().item()


# ---- the paper, unfolded, one window, one variable and one head at a time ----------------------------------

class Paper:
    "Weights of eqs. 2-23 in float64 numpy, drawn anew"
    def __init__(self, c, seed=0):
        self.c, self.rng = c, np.random.default_rng(seed)
        d, r, static = c.d_model, self.draw, c.n_static > 0
        self.past = self.selection_weights(c.n_past, static)
        self.future = self.selection_weights(c.n_future, static) if c.n_future else None
        self.step = None if c.n_future else r(c.steps, d)
        self.static = self.selection_weights(c.n_static, False) if static else None
        self.contexts = {k: self.grn_weights() for k in ('c_s', 'c_e', 'c_h', 'c_c')} if static else {}
        self.enc = [self.lstm_weights() for _ in range(c.lstm_layers)]
        self.dec = [self.lstm_weights() for _ in range(c.lstm_layers)]
        self.local = self.gate_weights(d)
        self.enrich = self.grn_weights(context=static)
        dh = d // c.n_heads
        query, key = [r(dh, d) for _ in range(c.n_heads)], [r(dh, d) for _ in range(c.n_heads)]
        self.att = dict(q=query, k=key, v=r(dh, d), h=r(d, dh))
        self.att_gate = self.gate_weights(d)
        self.ff = self.grn_weights()
        self.out_gate = self.gate_weights(d)
        self.head = dict(W=r(len(c.quantiles), d), b=r(len(c.quantiles)))

    def draw(self, *s): return self.rng.normal(size=s) / math.sqrt(s[-1])

    def gate_weights(self, out):
        r, d = self.draw, self.c.d_model
        return dict(W4=r(out, d), b4=r(out), W5=r(out, d), b5=r(out), g=1 + r(out), s=r(out))

    def grn_weights(self, out=None, inner=None, skip=False, context=False):
        r, d = self.draw, self.c.d_model
        out, inner = out or d, inner or d
        w = dict(W2=r(d, inner), b2=r(d), W1=r(d, d), b1=r(d)) | self.gate_weights(out)
        if skip: w |= dict(R=r(out, inner), r0=r(out))
        if context: w |= dict(W3=r(d, d))
        return w

    def selection_weights(self, n, context):
        r, d = self.draw, self.c.d_model
        weigh = self.grn_weights(n, n * d, True, context) if n > 1 else None
        return dict(w=r(n, d), b=r(n, d), each=[self.grn_weights() for _ in range(n)], weigh=weigh)

    def lstm_weights(self):
        r, d = self.draw, self.c.d_model
        return dict(Wi=r(4 * d, d), Wh=r(4 * d, d), bi=r(4 * d), bh=r(4 * d))


def softmax(e):
    e = np.exp(e - e.max())
    return e / e.sum()


def sigmoid(x): return 1 / (1 + np.exp(-x))


def elu(x): return np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1)


def gated(x, skip, w):
    glu = sigmoid(w['W4'] @ x + w['b4']) * (w['W5'] @ x + w['b5'])                                     # 5
    z = skip + glu
    return (z - z.mean()) / math.sqrt(((z - z.mean()) ** 2).mean() + 1e-5) * w['g'] + w['s']           # 2


def grn(a, w, c=None):
    eta2 = elu(w['W2'] @ a + w['b2'] + (w['W3'] @ c if 'W3' in w else 0))                               # 4
    eta1 = w['W1'] @ eta2 + w['b1']                                                                    # 3
    return gated(eta1, w['R'] @ a + w['r0'] if 'R' in w else a, w)


def select(x, w, c=None):
    xi = [w['w'][j] * x[j] + w['b'][j] for j in range(len(x))]
    v = softmax(grn(np.concatenate(xi), w['weigh'], c)) if w['weigh'] else np.ones(1)                   # 6
    return sum(v[j] * grn(xi[j], w['each'][j]) for j in range(len(x))), v                              # 7, 8


def lstm(xs, layers, states):
    states = list(states)
    for n, w in enumerate(layers):
        (h, c), out = states[n], []
        for x in xs:
            i, f, g, o = np.split(w['Wi'] @ x + w['bi'] + w['Wh'] @ h + w['bh'], 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            out.append(h)
        xs, states[n] = out, (h, c)
    return xs, states


def attend(theta, n, w, d):
    "Position n over all up to it: 16, heads first, mean last"
    total, weights = 0, np.zeros(len(theta))
    for wq, wk in zip(w['q'], w['k']):
        score = [(wq @ theta[n]) @ (wk @ theta[i]) / math.sqrt(d // len(w['q'])) for i in range(n + 1)]
        e = softmax(np.array(score))
        weights[:n + 1] += e / len(w['q'])
        total = total + sum(e[i] * (w['v'] @ theta[i]) for i in range(n + 1))
    return w['h'] @ (total / len(w['q'])), weights                                                     # 19


def quantiles(psi, w):
    z = w['W'] @ psi + w['b']                                                                          # 23, ordered
    m = len(z) // 2
    q = [z[m]]
    for i in range(m + 1, len(z)): q.append(q[-1] + math.log1p(math.exp(z[i])))
    for i in range(m - 1, -1, -1): q.insert(0, q[0] - math.log1p(math.exp(z[i])))
    return q


def forecast(p, past, future, static):
    "One window, as section 4 goes"
    c, L, K, d = p.c, p.c.lookback, p.c.steps, p.c.d_model
    zeta, vs = select(static, p.static) if p.static else (None, np.zeros(0))
    context = {k: grn(zeta, w) for k, w in p.contexts.items()}
    ps = [select(x, p.past, context.get('c_s')) for x in past]
    fs = [select(x, p.future, context.get('c_s')) for x in future] if p.future else [(s, np.zeros(0)) for s in p.step]
    xi = [x for x, _ in ps + fs]
    first = (context['c_h'], context['c_c']) if context else (np.zeros(d), np.zeros(d))
    a, state = lstm(xi[:L], p.enc, [first] * c.lstm_layers)
    b, _ = lstm(xi[L:], p.dec, state)
    phi = [gated(h, x, p.local) for h, x in zip(a + b, xi)]                                            # 17
    theta = [grn(h, p.enrich, context.get('c_e')) for h in phi]                                        # 18
    states, attention = [], []
    for n in range(L, L + K):
        beta, weights = attend(theta, n, p.att, d)
        delta = gated(beta, theta[n], p.att_gate)                                                      # 20
        states.append(gated(grn(delta, p.ff), phi[n], p.out_gate))                                     # 21, 22
        attention.append(weights)
    return dict(states=states, quantiles=[quantiles(psi, p.head) for psi in states], past_weights=[v for _, v in ps],
                future_weights=[v for _, v in fs], static_weights=vs, attention=attention)


def fold(p):
    "The paper's weights as the state dict of the module that must equal it"
    out, d = {}, p.c.d_model
    def put(k, v): out[k] = torch.tensor(np.ascontiguousarray(v), dtype=torch.float64)
    def gate(k, w):
        put(f'{k}.linear.weight', np.concatenate([w['W5'], w['W4']]))
        put(f'{k}.linear.bias', np.concatenate([w['b5'], w['b4']]))
        put(f'{k}.norm.weight', w['g'])
        put(f'{k}.norm.bias', w['s'])
    def network(k, w, embedding=None):                                    # of the inputs to fold in: slopes, offsets
        W2, b2 = w['W2'], w['b2']
        if embedding:
            slope, offset = embedding
            def parts(M): return [M[:, j * d:(j + 1) * d] for j in range(len(slope))]
            def slopes(M): return np.stack([m @ s for m, s in zip(parts(M), slope)], 1)
            def offsets(M): return sum(m @ o for m, o in zip(parts(M), offset))
            put(f'{k}.skip.weight', slopes(w['R']))
            put(f'{k}.skip.bias', w['r0'] + offsets(w['R']))
            W2, b2 = slopes(W2), b2 + offsets(W2)
        put(f'{k}.first.weight', W2)
        put(f'{k}.first.bias', b2)
        put(f'{k}.second.weight', w['W1'])
        put(f'{k}.second.bias', w['b1'])
        if 'W3' in w: put(f'{k}.context.weight', w['W3'])
        gate(f'{k}.gate', w)
    def selection(k, w):
        each, slope, offset = w['each'], w['w'], w['b']
        first = [[e['W2'] @ slope[j], e['W2'] @ offset[j] + e['b2']] for j, e in enumerate(each)]
        put(f'{k}.networks.first', first)
        put(f'{k}.networks.skip', np.stack([slope, offset], 1))
        for name, W, b in (('second', 'W1', 'b1'), ('value', 'W5', 'b5'), ('gate', 'W4', 'b4')):
            put(f'{k}.networks.{name}', [e[W].T for e in each])
            put(f'{k}.networks.{name}_bias', [[e[b]] for e in each])
        put(f'{k}.networks.gain', [[e['g']] for e in each])
        put(f'{k}.networks.shift', [e['s'] for e in each])
        if w['weigh']: network(f'{k}.weigh', w['weigh'], (slope, offset))
    selection('past', p.past)
    if p.future: selection('future', p.future)
    else: put('step', p.step)
    if p.static: selection('static.select', p.static)
    for k, w in p.contexts.items(): network(f'static.{k}', w)
    keys = dict(weight_ih='Wi', weight_hh='Wh', bias_ih='bi', bias_hh='bh')
    for side, layers in (('encoder', p.enc), ('decoder', p.dec)):
        for n, w in enumerate(layers):
            for name, key in keys.items(): put(f'local.{side}.{name}_l{n}', w[key])
    gate('local.gate', p.local)
    network('enrich', p.enrich)
    put('attention.query.weight', np.concatenate(p.att['q']))
    put('attention.key.weight', np.concatenate(p.att['k']))
    put('attention.value.weight', p.att['v'])
    put('attention.out.weight', p.att['h'])
    gate('attention_gate', p.att_gate)
    network('feed_forward', p.ff)
    gate('output_gate', p.out_gate)
    put('head.linear.weight', p.head['W'])
    put('head.linear.bias', p.head['b'])
    return out


@pytest.mark.parametrize('c', [
    TFTConfig(4, 3, 2, 5, 3, d_model=6, n_heads=2),
    TFTConfig(6, 2, 3, 3, 2, d_model=6, n_heads=3, lstm_layers=2, quantiles=(.05, .25, .5, .75, .95)),
    TFTConfig(3, 0, 0, 4, 2, d_model=4, n_heads=1, quantiles=(.5,)),
    TFTConfig(1, 1, 1, 2, 1, d_model=4, n_heads=4, quantiles=(.4, .6)),
], ids=['all', 'layers, as many inputs as columns', 'past only', 'one of each'])
def test_equals_the_paper_written_as_loops(c):
    paper, net = Paper(c, seed=1), model(c, torch.float64).eval()
    net.load_state_dict(fold(paper))                                     # strict: every parameter is mapped, no other
    batch = inputs(c, 2, torch.float64)
    out = net(*batch)
    for i in range(2):
        for name, want in forecast(paper, *(t[i].numpy() for t in batch)).items():
            got = getattr(out, name)[i].detach().numpy()
            assert np.abs(got - np.array(want).reshape(got.shape)).max(initial=0) < 1e-12, name


# ---- shapes, gradients, causality --------------------------------------------------------------------------

GRID = [
    TFTConfig(5, 3, 2, 7, 4, d_model=8, n_heads=4, quantiles=Q),
    TFTConfig(5, 0, 2, 7, 4, d_model=8, n_heads=2, quantiles=Q),
    TFTConfig(5, 3, 0, 7, 4, d_model=8, n_heads=1, quantiles=(.5,), lstm_layers=2),
    TFTConfig(5, 0, 0, 1, 1, d_model=8, n_heads=8, quantiles=(.1, .9)),
    TFTConfig(2, 1, 1, 3, 6, d_model=8, n_heads=2, quantiles=(.1, .3, .5, .7, .9), lstm_layers=3),
    TFTConfig(8, 8, 8, 2, 2, d_model=8, n_heads=2, quantiles=Q),
]
def short(c): return f'{c.n_past}-{c.n_future}-{c.n_static}-L{c.lookback}-K{c.steps}'


@pytest.mark.parametrize('c', GRID, ids=short)
def test_shapes_weights_and_gradients(c):
    net, batch = model(c), inputs(c, 6)
    out = net(*batch)
    K, T = c.steps, c.lookback + c.steps
    assert {k: tuple(v.shape) for k, v in out._asdict().items()} == dict(
        states=(6, K, 8),
        quantiles=(6, K, len(c.quantiles)),
        past_weights=(6, c.lookback, c.n_past),
        future_weights=(6, K, c.n_future),
        static_weights=(6, c.n_static),
        attention=(6, K, T),
    )
    for name in ('past_weights', 'future_weights', 'static_weights', 'attention'):
        w = getattr(out, name)
        if w.shape[-1]: assert torch.allclose(w.sum(-1), torch.ones(w.shape[:-1])), name
        assert (w >= 0).all()
    assert (out.quantiles.diff(dim=-1) >= 0).all()
    (out.quantiles * torch.randn(out.quantiles.shape)).sum().backward()
    idle = {k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    # one past bar and no static inputs: the encoder's recurrence has nothing but zeros to multiply
    allowed = {'local.encoder.weight_hh_l0'} if c.lookback == 1 and not c.n_static else set()
    assert idle == allowed
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def test_inputs_may_be_left_out_only_where_there_are_none():
    c = TFTConfig(4, 0, 0, 5, 2, d_model=8)
    net, (past, future, static) = model(c).eval(), inputs(c)
    assert torch.equal(net(past).quantiles, net(past, future, static).quantiles)
    with pytest.raises(ValueError, match=r'past \(3, 4, 4\), wanted \(3, 5, 4\)'): net(past[:, 1:])
    with pytest.raises(ValueError, match='static None'): model(TFTConfig(4, 0, 2, 5, 2, d_model=8))(past)
    with pytest.raises(ValueError, match='future'): net(past, torch.zeros(3, 2, 1))
    with pytest.raises(ValueError, match=r'no window to forecast: past is \(0, 5, 4\)'): net(past[:0])


@pytest.mark.parametrize('step', range(4))
def test_forecast_sees_no_later_step(step):
    c = GRID[0]
    net, (past, future, static) = model(c, torch.float64).eval(), inputs(c, dtype=torch.float64)
    a = net(past, future, static)
    future[:, step] += 3
    b = net(past, future, static)
    for name in ('quantiles', 'states', 'attention', 'future_weights'):
        moved = (getattr(a, name) - getattr(b, name)).abs().amax(-1).amax(0)
        assert (moved[:step] == 0).all() and (moved[step:step + 1] > 0).all(), name
    assert torch.equal(a.past_weights, b.past_weights) and torch.equal(a.static_weights, b.static_weights)
    assert (a.attention.triu(c.lookback + 1) == 0).all()


def test_every_past_bar_reaches_every_forecast():
    c = GRID[0]
    net, (past, future, static) = model(c, torch.float64).eval(), inputs(c, dtype=torch.float64)
    past.requires_grad_()
    for k in range(c.steps):
        g, = torch.autograd.grad(net(past, future, static).quantiles[:, k, 1].sum(), past)
        assert (g.abs().sum((0, 2)) > 0).all()


def test_samples_do_not_see_each_other():
    c = GRID[0]
    net, batch = model(c, torch.float64).eval(), inputs(c, 5, torch.float64)
    together, alone = net(*batch), [net(*(t[i:i + 1] for t in batch)) for i in range(5)]
    for name, got in together._asdict().items():
        assert gap(got, torch.cat([getattr(o, name) for o in alone])) < 1e-12, name


def test_a_nan_is_not_hidden():
    c = GRID[0]
    net, (past, future, static) = model(c).eval(), inputs(c)
    past[1, 3, 2] = torch.nan
    q = net(past, future, static).quantiles
    assert q[1].isnan().all() and q[[0, 2]].isfinite().all()


# ---- parts, chunks, dropout --------------------------------------------------------------------------------

def test_recomputed_is_the_same_function_to_the_last_bit():
    torch.manual_seed(0)
    kept, again = VariableSelection(5, 8, .3, recompute=False), VariableSelection(5, 8, .3, recompute=True)
    again.load_state_dict(kept.state_dict())
    x = torch.randn(700, 5)
    def run(net):
        torch.manual_seed(7)
        y, _ = net(x)
        y.square().sum().backward()
        return [y] + [p.grad for p in net.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(run(kept), run(again)))


def test_positions_in_parts_are_the_same_function():
    torch.manual_seed(0)
    net, x = VariableSelection(5, 8, .3).eval(), torch.randn(700, 5)
    whole, _ = net(x)
    parts = torch.cat([net(p)[0] for p in x.split(97)])
    assert gap(whole, parts) < 1e-5


# ---- runs of windows, groups of inputs ---------------------------------------------------------------------

@pytest.mark.parametrize('S, W, stride', [(3, 5, 1), (2, 4, 7), (1, 6, 12), (2, 1, 1)])
@pytest.mark.parametrize('c', GRID[:5], ids=short)
@pytest.mark.parametrize('grouped', [False, True])
def test_runs_equal_single_windows(c, S, W, stride, grouped):
    c = replace(c, dropout=0., groups=(c.n_past - 1, 1) if grouped else ())
    net, r, more = model(c, torch.float64), draws(), (W - 1) * stride
    past, future, static = r(S, c.lookback + more, c.n_past), r(S, c.steps + more, c.n_future), r(S, c.n_static)
    def cut(x, n): return torch.stack([x[s, w * stride:w * stride + n] for s in range(S) for w in range(W)])
    y = r(S * W, c.steps)
    def outcome(out):
        net.zero_grad()
        (quantile_loss(out.quantiles, y, c.quantiles) + out.states.square().sum()).backward()
        return [out.states, out.quantiles, out.attention] + [p.grad for p in net.parameters() if p.grad is not None]
    single = outcome(net(cut(past, c.lookback), cut(future, c.steps), static.repeat_interleave(W, 0)))
    shared = outcome(net.shared(past, future, static, W, stride))
    own_future = outcome(net.shared(past, cut(future, c.steps).unflatten(0, (S, W)), static, W, stride))
    for got in (shared, own_future):
        assert max(gap(a, b) for a, b in zip(got, single, strict=True)) < 1e-11


@pytest.mark.parametrize('c', GRID[:5], ids=short)
def test_running_lstm_by_a_loop_over_windows(c, S=3, W=4, stride=3):
    net, r = model(replace(c, running=True), torch.float64).eval(), draws()
    past, future, static = r(S, c.lookback + (W - 1) * stride, c.n_past), r(S, W, c.steps, c.n_future), r(S, c.n_static)
    got = net.shared(past, future, static, W, stride)
    (c_s, c_e, c_h, c_c), _ = net.contexts(static)
    def row(x): return None if x is None else x[:, None]
    for w in range(W):
        ahead, _ = net.ahead(future[:, w], row(c_s))
        from_first, _ = net.past(past[:, :c.lookback + w * stride], row(c_s))          # from the first bar of the run
        seen, phi = net.local(from_first, ahead, c_h, c_c)
        theta = net.enrich(phi, row(c_e))
        last = net.enrich(seen[:, -c.lookback:], row(c_e))                             # the last L bars alone
        beta, attention = net.attention(last, theta)
        psi = net.output_gate(net.feed_forward(net.attention_gate(beta, theta)), phi)
        assert gap(got.states[w::W], psi) < 1e-12
        assert gap(got.attention[w::W], attention) < 1e-12


@pytest.mark.parametrize('c', GRID[:5], ids=short)
def test_a_window_by_itself_does_not_know_of_the_running_lstm(c):
    window = inputs(c, dtype=torch.float64)
    one, other = model(c, torch.float64).eval()(*window), model(replace(c, running=True), torch.float64).eval()(*window)
    for name, want in one._asdict().items():
        if want.numel(): assert torch.equal(getattr(other, name), want), name


def test_groups_by_a_loop():
    torch.manual_seed(0)
    sizes = (3, 1, 2)
    net, x = VariableSelection(6, 8, 0., groups=sizes).double(), torch.randn(10, 6, dtype=torch.float64)
    f = net.networks
    with torch.no_grad():
        for p in (f.gain, f.shift): p.add_(torch.randn_like(p))
        got, v = net(x)
    def group_of(i, g, members):
        V = sum(v[i, j] for j in members)
        h = sum(v[i, j] / V * (f.first[j, 0] * x[i, j] + f.first[j, 1]) for j in members)
        skip = sum(v[i, j] / V * (f.skip[j, 0] * x[i, j] + f.skip[j, 1]) for j in members)
        eta = nn.functional.elu(h) @ f.second[g] + f.second_bias[g, 0]
        glu = torch.sigmoid(eta @ f.gate[g] + f.gate_bias[g, 0]) * (eta @ f.value[g] + f.value_bias[g, 0])
        return V * (nn.functional.layer_norm(skip + glu, (8,)) * f.gain[g, 0] + f.shift[g])
    members = [range(3), range(3, 4), range(4, 6)]
    for i in range(10):
        assert gap(got[i], sum(group_of(i, g, m) for g, m in enumerate(members))) < 1e-12


def test_a_group_of_no_weight_is_harmless():
    net = VariableSelection(6, 8, 0., groups=(3, 3))
    with torch.no_grad():
        net.weigh.gate.norm.weight.fill_(0)
        net.weigh.gate.norm.bias.copy_(torch.tensor([0., 0, 0, -200, -200, -200]))
    out, v = net(torch.randn(10, 6))
    out.sum().backward()
    assert (v[:, 3:] == 0).all()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_dropout_drops_in_training_only_and_by_the_seed():
    c = TFTConfig(5, 3, 2, 7, 4, d_model=8, dropout=.3)
    net, batch = model(c), inputs(c)
    def run(seed):
        torch.manual_seed(seed)
        return net(*batch).quantiles
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    net.eval()
    assert torch.equal(run(1), run(2))


def test_dropout_keeps_the_mean_of_a_linear_readout():
    torch.manual_seed(0)
    net = VariableSelection(2, 4, .5).double().networks
    seen = {}
    net.mix = lambda x, v, keep: seen.setdefault('keep', keep)
    net(torch.randn(20000, 2).double()[:256], torch.ones(256, 2).double())
    keep = seen['keep']
    assert set(keep.unique().tolist()) == {0., 2.}
    assert abs(keep.mean().item() - 1) < .15


def test_same_seed_same_weights_and_training():
    c = TFTConfig(5, 3, 2, 7, 4, d_model=8)
    def train():
        net, batch, y = model(c, seed=3), inputs(c, 8), torch.ones(8, 4)
        opt = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(5):
            opt.zero_grad()
            quantile_loss(net(*batch).quantiles, y, Q).backward()
            opt.step()
        return net.state_dict()
    a, b = train(), train()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_gradient_is_that_of_finite_differences():
    c = TFTConfig(3, 2, 2, 3, 2, d_model=4, n_heads=2, dropout=0.)
    net, batch = model(c, torch.float64), inputs(c, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda *b: net(*b).quantiles, [b.requires_grad_() for b in batch], fast_mode=True)
    names, values = zip(*net.named_parameters())
    def call(*v): return torch.func.functional_call(net, dict(zip(names, v)), batch).quantiles.square().mean()
    assert torch.autograd.gradcheck(call, values, fast_mode=True)


def test_second_derivatives_exist():
    c = TFTConfig(3, 2, 2, 3, 2, d_model=4, n_heads=2, dropout=0.)
    net, batch = model(c, torch.float64), inputs(c, 2, torch.float64)
    weights = list(net.past.parameters())
    first = torch.autograd.grad(net(*batch).quantiles.square().mean(), weights, create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), weights)
    assert all(x.isfinite().all() for x in second)
    assert any(x.any() for x in second)


@pytest.mark.parametrize('seed', range(3))
def test_learns_one_batch_by_heart(seed, steps=200):
    "Over five seeds and three instruction sets at most .013 of the first loss was left"
    c = TFTConfig(4, 2, 2, 8, 3, d_model=16, dropout=0.)
    net, batch = model(c, seed=seed), inputs(c, 16)
    y = draws(5, torch.float32)(16, 3)
    opt = torch.optim.Adam(net.parameters(), lr=1e-2)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    losses = []
    for _ in range(steps):
        loss = quantile_loss(net(*batch).quantiles, y, Q)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.)
        opt.step()
        rate.step()
        losses.append(loss.item())
    assert losses[-1] < .04 * losses[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device: the GPU is not tested')
def test_cuda_equals_cpu():
    c = TFTConfig(40, 4, 3, 48, 6, d_model=32, dropout=0.)
    net, batch = model(c), inputs(c, 64)
    there, batch_there = model(c).cuda(), [t.cuda() for t in batch]
    a, b = net(*batch).quantiles, there(*batch_there).quantiles
    a.square().mean().backward()
    b.square().mean().backward()
    assert gap(a, b.cpu()) < 1e-3
    assert max(gap(p.grad, q.grad.cpu()) for p, q in zip(net.parameters(), there.parameters())) < 1e-3


# ---- losses and interpretation -----------------------------------------------------------------------------

@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=9))
def test_ordered_never_crosses_and_keeps_the_middle(z):
    z = torch.tensor(z)
    q = ordered(z)
    assert q.shape == z.shape
    assert (q.diff() >= 0).all()
    assert q[len(z) // 2] == z[len(z) // 2]


@settings(max_examples=50, deadline=None)
@given(st.floats(-100, 100), st.floats(-100, 100), st.floats(.01, .99))
def test_pinball_by_hand(forecast, y, q):
    want = q * (y - forecast) if y >= forecast else (1 - q) * (forecast - y)
    forecast = torch.tensor([forecast], dtype=torch.float64)
    got = quantile_losses(forecast, torch.tensor(y, dtype=torch.float64), (q,)).item()
    assert got == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize('q', [.05, .3, .5, .95])
def test_quantile_loss_is_least_at_the_sample_quantile(q):
    y = torch.randn(2001, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 3
    def at(f): return quantile_loss(torch.full((2001, 1), f, dtype=torch.float64), y, (q,)).item()
    best = y.sort().values[math.ceil(q * 2001) - 1].item()                # convex, and bent at the sample only
    assert all(at(best) <= at(v) + 1e-12 for v in y.tolist() + [best - .1, best + .1])


@pytest.fixture
def outputs():
    "Two batches of an untrained network"
    c = TFTConfig(5, 3, 2, 7, 4, d_model=8)
    net = model(c).eval()
    return [net(*inputs(c, 3, seed=i)) for i in range(2)]


@pytest.mark.parametrize('kind, names', [('past', 'abcde'), ('future', 'abc'), ('static', 'ab')])
def test_importance_sums_to_one_and_falls(outputs, kind, names):
    s = variable_importance(outputs, list(names), kind)
    assert s.sum() == pytest.approx(1)
    assert s.is_monotonic_decreasing
    assert set(s.index) == set(names)


def test_importance_is_the_mean_weight(outputs):
    want = torch.cat([o.past_weights for o in outputs]).mean((0, 1))
    assert variable_importance(outputs, list('abcde'))['c'] == pytest.approx(want[2].item(), abs=1e-6)
    with pytest.raises(ValueError, match='kind'): variable_importance(outputs, list('abcde'), 'decoder')


def test_attention_by_lag_is_the_mean_attention(outputs):
    table = attention_by_lag(outputs)
    assert np.allclose(table.sum(axis=1), 1)
    assert list(table.columns) == list(range(6, -5, -1))
    want = torch.cat([o.attention for o in outputs])[:, 1, 6].mean().item()
    assert table.loc[2, 0] == pytest.approx(want, abs=1e-6)


def test_permutation_importance_shuffles_same_names_together():
    x = torch.randn(500, 4, 3, generator=torch.Generator().manual_seed(0))
    x[..., 1] = -x[..., 0]
    def loss(z): return (z[..., 0] + z[..., 1]).square().mean()           # zero while the two move together
    apart = permutation_importance(loss, x, ['a', 'b', 'c'])
    together = permutation_importance(loss, x, ['ab', 'ab', 'c'])
    assert apart['a'] > .5
    assert apart['c'] == 0
    assert together['ab'] == 0
    with pytest.raises(ValueError, match='2 names for 3'): permutation_importance(loss, x, ['a', 'b'])


@pytest.mark.parametrize('bad, said', [
    (dict(n_past=0), r"too small: {'n_past': 0}; the least allowed: {'n_past': 1}"),
    (dict(n_future=-1), 'too small'),
    (dict(lookback=0), 'too small'),
    (dict(steps=0), 'too small'),
    (dict(n_heads=0), 'too small'),
    (dict(d_model=10), 'd_model 10 is no multiple of n_heads 4'),
    (dict(dropout=1.), r'dropout must be in \[0, 1\), got 1.0'),
    (dict(groups=(1, 1)), 'add up to n_past 3'),
    (dict(groups=(0, 3)), 'sizes from 1'),
    (dict(quantiles=()), 'quantiles must rise'),
    (dict(quantiles=(.5, .5)), 'quantiles must rise'),
    (dict(quantiles=(0., .5)), 'quantiles must rise'),
    (dict(quantiles=(.9, .1)), 'quantiles must rise'),
])
def test_config_is_checked(bad, said):
    with pytest.raises(ValueError, match=said):
        TFTConfig(**dict(n_past=3, n_future=1, n_static=1, lookback=4, steps=2) | bad)
