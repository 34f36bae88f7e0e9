"Rules of the signal on any forecast: order of stop and target, bounds, doubts (suites 7, 8)"
import json, math
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings, strategies as st

from examples import CLOCKS, TERMS, policies, real
from cryptoml.calibration import ODD
from cryptoml.gate import Declared
from cryptoml.newest import Prediction
from cryptoml.policy import Policy
from cryptoml.signals import HELD, MaxAge, Signal, doubts, make_signal, parts_of_book

NOON = '2024-06-02T12:00:00+00:00'
LATER = '2024-06-02 12:01'
REGIMES = ('BULL', 'BEAR', 'RANGING', 'HIGH_VOL')

def written(**changed):
    "A prediction in good order"
    p = Prediction(
        symbol='BTC/USDT',
        data_time=NOON,
        price=100.,
        faults=[],
        horizons=[4, 24],
        direction=[dict(DOWN=.3, SIDEWAYS=.3, UP=.4)] * 2,
        relative=[0., .1],
        relative_up=[.5, .55],
        quantile_levels=[.05, .5, .95],
        quantiles=[[-.01, .001, .012], [-.03, .004, .04]],
        interval_levels=[.8, .9],
        intervals=[[[-.009, .01], [-.012, .013]], [[-.028, .03], [-.036, .039]]],
        volatility=[.005, .006],
        volatility_quantiles=[[.003, .005, .008]] * 2,
        regime=dict(zip(REGIMES, (.5, .1, .3, .1))),
        size=[.2, .6],
        sigma=.005,
        beta=1.,
        correlation=None,
        score=.6,
        confidence=.4 / .7,
        rarity=.5,
        in_sample=False,
        notes=[],
        inputs=[dict(name='rsi_14', value=1.2, contribution=.2)],
        attention=[dict(bars_ago=1, weight=.2)],
        coins=[dict(symbol='ETH/USDT', weight=.6)],
    )
    return p | changed

ONE = replace(TERMS, book=Declared.of('timing', 2, (24,), '1h').plain())      # of one horizon, as those drawn below
NEUTRAL = Declared.of('relative', 6, (24,), '1h')

def shares(n):
    "n positive numbers that sum to one"
    def divided(x): return [v / sum(x) for v in x]
    return st.lists(real(1e-3, 1), min_size=n, max_size=n).map(divided)

def rising(lo, hi): return st.lists(real(lo, hi), min_size=5, max_size=5).map(sorted)

@st.composite
def predictions(draw):
    "Any finite prediction of one horizon: probabilities that sum to one, rising quantiles, sizes in -1 to 1"
    direction = dict(zip(('DOWN', 'SIDEWAYS', 'UP'), draw(shares(3))))
    size = draw(real(-1, 1))
    side = 'UP' if size > 0 else 'DOWN'
    volatility = draw(rising(1e-6, .3))
    return written(
        price=draw(real(1e-8, 1e6)),
        horizons=[24],
        direction=[direction],
        relative=[draw(real(-3, 3))],
        relative_up=[draw(real(0, 1))],
        quantile_levels=[.05, .25, .5, .75, .95],
        quantiles=[draw(rising(-.7, .7))],
        intervals=[[[-draw(real(0, .7)), draw(real(0, .7))] for _ in range(2)]],
        volatility=[volatility[2]],
        volatility_quantiles=[volatility],
        regime=dict(zip(REGIMES, draw(shares(4)))),
        size=[size],
        score=size,
        sigma=draw(st.sampled_from([0., 1e-12]) | real(1e-5, .3)),
        beta=draw(st.none() | real(-3, 3)),
        correlation=draw(st.none() | st.fixed_dictionaries({'ETH/USDT': st.none() | real(-1, 1)})),
        rarity=draw(real(0, 1)),
        confidence=direction[side] / (direction['UP'] + direction['DOWN']),
    )

