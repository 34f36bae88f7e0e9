"""Technical features: second implementations, hostile bars, scale, truncation, stream, warm-up, moving sums"""
import os, re
from pathlib import Path
import numpy as np, pandas as pd, pytest, talib
from hypothesis import given, settings, strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from cryptoml.engine import BARS, Engine, chained, ordered
from cryptoml.candles import patterns, reversals
from cryptoml.oscillators import deviation
from cryptoml.rolling import highest, mean_std, power_sums, slide, slide_size, total
from cryptoml.technical import TECHNICAL
from cryptoml.trend import latest

FIRST, SETTLE = (chained(ordered(TECHNICAL), key) for key in ('first', 'settle'))
ENGINE = Engine(TECHNICAL)
STREAM = Engine(TECHNICAL, block=16)
NAMES = ENGINE.columns
PATTERNS = patterns.out + reversals.out
SAME = [c for c in NAMES if c not in PATTERNS]      # patterns jump when a comparison at its limit rounds otherwise
PRICES = ['open', 'high', 'low', 'close']
VOLUMES = ['volume', 'taker_buy_volume']
FIBONACCI = (0.236, 0.382, 0.5, 0.618, 0.786)
needs_data = pytest.mark.skipif(
    'CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')


def simulated(n=3000, seed=0, start='2023-11-20'):
    rng = np.random.default_rng(seed)
    vol = pd.Series(rng.standard_normal(n)).ewm(alpha=0.03).mean().to_numpy() * 4
    steps = 0.006 * np.exp(vol)[:, None] * rng.standard_t(4, (n, 8)) / 8**0.5
    path = 1000 * np.exp(np.cumsum(steps).reshape(n, 8))
    prices = dict(open=path[:, 0], high=path.max(1), low=path.min(1), close=path[:, -1])
    b = pd.DataFrame(prices, pd.date_range(start, periods=n, freq='h', tz='UTC'))
    b['volume'] = np.exp(2 + vol + rng.standard_normal(n))
    b['taker_buy_volume'] = b.volume * rng.uniform(0.3, 0.7, n)
    return b


def real(symbol, rows):
    d = pd.read_parquet(Path(os.environ['CRYPTOML_DATA']) / 'spot_1h.parquet')
    return d[d.symbol == symbol].set_index('timestamp').drop(columns='symbol').iloc[rows]


def matrix(b):
    seconds = b.index.as_unit('s').asi8
    X = b.assign(time=seconds.astype(float)).reindex(columns=BARS).to_numpy(float, copy=True)
    return np.ascontiguousarray(X), seconds // 3600


def features(b):
    return pd.DataFrame(ENGINE.run(*matrix(b)).T, b.index, NAMES)


# Every feature but the patterns once more, in pandas, written from the formulas

def moving(s, p, f): return s.rolling(p).apply(f, raw=True)      # each window on its own: exact
def summed(s, p): return moving(s, p, np.sum)
def mean(s, p): return summed(s, p) / p
def sd(s, p): return moving(s, p, np.std)
def share(a, z, p): return summed(a, p) / summed(z, p)
def top(b, p): return b.high.rolling(p).max()
def bottom(b, p): return b.low.rolling(p).min()


def seeded(s, p, a):
    "Average that starts as the plain mean of its first p values"
    x = s.to_numpy()
    out = np.full(len(x), np.nan)
    k = int(np.isfinite(x).argmax())
    out[k + p - 1] = m = x[k:k + p].mean()
    for t in range(k + p, len(x)):
        out[t] = m = m + a * (x[t] - m)
    return pd.Series(out, s.index)


def wilder(s, p): return seeded(s, p, 1 / p)
def ema(s, p): return seeded(s, p, 2 / (p + 1))
def log_returns(b): return np.log(b.close).diff()
def typical(b): return (b.high + b.low + b.close) / 3


def true_ends(b):
    "High and low with the close before"
    before = b.close.shift()
    return np.maximum(b.high, before), np.minimum(b.low, before)


