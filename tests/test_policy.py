"Bounds, symmetry, causality and missing coins of the policy; the judged book against a bot of its own"
import math, os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from examples import policies as any_policy, real
from cryptoml.backtest import Account, Costs, account_for
from cryptoml.policy import (CLOSE, Policy, PolicyState, breadth, breadth_of, drawdown_control, limit, neutralise,
                             no_trade_band, risk_scale, volatility_target)

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
    scale=st.sampled_from([1., 5.]),
    memory=st.sampled_from([None, 20.]),
)
free = Costs(0, 0, 0, borrow=0)

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
    return dict(score=score, sigma=sigma, beta=beta, mask=mask, close=close)

def opens_of(close, seed=0, gap=.002):
    "The close before, and a gap"
    g = np.random.default_rng(seed)
    before = np.concatenate([close[:, :1], close[:, :-1]], 1)
    return before * np.exp(gap * g.normal(size=close.shape))

def at(panels, t): return {name: a[:, t] for name, a in panels.items()}

def decided(panels, t):
    "What a decision at the close of bar t is made from"
    return {'tradable' if name == 'mask' else name: a for name, a in at(panels, t).items() if name != 'close'}

def still(policy, score, sigma, **more):
    "Book and orders where prices stand still and trading is free: weights stay where they were put"
    flat = np.ones(score.shape)
    account = Account(flat, free)
    book = policy.trade(score, sigma, flat, account, **more)
    return book.weights, account.orders.target

# ---- the judged book and a bot's

class Bot:
    """Keeps units and cash itself, coin by coin, knows nothing of the package but `next_weights`:
    sees the close of a bar, orders, trades at the next open there is at that time, pays"""
    def __init__(self, policy, n, side, borrow):
        self.policy, self.side, self.borrow = policy, side, borrow
        self.state = policy.start(n)
        self.units, self.last, self.marked = [0.] * n, [0.] * n, [0.] * n
        self.cash = 1.
        self.orders = None

    def worth(self, prices): return self.cash + sum(u * p for u, p in zip(self.units, prices))

    def opens(self, price, funding, years):
        for i, p in enumerate(price):
            if p == p: self.last[i] = self.marked[i] = p
        for i, rate in enumerate(funding):                  # rate None: not known, a short is borrowed
            value = self.units[i] * self.last[i]
            if rate is not None: self.cash -= value * rate
            elif value < 0: self.cash += value * self.borrow * years
        if self.orders is not None:
            worth = self.worth(self.last)
            for i, w in enumerate(self.orders):
                if w != w or price[i] != price[i]: continue
                change = w * worth / price[i] - self.units[i]
                self.units[i] += change
                self.cash -= change * price[i] + abs(change) * price[i] * self.side
            self.orders = None
        return self.worth(self.last)

    def closes(self, close):
        self.marked = [c if c == c else p for c, p in zip(close, self.marked)]

    def decides(self, score, sigma, **known):
        worth = self.worth(self.marked)
        held = np.array([u * p / worth for u, p in zip(self.units, self.marked)])
        self.orders, self.state = self.policy.next_weights(
            self.state._replace(weights=held), score, sigma, equity=worth, **known)

def lived(policy, panels, open, funding, hours=1., side=Costs().side, borrow=Costs().borrow):
    "Equity at each open of a bot that decides at the last of every `every` bars"
    n, T = open.shape
    bot = Bot(policy, n, side, borrow)
    known = [f is not None and not np.isnan(f).all() for f in (funding if funding is not None else [None] * n)]
    equity = []
    for t in range(T):
        due = [np.nan_to_num(funding[i, t]) if known[i] else None for i in range(n)]
        equity.append(bot.opens(open[:, t], due, hours / 8760 if t else 0))
        bot.closes(panels['close'][:, t])
        if t % policy.every == policy.every - 1: bot.decides(**decided(panels, t))
    return np.array(equity)

