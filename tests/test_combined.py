"The whole forecast: nothing of the future in it, the same twice, and after a file or a stop (suites 1, 5, 11, 12)"
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from examples import untrained

from cryptoml.combined import (
    Blend, Combined, blend_arrays, blend_of, decisions, familiar_from, find, helping, kinds, load_combined,
    mean_of_quantiles, refit, save_combined, weigh, with_spread)
from cryptoml.data import to_panel
from cryptoml.ensemble import UltimateEnsemble
from cryptoml.forecaster import ForecasterConfig, make_inputs
from cryptoml.simulate import simulate
from cryptoml.state import StateError, load, save
from cryptoml.study import Study
from cryptoml.targets import trailing_sigma
from cryptoml.trainer import TrainerError

C = ForecasterConfig(horizons=(4, 12), epochs=2, networks=2)
MARKET = simulate(n_symbols=3, n_bars=4200, seed=5)

@pytest.fixture(scope='module')
def study(): return Study.of(to_panel(MARKET.bars), (4, 12))

@pytest.fixture(scope='module')
def trained(study, tmp_path_factory):
    "What was found, and the same refit to everything before the test"
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp('run')
    found = find(study.inputs, study.targets, study.parts, C, out, 'cpu')
    rows = study.until('gate'), study.parts['gate']
    return found, refit(found, study.inputs, study.targets, *rows, out/'judged', 'cpu')

def said_on_test(model, study, inputs=None, sigma=None):
    sample = decisions(model.first, study.inputs, study.parts['test'])
    return model.forecast(inputs or study.inputs, study.targets.sigma if sigma is None else sigma, sample), sample


# ---- of the future nothing

def test_a_forecast_is_the_same_when_the_bars_after_it_are_missing(trained, study):
    model, (whole, sample) = trained[1], said_on_test(trained[1], study)
    for t in np.unique(sample.bar)[[3, 40, 100]]:
        end = study.panel.time[t]
        cut = to_panel(MARKET.bars[MARKET.bars.time <= end])
        here = sample[sample.bar == t]
        alone = model.forecast(make_inputs(cut), trailing_sigma(cut), here)
        for k in (*kinds(model.levels), 'size', 'path'):
            np.testing.assert_allclose(alone[k], whole[k][sample.bar == t], atol=1e-5)
        np.testing.assert_allclose(model.rarity(make_inputs(cut), here), model.rarity(study.inputs, here), atol=1e-6)

def test_rows_after_those_that_are_fitted_change_nothing(trained, study, tmp_path):
    "The same fit from a panel that ends with its rows"
    found, model = trained
    last = np.flatnonzero(study.until('gate'))[-1]
    ends = study.panel.time[last + study.targets.horizons[-1] + 1]           # its last label is known there
    cut = Study.of(to_panel(MARKET.bars[MARKET.bars.time <= study.panel.time[-1]]), (4, 12))
    labels = {k: v.copy() for k, v in cut.targets.fields.items()}
    for v in labels.values(): v[:, last + 1:] = 0                            # labels after the rows are nonsense
    x = cut.inputs.x.copy()
    x[:, cut.panel.time > ends] = 7.                                         # and so are the inputs
    forged = replace(cut.targets, fields=labels)
    again = refit(found, replace(cut.inputs, x=x), forged, cut.until('gate'), cut.parts['gate'], tmp_path, 'cpu')
    before = decisions(model.first, study.inputs, study.parts['gate'])
    a, b = (m.forecast(study.inputs, study.targets.sigma, before) for m in (model, again))
    for k in kinds(model.levels): np.testing.assert_array_equal(a[k], b[k])


# ---- found, weighed, refit

def test_the_shares_add_up_and_a_member_without_one_is_left_out(trained):
    found, model = trained
    for ws in found.blend.shares.weights.values(): np.testing.assert_allclose(sum(ws.values()), 1)
    lean = helping(found.blend)
    assert all(w.any() for ws in lean.shares.weights.values() for w in ws.values())
    assert set(model.members) == {m for ws in lean.shares.weights.values() for m in ws} - {'network'}

def test_what_is_left_out_changes_nothing(trained, study, tmp_path):
    found, model = trained
    rows = study.until('gate'), study.parts['gate']
    whole = refit(found, study.inputs, study.targets, *rows, tmp_path, 'cpu', everyone=True)
    assert len(whole.members) == len(found.model.members)
    a, b = said_on_test(model, study)[0], said_on_test(whole, study)[0]
    for k in kinds(model.levels): np.testing.assert_allclose(a[k], b[k], atol=1e-9)

def test_two_networks_speak_as_one(trained, study):
    model = trained[1]
    one = [Combined([f], {}, model.blend, model.familiar, model.bands) for f in model.networks]
    sample = decisions(model.first, study.inputs, study.parts['test'])[:50]
    apart = [c.say(study.inputs, study.targets.sigma, sample)['network'] for c in one]
    both = model.say(study.inputs, study.targets.sigma, sample)['network']
    for k in ('direction', 'size', 'mean_volatility'):
        assert not np.allclose(apart[0][k], apart[1][k])
        np.testing.assert_allclose(both[k], (apart[0][k] + apart[1][k]) / 2, atol=1e-6)

def test_a_coin_says_the_same_whoever_is_asked_beside_it(trained, study):
    model = trained[1]
    sample = decisions(model.first, study.inputs, study.parts['test'])
    t = sample.bar[17]
    here, alone = sample[sample.bar == t], sample[17:18]
    a, b = (model.forecast(study.inputs, study.targets.sigma, s) for s in (here, alone))
    place = int(np.flatnonzero(here.coin == alone.coin[0])[0])
    for k in kinds(model.levels): np.testing.assert_array_equal(a[k][place], b[k][0])

