"""A search for settings: workers that are killed, a real PostgreSQL server, what is counted and what is refused"""
import contextlib, math, multiprocessing, os, random, shutil, signal, socket, subprocess, sys, textwrap, time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.pruners import MedianPruner, NopPruner
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from conftest import ended, forked
from cryptoml import tune
from cryptoml.ledger import read_ledger
from cryptoml.state import StateError, read_json
from cryptoml.tune import Folder, HyperparameterOptimizer, Space, TuneError, by_root, nearest_multiple

root = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures('ledger')   # its trials count for whatever days: they are its own
PLANE = Space(dict(x=FloatDistribution(-1, 1), y=FloatDistribution(-1, 1), k=IntDistribution(1, 8)))

def far(settings, report=None):
    "Distance from a planted place"
    return (settings['x'] - .3)**2 + (settings['y'] + .2)**2 + .1 * abs(settings['k'] - 5)

def search(folder, **how): return HyperparameterOptimizer(folder, **dict(space=PLANE, trials=12) | how)
def drawn(s): return s.table()[['value', *s.space.ranges]]
def lines(s): return Counter(t.recipe for t in read_ledger().trials if t.name.startswith(f'{s.name}: '))


# What may be chosen

@given(st.integers(1, 300), st.integers(1, 16), st.integers(1, 60), st.integers(0, 300))
def test_the_nearest_multiple(x, of, low, more):
    high = low + more
    allowed = [m for m in range(low, high + 1) if m % of == 0]
    if not allowed: return
    found = nearest_multiple(min(max(x, low), high), of, low, high)
    assert found in allowed
    assert abs(found - min(max(x, low), high)) == min(abs(m - min(max(x, low), high)) for m in allowed)

def test_every_draw_of_the_space_is_a_network():
    s = HyperparameterOptimizer(None, trials=60, sampler=RandomSampler)
    s.optimize(lambda settings, report: settings['dropout'])
    t = s.table()
    assert (t.hidden % t.heads == 0).all() and t.hidden.between(16, 256).all()
    assert set(t.heads) == {1, 2, 4, 8} and t.layers.nunique() == 4


# One search, whoever asks

def test_the_same_seed_is_the_same_search_in_another_process(tmp_path):
    code = '''
        import sys
        from test_tune import drawn, far, search
        s = search(sys.argv[1], seed=7)
        s.optimize(far)
        print(drawn(s).to_json(double_precision=15))
    '''
    def run(folder):
        env = os.environ | dict(PYTHONPATH=f'{root}:{root}/tests', PYTHONHASHSEED=str(random.randrange(9)))
        return subprocess.run([sys.executable, '-c', textwrap.dedent(code), str(folder)], env=env, check=True,
                              capture_output=True, text=True).stdout.splitlines()[-1]
    own = search(None, seed=7)
    own.optimize(far)
    assert drawn(own).to_json(double_precision=15) == run(tmp_path)
    other = search(None, seed=8)
    other.optimize(far)
    assert not drawn(other).x.isin(drawn(own).x).any()

def test_more_trials_go_on_where_fewer_ended(tmp_path):
    search(tmp_path, trials=5).optimize(far)
    s = search(tmp_path, trials=12)
    s.optimize(far)
    at_once = search(None)
    at_once.optimize(far)
    pd.testing.assert_frame_equal(drawn(s), drawn(at_once))
    assert search(tmp_path, trials=3).optimize(None) == s.best()       # nothing is taken away
    assert read_json(tmp_path/'best.json') == dict(name='search', **s.best()._asdict())

