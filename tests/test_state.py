"Faults of the state on disk: kills, full and read-only disks, damage, malice, several processes (suites 4, 5, 6, 14)"
import contextlib, errno, hashlib, itertools, json, os, pickle, random, re, resource, shutil
import signal, sys, tempfile, threading, time, warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from conftest import ended, forked
from cryptoml import state
from cryptoml.state import (
    Chain, StateError, append_chained, append_line, generations, ledger_file, load, lock, read_chained, read_json,
    read_lines, save, write_json)

unix = pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks, signals and users of Unix')

def put(root, step, keep=3, n=200):
    "A generation whose every part tells its step"
    part = {'w': torch.full((n,), float(step))}
    return save(root, dict(model=part, scaler=part), dict(step=step), keep=keep)

def got(root):
    "The step of the live generation, after checking that no part is of another"
    tensors, content = load(root)
    assert sorted(tensors) == ['model', 'scaler']
    for part in tensors.values(): assert (part['w'] == content['step']).all()
    return content['step']

def entry(data):
    "What a manifest says of a file"
    return dict(size=len(data), sha256=hashlib.sha256(data).hexdigest())

def signed(manifest):
    "A manifest with a digest that fits"
    return manifest | dict(sha256=state._digest(manifest))

def forge(root, files, names=None, schema=state.SCHEMA, content=None):
    "A generation with correct digests and whatever else one likes"
    folder = Path(root)/'gen-000001'
    shutil.rmtree(root, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in files.items(): (folder/name).write_bytes(data)
    listed = names or {name: entry(data) for name, data in files.items()}
    write_json(folder/'manifest.json', signed(dict(schema=schema, files=listed, content=content or {})))
    return root

# ---- round trip

dtypes = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16,
    torch.int64, torch.int32, torch.uint8, torch.bool,
]
shape = st.lists(st.integers(0, 4), max_size=3)
kinds_and_shapes = st.lists(st.tuples(st.sampled_from(dtypes), shape), max_size=4)

letters = st.characters(codec='utf-8')
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
leaves = st.none() | st.booleans() | numbers | st.text(letters)
def nested(inner):
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(letters, max_size=5), inner, max_size=3)
json_values = st.recursive(leaves, nested, max_leaves=8)

@settings(max_examples=30, deadline=None)
@given(kinds_and_shapes, json_values)
def test_round_trip(shapes, content):
    with tempfile.TemporaryDirectory() as root:
        part = {f't{i}': torch.randn(s).mul(3).to(d) for i, (d, s) in enumerate(shapes)}
        save(root, dict(x=part), dict(c=content))
        tensors, back = load(root)
        assert back == dict(c=content)
        assert tensors['x'].keys() == part.keys()
        for k, v in part.items():
            assert tensors['x'][k].dtype == v.dtype
            assert torch.equal(tensors['x'][k], v)

def test_views_and_tied_weights(tmp_path):
    w = torch.arange(12.).reshape(3, 4)
    save(tmp_path, dict(x=dict(a=w, tied=w, columns=w.T, part=w[1:, ::2])), {})
    x = load(tmp_path)[0]['x']
    assert torch.equal(x['tied'], w)
    assert torch.equal(x['columns'], w.T)
    assert torch.equal(x['part'], w[1:, ::2])
    x['a'][0] = 9   # what was loaded can be written to, and is not shared
    assert x['tied'][0, 1] == 1

def test_keeps_the_last(tmp_path):
    for step in range(6): put(tmp_path, step, keep=2)
    assert [g.name for g in generations(tmp_path)] == ['gen-000005', 'gen-000006']
    assert got(tmp_path) == 5
    put(tmp_path, 6, keep=1)
    assert len(generations(tmp_path)) == 1 and got(tmp_path) == 6

@pytest.mark.parametrize('tensors, content, match', [
    ({'a/b': {}}, {}, 'cannot be file names'),
    ({'': {}}, {}, 'cannot be file names'),
    ({'..': {}}, {}, 'cannot be file names'),
    ({'a': {'x': 1.0}}, {}, '1 values are not tensors, first a/x'),
    ({}, dict(x=object()), 'as JSON'),
], ids=['folder', 'no name', 'parent', 'a number', 'an object'])
def test_refuses_before_it_writes(tmp_path, tensors, content, match):
    put(tmp_path, 1)
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(StateError, match=match): save(tmp_path, tensors, content)
    assert sorted(tmp_path.rglob('*')) == before
    assert got(tmp_path) == 1

# ---- suite 4: kills and faults

