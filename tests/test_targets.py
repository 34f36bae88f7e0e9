"Targets against brute force, under missing bars, and under changes of the future."
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from cryptoml import targets
from cryptoml.backtest import ROUND_TRIP
from cryptoml.data import Panel, parse_timeframe, read_panel, to_panel
from cryptoml.simulate import simulate
from cryptoml.targets import (HORIZONS, make_targets, pair_window, path, pegged, realised_correlation, regime,
                              trailing_sigma)


def holes(panel: Panel, share, seed) -> Panel:
    "The panel with bars missing at random"
    gone = np.random.default_rng(seed).random(panel.mask.shape) < share
    return replace(panel, values=np.where(gone[..., None], np.nan, panel.values), mask=panel.mask & ~gone)


def cut(panel, c):
    return replace(panel, time=panel.time[:c], values=panel.values[:, :c], mask=panel.mask[:, :c])


same = np.testing.assert_array_equal
PRICES = ('open', 'high', 'low', 'close')


@pytest.fixture(scope='module')
def panel(): return to_panel(simulate(5, 900, seed=4).bars)


def clip(x, limit): return min(max(x, -limit), limit)


def median(values):
    values = sorted(values)
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


def one_label(panel, sigma, n, t, h, round_trip=ROUND_TRIP):
    "Every label of one decision, by loops"
    o = panel['open']
    opened = lambda i, s: s < len(panel.time) and panel.mask[i, s]
    known = lambda i: opened(i, t + 1) and opened(i, t + 1 + h)
    moves = {i: math.log(o[i, t + 1 + h] / o[i, t + 1]) for i in range(len(o)) if known(i)}
    usual = sigma[n, t] * math.sqrt(h)
    market = len(moves) >= 3
    out = dict(ret=None, scaled=None, relative=None, volatility=None, direction=-1, relative_direction=-1)
    if n in moves:
        r = out['ret'] = moves[n]
        if math.isfinite(usual):
            band = max(round_trip, 0.25 * usual)
            out['scaled'] = clip(r / usual, 5)
            out['direction'] = 2 if r > band else 0 if r < -band else 1
        if market and math.isfinite(usual):
            mean = sum(moves.values()) / len(moves)
            out['relative'] = clip((r - mean) / usual, 3)
        if market and r != median(moves.values()):
            out['relative_direction'] = int(r > median(moves.values()))
    if all(opened(n, t + k) for k in range(1, h + 2)):
        squares = [math.log(o[n, t + 1 + k] / o[n, t + k]) ** 2 for k in range(1, h + 1)]
        out['volatility'] = math.log(max(math.sqrt(sum(squares) / h), 1e-6))
    return out


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10 ** 6), st.sampled_from([0, 0.02, 0.3]), st.integers(1, 6))
def test_labels_equal_brute_force(seed, share, n):
    p = holes(to_panel(simulate(n, 260, seed=seed).bars), share, seed)
    y = make_targets(p, (1, 5, 12))
    rng = np.random.default_rng(seed)
    some = [rng.integers(0, top, 150) for top in (n, 260, 3)]
    for coin, t, k in zip(*some):
        for name, value in one_label(p, y.sigma, coin, t, y.horizons[k]).items():
            got = y[name][coin, t, k]
            if value is None: assert np.isnan(got), (name, t)
            else: assert got == pytest.approx(value, rel=2e-6, abs=1e-7), (name, t)


SPANS = {'15m': 672, '1h': 168, '4h': 60, '1d': 60}                       # of sigma, bars
LOOKS_BACK = {'1h': (168, 24, 2160), '4h': (42, 6, 540), '1d': (30, 6, 180)}   # trend, volatility, past

def as_if(panel, timeframe):
    "The same bars, said to be of another length"
    return replace(panel, timeframe=parse_timeframe(timeframe))


