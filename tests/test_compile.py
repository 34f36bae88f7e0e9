"Compiled code and its cache: damage, edits, many cold processes, folders that cannot be written"
import os, subprocess, sys

import pytest

from cryptoml import compile as module
from cryptoml.compile import cache_dir, key_of, load

# --- a step in a process of its own

SCRIPT = '''
import logging, sys
logging.basicConfig(format='%(message)s')
import numpy as np
from cryptoml import compile
from cryptoml.engine import Engine, step
{before}
FACTOR = {factor}
def weigh(x): return x * FACTOR
@step('up_{{p}}', windows=(2, 3), state=1)
def up(close, W, s, n, y):
    for j in range(len(W)):
        s[j] += (close - s[j]) / W[j]
        y[j] = weigh(s[j])
e = Engine([up])
print(e.run(np.full((4, 9), 5.), np.arange(4))[:, -1].tolist(), len(e.plain), compile.cache_dir())
'''


HANGS = 600   # Seconds after which something hangs: never a measure of speed

def begin(tmp_path, script, name):
    "Start a script with a cache folder of its own"
    path = tmp_path / f'{name}.py'
    path.write_text(script)
    env = {**os.environ, 'CRYPTOML_CACHE': str(tmp_path / 'cache')}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, str(path)], env=env, stdout=pipe, stderr=pipe, text=True)


def finish(process):
    try: out, err = process.communicate(timeout=HANGS)
    finally: process.kill()
    assert process.returncode == 0, err
    return out, err


def start(tmp_path, factor=2., before=''):
    return finish(begin(tmp_path, SCRIPT.format(factor=factor, before=before), 'mine'))


def cached(tmp_path, pattern): return sorted((tmp_path / 'cache').rglob(pattern))


def test_many_cold_processes_and_one_compiles(tmp_path):
    script = SCRIPT.format(factor=2., before='')
    cold = [begin(tmp_path, script, f'cold{k}') for k in range(3)]
    said = {finish(p)[0] for p in cold}
    assert len(said) == 1 and said.pop().startswith('[9.375, ')
    assert len(cached(tmp_path, 'up_*.nbc')) == len(cached(tmp_path, 'up_*.py')) == 1


def test_cache_damage_and_edits(tmp_path):
    first = start(tmp_path)[0]
    assert first.startswith('[9.375, ') and ' 0 ' in first
    (code,), (source,) = cached(tmp_path, 'up_*.nbc'), cached(tmp_path, 'up_*.py')
    made = code.stat().st_mtime
    assert start(tmp_path)[0] == first
    assert code.stat().st_mtime == made                                              # a warm start compiles nothing

    for damage in (b'', code.read_bytes()[:100], b'\x80\x04garbage'):
        cached(tmp_path, 'up_*.nbc')[0].write_bytes(damage)
        assert start(tmp_path)[0] == first
    cached(tmp_path, 'up_*.nbi')[0].write_bytes(b'')
    assert start(tmp_path)[0] == first
    source.write_text('raise SystemExit("stale")')
    assert start(tmp_path)[0] == first

    changed = start(tmp_path, factor=4.)[0]                                          # read by a function it calls
    assert changed.startswith('[18.75, ')
    assert len(cached(tmp_path, 'up_*.py')) == 2


def test_nothing_writable_compiles_without_cache_and_says_so(tmp_path):
    out, err = start(tmp_path, before='compile.cache_dir = lambda: None')
    assert out.startswith('[9.375, ')
    assert 'set CRYPTOML_CACHE' in err and len(err.strip().splitlines()) == 1
    assert not cached(tmp_path, '*.py')


LIMITED = """import resource
size = 8000                                            # bytes of a file: a text fits in, machine code does not
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))"""

@pytest.mark.skipif(sys.platform == 'win32', reason='no limit on the size of files')
def test_no_room_for_machine_code_compiles_without_cache_and_says_so(tmp_path):
    "Chosen in good faith, full when the code is to be written: every place is, so nothing is kept"
    out, err = start(tmp_path, before=LIMITED)
    assert out.startswith('[9.375, ') and ' 0 None' in out                           # compiled, and kept nowhere
    assert 'set CRYPTOML_CACHE' in err and len(err.strip().splitlines()) == 1
    assert not cached(tmp_path, '*.nbc') and not cached(tmp_path, '*.tmp*')


