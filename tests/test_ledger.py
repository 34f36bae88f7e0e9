"The ledger of trials: what counts, what does not, and that nothing of it can be hidden (suites 4, 5, 6, 14)"
import json, multiprocessing, os, subprocess, sys
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from conftest import ended, forked
from cryptoml import state
from cryptoml.ledger import Trial, begin_trial, correlations, increments, least_correlation, read_ledger, tell
from cryptoml.metrics import deflated_sharpe, sharpe
from cryptoml.state import StateError, append_chained, ledger_file

YEAR = np.arange(365) + (date(2024, 1, 1) - date(1970, 1, 1)).days    # of 2024, less a day
rng = np.random.default_rng(0)

def line(returns, recipe, data='BTC', first='2024-01-01', gaps=(), seed=0, **more):
    "A line as a backtest writes it"
    about = dict(kind='backtest', name='', question='', time='2026-11-28T10:00:00+00:00') | more
    written = [float(f'{r:.6g}') for r in returns]
    return about | dict(recipe=recipe, data=data, seed=seed, first=first, gaps=list(gaps), returns=written)

def put(*args, **kw): return append_chained(ledger_file(), line(*args, **kw))

def noise(books, days=365): return .01 * np.random.default_rng(days).normal(size=(books, days))

def trials(books):
    "Books of equal days as trials, without a file"
    return [Trial('x', '', '', str(i), 'd', 0, np.arange(len(r)), np.asarray(r), '') for i, r in enumerate(books)]

# ---- what a trial adds

def slow_increments(books, days):
    "The definition, pair by pair"
    adds = []
    for i, (r, d) in enumerate(zip(books, days)):
        most = 0.
        for s, e in zip(books[:i], days[:i]):
            common = np.intersect1d(d, e)
            if len(common) < 4: continue
            a = r[np.isin(d, common)]
            b = s[np.isin(e, common)]
            c = np.corrcoef(a, b)[0, 1]
            bound = np.tanh(np.arctanh(min(c, 1 - 1e-15)) - 1.6448536 / np.sqrt(len(common) - 3))
            most = max(most, len(common) / len(d) * max(bound, 0)**2)
        adds.append(1 - most)
    return adds

def test_against_the_definition():
    common = rng.normal(size=400)
    books = []
    days = []
    for _ in range(40):
        start = rng.integers(0, 300)
        d = np.unique(rng.integers(start, start + 100, size=90))
        r = rng.uniform(-1, 1) * common[d] + rng.uniform(.1, 1) * rng.normal(size=len(d)) + rng.normal()
        days.append(d)
        books.append(.01 * r)
    made = [Trial('x', '', '', str(i), 'd', 0, d, r, '') for i, (d, r) in enumerate(zip(days, books))]
    np.testing.assert_allclose(increments(made), slow_increments(books, days), atol=1e-6)

def test_the_same_line_a_hundred_times(ledger):
    for _ in range(100): put(noise(1)[0], 'a')
    found = read_ledger().tried(YEAR, noise(1)[0])
    assert (found.count, found.faults) == (1, [])
    assert found.effective == pytest.approx(1, abs=1e-9)

def test_equal_books_of_other_recipes(ledger):
    "Counted, but no luck comes from them"
    for i in range(50): put(noise(1)[0], str(i))
    found = read_ledger().tried(YEAR, noise(1)[0])
    assert found.count == 50 and found.effective == pytest.approx(1, abs=1e-6)

def test_nearly_equal_books():
    base = noise(1)[0]
    books = [base + 1e-4 * rng.normal(size=365) for _ in range(50)]
    assert increments(trials(books)).sum() < 1.1

@pytest.mark.parametrize('days', [73, 365])
def test_chance_does_not_hide_trials(days):
    "200 books without relation: the most similar two of them correlate, and still nearly all count"
    for seed in range(3):
        books = np.random.default_rng(seed).normal(size=(200, days))
        assert 190 <= increments(trials(books)).sum() <= 200

def test_books_with_a_common_part():
    common = rng.normal(size=365)
    books = [np.sqrt(.5) * common + np.sqrt(.5) * rng.normal(size=365) for _ in range(100)]
    assert 60 < increments(trials(books)).sum() < 90                   # a quarter of the variance is explained

