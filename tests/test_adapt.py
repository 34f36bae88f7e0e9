"""Newer weights behind a guard: what candidates see, who is accepted, what follows, what is left behind

Suites 1, 4, 10, 11, 14
"""
import asyncio, gc, os, random, signal, threading, time
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest

from conftest import ended, forked, resident
from cryptoml import adapt as adapt_module
from cryptoml.adapt import (ALPHA, LIVE, WAYS, Task, adapt, better, cases_of, dearest, judged_places, material,
                            relative_losses, terms_after, winner)
from cryptoml.boosting import NoTrees
from cryptoml.combined import decisions, find
from cryptoml.data import DataError, to_panel
from cryptoml.forecaster import ForecasterConfig, make_inputs, split
from cryptoml.gate import Declared
from cryptoml.integration import UltimateTradingAI
from cryptoml.parameters import JobError
from cryptoml.runs import run
from cryptoml.ledger import read_ledger
from cryptoml.newest import Snapshot
from cryptoml.simulate import simulate
from cryptoml.state import StateError, generations, read_lines
from cryptoml.terms import Terms
from cryptoml.nested import cut_off
from cryptoml.targets import make_targets
from cryptoml.trainer import TrainerError
from cryptoml.metrics import nll

pytestmark = pytest.mark.usefixtures('one_thread', 'ledger')
DAY = 24
QUICK = {k: WAYS[k] for k in ('members', 'few')}
MARKET = simulate(n_symbols=2, n_bars=DAY * 340, seed=5, signal=3)
PANEL = to_panel(MARKET.bars)

@pytest.fixture(autouse=True)
def few_old_decisions(monkeypatch): monkeypatch.setattr(adapt_module, 'OLD', 400)   # what takes the time here

def turned(begin, end):
    "The columns that lead prices, their signs turned between two times"
    leading = [c for c in MARKET.extra if c.startswith('driver')]
    rows = (MARKET.extra.time >= begin) & (MARKET.extra.time < end)
    return MARKET.extra.assign(**{c: MARKET.extra[c].where(~rows, -MARKET.extra[c]) for c in leading})

@pytest.fixture(scope='module')
def live(tmp_path_factory):
    "A small model of the first months, and its terms"
    panel = cut_off(PANEL, DAY * 250)
    config = ForecasterConfig((4, 12), epochs=2, every=24)
    inputs, targets = make_inputs(panel, MARKET.extra), make_targets(panel, config.horizons)
    parts = split(panel, targets)
    found = find(inputs, targets, parts, config, tmp_path_factory.mktemp('live'), 'cpu')
    terms = Terms(panel.symbols, '60m', str(targets.known[parts['train']].max()), '', config.round_trip, None, {}, {},
                  'PASS', {}, {}, rates=[list(rates) for rates in found.rates])
    return replace(found.model, blend=found.blend), terms

@pytest.fixture(scope='module')
def m(live): return material(*live, PANEL, MARKET.extra, '20D')

@pytest.fixture(scope='module')
def shift(live):
    end = PANEL.time[-1] + PANEL.timeframe
    return material(*live, PANEL, turned(pd.Timestamp(live[1].trained_until), end), '20D')

def weights(c):
    "Everything that a forecast is made with"
    arrays = [v.detach().numpy() for f in c.networks for v in f.network.state_dict().values()]
    lines = [w for name in sorted(c.members) for w in getattr(c.members[name], 'weights', {}).values()]
    return b''.join(np.ascontiguousarray(v).tobytes() for v in arrays + lines)

# ---- the spans

def test_no_label_that_judges_was_known_before(m, live):
    close = PANEL.time + PANEL.timeframe
    begin = close[m.judge].min()
    for rows in (m.old, m.new): assert (m.targets.known[rows] < begin).all()
    assert not (m.old & m.new).any() and not (m.learnt & m.judge).any()
    assert (m.targets.known[m.old] <= pd.Timestamp(live[1].trained_until)).all()
    assert (close[m.judge] > pd.Timestamp(live[1].trained_until)).all()
    assert (m.targets.t1[m.judge][:, m.places] < len(close)).all()        # every judged label is there

