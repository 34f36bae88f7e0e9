"""The whole way: a bot that follows `next_weights` with an account of its own makes the book that was judged

The account below is written for this test alone: units, cash and orders at the next open, in plain Python.
"""
import copy, os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from examples import untrained
from cryptoml.combined import save_combined, weigh
from cryptoml.data import PRICES, DataError, read_panel, to_panel
from cryptoml.integration import UltimateTradingAI, with_its_ledger
from cryptoml.newest import Prediction, Snapshot
from cryptoml.ppo import Training
from cryptoml.sizer import PPO, Sizer
from cryptoml.simulate import simulate
from cryptoml.state import StateError
from cryptoml.study import Study
from cryptoml.training import judge
from cryptoml.verdict import OWN

pytestmark = pytest.mark.usefixtures('one_thread')

@dataclass
class Paper:
    "An account on paper"
    side: float              # Cost of a trade, fraction of its value
    borrow: float            # Of a short, a bar
    cash: float = 1.

    def __post_init__(self): self.units, self.last, self.orders = {}, {}, {}

    def open(self, prices, funding):
        "A bar opens: funding and interest are paid, then the orders of the last close are filled"
        self.last |= prices
        for coin, price in self.last.items():                          # a coin without a bar is held on, and paid for
            value = self.units.get(coin, 0.) * price
            rate = funding.get(coin)
            self.cash -= max(-value, 0.) * self.borrow if rate is None else value * rate
        equity = self.equity(self.last)
        for coin, weight in self.orders.items():
            if coin not in prices: continue
            change = weight * equity / prices[coin] - self.units.get(coin, 0.)
            self.units[coin] = self.units.get(coin, 0.) + change
            self.cash -= change * prices[coin] + abs(change) * prices[coin] * self.side
        self.orders = {}
        return self.equity(self.last)

    def equity(self, prices): return self.cash + sum(u * prices[c] for c, u in self.units.items())

    def weights(self, prices):
        equity = self.equity(prices)
        return {c: u * prices[c] / equity for c, u in self.units.items()}

@dataclass
class Desk:
    study: Study
    ai: UltimateTradingAI
    plans: dict
    bars: pd.DataFrame
    funding: pd.DataFrame | None
    intervals: dict = field(default_factory=dict)     # Of coin and close, as `predict` said them

def desk_of(bars, tmp, monkeypatch, funding=None, horizons=(4, 24), further=None, config=None, **declared):
    "With a network that was never trained: what it and the others say is judged like any other, and not refit"
    monkeypatch.setenv('CRYPTOML_LEDGER', str(tmp/'ledger.jsonl'))
    study = Study.of(to_panel(bars), horizons, funding=funding, **declared)
    f = weigh([untrained(study)], study.inputs, study.targets, study.parts)[0]
    judged = judge(f, f, study, most=8, further=further)
    f = replace(f, bands=copy.deepcopy(judged.test.before))                     # as a model that was judged is shipped
    ai = UltimateTradingAI(dict(act_on='FAIL', horizons=list(horizons)) | (config or {}), device='cpu')
    ai.snapshot = Snapshot(f, judged.terms, agent=further[PPO].agent if further else None)
    return Desk(study, ai, judged.test.plans, bars, funding), judged

def as_said(desk, t):
    "What `predict` would have said at the close of bar t, had it said exactly what was judged"
    panel, plan, horizons = desk.study.panel, desk.plans[OWN], list(desk.study.targets.horizons)
    score = plan.score
    close = (panel.time[t] + panel.timeframe).isoformat()
    said = {}
    for n, symbol in enumerate(panel.symbols):
        if not panel.mask[n, t]: continue
        nothing = dict.fromkeys(Prediction.__annotations__) | dict(
            symbol=symbol, data_time=close, horizons=horizons, in_sample=False, notes=[])
        if np.isnan(score[n, t]):
            said[symbol] = nothing | dict(faults=['silent'])
            continue
        said[symbol] = nothing | dict(
            faults=[], price=float(panel['close'][n, t]), direction=[dict(DOWN=.3, SIDEWAYS=.1, UP=.6)] * len(horizons),
            interval_levels=[.8, .9], intervals=[[[-.1, .1]] * 2] * len(horizons), regime=dict(BULL=1.),
            volatility=[.01] * len(horizons),
            sigma=float(desk.study.targets.sigma[n, t]), beta=float(desk.study.beta[n, t]), score=float(score[n, t]),
            correlation={k: float(v) for k, v in zip(panel.symbols, plan.correlation[n, :, t]) if np.isfinite(v)},
            confidence=.6, rarity=1.)
    return said

