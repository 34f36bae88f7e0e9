"Market data: faults one at a time, clocks and zones, second implementations, real files"
import itertools, os, random, re, subprocess, sys
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from cryptoml.bar import judge_table
from cryptoml.data import (
    CANDLE, PRICES, DataError, NoSymbol, clean, market_frame, read_bars, read_panel, to_panel, to_utc)
from cryptoml.times import EARLIEST, LATEST

real = pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')
HOUR = pd.Timedelta('1h')
few = settings(max_examples=60, deadline=None, derandomize=True)


def bars(n=48, symbols=('BTC/USDT', 'ETH/USDT'), start='2024-03-30', seed=0):
    "A clean market frame; a longer one begins with the shorter"
    parts = []
    for k, s in enumerate(symbols):
        first = 100. * (k + 1)
        close = first * np.exp(.01 * np.random.default_rng([seed, k]).standard_normal(n).cumsum())
        open = np.r_[first, close[:-1]]
        parts.append(pd.DataFrame(dict(
            time=pd.date_range(start, periods=n, freq='h', tz='UTC', unit='us'),
            symbol=s,
            open=open,
            high=np.maximum(open, close) * 1.001,
            low=np.minimum(open, close) * .999,
            close=close,
            volume=np.random.default_rng([seed, k, 1]).uniform(1, 9, n),
        )))
    return pd.concat(parts, ignore_index=True)


def counts(report):
    return report.defects.groupby('defect')['count'].sum().to_dict()


# ---- one fault at a time: found, located, and gone from the panel

def fault(at, **values):
    def make(frame):
        frame = frame.copy()
        for c, v in values.items():
            frame.loc[at, c] = v(frame.loc[at, c]) if callable(v) else v
        return frame
    return make

def scaled(at, factor): return fault(at, **{c: lambda x: x * factor for c in PRICES})

FAULTS = {
    'NaN': (fault(10, open=np.nan), 10),
    'infinite': (fault(10, high=np.inf), 10),
    'zero or negative price': (fault(10, low=0.), 10),
    'negative': (fault(10, volume=-1.), 10),
    'high below low': (fault(10, high=1., low=2., open=1.5, close=1.5), 10),
    'outside low to high': (fault(10, open=lambda x: x * 1.5), 10),
    'spike': (scaled(10, 100), 10),
    'off the grid': (fault(10, time=lambda t: t + pd.Timedelta('28min14s')), 10),
    'conflicting duplicate': (lambda f: pd.concat([f, f.loc[[10]].assign(close=lambda d: d.high)]), 10),
}

@pytest.mark.parametrize('name', FAULTS)
def test_a_fault_is_found_located_and_masked(name):
    good = bars()
    make, at = FAULTS[name]
    panel, report = read_panel(make(good))
    row = report.defects[report.defects.defect == name].iloc[0]
    assert row.symbol == 'BTC/USDT' and row.action == 'dropped'
    assert row['first'].floor('h') == row['last'].floor('h') == good.time[at]
    assert not panel.mask[0, at] and np.isnan(panel.values[0, at]).all()
    assert panel.mask.sum() == 2 * 48 - 1
    assert name in str(report) and name in report._repr_html_()


@pytest.mark.parametrize('defect, count, make', [
    ('missing bar', 5, lambda f: f.drop(index=range(20, 25))),
    ('duplicate', 4, lambda f: pd.concat([f, f.loc[3:6]])),
    ('out of order', 1, lambda f: f.iloc[[1, 0, *range(2, 96)]]),
    ('zero volume', 1, fault(7, volume=0.)),
])
def test_faults_that_keep_every_bar(defect, count, make):
    frame = make(bars())
    out, report = clean(frame)
    assert counts(report)[defect] == count
    pd.testing.assert_frame_equal(out, frame.drop_duplicates().sort_values(['symbol', 'time'], ignore_index=True))


def test_no_defect_is_one_line():
    report = clean(bars())[1]
    assert 'no defect found' in str(report) and '\n' not in str(report) and not len(report.defects)
    by_time = clean(bars().sort_values(['time', 'symbol']))[1]   # another order of symbols is no disorder in time
    assert not len(by_time.defects) and by_time.digest == report.digest


