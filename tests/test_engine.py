"The engine under faults, in threads, and against brute force"
import math, threading

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from cryptoml.engine import BARS, Engine, ordered, step

GAIN = 0.25


def scaled(x): return x * GAIN


@step('change', state=1, first=2, feature=False)
def change(close, W, s, n, y):
    y[0] = close - s[0]
    s[0] = close


@step('mean_{p}', windows=(3, 7, 20), state=1, past=lambda p: p, first=lambda p: p)
def mean(close, W, s, n, y, r):
    m = len(close) - 1
    for j in range(len(W)):
        p = W[j]
        if r[j]:
            s[j] = 0.
            for k in range(min(n, p)): s[j] += close[m - k]
        else: s[j] += close[m] - (close[m - p] if n > p else 0.)
        y[j] = s[j] / p


@step('mean_change_{p}', windows=(5,), past=lambda p: p, first=lambda p: p)
def mean_change(change, W, s, n, y):
    m = len(change) - 1
    s0 = change[m]
    for k in range(1, min(n, 5)): s0 += change[m - k]
    y[0] = s0 / 5


@step('smooth_{0} slow_{p}', windows=((2, 5), (4, 9)), state=2, first=lambda p: p,
      const=lambda p: (1 / p[0], 1 / p[1]))
def smooth(close, taker_buy_volume, W, s, n, y, c):
    for k in range(len(s)):
        s[k] += (close - s[k]) * max(c[k], 1 / n)
        y[k] = s[k] + scaled(taker_buy_volume)


@step('place')
def place(close, W, s, n, y, i): y[0] = i % 24


@step('words', state=1, first=3, past=4)
def words(change, close, W, s, n, y, i):
    s[0] += change[-1]
    y[0] = float(str(s[0] + close[-min(n, 5)] + i))


@step('due_{p}', windows=(3, 20))
def due(close, W, s, n, y, r):
    for j in range(len(W)): y[j] = r[j]


@step('told_{p}', windows=(3, 20))
def told(close, W, s, n, y, r):
    for j in range(len(W)): y[j] = float(str(r[j]))


ALL = [words, told, due, place, smooth, mean_change, mean, change]


def bars(n, seed=0):
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(rng.normal(0, .01, n)))
    open_ = np.r_[100, close[:-1]]
    high = np.maximum(open_, close)
    low = np.minimum(open_, close)
    v = rng.lognormal(5, 1, n)
    number = np.arange(n) + 430_001
    return np.column_stack([open_, high, low, close, v, v, v, v / 2, number * 3600.]), number


def bits(a): return np.ascontiguousarray(a).tobytes()


@pytest.fixture(scope='module')
def engines():
    return {B: Engine(ALL, block=B) for B in (1, 5, 16, 128)}


kinds = st.sampled_from(['gone', 'nan', 'zero', 'source'])
holes = st.lists(st.tuples(st.integers(0, 199), st.integers(1, 40), kinds), max_size=4)
cuts = st.lists(st.integers(1, 199), max_size=6)


@settings(max_examples=60, deadline=None)
@given(holes=holes, cuts=cuts, B=st.sampled_from([1, 5, 16, 128]), seed=st.integers(0, 5))
def test_any_cut_of_any_gappy_history_gives_the_same_bits(engines, holes, cuts, B, seed):
    X, number = bars(200, seed)
    keep = np.ones(200, bool)
    for a, length, kind in holes:
        if kind == 'gone': keep[a:a + length] = False
        if kind == 'nan': X[a:a + length, 3] = np.nan
        if kind == 'zero': X[a:a + length, 2] = 0
        if kind == 'source': X[a:a + length, 7] = np.nan
    X, number = X[keep], number[keep]
    whole = engines[128].run(X, number)
    out = dict(zip(engines[128].columns, whole))
    for p in (3, 20): assert bits(out[f'told_{p}']) == bits(out[f'due_{p}'])         # plain Python knows as much
    M = engines[B].memory()
    edges = sorted({0, len(X), *(min(c, len(X)) for c in cuts)})
    parts = [engines[B].run(X[a:b], number[a:b], M) for a, b in zip(edges, edges[1:])]
    if parts: assert bits(np.hstack(parts)) == bits(whole)


