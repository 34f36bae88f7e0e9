"The agent that sizes positions: its accounts are the backtest's, it learns what is there, and not what is not"
import json, os, subprocess, sys, textwrap, warnings
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import resident
from examples import TERMS, untrained
from cryptoml.actions import (CLIP, OWN, AgentError, Reward, Scale, Sight, Sizing, forecast_fields, prediction_fields,
                              stacked)
from cryptoml.backtest import COSTS, FUNDING, TRADED, Costs, account_for
from cryptoml.combined import weigh
from cryptoml.data import to_panel
from cryptoml.environment import Lanes, World, episodes, planted, trading_env, vec_trading
from cryptoml.ledger import read_ledger
from cryptoml.metrics import day_blocks, interval_mean, sharpe
from cryptoml.newest import Snapshot, coin_bars, look, predict_view
from cryptoml.overfitting import apart, overfit_probability
from cryptoml.ppo import Agent, Training, begin, layers_of, learn, left_alone, play, played, recipe_of
from cryptoml.simulate import simulate
from cryptoml.sizer import of_plain, to_plain, world_of
from cryptoml.study import Study
from cryptoml.windows import Samples

pytestmark = pytest.mark.usefixtures('one_thread')
root = Path(__file__).parents[1]
same = np.testing.assert_array_equal

def some_agent(fields=('trend', 'noise'), seed=0, gain=1., **sizing):
    "An agent whose network nobody has trained"
    rng = np.random.default_rng(seed)
    K = len(fields)
    shapes = (8, 2 * K + OWN), (1, 8)
    layers = tuple((gain * rng.normal(size=s).astype('f4'), rng.normal(size=s[:1]).astype('f4')) for s in shapes)
    scale = Scale(rng.normal(size=K), np.exp(rng.normal(size=K)), np.ones(K, bool))
    return Agent(fields, scale, layers, Sizing(**sizing), Reward(), dict(seed=seed))

# ---- the accounts

def wild(seed, coins, bars, delay, wild=.02, days=False):
    "A market with gaps, coins that come and go, funding of some, and moves that ruin"
    rng = np.random.default_rng(seed)
    close = np.exp((wild * rng.standard_t(3, (coins, bars))).cumsum(1))
    open = close * np.exp(.2 * wild * rng.normal(size=close.shape))
    open[rng.random(open.shape) < .05] = np.nan
    close[np.isnan(open)] = np.nan
    for n in range(coins):
        if rng.random() < .3: open[n, rng.integers(bars):] = np.nan
        if rng.random() < .2: open[n, :rng.integers(bars)] = np.nan
    funding = np.where(rng.random((coins, 1)) < .5, .001 * rng.normal(size=open.shape), np.nan)
    columns = rng.normal(size=(coins, bars, 2))
    columns[rng.random(columns.shape) < .1] = np.nan
    sigma = wild * np.exp(.3 * rng.normal(size=open.shape))
    sigma[rng.random(sigma.shape) < .05] = np.nan
    time = pd.date_range('2024-01-01', periods=bars, freq='D' if days else 'h', tz='UTC')
    decide = rng.random(bars) < .4
    decide[[0, -1]] = True
    return World(columns, ('trend', 'noise'), sigma, open, close, time, decide, funding, Costs(), delay)

seeds, counts, delays = st.integers(0, 10**6), st.integers(1, 3), st.integers(0, 2)

