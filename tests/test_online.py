"The newest bars kept from call to call, against a whole computation at each bar: ordinary hours and every other kind"
import copy, threading
from dataclasses import replace

import pandas as pd
import pytest

from cryptoml.data import DataError
from cryptoml.integration import UltimateTradingAI
from cryptoml.newest import predict_newest
from cryptoml.online import CHECKED, Followed, Online
from examples import near
from test_newest import H, SYMBOLS, model_of

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module')
def made(): return model_of(3)

@pytest.fixture
def world(made):
    "A model whose intervals are its own, and its bars"
    model, bars, _ = made
    return copy.deepcopy(model), bars

def start_of(bars): return bars['time'].max() - 60 * H

def hour(bars, t): return bars[bars['time'] == t]

def until(bars, now): return bars[bars['time'] < now]

def same(online, whole, data, bars, now):
    "The online answer to some data is that of a whole computation from all bars; gives whether it was followed"
    said = online.predict(data, None, now)
    asked = predict_newest(whole, bars, None, now)
    assert said.keys() == asked.keys()
    for k in said: assert near(said[k], asked[k]), (k, now, said[k]['faults'], asked[k]['faults'])
    return isinstance(online.view, Followed)

def test_hour_by_hour(world):
    "Fed with the newest hours alone: followed but for the first and for the turn of a month"
    model, bars = world
    whole, online, begin = copy.deepcopy(model), Online(model), start_of(bars)
    followed = [same(online, whole, until(bars, begin), until(bars, begin), begin)]
    for t in pd.date_range(begin, periods=12, freq='h'):
        followed.append(same(online, whole, hour(bars, t), until(bars, t + H), t + H))
    assert followed == [False] + 12 * [True]
    assert online.check() == [] and not online.is_due()
    for t in pd.date_range(begin + 12 * H, periods=CHECKED - 12, freq='h'): online.predict(hour(bars, t), None, t + H)
    assert online.is_due() and not online.is_due() and online.check() == []

def test_a_month_begins(world):
    "What describes the coins changes: a whole view"
    model, bars = world
    month = pd.Timestamp('2022-04-01', tz='UTC')
    whole, online = copy.deepcopy(model), Online(model)
    came = [until(bars, month - 2 * H)] + [hour(bars, month + k * H) for k in (-2, -1, 0, 1)]
    now = [month - 2 * H] + [month + k * H for k in (-1, 0, 1, 2)]
    followed = [same(online, whole, x, until(bars, t), t) for x, t in zip(came, now)]
    assert followed == [False, True, True, False, True]

def test_whole_frames_and_several_hours_at_once(world):
    model, bars = world
    whole, online, begin = copy.deepcopy(model), Online(model), start_of(bars)
    now = begin
    for hours in (0, 1, 5, 12):
        now = now + hours * H
        said = online.predict(until(bars, now), None, now)
        for k, p in predict_newest(whole, until(bars, now), None, now).items():
            assert near({**p, 'intervals': 0}, {**said[k], 'intervals': 0})       # which learn at other times
    assert isinstance(online.view, Followed)

def test_asked_again_it_says_the_same(world):
    model, bars = world
    online, now = Online(model), start_of(bars)
    first = online.predict(until(bars, now), None, now)
    assert online.predict(until(bars, now), None, now) == first
    assert online.predict(hour(bars, now - H), None, now) == first
    assert online.predict({k: g for k, g in until(bars, now).groupby('symbol')}, 'ETHUSDT', now) == \
        {k: first[k] for k in (first if model.terms.declared.neutral else ['ETH/USDT'])}

ODD = dict(
    one_coin_late=lambda x: x.iloc[1:],
    no_close=lambda x: x.assign(close=x['close'].where(x['symbol'] != 'ETH/USDT')),
    zero_volume=lambda x: x.assign(volume=x['volume'].where(x['symbol'] != 'ETH/USDT', 0.)),
    hundredfold=lambda x: x.assign(**{c: x[c].where(x['symbol'] != 'ETH/USDT', 100 * x[c])
                                      for c in ('open', 'high', 'low', 'close')}),
    twice=lambda x: pd.concat([x, x]),
    two_versions=lambda x: pd.concat([x, x.assign(close=x['close'] * .999, low=x['low'] * .99)]),
    volume_in_other_lots=lambda x: x.assign(volume=x['volume'] * 1000),
)

