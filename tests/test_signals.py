"Rules of the signal on any forecast: order of stop and target, bounds, doubts, terms (suites 7, 8, 11)"
import json, math, pickle
from dataclasses import asdict, fields, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, example, given, settings, strategies as st

from cryptoml.data import DataError
from cryptoml.policy import Policy
from cryptoml.signals import MaxAge, Prediction, Signal, Terms, book_weights, confidence, doubts, make_signal, stops, target_weight, threshold
from cryptoml.state import StateError

TERMS = Terms(['BTC/USDT', 'ETH/USDT'], '1h', '2024-03-01T00:00:00+00:00', '2024-06-01T00:00:00+00:00', .0014, .55, dict(rsi_14=.01), 'INCONCLUSIVE', asdict(Policy()))
NOON, LATER = '2024-06-02T12:00:00+00:00', '2024-06-02 12:01'
REGIMES = ('BULL', 'BEAR', 'RANGING', 'HIGH_VOL')

def written(**changed):
    "A prediction in good order"
    return Prediction(symbol='BTC/USDT', data_time=NOON, price=100., faults=[], horizons=[4, 24], direction=[dict(DOWN=.3, SIDEWAYS=.3, UP=.4)] * 2, relative=[0., .1], relative_up=[.5, .55],
        quantile_levels=[.05, .5, .95], quantiles=[[-.01, .001, .012], [-.03, .004, .04]], volatility=[.005, .006], volatility_quantiles=[[.003, .005, .008]] * 2,
        regime=dict(zip(REGIMES, (.5, .1, .3, .1))), size=[.2, .6], sigma=.005, confidence=.4 / .7, in_sample=False, notes=[],
        inputs=[dict(name='rsi_14', value=1.2, importance=.01)], attention=[dict(bars_ago=1, weight=.2)], coins=[dict(symbol='ETH/USDT', weight=.6)]) | changed

real = lambda lo, hi: st.floats(lo, hi, allow_nan=False)
shares = lambda n: st.lists(real(1e-3, 1), min_size=n, max_size=n).map(lambda x: [v / sum(x) for v in x])

@st.composite
def predictions(draw):
    "Any finite prediction of one horizon: probabilities that sum to one, rising quantiles, sizes in -1 to 1"
    d = draw(shares(3)); size = draw(real(-1, 1)); q = sorted(draw(st.lists(real(-.7, .7), min_size=5, max_size=5)))
    d = dict(zip(('DOWN', 'SIDEWAYS', 'UP'), d))
    c = d['UP' if size > 0 else 'DOWN'] / (d['UP'] + d['DOWN'])
    v = sorted(draw(st.lists(real(1e-6, .3), min_size=5, max_size=5)))
    return written(price=draw(real(1e-8, 1e6)), horizons=[24], direction=[d], relative=[draw(real(-3, 3))], relative_up=[draw(real(0, 1))], quantile_levels=[.05, .25, .5, .75, .95], quantiles=[q],
                   volatility=[v[2]], volatility_quantiles=[v], regime=dict(zip(REGIMES, draw(shares(4)))), size=[size], sigma=draw(st.sampled_from([0., 1e-12]) | real(1e-5, .3)), confidence=c)

policies = st.builds(Policy, target_annual=real(.01, 2), max_weight=real(.01, 1), max_gross=real(.01, 3), long_only=st.booleans(), correlation=real(0, .95))

def in_order(s, p):
    "What must hold of every signal"
    assert set(s) == set(Signal.__annotations__) and json.loads(json.dumps(s, allow_nan=False)) == s
    assert s['action'] in ('BUY', 'SELL', 'HOLD') and 0 <= s['position_size'] <= 1 and 0 <= s['confidence'] <= 1 and s['reasoning'] and all(map(str.strip, s['reasoning']))
    assert s['target'] is None or -1 <= s['target'] <= 1
    if s['action'] == 'HOLD': assert s['stop_loss'] is None and s['take_profit'] is None and s['position_size'] < 1e-3
    if s['action'] == 'BUY': assert 0 < s['stop_loss'] < p['price'] < s['take_profit'] and s['target'] > 0 and s['position_size'] == s['target']
    if s['action'] == 'SELL': assert s['stop_loss'] > p['price'] > s['take_profit'] > 0 and s['target'] < 0 and s['position_size'] == -s['target']

