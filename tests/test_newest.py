"The newest bar by a network that learnt nothing: what is said of its defects, and what must not change a forecast"
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch

from examples import TERMS, untrained
from cryptoml import newest
from cryptoml.calibration import ODD
from cryptoml.baselines import Seen
from cryptoml.combined import seen, weigh
from cryptoml.data import DataError, clean, to_panel
from cryptoml.forecaster import make_inputs, needed_history
from cryptoml.members import Lines, contributions
from cryptoml.newest import (SPARE, Faulty, Ready, Snapshot, TooShort, bar_faults, coin_bars, examine, look,
                             others_masked, owed_to_members, owed_to_networks, predict_newest, recent_bars, rests_on)
from cryptoml.simulate import simulate
from cryptoml.study import Study
from cryptoml.targets import trailing_beta, trailing_sigma
from cryptoml.windows import Samples

H = pd.Timedelta('1h')
S = 'BTC/USDT'
SYMBOLS = ['BTC/USDT', 'ETH/USDT', 'SHIB/USDT']

@pytest.fixture(scope='module')
def world():
    made = model_of(3)
    assert made[0].terms.symbols == SYMBOLS
    return made

@pytest.fixture(scope='module')
def six(): return model_of(6)       # one more than the comparison of coins needs, and a relative book

MADE_OF = 2800    # Bars

def model_of(coins, later=0):
    """A model of some coins whose network nobody has trained, their bars, and the close of the newest of them

    `later`: bars that come after that close, of which the model knows nothing.
    """
    torch.set_num_threads(1)
    market = simulate(n_symbols=coins, n_bars=MADE_OF + later, seed=3)
    panel = to_panel(market.bars[market.bars['time'] < market.bars['time'].min() + MADE_OF * H])
    study = Study.of(panel, (4, 12))
    f = weigh([untrained(study)], study.inputs, study.targets, study.parts)[0]
    never = np.isnan(f.pick(study.inputs).x).all(1)          # Bitcoin is not compared with itself [N, F]
    terms = replace(
        TERMS,
        symbols=market.symbols,
        trained_until=panel.time[2000].isoformat(),
        data_until=panel.time[2400].isoformat(),
        importance={f.names[0]: .01},
        absent={symbol: list(np.array(f.names)[gone]) for symbol, gone in zip(market.symbols, never)},
        book=study.book.plain(),
        policy=asdict(study.policy),
    )
    return Snapshot(f, terms), market.bars.reset_index(drop=True), panel.time[-1] + H

def of(bars, symbol=S): return np.flatnonzero(bars['symbol'] == symbol)

def changed(bars, column, value, symbol=S):
    "The bars with other values in the newest row of a coin"
    b = bars.astype({c: float for c in bars.columns if c not in ('time', 'symbol')})
    b.loc[of(b, symbol)[-1], column] = value
    return b

# ---- without a model

@pytest.fixture
def walk():
    "Thirty bars of one coin"
    rng = np.random.default_rng(0)
    close = 100 * np.exp(rng.normal(0, .01, 30).cumsum())
    time = pd.date_range('2024-01-01', periods=30, freq='h', tz='UTC').as_unit('us')
    prices = dict(open=close, high=close * 1.01, low=close * .99, close=close)
    return pd.DataFrame(dict(time=time, symbol=S, **prices, volume=1.))

def faults_of(bars, now):
    good, report = clean(bars, '1h', now)
    last = good['time'].max() if len(good) else None
    return bar_faults(bars, report.defects, last, now, H)

NEWEST = '(2024-01-02 05:00)'

@pytest.mark.parametrize('column, value, expected', [
    ('close', np.nan, f'NaN in close of the newest bar {NEWEST}'),
    ('volume', np.inf, f'infinite in volume of the newest bar {NEWEST}'),
    ('low', 0., f'zero or negative price in low of the newest bar {NEWEST}'),
    ('volume', -1., f'negative in volume of the newest bar {NEWEST}'),
    ('volume', 0., f'zero volume in the newest bar {NEWEST}'),
])
def test_faults_of_the_newest_bar(walk, column, value, expected):
    now = walk['time'].max() + H
    assert faults_of(walk, now) == []
    assert faults_of(changed(walk, column, value), now) == [expected]

def test_a_bar_in_progress_is_no_fault_of_the_one_before(walk):
    half_past = walk['time'].max() + H / 2
    assert faults_of(walk, half_past) == []
    assert faults_of(changed(walk, 'close', np.nan), half_past) == []

def test_bars_that_open_in_the_future(walk):
    hours_behind = walk['time'].max() - 3 * H
    assert faults_of(walk, hours_behind) == ['future bar: 3 bars open after the time now, first 2024-01-02 03:00']

