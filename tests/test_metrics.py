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
    pred = prob.argmax(1)
    order = g.permutation(200)
    names = g.permutation(3)
    for f in (m.accuracy, m.mcc):
        assert f(y, pred) == pytest.approx(f(y[order], pred[order]), abs=1e-12)
        assert f(y, pred) == pytest.approx(f(names[y], names[pred]), abs=1e-12)
    assert m.log_loss(y, prob) == pytest.approx(m.log_loss(y[order], prob[order]), abs=1e-12)
    assert m.ece(y, prob) == pytest.approx(m.ece(y[order], prob[order]), abs=1e-12)
    conf = prob.max(1).round(1)                                                # rounded: ties
    right = pred == y
    reordered = m.accuracy_at_coverage(conf[order], right[order])
    assert m.accuracy_at_coverage(conf, right) == pytest.approx(reordered, abs=1e-12)

def test_mcc_is_the_correlation_of_indicator_matrices():
    _, y, prob = sample(1)
    pred = prob.argmax(1)
    a = np.eye(3)[y]
    b = np.eye(3)[pred]
    cov = lambda u, v: ((u - u.mean(0)) * (v - v.mean(0))).sum()
    assert m.mcc(y, pred) == pytest.approx(cov(a, b) / np.sqrt(cov(a, a) * cov(b, b)), abs=1e-12)

@given(seeds)
@settings(max_examples=20, deadline=None)
def test_auc_is_invariant_under_monotone_maps_and_flips(seed):
    g = np.random.default_rng(seed)
    y = np.r_[True, False, g.random(60) < .5]
    s = g.normal(size=62).round(1)
    assert m.auc(y, s) == pytest.approx(m.auc(y, np.exp(s) * 3), abs=1e-12)
    assert m.auc(y, s) == pytest.approx(1 - m.auc(~y, s), abs=1e-12)

def test_ece_by_hand():
    prob = np.array([[.6, .4], [.6, .4], [.9, .1], [.9, .1]])
    want = pytest.approx((2 * abs(.5 - .6) + 2 * abs(1 - .9)) / 4)
    assert m.ece([0, 1, 0, 0], prob, bins=2) == want
    assert m.ece([0, 1, 0, 0], prob[:, 1], bins=2) == want

def test_accuracy_at_coverage_shares_ties():
    conf = np.array([.9, .5, .5, .5, .5])
    right = np.array([1, 1, 1, 0, 0])
    got = m.accuracy_at_coverage(conf, right, [.2, .6, 1.])
    assert got == pytest.approx([1, (1 + 2 * .5) / 3, .6])

nine = np.arange(9)

@pytest.mark.parametrize('call', [
    pytest.param(lambda x: m.mae(x, x), id='mae'),
    pytest.param(lambda x: m.mse(x, x), id='mse'),
    pytest.param(lambda x: m.r2(x, x), id='r2'),
    pytest.param(lambda x: m.pinball(x, x[:, None], [.5]), id='pinball'),
    pytest.param(lambda x: m.coverage(x, x, x), id='coverage'),
    pytest.param(lambda x: m.qlike(np.exp(x), np.exp(x)), id='qlike'),
    pytest.param(lambda x: m.auc(nine % 2, x), id='auc'),
    pytest.param(lambda x: m.accuracy(x, np.zeros(9)), id='accuracy'),
    pytest.param(lambda x: m.accuracy_at_coverage(x, np.ones(9)), id='accuracy_at_coverage'),
    pytest.param(lambda x: m.log_loss(np.zeros(9, int), .5 + 0 * x), id='log_loss'),
    pytest.param(lambda x: m.sharpe(x), id='sharpe'),
    pytest.param(lambda x: m.psr(x), id='psr'),
    pytest.param(lambda x: m.drawdown(1 + 0 * x), id='drawdown'),
    pytest.param(lambda x: m.by_day(x, nine), id='by_day'),
    pytest.param(lambda x: m.diebold_mariano(x, 0 * x), id='diebold_mariano'),
    pytest.param(lambda x: m.interval_mean(x, nine), id='interval_mean'),
    pytest.param(lambda x: m.interval(np.mean, nine, x), id='interval'),
])
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_missing_values_are_refused(call, bad):
    x = nine.astype(float)
    x[4] = bad
    with pytest.raises(ValueError, match='not finite'), np.errstate(all='ignore'): call(x)

@pytest.mark.parametrize('score, y, pred, words', [
    (m.accuracy, [0, -1], [0, 1], 'mask missing labels'),
    (m.log_loss, [0, 2], [.5, .5], 'mask missing labels'),
    (m.accuracy, [], [], 'no samples'),
], ids=['-1', 'a class too many', 'none'])
def test_labels_of_missing_targets_are_refused(score, y, pred, words):
    with pytest.raises(ValueError, match=words): score(y, pred)

def test_rank_ic_with_holes_and_ties_is_spearman():
    g = np.random.default_rng(0)
    a, b = g.normal(size=(2, 9, 60)).round(0)
    a[g.random(a.shape) < .3] = np.nan
    b[g.random(b.shape) < .3] = np.nan
    got = m.rank_ic_series(a, b)
    for t in range(60):
        there = ~np.isnan(a[:, t]) & ~np.isnan(b[:, t])
        x = a[there, t]
        y = b[there, t]
        if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0: assert np.isnan(got[t])
        else: assert got[t] == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)

