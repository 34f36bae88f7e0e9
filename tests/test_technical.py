"""Technical features: plain second implementations on random and real bars, hostile bars, scale, truncation, stream, warm-up"""
import os
from pathlib import Path
import numpy as np, pandas as pd, pytest, talib
from hypothesis import given, settings, strategies as st
from cryptoml.engine import BARS, Engine, chained, ordered
from cryptoml.technical import TECHNICAL, deviation, highest, latest, mean_std, patterns, power_sums, reversals, slide, slide_size, total

FIRST, SETTLE = (chained(ordered(TECHNICAL), key) for key in ('first', 'settle'))
ENGINE, STREAM = Engine(TECHNICAL), Engine(TECHNICAL, block=16)
NAMES = ENGINE.columns
PATTERNS = patterns.out + reversals.out
SAME = [c for c in NAMES if c not in PATTERNS]                  # patterns jump when a comparison at its limit rounds otherwise
PRICES, VOLUMES = ['open', 'high', 'low', 'close'], ['volume', 'taker_buy_volume']


def simulated(n=3000, seed=0, start='2023-11-20'):
    rng = np.random.default_rng(seed)
    vol = pd.Series(rng.standard_normal(n)).ewm(alpha=0.03).mean().to_numpy() * 4
    steps = 0.006 * np.exp(vol)[:, None] * rng.standard_t(4, (n, 8)) / 8**0.5
    path = 1000 * np.exp(np.cumsum(steps).reshape(n, 8))
    b = pd.DataFrame(dict(open=path[:, 0], high=path.max(1), low=path.min(1), close=path[:, -1]), pd.date_range(start, periods=n, freq='h', tz='UTC'))
    b['volume'] = np.exp(2 + vol + rng.standard_normal(n))
    b['taker_buy_volume'] = b.volume * rng.uniform(0.3, 0.7, n)
    return b


def matrix(b):
    seconds = b.index.as_unit('s').asi8
    X = b.assign(time=seconds.astype(float)).reindex(columns=BARS).to_numpy(float, copy=True)
    return np.ascontiguousarray(X), seconds // 3600


def features(b):
    return pd.DataFrame(ENGINE.run(*matrix(b)).T, b.index, NAMES)


