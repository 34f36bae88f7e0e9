"A family of features of the user's own: trained, saved by name, found again or told why not, streamed and audited"
import contextlib, importlib, json, os, subprocess, sys, textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cryptoml import features
from cryptoml.audit import audit
from cryptoml.crosssection import cross
from cryptoml.data import DataError, to_panel
from cryptoml.engine import step
from cryptoml.features import FAMILIES, FamilyError, bring, register
from cryptoml.forecaster import all_features, engineer_like, engineer_of, make_inputs
from cryptoml.integration import UltimateTradingAI
from cryptoml.parameters import JobError
from cryptoml.runs import run
from cryptoml.answers import CommandError
from cryptoml.live import command
from cryptoml.online import Followed
from cryptoml.simulate import simulate
from cryptoml.state import StateError
from cryptoml.study import Study

pytestmark = pytest.mark.usefixtures('one_thread')
H = pd.Timedelta('1h')
MODULE, NAME = 'features_of_a_test', 'features_of_a_test:spread'
WRITTEN = '''
    "A family of a user's own"
    import math
    from cryptoml.engine import step

    LEAST = 1e-9

    @step('hl_spread_{p}', windows=(24, 72), state=1, first=1, settle=lambda p: 8 * p,
          formula=r'\\mathrm{EMA}_p(\\ln(H/L))', unit='log return')
    def hl_spread(high, low, W, s, n, y):
        for k in range(len(W)):
            s[k] += (math.log(max(high / low, 1 + LEAST)) - s[k]) * (2 / (W[k] + 1))
            y[k] = s[k]

    spread = [hl_spread]
    nothing = 7
'''

def write(folder, text=WRITTEN, name=MODULE):
    (folder/f'{name}.py').write_text(textwrap.dedent(text), encoding='utf-8')
    return folder

@pytest.fixture(scope='module')
def home(tmp_path_factory): return write(tmp_path_factory.mktemp('home'))

@contextlib.contextmanager
def on_path(folder):
    "The folder on Python's path, and its module forgotten before and after"
    before = list(sys.path)
    sys.modules.pop(MODULE, None)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try: yield
    finally:
        sys.path[:] = before
        sys.modules.pop(MODULE, None)

@pytest.fixture
def known(home):
    with on_path(home):
        bring(NAME)
        yield

# ---- a model with a family

CONFIG = dict(size='small', horizons=[4, 8], act_on='FAIL')

@pytest.fixture(scope='module')
def market(): return simulate(n_symbols=2, n_bars=3100, seed=3).bars

@pytest.fixture(scope='module')
def model(market, home, tmp_path_factory):
    "Folder of a model that was trained with the family, its bars, and what it says of the last of them"
    state, end = tmp_path_factory.mktemp('state'), market.time.max() - 30 * H
    data = state.parent/'bars.parquet'
    market.to_parquet(data)
    with on_path(home):
        ai = UltimateTradingAI(CONFIG | dict(features=[NAME], state_dir=str(state)), device='cpu')
        with contextlib.redirect_stdout(None): ai.train_sync(market[market.time < end], epochs=1)
        ai.save_state()
        said = ai.predict_sync(market, now=market.time.max() + H)
    return dict(state=state, data=data, said=said, now=market.time.max() + H)

def test_the_model_reads_it(model, market, known):
    "Its columns are inputs, and are what a formula in pandas gives"
    ai = UltimateTradingAI(dict(state_dir=str(model['state'])), device='cpu')
    ai.load_state()
    f = ai.live().forecaster
    assert f.families[NAME] == [f.names.index('hl_spread_24'), f.names.index('hl_spread_72')]
    assert f.first.own[NAME]['columns'] == ['hl_spread_24', 'hl_spread_72'] and f.first.own[NAME]['warm_up'] == 576
    X = all_features((NAME,)).transform(market)
    one = market[market.symbol == market.symbol[0]]
    wide = np.log(one.high / one.low).clip(lower=np.log(1 + 1e-9))
    ewm = pd.concat([pd.Series([0.]), wide]).ewm(span=24, adjust=False).mean()[1:]
    np.testing.assert_allclose(X.loc[one.symbol.iloc[0], 'hl_spread_24'], ewm, rtol=1e-10)

