"""Speed of the feature engine, TA-Lib beside it in the same run: `python bench/features.py`;
one line a step: `python bench/features.py steps`"""
import os, resource, statistics, subprocess, sys, tempfile, time

import numpy as np
import talib

from cryptoml import technical as T
from cryptoml.data import to_panel
from cryptoml.engine import BARS, Engine, step
from cryptoml.features import AdvancedFeatureEngineer, with_needed
from cryptoml.simulate import simulate

START = '''
import resource, time
wall = time.perf_counter()
cpu = time.process_time()
from cryptoml.features import AdvancedFeatureEngineer
AdvancedFeatureEngineer()._batch
others = resource.getrusage(resource.RUSAGE_CHILDREN)
print(time.process_time() - cpu + others.ru_utime + others.ru_stime, time.perf_counter() - wall)
'''


def start(cache):
    "CPU (with its children) and wall seconds until the engine is ready, imports included, in a new process"
    env = {**os.environ, 'CRYPTOML_CACHE': cache}
    done = subprocess.run([sys.executable, '-c', START], env=env, capture_output=True, text=True, check=True)
    return [float(v) for v in done.stdout.split()]


def wall_seconds(f):
    t0 = time.perf_counter()
    f()
    return time.perf_counter() - t0


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


def same(p): return p
def smoothing(p): return 2 / (p + 1)


def again(step_, out, windows, **more):
    "A step of the technical chapter with other windows"
    return step(out, windows=windows, **more)(step_.function)


def set_m():
    "The steps, and the 102 columns in TA-Lib's order"
    steps = [
        T.price_base, T.volume_base, T.stochrsi, T.ultimate, T.psar, T.chaikin, sums,
        again(T.rsi, 'rsi_{p}', P1, state=2, first=same),
        again(T.roc, 'roc_{p}', P1, first=lambda p: p + 1, past=same),
        again(T.cci, 'cci_{p}', P1, state=2, first=same, past=same),
        again(T.stochastic, 'k_{p} slowk_{p} slowd_{p} wr_{p}', P1, state=lambda p: 2 * p + 8,
              first=lambda p: (p, p + 2, p + 4, p)),
        again(T.atr, 'atr_{p} natr_{p}', P1, state=1, first=same),
        again(T.trix, 'trix_{p}', P1, state=3, const=smoothing, first=lambda p: 3 * p - 1),
        again(T.adx, 'adx_{p} plus_{p} minus_{p}', P1, state=4, first=lambda p: (2 * p - 1, p, p), past=1),
        again(T.aroon, 'up_{p} down_{p}', P1, state=lambda p: 4 * p + 10, const=lambda p: 100 / p,
              first=lambda p: p + 1),
        again(T.bands, 'sma_{p} high_{p} low_{p} std_{p}', P2, state=4, first=same, past=same),
        again(T.exponential, 'ema_{p} dema_{p} tema_{p}', P2, state=3, const=smoothing,
              first=lambda p: (p, 2 * p - 1, 3 * p - 2)),
        again(T.weighted, 'wma_{p} wma_distance_{p}', P2, state=3, const=lambda p: 2 / (p * (p + 1)),
              first=same, past=same),
        again(T.kama, 'kama_{p} kama_distance_{p}', P2, state=3, first=same, past=same),
        again(T.channel, 'max_{p} min_{p}', P2, state=lambda p: 2 * p + 4, first=same),
        again(T.macd, 'macd_{p} signal_{p} hist_{p}', MAC, state=3,
              const=lambda p: tuple(2 / (q + 1) for q in p),
              first=lambda p: (p[1], p[1] + p[2] - 1, p[1] + p[2] - 1))]
    by_p1 = 'rsi roc wr cci atr natr trix down up adx plus minus'.split()
    by_p2 = 'sma ema wma dema tema kama high sma low std max min'.split()
    columns = [f'{c}_{p}' for p in P1 for c in by_p1]
    columns += [f'{c}_{p}' for p in P2 for c in by_p2]
    columns += [f'{c}_{f}_{g}_{k}' for f, g, k in MAC for c in ('macd', 'signal', 'hist')]
    columns += 'slowk_14 slowd_14 stochrsi_14 stochrsi_k_14 ultimate_7_14_28 psar obv ad adosc_3_10'.split()
    return steps, columns