@settings(max_examples=60, deadline=None)
@given(seed=seeds, coins=counts, delay=delays, size=st.sampled_from([.01, .1, .6]), days=st.booleans())
def test_an_account_among_many_is_the_account_of_the_backtest(seed, coins, delay, size, days):
    world = wild(seed, coins, 60, delay, size, days)
    agent = some_agent(seed=seed, gain=2., target_annual=20., max_weight=6., max_gross=9.)
    steps = len(world.decisions) - 1
    try: lanes = Lanes(world, agent.scale, agent.sizing, steps=steps, lanes=2, together=True)
    except AgentError as e:
        assert 'known at the first' in str(e)
        return
    total = 0.
    for lane in (0, 1): lanes.begin(lane)
    for _ in range(steps):
        seen = lanes.look()
        action = agent.act(seen)
        action[1] /= 2                                        # the other lane is another account
        total += lanes.step(action)['growth'][0] * lanes.sizing.usual
        if lanes.ruined[0]: break
    end = lanes.first[0]
    book = account_for(lanes.orders.target[0, :, :end], world.open[:, :end], delay=delay,
                       funding=world.funding[:, :end], time=world.time[:end])
    same(lanes.track.equity[0, :end], book.equity)
    same(lanes.track.weights[0, :, :end], book.weights)
    flows = lanes.track.flows[0, :, :end]
    same(flows[COSTS], book.costs)
    same(flows[FUNDING], book.funding)
    same(flows[TRADED], book.turnover)
    np.testing.assert_allclose(flows[0] - flows[COSTS] - flows[FUNDING], book.returns, atol=1e-12)
    if not lanes.ruined[0]: assert total == pytest.approx(np.log(lanes.seen.equity[0]), abs=1e-9)

@settings(max_examples=40, deadline=None)
@given(seed=seeds, coins=counts, delay=delays, size=st.sampled_from([.01, .1, .4]))
def test_the_environment_is_what_the_agent_plays(seed, coins, delay, size):
    "The same fields, the same function: step by step in training, and decision by decision on an ordinary account"
    world = wild(seed, coins, 60, delay, size)
    agent = some_agent(seed=seed, target_annual=3., max_weight=3., max_gross=4.)
    steps = len(world.decisions) - 1
    try: lanes = Lanes(world, agent.scale, agent.sizing, steps=steps, lanes=1, together=True)
    except AgentError: return
    lanes.begin(0)
    for _ in range(steps):
        seen = lanes.look()
        lanes.step(agent.act(seen))
        if lanes.ruined[0]: return                            # an account may come back between two opens; a lane ends
    book = played(agent, world)
    np.testing.assert_allclose(lanes.track.equity[0], book.equity, atol=1e-9)
    np.testing.assert_allclose(lanes.track.weights[0], book.weights, atol=1e-9)

def test_ruin_ends_an_episode_and_nothing_comes_after():
    market = planted(0., coins=1, bars=200)
    market.open[0, 6:], market.close[0, 5:] = .01, .01
    wide = Sizing(target_annual=5., max_weight=4., max_gross=4.)
    env = trading_env(market, Scale.fit(market.columns[0]), sizing=wide, steps=20)
    env.lanes.episodes = env.lanes.episodes[:1]
    env.reset(seed=0)
    env.step([1.])
    _, reward, ended, truncated, info = env.step([1.])
    assert ended and not truncated and info['equity'] == 0 and np.isfinite(reward)
    with pytest.raises(AgentError, match='reset it first'): env.step([1.])

def test_nothing_happens_to_a_coin_of_which_nothing_is_known():
    market = planted(.5, coins=2, bars=400)
    market.columns[1, 200:] = np.nan
    agent = replace(some_agent(), scale=Scale(np.zeros(2), np.ones(2), np.zeros(2, bool)))
    book = played(agent, market)
    assert (np.abs(np.diff(market.open[1, 205:])) > 0).all()
    units = book.weights[1, 205:] * book.equity[205:] / market.open[1, 205:]
    assert units.std() < 1e-12 and units.mean() != 0
    assert np.abs(np.diff(book.weights[0, 205:])).max() > .01

def test_the_rewards_of_an_episode_add_up():
    "To the net return, the squared returns, the largest loss and the turnover of its book"
    market = planted(.3, coins=1, bars=801)
    each = dict(growth=Reward(1, 0, 0, 0), risk=Reward(0, 1, 0, 0), drawdown=Reward(0, 0, 1, 0),
                turnover=Reward(0, 0, 0, 1))
    agent, got = some_agent(), {}
    for name, reward in each.items():
        lanes = Lanes(market, agent.scale, reward=reward, lanes=1, steps=200)
        lanes.begin(0)
        equity = [1.]
        got[name] = 0.
        for _ in range(200):
            got[name] += sum(lanes.step(agent.act(lanes.look())).values())[0] * lanes.sizing.usual
            equity.append(lanes.seen.equity[0])
    equity = np.array(equity)
    assert got['growth'] == pytest.approx(np.log(equity[-1]))
    assert got['risk'] == pytest.approx(-np.square(np.diff(equity) / equity[:-1]).sum())
    assert got['drawdown'] == pytest.approx(-(1 - equity / np.maximum.accumulate(equity)).max())
    assert got['turnover'] == pytest.approx(-lanes.track.flows[0, TRADED].sum())

