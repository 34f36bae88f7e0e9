"The audit finds planted leaks in every shape of bars, tells how far they look, and cries no wolf"
import os, time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from cryptoml.audit import CANARIES, AuditError, Subject, audit, audit_positions, audit_source, other_future, other_source, with_canaries
from cryptoml.data import DataError, as_of, clean, market_frame, to_panel
from cryptoml.engine import step
from cryptoml.features import AdvancedFeatureEngineer
from cryptoml.simulate import simulate

needs_data = pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')
market = simulate(n_symbols=3, n_bars=1200, seed=5)
bars = market.bars
one = bars[bars.symbol == 'BTC/USDT'].reset_index(drop=True)


def by(bars): return bars.groupby('symbol').close


def verdict(a, check, feature=None):
    rows = a.table[a.table.check == check]
    return (rows if feature is None else rows[rows.feature == feature]).verdict.tolist()


# --- how far it looks

@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 40), st.integers(0, 5), st.booleans())
def test_reach_of_a_shift_is_exact(k, seed, coins):
    f = (lambda b: by(b).shift(-k)) if coins else (lambda b: b.close.shift(-k))
    a = audit(f, bars if coins else one, seed=seed)
    assert a.failed().ahead.tolist() == [k] and str(k if k > 1 else 'next') in a.failed().words[0]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 20), st.integers(0, 5))
def test_reach_of_a_centred_window_is_exact(k, seed):
    assert audit(lambda b: b.close.rolling(2 * k + 1, center=True).mean(), one, seed=seed).failed().ahead.tolist() == [k]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(2, 60), st.integers(0, 9))
def test_honest_windows_pass_and_are_measured(p, seed):
    def f(b): return pd.DataFrame({'z': by(b).transform(lambda x: (x - x.rolling(p).mean()) / x.rolling(p).std()), 'max': by(b).transform(lambda x: x / x.rolling(p).max()),
                                   'ewm': by(b).transform(lambda x: x.ewm(span=p).mean()), 'rank': by(b).pct_change(p).groupby(b.time).rank(), 'lag': by(b).shift(p)})
    a = audit(f, bars, seed=seed)
    assert a.ok, str(a)
    assert a.warm_up['z'] == p and a.warm_up['max'] <= p and a.warm_up['lag'] == p + 1 and p / 2 <= a.warm_up['ewm'] <= 5 * p + 5


# --- the planted leaks, in other words than the notebook's

def regime(b):
    "Two-sided: the mean of a smoother run forwards and one run backwards"
    r = np.log(b.close).diff().abs().fillna(0)
    return (r.ewm(span=48).mean() + r[::-1].ewm(span=48).mean()[::-1]) / 2


