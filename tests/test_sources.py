"What a model reads beside its bars, as it comes: counted from when it was known, kept, and a HOLD where it is late"
import asyncio, copy, json, threading
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from cryptoml.combined import save_combined, weigh
from cryptoml.data import CANDLE, to_panel
from cryptoml.feeds import Feed, FeedError, Patience
from cryptoml.sources import Sources, news, own_rows
from cryptoml.forecaster import make_inputs
from cryptoml.hosts import Keeper, find_candles
from cryptoml.jobs import main
from cryptoml.answers import CommandError, load_ai
from cryptoml.parity import parity
from cryptoml.live import Live, Settings, sources_for
from cryptoml.simulate import simulate
from cryptoml.study import Study
from cryptoml.training import judge
from examples import near, untrained

ccxt = pytest.importorskip('ccxt')
from replay_exchange import replaying

pytestmark = pytest.mark.usefixtures('one_thread')
H, GRACE = pd.Timedelta('1h'), pd.Timedelta('2s')
BORN = 8000     # Bars before which a model is trained
KINDS = ('funding', 'onchain', 'extra')

@pytest.fixture(scope='module')
def world():
    w = simulate(n_symbols=2, n_bars=BORN + 100, seed=5)
    return replace(w, bars=w.bars[['time', 'symbol', *CANDLE]])                   # what ccxt gives

@pytest.fixture(scope='module')
def born(world): return world.bars.time.min() + BORN * H

@pytest.fixture
def exchange(world, born):
    with replaying(world.bars, funding=world.funding, chain=world.onchain, start=born) as x: yield x

def owned(world, exchange):
    "A user's own columns, as they are known"
    def newest(coins, since):
        e = world.extra
        return e[(e.known <= exchange.time()) & (e.time >= since) & e.symbol.isin(coins)]
    return newest

class Round:
    "Sources of some coins, heard hour after hour two seconds after the close"
    def __init__(self, world, exchange, own=None, bars=300, **options):
        feed = Feed(ccxt.binance(exchange.ccxt_config()), world.symbols, '1h', retries=0, pause=.001)
        given = dict(chain=exchange.url + '/v4', patience=Patience(0, .001)) | options
        self.sources = Sources(feed, own or owned(world, exchange), **given)
        self.exchange, self.wanted, self.bars = exchange, dict.fromkeys(KINDS, world.symbols), bars

    def at(self, close, deadline=60.):
        self.exchange.set_time(close + GRACE)
        now, start = self.exchange.time(), close - self.bars * H
        self.sources.hear(self.wanted, now, close, start, deadline)
        return self.sources.known(self.wanted, now, start)

    def again(self, close): return self.sources.known(self.wanted, close + GRACE, close - self.bars * H)

def same(a, b): return a.keys() == b.keys() and all(a[k].equals(b[k]) for k in a)

# ---- from the sources to the model

def test_as_it_comes_is_as_it_was(world, exchange, born):
    "Hour after hour what is given is the frame of the history, as far as it was known; and so are the features of it"
    r, key = Round(world, exchange), dict(funding='symbol', onchain='asset', extra='symbol')
    frames = {k: getattr(world, k) for k in KINDS}
    for k in range(0, 40):
        close = born + k * H
        got = r.at(close)
        assert r.sources.health == dict.fromkeys(KINDS) and r.sources.again is None
        for name, frame in got.items():
            there = frames[name][frames[name].known <= exchange.time()]
            if name == 'onchain': there = there[there.asset.isin({x.split('/')[0].lower() for x in world.symbols})]
            there = there[there.time >= frame.time.min()].sort_values([key[name], 'known', 'time'], ignore_index=True)
            mine = frame[frame[key[name]].isin(there[key[name]])].reset_index(drop=True)
            pd.testing.assert_frame_equal(mine[list(there)], there, check_dtype=False, rtol=1e-12)
    panel = to_panel(world.bars[(world.bars.time < close) & (world.bars.time >= close - r.bars * H)])
    whole, live = make_inputs(panel, **frames), make_inputs(panel, **got)
    np.testing.assert_allclose(live.x[:, -48:], whole.x[:, -48:], rtol=1e-5, atol=1e-6)
    assert exchange.calls and r.again(close) is not None and same(r.again(close), got)