def test_opposites_are_two(ledger):
    put(noise(1)[0], 'a')
    put(-noise(1)[0], 'b')
    assert read_ledger().tried(YEAR, noise(1)[0]).effective == pytest.approx(2)

def test_books_that_did_nothing_are_one():
    assert increments(trials(np.zeros((5, 365)))).tolist() == [1, 0, 0, 0, 0]
    assert increments(trials(np.r_[np.zeros((1, 365)), noise(1)])).tolist() == [1, 1]
    assert increments(trials(np.full((3, 365), .001))).tolist() == [1, 0, 0]

@pytest.mark.parametrize('days', [1, 2, 3])
def test_a_few_days_explain_nothing(days):
    assert increments(trials(np.tile(noise(1, days), (3, 1)))).tolist() == [1, 1, 1]

def test_a_few_common_days_hide_no_year():
    "Two books of 365 days that stood still on the ten days they have in common"
    a = np.r_[noise(1)[0][:355], np.zeros(10)]
    b = np.r_[np.zeros(10), noise(2)[1][:355]]
    made = [Trial('x', '', '', 'a', 'd', 0, YEAR, a, ''), Trial('x', '', '', 'b', 'd', 0, YEAR + 355, b, '')]
    assert increments(made)[1] > .97

returns = st.lists(st.floats(-1, 1, width=32), min_size=30, max_size=30)

@settings(max_examples=60, deadline=None)
@given(st.lists(returns, min_size=1, max_size=8), returns)
def test_a_trial_never_takes_away(books, more):
    before = increments(trials(books))
    after = increments(trials([*books, more]))
    assert np.array_equal(after[:-1], before) or np.allclose(after[:-1], before, atol=1e-6)
    assert 0 <= after[-1] <= 1
    assert before[0] == 1

@settings(max_examples=30, deadline=None)
@given(st.floats(-1, 1), st.integers(0, 3000))
def test_the_bound_lies_below(r, n):
    bound = least_correlation(np.array([r]), np.array([n]))[0]
    assert 0 <= bound <= max(r, 0)

def test_correlations_of_huge_and_tiny_books():
    books = noise(3) * np.array([[1e5], [1.], [1e-8]])
    found = increments([Trial('x', '', '', '', '', 0, YEAR, r, '') for r in [*books, *(10 * books)]])
    assert found[:3].min() > .95
    np.testing.assert_allclose(found[3:], 0, atol=1e-6)
    r, n = correlations(noise(2), noise(2))
    assert n.tolist() == [[365, 365]] * 2 and r[0, 0] == pytest.approx(1)

# ---- what counts

def test_independent_books(ledger):
    for i, r in enumerate(noise(60)): put(r, str(i))
    found = read_ledger().tried(YEAR, noise(60)[7])
    assert found.count == 60 and 57 < found.effective <= 60
    assert found.place == str(ledger) and found.head == read_ledger().head

def test_an_empty_ledger(ledger):
    found = read_ledger().tried(YEAR, noise(1)[0])
    assert (found.count, found.effective, found.faults, found.head) == (1, 1., [], '')
    assert not ledger.parent.exists()                                  # reading writes nothing
    assert len(read_ledger().table()) == len(read_ledger().totals()) == 0

def test_the_same_but_for_one_thing(ledger):
    "Recipe, seed, data and span: each makes it another trial"
    base = noise(1)[0]
    put(base, 'a')
    put(base, 'a')
    assert read_ledger().tried(YEAR, base).count == 1
    for more in (dict(recipe='b'), dict(seed=1), dict(seed=None), dict(data='ETH')):
        put(base, **dict(recipe='a') | more)
    put(base[:-1], 'a')
    assert read_ledger().tried(YEAR, base).count == 6

def test_a_recipe_that_gives_something_else_each_time(ledger):
    "Not the same trial, whatever its digests say"
    for r in noise(20): put(r, 'a')
    found = read_ledger().tried(YEAR, noise(20)[0])
    assert found.count == 20 and found.effective > 19

