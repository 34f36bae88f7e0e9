"Temperatures, intervals and rarity: against plain second implementations, and what must hold for any input"
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from cryptoml.calibration import (ETA, KEEP, LEVELS, MOST, ODD, Bands, Familiar, Intervals, Said, Scores, bands_arrays,
                                  bands_of, calibration_error, interval_arrays, intervals_of, temperature, tempered)


@given(st.integers(0, 10**6), st.floats(.5, 2))
@settings(max_examples=30, deadline=None)
def test_temperatures_multiply_and_keep_the_order(seed, t):
    p = np.random.default_rng(seed).dirichlet(np.full(4, 3.), 20)
    once = tempered(p, t)
    assert once.sum(-1) == pytest.approx(1)
    assert (once.argmax(-1) == p.argmax(-1)).all()
    assert tempered(once, 1 / t) == pytest.approx(p, abs=1e-6)


@pytest.mark.parametrize('true', [.5, 1., 3.])
def test_the_temperature_is_where_the_slope_is_zero(true):
    rng = np.random.default_rng(0)
    honest = rng.dirichlet(np.ones(3), 20_000)
    came = (rng.random(len(honest))[:, None] > honest.cumsum(1)).sum(1)
    said = tempered(honest, 1 / true)
    t = temperature(said, came)
    z = np.log(said)
    mean = (tempered(said, t) * z).sum(1)
    assert np.mean(mean - z[np.arange(len(z)), came]) == pytest.approx(0, abs=1e-3)   # d loss / d (1/T)
    assert t == pytest.approx(true, rel=.05)


def test_perfect_forecasts_show_what_chance_shows():
    rng = np.random.default_rng(1)
    shown = []
    for k in range(40):
        p = rng.dirichlet(np.ones(3), 400)
        came = (rng.random(400)[:, None] > p.cumsum(1)).sum(1)
        e = calibration_error(came, p, 400, seed=k)
        shown.append(e.shown - e.by_chance)
    assert abs(np.mean(shown)) < .004


@given(st.lists(st.floats(-5, 5), max_size=60), st.integers(1, 20), st.floats(.01, .5))
@settings(deadline=None)
def test_scores_are_the_last_ones_sorted(values, keep, a):
    scores = Scores(keep=keep)
    for v in values: scores.add(v)
    last = values[-keep:]
    assert list(scores.came) == last and scores.ordered == sorted(last)
    rank = math.ceil((len(last) + 1) * (1 - a))
    assert scores.beyond(a) == (sorted(last)[rank - 1] if rank <= len(last) else 1.)


def plainly(said, y, when, known, step):
    "The same intervals with lists that are sorted anew each time, one level"
    a, given = (1 - .9) / 2, []
    past = {g: ([], []) for g in range(3)}
    c = np.zeros((3, 2))
    learnt = 0
    for s, f in enumerate(said):
        while learnt < s and known[learnt] <= when[s]:
            old, (lo, hi) = said[learnt], given[learnt]
            if np.isfinite(y[learnt]):
                for k, outside in enumerate((y[learnt] < lo, y[learnt] > hi)):
                    c[old.group, k] = min(max(c[old.group, k] + step * (outside - a), -MOST), MOST)
                past[old.group][0].append((old.centre - y[learnt]) / old.below)
                past[old.group][1].append((y[learnt] - old.centre) / old.above)
            learnt += 1
        reach = []
        for k in range(2):
            scores = sorted(past[f.group][k][-KEEP:])
            rank = math.ceil((len(scores) + 1) * (1 - a))
            own = scores[rank - 1] if rank <= len(scores) else 1.
            reach.append(max(own, 0) * math.exp(c[f.group, k]))
        given.append((f.centre - reach[0] * f.below, f.centre + reach[1] * f.above))
    return np.array(given)


def history(n=700, seed=0):
    rng = np.random.default_rng(seed)
    said = [Said(*row, int(g)) for row, g in zip(np.c_[rng.normal(size=n), rng.uniform(.5, 2, (n, 2))],
                                                 rng.integers(0, 3, n))]
    y = np.array([f.centre for f in said]) + 1.3 * rng.standard_t(3, n)
    y[rng.random(n) < .05] = np.nan
    when = np.arange(n) // 3
    return said, y, when, when + 5


