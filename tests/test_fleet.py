"""Several runs at once: refused before any starts, killed, interrupted, continued; and on a cluster of two nodes"""
import contextlib, hashlib, json, os, signal, subprocess, sys
from types import SimpleNamespace

import psutil
import pytest
from test_jobs import HANGS, command, line_of, notebook, steps_of, wait_for, wait_for_end

from cryptoml import fleet, jobs
from cryptoml.fleet import Fleet, Local, Run, runs_table
from cryptoml.ledger import read_ledger
from cryptoml.state import lock

PARAMETERS = """steps: int = 4             # Steps
seed: int = 0              # Of the first x
coins: list[str] = []      # Part of it
out: str = 'runs/x'        # Folder
"""
CHECKS = "# checks\nif seed == 13: raise ValueError('there is no seed 13')"
WALK = """import hashlib, json, os, signal, time
from pathlib import Path
out = Path(out)
history = out/'history.jsonl'
done = history.read_text().splitlines() if history.exists() else []
x = json.loads(done[-1])['x'] if done else f'{seed} {coins}'
(out/'pid').write_text(str(os.getpid()))
plan = json.loads(os.environ.get('CRYPTOML_PLAN', '{}')).get(str(seed), [])
if plan[:1] == ['slow']: time.sleep(plan[1])
for i in range(len(done), steps):
    if plan == ['hold', i]: signal.pause()
    if plan == ['die', i] and not (out/'died').exists():
        (out/'died').touch()
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()
    x = hashlib.sha256(x.encode()).hexdigest()
    with open(history, 'a') as f: print(json.dumps(dict(step=i, x=x)), file=f)
from cryptoml.ledger import begin_trial
begin_trial(f'seed {seed}', x, first='2024-01-01', last='2024-02-01')
(out/'metrics.json').write_text(json.dumps(dict(verdict='PASS: walked', x=x, threads=os.environ['OMP_NUM_THREADS'])))
"""

@pytest.fixture
def walk(tmp_path):
    path = notebook(tmp_path/'walk.ipynb', PARAMETERS, CHECKS, WALK)
    job = json.loads(path.read_text())
    job['cells'][1]['metadata']['tags'] = ['checks']
    path.write_text(json.dumps(job))
    return path

def end_of(seed, coins='[]', steps=4):
    "What the walk comes to, counted here"
    x = f'{seed} {coins}'
    for _ in range(steps): x = hashlib.sha256(x.encode()).hexdigest()
    return x

def metrics_of(out): return json.loads((out/'metrics.json').read_text())

def launch(*args, **env):
    "A command in a session of its own, which listens to Ctrl-C; its output in a file beside"
    def listen(): signal.signal(signal.SIGINT, signal.SIG_DFL)
    log = open(env.pop('log'), 'w')
    return subprocess.Popen(line_of(args), stdout=log, stderr=log, env=os.environ | env, preexec_fn=listen)

def left_of(out):
    "Processes that name a folder in their command line"
    found = []
    for p in psutil.process_iter(['cmdline']):
        with contextlib.suppress(psutil.Error):
            if any(str(out) in word for word in p.info['cmdline'] or []): found.append(p)
    return found

# -- asked wrongly: one sentence, nothing begun