def true_range(b):
    high, low = true_ends(b)
    return (high - low).where(b.close.shift().notna())


def of_range(part, b):
    return (part / (b.high - b.low)).where(b.high > b.low, 0.)


def location(b):
    return of_range(2 * b.close - b.high - b.low, b)


def realized(b, p): return mean(log_returns(b)**2, p)**0.5


def volatilities(b):
    known = log_returns(b).notna()
    u2 = (np.log(b.high / b.low)**2).where(known)
    v2 = (np.log(b.close / b.open)**2).where(known)
    up = np.log(b.high / b.close) * np.log(b.high / b.open)
    down = np.log(b.low / b.close) * np.log(b.low / b.open)
    day, week = realized(b, 24), realized(b, 168)
    y = {'volatility_ratio_24_168': np.log(day / week)}
    y['vol_of_vol_168'] = sd(day, 168) / mean(day, 168)
    for p in (24, 168, 720):
        y[f'realized_volatility_{p}'] = realized(b, p)
        y[f'parkinson_{p}'] = (summed(u2, p) / (4 * np.log(2) * p))**0.5
        y[f'garman_klass_{p}'] = mean(u2 / 2 - (2 * np.log(2) - 1) * v2, p)**0.5
    for p in (24, 168):
        y[f'rogers_satchell_{p}'] = mean((up + down).where(known), p)**0.5
    return y


def returns(b):
    x = np.log(b.close)
    week = realized(b, 168)
    y = {f'log_return_{p}': x.diff(p) for p in (1, 4, 24, 72, 168)}
    y |= {f'scaled_return_{p}': x.diff(p) / (week * p**0.5) for p in (1, 4, 24, 168)}
    y |= {f'roc_{p}': 100 * b.close.pct_change(p) for p in (12, 24)}
    return y


def averages(b):
    c = b.close
    y = {f'sma_distance_{p}': c / mean(c, p) - 1 for p in (20, 50, 100, 200)}
    y |= {f'ema_distance_{p}': c / ema(c, p) - 1 for p in (9, 21, 50, 200)}
    for p in (20, 50):
        e1 = ema(c, p)
        e2 = ema(e1, p)
        weights = np.arange(1, p + 1) / (p * (p + 1) / 2)
        y[f'ema_{p}'] = e1
        y[f'dema_{p}'] = 2 * e1 - e2
        y[f'tema_{p}'] = 3 * e1 - 3 * e2 + ema(e2, p)
        y[f'wma_{p}'] = moving(c, p, lambda w: w @ weights)
        for k in ('dema', 'tema', 'wma'):
            y[f'{k}_distance_{p}'] = c / y[f'{k}_{p}'] - 1
    return y


def adaptive(b):
    c = b.close
    y = {}
    for p in (10, 30):
        ratio = (c.diff(p).abs() / summed(c.diff().abs(), p)).to_numpy()
        k = np.full(len(c), np.nan)
        last = c.iloc[p - 1]
        for t in range(p, len(c)):
            w = 2 / 31 + (2 / 3 - 2 / 31) * ratio[t]
            k[t] = last = last + w**2 * (c.iloc[t] - last)
        y[f'kama_{p}'] = pd.Series(k, b.index)
        y[f'kama_distance_{p}'] = c / k - 1
    return y


def convergence(b):
    slow = ema(b.close, 26)
    line = (ema(b.close, 12) - slow).where(slow.notna())
    y = {}
    for name, last, s in (('macd', 'macd_diff', line), ('ppo', 'ppo_hist', 100 * line / slow)):
        signal = ema(s, 9)
        y[f'{name}_12_26_9'] = s
        y[f'{name}_signal_12_26_9'] = signal
        y[f'{last}_12_26_9'] = s - signal
    return y