# ---- any finite forecast

@settings(max_examples=400, deadline=None)
@given(predictions(), policies, st.none() | real(0, 1), st.none() | real(0, 1))
@example(written(quantiles=[[-1e-18, 0, 1e-18]] * 2), Policy(), 0., None)              # the prices are the same number
@example(written(sigma=0.), Policy(), 0., None)                                        # a pair that never moved
def test_any_finite_prediction(p, policy, least, measured):
    terms = replace(TERMS, policy=asdict(policy), threshold=measured)
    s, asked = make_signal(p, terms, least, LATER), measured if least is None else least
    if s is None: assert asked is None or p['confidence'] < asked
    else:
        in_order(s, p)
        assert s['symbol'] == p['symbol'] and s['data_time'] == p['data_time'] and s['horizon'] == p['horizons'][-1]
        if s['action'] != 'HOLD': assert asked is not None and p['confidence'] >= asked and np.sign(s['target']) == np.sign(p['size'][-1]) and not (policy.long_only and s['action'] == 'SELL')
        if s['action'] != 'HOLD': assert abs(s['target']) <= policy.max_weight
    assert make_signal(p, terms, least, LATER) == s                                    # asked twice

@pytest.mark.parametrize('key', ['price', 'sigma', 'confidence', 'size', 'quantiles'])
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none(key, bad):
    "A network that answered nonsense is never acted on"
    p = written(**{key: [bad, bad] if key == 'size' else [[bad, bad, bad]] * 2 if key == 'quantiles' else bad})
    s = make_signal(p, TERMS, 0., LATER)
    if s is not None: in_order(s, p); assert s['action'] == 'HOLD'

@given(st.lists(real(.001, 1), min_size=3, max_size=3), real(-1, 1))
def test_confidence_is_a_probability(d, size):
    d = np.array(d) / sum(d)
    c = float(confidence(d, np.float64(size)))
    assert 0 <= c <= 1 and c == pytest.approx(1 - confidence(d[::-1], np.float64(size)), abs=1e-9)

# ---- the book

books = st.integers(1, 12).flatmap(lambda n: st.tuples(*(st.lists(e, min_size=n, max_size=n).map(np.array) for e in (real(-1, 1) | st.just(math.nan), real(1e-5, .3) | st.just(math.nan)))))

@settings(max_examples=200, deadline=None)
@given(books, policies)
def test_book_within_its_bounds(book, policy):
    size, sigma = book
    w = book_weights(size, sigma, policy)
    none = np.isnan(size) | np.isnan(sigma)
    assert np.isnan(w[none]).all() and np.isfinite(w[~none]).all()                     # nothing of nothing, something of something
    w = np.nan_to_num(w)
    assert np.abs(w).max() <= policy.max_weight + 1e-12 and np.abs(w).sum() <= policy.max_gross + 1e-9 and (w * np.nan_to_num(size) >= 0).all()
    if policy.long_only: assert (w >= 0).all()

@settings(max_examples=100, deadline=None)
@given(st.integers(2, 8), st.randoms(use_true_random=False), policies)
def test_book_is_the_policy_at_once(n, rnd, policy):
    size, sigma = np.array([rnd.uniform(-1, 1) for _ in range(n)]), np.array([rnd.uniform(1e-4, .05) for _ in range(n)])
    policy = replace(policy, rate=1.)
    np.testing.assert_allclose(book_weights(size, sigma, policy), policy.next_weights(policy.start(n), size, sigma)[0], rtol=1e-12, atol=1e-12)

# ---- doubts

