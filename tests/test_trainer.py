"The loop under kills, damage and bad input: exact resume, determinism, learning (suites 4, 5, 11, 12, 13, 14)"
import collections, hashlib, math, os, signal, subprocess, sys, textwrap, types

import pandas as pd, pytest, torch
from torch import nn
from torch.nn import functional as F

from cryptoml.state import generations, load, lock, read_lines, save
from cryptoml.trainer import (
    TrainConfig, TrainerError, UltimateTrainer, _State, cut, epoch_seed, pick_device, plot_learning, to_device,
    train_epoch, weighted_mean)

X = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] * X[:, 1] > 0).long()

def batches(epoch, generator):
    for i in torch.randperm(64, generator=generator).split(16): yield dict(x=X[i], y=Y[i])

def loss(m, batch): return F.cross_entropy(m(batch['x']), batch['y'])

def validate(m): return dict(loss=F.cross_entropy(m(X[64:]), Y[64:]))

def network(seed=0, width=16):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.GELU(), nn.Dropout(0.2), nn.Linear(width, 2))

def config(**kw): return TrainConfig(**dict(epochs=6, lr=0.01, patience=50, lr_patience=0) | kw)

def trainer(out, model=None, **kw): return UltimateTrainer(model or network(), config(**kw), out, 'cpu')

def fit(out, model=None, **kw): return trainer(out, model, **kw).fit(batches, loss, validate)

def content(out): return load(out/'checkpoint')[1]

def history_of(out):
    "The rows that the newest generation holds"
    tensors, c = load(out/'checkpoint')
    return pd.DataFrame({k: tensors['history'][k].numpy() for k in c['columns']}).to_dict('records')

def bits(out):
    "All that a run left: weights, best weights, moments, learning rates, history but for its seconds"
    tensors, c = load(out/'checkpoint')
    tensors['history'].pop('seconds', None)
    h = hashlib.sha256()
    for name, group in sorted(tensors.items()):
        for k, v in sorted(group.items()):
            h.update(f'{name} {k} {v.dtype} {tuple(v.shape)}'.encode())
            h.update(v.contiguous().numpy().tobytes())
    h.update(repr([c['lrs'], c['plateau'], c['best_loss'], c['best_epoch'], c['columns']]).encode())
    return h.hexdigest()

def whole_history(out, epochs):
    lines = read_lines(out/'history.jsonl')
    return [r['epoch'] for r in lines] == list(range(1, epochs + 1)) and lines == history_of(out)

@pytest.fixture(scope='module')
def through(tmp_path_factory):
    "A run that nothing interrupted"
    out = tmp_path_factory.mktemp('through')
    fit(out)
    return out

# ---- suites 4, 11, 12: real kills in real processes

script = textwrap.dedent('''
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import test_trainer as t
    from cryptoml import state, trainer
    out, where, n = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    count = 0
    def deadly(name, f):
        def g(*args, **kw):
            global count
            if name == where:
                count += 1
                if count == n: os.kill(os.getpid(), signal.SIGKILL)
            return f(*args, **kw)
        return g
    state.os.fsync = deadly('fsync', os.fsync)
    trainer.append_line = deadly('append', trainer.append_line)
    t.torch.set_num_threads(1)
    tr = trainer.UltimateTrainer(t.network(n), t.config(), out, 'cpu')   # each process starts from other weights
    tr.fit(t.batches, deadly('loss', t.loss), deadly('validate', t.validate))
    print('bits', t.bits(out))
''')

def process(out, where='nowhere', n=0):
    env = os.environ | dict(OMP_NUM_THREADS='1')
    command = [sys.executable, '-c', script, os.path.dirname(__file__), str(out), where, str(n)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)