def talib_set(o, h, l, c, v):
    "The same by TA-Lib, in this order"
    t, out = talib, []
    for p in P1:
        out += [t.RSI(c, p), t.ROC(c, p), t.WILLR(h, l, c, p), t.CCI(h, l, c, p), t.ATR(h, l, c, p), t.NATR(h, l, c, p)]
        out += [t.TRIX(c, p), *t.AROON(h, l, p), t.ADX(h, l, c, p), t.PLUS_DI(h, l, c, p), t.MINUS_DI(h, l, c, p)]
    for p in P2:
        out += [t.SMA(c, p), t.EMA(c, p), t.WMA(c, p), t.DEMA(c, p), t.TEMA(c, p), t.KAMA(c, p)]
        out += [*t.BBANDS(c, p), t.STDDEV(c, p), t.MAX(h, p), t.MIN(l, p)]
    for p in MAC: out += t.MACD(c, *p)
    out += [*t.STOCH(h, l, c, 14, 3, 0, 3, 0), *t.STOCHRSI(c, 14, 14, 3, 0), t.ULTOSC(h, l, c), t.SAR(h, l)]
    return out + [t.OBV(c, v), t.AD(h, l, c, v), t.ADOSC(h, l, c, v)]


def talib_stream(o, h, l, c, v):
    "The same by talib.stream: objects that take one bar; a function of the bar"
    t = talib.stream
    of_close = [t.MACD(c, *p) for p in MAC] + [t.STOCHRSI(c, 14, 14, 3, 0)]
    of_range = [t.SAR(h, l)]
    of_bar = [t.STOCH(h, l, c, 14, 3, 0, 3, 0), t.ULTOSC(h, l, c)]
    for p in P1:
        of_close += [t.RSI(c, p), t.ROC(c, p), t.TRIX(c, p)]
        of_range += [t.AROON(h, l, p)]
        of_bar += [f(h, l, c, p) for f in (t.WILLR, t.CCI, t.ATR, t.NATR, t.ADX, t.PLUS_DI, t.MINUS_DI)]
    for p in P2: of_close += [f(c, p) for f in (t.SMA, t.EMA, t.WMA, t.DEMA, t.TEMA, t.KAMA, t.BBANDS, t.STDDEV)]
    close, spread, bar = ([x.update for x in xs] for xs in (of_close, of_range, of_bar))
    top = [t.MAX(h, p).update for p in P2]
    bottom = [t.MIN(l, p).update for p in P2]
    obv = t.OBV(c, v).update
    flow = [t.AD(h, l, c, v).update, t.ADOSC(h, l, c, v).update]
    def update(h, l, c, v):
        return ([f(c) for f in close], [f(h, l) for f in spread], [f(h, l, c) for f in bar], [f(h) for f in top],
                [f(l) for f in bottom], obv(c, v), [f(h, l, c, v) for f in flow])
    return update


def race_of_history(steps, columns, X, number):
    "Set M against TA-Lib: into separate arrays, into one table"
    batch = Engine(steps, columns)
    arrays = [np.ascontiguousarray(X[:, j]) for j in range(5)]
    Y, Z = batch.run(X, number), talib_set(*arrays)
    worst = max(np.nanmax(np.abs(y - z)[1000:]) / np.nanstd(z) for y, z in zip(Y, Z))
    assert len(columns) == len(Z) == 102 and worst < 1e-7, worst
    ours, into, separate, table = medians(
        lambda: batch.run(X, number), lambda: batch.run(X, number, Y=Y),
        lambda: talib_set(*arrays), lambda: np.array(talib_set(*arrays)))
    return [
        ('set M, 102 outputs, equal to TA-Lib to (standard deviations, 1e-9)', worst * 1e9),
        ('set M, history, one thread (million values a second)', Y.size / ours / 1e6),
        ('set M, TA-Lib time / our time, both into a new table', table / ours),
        ('set M, TA-Lib into arrays of its own / ours into a new table', separate / ours),
        ('set M, TA-Lib into arrays of its own / ours into a given table', separate / into)]


