"A forecaster beside its baselines, at one cost; trials; what signals must know of it (suites 7, 11)"
import json, pickle, sys
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from examples import TERMS, untrained
from cryptoml.data import to_panel
from cryptoml.backtest import Costs, account_for
from cryptoml.books import trade
from cryptoml.combined import save_combined, weigh
from cryptoml.evidence import Rival, evaluate, promises_of
from cryptoml.ledger import Tried
from cryptoml.policy import Policy
from cryptoml.simulate import simulate
from cryptoml.state import StateError
from cryptoml.study import Study, funding_at_opens
from cryptoml.targets import REGIMES
from cryptoml.terms import Terms, heads_of, possible
from cryptoml.training import judge
from cryptoml.verdict import OWN, gain_table

SAVED = asdict(TERMS)

# ---- terms

PROMISES = dict(rows=[dict(target='return', metric='coverage 90%', horizon=4, value=.88, n=900)],
                days=dict(day=[19000, 19001], ret=[.01, -.02], held=[True, False]))

def test_terms_promise_what_they_say():
    terms = Terms.read(dict(terms=SAVED | dict(promises=PROMISES)))
    assert terms.promised_rows == PROMISES['rows'] and terms.judged_days.index.tolist() == [19000, 19001]
    assert terms.judged_days.to_dict('list') == dict(ret=[.01, -.02], held=[True, False])
    old = Terms.read(dict(terms={k: v for k, v in SAVED.items() if k != 'promises'}))
    assert old.promised_rows is None and old.judged_days is None

@pytest.mark.parametrize('terms', [
    pytest.param(json.loads(json.dumps(SAVED)), id='through JSON'),
    pytest.param(SAVED | dict(of_a_later_version=1), id='of a later version'),
])
def test_terms_are_read_as_they_were_written(terms):
    assert Terms.read(dict(terms=terms)) == TERMS

def test_terms_are_pickled():
    assert pickle.loads(pickle.dumps(TERMS)) == TERMS

@pytest.mark.parametrize('key', ['symbols', 'timeframe', 'trained_until', 'data_until', 'round_trip', 'threshold',
                                 'reach', 'importance', 'verdict', 'trials'])
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
    dict(reach=dict(down=1.)),
    dict(reach=dict(down=-1., up=1.)),
    dict(reach=dict(down=1., up='far')),
    dict(trials=dict(count=3)),
    dict(importance=dict(rsi_14='much')),
    dict(verdict='MAYBE'),
    dict(sources='extra'),
    dict(absent=dict(SHIB='volume')),
    dict(data=[]),
    dict(promises=dict(rows=[])),
    dict(promises=PROMISES | dict(days=dict(day=[1], ret=[.1], held=[1]))),
    dict(promises=PROMISES | dict(days=dict(day=[1, 2], ret=[.1], held=[True]))),
    dict(promises=PROMISES | dict(days=dict(day=[1], ret=['much'], held=[True]))),
    dict(promises=PROMISES | dict(rows=[dict(target='return', metric='ECE', horizon=4, value='none')])),
    dict(policy=asdict(Policy(max_weight=2.))),
    dict(policy=asdict(Policy(target_annual=3.))),
], ids=str)
def test_terms_that_cannot_be(bad):
    with pytest.raises(StateError, match='cannot be'): Terms.read(dict(terms=SAVED | bad))

# ---- one report: a forecaster, its baselines and another network

@pytest.fixture(scope='module')
def judged():
    "A small market, a forecast with an untrained network in it, and another such network"
    study = Study.of(to_panel(simulate(n_symbols=3, n_bars=4200, seed=5).bars), (4, 12))
    f, g = (untrained(study, seed) for seed in (0, 1))
    return study, weigh([f], study.inputs, study.targets, study.parts)[0], Rival(g, g)

def test_each_baseline_and_each_other_network_is_a_row(judged):
    study, f, g = judged
    test = evaluate(f, f, study, dict(LSTM=g))
    rows = test.rows()
    who = {r['target']: set() for r in rows}
    for r in rows:
        if r['horizon'] == (24 if r['target'] == 'correlation' else 12): who[r['target']].add(r['model'])
    nets, trees = {'ensemble', 'network', 'LSTM'}, {'majority', 'momentum', 'logistic', 'boosting'}
    assert who == dict(
        direction=nets | trees | {'persistence'},
        up_or_down=nets | trees | {'persistence'},
        relative_direction=nets | trees | {'low volatility'},
        regime=nets | {'majority', 'persistence', 'logistic'},
        volatility=nets | {'persistence', 'HAR', 'ridge', 'boosting', 'boosted residual'},
        relative=nets | {'majority', 'momentum', 'low volatility', 'ridge', 'boosting'},
        book={'ensemble', 'LSTM', 'hold', 'momentum', 'low volatility', 'ensemble with stops'},
        reach={'ensemble'},
        correlation={'ensemble', 'past window'},
        **{'return': {'ensemble', 'rolling quantiles'}},
    )
    gains = sum(len(c.forecasts) - 1 for c in test.comparisons if c.kind != 'interval')      # and one of correlations
    assert len(gain_table(rows)) == gains + 1 + len(test.books) - 1
    assert not test.absent

