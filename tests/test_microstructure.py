"""Microstructure: brute force on messy books and tapes, cuts on both sides, stream, hostile frames, real data"""
import os, warnings
from pathlib import Path
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from cryptoml.data import DataError
from cryptoml.engine import BARS, Engine, chained, ordered
from cryptoml.microstructure import BOOK_AGE, MICROSTRUCTURE, MIDDLE_AGE, ORDERBOOK_COLUMNS, TRADE_AGE
from cryptoml.microstructure import TRADES_COLUMNS, book_row, level_names, orderbook_at_bars, orderbook_frame
from cryptoml.microstructure import trade_rows, trades_at_bars, trades_frame
from cryptoml.times import SECOND
from cryptoml.technical import TECHNICAL

START, MINUTE = pd.Timestamp('2024-03-09 23:00', tz='UTC'), 60 * SECOND
T0 = START.value // 1000
HOUR = 60 * MINUTE
INPUTS = (*BARS, *ORDERBOOK_COLUMNS, *TRADES_COLUMNS)
FEATURES = [c for f in MICROSTRUCTURE for c, keep in zip(f.out, f.doc['feature']) if keep]
OF_BARS = ['vpin_24', 'vpin_168', 'kyle_lambda_168', 'kyle_impact_168', 'flow_correlation_168',
           'amihud_24', 'trade_size_ratio_24_168']
real = pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')
equal = np.testing.assert_array_equal


def us(s): return pd.DatetimeIndex(s).as_unit('us').asi8


def utc(us): return pd.to_datetime(us, unit='us', utc=True)


def needed():
    "The chapter's steps and those of the technical chapter they read"
    maker = {c: f for f in (*TECHNICAL, *MICROSTRUCTURE) for c in f.out}
    out = list(MICROSTRUCTURE)
    for f in out:                                        # grows while we walk
        read = dict.fromkeys(maker[c] for c in f.inputs if c in maker)
        out += [g for g in read if g not in out]
    return out


@pytest.fixture(scope='module')
def engine(): return Engine(needed(), FEATURES, INPUTS)


