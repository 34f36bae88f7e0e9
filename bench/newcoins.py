"""Coins left out of training, each entering at a date, with ten windows to adapt on:
`CRYPTOML_DATA=folder python bench/newcoins.py all` (three CPU minutes; real bars of spot_1h)

Every coin is left out once, in one of three folds drawn by a seed. Training sees the other coins until 2022-06; what
is chosen (steps, rates, epochs) is chosen on them in the half-year after it. From 2023 on a coin that was left out
enters once a month, at a time drawn by the seed. Its examples are ten decisions a day apart whose labels are known
then; forecast is every fourth hour of its first two weeks: quantiles of the return over 24 hours, in usual moves, and
of log volatility over the trailing one."""
import copy
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from cryptoml.data import read_panel
from cryptoml.features import AdvancedFeatureEngineer
from cryptoml.maml import MetaLearningMAML
from cryptoml.metrics import interval_mean
from cryptoml.targets import make_targets
from cryptoml.trainer import TrainConfig, UltimateTrainer
from cryptoml.windows import Scaler

LEVELS = torch.tensor([.05, .25, .5, .75, .95])
HOURS = 24                       # Of a label
EVERY = 4                        # Hours from one decision to the next
DAY = 24 // EVERY                # Decisions
EXAMPLES = [-DAY * k - 1 for k in range(10, 0, -1)]   # Decisions before the entry; a label is known 25 hours later
ASKED = list(range(14 * DAY))    # Those of the first two weeks
FOLDS = 3
TRAINED, CHOSEN, LAST = map(pd.Timestamp, ('2022-07-01', '2023-01-01', '2024-05-01'))


class Coins:
    "Decisions of all coins: inputs [N, G, F], labels [N, G, 2], NaN where missing; and their times [G]"
    def __init__(self, path):
        panel, _ = read_panel(path, start='2020-11-01', end=LAST)
        engineer = AdvancedFeatureEngineer(families=['technical'])
        targets = make_targets(panel, (HOURS,))
        grid = np.flatnonzero(panel.bar_number % EVERY == EVERY - 1)
        self.time = (panel.time[grid] + panel.timeframe).tz_localize(None)
        self.x = engineer.transform_panel(panel)[:, grid][..., np.flatnonzero(engineer.model_ready)].astype(np.float32)
        volatility = targets['volatility'][:, grid, 0] - np.log(targets.sigma[:, grid])
        self.y = np.stack([targets['scaled'][:, grid, 0], volatility], -1).astype(np.float32)
        self.there = np.isfinite(self.y).all(-1) & (np.isnan(self.x).mean(-1) < .5)
        self.symbols = panel.symbols

    def before(self, end): return self.time + pd.Timedelta(hours=HOURS + 1) <= end   # with labels known by then

    def episodes(self, coins, begin, end):
        "Coin and first decision of every episode [E, 2] that lies whole between two times"
        length = ASKED[-1] - EXAMPLES[0] + 1
        whole = np.lib.stride_tricks.sliding_window_view(self.there, length, 1).all(-1)
        t = np.arange(whole.shape[1]) - EXAMPLES[0]
        inside = (self.time[t] >= begin) & (self.time[t] + pd.Timedelta('15D') + pd.Timedelta(hours=HOURS) < end)
        found = np.argwhere(whole & inside & np.isin(range(len(whole)), list(coins))[:, None])
        return found - [0, EXAMPLES[0]]

    def entries(self, coins, generator):
        "One episode a month and coin from 2023 on, at a random time of the month"
        all_of = self.episodes(coins, CHOSEN, LAST)
        month = self.time[all_of[:, 1]].to_period('M')
        order = generator.permutation(len(all_of))
        picked = pd.DataFrame(dict(coin=all_of[order, 0], month=month[order])).drop_duplicates().index
        return all_of[order[picked]]


class Scaled:
    "What a fold's networks read"
    def __init__(self, coins, train):
        rows = np.zeros(coins.there.shape, bool)
        rows[np.ix_(train, coins.before(TRAINED))] = True
        self.x = torch.from_numpy(Scaler.fit(coins.x, rows & coins.there)(coins.x))
        self.y = torch.from_numpy(coins.y)

    def at(self, episodes, which):
        "Inputs and labels [E, K, ...] of decisions so many after the first"
        n, t = torch.as_tensor(episodes[:, :1]), torch.as_tensor(episodes[:, 1:]) + torch.as_tensor(which)
        return self.x[n, t], self.y[n, t]

    def tasks(self, episodes, which=ASKED): return self.at(episodes, EXAMPLES), self.at(episodes, which)


def pinball(output, y):
    "Quantile loss of both labels [B, 2], mean over the levels"
    error = y[..., None] - output.unflatten(-1, (2, len(LEVELS)))
    return torch.maximum(LEVELS * error, (LEVELS - 1) * error).mean(-1)