def test_interrupted_at_every_line_of_the_journal(tmp_path):
    "Whatever the last line that reached the disk: the search goes on as if nothing had been, no trial lost or twice"
    whole_search = search(tmp_path/'whole', trials=4, seed=5)
    whole_search.optimize(far)
    journal = (tmp_path/'whole'/'journal.jsonl').read_bytes().splitlines(keepends=True)
    after = next(i for i, line in enumerate(journal) if b'"id":' in line or b'"id": ' in line) + 1
    for n in [*range(0, after + 1, 2), *range(after + 1, len(journal), 3)]:
        folder = tmp_path/str(n)
        folder.mkdir()
        torn = journal[n][:len(journal[n]) // 2]
        (folder/'journal.jsonl').write_bytes(b''.join(journal[:n]) + torn)
        s = search(folder, trials=4, seed=5)
        s.optimize(far)
        pd.testing.assert_frame_equal(drawn(s), drawn(whole_search))
        assert set(s.table().state) == {'complete'} and s.table().tries.sum() <= 5

@pytest.mark.parametrize('how, said', [
    (dict(seed=1), 'another seed'),
    (dict(maximize=True), 'another maximize'),
    (dict(space=Space(PLANE.ranges | dict(x=FloatDistribution(-1, 2)))), 'another space'),
    (dict(sampler=RandomSampler, pruner=NopPruner()), 'another sampler, pruner'),
    (dict(question='carry'), 'another question'),
    (dict(first=[dict(x=0., y=0., k=1)]), 'another first'),
], ids=range(6))
def test_who_means_another_search_is_told(tmp_path, how, said):
    search(tmp_path)
    with pytest.raises(TuneError, match=said): search(tmp_path, **how)
    search(tmp_path, **how, name='another')                            # a folder may hold several

def test_what_is_tried_first(tmp_path):
    first = [dict(x=.3, y=-.2, k=5), dict(x=1., y=1., k=8)]
    best = search(tmp_path, trials=3, first=first).optimize(far)
    assert best.trial == 0 and best.value == 0 and best.settings == first[0]
    t = search(tmp_path, trials=3, first=first).table()
    assert t[['x', 'y', 'k']].head(2).to_dict('records') == first and len(t) == 3

def test_the_largest_value():
    s = search(None, maximize=True)
    best = s.optimize(lambda settings, report: -far(settings))
    assert best.value == s.table().value.max()

@pytest.mark.parametrize('how', [dict(trials=0), dict(trials=2.), dict(seed=-1), dict(question='a\nb')], ids=str)
def test_wrong_numbers(how):
    with pytest.raises(ValueError, match='must be'): search(None, **how)


# What an objective does

def ends(objective, **how):
    s = search(None, **dict(trials=30) | how)
    s.optimize(objective)
    return s.table()

@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf, None, 'low', [1.], 1e400], ids=str)
def test_a_value_that_is_none_is_a_failed_trial(value):
    t = ends(lambda settings, report: value if settings['k'] > 4 else far(settings))
    bad = t.k > 4
    assert bad.any() and (t.state[bad] == 'failed').all() and (t.state[~bad] == 'complete').all()
    assert t.reason[bad].str.contains('which is no number to compare').all() and t.value[bad].isna().all()

def test_a_report_that_is_none_is_a_failed_trial():
    def objective(settings, report):
        report(0, far(settings))
        report(1, math.nan if settings['k'] > 6 else far(settings))
        return far(settings)
    t = ends(objective, pruner=NopPruner())
    assert t.reason[t.k > 6].str.contains('at step 1 it gave nan').all() and (t.state[t.k <= 6] == 'complete').all()
    for step in (-1, 1.5, 'x', None, True):
        with pytest.raises(TuneError, match='a step is a whole number'): ends(lambda s, report: report(step, 1.))

def test_a_mistake_in_the_objective_ends_the_search(tmp_path):
    calls = []
    def objective(settings, report):
        calls.append(1)
        raise KeyError('lr')
    with pytest.raises(TuneError, match="all 5 trials so far failed, the last with KeyError: 'lr'"):
        search(tmp_path).optimize(objective)
    assert len(calls) == 5 and sum(lines(search(tmp_path)).values()) >= 5
    with pytest.raises(TuneError, match='no trial of .* is complete'): search(tmp_path).best()

