"On-chain: known when known, versions, truncation and stream to the last bit, a second formula, hostile frames"
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from cryptoml.data import DataError, market_frame
from cryptoml.engine import BARS, Engine
from cryptoml.times import DAY
from cryptoml.onchain import LOOKBACK, MAX_AGE, ONCHAIN, ONCHAIN_COLUMNS, STABLECOINS, VENDOR, onchain_at_bars
from cryptoml.onchain import onchain_frame
from cryptoml.simulate import simulate

needs_data = pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')
HOUR = 3_600_000_000
NAMES = [c.removeprefix('onchain_') for c in ONCHAIN_COLUMNS]


def micro(column): return pd.DatetimeIndex(column).as_unit('us').asi8


def moment(text): return pd.Timestamp(text, tz='UTC')


def closes(start, n, step=HOUR): return micro([moment(start)])[0] + step * np.arange(1, n + 1)


def same(a, b): assert a.tobytes() == b.tobytes()          # to the last bit


def clean(n=520, seed=0):
    "Rows of two coins with every column and of three stablecoins"
    rng = np.random.default_rng(seed)
    time = pd.date_range('2022-01-01', periods=n, tz='UTC').as_unit('us')

    def walk(scale): return np.exp(rng.normal(10, 2) + np.cumsum(scale * rng.normal(size=n)))
    frames = []
    for asset in ('btc', 'eth'):
        v = {c: walk(.1) for c in VENDOR}
        v['SplyCur'] = 1e6 * np.exp(1e-4 * np.arange(n))
        v['SplyExNtv'] = 2e5 * walk(.01) / 1e5 % 9e5
        v['SplyAct1yr'] = 5e5 + 1e3 * np.cumsum(rng.normal(size=n))
        v['IssTotNtv'] = 50 * np.exp(.1 * rng.normal(size=n))
        v['TxTfrValMeanUSD'] = v['TxTfrValMedUSD'] * np.exp(3 + rng.normal(size=n))
        frames.append(pd.DataFrame(dict(time=time, asset=asset, **v)))
    for asset, first in (('usdt', 0), ('usdc', 90), ('dai', 200)):
        frames.append(pd.DataFrame(dict(time=time, asset=asset, SplyCur=walk(.01)))[first:])
    return onchain_frame(pd.concat(frames)), rng


def made(n=520, seed=0, faults=True):
    "As `clean`; with faults: missing days and values, late and corrected rows, out of order"
    frame, rng = clean(n, seed)
    if not faults: return frame
    values = frame[list(VENDOR)].to_numpy().copy()
    values[rng.random(values.shape) < .03] = np.nan
    frame[list(VENDOR)] = values
    frame = frame[rng.random(len(frame)) > .02]
    again = frame[rng.random(len(frame)) < .1].copy()
    again['known'] += pd.to_timedelta(rng.integers(1, 400, len(again)), 'h')
    again[list(VENDOR)] = again[list(VENDOR)].to_numpy() * rng.choice([1.3, np.nan], (len(again), len(VENDOR)))
    late = rng.random(len(frame)) < .05
    frame.loc[late, 'known'] += pd.to_timedelta(rng.integers(1, 300, late.sum()), 'h')
    return pd.concat([frame, again]).sample(frac=1, random_state=seed).reset_index(drop=True)


def real(asset):
    "Rows of a vendor's file"
    data = Path(os.environ['CRYPTOML_DATA'])
    if asset in ('btc', 'ada'): return onchain_frame(pd.read_parquet(data / f'onchain_{asset}_daily.parquet'))
    multi = pd.read_parquet(data / 'onchain_multi_daily_to_2019.parquet')
    if asset == 'doge': return onchain_frame(multi)
    gas = pd.read_parquet(data / 'eth_gas_daily.parquet')
    return onchain_frame(pd.concat([multi[multi.asset == 'eth'], gas.assign(asset='eth')]))


FIRST = dict(btc='2021-06-01', ada='2019-12-20', eth='2018-06-01', doge='2018-06-01')   # close of a real case