def follow(i, said, y, when, known, begin=0):
    "A history from some decision on; a decision is its place, and when"
    what = [(s, int(t)) for s, t in enumerate(when)]
    return i.follow(said[begin:], what[begin:], when[begin:], known[begin:], lambda d: y[d[0]])


def test_intervals_equal_a_plain_second_implementation():
    said, y, when, known = history()
    i = Intervals(overlap=15)
    assert follow(i, said, y, when, known)[:, 1] == pytest.approx(plainly(said, y, when, known, ETA / 15), abs=1e-12)


def test_a_history_in_two_halves_is_the_history_in_one():
    said, y, when, known = history()
    one = follow(Intervals(overlap=15), said, y, when, known)
    first, cut = Intervals(overlap=15), 300
    begun = follow(first, said[:cut], y, when[:cut], known[:cut])
    assert first.waiting                                     # labels that the second half will know
    second = intervals_of(interval_arrays(first), overlap=15)
    assert np.array_equal(np.concatenate([begun, follow(second, said, y, when, known, cut)]), one)


def test_bands_are_the_intervals_of_each_horizon_in_any_order_of_the_samples():
    rng = np.random.default_rng(4)
    coin, when = (x.ravel() for x in np.indices((3, 150)))
    reach, third = rng.uniform(.5, 2, (450, 2)), rng.integers(0, 3, 450)
    y, wait = rng.standard_t(3, (450, 2)) * reach, np.array([3, 9])
    y[rng.random((450, 2)) < .05] = np.nan
    odd = rng.random(450) < .1
    given = Bands([6, 18]).follow(reach, third, coin, when, wait, y, odd)
    order = np.lexsort((coin, when))
    for j in range(2):
        said = [Said(0., 1.6449 * r, 1.6449 * r, int(g)) for r, g in zip(reach[order, j], third[order])]
        t, outcome = when[order], np.where(odd, np.nan, y[:, j])[order]
        assert np.array_equal(given[order, j], follow(Intervals([6, 18][j]), said, outcome, t, t + wait[j]))
    mixed = rng.permutation(450)
    again = Bands([6, 18]).follow(reach[mixed], third[mixed], coin[mixed], when[mixed], wait, y[mixed], odd[mixed])
    assert np.array_equal(again, given[mixed])


@pytest.mark.parametrize('reach, known', [
    ([1., 1.], [3, 5]),
    ([np.inf, 1.], [9, 11]),
    ([1.7e308, 1.], [9, 11]),
    ([0., 1.], [9, 11]),
    ([np.nan, 1.], [9, 11]),
], ids=str)
def test_what_cannot_be_kept_does_not_wait(reach, known):
    "An older decision than those that wait, or a distance that is no number: it is answered, and the state can be read"
    b = Bands([6., 18.])
    b.give(np.array([1., 1.]), 1, (0, 2), [6, 8])
    with np.errstate(all='ignore'): b.give(np.array(reach), 1, (1, 1), known)
    assert [len(i.waiting) for i in b.each] == [1, 1]
    b.hear(10, lambda what, j: 1e300)
    assert len(bands_of(bands_arrays(b), [6., 18.]).each[0].scores[1][0].came) == 1

def test_a_label_that_cannot_be_told_yet_waits_on():
    "A bot that asks about one coin tells nothing of the others"
    b = Bands([6.])
    for coin in (0, 1): b.give(np.array([1.]), 1, (coin, 2), [6])
    b.hear(9, lambda what, j: .5 if what[0] == 1 else None)
    assert [w.what for w in b.each[0].waiting] == [(0, 2)] and len(b.each[0].scores[1][0].came) == 1
    b.hear(9, lambda what, j: -.5)
    assert not b.each[0].waiting and list(b.each[0].scores[1][0].came) == pytest.approx([-.5 / 1.6449, .5 / 1.6449])

def test_a_label_that_is_beyond_all_numbers_teaches_nothing():
    b = Bands([6.])
    b.give(np.array([1e-300]), 1, (0, 2), [6])
    with np.errstate(all='ignore'): b.hear(6, lambda what, j: 1e300)
    assert not b.each[0].scores[1][0].came
    bands_of(bands_arrays(b), [6.])

