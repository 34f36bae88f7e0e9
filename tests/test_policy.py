"Bounds, symmetry, causality and missing coins of the policy; the step live against the batch"
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from examples import policies as any_policy, real
from cryptoml.backtest import Costs, backtest
from cryptoml.policy import (Policy, PolicyState, breadth, drawdown_control, drift, limit, neutralise, no_trade_band,
                             stops, volatility_target)

seeds = st.integers(0, 2**32 - 1)
policies = st.builds(
    Policy,
    max_weight=st.sampled_from([.05, .3, 1.]),
    max_gross=st.sampled_from([.5, 2.]),
    rate=st.sampled_from([.03, .5, 1.]),
    band=st.sampled_from([0., 1.]),
    neutral=st.sampled_from(['none', 'dollar', 'beta']),
    patience=st.sampled_from([0, 3]),
    target_annual=st.sampled_from([.2, 3.]),
    max_drawdown=st.sampled_from([None, .1]),
)

def inputs(seed, n=5, T=160, holes=.2):
    "Score, sigma, beta, mask and close [n, T], with holes"
    g = np.random.default_rng(seed)
    score = g.normal(size=(n, T))
    sigma = .006 * np.exp(.5 * g.normal(size=(n, T)))
    beta = g.normal(1, .3, (n, T))
    score[g.random((n, T)) < holes] = np.nan
    sigma[g.random((n, T)) < holes / 4] = 0
    beta[g.random((n, T)) < holes / 4] = np.nan
    close = np.exp(np.cumsum(.01 * g.normal(size=(n, T)), 1))
    mask = g.random((n, T)) > holes
    return score, sigma, beta, mask, close

def held(out):
    "Weights as they stay between decisions, without drift"
    w = np.zeros(len(out))
    track = []
    for x in out.T:
        w = np.where(np.isnan(x), w, x)
        track.append(w)
    return np.array(track).T

# ---- the step and the batch

@given(seeds, policies)
@settings(max_examples=40, deadline=None)
def test_bounds_hold(seed, policy):
    score, sigma, beta, mask, close = inputs(seed)
    policy = replace(policy, max_drawdown=None)
    w = held(policy.positions(score, sigma, beta, mask))
    assert np.abs(w).max() <= policy.max_weight + 1e-12
    assert np.abs(w).sum(0).max() <= policy.max_gross + 1e-12

@given(seeds, policies)
@settings(max_examples=40, deadline=None)
def test_orders_stay_in_bounds_whatever_the_account_holds(seed, policy):
    "Even from a book that drifted out of its bounds: what is traded fits beside what stays"
    g = np.random.default_rng(seed)
    score, sigma, beta, mask, _ = (x[:, 0] for x in inputs(seed))
    state = PolicyState(g.normal(0, 1, 5), np.zeros(5, int), 1.)
    w, after = policy.next_weights(state, score, sigma, beta, mask, equity=.95)
    moved = ~np.isnan(w)
    stays = np.abs(state.weights[~moved]).sum()
    assert np.isnan(w[~mask]).all()
    assert np.abs(w[moved]).max(initial=0) <= policy.max_weight + 1e-12
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
    begun = policy.positions(*(a[:, :81] for a in x))
    np.testing.assert_array_equal(begun, full[:, :81])

@given(seeds, policies)
@settings(max_examples=20, deadline=None)
def test_opposite_forecast_opposite_book_and_no_order_of_coins(seed, policy):
    score, sigma, beta, mask, _ = inputs(seed)
    policy = replace(policy, max_drawdown=None)
    w = policy.positions(score, sigma, beta, mask)
    np.testing.assert_array_equal(policy.positions(-score, sigma, beta, mask), -w)
    order = np.random.default_rng(seed).permutation(5)
    reordered = policy.positions(score[order], sigma[order], beta[order], mask[order])
    np.testing.assert_allclose(reordered, w[order], atol=1e-9)

