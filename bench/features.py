"""Speed of the feature engine, TA-Lib beside it in the same run: `python bench/features.py`; one line a family: `python bench/features.py families`"""
import os, resource, statistics, subprocess, sys, tempfile, time

import numpy as np
import talib

from cryptoml import technical as T
from cryptoml.data import to_panel
from cryptoml.engine import BARS, Engine, step
from cryptoml.features import AdvancedFeatureEngineer, with_needed
from cryptoml.simulate import simulate

START = '''
import resource, time; wall, cpu = time.perf_counter(), time.process_time()
from cryptoml.features import AdvancedFeatureEngineer
e = AdvancedFeatureEngineer(); e._batch
others = resource.getrusage(resource.RUSAGE_CHILDREN)
print(time.process_time() - cpu + others.ru_utime + others.ru_stime, time.perf_counter() - wall)
'''


def start(cache):
    "CPU (other processes that it starts too) and wall seconds until the engine is ready, imports included, in a process of its own"
    done = subprocess.run([sys.executable, '-c', START], env={**os.environ, 'CRYPTOML_CACHE': cache}, capture_output=True, text=True, check=True)
    return [float(v) for v in done.stdout.split()]


def medians(*functions, rounds=9):
    "Median process time of each function, interleaved"
    took = [[] for _ in functions]
    for _ in range(rounds):
        for f, t in zip(functions, took):
            t0 = time.process_time()
            f()
            t.append(time.process_time() - t0)
    return [statistics.median(t) for t in took]


# --- 102 outputs of TA-Lib: the technical chapter's steps, declared with these windows

P1, P2, MAC = (7, 14, 28), (10, 20, 50, 100), ((12, 26, 9), (5, 35, 5), (8, 17, 9))


@step('obv ad', state=3)
def sums(close, volume, flow_volume, W, s, n, y):
    s[1] += volume * (int(close > s[0]) - int(close < s[0]))
    s[2] += flow_volume
    s[0] = close
    y[0] = s[1]
    y[1] = s[2]


def set_m():
    "The steps, and the 102 columns in TA-Lib's order"
    p, alpha, again = (lambda p: p), (lambda p: 2 / (p + 1)), lambda f, out, windows, **more: step(out, windows=windows, **more)(f.function)
    steps = [
        T.price_base, T.volume_base, T.stochrsi, T.ultimate, T.psar, T.chaikin, sums,
        again(T.rsi, 'rsi_{p}', P1, state=2, first=p), again(T.roc, 'roc_{p}', P1, first=lambda p: p + 1, past=p), again(T.cci, 'cci_{p}', P1, state=2, first=p, past=p),
        again(T.stochastic, 'k_{p} slowk_{p} slowd_{p} wr_{p}', P1, state=lambda p: 2 * p + 8, first=lambda p: (p, p + 2, p + 4, p)), again(T.atr, 'atr_{p} natr_{p}', P1, state=1, first=p),
        again(T.trix, 'trix_{p}', P1, state=3, const=alpha, first=lambda p: 3 * p - 1), again(T.adx, 'adx_{p} plus_{p} minus_{p}', P1, state=4, first=lambda p: (2 * p - 1, p, p), past=1),
        again(T.aroon, 'up_{p} down_{p}', P1, state=lambda p: 4 * p + 10, const=lambda p: 100 / p, first=lambda p: p + 1),
        again(T.bands, 'sma_{p} high_{p} low_{p} std_{p}', P2, state=4, first=p, past=p), again(T.exponential, 'ema_{p} dema_{p} tema_{p}', P2, state=3, const=alpha, first=lambda p: (p, 2 * p - 1, 3 * p - 2)),
        again(T.weighted, 'wma_{p} wma_distance_{p}', P2, state=3, const=lambda p: 2 / (p * (p + 1)), first=p, past=p), again(T.kama, 'kama_{p} kama_distance_{p}', P2, state=3, first=p, past=p),
        again(T.channel, 'max_{p} min_{p}', P2, state=lambda p: 2 * p + 4, first=p),
        again(T.macd, 'macd_{p} signal_{p} hist_{p}', MAC, state=3, const=lambda p: tuple(2 / (q + 1) for q in p), first=lambda p: (p[1], p[1] + p[2] - 1, p[1] + p[2] - 1))]
    columns = [f'{c}_{p}' for p in P1 for c in 'rsi roc wr cci atr natr trix down up adx plus minus'.split()] + [f'{c}_{p}' for p in P2 for c in 'sma ema wma dema tema kama high sma low std max min'.split()] \
        + [f'{c}_{f}_{g}_{k}' for f, g, k in MAC for c in ('macd', 'signal', 'hist')] + 'slowk_14 slowd_14 stochrsi_14 stochrsi_k_14 ultimate_7_14_28 psar obv ad adosc_3_10'.split()
    return steps, columns