def test_an_objective_cannot_change_its_settings():
    def objective(settings, report):
        value = far(settings)
        settings['x'] = 99
        return value
    s = search(None)
    best = s.optimize(objective)
    assert far(best.settings) == best.value and s.table().x.abs().max() <= 1

def test_stopping_early_saves_steps_and_keeps_the_best():
    "Curves that do not cross: what is stopped is never the best"
    def curve(settings, report):
        for step in range(20):
            steps.append(1)
            report(step, far(settings) + 1 / (1 + step))
        return far(settings)
    made = {}
    for pruner in (NopPruner(), MedianPruner()):
        steps = []
        s = search(None, trials=60, pruner=pruner, sampler=RandomSampler)
        made[type(pruner).__name__] = len(steps), s.optimize(curve), len(steps), s.table()
    _, best, all_steps, _ = made['NopPruner']
    _, same, fewer, t = made['MedianPruner']
    assert all_steps == 60 * 20 and fewer < .6 * all_steps
    assert best.settings == same.settings and same.counts['pruned'] > 15
    assert t.steps.sum() == fewer and (t.steps[t.state == 'complete'] == 20).all()
    assert (t.reason == '').all()


# The ledger

def test_each_trial_is_one_in_the_ledger(ledger):
    def objective(settings, report):
        found = read_ledger().trials                                   # it stands there before anything is done
        assert len(found) == len(seen) + 1
        seen.append(found[-1].name)
        report(0, far(settings))
        if settings['k'] == 1: raise RuntimeError('no such width')
        return far(settings)
    seen = []
    s = search(None, trials=25, question='width', data='bars', name='wide', seed=3)
    best = s.optimize(objective)
    assert best.counts['failed'] and best.counts['pruned'] and sum(best.counts.values()) == 25
    assert seen == [f'wide: trial {i}' for i in range(25)]
    trials = read_ledger().trials
    assert {(t.kind, t.question, t.data, t.seed) for t in trials} == {('tune', 'width', 'bars', 3)}
    year = np.arange(19000, 19365)
    found = read_ledger().tried(year, np.linspace(-.01, .01, 365), 'width')
    assert (found.count, found.effective, found.faults) == (26, 26, [])  # and the book that came of it
    search(None, trials=25, question='width', data='bars', name='wide', seed=3).optimize(far)    # another, of this name
    assert read_ledger().tried(year, np.linspace(-.01, .01, 365), 'width').count == 51

def test_no_trial_without_a_line(ledger, tmp_path, monkeypatch):
    "Where the ledger cannot be written nothing runs; when it can, nothing was lost"
    calls = []
    def objective(settings, report):
        calls.append(settings)
        return far(settings)
    search(tmp_path, trials=3).optimize(objective)
    monkeypatch.setenv('CRYPTOML_LEDGER', '/proc/none/ledger.jsonl')
    with pytest.raises(StateError, match='cannot append'): search(tmp_path).optimize(objective)
    assert len(calls) == 3
    monkeypatch.setenv('CRYPTOML_LEDGER', str(ledger))
    s = search(tmp_path)
    s.optimize(objective)
    whole_search = search(None)
    whole_search.optimize(far)
    pd.testing.assert_frame_equal(drawn(s), drawn(whole_search))
    assert len(calls) == 12 and len(lines(s)) == 24

def test_what_others_ran_is_written_down_too(ledger, tmp_path, monkeypatch):
    "Who gets the best of twelve knows of twelve, where others have a ledger of their own"
    monkeypatch.setenv('CRYPTOML_LEDGER', str(tmp_path/'theirs.jsonl'))
    search(tmp_path/'study', trials=8).optimize(far)
    monkeypatch.setenv('CRYPTOML_LEDGER', str(ledger))
    s = search(tmp_path/'study')
    s.optimize(far)
    assert sorted(lines(s).values()) == [1] * 12
    s.optimize(far)
    assert sum(lines(s).values()) == 12


