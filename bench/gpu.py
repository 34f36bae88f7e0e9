"""What a GPU makes of training and forecasts: `python bench/gpu.py [--folder FOLDER] [--sizes small,base]`

First its ceilings, as measured here: a product of square matrices in float32, TF32 and bfloat16, and the copy of a
large tensor. Then windows a second of the forecaster's network, a training step and a forecast, plain, with bfloat16
autocast, torch.compile and CUDA graphs, one by one and together; the share of the ceiling that its model FLOPs reach
(recomputation not counted), and the most memory. What cannot be had has the reason in its place. Writes gpu.md and
gpu.json into the folder. Without a GPU it says so; `--device cpu` runs all the same, small."""
import argparse, contextlib, json, platform, sys, time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cryptoml.network import SIZES, Network, NetworkConfig
from cryptoml.trainer import adamw
from cryptoml.windows import Windows

# What a panel of ten coins asks of it: the inputs of a real run, every bar of a year
PLENTY = dict(coins=10, inputs=200, bars=9000, dates=8, windows=2, every=36, product=8192, mb=1024, seconds=2.)
LITTLE = dict(coins=2, inputs=12, bars=600, dates=2, windows=2, every=4, product=64, mb=1, seconds=0.)   # on a CPU
HORIZONS = 4, 12, 24, 72
GROUP = 20       # Inputs that share a variable network, where a size has groups
ROUNDS = 5
NONE = 'no GPU'
VARIANTS = {     # Name to what it has
    'plain': (),
    'bf16': ('bf16',),
    'compile': ('compile',),
    'compile, bf16': ('compile', 'bf16'),
    'graph': ('graph',),
    'graph, bf16': ('graph', 'bf16'),
}

# ---- clocks

def wait(device):
    if device.type == 'cuda': torch.cuda.synchronize(device)

def seconds_of(work, device, least):
    "Median seconds of a call, over rounds that last `least` seconds or one call"
    for _ in range(3): work()
    wait(device)
    rounds = []
    for _ in range(ROUNDS):
        calls, begun = 0, time.perf_counter()
        while not calls or time.perf_counter() - begun < least / ROUNDS:
            work()
            calls += 1
            if calls % 8 == 0: wait(device)       # the queue is kept short, or the clock would see launches alone
        wait(device)
        rounds.append((time.perf_counter() - begun) / calls)
    return median(rounds)

# ---- ceilings

@contextlib.contextmanager
def precision(name):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try: yield
    finally: torch.set_float32_matmul_precision(before)

def product(device, kind, size, least):
    "TFLOP/s of a square product, or why there is none"
    if kind == 'tf32' and device.type != 'cuda': return NONE
    if kind == 'bf16' and device.type == 'cuda' and not has_bf16(): return 'not in hardware'
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16 if kind == 'bf16' else None) for _ in range(2))
    out = torch.empty_like(a)
    with precision('high' if kind == 'tf32' else 'highest'):
        return 2 * size ** 3 / seconds_of(lambda: torch.mm(a, b, out=out), device, least) / 1e12