def bands(b):
    y = {}
    for p in (20, 50):
        middle = mean(b.close, p)
        sigma = sd(b.close, p)
        y[f'sma_{p}'] = middle
        y[f'std_{p}'] = sigma
        y[f'bb_high_{p}'] = middle + 2 * sigma
        y[f'bb_low_{p}'] = middle - 2 * sigma
        y[f'bb_percent_{p}'] = 0.5 + (b.close - middle) / (4 * sigma)
        y[f'bb_width_{p}'] = 400 * sigma / middle
    return y


def rsi(b, p):
    gain = wilder(b.close.diff().clip(lower=0), p)
    loss = wilder(-b.close.diff().clip(upper=0), p)
    return 100 * gain / (gain + loss)


def oscillators(b):
    c = b.close
    y = {f'rsi_{p}': rsi(b, p) for p in (7, 14, 28)}
    for p in (14, 28):
        k = 100 * (c - bottom(b, p)) / (top(b, p) - bottom(b, p))
        deviations = moving(typical(b), p, lambda w: np.abs(w - w.mean()).mean())
        y[f'stoch_{p}'] = k
        y[f'stoch_signal_{p}'] = mean(k, 3)
        y[f'stoch_slow_{p}'] = mean(mean(k, 3), 3)
        y[f'wr_{p}'] = k - 100
        y[f'cci_{p}'] = (typical(b) - mean(typical(b), p)) / (0.015 * deviations)
    s = rsi(b, 14)
    s = 100 * (s - s.rolling(14).min()) / (s.rolling(14).max() - s.rolling(14).min())
    y['stochrsi_14'] = s
    y['stochrsi_k_14'] = mean(s, 3)
    y['stochrsi_d_14'] = mean(mean(s, 3), 3)
    for p in (15, 30):
        y[f'trix_{p}'] = 100 * ema(ema(ema(c, p), p), p).pct_change()
    pressure = c - true_ends(b)[1]
    shares = [share(pressure, true_range(b), p) for p in (7, 14, 28)]
    y['ultimate_7_14_28'] = 100 * (4 * shares[0] + 2 * shares[1] + shares[2]) / 7
    middle = (b.high + b.low) / 2
    y['awesome_5_34'] = mean(middle, 5) - mean(middle, 34)
    y['awesome_percent_5_34'] = 100 * y['awesome_5_34'] / c
    return y


def directions(b):
    c = b.close
    known = c.shift().notna()
    ranges = wilder(true_range(b), 14)
    up, down = b.high.diff(), -b.low.diff()
    plus = wilder(up.where((up > down) & (up > 0), 0.).where(known), 14)
    minus = wilder(down.where((down > up) & (down > 0), 0.).where(known), 14)
    adx = wilder(100 * (plus - minus).abs() / (plus + minus), 14)
    y = dict(adx_14=adx, adx_pos_14=100 * plus / ranges, adx_neg_14=100 * minus / ranges)
    y['trending_14'] = np.sign(plus - minus).where(adx > 25, 0.)
    y['ranging_14'] = (adx < 20) * 1.
    for p in (14, 28):
        y[f'atr_{p}'] = wilder(true_range(b), p)
        y[f'natr_{p}'] = 100 * wilder(true_range(b), p) / c
    y['keltner_percent_20_14'] = 0.5 + (c - ema(c, 20)) / (4 * ranges)
    y['aroon_up_25'] = 4 * moving(b.high, 26, lambda w: 25 - np.argmax(w[::-1]))
    y['aroon_down_25'] = 4 * moving(b.low, 26, lambda w: 25 - np.argmin(w[::-1]))
    y['psar'] = pd.Series(talib.SAR(b.high, b.low), b.index)
    y['psar_distance'] = c / y['psar'] - 1
    high, low = true_ends(b)
    for p in (14, 72):
        width = high.rolling(p).max() - low.rolling(p).min()
        y[f'choppiness_{p}'] = 100 * np.log10(summed(true_range(b), p) / width) / np.log10(p)
    return y


