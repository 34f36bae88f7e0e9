"Threshold and reach: against loops by hand, closed forms and mirrors (suite 7)"
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from cryptoml.gate import EVEN, Positions, Reach, confidence, excursions, measure_reach, pays, threshold, worth

@given(st.lists(st.floats(.001, 1), min_size=3, max_size=3), st.floats(-1, 1))
def test_confidence_is_a_probability(direction, size):
    direction = np.array(direction) / sum(direction)
    c = float(confidence(direction, np.float64(size)))
    mirrored = confidence(direction[::-1], np.float64(size))
    assert 0 <= c <= 1
    assert c == pytest.approx(1 - mirrored, abs=1e-9)

def positions(seed=0, days=300, right=.5, cost=.001):
    "Four positions a day, on moves of 1 % either way, of which a share is right"
    rng = np.random.default_rng(seed)
    day = np.arange(days).repeat(4)
    move = rng.choice([-.01, .01], len(day))
    side = np.where(rng.random(len(day)) < right, np.sign(move), -np.sign(move))
    return Positions(rng.uniform(.5, .6, len(day)), side, move, day, cost, .25)

# ---- what it was worth

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.floats(.5, .59))
def test_worth_is_the_formula(seed, least):
    p = positions(seed)
    on = p.sure >= least
    net = np.mean([s * r - p.cost for s, r in zip(p.side[on], p.move[on])])
    held = p.side[on].mean() * p.move.mean()
    assert worth(p, least).value == pytest.approx(net - held, abs=1e-12)

def test_a_mirrored_market_is_worth_the_same():
    p = positions(right=.6)
    mirror = p._replace(side=-p.side, move=-p.move)
    assert worth(mirror, .5) == pytest.approx(worth(p, .5))
    assert threshold(mirror) == threshold(p)

def test_the_order_of_positions_tells_nothing():
    p = positions(right=.6)
    order = np.random.default_rng(1).permutation(len(p.sure))
    shuffled = p._replace(**{k: getattr(p, k)[order] for k in ('sure', 'side', 'move', 'day')})
    assert worth(shuffled, .52) == pytest.approx(worth(p, .52))

# ---- the threshold

def test_what_pays_lets_everything_through():
    p = positions(right=.65)
    assert threshold(p) == pytest.approx(p.sure.min())

def test_holding_in_a_rising_market_is_no_skill():
    p = positions()
    rising = p._replace(side=np.ones(len(p.side)), move=np.abs(p.move))
    assert (rising.side * rising.move).mean() > p.cost
    assert threshold(rising) is None

def test_a_confidence_under_one_half_is_never_enough():
    p = positions(right=.65)
    assert threshold(p._replace(sure=p.sure - .2)) is None
    some = np.where(np.arange(len(p.sure)) % 2 == 0, p.sure, .2)
    assert threshold(p._replace(sure=some)) >= EVEN

def test_what_is_not_known_yet_does_not_count():
    p = positions(right=.65)
    later = p._replace(sure=np.append(p.sure, .99), side=np.append(p.side, 1.), move=np.append(p.move, np.nan),
                       day=np.append(p.day, 300))
    assert threshold(later) == threshold(p)

def none(p): return p._replace(sure=p.sure[:0], side=p.side[:0], move=p.move[:0], day=p.day[:0])

@pytest.mark.parametrize('case', [
    pytest.param(lambda p: p._replace(move=np.full(len(p.move), np.nan)), id='nothing is known'),
    pytest.param(none, id='no position'),
    pytest.param(lambda p: p._replace(side=np.zeros(len(p.side))), id='no side'),
    pytest.param(lambda p: p._replace(day=np.zeros(len(p.day), int)), id='one day alone'),
    pytest.param(lambda p: p._replace(day=p.day // 20), id='fifteen days'),
    pytest.param(lambda p: p._replace(overlap=10.), id='fifteen blocks of two horizons'),
    pytest.param(lambda p: p._replace(cost=.02), id='costs more than it moves'),
])
def test_threshold_needs_enough(case):
    good = positions(right=.65)
    assert threshold(good) is not None
    assert threshold(case(good)) is None

def test_confirmation_looks_at_the_figures_alone():
    p = positions(days=30, right=.8)
    assert pays(p, .5)
    assert not pays(p._replace(side=-p.side), .5)
    assert not pays(p._replace(side=np.ones(len(p.side)), move=np.abs(p.move)), .5)

# ---- how far a path goes

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(1, 9))
def test_excursions_by_hand(seed, h):
    rng = np.random.default_rng(seed)
    open = np.exp(rng.normal(0, .1, (2, 30)))
    high, low = open * np.exp(rng.exponential(.05, (2, 30))), open * np.exp(-rng.exponential(.05, (2, 30)))
    hole = rng.random((2, 30)) < .05
    open[hole] = high[hole] = low[hole] = np.nan
    down, up = excursions(open, high, low, h)
    for n in range(2):
        for t in range(30):
            path = slice(t + 1, t + 1 + h)
            whole = t + h < 30 and not hole[n, path].any()
            assert np.isfinite(down[n, t]) == np.isfinite(up[n, t]) == whole
            if not whole: continue
            assert down[n, t] == pytest.approx(np.log(open[n, t + 1] / low[n, path].min()))
            assert up[n, t] == pytest.approx(np.log(high[n, path].max() / open[n, t + 1]))

def test_more_bars_than_there_are():
    flat = np.ones((1, 5))
    assert np.isnan(excursions(flat, flat, flat, 5)).all()

def test_reach_is_the_distance_of_one_path_in_ten():
    rng = np.random.default_rng(0)
    usual = rng.uniform(.01, .05, 5000)
    down, up = usual * rng.exponential(1, 5000), usual * rng.exponential(2, 5000)
    down[:100] = np.nan
    reach = measure_reach(down, up, usual)
    assert (reach.down, reach.up) == pytest.approx((np.log(10), 2 * np.log(10)), rel=.08)
    touched = reach.touched(down, up, usual)
    assert np.isnan(touched['down'][:100]).all()
    assert np.nanmean(touched['down']) == pytest.approx(.1, abs=.002)
    below, above = reach.levels(np.full(5000, 50.), usual)
    assert ((below < 50) & (50 < above)).all()
    reached = 50 * np.exp(-down) <= below
    assert (reached[100:] == (touched['down'][100:] == 1)).all()

def test_levels_are_prices_whatever_is_usual():
    below, above = Reach(2., 3.).levels(100., 5.)
    assert 0 < below < 100 < above
