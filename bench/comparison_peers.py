"""The tools that `comparison.py` asks: `PYTHON bench/comparison_peers.py leaks bars.csv`, or `noise returns.npz`;
prints JSON. PYTHON has what comparison-requirements.txt names"""
import importlib.metadata, inspect, json, sys, time

import numpy as np
import pandas as pd

from comparison_canaries import CANARIES, HIDDEN, HONEST


def leaks(path):
    "What nullcheck and the linter of overfit-gauntlet say of each feature"
    import nullcheck
    from overfit_gauntlet.lint import lint_source
    bars = pd.read_csv(path, index_col='time', parse_dates=True)
    rows = {}
    for feature in HONEST + CANARIES + HIDDEN:
        start = time.process_time()
        said = nullcheck.check(lambda raw: feature(raw).to_frame('value'), bars)
        took = time.process_time() - start
        source = 'import numpy as np\nimport pandas as pd\n' + inspect.getsource(feature)
        rows[feature.__name__] = dict(
            nullcheck='' if said.status == nullcheck.NO_DIVERGENCE else said.status, seconds=took,
            lint=', '.join(sorted({f.code for f in lint_source(source)})))
    return rows


def noise(path):
    "Verdicts on the best of many books, told how many there were, or told one; and on one book that is good"
    from overfit_gauntlet import run_gauntlet
    from overfitguard import screen, validate
    data = np.load(path)
    out = []
    for best, every, good in zip(data['best'], data['every'], data['good']):
        days = pd.date_range('2024-01-01', periods=len(best))
        n = len(every)
        out.append({
            'overfitguard, told 1': validate(best, 1, periods_per_year=365).verdict,
            f'overfitguard, told {n}': validate(best, n, periods_per_year=365).verdict,
            'overfitguard screen': screen(pd.DataFrame(every.T, days), periods_per_year=365, n_bootstrap=300).verdict,
            'overfit-gauntlet, told 1': run_gauntlet(best, ann=365).verdict.name,
            f'overfit-gauntlet, told {n}': run_gauntlet(best, ann=365, n_trials=n).verdict.name,
            'overfitguard, a good one': validate(good, 1, periods_per_year=365).verdict,
            'overfit-gauntlet, a good one': run_gauntlet(good, ann=365).verdict.name,
        })
    return out


def main(what, path):
    versions = {k: importlib.metadata.version(k) for k in ('nullcheck', 'overfit-gauntlet', 'overfitguard')}
    print(json.dumps(dict(versions=versions, found=dict(leaks=leaks, noise=noise)[what](path))))


if __name__ == '__main__':
    if len(sys.argv) == 3: main(*sys.argv[1:])
    else: print(__doc__)
