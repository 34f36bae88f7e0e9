"""A search for the settings of a forecaster: what it may see, and what it applies"""
import pickle, threading
from dataclasses import asdict, replace

import numpy as np
import pytest

from cryptoml.combined import load_combined
from cryptoml.data import DataError, to_panel
from cryptoml.forecaster import ForecasterConfig, begin, load_forecaster, network_of, save_forecaster
from cryptoml.parameters import JobError
from cryptoml.runs import run
from cryptoml.ledger import read_ledger
from cryptoml.network import NetworkConfig
from cryptoml.nested import as_it_is, network_space, tune_objective, tuned
from cryptoml.simulate import simulate
from cryptoml.state import read_json
from cryptoml.study import Study
from cryptoml.training import recipe_of
from cryptoml.tune import HyperparameterOptimizer, Interrupted

pytestmark = pytest.mark.usefixtures('one_thread', 'ledger')   # its trials count for whatever days: they are its own
HORIZONS = (4, 12)
CONFIG = ForecasterConfig(HORIZONS, epochs=1, every=24)
NETWORK = network_space(CONFIG)
SMALL = dict(as_it_is(CONFIG), hidden=8, heads=2)

def study_of(bars): return Study.of(to_panel(bars), HORIZONS, book='timing')

@pytest.fixture(scope='module')
def bars(): return simulate(n_symbols=2, n_bars=24 * 220, seed=3).bars

@pytest.fixture(scope='module')
def study(bars): return study_of(bars)

@pytest.fixture(scope='module')
def values(study):
    "What the objective reports and returns on settings"
    told = []
    value = tune_objective(study, CONFIG, device='cpu')(SMALL, lambda step, value: told.append((step, value)))
    return told, value

def test_the_mean_over_folds_is_reported(values):
    told, value = values
    assert [step for step, _ in told] == [0, 1] and told[-1][1] == value
    assert all(np.isfinite(v) for _, v in told) and told[0][1] != value

def test_nothing_behind_the_training_part_is_read(bars, study, values):
    "Other prices, volumes and holes from the first bar on that is not of it: the same numbers to the bit"
    last = study.panel.time[study.bars('train').stop - 1]
    rng = np.random.default_rng(0)
    later = bars['time'] > last
    factor = np.exp(np.cumsum(.05 * rng.normal(size=later.sum())))
    other = bars.copy()
    for column in ('open', 'high', 'low', 'close'): other.loc[later, column] *= factor
    other.loc[later, 'volume'] *= rng.uniform(.1, 10, later.sum())
    other = other.drop(other.index[later][5:400:7])
    theirs = study_of(other)
    assert theirs.bars('train') == study.bars('train')
    assert not np.array_equal(theirs.inputs.x, study.inputs.x, equal_nan=True)
    told = []
    value = tune_objective(theirs, CONFIG, device='cpu')(SMALL, lambda step, value: told.append((step, value)))
    assert (told, value) == values

def test_an_earlier_bar_is_read(bars, study, values):
    "The test above could have failed: what lies inside the training part matters"
    inside = study.panel.time[study.bars('train').stop - 200]
    other = bars.copy()
    other.loc[bars['time'] > inside, ['open', 'high', 'low', 'close']] *= 1.5
    value = tune_objective(study_of(other), CONFIG, device='cpu')(SMALL, lambda step, value: None)
    assert value != values[1]

def test_folds_are_purged(study):
    objective = tune_objective(study, CONFIG, folds=3)
    close = objective.inputs.panel.time + objective.inputs.panel.timeframe
    known = objective.targets.known
    for parts in objective.folds:
        for before, behind in (('train', 'valid'), ('valid', 'test')):
            assert known[parts[before]].max() <= close[parts[behind]].min()
    tests = np.sum([parts['test'] for parts in objective.folds], 0)
    assert tests.max() == 1 and len(objective.folds) == 3

def test_a_training_part_that_is_too_short(study):
    with pytest.raises(DataError, match='the training part cannot be walked forward: history too short'):
        tune_objective(study, CONFIG, folds=6)

def test_it_travels(study, values):
    "To another process, in which another worker runs trials"
    objective = pickle.loads(pickle.dumps(tune_objective(study, CONFIG, device='cpu')))
    assert objective(SMALL, lambda step, value: None) == values[1]

def test_a_search(study, tmp_path, ledger):
    "Two trials: the settings as they are, and others; each setting reaches the network"
    seen = []
    objective = tune_objective(study, CONFIG, folds=1, device='cpu')
    def watched(settings, report):
        seen.append(network_of(replace(CONFIG, **settings), ['a'], dict(technical=[0])))
        return objective(settings, report)
    search = HyperparameterOptimizer(tmp_path, NETWORK, trials=2, first=[as_it_is(CONFIG)], question=study.question)
    best = search.optimize(watched)
    t = search.table()
    assert set(t.state) <= {'complete', 'pruned'} and [c.d_model for c in seen] == t.hidden.tolist()
    assert [c.lstm_layers for c in seen] == t.layers.tolist() and [c.dropout for c in seen] == t.dropout.tolist()
    assert t.hidden[0] == 16 and best.settings.keys() == NETWORK.ranges.keys()

