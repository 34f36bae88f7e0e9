"Every feature: truncation, warm-up, stream = batch (suites 1 to 3), hostile bars, clocks, processes"
import os, subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from cryptoml.data import DataError, clean, market_frame, to_panel
from cryptoml.engine import family
from cryptoml.features import FAMILIES, AdvancedFeatureEngineer, catalogue
from cryptoml.simulate import simulate

needs_data = pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')
engineer = AdvancedFeatureEngineer()
table = catalogue()


def simulated():
    "Two coins with missing bars, bad bars and a gap of two days"
    bars = simulate(n_symbols=2, n_bars=3000, seed=3).bars
    bars.loc[[700, 3700], 'close'] = np.nan
    bars.loc[[1500], 'low'] = bars.loc[1500, 'high'] * 2
    return bars.drop([*range(400, 405), *range(900, 950), 4000, 4002]).reset_index(drop=True)


def real():
    bars = market_frame(Path(os.environ['CRYPTOML_DATA']) / 'spot_1h.parquet', symbols=['BTC/USDT', 'DOGE/USDT'], start='2019-06-01', end='2020-06-01')
    return clean(bars)[0]


@pytest.fixture(scope='module', params=['simulated', pytest.param('real', marks=needs_data)])
def bars(request): return simulated() if request.param == 'simulated' else real()


@pytest.fixture(scope='module')
def X(bars): return engineer.transform(bars, '1h')


def bits(a): return np.ascontiguousarray(a).tobytes()


def test_everything_is_compiled_and_has_values(X):
    assert engineer._batch.plain == []
    assert X.columns.tolist() == table.name.tolist() and len(table) >= 60
    assert set(table.family) == set(FAMILIES) and (table[['formula', 'unit']] != '').all(axis=None)
    taker = table.inputs.str.contains('taker').to_numpy()
    present = X.notna().mean()
    assert (present[~taker] > 0.6).all() and not np.isinf(X.to_numpy()).any()


def test_truncation(bars, X):
    "Suite 1: the value at t from data cut at t is the value from all data, to the last bit"
    for symbol, frame in bars.groupby('symbol'):
        full = X.loc[symbol].to_numpy()
        for t in [*range(0, 60, 7), *np.linspace(60, len(frame) - 1, 25).astype(int)]:
            assert bits(engineer.transform(frame[:t + 1], '1h').to_numpy()[-1]) == bits(full[t]), (symbol, t)


def test_warm_up(bars, X):
    "Suite 2: at the declared warm-up the start has less than 1e-3 standard deviations of influence, and `first` is the first value"
    steady = clean(bars)[0].query('symbol == "BTC/USDT"').reset_index(drop=True)
    edge = np.r_[0, np.flatnonzero(np.diff(steady.time) > pd.Timedelta('25h')) + 1, len(steady)]            # longer gaps are a new start
    k = np.diff(edge).argmax()
    steady = steady[edge[k]:edge[k + 1]]
    full, rows = engineer.transform(steady, '1h').to_numpy(), table.warm_up.to_numpy() - 1
    starts = np.linspace(200, len(steady) - rows.max() - 2, 20).astype(int)
    assert starts[-1] > 300
    parts = np.array([engineer.transform(steady[s:s + rows.max() + 1], '1h').to_numpy() for s in starts])
    cols = np.arange(len(table))
    present = ~np.isnan(full).all(0)
    left = np.abs(parts[:, rows, cols] - full[starts[:, None] + rows, cols]).max(0) / pd.DataFrame(full).std().to_numpy()
    assert pd.Series(left, table.name)[present & ~(left < 1e-3)].empty
    begun = ~np.isnan(parts)
    assert ((begun.argmax(1) == table['first'].to_numpy() - 1) | ~present).all()
    assert (begun.sum(1) == rows.max() + 1 - begun.argmax(1))[:, present].all()            # and no hole after it


def test_stream_is_batch(bars, X):
    "Suite 3: one bar at a time, to the last bit, saved and restored on the way"
    for symbol, frame in bars.groupby('symbol'):
        stream, out = engineer.stream(symbol, '1h'), []
        for k, bar in enumerate(frame.to_dict('records')):
            if k % 997 == 0:
                kept, stream = stream.state(), engineer.stream(symbol, '1h')
                stream.restore(kept)
            out.append(stream.update(bar))
        assert bits(np.array(out)) == bits(X.loc[symbol])