def test_clock():
    good = bars()
    out, report = clean(good, now='2024-03-31 20:30')
    assert counts(report) == {'future bar': 6, 'unclosed bar': 2}
    assert out.time.max() == pd.Timestamp('2024-03-31 19:00', tz='UTC')
    local = pd.Timestamp('2024-03-31 20:30', tz='UTC').tz_convert('Asia/Tokyo')
    assert clean(good, now=local)[1].digest == clean(good, now=local.timestamp())[1].digest == report.digest
    with pytest.raises(DataError, match='not a single usable bar'): clean(good, now='2024-03-01')
    assert counts(clean(good, now='2024-03-31 23:00')[1]) == {'unclosed bar': 2}   # it opens now
    assert counts(clean(good, now='2024-04-01 00:00')[1]) == {}                    # it closes now


def test_a_third_copy_that_differs_is_one_conflict():
    good = bars()
    report = clean(pd.concat([good, good[9:10], good[9:10].assign(volume=1.)]))[1]
    assert counts(report) == {'out of order': 2, 'conflicting duplicate': 3}


def test_a_spike_of_minutes():
    good = bars(symbols=('BTC/USDT',))
    good['time'] = pd.date_range('2024-03-30', periods=48, freq='min', tz='UTC')
    assert counts(clean(scaled(20, 3.)(good))[1]) == {}             # the bound does not shrink below that of an hour
    assert counts(clean(scaled(20, 5.)(good))[1]) == {'spike': 1}


@pytest.mark.parametrize('volume', [0., 3.])
def test_frozen_feed_ends_in_a_mask(volume):
    stuck = bars()
    stuck.loc[30:47, CANDLE] = stuck.loc[30, CANDLE].to_numpy(float)
    stuck.loc[30:47, 'volume'] = volume
    panel, report = read_panel(stuck)
    assert panel.mask[0, :34].all()
    assert not panel.mask[0, 34:].any()
    assert counts(report)['frozen feed'] == 14


# ---- structure

@pytest.mark.parametrize('frame, match', [
    ([], 'no rows'),
    ({}, 'no rows'),
    (None, 'cannot take bars from a NoneType'),
    ([[None] * 6], 'times are missing'),
    ([[0, None, None, None, None, None]], 'no epoch time'),
    ([[1604221200000, 1, 1, 1]], 'no column for'),
    (bars().drop(columns='close'), 'no column for close'),
    (bars().assign(symbol=None), '96 of 96 rows have none'),
    (bars().assign(time='soon'), "cannot be read, first 'soon'"),
    (bars().assign(time=1604221200), 'does not tell its timeframe'),
    ('nowhere.parquet', 'no such file'),
    (__file__, 'use .parquet, .feather, .csv or .json'),
])
def test_structure(frame, match):
    symbol = 'BTC/USDT' if isinstance(frame, list) else None
    with pytest.raises(DataError, match=match): clean(market_frame(frame, symbol=symbol))


def test_no_symbol_is_an_error_of_its_own():
    nameless = bars(symbols=('BTC/USDT',)).drop(columns='symbol')
    sentence = "^no symbol column: pass symbol='BTC/USDT', or a dict from symbol to frame$"
    with pytest.raises(NoSymbol, match=sentence): read_bars(nameless)
    with pytest.raises(NoSymbol, match=sentence): read_bars(nameless, symbols=['BTC/USDT', 'ETH/USDT'])
    assert read_bars(nameless, symbols='BTCUSDT').symbol.unique().tolist() == ['BTC/USDT']
    assert read_bars(nameless, symbol='BTCUSDT').symbol.unique().tolist() == ['BTC/USDT']
    with pytest.raises(DataError) as refused: read_bars(nameless.drop(columns='close'))
    assert not isinstance(refused.value, NoSymbol)


def test_mixed_timeframes():
    btc = bars(96, ('BTC/USDT',))
    slow = bars(48, ('ETH/USDT',)).assign(time=pd.date_range('2024-03-30', periods=48, freq='4h', tz='UTC'))
    quarter = btc.assign(time=pd.date_range('2024-03-30', periods=96, freq='15min', tz='UTC'))
    with pytest.raises(DataError, match='ETH/USDT steps by 4h, not by 1h'): clean(pd.concat([btc, slow]))
    with pytest.raises(DataError, match='steps by 15m, not by 1h'): clean(quarter, timeframe='1h')
    with pytest.raises(DataError, match='pass timeframe'): clean(bars(1))
    assert clean(bars(1), timeframe='1h')[1].bars == 2