def bandwidth(device, mb, least):
    "GB/s read and written by a copy, or why there is none: on a CPU it would be a cache's"
    if device.type != 'cuda': return NONE
    a = torch.empty(mb * 2 ** 20, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / seconds_of(lambda: b.copy_(a), device, least) / 1e9

def has_bf16(): return torch.cuda.is_bf16_supported(including_emulation=False)

def ceilings(device, setup):
    found = {kind: product(device, kind, setup['product'], setup['seconds']) for kind in ('fp32', 'tf32', 'bf16')}
    return found | dict(copy=bandwidth(device, setup['mb'], setup['seconds']))

# ---- network and panel

def config_of(size, inputs):
    groups = (GROUP,) * (inputs // GROUP) + ((inputs % GROUP,) if inputs % GROUP else ())
    return NetworkConfig(n_past=inputs, n_future=6, n_static=4, n_pair=2, horizons=HORIZONS,
                         groups=groups if size == 'small' else (), **SIZES[size])

def panel_of(c, coins, bars, device):
    "A panel of noise on the device, with every label"
    def noise(*shape): return torch.randn(coins, *shape)
    def label(n): return torch.randint(n, (coins, bars, H))
    H = len(c.horizons)
    labels = dict(
        direction=label(3), relative_direction=label(2), regime=label(4), relative=noise(bars, H),
        scaled=noise(bars, H), volatility=noise(bars, H), cost=torch.full((coins, bars, H), .05),
        path=noise(bars, c.steps), correlation=noise(bars, coins).tanh())
    months = bars // 720 + 1
    return Windows(
        past=noise(bars, c.n_past), future=torch.randn(bars + c.steps * c.stride, c.n_future - 1),
        static=noise(months, c.n_static), pairs=noise(coins, months, c.n_pair), month=torch.arange(bars) // 720,
        moves=.01 * noise(bars), usable=torch.ones(coins, bars, dtype=torch.bool), labels=labels, lookback=c.lookback,
        steps=c.steps, stride=c.stride, spans=(24, 72, 168)).to(device)

class Case:
    "A network, its panel, and the work whose speed is asked for"
    def __init__(self, size, setup, device):
        torch.manual_seed(0)
        self.device, self.setup, self.size = device, setup, size
        self.config = config_of(size, setup['inputs'])
        self.network = Network(self.config).to(device)
        self.panel = panel_of(self.config, setup['coins'], setup['bars'], device)
        first = torch.arange(setup['dates']) * 97 % (setup['bars'] - 300) + 200
        self.date = first.to(device)

    def batch(self, training):
        s = self.setup
        return self.panel.batch(self.date, *((s['windows'], s['every']) if training else ()))

    def windows(self, training):
        s = self.setup
        return s['dates'] * s['coins'] * (s['windows'] if training else 1)

    def autocast(self, has): return torch.autocast(self.device.type, torch.bfloat16, enabled='bf16' in has)

    def step(self, has, batch=None):
        "A training step as the trainer takes it; of a batch that is made in it, or of the one given"
        network = Network(self.config).to(self.device).train()
        optimizer = adamw(network, 1e-3, 1e-2)
        for group in optimizer.param_groups: group['capturable'] = 'graph' in has
        loss = compiled(network.loss, self.device) if 'compile' in has else network.loss
        def work():
            optimizer.zero_grad(set_to_none=True)
            with self.autocast(has): value, _ = loss(self.batch(True) if batch is None else batch)
            value.backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), 1.)
            if 'graph' not in has: (value + norm).isfinite().item()      # the trainer's one wait
            optimizer.step()
        return work

    def forecast(self, has, batch=None):
        network = self.network.eval()
        read = compiled(network.read, self.device) if 'compile' in has else network.read
        def work():
            with torch.no_grad(), self.autocast(has): read(self.batch(False) if batch is None else batch)
        return work

def compiled(f, device):
    "On a CPU only traced: its own code is not what is asked about, and takes minutes to make"
    return torch.compile(f, dynamic=False, **dict(backend='eager') if device.type == 'cpu' else {})

def captured(work):
    "One CUDA graph of all that a call launches"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3): work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): work()
    return graph.replay

# ---- model FLOPs

def lstm_flops(lstm, rows):
    "Of the way forward, for so many steps of all sequences together"
    width = lstm.hidden_size
    reads = [lstm.input_size, *[width] * (lstm.num_layers - 1)]
    return sum(2 * rows * 4 * width * (read + width) for read in reads)

def flops(case, training):
    "Of a step: products by torch's counter, which does not see LSTMs"
    seen = []
    def lstm(module, args, _): seen.append(lstm_flops(module, args[0].shape[0] * args[0].shape[1]))
    network = Network(replace(case.config, recompute=False)).to(case.device).train(training)
    for module in network.modules():
        if isinstance(module, nn.LSTM): module.register_forward_hook(lstm)
    with FlopCounterMode(display=False) as count, torch.set_grad_enabled(training):
        batch = case.batch(training)
        if training: network.loss(batch)[0].backward()
        else: network.read(batch)
    return count.get_total_flops() + sum(seen) * (3 if training else 1)

# ---- the table

