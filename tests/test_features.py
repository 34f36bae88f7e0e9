"Every feature: truncation, warm-up, stream = batch (suites 1 to 3), hostile bars, clocks, processes"
import os, subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from cryptoml.crossexchange import cross_frame, funding_frame
from cryptoml.data import DataError, clean, market_frame, to_panel
from cryptoml.engine import step
from cryptoml.features import FAMILIES, AdvancedFeatureEngineer, catalogue
from cryptoml.onchain import onchain_frame
from cryptoml.simulate import simulate

needs_data = pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')
engineer, technical = AdvancedFeatureEngineer(), AdvancedFeatureEngineer(['technical'])
table = catalogue()


def other_venues(bars, seed=0):
    "Bars of a second spot venue and of perpetuals, a little off"
    rng = np.random.default_rng(seed)
    off = lambda k: bars.assign(close=bars.close * np.exp(rng.normal(0, k, len(bars))), volume=bars.volume * rng.uniform(.5, 1.5, len(bars)), open_interest=1000 * np.exp(rng.normal(0, .01, len(bars)).cumsum()))
    return pd.concat([cross_frame(off(5e-4), 'kraken'), cross_frame(off(1e-3), 'binance', 'perp')], ignore_index=True)


def simulated():
    "Six coins with missing bars, bad bars and a gap of two days, and their sources"
    market = simulate(n_symbols=6, n_bars=2000, seed=3)
    sources = dict(onchain=market.onchain, funding=market.funding, cross_exchange=other_venues(market.bars))
    bars = market.bars
    bars.loc[[700, 2700], 'close'] = np.nan
    bars.loc[[1500], 'low'] = bars.loc[1500, 'high'] * 2
    return bars.drop([*range(400, 405), *range(900, 950), 3000, 3002]).reset_index(drop=True), sources


def real():
    "Six coins, their perpetuals, a second venue, funding and Bitcoin's chain"
    root, span = Path(os.environ['CRYPTOML_DATA']), dict(start='2020-12-01', end='2021-04-01')
    coins = [f'{c}/USDT' for c in ('BTC', 'ETH', 'ADA', 'DOGE', 'LINK', 'XRP')]
    read = lambda name, **k: market_frame(root/name, **(span | k))
    venues = pd.concat([cross_frame(read('perp_1h.parquet', symbols=['BTC/USDT']), 'binance', 'perp'), cross_frame(read('spot_1h_kraken.parquet'), 'kraken')])
    sources = dict(onchain=onchain_frame(pd.read_parquet(root/'onchain_btc_daily.parquet')), funding=funding_frame(pd.read_parquet(root/'funding_8h.parquet')), cross_exchange=venues)
    return clean(read('spot_1h.parquet', symbols=coins))[0], sources


@pytest.fixture(scope='module', params=['simulated', pytest.param('real', marks=needs_data)])
def data(request): return simulated() if request.param == 'simulated' else real()


@pytest.fixture(scope='module')
def bars(data): return data[0]


@pytest.fixture(scope='module')
def X(data): return engineer.transform(data[0], '1h', **data[1])


def bits(a): return np.ascontiguousarray(a).tobytes()


def known(sources, now): return {k: v[v.known <= now] for k, v in sources.items()}


def test_everything_is_compiled_and_has_values(X):
    assert engineer._batch.plain == []
    assert X.columns.tolist() == table.name.tolist() and len(table) >= 150
    assert set(table.family) == set(FAMILIES) and (table[['formula', 'unit', 'inputs', 'delay']] != '').all(axis=None)
    per = table.groupby('family').size()
    assert per.technical >= 110 and per.onchain >= 10 and per.microstructure >= 12 and per.crossexchange >= 10 and per.crosssection >= 12
    plain = ~table.inputs.str.contains('taker|frame|trades')
    there = X.notna().mean()[plain.to_numpy()]
    assert (there > 0.05).all() and there.mean() > 0.85, there.nsmallest(5)
    assert not np.isinf(X.to_numpy()).any()
    given = table.inputs.str.contains('funding frame|cross_exchange frame').to_numpy()
    assert X.loc['BTC/USDT'].loc[:, given].notna().any().mean() > 0.6