def talib_set(o, h, l, c, v):
    "The same by TA-Lib, in this order"
    t, out = talib, []
    for p in P1: out += [t.RSI(c, p), t.ROC(c, p), t.WILLR(h, l, c, p), t.CCI(h, l, c, p), t.ATR(h, l, c, p), t.NATR(h, l, c, p), t.TRIX(c, p), *t.AROON(h, l, p), t.ADX(h, l, c, p), t.PLUS_DI(h, l, c, p), t.MINUS_DI(h, l, c, p)]
    for p in P2: out += [t.SMA(c, p), t.EMA(c, p), t.WMA(c, p), t.DEMA(c, p), t.TEMA(c, p), t.KAMA(c, p), *t.BBANDS(c, p), t.STDDEV(c, p), t.MAX(h, p), t.MIN(l, p)]
    for f, g, k in MAC: out += t.MACD(c, f, g, k)
    return out + [*t.STOCH(h, l, c, 14, 3, 0, 3, 0), *t.STOCHRSI(c, 14, 14, 3, 0), t.ULTOSC(h, l, c), t.SAR(h, l), t.OBV(c, v), t.AD(h, l, c, v), t.ADOSC(h, l, c, v)]


def talib_stream(o, h, l, c, v):
    "The same by talib.stream: objects that take one bar; a function of the bar"
    t, C, H, B, rest = talib.stream, [], [], [], []
    for p in P1:
        C += [t.RSI(c, p), t.ROC(c, p), t.TRIX(c, p)]; H += [t.AROON(h, l, p)]
        B += [f(h, l, c, p) for f in (t.WILLR, t.CCI, t.ATR, t.NATR, t.ADX, t.PLUS_DI, t.MINUS_DI)]
    for p in P2: C += [f(c, p) for f in (t.SMA, t.EMA, t.WMA, t.DEMA, t.TEMA, t.KAMA, t.BBANDS, t.STDDEV)]
    C, H, B = C + [t.MACD(c, *p) for p in MAC] + [t.STOCHRSI(c, 14, 14, 3, 0)], H + [t.SAR(h, l)], B + [t.STOCH(h, l, c, 14, 3, 0, 3, 0), t.ULTOSC(h, l, c)]
    top, bottom, obv, flow = [t.MAX(h, p).update for p in P2], [t.MIN(l, p).update for p in P2], t.OBV(c, v).update, [t.AD(h, l, c, v).update, t.ADOSC(h, l, c, v).update]
    C, H, B = ([x.update for x in xs] for xs in (C, H, B))
    return lambda h, l, c, v: ([f(c) for f in C], [f(h, l) for f in H], [f(h, l, c) for f in B], [f(h) for f in top], [f(l) for f in bottom], obv(c, v), [f(h, l, c, v) for f in flow])


def race(X, number):
    "Set M against TA-Lib: history into separate arrays, into one table; newest bar"
    steps, columns = set_m()
    batch, live, arrays = Engine(steps, columns), Engine(steps, columns, block=16), [np.ascontiguousarray(X[:, j]) for j in range(5)]
    Y, Z = batch.run(X, number), talib_set(*arrays)
    worst = max(np.nanmax(np.abs(y - z)[1000:]) / np.nanstd(z) for y, z in zip(Y, Z))
    assert len(columns) == len(Z) == 102 and worst < 1e-7, worst
    ours, into, separate, table = medians(lambda: batch.run(X, number), lambda: batch.run(X, number, Y=Y), lambda: talib_set(*arrays), lambda: np.array(talib_set(*arrays)))
    M, update = live.memory(), talib_stream(*(a[:1000] for a in arrays))
    live.run(X[:1000], number[:1000], M)
    bars, took = [(X[t:t + 1], number[t:t + 1], X[t, 1:5].tolist()) for t in range(1000, 5000)], [[], []]
    for x, i, values in bars:
        for k, f in enumerate((lambda: live.run(x, i, M), lambda: update(*values))):
            t0 = time.perf_counter()
            f()
            took[k].append(time.perf_counter() - t0)
    mine, theirs = np.median(took, 1) * 1e6
    return [('set M, 102 outputs, equal to TA-Lib to (standard deviations, 1e-9)', worst * 1e9), ('set M, history, one thread (million values a second)', Y.size / ours / 1e6),
            ('set M, TA-Lib time / our time, both into a new table', table / ours), ('set M, TA-Lib into arrays of its own / ours into a new table', separate / ours), ('set M, TA-Lib into arrays of its own / ours into a given table', separate / into),
            ('set M, newest bar (microseconds)', mine), ('set M, newest bar, talib.stream time / our time', theirs / mine)]


