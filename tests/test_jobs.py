"""The launcher from outside: exit codes, kill -9, two commands on one folder, changed inputs"""
import json, os, signal, subprocess, sys, time
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings, strategies as st

from cryptoml import jobs
from cryptoml.jobs import JobError, JobFailed, check, convert, parameters, plan, run

def notebook(path, *cells):
    "A job notebook whose first cell holds the parameters"
    made = [dict(cell_type='code', id=f'c{i}', metadata=dict(tags=['parameters'] if i == 0 else []), execution_count=None, outputs=[], source=c) for i, c in enumerate(cells)]
    meta = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    path.write_text(json.dumps(dict(cells=made, metadata=meta, nbformat=4, nbformat_minor=5)))
    return path

PARAMETERS = """steps: int = 40            # Steps
pause: float = 0.0         # Seconds a step
fail: str = ''             # How to fail
data: str = 'simulated'    # A file
out: str = 'runs/x'        # Folder
"""
WALK = """import hashlib, os, time
from pathlib import Path
from cryptoml.data import DataError
from cryptoml.state import append_line, read_lines, write_json
out = Path(out); (out/'pid').write_text(str(os.getpid()))
if fail == 'data': raise DataError('BTC/USDT has 3 bars; 100 are needed:\\n  give more history')
if fail == 'bug': {}['no such key']
if fail == 'numpy':
    import numpy; numpy.zeros(3) + numpy.zeros(4)
if fail == 'value': raise ValueError('steps are odd')
if fail == 'exit': os._exit(3)
done = read_lines(out/'history.jsonl')
x = done[-1]['x'] if done else 'start'
for i in range(len(done), steps):
    x = hashlib.sha256(x.encode()).hexdigest(); append_line(out/'history.jsonl', dict(step=i, x=x)); time.sleep(pause)
    print('step', i, flush=True)
"""
END = "if fail != 'silent': write_json(out/'metrics.json', dict(verdict='PASS: walked', x=x, cwd=os.getcwd(), threads=os.environ['OMP_NUM_THREADS'], data=data))"

@pytest.fixture
def walk(tmp_path): return notebook(tmp_path/'walk.ipynb', PARAMETERS, WALK, END)

def command(*args, **kw): return subprocess.run([sys.executable, '-m', 'cryptoml.jobs', *map(str, args)], capture_output=True, text=True, **kw)

