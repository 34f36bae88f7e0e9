"What the process around us has set, and what lies in the state folder, change nothing in a model or in what it says"
import contextlib, sys, threading, time, warnings

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import ended, forked
from cryptoml.combined import blend_arrays
from cryptoml.integration import UltimateTradingAI, own_settings
from cryptoml.members import member_arrays
from cryptoml.simulate import simulate
from cryptoml.state import lock

SYMBOL = 'BTC/USDT'

@pytest.fixture(scope='module')
def bars():
    "Two coins, as short as a training allows"
    return simulate(n_symbols=2, n_bars=3000).bars

def trained(bars, root, epochs=1, **config):
    ai = UltimateTradingAI(dict(size='small', horizons=[4, 8], state_dir=str(root)) | config, device='cpu')
    with contextlib.redirect_stdout(None): history = ai.train_sync(bars, epochs=epochs)
    return ai, history

def said(ai, bars): return ai.predict_sync(bars, None, bars.time.max() + pd.Timedelta('1h'))

def weights(ai): return ai.live().forecaster.first.network.state_dict()

def arrays(ai):
    "What is no network: members, shares, temperatures, what is familiar"
    c = ai.live().forecaster
    members = {f'{name}/{k}': v for name, m in c.members.items() for k, v in member_arrays(m).items()}
    return members | blend_arrays(c.blend) | vars(c.familiar)

def same_weights(a, b):
    networks, others = (weights(a), weights(b)), (arrays(a), arrays(b))
    assert all(x.keys() == y.keys() for x, y in (networks, others)) and a.live().forecaster.members
    same = all(torch.equal(v, networks[1][k]) and v.dtype == torch.float32 for k, v in networks[0].items())
    return same and all(v.dtype == others[1][k].dtype and np.array_equal(v, others[1][k]) for k, v in others[0].items())

@pytest.fixture(scope='module')
def ai(bars, tmp_path_factory):
    "A model that was trained and saved undisturbed"
    ai, _ = trained(bars, tmp_path_factory.mktemp('state'))
    ai.save_state()
    return ai

# ---- the host process

@contextlib.contextmanager
def changed(set_, value, before):
    set_(value)
    try: yield
    finally: set_(before)

def numpy_raises(): return np.errstate(all='raise')
def pandas_says(option, value):
    @contextlib.contextmanager
    def said():
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')                # that the option is to go
            with pd.option_context(option, value): yield
    return said

HOSTS = {
    'default dtype': lambda: changed(torch.set_default_dtype, torch.float64, torch.float32),
    'half default dtype': lambda: changed(torch.set_default_dtype, torch.bfloat16, torch.float32),
    'default device': lambda: changed(torch.set_default_device, 'meta', None),      # stands for cuda
    'device in a block': lambda: torch.device('meta'),
    'autocast': lambda: torch.autocast('cpu', torch.bfloat16),
    'no grad': torch.no_grad,
    'inference mode': torch.inference_mode,
    'numpy raises': numpy_raises,
    'deterministic': lambda: changed(torch.use_deterministic_algorithms, True, False),
    'objects for texts': pandas_says('future.infer_string', False),
    'texts of python': pandas_says('mode.string_storage', 'python'),
    'python scalars': pandas_says('future.python_scalars', True),
    'NaN is not NA': pandas_says('future.distinguish_nan_and_na', True),
}

@contextlib.contextmanager
def everything():
    "All that do not exclude one another"
    with contextlib.ExitStack() as stack:
        for host in ('default dtype', 'default device', 'autocast', 'numpy raises', 'objects for texts'):
            stack.enter_context(HOSTS[host]())
        yield

def settings():
    return [torch.get_default_dtype(), torch.get_default_device(), torch.is_autocast_enabled('cpu'),
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), np.geterr(),
            pd.get_option('mode.string_storage'), pd.Series(['x']).dtype]