def by_family(X, number):
    "Nanoseconds a value of each family: with what it reads, less what that takes alone"
    empty, maker = (lambda: None), {c: f for f in T.TECHNICAL for c in f.out}
    def run(steps):
        if not steps: return empty
        e = Engine(steps, steps[-1].out[:1])
        return lambda: e.run(X, number)
    for f in T.TECHNICAL:
        read = [g for g in with_needed([f]) if g is not f]
        whole, part = medians(run([*read, f]), run(read), rounds=5)
        print(f'{f.name:22}{(whole - part) / len(X) * 1e9:8.1f} ns a bar {len(f.out):4} outputs {(whole - part) / len(X) / len(f.out) * 1e9:8.1f} ns each')


def main():
    rows, n = [], 50_000
    with tempfile.TemporaryDirectory() as cache: (cold, wall), (warm, _) = start(cache), start(cache)
    rows += [('first start, everything compiled (CPU s)', cold), ('first start (wall s)', wall), ('start from the cache (CPU s)', warm)]
    market = simulate(n_symbols=8, n_bars=n, seed=0)
    panel, engineer = to_panel(market.bars), AdvancedFeatureEngineer()
    X = np.column_stack([*(panel[k][0] for k in BARS[:-1]), panel.bar_number * 3600.])
    if 'families' in sys.argv: return by_family(X, panel.bar_number)
    F, engine, bars = len(engineer.columns), engineer._batch, X
    X = np.full((n, len(engineer.inputs)), np.nan)                       # every family, no source given
    X[:, :len(BARS)] = bars
    Y = np.empty((len(engineer.engine_columns), n))
    (batch,) = medians(lambda: engine.run(X, panel.bar_number, Y=Y))
    rows += [('features', F), ('history, one thread (microseconds a bar)', batch / n * 1e6), ('history, one thread (million values a second)', Y.size / batch / 1e6)]
    took = []
    for _ in range(3):
        t0 = time.perf_counter()
        engineer.transform_panel(panel)
        took.append(time.perf_counter() - t0)
    rows += [('8 symbols of 50,000 bars, threads, the coins compared (wall s)', np.median(took)), ('most memory so far (GB)', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)]
    stream, took = engineer.stream(market.bars.symbol[0]), []
    for bar in market.bars[:6000].to_dict('records'):
        t0 = time.perf_counter()
        stream.update(bar)
        took.append(time.perf_counter() - t0)
    rows += [('newest bar from a mapping, median (microseconds)', np.median(took[2000:]) * 1e6), ('newest bar from a mapping, 99th percentile (microseconds)', np.quantile(took[2000:], .99) * 1e6)]
    live = engineer._live
    memories, took = [live.memory() for _ in range(1000)], []
    for M in memories: live.run(X[:1000], panel.bar_number[:1000], M)
    for t in range(1000, 1020):
        x, i, t0 = X[t:t + 1], panel.bar_number[t:t + 1], time.perf_counter()
        for M in memories: live.run(x, i, M)
        took.append(time.perf_counter() - t0)
    rows += [('1,000 streams, a bar each (milliseconds)', np.median(took) * 1e3), ('their memory (MB)', sum(M.nbytes for M in memories) / 1e6)]
    for name, value in rows + race(bars, panel.bar_number): print(f'{name:76}{value:10.2f}')


if __name__ == '__main__': main()
