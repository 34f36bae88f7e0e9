"A state folder that others can write in, or that came from somebody else: links, pipes, leftovers, races, numbers"
import json, os, resource, signal, time, warnings
from pathlib import Path

import pytest
import torch

from conftest import ended, forked
from cryptoml import state
from cryptoml.state import (
    StateError, append_chained, append_line, contents, discard, load, lock, read_chained, read_json, read_lines, save)

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='links, pipes and forks of Unix')

SECRET = 'a file of somebody else\n'

def put(root, step): return save(root, dict(model=dict(w=torch.full((9,), float(step)))), dict(step=step))

def got(root):
    tensors, content = load(root)
    assert (tensors['model']['w'] == content['step']).all()
    return content['step']

@pytest.fixture
def root(tmp_path):
    "A state of one generation; beside it a file and a folder that are none of its own"
    put(tmp_path/'state', 1)
    (tmp_path/'victim').write_text(SECRET)
    (tmp_path/'folder').mkdir()
    (tmp_path/'folder'/'victim').write_text(SECRET)
    yield tmp_path/'state'
    assert (tmp_path/'victim').read_text() == (tmp_path/'folder'/'victim').read_text() == SECRET

@pytest.fixture
def prompt():
    "A wait for a pipe that nobody writes to would never end"
    def late(*_): raise AssertionError('it hung')
    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)

def full_folder(path):
    path.mkdir()
    (path/'x').write_text('junk')

THINGS = dict(
    file=lambda path: path.write_text('junk'),
    folder=lambda path: path.mkdir(),
    full_folder=full_folder,
    link_to_a_file=lambda path: path.symlink_to('../victim'),
    link_to_a_folder=lambda path: path.symlink_to('../folder'),
    link_to_nowhere=lambda path: path.symlink_to('/nowhere'),
    pipe=os.mkfifo,
)
NAMES = ['LOCK', 'CURRENT', 'gen-000002', '.gen-000002', '.CURRENT.1-2', 'gen-999999999999', 'gen-٠٠٠٠٠٥']

# ---- what lies about under our names

@pytest.mark.parametrize('thing', THINGS)
@pytest.mark.parametrize('name', NAMES)
def test_what_lies_in_the_way_does_not_keep_it_from_being_saved(root, prompt, name, thing):
    path = root/name
    if path.exists(): path.unlink()
    THINGS[thing](path)
    for step in (2, 3):
        put(root, step)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            assert got(root) == step

@pytest.mark.parametrize('thing', ['link_to_a_file', 'link_to_a_folder', 'link_to_nowhere', 'pipe', 'folder'])
@pytest.mark.parametrize('name', ['CURRENT', 'LOCK', 'gen-000009'])
def test_what_lies_in_the_way_does_not_keep_it_from_being_loaded(root, prompt, name, thing):
    path = root/name
    if path.exists(): path.unlink()
    THINGS[thing](path)
    with warnings.catch_warnings():
        warnings.simplefilter('error')                 # CURRENT gone: the newest generation is the live one
        assert got(root) == 1

def test_the_last_number_that_there_is(root):
    "Then numbers go on where there is room, and pruning keeps what is newest"
    for name in ('gen-999999999998', 'gen-999999999999'): (root/name).mkdir()
    for step in (2, 3, 4): put(root, step)
    assert (root/'CURRENT').read_text() == 'gen-000004\n'
    assert got(root) == 4

def test_a_link_is_never_a_generation(root):
    (root/'gen-000002').symlink_to(root/'gen-000001')
    assert [p.name for p in state.generations(root)] == ['gen-000001']
    assert contents(root) == [dict(step=1)]

@pytest.mark.parametrize('thing', ['link_to_a_file', 'link_to_nowhere', 'pipe'])
@pytest.mark.parametrize('name', ['lines.jsonl', 'lines.jsonl.head'])
def test_lines_are_not_written_through_a_link(root, prompt, name, thing):
    "Neither is a chain, nor its .head"
    THINGS[thing](root/name)
    lines = root/'lines.jsonl'
    if name == 'lines.jsonl':
        with pytest.raises(StateError, match='not a regular file'): append_line(lines, dict(a=1))
        with pytest.raises(StateError, match='not a regular file'): append_chained(lines, dict(a=1))
        with pytest.raises(StateError, match='not a regular file'): read_lines(lines)
        assert 'not a regular file' in read_chained(lines).faults[0]
    else:
        append_chained(lines, dict(a=1))
        assert 'not a regular file' in read_chained(lines).faults[0]
    with pytest.raises(StateError, match='not a regular file'): read_json(root/name)

@pytest.mark.parametrize('thing', ['link_to_a_file', 'pipe', 'folder'])
def test_a_training_locks_no_file_of_another(root, prompt, thing):
    from torch import nn
    from cryptoml.trainer import TrainConfig, UltimateTrainer
    THINGS[thing](root/'TRAINING')
    trainer = UltimateTrainer(nn.Linear(3, 1), TrainConfig(epochs=1), root, 'cpu')
    history = trainer.fit(lambda epoch, order: [torch.randn(8, 3, generator=order)],
                          lambda net, batch: net(batch).square().mean(), lambda net: dict(loss=1.))
    assert len(history) == 1