@pytest.mark.parametrize('timeframe', SPANS)
def test_sigma_equals_its_recursion(panel, timeframe):
    span = SPANS[timeframe]
    p = as_if(holes(panel, 0.1, 1), timeframe)
    sigma = trailing_sigma(p)
    lam = 1 - 2 / (span + 1)
    for n in range(2):
        num = den = seen = 0
        for t in range(p.mask.shape[1]):
            if t and p.mask[n, t] and p.mask[n, t - 1]:
                r = math.log(p['close'][n, t] / p['close'][n, t - 1])
                num = lam * num + r * r
                den = lam * den + 1
                seen += 1
            want = math.sqrt(num / den) if seen >= span // 2 and p.mask[n, t] else math.nan
            assert sigma[n, t] == pytest.approx(want, rel=1e-9, nan_ok=True)


def test_hours_give_the_same_bits_as_a_week_of_them_always_did(panel):
    squared = pd.DataFrame(targets.bar_returns(panel).T ** 2)
    same(trailing_sigma(panel), np.sqrt(squared.ewm(span=168, ignore_na=True, min_periods=84).mean().to_numpy().T))


def regimes_by_loops(r, there, trend, short, past):
    "The rule by loops, from the returns of one coin [T]; lengths in bars"
    def last(x, t, bars):
        x = x[max(t - bars + 1, 0):t + 1]
        return x[np.isfinite(x)]

    def root_mean_square(x): return math.sqrt((x ** 2).mean()) if len(x) >= short // 2 else math.nan
    volatility = np.array([root_mean_square(last(r, t, short)) for t in range(len(r))])

    def one(t):
        before, move = last(volatility, t - 1, past), last(r, t, trend)
        if not there[t] or len(before) < 2 * trend or len(move) < trend // 2: return -1
        if volatility[t] > np.quantile(before, 0.8): return 3
        tau = move.sum() / math.sqrt((move ** 2).sum())
        return 0 if tau > 0.75 else 1 if tau < -0.75 else 2

    return [one(t) for t in range(len(r))]


@pytest.mark.parametrize('timeframe', LOOKS_BACK)
def test_regime_equals_its_rule(panel, timeframe):
    p = as_if(holes(panel, 0.05, 2), timeframe)
    r = targets.bar_returns(p)
    for n in range(2):
        want = regimes_by_loops(r[n], p.mask[n], *LOOKS_BACK[timeframe])
        same(regime(p)[n], want)
        assert set(want) == {-1, 0, 1, 2, 3}


def test_the_regime_label_is_the_regime_when_the_label_ends():
    p = to_panel(simulate(3, 1500, seed=5).bars)
    y = make_targets(p, (4, 12))
    now = regime(p)
    for k, h in enumerate(y.horizons):
        same(y['regime'][:, :-h, k], now[:, h:])
        assert (y['regime'][:, -h:, k] == -1).all()
    assert set(np.unique(now)) == {-1, 0, 1, 2, 3}


@pytest.mark.parametrize('share', [0, 0.05])
@pytest.mark.parametrize('c', [1, 3, 90, 500, 899])
def test_cut_data_give_the_same_labels_up_to_t1(panel, c, share):
    p = holes(panel, share, 3)
    whole = make_targets(p)
    less = make_targets(cut(p, c))
    same(less.sigma, whole.sigma[:, :c])
    done = np.broadcast_to(whole.t1[:c] < c, (5, c, len(HORIZONS)))
    for name in whole.fields: same(less[name][done], whole[name][:, :c][done])
    same(regime(cut(p, c)), regime(p)[:, :c])


FACTOR = np.linspace(0.5, 3, 5)          # of the prices, coin by coin
N, T = 2, 500                            # a coin and a decision

def with_later(panel, first, columns=PRICES, factor=FACTOR):
    "Targets after the columns were multiplied from a bar on"
    v = panel.values.copy()
    v[:, first:, [panel.columns.index(c) for c in columns]] *= factor[:, None, None]
    return make_targets(replace(panel, values=v))