def test_promises_are_the_figures_of_the_report_and_the_days_of_the_book(judged):
    "And those of a regime are what its samples alone give, counted by hand"
    study, f, _ = judged
    test = evaluate(f, f, study)
    promised = json.loads(json.dumps(promises_of(test), allow_nan=False))
    def key(r): return r['target'], r['horizon'], r['metric']
    said = {key(r): r['value'] for r in test.rows() if r['model'] == OWN and r['over'] is None}
    mine = {key(r): r['value'] for r in promised['rows'] if 'by' not in r}
    assert mine == pytest.approx({k: said[k] for k in mine})
    assert {('direction', 4, 'ECE'), ('direction', 12, 'log-loss'), ('volatility', 4, 'QLIKE')} <= set(mine)
    assert {('return', h, f'coverage {share:.0%}') for h in (4, 12) for share in f.bands.levels} <= set(mine)
    day, ret = test.books[OWN].daily()
    assert promised['days']['day'] == day.tolist() and promised['days']['ret'] == ret.tolist()
    assert len(ret) > 30 and any(promised['days']['held'])
    by_hand = 0
    for r in promised['rows']:
        if r.get('by') != 'regime' or r['metric'] != 'coverage 90%' or r['target'] != 'return': continue
        j, where = test.horizons.index(r['horizon']), test.regime == REGIMES.index(r['part'])
        y, ends = test.labels['return'][where, j], test.said[OWN]['return'][where, j]
        k = f.bands.levels.index(.9)
        there = np.isfinite(y) & np.isfinite(ends).all((1, 2))
        inside = (y >= ends[:, k, 0]) & (y <= ends[:, k, 1])
        assert (r['value'], r['n']) == (pytest.approx(inside[there].mean()), there.sum())
        by_hand += 1
    assert by_hand >= 2

def test_another_network_changes_no_figure_of_the_others(judged):
    study, f, g = judged
    test, alone = evaluate(f, f, study, dict(LSTM=g)), evaluate(f, f, study)
    def scores(test):
        key = ('target', 'horizon', 'model', 'metric', 'over')
        return {tuple(r[k] for k in key): r['value'] for r in test.rows()}
    assert {k: v for k, v in scores(test).items() if 'LSTM' not in k} == scores(alone)
    assert alone.gate == test.gate

def test_a_report_without_lightgbm_says_so_once(judged, monkeypatch):
    study, f, _ = judged
    monkeypatch.setitem(sys.modules, 'lightgbm', None)
    lame, _, absent = weigh([f.first], study.inputs, study.targets, study.parts)
    test = evaluate(lame, lame, study, absent=absent)
    sentence, = test.absent
    assert 'lightgbm cannot be loaded' in sentence
    assert not any('boosting' in c.forecasts for c in test.comparisons)

def earning(returns):
    "A book of one coin that is held and moves so, without costs"
    path = np.cumprod(1 + returns)[None]
    time = pd.date_range('2020-01-01', periods=len(returns), freq='D', tz='UTC')
    return account_for(np.ones_like(path), path, Costs(0, 0, 0), time=time)

def test_what_was_not_compared_with_trees_cannot_pass(judged):
    "A book that passes, but for the missing row"
    study, f, _ = judged
    noise = np.random.default_rng(0).normal(0, .01, (2, 1000))
    test = replace(evaluate(f, f, study), books=dict(ensemble=earning(noise[0] + .003), hold=earning(noise[1])))
    def word(absent): return replace(test, absent=absent).verdict(Tried(1, 1., [], 'a file', ''))
    sentence = 'no boosted trees: lightgbm cannot be loaded'
    whole, without = word([]), word([sentence])
    assert (whole.word, without.word) == ('PASS', 'INCONCLUSIVE')
    assert (whole.faults, without.faults) == ([], [sentence])
    assert sentence in str(without)

def test_a_training_says_first_that_there_will_be_no_trees(judged, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, 'lightgbm', None)
    Study.of(judged[0].panel, (4, 12))
    said, = caplog.messages
    assert said.startswith('no boosted trees: lightgbm cannot be loaded') and said.endswith('nothing can PASS')

@pytest.mark.parametrize('name', ['ensemble', 'network', 'HAR', 'hold'])
def test_a_taken_name_is_refused(judged, name):
    study, f, g = judged
    with pytest.raises(ValueError, match=f'cannot be called {name}'): evaluate(f, f, study, {name: g})

