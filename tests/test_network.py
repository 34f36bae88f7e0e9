"The network: dates with all their coins, every model by name, what must hold for any of them"
from dataclasses import replace
import pytest
import torch
from cryptoml.network import MODELS, CoinGraph, Network, NetworkConfig, NetworkStream, by_rows

C = NetworkConfig(n_past=7, n_future=5, n_static=3, n_pair=2, horizons=(2, 4), lookback=6, d_model=8, n_heads=2, families=(4, 3), dropout=0.)


def batch(c=C, D=3, W=2, N=4, apart=3, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed); r = lambda *s: torch.randn(*s, generator=g, dtype=dtype)
    H, label = len(c.horizons), lambda n: torch.randint(n, (D, W, N, len(c.horizons)), generator=g)
    return dict(past=r(D, N, c.lookback + (W - 1) * apart, c.n_past), future=r(D, W, c.steps, c.n_future), static=r(D, N, c.n_static), pairs=r(D, N, N, c.n_pair), present=torch.ones(D, W, N, dtype=torch.bool),
                direction=label(3), relative_direction=label(2), regime=label(4), relative=r(D, W, N, H), volatility=r(D, W, N, H), scaled=r(D, W, N, H), cost=torch.full((D, W, N, H), .05, dtype=dtype), path=r(D, W, N, c.steps))


def network(model='network', dtype=torch.float32, seed=0, **k):
    torch.manual_seed(seed)
    return Network(replace(C, model=model, **k)).to(dtype)


def coins(b, order):
    "The batch with its coins in another order"
    b = {k: v[:, :, order] if k in by_rows(b) or k == 'present' else v for k, v in b.items()}
    return b | dict(past=b['past'][:, order], static=b['static'][:, order], pairs=b['pairs'][:, order][:, :, order])


@pytest.mark.parametrize('model', MODELS)
def test_order_of_coins_does_not_matter(model):
    net, b, order = network(model, torch.float64).eval(), batch(dtype=torch.float64), [2, 0, 3, 1]
    a, z = net.read(b), net.read(coins(b, order))
    for k in a:
        x, y = (t.unflatten(0, (3, 2, 4)) for t in (a[k], z[k]))
        x = x[:, :, order]
        if k == 'coins': x = x[..., order]
        assert (x - y).abs().max() < 1e-12, k
    assert abs(net.loss(b)[0] - net.loss(coins(b, order))[0]) < 1e-12


@pytest.mark.parametrize('filler', [0., 1e3])
def test_a_missing_coin_changes_nothing(filler):
    net, b = network(dtype=torch.float64).eval(), batch(dtype=torch.float64)
    b['present'][:, :, 1] = False
    for k in ('past', 'static'): b[k][:, 1] = filler
    b['pairs'][:, 1] = b['pairs'][:, :, 1] = filler
    left = coins(b, [0, 2, 3])
    a, z = net.read(b), net.read(left)
    for k in a:
        x = a[k].unflatten(0, (3, 2, 4))[:, :, [0, 2, 3]]
        if k == 'coins': assert not x[..., 1].any(); x = x[..., [0, 2, 3]]
        assert (x - z[k].unflatten(0, (3, 2, 3))).abs().max() < 1e-12, k


def test_a_coin_alone_and_a_date_without_coins():
    net = network(); b = batch(N=1)
    assert all(v.isfinite().all() for v in net.read(b).values()) and (net.read(b)['coins'] == 1).all()
    b = batch(); b['present'][0] = False
    loss = net.loss(b)[0]; loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def test_without_the_graph_coins_do_not_see_each_other():
    for model in MODELS:
        net, b = network(model, torch.float64).eval(), batch(dtype=torch.float64)
        before = net.read(b)['path'].unflatten(0, (3, 2, 4))[:, :, 0]
        b['past'][:, 1] += 1
        moved = (net.read(b)['path'].unflatten(0, (3, 2, 4))[:, :, 0] - before).abs().max() > 1e-9
        assert moved == ('graph' in MODELS[model]), model