@pytest.mark.parametrize('k', range(len(HORIZONS)))
def test_bars_after_t1_do_not_matter(panel, k):
    y = make_targets(panel)
    z = with_later(panel, y.t1[T, k] + 1, panel.columns)
    for name in y.fields: same(z[name][:, T, k], y[name][:, T, k])


@pytest.mark.parametrize('k', range(len(HORIZONS)))
def test_of_the_bar_t1_the_open_alone_matters(panel, k):
    y = make_targets(panel)
    t1 = y.t1[T, k]
    z = with_later(panel, t1, [c for c in panel.columns if c != 'open'])      # not known at its open
    for name in y.fields: same(z[name][:, T, k], y[name][:, T, k])
    z = with_later(panel, t1, ['open'])
    for name in ('ret', 'relative', 'volatility'): assert z[name][N, T, k] != y[name][N, T, k]


@pytest.mark.parametrize('k', range(len(HORIZONS)))
def test_the_close_before_t1_makes_its_regime(panel, k):
    y = make_targets(panel)
    z = with_later(panel, y.t1[T, k] - 1, ['close'], 8 * FACTOR)
    assert (z['regime'][:, T, k] == 3).all()
    assert (y['regime'][:, T, k] != 3).any()
    same(z['ret'][:, T, k], y['ret'][:, T, k])


def test_sigma_and_regime_ignore_the_future(panel):
    v = panel.values.copy()
    v[:, 501:] *= np.random.default_rng(0).uniform(0.5, 2, v[:, 501:].shape)
    changed = replace(panel, values=v)
    same(trailing_sigma(changed)[:, :501], trailing_sigma(panel)[:, :501])
    same(regime(changed)[:, :501], regime(panel)[:, :501])
    assert (trailing_sigma(changed)[:, 501] != trailing_sigma(panel)[:, 501]).all()


def test_looking_ahead_is_caught(panel):
    "A regime and a sigma from centred windows differ on cut data; so the comparison above can fail"
    c = 600
    def centred(p):
        squared = pd.DataFrame(targets.bar_returns(p).T ** 2)
        return squared.rolling(49, center=True, min_periods=20).mean().to_numpy().T
    assert (centred(cut(panel, c))[:, -20:] != centred(panel)[:, c - 20:c]).all()
    assert (centred(cut(panel, c))[:, 30:-30] == centred(panel)[:, 30:c - 30]).all()


@pytest.mark.parametrize('n', [1, 2])
def test_one_and_two_coins_have_no_cross_section(n):
    y = make_targets(to_panel(simulate(n, 300).bars))
    assert np.isnan(y['relative']).all()
    assert (y['relative_direction'] == -1).all()
    assert (y['direction'] >= 0).any()


def test_a_horizon_beyond_the_data_is_missing_not_an_error():
    y = make_targets(to_panel(simulate(3, 20).bars), (4, 50))
    for name in ('ret', 'volatility'): assert np.isnan(y[name][..., 1]).all()
    assert (y['direction'] == -1).all()
    assert np.isfinite(y['ret'][:, :15, 0]).all()


def test_a_frozen_feed_has_no_scaled_label():
    bars = simulate(4, 400).bars
    still = bars['symbol'] == 'BTC/USDT'
    bars.loc[still, list(PRICES)] = 100.0
    y = make_targets(to_panel(bars))
    n = sorted(bars['symbol'].unique()).index('BTC/USDT')
    assert np.isnan(y.sigma[n]).all()
    assert np.isnan(y['scaled'][n]).all()
    assert (y['direction'][n] == -1).all()
    assert np.isfinite(y['volatility'][n, 100, 0])
    assert np.nanmax(np.abs(y['relative'])) <= 3


def test_labels_do_not_depend_on_the_price_level(panel):
    a = make_targets(panel)
    b = with_later(panel, 0, PRICES, np.array([1e-6, 1, 1e3, 7, 0.1]))
    for name in a.fields: np.testing.assert_allclose(a[name], b[name], atol=1e-5)


