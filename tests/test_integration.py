"""A bot's day gone wrong: dirty bars, clocks, kills, damage, malice, many threads and processes

Suites 4, 5, 6, 7, 8, 11, 14, 15
"""
import asyncio, contextlib, hashlib, inspect, json, os, pickle, resource, shutil, signal, subprocess, sys, textwrap
import threading, time, warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest, safetensors.torch, torch

from conftest import ended, forked
from examples import CLOCKS, near
from cryptoml import integration, newest, state, trainer, training
from cryptoml.combined import save_combined
from cryptoml.data import CANDLE, PRICES, DataError, market_frame
from cryptoml.forecaster import make_inputs, save_forecaster
from cryptoml.integration import UltimateTradingAI
from cryptoml.ledger import read_ledger
from cryptoml.newest import Snapshot
from cryptoml.policy import Policy
from cryptoml.simulate import simulate
from cryptoml.state import StateError, generations, read_json, read_lines, write_json
from cryptoml.trainer import TrainerError

unix = pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks and signals of Unix')
proc = pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='reads its size from /proc')

H = pd.Timedelta('1h')
S, OTHER, BROKEN = 'BTC/USDT', 'ETH/USDT', 'XRP/USDT'   # the last is a coin that gave no bars
CONFIG = dict(size='small', horizons=[12, 24], seed=1, act_on='FAIL')   # whatever it is worth: one epoch is no training
LONG = 600    # Seconds after which something hangs: never a measure of speed

pytestmark = pytest.mark.usefixtures('one_thread')

# ---- a model, the newest bars, and what it says of them

@dataclass
class Desk:
    "A trained model and the bars that a bot holds at one close"
    ai: UltimateTradingAI
    root: Path               # Where the model is saved
    bars: pd.DataFrame       # Of both coins, closed by `now`, as many as a prediction needs and some
    coming: pd.DataFrame     # What comes after
    now: pd.Timestamp        # Close of the newest bar
    said: dict               # Prediction of S from `bars`

    @property
    def mine(self) -> np.ndarray:
        "Rows of S, oldest first"
        return np.flatnonzero(self.bars['symbol'] == S)

    @property
    def others(self) -> np.ndarray:
        "Rows of the other coin, oldest first"
        return np.flatnonzero(self.bars['symbol'] == OTHER)

    def act(self, data, now=None, symbol=S):
        "A bot's loop: predict, or the error, then ask for a signal with the lowest confidence there is"
        now = self.now if now is None else now
        try: p = self.ai.predict_sync(data, symbol, now)
        except DataError as e: p = e
        return p, self.ai.get_trading_signal(symbol, 0., now)

def loaded(root, **config):
    "A new object with the model saved in a folder"
    ai = UltimateTradingAI(dict(act_on='FAIL') | config, device='cpu')
    ai.load_state(root)
    return ai

def of_both(ai, now): return [ai.get_trading_signal(s, 0., now) for s in (S, OTHER)]

def make_desk(root, bars, end):
    "Trained until `end`, at a close at which there is something to do for both coins"
    ai = UltimateTradingAI(CONFIG | dict(state_dir=str(root)), device='cpu')
    coins = dict(list(bars[bars['time'] < end].groupby('symbol'))) | {BROKEN: []}
    history = ai.train_sync(coins, [S, OTHER, BROKEN], epochs=1)
    assert history['left_out'] == ai.live().terms.left_out == {BROKEN: 'no rows: the data is empty'}
    assert f'left out: {BROKEN}: no rows' in history['data']
    ai.save_state()
    enough = (ai.live().need + 230) * H
    for now in pd.date_range(end + 12 * H, bars['time'].max() - 6 * H, freq='h'):
        held = bars[(bars['time'] < now) & (bars['time'] >= now - enough)].reset_index(drop=True)
        ai.predict_sync(held, None, now)
        if all(s is not None and s['action'] in ('BUY', 'SELL') for s in of_both(ai, now)): break
    else: raise AssertionError('the model never acts')
    return Desk(ai, root, held, bars[bars['time'] >= now], now, ai.predict_sync(held, S, now))

@pytest.fixture(scope='session')
def simulated(tmp_path_factory):
    "Ends on the day on which Europe's clocks go back"
    bars = simulate(n_symbols=2, n_bars=4000, seed=3, start='2022-05-18 10:00').bars
    desk = make_desk(tmp_path_factory.mktemp('simulated'), bars, pd.Timestamp('2022-10-29 16:00', tz='UTC'))
    assert pd.Timestamp('2022-10-30 01:00', tz='UTC') < desk.now < pd.Timestamp('2022-10-31', tz='UTC')
    return desk

@pytest.fixture(scope='session')
def real(tmp_path_factory):
    if 'CRYPTOML_DATA' not in os.environ: pytest.skip('CRYPTOML_DATA is not set: real data absent')
    first, last = pd.Timestamp('2024-02-01', tz='UTC'), pd.Timestamp('2024-06-20', tz='UTC')
    some = [('symbol', 'in', ['BTCUSDT', 'ETHUSDT']), ('timestamp', '>=', first), ('timestamp', '<', last)]
    bars = market_frame(pd.read_parquet(Path(os.environ['CRYPTOML_DATA'])/'spot_1h.parquet', filters=some))
    return make_desk(tmp_path_factory.mktemp('real'), bars, pd.Timestamp('2024-06-12', tz='UTC'))

@pytest.fixture(params=['simulated', 'real'])
def desk(request): return request.getfixturevalue(request.param)

def said_of(s, *words):
    "Whether one of the words stands in a reason of the signal"
    return any(w in r for r in s['reasoning'] for w in words)

def same(desk, data, now=None):
    p, s = desk.act(data, now)
    assert near(p, desk.said)
    assert s['action'] in ('BUY', 'SELL')

def holds(desk, data, *words, now=None):
    "No action, and one of the words in the reason"
    p, s = desk.act(data, now)
    if isinstance(p, Exception):          # what was said before must not be acted on
        same(desk, desk.bars)
        p, s = desk.act(data, now)
    assert s['action'] == 'HOLD'
    assert s['position_size'] == s['confidence'] == 0
    assert s['target'] is s['stop_loss'] is s['take_profit'] is None
    assert said_of(s, *words), s['reasoning']
    if isinstance(p, Exception): assert any(w in str(p) for w in words)
    weights = desk.ai.target_weights(desk.now if now is None else now)
    assert weights[S] is None

def words_of(p, s):
    "What is said beside an action; where the forecast is not sure enough of its own side for one, beside the forecast"
    return s['reasoning'] if s else p['notes']

def told(desk, data, word, now=None):
    "No action, or one that says in words what was left out of its window; never one as if nothing were wrong"
    said = words_of(*desk.act(data, now))
    assert any(word in r for r in said), said

def changed(desk, column, value, back=1):
    "The bars with other values in one row of S"
    b = desk.bars.astype({c: float for c in desk.bars.columns if c not in ('time', 'symbol')})
    b.loc[desk.mine[-back], column] = value
    return b

def also(desk, rows): return pd.concat([desk.bars, rows], ignore_index=True)

# ---- suite 7: the newest bars are dirty

@pytest.mark.parametrize('column', CANDLE)
@pytest.mark.parametrize('value, word', [
    (np.nan, 'NaN in'),
    (np.inf, 'infinite in'),
    (-np.inf, 'infinite in'),
    (-1., 'negative'),
])
def test_impossible_number(desk, column, value, word): holds(desk, changed(desk, column, value), word)

@pytest.mark.parametrize('column', PRICES)
def test_zero_price(desk, column): holds(desk, changed(desk, column, 0.), f'zero or negative price in {column}')

@pytest.mark.parametrize('value, word', [(0., 'zero or negative price'), (np.nan, 'NaN in')])
def test_all_zero_or_missing(desk, value, word): holds(desk, changed(desk, CANDLE, value), word)

@pytest.mark.parametrize('columns, values, word', [
    (['high', 'low'], lambda b: [b.low, b.high], 'high below low'),
    ('close', lambda b: b.high * 1.01, 'outside low to high'),
    ('open', lambda b: b.low * .99, 'outside low to high'),
], ids=['high below low', 'close above high', 'open below low'])
def test_prices_that_contradict_each_other(desk, columns, values, word):
    newest = desk.bars.iloc[desk.mine[-1]]
    holds(desk, changed(desk, columns, values(newest)), word)

@pytest.mark.parametrize('column', ['quote_volume', 'trades', 'taker_buy_volume'])
def test_optional_columns(simulated, column):
    "They may be missing, but not in silence where the model uses them"
    holds(simulated, changed(simulated, column, np.inf), f'infinite in {column}')
    holds(simulated, changed(simulated, column, -1.), f'negative in {column}')
    p, s = simulated.act(changed(simulated, column, np.nan))
    assert p == simulated.said or any('missing' in r for r in words_of(p, s)), s['reasoning']

def test_bars_without_the_columns_of_the_training(simulated):
    "Trained on an archive with taker volumes, fed with fetch_ohlcv: the model lacks inputs that it always had"
    told(simulated, simulated.bars[['time', 'symbol', *CANDLE]], 'missing')