@given(seeds, policies, st.sampled_from(['none', 'all', 'some']))
@settings(max_examples=25, deadline=None)
def test_a_bot_makes_the_judged_book(seed, policy, funded):
    "Gaps, missing bars, costs, funding or interest, drawdown control, memory"
    panels = inputs(seed)
    g = np.random.default_rng(seed)
    open = opens_of(panels['close'], seed, gap=.01)
    open[g.random(open.shape) < .05] = np.nan
    panels['close'][g.random(open.shape) < .05] = np.nan
    funding = np.where(np.arange(160) % 8 == 0, 1e-3 * g.normal(size=(5, 160)), np.nan)
    if funded == 'some': funding[2:] = np.nan
    if funded == 'none': funding = None
    book = policy.trade(**panels, account=Account(open, funding=funding))
    assert book.equity == pytest.approx(lived(policy, panels, open, funding), rel=1e-9)

DATA = Path(os.environ.get('CRYPTOML_DATA', ''))
with_data = pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')
COINS = ['BTCUSDT', 'ETHUSDT', 'BNBUSDT', 'XRPUSDT', 'ADAUSDT']

def real_bars(since, until):
    "Opens and closes of five coins [5, T], their times"
    bars = pd.read_parquet(DATA/'spot_1h.parquet', columns=['timestamp', 'symbol', 'open', 'close'],
                           filters=[('symbol', 'in', COINS), ('timestamp', '>=', pd.Timestamp(since, tz='UTC')),
                                    ('timestamp', '<', pd.Timestamp(until, tz='UTC'))])
    open, close = (bars.pivot(index='symbol', columns='timestamp', values=v).loc[COINS] for v in ('open', 'close'))
    return open.to_numpy(), close.to_numpy(), open.columns

def momentum(close):
    "Return of the past 10 days in standard deviations, and volatility"
    price = pd.DataFrame(np.log(close.T))
    sigma = price.diff().ewm(halflife=240, min_periods=48).std()
    return (price.diff(240) / (sigma * np.sqrt(240))).to_numpy().T, sigma.to_numpy().T

@with_data
@pytest.mark.parametrize('policy', [
    Policy.at('1h'),
    Policy.at('1h', neutral='dollar', scale=3.),
    Policy.at('1h', memory='30D', max_drawdown=.2, band=.3),
], ids=['timing', 'neutral', 'with a memory'])
@pytest.mark.parametrize('funded', [False, True])
def test_a_bot_makes_the_judged_book_of_real_coins(policy, funded):
    open, close, time = real_bars('2023-07-01', '2024-07-01')
    score, sigma = momentum(close)
    rates = pd.read_parquet(DATA/'funding_8h.parquet').pivot(index='symbol', columns='timestamp', values='funding_rate')
    funding = rates.reindex(index=COINS, columns=time).to_numpy() if funded else None
    book = policy.trade(score, sigma, close, Account(open, time=time, funding=funding))
    assert book.unfunded == ((3, 4) if funded else (0, 1, 2, 3, 4))
    panels = dict(score=score, sigma=sigma, close=close)
    hours = np.diff(time) / pd.Timedelta('1h')
    assert (hours == 1).all()
    assert book.equity == pytest.approx(lived(policy, panels, open, funding), rel=1e-9)
    assert book.turnover.sum() > 5

@given(seeds, policies)
@settings(max_examples=20, deadline=None)
def test_the_future_does_not_matter(seed, policy):
    panels = inputs(seed)
    open = opens_of(panels['close'])
    full = policy.trade(**panels, account=Account(open))
    begun = policy.trade(**{k: a[:, :81] for k, a in panels.items()}, account=Account(open[:, :81]))
    np.testing.assert_array_equal(begun.equity, full.equity[:81])
    np.testing.assert_array_equal(begun.weights, full.weights[:, :81])

@given(seeds, policies)
@settings(max_examples=20, deadline=None)
def test_the_order_of_coins_does_not_matter(seed, policy):
    panels = inputs(seed)
    open = opens_of(panels['close'])
    order = np.random.default_rng(seed).permutation(5)
    one = policy.trade(**panels, account=Account(open))
    other = policy.trade(**{k: a[order] for k, a in panels.items()}, account=Account(open[order]))
    np.testing.assert_allclose(other.weights, one.weights[order], atol=1e-9)

