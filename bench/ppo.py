"""The trading environment and its agent: `python bench/ppo.py` (speed, learning, noise, small), `noise`, `real`

    PYTHONPATH=. python bench/ppo.py noise 200     # agents on markets without anything to foretell, 2 s each
    CRYPTOML_DATA=folder PYTHONPATH=. python bench/ppo.py real     # agents on real bars, fields of the past alone"""
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cryptoml.backtest import Costs
from cryptoml.data import read_panel
from cryptoml.metrics import day_blocks, interval_mean, sharpe
from cryptoml.actions import Reward, Scale, Sizing
from cryptoml.environment import Lanes, World, planted, trading_env, vec_trading
from cryptoml.overfitting import apart, overfit_probability
from cryptoml.ppo import Agent, Training, layers_of, learn, left_alone, played
from cryptoml.targets import trailing_sigma


def clock(f, steps, rounds=5):
    "Steps a second of CPU, the median of some rounds"
    took = []
    for _ in range(rounds):
        start = time.process_time()
        f()
        took.append(time.process_time() - start)
    return steps / statistics.median(took)


def speed():
    "Steps of one process; each is a decision of one account, four bars"
    market = planted(.1, coins=10, bars=8000)
    scale = Scale.fit(market.columns.reshape(-1, 2))
    action = np.random.default_rng(0).uniform(-1, 1, (256, 1))
    many = vec_trading(market, scale, lanes=256)
    many.reset()
    bare = Lanes(market, scale, lanes=256, steps=1500)
    for lane in range(256): bare.begin(lane)
    bare.look()
    one = trading_env(market, scale, together=False, steps=1500)
    one.reset(seed=0)
    def of_lanes(): return [(bare.step(action), bare.look()) for _ in range(200)]
    def of_many(): return [many.step(action) for _ in range(400)]
    def of_one(): return [one.step(action[0]) for _ in range(250)]
    rows = {
        '256 accounts, observations and rewards': clock(of_lanes, 256 * 200),
        '256 accounts, as stable-baselines3 steps them': clock(of_many, 256 * 400),
        'one account, as Gymnasium steps it': clock(of_one, 250),
    }
    print('\n| environment | steps/s |\n|---|---|')
    for name, rate in rows.items(): print(f'| {name} | {rate:,.0f} |')


def grown(agent, market):
    "Net growth a year, and Sharpe ratio, of an agent on a market"
    book = played(agent, market)
    s = book.summary()
    return f'{s["annual return"]:+.1%} | {s["sharpe"]:.2f}'


def training(steps=40_960):
    "One learning of ours beside stable-baselines3 as it comes: the same algorithm, environment and decisions"
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv
    history, other = planted(.1, coins=4, bars=12_000, seed=1), planted(.1, coins=4, bars=12_000, seed=2)
    scale = Scale.fit(history.columns[:, history.decide].reshape(-1, 2))
    learn(planted(.1, bars=800), training=Training(steps=512, episode=20))        # imports
    rows = {}
    for seed in range(2):
        for times in (1, 10):
            start = time.process_time()
            agent = learn(history, training=Training(steps=times * steps), seed=seed)
            rate = times * steps / (time.process_time() - start)
            rows[f'ours, {times * steps:,} decisions, seed {seed}'] = rate, grown(agent, other)
        start = time.process_time()
        with left_alone():
            env = DummyVecEnv([lambda: trading_env(history, scale, together=False, seed=seed)])
            model = PPO('MlpPolicy', env, device='cpu', seed=seed).learn(steps)
        took = time.process_time() - start
        plain = Agent(history.fields, scale, layers_of(model.policy), Sizing(), Reward(), {})
        rows[f'stable-baselines3 as it comes, {steps:,} decisions, seed {seed}'] = steps / took, grown(plain, other)
    print('\n| learning | steps/s | net growth a year, unseen | Sharpe |\n|---|---|---|---|')
    for name, (rate, got) in rows.items(): print(f'| {name} | {rate:,.0f} | {got} |')
    ours, theirs = ([rate for name, (rate, _) in rows.items() if name.startswith(k)] for k in ('ours', 'stable'))
    print(f'\nours is {statistics.mean(ours) / statistics.mean(theirs):.1f} times as fast')


PAST = (1, 4, 12, 24, 72, 168)   # Hours

