"""Cross-exchange features: plain loops and pandas once more, hostile frames, truncation, stream, warm-up, scale, time zones"""
import os
from pathlib import Path
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from cryptoml.crossexchange import (CROSS_COLUMNS, CROSSEXCHANGE, FUNDING_COLUMNS, MARKET_COLUMNS, cross_at_bars, cross_frame, funding_at_bars, funding_frame,
                                    market_at_bars, market_now, newest, slope_and_correlation, within)
from cryptoml.data import DataError, read_panel
from cryptoml.engine import BARS, Engine, chained, ordered
from cryptoml.simulate import simulate
from cryptoml.technical import TECHNICAL

HOUR = 3_600_000_000
NAMES = (*BARS, *CROSS_COLUMNS, *FUNDING_COLUMNS, *MARKET_COLUMNS)
STEPS = ordered([*CROSSEXCHANGE, *(f for f in TECHNICAL if f.name == 'price_base')], NAMES)
ENGINE, STREAM = Engine(STEPS, inputs=NAMES, columns=[c for f in CROSSEXCHANGE for c, k in zip(f.out, f.doc['feature']) if k]), Engine(STEPS, inputs=NAMES, block=16)
OUT = ENGINE.columns
same = np.testing.assert_array_equal
data = pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')


@pytest.fixture(scope='module')
def world():
    "A simulated coin with venues, perpetual, triangle, funding and the other coins"
    m, rng = simulate(n_symbols=6, n_bars=24 * 75, seed=3), np.random.default_rng(3)
    of = lambda s: m.bars[m.bars.symbol == s].reset_index(drop=True)
    eth, btc = of('ETH/USDT'), of('BTC/USDT')
    n, noise = len(eth), lambda b: b.assign(close=b.close * np.exp(.001 * rng.normal(size=len(b))), volume=b.volume * rng.uniform(.2, 1, len(b)))
    perp = noise(eth).assign(open_interest=1e5 * np.exp(np.cumsum(.01 * rng.normal(size=n))))
    legs = noise(eth.assign(close=eth.close / btc.close, symbol='ETH/BTC'))
    cross = pd.concat([cross_frame(noise(eth).assign(symbol='ETH/USD'), 'a'), cross_frame(noise(eth), 'b'), cross_frame(noise(eth), 'c'), cross_frame(perp, 'b', 'perp'), cross_frame(btc, 'own'), cross_frame(legs, 'own')], ignore_index=True)
    panel, _ = read_panel(m.bars)
    return dict(bars=eth, cross=cross, funding=m.funding, panel=panel, row=panel.symbols.index('ETH/USDT'))


def matrix(bars, cross, funding, others):
    us, symbol = pd.DatetimeIndex(bars.time).as_unit('us').asi8, bars.symbol.iloc[0]
    own = bars.assign(time=us / 1e6).reindex(columns=BARS).to_numpy(float)
    return np.hstack([own, cross_at_bars(cross, symbol, us + HOUR, HOUR), funding_at_bars(funding, symbol, us + HOUR, HOUR), others]), us // HOUR


def features(world, bars=None, cross='cross', funding='funding', close=None):
    bars = world['bars'] if bars is None else bars
    close = world['panel']['close'] if close is None else close
    pick = lambda v: world[v] if isinstance(v, str) else v
    others = market_at_bars(close, world['panel'].symbols)[world['row'], :len(bars)]
    return pd.DataFrame(ENGINE.run(*matrix(bars, pick(cross), pick(funding), others)).T, columns=OUT)


def test_catalogue_is_complete():
    assert len(OUT) >= 18 and len(set(OUT)) == len(OUT) and ENGINE.plain == [] and STREAM.plain == []
    assert not set(NAMES) & {c for f in [*TECHNICAL, *CROSSEXCHANGE] for c in f.out}
    assert not {f.name for f in TECHNICAL} & {f.name for f in CROSSEXCHANGE}
    for f in CROSSEXCHANGE: assert all(f.doc['formula']) and all(f.doc['unit']) and all(f.doc['scale_free'])


