"The account against plain loops, its invariances, what it must not see, and the line that a trial leaves"
import os
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from cryptoml.backtest import BORROW, ROUND_TRIP, Account, Costs, account_for, backtest
from cryptoml.ledger import read_ledger
from cryptoml.state import read_chained

seeds = st.integers(0, 2**32 - 1)
free = Costs(0, 0, 0, borrow=0)

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
    book = account_for(target, price, Costs(0, 0, side, borrow=0), max_leverage=99)
    assert book.equity == pytest.approx(by_weights(target, price, side), rel=1e-11)

def market(seed, n=4, T=160):
    "Bars of 12 hours with holes and a delisting, targets, stops on either side of the open, funding of all but a coin"
    g = np.random.default_rng(seed)
    price = 10 * np.exp(np.cumsum(.02 * g.normal(size=(n, T)), 1))
    high = price * np.exp(.02 * np.abs(g.normal(size=(n, T))))
    low = price * np.exp(-.02 * np.abs(g.normal(size=(n, T))))
    target = g.normal(0, .4, (n, T))
    target[g.random((n, T)) < .6] = np.nan
    side = np.where(np.isnan(target), g.choice([-1, 1], (n, T)), np.sign(target))
    stop = price * np.exp(-side * .04 * g.random((n, T)))
    take = price * np.exp(side * .06 * g.random((n, T)))
    for level in (stop, take): level[g.random((n, T)) < .4] = np.nan
    price[g.random((n, T)) < .1] = np.nan
    price[1, 60:90] = np.nan                                 # 15 days without a bar
    funding = np.where(g.random((n, T)) < .3, 2e-3 * g.normal(size=(n, T)), np.nan)
    funding[2] = np.nan
    return dict(target=target, open=price, high=high, low=low, stop=stop, take=take, funding=funding)

def slow_account(target, open, high, low, stop, take, funding, side, borrow, lag, limit):
    "The rules of the account once more: one coin after the other, one event after the other"
    n, T = open.shape
    cash, units, last, idle = 1., [0.] * n, [1.] * n, [0] * n
    levels = [[np.nan, np.nan] for _ in range(n)]
    known = [not np.isnan(f).all() for f in funding]
    equity, touched, gone = [], np.zeros((2, T + 1), int), 0
    def sell(i, at):
        nonlocal cash
        cash += units[i] * at - abs(units[i]) * at * side[i]
        units[i] = 0.
    for t in range(T):
        bar = [not np.isnan(p) for p in open[:, t]]
        for i in range(n):
            idle[i] = 0 if bar[i] else idle[i] + 1
            if bar[i]: last[i] = open[i, t]
        for i in range(n):                                   # what is due
            value = units[i] * last[i]
            if known[i]: cash -= value * (0 if np.isnan(funding[i, t]) else funding[i, t])
            elif value < 0: cash -= -value * borrow / 730
        worth = cash + sum(u * p for u, p in zip(units, last))
        if t >= lag:                                         # what was ordered
            wish = target[:, t - lag]
            ordered = [i for i in range(n) if bar[i] and not np.isnan(wish[i])]
            room = limit - sum(abs(units[i]) * last[i] for i in range(n) if i not in ordered) / worth
            asked = sum(abs(wish[i]) for i in ordered)
            share = min(1., max(room, 0.) / asked) if asked else 1.
            for i in range(n):
                if i in ordered:
                    new = share * wish[i] * worth / open[i, t]
                    if not wish[i] * units[i] > 0: levels[i] = [np.nan, np.nan]
                    cash -= (new - units[i]) * open[i, t] + abs(new - units[i]) * open[i, t] * side[i]
                    units[i] = new
                for k, level in enumerate((stop, take)):
                    if bar[i] and not np.isnan(level[i, t - lag]): levels[i][k] = level[i, t - lag]
        for i in range(n):                                   # opens beyond a level, and delisted coins
            up, p = np.sign(units[i]), open[i, t]
            if bar[i] and up * (p - levels[i][0]) <= 0 and up: touched[0, t] += 1; sell(i, p)
            elif bar[i] and up * (p - levels[i][1]) >= 0 and up: touched[1, t] += 1; sell(i, p)
            elif up and idle[i] * 12 >= 7 * 24: gone += 1; sell(i, last[i])
        equity.append(cash + sum(u * p for u, p in zip(units, last)))
        for i in range(n):                                   # inside the bar
            if not bar[i] or not units[i]: continue
            worst, best = (low, high) if units[i] > 0 else (high, low)
            up = np.sign(units[i])
            if up * (worst[i, t] - levels[i][0]) <= 0: touched[0, t + 1] += 1; sell(i, levels[i][0])
            elif up * (best[i, t] - levels[i][1]) >= 0: touched[1, t + 1] += 1; sell(i, levels[i][1])
    return np.array(equity), touched[:, :T], gone

