"What a person gives beside bars: own columns that cannot be meant, markets that never move, settings that are none"
import contextlib, statistics
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from examples import TERMS
from cryptoml.data import DataError, to_panel
from cryptoml.forecaster import ForecasterConfig, Inputs, own_columns, present
from cryptoml.integration import UltimateTradingAI
from cryptoml.network import NetworkConfig
from cryptoml.policy import Policy
from cryptoml.simulate import simulate
from cryptoml.terms import Terms, possible
from cryptoml.windows import Scaler

LARGEST = float(np.finfo(np.float32).max) / 2    # so that the difference of two values is one too

@pytest.fixture(scope='module')
def bars(): return simulate(n_symbols=2, n_bars=3000).bars

@pytest.fixture(scope='module')
def panel(bars): return to_panel(bars.groupby('symbol').head(60), pd.Timedelta('1h'))

def own(bars, **columns):
    "An own column of every bar, known when the bar closes"
    return bars[['time', 'symbol']].assign(known=bars.time + pd.Timedelta('1h'), **columns)

def training(bars, tmp_path, **given):
    ai = UltimateTradingAI(dict(size='small', horizons=[4, 8], state_dir=str(tmp_path)), device='cpu')
    with contextlib.redirect_stdout(None): return ai.train_sync(bars, epochs=1, **given)

# ---- own columns

VALUES = {
    'infinite': np.inf,
    'minus infinite': -np.inf,
    'beyond float32': 1e300,
    'just beyond float32': LARGEST * 1.001,
}

@pytest.mark.parametrize('value', VALUES)
def test_a_value_that_float32_cannot_hold(bars, panel, value):
    "Named by column, coin and time, and counted"
    extra = own(bars, fine=1., x=np.arange(len(bars)) / 7.)
    extra.loc[[100, 200], 'x'] = VALUES[value]
    with pytest.raises(DataError, match='2 values that are infinite or too large for float32 in x, first ') as e:
        own_columns(panel, extra)
    assert f'of {extra.symbol[100]} at {extra.time[100]}' in str(e.value)

@pytest.mark.parametrize('value', [LARGEST, -LARGEST, 1e38, 1e-300, 0., np.nan])
def test_a_value_that_it_can(bars, panel, value):
    x, names = own_columns(panel, own(bars, x=value))
    assert names == ['x'] and x.dtype == np.float32
    np.testing.assert_array_equal(x[..., 0], np.full(panel.mask.shape, value, np.float32))

