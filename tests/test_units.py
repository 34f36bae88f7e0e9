"Changes of unit, and the grid: found at their hour, cut, said, joined where asked; a market that moved is left alone"
import math, os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from cryptoml.bar import judge_table
from cryptoml.data import CANDLE, PRICES, DataError, clean, read_panel, to_panel
from cryptoml.engine import as_given, step
from cryptoml.features import AdvancedFeatureEngineer
from cryptoml.newest import predict_newest
from cryptoml.targets import make_targets
import test_newest

real = pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')
HOUR = 3_600_000_000
S, of, world = test_newest.S, test_newest.of, test_newest.world    # a coin, its rows; a model that learnt nothing

# Hours of 2023 as an exchange printed them: one old QUICK became 1,000 new ones in a halt
QUICK = [
    ('07-16 01', 78.9, 79.3, 76.5, 77.1, 1811.698),
    ('07-16 02', 77, 78, 76.5, 77.5, 1460.328),
    ('07-16 03', 77.6, 77.9, 76.9, 77.3, 548.272),
    ('07-16 04', 77.2, 77.7, 76.9, 77.6, 181.752),
    ('07-16 05', 77.7, 79.9, 77.6, 78.7, 1316.602),
    ('07-16 06', 78.5, 78.5, 76.6, 76.9, 2004.607),
    ('07-16 07', 76.8, 77, 74, 75, 4506.7),
    ('07-16 08', 75, 76.5, 74.7, 75.8, 1383.327),
    ('07-16 09', 75.8, 75.9, 74.9, 75.5, 942.318),
    ('07-16 10', 75.3, 75.7, 73.3, 73.8, 3246.906),
    ('07-16 11', 73.8, 74.2, 73.4, 73.9, 437.386),
    ('07-16 12', 73.8, 74.2, 73.5, 73.7, 333.505),
    ('07-16 13', 73.7, 75.6, 73.4, 74.3, 945.536),
    ('07-16 14', 74.2, 77.4, 73.7, 75.1, 3105.75),
    ('07-16 15', 75.1, 76.5, 74.5, 74.9, 673.117),
    ('07-16 16', 74.8, 74.8, 73.2, 74.1, 1849.305),
    ('07-16 17', 74, 74.4, 73.9, 74.1, 167.516),
    ('07-16 18', 74.1, 75.6, 73.9, 74.3, 774.437),
    ('07-16 19', 74.4, 74.7, 74.3, 74.4, 309.852),
    ('07-16 20', 74.5, 74.7, 74.3, 74.4, 152.337),
    ('07-16 21', 74.5, 75.4, 74.5, 75.1, 262.79),
    ('07-16 22', 75.2, 76, 75, 75.6, 470.109),
    ('07-16 23', 75.6, 75.9, 74.4, 74.5, 1056.035),
    ('07-17 00', 74.4, 74.9, 73.6, 74.3, 1182.212),
    ('07-17 01', 74.4, 76, 74, 75.1, 1291.379),
    ('07-17 02', 75, 75.1, 72.9, 74.2, 3233.234),
    ('07-21 08', 0.0742, 0.079, 0.05713, 0.06057, 46124050),
    ('07-21 09', 0.06089, 0.063, 0.05889, 0.05978, 7670735),
    ('07-21 10', 0.05994, 0.06072, 0.0587, 0.05942, 6733934),
    ('07-21 11', 0.05944, 0.06047, 0.05858, 0.06002, 6239951),
    ('07-21 12', 0.06018, 0.06046, 0.05865, 0.05896, 2521739),
    ('07-21 13', 0.05896, 0.05929, 0.05759, 0.05794, 3593339),
    ('07-21 14', 0.05789, 0.05848, 0.05615, 0.05645, 5489487),
    ('07-21 15', 0.05642, 0.05745, 0.05578, 0.05705, 5583270),
]

def quick():
    frame = pd.DataFrame(QUICK, columns=['time', *CANDLE]).assign(symbol='QUICK/USDT')
    return frame.assign(time=pd.to_datetime('2023-' + frame['time'] + ':00', utc=True).dt.as_unit('us'))

