"The network: dates with all their coins, every model by name, what must hold for any of them"
import math
from dataclasses import replace
import pytest
import torch
from torch import nn
from cryptoml.network import MODELS, CoinGraph, Network, NetworkConfig, by_rows
from cryptoml.trainer import adamw, train_epoch

C = NetworkConfig(n_past=7, n_future=5, n_static=3, n_pair=2, horizons=(2, 4), lookback=6, d_model=8, n_heads=2,
                  groups=(4, 3), dropout=0.)
ROWS = 3, 2, 4                                                           # dates, windows, coins
BY_COIN = ('coins', 'correlation')                                       # what has a column a coin


def batch(c=C, D=3, W=2, N=4, apart=3, dtype=torch.float32, seed=0):
    "Noise"
    g, H = torch.Generator().manual_seed(seed), len(c.horizons)
    def r(*s): return torch.randn(*s, generator=g, dtype=dtype)
    def label(n): return torch.randint(n, (D, W, N, H), generator=g)
    def alike(*s):
        x = r(*s)
        return x + x.transpose(2, 3)
    return dict(
        past=r(D, N, c.lookback + (W - 1) * apart, c.n_past),
        future=r(D, W, c.steps, c.n_future),
        static=r(D, N, c.n_static),
        pairs=r(D, N, N, c.n_pair),
        trailing=alike(D, W, N, N, c.n_trailing),
        present=torch.ones(D, W, N, dtype=torch.bool),
        direction=label(3),
        relative_direction=label(2),
        regime=label(4),
        relative=r(D, W, N, H),
        volatility=r(D, W, N, H),
        scaled=r(D, W, N, H),
        cost=torch.full((D, W, N, H), .05, dtype=dtype),
        path=r(D, W, N, c.steps),
        correlation=alike(D, W, N, N),
    )


def network(model='network', dtype=torch.float32, seed=0, **k):
    torch.manual_seed(seed)
    net = Network(replace(C, model=model, **k)).to(dtype)
    with torch.no_grad(): net.edges.signs += torch.randn(8)               # as if it had learnt something
    return net


def coins(b, order):
    "The batch with its coins in another order"
    b = {k: v[:, :, order] if k in by_rows(b) or k == 'present' else v for k, v in b.items()}
    pairs = b['pairs'][:, order][:, :, order]
    ours = dict(trailing=b['trailing'][:, :, order][:, :, :, order], correlation=b['correlation'][..., order])
    return b | ours | dict(past=b['past'][:, order], static=b['static'][:, order], pairs=pairs)


def path(net, b): return net.read(b)['path'].unflatten(0, ROWS)


def gap(a, b): return (a - b).abs().max().item()


@pytest.mark.parametrize('model', MODELS)
def test_order_of_coins_does_not_matter(model):
    net, b, order = network(model, torch.float64).eval(), batch(dtype=torch.float64), [2, 0, 3, 1]
    one, other = net.read(b), net.read(coins(b, order))
    for k in one:
        x, y = (t.unflatten(0, ROWS) for t in (one[k], other[k]))
        x = x[:, :, order]
        if k in BY_COIN: x = x[..., order]
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
    b['trailing'][:, :, 1] = b['trailing'][:, :, :, 1] = filler
    b['trailing'][0, 0, 0, 2] = b['trailing'][0, 0, 2, 0] = torch.nan     # filled from pairs that are there
    there = [0, 2, 3]
    all_four, three = net.read(b), net.read(coins(b, there))
    for k in all_four:
        x = all_four[k].unflatten(0, ROWS)[:, :, there]
        if k == 'coins': assert not x[..., 1].any()
        if k in BY_COIN: x = x[..., there]
        assert gap(x, three[k].unflatten(0, (3, 2, 3))) < 1e-12, k


def test_a_coin_alone():
    net, b = network(), batch(N=1)
    said = net.read(b)
    assert all(v.isfinite().all() for v in said.values())
    assert (said['coins'] == 1).all()
    assert (said['correlation'] == 1).all()


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


# ---- correlations

@pytest.mark.parametrize('model', MODELS)
def test_an_untrained_network_forecasts_the_trailing_correlation(model):
    torch.manual_seed(0)
    net, b = Network(replace(C, model=model)).eval(), batch()
    rho = net.read(b)['correlation'].unflatten(0, ROWS)
    others = ~torch.eye(4, dtype=torch.bool)
    torch.testing.assert_close(rho[..., others], b['trailing'][..., -1].tanh()[..., others])
    assert (rho.diagonal(dim1=2, dim2=3) == 1).all()


@pytest.mark.parametrize('model', MODELS)
def test_correlations_are_symmetric_and_inside_one(model):
    rho = network(model, torch.float64).eval().read(batch(dtype=torch.float64))['correlation'].unflatten(0, ROWS)
    assert gap(rho, rho.mT) < 1e-12
    assert (rho.abs() <= 1).all()


def test_a_coin_that_is_not_there_has_the_correlations_of_its_past():
    net, b = network(dtype=torch.float64).eval(), batch(dtype=torch.float64)
    b['present'][:, :, 1] = False
    rho = net.read(b)['correlation'].unflatten(0, ROWS)
    b['past'][:, 1] += 1
    b['static'][:, 1] += 1
    assert gap(net.read(b)['correlation'].unflatten(0, ROWS), rho) < 1e-12
    b['trailing'][:, :, 1] += 1
    b['trailing'][:, :, :, 1] += 1
    assert gap(net.read(b)['correlation'].unflatten(0, ROWS)[:, :, 1, 0], rho[:, :, 1, 0]) > .01


