"""Speed of the Temporal Fusion Transformer: `python bench/tft.py [ROUNDS [PAST INPUTS]...]`, with BENCH_PEERS=python that has peers for theirs in the same run, BENCH_THREADS=2 for two threads

A column is a process of its own; the runner visits them in turn, back and forth, and takes medians."""
import json, os, resource, statistics, subprocess, sys, time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from tft_peers import make, pinball, present

L, K, D, KNOWN, FIXED, RUNS, WINDOWS, STRIDE = 96, 24, 64, 6, 4, 16, 16, 12
THREADS = int(os.environ.get('BENCH_THREADS', 1))
clock = time.process_time if THREADS == 1 else time.perf_counter
LSTM = 3 * 16 * D * D * (L + K)                  # FLOPs of forward and backward for a window: the counter does not see them


class Column:
    "One implementation at `F` past inputs"
    def __init__(self, name, F):
        self.name, (kind, *_) = name, name.split()
        torch.manual_seed(0)
        more = (WINDOWS - 1) * STRIDE
        shared = 'shared' in name
        self.B = RUNS * WINDOWS if kind == 'cryptoml' and (shared or F < 100) else 64      # 256 independent windows of 160 inputs need some 10 GB
        rows, extra = (RUNS, more) if shared else (self.B, 0)
        self.x = torch.randn(rows, L + extra, F), torch.randn(rows, K + extra, KNOWN), torch.randn(rows, FIXED)
        self.y = torch.randn(self.B, K)
        settings = dict(recompute='recompute' in name, running='running' in name, families=tuple(F // 13 + (i < F % 13) for i in range(13)) if 'families' in name else ()) if kind == 'cryptoml' else {}
        self.net = make(kind, F, KNOWN, FIXED, L, K, D, **settings)
        self.call = (lambda *x: self.net.net.shared(*x, windows=WINDOWS, stride=STRIDE).quantiles) if shared else self.net
        self.optimizer, self.stream = torch.optim.Adam(self.net.parameters(), 1e-3), None

    def loss(self):
        loss = pinball(self.call(*self.x), self.y)
        loss.backward()

    def train(self):
        "Windows a second of one training step"
        self.net.train()
        t = clock()
        self.optimizer.zero_grad()
        self.loss()
        self.optimizer.step()
        return self.B / (clock() - t)

    def newest(self):
        "Milliseconds from a newest bar to the forecast of one series: the whole window again, or the bar alone in the stream"
        from statistics import median
        self.net.eval()
        past, future, static = (a[:1, :n].clone() for a, n in zip(self.x, (L, K, FIXED)))
        if 'stream' in self.name and self.stream is None:
            from cryptoml.tft import TFTStream
            self.stream = TFTStream(self.net.net, static)
            self.stream.update(past)
            assert (self.stream.forecast(future).quantiles - self.net(past, future, static)).abs().max() < 1e-5
        took = []
        for _ in range(12):
            t = clock()
            if self.stream:
                self.stream.update(past[:, -1:])
                self.stream.forecast(future)
            else:
                with torch.no_grad(): self.net(past, future, static)
            took.append(1000 * (clock() - t))
        return median(took[2:])

    def about(self):
        "Parameters, peak memory in MB so far, MFLOP a window"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self.net.train()
        with FlopCounterMode(display=False) as count: self.loss()
        return sum(p.numel() for p in self.net.parameters()), peak, (count.get_total_flops() / self.B + LSTM) / 1e6


def serve(name, F):
    answers = os.fdopen(os.dup(1), 'w', buffering=1)
    os.dup2(2, 1)                                                     # libraries print
    torch.set_num_threads(THREADS)
    column = Column(name, F)
    for line in sys.stdin: answers.write(json.dumps(getattr(column, line.strip())()) + '\n')


class Process:
    def __init__(self, python, name, F):
        env = os.environ | {'OMP_NUM_THREADS': str(THREADS), 'PYTHONPATH': str(Path(__file__).parents[1])}
        self.p = subprocess.Popen([python, '-W', 'ignore', __file__, 'column', name, str(F)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, text=True, bufsize=1, env=env)

    def ask(self, what):
        self.p.stdin.write(what + '\n')
        return json.loads(self.p.stdout.readline() or 'null')


def ceiling(n=1024):
    "GFLOP/s of a float32 product"
    a, b, c = (torch.randn(n, n) for _ in range(3))
    took = []
    for _ in range(8):
        t = clock()
        torch.mm(a, b, out=c)
        took.append(clock() - t)
    return 2 * n ** 3 / min(took) / 1e9


def table(F, peers, python, rounds):
    ours = ['cryptoml', 'cryptoml shared', 'cryptoml shared recompute', 'cryptoml shared families', 'cryptoml shared running', 'cryptoml stream']
    columns = {k: Process(sys.executable, k, F) for k in ours} | {k: Process(python, k, F) for k in peers}
    trained = [k for k in columns if 'stream' not in k]
    about = {}
    for k in trained: columns[k].ask('train'); about[k] = columns[k].ask('about')       # a step that does not count, and memory before anything else
    speed, newest, product = {k: [] for k in trained}, {k: [] for k in columns if k in ('cryptoml', 'cryptoml stream', *peers)}, []
    for r in range(rounds):
        product.append(ceiling())
        for k in [*columns][::-1 if r % 2 else 1]:
            if k in speed: speed[k].append(columns[k].ask('train'))
            if k in newest: newest[k].append(columns[k].ask('newest'))
    top = statistics.median(product)
    print(f'\n{F} past inputs; float32 product {top:.0f} GFLOP/s; {rounds} rounds\n\n| | windows/s (range) | newest bar, ms | parameters | peak MB | MFLOP a window | share of the product |\n|---|---|---|---|---|---|---|')
    for k in columns:
        v = speed.get(k)
        cells = [f'{statistics.median(v):.0f} ({min(v):.0f}-{max(v):.0f})' if v else '', f'{statistics.median(newest[k]):.2f}' if k in newest else '']
        if v: n, peak, flop = about[k]; cells += [f'{n:,}', f'{peak:.0f}', f'{flop:.0f}', f'{flop * statistics.median(v) / top / 1000:.0%}']
        print(f'| {k} | {" | ".join(cells)} |', flush=True)
    for c in columns.values(): c.p.stdin.close(); c.p.wait()


def main(rounds=5, *sizes):
    torch.set_num_threads(THREADS)
    python = os.environ.get('BENCH_PEERS')
    peers = [] if not python else json.loads(subprocess.run([python, __file__, 'peers'], capture_output=True, text=True, check=True).stdout)
    if not peers: print('no peers: our figures alone (BENCH_PEERS names a python that has pytorch-forecasting, darts or neuralforecast)')
    print(f'TFT: L {L}, K {K}, d {D}, 4 heads, dropout .1, {KNOWN} known and {FIXED} fixed inputs; training steps with Adam, {RUNS * WINDOWS} windows (peers 64; ours too where independent with 160 inputs), '
          f'shared: {RUNS} runs of {WINDOWS} windows, stride {STRIDE}; running: one LSTM a run; families: 13 of the inputs; {THREADS} thread{"s, wall time" if THREADS > 1 else ", CPU time"}; load {os.getloadavg()[0]:.1f}')
    for F in sizes or (26, 160): table(F, peers, python, rounds)


if __name__ == '__main__':
    if sys.argv[1:2] == ['column']: serve(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1:2] == ['peers']: print(json.dumps(present()))
    else: main(*map(int, sys.argv[1:]))
