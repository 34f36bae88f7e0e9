"""Three coins over the last year: the model left alone, the recipe fitted again and again, adapting behind the guard:
`CRYPTOML_DATA=folder python bench/adapt.py all [BTC/USDT,ETH/USDT,SOL/USDT [losses.parquet]]` (real bars of spot_1h,
half an hour)

The recipe is found on bars up to 2023-07. From there on every forecast is made by a model of bars before it, and scored
when its labels are known. Left alone: the first model all year. Refit: networks once a month, regressions and trees
every week, on everything that is known. Guarded: once a month candidates are judged on forty days and one of them, or
none, goes live. Losses are those of 620_adapt, in units of the model left alone; a fold is a quarter of the year."""
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cryptoml.adapt import LIVE, WAYS, Material, Task, adapt, of_members, relative_losses, spans_of
from cryptoml.combined import decisions, find, refit
from cryptoml.data import read_panel, to_utc
from cryptoml.forecaster import ForecasterConfig, make_inputs, split
from cryptoml.metrics import day_blocks, interval_mean
from cryptoml.terms import Terms
from cryptoml.nested import cut_off
from cryptoml.targets import make_targets

COINS = 'BTC/USDT', 'ETH/USDT', 'SOL/USDT'
FIRST, BEGIN, END = to_utc(['2021-01-01', '2023-07-01', '2024-07-01'])
PLACES = [0, 1, 2]       # 4, 12 and 24 hours


class Past:
    "What is known at a moment: all inputs are causal, and are cut; labels are made of the bars before it"
    def __init__(self, panel, inputs):
        self.panel, self.inputs = panel, inputs

    def at(self, when):
        stop = int((self.panel.time + self.panel.timeframe <= when).sum())
        panel = cut_off(self.panel, stop)
        return replace(self.inputs, panel=panel, x=self.inputs.x[:, :stop]), make_targets(panel)


def known(inputs, targets): return targets.known <= inputs.panel.time[-1] + inputs.panel.timeframe


def first_model(past, config, out):
    "The recipe as it was found, and fitted to everything before the year"
    inputs, targets = past.at(BEGIN)
    parts = split(inputs.panel, targets)
    found = find(inputs, targets, parts, config, out/'found', 'cpu')
    everything = np.ones(len(inputs.panel.time), bool)
    live = refit(found, inputs, targets, everything, parts['test'], out/'live', 'cpu')
    terms = Terms(inputs.panel.symbols, '60m', BEGIN.isoformat(), '', config.round_trip, None, {}, {}, 'FAIL', {}, {},
                  rates=[list(r) for r in found.rates])
    return found, live, terms


class Refit:
    "Networks once a month, the rest every week"
    def __init__(self, past, found, live, out):
        self.past, self.found, self.live, self.out, self.seconds = past, found, live, out, 0.

    def step(self, when, monthly):
        begun = time.process_time()
        inputs, targets = self.past.at(when)
        rows = known(inputs, targets)
        newest = rows & (np.cumsum(rows[::-1])[::-1] <= 24 * 40)
        if monthly:
            self.live = refit(self.found, inputs, targets, rows, newest, self.out/f'{when:%Y%m%d}', 'cpu')
        else:
            nothing = np.zeros(len(rows), bool)
            m = Material(self.live.pick(inputs), targets, rows, nothing, newest, PLACES)
            self.live = of_members(Task(self.live, m, rows, nothing, [], self.out))
        self.seconds += time.process_time() - begun


class Guarded:
    "Once a month"
    def __init__(self, past, live, terms, out, ways, **options):
        self.past, self.live, self.terms, self.out, self.seconds = past, live, terms, out, 0.
        self.ways, self.options, self.accepted = ways, options, []

    def step(self, when):
        begun = time.process_time()
        inputs, targets = self.past.at(when)
        try: spans = spans_of(inputs.panel, targets, self.terms.trained_until)
        except ValueError as e:
            print(f'  {when:%Y-%m-%d}', e, flush=True)
            return
        m = Material(self.live.pick(inputs), targets, **spans)
        found = adapt(self.live, self.terms, m, self.out/f'{when:%Y%m%d}', self.ways, **self.options)
        self.live, self.terms = found.model, found.terms
        self.accepted.append((when, found.accepted))
        self.seconds += time.process_time() - begun
        print(f'  {when:%Y-%m-%d}', found.reason, flush=True)