def test_the_same_frames_while_nothing_comes(world, exchange, born):
    "So that what streams is not begun anew; and each source is asked once a close"
    r = Round(world, exchange)
    first, asked = r.at(born), dict(exchange.calls)
    second = r.at(born)
    assert all(first[k] is second[k] for k in KINDS)
    assert {k: n for k, n in exchange.calls.items() if asked.get(k) != n}.keys() <= {'GET api/v3/time'}

def rows_of(frame, coin, since): return frame[(frame.symbol == coin) & (frame.time >= since)].set_index('time')

def test_what_comes_late_counts_from_when_it_came(world, exchange, born):
    "A row that was not there when it was asked for; one that is revised; one that will be known later"
    coin, column, on_time = world.symbols[0], 'noise_0', owned(world, exchange)
    late, early, revised = (born + k * H for k in (3, 8, 5))
    def own(coins, since):
        rows = on_time(coins, since)
        if exchange.time() < born + 6 * H: rows = rows[~((rows.symbol == coin) & (rows.time == late))]
        if exchange.time() >= born + 7 * H: rows = rows.assign(**{column: rows[column].mask(rows.time == revised, 77.)})
        ahead = world.extra[(world.extra.symbol == coin) & (world.extra.time == early)]
        return pd.concat([rows, ahead]).drop_duplicates(['symbol', 'time'])
    column = next(c for c in world.extra if c not in ('time', 'known', 'symbol'))
    r = Round(world, exchange, own)
    for k in range(12):
        mine = rows_of(r.at(born + k * H)['extra'], coin, born)
        assert (late in mine.index) == (k >= 6) and (early in mine.index) == (k >= 9)
        assert (mine.known <= exchange.time()).all()
    assert mine.known[late] == born + 6 * H and mine.known[early] == early + H
    assert mine.known[revised].tolist() == [revised + H, born + 7 * H]
    assert mine.loc[revised, column].tolist()[1] == 77.

def test_a_hole_in_the_asking_makes_nothing_late(world, exchange, born):
    "Nobody decided while nobody asked: what came meanwhile counts from when it was known"
    r = Round(world, exchange)
    r.at(born)
    got = r.at(born + 30 * H)
    funding, extra = (rows_of(got[k], world.symbols[0], born) for k in ('funding', 'extra'))
    assert len(funding) == 4 and (funding.known == funding.index).all()
    assert len(extra) == 30 and (extra.known == extra.index + H).all()

def test_a_restart_goes_on_from_the_folder(world, exchange, born, tmp_path):
    "It asks for what is new only, gives the same, and can say what was known at any earlier round"
    r, said = Round(world, exchange, folder=tmp_path), []
    for k in range(5): said.append(r.at(born + k * H))
    other = Round(world, exchange, folder=tmp_path)
    for k in range(5): assert same(other.again(born + k * H), said[k])
    both = r.at(born + 5 * H), other.at(born + 5 * H)
    assert same(*both)
    for name, key in dict(onchain='btc', funding='BTC/USDT', extra='BTC/USDT').items():
        assert other.sources.came[name].since(born, {key}) > born - pd.Timedelta('6D')
    (tmp_path/'funding.jsonl').write_text('{"rows": 3}\n')
    with pytest.raises(FeedError, match='none of ours'): Round(world, exchange, folder=tmp_path)

def test_a_source_that_hangs_is_taken_in_at_the_next_round(world, exchange, born):
    on_time, gate = owned(world, exchange), threading.Event()
    def own(coins, since):
        assert gate.wait(60)
        return on_time(coins, since)
    r = Round(world, exchange, own)
    first = r.at(born, deadline=1.)
    assert set(first) == {'funding', 'onchain'} and r.sources.health['extra'] == 'extra: no answer within 1 s'
    assert r.sources.again == exchange.time() + pd.Timedelta('10s')
    gate.set()
    assert set(r.at(born + H)) == set(KINDS) and r.sources.health == dict.fromkeys(KINDS)