def follow(desk, first, last, predicted=None):
    "Equity at each open of a bot that asks for the step at every close"
    study, panel = desk.study, desk.study.panel
    opens, closes = panel['open'], panel['close']
    bar = panel.timeframe / pd.Timedelta('365D')
    paper = Paper(study.costs.side, study.costs.borrow * bar)
    funded = ~np.isnan(study.funding).all(1)
    equity, marks = [], {}
    for t in range(first, last):
        now = panel.time[t] + panel.timeframe
        there = np.flatnonzero(panel.mask[:, t])
        due = {panel.symbols[n]: float(np.nan_to_num(study.funding[n, t])) for n in range(len(funded)) if funded[n]}
        equity.append(paper.open({panel.symbols[n]: opens[n, t] for n in there}, due))
        marks |= {panel.symbols[n]: closes[n, t] for n in there}
        if predicted is None: desk.ai._said |= {k: (p, desk.ai.snapshot) for k, p in as_said(desk, t).items()}
        elif not predicted(now): continue
        step = desk.ai.next_weights(paper.weights(marks), paper.equity(marks), now)
        paper.orders |= {k: w for k, w in step.items() if w is not None}
    return np.array(equity)

def holed(bars):
    "Some hours and half a week of one coin are missing"
    rng = np.random.default_rng(0)
    gone = rng.random(len(bars)) < .003
    hour = bars.time.rank(method='dense')
    return bars[~gone & ~((bars.symbol == bars.symbol.iloc[-1]) & hour.between(3900, 3980))]

def rates(bars):
    time = bars.time.drop_duplicates()
    time = time[time.dt.hour % 8 == 0]
    rate = np.random.default_rng(1).normal(1e-4, 2e-4, len(time))
    return pd.DataFrame(dict(time=time, known=time, symbol='BTC/USDT', funding_rate=rate))

@pytest.mark.parametrize('declared, gaps, funded', [
    (dict(book='timing'), False, False),
    (dict(book='timing'), False, True),
    (dict(book='timing'), True, False),
    (dict(book='relative'), False, True),
    (dict(book='relative'), True, False),
    (dict(book='relative', long_only=True), True, True),
], ids=str)
def test_equal_forecasts_make_the_judged_book(tmp_path, monkeypatch, declared, gaps, funded):
    bars = simulate(n_symbols=4, n_bars=4000, seed=5).bars
    if gaps: bars = holed(bars)
    desk, judged = desk_of(bars, tmp_path, monkeypatch, rates(bars) if funded else None, **declared)
    test = desk.study.bars('test')
    book = judged.test.books[OWN]
    assert book.turnover.sum() > .5 and book.costs.sum() > 0
    assert np.abs(book.funding).sum() > 0                             # funding, or interest for shorts
    made = follow(desk, test.start, test.stop)
    np.testing.assert_allclose(made, book.equity, rtol=0, atol=1e-9)

def test_an_odd_bar_of_one_coin_leaves_the_others_their_book(tmp_path, monkeypatch):
    "It keeps what it has, as in the judged book; a model that is old, or was trained on the bar, stops them all"
    desk, judged = desk_of(simulate(n_symbols=3, n_bars=4000, seed=5).bars, tmp_path, monkeypatch)
    at = desk.study.bars('test').start + np.flatnonzero(desk.study.decide()[desk.study.bars('test')])
    whole = next(t for t in at if np.isfinite(desk.plans[OWN].score[:, t]).all())
    said, now = as_said(desk, whole), desk.study.panel.time[whole] + desk.study.panel.timeframe
    odd, *others = said
    def step(changed, terms=judged.terms):
        desk.ai._decided, desk.ai.snapshot = None, replace(desk.ai.snapshot, terms=terms)
        desk.ai._said = {k: (p | changed.get(k, {}), desk.ai.snapshot) for k, p in said.items()}
        return desk.ai.next_weights({}, 1., now)
    assert all(w is not None for w in step({}).values())
    w = step({odd: dict(rarity=0.)})
    assert w[odd] is None and all(w[k] is not None for k in others)
    nothing = dict.fromkeys(said)
    assert step({k: dict(in_sample=True) for k in said}) == nothing
    assert step({}, replace(judged.terms, data_until='2020-01-01T00:00:00+00:00')) == nothing

