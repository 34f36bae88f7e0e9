"""Microstructure: brute force on messy books and tapes, cuts on both sides, stream, hostile frames, clocks, warm-up, real data"""
import os, warnings
from pathlib import Path
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from cryptoml.data import DataError
from cryptoml.engine import BARS, Engine, chained, ordered
from cryptoml.microstructure import (BOOK_AGE, MICROSTRUCTURE, MIDDLE_AGE, ORDERBOOK_COLUMNS, SECOND, TRADE_AGE, TRADES_COLUMNS, book_row, level_names, orderbook_at_bars,
                                     orderbook_frame, trade_rows, trades_at_bars, trades_frame)
from cryptoml.technical import TECHNICAL

START, MINUTE = pd.Timestamp('2024-03-09 23:00', tz='UTC'), 60 * SECOND
T0 = START.value // 1000
INPUTS = (*BARS, *ORDERBOOK_COLUMNS, *TRADES_COLUMNS)
FEATURES = [c for f in MICROSTRUCTURE for c, keep in zip(f.out, f.doc['feature']) if keep]
OF_BARS = ['vpin_24', 'vpin_168', 'kyle_lambda_168', 'kyle_impact_168', 'flow_correlation_168', 'amihud_24', 'trade_size_ratio_24_168']
real = pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')
us = lambda s: pd.DatetimeIndex(s).as_unit('us').asi8


def needed():
    "The chapter's families and those of the technical chapter they read"
    maker, out = {c: f for f in (*TECHNICAL, *MICROSTRUCTURE) for c in f.out}, list(MICROSTRUCTURE)
    for f in out: out += [g for g in dict.fromkeys(maker[c] for c in f.inputs if c in maker) if g not in out]
    return out


@pytest.fixture(scope='module')
def engine(): return Engine(needed(), FEATURES, INPUTS)