@pytest.mark.parametrize('args, says', [
    (['--each', 'seed=0,x'], "seed=x: seed must be int, got 'x'"),
    (['--each', 'seed=0,13'], 'seed=13: there is no seed 13'),
    (['--each', 'sed=0,1'], 'sed=0: walk has no parameter sed: did you mean seed?'),
    (['--each', 'seed=0,1', '--seed', '2'], 'seed is given once for all and once for each'),
    (['--each', 'seed=0,0'], 'seed=0 is asked for twice'),
    (['--each', 'seed'], 'needs NAME=A,B,C'),
    (['--each', 'out=a,b'], '--out FOLDER'),
    (['--each', 'seed=0,1', '--engine', 'slurm'], "engine must be local or ray, got 'slurm'"),
    (['--each', 'seed=0,1', '--parallel', '0'], 'parallel must be at least 1, got 0'),
    (['--each', 'seed=0,1', '--tries', 'x'], 'invalid int value'),
    (['--each', 'seed=0,1', '--gpus', '1'], 'gpus is for the engine ray'),
    (['--each', 'seed=0,1', '--out', 'walk.ipynb'], 'is a file'),
    (['--each', 'seed=0,1', '--out', 'one'], 'is the folder of one run'),
    (['--parallel', '2'], '--parallel is for several runs'),
    (['--copies', '0'], 'copies must be at least 1, got 0'),
], ids=lambda a: ' '.join(a) if isinstance(a, list) else '')
def test_refused_before_anything_starts(walk, args, says, capsys, monkeypatch):
    monkeypatch.chdir(walk.parent)
    (walk.parent/'one').mkdir()
    (walk.parent/'one'/'params.json').write_text('{}')
    before = sorted(walk.parent.rglob('*'))
    assert jobs.main(['walk.ipynb', *args]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count('\n') == 1
    assert sorted(walk.parent.rglob('*')) == before

def test_a_folder_of_another_run(walk, capsys, monkeypatch):
    monkeypatch.chdir(walk.parent)
    other = walk.parent/'f'/'seed=1'
    other.mkdir(parents=True)
    values = dict(steps=9, seed=1, coins=[])
    (other/'params.json').write_text(json.dumps(dict(job='walk', parameters=values, files={})))
    assert jobs.main(['walk.ipynb', '--each', 'seed=0,1', '--out', 'f']) == 2
    assert 'holds another run (steps=9, not 4)' in capsys.readouterr().err
    assert not (walk.parent/'f'/'seed=0').exists()

def test_without_ray(walk, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    monkeypatch.chdir(walk.parent)
    assert jobs.main(['walk.ipynb', '--each', 'seed=0,1', '--engine', 'ray']) == 2
    assert "pip install 'cryptoml[cluster]'" in capsys.readouterr().err

# -- this machine

def test_killed_interrupted_and_continued(walk, ledger, capsys):
    "One run is killed and tried again; Ctrl-C ends the other; the same command continues; each is counted once"
    root = walk.parent/'f'
    args = [walk, '--each', 'seed=0,1', '--coins', 'A,B', '--parallel', '2', '--out', root]
    one, two = root/'seed=0', root/'seed=1'
    log = walk.parent/'log'
    p = launch(*args, log=log, CRYPTOML_PLAN=json.dumps({'0': ['hold', 2], '1': ['die', 2]}))
    wait_for(lambda: (two/'metrics.json').exists() and len(steps_of(one)) == 2 or p.poll() is not None)
    assert p.poll() is None, log.read_text()
    assert runs_table(root).set_index('run').state.to_dict()['seed=0'] == 'running'
    assert left_of(one)
    p.send_signal(signal.SIGINT)
    assert p.wait(HANGS) == 130 and 'the same command continues' in log.read_text()
    assert 'seed=1: was killed (signal 9); tried again, 2 of 3' in log.read_text()
    for process in left_of(root): wait_for_end(process)

    assert runs_table(root).set_index('run').state.to_dict() == {'seed=0': 'interrupted', 'seed=1': 'finished'}
    done = command(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '2 runs, 1 of them finished before' in done.stdout and '1 trials more in the ledger' in done.stdout
    for seed, out in enumerate((one, two)):
        assert steps_of(out) == [0, 1, 2, 3]
        assert metrics_of(out) == dict(verdict='PASS: walked', x=end_of(seed, "['A', 'B']"), threads='1')
    left = {p.name for p in one.iterdir()}
    assert left == {'LOCK', 'params.json', 'history.jsonl', 'pid', 'walk.ipynb', 'metrics.json'}     # as of a run alone
    assert [t.name for t in read_ledger().trials] == ['seed 1', 'seed 0'] and not read_ledger().faults

    capsys.readouterr()
    assert jobs.main(['runs', str(root)]) == 0
    listed = capsys.readouterr().out
    assert listed.count('PASS') == listed.count('finished') == 2 and 'seed=1' in listed

def test_a_run_ends_with_the_process_that_started_it(tmp_path):
    "Also where that one is killed; without a job, whose kernel ends as a kernel does"
    child = 'import os, time; from cryptoml.state import end_with; end_with(os.getppid()); ' \
            'print(os.getpid(), flush=True); time.sleep(1000)'
    parent = f'import subprocess, sys; subprocess.run([sys.executable, "-c", {child!r}])'
    p = subprocess.Popen([sys.executable, '-c', parent], stdout=subprocess.PIPE, text=True)
    pid = psutil.Process(int(p.stdout.readline()))
    p.kill()
    p.wait()
    p.stdout.close()
    wait_for_end(pid)

def test_ten_programs_and_never_more_than_three_at_once(tmp_path):
    code = 'import os, pathlib, time; p = pathlib.Path(f"here.{os.getpid()}"); p.touch(); time.sleep(.1); ' \
           'print(len(list(pathlib.Path().glob("here.*")))); p.unlink()'
    runs = [Run(f'r{i}', tmp_path/f'r{i}', ('-c', code)) for i in range(10)]
    with contextlib.chdir(tmp_path): came = Fleet(Local({}), 3).carry_out(runs)
    assert set(came.values()) == {'finished'} and len(came) == 10
    assert max(int(r.log.read_text()) for r in runs) <= 3

def test_another_command_on_the_same_folders(tmp_path, monkeypatch):
    "A folder that a live process has is waited for and left, whatever the engine knows of its machine"
    monkeypatch.setattr(fleet, 'HELD', .3)
    monkeypatch.setattr(fleet, 'PAUSE', .1)
    said = []
    busy = Run('a', tmp_path/'a', ('-c', 'raise SystemExit(75)'))
    free = Run('b', tmp_path/'b', ('-c', 'pass'))
    with lock(tmp_path/'a'):
        assert Fleet(Local({}), 1, tell=said.append).carry_out([busy, free]) == dict(a='held', b='finished')
        assert (tmp_path/'a'/'LOCK').exists()
    assert len(said) == 3 and said[0].startswith('a: stands back')

@pytest.mark.parametrize('nodes, gone', [
    ([('a', True), ('b', True)], False),
    ([('a', False), ('b', True)], True),
    ([('a', False), ('a', True)], False),      # the same machine, started again
    ([('b', True)], False),                    # of a machine that was never a node nothing is known
], ids=str)
def test_which_machine_is_gone(nodes, gone):
    "Only of a node that the cluster had, and has no more, may a lock be taken away"
    there = [dict(NodeManagerHostname=host, Alive=alive) for host, alive in nodes]
    engine = SimpleNamespace(ray=SimpleNamespace(nodes=lambda: there))
    assert fleet.OnRay.is_gone(engine, 'a') is gone
