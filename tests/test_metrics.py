"Scores against brute force, scipy and each other; the bootstrap; refusal of missing values"
import time
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from cryptoml import metrics as m

seeds = st.integers(0, 2**32 - 1)

def sample(seed, n=200, k=3):
    g = np.random.default_rng(seed)
    prob = g.dirichlet(np.ones(k), n)
    return g, g.integers(0, k, n), prob

@given(seeds)
@settings(max_examples=30, deadline=None)
def test_class_scores_do_not_depend_on_order_or_names(seed):
    g, y, prob = sample(seed)
    pred, order, names = prob.argmax(1), g.permutation(200), g.permutation(3)
    for f in (m.accuracy, m.mcc):
        assert f(y, pred) == pytest.approx(f(y[order], pred[order]), abs=1e-12)
        assert f(y, pred) == pytest.approx(f(names[y], names[pred]), abs=1e-12)
    assert m.log_loss(y, prob) == pytest.approx(m.log_loss(y[order], prob[order]), abs=1e-12)
    assert m.ece(y, prob) == pytest.approx(m.ece(y[order], prob[order]), abs=1e-12)
    conf, right = prob.max(1).round(1), pred == y                              # rounded: ties
    assert m.accuracy_at_coverage(conf, right) == pytest.approx(m.accuracy_at_coverage(conf[order], right[order]), abs=1e-12)

def test_mcc_is_the_correlation_of_indicator_matrices():
    _, y, prob = sample(1)
    a, b = np.eye(3)[y], np.eye(3)[prob.argmax(1)]
    cov = lambda u, v: ((u - u.mean(0)) * (v - v.mean(0))).sum()
    assert m.mcc(y, prob.argmax(1)) == pytest.approx(cov(a, b) / np.sqrt(cov(a, a) * cov(b, b)), abs=1e-12)

@given(seeds)
@settings(max_examples=20, deadline=None)
def test_auc_is_invariant_under_monotone_maps_and_flips(seed):
    g = np.random.default_rng(seed)
    y, s = np.r_[True, False, g.random(60) < .5], g.normal(size=62).round(1)
    assert m.auc(y, s) == pytest.approx(m.auc(y, np.exp(s) * 3), abs=1e-12)
    assert m.auc(y, s) == pytest.approx(1 - m.auc(~y, s), abs=1e-12)

def test_ece_by_hand():
    prob = np.array([[.6, .4], [.6, .4], [.9, .1], [.9, .1]])
    assert m.ece([0, 1, 0, 0], prob, bins=2) == pytest.approx((2 * abs(.5 - .6) + 2 * abs(1 - .9)) / 4)
    assert m.ece([0, 1, 0, 0], prob[:, 1], bins=2) == pytest.approx(m.ece([0, 1, 0, 0], prob, bins=2))

def test_accuracy_at_coverage_shares_ties():
    conf, right = np.array([.9, .5, .5, .5, .5]), np.array([1, 1, 1, 0, 0])
    got = m.accuracy_at_coverage(conf, right, [.2, .6, 1.])
    assert got == pytest.approx([1, (1 + 2 * .5) / 3, .6])

@pytest.mark.parametrize('call', [
    lambda x: m.mae(x, x), lambda x: m.mse(x, x), lambda x: m.r2(x, x), lambda x: m.pinball(x, x[:, None], [.5]), lambda x: m.coverage(x, x, x),
    lambda x: m.qlike(np.exp(x), np.exp(x)), lambda x: m.auc(np.arange(9) % 2, x), lambda x: m.accuracy(x, np.zeros(9)), lambda x: m.accuracy_at_coverage(x, np.ones(9)),
    lambda x: m.log_loss(np.zeros(9, int), .5 + 0 * x), lambda x: m.sharpe(x), lambda x: m.psr(x), lambda x: m.drawdown(1 + 0 * x), lambda x: m.by_day(x, np.arange(9)),
    lambda x: m.diebold_mariano(x, 0 * x), lambda x: m.interval_mean(x, np.arange(9)), lambda x: m.interval(np.mean, np.arange(9), x), lambda x: m.mean_by(x, np.arange(9))])
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_missing_values_are_refused(call, bad):
    x = np.arange(9.); x[4] = bad
    with pytest.raises(ValueError, match='not finite'), np.errstate(all='ignore'): call(x)

def test_labels_of_missing_targets_are_refused():
    with pytest.raises(ValueError, match='mask missing labels'): m.accuracy([0, -1], [0, 1])
    with pytest.raises(ValueError, match='mask missing labels'): m.log_loss([0, 2], [.5, .5])
    with pytest.raises(ValueError, match='no samples'): m.accuracy([], [])

def test_rank_ic_with_holes_and_ties_is_spearman():
    g = np.random.default_rng(0)
    a, b = g.normal(size=(2, 9, 60)).round(0)
    a[g.random(a.shape) < .3] = np.nan; b[g.random(b.shape) < .3] = np.nan
    got = m.rank_ic_series(a, b)
    for t in range(60):
        k = ~np.isnan(a[:, t]) & ~np.isnan(b[:, t])
        if k.sum() < 3 or np.ptp(a[k, t]) == 0 or np.ptp(b[k, t]) == 0: assert np.isnan(got[t])
        else: assert got[t] == pytest.approx(stats.spearmanr(a[k, t], b[k, t]).statistic, abs=1e-12)