def messy_book(n=500, seed=0, levels=12):
    "Books at uneven times: some late, repeated, revised, thin, crossed or broken, all out of order"
    rng = np.random.default_rng(seed)
    middle = 100 * np.exp(np.cumsum(2e-4 * rng.standard_normal(n)))
    time = np.sort(rng.integers(1, 1800, n)) * SECOND + np.where(np.arange(n) > n // 2, 400 * SECOND, 0)         # a pause longer than the age
    delay = np.where(rng.random(n) < .1, rng.integers(1, 400, n), 0) * SECOND + rng.integers(0, 200_000, n)
    raw = dict(timestamp=pd.to_datetime(T0 + time, unit='us', utc=True), known=pd.to_datetime(T0 + time + delay, unit='us', utc=True), symbol=np.where(rng.random(n) < .9, 'AAA/USDT', 'BBB/USDT'))
    for side, way in (('bid', -1), ('ask', 1)):
        far = np.cumsum(rng.choice([.01, .02, .05], (n, levels)), 1)
        size = rng.choice([1., 2, 5, 10], (n, levels))
        size[rng.random(n) < .1, 7] = rng.choice([0, np.nan, -1])
        for k in range(levels): raw |= {f'{side}_price_{k + 1}': np.round(middle + way * far[:, k], 4), f'{side}_size_{k + 1}': size[:, k]}
    raw = pd.DataFrame(raw)
    raw.loc[rng.random(n) < .03, 'bid_price_1'] *= 1.01                                                            # crossed
    raw.loc[rng.random(n) < .03, 'ask_size_1'] = np.nan
    again = raw.sample(min(n, 30), random_state=seed)
    revised = again.assign(known=again.known + pd.to_timedelta(rng.integers(0, 90, len(again)), 's'), bid_size_1=7.)
    return pd.concat([raw, again, revised]).sample(frac=1, random_state=seed, ignore_index=True)


def messy_tape(n=3000, seed=0):
    "Trades, some late or sent again, out of order"
    rng = np.random.default_rng(seed)
    time = np.sort(rng.integers(1, 2200 * 1000, n)) * 1000
    time[(time > 900 * SECOND) & (time < 1000 * SECOND)] += 100 * SECOND
    time = np.sort(time)
    delay = np.where(rng.random(n) < .05, rng.integers(1, 100, n), 0) * SECOND + rng.integers(0, 200_000, n)
    side = np.where(rng.random(n) < .5, 1, -1)
    raw = pd.DataFrame(dict(timestamp=pd.to_datetime(T0 + time, unit='us', utc=True), known=pd.to_datetime(T0 + time + delay, unit='us', utc=True), symbol=np.where(rng.random(n) < .9, 'AAAUSDT', 'BBBUSDT'),
                            id=np.arange(n).astype(str), price=np.round(100 * np.exp(np.cumsum(2e-5 * rng.standard_normal(n))) + .02 * side, 4), quantity=rng.choice([.1, .5, 1, 3], n), side=np.where(side > 0, 'buy', 'sell')))
    again = raw.sample(min(n, 200), random_state=seed)
    return pd.concat([raw, again.assign(known=again.known + pd.to_timedelta(rng.integers(1, 100, len(again)), 's'))]).sample(frac=1, random_state=seed, ignore_index=True)


def quiet(f, raw, **options):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f(raw, **options)


CLOSES = T0 + MINUTE * np.r_[1:12, 14:37]                                         # two bars are missing
BOOK, TAPE = quiet(orderbook_frame, messy_book()), trades_frame(messy_tape())


def book_plain(frame, close, length, levels=12):
    "One close, row by row in plain Python"
    rows = []
    for r in frame[frame.symbol == 'AAA/USDT'].sort_values(['known', 'time'], kind='stable').itertuples():
        t, k = r.time.value // 1000, r.known.value // 1000
        if k > close or k - t > BOOK_AGE: continue
        side = {s: [(getattr(r, f'{s}_price_{i}'), getattr(r, f'{s}_size_{i}')) for i in range(1, levels + 1)] for s in ('bid', 'ask')}
        for s in side:
            good = [p > 0 and q > 0 for p, q in side[s]]
            side[s] = side[s][:good.index(False) if False in good else levels]
        if rows and t < max(x[0] for x in rows): continue
        rows.append((t, k, side['bid'], side['ask']))
    groups = lambda k: (0 if k <= close - length else 1)
    newest = lambda rows: [a for a, b in zip(rows, rows[1:] + [(None, None)]) if not (a[0] == b[0] and groups(a[1]) == groups(b[1]))]
    rows, out = newest(rows), dict.fromkeys(ORDERBOOK_COLUMNS, np.nan)
    share = lambda b, a: (b - a) / (b + a)
    volume = lambda side, k: sum(q for _, q in side[:k]) if len(side) >= k else np.nan
    width = lambda b, a: 2e4 * (a[0][0] - b[0][0]) / (a[0][0] + b[0][0])
    if rows and close - rows[-1][0] <= BOOK_AGE:
        _, _, b, a = rows[-1]
        m, far = (b[0][0] + a[0][0]) / 2, {}
        for k in (1, 5, 20): out[f'orderbook_imbalance_{k}'] = share(volume(b, k), volume(a, k))
        out['orderbook_spread'] = width(b, a)
        out['orderbook_microprice'] = 1e4 * ((a[0][0] * b[0][1] + b[0][0] * a[0][1]) / (a[0][1] + b[0][1]) - m) / m
        if min(len(a), len(b)) >= 10:
            db, da = ([1e4 * abs(p - m) / m for p, _ in s[:10]] for s in (b, a))
            reach = min(db[-1], da[-1]) + 1e-9
            out['orderbook_depth_imbalance'] = share(*(sum(q for d, (_, q) in zip(ds, s) if d <= reach) for ds, s in ((db, b), (da, a))))
            fit = [sum(d * m * volume(s, i + 1) for i, d in enumerate(ds)) / sum(d * d for d in ds) for ds, s in ((db, b), (da, a))]
            out['orderbook_slope_imbalance'], out['orderbook_slope'] = share(*fit), sum(fit) / 2
    inside = [i for i, r in enumerate(rows) if r[1] > close - length]
    watched, flows = 0, {1: [], 5: []}
    for i in inside:
        gap = rows[i][1] - rows[i - 1][1] if i else np.inf
        if gap <= BOOK_AGE: watched += min(gap, rows[i][1] - close + length)
        for k in flows:
            e = np.nan
            if gap <= BOOK_AGE and all(len(rows[j][s]) >= k for j in (i, i - 1) for s in (2, 3)):
                e = 0
                for (p1, q1), (p0, q0) in zip(rows[i][2][:k], rows[i - 1][2][:k]): e += q1 if p1 > p0 else -q0 if p1 < p0 else q1 - q0
                for (p1, q1), (p0, q0) in zip(rows[i][3][:k], rows[i - 1][3][:k]): e -= q1 if p1 < p0 else -q0 if p1 > p0 else q1 - q0
            flows[k].append(e / k)
    mean = lambda v: np.nanmean(v) if 2 * np.isfinite(v).sum() > len(v) else np.nan
    if inside and 2 * watched >= length:
        depth = {k: mean([(volume(rows[i][2], k) + volume(rows[i][3], k)) / (2 * k) for i in inside]) for k in flows}
        out['orderbook_flow'], out['orderbook_flow_5'] = (len(inside) * mean(flows[k]) / depth[k] for k in (1, 5))
        out['orderbook_mean_spread'] = np.mean([width(*rows[i][2:]) for i in inside])
        out['orderbook_mean_imbalance_5'] = mean([share(volume(rows[i][2], 5), volume(rows[i][3], 5)) for i in inside])
    return [out[c] for c in ORDERBOOK_COLUMNS]


def test_book_against_plain_python():
    ours = orderbook_at_bars(BOOK, 'AAAUSDT', CLOSES, MINUTE)
    plain = np.array([book_plain(BOOK, c, MINUTE) for c in CLOSES])
    np.testing.assert_allclose(ours, plain, rtol=1e-8, atol=1e-8)
    there = np.isfinite(ours).mean(0)
    assert there[2] == 0 and (np.delete(there, 2) > .4).all() and (there < 1).all()          # twelve levels: no imbalance of twenty


def tape_plain(frame, book, close, length):
    "One close, trade by trade in plain Python"
    seen, rows = set(), []
    for r in frame[frame.symbol == 'AAA/USDT'].sort_values(['known', 'time'], kind='stable').itertuples():
        k, t = r.known.value // 1000, r.time.value // 1000
        if k > close or k - t > TRADE_AGE: continue
        if r.id in seen: continue
        seen.add(r.id)
        if k > close - length: rows.append((k, r.price, r.quantity, -1 if r.buyer_is_maker else 1))
    out = dict.fromkeys(TRADES_COLUMNS, np.nan)
    if not rows: return [out[c] for c in TRADES_COLUMNS]
    k, p, q, s = (np.array(v) for v in zip(*rows))
    V, n = q.sum(), len(q)
    out['trades_flow'], out['trades_count_flow'] = (s * q).sum() / V, s.mean()
    turn = [1e4 * s[i] * (p[i] - p[i - 1]) / ((p[i] + p[i - 1]) / 2) for i in range(1, n) if s[i] != s[i - 1]]
    if len(turn) >= 5: out['trades_bounce'] = np.mean(turn)
    if n >= 20:
        net = np.interp(np.linspace(0, V, 21), np.r_[0, np.cumsum(q)], np.r_[0, np.cumsum(s * q)])
        out['trades_toxicity'] = abs(np.diff(net)).sum() / V
        buys, sells = np.flatnonzero(s > 0), np.flatnonzero(s < 0)
        if len(buys) and len(sells):
            begin = max(buys[0], sells[0])
            middle = lambda i: np.log(p[buys[buys <= i][-1]] * p[sells[sells <= i][-1]]) / 2
            slot = np.minimum((k - (close - length) - 1) * 20 // length, 19)
            at = [begin] + [max([begin, *np.flatnonzero(slot <= j)[-1:]]) for j in range(20)]
            r, x = np.diff([middle(i) for i in at]), np.array([(s * q)[slot == j].sum() / V for j in range(20)])
            out['trades_impact'] = 1e4 * np.polyfit(x, r, 1)[0]
    books = book[(book.symbol == 'AAA/USDT') & (book.known - book.time <= pd.Timedelta(BOOK_AGE, 'us'))]
    books = books[books.time >= books.time.cummax()]
    middles = []
    for when in k:
        known = books[us(books.known) < when].tail(1)
        fresh = len(known) and when - known.time.iloc[0].value // 1000 <= MIDDLE_AGE
        middles.append((known.bid_price_1.iloc[0] + known.ask_price_1.iloc[0]) / 2 if fresh else np.nan)
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


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), at=st.integers(0, len(CLOSES) - 1), length=st.sampled_from([MINUTE, MINUTE // 2, 1]))
def test_a_close_alone_from_the_rows_around_it_gives_the_same_bits(seed, at, length):
    book, tape = quiet(orderbook_frame, messy_book(200, seed)), trades_frame(messy_tape(600, seed))
    cut = lambda f, back: f[(us(f.known) <= CLOSES[at]) & (us(f.known) > CLOSES[at] - length - back)]
    for f, frame, back, more in ((orderbook_at_bars, book, 2 * BOOK_AGE, {}), (trades_at_bars, tape, TRADE_AGE, dict(orderbook=book))):
        whole = f(frame, 'AAA/USDT', CLOSES, length, **more)
        part = f(cut(frame, back), 'AAA/USDT', CLOSES[at:at + 1], length, **{k: cut(v, 2 * BOOK_AGE + MIDDLE_AGE) for k, v in more.items()})
        np.testing.assert_array_equal(part[0], whole[at])
        np.testing.assert_array_equal(f(frame.sample(frac=1, random_state=seed % 1000).sort_values(['known', 'time'], kind='stable') if f is trades_at_bars else frame, 'AAA/USDT', CLOSES, length, **more), whole)


def test_nothing_is_used_before_it_is_known():
    "Rows known after a close, however early their time, leave every value up to that close as it was"
    at = 20
    later = lambda f: (us(f.known) > CLOSES[at])
    wild = BOOK.assign(**{c: np.where(later(BOOK), BOOK[c] * 7, BOOK[c]) for c in level_names(12)})
    trades = TAPE.assign(price=np.where(later(TAPE), TAPE.price * 7, TAPE.price), buyer_is_maker=TAPE.buyer_is_maker ^ later(TAPE))
    np.testing.assert_array_equal(orderbook_at_bars(wild, 'AAA/USDT', CLOSES, MINUTE)[:at + 1], orderbook_at_bars(BOOK, 'AAA/USDT', CLOSES, MINUTE)[:at + 1])
    a, b = trades_at_bars(trades, 'AAA/USDT', CLOSES, MINUTE, wild), trades_at_bars(TAPE, 'AAA/USDT', CLOSES, MINUTE, BOOK)
    np.testing.assert_array_equal(a[:at + 1], b[:at + 1])
    assert (np.nan_to_num(a[at + 1:]) != np.nan_to_num(b[at + 1:])).any()


HOSTILE = st.sampled_from([np.nan, np.inf, -np.inf, 0., -1., 1e-300, 1e300, 99., 100., 101., 1e10])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-600, 600), st.integers(-30, 400), st.lists(HOSTILE, min_size=8, max_size=8)), max_size=25))
def test_hostile_books(rows):
    raw = pd.DataFrame([dict(zip(level_names(2), v)) | dict(time=START + pd.Timedelta(t, 's'), known=START + pd.Timedelta(t + d, 's'), symbol='AAA/USDT') for t, d, v in rows], columns=['time', 'known', 'symbol', *level_names(2)])
    raw = raw.astype(dict.fromkeys(level_names(2), float))
    closes = T0 + MINUTE * np.arange(-11, 20)
    for frame in (quiet(orderbook_frame, raw), raw.assign(time=pd.DatetimeIndex(raw.time, tz='UTC'), known=pd.DatetimeIndex(raw.known, tz='UTC'))):          # also as it came
        out = orderbook_at_bars(frame, 'AAA/USDT', closes, MINUTE)
        assert not np.isinf(out).any()
        for c in (0, 1, 2, 5, 6, 11): assert (np.abs(out[:, c][np.isfinite(out[:, c])]) <= 1 + 1e-12).all()
        assert (out[:, 3][np.isfinite(out[:, 3])] > 0).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), HOSTILE, HOSTILE, st.sampled_from([True, False, 'buy', 'sell', None, 'x', 1, 0])), max_size=60))