def test_killed_again_and_again(tmp_path, one_thread):
    fit(tmp_path/'through')
    expected = bits(tmp_path/'through')
    with pytest.raises(KeyboardInterrupt):   # the weights to start from are on disk before the first step
        trainer(tmp_path/'killed').fit(batches, interrupt, validate)
    for where, n in (('loss', 3), ('append', 2), ('validate', 2), ('fsync', 9), ('loss', 7)):
        r = process(tmp_path/'killed', where, n)
        assert r.returncode == -signal.SIGKILL, r.stderr
    r = process(tmp_path/'killed')
    assert r.returncode == 0, r.stderr
    assert r.stdout.split()[-1] == expected == bits(tmp_path/'killed')
    assert whole_history(tmp_path/'killed', 6)
    assert process(tmp_path/'killed').stdout.split() == ['bits', expected]   # finished: nothing is trained again

def interrupt(m, batch): raise KeyboardInterrupt

# ---- suite 12 within one process

@pytest.mark.parametrize('stop', range(1, 24, 3))
def test_interrupted_anywhere(through, tmp_path, stop):
    calls = 0
    def sometimes(m, batch):
        nonlocal calls
        calls += 1
        if calls == stop: raise KeyboardInterrupt
        return loss(m, batch)
    t = trainer(tmp_path)
    with pytest.raises(KeyboardInterrupt): t.fit(batches, sometimes, validate)
    t.fit(batches, loss, validate)                     # the same object, its weights half an epoch on
    assert bits(tmp_path) == bits(through) and whole_history(tmp_path, 6)

def test_more_epochs(through, tmp_path):
    fit(tmp_path, epochs=2)
    fit(tmp_path, epochs=5)
    h = fit(tmp_path, epochs=6)
    assert bits(tmp_path) == bits(through)
    assert whole_history(tmp_path, 6) and len(h) == 6
    with pytest.raises(TrainerError, match='6 epochs there and 3 asked for'): fit(tmp_path, epochs=3)

def test_same_seed_same_bits(through, tmp_path):
    torch.rand(7)                                      # what was drawn before does not matter
    fit(tmp_path/'a')
    fit(tmp_path/'b', seed=1)
    assert bits(tmp_path/'a') == bits(through)
    assert bits(tmp_path/'b') != bits(through)

def test_random_state_is_left_alone(tmp_path):
    model = network()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(tmp_path, model)
    assert torch.equal(torch.rand(3), expected)

def test_batches_and_noise_depend_on_seed_and_epoch(tmp_path):
    seen = collections.defaultdict(list)
    def record(epoch, generator):
        seen[epoch].append(torch.rand(3, generator=generator).tolist())
        return batches(epoch, generator)
    for out, seed in (('a', 0), ('b', 0), ('c', 1)):
        trainer(tmp_path/out, epochs=2, seed=seed).fit(record, loss, validate)
    for e in (1, 2): assert seen[e][0] == seen[e][1] != seen[e][2]
    assert seen[1][0] != seen[2][0]

# ---- suite 5: a damaged checkpoint

def test_damaged_newest_generation(through, tmp_path):
    fit(tmp_path, epochs=4)
    path = generations(tmp_path/'checkpoint')[-1]/'optimizer.safetensors'
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)
    with pytest.warns(UserWarning, match='was loaded instead'): fit(tmp_path)
    assert bits(tmp_path) == bits(through) and whole_history(tmp_path, 6)

def test_no_whole_generation(tmp_path):
    fit(tmp_path, epochs=1)
    for g in generations(tmp_path/'checkpoint'): (g/'model.safetensors').write_bytes(b'')
    with pytest.raises(RuntimeError, match='no whole generation'): fit(tmp_path)

def test_torn_history(through, tmp_path):
    fit(tmp_path, epochs=3)
    text = (tmp_path/'history.jsonl').read_text()
    (tmp_path/'history.jsonl').write_text(text + text[:-30])
    fit(tmp_path)
    assert whole_history(tmp_path, 6) and bits(tmp_path) == bits(through)

# ---- other runs, other trainers

