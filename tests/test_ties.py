"""Rounding decides nothing: features of coins of few ticks against exact decimals, and prices that are off by a last
digit"""
import os
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path

import numpy as np, pandas as pd, pytest

from cryptoml.crosssection import CROSS_BASE, cross_section
from cryptoml.engine import BARS, Engine
from cryptoml.rolling import ROUNDING, beyond_rounding
from cryptoml.technical import TECHNICAL

ENGINE = Engine(TECHNICAL)
STREAM = Engine(TECHNICAL, block=16)
PRICES = ['open', 'high', 'low', 'close']
REAL = {'PEPEUSDT': 'spot_1d', 'SHIBUSDT': 'spot_1d', 'DOGEUSDT': 'spot_1h'}
EXACT = {}                                   # a series is read and computed once


def ticks(seed, n=1000, level=1200):
    "A walk of whole ticks of 1e-8 with still stretches, as the exchange prints it"
    rng = np.random.default_rng(seed)
    steps = rng.integers(-2, 3, (n, 6)) * (rng.random((n, 1)) < .8)
    steps[500:560] = 0
    path = level + np.cumsum(steps).reshape(n, 6)
    path = np.maximum(path, 50)
    parts = dict(open=path[:, 0], high=path.max(1), low=path.min(1), close=path[:, -1])
    b = pd.DataFrame({k: [float(f'{v}e-8') for v in x] for k, x in parts.items()})
    return b.assign(volume=rng.integers(0, 50, n) * 1000.)


def real(symbol):
    if 'CRYPTOML_DATA' not in os.environ: pytest.skip('CRYPTOML_DATA is not set: real data absent')
    d = pd.read_parquet(Path(os.environ['CRYPTOML_DATA']) / f'{REAL[symbol]}.parquet')
    return d[d.symbol == symbol][[*PRICES, 'volume']].iloc[:1000].reset_index(drop=True)


def matrix(b):
    "Input of an engine; bars are counted, whatever their length"
    number = np.arange(len(b)) + 400_000
    X = b.assign(time=number * 3600.).reindex(columns=BARS).to_numpy(float, copy=True)
    return np.ascontiguousarray(X), number


def features(b):
    return pd.DataFrame(ENGINE.run(*matrix(b)).T, columns=ENGINE.columns)


@pytest.fixture(params=['ticks 0', 'ticks 1', 'ticks 2', *REAL])
def series(request):
    "Bars, their prices and volumes as exact fractions, and our features"
    name = request.param
    if name not in EXACT:
        b = ticks(int(name[-1])) if name.startswith('ticks') else real(name)
        exact = {k: [Fraction(repr(v)) for v in b[k].tolist()] for k in b}
        EXACT[name] = b, exact | {'upside down': upside_down(exact)}, features(b)
    return EXACT[name]


def body(x, t): return abs(x['close'][t] - x['open'][t])
def bar_range(x, t): return x['high'][t] - x['low'][t]
def top(x, t): return max(x['open'][t], x['close'][t])
def bottom(x, t): return min(x['open'][t], x['close'][t])
def rises(x, t): return x['close'][t] >= x['open'][t]
def mean_before(f, x, t, n=10): return sum(f(x, k) for k in range(t - n, t)) / n
def is_long(x, t): return body(x, t) > mean_before(body, x, t)


# Oracles: decisions in exact fractions

def doji(x, t): return 1 if body(x, t) * 10 <= mean_before(bar_range, x, t) else 0


def hammer(x, t):
    small = body(x, t) < mean_before(body, x, t)
    upper, lower = x['high'][t] - top(x, t), bottom(x, t) - x['low'][t]
    low_place = bottom(x, t) <= x['low'][t - 1] + mean_before(bar_range, x, t - 1, 5) / 5
    return 1 if small and lower > body(x, t) and upper * 10 < mean_before(bar_range, x, t) and low_place else 0


def upside_down(x):
    return dict(open=[-v for v in x['open']], close=[-v for v in x['close']],
                high=[-v for v in x['low']], low=[-v for v in x['high']])


def shooting_star(x, t): return hammer(x['upside down'], t)


def engulfing(x, t):
    covers = top(x, t) >= top(x, t - 1) and bottom(x, t) <= bottom(x, t - 1)
    if not covers or body(x, t) <= body(x, t - 1) or rises(x, t) == rises(x, t - 1): return 0
    return 1 if rises(x, t) else -1


def harami(x, t):
    within = top(x, t) <= top(x, t - 1) and bottom(x, t) >= bottom(x, t - 1)
    if not (is_long(x, t - 1) and not is_long(x, t) and within): return 0
    return -1 if rises(x, t - 1) else 1