def test_spans(ledger):
    "Only trials that saw a day of the span"
    for i, (year, r) in enumerate(zip((2020, 2021, 2022, 2023), noise(4))): put(r, str(i), first=f'{year}-01-01')
    ledger = read_ledger()
    year = {y: np.arange(365) + (date(y, 1, 1) - date(1970, 1, 1)).days for y in range(2018, 2026)}
    assert ledger.tried(year[2021], noise(4)[1]).count == 1
    assert ledger.tried(year[2018], noise(5)[4]).count == 1
    assert ledger.tried(year[2024], noise(5)[4]).count == 1
    assert ledger.tried(np.concatenate([year[2022], year[2023]]), np.r_[noise(2)[0], noise(2)[1]]).count == 3
    assert ledger.tried(year[2022] + 1, noise(5)[4]).count == 3        # a day of 2023

def test_questions(ledger):
    for i, r in enumerate(noise(10)): put(r, str(i), data=f'd{i % 2}', question=f'q{i % 2}')
    ledger = read_ledger()
    for i in range(2):
        found = ledger.tried(YEAR, noise(10)[i], f'q{i}')
        assert found.count == 5
    assert ledger.tried(YEAR, noise(11)[10]).count == 1
    assert ledger.totals().to_dict('list')['trials'] == [5, 5]

def test_a_second_name_for_the_same_data(ledger):
    for i, r in enumerate(noise(20)): put(r, str(i))
    put(noise(21)[20], 'best', question='a fresh start')
    own = YEAR, noise(21)[20]
    with pytest.raises(ValueError, match="'a fresh start' is asked of data that trials without a question had first"):
        read_ledger().tried(*own, 'a fresh start')
    assert read_ledger().tried(*own).count == 21                       # under its first name it counts with all
    put(noise(22)[21], 'best', data='ETH', question='a fresh start')   # other data may have another question
    assert read_ledger().tried(YEAR, noise(22)[21], 'a fresh start').count == 2
    put(noise(23)[22], 'best', first='2020-01-01', question='a fresh start')          # and so may other days
    days = YEAR + (date(2020, 1, 1) - date(2024, 1, 1)).days
    assert read_ledger().tried(days, noise(23)[22], 'a fresh start').count == 1

def test_a_book_that_is_not_in_it_is_one_more(ledger):
    put(noise(1)[0], 'a')
    found = read_ledger().tried(YEAR, noise(2)[1])
    assert found.count == 2 and found.effective == 2
    assert read_ledger().of(YEAR, noise(2)[1]) == []
    assert len(read_ledger().of(YEAR, noise(1)[0])) == 1
    assert read_ledger().of(YEAR + 1, noise(1)[0]) == []
    put(noise(1)[0], 'a', data='', question='elsewhere')               # of unknown data: a trial of its question alone
    assert read_ledger().tried(YEAR, noise(1)[0]).count == 1
    put(noise(2)[1], 'b', data='', question='elsewhere')
    assert read_ledger().tried(YEAR, noise(2)[1]).count == 2

def test_gaps(ledger):
    put(noise(1)[0], 'a', gaps=[[10, 3], [200, 30]])
    days = read_ledger().trials[0].days
    assert days[:10].tolist() == YEAR[:10].tolist()
    assert days[10] == YEAR[10] + 3 and days[-1] == YEAR[-1] + 33
    assert read_ledger().tried(days, noise(1)[0]).count == 1

def test_the_table(ledger):
    put(noise(1)[0], 'a', name='slow', question='carry')
    put(noise(1)[0], 'b', name='slow too', question='carry')
    tell(7, 'by hand', 'carry')
    t = read_ledger().table()
    assert list(t.columns) == ['time', 'kind', 'name', 'question', 'span', 'Sharpe', 'adds']
    assert t.adds.tolist() == [1, 0, 7] and t.span.tolist() == ['2024-01-01 to 2024-12-30'] * 2 + ['']
    assert t.Sharpe[0] == round(sharpe(noise(1)[0], 365), 2) and np.isnan(t.Sharpe[2])
    assert read_ledger().totals().to_dict('list') == dict(question=['carry'], trials=[9], effective=[8.])

def test_told_trials(ledger):
    head = tell(20, 'a spreadsheet')
    assert read_ledger().head == head
    found = read_ledger().tried(YEAR, noise(1)[0])
    assert (found.count, found.effective) == (21, 21)
    tell(20, 'a spreadsheet')                                          # said twice is forty
    tell(5, 'of an older year', first='2020-01-01', last='2020-12-31')
    tell(6, 'another question', 'carry')
    assert read_ledger().tried(YEAR, noise(1)[0]).count == 41