def test_episodes_stay_inside_the_rows():
    market = planted(0., coins=2, bars=400)
    rows = np.zeros(400, bool)
    rows[100:200] = rows[300:] = True
    market.columns[0, 120] = np.nan
    found = episodes(market, Scale(np.zeros(2), np.ones(2), np.zeros(2, bool)), rows, np.arange(2)[:, None], 10)
    begin = market.decisions[found[:, 1]]
    assert set(begin[found[:, 0] == 0]) == {*range(100, 160, 4), *range(300, 360, 4)} - {120}
    assert set(begin[found[:, 0] == 1]) == {*range(100, 160, 4), *range(300, 360, 4)}
    with pytest.raises(AgentError, match='no 60 decisions in a row may be used'):
        episodes(market, some_agent().scale, rows, np.arange(2)[:, None], 60)
    with pytest.raises(AgentError, match='100 decisions, an episode of 100 steps needs 101'):
        episodes(market, some_agent().scale, rows, np.arange(2)[:, None], 100)

# ---- the interfaces

@pytest.mark.parametrize('together', [True, False])
def test_both_checkers_accept_the_environment(together):
    gymnasium = pytest.importorskip('gymnasium.utils.env_checker')
    sb3 = pytest.importorskip('stable_baselines3.common.env_checker')
    market = planted(.1, bars=600)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', message='.*(env.spec|render|spec.max_episode).*')
        env = trading_env(market, some_agent().scale, together=together, steps=20)
        gymnasium.check_env(env, skip_render_check=True)
        sb3.check_env(env)

def test_lanes_begin_again_and_hand_over_what_was_last_seen():
    market = planted(.1, bars=400)
    many = vec_trading(market, some_agent().scale, lanes=3, steps=5, seed=1)
    many.reset()
    for step in range(1, 12):
        seen, reward, done, infos = many.step(np.ones((3, 1)))
        assert done.all() == (step % 5 == 0) and reward.dtype == np.float32
        for lane in range(3):
            parts = {k: infos[lane][k] for k in ('growth', 'risk', 'drawdown', 'turnover')}
            assert sum(parts.values()) == pytest.approx(reward[lane], rel=1e-5)
            if not done[lane]: continue
            assert infos[lane]['TimeLimit.truncated'] and infos[lane]['episode']['l'] == 5
            assert infos[lane]['terminal_observation'][4] > 0 and seen[lane, 4] == 0
    one, two = (vec_trading(market, some_agent().scale, lanes=3, steps=5) for _ in range(2))
    for env in (one, two): env.seed(7)
    same(one.reset(), two.reset())

# ---- what is seen, live and in history

@pytest.fixture(scope='module')
def seen_live():
    "A study whose network nobody has trained, and the view of its newest bar"
    torch.set_num_threads(1)
    market = simulate(n_symbols=3, n_bars=2800, seed=3)
    study = Study.of(to_panel(market.bars), (4, 12))
    f = weigh([untrained(study)], study.inputs, study.targets, study.parts)[0]
    never = np.isnan(f.pick(study.inputs).x).all(1)
    terms = replace(
        TERMS, symbols=market.symbols, book=study.book.plain(), policy=asdict(study.policy),
        absent={k: list(np.array(f.names)[gone]) for k, gone in zip(market.symbols, never)},
    )
    model, now = Snapshot(f, terms), study.panel.time[-1] + study.panel.timeframe
    bars, unread = coin_bars(market.bars, None, model.coins, model.timeframe)
    return study, f, look(model, bars, unread, now)

