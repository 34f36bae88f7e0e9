"A bot's day gone wrong: dirty bars, clocks, kills, damage, malice, many threads and processes (suites 4, 5, 6, 7, 8, 10, 11, 14, 15)"
import asyncio, contextlib, hashlib, json, os, pickle, random, resource, shutil, signal, subprocess, sys, textwrap, threading, time, warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest, torch

from conftest import ended, forked
from cryptoml import state
from cryptoml.data import DataError, market_frame
from cryptoml.forecaster import needed_history, save_forecaster
from cryptoml.integration import Config, UltimateTradingAI
from cryptoml.policy import Policy
from cryptoml.simulate import simulate
from cryptoml.state import StateError, generations, read_json, read_lines, write_json

unix = pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks and signals of Unix')
H, PRICES, S, OTHER = pd.Timedelta('1h'), ['open', 'high', 'low', 'close'], 'BTC/USDT', 'ETH/USDT'
BARS = [*PRICES, 'volume']
CONFIG = dict(size='small', horizons=[12, 24], seed=1)

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

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
    def mine(self) -> np.ndarray: return np.flatnonzero(self.bars['symbol'] == S)   # rows of S, oldest first

    def act(self, data, now=None, symbol=S):
        "What a bot's loop does: predict, then ask for a signal with the lowest confidence there is; the error instead of a prediction"
        now = self.now if now is None else now
        try: p = self.ai.predict_sync(data, symbol, now)
        except DataError as e: p = e
        return p, self.ai.get_trading_signal(symbol, 0., now)

def make_desk(root, bars, end):
    ai = UltimateTradingAI(CONFIG | dict(state_dir=str(root)), device='cpu')
    ai.train_sync(bars[bars['time'] < end], [S, OTHER], epochs=1)
    ai.save_state()
    for now in pd.date_range(end + 12 * H, bars['time'].max() - 6 * H, freq='h'):       # a close at which there is something to do
        held = bars[(bars['time'] < now) & (bars['time'] >= now - (needed_history(ai.live().forecaster, H) + 230) * H)].reset_index(drop=True)
        ai.predict_sync(held, None, now)
        if all((ai.get_trading_signal(s, 0., now) or {}).get('action') in ('BUY', 'SELL') for s in (S, OTHER)): break
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
    bars = pd.read_parquet(Path(os.environ['CRYPTOML_DATA'])/'spot_1h.parquet', filters=[('symbol', 'in', ['BTCUSDT', 'ETHUSDT']), ('timestamp', '>=', pd.Timestamp('2024-02-01', tz='UTC')), ('timestamp', '<', pd.Timestamp('2024-06-20', tz='UTC'))])
    bars = market_frame(bars)
    return make_desk(tmp_path_factory.mktemp('real'), bars, pd.Timestamp('2024-06-12', tz='UTC'))

@pytest.fixture(params=['simulated', 'real'])
def desk(request): return request.getfixturevalue(request.param)

def same(desk, data, now=None):
    p, s = desk.act(data, now)
    assert p == desk.said and s['action'] in ('BUY', 'SELL')

def holds(desk, data, word, now=None):
    "No action, and the reason in words, one of those between bars"
    p, s = desk.act(data, now)
    if isinstance(p, Exception): same(desk, desk.bars); p, s = desk.act(data, now)       # what was said before must not be acted on
    assert s['action'] == 'HOLD' and s['position_size'] == s['confidence'] == 0 and s['target'] is s['stop_loss'] is s['take_profit'] is None, s
    assert any(w in r for r in s['reasoning'] for w in word.split('|')), s['reasoning']
    if isinstance(p, Exception): assert word in str(p)
    w = desk.ai.target_weights(desk.now if now is None else now)
    assert w[S] is None

def told(desk, data, word, now=None):
    "No action, or one that says in words what was left out of its window; never one as if nothing were wrong"
    p, s = desk.act(data, now)
    assert any(word in r for r in s['reasoning']), (s['action'], s['reasoning'])

def changed(desk, column, value, back=1):
    "The bars with other values in one row of S"
    b = desk.bars.astype({c: float for c in desk.bars.columns if c not in ('time', 'symbol')})
    b.loc[desk.mine[-back], column] = value
    return b

# ---- suite 7: the newest bars are dirty

@pytest.mark.parametrize('column', BARS)
@pytest.mark.parametrize('value, word', [(np.nan, 'NaN in'), (np.inf, 'infinite in'), (-np.inf, 'infinite in'), (-1., 'negative')])
def test_impossible_number(desk, column, value, word): holds(desk, changed(desk, column, value), word)

@pytest.mark.parametrize('column', PRICES)
def test_zero_price(desk, column): holds(desk, changed(desk, column, 0.), f'zero or negative price in {column}')

def test_all_zero_or_missing(desk):
    holds(desk, changed(desk, BARS, 0.), 'zero or negative price')
    holds(desk, changed(desk, BARS, np.nan), 'NaN in')

def test_high_below_low(desk):
    b = desk.bars.iloc[desk.mine[-1]]
    holds(desk, changed(desk, ['high', 'low'], [b.low, b.high]), 'high below low')
    holds(desk, changed(desk, 'close', b.high * 1.01), 'outside low to high')
    holds(desk, changed(desk, 'open', b.low * .99), 'outside low to high')

@pytest.mark.parametrize('column', ['quote_volume', 'trades', 'taker_buy_volume'])
def test_optional_columns(simulated, column):
    "They may be missing, but not in silence where the model uses them"
    for value, word in ((np.inf, 'infinite'), (-1., 'negative')): holds(simulated, changed(simulated, column, value), f'{word} in {column}')
    p, s = simulated.act(changed(simulated, column, np.nan))
    assert p == simulated.said or any('missing' in r for r in s['reasoning']), s['reasoning']

