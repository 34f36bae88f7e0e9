"The engine under faults, in many processes, and against brute force"
import math, os, subprocess, sys, textwrap, threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from cryptoml import engine as module
from cryptoml.engine import BARS, Engine, cache_dir, step, key_of, load, ordered

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
    for k in range(min(n, 5)): s0 = change[m - k] if k == 0 else s0 + change[m - k]
    y[0] = s0 / 5


@step('smooth_{0} slow_{p}', windows=((2, 5), (4, 9)), state=2, const=lambda p: (1 / p[0], 1 / p[1]), first=lambda p: p)
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
    number = np.arange(n) + 430_001
    v = rng.lognormal(5, 1, n)
    return np.column_stack([open_, np.maximum(open_, close), np.minimum(open_, close), close, v, v, v, v / 2, number * 3600.]), number


def bits(a): return np.ascontiguousarray(a).tobytes()


@pytest.fixture(scope='module')
def engines():
    return {B: Engine(ALL, block=B) for B in (1, 5, 16, 128)}


holes = st.lists(st.tuples(st.integers(0, 199), st.integers(1, 40), st.sampled_from(['gone', 'nan', 'zero', 'source'])), max_size=4)


@settings(max_examples=60, deadline=None)
@given(holes=holes, cuts=st.lists(st.integers(1, 199), max_size=6), B=st.sampled_from([1, 5, 16, 128]), seed=st.integers(0, 5))
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
    assert all(bits(out[f'told_{p}']) == bits(out[f'due_{p}']) for p in (3, 20))    # plain Python knows what compiled code knows
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
    keep[::50] = True                                   # no gap of more than a day in all
    keep[np.arange(200) % 20 == 0] = True
    X, number = X[keep], number[keep]
    out = dict(zip(engines[16].columns, engines[16].run(X, number)))
    for p in (3, 7, 20):
        expected = [X[t - p + 1:t + 1, 3].mean() if t >= p - 1 else np.nan for t in range(len(X))]
        np.testing.assert_allclose(out[f'mean_{p}'], expected, rtol=1e-13)
    d = np.diff(X[:, 3])
    np.testing.assert_allclose(out['mean_change_5'][5:], [d[t - 4:t + 1].mean() for t in range(4, len(d))], rtol=1e-9, atol=1e-12)
    assert np.isnan(out['mean_change_5'][:5]).all()


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
    names = [c for c in engines[16].columns if c.startswith('mean')]
    at = [engines[16].columns.index(c) for c in names]
    assert bits(whole[at]) == bits(late[at])


def test_infinite_and_undefined_values_become_nan_and_restart_who_reads_them():
    @step('bad')
    def bad(close, W, s, n, y, i): y[0] = (1. if i % 10 else 0.) / (0. if i % 7 == 0 else 1.) if i % 10 != 5 else math.inf
    @step('count', state=1)
    def count(bad, W, s, n, y): y[0] = n
    e = Engine([bad, count])
    assert e.plain == []
    X, number = bars(300)
    value, n = e.run(X, number)
    lost = (number % 10 == 5) | (number % 7 == 0)
    assert not np.isinf(value).any() and (np.isnan(value) == lost).all()
    since = np.zeros(300)
    for t in range(300): since[t] = 0 if lost[t] else since[t - 1] + 1 if t else 1
    np.testing.assert_array_equal(n, np.where(lost, np.nan, since))


def test_columns_beyond_the_bar():
    "A source's column rides along; where it is missing only its readers start again"
    @step('level_{p}', windows=(3,), state=1, first=lambda p: p)
    def level(source_level, W, s, n, y):
        s[0] += source_level
        y[0] = s[0]
    e = Engine([level, mean], inputs=(*BARS, 'source_level'))
    X, number = bars(60)
    X = np.column_stack([X, np.ones(60)])
    X[30:32, 9] = np.nan
    out = dict(zip(e.columns, e.run(X, number)))
    np.testing.assert_array_equal(out['level_3'], [np.nan] * 2 + [*range(3, 31)] + [np.nan] * 4 + [*range(3, 29)])
    assert bits(out['mean_7']) == bits(dict(zip(('mean_3', 'mean_7', 'mean_20'), Engine([mean]).run(X[:, :9], number)))['mean_7'])
    twice = Engine([level, mean], columns=['mean_7', 'mean_3', 'mean_7'], inputs=(*BARS, 'source_level')).run(X, number)
    assert bits(twice[0]) == bits(twice[2]) == bits(out['mean_7']) and bits(twice[1]) == bits(out['mean_3'])


