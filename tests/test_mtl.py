"Multi-task heads and losses: missing labels, known optima, recovered noise"
import math
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from cryptoml.mtl import (BOUNDS, NLL, TASKS, MultiTaskLearningHead, MultiTaskLoss, UncertaintyWeighting,
                          classification_nll, multi_task_losses, quantile_nll, regression_nll, task_loss, utility)

Q = (.1, .5, .9)


def case(B=40, H=3, d=8, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    head = MultiTaskLearningHead(d, H, Q).to(dtype)
    states = torch.randn(B, H, d, dtype=dtype)
    targets = dict(
        direction=torch.randint(3, (B, H)),
        relative=torch.randn(B, H, dtype=dtype),
        relative_direction=torch.randint(2, (B, H)),
        volatility=torch.randn(B, H, dtype=dtype),
        regime=torch.randint(4, (B, H)),
        scaled=torch.randn(B, H, dtype=dtype),
        cost=torch.rand(B, H, dtype=dtype) * .2,
    )
    return head, states, targets


def punch(targets, hole):
    "The same targets with labels missing where `hole`"
    missing = lambda y: y.masked_fill(hole, torch.nan if y.is_floating_point() else -1)
    return {k: y if k == 'cost' else missing(y) for k, y in targets.items()}


def some(share):
    "A share of the labels of `case` [B, H]"
    return torch.rand(40, 3, generator=torch.Generator().manual_seed(1)) < share


def descend(opt, loss):
    opt.zero_grad()
    loss.backward()
    opt.step()


@pytest.mark.parametrize('H,quantiles', [(1, (.5,)), (3, Q), (4, (.05, .25, .5, .75, .95))])
def test_shapes_ranges_and_gradients(H, quantiles):
    torch.manual_seed(0)
    head = MultiTaskLearningHead(8, H, quantiles)
    out = head(100 * torch.randn(6, H, 8))
    assert {k: tuple(v.shape) for k, v in out.items()} == dict(
        direction=(6, H, 3),
        relative=(6, H),
        relative_direction=(6, H),
        volatility=(6, H, len(quantiles)),
        regime=(6, H, 4),
        size=(6, H),
    )
    assert (out['volatility'].diff(dim=-1) >= 0).all()
    assert (out['size'].abs() <= 1).all()
    sum((v * torch.randn(v.shape)).sum() for v in head(torch.randn(6, H, 8)).values()).backward()
    assert all(p.grad.isfinite().all() and (p.grad != 0).all() for p in head.parameters())


def test_horizons_have_maps_of_their_own():
    head, states, _ = case()
    a = head(states)
    states = states.clone()
    states[:, 1] += 1
    b = head(states)
    for k in a:
        assert torch.equal(a[k][:, [0, 2]], b[k][:, [0, 2]]), k
        assert not torch.equal(a[k][:, 1], b[k][:, 1]), k
    same = head(torch.ones(1, 3, 8, dtype=torch.float64))['relative'][0]
    assert same.unique().numel() == 3


def losses_with(hole):
    "Outputs with their gradients, loss module, its total and its parts, labels missing where `hole`"
    head, states, targets = case()
    outputs = {k: v.detach().requires_grad_() for k, v in head(states).items()}
    loss = MultiTaskLoss(Q).double()
    total, losses = loss(outputs, punch(targets, hole))
    total.backward()
    assert total.isfinite()
    for k, out in outputs.items():
        assert out.grad.isfinite().all(), k
        assert not out.grad[hole].any(), k
    return outputs, targets, loss, total, losses


@pytest.mark.parametrize('share', [.1, .5])
def test_missing_labels_leave_no_value_and_no_gradient(share):
    hole = some(share)
    outputs, targets, _, _, losses = losses_with(hole)
    for k, out in outputs.items(): assert out.grad[~hole].any(), k
    for k in TASKS:
        rest = task_loss(k, outputs[k], targets[k], Q)[~hole].mean().item()
        assert losses[k].item() == pytest.approx(rest, rel=1e-9)


def test_without_a_label_nothing_moves():
    _, _, loss, total, losses = losses_with(torch.ones(40, 3, dtype=torch.bool))
    assert total == 0
    for k in TASKS:
        assert losses[k] == 0
        assert loss.weighting.s[k].grad == 0


def test_values_of_missing_labels_do_not_matter_to_the_last_bit():
    head, states, targets = case()
    hole = some(.4)
    _, _, other = case(seed=9)
    mixed = {k: torch.where(hole, other[k], targets[k]) for k in targets}
    a, _ = MultiTaskLoss(Q)(head(states), punch(targets, hole))
    b, _ = MultiTaskLoss(Q)(head(states), punch(mixed, hole))
    assert torch.equal(a, b)


def test_each_loss_against_torch():
    head, states, targets = case()
    out = head(states)
    losses, shares = multi_task_losses(out, targets, Q)
    cross_entropy = lambda k: F.cross_entropy(out[k].flatten(0, 1), targets[k].flatten())
    above = out['relative_direction'].sigmoid()
    e = targets['volatility'][..., None] - out['volatility']
    q = torch.tensor(Q, dtype=e.dtype)
    want = dict(
        direction=cross_entropy('direction'),
        relative=F.mse_loss(out['relative'], targets['relative']),
        relative_direction=F.binary_cross_entropy(above, targets['relative_direction'].double()),
        volatility=torch.where(e > 0, q * e, (q - 1) * e).mean(),
        regime=cross_entropy('regime'),
    )
    for k in TASKS: assert losses[k].item() == pytest.approx(want[k].item(), rel=1e-6), k
    assert all(s == 1 for s in shares.values())


def test_share_makes_the_sum_the_likelihood_of_the_labels_there():
    head, states, targets = case()
    hole = some(.4)
    out = head(states)
    w = UncertaintyWeighting(TASKS).double()
    with torch.no_grad():
        for i, s in enumerate(w.s.values()): s.fill_(.3 * i - .5)
    nll = {k: NLL[kind](task_loss(k, out[k], targets[k], Q), w.s[k]) for k, kind in TASKS.items()}
    there = sum(each * ~hole for each in nll.values())
    got = w(*multi_task_losses(out, punch(targets, hole), Q))
    assert got.item() == pytest.approx(there.mean().item(), rel=1e-6)


@pytest.mark.parametrize('nll, best', [
    (regression_nll, lambda loss: math.log(loss)),
    (classification_nll, lambda loss: math.log(2 * loss)),
    (quantile_nll, lambda loss: math.log(loss)),
], ids=['regression', 'classification', 'quantile'])
@settings(max_examples=40, deadline=None)
@given(loss=st.floats(.01, 100))
def test_best_noise_of_a_fixed_loss(nll, best, loss):
    x = torch.tensor(loss, dtype=torch.float64)
    s = torch.tensor(best(loss), dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(nll(x, s), s, create_graph=True)
    curve, = torch.autograd.grad(slope, s)
    assert abs(slope.item()) < 1e-9
    assert curve > 0


def test_recovers_planted_noises_of_every_kind():
    torch.manual_seed(0)
    n = 20000
    gauss = .5 * torch.randn(n)
    laplace = torch.distributions.Laplace(0., 2.).sample((n,))   # level 1/2: |y| / 2 is the quantile loss, scale b = 1
    w = UncertaintyWeighting(dict(a='regression', b='quantile'))
    opt = torch.optim.Adam(w.parameters(), lr=.05)
    for _ in range(300):
        loss = w(dict(a=gauss.square().mean(), b=(.5 * laplace.abs()).mean()))
        descend(opt, loss)
    assert w.noise()['a'] == pytest.approx(.5, rel=.02)
    assert w.noise()['b'] == pytest.approx(1., rel=.03)


@pytest.mark.parametrize('kind', ['regression', 'classification', 'quantile'])
def test_a_task_that_is_always_right_does_not_run_away(kind):
    "10,000 steps at a loss of 0, and then one label that differs: it counts a few hundred times, not a million"
    w = UncertaintyWeighting(dict(a=kind))
    opt = torch.optim.AdamW(w.parameters(), lr=3e-3)
    for _ in range(10_000): descend(opt, w(dict(a=torch.tensor(0.))))
    one = w(dict(a=torch.tensor(1.)))
    assert w.s['a'].item() == BOUNDS[0]
    assert one.item() < math.exp(6)
    weight = dict(regression=.5, classification=1, quantile=1)[kind]
    price = dict(regression=.5, classification=.5, quantile=1)[kind]
    slope, = torch.autograd.grad(one, w.s['a'])
    assert slope.item() == pytest.approx(price - weight * math.exp(6), rel=1e-5)   # of the likelihood, not of a wall
    for _ in range(4000): descend(opt, w(dict(a=torch.tensor(1.))))
    assert w.s['a'].item() > -2                                                    # it leads back


def test_a_task_of_infinite_loss_stays_within_bounds():
    w = UncertaintyWeighting(dict(a='regression'))
    opt = torch.optim.SGD(w.parameters(), lr=1.)
    descend(opt, w(dict(a=torch.tensor(1e30))))
    assert w(dict(a=torch.tensor(1e30))).isfinite()
    assert w.s['a'].item() == BOUNDS[1]


def test_loud_task_does_not_win():
    """Rescaling one task's labels by 100 leaves the weighted gradient of the shared parameter where it was,
    once the noise is learnt"""
    def share(scale):
        w = UncertaintyWeighting(dict(a='regression', b='regression'))
        e = dict(a=torch.tensor(1.), b=torch.tensor(1. * scale ** 2))
        opt = torch.optim.LBFGS(w.parameters(), max_iter=200, line_search_fn='strong_wolfe')
        def closure():
            opt.zero_grad()
            loss = w(e)
            loss.backward()
            return loss
        opt.step(closure)
        return math.exp(-w.s['b'].item()) * e['b'].item()
    assert share(100.) == pytest.approx(share(1.), rel=1e-2)


@settings(max_examples=40, deadline=None)
@given(st.floats(-1, 1), st.floats(-5, 5), st.floats(0, 2), st.floats(.1, 5))
def test_utility_by_hand(p, z, c, risk):
    one = lambda v: torch.tensor([[v]], dtype=torch.float64)
    want = p * z - risk / 2 * (p * z) ** 2 - c * abs(p)
    assert utility(one(p), one(z), one(c), risk).item() == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize('m,cost,risk', [
    (.3, 0., 1.),
    (-.3, .1, 1.),
    (.05, .1, 1.),      # costs more than it brings
    (0., .05, 2.),
    (.4, .1, 3.),
    (2., 0., .2),       # more than 1: cut
])
def test_size_arrives_at_the_closed_form(m, cost, risk):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 1, generator=g)
    z = (z - z.mean()) / z.std(correction=0) + m
    want = math.copysign(max(abs(m) - cost, 0) / (risk * (m * m + 1)), m)
    torch.manual_seed(1)
    head = MultiTaskLearningHead(1, 1)
    opt = torch.optim.Adam(head.parameters(), lr=.05)
    slow = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 400)
    for _ in range(400):
        p = head(torch.ones(1, 1, 1))['size']
        loss = -utility(p.expand(4000, 1), z, torch.full_like(z, cost), risk)
        descend(opt, loss)
        slow.step()
    assert p.item() == pytest.approx(max(-1, min(1, want)), abs=.02)