BAD = {
    'raises': (lambda f: 1 / 0, 'extra: ZeroDivisionError: division by zero'),
    'nothing': (lambda f: None, 'extra: a NoneType is no frame of columns'),
    'no symbol': (lambda f: f.drop(columns='symbol'), 'extra: there is no column symbol'),
    'text': (lambda f: f.assign(more='x'), 'extra: columns that are no numbers: more'),
    'no number': (lambda f: f[['time', 'known', 'symbol']], 'extra: columns that are no numbers: (none)'),
    'infinite': (lambda f: f.assign(more=np.inf), 'rows hold a number that is infinite'),
    'early': (lambda f: f.assign(known=f.time - H), 'rows were known before the time they speak of'),
    'other columns': (lambda f: f.assign(more=1.), 'extra: its columns have changed: more'),
}

@pytest.mark.parametrize('what', BAD)
def test_a_bad_answer_is_a_sentence_and_harms_nothing(world, exchange, born, what):
    spoil, words = BAD[what]
    on_time, bad = owned(world, exchange), []
    def own(coins, since): return spoil(on_time(coins, since)) if bad else on_time(coins, since)
    r = Round(world, exchange, own)
    first = r.at(born)
    bad.append(True)
    second = r.at(born + H)
    assert words in r.sources.health['extra'] and second['extra'] is not None and r.sources.health['funding'] is None
    assert second['extra'].known.max() == first['extra'].known.max()
    bad.clear()
    third = r.at(born + 2 * H)
    assert r.sources.health['extra'] is None and third['extra'].known.max() == born + 2 * H

def test_what_nobody_gives_is_said(world, exchange, born):
    s = Sources(chain=exchange.url, patience=Patience(0, .001))
    s.hear(dict.fromkeys((*KINDS, 'trades'), world.symbols), born, born, born - H)
    assert s.health['funding'] == 'funding: this model reads funding: name the exchange that has it'
    assert s.health['extra'].startswith('extra: this model reads columns of your own')
    assert s.health['onchain'].startswith('onchain: Coin Metrics') and 'cannot be asked for' in s.health['trades']
    assert s.known(KINDS, born, born - H) == {}

def test_a_coin_without_a_perpetual_is_one_sentence(world, exchange, born):
    r = Round(world, exchange)
    r.wanted = dict(funding=[world.symbols[0], 'NONE/USDT'])
    assert set(r.at(born)['funding'].symbol) == {world.symbols[0]}
    assert 'no perpetual of NONE/USDT' in r.sources.health['funding']

def test_news_keeps_what_is_not_given_again():
    "By hand: the same again, a revision, a missing number, a new row"
    have = pd.DataFrame(dict(time=[1, 2, 3], symbol='x', known=[1, 2, 3], a=[1., 2, 3], b=[5., 6, np.nan]))
    got = pd.DataFrame(dict(time=[1, 2, 3, 4], symbol='x', known=[1, 2, 3, 4], a=[1., 9, np.nan, 4], b=np.nan))
    new = news(have, got, ['time', 'symbol'], final=False)
    assert new.time.tolist() == [2, 4] and new.a.tolist() == [9., 4.] and new.b.iloc[0] == 6.
    assert news(have, got, ['time', 'symbol'], final=True).time.tolist() == [4]

def test_names_of_coins_may_be_spelled_as_people_do():
    mine = pd.DataFrame(dict(time=['2024-01-01'], known=['2024-01-02'], symbol=['btcusdt'], x=[1]))
    got = own_rows(mine, ['BTC/USDT'])
    assert got.symbol.tolist() == ['BTC/USDT'] and got.x.dtype == float

# ---- a model that reads all of them, in the loops