IN_A_PROCESS = '''
    import json, sys
    import pandas as pd
    import torch
    torch.set_num_threads(1)
    from cryptoml.integration import UltimateTradingAI
    asked, bars, now = json.loads(sys.argv[1]), pd.read_parquet(sys.argv[2]), sys.argv[3]
    try:
        ai = UltimateTradingAI(asked, device='cpu')
        ai.load_state()
        print(json.dumps(ai.predict_sync(bars, now=now)))
    except Exception as e: print(f'{type(e).__name__}: {e}')
'''

def in_a_process(model, path, cwd, code=IN_A_PROCESS, **config):
    asked = json.dumps(dict(state_dir=str(model['state'])) | config)
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[1]), *map(str, path)]))
    command = [sys.executable, '-c', textwrap.dedent(code), asked, str(model['data']), model['now'].isoformat()]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]

def test_found_again_in_another_process(model, home, tmp_path):
    "By its import name, on the path or in the working folder; because it was imported; because it was registered"
    expected = json.loads(json.dumps(model['said']))
    imported = f'import {MODULE}\n' + textwrap.dedent(IN_A_PROCESS)
    registered = f'''
        from cryptoml.features import register
        from {MODULE} import hl_spread
        del __import__('sys').modules['{MODULE}']
        register({NAME!r}, hl_spread)
    '''
    for path, cwd, code, config in (
        ([home], tmp_path, IN_A_PROCESS, dict(features=[NAME])),
        ([], home, IN_A_PROCESS, dict(features=[NAME])),
        ([home], tmp_path, imported, {}),
        ([home], tmp_path, textwrap.dedent(registered) + textwrap.dedent(IN_A_PROCESS), {}),
    ):
        assert json.loads(in_a_process(model, path, cwd, code, **config)) == expected

def test_not_found_is_one_sentence(model, home, tmp_path):
    "Without the module; and a file that names a family runs no code by itself"
    lost = in_a_process(model, [], tmp_path, features=[NAME])
    assert lost.startswith(f'FamilyError: the family {NAME} cannot be found: there is no module {MODULE} in the ')
    assert f'put {MODULE}.py beside your bot' in lost and str(tmp_path) in lost
    silent = in_a_process(model, [home], tmp_path)
    assert silent.startswith(f'StateError: this model was trained with a family of your own: the family {NAME} is not')
    assert f"write features=['{NAME}'] into the config" in silent

CHANGES = {
    'the step': (('s[k] += ', 's[k] += .5 * '), 'its steps differ'),
    'a number it refers to': (('LEAST = 1e-9', 'LEAST = 1e-6'), 'its steps differ'),
    'a window': (('(24, 72)', '(24, 96)'), "its columns were ['hl_spread_24', 'hl_spread_72'], and are"),
    'its warm-up': (('8 * p', '9 * p'), 'its warm-up was 576 bars, and is 648'),
    'it is no family': (('spread = [hl_spread]', 'spread = 7'), 'is no family of features'),
    'it is gone': (('spread = [hl_spread]', ''), f'the module {MODULE} has no spread'),
}

@pytest.mark.parametrize('what', CHANGES)
def test_another_family_under_the_name(model, tmp_path, what):
    change, words = CHANGES[what]
    with on_path(write(tmp_path, WRITTEN.replace(*change))):
        importlib.import_module(MODULE)
        with pytest.raises(StateError, match='trained with a family of your own') as e:
            UltimateTradingAI(dict(state_dir=str(model['state'])), device='cpu').load_state()
        assert words in str(e.value)

@pytest.mark.parametrize('own, error', [
    ('x', ValueError), ([NAME], ValueError), ({'os:path': 3}, ValueError), ({'os:path': {}}, StateError),
    ({'this:d': {}}, StateError), ({'': {}}, StateError), ({'os.path:join': {}}, StateError),
])
def test_what_a_file_says_of_families_starts_nothing(own, error):
    "A forged manifest imports no module, and is refused in a sentence"
    before = set(sys.modules)
    with pytest.raises(error): engineer_of(own)
    assert set(sys.modules) == before and 'this' not in sys.modules

