"""The train job from the command line: killed and taken up again, and refused before it starts"""
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pandas as pd, pytest, torch
from cryptoml.integration import UltimateTradingAI
from cryptoml.simulate import simulate
from cryptoml.state import load, read_lines

ROOT = Path(__file__).parents[1]


def command(out, **parameters):
    return [sys.executable, '-m', 'cryptoml.jobs', 'train', '--out', str(out), *(a for k, v in parameters.items() for a in ('-p', f'{k}={v}'))]


def run(out, **parameters):
    return subprocess.run(command(out, **parameters), cwd=ROOT, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope='module')
def bars(tmp_path_factory):
    "Bars as another program would write them: BTCUSDT, a column called timestamp"
    path = tmp_path_factory.mktemp('data')/'bars.parquet'
    d = simulate(n_symbols=3, n_bars=2800, seed=4).bars.rename(columns=dict(time='timestamp'))
    d.assign(symbol=d.symbol.str.replace('/', '')).to_parquet(path)
    return path


def test_killed_in_mid_epoch_ends_with_the_same_weights(bars, tmp_path):
    p = dict(data=bars, epochs=3, horizons='4,12', compare='lstm', threads=1)
    whole = run(tmp_path/'whole', **p)
    assert whole.returncode == 0, whole.stderr[-2000:]
    killed = tmp_path/'killed'
    for now in (killed, killed/'lstm'):                                                         # first in the network itself, then in the one beside it
        job = subprocess.Popen(command(killed, **p), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            end = time.time() + 200
            while not read_lines(now/'history.jsonl') and time.time() < end: time.sleep(.05)    # one epoch is done, the next is under way
            assert read_lines(now/'history.jsonl'), 'no epoch was finished in time'
        finally: os.killpg(job.pid, signal.SIGKILL); job.wait()
        time.sleep(1.5)                                                                        # the kernel notices that its parent is gone
    assert not (killed/'metrics.json').exists()
    again = run(killed, **p)
    assert again.returncode == 0, again.stderr[-2000:]
    a, b = (load(tmp_path/x/'model')[0]['network'] for x in ('whole', 'killed'))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert all([h['epoch'] for h in read_lines(x/'history.jsonl')] == [1, 2, 3] for x in (killed, killed/'lstm'))
    m, n = (json.loads((tmp_path/x/'metrics.json').read_text()) for x in ('whole', 'killed'))
    assert m == n and m['rows'] and m['verdict']['word'] in ('PASS', 'INCONCLUSIVE', 'FAIL')
    assert {'network', 'lstm', 'majority', 'persistence', 'momentum', 'logistic', 'boosting', 'HAR', 'zero', 'hold'} <= {r['model'] for r in m['rows']}
    assert {'target', 'horizon', 'model', 'metric', 'value', 'lo', 'hi', 'n'} == set(m['rows'][0]) and {'digest', 'span', 'symbols'} <= set(m['data'])
    ai, market = UltimateTradingAI(device='cpu'), simulate(n_symbols=3, n_bars=2800, seed=4).bars
    ai.load_state(killed/'model')                                                              # what a run leaves is what a bot loads
    now = market.time.max() + pd.Timedelta('1h')
    p = ai.predict_sync(market, 'BTC/USDT', now)
    assert not p['faults'] and p['horizons'] == [4, 12] and ai.get_trading_signal('BTC/USDT', 0., now)['action'] in ('BUY', 'SELL')
    page = (killed/'report.html').read_text()
    assert page.count('data:image/png') >= 6 and m['verdict']['word'] in page
    assert {'train.ipynb', 'report.html', 'params.json', 'metrics.json', 'history.jsonl', 'model'} <= {f.name for f in killed.iterdir()}


@pytest.mark.parametrize('change, sentence', [
    (dict(symbols='BTC/USDT,NOPE/USDT'), 'NOPE/USDT'),
    (dict(data='nowhere.parquet'), 'nowhere.parquet'),
    (dict(end='2022-01-15'), 'short'),
    (dict(size='huge'), 'size'),
    (dict(compare='rnn'), 'rnn'),
    (dict(compare='network'), 'leave it out'),
    (dict(device='cuda:99'), 'cuda:99'),
])
def test_what_cannot_be_run_is_one_sentence(bars, tmp_path, change, sentence):
    r = run(tmp_path/'x', **dict(data=bars, epochs=1) | change)
    assert r.returncode != 0 and sentence in r.stderr and 'Traceback' not in r.stderr, r.stderr[-1500:]
    assert not (tmp_path/'x'/'history.jsonl').exists() and not (tmp_path/'x'/'metrics.json').exists()


def test_unknown_and_ill_typed_parameters_start_nothing(tmp_path):
    for p, word in ((dict(epoch=3), 'epoch'), (dict(epochs='many'), 'epochs')):
        r = run(tmp_path/'y', **p)
        assert r.returncode != 0 and word in r.stderr and 'Traceback' not in r.stderr and not (tmp_path/'y').exists()
