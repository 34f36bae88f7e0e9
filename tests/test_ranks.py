"Several processes train one model over gloo on loopback: the curve of one, kills, hangs, errors (suites 4, 11, 12, 14)"
import json, math, os, signal, socket, subprocess, sys, textwrap, time

import pytest, torch
from torch import nn
from torch.nn import functional as F

from conftest import forked
from cryptoml import runs
from cryptoml.parameters import JobError, JobFailed
from cryptoml.state import generations, load, lock, read_lines
from cryptoml.trainer import TrainConfig, TrainerError, UltimateTrainer, weighted_mean
from test_trainer import X, Y, bits, whole_history

ROWS, BATCH = 61, 15      # the last batch has one row: too few for two processes
WEIGHT = torch.linspace(0, 2, len(X))

def batches(epoch, generator):
    for i in torch.randperm(ROWS, generator=generator).split(BATCH): yield dict(x=X[i], y=Y[i])

def weighted(epoch, generator):
    for i in torch.randperm(ROWS, generator=generator).split(BATCH): yield dict(x=X[i], y=Y[i], weight=WEIGHT[i])

def each(m, b): return F.cross_entropy(m(b['x']), b['y'], reduction='none')

def loss(m, b):
    hits = m(b['x']).argmax(1) == b['y']
    return each(m, b).mean(), dict(accuracy=hits.float().mean(), one=1)

def weighted_loss(m, b): return weighted_mean(each(m, b), b['weight'])

def validate(m): return dict(loss=F.cross_entropy(m(X[64:]), Y[64:]))

def network(seed=0, dropout=0.):
    torch.manual_seed(seed)
    m = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 2))
    m.unused = nn.ParameterDict(dict(scale=nn.Parameter(torch.ones(3))))      # no batch touches it
    m.forward = lambda x: nn.Sequential(*list(m.children())[:5])(x)
    return m

def config(**kw): return TrainConfig(**dict(epochs=4, lr=.01, patience=50, lr_patience=0, average=.9) | kw)

def fit(out, seed=0, dropout=0., batches=batches, loss=loss, validate=validate, timeout=60, **kw):
    trainer = UltimateTrainer(network(seed, dropout), config(**kw), out, 'cpu', timeout)
    return trainer.fit(batches, loss, validate), trainer.model

# ---- processes

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def ended(pids, within=100):
    "Exit codes; whatever is still there after so many seconds is killed, and the test fails"
    codes, until = {}, time.monotonic() + within
    while len(codes) < len(pids) and time.monotonic() < until:
        for pid in set(pids) - codes.keys():
            found, status = os.waitpid(pid, os.WNOHANG)
            if found: codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(.01)
    for pid in set(pids) - codes.keys():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert len(codes) == len(pids), f'{len(pids) - len(codes)} of {len(pids)} processes hang'
    return [codes[pid] for pid in pids]

def start(n, work, tmp_path):
    "n processes as torchrun starts them; each writes what `work` of its number gives, or its error"
    port = free_port()
    def child(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1',
                          MASTER_PORT=str(port))
        try: told = dict(found=work(rank))
        except TrainerError as e: told = dict(error=str(e))
        (tmp_path/f'told{rank}').write_text(json.dumps(told))
    for old in tmp_path.glob('told*'): old.unlink()
    return [forked(lambda rank=rank: child(rank)) for rank in range(n)]

def told(n, tmp_path): return [json.loads((tmp_path/f'told{r}').read_text()) for r in range(n)]

def ranks(n, work, tmp_path):
    codes = ended(start(n, work, tmp_path))
    assert codes == [0] * n
    return told(n, tmp_path)

def curve(history, model):
    "What a training gave: its columns but for the seconds, and the weights"
    return dict(history=history.drop(columns='seconds').to_dict('list'),
                weights=torch.cat([p.detach().flatten() for p in model.parameters()]).tolist())

def same_curve(a, b):
    assert a['history'].keys() == b['history'].keys()
    for name, column in a['history'].items(): assert column == pytest.approx(b['history'][name], abs=1e-5), name
    assert a['weights'] == pytest.approx(b['weights'], abs=1e-4)

# ---- the same curve as one process