# Workers that are killed

def work_of_thirty(where, url, folder, stays):
    "A worker of thirty trials that says which it begins and, in the end, what was best; who stays leaves others some"
    def objective(settings, report):
        with open(folder/'told', 'a') as f: f.write(f"{os.getpid()} {settings['x']!r}\n")
        calls.append(1)
        while stays and len(calls) > 12 and not (folder/'killed').exists(): time.sleep(.01)
        for step in range(4):
            time.sleep(.02)
            report(step, far(settings) + .1 / (1 + step))
        return far(settings)
    def work():
        best = search(where, url=url, trials=30, seed=2, name='killed').optimize(objective)
        (folder/'said').write_text(f'{best.value} {best.trial}')
    calls = []
    return work

def begun(told): return told.read_text().splitlines() if told.exists() else []

def is_over(pid): return os.waitpid(pid, os.WNOHANG)[0] != 0

def kill_some(where, url, folder, kills=2):
    "Two workers of thirty trials; one is killed in the middle of a trial and another takes its place, and again"
    rng = random.Random(4)
    told = folder/'told'
    stays = forked(work_of_thirty(where, url, folder, True))
    for _ in range(kills):
        dies = forked(work_of_thirty(where, url, folder, False))
        n = rng.randrange(1, 4)                                        # in its n-th trial
        while sum(line.startswith(f'{dies} ') for line in begun(told)) < n:
            assert not is_over(dies), 'the search ended before the kill'
            time.sleep(.001)
        time.sleep(.06 * rng.random())                                 # a trial takes four steps of .02
        os.kill(dies, signal.SIGKILL)
        assert ended(dies) == -signal.SIGKILL
    (folder/'killed').touch()
    assert ended(stays) == 0
    return told, (folder/'said').read_text().split()

def check_killed(s, told, said):
    t = s.table()
    assert len(t) == 30 and set(t.state) <= {'complete', 'pruned'} and (t.reason == '').all()
    best = s.best()
    assert [float(said[0]), int(said[1])] == [best.value, best.trial]
    again = t[t.tries > 1]
    assert 1 <= len(again) <= 2 and (again.tries == 2).all()           # each killed trial once more
    for tries in by_root(s.study.trials).values():
        states = [x.state for x in tries]
        assert states[:-1] == [TrialState.FAIL] * (len(tries) - 1) and states[-1] != TrialState.FAIL
        last = tries[-1].params
        for x in tries: assert x.params.items() <= last.items()        # all that had been drawn is kept
    runs = Counter(line.split()[1] for line in begun(told))
    assert {float(x) for x in runs} == set(t.x)                        # what ran is what is told
    missed = {tries - runs[repr(x)] for x, tries in zip(t.x, t.tries)}
    assert missed <= {0, 1}                                            # one may be killed just before it begins
    counts = lines(s)
    assert len(counts) == 30 and runs.total() <= sum(counts.values()) <= 30 + len(again)
    year = np.arange(19000, 19365)
    assert read_ledger().tried(year, np.linspace(-.01, .01, 365)).count == 31

def test_one_of_two_workers_is_killed(tmp_path, ledger):
    folder = tmp_path/'study'
    told, said = kill_some(folder, None, tmp_path)
    check_killed(search(folder, trials=30, seed=2, name='killed'), told, said)
    assert not [p for p in (folder/'workers').iterdir() if Folder(folder).is_alive(p.name)]