def test_a_run_of_an_earlier_version(through, tmp_path):
    "Its history stood in the manifest"
    tensors, c = load(through/'checkpoint')
    tensors.pop('history')
    save(tmp_path/'checkpoint', tensors, {k: v for k, v in c.items() if k != 'columns'} | dict(history=[dict(epoch=1)]))
    with pytest.raises(TrainerError, match='an earlier version: use another folder'): fit(tmp_path)

def test_a_long_history(tmp_path):
    "Ten thousand epochs are more than a manifest holds"
    settings = config(epochs=10_001)
    run = _State(network(), settings, tmp_path/'checkpoint')
    run.history = [dict(epoch=i, train_loss=1 / i, valid_loss=2 / i, valid_accuracy=.5) for i in range(1, 10_001)]
    run.save()
    again = _State(network(), settings, tmp_path/'checkpoint')
    again.begin()
    assert again.history == run.history

@pytest.mark.parametrize('kw, says', [
    (dict(seed=3), 'seed=0 there and 3 now'),
    (dict(lr=0.02, clip=2.), 'lr=0.01 there and 0.02 now; clip=1.0 there and 2.0 now'),
    (dict(amp=True), 'amp=False'),
], ids=str)
def test_other_settings(through, kw, says):
    before = bits(through)
    with pytest.raises(TrainerError, match=says): fit(through, **kw)
    assert bits(through) == before

@pytest.mark.parametrize('model, says', [
    (network(width=17), r'tensors of the model, first 0.weight: \[16, 4\] float32 there and \[17, 4\] float32 now'),
    (network().double(), 'first 0.weight: .* float32 there and .* float64 now'),
    (nn.Sequential(network(), nn.Linear(2, 2)), 'absent'),
], ids=['wider', 'double', 'deeper'])
def test_other_model(through, model, says):
    with pytest.raises(TrainerError, match=says): fit(through, model)

def test_two_trainers_on_one_folder(tmp_path):
    def second(m):
        with pytest.raises(RuntimeError, match=f'in use by process {os.getpid()}'): fit(tmp_path)
        return validate(m)
    with lock(tmp_path):                               # who owns the folder for a job may train in it
        trainer(tmp_path, epochs=1).fit(batches, loss, second)
    fit(tmp_path, epochs=1)                            # released

# ---- what the loop decides

def scripted(losses):
    it = iter(losses)
    return lambda m: dict(loss=next(it), score=1.5)

def test_early_stop_and_best_weights(tmp_path):
    kept = []
    def remember(m):
        kept.append({k: v.clone() for k, v in m.state_dict().items()})
        return dict(loss=[5, 3, 4, 2, 2, 2.5, 9, 1][len(kept) - 1])
    t = trainer(tmp_path, epochs=20, patience=3)
    h = t.fit(batches, loss, remember)
    assert h.valid_loss.tolist() == [5, 3, 4, 2, 2, 2.5, 9]    # stopped three epochs after the best
    assert all(torch.equal(v, kept[3][k]) for k, v in t.model.state_dict().items())
    assert not t.model.training

def test_validation_is_an_evaluation(tmp_path):
    "Dropout off, no gradients; and back to training for the next epoch"
    modes = []
    def look(m, b):
        modes.append(m.training)
        return loss(m, b)
    def validated(m):
        modes.append((m.training, torch.is_grad_enabled()))
        return validate(m)
    trainer(tmp_path, epochs=2).fit(batches, look, validated)
    epoch = [True] * 4 + [(False, False)]
    assert modes == epoch + epoch

@pytest.mark.parametrize('losses, rate', [
    ([1.] * 4, .005),                       # the fourth epoch is the third that is not better
    ([-1.] * 4, .005),
    ([0.] * 4, .005),
    ([-100, -99.996, -99.992, -99.988], .005),
    ([-1., -1.1, -1.2, -1.3], .01),
    ([1e-5, 9e-6, 8e-6, 7e-6], .01),        # a loss in small units
], ids=str)
def test_the_learning_rate_falls_on_a_plateau_of_any_sign(tmp_path, losses, rate):
    trainer(tmp_path, epochs=len(losses), lr=.01, lr_patience=2).fit(batches, loss, scripted(losses))
    assert content(tmp_path)['lrs'][0] == rate