def test_trials_of_a_search(ledger):
    "Each counts in full from its beginning, for whatever days; begun again it stays one, with another seed it does not"
    for i in range(50): begin_trial(f'x {i}', f'r{i}', 'width', seed=0)
    for i in range(0, 50, 7): begin_trial(f'x {i}', f'r{i}', 'width', seed=0)
    found = read_ledger().tried(YEAR, noise(1)[0], 'width')
    assert (found.count, found.effective, found.faults) == (51, 51, [])
    begin_trial('x', 'r0', 'width', seed=1)
    begin_trial('x', 'r0', 'width', data='d', seed=0)
    assert read_ledger().tried(YEAR - 900, noise(1)[0], 'width').count == 53
    assert read_ledger().tried(YEAR, noise(1)[0]).count == 1           # another question
    assert (read_ledger().table().kind == 'tune').sum() == 60

def test_a_search_on_days_that_it_says(ledger):
    begin_trial('x', 'a', first='2020-01-01', last='2020-12-31')
    begin_trial('x', 'b', first='2024-01-01', last='2024-01-01')
    put(noise(1)[0], 'b')                                              # a book of the same recipe is a trial of its own
    assert read_ledger().tried(YEAR, noise(1)[0]).count == 2
    tell(3, 'x')
    tell(3, 'x')                                                       # what was told has no recipe and adds up
    assert read_ledger().tried(YEAR, noise(1)[0]).count == 8

@pytest.mark.parametrize('wrong', [
    dict(name=None), dict(recipe=''), dict(recipe=3), dict(question=None), dict(data=b'x'), dict(seed=1.5),
    dict(first='2024-01-01'), dict(first='2024-02-01', last='2024-01-01')], ids=str)
def test_no_trial_begins(ledger, wrong):
    with pytest.raises(ValueError): begin_trial(**dict(name='x', recipe='y') | wrong)
    assert not ledger.exists()

@pytest.mark.parametrize('count, note, more', [
    (0, 'x', {}),
    (-3, 'x', {}),
    (2.0, 'x', {}),
    (True, 'x', {}),
    (10**10, 'x', {}),
    ('20', 'x', {}),
    (3, '', {}),
    (3, None, {}),
    (3, 'x', dict(question=3)),
    (3, 'x', dict(first='2024-01-01')),
    (3, 'x', dict(first='2024-02-01', last='2024-01-01')),
    (3, 'x', dict(first='soon', last='later')),
], ids=str)
def test_told_wrongly(ledger, count, note, more):
    with pytest.raises(ValueError): tell(count, note, **more)
    assert not ledger.exists()

def test_what_is_deflated():
    "The best of 200 books of noise passes as the only one, and not as the best of those that were counted"
    passed = dict(one=0, counted=0)
    for seed in range(20):
        books = np.random.default_rng(seed).normal(size=(200, 365)) * .01
        best = max(books, key=lambda r: sharpe(r, 365))
        passed['one'] += deflated_sharpe(best, 1, 1., 365) > .95
        passed['counted'] += deflated_sharpe(best, increments(trials(books)).sum(), 1., 365) > .95
    assert passed['one'] >= 19 and passed['counted'] == 0

# ---- nothing of it can be hidden

@pytest.fixture
def five(ledger):
    "A ledger of five trials; the head of each line"
    return [put(r, str(i)) for i, r in enumerate(noise(5))]

def records(path): return [json.loads(text) for text in path.read_bytes().splitlines()]

def write(path, lines): path.write_bytes(b''.join(json.dumps(r).encode() + b'\n' for r in lines))

def signed(lines):
    "The same lines as a chain without a fault of its own"
    before = ''
    for r in lines:
        r = {k: v for k, v in r.items() if k != 'sha256'} | dict(previous=before)
        before = state._digest(r)
        yield r | dict(sha256=before)

def drop_the_head(path): Path(f'{path}.head').unlink(missing_ok=True)

def cut_the_last(path): write(path, records(path)[:-1])
def cut_the_middle(path): write(path, records(path)[:2] + records(path)[3:])
def torn(path): path.write_bytes(path.read_bytes()[:-40])
def edit(path): path.write_text(path.read_text().replace('"recipe": "2"', '"recipe": "1"'))
def sign_the_edit(path):
    lines = records(path)
    lines[2]['returns'] = lines[1]['returns']
    lines[2]['sha256'] = state._digest(lines[2])
    write(path, lines)
