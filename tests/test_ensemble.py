"Shares of members: second solutions by linear programming and by grids, and what must hold for any input"
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.optimize import linprog

from cryptoml.ensemble import (UltimateEnsemble, best_weights, classes, diversity, helpers, log_volatility, number,
                               quantiles, shares_of, stretches, weigh)

TAU = (.1, .5, .9)


def by_programming(z, y):
    "Shares of least mean pinball loss as a linear programme: y - sum w q = u - v"
    M, S, K = z.shape
    n = S * K
    tau = np.tile(TAU, S)
    cost = np.r_[np.zeros(M), tau, 1 - tau]
    fit = np.hstack([z.reshape(M, n).T, np.eye(n), -np.eye(n)])
    one = np.r_[np.ones(M), np.zeros(2 * n)][None]
    found = linprog(cost, A_eq=np.vstack([fit, one]), b_eq=np.r_[np.repeat(y, K), 1], bounds=(0, None))
    return found.x[:M], found.fun / n


@pytest.mark.parametrize('seed', range(3))
def test_quantile_shares_equal_a_linear_programme(seed):
    rng = np.random.default_rng(seed)
    part = rng.normal(size=(3, 120))
    y = part.sum(0)
    z = part[..., None] * [[[1.]], [[2.]], [[1.]]] + np.array([-1.5, 0, 1.5])
    kind = quantiles(TAU)
    exact, least = by_programming(z, y)
    w = best_weights(z, y, kind)
    paid = kind.loss(np.tensordot(w, z, 1), y).mean()
    assert paid == pytest.approx(least, rel=2e-3)
    assert w == pytest.approx(exact, abs=.05)


def test_number_shares_equal_the_normal_equations():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=3000)
    errors = rng.normal(size=(3, 3000)) * [[1.], [1.5], [2.]]
    z = (truth + errors)[..., None]
    moments = np.linalg.inv(np.cov(errors, bias=True) + np.outer(errors.mean(1), errors.mean(1)))
    expected = moments.sum(1) / moments.sum()          # minimum variance, all positive here
    assert (expected > 0).all()
    assert best_weights(z, truth, number()) == pytest.approx(expected, abs=1e-3)


@given(st.integers(0, 10**6), st.integers(1, 5), st.sampled_from(['classes', 'quantiles', 'number', 'volatility']))
@settings(max_examples=25, deadline=None)
def test_shares_are_shares_and_no_member_alone_is_better(seed, M, name):
    rng = np.random.default_rng(seed)
    S = 120
    y = rng.normal(size=S)
    kind = dict(classes=classes(), quantiles=quantiles(TAU), number=number(), volatility=log_volatility())[name]
    said = y + rng.normal(size=(M, S)) * rng.uniform(.3, 2, (M, 1))
    if name == 'classes': said, y = rng.dirichlet(np.ones(3), (M, S)), rng.integers(0, 3, S)
    if name == 'quantiles': said = said[..., None] + np.array([-1, 0, 1.])
    z = kind.scale(said)
    w = best_weights(z, y, kind)
    assert (w >= 0).all() and w.sum() == pytest.approx(1)
    paid = kind.loss(np.tensordot(w, z, 1), y).mean()
    alone = min(kind.loss(m, y).mean() for m in z)
    assert paid <= alone * (1 + 1e-4) + 1e-9


def test_shares_follow_their_member():
    rng = np.random.default_rng(1)
    day = np.arange(60).repeat(5)
    y = rng.normal(size=300)
    z = (y + rng.normal(size=(3, 300)) * [[.5], [1.], [3.]])[..., None]
    w = helpers(z, y, day, number()).weights
    turned = helpers(z[[2, 0, 1]], y, day, number()).weights
    assert turned == pytest.approx(w[[2, 0, 1]], abs=1e-4)


def test_two_equal_members_share_alike_and_one_alone_has_all():
    rng = np.random.default_rng(2)
    day = np.arange(60).repeat(5)
    y = rng.normal(size=300)
    z = (y + rng.normal(size=300))[None, :, None]
    assert helpers(z, y, day, number()).weights.tolist() == [1.]
    assert weigh(np.repeat(z, 2, 0), y, day, number()).weights == pytest.approx([.5, .5], abs=1e-6)


def test_a_future_label_never_reaches_into_what_is_paid():
    day = np.repeat(np.arange(50), 4)
    for apart, paid in stretches(day, overlap=3):
        assert np.abs(day[apart][:, None] - day[paid][None]).min() > 3


def test_unknown_outcomes_and_silent_members_are_left_out_of_the_fit():
    rng = np.random.default_rng(3)
    day = np.arange(80).repeat(4)
    y = rng.normal(size=320)
    said = dict(a=y + rng.normal(size=320), b=y + 2 * rng.normal(size=320))
    known = shares_of(number(), said, y, day, 1)
    more = {k: np.r_[v, 99., 99.] for k, v in said.items()}
    more['b'][-1] = np.nan
    assert shares_of(number(), more, np.r_[y, np.nan, 0.], np.r_[day, 80, 80], 1) == pytest.approx(known)


def test_an_average_is_what_its_members_say_weighed():
    kinds = dict(direction=classes(), volatility=quantiles(TAU))
    weights = dict(direction=dict(a=np.array([.25, 1.]), b=np.array([.75, 0.])),
                   volatility=dict(a=np.array([1., .5]), c=np.array([0., .5])))
    e = UltimateEnsemble(kinds, weights)
    p = np.array([[[.2, .8], [.5, .5]]])
    q = np.array([[[.6, .4], [.1, .9]]])
    v = np.array([[[-1., 0, 1], [-2., 0, 2]]])
    out = e.combine(dict(a=dict(direction=p, volatility=v), b=dict(direction=q), c=dict(volatility=v + 1)))
    pool = p[0, 0] ** .25 * q[0, 0] ** .75
    assert out['direction'][0, 0] == pytest.approx(pool / pool.sum())
    assert out['direction'][0, 1] == pytest.approx(p[0, 1])
    assert out['volatility'][0] == pytest.approx(v[0] + [[0], [.5]])


def test_a_silent_member_leaves_its_share_to_the_others():
    e = UltimateEnsemble(dict(size=number()), dict(size=dict(a=np.array([.5]), b=np.array([.3]), c=np.array([.2]))))
    said = dict(a=np.array([[1.], [np.nan]]), b=np.array([[2.], [2.]]), c=np.array([[3.], [4.]]))
    out = e.combine({k: dict(size=v) for k, v in said.items()})['size'][:, 0]
    assert out == pytest.approx([.5 + .6 + .6, (.3 * 2 + .2 * 4) / .5])


def test_correlation_of_errors():
    rng = np.random.default_rng(4)
    y, common, own = rng.normal(size=(3, 20_000))
    d = diversity(dict(a=y + common, b=y + common, c=y + own), y)
    assert d.loc['a', 'b'] == pytest.approx(1)
    assert abs(d.loc['a', 'c']) < .03


@pytest.mark.parametrize('days', [1, 9])
def test_too_few_days_is_said(days):
    day = np.arange(days).repeat(50)
    with pytest.raises(ValueError, match=f'{days} days are too few to weigh on'):
        weigh(np.zeros((2, len(day), 1)), np.zeros(len(day)), day, number())