@pytest.mark.parametrize('n', [1, 3, 12])
def test_newest_bars_missing(desk, n):
    "Of one coin or of all: the bar that closed now is not there"
    of_one = desk.bars.drop(desk.mine[-n:])
    of_all = desk.bars[desk.bars['time'] < desk.now - n * H]
    for data in (of_one, of_all):
        _, s = desk.act(data)
        assert s['action'] == 'HOLD' and said_of(s, 'stale', 'missing'), (s['data_time'], str(desk.now))

@pytest.mark.parametrize('n', [1, 3, 12])
@pytest.mark.parametrize('back', [1, 5])
def test_gap_before_the_newest(desk, n, back):
    told(desk, desk.bars.drop(desk.mine[-n - back:-back]), f'{n} of the last')

@pytest.mark.parametrize('rows, word', [
    (slice(-2, -1), 'lacks 1 of the last'),
    (slice(-3, -1), 'lacks 2 of the last'),
    (slice(-1, None), 'cannot be read at this bar'),
    (slice(-3, None), 'cannot be read at this bar'),
    (slice(-12, None), 'cannot be read at this bar'),
    (slice(-13, -1), 'cannot be read at this bar'),       # too little of its window is left
], ids=str)
def test_gap_of_the_other_coin(desk, rows, word):
    "Coins look at one another: what is missing of one is said of the others"
    told(desk, desk.bars.drop(desk.others[rows]), f'{OTHER} {word}')

def test_exact_duplicates(desk):
    mine = desk.mine
    newest, last_five = desk.bars.iloc[mine[-1:]], desk.bars.iloc[mine[-5:]]
    same(desk, pd.concat([desk.bars, newest]))
    same(desk, also(desk, pd.concat([last_five, last_five])))
    same(desk, also(desk, desk.bars))                              # two pages of a paged download overlap

def test_conflicting_duplicates(desk):
    def again(back):
        row = desk.bars.iloc[desk.mine[-back:][:1]]
        return also(desk, row.assign(close=row['close'] * 1.0001, high=row['high'] * 1.001))
    holds(desk, again(1), 'conflicting duplicate')
    told(desk, again(2), '1 of the last')

@pytest.mark.parametrize('order', [
    lambda bars: bars.iloc[::-1],
    lambda bars: bars.sample(frac=1, random_state=0),
    lambda bars: bars.sort_values('time', kind='stable'),
], ids=['newest first', 'shuffled', 'by time'])
def test_out_of_order(desk, order): same(desk, order(desk.bars))

def test_newest_two_the_other_way_round(desk):
    order = np.arange(len(desk.bars))
    last_two = desk.mine[-2:]
    order[last_two] = last_two[::-1]
    same(desk, desk.bars.iloc[order])

@pytest.mark.parametrize('late', ['5s', '59min'])
@pytest.mark.parametrize('symbols', [[S, OTHER], [S]], ids=['both', 'one'])
def test_unclosed_last_bar(desk, late, symbols):
    "What every exchange sends last: the bar in progress. The one before is scored, as without it"
    now = desk.now + pd.Timedelta(late)
    coming = desk.coming[(desk.coming['time'] == desk.now) & desk.coming['symbol'].isin(symbols)]
    wild = coming.assign(close=coming['close'] * 50, high=coming['high'] * 60, volume=np.nan)
    for unclosed in (coming, wild):
        p, _ = desk.act(also(desk, unclosed), now)
        assert near(p, desk.said)

@pytest.mark.parametrize('factor, wrong_trade', [(100., 'high'), (.01, 'low')])
def test_spike(desk, factor, wrong_trade):
    newest, third = desk.bars.iloc[desk.mine[-1]], desk.bars.iloc[desk.mine[-3]]
    holds(desk, changed(desk, PRICES, [newest[c] * factor for c in PRICES]), 'spike')
    holds(desk, changed(desk, wrong_trade, newest[wrong_trade] * factor), 'spike')
    told(desk, changed(desk, PRICES, [third[c] * factor for c in PRICES], back=3), '1 of the last')

@pytest.mark.parametrize('factor', [100., .01])
@pytest.mark.parametrize('n', [2, 3, 5])
def test_cents_in_place_of_dollars_from_one_bar_on(desk, factor, n):
    d = desk.bars.copy()
    d.loc[desk.mine[-n:], PRICES] *= factor
    _, s = desk.act(d)
    assert s['action'] == 'HOLD'

@pytest.mark.parametrize('n', [5, 6, 12, 30])
def test_frozen_feed(desk, n):
    d = desk.bars.copy()
    d.loc[desk.mine[-n:], CANDLE] = d.loc[desk.mine[-n], CANDLE].to_numpy(float)
    holds(desk, d, 'frozen')

@pytest.mark.parametrize('n', [1, 3, 4, 12])
def test_outage_filled_with_flat_bars(desk, n):
    "What freqtrade makes of a gap before the strategy sees it: the last close, without volume"
    d = desk.bars.copy()
    counts = [c for c in d.columns if c not in ('time', 'symbol', *PRICES)]
    d.loc[desk.mine[-n:], PRICES] = d.loc[desk.mine[-n - 1], 'close']
    d.loc[desk.mine[-n:], counts] = 0
    _, s = desk.act(d)
    assert s['action'] == 'HOLD' and said_of(s, 'frozen', 'zero volume'), (s['action'], s['reasoning'])

def candles(desk):
    "What ccxt's fetch_ohlcv gives of S"
    return [[int(r.time.timestamp() * 1000), r.open, r.high, r.low, r.close, r.volume]
            for r in desk.bars.iloc[desk.mine].itertuples()]

@pytest.mark.parametrize('shape', [
    lambda rows: rows,
    lambda rows: [[str(x) for x in r] for r in rows],
    np.array,
    lambda rows: {S: rows},
    lambda rows: {'BTCUSDT': pd.DataFrame(rows, columns=['timestamp', *CANDLE])},
], ids=['lists', 'strings', 'array', 'dict of lists', 'dict of frames'])
def test_candles_of_an_exchange(real, shape):
    "ccxt lists of one coin, as strings too: the same numbers as from the same rows of a frame"
    alone = real.ai.predict_sync(real.bars[real.bars['symbol'] == S], S, real.now)
    p, _ = real.act(shape(candles(real)))
    assert p == alone

MALFORMED = {   # what came instead of candles: how it is made of them, and a word of the sentence
    'no rows': (lambda c: [], 'empty'),
    'an empty row': (lambda c: [[]], 'no column'),
    'None': (lambda c: None, 'NoneType'),
    'an empty dict': (lambda c: {}, 'empty'),
    'text': (lambda c: 'error', 'no such file'),
    'a status': (lambda c: 429, 'int'),
    'an answer of an exchange': (lambda c: {'code': -1003, 'msg': 'Too much request weight'}, 'int'),
    'a row of nothing behind': (lambda c: c + [[None] * 6], 'missing'),
    'rows of nothing': (lambda c: [[None] * 6] * 1900, 'missing'),
    'a row of 1970': (lambda c: c + [[0] + [None] * 5], 'no epoch time'),
    'rows of 1970': (lambda c: [[0] + [None] * 5] * 1900, 'no epoch time'),
    'the newest without numbers': (lambda c: c[:-1] + [[c[-1][0]] + [None] * 5], 'NaN in'),
    'the newest in letters': (lambda c: c[:-1] + [[c[-1][0], *'abcde']], 'no numbers'),
    'rows without volume': (lambda c: [r[:5] for r in c], 'no column'),
    'last for close': (lambda c: pd.DataFrame(c, columns=['time', 'open', 'high', 'low', 'last', 'volume']),
                       'no column for close'),
    'every fourth': (lambda c: c[::4], 'timeframe'),
}

@pytest.mark.parametrize('name', MALFORMED)
def test_malformed_rows(desk, name):
    rows, word = MALFORMED[name]
    holds(desk, rows(candles(desk)), word)

def test_one_coin_dead(desk):
    "Its signals hold; those of a coin that was compared with it hold too and say so"
    mine = desk.bars['symbol'] == S
    dead = desk.bars[~mine | (desk.bars['time'] < desk.now - 26 * H)]
    holds(desk, dead, 'stale', 'missing')
    both = desk.ai.predict_sync(dead, None, desk.now)
    first = both[OTHER]['faults'][0]
    assert 'crossexchange inputs are missing' in first and 'other coins' in first
    assert [s['action'] for s in of_both(desk.ai, desk.now)] == ['HOLD', 'HOLD']
    assert desk.ai.target_weights(desk.now) == {S: None, OTHER: None}

def test_dead_coin_that_this_one_only_looks_at(desk):
    "Bitcoin is compared with nothing here: it goes on without the other coin and says so"
    mine = desk.bars['symbol'] == S
    told(desk, desk.bars[mine | (desk.bars['time'] < desk.now - 26 * H)], f'{OTHER} cannot be read at this bar')

def test_no_bar_of_the_coin(desk): holds(desk, desk.bars[desk.bars['symbol'] != S], f'no bar of {S}')

@pytest.mark.parametrize('columns, value', [('close', np.nan), (PRICES, 0.)], ids=['no close', 'zero prices'])
def test_a_bad_bar_of_the_coin_others_are_compared_with(desk, columns, value):
    both = desk.ai.predict_sync(changed(desk, columns, value), None, desk.now)
    assert 'crossexchange' in both[OTHER]['faults'][0]