def test_bars_without_the_columns_of_the_training(simulated):
    "Trained on an archive with taker volumes, fed with fetch_ohlcv: the model lacks inputs that it always had"
    told(simulated, simulated.bars[['time', 'symbol', *BARS]], 'missing')

@pytest.mark.parametrize('n', [1, 3, 12])
def test_newest_bars_missing(desk, n):
    "Of one coin or of all: the bar that closed now is not there"
    mine = desk.mine
    for data in (desk.bars.drop(mine[-n:]), desk.bars[desk.bars['time'] < desk.now - n * H]):
        p, s = desk.act(data)
        assert s['action'] == 'HOLD' and any('stale' in r or 'missing' in r for r in s['reasoning']), (s['action'], s['data_time'], str(desk.now))

@pytest.mark.parametrize('n', [1, 3, 12])
@pytest.mark.parametrize('back', [1, 5])
def test_gap_before_the_newest(desk, n, back):
    mine = desk.mine
    told(desk, desk.bars.drop(mine[-n - back:-back]), f'{n} of the last')

def test_gap_of_the_other_coin(desk):
    other = np.flatnonzero(desk.bars['symbol'] == OTHER)
    for n in (1, 2): told(desk, desk.bars.drop(other[-n - 1:-1]), f'{OTHER} lacks {n} of the last')          # coins look at one another: what is missing of one is said of the others
    for n in (1, 3, 12): told(desk, desk.bars.drop(other[-n:]), f'{OTHER} cannot be read at this bar')
    told(desk, desk.bars.drop(other[-13:-1]), f'{OTHER} cannot be read at this bar')                         # too little of its window is left

def test_exact_duplicates(desk):
    mine = desk.mine
    same(desk, pd.concat([desk.bars, desk.bars.iloc[mine[-1:]]]))
    same(desk, pd.concat([desk.bars, desk.bars.iloc[mine[-5:]], desk.bars.iloc[mine[-5:]]], ignore_index=True))
    same(desk, pd.concat([desk.bars, desk.bars], ignore_index=True))                     # two pages of a paged download overlap

def test_conflicting_duplicates(desk):
    mine = desk.mine
    again = lambda back: pd.concat([desk.bars, desk.bars.iloc[mine[-back:][:1]].assign(close=lambda d: d['close'] * 1.0001, high=lambda d: d['high'] * 1.001)], ignore_index=True)
    holds(desk, again(1), 'conflicting duplicate')
    told(desk, again(2), '1 of the last')

def test_out_of_order(desk):
    same(desk, desk.bars.iloc[::-1]); same(desk, desk.bars.sample(frac=1, random_state=0)); same(desk, desk.bars.sort_values('time', kind='stable'))
    mine = desk.mine
    order = np.arange(len(desk.bars)); order[mine[-2:]] = mine[-2:][::-1]
    same(desk, desk.bars.iloc[order])

@pytest.mark.parametrize('late', ['5s', '59min'])
def test_unclosed_last_bar(desk, late):
    "What every exchange sends last: the bar in progress. The one before is scored, to the last bit as without it"
    now = desk.now + pd.Timedelta(late)
    for coming in (desk.coming[desk.coming['time'] == desk.now], desk.coming[(desk.coming['time'] == desk.now) & (desk.coming['symbol'] == S)]):
        p, s = desk.act(pd.concat([desk.bars, coming], ignore_index=True), now)
        assert json.dumps(p) == json.dumps(desk.said)
        wild = coming.assign(close=coming['close'] * 50, high=coming['high'] * 60, volume=np.nan)
        assert json.dumps(desk.act(pd.concat([desk.bars, wild], ignore_index=True), now)[0]) == json.dumps(desk.said)

@pytest.mark.parametrize('factor', [100., .01])
def test_spike(desk, factor):
    b = desk.bars.iloc[desk.mine[-1]]
    holds(desk, changed(desk, PRICES, [b[c] * factor for c in PRICES]), 'spike')
    if factor > 1: holds(desk, changed(desk, 'high', b.high * factor), 'spike')           # one wrong trade
    else: holds(desk, changed(desk, 'low', b.low * factor), 'spike')
    b = desk.bars.iloc[desk.mine[-3]]
    told(desk, changed(desk, PRICES, [b[c] * factor for c in PRICES], back=3), '1 of the last')
    for n in (2, 3, 5):                                                                   # cents in place of dollars from one bar on
        d = desk.bars.copy(); d.loc[desk.mine[-n:], PRICES] *= factor
        p, s = desk.act(d); assert s['action'] == 'HOLD', n

@pytest.mark.parametrize('n', [5, 6, 12, 30])
def test_frozen_feed(desk, n):
    d = desk.bars.copy(); d.loc[desk.mine[-n:], BARS] = d.loc[desk.mine[-n], BARS].to_numpy(float)
    holds(desk, d, 'frozen')

@pytest.mark.parametrize('n', [1, 3, 4, 12])
def test_outage_filled_with_flat_bars(desk, n):
    "What freqtrade makes of a gap before the strategy sees it: the last close, without volume"
    d = desk.bars.copy(); d.loc[desk.mine[-n:], PRICES] = d.loc[desk.mine[-n - 1], 'close']
    d.loc[desk.mine[-n:], [c for c in d.columns if c not in ('time', 'symbol', *PRICES)]] = 0
    p, s = desk.act(d)
    assert s['action'] == 'HOLD' and any('frozen' in r or 'zero volume' in r for r in s['reasoning']), (s['action'], s['reasoning'])

def candles(desk): return [[int(r.time.timestamp() * 1000), r.open, r.high, r.low, r.close, r.volume] for r in desk.bars.iloc[desk.mine].itertuples()]

def test_candles_of_an_exchange(real):
    "ccxt lists of one coin, as strings too: the same numbers as from the same rows of a frame"
    rows = candles(real)
    alone = real.ai.predict_sync(real.bars[real.bars['symbol'] == S], S, real.now)
    for data in (rows, [[str(x) for x in r] for r in rows], np.array(rows), {S: rows}, {'BTCUSDT': pd.DataFrame(rows, columns=['timestamp', *BARS])}): assert real.act(data)[0] == alone

