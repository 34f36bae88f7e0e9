"""A Ray cluster of two nodes on loopback: five folds and a node that dies on the way; make cluster runs it"""
import contextlib, json, os, signal
from importlib.util import find_spec

import psutil
import pytest
from test_fleet import end_of, launch, left_of, metrics_of, walk   # noqa: F401 (a fixture)
from test_jobs import HANGS, command, steps_of, wait_for, wait_for_end

from cryptoml.ledger import read_ledger
from cryptoml.simulate import simulate
from cryptoml.state import read_lines

pytestmark = pytest.mark.cluster
SILENT = dict(RAY_USAGE_STATS_ENABLED='0', RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER='0')   # the latter: loopback only
NODE = dict(num_cpus=1, object_store_memory=80 << 20, include_dashboard=False)

def processes_of_ray(mark):
    "Processes of the clusters that were started with a mark in the environment, whoever their parents are now"
    found = []
    for p in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_of_it = p.environ().get('CRYPTOML_CLUSTER_TEST') == mark
            if is_of_it and 'ray' in ' '.join(p.cmdline()): found.append(p)
    return found

@pytest.fixture(scope='module')
def cluster():
    if not find_spec('ray'): pytest.skip('ray is not installed: make cluster installs it')
    with pytest.MonkeyPatch.context() as m:
        for k, v in SILENT.items(): m.setenv(k, v)                      # read when ray is imported
        mark = f'nodes of {os.getpid()}'
        m.setenv('CRYPTOML_CLUSTER_TEST', mark)
        from ray.cluster_utils import Cluster
        c = Cluster(initialize_head=True, head_node_args=NODE)
        yield c
        c.shutdown()
        for p in processes_of_ray(mark): wait_for_end(p)

@pytest.fixture
def node(cluster):
    "A second node"
    node = cluster.add_node(**NODE)
    yield node
    if node in cluster.worker_nodes: cluster.remove_node(node)

def on_ray(cluster, *args): return [*args, '--engine', 'ray', '--address', cluster.address]

def test_five_folds_and_a_lost_node(cluster, node, tmp_path, monkeypatch):
    "The same metrics as one by one, and five trials, though a run had to begin again on the other node"
    simulate(n_symbols=2, n_bars=6950, seed=4).bars.to_parquet(tmp_path/'bars.parquet')
    ends = '2022-04-28,2022-05-28,2022-07-04,2022-08-19,2022-10-16'     # no day is in two tests
    folds = ['train', '--each', f'end={ends}', '--data', tmp_path/'bars.parquet', '--epochs', '1', '--horizons', '4']
    monkeypatch.setenv('CRYPTOML_LEDGER', str(tmp_path/'one'/'ledger.jsonl'))
    done = command(*folds, '--parallel', '1', '--out', tmp_path/'one')
    assert done.returncode == 0, done.stdout + done.stderr

    monkeypatch.setenv('CRYPTOML_LEDGER', str(tmp_path/'many'/'ledger.jsonl'))
    root, log = tmp_path/'many', tmp_path/'log'
    p = launch(*on_ray(cluster, *folds, '--out', root), log=log)
    def training(): return [f for f in root.glob('end=*/history.jsonl') if not (f.parent/'metrics.json').exists()]
    wait_for(lambda: len(training()) == 2 or p.poll() is not None)      # one on each node
    assert p.poll() is None, log.read_text()
    cluster.remove_node(node, allow_graceful=False)
    assert p.wait(2 * HANGS) == 0, log.read_text()
    said = log.read_text().splitlines()
    assert len([line for line in said if 'was lost' in line and 'tried again, 2 of 3' in line]) == 1
    assert len([line for line in said if ': finished in ' in line]) == 5
    assert not [line for line in said if 'raylet' in line]             # Ray's own words about it are pages long

    for end in ends.split(','):
        a, b = (metrics_of(tmp_path/folder/f'end={end}') for folder in ('one', 'many'))
        for m in a, b: del m['verdict']['head'], m['verdict']['place']  # of two ledgers
        assert a == b and a['verdict']['trials'] == 1
        assert [row['epoch'] for row in read_lines(root/f'end={end}'/'history.jsonl')] == [1]
    ledger = read_ledger()
    assert int(ledger.totals().trials.sum()) == 5 and not ledger.faults
    assert not list(root.glob('.fleet-*'))

def test_killed_and_interrupted(cluster, node, walk, ledger):        # noqa: F811
    "The end of the command is the end of its runs, on every node; the same command continues"
    root, log = walk.parent/'f', walk.parent/'log'
    args = on_ray(cluster, walk, '--each', 'seed=0,1', '--out', root)
    for held, how in ((1, signal.SIGKILL), (3, signal.SIGINT)):
        plan = json.dumps({seed: ['hold', held] for seed in '01'})
        p = launch(*args, log=log, CRYPTOML_PLAN=plan)
        wait_for(lambda: all(len(steps_of(root/f'seed={s}')) == held for s in '01') or p.poll() is not None)
        assert p.poll() is None, log.read_text()
        runs = left_of(root/'seed=0') + left_of(root/'seed=1')
        assert len(runs) >= 2
        p.send_signal(how)
        code = p.wait(HANGS)
        for process in runs: wait_for_end(process)
        wait_for(lambda: not left_of(root))
    assert code == 130 and 'the same command continues' in log.read_text()
    done = command(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ''                                            # nothing of Ray's own is shown
    for seed in 0, 1: assert metrics_of(root/f'seed={seed}')['x'] == end_of(seed)
    assert sorted(t.name for t in read_ledger().trials) == ['seed 0', 'seed 1']

def test_a_ray_of_its_own(walk, tmp_path, monkeypatch):             # noqa: F811
    "Without an address Ray is started for the command alone: on loopback, and gone behind it"
    monkeypatch.setenv('CRYPTOML_CLUSTER_TEST', str(tmp_path))
    done = command(walk, '--each', 'seed=13', '--engine', 'ray', '--out', tmp_path/'f')
    assert done.returncode == 2 and 'seed=13: there is no seed 13' in done.stderr
    plan = json.dumps({'0': ['hold', 1]})
    one = walk, '--each', 'seed=0', '--engine', 'ray', '--out', tmp_path/'f'
    p = launch(*one, log=tmp_path/'log', CRYPTOML_PLAN=plan)
    wait_for(lambda: len(steps_of(tmp_path/'f'/'seed=0')) == 1 or p.poll() is not None)
    assert p.poll() is None, (tmp_path/'log').read_text()
    mine = processes_of_ray(str(tmp_path))
    ports = [c for q in mine for c in q.net_connections() if c.status == psutil.CONN_LISTEN]
    assert ports and all(c.laddr.ip in ('127.0.0.1', '::1', '::ffff:127.0.0.1') for c in ports)
    p.send_signal(signal.SIGINT)
    assert p.wait(HANGS) == 130
    for q in mine: wait_for_end(q)
    done = command(*one, '--gpus', '64')
    assert (done.returncode, done.stderr) == (2, 'cryptoml: this machine has no 1 CPUs and 64 GPUs for a run\n')
    done = command(*one, '--address', '127.0.0.1:1')
    assert done.returncode == 2 and 'no Ray cluster answers at 127.0.0.1:1' in done.stderr
    assert done.stderr.count('\n') == 1