@pytest.mark.parametrize('host', HOSTS)
def test_a_prediction_is_the_same_in_any_host(ai, bars, host):
    "By the model as it is, and by one that is loaded there; and the host's settings are as they were"
    expected = said(ai, bars)
    with HOSTS[host]():
        before = settings()
        again = said(ai, bars)
        loaded = UltimateTradingAI(dict(state_dir=ai.config.state_dir), device='cpu')
        loaded.load_state()
        by_loaded = said(loaded, bars)
        action = loaded.get_trading_signal(SYMBOL, 0., bars.time.max() + pd.Timedelta('1h'))
        book = loaded.target_weights(bars.time.max() + pd.Timedelta('1h'))
        assert settings() == before
    assert again == by_loaded == expected
    assert action['symbol'] == SYMBOL and set(book) == set(expected)

@pytest.mark.parametrize('host', [everything, torch.inference_mode], ids=['everything', 'inference mode'])
def test_a_training_is_the_same_in_any_host(ai, bars, tmp_path, host):
    with host():
        before = settings()
        other, _ = trained(bars, tmp_path)
        assert settings() == before
    assert same_weights(ai, other)
    assert said(other, bars) == said(ai, bars)

def test_calls_that_overlap_share_the_settings_of_the_process():
    "The one that ends first does not take them from the other, and the last one puts back what was there"
    inside, leave = threading.Event(), threading.Event()
    def long():
        with own_settings():
            inside.set()
            leave.wait(10)
    with HOSTS['default dtype']():
        thread = threading.Thread(target=long)
        thread.start()
        inside.wait(10)
        with own_settings(): assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_dtype() == torch.float32          # the thread is still at it
        leave.set()
        thread.join()
        assert torch.get_default_dtype() == torch.float64

def test_settings_come_back_after_an_error():
    with HOSTS['default dtype'](), np.errstate(all='raise'):
        before = settings()
        with pytest.raises(KeyError), own_settings(): raise KeyError('x')
        assert settings() == before

def test_nothing_is_warned_of(recwarn):
    with own_settings(): pass
    assert not recwarn.list

# ---- what lies in the state folder

def test_fewer_epochs_than_a_leftover_has(ai, bars, tmp_path):
    "A training that was not saved left three; one is asked for, and one is trained"
    trained(bars, tmp_path, epochs=3)
    other, history = trained(bars, tmp_path, epochs=1)
    assert len(history['epochs']) == 1
    assert same_weights(ai, other)
    assert said(other, bars) == said(ai, bars)

def test_other_values_of_an_own_column_are_another_training(bars, tmp_path):
    "Even where they differ at one bar"
    own = bars[['time', 'symbol']].assign(known=bars.time + pd.Timedelta('1h'), x=np.arange(len(bars)) % 7 / 7)
    one = own.assign(x=own.x.where(own.index != 1500, 9.))
    for extra in (own, one):
        config = dict(size='small', horizons=[4, 8], state_dir=str(tmp_path), fresh=False)
        ai = UltimateTradingAI(config, device='cpu')
        with contextlib.redirect_stdout(None): ai.train_sync(bars, epochs=1, extra=extra)
    assert len(list((tmp_path/'training').iterdir())) == 2

@pytest.mark.skipif(sys.platform == 'win32', reason='forks')
def test_saving_leaves_a_training_of_another_process_alone(bars, tmp_path):
    "The same call, so the same folder of checkpoints: it is there as long as its owner lives, and then it goes"
    ai, _ = trained(bars, tmp_path, fresh=False)
    folder, = (tmp_path/'training').iterdir()
    go, saved = tmp_path/'go', tmp_path/'saved'
    def other():
        with lock(folder, name='TRAINING'):
            go.touch()
            while not saved.exists(): time.sleep(.01)
            return 0 if (folder/'checkpoint'/'CURRENT').exists() else 1
    pid = forked(other)
    while not go.exists(): time.sleep(.01)
    try:
        ai.save_state()
        assert folder.exists()
    finally: saved.touch()
    assert ended(pid) == 0
    again, _ = trained(bars, tmp_path, fresh=False)
    again.save_state()
    assert not folder.exists()
