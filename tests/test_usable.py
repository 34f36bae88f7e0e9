"One definition of a usable bar: in a table that is cleaned, in features of history, in a stream"
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from cryptoml.bar import accepted, usable
from cryptoml.data import CANDLE, EXTRA, DataError, clean
from cryptoml.engine import as_given
from cryptoml.features import AdvancedFeatureEngineer

HOUR = 3_600_000_000
GOOD = dict(open=10., high=11., low=9., close=10.5, volume=5.)

@pytest.fixture(scope='module')
def engineer(): return AdvancedFeatureEngineer([as_given('price', 'close')])

def frame_of(rows):
    time = pd.date_range('2024-01-01', periods=len(rows), freq='h', tz='UTC').as_unit('us')
    return pd.DataFrame(rows).assign(time=time, symbol='BTC/USDT')

def by_clean(frame):
    try: good = clean(frame, '1h')[0]
    except DataError: return np.zeros(len(frame), bool)
    return frame['time'].isin(good['time']).to_numpy()

def by_history(engineer, frame): return engineer.transform(frame, '1h')['price'].notna().to_numpy()

def by_stream(engineer, frame):
    stream = engineer.stream('BTC/USDT')
    return np.array([np.isfinite(stream.update(bar)[0]) for bar in frame.to_dict('records')])

def plain(bar):
    "The definition in words, without arrays"
    o, h, l, c, v = (bar[k] for k in CANDLE)
    rest = [bar[k] for k in EXTRA if k in bar]
    return (all(np.isfinite([o, h, l, c, v])) and l > 0 and l <= o <= h and l <= c <= h and v >= 0
            and not any(x < 0 or np.isinf(x) for x in rest))

@pytest.mark.parametrize('odd, can', [
    ({}, True),
    (dict(close=11., high=11.), True),
    (dict(open=9., low=9.), True),
    (dict(volume=0.), True),
    (dict(high=10., low=10., open=10., close=10.), True),
    (dict(close=11.1), False),
    (dict(close=8.9), False),
    (dict(open=11.1), False),
    (dict(open=8.9), False),
    (dict(high=8.), False),
    (dict(low=0.), False),
    (dict(low=-1.), False),
    (dict(open=0., low=0.), False),
    (dict(high=np.inf), False),
    (dict(volume=-1.), False),
    (dict(volume=np.inf), False),
    *[({c: np.nan}, False) for c in CANDLE],
    *[({c: np.nan}, True) for c in EXTRA],
    *[({c: 0.}, True) for c in EXTRA],
    *[({c: -1.}, False) for c in EXTRA],
    *[({c: np.inf}, False) for c in EXTRA],
])
def test_alike_in_all(engineer, odd, can):
    rows = [GOOD | dict(volume=5. + k, **dict.fromkeys(EXTRA, 1.)) for k in range(6)]
    rows[3] |= odd
    frame = frame_of(rows)
    expect = [True] * 3 + [can] + [True] * 2
    assert usable(**{k: v for k, v in rows[3].items()}) == can == plain(rows[3])
    assert by_clean(frame).tolist() == expect
    assert by_history(engineer, frame).tolist() == expect
    assert by_stream(engineer, frame).tolist() == expect

values = st.sampled_from([9., 10., 10., 11., 12., 0., -1., np.nan, np.inf])
odd_bars = st.lists(st.tuples(*[values] * 8), min_size=2, max_size=30)

@settings(max_examples=80, deadline=None, derandomize=True)
@given(raw=odd_bars)
def test_alike_for_any_bars(engineer, raw):
    frame = frame_of([dict(zip((*CANDLE, *EXTRA), (*row[:4], k + row[4], *row[5:]))) for k, row in enumerate(raw)])
    x = {c: frame[c].to_numpy() for c in (*CANDLE, *EXTRA)}
    expect = [plain(bar) for bar in frame.to_dict('records')]
    assert usable(**x).tolist() == expect
    assert accepted(x, pd.DatetimeIndex(frame['time']).asi8, HOUR).tolist() == expect      # prices are close together
    assert by_clean(frame).tolist() == expect
    assert by_history(engineer, frame).tolist() == expect
    assert by_stream(engineer, frame).tolist() == expect

def test_bars_away_from_the_level_are_alike_too(engineer):
    rng = np.random.default_rng(0)
    close = 10 * 1.01 ** rng.normal(size=300).cumsum()
    factor = np.ones(300)
    factor[[50, 120, 121, 200]] = 100., .01, 50., 3.               # bad prints
    rows = [dict(open=c, high=c * 1.01, low=c * .99, close=c, volume=5. + k) for k, c in enumerate(close * factor)]
    frame = frame_of(rows)
    expect = ~np.isin(np.arange(300), [50, 120, 121, 200])
    for found in (by_clean(frame), by_history(engineer, frame), by_stream(engineer, frame)):
        assert found.tolist() == expect.tolist()
