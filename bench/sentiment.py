"""What news add to a forecast: three coins, February to May 2022, with and without the features of sentiment:
`CRYPTOML_DATA=folder python bench/sentiment.py polarity` (a lexicon's scores of real headlines; two CPU minutes)
`CRYPTOML_DATA=folder python bench/sentiment.py scores.parquet` (scores of the same headlines by another model: time,
score, perhaps known and symbol)
`CRYPTOML_DATA=folder python bench/sentiment.py 0.1` (made-up texts, one of each coin an hour, whose scores look into
the future: this correlation with the move of the next 24 hours; so that it is seen what four months can find)

Every second hour is a decision; what is forecast is the next 24 hours. Four months are forecast, each by models of all
that was known before it: the ridge and the number of trees are chosen on its last forty days, then everything is
fitted once more. Bars begin in 2020, and news in November 2021 (before it the columns are missing, as a person would
have them). Same rows, same settings; the inputs are all features of bars, and beside them the fourteen of sentiment, or
as many of the same texts moved by half of their span (moved), which tell what fourteen columns of nothing do. Gains are
in % of the loss without them, with 95 % intervals over days; above 0 is better."""
import os
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cryptoml.boosting import Boosted, Scale, Task, along, line
from cryptoml.data import read_panel
from cryptoml.features import AdvancedFeatureEngineer
from cryptoml.members import RIDGES, best_ridge
from cryptoml.metrics import day_blocks, interval_mean, nll
from cryptoml.sentiment import DELAY, sentiment_frame
from cryptoml.splits import cut
from cryptoml.targets import make_targets
from cryptoml.verdict import qlike_of_logs

COINS = ['BTC/USDT', 'ETH/USDT', 'SOL/USDT']
FOLDS, MONTH, CHOSEN, AHEAD = 4, pd.Timedelta('30D'), pd.Timedelta('40D'), 24
TASKS = dict(direction=Task(3), relative=Task(), volatility=Task())
COINS_OF = dict(bitcoin='BTC', ethereum='ETH')


def headlines(root) -> pd.DataFrame:
    "Real headlines with the polarity of a lexicon; a stamp of an hour or a day counts from its end"
    raw = pd.read_parquet(root/'crypto_news.parquet')
    stamp = raw.timestamp.dt.as_unit('us')
    wait = pd.Series(pd.Timedelta(DELAY), stamp.index)
    wait = wait.mask(stamp == stamp.dt.floor('h'), pd.Timedelta('1h'))
    wait = wait.mask(stamp == stamp.dt.floor('D'), pd.Timedelta('1D'))
    coin = raw.subject.map(COINS_OF).fillna('')
    return pd.DataFrame(dict(time=stamp, known=stamp + wait, symbol=coin, score=raw.polarity))


def scored(root, path) -> pd.DataFrame:
    "The same headlines with scores of another model, in their order or by their times"
    texts, scores = headlines(root), pd.read_parquet(path)
    when = pd.to_datetime(scores.time, utc=True).dt.as_unit('us')
    if len(scores) == len(texts) and (when.to_numpy() == texts.time.to_numpy()).all():
        return texts.assign(score=scores.score.to_numpy())
    known = texts.groupby('time').known.max().reindex(when).to_numpy()
    if pd.isna(known).any(): raise SystemExit(f'{pd.isna(known).sum()} of {len(scores)} scores are of no headline')
    coins = scores.symbol.to_numpy() if 'symbol' in scores else ''
    return pd.DataFrame(dict(time=when, known=known, symbol=coins, score=scores.score))


def prophetic(panel, correlation) -> pd.DataFrame:
    "Texts that know a little of the next 24 hours"
    ahead = np.nan_to_num(make_targets(panel, (AHEAD,))['scaled'][..., 0])       # about standard normal
    g = np.random.default_rng(0)
    tone = correlation * ahead + np.sqrt(1 - correlation ** 2) * g.standard_normal(ahead.shape)
    close = panel.time + panel.timeframe - pd.Timedelta(DELAY)
    frames = [pd.DataFrame(dict(time=close, symbol=coin, score=np.tanh(x))) for coin, x in zip(panel.symbols, tone)]
    return pd.concat(frames)[lambda texts: texts.time >= '2021-10-12']


def moved(texts) -> pd.DataFrame:
    "Texts half a span away, those of the end at the beginning"
    first, span = texts.time.min(), texts.time.max() - texts.time.min()
    when = first + (texts.time - first + span / 2).map(lambda x: x % span)
    wait = texts.known - texts.time if 'known' in texts else pd.Timedelta(DELAY)
    return texts.assign(time=when, known=when + wait)


