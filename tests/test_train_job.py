"""The train job from the command line: killed and taken up again, and refused before it starts"""
import json, math, os, subprocess, sys, time
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch

from cryptoml.calibration import ODD
from cryptoml.integration import UltimateTradingAI
from cryptoml.ledger import read_ledger
from cryptoml.record import KEPT, read_run
from cryptoml.report import write_report
from cryptoml.simulate import simulate
from cryptoml.state import load, lock, read_lines

ROOT = Path(__file__).parents[1]
HANGS = 600   # Seconds after which something that should have happened never will

# IPython runs this in the kernel of a job before its first cell. In the folder named HOLD the second epoch stops for
# good at its third batch; what is killed then is killed in mid-epoch, however slow or fast the machine.
HOLD = """
import os, signal
from pathlib import Path
from cryptoml import trainer

def batches_until_held(batches):
    for i, batch in enumerate(batches):
        if i == 2:
            Path(os.environ['HOLD'], 'held').touch()
            signal.pause()
        yield batch

def train_epoch(model, batches, *args, **kw):
    history = Path(os.environ['HOLD'], 'history.jsonl')
    one_epoch_done = history.exists() and history.read_text().count('\\n') == 1
    return through(model, batches_until_held(batches) if one_epoch_done else batches, *args, **kw)

through, trainer.train_epoch = trainer.train_epoch, train_epoch
"""


def command(out, **parameters):
    given = [a for k, v in parameters.items() for a in ('-p', f'{k}={v}')]
    return [sys.executable, '-m', 'cryptoml.jobs', 'train', '--out', str(out), *given]


def run(out, **parameters):
    return subprocess.run(command(out, **parameters), cwd=ROOT, capture_output=True, text=True, timeout=HANGS)


def killed_in_its_second_epoch(out, folder, hooks, **parameters):
    "Start the job, kill it in the second epoch of what trains in `folder`, and wait until its kernel is gone too"
    env = os.environ | dict(HOLD=str(folder), IPYTHONDIR=str(hooks))
    log = out.parent/f'{out.name}-{folder.name}.log'
    with open(log, 'w') as f: job = subprocess.Popen(command(out, **parameters), cwd=ROOT, env=env, stdout=f, stderr=f)
    end = time.monotonic() + HANGS
    try:
        while not (folder/'held').exists():
            assert job.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < end, 'no epoch was finished'
            time.sleep(.05)
    finally:
        job.kill()
        job.wait()
    with lock(out, wait=HANGS): pass


@pytest.fixture(scope='module')
def bars(tmp_path_factory):
    "Bars as another program would write them: BTCUSDT, a column called timestamp, and a name that is no symbol"
    path = tmp_path_factory.mktemp('data')/'bars.parquet'
    d = simulate(n_symbols=3, n_bars=2800, seed=4).bars.rename(columns=dict(time='timestamp'))
    nameless = d[d.symbol == d.symbol.iloc[0]].assign(symbol='GOLD')           # of what against what, nobody knows
    written = pd.concat([d.assign(symbol=d.symbol.str.replace('/', '')), nameless])
    written.attrs = {}                                                         # nor that it was made up
    written.to_parquet(path)
    return path


@pytest.fixture(scope='module')
def runs(bars, tmp_path_factory):
    "A run that nothing interrupted, and one killed thrice: in the network beside, the network itself, and its refit"
    folder = tmp_path_factory.mktemp('runs')
    startup = folder/'ipython'/'profile_default'/'startup'
    startup.mkdir(parents=True)
    (startup/'hold.py').write_text(HOLD)
    p = dict(data=bars, epochs=3, horizons='4,12', compare='lstm', threads=1)
    whole = run(folder/'whole', **p)
    assert whole.returncode == 0, whole.stderr[-2000:]
    killed = folder/'killed'
    for now in (killed/'lstm', killed, killed/'judged'): killed_in_its_second_epoch(killed, now, folder/'ipython', **p)
    assert not (killed/'metrics.json').exists()
    again = run(killed, **p)
    assert again.returncode == 0, again.stderr[-2000:]
    return folder/'whole', killed


def metrics_of(out): return json.loads((out/'metrics.json').read_text())

def epochs_of(out): return [row['epoch'] for row in read_lines(out/'history.jsonl')]