def test_bars_of_one_coin_alone(desk):
    "Allowed; what then lacks of the other coins is said, or changes nothing"
    p, s = desk.act(desk.bars[desk.bars['symbol'] == S])
    said = words_of(p, s)
    unchanged = not isinstance(p, Exception) and near(p, desk.said)
    assert unchanged or any(w in r for w in (OTHER, 'other coin') for r in said), 'the forecast changed in silence'

def test_prices_that_never_move(simulated):
    "A pegged pair whose volume lives: no volatility, no position, no crash"
    d = simulated.bars.copy()
    d.loc[simulated.mine, PRICES] = 1.
    d.loc[simulated.mine, 'volume'] = np.arange(len(simulated.mine)) + 1.
    _, s = simulated.act(d)
    assert s['action'] == 'HOLD'

@pytest.mark.parametrize('symbol', ['BTCUSDT', 'btc/usdt', S])
def test_a_failed_call_ends_the_last_signal(desk, symbol):
    same(desk, desk.bars)
    with pytest.raises(DataError): desk.ai.predict_sync([], symbol, desk.now)
    s = desk.ai.get_trading_signal(S, 0., desk.now)
    assert s['action'] == 'HOLD' and 'failed' in s['reasoning'][0]

def test_a_failed_call_for_all_ends_all_signals(desk):
    desk.ai.predict_sync(desk.bars, None, desk.now)
    with pytest.raises(DataError): desk.ai.predict_sync([], None, desk.now)
    assert [s['action'] for s in of_both(desk.ai, desk.now)] == ['HOLD', 'HOLD']
    assert desk.ai.target_weights(desk.now) == {S: None, OTHER: None}

@pytest.mark.parametrize('bad', ['PEPE/USDT', 'BTC', '', 5, 'BTC/USD'])
def test_what_is_no_coin_of_the_model(desk, bad):
    with pytest.raises(DataError, match='symbol|coin'): desk.ai.predict_sync(desk.bars, bad, desk.now)

def test_the_bars_are_left_alone(desk):
    before = desk.bars.copy(deep=True)
    desk.ai.predict_sync(desk.bars, None, desk.now)
    pd.testing.assert_frame_equal(desk.bars, before)

# ---- suite 8: clocks and zones

def us(t): return (t - pd.Timestamp(0, tz='UTC')) // pd.Timedelta('1us')

def each(t, form, dtype=None): return pd.Series([form(x) for x in t], t.index, dtype=dtype)

