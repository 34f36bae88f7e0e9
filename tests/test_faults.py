"""kill -9 at random moments of save, train and live, and what thousands of predictions leave behind (suites 4, 10)

The suite tries some of each; `make faults` tries many: `CRYPTOML_KILLS` moments, `CRYPTOML_SLOPES` predictions.
"""
import copy, gc, itertools, json, os, random, shutil, signal, threading, time, warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest, torch

from conftest import ended, forked, resident
from examples import near
from cryptoml.feeds import Health
from cryptoml.integration import BOOK, UltimateTradingAI, kept_bars, kept_decision
from cryptoml.ledger import read_ledger
from cryptoml.parity import CLOSE, differing, parity
from cryptoml.answers import say
from cryptoml.live import Live, Settings
from cryptoml.monitor import Journal
from cryptoml.settings import log
from cryptoml.simulate import simulate
from cryptoml.state import generations, read_json, read_lines
from test_newest import model_of

KILLS = int(os.environ.get('CRYPTOML_KILLS', 20))
OF_TRAIN, OF_LIVE = max(2, KILLS // 20), max(4, KILLS // 5)
OF_SAVE = KILLS - OF_TRAIN - OF_LIVE

PREDICTIONS = int(os.environ.get('CRYPTOML_SLOPES', 150))
REFITS = max(3, PREDICTIONS // 200)          # 50 for 10,000
WARM_UP = max(300, PREDICTIONS // 10)
MOST = 1 if PREDICTIONS >= 1000 else 5         # MB per 1,000 predictions and per refit: of a few no more can be told

H = pd.Timedelta('1h')
SMALL = dict(size='small', horizons=[4, 12], fresh=False)

pytestmark = pytest.mark.usefixtures('one_thread')
unix = pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks and signals of Unix')
proc = pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='reads sizes, threads and handles from /proc')

class World:
    "A model that nobody has trained, its bars, and the close after which they are news to it"
    def __init__(self):
        hours = max(WARM_UP + 3 * PREDICTIONS, 10 * KILLS)
        self.model, self.bars, self.now = model_of(2, later=hours)

    def until(self, now): return self.bars[self.bars['time'] < now]

    def between(self, start, end):
        "Bars that open from a time on and have closed at another"
        return self.bars[(self.bars['time'] >= start) & (self.bars['time'] + H <= end)]

    def ai(self, place):
        "The model in an object of its own"
        ai = opened(place)
        ai.snapshot = copy.deepcopy(self.model)
        return ai

    def saved(self, place) -> dict:
        "The model in a folder, as the first that a process was killed at tells of it"
        ai = self.ai(place)
        other_weights(ai, 0)
        said = ai.predict_sync(self.until(self.now), now=self.now)
        ai.save_state()
        return dict(begun=0, name=ai.model_name(), said=plain(said))

@pytest.fixture(scope='module')
def world(): return World()

def opened(place): return UltimateTradingAI(dict(act_on='FAIL', state_dir=str(place)), device='cpu')

def loaded(place):
    "What a folder gives, without falling back"
    ai = opened(place)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ai.load_state()
    return ai

def plain(x):
    "As it comes out of a file"
    return json.loads(json.dumps(x))

# ---- suite 4: kills

class Child:
    "A process that does something and tells of it in lines, until it is killed"
    def __init__(self, act):
        r, w = os.pipe()
        def child():
            os.close(r)
            log.setLevel('ERROR')
            act(lambda **line: os.write(w, json.dumps(line).encode() + b'\n'))
        self.pid = forked(child)
        os.close(w)
        self.pipe, self.lines = open(r, 'rb'), []

    def line(self):
        "The next line that it tells; None once it has ended"
        told = self.pipe.readline()
        if not told.endswith(b'\n'): return None
        self.lines.append(json.loads(told))
        return self.lines[-1]

    def until(self, n, key):
        "Wait until it has told so many lines with this in them"
        for _ in range(n):
            while (line := self.line()) and key not in line: pass
        assert line, 'it ended by itself'

    def end(self) -> int:
        "Wait for its end; gives its exit code"
        while self.line(): pass
        self.pipe.close()
        return ended(self.pid)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        assert self.end() == -signal.SIGKILL

class Moments:
    "Seeded random moments within something that takes as long as it took before"
    def __init__(self, seed, took):
        self.random, self.took = random.Random(seed), [took]

    def sleep(self, share=1.2): time.sleep(self.random.uniform(0, share * float(np.median(self.took))))

def quiet(caplog):
    "Nothing that was read since the last time had to be begun anew"
    said = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
    caplog.clear()
    return said == []

def other_weights(ai, seed):
    "The same model after some training, as far as a state is concerned"
    s = ai.live()
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in s.forecaster.first.network.parameters(): p += .01 * torch.randn_like(p)
    ai.snapshot = replace(s, terms=replace(s.terms, data=dict(seed=seed)))

def saving(world, place, first, tell):
    "Hour by hour other weights, a forecast, a step of the book and a save, from what is in the folder on"
    ai = loaded(place)
    kept = kept_bars(place, ai.model_name())
    heard = world.bars['time'].min() if kept is None else kept['time'].max() + H
    for k in itertools.count(first):
        now = world.now + k * H
        other_weights(ai, k)
        said = ai.predict_sync(world.between(heard, now), now=now)
        assert not any(p['faults'] for p in said.values())
        ai.next_weights({}, 1., now=now)
        tell(begun=k, name=ai.model_name(), said=said)
        began, heard = time.monotonic(), now
        ai.save_state()
        tell(saved=k, took=time.monotonic() - began)

def whole(world, place, told, caplog):
    "The one generation that a folder gives, with its bars and its book; and whether its bars are there"
    ai = loaded(place)
    live = told[ai.model_name()]
    assert ai.live().terms.data['seed'] == live['begun']
    now = world.now + live['begun'] * H
    kept = kept_bars(place, ai.model_name())
    if kept is not None:
        there = world.between(kept['time'].min(), now)
        def ordered(bars): return bars[list(there)].sort_values(['symbol', 'time'], ignore_index=True)
        pd.testing.assert_frame_equal(ordered(kept), ordered(there), check_dtype=False)
    given = world.until(now) if kept is None else world.between(now - H, now)
    assert near(plain(ai.predict_sync(given, now=now)), live['said'])
    if (place/BOOK).exists():
        assert read_json(place/BOOK)['model'] in (*told, None)
        assert kept_decision(place, ai.live()) is not None
    assert quiet(caplog)
    return live['begun'], kept is not None

@unix
def test_killed_while_saving(world, tmp_path, caplog):
    "One whole generation, the old one or the new one, says what it said; and the same command goes on"
    moments, found = Moments(0, .1), Counter()
    first = world.saved(tmp_path)
    told, on_disk, last, complete = {first['name']: first}, 0, 0, {0}
    for _ in range(OF_SAVE):
        child = Child(lambda tell: saving(world, tmp_path, last + 1, tell))
        child.until(moments.random.choice((1, 1, 2)), 'begun')
        moments.sleep()
        child.kill()
        begun = {x['name']: x for x in child.lines if 'begun' in x}
        saved = [x for x in child.lines if 'saved' in x]
        told |= begun
        moments.took += [x['took'] for x in saved]
        on_disk, last = ([on_disk] + [x['saved'] for x in saved])[-1], list(begun.values())[-1]['begun']
        complete |= {x['saved'] for x in saved}
        live, bars = whole(world, tmp_path, told, caplog)
        assert live in (on_disk, last)
        assert bars or live not in complete
        found['old' if live != last else 'saved' if live == on_disk else 'new' if bars else 'new, bars missing'] += 1
        on_disk = live
        if bars: complete.add(live)
    print(f'\n{OF_SAVE} kills while saving: {dict(found)}; {last} hours')
    assert (tmp_path/BOOK).exists() and found['old'] and last > found['old']
    for left in tmp_path.glob('.book*'): os.utime(left, (0, 0))           # long ago, so that nobody writes it
    ai = loaded(tmp_path)
    ai.save_state()
    assert len(generations(tmp_path)) == 3 and not list(tmp_path.rglob('.*'))

def test_a_decision_of_weights_that_were_never_saved(world, tmp_path):
    "Killed between a decision and its save: the model before is loaded with another's book, and can be saved"
    world.saved(tmp_path)
    ai = loaded(tmp_path)
    other_weights(ai, 1)
    for k in range(1, 9):
        now = world.now + k * H
        ai.predict_sync(world.between(now - H, now), now=now)
        ai.next_weights({}, 1., now=now)
    assert read_json(tmp_path/BOOK)['model'] == ai.model_name()
    before = loaded(tmp_path)
    assert before.model_name() != ai.model_name()
    before.save_state()
    assert loaded(tmp_path).model_name() == before.model_name()

class Heard:
    "In place of a feed: what an exchange would give, all of it at first and then what is new"
    def __init__(self, world):
        self.world, self.end = world, None
        self.health = {k: Health(k) for k in world.model.terms.symbols}

    def history(self, bars, now):
        self.end = now.floor(H)
        return self.world.between(self.end - bars * H, self.end)

    def newest(self, now, deadline):
        start, self.end = self.end, now.floor(H)
        return self.world.between(start, self.end)

def loop_at(world, place, folder, at, tell=None):
    "A loop by a clock that goes from hour to hour, and tells so"
    at, began = [at], [time.monotonic()]
    def sleep(seconds):
        at[0] += H
        if tell: tell(now=str(at[0]), took=time.monotonic() - began[0])
        began[0] = time.monotonic()
    settings = Settings(str(place), 'FAIL', 0., equity=1000., grace=0.)
    return Live(loaded(place), Heard(world), folder, settings, lambda: at[0], sleep, lambda line: None)

def as_it_said(place, journal, k):
    "A fresh model says of the bars of an entry what the entry says, but for intervals, which learn"
    entry = journal.entries()[k]
    again = say(loaded(place), journal.bars_at(k), entry.now, 0.)
    for symbol, said in entry.said.items():
        far = {name for name, x in differing(said, again[symbol]).items() if x > CLOSE}
        assert not far - {'prediction intervals'}, far

@unix
def test_killed_while_following(world, tmp_path, caplog):
    "Model, book, journal, account whole after each kill; in the end the account of a loop that nobody killed"
    place, calm, folder = tmp_path/'state', tmp_path/'calm', tmp_path/'loop'
    name = world.saved(place)['name']
    shutil.copytree(place, calm)
    alone = loop_at(world, calm, tmp_path/'alone', world.now)
    alone.run(1)                                                   # what is compiled once is compiled now
    moments, now = Moments(1, .2), world.now
    for _ in range(OF_LIVE):
        child = Child(lambda tell: loop_at(world, place, folder, now, tell).run())
        child.until(moments.random.choice((1, 2)), 'now')
        moments.sleep()
        child.kill()
        moments.took += [x['took'] for x in child.lines[1:]]    # the first bar of a process takes longer
        now = pd.Timestamp(child.lines[-1]['now'])
        ai, journal = loaded(place), Journal(folder/'journal')
        assert ai.model_name() == name
        written = {x.now for x in journal.entries()}
        assert written >= set(pd.date_range(world.now, now, freq=H, inclusive='left')) and max(written) <= now
        as_it_said(place, journal, len(written) - 1)
        for lines in ('signals', 'equity', 'sessions'): assert read_lines(folder/f'{lines}.jsonl')
        assert read_lines(folder/'faults.jsonl') == []
        assert pd.Timestamp(read_json(folder/'account.json')['decided']) in (now - H, now)
        if (place/BOOK).exists(): assert kept_decision(place, ai.live()).model is ai.live()
        assert quiet(caplog)
    loop = loop_at(world, place, folder, now)
    loop.run(2)
    alone.run((loop.clock() - world.now) // H)
    assert near(loop.account.now, alone.account.now) and alone.account.now['traded'] > 0
    assert near(read_json(place/BOOK), read_json(calm/BOOK))
    found = parity(folder)
    print(f'\n{OF_LIVE} kills in {(now - world.now) // H} bars, parity {found}')
    assert (found['different'], found['lost']) == (0, 0)

def training(place, bars, tell):
    "A training and its save"
    ai = UltimateTradingAI(SMALL | dict(state_dir=str(place)), device='cpu')
    ai.train_sync(bars, epochs=2)
    ai.save_state()
    tell(name=ai.model_name())

@unix
def test_killed_while_training(world, tmp_path, ledger, monkeypatch, caplog):
    "The model before stays whole and says what it said; the training goes on to the weights of one that nobody killed"
    monkeypatch.setattr('cryptoml.training.importance', without_importance)
    bars = simulate(n_symbols=1, n_bars=2500, seed=5).bars
    expected = []
    began = time.monotonic()
    training(tmp_path/'calm', bars, lambda name: expected.append(name))
    moments, kills, ends = Moments(2, time.monotonic() - began), 0, 0
    while kills < OF_TRAIN:
        place = tmp_path/str(ends)
        if not place.exists(): before = world.saved(place)
        child = Child(lambda tell: training(place, bars, tell))
        moments.sleep(.7)
        os.kill(child.pid, signal.SIGKILL)
        code = child.end()
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        ai = loaded(place)
        if ai.model_name() == expected[0]: ends += 1
        else: assert code and whole(world, place, {before['name']: before}, caplog) == (0, True)
        assert read_ledger().faults == [] and quiet(caplog)
    if ai.model_name() != expected[0]:
        training(place, bars, lambda name: expected.append(name))
        assert expected[0] == expected[1]
    print(f'\n{kills} kills while training, {ends} ends between them')

# ---- suite 10: what stays behind

def left():
    "Handles, threads and children of this process, once the checks that run beside it are done"
    for t in threading.enumerate():
        if t.name == 'cryptoml check': t.join()
    tasks = list(Path('/proc/self/task').iterdir())
    children = [pid for t in tasks for pid in (t/'children').read_text().split()]
    return dict(handles=len(os.listdir('/proc/self/fd')), threads=len(tasks), children=len(children))

def goes_back_to(before):
    "Wait for what ends by itself: a thread that was joined is gone a little later"
    for _ in range(1000):
        if left() == before: return True
        time.sleep(.01)
    return False

def slope(sizes):
    "Growth in MB a call"
    return np.polyfit(np.arange(len(sizes)), np.array(sizes) / 2**20, 1)[0]

@proc
def test_predictions_leave_nothing_behind(world):
    "Hour by hour, a prediction of two coins and a signal of each; the best of three: what leaks, leaks in each"
    ai = world.ai('unused')
    ai.predict_sync(world.until(world.now), now=world.now)
    hours = iter(world.bars[world.bars['time'] >= world.now].groupby('time'))
    def follow(n):
        sizes = []
        for _ in range(n):
            opened, hour = next(hours)
            found = ai.predict_sync(hour, now=opened + H)
            for symbol in found: ai.get_trading_signal(symbol, 0., opened + H)
            sizes.append(resident())
        assert not any(p['faults'] for p in found.values())
        return 1000 * slope(sizes)
    follow(WARM_UP)
    before, slopes = left(), []
    while len(slopes) < 3 and min(slopes, default=np.inf) >= MOST: slopes.append(follow(PREDICTIONS))
    slopes = np.round(slopes, 2).tolist()
    assert goes_back_to(before), f'{left()}, before: {before}'
    print(f'\n{PREDICTIONS} predictions after {WARM_UP}: {slopes} MB per 1,000, {resident() >> 20} MB, {left()}')
    assert min(slopes) < MOST, f'{slopes} MB per 1,000 predictions'

@proc
def test_refits_leave_nothing_behind(tmp_path, monkeypatch):
    "Trained and saved again and again, on data that end an hour later each time"
    monkeypatch.setattr('cryptoml.training.importance', without_importance)
    bars = simulate(n_symbols=1, n_bars=2500 + REFITS, seed=5).bars
    ai = UltimateTradingAI(dict(size='small', horizons=[4, 12], state_dir=str(tmp_path), fresh=False), device='cpu')
    sizes, lefts = [], []
    for t in bars['time'].iloc[2500:]:
        ai.train_sync(bars[bars['time'] < t], epochs=1)
        ai.save_state()
        gc.collect()
        sizes.append(resident())
        lefts.append(left())
    warm = REFITS // 3
    megabytes = np.array(sizes) // 2**20
    print(f'\n{REFITS} refits: {slope(sizes[warm:]):.2f} MB each, {megabytes} MB, {lefts[-1]}')
    assert goes_back_to(lefts[warm]), f'{left()}, before: {lefts[warm]}'
    assert not list((tmp_path/'training').glob('*/*.safetensors'))
    assert slope(sizes[warm:]) < MOST, f'{np.array(sizes) / 2**20} MB'

def without_importance(forecaster, *rest):
    "In place of the importance of every input, which takes most of the time of so short a training"
    return pd.Series(0., forecaster.names)
