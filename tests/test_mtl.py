"Multi-task heads and losses: missing labels, known optima, recovered noise"
import math
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from cryptoml.mtl import (TASKS, MultiTaskLearningHead, MultiTaskLoss, UncertaintyWeighting, classification_nll, multi_task_losses, quantile_nll,
                          regression_nll, task_loss, utility)

Q = (.1, .5, .9)


def case(B=40, H=3, d=8, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    head, states = MultiTaskLearningHead(d, H, Q).to(dtype), torch.randn(B, H, d, dtype=dtype)
    targets = dict(direction=torch.randint(3, (B, H)), relative=torch.randn(B, H, dtype=dtype), relative_direction=torch.randint(2, (B, H)),
                   volatility=torch.randn(B, H, dtype=dtype), regime=torch.randint(4, (B, H)), scaled=torch.randn(B, H, dtype=dtype),
                   cost=torch.rand(B, H, dtype=dtype) * .2)
    return head, states, targets


def punch(targets, hole):
    "The same targets with labels missing where `hole`"
    return {k: v if k == 'cost' else v.masked_fill(hole, torch.nan if v.is_floating_point() else -1) for k, v in targets.items()}


@pytest.mark.parametrize('H,quantiles', [(1, (.5,)), (3, Q), (4, (.05, .25, .5, .75, .95))])
def test_shapes_ranges_and_gradients(H, quantiles):
    torch.manual_seed(0)
    head = MultiTaskLearningHead(8, H, quantiles)
    out = head(100 * torch.randn(6, H, 8))
    assert {k: tuple(v.shape) for k, v in out.items()} == dict(direction=(6, H, 3), relative=(6, H), relative_direction=(6, H),
                                                               volatility=(6, H, len(quantiles)), regime=(6, H, 4), size=(6, H))
    assert (out['volatility'].diff(dim=-1) >= 0).all() and (out['size'].abs() <= 1).all()
    sum((v * torch.randn(v.shape)).sum() for v in head(torch.randn(6, H, 8)).values()).backward()
    assert all(p.grad.isfinite().all() and (p.grad != 0).all() for p in head.parameters())


def test_horizons_have_maps_of_their_own():
    head, states, _ = case()
    a = head(states)
    states = states.clone(); states[:, 1] += 1
    b = head(states)
    for k in a:
        assert torch.equal(a[k][:, [0, 2]], b[k][:, [0, 2]]) and not torch.equal(a[k][:, 1], b[k][:, 1]), k
    same = head(torch.ones(1, 3, 8, dtype=torch.float64))['relative'][0]
    assert same.unique().numel() == 3


@pytest.mark.parametrize('share', [.1, .5, 1.])
def test_missing_labels_leave_no_value_and_no_gradient(share):
    head, states, targets = case()
    hole = torch.rand(40, 3, generator=torch.Generator().manual_seed(1)) < share
    if share == 1.: hole[:] = True
    outputs = {k: v.detach().requires_grad_() for k, v in head(states).items()}
    loss = MultiTaskLoss(Q).double()
    total, losses = loss(outputs, punch(targets, hole))
    total.backward()
    assert total.isfinite()
    for k, out in outputs.items():
        assert out.grad.isfinite().all() and not out.grad[hole].any(), k
        if share < 1: assert out.grad[~hole].any(), k
    for k in TASKS:
        if share < 1: assert losses[k].item() == pytest.approx(task_loss(k, outputs[k], targets[k], Q)[~hole].mean().item(), rel=1e-9)
        else: assert losses[k] == 0 and loss.weighting.s[k].grad == 0
    if share == 1.: assert total == 0


def test_values_of_missing_labels_do_not_matter_to_the_last_bit():
    head, states, targets = case()
    hole = torch.rand(40, 3, generator=torch.Generator().manual_seed(1)) < .4
    other = case(seed=9)[2]
    mixed = {k: torch.where(hole, other[k], targets[k]) for k in targets}
    a, b = (MultiTaskLoss(Q)(head(states), punch(t, hole) | dict(cost=t['cost']))[0] for t in (targets, mixed))
    assert torch.equal(a, b)


def test_each_loss_against_torch():
    head, states, targets = case()
    out = head(states)
    losses, shares = multi_task_losses(out, targets, Q)
    want = dict(direction=F.cross_entropy(out['direction'].flatten(0, 1), targets['direction'].flatten()), relative=F.mse_loss(out['relative'], targets['relative']),
                relative_direction=F.binary_cross_entropy(out['relative_direction'].sigmoid(), targets['relative_direction'].double()),
                regime=F.cross_entropy(out['regime'].flatten(0, 1), targets['regime'].flatten()))
    e = targets['volatility'][..., None] - out['volatility']
    want['volatility'] = torch.stack([torch.where(e[..., i] > 0, q * e[..., i], (q - 1) * e[..., i]).mean() for i, q in enumerate(Q)]).mean()
    for k in TASKS: assert losses[k].item() == pytest.approx(want[k].item(), rel=1e-6), k
    assert all(s == 1 for s in shares.values())


def test_share_makes_the_sum_the_likelihood_of_the_labels_there():
    head, states, targets = case()
    hole = torch.rand(40, 3, generator=torch.Generator().manual_seed(1)) < .4
    out, w = head(states), UncertaintyWeighting(TASKS).double()
    with torch.no_grad():
        for i, s in enumerate(w.s.values()): s.fill_(.3 * i - .5)
    nll = dict(regression=regression_nll, classification=classification_nll, quantile=quantile_nll)
    each = sum(nll[kind](task_loss(k, out[k], targets[k], Q), w.s[k]) * ~hole for k, kind in TASKS.items())
    assert w(*multi_task_losses(out, punch(targets, hole), Q)).item() == pytest.approx(each.mean().item(), rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.floats(.01, 100))
def test_best_noise_of_a_fixed_loss(loss):
    x = torch.tensor(loss, dtype=torch.float64)
    for nll, best in ((regression_nll, math.log(loss)), (classification_nll, math.log(2 * loss)), (quantile_nll, math.log(loss))):
        s = torch.tensor(best, dtype=torch.float64, requires_grad=True)
        g, = torch.autograd.grad(nll(x, s), s, create_graph=True)
        curve, = torch.autograd.grad(g, s)
        assert abs(g.item()) < 1e-9 and curve > 0


def test_recovers_planted_noises_of_every_kind():
    torch.manual_seed(0)
    n = 20000
    gauss = .5 * torch.randn(n)
    laplace = torch.distributions.Laplace(0., 2.).sample((n,))          # level 1/2: |y| / 2 is the quantile loss, scale b = 1
    w = UncertaintyWeighting(dict(a='regression', b='quantile'))
    opt = torch.optim.Adam(w.parameters(), lr=.05)
    for _ in range(300):
        loss = w(dict(a=gauss.square().mean(), b=(.5 * laplace.abs()).mean()))
        opt.zero_grad(); loss.backward(); opt.step()
    assert w.noise()['a'] == pytest.approx(.5, rel=.02) and w.noise()['b'] == pytest.approx(1., rel=.03)


def test_loud_task_does_not_win():
    "Rescaling one task's labels by 100 leaves the weighted gradient of the shared parameter where it was, once the noise is learnt"
    def share(scale):
        w = UncertaintyWeighting(dict(a='regression', b='regression'))
        e = dict(a=torch.tensor(1.), b=torch.tensor(1. * scale ** 2))
        opt = torch.optim.LBFGS(w.parameters(), max_iter=200, line_search_fn='strong_wolfe')
        def closure(): opt.zero_grad(); loss = w(e); loss.backward(); return loss
        opt.step(closure)
        return math.exp(-w.s['b'].item()) * e['b'].item()
    assert share(100.) == pytest.approx(share(1.), rel=1e-2)


@settings(max_examples=40, deadline=None)
@given(st.floats(-1, 1), st.floats(-5, 5), st.floats(0, 2), st.floats(.1, 5))
def test_utility_by_hand(p, z, c, risk):
    one = lambda v: torch.tensor([[v]], dtype=torch.float64)
    assert utility(one(p), one(z), one(c), risk).item() == pytest.approx(p * z - risk / 2 * (p * z) ** 2 - c * abs(p), abs=1e-9)


@pytest.mark.parametrize('m,cost,risk', [(.3, 0., 1.), (-.3, .1, 1.), (.05, .1, 1.), (0., .05, 2.), (.4, .1, 3.), (2., 0., .2)])
def test_size_arrives_at_the_closed_form(m, cost, risk):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 1, generator=g); z = (z - z.mean()) / z.std(correction=0) + m
    want = math.copysign(max(abs(m) - cost, 0) / (risk * (m * m + 1)), m)
    torch.manual_seed(1)
    head = MultiTaskLearningHead(1, 1)
    opt = torch.optim.Adam(head.parameters(), lr=.05); slow = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 400)
    for _ in range(400):
        p = head(torch.ones(1, 1, 1))['size']
        loss = -utility(p.expand(4000, 1), z, torch.full_like(z, cost), risk)
        opt.zero_grad(); loss.backward(); opt.step(); slow.step()
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
    assert set(loss.weighting.s) == set(TASKS) and 'size' not in TASKS
    total, losses = loss(head(states), targets)
    with torch.no_grad():
        for s in loss.weighting.s.values(): s.fill_(1.)
    other, _ = loss(head(states), targets)
    rest = lambda t: t - 2. * losses['size']
    nll = dict(regression=regression_nll, classification=classification_nll, quantile=quantile_nll)
    assert rest(total).item() == pytest.approx(sum(nll[k](losses[t], torch.tensor(0.)).item() for t, k in TASKS.items()), rel=1e-6)
    assert rest(other).item() == pytest.approx(sum(nll[k](losses[t], torch.tensor(1.)).item() for t, k in TASKS.items()), rel=1e-6)