def test_learning_rate_floor(tmp_path):
    t = trainer(tmp_path, epochs=12, lr=0.01, lr_factor=0.1, min_lr=1e-5)
    h = t.fit(batches, loss, scripted([1.] * 12))
    assert h.lr.tolist() == pytest.approx([1e-2, 1e-2, 1e-3, 1e-4] + [1e-5] * 8)

def test_validation_not_finite(tmp_path):
    h = trainer(tmp_path, epochs=4).fit(batches, loss, scripted([math.nan, 2., math.inf, 3.]))
    assert h.valid_loss.tolist()[1::2] == [2, 3] and content(tmp_path)['best_epoch'] == 2
    again = trainer(tmp_path, epochs=4).fit(None, None, validate)
    pd.testing.assert_series_equal(again.valid_loss, h.valid_loss)          # as they were
    assert again.valid_loss.dtype == float

def test_no_epoch_was_finite(tmp_path):
    with pytest.raises(TrainerError, match='none of 2 epochs'):
        trainer(tmp_path, epochs=2).fit(batches, loss, scripted([math.nan] * 2))
    with pytest.raises(TrainerError, match='none of 2 epochs'):
        trainer(tmp_path, epochs=2).fit(batches, loss, validate)      # the run is finished, whatever is asked now

def test_resume_before_any_best(tmp_path):
    "An infinite best loss survives JSON"
    with pytest.raises(StopIteration): trainer(tmp_path, epochs=3).fit(batches, loss, scripted([math.nan]))
    h = trainer(tmp_path, epochs=3).fit(batches, loss, scripted([1e30, 2.]))
    assert len(h) == 3 and content(tmp_path)['best_loss'] == 2

def spoilt(batch): return batch | dict(x=batch['x'] * math.nan)

def test_one_bad_batch_an_epoch(tmp_path):
    def some(epoch, generator):
        for i, b in enumerate(batches(epoch, generator)): yield spoilt(b) if i == 1 else b
    h = trainer(tmp_path, nn.Linear(4, 2), epochs=2).fit(some, loss, validate)
    assert h.skipped.tolist() == [1, 1] and h.train_loss.notna().all()

def test_nothing_but_bad_batches(tmp_path):
    def bad_from_the_third(epoch, generator):
        for _ in range(3):
            for b in batches(epoch, generator): yield spoilt(b) if epoch == 3 else b
    t = trainer(tmp_path, nn.Linear(4, 2))
    with pytest.raises(TrainerError, match='not finite in 5 batches in a row, after 0 good steps .loss nan'):
        t.fit(bad_from_the_third, loss, validate)
    assert len(history_of(tmp_path)) == 2      # the epochs before are kept

def test_an_infinite_gradient_is_skipped():
    "The slope of a root at 0: a finite loss, a gradient that is not"
    m = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(m.weight)
    def root(m, x): return (m(x) + x).sqrt().sum()
    sgd = torch.optim.SGD(m.parameters(), lr=0.1)
    r = train_epoch(m, [torch.zeros(1, 1), torch.ones(1, 1)], root, sgd)
    assert r['skipped'] == 1 and torch.isfinite(m.weight).all()

def no_batches(epoch, generator): return []
def logits(m, b): return m(b['x'])
def constant(m, b): return loss(m, b).detach()
def mse_alone(m): return dict(mse=1.)