@unix
def test_kill_at_random_moments(tmp_path):
    def endless():
        for step in range(done + 1, 1 << 30):
            put(tmp_path, step, n=20_000)
            os.write(w, step.to_bytes(8, 'little'))
    done = 0
    rng = random.Random(0)
    for _ in range(20):
        r, w = os.pipe()
        pid = forked(endless)
        os.close(w)
        said = os.read(r, 8)                                          # one save is through, however slow the machine
        time.sleep(rng.uniform(0.005, 0.08))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        while chunk := os.read(r, 1 << 16): said += chunk
        os.close(r)
        acknowledged = int.from_bytes(said[-8:], 'little')
        with warnings.catch_warnings():
            warnings.simplefilter('error')                            # whole without falling back
            done = got(tmp_path)
        assert done in (acknowledged, acknowledged + 1)               # never less than was acknowledged
    assert done >= 20
    put(tmp_path, -1)
    assert got(tmp_path) == -1 and not list(tmp_path.glob('.*'))      # leftovers are swept by the next save

DISK = ('fsync', 'rename', 'replace', 'mkdir', 'rmdir', 'unlink')   # and open

def fail_at(k, fault):
    "From here on the k-th call that touches the disk dies"
    calls = 0
    def wrap(f):
        def g(*args, **kw):
            nonlocal calls
            calls += 1
            if calls != k: return f(*args, **kw)
            if fault == 'kill': os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, 'No space left on device')
        return g
    for name in DISK: setattr(os, name, wrap(getattr(os, name)))
    state.open = wrap(open)

@unix
@pytest.mark.parametrize('fault', ['kill', 'disk full'])
def test_fault_at_every_step(tmp_path, fault):
    "The k-th call that touches the disk dies, for every k"
    def faulty():
        fail_at(k, fault)
        try: put(root, 4)
        except StateError as e:
            assert 'No space left' in str(e)
            return 3
    for k in range(1, 60):
        root = tmp_path/str(k)
        for step in (1, 2, 3): put(root, step)
        code = ended(forked(faulty))
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            step = got(root)
        assert step in (3, 4) and (code != 0 or step == 4), (k, code, step)
        put(root, 5)
        assert got(root) == 5
        assert not list(root.glob('.*'))
        if code == 0 and not list(root.glob('.*')) and k > 40: break
    assert k > 15

@unix
def test_disk_full(tmp_path):
    put(tmp_path, 1)
    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try: put(tmp_path, 2, n=100_000)
        except StateError as e: return 0 if 'previous generation is unchanged' in str(e) else 2
        return 3
    assert ended(forked(full)) == 0
    assert got(tmp_path) == 1 and not list(tmp_path.glob('.*'))

@unix
def test_read_only_folder():
    root = Path(tempfile.mkdtemp())
    try:
        put(root, 1)
        for p in (root, *root.rglob('*')): p.chmod(0o555 if p.is_dir() else 0o444)
        writes = (
            lambda: put(root, 2),
            lambda: write_json(root/'a.json', 1),
            lambda: append_line(root/'a.jsonl', 1),
            lambda: append_chained(root/'b.jsonl', {}),
        )
        def reader():
            if os.getuid() == 0:   # root may write anywhere
                os.setgid(65534)
                os.setuid(65534)
            if got(root) != 1: return 2
            for write in writes:
                try: write()
                except StateError as e:
                    if 'Permission denied' not in str(e): return 4
                else: return 3
        assert ended(forked(reader)) == 0
        root.chmod(0o755)
        assert got(root) == 1
    finally:
        for p in (root, *root.rglob('*')): p.chmod(0o755)
        shutil.rmtree(root)

def test_root_is_a_file(tmp_path):
    (tmp_path/'x').write_text('')
    with pytest.raises(StateError): put(tmp_path/'x', 1)
    with pytest.raises(StateError, match='nothing was saved'): load(tmp_path/'x')

def test_the_folder_of_a_run_names_that_of_its_model(tmp_path):
    put(tmp_path/'run'/'model', 1)
    with pytest.raises(StateError, match='the model of this run is in .*run.model'): load(tmp_path/'run')

# ---- suite 5: damage

FILES = ['manifest.json', 'model.safetensors', 'scaler.safetensors']

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp('whole')
    for step in (1, 2): put(root, step, n=20)
    return root

@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_one_flipped_bit(whole, data):
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(shutil.copytree(whole, tmp, dirs_exist_ok=True))
        path = root/'gen-000002'/data.draw(st.sampled_from(FILES))
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) * 8 - 1))
        content[at // 8] ^= 1 << at % 8
        path.write_bytes(content)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            step = got(root)
        blank = path.name == 'manifest.json' and not caught   # blanks between JSON values carry nothing
        assert step == (2 if blank else 1)
        if not blank: assert 'gen-000001 was loaded instead' in str(caught[0].message)

def make_a_folder(path):
    path.unlink()
    path.mkdir()

def cut_in_half(path):
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])