def test_what_a_step_does_not_write_is_nan():
    @step('now then')
    def half(close, W, s, n, y):
        y[0] = close
        if n % 2: y[1] = close
    X, number = bars(10)
    now, then = Engine([half]).run(X, number)
    assert np.isnan(then[1::2]).all() and (then[::2] == now[::2]).all()


def test_no_limit_on_windows_outputs_and_inputs():
    wide = step(' '.join(f'in_{k}' for k in range(50)), feature=False)
    @wide
    def many(close, W, s, n, y):
        for k in range(len(y)): y[k] = close + k
    text = f'def total({", ".join(f"in_{k}" for k in range(50))}, W, s, n, y):\n    for j in range(len(W)): y[j] = W[j] + ' + ' + '.join(f'in_{k}' for k in range(50))
    scope = {}
    exec(text, scope)
    total = step('total_{p}', windows=tuple(range(100)))(scope['total'])
    e = Engine([total, many])
    X, number = bars(5)
    np.testing.assert_allclose(e.run(X, number), [j + 50 * X[:, 3] + 1225 for j in range(100)])


def test_a_step_without_text_is_compiled_without_cache():
    scope = dict(step=step)
    exec('@step("twice")\ndef twice(close, W, s, n, y): y[0] = 2 * close', scope)
    other = dict(step=step)
    exec('@step("twice")\ndef twice(close, W, s, n, y): y[0] = 3 * close', other)
    X, number = bars(5)
    for k, f in ((2, scope['twice']), (3, other['twice'])):
        e = Engine([f])
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
    with pytest.raises(ValueError, match='other features'): Engine([f for f in ALL if f is not mean] + [longer], block=16).restore(kept)
    with pytest.raises(ValueError, match='memory'): e.run(*bars(5), M=np.zeros(3))


def test_names_are_unique():
    with pytest.raises(ValueError, match='step change'): ordered([change, step('other')(change.function)])
    with pytest.raises(ValueError, match='more than once: close'): ordered([step('close')(lambda open, W, s, n, y: None)])


def test_threads_share_one_engine(engines):
    data = [bars(3000, seed) for seed in range(6)]
    e = Engine([mean, change, mean_change, place])
    alone, together = [e.run(X, n) for X, n in data], [None] * 6
    def work(k): together[k] = e.run(*data[k])
    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert all(bits(a) == bits(b) for a, b in zip(alone, together))


# --- the cache, in processes of their own

SCRIPT = '''
import logging, sys
logging.basicConfig(format='%(message)s')
import numpy as np
from cryptoml import engine
from cryptoml.engine import Engine, step
{before}
FACTOR = {factor}
def weigh(x): return x * FACTOR
@step('up_{{p}}', windows=(2, 3), state=1)
def up(close, W, s, n, y):
    for j in range(len(W)):
        s[j] += (close - s[j]) / W[j]
        y[j] = weigh(s[j])
X = np.full((4, 9), 5.); X[:, 3] = [5, 5, 5, 5]
e = Engine([up])
print(e.run(X, np.arange(4))[:, -1].tolist(), len(e.plain), engine.cache_dir())
'''