def reference(b):
    "Every feature but the patterns once more, in pandas, written from the formulas"
    o, h, l, c, v = (b[k] for k in ('open', 'high', 'low', 'close', 'volume'))
    x, y, typical = np.log(c), {}, (h + l + c) / 3
    r, before = x.diff(), c.shift()
    total = lambda s, p: s.rolling(p).apply(np.sum, raw=True)    # each window on its own: exact
    sd = lambda s, p: s.rolling(p).apply(np.std, raw=True)
    wilder = lambda s, p: pd.Series(seeded(s, p, 1 / p), s.index)
    ema = lambda s, p: pd.Series(seeded(s, p, 2 / (p + 1)), s.index)
    share = lambda a, z, p: total(a, p) / total(z, p)
    clv = ((2 * c - h - l) / (h - l)).where(h > l, 0.)
    rv = {p: (total(r**2, p) / p)**0.5 for p in (24, 168, 720)}
    u2, body2 = np.log(h / l)**2, np.log(c / o)**2
    for p in (24, 168, 720):
        top, low = h.rolling(p).max(), l.rolling(p).min()
        y |= {f'realized_volatility_{p}': rv[p], f'parkinson_{p}': (total(u2.where(r.notna()), p) / (4 * np.log(2) * p))**0.5, f'garman_klass_{p}': (total((u2 / 2 - (2 * np.log(2) - 1) * body2).where(r.notna()), p) / p)**0.5,
              f'donchian_percent_{p}': (c - low) / (top - low), f'donchian_width_{p}': np.log(top / low), f'drawdown_{p}': np.log(c / top)}
    y |= {'volatility_ratio_24_168': np.log(rv[24] / rv[168]), 'vol_of_vol_168': sd(rv[24], 168) / (total(rv[24], 168) / 168)}
    y |= {f'log_return_{p}': x.diff(p) for p in (1, 4, 24, 72, 168)} | {f'scaled_return_{p}': x.diff(p) / (rv[168] * p**0.5) for p in (1, 4, 24, 168)} | {f'roc_{p}': 100 * c.pct_change(p) for p in (12, 24)}
    y |= {f'sma_distance_{p}': c / (total(c, p) / p) - 1 for p in (20, 50, 100, 200)} | {f'ema_distance_{p}': c / ema(c, p) - 1 for p in (9, 21, 50, 200)}
    line = (ema(c, 12) - ema(c, 26)).where(ema(c, 26).notna())
    for name, s in dict(macd=line, ppo=100 * line / ema(c, 26)).items():
        last = 'macd_diff' if name == 'macd' else 'ppo_hist'
        y |= {f'{name}_12_26_9': s, f'{name}_signal_12_26_9': ema(s, 9), f'{last}_12_26_9': s - ema(s, 9)}
    for p in (20, 50): y |= {f'bb_percent_{p}': 0.5 + (c - total(c, p) / p) / (4 * sd(c, p)), f'bb_width_{p}': 400 * sd(c, p) / (total(c, p) / p)}
    gain, loss = c.diff().clip(lower=0), -c.diff().clip(upper=0)
    y |= {f'rsi_{p}': 100 * wilder(gain, p) / (wilder(gain, p) + wilder(loss, p)) for p in (7, 14, 28)}
    tr = np.maximum(h, before) - np.minimum(l, before)
    tr = tr.where(before.notna())
    for p in (14, 28):
        k = 100 * (c - l.rolling(p).min()) / (h.rolling(p).max() - l.rolling(p).min())
        mean = total(typical, p) / p
        mad = typical.rolling(p).apply(lambda w: np.abs(w - w.mean()).mean(), raw=True)
        y |= {f'stoch_{p}': k, f'stoch_signal_{p}': total(k, 3) / 3, f'stoch_slow_{p}': total(total(k, 3) / 3, 3) / 3, f'wr_{p}': k - 100, f'cci_{p}': (typical - mean) / (0.015 * mad), f'atr_{p}': wilder(tr, p), f'natr_{p}': 100 * wilder(tr, p) / c}
    mid = (h + l) / 2
    y['awesome_5_34'] = total(mid, 5) / 5 - total(mid, 34) / 34
    y['awesome_percent_5_34'] = 100 * y['awesome_5_34'] / c
    up, down = h.diff(), -l.diff()
    plus, minus = (wilder(a.where((a > z) & (a > 0), 0.).where(before.notna()), 14) for a, z in ((up, down), (down, up)))
    y |= {'adx_14': wilder(100 * (plus - minus).abs() / (plus + minus), 14), 'adx_pos_14': 100 * plus / wilder(tr, 14), 'adx_neg_14': 100 * minus / wilder(tr, 14)}
    y |= {'aroon_up_25': 4 * h.rolling(26).apply(lambda w: 25 - np.argmax(w[::-1]), raw=True), 'aroon_down_25': 4 * l.rolling(26).apply(lambda w: 25 - np.argmin(w[::-1]), raw=True)}
    for p in (20, 50):
        e = ema(c, p)
        e2 = ema(e, p)
        raw = {f'sma_{p}': total(c, p) / p, f'std_{p}': sd(c, p), f'ema_{p}': e, f'dema_{p}': 2 * e - e2, f'tema_{p}': 3 * e - 3 * e2 + ema(e2, p), f'wma_{p}': c.rolling(p).apply(lambda w: w @ np.arange(1, p + 1) / (p * (p + 1) / 2), raw=True)}
        y |= raw | {f'bb_{k}_{p}': raw[f'sma_{p}'] + f * raw[f'std_{p}'] for k, f in dict(high=2, low=-2).items()} | {f'{k}_distance_{p}': c / raw[f'{k}_{p}'] - 1 for k in ('dema', 'tema', 'wma')}
    for p in (10, 30):
        er, k = (c.diff(p).abs() / total(c.diff().abs(), p)).to_numpy(), np.full(len(c), np.nan)
        last = c.iloc[p - 1]
        for t in range(p, len(c)): k[t] = last = last + (2 / 31 + (2 / 3 - 2 / 31) * er[t])**2 * (c.iloc[t] - last)
        y |= {f'kama_{p}': pd.Series(k, b.index), f'kama_distance_{p}': c / k - 1}
    for p in (15, 30):
        e = ema(ema(ema(c, p), p), p)
        y[f'trix_{p}'] = 100 * e.pct_change()
    bp = c - np.minimum(l, before)
    y['ultimate_7_14_28'] = 100 * (4 * share(bp, tr, 7) + 2 * share(bp, tr, 14) + share(bp, tr, 28)) / 7
    k = y['rsi_14']
    k = 100 * (k - k.rolling(14).min()) / (k.rolling(14).max() - k.rolling(14).min())
    y |= {'stochrsi_14': k, 'stochrsi_k_14': total(k, 3) / 3, 'stochrsi_d_14': total(total(k, 3) / 3, 3) / 3}
    y['psar'] = pd.Series(talib.SAR(h, l), b.index)
    y['psar_distance'] = c / y['psar'] - 1
    y['keltner_percent_20_14'] = 0.5 + (c - y['ema_20']) / (4 * y['atr_14'])
    y |= {'trending_14': np.sign(plus - minus).where(y['adx_14'] > 25, 0.), 'ranging_14': (y['adx_14'] < 20) * 1.}
    high, low = np.maximum(h, before), np.minimum(l, before)
    for p in (14, 72): y[f'choppiness_{p}'] = 100 * np.log10(total(tr, p) / (high.rolling(p).max() - low.rolling(p).min())) / np.log10(p)
    for p in (24, 168, 720):
        top, low = h.rolling(p).max(), l.rolling(p).min()
        lines = np.array([[top - q * (top - low)] for q in (0, 0.236, 0.382, 0.5, 0.618, 0.786, 1)])[:, 0]
        apart = (c.to_numpy() - lines) / (top - low).to_numpy()
        y |= {f'donchian_high_{p}': top, f'donchian_low_{p}': low, f'fibonacci_distance_{p}': pd.Series(np.take_along_axis(apart, np.abs(np.nan_to_num(apart, nan=9)).argmin(0)[None], 0)[0], b.index)}
        if p == 168: y |= {f'fibonacci_{round(1000 * q)}_168': top - q * (top - low) for q in (0.236, 0.382, 0.5, 0.618, 0.786)}
    for p in (24, 168): y[f'rogers_satchell_{p}'] = (total((np.log(h / c) * np.log(h / o) + np.log(l / c) * np.log(l / o)).where(r.notna()), p) / p)**0.5
    line = (clv * v).cumsum()
    y['adosc_3_10'] = line.ewm(alpha=1 / 2, adjust=False).mean() - line.ewm(alpha=2 / 11, adjust=False).mean()
    y['adosc_share_3_10'] = y['adosc_3_10'] / ema(v, 10)
    sign, money, drift = np.sign(c.diff()), typical * v, typical.diff()
    for p in (24, 168):
        y |= {f'volume_z_{p}': (v - total(v, p) / p) / sd(v, p), f'obv_flow_{p}': share(sign * v, v, p), f'cmf_{p}': share(clv * v, v, p), f'vwap_{p}': share(money, v, p), f'vwap_distance_{p}': c / share(money, v, p) - 1,
              f'efficiency_ratio_{p}': x.diff(p).abs() / total(r.abs(), p)}
        fit = [np.polyfit(np.arange(p), w, 1)[0] for w in np.lib.stride_tricks.sliding_window_view(x.to_numpy(), p)]
        y |= {f'trend_slope_{p}': pd.Series(np.r_[[np.nan] * (p - 1), fit], b.index), f'trend_r2_{p}': x.rolling(p).apply(lambda w: np.corrcoef(np.arange(p), w)[0, 1]**2, raw=True)}
    y['volume_ratio_24_168'] = np.log(total(v, 24) / 24 / (total(v, 168) / 168))
    for p in (14, 28): y[f'mfi_{p}'] = 100 * share(money.where(drift > 0, 0.), money.where(drift != 0, 0.), p).where(np.arange(len(b)) >= p)
    amihud = {p: total(r.abs(), p) / total(money, p) for p in (24, 720)}
    y['illiquidity_24_720'] = np.log(amihud[24] / amihud[720])
    y |= {f'taker_buy_share_{p}': share(b.taker_buy_volume, v, p) for p in (1, 24, 168)}
    top, bottom = np.maximum(o, c), np.minimum(o, c)
    y |= {k: (s / (h - l)).where(h > l, 0.) for k, s in dict(body=c - o, upper_shadow=h - top, lower_shadow=bottom - l).items()} | {'clv': clv}
    for p in (72, 168):
        moment = lambda q: r.rolling(p).apply(lambda w: ((w - w.mean())**q).mean(), raw=True)
        y |= {f'skewness_{p}': moment(3) / moment(2)**1.5, f'kurtosis_{p}': moment(4) / moment(2)**2 - 3}
    t = b.index.tz_convert('UTC')
    for k, turn in dict(hour=t.hour / 24 + t.minute / 1440, weekday=t.day_of_week / 7, month=(t.month - 1) / 12).items():
        y |= {f'{k}_sin': pd.Series(np.sin(2 * np.pi * turn), b.index), f'{k}_cos': pd.Series(np.cos(2 * np.pi * turn), b.index)}
    return pd.DataFrame(y)


