"Cross-exchange features: loops and pandas once more, hostile frames, truncation, stream, warm-up, scale, time zones"
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from cryptoml.crossexchange import (
    CROSS_COLUMNS,
    CROSSEXCHANGE,
    FUNDING_COLUMNS,
    MARKET_COLUMNS,
    cross_at_bars,
    cross_frame,
    funding_at_bars,
    funding_frame,
    market_at_bars,
    market_now,
    newest,
    slope_and_correlation,
    within,
)
from cryptoml.data import DataError, read_panel
from cryptoml.engine import BARS, Engine, chained, ordered
from cryptoml.simulate import simulate
from cryptoml.technical import TECHNICAL

HOUR = 3_600_000_000
PRICES = ['open', 'high', 'low', 'close']
NAMES = (*BARS, *CROSS_COLUMNS, *FUNDING_COLUMNS, *MARKET_COLUMNS)
READ = [f for f in TECHNICAL if f.name == 'price_base']
STEPS = ordered([*CROSSEXCHANGE, *READ], NAMES)
OUT = [c for f in CROSSEXCHANGE for c, feature in zip(f.out, f.doc['feature']) if feature]
ENGINE = Engine(STEPS, inputs=NAMES, columns=OUT)
STREAM = Engine(STEPS, inputs=NAMES, block=16)
same = np.testing.assert_array_equal
close_to = np.testing.assert_allclose
data = pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')


@pytest.fixture(scope='module')
def world():
    "A simulated coin with venues, perpetual, triangle, funding and the other coins"
    m = simulate(n_symbols=6, n_bars=24 * 75, seed=3)
    rng = np.random.default_rng(3)

    def of(symbol): return m.bars[m.bars.symbol == symbol].reset_index(drop=True)

    def noise(bars):
        close = bars.close * np.exp(.001 * rng.normal(size=len(bars)))
        return bars.assign(close=close, volume=bars.volume * rng.uniform(.2, 1, len(bars)))

    eth, btc = of('ETH/USDT'), of('BTC/USDT')
    perp = noise(eth).assign(open_interest=1e5 * np.exp(np.cumsum(.01 * rng.normal(size=len(eth)))))
    legs = noise(eth.assign(close=eth.close / btc.close, symbol='ETH/BTC'))
    cross = pd.concat([
        cross_frame(noise(eth).assign(symbol='ETH/USD'), 'a'),
        cross_frame(noise(eth), 'b'),
        cross_frame(noise(eth), 'c'),
        cross_frame(perp, 'b', 'perp'),
        cross_frame(btc, 'own'),
        cross_frame(legs, 'own'),
    ], ignore_index=True)
    panel, _ = read_panel(m.bars)
    return dict(bars=eth, cross=cross, funding=m.funding, panel=panel, row=panel.symbols.index('ETH/USDT'))


def closes(bars):
    "Closes in microseconds"
    return pd.DatetimeIndex(bars.time).as_unit('us').asi8 + HOUR


def matrix(bars, cross, funding, others):
    close = closes(bars)
    symbol = bars.symbol.iloc[0]
    return np.hstack([
        bars.assign(time=(close - HOUR) / 1e6).reindex(columns=BARS).to_numpy(float),
        cross_at_bars(cross, symbol, close, HOUR),
        funding_at_bars(funding, symbol, close, HOUR),
        others,
    ]), close // HOUR - 1


def others_of(world, close=None):
    "What the other coins did at each bar"
    close = world['panel']['close'] if close is None else close
    return market_at_bars(close, world['panel'].symbols)[world['row']]


def features(world, bars=None, cross=None, funding=None, close=None):
    "Features of a world, of which some parts may be others"
    bars = world['bars'] if bars is None else bars
    cross = world['cross'] if cross is None else cross
    funding = world['funding'] if funding is None else funding
    X, number = matrix(bars, cross, funding, others_of(world, close)[:len(bars)])
    return pd.DataFrame(ENGINE.run(X, number).T, columns=OUT)


def test_catalogue_is_complete():
    assert len(OUT) >= 18
    assert len(set(OUT)) == len(OUT)
    assert ENGINE.columns == OUT
    assert ENGINE.plain == []
    assert STREAM.plain == []


def test_names_are_used_once():
    columns = {c for f in [*TECHNICAL, *CROSSEXCHANGE] for c in f.out}
    assert not set(NAMES) & columns
    assert not {f.name for f in TECHNICAL} & {f.name for f in CROSSEXCHANGE}