def test_a_decision_waits_once_and_two_threads_may_ask():
    b = Bands([6.])
    for _ in range(3): b.give(np.array([1.]), 1, (0, 5), [9])
    assert len(b.each[0].waiting) == 1
    b.hear(8, lambda what, j: 1 / 0)                         # not known yet: nobody asks what came
    b.hear(9, lambda what, j: .5)
    assert not b.each[0].waiting and len(b.each[0].scores[1][0].came) == 1
    back = bands_of(bands_arrays(b), [6.])
    assert np.array_equal(back.bounds(np.array([2.]), 1), b.bounds(np.array([2.]), 1))


def test_labels_change_nothing_before_they_are_known():
    said, y, when, known = history()
    changed = y.copy()
    changed[400:] = 50.
    a, b = (follow(Intervals(overlap=15), said, v, when, known) for v in (y, changed))
    same = when < known[400]
    assert np.array_equal(a[same], b[same]) and not np.array_equal(a, b)


@pytest.mark.parametrize('level', LEVELS)
def test_coverage_of_heavy_tails_in_every_third(level):
    rng = np.random.default_rng(2)
    n = 30_000
    group = rng.integers(0, 3, n)
    y = rng.standard_t(3, n) * np.array([.5, 1., 3.])[group]
    said = [Said(0., 1., 1., int(g)) for g in group]
    b = follow(Intervals(overlap=6), said, y, np.arange(n), np.arange(n) + 6)[:, LEVELS.index(level)]
    inside = (y > b[:, 0]) & (y < b[:, 1])
    assert np.isfinite(b).all()
    for g in range(3): assert inside[(group == g) & (np.arange(n) > 3000)].mean() == pytest.approx(level, abs=.01)


@pytest.mark.parametrize('wrong', [
    dict(offset=np.full((3, 2, 2), np.nan)),
    dict(offset=np.full((3, 2, 2), 2 * MOST)),
    dict(offset=np.zeros((3, 1, 2))),
    dict(scores=np.zeros((3, 2, 7))),
    dict(scores=np.full((3, 2, KEEP), np.inf)),
    dict(scores=np.where(np.arange(KEEP) == 5, 1., np.nan) * np.ones((3, 2, 1))),
    dict(waiting=np.zeros((2, 3), np.int64)),
    dict(waiting=np.zeros((1, 3)), said=np.ones((1, 4)), given=np.zeros((1, 2, 2))),
    dict(waiting=np.zeros((1, 3), np.int64), said=np.array([[0., 1, 1, 3]]), given=np.zeros((1, 2, 2))),
    dict(waiting=np.zeros((1, 3), np.int64), said=np.array([[0., 1, 0, 1]]), given=np.zeros((1, 2, 2))),
    dict(waiting=np.zeros((1, 3), np.int64), said=np.ones((1, 4)), given=np.array([[[1., -1], [0, 0]]])),
    dict(waiting=np.array([[5, 0, 0], [4, 0, 0]]), said=np.ones((2, 4)), given=np.zeros((2, 2, 2))),
])
def test_a_state_that_no_label_can_have_given_is_refused(wrong):
    state = interval_arrays(Intervals(overlap=6))
    with pytest.raises(ValueError, match='no state of|no label can have given'):
        intervals_of(state | wrong, overlap=6)


def rows(rng, n, F=30):
    causes = np.random.default_rng(9).normal(size=(4, F))
    return np.clip(rng.normal(size=(n, 4)) @ causes / 2 + .3 * rng.normal(size=(n, F)), -5, 5)


def test_ordinary_rows_are_called_odd_as_rarely_as_said():
    often = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        held, fresh = rows(rng, 400), rows(rng, 400)
        f = Familiar.fit(rows(rng, 800), held, np.zeros(400), 5.)
        often.append((f.rarity(fresh, np.zeros(400), 5.) < ODD).mean())
    assert np.mean(often) <= ODD


def test_rarity_is_a_share_and_every_statistic_can_raise_it():
    rng = np.random.default_rng(0)
    held = rows(rng, 400)
    f = Familiar.fit(rows(rng, 800), held, np.zeros(400), 5.)
    usual = rows(rng, 50)
    at_clip = usual.copy()
    at_clip[:, ::2] = 5.
    along = usual + 8 * f.directions[:, 0] * f.spread[0]
    across = usual + 3 * np.linalg.svd(f.directions.T)[2][-1] * np.sqrt(30)
    for z, gone in ((usual, .5), (at_clip, 0), (along, 0), (across, 0)):
        r = f.rarity(z, np.full(50, gone), 5.)
        assert (r >= 0).all() and (r <= 1).all() and (r < ODD).mean() > .95