# ---- the columns against plain loops ----

def slow_newest(at, known, x, close, length):
    "One close after another: arrivals in order, an older row never replaces a newer one"
    out = []
    for c in close:
        best = None
        for k, a, v in sorted((k, a, v) for k, a, v in zip(known, at, x) if k <= c and not np.isnan(v)):
            if best is None or a >= best[0]: best = (a, v)
        out.append(best[1] if best and c - best[0] <= 2 * length else np.nan)
    return out


def slow_within(at, known, x, close, length):
    out = []
    for c in close:
        counted, newest_so_far = {}, None
        for k, a, v in sorted((k, a, v) for k, a, v in zip(known, at, x) if k <= c and not np.isnan(v)):
            late = newest_so_far is not None and a < newest_so_far
            if late: continue
            if a != newest_so_far: first_in = k
            newest_so_far = a
            if c - length < k and c - length < first_in and c - a <= 2 * length: counted[a] = v
        out.append(sum(counted.values()) if counted else np.nan)
    return out


rows = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 30), st.one_of(st.just(np.nan), st.integers(1, 50).map(float))), min_size=1, max_size=25)


@settings(max_examples=200, deadline=None)
@given(rows, st.randoms(use_true_random=False))
def test_newest_and_within_against_loops(rows, random):
    random.shuffle(rows)
    at, delay, x = (np.array(v) for v in zip(*rows))
    at, known, x = at * 10, at * 10 + delay * 3, x.astype(float)
    close = np.array([20, 40, 60, 120, 140, 160, 200, 220, 240])                  # bars of 20 with holes
    for f, slow in ((newest, slow_newest), (within, slow_within)):
        got = f(at, known, x, close, 20)
        same(got, slow(at, known, x, close, 20))
        for j, c in enumerate(close):                                             # one close, nothing of what comes later
            k = known <= c
            same(f(at[k], known[k], x[k], close[j:j + 1], 20), got[j:j + 1])


def slow_funding(at, known, x, close):
    "Values of one close from the versions known by then"
    out = []
    for c in close:
        version, top = {}, -1
        for k, a, v in sorted((k, a, v) for k, a, v in zip(known, at, x) if k <= c):
            if a > top or a in version: version[a] = v
            top = max(top, a)
        row = [np.nan] * 4
        if version and c - max(version) <= 16 * HOUR:
            times = sorted(version)[::-1]
            f = np.array([version[t] for t in times])
            reach = lambda p: len(f) >= p and times[0] - times[p - 1] <= 16 * HOUR * (p - 1)
            row[0] = f[0]
            if reach(2): row[1] = f[0] - f[1]
            for j, p in ((2, 21), (3, 90)):
                if reach(p): row[j] = (f[0] - f[:p].mean()) / f[:p].std() if f[:p].std() > 1e-12 else 0.
        out.append(row)
    return np.array(out)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, .05, .3]), st.sampled_from([0, .1]))
def test_funding_against_loops(seed, revised, missing):
    rng = np.random.default_rng(seed)
    start = 1_700_006_400_000_000
    at = start + 8 * HOUR * np.flatnonzero(rng.random(110) >= missing)
    known, x = at + rng.choice([0, 600_000_000, 20 * HOUR], len(at), p=[.8, .15, .05]), 1e-4 * rng.integers(-3, 4, len(at))
    again = rng.random(len(at)) < revised
    at, known, x = np.r_[at, at[again]], np.r_[known, known[again] + rng.integers(1, 60, again.sum()) * HOUR], np.r_[x, 1e-4 * rng.integers(-3, 4, again.sum())]
    order = rng.permutation(len(at))
    frame = pd.DataFrame(dict(time=pd.to_datetime(at, unit='us', utc=True), known=pd.to_datetime(known, unit='us', utc=True), symbol='BTC/USDT:USDT', funding_rate=x)).iloc[order]
    close = start + HOUR * np.arange(1, 900, 7)
    got = funding_at_bars(frame, 'BTC/USDT', close, HOUR)
    np.testing.assert_allclose(got, slow_funding(at, known, x, close), atol=1e-9)
    for j in rng.choice(len(close), 5):
        cut = frame[frame.known.astype('int64') <= close[j]] if len(frame) else frame
        same(funding_at_bars(cut, 'BTC/USDT', close[j:j + 1], HOUR)[0], got[j])


