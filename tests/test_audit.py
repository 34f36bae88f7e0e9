"The audit finds planted leaks in every shape of bars, tells how far they look, and cries no wolf"
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from cryptoml.audit import CANARIES, AuditError, audit, audit_source, with_canaries
from cryptoml.data import DataError, as_of, clean, market_frame, to_panel
from cryptoml.engine import step
from cryptoml.features import AdvancedFeatureEngineer
from cryptoml.fills import audit_positions
from cryptoml.simulate import simulate
from cryptoml.subject import KINDS, Subject, difference

needs_data = pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')
market = simulate(n_symbols=3, n_bars=1200, seed=5)
bars = market.bars
one = bars[bars.symbol == 'BTC/USDT'].reset_index(drop=True)


def by(bars): return bars.groupby('symbol').close
def closes(bars): return pd.DatetimeIndex(bars.time + pd.Timedelta('1h'))
def folder(): return Path(os.environ['CRYPTOML_DATA'])


def verdict(a, check, feature=None):
    rows = a.table[a.table.check == check]
    return (rows if feature is None else rows[rows.feature == feature]).verdict.tolist()


def examples(n):
    "Settings of a property test, which may be slow"
    return settings(max_examples=n, deadline=None, suppress_health_check=list(HealthCheck))


# --- how far it looks

@examples(25)
@given(st.integers(1, 40), st.integers(0, 5), st.booleans())
def test_reach_of_a_shift_is_exact(k, seed, coins):
    def shifted(b): return by(b).shift(-k) if coins else b.close.shift(-k)

    a = audit(shifted, bars if coins else one, seed=seed)
    assert a.failed().ahead.tolist() == [k]
    assert str(k if k > 1 else 'next') in a.failed().words[0]


@examples(15)
@given(st.integers(1, 20), st.integers(0, 5))
def test_reach_of_a_centred_window_is_exact(k, seed):
    a = audit(lambda b: b.close.rolling(2 * k + 1, center=True).mean(), one, seed=seed)
    assert a.failed().ahead.tolist() == [k]


@examples(15)
@given(st.integers(2, 60), st.integers(0, 9))
def test_honest_windows_pass_and_are_measured(p, seed):
    def f(b):
        return pd.DataFrame(dict(
            z=by(b).transform(lambda x: (x - x.rolling(p).mean()) / x.rolling(p).std()),
            max=by(b).transform(lambda x: x / x.rolling(p).max()),
            ewm=by(b).transform(lambda x: x.ewm(span=p).mean()),
            rank=by(b).pct_change(p).groupby(b.time).rank(),
            lag=by(b).shift(p),
        ))
    a = audit(f, bars, seed=seed)
    assert a.ok, str(a)
    assert a.warm_up['z'] == p
    assert a.warm_up['max'] <= p
    assert a.warm_up['lag'] == p + 1
    assert p / 2 <= a.warm_up['ewm'] <= 5 * p + 5


# --- the planted leaks, in other words than the notebook's

def resample(b):
    return b.set_index('time').close.resample('4h').last().reindex(b.time, method='ffill').to_numpy()


def daily_merge(b):
    days = b.set_index('time').close.resample('1D').last().rename('d')
    return b.assign(day=b.time.dt.floor('D')).merge(days, left_on='day', right_index=True, how='left').d.to_numpy()


def regime(b):
    "Two-sided: the mean of a smoother run forwards and one run backwards"
    r = np.log(b.close).diff().abs().fillna(0)
    return (r.ewm(span=48).mean() + r[::-1].ewm(span=48).mean()[::-1]) / 2


def fitted_line(b):
    k = np.arange(len(b))
    return b.close - np.polyval(np.polyfit(k, b.close, 1), k)