def test_without_signal_cost_pushes_the_size_to_zero():
    z = torch.tensor([[1.], [-1.]])
    for p0 in (.4, -.4):
        p = torch.full((2, 1), p0, requires_grad=True)
        utility(p, z, torch.full((2, 1), .1)).backward()
        assert (p.grad.mean() * p0 < 0).all()


def test_utility_stands_outside_the_weighting():
    head, states, targets = case()
    loss = MultiTaskLoss(Q, size_weight=2.).double()
    assert set(loss.weighting.s) == set(TASKS)
    assert 'size' not in TASKS
    total, losses = loss(head(states), targets)
    with torch.no_grad():
        for s in loss.weighting.s.values(): s.fill_(1.)
    other, _ = loss(head(states), targets)
    weighed = lambda s: sum(NLL[kind](losses[k], torch.tensor(s)).item() for k, kind in TASKS.items())
    for got, s in ((total, 0.), (other, 1.)):
        assert (got - 2. * losses['size']).item() == pytest.approx(weighed(s), rel=1e-6)


def test_overfits_one_batch():
    torch.manual_seed(0)
    _, _, targets = case(B=12, H=2, dtype=torch.float32)
    states = torch.randn(12, 2, 32)
    head = MultiTaskLearningHead(32, 2, Q)
    loss = MultiTaskLoss(Q)
    opt = torch.optim.Adam([*head.parameters(), *loss.parameters()], lr=.05)
    for _ in range(400):
        total, losses = loss(head(states), targets)
        descend(opt, total)
    out = head(states)
    for k in ('direction', 'regime'): assert (out[k].argmax(-1) == targets[k]).all()
    assert ((out['relative_direction'] > 0) == (targets['relative_direction'] == 1)).all()
    assert losses['relative'] < .01
    assert losses['volatility'] < .05
    assert losses['size'] < 0


def test_state_survives_a_round_trip():
    loss = MultiTaskLoss(Q)
    with torch.no_grad(): loss.weighting.s['regime'].fill_(1.5)
    other = MultiTaskLoss(Q)
    other.load_state_dict(loss.state_dict())
    assert other.weighting.noise() == loss.weighting.noise()
    assert other.weighting.noise()['regime'] == pytest.approx(math.exp(.75))


def test_states_of_too_few_horizons_are_refused():
    head, states, _ = case()
    with pytest.raises(ValueError, match='do not end in'): head(states[:, :2])


def test_a_task_without_labels_is_refused():
    head, states, targets = case()
    del targets['regime']
    with pytest.raises(ValueError, match="no labels for .'regime'"): multi_task_losses(head(states), targets, Q)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match='kind must be'): UncertaintyWeighting(dict(size='utility'))