@pytest.mark.parametrize('rows, word', [(lambda c: [], 'empty'), (lambda c: [[]], 'no column'), (lambda c: None, 'NoneType'), (lambda c: {}, 'empty'), (lambda c: 'error', 'no such file'), (lambda c: 429, 'int'),
    (lambda c: {'code': -1003, 'msg': 'Too much request weight'}, 'int'), (lambda c: c + [[None] * 6], 'missing'), (lambda c: [[None] * 6] * 1900, 'missing'), (lambda c: c + [[0, None, None, None, None, None]], 'no epoch time'),
    (lambda c: [[0] + [None] * 5] * 1900, 'no epoch time'), (lambda c: c[:-1] + [[c[-1][0]] + [None] * 5], 'NaN in'), (lambda c: c[:-1] + [[c[-1][0], 'a', 'b', 'c', 'd', 'e']], 'no numbers'), (lambda c: [r[:5] for r in c], 'no column'),
    (lambda c: pd.DataFrame(c, columns=['time', 'open', 'high', 'low', 'last', 'volume']), 'no column for close'), (lambda c: c[-300:], 'bars of history'), (lambda c: c[-1:], 'bars of history'), (lambda c: c[::4], 'timeframe')])
def test_malformed_rows(desk, rows, word): holds(desk, rows(candles(desk)), word)

def test_one_coin_dead(desk):
    "Its signals hold; those of a coin that was compared with it hold too and say so; one that only looks at it goes on without it and says so"
    mine = desk.bars['symbol'] == S
    dead = desk.bars[~mine | (desk.bars['time'] < desk.now - 26 * H)]
    holds(desk, dead, 'stale|missing')
    both = desk.ai.predict_sync(dead, None, desk.now)
    assert 'crossexchange inputs are missing' in both[OTHER]['faults'][0] and 'other coins' in both[OTHER]['faults'][0]
    assert desk.ai.get_trading_signal(OTHER, 0., desk.now)['action'] == desk.ai.get_trading_signal(S, 0., desk.now)['action'] == 'HOLD'
    assert desk.ai.target_weights(desk.now) == {S: None, OTHER: None}
    told(desk, desk.bars[mine | (desk.bars['time'] < desk.now - 26 * H)], f'{OTHER} cannot be read at this bar')   # Bitcoin is compared with nothing here
    holds(desk, desk.bars[~mine], f'no bar of {S}')
    for bad in (changed(desk, 'close', np.nan), changed(desk, PRICES, 0.)): assert 'crossexchange' in desk.ai.predict_sync(bad, None, desk.now)[OTHER]['faults'][0]

def test_bars_of_one_coin_alone(desk):
    "Allowed; what then lacks of the other coins is said, or changes nothing"
    p, s = desk.act(desk.bars[desk.bars['symbol'] == S])
    assert p == desk.said or any(OTHER in r or 'other coin' in r for r in s['reasoning']), 'the forecast changed in silence'

def test_prices_that_never_move(simulated):
    "A pegged pair whose volume lives: no volatility, no position, no crash"
    d = simulated.bars.copy(); d.loc[simulated.mine, PRICES] = 1.
    d.loc[simulated.mine, 'volume'] = np.arange(len(simulated.mine)) + 1.
    p, s = simulated.act(d)
    assert s['action'] == 'HOLD'

def test_a_failed_call_ends_the_last_signal(desk):
    for symbol in ('BTCUSDT', 'btc/usdt', S):
        same(desk, desk.bars)
        with pytest.raises(DataError): desk.ai.predict_sync([], symbol, desk.now)
        s = desk.ai.get_trading_signal(S, 0., desk.now)
        assert s['action'] == 'HOLD' and 'failed' in s['reasoning'][0]
    desk.ai.predict_sync(desk.bars, None, desk.now)
    with pytest.raises(DataError): desk.ai.predict_sync([], None, desk.now)
    assert [desk.ai.get_trading_signal(s, 0., desk.now)['action'] for s in (S, OTHER)] == ['HOLD', 'HOLD'] and set(desk.ai.target_weights(desk.now).values()) == {None}
    for bad in ('PEPE/USDT', 'BTC', '', 5, 'BTC/USD'):
        with pytest.raises(DataError, match='symbol|coin'): desk.ai.predict_sync(desk.bars, bad, desk.now)

def test_the_bars_are_left_alone(desk):
    before = desk.bars.copy(deep=True)
    desk.ai.predict_sync(desk.bars, None, desk.now)
    pd.testing.assert_frame_equal(desk.bars, before)

# ---- suite 8: clocks and zones

us = lambda t: (t - pd.Timestamp(0, tz='UTC')) // pd.Timedelta('1us')
FORMS = dict(naive=lambda t: t.dt.tz_localize(None), berlin=lambda t: t.dt.tz_convert('Europe/Berlin'), sydney=lambda t: t.dt.tz_convert('Australia/Sydney'), kolkata=lambda t: t.dt.tz_convert('Asia/Kolkata'),
    seconds=lambda t: us(t) // 10**6, milliseconds=lambda t: us(t) // 1000, microseconds=us, nanoseconds=lambda t: us(t) * 1000, float_seconds=lambda t: us(t) / 1e6, text_milliseconds=lambda t: (us(t) // 1000).astype(str),
    text=lambda t: t.astype(str), iso_z=lambda t: t.dt.strftime('%Y-%m-%dT%H:%M:%SZ'), iso_naive=lambda t: t.dt.strftime('%Y-%m-%dT%H:%M:%S'), iso_berlin=lambda t: pd.Series([x.isoformat() for x in t.dt.tz_convert('Europe/Berlin')], t.index),
    objects=lambda t: pd.Series([x.to_pydatetime() for x in t], t.index, dtype=object), ms_dtype=lambda t: t.astype('datetime64[ms, UTC]'), ns_dtype=lambda t: t.astype('datetime64[ns, UTC]'))

