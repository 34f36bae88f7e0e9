"""Trees against LightGBM itself; hostile arrays; no library; lines against closed forms; a report's row (suite 6)"""
import subprocess, sys, textwrap
from dataclasses import replace
from pathlib import Path

import lightgbm
import numpy as np
import pytest
import torch
from examples import nats, unrelated
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from scipy.special import softmax

from cryptoml import boosting as module
from cryptoml.baselines import joined
from cryptoml.boosting import (
    BOOSTED, KINDS, PLAIN, Boosted, Forests, NoTrees, Task, Trees, along, arrays_of, boosted_of, grown, line, newest,
    probabilities, why_no_trees,
)
from cryptoml.members import LINES, Lines

S, H = 3000, 2
SMALL = dict(num_leaves=7, min_data_in_leaf=5, verbose=-1, num_threads=1, deterministic=True)


# ---- as the library reads them

def some_rows(rng, n, missing):
    "Inputs of several kinds: continuous, whole numbers, mostly zero, huge, constant; some missing, some infinite"
    x = rng.normal(size=(n, 5)) * [1, 3, 1, 1e12, 0]
    x[:, 1] = x[:, 1].round()
    x[rng.random(n) < .7, 2] = 0
    x[rng.random(x.shape) < missing] = np.nan
    x[rng.random(x.shape) < .01] = np.inf
    x[rng.random(x.shape) < .01] = -1e-36          # as good as zero
    return x

OPTIONS = st.fixed_dictionaries({}, optional=dict(
    zero_as_missing=st.just(True),
    use_missing=st.just(False),
    objective=st.sampled_from(['regression', 'quantile', 'binary', 'multiclass']),
    num_leaves=st.integers(2, 40),
))

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), OPTIONS, st.sampled_from([0., .2, .9]), st.integers(0, 12))
def test_sums_are_the_library_s(seed, options, missing, rounds):
    rng = np.random.default_rng(seed)
    x, new = some_rows(rng, 300, missing), some_rows(rng, 200, .3)
    y = np.nan_to_num(x[:, 0], posinf=0) + np.isnan(x[:, 1]) + rng.normal(size=300)
    kind = options.get('objective')
    if kind == 'binary': y = y > 0
    if kind == 'multiclass': options, y = options | dict(num_class=3), np.digitize(y, [0, 1])
    b = lightgbm.train(SMALL | options, lightgbm.Dataset(x, y), max(rounds, 1))
    trees = grown(b, rounds)
    assert len(trees) == rounds * (3 if kind == 'multiclass' else 1)
    want = b.predict(new, raw_score=True, num_iteration=rounds).reshape(200, -1) if rounds else 0
    assert np.allclose(trees.score(new), want, rtol=1e-12, atol=1e-12)
    assert np.array_equal(trees.score(new[:1]), trees.score(new)[:1])

def test_as_many_as_early_stopping_kept():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 600, 4)), rng.normal(size=(2, 600))
    y += x[..., 0]
    data = lightgbm.Dataset(x[0], y[0])
    held = lightgbm.Dataset(x[1], y[1], reference=data)
    b = lightgbm.train(SMALL, data, 400, valid_sets=[held], callbacks=[lightgbm.early_stopping(5, verbose=False)])
    assert 5 < b.best_iteration < 400
    assert np.allclose(grown(b, b.best_iteration).score(x[1])[:, 0], b.predict(x[1], raw_score=True), atol=1e-12)

@pytest.mark.parametrize('options, categories, word', [
    (dict(boosting='rf', bagging_freq=1, bagging_fraction=.5), [], 'averaged'),
    (dict(linear_tree=True), [], 'linear models'),
    (dict(min_data_per_group=5, cat_smooth=1), [0], 'categories'),
], ids=str)
def test_what_is_not_read_is_refused(options, categories, word):
    rng = np.random.default_rng(0)
    x = np.abs(rng.normal(size=(400, 3)) * 4).round()
    data = lightgbm.Dataset(x, 9 * (x[:, 0] % 2) + x[:, 1], params=options, categorical_feature=categories)
    with pytest.raises(ValueError, match=word): grown(lightgbm.train(SMALL | options, data, 5), 5)

def test_float32_and_strided_rows():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 8)).astype(np.float32)
    b = lightgbm.train(SMALL, lightgbm.Dataset(x[:, ::2].copy(), x[:, 0].copy()), 20)
    trees = grown(b, 20)
    assert np.array_equal(trees.score(x[:, ::2]), trees.score(x[:, ::2].astype(float)))
    assert np.allclose(trees.score(x[:, ::2])[:, 0], b.predict(x[:, ::2].copy()), atol=1e-12)
    assert trees.score(x[:0, ::2]).shape == (0, 1)


# ---- arrays that anybody may have written