@pytest.mark.parametrize('kind', ODD)
def test_an_odd_hour_and_what_comes_after(world, kind):
    "Whatever is odd about an hour, the hours after it are what a whole computation of all that came says"
    model, bars = world
    whole, online, begin = copy.deepcopy(model), Online(model), start_of(bars)
    came = until(bars, begin)
    same(online, whole, came, came, begin)
    for i, t in enumerate(pd.date_range(begin, periods=5, freq='h')):
        new = ODD[kind](hour(bars, t)) if i == 2 else hour(bars, t)
        came = pd.concat([came, new], ignore_index=True)
        same(online, whole, new, came, t + H)

def test_a_bar_is_corrected(world):
    model, bars = world
    whole, online, begin = copy.deepcopy(model), Online(model), start_of(bars)
    online.predict(until(bars, begin), None, begin)
    online.predict(hour(bars, begin), None, begin + H)
    right = hour(bars, begin).assign(close=lambda x: x['close'] * 1.001, high=lambda x: x['high'] * 1.002)
    came = pd.concat([until(bars, begin), right, hour(bars, begin + H)])
    online.predict(pd.concat([right, hour(bars, begin + H)]), None, begin + 2 * H)
    assert not isinstance(online.view, Followed)
    for k, p in predict_newest(whole, came, None, begin + 2 * H).items():
        assert near(p['direction'], online.said[k]['direction'])

def test_what_is_kept_goes_on_in_another_process(world):
    model, bars = world
    whole, online, begin = copy.deepcopy(model), Online(model), start_of(bars)
    online.predict(until(bars, begin), None, begin)
    for t in (begin, begin + H): online.predict(hour(bars, t), None, t + H)
    later = Online(model, online.bars())
    missed = bars[(bars['time'] > begin) & (bars['time'] < begin + 5 * H)]
    said = later.predict(missed, None, begin + 5 * H)
    for k, p in predict_newest(whole, until(bars, begin + 5 * H), None, begin + 5 * H).items():
        assert near(p['direction'], said[k]['direction']) and said[k]['faults'] == []

def test_a_stream_that_lost_its_way_is_found(world):
    "A number that is changed in what is kept: the check says which, and the next answer is right"
    model, bars = world
    whole, online, begin = copy.deepcopy(model), Online(model), start_of(bars)
    online.predict(until(bars, begin), None, begin)
    online.predict(hour(bars, begin), None, begin + H)
    online.kept.x.all[1, online.kept.length - 3, 5] += 1
    found = online.check()
    assert len(found) >= 1 and '1 inputs differ from a whole computation, first' in found[0] and 'ETH/USDT' in found[0]
    said = online.predict(hour(bars, begin + H), None, begin + 2 * H)
    for k, p in predict_newest(whole, until(bars, begin + 2 * H), None, begin + 2 * H).items():
        assert near(p['direction'], said[k]['direction'])

def test_a_forecast_that_is_no_number_is_found(world):
    "Nothing in place of a number is a difference, not something to leave out"
    model, bars = world
    online, begin = Online(model), start_of(bars)
    online.predict(until(bars, begin), None, begin)
    online.predict(hour(bars, begin), None, begin + H)
    assert online.check() == []
    online.kept.said['relative'][:] = float('nan')
    assert any('of relative differ from a whole forecast' in x for x in online.check())

def test_a_prediction_of_an_older_model_leaves_the_new_one_live(world, tmp_path):
    "A training that ends while a prediction is made: the new model stays"
    model, bars = world
    ai, now = facade(model, tmp_path), start_of(bars)
    new = replace(model)
    ai.snapshot = new
    ai._ask(model, until(bars, now), None, now, None, {})
    assert ai.snapshot is new

def test_too_little_and_no_coin(world):
    model, bars = world
    online, now = Online(model), start_of(bars)
    with pytest.raises(DataError, match='not a coin of this model'): online.predict(bars, 'PEPE/USDT', now)
    with pytest.raises(DataError, match='no bar of a coin'): online.predict(bars.assign(symbol='PEPE/USDT'), None, now)
    short = until(bars, now).groupby('symbol').tail(40)
    with pytest.raises(DataError, match='bars of history'): online.predict(short, 'BTC/USDT', now)
    assert all('are needed' in p['faults'][0] for p in online.predict(short, None, now).values())

def test_removed_coins_are_not_looked_at(world):
    model, bars = world
    fewer, now = replace(model, removed=('SHIB/USDT',)), start_of(bars)
    said = Online(fewer).predict(until(bars, now), None, now)
    assert said['SHIB/USDT']['faults'] == ['no bar of SHIB/USDT in the data']
    without = predict_newest(model, until(bars[bars['symbol'] != 'SHIB/USDT'], now), None, now)
    assert near({k: said[k]['direction'] for k in SYMBOLS[:2]}, {k: without[k]['direction'] for k in SYMBOLS[:2]})

