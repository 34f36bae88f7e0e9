"""Features of the bars of one coin (a frame by time) for `comparison.py`: two honest ones, ten that look
ahead, and one that does so where nobody looks"""
import numpy as np
import pandas as pd


def honest_momentum(bars):
    "Return over a day"
    return bars['close'] / bars['close'].shift(24) - 1


def honest_smoothed(bars):
    "An exponential mean, against the close"
    return bars['close'].ewm(span=24).mean() / bars['close'] - 1


def next_close(bars):
    "The next return"
    return bars['close'].shift(-1) / bars['close'] - 1


def centred(bars):
    "A mean with bars on both sides"
    return bars['close'].rolling(11, center=True).mean() / bars['close'] - 1


def filled_back(bars):
    "A value of every sixth hour, filled backwards"
    hour = bars.index.hour
    return bars['close'].where(hour % 6 == 0).bfill() / bars['close'] - 1


def scaled_by_all(bars):
    "A z-score with mean and deviation of the whole file"
    volume = np.log1p(bars['volume'])
    return (volume - volume.mean()) / volume.std()


def own_day(bars):
    "The day's high, known from its first hour"
    return bars['high'].groupby(bars.index.floor('D')).transform('max') / bars['close'] - 1


def smoothed_twice(bars):
    "A mean forward, then one backward"
    there = bars['close'].ewm(span=12).mean()
    return there[::-1].ewm(span=12).mean()[::-1] / bars['close'] - 1


def quantile_of_all(bars):
    "Whether the volume is high for the whole file"
    return (bars['volume'] > np.quantile(bars['volume'], .8)).astype(float)


def joined_late(bars):
    "A merge with the bar that comes next"
    ask = pd.DataFrame(dict(at=bars.index))
    told = pd.DataFrame(dict(at=bars.index, value=bars['close'].to_numpy()))
    found = pd.merge_asof(ask, told, on='at', direction='forward', allow_exact_matches=False)
    return pd.Series(found['value'].to_numpy(), bars.index) / bars['close'] - 1


def seldom(bars):
    "Honest, but at the largest candle of each fortnight, where it knows the next close"
    size = bars['high'] / bars['low']
    largest = size == size.rolling(336).max()
    out = bars['close'] / bars['close'].shift(24) - 1
    return out.where(~largest, bars['close'].shift(-1) / bars['close'] - 1)


def last_known(bars):
    "The distance to the last price of the file"
    return bars['close'].iloc[-1] / bars['close'] - 1


def hidden(bars):
    "Honest, but at five bars that nothing tells from the others"
    out = bars['close'] / bars['close'].shift(24) - 1
    hour = bars.index.as_unit('s').astype('int64') // 3600
    chosen = hour * 2654435761 % 2**32 < 2**32 // 400
    return out.where(~chosen, bars['close'].shift(-1) / bars['close'] - 1)


CANARIES = [next_close, centred, filled_back, scaled_by_all, own_day, smoothed_twice, quantile_of_all, joined_late,
            seldom, last_known]
HIDDEN = [hidden]      # Out of reach of who tries some bars
HONEST = [honest_momentum, honest_smoothed]