FULL = """import errno, os
from numba.core.caching import IndexDataCacheFile
written = IndexDataCacheFile._open_for_write
def full(self, path):
    if path.startswith(os.environ['CRYPTOML_CACHE']): raise OSError(errno.ENOSPC, 'No space left on device', path)
    return written(self, path)
IndexDataCacheFile._open_for_write = full"""

def test_a_full_disk_is_left_for_the_next_place(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'next'))
    (tmp_path / 'next').mkdir()
    out, err = start(tmp_path, before=FULL)
    assert out.startswith('[9.375, ') and f' 0 {tmp_path / "next"}' in out and not err
    assert not cached(tmp_path, '*.nbc') and list((tmp_path / 'next').rglob('up_*.nbc'))


# --- many steps

MANY = '''
import logging, os, sys
logging.basicConfig(format='%(message)s')
import numpy as np
from cryptoml.engine import Engine, step
os.cpu_count = lambda: 2
def weigh(x): return x * 2.
STEPS = []
{steps}
{before}
print(Engine(list(STEPS)).run(np.full((2, 9), 5.), np.arange(2))[:, -1].tolist())
'''
ADDED = '''
@step('up_{k}')
def step_{k}(close, W, s, n, y): y[0] = weigh(close) + {k}
STEPS.append(step_{k})
'''


@pytest.mark.parametrize('name, before', [
    ('apart', ''),
    ('dies', 'sys.path.insert(0, {folder!r})'),
    ('none', 'sys.executable = "/nowhere/python"')])
def test_many_cold_steps_are_compiled_in_other_processes(tmp_path, name, before):
    early = tmp_path / 'early'
    early.mkdir()
    (early / 'numba.py').write_text('import os; os._exit(3)')                        # they die as they start
    steps = ''.join(ADDED.format(k=k) for k in range(12))
    script = MANY.format(steps=steps, before=before.format(folder=str(early)))
    out, err = finish(begin(tmp_path, script, 'many'))
    assert out.strip() == str([10. + k for k in range(12)])
    assert err.startswith('compiling 13 steps') and len(err.splitlines()) == 1
    assert len(cached(tmp_path, 'step_*.nbc')) == 12
    assert len(cached(tmp_path, 'weigh_*.nbi')) == 1                                 # what all call is compiled once


@pytest.mark.skipif(sys.platform == 'win32', reason='no limit on the size of files')
def test_many_cold_steps_without_room_for_their_code(tmp_path):
    "In other processes and then in this one"
    steps = ''.join(ADDED.format(k=k) for k in range(12))
    out, err = finish(begin(tmp_path, MANY.format(steps=steps, before=LIMITED), 'many'))
    assert out.strip() == str([10. + k for k in range(12)])
    assert 'set CRYPTOML_CACHE' in err.splitlines()[-1] and len(err.splitlines()) == 2
    assert not cached(tmp_path, 'step_*.nbc')


# --- the folder

VARIABLES = ('CRYPTOML_CACHE', 'XDG_CACHE_HOME', 'LOCALAPPDATA', 'HOME')


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    "Every place that might hold a cache is a file"
    blocked = tmp_path / 'file'
    blocked.write_text('')
    for name in VARIABLES: monkeypatch.setenv(name, str(blocked))
    monkeypatch.setattr(module.tempfile, 'gettempdir', lambda: str(blocked))


def test_no_cache_folder(nowhere):
    assert cache_dir() is None


def test_cache_folder(nowhere, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
    folder = cache_dir()
    assert folder.parent == tmp_path / 'xdg'
    assert folder.stat().st_mode & 0o777 == 0o700
    os.chmod(folder, 0o777)
    assert cache_dir().stat().st_mode & 0o777 == 0o700                               # others are shut out again


def test_cache_folder_of_a_system_that_is_not_posix(nowhere, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
    monkeypatch.setenv('USERNAME', 'someone')
    monkeypatch.delattr(os, 'getuid')
    assert cache_dir().parent == tmp_path / 'xdg'


# --- texts

def test_key_depends_on_text():
    assert key_of('a', 'x = 1') != key_of('a', 'x = 2')


@pytest.mark.parametrize('text, kind', [('def', SyntaxError), ('raise KeyError(1)', KeyError)])
def test_a_text_that_fails_gives_its_error_and_spares_the_others(text, kind):
    found = load({'good': ('x = 1', {}), 'bad': (text, {})})
    assert found['good'].x == 1
    assert isinstance(found['bad'], kind)
