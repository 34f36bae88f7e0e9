"What was known when: against a loop over all rows, with delays, zones and disorder"
import numpy as np
import pandas as pd
from hypothesis import given, settings, strategies as st

from cryptoml.data import as_of

HOUR = pd.Timedelta('1h')
published = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from('ab')), min_size=1, max_size=15)
asked = st.lists(st.tuples(st.integers(0, 20), st.sampled_from('ab')), min_size=1, max_size=9)

@settings(max_examples=100, deadline=None, derandomize=True)
@given(published, asked)
def test_as_of_against_a_loop(rows, ask):
    zero = pd.Timestamp('2024-01-01', tz='UTC')
    def row(i, t, delay, symbol):
        time = zero + t * HOUR
        return dict(time=time, known=time + delay * HOUR, symbol=symbol, value=float(i))
    source = pd.DataFrame([row(i, *r) for i, r in enumerate(rows)])
    source = source.drop_duplicates(['time', 'known', 'symbol'], ignore_index=True)
    when = pd.DataFrame([dict(time=zero + t * HOUR, symbol=s) for t, s in ask], index=range(5, 5 + len(ask)))
    out = as_of(when, source, by='symbol', max_age='9h')
    assert out.index.equals(when.index)
    for i, (w, s) in when.iterrows():
        there = source[(source.symbol == s) & (source.known <= w)].sort_values(['time', 'known'])
        young = len(there) and w - there.time.iloc[-1] <= pd.Timedelta('9h')
        np.testing.assert_equal(out.value[i], there.value.iloc[-1] if young else np.nan)


def test_a_daily_value_waits_for_its_day_and_delay():
    days = pd.date_range('2024-01-01', periods=30, tz='UTC')
    daily = pd.DataFrame(dict(timestamp=days, asset='btc', AdrActCnt=np.arange(30)))
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
    local = pd.Series(when.tz_convert('Asia/Tokyo'))[shuffled]
    seen = as_of(local, daily.sample(frac=1, random_state=1), delay='0h').value.to_numpy()
    np.testing.assert_array_equal(seen, expect[shuffled])