def test_all_workers_are_killed_again_and_again(tmp_path, ledger):
    "Alone, killed at random moments: in the end the search that it would have been"
    def work():
        search(tmp_path/'study', trials=8, seed=6).optimize(slow)
    def slow(settings, report):
        time.sleep(.005)
        return far(settings)
    rng = random.Random(0)
    for _ in range(12):
        pid = forked(work)
        time.sleep(.02 + .1 * rng.random())
        with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
        ended(pid)
    s = search(tmp_path/'study', trials=8, seed=6)
    s.optimize(far)
    whole_search = search(None, trials=8, seed=6)
    whole_search.optimize(far)
    t = s.table()
    alive = t.tries < tune.TRIES                                       # what was killed three times is given up
    ours, theirs = (drawn(one)[alive] for one in (s, whole_search))
    pd.testing.assert_frame_equal(ours, theirs, check_dtype=False)     # what was given up has no settings at times
    assert len(t) == 8 and t.reason[t.state == 'failed'].str.contains('killed 3 times').all()

def helped(settings, report):
    time.sleep(.02)
    return far(settings)

def dies_in_a_helper(settings, report):
    "The helper is killed in its first trial; the others wait for that"
    killed = Path(os.environ['KILLED'])
    if multiprocessing.parent_process() is not None:
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    while not killed.exists(): time.sleep(.02)
    return far(settings)

def test_helpers(tmp_path, ledger):
    s = search(tmp_path, trials=30)
    s.optimize(helped, workers=2)
    who = Counter(t.user_attrs['worker'].split('-')[0] for t in s.study.trials)
    assert sum(s.best().counts.values()) == len(lines(s)) == 30
    assert str(os.getpid()) in who