@pytest.mark.parametrize('need', [1, 3, 30, 100])
def test_recent_bars_go_back_from_the_newest_closed(walk, need):
    half_past = walk['time'].max() + H / 2                   # the newest is in progress
    bars = recent_bars(walk.assign(symbol=S), need, H, half_past)
    assert len(bars) == min(need + 1, 30)
    assert bars['time'].max() == walk['time'].max()

@pytest.mark.parametrize('can, there, expected', [
    ([1, 1, 1], [4, 4, 4], []),
    ([0, 1, 1], [2, 4, 4], []),                              # of the coin itself nothing is said here
    ([1, 1, 1], [4, 3, 4], ['B lacks 1 of the last 4 bars']),
    ([1, 1, 0], [4, 2, 4], ['B lacks 2 of the last 4 bars', 'C cannot be read at this bar']),
])
def test_what_other_coins_lack(can, there, expected):
    window = np.arange(4) < np.array(there)[:, None]
    assert others_masked(['A', 'B', 'C'], 'A', np.array(can, bool), window) == expected

# ---- by a model

def test_it_is_the_forecast_of_the_whole_history(world):
    "Of each coin, from no more bars than are needed, whatever comes later and in any order of rows"
    model, bars, now = world
    f = model.forecaster
    panel = to_panel(bars)
    last = Samples(np.arange(3), np.full(3, len(panel.time) - 1))
    whole = f.forecast(make_inputs(panel), trailing_sigma(panel), last, each=True)
    enough = bars[bars['time'] >= now - (model.need + SPARE) * H]
    assert model.need == needed_history(f.first, H)
    book, beta = model.terms.declared, trailing_beta(panel)[:, -1]
    found = predict_newest(model, enough.sample(frac=1, random_state=0), None, now)
    for i, symbol in enumerate(panel.symbols):
        p = found[symbol]
        assert p['faults'] == [] and p['notes'] == []
        assert p['data_time'] == now.isoformat()
        np.testing.assert_allclose(p['size'], whole['size'][i], atol=1e-5)
        np.testing.assert_allclose([list(d.values()) for d in p['direction']], whole['direction'][i], atol=1e-5)
        np.testing.assert_allclose(p['relative_up'], whole['relative_direction'][i, :, 1], atol=1e-5)
        np.testing.assert_allclose([p['score'], p['confidence']], [book.score(whole)[i], book.confidence(whole)[i]],
                                   atol=1e-5)
        assert p['beta'] == pytest.approx(beta[i], abs=.02)      # of a thousand bars and of all of them

def test_of_one_coin_as_of_all(world):
    model, bars, now = world
    everyone = predict_newest(model, bars, None, now)
    for symbol in SYMBOLS: assert predict_newest(model, bars, symbol, now) == {symbol: everyone[symbol]}

def test_of_one_coin_of_a_neutral_book_as_of_all(six):
    "A part of it is worth something beside the others, so they are forecast too"
    model, bars, now = six
    assert model.terms.declared.neutral
    everyone = predict_newest(model, bars, None, now)
    assert list(everyone) == model.terms.symbols and len(everyone) == 6
    assert predict_newest(model, bars, S, now) == everyone
    short = bars.drop(of(bars, 'ETH/USDT')[:-300])                  # an error only for who asks for this coin
    assert 'bars of history' in predict_newest(model, short, S, now)['ETH/USDT']['faults'][0]
    with pytest.raises(TooShort, match='ETH/USDT: 300 bars'): predict_newest(model, short, 'ETH/USDT', now)

def test_a_bar_unlike_anything_seen(world, monkeypatch):
    "An ordinary bar is none; with inputs a hundred times as large it is the oddest there can be"
    model, bars, now = world
    usual = [p['rarity'] for p in predict_newest(model, bars, None, now).values()]
    assert min(usual) > ODD
    def far(*args, **sources):
        inputs = make_inputs(*args, **sources)
        return replace(inputs, x=inputs.x * 100)
    monkeypatch.setattr(newest, 'make_inputs', far)
    odd = [p['rarity'] for p in predict_newest(model, bars, None, now).values()]
    assert max(odd) < ODD