def test_truncation(data, X):
    "Suite 1: the value at t from bars and sources cut at t is the value from all data, to the last bit"
    bars, sources = data
    times = np.sort(bars.time.unique())
    for t in times[[3, 40, *np.linspace(60, len(times) - 1, 16).astype(int)]]:
        t = pd.Timestamp(t)
        cut = engineer.transform(bars[bars.time <= t], '1h', **known(sources, t + pd.Timedelta('1h')))
        assert bits(cut.xs(t, level='time')) == bits(X.xs(t, level='time')), t


def test_what_comes_later_cannot_reach_back(data, X):
    bars, sources = data
    late, edge = bars.time > bars.time.quantile(0.7), bars.time.quantile(0.7) + pd.Timedelta('1h')
    changed = bars.copy()
    changed.loc[late, ['open', 'high', 'low', 'close', 'volume']] *= 7
    def spoilt(frame):
        numbers = frame.select_dtypes('number').columns
        return frame.assign(**{c: frame[c].where(frame.known <= edge, 7 * frame[c]) for c in numbers})
    Z = engineer.transform(changed, '1h', **{k: spoilt(v) for k, v in sources.items()})
    assert bits(Z[~late.to_numpy()]) == bits(X[~late.to_numpy()])


def test_warm_up():
    "Suite 2: at the declared warm-up the start has less than 1e-3 standard deviations of influence, and `first` is the first value"
    market = simulate(n_symbols=6, n_bars=2600, seed=5)
    bars, sources, name = market.bars, dict(funding=market.funding, cross_exchange=other_venues(market.bars)), 'ETH/USDT'
    full, rows, cols = engineer.transform(bars, '1h', **sources).loc[name].to_numpy(), table.warm_up.to_numpy() - 1, np.arange(len(table))
    starts, times = np.linspace(400, 2600 - rows.max() - 2, 8).astype(int), bars.time.unique()
    part = lambda s: engineer.transform(bars[(bars.time >= times[s]) & (bars.time <= times[s + rows.max()])], '1h', **sources).loc[name].to_numpy()
    parts = np.array([part(s) for s in starts])
    present = ~np.isnan(full).all(0)
    now, then = parts[:, rows, cols], full[starts[:, None] + rows, cols]
    same = (now == then) | np.isnan(now) & np.isnan(then)                                   # constant, or a source that has not spoken yet
    left = np.where(same, 0, np.abs(now - then) / np.maximum(pd.DataFrame(full).std().to_numpy(), 1e-300)).max(0)
    assert pd.Series(left, table.name)[present & ~(left < 1e-3)].empty
    begun, present = ~np.isnan(parts), present & ~table.inputs.str.contains('funding').to_numpy()    # funding counts settlements
    assert ((begun.argmax(1) == table['first'].to_numpy() - 1) | ~present).all()
    assert (begun.sum(1) == rows.max() + 1 - begun.argmax(1))[:, present].all()            # and no hole after it


def test_stream_is_batch(data):
    "Suite 3: bars alone, one time after the other, to the last bit, saved and restored on the way"
    bars = data[0]
    X, stream, out = engineer.transform(bars, '1h'), engineer.panel_stream(sorted(bars.symbol.unique()), '1h'), {}
    for k, (t, rows) in enumerate(bars.groupby('time')):
        if k % 997 == 0:
            kept, stream = stream.state(), engineer.panel_stream(stream.symbols, '1h')
            stream.restore(kept)
        Y = stream.update({r['symbol']: r for r in rows.to_dict('records')})
        out |= {(s, t): Y[stream.symbols.index(s)] for s in rows.symbol}
    assert bits(np.array(list(out.values()))) == bits(X.loc[list(out)])


def test_stream_with_sources_is_batch(data):
    "The same with every source as it was known at each close"
    bars, sources = data
    bars = bars[bars.time < bars.time.min() + pd.Timedelta('190h')]
    bars = bars[bars.symbol.isin(['BTC/USDT', *sorted(bars.symbol.unique())[:2]])]
    X, stream, out = engineer.transform(bars, '1h', **sources), engineer.panel_stream(sorted(bars.symbol.unique()), '1h'), {}
    for t, rows in bars.groupby('time'):
        now = t + pd.Timedelta('1h')
        back = dict(onchain='376D', funding='31D', cross_exchange='6h')
        Y = stream.update({r['symbol']: r for r in rows.to_dict('records')}, **{k: v[v.known > now - pd.Timedelta(back[k])] for k, v in known(sources, now).items()})
        out |= {(s, t): Y[stream.symbols.index(s)] for s in rows.symbol}
    assert bits(np.array(list(out.values()))) == bits(X.loc[list(out)])


