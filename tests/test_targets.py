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
from cryptoml.data import Panel, read_panel, to_panel
from cryptoml.simulate import simulate
from cryptoml.targets import make_targets, path, regime, trailing_sigma


def holes(panel: Panel, share, seed) -> Panel:
    "The panel with bars missing at random"
    gone = np.random.default_rng(seed).random(panel.mask.shape) < share
    return replace(panel, values=np.where(gone[..., None], np.nan, panel.values), mask=panel.mask & ~gone)


def cut(panel, c): return replace(panel, time=panel.time[:c], values=panel.values[:, :c], mask=panel.mask[:, :c])


@pytest.fixture(scope='module')
def panel(): return to_panel(simulate(5, 900, seed=4).bars)


def one_label(panel, sigma, n, t, h, round_trip=0.0014):
    "Every label of one decision, by loops"
    o, T = panel['open'], len(panel.time)
    opened = lambda i, s: s < T and panel.mask[i, s]
    move = lambda i: math.log(o[i, t + 1 + h] / o[i, t + 1]) if opened(i, t + 1) and opened(i, t + 1 + h) else None
    out = dict(ret=None, scaled=None, relative=None, volatility=None, direction=-1, relative_direction=-1)
    r, all_r = move(n), [x for i in range(len(o)) if (x := move(i)) is not None]
    usual = sigma[n, t] * math.sqrt(h)
    if r is not None:
        out['ret'] = r
        if math.isfinite(usual):
            out['scaled'] = min(max(r / usual, -5), 5)
            band = max(round_trip, 0.25 * usual)
            out['direction'] = 2 if r > band else 0 if r < -band else 1
        if len(all_r) >= 3:
            if math.isfinite(usual): out['relative'] = min(max((r - sum(all_r) / len(all_r)) / usual, -3), 3)
            middle = sorted(all_r); middle = (middle[(len(middle) - 1) // 2] + middle[len(middle) // 2]) / 2
            if r != middle: out['relative_direction'] = int(r > middle)
    if all(opened(n, t + k) for k in range(1, h + 2)):
        squares = [math.log(o[n, t + 1 + k] / o[n, t + k]) ** 2 for k in range(1, h + 1)]
        out['volatility'] = math.log(max(math.sqrt(sum(squares) / h), 1e-6))
    return out


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10 ** 6), st.sampled_from([0, 0.02, 0.3]), st.integers(1, 6))
def test_labels_equal_brute_force(seed, share, n):
    p = holes(to_panel(simulate(n, 140, seed=seed).bars), share, seed)
    y = make_targets(p, (1, 5, 12), span=40)
    rng = np.random.default_rng(seed)
    for n_, t, k in zip(rng.integers(0, n, 150), rng.integers(0, 140, 150), rng.integers(0, 3, 150)):
        for name, value in one_label(p, y.sigma, n_, t, y.horizons[k]).items():
            got = y[name][n_, t, k]
            if value is None: assert np.isnan(got), (name, t)
            else: assert got == pytest.approx(value, rel=2e-6, abs=1e-7), (name, t)


def test_sigma_equals_its_recursion(panel):
    p = holes(panel, 0.1, 1)
    sigma, lam = trailing_sigma(p, 50), 1 - 2 / 51
    for n in range(2):
        num = den = seen = 0
        for t in range(p.mask.shape[1]):
            if t and p.mask[n, t] and p.mask[n, t - 1]:
                r = math.log(p['close'][n, t] / p['close'][n, t - 1])
                num, den, seen = lam * num + r * r, lam * den + 1, seen + 1
            want = math.sqrt(num / den) if seen >= 25 and p.mask[n, t] else math.nan
            assert sigma[n, t] == pytest.approx(want, rel=1e-9, nan_ok=True)