def fourier(b):
    slow = np.arange(len(b) // 2 + 1) < 20
    return np.fft.irfft(np.where(slow, np.fft.rfft(b.close), 0), len(b))


LEAKS = {
    'resample': resample,
    'daily merge': daily_merge,
    'numpy off by one': lambda b: np.r_[np.diff(b.close), 0],
    'interpolated': lambda b: b.close.where(np.arange(len(b)) % 6 == 0).interpolate(),
    'back-fill of a start': lambda b: b.close.rolling(10).mean().bfill(),
    'filled with the mean': lambda b: b.close.diff(5).fillna(b.close.diff(5).mean()),
    'smoother': regime,
    'standardised': lambda b: (b.close - b.close.mean()) / b.close.std(),
    'quantile': lambda b: pd.qcut(b.volume, 10, labels=False),
    'fitted line': fitted_line,
    'Fourier': fourier,
    'train part': lambda b: b.close / b.close[:int(.7 * len(b))].mean(),
    'window with its forecast part': lambda b: (b.close - b.close.rolling(24).min().shift(-6)) / b.close,
    'left length': lambda b: (np.arange(len(b)) - len(b)) * b.close,
    'time to go': lambda b: (b.time.max() - b.time).dt.total_seconds(),
}


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('name', LEAKS)
def test_planted_leaks_are_found(name, seed):
    a = audit(LEAKS[name], one, seed=seed)
    assert not a.ok, str(a)
    assert {'truncation', 'perturbation'} & set(a.failed().fails[0].split(', ')), str(a)


def graph(b):
    wide = b.assign(r=by(b).pct_change()).pivot(index='time', columns='symbol', values='r')
    return b.symbol.map(wide.corr().sum())


COINS = {
    'rolling over the frame': lambda b: b.close.rolling(10).mean(),
    'diff over the frame': lambda b: b.close.diff(),
    'scaled over coins': lambda b: b.close / b.close.max(),
    'graph': graph,
    'lag of the sorted frame': lambda b: b.sort_values(['symbol', 'time']).close.shift(2).reindex(b.index),
}


@pytest.mark.parametrize('name', COINS)
@pytest.mark.parametrize('order', [['symbol', 'time'], ['time', 'symbol']])
def test_leaks_between_coins_are_found(name, order):
    a = audit(COINS[name], bars.sort_values(order, ignore_index=True))
    assert not a.ok, str(a)
    assert 'coins' in a.failed().words[0], str(a)


def test_a_mix_of_coins_is_no_future_but_fails():
    a = audit(lambda b: b.close.shift(1), bars.sort_values(['time', 'symbol'], ignore_index=True))
    assert a.failed().fails.tolist() == ['order']


# --- sources

def test_news_by_the_time_of_the_event():
    rng = np.random.default_rng(0)
    times = one.time[rng.integers(0, len(one), 80)].to_numpy()
    news = pd.DataFrame(dict(time=times, tone=rng.normal(size=80))).sort_values('time', ignore_index=True)
    news['known'] = news.time + pd.to_timedelta(rng.integers(1, 5, 80), 'h')

    def by_event(b, source): return pd.merge_asof(b[['time']], source[['time', 'tone']], on='time').tone
    def as_read(b, source): return as_of(closes(b), source).tone.to_numpy()

    assert 'before it was known' in audit_source(by_event, one, news).failed().words[0]
    assert audit_source(as_read, one, news).ok


def test_values_as_they_were_revised():
    days = pd.date_range(one.time.iloc[0].floor('D'), periods=45, freq='D', unit='us')
    x = np.arange(45.)
    first = pd.DataFrame(dict(time=days, x=x, known=days + pd.Timedelta('26h')))
    revised = pd.DataFrame(dict(time=days, x=x + 100, known=days + pd.Timedelta('80h')))
    day = pd.concat([first, revised], ignore_index=True)

    def final(b, source):
        "The value as revised, at the first publication"
        last = source.sort_values('known').drop_duplicates('time', keep='last').sort_values('time')
        published = last[['time', 'x']].assign(time=last.time + pd.Timedelta('26h'))
        return pd.merge_asof(b[['time']], published, on='time').x

    def as_known(b, source): return as_of(closes(b), source).x.to_numpy()

    assert 'known: source' in audit_source(final, one, day).failed().fails[0]
    assert audit_source(as_known, one, day).ok


def test_sources_need_known():
    with pytest.raises(DataError, match='a column known'):
        audit_source(lambda b, s: b.close, one, market.onchain.drop(columns='known'))


def test_sources_are_changed_within_their_series():
    s = Subject(None, bars, onchain=market.onchain)
    old = s.sources['onchain']
    new = s.other_source('onchain', 600, 'scramble', np.random.default_rng(0))['onchain']
    late = s.known['onchain'] > s.close[600]
    assert new[~late].equals(old[~late])
    assert (new.AdrActCnt[late] != old.AdrActCnt[late]).mean() > .9
    for asset in old.asset.unique():
        assert sorted(new.AdrActCnt[new.asset == asset]) == sorted(old.AdrActCnt[old.asset == asset])


def test_later_rows_of_a_source_are_dropped():
    s = Subject(None, bars, onchain=market.onchain)
    late = s.known['onchain'] > s.close[600]
    left = s.other_source('onchain', 600, 'drop', np.random.default_rng(0))['onchain']
    assert len(left) == (~late).sum()


def test_an_engineer_that_joins_on_time_is_caught():
    class Hasty(AdvancedFeatureEngineer):
        def transform(self, bars, timeframe=None, **sources):
            day = pd.Timedelta(1, 'D')
            hasty = {name: frame.assign(known=frame['time'] + day) for name, frame in sources.items()}
            return super().transform(bars, timeframe, **hasty)

    long = simulate(n_symbols=2, n_bars=2700, seed=5)
    a = audit(Hasty(['onchain']), long.bars, onchain=long.onchain)
    failed = a.table[(a.table.check == 'known: onchain') & (a.table.verdict == 'FAIL')]
    assert not a.ok, str(a)
    assert failed.ahead.max() == 12, str(a)         # published 36 hours after midnight, used after 24
    assert audit(AdvancedFeatureEngineer(['onchain']), long.bars, onchain=long.onchain).ok


# --- engineers

@pytest.mark.parametrize('seed', [0, 1])
def test_technical_features_pass(seed):
    holes = [*range(700, 705), *range(900, 950), 3000]
    holed = simulate(n_symbols=2, n_bars=2500, seed=seed).bars.drop(holes).reset_index(drop=True)
    a = audit(AdvancedFeatureEngineer(['technical']), holed, seed=seed)
    assert a.ok, str(a)
    assert a.warm_up.notna().mean() > .9


@needs_data
def test_technical_features_pass_on_real_bars():
    coins = ['ETH/USDT', 'DOGE/USDT', 'XRP/USDT']
    real, *_ = clean(market_frame(folder() / 'spot_1h.parquet', symbols=coins, start='2020-01-01', end='2020-06-01'))
    a = audit('technical', real)
    assert a.ok, str(a)
    assert len(a.table.feature.unique()) > 100


def test_a_stream_that_differs_is_found():
    class Rounded(AdvancedFeatureEngineer):
        def panel_stream(self, symbols, timeframe='1h'):
            stream = super().panel_stream(symbols, timeframe)
            update = stream.update
            stream.update = lambda bars, **k: update(bars, **k).round(6)
            return stream

    assert 'FAIL' in verdict(audit(Rounded(['technical']), bars), 'stream')


def test_a_warm_up_that_is_declared_too_short_is_found():
    @step('hasty_{p}', windows=(20,), state=1, first=1, settle=30)
    def hasty(close, W, s, n, y):
        s[0] = close if n == 1 else s[0] + (close - s[0]) / 20
        y[0] = s[0] / close

    a = audit(hasty, bars)
    assert a.failed().fails.tolist() == ['warm-up']
    assert 'declares 30 bars' in a.failed().words[0]


# --- the shapes people have

def sma(b): return b['close'].rolling(12).mean()
def ahead(b): return b['close'].shift(-2)


SHAPES = {
    'index': lambda b: b.drop(columns='symbol').set_index('time'),
    'date': lambda b: b.drop(columns='symbol').rename(columns=dict(time='date')),
    'milliseconds': lambda b: b.assign(time=b.time.astype('int64') // 10**3),
    'naive': lambda b: b.assign(time=b.time.dt.tz_localize(None)),
    'two levels': lambda b: b.set_index(['symbol', 'time']),
}


@pytest.mark.parametrize('shape', SHAPES)
def test_bars_in_the_users_shape(shape):
    mine = SHAPES[shape](one)
    honest = audit(sma, mine)
    assert honest.ok
    assert honest.warm_up.iloc[0] == 12
    assert audit(ahead, mine).failed().ahead.tolist() == [2]


ANSWERS = {
    'array': (lambda b: sma(b).to_numpy(), one),
    'array of two axes': (lambda b: sma(b).to_frame().to_numpy(), one),
    'index (symbol, row)': (lambda b: by(b).rolling(5).mean(), bars),
    'matched by index': (lambda b: sma(b).sample(frac=1, random_state=0), one),
    'truth and counts': (lambda b: pd.DataFrame({'up': b.close > b.open, 'n': b.trades.astype(int)}), one),
    'bars are a panel': (sma, to_panel(one)),
}


@pytest.mark.parametrize('name', ANSWERS)
def test_answers_in_any_shape(name):
    f, given = ANSWERS[name]
    assert audit(f, given).ok


@pytest.mark.parametrize('f, words', [
    (lambda b: sma(b).dropna(), 'return one row a bar'),
    (lambda b: b.symbol, 'could not convert'),
], ids=['too few rows', 'no numbers'])
def test_answers_that_are_no_table(f, words):
    assert words in audit(f, one).table.words[0]


def test_a_function_may_write_into_its_bars():
    def careless(b):
        b['close'] = np.log(b['close'])
        b.drop(columns='volume', inplace=True)
        return b[['close']]

    before = one.copy()
    assert audit(careless, one).ok
    assert one.equals(before)


def test_failures_are_reported():
    def needs_the_end(b): return sma(b) if b.close.iloc[-1] == one.close.iloc[-1] else b.nothing

    a = audit(needs_the_end, one)
    assert not a.ok
    assert 'runs' in a.table.check.tolist()
    assert 'AttributeError' in a.table.words.iloc[-1]
    with pytest.raises(AuditError, match='AttributeError'):
        a.raise_if_failed()


def test_too_few_bars_are_refused():
    with pytest.raises(DataError, match='too few'):
        audit(sma, one[:60])


def test_memory_between_calls_is_found():
    seen = []

    def remembers(b):
        seen.append(len(b))
        return b.close * len(seen)

    assert 'repeat' in audit(remembers, one).failed().fails[0]


def test_a_table_from_elsewhere_is_noted():
    table = one.set_index('time').close.shift(-3)
    a = audit(lambda b: table.reindex(b.time).to_numpy(), one)
    assert verdict(a, 'dates') == ['NOTE']
    assert 'looked up' in str(a)
    assert verdict(audit(sma, one), 'dates') == ['PASS']


@pytest.mark.parametrize('seed', range(3))
def test_a_table_that_a_step_brings_along(seed):
    "By the count of bars it fails its warm-up; by the number of the bar, or its time, the date is noted"
    table = one.close.shift(-3).ffill().to_numpy()
    first = (one.time[0] - pd.Timestamp(0, tz='UTC')) // pd.Timedelta('1h')

    @step('count')
    def count(close, W, s, n, y): y[0] = table[n - 1] / close

    @step('number')
    def number(close, W, s, n, y, i): y[0] = table[(i - first) % len(table)] / close

    @step('seconds')
    def seconds(close, time, W, s, n, y): y[0] = table[int(time // 3600 - first) % len(table)] / close

    a = audit([count, number, seconds], one, seed=seed)
    assert a.failed().feature.tolist() == ['count'], str(a)
    assert a.failed().fails.tolist() == ['warm-up'], str(a)
    assert [verdict(a, 'dates', name) for name in ('count', 'number', 'seconds')] == [['PASS'], ['NOTE'], ['NOTE']]


@pytest.mark.parametrize('timeframe', ['1h', '4h'])
def test_our_own_features_depend_on_no_date_but_the_month(timeframe):
    "All of them, with their sources, a year of whole weeks later"
    m = simulate(n_symbols=4, n_bars=3000, seed=2)
    longer = pd.Timedelta(timeframe) / m.timeframe
    begin = m.bars.time.min()
    later = pd.Timedelta(364, 'D')

    def moved(frame, by): return frame.assign(**{c: by(frame[c]) for c in ('time', 'known') if c in frame})
    def slowed(frame): return moved(frame, lambda t: begin + (t - begin) * longer)

    sources = {name: slowed(getattr(m, name)) for name in ('onchain', 'sentiment', 'funding')}
    engineer = AdvancedFeatureEngineer()
    now = engineer.transform(slowed(m.bars), timeframe, **sources)
    then = engineer.transform(
        moved(slowed(m.bars), lambda t: t + later), timeframe,
        **{name: moved(frame, lambda t: t + later) for name, frame in sources.items()})
    d = difference(now.to_numpy(), then.to_numpy(), now.abs().median().to_numpy())
    assert now.notna().any().sum() > 180
    assert now.columns[d.max(0) > 1e-9].tolist() == ['month_sin', 'month_cos']


def test_empty_features_are_noted_not_passed():
    a = audit(lambda b: b.close * np.nan, one)
    assert a.table.verdict.tolist() == ['NOTE']
    assert 'nothing could be tried' in str(a)


def test_an_audit_can_be_repeated():
    first, second = (audit(ahead, one, seed=3).table for _ in range(2))
    pd.testing.assert_frame_equal(first, second)


def test_limits():
    assert audit(sma, one, n_bars=300).over.startswith('1 coin, 300 bars')
    began = time.process_time()
    a = audit(sma, one)
    assert time.process_time() - began < 5
    assert 30 < a.calls < 90


def test_the_report_is_short():
    def many(b): return pd.concat([sma(b).rename(f'honest_{k}') for k in range(50)] + [ahead(b).rename('bad')], axis=1)

    a = audit(many, one)
    assert len(str(a).splitlines()) < 8
    assert 'honest_7' not in str(a)
    assert 'bad: needs the next 2 bars' in str(a)
    assert '<table' in a._repr_html_()
    assert '<table' not in audit(sma, one)._repr_html_()
    assert set(a.table) == {'feature', 'check', 'verdict', 'difference', 'ahead', 'example', 'words'}


# --- other futures

@examples(20)
@given(st.integers(0, 1100), st.sampled_from(KINDS), st.integers(0, 9))
def test_other_futures_are_sound_and_leave_the_past(cut, kind, seed):
    s = Subject(None, bars)
    other = s.other_future(cut, kind, np.random.default_rng(seed))
    past = s.t <= cut
    body = other[['open', 'close']]
    assert (other[past].to_numpy() == bars[past].to_numpy()).all()
    assert (other.time == bars.time).all()
    assert (other.close[~past] != bars.close[~past]).mean() > .95
    assert (other.high >= body.max(axis=1)).all()
    assert (other.low <= body.min(axis=1)).all()
    assert (other.low > 0).all()


# --- positions and canaries

def crossing(b):
    fast, slow = (by(b).transform(lambda x: x.rolling(p).mean()) for p in (6, 30))
    return (fast > slow).astype(float) / 3


def next_open(g): return g.w.shift(1) * (g.open.shift(-1) / g.open - 1)


FILLS = {
    'next open': (next_open, True),
    'next open, labelled by its end': (lambda g: g.w.shift(2) * g.open.pct_change(), True),
    'next open with costs': (lambda g: next_open(g) - .0007 * g.w.diff().abs(), True),
    'same close': (lambda g: g.w.shift(1) * g.close.pct_change(), False),
    'same bar': (lambda g: g.w * g.close.pct_change(), False),
    'same bar from its open': (lambda g: g.w * (g.close / g.open - 1), False),
}


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('name', FILLS)
def test_fills(name, seed):
    of_one_coin, honest = FILLS[name]

    def returns(b):
        coins = b.assign(w=crossing(b)).groupby('symbol')
        return sum(of_one_coin(g).reindex(b.index, fill_value=0) for _, g in coins)

    a = audit_positions(crossing, bars, returns, seed=seed)
    assert a.ok == honest, str(a)


def test_honest_positions_pass():
    assert audit_positions(crossing, bars).ok


def test_positions_that_see_the_next_bar():
    a = audit_positions(lambda b: (by(b).shift(-1) > b.close).astype(float), bars)
    assert not a.ok
    assert a.failed().ahead.tolist() == [1]


def test_fills_cannot_be_tried_without_a_trade():
    a = audit_positions(lambda b: b.close * 0, bars, lambda b: b.close * 0)
    assert verdict(a, 'fills') == ['NOTE']


def test_returns_of_another_length():
    a = audit_positions(crossing, bars, lambda b: b.close[:7])
    assert verdict(a, 'fills') == ['FAIL']
    assert 'give one for each' in str(a)


def test_canaries_alone_fail():
    a = audit(with_canaries(lambda b: by(b).pct_change().rename('r')), bars)
    assert set(a.failed().feature) == set(CANARIES)
    assert verdict(a, 'truncation', 'r') == ['PASS']


def test_canaries_in_bars_without_a_symbol():
    a = audit(with_canaries(sma), one.drop(columns='symbol'))
    assert set(a.failed().feature) == set(CANARIES)