def test_hostile_trades(rows):
    raw = pd.DataFrame([dict(time=START + pd.Timedelta(t, 's'), price=p, quantity=q, side=s) for t, p, q, s in rows], columns=['time', 'price', 'quantity', 'side']).astype(dict(price=float, quantity=float))
    frame = quiet(trades_frame, raw, symbol='AAA/USDT')
    assert len(frame) == sum(0 < p < np.inf and 0 < q < np.inf and s not in (None, 'x') for _, p, q, s in rows)
    out = trades_at_bars(frame, 'AAA/USDT', T0 + MINUTE * np.arange(3), MINUTE)
    assert not np.isinf(out).any()
    for c, low in ((0, -1), (1, -1), (2, 0)): assert ((out[:, c] >= low - 1e-6) & (out[:, c] <= 1 + 1e-6) | np.isnan(out[:, c])).all()


def test_rows_left_out_are_told():
    with pytest.warns(UserWarning, match=r'crossed or locked \(first in row'): orderbook_frame(messy_book())
    raw = messy_tape().assign(quantity=lambda t: t.quantity.where(t.index != 3, 0.), price=lambda t: t.price.where(t.index != 5, np.nan))
    with pytest.warns(UserWarning, match='2 of 3200 trades left out: 1 without a positive price .first in row 5., 1 without a positive quantity .first in row 3'): trades_frame(raw)