def test_the_loss_of_correlations_is_that_of_the_known_pairs():
    net, b = network(dtype=torch.float64).eval(), batch(dtype=torch.float64)
    b['correlation'][0, :, 2] = torch.nan                                # a coin that could not be read
    z = net(b)['correlation'].unflatten(0, ROWS)
    pairs = [(d, w, i, j) for d in range(3) for w in range(2) for i in range(4) for j in range(i)
             if not (d == 0 and 2 in (i, j))]
    want = sum((z[k] - b['correlation'][k]) ** 2 for k in pairs) / len(pairs)
    loss, parts = net.loss(b)
    assert parts['correlation'].item() == pytest.approx(want.item(), rel=1e-12)
    nothing = b | dict(correlation=torch.full_like(b['correlation'], torch.nan))
    without, parts = net.loss(nothing)
    share = len(pairs) / 36
    assert parts['correlation'] == 0
    assert (loss - without).item() == pytest.approx(.5 * share * want.item(), rel=1e-6)   # of variance one at first


def test_correlations_are_learnt_from_states_and_past(steps=300):
    "z of the next window: half of that of the longest span, and a product of the coins' first inputs"
    def planted(seed):
        b = batch(D=16, W=1, seed=seed)
        lead = b['past'][:, :, -1, 0].tanh()
        z = .5 * b['trailing'][..., -1] + (lead[:, :, None] * lead[:, None])[:, None]
        return b | dict(correlation=z)
    net = network('linear', d_model=16)
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(steps):
        opt.zero_grad()
        net.loss(planted(step))[0].backward()
        opt.step()
    test = planted(999)
    error = net.score([test])['correlation']
    past_alone = (.5 * test['trailing'][..., -1] - test['correlation'])[..., ~torch.eye(4, dtype=torch.bool)]
    assert net.edges.slopes.tolist() == pytest.approx([0, 0, .5], abs=.05)
    assert error < .5 * past_alone.square().mean()


@pytest.mark.parametrize('model', MODELS)
def test_learning_rates_of_the_parts(model):
    "The one that history shows, that of the first group, is the one that was asked for"
    net = network(model)
    groups = adamw(net, 1e-3, 0.).param_groups
    of = {p: g['lr'] for g in groups for p in g['params']}
    assert groups[0]['lr'] == 1e-3
    for name, p in net.named_parameters():
        slow = len(net.bodies) > 1 and name.startswith('bodies.tft')
        fast = name in ('edges.slopes', 'edges.shift', 'edges.signs')
        assert of[p] == pytest.approx(3e-5 if slow else 1e-2 if fast else 1e-3), name


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


def test_a_validation_is_measured_over_all_its_labels():
    "However it is cut into batches; by other libraries where there are any"
    net, b = network(), batch(D=6)
    b['direction'][0], b['relative_direction'][0], b['relative'][0] = -1, -1, torch.nan        # a date without labels
    whole, dated = net.score([b]), net.score({k: v[i:i + 1] for k, v in b.items()} for i in range(6))
    with torch.no_grad(): out, labels = net(b), by_rows(b)
    names = ('accuracy', 'mcc', 'side_accuracy', 'relative_accuracy', 'auc', 'mae')
    for k in names: assert whole[k] == pytest.approx(dated[k], abs=1e-6), k
    y, p = (t['direction'].flatten(0, 1) for t in (labels, out))
    kept = y >= 0
    table = torch.zeros(3, 3).index_put((y[kept], p.argmax(-1)[kept]), torch.tensor(1.), accumulate=True)
    assert whole['accuracy'] == pytest.approx((table.trace() / table.sum()).item())
    sides = (p[:, 2] > p[:, 0])[kept & (y != 1)] == (y == 2)[kept & (y != 1)]
    assert whole['side_accuracy'] == pytest.approx(sides.float().mean().item())
    y, p = labels['relative_direction'].flatten(), out['relative_direction'].flatten()
    pairs = p[y == 1][:, None] - p[y == 0]
    assert whole['auc'] == pytest.approx(((pairs > 0) + .5 * (pairs == 0)).float().mean().item())
    assert whole['mae'] == pytest.approx((out['relative'] - labels['relative']).abs().nanmean().item(), abs=1e-6)


def test_a_number_that_is_not_defined_is_no_error():
    net, b = network(), batch()
    b['relative_direction'][:] = 1                                                 # one class
    b['direction'][:] = -1                                                         # none
    s = net.score([b])
    assert all(math.isnan(s[k]) for k in ('auc', 'accuracy', 'side_accuracy', 'mcc'))
    assert 0 <= s['relative_accuracy'] <= 1
    with torch.no_grad(): net.heads.bias[:] = torch.nan                            # a training gone wrong
    assert math.isnan(net.score([b])['relative_accuracy'])


@pytest.mark.parametrize('model', MODELS)
def test_dates_in_pieces_are_the_batch(model):
    "Accumulated gradients, and those of processes: no date depends on another"
    b = batch(D=5)
    def gradient(accumulate):
        net = network(model)
        train_epoch(net, [b], Network.loss, torch.optim.SGD(net.parameters(), lr=0.), clip=1e9, accumulate=accumulate)
        return torch.cat([p.grad.flatten() for p in net.parameters()])
    whole = gradient(1)
    assert gap(gradient(3), whole) < 1e-5 * whole.abs().max()
