"""Settings of all tests: no screen, no network, the package of this checkout"""
import os, sys
from pathlib import Path

os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('OMP_NUM_THREADS', '1')
sys.path.insert(0, str(Path(__file__).parents[1]))


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

def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def pytest_collection_modifyitems(items):
    "The longest files first, so that two workers end together"
    longest = ('test_train_job.py', 'test_notebooks.py')
    items.sort(key=lambda item: item.path.name not in longest)