@pytest.mark.parametrize('step', CROSSEXCHANGE, ids=lambda f: f.name)
def test_every_feature_is_explained(step):
    assert all(step.doc['formula'])
    assert all(step.doc['unit'])
    assert all(step.doc['scale_free'])


# ---- the columns against plain loops ----

def arrivals(at, known, x, close):
    "Rows known at a close, in order of arrival"
    return sorted((k, a, v) for k, a, v in zip(known, at, x) if k <= close and not np.isnan(v))


def slow_newest(at, known, x, close, length):
    "One close after another: arrivals in order, an older row never replaces a newer one"
    out = []
    for c in close:
        best = None
        for k, a, v in arrivals(at, known, x, c):
            if best is None or a >= best[0]:
                best = (a, v)
        out.append(best[1] if best and c - best[0] <= 2 * length else np.nan)
    return out


def slow_within(at, known, x, close, length):
    out = []
    for c in close:
        counted, newest_so_far = {}, None
        for k, a, v in arrivals(at, known, x, c):
            late = newest_so_far is not None and a < newest_so_far
            if late:
                continue
            if a != newest_so_far:
                first_in = k
            newest_so_far = a
            in_this_bar = c - length < k and c - length < first_in
            if in_this_bar and c - a <= 2 * length:
                counted[a] = v
        out.append(sum(counted.values()) if counted else np.nan)
    return out


prices_or_nothing = st.one_of(st.just(np.nan), st.integers(1, 50).map(float))
rows = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 30), prices_or_nothing), min_size=1, max_size=25)


@pytest.mark.parametrize('f, slow', [(newest, slow_newest), (within, slow_within)], ids=['newest', 'within'])
@settings(max_examples=200, deadline=None)
@given(rows=rows, random=st.randoms(use_true_random=False))
def test_newest_and_within_against_loops(f, slow, rows, random):
    random.shuffle(rows)
    at, delay, x = (np.array(v) for v in zip(*rows))
    at = at * 10
    known = at + delay * 3
    x = x.astype(float)
    close = np.array([20, 40, 60, 120, 140, 160, 200, 220, 240])                  # bars of 20 with holes
    got = f(at, known, x, close, 20)
    same(got, slow(at, known, x, close, 20))
    for j, c in enumerate(close):                                                 # nothing of what comes later
        k = known <= c
        same(f(at[k], known[k], x[k], close[j:j + 1], 20), got[j:j + 1])


def slow_funding(at, known, x, close):
    "Values of one close from the versions known by then"
    out = []
    for c in close:
        version, top = {}, -1
        for k, a, v in sorted((k, a, v) for k, a, v in zip(known, at, x) if k <= c):
            if a > top or a in version:
                version[a] = v
            top = max(top, a)
        out.append(funding_row(version) if version and c - max(version) <= 16 * HOUR else [np.nan] * 4)
    return np.array(out)


def funding_row(version):
    "Level, change and two scores from the value of each settlement"
    times = sorted(version)[::-1]
    f = np.array([version[t] for t in times])

    def reaches(p): return len(f) >= p and times[0] - times[p - 1] <= 16 * HOUR * (p - 1)

    def score(p):
        if not reaches(p):
            return np.nan
        return (f[0] - f[:p].mean()) / f[:p].std() if f[:p].std() > 1e-12 else 0.

    return [f[0], f[0] - f[1] if reaches(2) else np.nan, score(21), score(90)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, .05, .3]), st.sampled_from([0, .1]))
def test_funding_against_loops(seed, revised, missing):
    rng = np.random.default_rng(seed)
    start = 1_700_006_400_000_000
    at = start + 8 * HOUR * np.flatnonzero(rng.random(110) >= missing)
    known = at + rng.choice([0, 600_000_000, 20 * HOUR], len(at), p=[.8, .15, .05])
    x = 1e-4 * rng.integers(-3, 4, len(at))
    again = rng.random(len(at)) < revised
    known = np.r_[known, known[again] + rng.integers(1, 60, again.sum()) * HOUR]
    at = np.r_[at, at[again]]
    x = np.r_[x, 1e-4 * rng.integers(-3, 4, again.sum())]
    frame = pd.DataFrame(dict(
        time=pd.to_datetime(at, unit='us', utc=True),
        known=pd.to_datetime(known, unit='us', utc=True),
        symbol='BTC/USDT:USDT',
        funding_rate=x,
    )).iloc[rng.permutation(len(at))]
    close = start + HOUR * np.arange(1, 900, 7)
    got = funding_at_bars(frame, 'BTC/USDT', close, HOUR)
    close_to(got, slow_funding(at, known, x, close), atol=1e-9)
    for j in rng.choice(len(close), 5):
        cut = frame[frame.known.astype('int64') <= close[j]] if len(frame) else frame
        same(funding_at_bars(cut, 'BTC/USDT', close[j:j + 1], HOUR)[0], got[j])


