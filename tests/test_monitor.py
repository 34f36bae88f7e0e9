"""The journal against damage and restarts; live figures, alarms, promotion and alerts against simulation"""
import json, logging, socket, threading
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import groupby

import numpy as np
import pandas as pd
import pytest

from examples import TERMS
from cryptoml.data import DataError, to_panel
from cryptoml.gate import Declared
from cryptoml.metrics import diebold_mariano
from cryptoml.evidence import days_of
from cryptoml.monitor import BETS, WORSE, Alerts, Journal, Matured, Rule, bet_on, declare, declared, drift
from cryptoml.monitor import health_report, live_book, live_rows, matured, plausible, promotion, refit_due, rounds
from cryptoml.monitor import shadow_of, spells, wealth
from cryptoml.simulate import simulate
from cryptoml.state import StateError
from cryptoml.targets import make_targets, trailing_sigma

HOUR = pd.Timedelta('1h')

def frame(first, last, symbols=('BTC/USDT', 'ETH/USDT'), **columns):
    "Hourly bars whose numbers name them"
    time = pd.date_range('2024-01-31', periods=last, freq='1h', tz='UTC', unit='us')[first:]
    def coin(k, s):
        close = 100. * (k + 1) + np.arange(first, last)
        prices = dict(open=close, high=close + 1, low=close - 1, close=close)
        return pd.DataFrame(dict(time=time, symbol=s, **prices, volume=1.5) | columns)
    return pd.concat([coin(k, s) for k, s in enumerate(symbols)], ignore_index=True).astype(dict(symbol='str'))

def close_of(k): return pd.Timestamp('2024-01-31', tz='UTC') + k * HOUR

def filled(folder, n, start=0):
    journal = Journal(folder)
    for k in range(start, start + n):
        journal.record(close_of(k + 10), frame(k, k + 10), {'BTC/USDT': dict(prediction={'k': k}, signal={})}, f'm{k}')
    return journal

def rows_of(journal):
    "Rows of bars that each line holds"
    return [[sum(len(part['rows']) for part in x['bars'].values()) for x in journal.lines(f)] for f in journal.files()]

def test_every_decision_is_found_again_over_restarts_and_months(tmp_path):
    for k in range(0, 30, 3): filled(tmp_path, 3, k)             # a new process every three hours
    journal = Journal(tmp_path)
    assert [f.name for f in journal.files()] == ['journal-2024-01.jsonl', 'journal-2024-02.jsonl']
    assert rows_of(journal) == [[20] + 13 * [2], [20] + 15 * [2]]
    entries = journal.entries()
    assert [e.model for e in entries] == [f'm{k}' for k in range(30)]
    assert [e.said['BTC/USDT']['prediction']['k'] for e in entries] == list(range(30))
    for k in (*range(30), 3, 29, 0, -1):                         # in any order
        assert entries[k].now == close_of(k % 30 + 10)
        pd.testing.assert_frame_equal(journal.bars_at(k), frame(k % 30, k % 30 + 10))

def test_a_torn_last_line_is_no_line_and_a_broken_one_is_told(tmp_path):
    filled(tmp_path, 4)
    file, = Journal(tmp_path).files()
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    assert len(Journal(tmp_path).entries()) == 3
    filled(tmp_path, 2, 3)                                       # what was torn is written again
    journal = Journal(tmp_path)
    assert rows_of(journal) == [[20, 2, 2, 2, 2]]
    pd.testing.assert_frame_equal(journal.bars_at(4), frame(4, 14))
    lines = whole.split(b'\n')
    for broken in (lines[1][:-9], b'{"now": 3}', b'[]'):
        file.write_bytes(b'\n'.join([lines[0], broken, *lines[2:]]))
        with pytest.raises(StateError, match='line 2 of'): Journal(tmp_path).entries()
        with pytest.raises(StateError, match='line 2 of'): filled(tmp_path, 1, 4)

def test_a_reader_follows_a_writer(tmp_path):
    reader, writer = Journal(tmp_path), Journal(tmp_path)
    assert reader.entries() == []
    for k in range(3):
        writer.record(close_of(k + 10), frame(k, k + 10), {}, 'm')
        assert len(reader.entries()) == k + 1
        pd.testing.assert_frame_equal(reader.bars_at(k), frame(k, k + 10))

