"""Meta-learning on sinusoids: speed, `python bench/maml.py` (beside `higher` where it is installed),
and what the paper shows, `python bench/maml.py learn ITERATIONS SEEDS` (10,000 and 3 take six CPU minutes)"""
import statistics
import sys
import time

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from cryptoml.maml import MetaLearningMAML, sinusoids

try: import higher
except ImportError: higher = None

LR = .01


def network():
    "The paper's: two hidden layers of 40, ReLU"
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def loop(model, support, query):
    "A gradient for each task"
    weights = dict(model.named_parameters())
    after = 0.
    for x, y, xq, yq in zip(*support, *query):
        inner = F.mse_loss(functional_call(model, weights, (x,)), y)
        g = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        w = {name: v - LR * d for (name, v), d in zip(weights.items(), g)}
        after = after + F.mse_loss(functional_call(model, w, (xq,)), yq)
    return after / len(support[0])


def vmap_grad(model, support, query):
    "The way of torch's tutorials: a gradient within a vectorised function"
    weights = dict(model.named_parameters())

    def loss(w, x, y): return F.mse_loss(functional_call(model, w, (x,)), y)

    def task(x, y, xq, yq):
        g = grad(loss)(weights, x, y)
        return loss({name: w - LR * g[name] for name, w in weights.items()}, xq, yq)
    return vmap(task)(*support, *query).mean()


def vmap_grad_by_hand(model, support, query):
    "The same without modules: the network is written out over a list of tensors"
    weights = list(model.parameters())

    def loss(w, x, y):
        h = F.relu(F.linear(x, w[0], w[1]))
        h = F.relu(F.linear(h, w[2], w[3]))
        return F.mse_loss(F.linear(h, w[4], w[5]), y)

    def task(x, y, xq, yq):
        g = grad(loss)(weights, x, y)
        return loss([w - LR * d for w, d in zip(weights, g)], xq, yq)
    return vmap(task)(*support, *query).mean()


def by_higher(model, support, query):
    inner = torch.optim.SGD(model.parameters(), lr=LR)
    after = 0.
    for x, y, xq, yq in zip(*support, *query):
        with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (unrolled, step):
            step.step(F.mse_loss(unrolled(x), y))
            after = after + F.mse_loss(unrolled(xq), yq)
    return after / len(support[0])


def ours(loss=None, stacked=True, order=2):
    learners = {}

    def outer(model, support, query):
        if model not in learners:
            learners[model] = MetaLearningMAML(model, *[loss] * (loss is not None), lr=LR, order=order)
            if not stacked: learners[model].losses.layers = None
        return learners[model](support, query)
    return outer


COLUMNS = {
    'cryptoml': ours(),
    'cryptoml, one number of loss a task': ours(F.mse_loss),
    'cryptoml, any model (vmap of the forward pass)': ours(stacked=False),
    'cryptoml, first order': ours(order=1),
    'vmap(grad)': vmap_grad,
    'vmap(grad), written out by hand': vmap_grad_by_hand,
    'loop over tasks': loop,
    'higher': by_higher,
}


def agree(columns, K=10):
    "Largest difference of any column's loss and outer gradient from the loop's; first order is another gradient"
    tasks = sinusoids(25, K, torch.Generator().manual_seed(1))
    found = {}
    for name, outer in columns.items():
        model = network()
        loss = outer(model, *tasks)
        g = torch.autograd.grad(loss, list(model.parameters()))
        found[name] = torch.cat([loss.detach().view(1), *(d.flatten() for d in g)])
    return max((v - found['loop over tasks']).abs().max().item() for k, v in found.items() if 'first' not in k)


def speed(rounds=7, seconds=.7):
    "Outer steps a CPU second, one thread, interleaved; sampling of tasks and Adam included"
    columns = {k: f for k, f in COLUMNS.items() if higher or f is not by_higher}
    apart = agree(columns)
    assert apart < 1e-5, f'the columns do not agree: {apart}'
    models = {k: network() for k in columns}
    adam = {k: torch.optim.Adam(m.parameters(), lr=1e-3, fused=True) for k, m in models.items()}
    generator = torch.Generator().manual_seed(0)
    rates = {k: [] for k in columns}
    for turn in range(rounds + 1):
        for k in list(columns)[::1 if turn % 2 else -1]:
            steps = 0
            start = time.process_time()
            while (took := time.process_time() - start) < seconds or steps < 2:
                adam[k].zero_grad()
                columns[k](models[k], *sinusoids(25, 10, generator)).backward()
                adam[k].step()
                steps += 1
            if turn: rates[k].append(steps / took)
    return rates, apart


def learn(iterations, seed, **settings):
    "Mean squared error of 2,000 new tasks, [steps + 1], after so many batches of 25 tasks of 10 points"
    model = network()
    torch.manual_seed(seed)
    for layer in (0, 2, 4):
        nn.init.kaiming_uniform_(model[layer].weight, a=5 ** .5)
        nn.init.zeros_(model[layer].bias)
    learner = MetaLearningMAML(model, **dict(lr=LR) | settings)
    adam = torch.optim.Adam(learner.parameters(), lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(iterations):
        adam.zero_grad()
        learner(*sinusoids(25, 10, generator)).backward()
        adam.step()
    tasks = sinusoids(2000, 10, torch.Generator().manual_seed(12345), queries=100)
    return learner.evaluate(*tasks, 10).mean(1)


KINDS = {   # Settings of the learner by what they are called
    'second order': {},
    'first order': dict(order=1),
    'inner rates by tensor': dict(rates='layer'),
    'inner rates by number': dict(rates='element'),
    'only the last layer adapts': dict(adapts=('4.',)),
}


def adapting(calls=200):
    "Milliseconds to adapt to ten points"
    learner = MetaLearningMAML(network(), lr=LR)
    (x, y), _ = sinusoids(1, 10)
    took = []
    for _ in range(calls):
        start = time.perf_counter()
        learner.adapt(x[0], y[0])
        took.append(1e3 * (time.perf_counter() - start))
    return statistics.median(took)


if __name__ == '__main__':
    torch.set_num_threads(1)
    if sys.argv[1:2] == ['learn']:
        iterations, seeds = map(int, sys.argv[2:4])
        print(f'MSE of 2,000 new tasks after 0, 1, 10 steps; {iterations:,} batches; each seed')
        for seed in range(seeds):
            for name, settings in KINDS.items():
                curve = learn(iterations, seed, **settings)
                print(f'{name:30}', *[f'{curve[i]:.3f}' for i in (0, 1, 10)], flush=True)
    else:
        rates, apart = speed()
        if not higher: print('higher is not installed (pip install higher==0.2.1): its column is left out')
        print(f'outer steps a second, medians (range); losses and gradients agree to {apart:.0e}')
        own = statistics.median(rates['cryptoml'])
        for name, r in rates.items():
            median = statistics.median(r)
            print(f'{name:48} {median:6.1f} ({min(r):.0f} to {max(r):.0f})   {own / median:5.2f}')
        print(f'adapt to ten points: {adapting():.2f} ms')