def walk(n=200, seed=0, freq='h', start='2024-01-01'):
    "Bars of one coin that touch one another"
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(rng.normal(0, .01, n).cumsum())
    open = np.r_[100, close[:-1]]
    high = np.maximum(open, close) * (1 + rng.exponential(.003, n))
    low = np.minimum(open, close) * (1 - rng.exponential(.003, n))
    time = pd.date_range(start, periods=n, freq=freq, tz='UTC').as_unit('us')
    return pd.DataFrame(dict(time=time, symbol=S, open=open, high=high, low=low, close=close,
                             volume=rng.lognormal(3, .7, n)))

def in_another_unit(bars, at, ratio, halt=0):
    "From a row on, one old is `ratio` new ones, after some missing bars"
    d = bars.copy()
    d.loc[at:, PRICES] /= ratio
    d.loc[at:, 'volume'] *= ratio
    return d.drop(index=range(at, at + halt)).reset_index(drop=True)

def units(report, action=None):
    found = report.defects[report.defects['defect'] == 'change of unit']
    return found if action is None else found[found['action'] == action]

# ---- a real one

def test_quick_is_cut_at_its_hour_and_said():
    good, report = clean(quick(), '1h')
    row, = units(report).to_dict('records')
    assert row['first'] == row['last'] == pd.Timestamp('2023-07-21 08:00', tz='UTC')
    assert (row['symbol'], row['column'], row['action'], row['count']) == ('QUICK/USDT', 'price', 'cut', 26)
    assert row['note'] == '1 old = 1000 new'                       # 74.2 / 0.0742
    assert good['time'].min() == pd.Timestamp('2023-07-21 11:00', tz='UTC')   # three bars decided it
    assert '1 old = 1000 new' in str(report) and '1 old = 1000 new' in report._repr_html_()

def test_quick_joined_as_asked():
    panel, report = read_panel(quick(), timeframe='1h', units={'QUICKUSDT': [('2023-07-21 08:00', 1000)]})
    assert report.bars == len(QUICK) and list(units(report)['action']) == ['joined']
    assert units(report)['count'].tolist() == [26]
    row = panel.mask[0]
    before = panel.time < '2023-07-21'
    assert panel['close'][0][before & row][-1] == 74.2 / 1000
    assert panel['volume'][0][before & row][-1] == 3233.234 * 1000
    assert np.abs(np.diff(np.log(panel['close'][0][row]))).max() < .25

@pytest.mark.parametrize('wrong, word', [
    ({'QUICK/USDT': [('2023-07-21 08:00', 0)]}, '0 is no ratio'),
    ({'QUICK/USDT': [('2023-07-21 08:00', 1000, 'x')]}, "'x' is no ratio"),
    ({'SHIB/USDT': [('2023-07-21 08:00', 1000)]}, 'no bars of SHIB/USDT'),
])
def test_units_that_cannot_be(wrong, word):
    with pytest.raises(DataError, match=word): clean(quick(), '1h', units=wrong)

def test_a_ratio_of_one_keeps_the_coin_whole():
    good, report = clean(quick(), '1h', units={'QUICK/USDT': [('2023-07-21 08:00', 1)]})
    assert len(good) == len(QUICK) - 3 and not len(units(report, 'cut'))

# ---- which changes are found, and where

@pytest.mark.parametrize('freq, per', [('h', 1), ('4h', 4), ('D', 24), ('15min', .25)])
@pytest.mark.parametrize('ratio, halt', [
    (1000, 0), (1000, 72), (.001, 0), (.001, 5), (10, 0), (10, 72), (.1, 0), (.1, 72), (100, 3), (1e6, 1),
    (3.5, 0), (1 / 3.5, 0), (2.5, 0), (2, 0)])
