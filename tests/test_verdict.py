"Rows, gains and the word: against a filter by hand, a mirror, and names that look like something else"
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from cryptoml.verdict import (Comparison, book_rows, class_rows, gain_table, joint_level, number_rows, score_table,
                              up_or_down, verdict)

DAY = np.arange(600) // 4

def probabilities(seed, C=3):
    p = np.random.default_rng(seed).random((600, C)) + .1
    return p / p.sum(1, keepdims=True)

def labels(seed, C=3): return np.random.default_rng(seed).integers(0, C, 600)

def daily(mean, seed=0, days=400): return np.random.default_rng(seed).normal(mean, .01, days)

# ---- levels

@pytest.mark.parametrize('n, expected', [(1, .95), (2, .975), (50, .999)])
def test_joint_level(n, expected): assert joint_level(n) == pytest.approx(expected)

@pytest.mark.parametrize('n', [0, -1])
def test_no_comparison_has_no_level(n):
    with pytest.raises(ValueError, match='at least 1'): joint_level(n)

# ---- rows

def test_scores_and_gains_are_told_apart_by_a_field():
    "Whatever the models are called"
    names = 'plain', 'better gain over worse', 'network gain over plain'
    forecasts = dict(network=probabilities(0)) | {k: probabilities(i) for i, k in enumerate(names, 1)}
    rows = class_rows('direction', 4, labels(9), forecasts, DAY, .95)
    assert [r['over'] for r in rows if r['over']] == list(names)
    assert {r['model'] for r in rows if r['over'] is None} == set(forecasts)
    assert set(score_table(rows).columns) == set(forecasts)
    assert gain_table(rows)['over'].tolist() == list(names)

def test_equal_forecasts_have_no_gain():
    p = probabilities(0)
    *_, gain = class_rows('direction', 4, labels(1), dict(network=p, twin=p), DAY, .95)
    assert (gain['over'], gain['value'], gain['lo'], gain['hi']) == ('twin', 0, 0, 0)

def test_gains_change_sign_with_the_sides():
    y = np.random.default_rng(0).normal(size=600)
    good, bad = .5 * y, -.2 * y
    *_, forth = number_rows('volatility', 4, y, dict(network=good, other=bad), DAY, .95)
    *_, back = number_rows('volatility', 4, y, dict(network=bad, other=good), DAY, .95)
    assert forth['value'] == pytest.approx(-back['value']) and forth['value'] > 0
    assert (forth['lo'], forth['hi']) == pytest.approx((-back['hi'], -back['lo']), rel=.1)   # other resamples

def test_explained_variance_of_planted_forecasts():
    y = np.random.default_rng(0).normal(size=600)
    y -= y.mean()
    forecasts = dict(network=y, half=.5 * y, nothing=0 * y)
    rows = number_rows('volatility', 4, y, forecasts, DAY, .95)
    assert [r['value'] for r in rows if r['over'] is None] == pytest.approx([1, .75, 0])

def test_labels_that_are_all_equal_explain_nothing():
    with pytest.raises(ValueError, match='volatility, horizon 4: the 600 labels are all equal'):
        number_rows('volatility', 4, np.ones(600), dict(network=np.ones(600)), DAY, .95)

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999))
def test_what_is_missing_is_left_out_for_all(seed):
    rng = np.random.default_rng(seed)
    y = labels(seed)
    y[rng.random(600) < .1] = -1
    forecasts = dict(network=probabilities(1), quiet=probabilities(2))
    forecasts['quiet'][rng.random(600) < .1, 1] = np.nan
    there = (y >= 0) & np.isfinite(forecasts['quiet']).all(1)
    by_hand = {k: p[there] for k, p in forecasts.items()}
    rows = Comparison('direction', 4, 'class', y, forecasts).rows(DAY, .95)
    assert rows == class_rows('direction', 4, y[there], by_hand, DAY[there], .95)
    assert {r['n'] for r in rows} == {there.sum()}

def test_up_or_down_forgets_the_band():
    y = np.array([0, 1, 2, -1])
    p = np.array([[.2, .6, .2], [.1, .1, .8], [.3, .4, .3], [.6, .2, .2]])
    c = up_or_down(Comparison('direction', 4, 'class', y, dict(network=p)))
    assert c.y.tolist() == [0, -1, 1, -1]
    np.testing.assert_allclose(c.forecasts['network'], [[.5, .5], [1 / 9, 8 / 9], [.5, .5], [.75, .25]])

def test_a_book_that_never_trades_has_no_sharpe_ratio_and_no_crash():
    own, hold, gain = book_rows('size', 24, dict(network=np.zeros(400), hold=daily(.001)), .95)
    assert own['value'] == 0
    assert gain['value'] == pytest.approx(-hold['value'])

# ---- the word

@pytest.mark.parametrize('own, baseline, expected', [
    pytest.param(daily(.004), daily(0, 1), 'PASS', id='earns'),
    pytest.param(-daily(.004), daily(0, 1), 'FAIL', id='loses'),
    pytest.param(daily(.004), daily(.02, 1), 'FAIL', id='earns, but less than its baseline'),
    pytest.param(daily(0), daily(0, 1), 'INCONCLUSIVE', id='nothing'),
    pytest.param(np.zeros(400), -daily(.004), 'INCONCLUSIVE', id='never trades'),
])
def test_words(own, baseline, expected):
    v = verdict('a book', own, 'hold', baseline)
    assert v.word == expected
    assert str(v).startswith(f'{expected}: a book. Net Sharpe ')

def test_many_trials_make_a_gain_doubtful():
    own, baseline = daily(.0015), daily(0, 1)
    alone = verdict('a book', own, 'hold', baseline)
    tried = verdict('a book', own, 'hold', baseline, trials=1000)
    assert (alone.sharpe, alone.gain) == (tried.sharpe, tried.gain)
    assert tried.deflated < alone.deflated

@pytest.mark.parametrize('days', [0, 1, 19])
def test_few_days_are_not_judged(days):
    with pytest.raises(ValueError, match=f'at least 20 days of returns, got {days}'):
        verdict('a book', daily(0, days=days), 'hold', daily(0, 1, days))
