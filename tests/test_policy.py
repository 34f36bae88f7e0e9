"Bounds, symmetry, causality and missing coins of the policy; the step live against the batch"
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from cryptoml.backtest import Costs, backtest
from cryptoml.policy import Policy, PolicyState, breadth, drawdown_control, drift, limit, neutralise, no_trade_band, volatility_target

seeds = st.integers(0, 2**32 - 1)
policies = st.builds(Policy, max_weight=st.sampled_from([.05, .3, 1.]), max_gross=st.sampled_from([.5, 2.]), rate=st.sampled_from([.03, .5, 1.]),
                     band=st.sampled_from([0., 1.]), neutral=st.sampled_from(['none', 'dollar', 'beta']), patience=st.sampled_from([0, 3]),
                     target_annual=st.sampled_from([.2, 3.]), max_drawdown=st.sampled_from([None, .1]))

def inputs(seed, n=5, T=160, holes=.2):
    g = np.random.default_rng(seed)
    score, sigma, beta = g.normal(size=(n, T)), .006 * np.exp(.5 * g.normal(size=(n, T))), g.normal(1, .3, (n, T))
    score[g.random((n, T)) < holes] = np.nan; sigma[g.random((n, T)) < holes / 4] = 0; beta[g.random((n, T)) < holes / 4] = np.nan
    close = np.exp(np.cumsum(.01 * g.normal(size=(n, T)), 1))
    return score, sigma, beta, g.random((n, T)) > holes, close

def held(out):
    "Weights as they stay between decisions, without drift"
    w, track = np.zeros(len(out)), []
    for x in out.T: w = np.where(np.isnan(x), w, x); track.append(w)
    return np.array(track).T

@given(seeds, policies)
@settings(max_examples=40, deadline=None)
def test_bounds_hold(seed, policy):
    score, sigma, beta, mask, close = inputs(seed)
    if policy.max_drawdown: policy = Policy(**{**vars(policy), 'max_drawdown': None})
    w = held(policy.positions(score, sigma, beta, mask))
    assert np.abs(w).max() <= policy.max_weight + 1e-12 and np.abs(w).sum(0).max() <= policy.max_gross + 1e-12

@given(seeds, policies)
@settings(max_examples=40, deadline=None)
def test_orders_stay_in_bounds_whatever_the_account_holds(seed, policy):
    "Even from a book that drifted out of its bounds: what is traded fits beside what stays"
    g = np.random.default_rng(seed)
    score, sigma, beta, mask, _ = (x[:, 0] for x in inputs(seed))
    state = PolicyState(g.normal(0, 1, 5), np.zeros(5, int), 1.)
    w, after = policy.next_weights(state, score, sigma, beta, mask, equity=.95)
    moved = ~np.isnan(w); stays = np.abs(state.weights[~moved]).sum()
    assert np.isnan(w[~mask]).all() and np.abs(w[moved]).max(initial=0) <= policy.max_weight + 1e-12
    assert np.abs(w[moved]).sum() + stays <= max(policy.max_gross, stays) + 1e-12
    assert np.array_equal(after.weights, np.where(moved, w, state.weights))

@given(seeds, policies)
@settings(max_examples=30, deadline=None)
def test_batch_is_the_step(seed, policy):
    score, sigma, beta, mask, close = inputs(seed)
    batch = policy.positions(score, sigma, beta, mask, close)
    state, equity = policy.start(5), 1.
    for t in range(0, 160, 4):
        if t: state, equity = drift(state, equity, close[:, t] / close[:, t - 4])
        w, state = policy.next_weights(state, score[:, t], sigma[:, t], beta[:, t], mask[:, t], equity)
        np.testing.assert_array_equal(w, batch[:, t])
    assert np.isnan(batch[:, np.arange(160) % 4 != 0]).all()

@given(seeds, policies)
@settings(max_examples=20, deadline=None)
def test_the_future_does_not_matter(seed, policy):
    x = inputs(seed)
    full = policy.positions(*x)
    np.testing.assert_array_equal(policy.positions(*(a[:, :81] for a in x)), full[:, :81])

@given(seeds, policies)
@settings(max_examples=20, deadline=None)
def test_opposite_forecast_opposite_book_and_no_order_of_coins(seed, policy):
    score, sigma, beta, mask, _ = inputs(seed)
    if policy.max_drawdown: policy = Policy(**{**vars(policy), 'max_drawdown': None})
    w = policy.positions(score, sigma, beta, mask)
    np.testing.assert_array_equal(policy.positions(-score, sigma, beta, mask), -w)
    order = np.random.default_rng(seed).permutation(5)
    np.testing.assert_allclose(policy.positions(score[order], sigma[order], beta[order], mask[order]), w[order], atol=1e-9)

def test_neutral_books_stay_neutral_at_any_speed():
    g = np.random.default_rng(0)
    score, sigma, beta = g.normal(size=(8, 400)), np.full((8, 400), .006), np.repeat(g.normal(1, .3, (8, 1)), 400, 1)
    w = held(Policy(neutral='beta', rate=.08, max_weight=.1).positions(score, sigma, beta))
    assert np.abs(w.sum(0)).max() < 1e-12 and np.abs((w * beta).sum(0)).max() < 1e-12 and np.abs(w).sum(0)[-1] > .05