def test_found_at_its_bar(ratio, halt, freq, per):
    d = in_another_unit(walk(freq=freq), 100, ratio, halt)
    good, report = clean(d, freq.replace('min', 'm').replace('D', '1d').replace('h', 'h') if freq != 'h' else '1h')
    row, = units(report).to_dict('records')
    assert row['first'] == d['time'][100] and row['count'] == 100
    told = float(row['note'].split()[3])
    assert abs(math.log(told / ratio)) < .01 + .05 * math.sqrt(halt)
    pd.testing.assert_frame_equal(good, d[103:].reset_index(drop=True))

def ticks():
    "A coin that costs one or two of the smallest steps of its price"
    rng = np.random.default_rng(0)
    close = 1e-8 * rng.integers(1, 3, 300)
    return walk(300).assign(open=close, high=close, low=close, close=close)

def crash(factor=.02, at=100, bars=2):
    "A fall that is traded: the bars touch, and the volume in coins is many times the usual"
    d = walk()
    way = np.clip((np.arange(200) - at + 1) / bars, 0, 1)
    close = d['close'] * factor ** way
    open = np.r_[100, close[:-1]]
    volume = d['volume'] * np.where(way > 0, 1 / factor, 1)
    return d.assign(open=open, close=close, high=np.maximum(open, close), low=np.minimum(open, close), volume=volume)

def moved(at, factor, **other):
    d = walk()
    d.loc[at, PRICES] *= factor
    return d.assign(**other)

def pump():
    d = in_another_unit(walk(), 100, .1)
    return d.assign(volume=walk()['volume'] * np.where(np.arange(200) < 100, 1, 12))

@pytest.mark.parametrize('make', [
    ticks,
    crash,
    lambda: crash(.2, bars=1),
    lambda: crash(30., bars=1),
    pump,
    lambda: moved(100, 1000),                                     # one bad print
    lambda: moved(slice(100, 101), .001),                         # two
    lambda: in_another_unit(walk(), 100, 1.5),
    lambda: in_another_unit(walk(), 100, 2, halt=48),             # a bad day, as far as anyone can tell
    lambda: in_another_unit(walk(), 10, 1000),                    # known for less than a day
    lambda: walk(seed=1).assign(volume=0.),
])
def test_a_market_that_moved_is_no_change_of_unit(make):
    assert not len(units(clean(make(), '1h')[1]))

def test_twice_and_back():
    "The coin begins with its last unit"
    d = in_another_unit(in_another_unit(walk(300), 100, 1000), 200, .001)
    good, report = clean(d, '1h')
    assert units(report)['first'].tolist() == d['time'][[100, 200]].tolist()
    assert units(report)['count'].tolist() == [100, 97]
    pd.testing.assert_frame_equal(good, d[203:].reset_index(drop=True))

def test_each_coin_by_itself():
    d = in_another_unit(walk(), 100, 10)
    other = walk(seed=2).assign(symbol='ETH/USDT')
    good, report = clean(pd.concat([d, other]), '1h')
    assert units(report)['symbol'].tolist() == [S]
    pd.testing.assert_frame_equal(good[good['symbol'] == 'ETH/USDT'].reset_index(drop=True), other)

def test_labels_do_not_cross_it():
    panel, _ = read_panel(pd.concat([in_another_unit(walk(400), 200, 1000), walk(400, 3).assign(symbol='ETH/USDT')]))
    y = make_targets(panel, (4, 24))
    coin = panel.symbols.index(S)
    assert not panel.mask[coin, :203].any()
    moves = y['ret'][coin]
    assert np.nanmax(np.abs(moves)) < .5 and np.isnan(moves[:200]).all()

# ---- the rule read aloud