def through_predict(desk, first, hours):
    "The same through `predict`, on the bars that a bot would have"
    need = (desk.ai.snapshot.need + 210) * desk.study.panel.timeframe
    every, begin = desk.study.policy.every, desk.study.panel.time[first]
    def predicted(now):
        "Every hour of the first day; later only where a decision is due, to save time"
        if now.hour % every and now > begin + pd.Timedelta('1D'): return False
        seen = desk.bars[(desk.bars.time < now) & (desk.bars.time >= now - need)]
        known = None if desk.funding is None else desk.funding[desk.funding.known <= now]
        said = desk.ai.predict_sync(seen, now=now, funding=known)
        desk.intervals |= {(k, p['data_time']): p['intervals'] for k, p in said.items() if p['intervals']}
        return True
    return follow(desk, first, first + hours, predicted)

def same_intervals(desk, judged, hours):
    "A bot that learns from the labels of its own bars says the intervals that were judged"
    panel, test = desk.study.panel, judged.test
    first, seen = desk.study.bars('test').start, 0
    for s, (n, t) in enumerate(zip(test.sample.coin, test.sample.bar)):
        said = desk.intervals.get((panel.symbols[n], (panel.time[t] + panel.timeframe).isoformat()))
        if said is None or t >= first + hours: continue
        np.testing.assert_allclose(said, test.said[OWN]['return'][s], rtol=1e-5)
        seen += 1
    learnt = desk.ai.snapshot.forecaster.bands.each[0].scores
    assert seen > hours / 8 and sum(len(t.came) for tails in learnt for t in tails) > \
        sum(len(t.came) for tails in judged.test.before.each[0].scores for t in tails)

@pytest.mark.parametrize('coins, bars, kind', [(3, 4800, 'timing'), (6, 4200, 'relative')])
def test_the_readme_loop_makes_the_judged_book(tmp_path, monkeypatch, coins, bars, kind):
    "And abstains where the judged book did"
    desk, judged = desk_of(simulate(n_symbols=coins, n_bars=bars, seed=7).bars, tmp_path, monkeypatch)
    assert desk.study.book.kind == judged.terms.declared.kind == kind
    first, hours = desk.study.bars('test').start, 24 * 8
    made, book = through_predict(desk, first, hours), judged.test.books[OWN]
    assert judged.test.odd[judged.test.sample.bar < first + hours].any()
    assert book.turnover[:hours].sum() > .1
    np.testing.assert_allclose(made, book.equity[:hours], rtol=0, atol=1e-4)
    same_intervals(desk, judged, hours)

# ---- an agent that sizes positions

def sized_desk(tmp, monkeypatch, coins=3, bars=4800):
    pytest.importorskip('stable_baselines3', reason="pip install 'cryptoml[rl]'")
    further = {PPO: Sizer(Training(steps=8192, lanes=16, rollout=32, batch=256))}
    data = simulate(n_symbols=coins, n_bars=bars, seed=7).bars
    return desk_of(data, tmp, monkeypatch, further=further, config=dict(size_from=PPO))

def test_a_bot_that_follows_the_agent_makes_its_judged_book(tmp_path, monkeypatch):
    "From the bars to the order: what the agent sees live is what it saw in the backtest, field by field"
    desk, judged = sized_desk(tmp_path, monkeypatch)
    first, hours = desk.study.bars('test').start, 24 * 8
    made, book = through_predict(desk, first, hours), judged.test.books[PPO]
    assert book.turnover[:hours].sum() > .1
    np.testing.assert_allclose(made, book.equity[:hours], rtol=0, atol=1e-4)
    other = judged.test.books[OWN]
    assert np.abs(made - other.equity[:hours]).max() > 1e-3              # the check can fail: another book is another

