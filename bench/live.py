"Speed of a signal: `python bench/live.py` (one coin, newest bar, from 80 days of bars as a bot fetches them)"
import contextlib, io, subprocess, sys, tempfile, time

import numpy as np
import pandas as pd
import torch

from cryptoml.integration import UltimateTradingAI
from cryptoml.simulate import simulate

IMPORT = 'import torch, time; t = time.process_time(); import cryptoml.integration; print(time.process_time() - t)'


def main():
    torch.set_num_threads(1)
    imports = [float(subprocess.run([sys.executable, '-c', IMPORT], capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    bars = simulate(n_symbols=2, n_bars=4500, seed=3).bars
    ai = UltimateTradingAI(dict(size='small', state_dir=tempfile.mkdtemp()), device='cpu')
    with contextlib.redirect_stdout(io.StringIO()): ai.train_sync(bars, epochs=1)
    mine = bars[bars.symbol == 'BTC/USDT'].tail(24 * 80)
    now, cpu, wall = mine.time.max() + pd.Timedelta('1h'), [], []
    for _ in range(60):
        t, w = time.process_time(), time.perf_counter()
        ai.predict_sync(mine, 'BTC/USDT', now)
        ai.get_trading_signal('BTC/USDT', 0., now)
        cpu.append(time.process_time() - t); wall.append(time.perf_counter() - w)
    ms = lambda x, q: 1e3 * np.quantile(x[10:], q)
    rows = [("import cryptoml.integration beyond torch's own import (CPU s)", np.median(imports)), ('signal, median (CPU ms)', ms(cpu, .5)), ('signal, median (wall ms)', ms(wall, .5)), ('signal, 95th percentile (wall ms)', ms(wall, .95))]
    for name, value in rows: print(f'{name:82}{value:10.2f}')


if __name__ == '__main__': main()
