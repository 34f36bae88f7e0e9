"Streams: what is said bar by bar is what the whole window says, at every bar and for any configuration"
from dataclasses import replace
import pytest
import torch
from cryptoml.network import Network, NetworkConfig
from cryptoml.stream import NetworkStream, TFTStream, merge_decoder, merge_gate, merge_network, merge_selection
from cryptoml.tft import GatedResidualNetwork, GatedSkip, TFTConfig, TemporalFusionTransformer, VariableSelection

Q = (.1, .5, .9)
ALL = TFTConfig(5, 3, 2, 7, 4, d_model=8, n_heads=4)
CONFIGS = {
    'all': ALL,
    'nothing known ahead': TFTConfig(5, 0, 2, 7, 4, d_model=8, n_heads=2),
    'no static inputs': TFTConfig(5, 3, 0, 7, 4, d_model=8, n_heads=1, lstm_layers=2, quantiles=(.5,)),
    'one bar': TFTConfig(5, 0, 0, 1, 1, d_model=8, n_heads=8, quantiles=(.1, .9)),
    'three layers': TFTConfig(2, 1, 1, 3, 6, d_model=8, n_heads=2, lstm_layers=3, quantiles=(.1, .3, .5, .7, .9)),
    'groups': replace(ALL, groups=(2, 1, 2)),
}


def draws(seed=1):
    "Standard normal float64 of a shape, one after another"
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)


def shaken(net, seed=2):
    "In float64 and evaluation mode, with no gain of one and no shift of zero"
    net, r = net.double().eval(), draws(seed)
    with torch.no_grad():
        for p in net.parameters(): p += .3 * r(*p.shape)
    return net


def model(c, seed=0):
    torch.manual_seed(seed)
    return TemporalFusionTransformer(c)


def gap(got, want): return max((a - b).abs().max().item() for a, b in zip(got, want, strict=True) if b.numel())


# ---- merged layers -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('bias', [None, True, False], ids=['alone', 'behind a map', 'behind a map without bias'])
def test_a_merged_gate_is_the_gate(bias):
    r = draws()
    gate = shaken(GatedSkip(8, 4, 0.))
    before = None if bias is None else shaken(torch.nn.Linear(8, 8, bias=bias))
    x, skip = r(3, 5, 8), r(3, 5, 4)
    want = gate(x if before is None else before(x), skip)
    assert gap([merge_gate(gate, before)(x, skip)], [want]) < 1e-12


@pytest.mark.parametrize('series', [1, 3])
@pytest.mark.parametrize('n', [None, 5], ids=['identity', 'linear residual'])
@pytest.mark.parametrize('context', [False, True])
def test_a_merged_network_is_the_network(series, n, context):
    r = draws()
    grn = shaken(GatedResidualNetwork(8, 0., context, n=n))
    a = r(series, 6, n or 8)
    c = r(series, 8) if context else None
    want = grn(a, c[:, None] if context else None)
    assert gap([merge_network(grn, c)(a)], [want]) < 1e-12


@pytest.mark.parametrize('series', [1, 3])
@pytest.mark.parametrize('n, groups', [(6, ()), (6, (4, 2)), (6, (1,) * 6), (1, ())])
def test_a_merged_selection_is_the_selection(series, n, groups):
    r = draws()
    select = shaken(VariableSelection(n, 8, 0., context=True, groups=groups))
    x, c = r(series, 7, n), r(series, 8)
    assert gap(merge_selection(select, c)(x), select(x, c[:, None])) < 1e-12


@pytest.mark.parametrize('c', CONFIGS.values(), ids=CONFIGS)
def test_a_merged_decoder_is_the_decoder(c):
    r = draws()
    net = shaken(model(c))
    contexts, _ = net.contexts(r(3, c.n_static))
    past, future = r(3, c.lookback, 8), r(3, c.steps, 8)
    assert gap(merge_decoder(net, contexts)(past, future), net.decode(past, future, contexts)) < 1e-12


# ---- streams -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('c', CONFIGS.values(), ids=CONFIGS)
def test_stream_equals_forward_at_every_bar(c):
    r = draws()
    net = shaken(model(c))
    bars, static = r(3, c.lookback + 9, c.n_past), r(3, c.n_static)
    stream = TFTStream(net, static if c.n_static else None)
    first = c.lookback + 2                                               # more than a window at once
    stream.update(bars[:, :first])
    for t in range(first, bars.shape[1], 3):
        stream.update(bars[:, t:t + 3])
        end, future = min(t + 3, bars.shape[1]), r(3, c.steps, c.n_future)
        assert gap(stream.forecast(future), net(bars[:, end - c.lookback:end], future, static)) < 1e-12


def test_stream_refuses_what_does_not_fit():
    net = model(ALL)
    with pytest.raises(ValueError, match='training mode'): TFTStream(net, torch.zeros(2, 2))
    stream = TFTStream(net.eval(), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r'wanted \[S, t, 5\]'): stream.update(torch.zeros(2, 5))
    stream.update(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match='3 of 7 bars'): stream.forecast(torch.zeros(2, 4, 3))
    net.load_state_dict(model(ALL, seed=1).state_dict())
    with pytest.raises(ValueError, match='weights have changed'): stream.update(torch.zeros(2, 1, 5))


@pytest.mark.parametrize('name', ['network', 'ungraphed', 'tft'])
def test_network_stream_equals_the_whole(name, N=4, bars=20):
    c = NetworkConfig(n_past=7, n_future=5, n_static=3, n_pair=2, horizons=(2, 4), lookback=6, d_model=8, n_heads=2,
                      groups=(4, 3), model=name)
    torch.manual_seed(0)
    net, r = Network(c).double().eval(), draws()
    past, future, static, pairs = r(N, bars, c.n_past), r(c.steps, c.n_future), r(N, c.n_static), r(N, N, c.n_pair)
    present = torch.tensor([True, True, False, True])
    trailing = r(N, N, c.n_trailing)
    trailing[0, 1, 0] = torch.nan                                         # a pair without a past
    fixed = dict(future=future[None, None], static=static[None], pairs=pairs[None], present=present[None, None],
                 trailing=trailing[None, None])
    with torch.no_grad(): net.edges.signs += 1                            # what a training would have found
    stream = NetworkStream(net, static, pairs)
    stream.update(past[:, :c.lookback])
    for t in range(c.lookback, bars):
        stream.update(past[:, t:t + 1])
        want = net.read(fixed | dict(past=past[None, :, t + 1 - c.lookback:t + 1]))
        said = stream.forecast(future, trailing, present)
        assert said.keys() == want.keys()
        assert gap(said.values(), want.values()) < 1e-12


@pytest.mark.parametrize('part', ['graph', 'bodies.tft'])
def test_a_network_stream_sees_that_what_it_merged_has_changed(part):
    c = NetworkConfig(n_past=7, n_future=5, n_static=3, n_pair=2, horizons=(2, 4), lookback=6, d_model=8, n_heads=2)
    net, r = Network(c).double().eval(), draws()
    stream = NetworkStream(net, r(4, c.n_static), r(4, 4, c.n_pair))
    stream.update(r(4, 6, c.n_past))
    with torch.no_grad(): next(net.get_submodule(part).parameters()).add_(1)
    with pytest.raises(ValueError, match='weights have changed'): stream.update(r(4, 1, c.n_past))