@pytest.fixture(scope='module')
def few():
    "Nine trees of three classes"
    rng = np.random.default_rng(1)
    x = some_rows(rng, 400, .2)
    task = dict(objective='multiclass', num_class=3)
    return grown(lightgbm.train(SMALL | task, lightgbm.Dataset(x, rng.integers(0, 3, 400)), 3), 3)

def test_there_and_back(few, tmp_path):
    save_file({k: torch.from_numpy(v) for k, v in few.arrays().items()}, tmp_path/'trees.safetensors')
    back = Trees.of(load_file(tmp_path/'trees.safetensors'))
    x = some_rows(np.random.default_rng(2), 100, .3)
    assert np.array_equal(back.score(x), few.score(x))
    assert all(back.arrays()[k].dtype == kind for k, kind in KINDS.items())

def test_changed_afterwards_they_read_the_same(few):
    mine = {k: v.copy() for k, v in few.arrays().items()}
    trees, x = Trees.of(mine), some_rows(np.random.default_rng(2), 50, .3)
    before = trees.score(x)
    for v in mine.values(): v[:] = 0
    assert np.array_equal(trees.score(x), before)

HUGE = [-2**63, -2**31, -2, -1, 0, 1, 5, 40, 2**31 - 1, 2**62, 2**63 - 1]

@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_arrays_are_read_to_the_end_or_refused(few, data):
    "Numbers of any size at any place: a ValueError, or finite sums; never an endless way or another's memory"
    a = {k: v.copy() for k, v in few.arrays().items()}
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(a)))
        v = a[name]
        if not len(v): continue
        at = data.draw(st.integers(0, len(v) - 1))
        if v.dtype.kind == 'f': v[at] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, 1e308, 0.]))
        elif v.dtype.kind == 'i':
            info = np.iinfo(v.dtype)
            v[at] = np.clip(data.draw(st.sampled_from(HUGE)), info.min, info.max)
        else: v[at] = ~v[at]
        if data.draw(st.integers(0, 9)) == 0: a[name] = v[:at]
    try: trees = Trees.of(a)
    except ValueError as e:
        assert str(e).startswith('trees: ')
        return
    inputs, outputs = trees.shape
    if inputs < 1000: assert np.isfinite(trees.score(np.zeros((4, inputs)))).all()
    assert outputs <= 1000

@pytest.mark.parametrize('change, word', [
    (dict(feature=np.float64), 'feature must be a vector of int32'),
    (dict(left=np.int64), 'left must be a vector of int32'),
    (dict(default_left=np.int8), 'default_left must be a vector of bool'),
], ids=str)
def test_other_kinds_are_refused(few, change, word):
    a = few.arrays()
    with pytest.raises(ValueError, match=word): Trees.of(a | {k: a[k].astype(kind) for k, kind in change.items()})
    with pytest.raises(ValueError, match='must be a vector'): Trees.of(a | dict(value=a['value'][None]))
    with pytest.raises(ValueError, match='are wanted'): Trees.of(a | dict(more=a['value']))

def model(classes=0, levels=(), ridges=PLAIN):
    rng = np.random.default_rng(5)
    x, valid_x = some_rows(rng, 900, .1), some_rows(rng, 500, .1)
    def label(x):
        y = np.stack([np.nan_to_num(x[:, 0], posinf=0) + rng.normal(size=len(x)) for _ in range(H)], 1)
        return np.digitize(y, [0, 1][:classes - 1]) if classes else y
    x, valid_x = (np.where(np.isfinite(v), v, np.nan) for v in (x, valid_x))
    return Boosted.fit(Task(classes, levels), x, label(x), valid_x, label(valid_x), ridges), valid_x

@pytest.mark.parametrize('task', [dict(), dict(classes=2), dict(classes=3), dict(levels=(.1, .5, .9))], ids=str)
@pytest.mark.parametrize('ridges', [PLAIN, (.1,)], ids=['trees', 'line and trees'])
def test_a_model_comes_back_with_the_same_bits(task, ridges, tmp_path):
    m, x = model(ridges=ridges, **task)
    save_file({k: torch.from_numpy(v) for k, v in arrays_of(m).items()}, tmp_path/'model.safetensors')
    back = boosted_of(load_file(tmp_path/'model.safetensors'))
    assert np.array_equal(back.predict(x), m.predict(x))
    assert (back.task, back.rounds, [one.ridge for one in back.each]) == (m.task, m.rounds, [o.ridge for o in m.each])
    assert m.predict(x).shape == (len(x), H, *{2: [2], 3: [3], 0: [3] * bool(m.task.levels)}[m.task.classes])

