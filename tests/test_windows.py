"""Windows: any panel, any sample, against slicing by hand; nothing after the decision is read"""
from dataclasses import replace
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from cryptoml.data import DataError, to_panel
from cryptoml.simulate import simulate
from cryptoml.targets import realised_correlation
from cryptoml.windows import (Scaler, Windows, batches, dates, describe, grid, memory, missing, months, relate,
                              trailing_correlation, trailing_spans)


def make(N, T, F, L, K, step, seed=0):
    g = torch.Generator().manual_seed(seed)
    past = torch.randn(N, T, F, generator=g)
    future = torch.randn(T + K * step, 4, generator=g)
    static = torch.randn(N, 3, 2, generator=g)
    pairs = torch.randn(N, N, 3, 2, generator=g)
    month = torch.arange(T) * 3 // T
    usable = torch.rand(N, T, generator=g) > .3
    labels = dict(y=torch.randn(N, T, 2, generator=g), k=torch.randint(3, (N, T), generator=g))
    moves = torch.randn(N, T, generator=g).masked_fill(torch.rand(N, T, generator=g) < .05, torch.nan)
    return Windows(past, future, static, pairs, month, moves, usable, labels, L, K, step, spans=(9, 14))


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(1, 4),
    extra=st.integers(0, 30),
    F=st.integers(1, 5),
    L=st.integers(1, 12),
    K=st.integers(1, 4),
    step=st.integers(1, 5),
    W=st.integers(1, 4),
    apart=st.integers(1, 6),
    seed=st.integers(0, 99))
def test_batch_is_slicing(N, extra, F, L, K, step, W, apart, seed):
    T = L + (W - 1) * apart + extra
    w = make(N, T, F, L, K, step, seed)
    first = torch.arange(L - 1, T - (W - 1) * apart)
    b = w.batch(first, W, apart)
    for i, d in enumerate(first.tolist()):
        assert torch.equal(b['past'][i], w.past[:, d - L + 1:d + (W - 1) * apart + 1])
        assert torch.equal(b['static'][i], w.static[:, w.month[d]])
        assert torch.equal(b['pairs'][i], w.pairs[:, :, w.month[d]])
        for j in range(W):
            t = d + j * apart
            assert torch.equal(b['future'][i, j, :, :4], w.future[[t + step * k for k in range(1, K + 1)]])
            assert torch.equal(b['y'][i, j], w.labels['y'][:, t])
            assert torch.equal(b['k'][i, j], w.labels['k'][:, t])
            assert torch.equal(b['present'][i, j], w.usable[:, t])
            until = torch.cat([torch.full((N, 14), torch.nan), w.moves[:, :t + 1]], 1)[:, -14:]
            torch.testing.assert_close(b['trailing'][i, j], trailing_correlation(until, w.spans), equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(1, 120),
    L=st.integers(1, 20),
    W=st.integers(1, 4),
    apart=st.integers(1, 6),
    seed=st.integers(0, 999))
def test_runs_by_a_loop(T, L, W, apart, seed):
    rng = np.random.default_rng(seed)
    ok = rng.random((2, T)) < .3
    rows = rng.random(T) < .9
    bar = np.arange(T) + rng.integers(1000)

    def possible(t):
        decisions = [t + j * apart for j in range(W)]
        whole = all(d < T and rows[d] for d in decisions)
        return whole and any(ok[:, d].any() for d in decisions)

    met = []
    for phase in range(W * apart):
        want = [t for t in range(L - 1, T) if bar[t] % (W * apart) == phase and possible(t)]
        assert dates(ok, rows, bar, L, W, apart, phase).tolist() == want
        met += want
    assert len(met) == len(set(met))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), stride=st.integers(1, 9))
def test_phases_hold_each_sample_once(seed, stride):
    rng = np.random.default_rng(seed)
    ok = rng.random((3, 50)) < .7
    bar = np.arange(50) + rng.integers(1000)
    met = np.zeros(ok.shape, int)
    for phase in range(stride):
        part = grid(ok, bar, stride, phase)
        assert (bar[part.bar] % stride == phase).all()
        met[part.coin, part.bar] += 1
    assert np.array_equal(met, ok.astype(int))
    assert np.array_equal(grid(ok, bar).of(met), np.ones(ok.sum()))


def test_later_bars_do_not_reach_the_past():
    w = make(2, 60, 3, 8, 2, 3)
    date = torch.tensor([20, 33])
    before = w.batch(date, 2, 4)['past'].clone()
    w.past[:, 25:33] = 1e9
    assert torch.equal(w.batch(date, 2, 4)['past'][0], before[0])
    w.past[:, 38:] = 1e9
    assert torch.equal(w.batch(date, 2, 4)['past'][0], before[0])


def test_no_copy_of_the_panel():
    w = make(4, 5000, 20, 64, 2, 3)
    held = w.past.untyped_storage().nbytes()
    assert held == w.past.numel() * 4 and w.to('cpu').past.data_ptr() == w.past.data_ptr()
    assert w.batch(torch.tensor([100, 200]))['past'].numel() == 2 * 4 * 64 * 20