def network(inputs, labels, seed=0):
    "Its forecast is at first that of no input: the quantiles of the labels"
    torch.manual_seed(seed)
    body = nn.Dropout(.2), nn.Linear(inputs, 32), nn.SiLU(), nn.Dropout(.3)
    net = nn.Sequential(*body, nn.Linear(32, 2 * len(LEVELS)))
    with torch.no_grad():
        net[4].weight.mul_(.1)
        net[4].bias.copy_(labels.quantile(LEVELS, 0).T.flatten())
    return net


OUTER = dict(lr=3e-4, weight_decay=.1, patience=3, lr_patience=1)


def train(data, rows, valid, out, rates=()):
    "On the decisions of all coins together [S, 2]"
    def batches(epoch, generator):
        for i in torch.randint(len(rows), (150, 256), generator=generator): yield data.at(rows[i], [0])

    def loss(net, batch): return pinball(net(batch[0][:, 0]), batch[1][:, 0]).mean()

    def validate(net): return dict(loss=loss(net, data.at(valid, [0])))
    x, y = data.at(rows, [0])
    net = network(x.shape[-1], y[:, 0])
    config = TrainConfig(epochs=len(rates) or 20, rates=tuple(rates), **OUTER)
    history = UltimateTrainer(net, config, out, 'cpu').fit(batches, loss, None if rates else validate)
    return net, history


def meta_train(data, learner, episodes, valid, out):
    def batches(epoch, generator):
        for i in torch.randint(len(episodes), (100, 16), generator=generator):
            yield data.tasks(episodes[i], torch.randperm(len(ASKED), generator=generator)[:20])
    learner.fit(batches, TrainConfig(epochs=12, **OUTER), out, [data.tasks(valid)], 'cpu')
    return learner


def best_steps(learners, data, valid, most=20):
    "Of several rates: the learner and the number of steps with the smallest loss in the episodes of validation"
    curves = {i: m.evaluate(*data.tasks(valid), most).mean(1).nan_to_num(torch.inf) for i, m in enumerate(learners)}
    i = min(curves, key=lambda i: curves[i].min())
    return learners[i], int(curves[i].argmin())


RATES = (.001, .003, .01, .03, .1, .3)


def fine_tuned(net, data, valid, adapts=(), most=20):
    learners = [MetaLearningMAML(net, pinball, lr=lr, order=1, adapts=adapts) for lr in RATES]
    return best_steps(learners, data, valid, most)


def ways_of(data, coins, train_coins, entries, folder):
    "Name to a function from the examples of an entry to a function of its inputs"
    known = coins.there & np.isin(range(len(coins.x)), train_coins)[:, None]
    def decisions(begin, end): return np.argwhere(known & begin & end)
    everything = np.ones(len(coins.time), bool)
    rows = decisions(everything, coins.before(TRAINED))
    valid_rows = decisions(coins.time >= TRAINED, coins.before(CHOSEN))
    episodes = coins.episodes(train_coins, coins.time[0], TRAINED)
    valid = coins.episodes(train_coins, TRAINED, CHOSEN)[::29]
    net, history = train(data, rows, valid_rows, folder/'joint')
    best = int(history.valid_loss.idxmin()) + 1
    start = {k: v.clone() for k, v in net.state_dict().items()}

    def again():
        other = network(data.x.shape[-1], data.at(rows, [0])[1][:, 0])
        other.load_state_dict(start)
        return other
    settings = dict(lr=.1, steps=2, rates='layer')
    meta = {
        'MAML': MetaLearningMAML(again(), pinball, **settings),
        'MAML, first order': MetaLearningMAML(again(), pinball, order=1, **settings),
        'MAML, last layer': MetaLearningMAML(again(), pinball, adapts=('4.',), **settings),
    }
    learners = {}
    for name, m in meta.items():
        meta_train(data, m, episodes, valid, folder/name.replace(' ', '').replace(',', '-'))
        learners[name] = best_steps([m], data, valid, 6)
    learners['fine-tuning'] = fine_tuned(net, data, valid)
    learners['fine-tuning, last layer'] = fine_tuned(net, data, valid, ('4.',))
    learners['fine-tuning, last bias'] = fine_tuned(net, data, valid, ('4.bias',))
    fresh = network(data.x.shape[-1], data.at(rows, [0])[1][:, 0])
    learners['ten windows alone, network'] = fine_tuned(fresh, data, valid, most=60)
    print('chosen steps:', {k: s for k, (_, s) in learners.items()}, f'; joint training: {best} epochs', flush=True)
    rates = tuple(history.lr[:best])

    def refit(quarter):
        until = decisions(everything, coins.before(quarter.start_time))
        return train(data, until, None, folder/f'refit-{quarter}', rates)[0], until
    refits = {q: refit(q) for q in coins.time[entries[:, 1]].to_period('Q').unique()}
    return net, meta['MAML'].model, learners, refits


