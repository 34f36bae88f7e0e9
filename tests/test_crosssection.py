"Cross-sectional features: second implementations, hostile values, batch and live, the new columns, truncation, warm-up"
import os, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from cryptoml.crosssection import CROSS_BASE, CROSSSECTION, MINIMUM, Cross, cross_section, crosses, sections
from cryptoml.data import read_panel
from cryptoml.engine import BARS, Engine, chained, ordered
from cryptoml.simulate import simulate
from cryptoml.technical import TECHNICAL

needs_data = pytest.mark.skipif('CRYPTOML_DATA' not in os.environ, reason='CRYPTOML_DATA is not set: real data absent')
MAKER = {c: f for f in TECHNICAL + CROSS_BASE for c in f.out}
MADE = crosses(MAKER)
NAMES, KINDS = [f.name for f in MADE], [f.kind for f in MADE]
COLUMNS = list(dict.fromkeys(f.column for f in MADE))
TAKE = [COLUMNS.index(f.column) for f in MADE]
FIRST, SETTLE = (chained(ordered(TECHNICAL + CROSS_BASE), key) for key in ('first', 'settle'))
BOTH = ['rank', 'z']


def steps(columns):
    found, todo = [], [MAKER[c] for c in columns]
    while todo:
        f = todo.pop()
        if f in found: continue
        found.append(f)
        todo += [MAKER[c] for c in f.inputs if c in MAKER]
    return found


ENGINE, STREAM = (Engine(steps(COLUMNS), COLUMNS, block=b) for b in (128, 16))


def bars_of(panel):
    X = np.full((*panel.mask.shape, len(BARS)), np.nan)
    for j, c in enumerate(BARS):
        if c in panel.columns: X[:, :, j] = np.where(panel.mask, panel[c], np.nan)
    X[:, :, -1] = panel.time.as_unit('us').asi8 / 1e6
    return X


def two_stages(X, number, present):
    values = np.array([ENGINE.run(x, number) for x in X]).transpose(0, 2, 1)
    return cross_section(values, present, KINDS, take=TAKE)


def random_values(seed, N=14, T=120, F=2):
    "Ties, holes, infinities and a changing number of coins"
    rng = np.random.default_rng(seed)
    values = rng.standard_t(2, (N, T, F)).round(1)
    values[rng.random(values.shape) < .1] = np.nan
    values[rng.random(values.shape) < .02] = np.inf
    return values, rng.random((N, T)) < np.linspace(.1, 1, T)


def slowly(x, kind, minimum=MINIMUM):
    "One bar, written with counts and medians, from the definitions"
    good, y = np.isfinite(x), np.full(len(x), np.nan)
    v = x[good]
    if len(v) < minimum: return y
    if kind == 'rank':
        y[good] = [((v < a).sum() - (v > a).sum()) / (len(v) - 1) for a in v]
        return y
    from_median = v - np.median(v)
    mad = np.median(np.abs(from_median))
    y[good] = np.clip(from_median / (1.4826 * mad), -5, 5) if mad > 0 else 0
    return y