def test_a_book_is_its_orders():
    "What was ordered, with its stops, is accounted for as if it had been known before"
    panels = inputs(0)
    close = panels['close']
    open = opens_of(close)
    bars = dict(open=open, high=np.maximum(open, close) * 1.005, low=np.minimum(open, close) * .995)
    below, above = close * .98, close * 1.05
    account = Account(**bars)
    policy = Policy(target_annual=2.)
    book = policy.trade(**panels, account=account, below=below, above=above)
    orders = account.orders
    again = account_for(orders.target, **bars, stop=orders.stop, take=orders.take)
    np.testing.assert_array_equal(book.equity, again.equity)
    assert book.touched[0].sum() > 10
    ordered = ~np.isnan(orders.target).all(0)
    assert np.flatnonzero(ordered)[0] == 3 and (np.flatnonzero(ordered) % 4 == 3).all()
    bar = np.flatnonzero(ordered)
    long = np.nan_to_num(orders.target[:, bar]) > 0
    short = np.nan_to_num(orders.target[:, bar]) < 0
    np.testing.assert_array_equal(orders.stop[:, bar][long], below[:, bar][long])
    np.testing.assert_array_equal(orders.take[:, bar][long], above[:, bar][long])
    np.testing.assert_array_equal(orders.stop[:, bar][short], above[:, bar][short])
    np.testing.assert_array_equal(orders.take[:, bar][short], below[:, bar][short])

def test_what_a_stop_closed_stays_closed_until_the_next_decision():
    price = np.full((1, 20), 100.)
    low = price.copy()
    low[0, 9] = 90.
    account = Account(price, free, high=price, low=low)
    levels = dict(below=np.full((1, 20), 95.), above=np.full((1, 20), 200.))
    book = Policy(rate=.5).trade(np.ones((1, 20)), np.full((1, 20), .01), price, account, **levels)
    assert (book.weights[0, 4:10] > 0).all()
    assert book.weights[0, 10:12].tolist() == [0, 0]
    assert book.weights[0, 12] == pytest.approx(book.weights[0, 4])      # half of the way from nothing once more

def test_a_ruined_account_is_left_alone():
    close = np.array([[1., 1, 1, 1, 1, .5, .5, .5]])
    policy = Policy(every=1, rate=1., max_weight=4., max_gross=4., target_annual=9.)
    book = policy.trade(np.ones((1, 8)), np.full((1, 8), .01), close, Account(opens_of(close, gap=0), free))
    assert book.equity[5] == 1
    assert (book.equity[6:] == 0).all()

# ---- decisions

@given(seeds, policies)
@settings(max_examples=40, deadline=None)
def test_bounds_hold(seed, policy):
    panels = inputs(seed)
    account = Account(opens_of(panels['close']))
    policy.trade(**panels, account=account)
    size = np.abs(np.nan_to_num(account.orders.target))
    assert size.max() <= policy.max_weight + 1e-12
    assert size.sum(0).max() <= policy.max_gross + 1e-12

@given(seeds, policies)
@settings(max_examples=40, deadline=None)
def test_orders_stay_in_bounds_whatever_the_account_holds(seed, policy):
    "Even from a book that drifted out of its bounds: what is traded fits beside what stays"
    g = np.random.default_rng(seed)
    now = decided(inputs(seed), 0)
    state = PolicyState(g.normal(0, 1, 5), np.zeros(5, int), 1.)
    w, after = policy.next_weights(state, **now, equity=.95)
    moved = ~np.isnan(w)
    stays = np.abs(state.weights[~moved]).sum()
    assert np.isnan(w[~now['tradable']]).all()
    assert np.abs(w[moved]).max(initial=0) <= policy.max_weight + 1e-12
    assert np.abs(w[moved]).sum() + stays <= max(policy.max_gross, stays) + 1e-12
    assert np.array_equal(after.weights, np.where(moved, w, state.weights))

@given(seeds, policies)
@settings(max_examples=20, deadline=None)
def test_opposite_forecast_opposite_decision(seed, policy):
    now = decided(inputs(seed), 0)
    state = PolicyState(np.random.default_rng(seed).normal(0, .3, 5), np.array([0, 1, 2, 3, 4]), 1.)
    w, _ = policy.next_weights(state, **now)
    opposite, _ = policy.next_weights(state._replace(weights=-state.weights), **{**now, 'score': -now['score']})
    np.testing.assert_array_equal(opposite, -w)