def test_regime_equals_its_rule(panel, monkeypatch):
    monkeypatch.setattr(targets, 'PAST', 300); monkeypatch.setattr(targets, 'TREND', 60)
    p = holes(panel, 0.05, 2); got = regime(p)
    r = targets.bar_returns(p)
    for n, t in [(n, t) for n in range(2) for t in range(0, 900, 7)]:
        def vol(s):
            x = r[n, max(s - 23, 0):s + 1]; x = x[np.isfinite(x)]
            return math.sqrt((x ** 2).mean()) if len(x) >= 12 else math.nan
        past = np.array([vol(s) for s in range(max(t - 300, 0), t)]); past = past[np.isfinite(past)]
        week = r[n, max(t - 59, 0):t + 1]; week = week[np.isfinite(week)]
        want = -1
        if len(past) >= 120 and len(week) >= 30 and p.mask[n, t]:
            tau = week.sum() / math.sqrt((week ** 2).sum())
            want = 3 if vol(t) > np.quantile(past, 0.8) else 0 if tau > 0.75 else 1 if tau < -0.75 else 2
        assert got[n, t] == want, (n, t)


def test_the_regime_label_is_the_regime_when_the_label_ends():
    p = to_panel(simulate(3, 1500, seed=5).bars)
    y, now = make_targets(p, (4, 12)), regime(p)
    for k, h in enumerate(y.horizons):
        np.testing.assert_array_equal(y['regime'][:, :-h, k], now[:, h:])
        assert (y['regime'][:, -h:, k] == -1).all()
    assert set(np.unique(now)) == {-1, 0, 1, 2, 3}


@pytest.mark.parametrize('share', [0, 0.05])
@pytest.mark.parametrize('c', [1, 3, 90, 500, 899])
def test_cut_data_give_the_same_labels_up_to_t1(panel, c, share):
    p = holes(panel, share, 3)
    whole, less = make_targets(p), make_targets(cut(p, c))
    np.testing.assert_array_equal(less.sigma, whole.sigma[:, :c])
    done = np.broadcast_to(whole.t1[:c] < c, (5, c, 3))
    for name in whole.fields: np.testing.assert_array_equal(less[name][done], whole[name][:, :c][done])
    np.testing.assert_array_equal(regime(cut(p, c)), regime(p)[:, :c])


@pytest.mark.parametrize('k', [0, 1, 2])
def test_a_label_depends_on_bars_before_t1_and_on_none_after(panel, k):
    "Bars from t1 on are replaced: only the open of t1 itself may matter; and that open does matter"
    y = make_targets(panel); t, n = 500, 2; t1 = y.t1[t, k]
    def with_later(first, factor, columns=slice(None)):
        v = panel.values.copy(); v[:, first:, columns] *= factor[:, None, None] if np.ndim(factor) else factor
        return make_targets(replace(panel, values=v))
    factor = np.linspace(0.5, 3, 5)
    z = with_later(t1 + 1, factor)
    for name in y.fields: np.testing.assert_array_equal(z[name][:, t, k], y[name][:, t, k])
    others = [panel.columns.index(c) for c in panel.columns if c != 'open']
    z = with_later(t1, factor, others)                       # the rest of bar t1 is not known at its open
    for name in y.fields: np.testing.assert_array_equal(z[name][:, t, k], y[name][:, t, k])
    z = with_later(t1, factor, [panel.columns.index('open')])
    for name in ('ret', 'relative', 'volatility'): assert z[name][n, t, k] != y[name][n, t, k]
    z = with_later(t1 - 1, 8 * factor, [panel.columns.index('close')])        # the close of bar t + h makes its regime
    assert (z['regime'][:, t, k] == 3).all() and (y['regime'][:, t, k] != 3).any()
    np.testing.assert_array_equal(z['ret'][:, t, k], y['ret'][:, t, k])


def test_sigma_and_regime_ignore_the_future(panel):
    v = panel.values.copy(); v[:, 501:] *= np.random.default_rng(0).uniform(0.5, 2, v[:, 501:].shape)
    changed = replace(panel, values=v)
    np.testing.assert_array_equal(trailing_sigma(changed)[:, :501], trailing_sigma(panel)[:, :501])
    np.testing.assert_array_equal(regime(changed)[:, :501], regime(panel)[:, :501])
    assert (trailing_sigma(changed)[:, 501] != trailing_sigma(panel)[:, 501]).all()


