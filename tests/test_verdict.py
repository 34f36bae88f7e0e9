"Rows, gains and the word: against a filter by hand, a mirror, and a ledger that was tampered with"
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from cryptoml.backtest import Costs, account_for, append_trial, backtest
from cryptoml.ledger import Tried, read_ledger, tell
from cryptoml.verdict import (Comparison, Verdict, book_rows, class_rows, comparisons, gain_table, joint_level,
                              number_rows, score_table, up_or_down, verdict)

DAY = np.arange(600) // 4

def probabilities(seed, C=3):
    p = np.random.default_rng(seed).random((600, C)) + .1
    return p / p.sum(1, keepdims=True)

def labels(seed, C=3): return np.random.default_rng(seed).integers(0, C, 600)

def daily(mean, seed=0, days=400): return np.random.default_rng(seed).normal(mean, .01, days)

def book(returns, costs=Costs(0, 0, 0), start='2020-01-01', make=account_for):
    "All in a coin that moves so from the third day on"
    path = np.cumprod(1 + returns)[None]
    time = pd.date_range(start, periods=len(returns), freq='D', tz='UTC')
    return make(np.ones_like(path), path, costs, time=time)

ONE = Tried(1, 1., [], 'a place', 'a head')

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
    rows = class_rows('direction', 4, labels(9), forecasts, DAY, .95, 0)
    assert [r['over'] for r in rows if r['over']] == list(names)
    assert {r['model'] for r in rows if r['over'] is None} == set(forecasts)
    assert set(score_table(rows).columns) == set(forecasts)
    assert gain_table(rows)['over'].tolist() == list(names)

def test_equal_forecasts_have_no_gain():
    p = probabilities(0)
    *_, gain = class_rows('direction', 4, labels(1), dict(network=p, twin=p), DAY, .95, 0)
    assert (gain['over'], gain['value'], gain['lo'], gain['hi']) == ('twin', 0, 0, 0)

def test_gains_change_sign_with_the_sides():
    y = np.random.default_rng(0).normal(size=600)
    good, bad = .5 * y, -.2 * y
    *_, forth = number_rows('volatility', 4, y, dict(network=good, other=bad), DAY, .95, 0)
    *_, back = number_rows('volatility', 4, y, dict(network=bad, other=good), DAY, .95, 0)
    assert forth['value'] == pytest.approx(-back['value']) and forth['value'] > 0
    assert (forth['lo'], forth['hi']) == pytest.approx((-back['hi'], -back['lo']))

def test_explained_variance_of_planted_forecasts():
    y = np.random.default_rng(0).normal(size=600)
    y -= y.mean()
    forecasts = dict(network=y, half=.5 * y, nothing=0 * y)
    rows = number_rows('volatility', 4, y, forecasts, DAY, .95, 0)
    assert [r['value'] for r in rows if r['over'] is None] == pytest.approx([1, .75, 0])

def test_labels_that_are_all_equal_explain_nothing():
    with pytest.raises(ValueError, match='volatility, horizon 4: the 600 labels are all equal'):
        number_rows('volatility', 4, np.ones(600), dict(network=np.ones(600)), DAY, .95, 0)

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
    rows = Comparison('direction', 4, 'class', y, forecasts, 1.).rows(DAY, .95)
    assert rows == class_rows('direction', 4, y[there], by_hand, DAY[there], .95, 1.)
    assert {r['n'] for r in rows} == {there.sum()}

def test_up_or_down_forgets_the_band():
    y = np.array([0, 1, 2, -1])
    p = np.array([[.2, .6, .2], [.1, .1, .8], [.3, .4, .3], [.6, .2, .2]])
    c = up_or_down(Comparison('direction', 4, 'class', y, dict(network=p), .5))
    assert c.overlap == .5
    assert c.y.tolist() == [0, -1, 1, -1]
    np.testing.assert_allclose(c.forecasts['network'], [[.5, .5], [1 / 9, 8 / 9], [.5, .5], [.75, .25]])

@pytest.mark.parametrize('timeframe, days', [('15m', .25), ('1h', 1.), ('4h', 4.), ('1D', 24.)])
def test_overlap_is_the_horizon_in_days(timeframe, days):
    q = np.zeros((600, 1, 3))
    labels = dict.fromkeys(('direction', 'relative_direction', 'regime'), np.full((600, 1), -1))
    labels |= dict(relative=np.full((600, 1), np.nan), volatility=np.random.default_rng(0).normal(size=(600, 1)))
    said = dict(network=dict(volatility=q), zero=dict(volatility=q))
    c, = comparisons((24,), labels, said, pd.Timedelta(timeframe))
    assert c.overlap == pytest.approx(days)
    rows = c.rows(DAY, .95)                                                     # 150 days
    assert {r['lo'] is None for r in rows} == {150 / max(1, 2 * days) < 20}