def test_market_leaves_the_coin_out(world):
    close = world['panel']['close'].copy()
    symbols = world['panel'].symbols
    got = market_at_bars(close, symbols)
    close[2] *= np.exp(np.random.default_rng(0).normal(size=close.shape[1]))      # another life of one coin
    moved = market_at_bars(close, symbols)
    close_to(moved[2], got[2], atol=1e-15)
    assert np.abs(moved[3, 1:, 0] - got[3, 1:, 0]).min() > 0


def test_bitcoin_has_no_return_of_bitcoin(world):
    close = world['panel']['close']
    symbols = world['panel'].symbols
    b = symbols.index('BTC/USDT')
    assert np.isnan(market_at_bars(close, symbols)[b, :, 1]).all()
    rest = symbols[2:]
    nothing = np.isnan(market_at_bars(close[2:], rest)[..., 1]).all()
    assert nothing == ('BTC/USDT' not in rest)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, .1, .6]))
def test_market_live_twin(seed, missing):
    rng = np.random.default_rng(seed)
    close = np.exp(np.cumsum(rng.normal(size=(7, 30)), 1))
    close[rng.random(close.shape) < missing] = rng.choice([np.nan, 0., -1, np.inf])
    symbols = ['BTC/USDT', *(f'C{i}/USDT' for i in range(6))]
    usable = (close > 0) & np.isfinite(close)
    held = np.flatnonzero(usable.any(0))
    got = market_at_bars(close, symbols)
    assert not np.isinf(got).any()
    for t0, t1 in zip(held, held[1:]):
        close_to(market_now(close[:, t1], close[:, t0], symbols), got[:, t1], rtol=0, atol=1e-15)
    r = pd.DataFrame(np.log(np.where(usable, close, np.nan)[:, held])).diff(axis=1)
    for i in range(7):
        rest = r.drop(index=i)
        mean = rest.mean().where(rest.count() >= 2).to_numpy()
        close_to(got[i, held[1:], 0], mean[1:], atol=1e-12)


# ---- frames as people have them ----

def test_quotes_venues_and_own(world):
    close = closes(world['bars'])
    got = cross_at_bars(world['cross'], 'ETHUSDT', close, HOUR)
    by = {k: v.set_index('known').close for k, v in world['cross'].groupby(['venue', 'kind', 'symbol'])}
    spots = [by['a', 'spot', 'ETH/USD'], by['b', 'spot', 'ETH/USDT'], by['c', 'spot', 'ETH/USDT']]
    same(got[:, 0], pd.concat(spots, axis=1).median(axis=1))
    same(got[:, 2], by['b', 'perp', 'ETH/USDT'])
    same(got[:, 5], by['own', 'spot', 'ETH/BTC'])
    same(got[:, 6], by['own', 'spot', 'BTC/USDT'])


def test_own_bars_are_no_other_venue(world):
    cross, close = world['cross'], closes(world['bars'])
    mine = cross_frame(world['bars'].assign(close=1.), 'own')
    both = pd.concat([cross, mine])
    same(cross_at_bars(both, 'ETH/USDT', close, HOUR), cross_at_bars(cross, 'ETH/USDT', close, HOUR))


def test_another_quote_is_another_pair(world):
    assert np.isnan(cross_at_bars(world['cross'], 'ETH/EUR', closes(world['bars']), HOUR)).all()


def test_legs_of_another_exchange(world):
    cross, close = world['cross'], closes(world['bars'])
    others = cross.assign(venue=cross.venue.replace('own', 'd'))
    got = cross_at_bars(others, 'ETH/USDT', close, HOUR)
    same(got[:, 5:], cross_at_bars(cross, 'ETH/USDT', close, HOUR)[:, 5:])


TIMES = {
    'zone': lambda t: t.dt.tz_convert('Asia/Kolkata'),
    'naive': lambda t: t.dt.tz_localize(None),
    'milliseconds': lambda t: t.astype('int64') // 1000,
    'ns': lambda t: t.dt.as_unit('ns'),
    'ms': lambda t: t.dt.as_unit('ms'),
    'text': lambda t: t.astype(str),
    'objects': lambda t: t.astype(object),
}


