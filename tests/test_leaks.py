"""Fifteen leaks over the whole path: each planted somewhere between bars and book, and found; without it all is equal

A walk takes a market from its bars to its verdict (`read_panel`, `Study.of`, `train_and_judge`) and states what it
read, fitted, said and traded, and when. Another walk has the same market until a moment and another one from then on:
nothing stated until then may differ. A leak is a frame that leaks, or one function in the place of another.

| # | leak | planted in | found by |
|---|---|---|---|
| 1 | centred window, back-fill | an own column, known too early | inputs, forecasts and book change |
| 2 | scale, components, selection of all data | `Scaler.fit`, `familiar_of`, `make_inputs` | what was fitted changes |
| 3 | a window scaled with its forecast part | `Windows.batch` | forecasts and scores change |
| 4 | a target that the decoder knows | `Forecaster.windows` | forecasts and book change |
| 5 | no purge | `cut_fold` | what was fitted before the test changes |
| 6 | a fill at the close that decided it | `trade` | a jump between close and open is earned by the new position |
| 7 | a level regression | a forecast of the price | no gain in the report's line over persistence |
| 8 | on-chain values on their own day, early, or revised | the frame | a sentence; inputs, forecasts and book change |
| 9 | news by the time of the event | an own column | inputs, forecasts and book change |
| 10 | a graph of the whole sample | `relate` | forecasts and book change |
| 11 | settings chosen on the test | `find` | what was found and traded changes |
| 12 | survivors only | the bars | the list of the day: who is neither a coin nor named |
| 13 | a regime of a two-sided smoother | `regime` | what persistence says changes |
| 14 | resampling labelled on the left edge | an own column | inputs, forecasts and book change |
| 15 | a merge off by one bar | an own column | inputs, forecasts and book change |
"""
import contextlib, io, sys
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest, torch

from cryptoml import combined, forecaster
from cryptoml.combined import blend_arrays
from cryptoml.data import PRICES, DataError, read_panel
from cryptoml.forecaster import Forecaster, ForecasterConfig
from cryptoml.members import LINES, member_arrays
from cryptoml.newest import Snapshot, predict_newest
from cryptoml.simulate import simulate
from cryptoml.study import Study
from cryptoml.books import trade
from cryptoml.training import Trained, train_and_judge
from cryptoml.targets import regime
from cryptoml.verdict import OWN, Comparison, gain_table
from cryptoml.windows import Scaler, Windows

HOUR = pd.Timedelta('1h')
CONFIG = ForecasterConfig(horizons=(4, 12), epochs=1)

class World(NamedTuple):
    "A market and all that is known beside its bars"
    bars: pd.DataFrame
    onchain: pd.DataFrame    # Every day twice: as it was first published, and as it was revised two days later
    funding: pd.DataFrame
    news: pd.DataFrame       # `time` is that of the event, `known` that of its publication, up to 36 hours later
    sentiment: pd.DataFrame  # Scored texts, likewise

def world(seed, often) -> World:
    "Bars of three months, and on-chain values of the three months before them too"
    m, rng = simulate(n_symbols=4, n_bars=4488, seed=seed), np.random.default_rng(seed)
    bars, extra = (rows[rows.time >= m.bars.time.min() + 2232 * HOUR] for rows in (m.bars, m.extra))
    first = m.onchain.assign(AdrActCnt=m.onchain.AdrActCnt * np.exp(rng.normal(0, .1, len(m.onchain))))
    revised = m.onchain.assign(known=m.onchain.known + pd.Timedelta('2D'))
    events = extra[rng.random(len(extra)) < often]
    delay = rng.integers(6, 36, len(events)) * HOUR
    news = events[['time', 'symbol']].assign(known=events.time + delay, tone=events.noise_1)
    texts = m.sentiment.assign(known=m.sentiment.time + rng.integers(6, 36, len(m.sentiment)) * HOUR)
    return World(bars, pd.concat([first, revised]), m.funding, news, texts)

BESIDE = 'onchain', 'funding', 'news', 'sentiment'

