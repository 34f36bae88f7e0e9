"Faults of the state on disk: kills, full and read-only disks, damage, malice, several processes (suites 4, 5, 6, 14)"
import contextlib, errno, hashlib, json, os, pickle, random, resource, shutil, signal
import tempfile, threading, time, warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from conftest import ended, forked
from cryptoml import state
from cryptoml.state import (
    StateError, append_line, generations, load, lock, read_json, read_lines, save, write_json)

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
    with pytest.warns(UserWarning, match='gen-000009: manifest.json: No such file'): assert got(root) == 2

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
