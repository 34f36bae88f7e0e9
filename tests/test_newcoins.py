"""Coins that enter: what is known at an entry, what a coin that is left out reaches, who wins, and the job

Suites 1, 11
"""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from cryptoml.data import DataError, to_panel
from cryptoml.parameters import JobError
from cryptoml.runs import run
from cryptoml.newcoins import (METAS, NOT_ADAPTED, REFIT, Coins, Compared, Learner, Plan, Reading, compare, entries,
                               learnt_from, quarter_of, ways_of)
from cryptoml.simulate import simulate

pytestmark = pytest.mark.usefixtures('one_thread')
MARKET = simulate(n_symbols=3, n_bars=24 * 180, seed=2)
PANEL = to_panel(MARKET.bars)
SHORT = dict(horizon=12, every=4, span=6, epochs=1, batches=8, meta_epochs=1, meta_batches=4, steps=3)

def planted(days=200, coins=6, level=0., seed=0, **settings):
    "Decisions every four hours of coins whose labels have a level of their own, and nothing else"
    rng = np.random.default_rng(seed)
    when = pd.date_range('2022-01-01', periods=6 * days, freq='4h')
    length = when[-1] - when[0]
    plan = Plan(when[0] + .5 * length, when[0] + .65 * length, when[-1], **settings)
    shape = coins, len(when)
    own = level * np.where(np.arange(coins) % 2, 1, -1)[:, None, None]
    x, y = rng.normal(size=(*shape, 5)), own + rng.normal(size=(*shape, 2))
    names = [f'C{i}/USDT' for i in range(coins)]
    return Coins(plan, names, list('abcde'), when, pd.Timedelta('1h'), x.astype('float32'), y.astype('float32'))

def weights(ways):
    "Everything that was learnt for a fold"
    nets = [ways.net, *(m for m, _ in ways.learners.values()), *(net for net, _ in ways.refits.values())]
    return b''.join(v.numpy().tobytes() for net in nets for v in net.state_dict().values())

# ---- what is known

@pytest.mark.parametrize('horizon, every', [(24, 4), (12, 4), (5, 2), (1, 1)])
def test_examples_are_known_and_do_not_overlap(horizon, every):
    plan = Plan.of(PANEL, horizon=horizon, every=every)
    reach = [(k * every, k * every + horizon + 1) for k in plan.examples]     # hours from the entry: decided, known
    assert reach[-1][1] <= 0 and reach[-1][1] + every > 0                     # none newer would do
    assert all(b[0] - a[0] >= horizon for a, b in zip(reach, reach[1:])) and len(reach) == 10

def test_no_price_after_an_entry_is_in_its_examples():
    "Suite 1: other prices from the entry on, the same inputs and labels, to the bit"
    plan = Plan.of(PANEL, **SHORT)
    coins = Coins.of(PANEL, plan)
    coin, at = entries(coins, [1], np.random.default_rng(0))[0]
    known = np.add(plan.examples, at)
    later = PANEL.time.tz_localize(None) > coins.time[at]
    values = PANEL.values.copy()
    values[:, later] *= np.random.default_rng(1).lognormal(0, .1, values[:, later].shape)
    other = Coins.of(replace(PANEL, values=values), plan)
    for a, b in ((coins.x, other.x), (coins.y, other.y)):
        np.testing.assert_array_equal(a[coin, known], b[coin, known])
    assert np.isfinite(coins.y[coin, known]).all()
    asked = np.add(plan.asked, at)
    assert (coins.y[coin, asked] != other.y[coin, asked]).all()

def test_a_coin_that_is_left_out_reaches_nothing(tmp_path):
    "Whatever its values, the same weights, rates and steps; and so has the same seed (suite 11)"
    coins = planted(**SHORT)
    out_of_it, others = [0, 3], [1, 2, 4, 5]
    odd = coins.x.copy(), coins.y.copy()
    for v in odd: v[out_of_it] = np.random.default_rng(3).normal(5, 9, v[out_of_it].shape)
    found = []
    for k, c in enumerate((coins, replace(coins, x=odd[0], y=odd[1]))):
        learnt = learnt_from(c, others)
        assert not any(np.isin(rows[:, 0], out_of_it).any() for rows in learnt[1:])
        quarters = quarter_of(c, entries(c, out_of_it, np.random.default_rng(0))).unique()
        ways = ways_of(c, Reading(c, others, c.plan.trained), learnt, quarters, tmp_path/str(k))
        for _, rows in ways.refits.values(): assert not np.isin(rows[:, 0], out_of_it).any()
        found.append((weights(ways), {k: (m.lr, steps) for k, (m, steps) in ways.learners.items()}))
    assert found[0] == found[1]

def test_a_refit_knows_no_label_of_its_quarter(tmp_path):
    coins = planted(days=300, **SHORT)
    learnt = learnt_from(coins, [1, 2, 4, 5])
    quarters = quarter_of(coins, entries(coins, [0, 3], np.random.default_rng(0))).unique()
    ways = ways_of(coins, Reading(coins, learnt.coins, coins.plan.trained), learnt, quarters, tmp_path)
    for quarter, (_, rows) in ways.refits.items():
        assert (coins.known[rows[:, 1]] <= max(quarter.start_time, coins.plan.chosen)).all()