@pytest.mark.parametrize('kw', [
    dict(),
    dict(accumulate=3),
    dict(batches=weighted, loss=weighted_loss, accumulate=2),
], ids=['plain', 'in pieces', 'weighted'])
def test_two_processes_take_the_steps_of_one(tmp_path, one_thread, kw):
    "From the first one's weights, into the first one's folder, batches and shares unequal"
    expected = curve(*fit(tmp_path/'alone', **kw | dict(accumulate=1)))
    both = ranks(2, lambda r: curve(*fit(tmp_path/f'out{r}', seed=r, **kw)), tmp_path)
    for one in both: same_curve(one['found'], expected)
    assert both[0] == both[1]
    assert whole_history(tmp_path/'out0', 4) and len(generations(tmp_path/'out0'/'checkpoint')) == 2
    assert not (tmp_path/'out1').exists()

def test_three_processes(tmp_path, one_thread):
    expected = curve(*fit(tmp_path/'alone', epochs=2))
    all_three = ranks(3, lambda r: curve(*fit(tmp_path/f'out{r}', epochs=2)), tmp_path)
    for one in all_three: same_curve(one['found'], expected)

def test_one_process_of_torchrun_is_one_process(tmp_path, one_thread):
    fit(tmp_path/'alone', dropout=.2)
    ranks(1, lambda r: fit(tmp_path/'out', dropout=.2) and None, tmp_path)
    assert bits(tmp_path/'out') == bits(tmp_path/'alone')

def test_two_trainings_one_after_the_other(tmp_path, one_thread):
    "The second is connected anew; and what was begun by two is finished by one"
    def work(r):
        fit(tmp_path/'a', epochs=2)
        return curve(*fit(tmp_path/'b', epochs=2))
    ranks(2, work, tmp_path)
    same_curve(curve(*fit(tmp_path/'b')), curve(*fit(tmp_path/'alone')))

# ---- noise

def test_each_process_has_noise_of_its_own(tmp_path, one_thread):
    def drawn(r):
        seen = []
        def look(m, b):
            seen.append(torch.rand(3).tolist())
            return loss(m, b)
        fit(tmp_path/'out', loss=look, epochs=2)
        return seen
    a, b = (one['found'] for one in ranks(2, drawn, tmp_path))
    assert len(a) == len(b) == 2 * 5
    assert not {tuple(x) for x in a} & {tuple(x) for x in b}

# ---- kills and hangs

def stop(signal_, at):
    "A loss that ends its process, or halts it, at the call of this number"
    calls = 0
    def deadly(m, b):
        nonlocal calls
        calls += 1
        if calls == at: os.kill(os.getpid(), signal_)
        return loss(m, b)
    return deadly

def deadly(rank, out, victim, signal_=signal.SIGKILL, at=13, **kw):     # in the third epoch
    fit(out, dropout=.2, **kw, **dict(loss=stop(signal_, at)) if rank == victim else {})

@pytest.mark.parametrize('victim', [0, 1])
def test_a_killed_process_ends_the_other_and_the_training_goes_on(tmp_path, one_thread, victim):
    "By the death that it notices, and not by its limit, which is three times as long as we wait"
    ranks(2, lambda r: deadly(r, tmp_path/'through', None), tmp_path)
    codes = ended(start(2, lambda r: deadly(r, tmp_path/'cut', victim, timeout=900), tmp_path), within=300)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 0
    said = json.loads((tmp_path/f'told{1 - victim}').read_text())['error']
    assert f'process {1 - victim} of 2 lost the others' in said
    assert said.endswith('start all of them again, the training goes on from its last whole epoch')
    assert len(load(tmp_path/'cut'/'checkpoint')[0]['history']['epoch']) == 2
    ranks(2, lambda r: deadly(r, tmp_path/'cut', None), tmp_path)
    assert bits(tmp_path/'cut') == bits(tmp_path/'through') and whole_history(tmp_path/'cut', 4)

def test_a_process_that_hangs_ends_the_other_after_the_limit(tmp_path, one_thread):
    pids = start(2, lambda r: deadly(r, tmp_path/'out', 1, signal.SIGSTOP, timeout=4), tmp_path)
    try: assert ended(pids[:1], within=60) == [0]
    finally:
        os.kill(pids[1], signal.SIGKILL)
        os.waitpid(pids[1], 0)
    assert 'has not answered for 4 s' in told(1, tmp_path)[0]['error']

def test_a_process_that_never_comes(tmp_path):
    "Two were announced, one is there"
    def work(r):
        os.environ['WORLD_SIZE'] = '2'
        fit(tmp_path/'out', timeout=2)
    said = ranks(1, work, tmp_path)[0]['error']
    assert 'process 0 of 2 lost the others' in said and 'has not answered for 2 s' in said

