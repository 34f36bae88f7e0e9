"The network: dates with all their coins, every model by name, what must hold for any of them"
from dataclasses import replace
import pytest
import torch
from torch import nn
from cryptoml.network import MODELS, CoinGraph, Network, NetworkConfig, by_rows

C = NetworkConfig(n_past=7, n_future=5, n_static=3, n_pair=2, horizons=(2, 4), lookback=6, d_model=8, n_heads=2,
                  groups=(4, 3), dropout=0.)
ROWS = 3, 2, 4                                                           # dates, windows, coins


def batch(c=C, D=3, W=2, N=4, apart=3, dtype=torch.float32, seed=0):
    "Noise"
    g, H = torch.Generator().manual_seed(seed), len(c.horizons)
    def r(*s): return torch.randn(*s, generator=g, dtype=dtype)
    def label(n): return torch.randint(n, (D, W, N, H), generator=g)
    return dict(
        past=r(D, N, c.lookback + (W - 1) * apart, c.n_past),
        future=r(D, W, c.steps, c.n_future),
        static=r(D, N, c.n_static),
        pairs=r(D, N, N, c.n_pair),
        present=torch.ones(D, W, N, dtype=torch.bool),
        direction=label(3),
        relative_direction=label(2),
        regime=label(4),
        relative=r(D, W, N, H),
        volatility=r(D, W, N, H),
        scaled=r(D, W, N, H),
        cost=torch.full((D, W, N, H), .05, dtype=dtype),
        path=r(D, W, N, c.steps),
    )


def network(model='network', dtype=torch.float32, seed=0, **k):
    torch.manual_seed(seed)
    return Network(replace(C, model=model, **k)).to(dtype)


def coins(b, order):
    "The batch with its coins in another order"
    b = {k: v[:, :, order] if k in by_rows(b) or k == 'present' else v for k, v in b.items()}
    pairs = b['pairs'][:, order][:, :, order]
    return b | dict(past=b['past'][:, order], static=b['static'][:, order], pairs=pairs)


def path(net, b): return net.read(b)['path'].unflatten(0, ROWS)


def gap(a, b): return (a - b).abs().max().item()


@pytest.mark.parametrize('model', MODELS)
def test_order_of_coins_does_not_matter(model):
    net, b, order = network(model, torch.float64).eval(), batch(dtype=torch.float64), [2, 0, 3, 1]
    one, other = net.read(b), net.read(coins(b, order))
    for k in one:
        x, y = (t.unflatten(0, ROWS) for t in (one[k], other[k]))
        x = x[:, :, order]
        if k == 'coins': x = x[..., order]
        assert gap(x, y) < 1e-12, k
    assert abs(net.loss(b)[0] - net.loss(coins(b, order))[0]) < 1e-12


@pytest.mark.parametrize('filler', [0., 1e3])
def test_a_missing_coin_changes_nothing(filler):
    net, b = network(dtype=torch.float64).eval(), batch(dtype=torch.float64)
    b['present'][:, :, 1] = False
    b['past'][:, 1] = filler
    b['static'][:, 1] = filler
    b['pairs'][:, 1] = filler
    b['pairs'][:, :, 1] = filler
    there = [0, 2, 3]
    all_four, three = net.read(b), net.read(coins(b, there))
    for k in all_four:
        x = all_four[k].unflatten(0, ROWS)[:, :, there]
        if k == 'coins':
            assert not x[..., 1].any()
            x = x[..., there]
        assert gap(x, three[k].unflatten(0, (3, 2, 3))) < 1e-12, k


def test_a_coin_alone():
    net, b = network(), batch(N=1)
    said = net.read(b)
    assert all(v.isfinite().all() for v in said.values())
    assert (said['coins'] == 1).all()


def test_a_date_without_coins():
    net, b = network(), batch()
    b['present'][0] = False
    loss, _ = net.loss(b)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize('model', MODELS)
def test_coins_see_each_other_by_the_graph_alone(model):
    net, b = network(model, torch.float64).eval(), batch(dtype=torch.float64)
    before = path(net, b)[:, :, 0]
    b['past'][:, 1] += 1
    moved = gap(path(net, b)[:, :, 0], before) > 1e-9
    assert moved == ('graph' in MODELS[model])


