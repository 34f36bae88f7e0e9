"""What a bot would have been told, bar by bar and all at once: on holes, defects, changes of unit, late coins

A real freqtrade runs in tests/bots, with `make bots`.
"""
import pickle
from dataclasses import asdict, replace
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from examples import TERMS, untrained
from cryptoml import bots
from cryptoml.bots import (BLOCK, COLUMNS, DIGITS, PLACES, TICK, Regression, bars_before, fit_regression,
                           forecast_history, row_of, to_market)
from cryptoml.combined import weigh
from cryptoml.data import CANDLE, to_panel
from cryptoml.integration import UltimateTradingAI
from cryptoml.newest import Snapshot
from cryptoml.simulate import simulate
from cryptoml.study import Study

pytestmark = pytest.mark.usefixtures('one_thread')
H = pd.Timedelta('1h')

def model_of(coins, unseen, columns=CANDLE):
    "A model of some coins whose network nobody has trained, their bars, the last of them unseen, and the newest close"
    bars = simulate(coins, 2800, seed=3).bars[['time', 'symbol', *columns]].reset_index(drop=True)
    study = Study.of(to_panel(bars), (4, 12))
    f = weigh([untrained(study)], study.inputs, study.targets, study.parts)[0]
    now = study.panel.time[-1] + H
    lacks = {s: [k for k, x in zip(f.names, np.isnan(f.pick(study.inputs).x[n]).all(0)) if x]
             for n, s in enumerate(study.panel.symbols)}
    ended = (now - unseen * H).isoformat()
    terms = replace(TERMS, symbols=study.panel.symbols, trained_until=ended, data_until=ended, absent=lacks,
                    importance={f.names[0]: .01}, book=study.book.plain(), policy=asdict(study.policy))
    return Snapshot(f, terms), bars, now

@pytest.fixture(scope='module')
def world(): return model_of(3, 300)

@pytest.fixture(scope='module')
def six(): return model_of(6, 60)       # a neutral book: each coin's word rests on the others

def told_live(model, bars, close):
    "Rows of all coins, by the facade from the bars up to a close"
    ai = UltimateTradingAI(device='cpu')
    ai.snapshot = model
    said = ai.predict_sync(bars[bars['time'] < close], now=close)
    return {(k, close - H): row_of(p, ai.get_trading_signal(k, 0., now=close)) for k, p in said.items()}

def same(history, told):
    "Whether rows of a history are what was told live"
    for (coin, opened), row in told.items():
        if (coin, opened) not in history.index:                    # it has no bar there: live an older one is stale
            assert row[2] == 'HOLD'
            continue
        mine = tuple(history.loc[(coin, opened)])
        np.testing.assert_allclose(mine[:2], row[:2], atol=1e-5, err_msg=f'{coin} {opened}')
        assert mine[2:] == row[2:], (coin, opened, mine, row)

@pytest.mark.parametrize('which, closes', [('world', (0, 1, 63, 64, 200, 299)), ('six', (0, 30, 59))])
def test_a_history_says_what_the_newest_bar_says(request, which, closes):
    model, bars, now = request.getfixturevalue(which)
    history = forecast_history(model, bars, 0.)
    assert (history['ml_signal'] != 'HOLD').any()
    for back in closes: same(history, told_live(model, bars, now - back * H))

def holed(bars, now):
    "Bars are missing, here and there and for a day; some are wrong, some had no trade"
    rng = np.random.default_rng(0)
    gone = rng.random(len(bars)) < .002
    gone |= (bars['symbol'] == 'ETH/USDT') & bars['time'].between(now - 60 * H, now - 40 * H)
    b = bars[~gone].reset_index(drop=True)
    late = b['time'] > now - 300 * H
    b.loc[late & (rng.random(len(b)) < .01), 'volume'] = 0.
    b.loc[late & (rng.random(len(b)) < .004), 'high'] = np.nan
    spike = late & (rng.random(len(b)) < .002)
    b.loc[spike, ['open', 'high', 'low', 'close']] *= 30
    return b

def test_holes_and_defects(world):
    model, bars, now = world
    dirty = holed(bars, now)
    history = forecast_history(model, dirty, 0.)
    recent = history[history.index.get_level_values('time') >= now - 250 * H]
    assert .3 < (recent['ml_why'] != 'fault').mean() < .95
    for back in (0, 3, 39, 41, 61, 100, 222): same(history, told_live(model, dirty, now - back * H))