OURS, THEIRS = world(5, often=.15), world(6, often=.05)
BEGIN_TEST = OURS.bars.time.max() + HOUR - pd.Timedelta('20D')
MID_TEST = BEGIN_TEST + pd.Timedelta('10D')

pytestmark = pytest.mark.usefixtures('one_thread')

# ---- another future

def bars_with(ours, theirs, moment):
    "Their bars go on where our last close is"
    early = (ours.time + HOUR <= moment).to_numpy()
    level = ours[early].groupby('symbol').close.last() / theirs[early].groupby('symbol').close.last()
    later = theirs[~early]
    scale = later.symbol.map(level)
    return pd.concat([ours[early], later.assign(**{c: later[c] * scale for c in PRICES})])

def another_future(moment) -> World:
    "What was known until a moment is ours, and everything after it theirs"
    def rows(a, b): return pd.concat([a[a.known <= moment], b[b.known > moment]])
    beside = {k: rows(getattr(OURS, k), getattr(THEIRS, k)) for k in BESIDE}
    return World(bars_with(OURS.bars, THEIRS.bars, moment), **beside)

def until(w: World, moment) -> World:
    "What there is at a moment"
    beside = {k: getattr(w, k)[lambda rows: rows.known <= moment] for k in BESIDE}
    return World(w.bars[w.bars.time + HOUR <= moment], **beside)

# ---- what a user brings along

def four_hours(g, label):
    "Close of the last bar of four hours, by the time that it is labelled with"
    bars = g.set_index('time').close.resample('4h', label=label).last()
    return bars.reindex(g.time + HOUR, method='ffill').to_numpy() / g.close - 1

def moves(g, stamp):
    "Moves of bars, merged by a stamp"
    return g.close.pct_change().set_axis(g.time + stamp).reindex(g.time).to_numpy()

OWN_COLUMNS = dict(
    mean=lambda g: g.close / g.close.rolling(25).mean() - 1,
    daily=lambda g: g.close.where(g.time.dt.hour == 23).ffill() / g.close - 1,
    four_hours=lambda g: four_hours(g, 'right'),
    merged=lambda g: moves(g, 0 * HOUR),
)

def own(w: World, **leaking) -> pd.DataFrame:
    "Columns that a user made of the bars, each said to be known at the close of its bar"
    columns = OWN_COLUMNS | leaking
    coins = [g.sort_values('time') for _, g in w.bars.groupby('symbol')]
    made = [g[['time', 'symbol']].assign(known=g.time + HOUR, **{k: f(g) for k, f in columns.items()}) for g in coins]
    return pd.concat(made)

def as_it_came(frame): return frame

# ---- the whole path

class Walk(NamedTuple):
    study: Study
    trained: Trained

def unfitted(f, w, epoch, validate, settings, out, device):
    "A training without an epoch: everything but the steps of the optimiser"
    loss = np.nan if validate is None else validate(f.network)['loss']
    return pd.DataFrame(dict(epoch=[1], valid_loss=[loss], lr=[3e-3]))

def walk(w: World, out, extra=own, days=as_it_came, texts=None, steps=False) -> Walk:
    "From bars to verdict; without `steps` the networks stay as they began, and some members are missing: a quick one"
    with pytest.MonkeyPatch.context() as m, contextlib.redirect_stdout(io.StringIO()):
        m.setattr('cryptoml.training.importance', lambda *_: pd.Series(dtype=float))
        if not steps:
            m.setattr('cryptoml.forecaster.fit', unfitted)
            m.setitem(sys.modules, 'lightgbm', None)
            m.delitem(LINES, 'logistic')
        panel, _ = read_panel(w.bars)
        scored = {} if texts is None else dict(sentiment=texts(w.sentiment))
        study = Study.of(panel, CONFIG.horizons, test='20D', book='relative',
                         extra=extra(w), onchain=days(w.onchain), funding=w.funding, **scored)
        return Walk(study, train_and_judge(study, CONFIG, out, 'cpu', fresh=False))

