"Splits against brute force, and what they promise about label ends."
from itertools import combinations
from math import comb

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from cryptoml.splits import combinatorial, paths, plot_folds, walk_forward

matplotlib.use('Agg')
HOUR = pd.Timedelta('1h')


@st.composite
def axes(draw):
    "Decision times with gaps and repeats (coins), labels of varying length"
    rng = np.random.default_rng(draw(st.integers(0, 10 ** 6)))
    hours = np.sort(rng.choice(2000, draw(st.integers(600, 1500)), replace=draw(st.booleans())))
    time = pd.Timestamp('2022-01-01', tz='UTC') + pd.to_timedelta(hours, 'h')
    return pd.DatetimeIndex(time), pd.DatetimeIndex(time + pd.to_timedelta(rng.integers(0, draw(st.sampled_from([1, 24, 100])), len(hours)), 'h'))


@settings(max_examples=60, deadline=None)
@given(axes(), st.integers(100, 300), st.integers(150, 300), st.integers(0, 60))
def test_walk_forward_equals_brute_force(axis, test, valid, embargo):
    time, t1 = axis
    folds = walk_forward(time, t1, test * HOUR, valid * HOUR, 300 * HOUR, embargo * HOUR)
    assert folds and time[-1] - len(folds) * test * HOUR - (2 * embargo + valid + 300) * HOUR >= time[0]
    assert time[-1] - (len(folds) + 1) * test * HOUR - (2 * embargo + valid + 300) * HOUR < time[0]
    at, end = ((x - time[0]) // HOUR for x in (time, t1))                        # whole hours
    for k, f in zip(range(len(folds), 0, -1), folds):
        start = at[-1] - k * test
        v_end = start - embargo; v_start = v_end - valid; t_end = v_start - embargo
        want = dict(train=[], valid=[], test=[])
        for i, (a, b) in enumerate(zip(at.tolist(), end.tolist())):
            if a <= t_end and b <= v_start: want['train'].append(i)
            if v_start < a <= v_end and b <= start: want['valid'].append(i)
            if start < a <= start + test: want['test'].append(i)
        for name, positions in want.items(): assert getattr(f, name).tolist() == positions


@settings(max_examples=60, deadline=None)
@given(axes(), st.integers(0, 60))
def test_no_label_reaches_into_a_later_part(axis, embargo):
    time, t1 = axis
    folds = walk_forward(time, t1, '200h', '200h', '300h', embargo * HOUR)
    for f in folds:
        assert t1[f.train].max() < time[f.valid].min() and t1[f.valid].max() < time[f.test].min() and t1[f.train].max() < time[f.test].min()
        assert time[f.valid].min() - time[f.train].max() > embargo * HOUR and time[f.test].min() - time[f.valid].max() > embargo * HOUR
    tests = np.concatenate([f.test for f in folds])
    assert tests.tolist() == list(range(tests[0], len(time)))                        # contiguous, each once, to the end
    for a, b in zip(folds, folds[1:]): assert set(a.train) < set(b.train)            # expanding


@settings(max_examples=25, deadline=None)
@given(axes(), st.integers(3, 7), st.integers(0, 40), st.data())
def test_combinatorial_equals_brute_force(axis, n, embargo, data):
    time, t1 = axis
    k = data.draw(st.integers(1, 2))
    unique = sorted(set(time)); group = np.array([unique.index(a) * n // len(unique) for a in time[::25]])
    folds = combinatorial(time, t1, n, k, embargo * HOUR)
    assert len(folds) == comb(n, k)
    all_groups = np.array([np.searchsorted(time.unique(), a) * n // len(unique) for a in time])
    assert (all_groups[::25] == group).all()
    spans = [(time[all_groups == g].min(), t1[all_groups == g].max()) for g in range(n)]
    for tested, f in zip(combinations(range(n), k), folds):
        assert f.test.tolist() == np.flatnonzero(np.isin(all_groups, tested)).tolist() and len(f.valid) == 0
        bad = np.zeros(len(time), bool)
        for g in tested: bad |= np.array((t1 >= spans[g][0]) & (time <= spans[g][1] + embargo * HOUR))
        assert f.train.tolist() == np.flatnonzero(~bad).tolist()
    for g in range(n): assert sum(np.isin(np.flatnonzero(all_groups == g), f.test).all() for f in folds) == comb(n - 1, k - 1)


@pytest.mark.parametrize('n, k', [(6, 2), (5, 1), (7, 3), (10, 8)])
def test_paths_cover_every_group_once_with_folds_that_test_it(n, k):
    tested, p = list(combinations(range(n), k)), paths(n, k)
    assert p.shape == (comb(n - 1, k - 1), n) == (comb(n, k) * k // n, n)              # the book's count, k / N * C(N, k)
    for g in range(n):
        assert all(g in tested[i] for i in p[:, g]) and len(set(p[:, g])) == len(p)
    assert sorted(p.ravel()) == sorted(np.repeat(np.arange(comb(n, k)), k))            # each fold's test groups are used once


def test_too_little_history_says_how_much_is_needed():
    time = pd.date_range('2022-01-01', periods=24 * 100, freq='h', tz='UTC')
    with pytest.raises(ValueError, match=r'history too short: 1 fold.* need 140 days .*got 99 days'):
        walk_forward(time, time + HOUR, '30D', '20D', '80D', '5D')
    with pytest.raises(ValueError, match='3 fold.* need 120 days'): walk_forward(time, time + HOUR, '30D', '5D', '15D', '5D', n_folds=3)
    assert len(walk_forward(time, time + HOUR, '30D', '5D', '15D', '5D')) == 2
    assert len(walk_forward(time, time + HOUR, '30D', '5D', '15D', '5D', n_folds=1)) == 1


@pytest.mark.parametrize('kwargs, word', [(dict(test='0D'), 'positive'), (dict(valid='-1D'), 'positive'), (dict(embargo='-1h'), 'not negative'), (dict(n_folds=0), 'n_folds')])
def test_bad_lengths_are_refused(kwargs, word):
    time = pd.date_range('2022-01-01', periods=2400, freq='h', tz='UTC')
    with pytest.raises(ValueError, match=word): walk_forward(time, time + HOUR, **(dict(test='10D', valid='5D', min_train='20D', embargo='1D') | kwargs))


def test_a_bad_axis_is_refused():
    time = pd.date_range('2022-01-01', periods=2400, freq='h', tz='UTC'); args = ('10D', '5D', '20D', '1D')
    with pytest.raises(ValueError, match='2400 samples and t1 has 2399'): walk_forward(time, time[1:], *args)
    with pytest.raises(ValueError, match='sorted'): walk_forward(time[::-1], time[::-1] + HOUR, *args)
    with pytest.raises(ValueError, match='2400 labels end before'): walk_forward(time, time - HOUR, *args)
    with pytest.raises(ValueError, match='time zone'): walk_forward(time, (time + HOUR).tz_localize(None), *args)
    with pytest.raises(ValueError, match='0 decision times and 1 label ends are missing'): walk_forward(time, (time + HOUR).where(time != time[5]), *args)
    with pytest.raises(ValueError, match='no samples'): walk_forward(time[:0], time[:0], *args)


def test_a_part_without_decisions_is_named():
    time = pd.date_range('2022-01-01', periods=2400, freq='h', tz='UTC')
    hole = (time < '2022-03-01') | (time > '2022-03-20')
    with pytest.raises(ValueError, match='the (valid|test) part between .* is empty'): walk_forward(time[hole], time[hole] + HOUR, '10D', '5D', '20D', '1D')


def test_long_labels_are_purged_even_without_embargo():
    time = pd.date_range('2022-01-01', periods=1000, freq='h', tz='UTC'); t1 = time + HOUR
    t1 = t1.where(np.arange(1000) != 300, time[-1])                    # one position held to the end
    for f in walk_forward(time, t1, '200h', '100h', '400h', '0h'): assert 300 not in f.train and 299 in f.train and 301 in f.train


def test_unpurged_splits_flatter_a_nearest_neighbour_on_noise():
    "Labels of 24 overlapping noise terms; the learner answers with the training label nearest in time"
    rng = np.random.default_rng(0); h, n = 24, 1200
    time = pd.date_range('2022-01-01', periods=n, freq='h', tz='UTC')
    def skill(t1):
        scores = []
        for _ in range(60):
            y = np.convolve(rng.standard_normal(n + h), np.ones(h), 'valid')[1:]
            for f in combinatorial(time, t1, 12, 1, '0h'):
                right = np.clip(np.searchsorted(f.train, f.test), 0, len(f.train) - 1); left = np.clip(right - 1, 0, None)
                near = np.where(np.abs(f.train[left] - f.test) <= np.abs(f.train[right] - f.test), f.train[left], f.train[right])
                scores.append((y[near] * y[f.test]).mean() / h)
        return np.mean(scores), np.std(scores) / np.sqrt(len(scores))
    naive, purged = skill(time), skill(time + h * HOUR)
    assert naive[0] > 5 * naive[1] and abs(purged[0]) < 4 * purged[1]


def test_folds_can_be_drawn():
    time = pd.date_range('2022-01-01', periods=1000, freq='h', tz='UTC')
    folds = walk_forward(time, time + HOUR, '200h', '100h', '400h', '24h')
    ax = plot_folds(folds, time)
    assert len(ax.patches) == 3 * len(folds) and [t.get_text() for t in ax.get_legend().get_texts()] == ['train', 'valid', 'test']