MEMORY = {'15min': (2880, 400), 'h': (720, 100), '4h': (180, 30), 'D': (120, 30)}   # bars, and returns among them

def panel(n, seed, holes=0., freq='h', bars=24 * 75):
    rng = np.random.default_rng(seed)
    time = pd.date_range('2024-01-15', periods=bars, freq=freq, tz='UTC')
    close = np.exp(np.cumsum(rng.normal(0, .01, len(time)) + rng.normal(0, .01, (n, len(time))), 1))
    close[rng.random(close.shape) < holes] = np.nan
    return time, close


@pytest.mark.parametrize('bars', [1, 6000])
@pytest.mark.parametrize('freq', MEMORY)
def test_months_by_a_loop(freq, bars):
    time, _ = panel(1, 0, freq=freq, bars=bars)
    month, before = months(time)
    number = [(t.year - 2024) * 12 + t.month - 1 for t in time]
    assert month.tolist() == number
    for m, part in enumerate(before):
        assert part.stop == number.index(m)
        assert part.start == max(part.stop - MEMORY[freq][0], 0)


@pytest.mark.parametrize('freq', MEMORY)
def test_descriptors_by_a_loop(freq):
    memory, enough = MEMORY[freq]
    time, close = panel(3, 5, .1, freq, 10_000 if freq == '15min' else 1800)
    volume = np.random.default_rng(6).lognormal(5, 1, close.shape)
    got, month = describe(time, close, volume)
    hours = (time[1] - time[0]) / pd.Timedelta('1h')
    ret = pd.DataFrame(np.diff(np.log(close), axis=1, prepend=np.nan).T)
    market = ret.mean(axis=1).fillna(0)
    for m, n in np.ndindex(got.shape[1], 3):
        first = int((month == m).argmax())
        r = ret[n][max(first - memory, 0):first].dropna()
        if len(r) < enough:
            assert not got[n, m].any()
            continue
        beta = r.cov(market[r.index]) / market[r.index].var(ddof=0)
        turnover = np.median((close[n] * volume[n])[r.index])
        want = [np.log(r.std(ddof=0) / hours ** .5) + 5, (np.log(turnover / hours) - 13) / 3, (beta - 1) / .5]
        assert np.allclose(got[n, m], np.clip(want, -5, 5), atol=1e-4)
    assert got[:, -1].all()


@pytest.mark.parametrize('holes', [0., .1])
def test_relations_by_a_loop(holes):
    time, close = panel(4, 0, holes)
    got = relate(time, close)
    ret = np.diff(np.log(close), axis=1, prepend=np.nan)
    s = int(np.flatnonzero(time.month == 2)[0])
    for m, first in enumerate([0, s, int(np.flatnonzero(time.month == 3)[0])]):
        r = pd.DataFrame(ret[:, max(0, first - 720):first].T)
        if not len(r):
            assert not got[:, :, m].any()
            continue
        z = r - r.mean()
        market = z.mean(axis=1)
        beta = {i: (z[i] * market).sum() / (market[z[i].notna()] ** 2).sum() for i in z}
        rest = pd.DataFrame({i: z[i] - market * beta[i] for i in z})
        rest = (rest / np.sqrt((rest ** 2).mean())).clip(-3, 3)
        unit = z / np.sqrt((z ** 2).mean())
        for i in range(4):
            for j in range(4):
                if i == j:
                    assert not got[i, j, m].any()
                    continue
                assert abs(got[i, j, m, 0] - (unit[i] * unit[j]).mean()) < 1e-5
                after = (rest[i] * rest[j].shift(1)).dropna()
                assert abs(got[i, j, m, 1] - after.sum() / np.sqrt(len(after))) < 1e-4


def test_relations_of_a_month_know_earlier_months_only_and_no_order():
    time, close = panel(5, 1, .05)
    base = relate(time, close)
    order = [3, 1, 4, 0, 2]
    assert np.allclose(relate(time, close[order]), base[order][:, order], atol=1e-5)
    late = close.copy()
    late[:, time.month == 3] *= 7
    assert np.array_equal(relate(time, late)[:, :, :3], base[:, :, :3])


def test_relations_without_history_are_zero():
    time, close = panel(3, 2)
    close[1, :] = np.nan                    # never there
    close[2, :24 * 16 - 50] = np.nan        # there for 50 bars of the first month
    got = relate(time, close)
    assert np.isfinite(got).all()
    assert not got[1].any()
    assert not got[:, 1].any()
    assert not got[2, :, 1].any()
    assert got[2, 0, 2].any()
    assert relate(time, close[:1]).shape == (1, 1, 3, 2)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999))