@pytest.mark.parametrize('kind', TIMES)
@pytest.mark.parametrize('at_bars, source, n', [(cross_at_bars, 'cross', 4000), (funding_at_bars, 'funding', 400)],
                         ids=['cross', 'funding'])
def test_times_of_any_kind_and_zone(world, at_bars, source, n, kind):
    change = TIMES[kind]
    frame = world[source].tail(n)
    close = closes(world['bars'])[-50:]
    other = frame.assign(time=change(frame.time), known=change(frame.known))
    same(at_bars(other, 'ETH/USDT', close, HOUR), at_bars(frame, 'ETH/USDT', close, HOUR))


def test_unpublished_rows_wait(world):
    frame, close = world['cross'], closes(world['bars'])[100:101]
    now = pd.Timestamp(close[0], unit='us', tz='UTC')
    waiting = frame.assign(known=frame.known.where(frame.known <= now))
    same(cross_at_bars(waiting, 'ETH/USDT', close, HOUR), cross_at_bars(frame, 'ETH/USDT', close, HOUR))


def test_stale_is_missing(world):
    cross, bars = world['cross'], world['bars']
    close = closes(bars)
    gone = cross.time.isin(bars.time[200:203])                                    # three bars of every venue
    got = cross_at_bars(cross[~gone], 'ETH/USDT', close, HOUR)
    full = cross_at_bars(cross, 'ETH/USDT', close, HOUR)
    prices, volumes = [0, 2, 4, 5, 6], [1, 3]
    same(got[200, prices], full[199, prices])
    assert np.isnan(got[200, volumes]).all()
    assert np.isnan(got[201:203]).all()
    same(np.delete(got, [200, 201, 202], 0), np.delete(full, [200, 201, 202], 0))


UNUSABLE = {
    'no column known': lambda f: f.drop(columns='known'),
    'no column venue': lambda f: f.drop(columns='venue'),
    "'spot' or 'perp'": lambda f: f.assign(kind='futures'),
    'venue is missing': lambda f: f.assign(venue=None),
    'known before their time': lambda f: f.assign(known=f.time - pd.Timedelta('1s')),
    'not numbers': lambda f: f.assign(close='x'),
    'cannot be split': lambda f: f.assign(symbol='BTC'),
    'not a dict': lambda f: f.to_dict(),
}


@pytest.mark.parametrize('sentence', UNUSABLE)
def test_unusable_frames_are_refused(world, sentence):
    frame = UNUSABLE[sentence](world['cross'].head(50))
    with pytest.raises(DataError, match=sentence):
        cross_at_bars(frame, 'ETH/USDT', np.array([HOUR]), HOUR)


def test_unusable_funding_is_refused():
    raw = pd.DataFrame(dict(time=[1.7e9], symbol=['BTCUSDT']))
    with pytest.raises(DataError, match='no column funding_rate'):
        funding_frame(raw)
    with pytest.raises(DataError, match='no column known'):
        funding_at_bars(raw.assign(funding_rate=.1), 'BTC/USDT', np.array([HOUR]), HOUR)


def test_funding_as_an_exchange_gives_it():
    raw = dict(timestamp=[1_700_000_000_000], datetime=['x'], symbol=['BTC/USDT:USDT'], fundingRate=['0.0001'])
    f = funding_frame(pd.DataFrame(raw), delay='1min')
    assert f.funding_rate[0] == 1e-4
    assert f.known[0] - f.time[0] == pd.Timedelta('1min')


number = st.one_of(st.sampled_from([np.nan, np.inf, -np.inf, 0., -1., 1e-300, 1e300]), st.floats(.5, 2))
hostile = st.tuples(
    st.integers(0, 30),                                                           # time, hours
    st.integers(0, 9000),                                                         # until it is known, seconds
    st.sampled_from(['ETH/USD', 'ETHUSDT', 'ETH/BTC', 'BTC/USDT', 'XRP/USDT']),
    st.sampled_from(['a', 'b', 'own']),
    st.sampled_from(['spot', 'perp']),
    number,                                                                       # close
    number,                                                                       # volume
)


