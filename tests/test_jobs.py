"""The launcher from outside: exit codes, kill -9, two commands on one folder, changed inputs"""
import json, os, signal, subprocess, sys, textwrap, time

import psutil
import pytest
from hypothesis import given, settings, strategies as st

from cryptoml import jobs, runs
from cryptoml.parameters import JobError, JobFailed, check, convert, parameters
from cryptoml.runs import plan, run

# What follows waits for lines of output, lines of history and ends of processes. No test counts on a speed.
HANGS = 300   # Seconds after which something that should have happened never will

def notebook(path, *cells):
    "A job notebook whose first cell holds the parameters"
    def cell(i, source):
        meta = dict(tags=['parameters'] if i == 0 else [])
        return dict(cell_type='code', id=f'c{i}', metadata=meta, execution_count=None, outputs=[], source=source)
    made = [cell(i, source) for i, source in enumerate(cells)]
    meta = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    path.write_text(json.dumps(dict(cells=made, metadata=meta, nbformat=4, nbformat_minor=5)))
    return path

PARAMETERS = """steps: int = 40            # Steps
rate: float = 1e-3         # Of nothing
fail: str = ''             # How to fail
data: str = 'simulated'    # A file
out: str = 'runs/x'        # Folder
"""
WALK = """import hashlib, os, signal
from pathlib import Path
from cryptoml.data import DataError
from cryptoml.state import append_line, read_lines, write_json
out = Path(out)
(out/'pid').write_text(str(os.getpid()))
if fail == 'data': raise DataError('BTC/USDT has 3 bars; 100 are needed:\\n  give more history')
if fail == 'bug': {}['no such key']
if fail == 'numpy':
    import numpy
    numpy.zeros(3) + numpy.zeros(4)
if fail == 'value': raise ValueError('steps are odd')
if fail == 'exit': os._exit(3)
done = read_lines(out/'history.jsonl')
x = done[-1]['x'] if done else 'start'
for i in range(len(done), steps):
    if i == int(os.environ.get('HOLD', -1)): signal.pause()   # for ever: it goes on only where it is started again
    x = hashlib.sha256(x.encode()).hexdigest()
    append_line(out/'history.jsonl', dict(step=i, x=x))
    print('step', i, flush=True)
"""
END = """
result = dict(verdict='PASS: walked', x=x, cwd=os.getcwd(), threads=os.environ['OMP_NUM_THREADS'], data=data)
if fail != 'silent': write_json(out/'metrics.json', result)
"""

@pytest.fixture
def walk(tmp_path): return notebook(tmp_path/'walk.ipynb', PARAMETERS, WALK, END)

def line_of(args): return [sys.executable, '-m', 'cryptoml.jobs', *map(str, args)]

def command(*args, **kw): return subprocess.run(line_of(args), capture_output=True, text=True, **kw)

def start(*args, hold):
    "A command whose job takes `hold` steps and no more, until it is killed"
    env = os.environ | dict(HOLD=str(hold))
    def listen(): signal.signal(signal.SIGINT, signal.SIG_DFL)   # a shell has what it puts in the background ignore it
    return subprocess.Popen(line_of(args), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
                            preexec_fn=listen if os.name == 'posix' else None)

def wait_for(what):
    end = time.monotonic() + HANGS
    while not what():
        assert time.monotonic() < end, 'nothing happened'
        time.sleep(0.02)

def wait_for_steps(p, out, n):
    "Until the job of a command has taken n steps"
    wait_for(lambda: len(steps_of(out)) >= n or p.poll() is not None)
    assert p.poll() is None, p.stdout.read()

def wait_for_end(process):
    "Until a process that is no child of ours is gone"
    def gone():
        try: return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess: return True
    wait_for(gone)

def kill(p):
    p.kill()
    p.wait()
    p.stdout.close()

def steps_of(out):
    "Steps the job has written down whole"
    history = out/'history.jsonl'
    lines = history.read_text().splitlines(keepends=True) if history.exists() else []
    return [json.loads(line)['step'] for line in lines if line.endswith('\n')]

def kernel_of(out): return psutil.Process(int((out/'pid').read_text()))

# -- asked wrongly: one sentence, exit code 2, nothing begun