def in_order(s, p):
    "What must hold of every signal"
    assert set(s) == set(Signal.__annotations__)
    assert json.loads(json.dumps(s, allow_nan=False)) == s
    assert s['action'] in ('BUY', 'SELL', 'HOLD')
    assert 0 <= s['position_size'] <= 1
    assert 0 <= s['confidence'] <= 1
    assert s['reasoning'] and all(map(str.strip, s['reasoning']))
    assert s['target'] is None or -1 <= s['target'] <= 1
    assert (s['why'] in HELD) if s['action'] == 'HOLD' else s['why'] is None
    if s['action'] == 'HOLD':
        assert s['stop_loss'] is None and s['take_profit'] is None
        assert s['position_size'] < 1e-3
    if s['action'] == 'BUY':
        assert 0 < s['stop_loss'] < p['price'] < s['take_profit']
        assert s['position_size'] == s['target'] > 0
    if s['action'] == 'SELL':
        assert s['stop_loss'] > p['price'] > s['take_profit'] > 0
        assert s['position_size'] == -s['target'] > 0

# ---- any finite forecast

def acts_as_asked(s, p, policy, asked):
    "What must hold of BUY and SELL"
    assert asked is not None and p['confidence'] >= max(asked, .5)
    assert p['rarity'] >= ODD
    assert np.sign(s['target']) == np.sign(p['score'])
    assert abs(s['target']) <= policy.max_weight
    assert not (policy.long_only and s['action'] == 'SELL')

@settings(max_examples=400, deadline=None)
@given(predictions(), policies, st.none() | real(0, 1), st.none() | real(0, 1))
@example(written(horizons=[24], volatility=[1e-18]), Policy(), 0., None)               # the prices are the same number
@example(written(horizons=[24], volatility=[1e6]), Policy(), 0., None)                 # or no numbers
@example(written(horizons=[24], sigma=0.), Policy(), 0., None)                         # a pair that never moved
@example(written(horizons=[24], rarity=0.), Policy(), 0., None)                        # a bar like no other
def test_any_finite_prediction(p, policy, least, measured):
    terms = replace(ONE, policy=asdict(policy), threshold=measured)
    asked = measured if least is None else least
    s = make_signal(p, terms, least, LATER)
    in_order(s, p)
    assert s['symbol'] == p['symbol']
    assert s['data_time'] == p['data_time']
    assert s['horizon'] == p['horizons'][-1]
    if s['action'] != 'HOLD': acts_as_asked(s, p, policy, asked)
    if s['why'] in ('no threshold', 'not sure enough'): assert asked is None or p['confidence'] < max(asked, .5)
    asked_twice = make_signal(p, terms, least, LATER)
    assert asked_twice == s

# ---- what is judged is what is told

@pytest.mark.parametrize('verdict, act_on, acts', [
    ('PASS', 'INCONCLUSIVE', True),
    ('INCONCLUSIVE', 'INCONCLUSIVE', True),
    ('FAIL', 'INCONCLUSIVE', False),
    ('FAIL', 'FAIL', True),
    ('INCONCLUSIVE', 'PASS', False),
    ('PASS', 'PASS', True),
])
def test_a_model_that_failed_holds_unless_asked(verdict, act_on, acts):
    s = make_signal(written(), replace(TERMS, verdict=verdict), 0., LATER, act_on=act_on)
    assert s['action'] == ('BUY' if acts else 'HOLD')
    assert acts or f'judged {verdict}' in s['reasoning'][0]

@pytest.mark.parametrize('least', [None, 0., .3, .4])
def test_a_confidence_under_one_half_is_never_enough(least):
    against = written(direction=[dict(DOWN=.6, SIDEWAYS=.1, UP=.3)] * 2, confidence=.3 / .9)
    s = make_signal(against, replace(TERMS, threshold=.33), least, LATER)
    assert (s['action'], s['why'], s['target']) == ('HOLD', 'not sure enough', None)