def test_neutral_books_stay_neutral_at_any_speed():
    g = np.random.default_rng(0)
    score = g.normal(size=(8, 400))
    beta = np.repeat(g.normal(1, .3, (8, 1)), 400, 1)
    w, _ = still(Policy(neutral='beta', rate=.08, max_weight=.1), score, np.full((8, 400), .006), beta=beta)
    assert np.abs(w.sum(0)).max() < 1e-12
    assert np.abs((w * beta).sum(0)).max() < 1e-12
    assert np.abs(w).sum(0)[-1] > .05

def test_without_a_score_a_position_is_kept_then_unwound():
    score = np.ones((2, 200))
    score[0, 40:] = np.nan
    sigma = np.full((2, 200), .006)
    _, orders = still(Policy(patience=3, rate=.5), score, sigma)
    w = orders[0, 3::4]
    assert np.isnan(w[10:13]).all()
    assert (np.diff(w[13:]) < 0).all()
    assert w[-1] < 1e-6
    _, kept = still(Policy(patience=10**6), score, sigma)
    assert np.isnan(kept[0, 40:]).all()

@pytest.mark.parametrize('sigma', [0., np.nan, np.inf, -1.])
def test_a_coin_of_unknown_risk_is_not_sized(sigma):
    w, _ = Policy().next_weights(Policy().start(2), np.ones(2), np.array([sigma, .01]))
    assert np.isnan(w[0]) and w[1] > 0

def test_no_score_at_all_trades_nothing():
    w, orders = still(Policy(neutral='beta'), np.full((3, 20), np.nan), np.full((3, 20), .01), beta=np.ones((3, 20)))
    assert np.isnan(orders).all()
    assert (w == 0).all()

def test_a_scale_is_that_of_the_scores():
    panels = inputs(0)
    open = opens_of(panels['close'])
    one = Policy(scale=3.).trade(**panels, account=Account(open))
    other = Policy().trade(**{**panels, 'score': 3. * panels['score']}, account=Account(open))
    np.testing.assert_array_equal(one.equity, other.equity)
    assert Policy(scale=3.).target_weight(.5, .01, 4) == Policy().target_weight(1.5, .01, 4)

# ---- drawdown

def test_drawdown_limit_closes_everything_and_stays_out():
    g = np.random.default_rng(0)
    close = np.exp(np.cumsum(np.full((2, 800), -.001) + 1e-4 * g.normal(size=(2, 800)), 1))
    policy = Policy(rate=.5, max_drawdown=.1, target_annual=1.)
    book = policy.trade(np.ones((2, 800)), np.full((2, 800), .005), close, Account(opens_of(close, gap=0), free))
    assert .88 < book.equity.min() < .92
    assert np.abs(book.weights[:, -1]).sum() < .05

def test_drawdown_is_that_of_the_account():
    "Costs alone bring a book to its floor: prices stand still, and the score turns at every decision"
    score = np.where(np.arange(1200) % 8 < 4, 1., -1.)[None]
    flat = np.ones((1, 1200))
    policy = Policy(rate=1., max_drawdown=.1, target_annual=1.)
    book = policy.trade(score, np.full((1, 1200), .005), flat, Account(flat, Costs(.01, 0, 0, borrow=0)))
    assert .899 < book.equity[-1] < .91
    assert book.turnover[-200:].sum() < .02 * book.turnover[:200].sum()

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

# ---- speed in hours

@pytest.mark.parametrize('timeframe, every, patience', [
    ('15min', 16, 6), ('1h', 4, 6), ('4h', 1, 6), ('12h', 1, 2), ('1D', 1, 1), ('7D', 1, 1), ('90min', 3, 5),
])
def test_a_speed_is_one_of_time(timeframe, every, patience):
    p = Policy.at(timeframe)
    hours = pd.Timedelta(timeframe) / pd.Timedelta('1h')
    assert (p.every, p.patience) == (every, patience)
    assert p.bars_per_year * hours == pytest.approx(8760)
    left = (1 - p.rate) ** (1 / (every * hours))        # of the gap, after an hour
    assert left == pytest.approx(.92 ** .25, rel=1e-12)

def test_hours_are_the_default():
    assert Policy.at('1h') == Policy()
    assert Policy.at('4h').rate == Policy().rate

def test_what_is_said_is_not_scaled():
    p = Policy.at('1D', rate=.1, neutral='beta', memory='30D', every=2)
    assert (p.rate, p.neutral, p.memory, p.every) == (.1, 'beta', 15, 2)
    assert Policy.at('1h', every=8).rate == pytest.approx(1 - .92 ** 2)
    assert Policy.at('1h', memory='30D').memory == 180