def test_killed_in_mid_epoch_ends_with_the_same_weights(runs):
    (a, said), (b, said_again) = (load(out/'model') for out in runs)
    assert a.keys() == b.keys() >= {'network_0', 'scaler', 'blend', 'familiar', 'bands', 'member_0'}
    assert said['members'] == said_again['members']
    for name in a:
        assert a[name].keys() == b[name].keys()
        assert all(torch.equal(v.nan_to_num(), b[name][k].nan_to_num()) for k, v in a[name].items())
    assert epochs_of(runs[1]) == epochs_of(runs[1]/'lstm') == [1, 2, 3]
    for again in ('judged', 'shipped', 'lstm/again'): assert epochs_of(runs[1]/again) == epochs_of(runs[0]/again) != []
    a, b = (metrics_of(out) for out in runs)
    assert a['verdict'].pop('head') != b['verdict'].pop('head')          # a line of the ledger each, and one trial
    assert a == b


def test_what_a_run_reports(runs):
    m = metrics_of(runs[1])
    page = (runs[1]/'report.html').read_text()
    assert m['rows'] and m['verdict']['word'] in ('PASS', 'INCONCLUSIVE', 'FAIL')
    members = {'network', 'majority', 'logistic', 'ridge', 'HAR', 'boosting'}
    beside = {'lstm', 'persistence', 'momentum', 'low volatility', 'hold', 'ensemble with stops'}
    assert {'ensemble'} | members | beside <= {r['model'] for r in m['rows']}
    assert {r['model'] for r in m['rows'] if r['over']} == {'ensemble'}
    assert 'ensemble' in {b['book'] for b in m['books']}
    assert 'Shares of the members' in page and 'SIMULATED' not in m['verdict']['book'] and 'SIMULATED' not in page
    assert set(m['rows'][0]) == {'target', 'horizon', 'model', 'metric', 'over', 'value', 'lo', 'hi', 'n'}
    assert {'digest', 'span', 'symbols'} <= set(m['data'])
    assert 'cannot be split' in m['left_out']['GOLD'] and 'Left out: GOLD' in page
    assert page.count('<figure') == 8 and f'<title>{m["verdict"]["word"]}: ' in page and str(runs[1]/'model') in page
    left = {f.name for f in runs[1].iterdir()}
    assert {'train.ipynb', 'report.html', 'params.json', 'metrics.json', 'history.jsonl', 'model', *KEPT} <= left


def test_the_report_is_made_again_from_what_the_run_kept(runs, tmp_path):
    "To the last byte; and what the tables hold is what the metrics say"
    assert write_report(runs[0], tmp_path/'again.html').read_bytes() == (runs[0]/'report.html').read_bytes()
    run, m = read_run(runs[0]), metrics_of(runs[0])
    assert len(run.rows) == len(m['rows']) and run.threshold == m['threshold']
    days, daily = run.daily()
    figures = {b['book']: b for b in m['books'] if b['case'] == 'costs as stated'}
    assert daily.keys() == figures.keys()
    for name, r in daily.items():
        assert r.std() * np.sqrt(365) == pytest.approx(figures[name]['annual volatility'])
    brought = sum(c['net'] for c in run.facts['coins_brought'])
    own = run.books[(run.books.case == 'costs as stated') & (run.books.book == 'ensemble')]
    assert brought == pytest.approx(np.log1p(own.ret).sum(), abs=.05)        # coins add up to the book
    published = write_report(runs[0], tmp_path/'static.html', static=True).read_text()
    assert '<script' not in published and str(runs[0]) not in published


STEADY = """
from cryptoml import network
network.SIZES['small']['dropout'] = 0.      # two processes have noise of their own
"""
FACADE = STEADY + """
import json, sys, torch
from cryptoml.integration import UltimateTradingAI
torch.set_num_threads(1)
bars, state, seed = sys.argv[1:]
ai = UltimateTradingAI(dict(horizons=[4, 12], seed=int(seed), state_dir=state, fresh=False), device='cpu')
found = ai.train_sync(bars, epochs=1)
print(json.dumps(found['rows']))
print(found['verdict']['trials'])
"""

def as_two_processes(out, hooks, **parameters):
    "The job under torchrun, without dropout"
    startup = hooks/'profile_default'/'startup'
    startup.mkdir(parents=True)
    (startup/'steady.py').write_text(STEADY)
    before = ['-m', 'torch.distributed.run', '--standalone', '--local-addr', '127.0.0.1', '--nproc-per-node', '2']
    python, *line = command(out, **parameters)
    env = os.environ | dict(IPYTHONDIR=str(hooks))
    return subprocess.run([python, *before, *line], cwd=ROOT, env=env, capture_output=True, text=True, timeout=HANGS)

