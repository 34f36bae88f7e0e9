"""Settings of all tests: no screen, no network, the package of this checkout, a ledger of trials of their own"""
import os, shutil, sys, tempfile, threading, time
from pathlib import Path

import pytest

os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('OMP_NUM_THREADS', '1')
sys.path.insert(0, str(Path(__file__).parents[1]))

# Before anything is imported, and for every process that the tests start: no test adds to the user's own trials.
# A process that a test started keeps what that test set, also where it imports this file again.
_WORKER = os.environ.get('PYTEST_XDIST_WORKER', 'alone')
_FOLDER = None
if os.environ.get('CRYPTOML_TESTS') != _WORKER:
    _FOLDER = tempfile.mkdtemp(prefix='cryptoml-tests-')
    os.environ.update(CRYPTOML_TESTS=_WORKER, CRYPTOML_LEDGER=str(Path(_FOLDER)/'ledger.jsonl'))

def pytest_unconfigure():
    if _FOLDER: shutil.rmtree(_FOLDER, ignore_errors=True)

@pytest.fixture
def ledger(tmp_path, monkeypatch):
    "A ledger of this test alone, for one that counts: its path"
    path = tmp_path/'own'/'ledger.jsonl'
    monkeypatch.setenv('CRYPTOML_LEDGER', str(path))
    return path

@pytest.fixture(scope='module')
def one_thread():
    "Torch computes with one thread in this file"
    import torch
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def forked(f):
    "Run f in a child and return its pid; the child never returns into pytest"
    pid = os.fork()
    if pid: return pid
    import torch
    torch.set_num_threads(1)   # torch's threads of the parent do not exist here, and waiting for them never ends
    try: code = f() or 0
    except BaseException as e:
        print(repr(e), flush=True)
        code = 1
    finally: os._exit(code)

def resident():
    "Memory of this process, bytes"
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')

def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

ASKED = dict(bots='a real freqtrade runs, for minutes: make bots',
             cluster='a Ray cluster of two nodes, for minutes: make cluster',
             types='a type checker reads the package, for a minute: make types')

PAGE = '::test_notebook['   # Of a test that runs a page, which has no fixture to share

@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "A file stays with one worker, which makes its fixtures once; each page goes to whichever is free"
    if config.getoption('dist') != 'loadfile': return None
    from xdist.scheduler import LoadFileScheduling
    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid): return nodeid if PAGE in nodeid else super()._split_scope(nodeid)
    return Files(config, log)

QUIET = 8   # Seconds without a dot after which it is told what keeps the workers

class Waiting:
    "Where several workers run: no ten seconds without a line"
    def __init__(self, terminal):
        self.terminal, self.begun, self.seen, self.ended = terminal, {}, time.monotonic(), threading.Event()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        while not self.ended.wait(1):
            if time.monotonic() - self.seen < QUIET: continue
            self.terminal.write(f'\n{self.said(time.monotonic())}\n')
            self.seen = time.monotonic()

    def said(self, now):
        if not self.begun: return 'collecting tests'
        names = [f'{nodeid.split("/")[-1]} {now - start:.0f} s' for nodeid, start in [*self.begun.items()]]
        return 'running ' + ', '.join(names)

    def pytest_runtest_logstart(self, nodeid): self.begun[nodeid] = time.monotonic()

    def pytest_runtest_logreport(self): self.seen = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid): self.begun.pop(nodeid, None)

    def pytest_sessionfinish(self): self.ended.set()

def pytest_sessionstart(session):
    plugins = session.config.pluginmanager
    if plugins.has_plugin('dsession'): plugins.register(Waiting(plugins.get_plugin('terminalreporter')))

def pytest_configure(config):
    for name, what in ASKED.items(): config.addinivalue_line('markers', f'{name}: {what}')

def pytest_collection_modifyitems(config, items):
    "The longest file first, the pages last, so that workers end together; what needs more than Python only if asked"
    def turn(item): return (item.path.name != 'test_train_job.py') + (PAGE in item.nodeid)
    items.sort(key=turn)
    for name, what in ASKED.items():
        if name in config.option.markexpr: continue
        for item in items:
            if item.get_closest_marker(name): item.add_marker(pytest.mark.skip(reason=what))
