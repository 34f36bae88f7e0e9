"""What accumulation and several processes cost: `python bench/trainer.py [ROUNDS]`

A step of a small network, and of a net so small that a step is all overhead. One thread; CPU time of the process, of
the slower one where two share a step. A round visits all columns."""
import os, socket, subprocess, sys, time
from statistics import median

import torch
from torch import nn

from cryptoml.network import Network, NetworkConfig
from cryptoml.trainer import ALONE, adamw, joined, train_epoch

STEPS = 5
CONFIG = NetworkConfig(n_past=160, n_future=6, n_static=4, n_pair=2, horizons=(4, 12, 24), lookback=48, d_model=16,
                       n_heads=2)
DATES, WINDOWS, COINS, APART = 8, 2, 3, 12
HEAD = '''
{rounds} rounds of {steps} steps, ms a step: median (range)

| | whole batch | in 4 pieces | one process of torchrun | each of two | kept for the gradient, MB: whole, in 4 pieces |
|---|---|---|---|---|---|'''


def network():
    c, lead = CONFIG, (DATES, WINDOWS, COINS)
    def label(n): return torch.randint(n, (*lead, len(c.horizons)))
    H = len(c.horizons)
    batch = dict(
        past=torch.randn(DATES, COINS, c.lookback + (WINDOWS - 1) * APART, c.n_past),
        future=torch.randn(DATES, WINDOWS, c.steps, c.n_future),
        static=torch.randn(DATES, COINS, c.n_static),
        pairs=torch.randn(DATES, COINS, COINS, c.n_pair),
        trailing=torch.zeros(*lead, COINS, c.n_trailing),
        present=torch.ones(lead, dtype=torch.bool),
        direction=label(3), relative_direction=label(2), regime=label(4),
        relative=torch.randn(*lead, H), volatility=torch.randn(*lead, H), scaled=torch.randn(*lead, H),
        cost=torch.full((*lead, H), .05), path=torch.randn(*lead, c.steps), correlation=torch.zeros(*lead, COINS))
    return Network(c), batch, Network.loss


def small():
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1))
    return net, dict(x=torch.randn(64, 8), y=torch.randn(64, 1)), lambda m, b: (m(b['x']) - b['y']).square().mean()


MODELS = dict(network=network, small=small)


def epoch(made, accumulate=1, ranks=ALONE):
    "Milliseconds a step"
    model, batch, loss = made
    t = time.process_time()
    train_epoch(model, [batch] * STEPS, loss, adamw(model, 1e-3, 0.), accumulate=accumulate, ranks=ranks)
    return 1000 * (time.process_time() - t) / STEPS


def kept(made, accumulate):
    "Most that is kept for a gradient at a time, MB"
    now = most = 0
    sizes = {}
    def pack(t):
        nonlocal now, most
        place = t.untyped_storage().data_ptr()
        if place not in sizes:
            sizes[place] = t.untyped_storage().nbytes()
            now += sizes[place]
            most = max(most, now)
        return t
    model, batch, loss = made
    def begun(model, batch):
        nonlocal now
        now = 0
        sizes.clear()
        return loss(model, batch)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        train_epoch(model, [batch], begun, adamw(model, 0., 0.), accumulate=accumulate)
    return most / 1e6


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])


def named(rank, total, port):
    return dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(total), MASTER_ADDR='127.0.0.1', MASTER_PORT=port)


def of_two(name):
    "Milliseconds a step of the slower of two processes that share it"
    port = free_port()
    command = [sys.executable, __file__, 'process', name]
    both = [subprocess.Popen(command, env=os.environ | named(r, 2, port), stdout=subprocess.PIPE) for r in range(2)]
    return max(float(p.communicate()[0]) for p in both)


def process(name):
    "One of the two"
    made = MODELS[name]()
    with joined(torch.device('cpu'), 100) as ranks:
        epoch(made, ranks=ranks)
        print(median(epoch(made, ranks=ranks) for _ in range(3)))


def column(values): return f'{median(values):.2f} ({min(values):.2f}-{max(values):.2f})'


def main(rounds):
    print(HEAD.format(rounds=rounds, steps=STEPS))
    for name, make in MODELS.items():
        made = make()
        epoch(made)
        found = dict(whole=[], pieces=[], one=[], two=[])
        for _ in range(rounds):
            found['whole'].append(epoch(made))
            found['pieces'].append(epoch(made, accumulate=4))
            os.environ.update(named(0, 1, free_port()))
            with joined(torch.device('cpu'), 100) as ranks: found['one'].append(epoch(made, ranks=ranks))
            for k in named(0, 1, ''): del os.environ[k]
            found['two'].append(of_two(name))
        mb = ', '.join(f'{kept(made, k):.1f}' for k in (1, 4))
        print(f"| {name} | {' | '.join(map(column, found.values()))} | {mb} |", flush=True)


if __name__ == '__main__':
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if sys.argv[1:2] == ['process']: process(sys.argv[2])
    else: main(int(sys.argv[1]) if sys.argv[1:] else 5)