def same_rows(rows, others):
    """The same comparisons, and values alike: a sum over two halves of a batch is rounded otherwise than the whole, by
    1e-7, and some fifty steps and a share that is searched for make up to 1e-5 of it"""
    assert [{**r, **dict.fromkeys(('value', 'lo', 'hi'))} for r in rows] == [
        {**r, **dict.fromkeys(('value', 'lo', 'hi'))} for r in others]
    for r, o in zip(rows, others):
        figures = [[math.nan if x[k] is None else x[k] for k in ('value', 'lo', 'hi')] for x in (r, o)]
        assert figures[0] == pytest.approx(figures[1], abs=1e-4, rel=1e-4, nan_ok=True), r

def test_every_training_is_a_trial(bars, tmp_path, monkeypatch):
    """Through the facade and through the job, beside one another, in processes of their own: what was run is counted,
    once where two processes share it, and they find what one finds"""
    monkeypatch.setenv('CRYPTOML_LEDGER', str(tmp_path/'ledger.jsonl'))
    def facade(seed):
        line = [sys.executable, '-c', FACADE, str(bars), str(tmp_path/f'state{seed}'), str(seed)]
        return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    beside = [facade(seed) for seed in (0, 1)]
    said = [p.communicate(timeout=HANGS)[0].splitlines() for p in beside]
    assert sorted(int(lines[-1]) for lines in said)[-1] == 2
    p = dict(data=bars, epochs=1, horizons='4,12', threads=1, fresh=False)
    both = as_two_processes(tmp_path/'again', tmp_path/'ipython', **p, seed=0, compare='')   # the facade has done it
    assert both.returncode == 0, both.stderr[-2000:]
    same_rows(metrics_of(tmp_path/'again')['rows'], json.loads(said[0][-2]))
    assert run(tmp_path/'beside', **p, seed=3, compare='lstm').returncode == 0     # and two more
    assert [metrics_of(tmp_path/k)['verdict']['trials'] for k in ('again', 'beside')] == [2, 4]
    ledger = read_ledger(tmp_path/'ledger.jsonl')
    assert not ledger.faults and len(ledger.trials) == 5
    told = subprocess.run([sys.executable, '-m', 'cryptoml.jobs', 'trials'], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0 and str(tmp_path/'ledger.jsonl') in told.stdout


def test_what_a_run_leaves_is_what_a_bot_loads(runs):
    ai = UltimateTradingAI(dict(act_on='FAIL'), device='cpu')
    ai.load_state(runs[1]/'model')
    market = simulate(n_symbols=3, n_bars=2800, seed=4).bars
    now = market.time.max() + pd.Timedelta('1h')
    p = ai.predict_sync(market, 'BTC/USDT', now)
    assert not p['faults'] and p['horizons'] == [4, 12]
    terms = ai.live().terms
    assert terms.trained_until == terms.data_until == now.isoformat() and not p['in_sample']       # refit to the newest
    signal = ai.get_trading_signal('BTC/USDT', 0., now)
    assert signal is None or signal['action'] in ('BUY', 'SELL') or p['rarity'] < ODD
    assert set(ai.next_weights({}, 1., now)) == set(ai.live().terms.symbols)


@pytest.mark.parametrize('change, sentence', [
    (dict(symbols='BTC/USDT,NOPE/USDT'), 'NOPE/USDT'),
    (dict(data='nowhere.parquet'), 'nowhere.parquet'),
    (dict(end='2022-01-15'), 'short'),
    (dict(size='huge'), 'size'),
    (dict(compare='rnn'), 'rnn'),
    (dict(compare='network'), 'is always there'),
    (dict(device='cuda:99'), 'cuda:99'),
    (dict(round_trip=-1), 'round_trip'),
    (dict(book='relative', symbols='BTC/USDT,ETH/USDT'), 'a relative book needs 3 coins or more, got 2'),
], ids=str)
def test_what_cannot_be_run_is_one_sentence(bars, tmp_path, change, sentence):
    r = run(tmp_path/'x', **dict(data=bars, epochs=1) | change)
    assert r.returncode != 0 and sentence in r.stderr and 'Traceback' not in r.stderr, r.stderr[-1500:]
    assert not (tmp_path/'x'/'history.jsonl').exists() and not (tmp_path/'x'/'metrics.json').exists()


@pytest.mark.parametrize('given, word', [
    (dict(epoch=3), 'epoch'),
    (dict(epochs='many'), 'epochs'),
], ids=str)
def test_unknown_and_ill_typed_parameters_start_nothing(tmp_path, given, word):
    r = run(tmp_path/'y', **given)
    assert r.returncode != 0 and word in r.stderr and 'Traceback' not in r.stderr
    assert not (tmp_path/'y').exists()