def test_frames_that_cannot_be_read_are_refused():
    book, tape = messy_book(20), messy_tape(20)
    for f, raw, text in ((orderbook_frame, None, 'NoneType is no frame'), (orderbook_frame, book.drop(columns='timestamp'), 'no column time'), (orderbook_frame, book.drop(columns='bid_size_4'), 'bid_size_4'),
                         (orderbook_frame, book.drop(columns=level_names(12)), 'bid_price_1'), (orderbook_frame, book.assign(symbol=None), 'no symbol'), (orderbook_frame, book.assign(known=book.known - pd.Timedelta('5h')), 'zones'),
                         (orderbook_frame, book.assign(bid_price_2='much'), 'no numbers'), (trades_frame, tape.drop(columns='price'), 'no column price'), (trades_frame, tape.assign(timestamp='soon'), 'cannot be read')):
        with pytest.raises(DataError, match=text): quiet(f, raw)
    with pytest.raises(DataError, match='negative'): orderbook_frame(book.drop(columns='known'), delay='-1s')
    with pytest.raises(DataError, match='trades_frame'): trades_at_bars(tape, 'AAA/USDT', CLOSES, MINUTE)
    with pytest.raises(DataError, match='orderbook_frame'): orderbook_at_bars(book, 'AAA/USDT', CLOSES, MINUTE)
    for closes, length in ((CLOSES[::-1], MINUTE), (CLOSES, 2 * MINUTE), (CLOSES / 2, MINUTE), (CLOSES, 0)):
        with pytest.raises(DataError): orderbook_at_bars(BOOK, 'AAA/USDT', closes, length)


