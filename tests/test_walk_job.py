"""The walk-forward job from the command to its report, with a source left out and an agent beside the book"""
import json, subprocess, sys, time

import psutil, pytest

from cryptoml.record import ReportError
from cryptoml.results import write_walk_report

def test_a_source_and_an_agent_are_rows_of_the_walk(tmp_path, ledger):
    pytest.importorskip('stable_baselines3', reason="pip install 'cryptoml[rl]'")
    out = tmp_path/'walk'
    asked = dict(first='2022-12-01', last='2023-01-01', epochs=1, horizons='4,24', ppo='true', without='extra')
    line = [sys.executable, '-m', 'cryptoml.jobs', 'walkforward', '--out', str(out)]
    for name, value in asked.items(): line += ['-p', f'{name}={value}']
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((out/'metrics.json').read_text())
    books = {'ensemble', 'ppo', 'utility size', 'constant fraction', 'without extra', 'hold'}
    assert books <= {b['book'] for b in metrics['books']}
    gains = [r for r in metrics['rows'] if r['over'] == 'without extra' and r['target'] == 'volatility']
    assert gains and all(r['lo'] is None or r['lo'] <= r['value'] <= r['hi'] for r in gains)
    assert {'ppo', 'without extra'} <= {r['over'] for r in metrics['rows'] if r['target'] == 'book' and r['over']}
    report = (out/'report.html').read_text()
    assert 'What a source is worth' in report and 'constant fraction' in report
    assert '(SIMULATED): cryptoml walk-forward' in report and 'SIMULATED market' in metrics['verdict']['book']
    assert 'on a SIMULATED market' in done.stdout and report.count('<figure') >= 3
    assert write_walk_report(out, tmp_path/'again.html').read_text() == report           # to the last byte
    published = write_walk_report(out, tmp_path/'static.html', static=True).read_text()
    assert '<script' not in published and str(tmp_path) not in published
    with pytest.raises(ReportError, match='holds no walk that has ended'): write_walk_report(tmp_path)
    trials = [json.loads(t) for t in ledger.read_text().splitlines()]
    assert {'ppo', 'utility size', 'constant fraction', 'ensemble', 'walk-forward'} <= {t['name'] for t in trials}

WALK = """
from cryptoml.forecaster import ForecasterConfig
from cryptoml.simulate import simulate
from cryptoml.walkforward import spans, walk
bars = simulate(n_symbols=3, n_bars=24 * 345, seed=4).bars
walk(bars, None, spans('2022-11-01', '2022-12-01', 1), ForecasterConfig(epochs=50), {}, 'out')
"""

def test_a_fold_ends_with_the_walk_that_started_it(tmp_path):
    "Also where that one is killed: a fold that goes on would write into the folder of the next walk"
    p = subprocess.Popen([sys.executable, '-c', f'if __name__ == "__main__":\n    exec({WALK!r})'], cwd=tmp_path)
    end = time.monotonic() + 300
    while not list(tmp_path.glob('out/*/log.txt')):
        assert p.poll() is None and time.monotonic() < end, 'no fold was begun'
        time.sleep(.05)
    folds = psutil.Process(p.pid).children(recursive=True)
    assert folds
    p.kill()
    p.wait()
    gone, alive = psutil.wait_procs(folds, timeout=300)
    assert not alive