def race_of_bars(steps, columns, X, number):
    "Set M against talib.stream: the newest bar"
    live = Engine(steps, columns, block=16)
    M = live.memory()
    live.run(X[:1000], number[:1000], M)
    update = talib_stream(*(np.ascontiguousarray(X[:1000, j]) for j in range(5)))
    took = []
    for t in range(1000, 5000):
        x, i, values = X[t:t + 1], number[t:t + 1], X[t, 1:5].tolist()
        took.append((wall_seconds(lambda: live.run(x, i, M)), wall_seconds(lambda: update(*values))))
    mine, theirs = np.median(took, 0) * 1e6
    return [
        ('set M, newest bar (microseconds)', mine),
        ('set M, newest bar, talib.stream time / our time', theirs / mine)]


# --- every step

def by_step(X, number):
    "Nanoseconds a value of each step: with what it reads, less what that takes alone"
    def run(steps):
        if not steps: return lambda: None
        e = Engine(steps, steps[-1].out[:1])
        return lambda: e.run(X, number)
    for f in T.TECHNICAL:
        read = [g for g in with_needed([f]) if g is not f]
        whole, part = medians(run([*read, f]), run(read), rounds=5)
        bar = (whole - part) / len(X) * 1e9
        print(f'{f.name:22}{bar:8.1f} ns a bar {len(f.out):4} outputs {bar / len(f.out):8.1f} ns each')


# --- every family, no source given

def starts():
    with tempfile.TemporaryDirectory() as cache: (cold, wall), (warm, _) = start(cache), start(cache)
    return [
        ('first start, everything compiled (CPU s)', cold),
        ('first start (wall s)', wall),
        ('start from the cache (CPU s)', warm)]


def history(engineer, panel, X, number):
    Y = np.empty((len(engineer.engine_columns), len(X)))
    (batch,) = medians(lambda: engineer._batch.run(X, number, Y=Y))
    took = [wall_seconds(lambda: engineer.transform_panel(panel)) for _ in range(3)]
    return [
        ('features', len(engineer.columns)),
        ('history, one thread (microseconds a bar)', batch / len(X) * 1e6),
        ('history, one thread (million values a second)', Y.size / batch / 1e6),
        ('8 symbols of 50,000 bars, threads, the coins compared (wall s)', np.median(took)),
        ('most memory so far (GB)', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)]


def newest_bar(engineer, bars):
    stream = engineer.stream(bars.symbol[0])
    took = [wall_seconds(lambda: stream.update(bar)) for bar in bars[:6000].to_dict('records')]
    return [
        ('newest bar from a mapping, median (microseconds)', np.median(took[2000:]) * 1e6),
        ('newest bar from a mapping, 99th percentile (microseconds)', np.quantile(took[2000:], .99) * 1e6)]


def many_streams(engineer, X, number):
    live = engineer._live
    memories = [live.memory() for _ in range(1000)]
    for M in memories: live.run(X[:1000], number[:1000], M)
    def one_bar(t):
        x, i = X[t:t + 1], number[t:t + 1]
        for M in memories: live.run(x, i, M)
    took = [wall_seconds(lambda: one_bar(t)) for t in range(1000, 1020)]
    return [
        ('1,000 streams, a bar each (milliseconds)', np.median(took) * 1e3),
        ('their memory (MB)', sum(M.nbytes for M in memories) / 1e6)]


def main():
    market = simulate(n_symbols=8, n_bars=50_000, seed=0)
    panel = to_panel(market.bars)
    number = panel.bar_number
    bars = np.column_stack([*(panel[k][0] for k in BARS[:-1]), number * 3600.])
    if 'steps' in sys.argv: return by_step(bars, number)
    rows = starts()
    engineer = AdvancedFeatureEngineer()
    X = np.full((len(bars), len(engineer.inputs)), np.nan)
    X[:, :len(BARS)] = bars
    rows += history(engineer, panel, X, number)
    rows += newest_bar(engineer, market.bars)
    rows += many_streams(engineer, X, number)
    steps, columns = set_m()
    rows += race_of_history(steps, columns, bars, number)
    rows += race_of_bars(steps, columns, bars, number)
    for name, value in rows: print(f'{name:76}{value:10.2f}')


if __name__ == '__main__': main()