def seeded(s, p, a):
    "Average that starts as the plain mean of its first p values"
    x, out = s.to_numpy(), np.full(len(s), np.nan)
    k = int(np.isfinite(x).argmax())
    out[k + p - 1] = m = x[k:k + p].mean()
    for t in range(k + p, len(x)): out[t] = m = m + a * (x[t] - m)
    return out


def compare(b, columns=SAME, eps=1e-7):
    ours, theirs = features(b), reference(b)
    assert set(theirs) == set(SAME)
    for c in columns:
        k = FIRST[c] + (0 if not c.startswith(('macd', 'ppo', 'adx', 'psar', 'adosc', 'trending', 'ranging')) else 400)
        gap = (ours[c] - theirs[c])[k - 1:].abs().max() / theirs[c].std()
        assert gap < eps, f'{c}: {gap:.1e}'


def test_second_implementation_on_random_bars():
    compare(simulated(1500, seed=3))


def real(symbol, rows):
    d = pd.read_parquet(Path(os.environ['CRYPTOML_DATA']) / 'spot_1h.parquet')
    return d[d.symbol == symbol].set_index('timestamp').drop(columns='symbol').iloc[rows]


@pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')
@pytest.mark.parametrize('symbol', ['ETHUSDT', 'DOGEUSDT'])
def test_second_implementation_on_real_bars(symbol):
    b = real(symbol, slice(-1500, None)).assign(taker_buy_volume=np.nan)
    compare(b, [c for c in SAME if not c.startswith('taker')])


@pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')
def test_whole_history_of_a_coin_is_finite_and_bounded():
    "Outages, zero-volume hours and a 70 % hour: values where declared, none infinite, shares within their bounds"
    b = real('DOGEUSDT', slice(None))
    Y = features(b)
    assert not np.isinf(Y.to_numpy()).any()
    assert Y[[c for c in NAMES if not c.startswith('taker')]][720:].isna().mean().max() < 0.05      # an outage of more than a day starts again
    bounded(Y)


def test_talib_from_its_first_value():
    b = simulated(400, seed=4)
    Y, args = features(b), (b.high, b.low, b.close)
    for p in (14, 28):
        for name, theirs in dict(rsi=talib.RSI(b.close, p), atr=talib.ATR(*args, p), cci=talib.CCI(*args, p), wr=talib.WILLR(*args, p)).items():
            np.testing.assert_allclose(Y[f'{name}_{p}'], theirs, rtol=1e-8, atol=1e-8)              # the same bars missing, too
    np.testing.assert_allclose(Y.mfi_14, talib.MFI(*args, b.volume, 14), rtol=1e-8)


def test_enough_features_documented():
    docs = [d for f in TECHNICAL for d in zip(f.out, f.doc['feature'], f.doc['formula'], f.doc['unit'])]
    assert len(NAMES) >= 150 and len(set(NAMES)) == len(NAMES)
    assert not [name for name, feature, formula, unit in docs if feature and not (formula and unit)]
    assert ENGINE.plain == []