def prequential(panel, config, out):
    "Losses of each model on every decision of the year, their days, coins, and CPU seconds"
    inputs = make_inputs(panel)
    past, whole = Past(panel, inputs), make_targets(panel)
    found, first, terms = first_model(past, config, out)
    again = Refit(past, found, first, out/'refit')
    guards = {
        'guarded': Guarded(past, first, terms, out/'guarded', WAYS),
        'guarded, plain ways when ahead': Guarded(
            past, first, terms, out/'ahead', {k: w for k, w in WAYS.items() if w.plain}, alpha=.5),
    }
    weeks = pd.date_range(BEGIN, END, freq='7D')
    month, parts = BEGIN.month, []
    for when, until in zip(weeks, [*weeks[1:], END]):
        monthly = when.month != month
        month = when.month
        if when > BEGIN: again.step(when, monthly)
        if monthly:
            for name, g in guards.items():
                print(name, flush=True)
                g.step(when)
        models = {LIVE: first, 'refit': again.live} | {k: g.live for k, g in guards.items()}
        close = panel.time + panel.timeframe
        m = Material(first.pick(inputs), whole, *[np.zeros(len(close), bool)] * 3, PLACES)
        sample = decisions(first.first, m.inputs, (close > when) & (close <= until))
        lost = relative_losses(models, m, sample, PLACES)
        parts.append(pd.DataFrame(lost | dict(day=day_blocks(close)[sample.bar], coin=sample.coin)))
        print(f'{when:%Y-%m-%d}', {k: round(float(v), 4) for k, v in parts[-1].mean().items()}, flush=True)
    return pd.concat(parts), dict(refit=again.seconds) | {k: g.seconds for k, g in guards.items()}, guards


def table(losses, symbols, seconds):
    "Gain over the model left alone, %, with its interval: the year, each quarter, each coin"
    losses = losses.dropna()
    quarter = pd.to_datetime(losses.day, unit='D').dt.to_period('Q').astype(str).to_numpy()
    coin = np.array(symbols)[losses.coin]
    groups = [('year', np.ones(len(losses), bool))]
    groups += [(q, quarter == q) for q in sorted(set(quarter))] + [(c, coin == c) for c in symbols]
    rows = {}
    for name in losses.columns.drop([LIVE, 'day', 'coin']):
        row = {}
        for label, there in groups:
            d = losses[there]
            gain = interval_mean((d[LIVE] - d[name]).to_numpy(), d.day.to_numpy(), overlap=1)
            row[label] = f'{100 * gain[0]:+.2f} ({100 * gain[1]:+.2f} to {100 * gain[2]:+.2f})'
        rows[name] = row | {'CPU s': round(seconds[name])}
    return pd.DataFrame(rows)


def main(coins):
    torch.set_num_threads(1)
    panel, _ = read_panel(Path(os.environ['CRYPTOML_DATA'])/'spot_1h.parquet', coins, start=FIRST, end=END)
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as out:
        os.environ['CRYPTOML_LEDGER'] = str(Path(out)/'ledger.jsonl')      # a bench is no trial of the user's
        losses, seconds, guards = prequential(panel, ForecasterConfig(), Path(out))
    if len(sys.argv) > 3: losses.to_parquet(sys.argv[3])
    print(table(losses, panel.symbols, seconds).to_string())
    for name, g in guards.items(): print(name, [(f'{w:%Y-%m-%d}', a) for w, a in g.accepted])
    print(f'{len(losses):,} decisions; {time.process_time() - begun:.0f} CPU s')


if __name__ == '__main__':
    if sys.argv[1:2] == ['all'] and 'CRYPTOML_DATA' in os.environ:
        main(sys.argv[2].split(',') if len(sys.argv) > 2 else list(COINS))
    else: print(__doc__)