# ---- books

def test_a_book_that_never_trades_has_no_sharpe_ratio_and_no_crash():
    still = account_for(np.full((1, 400), np.nan), np.ones((1, 400)), time=book(daily(0)).time)
    rows = book_rows('size', 24, dict(network=still, hold=book(daily(.001))), .95)
    own, hold, even, _, gain = rows
    assert (own['metric'], own['value'], even['metric'], even['value']) == ('Sharpe', 0, 'break-even bp', None)
    assert gain['value'] == pytest.approx(-hold['value'])

def test_break_even_is_the_side_cost_at_which_nothing_is_left():
    rng = np.random.default_rng(0)
    path = np.cumprod(1 + rng.normal(.004, .01, 400))[None]
    target = np.where(np.arange(400) % 20 < 10, 1., 0)[None]
    def at(bp): return account_for(target, path, Costs(bp / 1e4, 0, 0))
    even = {r['metric']: r['value'] for r in book_rows('size', 24, dict(network=at(0)), .95)}['break-even bp']
    assert np.log(at(even).equity[-1]) == pytest.approx(0, abs=.05 * np.log(at(0).equity[-1]))

@pytest.mark.parametrize('other', [
    pytest.param(lambda: book(daily(0, days=399)), id='a day less'),
    pytest.param(lambda: book(daily(0), start='2020-01-02'), id='a day later'),
])
def test_books_of_other_days_are_refused(other):
    pair = dict(network=book(daily(0)), hold=other())
    with pytest.raises(ValueError, match='hold has .* days, network 400, and they are not the same'):
        book_rows('size', 24, pair, .95)
    with pytest.raises(ValueError, match='hold has .* days, the book 400, and they are not the same'):
        verdict('a book', pair['network'], dict(hold=pair['hold']), ONE)

# ---- the word

@pytest.mark.parametrize('own, baselines, expected', [
    pytest.param(daily(.004), [daily(0, 1)], 'PASS', id='earns'),
    pytest.param(daily(.004), [], 'PASS', id='earns, against cash alone'),
    pytest.param(-daily(.004), [daily(0, 1)], 'FAIL', id='loses'),
    pytest.param(-daily(.004), [-daily(.008, 1)], 'FAIL', id='loses, but less than its baseline'),
    pytest.param(daily(.004), [daily(.02, 1)], 'FAIL', id='earns, but less than its baseline'),
    pytest.param(daily(.004), [daily(0, 1), daily(.02, 2)], 'FAIL', id='less than one of its baselines'),
    pytest.param(daily(.004), [daily(0, 1), daily(.0035, 2)], 'INCONCLUSIVE', id='like one of its baselines'),
    pytest.param(daily(0), [-daily(.01, 1)], 'INCONCLUSIVE', id='better than its baseline, and no better than cash'),
    pytest.param(daily(0), [daily(0, 1)], 'INCONCLUSIVE', id='nothing'),
    pytest.param(np.zeros(400), [-daily(.004)], 'INCONCLUSIVE', id='never moves'),
])
def test_words(own, baselines, expected):
    v = verdict('a book', book(own), {f'baseline {i}': book(r) for i, r in enumerate(baselines)}, ONE)
    assert v.word == expected
    assert str(v).startswith(f'{expected}: a book. Net Sharpe ')
    assert list(v.gains) == ['cash', *(f'baseline {i}' for i in range(len(baselines)))]
    assert v.gains['cash'] == v.sharpe

@pytest.mark.parametrize('days, expected', [(179, 'INCONCLUSIVE'), (180, 'PASS')])
def test_half_a_year_at_least(days, expected):
    v = verdict('a book', book(daily(.006, days=days)), dict(hold=book(daily(0, 1, days))), ONE)
    assert (v.word, v.needed) == (expected, 180 if days < 180 else None)

def test_many_trials_make_a_gain_doubtful():
    own, hold = book(daily(.0017)), dict(hold=book(daily(0, 1)))
    alone = verdict('a book', own, hold, ONE)
    tried = verdict('a book', own, hold, ONE._replace(count=2000, effective=1000.))
    assert (alone.sharpe, alone.gains) == (tried.sharpe, tried.gains)
    assert tried.deflated < alone.deflated
    assert (alone.word, tried.word) == ('PASS', 'INCONCLUSIVE') and tried.needed > 400
    assert 'after 2000 trials (1000.0 in effect)' in str(tried)