def test_looking_ahead_is_caught(panel):
    "A regime and a sigma from centred windows differ on cut data; so the comparison above can fail"
    c = 600
    def centred(p): return pd.DataFrame(targets.bar_returns(p).T ** 2).rolling(49, center=True, min_periods=20).mean().to_numpy().T
    assert (centred(cut(panel, c))[:, -20:] != centred(panel)[:, c - 20:c]).all()
    assert (centred(cut(panel, c))[:, 30:-30] == centred(panel)[:, 30:c - 30]).all()


def test_one_and_two_coins_have_no_cross_section():
    for n in (1, 2):
        y = make_targets(to_panel(simulate(n, 300).bars))
        assert np.isnan(y['relative']).all() and (y['relative_direction'] == -1).all() and (y['direction'] >= 0).any()


def test_a_horizon_beyond_the_data_is_missing_not_an_error():
    y = make_targets(to_panel(simulate(3, 20).bars), (4, 50))
    assert np.isnan(y['ret'][..., 1]).all() and np.isnan(y['volatility'][..., 1]).all() and (y['direction'] == -1).all()
    assert np.isfinite(y['ret'][:, :15, 0]).all()


def test_a_frozen_feed_has_no_scaled_label():
    bars = simulate(4, 400).bars
    still = bars['symbol'] == 'BTC/USDT'
    bars.loc[still, ['open', 'high', 'low', 'close']] = 100.0
    y = make_targets(to_panel(bars)); n = sorted(bars['symbol'].unique()).index('BTC/USDT')
    assert np.isnan(y.sigma[n]).all() and np.isnan(y['scaled'][n]).all() and (y['direction'][n] == -1).all()
    assert np.isfinite(y['volatility'][n, 100, 0]) and np.nanmax(np.abs(y['relative'])) <= 3


def test_labels_do_not_depend_on_the_price_level(panel):
    v = panel.values.copy(); cols = [panel.columns.index(c) for c in ('open', 'high', 'low', 'close')]
    v[:, :, cols] *= np.array([1e-6, 1, 1e3, 7, 0.1])[:, None, None]
    a, b = make_targets(panel), make_targets(replace(panel, values=v))
    for name in a.fields: np.testing.assert_allclose(a[name], b[name], atol=1e-5)


def test_the_band_is_the_cost_when_it_is_larger(panel):
    free, dear = make_targets(panel, round_trip=0), make_targets(panel, round_trip=0.05)
    share = lambda y: (y['direction'][:, 100:800] == 1).mean()
    assert share(dear) > 0.8 > 0.5 > share(free)
    with pytest.raises(ValueError, match='round_trip'): make_targets(panel, round_trip=-0.1)


@pytest.mark.parametrize('horizons', [(), (0, 4), (12, 4), (4, 4)])
def test_bad_horizons_are_refused(panel, horizons):
    with pytest.raises(ValueError, match='horizons'): make_targets(panel, horizons)


def test_types_shapes_and_ends(panel):
    y = make_targets(panel)
    assert {k: str(v.dtype) for k, v in y.fields.items()} == dict(ret='float32', scaled='float32', relative='float32', volatility='float32',
                                                                   direction='int64', relative_direction='int64', regime='int64')
    assert all(v.shape == (5, 900, 3) for v in y.fields.values()) and y.sigma.dtype == np.float64
    assert y.t1.shape == (900, 3) and (y.t1 - np.arange(900)[:, None] == [5, 13, 25]).all()
    assert (y.known == panel.time + pd.Timedelta('25h')).all()
    assert np.nanmax(np.abs(y['scaled'])) <= 5
    np.testing.assert_array_equal(path(panel, y.sigma, y.horizons), y['scaled'])


@pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')
def test_real_bars_have_labels_where_their_bars_are():
    p, _ = read_panel(Path(os.environ['CRYPTOML_DATA']) / 'spot_1h.parquet', start='2023-01-01', end='2023-07-01')
    y = make_targets(p, (4, 24))
    for k, h in enumerate(y.horizons):
        there = p.mask[:, 1:-h] & p.mask[:, 1 + h:]
        np.testing.assert_array_equal(np.isfinite(y['ret'][:, :-1 - h, k]), there)
    assert abs((y['relative_direction'] == 1).sum() - (y['relative_direction'] == 0).sum()) < 100       # ties at the median only