def test_a_change_of_unit(world):
    "Before it was known a coin is forecast from what a bot then had; after it, it lacks history"
    model, bars, now = world
    split = bars.copy()
    after = (split['symbol'] == 'ETH/USDT') & (split['time'] >= now - 100 * H)
    split.loc[after, ['open', 'high', 'low', 'close']] /= 1000
    split.loc[after, 'volume'] *= 1000
    history = forecast_history(model, split, 0.)
    eth = history.loc['ETH/USDT']
    before = eth[(eth.index >= now - 200 * H) & (eth.index < now - 100 * H)]
    assert before['ml_score'].notna().mean() > .9 and set(eth.loc[now - 100 * H:, 'ml_why']) == {'fault'}
    for back in (0, 50, 97, 98, 99, 100, 101, 150): same(history, told_live(model, split, now - back * H))

def test_a_coin_that_began_late(world):
    model, bars, now = world
    late = bars[(bars['symbol'] != 'SHIB/USDT') | (bars['time'] >= now - (model.need + 20) * H)]
    history = forecast_history(model, late, 0.)
    assert history.loc['SHIB/USDT', 'ml_score'].notna().sum() in (20, 21)
    for back in (0, 18, 19, 20, 21, 22, 40): same(history, told_live(model, late, now - back * H))

@pytest.mark.parametrize('hours', [1, BLOCK - 1, BLOCK, 77])
def test_what_comes_later_changes_no_bit(world, hours):
    model, bars, now = world
    dirty = holed(bars, now)
    whole = forecast_history(model, dirty, 0.)
    cut = forecast_history(model, dirty[dirty['time'] < now - hours * H], 0.)
    pd.testing.assert_frame_equal(cut, whole.loc[cut.index], check_exact=True)

def test_where_the_bars_begin(world):
    "A row rests on what the model needs, and hardly on anything before"
    model, bars, now = world
    short = bars[bars['time'] >= now - (model.need + 60) * H]
    whole, some = forecast_history(model, bars, 0.), forecast_history(model, short, 0.)
    told = some[some['ml_score'].notna()]
    assert set(told.index.get_level_values('time')) >= set(pd.date_range(now - 60 * H, now - H, freq='h'))
    np.testing.assert_allclose(told['ml_score'], whole.loc[told.index, 'ml_score'], atol=1e-4)
    assert (told['ml_signal'] == whole.loc[told.index, 'ml_signal']).mean() > .99

def test_nothing_of_what_training_has_seen(world):
    model, bars, now = world
    old = bars[bars['time'] + H < pd.Timestamp(model.terms.trained_until)]
    rows = forecast_history(model, old, 0.)
    assert len(rows) == len(old) and set(rows['ml_why']) == {'in sample'} and rows['ml_score'].isna().all()
    assert set(rows['ml_confidence']) == {0.} and set(rows['ml_signal']) == {'HOLD'}

def test_terms_hold_as_they_do_live(world):
    "No threshold was found: nothing is acted on unless one is named; what was judged FAIL is not acted on"
    model, bars, _ = world
    none = replace(model, terms=replace(model.terms, threshold=None))
    assert set(forecast_history(none, bars)['ml_signal']) == {'HOLD'}
    failed = replace(model, terms=replace(model.terms, verdict='FAIL'))
    assert set(forecast_history(failed, bars, 0.)['ml_signal']) == {'HOLD'}
    assert set(forecast_history(failed, bars, 0., act_on='FAIL')['ml_signal']) == {'BUY', 'SELL', 'HOLD'}

masks = st.lists(st.booleans(), min_size=1, max_size=40)

@given(masks, st.integers(1, 50))
def test_bars_before(there, reach):
    "By its definition: from the first bar among the last so many"
    there = np.array(there)
    for t, have in enumerate(bars_before(there, reach)):
        window = np.flatnonzero(there[max(0, t + 1 - reach):t + 1])
        if there[t]: assert have == min(t + 1, reach) - window[0]

class Provider:
    "freqtrade's data provider, as far as a strategy asks it"
    def __init__(self, frames, mode):
        self.frames, self.runmode = frames, type('Mode', (), dict(value=mode))

    def get_pair_dataframe(self, pair, timeframe): return self.frames.get(pair, pd.DataFrame()).copy()

class Strategy:
    can_short = True
    def __init__(self, config): self.config, self.dp = config, None

class Bot(bots.CryptoMLMixin, Strategy): ml_min_confidence = 0.