def test_comments_and_formulas_may_change(model, tmp_path):
    text = WRITTEN.replace("unit='log return'", "unit='ln'").replace('y[k] = s[k]', 'y[k] = s[k]   # as it is')
    with on_path(write(tmp_path, text)):
        ai = UltimateTradingAI(dict(state_dir=str(model['state']), features=[NAME]), device='cpu')
        ai.load_state()

def test_a_config_without_it_or_with_another(model, known):
    for asked in ([], ['another']):
        if asked: register('another', features.own_family(NAME))
        ai = UltimateTradingAI(dict(state_dir=str(model['state']), features=asked), device='cpu')
        with pytest.raises(StateError, match=rf"features \['{NAME}'\] there, "): ai.load_state()

def test_a_definition_that_changes_while_the_model_lives(market, home, tmp_path):
    "A model goes on with the family that it was trained with, or not at all"
    with on_path(home):
        bring(NAME)
        register('mine', features.own_family(NAME))
        inputs = make_inputs(to_panel(market.groupby('symbol').head(900)), None, all_features(('mine',)))
    assert engineer_like(inputs.own) is all_features(('mine',))
    @step('hl_spread_24', unit='log return')
    def hl_spread(high, low, W, s, n, y): y[0] = high - low
    register('mine', hl_spread)
    with pytest.raises(FamilyError, match='mine is not the family'): engineer_like(inputs.own)

# ---- bar by bar

def test_streams_equal_the_whole(model, market, known):
    "Fed one bar at a time the facade keeps its streams, and says what it says of everything at once"
    ai = UltimateTradingAI(dict(state_dir=str(model['state'])), device='cpu')
    ai.load_state()
    ai._online.early = None
    now = model['now']
    for back in (3, 2, 1, 0):
        upto = market[market.time < now - back * H]
        said = ai.predict_sync(upto if back == 3 else upto[upto.time == upto.time.max()], now=now - back * H)
    assert isinstance(ai._online.view, Followed) and ai._online.check() == []
    for symbol, p in model['said'].items():
        np.testing.assert_allclose(said[symbol]['relative'], p['relative'], atol=1e-5)
        np.testing.assert_allclose(said[symbol]['volatility'], p['volatility'], atol=1e-5)

def test_a_step_that_numba_refuses(market, known):
    "It runs as plain Python, in a stream too"
    @step('plain_one', unit='ratio')
    def plain_one(close, open, W, s, n, y): y[0] = dict(a=close)['a'] / open
    register('plain', plain_one)
    e, panel = all_features((NAME, 'plain')), to_panel(market.groupby('symbol').head(600))
    X = e.transform_panel(panel)
    s, t = e.panel_stream(panel.symbols), -1
    s.catch_up(replace(panel, time=panel.time[:t], values=panel.values[:, :t], mask=panel.mask[:, :t]))
    bars = {k: dict(zip(panel.columns, panel.values[n, t]), time=panel.time[t]) for n, k in enumerate(panel.symbols)}
    np.testing.assert_array_equal(s.update(bars), X[:, t])

def test_a_family_of_comparisons(market, known):
    "Ranks of a column of one's own, behind all steps"
    register('ranks', [cross('rank', 'hl_spread_24', 'hl_spread_24', 'x', 'a test')])
    bars = simulate(n_symbols=6, n_bars=400).bars
    e = all_features((NAME, 'ranks'))
    inputs = make_inputs(to_panel(bars), None, e)
    assert [j for columns in inputs.families.values() for j in columns] == list(range(len(inputs.names)))
    x = inputs.x[..., inputs.names.index('hl_spread_24')]
    rank = inputs.x[:, -1, inputs.names.index('rank_hl_spread_24')]
    np.testing.assert_allclose(rank, 2 * pd.Series(x[:, -1]).rank() / 5 - 7 / 5, atol=1e-6)