def test_first_values_are_where_declared():
    Y = features(simulated(1200))
    for c in NAMES:
        assert Y[c][:FIRST[c] - 1].isna().all() and Y[c][FIRST[c] - 1:].notna().all(), c


@pytest.mark.parametrize('seed', [5, 6])
def test_start_is_forgotten_at_settle(seed):
    "The last row from `settle` bars against the long run, at forty ends"
    b = simulated(3600, seed=seed)
    X, number = matrix(b)
    whole = ENGINE.run(X, number)
    sd = np.nanstd(whole, axis=1)
    for k in sorted({SETTLE[c] for c in NAMES}):
        at = [j for j, c in enumerate(NAMES) if SETTLE[c] == k]
        for end in range(1700, 3600, 48):
            part = ENGINE.run(np.ascontiguousarray(X[end - k:end]), number[end - k:end])[at, -1]
            gap = np.abs(part - whole[at, end - 1]) / sd[at]
            assert (gap < 1e-3).all(), [(NAMES[j], g) for j, g in zip(at, gap) if not g < 1e-3]


def test_scale_of_price_and_volume_does_not_matter():
    b = simulated(2000, seed=7)
    small = b.assign(**{k: b[k] * 2.0**-27 for k in PRICES}, **{k: b[k] * 2.0**30 for k in VOLUMES})
    A, Z = features(b), features(small)
    free = {c for f in TECHNICAL for c, s in zip(f.out, f.doc['scale_free']) if s} & set(NAMES)
    for c in NAMES:
        gap = (A[c] - Z[c]).abs().max() / A[c].std()
        assert gap < 1e-8 if c in free else gap > 1e-3, f'{c}: {gap:.1e}'


def test_calendar_is_the_same_in_any_zone():
    b = simulated(24 * 40, start='2023-10-10')                       # New York leaves daylight saving time on 5 November
    wanted = features(b).to_numpy()
    for zone in ('America/New_York', 'Asia/Kolkata', 'Australia/Lord_Howe'):
        np.testing.assert_array_equal(features(b.tz_convert(zone)).to_numpy(), wanted)


def test_calendar_values():
    b = simulated(3, start='2024-02-29 22:00')                       # Thursday; the third bar opens on Friday, 1 March
    Y = features(b)
    turn = lambda k: (np.arctan2(Y[f'{k}_sin'], Y[f'{k}_cos']) / (2 * np.pi) % 1).to_numpy()
    np.testing.assert_allclose(turn('hour') * 24 % 24, [22, 23, 0], atol=1e-9)
    np.testing.assert_allclose(turn('weekday') * 7, [3, 3, 4], atol=1e-9)
    np.testing.assert_allclose(turn('month') * 12, [1, 1, 2], atol=1e-9)