def bot_of(model, monkeypatch, bars, mode, suffix=''):
    ai = UltimateTradingAI(device='cpu')
    ai.snapshot = model
    monkeypatch.setattr(Bot, '_ml_ai', ai)
    bot = Bot(dict(stake_currency='USDT', trading_mode='futures' if suffix else 'spot'))
    frames = {k + suffix: f.rename(columns=dict(time='date')) for k, f in bars.groupby('symbol')}
    bot.dp = Provider(frames, mode)
    return bot

def asked(bot, pair):
    df = bot.populate_indicators(bot.dp.frames[pair].copy(), dict(pair=pair))
    return bot.populate_exit_trend(bot.populate_entry_trend(df, {}), {})

def test_live_and_backtest_say_the_same(world, monkeypatch):
    "Bar by bar, on a clock that follows them"
    model, bars, now = world
    whole = bot_of(model, monkeypatch, bars, 'backtest')
    backtest = {pair: asked(whole, pair).set_index('date') for pair in whole.dp.frames}
    live = bot_of(model, monkeypatch, bars, 'dry_run')
    every = live.dp.frames
    class Clock:
        @staticmethod
        def now(zone): return clock
    monkeypatch.setattr(bots, 'datetime', Clock)
    for back in (5, 4, 3, 2, 1, 0):
        clock = (now - back * H + pd.Timedelta('5s')).to_pydatetime()
        live.dp.frames = {k: f[f['date'] + H <= clock] for k, f in every.items()}
        told = {pair: asked(live, pair).set_index('date') for pair in every}
    for pair, frame in told.items():
        mine, theirs = frame.tail(6), backtest[pair].tail(6)
        np.testing.assert_allclose(mine['ml_score'], theirs['ml_score'], atol=1e-5)
        for name in ('ml_signal', 'ml_regime', 'ml_why', 'enter_long', 'enter_short', 'exit_long', 'exit_short'):
            assert mine[name].fillna(0).tolist() == theirs[name].fillna(0).tolist(), name
        assert set(frame['ml_why'].iloc[:-6]) == {'no prediction'}       # before the bot was started

def test_a_backtest_is_one_pass(world, monkeypatch):
    model, bars, _ = world
    passes = []
    def counted(*args, **kw):
        passes.append(1)
        return forecast_history(*args, **kw)
    monkeypatch.setattr(bots, 'forecast_history', counted)
    bot = bot_of(model, monkeypatch, bars, 'backtest', ':USDT')
    frames = {pair: asked(bot, pair) for pair in bot.dp.frames}
    assert len(passes) == 1 and all(len(f) == len(bot.dp.frames[k]) for k, f in frames.items())
    every = pd.concat(frames.values())
    assert (every['enter_short'] == 1).sum() == (every['ml_signal'] == 'SELL').sum() > 0
    assert bot.informative_pairs()[0] == ('BTC/USDT:USDT', '1h')

def test_said_once(world, monkeypatch, caplog):
    model, bars, _ = world
    bot = bot_of(model, monkeypatch, bars, 'backtest')
    for pair in bot.dp.frames: asked(bot, pair)
    said = [r.getMessage() for r in caplog.records if 'training has seen' in r.getMessage()]
    ahead = len(bars) // 3 - bot.startup_candle_count
    assert len(said) == 1 and said[0].startswith(f'{ahead - 301} of {ahead} bars of BTC/USDT')

def test_more_than_candles_is_told(monkeypatch, caplog):
    "What freqtrade has is not what this model was trained on"
    model, bars, _ = model_of(2, 100, [*CANDLE, 'quote_volume', 'trades', 'taker_buy_volume'])
    bot_of(model, monkeypatch, bars, 'backtest')
    assert 'inputs that need more than candles' in caplog.text

def test_a_call_that_cannot_be_understood_is_a_hold(world, monkeypatch):
    "freqtrade drops a pair whose strategy raises; here it is told why, and nothing is sold for it"
    model, bars, now = world
    bot = bot_of(model, monkeypatch, bars, 'live')
    bot.dp.frames['BTC/USDT'] = bot.dp.frames['BTC/USDT'].assign(high=np.nan)
    bot.dp.frames = {'BTC/USDT': bot.dp.frames['BTC/USDT']}
    df = asked(bot, 'BTC/USDT')
    assert df['ml_why'].iloc[-1] == 'fault' and 'exit_long' not in df.iloc[-1].dropna()

def test_a_strategy_is_sent_without_its_model(world, monkeypatch):
    model, bars, _ = world
    bot = bot_of(model, monkeypatch, bars, 'backtest')
    bot._ml_ai, bot.dp = bot._ml_ai, None
    bot._ml_done = (1, bars)
    assert len(pickle.dumps(bot)) < 2000