@pytest.mark.parametrize('change, word', [
    (dict(center=lambda v: v * np.nan), 'center is not finite'),
    (dict(spread=lambda v: -v), 'above 0'),
    (dict(spread=lambda v: v[1:]), 'spread float64 .4,., wanted'),
    (dict(weights=lambda v: v.astype(np.float32)), 'weights float32'),
    (dict(weights=lambda v: v[:, :, :1]), 'wanted float64'),
    (dict(ridges=lambda v: v[:0]), 'wanted'),
    (dict(ridges=lambda v: v * np.nan), 'above 0'),
    (dict(classes=lambda v: v + 3), 'a task has|wanted'),
    (dict(classes=lambda v: v + 10**12), 'neither classes nor levels'),
    (dict(levels=lambda v: v[::-1]), 'rising levels'),
    (dict(levels=lambda v: v * np.nan), 'rising levels'),
    ({'0.0.shape': lambda v: v + 1}, 'cannot be of|of shape'),
    ({'1.2.left': lambda v: np.zeros_like(v)}, 'behind'),
], ids=lambda v: '' if callable(v) else str(v)[:20])
def test_a_forged_model_is_refused(change, word):
    a = arrays_of(QUANTILES[0])
    with pytest.raises(ValueError, match=word): boosted_of(a | {k: f(a[k]) for k, f in change.items()})
    with pytest.raises(ValueError, match='wanted|no '): boosted_of({k: v for k, v in a.items() if k not in change})

QUANTILES = model(levels=(.1, .5, .9))


# ---- without the library

BLOCKED = '''
    import sys
    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.split('.')[0] == 'lightgbm': raise OSError('libgomp.so.1: cannot open shared object file')
    sys.meta_path.insert(0, Block())
    import numpy as np
    from safetensors.numpy import load_file
    from cryptoml.boosting import NoTrees, boosted_of, library, why_no_trees
    data = load_file(sys.argv[1])
    x, want = data.pop('x'), data.pop('want')
    assert np.array_equal(boosted_of(data).predict(x), want)
    said, = why_no_trees()
    assert 'libgomp.so.1: cannot open' in said and 'libgomp1' in said and '\\n' not in said
    try: library()
    except NoTrees as e: assert str(e) == said
    else: raise SystemExit('it was loaded')
    assert not [m for m in sys.modules if m.startswith('lightgbm')]
'''

def test_a_model_is_read_where_the_library_does_not_load(tmp_path):
    m, x = QUANTILES
    arrays = arrays_of(m) | dict(x=x, want=m.predict(x))
    save_file({k: torch.from_numpy(v) for k, v in arrays.items()}, tmp_path/'model.safetensors')
    run = [sys.executable, '-c', textwrap.dedent(BLOCKED), str(tmp_path/'model.safetensors')]
    done = subprocess.run(run, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

def test_growing_without_it_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, 'lightgbm', None)
    with pytest.raises(NoTrees, match='^no boosted trees: lightgbm cannot be loaded .*pip install lightgbm'):
        Forests.find(*unrelated(0, 50, 1)[:2])
    assert len(why_no_trees()) == 1


# ---- lines and what they leave over

@pytest.mark.parametrize('l2', [.01, 1.])
def test_trees_begin_at_the_line_and_boost_its_residual(l2):
    "Against LightGBM's own boosting of the residual"
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1500, 4))
    y = (x @ [1., 0, -1, 0] + (x[:, 1] > 0) * (x[:, 3] > 0) + rng.normal(size=1500))[:, None]
    m = Boosted.fit(Task(), x[:1000], y[:1000], x[1000:], y[1000:], ridges=(l2,))
    z = (x - x[:1000].mean(0)) / x[:1000].std(0)
    z1, y1 = z[:1000], y[:1000, 0]
    w = np.linalg.solve(z1.T @ z1 + 1000 * l2 * np.eye(4), z1.T @ (y1 - y1.mean()))
    first = z @ w + y1.mean()
    settings = module.SETTINGS | dict(num_threads=1, boost_from_average=False, objective='regression')
    (rounds,), = m.rounds
    b = lightgbm.train(settings, lightgbm.Dataset(x[:1000], y1 - first[:1000], params=settings), rounds)
    assert rounds > 10
    assert np.allclose(m.predict(x)[:, 0], first + b.predict(x), atol=1e-6)       # its gradients are float32

def test_log_odds_begin_at_the_logistic_regression():
    "With no trees left the forecast is the regression; with them the log-odds move by what they say"
    m, x = model(3, ridges=(.1,))
    one, z = m.each[0], m.scale(x)
    begun = replace(m, each=[o._replace(trees=[t.first(0) for t in o.trees]) for o in m.each])
    scores = along(z, one.weights)[:, 0]
    assert np.allclose(begun.predict(x)[:, 0], softmax(scores, 1))
    assert np.allclose(m.predict(x)[:, 0], softmax(scores + one.trees[0].score(x), 1))