@pytest.mark.parametrize('timeframe', ['15min', '1h', '4h', '1D'])
def test_half_of_a_change_takes_the_same_time(timeframe):
    "33 hours and a quarter, to within a decision: by trading, not by formula"
    bar = pd.Timedelta(timeframe)
    T = int(pd.Timedelta('20D') / bar)
    sigma = .006 * np.sqrt(bar / pd.Timedelta('1h'))
    w, _ = still(Policy.at(timeframe, max_weight=9.), np.ones((1, T)), np.full((1, T), sigma))
    reached = np.argmax(w[0] >= w[0, -1] / 2)
    begun = np.argmax(w[0] > 0)
    spacing = max(bar, pd.Timedelta('4h'))
    assert abs((reached - begun) * bar + spacing - pd.Timedelta('33.25h')) < spacing

# ---- risk

def market_of(volatility, hours, seed=0):
    g = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(volatility * g.normal(size=(1, hours)), 1))
    return close, opens_of(close, gap=0)

@pytest.mark.parametrize('wrong', [.5, 1, 2, 3])
def test_a_book_with_a_memory_comes_to_its_target(wrong):
    "The coin is wilder, or calmer, than the volatility that it is sized by"
    close, open = market_of(.006 * wrong, 24 * 720)
    policy = Policy.at('1h', memory='30D', max_weight=9., max_gross=9.)
    book = policy.trade(np.ones(close.shape), np.full(close.shape, .006), close, Account(open, free))
    late = book.returns[24 * 180:].std() * np.sqrt(8760)
    assert late == pytest.approx(.2, rel=.12)

def test_without_a_memory_nothing_is_learnt():
    close, open = market_of(.02, 2000)
    state = Policy().start(1)
    for t in range(3, 2000, 4):
        _, state = Policy().next_weights(state, np.ones(1), np.full(1, .006), equity=float(close[0, t]))
    assert state.ratio == 1

@given(st.lists(st.floats(.01, 100), min_size=1, max_size=200))
def test_what_is_learnt_is_bounded(equities):
    "Whatever the equity does, a deposit or a jump: one decision moves the ratio little, all of them by 16 at most"
    policy = Policy(memory=180.)
    state = policy.start(1)
    for equity in equities:
        before = state.ratio
        _, state = policy.next_weights(state, np.ones(1), np.full(1, .006), equity=equity)
        assert 1 / 16 <= state.ratio <= 16
        assert state.ratio <= before * (1 + 24 * (1 - .5 ** (1 / 180)) + 1e-9)

def test_at_the_floor_nothing_is_learnt():
    policy = Policy(memory=5., max_drawdown=.1)
    state = policy.start(1)
    for equity in (1., .8, .8, .8, .8): _, state = policy.next_weights(state, np.ones(1), np.ones(1), equity=equity)
    ratio = state.ratio
    for _ in range(50): _, state = policy.next_weights(state, np.ones(1), np.ones(1), equity=.8)
    assert state.ratio == ratio

def book_with(volatility): return SimpleNamespace(summary=lambda: {'annual volatility': volatility})

@pytest.mark.parametrize('volatility, expected', [
    (lambda k: .02 * k, 10),
    (lambda k: .4 * k, .5),
    (lambda k: .05 * k ** .7, 4 ** (1 / .7)),
    (lambda k: min(.1 * k, .15), 2),               # out of reach: the least that comes nearest
    (lambda k: 9. * k, 1 / 45),
    (lambda k: 90. * k, 1 / 50),                   # out of reach
    (lambda k: 0., 1),                             # does not trade
    (lambda k: np.nan, 1),
])
def test_the_scale_of_a_target(volatility, expected):
    seen = []
    def make(k):
        seen.append(k)
        return book_with(volatility(k))
    assert risk_scale(make, .2) == pytest.approx(expected, rel=.02)
    assert len(seen) <= 10 and min(seen) > .019 and max(seen) < 50.1

def test_a_scale_may_begin_elsewhere():
    assert risk_scale(lambda k: book_with(.02 * k), .2, start=10.) == pytest.approx(10, rel=1e-9)