def test_numbers_of_any_kind(bars, panel):
    n = len(bars)
    extra = own(bars, whole=5, flag=True, maybe=pd.array([None, 3] * (n // 2), dtype='Int64'),
                sure=pd.array([True, None] * (n // 2), dtype='boolean'), half=np.float32(.5))
    x, names = own_columns(panel, extra)
    at = dict(zip(names, np.moveaxis(x, -1, 0)))
    for name, value in dict(whole=5, flag=1, half=.5).items(): assert (at[name] == value).all()
    for name, values in dict(maybe=[np.nan, 3], sure=[1, np.nan]).items():
        np.testing.assert_array_equal(at[name][0, :4], np.array(values * 2, np.float32))

WRONG = {
    'text': (lambda e: e.assign(y='7.5'), 'columns that are no numbers: y'),
    'complex': (lambda e: e.assign(y=1j), 'columns that are no numbers: y'),
    'nothing but text': (lambda e: e.drop(columns='x').assign(y='7.5'), 'columns that are no numbers: y'),
    'no column': (lambda e: e.drop(columns='x'), 'no number column'),
    'no symbol': (lambda e: e.drop(columns='symbol'), 'no column symbol'),
    'no known': (lambda e: e.drop(columns='known'), 'no column known'),
    'known before': (lambda e: e.assign(known=e.time - pd.Timedelta('9h')), 'rows that were known before the time'),
    'one row too early': (lambda e: e.assign(known=e.known.where(e.index != 7, e.time - pd.Timedelta('1s'))),
                          'extra has 1 rows that were known before'),
    'a coin without': (lambda e: e[e.symbol == e.symbol[0]], 'no row for'),
}

@pytest.mark.parametrize('what', WRONG)
def test_a_frame_that_cannot_be_meant(bars, panel, what):
    change, words = WRONG[what]
    with pytest.raises(DataError, match=words): own_columns(panel, change(own(bars, x=1.)))

@pytest.mark.parametrize('there, refused', [(0, True), (2, True), (3, False), (60, False)])
def test_an_own_column_without_values_is_told_and_not_left_out(panel, there, refused):
    "A feature without values is a source that was not given; an own column was given"
    x = np.full((2, 60, 2), np.nan, np.float32)
    x[..., 0] = 1
    x[:, :there, 1] = 1
    inputs = Inputs(panel, x, ['feature', 'mine'], dict(technical=[0], extra=[1]))
    rows = np.ones((2, 60), bool)
    if not refused: assert present(inputs, rows).names == ['feature', 'mine']
    else:
        words = rf'on the 120 training bars: mine \({there / 60:.1%}\)'
        with pytest.raises(DataError, match=words): present(inputs, rows)
    sourceless = Inputs(panel, x, ['feature', 'another'], dict(technical=[0], onchain=[1]))
    assert present(sourceless, rows).names == (['feature'] if refused else ['feature', 'another'])

@pytest.mark.parametrize('values', [[1e38], [1e38, -1e38], [LARGEST, -LARGEST], [LARGEST, 0, 0, 0, 0, 0]], ids=str)
def test_the_scale_of_large_values_is_finite(panel, values):
    "Against exact arithmetic in Python's own numbers"
    column = np.resize(values, panel.mask.size).reshape(panel.mask.shape).astype(np.float32)
    scaler = Scaler.fit(column[..., None], np.ones(panel.mask.shape, bool))
    deviation = statistics.pstdev([float(v) for v in column.ravel()])
    spread = (np.quantile(column.astype(float), .75) - np.quantile(column.astype(float), .25)) / 1.349
    assert scaler.scale[0] == pytest.approx(spread or deviation or 1., rel=1e-6)
    assert np.isfinite(scaler.center).all()
    assert np.isfinite(scaler(column[..., None])).all()

@pytest.mark.parametrize('columns, words', [
    (dict(x=np.nan), r'own columns without values .*: x \(0.0%\)'),
    (dict(x=np.inf), 'infinite or too large for float32 in x'),
], ids=['empty', 'infinite'])
def test_a_training_on_them_does_not_begin(bars, tmp_path, columns, words):
    with pytest.raises(DataError, match=words): training(bars, tmp_path, extra=own(bars, **columns))
    assert not list(tmp_path.rglob('*.safetensors'))

# ---- markets

def test_a_market_that_never_moves(bars, tmp_path):
    still = bars.assign(open=1., high=1., low=1., close=1.)
    with pytest.raises(DataError, match='no coin can be trained on: BTC/USDT: it moves less'): training(still, tmp_path)
    assert not list(tmp_path.rglob('*.safetensors'))

def test_a_coin_that_never_moves_is_left_out_and_said(bars, tmp_path):
    symbols = sorted(bars.symbol.unique())
    still = bars.copy()
    still.loc[still.symbol == symbols[1], ['open', 'high', 'low', 'close']] = 1.
    ai = UltimateTradingAI(dict(size='small', horizons=[4, 8], state_dir=str(tmp_path)), device='cpu')
    with contextlib.redirect_stdout(None): history = ai.train_sync(still, epochs=1)
    assert list(history['left_out']) == symbols[1:]
    now = bars.time.max() + pd.Timedelta('1h')
    assert list(ai.predict_sync(still, None, now)) == symbols[:1]
    with pytest.raises(DataError, match=f'{symbols[1]} is not a coin of this model.*it was left out of training'):
        ai.predict_sync(still, symbols[1], now)

# ---- settings

@pytest.mark.parametrize('bad, words', [
    (dict(horizons=(24, 4)), 'horizons must rise'),
    (dict(horizons=(4, 4)), 'horizons must be different whole numbers of bars from 1'),
    (dict(horizons=(0, 4)), 'horizons must be different whole numbers of bars from 1'),
    (dict(horizons=(4, True)), 'horizons must be different whole numbers of bars from 1'),
    (dict(horizons=()), 'horizons must be different whole numbers of bars from 1'),
    (dict(epochs=2.5), 'epochs must be a whole number from 1'),
    (dict(windows='2'), 'windows must be a whole number from 1'),
    (dict(seed=-1), 'seed must be'),
    (dict(lr=0), 'lr must be'),
    (dict(lr=float('nan')), 'lr must be'),
    (dict(round_trip=1), 'round_trip must be'),
], ids=str)
def test_settings_of_a_forecaster_that_are_none(bad, words):
    with pytest.raises(ValueError, match=words): ForecasterConfig(**bad)

@pytest.mark.parametrize('bad, words', [
    (dict(horizons=(12, 4)), 'horizons must be rising'),
    (dict(horizons=(-4, 12)), 'horizons must be rising'),
    (dict(round_trip=float('nan')), 'round_trip must be'),
    (dict(n_past=True), 'whole numbers from 1'),
    (dict(lookback=8193), 'whole numbers from 1'),
], ids=str)
def test_sizes_of_a_network_that_are_none(bad, words):
    sizes = dict(n_past=9, n_future=5, n_static=3, n_pair=2, horizons=(4, 12), lookback=8, d_model=8, n_heads=4)
    NetworkConfig(**sizes)
    with pytest.raises(ValueError, match=words): NetworkConfig(**sizes | bad)

@pytest.mark.parametrize('rule', [dict(every=4.5), dict(every=True), dict(every='4'), dict(patience=.5)], ids=str)
def test_a_policy_counts_in_whole_bars(rule):
    with pytest.raises(ValueError, match='policy out of range'): Policy(**rule)

@pytest.mark.parametrize('field, value', [
    ('data_until', '2024-06-01'),
    ('trained_until', '2024-03-01T00:00:00'),
])
def test_terms_name_the_date_that_has_no_zone(field, value):
    bad = replace(TERMS, **{field: value})
    assert [k for k, good in possible(bad).items() if not good] == [field]
    with pytest.raises(RuntimeError, match=f'{field} cannot be'): Terms.read(dict(terms=vars(bad)))
