"""Speed of the Temporal Fusion Transformer: `python bench/tft.py [ROUNDS [PAST INPUTS]...]`

BENCH_PEERS names a python that has peers, for theirs in the same run; BENCH_THREADS=2 gives two threads. A column is a
process of its own, and one is alive at a time: nine of them with 160 inputs want more memory than a small machine has.
Every round visits all columns, there and back; the table shows medians over the rounds."""
import json, os, resource, subprocess, sys, time
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from tft_peers import make, mean_pinball, present

L, K, D, KNOWN, FIXED = 96, 24, 64, 6, 4
RUNS, WINDOWS, STRIDE = 16, 16, 12
GROUPS = 13                                      # of the past inputs, in the column of that name
BATCH = 64                                       # independent windows where 256 would want too much memory
MANY = 100                                       # past inputs from which they do: with 160 they need some 10 GB
NEWEST = 12                                      # newest bars a visit, the first two do not count
THREADS = int(os.environ.get('BENCH_THREADS', 1))
clock = time.process_time if THREADS == 1 else time.perf_counter
LSTM = 3 * 16 * D * D * (L + K)                  # FLOPs of a window, both ways: the counter does not see them

OURS = [
    'cryptoml',
    'cryptoml shared',
    'cryptoml shared recompute',
    'cryptoml shared groups',
    'cryptoml shared running',
    'cryptoml stream',
]
HEAD = '''
{inputs} past inputs; float32 product {product:.0f} GFLOP/s; {rounds} rounds

| | windows/s (range) | newest bar, ms | parameters | peak MB | MFLOP a window | share of the product |
|---|---|---|---|---|---|---|'''