def test_candidates_do_not_see_what_judges(m, live, tmp_path, monkeypatch):
    "Other prices and columns from the first judged bar on: the same candidates, to the bit"
    for name in ('MOST', 'ASIDE'): monkeypatch.setattr(adapt_module, name, 4)
    first = int(np.flatnonzero(m.judge)[0])
    rng = np.random.default_rng(0)
    values = PANEL.values.copy()
    values[:, first + 1:] *= rng.lognormal(0, .1, values[:, first + 1:].shape)
    later = MARKET.extra.time > PANEL.time[first]
    numbers = [c for c in MARKET.extra if c not in ('time', 'known', 'symbol')]
    extra = MARKET.extra.copy()
    extra.loc[later, numbers] = rng.normal(size=(later.sum(), len(numbers)))
    other = material(*live, replace(PANEL, values=values), extra, '20D')
    assert not np.array_equal(other.inputs.x, m.inputs.x, equal_nan=True)
    def made(m, name): return WAYS[name].make(Task(live[0], m, m.learnt, m.new, live[1].rates, tmp_path))
    for name in ('members', 'few', 'EWC'): assert weights(made(m, name)) == weights(made(other, name)), name

def test_horizons_that_the_days_can_tell():
    targets = make_targets(PANEL, (4, 24, 72))
    def places(days): return judged_places(targets, PANEL.timeframe, pd.Timedelta(days=days))
    assert [places(d) for d in (20, 39, 40, 119, 120)] == [[0], [0], [0, 1], [0, 1], [0, 1, 2]]
    with pytest.raises(DataError, match='19 days cannot judge a forecast over 4 bars: give 20'): places(19)

REFUSED = [
    (dict(until=PANEL.time[-1] - pd.Timedelta('30D')),
     'days came since to learn from, before the 20 that judge, 14 are needed; there will be enough on 2022-12-1'),
    (dict(until=PANEL.time[200]), 'give the history that it was trained on'),
    (dict(symbols=['BTC/USDT', 'DOGE/USDT']), 'no bars of DOGE/USDT'),
    (dict(timeframe='240m'), 'the model is of 240m'),
]

@pytest.mark.parametrize('change,words', REFUSED, ids=['too soon', 'no history', 'a coin', 'length of a bar'])
def test_what_cannot_be_adapted_with(live, change, words):
    change = {('trained_until' if k == 'until' else k): str(v) if k == 'until' else v for k, v in change.items()}
    terms = replace(live[1], **change)
    with pytest.raises(DataError, match=words): material(live[0], terms, PANEL, MARKET.extra, '20D')

# ---- the guard, from losses alone

def drawn(gains, looks=1, days=40, noise=.01, seed=0, costs=None):
    "Cases of candidates whose losses are lower by known shares; those whose name begins with p are plain"
    rng, day = np.random.default_rng(seed), np.repeat(np.arange(days), 18)
    for _ in range(looks):
        now = {LIVE: 1 + .3 * rng.normal(size=len(day))}
        for k, gain in gains.items():
            moved = noise * rng.normal(size=days)[day] + .05 * rng.normal(size=len(day))
            now[k] = now[LIVE] * (1 - gain) + moved
        then = {k: np.full(400, 1 + (costs or {}).get(k, 0.)) for k in now}
        yield cases_of(now, day, 1., then, np.arange(400) % 4, {k for k in gains if k[0] == 'p'})

def test_a_useless_candidate_passes_as_seldom_as_it_says():
    looks = list(drawn(dict(p=0., q=0., r=0.), looks=300))
    passed = np.mean([winner(cases) is not None for cases in looks])
    assert passed < ALPHA + 3 * np.sqrt(ALPHA * (1 - ALPHA) / 300)

def test_what_is_clearly_better_passes():
    assert np.mean([winner(cases) == 'p' for cases in drawn(dict(p=.02, q=0.), looks=50)]) > .9