# ---- what was stated, and when

def fitted(model) -> dict[str, np.ndarray]:
    "All numbers of a model"
    weights = torch.cat([p.detach().flatten() for f in model.networks for p in f.network.parameters()])
    members = [v.ravel() for member in model.members.values() for v in member_arrays(member).values()]
    return dict(
        inputs_chosen=np.array(model.names),
        scale=np.stack([model.first.scaler.center, model.first.scaler.scale]),
        network=weights.numpy(),
        members=np.concatenate(members),
        shares=np.concatenate([v.ravel() for v in blend_arrays(model.blend).values()]),
        usual=np.concatenate([v.ravel() for v in vars(model.familiar).values()]),
    )

def statements(w: Walk) -> dict[str, tuple]:   # By name: when it was known, one time or one each [n]; values [n, ...]
    study, found, test = w.study, w.trained.found, w.trained.judged.test
    panel, targets = study.panel, study.targets
    opens, closes = panel.time, panel.time + panel.timeframe
    begins = {part: opens[study.bars(part).start] for part in study.parts}
    decided = pd.DatetimeIndex(test.time.view('M8[us]'), tz='UTC')
    here = study.bars('test')
    measured = [*test.gate.reach, *test.gate.book.usual, *(plan.policy.scale for plan in test.plans.values())]
    return (
        {'inputs': (closes, study.inputs.x.swapaxes(0, 1)),
         'risk': (closes, np.stack([targets.sigma.T, study.beta.T]).swapaxes(0, 1))}
        | {f'label {k}': (targets.known, v.swapaxes(0, 1)) for k, v in targets.fields.items()}
        | {f'found {k}': (begins['gate'], v) for k, v in fitted(found.model).items()}
        | {f'found loss {k}': (begins['gate'], h.valid_loss.to_numpy()) for k, h in enumerate(found.histories)}
        | {f'fitted {k}': (begins['test'], v) for k, v in fitted(w.trained.model).items()}
        | {'measured': (begins['test'], np.array(measured))}
        | {f'said {k} by {m}': (decided, f[k]) for m, f in test.said.items() for k in f if len(f[k]) == len(decided)}
        | {'said odd': (decided, test.odd)}
        | {'score': (closes[here], test.plans[OWN].score[:, here].T)}
        | {f'book {k}': (b.time, np.column_stack([b.equity, b.weights.T])) for k, b in test.books.items()}
    )

def same(a, b):
    "To the last digits, for the prices of another future are scaled"
    if a.shape != b.shape: return False
    return np.allclose(a, b, rtol=1e-9, atol=1e-12, equal_nan=True) if a.dtype.kind == 'f' else np.array_equal(a, b)

def changed(a: Walk, b: Walk, moment) -> list[str]:
    "What was stated until a moment and is not the same"
    ours, theirs = statements(a), statements(b)
    def stated(when, x): return x[np.broadcast_to(when <= moment, len(x))]
    return sorted(k for k in ours.keys() | theirs.keys()
                  if k not in ours or k not in theirs or not same(stated(*ours[k]), stated(*theirs[k])))

# ---- (a) the honest path

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return lambda: tmp_path_factory.mktemp('run')

@pytest.fixture(scope='module')
def honest(folder): return walk(OURS, folder())

@pytest.fixture(scope='module')
def trained(folder): return walk(OURS, folder(), steps=True)

def test_the_check_sees_everything(honest, folder):
    "Of two markets that have nothing in common every kind of statement differs, but for what these walks do not fit"
    other = walk(THEIRS, folder())
    left = {'inputs_chosen', 'network', 'odd', 'relative_direction by majority'}
    equal = set(statements(honest)) - set(changed(honest, other, OURS.bars.time.max()))
    assert {name.partition(' ')[2] for name in equal} <= left

def test_an_honest_path_says_the_same_whatever_comes(honest, folder):
    begin_gate = honest.study.panel.time[honest.study.bars('gate').start]
    for moment in (begin_gate, BEGIN_TEST, MID_TEST):
        assert changed(honest, walk(another_future(moment), folder()), moment) == []