def star(x, t):
    if not is_long(x, t - 2) or is_long(x, t - 1) or not is_long(x, t): return 0
    d = -1 if rises(x, t - 2) else 1
    apart = top(x, t - 1) < x['close'][t - 2] if d > 0 else bottom(x, t - 1) > x['close'][t - 2]
    takes_back = d * (x['close'][t] - x['close'][t - 2]) * 10 > 3 * body(x, t - 2)
    return d if apart and rises(x, t) == (d > 0) and takes_back else 0


PATTERNS = [doji, hammer, shooting_star, engulfing, harami, star]


@pytest.mark.parametrize('pattern', PATTERNS, ids=[f.__name__ for f in PATTERNS])
def test_candles_are_those_of_exact_decimals(series, pattern):
    b, x, Y = series
    wanted = [pattern(x, t) for t in range(15, len(b))]
    np.testing.assert_array_equal(Y[pattern.__name__][15:], wanted)
    assert any(wanted) or pattern is star                     # met at all


def test_money_flow_is_that_of_exact_decimals(series):
    b, x, Y = series
    price = [h + l + c for h, l, c in zip(x['high'], x['low'], x['close'])]
    flow = [p * v for p, v in zip(price, x['volume'])]
    equal = sum(p == q for p, q in zip(price, price[1:]))
    assert equal > 0
    for t in range(14, len(b)):
        up = sum(flow[k] for k in range(t - 13, t + 1) if price[k] > price[k - 1])
        down = sum(flow[k] for k in range(t - 13, t + 1) if price[k] < price[k - 1])
        wanted = float(100 * up / (up + down)) if up + down else 50.
        assert abs(Y.mfi_14[t] - wanted) < 1e-6, (t, Y.mfi_14[t], wanted)


def directional_moves(x, t):
    "True range, +DM, -DM; two equal moves count as neither (Wilder)"
    before = x['close'][t - 1]
    span = max(x['high'][t], before) - min(x['low'][t], before)
    up, down = x['high'][t] - x['high'][t - 1], x['low'][t - 1] - x['low'][t]
    plus = up if up > down and up > 0 else Fraction(0)
    minus = down if down > up and down > 0 else Fraction(0)
    return float(span), float(plus), float(minus)


def test_directional_movement_is_that_of_exact_decimals(series):
    b, x, Y = series
    means, adx = np.zeros(3), 0.
    for t in range(1, len(b)):
        means += (np.array(directional_moves(x, t)) - means) / min(t, 14)
        span, plus, minus = means
        apart = 100 * abs(plus - minus) / (plus + minus) if plus + minus > 0 else 0.
        if t >= 14: adx += (apart - adx) / min(t - 13, 14)
        if t < 27: continue
        ours = Y.loc[t, ['adx_14', 'adx_pos_14', 'adx_neg_14']]
        wanted = [adx, 100 * plus / span if span > 0 else 0., 100 * minus / span if span > 0 else 0.]
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-6)


def exact_rsi(x):
    "RSI of 14 bars to 60 digits"
    gains, losses, out = Decimal(0), Decimal(0), []
    close = [Decimal(v.numerator) / v.denominator for v in x['close']]
    for t in range(1, len(close)):
        change = close[t] - close[t - 1]
        m = min(t, 14)
        gains += (max(change, Decimal(0)) - gains) / m
        losses += (max(-change, Decimal(0)) - losses) / m
        out.append(100 * gains / (gains + losses) if gains + losses else Decimal(50))
    return out


def test_stochastic_rsi_is_that_of_exact_decimals(series):
    b, x, Y = series
    with localcontext() as context:
        context.prec = 60
        rsi = exact_rsi(x)
        for t in range(27, len(b)):
            window = rsi[t - 14:t]                            # the first RSI belongs to the second bar
            low, span = min(window), max(window) - min(window)
            wanted = float(100 * (window[-1] - low) / span) if span > Decimal('1e-40') else 50.
            assert abs(Y.stochrsi_14[t] - wanted) < 1e-5, (t, Y.stochrsi_14[t], wanted)


def test_aroon_counts_from_the_latest_of_equal_highs(series):
    b, x, Y = series
    for t in range(25, len(b)):
        up = max(range(t - 25, t + 1), key=lambda k: (x['high'][k], k))
        down = min(range(t - 25, t + 1), key=lambda k: (x['low'][k], -k))
        np.testing.assert_allclose(Y.loc[t, ['aroon_up_25', 'aroon_down_25']], [4 * (25 - t + up), 4 * (25 - t + down)])


# The last digit

