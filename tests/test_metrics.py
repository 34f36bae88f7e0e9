"Scores against brute force, scipy and each other; intervals against closed forms; refusal of missing values"
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import integrate, signal, stats
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
    pytest.param(lambda x: m.interval_score(x, nine - 1., nine + 1., .9), id='interval_score'),
    pytest.param(lambda x: m.interval_score(nine, x, nine + 9., .9), id='interval_score, a bound'),
    pytest.param(lambda x: m.unbiased(np.exp(x), np.exp(nine)), id='unbiased'),
    pytest.param(lambda x: m.surest(x, .5), id='surest'),
    pytest.param(lambda x: m.holm(x / 9), id='holm'),
    pytest.param(lambda x: m.min_track_record(x), id='min_track_record'),
    pytest.param(lambda x: m.interval_auc(nine % 2, x, nine), id='interval_auc'),
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
    pytest.param(lambda x: m.interval_sharpe(x, nine), id='interval_sharpe'),
    pytest.param(lambda x: m.interval_sharpe(nine / 9, nine, over=x), id='interval_sharpe over'),
    pytest.param(lambda x: m.interval_r2(nine / 9, x, nine), id='interval_r2'),
    pytest.param(lambda x: m.interval_r2(nine / 9, nine / 9, nine, over=x), id='interval_r2 over'),
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
    reject = [m.diebold_mariano(overlapping(), np.zeros(n), overlap=h - 1).p < .05 for _ in range(400)]
    assert .02 < np.mean(reject) < .085

def squared_errors(g, days, a_day, coins, reach, half):
    """Of two equally bad forecasts of coins that share most of their moves, labels `reach` decisions long, forecasts
    that keep half of what they say for `half` decisions [2, coins * days * a_day]"""
    K = days * a_day
    phi = .5 ** (1 / half)
    def shared(make): return np.sqrt(.6) * make(1) + np.sqrt(.4) * make(coins)
    def kept(n):
        shocks = g.normal(size=(n, K + 100))
        return signal.lfilter([np.sqrt(1 - phi**2)], [1, -phi], shocks)[:, 100:]
    path = np.cumsum(shared(lambda n: g.standard_t(4, (n, K + reach)) / np.sqrt(2)), 1)
    y = (path[:, reach:] - path[:, :-reach]) / np.sqrt(reach)
    return [np.square(y - .3 * shared(kept)).ravel() for _ in range(2)]

@pytest.mark.parametrize('days, coins, reach, half', [
    pytest.param(182, 5, 6, 9, id='half a year, a day ahead'),
    pytest.param(182, 5, 1, 9, id='half a year, 4 h ahead'),
    pytest.param(365, 10, 18, 9, id='a year of ten coins, three days ahead'),
    pytest.param(912, 5, 18, 36, id='five folds, three days ahead, slow forecasts'),
])
def test_equal_forecasts_of_a_panel_are_not_told_apart(days, coins, reach, half):
    "Overlapping labels, coins that move together: an error rate of at most 6 % at 5 %, and no empty test"
    g = np.random.default_rng(0)
    day = np.tile(np.repeat(np.arange(days), 6), coins)
    tries = [squared_errors(g, days, 6, coins, reach, half) for _ in range(1000)]
    found = [m.diebold_mariano(a, b, day, reach / 6) for a, b in tries]
    assert .03 < np.mean([f.p < .05 for f in found]) <= .06
    assert .03 < np.mean([f.better < .05 for f in found]) <= .06

def test_a_better_forecast_of_a_panel_is_found():
    g = np.random.default_rng(0)
    day = np.tile(np.repeat(np.arange(365), 6), 5)
    y, a, b = g.normal(size=(3, len(day)))
    found = m.diebold_mariano(np.square(y - .1 * y - a), np.square(y - b), day, 1.)
    assert found.t < -3 and found.better == pytest.approx(found.p / 2) and found.p < .01