def test_nothing_in_nothing_out():
    for f, frame, columns in ((orderbook_at_bars, BOOK, ORDERBOOK_COLUMNS), (trades_at_bars, TAPE, TRADES_COLUMNS)):
        assert f(frame, 'AAA/USDT', np.empty(0, np.int64), MINUTE).shape == (0, len(columns))
        for nothing in (frame[:0], frame[frame.symbol == 'BBB/USDT']): assert np.isnan(f(nothing, 'AAA/USDT', CLOSES, MINUTE)).all()
        assert np.isnan(f(frame, 'AAA/USDT', CLOSES - 10**12, MINUTE)).all() and np.isnan(f(frame, 'AAA/USDT', CLOSES + 10**12, MINUTE)).all()
    assert quiet(orderbook_frame, messy_book()[:0]).shape == (0, 51) and len(trades_frame(messy_tape()[:0])) == 0


@pytest.mark.parametrize('way', ['ms', 's text', 'naive', 'zone', 'ns', 'named'])
def test_times_of_any_kind(way):
    raw = messy_book(200)
    raw = raw.assign(timestamp=raw.timestamp.dt.floor('ms'), known=raw.known.dt.floor('ms'))
    made = {'ms': lambda s: s.dt.as_unit('ms').astype('int64'), 's text': lambda s: s.astype(str), 'naive': lambda s: s.dt.tz_localize(None), 'zone': lambda s: s.dt.tz_convert('America/New_York'), 'ns': lambda s: s.dt.as_unit('ns'), 'named': lambda s: s}[way]
    other = raw.assign(timestamp=made(raw.timestamp), known=made(raw.known))
    if way == 'named': other = other.rename(columns=dict(timestamp='Time', symbol='Symbol')).assign(Symbol=lambda f: f.Symbol.str.replace('/', ''))
    pd.testing.assert_frame_equal(quiet(orderbook_frame, other), quiet(orderbook_frame, raw))
    frame = quiet(orderbook_frame, raw)
    np.testing.assert_array_equal(orderbook_at_bars(frame.assign(known=frame.known.dt.tz_convert('Asia/Tokyo').dt.as_unit('ns')), 'AAA/USDT', CLOSES, MINUTE), orderbook_at_bars(frame, 'AAA/USDT', CLOSES, MINUTE))