@pytest.mark.parametrize('seed', range(4))
def test_definitions(seed):
    values, present = random_values(seed)
    found = cross_section(values, present, BOTH)
    there = np.where(present[..., None], values, np.nan)
    for t in range(values.shape[1]):
        for c, kind in enumerate(BOTH):
            np.testing.assert_allclose(found[:, t, c], slowly(there[:, t, c], kind), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('N', [5, 6, 7, 30, 200])
def test_ranks_of_pandas(N):
    rng = np.random.default_rng(N)
    values = rng.normal(size=(N, 40, 1)).round(2 if N < 100 else 1)
    frame = pd.DataFrame(values[:, :, 0]).stack().rename('x').rename_axis(['coin', 'time']).reset_index()
    wanted = 2 * (frame.groupby('time').x.rank(method='average') - 1) / (N - 1) - 1
    found = cross_section(values, np.ones((N, 40), bool), ['rank'])
    np.testing.assert_allclose(found.ravel(), wanted, atol=1e-12)


def test_compiled_is_the_plain_function():
    values, present = random_values(7, T=40)
    out = np.empty((14, 40, 2))
    with np.errstate(all='ignore'): sections(values, present, [0, 1], [True, False], MINIMUM, out)
    np.testing.assert_array_equal(cross_section(values, present, BOTH), out)


def test_minimum():
    values = np.arange(8.)[:, None, None] + np.zeros((8, 8, 2))
    present = np.arange(8)[:, None] <= np.arange(8)                              # t + 1 coins at bar t
    found = cross_section(values, present, BOTH)
    assert np.isnan(found[:, :MINIMUM - 1]).all()
    for t in range(MINIMUM - 1, 8): assert (np.isfinite(found[:, t]) == present[:, t, None]).all()
    assert np.isfinite(cross_section(values, present, BOTH, minimum=2)).any(2).sum() == 35


# --- hostile values --------------------------------------------------------------------------

odd = [0., -0., 1., 1., 2., np.nan, np.inf, -np.inf, 5e-324, 1e-310, 1e299, -1e299, 1.7e308, -1.7e308]
numbers = st.one_of(st.sampled_from(odd), st.floats(width=64))


@st.composite
def bars(draw):
    "Values and presence of up to 12 coins at three bars, and another order of the coins"
    N = draw(st.integers(1, 12))
    values = draw(hnp.arrays(np.float64, (N, 3, 2), elements=numbers))
    return values, draw(hnp.arrays(np.bool_, (N, 3))), draw(st.permutations(range(N)))


def same(a, b): return a.tobytes() == b.tobytes()


@settings(max_examples=300, deadline=None)
@given(bars())
def test_hostile_values(case):
    "Bounds, missing where missing and nowhere else; the order of coins and absent coins change no bit"
    values, present, order = case
    y = cross_section(values, present, BOTH)
    good = present[:, :, None] & (np.abs(values) < 1e300)
    good &= (good.sum(0) >= MINIMUM)
    rank, z = y[..., 0], y[..., 1]
    assert (np.isfinite(y) == good).all() and not np.isinf(y).any()
    assert (np.abs(rank[good[..., 0]]) <= 1).all()
    assert (np.abs(z[good[..., 1]]) <= 5).all()
    assert same(cross_section(values[order], present[order], BOTH), y[order])
    for t in range(3):
        there = present[:, t]
        assert same(cross_section(values[there, t:t + 1], present[there, t:t + 1], BOTH), y[there, t:t + 1])


one_bar = st.tuples(st.integers(5, 12), st.just(1), st.just(1))


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.float64, one_bar, elements=st.floats(-1e6, 1e6)), st.integers(0, 11), numbers)
def test_one_freak_coin_moves_the_others_by_one_place(values, at, freak):
    N = len(values)
    values = np.repeat(values, 2, axis=1)
    values[at % N, 1] = freak if abs(freak) < 1e300 else 0.
    y = np.delete(cross_section(values, np.ones((N, 2), bool), ['rank'])[:, :, 0], at % N, 0)
    assert np.abs(y[:, 1] - y[:, 0]).max() <= 2 / (N - 1) + 1e-12


def test_symmetry_and_units():
    values, present = random_values(3)
    y = cross_section(values, present, BOTH)
    np.testing.assert_array_equal(cross_section(-values, present, BOTH), -y)
    np.testing.assert_array_equal(cross_section(values * 2.**40, present, BOTH), y)              # any unit
    finite = np.where(np.isinf(values), 1e6, values)
    squeezed = cross_section(np.arctan(values), present, ['rank', 'rank'])                       # any rising function
    np.testing.assert_array_equal(squeezed[..., 0], cross_section(finite, present, BOTH)[..., 0])
    assert np.abs(np.nansum(y[..., 0], 0)).max() < 1e-12                 # ranks of a bar have mean 0


# --- one array, many ways --------------------------------------------------------------------

def test_batch_live_threads_and_layouts():
    values, present = random_values(5, N=20, T=400)
    y = cross_section(values, present, BOTH)
    live = [cross_section(values[:, t:t + 1], present[:, t:t + 1], BOTH) for t in range(400)]
    np.testing.assert_array_equal(np.concatenate(live, 1), y)
    out = np.full((20, 400, 2), 7.)
    def part(a):
        rows = slice(a, a + 100)
        cross_section(values[:, rows], present[:, rows], BOTH, out=out[:, rows])
    with ThreadPoolExecutor(4) as pool: list(pool.map(part, range(0, 400, 100)))
    np.testing.assert_array_equal(out, y)


def test_any_layout_in_memory():
    values, present = random_values(5, N=20, T=400)
    y = cross_section(values, present, BOTH)
    read_only = np.asfortranarray(values)
    read_only.flags.writeable = False
    columns = np.ascontiguousarray(values.transpose(2, 0, 1)).transpose(1, 2, 0)
    backwards = np.ascontiguousarray(values[::-1])[::-1]
    for v in (read_only, columns, backwards): np.testing.assert_array_equal(cross_section(v, present, BOTH), y)


def test_columns_taken_twice_and_none():
    values, present = random_values(5, N=20, T=400)
    y = cross_section(values, present, BOTH)
    taken = cross_section(values, present, ['z', 'z', 'rank'], take=[1, 0, 0])
    np.testing.assert_array_equal(taken[..., [0, 2]], y[..., [1, 0]])
    assert cross_section(values[:0], present[:0], BOTH).shape == (0, 400, 2)
    assert cross_section(values[:, :0], present[:, :0], BOTH).shape == (20, 0, 2)
    assert cross_section(values, present, []).shape == (20, 400, 0)


