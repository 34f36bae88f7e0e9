"""Leak canaries and noise studies beside public tools: `BENCH_PEERS=PYTHON python bench/comparison.py [ROUNDS]`

PYTHON has what comparison-requirements.txt names, in an environment of its own. Every tool gets the same features
that look ahead and some that do not; then the best of 200 books without skill over two years (ROUNDS times, 20 by
default), and a book that is good. A minute of CPU for 20 rounds; prints two tables.
"""
import collections, datetime, json, os, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np

from comparison_canaries import CANARIES, HIDDEN, HONEST, hidden, seldom
from cryptoml.audit import audit
from cryptoml.backtest import Costs, backtest
from cryptoml.simulate import simulate
from cryptoml.verdict import verdict

PEERS = os.environ.get('BENCH_PEERS')
BOOKS, DAYS = 200, 730
FREE = Costs(fee=0, half_spread=0, slippage=0, borrow=0)


def asked_of_peers(what, path):
    done = subprocess.run([PEERS, str(Path(__file__).with_name('comparison_peers.py')), what, str(path)],
                          capture_output=True, text=True)
    if done.returncode: raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def looks_ahead(feature, bars, seed=0):
    "What our audit says, leaving aside that a feature settles late"
    def of(frame): return feature(frame.set_index('time')).to_frame('value').reset_index(drop=True)
    table = audit(of, bars, timeframe='1h', seed=seed).table
    return ((table['verdict'] == 'FAIL') & (table['check'] != 'warm-up')).any()


def luck():
    "How often what looks ahead at a few bars is found, by seed of the market and of the audit"
    for feature in (seldom, hidden):
        markets = [simulate(n_symbols=1, n_bars=2000, seed=seed).bars for seed in range(3)]
        found = sum(looks_ahead(feature, bars, seed) for bars in markets for seed in range(10))
        print(f'{feature.__name__}: cryptoml finds it {found} times of 30')


def leaks(folder):
    "A row a feature: who says that it looks ahead"
    bars = simulate(n_symbols=1, n_bars=2000, seed=3).bars.drop(columns='symbol')
    bars.set_index('time').to_csv(folder/'bars.csv')
    asked = asked_of_peers('leaks', folder/'bars.csv')
    print('\n| feature | cryptoml | s | nullcheck | s | overfit-gauntlet, lint |\n|---|---|---|---|---|---|')
    for feature in HONEST + CANARIES + HIDDEN:
        start = time.process_time()
        ours = 'found' if looks_ahead(feature, bars.assign(symbol='BTC/USDT')) else ''
        took, theirs = time.process_time() - start, asked['found'][feature.__name__]
        said = theirs['nullcheck'].removesuffix('_OBSERVED').replace('DIVERGENCE', 'found').lower()
        print(f'| {feature.__name__} | {ours} | {took:.1f} | {said} | {theirs["seconds"]:.1f} | {theirs["lint"]} |')
    return asked['versions']


def study(seed, folder):
    "The best of many books without skill, all of them, and our word, which counts by itself"
    os.environ['CRYPTOML_LEDGER'] = str(folder/f'ledger_{seed}.jsonl')
    rng = np.random.default_rng(seed)
    prices = np.exp(np.cumsum(rng.normal(0, .03, (1, DAYS + 2)), 1))
    time = np.datetime64('2024-01-01') + np.arange(DAYS + 2).astype('m8[D]')
    books = [backtest(rng.choice([-1., 1.], prices.shape), prices, FREE, time=time) for _ in range(BOOKS)]
    every = np.array([book.daily()[1] for book in books])
    best = int(np.argmax(every.mean(1) / every.std(1)))
    return every, best, verdict('the best of them', books[best], {}).word


def good(seed, folder):
    "A book that is right a little more often: an annual Sharpe ratio of 3, alone in its ledger"
    os.environ['CRYPTOML_LEDGER'] = str(folder/f'ledger_good_{seed}.jsonl')
    rng = np.random.default_rng(10_000 + seed)
    move = rng.normal(0, .03, (1, DAYS + 2))
    prices = np.exp(np.cumsum(move, 1))
    right = .5 + .5 * 3 / np.sqrt(365) / .8                              # the mean absolute move is .8 sigma
    side = np.where(rng.random(move.shape) < right, np.sign(move), -np.sign(move))
    target = np.roll(side, -2, 1)                                        # decided a bar before its fill
    time = np.datetime64('2024-01-01') + np.arange(DAYS + 2).astype('m8[D]')
    book = backtest(target, prices, FREE, time=time)
    return book.daily()[1], verdict('a good one', book, {}).word


def noise(folder, rounds):
    bests, alls, goods, words = [], [], [], []
    for seed in range(rounds):
        every, best, word = study(seed, folder)
        returns, alone = good(seed, folder)
        words.append({'cryptoml, which counts by itself': word, 'cryptoml, a good one': alone})
        bests.append(every[best]), alls.append(every), goods.append(returns)
    np.savez(folder/'returns.npz', best=bests, every=alls, good=goods)
    sharpe = [np.median([x.mean() / x.std() * 365 ** .5 for x in several]) for several in (bests, goods)]
    asked = asked_of_peers('noise', folder/'returns.npz')['found']
    rows = [a | b for a, b in zip(words, asked)]
    print(f'\nmedian annual Sharpe ratio of the best {sharpe[0]:.2f}, of the good one {sharpe[1]:.2f}')
    print(f'\n| {rounds} times the best of {BOOKS} without skill, or a good one | words |\n|---|---|')
    for name in sorted(rows[0], key=lambda x: 'good' in x):
        told = collections.Counter(row[name] for row in rows)
        print(f'| {name} | {", ".join(f"{word} {n}" for word, n in told.most_common())} |')


if __name__ == '__main__':
    if not PEERS:
        print(__doc__.splitlines()[0])
    else:
        with tempfile.TemporaryDirectory() as place:
            versions = leaks(Path(place))
            luck()
            noise(Path(place), int(sys.argv[1]) if len(sys.argv) > 1 else 20)
        print(f'\n{datetime.date.today()}: ' + ', '.join(f'{k} {v}' for k, v in versions.items()))