@settings(max_examples=100, deadline=None)
@given(st.lists(hostile, max_size=60))
def test_hostile_frames(rows):
    frame = pd.DataFrame(rows, columns=['time', 'known', 'symbol', 'venue', 'kind', 'close', 'volume'])
    frame = frame.assign(open_interest=frame.volume, funding_rate=frame.close)
    frame['time'] = pd.Timestamp('2024-01-01', tz='UTC') + pd.to_timedelta(frame['time'], 'h')
    frame['known'] = frame['time'] + pd.to_timedelta(frame['known'], 's')
    close = pd.date_range('2024-01-01 01:00', periods=36, freq='h', tz='UTC').as_unit('us').asi8
    with np.errstate(all='raise', under='ignore', over='ignore'):
        C = cross_at_bars(frame, 'ETH/USDT', close, HOUR)
    F = funding_at_bars(frame, 'ETH/USDT', close, HOUR)
    assert C.shape == (36, len(CROSS_COLUMNS))
    assert F.shape == (36, len(FUNDING_COLUMNS))
    prices, volumes = C[:, [0, 2, 4, 5, 6]], C[:, [1, 3]]
    assert not np.isinf(prices).any()                                             # nothing infinite,
    assert not (prices <= 0).any()                                                # no price made up
    assert not (volumes < 0).any()
    if not len(frame):
        assert np.isnan(C).all()
        assert np.isnan(F).all()
    bars = np.column_stack([np.ones((36, 4)), np.full(36, 5.), np.full((36, 3), np.nan), close / 1e6])
    X = np.hstack([bars, C, F, np.full((36, 2), np.nan)])
    assert not np.isinf(ENGINE.run(X, close // HOUR - 1)).any()


# ---- the features ----

@pytest.mark.parametrize('t', [700, 1000, 1500])
def test_truncation(world, t):
    full = features(world)
    assert full.iloc[-1].notna().all()
    now = world['bars'].time[t] + pd.Timedelta('1h')
    cross, funding = (world[k][world[k].known <= now] for k in ('cross', 'funding'))
    cut = features(world, world['bars'][:t + 1], cross, funding, world['panel']['close'][:, :t + 1])
    same(cut, full[:t + 1])


def test_another_future_of_the_sources(world):
    full, cross = features(world), world['cross']
    past = cross.known <= world['bars'].time[1000] + pd.Timedelta('1h')
    later = cross.assign(close=cross.close.where(past, 7.), volume=cross.volume.where(past, 7.))
    got = features(world, cross=later)
    same(got[:1001], full[:1001])
    assert (got.iloc[1001] != full.iloc[1001]).any()


def test_stream_with_saved_state(world):
    full, bars, panel = features(world), world['bars'], world['panel']
    X, number = matrix(bars, world['cross'], world['funding'], others_of(world))
    M = STREAM.memory()
    STREAM.run(X[:900], number[:900], M)
    for t in range(900, 960):
        now = pd.Timestamp(number[t] * HOUR + HOUR, unit='us', tz='UTC')
        known = {k: world[k][(world[k].known <= now) & (world[k].known > now - pd.Timedelta('35D'))]
                 for k in ('cross', 'funding')}
        others = market_now(panel['close'][:, t], panel['close'][:, t - 1], panel.symbols)[world['row']]
        Z, k = matrix(bars[t:t + 1], known['cross'], known['funding'], others[None])
        if t % 20 == 0:
            M = STREAM.restore(STREAM.state_bytes(M))
        row = pd.Series(STREAM.run(Z, k, M)[:, 0], STREAM.columns)
        same(row[OUT], full.iloc[t])


@pytest.mark.parametrize('start', [310, 777, 1003])
def test_warm_up(world, start):
    settle = chained(STEPS, 'settle', NAMES)
    full = features(world)
    X, number = matrix(world['bars'], world['cross'], world['funding'], others_of(world))
    part = pd.DataFrame(ENGINE.run(X[start:], number[start:]).T, full.index[start:], OUT)
    for c in OUT:
        first = settle[c] - 1
        assert part[c].iloc[:first].isna().all(), c
        close_to(part[c].iloc[first:], full[c][start + first:], rtol=1e-9, atol=1e-9, err_msg=c)


def test_scale(world):
    big, bars, cross = 2.**30, world['bars'], world['cross']
    bars = bars.assign(**{c: bars[c] / big for c in PRICES}, volume=bars.volume * big)
    coin = cross.symbol.str.startswith('ETH')
    cross = cross.assign(
        close=cross.close.where(~coin, cross.close / big),
        volume=cross.volume * big,
        open_interest=cross.open_interest * big,
    )
    close_to(features(world, bars, cross), features(world), rtol=1e-9, atol=1e-9)


def test_a_gap_of_bars(world):
    bars = world['bars']
    gap = bars.index.isin(range(800, 806))
    holes = features(world, bars.assign(**{c: bars[c].where(~gap) for c in (*PRICES, 'volume')}))
    assert holes[800:806].isna().all().all()
    assert holes.iloc[806][['venue_gap_z_168', 'basis_z_168', 'beta_btc_720']].notna().all()


def test_a_flat_market():
    flat = np.full((900, len(NAMES)), 2.)
    flat[:, NAMES.index('market_return'):] = 0.
    flat[:, NAMES.index('time')] = np.arange(900) * 3600
    Y = pd.DataFrame(ENGINE.run(flat, np.arange(900)).T, columns=OUT).iloc[-1]
    assert np.isfinite(Y).all()
    scores = [c for c in OUT if '_z_' in c and 'funding' not in c]
    moves = [c for c in OUT if any(word in c for word in ('beta', 'correlation', 'lead'))]
    assert (Y[[*scores, *moves]] == 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 3]), st.sampled_from([1e-8, 1., 1e6]))
