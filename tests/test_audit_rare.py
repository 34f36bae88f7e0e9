"A leak that shows at few bars is met in every audit, whatever makes these bars odd; honest features pass beside it"
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cryptoml.audit import audit
from cryptoml.data import clean, market_frame
from cryptoml.probes import odd_bars, odd_rows
from cryptoml.simulate import simulate
from cryptoml.subject import Timeline

SEEDS = range(8)
market = simulate(n_symbols=3, n_bars=2000, seed=11)
one = market.bars[market.bars.symbol == 'BTC/USDT'].reset_index(drop=True)
needs_data = pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')


def some(share, seed=0):
    "Some bars, none of the first hundred"
    n = len(one)
    return np.random.default_rng(seed).choice(np.arange(100, n - 5), max(int(n * share), 1), replace=False)


def without_volume(share=.005):
    b = one.copy()
    b.loc[some(share), 'volume'] = 0
    return b


def with_holes():
    "Three hours are missing here and there"
    rows = np.concatenate([some(.002) + k for k in range(3)])
    return one.drop(index=rows).reset_index(drop=True)


def with_missing_values():
    b = one.copy()
    b.loc[some(.005), 'taker_buy_volume'] = np.nan
    return b


def without_range():
    b = one.copy()
    rows = some(.005)
    for c in ('open', 'high', 'low'): b.loc[rows, c] = b.close[rows]
    return b


def without_a_move():
    b = one.copy()
    for row in np.sort(some(.005)):
        b.loc[row, 'close'] = b.close[row - 1]
        b.loc[row, 'high'] = max(b.high[row], b.close[row], b.open[row])
        b.loc[row, 'low'] = min(b.low[row], b.close[row], b.open[row])
    return b


def with_jumps():
    "Five closes from which the price goes on at another level"
    b = one.copy()
    for k, row in enumerate(np.sort(some(.0025))):
        b.loc[row:, ['open', 'high', 'low', 'close']] *= 1.5 if k % 2 else 1 / 1.5
    return b


def filled(values, hole):
    "Values where there is no hole, and there what comes later"
    return values.where(~hole).bfill()


def next_hour(b): return b.time.diff().shift(-1) > pd.Timedelta('1h')
def move(b): return np.log(b.close).diff().abs()


RARE = {
    'volume 0, next volume': (without_volume, lambda b: filled(b.volume, b.volume == 0)),
    'volume 0, line between prices': (without_volume, lambda b: b.close.where(b.volume > 0).interpolate()),
    'hole, the bar before it': (with_holes, lambda b: b.close.where(~next_hour(b), b.close.shift(-1))),
    'missing value': (with_missing_values, lambda b: b.taker_buy_volume.bfill()),
    'no range': (without_range, lambda b: filled(b.high - b.low, b.high == b.low)),
    'no move': (without_a_move, lambda b: filled(b.close, b.close.diff() == 0)),
    'jump taken out': (with_jumps, lambda b: b.close.where(~(move(b) > .3)).interpolate()),
    'before a jump': (with_jumps, lambda b: b.close.where(~(move(b).shift(-1) > .3))),
}


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('name', RARE)
def test_a_rare_leak_is_met_in_every_audit(name, seed):
    make, leak = RARE[name]
    a = audit(lambda b: leak(b).rename('leak'), make(), timeframe='1h', seed=seed)
    assert a.failed().feature.tolist() == ['leak'], str(a)


@pytest.mark.parametrize('share', [.0005, .02, .1])
def test_any_share_of_such_bars(share):
    name = 'volume 0, line between prices'
    leak = RARE[name][1]
    for seed in SEEDS:
        assert not audit(leak, without_volume(share), seed=seed).ok, seed


def test_a_late_coin_whose_first_bars_are_filled():
    "The second coin is listed after the first; its averages begin with values of later bars"
    late = market.bars[(market.bars.symbol == 'BTC/USDT') | (market.bars.time >= one.time[1200])]
    late = late.reset_index(drop=True)
    def begun(b): return b.groupby('symbol').close.transform(lambda x: x.rolling(10).mean().bfill())
    def kept(b): return b.groupby('symbol').close.transform(lambda x: x.rolling(10).mean())
    for seed in SEEDS:
        assert not audit(lambda b: begun(b).where(b.time >= one.time[100]), late, seed=seed).ok
        assert audit(kept, late, seed=seed).ok