def test_cross_residual_is_uncorrelated_with_its_exposures_and_takes_vectors():
    g = np.random.default_rng(0)
    y, x1, x2 = g.normal(size=(3, 10, 30)); x2[:, 5] = 1.                       # a constant exposure changes nothing
    y[2, 3] = np.nan
    r = m.cross_residual(y, x1, x2)
    assert np.isnan(r[2, 3]) and np.isnan(r).sum() == 1
    for e in (np.ones_like(y), x1, x2): assert np.abs(np.nansum(r * e, 0)).max() < 1e-9
    assert m.cross_residual(y[:, 0], x1[:, 0]) == pytest.approx(m.cross_residual(y, x1)[:, 0], abs=1e-12)

def test_sharpe_of_rows_and_of_nothing():
    r = np.random.default_rng(0).normal(.001, .01, (5, 300))
    assert m.sharpe(r, 365) == pytest.approx([m.sharpe(x, 365) for x in r])
    assert m.sharpe(np.zeros(5)) == 0 and m.psr(r[0], m.sharpe(r[0], 365), 365) == pytest.approx(.5)
    with pytest.raises(ValueError, match='three returns'): m.psr(np.zeros(100))

def test_deflated_sharpe_falls_with_trials():
    r = np.random.default_rng(0).normal(.002, .02, 365)
    d = [m.deflated_sharpe(r, n, 1., 365) for n in (1, 2, 10, 100, 1000)]
    assert d[0] == m.psr(r, 0, 365) and all(np.diff(d) < 0)
    with pytest.raises(ValueError, match='at least one trial'): m.expected_max_sharpe(0)

@pytest.mark.parametrize('n, h', [(250, 1), (400, 6), (1000, 24)])
def test_diebold_mariano_keeps_its_size(n, h):
    g = np.random.default_rng(0)
    reject = [m.diebold_mariano(np.convolve(g.normal(size=n + h - 1), np.ones(h), 'valid'), np.zeros(n), h).p < .05 for _ in range(400)]
    assert .02 < np.mean(reject) < .125

def test_day_blocks_in_any_zone_and_unit():
    t = pd.date_range('2024-03-30', periods=60, freq='h', tz='UTC')
    days = m.day_blocks(t)
    assert days[0] == (pd.Timestamp('2024-03-30') - pd.Timestamp('1970-01-01')).days and np.bincount(days - days[0]).tolist() == [24, 24, 12]
    for other in (t.as_unit('us'), t.as_unit('ms'), t.tz_localize(None), t.tz_convert('America/New_York'), pd.Series(t)): assert (m.day_blocks(other) == days).all()

# Intervals

def test_interval_mean_is_fast():
    g = np.random.default_rng(0)
    v, day = g.normal(size=10_000), np.repeat(np.arange(500), 20)
    m.interval_mean(v, day)
    began = time.perf_counter(); m.interval_mean(v, day, reps=1000); assert time.perf_counter() - began < .3     # 0.02 s on a quiet machine

def test_all_paths_draw_the_same_days():
    g = np.random.default_rng(0)
    r, day = g.normal(.001, .01, 900), np.sort(g.integers(0, 80, 900))
    assert m.interval_sharpe(r, day, reps=100) == pytest.approx(m.interval(lambda x: m.sharpe(x), day, r, reps=100), abs=1e-9)
    w = (g.random(900) < .7).astype(float)
    assert m.interval_mean(r, day, w, reps=100) == pytest.approx(m.interval(lambda x, w: (x * w).sum() / w.sum(), day, r, w, reps=100), abs=1e-12)
    order = g.permutation(900)
    assert m.interval_mean(r[order], day[order] * 7 + 3) == pytest.approx(m.interval_mean(r, day), abs=1e-12)      # names of days and order of samples mean nothing

def test_coins_of_a_day_travel_together():
    "Copies of one coin add no evidence: the interval of ten copies is that of one"
    v = np.random.default_rng(0).normal(size=300)
    one, ten = m.interval_mean(v, np.arange(300)), m.interval_mean(np.tile(v, 10), np.tile(np.arange(300), 10))
    assert one == pytest.approx(ten, abs=1e-12)

def test_paired_differences_cancel_what_both_share():
    g = np.random.default_rng(0)
    shared = g.normal(size=500); a, b = shared + .05, shared + .001 * g.normal(size=500)
    gain = m.interval_mean(a - b, np.arange(500))
    assert gain.lo > .049 and gain.hi < .051 and m.interval_mean(a, np.arange(500)).lo < 0

def test_variance_of_the_resampled_mean_is_that_of_politis_and_romano():
    "Closed form (their section 2): samples k apart lie in one run with probability q^k, and then covary as the circular autocovariance says"
    v = np.cumsum(np.random.default_rng(0).normal(size=60)) * .1
    n, q, e = len(v), 1 - 1 / 5, v - v.mean()
    c = np.array([(e * np.roll(e, -k)).mean() for k in range(n)])
    k = np.arange(1, n)
    exact = (c[0] + 2 * ((1 - k / n) * q**k * c[1:]).sum()) / n
    draws = v[m.bootstrap_days(n, 5, 40_000)].mean(1)
    assert draws.var() == pytest.approx(exact, rel=.03)

def test_too_few_days_are_refused():
    with pytest.raises(ValueError, match='at least two days'): m.interval_mean(np.ones(24), np.zeros(24))