@settings(max_examples=100, deadline=None)
@given(st.lists(predictions(), min_size=1, max_size=6), policies, st.integers(0, 3))
def test_positions_add_up_to_the_bounded_book(said, policy, silent):
    symbols = [f'C{i}/USDT' for i in range(len(said) + silent)]
    terms = replace(ONE, symbols=symbols, policy=asdict(policy))
    said = {k: p | dict(symbol=k, sigma=max(p['sigma'], 1e-5)) for k, p in zip(symbols, said)}
    book = parts_of_book(said, terms)
    assert list(book) == symbols and all(book[k] is None for k in symbols[len(said):])
    gross = sum(abs(w) for w in book.values() if w is not None)
    assert gross <= policy.max_gross * len(said) / len(symbols) * (1 + 1e-9)
    for k, p in said.items():
        s = make_signal(p, terms, 0., LATER, others=said)
        if s and s['action'] != 'HOLD': assert s['target'] == book[k]

# ---- a relative book: coins against one another

@st.composite
def books(draw):
    "Predictions of three to six coins, and a neutral policy with its terms"
    said = draw(st.lists(predictions(), min_size=3, max_size=6))
    symbols = [f'C{i}/USDT' for i in range(len(said))]
    policy = replace(draw(policies), long_only=False, neutral=draw(st.sampled_from(['dollar', 'beta'])))
    terms = replace(ONE, symbols=symbols, policy=asdict(policy), book=NEUTRAL.plain())
    return {k: p | dict(symbol=k, sigma=max(p['sigma'], 1e-5)) for k, p in zip(symbols, said)}, policy, terms

@settings(max_examples=100, deadline=None)
@given(books())
def test_a_neutral_book_holds_as_much_long_as_short(drawn):
    "And, where it asks for that too, as much market; a coin whose beta is not known counts as the market"
    said, policy, terms = drawn
    book = parts_of_book(said, terms)
    w = np.array(list(book.values()))
    assert abs(w.sum()) < 1e-9
    betas = np.array([1. if p['beta'] is None else p['beta'] for p in said.values()])
    if policy.neutral == 'beta' and betas.std() > 1e-3: assert abs(w @ betas) < 1e-9
    assert np.abs(w).max() <= policy.max_weight * (1 + 1e-9) and np.abs(w).sum() <= policy.max_gross * (1 + 1e-9)

@settings(max_examples=200, deadline=None)
@given(books())
def test_a_signal_of_a_neutral_book_is_its_part_of_it_or_a_hold(drawn):
    "Never against its own forecast, whatever the others make of its part"
    said, policy, terms = drawn
    book = parts_of_book(said, terms)
    for k, p in said.items():
        s = make_signal(p, terms, 0., LATER, others=said)
        if s is None: continue
        in_order(s, p)
        if s['action'] == 'HOLD': continue
        acts_as_asked(s, p, policy, 0.)
        assert s['target'] == book[k]

def of_coins(**scores):
    "Predictions of some coins that differ in their scores, with the terms of their neutral book"
    terms = replace(TERMS, symbols=[f'{k}/USDT' for k in scores], policy=asdict(Policy(neutral='beta')),
                    book=Declared.of('relative', len(scores), (4, 24), '1h').plain())
    return {f'{k}/USDT': written(symbol=f'{k}/USDT', score=v, confidence=.6) for k, v in scores.items()}, terms

@pytest.mark.parametrize('alone', [1, 2])
def test_too_few_coins_for_a_neutral_book(alone):
    said, terms = of_coins(A=.5, B=-.5, C=.1, D=-.1)
    some = dict(list(said.items())[:alone])
    s = make_signal(said['A/USDT'], terms, 0., LATER, others=some)
    assert s['action'] == 'HOLD' and f'{alone} coins' in s['reasoning'][0] and 'needs 3' in s['reasoning'][0]
    assert make_signal(said['A/USDT'], terms, 0., LATER, others=said)['action'] == 'BUY'

