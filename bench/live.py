"""Speed of a signal: `python bench/live.py [COINS:SIZE ...]`, by default 10:small 30:small 10:base; it trains a while

Each model is trained for one epoch on a simulated market; then bars come hour by hour: the newest hour of every coin
is handed over, all coins are forecast, and a signal is asked for. Beside it the same from the whole history, as a bot
without memory asks, and the first cycle of a process that starts again from what was saved.
"""
import contextlib, io, subprocess, sys, tempfile, time

import numpy as np
import pandas as pd
import torch

from cryptoml.integration import UltimateTradingAI
from cryptoml.simulate import simulate

HOUR = pd.Timedelta('1h')
CYCLES = 300    # Timed, after
WARM_UP = 10    # that are not
WHOLE = 10      # Predictions from the whole history
IMPORT = 'import torch, time; t = time.process_time(); import cryptoml.integration; print(time.process_time() - t)'


def import_time():
    "CPU seconds beyond torch's own import, in a new process"
    return float(subprocess.run([sys.executable, '-c', IMPORT], capture_output=True, text=True, check=True).stdout)


def trained(bars, size, folder):
    ai = UltimateTradingAI(dict(size=size, state_dir=folder), device='cpu')
    with contextlib.redirect_stdout(io.StringIO()): ai.train_sync(bars, epochs=1)
    ai.save_state()


def loaded(folder):
    ai = UltimateTradingAI(dict(state_dir=folder), device='cpu')
    ai.load_state()
    return ai


def timed(ai, data, now, coins):
    "Wall and CPU milliseconds of a prediction of all coins and the signals of some"
    began, spent = time.perf_counter(), time.thread_time()
    ai.predict_sync(data, None, now)
    for symbol in coins: ai.get_trading_signal(symbol, 0., now)
    return 1e3 * (time.perf_counter() - began), 1e3 * (time.thread_time() - spent)


def cycles(folder, bars, end, every_coin):
    "Milliseconds of each kind of cycle, by name"
    ai = loaded(folder)
    coins = ai.live().terms.symbols if every_coin else ai.live().terms.symbols[:1]
    ai.predict_sync(bars[bars.time < end], None, end)
    hours = {t: g.reset_index(drop=True) for t, g in bars[bars.time >= end].groupby('time')}
    took = [timed(ai, g, t + HOUR, coins) for t, g in list(hours.items())[:WARM_UP + CYCLES]]
    now = list(hours)[WARM_UP + CYCLES]
    ai.save_state()
    again = loaded(folder)
    first = timed(again, bars[(bars.time < now + HOUR) & (bars.time >= now - 5 * HOUR)], now + HOUR, coins)
    fresh = loaded(folder)
    whole = []
    for k in range(WHOLE):
        fresh._online = None                                       # no memory
        whole.append(timed(fresh, bars[bars.time < now + k * HOUR], now + k * HOUR, coins))
    wall, cpu = np.array(took[WARM_UP:]).T
    return dict(cycle=wall, cpu=np.median(cpu), restart=first[0], whole=np.median(whole, 0)[0])


def main():
    torch.set_num_threads(1)
    imports = np.median([import_time() for _ in range(3)])
    print(f"import cryptoml.integration beyond torch's own import: {imports:.2f} CPU s")
    for name in sys.argv[1:] or ['10:small', '30:small', '10:base']:
        coins, size = name.split(':')
        bars = simulate(n_symbols=int(coins), n_bars=4500, seed=3).bars
        end, folder = bars.time.max() - 14 * 24 * HOUR, tempfile.mkdtemp()
        trained(bars[bars.time < end], size, folder)
        for every_coin in (False, True):
            t = cycles(folder, bars, end, every_coin)
            print(f'{coins} coins, {size}, signals of {"all" if every_coin else "one"}: '
                  f'p50 {np.median(t["cycle"]):.1f} ms, p99 {np.quantile(t["cycle"], .99):.1f} ms, '
                  f'CPU {t["cpu"]:.1f} ms; '
                  f'from the whole history {t["whole"]:.0f} ms; first cycle after a restart {t["restart"]:.0f} ms')


if __name__ == '__main__': main()