@pytest.mark.parametrize('model', MODELS)
def test_dates_do_not_see_each_other_and_windows_see_no_later_bar(model):
    net, b = network(model, torch.float64).eval(), batch(dtype=torch.float64)
    before = path(net, b)
    b['past'][1] += 1                                                    # another date
    b['past'][0, :, C.lookback:] += 1                                    # bars after the first window
    after = path(net, b)
    assert gap(after[2], before[2]) < 1e-12
    assert gap(after[0, 0], before[0, 0]) < 1e-12
    assert gap(after[0, 1], before[0, 1]) > 1e-6


@pytest.mark.parametrize('model', MODELS)
def test_float32_agrees_with_float64(model):
    a, b = network(model).eval(), network(model, torch.float64).eval()
    b.load_state_dict(a.state_dict())
    x = batch()
    wide = {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
    want = b.read(wide)
    for k, v in a.read(x).items(): assert gap(v, want[k]) < 1e-4, k


@pytest.mark.parametrize('model', MODELS)
def test_equal_seeds_train_to_equal_bits(model):
    def trained():
        net = network(model, dropout=.3)
        opt = torch.optim.AdamW(net.parameters(), 1e-2, fused=True)
        for step in range(3):
            opt.zero_grad()
            net.loss(batch(seed=step))[0].backward()
            opt.step()
        return torch.cat([p.detach().flatten() for p in net.parameters()])
    assert torch.equal(trained(), trained())


@pytest.mark.parametrize('model', [m for m in MODELS if m not in ('linear', 'gat')])
def test_learns_one_batch_by_heart(model, steps=250):
    "Over three seeds and three instruction sets every side was right and the path's loss at most .011"
    net, b = network(model, d_model=16), batch(D=4, W=1)
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for _ in range(steps):
        opt.zero_grad()
        net.loss(b)[0].backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.)
        opt.step()
        rate.step()
    scores = net.score([b])
    assert scores['accuracy'] > .98
    assert scores['relative_accuracy'] > .98
    assert scores['path'] < .05


def test_gradient_is_that_of_finite_differences(eps=1e-6):
    net, b = network(dtype=torch.float64, seed=1), batch(D=2, W=2, N=3, dtype=torch.float64)
    net.loss(b)[0].backward()
    g = torch.Generator().manual_seed(0)
    @torch.no_grad()
    def loss_at(p, shift):
        p += shift
        loss = net.loss(b)[0].item()
        p -= shift
        return loss
    for name, p in net.named_parameters():
        direction = torch.randn(p.shape, generator=g, dtype=torch.float64)
        want = (loss_at(p, eps * direction) - loss_at(p, -eps * direction)) / (2 * eps)
        assert (p.grad * direction).sum().item() == pytest.approx(want, abs=1e-6, rel=1e-5), name


def test_graph_reads_pairs():
    torch.manual_seed(0)
    graph, states, pairs = CoinGraph(8, 2, 2, 0.), torch.randn(2, 1, 5, 3, 8), torch.zeros(2, 5, 5, 2)
    pairs[:, 1, 4, 1] = 50.                                               # row 1 came after column 4
    _, looked = graph(states, pairs, torch.ones(2, 1, 5, dtype=torch.bool))
    assert (looked[:, :, :, 1, 4] > .9).all()
    assert (looked.diagonal(dim1=-2, dim2=-1) == 0).all()


@pytest.mark.parametrize('bad, said', [
    (dict(model='rnn'), 'model must be one of network, '),
    (dict(d_model=0), "whole numbers from 1 to 8192, got {'d_model': 0}"),
    (dict(n_pair=0), "got {'n_pair': 0}"),
    (dict(lookback=9999), "got {'lookback': 9999}"),
    (dict(horizons=()), 'horizons must be rising whole numbers of bars from 1, got ..'),
])
def test_config_is_checked(bad, said):
    with pytest.raises(ValueError, match=said): replace(C, **bad)


def test_groups_add_up_to_the_inputs():
    with pytest.raises(ValueError, match='add up to n_past 7'): Network(replace(C, groups=(1, 2)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('model', MODELS)
def test_cuda_equals_cpu(model):
    net, there, b = network(model).eval(), network(model).eval().cuda(), batch()
    want, got = net.read(b), there.read({k: v.cuda() for k, v in b.items()})
    for k, v in want.items(): assert gap(got[k].cpu(), v) < 1e-3, k
