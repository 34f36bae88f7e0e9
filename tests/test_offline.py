"""Nothing is asked of the network: not at import, not while a model is trained and asked

Each in a process of its own, in which Python's sockets to other machines raise from the first line on, and, where
the system lets a user have one, in a network namespace that has no way out at all."""
import shutil, subprocess, sys, textwrap
from pathlib import Path

import pytest

root = Path(__file__).parents[1]
modules = sorted(p.stem for p in (root/'cryptoml').glob('*.py') if not p.stem.startswith('_') and p.stem != 'docs')

FORBID = '''
import socket, sys

def forbid(event, args):
    "An audit hook: no socket of the internet's kinds, no name looked up. It cannot be taken away again"
    made = event == 'socket.__new__' and args[1] in (socket.AF_INET, socket.AF_INET6)
    if made or event in ('socket.getaddrinfo', 'socket.gethostbyname', 'socket.connect'):
        raise RuntimeError(f'the network was asked: {event} {args[1:]}')

sys.addaudithook(forbid)
'''

def namespace():
    "What starts a process without a network; empty where that cannot be had"
    command = ['unshare', '--map-root-user', '--net']
    if not shutil.which('unshare'): return []
    return command if subprocess.run([*command, 'true'], capture_output=True).returncode == 0 else []

ALONE = namespace()

def offline(code, cwd):
    here = f'import sys; sys.path.insert(0, {str(root)!r})'
    program = '\n'.join([FORBID, here, textwrap.dedent(code)])
    command = [*ALONE, sys.executable, '-W', 'ignore', '-c', program]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)

@pytest.mark.parametrize('act', [
    'socket.create_connection(("127.0.0.1", 9))',
    'socket.socket()',
    'socket.getaddrinfo("localhost", 80)',
    'import urllib.request; urllib.request.urlopen("http://localhost:9")',
])
def test_the_lock_holds(tmp_path, act):
    done = offline(f'import socket; {act}', tmp_path)
    assert done.returncode == 1 and 'the network was asked' in done.stderr, done.stderr

@pytest.mark.skipif(not ALONE, reason='a network namespace cannot be had here')
def test_the_namespace_has_no_way_out(tmp_path):
    code = 'import socket; s = socket.socket(); s.settimeout(5); s.connect(("192.0.2.1", 80))'   # of documentation
    done = subprocess.run([*ALONE, sys.executable, '-c', code], capture_output=True, text=True)
    assert 'Network is unreachable' in done.stderr, done.stderr

def test_no_module_asks_the_network(tmp_path):
    done = offline(f'''
        import importlib
        for m in {modules!r}: importlib.import_module(f'cryptoml.{{m}}')
        print(len([m for m in sys.modules if m.startswith('cryptoml.')]))
        ''', tmp_path)
    assert done.returncode == 0, done.stderr[-1500:]
    assert int(done.stdout) == len(modules)
    assert not list(tmp_path.iterdir()), 'an import left something behind'

def test_a_model_is_trained_and_asked_without_it(tmp_path):
    done = offline('''
        import os
        os.environ['CRYPTOML_LEDGER'] = 'ledger.jsonl'
        import pandas as pd
        from cryptoml.integration import UltimateTradingAI
        from cryptoml.simulate import simulate
        bars = simulate(n_symbols=3, n_bars=4500).bars
        now = bars.time.max() + pd.Timedelta('1h')
        ai = UltimateTradingAI(dict(horizons=[4]), device='cpu')
        ai.train_sync(bars[bars.time < now - pd.Timedelta('1D')], epochs=1)
        ai.save_state()
        fresh = UltimateTradingAI(device='cpu')
        fresh.load_state()
        symbols = list(fresh.predict_sync(bars, now=now))
        print(*[fresh.get_trading_signal(s, now=now)['action'] for s in symbols])
        ''', tmp_path)
    assert done.returncode == 0, done.stderr[-1500:]
    actions = done.stdout.splitlines()[-1].split()
    assert len(actions) == 3 and {*actions} <= {'BUY', 'SELL', 'HOLD'}, done.stdout

def test_the_doctor_asks_nobody(tmp_path):
    done = offline("from cryptoml.jobs import main; sys.exit(main(['doctor']))", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-1500:]