def test_it_must_beat_the_plain_ways_too():
    equals = [winner(cases) for cases in drawn(dict(p=.05, q=.05), looks=300)]
    assert np.mean([k == 'q' for k in equals]) < ALPHA + 3 * np.sqrt(ALPHA * (1 - ALPHA) / 300)
    assert np.mean([k == 'p' for k in equals]) > .85
    assert np.mean([winner(cases) == 'q' for cases in drawn(dict(p=.05, q=.1), looks=50)]) > .9

def test_old_regimes_must_not_pay_for_it():
    cases, = drawn(dict(p=.05, q=.1), costs=dict(p=.12, q=.05))
    named = {c.name: c for c in cases}
    assert named['p'].why.startswith('too dear for') and '+12.0%, limit 10%' in named['p'].why
    assert winner(cases) == 'q'              # a plain way that cannot be borne is no rival
    dear, = drawn(dict(p=.05), costs=dict(p=.12))
    assert winner(dear) is None

def test_a_regime_of_few_decisions_says_nothing():
    losses = {LIVE: np.ones(150), 'p': np.where(np.arange(150) < 50, 2, 1.1)}
    cost, where = dearest(losses, 'p', np.where(np.arange(150) < 50, 0, 1))
    assert (round(cost, 6), where) == (.1, 'BEAR')
    assert dearest(losses, 'p', np.full(150, -1)) == (0., '')

def test_days_too_few_or_no_numbers_are_no_proof():
    day = np.repeat(np.arange(19), 6)
    assert better(np.zeros(len(day)), np.ones(len(day)), day, .5) == 1.
    lost = {LIVE: np.ones(720), 'p': np.full(720, np.nan)}
    with pytest.raises(DataError, match='no judged decision'):
        cases_of(lost, np.repeat(np.arange(40), 18), .5, {k: v[:1] for k, v in lost.items()}, np.array([0]), {'p'})

# ---- end to end

def test_losses_are_in_units_of_the_live_model(m, live):
    "Against the scores of the verdict, target by target"
    sample = decisions(live[0].first, m.inputs, m.judge)
    only = relative_losses({LIVE: live[0]}, m, sample, [0])[LIVE]
    assert abs(np.nanmean(only) - 1) < 1e-6
    p = live[0].forecast(m.inputs, m.targets.sigma, sample)['direction'][:, 0]
    y = sample.of(m.targets['direction'])[:, 0]
    there = (y >= 0) & np.isfinite(only)
    loss = nll(y[there], p[there])
    assert np.corrcoef(loss, only[there])[0, 1] > .2     # one of four parts

def test_a_shift_is_learnt_and_what_follows(live, shift, tmp_path):
    model, terms = live
    before = weights(model)
    found = adapt(model, terms, shift, tmp_path, QUICK)
    assert found.accepted == 'members' and weights(model) == before
    assert pd.Timestamp(found.terms.trained_until) > pd.Timestamp(terms.trained_until)
    assert found.terms.trained_until == shift.targets.known[shift.known].max().isoformat()
    assert found.terms.verdict == 'PASS'                 # the judged recipe, on more bars
    assert found.model.bands is not model.bands and found.model.familiar is not model.familiar
    assert {t.name for t in read_ledger().trials} == {'adapt: members', 'adapt: few'}
    assert f'members {found.cases[[c.name for c in found.cases].index("members")].gain:+.2%}: accepted' in found.reason
    again = adapt(model, terms, shift, tmp_path, QUICK)
    assert weights(again.model) == weights(found.model)                   # suite 11
    assert read_ledger().tried(np.arange(19_000, 19_400), np.linspace(-.01, .01, 400)).count == 3   # no trial twice

def test_as_it_was_judged(live, shift, tmp_path):
    found = adapt(*live, shift, tmp_path, QUICK, fresh=False)
    assert found.terms.trained_until == shift.targets.known[shift.learnt].max().isoformat()