def test_what_was_not_written_is_written_later(tmp_path, monkeypatch):
    journal = filled(tmp_path, 1)
    def full(*_): raise StateError('no space left')
    monkeypatch.setattr('cryptoml.monitor.append_line', full)
    with pytest.raises(StateError): filled(tmp_path, 1, 1)
    with pytest.raises(StateError): journal.record(close_of(11), frame(1, 11), {}, 'm')
    monkeypatch.undo()
    journal.record(close_of(12), frame(2, 12), {}, 'm')
    assert rows_of(journal) == [[20, 4]]
    pd.testing.assert_frame_equal(journal.bars_at(1), frame(2, 12))

def test_bars_come_back_as_they_were(tmp_path):
    "A coin that is away for a while, a hole, missing numbers, a column that joins, a window that grows back"
    holed = frame(3, 12).drop(index=[4, 11]).reset_index(drop=True)
    holed.loc[2, ['close', 'volume']] = np.nan
    many = [frame(0, 10), frame(1, 11, ['ETH/USDT']), holed, frame(2, 12, trades=7.), frame(0, 12, trades=7.),
            frame(0, 0), frame(4, 13)]
    journal = Journal(tmp_path)
    for k, bars in enumerate(many): journal.record(close_of(13 + k / 60), bars, {}, 'm')
    again = Journal(tmp_path)
    for k, bars in enumerate(many):
        if len(bars): pd.testing.assert_frame_equal(again.bars_at(k), bars)
        else: assert not len(again.bars_at(k))
    doubled = pd.concat([frame(4, 13).iloc[:3], frame(4, 13)]).sample(frac=1, random_state=0)
    journal.record(close_of(14), doubled, {}, 'm')
    pd.testing.assert_frame_equal(again.bars_at(-1), frame(4, 13))
    less = frame(0, 10).drop(columns='volume')
    with pytest.raises(DataError, match='no column volume'): journal.record(close_of(14), less, {}, 'm')

def test_a_clock_that_goes_back_changes_no_order(tmp_path):
    journal = Journal(tmp_path)
    clock = ['2024-02-01 00:30', '2024-01-31 23:30', '2024-02-01 01:30']
    for now in clock: journal.record(now, frame(0, 5), {}, now)
    assert [e.model for e in Journal(tmp_path).entries()] == clock

def test_what_was_said_comes_back_and_damage_in_it_is_told(tmp_path):
    journal, text = Journal(tmp_path), dict(x=[1 / 3, None, True], 時='é')
    said = {'BTC/USDT': dict(prediction=text, signal=dict(at=close_of(0), n=np.float64(2)))}
    journal.record(close_of(10), frame(0, 10), said, 'm')
    entry, = Journal(tmp_path).entries()
    told = dict(prediction=text, signal=dict(at=close_of(0).isoformat(), n=2.))
    assert entry.said == {'BTC/USDT': told}
    with pytest.raises(DataError, match='not a object'): journal.record(close_of(11), frame(0, 10), object(), 'm')
    file, = Journal(tmp_path).files()
    text = file.read_text(encoding='utf-8')
    at = text.index('"said"') + 40
    file.write_text(text[:at] + ('A' if text[at] != 'A' else 'B') + text[at + 1:], encoding='utf-8')
    entry, = Journal(tmp_path).entries()
    with pytest.raises(StateError, match='line 1 of .* is damaged'): print(entry.said)


# What came

HORIZONS = [4, 24]
Z = np.array([-1.2816, 1.2816, -1.6449, 1.6449])

@pytest.fixture(scope='module')
def market(): return simulate(n_symbols=6, n_bars=24 * 75, seed=3)

@pytest.fixture(scope='module')
def bars(market): return market.bars[['time', 'symbol', 'open', 'high', 'low', 'close', 'volume']]

@pytest.fixture(scope='module')
def panel(bars): return to_panel(bars, '1h')