def test_without_a_score_a_position_is_kept_then_unwound():
    score = np.ones((2, 200)); score[0, 40:] = np.nan
    w = Policy(patience=3, rate=.5).positions(score, np.full((2, 200), .006))[:, ::4]
    assert np.isnan(w[0, 10:13]).all() and (np.diff(w[0, 13:]) < 0).all() and w[0, -1] < 1e-6
    kept = Policy(patience=10**6).positions(score, np.full((2, 200), .006))[:, ::4]
    assert np.isnan(kept[0, 10:]).all()

@pytest.mark.parametrize('sigma', [0., np.nan, np.inf, -1.])
def test_a_coin_of_unknown_risk_is_not_sized(sigma):
    w, _ = Policy().next_weights(Policy().start(2), np.ones(2), np.array([sigma, .01]))
    assert np.isnan(w[0]) and w[1] > 0

def test_no_score_at_all_trades_nothing():
    w = Policy(neutral='beta').positions(np.full((3, 20), np.nan), np.full((3, 20), .01), np.ones((3, 20)))
    assert np.isnan(w).all()

def test_drawdown_limit_closes_everything_at_once_and_stays_out():
    g = np.random.default_rng(0)
    close = np.exp(np.cumsum(np.full((2, 800), -.001) + 1e-4 * g.normal(size=(2, 800)), 1))
    policy = Policy(rate=.5, max_drawdown=.1, target_annual=1.)
    out = policy.positions(np.ones((2, 800)), np.full((2, 800), .005), price=close)
    book = backtest(out, close, Costs(0, 0, 0))
    assert .88 < book.equity.min() < .92 and np.abs(book.weights[:, -1]).sum() < .05
    w, _ = policy.next_weights(PolicyState(np.array([.5, -.5]), np.array([0, 2]), 1.), np.array([1., np.nan]), np.full(2, .005), equity=.89)
    assert w.tolist() == [0, 0]                                                  # at the limit: out, with or without a score
    w, _ = policy.next_weights(PolicyState(np.array([.5, -.5]), np.zeros(2, int), 1.), np.ones(2), np.full(2, .005), tradable=[True, False], equity=.89)
    assert w[0] == 0 and np.isnan(w[1])                                          # what cannot be traded cannot be closed

@given(st.floats(.01, 2), st.floats(.5, 2), st.floats(.01, .9))
def test_drawdown_control_is_a_share(equity, peak, limit_):
    k = drawdown_control(equity, max(peak, equity), limit_)
    assert 0 <= k <= 1 and (k == 0 or equity > (1 - limit_) * max(peak, equity) - 1e-12)

def test_long_only_never_shorts():
    score, sigma, _, mask, _ = inputs(0)
    w = held(Policy(long_only=True).positions(score, sigma, mask=mask))
    assert w.min() >= 0 and w.max() > 0

def test_drift_is_what_the_ledger_does():
    "Weights that drift with prices between decisions are the account's, but for costs"
    g = np.random.default_rng(1)
    opens = np.exp(np.cumsum(.02 * g.normal(size=(3, 200)), 1))
    policy = Policy(rate=.5, target_annual=2.)
    close = np.concatenate([opens[:, 1:], opens[:, -1:]], 1)                      # the close of t is the open of t + 1
    out = policy.positions(np.ones((3, 200)), np.full((3, 200), .02), price=close)
    book, state, equity = backtest(out, opens, Costs(0, 0, 0)), policy.start(3), 1.
    for t in range(0, 196, 4):
        if t:
            state, equity = drift(state, equity, close[:, t] / close[:, t - 4])
            assert equity == pytest.approx(book.equity[t + 1], rel=1e-12)
        _, state = policy.next_weights(state, np.ones(3), np.full(3, .02), equity=equity)
        np.testing.assert_allclose(state.weights, book.weights[:, t + 1], rtol=1e-10)

def test_decisions_where_asked():
    score, sigma = np.ones((2, 30)), np.full((2, 30), .01)
    decide = np.arange(30) % 4 == 3
    w = Policy().positions(score, sigma, decide=decide)
    assert (~np.isnan(w[0]) == decide).all()
    with pytest.raises(ValueError, match='decide must be'): Policy().positions(score, sigma, decide=decide[:5])

def test_small_functions():
    assert volatility_target(np.array([2.]), np.array([.01]), .2, 9.)[0] == pytest.approx(.4 / (.01 * np.sqrt(8760)))
    assert breadth(0) == 1 and breadth(4, 0) == 2 and breadth(9, .5, neutral=True) == pytest.approx(np.sqrt(4.5))
    assert limit(np.full(3, np.nan), 1, 1).shape == (3,) and limit(np.ones(2), 1, 1, kept=5).tolist() == [0, 0]
    assert no_trade_band(np.zeros(1), np.ones(1), 0.)[0] == 1
    assert neutralise(np.array([1., 2]), np.array([1., 1])).tolist() == [-.5, .5]         # equal betas: dollar neutral is beta neutral
    with pytest.raises(ValueError, match='must be'): Policy().next_weights(Policy().start(3), np.ones(2), np.ones(2))
