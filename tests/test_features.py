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
from cryptoml.sentiment import sentiment_frame
from cryptoml.simulate import simulate

needs_data = pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')
engineer = AdvancedFeatureEngineer()
technical = AdvancedFeatureEngineer(['technical'])
table = catalogue()


def other_venues(bars, seed=0):
    "Bars of a second spot venue and of perpetuals, a little off"
    rng, n = np.random.default_rng(seed), len(bars)
    def off(k):
        return bars.assign(close=bars.close * np.exp(rng.normal(0, k, n)),
                           volume=bars.volume * rng.uniform(.5, 1.5, n),
                           open_interest=1000 * np.exp(rng.normal(0, .01, n).cumsum()))
    return pd.concat([cross_frame(off(5e-4), 'kraken'), cross_frame(off(1e-3), 'binance', 'perp')], ignore_index=True)


def simulated():
    "Six coins with missing bars, bad bars and a gap of two days, and their sources"
    market = simulate(n_symbols=6, n_bars=2000, seed=3)
    early = market.sentiment.assign(**{c: market.sentiment[c] - pd.Timedelta('40D') for c in ('time', 'known')})
    sources = dict(onchain=market.onchain, funding=market.funding, cross_exchange=other_venues(market.bars),
                   sentiment=pd.concat([early, market.sentiment]))
    bars = market.bars
    bars.loc[[700, 2700], 'close'] = np.nan
    bars.loc[[1500], 'low'] = bars.loc[1500, 'high'] * 2
    return bars.drop([*range(400, 405), *range(900, 950), 3000, 3002]).reset_index(drop=True), sources


def headlines(root):
    "Real headlines with a lexicon's polarity, moved to the months of the bars"
    raw = pd.read_parquet(root/'crypto_news.parquet')
    coin = raw.subject.map(dict(bitcoin='BTC', ethereum='ETH')).fillna('')
    when = raw.timestamp - pd.Timedelta('365D')
    return sentiment_frame(pd.DataFrame(dict(time=when, symbol=coin, score=raw.polarity)))


def real():
    "Six coins, their perpetuals, a second venue, funding, Bitcoin's chain, and headlines of a year later"
    root = Path(os.environ['CRYPTOML_DATA'])
    coins = [f'{c}/USDT' for c in ('BTC', 'ETH', 'ADA', 'DOGE', 'LINK', 'XRP')]
    def read(name, **k): return market_frame(root/name, start='2020-12-01', end='2021-04-01', **k)
    perp = cross_frame(read('perp_1h.parquet', symbols=['BTC/USDT']), 'binance', 'perp')
    sources = dict(
        onchain=onchain_frame(pd.read_parquet(root/'onchain_btc_daily.parquet')),
        funding=funding_frame(pd.read_parquet(root/'funding_8h.parquet')),
        cross_exchange=pd.concat([perp, cross_frame(read('spot_1h_kraken.parquet'), 'kraken')]),
        sentiment=headlines(root))
    return clean(read('spot_1h.parquet', symbols=coins))[0], sources


@pytest.fixture(scope='module', params=['simulated', pytest.param('real', marks=needs_data)])
def data(request): return simulated() if request.param == 'simulated' else real()


@pytest.fixture(scope='module')
def bars(data): return data[0]


@pytest.fixture(scope='module')
def X(data): return engineer.transform(data[0], '1h', **data[1])


def bits(a): return np.ascontiguousarray(a).tobytes()


def known(sources, now): return {k: v[v.known <= now] for k, v in sources.items()}


def test_everything_is_compiled():
    assert engineer._batch.plain == []


@pytest.mark.parametrize('family, least', [
    ('technical', 110),
    ('onchain', 10),
    ('microstructure', 12),
    ('crossexchange', 10),
    ('sentiment', 8),
    ('crosssection', 12)])
def test_features_of_each_family(family, least):
    assert (table.family == family).sum() >= least


def test_catalogue():
    assert len(table) >= 150
    assert set(table.family) == set(FAMILIES)
    assert (table[['formula', 'unit', 'inputs', 'delay']] != '').all(axis=None)