LEAKS = {
    'resample': lambda b: b.set_index('time').close.resample('4h').last().reindex(b.time, method='ffill').to_numpy(),
    'daily merge': lambda b: b.assign(day=b.time.dt.floor('D')).merge(b.set_index('time').close.resample('1D').last().rename('d'), left_on='day', right_index=True, how='left').d.to_numpy(),
    'numpy off by one': lambda b: np.r_[np.diff(b.close), 0],
    'interpolated': lambda b: b.close.where(np.arange(len(b)) % 6 == 0).interpolate(),
    'back-fill of a start': lambda b: b.close.rolling(10).mean().bfill(),
    'filled with the mean': lambda b: b.close.diff(5).fillna(b.close.diff(5).mean()),
    'smoother': regime,
    'standardised': lambda b: (b.close - b.close.mean()) / b.close.std(),
    'quantile': lambda b: pd.qcut(b.volume, 10, labels=False),
    'fitted line': lambda b: b.close - np.polyval(np.polyfit(np.arange(len(b)), b.close, 1), np.arange(len(b))),
    'Fourier': lambda b: np.fft.irfft(np.where(np.arange(len(b) // 2 + 1) < 20, np.fft.rfft(b.close), 0), len(b)),
    'train part': lambda b: b.close / b.close[:int(.7 * len(b))].mean(),
    'window with its forecast part': lambda b: (b.close - b.close.rolling(24).min().shift(-6)) / b.close,
    'left length': lambda b: (np.arange(len(b)) - len(b)) * b.close,
    'time to go': lambda b: (b.time.max() - b.time).dt.total_seconds(),
}


@pytest.mark.parametrize('name', LEAKS)
def test_planted_leaks_are_found(name):
    for seed in range(3): assert not (a := audit(LEAKS[name], one, seed=seed)).ok and {'truncation', 'perturbation'} & set(a.failed().fails[0].split(', ')), (name, seed, str(a))


COINS = {
    'rolling over the frame': lambda b: b.close.rolling(10).mean(),
    'diff over the frame': lambda b: b.close.diff(),
    'scaled over coins': lambda b: b.close / b.close.max(),
    'graph': lambda b: b.symbol.map(b.assign(r=by(b).pct_change()).pivot(index='time', columns='symbol', values='r').corr().sum()),
    'lag of the sorted frame': lambda b: b.sort_values(['symbol', 'time']).close.shift(2).reindex(b.index),
}


@pytest.mark.parametrize('name', COINS)
@pytest.mark.parametrize('order', [['symbol', 'time'], ['time', 'symbol']])
def test_leaks_between_coins_are_found(name, order):
    a = audit(COINS[name], bars.sort_values(order, ignore_index=True))
    assert not a.ok and 'coins' in a.failed().words[0], str(a)


def test_a_mix_of_coins_is_no_future_but_fails():
    a = audit(lambda b: b.close.shift(1), bars.sort_values(['time', 'symbol'], ignore_index=True))
    assert a.failed().fails.tolist() == ['order']


# --- sources

def test_news_by_event_and_revised_values():
    rng = np.random.default_rng(0)
    news = pd.DataFrame(dict(time=one.time[rng.integers(0, len(one), 80)].to_numpy(), tone=rng.normal(size=80))).sort_values('time', ignore_index=True)
    news['known'] = news.time + pd.to_timedelta(rng.integers(1, 5, 80), 'h')
    event = lambda b, source: pd.merge_asof(b[['time']], source[['time', 'tone']], on='time').tone
    read = lambda b, source: as_of(pd.DatetimeIndex(b.time + pd.Timedelta('1h')), source).tone.to_numpy()
    assert 'before it was known' in audit_source(event, one, news).failed().words[0] and audit_source(read, one, news).ok
    first = pd.DataFrame(dict(time=pd.date_range(one.time.iloc[0].floor('D'), periods=45, freq='D', unit='us'), x=np.arange(45.)))
    day = pd.concat([first.assign(known=first.time + pd.Timedelta('26h')), first.assign(known=first.time + pd.Timedelta('80h'), x=first.x + 100)], ignore_index=True)
    final = lambda b, source: pd.merge_asof(b[['time']], source.sort_values('known').drop_duplicates('time', keep='last').sort_values('time')[['time', 'x']].assign(time=lambda s: s.time + pd.Timedelta('26h')), on='time').x
    assert 'known: source' in audit_source(final, one, day).failed().fails[0]                   # the value as revised, at the first publication
    assert audit_source(lambda b, source: as_of(pd.DatetimeIndex(b.time + pd.Timedelta('1h')), source).x.to_numpy(), one, day).ok


def test_sources_need_known_and_are_changed_within_their_series():
    with pytest.raises(DataError, match='a column known'): audit_source(lambda b, s: b.close, one, market.onchain.drop(columns='known'))
    s, rng = Subject(None, bars, onchain=market.onchain), np.random.default_rng(0)
    old, new = s.sources['onchain'], other_source(s, 'onchain', 600, 'scramble', rng)['onchain']
    late = s.known['onchain'] > s.close[600]
    assert new[~late].equals(old[~late]) and (new.AdrActCnt[late] != old.AdrActCnt[late]).mean() > .9
    assert all(sorted(new.AdrActCnt[new.asset == a]) == sorted(old.AdrActCnt[old.asset == a]) for a in old.asset.unique())
    assert len(other_source(s, 'onchain', 600, 'drop', rng)['onchain']) == (~late).sum()


def test_an_engineer_that_joins_on_time_is_caught():
    class Hasty(AdvancedFeatureEngineer):
        def transform(self, bars, timeframe=None, **sources): return super().transform(bars, timeframe, **{k: v.assign(known=v['time'] + pd.Timedelta(1, 'D')) for k, v in sources.items()})
    long = simulate(n_symbols=2, n_bars=2700, seed=5)
    a = audit(Hasty(['onchain']), long.bars, onchain=long.onchain)
    assert not a.ok and a.table[(a.table.check == 'known: onchain') & (a.table.verdict == 'FAIL')].ahead.max() == 12, str(a)         # published 36 hours after midnight, used after 24
    assert audit(AdvancedFeatureEngineer(['onchain']), long.bars, onchain=long.onchain).ok


# --- engineers

@pytest.mark.parametrize('seed', [0, 1])
def test_technical_features_pass(seed):
    m = simulate(n_symbols=2, n_bars=2500, seed=seed)
    a = audit(AdvancedFeatureEngineer(['technical']), m.bars.drop([*range(700, 705), *range(900, 950), 3000]).reset_index(drop=True), seed=seed)
    assert a.ok, str(a)
    assert a.warm_up.notna().mean() > .9


@needs_data
def test_technical_features_pass_on_real_bars():
    real = clean(market_frame(Path(os.environ['CRYPTOML_DATA']) / 'spot_1h.parquet', symbols=['ETH/USDT', 'DOGE/USDT', 'XRP/USDT'], start='2020-01-01', end='2020-06-01'))[0]
    a = audit('technical', real)
    assert a.ok and len(a.table.feature.unique()) > 100, str(a)


def test_a_stream_that_differs_is_found():
    class Rounded(AdvancedFeatureEngineer):
        def panel_stream(self, symbols, timeframe='1h'):
            stream = super().panel_stream(symbols, timeframe)
            update, stream_update = stream.update, lambda bars, **k: update(bars, **k).round(6)
            stream.update = stream_update
            return stream
    assert 'FAIL' in verdict(audit(Rounded(['technical']), bars), 'stream')


def test_a_warm_up_that_is_declared_too_short_is_found():
    @step('hasty_{p}', windows=(20,), state=1, first=1, settle=30)
    def hasty(close, W, s, n, y):
        s[0] = close if n == 1 else s[0] + (close - s[0]) / 20
        y[0] = s[0] / close
    a = audit(hasty, bars)
    assert a.failed().fails.tolist() == ['warm-up'] and 'declares 30 bars' in a.failed().words[0]


# --- the shapes people have

def sma(b): return b['close'].rolling(12).mean()
def ahead(b): return b['close'].shift(-2)


@pytest.mark.parametrize('shape', [
    lambda b: b.drop(columns='symbol').set_index('time'), lambda b: b.drop(columns='symbol').rename(columns=dict(time='date')),
    lambda b: b.assign(time=b.time.astype('int64') // 10**3), lambda b: b.assign(time=b.time.dt.tz_localize(None)), lambda b: b.set_index(['symbol', 'time'])],
    ids=['index', 'date', 'milliseconds', 'naive', 'two levels'])
def test_bars_in_the_users_shape(shape):
    mine = shape(one)
    assert audit(sma, mine).ok and audit(sma, mine).warm_up.iloc[0] == 12
    assert audit(ahead, mine).failed().ahead.tolist() == [2]


def test_answers_in_any_shape():
    assert audit(lambda b: sma(b).to_numpy(), one).ok and audit(lambda b: sma(b).to_frame().to_numpy(), one).ok
    assert audit(lambda b: by(b).rolling(5).mean(), bars).ok                                     # index (symbol, row)
    assert audit(lambda b: sma(b).sample(frac=1, random_state=0), one).ok                        # matched by index
    assert audit(lambda b: pd.DataFrame({'up': b.close > b.open, 'n': b.trades.astype(int)}), one).ok
    assert audit(sma, to_panel(one)).ok
    words = audit(lambda b: sma(b).dropna(), one).table.words
    assert 'return one row a bar' in words[0]
    assert 'could not convert' in audit(lambda b: b.symbol, one).table.words[0]


def test_a_function_may_write_into_its_bars():
    def careless(b):
        b['close'] = np.log(b['close'])
        b.drop(columns='volume', inplace=True)
        return b[['close']]
    before = one.copy()
    assert audit(careless, one).ok and one.equals(before)


def test_failures_are_reported():
    a = audit(lambda b: sma(b) if b.close.iloc[-1] == one.close.iloc[-1] else b.nothing, one)
    assert not a.ok and 'runs' in a.table.check.tolist() and 'AttributeError' in a.table.words.iloc[-1]
    with pytest.raises(AuditError, match='AttributeError'): a.raise_if_failed()
    with pytest.raises(DataError, match='too few'): audit(sma, one[:60])


def test_memory_between_calls_is_found():
    seen = []
    def remembers(b):
        seen.append(len(b))
        return b.close * len(seen)
    assert 'repeat' in audit(remembers, one).failed().fails[0]


def test_a_table_from_elsewhere_is_noted():
    table = one.set_index('time').close.shift(-3)
    a = audit(lambda b: table.reindex(b.time).to_numpy(), one)
    assert verdict(a, 'dates') == ['NOTE'] and 'looked up' in str(a)
    assert verdict(audit(sma, one), 'dates') == ['PASS']


def test_empty_features_are_noted_not_passed():
    a = audit(lambda b: b.close * np.nan, one)
    assert a.table.verdict.tolist() == ['NOTE'] and 'nothing could be tried' in str(a)


def test_seeds_and_limits():
    strip = lambda a: a.table.drop(columns=[])
    pd.testing.assert_frame_equal(strip(audit(ahead, one, seed=3)), strip(audit(ahead, one, seed=3)))
    assert audit(sma, one, n_bars=300).over.startswith('1 coin, 300 bars') and 30 < audit(sma, one).calls < 90
    began = time.process_time()
    audit(sma, one)
    assert time.process_time() - began < 5


def test_the_report_is_short():
    many = lambda b: pd.concat([sma(b).rename(f'honest_{k}') for k in range(50)] + [ahead(b).rename('bad')], axis=1)
    a = audit(many, one)
    assert len(str(a).splitlines()) < 8 and 'honest_7' not in str(a) and 'bad: needs the next 2 bars' in str(a)
    assert '<table' in a._repr_html_() and '<table' not in audit(sma, one)._repr_html_()
    assert set(a.table) == {'feature', 'check', 'verdict', 'difference', 'ahead', 'example', 'words'}


# --- other futures

@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 1100), st.sampled_from(['scale', 'reverse', 'scramble']), st.integers(0, 9))
def test_other_futures_are_sound_and_leave_the_past(cut, kind, seed):
    s = Subject(None, bars)
    other = other_future(s, cut, kind, np.random.default_rng(seed))
    past = s.t <= cut
    assert (other[past].to_numpy() == bars[past].to_numpy()).all() and (other.time == bars.time).all()
    assert (other.close[~past] != bars.close[~past]).mean() > .95
    assert (other.high >= other[['open', 'close']].max(axis=1)).all() and (other.low <= other[['open', 'close']].min(axis=1)).all() and (other.low > 0).all()


# --- positions and canaries

def crossing(b): return (by(b).transform(lambda x: x.rolling(6).mean()) > by(b).transform(lambda x: x.rolling(30).mean())).astype(float) / 3


def ret(b, f): return sum(f(g).reindex(b.index, fill_value=0) for _, g in b.assign(w=crossing(b)).groupby('symbol'))


FILLS = {
    'next open': (lambda g: g.w.shift(1) * (g.open.shift(-1) / g.open - 1), True),
    'next open, labelled by its end': (lambda g: g.w.shift(2) * g.open.pct_change(), True),
    'next open with costs': (lambda g: g.w.shift(1) * (g.open.shift(-1) / g.open - 1) - .0007 * g.w.diff().abs(), True),
    'same close': (lambda g: g.w.shift(1) * g.close.pct_change(), False),
    'same bar': (lambda g: g.w * g.close.pct_change(), False),
    'same bar from its open': (lambda g: g.w * (g.close / g.open - 1), False),
}


@pytest.mark.parametrize('name', FILLS)
def test_fills(name):
    f, honest = FILLS[name]
    for seed in range(3):
        a = audit_positions(crossing, bars, lambda b: ret(b, f), seed=seed)
        assert a.ok == honest, (name, seed, str(a))


def test_positions():
    assert audit_positions(crossing, bars).ok
    a = audit_positions(lambda b: (by(b).shift(-1) > b.close).astype(float), bars)
    assert not a.ok and a.failed().ahead.tolist() == [1]
    a = audit_positions(lambda b: b.close * 0, bars, lambda b: b.close * 0)
    assert verdict(a, 'fills') == ['NOTE']
    a = audit_positions(crossing, bars, lambda b: b.close[:7])
    assert verdict(a, 'fills') == ['FAIL'] and 'give one for each' in str(a)


def test_canaries_alone_fail():
    a = audit(with_canaries(lambda b: by(b).pct_change().rename('r')), bars)
    assert set(a.failed().feature) == set(CANARIES) and verdict(a, 'truncation', 'r') == ['PASS']
    assert set(audit(with_canaries(sma), one.drop(columns='symbol')).failed().feature) == set(CANARIES)
