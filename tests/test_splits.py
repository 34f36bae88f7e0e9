"Splits against brute force, and what they promise about label ends."
from itertools import combinations
from math import comb

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from cryptoml.splits import combinatorial, paths, plot_folds, recency, uniqueness, walk_forward

matplotlib.use('Agg')
HOUR = pd.Timedelta('1h')


@st.composite
def axes(draw):
    "Decision times with gaps and repeats (coins), labels of varying length"
    rng = np.random.default_rng(draw(st.integers(0, 10 ** 6)))
    hours = np.sort(rng.choice(2000, draw(st.integers(600, 1500)), replace=draw(st.booleans())))
    time = pd.DatetimeIndex(pd.Timestamp('2022-01-01', tz='UTC') + pd.to_timedelta(hours, 'h'))
    longest = draw(st.sampled_from([1, 24, 100]))
    return time, time + pd.to_timedelta(rng.integers(0, longest, len(hours)), 'h')


def hourly(n): return pd.date_range('2022-01-01', periods=n, freq='h', tz='UTC')


@settings(max_examples=60, deadline=None)
@given(axes(), st.integers(100, 300), st.integers(150, 300), st.integers(0, 60))
def test_walk_forward_equals_brute_force(axis, test, valid, embargo):
    time, t1 = axis
    folds = walk_forward(time, t1, test * HOUR, valid * HOUR, 300 * HOUR, embargo * HOUR)
    at = (time - time[0]) // HOUR
    end = (t1 - time[0]) // HOUR
    before = 2 * embargo + valid + 300
    assert folds
    assert len(folds) * test + before <= at[-1] < (len(folds) + 1) * test + before     # all that fit
    for k, f in zip(range(len(folds), 0, -1), folds):
        start = at[-1] - k * test
        valid_end = start - embargo
        valid_start = valid_end - valid
        train_end = valid_start - embargo
        want = dict(train=[], valid=[], test=[])
        for i, (a, b) in enumerate(zip(at.tolist(), end.tolist())):
            if a <= train_end and b <= valid_start: want['train'].append(i)
            if valid_start < a <= valid_end and b <= start: want['valid'].append(i)
            if start < a <= start + test: want['test'].append(i)
        for name, positions in want.items(): assert getattr(f, name).tolist() == positions


@settings(max_examples=60, deadline=None)
@given(axes(), st.integers(0, 60))
def test_no_label_reaches_into_a_later_part(axis, embargo):
    time, t1 = axis
    folds = walk_forward(time, t1, '200h', '200h', '300h', embargo * HOUR)
    for f in folds:
        assert t1[f.train].max() < time[f.valid].min()
        assert t1[f.train].max() < time[f.test].min()
        assert t1[f.valid].max() < time[f.test].min()
        assert time[f.valid].min() - time[f.train].max() > embargo * HOUR
        assert time[f.test].min() - time[f.valid].max() > embargo * HOUR
    tests = np.concatenate([f.test for f in folds])
    assert tests.tolist() == list(range(tests[0], len(time)))                        # contiguous, each once, to the end
    for a, b in zip(folds, folds[1:]): assert set(a.train) < set(b.train)            # expanding