def passes(value, days, tries=30):
    "Share of tests of so many days that pass, where this is the true annual Sharpe ratio"
    tests = (daily(value / np.sqrt(365) * .01, s, days) for s in range(tries))
    return np.mean([verdict('a book', book(r), {}, ONE).word == 'PASS' for r in tests])

def test_a_longer_test_decides():
    "The days that are said to be needed let about 80 % pass; a single interval may be narrow or wide by chance"
    undecided = [verdict('a book', book(daily(.001, seed)), {}, ONE) for seed in (2, 5, 6)]
    assert all(v.word == 'INCONCLUSIVE' and v.needed > 400 for v in undecided)
    assert .65 < np.mean([passes(v.sharpe[0], v.needed) for v in undecided]) < .95

@pytest.mark.parametrize('days', [1, 19])
def test_few_days_are_not_judged(days):
    with pytest.raises(ValueError, match=f'at least 20 days of returns, got {days}'):
        verdict('a book', book(daily(0, days=days)), dict(hold=book(daily(0, 1, days))), ONE)

def test_json_and_back():
    v = verdict('a book', book(daily(.004)), dict(hold=book(daily(0, 1))), ONE)
    again = Verdict(**json.loads(json.dumps(vars(v), allow_nan=False)))
    assert str(again) == str(v)
    still = account_for(np.full((1, 400), np.nan), np.ones((1, 400)), time=book(daily(0)).time)
    json.dumps(vars(verdict('still', still, {}, ONE)), allow_nan=False)

# ---- the ledger

def test_what_was_run_is_counted(ledger):
    noise = [book(daily(0, s), make=backtest) for s in range(7)]
    v = verdict('best', max(noise, key=lambda b: b.summary()['sharpe']), {})
    assert (v.trials, v.faults, v.place) == (7, [], str(ledger))
    assert 5 < v.effective <= 7
    assert v.head == read_ledger().head

def test_a_book_of_no_trial_is_written_down_once(ledger):
    own = book(daily(.004))
    assert [verdict('a book', own, {}).trials for _ in range(3)] == [1, 1, 1]
    line, = read_ledger().trials
    assert (line.kind, line.name, line.data) == ('verdict', 'a book', own.data)

def test_baselines_are_no_trials(ledger):
    assert verdict('a book', book(daily(.004)), dict(hold=book(daily(0, 1)))).trials == 1

def test_trials_told_from_elsewhere_count(ledger):
    own = book(daily(.004))
    tell(1000, 'a notebook of last year')
    v = verdict('a book', own, {})
    assert v.trials == 1001 and v.effective == pytest.approx(1001)

def test_the_question_of_a_trial_is_that_of_its_verdict(ledger):
    own = book(daily(.004))
    append_trial(book(daily(0, 1)), 'one', 'other data', question='another')
    append_trial(own, 'two', own.data, question='mine')
    append_trial(book(daily(0, 2)), 'three', own.data, question='mine')
    assert verdict('a book', own, {}).trials == 2

def cut(path): path.write_bytes(path.read_bytes().splitlines(True)[0])
def edit(path): path.write_bytes(path.read_bytes().replace(b'backtest', b'nonsense', 1))
def remove(path): path.unlink()

@pytest.mark.parametrize('harm', [cut, edit, remove])
def test_a_ledger_that_was_tampered_with_cannot_pass(ledger, harm):
    own = book(daily(.006), make=backtest)
    for s in range(3): book(daily(0, s), make=backtest)
    assert verdict('a book', own, {}).word == 'PASS'
    harm(ledger)
    v = verdict('a book', own, {})
    assert v.word == 'INCONCLUSIVE' and v.faults and v.faults[0] in str(v)

# ---- as in the notebook, with other seeds

def test_the_best_of_noise_does_not_pass(ledger):
    best = [max((daily(0, 100 * k + i, 200) for i in range(50)), key=lambda r: r.mean() / r.std()) for k in range(40)]
    many = ONE._replace(count=50, effective=50.)
    words = [[verdict('best', book(r), {}, tried).word for r in best] for tried in (ONE, many)]
    undeclared, declared = (np.mean(np.array(w) == 'PASS') for w in words)
    assert declared <= .05 < undeclared