def test_a_prediction_says_what_the_forecast_says(seen_live):
    study, f, view = seen_live
    last = Samples(np.arange(3), np.full(3, len(view.panel.time) - 1))
    fc = view.forecast(last)
    named = forecast_fields(fc, last.of(view.sigma), (4, 12))
    predictions = list(predict_view(view, None).values())
    assert len(named) == 6 * 2 + 4
    for n, p in enumerate(predictions):
        live = prediction_fields(p)
        assert live.keys() == named.keys()
        for k, v in named.items(): assert live[k] == pytest.approx(v[n], abs=1e-9), k
    sight = Sight.of(predictions, tuple(named))
    np.testing.assert_allclose(sight.columns, stacked(named, tuple(named)), atol=1e-9)
    same(sight.sigma, last.of(view.sigma))

def test_a_study_as_history(seen_live):
    "What was forecast stands at its bar, odd inputs are not known, and an agent is led over it like any policy"
    study, f, view = seen_live
    at = Samples(np.tile(np.arange(3), 4), np.repeat([2400, 2404, 2408, 2412], 3) + 3)
    fc = f.forecast(study.inputs, study.targets.sigma, at)
    odd = np.arange(12) == 4
    world = world_of(study, (at, fc, odd), places=(1,))
    assert world.fields == tuple(forecast_fields(fc, at.of(study.targets.sigma), (4, 12), (1,)))
    there = np.isfinite(world.columns).any(-1)
    assert there.sum() == 11 and not there[1, 2407] and there[0, 2407]
    same(world.columns[2, 2411, 0], fc['direction'][8, 1, 2] - fc['direction'][8, 1, 0])
    book = played(some_agent(world.fields), world)
    assert (book.weights[:, :2404] == 0).all() and (book.weights[:, 2405] != 0).all()

def test_the_future_changes_nothing_that_was_done(seen_live):
    market = planted(.3, bars=600)
    agent = some_agent()
    whole = played(agent, market)
    other = planted(.3, bars=600, seed=9)
    cut = 301
    mixed = {k: np.concatenate([getattr(market, k)[:, :cut], getattr(other, k)[:, cut:]], 1)
             for k in ('columns', 'sigma', 'open', 'close')}
    again = played(agent, replace(market, **mixed))
    same(whole.weights[:, :cut], again.weights[:, :cut])
    assert (whole.weights[:, cut + 5:] != again.weights[:, cut + 5:]).any()

@pytest.mark.parametrize('change, words', [
    (dict(columns=np.ones((2, 3))), r'columns must be \[N, 2\]'),
    (dict(sigma=np.ones(3)), 'sigma and weights'),
    (dict(held=np.array([0, np.nan])), '1 weights missing'),
    (dict(equity=0.), 'the account must be known'),
    (dict(equity=np.nan), 'the account must be known'),
    (dict(peak=.9), 'its peak 0.9'),
    (dict(columns=np.array([[1, np.inf], [0, 0]])), '1 fields are infinite'),
])
def test_a_decision_needs_a_known_account(change, words):
    call = dict(columns=np.ones((2, 2)), sigma=np.full(2, .01), held=np.zeros(2), equity=1., peak=1.) | change
    view = Sight(call.pop('columns'), call.pop('sigma'))
    with pytest.raises(AgentError, match=words): some_agent().weights(view, **call)

@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), long_only=st.booleans())
def test_targets_stay_within_their_bounds(seed, n, long_only):
    rng = np.random.default_rng(seed)
    sizing = dict(max_weight=.5, max_gross=1., target_annual=2., long_only=long_only)
    columns = np.where(rng.random((n, 2)) < .2, np.nan, 50 * rng.normal(size=(n, 2)))
    sigma = np.where(rng.random(n) < .2, np.nan, np.exp(rng.normal(-5, 2, n)))
    held = rng.uniform(-.4, .4, n)
    w = some_agent(seed=seed, gain=9., **sizing).weights(Sight(columns, sigma), held, .9, 1.)
    keep = np.isnan(w)
    assert (keep == (np.isnan(columns).all(1) | np.isnan(sigma))).all()
    assert (np.abs(w[~keep]) <= .5).all() and (not long_only or (w[~keep] >= 0).all())
    assert np.abs(w[~keep]).sum() <= max(1 - np.abs(held[keep]).sum(), 0) + 1e-12

# ---- learning

quick = Training(steps=50_000)

