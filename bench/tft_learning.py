"""CPU time to a fixed validation loss on a panel with planted interactions: `python bench/tft_learning.py SEEDS`

Runs of overlapping windows against independent windows, and a peer where this python has one, in one loop on the same data."""
import sys, time

import numpy as np, torch

from tft_peers import QUANTILES, make, pinball, present

L, K, D, RUNS, WINDOWS, STRIDE, LAG = 96, 24, 32, 16, 16, 12, 6
LEAST, MOST, EVERY, LEVEL, LR = 40_960, 81_920, 2_560, .4, 2e-3   # windows of a training, its bound, windows between validations, share of the oracle's skill, rate


def drift(rng, shape, phi):
    "Unit-variance first-order autoregression along the last axis"
    x = rng.standard_normal(shape)
    for t in range(1, shape[-1]): x[..., t] = phi * x[..., t - 1] + (1 - phi ** 2) ** .5 * x[..., t]
    return x


def panel(seed=0, S=32, T=7000, r2=.7):
    """26 past inputs (4 known, 22 observed, the return last), 4 known, 4 fixed; outcomes and their conditional means at every bar

    A return rises with u v of six bars ago, w times the hour's sine, z times 1 + a fixed input; a common factor and fat tails hide it."""
    rng = np.random.default_rng(seed)
    t = np.arange(T + K)
    known = np.stack([f(2 * np.pi * t / p) for p in (24, 168) for f in (np.sin, np.cos)], -1)
    seen, fixed = drift(rng, (21, S, T + K), .97), rng.standard_normal((S, 4))
    u, v, w, z = seen[:4]
    sine, lag = known[:, 0], lambda a: np.concatenate([np.zeros((S, LAG)), a[:, :-LAG]], 1)
    signal = (lag(u * v) + w * sine * 2 ** .5 + z * (1 + fixed[:, :1]) / 2 ** .5) / 3 ** .5
    noise = .5 * rng.standard_t(4, (1, T + K)) + rng.standard_t(4, (S, T + K))
    sums = lambda a: np.stack([np.cumsum(a, 1)[:, k:T + k] - np.cumsum(a, 1)[:, :T] for k in range(1, K + 1)], -1)   # of the bars t + 1 .. t + k, [S, T, K]
    mean = np.zeros((S, T, K))                                          # of signal at t .. t + k - 1 given t, summed over k below
    for j in range(K):
        old = np.concatenate([np.zeros((S, LAG)), (u * v)[:, :T]], 1)[:, min(j, LAG):][:, :T]
        mean[..., j] = (old * .97 ** (2 * max(j - LAG, 0)) + w[:, :T] * .97 ** j * sine[j:T + j] * 2 ** .5 + z[:, :T] * .97 ** j * (1 + fixed[:, :1]) / 2 ** .5) / 3 ** .5
    mean = mean.cumsum(-1)
    size = (r2 / (1 - r2) * sums(noise)[..., -1].var() / mean[..., -1].var()) ** .5     # share r2 of the last outcome's variance is forecastable
    r = np.concatenate([np.zeros((S, 1)), size * signal[:, :-1]], 1) + noise
    y, unit = sums(r), sums(r).std((0, 1))
    past = np.concatenate([np.broadcast_to(known[:T], (S, T, 4)), np.moveaxis(seen[..., :T], 0, -1), r[:, :T, None] / r.std()], -1)
    return [torch.tensor(a, dtype=torch.float32) for a in (past, known, fixed, y / unit, size * mean / unit)]


class Market:
    "Training on the first 70 % of the bars, validation on the last 25 %"
    def __init__(self, seed=0):
        self.past, self.known, self.fixed, self.y, self.mean = panel(seed)
        self.S, self.T = self.y.shape[:2]
        self.first, self.end, self.valid = L - 1, int(.7 * self.T) - K, int(.75 * self.T) + L - 1      # newest bars of windows; a gap between the parts
        grid = [(s, t) for i, t in enumerate(range(self.valid, self.T, 16)) for s in range(i % 8, self.S, 8)]
        s, t = map(torch.tensor, zip(*grid))
        self.held, self.held_y = self.windows(s, t), self.y[s, t]
        train = self.y[:, self.first:self.end], self.mean[:, self.first:self.end]
        q = lambda a: torch.quantile(a[:, ::5].flatten(0, 1), torch.tensor(QUANTILES), 0).T     # [K, 3]
        self.none = pinball(q(train[0]).expand(len(s), -1, -1), self.held_y).item()
        self.oracle = 1 - pinball(q(train[0] - train[1]) + self.mean[s, t][..., None], self.held_y).item() / self.none

    def windows(self, s, t):
        back, ahead = t[:, None] + torch.arange(1 - L, 1), t[:, None] + torch.arange(1, K + 1)
        return self.past[s[:, None], back], self.known[ahead], self.fixed[s]

    def draw(self, n, g):
        "Independent windows"
        s, t = torch.randint(self.S, (n,), generator=g), torch.randint(self.first, self.end, (n,), generator=g)
        return self.windows(s, t), self.y[s, t]

    def draw_runs(self, n, windows, stride, g):
        "Runs of windows, each of a series and a first bar of its own"
        more = (windows - 1) * stride
        s, t = torch.randint(self.S, (n,), generator=g), torch.randint(self.first, self.end - more, (n,), generator=g)
        back, ahead = t[:, None] + torch.arange(1 - L, 1 + more), t[:, None] + torch.arange(1, K + 1 + more)
        newest = t[:, None] + torch.arange(0, more + 1, stride)
        return (self.past[s[:, None], back], self.known[ahead], self.fixed[s]), self.y[s[:, None], newest].flatten(0, 1)

    def skill(self, net):
        net.eval()
        with torch.no_grad(): return 1 - sum(pinball(net(*(a[i:i + 128] for a in self.held)), self.held_y[i:i + 128]).item() * len(self.held_y[i:i + 128])
                                             for i in range(0, len(self.held_y), 128)) / len(self.held_y) / self.none


