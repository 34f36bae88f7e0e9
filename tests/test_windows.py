"""Windows: any panel, any sample, against slicing by hand; nothing after the decision is read"""
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from cryptoml.data import DataError
from cryptoml.windows import Scaler, Windows, batches, grid, missing, usable


def make(N, T, F, L, K, step, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Windows(torch.randn(N, T, F, generator=g), torch.randn(T + K * step, 4, generator=g), torch.randn(N, 3, 2, generator=g),
                   torch.arange(T) * 3 // T, dict(y=torch.randn(N, T, 2, generator=g)), L, K, step)


@settings(max_examples=40, deadline=None)
@given(N=st.integers(1, 4), extra=st.integers(0, 30), F=st.integers(1, 5), L=st.integers(1, 12), K=st.integers(1, 4), step=st.integers(1, 5), seed=st.integers(0, 99))
def test_batch_is_slicing(N, extra, F, L, K, step, seed):
    T = L + extra
    w = make(N, T, F, L, K, step, seed)
    ids = grid(usable(np.ones((N, T), bool), L), np.arange(T))
    assert len(ids) == N * (T - L + 1)
    b = w.batch(ids)
    for i, s in enumerate(ids.tolist()):
        n, t = divmod(s, T)
        assert torch.equal(b['past'][i], w.past[n, t - L + 1:t + 1])
        assert torch.equal(b['future'][i, :, :4], w.future[[t + step * k for k in range(1, K + 1)]])
        assert torch.equal(b['static'][i], w.static[n, w.month[t]]) and torch.equal(b['y'][i], w.labels['y'][n, t])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), stride=st.integers(1, 9))
def test_phases_hold_each_sample_once(seed, stride):
    rng = np.random.default_rng(seed)
    ok, bar = rng.random((3, 50)) < .7, np.arange(50) + rng.integers(1000)
    parts = torch.cat([grid(ok, bar, stride, p) for p in range(stride)])
    assert torch.equal(parts.sort().values, grid(ok, bar)) and len(parts) == ok.sum()


def test_later_bars_do_not_reach_the_past():
    w = make(2, 60, 3, 8, 2, 3)
    ids = torch.tensor([20, 60 + 33])
    before = w.batch(ids)['past'].clone()
    w.past[0, 21:], w.past[1, 34:] = 1e9, 1e9
    assert torch.equal(w.batch(ids)['past'], before)


def test_no_copy_of_the_panel():
    w = make(4, 5000, 20, 64, 2, 3)
    held = w.past.untyped_storage().nbytes()
    assert held == w.past.numel() * 4 and w.to('cpu').past.data_ptr() == w.past.data_ptr()
    assert w.batch(torch.tensor([100, 200]))['past'].numel() == 2 * 64 * 20


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
    assert np.isfinite(z).all() and np.abs(z).max() <= a.clip and (z[np.isnan(x)] == 0).all()


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