def case(name):
    "Frame, symbol, closes"
    if name == 'made': return made(), 'BTC/USDT', closes('2022-01-01', 24 * 540)
    if name == 'clean': return made(faults=False), 'ETH/USDT', closes('2022-01-01', 6 * 540, 4 * HOUR)
    if name == 'simulated':
        m = simulate(n_symbols=2, n_bars=24 * 300, seed=3)
        return m.onchain, 'ETH/USDT', micro(m.bars.time[m.bars.symbol == 'ETH/USDT']) + HOUR
    return real(name), f'{name}/USDT', closes(FIRST[name], 24 * 500)


CASES = ['made', 'clean', 'simulated', *(pytest.param(c, marks=needs_data) for c in FIRST)]


@pytest.fixture(scope='module', params=CASES)
def given_case(request):
    frame, symbol, close = case(request.param)
    return frame, symbol, close, onchain_at_bars(frame, symbol, close, HOUR)


def cut(frame, at, back=None):
    "What was there at a close"
    keep = micro(frame.known) <= at
    if back is not None: keep &= micro(frame.time) >= at - back
    return frame[keep]


# --- knowledge

def test_truncation_and_lookback(given_case):
    "A frame cut at the close, one that also begins LOOKBACK days before it, and one close alone give the same bits"
    frame, symbol, close, X = given_case
    for t in [0, 1, 37, *np.random.default_rng(0).integers(0, len(close), 120)]:
        for f in (cut(frame, close[t]), cut(frame, close[t], LOOKBACK * DAY), frame):
            same(onchain_at_bars(f, symbol, close[t:t + 1])[0], X[t])