def test_an_honest_path_trains_the_same_whatever_comes(trained, folder):
    "With steps of the optimiser, and trees"
    other = walk(another_future(BEGIN_TEST), folder(), steps=True)
    assert changed(trained, other, BEGIN_TEST) == []

def live_and_judged(w: Walk, moment, extra, more=()) -> tuple[np.ndarray, np.ndarray]:
    "Scores that a bot gets at a moment, of what there is by then, and those that were judged"
    now, panel = until(OURS, moment), w.study.panel
    model = Snapshot(w.trained.model, w.trained.judged.terms)
    sources = dict(onchain=now.onchain, funding=now.funding) | {k: getattr(now, k) for k in more}
    said = predict_newest(model, now.bars, None, moment, extra(now), sources)
    judged = w.trained.judged.test.plans[OWN].score[:, panel.time.get_loc(moment - HOUR)]
    return np.array([said[k]['score'] for k in panel.symbols], float), judged

def test_an_honest_path_says_live_what_was_judged(honest):
    for moment in (MID_TEST, MID_TEST + 40 * HOUR):
        np.testing.assert_allclose(*live_and_judged(honest, moment, own), atol=1e-5)

# ---- (b) leaks

def found_by(folder, moment=MID_TEST, **planted) -> set:
    "What changes until a moment, with a leak in the path"
    return set(changed(walk(OURS, folder(), **planted), walk(another_future(moment), folder(), **planted), moment))

READ, SPOKEN, DECIDED, TRADED = 'inputs', 'said relative by ensemble', 'score', f'book {OWN}'

@pytest.mark.parametrize('leak', [
    dict(mean=lambda g: g.close / g.close.rolling(25, center=True).mean() - 1),
    dict(daily=lambda g: g.close.where(g.time.dt.hour == 23).bfill() / g.close - 1),
], ids=['centred window', 'back-fill'])
def test_1_a_feature_that_looks_ahead(folder, leak):
    assert {READ, SPOKEN, TRADED} <= found_by(folder, MID_TEST + 8 * HOUR, extra=lambda w: own(w, **leak))

def scaled_by_all(x, rows, fit=Scaler.fit): return fit(x, np.isfinite(x).any(-1))

def best_inputs(panel, *args, make=forecaster.make_inputs, **sources):
    "Fifty inputs that go best with the next move, in the whole sample"
    inputs = make(panel, *args, **sources)
    ahead = np.diff(np.log(panel['close'])).ravel()
    x = np.nan_to_num(inputs.x[:, :-1].reshape(len(ahead), -1).astype(float))
    x = x - x.mean(0)
    score = abs(ahead @ x) / np.maximum(np.sqrt((x ** 2).sum(0)), 1e-12)
    return inputs.take([inputs.names[j] for j in np.argsort(-score)[:50]])

def look_of_all(f, inputs, usual, after, familiar=combined.familiar_of):
    return familiar(f, inputs, usual=combined.decisions(f, inputs, np.ones(len(inputs.panel.time), bool)), after=after)

@pytest.mark.parametrize('where, leak, seen', [
    ('cryptoml.forecaster.Scaler.fit', scaled_by_all, 'found scale'),
    ('cryptoml.combined.familiar_of', look_of_all, 'found usual'),
    ('cryptoml.study.make_inputs', best_inputs, 'found inputs_chosen'),
], ids=['scale', 'components', 'selection'])
def test_2_fitted_on_all_data(folder, monkeypatch, where, leak, seen):
    monkeypatch.setattr(where, leak)
    assert seen in found_by(folder)

def scaled_with_its_answer(self, date, windows=1, apart=1, batch=Windows.batch):
    "Each window less the mean of its bars and of those that are to be forecast"
    b = batch(self, date, windows, apart)
    both = date[:, None] + torch.arange(1 - self.lookback, 1 + self.steps * self.stride)
    mean = self.past[:, both.clamp(max=self.past.shape[1] - 1)].mean(2, keepdim=True)          # [N, D, 1, F]
    return b | dict(past=b['past'] - mean.transpose(0, 1))