@pytest.fixture(scope='module')
def state(world, born, tmp_path_factory):
    "A model with an untrained network, judged on bars, funding, on-chain values and own columns; its folder"
    place = tmp_path_factory.mktemp('state')
    def past(frame): return frame[frame.known <= born]
    bars = world.bars[world.bars.time < born]
    given = {k: past(getattr(world, k)) for k in KINDS}
    study = Study.of(to_panel(bars), (4, 24), **given)
    f = weigh([untrained(study)], study.inputs, study.targets, study.parts)[0]
    judged = judge(f, f, study, most=8)
    save_combined(replace(f, bands=copy.deepcopy(judged.test.before)), place, terms=asdict(judged.terms))
    return place

def test_the_model_names_what_it_reads(state, world):
    assert load_ai(state, 'FAIL').needed_sources() == dict.fromkeys(('onchain', 'funding', 'extra'), world.symbols)

def looped(world, exchange, state, folder, own=None, **options):
    feed = Feed(ccxt.binance(exchange.ccxt_config()), world.symbols, '1h', retries=1, pause=.001)
    given = dict(chain=exchange.url + '/v4', folder=folder/'sources', patience=Patience(0, .001)) | options
    sources = Sources(feed, own or owned(world, exchange), **given)
    def sleep(seconds): exchange.set_time(exchange.time() + pd.Timedelta(seconds, 's'))
    settings = Settings(str(state), 'FAIL', .0, equity=1000.)
    return Live(load_ai(state, 'FAIL'), feed, folder, settings, exchange.time, sleep, lambda line: None, sources)

def expected(world, state, now, **changed):
    "What the model says of the whole history, with the frames as they were known"
    frames = {k: getattr(world, k) for k in KINDS} | changed
    frames = {k: x[x.known <= now] for k, x in frames.items()}
    return load_ai(state, 'FAIL').predict_sync(world.bars[world.bars.time + H <= now], now=now, **frames)

def test_the_loop_says_what_the_history_says(world, exchange, born, state, tmp_path):
    "Over a settlement and a day of on-chain values; and every signal is computed again from what was kept"
    exchange.set_time(born + .5 * H)
    loop = looped(world, exchange, state, tmp_path)
    loop.run(14)
    said = {k: x['prediction'] for k, x in loop.said.items()}
    assert not any(p['faults'] or p['notes'] for p in said.values()) and not loop.faults
    for symbol, p in expected(world, state, exchange.time()).items():
        assert near({k: p[k] for k in ('score', 'volatility', 'direction')},
                    {k: said[symbol][k] for k in ('score', 'volatility', 'direction')})
    found = parity(tmp_path)
    assert (found['signals'], found['different'], found['lost']) == (14 * 2, 0, 0), found

@pytest.mark.parametrize('name, late', [('funding', 18), ('extra', 5)])
def test_late_is_a_hold_with_a_sentence(world, exchange, born, state, tmp_path, name, late):
    "The source stops; its last values count for a while; then the signal holds and says why; then it comes again"
    stopped, on_time = [], owned(world, exchange)
    def own(coins, since):
        if stopped and name == 'extra': raise OSError('no disk')
        return on_time(coins, since)
    exchange.set_time(born + .5 * H)
    loop = looped(world, exchange, state, tmp_path, own)
    loop.begin()
    def hours(n):
        for _ in range(n):
            exchange.set_time(exchange.time().ceil('1h') + GRACE)
            loop.once()
    hours(1)
    assert not any(x['prediction']['faults'] for x in loop.said.values())
    feed = loop.sources.exchange
    asked = feed.funding
    def refused(*args, **kw): raise FeedError('the exchange says nothing of funding')
    stopped.append(True)
    if name == 'funding': feed.funding = refused
    hours(late)
    for x in loop.said.values():
        about = [f for f in x['prediction']['faults'] if f'{name} inputs are missing at the newest bar' in f]
        assert len(about) == 1 and about[0].endswith('it is late, or was not given as in training')
        assert x['signal']['action'] == 'HOLD' and x['signal']['why'] == 'fault'
    assert any(f['what'].startswith(f'{name}: ') for f in loop.faults)
    stopped.clear()
    feed.funding = asked
    hours(1)
    assert not any(x['prediction']['faults'] for x in loop.said.values())
    found = parity(tmp_path)
    assert found['different'] == 0, found['first']

