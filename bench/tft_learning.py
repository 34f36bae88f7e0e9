"""CPU time to a fixed validation loss on a panel with planted interactions: `python bench/tft_learning.py SEEDS`

Runs of overlapping windows against independent windows, and a peer where this python has one, in one loop on the same
data."""
import sys, time

import numpy as np, torch

from tft_peers import QUANTILES, make, mean_pinball, present

L, K, D, RUNS, WINDOWS, STRIDE, LAG = 96, 24, 32, 16, 16, 12, 6
LEAST, MOST = 40_960, 81_920   # windows of a training, and its bound
EVERY = 2_560                  # windows between validations
LEVEL = .4                     # share of the oracle's skill
LR = 2e-3
PART = 128                     # windows of a validation at once


def drift(rng, shape, phi):
    "Unit-variance first-order autoregression along the last axis"
    x = rng.standard_normal(shape)
    for t in range(1, shape[-1]): x[..., t] = phi * x[..., t - 1] + (1 - phi ** 2) ** .5 * x[..., t]
    return x


def panel(seed=0, S=32, T=7000, r2=.7):
    """26 past inputs (4 known, 22 observed, the return last), 4 known, 4 fixed; outcomes of every bar and their means

    A return rises with u v of six bars ago, w times the hour's sine, z times 1 + a fixed input; a common factor and fat
    tails hide it."""
    rng = np.random.default_rng(seed)
    t = np.arange(T + K)
    known = np.stack([f(2 * np.pi * t / p) for p in (24, 168) for f in (np.sin, np.cos)], -1)
    seen, fixed = drift(rng, (21, S, T + K), .97), rng.standard_normal((S, 4))
    u, v, w, z = seen[:4]
    sine = known[:, 0]
    def lag(a): return np.concatenate([np.zeros((S, LAG)), a[:, :-LAG]], 1)
    def sums(a):                                                        # of the bars t + 1 .. t + k, [S, T, K]
        total = np.cumsum(a, 1)
        return np.stack([total[:, k:T + k] - total[:, :T] for k in range(1, K + 1)], -1)
    signal = (lag(u * v) + w * sine * 2 ** .5 + z * (1 + fixed[:, :1]) / 2 ** .5) / 3 ** .5
    noise = .5 * rng.standard_t(4, (1, T + K)) + rng.standard_t(4, (S, T + K))
    mean = np.zeros((S, T, K))                                          # of the signal at t + j given t; summed below
    for j in range(K):
        old = np.concatenate([np.zeros((S, LAG)), (u * v)[:, :T]], 1)[:, min(j, LAG):][:, :T]
        by_product = old * .97 ** (2 * max(j - LAG, 0))
        by_hour = w[:, :T] * .97 ** j * sine[j:T + j] * 2 ** .5
        by_fixed = z[:, :T] * .97 ** j * (1 + fixed[:, :1]) / 2 ** .5
        mean[..., j] = (by_product + by_hour + by_fixed) / 3 ** .5
    mean = mean.cumsum(-1)
    noise_over_signal = sums(noise)[..., -1].var() / mean[..., -1].var()
    size = (r2 / (1 - r2) * noise_over_signal) ** .5                    # share r2 of the last outcome can be forecast
    r = np.concatenate([np.zeros((S, 1)), size * signal[:, :-1]], 1) + noise
    y = sums(r)
    unit = y.std((0, 1))
    calendar, observed = np.broadcast_to(known[:T], (S, T, 4)), np.moveaxis(seen[..., :T], 0, -1)
    past = np.concatenate([calendar, observed, r[:, :T, None] / r.std()], -1)
    return [torch.tensor(a, dtype=torch.float32) for a in (past, known, fixed, y / unit, size * mean / unit)]


class Market:
    "Training on the first 70 % of the bars, validation on the last 25 %"
    def __init__(self, seed=0):
        self.past, self.known, self.fixed, self.y, self.mean = panel(seed)
        self.S, self.T = self.y.shape[:2]
        self.first, self.end = L - 1, int(.7 * self.T) - K              # newest bars of windows
        self.valid = int(.75 * self.T) + L - 1                          # a gap between the parts
        grid = [(s, t) for i, t in enumerate(range(self.valid, self.T, 16)) for s in range(i % 8, self.S, 8)]
        s, t = map(torch.tensor, zip(*grid))
        self.held, self.held_y = self.windows(s, t), self.y[s, t]
        y, mean = self.y[:, self.first:self.end], self.mean[:, self.first:self.end]
        def levels(a): return torch.quantile(a[:, ::5].flatten(0, 1), torch.tensor(QUANTILES), 0).T     # [K, 3]
        self.none = mean_pinball(levels(y).expand(len(s), -1, -1), self.held_y).item()
        best = mean_pinball(levels(y - mean) + self.mean[s, t][..., None], self.held_y).item()
        self.oracle = 1 - best / self.none

    def windows(self, s, t):
        back = t[:, None] + torch.arange(1 - L, 1)
        ahead = t[:, None] + torch.arange(1, K + 1)
        return self.past[s[:, None], back], self.known[ahead], self.fixed[s]

    def draw(self, n, g):
        "Independent windows"
        s = torch.randint(self.S, (n,), generator=g)
        t = torch.randint(self.first, self.end, (n,), generator=g)
        return self.windows(s, t), self.y[s, t]

    def draw_runs(self, n, windows, stride, g):
        "Runs of windows, each of a series and a first bar of its own"
        more = (windows - 1) * stride
        s = torch.randint(self.S, (n,), generator=g)
        t = torch.randint(self.first, self.end - more, (n,), generator=g)
        back = t[:, None] + torch.arange(1 - L, 1 + more)
        ahead = t[:, None] + torch.arange(1, K + 1 + more)
        newest = t[:, None] + torch.arange(0, more + 1, stride)
        return (self.past[s[:, None], back], self.known[ahead], self.fixed[s]), self.y[s[:, None], newest].flatten(0, 1)

    def skill(self, net):
        net.eval()
        total = 0
        with torch.no_grad():
            for *x, y in zip(*(a.split(PART) for a in (*self.held, self.held_y))):
                total += mean_pinball(net(*x), y).item() * len(y)
        return 1 - total / len(self.held_y) / self.none