def test_3_a_window_that_is_scaled_with_its_own_forecast_part(folder, monkeypatch):
    monkeypatch.setattr(Windows, 'batch', scaled_with_its_answer)
    assert {SPOKEN, DECIDED} <= found_by(folder)

def windows_with_the_answer(self, inputs, labels=None, windows=Forecaster.windows):
    "The decoder is told how the market moves, where it should be told the hour"
    w = windows(self, inputs, labels)
    w.future[:w.moves.shape[1], 0] = torch.nan_to_num(w.moves).mean(0)
    return w

def test_4_a_target_that_the_decoder_knows(folder, monkeypatch):
    monkeypatch.setattr(Forecaster, 'windows', windows_with_the_answer)
    assert {SPOKEN, TRADED} <= found_by(folder)

def cut_without_purge(time, known, start, test, valid, embargo, cut=forecaster.cut_fold):
    return cut(time, time, start, test, valid, pd.Timedelta(0))

def test_5_labels_that_overlap_the_boundary(folder, monkeypatch):
    monkeypatch.setattr('cryptoml.forecaster.cut_fold', cut_without_purge)
    assert {'fitted members', 'fitted shares'} <= found_by(folder, BEGIN_TEST)

def filled_at_the_close(study, *args, trade=trade, **kw):
    "The price of a fill is the close that decided it"
    panel = study.panel
    prices = panel.values.copy()
    prices[:, 1:, panel.columns.index('open')] = panel['close'][:, :-1]
    return trade(replace(study, inputs=replace(study.inputs, panel=replace(panel, values=prices))), *args, **kw)

def who_earned_a_jump(w: Walk, trade) -> tuple[float, float, float]:
    "What a jump of a tenth between a close and the next open earned; that of what was held before, and held after"
    panel, plan, here = w.study.panel, w.trained.judged.test.plans[OWN], w.study.bars('test')
    usual = trade(w.study, plan, 'test')
    held, after = usual.weights[:, :-1], usual.weights[:, 1:]
    n, k = np.unravel_index(np.abs(after - held).argmax(), held.shape)
    values = panel.values.copy()
    values[n, here.start + k + 1:, [panel.columns.index(c) for c in PRICES]] *= 1.1
    jumped = replace(w.study, inputs=replace(w.study.inputs, panel=replace(panel, values=values)))
    gain = trade(jumped, plan, 'test').returns - usual.returns
    return gain[k + 1:k + 3].sum(), held[n, k] / 10, after[n, k] / 10

def test_6_a_fill_at_the_close_that_decided_it(honest):
    (fair, before, after), (leaking, _, _) = (who_earned_a_jump(honest, t) for t in (trade, filled_at_the_close))
    step = abs(after - before)
    assert step > .0005
    assert fair == pytest.approx(before, abs=step / 10) and leaking == pytest.approx(after, abs=step / 10)

def level_regression(study, sample, horizon, train):
    "A line from prices to the price at the horizon, fitted to training; what it says, and what came"
    log = {k: np.log(study.panel[k]) for k in ('open', 'close')}
    past = [log['close'], *(pd.DataFrame(log['close'].T).rolling(n).mean().to_numpy().T for n in (6, 24))]
    x = np.stack([np.ones_like(log['close']), *past], -1)
    ahead = np.full_like(log['open'], np.nan)
    ahead[:, :-1 - horizon] = log['open'][:, 1 + horizon:]
    weights = np.linalg.lstsq(train.of(x), train.of(ahead), rcond=None)[0]
    return sample.of(x) @ weights, sample.of(log['close']), sample.of(ahead)

def in_the_report(c: Comparison, day) -> tuple[float, float]:
    "R2 of the judged forecast, and its gain over persistence as a share of what persistence leaves over"
    rows = c.rows(day, .95)
    r2 = {r['model']: r['value'] for r in rows if r['metric'] == 'R2' and r['over'] is None}
    gain = gain_table(rows).set_index('over').value['persistence']
    return r2[OWN], gain / (1 - r2['persistence'])