class Decisions:
    "Inputs, labels and times of every second hour"
    def __init__(self, panel, texts):
        plain = AdvancedFeatureEngineer(['technical', 'crossexchange', 'crosssection'])
        news = AdvancedFeatureEngineer(['sentiment'])
        x = plain.transform_panel(panel)[..., np.flatnonzero(plain.model_ready)]
        found = {name: news.transform_panel(panel, sentiment=sentiment_frame(frame))
                 for name, frame in dict(news=texts, moved=moved(texts)).items()}
        begun = panel.time >= panel.time[0] + pd.Timedelta('40D')                # features have settled
        at = np.flatnonzero(begun & (panel.time.hour % 2 == 0))
        self.spoken = np.isfinite(found['news'][0, at, 0])
        targets = make_targets(panel, (AHEAD,))
        self.symbols, self.close = panel.symbols, panel.time[at] + panel.timeframe
        self.t1 = self.close + (AHEAD + 1) * panel.timeframe
        self.y = {k: targets[k][:, at, 0] for k in TASKS}                        # [N, S]
        base = x[:, at]
        base = base[..., np.isfinite(base).mean((0, 1)) > .5]                    # not what needs more coins
        self.x = {'without': base} | {k: np.concatenate([base, v[:, at]], -1) for k, v in found.items()}

    def rows(self, which, target, inputs):
        "Inputs [n, F] and labels [n] of some times, one coin after the other"
        return self.x[inputs][:, which].reshape(-1, self.x[inputs].shape[-1]), self.y[target][:, which].ravel()


def linear(task, train, valid):
    "A line whose ridge validation chose, fitted to both; a function of inputs"
    scale = Scale.of(train[0])
    ridge = best_ridge(task, RIDGES, scale(train[0]), train[1], scale(valid[0]), valid[1])
    x, y = (np.concatenate(pair) for pair in zip(train, valid))
    scale = Scale.of(x)
    w = line(task, scale(x), y, ridge)
    return lambda x: task.forecast(along(scale(x), w))


def trees(task, train, valid):
    "Boosted trees on a line, stopped by validation, grown again on both"
    found = Boosted.fit(task, train[0], train[1][:, None], valid[0], valid[1][:, None])
    x, y = (np.concatenate(pair) for pair in zip(train, valid))
    model = found.refit(x, y[:, None])
    return lambda x: model.predict(x)[:, 0]


def loss_of(target, y, said):
    "Loss of each sample"
    if target == 'direction': return nll(y.astype(int), said)
    return qlike_of_logs(y, said) if target == 'volatility' else (y - said) ** 2


def forecasts(d, folds, target, fit, inputs):
    "Forecasts of all folds, as [coins, decisions, ...]"
    said = []
    for fold in folds:
        train, valid, test = (d.rows(part, target, inputs) for part in (fold.train, fold.valid, fold.test))
        said.append(fit(TASKS[target], train, valid)(test[0]).reshape(len(d.symbols), len(fold.test), -1))
    return np.concatenate(said, 1)


def gains(d, folds, target, fit):
    "Gain of each group of inputs over none, of all coins and of the first"
    test = np.concatenate([fold.test for fold in folds])
    y, day = d.y[target][:, test], np.tile(day_blocks(d.close[test]), (len(d.symbols), 1))
    said = {k: forecasts(d, folds, target, fit, k) for k in d.x}
    out = []
    for name, coins in (('all', slice(None)), (d.symbols[0], slice(1))):
        there = TASKS[target].known(y[coins])
        loss = {k: loss_of(target, y[coins][there], s[coins][there].squeeze()) for k, s in said.items()}
        base = loss['without'].mean()
        for k in ('news', 'moved'):
            found = interval_mean(100 * (loss['without'] - loss[k]) / base, day[coins][there], overlap=AHEAD / 24)
            out.append(dict(coins=name, inputs=k, loss=base, gain=found.value, lo=found.lo, hi=found.hi, n=there.sum()))
    return out


def main(what):
    torch.set_num_threads(1)
    begun = time.process_time()
    root = Path(os.environ['CRYPTOML_DATA'])
    panel, _ = read_panel(root/'spot_1h.parquet', COINS, start='2020-04-01', end='2022-06-01')
    if what == 'polarity': texts = headlines(root)
    elif what.endswith('.parquet'): texts = scored(root, what)
    else: texts = prophetic(panel, float(what))
    d = Decisions(panel, texts)
    last = d.close[-1]
    folds = [cut(d.close, d.t1, last - k * MONTH, MONTH, CHOSEN, pd.Timedelta('24h')) for k in range(FOLDS, 0, -1)]
    print(f'{len(texts):,} texts, {len(d.close):,} decisions of {len(d.symbols)} coins from {d.close[0]:%Y-%m-%d} to '
          f'{last:%Y-%m-%d}, with news from {d.close[d.spoken.argmax()]:%Y-%m-%d} on, {len(folds)} folds from '
          f'{d.close[folds[0].test[0]]:%Y-%m-%d} on, news in {d.spoken[folds[0].test[0]:].mean():.0%} of them; inputs: '
          + ', '.join(f'{k} {x.shape[-1]}' for k, x in d.x.items()), flush=True)
    for target in TASKS:
        for fit in (linear, trees):
            table = pd.DataFrame(gains(d, folds, target, fit)).assign(target=target, model=fit.__name__)
            print(table.round(dict(loss=4, gain=2, lo=2, hi=2)).to_string(header=target == 'direction'), flush=True)
    print(f'{time.process_time() - begun:.0f} CPU s')


if __name__ == '__main__':
    if len(sys.argv) != 2 or 'CRYPTOML_DATA' not in os.environ: print(__doc__)
    else: main(sys.argv[1])