@settings(max_examples=40, deadline=None)
@given(gone=st.lists(st.tuples(st.integers(0, 199), st.integers(1, 20)), max_size=5), seed=st.integers(0, 5))
def test_sums_are_those_of_the_bars_received(engines, gone, seed):
    X, number = bars(200, seed)
    keep = np.ones(200, bool)
    for a, length in gone: keep[a:a + length] = False
    keep[::20] = True                                   # no gap of more than a day in all
    keep[::50] = True
    X, number = X[keep], number[keep]
    out = dict(zip(engines[16].columns, engines[16].run(X, number)))
    for p in (3, 7, 20):
        expected = [X[t - p + 1:t + 1, 3].mean() if t >= p - 1 else np.nan for t in range(len(X))]
        np.testing.assert_allclose(out[f'mean_{p}'], expected, rtol=1e-13)
    d = np.diff(X[:, 3])
    expected = [np.nan] * 5 + [d[t - 4:t + 1].mean() for t in range(4, len(d))]
    np.testing.assert_allclose(out['mean_change_5'], expected, rtol=1e-9, atol=1e-12)


def test_a_long_gap_is_a_new_start(engines):
    X, number = bars(200)
    number[100:] += 25
    out = engines[128].run(X, number)
    assert bits(out[:, 100:]) == bits(engines[128].run(X[100:], number[100:]))
    number[100:] -= 1                                   # 24 missing bars are still skipped
    assert bits(engines[128].run(X, number)[:, 100:]) != bits(out[:, 100:])


def test_streams_begun_apart_meet_to_the_last_bit(engines):
    X, number = bars(200)
    whole, late = (engines[16].run(X[a:], number[a:])[:, -100:] for a in (0, 41))
    means = [j for j, c in enumerate(engines[16].columns) if c.startswith('mean')]
    assert bits(whole[means]) == bits(late[means])


def test_infinite_and_undefined_values_become_nan_and_restart_who_reads_them():
    @step('bad')
    def bad(close, W, s, n, y, i):
        if i % 10 == 5: y[0] = math.inf
        else: y[0] = (1. if i % 10 else 0.) / (0. if i % 7 == 0 else 1.)             # 1 / 0 and 0 / 0 among them
    @step('count', state=1)
    def count(bad, W, s, n, y): y[0] = n
    e = Engine([bad, count])
    assert e.plain == []
    X, number = bars(300)
    value, n = e.run(X, number)
    lost = (number % 10 == 5) | (number % 7 == 0)
    assert not np.isinf(value).any() and (np.isnan(value) == lost).all()
    since = np.zeros(300)
    for t in np.flatnonzero(~lost): since[t] = since[t - 1] + 1 if t else 1
    np.testing.assert_array_equal(n, np.where(lost, np.nan, since))


def test_columns_beyond_the_bar():
    "A source's column rides along; where it is missing only its readers start again"
    @step('level_{p}', windows=(3,), state=1, first=lambda p: p)
    def level(source_level, W, s, n, y):
        s[0] += source_level
        y[0] = s[0]
    inputs = (*BARS, 'source_level')
    e = Engine([level, mean], inputs=inputs)
    X, number = bars(60)
    X = np.column_stack([X, np.ones(60)])
    X[30:32, 9] = np.nan
    out = dict(zip(e.columns, e.run(X, number)))
    np.testing.assert_array_equal(out['level_3'], [np.nan] * 2 + [*range(3, 31)] + [np.nan] * 4 + [*range(3, 29)])
    _, seven, _ = Engine([mean]).run(X[:, :9], number)
    assert bits(out['mean_7']) == bits(seven)

    a, b, c = Engine([level, mean], columns=['mean_7', 'mean_3', 'mean_7'], inputs=inputs).run(X, number)
    assert bits(a) == bits(c) == bits(out['mean_7'])
    assert bits(b) == bits(out['mean_3'])