def start(*args, **kw): return subprocess.Popen([sys.executable, '-m', 'cryptoml.jobs', *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kw)

def wait_for(what, seconds=60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, 'nothing happened'
        time.sleep(0.05)

def lines(path): return path.read_text().count('\n') if path.exists() else 0

# -- asked wrongly: one sentence, exit code 2, nothing begun

@pytest.mark.parametrize('args, says', [
    (['-p', 'stpes=3'], 'did you mean steps?'),
    (['-p', 'nothing=3'], 'it has steps, pause, fail, data'),
    (['-p', 'steps=three'], "steps must be int, got 'three'"),
    (['-p', 'steps=1.5'], 'steps must be int'),
    (['-p', 'pause=inf'], 'pause must be float'),
    (['-p', 'steps'], 'needs NAME=VALUE'),
    (['-p', 'out=x'], '--out FOLDER'),
    (['--steps', '3'], 'unrecognized arguments'),
    (['--out', 'walk.ipynb'], 'is a file'),
    (['--out', '.'], 'no params.json'),
], ids=lambda a: ' '.join(a) if isinstance(a, list) else '')
def test_refused(walk, args, says, capsys, monkeypatch):
    monkeypatch.chdir(walk.parent)
    before = sorted(walk.parent.rglob('*'))
    assert jobs.main(['walk.ipynb', *args]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count('\n') == 1
    assert sorted(walk.parent.rglob('*')) == before

def test_refusal_is_quick_and_outside_python(walk):
    t = time.monotonic()
    done = command(walk, '-p', 'steps=x', cwd=walk.parent)
    assert done.returncode == 2 and done.stdout == '' and done.stderr.count('\n') == 1
    assert time.monotonic() - t < 5
    assert command('tarin').returncode == 2 and 'there is no job tarin' in command('tarin').stderr

def test_a_folder_that_cannot_be_written(walk):
    done = command(walk, '--out', '/proc/none/x')
    assert done.returncode == 2 and done.stderr.startswith('cryptoml: cannot write in /proc/none/x') and done.stderr.count('\n') == 1

def test_help(walk, capsys):
    assert jobs.main([str(walk), '--help']) == 0
    text = capsys.readouterr().out
    assert "steps: int = 40" in text and '# Seconds a step' in text and '  out:' not in text
    assert jobs.main(['--help']) == 0 and jobs.main([]) == 2 and jobs.main(['--list']) == 0

# -- runs

def test_a_run_leaves_its_folder_and_answers_at_once(walk, monkeypatch):
    monkeypatch.chdir(walk.parent)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    data = walk.parent/'bars.csv'; data.write_text('1')
    done = command(walk, '-p', 'steps=3', '-p', 'data=bars.csv')
    assert done.returncode == 0, done.stderr
    assert 'step 2' in done.stdout and 'PASS: walked' in done.stdout and 'TCP' not in done.stderr + done.stdout
    notebook_, mine, out = plan(walk, None, dict(steps=3, data='bars.csv'))
    assert out.parent == walk.parent/'runs'/'walk' and str(out) in done.stdout
    record, metrics = json.loads((out/'params.json').read_text()), json.loads((out/'metrics.json').read_text())
    assert record['parameters'] == dict(steps=3, pause=0.0, fail='', data=str(data)) and record['job'] == 'walk'
    assert record['versions'].keys() == {'python', 'torch', 'numpy', 'pandas', 'cryptoml'} and all(record['versions'].values())
    assert metrics['data'] == str(data) and metrics['cwd'] == str(walk.parent) and metrics['threads'] == str(record['threads'])
    assert (out/'walk.ipynb').exists()
    monkeypatch.setattr(jobs, 'execute', lambda *a: 1/0)
    assert run(walk, steps='3', data='bars.csv') == metrics
    with pytest.raises(ZeroDivisionError): run(walk, steps=4, data='bars.csv')
    monkeypatch.chdir('/')
    assert run(walk, out, steps=3, data=str(data)) == metrics            # from anywhere
    with pytest.raises(JobError, match='steps=3, not 4'): run(walk, out, steps=4, data=str(data))
    data.write_text('1, and more')
    with pytest.raises(JobError, match='bars.csv has changed'): run(walk, out, steps=3, data=str(data))

def test_kill_and_go_on(walk):
    "kill -9 of the command takes the kernel along, and the second start ends where an uninterrupted run does"
    whole = run(walk, walk.parent/'whole', steps=30)
    out = walk.parent/'killed'
    args = [walk, '--out', out, '-p', 'steps=30', '-p', 'pause=0.2']
    for n in (3, 8):
        p = start(*args)
        wait_for(lambda: lines(out/'history.jsonl') >= n)
        p.kill(); p.wait(); p.stdout.close()
    assert not (out/'metrics.json').exists()
    kernel = int((out/'pid').read_text())
    done = command(*args)                                                # at once: waits for the dying kernel
    assert done.returncode == 0, done.stderr
    assert not psutil.pid_exists(kernel)
    steps = [json.loads(l)['step'] for l in (out/'history.jsonl').read_text().splitlines()]
    assert steps == list(range(30)) and json.loads((out/'metrics.json').read_text())['x'] == whole['x']

def test_two_commands_on_one_folder(walk):
    out = walk.parent/'shared'
    args = [walk, '--out', out, '-p', 'steps=200', '-p', 'pause=0.1']
    p = start(*args)
    try:
        wait_for(lambda: lines(out/'history.jsonl') >= 1)
        second = command(*args)
        assert second.returncode == 2 and f'in use by process {p.pid}' in second.stderr and second.stderr.count('\n') == 1
    finally: p.send_signal(signal.SIGINT); text = p.communicate(timeout=30)[0]
    assert p.returncode == 130 and 'interrupted' in text
    steps = [json.loads(l)['step'] for l in (out/'history.jsonl').read_text().splitlines()]
    assert steps == list(range(len(steps)))

@pytest.mark.skipif(sys.platform != 'linux', reason='flock shared with the kernel')
def test_the_kernel_holds_the_lock_with_its_parent(walk):
    "While an orphaned kernel still runs, nobody else gets the folder"
    from cryptoml.state import StateError, lock
    out = walk.parent/'orphan'
    p = start(walk, '--out', out, '-p', 'steps=200', '-p', 'pause=0.1')
    wait_for(lambda: lines(out/'history.jsonl') >= 1)
    kernel = psutil.Process(int((out/'pid').read_text()))
    kernel.suspend(); p.kill(); p.wait(); p.stdout.close()
    with pytest.raises(StateError, match='in use'):
        with lock(out, wait=0.5): pass
    kernel.resume()
    with lock(out, wait=10): assert not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE

# -- what goes wrong inside

def test_the_users_mistakes_are_a_sentence(walk):
    done = command(walk, '--out', walk.parent/'x', '-p', 'fail=data')
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == 'cryptoml: BTC/USDT has 3 bars; 100 are needed: give more history'
    with pytest.raises(JobError, match='steps are odd'): run(walk, walk.parent/'x', fail='value')   # the folder is free again

@pytest.mark.parametrize('fail, says', [('bug', 'no such key'), ('numpy', 'could not be broadcast'), ('exit', 'was killed'), ('silent', 'without writing')])
def test_bugs_are_tracebacks(walk, fail, says):
    with pytest.raises(JobFailed, match=says): run(walk, walk.parent/'x', fail=fail, steps=1)
    assert (walk.parent/'x'/'params.json').exists() or fail == 'exit'

def test_exit_code_of_a_bug(walk, capsys, monkeypatch):
    def broken(*a): raise JobFailed('KeyError in cell 3\nthe end of it')
    monkeypatch.setattr(jobs, 'execute', broken)
    assert jobs.main([str(walk), '--out', str(walk.parent/'y')]) == 1
    assert 'KeyError in cell 3\nthe end' in capsys.readouterr().err

def test_without_papermill(walk, monkeypatch):
    monkeypatch.setitem(sys.modules, 'papermill', None)
    with pytest.raises(JobError, match="pip install 'cryptoml.jobs.'"): run(walk, walk.parent/'x')

def test_a_folder_with_a_broken_record(walk):
    (out := walk.parent/'x').mkdir(); (out/'params.json').write_text('{"job": ')
    with pytest.raises(JobError, match='is not JSON'): run(walk, out)
    (out/'params.json').write_text('{}')
    with pytest.raises(JobError, match='another run'): run(walk, out)

# -- parameters

@settings(max_examples=200, deadline=None)
@given(st.one_of(st.tuples(st.just(int), st.integers()), st.tuples(st.just(float), st.floats(allow_nan=False, allow_infinity=False)), st.tuples(st.just(bool), st.booleans()),
                 st.tuples(st.just(str), st.text()), st.tuples(st.just(list[int]), st.lists(st.integers())),
                 st.tuples(st.just(list[str]), st.lists(st.text('ABC/', min_size=1)))))
def test_text_and_value_agree(pair):
    kind, value = pair
    text = ','.join(map(str, value)) if isinstance(value, list) else str(value)
    assert convert(value, kind) == value and type(convert(value, kind)) is type(value)
    assert convert(text, kind) == value

@settings(max_examples=200, deadline=None)
@given(st.text(), st.sampled_from([int, float, bool, list[int], int | None]))
def test_any_text_is_a_value_or_refused(text, kind):
    try: value = convert(text, kind)
    except ValueError: return
    assert value is None or isinstance(value, kind if isinstance(kind, type) and kind is not list[int] else (list, int))

def test_annotations(tmp_path):
    nb = notebook(tmp_path/'a.ipynb', "a = 1  # plain\nb: 'Optional[int]' = None  # maybe\nc: list[int] | None = [1]\nout: str = ''\n# a comment alone\nd: float = -1.5e-3 # neg")
    p = parameters(nb)
    assert (p['a'].kind, p['a'].help, p['d'].default, p['d'].help) == (int, 'plain', -1.5e-3, 'neg')
    assert check(nb, dict(b='3', c='4,5')) == dict(a=1, b=3, c=[4, 5], d=-1.5e-3)
    with pytest.raises(JobError, match='no parameter out'): check(notebook(tmp_path/'b.ipynb', 'a: int = 1'), {})
    for evil in ("a: __import__('os').system('x') = 1", "a: int.__subclasses__() = 1", 'a: int = open("x")'):
        with pytest.raises(JobError, match='needs a type'): parameters(notebook(tmp_path/'c.ipynb', evil))

def test_a_grown_folder_is_another_input(tmp_path, walk):
    store = tmp_path/'store.d'; store.mkdir(); (store/'a').write_text('1')
    first = plan(walk, None, dict(data=str(store)))[2]
    assert plan(walk, None, dict(data=str(store)))[2] == first
    (store/'b').write_text('1')
    assert plan(walk, None, dict(data=str(store)))[2] != first