def rewrite(path): write(path, signed(records(path)[:2] + records(path)[3:]))
def rewrite_as_long(path): write(path, signed([r | dict(returns=records(path)[0]['returns']) for r in records(path)]))
def delete(path): path.unlink()

def and_its_head(how):
    "The same, and the second witness made to fit, or taken away"
    def change(path):
        how(path)
        drop_the_head(path)
        if not path.exists(): return
        lines = records(path)
        state._write_head(path, state._Head(len(lines), lines[-1]['sha256'], path.stat().st_size))
    change.__name__ = f'{how.__name__} and its head'
    return change

HERE = [cut_the_last, cut_the_middle, torn, edit, sign_the_edit, rewrite, rewrite_as_long, delete, drop_the_head]
ONLY_A_MODEL_TELLS = [and_its_head(how) for how in (cut_the_last, rewrite, rewrite_as_long, delete)]

@pytest.mark.parametrize('how', HERE, ids=lambda how: how.__name__)
def test_tampered(ledger, five, how):
    how(ledger)
    assert read_ledger().faults
    put(noise(6)[5], 'later')
    faults = read_ledger().tried(YEAR, noise(6)[5]).faults
    assert faults and all(str(ledger) in f for f in faults)

@pytest.mark.parametrize('how', ONLY_A_MODEL_TELLS, ids=lambda how: how.__name__)
def test_tampered_with_both_files(ledger, five, how):
    assert read_ledger(heads=five).faults == []
    how(ledger)
    assert read_ledger().faults == []
    for _ in range(2):
        faults = read_ledger(heads=[five[-1]]).faults
        assert len(faults) == 1 and five[-1][:12] in faults[0] and 'that a judged model names' in faults[0]
        put(noise(6)[5], 'later')

def test_heads_of_models_without_a_ledger(ledger, five):
    assert read_ledger(heads=['', five[0], *five]).faults == []        # '' is a model that was judged on nothing
    assert len(read_ledger(heads=['f' * 64, 'e' * 64]).faults) == 2

def test_a_head_that_a_line_only_claims(ledger, five):
    delete(ledger)
    drop_the_head(ledger)
    write(ledger, [line(noise(1)[0], 'a') | dict(previous='', sha256=five[-1])])
    assert any('was changed' in f for f in read_ledger(heads=[five[-1]]).faults)

HOSTILE = [
    'not JSON', '[]', '7', '{}', '{"sha256": 3, "previous": 4}', '[' * 100_000, '\x00',
]

@pytest.mark.parametrize('text', HOSTILE, ids=lambda text: text[:20])
def test_a_hostile_line(ledger, five, text):
    with open(ledger, 'a') as f: f.write(text + '\n')
    found = read_ledger().tried(YEAR, noise(5)[0])
    assert found.count == 5 and found.faults
    read_ledger().table()

NO_TRIALS = dict(
    a_note=dict(note='no trial'),
    no_returns=line([], 'a'),
    nan=line(noise(1)[0], 'a') | dict(returns=[float('nan')] * 365),
    text=line(noise(1)[0], 'a') | dict(returns=['1'] * 365),
    huge=line(noise(1)[0], 'a') | dict(returns=[10**400] * 365),
    large=line(noise(1)[0], 'a') | dict(returns=[1e300] * 365),
    deep=line(noise(1)[0], 'a') | dict(returns=[[[1.]]] * 365),
    number=line(noise(1)[0], 'a') | dict(returns=3),
    no_day=line(noise(1)[0], 'a', first='someday'),
    far_day=line(noise(1)[0], 'a', first='9999-12-31'),
    old_day=line(noise(1)[0], 'a', first='0001-01-01'),
    gap=line(noise(1)[0], 'a', gaps=[[1, 10**30]]),
    many_gaps=line(noise(1)[0], 'a', gaps=[[i, 99_999] for i in range(1, 300)]),
    gap_of_text=line(noise(1)[0], 'a') | dict(gaps='ab'),
    gap_of_one=line(noise(1)[0], 'a') | dict(gaps=[[1]]),
    gap_number=line(noise(1)[0], 'a') | dict(gaps=3),
    question=line(noise(1)[0], 'a', question=['q']),
    recipe=line(noise(1)[0], 'a') | dict(recipe={}),
    seed=line(noise(1)[0], 'a', seed='one'),
    count=line(noise(1)[0], 'a', count=10**400),
    less=line(noise(1)[0], 'a', count=-1),
    told_with_a_span=line([], '', kind='told', count=3) | dict(first='2024-01-01', last='1e9'),
)