# ---- who wins

def test_a_level_of_each_coin_is_found(tmp_path):
    "Ten examples tell a coin's level; the other coins, however new, do not"
    coins = planted(days=160, level=1.5, **SHORT)
    found = compare(coins, 2, tmp_path)
    assert found.won.startswith(('MAML', 'fine-tuning', 'examples alone'))
    assert found.change('fine-tuning').hi < -10 < found.change(REFIT).value
    assert found.word in ('MAML', 'FINE-TUNING', 'EXAMPLES-ALONE') and str(found).startswith(found.word)
    assert set(found.entered[:, 0]) == set(range(6))                          # each coin is left out once

def drawn(rng, gain=0., days=120, ways=11):
    "Losses of as many ways, equal but for noise that a day's decisions share; the first spares something"
    day = np.repeat(np.arange(days), 6).reshape(-1, 60)
    usual = 1 + .3 * rng.normal(size=(*day.shape, 2))
    losses = {NOT_ADAPTED: usual}
    for k in range(ways):
        losses[f'way {k}'] = usual + .02 * rng.normal(size=days)[day][..., None] - gain * (k == 0)
    return Compared(None, [], np.zeros((len(day), 2), int), day, 1., losses, {})

def test_ways_that_are_no_better_win_as_seldom_as_is_said():
    rng = np.random.default_rng(0)
    share = np.mean([drawn(rng).won is not None for _ in range(150)])
    assert share < .05 + 3 * np.sqrt(.05 * .95 / 150)
    assert np.mean([drawn(rng, .02).won == 'way 0' for _ in range(20)]) > .9

def test_days_too_few_tell_nothing():
    few = drawn(np.random.default_rng(0), gain=.5, days=30)
    assert few.won is None and few.word == 'UNADAPTED'
    assert '30 days; 40 days are the least to tell' in few.reason

# ---- what cannot be

@pytest.mark.parametrize('folds', [1, 7])
def test_folds(folds):
    coins = planted(**SHORT)
    with pytest.raises(DataError, match='folds must be from 2 to the number of coins, 6'): compare(coins, folds)

def test_bars_too_few(tmp_path):
    with pytest.raises(DataError, match='in the part that trains .* give more bars'):
        learnt_from(planted(days=10, **SHORT), [0, 1])
    coins = planted(**SHORT)
    late = replace(coins, plan=replace(coins.plan, last=coins.plan.chosen + pd.Timedelta('1D')))
    with pytest.raises(DataError, match='no coin can enter between'): compare(late, 2, tmp_path)

# ---- the job

def test_the_job(tmp_path):
    MARKET.bars.to_parquet(tmp_path/'bars.parquet')
    given = dict(data=str(tmp_path/'bars.parquet'), horizon=12, examples=4, folds=2, epochs=1, threads=1)
    metrics = run('meta', tmp_path/'run', **given)
    assert metrics['entries'] > 3 and metrics['next'].startswith(metrics['reason'])
    assert metrics['next'].endswith('as here' if metrics['won'] in METAS else 'which it did not here')
    assert {row['way'] for row in metrics['ways']} >= {NOT_ADAPTED, 'MAML', 'fine-tuning', REFIT}
    page = (tmp_path/'run'/'report.html').read_text()
    assert page.count('<figure') == 1 and 'fine-tuning, last bias' in page
    learner = Learner.load(tmp_path/'run')
    assert learner.horizon == 12 and learner.steps == metrics['steps']
    coins = Coins.of(PANEL, Plan.of(PANEL, horizon=12, every=2, count=4))
    assert learner.columns == coins.columns
    x = torch.from_numpy(learner.scale(coins.x[0, -40:-30]))
    assert learner.maml.adapt(x, torch.from_numpy(coins.y[0, -40:-30]), learner.steps)(x).isfinite().all()

@pytest.mark.parametrize('given, sentence', [
    (dict(horizon=0), 'horizon must be a whole number from 1 to 8192, got 0'),
    (dict(examples=1), 'examples must be a whole number from 2, got 1'),
    (dict(folds=1), 'folds must be a whole number from 2, got 1'),
    (dict(symbols='BTC/USDT,ETH/USDT'), 'folds must be at most the number of symbols, 2, got 3'),
    (dict(symbols='odd'), "symbol 'odd' cannot be split into coin and quote"),
    (dict(data='nowhere.parquet'), "data: no such file: 'nowhere.parquet'"),
    (dict(timeframe='1x'), "timeframe '1x' is not a length of time"),
    (dict(start='2022-01-01', end='2021-01-01'), 'start 2022-01-01 is not before end 2021-01-01'),
    (dict(epochs=0), 'epochs must be a whole number from 1, got 0'),
], ids=str)
def test_refused_in_a_sentence(given, sentence, tmp_path):
    with pytest.raises(JobError) as e: run('meta', tmp_path/'run', **given)
    assert sentence in str(e.value) and '\n' not in str(e.value) and not (tmp_path/'run').exists()