def slow(rows):
    "Bars that are not accepted and changes of unit, bar by bar: rows are (hour, open, high, low, close, volume)"
    bad, new, seen = [], [], []            # seen: accepted bars of this unit, with their true range
    base, run, steps, halt = None, [], 0., False
    def wide():
        last = [r for r, _ in seen[-24:]]
        return math.log(max(last)) if len(last) == 24 and max(last) > 1 else math.inf
    def away(i, p, missing):
        (t, _, high, low, _, _), (was, _, _, _, close, _) = rows[i], rows[p]
        if max(math.log(high / close), math.log(close / low)) > min(math.log(4) * math.sqrt(t - was), math.log(20)):
            return True
        gap = max(math.log(low / close), math.log(close / high))
        return gap > math.log(4 if missing else 1.8) and gap > 3 * wide()
    for i, (t, open, high, low, close, volume) in enumerate(rows):
        before = run[-1] if run else base
        missing = i > 0 and t - rows[i - 1][0] > 1
        if base is None or not away(i, base, missing or bool(run) and halt):
            if new and new[-1][0] is None: new[-1] = (i, *new[-1][1:])
            was = close if base is None else rows[base][4]
            top, bottom = (high, low) if base is None else (max(high, was), min(low, was))
            seen.append((top / bottom, volume))
            base, run = i, []
            continue
        bad.append(i)
        if run and not away(i, before, missing): run.append(i)
        else:
            steps = math.log(open / rows[before][4]) + (steps if run else 0.)
            halt = missing or bool(run) and halt
            run = [i]
        if len(run) < 3: continue
        usual = np.mean([math.log(v) for _, v in seen[-24:]]) if seen else math.nan
        against = -np.sign(steps) * (np.mean([math.log(rows[j][5]) for j in run]) - usual)
        size = abs(steps)
        round_number = min(abs(size - k * math.log(10)) for k in range(1, 12)) <= math.log(2)
        enough = size > math.log(4 if halt else 1.8) and size > 3 * wide()
        if enough and against > -size / 2 and (not halt or round_number or against >= size / 2):
            new.append((None, rows[run[0]][0], steps))
            seen = []
        base, run = i, []
    return bad, [(i, t) for i, t, _ in new if i is not None]

levels = st.sampled_from([1., 1., 1., 1., 1.2, 2.5, 7., 10., 100., 1000., .001])
odd_bars = st.lists(st.tuples(st.integers(1, 3), levels, levels, levels, st.sampled_from([1., 5., 40., 1000.])),
                    min_size=1, max_size=40)

@settings(max_examples=300, deadline=None, derandomize=True)
@given(odd_bars, st.integers(20, 30))
def test_the_rule_read_aloud(odd, calm):
    "Calm bars, then any"
    rows = [(t, 10., 10.2 + .1 * (t % 3), 9.9, 10., 5.) for t in range(calm)]
    t = calm
    for gap, a, b, c, volume in odd:
        t += gap - 1 if gap < 3 else 30
        p = sorted([10 * a, 10 * b, 10 * (c if c < 5 else a)])
        if volume > 4: p = [10 * a, 10 * a, 10 * a * 1.01]
        rows.append((t, p[1], p[2], p[0], p[1], volume))
        t += 1
    hour, open, high, low, close, volume = (np.array(v, float) for v in zip(*rows))
    x = dict(open=open, high=high, low=low, close=close, volume=volume)
    drop, new = judge_table(np.zeros(len(rows), int), (hour * HOUR).astype('int64'), x, HOUR)
    assert (drop.tolist(), [(i, at) for i, at, _ in new]) == slow(rows)

# ---- history, the newest bar and a stream decide alike

@pytest.fixture(scope='module')
def engineer():
    @step('mean_{p}', windows=(5, 20), state=1, past=lambda p: p, first=lambda p: p)
    def mean(close, W, s, n, y, r):
        m = len(close) - 1
        for j in range(len(W)):
            p = W[j]
            if r[j]:
                s[j] = 0.
                for k in range(min(n, p)): s[j] += close[m - k]
            else: s[j] += close[m] - (close[m - p] if n > p else 0.)
            y[j] = s[j] / p
    return AdvancedFeatureEngineer([mean, as_given('price', 'close'), 'crosssection'])

