"""Accuracy of the Temporal Fusion Transformer: `CRYPTOML_DATA=folder python bench/tft_accuracy.py SEEDS [DATA SET]...`

One loop feeds every network, other libraries' beside ours, the same tensors in the same order, so the networks alone
differ. For the peers run it with a python that has them."""
import copy, os, statistics, sys, time
from pathlib import Path

import numpy as np, pandas as pd, torch

from tft_peers import QUANTILES, make, mean_pinball, present

L, K, D, STEPS, EVERY, BATCH = 96, 24, 16, 500, 50, 64
VALID, TEST = 384, 1024                                                # windows that are judged


def waves(t, periods):
    "Sine and cosine of each period"
    return np.stack([f(2 * np.pi * t / p) for p in periods for f in (np.sin, np.cos)], 1)


def etth2(folder):
    "One series: oil temperature; its level and six loads observed, the calendar known"
    d = pd.read_parquet(folder / 'ETTh2.parquet')
    known = waves(d.date.to_numpy().astype('datetime64[h]').astype(int), (24, 168, 8766))
    seen = d.drop(columns='date').to_numpy()[None]
    return d[['OT']].to_numpy().T, seen, known, np.zeros((1, 0))


def exchange_rate(folder):
    "One model of eight series of log rates; own and mean daily change observed, day of five known, currency fixed"
    d = pd.read_parquet(folder / 'exchange_rate.parquet')
    y = np.log(d.drop(columns='step').to_numpy()).T
    change = np.diff(y, prepend=y[:, :1])
    seen = np.stack([change, np.broadcast_to(change.mean(0), change.shape)], -1)
    return y, seen, waves(d.step.to_numpy(), (5,)), np.eye(len(y))


def tensors(y, seen, known, fixed):
    "Train, validation and test windows (60, 20, 20 % of the time) as functions of an index, and their number"
    T = y.shape[1]
    cut = [0, int(.6 * T), int(.8 * T), T]
    train = slice(0, cut[1])
    change = np.lib.stride_tricks.sliding_window_view(y[:, train], K + 1, 1)            # [S, ., K + 1]
    change = (change - change[..., :1])[..., 1:]                                        # over 1 to K steps
    scale = change.std((1, 2))[:, None]                                                 # the unit of every loss
    seen = (seen - seen[:, train].mean(1, keepdims=True)) / seen[:, train].std(1, keepdims=True)
    y, seen, known, fixed = (torch.tensor(a, dtype=torch.float32) for a in (y / scale, seen, known, fixed))

    def part(i):
        start = torch.arange(cut[i], cut[i + 1] - L - K + 1)                            # all of a window in one part

        def windows(index):
            s, t = index % len(y), start[index // len(y)]
            rows = t[:, None] + torch.arange(L + K)
            own = y[s[:, None], rows]
            own = own - own[:, L - 1:L]                                                 # relative to the newest value
            past = torch.cat([known[rows[:, :L]], seen[s[:, None], rows[:, :L]], own[:, :L, None]], -1)
            return (past, known[rows[:, L:]], fixed[s] if fixed.shape[1] else None), own[:, L:]
        return windows, len(start) * len(y)
    return [part(i) for i in range(3)]


def loss_of(net, windows, index):
    net.eval()
    with torch.no_grad():
        parts = index.split(256)
        losses = [mean_pinball(net(*x), y).item() for x, y in map(windows, parts)]
    return float(np.average(losses, weights=[len(i) for i in parts]))


def run(name, parts, seed, lr=1e-3):
    "Test loss at the best validation loss, that loss, its step, CPU seconds of the training steps, parameters"
    (train, n), (valid, n_valid), (test, n_test) = parts
    seen, judged = torch.linspace(0, n_valid - 1, VALID).long(), torch.linspace(0, n_test - 1, TEST).long()
    (past, future, static), _ = train(torch.arange(2))
    n_static = 0 if static is None else static.shape[1]
    net = make(name, past.shape[2], future.shape[2], n_static, L, K, D, seed=seed)
    opt, draw = torch.optim.Adam(net.parameters(), lr), torch.Generator().manual_seed(seed)
    best, took = (np.inf,), 0.
    for step in range(1, STEPS + 1):
        x, y = train(torch.randint(n, (BATCH,), generator=draw))
        net.train()
        began = time.process_time()
        loss = mean_pinball(net(*x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        took += time.process_time() - began
        if step % EVERY: continue
        v = loss_of(net, valid, seen)
        if v < best[0]: best = v, step, copy.deepcopy(net.state_dict())
    net.load_state_dict(best[2])
    return loss_of(net, test, judged), *best[:2], took, sum(p.numel() for p in net.parameters())


def climate(parts):
    "Test loss of the quantiles of the change in training at each step, without any network"
    (train, n), _, (test, n_test) = parts
    _, changes = train(torch.linspace(0, n - 1, 4096).long())
    q = torch.quantile(changes, torch.tensor(QUANTILES), 0).T
    _, y = test(torch.linspace(0, n_test - 1, TEST).long())
    return mean_pinball(q.expand(len(y), -1, -1), y).item()


DATA = dict(ETTh2=etth2, exchange_rate=exchange_rate)
HEAD = '''| data | network | test loss, mean (sd) | by seed | validation | best step | CPU s | parameters |
|---|---|---|---|---|---|---|---|'''


def row(name, network, runs):
    test, valid, step, took, size = zip(*runs)
    sd = statistics.stdev(test) if len(runs) > 1 else np.nan
    cells = [
        name,
        network,
        f'{np.mean(test):.4f} ({sd:.4f})',
        ', '.join(f'{v:.4f}' for v in test),
        f'{np.mean(valid):.4f}',
        ', '.join(map(str, step)),
        f'{np.mean(took):.0f}',
        f'{size[0]:,}',
    ]
    return f'| {" | ".join(cells)} |'


def main(seeds, sets):
    torch.set_num_threads(1)
    folder = Path(os.environ['CRYPTOML_DATA']) / 'reference'
    print(f'L {L}, K {K}, d {D}, 4 heads, dropout .1, {STEPS} steps of {BATCH} windows, Adam 1e-3, '
          f'best of {STEPS // EVERY} validations; {seeds} seeds')
    print(HEAD)
    for name in sets:
        parts = tensors(*DATA[name](folder))
        print(f'| {name} | quantiles of the change in training | {climate(parts):.4f} | | | | | |', flush=True)
        rows = {k: [] for k in ['cryptoml', *present()]}
        for seed in range(seeds):
            for k in rows:
                rows[k].append(run(k, parts, seed))
                print(name, k, seed, rows[k][-1], file=sys.stderr, flush=True)
        for k, runs in rows.items(): print(row(name, k, runs), flush=True)


if __name__ == '__main__':
    if len(sys.argv) < 2 or 'CRYPTOML_DATA' not in os.environ:
        print('tft_accuracy: minutes long and needs data; ' + __doc__.split('\n')[0])
    else: main(int(sys.argv[1]), sys.argv[2:] or list(DATA))