def start(tmp_path, factor=2., before='', name='mine', wait=True, **env):
    script = tmp_path / f'{name}.py'
    script.write_text(SCRIPT.format(factor=factor, before=before))
    process = subprocess.Popen([sys.executable, str(script)], env={**os.environ, 'CRYPTOML_CACHE': str(tmp_path / 'cache'), **env},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return finish(process) if wait else process


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, err


def cached(tmp_path, pattern): return sorted((tmp_path / 'cache').rglob(pattern))


def test_cache_damage_edits_and_many_cold_processes(tmp_path):
    cold = [start(tmp_path, wait=False, name=f'cold{k}') for k in range(3)]
    assert len({finish(p)[0] for p in cold}) == 1                                   # all at once, one compiles
    (code,), (source,) = cached(tmp_path, 'up_*.nbc'), cached(tmp_path, 'up_*.py')
    first = start(tmp_path)[0]
    assert first.startswith('[9.375, ') and ' 0 ' in first
    assert code.stat().st_mtime == cached(tmp_path, 'up_*.nbc')[0].stat().st_mtime   # a warm start compiles nothing

    for damage in (b'', code.read_bytes()[:100], b'\x80\x04garbage'):
        cached(tmp_path, 'up_*.nbc')[0].write_bytes(damage)
        assert start(tmp_path)[0] == first
    cached(tmp_path, 'up_*.nbi')[0].write_bytes(b'')
    assert start(tmp_path)[0] == first
    source.write_text('raise SystemExit("stale")')
    assert start(tmp_path)[0] == first

    changed = start(tmp_path, factor=4.)[0]                                          # a number that a called function reads
    assert changed.startswith('[18.75, ') and len(cached(tmp_path, 'up_*.py')) == 2


MANY = '''
import logging, sys
logging.basicConfig(format='%(message)s')
import numpy as np
from cryptoml import engine
from cryptoml.engine import Engine, step
engine.os.cpu_count = lambda: 2
def weigh(x): return x * 2.
{steps}
{before}
print(Engine(list(STEPS)).run(np.full((2, 9), 5.), np.arange(2))[:, -1].tolist())
'''


@pytest.mark.parametrize('name, before', [('apart', ''), ('dies', 'sys.path.insert(0, {folder!r})'), ('none', 'sys.executable = "/nowhere/python"')])
def test_many_cold_steps_are_compiled_in_other_processes(tmp_path, name, before):
    steps = 'STEPS = []\n' + '\n'.join(f"@step('up_{k}')\ndef step_{k}(close, W, s, n, y): y[0] = weigh(close) + {k}\nSTEPS.append(step_{k})" for k in range(12))
    (tmp_path / 'early').mkdir()
    (tmp_path / 'early' / 'numba.py').write_text('import os; os._exit(3)')                    # the other processes die as they start
    (tmp_path / 'many.py').write_text(MANY.format(steps=steps, before=before.format(folder=str(tmp_path / 'early'))))
    out, err = finish(subprocess.Popen([sys.executable, str(tmp_path / 'many.py')], env={**os.environ, 'CRYPTOML_CACHE': str(tmp_path / 'cache')}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    assert out.strip() == str([10. + k for k in range(12)]) and err.startswith('compiling 13 steps') and len(err.splitlines()) == 1
    assert len(cached(tmp_path, 'step_*.nbc')) == 12 and len(cached(tmp_path, 'weigh_*.nbi')) == 1     # what all call is compiled once


def test_nothing_writable_compiles_without_cache_and_says_so(tmp_path):
    out, err = start(tmp_path, before='engine.cache_dir = lambda: None')
    assert out.startswith('[9.375, ') and 'set CRYPTOML_CACHE' in err and len(err.strip().splitlines()) == 1
    assert not cached(tmp_path, '*.py')


def test_cache_folder(tmp_path, monkeypatch):
    blocked = tmp_path / 'file'
    blocked.write_text('')
    for name in ('CRYPTOML_CACHE', 'XDG_CACHE_HOME', 'LOCALAPPDATA', 'HOME'): monkeypatch.setenv(name, str(blocked))
    monkeypatch.setattr(module.tempfile, 'gettempdir', lambda: str(blocked))
    assert cache_dir() is None
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
    folder = cache_dir()
    assert folder.parent == tmp_path / 'xdg' and folder.stat().st_mode & 0o777 == 0o700
    os.chmod(folder, 0o777)
    assert cache_dir().stat().st_mode & 0o777 == 0o700                               # others are shut out again
    monkeypatch.setenv('USERNAME', 'someone')
    monkeypatch.delattr(os, 'getuid')                                                # a system that is not POSIX
    assert cache_dir().parent == tmp_path / 'xdg'


def test_key_depends_on_text():
    assert key_of('a', 'x = 1') != key_of('a', 'x = 2')
    found = load({'a': ('x = 1', {}), 'b': ('def', {}), 'c': ('raise KeyError(1)', {})})
    assert found['a'].x == 1 and isinstance(found['b'], SyntaxError) and isinstance(found['c'], KeyError)