DAMAGE = dict(
    missing=lambda path: path.unlink(),
    empty=lambda path: path.write_bytes(b''),
    half=cut_in_half,
    longer=lambda path: path.write_bytes(path.read_bytes() + b'x'),
    folder=make_a_folder,
)

@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('damage', DAMAGE)
def test_damaged_file(whole, tmp_path, name, damage):
    root = Path(shutil.copytree(whole, tmp_path/'s'))
    DAMAGE[damage](root/'gen-000002'/name)
    with pytest.warns(UserWarning, match=f'gen-000001 was loaded instead .*{name}'): assert got(root) == 1
    DAMAGE[damage](root/'gen-000001'/name)
    with pytest.raises(StateError, match='no whole generation'): load(root)

@pytest.mark.parametrize('text, live', [
    (None, 2),
    ('', 2),
    ('gen-000001\n', 1),   # a person may point back
    ('../gen-000002', 2),
    ('\0\xff', 2),
    ('x' * 10_000, 2),
], ids=['missing', 'empty', 'back', 'outside', 'bytes', 'long'])
def test_damaged_current(whole, tmp_path, text, live):
    root = Path(shutil.copytree(whole, tmp_path/'s'))
    (root/'CURRENT').unlink()
    if text is not None: (root/'CURRENT').write_bytes(text.encode('latin1'))
    assert got(root) == live

def test_current_names_what_is_not_there(whole, tmp_path):
    root = Path(shutil.copytree(whole, tmp_path/'s'))
    (root/'CURRENT').write_text('gen-000009\n')
    with pytest.warns(UserWarning, match='gen-000009: cannot be opened as a folder: No such'): assert got(root) == 2

@pytest.mark.parametrize('schema', [0, state.SCHEMA + 1, None, 'x'])
def test_other_schemas(tmp_path, schema):
    forge(tmp_path/'s', {}, schema=schema)
    with pytest.raises(StateError, match=f'schema {schema!r}, this version reads 1'): load(tmp_path/'s')

def test_an_older_schema_is_saved_over(tmp_path):
    forge(tmp_path/'t', {}, schema=0)
    put(tmp_path/'t', 1)
    assert got(tmp_path/'t') == 1

def test_a_newer_schema_is_not_passed_over(tmp_path):
    put(tmp_path, 1)
    put(tmp_path, 2)
    path = tmp_path/'gen-000002'/'manifest.json'
    write_json(path, signed(read_json(path) | dict(schema=2)))
    with pytest.raises(StateError, match='schema 2'): load(tmp_path)

@pytest.mark.parametrize('m', [
    [],
    1,
    'x',
    {},
    dict(schema=1, files={}),
    dict(schema=1, files=[], content={}),
    dict(schema=1, files={'a.safetensors': 3}, content={}),
    dict(schema=1, files={'a.safetensors': dict(size='9', sha256='')}, content={}),
    dict(schema=1, files={'a.safetensors': dict(size=-1, sha256='')}, content={}),
    dict(schema=1, files={'a.safetensors': dict(size=1.5, sha256=None)}, content={}),
], ids=str)
def test_malformed_manifest(tmp_path, m):
    (tmp_path/'gen-000001').mkdir()
    (tmp_path/'gen-000001'/'a.safetensors').write_bytes(b'xy')
    write_json(tmp_path/'gen-000001'/'manifest.json', signed(m) if isinstance(m, dict) else m)
    with pytest.raises(StateError, match='manifest.json|a.safetensors'): load(tmp_path)

@pytest.mark.parametrize('text', [
    '[' * 100_000,
    '{"schema":' * 50_000,
    '9' * 100_000,
    '{"a":' * 900 + '1' + '}' * 900,
    '\x00',
    '{"schema": 1',
], ids=['lists', 'dicts', 'digits', 'closed dicts', 'zero', 'torn'])
def test_deep_and_long_json(tmp_path, text):
    (tmp_path/'gen-000001').mkdir()
    (tmp_path/'gen-000001'/'manifest.json').write_text(text)
    with pytest.raises(StateError): load(tmp_path)
    (tmp_path/'x.json').write_text(text)
    with contextlib.suppress(StateError): read_json(tmp_path/'x.json')

# ---- suite 6: malice