def test_market_leaves_the_coin_out(world):
    close, symbols = world['panel']['close'].copy(), world['panel'].symbols
    got = market_at_bars(close, symbols)
    close[2] *= np.exp(np.random.default_rng(0).normal(size=close.shape[1]))      # another life of one coin
    moved = market_at_bars(close, symbols)
    np.testing.assert_allclose(moved[2], got[2], atol=1e-15)
    assert np.abs(moved[3, 1:, 0] - got[3, 1:, 0]).min() > 0
    assert np.isnan(got[symbols.index('BTC/USDT'), :, 1]).all() and np.isnan(market_at_bars(close[2:], symbols[2:])[..., 1]).all() == ('BTC/USDT' not in symbols[2:])


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, .1, .6]))
def test_market_live_twin(seed, missing):
    rng = np.random.default_rng(seed)
    close = np.exp(np.cumsum(rng.normal(size=(7, 30)), 1))
    close[rng.random(close.shape) < missing] = rng.choice([np.nan, 0., -1, np.inf])
    symbols = ['BTC/USDT', *(f'C{i}/USDT' for i in range(6))]
    got, held = market_at_bars(close, symbols), np.flatnonzero(((close > 0) & np.isfinite(close)).any(0))
    assert not np.isinf(got).any()
    for t0, t1 in zip(held, held[1:]): np.testing.assert_allclose(market_now(close[:, t1], close[:, t0], symbols), got[:, t1], rtol=0, atol=1e-15)
    r = np.where(np.isfinite(close) & (close > 0), close, np.nan)[:, held]
    with np.errstate(all='ignore'): r = pd.DataFrame(np.log(r)).diff(axis=1)
    for i in range(7):
        rest = r.drop(index=i)
        np.testing.assert_allclose(got[i, held[1:], 0], rest.mean().where(rest.count() >= 2).to_numpy()[1:], atol=1e-12)


# ---- frames as people have them ----

def test_quotes_venues_and_own(world):
    bars, cross = world['bars'], world['cross']
    close = pd.DatetimeIndex(bars.time).asi8 + HOUR
    got = cross_at_bars(cross, 'ETHUSDT', close, HOUR)
    by = {k: v.set_index('known') for k, v in cross.groupby(['venue', 'kind', 'symbol'])}
    spots = pd.concat([by['a', 'spot', 'ETH/USD'].close, by['b', 'spot', 'ETH/USDT'].close, by['c', 'spot', 'ETH/USDT'].close], axis=1)
    same(got[:, 0], spots.median(axis=1)); same(got[:, 2], by['b', 'perp', 'ETH/USDT'].close)
    same(got[:, 5], by['own', 'spot', 'ETH/BTC'].close); same(got[:, 6], by['own', 'spot', 'BTC/USDT'].close)
    mine = cross_frame(bars.assign(close=1.), 'own')                              # our own bars among the rows are no other venue
    same(cross_at_bars(pd.concat([cross, mine]), 'ETH/USDT', close, HOUR), got)
    euro = cross_at_bars(cross, 'ETH/EUR', close, HOUR)
    assert np.isnan(euro).all()
    others = cross.assign(venue=cross.venue.replace('own', 'd'))                  # legs of another exchange
    same(cross_at_bars(others, 'ETH/USDT', close, HOUR)[:, 5:], got[:, 5:])