def test_a_lonely_time_does_not_fill_the_memory():
    minute = bars(600, tuple(f'C{i}/USDT' for i in range(5)), '2024-03-01')
    times = pd.date_range('2024-03-01', periods=600, freq='min', tz='UTC', unit='us')
    minute['time'] = pd.concat([pd.Series(times)] * 5, ignore_index=True)
    minute.loc[0, 'time'] = pd.Timestamp('2010-01-01', tz='UTC')
    with pytest.raises(DataError, match='give start and end'): read_panel(minute)
    assert read_panel(minute, start='2024-01-01')[0].mask.sum() == 2999


def test_report_escapes_what_it_shows():
    report = clean(bars(symbols=('<B>/USDT',)).drop(index=4))[1]
    assert '<B>' not in report._repr_html_() and '&lt;B&gt;/USDT' in report._repr_html_()


# ---- what people have

def test_files(tmp_path):
    good = bars()
    raw = good.rename(columns=dict(time='timestamp')).assign(note='x', taker_buy_base=1.)
    raw['symbol'] = raw.symbol.str.replace('/', '')
    raw.to_parquet(tmp_path / 'a.parquet')
    raw.to_feather(tmp_path / 'a.feather')
    raw.to_csv(tmp_path / 'a.csv', index=False)
    raw.assign(timestamp=raw.timestamp.dt.as_unit('ms').astype('int64')).to_csv(tmp_path / 'ms.csv.gz')
    for name in ('a.parquet', 'a.feather', 'a.csv', 'ms.csv.gz'):
        pd.testing.assert_frame_equal(market_frame(str(tmp_path / name)), good.assign(taker_buy_volume=1.))


def test_files_of_one_symbol_without_its_name(tmp_path):
    good = bars()
    one = good[good.symbol == 'BTC/USDT'].drop(columns='symbol').set_index('time')
    one.to_parquet(tmp_path / 'one.parquet')
    one.rename_axis(None).to_csv(tmp_path / 'one.csv')
    for name in ('one.parquet', 'one.csv'):
        pd.testing.assert_frame_equal(read_panel(tmp_path / name, ['BTC/USDT'])[0].frame(), good[:48])


def test_a_broken_file(tmp_path):
    bars().to_parquet(tmp_path / 'a.parquet')
    (tmp_path / 'broken.parquet').write_bytes((tmp_path / 'a.parquet').read_bytes()[:500])
    with pytest.raises(DataError, match='cannot read'): market_frame(tmp_path / 'broken.parquet')