# ---- accounts

def test_long_only_never_shorts():
    panels = inputs(0)
    w = Policy(long_only=True).trade(**panels, account=Account(opens_of(panels['close']))).weights
    assert w.min() >= 0
    assert w.max() > 0

def test_decisions_where_asked():
    score, sigma = np.ones((2, 30)), np.full((2, 30), .01)
    decide = np.arange(30) % 5 == 2
    _, orders = still(Policy(), score, sigma, decide=decide)
    assert (~np.isnan(orders[0]) == decide).all()
    with pytest.raises(ValueError, match='decide must be'): still(Policy(), score, sigma, decide=decide[:5])

def test_scores_of_another_length_are_refused():
    with pytest.raises(ValueError, match='must be'): Policy().next_weights(Policy().start(3), np.ones(2), np.ones(2))
    words = r"must be \[N, T\] like the opens of the account, \(2, 9\), got {'score': \(2, 8\), 'beta': \(9,\)}"
    with pytest.raises(ValueError, match=words):
        Policy().trade(np.ones((2, 8)), np.ones((2, 9)), np.ones((2, 9)), Account(np.ones((2, 9))), beta=np.ones(9))

@pytest.mark.parametrize('bad', [
    dict(scale=0), dict(scale=np.inf), dict(memory=0), dict(rate=0), dict(every=0),
], ids=str)
def test_rules_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match='policy out of range'): Policy(**bad)

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

# ---- correlations of the coins

def equal(n, rho): return np.where(np.eye(n) == 1, 1., rho)

def drawn(g, n):
    "A correlation matrix"
    load = g.normal(size=(n, 3)) + [1.5, 0, 0]
    C = load @ load.T + np.diag(g.uniform(.5, 2, n))
    own = np.sqrt(C.diagonal())
    return C / np.outer(own, own)

bounded_by_nothing = dict(max_weight=99., max_gross=999.)

@given(seeds, st.integers(2, 12), st.sampled_from(['none', 'dollar', 'beta']))
@settings(max_examples=60, deadline=None)
def test_a_book_has_the_volatility_of_its_covariance(seed, n, neutral):
    "w' C w with the forecast sigma is the target, in units of the scores that are left"
    g = np.random.default_rng(seed)
    policy = Policy(neutral=neutral, **bounded_by_nothing)
    score, sigma, beta, C = g.normal(size=n), .006 * np.exp(g.normal(size=n)), g.normal(1, .3, n), drawn(g, n)
    w = policy.target_weight(score, sigma, n, beta, C)
    v = w * sigma
    left = policy.shaped(score / sigma, beta) * sigma              # scores that neutrality leaves
    wanted = policy.target_annual * np.sqrt((left ** 2).mean())
    annual = np.sqrt(v @ C @ v * policy.bars_per_year)
    safest = n * (left @ C @ left) <= (1 - CLOSE) * n * (left @ left) * (1 + 1e-9)
    if safest: assert annual <= wanted * (1 + 1e-9) + 1e-12
    else: assert annual == pytest.approx(wanted, rel=1e-9, abs=1e-12)

@given(seeds, st.integers(1, 12), real(0, CLOSE), any_policy)
@settings(max_examples=60, deadline=None)
def test_equal_risks_and_correlations_are_the_constant(seed, n, rho, policy):
    sigma = np.full(n, .006)
    by_rules = replace(policy, correlation=rho).book_weights(np.ones(n), sigma)
    for given_ in (rho, equal(n, rho)):
        np.testing.assert_allclose(policy.book_weights(np.ones(n), sigma, correlation=given_), by_rules, rtol=1e-9)

@given(seeds, policies, st.sampled_from(['average', 'pairs']))
@settings(max_examples=20, deadline=None)
def test_a_book_with_correlations_is_decided_bar_by_bar(seed, policy, form):
    "No bar later than the decision matters, nor does the order of the coins"
    panels = inputs(seed)
    g = np.random.default_rng(seed)
    pairs = np.stack([drawn(g, 5) for _ in range(160)], -1)
    pairs[:, 0, :80] = pairs[0, :, :80] = np.nan
    given_ = pairs if form == 'pairs' else np.nanmean(pairs, (0, 1))
    open = opens_of(panels['close'])
    def traded(order, T):
        mine = given_[order][:, order] if form == 'pairs' else given_
        some = {k: a[order, :T] for k, a in panels.items()}
        return policy.trade(**some, account=Account(open[order, :T]), correlation=mine[..., :T]).weights
    full = traded(np.arange(5), 160)
    np.testing.assert_array_equal(traded(np.arange(5), 81), full[:, :81])
    order = g.permutation(5)
    np.testing.assert_allclose(traded(order, 160), full[order], atol=1e-9)