@pytest.mark.parametrize('change, said', [
    (dict(values=np.zeros((6, 4))), r'values must be \[N, T, F\]'),
    (dict(present=np.ones((4, 6), bool)), r'present \[N, T\], got \(6, 4, 2\) and \(4, 6\)'),
    (dict(kinds=['rank', 'mean']), "got 'mean'"),
    (dict(kinds=['rank'] * 3), 'of 2: one each'),
    (dict(take=[0, 2]), r'\[0, 2\] of 2'),
    (dict(take=[0, -1]), 'one each, from 0'),
    (dict(minimum=1), 'got 1'),
    (dict(out=np.empty((6, 4, 3))), r'float64 \(6, 4, 2\)'),
    (dict(out=np.empty((6, 4, 2), np.float32)), 'got float32')], ids=lambda x: x if isinstance(x, str) else '')
def test_errors(change, said):
    good = dict(values=np.zeros((6, 4, 2)), present=np.ones((6, 4), bool), kinds=BOTH)
    with pytest.raises(ValueError, match=said): cross_section(**(good | change))


def test_importing_compiles_nothing():
    code = ('import sys, cryptoml.crosssection as c; assert c.compiled_sections.cache_info().currsize == 0; '
            'assert "torch" not in sys.modules')
    subprocess.run([sys.executable, '-c', code], check=True, cwd=Path(__file__).parents[1])


# --- the list of features ---------------------------------------------------------------------

def test_every_feature_is_documented():
    assert len(CROSSSECTION) >= 20
    assert all(isinstance(f, Cross) and all(vars(f).values()) for f in CROSSSECTION)
    assert {f.kind for f in CROSSSECTION} == set(BOTH)
    assert {f.unit for f in CROSSSECTION} == {'-1 to 1', '-5 to 5'}
    assert all(f.formula.count('{') == f.formula.count('}') for f in CROSSSECTION)


def test_every_feature_has_its_column():
    names = [f.name for f in CROSSSECTION]
    assert len(set(names)) == len(names)
    assert not set(names) & (set(MAKER) | set(BARS))
    assert {f.column for f in CROSSSECTION} - set(MAKER) == {'beta_market_168', 'beta_market_720'}
    assert [f.name for f in crosses(['beta_market_720'])] == ['rank_beta_720']
    assert crosses([]) == []


def test_new_columns_are_shared_and_each_is_used():
    assert not any(keep for f in CROSS_BASE for keep in f.doc['feature'])
    assert {c for f in CROSS_BASE for c in f.out} <= set(COLUMNS)
    assert ENGINE.plain == []
    assert max(FIRST[c] for c in COLUMNS) == 721


def reference(b):
    "CROSS_BASE in plain pandas: each window on its own"
    def total(x, p): return x.rolling(p).apply(np.sum, raw=True)
    r = np.log(b.close).diff()
    money = (b.high + b.low + b.close) / 3 * b.volume
    clv = ((2 * b.close - b.high - b.low) / (b.high - b.low)).where(b.high > b.low, 0.)
    return dict(
        cross_return_336=np.log(b.close / b.close.shift(336)),
        cross_return_720=np.log(b.close / b.close.shift(720)),
        cross_close_location_24=total(clv, 24) / 24,
        cross_size_168=np.log(total(money, 168) / 168),
        cross_illiquidity_168=np.log(total(r.abs(), 168) / total(money, 168)),
        cross_log_volatility_720=np.log((total(r**2, 720) / 720)**.5))


def compare(panel, n):
    there = panel.mask[n]
    theirs = reference(pd.DataFrame({c: panel[c][n, there] for c in panel.columns}))
    ours = pd.DataFrame(ENGINE.run(bars_of(panel)[n], panel.bar_number).T[there], columns=COLUMNS)
    for c, v in theirs.items():
        late = slice(max(FIRST[c] + 30, 800), None)
        assert np.abs(ours[c] - v)[late].max() / v.std() < 1e-9, c
        if there[:1500].all(): assert (ours[c].notna() == (np.arange(len(v)) >= FIRST[c] - 1)).all(), c


@pytest.fixture(scope='module')
def panel(): return read_panel(simulate(9, 1700, seed=2).bars)[0]


@pytest.fixture(scope='module')
def real():
    path = Path(os.environ['CRYPTOML_DATA']) / 'spot_1h.parquet'
    return read_panel(path, start='2023-12-15', end='2024-03-01')[0]


def test_new_columns_on_simulated_bars(panel): compare(panel, 4)