def test_what_a_step_does_not_write_is_nan():
    @step('now then')
    def half(close, W, s, n, y):
        y[0] = close
        if n % 2: y[1] = close
    X, number = bars(10)
    now, then = Engine([half]).run(X, number)
    assert np.isnan(then[1::2]).all() and (then[::2] == now[::2]).all()


def test_no_limit_on_windows_outputs_and_inputs():
    names = [f'in_{k}' for k in range(50)]
    @step(' '.join(names), feature=False)
    def many(close, W, s, n, y):
        for k in range(len(y)): y[k] = close + k
    scope = {}
    exec(f'def total({", ".join(names)}, W, s, n, y):\n'
         f'    for j in range(len(W)): y[j] = W[j] + {" + ".join(names)}', scope)
    total = step('total_{p}', windows=tuple(range(100)))(scope['total'])
    X, number = bars(5)
    expected = [j + 50 * X[:, 3] + sum(range(50)) for j in range(100)]
    np.testing.assert_allclose(Engine([total, many]).run(X, number), expected)


def test_a_step_without_text_is_compiled_without_cache():
    X, number = bars(5)
    for k in (2, 3):                                                                 # one name, two functions
        scope = dict(step=step)
        exec(f'@step("times")\ndef times(close, W, s, n, y): y[0] = {k} * close', scope)
        e = Engine([scope['times']])
        assert e.plain == []
        np.testing.assert_array_equal(e.run(X, number)[0], k * X[:, 3])
    nameless = Engine([step('half')(lambda close, W, s, n, y: y.__setitem__(0, close / 2))])
    np.testing.assert_array_equal(nameless.run(X, number)[0], X[:, 3] / 2)


def test_a_plain_step_that_raises_is_heard():
    @step('fails')
    def fails(close, W, s, n, y): y[0] = {}['nothing']
    X, number = bars(3)
    with pytest.raises(KeyError, match='nothing'): Engine([fails]).run(X, number)


def test_wrong_states_are_refused(engines):
    e = engines[16]
    kept = e.state_bytes(e.memory())
    assert bits(e.restore(kept)) == bits(e.memory())
    for at in (0, 40, 64, len(kept) - 1):
        with pytest.raises(ValueError): e.restore(kept[:at] + bytes([kept[at] ^ 1]) + kept[at + 1:])
    for length in (0, 10, 64, 71, len(kept) - 8):
        with pytest.raises(ValueError): e.restore(kept[:length])
    with pytest.raises(ValueError, match='other features'): Engine(ALL, block=16, max_gap=12).restore(kept)
    longer = step('mean_{p}', windows=(3, 7, 21), state=1, past=lambda p: p, first=lambda p: p)(mean.function)
    others = [f for f in ALL if f is not mean]
    with pytest.raises(ValueError, match='other features'): Engine([*others, longer], block=16).restore(kept)
    with pytest.raises(ValueError, match='memory'): e.run(*bars(5), M=np.zeros(3))


def test_names_are_unique():
    with pytest.raises(ValueError, match='step change'): ordered([change, step('other')(change.function)])
    close = step('close')(lambda open, W, s, n, y: None)
    with pytest.raises(ValueError, match='more than once: close'): ordered([close])


def test_threads_share_one_engine(engines):
    data = [bars(3000, seed) for seed in range(6)]
    e = Engine([mean, change, mean_change, place])
    alone = [e.run(X, n) for X, n in data]
    together = [None] * 6
    def work(k): together[k] = e.run(*data[k])
    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    for a, b in zip(alone, together): assert bits(a) == bits(b)