def test_the_band_is_the_cost_when_it_is_larger(panel):
    sideways = lambda cost: (make_targets(panel, (4, 12, 24), cost)['direction'][:, 100:800] == 1).mean()
    assert sideways(0.05) > 0.8
    assert sideways(0) < 0.5


def test_a_negative_cost_is_refused(panel):
    with pytest.raises(ValueError, match='round_trip'): make_targets(panel, round_trip=-0.1)


@pytest.mark.parametrize('horizons', [(), (0, 4), (12, 4), (4, 4)])
def test_bad_horizons_are_refused(panel, horizons):
    with pytest.raises(ValueError, match='horizons'): make_targets(panel, horizons)


# ---- pegged coins

def dollar(bars, bounce, seed=0):
    "Closes around 1"
    return 1 + bounce * np.random.default_rng(seed).normal(size=bars)

@pytest.fixture(scope='module')
def with_dollars():
    "Five coins: USDC bounces, DAI never moves"
    p = to_panel(simulate(5, 3000, seed=4).bars)
    p = replace(p, symbols=['BTC/USDT', 'DAI/USDT', 'ETH/USDT', 'SOL/USDT', 'USDC/USDT'])
    v = p.values.copy()
    v[1, :, :4] = 1.
    v[4, :, :4] = dollar(3000, .0002)[:, None]
    return replace(p, values=v)

ALL = np.ones(3000, bool)

@pytest.mark.parametrize('share', [0, .3])
@pytest.mark.parametrize('timeframe', ['15m', '1h', '1d'])
def test_planted_dollars_are_pegged_on_any_bars(with_dollars, timeframe, share):
    p = as_if(holes(with_dollars, share, 1), timeframe)
    assert pegged(p, ALL).tolist() == [False, True, False, False, True]

def test_pegged_is_told_by_the_training_bars_alone(with_dollars):
    v = with_dollars.values.copy()
    v[4, 2000:, :4] *= np.linspace(1, 5, 1000)[:, None]                   # it leaves its peg for good
    v[0, 2000:, :4] = 1.                                                  # and another coin freezes
    later_on = replace(with_dollars, values=v)
    early = np.arange(3000) < 2000
    same(pegged(later_on, early), pegged(with_dollars, early))
    assert pegged(later_on, ~early).tolist() == [True, True, False, False, False]

def test_a_peg_that_breaks_for_some_days_is_a_peg(with_dollars):
    v = with_dollars.values.copy()
    v[4, 1000:1100, :4] *= .9
    assert pegged(replace(with_dollars, values=v), ALL)[4]

@pytest.mark.parametrize('round_trip, found', [
    (1e-5, ['DAI/USDT']),
    (ROUND_TRIP, ['DAI/USDT', 'USDC/USDT']),
    (.5, ['BTC/USDT', 'DAI/USDT', 'ETH/USDT', 'SOL/USDT', 'USDC/USDT']),
])
def test_pegged_is_a_matter_of_the_cost(with_dollars, round_trip, found):
    assert [s for s, peg in zip(with_dollars.symbols, pegged(with_dollars, ALL, round_trip)) if peg] == found

def test_a_coin_without_training_bars_is_not_called_pegged(with_dollars):
    p = holes(with_dollars, 0, 0)
    p.values[2], p.mask[2] = np.nan, False
    assert pegged(p, ALL).tolist() == [False, True, False, False, True]
    assert not pegged(p, ALL & False).any()


def test_types_shapes_and_ends(panel):
    y = make_targets(panel)
    assert {name: str(v.dtype) for name, v in y.fields.items()} == dict(
        ret='float32',
        scaled='float32',
        relative='float32',
        volatility='float32',
        direction='int64',
        relative_direction='int64',
        regime='int64',
    )
    assert all(v.shape == (5, 900, 4) for v in y.fields.values())
    assert y.sigma.dtype == np.float64
    assert y.t1.shape == (900, 4)
    assert (y.t1 - np.arange(900)[:, None] == [5, 13, 25, 73]).all()
    assert (y.known == panel.time + pd.Timedelta('73h')).all()
    assert np.nanmax(np.abs(y['scaled'])) <= 5