def test_a_source_whose_holes_are_filled():
    "A value a day, of which ten days are missing and drawn as a line"
    days = pd.date_range(one.time[0].floor('D'), one.time.iloc[-1], freq='D')
    x = np.random.default_rng(0).normal(size=len(days))
    value = pd.DataFrame(dict(time=days, known=days + pd.Timedelta('1D'), x=x))
    value = pd.concat([value[:40], value[50:]])
    def line(b, source):
        closes = pd.DatetimeIndex(b.time + pd.Timedelta('1h'))
        x = source.set_index('known').x
        there = x.reindex(x.index.union(closes)).interpolate('time')
        far = x.index.to_series().diff().reindex(x.index, method='bfill') > pd.Timedelta('2D')
        inside = far.reindex(closes, method='bfill').fillna(False).to_numpy(bool)
        held = x.reindex(closes, method='ffill').to_numpy()
        return np.where(inside, there.reindex(closes).to_numpy(), held)
    for seed in SEEDS:
        assert not audit(line, one, source=value, seed=seed).ok, seed


HONEST = {
    'last volume': lambda b: b.volume.where(b.volume > 0).ffill(),
    'last price': lambda b: b.close.where(b.volume > 0).ffill(),
    'mask': lambda b: (b.volume == 0).astype(float),
    'jump before': lambda b: (move(b) > .3).astype(float),
    'hole before': lambda b: (b.time.diff() > pd.Timedelta('1h')).astype(float),
    'mean of the traded': lambda b: b.close.where(b.volume > 0).rolling(24, min_periods=1).mean(),
}


@pytest.mark.parametrize('make', [
    without_volume, with_holes, with_missing_values, without_range, without_a_move, with_jumps, lambda: one.copy()])
def test_no_false_alarm(make):
    def honest(b): return pd.DataFrame({name: f(b) for name, f in HONEST.items()})
    for seed in SEEDS:
        a = audit(honest, make(), timeframe='1h', seed=seed)
        assert a.ok, str(a)


@pytest.mark.parametrize('make', [without_volume, with_holes, without_range, without_a_move, with_jumps])
def test_our_own_features_pass_on_odd_bars(make):
    for seed in (0, 1):
        a = audit('technical', make(), timeframe='1h', seed=seed)
        assert a.ok, str(a)


@needs_data
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_our_own_features_pass_on_real_bars_with_outages(seed):
    path = Path(os.environ['CRYPTOML_DATA']) / 'spot_1h.parquet'
    real = market_frame(path, symbols=['BTC/USDT', 'MATIC/USDT'], start='2019-03-01', end='2019-06-15')
    a = audit('technical', clean(real)[0], seed=seed)
    assert a.ok, str(a)
    assert {'before a hole', 'after a hole', 'at the start of a coin'} <= set(a.examined.index)


# --- what is told

def test_the_share_examined_is_told():
    a = audit(RARE['no range'][1], without_range())
    all_bars, flat = a.examined.loc['all'], a.examined.loc['without a range']
    assert all_bars.bars == len(one)
    assert 20 < all_bars.examined < 60
    assert flat.bars == 10
    assert 2 <= flat.examined < 10
    line, = [line for line in a.lines() if line.startswith('examined')]
    assert f'{all_bars.examined} of 2000 bars ({all_bars.examined / 2000:.1%})' in line
    assert f'{flat.examined} of 10 without a range' in line


def test_a_stream_examines_every_bar_it_is_fed():
    assert audit('technical', one).examined.loc['all', 'examined'] > 1000


def test_kinds_of_bars():
    b = without_volume()
    assert len(odd_rows(Timeline(b))['without volume']) == 10
    b['mine'] = np.nan                                        # a column nobody fills is no hole
    assert 'with a missing value' not in odd_rows(Timeline(b))
    assert len(odd_rows(Timeline(with_missing_values()))['with a missing value']) == 10
    holes = odd_rows(Timeline(with_holes(), '1h'))
    assert len(holes['before a hole']) == len(holes['after a hole'])
    moves = move(with_jumps())
    assert (moves[odd_rows(Timeline(with_jumps()))['with a jump']] > .3).all()


def test_bars_in_any_order_and_shape():
    "Rows sorted by time, and an index of times: the same kinds"
    b = market.bars.copy()
    b.loc[some(.002), 'volume'] = 0
    mixed = b.sort_values(['time', 'symbol'])
    wanted = {kind: len(rows) for kind, rows in odd_rows(Timeline(b)).items()}
    assert {kind: len(rows) for kind, rows in odd_rows(Timeline(mixed.reset_index(drop=True))).items()} == wanted
    single = without_volume().drop(columns='symbol').set_index('time')
    assert len(odd_rows(Timeline(single))['without volume']) == 10


def test_cuts_are_those_of_the_seed():
    line = Timeline(without_volume())
    first, again, other = ([one.cuts.tolist() for one in odd_bars(line, np.random.default_rng(k))] for k in (0, 0, 1))
    assert first == again != other


def test_an_honest_function_that_fails_on_a_few_rows():
    "Nothing is cut off within the first bars, odd or not"
    b = one.copy()
    b.loc[[3, 7, 20], 'volume'] = 0
    def fails(b):
        if len(b) < 200: raise ValueError('too few')
        return b.close.rolling(100).quantile(.9)
    assert audit(fails, b).ok
