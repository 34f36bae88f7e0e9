"The ledger against a recursion on weights, its invariances, and what it must not see"
import os
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from cryptoml.backtest import Costs, backtest

seeds = st.integers(0, 2**32 - 1)
free = Costs(0, 0, 0)

def panel(seed, n=4, T=120, holes=.1, keep=.4):
    g = np.random.default_rng(seed)
    price = 10 * np.exp(np.cumsum(.02 * g.normal(size=(n, T)), 1))
    price[g.random((n, T)) < holes] = np.nan
    target = g.normal(0, .3, (n, T))
    target[g.random((n, T)) < keep] = np.nan
    return target, price

def by_weights(target, price, side):
    "No units and no cash: weights drift, equity is multiplied (no holes)"
    n, T = price.shape
    w = np.zeros(n)
    equity = 1.
    out = [equity]
    for t in range(1, T):
        r = price[:, t] / price[:, t - 1] - 1
        growth = 1 + w @ r
        w = w * (1 + r) / growth
        equity = equity * growth
        new = np.where(np.isnan(target[:, t - 1]), w, target[:, t - 1])
        cost = (np.abs(new - w) * side).sum()
        equity = equity * (1 - cost)
        w = new / (1 - cost)
        out.append(equity)
    return np.array(out)

@given(seeds)
@settings(max_examples=25, deadline=None)
def test_agrees_with_a_recursion_on_weights(seed):
    target, price = panel(seed, holes=0)
    side = np.array([0, 5e-4, 1e-3, 2e-3])
    book = backtest(target, price, Costs(0, 0, side), max_leverage=99)
    assert book.equity == pytest.approx(by_weights(target, price, side), rel=1e-11)