def test_7_a_level_regression_whose_r2_is_persistence(honest):
    "The report sets persistence beside every forecast: what is left of an R2 of .99 is nothing"
    study, test = honest.study, honest.trained.judged.test
    assert {'direction', 'regime', 'volatility'} <= {c.target for c in test.comparisons if 'persistence' in c.forecasts}
    train = combined.decisions(honest.trained.model.first, study.inputs, study.parts['train'])
    said, now, came = level_regression(study, test.sample, 12, train)
    def level(forecast): return Comparison('price', 12, 'number', came, {OWN: forecast, 'persistence': now}, .5)
    r2, more = in_the_report(level(now + .4 * (came - now)), test.day)      # one that knows something
    assert r2 > .99 and more == pytest.approx(1 - .6 ** 2)
    r2, more = in_the_report(level(said), test.day)
    assert r2 > .99 and more < .05

def own_day(days): return days.assign(known=days.time + pd.Timedelta('12h'))
def before_it_was_published(days): return days.assign(known=days.known - pd.Timedelta('12h'))

def as_revised(days):
    "The last value of each day, at the time at which the first one was published"
    by_day = days.sort_values('known').groupby(['asset', 'time'], as_index=False)
    return by_day.last().assign(known=by_day.first().known)

def test_8_daily_data_on_their_own_day(folder):
    with pytest.raises(DataError, match='known before their day is over'): walk(OURS, folder(), days=own_day)

@pytest.mark.parametrize('leak', [before_it_was_published, as_revised])
def test_8_on_chain_values_before_they_were_published(folder, leak):
    assert {READ, SPOKEN, TRADED} <= found_by(folder, MID_TEST + 8 * HOUR, days=leak)

def news(w: World): return w.news
def by_event(w: World): return w.news.assign(known=w.news.time)

def read(w: World, extra): return Study.of(read_panel(w.bars)[0], CONFIG.horizons, test='20D', extra=extra(w)).inputs.x

def test_9_news_by_publication_are_honest():
    x, y = (read(w, news)[:, :, -1] for w in (OURS, another_future(MID_TEST)))
    ends = (OURS.bars.time.drop_duplicates() + HOUR <= MID_TEST).sum()
    np.testing.assert_array_equal(x[:, :ends], y[:, :ends])

def test_9_news_by_the_time_of_the_event(folder):
    assert {READ, SPOKEN, TRADED} <= found_by(folder, extra=by_event)

def scored_by_event(texts): return texts.assign(known=texts.time)

def test_9_scored_texts_by_publication_are_honest(folder):
    mine, other = (walk(w, folder(), texts=as_it_came) for w in (OURS, another_future(MID_TEST)))
    assert 'sentiment_mean_24h' in mine.trained.model.names
    assert changed(mine, other, MID_TEST) == []
    np.testing.assert_allclose(*live_and_judged(mine, MID_TEST, own, ['sentiment']), atol=1e-5)

def test_9_scored_texts_by_the_time_of_the_event(folder):
    assert {READ, SPOKEN, TRADED} <= found_by(folder, MID_TEST + 8 * HOUR, texts=scored_by_event)

def of_the_whole_sample(time, close, relate=forecaster.relate):
    "The relations of all bars, in every month"
    month = relate(time, close)
    with np.errstate(invalid='ignore'): month[..., 0] = np.corrcoef(np.diff(np.log(close)))[..., None]
    return month

def test_10_a_graph_of_the_whole_sample(folder, monkeypatch):
    monkeypatch.setattr('cryptoml.forecaster.relate', of_the_whole_sample)
    assert {'said relative by network', SPOKEN, TRADED} <= found_by(folder)

def stopped_by_the_test(inputs, targets, parts, *args, find=combined.find):
    return find(inputs, targets, parts | dict(valid=parts['test']), *args)