def test_a_stopped_search_goes_on(study, tmp_path):
    stop = threading.Event()
    stop.set()
    objective = tune_objective(study, CONFIG, folds=1, device='cpu', stop=stop)
    search = HyperparameterOptimizer(tmp_path, NETWORK, trials=1, first=[SMALL])
    with pytest.raises(Interrupted): search.optimize(objective)
    assert search.table().state.tolist() == ['running']
    stop.clear()
    assert search.optimize(objective).settings == SMALL
    assert search.table().tries.tolist() == [2]

@pytest.mark.parametrize('size', ['small', 'base', 'large'])
def test_every_size_is_tried_as_it_is(size):
    config = ForecasterConfig(HORIZONS, size=size)
    space, usual = network_space(config), as_it_is(config)
    assert space.settings(usual) == usual and replace(config, **usual).widths['d_model'] == config.widths['d_model']
    HyperparameterOptimizer(None, space, first=[usual])

def test_the_best_settings_are_applied(study, tmp_path, ledger):
    "And every trial is counted by the verdict that comes after, under the question and the data of the study"
    asked = replace(CONFIG, networks=2)
    config, search = tuned(replace(study, digest='d' * 64, question='q'), asked, tmp_path, 3, 1, 'cpu')
    assert config == replace(asked, **search.best().settings) and search.best().counts['failed'] == 0
    assert search.best().value <= search.table().value[0]
    days = np.arange(19000, 19100)
    assert read_ledger().tried(days, np.linspace(-.01, .01, 100), 'q').count == 4
    assert {(t.data, t.question) for t in read_ledger().trials} == {('d' * 64, 'q')}


# Settings that are chosen instead of a size's own

@pytest.mark.parametrize('wrong', [
    dict(hidden=0), dict(hidden=8.), dict(heads=0), dict(layers=0), dict(dropout=1.), dict(dropout=-.1),
    dict(weight_decay=-1.), dict(weight_decay=float('nan')), dict(hidden=10, heads=4), dict(heads=3)], ids=str)
def test_chosen_wrongly(wrong):
    with pytest.raises(ValueError, match='must be'): ForecasterConfig(**wrong)

def test_chosen_settings_are_saved_and_loaded(study, tmp_path):
    config = replace(CONFIG, hidden=24, heads=2, layers=2, dropout=.4, weight_decay=.05)
    f = begin(study.inputs, np.broadcast_to(study.parts['train'], study.panel.mask.shape), config)
    assert (f.network.config.d_model, f.network.config.lstm_layers, f.network.config.dropout) == (24, 2, .4)
    save_forecaster(f, tmp_path)
    back, _ = load_forecaster(tmp_path)
    assert back.config == config and back.network.config == f.network.config

def test_what_nobody_chose_is_as_it_was(study):
    "A network, and the digest of its recipe, before these settings were there"
    rows = np.broadcast_to(study.parts['train'], study.panel.mask.shape)
    plain, said = begin(study.inputs, rows, CONFIG), begin(study.inputs, rows, replace(CONFIG, **as_it_is(CONFIG)))
    assert plain.network.config == said.network.config
    old = {k: v for k, v in asdict(CONFIG).items() if v is not None}
    assert not {'hidden', 'heads', 'layers', 'dropout', 'weight_decay'} & old.keys()
    assert recipe_of(plain, study) != recipe_of(said, study)
    assert NetworkConfig.__dataclass_fields__['lstm_layers'].default == 1


# The job

def test_the_job(bars, tmp_path, ledger):
    "Search, comparison and verdict; run again it finds what it found"
    bars.to_parquet(tmp_path/'bars.parquet')
    asked = dict(data=str(tmp_path/'bars.parquet'), horizons=list(HORIZONS), book='timing', trials=2, folds=1, epochs=1,
                 device='cpu', threads=1)
    metrics = run('tune', tmp_path/'run', **asked)
    found = metrics['search']
    assert sum(found['counts'].values()) == 2 and set(found['settings']) == set(NETWORK.ranges)
    assert read_json(tmp_path/'run'/'search'/'best.json')['settings'] == found['settings']
    config = load_combined(tmp_path/'run'/'model', 'cpu')[0].config
    assert {k: getattr(config, k) for k in found['settings']} == found['settings']
    assert metrics['verdict']['trials'] == 3 and all(np.isfinite(v) for v in metrics['held_out'].values())
    assert ('are ahead' in metrics['next']) == (metrics['held_out']['best'] < metrics['held_out']['usual'])
    assert (tmp_path/'run'/'report.html').stat().st_size > 10_000
    lines = len(read_ledger().trials)
    assert run('tune', tmp_path/'run', **asked) == metrics and len(read_ledger().trials) == lines

@pytest.mark.parametrize('wrong, said', [
    (dict(trials=0), 'trials must be'), (dict(folds=0), 'folds must be'), (dict(workers=0), 'workers must be'),
    (dict(url='mysql://a@b/c'), 'not in mysql'), (dict(url='a server'), 'no address')], ids=str)
def test_what_the_job_refuses(wrong, said, tmp_path):
    with pytest.raises(JobError, match=said): run('tune', tmp_path/'run', **wrong)
    assert not (tmp_path/'run').exists()