def test_a_part_that_only_the_others_give_is_left_alone():
    "All of them lean up; the book can only be short the one that does so least"
    said, terms = of_coins(A=.9, B=.8, C=.1)
    least = 'C/USDT'
    assert parts_of_book(said, terms)[least] < 0
    s = make_signal(said[least], terms, 0., LATER, others=said)
    assert s['action'] == 'HOLD' and s['target'] is None and 'not by its own forecast' in s['reasoning'][0]
    assert make_signal(said['A/USDT'], terms, 0., LATER, others=said)['action'] == 'BUY'

def test_words_of_a_relative_book():
    said, terms = of_coins(A=.5, B=-.5, C=.1)
    s = make_signal(said['A/USDT'], terms, 0., LATER, others=said)
    assert s['reasoning'][0].startswith('over 24 bars above the median coin 0.55; up 0.40')
    assert 'median coin' not in make_signal(written(), TERMS, 0., LATER)['reasoning'][0]

@pytest.mark.parametrize('horizons, place', [((4, 24), 1), ((4, 12, 24, 72), 2), ((4, 72), 0), ((72, 96), 0)])
def test_a_signal_speaks_of_the_horizon_that_was_judged(horizons, place):
    "Not of the longest: words, stop-loss and take-profit are of the declared one"
    def by_horizon(x): return [x * (j + 1) for j in range(len(horizons))]
    p = written(horizons=list(horizons), direction=[dict(DOWN=.3, SIDEWAYS=.3, UP=.4)] * len(horizons),
                relative_up=by_horizon(.1), intervals=[[[-.01, .012]] * 2] * len(horizons), volatility=by_horizon(.002))
    terms = replace(TERMS, book=Declared.of('timing', 2, horizons, '1h').plain())
    s = make_signal(p, terms, 0., LATER)
    h, usual = horizons[place], .002 * (place + 1) * horizons[place] ** .5
    assert s['horizon'] == h and s['reasoning'][0].startswith(f'over {h} bars up')
    np.testing.assert_allclose([s['stop_loss'], s['take_profit']], 100 * np.exp([-1.7 * usual, 1.8 * usual]))

WRONG = dict(
    price=lambda bad: bad,
    sigma=lambda bad: bad,
    confidence=lambda bad: bad,
    score=lambda bad: bad,
    rarity=lambda bad: bad,
    intervals=lambda bad: [[[bad, bad]] * 2] * 2,
)

@pytest.mark.parametrize('key', WRONG)
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none(key, bad):
    "A network that answered nonsense is never acted on"
    p = written(**{key: WRONG[key](bad)})
    s = make_signal(p, TERMS, 0., LATER)
    in_order(s, p)
    assert s['action'] == 'HOLD'

# ---- doubts

FORMS = dict(
    utc=lambda now: now,
    kolkata=lambda now: now.tz_convert('Asia/Kolkata'),
    **CLOCKS,
)

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('late, word', [
    ('0s', None),
    ('59min', None),
    ('60min', 'stale'),
    ('3h', 'stale'),
    ('400D', 'stale'),
    ('-59s', None),
    ('-61s', 'clock'),
    ('-2h', 'clock'),
    ('-400D', 'clock'),
])
def test_age_of_the_bar(late, word, form):
    now = pd.Timestamp(NOON) + pd.Timedelta(late)
    s = make_signal(written(), TERMS, 0., FORMS[form](now))
    assert s['action'] == ('BUY' if word is None else 'HOLD')
    assert word is None or word in s['reasoning'][0]
    wide = MaxAge(data='500D', skew='500D')
    assert make_signal(written(), TERMS, 0., now, wide)['action'] == 'BUY'

def test_an_odd_bar_says_what_is_missing():
    missing = '8 inputs of training are missing, first taker_buy_share_1'
    s = make_signal(written(rarity=0., notes=[missing]), TERMS, 0., LATER)
    odd, *rest = s['reasoning']
    assert s['action'] == 'HOLD' and odd.startswith('unlike anything seen') and rest == [missing]