@pytest.mark.parametrize('ratio, halt', [(1000, 0), (.1, 72), (3.5, 0), (1000, 7)])
def test_features_begin_anew_and_a_stream_agrees(engineer, ratio, halt):
    d = in_another_unit(walk(), 100, ratio, halt)
    frame = pd.concat([d, walk(seed=3).assign(symbol='ETH/USDT')], ignore_index=True)
    whole = engineer.transform(frame, '1h')
    assert whole.loc[S].iloc[100:103].isna().all(axis=None)
    parts = pd.concat([d[:100], d[103:], frame[len(d):]])
    after = d['time'][103:]
    alone = engineer.transform(parts[(parts['symbol'] != S) | (parts['time'] >= after.min())], '1h')
    own = ['mean_5', 'mean_20', 'price']
    assert whole.loc[S].loc[after, own].to_numpy().tobytes() == alone.loc[S].loc[after, own].to_numpy().tobytes()
    cleaned = engineer.transform(clean(frame, '1h')[0], '1h')
    assert cleaned.loc[S].to_numpy().tobytes() == alone.loc[S].to_numpy().tobytes()
    live, streams = {}, engineer.panel_stream([S, 'ETH/USDT'])
    for k, (t, rows) in enumerate(frame.groupby('time')):
        if k == 101: streams.restore(streams.state())
        Y = streams.update({r['symbol']: r for r in rows.to_dict('records')})
        live |= {(s, t): Y[streams.symbols.index(s)] for s in rows['symbol']}
    assert np.array([live[key] for key in whole.index]).tobytes() == whole.to_numpy().tobytes()

@pytest.mark.parametrize('ratio', [1000, 3.5])
def test_what_is_accepted_does_not_depend_on_what_follows(ratio):
    d = in_another_unit(walk(), 100, ratio)
    for end in (100, 101, 102, 103, 104, 150):
        good, report = clean(d[:end + 1], '1h')
        newest = good['time'].max()
        assert newest == (d['time'][end] if end >= 103 else d['time'][99])
        assert len(units(report)) == (end >= 103)

@pytest.mark.parametrize('ratio', [1000, .1, 3.5])
@pytest.mark.parametrize('ago', [1, 3, 10, 100, 400])
def test_a_live_coin_waits_until_it_has_a_history_again(world, ratio, ago):
    model, bars, now = world
    coin = 'SHIB/USDT'
    mine = of(bars, coin)[-ago:]
    d = bars.copy()
    d.loc[mine, PRICES] /= ratio
    d.loc[mine, 'volume'] *= ratio
    p = predict_newest(model, d, None, now)
    assert p[coin]['direction'] is None and p['ETH/USDT']['direction'] is not None
    said = p[coin]['faults'][0]
    if ago <= 3: assert 'spike in price of the newest bar' in said
    else: assert 'change of unit of the price at' in said and f': {ago - 3} bars since then' in said
    assert predict_newest(model, d, coin, now)[coin]['faults'] == p[coin]['faults']

@pytest.mark.parametrize('ago', [30, 400])
def test_a_live_coin_waits_while_its_volumes_cross_a_change(world, ago):
    model, bars, now = world
    d = bars.copy()
    d.loc[of(bars)[-ago:], 'volume'] *= 1e6
    fault, = predict_newest(model, d, S, now)[S]['faults']
    assert 'change of unit of the volume at' in fault and f': {ago} bars since then' in fault

# ---- volume in another unit

@pytest.mark.parametrize('ratio', [1e6, 1e-3])
def test_a_volume_in_another_unit_is_said_and_kept(ratio):
    d = walk()
    d.loc[120:, 'volume'] *= ratio
    good, report = clean(d, '1h')
    row, = units(report).to_dict('records')
    assert (row['column'], row['action'], row['first'], len(good)) == ('volume', 'kept', d['time'][120], 200)
    assert abs(math.log10(float(row['note'].split()[3]) / ratio)) < .5
    joined, report = clean(d, '1h', units={S: [(d['time'][120], 1, ratio)]})
    assert not len(units(report, 'kept'))
    np.testing.assert_allclose(joined['volume'], walk()['volume'] * ratio)
    np.testing.assert_array_equal(joined['close'], d['close'])