def test_the_plainest_rival_is_always_there(live, shift, tmp_path):
    found = adapt(*live, shift, tmp_path, {'few': WAYS['few']}, fresh=False)
    assert {c.name for c in found.cases} == {'members', 'few'} and found.accepted == 'members'

@pytest.mark.parametrize('word,way,after', [
    ('PASS', 'few', 'INCONCLUSIVE'), ('PASS', 'EWC', 'INCONCLUSIVE'), ('PASS', 'everything', 'PASS'),
    ('FAIL', 'EWC', 'FAIL'), ('INCONCLUSIVE', 'few', 'INCONCLUSIVE')])
def test_another_recipe_is_not_what_was_judged(live, m, word, way, after):
    assert terms_after(replace(live[1], verdict=word), WAYS[way], m, m.known).verdict == after

@pytest.mark.parametrize('poison', ['turned', 'times 100'])
def test_a_bad_batch_is_refused(live, poison, tmp_path, monkeypatch):
    "Columns that are wrong between the training and the judged days, and right in them"
    for name in ('MOST', 'ASIDE'): monkeypatch.setattr(adapt_module, name, 20)
    since, end = pd.Timestamp(live[1].trained_until), PANEL.time[-1] - pd.Timedelta('22D')
    extra, leading = turned(since, end), [c for c in MARKET.extra if c.startswith('driver')]
    rows = (extra.time >= since) & (extra.time < end)
    if poison == 'times 100': extra.loc[rows, leading] *= 100
    bad = material(*live, PANEL, extra, '20D')
    found = adapt(*live, bad, tmp_path, QUICK | {'EWC': WAYS['EWC']} if poison == 'turned' else QUICK)
    assert found.accepted is None and found.model is live[0] and found.terms is live[1]
    assert 'the live model stays' in found.reason and all(c.why for c in found.cases)

def test_a_way_that_cannot_be_gone(live, m, tmp_path):
    found = adapt(live[0], replace(live[1], rates=[]), m, tmp_path, {k: WAYS[k] for k in ('members', 'everything')})
    assert list(found.absent) == ['everything'] and 'an earlier version' in found.reason

def test_no_way_can_be_gone(live, m, tmp_path, monkeypatch):
    "As where trees cannot be grown: the live model stays, and why is told"
    def none(t): raise NoTrees('lightgbm cannot be loaded')
    for name in QUICK: monkeypatch.setitem(WAYS, name, WAYS[name]._replace(make=none))
    found = adapt(*live, m, tmp_path, {k: WAYS[k] for k in QUICK})
    assert found.accepted is None and found.model is live[0] and len(found.table()) == 0
    assert found.reason.endswith('members could not be tried: lightgbm cannot be loaded; '
                                 'few could not be tried: lightgbm cannot be loaded')