def test_neutral_books_stay_neutral_at_any_speed():
    g = np.random.default_rng(0)
    score = g.normal(size=(8, 400))
    beta = np.repeat(g.normal(1, .3, (8, 1)), 400, 1)
    w = held(Policy(neutral='beta', rate=.08, max_weight=.1).positions(score, np.full((8, 400), .006), beta))
    assert np.abs(w.sum(0)).max() < 1e-12
    assert np.abs((w * beta).sum(0)).max() < 1e-12
    assert np.abs(w).sum(0)[-1] > .05

def test_without_a_score_a_position_is_kept_then_unwound():
    score = np.ones((2, 200))
    score[0, 40:] = np.nan
    sigma = np.full((2, 200), .006)
    w = Policy(patience=3, rate=.5).positions(score, sigma)[:, ::4]
    assert np.isnan(w[0, 10:13]).all()
    assert (np.diff(w[0, 13:]) < 0).all()
    assert w[0, -1] < 1e-6
    kept = Policy(patience=10**6).positions(score, sigma)[:, ::4]
    assert np.isnan(kept[0, 10:]).all()

@pytest.mark.parametrize('sigma', [0., np.nan, np.inf, -1.])
def test_a_coin_of_unknown_risk_is_not_sized(sigma):
    w, _ = Policy().next_weights(Policy().start(2), np.ones(2), np.array([sigma, .01]))
    assert np.isnan(w[0]) and w[1] > 0

def test_no_score_at_all_trades_nothing():
    w = Policy(neutral='beta').positions(np.full((3, 20), np.nan), np.full((3, 20), .01), np.ones((3, 20)))
    assert np.isnan(w).all()

# ---- drawdown

def test_drawdown_limit_closes_everything_and_stays_out():
    g = np.random.default_rng(0)
    close = np.exp(np.cumsum(np.full((2, 800), -.001) + 1e-4 * g.normal(size=(2, 800)), 1))
    policy = Policy(rate=.5, max_drawdown=.1, target_annual=1.)
    out = policy.positions(np.ones((2, 800)), np.full((2, 800), .005), price=close)
    book = backtest(out, close, Costs(0, 0, 0))
    assert .88 < book.equity.min() < .92
    assert np.abs(book.weights[:, -1]).sum() < .05

@pytest.mark.parametrize('silent, score, tradable, expected', [
    ([0, 2], [1., np.nan], None, [0, 0]),               # out, with or without a score
    ([0, 0], [1., 1.], [True, False], [0, np.nan]),     # what cannot be traded cannot be closed
])
def test_at_the_drawdown_limit_everything_is_closed_at_once(silent, score, tradable, expected):
    policy = Policy(rate=.5, max_drawdown=.1, target_annual=1.)
    state = PolicyState(np.array([.5, -.5]), np.array(silent), 1.)
    w, _ = policy.next_weights(state, np.array(score), np.full(2, .005), tradable=tradable, equity=.89)
    np.testing.assert_array_equal(w, expected)

@given(st.floats(.01, 2), st.floats(.5, 2), st.floats(.01, .9))
def test_drawdown_control_is_a_share(equity, peak, max_drawdown):
    peak = max(peak, equity)
    floor = (1 - max_drawdown) * peak
    k = drawdown_control(equity, peak, max_drawdown)
    assert 0 <= k <= 1
    assert k == 0 or equity > floor - 1e-12

# ---- accounts

def test_long_only_never_shorts():
    score, sigma, _, mask, _ = inputs(0)
    w = held(Policy(long_only=True).positions(score, sigma, mask=mask))
    assert w.min() >= 0
    assert w.max() > 0

def test_drift_is_what_the_ledger_does():
    "Weights that drift with prices between decisions are the account's, but for costs"
    g = np.random.default_rng(1)
    opens = np.exp(np.cumsum(.02 * g.normal(size=(3, 200)), 1))
    close = np.concatenate([opens[:, 1:], opens[:, -1:]], 1)      # the close of t is the open of t + 1
    policy = Policy(rate=.5, target_annual=2.)
    out = policy.positions(np.ones((3, 200)), np.full((3, 200), .02), price=close)
    book = backtest(out, opens, Costs(0, 0, 0))
    state, equity = policy.start(3), 1.
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

