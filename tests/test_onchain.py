"On-chain: known when known, versions, truncation and stream to the last bit, a second formula, hostile frames"
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from cryptoml.data import DataError, market_frame
from cryptoml.engine import BARS, Engine
from cryptoml.onchain import DAY, LOOKBACK, MAX_AGE, ONCHAIN, ONCHAIN_COLUMNS, STABLECOINS, VENDOR, onchain_at_bars, onchain_frame
from cryptoml.simulate import simulate

needs_data = pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')
HOUR = 3_600_000_000
NAMES = [c.removeprefix('onchain_') for c in ONCHAIN_COLUMNS]


def closes(start, n, step=HOUR): return micro([pd.Timestamp(start, tz='UTC')])[0] + step * np.arange(1, n + 1)


def micro(column): return pd.DatetimeIndex(column).as_unit('us').asi8


def made(n=520, seed=0, faults=True):
    "Rows of a coin with every column, of three stablecoins and of another coin; with faults: missing days and values, late and corrected rows, out of order"
    rng = np.random.default_rng(seed)
    time = pd.date_range('2022-01-01', periods=n, tz='UTC').as_unit('us')
    walk = lambda scale: np.exp(rng.normal(10, 2) + np.cumsum(scale * rng.normal(size=n)))
    frames = []
    for asset in ('btc', 'eth'):
        v = {c: walk(.1) for c in VENDOR}
        v |= dict(SplyCur=1e6 * np.exp(1e-4 * np.arange(n)), SplyExNtv=2e5 * walk(.01) / 1e5 % 9e5, SplyAct1yr=5e5 + 1e3 * np.cumsum(rng.normal(size=n)))
        v['IssTotNtv'] = 50 * np.exp(.1 * rng.normal(size=n))
        v['TxTfrValMeanUSD'] = v['TxTfrValMedUSD'] * np.exp(3 + rng.normal(size=n))
        frames.append(pd.DataFrame(dict(time=time, asset=asset, **v)))
    for asset, first in (('usdt', 0), ('usdc', 90), ('dai', 200)):
        frames.append(pd.DataFrame(dict(time=time, asset=asset, SplyCur=walk(.01)))[first:])
    frame = onchain_frame(pd.concat(frames))
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
    data = Path(os.environ['CRYPTOML_DATA'])
    if asset == 'eth':
        multi, gas = pd.read_parquet(data / 'onchain_multi_daily_to_2019.parquet'), pd.read_parquet(data / 'eth_gas_daily.parquet')
        return onchain_frame(pd.concat([multi[multi.asset == 'eth'], gas.assign(asset='eth')]))
    if asset == 'doge': return onchain_frame(pd.read_parquet(data / 'onchain_multi_daily_to_2019.parquet'))
    return onchain_frame(pd.read_parquet(data / f'onchain_{asset}_daily.parquet'))


def case(name):
    "Frame, symbol, closes"
    if name == 'made': return made(), 'BTC/USDT', closes('2022-01-01', 24 * 540)
    if name == 'clean': return made(faults=False), 'ETH/USDT', closes('2022-01-01', 6 * 540, 4 * HOUR)
    if name == 'simulated':
        m = simulate(n_symbols=2, n_bars=24 * 300, seed=3)
        return m.onchain, 'ETH/USDT', micro(m.bars.time[m.bars.symbol == 'ETH/USDT']) + HOUR
    return real(name), f'{name}/USDT', closes({'btc': '2021-06-01', 'ada': '2019-12-20', 'eth': '2018-06-01', 'doge': '2018-06-01'}[name], 24 * 500)


CASES = ['made', 'clean', 'simulated', *(pytest.param(c, marks=needs_data) for c in ('btc', 'ada', 'eth', 'doge'))]


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
    "Suite 1: a frame cut at the close, and one that also begins LOOKBACK days before it, give the same bits; so does one close alone"
    frame, symbol, close, X = given_case
    for t in [0, 1, 37, *np.random.default_rng(0).integers(0, len(close), 120)]:
        for f in (cut(frame, close[t]), cut(frame, close[t], LOOKBACK * DAY), frame):
            assert onchain_at_bars(f, symbol, close[t:t + 1])[0].tobytes() == X[t].tobytes(), t