half_days = pd.date_range('2024-01-01', periods=160, freq='12h', tz='UTC')
per_coin = np.array([0, 5e-4, 1e-3, 2e-3])

@given(seeds, st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_agrees_with_a_plain_loop(seed, delay):
    given = market(seed)
    book = account_for(**given, costs=Costs(0, 0, per_coin, borrow=.9), delay=delay, time=half_days, max_leverage=1.5)
    equity, touched, _ = slow_account(**given, side=per_coin, borrow=.9, lag=delay + 1, limit=1.5)
    assert book.equity == pytest.approx(equity, rel=1e-11)
    assert (book.touched == touched).all()
    assert book.unfunded == (2,)

def test_the_plain_loop_walks_every_path():
    "Stops, takes and delistings all happen in the markets above"
    walked = [slow_account(**market(seed), side=per_coin, borrow=.9, lag=1, limit=1.5)[1:] for seed in range(20)]
    assert sum(touched.sum(1) for touched, _ in walked).min() > 300
    assert sum(gone for _, gone in walked) > 3

@given(seeds, st.lists(st.integers(0, 159), max_size=6).map(sorted))
@settings(max_examples=20, deadline=None)
def test_step_by_step_is_all_at_once(seed, looks):
    "To the last bit, wherever somebody stopped to look"
    given = market(seed)
    at_once = account_for(**given, time=half_days, delay=1)
    account = Account(*(given[k] for k in ['open']), time=half_days, delay=1, funding=given['funding'],
                      high=given['high'], low=given['low'])
    for t in range(160):
        account.order(t, given['target'][:, t], given['stop'][:, t], given['take'][:, t])
        if t in looks:
            account.run(t)
            weights, equity = account.held(given['open'][:, t])
            assert np.isfinite(weights).all() and equity > 0
    account.run(159)
    for name, value in vars(account.book()).items():
        np.testing.assert_array_equal(value, getattr(at_once, name), err_msg=name)

def test_what_is_held_is_seen_at_the_close():
    "A stop touched inside the bar has been sold by its close"
    price = np.array([[10., 10, 10]])
    account = Account(price, free, high=price, low=price - [[0, 0, 3]])
    account.order(0, np.array([1.]), stop=np.array([8.]))
    account.run(1)
    assert account.held(np.array([9.])) == (1, .9)
    assert account.held(np.array([np.nan])) == (1, 1)        # the last known price
    account.run(2)
    assert account.held(np.array([9.])) == (0, .8)
    assert account.book().equity.tolist() == [1, 1, 1]       # the last open was before the touch

def test_orders_that_come_too_late_are_refused():
    account = Account(np.ones((1, 6)), delay=2)
    account.run(3)
    account.order(1, np.ones(1))                             # filled at bar 4
    with pytest.raises(ValueError, match='order of bar 0 is filled at bar 3, but the account is at bar 3'):
        account.order(0, np.ones(1))
    with pytest.raises(ValueError, match='1 target weights of bar 3 are infinite'): account.order(3, np.array([np.inf]))
    with pytest.raises(ValueError, match='stops need highs and lows'): account.order(3, np.ones(1), stop=np.ones(1))

def test_a_book_may_end_where_the_account_is():
    account = Account(np.array([[1., 1, 2, 4]]), free)
    account.order(0, np.ones(1))
    account.run(2)
    book = account.book()
    assert book.equity.tolist() == [1, 1, 2]
    assert len(book.time) == len(book.refused) == book.weights.shape[1] == 3
    account.run(3)
    assert book.equity.tolist() == [1, 1, 2]                 # what was handed out stays

@given(seeds)
@settings(max_examples=15, deadline=None)
def test_stops_know_nothing_of_what_comes(seed):
    given = market(seed)
    full = account_for(**given, time=half_days)
    t = 80
    changed = {k: v.copy() for k, v in given.items()}
    for name in ('high', 'low', 'stop', 'take'): changed[name][:, t:] *= 1.3
    other = account_for(**changed, time=half_days)
    assert (other.equity[:t + 1] == full.equity[:t + 1]).all()
    assert (other.touched[:, :t + 1] == full.touched[:, :t + 1]).all()

@given(seeds, st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_the_future_does_not_matter(seed, delay):
    "Everything after t may change: the book up to t stays; a target of t acts at t + 1 + delay at the earliest"
    target, price = panel(seed)
    full = account_for(target, price, delay=delay)
    t = 60
    fill = t + delay + 1
    other_target = target.copy()
    other_target[:, t:] = .7
    other_price = price.copy()
    other_price[:, fill:] *= 3
    changed = account_for(other_target, other_price, delay=delay)
    assert (changed.equity[:fill] == full.equity[:fill]).all()
    assert (changed.weights[:, fill] != full.weights[:, fill]).any()

@given(seeds)
@settings(max_examples=20, deadline=None)
def test_units_of_price_and_order_of_coins_mean_nothing(seed):
    target, price = panel(seed)
    want = pytest.approx(account_for(target, price).equity, rel=1e-10)
    units = np.array([[1e-6], [1], [1e3], [7]])
    order = np.random.default_rng(seed).permutation(4)
    assert account_for(target, price * units).equity == want
    assert account_for(target[order], price[order]).equity == want

@given(seeds)
@settings(max_examples=20, deadline=None)
def test_parts_add_up_and_costs_are_turnover_times_side(seed):
    target, price = panel(seed)
    due = np.arange(120) % 8 == 0
    book = account_for(target, price, funding=np.where(due, .001, np.nan) * np.ones((4, 1)))
    assert np.cumprod(1 + book.returns) == pytest.approx(book.equity, rel=1e-11)
    assert book.costs == pytest.approx(book.turnover * Costs().side, abs=1e-15)
    assert (book.funding[~due] == 0).all()

def test_dearer_trading_earns_less():
    target, price = panel(0, holes=0, keep=0)
    ends = [account_for(target, price, Costs().scaled(k)).equity[-1] for k in np.linspace(0, 5, 11)]
    assert (np.diff(ends) < 0).all()

def test_break_even_is_where_the_sum_of_returns_vanishes():
    "Costs also change the equity that is traded, so the sum is zero to first order"
    g = np.random.default_rng(3)
    price = 10 * np.exp(np.cumsum(.01 * g.normal(size=(3, 2000)) + .0003, 1))
    target = np.repeat(g.normal(.2, .1, (3, 250)), 8, 1)
    without = account_for(target, price, free)
    side = without.summary()['break-even bp'] / 1e4
    paying = account_for(target, price, Costs(side, 0, 0))
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
    honest = account_for(signal, opens, free)
    cheat = account_for(signal, late, free)
    assert cheat.returns.mean() > .003
    assert abs(honest.returns.mean()) < 4 * honest.returns.std() / np.sqrt(8000)

def test_order_without_a_bar_lapses_and_holding_keeps_its_last_price():
    price = np.array([[10., 10, np.nan, np.nan, 20, 20]])
    book = account_for(np.array([[1., 0, 0, np.nan, np.nan, np.nan]]), price, free)
    assert book.equity == pytest.approx([1, 1, 1, 1, 2, 2])
    assert book.refused.tolist() == [0, 0, 1, 1, 0, 0]

def test_orders_of_a_coin_that_never_trades_all_lapse():
    never = account_for(np.full((1, 6), .5), np.full((1, 6), np.nan))
    assert (never.equity == 1).all()
    assert never.refused.sum() == 5

def test_a_coin_listed_later_starts_clean():
    price = np.array([[np.nan, np.nan, 5., 6., 6.], [1., 1, 1, 1, 1]])
    book = account_for(np.full((2, 5), .5), price, free)
    assert book.equity == pytest.approx([1, 1, 1, 1.1, 1.1])
    assert book.weights[0, 1] == 0

def test_leverage_limit_counts_positions_that_stay():
    price = np.array([[1., 1, np.nan, 1], [1., 1, 1, 1]])
    target = np.array([[1.5, 1.5, 1.5, 1.5], [0., 1.5, 1.5, 1.5]])
    weights = account_for(target, price, free, max_leverage=2).weights
    assert weights[:, 1].tolist() == [1.5, 0]
    assert weights[:, 2] == pytest.approx([1.5, .5])
    assert weights[:, 3] == pytest.approx([1, 1])

flat = np.ones((1, 6))
four = np.full((1, 6), 4.)          # four times the equity

@pytest.mark.parametrize('book', [
    pytest.param(dict(target=four, open=[[1., 1, .5, 2, 2, 2]], costs=free), id='price'),
    pytest.param(dict(target=four, open=flat, costs=free, funding=[[0, 0, .3, 0, 0, 0]]), id='funding'),
    pytest.param(dict(target=[[-4., 4, 4, 4, 4, 4]], open=flat, costs=Costs(.13, 0, 0, borrow=0)), id='costs'),
])
def test_ruin_is_final(book):
    book = account_for(**book)
    assert (book.equity[:2] > 0).all()
    assert (book.equity[2:] == 0).all()
    assert book.returns[2] == -1
    assert (book.returns[3:] == 0).all()
    assert (book.weights[:, 2:] == 0).all()
    assert np.isfinite(book.summary()[['annual return', 'sharpe', 'max drawdown']]).all()

@pytest.mark.parametrize('round_trip', [0, ROUND_TRIP, .002, .02, .5])
def test_costs_of_a_round_trip(round_trip):
    costs = Costs.of(round_trip)
    assert costs.round_trip == pytest.approx(round_trip, rel=1e-15)
    assert costs.borrow == BORROW
    assert costs.scaled(2).borrow == BORROW

def test_the_default_is_its_round_trip():
    assert Costs.of(ROUND_TRIP) == Costs()
    assert Costs.of(.02).round_trip == .02

@pytest.mark.parametrize('bad', [dict(borrow=-.1), dict(borrow=10), dict(borrow=np.nan), dict(fee=5)], ids=str)
def test_costs_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match='must be a fraction in .* 5 bp is 5e-4, 10 % is .1'): Costs(**bad)

@pytest.mark.parametrize('weight, end', [(1, 1 - 3 * .001), (-1, 1 + 3 * .001)], ids=['long', 'short'])
def test_funding_is_paid_by_longs(weight, end):
    "A constant price: three times a thousandth of what was put in"
    due = np.where(np.arange(30) % 8 == 4, .001, np.nan)[None]          # at 4, 12, 20 and 28, then the last is cut off
    once = np.where(np.arange(30) == 0, weight, np.nan)[None]
    book = account_for(once, np.ones((1, 30)), Costs(0, 0, 0, borrow=.5), funding=due)
    assert book.equity[27] == pytest.approx(end, rel=1e-12)
    assert book.unfunded == ()

@pytest.mark.parametrize('freq, bars', [('15min', 4 * 24 * 10), ('1h', 24 * 10), ('1D', 10)])
@pytest.mark.parametrize('weight', [.7, -.7], ids=['long', 'short'])
def test_interest_is_paid_by_shorts_for_time(freq, bars, weight):
    "A constant price: ten days' interest on what was borrowed, whatever the length of a bar; a long pays none"
    time = pd.date_range('2024-01-01', periods=bars + 2, freq=freq, tz='UTC')
    once = np.where(np.arange(bars + 2) == 0, weight, np.nan)[None]
    book = account_for(once, np.ones((1, bars + 2)), Costs(0, 0, 0, borrow=.3), time=time)
    assert book.equity[-1] == pytest.approx(1 - max(-weight, 0) * .3 * 10 / 365, rel=1e-12)
    assert book.unfunded == (0,)

def test_shorts_gain_when_prices_fall():
    book = account_for(np.array([[-1., np.nan, np.nan]]), np.array([[100., 100, 90]]), free)
    assert book.equity[-1] == pytest.approx(1.1)

def test_summary_of_an_idle_book():
    s = account_for(np.zeros((2, 100)), np.ones((2, 100))).summary()
    assert (s[['sharpe', 'annual return', 'turnover per day']] == 0).all()
    assert s[['cost share', 'hit rate', 'break-even bp']].isna().all()

hours = pd.date_range('2024-03-30', periods=120, freq='h', tz='UTC')

def test_a_time_zone_changes_nothing():
    target, price = panel(0)
    utc = account_for(target, price, time=hours)
    berlin = account_for(target, price, time=hours.tz_convert('Europe/Berlin'))
    days, _ = utc.daily()
    assert len(days) == 5
    assert (days == berlin.daily()[0]).all()
    assert utc.summary().equals(berlin.summary())

def test_inputs_stay_as_they_were():
    target, price = panel(0)
    before = target.copy(), price.copy()
    account_for(target, price, mask=np.zeros((4, 120)))
    assert np.array_equal(target, before[0], equal_nan=True)
    assert np.array_equal(price, before[1], equal_nan=True)

@pytest.mark.parametrize('bad, words', [
    (dict(time=hours[:5]), 'time must be 120 ascending opens, got 5'),
    (dict(time=hours[::-1]), 'time must be 120 ascending opens'),
    (dict(delay=.5), 'delay must be 0, 1, 2'),
    (dict(funding=np.zeros((4, 3))), r'funding must be \[N, T\] like open, got \(4, 3\) for \(4, 120\)'),
    (dict(funding=np.full((4, 120), np.inf)), r'funding: 480 rates are infinite, the first at \(coin, bar\) \(0, 0\)'),
    (dict(target=np.ones(120), open=np.ones(120)), r'open must be \[N, T\], got \(120,\)'),
    (dict(stop=np.ones((4, 120))), 'stop needs high and low'),
    (dict(high=np.ones((4, 120))), 'stops need both high and low'),
], ids=['fewer times', 'times backwards', 'half a bar', 'funding of another shape', 'funding without bound',
        'one coin without its axis', 'stops without bars to touch them', 'highs alone'])
def test_what_does_not_fit_is_refused(bad, words):
    target, price = panel(0)
    with pytest.raises(ValueError, match=words): account_for(**{**dict(target=target, open=price), **bad})

# ---- trials

def test_a_backtest_leaves_a_line_and_an_account_none(ledger):
    target, price = panel(0)
    inner = account_for(target, price)
    assert read_chained(ledger).lines == []
    book = backtest(target, price, name='noise', question='q')
    line, = read_chained(ledger).lines
    assert (line['kind'], line['name'], line['question'], line['seed']) == ('backtest', 'noise', 'q', None)
    assert line['data'] == book.data == inner.data
    days, returns = book.daily()
    assert (read_ledger().trials[0].days == days).all()
    assert line['returns'] == pytest.approx(returns, rel=5e-6)
    assert abs(pd.Timestamp(line['time']) - pd.Timestamp.now('UTC')) < pd.Timedelta('1h')

def test_a_recipe_is_what_was_traded_and_data_what_it_was_traded_on(ledger):
    target, price = panel(0, holes=0)
    bars = dict(high=price * 1.1, low=price * .9)
    target[0, :9] = 0.
    same = [dict(), dict(open=price.copy(order='F')), dict(target=np.where(target == 0, -0., target))]
    traded = [dict(costs=Costs().scaled(2)), dict(costs=Costs(borrow=.2)), dict(delay=1), dict(max_leverage=1),
              dict(target=-target), dict(bars, stop=price * .95), dict(bars, take=price * .95)]
    data = [dict(open=price * 2), dict(funding=np.zeros((4, 120))), dict(funding=np.full((4, 120), 1e-4)),
            dict(time=hours), dict(mask=np.arange(480).reshape(4, 120) > 0)]
    for change in same + traded + data: backtest(**{**dict(target=target, open=price), **change})
    lines = read_chained(ledger).lines
    recipes = [line['recipe'] for line in lines]
    assert len(set(recipes[:3])) == 1
    assert len(set(recipes)) == 1 + len(traded)
    assert len({line['data'] for line in lines[:3 + len(traded)]}) == 1
    assert len({line['data'] for line in lines}) == 1 + len(data)

def test_days_of_a_trial_with_a_gap(ledger):
    time = pd.date_range('2024-02-27', periods=240, freq='h', tz='UTC')
    keep = ~((time.day > 1) & (time.day < 5))
    book = backtest(np.ones((1, keep.sum())), np.ones((1, keep.sum())), time=time[keep])
    line, = read_chained(ledger).lines
    assert line['first'] == '2024-02-27'
    assert line['gaps'] == [[4, 3]]                          # 27, 28, 29, 1, then 5
    assert (read_ledger().trials[0].days == book.daily()[0]).all()

def test_a_ledger_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv('CRYPTOML_LEDGER', str(tmp_path))     # a folder
    with pytest.raises(RuntimeError, match=str(tmp_path)): backtest(np.ones((1, 3)), np.ones((1, 3)))

@pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')
def test_hold_of_bitcoin_is_its_price():
    path = Path(os.environ['CRYPTOML_DATA']) / 'spot_1h.parquet'
    bars = pd.read_parquet(path, filters=[('symbol', '==', 'BTCUSDT')], columns=['timestamp', 'open'])
    open = bars.open.to_numpy()
    buy = np.where(np.arange(len(open)) == 0, 1., np.nan)
    book = account_for(buy[None], open[None], time=bars.timestamp)
    assert book.equity[-1] == pytest.approx(open[-1] / open[1] - Costs().side, rel=1e-12)