def test_shapes():
    good = bars()
    raw = [[t.value // 10**6, *row] for t, *row in good[:48].drop(columns='symbol').itertuples(index=False)]
    klines = [[t, *map(str, row), t + 3599999, '10', 7, '5', '50', '0'] for t, *row in raw]
    same = pd.testing.assert_frame_equal
    same(market_frame(raw, symbol='BTCUSDT'), good[:48])
    same(market_frame(np.array(raw), symbol='BTC-USDT'), good[:48])
    same(market_frame(klines, symbol='BTCUSDT')[good.columns], good[:48])
    same(market_frame({'BTC/USDT:USDT': raw}), good[:48])
    same(market_frame(good.set_index(['symbol', 'time']), symbols='BTCUSDT'), good[:48])
    same(market_frame({s: g.drop(columns='symbol') for s, g in good.groupby('symbol')}), good)
    first = market_frame(klines, symbol='BTCUSDT').iloc[0]
    assert first[['quote_volume', 'trades', 'taker_buy_volume']].tolist() == [10, 7, 5]
    with pytest.raises(DataError, match="given as 'ETH/USDT' holds"): market_frame({'ETH/USDT': good[:48]})


def test_start_and_end():
    part = market_frame(bars(), start='2024-03-30 05:00', end=pd.Timestamp('2024-03-30 08:00+01:00'))
    assert sorted(part.time.dt.hour.unique()) == [5, 6]
    with pytest.raises(DataError, match='no rows from 2030'): market_frame(bars(), start='2030-01-01')


def test_the_source_is_not_touched():
    frame = bars().rename(columns=dict(time='date')).sample(frac=1, random_state=0)
    before = frame.copy(deep=True)
    panel, _ = read_panel(frame)
    panel.values[:] = 0
    pd.testing.assert_frame_equal(frame, before)


# ---- clocks and zones

def test_object_dates_of_two_libraries():
    good = bars()
    old = good[:60].assign(time=good.time[:60].dt.as_unit('ms').dt.tz_convert(ZoneInfo('UTC')))
    live = good[60:].assign(time=good.time[60:].astype(object))
    both = pd.concat([old, live])
    assert both.time.dtype == object
    pd.testing.assert_frame_equal(market_frame(both), good)


@pytest.mark.parametrize('form', [
    lambda x: x,
    lambda x: pd.Series(x).dt.as_unit('ms'),
    lambda x: x.astype(object),
    lambda x: [t.isoformat() for t in x],
    lambda x: [int(t.timestamp()) for t in x],
    lambda x: [t.timestamp() * 1000 for t in x],
], ids=['index', 'series', 'objects', 'text', 'whole seconds', 'milliseconds'])
@pytest.mark.parametrize('zone', ['America/New_York', 'Europe/Berlin', 'Australia/Lord_Howe', 'Asia/Kathmandu'])
def test_every_hour_of_a_year_in_local_time(zone, form):
    utc = pd.date_range('2024-01-01', periods=24 * 366, freq='h', tz='UTC')
    assert (to_utc(form(utc.tz_convert(zone))) == utc).all()


READER = '''
import sys
from cryptoml.data import read_panel
for path in sys.argv[1:]:
    panel, report = read_panel(path, now="2024-03-31 20:30")
    print(report.digest, report, panel.bar_number[0])
'''

def test_same_result_in_any_process_zone(tmp_path):
    frame = bars().rename(columns=dict(time='date'))
    naive = frame.date.dt.tz_localize(None)
    seconds = frame.date.dt.as_unit('ms').astype('int64') // 1000
    frame.assign(date=naive).to_csv(tmp_path / 'naive.csv', index=False)
    frame.assign(date=seconds).to_csv(tmp_path / 'seconds.csv', index=False)
    command = [sys.executable, '-c', READER, tmp_path / 'naive.csv', tmp_path / 'seconds.csv']
    def read(zone):
        env = os.environ | {'TZ': zone}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    utc, *others = map(read, ('UTC', 'America/St_Johns', 'Pacific/Auckland'))
    assert others == [utc, utc] and len(utc) > 100
    first, rest = utc.split('\n', 1)
    assert first.split()[0] in rest   # naive and epoch: one digest


moments = st.lists(st.integers(EARLIEST, LATEST - 1), min_size=1, max_size=20)

@few
@given(moments, st.sampled_from([1, 10**3, 10**6, 10**9]))
def test_epoch_units(seconds, k):
    expect = pd.to_datetime(seconds, unit='s', utc=True)
    assert (to_utc([s * k for s in seconds]) == expect).all()
    if k < 10**9:
        assert (to_utc([float(s * k) for s in seconds]) == expect).all()


# ---- second implementations, bar by bar

def slow_spikes(rows):
    "The rule of the notebook read aloud, one bar at a time"
    def away(i, p):
        t, high, low, _ = rows[i]
        was, *_, close = rows[p]
        bound = min(np.log(4) * np.sqrt(max(t - was, 1)), np.log(20))
        return max(np.log(high / close), np.log(close / low)) > bound
    level = None   # the last accepted bar
    run = []       # bars in a row that agree on another level
    bad = []
    for i in range(len(rows)):
        if level is None or not away(i, level):
            level = i
            run = []
            continue
        run = [*run, i] if run and not away(i, i - 1) else [i]
        bad.append(i)
        if len(run) == 3:
            level = i
            run = []
    return bad

prices = st.sampled_from([10., 11., 12., 30., 47., 1000., 1100., .1, .11, 50000.])
# no more than a day, so that nothing is said of steps
rows_of_bars = st.lists(st.tuples(st.integers(1, 4), prices, prices, prices), min_size=1, max_size=24)

def to_rows(raw):
    "(hour, high, low, close) of each; in most bars the three are equal"
    hours = itertools.accumulate(hours for hours, *_ in raw)
    prices = [r[1:] if random.Random(str(r)).random() < .3 else (r[1],) * 3 for r in raw]
    return [(t, max(p), min(p), p[2]) for t, p in zip(hours, prices)]

@settings(max_examples=400, deadline=None, derandomize=True)
@given(rows_of_bars)
def test_spikes_against_a_loop(raw):
    rows = to_rows(raw)
    t, high, low, close = (np.array(v, float) for v in zip(*rows))
    one_coin = np.zeros(len(t), int)
    columns = dict(open=close, high=high, low=low, close=close, volume=np.ones(len(t)))
    found, _ = judge_table(one_coin, (t * 3.6e9).astype('int64'), columns, 3_600_000_000)
    assert found.tolist() == slow_spikes(rows)


dirty_bar = st.tuples(
    st.sampled_from(['BTC/USDT', 'ETH/USDT']),
    st.integers(0, 12),                                     # hour
    st.sampled_from([10., 10., 11., np.nan, -1., 1000.]),   # price
    st.sampled_from([0., 1., 2.]),                          # volume
    st.sampled_from([0, 0, 0, 0, 7]),                       # minutes off the hour
)
dirty = st.lists(dirty_bar, min_size=3, max_size=40)

def from_dirty(rows):
    s, h, p, v, off = map(list, zip(*rows))
    time = pd.Timestamp('2024-01-01', tz='UTC') + pd.to_timedelta(h, 'h') + pd.to_timedelta(off, 'min')
    return pd.DataFrame(dict(time=time, symbol=s, open=p, high=p, low=p, close=p, volume=v))

def cleaned(frame, **kw):
    try: return clean(frame, timeframe='1h', **kw)
    except DataError as e:
        assert re.search('not a single usable|off the 1h grid|mixed timeframes', str(e))

@settings(max_examples=200, deadline=None, derandomize=True)
@given(dirty)
def test_every_place_is_a_bar_or_missing_or_dropped(rows):
    frame = from_dirty(rows)
    if not (result := cleaned(frame)): return
    out, report = result
    assert not out.duplicated(['symbol', 'time']).any()
    assert np.isfinite(out[CANDLE].to_numpy()).all()
    assert (out[PRICES] > 0).all(axis=None)
    merged = frame.merge(out, on=list(frame.columns), how='right', indicator=True)
    assert (merged._merge == 'both').all()   # nothing that did not come
    on = frame[frame.time.dt.minute == 0]
    for s, part in on.groupby('symbol'):
        missing = report.defects.query('defect == "missing bar" and symbol == @s')['count'].sum()
        places = (part.time.max() - part.time.min()) // HOUR + 1
        assert places == part.time.nunique() + missing
    assert report.rows == len(frame) and report.bars == len(out)
    pd.testing.assert_frame_equal(to_panel(out, '1h').frame(), out)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(dirty, st.integers(0, 12))
def test_the_mask_does_not_see_the_future(rows, cut):
    frame = from_dirty(rows)
    end = frame.time.min() + cut * HOUR
    full = cleaned(frame)
    part = cleaned(frame[frame.time <= end])
    if not full or not part: return
    until = full[0][full[0].time <= end].reset_index(drop=True)
    pd.testing.assert_frame_equal(part[0], until)


# ---- cost and real data

HEAVY = ('torch', 'matplotlib', 'numba', 'IPython', 'nbdev', 'fastcore')

def test_import_is_light():
    code = f'import sys, cryptoml.data; print([m for m in {HEAVY} if m in sys.modules])'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == '[]'


def real_panel(name): return read_panel(Path(os.environ['CRYPTOML_DATA']) / f'{name}.parquet')

@real
@pytest.mark.parametrize('name, missing, spikes', [
    ('spot_1h', 947, 1),
    ('spot_1d', 0, 1),
    ('perp_1h', 0, 0),
    ('perp_4h', 0, 1),
    ('perp_1m', 0, 0),
    ('perp_1h_quote_trades', 0, 0),
    ('spot_1h_kraken', 14330, None),
])
def test_real_files(name, missing, spikes):
    panel, report = real_panel(name)
    found = counts(report)
    assert found.get('missing bar', 0) == missing
    assert spikes is None or found.get('spike', 0) == spikes
    assert set(found) <= {'missing bar', 'spike', 'zero volume', 'frozen feed', 'duplicate'}
    assert report.bars > .999 * report.rows


@real
def test_true_rises_are_kept():
    panel, _ = real_panel('spot_1h')
    for symbol, at, up in (
        ('DOGE/USDT', '2021-01-29 03:00', 1.6),
        ('LINK/USDT', '2019-06-13 17:00', 1.5),
        ('UNI/USDT', '2024-02-23 14:00', 1.5),
    ):
        n = panel.symbols.index(symbol)
        t = panel.time.get_loc(at)
        assert panel.mask[n, t] and panel['close'][n, t] > up * panel['open'][n, t]