def test_taker_above_volume_is_said():
    d = walk()
    taker = d['volume'] * np.where(np.arange(200) == 7, 2., 1.)
    report = clean(d.assign(taker_buy_volume=taker), '1h')[1]
    assert report.defects[['defect', 'column', 'count', 'action']].values.tolist() == [
        ['above volume', 'taker_buy_volume', 1, 'kept']]

# ---- the grid

@pytest.mark.parametrize('freq, start, timeframe', [
    ('D', '2023-01-01 16:00', None), ('D', '2023-01-01 18:30', '1d'), ('7D', '2023-01-02', '7d'),
    ('4h', '2023-01-01 01:00', None), ('12h', '2023-01-01 08:00', '12h')])
def test_bars_may_begin_at_another_hour(freq, start, timeframe, engineer):
    d = walk(60, freq=freq, start=start)
    good, report = clean(d, timeframe)
    pd.testing.assert_frame_equal(good, d)
    assert not len(report.defects)
    gone = d.drop(index=[20, 21])
    panel, report = read_panel(gone, timeframe=timeframe)
    assert report.defects[['defect', 'count']].values.tolist() == [['missing bar', 2]]
    pd.testing.assert_frame_equal(panel.frame(), gone.reset_index(drop=True))
    assert panel.time.equals(pd.DatetimeIndex(d['time'])) and (np.diff(panel.bar_number) == 1).all()
    closed = clean(d, timeframe, now=d['time'].iloc[-1] + panel.timeframe)[1]
    assert not len(closed.defects)
    stream = engineer.stream(S, panel.timeframe)
    live = np.array([stream.update(bar) for bar in gone.to_dict('records')])
    assert live.tobytes() == engineer.transform(panel).to_numpy().tobytes()

@pytest.mark.parametrize('shift, word', [
    ('3599999ms', 'stamped with their close'),
    ('3599s', 'stamped with their close'),
    ('7min', 'all 200 rows are off the 1h grid'),
    ('30min', 'all 200 rows are off the 1h grid')])
def test_bars_that_open_nowhere(shift, word):
    with pytest.raises(DataError, match=word): clean(walk().assign(time=walk()['time'] + pd.Timedelta(shift)))

@pytest.mark.parametrize('late, kept', [('14s', True), ('1ms', True), ('60s', True), ('61s', False), ('-1s', False)])
def test_late_stamps_are_put_back(late, kept):
    d = walk()
    d.loc[50:109, 'time'] += pd.Timedelta(late)
    good, report = clean(d, '1h')
    row, = report.defects[report.defects['column'] == 'time'].query('defect != "missing bar"').to_dict('records')
    assert (row['defect'], row['action'], row['count']) == (
        ('late stamp', 'snapped', 60) if kept else ('off the grid', 'dropped', 60))
    if kept: pd.testing.assert_frame_equal(good, walk())
    else: assert len(good) == 140

def test_a_late_stamp_whose_place_is_taken_is_dropped():
    d = walk()
    twice = pd.concat([d, d[60:61].assign(time=d['time'][60] + pd.Timedelta('5s'), close=1.)]).sort_values('time')
    good, report = clean(twice, '1h')
    pd.testing.assert_frame_equal(good, d)
    assert report.defects[['defect', 'count']].values.tolist() == [['off the grid', 1]]

def test_a_panel_has_one_grid():
    d = walk(60, freq='D')
    d.loc[30, 'time'] += pd.Timedelta('1h')
    with pytest.raises(DataError, match='1 are off the 1d grid'): to_panel(d, '1d')

# ---- real bars

@real
@pytest.mark.parametrize('name, spikes', [('spot_1h', 1), ('spot_1d', 1), ('perp_4h', 1), ('spot_1h_kraken', 1)])
def test_no_change_of_unit_in_real_bars(name, spikes):
    report = read_panel(Path(os.environ['CRYPTOML_DATA']) / f'{name}.parquet')[1]
    assert not len(units(report)) and report.defects.query('defect == "spike"')['count'].sum() == spikes
    assert set(report.defects['defect']) <= {'missing bar', 'zero volume', 'spike'}
