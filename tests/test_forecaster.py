"The forecaster: coins it never met, samples in any order, groups of inputs, files of an earlier version"
import contextlib, hashlib, io

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cryptoml import forecaster, state
from cryptoml.data import DataError, Panel, parse_timeframe, to_panel
from cryptoml.forecaster import (MIN_DAYS, MIN_TRAIN, ForecasterConfig, begin, forecast, input_groups, least_history,
                                 load_forecaster, make_inputs, needed_history, save_forecaster, split, train)
from cryptoml.simulate import simulate
from cryptoml.state import StateError
from cryptoml.targets import Targets, make_targets
from cryptoml.windows import Samples, grid
from test_ranks import curve, ranks, same_curve


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A forecaster trained on four of six coins, and all six"
    torch.set_num_threads(1)
    market = simulate(n_symbols=6, n_bars=5000, seed=2)
    known = market.symbols[:4]
    def part(d): return d[d.symbol.isin(known)]
    panel = to_panel(part(market.bars))
    inputs = make_inputs(panel, part(market.extra))
    targets = make_targets(panel)
    parts = split(panel, targets)
    with contextlib.redirect_stdout(io.StringIO()):
        f, _ = train(inputs, targets, parts, ForecasterConfig(epochs=8), tmp_path_factory.mktemp('run'), 'cpu')
    everyone = to_panel(market.bars)
    return f, market, known, make_inputs(everyone, market.extra), make_targets(everyone)


def empty(bars, timeframe, horizon):
    "A panel without values, and when its labels are known"
    length = parse_timeframe(timeframe)
    time = pd.date_range('2020-01-01', periods=bars, freq=length, tz='UTC')
    panel = Panel(time, ['BTC/USDT'], [], np.zeros((1, bars, 0)), np.ones((1, bars), bool), length)
    return panel, Targets((1, horizon), None, {}, None, time + (1 + horizon) * length)


@settings(max_examples=40, deadline=None)
@given(
    bars=st.integers(1500, 12_000),
    timeframe=st.sampled_from(['15m', '1h', '4h', '1d']),
    horizon=st.integers(2, 80),
    days=st.none() | st.integers(10, 200))
def test_parts_equal_brute_force(bars, timeframe, horizon, days):
    panel, targets = empty(bars, timeframe, horizon)
    closes, known = panel.time + panel.timeframe, targets.known
    embargo = horizon * panel.timeframe
    length = min(pd.Timedelta('182D'), (bars - 1) * panel.timeframe / 5) if days is None else pd.Timedelta(days, 'D')
    ends = dict(test=closes[-1])
    ends['gate'] = ends['test'] - length
    ends['valid'] = ends['gate'] - embargo - length / 2
    ends['train'] = ends['valid'] - embargo - length / 2
    long = dict(test=length, gate=length / 2 + embargo, valid=length / 2 + embargo, train=pd.Timedelta('40000D'))
    want = {k: [] for k in ends}
    for i, (close, end) in enumerate(zip(closes, known)):
        for k, last in ends.items():
            inside = last - long[k] < close <= last
            if inside and (k == 'test' or close <= last - embargo and end <= last): want[k].append(i)
    before, need = (closes <= ends['gate']).sum(), least_history(panel.timeframe)
    given_test = None if days is None else f'{days}D'
    if before < need or len(want['train']) < MIN_TRAIN or length < pd.Timedelta(MIN_DAYS, 'D'):
        with pytest.raises(DataError, match=f'before it are {before} bars, .* Needed are {need} bars'):
            split(panel, targets, given_test)
        return
    parts = split(panel, targets, given_test)
    assert list(parts) == ['train', 'valid', 'gate', 'test']
    for k, rows in parts.items(): assert np.flatnonzero(rows).tolist() == want[k], k
    for k, after in zip(list(parts), list(parts)[1:]):
        assert known[parts[k]].max() < closes[parts[after]].min()
        assert closes[parts[after]].min() - closes[parts[k]].max() > embargo


@pytest.mark.parametrize('timeframe, bars, days', [
    ('15m', 4 * 1680 + 24, 70),
    ('1h', 1680 + 24, 71),
    ('4h', 1661 + 24, 281),       # the features count bars
    ('1d', 1661 + 24, 1685),
])
def test_what_could_never_predict_is_not_trained(world, timeframe, bars, days):
    f = world[0]
    length = parse_timeframe(timeframe)
    assert f.network.config.lookback == 24
    assert needed_history(f, length) == least_history(length) == bars
    enough = bars + pd.Timedelta('20D') // length
    assert split(*empty(enough, timeframe, 24), '20D')['train'].sum() >= MIN_TRAIN
    said = f'before it are {bars - 1} bars, .* {bars} bars before the test .{days} days,'
    with pytest.raises(DataError, match=said):
        split(*empty(enough - 1, timeframe, 24), '20D')