@pytest.mark.parametrize('args, says', [
    (['-p', 'stpes=3'], 'did you mean steps?'),
    (['-p', 'nothing=3'], 'it has steps, rate, fail, data'),
    (['-p', 'steps=three'], "steps must be int, got 'three'"),
    (['-p', 'steps=1.5'], 'steps must be int'),
    (['-p', 'rate=inf'], 'rate must be float'),
    (['-p', 'steps'], 'needs NAME=VALUE'),
    (['-p', 'out=x'], '--out FOLDER'),
    (['--stpes', '3'], 'did you mean steps?'),
    (['--steps', 'three'], "steps must be int, got 'three'"),
    (['--steps'], '--steps needs a value'),
    (['--steps', '3', '-p', 'steps=3'], 'steps is given twice'),
    (['steps', '3'], 'unrecognized arguments'),
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

def test_refusal_outside_python(walk):
    done = command(walk, '-p', 'steps=x', cwd=walk.parent)
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1)
    done = command('tarin')
    assert done.returncode == 2 and 'there is no job or command tarin: did you mean train?' in done.stderr

def test_refusal_is_quick(walk):
    "What takes seconds to import has not been imported, and no process was started"
    code = f'''
        import subprocess, sys
        def never(*args, **kw): raise AssertionError('a process was started')
        subprocess.Popen.__init__ = never
        from cryptoml.jobs import main
        assert main([{str(walk)!r}, '-p', 'steps=x']) == 2
        print({{'torch', 'pandas', 'numpy', 'papermill', 'jupyter_client', 'ipykernel'}} & set(sys.modules))
        '''
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout == 'set()\n', done.stderr

def test_a_folder_that_cannot_be_written(walk):
    done = command(walk, '--out', '/proc/none/x')
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert done.stderr.startswith('cryptoml: cannot write in /proc/none/x')

def test_help(walk, capsys):
    assert jobs.main([str(walk), '--help']) == 0
    text = capsys.readouterr().out
    assert "steps: int = 40" in text and '# Of nothing' in text and '  out:' not in text

WAYS = [['--steps', '2'], ['--steps=2'], ['-p', 'steps=2'], ['--param=steps=2']]

@pytest.mark.parametrize('given', WAYS, ids=' '.join)
def test_a_parameter_is_a_flag_or_a_pair(walk, given):
    asked = jobs._command([str(walk), *given, '--out', 'x', '--rate', '-1'])
    assert (asked.job, asked.out, asked.given) == (str(walk), 'x', dict(steps='2', rate='-1'))

def test_help_shows_flags(walk, capsys):
    assert jobs.main([str(walk), '--help']) == 0 == jobs.main(['--help'])
    text = capsys.readouterr().out
    assert text.count('[--out FOLDER] [--NAME VALUE ...]') == 2 and '-p NAME=VALUE is the same' in text

@pytest.mark.parametrize('args, code', [(['--help'], 0), ([], 2), (['--list'], 0)], ids=str)
def test_exit_code_of_help(args, code): assert jobs.main(args) == code

# -- the ledger of trials

def test_trials(ledger, capsys):
    assert jobs.main(['trials']) == 0
    assert 'no trials yet' in capsys.readouterr().out and not ledger.exists()
    assert jobs.main(['trials', 'add', '20', '--note', 'a spreadsheet', '--question', 'carry']) == 0
    assert capsys.readouterr().out == f'20 trials added to {ledger}\n'
    done = command('trials')                                             # another process sees them
    assert (done.returncode, done.stderr) == (0, '')
    for shown in ('told', 'a spreadsheet', 'carry', '20.0', f'ledger: {ledger}'): assert shown in done.stdout

@pytest.mark.parametrize('args, says', [
    (['add'], 'arguments are required: count, --note'),
    (['add', '3'], 'arguments are required: --note'),
    (['add', 'many', '--note', 'x'], "invalid int value: 'many'"),
    (['add', '0', '--note', 'x'], 'count is no number of trials'),
    (['add', '3', '--note', ' '], 'note is empty'),
    (['add', '3', '--no', 'x'], 'arguments are required: --note'),
    (['remove', '3'], "invalid choice: 'remove'"),
    (['--out'], 'unrecognized arguments'),
], ids=lambda a: ' '.join(a) if isinstance(a, list) else '')
def test_trials_refused(ledger, args, says, capsys):
    assert jobs.main(['trials', *args]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count('\n') == 1
    assert not ledger.exists()

def test_trials_of_a_ledger_that_was_cut(ledger, capsys):
    for i in range(2): jobs.main(['trials', 'add', str(3 + i), '--note', 'x'])
    ledger.write_bytes(ledger.read_bytes().splitlines(keepends=True)[0])
    capsys.readouterr()
    assert jobs.main(['trials']) == 1
    out = capsys.readouterr().out
    assert f'fault: {ledger} has 1 lines, its .head says 2' in out and '3.0' in out

def test_trials_that_cannot_be_written(monkeypatch, capsys):
    monkeypatch.setenv('CRYPTOML_LEDGER', '/proc/none/ledger.jsonl')
    assert jobs.main(['trials', 'add', '3', '--note', 'x']) == 2
    err = capsys.readouterr().err
    assert err.startswith('cryptoml: cannot append to /proc/none/ledger.jsonl') and err.count('\n') == 1

def test_help_of_trials(capsys):
    assert jobs.main(['--help']) == jobs.main(['trials', '--help']) == jobs.main(['trials', 'add', '--help']) == 0
    out = capsys.readouterr().out
    assert out.count('cryptoml trials add') >= 2 and '--question' in out

# -- runs

def test_a_run_leaves_its_folder(walk, monkeypatch):
    monkeypatch.chdir(walk.parent)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    data = walk.parent/'bars.csv'
    data.write_text('1')
    done = command(walk, '-p', 'steps=3', '-p', 'data=bars.csv')
    assert done.returncode == 0, done.stderr
    assert 'step 2' in done.stdout and 'PASS: walked' in done.stdout and 'TCP' not in done.stderr + done.stdout
    out = plan(walk, None, dict(steps=3, data='bars.csv'))[2]
    assert out.parent == walk.parent/'runs'/'walk' and str(out) in done.stdout
    record = json.loads((out/'params.json').read_text())
    assert record['parameters'] == dict(steps=3, rate=1e-3, fail='', data=str(data)) and record['job'] == 'walk'
    assert record['versions'].keys() == {'python', 'torch', 'numpy', 'pandas', 'cryptoml'}
    assert all(record['versions'].values())
    metrics = json.loads((out/'metrics.json').read_text())
    assert metrics['data'] == str(data) and metrics['cwd'] == str(walk.parent)
    assert metrics['threads'] == str(record['threads'])
    assert (out/'walk.ipynb').exists()

def test_a_finished_run_answers_at_once(walk, monkeypatch):
    monkeypatch.chdir(walk.parent)
    data = walk.parent/'bars.csv'
    data.write_text('1')
    metrics = run(walk, steps=3, data='bars.csv')
    out = plan(walk, None, dict(steps=3, data='bars.csv'))[2]
    monkeypatch.setattr(runs, 'execute', lambda *a: 1/0)
    assert run(walk, steps='3', data='bars.csv') == metrics
    with pytest.raises(ZeroDivisionError): run(walk, steps=4, data='bars.csv')
    monkeypatch.chdir('/')
    assert run(walk, out, steps=3, data=str(data)) == metrics            # from anywhere
    (out/'metrics.json').write_text(json.dumps(metrics | dict(again=True)))
    with pytest.raises(ZeroDivisionError): run(walk, out, steps=3, data=str(data))    # one with an open end goes on
    (out/'metrics.json').write_text(json.dumps(metrics))
    with pytest.raises(JobError, match='steps=3, not 4'): run(walk, out, steps=4, data=str(data))
    data.write_text('1, and more')
    with pytest.raises(JobError, match='bars.csv has changed'): run(walk, out, steps=3, data=str(data))

def test_kill_and_go_on(walk):
    "kill -9 of the command takes the kernel along, and the second start ends where an uninterrupted run does"
    whole = run(walk, walk.parent/'whole', steps=30)
    out = walk.parent/'killed'
    args = [walk, '--out', out, '-p', 'steps=30']
    for n in (3, 8):
        p = start(*args, hold=n)
        wait_for_steps(p, out, n)
        kill(p)
        kernel = kernel_of(out)
    assert not (out/'metrics.json').exists()
    done = command(*args)                                                # at once: waits for the dying kernel
    assert done.returncode == 0, done.stderr
    wait_for_end(kernel)
    assert steps_of(out) == list(range(30))
    assert json.loads((out/'metrics.json').read_text())['x'] == whole['x']

def test_two_commands_on_one_folder(walk):
    out = walk.parent/'shared'
    args = [walk, '--out', out, '-p', 'steps=20']
    p = start(*args, hold=2)
    try:
        wait_for_steps(p, out, 2)
        second = command(*args)
        assert second.returncode == jobs.BUSY and second.stderr.count('\n') == 1
        assert f'in use by process {p.pid}' in second.stderr
        assert steps_of(out) == [0, 1]
    finally:
        p.send_signal(signal.SIGINT)
        text = p.communicate(timeout=HANGS)[0]
    assert p.returncode == 130 and 'interrupted' in text
    assert steps_of(out) == [0, 1]

@pytest.mark.skipif(sys.platform != 'linux', reason='flock shared with the kernel')
def test_the_kernel_holds_the_lock_with_its_parent(walk):
    "While an orphaned kernel still runs, nobody else gets the folder"
    from cryptoml.state import StateError, lock
    out = walk.parent/'orphan'
    p = start(walk, '--out', out, '-p', 'steps=20', hold=1)
    wait_for_steps(p, out, 1)
    kernel = kernel_of(out)
    kernel.suspend()
    kill(p)
    with pytest.raises(StateError, match='in use'):
        with lock(out, wait=0.5): pass
    kernel.resume()
    with lock(out, wait=HANGS): wait_for_end(kernel)

# -- what goes wrong inside

def test_the_users_mistakes_are_a_sentence(walk):
    done = command(walk, '--out', walk.parent/'x', '-p', 'fail=data')
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == 'cryptoml: BTC/USDT has 3 bars; 100 are needed: give more history'
    with pytest.raises(JobError, match='steps are odd'): run(walk, walk.parent/'x', fail='value')   # the folder is free

@pytest.mark.parametrize('fail, says', [
    ('bug', 'no such key'),
    ('numpy', 'could not be broadcast'),
    ('exit', 'was killed'),
    ('silent', 'without writing'),
])
def test_bugs_are_tracebacks(walk, fail, says):
    with pytest.raises(JobFailed, match=says): run(walk, walk.parent/'x', fail=fail, steps=1)
    assert (walk.parent/'x'/'params.json').exists() or fail == 'exit'

def test_exit_code_of_a_bug(walk, capsys, monkeypatch):
    def broken(*a): raise JobFailed('KeyError in cell 3\nthe end of it')
    monkeypatch.setattr(runs, 'execute', broken)
    assert jobs.main([str(walk), '--out', str(walk.parent/'y')]) == 1
    assert 'KeyError in cell 3\nthe end' in capsys.readouterr().err

def test_without_papermill(walk, monkeypatch):
    monkeypatch.setitem(sys.modules, 'papermill', None)
    with pytest.raises(JobError, match="pip install 'cryptoml.jobs.'"): run(walk, walk.parent/'x')

@pytest.mark.parametrize('text, says', [('{"job": ', 'is not JSON'), ('{}', 'another run')])
def test_a_folder_with_a_broken_record(walk, text, says):
    out = walk.parent/'x'
    out.mkdir()
    (out/'params.json').write_text(text)
    with pytest.raises(JobError, match=says): run(walk, out)

# -- parameters

FINITE = st.floats(allow_nan=False, allow_infinity=False)
NAMES = st.lists(st.text('ABC/', min_size=1))

@settings(max_examples=200, deadline=None)
@given(st.one_of(
    st.tuples(st.just(int), st.integers()),
    st.tuples(st.just(float), FINITE),
    st.tuples(st.just(bool), st.booleans()),
    st.tuples(st.just(str), st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0'))),
    st.tuples(st.just(list[int]), st.lists(st.integers())),
    st.tuples(st.just(list[str]), NAMES),
))
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
    plain = isinstance(kind, type) and kind is not list[int]
    assert value is None or isinstance(value, kind if plain else (list, int))

def test_annotations(tmp_path):
    nb = notebook(tmp_path/'a.ipynb', textwrap.dedent("""\
        a = 1  # plain
        b: 'Optional[int]' = None  # maybe
        c: list[int] | None = [1]
        out: str = ''
        # a comment alone
        d: float = -1.5e-3 # neg"""))
    p = parameters(nb)
    assert (p['a'].kind, p['a'].help) == (int, 'plain')
    assert (p['d'].default, p['d'].help) == (-1.5e-3, 'neg')
    assert check(nb, dict(b='3', c='4,5')) == dict(a=1, b=3, c=[4, 5], d=-1.5e-3)

def test_a_job_without_a_folder(tmp_path):
    with pytest.raises(JobError, match='no parameter out'): check(notebook(tmp_path/'b.ipynb', 'a: int = 1'), {})

@pytest.mark.parametrize('evil', [
    "a: __import__('os').system('x') = 1",
    "a: int.__subclasses__() = 1",
    'a: int = open("x")',
])
def test_evil_annotations(tmp_path, evil):
    with pytest.raises(JobError, match='needs a type'): parameters(notebook(tmp_path/'c.ipynb', evil))

def test_a_grown_folder_is_another_input(tmp_path, walk):
    store = tmp_path/'store.d'
    store.mkdir()
    (store/'a').write_text('1')
    first = plan(walk, None, dict(data=str(store)))[2]
    assert plan(walk, None, dict(data=str(store)))[2] == first
    (store/'b').write_text('1')
    assert plan(walk, None, dict(data=str(store)))[2] != first