@pytest.fixture(scope='module')
def terms(market, panel):
    book = replace(Declared.of('relative', 6, (24, 72), '1h'), usual=(1., 1.))
    return replace(TERMS, symbols=market.symbols, book=book.plain(), policy=asdict(book.policy('1h')),
                   trained_until=panel.time[24 * 20].isoformat())

def plainly(panel, n, t, times=1., **changed):
    "A prediction that names so many times the recent volatility"
    sigma = trailing_sigma(panel)[n, t]
    said = times * sigma
    p = dict(
        symbol=panel.symbols[n], data_time=(panel.time[t] + panel.timeframe).isoformat(), faults=[], in_sample=False,
        horizons=HORIZONS, quantile_levels=[.05, .5, .95], interval_levels=[.8, .9], correlation={}, beta=1.,
        direction=[dict(DOWN=.4, SIDEWAYS=.2, UP=.4)] * 2, relative_up=[.5, .5], sigma=sigma, score=(-1.) ** n,
        intervals=[(said * h ** .5 * Z).reshape(2, 2).tolist() for h in HORIZONS],
        volatility_quantiles=[(said * np.array([.5, 1., 2.])).tolist()] * 2)
    return p | changed

@pytest.fixture(scope='module')
def journal(tmp_path_factory, panel, bars):
    "A bot of six coins, every four hours for 40 days; from the 25th on it says half of the volatility"
    journal, first = Journal(tmp_path_factory.mktemp('bot')), 24 * 22 + 3
    for t in range(first, first + 24 * 40, 4):
        times = 1. if t < first + 24 * 25 else .5
        said = {k: dict(prediction=plainly(panel, n, t, times), signal={}) for n, k in enumerate(panel.symbols)}
        seen = bars[(bars['time'] <= panel.time[t]) & (bars['time'] > panel.time[t] - pd.Timedelta('3D'))]
        journal.record(panel.time[t] + panel.timeframe, seen, said, 'w')
    return journal

def place(m, panel):
    "Coins and bars of the samples"
    bar = (m.time - panel.time.as_unit('us').asi8[0]) // 3_600_000_000 - 1
    return np.searchsorted(panel.symbols, m.coin), bar

def test_labels_are_those_of_training(journal, bars, panel, terms):
    m, _ = matured(journal, bars, terms)
    truth, at = make_targets(panel, HORIZONS, terms.round_trip), place(m, panel)
    for name in ('direction', 'relative_direction'): assert (m.labels[name] == truth[name][at]).all()
    assert np.allclose(m.labels['return'], truth['ret'][at], atol=1e-7)
    assert np.allclose(m.labels['volatility'], truth['volatility'][at], atol=1e-5)
    assert len(m) == 240 * 6 and (m.labels['direction'] >= 0).all()

def test_an_answer_is_there_when_its_bar_has_closed_and_not_before(journal, bars, panel, terms):
    m, _ = matured(journal, bars, terms)
    for k in (500, 777):
        for early, there in ((1, False), (0, True)):
            now = pd.Timestamp(int(m.known(0)[k]), unit='us', tz='UTC') - pd.Timedelta(minutes=early)
            then, _ = matured(journal, bars, terms, now=now)
            assert np.isfinite(then.labels['return'][k, 0]) == there
            assert np.isnan(then.labels['return'][k, 1])
    alone, _ = matured(journal, None, terms)                      # the journal has bars until its last decision
    assert np.isfinite(alone.labels['return'][:, 0]).sum() == 6 * (240 - 2) and len(alone) == len(m)

def test_what_cannot_be_judged_is_left_out(tmp_path, bars, panel, terms):
    journal, t = Journal(tmp_path), 24 * 30
    given = dict(zip(panel.symbols, (dict(faults=['stale']), dict(in_sample=True), {}, {}, dict(symbol='XX/USDT'), {})))
    said = {k: dict(prediction=plainly(panel, n, t, **given[k]), signal={}) for n, k in enumerate(panel.symbols)}
    said[panel.symbols[5]] = dict(signal={})
    for times in (1., 3.):                                        # said again with another figure: the first counts
        said[panel.symbols[2]] = dict(prediction=plainly(panel, 2, t, times), signal={})
        journal.record(panel.time[t] + panel.timeframe, bars[bars['time'] <= panel.time[t]], said, 'w')
    m, _ = matured(journal, bars, terms)
    assert list(m.coin) == panel.symbols[2:4]
    assert np.allclose(np.exp(m.said['volatility'][0, 0, 1]), trailing_sigma(panel)[2, t])
    with pytest.raises(DataError, match='no forecast by other'): matured(journal, bars, terms, 'other')
    with pytest.raises(DataError, match='holds no journal'): matured(Journal(tmp_path/'empty'), bars, terms)