def test_rows_of_a_live_bot():
    now = START + pd.Timedelta('30s')
    books = pd.concat([book_row(dict(bids=[[100 - k, 1 + k] for k in range(25)], asks=[[101 + k, 2] for k in range(25)], timestamp=int((now + pd.Timedelta(f'{i}s')).timestamp() * 1000)), 'AAA/USDT', now + pd.Timedelta(f'{i}s') - pd.Timedelta('40ms')) for i in range(29)])
    out = orderbook_at_bars(books, 'AAA/USDT', [T0 + MINUTE], MINUTE)[0]
    assert np.isfinite(out[:8]).all() and np.isnan(out[8:]).all()                    # 28 of 60 seconds were watched
    out = orderbook_at_bars(books, 'AAA/USDT', [T0 + MINUTE], 50 * SECOND)[0]
    assert np.isfinite(out).all() and out[8] == 0
    polled = [dict(id=str(i), timestamp=now.value // 10**6 + i, side='buy' if i % 3 else 'sell', price=100., amount='2', symbol='AAA/USDT') for i in range(30)]
    tape = pd.concat([trade_rows(polled[:20], 'AAA/USDT', now + pd.Timedelta('1s')), trade_rows(polled, 'AAA/USDT', now + pd.Timedelta('20s'))])
    out = trades_at_bars(tape, 'AAA/USDT', [T0 + MINUTE], MINUTE)[0]
    assert np.allclose(out[:2], 1 / 3)
    for bad in (None, {}, dict(bids=[[1]], asks=[[2, 1]]), dict(bids=[['x', 1]], asks=[[2, 1]]), dict(bids=[[2, 1]], asks=[[2, 1]]), dict(bids=[[1, 0]], asks=[[2, 1]])):
        with pytest.raises(DataError, match='AAA/USDT'): book_row(bad, 'AAA/USDT', now)


def bars(n, length, seed=0, start=T0):
    rng = np.random.default_rng(seed)
    share, volume = np.clip(.5 + .15 * rng.standard_normal(n), 0, 1), rng.lognormal(2, 1, n)
    close = 100 * np.exp(np.cumsum(1e-3 * rng.standard_t(4, n) + 1e-3 * (share - .5)))
    open = np.r_[100, close[:-1]]
    return np.column_stack([open, np.maximum(open, close) * 1.0005, np.minimum(open, close) / 1.0005, close, volume, volume * close, np.ceil(volume * 3), share * volume, (start + length * np.arange(n)) / 1e6])


def table(X, length, book=None, tape=None):
    close = np.round(X[:, -1] * 1e6).astype(np.int64) + length
    nothing = lambda names: np.full((len(X), len(names)), np.nan)
    return np.ascontiguousarray(np.hstack([X, nothing(ORDERBOOK_COLUMNS) if book is None else orderbook_at_bars(book, 'AAA/USDT', close, length), nothing(TRADES_COLUMNS) if tape is None else trades_at_bars(tape, 'AAA/USDT', close, length, book)])), close // length - 1


def test_compiled_named_and_documented(engine):
    assert engine.plain == [] and len(FEATURES) >= 20
    taken = {c for f in TECHNICAL for c in f.out} | {f.name for f in TECHNICAL} | set(INPUTS)
    assert not taken & ({c for f in MICROSTRUCTURE for c in f.out} | {f.name for f in MICROSTRUCTURE})
    for f in MICROSTRUCTURE:
        for c, keep, formula, unit in zip(f.out, f.doc['feature'], f.doc['formula'], f.doc['unit']): assert not keep or formula and unit, c


def test_a_missing_source_is_missing(engine):
    X, number = table(bars(400, MINUTE), MINUTE)
    Y = dict(zip(FEATURES, engine.run(X, number)))
    assert [c for c in FEATURES if np.isfinite(Y[c]).any()] == OF_BARS
    no_taker = X.copy()
    no_taker[:, BARS.index('taker_buy_volume')] = np.nan
    Y = dict(zip(FEATURES, engine.run(no_taker, number)))
    assert [c for c in FEATURES if np.isfinite(Y[c]).any()] == ['amihud_24', 'trade_size_ratio_24_168']


def test_stream_and_warm_up(engine):
    X, number = table(bars(36, MINUTE), MINUTE, BOOK, TAPE)
    Y, live = engine.run(X, number), Engine(needed(), FEATURES, INPUTS, block=16)
    M = live.memory()
    np.testing.assert_array_equal(np.array([live.run(X[t:t + 1], number[t:t + 1], M)[:, 0] for t in range(len(X))]).T, Y)
    X, number = table(bars(900, 60 * MINUTE), 60 * MINUTE)
    first, settle = (chained(ordered(needed(), INPUTS), key, INPUTS) for key in ('first', 'settle'))
    Y = dict(zip(FEATURES, engine.run(X, number)))
    for start in (1, 100, 333):
        Z = dict(zip(FEATURES, engine.run(np.ascontiguousarray(X[start:]), number[start:])))
        for c in OF_BARS:
            assert np.isnan(Z[c][:first[c] - 1]).all() and np.isfinite(Z[c][first[c] - 1:]).all(), c
            np.testing.assert_allclose(Z[c][settle[c] - 1:], Y[c][start + settle[c] - 1:], rtol=1e-9, atol=1e-12, err_msg=c)


def test_truncation(engine):
    X, number = table(bars(36, MINUTE), MINUTE, BOOK, TAPE)
    Y = engine.run(X, number)
    for t in (10, 24, 35):
        end = T0 + MINUTE * t
        Z = engine.run(*table(bars(36, MINUTE)[:t], MINUTE, BOOK[us(BOOK.known) <= end], TAPE[us(TAPE.known) <= end]))
        np.testing.assert_array_equal(Z, Y[:, :t])


def test_other_price_level_and_size_of_the_coin(engine):
    free = [c for f in MICROSTRUCTURE for c, a, b in zip(f.out, f.doc['scale_free'], f.doc['feature']) if a and b]
    names = level_names(12)
    book = BOOK.assign(**{c: BOOK[c] * (1e-7 if 'price' in c else 1e5) for c in names})
    tape = TAPE.assign(price=TAPE.price * 1e-7, quantity=TAPE.quantity * 1e5)
    X = bars(400, MINUTE)
    small = X * np.r_[[1e-7] * 4, 1e5, 1e-2, 1, 1e5, 1]
    for source in ((BOOK, book, TAPE, tape), (None,) * 4):
        Y, Z = (dict(zip(FEATURES, engine.run(*table(x, MINUTE, b, t)))) for x, b, t in ((X, source[0], source[2]), (small, source[1], source[3])))
        for c in free: np.testing.assert_allclose(Z[c], Y[c], rtol=1e-5, atol=1e-6, err_msg=c)
        assert source[0] is None or {c for c in free if not np.isfinite(Y[c]).any()} == {'book_imbalance_20', 'liquidity_score_24'}          # twelve levels, and never 24 bars in a row
    assert set(FEATURES) - set(free) == {'kyle_lambda_168', 'amihud_24'}


def test_markets_that_stand_still(engine):
    X, number = table(bars(400, MINUTE), MINUTE)
    flat, silent, even = X.copy(), X.copy(), X.copy()
    flat[:, :4] = 100
    silent[:, 4:8] = 0
    even[:, 7] = even[:, 4] / 2
    for Z, values in ((flat, dict(amihud_24=0, kyle_lambda_168=0, flow_correlation_168=0)), (silent, dict(vpin_24=0, flow_correlation_168=0, trade_size_ratio_24_168=0, amihud_24=np.nan, kyle_lambda_168=np.nan)), (even, dict(vpin_168=0, flow_correlation_168=0, kyle_impact_168=np.nan))):
        Y = dict(zip(FEATURES, engine.run(Z, number)))
        for c, v in values.items(): np.testing.assert_allclose(Y[c][-100:], v, atol=1e-9, err_msg=c)


@real
def test_an_hour_of_a_real_book_and_tape(engine):
    data = Path(os.environ['CRYPTOML_DATA'])
    with warnings.catch_warnings():
        warnings.simplefilter('error')                                                # not a single row is left out
        book, tape = orderbook_frame(pd.read_parquet(data / 'orderbook_l2_ethbtc.parquet')), trades_frame(pd.read_parquet(data / 'trades_2020_11_01.parquet'))
    tape = tape[tape.symbol == 'ETH/BTC']
    close = np.arange(us(book.known)[0] // MINUTE + 2, us(book.known)[-1] // MINUTE + 1) * MINUTE
    A, R = orderbook_at_bars(book, 'ETH/BTC', close, MINUTE), trades_at_bars(tape, 'ETH/BTC', close, MINUTE, book)
    assert np.isfinite(A).all() and np.isfinite(R[:, :2]).all()
    cut = lambda f, c, back: f[(us(f.known) <= c) & (us(f.known) > c - MINUTE - back)]
    for t in range(0, len(close), 7):                                                  # truncation and stream
        near = cut(book, close[t], 2 * BOOK_AGE)
        np.testing.assert_array_equal(orderbook_at_bars(near, 'ETH/BTC', close[t:t + 1], MINUTE)[0], A[t])
        np.testing.assert_array_equal(trades_at_bars(cut(tape, close[t], TRADE_AGE), 'ETH/BTC', close[t:t + 1], MINUTE, near)[0], R[t])
    row = np.searchsorted(us(book.known), np.r_[close[0] - MINUTE, close], 'right') - 1
    move = np.diff((book.bid_price_1 + book.ask_price_1).to_numpy()[row]) / 2e-6
    assert np.corrcoef(A[:, ORDERBOOK_COLUMNS.index('orderbook_flow_5')], move)[0, 1] > .4
    same = tape.set_index('known').groupby(pd.Grouper(freq='min', label='right', closed='right')).apply(lambda g: np.where(g.buyer_is_maker, -g.quantity, g.quantity).sum() / g.quantity.sum() if len(g) else np.nan)
    np.testing.assert_allclose(R[:, 0], same.reindex(pd.to_datetime(close, unit='us', utc=True)).to_numpy(), rtol=1e-9)


@real
def test_tape_agrees_with_the_taker_volume_of_its_bar():
    "The hour of the tape that the klines hold as well: same share of taker buys"
    data = Path(os.environ['CRYPTOML_DATA'])
    tape = trades_frame(pd.read_parquet(data / 'trades_2020_11_01.parquet'), delay='0s')
    bar = pd.read_parquet(data / 'spot_1h_full_klines.parquet').set_index('timestamp').loc[pd.Timestamp('2020-11-01 09:00', tz='UTC')]
    hour = 60 * MINUTE
    flow = trades_at_bars(tape, 'BTC/USDT', [bar.name.value // 1000 + hour], hour)[0, 0]
    assert flow == pytest.approx(2 * bar.taker_buy_base / bar.volume - 1, abs=1e-9)


@real
def test_hourly_bars_of_three_years(engine):
    k = pd.read_parquet(Path(os.environ['CRYPTOML_DATA']) / 'spot_1h_full_klines.parquet').rename(columns=dict(taker_buy_base='taker_buy_volume'))
    k = k[k.timestamp == k.timestamp.dt.floor('h')]
    seconds = k.timestamp.dt.as_unit('s').astype('int64').to_numpy()
    X = np.column_stack([k[list(BARS[:-1])].to_numpy(float), seconds])
    X = np.hstack([X, np.full((len(X), len(INPUTS) - len(BARS)), np.nan)])
    Y = dict(zip(FEATURES, engine.run(X, seconds // 3600)))
    r, V = np.diff(np.log(X[:, 3]), prepend=np.nan), X[:, 4]
    flow, money = (2 * X[:, 7] - V) * X[:, 1:4].mean(1), V * X[:, 1:4].mean(1)
    whole = np.flatnonzero(seconds - np.roll(seconds, 200) == 200 * 3600)[::97]          # windows without a missing hour
    assert len(whole) > 50
    for t in whole:
        w, d = slice(t - 167, t + 1), slice(t - 23, t + 1)
        slope = np.cov(r[w], flow[w])[0, 1] / flow[w].var(ddof=1)
        plain = dict(vpin_168=abs(2 * X[w, 7] - V[w]).sum() / V[w].sum(), kyle_lambda_168=1e10 * slope, kyle_impact_168=1e4 * slope * money[w].mean(), flow_correlation_168=np.corrcoef(r[w], flow[w])[0, 1],
                     amihud_24=1e10 * abs(r[d]).sum() / money[d].sum(), trade_size_ratio_24_168=np.log(money[d].sum() / X[d, 6].sum() / money[w].sum() * X[w, 6].sum()))
        for c, v in plain.items(): assert Y[c][t] == pytest.approx(v, rel=1e-6), c
    assert not np.isinf(np.array(list(Y.values()))).any()