@pytest.mark.parametrize('answer', [[], None, 'Too many requests', dict(code=-1003), [[0] * 6]])
def test_one_bad_coin_stops_no_other(six, answer):
    "It is named, and the others are forecast as if it had not been given"
    model, bars, now = six
    coins = {symbol: part.drop(columns='symbol') for symbol, part in bars.groupby('symbol')}
    alone = predict_newest(model, {k: x for k, x in coins.items() if k != 'ETH/USDT'}, None, now)
    found = predict_newest(model, coins | {'ETH/USDT': answer}, None, now)
    why, = found['ETH/USDT']['faults']
    assert why.startswith('ETH/USDT is left out: ') and found['ETH/USDT']['size'] is None
    for symbol in set(coins) - {'ETH/USDT'}:
        assert found[symbol]['faults'] == [] and why in found[symbol]['notes']
        assert found[symbol] | dict(notes=0) == alone[symbol] | dict(notes=0)
    assert predict_newest(model, coins | {'ETH/USDT': answer}, 'ETH/USDT', now)['ETH/USDT']['faults'] == [why]
    assert predict_newest(model, coins | {'ZEC/USDT': answer}, None, now) == predict_newest(model, coins, None, now)

def test_a_coin_of_another_length_stops_no_other(six):
    model, bars, now = six
    every_fourth = bars.drop(of(bars, 'ETH/USDT')[np.arange(len(of(bars, 'ETH/USDT'))) % 4 > 0])
    found = predict_newest(model, every_fourth, None, now)
    assert 'ETH/USDT is left out: mixed timeframes' in found['ETH/USDT']['faults'][0]
    assert found[S]['faults'] == []

def test_six_columns_for_a_model_of_more(world):
    model, bars, now = world
    assert 'taker_buy_volume' in bars
    candles = bars[['time', 'symbol', 'open', 'high', 'low', 'close', 'volume']]
    for p in predict_newest(model, candles, None, now).values():
        assert p['faults'] == []
        assert p['notes'] == ['8 inputs of training are missing, first taker_buy_share_1']

def test_a_bar_of_the_training_is_in_sample(world):
    model, bars, now = world
    trained = pd.Timestamp(model.terms.trained_until)
    at = {late: predict_newest(model, bars[bars['time'] < trained + late], S, trained + late)[S]
          for late in (-H, 0 * H)}
    assert {late: p['in_sample'] for late, p in at.items()} == {-H: True, 0 * H: False}

def view_of(model, data, now): return look(model, *coin_bars(data, None, model.terms.symbols, H), now)

@pytest.mark.parametrize('symbol', SYMBOLS)
def test_ready_faulty_and_too_short(world, symbol):
    model, bars, now = world
    f, mine = model.forecaster.first, of(bars, symbol)
    def seen(data): return examine(view_of(model, data, now), symbol)
    ready = seen(bars)
    assert isinstance(ready, Ready) and ready.notes == []
    assert seen(bars.drop(mine)) == Faulty(None, [f'no bar of {symbol} in the data'])
    no_close = seen(changed(bars, 'close', np.nan, symbol))
    assert no_close.last == now - 2 * H
    assert 'NaN in close' in no_close.faults[0]
    need = needed_history(f, H)
    assert isinstance(seen(bars.drop(mine[:-need])), Ready)
    with pytest.raises(TooShort, match=f'{symbol}: {need - 1} bars of history, {need} are needed') as e:
        seen(bars.drop(mine[:-need + 1]))
    assert e.value.last == now - H

def test_one_short_coin_does_not_stop_the_others(world):
    "Asked for all it is said of the coin, asked for it alone it is an error"
    model, bars, now = world
    short = bars.drop(of(bars)[:-300])
    found = predict_newest(model, short, None, now)
    assert 'bars of history' in found[S]['faults'][0]
    assert found['SHIB/USDT']['direction'] is not None
    with pytest.raises(TooShort, match='300 bars of history'): predict_newest(model, short, S, now)

@pytest.mark.parametrize('call, word', [
    (lambda model, bars, now: predict_newest(model, bars, 'PEPE/USDT', now), 'not a coin of this model'),
    (lambda model, bars, now: predict_newest(model, bars.drop(of(bars)), S, now), f'no bar of {S}'),
    (lambda model, bars, now: predict_newest(model, bars, None, now, bars), 'leave extra out'),
    (lambda model, bars, now: predict_newest(model, bars.drop(columns='symbol'), None, now), 'no symbol column'),
], ids=['another coin', 'no bar of it', 'own columns', 'whose bars'])
def test_calls_that_cannot_be_understood(world, call, word):
    with pytest.raises(DataError, match=word): call(*world)

# ---- from finer bars, and what a forecast rests on

def halves(bars):
    "Two bars of half an hour for each of an hour, which together are it"
    middle = (bars['open'] + bars['close']) / 2
    first = bars.assign(close=middle, volume=bars['volume'] / 2)
    second = bars.assign(open=middle, volume=bars['volume'] / 2, time=bars['time'] + H / 2)
    parts = pd.concat([first, second]).sort_values(['symbol', 'time'], ignore_index=True)
    sums = [c for c in parts if c in ('quote_volume', 'trades', 'taker_buy_volume')]
    return parts.assign(**{c: parts[c] / 2 for c in sums})