def sizes(F):
    "Sizes of GROUPS groups of F inputs, as equal as can be"
    return tuple(F // GROUPS + (i < F % GROUPS) for i in range(GROUPS))


class Column:
    "One implementation at `F` past inputs"
    def __init__(self, name, F):
        torch.manual_seed(0)
        kind, *words = name.split()
        self.shared, self.streams = 'shared' in words, 'stream' in words
        self.B = RUNS * WINDOWS if kind == 'cryptoml' and (self.shared or F < MANY) else BATCH
        rows, more = (RUNS, (WINDOWS - 1) * STRIDE) if self.shared else (self.B, 0)
        self.x = torch.randn(rows, L + more, F), torch.randn(rows, K + more, KNOWN), torch.randn(rows, FIXED)
        self.y = torch.randn(self.B, K)
        settings = {}
        if kind == 'cryptoml':
            groups = sizes(F) if 'groups' in words else ()
            settings = dict(recompute='recompute' in words, running='running' in words, groups=groups)
        self.net = make(kind, F, KNOWN, FIXED, L, K, D, **settings)
        self.optimizer = torch.optim.Adam(self.net.parameters(), 1e-3)
        self.stream = None

    def call(self, *x):
        if not self.shared: return self.net(*x)
        return self.net.net.shared(*x, windows=WINDOWS, stride=STRIDE).quantiles

    def backward(self): mean_pinball(self.call(*self.x), self.y).backward()

    def train(self):
        "Windows a second of one training step"
        self.net.train()
        t = clock()
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()
        return self.B / (clock() - t)

    def open(self, past, future, static):
        "The stream, warm, and whether it says what the whole window says"
        from cryptoml.stream import TFTStream
        self.stream = TFTStream(self.net.net, static)
        self.stream.update(past)
        gap = self.stream.forecast(future).quantiles - self.net(past, future, static)
        assert gap.abs().max() < 1e-5

    def newest(self):
        "Milliseconds from a newest bar to the forecast of one series: the whole window again, or the bar in the stream"
        self.net.eval()
        past, future, static = (a[:1, :n].clone() for a, n in zip(self.x, (L, K, FIXED)))
        if self.streams and self.stream is None: self.open(past, future, static)
        took = []
        for _ in range(NEWEST):
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
        with FlopCounterMode(display=False) as count: self.backward()
        parameters = sum(p.numel() for p in self.net.parameters())
        return parameters, peak, (count.get_total_flops() / self.B + LSTM) / 1e6


def serve(name, F):
    "The process of a column: a question a line, an answer a line"
    answers = os.fdopen(os.dup(1), 'w', buffering=1)
    os.dup2(2, 1)                                                     # libraries print
    torch.set_num_threads(THREADS)
    column = Column(name, F)
    for line in sys.stdin: answers.write(json.dumps(getattr(column, line.strip())()) + '\n')


class Process:
    "A column from outside, alive inside `with`"
    def __init__(self, python, name, F):
        env = os.environ | {'OMP_NUM_THREADS': str(THREADS), 'PYTHONPATH': str(Path(__file__).parents[1])}
        self.p = subprocess.Popen([python, '-W', 'ignore', __file__, 'column', name, str(F)], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1, env=env)
        self.name = name

    def __enter__(self): return self

    def __exit__(self, *_):
        self.p.stdin.close()
        self.p.wait()

    def ask(self, what):
        self.p.stdin.write(what + '\n')
        answer = self.p.stdout.readline()
        if not answer: raise RuntimeError(f'the process of {self.name} ended while it was asked for {what}')
        return json.loads(answer)


def ceiling(n=1024, times=8):
    "GFLOP/s of a float32 product"
    a, b, c = (torch.randn(n, n) for _ in range(3))
    took = []
    for _ in range(times):
        t = clock()
        torch.mm(a, b, out=c)
        took.append(clock() - t)
    return 2 * n ** 3 / min(took) / 1e9


def row(name, speed, newest, about, top):
    cells = [''] * 6
    if newest: cells[1] = f'{median(newest):.2f}'
    if speed:
        parameters, peak, flop = about
        share = flop * median(speed) / top / 1000
        cells[0] = f'{median(speed):.0f} ({min(speed):.0f}-{max(speed):.0f})'
        cells[2:] = f'{parameters:,}', f'{peak:.0f}', f'{flop:.0f}', f'{share:.0%}'
    return f'| {name} | {" | ".join(cells)} |'


def table(F, peers, python, rounds):
    columns = {k: sys.executable for k in OURS} | {k: python for k in peers}
    trained = [k for k in columns if 'stream' not in k]
    timed = ['cryptoml', 'cryptoml stream', *peers]
    speed, newest, about, product = {k: [] for k in columns}, {k: [] for k in columns}, {}, []
    for r in range(rounds):
        product.append(ceiling())
        for k in list(columns)[::-1 if r % 2 else 1]:
            with Process(columns[k], k, F) as column:
                if k in trained:
                    column.ask('train')                               # a step that does not count
                    if k not in about: about[k] = column.ask('about') # memory before anything else
                    speed[k].append(column.ask('train'))
                if k in timed: newest[k].append(column.ask('newest'))
    top = median(product)
    print(HEAD.format(inputs=F, product=top, rounds=rounds))
    for k in columns: print(row(k, speed[k], newest[k], about.get(k), top), flush=True)


def main(rounds=5, *inputs):
    torch.set_num_threads(THREADS)
    python = os.environ.get('BENCH_PEERS')
    peers = []
    if python:
        said = subprocess.run([python, __file__, 'peers'], capture_output=True, text=True, check=True)
        peers = json.loads(said.stdout)
    if not peers:
        print('no peers: our figures alone '
              '(BENCH_PEERS names a python that has pytorch-forecasting, darts or neuralforecast)')
    time_is = f'{THREADS} threads, wall time' if THREADS > 1 else '1 thread, CPU time'
    print(f'TFT: L {L}, K {K}, d {D}, 4 heads, dropout .1, {KNOWN} known and {FIXED} fixed inputs; training steps with '
          f'Adam, {RUNS * WINDOWS} windows (peers {BATCH}; ours too where independent with 160 inputs), shared: {RUNS} '
          f'runs of {WINDOWS} windows, stride {STRIDE}; running: one LSTM a run; groups: {GROUPS} of the inputs; '
          f'{time_is}; load {os.getloadavg()[0]:.1f}')
    for F in inputs or (26, 160): table(F, peers, python, rounds)


if __name__ == '__main__':
    if sys.argv[1:2] == ['column']: serve(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1:2] == ['peers']: print(json.dumps(present()))
    else: main(*map(int, sys.argv[1:]))