@pytest.mark.parametrize('form', FORMS)
def test_the_same_in_any_form_of_time(desk, form):
    "With days on which clocks change: Europe's fell back an hour before the newest simulated bars, Sydney's went forward within their history"
    t = FORMS[form](desk.bars['time'])
    same(desk, desk.bars.assign(time=t))
    one = desk.bars.drop(columns='time').assign(timestamp=t)
    index = pd.api.types.is_datetime64_any_dtype(t)
    same(desk, {s: g.drop(columns=['symbol', 'timestamp']).set_index(pd.DatetimeIndex(g['timestamp'])) if index else g.drop(columns='symbol') for s, g in one.groupby('symbol')})

@pytest.mark.parametrize('form', [lambda n: n.tz_convert('Asia/Tokyo'), lambda n: n.tz_localize(None), lambda n: n.to_pydatetime(), str, lambda n: n.isoformat(), lambda n: n.timestamp(), lambda n: int(n.timestamp() * 1000), lambda n: n.tz_convert('Europe/Berlin').isoformat()])
def test_the_same_by_any_clock(desk, form): same(desk, desk.bars, form(desk.now))

@pytest.mark.parametrize('zone, word', [('America/New_York', 'stale|missing'), ('Asia/Tokyo', 'future bar'), ('Europe/Moscow', 'future bar'), ('Asia/Kolkata', 'off the 1h grid')])
def test_local_times_without_a_zone(simulated, zone, word):
    "They are read as UTC, and so are seen to be hours old, ahead, or off the grid"
    holds(simulated, simulated.bars.assign(time=simulated.bars['time'].dt.tz_convert(zone).dt.tz_localize(None)), word)

def test_london_time_after_the_clocks_went_back(simulated):
    "Right again on the newest bars, with one hour twice before them: that hour is not used, and that is said"
    local = simulated.bars['time'].dt.tz_convert('Europe/London').dt.tz_localize(None)
    told(simulated, simulated.bars.assign(time=local), 'of the last')

def test_units_are_mixed(desk):
    t = us(desk.bars['time']) // 1000
    t.iloc[desk.mine[-1]] //= 1000
    holds(desk, desk.bars.assign(time=t), 'units are mixed')
    holds(desk, desk.bars.assign(time=desk.bars['time'].dt.strftime('%d/%m/%Y %H:%M')), 'cannot be read')

@pytest.mark.parametrize('late', ['1s', '59s', '29min'])
def test_clock_a_little_ahead(desk, late): same(desk, desk.bars, desk.now + pd.Timedelta(late))

@pytest.mark.parametrize('late', ['91min', '2h', '5h', '3D', '370D'])
def test_clock_far_ahead_of_the_data(desk, late): holds(desk, desk.bars, 'stale|missing', desk.now + pd.Timedelta(late))

def test_signal_asked_long_after_the_prediction(desk):
    same(desk, desk.bars)
    at = lambda late: desk.ai.get_trading_signal(S, 0., desk.now + pd.Timedelta(late))
    assert at('59min')['action'] != 'HOLD' and 'stale' in at('3h')['reasoning'][0] and 'clock' in at('-3h')['reasoning'][0]
    assert desk.ai.target_weights(desk.now + 3 * H)[S] is None
    assert desk.ai.get_trading_signal(S, 0.)['action'] == 'HOLD'                            # the wall clock is years on

@pytest.mark.parametrize('early', ['5s', '10min', '60min'])
def test_clock_behind(desk, early):
    "The newest bar is not closed by this clock: the one before is scored, as if it were not there"
    now = desk.now - pd.Timedelta(early)
    before = desk.ai.predict_sync(desk.bars[desk.bars['time'] < desk.now - H], S, now)
    assert before['data_time'] == (desk.now - H).isoformat()
    assert json.dumps(desk.act(desk.bars, now)[0]) == json.dumps(before)

@pytest.mark.parametrize('early', ['2h', '5h', '3D'])
def test_clock_hours_behind(desk, early): holds(desk, desk.bars, 'future bar', desk.now - pd.Timedelta(early) - pd.Timedelta('2min'))

@pytest.mark.parametrize('late', ['61s', '10min', '59min', '1h', '3D', '400D'])
def test_future_bar(desk, late):
    wrong = desk.bars.iloc[desk.mine[-1:]].assign(time=desk.now + pd.Timedelta(late))
    holds(desk, pd.concat([desk.bars, wrong], ignore_index=True), 'future bar')
    p, s = desk.act(pd.concat([desk.bars, wrong.assign(symbol=OTHER)], ignore_index=True))   # of the other coin
    assert p == desk.said or s['action'] == 'HOLD'

@pytest.mark.parametrize('off', ['1ms', '7min', '30min'])
def test_off_the_grid(desk, off):
    t = desk.bars['time'].copy(); t.iloc[desk.mine[-1]] += pd.Timedelta(off)
    for now in (desk.now, desk.now + pd.Timedelta(off)):
        p, s = desk.act(desk.bars.assign(time=t), now)
        assert s['action'] == 'HOLD' and any('off the grid' in r or 'missing' in r or 'stale' in r for r in s['reasoning']), (str(now), s['action'])
    holds(desk, desk.bars.assign(time=desk.bars['time'] + pd.Timedelta(off)), 'off the 1h grid', desk.now + pd.Timedelta(off))

def test_bars_that_training_saw(desk):
    ai = desk.ai
    seen = pd.Timestamp(ai.live().terms.trained_until) - 5 * H
    assert seen in set(desk.bars['time'])
    old = desk.bars.assign(time=desk.bars['time'] - (desk.now - seen))                       # as if it were then
    holds(desk, old, 'in sample', seen)

# ---- the same dict: asked twice, saved and loaded, in another process (suite 11)