@pytest.mark.parametrize('callbacks, says', [
    ((batches, loss, mse_alone), r"must return 'loss', got \['mse'\]"),
    ((no_batches, loss, validate), 'had no batches'),
    ((batches, logits, validate), r'got Tensor \(16, 2\)'),
    ((batches, constant, validate), 'with a gradient'),
], ids=['no loss', 'no batches', 'no scalar', 'no gradient'])
def test_bad_callbacks(tmp_path, callbacks, says):
    with pytest.raises(TrainerError, match=says): trainer(tmp_path).fit(*callbacks)

def test_parts_and_the_line_that_is_told(tmp_path, capsys, caplog):
    def with_parts(m, b):
        v = loss(m, b)
        return v, dict(double=2 * v, one=1)
    h = trainer(tmp_path, epochs=2).fit(batches, with_parts, scripted([3., 4.]))
    assert h.train_double.tolist() == pytest.approx((2 * h.train_loss).tolist())
    assert h.train_one.tolist() == [1, 1]
    parts = ['train_double', 'train_one', 'train_loss', 'valid_loss', 'valid_score']
    assert list(h) == ['epoch', *parts, 'lr', 'skipped', 'seconds']
    first, second = [r.getMessage() for r in caplog.records if r.name == 'cryptoml']
    assert first.startswith('epoch   1  train 0.') and '  valid 3.0000  lr 1.0e-02  ' in first
    assert first.endswith('  best') and not second.endswith('best')
    assert capsys.readouterr().err == ''               # no bar where there is no terminal

def test_a_bar_at_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    fit(tmp_path, epochs=1)
    assert 'epoch 1' in capsys.readouterr().err

def test_frozen_parameters(tmp_path):
    m = network()
    m[0].requires_grad_(False)
    before = m[0].weight.clone()
    fit(tmp_path, m)
    assert torch.equal(m[0].weight, before)

def test_no_matrix_at_all(tmp_path):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.s = nn.Parameter(torch.zeros(()))
    def four(epoch, generator): return [None] * 4
    def distance(m, batch=None): return (m.s - 2).square()
    s = Scale()
    trainer(tmp_path, s, epochs=60, lr=0.1, lr_patience=60).fit(four, distance, lambda m: dict(loss=distance(m)))
    assert s.s.item() == pytest.approx(2, abs=0.05)

@pytest.mark.parametrize('seed', range(3))
def test_overfits_one_batch(tmp_path, seed):
    torch.manual_seed(seed)
    m = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))
    one = dict(x=X[:16], y=torch.arange(16) % 2)       # labels without reason
    def ten(epoch, generator): return [one] * 10
    t = trainer(tmp_path, m, epochs=40, lr=0.02, lr_patience=9, seed=seed)
    t.fit(ten, loss, lambda m: dict(loss=loss(m, one)))
    assert loss(m, one).item() < 0.01

# ---- a batch in pieces

def plain(dropout=0.):
    "No row depends on another"
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 2))

def odd(epoch, generator):
    "64 rows as 3 x 20 and 4"
    for i in torch.randperm(64, generator=generator).split(20):
        yield dict(x=X[i], y=Y[i], weight=X[i, 3].abs(), name='BTC')

def weighted(m, b):
    return weighted_mean(F.cross_entropy(m(b['x']), b['y'], reduction='none'), b['weight'])

def by_rows(m, b):
    "A mean over rows, which pieces of equal weight would not give"
    hits = m(b['x']).argmax(1) == b['y']
    return loss(m, b), dict(accuracy=hits.float().mean())

def unweighted(epoch, generator):
    for b in odd(epoch, generator): yield {k: v for k, v in b.items() if k != 'weight'}