def test_the_answer_of_an_identity_task_is_found():
    market = planted(3., costs=Costs().scaled(0))
    agent = learn(market, reward=Reward(risk=0, drawdown=0), training=quick)
    at = market.columns[:, market.decide].reshape(-1, 2)
    at = at[np.abs(at[:, 0]) > .5]
    for share in (-.5, 0, .5):
        action = agent.act(agent.scale.observe(at, np.full(len(at), share), np.zeros(len(at))))
        assert (np.sign(action) == np.sign(at[:, 0])).mean() > .99 and np.abs(action).mean() > .9

def follow(market, gain, rate):
    "Part of the way to the field times a gain"
    w = np.zeros((1, 4 + OWN), 'f4')
    w[0, [0, 4]] = gain * rate, 1 - rate
    scale = Scale.fit(market.columns.reshape(-1, 2))
    return Agent(market.fields, scale, ((w, np.zeros(1, 'f4')),), Sizing(), Reward(), {})

def test_a_planted_trend_is_followed():
    "Nearly as well as the best of rules that were picked on the very history, and far better than holding"
    history, other = (planted(.1, bars=10_000, seed=s) for s in (11, 12))
    agent = learn(history, training=Training(steps=100_000))
    book = played(agent, other)
    rules = [played(follow(other, g, r), other) for g in (.5, 1, 3) for r in (.2, .5, 1.)]
    best = max(sharpe(b.daily()[1]) for b in rules)
    hold = played(replace(follow(other, 0, 1), layers=((np.zeros((1, 6), 'f4'), np.ones(1, 'f4')),)), other)
    assert sharpe(book.daily()[1]) > .8 * best
    assert sharpe(book.daily()[1]) > sharpe(hold.daily()[1]) + .05
    assert interval_mean(book.returns, day_blocks(book.time)).lo > 0

def test_noise_teaches_nothing():
    "Agents of six markets without anything to foretell: ahead where they learnt more often than where they did not"
    learnt, unseen = [], []
    for m in range(6):
        agent = learn(planted(0., seed=m), training=Training(steps=30_000), seed=m)
        for to, world in ((learnt, planted(0., seed=m)), (unseen, planted(0., seed=100 + m))):
            book = played(agent, world)
            least = interval_mean(book.returns, day_blocks(book.time), level=.9).lo
            to.append((sharpe(book.daily()[1], 365), least > 0))
    assert sum(won for _, won in unseen) <= 2                # of six at 5 %: three or more in two of a thousand
    ratios = np.array([r for r, _ in unseen])
    assert ratios.mean() - 2.015 * ratios.std(ddof=1) / np.sqrt(6) < 0
    assert np.mean([r for r, _ in learnt]) > ratios.mean()

def test_an_agent_is_what_stable_baselines3_answers():
    market = planted(.2, bars=800)
    with left_alone():
        env = vec_trading(market, some_agent().scale, lanes=8, steps=20)
        model = begin(env, Training(rollout=16, lanes=8, hidden=(16, 8)), 5).learn(512)
    model.policy.action_net.weight.data *= 100               # so that some actions are beyond their bounds
    agent = replace(some_agent(), layers=layers_of(model.policy))
    assert [w.shape for w, _ in agent.layers] == [(16, 6), (8, 16), (1, 8)]
    seen = np.random.default_rng(0).uniform(-CLIP, CLIP, (2000, 6)).astype('f4')
    want = model.predict(seen, deterministic=True)[0][:, 0]
    np.testing.assert_allclose(agent.act(seen), want, atol=1e-6)
    assert .05 < (np.abs(want) == 1).mean() < .95

LEARN = '''
    import torch
    torch.set_num_threads(1)
    from cryptoml.environment import planted
    from cryptoml.ppo import Training, learn, recipe_of
    print(recipe_of(learn(planted(.2, bars=800), training=Training(steps=8192, episode=40), seed=SEED)))
    '''

def process(code, **kw):
    env = os.environ | dict(PYTHONPATH=str(root), OMP_NUM_THREADS='1')
    return subprocess.run([sys.executable, '-c', textwrap.dedent(code)], env=env, capture_output=True, text=True, **kw)

def test_the_same_seed_learns_the_same_bits_in_two_processes():
    here = {seed: recipe_of(learn(planted(.2, bars=800), training=Training(steps=8192, episode=40), seed=seed))
            for seed in (3, 2**40)}
    assert process(LEARN.replace('SEED', '3')).stdout.strip() == here[3] != here[2**40]