# ---- look-ahead

AHEAD = """
    from cryptoml.engine import step

    @step('next_return', past=1, first=2, unit='ratio')
    def next_return(close, W, s, n, y): y[0] = close[2] / close[1]

    best = dict(close=0.)
    @step('of_the_best', unit='ratio')
    def of_the_best(close, W, s, n, y):
        best['close'] = max(best['close'], close)
        y[0] = close / best['close']
"""

@pytest.mark.parametrize('name, first', [
    ('next_return', 'needs the next bar.*truncation'),       # it reads behind the end of what it is given
    ('of_the_best', 'memory from call to call.*repeat'),     # it remembers, outside of its state, what came later
])
def test_the_audit_catches_one_that_looks_ahead(market, home, tmp_path, name, first):
    "By the name that the model would carry, as ours are audited; the family without such a step passes"
    bars = market[market.symbol == market.symbol[0]].head(900).reset_index(drop=True)
    with on_path(write(tmp_path, AHEAD)):
        bring(f'{MODULE}:{name}')
        found = audit(f'{MODULE}:{name}', bars)
    assert not found.ok and 'truncation' in found.failed().fails.item()
    with on_path(tmp_path), pytest.raises(DataError, match=f'not fit to be trained with: {name}: .*{first}'):
        Study.of(to_panel(market), (4, 8), features=[f'{MODULE}:{name}'])
    with on_path(home):
        bring(NAME)
        assert audit(NAME, bars).ok

# ---- names

@pytest.mark.parametrize('name, words', [
    ('no_such_module_here:x', 'there is no module no_such_module_here in the working folder'),
    (f'{MODULE}:absent', f'the module {MODULE} has no absent'),
    (f'{MODULE}:nothing', 'is no family of features'),
    ('astrology', "unknown family 'astrology': there are technical"),
    (':x', 'is no module:attribute'),
    ('os:path', 'is no family of features'),
])
def test_names_that_are_none(known, name, words):
    with pytest.raises(FamilyError, match=words): UltimateTradingAI(dict(features=[name]), device='cpu')

@pytest.mark.parametrize('given', ['spread', [7], [NAME, NAME], 7])
def test_features_of_a_config_are_a_list_of_names(given):
    with pytest.raises(ValueError, match='features must be a list of different names'):
        UltimateTradingAI(dict(features=given), device='cpu')

@pytest.mark.parametrize('name', [*FAMILIES, 'own', 'extra', ''])
def test_a_name_that_is_taken(known, name):
    with pytest.raises(FamilyError, match='is taken'): register(name, features.own_family(NAME))

def test_a_module_that_misses_another_says_which(tmp_path):
    with on_path(write(tmp_path, 'import no_such_library_either\n')):
        with pytest.raises(ModuleNotFoundError, match='no_such_library_either'): bring(NAME)

def test_no_column_that_may_enter_a_model(market):
    @step('price_itself', unit='price', scale_free=False)
    def price_itself(close, W, s, n, y): y[0] = close
    register('raw', price_itself)
    with pytest.raises(FamilyError, match='raw has no column that may enter a model'):
        make_inputs(to_panel(market.groupby('symbol').head(50)), None, all_features(('raw',)))

# ---- commands

def test_commands_know_it(model, home, tmp_path, capsys):
    "cryptoml predict --features; and the train job refuses a family that is not there before anything starts"
    argv = ['predict', '--state', str(model['state']), '--data', str(model['data']), '--now', str(model['now'])]
    with on_path(home):
        with pytest.raises(CommandError, match=f'--features {NAME} behind a command'): command(argv)
        assert command([*argv, '--features', NAME]) == 0
    said = json.loads(capsys.readouterr().out)['said']
    assert {k: x['prediction'] for k, x in said.items()} == json.loads(json.dumps(model['said']))
    with pytest.raises(JobError, match=f'the family {NAME} cannot be found'):
        run('train', tmp_path/'run', features=[NAME], epochs=1)