other_process = textwrap.dedent('''
    import json, pickle, sys
    import pandas as pd
    from cryptoml.integration import UltimateTradingAI
    out = []
    for root, bars, now, pickled in json.loads(sys.argv[1]):
        ai = UltimateTradingAI(dict(state_dir=root), device='cpu'); ai.load_state()
        out.append(ai.predict_sync(pd.read_parquet(bars), None, now))
        with open(pickled, 'rb') as f: ai = pickle.load(f)
        said = ai.get_trading_signal('BTC/USDT', 0., now)                  # what was predicted before it was pickled
        assert ai.predict_sync(pd.read_parquet(bars), None, now) == out[-1] and ai.get_trading_signal('BTC/USDT', 0., now) == said
        out.append(said)
    print(json.dumps(out))
''')

@pytest.mark.parametrize('threads', [1, 2])
def test_twice_saved_and_in_another_process(simulated, request, tmp_path, threads):
    desks = [simulated] + ([request.getfixturevalue('real')] if 'CRYPTOML_DATA' in os.environ else [])
    asked, expected = [], []
    torch.set_num_threads(threads)
    try:
        for i, d in enumerate(desks):
            p = json.dumps(d.ai.predict_sync(d.bars, None, d.now))
            assert json.dumps(d.ai.predict_sync(d.bars, None, d.now)) == p
            d.ai.save_state(tmp_path/str(i))
            other = UltimateTradingAI(dict(state_dir=str(tmp_path/str(i))), device='cpu'); other.load_state()
            assert json.dumps(other.predict_sync(d.bars, None, d.now)) == p
            with contextlib.suppress(ImportError):
                import cloudpickle
                assert json.dumps(pickle.loads(cloudpickle.dumps(other)).predict_sync(d.bars, None, d.now)) == p
            d.bars.to_parquet(tmp_path/f'{i}.parquet'); (tmp_path/f'{i}.pickle').write_bytes(pickle.dumps(other))
            asked.append([str(tmp_path/str(i)), str(tmp_path/f'{i}.parquet'), str(d.now), str(tmp_path/f'{i}.pickle')])
            expected += [json.loads(p), other.get_trading_signal(S, 0., d.now)]
        r = subprocess.run([sys.executable, '-c', other_process, json.dumps(asked)], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS=str(threads)), timeout=300)
        assert r.returncode == 0, r.stderr
        assert r.stdout.strip() == json.dumps(expected)
    finally: torch.set_num_threads(1)

def test_a_prediction_is_plain(desk):
    assert json.loads(json.dumps(desk.said, allow_nan=False)) == desk.said
    said = json.dumps(desk.said)
    assert str(desk.root) not in said and 'gen-' not in said and str(time.localtime().tm_year) + '-' not in said

# ---- suite 4: kills while saving

def marked(desk, root, mark):
    "A loaded model whose terms, weights and scale all tell the mark"
    ai = UltimateTradingAI(dict(state_dir=str(root)), device='cpu'); ai.load_state(desk.root)
    mark_it(ai, mark)
    return ai

def mark_it(ai, mark):
    s = ai.live()
    with torch.no_grad(): next(iter(s.forecaster.network.parameters())).view(-1)[0] = mark
    s.forecaster.scaler.center[0] = mark
    ai.snapshot = replace(s, terms=replace(s.terms, data=dict(mark=mark)))

def mark_of(ai):
    s = ai.live()
    found = {next(iter(s.forecaster.network.parameters())).view(-1)[0].item(), float(s.forecaster.scaler.center[0]), float(s.terms.data['mark'])}
    assert len(found) == 1, f'a mix of generations: {found}'
    return found.pop()

@unix
def test_killed_while_saving(simulated, tmp_path):
    saver, reader = marked(simulated, tmp_path, 0), UltimateTradingAI(dict(state_dir=str(tmp_path)), device='cpu')
    saver.save_state()
    def timed(): t = time.perf_counter(); saver.save_state(); os.write(w, np.float64(time.perf_counter() - t).tobytes())
    rng, old, found, took = random.Random(0), 0, [], []
    for _ in range(5):
        r, w = os.pipe(); assert ended(forked(timed)) == 0; took.append(np.frombuffer(os.read(r, 8))[0]); os.close(r); os.close(w)
    for i in range(1, 51):
        mark_it(saver, i)
        r, w = os.pipe()
        def child(): os.write(w, b'x'); saver.save_state(); time.sleep(60)
        pid = forked(child)
        os.read(r, 1); time.sleep(rng.uniform(0, 1.3 * np.median(took)))
        os.kill(pid, signal.SIGKILL); assert ended(pid) == -signal.SIGKILL
        os.close(r); os.close(w)
        with warnings.catch_warnings():
            warnings.simplefilter('error')                                 # whole, and without falling back
            reader.load_state()
        found.append(mark_of(reader)); assert found[-1] in (old, i)
        if i % 5 == 0: saver.save_state(); reader.load_state(); assert mark_of(reader) == i   # the next save works
        old = mark_of(reader)
    new = sum(m == i for i, m in enumerate(found, 1))
    assert 3 <= new <= 47, f'{new} of 50 kills came after the save: they do not test it'
    saver.save_state()
    assert len(generations(tmp_path)) <= 3 and not list(tmp_path.glob('.*'))

@unix
def test_disk_full_while_saving(simulated, tmp_path):
    ai = marked(simulated, tmp_path, 1); ai.save_state(); mark_it(ai, 2)
    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try: ai.save_state()
        except StateError as e: return 0 if 'unchanged' in str(e) else 2
        return 3
    assert ended(forked(full)) == 0
    ai.load_state(); assert mark_of(ai) == 1

# ---- suites 5 and 6: damaged and malicious states

def refused(live, root, match=None):
    "load_state says clearly no, and the object keeps the model it had, which still predicts"
    before = live.live()
    with pytest.raises(StateError, match=match): live.load_state(root)
    assert live.live() is before