# ---- one cost, from the name to the book

def bars_of_coin(symbol, n=100):
    time = pd.date_range('2024-01-01', periods=n, freq='h', tz='UTC')
    return pd.DataFrame(dict(time=time, symbol=symbol, open=10., high=10., low=10., close=10., volume=1.))

def rates(symbol, every, rate, n=100):
    time = pd.date_range('2024-01-01', periods=n, freq='h', tz='UTC')[::every]
    return pd.DataFrame(dict(time=time, known=time, symbol=symbol, funding_rate=rate))

@pytest.mark.parametrize('every', [1, 4, 8, 24])
def test_a_day_of_funding_costs_the_same_however_often_it_is_written(every):
    panel = to_panel(pd.concat([bars_of_coin('BTC/USDT'), bars_of_coin('ETH/USDT')]))
    paid = funding_at_opens(panel, rates('BTCUSDT', every, 1e-4))
    btc, eth = paid
    assert btc[25:73].sum() == pytest.approx(6e-4)                  # two days, three times eight hours each
    assert np.isnan(eth).all()

def test_funding_of_two_perpetuals_is_their_mean_and_late_stamps_belong_to_their_hour():
    panel = to_panel(bars_of_coin('BTC/USDT'))
    late = rates('BTC/USDT:USDT', 8, 3e-4)
    late['time'] += pd.Timedelta('7ms')
    late['known'] += pd.Timedelta('7ms')
    both = pd.concat([rates('BTCUSDC', 8, 1e-4), late])
    paid = funding_at_opens(panel, both)[0]
    assert paid[[8, 16, 24]] == pytest.approx([2e-4] * 3)
    assert paid[[7, 9, 10]] == pytest.approx([0] * 3)

def test_a_hole_in_the_rates_is_charged_for_a_day_at_most():
    panel = to_panel(bars_of_coin('BTC/USDT'))
    rows = rates('BTC/USDT', 8, 1e-4)
    paid = funding_at_opens(panel, rows.iloc[[0, 1, 11, 12]])[0]               # hours 0, 8, 88, 96
    assert paid[88] == pytest.approx(3e-4)

def test_books_pay_the_round_trip_that_was_named(judged):
    study, f, _ = judged
    dear = replace(study, costs=Costs.of(.02))
    plan = evaluate(f, f, study).plans['hold']
    book = trade(dear, plan, 'test')
    assert book.costs.sum() / book.turnover.sum() == pytest.approx(.01)
    assert trade(dear, plan, 'test', dear.costs.scaled(2)).costs.sum() > 1.9 * book.costs.sum()

# ---- every network on the test is a trial

@pytest.fixture
def ledger(tmp_path, monkeypatch):
    monkeypatch.setenv('CRYPTOML_LEDGER', str(tmp_path/'ledger.jsonl'))
    return tmp_path/'ledger.jsonl'

def test_trials_are_counted_once_each(judged, ledger):
    study, f, g = judged
    assert judge(f, f, study).verdict.trials == 1
    assert judge(f, f, study, dict(LSTM=g)).verdict.trials == 2
    again = judge(f, f, study, dict(LSTM=g))
    assert (again.verdict.trials, again.terms.trials['count']) == (2, 2)
    assert again.terms.trials['place'] == str(ledger)
    other = replace(f, networks=[replace(f.first, config=replace(f.config, epochs=7))])     # another recipe
    assert judge(other, other, study).verdict.trials == 3

def test_a_second_name_for_the_same_data_is_refused_before_the_training(ledger):
    panel = to_panel(simulate(n_symbols=2, n_bars=4200, seed=5).bars)
    study = Study.of(panel, (4, 12), digest='these', question='first')
    f = weigh([untrained(study)], study.inputs, study.targets, study.parts)[0]
    assert judge(f, f, study, most=8).verdict.trials == 1
    with pytest.raises(ValueError, match="'second' is asked of data that question 'first' had first"):
        Study.of(panel, (4, 12), digest='these', question='second')
    assert Study.of(panel, (4, 12), digest='others', question='second').question == 'second'

def test_a_head_that_is_gone_is_seen(judged, ledger, tmp_path):
    study, f, _ = judged
    first = judge(f, f, study)
    save_combined(f, tmp_path/'state', terms=asdict(first.terms))
    assert heads_of(tmp_path/'state') == [first.terms.trials['head']]
    assert heads_of(tmp_path/'nowhere') == []
    for p in ledger.parent.glob('ledger.jsonl*'): p.unlink()
    lost = judge(f, f, study, heads=heads_of(tmp_path/'state')).verdict
    assert lost.faults and lost.word != 'PASS'
