"Speed of the feature engine: `python bench/features.py` (TA-Lib, same outputs, same bars, same run, beside it)"
import os, subprocess, sys, tempfile, time

import numpy as np
import talib

from cryptoml.data import to_panel
from cryptoml.engine import BARS, Engine
from cryptoml.features import AdvancedFeatureEngineer, FAMILIES, with_needed
from cryptoml.simulate import simulate

START = '''
import time; t = time.process_time()
from cryptoml.features import AdvancedFeatureEngineer
e = AdvancedFeatureEngineer(); e._batch
print(time.process_time() - t)
'''


def start(cache):
    "CPU seconds until the engine is ready, imports included, in a process of its own"
    done = subprocess.run([sys.executable, '-c', START], env={**os.environ, 'CRYPTOML_CACHE': cache}, capture_output=True, text=True, check=True)
    return float(done.stdout)


def best(*functions, rounds=7):
    "Smallest wall time of each function, interleaved"
    took = [[] for _ in functions]
    for _ in range(rounds):
        for f, t in zip(functions, took):
            t0 = time.perf_counter()
            f()
            t.append(time.perf_counter() - t0)
    return [min(t) for t in took]


def common(engineer, X, number, o, h, l, c, v):
    "The features that TA-Lib has too: ours as one engine, TA-Lib's as calls"
    calls = {f'rsi_{p}': lambda p=p: talib.RSI(c, p) for p in (7, 14, 28)} | {f'natr_{p}': lambda p=p: talib.NATR(h, l, c, p) for p in (14, 28)} \
        | {f'atr_{p}': lambda p=p: talib.ATR(h, l, c, p) for p in (14, 28)} | {f'wr_{p}': lambda p=p: talib.WILLR(h, l, c, p) for p in (14, 28)} \
        | {f'cci_{p}': lambda p=p: talib.CCI(h, l, c, p) for p in (14, 28)} | {f'roc_{p}': lambda p=p: talib.ROC(c, p) for p in (12, 24)} \
        | {'mfi_14': lambda: talib.MFI(h, l, c, v, 14), 'adx_14': lambda: talib.ADX(h, l, c, 14), 'adx_pos_14': lambda: talib.PLUS_DI(h, l, c, 14), 'adx_neg_14': lambda: talib.MINUS_DI(h, l, c, 14),
           'aroon_up_25': lambda: talib.AROON(h, l, 25), 'macd_12_26_9': lambda: talib.MACD(c), 'bb_width_20': lambda: talib.BBANDS(c, 20), 'bb_width_50': lambda: talib.BBANDS(c, 50),
           'doji': lambda: talib.CDLDOJI(o, h, l, c), 'engulfing': lambda: talib.CDLENGULFING(o, h, l, c)}
    calls = {k: f for k, f in calls.items() if k in engineer.columns}
    steps = {f for f in with_needed([g for fs in FAMILIES.values() for g in fs]) if set(f.out) & set(calls)}
    ours = Engine(with_needed(sorted(steps, key=lambda f: f.name)))
    return len(calls), len(ours.columns), best(lambda: ours.run(X, number), lambda: [f() for f in calls.values()])


def main():
    rows, n = [], 50_000
    with tempfile.TemporaryDirectory() as cache: rows += [('first start, everything compiled (CPU s)', start(cache)), ('start from the cache (CPU s)', start(cache))]
    market = simulate(n_symbols=2, n_bars=n, seed=0)
    panel, engineer = to_panel(market.bars), AdvancedFeatureEngineer()
    o, h, l, c, v = (np.ascontiguousarray(panel[k][0]) for k in BARS[:5])
    X = np.column_stack([*(panel[k][0] for k in BARS[:-1]), panel.bar_number * 3600.])
    F, engine, Y = len(engineer.columns), engineer._batch, np.empty((len(engineer.columns), n))
    (batch,) = best(lambda: engine.run(X, panel.bar_number, Y=Y))
    rows += [('features', F), ('history, one thread (microseconds a bar)', batch / n * 1e6), ('history, one thread (million values a second)', n * F / batch / 1e6)]
    (both,) = best(lambda: engineer.transform_panel(panel), rounds=3)
    rows += [('panel of two symbols, threads (million values a second)', 2 * n * F / both / 1e6)]
    bars = market.bars[:6000].to_dict('records')
    stream = engineer.stream(bars[0]['symbol'])
    took = []
    for bar in bars:
        t0 = time.perf_counter()
        stream.update(bar)
        took.append(time.perf_counter() - t0)
    rows += [('newest bar, median (microseconds)', np.median(took[2000:]) * 1e6), ('newest bar, 99th percentile (microseconds)', np.quantile(took[2000:], .99) * 1e6),
             ('memory of a stream (KB)', len(stream.state()) / 1e3)]
    same, with_neighbours, (ours, theirs) = common(engineer, X, panel.bar_number, o, h, l, c, v)
    rows += [(f'TA-Lib time / our time, {same} shared features ({with_neighbours} computed by us)', theirs / ours)]
    for name, value in rows: print(f'{name:82}{value:10.2f}')


if __name__ == '__main__': main()