script = textwrap.dedent('''
    import os, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import test_ranks as t
    out, rank = Path(sys.argv[2]), int(os.environ['RANK'])
    t.torch.set_num_threads(1)
    first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'
    t.deadly(rank, out, 1 if first else None)
''')

def test_torchrun_starts_it_again(tmp_path, one_thread):
    ranks(2, lambda r: deadly(r, tmp_path/'through', None), tmp_path)
    (tmp_path/'train.py').write_text(script)
    run = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--max-restarts', '1']
    at = ['--master-addr', '127.0.0.1', '--master-port', str(free_port())]
    train = [str(tmp_path/'train.py'), os.path.dirname(__file__), str(tmp_path/'out')]
    r = subprocess.run(run + at + train, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr
    assert bits(tmp_path/'out') == bits(tmp_path/'through') and whole_history(tmp_path/'out', 4)

# ---- errors are everyone's

def test_both_say_what_is_wrong_with_the_folder(tmp_path, one_thread):
    fit(tmp_path/'out', epochs=1)
    both = ranks(2, lambda r: fit(tmp_path/'out', seed=0, lr=.02), tmp_path)
    assert both[0] == both[1] and 'lr=0.01 there and 0.02 now' in both[0]['error']
    with lock(tmp_path/'out', name='TRAINING'):
        assert 'in use by process' in ranks(2, lambda r: in_words(fit, tmp_path/'out'), tmp_path)[1]['error']

def in_words(f, *args):
    "An error of the first process's folder is another kind of error there"
    try: f(*args)
    except RuntimeError as e: raise TrainerError(str(e)) from None

def test_both_say_what_is_wrong_with_the_validation(tmp_path, one_thread):
    both = ranks(2, lambda r: fit(tmp_path/'out', validate=lambda m: dict(mse=1.)), tmp_path)
    assert both[0] == both[1] and "must return 'loss', got ['mse']" in both[0]['error']

def test_a_bad_row_of_one_process_is_skipped_by_all(tmp_path, one_thread):
    def spoilt(epoch, generator):
        for n, b in enumerate(batches(epoch, generator)):
            if n == 1: b['x'] = torch.cat([b['x'][:-1], b['x'][-1:] * math.nan])      # in the second one's share
            yield b
    both = ranks(2, lambda r: curve(*fit(tmp_path/'out', batches=spoilt)), tmp_path)
    expected = curve(*fit(tmp_path/'alone', batches=spoilt))
    assert expected['history']['skipped'] == [1] * 4
    for one in both: same_curve(one['found'], expected)

def test_who_has_connected_before(tmp_path):
    "His group may lack what ours needs, and is not ours to close"
    def work(r):
        torch.distributed.init_process_group('gloo')
        try: fit(tmp_path/'out')
        finally: assert torch.distributed.is_initialized()
    assert 'leave init_process_group to fit' in ranks(1, work, tmp_path)[0]['error']

def test_a_row_that_has_no_place(tmp_path, one_thread):
    both = ranks(2, lambda r: fit(tmp_path/'out', batches=lambda *_: [dict(x=X[:4], y=Y[:3])]), tmp_path)
    for one in both: assert 'a batch with 3, 4 rows cannot be cut' in one['error']
    assert read_lines(tmp_path/'out'/'history.jsonl') == []

# ---- a job

TOGETHER = """
import os, signal
from pathlib import Path
import torch
import test_ranks as t
from cryptoml.trainer import go_on_alone, of_torchrun
number, total = of_torchrun()
threads = torch.get_num_threads()
victim, how = os.environ.get('VICTIM', '- -').split()
def deadly(m, b):
    global calls
    calls += 1
    pid = dict(kernel=os.getpid(), launcher=os.getppid())
    if str(number) == victim and calls == 7:                                        # in the second epoch
        os.kill(pid[how], signal.SIGKILL)
        signal.pause()
    return t.loss(m, b)
calls = 0
(Path(out)/'mine').touch()
history, _ = t.fit(out, loss=deadly, epochs=epochs)
again, _ = t.fit(Path(out)/'again', epochs=1)             # a second training in the same group
go_on_alone()
"""
METRICS = """
from cryptoml.state import write_json
losses = {k: history[k].tolist() for k in ('train_loss', 'valid_loss')}
write_json(Path(out)/'metrics.json', losses | dict(second=again.train_loss.tolist(), threads=threads, total=total))
"""

@pytest.fixture
def job(tmp_path, monkeypatch):
    "A notebook that trains twice, together; what the others put into folders of their own goes into `scratch`"
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([os.path.dirname(__file__), os.environ.get('PYTHONPATH', '')]))
    (tmp_path/'scratch').mkdir()
    monkeypatch.setenv('TMPDIR', str(tmp_path/'scratch'))
    monkeypatch.setattr(runs.tempfile, 'tempdir', None)
    cells = dict(parameters="epochs: int = 3\nthreads: int = 2\nout: str = ''", together=TOGETHER, rest=METRICS)
    made = [dict(cell_type='code', id=tag, metadata=dict(tags=[tag]), execution_count=None, outputs=[], source=source)
            for tag, source in cells.items()]
    path = tmp_path/'job.ipynb'
    kernel = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    path.write_text(json.dumps(dict(cells=made, metadata=kernel, nbformat=4, nbformat_minor=5)))
    return path