def test_11_settings_chosen_on_the_reported_span(folder, monkeypatch):
    monkeypatch.setattr('cryptoml.training.find', stopped_by_the_test)
    assert {'found loss 0', 'found members', 'found shares', TRADED} <= found_by(folder)

def dying(w: World, symbol, moment) -> World:
    "A coin falls by four in a hundred an hour for three days, and is delisted"
    bars = w.bars
    hours = np.where(bars.symbol == symbol, (bars.time - moment) / HOUR, -1.)
    def fall(later): return np.exp(-.04 * np.maximum(hours + later, 0))
    fallen = {k: bars[k] * fall(later) for k, later in dict(open=0, high=0, low=1, close=1).items()}
    return w._replace(bars=bars.assign(**fallen)[hours < 72])

def listed(bars, moment) -> set: return set(bars.symbol[bars.time == moment])

def unnamed(w: World, study: Study) -> set:
    "Coins that were listed when the test began, and of which the study says nothing"
    return listed(w.bars, BEGIN_TEST) - {*study.panel.symbols, *study.left_out}

DOOMED = OURS.bars.symbol.max()
LATE, EARLY = (dying(OURS, DOOMED, BEGIN_TEST + pd.Timedelta(d)) for d in ('10D', '3D'))

def test_12_survivors_only(folder):
    today = listed(LATE.bars, LATE.bars.time.max())
    survivors = LATE._replace(bars=LATE.bars[LATE.bars.symbol.isin(today)])
    whole, biased = (walk(w, folder()) for w in (LATE, survivors))
    def hold(w): return w.trained.judged.test.books['hold'].equity[-1]
    assert hold(biased) > hold(whole) + .01
    assert unnamed(LATE, whole.study) == set() and DOOMED in whole.study.panel.symbols
    assert unnamed(LATE, biased.study) == {DOOMED}

def study_of(w: World) -> Study: return Study.of(read_panel(w.bars)[0], CONFIG.horizons, test='20D', book='relative')

def test_12_a_coin_that_is_not_judged_is_named():
    "It ends on the eve of the test"
    study = study_of(OURS)
    eve = study.panel.time[study.bars('test').start] - pd.Timedelta('2D')
    gone = OURS._replace(bars=OURS.bars[(OURS.bars.symbol != DOOMED) | (OURS.bars.time < eve)])
    assert unnamed(gone, study_of(gone)) == set()
    assert study_of(gone).left_out == {DOOMED: 'no bar on the day before the test'}

def test_12_who_is_judged_is_known_before_the_test():
    assert study_of(EARLY).panel.symbols == study_of(OURS).panel.symbols

def smoothed(panel, regime=regime):
    "The commonest regime of two days before and two days after"
    now = pd.DataFrame(regime(panel).T)
    votes = np.stack([(now == k).rolling(97, center=True, min_periods=1).sum() for k in range(4)])
    return np.where(now < 0, -1, votes.argmax(0)).T

def test_13_regimes_of_a_smoother_that_runs_both_ways(folder, monkeypatch):
    for where in ('cryptoml.targets.regime', 'cryptoml.combined.regime'): monkeypatch.setattr(where, smoothed)
    assert 'said regime by persistence' in found_by(folder)

def test_14_resampling_labelled_on_the_left_edge(folder):
    leak = dict(four_hours=lambda g: four_hours(g, 'left'))
    assert {READ, SPOKEN, TRADED} <= found_by(folder, extra=lambda w: own(w, **leak))

def test_15_a_merge_off_by_one_bar(folder):
    "The newest bar of a bot has no value there, so what it says live is not what was judged either"
    def leaking(w): return own(w, merged=lambda g: moves(g, -HOUR))
    a, b = (walk(w, folder(), leaking) for w in (OURS, another_future(MID_TEST)))
    assert {READ, SPOKEN, TRADED} <= set(changed(a, b, MID_TEST))
    live, judged = live_and_judged(a, MID_TEST, leaking)
    assert np.abs(live - judged).min() > 1e-4
