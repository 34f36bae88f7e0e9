"Finer bars put together: as pandas makes them, whole or not there, and the same whenever one looks"
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from cryptoml.data import DataError, clean, parse_timeframe, read_panel, resample

HOW = dict(open='first', high='max', low='min', close='last', volume='sum')

def quarters(n, seed=0, symbol='BTC/USDT', start='2024-01-01 10:00'):
    "Bars of a quarter of an hour"
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(rng.normal(0, .002, n).cumsum())
    open = np.r_[100., close[:-1]]
    time = pd.date_range(start, periods=n, freq='15min', tz='UTC').as_unit('us')
    high, low = np.maximum(open, close) * 1.001, np.minimum(open, close) * .999
    return pd.DataFrame(dict(time=time, symbol=symbol, open=open, high=high, low=low, close=close,
                             volume=rng.uniform(1, 9, n), trades=rng.integers(1, 99, n).astype(float)))

@pytest.mark.parametrize('timeframe', ['30m', '1h', '4h', '1d'])
def test_whole_bars_are_those_of_pandas(timeframe):
    fine = pd.concat([quarters(700, 1), quarters(700, 2, 'ETH/USDT', '2024-01-02 00:15')])
    made, report = resample(fine, timeframe)
    length = parse_timeframe(timeframe)
    for symbol, mine in fine.groupby('symbol'):
        by = mine.set_index('time').resample(length, label='left', closed='left')
        theirs = by.agg(HOW | dict(trades='sum'))[by.size() == length // pd.Timedelta('15min')]
        own = made[made['symbol'] == symbol].set_index('time')
        assert own.index.equals(theirs.index) and len(own)
        np.testing.assert_allclose(own[list(theirs)], theirs, rtol=1e-13)
    assert report.bars == len(made) and report.timeframe == length and report.rows == 1400

@settings(max_examples=60, deadline=None, derandomize=True)
@given(gone=st.sets(st.integers(20, 179), max_size=30), cut=st.integers(24, 180), seed=st.integers(0, 9))
def test_a_coarser_bar_is_what_was_known_when_its_last_finer_one_closed(gone, cut, seed):
    "Whatever is missing and whenever one looks: no bar is there before its close, and none changes later"
    fine = quarters(180, seed).drop(index=sorted(gone))
    whole, _ = resample(fine, '1h')
    some = fine[fine.index < cut]
    seen, _ = resample(some, '1h')
    clock = pd.Timestamp('2024-01-01 10:00', tz='UTC') + cut * pd.Timedelta('15min')
    pd.testing.assert_frame_equal(seen, whole[whole['time'] + pd.Timedelta('1h') <= clock].reset_index(drop=True))
    by_clock, _ = resample(fine, '1h', now=clock)
    pd.testing.assert_frame_equal(by_clock, seen)
    there = fine.groupby(fine['time'].dt.floor('h')).size()
    assert set(whole['time']) == set(there[there == 4].index)

@pytest.mark.parametrize('column, value', [('close', np.nan), ('low', -1.), ('high', 1e9)])
def test_a_coarser_bar_with_a_wrong_finer_one_is_not_there(column, value):
    fine = quarters(120)
    fine.loc[63, column] = value
    made, report = resample(fine, '1h')
    assert len(made) == 29 and fine['time'][60] not in set(made['time'])
    assert report.defects.set_index('defect')['count']['incomplete bar'] == 1

def test_a_missing_number_stays_missing():
    fine = quarters(80)
    fine.loc[5, 'trades'] = np.nan
    made, _ = resample(fine, '1h')
    assert made['trades'].isna().tolist() == [False, True] + [False] * 18

def test_coins_of_several_lengths():
    "Each is put together from what it has; what cannot be is left out, and the sentence says why"
    hourly, _ = resample(quarters(160, 3, 'ETH/USDT'), '1h')
    odd = quarters(160, 4, 'XRP/USDT')
    odd = odd.assign(time=pd.date_range('2024-01-01', periods=160, freq='45min', tz='UTC').as_unit('us'))
    young = quarters(160, 5, 'SOL/USDT')[:5]                         # so few that its spacing tells nothing
    given = pd.concat([quarters(160), hourly, odd, young])
    panel, report = read_panel(given, timeframe='1h', resample=True)
    assert panel.symbols == ['BTC/USDT', 'ETH/USDT', 'SOL/USDT']
    assert panel.mask.sum(1).tolist() == [40, 40, 1]
    assert 'steps by 45m, not by 1h: pass bars of one timeframe' in report.refused['XRP/USDT']
    with pytest.raises(DataError, match='BTC/USDT steps by 15m, not by 1h: pass resample=True'):
        read_panel(quarters(160), timeframe='1h')
    with pytest.raises(DataError, match='resample=True: pass timeframe'): read_panel(given, resample=True)

def test_a_history_put_together_is_the_history():
    "The panel of hours, and its digest, from the hours and from their quarters"
    fine = quarters(800).assign(volume=2.)                          # sums without rounding
    hourly, _ = resample(fine, '1h')
    ours, report = read_panel(fine, timeframe='1h', resample=True)
    theirs, same = read_panel(hourly, timeframe='1h', resample=True)
    assert report.digest == same.digest == clean(hourly)[1].digest
    np.testing.assert_array_equal(ours.values, theirs.values)

def test_bars_that_cross_the_borders_are_refused():
    shifted = quarters(200).assign(time=pd.date_range('2024-01-01 01:00', periods=200, freq='2h', tz='UTC'))
    with pytest.raises(DataError, match='bars of 2h cross the borders of 4h bars'): resample(shifted, '4h')

def test_a_quiet_minute_is_no_stuck_feed():
    fine = quarters(200)
    for c in ('open', 'high', 'low', 'close'): fine.loc[100:111, c] = fine['close'][99]
    quiet, traded = (fine.assign(volume=fine['volume'].where((fine.index < 100) | (fine.index > 111), v))
                     for v in (0., 3.))
    assert len(resample(quiet, '1h')[0]) == 50
    assert len(resample(traded, '1h')[0]) == 48