def test_live_figures_stand_beside_what_was_promised(journal, bars, panel, terms):
    m, _ = matured(journal, bars, terms)
    promised = [dict(target='return', horizon=4, model='ensemble', metric='coverage 80%', over=None, value=.79),
                dict(target='return', horizon=4, model='ensemble', metric='coverage 80%', over='rival', value=.01),
                dict(target='return', horizon=24, model='rival', metric='coverage 80%', over=None, value=.02)]
    rows = {(r['target'], r['horizon'], r['metric']): r for r in live_rows(m, promised)}
    ends, y = m.said['return'][:, :, 0], m.labels['return']
    inside = ((ends[..., 0] <= y) & (y <= ends[..., 1])).T
    found = [rows['return', h, 'coverage 80%'] for h in HORIZONS]
    assert [r['value'] for r in found] == pytest.approx([x.mean() for x in inside])
    assert [r['promised'] for r in found] == [.79, .8]
    assert rows['direction', 4, 'log-loss']['promised'] is None and rows['direction', 4, 'ECE']['value'] >= 0
    bias = np.exp((m.labels['volatility'] - m.said['volatility'][..., 1])[:, 1].mean())
    assert rows['volatility', 24, 'realised over said']['value'] == pytest.approx(bias)
    parts = [r for r in live_rows(m, by_regime=True) if r['metric'] == 'coverage 90%' and r['target'] == 'return']
    assert {r['by'] for r in parts} <= {'regime'} and sum(r['n'] for r in parts if r['horizon'] == 4) <= len(m)

# Drift

def test_rounds_do_not_overlap(journal, bars, terms):
    m, _ = matured(journal, bars, terms)
    for j in range(2):
        at, known = rounds(m.time, m.known(j)), m.known(j)
        assert (m.time[at[1:]] >= known[at[:-1]]).all() and at[0] == 0
        between = [m.time[(m.time > m.time[i]) & (m.time < m.time[k])] for i, k in zip(at, at[1:])]
        assert all((x < known[i]).all() for x, i in zip(between, at))          # none that could have begun is left out
    assert len(rounds(np.zeros(0, int), np.zeros(0, int))) == 0

def test_the_stake_is_that_of_a_slow_bettor():
    rng = np.random.default_rng(0)
    n = 900
    time = np.sort(rng.integers(0, 800 * 86400 * 10**6, n))
    bets = bet_on(rng.random(n) < .3, .2)
    start = (time - time[0]) // (30 * 86400 * 10**6)
    def stake(year, until):
        begun = [s for s in range(12 * year, 12 * year + 12) if s in set(start[:until + 1])]
        each = [np.prod(bets[:until + 1][start[:until + 1] >= s], axis=0).mean() for s in begun]
        waiting = 11 - min(start[until], 11) if year == 0 else 0
        return (sum(each) + waiting) / 12
    found = wealth(bets, time)
    for until in (0, 5, 300, 899): assert found[until] == pytest.approx(max(stake(y, until) for y in range(3)))
    assert found[0] == pytest.approx(11 / 12 + bets[0].mean() / 12)

@pytest.mark.parametrize('expected', [.05, .2, .5])
def test_no_bet_gains_on_what_is_allowed(expected):
    "Coins that all fall together, at the bound: bets are fair; and the level holds whatever the dependence"
    most = expected * (1 + WORSE)
    fair = most * bet_on(np.array([1.]), expected) + (1 - most) * bet_on(np.array([0.]), expected)
    assert np.allclose(fair, 1) and (bet_on(np.array([0.]), expected) > 0).all() and fair.shape == (1, len(BETS))
    rng = np.random.default_rng(1)
    time = np.arange(700) * 86400 * 10**6 // 2
    high = [wealth(bet_on(rng.random(700) < most, expected), time).max() for _ in range(400)]
    assert np.mean(np.array(high) >= 10) <= .1 + 2 * (.1 * .9 / 400) ** .5