def speed(case, what, has):
    "Windows a second and the most memory in MB, or why there are none"
    device, training = case.device, what == 'training'
    if 'graph' in has and device.type != 'cuda': return NONE
    if 'bf16' in has and device.type == 'cuda' and not has_bf16(): return 'no bf16 in hardware'
    try:
        batch = case.batch(training) if 'graph' in has else None       # its making allocates and copies from the host
        work = (case.step if training else case.forecast)(has, batch)
        if 'graph' in has: work = captured(work)
        if device.type == 'cuda': torch.cuda.reset_peak_memory_stats(device)
        rate = case.windows(training) / seconds_of(work, device, case.setup['seconds'])
    except Exception as e:       # a compiler or a driver that refuses: the table says so and goes on
        return f'{type(e).__name__}: {str(e).splitlines()[0][:80] if str(e) else ""}'
    return dict(rate=rate, mb=torch.cuda.max_memory_allocated(device) / 2 ** 20 if device.type == 'cuda' else None)

def rows_of(size, setup, device, ceiling):
    case = Case(size, setup, device)
    for what in ('training', 'forecast'):
        each = flops(case, what == 'training') / case.windows(what == 'training')
        for name, has in VARIANTS.items():
            row = dict(size=size, what=what, variant=name, flop=each)
            found = speed(case, what, has)
            if isinstance(found, str): yield row | dict(why=found)
            else:
                top = ceiling['bf16' if 'bf16' in has else 'fp32']
                share = None if isinstance(top, str) else found['rate'] * each / top / 1e12
                yield row | found | dict(share=share)
            torch.compiler.reset()

def about(device):
    versions = dict(python=platform.python_version(), torch=torch.__version__)
    if device.type != 'cuda': return versions | dict(device='cpu')
    p = torch.cuda.get_device_properties(device)
    return versions | dict(device=p.name, capability=f'{p.major}.{p.minor}', cuda=torch.version.cuda,
                           memory_gb=p.total_memory / 2 ** 30)

def number(x, form): return x if isinstance(x, str) else '' if x is None else format(x, form)

def table(found):
    "As markdown"
    about, ceiling = found['about'], found['ceilings']
    words = ', '.join(f'{k} {v:.1f}' if isinstance(v, float) else f'{k} {v}' for k, v in about.items())
    tops = ', '.join(f'{kind} {number(ceiling[kind], ".3g")}' for kind in ('fp32', 'tf32', 'bf16'))
    lines = [words, '', f'Products, TFLOP/s: {tops}; copy, GB/s: {number(ceiling["copy"], ".0f")}', '',
             '| size | | | windows/s | MFLOP a window | share of the ceiling | most memory, MB |',
             '|---|---|---|---|---|---|---|']
    for r in found['rows']:
        rate = r.get('why') or number(r['rate'], ',.0f')
        cells = [r['size'], r['what'], r['variant'], rate, number(r['flop'] / 1e6, ',.1f'),
                 number(r.get('share'), '.1%'), number(r.get('mb'), ',.0f')]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'

def measure(device, sizes, setup):
    ceiling = ceilings(device, setup)
    rows = [row for size in sizes for row in rows_of(size, setup, device, ceiling)]
    return dict(about=about(device), setup=setup, ceilings=ceiling, rows=rows)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', default=str(Path(__file__).parent), help='where gpu.md and gpu.json go')
    parser.add_argument('--device', default='cuda', choices=('cuda', 'cpu'))
    parser.add_argument('--sizes', default='small,base')
    a = parser.parse_args(argv)
    if a.device == 'cuda' and not torch.cuda.is_available():
        print('bench/gpu.py: torch finds no GPU here, so there is nothing to measure (--device cpu runs it small)')
        return 0
    device = torch.device(a.device)
    found = measure(device, a.sizes.split(','), PLENTY if a.device == 'cuda' else LITTLE)
    text = table(found)
    print(text)
    folder = Path(a.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'gpu.json').write_text(json.dumps(found, indent=1) + '\n')
    (folder/'gpu.md').write_text(text)
    return 0


if __name__ == '__main__': sys.exit(main())