def test_overfits_one_batch():
    torch.manual_seed(0)
    _, _, targets = case(B=12, H=2, dtype=torch.float32)
    states = torch.randn(12, 2, 32)
    head, loss = MultiTaskLearningHead(32, 2, Q), MultiTaskLoss(Q)
    opt = torch.optim.Adam([*head.parameters(), *loss.parameters()], lr=.05)
    for _ in range(400):
        total, losses = loss(head(states), targets)
        opt.zero_grad(); total.backward(); opt.step()
    out = head(states)
    assert (out['direction'].argmax(-1) == targets['direction']).all() and (out['regime'].argmax(-1) == targets['regime']).all()
    assert ((out['relative_direction'] > 0) == (targets['relative_direction'] == 1)).all()
    assert losses['relative'] < .01 and losses['volatility'] < .05 and losses['size'] < 0


def test_state_survives_a_round_trip():
    loss = MultiTaskLoss(Q)
    with torch.no_grad(): loss.weighting.s['regime'].fill_(1.5)
    other = MultiTaskLoss(Q); other.load_state_dict(loss.state_dict())
    assert other.weighting.noise() == loss.weighting.noise() and other.weighting.noise()['regime'] == pytest.approx(math.exp(.75))


def test_wrong_input_is_refused():
    head, states, targets = case()
    with pytest.raises(ValueError, match='do not end in'): head(states[:, :2])
    with pytest.raises(ValueError, match="no labels for .'regime'"): multi_task_losses(head(states), {k: v for k, v in targets.items() if k != 'regime'}, Q)
    with pytest.raises(ValueError, match='kind must be'): UncertaintyWeighting(dict(size='utility'))