LIMITS = dict(rsi=(0, 100), stoch=(0, 100), stochrsi=(0, 100), ultimate=(0, 100), choppiness=(0, 100), trending=(-1, 1), ranging=(0, 1), fibonacci_distance=(-.2, .2), wr=(-100, 0), mfi=(0, 100), adx=(0, 100), aroon=(0, 100), donchian_percent=(0, 1), donchian_width=(0, np.inf), drawdown=(-np.inf, 0), obv_flow=(-1, 1), cmf=(-1, 1),
              taker_buy_share=(0, 1), body=(-1, 1), upper_shadow=(0, 1), lower_shadow=(0, 1), clv=(-1, 1), efficiency_ratio=(0, 1), trend_r2=(0, 1), hour=(-1, 1), weekday=(-1, 1), month=(-1, 1),
              volume_z=(-13, 13), bb_percent=(-2, 3), skewness=(-13, 13), kurtosis=(-3, 168), volatility_ratio=(-7, 7), volume_ratio=(-7, 7), illiquidity=(-7, 7), doji=(0, 1), hammer=(0, 1), shooting_star=(0, 1), engulfing=(-1, 1))


def bounded(Y):
    for c in NAMES:
        for name, (low, high) in LIMITS.items():
            if c == name or c.startswith(f'{name}_'):
                v = Y[c].dropna()
                assert ((v >= low - 1e-6) & (v <= high + 1e-6)).all(), f'{c}: {v.min()} to {v.max()}'


def hostile(kind):
    b = simulated(2400, seed=8)
    flat = slice(1100, 1900)
    if kind in ('flat', 'frozen', 'flat after a spike'): b.iloc[flat, :4] = b.iloc[1100].close
    if kind in ('no volume', 'frozen'): b.iloc[flat, 4:] = 0.
    if kind == 'flat after a spike': b.iloc[1099, [1, 3]] = 100 * b.iloc[1100].close
    if kind == 'spike of price': b.iloc[1200, [1, 3]] = 100 * b.iloc[1200].high
    if kind == 'spike of volume': b.iloc[1200, 4:] = [1e15, 5e14]
    if kind == 'dust': b.iloc[flat, 4:] = 1e-12
    if kind == 'tiny price': b[PRICES] = b[PRICES] * 1e-12
    if kind == 'flat from the start': b[PRICES] = 7.
    return b


KINDS = ['flat', 'no volume', 'frozen', 'flat after a spike', 'spike of price', 'spike of volume', 'dust', 'tiny price', 'flat from the start']


@pytest.mark.parametrize('kind', KINDS)
def test_hostile_bars(kind):
    Y = features(hostile(kind))
    for c in NAMES: assert np.isfinite(Y[c][FIRST[c] - 1:]).all(), c
    bounded(Y)


def test_flat_market_has_the_defined_values():
    Y = features(hostile('frozen')).iloc[1890]                       # 790 bars without a move or a trade
    wanted = dict(donchian_percent=0.5, drawdown=0, donchian_width=0, stoch=50, stoch_signal=50, wr=-50, cci=0, bb_percent=0.5, bb_width=0, skewness=0, kurtosis=0, volume_z=0, obv_flow=0, cmf=0, vwap_distance=0, mfi=50,
                  taker_buy_share=0.5, efficiency_ratio=0, trend_slope=0, trend_r2=0, log_return=0, scaled_return=0, realized_volatility=0, illiquidity=0, volume_ratio=0, volatility_ratio=0, body=0, clv=0)
    for c in NAMES:
        if c in wanted or c.rstrip('0123456789_') in wanted:
            assert abs(Y[c] - wanted.get(c, wanted.get(c.rstrip('0123456789_')))) < 1e-9, f'{c}: {Y[c]}'


@pytest.mark.parametrize('kind', ['spike of price', 'spike of volume', 'flat after a spike'])
def test_a_spike_is_forgotten_with_its_window(kind):
    "Sums and moments are right again once the spike has left the longest window"
    b = hostile(kind)
    a, z = features(b).iloc[-100:], features(b.iloc[1300 if 'flat' not in kind else 1101:]).iloc[-100:]
    slow = [c for c in NAMES if SETTLE[c] > 1000]
    for c in (c for c in NAMES if c not in slow and not c.startswith(('adx', 'ema', 'macd', 'ppo', 'rsi', 'atr', 'natr'))):
        assert (a[c] - z[c]).abs().max() <= 1e-7 * (1 + z[c].abs().max()), c