def test_a_helper_that_dies(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv('KILLED', str(tmp_path/'killed'))
    s = search(tmp_path, trials=14)
    s.optimize(dies_in_a_helper, workers=2)
    assert s.best().counts == dict(complete=14, pruned=0, failed=0) and s.table().tries.tolist().count(2) == 1
    assert any('1 of 1 helpers died (exit code -9)' in r.getMessage() for r in caplog.records)

def test_workers_need_something_to_share(tmp_path):
    with pytest.raises(TuneError, match='workers share a folder or a url'): search(None).optimize(far, workers=2)
    with pytest.raises(TuneError, match='another process can import'):
        search(tmp_path).optimize(lambda settings, report: 0, workers=2)


# Damage

def test_damaged_journals(tmp_path):
    search(tmp_path/'good', trials=2).optimize(far)
    journal = (tmp_path/'good'/'journal.jsonl').read_bytes()
    middle = journal.splitlines(keepends=True)
    damaged = dict(
        other=b'{"a": 1}\n', binary=b'\x00\xff\x00\n' * 3, nothing_known=b'{"op_code": 99, "worker_id": "x"}\n',
        cut_inside=b''.join([*middle[:3], middle[3][:10] + b'\n', *middle[4:]]))
    for name, content in damaged.items():
        folder = tmp_path/name
        folder.mkdir()
        (folder/'journal.jsonl').write_bytes(content)
        with pytest.raises(TuneError, match='is no journal of Optuna, or damaged'): search(folder)
        assert (folder/'journal.jsonl').read_bytes() == content

def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('x')
    with pytest.raises(TuneError, match='cannot write in'): search(tmp_path/'file')
    with pytest.raises(TuneError, match='cannot write in'): search('/proc/none')

def test_optunas_settings_stay(tmp_path):
    import optuna
    level = optuna.logging.get_verbosity()
    search(tmp_path, trials=2).optimize(far)
    assert optuna.logging.get_verbosity() == level


# A real PostgreSQL server

def binaries():
    "Where PostgreSQL's programs are, or None"
    found = sorted(Path('/usr/lib/postgresql').glob('*/bin/initdb')) or [shutil.which('initdb')]
    return Path(found[-1]).parent if found[-1] else None

def as_nobody(command, folder):
    "PostgreSQL refuses to run as root"
    if os.getuid(): return command
    return ['setpriv', '--reuid=nobody', '--regid=nogroup', '--clear-groups', *command]

@pytest.fixture(scope='module')
def server(tmp_path_factory):
    "The address of a server of our own, on a free port of loopback; ended after the tests"
    pytest.importorskip('psycopg', reason="psycopg is not installed: pip install 'cryptoml[cluster]'")
    programs = binaries()
    if programs is None: pytest.skip('PostgreSQL is not installed: apt-get install postgresql')
    if not os.getuid() and not shutil.which('setpriv'):
        pytest.skip('PostgreSQL does not run as root, and setpriv is missing')
    folder = Path(subprocess.run(['mktemp', '-d'], capture_output=True, text=True, check=True).stdout.strip())
    if not os.getuid(): shutil.chown(folder, 'nobody', 'nogroup')
    def run(*command, **how):
        return subprocess.Popen(as_nobody([str(programs/command[0]), *command[1:]], folder), cwd=folder,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **how)
    made = run('initdb', '-D', str(folder/'data'), '-U', 'tuner', '-A', 'trust', '--no-sync')
    assert made.wait() == 0, made.stderr.read()
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    p = run('postgres', '-D', str(folder/'data'), '-p', str(port), '-h', '127.0.0.1', '-k', '', '-F')
    url = f'postgresql://tuner@127.0.0.1:{port}/postgres'
    try:
        while 'ready to accept connections' not in p.stderr.readline(): assert p.poll() is None, 'the server ended'
        yield url
    finally:
        p.send_signal(signal.SIGQUIT)
        p.communicate()
        shutil.rmtree(folder, ignore_errors=True)

def test_a_database_is_a_folder(server, ledger, tmp_path):
    "The same seed, the same trials"
    s = search(tmp_path, url=server, name='same')
    best = s.optimize(far)
    own = search(None)
    assert own.optimize(far) == best
    pd.testing.assert_frame_equal(drawn(s), drawn(own))
    assert read_json(tmp_path/'best.json')['value'] == best.value
    assert search(None, url=server, name='same').optimize(None) == best
    with pytest.raises(TuneError, match='another seed'): search(None, url=server, name='same', seed=3)

def test_a_worker_of_a_database_is_killed(server, ledger, tmp_path):
    told, said = kill_some(None, server, tmp_path)
    check_killed(search(None, url=server, trials=30, seed=2, name='killed'), told, said)

def test_who_is_taken_for_dead_changes_nothing(server, ledger):
    "A worker whose connection is cut goes on with its trial; it was begun again meanwhile, and its end is not told"
    import psycopg
    s = search(None, url=server, trials=3, name='cut')
    other = search(None, url=server, trials=3, name='cut')
    calls = []
    def objective(settings, report):
        calls.append(settings['x'])
        if len(calls) == 1:
            with psycopg.connect(server, autocommit=True) as c:
                c.execute('SELECT pg_terminate_backend(pid) FROM pg_locks '
                          "WHERE locktype = 'advisory' AND pid <> pg_backend_pid()")
            other.optimize(far)                                        # somebody else runs all of it
        return 99.
    with pytest.raises(TuneError, match='cannot be used: .*it is started again'): s.optimize(objective)
    assert len(calls) == 1
    t = other.table()
    assert (t.value < 10).all() and t.tries.tolist() == [2, 1, 1]
    assert s.optimize(None) == other.best()

def test_a_server_that_is_not_there(server):
    gone = server.replace('tuner@', 'tuner:secret@').replace(server.rsplit(':', 1)[1], '1/postgres')
    with pytest.raises(TuneError, match='cannot be used: ') as e: search(None, url=gone)
    assert 'secret' not in str(e.value)
    with pytest.raises(TuneError, match='not in sqlite'): search(None, url='sqlite:///x.db')

def test_without_psycopg(monkeypatch):
    monkeypatch.setitem(sys.modules, 'psycopg', None)
    with pytest.raises(TuneError, match=r"pip install 'cryptoml\[cluster\]'"): search(None, url='postgresql://a@b/c')