def test_a_coin_alone_is_its_own_stream(data):
    bars = data[0][data[0].symbol == 'BTC/USDT']
    stream, X = engineer.stream('BTC/USDT', '1h'), engineer.transform(bars, '1h')
    assert bits(np.array([stream.update(bar) for bar in bars.to_dict('records')])) == bits(X)
    assert X.loc[:, table.inputs.str.contains('other coins|frame').to_numpy()].isna().all(axis=None)


def test_table_and_array_agree(data):
    good = clean(data[0])[0]
    panel = to_panel(good)
    Z = engineer.transform_panel(panel, **data[1])
    assert Z.dtype == np.float64 and Z.shape == (*panel.mask.shape, len(table))
    assert bits(Z[panel.mask]) == bits(engineer.transform(good, **data[1])) and np.isnan(Z[~panel.mask]).all()


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
    last = technical.transform(frame).iloc[-1]
    assert last.notna().all(), last[last.isna()].index.tolist()


# --- clocks, processes, errors

def one_coin(n): return simulated()[0].query('symbol == "BTC/USDT"')[:n].reset_index(drop=True)

def test_any_zone_and_unit_of_time_is_the_same():
    frame = one_coin(500)
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
    frame = one_coin(300)
    some = engineer.transform(frame.drop(columns=['quote_volume', 'trades', 'taker_buy_volume']), '1h')
    full = engineer.transform(frame, '1h')
    reads = table.inputs.str.contains('taker|trades|quote').to_numpy() | table.inputs.str.contains('frame').to_numpy()
    assert bits(some.loc[:, ~reads]) == bits(full.loc[:, ~reads]) and some.loc[:, reads].isna().all(axis=None)


def test_one_s_own_step_and_what_it_needs():
    @step('gap_to_mean', unit='ratio')
    def gap_to_mean(sma_distance_20, W, s, n, y): y[0] = -sma_distance_20
    own = AdvancedFeatureEngineer([gap_to_mean])
    assert own.columns == ['gap_to_mean'] and own.family_of == ['own'] and own.model_ready == [True]
    both = AdvancedFeatureEngineer(['technical', gap_to_mean])
    assert both.columns == [*technical.columns, 'gap_to_mean']
    frame = one_coin(300)
    np.testing.assert_array_equal(own.transform(frame, '1h')['gap_to_mean'], -both.transform(frame, '1h')['sma_distance_20'])


def test_numbers_as_text_and_missing_columns_of_a_bar():
    stream, texts, frame = engineer.stream('BTC/USDT'), engineer.stream('BTC/USDT'), one_coin(40)
    for bar in frame.to_dict('records'):
        bar['trades'] = None
        words = {k: v if k in ('time', 'symbol') or v is None else str(v) for k, v in bar.items()}
        assert bits(stream.update(bar)) == bits(texts.update(words))
    rows = [stream.update(bar | dict(time=bar['time'] + pd.Timedelta('40h'))) for bar in frame[:2].to_dict('records')]
    assert bits(rows[0]) != bits(rows[1])                                                    # each update gives a row of its own


def test_errors_say_what_is_wrong():
    frame = one_coin(50)
    with pytest.raises(TypeError, match='unknown source gossip'): engineer.transform(frame, gossip=None)
    with pytest.raises(TypeError, match='unknown source gossip'): engineer.stream('BTC/USDT').update(frame.iloc[0], gossip=None)
    assert len(engineer.transform(frame, '1h', onchain=None, sentiment=None)) == 50
    with pytest.raises(DataError, match='BTC/USDT: bar number'): engineer.transform(pd.concat([frame, frame]), '1h')
    panel = engineer.panel_stream(['BTC/USDT', 'ETHUSDT'])
    bar = frame.iloc[0].to_dict()
    with pytest.raises(DataError, match='no stream for XRP/USDT'): panel.update({'XRP/USDT': bar})
    with pytest.raises(DataError, match='2 different times'): panel.update({'BTC/USDT': bar, 'ETH/USDT': frame.iloc[1].to_dict() | dict(symbol='ETH/USDT')})
    with pytest.raises(ValueError, match='nothing of ETH/USDT'): panel.restore({'BTC/USDT': engineer.stream('BTC/USDT').state(), '': b''})


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