def test_finer_bars_say_what_hours_say(world):
    model, bars, now = world
    fine = halves(bars)
    assert predict_newest(model, fine, None, now, resample=True) == predict_newest(model, bars, None, now)
    assert predict_newest(model, bars, None, now, resample=True) == predict_newest(model, bars, None, now)
    growing = predict_newest(model, fine, None, now - H / 2, resample=True)       # half of the newest hour
    assert growing == predict_newest(model, bars[bars['time'] < now - H], None, now - H / 2)
    with pytest.raises(DataError, match='steps by 30m, not by 1h: pass resample=True'):
        predict_newest(model, fine, None, now)

def test_an_hour_whose_last_half_is_missing_is_no_hour(world):
    model, bars, now = world
    fine = halves(bars)
    said = predict_newest(model, fine.drop(of(fine, 'ETH/USDT')[-1]), None, now, resample=True)
    assert said['ETH/USDT']['faults'] == [f'incomplete bar in time of the newest bar ({now - H:%Y-%m-%d %H:%M})']
    assert said['SHIB/USDT']['faults'] == []

def test_contributions_are_what_the_score_loses(six):
    "By the members exactly, one input after the other; by the networks to first order"
    model, bars, now = six
    view = view_of(model, bars, now)
    f, book, last = model.forecaster, model.terms.declared, len(view.panel.time) - 1
    sample = Samples(np.arange(6), np.full(6, last))
    here = seen(f.first, view.inputs, view.sigma, sample)
    owed, weight = owed_to_members(f, here, book)
    F = here.x.shape[1]
    network = f.say(view.inputs, view.sigma, sample)['network']
    def score(s): return book.score(f.blend(dict(network=network) | {name: m(s) for name, m in f.members.items()}))
    usual = score(here)
    used = np.flatnonzero(np.abs(owed[:, :F]).max(0))
    for i in used[::max(1, len(used) // 25)]:
        without = replace(here, x=np.where(np.arange(F) == i, 0, here.x).astype(here.x.dtype))
        np.testing.assert_allclose(owed[:, i], usual - score(without), atol=1e-6)
    np.testing.assert_allclose(owed[:, F], usual - score(replace(here, quiet=0 * here.quiet)), atol=1e-6)
    total = rests_on(view, sample, view.forecast(sample))
    np.testing.assert_allclose(total[:, :-1], owed)
    np.testing.assert_allclose(total[:, -1], (weight * network['relative']).sum(1), atol=1e-6)
    by_network = owed_to_networks(view, sample, weight, 'relative')
    step = .05
    inside = np.flatnonzero((np.abs(here.x[2]) < f.first.scaler.clip - step) & (here.x[2] != 0))   # nothing is clipped
    for i in inside[np.argsort(-np.abs(by_network[2, inside]))[:5]]:
        nudged = view.inputs.x.copy()
        nudged[2, last, i] += step * f.first.scaler.scale[i]
        moved = f.say(replace(view.inputs, x=nudged), view.sigma, sample)['network']['relative'] - network['relative']
        slope = by_network[2, i] / here.x[2, i]
        assert (weight[2] * moved[2]).sum() / step == pytest.approx(slope, rel=.2)

def test_what_a_signal_rests_on_is_its_own(six):
    "Input A drives one coin and B another: the list of each begins with its own"
    model, bars, now = six
    names = model.forecaster.names
    view = view_of(model, bars, now)
    x = np.zeros_like(view.inputs.x[:, -1])
    a, b = 3, 7
    x[0, a], x[1, b] = 2, -3
    slope = np.zeros((len(model.forecaster.config.horizons), len(names) + 1, 1, 1))
    slope[:, a], slope[:, b] = .5, .25
    line = Lines('inputs', {}, dict(relative=slope))
    here = Seen(x.astype(float), *[None] * 7)
    owed = contributions(line, here, 'relative')[..., 0]
    assert owed[0].argmax() == a and owed[0, a] == 1. and owed[1].argmin() == b and owed[1, b] == -.75
    assert np.count_nonzero(owed) == 2
    said = predict_newest(model, bars, None, now)
    assert len({tuple(i['name'] for i in p['inputs'][:5]) for p in said.values()}) > 1
    for p in said.values():
        sizes = [abs(i['contribution']) for i in p['inputs']]
        assert sizes == sorted(sizes, reverse=True) and np.isfinite([i['value'] for i in p['inputs']]).all()