@given(seeds, st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_the_future_does_not_matter(seed, delay):
    "Everything after t may change: the book up to t stays; a target of t acts at t + 1 + delay at the earliest"
    target, price = panel(seed)
    full = backtest(target, price, delay=delay)
    t = 60
    fill = t + delay + 1
    other_target = target.copy()
    other_target[:, t:] = .7
    other_price = price.copy()
    other_price[:, fill:] *= 3
    changed = backtest(other_target, other_price, delay=delay)
    assert (changed.equity[:fill] == full.equity[:fill]).all()
    assert (changed.weights[:, fill] != full.weights[:, fill]).any()

@given(seeds)
@settings(max_examples=20, deadline=None)
def test_units_of_price_and_order_of_coins_mean_nothing(seed):
    target, price = panel(seed)
    want = pytest.approx(backtest(target, price).equity, rel=1e-10)
    units = np.array([[1e-6], [1], [1e3], [7]])
    order = np.random.default_rng(seed).permutation(4)
    assert backtest(target, price * units).equity == want
    assert backtest(target[order], price[order]).equity == want

@given(seeds)
@settings(max_examples=20, deadline=None)
def test_parts_add_up_and_costs_are_turnover_times_side(seed):
    target, price = panel(seed)
    due = np.arange(120) % 8 == 0
    book = backtest(target, price, funding=np.where(due, .001, np.nan) * np.ones((4, 1)))
    assert np.cumprod(1 + book.returns) == pytest.approx(book.equity, rel=1e-11)
    assert book.costs == pytest.approx(book.turnover * Costs().side, abs=1e-15)
    assert (book.funding[~due] == 0).all()

def test_dearer_trading_earns_less():
    target, price = panel(0, holes=0, keep=0)
    ends = [backtest(target, price, Costs().scaled(k)).equity[-1] for k in np.linspace(0, 5, 11)]
    assert (np.diff(ends) < 0).all()

def test_break_even_is_where_the_sum_of_returns_vanishes():
    "Costs also change the equity that is traded, so the sum is zero to first order"
    g = np.random.default_rng(3)
    price = 10 * np.exp(np.cumsum(.01 * g.normal(size=(3, 2000)) + .0003, 1))
    target = np.repeat(g.normal(.2, .1, (3, 250)), 8, 1)
    without = backtest(target, price, free)
    side = without.summary()['break-even bp'] / 1e4
    paying = backtest(target, price, Costs(side, 0, 0))
    assert 5e-4 < side < .02
    assert abs(paying.returns.sum()) < .01 * without.returns.sum()

def test_a_signal_of_the_same_bar_earns_nothing():
    """Leak 6: the direction of the bar that just closed, on a random walk.
    At its open it would be worth 8,000 times the mean move"""
    g = np.random.default_rng(0)
    path = 100 * np.exp(np.cumsum(.005 * g.normal(size=(1, 8001)), 1))
    opens = path[:, :-1]
    closes = path[:, 1:]
    signal = np.sign(closes - opens)
    late = np.concatenate([opens[:, :1], opens[:, :-1]], 1)          # the fill of t + 1 at the open of t
    honest = backtest(signal, opens, free)
    cheat = backtest(signal, late, free)
    assert cheat.returns.mean() > .003
    assert abs(honest.returns.mean()) < 4 * honest.returns.std() / np.sqrt(8000)

def test_order_without_a_bar_lapses_and_holding_keeps_its_last_price():
    price = np.array([[10., 10, np.nan, np.nan, 20, 20]])
    book = backtest(np.array([[1., 0, 0, np.nan, np.nan, np.nan]]), price, free)
    assert book.equity == pytest.approx([1, 1, 1, 1, 2, 2])
    assert book.refused.tolist() == [0, 0, 1, 1, 0, 0]

def test_orders_of_a_coin_that_never_trades_all_lapse():
    never = backtest(np.full((1, 6), .5), np.full((1, 6), np.nan))
    assert (never.equity == 1).all()
    assert never.refused.sum() == 5

def test_a_coin_listed_later_starts_clean():
    price = np.array([[np.nan, np.nan, 5., 6., 6.], [1., 1, 1, 1, 1]])
    book = backtest(np.full((2, 5), .5), price, free)
    assert book.equity == pytest.approx([1, 1, 1, 1.1, 1.1])
    assert book.weights[0, 1] == 0

def test_leverage_limit_counts_positions_that_stay():
    price = np.array([[1., 1, np.nan, 1], [1., 1, 1, 1]])
    target = np.array([[1.5, 1.5, 1.5, 1.5], [0., 1.5, 1.5, 1.5]])
    weights = backtest(target, price, free, max_leverage=2).weights
    assert weights[:, 1].tolist() == [1.5, 0]
    assert weights[:, 2] == pytest.approx([1.5, .5])
    assert weights[:, 3] == pytest.approx([1, 1])

flat = np.ones((1, 6))
four = np.full((1, 6), 4.)          # four times the equity

@pytest.mark.parametrize('book', [
    pytest.param(dict(target=four, open=[[1., 1, .5, 2, 2, 2]], costs=free), id='price'),
    pytest.param(dict(target=four, open=flat, costs=free, funding=[[0, 0, .3, 0, 0, 0]]), id='funding'),
    pytest.param(dict(target=[[-4., 4, 4, 4, 4, 4]], open=flat, costs=Costs(.13, 0, 0)), id='costs'),
])
def test_ruin_is_final(book):
    book = backtest(**book)
    assert (book.equity[:2] > 0).all()
    assert (book.equity[2:] == 0).all()
    assert book.returns[2] == -1
    assert (book.returns[3:] == 0).all()
    assert (book.weights[:, 2:] == 0).all()
    assert np.isfinite(book.summary()[['annual return', 'sharpe', 'max drawdown']]).all()

def test_shorts_gain_when_prices_fall():
    book = backtest(np.array([[-1., np.nan, np.nan]]), np.array([[100., 100, 90]]), free)
    assert book.equity[-1] == pytest.approx(1.1)

def test_summary_of_an_idle_book():
    s = backtest(np.zeros((2, 100)), np.ones((2, 100))).summary()
    assert (s[['sharpe', 'annual return', 'turnover per day']] == 0).all()
    assert s[['cost share', 'hit rate', 'break-even bp']].isna().all()

hours = pd.date_range('2024-03-30', periods=120, freq='h', tz='UTC')

def test_a_time_zone_changes_nothing():
    target, price = panel(0)
    utc = backtest(target, price, time=hours)
    berlin = backtest(target, price, time=hours.tz_convert('Europe/Berlin'))
    days, _ = utc.daily()
    assert len(days) == 5
    assert (days == berlin.daily()[0]).all()
    assert utc.summary().equals(berlin.summary())

def test_inputs_stay_as_they_were():
    target, price = panel(0)
    before = target.copy(), price.copy()
    backtest(target, price, mask=np.zeros((4, 120)))
    assert np.array_equal(target, before[0], equal_nan=True)
    assert np.array_equal(price, before[1], equal_nan=True)

@pytest.mark.parametrize('bad, words', [
    (dict(time=hours[:5]), 'time must be 120 ascending opens, got 5'),
    (dict(time=hours[::-1]), 'time must be 120 ascending opens'),
    (dict(delay=.5), 'delay must be 0, 1, 2'),
    (dict(funding=np.zeros((4, 3))), r'must all be \[N, T\]'),
    (dict(target=np.ones(120), open=np.ones(120)), r'must all be \[N, T\]'),
], ids=['fewer times', 'times backwards', 'half a bar', 'funding of another shape', 'one coin without its axis'])
def test_what_does_not_fit_is_refused(bad, words):
    target, price = panel(0)
    with pytest.raises(ValueError, match=words): backtest(**{**dict(target=target, open=price), **bad})

@pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')
def test_hold_of_bitcoin_is_its_price():
    path = Path(os.environ['CRYPTOML_DATA']) / 'spot_1h.parquet'
    bars = pd.read_parquet(path, filters=[('symbol', '==', 'BTCUSDT')], columns=['timestamp', 'open'])
    open = bars.open.to_numpy()
    buy = np.where(np.arange(len(open)) == 0, 1., np.nan)
    book = backtest(buy[None], open[None], time=bars.timestamp)
    assert book.equity[-1] == pytest.approx(open[-1] / open[1] - Costs().side, rel=1e-12)
