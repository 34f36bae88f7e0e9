"""A column for a harness of training steps that names a factory: `tft_column:windows` or `tft_column:shared`

It is called with series [S, T], covariates [S, T, C] and calendar [T, K]. The object has
`fit(n)`, seconds of n steps; `module`, `forward_args`, `target` and `pred` for a step by itself."""
import time

import numpy as np, torch

from tft_peers import Wrapped, make, mean_pinball

L, H, D, B = 96, 24, 64, 64


class Column:
    def __init__(self, data, windows=1, stride=12):
        y, seen, known = (torch.tensor(np.asarray(a)) for a in data)
        self.y, self.known = y, known
        self.W, self.stride = windows, stride
        self.past = torch.cat([known.expand(len(y), -1, -1), seen, y[..., None]], -1)
        self.net = make('cryptoml', self.past.shape[2], known.shape[1], 0, L, H, D).net
        def call(net, past, future, static): return net.shared(past, future, static, windows, stride).quantiles
        self.module = Wrapped(self.net, call)
        self.optimizer = torch.optim.Adam(self.net.parameters(), 1e-3)
        self.forward_args, self.target = self.batch()

    def batch(self):
        more = (self.W - 1) * self.stride
        runs = B // self.W
        s, t = torch.randint(len(self.y), (runs,)), torch.randint(self.y.shape[1] - L - H - more, (runs,))
        rows = t[:, None] + torch.arange(L + H + more)
        ahead = rows[:, L:].unfold(1, H, self.stride).flatten(0, 1)                  # [B, H]
        y = self.y[s.repeat_interleave(self.W)[:, None], ahead]
        return ((self.past[s[:, None], rows[:, :L + more]], self.known[rows[:, L:]]), {}), y

    def fit(self, n):
        took = []
        self.module.train()
        for _ in range(n):
            t = time.process_time()
            (x, _), y = self.batch()
            self.optimizer.zero_grad()
            mean_pinball(self.module(*x), y).backward()
            self.optimizer.step()
            took.append(time.process_time() - t)
        return took

    def pred(self, out): return out

    def data_only(self, n):
        t = time.process_time()
        for _ in range(n): self.batch()
        return (time.process_time() - t) / n

    def api_predict(self):
        self.net.eval()
        with torch.no_grad(): self.net(self.past[:, -L - H:-H], self.known[-H:].expand(len(self.y), -1, -1))


def windows(data): return Column(data)
def shared(data): return Column(data, 16)