@pytest.mark.parametrize('pieces', [2, 3, 7, 64])
@pytest.mark.parametrize('given, minimised', [(unweighted, by_rows), (odd, weighted)], ids=['rows', 'weights'])
def test_pieces_take_the_steps_of_the_batch(tmp_path, pieces, given, minimised):
    most = 0
    def look(m, b):
        nonlocal most
        most = max(most, len(b['x']))
        assert b['name'] == 'BTC' and len(b['y']) == len(b['x'])
        return minimised(m, b)
    whole, cut = trainer(tmp_path/'whole', plain()), trainer(tmp_path/'cut', plain(), accumulate=pieces)
    a, b = whole.fit(given, minimised, validate), cut.fit(given, look, validate)
    for name in a.columns.drop('seconds'): assert a[name].tolist() == pytest.approx(b[name].tolist(), abs=1e-6), name
    for k, v in weights(whole.model).items(): assert torch.allclose(v, cut.model.state_dict()[k], atol=1e-5)
    assert most == -(-20 // pieces)                    # what has to fit into memory

def test_the_usual_division_by_pieces_would_differ(tmp_path):
    "The two tests above can fail: means of unequal pieces, each counted once, are another loss"
    m, b = plain(), next(odd(1, torch.Generator().manual_seed(0)))
    parts = [piece for piece, _ in cut(b, 3, range(3))]
    right = sum(share * weighted(m, piece) for piece, share in cut(b, 3, range(3)))
    assert right.item() == pytest.approx(weighted(m, b).item(), abs=1e-6)
    assert abs(sum(weighted(m, p) for p in parts) / 3 - weighted(m, b)).item() > 1e-3

def test_pieces_are_resumed_to_the_last_bit(tmp_path):
    def run(out, **kw): return trainer(out, plain(.2), accumulate=3, **kw).fit(odd, weighted, validate)
    run(tmp_path/'through')
    run(tmp_path/'cut', epochs=2)
    run(tmp_path/'cut')
    assert bits(tmp_path/'cut') == bits(tmp_path/'through')
    with pytest.raises(TrainerError, match='accumulate=3 there and 1 now'): fit(tmp_path/'cut', plain(.2))

def test_a_slow_beginning_is_resumed_to_the_last_bit(tmp_path):
    "Fifteen steps of it, cut after some of them"
    fit(tmp_path/'through', warmup=15)
    fit(tmp_path/'cut', warmup=15, epochs=2)
    fit(tmp_path/'cut', warmup=15)
    assert bits(tmp_path/'cut') == bits(tmp_path/'through')
    fit(tmp_path/'without')
    assert bits(tmp_path/'without') != bits(tmp_path/'through')
    assert fit(tmp_path/'cut', warmup=15).lr.tolist() == fit(tmp_path/'through', warmup=15).lr.tolist()
    with pytest.raises(TrainerError, match='warmup=15 there and 0 now'): fit(tmp_path/'cut')

def test_a_batch_that_weighs_nothing_is_skipped(tmp_path):
    def some(epoch, generator):
        for n, b in enumerate(odd(epoch, generator)): yield b | dict(weight=b['weight'] * (n > 0))
    h = trainer(tmp_path, plain(), accumulate=2, epochs=1).fit(some, weighted, validate)
    assert h.skipped.tolist() == [1]

def test_a_piece_that_weighs_nothing_adds_nothing():
    m, b = plain(), dict(x=X[:4], y=Y[:4], weight=torch.tensor([1., 2, 0, 0]))
    r = train_epoch(m, [b], weighted, torch.optim.SGD(m.parameters(), lr=.1), accumulate=2)
    assert r['skipped'] == 0 and r['loss'] == pytest.approx(weighted(plain(), b).item(), abs=1e-6)

def test_shares_of_any_cut_add_up():
    for n, pieces in [(1, 4), (7, 3), (64, 64), (5, 12)]:
        b = dict(x=torch.arange(n), weight=torch.rand(n) + .1)
        by_process = [cut(b, pieces, range(i, i + 1)) for i in range(pieces)]
        rows = torch.cat([piece['x'] for parts in by_process for piece, share in parts if share])
        assert rows.tolist() == list(range(n))
        assert sum(float(share) for parts in by_process for _, share in parts) == pytest.approx(1)

def test_a_setting_that_is_new_was_as_by_default(tmp_path):
    "A run that an earlier version began has no word of it"
    fit(tmp_path, epochs=1)
    tensors, c = load(tmp_path/'checkpoint')
    save(tmp_path/'checkpoint', tensors, c | dict(config={k: v for k, v in c['config'].items() if k != 'accumulate'}))
    assert len(fit(tmp_path)) == 6

# ---- what people read

class Writer:
    "TensorBoard's, as far as we use it"
    def __init__(self, folder):
        self.rows, self.open = [], True
        written[str(folder)] = self
    def add_scalar(self, *row): self.rows.append(row)
    def flush(self): pass
    def close(self): self.open = False

written = {}

def test_tensorboard_where_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', types.SimpleNamespace(SummaryWriter=Writer))
    fit(tmp_path, epochs=2)
    h = fit(tmp_path)                                  # taken up again: the curves are written anew
    board = written[str(tmp_path/'tensorboard')]
    assert not board.open
    assert [v for name, v, _ in board.rows if name == 'valid_loss'] == h.valid_loss.tolist()
    assert [e for name, _, e in board.rows if name == 'train_loss'] == [1, 2, 3, 4, 5, 6]

def test_tensorboard_that_is_broken(tmp_path, monkeypatch, caplog):
    class Broken(types.ModuleType):
        def __getattr__(self, name): raise AttributeError('module numpy has no attribute bool8')
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', Broken('torch.utils.tensorboard'))
    assert len(fit(tmp_path, epochs=1)) == 1
    assert 'TensorBoard is there but cannot be loaded' in caplog.text and 'history.jsonl' in caplog.text

def test_tensorboard_itself(tmp_path):
    pytest.importorskip('tensorboard', reason='TensorBoard is not installed')
    from tensorboard.backend.event_processing import event_accumulator as events
    fit(tmp_path, epochs=2)
    h = fit(tmp_path)
    read = events.EventAccumulator(str(tmp_path/'tensorboard')).Reload()
    assert [e.step for e in read.Scalars('valid_loss')] == list(range(1, 7))
    assert [e.value for e in read.Scalars('valid_loss')] == pytest.approx(h.valid_loss.tolist())

def test_learning_curves(tmp_path):
    import matplotlib.pyplot as plt
    h = fit(tmp_path)
    fig = plot_learning(h.assign(valid_auc=.5), ('loss', 'auc'))
    loss_, auc, rate = fig.axes
    assert [line.get_label() for line in loss_.lines[:2]] == ['training', 'validation']
    assert loss_.lines[1].get_ydata().tolist() == h.valid_loss.tolist()
    assert [a.get_ylabel() for a in fig.axes] == ['loss', 'auc', 'learning rate']
    assert loss_.lines[2].get_xdata()[0] == h.epoch[h.valid_loss.idxmin()] and len(auc.lines) == 2
    plt.close(fig)
    plt.close(plot_learning(h[['epoch', 'train_loss', 'lr']]))                # nothing was validated

# ---- devices

def test_a_process_has_a_device_of_its_own(monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '1')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert pick_device('auto') == pick_device('cuda') == torch.device('cuda:1')
    assert pick_device('cuda:0') == torch.device('cuda:0') and pick_device('cpu') == torch.device('cpu')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    with pytest.raises(TrainerError, match="'cuda:0' is one for 2 processes: use 'cuda'"): pick_device('cuda:0')
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(TrainerError, match="'cuda:2' is not there, this machine has 2 CUDA"): pick_device('auto')

def test_nested_batches():
    Pair = collections.namedtuple('Pair', 'a b')
    meta = torch.device('meta')
    t = torch.ones(2)
    out = to_device(dict(pair=Pair(t, [t, (t, 'x')]), n=3), meta)
    pair = out['pair']
    assert isinstance(pair, Pair) and out['n'] == 3
    first, (second, text) = pair.b
    assert pair.a.device == first.device == second.device == meta and text == 'x'

def test_devices():
    assert pick_device('cpu') == torch.device('cpu')
    assert pick_device('auto').type == ('cuda' if torch.cuda.is_available() else 'cpu')

@pytest.mark.parametrize('device, says', [
    ('gpu', 'device must be'),
    ('meta', 'device must be'),
    ('', 'device must be'),
    ('cuda:x', 'device must be'),
    ('cuda:64', 'is not there'),
])
def test_no_such_device(device, says):
    with pytest.raises(TrainerError, match=says): pick_device(device)

def test_autocast():
    "bfloat16 in the forward pass, float32 in the weights"
    m = network()
    seen = []
    def look(m, b):
        out = m(b['x'])
        seen.append(out.dtype)
        return F.cross_entropy(out.float(), b['y'])
    train_epoch(m, batches(1, torch.Generator()), look, torch.optim.SGD(m.parameters(), lr=0.1), amp=True)
    assert seen == [torch.bfloat16] * 4
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in m.parameters())