def test_cross_residual_is_uncorrelated_with_its_exposures_and_takes_vectors():
    g = np.random.default_rng(0)
    y, x1, x2 = g.normal(size=(3, 10, 30))
    x2[:, 5] = 1.                                                               # a constant exposure changes nothing
    y[2, 3] = np.nan
    r = m.cross_residual(y, x1, x2)
    assert np.argwhere(np.isnan(r)).tolist() == [[2, 3]]
    for e in (np.ones_like(y), x1, x2): assert np.abs(np.nansum(r * e, 0)).max() < 1e-9
    assert m.cross_residual(y[:, 0], x1[:, 0]) == pytest.approx(m.cross_residual(y, x1)[:, 0], abs=1e-12)

def test_sharpe_of_rows_and_of_nothing():
    r = np.random.default_rng(0).normal(.001, .01, (5, 300))
    assert m.sharpe(r, 365) == pytest.approx([m.sharpe(x, 365) for x in r])
    assert m.sharpe(np.zeros(5)) == 0
    assert m.psr(r[0], m.sharpe(r[0], 365), 365) == pytest.approx(.5)
    with pytest.raises(ValueError, match='three returns'): m.psr(np.zeros(100))

def test_deflated_sharpe_falls_with_trials():
    r = np.random.default_rng(0).normal(.002, .02, 365)
    d = [m.deflated_sharpe(r, n, 1., 365) for n in (1, 2, 10, 100, 1000)]
    assert d[0] == m.psr(r, 0, 365)
    assert all(np.diff(d) < 0)
    with pytest.raises(ValueError, match='at least one trial'): m.expected_max_sharpe(0)

@pytest.mark.parametrize('n, h', [(250, 1), (400, 6), (1000, 24)])
def test_diebold_mariano_keeps_its_size(n, h):
    g = np.random.default_rng(0)
    overlapping = lambda: np.convolve(g.normal(size=n + h - 1), np.ones(h), 'valid')
    reject = [m.diebold_mariano(overlapping(), np.zeros(n), h).p < .05 for _ in range(400)]
    assert .02 < np.mean(reject) < .125

hours = pd.date_range('2024-03-30', periods=60, freq='h', tz='UTC')

def test_day_blocks_count_days_since_1970():
    days = m.day_blocks(hours)
    assert days[0] == (pd.Timestamp('2024-03-30') - pd.Timestamp('1970-01-01')).days
    assert np.bincount(days - days[0]).tolist() == [24, 24, 12]

@pytest.mark.parametrize('other', [
    pytest.param(hours.as_unit('us'), id='us'),
    pytest.param(hours.as_unit('ms'), id='ms'),
    pytest.param(hours.tz_localize(None), id='naive'),
    pytest.param(hours.tz_convert('America/New_York'), id='New York'),
    pytest.param(pd.Series(hours), id='Series'),
])
def test_day_blocks_in_any_zone_and_unit(other):
    assert (m.day_blocks(other) == m.day_blocks(hours)).all()

# Intervals

def test_interval_mean_is_fast():
    g = np.random.default_rng(0)
    v = g.normal(size=10_000)
    day = np.repeat(np.arange(500), 20)
    m.interval_mean(v, day)
    began = time.process_time()
    m.interval_mean(v, day, reps=1000)
    assert time.process_time() - began < .3                                    # 0.02 s on a quiet machine

def returns_of_days(seed=0):
    g = np.random.default_rng(seed)
    r = g.normal(.001, .01, 900)
    day = np.sort(g.integers(0, 80, 900))
    weights = (g.random(900) < .7).astype(float)
    return r, day, weights, g.permutation(900)

def test_all_paths_draw_the_same_days():
    r, day, w, _ = returns_of_days()
    ratio = m.interval(lambda x: m.sharpe(x), day, r, reps=100)
    assert m.interval_sharpe(r, day, reps=100) == pytest.approx(ratio, abs=1e-9)
    mean = m.interval(lambda x, w: (x * w).sum() / w.sum(), day, r, w, reps=100)
    assert m.interval_mean(r, day, w, reps=100) == pytest.approx(mean, abs=1e-12)

def test_names_of_days_and_order_of_samples_mean_nothing():
    r, day, _, order = returns_of_days()
    assert m.interval_mean(r[order], day[order] * 7 + 3) == pytest.approx(m.interval_mean(r, day), abs=1e-12)

def test_coins_of_a_day_travel_together():
    "Copies of one coin add no evidence: the interval of ten copies is that of one"
    v = np.random.default_rng(0).normal(size=300)
    day = np.arange(300)
    one = m.interval_mean(v, day)
    ten = m.interval_mean(np.tile(v, 10), np.tile(day, 10))
    assert one == pytest.approx(ten, abs=1e-12)

def test_paired_differences_cancel_what_both_share():
    g = np.random.default_rng(0)
    shared = g.normal(size=500)
    a = shared + .05
    b = shared + .001 * g.normal(size=500)
    gain = m.interval_mean(a - b, np.arange(500))
    assert .049 < gain.lo < gain.hi < .051
    assert m.interval_mean(a, np.arange(500)).lo < 0

def test_variance_of_the_resampled_mean_is_that_of_politis_and_romano():
    """Closed form (their section 2): samples k apart lie in one run with probability q^k,
    and then covary as the circular autocovariance says"""
    v = np.cumsum(np.random.default_rng(0).normal(size=60)) * .1
    n = len(v)
    q = 1 - 1 / 5
    e = v - v.mean()
    c = np.array([(e * np.roll(e, -k)).mean() for k in range(n)])
    k = np.arange(1, n)
    exact = (c[0] + 2 * ((1 - k / n) * q**k * c[1:]).sum()) / n
    draws = v[m.bootstrap_days(n, 5, 40_000)].mean(1)
    assert draws.var() == pytest.approx(exact, rel=.03)

def test_too_few_days_are_refused():
    with pytest.raises(ValueError, match='at least two days'): m.interval_mean(np.ones(24), np.zeros(24))