def channels(b):
    c = b.close
    y = {}
    for p in (24, 168, 720):
        high, low = top(b, p), bottom(b, p)
        y[f'donchian_high_{p}'] = high
        y[f'donchian_low_{p}'] = low
        y[f'donchian_percent_{p}'] = (c - low) / (high - low)
        y[f'donchian_width_{p}'] = np.log(high / low)
        y[f'drawdown_{p}'] = np.log(c / high)
        apart = np.array([(c - (high - q * (high - low))) / (high - low) for q in (0, *FIBONACCI, 1)])
        nearest = np.abs(np.nan_to_num(apart, nan=9)).argmin(0)
        y[f'fibonacci_distance_{p}'] = pd.Series(np.take_along_axis(apart, nearest[None], 0)[0], b.index)
    high, low = top(b, 168), bottom(b, 168)
    for q in FIBONACCI:
        y[f'fibonacci_{round(1000 * q)}_168'] = high - q * (high - low)
    return y


def volumes(b):
    c, v = b.close, b.volume
    sign = np.sign(c.diff())
    money = typical(b) * v
    y = {}
    for p in (24, 168):
        vwap = share(money, v, p)
        y[f'volume_z_{p}'] = (v - mean(v, p)) / sd(v, p)
        y[f'obv_flow_{p}'] = share(sign * v, v, p)
        y[f'cmf_{p}'] = share(location(b) * v, v, p)
        y[f'vwap_{p}'] = vwap
        y[f'vwap_distance_{p}'] = c / vwap - 1
    y['volume_ratio_24_168'] = np.log(mean(v, 24) / mean(v, 168))
    drift = typical(b).diff()
    for p in (14, 28):
        flow = share(money.where(drift > 0, 0.), money.where(drift != 0, 0.), p)
        y[f'mfi_{p}'] = 100 * flow.where(np.arange(len(b)) >= p)
    line = (location(b) * v).cumsum()
    y['adosc_3_10'] = line.ewm(alpha=1 / 2, adjust=False).mean() - line.ewm(alpha=2 / 11, adjust=False).mean()
    y['adosc_share_3_10'] = y['adosc_3_10'] / ema(v, 10)
    amihud = {p: summed(log_returns(b).abs(), p) / summed(money, p) for p in (24, 720)}
    y['illiquidity_24_720'] = np.log(amihud[24] / amihud[720])
    y |= {f'taker_buy_share_{p}': share(b.taker_buy_volume, v, p) for p in (1, 24, 168)}
    return y


def candles(b):
    upper = np.maximum(b.open, b.close)
    lower = np.minimum(b.open, b.close)
    return dict(
        body=of_range(b.close - b.open, b),
        upper_shadow=of_range(b.high - upper, b),
        lower_shadow=of_range(lower - b.low, b),
        clv=location(b))


def trends(b):
    x = np.log(b.close)
    y = {}
    for p in (24, 168):
        slopes = [np.polyfit(np.arange(p), w, 1)[0] for w in sliding_window_view(x.to_numpy(), p)]
        y[f'efficiency_ratio_{p}'] = x.diff(p).abs() / summed(x.diff().abs(), p)
        y[f'trend_slope_{p}'] = pd.Series(np.r_[[np.nan] * (p - 1), slopes], b.index)
        y[f'trend_r2_{p}'] = moving(x, p, lambda w: np.corrcoef(np.arange(p), w)[0, 1]**2)
    return y


def moment(b, p, q): return moving(log_returns(b), p, lambda w: ((w - w.mean())**q).mean())


def shapes(b):
    y = {f'skewness_{p}': moment(b, p, 3) / moment(b, p, 2)**1.5 for p in (72, 168)}
    y |= {f'kurtosis_{p}': moment(b, p, 4) / moment(b, p, 2)**2 - 3 for p in (72, 168)}
    return y


