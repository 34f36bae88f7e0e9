"""Elastic weight consolidation: `python bench/ewc.py` (cost of the Fisher information), `digits`, `regimes`, `guard`

    PYTHONPATH=. python bench/ewc.py digits     # needs scikit-learn, for its 1,797 digits; some minutes
    PYTHONPATH=. python bench/ewc.py regimes    # two planted regimes, ten seeds
    PYTHONPATH=. python bench/ewc.py guard      # what the guard lets through and what it refuses, 100 offers a row"""
import statistics
import sys
import time
from functools import partial

import torch
from torch import nn

from cryptoml import ewc
from cryptoml.ewc import ContinualLearner, Rows, categorical, fisher, gaussian, squared_by_loop, squared_by_vmap
from cryptoml.ewc import trained, transfer
from cryptoml.trainer import train_epoch


def mlp(width, dropout=0.):
    hidden = [nn.ReLU(), nn.Dropout(dropout)] if dropout else [nn.ReLU()]
    return nn.Sequential(nn.Linear(64, width), *hidden, nn.Linear(width, width), *hidden, nn.Linear(width, 10))


# The diagonal Fisher, 1,437 samples of 64 inputs

def by_vmap(at_once, model, rows, names):
    "The general way with so many gradients of samples in memory at a time"
    kept = ewc._NUMBERS
    ewc._NUMBERS = at_once * sum(p.numel() for p in model.parameters())
    try: return squared_by_vmap(model, categorical, rows, names)
    finally: ewc._NUMBERS = kept


def cost(rounds=5):
    for width in (64, 256, 512):
        torch.manual_seed(0)
        model = mlp(width)
        batch = torch.rand(1437, 64), torch.randint(10, (1437,))
        rows = Rows.of(batch)
        names = list(trained(model))
        columns = {
            'ours': lambda: fisher(model, categorical, [batch]),
            'vmap, all at once': partial(by_vmap, 1437, model, rows, names),
            'vmap, 256 at a time': partial(by_vmap, 256, model, rows, names),
            'vmap, as many as fit the cache': partial(squared_by_vmap, model, categorical, rows, names),
            'a loop': partial(squared_by_loop, model, categorical, rows, names),
        }
        first = {name: f() for name, f in columns.items()}
        want = first['a loop']
        for name, got in first.items():
            scale = 1 if name == 'ours' else 1437
            off = max(((got[k] * 1437 / scale - want[k]).abs().max() / want[k].abs().max()).item() for k in want)
            assert off < 1e-4, f'{name} is off by {off}'
        took = {name: [] for name in columns}
        for _ in range(rounds):
            for name, f in columns.items():
                start = time.process_time()
                f()
                took[name].append(time.process_time() - start)
        ours = statistics.median(took['ours'])
        print(f'64-{width}-{width}-10')
        for name, seconds in took.items():
            median = statistics.median(seconds)
            print(f'  {name:32}{1000 * median:9.1f} ms  {median / ours:6.1f} times', flush=True)


# Permuted digits

def digits():
    "Images [1797, 64] in 0..1 and labels"
    try: from sklearn.datasets import load_digits
    except ImportError: sys.exit('the digits need scikit-learn: pip install scikit-learn, in an environment of its own')
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


def permuted(data, train, test, seed, tasks=5):
    x, y = data
    g = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(64, generator=g) for _ in range(tasks)]
    return [((x[train][:, o], y[train]), (x[test][:, o], y[test])) for o in orders]


def hits(model, data):
    model.eval()
    with torch.no_grad(): return (model(data[0]).argmax(1) == data[1]).float().mean().item()


def matrix(tasks, seed, joint=False, epochs=15, **settings):
    "Forgetting matrix [T, T] of one run"
    torch.manual_seed(seed)
    model = mlp(256, dropout=.5)
    learner = ContinualLearner(model, categorical, seed=seed, **settings)
    R = []
    for i, ((x, y), _) in enumerate(tasks):
        if joint: x, y = (torch.cat(parts) for parts in zip(*(train for train, _ in tasks[:i + 1])))
        sgd = torch.optim.SGD(model.parameters(), lr=.05, momentum=.9)
        for _ in range(epochs):
            batches = [(x[rows], y[rows]) for rows in torch.randperm(len(x)).split(64)]
            train_epoch(model, batches, learner.loss, sgd, clip=5.)
        learner.consolidate([(x, y)])
        R.append([hits(model, test) for _, test in tasks])
    return torch.tensor(R)