def messy_book(n=500, seed=0, levels=12):
    "Books at uneven times: some late, repeated, revised, thin, crossed or broken, all out of order"
    rng = np.random.default_rng(seed)
    middle = 100 * np.exp(np.cumsum(2e-4 * rng.standard_normal(n)))
    pause = np.where(np.arange(n) > n // 2, 400 * SECOND, 0)             # longer than the age
    time = np.sort(rng.integers(1, 1800, n)) * SECOND + pause
    late = np.where(rng.random(n) < .1, rng.integers(1, 400, n), 0)
    known = time + late * SECOND + rng.integers(0, 200_000, n)
    symbol = np.where(rng.random(n) < .9, 'AAA/USDT', 'BBB/USDT')
    raw = dict(timestamp=utc(T0 + time), known=utc(T0 + known), symbol=symbol)
    for side, way in (('bid', -1), ('ask', 1)):
        far = np.cumsum(rng.choice([.01, .02, .05], (n, levels)), 1)
        size = rng.choice([1., 2, 5, 10], (n, levels))
        size[rng.random(n) < .1, 7] = rng.choice([0, np.nan, -1])
        for k in range(levels):
            raw[f'{side}_price_{k + 1}'] = np.round(middle + way * far[:, k], 4)
            raw[f'{side}_size_{k + 1}'] = size[:, k]
    raw = pd.DataFrame(raw)
    raw.loc[rng.random(n) < .03, 'bid_price_1'] *= 1.01                  # crossed
    raw.loc[rng.random(n) < .03, 'ask_size_1'] = np.nan
    again = raw.sample(min(n, 30), random_state=seed)
    later = again.known + pd.to_timedelta(rng.integers(0, 90, len(again)), 's')
    revised = again.assign(known=later, bid_size_1=7.)
    return pd.concat([raw, again, revised]).sample(frac=1, random_state=seed, ignore_index=True)


def messy_tape(n=3000, seed=0):
    "Trades, some late or sent again, out of order"
    rng = np.random.default_rng(seed)
    time = np.sort(rng.integers(1, 2200 * 1000, n)) * 1000
    time[(time > 900 * SECOND) & (time < 1000 * SECOND)] += 100 * SECOND
    time = np.sort(time)
    late = np.where(rng.random(n) < .05, rng.integers(1, 100, n), 0)
    known = time + late * SECOND + rng.integers(0, 200_000, n)
    side = np.where(rng.random(n) < .5, 1, -1)
    raw = pd.DataFrame(dict(
        timestamp=utc(T0 + time), known=utc(T0 + known), symbol=np.where(rng.random(n) < .9, 'AAAUSDT', 'BBBUSDT'),
        id=np.arange(n).astype(str),
        price=np.round(100 * np.exp(np.cumsum(2e-5 * rng.standard_normal(n))) + .02 * side, 4),
        quantity=rng.choice([.1, .5, 1, 3], n), side=np.where(side > 0, 'buy', 'sell')))
    again = raw.sample(min(n, 200), random_state=seed)
    again = again.assign(known=again.known + pd.to_timedelta(rng.integers(1, 100, len(again)), 's'))
    return pd.concat([raw, again]).sample(frac=1, random_state=seed, ignore_index=True)


def quiet(f, raw, **options):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f(raw, **options)


CLOSES = T0 + MINUTE * np.r_[1:12, 14:37]                                         # two bars are missing
BOOK, TAPE = quiet(orderbook_frame, messy_book()), trades_frame(messy_tape())


def share(b, a): return (b - a) / (b + a)


def volume(side, k): return sum(q for _, q in side[:k]) if len(side) >= k else np.nan


def width(b, a): return 2e4 * (a[0][0] - b[0][0]) / (a[0][0] + b[0][0])


def mean(v): return np.nanmean(v) if 2 * np.isfinite(v).sum() > len(v) else np.nan


def books_plain(frame, close, length, levels):
    "Books known by a close, one after another: time, known, bids, asks"
    rows = []
    for r in frame[frame.symbol == 'AAA/USDT'].sort_values(['known', 'time'], kind='stable').itertuples():
        t, k = r.time.value // 1000, r.known.value // 1000
        if k > close or k - t > BOOK_AGE: continue
        if rows and t < max(x[0] for x in rows): continue
        sides = []
        for s in ('bid', 'ask'):
            side = [(getattr(r, f'{s}_price_{i}'), getattr(r, f'{s}_size_{i}')) for i in range(1, levels + 1)]
            good = [p > 0 and q > 0 for p, q in side]
            sides.append(side[:good.index(False) if False in good else levels])
        rows.append((t, k, *sides))

    def replaced(a, b): return a[0] == b[0] and (a[1] > close - length) == (b[1] > close - length)
    return [a for a, b in zip(rows, rows[1:] + [None]) if b is None or not replaced(a, b)]


def state_plain(b, a):
    "Columns that a book alone gives"
    m, out = (b[0][0] + a[0][0]) / 2, {}
    for k in (1, 5, 20): out[f'orderbook_imbalance_{k}'] = share(volume(b, k), volume(a, k))
    out['orderbook_spread'] = width(b, a)
    micro = (a[0][0] * b[0][1] + b[0][0] * a[0][1]) / (a[0][1] + b[0][1])
    out['orderbook_microprice'] = 1e4 * (micro - m) / m
    if min(len(a), len(b)) < 10: return out
    far = [[1e4 * abs(p - m) / m for p, _ in side[:10]] for side in (b, a)]
    reach = min(far[0][-1], far[1][-1]) + 1e-9
    near = [sum(q for d, (_, q) in zip(ds, side) if d <= reach) for ds, side in zip(far, (b, a))]
    fit = [sum(d * m * volume(side, i + 1) for i, d in enumerate(ds)) / sum(d * d for d in ds)
           for ds, side in zip(far, (b, a))]
    out |= dict(orderbook_depth_imbalance=share(*near), orderbook_slope_imbalance=share(*fit))
    return out | dict(orderbook_slope=sum(fit) / 2)


def added_plain(before, now, way):
    "What one level has gained from one book to the next; way: 1 for bids, -1 for asks"
    (p0, q0), (p1, q1) = before, now
    if p1 == p0: return way * (q1 - q0)
    return way * q1 if (p1 - p0) * way > 0 else -way * q0


def book_plain(frame, close, length, levels=12):
    "One close, row by row in plain Python"
    rows, out = books_plain(frame, close, length, levels), dict.fromkeys(ORDERBOOK_COLUMNS, np.nan)
    if rows and close - rows[-1][0] <= BOOK_AGE: out |= state_plain(*rows[-1][2:])
    inside = [i for i, r in enumerate(rows) if r[1] > close - length]
    watched, flows = 0, {1: [], 5: []}
    for i in inside:
        gap = rows[i][1] - rows[i - 1][1] if i else np.inf
        if gap <= BOOK_AGE: watched += min(gap, rows[i][1] - close + length)
        for k in flows:
            there = gap <= BOOK_AGE and all(len(rows[j][s]) >= k for j in (i, i - 1) for s in (2, 3))
            e = sum(added_plain(rows[i - 1][s][j], rows[i][s][j], way)
                    for s, way in ((2, 1), (3, -1)) for j in range(k)) if there else np.nan
            flows[k].append(e / k)
    if not inside or 2 * watched < length: return [out[c] for c in ORDERBOOK_COLUMNS]
    books = [rows[i][2:] for i in inside]
    for k, name in ((1, 'orderbook_flow'), (5, 'orderbook_flow_5')):
        depth = mean([(volume(b, k) + volume(a, k)) / (2 * k) for b, a in books])
        out[name] = len(inside) * mean(flows[k]) / depth
    out['orderbook_mean_spread'] = np.mean([width(b, a) for b, a in books])
    out['orderbook_mean_imbalance_5'] = mean([share(volume(b, 5), volume(a, 5)) for b, a in books])
    return [out[c] for c in ORDERBOOK_COLUMNS]


def test_book_against_plain_python():
    ours = orderbook_at_bars(BOOK, 'AAAUSDT', CLOSES, MINUTE)
    plain = np.array([book_plain(BOOK, c, MINUTE) for c in CLOSES])
    np.testing.assert_allclose(ours, plain, rtol=1e-8, atol=1e-8)
    there = np.isfinite(ours).mean(0)
    assert there[2] == 0                                                  # twelve levels: no imbalance of twenty
    assert (np.delete(there, 2) > .4).all() and (there < 1).all()


def tape_rows(frame, close, length):
    "Trades of a bar, each once: known, price, quantity, sign"
    seen, rows = set(), []
    for r in frame[frame.symbol == 'AAA/USDT'].sort_values(['known', 'time'], kind='stable').itertuples():
        k, t = r.known.value // 1000, r.time.value // 1000
        if k > close or k - t > TRADE_AGE or r.id in seen: continue
        seen.add(r.id)
        if k > close - length: rows.append((k, r.price, r.quantity, -1 if r.buyer_is_maker else 1))
    return rows


def impact_plain(k, p, q, s, open, length):
    "Slope of the slots' returns of the middle on their volume"
    buys, sells = np.flatnonzero(s > 0), np.flatnonzero(s < 0)
    if not len(buys) or not len(sells): return np.nan
    begin = max(buys[0], sells[0])
    slot = np.minimum((k - open - 1) * 20 // length, 19)

    def middle(i): return np.log(p[buys[buys <= i][-1]] * p[sells[sells <= i][-1]]) / 2
    at = [begin] + [max([begin, *np.flatnonzero(slot <= j)[-1:]]) for j in range(20)]
    r = np.diff([middle(i) for i in at])
    x = np.array([(s * q)[slot == j].sum() / q.sum() for j in range(20)])
    return 1e4 * np.polyfit(x, r, 1)[0]


def middles_plain(book, when):
    "Middle of the last book known before each moment"
    books = book[(book.symbol == 'AAA/USDT') & (book.known - book.time <= pd.Timedelta(BOOK_AGE, 'us'))]
    books = books[books.time >= books.time.cummax()]
    out = []
    for moment in when:
        known = books[us(books.known) < moment].tail(1)
        fresh = len(known) and moment - known.time.iloc[0].value // 1000 <= MIDDLE_AGE
        out.append((known.bid_price_1.iloc[0] + known.ask_price_1.iloc[0]) / 2 if fresh else np.nan)
    return np.array(out)


def tape_plain(frame, book, close, length):
    "One close, trade by trade in plain Python"
    rows, out = tape_rows(frame, close, length), dict.fromkeys(TRADES_COLUMNS, np.nan)
    if not rows: return [out[c] for c in TRADES_COLUMNS]
    k, p, q, s = (np.array(v) for v in zip(*rows))
    V, n = q.sum(), len(q)
    out['trades_flow'], out['trades_count_flow'] = (s * q).sum() / V, s.mean()
    turns = [i for i in range(1, n) if s[i] != s[i - 1]]
    steps = [1e4 * s[i] * (p[i] - p[i - 1]) / ((p[i] + p[i - 1]) / 2) for i in turns]
    if len(steps) >= 5: out['trades_bounce'] = np.mean(steps)
    if n >= 20:
        net = np.interp(np.linspace(0, V, 21), np.r_[0, np.cumsum(q)], np.r_[0, np.cumsum(s * q)])
        out['trades_toxicity'] = abs(np.diff(net)).sum() / V
        out['trades_impact'] = impact_plain(k, p, q, s, close - length, length)
    middles = middles_plain(book, k)
    paid = 2e4 * s * (p - middles) / middles
    ok = np.isfinite(paid)
    if 2 * ok.sum() > n: out['trades_spread'] = (q * paid)[ok].sum() / q[ok].sum()
    return [out[c] for c in TRADES_COLUMNS]


def test_tape_against_plain_python():
    ours = trades_at_bars(TAPE, 'AAA/USDT', CLOSES, MINUTE, BOOK)
    plain = np.array([tape_plain(TAPE, BOOK, c, MINUTE) for c in CLOSES])
    np.testing.assert_allclose(ours, plain, rtol=1e-6, atol=1e-7)
    there = np.isfinite(ours).mean(0)
    assert (there[:5] > .9).all() and .05 < there[5] < 1 and (there < 1).all()


def around(frame, close, length, back):
    "Rows known in a bar and some time before it"
    known = us(frame.known)
    return frame[(known <= close) & (known > close - length - back)]


def shuffled(frame, seed): return frame.sample(frac=1, random_state=seed).sort_values(['known', 'time'], kind='stable')


CLOSE_AND_LENGTH = dict(
    seed=st.integers(0, 10**6), at=st.integers(0, len(CLOSES) - 1), length=st.sampled_from([MINUTE, MINUTE // 2, 1]))


@settings(max_examples=25, deadline=None)
@given(**CLOSE_AND_LENGTH)
def test_a_close_alone_from_the_books_around_it_gives_the_same_bits(seed, at, length):
    book, close = quiet(orderbook_frame, messy_book(200, seed)), CLOSES[at]
    whole = orderbook_at_bars(book, 'AAA/USDT', CLOSES, length)
    part = orderbook_at_bars(around(book, close, length, 2 * BOOK_AGE), 'AAA/USDT', [close], length)
    equal(part[0], whole[at])


@settings(max_examples=25, deadline=None)
@given(**CLOSE_AND_LENGTH)
def test_a_close_alone_from_the_trades_around_it_gives_the_same_bits(seed, at, length):
    book, tape = quiet(orderbook_frame, messy_book(200, seed)), trades_frame(messy_tape(600, seed))
    whole = trades_at_bars(tape, 'AAA/USDT', CLOSES, length, book)
    close = CLOSES[at]
    near, nearby = around(tape, close, length, TRADE_AGE), around(book, close, length, 2 * BOOK_AGE + MIDDLE_AGE)
    equal(trades_at_bars(near, 'AAA/USDT', [close], length, nearby)[0], whole[at])
    equal(trades_at_bars(shuffled(tape, seed % 1000), 'AAA/USDT', CLOSES, length, book), whole)


def test_nothing_is_used_before_it_is_known():
    "Rows known after a close, however early their time, leave every value up to that close as it was"
    at, upto = 20, slice(21)
    late_book, late_trade = (us(f.known) > CLOSES[at] for f in (BOOK, TAPE))
    book = BOOK.assign(**{c: np.where(late_book, BOOK[c] * 7, BOOK[c]) for c in level_names(12)})
    tape = TAPE.assign(price=np.where(late_trade, TAPE.price * 7, TAPE.price),
                       buyer_is_maker=TAPE.buyer_is_maker ^ late_trade)
    A, B = (orderbook_at_bars(b, 'AAA/USDT', CLOSES, MINUTE) for b in (BOOK, book))
    equal(B[upto], A[upto])
    A, B = (trades_at_bars(t, 'AAA/USDT', CLOSES, MINUTE, b) for t, b in ((TAPE, BOOK), (tape, book)))
    equal(B[upto], A[upto])
    assert (np.nan_to_num(A[at + 1:]) != np.nan_to_num(B[at + 1:])).any()


HOSTILE = st.sampled_from([np.nan, np.inf, -np.inf, 0., -1., 1e-300, 1e300, 99., 100., 101., 1e10])


hostile_book = st.tuples(st.integers(-600, 600), st.integers(-30, 400), st.lists(HOSTILE, min_size=8, max_size=8))


@settings(max_examples=60, deadline=None)
@given(st.lists(hostile_book, max_size=25))
def test_hostile_books(rows):
    names = level_names(2)
    times = [[START + pd.Timedelta(t, 's'), START + pd.Timedelta(t + d, 's'), 'AAA/USDT', *v] for t, d, v in rows]
    raw = pd.DataFrame(times, columns=['time', 'known', 'symbol', *names]).astype(dict.fromkeys(names, float))
    as_it_came = raw.assign(**{c: pd.DatetimeIndex(raw[c], tz='UTC') for c in ('time', 'known')})
    closes = T0 + MINUTE * np.arange(-11, 20)
    for frame in (quiet(orderbook_frame, raw), as_it_came):
        out = pd.DataFrame(orderbook_at_bars(frame, 'AAA/USDT', closes, MINUTE), columns=ORDERBOOK_COLUMNS)
        assert not np.isinf(out).any(axis=None)
        bounded = out[[c for c in out if 'imbalance' in c]]
        assert (bounded.isna() | (bounded.abs() <= 1 + 1e-12)).all(axis=None)
        assert (out.orderbook_spread.dropna() > 0).all()


SIDES = st.sampled_from([True, False, 'buy', 'sell', None, 'x', 1, 0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), HOSTILE, HOSTILE, SIDES), max_size=60))
def test_hostile_trades(rows):
    stamped = [[START + pd.Timedelta(t, 's'), *row] for t, *row in rows]
    raw = pd.DataFrame(stamped, columns=['time', 'price', 'quantity', 'side'])
    frame = quiet(trades_frame, raw.astype(dict(price=float, quantity=float)), symbol='AAA/USDT')
    assert len(frame) == sum(0 < p < np.inf and 0 < q < np.inf and s not in (None, 'x') for _, p, q, s in rows)
    out = pd.DataFrame(trades_at_bars(frame, 'AAA/USDT', T0 + MINUTE * np.arange(3), MINUTE), columns=TRADES_COLUMNS)
    assert not np.isinf(out).any(axis=None)
    for c, low in (('trades_flow', -1), ('trades_count_flow', -1), ('trades_toxicity', 0)):
        assert out[c].dropna().between(low - 1e-6, 1 + 1e-6).all()


def test_books_left_out_are_told():
    with pytest.warns(UserWarning, match=r'crossed or locked \(first in row'): orderbook_frame(messy_book())


def test_trades_left_out_are_told():
    raw = messy_tape()
    raw.loc[3, 'quantity'], raw.loc[5, 'price'] = 0., np.nan
    says = ('2 of 3200 trades left out: 1 without a positive price .first in row 5., '
            '1 without a positive quantity .first in row 3')
    with pytest.warns(UserWarning, match=says): trades_frame(raw)


@pytest.mark.parametrize('change, says', [
    (lambda b: None, 'NoneType is no frame'),
    (lambda b: b.drop(columns='timestamp'), 'no column time'),
    (lambda b: b.drop(columns='bid_size_4'), 'bid_size_4'),
    (lambda b: b.drop(columns=level_names(12)), 'bid_price_1'),
    (lambda b: b.assign(symbol=None), 'no symbol'),
    (lambda b: b.assign(known=b.known - pd.Timedelta('5h')), 'zones'),
    (lambda b: b.assign(bid_price_2='much'), 'no numbers'),
])
def test_books_that_cannot_be_read_are_refused(change, says):
    with pytest.raises(DataError, match=says): quiet(orderbook_frame, change(messy_book(20)))


@pytest.mark.parametrize('change, says', [
    (lambda t: t.drop(columns='price'), 'no column price'),
    (lambda t: t.assign(timestamp='soon'), 'cannot be read'),
])
def test_trades_that_cannot_be_read_are_refused(change, says):
    with pytest.raises(DataError, match=says): quiet(trades_frame, change(messy_tape(20)))


def test_a_negative_delay_is_refused():
    with pytest.raises(DataError, match='negative'): orderbook_frame(messy_book(20).drop(columns='known'), delay='-1s')


def test_frames_of_a_vendor_are_not_yet_ours():
    tape, book = messy_tape(20), messy_book(20)
    with pytest.raises(DataError, match='trades_frame'): trades_at_bars(tape, 'AAA/USDT', CLOSES, MINUTE)
    with pytest.raises(DataError, match='orderbook_frame'): orderbook_at_bars(book, 'AAA/USDT', CLOSES, MINUTE)


@pytest.mark.parametrize('column', ['time', 'known'])
def test_texts_are_no_times_in_a_frame_of_ours(column):
    frame = BOOK.assign(**{column: BOOK[column].astype(str)})
    with pytest.raises(DataError, match='time and known are no times'):
        orderbook_at_bars(frame, 'AAA/USDT', CLOSES, MINUTE)


@pytest.mark.parametrize('closes, length, says', [
    pytest.param(CLOSES[::-1], MINUTE, 'out of order', id='backwards'),
    pytest.param(CLOSES, 2 * MINUTE, 'bars overlap', id='overlap'),
    pytest.param(CLOSES / 2, MINUTE, 'whole microseconds', id='fractions'),
    pytest.param(CLOSES, 0, 'length of a bar positive', id='no length'),
])
def test_closes_that_are_none_are_refused(closes, length, says):
    with pytest.raises(DataError, match=says): orderbook_at_bars(BOOK, 'AAA/USDT', closes, length)


@pytest.mark.parametrize('f, frame, columns', [
    pytest.param(orderbook_at_bars, BOOK, ORDERBOOK_COLUMNS, id='book'),
    pytest.param(trades_at_bars, TAPE, TRADES_COLUMNS, id='trades'),
])
def test_nothing_in_nothing_out(f, frame, columns):
    assert f(frame, 'AAA/USDT', np.empty(0, np.int64), MINUTE).shape == (0, len(columns))
    for nothing in (frame[:0], frame[frame.symbol == 'BBB/USDT']):
        assert np.isnan(f(nothing, 'AAA/USDT', CLOSES, MINUTE)).all()
    for elsewhere in (CLOSES - 10**12, CLOSES + 10**12):
        assert np.isnan(f(frame, 'AAA/USDT', elsewhere, MINUTE)).all()


def test_frames_without_rows():
    assert quiet(orderbook_frame, messy_book()[:0]).shape == (0, 51)
    assert len(trades_frame(messy_tape()[:0])) == 0


WRITTEN = {
    'ms': lambda s: s.dt.as_unit('ms').astype('int64'),
    's text': lambda s: s.astype(str),
    'naive': lambda s: s.dt.tz_localize(None),
    'zone': lambda s: s.dt.tz_convert('America/New_York'),
    'ns': lambda s: s.dt.as_unit('ns'),
}


def milliseconds_of(raw): return raw.assign(timestamp=raw.timestamp.dt.floor('ms'), known=raw.known.dt.floor('ms'))


@pytest.mark.parametrize('way', WRITTEN)
def test_times_of_any_kind(way):
    raw = milliseconds_of(messy_book(200))
    other = raw.assign(timestamp=WRITTEN[way](raw.timestamp), known=WRITTEN[way](raw.known))
    pd.testing.assert_frame_equal(quiet(orderbook_frame, other), quiet(orderbook_frame, raw))


def test_columns_of_any_name():
    raw = milliseconds_of(messy_book(200))
    other = raw.rename(columns=dict(timestamp='Time', symbol='Symbol'))
    other['Symbol'] = other.Symbol.str.replace('/', '')
    pd.testing.assert_frame_equal(quiet(orderbook_frame, other), quiet(orderbook_frame, raw))


def test_a_frame_in_another_zone_and_unit():
    frame = quiet(orderbook_frame, milliseconds_of(messy_book(200)))
    tokyo = frame.assign(known=frame.known.dt.tz_convert('Asia/Tokyo').dt.as_unit('ns'))
    a, b = (orderbook_at_bars(f, 'AAA/USDT', CLOSES, MINUTE) for f in (frame, tokyo))
    equal(a, b)


def test_unpublished_rows_wait():
    for f, frame in ((orderbook_at_bars, BOOK), (trades_at_bars, TAPE)):
        later = us(frame.known) > CLOSES[20]
        waiting = f(frame.assign(known=frame.known.mask(later)), 'AAA/USDT', CLOSES[:21], MINUTE)
        equal(waiting, f(frame, 'AAA/USDT', CLOSES[:21], MINUTE))


NOW = START + pd.Timedelta('30s')


def test_books_of_a_live_bot():
    def polled(i):
        "A book each second, its answer stamped by a clock that is 40 ms behind"
        at = NOW + pd.Timedelta(f'{i}s')
        book = dict(bids=[[100 - k, 1 + k] for k in range(25)], asks=[[101 + k, 2] for k in range(25)])
        return book_row(book | dict(timestamp=int(at.timestamp() * 1000)), 'AAA/USDT', at - pd.Timedelta('40ms'))
    books = pd.concat([polled(i) for i in range(29)])
    state, within = np.split(orderbook_at_bars(books, 'AAA/USDT', [T0 + MINUTE], MINUTE)[0], [8])
    assert np.isfinite(state).all() and np.isnan(within).all()            # 28 of 60 seconds were watched
    out = orderbook_at_bars(books, 'AAA/USDT', [T0 + MINUTE], 50 * SECOND)[0]
    assert np.isfinite(out).all() and out[8] == 0


def test_trades_of_a_live_bot():
    polled = [dict(id=str(i), timestamp=NOW.value // 10**6 + i, side='buy' if i % 3 else 'sell', price=100., amount='2')
              for i in range(30)]
    first = trade_rows(polled[:20], 'AAA/USDT', NOW + pd.Timedelta('1s'))
    again = trade_rows(polled, 'AAA/USDT', NOW + pd.Timedelta('20s'))
    out = trades_at_bars(pd.concat([first, again]), 'AAA/USDT', [T0 + MINUTE], MINUTE)[0]
    assert np.allclose(out[:2], 1 / 3)


@pytest.mark.parametrize('bad', [
    None, {}, dict(bids=[[1]], asks=[[2, 1]]), dict(bids=[['x', 1]], asks=[[2, 1]]),
    dict(bids=[[2, 1]], asks=[[2, 1]]), dict(bids=[[1, 0]], asks=[[2, 1]]),
])
def test_a_book_that_is_none_is_refused_where_it_was_read(bad):
    with pytest.raises(DataError, match='AAA/USDT'): book_row(bad, 'AAA/USDT', NOW)


def bars(n, length, seed=0, start=T0):
    rng = np.random.default_rng(seed)
    share, volume = np.clip(.5 + .15 * rng.standard_normal(n), 0, 1), rng.lognormal(2, 1, n)
    close = 100 * np.exp(np.cumsum(1e-3 * rng.standard_t(4, n) + 1e-3 * (share - .5)))
    open = np.r_[100, close[:-1]]
    high, low = np.maximum(open, close) * 1.0005, np.minimum(open, close) / 1.0005
    taker, time = share * volume, (start + length * np.arange(n)) / 1e6
    return np.column_stack([open, high, low, close, volume, volume * close, np.ceil(volume * 3), taker, time])


def table(X, length, book=None, tape=None):
    "Inputs of the engine for bars with their sources, and the numbers of the bars"
    close = np.round(X[:, -1] * 1e6).astype(np.int64) + length
    Z = np.full((len(X), len(INPUTS)), np.nan)
    a, b = len(BARS), len(BARS) + len(ORDERBOOK_COLUMNS)
    Z[:, :a] = X
    if book is not None: Z[:, a:b] = orderbook_at_bars(book, 'AAA/USDT', close, length)
    if tape is not None: Z[:, b:] = trades_at_bars(tape, 'AAA/USDT', close, length, book)
    return Z, close // length - 1


def features(engine, X, number): return dict(zip(FEATURES, engine.run(X, number)))


def present(Y): return [c for c in FEATURES if np.isfinite(Y[c]).any()]


def test_compiled_named_and_documented(engine):
    assert engine.plain == [] and len(FEATURES) >= 20
    taken = {c for f in TECHNICAL for c in f.out} | {f.name for f in TECHNICAL} | set(INPUTS)
    assert not taken & ({c for f in MICROSTRUCTURE for c in f.out} | {f.name for f in MICROSTRUCTURE})
    for f in MICROSTRUCTURE:
        for c, keep, formula, unit in zip(f.out, f.doc['feature'], f.doc['formula'], f.doc['unit']):
            assert not keep or formula and unit, c


def test_a_missing_source_is_missing(engine):
    X, number = table(bars(400, MINUTE), MINUTE)
    assert present(features(engine, X, number)) == OF_BARS
    X[:, BARS.index('taker_buy_volume')] = np.nan
    assert present(features(engine, X, number)) == ['amihud_24', 'trade_size_ratio_24_168']


def test_stream(engine):
    X, number = table(bars(36, MINUTE), MINUTE, BOOK, TAPE)
    live = Engine(needed(), FEATURES, INPUTS, block=16)
    M = live.memory()
    rows = [live.run(X[t:t + 1], number[t:t + 1], M)[:, 0] for t in range(len(X))]
    equal(np.array(rows).T, engine.run(X, number))


@pytest.mark.parametrize('start', [1, 100, 333])
def test_warm_up(engine, start):
    X, number = table(bars(900, HOUR), HOUR)
    first, settle = (chained(ordered(needed(), INPUTS), key, INPUTS) for key in ('first', 'settle'))
    Y, Z = features(engine, X, number), features(engine, np.ascontiguousarray(X[start:]), number[start:])
    for c in OF_BARS:
        begin, settled = first[c] - 1, settle[c] - 1
        assert np.isnan(Z[c][:begin]).all() and np.isfinite(Z[c][begin:]).all(), c
        np.testing.assert_allclose(Z[c][settled:], Y[c][start + settled:], rtol=1e-9, atol=1e-12, err_msg=c)


@pytest.mark.parametrize('t', [10, 24, 35])
def test_truncation(engine, t):
    X, end = bars(36, MINUTE), T0 + MINUTE * t
    known_book, known_tape = BOOK[us(BOOK.known) <= end], TAPE[us(TAPE.known) <= end]
    whole, cut = engine.run(*table(X, MINUTE, BOOK, TAPE)), engine.run(*table(X[:t], MINUTE, known_book, known_tape))
    equal(cut, whole[:, :t])


FREE = [c for f in MICROSTRUCTURE for c, a, b in zip(f.out, f.doc['scale_free'], f.doc['feature']) if a and b]


def test_other_price_level_and_size_of_the_coin(engine):
    book = BOOK.assign(**{c: BOOK[c] * (1e-7 if 'price' in c else 1e5) for c in level_names(12)})
    tape = TAPE.assign(price=TAPE.price * 1e-7, quantity=TAPE.quantity * 1e5)
    X = bars(400, MINUTE)
    small = X * np.r_[[1e-7] * 4, 1e5, 1e-2, 1, 1e5, 1]
    for ours, theirs in (((BOOK, TAPE), (book, tape)), ((None, None), (None, None))):
        Y, Z = features(engine, *table(X, MINUTE, *ours)), features(engine, *table(small, MINUTE, *theirs))
        for c in FREE: np.testing.assert_allclose(Z[c], Y[c], rtol=1e-5, atol=1e-6, err_msg=c)
        if ours[0] is not None:                          # twelve levels, and never 24 bars in a row
            assert set(FREE) - set(present(Y)) == {'book_imbalance_20', 'liquidity_score_24'}
    assert set(FEATURES) - set(FREE) == {'kyle_lambda_168', 'amihud_24'}


def flat(X): X[:, :4] = 100
def silent(X): X[:, 4:8] = 0
def even(X): X[:, 7] = X[:, 4] / 2


@pytest.mark.parametrize('market, values', [
    (flat, dict(amihud_24=0, kyle_lambda_168=0, flow_correlation_168=0)),
    (silent, dict(vpin_24=0, flow_correlation_168=0, trade_size_ratio_24_168=0, amihud_24=np.nan)),
    (silent, dict(kyle_lambda_168=np.nan)),
    (even, dict(vpin_168=0, flow_correlation_168=0, kyle_impact_168=np.nan)),
])
def test_markets_that_stand_still(engine, market, values):
    X, number = table(bars(400, MINUTE), MINUTE)
    market(X)
    Y = features(engine, X, number)
    for c, v in values.items(): np.testing.assert_allclose(Y[c][-100:], v, atol=1e-9, err_msg=c)


@pytest.fixture(scope='module')
def real_hour():
    "Book and tape of ETH/BTC, not a single row left out, and the closes of its minutes"
    data = Path(os.environ['CRYPTOML_DATA'])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        book = orderbook_frame(pd.read_parquet(data / 'orderbook_l2_ethbtc.parquet'))
        tape = trades_frame(pd.read_parquet(data / 'trades_2020_11_01.parquet'))
    first, last = us(book.known)[[0, -1]] // MINUTE
    return book, tape[tape.symbol == 'ETH/BTC'], np.arange(first + 2, last + 1) * MINUTE


@real
def test_a_close_alone_of_a_real_book_and_tape(real_hour):
    book, tape, close = real_hour
    A, R = orderbook_at_bars(book, 'ETH/BTC', close, MINUTE), trades_at_bars(tape, 'ETH/BTC', close, MINUTE, book)
    assert np.isfinite(A).all() and np.isfinite(R[:, :2]).all()
    for t in range(0, len(close), 7):
        near, trades = around(book, close[t], MINUTE, 2 * BOOK_AGE), around(tape, close[t], MINUTE, TRADE_AGE)
        equal(orderbook_at_bars(near, 'ETH/BTC', close[t:t + 1], MINUTE)[0], A[t])
        equal(trades_at_bars(trades, 'ETH/BTC', close[t:t + 1], MINUTE, near)[0], R[t])


@real
def test_flow_of_a_real_book_goes_with_its_price(real_hour):
    book, _, close = real_hour
    A = pd.DataFrame(orderbook_at_bars(book, 'ETH/BTC', close, MINUTE), columns=ORDERBOOK_COLUMNS)
    row = np.searchsorted(us(book.known), np.r_[close[0] - MINUTE, close], 'right') - 1
    move = np.diff((book.bid_price_1 + book.ask_price_1).to_numpy()[row]) / 2e-6
    assert np.corrcoef(A.orderbook_flow_5, move)[0, 1] > .4


@real
def test_flow_of_a_real_tape_in_pandas(real_hour):
    _, tape, close = real_hour

    def flow(g):
        if not len(g): return np.nan
        return np.where(g.buyer_is_maker, -g.quantity, g.quantity).sum() / g.quantity.sum()
    plain = tape.set_index('known').groupby(pd.Grouper(freq='min', label='right', closed='right')).apply(flow)
    ours = trades_at_bars(tape, 'ETH/BTC', close, MINUTE)[:, 0]
    np.testing.assert_allclose(ours, plain.reindex(utc(close)).to_numpy(), rtol=1e-9)


@real
def test_tape_agrees_with_the_taker_volume_of_its_bar():
    "The hour of the tape that the klines hold as well: same share of taker buys"
    data = Path(os.environ['CRYPTOML_DATA'])
    tape = trades_frame(pd.read_parquet(data / 'trades_2020_11_01.parquet'), delay='0s')
    klines = pd.read_parquet(data / 'spot_1h_full_klines.parquet').set_index('timestamp')
    bar = klines.loc[pd.Timestamp('2020-11-01 09:00', tz='UTC')]
    flow = trades_at_bars(tape, 'BTC/USDT', [bar.name.value // 1000 + HOUR], HOUR)[0, 0]
    assert flow == pytest.approx(2 * bar.taker_buy_base / bar.volume - 1, abs=1e-9)


@real
def test_hourly_bars_of_three_years(engine):
    k = pd.read_parquet(Path(os.environ['CRYPTOML_DATA']) / 'spot_1h_full_klines.parquet')
    k = k.rename(columns=dict(taker_buy_base='taker_buy_volume'))
    k = k[k.timestamp == k.timestamp.dt.floor('h')]
    seconds = k.timestamp.dt.as_unit('s').astype('int64').to_numpy()
    X = np.full((len(k), len(INPUTS)), np.nan)
    X[:, :len(BARS)] = np.column_stack([k[list(BARS[:-1])].to_numpy(float), seconds])
    Y = features(engine, X, seconds // 3600)
    assert not np.isinf(np.array(list(Y.values()))).any()

    r, V, P, N = np.diff(np.log(X[:, 3]), prepend=np.nan), X[:, 4], X[:, 1:4].mean(1), X[:, 6]
    excess = 2 * X[:, 7] - V
    flow, money = excess * P, V * P
    whole = np.flatnonzero(seconds - np.roll(seconds, 200) == 200 * 3600)[::97]      # windows without a missing hour
    assert len(whole) > 50
    for t in whole:
        w, d = slice(t - 167, t + 1), slice(t - 23, t + 1)
        slope = np.cov(r[w], flow[w])[0, 1] / flow[w].var(ddof=1)
        day, week = (money[s].sum() / N[s].sum() for s in (d, w))
        plain = dict(
            vpin_168=abs(excess[w]).sum() / V[w].sum(),
            kyle_lambda_168=1e10 * slope,
            kyle_impact_168=1e4 * slope * money[w].mean(),
            flow_correlation_168=np.corrcoef(r[w], flow[w])[0, 1],
            amihud_24=1e10 * abs(r[d]).sum() / money[d].sum(),
            trade_size_ratio_24_168=np.log(day / week),
        )
        for c, v in plain.items(): assert Y[c][t] == pytest.approx(v, rel=1e-6), c
