"Market data: faults, properties, second implementations, and files that are cut off"
import itertools, os, random, signal, subprocess, sys, time
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from cryptoml import data
from cryptoml.data import DataError, Store, as_of, clean, market_frame, read_panel, to_panel, to_utc

real = pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')
HOUR = pd.Timedelta('1h')
few = settings(max_examples=60, deadline=None, derandomize=True)


def bars(n=48, symbols=('BTC/USDT', 'ETH/USDT'), start='2024-03-30', seed=0):
    "A clean market frame; a longer one begins with the shorter"
    parts = []
    for k, s in enumerate(symbols):
        rng, rng2 = np.random.default_rng([seed, k]), np.random.default_rng([seed, k, 1])
        close = 100. * (k + 1) * np.exp(.01 * rng.standard_normal(n).cumsum())
        open = np.r_[100. * (k + 1), close[:-1]]
        parts.append(pd.DataFrame(dict(time=pd.date_range(start, periods=n, freq='h', tz='UTC', unit='us'), symbol=s, open=open, high=np.maximum(open, close) * 1.001,
                                       low=np.minimum(open, close) * .999, close=close, volume=rng2.uniform(1, 9, n))))
    return pd.concat(parts, ignore_index=True)


def counts(report):
    return report.defects.groupby('defect')['count'].sum().to_dict()


# ---- one fault at a time: found, located, and gone from the panel

def fault(at, **values):
    def make(frame):
        frame = frame.copy()
        for c, v in values.items(): frame.loc[at, c] = v(frame.loc[at, c]) if callable(v) else v
        return frame
    return make