def test_moving_regression_against_numpy(seed, lag, size):
    rng = np.random.default_rng(seed)
    p, N = 20, 160
    x = rng.standard_t(3, N)
    u = size * rng.standard_t(2, N)
    x += .3 * u / size
    s = np.zeros(7)
    for n in range(1, N + 1):
        shown = p + lag + 1                                                       # what the engine shows to a step
        a, b = (np.concatenate([np.zeros(shown), v[:n]])[-shown:] for v in (x, u))
        slope, correlation = slope_and_correlation(s, 0, a, b, lag, p, n, n == 1 or n % p == 0)
        if n >= p + lag:
            X, U = x[n - p:n], u[n - p - lag:n - lag]
            expected = [np.cov(X, U)[0, 1] / U.var(ddof=1) * size, np.corrcoef(X, U)[0, 1]]
            close_to([slope * size, correlation], expected, rtol=1e-6, atol=1e-9)


# ---- real bars ----

@pytest.fixture(scope='module')
def real():
    "Bitcoin on Binance, with Kraken, the perpetual and funding"
    start, stop = pd.Timestamp('2021-10-01', tz='UTC'), pd.Timestamp('2022-05-01', tz='UTC')
    span = [('timestamp', '>=', start), ('timestamp', '<', stop)]

    def read(name): return pd.read_parquet(Path(os.environ['CRYPTOML_DATA']) / name, filters=span)

    panel, _ = read_panel(read('spot_1h.parquet'))
    kraken = cross_frame(read('spot_1h_kraken.parquet'), 'kraken')
    perp = cross_frame(read('perp_1h.parquet'), 'binance', 'perp')
    bars = panel.frame()
    return dict(
        bars=bars[bars.symbol == 'BTC/USDT'].reset_index(drop=True),
        cross=pd.concat([kraken, perp], ignore_index=True),
        funding=funding_frame(read('funding_8h.parquet')),
        panel=panel,
        row=panel.symbols.index('BTC/USDT'),
    )


@data
@pytest.mark.parametrize('t', [1200, 2400, 4000])
def test_real_truncation(real, t):
    now = real['bars'].time[t] + pd.Timedelta('1h')
    cross, funding = (real[k][real[k].known <= now] for k in ('cross', 'funding'))
    cut = features(real, real['bars'][:t + 1], cross, funding, real['panel']['close'][:, :t + 1])
    same(cut, features(real)[:t + 1])


@data
def test_real_sense(real):
    full = features(real)
    assert not np.isinf(full.to_numpy()).any()
    assert full.basis.abs().median() < .002
    assert full.venue_gap.abs().median() < .002
    assert full.venue_share_24.dropna().between(.5, 1).all()
    assert full.filter(like='btc').isna().all().all()                             # this is Bitcoin
    assert full.beta_market_720.dropna().between(.2, 1.5).all()


@data
def test_real_funding_is_known_at_its_settlement(real):
    full, funding = features(real), real['funding']
    close = (pd.DatetimeIndex(real['bars'].time) + pd.Timedelta('1h')).as_unit('us')
    rate = funding[funding.symbol == 'BTC/USDT'].set_index('known').funding_rate
    rate.index = rate.index.as_unit('us')
    at = close.isin(rate.index)
    same(full.funding_rate.to_numpy()[at], (1e4 * rate.reindex(close[at])).to_numpy())