def test_a_signal_of_the_agent(tmp_path, monkeypatch):
    desk, judged = sized_desk(tmp_path, monkeypatch)
    ai, panel = desk.ai, desk.study.panel
    word = judged.terms.further[PPO]
    now = panel.time[-1] + panel.timeframe
    ai.predict_sync(desk.bars, now=now)
    targets = ai.target_weights(now)
    said = {k: ai.get_trading_signal(k, 0., now) for k in targets}
    assert {k: s['target'] for k, s in said.items() if s['target'] is not None}.items() <= targets.items()
    of_agent = f'its size is that of the agent, whose book was judged {word}'
    assert all(of_agent in s['reasoning'] for s in said.values() if s['why'] in (None, 'agent', 'no position'))
    assert any(s['why'] in (None, 'agent') for s in said.values())
    plain = replace(ai.snapshot, agent=None)
    own = UltimateTradingAI(dict(act_on='FAIL', horizons=[4, 24]), device='cpu')
    own.snapshot = plain
    own.predict_sync(desk.bars, now=now)
    assert own.target_weights(now) != targets

def test_an_agent_goes_with_its_model(tmp_path, monkeypatch):
    "Saved and loaded in one generation; what was not judged is refused, and what was judged FAIL holds"
    desk, judged = sized_desk(tmp_path, monkeypatch)
    ai, state = desk.ai, tmp_path/'state'
    now = desk.study.panel.time[-1] + desk.study.panel.timeframe
    ai.predict_sync(desk.bars, now=now)
    targets = ai.target_weights(now)
    ai.save_state(state)
    again = UltimateTradingAI(dict(act_on='FAIL', size_from=PPO), device='cpu')
    again.load_state(state)
    again.predict_sync(desk.bars, now=now)
    assert again.target_weights(now) == targets
    s = ai.snapshot
    def saved(name, **changed):
        ai.snapshot = replace(s, **changed)
        ai.save_state(tmp_path/name)
        return tmp_path/name
    with pytest.raises(StateError, match="has no agent.*size_from='ppo'"): again.load_state(saved('none', agent=None))
    with pytest.raises(StateError, match='was not judged'):
        again.load_state(saved('unjudged', terms=replace(s.terms, further={})))
    assert again.target_weights(now) == targets                          # the one that was loaded stays
    strict = UltimateTradingAI(dict(size_from=PPO), device='cpu')
    strict.load_state(saved('failed', terms=replace(s.terms, verdict='PASS', further={PPO: 'FAIL'})))
    strict.predict_sync(desk.bars, now=now)
    assert {strict.get_trading_signal(k, 0., now)['why'] for k in targets} == {'judged'}

COINS = ['BTCUSDT', 'ETHUSDT', 'BNBUSDT', 'XRPUSDT', 'ADAUSDT']

@pytest.mark.parametrize('funded', [False, True])
def test_on_five_real_coins(tmp_path, monkeypatch, funded):
    if 'CRYPTOML_DATA' not in os.environ: pytest.skip('CRYPTOML_DATA is not set: real data absent')
    panel, _ = read_panel(Path(os.environ['CRYPTOML_DATA'])/'spot_1h.parquet', COINS, '2023-07-01', '2024-06-30')
    bars = panel.frame()
    desk, judged = desk_of(bars, tmp_path, monkeypatch, rates(bars) if funded else None)
    test, book = desk.study.bars('test'), judged.test.books[OWN]
    made = follow(desk, test.start, test.stop)
    np.testing.assert_allclose(made, book.equity, rtol=0, atol=1e-9)
    desk.ai._decided = None
    made = through_predict(desk, test.start, 24 * 4)
    np.testing.assert_allclose(made, book.equity[:len(made)], rtol=0, atol=1e-4)

def test_a_faster_bot_makes_another_book(tmp_path, monkeypatch):
    "The check can fail: jumping to the target at every hour is not what was judged"
    desk, judged = desk_of(simulate(n_symbols=3, n_bars=4200, seed=5).bars, tmp_path, monkeypatch)
    fast = replace(desk.ai.snapshot.terms, policy=desk.ai.snapshot.terms.policy | dict(rate=1.))
    desk.ai.snapshot = replace(desk.ai.snapshot, terms=fast)
    test = desk.study.bars('test')
    made = follow(desk, test.start, test.stop)
    assert np.abs(made - judged.test.books[OWN].equity).max() > 1e-4