def test_doubts_add_up():
    p, failed = written(in_sample=True, rarity=.01, volatility=[1e-20] * 2), replace(TERMS, verdict='FAIL')
    found = doubts(p, failed, pd.Timestamp('2024-06-03', tz='UTC'))
    judged = 'judged FAIL on data until 2024-06-01'
    assert [f.split(':')[0] for f in found] == ['stale', 'in sample', judged, 'unlike anything seen', 'no room']
    assert make_signal(p, failed, 0., '2024-06-03')['reasoning'] == found

NOTHING = dict.fromkeys(Prediction.__annotations__) | dict(
    symbol='BTC/USDT',
    faults=['NaN in close of the newest bar'],
    horizons=[4, 24],
    quantile_levels=[.05, .5, .95],
    in_sample=False,
    notes=[],
)

@pytest.mark.parametrize('p', [
    pytest.param(NOTHING, id='a fault and no bar'),
    pytest.param(NOTHING | dict(data_time=NOON), id='a fault of a bar'),
    pytest.param(NOTHING | dict(faults=[]), id='no bar'),
])
def test_faults_come_first(p):
    s = make_signal(p, TERMS, 0., LATER)
    in_order(s, p)
    assert (s['action'], s['target'], s['confidence'], s['position_size']) == ('HOLD', None, 0., 0.)

def test_without_a_clock_the_wall_clock_is_years_on():
    assert 'stale' in make_signal(written(), TERMS, 0.)['reasoning'][0]

def test_without_a_clock_a_bar_of_this_hour_is_new():
    for _ in range(2):       # once more, should the hour end between the two lines
        fresh = pd.Timestamp.now('UTC').floor('h')
        recent = replace(TERMS, data_until=(fresh - pd.Timedelta('2D')).isoformat())
        s = make_signal(written(data_time=fresh.isoformat()), recent, 0.)
        if s['action'] == 'BUY': break
    assert s['action'] == 'BUY'

@pytest.mark.parametrize('least', [-.01, 1.01, 65, math.nan, math.inf])
def test_min_confidence_is_a_probability(least):
    with pytest.raises(ValueError, match='min_confidence'): make_signal(written(), TERMS, least, LATER)

@settings(max_examples=300, deadline=None, derandomize=True)
@given(p=predictions(), kind=st.sampled_from(['timing', 'relative', 'long only']))
def test_action_size_and_reasons_say_one_thing(p, kind):
    "No sentence speaks of the other side than the action, whatever is predicted"
    book = Declared.of('timing' if kind == 'timing' else 'relative', 6, (24,), '1h', long_only=kind == 'long only')
    terms = replace(ONE, book=book.plain(), policy=asdict(book.policy('1h')), symbols=[f'C{i}/USDT' for i in range(6)])
    lean = p['score'] - 1 if kind == 'long only' else p['score']
    up = p['relative_up'][0] if kind != 'timing' else None
    if up is not None: p = p | dict(confidence=up if lean > 0 else 1 - up)
    p = p | dict(symbol='C0/USDT')
    others = {f'C{i}/USDT': p | dict(symbol=f'C{i}/USDT', score=p['score'] * (1 - i / 3)) for i in range(1, 6)}
    s = make_signal(p, terms, 0., pd.Timestamp(p['data_time']), others=others)
    if s['action'] == 'HOLD':
        assert s['why'] in HELD
        return
    side = 1 if s['action'] == 'BUY' else -1
    assert np.sign(s['target']) == side and s['position_size'] == min(abs(s['target']), 1)
    assert side * (s['take_profit'] - p['price']) > 0 > side * (s['stop_loss'] - p['price'])
    assert s['confidence'] >= .5
    less = any('it is expected to lag' in x for x in s['reasoning'])
    assert less == (kind == 'long only' and p['score'] < 1)
    if kind == 'timing': assert side * (p['direction'][0]['UP'] - p['direction'][0]['DOWN']) >= 0
    elif not less: assert side * (up - .5) >= 0