@pytest.mark.parametrize('model', MODELS)
def test_dates_do_not_see_each_other_and_windows_see_no_later_bar(model):
    net, b = network(model, torch.float64).eval(), batch(dtype=torch.float64)
    before = net.read(b)['path'].unflatten(0, (3, 2, 4))
    later = {k: v.clone() for k, v in b.items()}; later['past'][1] += 1; later['past'][0, :, C.lookback:] += 1      # another date; bars after the first window
    after = net.read(later)['path'].unflatten(0, (3, 2, 4))
    assert (after[2] - before[2]).abs().max() < 1e-12 and (after[0, 0] - before[0, 0]).abs().max() < 1e-12 and (after[0, 1] - before[0, 1]).abs().max() > 1e-6


@pytest.mark.parametrize('model', MODELS)
def test_float32_agrees_with_float64_and_seeds_decide(model):
    a, b = network(model).eval(), network(model, torch.float64).eval()
    b.load_state_dict(a.state_dict())
    x = batch(); wide = {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
    for k, v in a.read(x).items(): assert (v - b.read(wide)[k]).abs().max() < 1e-4, k
    out = []
    for _ in range(2):
        net = network(model, dropout=.3); opt = torch.optim.AdamW(net.parameters(), 1e-2, fused=True)
        for step in range(3): opt.zero_grad(); net.loss(batch(seed=step))[0].backward(); opt.step()
        out.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(*out)


@pytest.mark.parametrize('model', [m for m in MODELS if m not in ('linear', 'gat')])
def test_overfits_one_batch(model):
    net, b = network(model, d_model=16), batch(D=4, W=1)
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(250): opt.zero_grad(); net.loss(b)[0].backward(); opt.step()
    scores = net.score([b])
    assert scores['accuracy'] > .95 and scores['relative_accuracy'] > .95 and scores['path'] < .1


def test_gradient_is_that_of_finite_differences():
    net, b = network(dtype=torch.float64, seed=1), batch(D=2, W=2, N=3, dtype=torch.float64)
    net.loss(b)[0].backward()
    rng, eps = torch.Generator().manual_seed(0), 1e-6
    for name, p in net.named_parameters():
        direction = torch.randn(p.shape, generator=rng, dtype=torch.float64)
        with torch.no_grad():
            p += eps * direction; up = net.loss(b)[0]; p -= 2 * eps * direction; down = net.loss(b)[0]; p += eps * direction
        want = ((up - down) / (2 * eps)).item()
        assert abs((p.grad * direction).sum().item() - want) < 1e-6 + 1e-5 * abs(want), name


@pytest.mark.parametrize('model', ['network', 'tft'])
def test_stream_equals_the_whole(model):
    net, b = network(model, torch.float64).eval(), batch(D=1, W=1, dtype=torch.float64)
    bars, L = torch.randn(4, 20, C.n_past, dtype=torch.float64), C.lookback
    stream = NetworkStream(net, b['static'][0], b['pairs'][0]); stream.update(bars[:, :L])
    present = torch.tensor([True, True, False, True])
    for t in range(L, 20):
        stream.update(bars[:, t:t + 1])
        want = net.read(b | dict(past=bars[None, :, t + 1 - L:t + 1], present=present[None, None]))
        for k, v in stream.forecast(b['future'][0, 0], present).items(): assert (v - want[k]).abs().max() < 1e-12, k


def test_graph_reads_pairs():
    torch.manual_seed(0)
    graph, states, pairs = CoinGraph(8, 2, 2, 0.), torch.randn(2, 1, 5, 3, 8), torch.zeros(2, 5, 5, 2)
    pairs[:, 1, 4, 1] = 50.                                               # row 1 came after column 4
    looked = graph(states, pairs, torch.ones(2, 1, 5, dtype=torch.bool))[1]
    assert (looked[:, :, :, 1, 4] > .9).all() and (looked.diagonal(dim1=-2, dim2=-1) == 0).all()


def test_config_is_checked():
    for bad in (dict(model='rnn'), dict(d_model=0), dict(n_pair=0), dict(lookback=9999)):
        with pytest.raises(ValueError): replace(C, **bad)
    with pytest.raises(ValueError, match='add up'): Network(replace(C, families=(1, 2)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('model', MODELS)
def test_cuda_equals_cpu(model):
    net, b = network(model).eval(), batch()
    want, there = net.read(b), network(model).eval().cuda()
    got = there.read({k: v.cuda() for k, v in b.items()})
    for k, v in want.items(): assert (got[k].cpu() - v).abs().max() < 1e-3, k