def two_generations(desk, root):
    ai = marked(desk, root, 1); ai.save_state(); mark_it(ai, 2); ai.save_state()
    return ai

@pytest.mark.parametrize('name', ['manifest.json', 'network.safetensors', 'scaler.safetensors'])
@pytest.mark.parametrize('damage', ['missing', 'empty', 'truncated', 'one bit'])
def test_damaged_state(simulated, tmp_path, name, damage):
    two_generations(simulated, tmp_path)
    live = UltimateTradingAI(dict(state_dir=str(tmp_path)), device='cpu'); live.load_state(); kept = live.live()
    for gen, falls_back in (('gen-000002', True), ('gen-000001', False)):
        path = tmp_path/gen/name
        data = bytearray(path.read_bytes())
        if damage == 'one bit': at = len(data) // 2; data[at] ^= 4
        if damage == 'missing': path.unlink()
        else: path.write_bytes(data if damage == 'one bit' else b'' if damage == 'empty' else data[:len(data) // 3])
        if falls_back:
            with pytest.warns(UserWarning, match='gen-000001 was loaded instead'): live.load_state()
            assert mark_of(live) == 1; live.snapshot = kept
        else: refused(live, tmp_path, 'no whole generation')
    assert mark_of(live) == 2

def test_nothing_there(simulated, tmp_path):
    live = marked(simulated, tmp_path, 1)
    (tmp_path/'empty').mkdir(); (tmp_path/'file').write_text('x')
    for root in ('absent', 'empty', 'file'): refused(live, tmp_path/root, 'nothing was saved')
    new = UltimateTradingAI(dict(state_dir=str(tmp_path/'absent')), device='cpu')
    with pytest.raises(StateError): new.load_state()
    for call in (new.save_state, new.target_weights, lambda: new.predict_sync(simulated.bars, S, simulated.now)):
        with pytest.raises(StateError, match='no model yet'): call()
    assert new.get_trading_signal(S) is None and not (tmp_path/'absent').exists()

def test_another_kind_and_older_layouts(simulated, tmp_path):
    live, tensors = marked(simulated, tmp_path, 1), dict(x=dict(w=torch.zeros(2)))
    state.save(tmp_path/'other', tensors, dict(kind='portfolio')); refused(live, tmp_path/'other', 'portfolio')
    state.save(tmp_path/'none', tensors, {}); refused(live, tmp_path/'none', 'forecaster')
    state.save(tmp_path/'list', tensors, []); refused(live, tmp_path/'list', 'forecaster')
    save_forecaster(live.live().forecaster, tmp_path/'before terms'); refused(live, tmp_path/'before terms', 'train it again')
    live.save_state(tmp_path/'schema'); m = tmp_path/'schema'/'gen-000001'/'manifest.json'
    for schema in (0, state.SCHEMA + 1): c = read_json(m) | dict(schema=schema); write_json(m, c | dict(sha256=state._digest(c))); refused(live, tmp_path/'schema', f'schema {schema}')

def forge(desk, root, edit=lambda content: None, files={}):
    "The state of the desk, edited, with correct digests: what a stranger can hand out"
    shutil.rmtree(root, ignore_errors=True); shutil.copytree(desk.root/generations(desk.root)[-1].name, root/'gen-000001')
    m = read_json(root/'gen-000001'/'manifest.json'); edit(m['content'])
    for name, data in files.items():
        (root/'gen-000001'/name).write_bytes(data); m['files'][name] = dict(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    write_json(root/'gen-000001'/'manifest.json', m | dict(sha256=state._digest(m)))
    return root

def test_tampered_without_new_digests(simulated, tmp_path):
    "Terms that make the bot bold"
    live = two_generations(simulated, tmp_path)
    m = tmp_path/'gen-000002'/'manifest.json'
    c = read_json(m); c['content']['about']['terms'] |= dict(threshold=0., policy=asdict(Policy(max_weight=100., target_annual=1000.))); write_json(m, c)
    with pytest.warns(UserWarning, match='gen-000002: manifest.json does not fit its own digest'): live.load_state()
    assert mark_of(live) == 1
    shutil.rmtree(tmp_path/'gen-000001'); refused(live, tmp_path, 'digest')

terms = lambda **kw: lambda c: c['about']['terms'].update(kw)
policy = lambda **kw: lambda c: c['about']['terms']['policy'].update(kw)
FORGED = {str(kw): terms(**kw) for kw in (dict(symbols='BTC/USDT'), dict(symbols=None), dict(symbols=[1]), dict(symbols=[]), dict(timeframe='soon'), dict(timeframe=3), dict(trained_until='x'), dict(trained_until=None), dict(trained_until='2020-01-01'),
              dict(data_until='x'), dict(data_until=5), dict(threshold='low'), dict(threshold=[1]), dict(threshold=-5), dict(importance=None), dict(importance=[1]), dict(policy=None), dict(policy=[]), dict(sources=None))} | \
         {f'policy {kw}': policy(**kw) for kw in (dict(rate=5), dict(leverage=3), dict(max_weight='x'), dict(max_weight=-1), dict(target_annual=None), dict(bars_per_year=-1), dict(bars_per_year=0))} | \
         {k: (lambda c, k=k, e=e: e(c[k])) for k, e in dict(names=lambda x: x.pop(), groups=lambda x: x.update(technical=[0, 999])).items()} | \
         dict(no_groups=lambda c: c.update(groups={}), clip=lambda c: c.update(clip='x'), size=lambda c: c['config'].update(size='huge'), heads=lambda c: c['network'].update(n_heads=3), quantiles=lambda c: c['network'].update(quantiles=[.9, .7, .5, .3, .1]),
              no_names=lambda c: c.pop('names'), horizons=lambda c: c['network'].update(horizons='x'), network=lambda c: c.update(network=[]), about=lambda c: c.update(about=[]))

@pytest.mark.parametrize('name', FORGED)
def test_forged_manifest(simulated, tmp_path, name):
    "With correct digests: refused when it is loaded, not hours later in the bot's loop"
    refused(marked(simulated, tmp_path, 1), forge(simulated, tmp_path/'x', FORGED[name]))

@pytest.mark.parametrize('kw', [dict(max_weight=100.), dict(max_weight=100., target_annual=1000., max_gross=1e9), dict(target_annual=1e9)])
def test_forged_policy_stays_within_the_contract(simulated, tmp_path, kw):
    "Whatever a model file says, a target is a weight of -1 to 1"
    root, ai = forge(simulated, tmp_path/'x', policy(**kw)), UltimateTradingAI(device='cpu')
    try: ai.load_state(root)
    except StateError: return
    ai.predict_sync(simulated.bars, None, simulated.now)
    assert all(-1 <= ai.get_trading_signal(s, 0., simulated.now)['target'] <= 1 for s in (S, OTHER)) and all(abs(w) <= 1 for w in ai.target_weights(simulated.now).values())

class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return (Path.touch, (self.path,))

def test_files_that_are_no_tensors(simulated, tmp_path):
    live, evil = marked(simulated, tmp_path, 1), pickle.dumps(Evil(tmp_path/'executed'))
    torch.save(Evil(tmp_path/'executed'), tmp_path/'evil.pt')
    header = b'{"w":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4611686018427387904]}}'
    for data in (evil, (tmp_path/'evil.pt').read_bytes(), (2**62).to_bytes(8, 'little') + b'{}', len(header).to_bytes(8, 'little') + header, b''):
        for name in ('network.safetensors', 'scaler.safetensors'): refused(live, forge(simulated, tmp_path/'x', files={name: data}), name)
    assert not (tmp_path/'executed').exists()

def test_names_outside_the_folder(simulated, tmp_path):
    live = marked(simulated, tmp_path, 1)
    (tmp_path/'secret.safetensors').write_bytes(b'x')
    for name in ('../../secret.safetensors', str(tmp_path/'secret.safetensors'), '..\\secret.safetensors'):
        root = forge(simulated, tmp_path/'x')
        m = read_json(root/'gen-000001'/'manifest.json'); m['files'][name] = dict(size=1, sha256=hashlib.sha256(b'x').hexdigest())
        write_json(root/'gen-000001'/'manifest.json', m | dict(sha256=state._digest(m)))
        refused(live, root, 'no file of a generation')

@unix
@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='reads its size from /proc')
@pytest.mark.parametrize('key, value', [('d_model', 4096), ('lookback', 10**9), ('n_past', 10**7)])
def test_memory_is_bounded(simulated, tmp_path, key, value):
    "A network that is said to be huge beside small files"
    root = forge(simulated, tmp_path/'x', lambda c: c['network'].update({key: value}))
    def bounded():
        size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (400 << 20),) * 2)                     # a mistake must not take the machine's memory
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ai = UltimateTradingAI(device='cpu')
        try: ai.load_state(root)
        except StateError: pass
        return 0 if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start < 100_000 else 3   # kB
    assert ended(forked(bounded)) == 0