# Sizes

numbers = st.integers(1, 10**14).map(lambda n: Decimal(n).scaleb(-8))
lots = st.sampled_from(['0.00000001', '0.00001', '0.001', '0.01', '0.5', '1', '10'])

@given(numbers, lots, numbers)
@settings(max_examples=300, deadline=None)
def test_a_size_is_whole_lots_and_never_more(amount, lot, price):
    market = dict(precision=dict(amount=float(lot)), limits=dict(amount=dict(min=float(lot)), cost=dict(min=5)))
    size, why = to_market(amount, price, market)
    assert size % Decimal(lot) == 0 and 0 <= size <= amount
    if why: assert size == 0 and (amount < Decimal(lot) or amount // Decimal(lot) * Decimal(lot) * price < 5)
    else: assert amount - size < Decimal(lot) and size * price >= 5
    assert to_market(-amount, price, market).amount == -size and 'E' not in str(to_market(amount, price, market))

SIZES = {   # amount, price, market, mode: amount, and a word of the reason
    'three tenths': (.1 + .2, 1, dict(precision=dict(amount=.1)), None, '0.3', None),
    'decimals': (1.23456, 1, dict(precision=dict(amount=3)), None, '1.234', None),
    'tens': (1749, 1, dict(precision=dict(amount=-1)), PLACES, '1740', None),
    'digits': (.00123456, 1, dict(precision=dict(amount=3)), DIGITS, '0.00123', None),
    'a lot of one': (1.9, 1, dict(precision=dict(amount=1)), TICK, '1', None),
    'no precision': ('0.123456789', 1, {}, None, '0.123456789', None),
    'contracts': (.25, 1, dict(precision=dict(amount=1.), contractSize=.1), None, '2', None),
    'too many': (50, 1, dict(precision=dict(amount=1.), limits=dict(amount=dict(max=20))), None, '20', None),
    'too dear': (50, 7, dict(precision=dict(amount=1.), limits=dict(cost=dict(max=100))), None, '14', None),
    'less than a lot': (.9, 1, dict(precision=dict(amount=1.)), None, '0', 'less than one lot'),
    'too small': (3, 1, dict(precision=dict(amount=1.), limits=dict(amount=dict(min=5))), None, '0', 'smallest order'),
    'too cheap': (3, 1, dict(precision=dict(amount=1.), limits=dict(cost=dict(min=5))), None, '0', 'smallest value'),
    'no limits': (3, 1, dict(precision=None, limits=dict(amount=None, cost=dict(min=None))), None, '3', None),
    'nothing': (0, 1, {}, None, '0', 'nothing'),
}

@pytest.mark.parametrize('amount, price, market, mode, size, why', SIZES.values(), ids=SIZES.keys())
def test_sizes(amount, price, market, mode, size, why):
    found = to_market(amount, price, market, mode)
    assert found.amount == Decimal(size) and (why in found.why if why else found.why is None)

@pytest.mark.parametrize('amount, price', [(np.nan, 1), (1, 0), (1, -1), (np.inf, 1), (1, np.nan)])
def test_no_size(amount, price):
    with pytest.raises(ValueError, match='finite amount and a price above 0'): to_market(amount, price, {})

def test_inverse_contracts_are_refused():
    with pytest.raises(ValueError, match='settled in its coin'): to_market(1, 1, dict(symbol='A', inverse=True))

# The model for FreqAI

def test_the_label_gap_is_left_out():
    "A label that reaches into the held-out rows would tell of them"
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.normal(size=3000))
    reach = 100
    x = rng.normal(size=(2900, 3))
    y = (walk[reach:] - walk[:-reach])[:, None]
    _, came, said = fit_regression(x, y, reach=reach)
    assert 1 - ((came - said) ** 2).mean() / ((came - y.mean()) ** 2).mean() < .05      # nothing can be known

def test_a_fitted_model_travels():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1500, 4))
    fitted, came, said = fit_regression(x, x[:, :1] ** 2 + x[:, 1:2])
    again = pickle.loads(pickle.dumps(fitted))
    assert isinstance(again, Regression) and np.array_equal(again.predict(x), fitted.predict(x))
    assert 1 - ((came - said) ** 2).mean() / came.var() > .5            # the line alone: a third

def test_too_few_rows():
    with pytest.raises(ValueError, match='nothing is held out'): fit_regression(np.zeros((0, 2)), np.zeros((0, 1)))
    assert list(COLUMNS) == ['ml_score', 'ml_confidence', 'ml_signal', 'ml_regime', 'ml_why']