# ---- what is swapped between the look and the opening

def swap_after_the_look(monkeypatch, path, make):
    "The first time that somebody asks what a file is, it becomes another thing as soon as he was told"
    look, waiting = os.stat, [path]
    def told(name, *args, **kwargs):
        answer = look(name, *args, **kwargs)
        if waiting and Path(name).name == path.name:
            waiting.pop().unlink()
            make(path)
        return answer
    monkeypatch.setattr(os, 'stat', told)

@pytest.mark.parametrize('thing', ['link_to_a_file', 'pipe', 'folder'])
@pytest.mark.parametrize('name', ['CURRENT', 'LOCK', 'gen-000001/manifest.json', 'gen-000001/model.safetensors'])
def test_a_file_swapped_at_the_worst_moment(root, prompt, monkeypatch, name, thing):
    swap_after_the_look(monkeypatch, root/name, THINGS[thing])
    if name == 'LOCK': put(root, 2)
    elif name == 'CURRENT': assert got(root) == 1
    else:
        with pytest.raises(StateError, match='not a regular file'): load(root)

def test_a_file_written_over_while_it_is_read(root, monkeypatch):
    "What was hashed on the disk is not believed to be what was read afterwards"
    path, hashed = root/'gen-000001'/'model.safetensors', state._hashed
    def hashed_and_changed(f, size):
        digest = hashed(f, size)
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return digest
    monkeypatch.setattr(state, '_hashed', hashed_and_changed)
    with pytest.raises(StateError, match='does not fit its digest'): load(root)

def test_who_waited_for_a_folder_that_was_discarded_owns_a_new_one(root):
    r, w = os.pipe()
    def owner():
        with lock(root):
            os.write(w, b'x')
            os.rename(root, root.with_name('gone')) # as `discard` does, with the lock in its hand
            time.sleep(.3)
    pid = forked(owner)
    os.read(r, 1)
    with lock(root) as f: assert os.path.samestat(os.fstat(f.fileno()), os.stat(root/'LOCK'))
    assert ended(pid) == 0

def test_a_folder_in_use_is_not_discarded(root):
    with lock(root): assert not discard(root)
    assert got(root) == 1
    assert discard(root) and not root.exists()
    assert discard(root)                            # there is nothing to do

# ---- numbers and sizes

@pytest.mark.parametrize('text, why', [
    (b'[' * 65 + b']' * 65, 'nested 65 deep'),
    (b'{"a":' * 300_000 + b'1' + b'}' * 300_000, 'nested 300,000 deep'),
    (b'[NaN]', 'NaN is no number'),
    (b'[-Infinity]', '-Infinity is no number'),
    (b'[1e999]', '1e999 is no number'),
    (b'[' + b'1' * 10_000 + b']', 'is not JSON'),
    (b'["' + b'[' * 100 + b'\\"' + b'[' * 100 + b'"]', None),
    (b'[' * 64 + b']' * 64, None),
], ids=['deep', 'deeper', 'nan', 'infinity', 'overflow', 'digits', 'brackets in a text', 'as deep as may be'])
def test_json_that_we_would_not_write(tmp_path, text, why):
    (tmp_path/'x.json').write_bytes(text)
    if why is None: read_json(tmp_path/'x.json')
    else:
        with pytest.raises(StateError, match=why): read_json(tmp_path/'x.json')

def nested(n): return [] if n == 1 else [nested(n - 1)]

@pytest.mark.parametrize('content, why', [
    (dict(text='x' * (1 << 20)), 'at most 1,048,576 are read'),
    (dict(lists=nested(64)), 'nested 66 deep'),
])
def test_what_could_not_be_loaded_is_not_saved(root, content, why):
    with pytest.raises(StateError, match=why): save(root, {}, content)
    assert got(root) == 1
    assert sorted(p.name for p in root.iterdir()) == ['CURRENT', 'LOCK', 'gen-000001']

def resigned(root, change):
    "The manifest changed, with a digest that fits"
    path = root/'gen-000001'/'manifest.json'
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest | dict(sha256=state._digest(manifest))))

@pytest.mark.parametrize('size', [-1, True, '12', 1.5, None, 1 << 60])
def test_a_size_that_is_none(root, size):
    resigned(root, lambda m: m['files']['model.safetensors'].update(size=size))
    with pytest.raises(StateError, match='model.safetensors'): load(root)

@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='reads its size from /proc')
def test_a_file_is_hashed_before_it_is_in_memory(root):
    "It has the size that was promised: 400 MB of holes, under a digest that does not fit"
    size = 400 << 20
    os.truncate(root/'gen-000001'/'model.safetensors', size)
    resigned(root, lambda m: m['files'].update({'model.safetensors': dict(size=size, sha256='0' * 64)}))
    def bounded():
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss   # kB
        start = peak()
        try: load(root)
        except StateError as e: return 0 if 'does not fit its digest' in str(e) and peak() - start < 50_000 else 3
        return 2
    assert ended(forked(bounded)) == 0