def test_table_array_and_single_symbols_agree(bars, X):
    for symbol, frame in bars.groupby('symbol'): assert bits(engineer.transform(frame, '1h')) == bits(X.loc[symbol])
    good = clean(bars)[0]
    panel = to_panel(good)
    Z = engineer.transform_panel(panel)
    assert Z.dtype == np.float64 and Z.shape == (*panel.mask.shape, len(table))
    assert bits(Z[panel.mask]) == bits(engineer.transform(good)) and np.isnan(Z[~panel.mask]).all()


def test_a_later_bar_cannot_reach_back(bars, X):
    changed = bars.copy()
    late = changed.time > changed.time.quantile(0.7)
    changed.loc[late, ['open', 'high', 'low', 'close', 'volume']] *= 7
    assert bits(engineer.transform(changed, '1h')[~late.to_numpy()]) == bits(X[~late.to_numpy()])


# --- hostile bars

prices = st.sampled_from([1e-8, 3e-8, 1e-3, 1., 2., 100., 1e5, 1e8])
volumes = st.sampled_from([0., 1e-12, 1., 1e6, 1e12])


@st.composite
def hostile(draw):
    "Runs of frozen, tiny, huge, jumping and broken bars"
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        p, q, v = draw(prices), draw(prices), draw(volumes)
        kind = draw(st.sampled_from(['flat', 'steps', 'noise', 'empty', 'broken']))
        n, rng = draw(st.integers(1, 200)), np.random.default_rng(draw(st.integers(0, 99)))
        c = np.full(n, p) if kind in ('flat', 'empty') else np.where(np.arange(n) % 2, p, q) if kind == 'steps' else p * np.exp(np.cumsum(rng.normal(0, .05, n)))
        o = np.r_[c[0], c[:-1]]
        part = pd.DataFrame(dict(open=o, high=np.maximum(o, c), low=np.minimum(o, c), close=c, volume=0. if kind == 'empty' else v, taker_buy_volume=v * rng.uniform(0, 1, n)))
        if kind == 'broken': part.iloc[rng.integers(n), rng.integers(5)] = rng.choice([np.nan, 0., -1., np.inf])
        rows.append(part)
    frame = pd.concat(rows, ignore_index=True)
    gaps = np.cumsum(np.where(np.random.default_rng(len(frame)).random(len(frame)) < .01, 30, 1))
    return frame.assign(time=pd.Timestamp('2021-01-01', tz='UTC') + pd.to_timedelta(gaps, 'h'), symbol='A/USDT')


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(hostile())
def test_hostile_bars_give_no_infinity(frame):
    out = engineer.transform(frame.replace([np.inf], np.nan), '1h')
    assert not np.isinf(out.to_numpy()).any()
    stream = engineer.stream('A/USDT')
    live = np.array([stream.update(bar) for bar in frame.to_dict('records')])                # infinite prices reach a stream
    assert bits(live) == bits(out)


@pytest.mark.parametrize('volume', [0., 1e12])
@pytest.mark.parametrize('price', [1e-8, 1e5])
def test_a_frozen_market_has_values_everywhere(price, volume):
    frame = pd.DataFrame(dict(time=pd.date_range('2021-01-01', periods=1300, freq='h', tz='UTC'), symbol='A/USDT', open=price, high=price, low=price, close=price,
                              volume=volume, taker_buy_volume=volume / 2))
    last = engineer.transform(frame).iloc[-1]
    assert last.notna().all(), last[last.isna()].index.tolist()


# --- clocks, processes, errors