def test_everything_has_values(X):
    assert X.columns.tolist() == table.name.tolist()
    plain = ~table.inputs.str.contains('taker|frame|trades')
    there = X.notna().mean()[plain.to_numpy()]
    assert (there > 0.05).all() and there.mean() > 0.85, there.nsmallest(5)
    assert not np.isinf(X.to_numpy()).any()
    given = table.inputs.str.contains('funding frame|cross_exchange frame|sentiment frame').to_numpy()
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
    last = bars.time.quantile(0.7)
    edge = last + pd.Timedelta('1h')
    late = bars.time > last
    changed = bars.copy()
    changed.loc[late, ['open', 'high', 'low', 'close', 'volume']] *= 7
    def spoilt(frame):
        numbers = frame.select_dtypes('number').columns
        times = {c: -.5 if c == 'score' else 7 for c in numbers}         # a score has bounds
        return frame.assign(**{c: frame[c].where(frame.known <= edge, k * frame[c]) for c, k in times.items()})
    Z = engineer.transform(changed, '1h', **{k: spoilt(v) for k, v in sources.items()})
    assert bits(Z[~late.to_numpy()]) == bits(X[~late.to_numpy()])


@pytest.fixture(scope='module')
def begun_late():
    "A coin's features from all bars, and from bars begun at eight places"
    market = simulate(n_symbols=6, n_bars=2600, seed=5)
    bars, name = market.bars, 'ETH/USDT'
    sources = dict(funding=market.funding, cross_exchange=other_venues(bars), sentiment=market.sentiment)
    times, span = bars.time.unique(), table.warm_up.max()
    starts = np.linspace(400, 2600 - span - 1, 8).astype(int)
    def features(bars): return engineer.transform(bars, '1h', **sources).loc[name].to_numpy()
    parts = [features(bars[bars.time.between(times[s], times[s + span - 1])]) for s in starts]
    return features(bars), starts, np.array(parts)


def test_warm_up(begun_late):
    "Suite 2: at the declared warm-up the start has less than 1e-3 standard deviations of influence"
    full, starts, parts = begun_late
    rows, columns = table.warm_up.to_numpy() - 1, np.arange(len(table))
    now, then = parts[:, rows, columns], full[starts[:, None] + rows, columns]
    same = (now == then) | np.isnan(now) & np.isnan(then)                # constant, or not spoken yet
    spread = np.maximum(pd.DataFrame(full).std().to_numpy(), 1e-300)
    left = np.where(same, 0, np.abs(now - then) / spread).max(0)
    present = ~np.isnan(full).all(0)
    assert pd.Series(left, table.name)[present & ~(left < 1e-3)].empty


def test_first_value(begun_late):
    "Suite 2: `first` is the first value, and there is no hole after it"
    full, _, parts = begun_late
    begun = ~np.isnan(parts)
    first = begun.argmax(1)
    present = ~np.isnan(full).all(0) & ~table.inputs.str.contains('funding').to_numpy()     # funding counts settlements
    assert ((first == table['first'].to_numpy() - 1) | ~present).all()
    assert (begun.sum(1) == parts.shape[1] - first)[:, present].all()


def streamed(bars, sources_at=lambda t: {}, break_every=None):
    "Rows of a panel stream and their (symbol, time), saved and restored on the way"
    stream, out = engineer.panel_stream(sorted(bars.symbol.unique()), '1h'), {}
    for k, (t, rows) in enumerate(bars.groupby('time')):
        if break_every and k % break_every == 0:
            kept = stream.state()
            stream = engineer.panel_stream(stream.symbols, '1h')
            stream.restore(kept)
        Y = stream.update({r['symbol']: r for r in rows.to_dict('records')}, **sources_at(t))
        out |= {(s, t): Y[stream.symbols.index(s)] for s in rows.symbol}
    return np.array(list(out.values())), list(out)


def test_stream_is_batch(data):
    "Suite 3: bars alone, one time after the other, to the last bit, saved and restored on the way"
    bars = data[0]
    live, index = streamed(bars, break_every=997)
    assert bits(live) == bits(engineer.transform(bars, '1h').loc[index])


def test_stream_with_sources_is_batch(data):
    "The same with every source as it was known at each close"
    bars, sources = data
    bars = bars[bars.time < bars.time.min() + pd.Timedelta('190h')]
    bars = bars[bars.symbol.isin(['BTC/USDT', *sorted(bars.symbol.unique())[:2]])]
    reach = dict(onchain='376D', funding='31D', cross_exchange='6h', sentiment='31D')
    back = {k: pd.Timedelta(v) for k, v in reach.items()}
    def sources_at(t):
        now = t + pd.Timedelta('1h')
        return {k: v[v.known > now - back[k]] for k, v in known(sources, now).items()}
    live, index = streamed(bars, sources_at)
    assert bits(live) == bits(engineer.transform(bars, '1h', **sources).loc[index])