def test_times_of_any_kind_and_zone(world):
    cross, funding, bars = world['cross'], world['funding'], world['bars']
    close = (pd.DatetimeIndex(bars.time).asi8 + HOUR)[-50:]
    for f, frame in ((cross_at_bars, cross.tail(4000)), (funding_at_bars, funding.tail(400))):
        want = f(frame, 'ETH/USDT', close, HOUR)
        for change in (lambda t: t.dt.tz_convert('Asia/Kolkata'), lambda t: t.dt.tz_localize(None), lambda t: t.astype('int64') // 1000, lambda t: t.dt.as_unit('ns'), lambda t: t.dt.as_unit('ms'), lambda t: t.astype(str), lambda t: t.astype(object)):
            same(f(frame.assign(time=change(frame.time), known=change(frame.known)), 'ETH/USDT', close, HOUR), want)


def test_unpublished_rows_wait(world):
    frame, close = world['cross'], (pd.DatetimeIndex(world['bars'].time).asi8 + HOUR)[100:101]
    now = pd.Timestamp(close[0], unit='us', tz='UTC')
    same(cross_at_bars(frame.assign(known=frame.known.where(frame.known <= now)), 'ETH/USDT', close, HOUR), cross_at_bars(frame, 'ETH/USDT', close, HOUR))


def test_stale_is_missing(world):
    cross, bars = world['cross'], world['bars']
    close = pd.DatetimeIndex(bars.time).asi8 + HOUR
    gone = cross.time.isin(bars.time[200:203])                                    # three bars of every venue
    got = cross_at_bars(cross[~gone], 'ETH/USDT', close, HOUR)
    full = cross_at_bars(cross, 'ETH/USDT', close, HOUR)
    prices = [0, 2, 4, 5, 6]
    same(got[200, prices], full[199, prices]); assert np.isnan(got[201:203]).all() and np.isnan(got[200, [1, 3]]).all()
    same(np.delete(got, [200, 201, 202], 0), np.delete(full, [200, 201, 202], 0))


@pytest.mark.parametrize('change, message', [
    (lambda f: f.drop(columns='known'), 'no column known'), (lambda f: f.drop(columns='venue'), 'no column venue'), (lambda f: f.assign(kind='futures'), "'spot' or 'perp'"),
    (lambda f: f.assign(venue=None), 'venue is missing'), (lambda f: f.assign(known=f.time - pd.Timedelta('1s')), 'known before their time'), (lambda f: f.assign(close='x'), 'not numbers'),
    (lambda f: f.assign(symbol='BTC'), 'cannot be split'), (lambda f: f.to_dict(), 'not a dict')])
def test_unusable_frames_are_refused(world, change, message):
    with pytest.raises(DataError, match=message): cross_at_bars(change(world['cross'].head(50)), 'ETH/USDT', np.array([HOUR]), HOUR)


def test_unusable_funding_is_refused():
    with pytest.raises(DataError, match='no column funding_rate'): funding_frame(pd.DataFrame(dict(time=[1.7e9], symbol=['BTCUSDT'])))
    with pytest.raises(DataError, match='no column known'): funding_at_bars(pd.DataFrame(dict(time=[1.7e9], symbol=['BTCUSDT'], funding_rate=[.1])), 'BTC/USDT', np.array([HOUR]), HOUR)
    raw = pd.DataFrame(dict(timestamp=[1_700_000_000_000], datetime=['x'], symbol=['BTC/USDT:USDT'], fundingRate=['0.0001']))
    f = funding_frame(raw, delay='1min')
    assert f.funding_rate[0] == 1e-4 and f.known[0] - f.time[0] == pd.Timedelta('1min')


values = st.one_of(st.sampled_from([np.nan, np.inf, -np.inf, 0., -1., 1e-300, 1e300]), st.floats(.5, 2))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9000), st.sampled_from(['ETH/USD', 'ETHUSDT', 'ETH/BTC', 'BTC/USDT', 'XRP/USDT']), st.sampled_from(['a', 'b', 'own']), st.sampled_from(['spot', 'perp']), values, values), max_size=60))
def test_hostile_frames(rows):
    frame = pd.DataFrame(rows, columns=['time', 'known', 'symbol', 'venue', 'kind', 'close', 'volume']).assign(open_interest=lambda f: f.volume, funding_rate=lambda f: f.close)
    frame['time'] = pd.Timestamp('2024-01-01', tz='UTC') + pd.to_timedelta(frame['time'], 'h')
    frame['known'] = frame['time'] + pd.to_timedelta(frame['known'], 's')
    close = pd.date_range('2024-01-01 01:00', periods=36, freq='h', tz='UTC').as_unit('us').asi8
    with np.errstate(all='raise', under='ignore', over='ignore'): C = cross_at_bars(frame, 'ETH/USDT', close, HOUR)
    F = funding_at_bars(frame, 'ETH/USDT', close, HOUR)
    assert C.shape == (36, len(CROSS_COLUMNS)) and F.shape == (36, len(FUNDING_COLUMNS))
    prices = C[:, [0, 2, 4, 5, 6]]
    assert not np.isinf(prices).any() and not (prices <= 0).any() and not (C[:, [1, 3]] < 0).any()   # nothing infinite, no price made up
    if not len(frame): assert np.isnan(C).all() and np.isnan(F).all()
    bars = np.column_stack([np.ones((36, 4)), np.full(36, 5.), np.full((36, 3), np.nan), close / 1e6])
    assert not np.isinf(ENGINE.run(np.hstack([bars, C, F, np.full((36, 2), np.nan)]), close // HOUR - 1)).any()


# ---- the features ----

def test_truncation(world):
    full = features(world)
    end = pd.DatetimeIndex(world['bars'].time) + pd.Timedelta('1h')
    assert full.iloc[-1].notna().all()
    for t in (700, 1000, 1500):
        cut = features(world, world['bars'][:t + 1], *(world[k][world[k].known <= end[t]] for k in ('cross', 'funding')), world['panel']['close'][:, :t + 1])
        same(cut, full[:t + 1])
    later = world['cross'].assign(close=lambda f: f.close.where(f.known <= end[1000], 7.), volume=lambda f: f.volume.where(f.known <= end[1000], 7.))
    same(features(world, cross=later)[:1001], full[:1001])                        # another future
    assert (features(world, cross=later).iloc[1001] != full.iloc[1001]).any()


def test_stream_with_saved_state(world):
    full, bars, panel = features(world), world['bars'], world['panel']
    others = market_at_bars(panel['close'], panel.symbols)[world['row']]
    X, number = matrix(bars, world['cross'], world['funding'], others)
    M = STREAM.memory()
    STREAM.run(X[:900], number[:900], M)
    for t in range(900, 960):
        now = pd.Timestamp(number[t] * HOUR + HOUR, unit='us', tz='UTC')
        cross, funding = (world[k][(world[k].known <= now) & (world[k].known > now - pd.Timedelta('35D'))] for k in ('cross', 'funding'))
        Z, k = matrix(bars[t:t + 1], cross, funding, market_now(panel['close'][:, t], panel['close'][:, t - 1], panel.symbols)[world['row']][None])
        if t % 20 == 0: M = STREAM.restore(STREAM.state_bytes(M))
        same(pd.Series(STREAM.run(Z, k, M)[:, 0], STREAM.columns)[OUT], full.iloc[t])


def test_warm_up(world):
    settle, full = chained(STEPS, 'settle', NAMES), features(world)
    panel = world['panel']
    X, number = matrix(world['bars'], world['cross'], world['funding'], market_at_bars(panel['close'], panel.symbols)[world['row']])
    for start in (310, 777, 1003):
        part = pd.DataFrame(ENGINE.run(X[start:], number[start:]).T, full.index[start:], OUT)
        for c in OUT:
            assert part[c].iloc[:settle[c] - 1].isna().all()
            np.testing.assert_allclose(part[c].iloc[settle[c] - 1:], full[c][start + settle[c] - 1:], rtol=1e-9, atol=1e-9)


def test_scale(world):
    big, cross = 2.**30, world['cross']
    bars = world['bars'].assign(**{c: world['bars'][c] / big for c in ('open', 'high', 'low', 'close')}, volume=world['bars'].volume * big)
    coin = cross.symbol.str.startswith('ETH')
    cross = cross.assign(close=cross.close.where(~coin, cross.close / big), volume=cross.volume * big, open_interest=cross.open_interest * big)
    np.testing.assert_allclose(features(world, bars, cross), features(world), rtol=1e-9, atol=1e-9)


def test_a_gap_of_bars_and_a_flat_market(world):
    bars, full = world['bars'], features(world)
    holes = features({**world}, bars.assign(**{c: bars[c].where(~bars.index.isin(range(800, 806))) for c in ('open', 'high', 'low', 'close', 'volume')}))
    assert holes[800:806].isna().all().all() and holes.iloc[806][['venue_gap_z_168', 'basis_z_168', 'beta_btc_720']].notna().all()
    flat = np.full((900, len(NAMES)), 2.); flat[:, NAMES.index('market_return'):] = 0.; flat[:, NAMES.index('time')] = np.arange(900) * 3600
    Y = pd.DataFrame(ENGINE.run(flat, np.arange(900)).T, columns=OUT).iloc[-1]
    assert np.isfinite(Y).all() and (Y[[c for c in OUT if '_z_' in c and 'funding' not in c or 'beta' in c or 'correlation' in c or 'lead' in c]] == 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 3]), st.sampled_from([1e-8, 1., 1e6]))