def last_usable(f, inputs, n=100):
    "Some of the last usable samples, in no order"
    last = np.arange(len(inputs.panel.time)) > 4900
    sample = Samples.where(f.usable(inputs) & last)
    return sample[np.random.default_rng(0).permutation(len(sample))[:n]]


def test_coins_never_met_are_forecast_without_training(world):
    "Their expected return is found, if not as well as that of the coins of the training"
    f, market, known, inputs, targets = world
    panel = inputs.panel
    test = f.usable(inputs) & split(panel, targets)['test']
    sample = grid(test, panel.bar_number, 4, 3)
    new = ~np.isin(panel.symbols, known)[sample.coin]
    fc = forecast(f, inputs, targets.sigma, sample)
    found = []
    for j, h in enumerate(targets.horizons):
        expected = market.expected(h).unstack('time').reindex(index=panel.symbols).to_numpy()
        truth = sample.of(expected) / sample.of(targets.sigma)
        side = fc['direction'][:, j, 2] - fc['direction'][:, j, 0]
        found.append([np.corrcoef(side[k], truth[k])[0, 1] for k in (new, ~new)])
    never, met = np.mean(found, 0)
    assert met > .2, found                 # 0.53
    assert never > .5 * met, found         # 0.32: four coins fix little of what descriptors mean


def test_correlations_are_a_row_a_sample(world):
    "Symmetric; before any training those of the 30 days just past"
    f, _, _, inputs, targets = world
    N, T = inputs.panel.mask.shape
    late = np.arange(T) > 4950
    sample = Samples.where(f.usable(inputs) & late)
    new = begin(inputs, inputs.panel.mask, ForecasterConfig())
    moves = np.diff(np.log(inputs.panel['close']), axis=1, prepend=np.nan)
    for g in (f, new):
        out = np.full((N, T, N), np.nan)
        out[sample.coin, sample.bar] = forecast(g, inputs, targets.sigma, sample)['correlation']
        known = out[:, late]
        assert np.isfinite(known).all()
        np.testing.assert_allclose(known, known.transpose(2, 1, 0), atol=1e-5)
        assert (known[range(N), :, range(N)] == 1).all()
    for t in (4960, 4999):
        x = moves[:, t - 719:t + 1]
        own = np.sqrt((x ** 2).sum(1))
        np.testing.assert_allclose(out[:, t], x @ x.T / np.outer(own, own), atol=1e-5)


@pytest.mark.parametrize('size', [1, 40])
def test_samples_in_any_order_and_any_batch(world, size):
    f, _, _, inputs, targets = world
    sample = last_usable(f, inputs)
    a = forecast(f, inputs, targets.sigma, sample, each=True)
    b = forecast(f, inputs, targets.sigma, sample[::-1], size, each=True)
    assert a.keys() == b.keys()
    for k in a: assert np.allclose(a[k], b[k][::-1], atol=1e-5), k


def test_what_is_not_usable_has_no_label(world):
    f, _, _, inputs, targets = world
    ok = f.usable(inputs)
    numbers, classes = np.ones((*ok.shape, 2), np.float32), np.ones(ok.shape, np.int64)
    w = f.windows(inputs, dict(number=numbers, cls=classes))
    assert np.array_equal(w.usable.numpy(), ok)
    number, cls = w.labels['number'].numpy(), w.labels['cls'].numpy()
    assert np.isnan(number[~ok]).all() and (number[ok] == 1).all()
    assert (cls[~ok] == -1).all() and (cls[ok] == 1).all()


@pytest.mark.parametrize('size, least, most', [('small', 0, 200_000), ('base', 1_800_000, np.inf)])
def test_sizes(world, size, least, most):
    f, _, _, inputs, _ = world
    network = begin(inputs, inputs.panel.mask, ForecasterConfig(size=size)).network
    assert least <= sum(p.numel() for p in network.parameters()) < most


@pytest.mark.parametrize('horizons, every, expected', [
    ((4, 12, 24), None, 12),
    ((6,), None, 3),
    ((1,), None, 1),
    ((4, 12, 24), 5, 5),
])
def test_training_samples_are_half_a_horizon_apart(horizons, every, expected):
    assert ForecasterConfig(horizons, every=every).every == expected


# ---- groups of inputs

families = st.lists(
    st.tuples(st.sampled_from(['technical', 'onchain', 'extra', 'crosssection']), st.integers(1, 40)),
    min_size=1,
    max_size=4,
    unique_by=lambda family: family[0],
)

@settings(max_examples=50, deadline=None)
@given(families, st.integers(1, 20))
def test_groups_are_a_partition(sizes, least):
    names, columns = [], {}
    for family, n in sizes:
        columns[family] = list(range(len(names), len(names) + n))
        names += [f'{family} {i}' for i in range(n)]
    *groups, missing = input_groups(names, columns, least)
    assert missing == len(columns)
    assert sum(groups) == len(names)
    for family, n in sizes:
        mine = []
        while sum(mine) < n: mine.append(groups.pop(0))
        assert sum(mine) == n                                     # no group crosses a family
        if family == 'extra': assert set(mine) == {1}
        else: assert len(mine) == 1 or min(mine) >= least
    assert not groups