def test_learning_leaves_random_numbers_and_threads_of_the_process_alone():
    import random
    def drawn(): return random.random(), np.random.rand(), torch.rand(1).item()
    for seed in (random.seed, np.random.seed, torch.manual_seed): seed(5)
    want = drawn()
    for seed in (random.seed, np.random.seed, torch.manual_seed): seed(5)
    threads = torch.get_num_threads()
    learn(planted(.2, bars=800), training=Training(steps=512, lanes=8, episode=20))
    assert drawn() == want and torch.get_num_threads() == threads

@pytest.mark.parametrize('make, words', [
    (lambda: Training(steps=0), "training out of range: {'steps': 0}"),
    (lambda: Training(lr=float('nan')), 'out of range'),
    (lambda: Training(hidden=()), 'out of range'),
    (lambda: Training(discount=1.5), "{'discount': 1.5}"),
    (lambda: Sizing(target_annual=-1), "sizing out of range: {'target_annual': -1}"),
    (lambda: Reward(turnover=float('inf')), 'at least 0'),
    (lambda: learn(planted(.1, bars=100), rows=np.ones(99, bool)), r'rows must be \[100\]'),
    (lambda: learn(replace(planted(.1, bars=800), columns=np.full((3, 800, 2), np.nan))), 'no field is known'),
    (lambda: learn(planted(.1, bars=300)), '75 decisions, an episode of 120 steps needs 121'),
    (lambda: replace(planted(.1, bars=100), decide=np.ones(100)), 'True or False'),
    (lambda: replace(planted(.1, bars=100), fields=('a', 'b', 'c')), '3 fields'),
    (lambda: played(some_agent(('a', 'b')), planted(.1, bars=100)), 'the agent knows'),
    (lambda: play(some_agent(), np.ones((1, 9, 2)), np.ones((1, 9)), np.ones((2, 9)), planted(0., 1, 9).account()),
     'got {.close'),
])
def test_mistakes_are_a_sentence(make, words):
    with pytest.raises(AgentError, match=words): make()

# ---- kept, forged

def test_an_agent_comes_back_as_it_was():
    agent = learn(planted(.2, bars=800), training=Training(steps=512, lanes=8, episode=20), note='mine')
    again = of_plain(json.loads(json.dumps(to_plain(agent))))
    assert again.about['note'] == 'mine'
    assert again.about['versions']['stable_baselines3'] and again.about['span'][0].startswith('2024-01-01')
    assert (again.fields, again.sizing, again.reward) == (agent.fields, agent.sizing, agent.reward)
    assert recipe_of(again) == recipe_of(agent)
    market = planted(.2, bars=400, seed=8)
    same(played(again, market).equity, played(agent, market).equity)

WITHOUT = '''
    import json, sys
    sys.modules['stable_baselines3'] = sys.modules['gymnasium'] = None     # importing either raises
    from cryptoml.actions import AgentError
    from cryptoml.environment import planted
    from cryptoml.ppo import learn, played
    from cryptoml.sizer import of_plain
    agent = of_plain(json.load(sys.stdin))
    print(played(agent, planted(.2, bars=400)).equity[-1])
    try: learn(planted(.2, bars=800))
    except AgentError as e: print(e)
    '''

def test_playing_needs_neither_library():
    agent = some_agent()
    done = process(WITHOUT, input=json.dumps(to_plain(agent)))
    assert done.returncode == 0, done.stderr[-800:]
    assert done.stdout.splitlines() == [str(played(agent, planted(.2, bars=400)).equity[-1]),
                                        "training an agent needs gymnasium: pip install 'cryptoml[rl]'"]

def put(*place):
    "The last one in the place of what stands there"
    *way, key, value = place
    def change(m):
        for k in way: m = m[k]
        m[key] = value
    return change