def test_a_later_row_cannot_reach_back(given_case):
    frame, symbol, close, X = given_case
    at = close[len(close) // 2]
    changed = frame.copy()
    late = micro(changed.known) > at
    cols = [c for c in VENDOR if c in changed]
    changed.loc[late, cols] = changed.loc[late, cols] * 7 + 1
    Z = onchain_at_bars(changed, symbol, close)
    assert Z[close <= at].tobytes() == X[close <= at].tobytes() and not np.array_equal(Z, X, equal_nan=True)


def test_stream_through_the_engine(given_case):
    "Suite 3: batch and one bar at a time, with the frame as it was at that close"
    frame, symbol, close, X = given_case
    close, X = close[-2500:], X[-2500:]
    bars = np.column_stack([np.ones((len(close), 4)), np.ones((len(close), 5)), X])
    engine = Engine(ONCHAIN, inputs=BARS + ONCHAIN_COLUMNS)
    Y, M, number = engine.run(bars, close // HOUR), engine.memory(), close // HOUR
    assert engine.plain == [] and engine.columns == NAMES
    for t in range(len(close)):
        if t % 97 == 0: bars[t, len(BARS):] = onchain_at_bars(cut(frame, close[t], LOOKBACK * DAY), symbol, close[t:t + 1])[0]
        assert engine.run(bars[t:t + 1], number[t:t + 1], M)[:, 0].tobytes() == np.ascontiguousarray(Y[:, t]).tobytes()
    alone = {c: j for f in ONCHAIN if len(f.out) == 1 for j, c in enumerate(NAMES) if c == f.out[0]}
    for c, j in alone.items(): np.testing.assert_array_equal(Y[j], X[:, j])                    # what stands alone is passed on as it is
    assert ((np.isnan(Y) >= np.isnan(X.T)) & (np.isnan(Y) | (Y == X.T))).all()


def test_planted_correction_and_late_row():
    "A corrected day counts from its correction on, a late day from its arrival on, and neither an hour before"
    frame = made(200, faults=False)
    close, j = closes('2022-05-01', 24 * 30), NAMES.index('active_addresses_z_90d')
    base = onchain_at_bars(frame, 'BTC/USDT', close)
    row = frame[(frame.asset == 'btc') & (frame.time == '2022-05-05')]
    fixed = onchain_at_bars(pd.concat([row.assign(AdrActCnt=row.AdrActCnt * 3, known=pd.Timestamp('2022-05-10 07:00', tz='UTC')), frame]), 'BTC/USDT', close)
    changed = ~((fixed == base) | np.isnan(base) & np.isnan(fixed))
    at = pd.DatetimeIndex(close.view('M8[us]'), tz='UTC')
    assert changed[:, j].argmax() == at.get_loc(pd.Timestamp('2022-05-10 07:00', tz='UTC')) and set(np.flatnonzero(changed.any(0))) == {j, j + 1}
    late = frame.assign(known=frame.known.where((frame.time != '2022-05-05') | (frame.asset != 'btc'), pd.Timestamp('2022-05-08 03:00', tz='UTC')))
    moved = onchain_at_bars(late, 'BTC/USDT', close)
    gone = onchain_at_bars(frame.drop(row.index), 'BTC/USDT', close)
    before = at < '2022-05-08 03:00'
    np.testing.assert_array_equal(moved[before], gone[before]); np.testing.assert_array_equal(moved[~before], base[~before])
    noon = at == pd.Timestamp('2022-05-06 12:00', tz='UTC')
    assert (base[noon] != onchain_at_bars(frame, 'BTC/USDT', close - HOUR)[noon])[:, j].all()            # known at noon of the next day: at that close, not the one before


def test_delay_shifts_and_same_day_is_refused():
    frame = made(200, faults=False)
    raw = frame.drop(columns='known')
    close = closes('2022-05-01', 24 * 20)
    for h in (0, 7, 30):
        np.testing.assert_array_equal(onchain_at_bars(onchain_frame(raw, delay=f'{h}h'), 'BTC/USDT', close + h * HOUR), onchain_at_bars(onchain_frame(raw, delay='0h'), 'BTC/USDT', close))
    for bad in (frame.time, frame.time + pd.Timedelta('23h')):
        with pytest.raises(DataError, match='known before their day is over'): onchain_at_bars(frame.assign(known=bad), 'BTC/USDT', close)
        with pytest.raises(DataError, match='known before their day is over'): onchain_frame(frame.assign(known=bad))


def test_stale_is_missing():
    frame = made(200, faults=False)
    stop = pd.Timestamp('2022-05-01', tz='UTC')
    close = closes('2022-04-20', 24 * 40)
    X = onchain_at_bars(frame[frame.time < stop], 'BTC/USDT', close)
    last = micro([stop])[0] - DAY
    present = ~np.isnan(X[:, NAMES.index('mvrv')])
    assert present[close <= last + MAX_AGE].all() and np.isnan(X[close > last + MAX_AGE]).all() and (close > last + MAX_AGE).any()


def test_timeframe_does_not_matter():
    frame, symbol = made(), 'BTC/USDT'
    fine = closes('2022-06-01', 12 * 24 * 20, 5 * 60 * 1_000_000)
    X = onchain_at_bars(frame, symbol, fine, 5 * 60 * 1_000_000)
    for step in (HOUR, 4 * HOUR, DAY):
        at = fine[fine % step == 0]
        np.testing.assert_array_equal(onchain_at_bars(frame, symbol, at, step), X[fine % step == 0])


# --- what the numbers are

def plainly(frame, asset, at):
    "The same values by plain pandas, of one moment"
    seen = frame[micro(frame.known) <= at].sort_values('known', kind='stable')
    daily = lambda a: seen[seen.asset == a].groupby('time')[[c for c in VENDOR if c in seen]].last().reindex(columns=VENDOR)
    now, out = pd.Timestamp(at // DAY * DAY, unit='us', tz='UTC').as_unit('us'), dict.fromkeys(NAMES, np.nan)

    def days(x):
        x = x.replace([np.inf, -np.inf], np.nan).dropna()
        if not len(x) or at - micro([x.index[-1]])[0] > MAX_AGE: return None
        return x.reindex(pd.date_range(x.index[-1] - pd.Timedelta(400, 'D'), x.index[-1]))
    enough = lambda w: w.mean() if w.notna().sum() >= .8 * len(w) else np.nan
    z = lambda x, p: (x.iloc[-1] - x[-p:].mean()) / x[-p:].std(ddof=0) if enough(x[-p:]) == enough(x[-p:]) else np.nan
    g = lambda x, a, p: enough(x[-a:]) - enough(x[-p:])
    d = lambda x, p: x.iloc[-1] - x[-p - 4:-p].ffill().iloc[-1]
    v = daily(asset)
    with np.errstate(all='ignore'):
        L = np.log(v.where(v > 0))
        flow = (v.FlowInExNtv - v.FlowOutExNtv) / (v.FlowInExNtv + v.FlowOutExNtv)
        held, free, fees = 1 - v.SplyAct1yr / v.SplyCur, v.SplyExNtv / v.SplyCur, v.FeeTotNtv / (v.FeeTotNtv + v.IssTotNtv)
        series = dict(active_addresses=L.AdrActCnt, transactions=L.TxCnt, fee=L.FeeTotNtv - L.TxCnt, gas_price=L.avg_gas_price_wei, fee_share=fees, exchange_inflow=L.FlowInExNtv,
                      exchange_outflow=L.FlowOutExNtv, exchange_netflow=flow, exchange_supply_share=free.where(free <= 1), exchange_supply=L.SplyExNtv, whale_ratio=L.TxTfrValMeanUSD - L.TxTfrValMedUSD,
                      transfer_value=L.TxTfrValAdjUSD, long_term_supply=held.where(held >= 0), issuance=365 * v.IssTotNtv / v.SplyCur, mvrv=L.CapMVRVCur, nvt=L.CapMrktCurUSD - L.TxTfrValAdjUSD,
                      hash_rate=L.HashRate, puell=L.IssTotUSD)
    for name in NAMES:
        if name.startswith('stablecoin'): continue
        key = max((k for k in series if name.startswith(k)), key=len)
        if (x := days(series[key])) is None: continue
        p = [int(q.rstrip('d')) for q in name[len(key):].split('_') if q.rstrip('d').isdigit()]
        out[name] = z(x, *p) if '_z_' in name else g(x, *p) if '_growth' in name else d(x, *p) if '_change' in name else g(x, 1, *p) if key == 'puell' else enough(x[-p[0]:]) if p else x.iloc[-1]
    for p in (7, 30):
        total = np.zeros(2)
        for coin in STABLECOINS:
            if (x := days(daily(coin).SplyCur)) is None: continue
            ends = np.array([x.iloc[-1], x[-p - 4:-p].ffill().iloc[-1]])
            if not np.isnan(ends).any(): total += ends
        if total.all(): out[f'stablecoin_growth_{p}d'] = np.log(total[0] / total[1])
    return np.array([out[n] for n in NAMES])


def test_oracle(given_case):
    frame, symbol, close, X = given_case
    asset = symbol.split('/')[0].lower()
    for t in np.random.default_rng(1).integers(0, len(close), 25):
        np.testing.assert_allclose(X[t], plainly(frame, asset, close[t]), rtol=1e-7, atol=1e-9, err_msg=f'{symbol} {t}')


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


def test_absent_columns_and_the_sources_named():
    "Without a vendor column exactly the features that name it as their source are missing"
    frame, close = made(faults=False), closes('2023-03-01', 48, 12 * HOUR)
    own = frame[~frame.asset.isin(STABLECOINS)]
    full, named = onchain_at_bars(frame, 'BTC/USDT', close), dict(zip(NAMES, (s for f in ONCHAIN for s in f.doc['source'])))
    for c in VENDOR:
        X = onchain_at_bars(pd.concat([own.drop(columns=c), frame[frame.asset.isin(STABLECOINS)]]), 'BTC/USDT', close)
        gone = {n for n, lost in zip(NAMES, np.isnan(X).all(0)) if lost}
        assert gone == {n for n, s in named.items() if c in s.split(';')[0].split(', ') and not n.startswith('stable')}, c
        stays = [j for j, n in enumerate(NAMES) if n not in gone]
        assert X[:, stays].tobytes() == full[:, stays].tobytes()
    X = onchain_at_bars(own, 'BTC/USDT', close)
    assert {n for n, lost in zip(NAMES, np.isnan(X).all(0)) if lost} == {'stablecoin_growth_7d', 'stablecoin_growth_30d'}
    assert np.isnan(onchain_at_bars(own, 'DOGE/USDT', close)).all()


def test_size_of_the_coin_does_not_matter():
    "Counts, coins and dollars in other units: the same features"
    frame, close = made(), closes('2022-01-01', 500, DAY)
    other = frame.copy()
    for c in VENDOR:
        if c != 'CapMVRVCur': other[c] *= 1e-7 if 'USD' in c else 1e-5 if c.endswith('Ntv') or c.startswith('Sply') else 1e-3
    np.testing.assert_allclose(onchain_at_bars(other, 'BTC/USDT', close), onchain_at_bars(frame, 'BTC/USDT', close), rtol=1e-8, atol=1e-9)
    assert all(all(f.doc['scale_free']) for f in ONCHAIN)


def test_warm_up_in_days():
    "A frame that begins p days before the newest row gives what all history gives; before four fifths of p there is nothing"
    frame = made(450, faults=False)
    at = closes('2023-03-20', 1)
    full, newest = onchain_at_bars(frame, 'BTC/USDT', at)[0], pd.Timestamp('2023-03-18', tz='UTC')
    for j, name in enumerate(NAMES):
        p = max([int(q.rstrip('d')) for q in name.split('_') if q.rstrip('d').isdigit()], default=1)
        change = '_change' in name or 'stablecoin' in name
        begun = lambda days: onchain_at_bars(frame[frame.time > newest - pd.Timedelta(days, 'D')], 'BTC/USDT', at)[0, j]
        np.testing.assert_allclose(begun(p + change), full[j], rtol=1e-12)
        if p > 1: assert np.isnan(begun(p if change else int(np.ceil(.8 * p)) - 1)), name


# --- frames as people have them, and hostile ones

def test_zones_units_and_names():
    "Suite 8: any zone and unit of time, an index, other names: the same values"
    frame = made(150, faults=False)
    raw = frame[frame.asset == 'btc'].drop(columns=['known', 'asset'])
    close = closes('2022-04-20', 24)
    X = onchain_at_bars(onchain_frame(raw, 'btc'), 'BTC/USDT', close)
    assert np.isfinite(X).sum() > 200
    epoch = pd.Series(micro(raw.time), raw.index)
    for other in (raw.assign(time=raw.time.dt.tz_localize(None)), raw.assign(time=raw.time.dt.tz_convert('Asia/Tokyo')), raw.assign(time=epoch // 1000), raw.assign(time=epoch // 10**6),
                  raw.assign(time=raw.time.dt.strftime('%Y-%m-%d')), raw.rename(columns=dict(time='timestamp')), raw.rename(columns=dict(time='date')), raw.set_index('time'),
                  raw.assign(time=raw.time + pd.Timedelta('9h')), raw.assign(PriceUSD='x'), pd.concat([raw, raw[::3]]), raw[::-1]):
        assert onchain_at_bars(onchain_frame(other, 'BTC'), 'btc_usdt', close).tobytes() == X.tobytes()
    upper = onchain_frame(raw, 'btc').assign(asset='BTC')
    for f in (upper, upper.assign(known=upper.known.dt.tz_convert('Asia/Tokyo')), upper.assign(time=upper.time.dt.as_unit('ns'))):
        assert onchain_at_bars(f, 'BTC/USDT', close).tobytes() == X.tobytes()


def test_order_of_rows_does_not_matter():
    frame, close = made(), closes('2022-01-01', 200, 2 * DAY)
    assert onchain_at_bars(frame.sample(frac=1, random_state=5), 'BTC/USDT', close).tobytes() == onchain_at_bars(frame, 'BTC/USDT', close).tobytes()


def test_not_published_yet():
    frame = made(150, faults=False)
    some = frame.assign(known=frame.known.where(frame.time < '2022-05-01'))
    close = closes('2022-04-25', 24 * 12)
    want = onchain_at_bars(frame[frame.time < '2022-05-01'], 'BTC/USDT', close)
    assert onchain_at_bars(some, 'BTC/USDT', close).tobytes() == want.tobytes() == onchain_at_bars(onchain_frame(some), 'BTC/USDT', close).tobytes()


@pytest.mark.parametrize('make, says', [
    (lambda r: onchain_frame([1, 2]), 'pass a frame with at least one row'), (lambda r: onchain_frame(r[:0]), 'at least one row'),
    (lambda r: onchain_frame(r.drop(columns='time')), 'no column time, timestamp or date'), (lambda r: onchain_frame(r.drop(columns='asset')), 'no column asset'),
    (lambda r: onchain_frame(r[['time', 'asset']]), 'no column to read'), (lambda r: onchain_frame(r.assign(time=None)), 'times are missing'),
    (lambda r: onchain_frame(r.assign(HashRate='much')), 'must be numbers'), (lambda r: onchain_frame(r, delay='-1h'), 'not within'),
    (lambda r: onchain_frame(pd.concat([r, r.assign(TxCnt=1.)])), 'come twice with different values'),
    (lambda r: onchain_frame(pd.concat([r, r[['TxCnt']]], axis=1)), 'appears twice'),
    (lambda r: onchain_at_bars(r, 'BTC/USDT', np.array([0])), 'the frame has no known: make it with onchain_frame'),
    (lambda r: onchain_at_bars(onchain_frame(r), 'BTC', np.array([0])), 'cannot be split')])
def test_clear_errors(make, says):
    raw = made(20, faults=False).drop(columns='known')
    with pytest.raises(DataError, match=says): make(raw)


numbers = st.sampled_from([np.nan, np.inf, -np.inf, 0., -1., 1e-300, 1e-8, 1., 1., 2., 1e6, 1e300])


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.data())
def test_hostile_frames(data):
    "Random days, gaps, duplicates, corrections and numbers: no crash, no inf, nothing early, cut = full"
    n, columns = data.draw(st.integers(0, 60)), data.draw(st.lists(st.sampled_from(VENDOR), max_size=17, unique=True))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    day = rng.integers(19_000, 19_000 + data.draw(st.sampled_from([1, 5, 40, 500])), n)
    known = (day + 1) * DAY + rng.integers(0, data.draw(st.sampled_from([1, 3 * 24, 60 * 24])), n) * HOUR
    pool = np.array(data.draw(st.lists(numbers, min_size=1, max_size=12)))
    frame = pd.DataFrame(dict(time=pd.to_datetime(day * DAY, unit='us', utc=True), known=pd.to_datetime(known, unit='us', utc=True), asset=rng.choice(['btc', 'usdt', 'eth'], n)) | {c: rng.choice(pool, n) for c in columns})
    close = 19_000 * DAY + np.sort(rng.choice(520 * 24, 40, replace=False)) * HOUR
    X = onchain_at_bars(frame, 'BTC/USDT', close)
    assert X.shape == (40, len(ONCHAIN_COLUMNS)) and not np.isinf(X).any()
    for t in (0, 13, 39): assert onchain_at_bars(cut(frame, close[t]), 'BTC/USDT', close[t:t + 1])[0].tobytes() == X[t].tobytes()
    assert np.isnan(X[close < known.min(initial=2**62)]).all()
    within_bounds(pd.DataFrame(X, columns=NAMES))


def test_flat_and_empty():
    frame = made(450, faults=False)
    flat = frame.copy()
    flat[list(VENDOR)] = 7.
    X = pd.DataFrame(onchain_at_bars(flat, 'BTC/USDT', closes('2023-03-01', 10)), columns=NAMES)
    assert (X.filter(regex='_z_|growth|_change|puell') == 0).all(axis=None)                      # nothing moves: exactly 0, no noise of rounding
    assert onchain_at_bars(frame, 'BTC/USDT', np.array([], np.int64)).shape == (0, len(ONCHAIN_COLUMNS))
    assert np.isnan(onchain_at_bars(frame[:0], 'BTC/USDT', closes('2023-03-01', 10))).all()


@needs_data
def test_real_bars_of_two_coins():
    "On real bars: values where the vendor has them, none after its file ends"
    spot = market_frame(Path(os.environ['CRYPTOML_DATA']) / 'spot_1h.parquet', symbols=['BTC/USDT', 'ADA/USDT'], start='2021-01-01', end='2023-01-01')
    for asset, least in (('btc', 17), ('ada', 6)):
        close = micro(spot.time[spot.symbol == f'{asset.upper()}/USDT']) + HOUR
        X = onchain_at_bars(real(asset), f'{asset.upper()}/USDT', close)
        assert (np.isfinite(X).mean(0) > .999).sum() == least and not np.isinf(X).any()