def test_scale_never_sees_later_rows(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_t(2, (2, 300, 4)) * 10. ** rng.integers(-6, 6, 4)
    x[rng.random(x.shape) < .1] = np.nan
    rows = np.zeros((2, 300), bool)
    rows[:, :150] = True
    a = Scaler.fit(x, rows)
    y = x.copy()
    y[:, 150:] = rng.normal(size=(2, 150, 4)) * 1e6
    b = Scaler.fit(y, rows)
    assert np.array_equal(a.center, b.center) and np.array_equal(a.scale, b.scale)
    z = a(x)
    assert np.isfinite(z).all()
    assert np.abs(z).max() <= a.clip
    assert (z[np.isnan(x)] == 0).all()


@pytest.mark.parametrize('season', [24, 168, 7])
def test_a_scale_from_some_rows_does_not_know_the_hour(season):
    "Even where one row in as many is drawn as the season has, it is seen as a whole"
    t = np.arange(season * 400)
    x = np.stack([np.sin(2 * np.pi * t / season), t % season < season / 6, t / len(t)], -1)[None].repeat(3, 0)
    rows = np.ones(x.shape[:2], bool)
    rows[0, :1000] = False
    few = rows.sum() // season
    part, again, whole = (Scaler.fit(x, rows, limit) for limit in (few, few, 10**9))
    assert np.array_equal(part.center, again.center) and np.array_equal(part.scale, again.scale)
    assert np.allclose(part.center, whole.center, atol=.15)
    assert np.allclose(part.scale, whole.scale, rtol=.2)
    assert np.allclose(Scaler.fit(x, rows, rows.sum()).center, whole.center)


def test_missing_share_and_bad_input():
    x = np.full((1, 4, 3), np.nan)
    x[0, 1:, 0] = 1
    assert missing(x, dict(a=[0], b=[1, 2])).tolist() == [[[1, 1], [0, 1], [0, 1], [0, 1]]]
    with pytest.raises(DataError, match='no training bar'): Scaler.fit(x, np.zeros((1, 4), bool))


def test_batches_keep_order_without_a_generator_and_cover_with_one():
    ids = torch.arange(103)
    assert torch.equal(torch.cat(batches(ids, 10)), ids)
    shuffled = torch.cat(batches(ids, 10, torch.Generator().manual_seed(0)))
    assert len(shuffled) == 100 == len(shuffled.unique())       # the last three are less than half a batch
    assert len(batches(ids[:3], 10, torch.Generator().manual_seed(0))) == 1


# ---- correlations just past

def by_loop(moves, span, least):
    "Fisher's z of each pair over the last bars, by its definition"
    N = len(moves)
    z = np.full((N, N), np.nan)
    for i in range(N):
        for j in range(N):
            a, b = moves[i, -span:], moves[j, -span:]
            both = np.isfinite(a) & np.isfinite(b)
            if i == j or both.sum() < least: continue
            a, b = a[both], b[both]
            if (a ** 2).sum() * (b ** 2).sum() == 0: continue
            rho = (a * b).sum() / np.sqrt((a ** 2).sum() * (b ** 2).sum())
            z[i, j] = np.arctanh(np.clip(rho, -.999, .999))
    return z


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), share=st.sampled_from([0, .2, .5]))
def test_trailing_correlations_by_a_loop(seed, share):
    rng = np.random.default_rng(seed)
    moves = rng.normal(0, .01, (4, 60)) + rng.normal(0, .01, 60)
    moves[3] = 2 * moves[0]                                       # as close as can be
    if seed % 2: moves[2] = 0                                     # a feed that stands still
    moves[rng.random(moves.shape) < share] = np.nan
    got = trailing_correlation(torch.from_numpy(moves), (10, 24, 60)).numpy()
    for k, (span, least) in enumerate([(10, 8), (24, 18), (60, 45)]):
        np.testing.assert_allclose(got[..., k], by_loop(moves, span, least), atol=1e-9)
    assert np.array_equal(got, got.transpose(1, 0, 2), equal_nan=True)


def test_a_window_that_has_passed_is_the_label_of_its_first_bar(bars=48):
    "Where a bar opens at the close of the one before"
    market = to_panel(simulate(3, 400, seed=1).bars)
    values = market.values.copy()
    opens = values[:, :, market.columns.index('open')]
    values[:, :-1, market.columns.index('close')] = opens[:, 1:]
    market = replace(market, values=values)
    z = realised_correlation(market, bars)
    moves = torch.from_numpy(np.diff(np.log(market['close']), axis=1, prepend=np.nan))
    for t in (60, 200, 330):                                      # the returns of bars t + 1 to t + bars
        passed = trailing_correlation(moves[:, :t + bars + 1], (bars,))[..., 0]
        np.testing.assert_allclose(passed, z[:, t], atol=1e-5)


def test_no_bar_length_needs_more_past_than_a_forecaster_has():
    for timeframe in ('1m', '5m', '15m', '1h', '4h', '12h', '1d'):
        spans = trailing_spans(timeframe)
        assert list(spans) == sorted(spans) and spans[0] >= 8
        assert spans[-1] <= memory(timeframe)