@pytest.mark.parametrize('name', [
    '../secret.safetensors',
    '../../secret.safetensors',
    '{root}/secret.safetensors',
    '..\\secret.safetensors',
    'a/b.safetensors',
    '.safetensors',
    '..safetensors',
    'a.pt',
    'manifest.json',
    'a\n.safetensors',
    'a.safetensors\n',
    '',
    'con:.safetensors',
])
def test_names_outside_the_folder(tmp_path, name):
    (tmp_path/'secret.safetensors').write_bytes(b'x')
    forge(tmp_path/'s', {}, {name.replace('{root}', str(tmp_path)): entry(b'x')})
    with pytest.raises(StateError, match='no file of a generation'): load(tmp_path/'s')

@unix
def test_links_pipes_and_devices(tmp_path):
    put(tmp_path/'s', 1)
    path = tmp_path/'s'/'gen-000001'/'model.safetensors'
    path.rename(tmp_path/'elsewhere')
    for make in (
        lambda: path.symlink_to(tmp_path/'elsewhere'),
        lambda: path.symlink_to('/dev/zero'),
        lambda: os.mkfifo(path),
    ):
        make()
        with pytest.raises(StateError, match='not a regular file'): load(tmp_path/'s')
        path.unlink()
    shutil.copy(tmp_path/'elsewhere', path)
    assert got(tmp_path/'s') == 1
    generation = tmp_path/'s'/'gen-000001'
    generation.rename(tmp_path/'moved')
    generation.symlink_to(tmp_path/'moved')
    with pytest.raises(StateError, match='is a link'): load(tmp_path/'s')

def test_nothing_unpickles(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self): return (Path.touch, (tmp_path/'executed',))
    evil = pickle.dumps(Evil())
    torch.save(Evil(), tmp_path/'evil.pt')
    put(tmp_path/'s', 1)
    for name in ('model.pt', 'x.pkl', 'extra.safetensors', 'pytorch_model.bin'):
        (tmp_path/'s'/'gen-000001'/name).write_bytes(evil)
    def never(*a, **k): raise AssertionError('unpickled')
    for owner, name in ((pickle, 'load'), (pickle, 'loads'), (pickle, 'Unpickler'), (torch, 'load')):
        monkeypatch.setattr(owner, name, never)
    assert got(tmp_path/'s') == 1                           # files that the manifest does not name are ignored
    for data in (evil, (tmp_path/'evil.pt').read_bytes()):  # the second is a zip
        forge(tmp_path/'t', {'a.safetensors': data})
        with pytest.raises(StateError): load(tmp_path/'t')
    assert not (tmp_path/'executed').exists()

def with_length(length, header, body): return length.to_bytes(8, 'little') + header + body

def with_header(dtype, shape, offsets, body):
    header = json.dumps(dict(w=dict(dtype=dtype, shape=shape, data_offsets=offsets))).encode()
    return with_length(len(header), header, body)

sizes = st.lists(st.integers(-1, 2**63), max_size=3)
any_bytes = st.binary(max_size=60)
any_length = st.builds(with_length, st.integers(0, 2**64 - 1), st.binary(max_size=40), st.binary(max_size=20))
any_header = st.builds(with_header, st.sampled_from(['F32', 'U8', 'F64', 'X9']), sizes, sizes, st.binary(max_size=16))

@settings(max_examples=150, deadline=None)
@given(any_bytes | any_length | any_header)
def test_any_bytes_as_tensors(data):
    with tempfile.TemporaryDirectory() as tmp:
        try: tensors, _ = load(forge(Path(tmp)/'s', {'a.safetensors': data}))
        except StateError: return
        size = sum(t.numel() * t.element_size() for t in tensors['a'].values())
        assert size <= len(data)   # no more than the file brought

@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='reads its size from /proc')
def test_memory_is_bounded(tmp_path):
    "A terabyte of holes, a header that claims an exabyte, a huge manifest: refused without reading them"
    claims = with_header('F32', [1 << 60], [0, 1 << 62], b'')
    cases = [forge(tmp_path/'claims', {'a.safetensors': claims})]
    for name, size in (('hole', 1 << 40), ('lie', 100)):
        cases.append(forge(tmp_path/name, {'a.safetensors': b''}, {'a.safetensors': dict(size=size, sha256='0' * 64)}))
        os.truncate(tmp_path/name/'gen-000001'/'a.safetensors', 1 << 40)
    cases.append(forge(tmp_path/'manifest', {}))
    os.truncate(tmp_path/'manifest'/'gen-000001'/'manifest.json', 1 << 40)
    def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss   # kB
    def bounded():
        now = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
        most = now + (600 << 20)   # a mistake must not take the machine's memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        start = peak()
        for root in cases:
            try: load(root)
            except StateError: pass
            else: return 2
        return 0 if peak() - start < 50_000 else 3
    assert ended(forked(bounded)) == 0