def train(market, name, runs, batch, seed, level, lr=LR):
    "[(windows, CPU seconds of training steps, skill)], until `level` is reached, LEAST windows at least, MOST at most"
    kind, *words = name.split()
    settings = dict(running=True) if 'running' in words else {}
    net = make(kind, 26, 4, 4, L, K, D, seed=seed, **settings)
    opt, g, windows = torch.optim.Adam(net.parameters(), lr), torch.Generator().manual_seed(seed), batch // max(runs, 1)
    def forecast(x): return net.net.shared(*x, windows=windows, stride=STRIDE).quantiles if runs else net(*x)
    took, trace = 0., []
    for step in range(1, MOST // batch + 1):
        x, y = market.draw_runs(runs, windows, STRIDE, g) if runs else market.draw(batch, g)
        net.train()
        began = time.process_time()
        loss = mean_pinball(forecast(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        took += time.process_time() - began
        if step * batch % EVERY: continue
        trace.append((step * batch, took, market.skill(net)))
        if step * batch >= LEAST and reached(trace, level): break
    return trace


def reached(trace, level):
    "Windows and CPU seconds at the first validation whose mean skill with the two before is at the level, or None"
    for i in range(2, len(trace)):
        if np.mean([v for *_, v in trace[i - 2:i + 1]]) >= level: return trace[i][:2]


COLUMNS = {   # Name to implementation, runs (0: independent windows) and windows a step
    'cryptoml, 16 runs of 16 windows': ('cryptoml', 16, 256),
    'cryptoml, 16 runs of 16 windows, one LSTM a run': ('cryptoml running', 16, 256),
    'cryptoml, 8 runs of 8 windows': ('cryptoml', 8, 64),
    'cryptoml, 8 runs of 8 windows, one LSTM a run': ('cryptoml running', 8, 64),
    'cryptoml, 64 windows': ('cryptoml', 0, 64),
    'darts, 64 windows': ('darts', 0, 64),
}


def row(name, traces, level):
    hit = [reached(t, level) or ('never', 'never') for t in traces]
    def skill(most): return np.mean([np.mean([v for n, _, v in t if n <= most][-3:]) for t in traces])
    cells = [
        name,
        f'{sum(t[-1][0] for t in traces) / sum(t[-1][1] for t in traces):.0f}',
        ', '.join(s if s == 'never' else f'{s:.0f}' for _, s in hit),
        ', '.join(str(n) for n, _ in hit),
        ', '.join(f'{skill(most):.4f}' for most in (LEAST // 2, LEAST)),
    ]
    return f'| {" | ".join(cells)} |'


def main(seeds, only=''):
    torch.set_num_threads(1)
    market = Market()
    level = LEVEL * market.oracle
    print(f'L {L}, K {K}, d {D}, 26 past inputs, stride {STRIDE}, Adam {LR}; '
          f'skill = 1 - loss / loss of constant quantiles: oracle {market.oracle:.4f}, level {level:.4f}; '
          f'{len(market.held_y)} validation windows')
    print(f'| | windows/s | CPU s to the level, by seed | windows to the level '
          f'| skill at {LEAST // 2:,} and {LEAST:,} windows |\n|---|---|---|---|---|')
    for name, (kind, runs, batch) in COLUMNS.items():
        if kind.split()[0] not in ['cryptoml', *present()] or only not in name: continue
        traces = []
        for seed in seeds:
            traces.append(train(market, kind, runs, batch, seed, level))
            print(name, seed, *(f'{n}:{c:.0f}s:{v:.4f}' for n, c, v in traces[-1]), file=sys.stderr, flush=True)
        print(row(name, traces, level), flush=True)


if __name__ == '__main__':
    if len(sys.argv) < 2: print('tft_learning: minutes long; ' + __doc__.split('\n')[0])
    else: main(range(int(sys.argv[1])), *sys.argv[2:])
