"""Coins left out of training, each entering at a date, with ten windows to adapt on:
`CRYPTOML_DATA=folder python bench/newcoins.py all` (three CPU minutes; real bars of spot_1h)

`450_newcoins` says what is compared, and how. Here: every coin is left out once, in one of three folds drawn by a seed.
Training sees the other coins until 2022-06; what is chosen (steps, rates, epochs) is chosen on them in the half-year
after it. From 2023 on a coin that was left out enters once a month, with ten decisions a day apart whose labels are
known then; forecast is every fourth hour of its first two weeks."""
import os
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

from cryptoml.data import read_panel
from cryptoml.newcoins import Coins, Plan, compare

TRAINED, CHOSEN, LAST = map(pd.Timestamp, ('2022-07-01', '2023-01-01', '2024-05-01'))


def main():
    torch.set_num_threads(1)
    start = time.process_time()
    panel, _ = read_panel(Path(os.environ['CRYPTOML_DATA'])/'spot_1h.parquet', start='2020-11-01', end=LAST)
    coins = Coins.of(panel, Plan(TRAINED, CHOSEN, LAST))
    print(f'{len(coins.symbols)} coins, {len(coins.time):,} decisions, {len(coins.columns)} inputs; '
          f'{time.process_time() - start:.0f} CPU s', flush=True)
    with tempfile.TemporaryDirectory() as folder: found = compare(coins, 3, folder)
    table = found.table()
    print(f'{found.day.size:,} decisions;', found.reason)
    digits = dict(loss=4, change=2, lo=2, hi=2, volatility=4, ms=1) | {'return': 4}
    print(table.round(digits).to_string())
    print(f'{time.process_time() - start:.0f} CPU s')


if __name__ == '__main__':
    if sys.argv[1:] == ['all'] and 'CRYPTOML_DATA' in os.environ: main()
    else: print(__doc__)