def test_positions_that_stay_are_counted_in():
    "Their risk is not in the matrix that is used, their number is"
    policy = Policy(rate=1., **bounded_by_nothing)
    state = policy.start(4)._replace(weights=np.array([0, 0, .3, -.2]))
    score = np.array([1, 1, np.nan, np.nan])
    w, _ = policy.next_weights(state, score, np.full(4, .006), correlation=equal(4, .3))
    by_number, _ = policy.next_weights(state, score, np.full(4, .006), correlation=.3)
    np.testing.assert_allclose(w, by_number, rtol=1e-9)
    assert w[0] == pytest.approx(.2 / breadth(4, .3) / (.006 * np.sqrt(8760)))

@pytest.mark.parametrize('given_, same', [
    (np.nan, .6), (-.4, 0.), (1., CLOSE), (np.full((3, 3), np.nan), equal(3, .6)), (np.full((3, 3), .2), equal(3, .2)),
])
def test_what_is_missing_or_cannot_be(given_, same):
    score, sigma = np.array([1, -1, .5]), np.array([.004, .006, .01])
    got, want = (Policy().book_weights(score, sigma, correlation=c) for c in (given_, same))
    np.testing.assert_array_equal(got, want)

def test_a_matrix_that_is_none_makes_no_infinite_book():
    "Pairs that are forecast one by one may contradict one another"
    C = equal(3, -.9)                                              # no three variables are like this
    assert breadth_of(np.ones(3), C) == pytest.approx(np.sqrt(3 * (1 - CLOSE)))
    assert np.isfinite(Policy().book_weights(np.ones(3), np.full(3, .006), C)).all()

@pytest.mark.parametrize('bad', [np.ones(3), np.ones((2, 2)), np.ones((3, 3, 8))])
def test_correlations_that_do_not_fit_one_decision(bad):
    with pytest.raises(ValueError, match='correlation must be a number or .N, N. for 3 coins'):
        Policy().next_weights(Policy().start(3), np.ones(3), np.ones(3), correlation=bad)

@pytest.mark.parametrize('bad', [.5, np.ones(7), np.ones((2, 2)), np.ones((2, 8))])
def test_correlations_that_do_not_fit_a_history(bad):
    flat = np.ones((2, 8))
    with pytest.raises(ValueError, match='correlation must be .T. or .N, N, T.'):
        Policy().trade(flat, flat, flat, Account(flat), correlation=bad)

def test_books_sized_by_correlations_hit_their_risk_when_these_move(n=8, T=12_000):
    "Correlations of .2 and .9 in turns; sized by the truth, by the constant that is right on average"
    g = np.random.default_rng(0)
    rho = np.where(np.arange(T) // 600 % 2 == 0, .2, .9)
    returns = .006 * (np.sqrt(rho) * g.normal(size=T) + np.sqrt(1 - rho) * g.normal(size=(n, T)))
    close = np.exp(np.cumsum(returns, 1))
    open = np.concatenate([np.ones((n, 1)), close[:, :-1]], 1)
    truth = np.where(np.eye(n)[..., None] == 1, 1., rho)
    sides = dict(none=np.ones((n, T)), dollar=np.where(np.arange(n) % 2, 1., -1)[:, None] * np.ones(T))
    def off(neutral, correlation):
        policy = Policy(rate=1., every=12, neutral=neutral, correlation=.55, **bounded_by_nothing)
        book = policy.trade(sides[neutral], np.full((n, T), .006), close, Account(open, free), correlation=correlation)
        each = np.sqrt((book.returns.reshape(-1, 600)[:, 20:] ** 2).mean(1) * 8760) / .2
        return np.abs(np.log(each)).mean()
    for neutral in sides:
        for given_ in (rho, truth): assert off(neutral, given_) < .05
        assert off(neutral, None) > .25