def parts(n):
    "Digits to learn, to choose by and to report on: the last are never seen while anything is chosen"
    order = torch.randperm(n, generator=torch.Generator().manual_seed(2017))
    return order[720:], order[360:720], order[:360]


STRENGTHS = 10, 30, 100, 300, 1000, 3000


def chosen(data, strengths=STRENGTHS, seeds=range(100, 105), **settings):
    "The strength with the best average on digits and orders that are not reported"
    learn, choose, _ = parts(len(data[1]))
    found = {}
    for strength in strengths:
        runs = [matrix(permuted(data, learn, choose, s), s, strength=strength, **settings) for s in seeds]
        found[strength] = statistics.mean(transfer(R).average for R in runs)
        print(f'  chosen by: strength {strength:5}  average {found[strength]:.3f}', flush=True)
    return max(found, key=found.get)


def report(name, runs):
    of = [transfer(R) for R in runs]
    for what in ('average', 'backward', 'forgetting'):
        values = [getattr(t, what) for t in of]
        name += f' | {statistics.mean(values):.3f} ({statistics.stdev(values):.3f})'
    print(f'| {name} | {", ".join(f"{t.average:.3f}" for t in of)} |', flush=True)


def permuted_digits(seeds=range(5)):
    data = digits()
    learn, choose, test = parts(len(data[1]))
    alone = chosen(data, memory=0)
    once = chosen(data, memory=0, gamma=1.)
    both = chosen(data, STRENGTHS[:4], memory=1000)
    ways = {
        'naive': dict(strength=0, memory=0),
        'replay of 1,000': dict(strength=0, memory=1000),
        f'EWC, strength {alone}': dict(strength=alone, memory=0),
        f'online EWC, gamma 1, strength {once}': dict(strength=once, memory=0, gamma=1.),
        f'EWC, strength {both}, and replay': dict(strength=both, memory=1000),
        'joint': dict(strength=0, memory=0, joint=True),
    }
    print('| | average | backward transfer | forgetting | average by seed |\n|---|---|---|---|---|')
    for name, way in ways.items():
        report(name, [matrix(permuted(data, torch.cat([learn, choose]), test, s), s, **way) for s in seeds])


# Planted regimes: a regression whose weights depend on where the first input is

NOISE = .5
PLANTED = torch.randn(2, 7, generator=torch.Generator().manual_seed(5)) / 7 ** .5
CALM = dict(centre=-1.5, weights=PLANTED[0])
WILD = dict(centre=1.5, weights=PLANTED[1])


def regime(n, seed, centre, weights, level=0.):
    "Inputs [n, 8], the first of them around the centre, and labels [n]"
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=g)
    x[:, 0] = centre + .5 * x[:, 0]
    return x, x[:, 1:] @ weights + level + NOISE * torch.randn(n, generator=g)


class Regression(nn.Sequential):
    def __init__(self, d=128):
        super().__init__(nn.Linear(8, d), nn.Tanh(), nn.Linear(d, d), nn.Tanh(), nn.Linear(d, 1))

    def forward(self, x): return super().forward(x).squeeze(-1)


def squared(model, data):
    with torch.no_grad(): return (model(data[0]) - data[1]).square().mean().item()


def fit(learner, data, epochs=10, lr=.05):
    sgd = torch.optim.SGD(learner.model.parameters(), lr=lr, momentum=.9)
    x, y = data
    for epoch in range(epochs):
        for group in sgd.param_groups: group['lr'] = lr * (1 - epoch / epochs)
        batches = [(x[rows], y[rows]) for rows in torch.randperm(len(x)).split(64)]
        train_epoch(learner.model, batches, learner.loss, sgd)


def after_two(seed, **settings):
    "A learner after two regimes; mean squared error of the old one before and after, and of the new one after"
    torch.manual_seed(seed)
    learner = ContinualLearner(Regression(), gaussian(NOISE), labels='every', seed=seed, **settings)
    calm, wild = regime(4000, 4 * seed, **CALM), regime(4000, 4 * seed + 1, **WILD)
    fresh_calm, fresh_wild = regime(2000, 4 * seed + 2, **CALM), regime(2000, 4 * seed + 3, **WILD)
    fit(learner, calm)
    before = squared(learner.model, fresh_calm)
    learner.consolidate([calm])
    fit(learner, wild)
    found = before, squared(learner.model, fresh_calm), squared(learner.model, fresh_wild)
    learner.consolidate([wild])
    return learner, found


