"The way to a GPU, without one: what is refused, what may not wait or mix devices, the benchmark at a tiny size"
import importlib.util, json
from pathlib import Path

import pytest, torch
from torch.utils.flop_counter import FlopCounterMode

from cryptoml import trainer
from cryptoml.parameters import JobError
from cryptoml.runs import plan
from cryptoml.network import Network
from cryptoml.trainer import TrainConfig, UltimateTrainer, to_device
from cryptoml.windows import Windows

@pytest.fixture(scope='module')
def bench():
    path = Path(__file__).parents[1]/'bench'/'gpu.py'
    spec = importlib.util.spec_from_file_location('bench_gpu', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

none_here = pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has a GPU')

@none_here
def test_a_gpu_that_is_not_there_is_a_sentence(tmp_path, bench, capsys):
    with pytest.raises(JobError, match="^device 'cuda' is not there, this machine has 0 CUDA devices: use 'auto'$"):
        plan('train', tmp_path/'run', dict(device='cuda', size='base'))
    assert not (tmp_path/'run').exists()
    assert bench.main(['--folder', str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 and list(tmp_path.iterdir()) == []

@pytest.mark.parametrize('size', ['small', 'base'])
def test_a_step_and_a_forecast_mix_no_devices_and_wait_for_none(bench, size):
    "On torch's device without values: what is of another device, or must be looked at, is an error"
    c, D = bench.config_of(size, 24), 2
    meta = torch.device('meta')
    panel = bench.panel_of(c, 2, 400, meta)
    assert isinstance(panel, Windows)
    network = Network(c).to(meta).train()
    date = torch.arange(D).to(meta)
    loss, parts = network.loss(panel.batch(date, 2, 6))
    loss.backward()
    assert {p.grad.device for p in network.parameters() if p.grad is not None} == {meta}
    assert {v.device for v in (loss, *parts.values())} == {meta}
    with torch.no_grad(): read = network.eval().read(panel.batch(date))
    assert {v.device for v in read.values()} == {meta} and len(read['direction']) == D * 2
    with pytest.raises(RuntimeError): loss.item()

def test_what_leaves_a_gpu_is_waited_for():
    waits = []
    class Watched(torch.Tensor):
        def to(self, *args, non_blocking=False):
            waits.append(non_blocking)
            return self
    x = torch.ones(2).as_subclass(Watched)
    to_device(x, torch.device('cpu'))
    to_device(x, torch.device('cuda'))
    assert waits == [False, True]

@pytest.mark.parametrize('has, word', [(True, 'bfloat16'), (False, 'float32')])
def test_autocast_is_for_hardware_that_has_it(tmp_path, monkeypatch, has, word):
    monkeypatch.setattr(trainer, 'mixed', lambda device: has)
    seen = []
    def loss(m, x):
        seen.append(str(m(x).dtype).removeprefix('torch.'))
        return m(x).float().square().mean()
    x = torch.ones(4, 2)
    UltimateTrainer(torch.nn.Linear(2, 1), TrainConfig(epochs=1, amp=True), tmp_path, 'cpu').fit(
        lambda *_: [x], loss, lambda m: dict(loss=m(x).mean()))
    assert seen == [word]

def test_the_benchmark_at_a_tiny_size(tmp_path, bench, monkeypatch):
    "All but compilation, which is tried once"
    monkeypatch.setattr(bench, 'VARIANTS', {k: has for k, has in bench.VARIANTS.items() if 'compile' not in has})
    monkeypatch.setattr(bench, 'ROUNDS', 1)
    assert bench.main(['--device', 'cpu', '--sizes', 'small', '--folder', str(tmp_path)]) == 0
    found = json.loads((tmp_path/'gpu.json').read_text())
    assert found['ceilings']['fp32'] > 0 and found['ceilings']['copy'] == found['ceilings']['tf32'] == 'no GPU'
    rows = {(r['what'], r['variant']): r for r in found['rows']}
    assert {k for k, r in rows.items() if r.get('rate', 0) > 0} == {(w, v) for w in ('training', 'forecast')
                                                                    for v in ('plain', 'bf16')}
    assert all(r['why'] == 'no GPU' for (_, v), r in rows.items() if 'graph' in v)
    assert rows['training', 'plain']['flop'] > rows['forecast', 'plain']['flop'] > 0
    page = (tmp_path/'gpu.md').read_text()
    assert '| small | training | graph | no GPU |' in page and page.count('\n|') == len(rows) + 2
    case = bench.Case('small', bench.LITTLE, torch.device('cpu'))
    assert bench.speed(case, 'forecast', ('compile',))['rate'] > 0
    assert bench.bandwidth(torch.device('cpu'), 1, 0) == 'no GPU'

def test_the_flops_of_an_lstm(bench):
    "As torch counts the same products of linear maps"
    lstm = torch.nn.LSTM(5, 7, 2)
    with FlopCounterMode(display=False) as count:
        for inputs in (5, 7):
            torch.nn.Linear(inputs, 4 * 7)(torch.ones(30, inputs))
            torch.nn.Linear(7, 4 * 7)(torch.ones(30, 7))
    assert bench.lstm_flops(lstm, 30) == count.get_total_flops()