def test_truncation_does_not_change_a_value():
    b = simulated(1500, seed=9)
    whole = features(b).to_numpy()
    for cut in (750, 1111, 1499): np.testing.assert_array_equal(features(b[:cut]).to_numpy(), whole[:cut])


def test_stream_equals_batch():
    X, number = matrix(simulated(1100, seed=10))
    M, rows = STREAM.memory(), []
    for t in range(len(X)): rows.append(STREAM.run(X[t:t + 1], number[t:t + 1], M)[:, 0])
    np.testing.assert_array_equal(np.array(rows).T, ENGINE.run(X, number))


def test_missing_hours_are_skipped():
    "Values go on after a short gap, start again after a long one"
    b = simulated(2000, seed=11)
    keep = np.ones(2000, bool)
    keep[1000:1005] = False
    Y = features(b[keep])
    assert all(Y[c].iloc[1000:].notna().all() for c in NAMES)
    keep[1000:1100] = False
    Y = features(b[keep])
    assert Y.rsi_14.iloc[1000:1014].isna().all() and Y.rsi_14.iloc[1014:].notna().all()


def test_taker_volume_that_comes_and_goes():
    b = simulated(600, seed=12)
    b.iloc[300:310, b.columns.get_loc('taker_buy_volume')] = np.nan
    Y = features(b)
    assert Y.taker_buy_share_24.iloc[300:333].isna().all() and Y.taker_buy_share_24.iloc[333:].notna().all()
    assert Y[[c for c in NAMES if not c.startswith('taker') and FIRST[c] < 300]][300:].notna().all().all()


values = st.lists(st.one_of(st.floats(-1e3, 1e3), st.sampled_from([0., 1., -1., 1e6, -1e6, 5.])), min_size=30, max_size=90)


@settings(max_examples=60, deadline=None)
@given(values, st.integers(2, 25))
def test_windows_against_brute_force(x, p):
    "The running sums, moments and extremes of any sequence, refreshed at multiples of p"
    x, s, sizes, m, q, hi, at = np.array(x), np.zeros(2), np.zeros((2, 2)), np.zeros(4), np.zeros(6), np.zeros(p + 2), np.zeros(2 * p + 3)
    for t in range(1, len(x) + 1):
        view, w, fresh = np.concatenate([np.full(p, np.nan), x[:t]])[-p - 1:], x[max(t - p, 0):t], t == 1 or t % p == 0
        scale = 1 + np.abs(x[max(t - 2 * p, 0):t]).max()
        assert abs(slide(s, 0, view, p, t, fresh) - w.sum()) < 1e-9 * scale
        for power in (1, 2): assert abs(slide_size(sizes[power - 1], 0, view, p, t, fresh, power) - (np.abs(w)**power).sum()) < 1e-9 * scale**power
        mean, sd = mean_std(m, 0, view, p, t, fresh)
        assert abs(mean - w.mean()) < 1e-9 * scale and abs(sd - w.std()) < 1e-5 * scale
        power_sums(q, 0, view, p, t, fresh, 4)
        for k in range(1, 5): assert abs(q[k] - ((w - q[0])**k).sum()) < 1e-9 * (2 * scale)**k
        assert highest(hi, 0, x[t - 1], p, t, 1.) == w.max()
        where = latest(at, 0, x[t - 1], p, t, -1.)
        if t >= p: assert where == t - np.argmin(w[::-1])
        assert total(view, p + 1 - len(w), p + 1) == pytest.approx(w.sum(), abs=1e-9 * scale)
        assert deviation(view, p + 1 - len(w), p + 1, 0.5) == pytest.approx(np.abs(w - 0.5).sum(), abs=1e-9 * scale)