def test_the_mean_of_quantiles_is_that_of_their_masses():
    "Five levels stand for .15, .225, .25, .225 and .15 of the probability"
    q = np.array([1., 2, 4, 8, 16])
    assert mean_of_quantiles(q, (.05, .25, .5, .75, .95)) == pytest.approx(.15 + .45 + 1 + 1.8 + 2.4)

def test_a_network_keeps_its_own_quantiles():
    q = np.zeros((3, 2, 5))
    assert with_spread(dict(volatility=q), None)['volatility'] is q

def test_targets_without_labels_have_no_shares(tmp_path):
    "Two coins have no median to be above"
    pair = Study.of(to_panel(simulate(n_symbols=2, n_bars=4200, seed=5).bars), (4, 12))
    model, _, _ = weigh([untrained(pair)], pair.inputs, pair.targets, pair.parts)
    assert not {'relative', 'relative_direction'} & model.blend.shares.weights.keys()
    said = said_on_test(model, pair)[0]
    assert said['relative'].shape == said['size'].shape and np.isfinite(said['direction']).all()


# ---- the same twice, and after an interruption

def test_the_same_twice(trained, study, tmp_path):
    again = find(study.inputs, study.targets, study.parts, C, tmp_path, 'cpu')
    for a, b in zip(trained[0].model.networks, again.model.networks):
        for k, v in a.network.state_dict().items(): assert torch.equal(v, b.network.state_dict()[k])
    for k, v in blend_arrays(trained[0].blend).items(): np.testing.assert_array_equal(v, blend_arrays(again.blend)[k])

def test_a_stopped_training_goes_on_and_ends_as_if_it_had_not_been(trained, study, tmp_path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(TrainerError, match='stopped'):
        find(study.inputs, study.targets, study.parts, C, tmp_path, 'cpu', stop)
    again = find(study.inputs, study.targets, study.parts, C, tmp_path, 'cpu', threading.Event())
    for k, v in blend_arrays(trained[0].blend).items(): np.testing.assert_array_equal(v, blend_arrays(again.blend)[k])


# ---- on disk

@pytest.fixture(scope='module')
def saved(trained, tmp_path_factory):
    root = tmp_path_factory.mktemp('model')
    save_combined(trained[1], root, note='kept')
    return root

def test_what_is_loaded_says_the_same_to_the_last_bit(trained, study, saved):
    loaded, about = load_combined(saved)
    assert about == dict(note='kept')
    a, b = said_on_test(trained[1], study)[0], said_on_test(loaded, study)[0]
    for k, v in a.items(): np.testing.assert_array_equal(v, b[k])

SHARE = 'shares/volatility/boosting'

@pytest.mark.parametrize('file, forge, word', [
    ('blend', lambda a: a.update({SHARE: a[SHARE] + .5}), 'add up to'),
    ('blend', lambda a: a.update({SHARE: -a[SHARE]}), 'add up to'),
    ('blend', lambda a: a.update({SHARE: a[SHARE].float()}), 'wanted finite float64'),
    ('blend', lambda a: a.update({'shares/volatility/oracle': a.pop(SHARE)}), 'does not speak'),
    ('blend', lambda a: a.update({'temperature/direction': 0 * a['temperature/direction']}), 'not above 0'),
    ('blend', lambda a: a.update({'luck/direction': a['temperature/direction']}), 'luck'),
    ('familiar', lambda a: a.update(mean=a['mean'][1:]), 'wanted finite'),
    ('familiar', lambda a: a.update(spread=0 * a['spread']), 'not above 0'),
    ('familiar', lambda a: a.update(usual=a['usual'] * np.nan), 'wanted finite'),
    ('network_1', lambda a: a.pop(next(iter(a))), 'not those of its network'),
    ('scaler', lambda a: a.update(center=a['center'] * np.nan), 'not finite'),
], ids=lambda x: x if isinstance(x, str) else '')
def test_a_forged_generation_is_refused_in_a_sentence(saved, tmp_path, file, forge, word):
    tensors, m = load(saved)
    forge(tensors[file])
    save(tmp_path, tensors, m)
    with pytest.raises(StateError, match=word): load_combined(tmp_path)

@pytest.mark.parametrize('change', [
    dict(members=['oracle']),
    dict(members=[]),
    dict(config=None),
    dict(families={}),
    dict(kind='other'),
])
def test_a_manifest_that_makes_no_sense_is_refused(saved, tmp_path, change):
    tensors, m = load(saved)
    save(tmp_path, tensors, m | change)
    with pytest.raises(StateError): load_combined(tmp_path)

def test_a_network_alone_is_of_an_earlier_version(tmp_path):
    save(tmp_path, {}, dict(kind='forecaster'))
    with pytest.raises(StateError, match='of an earlier version: train it again'): load_combined(tmp_path)

def test_a_blend_of_nothing_is_none():
    with pytest.raises(ValueError): blend_of({'shares/direction/network': np.zeros(2)}, ['network'], (.1, .9), 2)
    with pytest.raises(ValueError, match='wanted finite'):
        familiar_from(dict(mean=np.zeros(3), directions=np.zeros((2, 1)), spread=np.ones(1), usual=np.zeros((5, 9))), 3)
    blend = Blend({}, UltimateEnsemble({}, {}), {})
    assert blend(dict(network=dict(size=np.ones(3))))['size'].sum() == 3