@settings(max_examples=25, deadline=None)
@given(axes(), st.integers(3, 7), st.integers(0, 40), st.data())
def test_combinatorial_equals_brute_force(axis, n, embargo, data):
    time, t1 = axis
    k = data.draw(st.integers(1, 2))
    folds = combinatorial(time, t1, n, k, embargo * HOUR)
    unique = sorted(set(time))
    order = {a: i for i, a in enumerate(unique)}
    group = np.array([order[a] * n // len(unique) for a in time])
    members = [np.flatnonzero(group == g) for g in range(n)]
    assert len(folds) == comb(n, k)
    for tested, f in zip(combinations(range(n), k), folds):
        assert f.test.tolist() == np.flatnonzero(np.isin(group, tested)).tolist()
        assert len(f.valid) == 0
        bad = np.zeros(len(time), bool)
        for g in tested:
            first = time[members[g]].min()
            last = t1[members[g]].max()
            bad |= np.array((t1 >= first) & (time <= last + embargo * HOUR))
        assert f.train.tolist() == np.flatnonzero(~bad).tolist()
    for m in members:
        assert sum(np.isin(m, f.test).all() for f in folds) == comb(n - 1, k - 1)


@pytest.mark.parametrize('n, k', [(6, 2), (5, 1), (7, 3), (10, 8)])
def test_paths_cover_every_group_once_with_folds_that_test_it(n, k):
    tested = list(combinations(range(n), k))
    p = paths(n, k)
    assert p.shape == (comb(n - 1, k - 1), n) == (comb(n, k) * k // n, n)   # the book's count, k / N * C(N, k)
    for g in range(n):
        assert all(g in tested[i] for i in p[:, g])
        assert len(set(p[:, g])) == len(p)
    assert sorted(p.ravel()) == sorted(np.repeat(np.arange(comb(n, k)), k))   # each fold's test groups are used once


def test_too_little_history_says_how_much_is_needed():
    time = hourly(24 * 100)
    with pytest.raises(ValueError, match=r'history too short: 1 fold.* need 140 days .*got 99 days'):
        walk_forward(time, time + HOUR, '30D', '20D', '80D', '5D')
    with pytest.raises(ValueError, match='3 fold.* need 120 days'):
        walk_forward(time, time + HOUR, '30D', '5D', '15D', '5D', n_folds=3)
    assert len(walk_forward(time, time + HOUR, '30D', '5D', '15D', '5D')) == 2
    assert len(walk_forward(time, time + HOUR, '30D', '5D', '15D', '5D', n_folds=1)) == 1


@pytest.mark.parametrize('kwargs, word', [
    (dict(test='0D'), 'positive'),
    (dict(valid='-1D'), 'positive'),
    (dict(embargo='-1h'), 'not negative'),
    (dict(n_folds=0), 'n_folds'),
])
def test_bad_lengths_are_refused(kwargs, word):
    time = hourly(2400)
    lengths = dict(test='10D', valid='5D', min_train='20D', embargo='1D') | kwargs
    with pytest.raises(ValueError, match=word): walk_forward(time, time + HOUR, **lengths)


@pytest.mark.parametrize('match, axis', [
    ('2400 samples and t1 has 2399', lambda time: (time, time[1:])),
    ('sorted', lambda time: (time[::-1], time[::-1] + HOUR)),
    ('2400 labels end before', lambda time: (time, time - HOUR)),
    ('time zone', lambda time: (time, (time + HOUR).tz_localize(None))),
    ('0 decision times and 1 label ends are missing', lambda time: (time, (time + HOUR).where(time != time[5]))),
    ('no samples', lambda time: (time[:0], time[:0])),
])
def test_a_bad_axis_is_refused(match, axis):
    with pytest.raises(ValueError, match=match): walk_forward(*axis(hourly(2400)), '10D', '5D', '20D', '1D')


def test_a_part_without_decisions_is_named():
    time = hourly(2400)
    time = time[(time < '2022-03-01') | (time > '2022-03-20')]
    with pytest.raises(ValueError, match='the (valid|test) part between .* is empty'):
        walk_forward(time, time + HOUR, '10D', '5D', '20D', '1D')


def test_long_labels_are_purged_even_without_embargo():
    time = hourly(1000)
    t1 = (time + HOUR).where(np.arange(1000) != 300, time[-1])         # one position held to the end
    for f in walk_forward(time, t1, '200h', '100h', '400h', '0h'):
        assert 299 in f.train
        assert 300 not in f.train
        assert 301 in f.train


def test_combinatorial_folds_against_another_library():
    """Training sizes of holdout-backtest 0.1.0, combinatorial_purged_cv(5, 2) of 100 hours, labels of 6 hours, embargo
    of 4 hours after them (10 rows there); purgedcv 0.1.11 cuts the same folds"""
    time = hourly(100)
    folds = combinatorial(time, time + 6 * HOUR, 5, 2, '4h')
    assert [len(f.train) for f in folds] == [50, 34, 34, 44, 44, 28, 38, 44, 38, 54]


def nearest(train, test):
    "The training position nearest to each test position; the earlier of two"
    right = np.clip(np.searchsorted(train, test), 0, len(train) - 1)
    left = np.clip(right - 1, 0, None)
    earlier = np.abs(train[left] - test) <= np.abs(train[right] - test)
    return np.where(earlier, train[left], train[right])


def test_unpurged_splits_flatter_a_nearest_neighbour_on_noise():
    "Labels of 24 overlapping noise terms; the learner answers with the training label nearest in time"
    rng = np.random.default_rng(0)
    h = 24
    time = hourly(1200)
    def skill(t1):
        scores = []
        for _ in range(60):
            y = np.convolve(rng.standard_normal(len(time) + h), np.ones(h), 'valid')[1:]
            for f in combinatorial(time, t1, 12, 1, '0h'):
                answer = y[nearest(f.train, f.test)]
                scores.append((answer * y[f.test]).mean() / h)
        return np.mean(scores), np.std(scores) / np.sqrt(len(scores))
    naive, error = skill(time)
    assert naive > 5 * error
    purged, error = skill(time + h * HOUR)
    assert abs(purged) < 4 * error


def test_folds_can_be_drawn():
    time = hourly(1000)
    folds = walk_forward(time, time + HOUR, '200h', '100h', '400h', '24h')
    ax = plot_folds(folds, time)
    assert len(ax.patches) == 3 * len(folds)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['train', 'valid', 'test']


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30))
def test_uniqueness_is_the_mean_share_of_every_hour(seed, longest):
    "The book's snippets 4.1 and 4.2: count the labels of each bar, average over the bars of a label"
    rng = np.random.default_rng(seed)
    start = np.sort(rng.integers(0, 60, 40))
    end = start + rng.integers(1, longest + 1, 40)
    bars = np.arange(60 + longest)
    inside = (bars >= start[:, None]) & (bars < end[:, None])                  # [labels, bars]
    shares = inside / np.maximum(inside.sum(0), 1)
    expected = shares.sum(1) / inside.sum(1)
    begin = pd.Timestamp('2022-01-01', tz='UTC')
    u = uniqueness(begin + pd.to_timedelta(start, 'h'), begin + pd.to_timedelta(end, 'h'))
    np.testing.assert_allclose(u, expected, rtol=1e-12)
    minutes = uniqueness(begin + pd.to_timedelta(start, 'min'), begin + pd.to_timedelta(end, 'min'))
    np.testing.assert_allclose(minutes, u, rtol=1e-12)                         # no unit in it


def test_labels_of_equal_spans_count_the_time_they_cover():
    time = hourly(100)
    u = uniqueness(time, time + 10 * HOUR)
    assert u.sum() == pytest.approx(109 / 10)                                  # 109 hours, 10 a label
    with pytest.raises(ValueError, match='3 labels are known when they begin, first at 2022-01-01'):
        uniqueness(time[:3], time[:3])


def test_recency_halves():
    time = hourly(49)
    w = recency(time, '24h')
    assert w[[0, 24, 48]].tolist() == [.25, .5, 1]
    assert np.allclose(w[1:] / w[:-1], 2 ** (1 / 24))
    with pytest.raises(ValueError, match='half_life must be above 0'): recency(time, '-1h')