def test_moving_regression_against_numpy(seed, lag, size):
    rng = np.random.default_rng(seed)
    p, N = 20, 160
    x, u = rng.standard_t(3, N), size * rng.standard_t(2, N)
    x += .3 * u / size
    s = np.zeros(7)
    for n in range(1, N + 1):
        a, b = (np.concatenate([np.zeros(p + lag + 1), v[:n]])[-(p + lag + 1):] for v in (x, u))
        got = slope_and_correlation(s, 0, a, b, lag, p, n, n == 1 or n % p == 0)
        if n >= p + lag:
            X, U = x[n - p:n], u[n - p - lag:n - lag]
            np.testing.assert_allclose([got[0] * size, got[1]], [np.cov(X, U)[0, 1] / U.var(ddof=1) * size, np.corrcoef(X, U)[0, 1]], rtol=1e-6, atol=1e-9)


# ---- real bars ----

@data
def test_real_truncation_and_sense():
    folder, stop = Path(os.environ['CRYPTOML_DATA']), pd.Timestamp('2022-05-01', tz='UTC')
    read = lambda name, start: pd.read_parquet(folder / name, filters=[('timestamp', '>=', start), ('timestamp', '<', stop)])
    start = pd.Timestamp('2021-10-01', tz='UTC')
    panel, _ = read_panel(read('spot_1h.parquet', start))
    cross = pd.concat([cross_frame(read('spot_1h_kraken.parquet', start), 'kraken'), cross_frame(read('perp_1h.parquet', start), 'binance', 'perp')], ignore_index=True)
    funding, bars = funding_frame(read('funding_8h.parquet', start)), panel.frame()
    world = dict(bars=bars[bars.symbol == 'BTC/USDT'].reset_index(drop=True), cross=cross, funding=funding, panel=panel, row=panel.symbols.index('BTC/USDT'))
    full = features(world)
    assert np.isfinite(full.to_numpy()[full.notna().to_numpy()]).all()
    for t in (1200, 2400, 4000):
        end = world['bars'].time[t] + pd.Timedelta('1h')
        cut = features(world, world['bars'][:t + 1], *(f[f.known <= end] for f in (cross, funding)), panel['close'][:, :t + 1])
        same(cut, full[:t + 1])
    assert full.basis.abs().median() < .002 and full.venue_gap.abs().median() < .002 and full.venue_share_24.dropna().between(.5, 1).all()
    assert full.filter(like='btc').isna().all().all() and full.beta_market_720.dropna().between(.2, 1.5).all()
    when = (pd.DatetimeIndex(world['bars'].time) + pd.Timedelta('1h')).as_unit('us')
    rate = funding[funding.symbol == 'BTC/USDT'].set_index('known').funding_rate
    rate.index = rate.index.as_unit('us')
    same(full.funding_rate.to_numpy()[when.isin(rate.index)], (1e4 * rate.reindex(when[when.isin(rate.index)])).to_numpy())    # at its settlement, not before