def times(b):
    t = b.index.tz_convert('UTC')
    turns = dict(hour=t.hour / 24 + t.minute / 1440, weekday=t.day_of_week / 7, month=(t.month - 1) / 12)
    y = {f'{k}_sin': pd.Series(np.sin(2 * np.pi * turn), b.index) for k, turn in turns.items()}
    y |= {f'{k}_cos': pd.Series(np.cos(2 * np.pi * turn), b.index) for k, turn in turns.items()}
    return y


REFERENCES = (
    volatilities, returns, averages, adaptive, convergence, bands, oscillators, directions, channels, volumes,
    candles, trends, shapes, times)
SLOW_START = ('macd', 'ppo', 'adx', 'psar', 'adosc', 'trending', 'ranging')      # start otherwise: 400 bars later


def compare(b, columns=SAME, eps=1e-7):
    ours = features(b)
    theirs = pd.DataFrame({c: v for f in REFERENCES for c, v in f(b).items()})
    assert set(theirs) == set(SAME)
    for c in columns:
        start = FIRST[c] - 1 + (400 if c.startswith(SLOW_START) else 0)
        gap = (ours[c] - theirs[c])[start:].abs().max() / theirs[c].std()
        assert gap < eps, f'{c}: {gap:.1e}'


def test_second_implementation_on_random_bars():
    compare(simulated(1500, seed=3))


@needs_data
@pytest.mark.parametrize('symbol', ['ETHUSDT', 'DOGEUSDT'])
def test_second_implementation_on_real_bars(symbol):
    b = real(symbol, slice(-1500, None)).assign(taker_buy_volume=np.nan)
    compare(b, [c for c in SAME if not c.startswith('taker')])


@needs_data
def test_whole_history_of_a_coin_is_finite_and_bounded():
    "Outages, zero-volume hours and a 70 % hour: values where declared, none infinite, shares within their bounds"
    Y = features(real('DOGEUSDT', slice(None)))
    assert not np.isinf(Y.to_numpy()).any()
    given = Y[[c for c in NAMES if not c.startswith('taker')]]
    assert given[720:].isna().mean().max() < 0.05               # an outage of more than a day starts again
    bounded(Y)


@pytest.mark.parametrize('p', [14, 28])
@pytest.mark.parametrize('name, theirs', [
    ('rsi', lambda b, p: talib.RSI(b.close, p)),
    ('atr', lambda b, p: talib.ATR(b.high, b.low, b.close, p)),
    ('cci', lambda b, p: talib.CCI(b.high, b.low, b.close, p)),
    ('wr', lambda b, p: talib.WILLR(b.high, b.low, b.close, p)),
], ids=['rsi', 'atr', 'cci', 'wr'])
def test_talib_from_its_first_value(name, theirs, p):
    b = simulated(400, seed=4)
    ours = features(b)[f'{name}_{p}']
    np.testing.assert_allclose(ours, theirs(b, p), rtol=1e-8, atol=1e-8)         # the same bars missing, too


def test_talib_money_flow_from_its_first_value():
    b = simulated(400, seed=4)
    theirs = talib.MFI(b.high, b.low, b.close, b.volume, 14)
    np.testing.assert_allclose(features(b).mfi_14, theirs, rtol=1e-8)


def test_enough_features_documented():
    assert len(NAMES) >= 150
    assert len(set(NAMES)) == len(NAMES)
    for f in TECHNICAL:
        for name, feature, formula, unit in zip(f.out, f.doc['feature'], f.doc['formula'], f.doc['unit']):
            assert not feature or formula and unit, name


def test_every_step_is_compiled():
    assert ENGINE.plain == []


def test_first_values_are_where_declared():
    Y = features(simulated(1200))
    for c in NAMES:
        assert Y[c][:FIRST[c] - 1].isna().all(), c
        assert Y[c][FIRST[c] - 1:].notna().all(), c