def run_job(job, out, **given):
    "In a process of its own"
    os.environ['LOCAL_WORLD_SIZE'] = os.environ['WORLD_SIZE']
    try: return runs.run(job, out, **given)
    except (JobError, JobFailed) as e: raise TrainerError(str(e)) from None

def killed_under_torchrun(job, out):
    "One of two commands is killed in the second epoch: what the other says"
    run = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-addr', '127.0.0.1']
    line = ['--master-port', str(free_port()), '-m', 'cryptoml.jobs', str(job), '--out', str(out)]
    env = os.environ | dict(VICTIM='1 launcher')
    r = subprocess.run(run + line, capture_output=True, text=True, timeout=300, env=env, cwd=os.path.dirname(__file__))
    with lock(out, wait=100): pass                                  # its kernel has gone too
    assert r.returncode != 0
    return [line for line in r.stderr.splitlines() if line.startswith('cryptoml: ')]

def test_a_job_of_two_processes(tmp_path, job, monkeypatch):
    "One is killed; the same command ends as alone would; once more there is nothing to do"
    def folders(): return {p.name for p in (tmp_path/'scratch').glob('cryptoml-*')}
    said, = killed_under_torchrun(job, tmp_path/'out')
    left = folders()                       # of the one who was killed
    assert len(left) <= 1
    assert 'process 0 was ended by torchrun' in said or 'process 0 of 2 lost the others' in said
    assert whole_history(tmp_path/'out', 1) and not (tmp_path/'out'/'metrics.json').exists()
    found = [one['found'] for one in ranks(2, lambda r: run_job(job, tmp_path/'out'), tmp_path)]
    assert found[1] == {} and (found[0].pop('total'), found[0].pop('threads')) == (2, 1)
    expected, _ = fit(tmp_path/'alone', epochs=3)
    once, _ = fit(tmp_path/'once', epochs=1)
    for name in ('train_loss', 'valid_loss'): assert found[0][name] == pytest.approx(expected[name].tolist(), abs=1e-5)
    assert found[0]['second'] == pytest.approx(once.train_loss.tolist(), abs=1e-5)
    monkeypatch.setattr(runs, 'execute', lambda *_: 1 / 0)
    answered = [one['found'] for one in ranks(2, lambda r: run_job(job, tmp_path/'out'), tmp_path)]
    assert answered[0]['second'] == found[0]['second'] and answered[1] == {}
    assert folders() == left
    assert {p.name for p in (tmp_path/'out').iterdir()} >= {'mine', 'job.ipynb', 'params.json', 'again'}

def test_another_command_is_refused(tmp_path, job):
    def work(r): return run_job(job, tmp_path/'out', epochs=4) if r else said_by_first(job, tmp_path)
    said = ranks(2, work, tmp_path)
    assert 'the first process runs another job (epochs=3, not 4)' in said[1]['error']

def said_by_first(job, tmp_path):
    "The first process, with a kernel that ends once the other has"
    def execute(*_):
        while not (tmp_path/'told1').exists(): time.sleep(.01)
        (tmp_path/'out'/'metrics.json').write_text('{}')
    runs.execute = execute
    return run_job(job, tmp_path/'out')

def test_a_job_that_shares_nothing_is_not_started_twice(tmp_path, job):
    job.write_text(job.read_text().replace('"together"', '"rest"'))
    for one in ranks(2, lambda r: run_job(job, tmp_path/'out'), tmp_path):
        assert one['error'].endswith('it has no cell tagged together: start it without torchrun')
    assert not (tmp_path/'out').exists()