def with_the_coin(data, net, rows, x, y, seed=0, steps=60):
    "Some more steps of a network on all decisions, an eighth of every batch the examples of the new coin"
    net = copy.deepcopy(net).train()
    adam = torch.optim.AdamW(net.parameters(), lr=OUTER['lr'] / 2, weight_decay=OUTER['weight_decay'])
    torch.manual_seed(seed)
    for _ in range(steps):
        old, labels = data.at(rows[torch.randint(len(rows), (224,))], [0])
        own = torch.randint(len(x), (32,))
        adam.zero_grad()
        pinball(net(torch.cat([old[:, 0], x[own]])), torch.cat([labels[:, 0], y[own]])).mean().backward()
        adam.step()
    return net.eval()


def forecasts(data, coins, entries, net, unadapted, learners, refits):
    "Losses by way [E, query, 2], and seconds to adapt"
    losses, seconds = {}, {}
    for e in entries:
        (x, y), (xq, yq) = ([v[0] for v in part] for part in data.tasks(e[None]))
        said = {'not adapted': net(xq), 'MAML, not adapted': unadapted(xq)}
        for name, (m, steps) in learners.items():
            start = time.perf_counter()
            said[name] = m.adapt(x, y, steps)(xq)
            seconds.setdefault(name, []).append(time.perf_counter() - start)
        said['ten windows alone, their quantiles'] = y.quantile(LEVELS, 0).T.flatten().expand(len(xq), -1)
        fresh, rows = refits[coins.time[e[1]].to_period('Q')]
        said['refit that quarter, without the coin'] = fresh(xq)
        start = time.perf_counter()
        said['refit that quarter, and once more with it'] = with_the_coin(data, fresh, rows, x, y)(xq)
        seconds.setdefault('refit that quarter, and once more with it', []).append(time.perf_counter() - start)
        for name, s in said.items(): losses.setdefault(name, []).append(pinball(s, yq).detach().numpy())
    return losses, seconds


def fold(coins, left_out, generator):
    data = Scaled(coins, [n for n in range(len(coins.x)) if n not in left_out])
    train_coins = [n for n in range(len(coins.x)) if n not in left_out]
    entries = coins.entries(left_out, generator)
    with tempfile.TemporaryDirectory() as folder:
        ways = ways_of(data, coins, train_coins, entries, Path(folder))
    return entries, *forecasts(data, coins, entries, *ways)


def table(coins, entries, losses, seconds):
    day = (coins.time[(entries[:, 1:] + ASKED).ravel()] - pd.Timestamp(0)).days
    plain = np.concatenate(losses['not adapted'])
    who = len(set(entries[:, 0]))
    print(f'{len(entries)} entries of {who} coins, {len(plain):,} decisions on {len(set(day))} days')
    print(f"{'':42} pinball loss   against not adapted, %, with interval      return  volatility   ms to adapt")
    for name, v in losses.items():
        v = np.concatenate(v)
        gain = interval_mean((v - plain).mean(1), day, overlap=1)
        gain = [100 * g / plain.mean() for g in gain]
        took = f'{1e3 * np.median(seconds[name]):8.1f}' if name in seconds else ''
        print(f'{name:42} {v.mean():.4f}         {gain[0]:+6.2f}  ({gain[1]:+6.2f} to {gain[2]:+6.2f})         '
              f'{v[:, 0].mean():.4f}   {v[:, 1].mean():.4f}   {took}')


def main():
    torch.set_num_threads(1)
    start = time.process_time()
    coins = Coins(Path(os.environ['CRYPTOML_DATA'])/'spot_1h.parquet')
    print(f'{len(coins.symbols)} coins, {len(coins.time):,} decisions, {coins.x.shape[-1]} inputs; '
          f'{time.process_time() - start:.0f} CPU s', flush=True)
    generator = np.random.default_rng(0)
    losses, seconds, entries = {}, {}, []
    for left_out in np.array_split(generator.permutation(len(coins.x)), FOLDS):
        print('left out:', *(coins.symbols[n] for n in sorted(left_out)), flush=True)
        entered, lost, took = fold(coins, set(left_out.tolist()), generator)
        entries.append(entered)
        for k, v in lost.items(): losses.setdefault(k, []).extend(v)
        for k, v in took.items(): seconds.setdefault(k, []).extend(v)
    table(coins, np.concatenate(entries), losses, seconds)
    print(f'{time.process_time() - start:.0f} CPU s')


if __name__ == '__main__':
    if sys.argv[1:] == ['all'] and 'CRYPTOML_DATA' in os.environ: main()
    else: print(__doc__)
