"Speed of a signal: `python bench/live.py` (one coin, newest bar, from 80 days of bars as a bot fetches them)"
import contextlib, io, subprocess, sys, tempfile, time

import numpy as np
import pandas as pd
import torch

from cryptoml.integration import UltimateTradingAI
from cryptoml.simulate import simulate

SYMBOL = 'BTC/USDT'
DAYS = 80       # Bars that the bot holds
SIGNALS = 50    # Timed, after
WARM_UP = 10    # that are not
IMPORT = 'import torch, time; t = time.process_time(); import cryptoml.integration; print(time.process_time() - t)'


def import_time():
    "CPU seconds beyond torch's own import, in a new process"
    return float(subprocess.run([sys.executable, '-c', IMPORT], capture_output=True, text=True, check=True).stdout)


def trained(bars):
    ai = UltimateTradingAI(dict(size='small', state_dir=tempfile.mkdtemp()), device='cpu')
    with contextlib.redirect_stdout(io.StringIO()): ai.train_sync(bars, epochs=1)
    return ai


def signal_times(ai, bars, now):
    "CPU and wall milliseconds of a prediction and its signal [SIGNALS, 2]"
    took = []
    for _ in range(WARM_UP + SIGNALS):
        cpu, wall = time.process_time(), time.perf_counter()
        ai.predict_sync(bars, SYMBOL, now)
        ai.get_trading_signal(SYMBOL, 0., now)
        took.append((time.process_time() - cpu, time.perf_counter() - wall))
    return 1e3 * np.array(took[WARM_UP:])


def main():
    torch.set_num_threads(1)
    imports = [import_time() for _ in range(3)]
    bars = simulate(n_symbols=2, n_bars=4500, seed=3).bars
    ai = trained(bars)
    mine = bars[bars.symbol == SYMBOL].tail(24 * DAYS)
    cpu, wall = signal_times(ai, mine, mine.time.max() + pd.Timedelta('1h')).T
    rows = {
        "import cryptoml.integration beyond torch's own import (CPU s)": np.median(imports),
        'signal, median (CPU ms)': np.median(cpu),
        'signal, median (wall ms)': np.median(wall),
        'signal, 95th percentile (wall ms)': np.quantile(wall, .95),
    }
    for name, value in rows.items(): print(f'{name:82}{value:10.2f}')


if __name__ == '__main__': main()