def test_seeds_differ():
    purposes = ('batches', 'noise')
    seeds = {epoch_seed(s, e, p) for s in range(20) for e in range(1, 101) for p in purposes}
    assert len(seeds) == 20 * 100 * 2

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('amp', [False, True])
def test_cuda(tmp_path, amp):
    x, y = X[64:].cuda(), Y[64:].cuda()
    def validate(m): return dict(loss=F.cross_entropy(m(x), y))
    def fit(epochs):
        t = UltimateTrainer(network(), config(epochs=epochs, amp=amp), tmp_path, 'cuda')
        return t.fit(batches, loss, validate)
    fit(3)
    h = fit(6)
    assert len(h) == 6 and h.train_loss.iloc[-1] < h.train_loss.iloc[0]


# ---- again, with what was found ----------------------------------------------------------------------------

RATES = (1e-2, 1e-2, 5e-3, 2.5e-3)

def weights(model): return {k: v.clone() for k, v in model.state_dict().items()}

def test_a_repeated_training_is_the_validated_one(tmp_path):
    "Same rows, same rates: validation changes nothing but the choice of the epoch"
    falling = scripted([4., 5., 6., 3.])                       # the rate falls after two bad epochs
    first = trainer(tmp_path/'first', epochs=4, lr_patience=0)
    h = first.fit(batches, loss, falling)
    again = trainer(tmp_path/'again', epochs=4, rates=tuple(h.lr))
    again.fit(batches, loss)
    assert len(set(h.lr)) == 3
    for k, v in weights(first.model).items(): assert torch.equal(v, again.model.state_dict()[k])