def train(market, name, runs, batch, seed, level, lr=LR):
    "[(windows, CPU seconds of training steps, validation skill)], until `level` is reached, LEAST windows at least and MOST at most"
    net = make(name.split()[0], 26, 4, 4, L, K, D, seed=seed, **(dict(running=True) if 'running' in name else {}))
    opt, g, took, trace = torch.optim.Adam(net.parameters(), lr), torch.Generator().manual_seed(seed), 0., []
    for step in range(1, MOST // batch + 1):
        x, y = market.draw_runs(runs, batch // runs, STRIDE, g) if runs else market.draw(batch, g)
        net.train()
        began = time.process_time()
        loss = pinball(net.net.shared(*x, windows=batch // runs, stride=STRIDE).quantiles if runs else net(*x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        took += time.process_time() - began
        if step * batch % EVERY == 0:
            trace.append((step * batch, took, market.skill(net)))
            if step * batch >= LEAST and reached(trace, level): break
    return trace


def reached(trace, level):
    "First validation at which the mean skill of it and the two before is at the level: windows, CPU seconds; None where never"
    for i in range(2, len(trace)):
        if np.mean([v for *_, v in trace[i - 2:i + 1]]) >= level: return trace[i][:2]


COLUMNS = {'cryptoml, 16 runs of 16 windows': ('cryptoml', 16, 256), 'cryptoml, 16 runs of 16 windows, one LSTM a run': ('cryptoml running', 16, 256),
           'cryptoml, 8 runs of 8 windows': ('cryptoml', 8, 64), 'cryptoml, 8 runs of 8 windows, one LSTM a run': ('cryptoml running', 8, 64),
           'cryptoml, 64 windows': ('cryptoml', 0, 64), 'darts, 64 windows': ('darts', 0, 64)}


def main(seeds, only=''):
    torch.set_num_threads(1)
    market = Market()
    level = LEVEL * market.oracle
    print(f'L {L}, K {K}, d {D}, 26 past inputs, stride {STRIDE}, Adam {LR}; skill = 1 - loss / loss of constant quantiles: oracle {market.oracle:.4f}, level {level:.4f}; {len(market.held_y)} validation windows')
    print(f'| | windows/s | CPU s to the level, by seed | windows to the level | skill at {LEAST // 2:,} and {LEAST:,} windows |\n|---|---|---|---|---|')
    for name, (kind, runs, batch) in COLUMNS.items():
        if kind.split()[0] not in ['cryptoml', *present()] or only not in name: continue
        traces = []
        for seed in seeds:
            traces.append(train(market, kind, runs, batch, seed, level))
            print(name, seed, *(f'{n}:{c:.0f}s:{v:.4f}' for n, c, v in traces[-1]), file=sys.stderr, flush=True)
        hit = [reached(t, level) or ('never', 'never') for t in traces]
        at = [np.mean([np.mean([v for n, _, v in t if n <= most][-3:]) for t in traces]) for most in (LEAST // 2, LEAST)]
        print(f'| {name} | {sum(t[-1][0] for t in traces) / sum(t[-1][1] for t in traces):.0f} | {", ".join(h[1] if h[1] == "never" else f"{h[1]:.0f}" for h in hit)} '
              f'| {", ".join(str(h[0]) for h in hit)} | {", ".join(f"{v:.4f}" for v in at)} |', flush=True)


if __name__ == '__main__':
    if len(sys.argv) < 2: print('tft_learning: minutes long; ' + __doc__.split('\n')[0])
    else: main(range(int(sys.argv[1])), *sys.argv[2:])
