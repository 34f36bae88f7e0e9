"A forecaster beside its baselines; what signals must know of it: confidence, threshold, terms (suites 7, 11)"
import json, math, pickle, sys
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from examples import TERMS
from cryptoml.data import to_panel
from cryptoml.forecaster import ForecasterConfig, begin
from cryptoml.policy import Policy
from cryptoml.simulate import simulate
from cryptoml.state import StateError
from cryptoml.study import Study, Terms, confidence, evaluate, possible, threshold
from cryptoml.verdict import gain_table

SAVED = asdict(TERMS)

# ---- confidence and its threshold

@given(st.lists(st.floats(.001, 1), min_size=3, max_size=3), st.floats(-1, 1))
def test_confidence_is_a_probability(direction, size):
    direction = np.array(direction) / sum(direction)
    c = float(confidence(direction, np.float64(size)))
    mirrored = confidence(direction[::-1], np.float64(size))
    assert 0 <= c <= 1
    assert c == pytest.approx(1 - mirrored, abs=1e-9)

@pytest.fixture
def year():
    "Four samples a day of which 60 % paid: how sure, what they left, their day"
    rng = np.random.default_rng(0)
    day = np.arange(300).repeat(4)
    sure = rng.uniform(.5, .6, 1200)
    net = np.where(rng.random(1200) < .6, .01, -.01)
    return sure, net, day

def test_threshold_of_what_pays_lets_everything_through(year):
    sure, net, day = year
    assert threshold(sure, net, day) == pytest.approx(sure.min())

def test_what_is_not_known_yet_does_not_count(year):
    sure, net, day = year
    open_yet = threshold(np.append(sure, .99), np.append(net, math.nan), np.append(day, 300))
    assert open_yet == threshold(sure, net, day)

@pytest.mark.parametrize('case', [
    pytest.param(lambda sure, day: (sure, np.full(1200, math.nan), day), id='nothing is known'),
    pytest.param(lambda sure, day: (sure[:0], sure[:0], day[:0]), id='no sample'),
    pytest.param(lambda sure, day: (sure, np.full(1200, .01), np.zeros(1200, int)), id='one day alone'),
])
def test_threshold_needs_enough(year, case):
    sure, _, day = year
    assert threshold(*case(sure, day)) is None

# ---- terms

@pytest.mark.parametrize('terms', [
    pytest.param(json.loads(json.dumps(SAVED)), id='through JSON'),
    pytest.param(SAVED | dict(of_a_later_version=1), id='of a later version'),
])
def test_terms_are_read_as_they_were_written(terms):
    assert Terms.read(dict(terms=terms)) == TERMS

def test_terms_are_pickled():
    assert pickle.loads(pickle.dumps(TERMS)) == TERMS

@pytest.mark.parametrize('key', ['symbols', 'timeframe', 'trained_until', 'data_until', 'round_trip', 'threshold',
                                 'importance', 'verdict'])
def test_terms_that_miss_something(key):
    terms = {k: v for k, v in SAVED.items() if k != key}
    with pytest.raises(StateError, match='train it again'): Terms.read(dict(terms=terms))

def test_every_field_of_the_terms_has_a_rule():
    assert possible(TERMS).keys() == SAVED.keys()
    assert all(possible(TERMS).values())

@pytest.mark.parametrize('bad', [
    dict(symbols=[]),
    dict(symbols=['BTCUSDT']),
    dict(trained_until='2024-03-01', data_until='2024-06-01'),
    dict(trained_until='2024-07-01T00:00:00+00:00'),
    dict(round_trip=1.),
    dict(threshold=1.01),
    dict(importance=dict(rsi_14='much')),
    dict(verdict='MAYBE'),
    dict(sources='extra'),
    dict(absent=dict(SHIB='volume')),
    dict(data=[]),
    dict(policy=asdict(Policy(max_weight=2.))),
    dict(policy=asdict(Policy(target_annual=3.))),
], ids=str)
def test_terms_that_cannot_be(bad):
    with pytest.raises(StateError, match='cannot be'): Terms.read(dict(terms=SAVED | bad))

# ---- one report: a forecaster, its baselines and another network

@pytest.fixture(scope='module')
def judged():
    "A small market, and two untrained forecasters"
    study = Study.of(to_panel(simulate(n_symbols=3, n_bars=2600, seed=5).bars), (4, 12))
    rows = np.broadcast_to(study.parts['train'], study.panel.mask.shape)
    c = ForecasterConfig(horizons=(4, 12))
    return study, *(begin(study.inputs, rows, replace(c, seed=s)) for s in (0, 1))

def test_each_baseline_and_each_other_network_is_a_row(judged):
    study, f, g = judged
    test = evaluate(f, study, dict(LSTM=g))
    rows = test.rows()
    who = {r['target']: set() for r in rows}
    for r in rows:
        if r['horizon'] == 12: who[r['target']].add(r['model'])
    both, trees = {'network', 'LSTM'}, {'majority', 'momentum', 'logistic', 'boosting'}
    assert who == dict(
        direction=both | trees | {'persistence'},
        up_or_down=both | trees | {'persistence'},
        relative_direction=both | trees,
        regime=both | {'majority', 'persistence', 'logistic'},
        volatility=both | {'persistence', 'HAR', 'boosting'},
        relative=both | {'zero', 'momentum', 'boosting'},
        size=both | {'hold', 'momentum', 'low volatility'},
    )
    assert len(gain_table(rows)) == sum(len(c.forecasts) - 1 for c in test.comparisons) + len(test.books) - 1
    assert not test.absent

def test_another_network_changes_no_figure_of_the_others(judged):
    study, f, g = judged
    test, alone = evaluate(f, study, dict(LSTM=g)), evaluate(f, study)
    def scores(test):
        key = ('target', 'horizon', 'model', 'metric', 'over')
        return {tuple(r[k] for k in key): r['value'] for r in test.rows()}
    assert {k: v for k, v in scores(test).items() if 'LSTM' not in k} == scores(alone)
    assert alone.verdict() == test.verdict()

def test_a_report_without_lightgbm_says_so_once(judged, monkeypatch):
    study, f, _ = judged
    monkeypatch.setitem(sys.modules, 'lightgbm', None)
    test = evaluate(f, study)
    sentence, = test.absent
    assert 'cryptoml[boosting]' in sentence
    assert not any('boosting' in c.forecasts for c in test.comparisons)

@pytest.mark.parametrize('name', ['network', 'HAR', 'hold'])
def test_a_taken_name_is_refused(judged, name):
    study, f, g = judged
    with pytest.raises(ValueError, match=f'cannot be called {name}'): evaluate(f, study, {name: g})