def test_a_state_for_another_config(simulated):
    for config, word in ((dict(horizons=[6]), 'horizons'), (dict(size='base'), 'size'), (dict(timeframe='4h'), 'timeframe'), (dict(round_trip=.01), 'round_trip')):
        ai = UltimateTradingAI(config | dict(state_dir=str(simulated.root)), device='cpu')
        with pytest.raises(StateError, match=f'does not fit this config.*{word}'): ai.load_state()
    ai = UltimateTradingAI(dict(size='small', horizons=(24, 12), timeframe='60m', state_dir=str(simulated.root)), device='cpu'); ai.load_state()

@pytest.mark.parametrize('bad', [dict(sise='small'), dict(size='huge'), dict(size=None), dict(horizons=[]), dict(horizons=24), dict(horizons=[0]), dict(horizons=['4']), dict(horizons=[4, 4]), dict(timeframe='soon'), dict(timeframe=5), dict(threads=0), dict(threads='2'), dict(threads=1.5),
    dict(seed='x'), dict(seed=None), dict(round_trip=-1), dict(round_trip='x'), dict(round_trip=float('nan')), dict(max_age=5), dict(max_age=dict(date='1h')), dict(max_age=dict(data='soon')), dict(max_age=dict(data='-1h')), dict(state_dir=None)], ids=str)
def test_config_is_checked_at_once(bad):
    "Not hours later in the bot's loop"
    with pytest.raises(ValueError, match=next(iter(bad))): UltimateTradingAI(bad, device='cpu')

# ---- suite 14: several at once

@unix
def test_two_processes_save_to_one_folder(simulated, tmp_path):
    a, b = marked(simulated, tmp_path, 1), marked(simulated, tmp_path, 2)
    def saver(ai):
        for _ in range(10): ai.save_state()
    pids = [forked(lambda ai=ai: saver(ai)) for ai in (a, b)]
    reader, seen = UltimateTradingAI(dict(state_dir=str(tmp_path)), device='cpu'), set()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for _ in range(20):
            with contextlib.suppress(StateError): reader.load_state(); seen.add(mark_of(reader))
    assert [ended(p) for p in pids] == [0, 0] and seen <= {1, 2}
    reader.load_state(); assert mark_of(reader) in (1, 2) and [g.name for g in generations(tmp_path)] == [f'gen-{i:06d}' for i in (18, 19, 20)]

def test_a_book_is_of_one_model(simulated, tmp_path):
    "Weights of coins predicted by the model before a load are not mixed with those of the model after it"
    d, ai = simulated, UltimateTradingAI(device='cpu'); ai.load_state(d.root)
    ai.predict_sync(d.bars, None, d.now); old = ai.target_weights(d.now)
    net = ai.live().forecaster.network
    with torch.no_grad(): [p.mul_(.7) for p in net.parameters()]
    ai.save_state(tmp_path)
    ai.predict_sync(d.bars, None, d.now); new = ai.target_weights(d.now); assert new[S] != old[S] and new[OTHER] != old[OTHER]
    ai.load_state(d.root); ai.predict_sync(d.bars, None, d.now); assert ai.target_weights(d.now) == old
    ai.load_state(tmp_path); ai.predict_sync(d.bars, S, d.now)
    mixed = ai.target_weights(d.now)
    assert mixed[OTHER] in (None, new[OTHER]), 'one book from two models'