# ---- who is a coin of the model

def test_a_stable_coin_and_a_late_one_are_left_out_and_said(tmp_path, monkeypatch):
    bars = simulate(n_symbols=2, n_bars=4200, seed=5).bars
    one = bars[bars.symbol == bars.symbol.iloc[0]]
    stable = one.assign(symbol='USDC/USDT')
    for column in PRICES: stable[column] = 1 + (one[column] / one[column].iloc[0] - 1) / 1000
    late = one[one.time > one.time.iloc[3000]].assign(symbol='NEW/USDT')
    desk, judged = desk_of(pd.concat([bars, stable, late]), tmp_path, monkeypatch)
    assert desk.study.panel.symbols == judged.terms.symbols == sorted(bars.symbol.unique())
    now = bars.time.max() + pd.Timedelta('1h')
    with pytest.raises(DataError, match='USDC/USDT is not a coin of this model.*moves less'):
        desk.ai.predict_sync(desk.bars, 'USDC/USDT', now)
    with pytest.raises(DataError, match='NEW/USDT is not a coin of this model.*bars of train'):
        desk.ai.predict_sync(desk.bars, 'NEW/USDT', now)
    assert set(desk.ai.predict_sync(desk.bars, now=now)) == set(judged.terms.symbols)

def test_daily_bars_of_two_years_are_refused_before_they_are_trained():
    bars = simulate(n_symbols=2, n_bars=730, seed=5, timeframe='1d').bars
    with pytest.raises(DataError, match='history too short.*Needed are'): Study.of(to_panel(bars))

def test_a_coin_of_daily_bars_that_could_never_be_predicted_is_not_trained():
    "It was trained on and judged, and each prediction of it said that there was too little history"
    bars = simulate(n_symbols=3, n_bars=1900, seed=5, timeframe='1d').bars
    young = (bars.symbol == 'ETH/USDT') & (bars.time < bars.time.min() + pd.Timedelta('800D'))
    study = Study.of(to_panel(bars[~young]))
    assert study.panel.symbols == ['BTC/USDT', 'SHIB/USDT']
    assert study.left_out == {'ETH/USDT': '1100 bars of history, a forecast of its newest bar needs 1685 (4.6 years): '
                                          'give more of it, or shorter bars'}
    with pytest.raises(DataError, match='give more history, or shorter bars .*of 4h a forecast needs 281 days'):
        Study.of(to_panel(bars[bars.time >= bars.time.min() + pd.Timedelta('400D')]))

# ---- a word is worth its ledger

def test_a_pass_without_its_ledger_is_none(tmp_path, monkeypatch):
    desk, judged = desk_of(simulate(n_symbols=2, n_bars=4200, seed=5).bars, tmp_path, monkeypatch)
    passed = replace(judged.terms, verdict='PASS')
    save_combined(desk.ai.snapshot.forecaster, tmp_path/'state', terms=asdict(passed))
    def word():
        ai = UltimateTradingAI(dict(state_dir=str(tmp_path/'state')), device='cpu')
        ai.load_state()
        return ai.live().terms.verdict
    assert word() == 'PASS'
    headless = replace(passed, trials=passed.trials | dict(head=''))
    assert with_its_ledger(passed) == passed
    with pytest.warns(UserWarning): assert with_its_ledger(headless).verdict == 'INCONCLUSIVE'
    lines = (tmp_path/'ledger.jsonl').read_text()
    edited = lines.replace('"returns": [', '"returns": [0.0, ', 1)
    (tmp_path/'ledger.jsonl').write_text(edited)
    with pytest.warns(UserWarning, match='trials cannot be seen here'): assert word() == 'INCONCLUSIVE'
    for p in tmp_path.glob('ledger.jsonl*'): p.unlink()                # taken away
    with pytest.warns(UserWarning, match='does not hold the line'): assert word() == 'INCONCLUSIVE'
    (tmp_path/'ledger.jsonl').write_text(lines)                        # brought back, without the .head beside it
    with pytest.warns(UserWarning): assert word() == 'INCONCLUSIVE'