def test_a_repeated_training_is_resumed(tmp_path):
    whole = trainer(tmp_path/'whole', epochs=4, rates=RATES)
    whole.fit(batches, loss)
    def killed(epoch, generator):
        if epoch == 3: raise KeyboardInterrupt
        return batches(epoch, generator)
    with pytest.raises(KeyboardInterrupt): trainer(tmp_path/'cut', epochs=4, rates=RATES).fit(killed, loss)
    cut = trainer(tmp_path/'cut', epochs=4, rates=RATES)
    assert cut.fit(batches, loss).lr.tolist() == list(RATES)
    for k, v in weights(whole.model).items(): assert torch.equal(v, cut.model.state_dict()[k])

def test_rates_and_validation_exclude_one_another(tmp_path):
    with pytest.raises(TrainerError, match='give validate or rates'): trainer(tmp_path).fit(batches, loss)
    with pytest.raises(TrainerError, match='give validate or rates'):
        trainer(tmp_path, epochs=4, rates=RATES).fit(batches, loss, validate)
    with pytest.raises(TrainerError, match='one for each of 3 epochs'): TrainConfig(epochs=3, rates=RATES)
    trainer(tmp_path, epochs=4, rates=RATES).fit(batches, loss)
    with pytest.raises(TrainerError, match='rates='): trainer(tmp_path, epochs=4).fit(batches, loss, validate)
