"""The way of somebody who has never seen this: README.md from the first bar to a signal in a bot

Word for word, in an empty folder, against an exchange on loopback that listed the coins half a year ago. What is
changed: `cryptoml download` and `live` are told its address (`--url`), and so is the program's ccxt; the training has
one pass (`--epochs 1`); the endpoint takes a free port (`--port 0`). What runs for ever is interrupted, as a person
would.
"""
import json, os, re, resource, shlex, signal, subprocess, sys, textwrap, threading, time
from pathlib import Path

import pandas as pd
import pytest

from cryptoml.data import CANDLE
from cryptoml.simulate import simulate
from replay_exchange import replaying

pytest.importorskip('ccxt')
pytest.importorskip('papermill')
pytestmark = pytest.mark.skipif(sys.platform == 'win32', reason='interrupts processes')

HISTORY = 3800       # Hours
COINS = ['BTC/USDT', 'ETH/USDT', 'SOL/USDT']
SIGNAL = re.compile(r'(\w+/USDT) +(?:BUY|SELL|HOLD) +(\w.+)$', re.M)
README = (Path(__file__).parents[1]/'README.md').read_text(encoding='utf-8')
WAY = re.search(r'^## From nothing to .+?(?=^## )', README, re.M | re.S)[0]
COMMANDS = [line for block in re.findall(r'^```sh\n(.*?)^```$', WAY, re.M | re.S) for line in block.splitlines()]
PROGRAM, = re.findall(r'^```python\n(.*?)^```$', WAY, re.M | re.S)
APPENDED = dict(download='--url {url}', train='--epochs 1', live='--url {url}', predict='', serve='--port 0')
AT_HOME = textwrap.dedent('''
    import sys
    import ccxt.async_support as ccxt
    from cryptoml.feeds import redirected
    describe, url = ccxt.binance.describe, sys.argv[1]
    def moved(self):
        told = describe(self)
        return told | dict(urls=told['urls'] | dict(api=redirected(told['urls']['api'], url)))
    ccxt.binance.describe = moved
    exec(compile(sys.stdin.read(), 'README', 'exec'))
    ''')

def listed():
    "Three coins since half a year, and what comes on the day on which the test runs"
    bars = simulate(n_symbols=3, n_bars=HISTORY + 48, seed=4).bars
    names = dict(zip(bars['symbol'].unique(), COINS))
    return bars.assign(symbol=bars['symbol'].map(names))[['time', 'symbol', *CANDLE]]

class Person:
    "Types one thing after another into a folder, and looks at the clock"
    def __init__(self, folder, url): self.folder, self.url, self.took = folder, url, {}

    def type(self, command):
        "The process of a line of the README"
        name, *words = shlex.split(command)
        assert name == 'cryptoml'
        return [sys.executable, '-m', 'cryptoml.jobs', *words, *APPENDED[words[0]].format(url=self.url).split()]

    def wait(self, argv, enough=None, given=None):
        "What a process printed until it ended, or until that was enough and it was interrupted; its errors; its code"
        wall, cpu = time.monotonic(), seconds_of_children()
        env = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path), PYTHONUNBUFFERED='1')
        def heeds(): signal.signal(signal.SIGINT, signal.SIG_DFL)                # tests in the background ignore it
        with (self.folder/'errors').open('w+') as errors, subprocess.Popen(
                argv, cwd=self.folder, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                preexec_fn=heeds) as p:
            limit = threading.Timer(900, p.kill)
            limit.start()
            p.stdin.write(given or '')
            p.stdin.close()
            out = ''
            for line in p.stdout:
                out += line
                if enough and enough(out):
                    p.send_signal(signal.SIGINT)
                    enough = None
            code = p.wait()
            limit.cancel()
            errors.seek(0)
            self.took[argv[3] if given is None else 'bot'] = time.monotonic() - wall, seconds_of_children() - cpu
            return out, errors.read(), code

def seconds_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

def all_said(text):
    "Whether there is a signal of each coin that comes from a prediction"
    return {coin for coin, reason in SIGNAL.findall(text) if 'no prediction' not in reason} == set(COINS)

def test_the_way_has_all_its_steps():
    assert [line.split()[1] for line in COMMANDS] == [*APPENDED]
    assert len(PROGRAM.splitlines()) <= 30 and not re.search(r'create_|order|min_confidence', PROGRAM)

def test_from_nothing_to_a_signal(tmp_path):
    bars = listed()
    with replaying(bars, start=bars['time'].min() + pd.Timedelta(HISTORY, 'h'), clock='wall') as exchange:
        person = Person(tmp_path, exchange.url)
        download, train, live, predict, serve = (person.type(line) for line in COMMANDS)
        for argv in (download, train):
            out, err, code = person.wait(argv)
            assert code == 0, out + err
        out, err, code = person.wait([sys.executable, '-c', AT_HOME, exchange.url], all_said, PROGRAM)
        print(out)
        assert all_said(out) and err.rstrip().endswith('KeyboardInterrupt'), out + err
        assert not re.search('Unclosed|never awaited|never retrieved', err), err
        need = int(re.match(r'reading (\d+) closed bars', out)[1])
        assert f'{need:,} hours of every coin, {need // 24} days' in WAY
        out, err, code = person.wait(live, all_said)
        assert all_said(out) and code == 130 and 'Traceback' not in err, out + err
        out, err, code = person.wait(predict)
        assert code == 0, out + err
        said = json.loads(out)['said']
        assert set(said) == set(COINS) and all(x['signal']['reasoning'][0] for x in said.values())
        out, err, code = person.wait(serve, lambda text: 'Bearer' in text)
        assert 'http://127.0.0.1:' in out and code == 130 and 'Traceback' not in err, out + err
    for step, (wall, cpu) in person.took.items(): print(f'{step:8} {wall:6.1f} s, {cpu:6.1f} s of CPU')
    assert sum(cpu for step, (_, cpu) in person.took.items() if step != 'train') < 90
