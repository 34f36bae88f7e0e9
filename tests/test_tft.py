"Temporal Fusion Transformer against the paper's equations written as plain loops, and what must hold for any configuration"
import math
from dataclasses import replace
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from cryptoml.tft import (TFTConfig, TFTStream, TemporalFusionTransformer, VariableSelection, attention_by_lag, ordered, permutation_importance,
                          pinball, quantile_loss, variable_importance)

Q = (.1, .5, .9)


def inputs(c, B=3, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g, dtype=dtype)
    return r(B, c.lookback, c.n_past), r(B, c.steps, c.n_future), r(B, c.n_static)


def model(c, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return TemporalFusionTransformer(c).to(dtype)


# ---- the paper, unfolded, one window, one variable and one head at a time ----------------------------------------------

class Paper:
    "Eqs. 2-23 in float64 numpy with weights of its own; `fold` gives the state dict of the module that must equal it"

    def __init__(self, c, seed=0):
        self.c, self.rng = c, np.random.default_rng(seed)
        d, r = c.d_model, self.r
        self.p = {}
        def grn(out=d, skip=None, inner=d, context=False):
            w = dict(W2=r(d, inner), b2=r(d), W1=r(d, d), b1=r(d), W4=r(out, d), b4=r(out), W5=r(out, d), b5=r(out), g=1 + r(out), s=r(out))
            if skip: w |= dict(R=r(out, inner), r0=r(out))
            if context: w |= dict(W3=r(d, d))
            return w
        gate = lambda: dict(W4=r(d, d), b4=r(d), W5=r(d, d), b5=r(d), g=1 + r(d), s=r(d))
        static = c.n_static > 0
        def select(n, context):
            return dict(w=r(n, d), b=r(n, d), each=[grn() for _ in range(n)], weigh=grn(n, True, n * d, context) if n > 1 else None)
        lstm = lambda: dict(Wi=r(4 * d, d), Wh=r(4 * d, d), bi=r(4 * d), bh=r(4 * d))
        self.past = select(c.n_past, static)
        self.future = select(c.n_future, static) if c.n_future else None
        self.step = None if c.n_future else r(c.steps, d)
        self.static = select(c.n_static, False) if static else None
        self.contexts = {k: grn() for k in ('c_s', 'c_e', 'c_h', 'c_c')} if static else None
        self.enc, self.dec = [lstm() for _ in range(c.lstm_layers)], [lstm() for _ in range(c.lstm_layers)]
        self.local, self.enrich = gate(), grn(context=static)
        dh = d // c.n_heads
        self.att = dict(q=[r(dh, d) for _ in range(c.n_heads)], k=[r(dh, d) for _ in range(c.n_heads)], v=r(dh, d), h=r(d, dh))
        self.att_gate, self.ff, self.out_gate = gate(), grn(), gate()
        self.head = dict(W=r(len(c.quantiles), d), b=r(len(c.quantiles)))

    def r(self, *s): return self.rng.normal(size=s) / math.sqrt(s[-1])

    # forward
    @staticmethod
    def ln(x, g, s): return (x - x.mean()) / math.sqrt(((x - x.mean()) ** 2).mean() + 1e-5) * g + s
    @staticmethod
    def sig(x): return 1 / (1 + np.exp(-x))
    def glu(self, x, w): return self.sig(w['W4'] @ x + w['b4']) * (w['W5'] @ x + w['b5'])
    def gated(self, x, skip, w): return self.ln(skip + self.glu(x, w), w['g'], w['s'])

    def grn(self, a, w, c=None):
        pre = w['W2'] @ a + w['b2'] + (w['W3'] @ c if 'W3' in w else 0)
        eta2 = np.where(pre > 0, pre, np.exp(np.minimum(pre, 0)) - 1)
        return self.gated(w['W1'] @ eta2 + w['b1'], w['R'] @ a + w['r0'] if 'R' in w else a, w)

    def select(self, x, w, c=None):
        xi = [w['w'][j] * x[j] + w['b'][j] for j in range(len(x))]
        v = np.ones(1)
        if w['weigh']:
            e = self.grn(np.concatenate(xi), w['weigh'], c); e = np.exp(e - e.max()); v = e / e.sum()
        return sum(v[j] * self.grn(xi[j], w['each'][j]) for j in range(len(x))), v

    def lstm(self, xs, layers, states):
        for n, w in enumerate(layers):
            h, c = states[n]; out = []
            for x in xs:
                i, f, g, o = np.split(w['Wi'] @ x + w['bi'] + w['Wh'] @ h + w['bh'], 4)
                c = self.sig(f) * c + self.sig(i) * np.tanh(g); h = self.sig(o) * np.tanh(c); out.append(h)
            xs, states[n] = out, (h, c)
        return xs, states

    def __call__(self, past, future, static):
        c, d = self.c, self.c.d_model
        L, K = c.lookback, c.steps
        ctx, vs = dict.fromkeys(('c_s', 'c_e', 'c_h', 'c_c')), np.zeros(0)
        if self.static:
            zeta, vs = self.select(static, self.static)
            ctx = {k: self.grn(zeta, w) for k, w in self.contexts.items()}
        ps = [self.select(x, self.past, ctx['c_s']) for x in past]
        fs = [self.select(x, self.future, ctx['c_s']) for x in future] if self.future else [(s, np.zeros(0)) for s in self.step]
        xi = [x for x, _ in ps + fs]
        zero = np.zeros(d)
        state = [(ctx['c_h'], ctx['c_c']) if self.static else (zero, zero)] * c.lstm_layers
        a, state = self.lstm(xi[:L], self.enc, list(state)); b, _ = self.lstm(xi[L:], self.dec, state)
        phi = [self.gated(p, x, self.local) for p, x in zip(a + b, xi)]                                   # 17
        theta = [self.grn(p, self.enrich, ctx['c_e']) for p in phi]                                       # 18
        states, quant, att = [], [], np.zeros((K, L + K))
        for k in range(K):
            n, heads = L + k, []
            for wq, wk in zip(self.att['q'], self.att['k']):                                              # 16: heads first, mean last
                e = np.array([(wq @ theta[n]) @ (wk @ theta[i]) / math.sqrt(d // c.n_heads) for i in range(n + 1)])
                e = np.exp(e - e.max()); e /= e.sum()
                att[k, :n + 1] += e / c.n_heads
                heads.append(sum(e[i] * (self.att['v'] @ theta[i]) for i in range(n + 1)))
            delta = self.gated(self.att['h'] @ (sum(heads) / c.n_heads), theta[n], self.att_gate)         # 19, 20
            psi = self.gated(self.grn(delta, self.ff), phi[n], self.out_gate)                             # 21, 22
            z = self.head['W'] @ psi + self.head['b']; m = len(z) // 2                                    # 23, made ordered
            q = [z[m]]
            for i in range(m + 1, len(z)): q.append(q[-1] + math.log1p(math.exp(z[i])))
            for i in range(m - 1, -1, -1): q.insert(0, q[0] - math.log1p(math.exp(z[i])))
            states.append(psi); quant.append(q)
        return dict(states=states, quantiles=quant, past_weights=[v for _, v in ps], future_weights=[v for _, v in fs],
                    static_weights=vs, attention=att)

    # mapped weights
    def fold(self):
        out = {}
        def put(k, v): out[k] = torch.tensor(np.ascontiguousarray(v), dtype=torch.float64)
        def gate(k, w):
            put(f'{k}.linear.weight', np.concatenate([w['W5'], w['W4']])); put(f'{k}.linear.bias', np.concatenate([w['b5'], w['b4']]))
            put(f'{k}.norm.weight', w['g']); put(f'{k}.norm.bias', w['s'])
        def grn(k, w, e=None):                                    # e: embedding (w, b) of the inputs to fold in
            W2, b2, d = w['W2'], w['b2'], self.c.d_model
            if e:
                n = len(e[0]); cols = lambda M: np.stack([M[:, j * d:(j + 1) * d] @ e[0][j] for j in range(n)], 1)
                off = lambda M: sum(M[:, j * d:(j + 1) * d] @ e[1][j] for j in range(n))
                put(f'{k}.skip.weight', cols(w['R'])); put(f'{k}.skip.bias', w['r0'] + off(w['R']))
                b2, W2 = b2 + off(W2), cols(W2)
            put(f'{k}.first.weight', W2); put(f'{k}.first.bias', b2)
            put(f'{k}.second.weight', w['W1']); put(f'{k}.second.bias', w['b1'])
            if 'W3' in w: put(f'{k}.context.weight', w['W3'])
            gate(f'{k}.gate', w)
        def select(k, w):
            each, n = w['each'], len(w['each'])
            put(f'{k}.networks.first', [[e['W2'] @ w['w'][j], e['W2'] @ w['b'][j] + e['b2']] for j, e in enumerate(each)])
            put(f'{k}.networks.skip', [[w['w'][j], w['b'][j]] for j in range(n)])
            for name, W, b in (('second', 'W1', 'b1'), ('value', 'W5', 'b5'), ('gate', 'W4', 'b4')):
                put(f'{k}.networks.{name}', [e[W].T for e in each]); put(f'{k}.networks.{name}_bias', [[e[b]] for e in each])
            put(f'{k}.networks.gain', [[e['g']] for e in each]); put(f'{k}.networks.shift', [e['s'] for e in each])
            if w['weigh']: grn(f'{k}.weigh', w['weigh'], (w['w'], w['b']))
        select('past', self.past)
        if self.future: select('future', self.future)
        else: put('step', self.step)
        if self.static:
            select('static.select', self.static)
            for k, w in self.contexts.items(): grn(f'static.{k}', w)
        for side, layers in (('encoder', self.enc), ('decoder', self.dec)):
            for n, w in enumerate(layers):
                for name, key in (('weight_ih', 'Wi'), ('weight_hh', 'Wh'), ('bias_ih', 'bi'), ('bias_hh', 'bh')): put(f'local.{side}.{name}_l{n}', w[key])
        gate('local.gate', self.local); grn('enrich', self.enrich)
        put('attention.query.weight', np.concatenate(self.att['q'])); put('attention.key.weight', np.concatenate(self.att['k']))
        put('attention.value.weight', self.att['v']); put('attention.out.weight', self.att['h'])
        gate('attention_gate', self.att_gate); grn('feed_forward', self.ff); gate('output_gate', self.out_gate)
        put('head.linear.weight', self.head['W']); put('head.linear.bias', self.head['b'])
        return out


@pytest.mark.parametrize('c', [
    TFTConfig(4, 3, 2, 5, 3, d_model=6, n_heads=2),
    TFTConfig(6, 2, 3, 3, 2, d_model=6, n_heads=3, lstm_layers=2, quantiles=(.05, .25, .5, .75, .95)),   # n_past == d_model
    TFTConfig(3, 0, 0, 4, 2, d_model=4, n_heads=1, quantiles=(.5,)),
    TFTConfig(1, 1, 1, 2, 1, d_model=4, n_heads=4, quantiles=(.4, .6)),
], ids=['all', 'layers', 'past only', 'one of each'])
def test_equals_the_paper_written_as_loops(c):
    paper, net = Paper(c, seed=1), model(c, torch.float64).eval()
    net.load_state_dict(paper.fold())                                    # strict: every parameter is mapped, no other
    batch = inputs(c, 2, torch.float64)
    out = net(*batch)
    for i in range(2):
        for name, want in paper(*(t[i].numpy() for t in batch)).items():
            got = getattr(out, name)[i].detach().numpy()
            assert np.abs(got - np.array(want).reshape(got.shape)).max(initial=0) < 1e-12, name


# ---- shapes, gradients, causality ----------------------------------------------------------------------------------------

GRID = [TFTConfig(f, k, s, L, K, d_model=8, n_heads=h, lstm_layers=n, quantiles=q) for f, k, s, L, K, h, n, q in [
    (5, 3, 2, 7, 4, 4, 1, Q), (5, 0, 2, 7, 4, 2, 1, Q), (5, 3, 0, 7, 4, 1, 2, (.5,)), (5, 0, 0, 1, 1, 8, 1, (.1, .9)), (2, 1, 1, 3, 6, 2, 3, (.1, .3, .5, .7, .9)), (8, 8, 8, 2, 2, 2, 1, Q)]]


@pytest.mark.parametrize('c', GRID, ids=lambda c: f'{c.n_past}-{c.n_future}-{c.n_static}-L{c.lookback}-K{c.steps}')
def test_shapes_weights_and_gradients(c):
    net, batch = model(c), inputs(c, 6)
    out = net(*batch)
    K, T = c.steps, c.lookback + c.steps
    assert {k: tuple(v.shape) for k, v in out._asdict().items()} == dict(
        states=(6, K, 8), quantiles=(6, K, len(c.quantiles)), past_weights=(6, c.lookback, c.n_past), future_weights=(6, K, c.n_future),
        static_weights=(6, c.n_static), attention=(6, K, T))
    for name in ('past_weights', 'future_weights', 'static_weights', 'attention'):
        w = getattr(out, name)
        if w.shape[-1]: assert torch.allclose(w.sum(-1), torch.ones(w.shape[:-1])), name
        assert (w >= 0).all()
    assert (out.quantiles.diff(dim=-1) >= 0).all()
    (out.quantiles * torch.randn(out.quantiles.shape)).sum().backward()
    idle = {k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    # one past bar: the encoder starts from a zero state without static inputs, so its recurrence has nothing to multiply
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
        assert (got - torch.cat([getattr(o, name) for o in alone])).abs().max() < 1e-12, name


def test_a_nan_is_not_hidden():
    c = GRID[0]
    net, (past, future, static) = model(c).eval(), inputs(c)
    past[1, 3, 2] = torch.nan
    q = net(past, future, static).quantiles
    assert q[1].isnan().all() and q[[0, 2]].isfinite().all()


# ---- parts, chunks, dropout ---------------------------------------------------------------------------------------------

def test_positions_in_parts_and_recomputed_are_the_same_function():
    torch.manual_seed(0)
    a = VariableSelection(5, 8, .3, recompute=False); b = VariableSelection(5, 8, .3, recompute=True); b.load_state_dict(a.state_dict())
    x, out = torch.randn(700, 5), []
    for net in (a, b):
        torch.manual_seed(7)
        y, _ = net(x); y.square().sum().backward(); out.append([y] + [p.grad for p in net.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*out))
    a.eval()
    whole, _ = a(x); parts = torch.cat([a(p)[0] for p in x.split(97)])
    assert (whole - parts).abs().max() < 1e-5


# ---- runs of windows, streams, families ---------------------------------------------------------------------------------

@pytest.mark.parametrize('S, W, stride', [(3, 5, 1), (2, 4, 7), (1, 6, 12), (2, 1, 1)])
@pytest.mark.parametrize('c', GRID[:5], ids=lambda c: f'{c.n_future}-{c.n_static}-L{c.lookback}-K{c.steps}')
@pytest.mark.parametrize('families', [False, True])
def test_runs_equal_single_windows(c, S, W, stride, families):
    c = replace(c, dropout=0., families=(c.n_past - 1, 1) if families else ())
    net, g = model(c, torch.float64), torch.Generator().manual_seed(1)
    r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    past, future, static = r(S, c.lookback + (W - 1) * stride, c.n_past), r(S, c.steps + (W - 1) * stride, c.n_future), r(S, c.n_static)
    cut = lambda x, n: torch.stack([x[s, w * stride:w * stride + n] for s in range(S) for w in range(W)])
    y, results = r(S * W, c.steps), []
    for out in (net(cut(past, c.lookback), cut(future, c.steps), static.repeat_interleave(W, 0)),
                net.shared(past, future, static, W, stride), net.shared(past, cut(future, c.steps).unflatten(0, (S, W)), static, W, stride)):
        net.zero_grad(); (quantile_loss(out.quantiles, y, c.quantiles) + out.states.square().sum()).backward()
        results.append([out.states, out.quantiles, out.attention] + [p.grad for p in net.parameters() if p.grad is not None])
    for other in results[1:]:
        assert len(other) == len(results[0]) and max((a - b).abs().max().item() for a, b in zip(other, results[0])) < 1e-11


@pytest.mark.parametrize('c', GRID[:5], ids=lambda c: f'{c.n_future}-{c.n_static}-L{c.lookback}-K{c.steps}')
def test_running_lstm_by_a_loop_over_windows(c, S=3, W=4, stride=3):
    net, g = model(replace(c, running=True), torch.float64).eval(), torch.Generator().manual_seed(1)
    r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    past, future, static = r(S, c.lookback + (W - 1) * stride, c.n_past), r(S, W, c.steps, c.n_future), r(S, c.n_static)
    got = net.shared(past, future, static, W, stride)
    (c_s, c_e, c_h, c_c), _ = net.contexts(static)
    row = lambda x: None if x is None else x[:, None]
    for w in range(W):
        ahead, _ = net.ahead(future[:, w], row(c_s))
        seen, phi = net.local(net.past(past[:, :c.lookback + w * stride], row(c_s))[0], ahead, c_h, c_c)      # from the first bar of the run
        theta = net.enrich(phi, row(c_e))
        beta, attention = net.attention(net.enrich(seen[:, -c.lookback:], row(c_e)), theta)                   # the last L bars alone
        psi = net.output_gate(net.feed_forward(net.attention_gate(beta, theta)), phi)
        for a, b in ((got.states, psi), (got.attention, attention)): assert (a[w::W] - b).abs().max() < 1e-12
    exact = model(c, torch.float64).eval()(past[:, :c.lookback], future[:, 0], static)
    alone = net(past[:, :c.lookback], future[:, 0], static)
    for name, want in exact._asdict().items():
        if want.numel(): assert torch.equal(getattr(alone, name), want), name                                 # a window by itself does not know


@pytest.mark.parametrize('c', [*GRID[:5], replace(GRID[0], families=(2, 1, 2))], ids=lambda c: f'{c.n_future}-{c.n_static}-L{c.lookback}-K{c.steps}-{len(c.families)}')
def test_stream_equals_forward_at_every_bar(c):
    net, g = model(c, torch.float64).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters(): p += .3 * torch.randn(p.shape, generator=g, dtype=p.dtype)     # no gain of one, no shift of zero
    r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    bars, static = r(3, c.lookback + 9, c.n_past), r(3, c.n_static)
    stream = TFTStream(net, static if c.n_static else None)
    stream.update(bars[:, :c.lookback + 2])                              # more than a window at once
    for t in range(c.lookback + 2, bars.shape[1], 3):
        stream.update(bars[:, t:t + 3])
        end, future = min(t + 3, bars.shape[1]), r(3, c.steps, c.n_future)
        want = net(bars[:, end - c.lookback:end], future, static)
        for name, got in stream.forecast(future)._asdict().items():
            if getattr(want, name).numel(): assert (got - getattr(want, name)).abs().max() < 1e-12, name


def test_stream_refuses_what_does_not_fit():
    c = GRID[0]; net = model(c)
    with pytest.raises(ValueError, match='training mode'): TFTStream(net, torch.zeros(2, c.n_static))
    stream = TFTStream(net.eval(), torch.zeros(2, c.n_static))
    with pytest.raises(ValueError, match=r'wanted \[S, t, 5\]'): stream.update(torch.zeros(2, 5))
    stream.update(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match='3 of 7 bars'): stream.forecast(torch.zeros(2, 4, 3))
    net.load_state_dict(model(c, seed=1).state_dict())
    with pytest.raises(ValueError, match='weights have changed'): stream.update(torch.zeros(2, 1, 5))


def test_families_by_a_loop():
    torch.manual_seed(0)
    sizes = (3, 1, 2)
    net = VariableSelection(6, 8, 0., families=sizes).double(); x = torch.randn(10, 6, dtype=torch.float64)
    got, v = net(x); f = net.networks
    with torch.no_grad():
        for p in (f.gain, f.shift): p.add_(torch.randn_like(p))
        got, v = net(x)
        for i in range(10):
            total, start = 0, 0
            for g, n in enumerate(sizes):
                m = range(start, start + n); start += n
                V = sum(v[i, j] for j in m)
                h = sum(v[i, j] / V * (f.first[j, 0] * x[i, j] + f.first[j, 1]) for j in m)
                skip = sum(v[i, j] / V * (f.skip[j, 0] * x[i, j] + f.skip[j, 1]) for j in m)
                eta = nn.functional.elu(h) @ f.second[g] + f.second_bias[g, 0]
                glu = torch.sigmoid(eta @ f.gate[g] + f.gate_bias[g, 0]) * (eta @ f.value[g] + f.value_bias[g, 0])
                total = total + V * (nn.functional.layer_norm(skip + glu, (8,)) * f.gain[g, 0] + f.shift[g])
            assert (got[i] - total).abs().max() < 1e-12


def test_a_family_of_no_weight_is_harmless():
    net = VariableSelection(6, 8, 0., families=(3, 3))
    with torch.no_grad():
        net.weigh.gate.norm.weight.fill_(0); net.weigh.gate.norm.bias.copy_(torch.tensor([0., 0, 0, -200, -200, -200]))
    out, v = net(torch.randn(10, 6)); out.sum().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in net.parameters()) and (v[:, 3:] == 0).all()


def test_dropout_drops_in_training_only_and_by_the_seed():
    c = TFTConfig(5, 3, 2, 7, 4, d_model=8, dropout=.3)
    net, batch = model(c), inputs(c)
    def run(seed): torch.manual_seed(seed); return net(*batch).quantiles
    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    net.eval()
    assert torch.equal(run(1), run(2))


def test_dropout_keeps_the_mean_of_a_linear_readout():
    torch.manual_seed(0)
    net = VariableSelection(2, 4, .5).double().networks
    seen = {}
    net.mix = lambda x, v, keep: seen.setdefault('keep', keep)
    net(torch.randn(20000, 2).double()[:256], torch.ones(256, 2).double())
    keep = seen['keep']
    assert set(keep.unique().tolist()) == {0., 2.} and abs(keep.mean().item() - 1) < .15


def test_same_seed_same_weights_and_training():
    c = TFTConfig(5, 3, 2, 7, 4, d_model=8)
    def train():
        net = model(c, seed=3); opt = torch.optim.Adam(net.parameters(), lr=1e-2); batch = inputs(c, 8); y = torch.ones(8, 4)
        for _ in range(5): loss = quantile_loss(net(*batch).quantiles, y, Q); opt.zero_grad(); loss.backward(); opt.step()
        return net.state_dict()
    a, b = train(), train()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_gradient_is_that_of_finite_differences():
    c = TFTConfig(3, 2, 2, 3, 2, d_model=4, n_heads=2, dropout=0.)
    net, batch = model(c, torch.float64), inputs(c, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda *b: net(*b).quantiles, [b.requires_grad_() for b in batch], fast_mode=True)
    names, values = zip(*net.named_parameters())
    call = lambda *v: torch.func.functional_call(net, dict(zip(names, v)), batch).quantiles.square().mean()
    assert torch.autograd.gradcheck(call, values, fast_mode=True)


def test_second_derivatives_exist():
    c = TFTConfig(3, 2, 2, 3, 2, d_model=4, n_heads=2, dropout=0.)
    net, batch = model(c, torch.float64), inputs(c, 2, torch.float64)
    g = torch.autograd.grad(net(*batch).quantiles.square().mean(), list(net.past.parameters()), create_graph=True)
    gg = torch.autograd.grad(sum(x.square().sum() for x in g), list(net.past.parameters()))
    assert all(x.isfinite().all() for x in gg) and any(x.any() for x in gg)


def test_overfits_one_batch():
    c = TFTConfig(4, 2, 2, 8, 3, d_model=16, dropout=0.)
    net, batch = model(c), inputs(c, 16)
    y = torch.randn(16, 3, generator=torch.Generator().manual_seed(5))
    opt = torch.optim.Adam(net.parameters(), lr=1e-2)
    first = None
    for _ in range(200):
        loss = quantile_loss(net(*batch).quantiles, y, Q)
        first = first or loss.item(); opt.zero_grad(); loss.backward(); nn.utils.clip_grad_norm_(net.parameters(), 1.); opt.step()
    assert loss.item() < .05 * first


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device: the GPU is not tested')
def test_cuda_equals_cpu():
    c = TFTConfig(40, 4, 3, 48, 6, d_model=32, dropout=0.)
    net, batch = model(c), inputs(c, 64)
    a = net(*batch).quantiles; a.square().mean().backward(); want = [p.grad.clone() for p in net.parameters()]
    net.zero_grad(); net.cuda()
    b = net(*(t.cuda() for t in batch)).quantiles; b.square().mean().backward()
    assert (a - b.cpu()).abs().max() < 1e-3
    assert max((p.grad.cpu() - w).abs().max() for p, w in zip(net.parameters(), want)) < 1e-3


# ---- losses and interpretation --------------------------------------------------------------------------------------------

@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=9))
def test_ordered_never_crosses_and_keeps_the_middle(z):
    z = torch.tensor(z)
    q = ordered(z)
    assert q.shape == z.shape and (q.diff() >= 0).all() and q[len(z) // 2] == z[len(z) // 2]


@settings(max_examples=50, deadline=None)
@given(st.floats(-100, 100), st.floats(-100, 100), st.floats(.01, .99))
def test_pinball_by_hand(forecast, y, q):
    want = q * (y - forecast) if y >= forecast else (1 - q) * (forecast - y)
    got = pinball(torch.tensor([forecast], dtype=torch.float64), torch.tensor(y, dtype=torch.float64), (q,)).item()
    assert got == pytest.approx(want, abs=1e-9)


def test_quantile_loss_is_least_at_the_sample_quantile():
    y = torch.randn(2001, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 3
    for q in (.05, .3, .5, .95):
        at = lambda f: quantile_loss(torch.full((2001, 1), f, dtype=torch.float64), y, (q,)).item()
        best = y.sort().values[math.ceil(q * 2001) - 1].item()            # the loss is convex and bends at the sample only
        assert all(at(best) <= at(v) + 1e-12 for v in y.tolist() + [best - .1, best + .1])


def test_importance_and_attention_tables():
    c = TFTConfig(5, 3, 2, 7, 4, d_model=8)
    net = model(c).eval()
    outs = [net(*inputs(c, 3, seed=i)) for i in range(2)]
    for kind, names in (('past', 'abcde'), ('future', 'abc'), ('static', 'ab')):
        s = variable_importance(outs, list(names), kind)
        assert s.sum() == pytest.approx(1) and s.is_monotonic_decreasing and set(s.index) == set(names)
    want = torch.cat([o.past_weights for o in outs]).mean((0, 1))
    assert variable_importance(outs, list('abcde'))['c'] == pytest.approx(want[2].item(), abs=1e-6)
    table = attention_by_lag(outs)
    assert np.allclose(table.sum(axis=1), 1) and list(table.columns) == list(range(6, -5, -1))
    assert table.loc[2, 0] == pytest.approx(torch.cat([o.attention for o in outs])[:, 1, 6].mean().item(), abs=1e-6)
    with pytest.raises(ValueError, match='kind'): variable_importance(outs, list('abcde'), 'decoder')


def test_permutation_importance_shuffles_same_names_together():
    x = torch.randn(500, 4, 3, generator=torch.Generator().manual_seed(0)); x[..., 1] = -x[..., 0]
    loss = lambda z: (z[..., 0] + z[..., 1]).square().mean()             # zero while the two move together
    apart, together = permutation_importance(loss, x, ['a', 'b', 'c']), permutation_importance(loss, x, ['ab', 'ab', 'c'])
    assert apart['a'] > .5 and apart['c'] == 0 and together['ab'] == 0
    with pytest.raises(ValueError, match='2 names for 3'): permutation_importance(loss, x, ['a', 'b'])


@pytest.mark.parametrize('bad', [dict(n_past=0), dict(n_future=-1), dict(lookback=0), dict(steps=0), dict(d_model=10), dict(dropout=1.), dict(quantiles=()),
                                 dict(quantiles=(.5, .5)), dict(quantiles=(0., .5)), dict(quantiles=(.9, .1))])
def test_config_is_checked(bad):
    with pytest.raises(ValueError): TFTConfig(**(dict(n_past=3, n_future=1, n_static=1, lookback=4, steps=2) | bad))
