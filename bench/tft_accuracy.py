"""Accuracy of the Temporal Fusion Transformer, other libraries' beside it: `CRYPTOML_DATA=folder python bench/tft_accuracy.py SEEDS [DATA SET]...`

One loop feeds every network the same tensors in the same order, so the networks alone differ. For the peers run it with a python that has them."""
import copy, os, statistics, sys, time
from pathlib import Path

import numpy as np, pandas as pd, torch

from tft_peers import QUANTILES, make, pinball, present

L, K, D, STEPS, EVERY, BATCH = 96, 24, 16, 500, 50, 64


def waves(t, periods): return np.stack([f(2 * np.pi * t / p) for p in periods for f in (np.sin, np.cos)], 1)


def etth2(folder):
    "One series: oil temperature; its level and six loads observed, the calendar known"
    d = pd.read_parquet(folder / 'ETTh2.parquet')
    known = waves(d.date.to_numpy().astype('datetime64[h]').astype(int), (24, 168, 8766))
    return d[['OT']].to_numpy().T, d.drop(columns='date').to_numpy()[None], known, np.zeros((1, 0))


def exchange_rate(folder):
    "One model of eight series of log rates; own and mean daily change observed, the day of five known, the currency (one of eight) fixed"
    d = pd.read_parquet(folder / 'exchange_rate.parquet')
    y = np.log(d.drop(columns='step').to_numpy()).T
    change = np.diff(y, prepend=y[:, :1])
    return y, np.stack([change, np.broadcast_to(change.mean(0), change.shape)], -1), waves(d.step.to_numpy(), (5,)), np.eye(len(y))


def tensors(y, seen, known, fixed):
    "Train, validation and test windows (60, 20, 20 % of the time) as functions of an index, and their number"
    T = y.shape[1]
    cut = [0, int(.6 * T), int(.8 * T), T]
    train = slice(0, cut[1])
    change = np.lib.stride_tricks.sliding_window_view(y[:, train], K + 1, 1)            # [S, ., K + 1]
    scale = (change - change[..., :1])[..., 1:].std((1, 2))[:, None]                    # the unit of every loss: sd in training of the change over 1 to K steps
    seen = (seen - seen[:, train].mean(1, keepdims=True)) / seen[:, train].std(1, keepdims=True)
    y, seen, known, fixed = (torch.tensor(a, dtype=torch.float32) for a in (y / scale, seen, known, fixed))

    def part(i):
        start = torch.arange(cut[i], cut[i + 1] - L - K + 1)                            # inputs and outcomes in one part only

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
        return float(np.average([pinball(net(*x), y).item() for x, y in map(windows, index.split(256))], weights=[len(i) for i in index.split(256)]))


def run(name, parts, seed, lr=1e-3):
    "Test loss of the state with the best validation loss, that validation loss, its step, CPU seconds of the training steps, parameters"
    (train, n), (valid, n_valid), (test, n_test) = parts
    seen, judged = torch.linspace(0, n_valid - 1, 384).long(), torch.linspace(0, n_test - 1, 1024).long()
    (past, future, static), _ = train(torch.arange(2))
    net = make(name, past.shape[2], future.shape[2], 0 if static is None else static.shape[1], L, K, D, seed=seed)
    opt, draw = torch.optim.Adam(net.parameters(), lr), torch.Generator().manual_seed(seed)
    best, took = (np.inf,), 0.
    for step in range(1, STEPS + 1):
        x, y = train(torch.randint(n, (BATCH,), generator=draw))
        net.train()
        began = time.process_time()
        loss = pinball(net(*x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        took += time.process_time() - began
        if step % EVERY == 0 and (v := loss_of(net, valid, seen)) < best[0]: best = v, step, copy.deepcopy(net.state_dict())
    net.load_state_dict(best[2])
    return loss_of(net, test, judged), *best[:2], took, sum(p.numel() for p in net.parameters())


def climate(parts):
    "Test loss of the quantiles of the change in training at each step, without any network"
    (train, n), _, (test, n_test) = parts
    q = torch.quantile(train(torch.linspace(0, n - 1, 4096).long())[1], torch.tensor(QUANTILES), 0).T
    y = test(torch.linspace(0, n_test - 1, 1024).long())[1]
    return pinball(q.expand(len(y), -1, -1), y).item()


def main(seeds, sets):
    torch.set_num_threads(1)
    folder = Path(os.environ['CRYPTOML_DATA']) / 'reference'
    print(f'L {L}, K {K}, d {D}, 4 heads, dropout .1, {STEPS} steps of {BATCH} windows, Adam 1e-3, best of {STEPS // EVERY} validations; {seeds} seeds')
    print('| data | network | test loss, mean (sd) | by seed | validation | best step | CPU s | parameters |\n|---|---|---|---|---|---|---|---|')
    for name in sets:
        parts = tensors(*dict(ETTh2=etth2, exchange_rate=exchange_rate)[name](folder))
        print(f'| {name} | quantiles of the change in training | {climate(parts):.4f} | | | | | |', flush=True)
        rows = {k: [] for k in ['cryptoml', *present()]}
        for seed in range(seeds):
            for k in rows: rows[k].append(run(k, parts, seed)); print(name, k, seed, rows[k][-1], file=sys.stderr, flush=True)
        for k, runs in rows.items():
            test, valid, step, took, size = zip(*runs)
            sd = statistics.stdev(test) if seeds > 1 else np.nan
            print(f'| {name} | {k} | {np.mean(test):.4f} ({sd:.4f}) | {", ".join(f"{v:.4f}" for v in test)} | {np.mean(valid):.4f} | {", ".join(map(str, step))} | {np.mean(took):.0f} | {size[0]:,} |', flush=True)


if __name__ == '__main__':
    if len(sys.argv) < 2 or 'CRYPTOML_DATA' not in os.environ: print('tft_accuracy: minutes long and needs data; ' + __doc__.split('\n')[0])
    else: main(int(sys.argv[1]), sys.argv[2:] or ['ETTh2', 'exchange_rate'])