def test_drift_is_found_after_it_came_and_later_bars_change_nothing(journal, bars, panel, terms):
    m, _ = matured(journal, bars, terms)
    found = {(d['target'], d['horizon']): d for d in drift(m)}
    came = f'{panel.time[24 * 47]:%Y-%m-%dT%H:%M}Z'
    assert found['interval', 4]['alarm'] > came and found['volatility', 4]['alarm'] > came
    assert not found['direction', 4]['alarm'] and found['volatility', 24]['rounds'] == 35
    then, _ = matured(journal, bars, terms, now=panel.time[24 * 50])
    for d in drift(then):
        whole = found[d['target'], d['horizon']]
        assert d['path'] == pytest.approx(whole['path'][:len(d['path'])]) and 10 < len(d['path']) < len(whole['path'])
    calm = m[m.time < panel.time[24 * 46].value // 1000]
    assert not any(d['alarm'] for d in drift(calm))
    worse = [dict(target='return', horizon=4, model='ensemble', metric='coverage 80%', value=.5)]
    allowed = {(d['target'], d['horizon']): d for d in drift(m, worse)}
    assert allowed['interval', 4]['evidence'] < found['interval', 4]['evidence']
    assert allowed['interval', 24] == found['interval', 24]

# The book

def test_spells_against_a_slow_reading():
    rng = np.random.default_rng(2)
    ret, held = rng.normal(0, .01, (5, 90)), rng.random((5, 90)) < .6
    found = spells(ret, held)
    def longest(on): return max([len(list(g)) for k, g in groupby(on) if k], default=0)
    for i in range(5):
        equity = np.r_[1, np.cumprod(1 + ret[i])]
        best = np.maximum.accumulate(equity)
        assert found.under_water[i] == longest(equity[1:] < best[1:] * (1 - 1e-12))
        assert found.fall[i] == pytest.approx((1 - equity / best).max()) and found.silent[i] == longest(~held[i])

def test_less_belief_makes_longer_spells_plausible():
    rng = np.random.default_rng(3)
    judged = pd.DataFrame(dict(ret=rng.normal(.001, .01, 700), held=rng.random(700) < .9))
    some = [plausible(judged, believed=b, years=300) for b in (1., .5, 0.)]
    assert some[0].under_water < some[1].under_water < some[2].under_water
    assert some[0].fall < some[1].fall < some[2].fall and len({s.silent for s in some}) == 1
    assert plausible(judged, years=300, level=.5).under_water < some[1].under_water
    with pytest.raises(DataError, match='50 days of a judged book'): plausible(judged.iloc[:50])

def test_the_live_book_is_the_declared_one(journal, bars, panel, terms):
    m, whole = matured(journal, bars, terms)
    book = live_book(m, whole, terms)
    assert book.time[0] == panel.time[24 * 22 + 3] and (book.weights[:, 0] == 0).all()
    late = book.weights[:, -1]                                    # every other coin long, and the book neutral
    assert (late[::2] > 0).any() and (late[1::2] < 0).any() and abs(late.sum()) < .25 * np.abs(late).sum()
    days = days_of(book)
    assert np.prod(1 + days['ret']) == pytest.approx(book.equity[-1]) and days['held'].iloc[5:].all()

# Shadow, report, alerts

def two(loss, days=140, since='2024-01-01'):
    "Live and shadow over some days; the shadow's intervals are `loss` times as wide"
    rng = np.random.default_rng(4)
    time = np.repeat(pd.Timestamp(since, tz='UTC').value // 1000 + np.arange(6 * days) * 4 * 3_600_000_000, 3)
    y = np.repeat(rng.normal(size=6 * days), 3)[:, None] + .1 * rng.normal(size=(18 * days, 1))
    def model(wide):
        ends = np.tile(wide * np.array([-1.7, 1.7]), (len(y), 1, 1, 1))
        return Matured((24,), (.05, .5, .95), (.9,), pd.Timedelta('1h'), time, np.tile(np.arange(3), 6 * days),
                       {'return': ends, 'direction': np.full((len(y), 1, 3), 1 / 3)},
                       {'return': y, 'direction': np.full((len(y), 1), -1)}, np.full(len(y), -1))
    return model(2.), model(2. * loss)

def test_a_shadow_takes_over_by_its_rule_only():
    live, better = two(.5)
    found = promotion(live, better, '2024-01-01')
    assert found['promote'] and found['after'] == 60 and found['looks'] == [60, 90, 120] and found['gain'] > .2
    assert not promotion(better, live, '2024-01-01')['promote']
    late = promotion(live, better, '2024-03-25')                  # what was forecast before the declaration is nothing
    assert late['days'] == 55 and not late['promote'] and late['looks'] == []
    few = promotion(live[live.time % 2 == 0][::2], better[1::2], '2024-01-01')
    assert few['gain'] is None and not few['promote']
    with pytest.raises(DataError, match="no loss 'QLIKE'"): promotion(live, better, '2024-01-01', Rule(score='QLIKE'))
    strict = promotion(*two(.97), '2024-01-01')
    day = live.day
    a, b = two(.97)
    lost = [3.4 * w + 20 * np.maximum(np.abs(m.labels['return'][:, 0]) - 1.7 * w, 0)
            for m, w in ((a, 2.), (b, 1.94))]
    seen = day < day[0] + 90
    assert strict['p'][1] == pytest.approx(diebold_mariano(lost[1][seen], lost[0][seen], day[seen], 1.).better)

def test_rules_are_declared_before_and_once(tmp_path):
    journal = Journal(tmp_path)
    assert declared(journal, 'feb') is None
    declare(journal, '2024-02-01', 'feb', Rule(first=30))
    declare(journal, '2024-03-01', 'mar')
    assert declared(Journal(tmp_path), 'feb') == (pd.Timestamp('2024-02-01', tz='UTC'), Rule(first=30))
    with pytest.raises(DataError, match='stays'): declare(journal, '2024-02-02', 'feb')
    shadow_of(journal).record('2024-04-01', frame(0, 10), {}, 'apr')
    with pytest.raises(DataError, match='has forecast already'): declare(journal, '2024-04-02', 'apr')
    assert journal.files() == [] and journal.entries() == []
    with pytest.raises(DataError, match='a rule needs'): Rule(looks=0)
    (tmp_path/'declared.jsonl').write_text('{"model": "x"}\n')
    with pytest.raises(StateError, match='holds no rules'): declared(journal, 'feb')

def test_weights_are_refit_when_old_and_when_it_rings(terms):
    day = pd.Timestamp(terms.trained_until)
    assert not refit_due(terms, day + pd.Timedelta('29D'))['due']
    assert refit_due(terms, day + pd.Timedelta('31D'))['why'] == ['the weights have seen no bar of the last 31 days']
    assert refit_due(terms, day, ['drift: x']) == dict(due=True, age=0., why=['drift: x'])

def test_the_report_is_plain_and_says_what_is_wrong(journal, bars, panel, terms, tmp_path):
    judged = pd.DataFrame(dict(ret=np.full(100, .01) + np.tile([.001, -.001], 50), held=np.ones(100, bool)))
    report = health_report(journal, bars, terms, judged=judged)
    assert json.loads(json.dumps(report, allow_nan=False))['model'] == 'w'
    assert any(a.startswith('drift: volatility is higher than was said, at 4 bars') for a in report['alarms'])
    assert any(a.startswith('dry spell:') for a in report['alarms']) and report['refit']['due']
    assert report['missing'] == ['what validation promised is not in this state, which an earlier version saved: '
                                 'nothing is compared with it; train again']
    young = health_report(journal, None, terms, now=panel.time[24 * 22 + 12])         # nothing has matured
    assert young['figures'] == [] and young['alarms'] == [] and set(young['matured'].values()) <= {0, 6, 12}
    with pytest.raises(DataError, match='holds no decision yet'): health_report(Journal(tmp_path), bars, terms)

def test_what_the_terms_promise_goes_with_them(journal, bars, terms):
    "Everywhere and in a regime; and the days of the judged book, where they are enough"
    figure = dict(target='return', horizon=4, metric='coverage 90%', n=900)
    rows = [figure | dict(value=.87), figure | dict(value=.83, by='regime', part='RANGING')]
    days = dict(day=list(range(100)), ret=[.011, .009] * 50, held=[True] * 100)
    report = health_report(journal, bars, replace(terms, promises=dict(rows=rows, days=days)))
    def promised(rows): return {r.get('part'): r['promised'] for r in rows if {**r, **figure, 'n': r['n']} == r}
    assert promised(report['figures']) == {None: .87}
    by = promised(report['by_regime'])
    assert by.pop('RANGING', .83) == .83 and set(by.values()) <= {.87} and report['by_regime']
    assert any(a.startswith('dry spell:') for a in report['alarms']) and report['missing'] == []
    few = dict(rows=rows, days={k: v[:30] for k, v in days.items()})
    short = health_report(journal, bars, replace(terms, promises=few))
    assert short['missing'] == ['no dry spell can be told: 30 days of a judged book say little: give 60']
    assert short['book']['beyond'] == []

class Chat(BaseHTTPRequestHandler):
    code, said = 200, []
    def do_POST(self):
        self.said.append((self.path, json.loads(self.rfile.read(int(self.headers['Content-Length'])))))
        self.send_response(self.code)
        self.send_header('Location', '/elsewhere')
        self.end_headers()
    do_GET = do_POST
    def log_message(self, *_): pass

@pytest.fixture
def chat():
    server = HTTPServer(('127.0.0.1', 0), type('Own', (Chat,), dict(said=[])))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.RequestHandlerClass, f'http://127.0.0.1:{server.server_port}/bot-SECRET'
    server.shutdown()
    server.server_close()

def test_an_alert_goes_out_once_an_hour(chat):
    handler, url = chat
    alerts, now = Alerts(url, chat_id='7'), pd.Timestamp('2024-01-01', tz='UTC')
    minutes = [('a', 0, True), ('a', 59, False), ('b', 59, True), ('a', 60, True), ('a', 61, False)]
    for kind, m, sent in minutes: assert alerts.send(kind, kind * 3000, now + pd.Timedelta(minutes=m)) is sent
    assert [path for path, _ in handler.said] == ['/bot-SECRET'] * 3
    assert all(x['text'] == x['content'] and len(x['text']) == 1900 and x['chat_id'] == '7' for _, x in handler.said)

@pytest.mark.parametrize('code', [302, 307, 404, 500])
def test_an_alert_that_is_refused_harms_nobody(chat, code, caplog):
    handler, url = chat
    handler.code = code
    with caplog.at_level(logging.DEBUG): assert Alerts(url).send('a', 'text', '2024-01-01') is False
    assert len(handler.said) == 1 and f'answered {code}' in caplog.text and 'SECRET' not in caplog.text

def test_no_alert_ever_raises_or_tells_the_address(caplog):
    silent = socket.create_server(('127.0.0.1', 0))               # takes the call and never answers
    closed = socket.create_server(('127.0.0.1', 0))
    ports = [s.getsockname()[1] for s in (silent, closed)]
    closed.close()
    addresses = [f'http://127.0.0.1:{p}/SECRET' for p in ports] + ['http://[SECRET', 'https://SECRET host/', 'http://']
    with caplog.at_level(logging.DEBUG):
        for url in addresses: assert Alerts(url, timeout=.2).send('a', 'x', '2024-01-01') is False
        assert Alerts(addresses[0]).send('a', 'x', 'no time') is False
    silent.close()
    assert caplog.text.count('was not sent') == 6 and 'SECRET' not in caplog.text + repr(Alerts(addresses[0]))
    with pytest.raises(DataError) as e: Alerts('ftp://SECRET')
    assert 'SECRET' not in str(e.value)