@pytest.mark.parametrize('seed', [5, 6])
def test_start_is_forgotten_at_settle(seed):
    "The last row from `settle` bars against the long run, at forty ends"
    X, number = matrix(simulated(3600, seed=seed))
    whole = ENGINE.run(X, number)
    spread = np.nanstd(whole, axis=1)
    for k in sorted({SETTLE[c] for c in NAMES}):
        at = [j for j, c in enumerate(NAMES) if SETTLE[c] == k]
        for end in range(1700, 3600, 48):
            part = ENGINE.run(np.ascontiguousarray(X[end - k:end]), number[end - k:end])[at, -1]
            gap = np.abs(part - whole[at, end - 1]) / spread[at]
            assert (gap < 1e-3).all(), [(NAMES[j], g) for j, g in zip(at, gap) if not g < 1e-3]


def test_scale_of_price_and_volume_does_not_matter():
    b = simulated(2000, seed=7)
    small = b.copy()
    small[PRICES] *= 2.0**-27
    small[VOLUMES] *= 2.0**30
    A, Z = features(b), features(small)
    free = {c for f in TECHNICAL for c, s in zip(f.out, f.doc['scale_free']) if s} & set(NAMES)
    for c in NAMES:
        gap = (A[c] - Z[c]).abs().max() / A[c].std()
        assert gap < 1e-8 if c in free else gap > 1e-3, f'{c}: {gap:.1e}'


@pytest.mark.parametrize('zone', ['America/New_York', 'Asia/Kolkata', 'Australia/Lord_Howe'])
def test_calendar_is_the_same_in_any_zone(zone):
    b = simulated(24 * 40, start='2023-10-10')              # New York leaves daylight saving time on 5 November
    np.testing.assert_array_equal(features(b.tz_convert(zone)).to_numpy(), features(b).to_numpy())


@pytest.mark.parametrize('name, length, wanted', [
    ('hour', 24, [22, 23, 0]),
    ('weekday', 7, [3, 3, 4]),
    ('month', 12, [1, 1, 2]),
])
def test_calendar_values(name, length, wanted):
    Y = features(simulated(3, start='2024-02-29 22:00'))    # Thursday; the third bar opens on Friday, 1 March
    turn = np.arctan2(Y[f'{name}_sin'], Y[f'{name}_cos']) / (2 * np.pi) % 1
    np.testing.assert_allclose(turn * length % length, wanted, atol=1e-9)


LIMITS = dict(
    rsi=(0, 100),
    stoch=(0, 100),
    stochrsi=(0, 100),
    ultimate=(0, 100),
    choppiness=(0, 100),
    wr=(-100, 0),
    mfi=(0, 100),
    adx=(0, 100),
    aroon=(0, 100),
    trending=(-1, 1),
    ranging=(0, 1),
    fibonacci_distance=(-.2, .2),
    donchian_percent=(0, 1),
    donchian_width=(0, np.inf),
    drawdown=(-np.inf, 0),
    obv_flow=(-1, 1),
    cmf=(-1, 1),
    taker_buy_share=(0, 1),
    body=(-1, 1),
    upper_shadow=(0, 1),
    lower_shadow=(0, 1),
    clv=(-1, 1),
    efficiency_ratio=(0, 1),
    trend_r2=(0, 1),
    hour=(-1, 1),
    weekday=(-1, 1),
    month=(-1, 1),
    volume_z=(-13, 13),
    bb_percent=(-2, 3),
    skewness=(-13, 13),
    kurtosis=(-3, 168),
    volatility_ratio=(-7, 7),
    volume_ratio=(-7, 7),
    illiquidity=(-7, 7),
    doji=(0, 1),
    hammer=(0, 1),
    shooting_star=(0, 1),
    engulfing=(-1, 1))


def bounded(Y):
    for name, (low, high) in LIMITS.items():
        for c in NAMES:
            if c == name or c.startswith(f'{name}_'):
                v = Y[c].dropna()
                inside = (v >= low - 1e-6) & (v <= high + 1e-6)
                assert inside.all(), f'{c}: {v.min()} to {v.max()}'


FLAT = slice(1100, 1900)       # rows of the disturbance