FORMS = dict(
    naive=lambda t: t.dt.tz_localize(None),
    berlin=lambda t: t.dt.tz_convert('Europe/Berlin'),
    sydney=lambda t: t.dt.tz_convert('Australia/Sydney'),
    kolkata=lambda t: t.dt.tz_convert('Asia/Kolkata'),
    seconds=lambda t: us(t) // 10**6,
    milliseconds=lambda t: us(t) // 1000,
    microseconds=us,
    nanoseconds=lambda t: us(t) * 1000,
    float_seconds=lambda t: us(t) / 1e6,
    text_milliseconds=lambda t: (us(t) // 1000).astype(str),
    text=lambda t: t.astype(str),
    iso_z=lambda t: t.dt.strftime('%Y-%m-%dT%H:%M:%SZ'),
    iso_naive=lambda t: t.dt.strftime('%Y-%m-%dT%H:%M:%S'),
    iso_berlin=lambda t: each(t.dt.tz_convert('Europe/Berlin'), pd.Timestamp.isoformat),
    objects=lambda t: each(t, pd.Timestamp.to_pydatetime, object),
    ms_dtype=lambda t: t.astype('datetime64[ms, UTC]'),
    ns_dtype=lambda t: t.astype('datetime64[ns, UTC]'),
)

@pytest.mark.parametrize('form', FORMS)
def test_the_same_in_any_form_of_time(desk, form):
    """With days on which clocks change: Europe's fell back an hour before the newest simulated bars, Sydney's went
    forward within their history"""
    t = FORMS[form](desk.bars['time'])
    same(desk, desk.bars.assign(time=t))
    stamped = desk.bars.drop(columns='time').assign(timestamp=t)
    frames = {s: g.drop(columns='symbol') for s, g in stamped.groupby('symbol')}
    if pd.api.types.is_datetime64_any_dtype(t):
        frames = {s: g.set_index('timestamp') for s, g in frames.items()}
    same(desk, frames)

NOWS = dict(
    tokyo=lambda now: now.tz_convert('Asia/Tokyo'),
    **CLOCKS,
    iso_berlin=lambda now: now.tz_convert('Europe/Berlin').isoformat(),
)

@pytest.mark.parametrize('form', NOWS)
def test_the_same_by_any_clock(desk, form): same(desk, desk.bars, NOWS[form](desk.now))

@pytest.mark.parametrize('zone, words', [
    ('America/New_York', ['stale', 'missing']),
    ('Asia/Tokyo', ['future bar']),
    ('Europe/Moscow', ['future bar']),
    ('Asia/Kolkata', ['off the 1h grid']),
])
def test_local_times_without_a_zone(simulated, zone, words):
    "They are read as UTC, and so are seen to be hours old, ahead, or off the grid"
    local = simulated.bars['time'].dt.tz_convert(zone).dt.tz_localize(None)
    holds(simulated, simulated.bars.assign(time=local), *words)

def test_london_time_after_the_clocks_went_back(simulated):
    "Right again on the newest bars, with one hour twice before them: that hour is not used, and that is said"
    local = simulated.bars['time'].dt.tz_convert('Europe/London').dt.tz_localize(None)
    told(simulated, simulated.bars.assign(time=local), 'of the last')

def test_units_are_mixed(desk):
    "Each row says its own by its size"
    t = us(desk.bars['time']) // 1000
    t.iloc[desk.mine[-1]] //= 1000
    same(desk, desk.bars.assign(time=t))

def test_the_day_first(desk):
    t = desk.bars['time'].dt.strftime('%d/%m/%Y %H:%M')
    holds(desk, desk.bars.assign(time=t), 'cannot be read')

@pytest.mark.parametrize('late', ['1s', '59s', '29min'])
def test_clock_a_little_ahead(desk, late): same(desk, desk.bars, desk.now + pd.Timedelta(late))

@pytest.mark.parametrize('late', ['91min', '2h', '5h', '3D', '370D'])
def test_clock_far_ahead_of_the_data(desk, late):
    holds(desk, desk.bars, 'stale', 'missing', now=desk.now + pd.Timedelta(late))

def test_signal_asked_long_after_the_prediction(desk):
    same(desk, desk.bars)
    def at(late): return desk.ai.get_trading_signal(S, 0., desk.now + pd.Timedelta(late))
    assert at('59min')['action'] != 'HOLD'
    assert 'stale' in at('3h')['reasoning'][0]
    assert 'clock' in at('-3h')['reasoning'][0]
    assert desk.ai.target_weights(desk.now + 3 * H)[S] is None
    assert desk.ai.get_trading_signal(S, 0.)['action'] == 'HOLD'          # the wall clock is years on

@pytest.mark.parametrize('early', ['5s', '10min', '60min'])
def test_clock_behind(desk, early):
    "The newest bar is not closed by this clock: the one before is scored, as if it were not there"
    now = desk.now - pd.Timedelta(early)
    before = desk.ai.predict_sync(desk.bars[desk.bars['time'] < desk.now - H], S, now)
    assert before['data_time'] == (desk.now - H).isoformat()
    p, _ = desk.act(desk.bars, now)
    assert near(p, before)

@pytest.mark.parametrize('early', ['2h', '5h', '3D'])
def test_clock_hours_behind(desk, early):
    holds(desk, desk.bars, 'future bar', now=desk.now - pd.Timedelta(early) - pd.Timedelta('2min'))

@pytest.mark.parametrize('late', ['61s', '10min', '59min', '1h', '3D', '400D'])
def test_future_bar(desk, late):
    wrong = desk.bars.iloc[desk.mine[-1:]].assign(time=desk.now + pd.Timedelta(late))
    holds(desk, also(desk, wrong), 'future bar')
    p, s = desk.act(also(desk, wrong.assign(symbol=OTHER)))
    assert not isinstance(p, Exception) and near(p, desk.said) or s['action'] == 'HOLD'

@pytest.mark.parametrize('late', ['1ms', '14s'])
def test_a_late_stamp_is_the_same_bar(desk, late):
    "The newest bar of a coin"
    t = desk.bars['time'].copy()
    t.iloc[desk.mine[-1]] += pd.Timedelta(late)
    p, _ = desk.act(desk.bars.assign(time=t), desk.now)
    assert (p['faults'], p['data_time'], p['price']) == ([], desk.said['data_time'], desk.said['price'])
    np.testing.assert_allclose(p['intervals'], desk.said['intervals'], atol=1e-5)   # a bar more of history was given

@pytest.mark.parametrize('off', ['7min', '30min'])
def test_off_the_grid(desk, off):
    "The newest bar alone, by either clock; and all of them"
    off = pd.Timedelta(off)
    t = desk.bars['time'].copy()
    t.iloc[desk.mine[-1]] += off
    for now in (desk.now, desk.now + off):
        _, s = desk.act(desk.bars.assign(time=t), now)
        assert s['action'] == 'HOLD' and said_of(s, 'off the grid', 'missing', 'stale'), (str(now), s['action'])
    holds(desk, desk.bars.assign(time=desk.bars['time'] + off), 'off the 1h grid', now=desk.now + off)

def test_bars_that_training_saw(desk):
    "As if it were then"
    seen = pd.Timestamp(desk.ai.live().terms.trained_until) - 5 * H
    assert seen in set(desk.bars['time'])
    old = desk.bars.assign(time=desk.bars['time'] - (desk.now - seen))
    holds(desk, old, 'in sample', now=seen)

def far(*args, **sources):
    "Inputs in another unit"
    inputs = make_inputs(*args, **sources)
    return replace(inputs, x=inputs.x * 100)

def test_a_bar_unlike_anything_seen(desk, monkeypatch):
    "A forecast is made, and nothing is done about it"
    monkeypatch.setattr(newest, 'make_inputs', far)
    desk.ai._online = None                                     # what is kept was made before
    holds(desk, desk.bars, 'unlike anything seen')
    desk.ai.predict_sync(desk.bars, None, desk.now)
    assert [s['action'] for s in of_both(desk.ai, desk.now)] == ['HOLD', 'HOLD']
    assert desk.ai.target_weights(desk.now) == {S: None, OTHER: None}
    monkeypatch.undo()
    desk.ai._online = None
    same(desk, desk.bars)

# ---- what is shipped: refit to the newest bar, or as it was judged

def trained_to(end, bars, root, **config):
    "A model of the bars before a time, trained in one epoch"
    ai = UltimateTradingAI(CONFIG | dict(state_dir=str(root), horizons=[4, 24]) | config, device='cpu')
    ai.train_sync(bars[bars['time'] < end], epochs=1)
    return ai

def test_settings_are_searched_and_applied(tmp_path, ledger):
    "The best of the trials is what is trained; the verdict counts them; the same again searches nothing"
    bars = simulate(n_symbols=1, n_bars=3700, seed=3).bars
    config = CONFIG | dict(state_dir=str(tmp_path), horizons=[4, 24], trials=2)
    ai = UltimateTradingAI(config, device='cpu')
    history = ai.train_sync(bars, epochs=1, optimize_hyperparams=True)
    found, used = history['search'], ai.live().forecaster.config
    assert {k: getattr(used, k) for k in found['settings']} == found['settings']
    assert sum(found['counts'].values()) == 2 and found['counts']['failed'] == 0
    assert history['verdict']['trials'] == 3
    lines = len(read_ledger().trials)
    stop = threading.Event()
    stop.set()
    with pytest.raises(TrainerError, match='was stopped'):
        ai.train_sync(bars, epochs=1, optimize_hyperparams=True, stop=stop)
    assert len(read_ledger().trials) == lines                          # of the search there was nothing left to do

def test_a_search_that_is_stopped_goes_on(tmp_path, ledger):
    bars = simulate(n_symbols=1, n_bars=3700, seed=3).bars
    ai = UltimateTradingAI(CONFIG | dict(state_dir=str(tmp_path), horizons=[4, 24], trials=1), device='cpu')
    stop = threading.Event()
    stop.set()
    with pytest.raises(TrainerError, match='training was stopped in epoch 1'):
        ai.train_sync(bars, epochs=1, optimize_hyperparams=True, stop=stop)
    assert ai.snapshot is None and [t.kind for t in read_ledger().trials] == ['tune']
    assert ai.train_sync(bars, epochs=1, optimize_hyperparams=True)['search']['counts']['complete'] == 1
    assert [t.kind for t in read_ledger().trials] == ['tune', 'tune', 'train']

@pytest.mark.parametrize('fresh', [True, False])
def test_a_model_has_seen_what_its_terms_say(tmp_path, fresh):
    "A refit one has seen all of its data, and holds at any bar of them; a judged one has not seen its test"
    bars = simulate(n_symbols=1, n_bars=3700, seed=3).bars
    end = bars['time'].max() - 48 * H
    ai = trained_to(end, bars, tmp_path, fresh=fresh)
    terms = ai.live().terms
    trained, judged = pd.Timestamp(terms.trained_until), pd.Timestamp(terms.data_until)
    assert judged == end
    if fresh: assert trained == end
    else: assert pd.Timedelta('20D') < end - trained < (end - bars['time'].min()) / 4       # the test is a fifth
    def at(now):
        p = ai.predict_sync(bars[bars['time'] < now], S, now)
        return p['in_sample'], said_of(ai.get_trading_signal(S, 0., now), 'in sample')
    assert at(end + 24 * H) == (False, False)
    assert at(trained - 24 * H) == (True, True)
    assert at(end - 24 * H) == (fresh, fresh)
    ai.save_state()
    assert loaded(tmp_path).live().terms == terms

# ---- a relative book: six coins against one another

@pytest.fixture(scope='module')
def six(tmp_path_factory):
    "A model of six coins, the bars a bot holds at a close at which the book decides, and that close"
    bars = simulate(n_symbols=6, n_bars=3750, seed=5).bars
    end = bars['time'].max() - 60 * H
    ai = trained_to(end, bars, tmp_path_factory.mktemp('six'))
    assert str(ai.live().terms.declared) == 'relative value at 24 bars, dollar and beta neutral'
    for now in pd.date_range(end, bars['time'].max(), freq='h'):
        held = bars[bars['time'] < now]
        ai.predict_sync(held, None, now)
        if all(w is not None for w in ai.next_weights({}, 1., now).values()): break
    else: raise AssertionError('the book never decides about all of them')
    return ai, held, now

def again(six):
    "The same model in an object that has said and decided nothing"
    ai, bars, now = six
    new = UltimateTradingAI(dict(act_on='FAIL'), device='cpu')
    new.snapshot = ai.live()
    return new, bars, now

def test_one_coin_of_a_relative_book_brings_the_others(six):
    ai, bars, now = again(six)
    symbols = ai.live().terms.symbols
    assert len(symbols) == 6 and {ai.get_trading_signal(k, 0., now)['why'] for k in symbols} == {'no prediction'}
    one = ai.predict_sync(bars, S, now)
    assert one['symbol'] == S and np.isfinite([one['score'], one['beta'], one['confidence']]).all()
    said, book = {k: ai.get_trading_signal(k, 0., now) for k in symbols}, ai.target_weights(now)
    assert ai.predict_sync(bars, None, now)[S] == one
    assert {k: ai.get_trading_signal(k, 0., now) for k in symbols} == said
    acting = {k: s for k, s in said.items() if s['action'] != 'HOLD'}
    assert {s['action'] for s in acting.values()} == {'BUY', 'SELL'}
    for k, s in acting.items():
        assert s['target'] == book[k] and abs(s['target']) == s['position_size'] and s['horizon'] == 24
        assert 'above the median coin' in s['reasoning'][0]

def test_a_relative_book_is_neutral(six):
    "Its targets, and from flat its first step too; asked twice it is the same step"
    ai, bars, now = again(six)
    said = ai.predict_sync(bars, None, now)
    targets, step = (np.array(list(w.values())) for w in (ai.target_weights(now), ai.next_weights({}, 1., now)))
    betas = [p['beta'] for p in said.values()]
    for w in (targets, step):
        assert abs(w.sum()) < 1e-9 and abs(w @ betas) < 1e-9 and np.abs(w).sum() > 1e-3
    np.testing.assert_allclose(step, Policy(**ai.live().terms.policy).rate * targets, rtol=1e-9)
    assert list(ai.next_weights({}, 1., now).values()) == list(step)

def test_one_coin_alone_is_no_relative_book(six):
    ai, bars, now = again(six)
    p = ai.predict_sync(bars[bars['symbol'] == S], S, now)
    s = ai.get_trading_signal(S, 0., now)
    assert s is None or s['action'] == 'HOLD' and said_of(s, 'missing', 'needs 3')
    assert p['faults'] or p['notes']

def test_an_odd_coin_of_a_relative_book_is_left_alone(six, monkeypatch):
    "What the others do is neutral without it"
    ai, bars, now = again(six)
    def odd(*args, **sources):
        inputs = make_inputs(*args, **sources)
        x = inputs.x.copy()
        x[inputs.panel.symbols.index(S)] *= 100
        return replace(inputs, x=x)
    monkeypatch.setattr(newest, 'make_inputs', odd)
    ai.predict_sync(bars, S, now)
    assert said_of(ai.get_trading_signal(S, 0., now), 'unlike anything seen')
    w = ai.next_weights({}, 1., now)
    others = [v for k, v in w.items() if k != S]
    assert w.pop(S) is None and None not in others and abs(sum(others)) < 1e-9

def test_a_relative_book_of_two_coins_is_refused(tmp_path):
    "Before anything is trained"
    bars = simulate(n_symbols=2, n_bars=3700, seed=3).bars
    ai = UltimateTradingAI(dict(book='relative', state_dir=str(tmp_path)), device='cpu')
    with pytest.raises(ValueError, match='a relative book needs 3 coins or more, got 2'): ai.train_sync(bars)
    assert ai.snapshot is None and not list(tmp_path.iterdir())

# ---- the same dict: asked twice, saved and loaded, in another process (suite 11)

OTHER_PROCESS = textwrap.dedent('''
    import json, pickle, sys
    import pandas as pd
    from cryptoml.integration import UltimateTradingAI
    out = []
    for root, bars, now, pickled in json.loads(sys.argv[1]):
        bars = pd.read_parquet(bars)
        ai = UltimateTradingAI(dict(state_dir=root), device='cpu')
        ai.load_state()
        predicted = ai.predict_sync(bars, None, now)
        with open(pickled, 'rb') as f: ai = pickle.load(f)
        said = ai.get_trading_signal('BTC/USDT', 0., now)                  # what was predicted before it was pickled
        assert ai.predict_sync(bars, None, now) == predicted
        assert ai.get_trading_signal('BTC/USDT', 0., now) == said
        out += [predicted, said]
    print(json.dumps(out))
''')

def in_another_process(asked, threads):
    "What another process says of saved and pickled models, and of the bars beside them"
    command = [sys.executable, '-c', OTHER_PROCESS, json.dumps(asked)]
    env = os.environ | dict(OMP_NUM_THREADS=str(threads))
    r = subprocess.run(command, capture_output=True, text=True, env=env, timeout=LONG)
    assert r.returncode == 0, r.stderr
    return r.stdout.strip()

@pytest.mark.parametrize('threads', [1, 2])
def test_twice_saved_and_in_another_process(simulated, request, tmp_path, threads):
    desks = [simulated]
    if 'CRYPTOML_DATA' in os.environ: desks.append(request.getfixturevalue('real'))
    asked, expected = [], []
    torch.set_num_threads(threads)
    try:
        for i, d in enumerate(desks):
            root, bars, pickled = tmp_path/str(i), tmp_path/f'{i}.parquet', tmp_path/f'{i}.pickle'
            def said(ai): return json.dumps(ai.predict_sync(d.bars, None, d.now))
            first = said(d.ai)
            assert said(d.ai) == first
            d.ai.save_state(root)
            other = loaded(root)
            assert near(json.loads(said(other)), json.loads(first))
            first = said(other)
            with contextlib.suppress(ImportError):
                import cloudpickle
                assert said(pickle.loads(cloudpickle.dumps(other))) == first
            d.bars.to_parquet(bars)
            pickled.write_bytes(pickle.dumps(other))
            asked.append([str(root), str(bars), str(d.now), str(pickled)])
            expected += [json.loads(first), other.get_trading_signal(S, 0., d.now)]
        assert in_another_process(asked, threads) == json.dumps(expected)
    finally: torch.set_num_threads(1)

def test_a_prediction_is_plain(desk):
    said = json.dumps(desk.said, allow_nan=False)
    assert json.loads(said) == desk.said
    for told in (str(desk.root), 'gen-', f'{time.localtime().tm_year}-'): assert told not in said

# ---- suite 4: kills while saving

def mark_it(ai, mark):
    "Terms, weights, scale and what is familiar to the model all tell the mark"
    s = ai.live()
    with torch.no_grad(): next(iter(s.forecaster.first.network.parameters())).view(-1)[0] = mark
    s.forecaster.first.scaler.center[0] = s.forecaster.familiar.mean[0] = mark
    ai.snapshot = replace(s, terms=replace(s.terms, data=dict(mark=mark)))

def mark_of(ai):
    s = ai.live()
    weight = next(iter(s.forecaster.first.network.parameters())).view(-1)[0].item()
    f = s.forecaster
    found = {weight, float(f.first.scaler.center[0]), float(f.familiar.mean[0]), float(s.terms.data['mark'])}
    assert len(found) == 1, f'a mix of generations: {found}'
    return found.pop()

def marked(desk, root, mark):
    "The model of the desk with a mark, to be saved in a folder"
    ai = UltimateTradingAI(dict(state_dir=str(root)), device='cpu')
    ai.load_state(desk.root)
    mark_it(ai, mark)
    return ai

def at_lines_of_state(call, act):
    "Call, and before each line of cryptoml.state act on its number and how often it came"
    came = Counter()
    def trace(frame, event, arg):
        if frame.f_code.co_filename != state.__file__: return None
        if event == 'line':
            came[frame.f_lineno] += 1
            act(frame.f_lineno, came[frame.f_lineno])
        return trace
    sys.settrace(trace)
    try: call()
    finally: sys.settrace(None)

def lines_of_a_save(ai, path):
    "Line and count of everything a save does, in order; of a line that runs over many values the first time"
    def child():
        lines = []
        at_lines_of_state(ai.save_state, lambda *line: lines.append(line))
        often = {number for number, count in lines if count > 3}
        source, first = inspect.getsourcelines(state._erase)     # it comes wherever an earlier kill left something
        lines = [line for line in lines if line[0] not in range(first, first + len(source))]
        write_json(path, [line for line in lines if line[1] == 1 or line[0] not in often])
    assert ended(forked(child)) == 0
    return [tuple(line) for line in read_json(path)]

def kill_at(ai, line):
    "Kill a process that saves before it comes to a line"
    def child():
        at_lines_of_state(ai.save_state, lambda *now: now == line and os.kill(os.getpid(), signal.SIGKILL))
    assert ended(forked(child)) == -signal.SIGKILL, f'the save did not come to {line}'

@unix
def test_killed_while_saving(simulated, tmp_path):
    "Before each line of a save: the old state is there or the new one, whole; from one line on it is the new one"
    root = tmp_path/'state'
    saver = marked(simulated, root, 0)
    for _ in range(3): saver.save_state()
    lines = lines_of_a_save(saver, tmp_path/'lines.json')
    assert len(lines) >= 50
    reader = loaded(root, state_dir=str(root))
    old, new = 0, []
    for i, line in enumerate(lines, 1):
        mark_it(saver, i)
        kill_at(saver, line)
        with warnings.catch_warnings():
            warnings.simplefilter('error')                # whole, and without falling back
            reader.load_state()
        assert mark_of(reader) in (old, i)
        new.append(mark_of(reader) == i)
        if i % 5 == 0:                                    # the next save works
            saver.save_state()
            reader.load_state()
            assert mark_of(reader) == i
        old = mark_of(reader)
    assert new == sorted(new)
    assert 0 < sum(new) < len(new)
    saver.save_state()
    assert len(generations(root)) <= 3
    assert not list(root.glob('.*'))

@unix
def test_disk_full_while_saving(simulated, tmp_path):
    ai = marked(simulated, tmp_path, 1)
    ai.save_state()
    mark_it(ai, 2)
    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try: ai.save_state()
        except StateError as e: return 0 if 'unchanged' in str(e) else 2
        return 3
    assert ended(forked(full)) == 0
    ai.load_state()
    assert mark_of(ai) == 1

# ---- suites 5 and 6: damaged and malicious states

def refused(live, root, match=None):
    "load_state says clearly no, and the object keeps the model it had, which still predicts"
    before = live.live()
    with pytest.raises(StateError, match=match): live.load_state(root)
    assert live.live() is before

def two_generations(desk, root):
    ai = marked(desk, root, 1)
    ai.save_state()
    mark_it(ai, 2)
    ai.save_state()
    return ai

def one_bit(data):
    data = bytearray(data)
    data[len(data) // 2] ^= 4
    return data

DAMAGE = {
    'missing': lambda path: path.unlink(),
    'empty': lambda path: path.write_bytes(b''),
    'truncated': lambda path: path.write_bytes(path.read_bytes()[:path.stat().st_size // 3]),
    'one bit': lambda path: path.write_bytes(one_bit(path.read_bytes())),
}

FILES = [f'{k}.safetensors' for k in ('network_0', 'scaler', 'member_0', 'blend', 'familiar')]

@pytest.mark.parametrize('name', ['manifest.json', *FILES])
@pytest.mark.parametrize('damage', DAMAGE)
def test_damaged_state(simulated, tmp_path, name, damage):
    "The generation before is loaded; when it is damaged too, the state is refused"
    two_generations(simulated, tmp_path)
    live = loaded(tmp_path)
    kept = live.live()
    DAMAGE[damage](tmp_path/'gen-000002'/name)
    with pytest.warns(UserWarning, match='gen-000001 was loaded instead'): live.load_state(tmp_path)
    assert mark_of(live) == 1
    live.snapshot = kept
    DAMAGE[damage](tmp_path/'gen-000001'/name)
    refused(live, tmp_path, 'no whole generation')
    assert mark_of(live) == 2

def test_nothing_there(simulated, tmp_path):
    live = marked(simulated, tmp_path, 1)
    (tmp_path/'empty').mkdir()
    (tmp_path/'file').write_text('x')
    for root in ('absent', 'empty', 'file'): refused(live, tmp_path/root, 'nothing was saved')

def test_an_object_without_a_model(simulated, tmp_path):
    new = UltimateTradingAI(dict(state_dir=str(tmp_path/'absent')), device='cpu')
    def predict(): new.predict_sync(simulated.bars, S, simulated.now)
    with pytest.raises(StateError): new.load_state()
    for call in (new.save_state, new.target_weights, predict):
        with pytest.raises(StateError, match='no model yet'): call()
    s = new.get_trading_signal(S)
    assert (s['action'], s['why'], s['horizon']) == ('HOLD', 'no model', None)
    assert not (tmp_path/'absent').exists()

@pytest.mark.parametrize('content, word', [
    (dict(kind='portfolio'), 'portfolio'),
    ({}, 'does not hold a model'),
    ([], 'does not hold a model'),
], ids=['another kind', 'nothing', 'a list'])
def test_a_state_of_something_else(simulated, tmp_path, content, word):
    state.save(tmp_path/'x', dict(x=dict(w=torch.zeros(2))), content)
    refused(marked(simulated, tmp_path, 1), tmp_path/'x', word)

def test_a_model_without_terms(simulated, tmp_path):
    live = marked(simulated, tmp_path, 1)
    save_combined(live.live().forecaster, tmp_path/'x')
    refused(live, tmp_path/'x', 'train it again')

def test_a_generation_of_an_earlier_version(simulated, tmp_path):
    "A network alone, with terms that knew of no declared book: one sentence that says what to do"
    live = marked(simulated, tmp_path, 1)
    old = {k: v for k, v in asdict(live.live().terms).items() if k != 'book'}
    save_forecaster(live.live().forecaster.first, tmp_path/'x', terms=old)
    sentence = f"^{tmp_path/'x'} holds a network alone, of an earlier version: train it again$"
    refused(live, tmp_path/'x', sentence)
    ai = UltimateTradingAI(dict(state_dir=str(tmp_path/'x')), device='cpu')
    with pytest.raises(StateError, match=sentence): ai.load_state()

def rewrite(manifest, m): write_json(manifest, m | dict(sha256=state._digest(m)))

@pytest.mark.parametrize('schema', [0, state.SCHEMA + 1])
def test_layouts_of_other_versions(simulated, tmp_path, schema):
    live = marked(simulated, tmp_path, 1)
    live.save_state(tmp_path/'x')
    manifest = tmp_path/'x'/'gen-000001'/'manifest.json'
    rewrite(manifest, read_json(manifest) | dict(schema=schema))
    refused(live, tmp_path/'x', f'schema {schema}')

def forge(desk, root, edit=lambda content: None, files=None, listed=None):
    """The state of the desk with correct digests: what a stranger can hand out

    Its content edited, files of it replaced, other files listed that are not in its folder: names to bytes
    """
    def about(data): return dict(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    shutil.rmtree(root, ignore_errors=True)
    folder = root/'gen-000001'
    shutil.copytree(generations(desk.root)[-1], folder)
    m = read_json(folder/'manifest.json')
    edit(m['content'])
    for name, data in (files or {}).items():
        (folder/name).write_bytes(data)
        m['files'][name] = about(data)
    for name, data in (listed or {}).items(): m['files'][name] = about(data)
    rewrite(folder/'manifest.json', m)
    return root

def test_tampered_without_new_digests(simulated, tmp_path):
    "Terms that make the bot bold"
    live = two_generations(simulated, tmp_path)
    manifest = tmp_path/'gen-000002'/'manifest.json'
    m = read_json(manifest)
    bold = dict(threshold=0., policy=asdict(Policy(max_weight=100., target_annual=1000.)))
    m['content']['about']['terms'] |= bold
    write_json(manifest, m)
    with pytest.warns(UserWarning, match='gen-000002: manifest.json does not fit its own digest'): live.load_state()
    assert mark_of(live) == 1
    shutil.rmtree(tmp_path/'gen-000001')
    refused(live, tmp_path, 'digest')

def terms(**values):
    def edit(content): content['about']['terms'].update(values)
    return edit

def book(**values):
    def edit(content): content['about']['terms']['book'].update(values)
    return edit

def policy(**values):
    def edit(content): content['about']['terms']['policy'].update(values)
    return edit

def forecaster(**values):
    def edit(content): content.update(values)
    return edit

def network(**values):
    def edit(content): content['network'].update(values)
    return edit

FORGED_TERMS = [
    dict(symbols='BTC/USDT'),
    dict(symbols=None),
    dict(symbols=[1]),
    dict(symbols=[]),
    dict(timeframe='soon'),
    dict(timeframe=3),
    dict(trained_until='x'),
    dict(trained_until=None),
    dict(trained_until='2020-01-01'),
    dict(data_until='x'),
    dict(data_until='2024-06-01'),
    dict(data_until=5),
    dict(threshold='low'),
    dict(threshold=[1]),
    dict(threshold=-5),
    dict(importance=None),
    dict(importance=[1]),
    dict(policy=None),
    dict(policy=[]),
    dict(sources=None),
    dict(book=None),
    dict(book={}),
    dict(book=dict(kind='timing')),
]
FORGED_BOOK = [
    dict(kind='both'),
    dict(kind='relative'),                          # whose policy would be a neutral one
    dict(horizons=[24.]),
    dict(horizons=[4]),                             # is none of the model's
    dict(places=[]),
    dict(places=[7]),
    dict(places=[-1]),
    dict(places=['x']),
    dict(places=[0]),                               # is that of another horizon
    dict(places=[0, 1]),
    dict(long_only='x'),
    dict(long_only=True),                           # the policy is not
    dict(usual=[0.]),
    dict(usual=['x']),
    dict(usual=None),
    dict(leverage=3),
]
FORGED_POLICY = [
    dict(rate=5),
    dict(leverage=3),
    dict(max_weight='x'),
    dict(max_weight=-1),
    dict(target_annual=None),
    dict(bars_per_year=-1),
    dict(bars_per_year=0),
    dict(every=4.5),
    dict(every=True),
    dict(patience=1.5),
]
FORGED_FORECASTER = {
    'a name less': lambda content: content['names'].pop(),
    'no names': lambda content: content.pop('names'),
    'columns that are not there': lambda content: content['families'].update(technical=[0, 999]),
    'no families': forecaster(families={}),
    'clip': forecaster(clip='x'),
    'network': forecaster(network=[]),
    'about': forecaster(about=[]),
    'size': lambda content: content['config'].update(size='huge'),
    'heads': network(n_heads=3),
    'quantiles': network(quantiles=[.9, .7, .5, .3, .1]),
    'horizons': network(horizons='x'),
    'horizons of today and before': network(horizons=[0, 12, 24]),
    'horizons that fall': network(horizons=[24, 12, 4]),
    'horizons of another config': lambda content: content['config'].update(horizons=[1, 2, 3]),
    'horizons of another network': network(horizons=[1, 2, 3]),
    'lookback of another size': network(lookback=8192),
    'cost of another network': network(round_trip=.01),
    'a seed in words': lambda content: content['config'].update(seed='x'),
    'a rate in words': lambda content: content['config'].update(lr='fast'),
    'no epochs': lambda content: content['config'].update(epochs=0),
    'clip of 0': forecaster(clip=0),
    'clip true': forecaster(clip=True),
    'a quantile of 1': network(quantiles=[.05, .25, .5, .75, 1.]),
    'quantiles in words': network(quantiles=list('abcde')),
    'dropout of 1': network(dropout=1.),
    'a name is a number': lambda content: content['names'].__setitem__(0, 7),
    'a name is a list': lambda content: content['names'].__setitem__(0, ['x']),
    'a name no feature has': lambda content: content['names'].__setitem__(0, 'no_such_feature'),
    'two names swapped': lambda content: content['names'].__setitem__(slice(0, 2), content['names'][1::-1]),
    'a place is true': lambda content: content['families']['technical'].__setitem__(1, True),
    'two networks': lambda content: content['config'].update(networks=2),
    'no network': lambda content: content['config'].update(networks=0),
    'no members': lambda content: content.pop('members'),
    'a member less': lambda content: content['members'].pop(),
    'a member more': lambda content: content['members'].append('HAR'),
    'a member nobody knows': lambda content: content['members'].__setitem__(0, 'oracle'),
    'members in a text': forecaster(members='boosting'),
}
FORGED = {
    **{str(values): terms(**values) for values in FORGED_TERMS},
    **{f'book {values}': book(**values) for values in FORGED_BOOK},
    **{f'policy {values}': policy(**values) for values in FORGED_POLICY},
    **FORGED_FORECASTER,
}

@pytest.mark.parametrize('name', FORGED)
def test_forged_manifest(simulated, tmp_path, name):
    "With correct digests: refused when it is loaded, not hours later in the bot's loop"
    refused(marked(simulated, tmp_path, 1), forge(simulated, tmp_path/'x', FORGED[name]))

def test_what_is_wrong_with_a_date_is_said(simulated, tmp_path):
    refused(marked(simulated, tmp_path, 1), forge(simulated, tmp_path/'x', terms(data_until='2024-06-01')),
            'data_until cannot be')

FORGED_SCALES = {
    'scale of 0': lambda s: s | dict(scale=s['scale'] * 0),
    'a negative scale': lambda s: s | dict(scale=-s['scale']),
    'scale of nothing': lambda s: s | dict(scale=s['scale'] * torch.nan),
    'infinite centre': lambda s: s | dict(center=s['center'] + torch.inf),
    'centre of two axes': lambda s: s | dict(center=s['center'][:, None].contiguous()),
    'scale of one': lambda s: s | dict(scale=s['scale'][:1].clone()),
    'truth values': lambda s: {k: v.bool() for k, v in s.items()},
    'half as exact': lambda s: {k: v.float() for k, v in s.items()},
    'no scale': lambda s: dict(center=s['center']),
}

@pytest.mark.parametrize('name', FORGED_SCALES)
def test_a_scale_that_is_none(simulated, tmp_path, name):
    tensors, _ = state.load(simulated.root)
    data = safetensors.torch.save(FORGED_SCALES[name](tensors['scaler']))
    refused(marked(simulated, tmp_path, 1), forge(simulated, tmp_path/'x', files={'scaler.safetensors': data}))

def every(change, begins=''):
    "Arrays of a file, those changed whose names begin so"
    return lambda a: {k: change(v).contiguous() if k.startswith(begins) else v for k, v in a.items()}

def named(old, new): return lambda a: {k.replace(old, new): v for k, v in a.items()}

FORGED_PARTS = {   # file and what is made of its arrays
    'shares beyond 1': ('blend', every(lambda v: 2 * v, 'shares/')),
    'a negative share': ('blend', every(lambda v: -v, 'shares/')),
    'a share that is no number': ('blend', every(lambda v: v * torch.nan, 'shares/')),
    'shares of one horizon': ('blend', every(lambda v: v[:1], 'shares/')),
    'a share of nobody': ('blend', named('/network', '/oracle')),
    'a share of what a member is silent about': ('blend', named('shares/mean_volatility', 'shares/regime')),
    'a target nobody knows': ('blend', named('shares/direction', 'shares/luck')),
    'a part nobody knows': ('blend', named('temperature', 'warmth')),
    'no shares': ('blend', lambda a: {k: v for k, v in a.items() if not k.startswith('shares')}),
    'a temperature of 0': ('blend', every(lambda v: 0 * v, 'temperature')),
    'a spread that falls': ('blend', every(lambda v: -v.sort(-1).values - 1 * torch.arange(v.shape[-1]), 'spread')),
    'another width of the familiar': ('familiar', every(lambda v: v[:-1], 'mean')),
    'a familiar that is infinite': ('familiar', every(lambda v: v + torch.inf)),
    'a spread of 0': ('familiar', every(lambda v: 0 * v, 'spread')),
    'an interval that learnt from infinity': ('bands', every(lambda v: v + torch.inf, '0/scores')),
    'an offset beyond a factor of two': ('bands', every(lambda v: v + 1, '0/offset')),
    'no intervals': ('bands', lambda a: {k: v for k, v in a.items() if k[0] != '0'}),
    'no usual rows': ('familiar', lambda a: {k: v for k, v in a.items() if k != 'usual'}),
}

@pytest.mark.parametrize('name', FORGED_PARTS)
def test_parts_that_are_none(simulated, tmp_path, name):
    file, change = FORGED_PARTS[name]
    tensors, _ = state.load(simulated.root)
    data = safetensors.torch.save(change(tensors[file]))
    assert data != safetensors.torch.save(tensors[file])
    refused(marked(simulated, tmp_path, 1), forge(simulated, tmp_path/'x', files={f'{file}.safetensors': data}),
            'does not hold a model')

FORGED_MEMBERS = {
    'half as exact': every(torch.Tensor.float),
    'no numbers': every(lambda v: v * torch.nan, ''),
    'of fewer inputs': every(lambda v: v[:, 1:] if v.ndim == 4 else v[1:] if v.ndim == 1 and len(v) > 10 else v),
    'of one horizon': every(lambda v: v[:1]),
    'of nothing': lambda a: {},
    'of a target nobody knows': lambda a: {f'luck/{k.partition("/")[2]}': v for k, v in a.items()},
    'without weights': lambda a: {k: v for k, v in a.items() if not k.endswith('weights')},
}

@pytest.mark.parametrize('name', FORGED_MEMBERS)
def test_members_that_are_none(simulated, tmp_path, name):
    "Each of them"
    tensors, content = state.load(simulated.root)
    assert content['members']
    live = marked(simulated, tmp_path, 1)
    for k in range(len(content['members'])):
        data = safetensors.torch.save(FORGED_MEMBERS[name](tensors[f'member_{k}']))
        refused(live, forge(simulated, tmp_path/'x', files={f'member_{k}.safetensors': data}), 'does not hold a model')

KINDS = [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64]

@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_weights_of_another_kind(simulated, tmp_path, kind):
    tensors, _ = state.load(simulated.root)
    data = safetensors.torch.save({k: v.to(kind) for k, v in tensors['network_0'].items()})
    refused(marked(simulated, tmp_path, 1), forge(simulated, tmp_path/'x', files={'network_0.safetensors': data}),
            'the weights are not those of its network')

@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_weight_that_is_no_number(simulated, tmp_path, value):
    weights = state.load(simulated.root)[0]['network_0']
    last = list(weights)[-1]
    weights[last].view(-1)[0] = value
    refused(marked(simulated, tmp_path, 1),
            forge(simulated, tmp_path/'x', files={'network_0.safetensors': safetensors.torch.save(weights)}),
            f'1 weights are not finite, first {last}')

@pytest.mark.parametrize('values', [
    dict(max_weight=100.),
    dict(max_weight=100., target_annual=1000., max_gross=1e9),
    dict(target_annual=1e9),
], ids=str)
def test_forged_policy_stays_within_the_contract(simulated, tmp_path, values):
    "Whatever a model file says, a target is a weight of -1 to 1"
    root = forge(simulated, tmp_path/'x', policy(**values))
    try: ai = loaded(root)
    except StateError: return
    ai.predict_sync(simulated.bars, None, simulated.now)
    for s in of_both(ai, simulated.now): assert -1 <= s['target'] <= 1
    for w in ai.target_weights(simulated.now).values(): assert abs(w) <= 1

class Evil:
    "Touches a file when it is unpickled"
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)

def saved_by_torch(x, path):
    torch.save(x, path)
    return path.read_bytes()

def length(n): return n.to_bytes(8, 'little')    # of the header of a safetensors file

HUGE = b'{"w":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4611686018427387904]}}'
NO_TENSORS = {
    'pickle': lambda folder: pickle.dumps(Evil(folder/'executed')),
    'torch': lambda folder: saved_by_torch(Evil(folder/'executed'), folder/'evil.pt'),
    'endless header': lambda folder: length(2**62) + b'{}',
    'endless tensor': lambda folder: length(len(HUGE)) + HUGE,
    'nothing': lambda folder: b'',
}

@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('kind', NO_TENSORS)
def test_files_that_are_no_tensors(simulated, tmp_path, name, kind):
    live = marked(simulated, tmp_path, 1)
    refused(live, forge(simulated, tmp_path/'x', files={name: NO_TENSORS[kind](tmp_path)}), name)
    assert not (tmp_path/'executed').exists()

@pytest.mark.parametrize('name', [
    lambda folder: '../../secret.safetensors',
    lambda folder: str(folder/'secret.safetensors'),
    lambda folder: '..\\secret.safetensors',
], ids=['above', 'absolute', 'above on Windows'])
def test_names_outside_the_folder(simulated, tmp_path, name):
    live = marked(simulated, tmp_path, 1)
    (tmp_path/'secret.safetensors').write_bytes(b'x')
    root = forge(simulated, tmp_path/'x', listed={name(tmp_path): b'x'})
    refused(live, root, 'no file of a generation')

@unix
@proc
@pytest.mark.parametrize('key, value', [('d_model', 4096), ('lookback', 10**9), ('n_past', 10**7)])
def test_memory_is_bounded(simulated, tmp_path, key, value):
    "A network that is said to be huge beside small files"
    root = forge(simulated, tmp_path/'x', network(**{key: value}))
    def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss          # kB
    def bounded():
        size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
        most = size + (400 << 20)                         # a mistake must not take the machine's memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        start = peak()
        with contextlib.suppress(StateError): loaded(root)
        return 0 if peak() - start < 100_000 else 3
    assert ended(forked(bounded)) == 0

@pytest.mark.parametrize('config, word', [
    (dict(horizons=[6]), 'horizons'),
    (dict(size='base'), 'size'),
    (dict(timeframe='4h'), 'timeframe'),
    (dict(round_trip=.01), 'round_trip'),
    (dict(book='relative'), 'book timing there, relative asked for'),
    (dict(long_only=True), 'long_only'),
])
def test_a_state_for_another_config(simulated, config, word):
    ai = UltimateTradingAI(config, device='cpu')
    with pytest.raises(StateError, match=f'does not fit this config.*{word}'): ai.load_state(simulated.root)

def test_a_config_in_other_words(simulated):
    ai = loaded(simulated.root, size='auto', horizons=(24, 12), timeframe='60m', book='auto', long_only=False)
    assert ai.live().terms == simulated.ai.live().terms

@pytest.mark.parametrize('bad', [
    dict(sise='small'),
    dict(size='huge'),
    dict(size=None),
    dict(horizons=[]),
    dict(horizons=24),
    dict(horizons=[0]),
    dict(horizons=['4']),
    dict(horizons=[4, 4]),
    dict(timeframe='soon'),
    dict(timeframe=5),
    dict(threads=0),
    dict(threads='2'),
    dict(threads=1.5),
    dict(seed='x'),
    dict(seed=None),
    dict(round_trip=-1),
    dict(round_trip='x'),
    dict(round_trip=float('nan')),
    dict(max_age=5),
    dict(max_age=dict(date='1h')),
    dict(max_age=dict(data='soon')),
    dict(max_age=dict(data='-1h')),
    dict(state_dir=None),
    dict(book='long'),
    dict(book=None),
    dict(long_only=1),
    dict(long_only='yes'),
    dict(fresh='no'),
    dict(networks=0),
    dict(networks=True),
    dict(networks=1.5),
    dict(networks='3'),
    dict(trials=0),
    dict(trials=5.),
], ids=str)
def test_config_is_checked_at_once(bad):
    "Not hours later in the bot's loop"
    with pytest.raises(ValueError, match=next(iter(bad))): UltimateTradingAI(bad, device='cpu')

# ---- suite 14: several at once

@unix
def test_two_processes_save_to_one_folder(simulated, tmp_path):
    "Ten times each; who reads meanwhile finds the model of one or of the other"
    def ten_times(ai):
        for _ in range(10): ai.save_state()
    pids = [forked(lambda ai=ai: ten_times(ai)) for ai in (marked(simulated, tmp_path, mark) for mark in (1, 2))]
    reader = UltimateTradingAI(dict(state_dir=str(tmp_path)), device='cpu')
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for _ in range(20):
            with contextlib.suppress(StateError):
                reader.load_state()
                seen.add(mark_of(reader))
    assert [ended(p) for p in pids] == [0, 0]
    assert seen <= {1, 2}
    reader.load_state()
    assert mark_of(reader) in (1, 2)
    assert [g.name for g in generations(tmp_path)] == ['gen-000018', 'gen-000019', 'gen-000020']

def variant_of(desk):
    "The model of the desk with smaller weights"
    ai = loaded(desk.root)
    with torch.no_grad():
        for p in ai.live().forecaster.first.network.parameters(): p.mul_(.7)
    return ai

def test_a_book_is_of_one_model(simulated, tmp_path):
    "Weights of coins predicted by the model before a load are not mixed with those of the model after it"
    d = simulated
    variant_of(d).save_state(tmp_path)
    def weights(ai, symbol=None):
        ai.predict_sync(d.bars, symbol, d.now)
        return ai.target_weights(d.now)
    new, old = weights(loaded(tmp_path)), weights(loaded(d.root))
    assert new[S] != old[S] and new[OTHER] != old[OTHER]
    ai = loaded(tmp_path)
    assert weights(ai) == new
    ai.load_state(d.root)
    assert weights(ai) == old
    ai.load_state(tmp_path)
    mixed = weights(ai, S)
    assert mixed[OTHER] in (None, new[OTHER]), 'one book from two models'

@pytest.fixture(scope='module')
def short_history():
    bars = simulate(n_symbols=1, n_bars=2500, seed=5).bars
    return bars[bars['time'] < bars['time'].max() - pd.Timedelta('3D')]

def finished_epochs(root): return sum(len(read_lines(p)) for p in Path(root).glob('training/*/history.jsonl'))

@pytest.fixture(scope='module')
def busy(simulated, tmp_path_factory):
    "An object with a model, and the folder of its state"
    root = tmp_path_factory.mktemp('busy')
    config = dict(size='small', horizons=[12, 24], seed=2, state_dir=str(root))
    ai = UltimateTradingAI(config, device='cpu')
    ai.load_state(simulated.root)
    return ai, root

def comes(event): assert event.wait(LONG), 'waited too long'

def is_idle(ai):
    "Waits for the end of a training; then another one is allowed"
    assert ai._training.acquire(timeout=LONG), 'the training does not end'
    ai._training.release()
    with pytest.raises(DataError): ai.train_sync([], epochs=1)

@pytest.fixture
def epoch_done(monkeypatch):
    "Set once a training has written down an epoch"
    done, append = threading.Event(), trainer.append_line
    def watched(*line):
        append(*line)
        done.set()
    monkeypatch.setattr(trainer, 'append_line', watched)
    return done

def test_training_cancelled(simulated, busy, short_history, epoch_done):
    """The event loop goes on meanwhile, several predictions at once; the old model stays; the lock comes back; a second
    training is refused"""
    (ai, root), d, bars = busy, simulated, short_history
    live = ai.live()
    async def day():
        task = asyncio.create_task(ai.train_from_historical_data(bars, epochs=1000))
        await asyncio.to_thread(comes, epoch_done)
        with pytest.raises(StateError, match='training already'): await ai.train_from_historical_data(bars, epochs=1)
        with pytest.raises(StateError, match='training already'): ai.train_sync(bars, epochs=1)
        assert await asyncio.gather(*(ai.predict(d.bars, S, d.now) for _ in range(4))) == [d.said] * 4
        assert ai.predict_sync(d.bars, S, d.now) == d.said           # the synchronous twin inside a running loop
        task.cancel()
        with pytest.raises(asyncio.CancelledError): await task
        assert await ai.predict(d.bars, S, d.now) == d.said
        await asyncio.to_thread(is_idle, ai)
    asyncio.run(day())
    assert ai.live() is live
    assert 0 < finished_epochs(root) < 999
    shutil.rmtree(root/'training')

@pytest.mark.parametrize('fresh', [True, False])
def test_training_cancelled_at_its_end(busy, short_history, monkeypatch, fresh):
    "While the test span is judged, whether another fit follows or not: who cancelled does not get another model"
    (ai, root), bars = busy, short_history
    monkeypatch.setattr(ai, 'config', replace(ai.config, fresh=fresh))
    live = ai.live()
    judging, cancelled, judge = threading.Event(), threading.Event(), training.judge
    def held_up(*args, **options):
        judging.set()
        comes(cancelled)
        return judge(*args, **options)
    monkeypatch.setattr(training, 'judge', held_up)
    async def day():
        task = asyncio.create_task(ai.train_from_historical_data(bars, epochs=1))
        await asyncio.to_thread(comes, judging)
        task.cancel()
        with pytest.raises(asyncio.CancelledError): await task
        cancelled.set()
        await asyncio.to_thread(is_idle, ai)
    try:
        asyncio.run(day())
        assert finished_epochs(root) == 1
        assert ai.live() is live, 'a cancelled training put its model in place'
    finally:
        cancelled.set()
        ai.snapshot = live
        shutil.rmtree(root/'training')

@pytest.fixture
def trained(monkeypatch):
    "Models that were trained during the test"
    models, train_and_judge = [], integration.train_and_judge
    def watched(*args, **options):
        found = train_and_judge(*args, **options)
        models.append(Snapshot(found.model, found.terms))
        return found
    monkeypatch.setattr(integration, 'train_and_judge', watched)
    return models

def test_everything_at_once(simulated, busy, short_history, trained, tmp_path):
    "One thread trains, one saves, one loads, two predict: every prediction is that of a known model, to the last bit"
    (ai, _), d = busy, simulated
    other = tmp_path/'other'
    variant = variant_of(d)
    variant.save_state(other)
    def predicted(ai): return json.dumps(ai.predict_sync(d.bars, S, d.now))
    known = {json.dumps(d.said), predicted(variant)}
    assert len(known) == 2
    stop, predicted_enough, saved_enough = threading.Event(), threading.Event(), threading.Event()
    said, saved = [], []
    def predict():
        while not stop.wait(.1):                          # leaves the others some time
            said.append(predicted(ai))
            ai.get_trading_signal(S, 0., d.now)
            ai.target_weights(d.now)
            if known <= set(said) and len(said) > 10: predicted_enough.set()
    def save():
        while not stop.wait(.1):
            saved.append(ai.save_state(tmp_path/'saved'))
            if len(saved) > 3: saved_enough.set()
    def load():
        while True:
            for state_dir in (other, d.root):
                if stop.wait(.1): return
                ai.load_state(state_dir)
    with ThreadPoolExecutor(5) as pool:
        running = [pool.submit(f) for f in (predict, predict, save, load)]
        try:
            history = pool.submit(ai.train_sync, short_history, None, 1).result(timeout=LONG)
            comes(predicted_enough)
            comes(saved_enough)
        finally: stop.set()
        for r in running: r.result()
    ai.snapshot = trained[0]
    assert known <= set(said) <= known | {predicted(ai)}
    assert [e['epoch'] for e in history['epochs']] == [1]
    assert loaded(tmp_path/'saved').live().terms.symbols in ([S], [S, OTHER])

# ---- suite 15: import

IMPORT = textwrap.dedent('''
    import socket, time
    class Blocked(socket.socket):
        def __init__(self, *a, **k): raise AssertionError('a socket at import')
    def never(*a, **k): raise AssertionError('a connection at import')
    socket.socket, socket.create_connection, socket.getaddrinfo = Blocked, never, never
    import torch
    t = time.process_time()
    import cryptoml.integration
    print(time.process_time() - t)
''')

def import_time():
    "CPU seconds beyond torch, in a new process"
    r = subprocess.run([sys.executable, '-c', IMPORT], capture_output=True, text=True, timeout=LONG)
    assert r.returncode == 0, r.stderr
    return float(r.stdout)

def test_import_is_quick_and_offline():
    "The best of five: a busy machine makes some of them slow"
    took = []
    while len(took) < 5 and min(took, default=np.inf) >= 1: took.append(import_time())
    assert min(took) < 1, f'{min(took):.2f} s of CPU beyond torch'