def test_threads(world):
    "Eight threads that feed the same hours: every answer is that of its hour"
    model, bars = world
    online, begin = Online(model), start_of(bars)
    online.predict(until(bars, begin), None, begin)
    wrong = []
    def work():
        for t in pd.date_range(begin, periods=5, freq='h'):
            said = online.predict(bars[(bars['time'] >= t - 8 * H) & (bars['time'] <= t)], 'BTC/USDT', t + H)
            if said['BTC/USDT']['faults'] or said['BTC/USDT']['data_time'] != (t + H).isoformat(): wrong.append(said)
    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert wrong == []

# ---- what a facade keeps of it

def facade(model, folder):
    ai = UltimateTradingAI(dict(state_dir=str(folder), horizons=[4, 12], act_on='FAIL'), device='cpu')
    ai.snapshot = model
    return ai

def test_the_book_goes_on_after_a_restart(world, tmp_path):
    "The step of a bar that was decided before, what the policy remembers, and the largest equity"
    model, bars = world
    ai, close = facade(model, tmp_path), start_of(bars).ceil('4h')
    ai.save_state()
    ai.predict_sync(until(bars, close), now=close)
    step = ai.next_weights({'BTC/USDT': .1}, 1000., close)
    assert any(w is not None for w in step.values())
    for t in pd.date_range(close, periods=4, freq='h'): ai.predict_sync(hour(bars, t), now=t + H)
    later = ai.next_weights({'BTC/USDT': .1}, 900., close + 4 * H)
    ai.save_state()
    again = UltimateTradingAI(dict(state_dir=str(tmp_path)), device='cpu')
    again.load_state()
    assert again.model_name() == ai.model_name() and again._decided.after.peak == 1000.
    again.config = ai.config
    again.predict_sync(hour(bars, close + 3 * H), now=close + 4 * H)
    assert again.next_weights({'BTC/USDT': .3}, 950., close + 4 * H) == later      # that bar was decided
    for t in pd.date_range(close + 4 * H, periods=4, freq='h'):
        for x in (ai, again): x.predict_sync(hour(bars, t), now=t + H)
    asked = {'BTC/USDT': .3}, 950., close + 8 * H
    assert near(ai.next_weights(*asked), again.next_weights(*asked))

def test_a_new_model_keeps_the_largest_equity(world, tmp_path):
    model, bars = world
    ai, close = facade(model, tmp_path), start_of(bars).ceil('4h')
    ai.save_state()
    ai.predict_sync(until(bars, close), now=close)
    ai.next_weights({}, 1000., close)
    ai.snapshot = replace(model)
    ai.predict_sync(hour(bars, close - H), now=close)          # the bars are still there
    ai.next_weights({}, 500., close)
    assert ai._decided.model is ai.snapshot and ai._decided.after.peak == 1000.

@pytest.mark.parametrize('file', ['book.json', 'bars/*/*.safetensors'])
def test_what_is_kept_is_damaged(world, tmp_path, file, caplog):
    "The model is loaded all the same, and a line says what is missing"
    model, bars = world
    ai, close = facade(model, tmp_path), start_of(bars).ceil('4h')
    ai.save_state()
    ai.predict_sync(until(bars, close), now=close)
    ai.next_weights({}, 1000., close)
    ai.save_state()
    for path in tmp_path.glob(file): path.write_bytes(b'{')
    again = UltimateTradingAI(dict(state_dir=str(tmp_path)), device='cpu')
    again.load_state()
    assert 'cannot be read' in caplog.text
    again.predict_sync(until(bars, close), now=close)
    assert again.next_weights({}, 1000., close).keys() == set(SYMBOLS)

def test_a_check_that_fails_is_said_and_the_next_answer_is_right(world, tmp_path, caplog):
    "The whole way: a thread looks at what is kept after a day of bars"
    model, bars = world
    ai, begin = facade(model, tmp_path), start_of(bars)
    ai.predict_sync(until(bars, begin), now=begin)
    for t in pd.date_range(begin, periods=CHECKED - 1, freq='h'): ai.predict_sync(hour(bars, t), now=t + H)
    ai._online.kept.x.all[0, ai._online.kept.length - 2, 3] += 1
    last = begin + (CHECKED - 1) * H
    ai.predict_sync(hour(bars, last), now=last + H)
    for thread in threading.enumerate():
        if thread.name == 'cryptoml check': thread.join()
    assert 'the newest bars begin anew: 1 inputs differ from a whole computation' in caplog.text
    said = ai.predict_sync(hour(bars, last + H), now=last + 2 * H)
    for k, p in predict_newest(model, until(bars, last + 2 * H), None, last + 2 * H).items():
        assert near(p['direction'], said[k]['direction'])
