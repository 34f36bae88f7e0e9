"Speed of reading trees, LightGBM's `Booster.predict` beside it in the same run: `python bench/boosting.py`"
import os, statistics, time

os.environ.setdefault('OMP_NUM_THREADS', '1')

import lightgbm
import numpy as np

from cryptoml.boosting import grown

INPUTS, TREES = 200, 300
GROW = dict(learning_rate=.05, min_data_in_leaf=200, max_bin=63, num_threads=1, verbose=-1, seed=0)


def model(leaves, rng, S=20_000):
    "Trees on noisy steps and a product, a twentieth of the inputs missing; and rows that they have not seen"
    x = rng.normal(size=(2 * S, INPUTS))
    y = x[:, 0] * x[:, 1] + np.sign(x[:, 2]) + rng.normal(size=2 * S)
    x[rng.random(x.shape) < .05] = np.nan
    return lightgbm.train(GROW | dict(num_leaves=leaves), lightgbm.Dataset(x[:S], y[:S]), TREES), x[S:]


def medians(columns, parts, rounds=9):
    "Median CPU microseconds a call of each function, interleaved, after one round that does not count"
    took = {k: [] for k in columns}
    for _ in range(rounds + 1):
        for k, f in columns.items():
            t = time.process_time()
            for x in parts: f(x)
            took[k].append(1e6 * (time.process_time() - t) / len(parts))
    return {k: statistics.median(t[1:]) for k, t in took.items()}


def main():
    rng = np.random.default_rng(0)
    for leaves in (8, 31):
        booster, rows = model(leaves, rng)
        trees = grown(booster, TREES)
        def theirs(x, booster=booster): return booster.predict(x, raw_score=True, num_threads=1)
        apart = abs(trees.score(rows)[:, 0] - theirs(rows)).max()
        assert apart < 1e-12, 'the two do not agree'
        for n, calls in ((1, 1000), (1000, 5)):
            parts = [rows[i * n:(i + 1) * n] for i in range(calls)]
            t = medians(dict(ours=trees.score, theirs=theirs), parts)
            print(f'{TREES} trees of {leaves:2} leaves, {n:5} rows: {t["ours"]:9.1f} us'
                  f'   LightGBM {t["theirs"]:9.1f} us   {t["theirs"] / t["ours"]:5.1f} times', flush=True)


if __name__ == '__main__': main()