# ---- files

def in_words_of_0_1(manifest):
    "A manifest as version 0.1 wrote it: families were called groups, and the groups of the network families"
    old = {k: v for k, v in manifest.items() if k != 'families'}
    network = {'families' if k == 'groups' else k: v for k, v in manifest['network'].items()}
    return old | dict(groups=manifest['families'], network=network)


@pytest.fixture(scope='module')
def saved(world, tmp_path_factory):
    "Tensors and manifest of the forecaster, and what it says"
    f, _, _, inputs, targets = world
    root = tmp_path_factory.mktemp('saved')
    save_forecaster(f, root, note='kept')
    tensors, manifest = state.load(root)
    return tensors, manifest, forecast(f, inputs, targets.sigma, last_usable(f, inputs), each=True)


@pytest.mark.parametrize('words', [dict, in_words_of_0_1], ids=['today', '0.1'])
def test_saved_by_this_version_or_by_0_1_it_says_the_same(world, saved, tmp_path, words):
    "To the last bit"
    f, _, _, inputs, targets = world
    tensors, manifest, said = saved
    state.save(tmp_path, tensors, words(manifest))
    loaded, about = load_forecaster(tmp_path)
    assert about == dict(note='kept')
    assert loaded.config == f.config
    assert loaded.network.config == f.network.config
    assert loaded.families == f.families
    again = forecast(loaded, inputs, targets.sigma, last_usable(loaded, inputs), each=True)
    assert again.keys() == said.keys()
    for k in said: np.testing.assert_array_equal(again[k], said[k], err_msg=k)


def test_a_manifest_of_0_1_has_the_keys_it_had(saved):
    _, manifest, _ = saved
    old = in_words_of_0_1(manifest)
    assert set(old) == {'kind', 'config', 'network', 'names', 'groups', 'clip', 'about'}
    assert 'families' in old['network'] and 'groups' not in old['network']


def test_weights_are_called_as_in_version_0_1(saved):
    "Another name of a layer, and no state saved before can be loaded"
    tensors, _, _ = saved
    names = sorted(name for name in tensors['network'] if not name.startswith('edge'))
    assert len(names) == 165
    assert hashlib.sha256('\n'.join(names).encode()).hexdigest()[:16] == '5ddc3c39d65ce9b7'
    assert set(tensors['scaler']) == {'center', 'scale'}


@pytest.mark.parametrize('words', [dict, in_words_of_0_1], ids=['today', '0.1'])
def test_a_generation_from_before_the_correlations_is_refused(saved, tmp_path, words):
    tensors, manifest, _ = saved
    earlier = {k: v for k, v in tensors['network'].items() if not k.startswith('edge')}
    state.save(tmp_path, tensors | dict(network=earlier), words(manifest))
    with pytest.raises(StateError, match='its network: 6 of them are not there, first edge_scale; train it again'):
        load_forecaster(tmp_path)


@pytest.mark.parametrize('words', [dict, in_words_of_0_1], ids=['today', '0.1'])
@pytest.mark.parametrize('family', ['technical', 'extra'])
def test_a_family_that_lost_an_input_is_refused(saved, tmp_path, words, family):
    tensors, manifest, _ = saved
    families = dict(manifest['families'])
    families[family] = families[family][:-1]
    state.save(tmp_path, tensors, words(manifest | dict(families=families)))
    with pytest.raises(StateError, match='do not fit one another'): load_forecaster(tmp_path)


def test_two_processes_train_the_forecaster_of_one(tmp_path, monkeypatch):
    "Without dropout, whose noise is each process's own; what the second would write it does not"
    torch.set_num_threads(1)
    market = simulate(n_symbols=3, n_bars=2500, seed=2)
    panel = to_panel(market.bars)
    inputs, targets = make_inputs(panel, market.extra), make_targets(panel)
    parts = split(panel, targets)
    def still(*args):
        f = begin(*args)
        for m in f.network.modules():
            if isinstance(m, torch.nn.Dropout): m.p = 0.
            if isinstance(getattr(m, 'dropout', None), float): m.dropout = 0.
        return f
    monkeypatch.setattr(forecaster, 'begin', still)
    def work(out):
        f, history = train(inputs, targets, parts, ForecasterConfig(epochs=2), out, 'cpu')
        labelled = history.drop(columns='train_regime')       # a mean over labels, of which some are missing
        return curve(labelled, f.network)
    alone = work(tmp_path/'alone')
    both = ranks(2, lambda r: work(tmp_path/f'out{r}'), tmp_path)
    for one in both: same_curve(one['found'], alone)
    assert both[0] == both[1] and not (tmp_path/'out1').exists()