def test_a_coin_alone_is_its_own_stream(data):
    bars = data[0][data[0].symbol == 'BTC/USDT']
    stream = engineer.stream('BTC/USDT', '1h')
    X = engineer.transform(bars, '1h')
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


def closes(kind, n, p, q, rng):
    if kind in ('flat', 'empty'): return np.full(n, p)
    if kind == 'steps': return np.where(np.arange(n) % 2, p, q)
    return p * np.exp(np.cumsum(rng.normal(0, .05, n)))


def run_of_bars(kind, n, p, q, v, rng):
    "Bars of one kind, `broken`: one number of one bar is not one"
    c = closes(kind, n, p, q, rng)
    o = np.r_[c[0], c[:-1]]
    part = pd.DataFrame(dict(open=o, high=np.maximum(o, c), low=np.minimum(o, c), close=c,
                             volume=0. if kind == 'empty' else v, taker_buy_volume=v * rng.uniform(0, 1, n)))
    if kind == 'broken': part.iloc[rng.integers(n), rng.integers(5)] = rng.choice([np.nan, 0., -1., np.inf])
    return part


@st.composite
def hostile(draw):
    "Runs of frozen, tiny, huge, jumping and broken bars"
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        p, q, v = draw(prices), draw(prices), draw(volumes)
        kind = draw(st.sampled_from(['flat', 'steps', 'noise', 'empty', 'broken']))
        n, rng = draw(st.integers(1, 200)), np.random.default_rng(draw(st.integers(0, 99)))
        rows.append(run_of_bars(kind, n, p, q, v, rng))
    frame = pd.concat(rows, ignore_index=True)
    late = np.random.default_rng(len(frame)).random(len(frame)) < .01
    hours = np.cumsum(np.where(late, 30, 1))
    return frame.assign(time=pd.Timestamp('2021-01-01', tz='UTC') + pd.to_timedelta(hours, 'h'), symbol='A/USDT')


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(hostile())
def test_hostile_bars_give_no_infinity(frame):
    out = engineer.transform(frame.replace([np.inf], np.nan), '1h')
    assert not np.isinf(out.to_numpy()).any()
    stream = engineer.stream('A/USDT')
    live = np.array([stream.update(bar) for bar in frame.to_dict('records')])                # it meets infinite prices
    assert bits(live) == bits(out)


@pytest.mark.parametrize('volume', [0., 1e12])
@pytest.mark.parametrize('price', [1e-8, 1e5])
def test_a_frozen_market_has_values_everywhere(price, volume):
    time = pd.date_range('2021-01-01', periods=1300, freq='h', tz='UTC')
    frame = pd.DataFrame(dict(time=time, symbol='A/USDT', open=price, high=price, low=price, close=price,
                              volume=volume, taker_buy_volume=volume / 2))
    last = technical.transform(frame).iloc[-1]
    assert last.notna().all(), last[last.isna()].index.tolist()


# --- clocks, processes, errors

def one_coin(n): return simulated()[0].query('symbol == "BTC/USDT"')[:n].reset_index(drop=True)


@pytest.mark.parametrize('shown', [
    lambda time: time.dt.tz_localize(None),
    lambda time: time.dt.tz_convert('America/New_York'),
    lambda time: time.astype('int64') // 1000,
    lambda time: time.astype(str)], ids=['naive', 'New York', 'number', 'text'])
def test_any_zone_and_unit_of_time_is_the_same(shown):
    frame = one_coin(500)
    assert bits(engineer.transform(frame.assign(time=shown(frame.time)), '1h')) == bits(engineer.transform(frame, '1h'))


@pytest.mark.parametrize('shown', [
    lambda t: t,
    lambda t: t.tz_convert('Asia/Tokyo'),
    lambda t: t.to_pydatetime(),
    lambda t: int(t.timestamp()),
    lambda t: int(t.timestamp() * 1000),
    str], ids=['as it is', 'Tokyo', 'datetime', 'seconds', 'milliseconds', 'text'])