@needs_data
def test_new_columns_on_real_bars(real):
    for n in (0, 6): compare(real, n)


def test_a_coin_that_does_not_trade_is_not_ranked_by_money():
    "No volume for more than a week: no size, no illiquidity; and a price that never moved has no illiquidity"
    n = 900
    b = pd.DataFrame(dict.fromkeys(('open', 'high', 'low', 'close'), 100 + np.sin(np.arange(n))))
    X = b.assign(volume=np.where(np.arange(n) < 400, 3., 0.), time=0.).reindex(columns=BARS).to_numpy(float)
    columns = ['cross_size_168', 'cross_illiquidity_168']
    e = Engine(steps(columns), columns)
    Y = e.run(X, np.arange(n))
    assert np.isfinite(Y[:, 168:567]).all() and np.isnan(Y[:, 567:]).all()
    X[:, :4] = 100.
    X[:, 4] = 3.
    size, illiquidity = e.run(X, np.arange(n))
    assert np.isfinite(size[168:]).all() and np.isnan(illiquidity).all()


# --- both stages ------------------------------------------------------------------------------

def check_truncation(panel, cuts):
    X, number = bars_of(panel), panel.bar_number
    whole = two_stages(X, number, panel.mask)
    for t in cuts:
        cut = two_stages(X[:, :t + 1], number[:t + 1], panel.mask[:, :t + 1])
        np.testing.assert_array_equal(cut[:, t], whole[:, t])
    return whole


def test_truncation_on_simulated_bars(panel):
    whole = check_truncation(panel, (730, 1000, 1555))
    assert np.isfinite(whole[:, 720:]).all() and not np.isinf(whole).any()


@needs_data
def test_truncation_on_real_bars(real): check_truncation(real, (800, 1200, 1801))


def check_stream(panel, start):
    X, number = bars_of(panel), panel.bar_number
    whole = two_stages(X, number, panel.mask)
    M = [STREAM.memory() for _ in X]
    for x, m in zip(X, M): STREAM.run(x[:start], number[:start], m)
    for t in range(start, len(number)):
        values = np.array([STREAM.run(x[t:t + 1], number[t:t + 1], m) for x, m in zip(X, M)]).transpose(0, 2, 1)
        live = cross_section(values, panel.mask[:, t:t + 1], KINDS, take=TAKE)
        np.testing.assert_array_equal(live[:, 0], whole[:, t])


def test_stream_is_batch_on_simulated_bars(panel): check_stream(panel, 1400)


@needs_data
def test_stream_is_batch_on_real_bars(real): check_stream(real, 1500)


def test_start_is_forgotten_at_settle(panel):
    X, number = bars_of(panel), panel.bar_number
    whole = two_stages(X, number, panel.mask)
    for k in sorted({SETTLE[c] for c in COLUMNS}):
        at = [j for j, f in enumerate(MADE) if SETTLE[f.column] == k]
        for end in range(1100, 1700, 97):
            part = two_stages(X[:, end - k:end], number[end - k:end], panel.mask[:, end - k:end])[:, -1, at]
            np.testing.assert_allclose(part, whole[:, end - 1, at], rtol=1e-6, atol=1e-6)


def test_dirty_bars_of_one_coin_are_its_own(panel):
    "Bars that cannot be used give that coin nothing and the others what they would have without it"
    X, number, t = bars_of(panel), panel.bar_number, 1500
    others = np.delete(np.arange(9), 3)
    wanted = two_stages(X[others, :t + 1], number[:t + 1], panel.mask[others, :t + 1])[:, t]
    for column, bad in ((3, np.nan), (3, 0.), (3, -1.), (1, 1e-9), (4, -2.), (0, np.inf), (2, np.nan)):
        dirty = X[:, :t + 1].copy()
        dirty[3, t, column] = bad
        found = two_stages(dirty, number[:t + 1], np.ones((9, t + 1), bool))[:, t]
        assert np.isnan(found[3]).all()
        np.testing.assert_array_equal(found[others], wanted)


def test_price_level_does_not_matter(panel):
    "Every coin in its own unit, the same money traded"
    X, number = bars_of(panel), panel.bar_number
    unit = 2.**np.random.default_rng(0).integers(-30, 20, 9)[:, None]
    scaled = X.copy()
    scaled[:, :, :4] *= unit[:, :, None]
    for c in ('volume', 'taker_buy_volume'): scaled[:, :, BARS.index(c)] /= unit
    a, b = two_stages(X, number, panel.mask), two_stages(scaled, number, panel.mask)
    assert (np.isnan(a) == np.isnan(b)).all()
    gap = np.abs(a - b)[np.isfinite(a)]
    assert (gap > 1e-6).mean() < 1e-4                        # two coins within rounding may change places