def test_diebold_mariano_is_the_interval_of_the_mean_difference():
    "The level at which the interval touches 0 is 1 - p, whatever the samples of a day weigh"
    g = np.random.default_rng(0)
    day = np.sort(g.integers(0, 60, 700))
    a, b = g.normal(.1, 1, 700), g.normal(0, 1, 700)
    found = m.diebold_mariano(a, b, day, 1.)
    just = m.interval_mean(a - b, day, level=1 - found.p, overlap=1.)
    assert (just.lo if just.value > 0 else just.hi) == pytest.approx(0, abs=1e-12)
    assert np.sign(found.t) == np.sign(just.value)

def test_order_of_samples_means_nothing_to_diebold_mariano():
    g = np.random.default_rng(0)
    a, b = g.normal(size=(2, 600))
    day, order = np.arange(600) // 6, g.permutation(600)
    shuffled = m.diebold_mariano(a[order], b[order], day[order] * 3, 3.)
    assert shuffled == pytest.approx(m.diebold_mariano(a, b, day, 1.))

@pytest.mark.parametrize('n, overlap, given', [(19, 0, False), (20, 0, True), (39, 1, False), (40, 1, True)])
def test_too_few_days_are_not_compared(n, overlap, given):
    d = np.random.default_rng(0).normal(size=n)
    assert np.isfinite(m.diebold_mariano(d, 0 * d, overlap=overlap)).all() == given

# Holm: against another library's numbers, the procedure step by step, and a simulation

def test_holm_against_statsmodels():
    "multipletests(p, method='holm')[1] of statsmodels 0.15.0; holdout-backtest 0.1.0 gives the same"
    p = [.001, .011, .02, .02, .6, .04, .0095, .9]
    want = [.008, .0665, .1, .1, 1., .12, .0665, 1.]
    assert m.holm(p) == pytest.approx(want, abs=1e-12)

@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_holm_step_by_step(p):
    "A p-value is at most the largest of those before it, each times how many were left when it was looked at"
    got = m.holm(p)
    ranked = sorted(range(len(p)), key=lambda i: p[i])
    for k, i in enumerate(ranked):
        assert got[i] == pytest.approx(min(1, max((len(p) - j) * p[ranked[j]] for j in range(k + 1))))

@pytest.mark.parametrize('bad', [-.1, 1.1])
def test_what_is_no_probability_is_refused(bad):
    with pytest.raises(ValueError, match='1 of 3 values are no probabilities'): m.holm([.2, bad, .3])

def test_holm_finds_nothing_in_a_family_of_nothing():
    "And not only where all are equal: three true differences among twelve leave the error of the others where it was"
    g = np.random.default_rng(0)
    lead = np.r_[np.full(3, .4), np.zeros(9)]
    wrong, found = [], []
    for _ in range(2000):
        x = .6 * g.normal(size=(100, 1)) + .8 * g.normal(size=(100, 12)) + lead
        p = m.holm(stats.ttest_1samp(x, 0).pvalue)
        wrong.append((p[3:] <= .05).any())
        found.append((p[:3] <= .05).mean())
    assert np.mean(wrong) <= .06 and np.mean(found) > .7

# Interval score

def test_interval_score_is_a_sum_of_pinball_losses():
    "Gneiting and Raftery 2007, section 6.2"
    g = np.random.default_rng(0)
    y, a, b = g.normal(size=(3, 500))
    q = np.sort([a, b], 0).T
    for level in (.5, .8, .9):
        ends = (1 - level) / 2, (1 + level) / 2
        want = 2 / (1 - level) * m.pinball_loss(y, q, ends).sum(1)
        assert m.interval_score_loss(y, *q.T, level) == pytest.approx(want)

def test_interval_score_of_normal_quantiles():
    "Its expectation at the true quantiles, by numerical integration"
    z = stats.norm.ppf(.95)
    y = np.random.default_rng(0).normal(size=200_000)
    def at(v): return (2 * z + 20 * max(abs(v) - z, 0)) * stats.norm.pdf(v)
    want, _ = integrate.quad(at, -9, 9, points=[-z, z])
    assert m.interval_score(y, 0 * y - z, 0 * y + z, .9) == pytest.approx(want, rel=.005)
    assert want == pytest.approx(2 * stats.norm.pdf(z) / .05)

@pytest.mark.parametrize('level', [0, 1, 80])
def test_a_level_is_a_share(level):
    with pytest.raises(ValueError, match='level must lie between 0 and 1'): m.interval_score([0], [0], [1], level)