def test_any_zone_and_unit_of_time_of_a_live_bar(shown):
    frame, stream = one_coin(50), engineer.stream('BTCUSDT', '1h')
    out = [stream.update(bar | dict(time=shown(bar['time']))) for bar in frame.to_dict('records')]
    assert bits(np.array(out)) == bits(engineer.transform(frame, '1h'))


def test_other_timeframes():
    frame = simulate(n_symbols=1, n_bars=600, seed=1, timeframe='15m').bars
    X = engineer.transform(frame)
    assert bits(X) == bits(engineer.transform(frame, '15m'))
    stream = engineer.stream(frame.symbol[0], '15m')
    assert bits(np.array([stream.update(bar) for bar in frame.to_dict('records')])) == bits(X)
    with pytest.raises(DataError, match='in order of time, each once'): engineer.transform(frame, '1h')  # four an hour


def test_optional_columns_may_be_absent():
    frame = one_coin(300)
    some = engineer.transform(frame.drop(columns=['quote_volume', 'trades', 'taker_buy_volume']), '1h')
    full = engineer.transform(frame, '1h')
    reads = table.inputs.str.contains('taker|trades|quote|frame').to_numpy()
    assert bits(some.loc[:, ~reads]) == bits(full.loc[:, ~reads])
    assert some.loc[:, reads].isna().all(axis=None)


def test_one_s_own_step_and_what_it_needs():
    @step('gap_to_mean', unit='ratio')
    def gap_to_mean(sma_distance_20, W, s, n, y): y[0] = -sma_distance_20
    own = AdvancedFeatureEngineer([gap_to_mean])
    assert (own.columns, own.family_of, own.model_ready) == (['gap_to_mean'], ['own'], [True])
    both = AdvancedFeatureEngineer(['technical', gap_to_mean])
    assert both.columns == [*technical.columns, 'gap_to_mean']
    mine, theirs = (e.transform(one_coin(300), '1h') for e in (own, both))
    np.testing.assert_array_equal(mine['gap_to_mean'], -theirs['sma_distance_20'])


def test_numbers_as_text_and_missing_columns_of_a_bar():
    stream, texts = engineer.stream('BTC/USDT'), engineer.stream('BTC/USDT')
    for bar in one_coin(40).to_dict('records'):
        bar['trades'] = None
        words = {k: v if k in ('time', 'symbol') or v is None else str(v) for k, v in bar.items()}
        assert bits(stream.update(bar)) == bits(texts.update(words))


def test_each_update_gives_a_row_of_its_own():
    stream = engineer.stream('BTC/USDT')
    a, b = [stream.update(bar) for bar in one_coin(42).to_dict('records')][-2:]
    assert bits(a) != bits(b)


def test_unknown_sources_are_refused_and_empty_ones_are_none():
    frame = one_coin(50)
    with pytest.raises(TypeError, match='unknown source gossip'): engineer.transform(frame, gossip=None)
    stream = engineer.stream('BTC/USDT')
    with pytest.raises(TypeError, match='unknown source gossip'): stream.update(frame.iloc[0], gossip=None)
    assert len(engineer.transform(frame, '1h', onchain=None, sentiment=None)) == 50


def test_errors_say_what_is_wrong():
    frame = one_coin(50)
    with pytest.raises(DataError, match='BTC/USDT: bar number'): engineer.transform(pd.concat([frame, frame]), '1h')
    panel = engineer.panel_stream(['BTC/USDT', 'ETHUSDT'])
    first, second = frame[:2].to_dict('records')
    with pytest.raises(DataError, match='no stream for XRP/USDT'): panel.update({'XRP/USDT': first})
    other = second | dict(symbol='ETH/USDT')
    with pytest.raises(DataError, match='2 different times'): panel.update({'BTC/USDT': first, 'ETH/USDT': other})
    kept = {'BTC/USDT': engineer.stream('BTC/USDT').state(), '': b''}
    with pytest.raises(ValueError, match='nothing of ETH/USDT'): panel.restore(kept)


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
    def said(seed):
        env = {**os.environ, 'PYTHONHASHSEED': seed}
        done = subprocess.run([sys.executable, '-c', script], env=env, capture_output=True, text=True, check=True)
        return done.stdout
    assert said('1') == said('2')


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
    expected = engineer.transform(simulate(n_symbols=1, n_bars=1500, seed=0).bars)
    np.testing.assert_allclose(np.load(tmp_path / 'x.npy'), expected, rtol=1e-9)