def flat(b): b.iloc[FLAT, :4] = b.iloc[1100].close
def no_volume(b): b.iloc[FLAT, 4:] = 0.
def dust(b): b.iloc[FLAT, 4:] = 1e-12
def spike_of_price(b): b.iloc[1200, [1, 3]] = 3 * b.iloc[1200].high        # beyond four times it is no bar
def spike_of_volume(b): b.iloc[1200, 4:] = [1e15, 5e14]
def tiny_price(b): b[PRICES] = b[PRICES] * 1e-12
def flat_from_the_start(b): b[PRICES] = 7.


def frozen(b):
    flat(b)
    no_volume(b)


def flat_after_a_spike(b):
    flat(b)
    b.iloc[1099, [1, 3]] = 3 * b.iloc[1100].close


def hostile(disturb):
    b = simulated(2400, seed=8)
    disturb(b)
    return b


@pytest.mark.parametrize('disturb', [
    flat, no_volume, frozen, flat_after_a_spike, spike_of_price, spike_of_volume, dust, tiny_price,
    flat_from_the_start])
def test_hostile_bars(disturb):
    Y = features(hostile(disturb))
    for c in NAMES:
        assert np.isfinite(Y[c][FIRST[c] - 1:]).all(), c
    bounded(Y)


@pytest.fixture(scope='module')
def motionless(): return features(hostile(frozen)).iloc[1890]        # 790 bars without a move or a trade


@pytest.mark.parametrize('name, wanted', [
    ('donchian_percent', 0.5),
    ('drawdown', 0),
    ('donchian_width', 0),
    ('stoch', 50),
    ('stoch_signal', 50),
    ('wr', -50),
    ('cci', 0),
    ('bb_percent', 0.5),
    ('bb_width', 0),
    ('skewness', 0),
    ('kurtosis', 0),
    ('volume_z', 0),
    ('obv_flow', 0),
    ('cmf', 0),
    ('vwap_distance', 0),
    ('mfi', 50),
    ('taker_buy_share', 0.5),
    ('efficiency_ratio', 0),
    ('trend_slope', 0),
    ('trend_r2', 0),
    ('log_return', 0),
    ('scaled_return', 0),
    ('realized_volatility', 0),
    ('illiquidity', 0),
    ('volume_ratio', 0),
    ('volatility_ratio', 0),
    ('body', 0),
    ('clv', 0),
])
def test_flat_market_has_the_defined_values(motionless, name, wanted):
    columns = [c for c in NAMES if re.fullmatch(rf'{name}(_\d+)*', c)]
    assert columns
    for c in columns:
        assert abs(motionless[c] - wanted) < 1e-9, f'{c}: {motionless[c]}'


@pytest.mark.parametrize('disturb, after', [
    (spike_of_price, 1300),
    (spike_of_volume, 1300),
    (flat_after_a_spike, 1101),
])
def test_a_spike_is_forgotten_with_its_window(disturb, after):
    "Sums and moments are right again once the spike has left the longest window"
    b = hostile(disturb)
    met = features(b).iloc[-100:]
    never_met = features(b.iloc[after:]).iloc[-100:]
    for c in NAMES:
        if SETTLE[c] > 1000 or c.startswith(('adx', 'ema', 'macd', 'ppo', 'rsi', 'atr', 'natr')): continue
        gap = (met[c] - never_met[c]).abs().max()
        assert gap <= 1e-7 * (1 + never_met[c].abs().max()), c


@pytest.mark.parametrize('cut', [750, 1111, 1499])
def test_truncation_does_not_change_a_value(cut):
    b = simulated(1500, seed=9)
    np.testing.assert_array_equal(features(b[:cut]).to_numpy(), features(b)[:cut].to_numpy())


def test_stream_equals_batch():
    X, number = matrix(simulated(1100, seed=10))
    M = STREAM.memory()
    rows = [STREAM.run(X[t:t + 1], number[t:t + 1], M)[:, 0] for t in range(len(X))]
    np.testing.assert_array_equal(np.array(rows).T, ENGINE.run(X, number))