def test_no_rounds_where_trees_bring_nothing():
    "A line without noise: each tree would only spoil it"
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 3))
    y = np.stack([x @ [1., 2, 3], x @ [0., 0, 1]], 1)
    m = Boosted.fit(Task(), x[:1500], y[:1500], x[1500:], y[1500:], ridges=(1e-12,))
    assert m.rounds == [[0], [0]]
    assert np.allclose(m.predict(x), y, atol=1e-6)
    assert m.refit(x, y).rounds == [[0], [0]]

@pytest.mark.parametrize('classes', [2, 3])
def test_without_a_line_it_begins_at_the_frequencies(classes):
    rng = np.random.default_rng(0)
    y = rng.integers(-1, classes, 500)
    w = line(Task(classes), rng.normal(size=(500, 2)), y, np.inf)
    p = probabilities(along(np.zeros((1, 2)), w)[:, 0])[0]
    counts = np.bincount(y[y >= 0], minlength=classes) + 1
    assert np.allclose(p, counts / counts.sum())

def test_refit_is_a_fit_to_all_with_the_same_rounds():
    m, x = model(ridges=(.1,))
    rng = np.random.default_rng(9)
    rows = np.where(np.isfinite(v := some_rows(rng, 700, .1)), v, np.nan)
    y = rng.normal(size=(700, H))
    again, twice = m.refit(rows, y), m.refit(rows, y)
    assert again.rounds == m.rounds
    assert np.array_equal(again.predict(x), twice.predict(x))
    assert not np.array_equal(again.predict(x), m.predict(x))

def test_rows_are_forecast_alone_or_together():
    for m, x in (QUANTILES, model(3, ridges=(.1,))):
        whole = m.predict(x[:40])
        alone = np.concatenate([m.predict(x[i:i + 1]) for i in range(40)])
        assert np.allclose(whole, alone, rtol=1e-12, atol=1e-12)


# ---- as a baseline

@pytest.fixture(scope='module')
def samples(): return unrelated(3, S, H)

def test_the_row_of_a_report(samples):
    old, held, new = samples
    said = Forests.find(old, held).refit(joined(old, held))(new)
    shapes = dict(direction=(S, H, 3), relative_direction=(S, H, 2), relative=(S, H), volatility=(S, H, 1))
    assert {k: v.shape for k, v in said.items()} == shapes
    both = joined(old, held)
    for k, task in BOOSTED.items():
        fits = [a for s in (old, held) for a in (newest(s), s.labels[k])]
        again = Boosted.fit(task, *fits, ridges=PLAIN).refit(newest(both), both.labels[k]).predict(newest(new))
        assert np.array_equal(again, said[k][..., 0] if k == 'volatility' else said[k])

def test_of_noise_no_more_is_said_than_frequencies(samples):
    rng = np.random.default_rng(4)
    old, held, new = (replace(s, x=rng.normal(size=(S, 200))) for s in samples)
    said, plain = Forests.find(old, held)(new), Lines.find(LINES['majority'], old, held)(new)
    for target in ('direction', 'relative_direction'):
        assert nats(said, new, target) < nats(plain, new, target) + .005

def test_trees_are_the_same_on_any_number_of_threads(samples, monkeypatch):
    monkeypatch.setattr(module, 'ROUNDS', 60)
    *seen, new = samples
    first = [replace(s, past=s.past[:, :1], labels={k: v[:, :1] for k, v in s.labels.items()}) for s in seen]
    threads, said = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            said.append(Forests.find(*first)(new))
    finally: torch.set_num_threads(threads)
    one, two = said
    assert one.keys() == {'direction', 'relative_direction', 'relative', 'volatility'}
    assert all((one[k] == two[k]).all() for k in one)

def test_trees_learn_from_labelled_samples_alone(samples):
    old, held, new = samples
    def half(s, others):
        "Samples of which half have x0 for a label and the others this many times x0"
        factor = np.where(np.arange(S) % 2, others, 1)
        y = (factor * s.x[:, 0])[:, None] * np.ones((1, H))
        return replace(s, labels=s.labels | dict(relative=y))
    def likeness(others):
        "Correlation of the forecast with x0"
        said = Forests.find(half(old, others), half(held, others))(new)
        return np.corrcoef(said['relative'][:, 0], new.x[:, 0])[0, 1]
    assert likeness(np.nan) > .95 > likeness(-1)

def test_too_few_coins_leave_targets_out(samples):
    *seen, new = samples
    none = dict(relative_direction=np.full((S, H), -1), relative=np.full((S, H), np.nan))
    said = Forests.find(*[replace(s, labels=s.labels | none) for s in seen])(new)
    assert said.keys() == {'direction', 'volatility'}
