"""The walk-forward job from the command to its report, with a source left out and an agent beside the book"""
import json, subprocess, sys

import pytest

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
    trials = [json.loads(t) for t in ledger.read_text().splitlines()]
    assert {'ppo', 'utility size', 'constant fraction', 'ensemble', 'walk-forward'} <= {t['name'] for t in trials}