def test_values_go_on_after_a_short_gap():
    b = simulated(2000, seed=11)
    Y = features(b.drop(b.index[1000:1005]))
    assert Y.iloc[1000:].notna().all(axis=None)


def test_values_start_again_after_a_long_gap():
    b = simulated(2000, seed=11)
    Y = features(b.drop(b.index[1000:1100]))
    assert Y.rsi_14.iloc[1000:1014].isna().all()
    assert Y.rsi_14.iloc[1014:].notna().all()


def test_taker_volume_that_comes_and_goes():
    b = simulated(600, seed=12)
    b.iloc[300:310, b.columns.get_loc('taker_buy_volume')] = np.nan
    Y = features(b)
    assert Y.taker_buy_share_24.iloc[300:333].isna().all()
    assert Y.taker_buy_share_24.iloc[333:].notna().all()
    others = [c for c in NAMES if not c.startswith('taker') and FIRST[c] < 300]
    assert Y[others][300:].notna().all(axis=None)


numbers = st.one_of(st.floats(-1e3, 1e3), st.sampled_from([0., 1., -1., 1e6, -1e6, 5.]))
sequences = st.lists(numbers, min_size=30, max_size=90)


def walk(x, p):
    "At each bar n: the view an engine shows, the window itself, whether sums are due, the scale of errors"
    for n in range(1, len(x) + 1):
        view = np.concatenate([np.full(p, np.nan), x[:n]])[-p - 1:]
        scale = 1 + np.abs(x[max(n - 2 * p, 0):n]).max()
        yield n, view, x[max(n - p, 0):n], n == 1 or n % p == 0, scale


@settings(max_examples=60, deadline=None)
@given(sequences, st.integers(2, 25))
def test_moving_sums_against_brute_force(x, p):
    "Any sequence, refreshed at multiples of p"
    s, sizes, squares = np.zeros(2), np.zeros(2), np.zeros(2)
    for n, view, w, fresh, scale in walk(np.array(x), p):
        a = p + 1 - len(w)
        assert abs(slide(s, 0, view, p, n, fresh) - w.sum()) < 1e-9 * scale
        assert abs(slide_size(sizes, 0, view, p, n, fresh, 1) - np.abs(w).sum()) < 1e-9 * scale
        assert abs(slide_size(squares, 0, view, p, n, fresh, 2) - (w**2).sum()) < 1e-9 * scale**2
        assert total(view, a, p + 1) == pytest.approx(w.sum(), abs=1e-9 * scale)
        assert deviation(view, a, p + 1, 0.5) == pytest.approx(np.abs(w - 0.5).sum(), abs=1e-9 * scale)


@settings(max_examples=60, deadline=None)
@given(sequences, st.integers(2, 25))
def test_moving_moments_against_brute_force(x, p):
    "Any sequence, refreshed at multiples of p"
    s, q = np.zeros(4), np.zeros(6)
    for n, view, w, fresh, scale in walk(np.array(x), p):
        m, deviation = mean_std(s, 0, view, p, n, fresh)
        assert abs(m - w.mean()) < 1e-9 * scale
        assert abs(deviation - w.std()) < 1e-5 * scale
        power_sums(q, 0, view, p, n, fresh, 4)
        for k in range(1, 5):
            assert abs(q[k] - ((w - q[0])**k).sum()) < 1e-9 * (2 * scale)**k


@settings(max_examples=60, deadline=None)
@given(sequences, st.integers(2, 25))
def test_moving_extremes_against_brute_force(x, p):
    s, at = np.zeros(p + 2), np.zeros(2 * p + 3)
    for n, view, w, fresh, scale in walk(np.round(x, 3), p):         # what differs, differs by more than rounding
        assert highest(s, 0, view[p], p, n, 1.) == w.max()
        where = latest(at, 0, view[p], p, n, -1.)
        if n >= p: assert where == n - np.argmin(w[::-1])