FAULTS = {
    'NaN': (fault(10, open=np.nan), 10),
    'infinite': (fault(10, high=np.inf), 10),
    'zero or negative price': (fault(10, low=0.), 10),
    'negative': (fault(10, volume=-1.), 10),
    'high below low': (fault(10, high=1., low=2., open=1.5, close=1.5), 10),
    'outside low to high': (fault(10, open=lambda x: x * 1.5), 10),
    'spike': (fault(10, **{c: lambda x: x * 100 for c in data.PRICES}), 10),
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


def test_faults_that_keep_every_bar():
    good = bars()
    for frame, defect, count in ((good.drop(index=range(20, 25)), 'missing bar', 5), (pd.concat([good, good.loc[3:6]]), 'duplicate', 4),
                                 (good.iloc[[1, 0, *range(2, 96)]], 'out of order', 1), (fault(7, volume=0.)(good), 'zero volume', 1)):
        out, report = clean(frame)
        assert counts(report)[defect] == count
        pd.testing.assert_frame_equal(out, frame.drop_duplicates().sort_values(['symbol', 'time'], ignore_index=True))


def test_no_defect_is_one_line():
    report = clean(bars())[1]
    assert 'no defect found' in str(report) and '\n' not in str(report) and not len(report.defects)
    by_time = bars().sort_values(['time', 'symbol'])   # another order of symbols is no disorder in time
    assert not len(clean(by_time)[1].defects) and clean(by_time)[1].digest == report.digest


def test_clock():
    good = bars()
    out, report = clean(good, now='2024-03-31 20:30')
    assert counts(report) == {'future bar': 6, 'unclosed bar': 2} and out.time.max() == pd.Timestamp('2024-03-31 19:00', tz='UTC')
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
    for factor, count in ((3., 0), (5., 1)):   # the bound does not shrink below that of an hour
        assert counts(clean(fault(20, **{c: lambda x: x * factor for c in data.PRICES})(good))[1]).get('spike', 0) == count


def test_frozen_feed_ends_in_a_mask():
    for volume in (0., 3.):
        stuck = bars()
        stuck.loc[30:47, data.BARS] = stuck.loc[30, data.BARS].to_numpy(float)
        stuck.loc[30:47, 'volume'] = volume
        panel, report = read_panel(stuck)
        assert not panel.mask[0, 34:].any() and panel.mask[0, :34].all() and counts(report)['frozen feed'] == 14


# ---- structure

@pytest.mark.parametrize('frame, match', [
    ([], 'no rows'), ({}, 'no rows'), (None, 'cannot take bars from a NoneType'), ([[None] * 6], 'times are missing'), ([[0, None, None, None, None, None]], 'no epoch time'),
    ([[1604221200000, 1, 1, 1]], 'no column for'), (bars().drop(columns='close'), 'no column for close'), (bars().assign(symbol=None), '96 of 96 rows have none'),
    (bars().assign(time='soon'), "cannot be read, first 'soon'"), (bars().assign(time=1604221200), None), ('nowhere.parquet', 'no such file'), (__file__, 'use .parquet, .feather or .csv'),
])
def test_structure(frame, match):
    with pytest.raises(DataError, match=match): clean(market_frame(frame, symbol='BTC/USDT' if isinstance(frame, list) else None), timeframe=None)


def test_mixed_timeframes():
    slow = bars(48, ('ETH/USDT',)).assign(time=pd.date_range('2024-03-30', periods=48, freq='4h', tz='UTC'))
    with pytest.raises(DataError, match='ETH/USDT steps by 4h, not by 1h'): clean(pd.concat([bars(96, ('BTC/USDT',)), slow]))
    quarter = bars(96, ('BTC/USDT',)).assign(time=pd.date_range('2024-03-30', periods=96, freq='15min', tz='UTC'))
    with pytest.raises(DataError, match='steps by 15m, not by 1h'): clean(quarter, timeframe='1h')
    with pytest.raises(DataError, match='pass timeframe'): clean(bars(1))
    assert clean(bars(1), timeframe='1h')[1].bars == 2


def test_a_lonely_time_does_not_fill_the_memory():
    minute = bars(600, tuple(f'C{i}/USDT' for i in range(5)), '2024-03-01')
    minute['time'] = pd.concat([pd.Series(pd.date_range('2024-03-01', periods=600, freq='min', tz='UTC', unit='us'))] * 5, ignore_index=True)
    minute.loc[0, 'time'] = pd.Timestamp('2010-01-01', tz='UTC')
    with pytest.raises(DataError, match='give start and end'): read_panel(minute)
    assert read_panel(minute, start='2024-01-01')[0].mask.sum() == 2999


def test_report_escapes_what_it_shows():
    report = clean(bars(symbols=('<B>/USDT',)).drop(index=4))[1]
    assert '<B>' not in report._repr_html_() and '&lt;B&gt;/USDT' in report._repr_html_()


# ---- what people have

def test_files(tmp_path):
    good = bars()
    raw = good.assign(symbol=good.symbol.str.replace('/', '')).rename(columns=dict(time='timestamp')).assign(note='x', taker_buy_base=1.)
    expect = good.assign(taker_buy_volume=1.)
    raw.to_parquet(tmp_path / 'a.parquet'); raw.to_feather(tmp_path / 'a.feather'); raw.to_csv(tmp_path / 'a.csv', index=False)
    raw.assign(timestamp=raw.timestamp.dt.as_unit('ms').astype('int64')).to_csv(tmp_path / 'ms.csv.gz')
    for name in ('a.parquet', 'a.feather', 'a.csv', 'ms.csv.gz'): pd.testing.assert_frame_equal(market_frame(str(tmp_path / name)), expect)
    one = good[good.symbol == 'BTC/USDT'].drop(columns='symbol').set_index('time')
    one.to_parquet(tmp_path / 'one.parquet'); one.rename_axis(None).to_csv(tmp_path / 'one.csv')
    for name in ('one.parquet', 'one.csv'): pd.testing.assert_frame_equal(read_panel(tmp_path / name, ['BTC/USDT'])[0].frame(), good[:48])
    (tmp_path / 'broken.parquet').write_bytes((tmp_path / 'a.parquet').read_bytes()[:500])
    with pytest.raises(DataError, match='cannot read'): market_frame(tmp_path / 'broken.parquet')


def test_shapes():
    good = bars()
    raw = [[t.value // 10**6, *row] for t, *row in good[:48].drop(columns='symbol').itertuples(index=False)]
    klines = [[*map(str, row), row[0] + 3599999, '10', 7, '5', '50', '0'] for row in raw]
    klines = [[int(r[0]), *r[1:]] for r in klines]
    for other in (market_frame(raw, symbol='BTCUSDT'), market_frame(np.array(raw), symbol='BTC-USDT'), market_frame(klines, symbol='BTCUSDT')[good.columns],
                  market_frame({'BTC/USDT:USDT': raw}), market_frame(good.set_index(['symbol', 'time']), symbols='BTCUSDT')):
        pd.testing.assert_frame_equal(other, good[:48])
    assert market_frame(klines, symbol='BTCUSDT').iloc[0][['quote_volume', 'trades', 'taker_buy_volume']].tolist() == [10, 7, 5]
    pd.testing.assert_frame_equal(market_frame({s: g.drop(columns='symbol') for s, g in good.groupby('symbol')}), good)
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


@pytest.mark.parametrize('zone', ['America/New_York', 'Europe/Berlin', 'Australia/Lord_Howe', 'Asia/Kathmandu'])
def test_every_hour_of_a_year_in_local_time(zone):
    utc = pd.date_range('2024-01-01', periods=24 * 366, freq='h', tz='UTC')
    local = utc.tz_convert(zone)
    for form in (local, pd.Series(local).dt.as_unit('ms'), local.astype(object), [x.isoformat() for x in local], [int(x.timestamp()) for x in local], [x.timestamp() * 1000 for x in local]):
        assert (to_utc(form) == utc).all()


def test_same_result_in_any_process_zone(tmp_path):
    frame = bars().rename(columns=dict(time='date'))
    frame.assign(date=frame.date.dt.tz_localize(None)).to_csv(tmp_path / 'naive.csv', index=False)
    frame.assign(date=frame.date.dt.as_unit('ms').astype('int64') // 1000).to_csv(tmp_path / 'seconds.csv', index=False)
    code = 'import sys; from cryptoml.data import read_panel\nfor p in sys.argv[1:]:\n    panel, r = read_panel(p, now="2024-03-31 20:30"); print(r.digest, r, panel.bar_number[0])'
    out = [subprocess.run([sys.executable, '-c', code, tmp_path / 'naive.csv', tmp_path / 'seconds.csv'], env=os.environ | {'TZ': z}, capture_output=True, text=True, check=True).stdout
           for z in ('UTC', 'America/St_Johns', 'Pacific/Auckland')]
    assert len(set(out)) == 1 and len(out[0]) > 100
    assert out[0].split()[0] in out[0].split('\n', 1)[1]   # naive and epoch: one digest


@few
@given(st.lists(st.integers(data.EARLIEST, data.LATEST - 1), min_size=1, max_size=20), st.sampled_from([1, 10**3, 10**6, 10**9]))
def test_epoch_units(seconds, k):
    expect = pd.to_datetime(seconds, unit='s', utc=True)
    assert (to_utc([s * k for s in seconds]) == expect).all()
    if k < 10**9: assert (to_utc([float(s * k) for s in seconds]) == expect).all()


# ---- second implementations, bar by bar

def slow_spikes(rows):
    "The rule of the notebook read aloud, one bar at a time"
    level, run, bad = None, [], []
    for i, (t, high, low, close) in enumerate(rows):
        def away(p): return max(np.log(high / rows[p][3]), np.log(rows[p][3] / low)) > min(np.log(4) * np.sqrt(max(t - rows[p][0], 1)), np.log(20))
        if level is None or not away(level): level, run = i, []
        else:
            run = [*run, i] if run and not away(i - 1) else [i]
            bad.append(i)
            if len(run) == 3: level, run = i, []
    return bad

prices = st.sampled_from([10., 11., 12., 30., 47., 1000., 1100., .1, .11, 50000.])
rows_of_bars = st.lists(st.tuples(st.integers(1, 4), prices, prices, prices), min_size=1, max_size=30)

def to_rows(raw):
    return [(t, max(p), min(p), p[2]) for t, p in zip(itertools.accumulate(r[0] for r in raw), (r[1:] if random.Random(str(r)).random() < .3 else (r[1],) * 3 for r in raw))]

@settings(max_examples=400, deadline=None, derandomize=True)
@given(rows_of_bars)
def test_spikes_against_a_loop(raw):
    rows = to_rows(raw)
    t, high, low, close = (np.array(v, float) for v in zip(*rows))
    (_, _, found), = data._spikes(np.zeros(len(t), int), (t * 3.6e9).astype('int64'), dict(high=high, low=low, close=close))
    assert found.tolist() == slow_spikes(rows)


dirty = st.lists(st.tuples(st.sampled_from(['BTC/USDT', 'ETH/USDT']), st.integers(0, 12), st.sampled_from([10., 10., 11., np.nan, -1., 1000.]), st.sampled_from([0., 1., 2.]),
                           st.sampled_from([0, 0, 0, 0, 7])), min_size=3, max_size=40)

def from_dirty(rows):
    s, h, p, v, off = map(list, zip(*rows))
    time = pd.Timestamp('2024-01-01', tz='UTC') + pd.to_timedelta(h, 'h') + pd.to_timedelta(off, 'min')
    return pd.DataFrame(dict(time=time, symbol=s, open=p, high=p, low=p, close=p, volume=v))

def cleaned(frame, **kw):
    try: return clean(frame, timeframe='1h', **kw)
    except DataError as e:
        assert any(x in str(e) for x in ('not a single usable', 'off the 1h grid', 'mixed timeframes'))

@settings(max_examples=200, deadline=None, derandomize=True)
@given(dirty)
def test_every_place_is_a_bar_or_missing_or_dropped(rows):
    frame = from_dirty(rows)
    if not (result := cleaned(frame)): return
    out, report = result
    assert not out.duplicated(['symbol', 'time']).any() and np.isfinite(out[data.BARS].to_numpy()).all() and (out[data.PRICES] > 0).all(axis=None)
    merged = frame.merge(out, on=list(frame.columns), how='right', indicator=True)
    assert (merged._merge == 'both').all()   # nothing that did not come
    on = frame[frame.time.dt.minute == 0]
    for s, part in on.groupby('symbol'):
        missing = report.defects.query('defect == "missing bar" and symbol == @s')['count'].sum()
        assert (part.time.max() - part.time.min()) // HOUR + 1 == part.time.nunique() + missing
    assert report.rows == len(frame) and report.bars == len(out)
    pd.testing.assert_frame_equal(to_panel(out, '1h').frame(), out)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(dirty, st.integers(0, 12))
def test_the_mask_does_not_see_the_future(rows, cut):
    frame = from_dirty(rows)
    full, part = cleaned(frame), cleaned(frame[frame.time <= frame.time.min() + cut * HOUR])
    if not full or not part: return
    until = full[0][full[0].time <= frame.time.min() + cut * HOUR].reset_index(drop=True)
    pd.testing.assert_frame_equal(part[0], until)


# ---- as of

@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from('ab')), min_size=1, max_size=15), st.lists(st.tuples(st.integers(0, 20), st.sampled_from('ab')), min_size=1, max_size=9))
def test_as_of_against_a_loop(source, ask):
    zero = pd.Timestamp('2024-01-01', tz='UTC')
    source = pd.DataFrame([dict(time=zero + t * HOUR, known=zero + (t + k) * HOUR, symbol=s, value=float(i)) for i, (t, k, s) in enumerate(source)]).drop_duplicates(['time', 'known', 'symbol'], ignore_index=True)
    when = pd.DataFrame([dict(time=zero + t * HOUR, symbol=s) for t, s in ask], index=range(5, 5 + len(ask)))
    out = as_of(when, source, by='symbol', max_age='9h')
    assert out.index.equals(when.index)
    for i, (w, s) in when.iterrows():
        there = source[(source.symbol == s) & (source.known <= w)].sort_values(['time', 'known'])
        value = there.value.iloc[-1] if len(there) and w - there.time.iloc[-1] <= pd.Timedelta('9h') else np.nan
        np.testing.assert_equal(out.value[i], value)


def test_a_daily_value_waits_for_its_day_and_delay():
    daily = pd.DataFrame(dict(timestamp=pd.date_range('2024-01-01', periods=30, tz='UTC'), asset='btc', AdrActCnt=np.arange(30)))
    when = pd.date_range('2024-01-01', periods=24 * 32, freq='h', tz='UTC')
    seen = as_of(when, daily, delay='6h')
    age = (pd.Series(when) - seen.time.reset_index(drop=True)).dropna()
    assert age.min() == pd.Timedelta('30h') and seen.AdrActCnt.notna().sum() == len(when) - 30
    gaps = daily.drop(index=range(5, 9))   # missing days do not change the period
    assert as_of(when, gaps, delay='6h').known.dropna().isin(seen.known).all()


def test_as_of_is_not_shifted_by_zones_or_order():
    daily = pd.DataFrame(dict(time=pd.date_range('2024-01-01', periods=30, tz='UTC'), value=np.arange(30.)))
    when = pd.date_range('2024-01-01', periods=24 * 30, freq='h', tz='UTC')
    expect = as_of(when, daily, delay='0h').value.to_numpy()
    shuffled = np.random.default_rng(0).permutation(len(when))
    np.testing.assert_array_equal(as_of(pd.Series(when.tz_convert('Asia/Tokyo'))[shuffled], daily.sample(frac=1, random_state=1), delay='0h').value.to_numpy(), expect[shuffled])


# ---- the store

def test_store_reads_what_was_appended(tmp_path):
    frame = bars(24 * 75, ('BTC/USDT', '1000PEPE/USDT', '币/USDT'), '2023-12-15')
    frame['trades'] = np.where(frame.symbol == 'BTC/USDT', 5., np.nan)
    store = Store(tmp_path / 'deep' / 'er')
    mixed = frame.sample(frac=1, random_state=0)
    for k in range(7): store.append(mixed[k::7])
    pd.testing.assert_frame_equal(store.read(), market_frame(frame))
    assert clean(store.read())[1].digest == clean(frame)[1].digest == read_panel(store.root)[1].digest
    assert store.symbols == sorted(frame.symbol.unique()) and {p.parent.parent for p in tmp_path.rglob('*.parquet')} == {store.root}
    part = store.read(['BTCUSDT'], '2024-01-31 22:00', '2024-02-01 02:00')
    assert part.time.dt.hour.tolist() == [22, 23, 0, 1]


def test_store_refuses_and_says_what(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(DataError, match='no bars'): store.read()
    store.append(bars())
    before = {p: p.read_bytes() for p in tmp_path.rglob('*.parquet')}
    more = bars(72)
    with pytest.raises(DataError, match='ETH/USDT: 1 bars differ'): store.append(fault(75, close=lambda x: x * 1.0001)(more))
    with pytest.raises(DataError, match='differ'): store.append(pd.concat([more, more[70:71].assign(volume=1.)]))
    assert {p: p.read_bytes() for p in tmp_path.rglob('*.parquet')} == before
    path = next(iter(before))
    for damage in (b'', before[path][:-9], b'PAR1' + bytes(400) + b'PAR1'):
        path.write_bytes(damage)
        with pytest.raises(DataError, match='is damaged'): store.read()
        with pytest.raises(DataError, match='is damaged'): store.append(more)
    path.unlink()
    store.append(bars())
    pd.testing.assert_frame_equal(store.read(), bars())


WRITER = '''
import sys, pandas as pd
from cryptoml.data import Store
frame, store = pd.read_parquet(sys.argv[1]), Store(sys.argv[2])
print('ready', flush=True)
for i in range(int(sys.argv[3]), len(frame), int(sys.argv[4])): store.append(frame[i:i + 1])
'''

def test_store_survives_kill(tmp_path):
    frame = bars(2000, ('BTC/USDT',))
    frame.to_parquet(tmp_path / 'all.parquet')
    rng, store, had = random.Random(0), Store(tmp_path / 'store'), 0
    for _ in range(5):
        writer = subprocess.Popen([sys.executable, '-c', WRITER, tmp_path / 'all.parquet', store.root, str(had), '1'], stdout=subprocess.PIPE)
        writer.stdout.readline()
        time.sleep(rng.uniform(.05, .4))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        if store.symbols:
            now = store.read()
            assert len(now) >= had
            pd.testing.assert_frame_equal(now, frame[:len(now)])
            had = len(now)
    assert had > 5
    store.append(frame)
    pd.testing.assert_frame_equal(store.read(), frame)


def test_two_writers_lose_nothing(tmp_path):
    frame = bars(60, ('BTC/USDT',))
    frame.to_parquet(tmp_path / 'all.parquet')
    writers = [subprocess.Popen([sys.executable, '-c', WRITER, tmp_path / 'all.parquet', tmp_path / 'store', str(k), '2'], stdout=subprocess.DEVNULL) for k in (0, 1)]
    assert [w.wait(60) for w in writers] == [0, 0]
    pd.testing.assert_frame_equal(Store(tmp_path / 'store').read(), frame)


@pytest.mark.parametrize('step', ['fsync', 'replace'])
def test_disk_that_fails(tmp_path, monkeypatch, step):
    store = Store(tmp_path)
    store.append(bars())
    def full(*_): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(os, step, full)
        with pytest.raises(OSError): store.append(bars(96))
    pd.testing.assert_frame_equal(store.read(), bars())
    assert store.append(bars(96)) == 96 and not list(tmp_path.rglob('*.tmp'))


# ---- cost and real data

def test_import_is_light():
    code = "import sys, cryptoml.data; print([m for m in ('torch', 'matplotlib', 'numba', 'IPython', 'nbdev', 'fastcore') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


@real
@pytest.mark.parametrize('name, missing, spikes', [('spot_1h', 947, 1), ('spot_1d', 0, 1), ('perp_1h', 0, 0), ('perp_4h', 0, 1), ('perp_1m', 0, 0), ('perp_1h_quote_trades', 0, 0), ('spot_1h_kraken', 14330, None)])
def test_real_files(name, missing, spikes):
    panel, report = read_panel(Path(os.environ['CRYPTOML_DATA']) / f'{name}.parquet')
    found = counts(report)
    assert found.get('missing bar', 0) == missing
    assert spikes is None or found.get('spike', 0) == spikes
    assert set(found) <= {'missing bar', 'spike', 'zero volume', 'frozen feed', 'duplicate'} and report.bars > .999 * report.rows
    for s, at, up in (('DOGE/USDT', '2021-01-29 03:00', 1.6), ('LINK/USDT', '2019-06-13 17:00', 1.5), ('UNI/USDT', '2024-02-23 14:00', 1.5)):
        if name == 'spot_1h':
            n, t = panel.symbols.index(s), panel.time.get_loc(at)
            assert panel.mask[n, t] and panel['close'][n, t] > up * panel['open'][n, t]