@pytest.mark.parametrize('name', NO_TRIALS)
def test_a_line_that_is_no_trial(ledger, five, name):
    "Whole as a link of the chain, and nothing that can be counted: told, and the others are counted"
    append_chained(ledger, NO_TRIALS[name])
    found = read_ledger()
    assert len(found.trials) == 5
    assert len(found.faults) == 1 and '1 lines are no trials' in found.faults[0] and '\n' not in found.faults[0]
    assert found.tried(YEAR, noise(5)[0]).count == 5
    found.table()

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=5)

@settings(max_examples=80, deadline=None)
@given(st.sampled_from(list(line([0.], ''))), json_values)
def test_any_value_in_a_line(tmp_path_factory, key, value):
    path = tmp_path_factory.mktemp('any')/'l.jsonl'
    try: append_chained(path, line(noise(1)[0], 'a') | {key: value})
    except (StateError, ValueError): return
    found = read_ledger(path)
    assert len(found.trials) + len(found.faults) == 1
    found.table()
    if found.trials: found.tried(YEAR, noise(1)[0], found.trials[0].question)

# ---- several at once, and faults of the disk

unix = pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks and users of Unix')

@unix
def test_four_processes_at_once(ledger):
    books = noise(80)
    def writer(who):
        for i in range(20): put(books[20 * who + i], str(20 * who + i))
    pids = [forked(lambda who=who: writer(who)) for who in range(4)]
    assert [ended(pid) for pid in pids] == [0, 0, 0, 0]
    found = read_ledger().tried(YEAR, books[0])
    assert (found.count, found.faults) == (80, []) and found.effective > 77

def spawned(ledger):
    "In a process that inherits nothing but its environment"
    put(noise(1)[0], 'spawned')

def test_a_new_process_writes_to_the_same_ledger(ledger):
    put(noise(2)[1], 'here')
    p = multiprocessing.get_context('spawn').Process(target=spawned, args=(ledger,))
    p.start()
    p.join()
    assert p.exitcode == 0
    assert [t.recipe for t in read_ledger().trials] == ['here', 'spawned']

@unix
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv('CRYPTOML_LEDGER', '/proc/none/ledger.jsonl')
    with pytest.raises(StateError, match='cannot append to /proc/none/ledger.jsonl') as e: tell(1, 'x')
    assert '\n' not in str(e.value)
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('CRYPTOML_LEDGER', str(tmp_path/'file'/'ledger.jsonl'))
    with pytest.raises(StateError, match='cannot append to'): tell(1, 'x')
    faults = read_ledger().faults
    assert faults == [] or 'cannot read' in faults[0]

def test_a_long_ledger(tmp_path):
    "Five thousand trials are read and counted"
    path = tmp_path/'l.jsonl'
    books = np.random.default_rng(5).normal(size=(5000, 100)) * .01
    write(path, signed(line(r, str(i)) for i, r in enumerate(books)))
    last = records(path)[-1]['sha256']
    state._write_head(path, state._Head(5000, last, path.stat().st_size))
    found = read_ledger(path).tried(YEAR[:100], books[0])
    assert (found.count, found.faults) == (5000, []) and found.effective > 4500

def test_the_default_place_is_not_the_users(monkeypatch):
    "No test, and no process that a test starts, writes into the ledger of whoever runs it"
    print_it = 'from cryptoml.state import ledger_file; print(ledger_file())'
    own = subprocess.run([sys.executable, '-c', print_it], capture_output=True, text=True, check=True).stdout.strip()
    assert own == str(ledger_file()) and 'cryptoml-tests-' in own
    monkeypatch.delenv('CRYPTOML_LEDGER')
    assert own != str(ledger_file())

def test_times_are_shown_as_they_are(ledger):
    put(noise(1)[0], 'a', time='no time at all')
    assert read_ledger().table().time.tolist() == ['no time at all']
    tell(1, 'x')
    assert pd.Timestamp(read_ledger().table().time[1]).year >= 2024