def short_history():
    bars = simulate(n_symbols=1, n_bars=2500, seed=5).bars
    return bars[bars['time'] < bars['time'].max() - pd.Timedelta('3D')]

def finished_epochs(root): return sum(len(read_lines(p)) for p in Path(root).glob('training/*/history.jsonl'))

@pytest.fixture(scope='module')
def busy(simulated, tmp_path_factory):
    "An object with a model, and the folder of its state"
    root = tmp_path_factory.mktemp('busy')
    ai = UltimateTradingAI(dict(size='small', horizons=[12, 24], seed=2, state_dir=str(root)), device='cpu'); ai.load_state(simulated.root)
    return ai, root

def until(true, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, 'waited too long'
        time.sleep(.02)

def idle(ai):
    "Whether a training would be allowed"
    try: ai.train_sync([], epochs=1)
    except StateError: return False
    except DataError: return True

def test_training_cancelled(simulated, busy):
    "The event loop goes on meanwhile, several predictions at once; the old model stays; the lock comes back; a second training is refused"
    (ai, root), d, bars = busy, simulated, short_history()
    live = ai.live()
    async def day():
        task = asyncio.create_task(ai.train_from_historical_data(bars, epochs=1000))
        await asyncio.to_thread(until, lambda: finished_epochs(root) > 0)
        with pytest.raises(StateError, match='training already'): await ai.train_from_historical_data(bars, epochs=1)
        with pytest.raises(StateError, match='training already'): ai.train_sync(bars, epochs=1)
        assert await asyncio.gather(*(ai.predict(d.bars, S, d.now) for _ in range(4))) == [d.said] * 4
        assert ai.predict_sync(d.bars, S, d.now) == d.said                     # the synchronous twin inside a running loop
        task.cancel()
        with pytest.raises(asyncio.CancelledError): await task
        assert await ai.predict(d.bars, S, d.now) == d.said
        await asyncio.to_thread(until, lambda: idle(ai), 60)
    asyncio.run(day())
    assert ai.live() is live and finished_epochs(root) < 999
    shutil.rmtree(root/'training')

def test_training_cancelled_at_its_end(simulated, busy):
    "While the test span is judged: who cancelled does not get another model"
    (ai, root), bars = busy, short_history()
    live = ai.live()
    async def day():
        task = asyncio.create_task(ai.train_from_historical_data(bars, epochs=1))
        await asyncio.to_thread(until, lambda: finished_epochs(root) > 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError): await task
        await asyncio.to_thread(until, lambda: idle(ai), 60)
    asyncio.run(day())
    try: assert ai.live() is live, 'a cancelled training put its model in place'
    finally: ai.snapshot = live

def test_everything_at_once(simulated, busy, tmp_path):
    "One thread trains, one saves, one loads, two predict: every prediction is that of a known model, to the last bit"
    (ai, root), d, bars = busy, simulated, short_history()
    other = tmp_path/'other'
    variant = UltimateTradingAI(device='cpu'); variant.load_state(d.root)
    with torch.no_grad(): [p.mul_(.7) for p in variant.live().forecaster.network.parameters()]
    variant.save_state(other)
    known = [json.dumps(d.said), json.dumps(variant.predict_sync(d.bars, S, d.now))]; assert known[0] != known[1]
    stop, said, saved = threading.Event(), [], []
    def predict():
        while not stop.is_set():
            said.append(json.dumps(ai.predict_sync(d.bars, S, d.now)))
            ai.get_trading_signal(S, 0., d.now); ai.target_weights(d.now); time.sleep(.3)
    def save():
        while not stop.is_set(): saved.append(ai.save_state(tmp_path/'saved')); time.sleep(.2)
    def load():
        while not stop.is_set(): ai.load_state(other); time.sleep(.15); ai.load_state(d.root); time.sleep(.15)
    with ThreadPoolExecutor(5) as pool:
        running, end = [pool.submit(f) for f in (predict, predict, save, load)], time.time() + 60
        while not set(known) <= set(said) and time.time() < end: time.sleep(.05)          # both models have been seen; now the training too
        try: history = pool.submit(ai.train_sync, bars, None, 1).result(timeout=300)
        finally: stop.set()
        for r in running: r.result()
    assert set(said) == set(known) and len(said) > 10 and len(saved) > 3 and [e['epoch'] for e in history['epochs']] == [1]
    check = UltimateTradingAI(device='cpu'); check.load_state(tmp_path/'saved')
    assert check.live().terms.symbols in ([S], [S, OTHER])

# ---- suite 10: memory, small

@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='reads its size from /proc')
def test_memory_does_not_grow(simulated):
    rows = candles(simulated)
    size, now = [], simulated.now
    for i in range(400):   # the first hundred warm up
        simulated.ai.predict_sync(rows, S, now); simulated.ai.get_trading_signal(S, 0., now)
        size.append(int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize() / 2**20)
    slope = np.polyfit(np.arange(300), size[100:], 1)[0] * 1000
    assert slope < 1, f'{slope:.2f} MB per 1,000 predictions'

# ---- suite 15: import

importing = textwrap.dedent('''
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

def test_import_is_quick_and_offline():
    took = []
    for _ in range(3):
        r = subprocess.run([sys.executable, '-c', importing], capture_output=True, text=True, timeout=120)
        assert r.returncode == 0, r.stderr
        took.append(float(r.stdout))
        if took[-1] < 1: break
    assert min(took) < 1, f'{min(took):.2f} s of CPU beyond torch'