@pytest.mark.parametrize('seed', range(6))
def test_no_feature_hangs_on_the_last_digit(seed):
    "Prices as another arithmetic would have left them, off by one or two in the last digit"
    b = ticks(seed)
    other = b.copy()
    nudge = np.random.default_rng(seed).integers(-2, 3, (len(b), 4))
    other[PRICES] = b[PRICES].to_numpy() * (1 + nudge * 2.0**-52)
    other['high'] = other[PRICES].max(axis=1)                 # still a bar
    other['low'] = other[PRICES].min(axis=1)
    A, Z = features(b), features(other)
    apart = (A - Z).abs().max() / (A.abs().max() + 1e-300)
    assert (other[PRICES] != b[PRICES]).to_numpy().mean() > .5
    assert apart.max() < 1e-9, apart.nlargest(5)


@pytest.mark.parametrize('seed', [0, 1])
def test_stream_equals_history_to_the_last_bit(seed):
    X, number = matrix(ticks(seed)[:900])
    M = STREAM.memory()
    rows = [STREAM.run(X[t:t + 1], number[t:t + 1], M)[:, 0] for t in range(len(X))]
    np.testing.assert_array_equal(np.array(rows).T, ENGINE.run(X, number))


# A still price

@pytest.fixture(scope='module', params=[1200, 2_000_000_000])
def still(request):
    "12,000 bars of one price and moving volume after 1,000 that move: averages decay to where floats end"
    b = ticks(3, 1000, request.param)
    rest = pd.DataFrame(dict.fromkeys(PRICES, b.close.iloc[-1]), range(1000, 13_000))
    volume = 1000. + np.arange(12_000) % 7
    return features(pd.concat([b, rest.assign(volume=volume)]))


@pytest.mark.parametrize('name, wanted, after', [
    ('keltner_percent_20_14', .5, 400),
    ('bb_percent_50', .5, 50),
    ('cci_28', 0, 28),
    ('stoch_28', 50, 28),
    ('choppiness_72', 50, 73),
    ('scaled_return_24', 0, 169),
    ('trend_r2_168', 0, 168),
    ('kurtosis_168', 0, 169),
    ('mfi_28', 50, 28),
])
def test_still_price(still, name, wanted, after):
    np.testing.assert_allclose(still[name][1000 + after:], wanted, rtol=0, atol=1e-9)


def test_rsi_stands_still_with_the_price(still):
    "Until its averages fade, after 8,700 bars: then it is 50, as where nothing ever moved"
    rsi, place = still.rsi_14[1000:], still.stochrsi_d_14[1018:]
    assert (rsi[:8700] - rsi.iloc[0]).abs().max() < 1e-9
    assert (place[:8600] == 50).all()
    assert (rsi[-3000:] == 50).all() and (place[-3000:] == 50).all()


def test_nothing_grows_in_a_still_price(still):
    "No quotient of two roundings: values stay within what they were while the price moved"
    volume = ['volume', 'adosc', 'illiquidity', 'obv', 'cmf', 'vwap']
    names = [c for c in still if not c.startswith((*volume, 'taker', 'hour', 'weekday', 'month'))]
    moving, after = still[names][720:1000].abs().max(), still[names][1720:].abs().max()
    grown = after > np.maximum(moving, 100) * (1 + 1e-9)
    assert not grown.any(), after[grown]


# How large the tolerance is

@pytest.mark.parametrize('price, tick', [(1e5, .01), (64_123.45, .01), (.071234, 1e-6), (1.2e-6, 1e-8), (1e-8, 1e-8)])
def test_a_third_of_a_tick_is_a_difference(price, tick):
    assert beyond_rounding((price + tick + 2 * price) / 3 - price, price) > 0
    assert tick / 3 > 1e4 * ROUNDING * price


@pytest.mark.parametrize('price', [1e5 / 3, .1, 7e-9])
def test_sums_of_a_thousand_prices_round_to_the_same(price):
    total = sum([price] * 1000)
    assert beyond_rounding(total - 1000 * price, 1000 * price) == 0


# Coins of one bar

def test_coins_that_came_back_share_a_rank():
    "Two pegged coins at their old price stand level over 336 bars, whatever way they went"
    engine = Engine(TECHNICAL + CROSS_BASE, ['cross_return_336'])
    rng = np.random.default_rng(0)
    returns = []
    for coin in range(6):
        b = ticks(10 + coin, 340, 10_000)
        close = b.close.to_numpy(copy=True)
        if coin < 3: close[-1] = close[-337]
        b = pd.DataFrame({k: close for k in PRICES}).assign(volume=1000. * rng.integers(1, 9))
        returns.append(engine.run(*matrix(b))[0, -1:])
    ranks = cross_section(np.array(returns)[:, :, None], np.ones((6, 1), bool), ['rank'])[:, 0, 0]
    assert ranks[0] == ranks[1] == ranks[2]
    assert len(set(ranks)) == 4
