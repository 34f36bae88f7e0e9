"A store of bars: read as appended, damaged, killed in the middle, two writers, a disk that is full"
import os, random, signal, subprocess, sys, time

import numpy as np
import pandas as pd
import pytest

from cryptoml.data import DataError, Store, clean, market_frame, read_panel
from test_data import bars, fault

def test_store_reads_what_was_appended(tmp_path):
    frame = bars(24 * 75, ('BTC/USDT', '1000PEPE/USDT', '币/USDT'), '2023-12-15')
    frame['trades'] = np.where(frame.symbol == 'BTC/USDT', 5., np.nan)
    store = Store(tmp_path / 'deep' / 'er')
    mixed = frame.sample(frac=1, random_state=0)
    for k in range(7): store.append(mixed[k::7])
    pd.testing.assert_frame_equal(store.read(), market_frame(frame))
    assert clean(store.read())[1].digest == clean(frame)[1].digest == read_panel(store.root)[1].digest
    assert store.symbols == sorted(frame.symbol.unique())
    assert {p.parent.parent for p in tmp_path.rglob('*.parquet')} == {store.root}
    part = store.read(['BTCUSDT'], '2024-01-31 22:00', '2024-02-01 02:00')
    assert part.time.dt.hour.tolist() == [22, 23, 0, 1]


def test_store_refuses_and_says_what(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(DataError, match='no bars'): store.read()
    store.append(bars())
    def files(): return {p: p.read_bytes() for p in tmp_path.rglob('*.parquet')}
    before = files()
    more = bars(72)
    other = fault(75, close=lambda x: x * 1.0001)(more)
    twice = pd.concat([more, more[70:71].assign(volume=1.)])
    with pytest.raises(DataError, match='ETH/USDT: 1 bars differ'): store.append(other)
    with pytest.raises(DataError, match='differ'): store.append(twice)
    assert files() == before


def test_a_damaged_file_of_a_store(tmp_path):
    store = Store(tmp_path)
    store.append(bars())
    path = next(tmp_path.rglob('*.parquet'))
    whole = path.read_bytes()
    for damage in (b'', whole[:-9], b'PAR1' + bytes(400) + b'PAR1'):
        path.write_bytes(damage)
        with pytest.raises(DataError, match='is damaged'): store.read()
        with pytest.raises(DataError, match='is damaged'): store.append(bars(72))
    path.unlink()
    store.append(bars())
    pd.testing.assert_frame_equal(store.read(), bars())


WRITER = '''
import sys, pandas as pd
from cryptoml.data import Store
frame, store = pd.read_parquet(sys.argv[1]), Store(sys.argv[2])
print('ready', flush=True)
for i in range(int(sys.argv[3]), len(frame), int(sys.argv[4])):
    store.append(frame[i:i + 1])
    print(i, flush=True)
'''

def test_store_survives_kill(tmp_path):
    frame = bars(2000, ('BTC/USDT',))
    frame.to_parquet(tmp_path / 'all.parquet')
    rng = random.Random(0)
    store = Store(tmp_path / 'store')
    had = 0
    for _ in range(5):
        command = [sys.executable, '-c', WRITER, tmp_path / 'all.parquet', store.root, str(had), '1']
        writer = subprocess.Popen(command, stdout=subprocess.PIPE)
        for _ in range(3): writer.stdout.readline()     # ready, and two rows are in, however slow the machine
        time.sleep(rng.uniform(.05, .4))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        if store.symbols:
            now = store.read()
            assert len(now) >= had
            pd.testing.assert_frame_equal(now, frame[:len(now)])
            had = len(now)
    assert had >= 10
    store.append(frame)
    pd.testing.assert_frame_equal(store.read(), frame)


def test_two_writers_lose_nothing(tmp_path):
    frame = bars(60, ('BTC/USDT',))
    frame.to_parquet(tmp_path / 'all.parquet')
    command = [sys.executable, '-c', WRITER, tmp_path / 'all.parquet', tmp_path / 'store']
    writers = [subprocess.Popen([*command, start, '2'], stdout=subprocess.DEVNULL) for start in '01']
    assert [w.wait(60) for w in writers] == [0, 0]
    pd.testing.assert_frame_equal(Store(tmp_path / 'store').read(), frame)


@pytest.mark.parametrize('call', ['fsync', 'replace'])
def test_disk_that_fails(tmp_path, monkeypatch, call):
    store = Store(tmp_path)
    store.append(bars())
    def full(*_): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(os, call, full)
        with pytest.raises(OSError): store.append(bars(96))
    pd.testing.assert_frame_equal(store.read(), bars())
    assert store.append(bars(96)) == 96 and not list(tmp_path.rglob('*.tmp'))
