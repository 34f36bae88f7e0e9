"Sentiment: known when known, truncation and stream to the last bit, a second formula, dead feeds, hostile frames"
import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from cryptoml.audit import audit
from cryptoml.data import DataError
from cryptoml.engine import BARS, Engine
from cryptoml.features import AdvancedFeatureEngineer, catalogue
from cryptoml.times import DAY, HOUR
from cryptoml.sentiment import DAYS, LOOKBACK, MAX_AGE, RUN, SENTIMENT, SENTIMENT_COLUMNS, coin_of
from cryptoml.sentiment import sentiment_at_bars, sentiment_frame
from cryptoml.simulate import simulate

needs_data = pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')
ENGINE = Engine(SENTIMENT, inputs=BARS + SENTIMENT_COLUMNS)


def micro(column): return pd.DatetimeIndex(column).as_unit('us').asi8


def moment(us): return pd.Timestamp(int(us), unit='us', tz='UTC')


def closes(start, n, step=HOUR): return micro([pd.Timestamp(start, tz='UTC')])[0] + step * np.arange(1, n + 1)


def same(a, b): assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()      # to the last bit


def features(frame, symbol, close, step=HOUR):
    "Features of bars that never move [T, 14]"
    X = np.column_stack([np.ones((len(close), len(BARS))), sentiment_at_bars(frame, symbol, close, step)])
    return pd.DataFrame(ENGINE.run(X, close // step).T, columns=ENGINE.columns)


def made(n=900, days=80, seed=0):
    "Texts of four coins and of none over some days, many of them late, with weights"
    rng = np.random.default_rng(seed)
    time = pd.Timestamp('2024-01-01', tz='UTC') + pd.to_timedelta(rng.uniform(0, days * 86400, n).round(), 's')
    late = np.where(rng.random(n) < .2, rng.exponential(40, n), .1)
    raw = pd.DataFrame(dict(
        time=time, known=time + pd.to_timedelta(late, 'h').round('us'),
        symbol=rng.choice(['BTC', 'ETH/USDT', 'SOL', '', None], n),
        score=np.tanh(rng.normal(0, .7, n)), weight=rng.choice([1., 1., 2.5, 0.], n)))
    return sentiment_frame(raw)


def with_a_hole(): return (lambda f: f[~f.known.between('2024-02-10', '2024-02-16')].reset_index(drop=True))(made())


def real():
    raw = pd.read_parquet(Path(os.environ['CRYPTOML_DATA'])/'crypto_news.parquet')
    coin = raw.subject.map(dict(bitcoin='BTC', ethereum='ETH')).fillna('')
    return sentiment_frame(pd.DataFrame(dict(time=raw.timestamp, symbol=coin, score=raw.polarity)))


def case(name):
    "Frame, symbol, closes"
    if name == 'made': return made(), 'ETH/USDT', closes('2024-01-01', 24 * 84)
    if name == 'hole': return with_a_hole(), 'BTC/USDT', closes('2024-01-01', 6 * 84, 4 * HOUR)
    if name == 'simulated':
        m = simulate(n_symbols=3, n_bars=24 * 60, seed=3)
        return sentiment_frame(m.sentiment), 'SHIB/USDT', closes('2022-01-01', 24 * 60)
    return real(), 'BTC/USDT', closes('2021-10-12', 24 * 120)


@pytest.fixture(scope='module', params=['made', 'hole', 'simulated', pytest.param('real', marks=needs_data)])
def given_case(request):
    frame, symbol, close = case(request.param)
    return frame, symbol, close, sentiment_at_bars(frame, symbol, close)


# --- knowledge

def test_truncation_and_lookback(given_case):
    "A frame cut at the close, one that also begins LOOKBACK days before it, and one close alone give the same bits"
    frame, symbol, close, X = given_case
    known = micro(frame.known)
    assert np.isfinite(X).any() and np.isnan(X).any()
    for t in [0, 1, 37, *np.random.default_rng(0).integers(0, len(close), 150)]:
        seen = frame[known <= close[t]]
        month = frame[(known <= close[t]) & (known > close[t] - LOOKBACK * DAY)]
        for f in (seen, month, frame, frame.sample(frac=1, random_state=t)):
            same(sentiment_at_bars(f, symbol, close[t:t + 1])[0], X[t])


def test_a_later_text_cannot_reach_back(given_case):
    frame, symbol, close, X = given_case
    at = close[2 * len(close) // 3]
    late = micro(frame.known) > at
    changed = frame.assign(score=frame.score.where(~late, -.99), weight=frame.weight.where(~late, 7.))
    Z = sentiment_at_bars(changed, symbol, close)
    same(Z[close <= at], X[close <= at])
    assert not np.array_equal(Z, X, equal_nan=True)


def test_a_text_is_known_at_its_close_and_not_a_microsecond_later():
    close = closes('2024-02-20', 1)
    quiet = made().assign(weight=0.)
    def count(known):
        one = pd.DataFrame(dict(time=moment(close[0] - HOUR), known=moment(known), symbol='', score=1., weight=1.), [0])
        return sentiment_at_bars(pd.concat([quiet, one]), 'BTC/USDT', close)[0, 0]
    assert count(close[0]) == 2 ** (-1 / 6) and count(close[0] + 1) == 0


def test_news_stamped_by_event_are_found():
    "Check 9: a frame that calls the event's time the time of publication fails the look-ahead audit, ours passes"
    m = simulate(n_symbols=1, n_bars=900, seed=2)
    news = m.sentiment.assign(known=m.sentiment.time + pd.Timedelta('20h'))
    class ByEvent(AdvancedFeatureEngineer):
        def transform(self, bars, timeframe=None, sentiment=None):
            if sentiment is not None: sentiment = sentiment.assign(known=sentiment.time)
            return super().transform(bars, timeframe, sentiment=sentiment)
    planted = audit(ByEvent(['sentiment']), m.bars, sentiment=news)
    failed = planted.table[planted.table.verdict == 'FAIL']
    assert not planted.ok and (failed.check == 'known: sentiment').any()
    honest = audit(AdvancedFeatureEngineer(['sentiment']), m.bars, sentiment=news)
    assert honest.ok and 'known: sentiment' in set(honest.table.check)


@pytest.mark.parametrize('sentence, change', [
    ('3 of 3 texts are known before they were published', lambda f: f.assign(known=f.time - pd.Timedelta('1us'))),
    ('1 of 3 texts are known before they were published',
     lambda f: f.assign(known=f.time.shift(-1, fill_value=f.time[0]))),
])
def test_known_before_publication_is_refused(sentence, change):
    raw = change(pd.DataFrame(dict(time=pd.date_range('2024-01-01 07:00', periods=3, tz='UTC'), score=0., weight=1.)))
    with pytest.raises(DataError, match=sentence): sentiment_frame(raw)
    with pytest.raises(DataError, match=sentence): sentiment_at_bars(raw, 'BTC/USDT', closes('2024-01-10', 4))


# --- what the numbers are

def plainly(frame, symbol, at):
    "Features of one close, from the formulas, text by text"
    start = at // DAY * DAY - DAYS * DAY
    seen = [r for r in frame.to_dict('records') if start <= r['known'].value // 1000 <= at]
    coin = symbol.split('/')[0]

    def left(h, what, own):
        texts = [r for r in seen if not own or r['symbol'] == coin]
        return sum(r['weight'] * what(r['score']) * .5 ** ((at - r['time'].value // 1000) / HOUR / h) for r in texts)

    def count(h, own=False): return left(h, lambda s: 1, own)
    def tone(h, own=False): return left(h, lambda s: s, own) / (count(h, own) + 1)

    def hours(own):
        times = [r['time'].value // 1000 for r in seen if not own or r['symbol'] == coin]
        return np.log(1 + min((at - max(times)) / HOUR if times else 1e9, 720))

    squares = left(24, np.square, False) / (count(24) + 1)
    return dict(
        sentiment_mean_6h=tone(6), sentiment_mean_24h=tone(24), sentiment_mean_72h=tone(72),
        sentiment_surprise_6h=tone(6) - tone(72),
        sentiment_negative_24h=left(24, lambda s: max(-s, 0), False) / (count(24) + 1),
        sentiment_dispersion_24h=np.sqrt(squares - tone(24) ** 2),
        news_attention_24h=np.log((count(24) + 1) / (count(72) / 3 + 1)),
        news_attention_6h=np.log((count(6) + 1) / (count(72) / 12 + 1)),
        news_hours=hours(False),
        own_sentiment_24h=tone(24, True), own_sentiment_72h=tone(72, True),
        own_attention_24h=np.log((count(24, True) + 1) / (count(72, True) / 3 + 1)),
        own_news_share_72h=count(72, True) / (count(72) + 1),
        own_news_hours=hours(True))


def test_oracle(given_case):
    frame, symbol, close, X = given_case
    Y = features(frame, symbol, close, int(close[1] - close[0]))
    there = np.flatnonzero(np.isfinite(X).all(1))
    for t in np.random.default_rng(1).choice(there, 12):
        plain = plainly(frame, symbol, close[t])
        assert list(plain) == ENGINE.columns
        np.testing.assert_allclose(Y.iloc[t], list(plain.values()), rtol=1e-9, atol=1e-12)


def test_values_lie_where_the_unit_says(given_case):
    frame, symbol, close, X = given_case
    Y = features(frame, symbol, close, int(close[1] - close[0]))
    for f in SENTIMENT:
        for name, unit in zip(f.out, f.doc['unit']):
            if ' to ' in unit:
                lo, hi = map(float, unit.split(', ')[-1].split(' to '))
                assert (Y[name].isna() | Y[name].between(lo - 1e-9, hi + 1e-9)).all(), name
    assert Y.abs().max().max() < 20


def test_bars_of_any_length_see_the_same():
    frame = made()
    fine = closes('2024-02-01', 12 * 24 * 10, HOUR // 12)
    X = sentiment_at_bars(frame, 'SOL/USDT', fine, HOUR // 12)
    for step in (HOUR, 4 * HOUR, DAY):
        at = fine % step == 0
        same(sentiment_at_bars(frame, 'SOL/USDT', fine[at], step), X[at])


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.tuples(st.integers(0, 50 * 24 * 60), st.integers(0, 5000), st.floats(-1, 1),
                             st.sampled_from(['BTC', 'ETH', ''])), min_size=1, max_size=60),
    at=st.integers(12 * 24, 60 * 24))
def test_any_texts(texts, at):
    "Bounded, causal, and the same however the rows are ordered and wherever the frame begins"
    start = pd.Timestamp('2024-01-01 00:01', tz='UTC')
    def after(minutes): return start + pd.Timedelta(minutes, 'min')
    rows = [(after(m), after(m + late), coin, s) for m, late, s, coin in texts]
    frame = sentiment_frame(pd.DataFrame(rows, columns=['time', 'known', 'symbol', 'score']))
    close = closes('2024-01-01', 1) + at * HOUR
    X = sentiment_at_bars(frame, 'BTC/USDT', close)
    known = micro(frame.known)
    for f in (frame[::-1], frame[known <= close[0]], frame[known > close[0] - LOOKBACK * DAY], sentiment_frame(frame)):
        same(sentiment_at_bars(f, 'BTC/USDT', close), X)
    Y = features(frame, 'BTC/USDT', close)
    assert not np.isinf(Y).any(axis=None) and Y.isna().all(axis=None) == np.isnan(X).all()
    seen = known[known <= close[0]]
    if len(seen) and close[0] - seen[-1] > MAX_AGE or not len(seen): assert np.isnan(X).all()


# --- a feed that dies

def test_a_dead_feed_is_missing_and_not_silent():
    "Five days after the last text nothing is known; twelve days after it came back it is again"
    frame, close = with_a_hole(), closes('2024-01-01', 24 * 80)
    there = np.isfinite(sentiment_at_bars(frame, 'BTC/USDT', close)).all(1)
    known = micro(frame.known)
    last = known[known < micro(['2024-02-10T00:00Z'])[0]][-1]
    first = known[known > last][0]
    assert first - last > MAX_AGE
    alive = (close >= known[0] + RUN) & (close <= last + MAX_AGE) | (close >= first + RUN)
    np.testing.assert_array_equal(there, alive)


def test_silence_of_a_living_feed_is_known():
    "Bars without a text have a count, and it only fades"
    frame = made(60, 60)
    X = pd.DataFrame(sentiment_at_bars(frame, 'BTC/USDT', closes('2024-02-01', 24)), columns=SENTIMENT_COLUMNS)
    assert X.notna().all(axis=None) and (X.news_72h > 0).all()


def test_a_frame_without_symbols_says_nothing_of_a_coin():
    frame, close = made().drop(columns='symbol'), closes('2024-02-20', 10)
    X = features(frame, 'BTC/USDT', close)
    own = [c for c in X if c.startswith('own')]
    assert X[own].isna().all(axis=None) and X.drop(columns=own).notna().all(axis=None)
    same(X.drop(columns=own), features(made(), 'BTC/USDT', close).drop(columns=own))


def test_the_first_days_are_missing():
    frame = made()
    X = features(frame, 'BTC/USDT', closes('2024-01-01', 24 * 20))
    begun = X.notna().all(axis=1).to_numpy()
    close = closes('2024-01-01', 24 * 20)
    np.testing.assert_array_equal(begun, close >= micro(frame.known)[0] + RUN)


# --- frames as people have them

RAW = dict(time=['2024-03-30 22:15', '2024-03-31 00:30', '2024-03-31 01:30', '2024-03-31 04:10'],
           symbol=['BTC', 'eth', '', None], score=[.5, -.25, 0., 1.])


def raw(**columns): return pd.DataFrame(RAW | columns)


TIMES = pd.to_datetime(RAW['time'], utc=True)
FORMS = dict(
    text=raw(),
    naive=raw(time=TIMES.tz_localize(None)),
    berlin=raw(time=TIMES.tz_convert('Europe/Berlin')),              # over the change to summer time
    new_york=raw(time=TIMES.tz_convert('America/New_York').astype(str)),
    seconds=raw(time=TIMES.as_unit('s').asi8),
    milliseconds=raw(time=TIMES.as_unit('ms').asi8),
    nanoseconds=raw(time=TIMES.as_unit('ns').asi8),
    index=raw().drop(columns='time').set_index(TIMES),
    capitals=raw().rename(columns=str.upper),
    published=raw().rename(columns=dict(time='publishedAt', symbol='coin')),
    pairs=raw(symbol=['BTCUSDT', 'ETH/USD', np.nan, ' ']),
    texts=raw(score=['0.5', '-.25', '0', '1']),
    shuffled=raw().sample(frac=1, random_state=1),
    twice=pd.concat([raw(), raw()]),
    crawled_twice=pd.concat([sentiment_frame(raw()), sentiment_frame(raw(), delay='3h')]),
    weights=raw(weight=1),
    more=raw(title=list('abcd'), url=list('efgh'), likes='many'))


@pytest.mark.parametrize('form', FORMS)
def test_forms(form):
    expected = pd.DataFrame(dict(time=TIMES, known=TIMES + pd.Timedelta('5min'), symbol=['BTC', 'ETH', '', ''],
                                 score=RAW['score'], weight=1.)).astype(dict(symbol=object))
    expected[['time', 'known']] = expected[['time', 'known']].astype('datetime64[us, UTC]')
    got = sentiment_frame(FORMS[form])
    pd.testing.assert_frame_equal(got.astype(dict(symbol=object)), expected)
    pd.testing.assert_frame_equal(sentiment_frame(got), got)


BAD = {
    'no frame': (lambda: [1, 2], 'a list is no frame'),
    'no time': (lambda: raw().drop(columns='time'),
                     'no column time, timestamp or published: the frame has symbol, score'),
    'no score': (lambda: raw().drop(columns='score'), 'no column score: the frame has time, symbol'),
    'texts without a score': (lambda: raw(title='x').drop(columns='score'),
                     'score them first, with `cryptoml sentiment`'),
    'words for scores': (lambda: raw(score=['good', '1', '0', '0']),
                     "score: 1 of 4 values are no numbers, first 'good'"),
    'stars': (lambda: raw(score=[5, 1, 0, 3]), '2 of 4 scores do not lie within -1 and 1, first 5 in row 0'),
    'infinite': (lambda: raw(score=[0, np.inf, 0, 0]), '1 of 4 scores do not lie within -1 and 1, first inf in row 1'),
    'negative weight': (lambda: raw(weight=[1, -1, 1, 1]),
                     '1 of 4 weights are negative, infinite or missing, first in row 1'),
    'missing weight': (lambda: raw(weight=[1, 1, None, 1]), '1 of 4 weights are negative, infinite or missing'),
    'names': (lambda: raw(symbol='bitcoin'), "symbol 'bitcoin' is no coin that is known for certain"),
    'two coins in one': (lambda: raw(symbol='BTC, ETH'), "symbol 'BTC, ETH' is no coin that is known for certain"),
    'days': (lambda: raw(time=pd.date_range('2024-01-01', periods=4)),
                     'all 4 texts are stamped at midnight, first 2024-01-01'),
    'no moment': (lambda: raw(time=['noon', '2024', '2024', '2024']),
                     "time: 1 of 4 times cannot be read, first 'noon'"),
    'missing time': (lambda: raw(time=[None, *RAW['time'][1:]]), 'time'),
    'two scores': (lambda: pd.concat([raw(title='x'), raw(title='x', score=.3)]), 'come twice with different scores'),
    'two columns': (lambda: raw(Score=0.), 'columns appear twice: score'),
}




@pytest.mark.parametrize('what', BAD)
def test_bad_frames_are_one_sentence(what):
    make, sentence = BAD[what]
    with pytest.raises(DataError) as e: sentiment_frame(make())
    assert sentence in str(e.value) and '\n' not in str(e.value)


def test_days_with_a_known_pass():
    days = pd.date_range('2024-01-01', periods=4, tz='UTC')
    got = sentiment_frame(raw(time=days, known=days + pd.Timedelta('1D')))
    assert (got.known - got.time == pd.Timedelta('1D')).all()


def test_texts_without_a_score_are_left_out_and_said():
    with pytest.warns(UserWarning, match='2 of 4 texts have no score and are left out, first in row 1'):
        assert len(sentiment_frame(raw(score=[.5, np.nan, None, 1.]))) == 2
    with warnings.catch_warnings(action='ignore'): nothing = sentiment_frame(raw(score=np.nan))
    assert len(nothing) == 0
    assert np.isnan(sentiment_at_bars(nothing, 'BTC/USDT', closes('2024-04-20', 5))).all()


def test_what_is_not_published_yet_is_not_there():
    got = sentiment_frame(raw(known=[pd.NaT, *(TIMES[1:] + pd.Timedelta('1min'))]))
    assert len(got) == 3


def test_texts_of_the_future_are_not_seen():
    frame, close = made(), closes('2024-02-20', 5)
    future = sentiment_frame(raw(time=['2098-01-01 07:00', *RAW['time'][1:]]))
    same(sentiment_at_bars(pd.concat([frame, future]), 'BTC/USDT', close), sentiment_at_bars(frame, 'BTC/USDT', close))


@pytest.mark.parametrize('name, coin', [
    ('BTC', 'BTC'), ('btc', 'BTC'), ('BTC/USDT', 'BTC'), ('BTCUSDT', 'BTC'), ('BTC-USD', 'BTC'), ('WBTC', 'WBTC'),
    ('USDT', 'USDT'), ('FOO/USDT', 'FOO'), ('C008/USDT', 'C008'), ('', ''), ('  ', '')])
def test_coins(name, coin): assert coin_of(name) == coin


# --- in the engineer

def test_it_is_a_family():
    table = catalogue(['sentiment'])
    assert len(table) == 14 and set(table.inputs) == {'sentiment frame'} and (table.warm_up == 1).all()
    assert set(table.delay) == {'5min after it was published, or as the frame says'}
    assert set(table.history) == {'31 days of sentiment'}


def test_stream_equals_batch_with_what_was_known():
    "Bars and news as they come; a gap of bars loses no text"
    m = simulate(n_symbols=3, n_bars=24 * 25, seed=8)
    bars = m.bars[~m.bars.time.between('2022-01-18 03:00', '2022-01-20 09:00')]
    engineer = AdvancedFeatureEngineer(['technical', 'sentiment'])
    X = engineer.transform(bars, sentiment=m.sentiment)
    stream, hour = engineer.panel_stream(m.symbols), pd.Timedelta('1h')
    late = bars.time >= bars.time.min() + pd.Timedelta('14D')
    for t, rows in bars.groupby('time'):
        news = m.sentiment[m.sentiment.known <= t + hour] if late[rows.index[0]] else None
        Y = stream.update({r['symbol']: r for r in rows.to_dict('records')}, sentiment=news)
        if late[rows.index[0]]: same(Y, X.xs(t, level='time').loc[m.symbols])
    own = X.loc['BTC/USDT'].own_sentiment_24h
    assert own.dropna().nunique() > 100 and own[late.to_numpy()[:len(own)]].notna().all()


def test_without_news_no_other_column_moves():
    m = simulate(n_symbols=2, n_bars=400, seed=8)
    engineer = AdvancedFeatureEngineer()
    news = engineer.catalogue().family.eq('sentiment').to_numpy()
    X, bare = engineer.transform(m.bars, sentiment=m.sentiment), engineer.transform(m.bars)
    same(X.loc[:, ~news], bare.loc[:, ~news])
    assert bare.loc[:, news].isna().all(axis=None) and X.loc[:, news].notna().any().all()


def test_planted_news_lead():
    "On the simulated market the mean of a coin's texts goes with its next day, though what it reads is noisy"
    m = simulate(n_symbols=6, n_bars=24 * 365, signal=2., seed=1)
    X = AdvancedFeatureEngineer(['sentiment']).transform(m.bars, sentiment=m.sentiment)
    ahead = m.expected(24).reindex(X.index)
    by_coin = [np.corrcoef(x.own_sentiment_24h[400:], ahead[coin][400:])[0, 1] for coin, x in X.groupby('symbol')]
    assert min(by_coin) > .05 and np.mean(by_coin) > .1