def test_none_at_all_is_a_hold_too(world, exchange, born, state, tmp_path):
    "Without own columns nothing can be forecast; without the others their inputs are missing"
    exchange.set_time(born + .5 * H)
    def own(coins, since): raise OSError('no disk')
    loop = looped(world, exchange, state, tmp_path, own)
    loop.run(1)
    for x in loop.said.values():
        said = 'the prediction failed: this model was trained with own columns: give extra'
        assert x['prediction']['faults'] == [said]
    ai, now = load_ai(state, 'FAIL'), exchange.time()
    bars, extra = world.bars[world.bars.time + H <= now], world.extra[world.extra.known <= now]
    for p in ai.predict_sync(bars, now=now, extra=extra).values():
        assert [f.split(' ', 2)[2].split(' inputs')[0] for f in p['faults']] == ['onchain', 'funding']

def test_a_keeper_feeds_it_too(world, exchange, born, state, tmp_path):
    "In a bot of asyncio, with the bot's own exchange for candles and a name of it for funding"
    ai = load_ai(state, 'FAIL')
    bot = SimpleNamespace(exchange=ccxt.binance(exchange.ccxt_config()))
    candles = find_candles(bot)
    assert candles.exchange == 'binance'
    feed = Feed(ccxt.binance(exchange.ccxt_config()), world.symbols, '1h', retries=0, pause=.001)
    sources = Sources(feed, owned(world, exchange), chain=exchange.url + '/v4', folder=tmp_path)
    keeper = Keeper(ai, candles, sources=sources, deadline=60.)
    async def go():
        for k in range(3):
            exchange.set_time(born + k * H + GRACE)
            said = await keeper.once(exchange.time())
            assert keeper.health == dict.fromkeys((*world.symbols, *KINDS)), keeper.health
            assert await keeper.once(exchange.time()) is said
        whole = expected(world, state, exchange.time())
        for symbol, x in said.items():
            assert not x['prediction']['faults'] and near(whole[symbol]['score'], x['prediction']['score'])
        keeper.sources = None
        keeper._last = None, None, None
        assert await keeper.once(exchange.time()) == {}
        assert 'trained with own columns: give extra' in keeper.health['model']
        assert ai.get_trading_signal(world.symbols[0], now=exchange.time())['action'] == 'HOLD'
    asyncio.run(go())

# ---- the command

def test_the_command_says_what_is_missing(state, exchange, world, tmp_path, capsys, monkeypatch):
    argv = ['live', '--state', str(state), '--exchange', 'binance', '--url', exchange.url, '--paper']
    assert main([*argv, '--out', str(tmp_path/'out')]) == 2
    assert 'name the function of coins and a time' in capsys.readouterr().err
    (tmp_path/'columns_of_a_test.py').write_text('def newest(coins, since): return None\nnothing = 7\n')
    monkeypatch.chdir(tmp_path)
    ai, feed = load_ai(state, 'FAIL'), Feed('binance', world.symbols, '1h', url=exchange.url)
    made = sources_for(ai, feed, 'columns_of_a_test:newest', 'http://chain', tmp_path/'kept')
    assert made.own(world.symbols, None) is None and made.chain == 'http://chain'
    with pytest.raises(CommandError, match='is no function'):
        sources_for(ai, feed, 'columns_of_a_test:nothing', 'http://chain', None)
    with pytest.raises(ValueError, match='there is no module no_such_columns in the working folder'):
        sources_for(ai, feed, 'no_such_columns:newest', 'http://chain', None)
    ai.needed_sources = lambda: dict(orderbook=world.symbols)
    with pytest.raises(CommandError, match='reads orderbook, which this loop cannot ask for'):
        sources_for(ai, feed, None, '', None)
    assert json.dumps(made.health) == '{}'