@pytest.mark.parametrize('late, word', [('0s', None), ('59min', None), ('60min', 'stale'), ('3h', 'stale'), ('400D', 'stale'), ('-59s', None), ('-61s', 'clock'), ('-2h', 'clock'), ('-400D', 'clock')])
def test_age_of_the_bar(late, word):
    now = pd.Timestamp(NOON) + pd.Timedelta(late)
    for form in (now, now.tz_convert('Asia/Kolkata'), now.tz_localize(None), now.to_pydatetime(), str(now), now.isoformat(), now.timestamp(), int(now.timestamp() * 1000)):
        s = make_signal(written(), TERMS, 0., form)
        assert s['action'] == ('BUY' if word is None else 'HOLD') and (word is None or word in s['reasoning'][0]), form
    wide = MaxAge(data='500D', skew='500D')
    assert make_signal(written(), TERMS, 0., now, wide)['action'] == 'BUY'

def test_doubts_add_up():
    p = written(in_sample=True, quantiles=[[.01, .02, .03]] * 2)
    found = doubts(p, TERMS, pd.Timestamp('2024-06-03', tz='UTC'))
    assert [f.split(':')[0] for f in found] == ['stale', 'in sample', 'one-sided']
    assert make_signal(p, TERMS, 0., '2024-06-03')['reasoning'] == found

def test_faults_come_first():
    none = dict.fromkeys(Prediction.__annotations__) | dict(symbol='BTC/USDT', faults=['NaN in close of the newest bar'], horizons=[4, 24], quantile_levels=[.05, .5, .95], in_sample=False, notes=[])
    for p in (none, none | dict(data_time=NOON), none | dict(faults=[])):
        s = make_signal(p, TERMS, 0., LATER)
        in_order(s, p); assert (s['action'], s['target'], s['confidence'], s['position_size']) == ('HOLD', None, 0., 0.)

def test_without_a_clock_the_wall_clock_counts():
    assert 'stale' in make_signal(written(), TERMS, 0.)['reasoning'][0]
    fresh = pd.Timestamp.now('UTC').floor('h')
    recent = replace(TERMS, data_until=(fresh - pd.Timedelta('2D')).isoformat())
    assert make_signal(written(data_time=fresh.isoformat()), recent, 0.)['action'] == 'BUY'

@pytest.mark.parametrize('least', [-.01, 1.01, 65, math.nan, math.inf])
def test_min_confidence_is_a_probability(least):
    with pytest.raises(ValueError, match='min_confidence'): make_signal(written(), TERMS, least, LATER)

# ---- the threshold

def test_threshold_needs_enough():
    rng = np.random.default_rng(0)
    day = np.arange(300).repeat(4); sure = rng.uniform(.5, .6, 1200)
    assert threshold(sure, np.full(1200, math.nan), day) is None and threshold(sure[:0], sure[:0], day[:0]) is None
    assert threshold(sure, np.full(1200, .01), np.zeros(1200, int)) is None             # all on one day: says nothing of other days
    good = np.where(rng.random(1200) < .6, .01, -.01)
    assert threshold(sure, good, day) == pytest.approx(sure.min())
    assert threshold(np.r_[sure, .99], np.r_[good, math.nan], np.r_[day, 300]) == threshold(sure, good, day)   # what is not known yet does not count

# ---- terms

def test_terms_round_trip():
    assert Terms.read(dict(terms=json.loads(json.dumps(asdict(TERMS))))) == TERMS
    assert Terms.read(dict(terms=asdict(TERMS) | dict(of_a_later_version=1))) == TERMS
    assert pickle.loads(pickle.dumps(TERMS)) == TERMS

@pytest.mark.parametrize('key', ['symbols', 'timeframe', 'trained_until', 'data_until', 'round_trip', 'threshold', 'importance', 'verdict'])
def test_terms_that_miss_something(key):
    with pytest.raises(StateError, match='train it again'): Terms.read(dict(terms={k: v for k, v in asdict(TERMS).items() if k != key}))