def test_a_later_row_cannot_reach_back(given_case):
    frame, symbol, close, X = given_case
    at = close[len(close) // 2]
    changed = frame.copy()
    late = micro(changed.known) > at
    cols = [c for c in VENDOR if c in changed]
    changed.loc[late, cols] = changed.loc[late, cols] * 7 + 1
    Z = onchain_at_bars(changed, symbol, close)
    same(Z[close <= at], X[close <= at])
    assert not np.array_equal(Z, X, equal_nan=True)


def test_stream_through_the_engine(given_case):
    "Batch and one bar at a time, with the frame as it was at that close"
    frame, symbol, close, X = given_case
    close, X = close[-2500:], X[-2500:]
    bars = np.column_stack([np.ones((len(close), 4)), np.ones((len(close), 5)), X])
    number = close // HOUR
    engine = Engine(ONCHAIN, inputs=BARS + ONCHAIN_COLUMNS)
    Y, M = engine.run(bars, number), engine.memory()
    assert engine.plain == [] and engine.columns == NAMES
    for t in range(len(close)):
        if t % 97 == 0:
            seen = cut(frame, close[t], LOOKBACK * DAY)
            bars[t, len(BARS):] = onchain_at_bars(seen, symbol, close[t:t + 1])[0]
        same(engine.run(bars[t:t + 1], number[t:t + 1], M)[:, 0], np.ascontiguousarray(Y[:, t]))
    alone = [NAMES.index(f.out[0]) for f in ONCHAIN if len(f.out) == 1]
    for j in alone: np.testing.assert_array_equal(Y[j], X[:, j])       # what stands alone is passed on as it is
    assert ((np.isnan(Y) >= np.isnan(X.T)) & (np.isnan(Y) | (Y == X.T))).all()


def different(a, b): return ~((a == b) | np.isnan(a) & np.isnan(b))


def test_a_corrected_day_counts_from_its_correction_on():
    frame, close = made(200, faults=False), closes('2022-05-01', 24 * 30)
    j = NAMES.index('active_addresses_z_90d')
    at = pd.DatetimeIndex(close.view('M8[us]'), tz='UTC')
    base = onchain_at_bars(frame, 'BTC/USDT', close)
    row = frame[(frame.asset == 'btc') & (frame.time == '2022-05-05')]
    correction = row.assign(AdrActCnt=row.AdrActCnt * 3, known=moment('2022-05-10 07:00'))
    changed = different(onchain_at_bars(pd.concat([correction, frame]), 'BTC/USDT', close), base)
    assert at[changed[:, j].argmax()] == moment('2022-05-10 07:00')
    assert set(np.flatnonzero(changed.any(0))) == {j, j + 1}


def test_a_late_day_counts_from_its_arrival_on():
    frame, close = made(200, faults=False), closes('2022-05-01', 24 * 30)
    at = pd.DatetimeIndex(close.view('M8[us]'), tz='UTC')
    day = (frame.asset == 'btc') & (frame.time == '2022-05-05')
    base = onchain_at_bars(frame, 'BTC/USDT', close)
    late = onchain_at_bars(frame.assign(known=frame.known.mask(day, moment('2022-05-08 03:00'))), 'BTC/USDT', close)
    gone = onchain_at_bars(frame[~day], 'BTC/USDT', close)
    before = at < '2022-05-08 03:00'
    np.testing.assert_array_equal(late[before], gone[before])
    np.testing.assert_array_equal(late[~before], base[~before])


def test_a_day_is_known_at_noon_of_the_next_at_that_close_and_not_the_one_before():
    frame, j = made(200, faults=False), NAMES.index('active_addresses_z_90d')
    eleven, noon = (onchain_at_bars(frame, 'BTC/USDT', micro([moment(f'2022-05-06 {h}:00')])) for h in (11, 12))
    assert eleven[0, j] != noon[0, j]


@pytest.mark.parametrize('h', [0, 7, 30])
def test_a_delay_shifts(h):
    raw, close = made(200, faults=False).drop(columns='known'), closes('2022-05-01', 24 * 20)
    late = onchain_at_bars(onchain_frame(raw, delay=f'{h}h'), 'BTC/USDT', close + h * HOUR)
    np.testing.assert_array_equal(late, onchain_at_bars(onchain_frame(raw, delay='0h'), 'BTC/USDT', close))


@pytest.mark.parametrize('after', ['0h', '23h'])
def test_same_day_is_refused(after):
    frame = made(200, faults=False)
    bad = frame.assign(known=frame.time + pd.Timedelta(after))
    with pytest.raises(DataError, match='known before their day is over'):
        onchain_at_bars(bad, 'BTC/USDT', closes('2022-05-01', 24))
    with pytest.raises(DataError, match='known before their day is over'): onchain_frame(bad)


def test_stale_is_missing():
    frame = made(200, faults=False)
    stop, close = moment('2022-05-01'), closes('2022-04-20', 24 * 40)
    X = onchain_at_bars(frame[frame.time < stop], 'BTC/USDT', close)
    last = micro([stop])[0] - DAY
    stale = close > last + MAX_AGE
    assert np.isfinite(X[~stale, NAMES.index('mvrv')]).all()
    assert np.isnan(X[stale]).all() and stale.any()


def test_timeframe_does_not_matter():
    frame, symbol = made(), 'BTC/USDT'
    fine = closes('2022-06-01', 12 * 24 * 20, 5 * 60 * 1_000_000)
    X = onchain_at_bars(frame, symbol, fine, 5 * 60 * 1_000_000)
    for step in (HOUR, 4 * HOUR, DAY):
        at = fine[fine % step == 0]
        np.testing.assert_array_equal(onchain_at_bars(frame, symbol, at, step), X[fine % step == 0])


# --- what the numbers are

MEAN, Z, GROWTH, CHANGE = 'mean', 'z', 'growth', 'change'
PLAIN = [    # name, daily value, statistic, its windows
    ('active_addresses_z_90d', 'addresses', Z, [90]), ('active_addresses_growth_7_90d', 'addresses', GROWTH, [7, 90]),
    ('transactions_z_90d', 'transactions', Z, [90]), ('transactions_growth_7_90d', 'transactions', GROWTH, [7, 90]),
    ('fee_z_90d', 'fee', Z, [90]), ('gas_price_z_90d', 'gas', Z, [90]), ('fee_share_7d', 'fee_share', MEAN, [7]),
    ('exchange_inflow_z_90d', 'inflow', Z, [90]), ('exchange_outflow_z_90d', 'outflow', Z, [90]),
    ('exchange_netflow_7d', 'netflow', MEAN, [7]), ('exchange_netflow_z_90d', 'netflow', Z, [90]),
    ('exchange_supply_share', 'held_there', MEAN, [1]), ('exchange_supply_change_30d', 'exchange', CHANGE, [30]),
    ('whale_ratio_z_90d', 'whales', Z, [90]), ('whale_ratio_growth_7_90d', 'whales', GROWTH, [7, 90]),
    ('transfer_value_z_90d', 'transfers', Z, [90]), ('issuance_7d', 'issuance', MEAN, [7]),
    ('long_term_supply', 'held', MEAN, [1]), ('long_term_supply_change_30d', 'held', CHANGE, [30]),
    ('mvrv', 'mvrv', MEAN, [1]), ('mvrv_z_365d', 'mvrv', Z, [365]),
    ('nvt_90d', 'nvt', MEAN, [90]), ('nvt_z_365d', 'nvt', Z, [365]),
    ('hash_rate_growth_30_60d', 'hash_rate', GROWTH, [30, 60]), ('puell_365d', 'puell', GROWTH, [1, 365]),
]


def enough(w): return w.mean() if w.notna().sum() >= .8 * len(w) else np.nan


def statistic(kind, x, p):
    "A statistic of the days that end with the newest"
    if kind == MEAN: return enough(x[-p[0]:])
    if kind == GROWTH: return enough(x[-p[0]:]) - enough(x[-p[1]:])
    if kind == CHANGE: return x.iloc[-1] - x[-p[0] - 4:-p[0]].ffill().iloc[-1]
    w = x[-p[0]:]
    return np.nan if np.isnan(enough(w)) else (x.iloc[-1] - w.mean()) / w.std(ddof=0)


def daily_values(v):
    "Daily values of a coin from a vendor's columns"
    L = np.log(v.where(v > 0))
    held, there = 1 - v.SplyAct1yr / v.SplyCur, v.SplyExNtv / v.SplyCur
    return dict(
        addresses=L.AdrActCnt, transactions=L.TxCnt, fee=L.FeeTotNtv - L.TxCnt, gas=L.avg_gas_price_wei,
        fee_share=v.FeeTotNtv / (v.FeeTotNtv + v.IssTotNtv), inflow=L.FlowInExNtv, outflow=L.FlowOutExNtv,
        netflow=(v.FlowInExNtv - v.FlowOutExNtv) / (v.FlowInExNtv + v.FlowOutExNtv),
        held_there=there.where(there <= 1), exchange=L.SplyExNtv, whales=L.TxTfrValMeanUSD - L.TxTfrValMedUSD,
        transfers=L.TxTfrValAdjUSD, held=held.where(held >= 0), issuance=365 * v.IssTotNtv / v.SplyCur,
        mvrv=L.CapMVRVCur, nvt=L.CapMrktCurUSD - L.TxTfrValAdjUSD, hash_rate=L.HashRate, puell=L.IssTotUSD)


def plainly(frame, asset, at):
    "The same values by plain pandas, of one moment"
    seen = frame[micro(frame.known) <= at].sort_values('known', kind='stable')
    have = [c for c in VENDOR if c in seen]
    out = dict.fromkeys(NAMES, np.nan)

    def daily(a): return seen[seen.asset == a].groupby('time')[have].last().reindex(columns=VENDOR)

    def days(x):
        x = x.replace([np.inf, -np.inf], np.nan).dropna()
        if not len(x) or at - micro([x.index[-1]])[0] > MAX_AGE: return None
        return x.reindex(pd.date_range(x.index[-1] - pd.Timedelta(400, 'D'), x.index[-1]))

    with np.errstate(all='ignore'): values = daily_values(daily(asset))
    for name, value, kind, p in PLAIN:
        x = days(values[value])
        if x is not None: out[name] = statistic(kind, x, p)
    for p in (7, 30):
        total = np.zeros(2)
        for coin in STABLECOINS:
            x = days(daily(coin).SplyCur)
            if x is None: continue
            ends = np.array([x.iloc[-1], x[-p - 4:-p].ffill().iloc[-1]])
            if not np.isnan(ends).any(): total += ends
        if total.all(): out[f'stablecoin_growth_{p}d'] = np.log(total[0] / total[1])
    return np.array([out[n] for n in NAMES])


def test_oracle(given_case):
    frame, symbol, close, X = given_case
    asset = symbol.split('/')[0].lower()
    for t in np.random.default_rng(1).integers(0, len(close), 25):
        plain = plainly(frame, asset, close[t])
        np.testing.assert_allclose(X[t], plain, rtol=1e-7, atol=1e-9, err_msg=f'{symbol} {t}')


def within_bounds(X):
    "Values lie in the range that the unit states"
    for f in ONCHAIN:
        for name, unit in zip(f.out, f.doc['unit']):
            if ' to ' in unit:
                lo, hi = map(float, unit.split(', ')[-1].split(' to '))
                assert (X[name].isna() | X[name].between(lo - 1e-9, hi + 1e-9)).all(), name


def test_every_column_has_values_and_its_bounds():
    X = pd.DataFrame(onchain_at_bars(made(faults=False), 'BTC/USDT', closes('2023-03-01', 24 * 60)), columns=NAMES)
    assert X.notna().all(axis=None)
    assert X.abs().max().max() < 25
    within_bounds(X)


@pytest.fixture(scope='module')
def world():
    "A clean frame, closes a year later, and what they give"
    frame, close = made(faults=False), closes('2023-03-01', 48, 12 * HOUR)
    return frame, close, onchain_at_bars(frame, 'BTC/USDT', close)


def lost(X): return {name for name, gone in zip(NAMES, np.isnan(X).all(0)) if gone}


@pytest.mark.parametrize('column', VENDOR)
def test_without_a_column_exactly_the_features_that_name_it_are_missing(world, column):
    frame, close, full = world
    coins = frame.asset.isin(STABLECOINS)
    X = onchain_at_bars(pd.concat([frame[~coins].drop(columns=column), frame[coins]]), 'BTC/USDT', close)
    named = dict(zip(NAMES, (source.split(';')[0].split(', ') for f in ONCHAIN for source in f.doc['source'])))
    gone = lost(X)
    assert gone == {name for name, columns in named.items() if column in columns and not name.startswith('stable')}
    stays = [j for j, name in enumerate(NAMES) if name not in gone]
    same(X[:, stays], full[:, stays])


def test_without_rows_of_stablecoins_only_their_growth_is_missing(world):
    frame, close, _ = world
    own = frame[~frame.asset.isin(STABLECOINS)]
    assert lost(onchain_at_bars(own, 'BTC/USDT', close)) == {'stablecoin_growth_7d', 'stablecoin_growth_30d'}
    assert np.isnan(onchain_at_bars(own, 'DOGE/USDT', close)).all()


def test_size_of_the_coin_does_not_matter():
    "Counts, coins and dollars in other units: the same features"
    frame, close = made(), closes('2022-01-01', 500, DAY)
    other = frame.copy()

    def unit(c):
        if c == 'CapMVRVCur': return 1
        if 'USD' in c: return 1e-7
        return 1e-5 if c.endswith('Ntv') or c.startswith('Sply') else 1e-3
    for c in VENDOR: other[c] *= unit(c)
    X, Z = (onchain_at_bars(f, 'BTC/USDT', close) for f in (frame, other))
    np.testing.assert_allclose(Z, X, rtol=1e-8, atol=1e-9)
    assert all(all(f.doc['scale_free']) for f in ONCHAIN)


def test_warm_up_in_days():
    "A frame of the last p days gives what all history gives; one of less than four fifths of p gives nothing"
    frame = made(450, faults=False)
    at = closes('2023-03-20', 1)
    full = onchain_at_bars(frame, 'BTC/USDT', at)[0]

    def begun(days):
        "From a frame that begins so many days before the newest"
        since = moment('2023-03-18') - pd.Timedelta(days, 'D')
        return onchain_at_bars(frame[frame.time > since], 'BTC/USDT', at)[0]
    for j, name in enumerate(NAMES):
        p = max([int(q.rstrip('d')) for q in name.split('_') if q.rstrip('d').isdigit()], default=1)
        change = '_change' in name or 'stablecoin' in name
        too_few = p if change else int(np.ceil(.8 * p)) - 1
        np.testing.assert_allclose(begun(p + change)[j], full[j], rtol=1e-12)
        if p > 1: assert np.isnan(begun(too_few)[j]), name


# --- frames as people have them, and hostile ones

def epoch(r, unit): return r.assign(time=micro(r.time) // unit)


WRITTEN = {
    'naive': lambda r: r.assign(time=r.time.dt.tz_localize(None)),
    'Tokyo': lambda r: r.assign(time=r.time.dt.tz_convert('Asia/Tokyo')),
    'milliseconds': lambda r: epoch(r, 1000),
    'seconds': lambda r: epoch(r, 10**6),
    'texts': lambda r: r.assign(time=r.time.dt.strftime('%Y-%m-%d')),
    'timestamp': lambda r: r.rename(columns=dict(time='timestamp')),
    'date': lambda r: r.rename(columns=dict(time='date')),
    'index': lambda r: r.set_index('time'),
    'within the day': lambda r: r.assign(time=r.time + pd.Timedelta('9h')),
    'more columns': lambda r: r.assign(PriceUSD='x'),
    'rows twice': lambda r: pd.concat([r, r[::3]]),
    'backwards': lambda r: r[::-1],
}


@pytest.fixture(scope='module')
def one_coin():
    "Rows of a vendor, closes, and what they give"
    frame, close = made(150, faults=False), closes('2022-04-20', 24)
    raw = frame[frame.asset == 'btc'].drop(columns=['known', 'asset'])
    X = onchain_at_bars(onchain_frame(raw, 'btc'), 'BTC/USDT', close)
    assert np.isfinite(X).sum() > 200
    return raw, close, X


@pytest.mark.parametrize('way', WRITTEN)
def test_rows_as_people_have_them(one_coin, way):
    raw, close, X = one_coin
    same(onchain_at_bars(onchain_frame(WRITTEN[way](raw), 'BTC'), 'btc_usdt', close), X)


@pytest.mark.parametrize('change', [
    pytest.param(lambda f: f.assign(asset='BTC'), id='upper case'),
    pytest.param(lambda f: f.assign(known=f.known.dt.tz_convert('Asia/Tokyo')), id='Tokyo'),
    pytest.param(lambda f: f.assign(time=f.time.dt.as_unit('ns')), id='nanoseconds'),
])
def test_frames_as_people_have_them(one_coin, change):
    raw, close, X = one_coin
    same(onchain_at_bars(change(onchain_frame(raw, 'btc')), 'BTC/USDT', close), X)


def test_order_of_rows_does_not_matter():
    frame, close = made(), closes('2022-01-01', 200, 2 * DAY)
    shuffled = frame.sample(frac=1, random_state=5)
    same(onchain_at_bars(shuffled, 'BTC/USDT', close), onchain_at_bars(frame, 'BTC/USDT', close))


def test_not_published_yet():
    frame = made(150, faults=False)
    some = frame.assign(known=frame.known.where(frame.time < '2022-05-01'))
    close = closes('2022-04-25', 24 * 12)
    want = onchain_at_bars(frame[frame.time < '2022-05-01'], 'BTC/USDT', close)
    same(onchain_at_bars(some, 'BTC/USDT', close), want)
    same(onchain_at_bars(onchain_frame(some), 'BTC/USDT', close), want)


def at_bars(frame, symbol='BTC/USDT'): return onchain_at_bars(frame, symbol, np.array([0]))


@pytest.mark.parametrize('make, says', [
    (lambda r: onchain_frame([1, 2]), 'pass a frame with at least one row'),
    (lambda r: onchain_frame(r[:0]), 'at least one row'),
    (lambda r: onchain_frame(r.drop(columns='time')), 'no column time, timestamp or date'),
    (lambda r: onchain_frame(r.drop(columns='asset')), 'no column asset'),
    (lambda r: onchain_frame(r[['time', 'asset']]), 'no column to read'),
    (lambda r: onchain_frame(r.assign(time=None)), 'times are missing'),
    (lambda r: onchain_frame(r.assign(HashRate='much')), 'must be numbers'),
    (lambda r: onchain_frame(r, delay='-1h'), 'not within'),
    (lambda r: onchain_frame(pd.concat([r, r.assign(TxCnt=1.)])), 'come twice with different values'),
    (lambda r: onchain_frame(pd.concat([r, r[['TxCnt']]], axis=1)), 'appears twice'),
    (lambda r: at_bars(r), 'the frame has no known: make it with onchain_frame'),
    (lambda r: at_bars(onchain_frame(r), 'BTC'), 'cannot be split'),
])
def test_clear_errors(make, says):
    raw = made(20, faults=False).drop(columns='known')
    with pytest.raises(DataError, match=says): make(raw)


numbers = st.sampled_from([np.nan, np.inf, -np.inf, 0., -1., 1e-300, 1e-8, 1., 1., 2., 1e6, 1e300])


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.data())
def test_hostile_frames(data):
    "Random days, gaps, duplicates, corrections and numbers: no crash, no inf, nothing early, cut = full"
    n = data.draw(st.integers(0, 60))
    columns = data.draw(st.lists(st.sampled_from(VENDOR), max_size=17, unique=True))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    span, latest = data.draw(st.sampled_from([1, 5, 40, 500])), data.draw(st.sampled_from([1, 3 * 24, 60 * 24]))
    day = rng.integers(19_000, 19_000 + span, n)
    known = (day + 1) * DAY + rng.integers(0, latest, n) * HOUR
    pool = np.array(data.draw(st.lists(numbers, min_size=1, max_size=12)))
    times = dict(time=day * DAY, known=known)
    frame = pd.DataFrame({c: pd.to_datetime(t, unit='us', utc=True) for c, t in times.items()})
    frame['asset'] = rng.choice(['btc', 'usdt', 'eth'], n)
    for c in columns: frame[c] = rng.choice(pool, n)
    close = 19_000 * DAY + np.sort(rng.choice(520 * 24, 40, replace=False)) * HOUR
    X = onchain_at_bars(frame, 'BTC/USDT', close)
    assert X.shape == (40, len(ONCHAIN_COLUMNS)) and not np.isinf(X).any()
    for t in (0, 13, 39): same(onchain_at_bars(cut(frame, close[t]), 'BTC/USDT', close[t:t + 1])[0], X[t])
    assert np.isnan(X[close < known.min(initial=2**62)]).all()
    within_bounds(pd.DataFrame(X, columns=NAMES))


def test_flat_and_empty():
    frame = made(450, faults=False)
    flat = frame.copy()
    flat[list(VENDOR)] = 7.
    X = pd.DataFrame(onchain_at_bars(flat, 'BTC/USDT', closes('2023-03-01', 10)), columns=NAMES)
    assert (X.filter(regex='_z_|growth|_change|puell') == 0).all(axis=None)        # exactly 0, no noise of rounding
    assert onchain_at_bars(frame, 'BTC/USDT', np.array([], np.int64)).shape == (0, len(ONCHAIN_COLUMNS))
    assert np.isnan(onchain_at_bars(frame[:0], 'BTC/USDT', closes('2023-03-01', 10))).all()


@needs_data
def test_real_bars_of_two_coins():
    "On real bars: values where the vendor has them, none after its file ends"
    path, symbols = Path(os.environ['CRYPTOML_DATA']) / 'spot_1h.parquet', dict(btc='BTC/USDT', ada='ADA/USDT')
    spot = market_frame(path, symbols=list(symbols.values()), start='2021-01-01', end='2023-01-01')
    for asset, least in (('btc', 17), ('ada', 6)):
        close = micro(spot.time[spot.symbol == symbols[asset]]) + HOUR
        X = onchain_at_bars(real(asset), symbols[asset], close)
        assert (np.isfinite(X).mean(0) > .999).sum() == least and not np.isinf(X).any()