# ---- suite 14: several at once

@unix
def test_readers_see_one_generation(tmp_path):
    put(tmp_path, 0, keep=1)
    def saver():
        for step in range(1, 150): put(tmp_path, step, keep=1)
    pid = forked(saver)
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        while os.waitpid(pid, os.WNOHANG) == (0, 0): seen.append(got(tmp_path))
    assert seen == sorted(seen)
    assert len(set(seen)) > 3
    assert got(tmp_path) == 149

@unix
def test_two_processes_and_threads_save(tmp_path):
    def saver(who):
        for i in range(15): put(tmp_path, who * 100 + i, keep=100)
    pids = [forked(lambda who=who: saver(who)) for who in (1, 2)]
    threads = [threading.Thread(target=saver, args=(who,)) for who in (3, 4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert [ended(p) for p in pids] == [0, 0]
    gens = generations(tmp_path)
    assert len(gens) == 60 and gens[-1].name == 'gen-000060'          # no number twice, none lost
    steps = sorted(state._read_generation(g)[1]['step'] for g in gens)
    assert steps == [who * 100 + i for who in (1, 2, 3, 4) for i in range(15)]

@unix
def test_the_lock_dies_with_its_owner(tmp_path):
    r, w = os.pipe()
    def owner():
        with lock(tmp_path):
            os.write(w, b'x')
            time.sleep(60)
    pid = forked(owner)
    os.read(r, 1)
    with pytest.raises(StateError, match=f'in use by process {pid}'):
        with lock(tmp_path, wait=0.05): pass
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    with lock(tmp_path, wait=0.5): pass

def test_the_lock_is_released_by_an_error(tmp_path):
    with pytest.raises(KeyError):
        with lock(tmp_path): raise KeyError
    with lock(tmp_path, wait=0): pass

# ---- lines

def test_lines_torn_anywhere(tmp_path):
    path = tmp_path/'h.jsonl'
    records = [dict(epoch=i, text='ü\n{"', loss=i / 7) for i in range(4)]
    for r in records: append_line(path, r)
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        n = data[:cut].count(b'\n')
        assert read_lines(path) == records[:n]
        append_line(path, dict(new=1))
        assert read_lines(path) == records[:n] + [dict(new=1)]

def test_long_lines(tmp_path):
    path = tmp_path/'h.jsonl'
    long = dict(x='y' * 200_000)
    append_line(path, 1)
    append_line(path, long)
    with open(path, 'a') as f: f.write('"' + 'z' * 150_000)           # a torn line longer than what is read at a time
    append_line(path, 3)
    assert read_lines(path) == [1, long, 3]

@unix
def test_append_on_a_full_disk(tmp_path):
    path = tmp_path/'h.jsonl'
    append_line(path, 1)
    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try: append_line(path, 'x' * 5000)
        except StateError as e: return 0 if 'unchanged' in str(e) else 2
        return 3
    assert ended(forked(full)) == 0
    assert path.read_bytes() == b'1\n'

@unix
def test_appends_of_several_processes(tmp_path):
    path = tmp_path/'h.jsonl'
    def writer(who):
        for i in range(100): append_line(path, dict(who=who, i=i, pad='x' * 500))
    pids = [forked(lambda who=who: writer(who)) for who in range(3)]
    assert [ended(p) for p in pids] == [0, 0, 0]
    lines = read_lines(path)
    for who in range(3): assert [r['i'] for r in lines if r['who'] == who] == list(range(100))

def test_json_is_readable_by_others(tmp_path):
    write_json(tmp_path/'m.json', dict(
        a=np.float32(1.5),
        b=np.array([1, np.nan]),
        c=pd.Timestamp('2024-01-01', tz='UTC'),
        d=float('inf'),
        e=np.int64(3),
        f=Path('x'),
        g={1: np.bool_(True)},
    ))
    def never(c): raise AssertionError(c)
    assert json.loads((tmp_path/'m.json').read_text(), parse_constant=never) == dict(
        a=1.5,
        b=[1, None],
        c='2024-01-01T00:00:00+00:00',
        d=None,
        e=3,
        f='x',
        g={'1': True},
    )
    assert [p.name for p in tmp_path.iterdir()] == ['m.json']

# ---- lines that hold each other

def head_of(path): return path.with_name(path.name + '.head')

def resigned(records):
    "Records as lines, each with a digest that fits and naming the one before"
    before = ''
    for r in records:
        r = {k: v for k, v in r.items() if k != 'sha256'} | dict(previous=before)
        r['sha256'] = before = state._digest(r)
        yield r

def put_lines(path, records): path.write_bytes(b''.join(json.dumps(r).encode() + b'\n' for r in records))

@pytest.fixture
def chain(tmp_path):
    path = tmp_path/'deep'/'chain.jsonl'
    for i in range(6): append_chained(path, dict(i=i, returns=[i / 7, 1e-3], name='ü\n"'))
    return path

def test_a_whole_chain(chain):
    lines, head, faults = read_chained(chain)
    assert [r['i'] for r in lines] == list(range(6)) and faults == []
    assert head == lines[-1]['sha256'] == read_json(head_of(chain))['head']
    assert [r['previous'] for r in lines] == ['', *(r['sha256'] for r in lines[:-1])]
    for r in lines: assert hashlib.sha256(json.dumps(without(r), sort_keys=True).encode()).hexdigest() == r['sha256']
    assert append_chained(chain, {}) == read_chained(chain).head

def without(record): return {k: v for k, v in record.items() if k != 'sha256'}

def test_a_chain_torn_anywhere(chain):
    "What .head has not seen yet may be torn: the line is lost, and nothing is said"
    data = chain.read_bytes()
    for k in range(7):
        ends = [0, *itertools.accumulate(len(line) + 1 for line in data.split(b'\n')[:-1])]
        head = read_chained(chain).lines[k - 1]['sha256'] if k else ''
        write_json(head_of(chain), dict(lines=k, head=head, size=ends[k]))
        for cut in range(ends[k], len(data) + 1, 17):
            chain.write_bytes(data[:cut])
            whole = data[:cut].count(b'\n')
            found = read_chained(chain)
            assert (len(found.lines), found.faults) == (whole, [])
            append_chained(chain, dict(new=1))
            found = read_chained(chain)
            assert (len(found.lines), found.faults) == (whole + 1, [])
            assert read_json(head_of(chain))['lines'] == whole + 1
            write_json(head_of(chain), dict(lines=k, head=head, size=ends[k]))
        chain.write_bytes(data)

def forged(path, change):
    "The records after a change, all digests computed anew"
    records = read_lines(path)
    change(records)
    put_lines(path, resigned(records))

TAMPERED = {
    'the last line cut': (
        lambda p: put_lines(p, read_lines(p)[:-1]), ['has 5 lines, its .head says 6']),
    'cut in the last line': (
        lambda p: p.write_bytes(p.read_bytes()[:-9]), ['has 5 lines, its .head says 6']),
    'a line cut from the middle': (
        lambda p: put_lines(p, read_lines(p)[:2] + read_lines(p)[3:]), ['line 3 does not follow', 'has 5 lines']),
    'the first cut': (
        lambda p: put_lines(p, read_lines(p)[1:]), ['line 1 does not follow', 'has 5 lines']),
    'cut in the middle of a line': (
        lambda p: p.write_bytes(p.read_bytes()[:300] + p.read_bytes()[310:]),
        ['line 2 cannot be read', 'line 3 does not follow']),
    'a value': (
        lambda p: p.write_text(p.read_text().replace('"i": 3', '"i": 4')), ['line 4 was changed']),
    'a value and its digest': (
        lambda p: put_lines(p, [r | dict(sha256=state._digest(r | dict(i=9)), i=9) if r['i'] == 3 else r
                                for r in read_lines(p)]),
        ['line 5 does not follow']),
    'the last value and its digest': (
        lambda p: put_lines(p, [r | dict(sha256=state._digest(r | dict(i=9)), i=9) if r['i'] == 5 else r
                                for r in read_lines(p)]),
        ['line 6 is not the one that its .head names']),
    'two lines in another order': (
        lambda p: put_lines(p, [read_lines(p)[i] for i in (0, 2, 1, 3, 4, 5)]), [r'line 2 \(and 2 more\) does not']),
    'all of it anew': (
        lambda p: forged(p, lambda r: r[0].update(i=9)), ['line 6 is not the one that its .head names']),
    'all of it anew, a line less': (
        lambda p: forged(p, lambda r: r.pop(2)), ['has 5 lines, its .head says 6']),
    'all of it anew, a line more': (
        lambda p: forged(p, lambda r: r.insert(0, dict(i=9))), ['line 6 is not the one that its .head names']),
    'deleted': (lambda p: p.unlink(), ['has 0 lines, its .head says 6']),
    'its head deleted': (lambda p: head_of(p).unlink(), ['chain.jsonl.head is missing']),
}

@pytest.mark.parametrize('how', TAMPERED)
def test_a_tampered_chain(chain, how):
    change, says = TAMPERED[how]
    change(chain)
    found = read_chained(chain)
    assert len(found.faults) == len(says), found.faults
    for fault, words in zip(found.faults, says): assert re.search(words, fault), fault
    for i in range(3): append_chained(chain, dict(i=10 + i))      # and what is appended later does not hide it
    assert read_chained(chain).faults
    assert [r['i'] for r in read_chained(chain).lines][-3:] == [10, 11, 12]

def test_who_takes_both_files_leaves_no_trace_here(chain):
    "Only a head that was kept elsewhere tells: `cryptoml.ledger` asks for those of the models"
    head = read_chained(chain).head
    chain.unlink()
    head_of(chain).unlink()
    assert read_chained(chain) == Chain([], '', [])
    append_chained(chain, dict(i=0))
    assert head not in [r['sha256'] for r in read_chained(chain).lines]

HOSTILE = [
    b'not JSON', b'', b'[]', b'3', b'null', b'"sha256"', b'{}', b'{"sha256": 1, "previous": ""}', b'\xff\xfe\x00',
    b'[' * 100_000, b'{"a":' * 50_000, b'9' * 100_000, b'{"sha256": NaN, "previous": Infinity}',
    b'{"i": 1e999, "previous": "", "sha256": ""}',
    b'{"a":' * 900 + b'1' + b'}' * 900,
]

@pytest.mark.parametrize('line', HOSTILE, ids=lambda line: str(line[:20]))
def test_a_hostile_line(chain, line):
    lines = chain.read_bytes().splitlines(keepends=True)
    chain.write_bytes(b''.join(lines[:3]) + line + b'\n' + b''.join(lines[3:]))
    found = read_chained(chain)
    assert len(found.lines) in (6, 7)                              # the others are read
    assert 'line 4' in found.faults[0]
    append_chained(chain, {})
    assert len(read_chained(chain).lines) in (7, 8)

@pytest.mark.parametrize('line', HOSTILE, ids=lambda line: str(line[:20]))
def test_after_a_hostile_line(chain, line):
    with open(chain, 'ab') as f: f.write(line + b'\n')
    append_chained(chain, dict(i=6))
    found = read_chained(chain)
    assert found.lines[-1]['i'] == 6 and 'line 7' in found.faults[0]
    assert len(found.faults) == 1                                  # the next line follows the bytes it found

@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_as_a_chain(data):
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp)/'c.jsonl'
        path.write_bytes(data)
        assert bool(read_chained(path).faults) == (b'\n' in data)
        append_chained(path, dict(i=1))
        assert read_chained(path).lines[-1]['i'] == 1

HEADS = ['', '[]', '{}', '{"lines": -9, "head": "", "size": 0}', '{"lines": "6", "head": "", "size": 0}', '\0',
         '{"lines": 1, "head": "", "size": 0, "more": 1}', '{"lines": 6, "head": null, "size": 1e999}', '[' * 100_000]

@pytest.mark.parametrize('text', HEADS, ids=lambda text: text[:30])
def test_a_damaged_head(chain, text):
    head_of(chain).write_text(text)
    for _ in range(2):
        assert 'chain.jsonl.head' in read_chained(chain).faults[0]
        append_chained(chain, {})
    assert head_of(chain).read_text() == text                      # left for somebody to look at

@unix
def test_a_chain_that_is_no_file(chain):
    kept = chain.rename(chain.parent/'kept')
    for make in (lambda: chain.mkdir(), lambda: os.mkfifo(chain), lambda: chain.symlink_to('/dev/zero')):
        make()
        assert 'is not a regular file' in read_chained(chain).faults[0]
        with pytest.raises(StateError): append_chained(chain, {})
        chain.rmdir() if chain.is_dir() else chain.unlink()
    chain.symlink_to(kept)                                         # nor is a link followed to a file that is one
    assert 'links are not followed' in read_chained(chain).faults[0]

@unix
def test_a_chain_of_four_processes(tmp_path):
    path = tmp_path/'c.jsonl'
    def writer(who):
        for i in range(40): append_chained(path, dict(who=who, i=i, pad='x' * 500))
    pids = [forked(lambda who=who: writer(who)) for who in range(4)]
    running = set(pids)
    while running:                                                 # a reader meanwhile sees a whole chain
        assert read_chained(path).faults == []
        running -= {pid for pid in running if os.waitpid(pid, os.WNOHANG) != (0, 0)}
    lines, head, faults = read_chained(path)
    assert faults == []
    for who in range(4): assert [r['i'] for r in lines if r['who'] == who] == list(range(40))
    assert read_json(head_of(path)) == dict(lines=160, head=head, size=path.stat().st_size)

@unix
def test_kill_while_appending_to_a_chain(tmp_path):
    path = tmp_path/'c.jsonl'
    def endless():
        for i in itertools.count():
            append_chained(path, dict(i=i, pad='x' * 9000))
            os.write(w, b'x')
    rng = random.Random(0)
    there = 0
    for _ in range(20):
        r, w = os.pipe()
        pid = forked(endless)
        os.close(w)
        acknowledged = len(os.read(r, 1))
        time.sleep(rng.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        while chunk := os.read(r, 1 << 16): acknowledged += len(chunk)
        os.close(r)
        found = read_chained(path)
        assert found.faults == []
        assert len(found.lines) - there in (acknowledged, acknowledged + 1)   # none lost that was acknowledged
        there = len(found.lines)
    assert there >= 20

@unix
@pytest.mark.parametrize('fault', ['kill', 'disk full'])
def test_fault_at_every_step_of_an_append(tmp_path, fault):
    def faulty():
        fail_at(k, fault)
        try: append_chained(path, dict(i=9))
        except StateError as e:
            assert 'No space left' in str(e)
            return 3
    for k in range(1, 20):
        path = tmp_path/str(k)/'c.jsonl'
        if k % 2: append_chained(path, dict(i=0))                             # the first of all lines, and a later one
        code = ended(forked(faulty))
        before = k % 2
        assert read_chained(path).faults == []
        assert len(read_chained(path).lines) - before in ((1,) if code == 0 else (0, 1))
        append_chained(path, dict(i=1))
        assert read_chained(path).faults == []
        if code == 0 and k > 12: break
    assert code == 0

@unix
def test_a_chain_on_a_full_disk(chain):
    before = chain.read_bytes()
    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        try: append_chained(chain, dict(pad='x' * 5000))
        except StateError as e: return 0 if 'unchanged' in str(e) and '\n' not in str(e) else 2
        return 3
    assert ended(forked(full)) == 0
    assert chain.read_bytes() == before and read_chained(chain).faults == []

def test_a_long_chain_is_read(tmp_path):
    path = tmp_path/'c.jsonl'
    put_lines(path, resigned(dict(i=i, returns=[1.23456e-3] * 365) for i in range(5000)))
    last = read_lines(path)[-1]['sha256']
    write_json(head_of(path), dict(lines=5000, head=last, size=path.stat().st_size))
    lines, head, faults = read_chained(path)
    assert (len(lines), head, faults) == (5000, last, [])

@pytest.mark.parametrize('platform, env, expected', [
    ('linux', dict(CRYPTOML_LEDGER='/x/l.jsonl', XDG_DATA_HOME='/y'), '/x/l.jsonl'),
    ('linux', dict(CRYPTOML_LEDGER='~/l.jsonl'), '/h/l.jsonl'),
    ('linux', dict(CRYPTOML_LEDGER='l.jsonl'), '/cwd/l.jsonl'),
    ('linux', dict(XDG_DATA_HOME='/y'), '/y/cryptoml/ledger.jsonl'),
    ('linux', dict(XDG_DATA_HOME='y'), '/h/.local/share/cryptoml/ledger.jsonl'),   # relative: to be ignored (XDG)
    ('linux', {}, '/h/.local/share/cryptoml/ledger.jsonl'),
    ('linux', dict(CRYPTOML_LEDGER=''), '/h/.local/share/cryptoml/ledger.jsonl'),
    ('darwin', {}, '/h/Library/Application Support/cryptoml/ledger.jsonl'),
    ('win32', dict(LOCALAPPDATA='/a'), '/a/cryptoml/ledger.jsonl'),
    ('win32', {}, '/h/AppData/Local/cryptoml/ledger.jsonl'),
], ids=str)
def test_where_the_ledger_lies(monkeypatch, platform, env, expected):
    for name in ('CRYPTOML_LEDGER', 'XDG_DATA_HOME', 'LOCALAPPDATA'): monkeypatch.delenv(name, raising=False)
    for name, value in (env | dict(HOME='/h')).items(): monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, 'platform', platform)
    monkeypatch.setattr(os, 'getcwd', lambda: '/cwd')
    assert ledger_file().as_posix() == expected

def test_no_home_for_the_ledger(monkeypatch):
    def homeless(*args): raise RuntimeError('Could not determine home directory.')
    monkeypatch.delenv('CRYPTOML_LEDGER', raising=False)
    monkeypatch.delenv('XDG_DATA_HOME', raising=False)
    monkeypatch.setattr(Path, 'home', homeless)
    with pytest.raises(StateError, match='name a file in CRYPTOML_LEDGER'): ledger_file()