def test_any_zone_and_unit_of_time_is_the_same():
    frame = simulated()[:500]
    expected = bits(engineer.transform(frame, '1h'))
    for time in (frame.time.dt.tz_localize(None), frame.time.dt.tz_convert('America/New_York'), frame.time.astype('int64') // 1000, frame.time.astype(str)):
        assert bits(engineer.transform(frame.assign(time=time), '1h')) == expected
    for t in (lambda x: x, lambda x: x.tz_convert('Asia/Tokyo'), lambda x: x.to_pydatetime(), lambda x: int(x.timestamp()), lambda x: int(x.timestamp() * 1000), str):
        stream = engineer.stream('BTCUSDT', '1h')
        out = [stream.update(bar | dict(time=t(bar['time']))) for bar in frame[:50].to_dict('records')]
        assert bits(np.array(out)) == bits(engineer.transform(frame[:50], '1h'))


def test_other_timeframes():
    frame = simulate(n_symbols=1, n_bars=600, seed=1, timeframe='15m').bars
    X = engineer.transform(frame)
    assert bits(X) == bits(engineer.transform(frame, '15m'))
    stream = engineer.stream(frame.symbol[0], '15m')
    assert bits(np.array([stream.update(bar) for bar in frame.to_dict('records')])) == bits(X)
    with pytest.raises(DataError, match='in order of time, each once'): engineer.transform(frame, '1h')      # four bars in one hour


def test_optional_columns_may_be_absent():
    frame = simulated()[:300]
    some = engineer.transform(frame.drop(columns=['quote_volume', 'trades', 'taker_buy_volume']), '1h')
    full = engineer.transform(frame, '1h')
    reads = table.inputs.str.contains('taker|trades|quote').to_numpy()
    assert bits(some.loc[:, ~reads]) == bits(full.loc[:, ~reads]) and some.loc[:, reads].isna().all(axis=None)


def test_one_s_own_step_and_what_it_needs():
    @family('gap_to_mean', unit='ratio')
    def gap_to_mean(sma_distance_20, W, s, n, y): y[0] = -sma_distance_20
    own = AdvancedFeatureEngineer([gap_to_mean])
    assert own.columns == ['gap_to_mean'] and own.family_of == ['own'] and own.model_ready == [True]
    both = AdvancedFeatureEngineer(['technical', gap_to_mean])
    assert both.columns == [*engineer.columns, 'gap_to_mean']
    frame = simulated()[:300]
    np.testing.assert_array_equal(own.transform(frame, '1h')['gap_to_mean'], -both.transform(frame, '1h')['sma_distance_20'])


def test_errors_say_what_is_wrong():
    frame = simulated()[:50]
    with pytest.raises(TypeError, match='unknown source gossip'): engineer.transform(frame, gossip=None)
    with pytest.raises(TypeError, match='unknown source gossip'): engineer.stream('BTC/USDT').update(frame.iloc[0], gossip=None)
    assert len(engineer.transform(frame, '1h', onchain=None, sentiment=None)) == 50
    with pytest.raises(DataError, match='BTC/USDT: bar number'): engineer.transform(pd.concat([frame, frame]), '1h')
    panel = engineer.panel_stream(['BTC/USDT', 'ETHUSDT'])
    bar = frame.iloc[0].to_dict()
    with pytest.raises(DataError, match='no stream for XRP/USDT'): panel.update({'XRP/USDT': bar})
    with pytest.raises(DataError, match='2 different times'): panel.update({'BTC/USDT': bar, 'ETH/USDT': frame.iloc[1].to_dict() | dict(symbol='ETH/USDT')})
    with pytest.raises(ValueError, match='nothing of ETH/USDT'): panel.restore({'BTC/USDT': engineer.stream('BTC/USDT').state()})


def test_another_process_reads_the_state():
    "The layout, and so the digest of a state, must not depend on the order of a set"
    script = '''
import sys, hashlib
from cryptoml.features import AdvancedFeatureEngineer
from cryptoml.simulate import simulate
bars = simulate(n_symbols=1, n_bars=100, seed=0).bars.to_dict('records')
stream = AdvancedFeatureEngineer().stream('BTC/USDT')
for bar in bars: row = stream.update(bar)
print(hashlib.sha256(stream.state()).hexdigest(), hashlib.sha256(row).hexdigest())
'''
    run = lambda seed: subprocess.run([sys.executable, '-c', script], env={**os.environ, 'PYTHONHASHSEED': seed}, capture_output=True, text=True, check=True).stdout
    assert run('1') == run('2')


def test_no_step_reads_outside_its_arrays(tmp_path):
    "All steps compiled anew with numba's bounds checks"
    script = '''
import numpy as np
from cryptoml.features import AdvancedFeatureEngineer
from cryptoml.simulate import simulate
X = AdvancedFeatureEngineer().transform(simulate(n_symbols=1, n_bars=1500, seed=0).bars)
np.save('x.npy', X.to_numpy())
'''
    env = {**os.environ, 'NUMBA_BOUNDSCHECK': '1', 'CRYPTOML_CACHE': str(tmp_path)}
    done = subprocess.run([sys.executable, '-c', script], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and 'IndexError' not in done.stderr, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / 'x.npy'), engineer.transform(simulate(n_symbols=1, n_bars=1500, seed=0).bars), rtol=1e-9)