# Bias of volatility forecasts

@given(seeds, st.floats(-2, 2))
@settings(max_examples=20, deadline=None)
def test_one_constant_takes_the_bias_out(seed, shift):
    g = np.random.default_rng(seed)
    realised, pred = np.exp(g.normal(size=(2, 200)))
    got = m.unbiased(realised, pred * np.exp(shift))
    assert got == pytest.approx(m.unbiased(realised, pred))                      # whatever the level was
    least = m.qlike(realised, got)
    assert least <= min(m.qlike(realised, got * k) for k in (.9, .99, 1.01, 1.1))
    assert np.square(realised / got).mean() == pytest.approx(1)

# The surest

@given(seeds, st.sampled_from([.1, .37, .5, 1.]))
@settings(max_examples=30, deadline=None)
def test_the_surest_are_a_share_and_no_surer_one_is_left(seed, share):
    conf = np.random.default_rng(seed).normal(size=50).round(1)
    kept = m.surest(conf, share)
    assert kept.sum() == pytest.approx(np.ceil(round(50 * share, 9)))
    assert conf[kept < 1].max(initial=-9) <= conf[kept > 0].min()
    assert len(set(kept[(kept > 0) & (kept < 1)])) <= 1                              # ties share alike

# AUC with its interval

@given(seeds, st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_interval_of_an_auc_is_the_slow_one(seed, digits):
    g = np.random.default_rng(seed)
    day = g.integers(0, 45, 400)
    up = g.random(400) < .4
    score = (g.normal(size=400) + .5 * up).round(digits)
    slow = m.interval(m.auc, day, up, score, overlap=.5)
    assert m.interval_auc(up, score, day, overlap=.5) == pytest.approx(slow, abs=1e-9)

def test_interval_of_an_auc_is_that_of_delong():
    "DeLong, DeLong and Clarke-Pearson 1988: independent samples, each a day"
    g = np.random.default_rng(0)
    up = g.random(4000) < .5
    score = g.normal(size=4000) + .4 * up
    win = stats.norm.cdf(.4 / np.sqrt(2))
    above = np.searchsorted(np.sort(score[~up]), score[up]) / (~up).sum()             # placements
    below = 1 - np.searchsorted(np.sort(score[up]), score[~up]) / up.sum()
    error = np.sqrt(above.var(ddof=1) / up.sum() + below.var(ddof=1) / (~up).sum())
    found = m.interval_auc(up, score, np.arange(4000))
    assert half_width(found, 4000) == pytest.approx(error, rel=.1)                    # of few cosines, a rough one
    assert found.lo < win < found.hi

def test_a_class_that_lies_on_one_day_has_no_interval():
    day = np.repeat(np.arange(30), 4)
    up = day == 3
    found = m.interval_auc(up, np.arange(120.), day)
    assert np.isfinite(found.value) and np.isnan([found.lo, found.hi]).all()

# Track records

@pytest.mark.parametrize('a_year, skew, kurtosis, years', [(252, 0, 3, 2.73), (52, 0, 3, 2.83), (12, 0, 3, 3.24),
                                                           (12, -.72, 5.78, 4.99)])
def test_track_records_of_the_paper(a_year, skew, kurtosis, years):
    "Bailey and López de Prado 2012, section on the minimum track record length: 2 against 1 a year at 95 %"
    n = m.track_record_length(2 / a_year**.5, skew, kurtosis, 1 / a_year**.5)
    assert round(n / a_year, 2) == years

def test_track_record_against_other_libraries():
    "holdout-backtest 0.1.0, minimum_track_record_length; purgedcv 0.1.11 gives the next whole number of returns"
    n = m.track_record_length(.1, -.5, 6., .02, .99)
    assert n == pytest.approx(899.4590364055, abs=1e-9)
    assert np.ceil(n) == 900

@given(seeds, st.sampled_from([.6, .9, .95, .999]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_track_record_is_long_enough_where_its_psr_is(seed, level, dependent):
    g = np.random.default_rng(seed)
    r = g.normal(g.uniform(0, .004), .02, g.integers(40, 800))
    need = m.min_track_record(r, .3, 365, level, dependent)
    assert (need <= len(r)) == (m.psr(r, .3, 365, dependent) >= level)
    if not dependent and np.isfinite(need):
        assert m.psr(r, .3, 365) == pytest.approx(
            stats.norm.cdf(stats.norm.ppf(level) * np.sqrt((len(r) - 1) / (need - 1))))

def test_track_records_that_nothing_shortens():
    r = np.random.default_rng(0).normal(0, .01, 400)
    r -= r.mean()
    assert m.min_track_record(r - 1e-4) == m.min_track_record(r, 1.) == np.inf
    assert 1e9 < m.min_track_record(r + 1e-9, dependent=True) < np.inf           # and no endless search
    with pytest.raises(ValueError, match='level must lie between .5 and 1'): m.min_track_record(r + 1e-4, level=.5)

def test_a_trending_track_must_be_longer():
    x = np.random.default_rng(0).normal(.1, 1, 2001)
    trending = x[1:] + x[:-1]                                        # MA(1): twice the variance of a mean
    short, long = (m.min_track_record(trending, dependent=d) for d in (False, True))
    assert long > 1.4 * short

# Against other libraries, run beside ours once: their numbers

def test_psr_and_deflated_sharpe_against_holdout_backtest():
    """holdout-backtest 0.1.0, deflated.py, from ratio, length, skewness and kurtosis of these returns. purgedcv 0.1.11
    takes the unbiased skewness and kurtosis and is within .001"""
    r = .001 + .02 * np.sin(np.arange(300.) ** 2)
    assert m.psr(r, 0, 365) == pytest.approx(.8187716791915789, abs=1e-10)
    assert m.deflated_sharpe(r, 25, 1.2, 365) == pytest.approx(.10377649697231905, abs=1e-10)

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

def returns_of_days(seed=0):
    g = np.random.default_rng(seed)
    r = g.normal(.001, .01, 900)
    day = np.sort(g.integers(0, 80, 900))
    weights = (g.random(900) < .7).astype(float)
    return r, day, weights, g.permutation(900)

def test_all_paths_are_one():
    r, day, w, _ = returns_of_days()
    ratio = m.interval(lambda x: m.sharpe(x), day, r)
    assert m.interval_sharpe(r, day) == pytest.approx(ratio, abs=1e-9)
    mean = m.interval(lambda x, w: (x * w).sum() / w.sum(), day, r, w)
    assert m.interval_mean(r, day, w) == pytest.approx(mean, abs=1e-12)
    y = r + .01 * w
    assert m.interval_r2(y, r, day) == pytest.approx(m.interval(m.r2, day, y, r), abs=1e-9)

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

# Against closed forms: independent values give the textbook's error, dependent ones theirs

def half_width(found, n, level=.95):
    "In standard errors"
    lo, hi = found.lo - found.value, found.hi - found.value
    assert lo == pytest.approx(-hi)
    return hi / stats.t.ppf((1 + level) / 2, m.cosines(n))

def rms(f, tries=400): return np.sqrt(np.mean([f(np.random.default_rng(i)) ** 2 for i in range(tries)]))

def test_error_of_a_mean():
    one = lambda g: half_width(m.interval_mean(g.normal(size=365), np.arange(365)), 365)
    assert rms(one) == pytest.approx(1 / np.sqrt(365), rel=.03)

def test_error_of_a_ratio():
    "Derivative of a weighted mean: w (v - mean) / mean of w"
    def one(g):
        v, w = g.normal(size=(2, 365))
        return half_width(m.interval_mean(v, np.arange(365), np.exp(w / 2)), 365)
    weight = np.exp(np.random.default_rng(0).normal(size=10**6) / 2)
    assert rms(one) == pytest.approx(np.sqrt((weight**2).mean() / 365) / weight.mean(), rel=.03)

@pytest.mark.parametrize('name, draw', [
    ('normal', lambda g: g.normal(.15, 1, 365)),
    ('skewed', lambda g: .15 + 1 - g.gamma(2, 1, 365) / 2),
])
def test_error_of_a_sharpe_ratio_is_that_of_mertens(name, draw):
    one = lambda g: half_width(m.interval_sharpe(draw(g), np.arange(365), 1), 365)
    mertens = np.mean([m.sharpe_error(draw(np.random.default_rng(i)), 1) for i in range(400)])
    assert rms(one) == pytest.approx(mertens, rel=.04)
    assert rms(lambda g: m.sharpe_error(draw(g), 1, True)) == pytest.approx(mertens, rel=.04)

def test_error_under_dependence_is_that_of_lo():
    "Lo (2002): the long-run variance of an MA(1) with weights 1, 1 is twice its variance"
    def one(g):
        e = g.normal(size=366)
        return half_width(m.interval_sharpe(e[1:] + e[:-1], np.arange(365), 1), 365)
    assert rms(one) == pytest.approx(np.sqrt(2 / 365), rel=.04)

@pytest.mark.parametrize('n, overlap', [(20, 0), (182, 0), (182, 3.), (365, 9.)])
def test_long_run_variance_is_that_of_the_cosines(n, overlap):
    x = np.random.default_rng(0).normal(size=(3, n))
    t = np.arange(1, n + 1) - .5
    waves = [np.sqrt(2 / n) * x @ np.cos(np.pi * j * t / n) for j in range(1, m.cosines(n, overlap) + 1)]
    assert m.long_run_variance(x, overlap) == pytest.approx(np.square(waves).mean(0), rel=1e-12)

@pytest.mark.parametrize('n, overlap, given', [(19, 0, False), (20, 0, True), (39, 1, False), (40, 1, True),
                                               (182, 4, True), (365, 24, False), (960, 24, True)])
def test_fewer_than_twenty_blocks_have_no_interval(n, overlap, given):
    found = m.interval_mean(np.random.default_rng(0).normal(size=n), np.arange(n), overlap=overlap)
    assert np.isfinite(found.value) and np.isfinite([found.lo, found.hi]).all() == given
    assert (m.blocks(n, overlap) >= m.LEAST_BLOCKS) == given

def test_days_between_decisions_are_no_days():
    "Every fourth day, labels of 24 days: each reaches six samples ahead"
    x = np.random.default_rng(0).normal(size=365)
    sparse = m.interval_mean(x, 4 * np.arange(365), overlap=24)
    assert sparse == m.interval_mean(x, np.arange(365), overlap=6)
    assert sparse != m.interval_mean(x, np.arange(365))
    assert np.isnan(m.interval_mean(x[:200], 4 * np.arange(200), overlap=24).lo)             # 16 blocks

def test_gains_are_differences_of_scores():
    g = np.random.default_rng(0)
    y, a, b = g.normal(size=(3, 400))
    day = np.arange(400)
    assert m.interval_r2(y, a, day, over=b).value == pytest.approx(m.r2(y, a) - m.r2(y, b))
    assert m.interval_sharpe(a, day, 365, over=b).value == pytest.approx(m.sharpe(a, 365) - m.sharpe(b, 365))
    for f in (m.interval_sharpe, lambda a, day, over: m.interval_r2(y, a, day, over=over)):
        forth, back = f(a, day, over=b), f(b, day, over=a)
        assert (forth.value, forth.lo, forth.hi) == pytest.approx((-back.value, -back.hi, -back.lo))
        assert f(a, day, over=a) == (0, 0, 0)

def test_one_day_has_a_value_and_no_interval():
    assert m.interval_mean(np.ones(24), np.zeros(24)) == pytest.approx((1, np.nan, np.nan), nan_ok=True)

def test_overlapping_labels_are_covered():
    "Sums over 24 days: 40 blocks of 48 days, and few cosines"
    n = 1920
    g = np.random.default_rng(0)
    x = np.stack([np.convolve(g.normal(size=n + 23), np.ones(24), 'valid') for _ in range(1000)])
    found = m.with_bounds(x.mean(1), x, overlap=24)
    assert np.mean((found.lo > 0) | (found.hi < 0)) == pytest.approx(.05, abs=.02)

def test_trials_that_are_alike_count_for_less():
    r = np.random.default_rng(0).normal(.002, .02, 365)
    d = [m.deflated_sharpe(r, n, 1., 365, True) for n in (1, 1.2, 1.8, 2, 5)]
    assert d[0] == d[1] == m.psr(r, 0, 365, True)
    assert d[1] > d[2] > d[3] > d[4]