# ---- correlations

def one_pair(panel, i, j, t, bars):
    "Fisher's z of the correlation of the returns from the opens of t + 1 to t + 1 + bars, by a loop"
    o, T = panel['open'], len(panel.time)
    if i == j or t + 1 + bars >= T: return np.nan
    steps = [s for s in range(t + 1, t + 1 + bars) if np.isfinite(o[[i, i, j, j], [s, s + 1, s, s + 1]]).all()]
    if len(steps) < max(8, math.ceil(.75 * bars)): return np.nan
    a, b = (np.array([math.log(o[k, s + 1] / o[k, s]) for s in steps]) for k in (i, j))
    if not (a @ a > 0 and b @ b > 0): return np.nan
    return math.atanh(clip(a @ b / math.sqrt((a @ a) * (b @ b)), .999))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), share=st.sampled_from([0, .05, .3]), bars=st.sampled_from([8, 24, 50]))
def test_correlations_by_loops(panel, seed, share, bars):
    p = holes(cut(panel, 150), share, seed)
    p.values[1, :, p.columns.index('open')] = 2.                           # a feed that stands still
    p.values[2, :, p.columns.index('open')] = p.values[3, :, p.columns.index('open')]
    z = realised_correlation(p, bars)
    assert z.dtype == np.float32
    for t in np.random.default_rng(seed).integers(0, 150, 12).tolist() + [148 - bars, 149 - bars]:
        want = [[one_pair(p, i, j, t, bars) for j in range(5)] for i in range(5)]
        np.testing.assert_allclose(z[:, t], want, atol=1e-5)


@pytest.mark.parametrize('c', [300, 500])
def test_correlations_are_known_when_their_window_has_passed(panel, c):
    "And not before, to the last bit"
    p = holes(panel, .1, 0)
    whole, begun = realised_correlation(p, 24), realised_correlation(cut(p, c), 24)
    same(begun[:, :c - 25], whole[:, :c - 25])
    assert np.isnan(begun[:, c - 25:]).all()
    assert np.isfinite(whole[:, c - 25:c]).any()


@pytest.mark.parametrize('bars', [1, 7, 899, 900, 2000])
def test_correlations_of_windows_too_short_or_too_long(panel, bars):
    assert np.isnan(realised_correlation(panel, bars)).all()


@pytest.mark.parametrize('horizons, bars', [((1,), 24), ((4, 12), 24), ((4, 24), 24), ((4, 72), 72)])
def test_labels_are_known_with_the_correlations(panel, horizons, bars):
    assert pair_window(horizons, panel.timeframe) == bars
    assert (make_targets(panel, horizons).known == panel.time + (1 + bars) * panel.timeframe).all()


def test_the_path_ends_at_the_scaled_labels(panel):
    y = make_targets(panel)
    same(path(panel, y.sigma, y.horizons), y['scaled'])


real_data = pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')

@real_data
def test_real_bars_have_labels_where_their_bars_are():
    p, _ = read_panel(Path(os.environ['CRYPTOML_DATA']) / 'spot_1h.parquet', start='2023-01-01', end='2023-07-01')
    y = make_targets(p, (4, 24))
    for k, h in enumerate(y.horizons):
        there = p.mask[:, 1:-h] & p.mask[:, 1 + h:]
        same(np.isfinite(y['ret'][:, :-1 - h, k]), there)
    side = y['relative_direction']
    assert abs((side == 1).sum() - (side == 0).sum()) < 100              # ties at the median only


@real_data
@pytest.mark.parametrize('name', ['spot_1h', 'spot_1d'])
def test_no_real_coin_of_these_is_pegged(name):
    p, _ = read_panel(Path(os.environ['CRYPTOML_DATA']) / f'{name}.parquet', start='2022-06-01', end='2024-06-01')
    assert not pegged(p, np.ones(len(p.time), bool)).any()