def of_the_past(panel):
    "Fields that need no model: returns over some spans, in usual moves, against the mean coin too; volatility; hour"
    sigma = trailing_sigma(panel)
    close = np.log(pd.DataFrame(panel['close'].T).ffill().to_numpy().T)
    named = {}
    for h in PAST:
        move = np.full(close.shape, np.nan)
        move[:, h:] = (close[:, h:] - close[:, :-h]) / (sigma[:, h:] * math.sqrt(h))
        named[f'move_{h}'], named[f'against_{h}'] = move, move - np.nanmean(move, 0)
    named['volatility'] = np.log(sigma)
    turn = 2 * np.pi * panel.time.hour.to_numpy() / 24
    named |= {k: np.broadcast_to(f(turn), close.shape) for k, f in dict(sin=np.sin, cos=np.cos).items()}
    return np.stack(list(named.values()), -1), tuple(named), sigma


def real(start='2021-01-01', end='2024-06-30'):
    "Combinatorial splits over real hours of all coins: what agents get where they learnt, and where they did not"
    panel, _ = read_panel(Path(os.environ['CRYPTOML_DATA'])/'spot_1h.parquet', start=start, end=end)
    warnings.simplefilter('ignore')                          # means of coins that are not there yet
    columns, fields, sigma = of_the_past(panel)
    bars = panel['open'], panel['close'], panel.time, panel.bar_number % 4 == 3
    world = World(columns, fields, sigma, *bars, costs=Costs())
    print(f'\n{len(panel.symbols)} coins, {len(panel.time):,} hours from {panel.time[0]:%Y-%m-%d}')
    print('\n| weight of risk | learnt | unseen, mean of histories | from | to | no gain |\n|---|---|---|---|---|---|')
    daily = []
    for risk in (0, 1, 10):
        def train(rows, i, risk=risk):
            return learn(world, reward=Reward(risk=risk), rows=rows, training=Training(steps=100_000), seed=i)
        with tempfile.TemporaryDirectory() as folder:
            os.environ['CRYPTOML_LEDGER'] = str(Path(folder)/'ledger.jsonl')
            found = apart(world, train, 6, 2, '168h')
        t = found.table()
        daily += [b.daily()[1] for b in found.histories[:1]]
        print(f'| {risk} | {t["learnt"].iloc[0]:+.2f} | {t["sharpe"].mean():+.2f} | {t["sharpe"].min():+.2f} | '
              f'{t["sharpe"].max():+.2f} | {found.lost:.0%} |', flush=True)
    print(f'\nprobability of backtest overfitting between the three: {overfit_probability(np.array(daily)):.2f}')


def ahead(returns, days):
    "Whether the mean is above zero at one-sided 5 %"
    return interval_mean(returns, days, level=.9).lo > 0


def shared(hits):
    "A share and its 95 % interval (Wilson 1927)"
    n, p, z = len(hits), float(np.mean(hits)), 1.96
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return f'{p:.1%} | {middle - half:.1%} to {middle + half:.1%}'


def noise(markets=100, steps=30_000):
    "How often an agent that learnt noise is ahead of zero: on what it learnt from, and on another history"
    hits, ratios = {}, {}
    for m in range(markets):
        history, other = planted(0., seed=10_000 + m), planted(0., seed=20_000 + m)
        agent = learn(history, training=Training(steps=steps), seed=m)
        for where, world in dict(learnt=history, unseen=other).items():
            book = played(agent, world)
            days = day_blocks(book.time)
            for what, returns in dict(net=book.returns, gross=book.gross).items():
                hits.setdefault((where, what), []).append(ahead(returns, days))
            ratios.setdefault(where, []).append(sharpe(book.daily()[1], 365))
    print(f'\n| {markets} agents on noise, {steps:,} decisions each | ahead at 5 % | 95 % interval |\n|---|---|---|')
    for (where, what), on in hits.items(): print(f'| {where}, {what} | {shared(on)} |')
    for where, r in ratios.items():
        error = np.std(r, ddof=1) / math.sqrt(markets)
        print(f'\nnet Sharpe ratio, {where}: {np.mean(r):+.2f} (error {error:.2f}), {min(r):+.2f} to {max(r):+.2f}')


if __name__ == '__main__':
    torch.set_num_threads(1)
    what = sys.argv[1:2]
    if what == ['noise']: noise(*map(int, sys.argv[2:]))
    elif what == ['real']: real()
    else:
        speed()
        training()
        noise(40)