def test_stopped(live, m, tmp_path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(TrainerError, match='stopped'):
        adapt(*live, m, tmp_path, {'everything': WAYS['everything']}, stop=stop)

# ---- in the facade

@pytest.fixture
def ai(live, tmp_path):
    ai = UltimateTradingAI(dict(state_dir=str(tmp_path/'state'), act_on='FAIL', horizons=[4, 12]), device='cpu')
    book = Declared.of('timing', 2, (4, 12), PANEL.timeframe, False)
    policy = book.policy(PANEL.timeframe)
    whole = dict(policy=asdict(policy), book=book.plain(), sources=['extra'], reach=dict(down=1., up=1.),
                 data_until=live[1].trained_until, verdict='FAIL', threshold=.5,
                 trials=dict(count=1, effective=1., place='', head=''))
    ai.snapshot = Snapshot(live[0], replace(live[1], **whole))
    ai.save_state()
    return ai

def history(end=None): return MARKET.bars if end is None else MARKET.bars[MARKET.bars.time < end]

def shifted(ai): return turned(pd.Timestamp(ai.live().terms.trained_until), PANEL.time[-1] + PANEL.timeframe)

def test_it_goes_live_is_saved_and_comes_back(ai):
    before = ai.model_name()
    told = asyncio.run(ai.adapt_to_new_regime(history(), shifted(ai), tuple(QUICK), '20D'))
    assert told['accepted'] == 'members' and ai.model_name() != before
    line, = read_lines(os.path.join(ai.config.state_dir, 'adapted.jsonl'))
    assert (line['model'], line['accepted']) == (before, 'members') and len(line['cases']) == 2
    ai.save_state()
    other = UltimateTradingAI(ai._given, device='cpu')
    other.load_state()
    assert other.model_name() == ai.model_name()
    with pytest.raises(DataError, match='0 days came since'):
        other.adapt_sync(history(), shifted(ai), tuple(QUICK), '20D')

def test_predictions_go_on_and_another_model_is_not_replaced(ai, monkeypatch):
    "Suite 14: while one thread adapts, another loads a model: that one stays"
    s, done = ai.live(), []
    real = WAYS['members'].make
    def meanwhile(t):
        if done: return real(t)
        with pytest.raises(StateError, match='training already'): ai.adapt_sync(history(), shifted(ai))
        assert ai.live() is s
        done.append(ai.load_state())
        return real(t)
    monkeypatch.setitem(WAYS, 'members', WAYS['members']._replace(make=meanwhile))
    with pytest.raises(StateError, match='another model went live while'):
        ai.adapt_sync(history(), shifted(ai), ('members',), '20D')
    assert done and ai.live() is not s and ai.model_name() == s.name
    assert not (ai._training.locked())

def test_killed_while_adapting(ai):
    "Suite 4: the state is the one that was saved, and adapting begins anew"
    extra, name, rng = shifted(ai), ai.model_name(), random.Random(0)
    for _ in range(3):
        def work():
            mine = UltimateTradingAI(ai._given, device='cpu')
            mine.load_state()
            mine.adapt_sync(history(), extra, tuple(QUICK), '20D')
            mine.save_state()
            time.sleep(60)
        pid = forked(work)
        time.sleep(.2 + 4 * rng.random())
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        other = UltimateTradingAI(ai._given, device='cpu')
        other.load_state()
        saved = other.model_name() != name
        assert len(generations(ai.config.state_dir)) == 1 + saved         # whole, the old one or the new
        if saved: break
    else:
        assert other.adapt_sync(history(), extra, tuple(QUICK), '20D')['accepted'] == 'members'

CYCLES = int(os.environ.get('CRYPTOML_SLOPES', 0)) // 200 or 5

@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='reads its size from /proc')
def test_adapting_leaves_nothing_behind(live, shift, tmp_path):
    "Suite 10: memory and threads"
    sizes = []
    for i in range(CYCLES):
        adapt(*live, shift, tmp_path/str(i), QUICK, fresh=False)
        gc.collect()
        sizes.append(resident())
    each = np.diff(sizes) / 2**20
    late = each[len(each) // 2:].mean()
    print(f'{CYCLES} adaptations: {np.median(each):.2f} MB a usual one, {late:.2f} on average in the second half')
    assert np.median(each) < 1 and threading.active_count() < 10       # what is leaked is leaked each time

# ---- the job

def test_the_job(ai, tmp_path):
    history().to_parquet(tmp_path/'bars.parquet')
    shifted(ai).to_parquet(tmp_path/'extra.parquet')
    given = dict(state=ai.config.state_dir, data=str(tmp_path/'bars.parquet'), extra=str(tmp_path/'extra.parquet'),
                 judge=20, ways='members,few')
    metrics = run('adapt', tmp_path/'run', **given, apply=True)
    assert metrics['accepted'] == 'members' and 'next generation' in metrics['next']
    assert (tmp_path/'run'/'report.html').read_text().count('ACCEPTED') >= 1
    name = ai.model_name()
    ai.load_state()
    assert ai.model_name() != name and ai.live().terms.trained_until == metrics['trained_until']
    with pytest.raises(JobError, match='ways must be some of members, few, EWC, everything'):
        run('adapt', tmp_path/'no', **given | dict(ways='MAML'))
