"""Members of the ensemble against other solvers and closed forms; found, refit, and back from a file (suites 5, 13)"""
from dataclasses import replace

import numpy as np, pytest, torch
from examples import nats, unrelated
from scipy.special import expit, log_softmax, softmax

from cryptoml.baselines import N_CLASSES, frequencies, joined, softmax_regression
from cryptoml.members import LINES, RIDGES, TREES, Lines, find_members, member_arrays, member_of

S, H = 3000, 2

@pytest.fixture(scope='module')
def samples(): return unrelated(3, S, H)

@pytest.fixture(scope='module')
def found(samples):
    "All members, and a sentence on each that is absent"
    return find_members(*samples[:2])

def line_of(name, samples): return Lines.find(LINES[name], *samples[:2])

@pytest.mark.parametrize('target', N_CLASSES)
def test_the_ridge_is_the_best_on_validation(samples, target):
    old, held, new = samples
    old, held = (replace(s, x=s.x + (s.labels['regime'][:, :1] == 2)) for s in (old, held))   # the regime can be seen
    losses = {}
    for l2 in RIDGES:
        w, y = softmax_regression(old.x, old.labels[target][:, 1], N_CLASSES[target], l2), held.labels[target][:, 1]
        logp = log_softmax(np.c_[held.x, np.ones(S)] @ w, 1)
        losses[l2] = -np.mean([logp[s, y[s]] for s in range(S) if y[s] >= 0])
    member = line_of('logistic', (old, held))
    l2 = member.ridges[target][1]
    assert losses[l2] == min(losses.values())
    both = joined(old, held)
    w = softmax_regression(both.x, both.labels[target][:, 1], N_CLASSES[target], l2)
    said = member.refit(both)(new)[target][:, 1]
    assert np.allclose(said, softmax(np.c_[new.x, np.ones(S)] @ w, 1))

def test_logistic_of_two_classes_is_the_sigmoid(samples):
    old, _, new = samples
    member = line_of('logistic', samples)
    l2 = member.ridges['relative_direction'][0]
    w = softmax_regression(old.x, old.labels['relative_direction'][:, 0], 2, l2)
    said = member(new)['relative_direction'][:, 0, 1]
    assert np.allclose(said, expit(np.c_[new.x, np.ones(S)] @ (w[:, 1] - w[:, 0])))

def test_ridge_is_its_closed_form(samples):
    "Of centred inputs (X'X / n + l2) w = X'y / n"
    old, _, new = samples
    member = line_of('ridge', samples)
    for target in ('relative', 'volatility'):
        y = old.labels[target][:, 1]
        there = np.isfinite(y)
        x = old.x[there] - old.x[there].mean(0)
        inner = x.T @ x / len(x) + member.ridges[target][1] * np.eye(5)
        w = np.linalg.solve(inner, x.T @ (y[there] - y[there].mean()) / len(x))
        want = y[there].mean() + (new.x - old.x[there].mean(0)) @ w
        assert np.allclose(member(new)[target].reshape(S, H)[:, 1], want)

def test_of_noise_no_more_is_said_than_frequencies(samples):
    "Hundreds of inputs that know nothing: an untuned fit learns them by heart"
    rng = np.random.default_rng(4)
    old, held, new = (replace(s, x=rng.normal(size=(S, 200))) for s in samples)
    tuned, plain = (line_of(name, (old, held))(new) for name in ('logistic', 'majority'))
    for target in ('direction', 'relative_direction'):
        assert nats(tuned, new, target) < nats(plain, new, target) + .005
    w = softmax_regression(old.x, old.labels['direction'][:, 0], 3, .01)
    by_heart = dict(direction=softmax(np.c_[new.x, np.ones(S)] @ w, 1)[:, None])
    assert nats(by_heart, new, 'direction') > nats(plain, new, 'direction') + .05

def test_har_is_least_squares(samples):
    old, _, new = samples
    forecast = line_of('HAR', samples)(new)['volatility'][..., 0]
    for j in range(H):
        y = old.labels['volatility'][:, j]
        ok = np.isfinite(y) & np.isfinite(old.har).all(1)
        b = np.linalg.solve(old.har[ok].T @ old.har[ok], old.har[ok].T @ y[ok])
        assert np.allclose(forecast[50:, j], new.har[50:] @ b)
        assert np.isnan(forecast[:50, j]).all()

def test_majority_says_the_frequencies(samples):
    old, _, new = samples
    said = line_of('majority', samples)(new)
    for target, n in N_CLASSES.items():
        for j in range(H): assert np.allclose(said[target][7, j], frequencies(old.labels[target][:, j], n))
    assert np.allclose(said['relative'], np.nanmean(old.labels['relative'], 0))

def test_one_interface(samples, found):
    new = samples[2]
    members, absent = found
    assert list(members) == [*LINES, *TREES] and not absent
    shapes = {k: (S, H, n) for k, n in N_CLASSES.items()} | dict(relative=(S, H), volatility=(S, H, 1))
    for m in members.values():
        said, again = m(new), m(new)
        assert said
        for k, v in said.items():
            assert v.shape == shapes[k]
            assert (v == again[k])[50:].all()
        for k in said.keys() & N_CLASSES:
            assert np.allclose(said[k].sum(-1), 1)
            assert (said[k] > 0).all()

def test_refit_to_the_same_rows_changes_nothing(samples, found):
    old, _, new = samples
    for m in found[0].values():
        again = m.refit(old)(new)
        for k, v in m(new).items(): assert np.array_equal(again[k], v, equal_nan=True)

def test_a_member_comes_back_from_a_file_as_it_was(samples, found):
    for name, m in found[0].items():
        tensors = {k: torch.from_numpy(v) for k, v in member_arrays(m).items()}
        back, new = member_of(name, tensors, H), samples[2]
        for k, v in m(new).items(): assert np.array_equal(back(new)[k], v, equal_nan=True)

def test_one_row_says_what_it_says_among_many(samples, found):
    "A row of trees is a row; a row of a line differs by rounding alone"
    new = samples[2]
    alone = replace(new, **{k: v[60:61] for k, v in vars(new).items() if k != 'labels'}, labels={})
    for m in found[0].values():
        for k, v in m(new).items(): assert np.allclose(m(alone)[k], v[60:61], atol=1e-12, rtol=0)

def test_too_few_coins_leave_targets_out(samples):
    old, held, new = samples
    none = dict(relative_direction=np.full((S, H), -1), relative=np.full((S, H), np.nan))
    members, _ = find_members(*[replace(s, labels=s.labels | none) for s in (old, held)])
    assert 'low volatility' not in members
    assert not {'relative', 'relative_direction'} & {k for m in members.values() for k in m(new)}