@pytest.mark.parametrize('change', [
    put('fields', ['trend']),
    put('fields', ['trend', 'trend']),
    put('fields', [1, 2]),
    put('fields', 'ab'),
    put('layers', 1),
    put('layers', 10**9),
    put('layers', True),
    put('agent', 'me'),
    put('sizing', dict(every=4, target_annual=-1)),
    put('sizing', dict(every=4, unheard=1)),
    put('sizing', dict(max_weight='1')),
    put('reward', dict(growth=None)),
    put('scale', 'spread', [0., 0.]),
    put('scale', 'spread', [1., 1., 1.]),
    put('scale', 'center', [float('nan')] * 2),
    put('scale', 'optional', [True]),
    put('policy', 'weight_0', [[float('inf')] * 6] * 8),
    put('policy', 'weight_0', [[1.] * 5] * 8),
    put('policy', 'weight_0', [[1.] * 6, [1.]]),
    put('policy', 'weight_0', 'cos system'),
    put('policy', 'weight_1', [[1.] * 8] * 2),
    put('policy', 'weight_9', [1.]),
    put('policy', []),
    lambda m: m.pop('scale'),
    lambda m: m.pop('sizing'),
    lambda m: m['policy'].pop('bias_0'),
])
def test_what_makes_no_sense_is_refused_in_a_sentence(change):
    kept = json.loads(json.dumps(to_plain(some_agent())))
    of_plain(kept)
    change(kept)
    with pytest.raises(AgentError): of_plain(kept)

# ---- what is judged

def test_blocks_left_out_teach_nothing_and_stand_in_the_ledger(ledger):
    market = planted(.1, bars=2400, seed=4)
    rows_of, recipes = [], []
    def train(rows, i):
        rows_of.append(rows)
        agent = learn(market, rows=rows, training=Training(steps=1024, lanes=16, episode=30), seed=i)
        recipes.append(recipe_of(agent))
        return agent
    found = apart(market, train, 4, 2, '24h', question='agents', seed=1)
    trials = read_ledger().trials
    assert [(t.kind, t.question, t.recipe) for t in trials] == [('ppo', 'agents', r) for r in recipes]
    assert len(found.histories) == 3 and all(len(b.time) == 2400 for b in found.histories)
    blocks = np.array_split(np.arange(2400), 4)
    for rows, left_out, book in zip(rows_of, combinations(range(4), 2), found.outside):
        for g in left_out:
            assert not rows[blocks[g][1:]].any()
            after = blocks[g][-1] + 1
            assert not rows[after:after + 24].any()
        assert len(book.time) == 1200
    first = combinations(range(4), 2).__next__()
    other = planted(.1, bars=2400, seed=99)
    hidden = np.isin(np.arange(2400), np.concatenate([blocks[g][1:-1] for g in first]))
    changed = {k: np.where(hidden if v.ndim == 2 else hidden[:, None], getattr(other, k), v)
               for k, v in vars(market).items() if k in ('columns', 'open', 'close')}
    mixed = replace(market, **changed)
    agent = learn(mixed, rows=rows_of[0], training=Training(steps=1024, lanes=16, episode=30), seed=0)
    assert recipe_of(agent) == recipes[0]

def slow_overfit_probability(returns, S):
    "As the paper has it: logits of relative ranks, one pair of halves at a time"
    blocks = np.array_split(returns, S, axis=1)
    logits = []
    for half in combinations(range(S), S // 2):
        inside = np.concatenate([blocks[b] for b in half], 1)
        outside = np.concatenate([blocks[b] for b in range(S) if b not in half], 1)
        best = int(np.argmax([sharpe(r) for r in inside]))
        order = sorted(range(len(returns)), key=lambda c: sharpe(outside[c]))
        omega = (order.index(best) + 1) / (len(returns) + 1)
        logits.append(np.log(omega / (1 - omega)))
    return np.mean(np.array(logits) <= 0)

@pytest.mark.parametrize('seed', range(4))
def test_probability_of_overfitting_as_the_paper_has_it(seed):
    r = np.random.default_rng(seed).normal(.05 * seed, 1, (6, 120))
    assert overfit_probability(r, 6) == pytest.approx(slow_overfit_probability(r, 6))

def test_ten_thousand_plays_leave_nothing_behind():
    market, agent = planted(.1, coins=1, bars=9), some_agent()
    def plays(n):
        for _ in range(n): played(agent, market)
    plays(1000)
    before = resident()
    plays(10_000)
    assert resident() - before < 10e6                        # a megabyte a thousand