def test_scores_of_another_length_are_refused():
    with pytest.raises(ValueError, match='must be'): Policy().next_weights(Policy().start(3), np.ones(2), np.ones(2))

# ---- small functions

def test_volatility_target():
    w = volatility_target(np.array([2.]), np.array([.01]), target_annual=.2, max_weight=9.)
    assert w[0] == pytest.approx(.4 / (.01 * np.sqrt(8760)))

@pytest.mark.parametrize('n, correlation, neutral, expected', [
    (0, .6, False, 1),
    (4, 0, False, 2),
    (9, .5, True, np.sqrt(4.5)),
])
def test_breadth(n, correlation, neutral, expected):
    assert breadth(n, correlation, neutral) == expected

@pytest.mark.parametrize('w, kept, expected', [
    ([np.nan] * 3, 0, [np.nan] * 3),
    ([1, 1], 5, [0, 0]),                # what stays has used the whole bound
])
def test_limit(w, kept, expected):
    np.testing.assert_array_equal(limit(np.array(w, float), 1, 1, kept=kept), expected)

def test_without_a_band_the_target_is_held():
    assert no_trade_band(np.zeros(1), np.ones(1), 0.).tolist() == [1]

def test_of_equal_betas_dollar_neutral_is_beta_neutral():
    assert neutralise(np.array([1., 2]), np.array([1., 1])).tolist() == [-.5, .5]

@given(st.floats(1e-8, 1e6), st.lists(st.floats(-.7, .7), min_size=2, max_size=5).map(sorted))
def test_stops_of_a_short_are_those_of_a_long_turned_round(price, quantiles):
    stop, take = stops(price, quantiles, 1)
    assert (take, stop) == stops(price, quantiles, -1)
    assert stop == pytest.approx(price * math.exp(quantiles[0]))
    assert take == pytest.approx(price * math.exp(quantiles[-1]))

# ---- the whole book at once

@st.composite
def books(draw):
    "Sizes and volatilities of up to 12 coins, some unknown"
    n = draw(st.integers(1, 12))
    def some(numbers): return np.array(draw(st.lists(numbers | st.just(math.nan), min_size=n, max_size=n)))
    return some(real(-1, 1)), some(real(1e-5, .3))

@settings(max_examples=200, deadline=None)
@given(books(), any_policy)
def test_book_within_its_bounds(book, policy):
    size, sigma = book
    w = policy.book_weights(size, sigma)
    none = np.isnan(size) | np.isnan(sigma)
    assert np.isnan(w[none]).all()                     # nothing of nothing
    assert np.isfinite(w[~none]).all()                 # something of something
    w = np.nan_to_num(w)
    assert np.abs(w).max() <= policy.max_weight + 1e-12
    assert np.abs(w).sum() <= policy.max_gross + 1e-9
    assert (w * np.nan_to_num(size) >= 0).all()
    if policy.long_only: assert (w >= 0).all()

@settings(max_examples=100, deadline=None)
@given(st.integers(2, 8), st.randoms(use_true_random=False), any_policy)
def test_book_is_the_policy_at_once(n, rnd, policy):
    size = np.array([rnd.uniform(-1, 1) for _ in range(n)])
    sigma = np.array([rnd.uniform(1e-4, .05) for _ in range(n)])
    policy = replace(policy, rate=1.)
    decided, _ = policy.next_weights(policy.start(n), size, sigma)
    np.testing.assert_allclose(policy.book_weights(size, sigma), decided, rtol=1e-12, atol=1e-12)

@settings(max_examples=50, deadline=None)
@given(real(-1, 1), real(1e-5, .3), st.integers(1, 12), any_policy)
def test_weight_of_one_coin_is_that_of_the_row(size, sigma, n, policy):
    "What a signal says of a coin alone, the policy says of it beside others"
    alone = policy.target_weight(size, sigma, n)
    row = policy.target_weight(np.array([size, .5]), np.array([sigma, .01]), n)
    assert alone == row[0]