def regimes(seeds=range(10)):
    print('| | old regime, before | after | rise, mean (worst) | new regime |\n|---|---|---|---|---|')
    for name, way in {
        'naive': dict(strength=0, memory=0),
        'EWC, strength 1,000': dict(strength=1000, memory=0),
        'replay of 100': dict(strength=0, memory=100),
        'EWC, strength 30, and replay of 100': dict(strength=30, memory=100),
        'replay of 3,000': dict(strength=0, memory=3000),
        'EWC, strength 1, and replay of 3,000': dict(strength=1, memory=3000),
    }.items():
        found = torch.tensor([after_two(s, **way)[1] for s in seeds])
        before, after, new = found.mean(0).tolist()
        rise = found[:, 1] / found[:, 0] - 1
        told = f'{rise.mean():+.1%} ({rise.max():+.1%})'
        print(f'| {name} | {before:.3f} | {after:.3f} | {told} | {new:.3f} |', flush=True)


# The guard

def offers(n, seed):
    "Batches of n samples, n others to judge them, and the regime that is true now"
    wild, moved = dict(WILD), dict(WILD, centre=6., level=2.)
    slightly = dict(moved, level=.5)
    x, y = regime(n, 3 * seed, **wild)
    recent = regime(n, 3 * seed + 1, **wild)
    spiked = y.clone()
    spiked[0] = 100.
    shuffled = y[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    return {
        'a shift of four noises': (regime(n, 3 * seed, **moved), regime(n, 3 * seed + 1, **moved), moved),
        'a shift of one noise': (regime(n, 3 * seed, **slightly), regime(n, 3 * seed + 1, **slightly), slightly),
        'nothing new': ((x, y), recent, wild),
        'labels with the wrong sign': ((x, -y), recent, wild),
        'labels of other samples': ((x, shuffled), recent, wild),
        'inputs in another unit, x 100': ((100 * x, y), recent, wild),
        'labels in another unit, x 1,000': ((x, 1000 * y), recent, wild),
        'one label of 200 noises': ((x, spiked), recent, wild),
    }


def guard(runs=25, seeds=range(4)):
    "So many offers to each of four learners"
    print('| batch | samples | accepted | learnt | excess gone | old error, mean (worst) | worst harm |')
    print('|---|---|---|---|---|---|---|')
    found = {}
    for seed in seeds:
        learner, _ = after_two(seed, strength=1, memory=4000)
        learner.remember = lambda batch: None                    # each offer finds the same state
        start = {name: v.clone() for name, v in learner.model.state_dict().items()}
        olds = [regime(2000, 10 ** 6 + i, **r) for i, r in enumerate((CALM, WILD))]
        for n, run in ((n, run) for n in (5, 10) for run in range(runs)):
            for name, (batch, recent, truth) in offers(n, 1000 + 100 * seed + run).items():
                learner.model.load_state_dict(start)
                torch.manual_seed(run)
                fresh = [regime(1000, 2 * 10 ** 6 + run, **truth), *olds]
                before = [squared(learner.model, data) for data in fresh]
                accepted = learner.update(batch, recent).accepted
                after = [squared(learner.model, data) for data in fresh]
                gone = (before[0] - after[0]) / (before[0] - NOISE ** 2)
                old = sum(after[1:]) / sum(before[1:]) - 1
                found.setdefault((name, n), []).append([float(accepted), gone, old, after[0] / before[0] - 1])
    for (name, n), rows in found.items(): print(guarded(name, n, torch.tensor(rows)))


def guarded(name, n, rows):
    "A line of the guard's table"
    passed = rows[rows[:, 0] > 0]
    told = f'| {name} | {n} and {n} | {rows[:, 0].mean():.0%} '
    if not len(passed): return told + '| | | | |'
    _, gone, old, harm = passed.T
    learnt = (passed[:, 1] > .8) & (passed[:, 2] < .05)
    told += f'| {learnt.sum() / len(rows):.0%} | {gone.median():.0%} '
    return told + f'| {old.mean():+.1%} ({old.max():+.1%}) | {harm.max():+.1%} |'


def main(what='cost'):
    torch.set_num_threads(1)
    what = {'cost': cost, 'digits': permuted_digits, 'regimes': regimes, 'guard': guard}.get(what)
    if not what: sys.exit(__doc__)
    what()


if __name__ == '__main__': main(*sys.argv[1:2])
