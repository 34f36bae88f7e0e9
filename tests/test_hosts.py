"""Bots of every kind give their candles, and a keeper lives through what their feeds do

Suites 8, 9, 10, 14
"""
import ast, asyncio, copy, importlib, inspect, json, logging, re, sys, threading, time, types
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import AsyncMock, MagicMock

import numpy as np
import pandas as pd
import pytest

from cryptoml import hosts, newest
from cryptoml.combined import weigh
from cryptoml.data import CANDLE, DataError, to_panel
from cryptoml.gate import Declared
from cryptoml.hosts import AFTER, OVERLAP, PAGE, PAUSE, SPARE, Keeper, find_candles, paged
from cryptoml.integration import UltimateTradingAI
from cryptoml.newest import Snapshot
from cryptoml.simulate import simulate
from cryptoml.study import Study
from examples import TERMS, near, untrained
from replay_exchange import FAULTS, replaying

H = pd.Timedelta('1h')
COINS = ['BTC/USDT', 'ETH/USDT', 'XRP/USDT']
LONG = 300     # Seconds after which something hangs: never a measure of speed

def market_of(n):
    "Bars of our three coins"
    bars = simulate(3, n, seed=4).bars[['time', 'symbol', *CANDLE]]
    return bars.assign(symbol=bars['symbol'].map(dict(zip(bars['symbol'].unique(), COINS))))

BARS = market_of(2600)
START = BARS['time'].min()

# ---- a market, and bots that know it

@dataclass
class Market:
    "Bars until now, the open one among them, as exchanges give them"
    now: pd.Timestamp = START + 1500 * H
    most: int = 1000                                # Candles a call gives
    calls: list = field(default_factory=list)       # (coin, since, limit)
    faults: dict = field(default_factory=dict)      # Coin to what its answer goes through
    bars: pd.DataFrame = field(default_factory=lambda: BARS)

    def of(self, symbol):
        mine = self.bars[(self.bars['symbol'] == symbol) & (self.bars['time'] <= self.now)]
        if not len(mine): raise LookupError(f'no market {symbol}')
        return mine

    def rows(self, symbol, since=None, limit=None):
        self.calls.append((symbol, since, limit))
        mine = self.of(symbol)
        size = min(limit or self.most, self.most)
        since = None if since is None else pd.Timestamp(since, unit='ms', tz='UTC')
        mine = mine.tail(size) if since is None else mine[mine['time'] >= since].head(size)
        times = (mine['time'].astype('int64') // 1000).tolist()
        rows = [[t, *v] for t, v in zip(times, mine[CANDLE].to_numpy().tolist())]
        return self.faults.get(symbol, lambda x: x)(rows)

def sync_exchange(market, **more):
    class Exchange:
        "As ccxt's"
        id = 'replay'
        markets = dict.fromkeys(COINS)
        def fetch_ohlcv(self, symbol, timeframe='1m', since=None, limit=None, params=None):
            assert timeframe == '1h'
            return market.rows(symbol, since, limit)
    exchange = Exchange()
    vars(exchange).update(more)
    return exchange

def async_exchange(market):
    class Exchange(type(sync_exchange(market))):
        async def fetch_ohlcv(self, symbol, timeframe='1m', since=None, limit=None, params=None):
            await asyncio.sleep(0)
            answer = market.rows(symbol, since, limit)
            return await answer if asyncio.iscoroutine(answer) else answer
    return Exchange()

class Strategy:
    "As freqtrade's: its candles are closed"
    timeframe = '1h'
    def __init__(self, market): self.dp, self.market = self, market
    def get_pair_dataframe(self, pair, timeframe=None, candle_type=''):
        mine = self.market.of(pair)[:-1].tail(1200)
        return mine.drop(columns='symbol').rename(columns=dict(time='date')).reset_index(drop=True)

class Binance:
    "As python-binance's: text, twelve columns, names without a slash"
    def __init__(self, market): self.market = market
    def get_klines(self, **params):
        assert set(params) <= {'symbol', 'interval', 'limit', 'startTime'} and params['interval'] == '1h'
        assert params['limit'] <= 1000
        symbol = params['symbol'].replace('USDT', '/USDT')
        rows = self.market.rows(symbol, params.get('startTime'), params['limit'])
        return [[t, *map(str, v), t + 3_599_999, '1', 10, '0.5', '0.5', '0'] for t, *v in rows]

class Historic:
    "Only the call of python-binance that pages by itself"
    def __init__(self, market): self.market = market
    def get_historical_klines(self, symbol, interval, start_str=None, end_str=None, limit=None):
        minutes = int(start_str.removesuffix(' minutes ago UTC'))
        self.market.most = 10**6
        return self.market.rows(symbol.replace('USDT', '/USDT'), limit=minutes // 60)

class HomeMade:
    symbols = ['BTC-USDT', 'ETH-USDT', 'XRP-USDT']
    def __init__(self, market): self.market = market
    async def get_candles(self, coin, tf, n):
        assert coin in self.symbols and tf == '1h'
        return self.market.rows(coin.replace('-', '/'), limit=n)

def of_each(market): return {s: market.of(s).drop(columns='symbol') for s in COINS}

BOTS = dict(
    ccxt=lambda m: SimpleNamespace(exchange=sync_exchange(m)),
    ccxt_async=lambda m: SimpleNamespace(client=async_exchange(m)),
    itself=sync_exchange,
    hidden=lambda m: SimpleNamespace(_api=SimpleNamespace(ccxt=async_exchange(m))),
    only_one_exchange=lambda m: SimpleNamespace(exchanges=dict(here=sync_exchange(m))),
    freqtrade=Strategy,
    binance=lambda m: SimpleNamespace(client=Binance(m)),
    historic=lambda m: SimpleNamespace(client=Historic(m)),
    home_made=HomeMade,
    frames=lambda m: SimpleNamespace(data=of_each(m)),
    frames_by_length=lambda m: SimpleNamespace(ohlcv={s.replace('/', ''): {'1h': f} for s, f in of_each(m).items()}),
    indexed=lambda m: SimpleNamespace(dataframes={s: f.set_index('time') for s, f in of_each(m).items()}),
    one_frame=lambda m: SimpleNamespace(candles=pd.concat([m.of(s) for s in COINS]).replace('BTC/USDT', 'BTCUSDT')),
    two_levels=lambda m: SimpleNamespace(bars=pd.concat([m.of(s) for s in COINS]).set_index(['symbol', 'time'])),
    lists=lambda m: SimpleNamespace(candles={s: m.rows(s) for s in COINS}),
    newest_first=lambda m: SimpleNamespace(data={s: f[::-1] for s, f in of_each(m).items()}),
)

@pytest.mark.parametrize('kind', BOTS)
def test_every_kind_of_bot_gives_the_same_bars(kind):
    market = Market()
    candles = find_candles(BOTS[kind](market))
    got = asyncio.run(candles.fetch('ETH/USDT', '60m', 900))
    assert got['time'].is_monotonic_increasing and 899 <= len(got) <= 900
    got = got[got['time'] < market.now]                               # freqtrade drops the open one
    expected = market.of('ETH/USDT').merge(got[['time']], on='time')
    pd.testing.assert_frame_equal(got[list(expected)].reset_index(drop=True), expected, check_dtype=False)

@pytest.mark.parametrize('kind', ['ccxt', 'ccxt_async', 'binance'])
@pytest.mark.parametrize('most', [100, 300, 720, 1000])
def test_pages_are_put_together(kind, most):
    market = Market(most=most)
    got = asyncio.run(find_candles(BOTS[kind](market)).fetch('BTC/USDT', '1h', 1450))
    assert len(got) == 1450 and (got['time'].diff()[1:] == H).all() and got['time'].max() == market.now
    assert len(market.calls) == -(-1450 // most) and all(limit <= PAGE for _, _, limit in market.calls)

def test_pages_end_where_the_market_begins():
    market = Market(START + 700 * H, most=300)
    got = asyncio.run(find_candles(sync_exchange(market)).fetch('BTC/USDT', '1h', 5000))
    assert len(got) == 701 and len(market.calls) == 4

@pytest.mark.parametrize('answer', [
    None, [], {}, 'busy', [[None] * 6], [[0, 1, 1, 1, 1, 1]], [['x', 1, 1, 1, 1, 1]], [1, 2]])
def test_answers_that_are_no_candles_are_said(answer):
    market = Market(faults={'BTC/USDT': lambda rows: answer})
    with pytest.raises(DataError): asyncio.run(find_candles(sync_exchange(market)).fetch('BTC/USDT', '1h', 10))

def test_an_endless_exchange_is_not_asked_for_ever():
    asked = []
    async def one_at_a_time(since, limit):
        asked.append(since)
        return [[since if since else 10**12, 1., 1., 1., 1., 1.]]
    rows = asyncio.run(paged(one_at_a_time, 10**6, H))
    assert len(asked) == hosts.MOST_PAGES + 1 == len(rows)

# ---- where candles are looked for

class Account:
    "Touching an order is a fault, whatever it is called"
    markets = dict.fromkeys(COINS)
    def __init__(self, market): vars(self).update(market=market, touched=[])
    def __getattribute__(self, name):
        if not name.startswith('__'): object.__getattribute__(self, 'touched').append(name)
        if any(word in name for word in ('order', 'buy', 'sell', 'trade', 'position', 'cancel', 'withdraw', 'balance')):
            raise AssertionError(f'{name} was touched')
        return object.__getattribute__(self, name)
    def create_order(self, *a): raise AssertionError('an order')
    def fetch_ohlcv(self, symbol, timeframe='1m', since=None, limit=None): return self.market.rows(symbol, since, limit)

def test_no_order_is_touched_and_nothing_is_replaced():
    market = Market()
    exchange = Account(market)
    bot = SimpleNamespace(exchange=exchange)
    before = dict(vars(bot)), dict(object.__getattribute__(exchange, '__dict__'))
    keeper = Keeper(Says(), find_candles(bot))
    assert set(asyncio.run(keeper.once(market.now))) == set(COINS)
    may = {*hosts.WAYS, *hosts.COINS_OF_A_BOT, *hosts.under(hosts.EXCHANGES), 'id', 'markets', 'timeframe'}
    assert set(exchange.touched) <= may | {'market', 'touched'}
    assert before == (dict(vars(bot)), dict(object.__getattribute__(exchange, '__dict__')))

def test_properties_that_fail_are_not_there():
    class Bot:
        @property
        def exchange(self): raise RuntimeError('not connected')
        @property
        def client(self): return sync_exchange(Market())
    assert find_candles(Bot()).place == 'Bot.client.fetch_ohlcv'

def test_a_source_that_the_bot_replaces_is_found_again():
    old, new = Market(START + 100 * H), Market(START + 200 * H)
    bot = SimpleNamespace(exchange=sync_exchange(old))
    candles = find_candles(bot)
    bot.exchange = sync_exchange(new)
    assert asyncio.run(candles.fetch('BTC/USDT', '1h', 5))['time'].max() == new.now
    bot.exchange = None
    with pytest.raises(DataError, match='exchange.fetch_ohlcv is gone from the bot'):
        asyncio.run(candles.fetch('BTC/USDT', '1h', 5))

PERPETUALS = {'BTC/USDT:USDT': {}, 'BTC/USDT:USDT-261225': {}, 'ETH/USDT:USDT': {}, 'BTC/USDC:USDC': {}}

@pytest.mark.parametrize('markets, symbol, spelling', [
    (dict.fromkeys(COINS), 'BTC/USDT', 'BTC/USDT'),
    (PERPETUALS, 'BTC/USDT', 'BTC/USDT:USDT'),
    (dict.fromkeys(COINS) | PERPETUALS, 'BTC/USDT', 'BTC/USDT'),
    (PERPETUALS, 'XRP/USDT', 'XRP/USDT'),       # the exchange will say that it has none
    (None, 'BTC/USDT', 'BTC/USDT'),             # nobody has loaded them
])
def test_the_name_of_the_market(markets, symbol, spelling):
    exchange = sync_exchange(Market())
    exchange.markets = markets
    assert find_candles(exchange).spelling(symbol) == spelling

TWO = 'exchange.fetch_ohlcv and client.fetch_ohlcv: say which with config'
@pytest.mark.parametrize('bot, config, said', [
    (SimpleNamespace(), None, 'no candles found in SimpleNamespace: looked for fetch_ohlcv'),
    (None, None, 'no candles found in NoneType'),
    ({}, None, 'no candles found in dict'),
    (SimpleNamespace(data={}), None, 'no candles found'),
    (SimpleNamespace(data=pd.DataFrame(dict(equity=[1.]))), None, 'no candles found'),
    (SimpleNamespace(exchange=sync_exchange(Market(), id='a'), client=sync_exchange(Market(), id='b')), None, TWO),
    (SimpleNamespace(get_candles=lambda exchange, symbol: 0), None, 'get_candles wants exchange, which nobody'),
    (SimpleNamespace(), dict(candles='exchange.client'), 'names exchange.client, where the bot has no candles'),
    (SimpleNamespace(), dict(candles=3), 'is a function, or a path'),
    (SimpleNamespace(), dict(candles=lambda venue, symbol: 0), 'wants venue, which nobody gives it'),
])
def test_what_cannot_be_found_is_a_sentence(bot, config, said):
    with pytest.raises(DataError, match=said) as e: find_candles(bot, config)
    assert '\n' not in str(e.value)

def test_one_exchange_twice_is_one():
    "A bot that has ccxt's exchange of both kinds has one exchange"
    bot = SimpleNamespace(exchange=async_exchange(Market()), client=sync_exchange(Market()))
    assert find_candles(bot).place == 'SimpleNamespace.exchange.fetch_ohlcv'

@pytest.mark.parametrize('named', [
    lambda bot: 'deep.inside',
    lambda bot: 'deep.inside.fetch_ohlcv',
    lambda bot: bot.deep['inside'].fetch_ohlcv,
    lambda bot: lambda symbol, timeframe, limit: bot.deep['inside'].fetch_ohlcv(symbol, timeframe, None, limit),
    lambda bot: lambda a, b, c: bot.deep['inside'].fetch_ohlcv(a, b, None, c),
    lambda bot: 'kept',
])
def test_candles_that_are_named(named):
    market = Market()
    bot = SimpleNamespace(deep=dict(inside=sync_exchange(market)), kept=of_each(market))
    got = asyncio.run(find_candles(bot, dict(candles=named(bot))).fetch('BTC/USDT', '1h', 50))
    assert len(got) == 50 and got['time'].max() == market.now

def test_what_the_bot_speaks_of():
    market = Market()
    bot = SimpleNamespace(exchange=sync_exchange(market), pairs=['BTCUSDT', 'not a pair'], timeframe='60m')
    candles = find_candles(bot, dict(symbols='ETH/USDT'))
    assert (candles.symbols, candles.timeframe) == (['BTCUSDT', 'ETH/USDT'], '1h')

def test_frames_of_other_coins():
    bot = SimpleNamespace(data=Market().of('BTC/USDT').drop(columns='symbol'), symbol='BTCUSDT')
    candles = find_candles(bot)
    assert len(asyncio.run(candles.fetch('BTC/USDT', '1h', 7))) == 7
    with pytest.raises(DataError, match='holds BTC/USDT, not ETH/USDT'):
        asyncio.run(candles.fetch('ETH/USDT', '1h', 7))

def test_frames_are_read_as_they_were_at_the_time():
    "The bot writes into its frame while a thread reads it"
    frames = of_each(Market())
    candles = find_candles(SimpleNamespace(data=frames))
    async def go():
        answer = await candles.answer('BTC/USDT', H, 5)
        close = answer['close'].iloc[-1]
        frames['BTC/USDT'].iloc[-1, -2] = 0.
        assert frames['BTC/USDT']['close'].iloc[-1] == 0. and answer['close'].iloc[-1] == close
    asyncio.run(go())

def test_a_bot_of_mocks():
    "Everything is there and answers anything: what comes is refused, never an exception of another kind"
    for exchange in (MagicMock(), AsyncMock()):
        candles = find_candles(SimpleNamespace(exchange=exchange))
        keeper = Keeper(Says(), candles)
        asyncio.run(keeper.once(START + 100 * H))
        assert all(keeper.health[s] for s in COINS)

# ---- a keeper

@dataclass
class Model:
    symbols: list
    timeframe: pd.Timedelta = H
    need: int = 300
    @property
    def terms(self): return SimpleNamespace(symbols=self.symbols)

class Says:
    "As much of an ai as a keeper asks for; it says which bars it saw"
    def __init__(self, symbols=COINS, need=300): self.snapshot, self.seen = Model(list(symbols), need=need), []
    def live(self):
        assert self.snapshot is not None
        return self.snapshot
    def coins(self): return list(self.live().terms.symbols)
    def needed_history(self): return self.live().need
    def model_name(self): return 'fake'
    def predict_sync(self, bars, now=None):
        self.seen.append(bars)
        last = bars.groupby('symbol')['time'].max()
        return {s: dict(data_time=last.get(s)) for s in self.snapshot.symbols}
    def get_trading_signal(self, symbol, now=None): return dict(action='HOLD', now=now)

def keeper_of(market, kind='ccxt_async', ai=None, **options):
    return Keeper(ai or Says(), find_candles(BOTS[kind](market)), **options)

def kept(keeper): return keeper.bars.groupby('symbol')['time'].max().to_dict()
def names(prefix): return [t.name for t in threading.enumerate() if t.name.startswith(prefix)]

async def until(what):
    "Wait for an event"
    end = time.monotonic() + LONG
    while not what():
        assert time.monotonic() < end, 'it never happens'
        await asyncio.sleep(.005)

@pytest.fixture(autouse=True)
def nothing_left():
    "No thread of ours outlives a test"
    yield
    asyncio.run(until(lambda: not names('cryptoml')))

@pytest.mark.parametrize('kind', ['ccxt', 'ccxt_async', 'binance', 'freqtrade'])
def test_history_once_then_few(kind):
    market, ai = Market(most=400), Says(need=600)
    async def go():
        keeper = keeper_of(market, kind, ai)
        for k in range(5):
            market.now = START + (1500 + k) * H
            said = await keeper.once(market.now)
            assert keeper.health == dict.fromkeys(COINS), keeper.health
            assert said['ETH/USDT']['prediction']['data_time'] == market.now - H
            expected = BARS[BARS['time'].between(market.now - 800 * H, market.now - H)]
            pd.testing.assert_frame_equal(keeper.bars[list(expected)], expected.reset_index(drop=True))
            if k == 0: history = len(market.calls)
        if kind != 'freqtrade':
            assert history == 3 * 3
            assert [limit for _, _, limit in market.calls[history:]] == [2 + 1 + OVERLAP] * 12
    asyncio.run(go())

def test_a_round_speaks_once_for_one_state_of_things():
    market, ai = Market(), Says()
    async def go():
        keeper = keeper_of(market, ai=ai)
        first = await keeper.once(market.now + AFTER)
        assert await keeper.once(market.now + 2 * AFTER) is first and len(ai.seen) == 1 and len(market.calls) == 3
        ai.snapshot = Model(COINS)                                            # another model, the same bars
        await keeper.once(market.now + 3 * AFTER)
        assert len(ai.seen) == 2 and len(market.calls) == 3
    asyncio.run(go())

def test_the_open_bar_is_never_kept_and_a_correction_replaces():
    market = Market()
    async def go():
        keeper = keeper_of(market)
        await keeper.once(market.now + H / 2)
        assert kept(keeper) == dict.fromkeys(COINS, market.now - H)
        market.faults['BTC/USDT'] = lambda rows: [[*r[:5], 7.] if r is rows[-3] else r for r in rows]
        market.now += H
        await keeper.once(market.now)
        btc = keeper.bars[keeper.bars['symbol'] == 'BTC/USDT']
        assert btc['volume'].iloc[-2] == 7. and btc['time'].iloc[-1] == market.now - H
    asyncio.run(go())

def test_a_newest_bar_that_is_no_bar_is_asked_for_again():
    market = Market()
    frames = of_each(market)
    async def go():
        keeper = Keeper(Says(), find_candles(SimpleNamespace(data=frames)))
        frames['ETH/USDT'].iloc[-2, -2] = np.nan
        await keeper.once(market.now)
        assert keeper.health['ETH/USDT'] == f'its newest closed bar is that of {market.now - 2 * H:%Y-%m-%d %H:%M}'
        frames['ETH/USDT'] = market.of('ETH/USDT').drop(columns='symbol')
        await keeper.once(market.now + PAUSE)
        assert keeper.health == dict.fromkeys(COINS) and keeper.bars['close'].notna().all()
    asyncio.run(go())

def raising(rows): raise ConnectionError('no route to host')
def empty(rows): return []
def nothing(rows): return None
def nulls(rows): return [[None] * 6 for _ in rows]
def zeros(rows): return [[0, *r[1:]] for r in rows]
def stale(rows): return rows[:-5]
def exiting(rows): raise SystemExit(1)

@pytest.mark.parametrize('kind', ['ccxt', 'ccxt_async'])
@pytest.mark.parametrize('fault', [raising, empty, nothing, nulls, zeros, stale, exiting])
def test_a_coin_at_fault_is_said_and_the_others_go_on(kind, fault):
    if (kind, fault) == ('ccxt_async', exiting): pytest.skip('what leaves the loop itself is for its owner')
    market = Market()
    async def go():
        keeper = keeper_of(market, kind)
        await keeper.once(market.now)
        before = keeper.bars[keeper.bars['symbol'] == 'ETH/USDT']
        market.faults['ETH/USDT'] = fault
        for _ in range(3):
            market.now += H
            said = await keeper.once(market.now)
        assert keeper.health['ETH/USDT'] and [keeper.health[s] for s in COINS if s != 'ETH/USDT'] == [None, None]
        assert '3 times since' in keeper.health['ETH/USDT'] or fault is stale
        assert said['BTC/USDT']['prediction']['data_time'] == market.now - H
        assert keeper.bars['close'].gt(0).all()
        if fault is not stale: assert kept(keeper)['ETH/USDT'] == before['time'].max()
        market.faults.clear()                                                  # and it comes back by itself
        said = await keeper.once(market.now + H / 2)
        assert keeper.health == dict.fromkeys(COINS) and kept(keeper) == dict.fromkeys(COINS, market.now - H)
        eth = keeper.bars[keeper.bars['symbol'] == 'ETH/USDT']
        assert (eth['time'].diff()[1:] == H).all() and len(eth) == 300 + SPARE
        assert said['ETH/USDT']['prediction']['data_time'] == market.now - H
    asyncio.run(go())

@pytest.mark.parametrize('known', [True, False])
def test_a_silent_coin_is_asked_less_and_less_within_a_bar(known):
    market = Market()
    async def go():
        keeper = keeper_of(market)
        if known: await keeper.once(market.now)
        market.now += H
        market.calls.clear()
        market.faults['ETH/USDT'] = raising
        seconds = []
        for second in range(2, 1400):
            before = len(market.calls)
            await keeper.once(market.now + pd.Timedelta(second, 's'))
            seconds += [second for symbol, _, _ in market.calls[before:] if symbol == 'ETH/USDT']
        assert np.diff(seconds).tolist() == [5 * 2**k for k in range(8)]
        assert len(market.calls) == 2 + len(seconds)                        # the others: once
    asyncio.run(go())

@pytest.mark.parametrize('known', [True, False])
def test_a_coin_that_hangs_is_late_alone_and_its_bars_are_not_lost(known):
    "Its call goes on, and is taken in when it comes"
    market, answer = Market(), asyncio.Event()
    async def hang(rows):
        await answer.wait()
        return rows
    async def go():
        keeper = keeper_of(market, deadline=1.5)
        if known: await keeper.once(market.now)
        market.now += H
        market.faults['ETH/USDT'] = hang
        said = await keeper.once(market.now)
        assert keeper.health == dict.fromkeys(COINS) | {'ETH/USDT': 'no answer within 1.5 s'}
        assert said['BTC/USDT']['prediction']['data_time'] == market.now - H
        calls = len(market.calls)
        begun, keeper.deadline = time.monotonic(), LONG
        await keeper.once(market.now + PAUSE)
        assert len(market.calls) == calls, 'it was asked again while its call was out'
        assert time.monotonic() - begun < LONG / 2, 'a round waited for a call of the round before'
        answer.set()
        await until(lambda: keeper._lines['ETH/USDT'].task.done())
        said = await keeper.once(market.now + 2 * PAUSE)
        assert keeper.health == dict.fromkeys(COINS) and len(market.calls) == calls
        assert said['ETH/USDT']['prediction']['data_time'] == market.now - H
    asyncio.run(go())

def test_a_call_that_hangs_for_good_is_given_up_and_asked_again():
    market = Market()
    async def hang(rows): await asyncio.Event().wait()
    async def go():
        keeper = keeper_of(market, deadline=.05)
        market.faults['ETH/USDT'] = hang
        await keeper.once(market.now)
        del market.faults['ETH/USDT']
        await asyncio.sleep(.05 * (hosts.GIVEN_UP + 1))
        await keeper.once(market.now + PAUSE)
        await until(lambda: keeper._lines['ETH/USDT'].task is None or keeper._lines['ETH/USDT'].task.done())
        await keeper.once(market.now + 2 * PAUSE)
        assert 'given up' in keeper.health['ETH/USDT'] and '3 times' in keeper.health['ETH/USDT']
        keeper.deadline = LONG
        await keeper.once(market.now + 20 * PAUSE)
        assert keeper.health == dict.fromkeys(COINS)
    asyncio.run(go())

def test_a_thread_that_hangs_is_one_thread():
    "It cannot be ended; it is not asked for a second time until it comes back"
    market, answer = Market(), threading.Event()
    def hang(rows):
        answer.wait(LONG)
        return rows
    async def go():
        keeper = keeper_of(market, 'ccxt', deadline=.05)
        market.faults['ETH/USDT'] = hang
        try:
            for k in range(6):
                await keeper.once(market.now + k * H)
                await asyncio.sleep(.05 * hosts.GIVEN_UP)
                await until(lambda: len(names('cryptoml')) == 1)
            assert 'has not come back' in keeper.health['ETH/USDT']
            await keeper.close()
        finally: answer.set()
        market.faults.clear()
        await until(lambda: not names('cryptoml'))
        market.now += 6 * H
        keeper.deadline = LONG
        await keeper.once(market.now)
        assert keeper.health == dict.fromkeys(COINS)
    asyncio.run(go())

def test_hanging_coins_do_not_keep_the_others_waiting():
    "More of them than are asked side by side"
    coins = [f'C{i:02}/USDT' for i in range(30)]
    silent = set(coins[:20])
    class Exchange:
        async def fetch_ohlcv(self, symbol, timeframe, since=None, limit=None):
            if symbol in silent: await asyncio.Event().wait()
            return [[1_700_000_000_000 // 3_600_000 * 3_600_000 - 3_600_000 * i, 1., 1., 1., 1., 1.] for i in range(5)]
    async def go():
        keeper = Keeper(Says(coins), find_candles(Exchange()), deadline=.3)
        now = pd.Timestamp(1_700_000_000, unit='s', tz='UTC').floor('h') + H
        await keeper.once(now)
        await until(lambda: all(keeper._lines[s].task is None or keeper._lines[s].task.done() for s in coins[20:]))
        await keeper.once(now + PAUSE)
        assert {s for s, why in keeper.health.items() if why} == silent
        await keeper.close()
    asyncio.run(go())

def test_the_loop_of_the_bot_is_never_held_up():
    "Whoever blocks waits for something that only the loop does"
    market, loop_ran = Market(), threading.Event()
    def wait(*args, **kwargs):
        assert loop_ran.wait(LONG), 'the loop stood still'
    class Slow(Says):
        def predict_sync(self, bars, now=None):
            wait()
            return super().predict_sync(bars, now)
        def get_trading_signal(self, symbol, now=None):
            wait()
            return super().get_trading_signal(symbol, now)
    def blocked(rows):
        wait()
        return rows
    async def go():
        market.faults.update(dict.fromkeys(COINS, blocked))
        keeper = keeper_of(market, 'ccxt', Slow(), journal=SimpleNamespace(record=wait))
        for _ in range(3):
            loop_ran.clear()
            market.now += H
            asyncio.get_running_loop().call_later(.02, loop_ran.set)
            assert await keeper.once(market.now)
    asyncio.run(go())

@dataclass
class Notes:
    entries: list = field(default_factory=list)
    error: Exception | None = None
    def record(self, *entry):
        if self.error: raise self.error
        self.entries.append(entry)

def test_the_journal_is_told_what_was_seen_and_said():
    market, ai, notes = Market(), Says(), Notes()
    async def go():
        keeper = keeper_of(market, ai=ai, journal=notes)
        said = await keeper.once(market.now)
        (now, bars, told, model), = notes.entries
        assert (now, model) == (market.now, 'fake') and told == said and bars is ai.seen[0]
        assert set(said['BTC/USDT']) == {'prediction', 'signal'}
        notes.error = OSError('disk full')
        market.now += H
        said = await keeper.once(market.now)
        assert said['BTC/USDT'] and keeper.health['journal'] == 'OSError: disk full'
        notes.error = None
        market.now += H
        await keeper.once(market.now)
        assert keeper.health == dict.fromkeys(COINS) and len(notes.entries) == 2
    asyncio.run(go())

def test_a_model_that_fails_is_said():
    market, ai = Market(), Says()
    ai.predict_sync = lambda bars, now: 1 / 0
    async def go():
        keeper = keeper_of(market, ai=ai)
        assert await keeper.once(market.now) == {} and 'ZeroDivisionError' in keeper.health['model']
        del ai.predict_sync
        market.now += H
        assert await keeper.once(market.now) and keeper.health == dict.fromkeys(COINS)
    asyncio.run(go())

def test_without_a_model_bars_are_collected():
    market, ai = Market(), Says()
    model, ai.snapshot = ai.snapshot, None
    bot = SimpleNamespace(exchange=async_exchange(market), symbols=['BTCUSDT', 'ETHUSDT'], timeframe='1h')
    async def go():
        assert await Keeper(ai, find_candles(bot.exchange)).once(market.now) == {}         # nobody says of which coins
        keeper = Keeper(ai, find_candles(bot))
        assert await keeper.once(market.now) == {} and keeper.health == dict.fromkeys(COINS[:2])
        assert keeper.bars.groupby('symbol').size().to_dict() == dict.fromkeys(COINS[:2], hosts.UNTRAINED)
        ai.snapshot = model
        said = await keeper.once(market.now + AFTER)
        assert set(said) == set(COINS) == set(keeper.health) and not ai.seen[:-1]
        assert keeper.bars.groupby('symbol').size().to_dict() == dict.fromkeys(COINS, model.need + SPARE)
    asyncio.run(go())

def test_another_model_has_other_coins_and_other_bars():
    market, ai = Market(), Says(COINS[:2])
    async def go():
        keeper = keeper_of(market, ai=ai)
        await keeper.once(market.now)
        ai.snapshot = Model(COINS[1:], need=500)
        said = await keeper.once(market.now + AFTER)
        assert set(said) == set(COINS[1:]) == set(keeper.health)
        assert keeper.bars.groupby('symbol').size().to_dict() == dict.fromkeys(COINS[1:], 500 + SPARE)
    asyncio.run(go())

@dataclass
class Clock:
    now: pd.Timestamp
    def __call__(self): return self.now

@pytest.mark.parametrize('kind', ['ccxt', 'ccxt_async', 'frames'])
def test_beside_a_bot_from_close_to_close(kind):
    market = Market()
    bot = BOTS[kind](market)
    clock, ai = Clock(market.now + AFTER), Says()
    async def go():
        keeper = Keeper(ai, find_candles(bot), clock=clock)
        keeper.start()
        with pytest.raises(DataError, match='runs already'): keeper.start()
        for k in range(3):
            await until(lambda: len(ai.seen) == k + 1)
            assert kept(keeper) == dict.fromkeys(COINS, market.now - H)
            market.now += H
            if kind == 'frames': bot.data = of_each(market)
            clock.now = market.now + AFTER
        await keeper.stop()
        await keeper.stop()
        assert asyncio.all_tasks() == {asyncio.current_task()}
    asyncio.run(go())

def test_a_bot_without_a_loop():
    market, ai = Market(), Says()
    keeper = keeper_of(market, 'freqtrade', ai, clock=Clock(market.now + AFTER))
    keeper.start()
    for _ in range(2):
        asyncio.run(until(lambda: ai.seen))
        asyncio.run(keeper.stop())
        ai.seen.clear()
        ai.snapshot = Model(COINS)
        keeper.start()
    asyncio.run(keeper.stop())
    with pytest.raises(DataError, match='call start in its loop'): keeper_of(market, 'ccxt_async').start()

@pytest.mark.parametrize('kind', ['ccxt', 'ccxt_async'])
@pytest.mark.parametrize('busy', ['asking', 'speaking', 'waiting'])
def test_cancelled_it_leaves_nothing(kind, busy, caplog):
    market, ai, notes, free = Market(), Says(), Notes(), threading.Event()
    begun = threading.Event()
    async def hang(rows):
        begun.set()
        await asyncio.Event().wait()
    def block(rows):
        begun.set()
        free.wait(LONG)
        return rows
    def record(*entry):
        begun.set()
        if busy == 'speaking': time.sleep(.2)
        notes.record(*entry)
    async def go():
        keeper = keeper_of(market, kind, ai, journal=SimpleNamespace(record=record), clock=Clock(market.now + AFTER))
        if busy == 'asking': market.faults['ETH/USDT'] = hang if kind == 'ccxt_async' else block
        task = asyncio.create_task(keeper.run())
        await until(begun.is_set)
        if busy == 'waiting': await until(lambda: keeper.said)
        task.cancel()
        with pytest.raises(asyncio.CancelledError): await task
        free.set()
        await until(lambda: not names('cryptoml'))
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert len(notes.entries) == (busy != 'asking')                    # what was begun to be written is whole
    asyncio.run(go())
    assert not [r for r in caplog.records if r.name == 'asyncio'], caplog.text

def test_the_log_says_it_once(caplog):
    market = Market(faults={'ETH/USDT': raising})
    caplog.set_level(logging.INFO, 'cryptoml')
    async def go():
        keeper = keeper_of(market)
        for k in range(5): await keeper.once(market.now + k * PAUSE * 20)
        market.faults.clear()
        await keeper.once(market.now + 500 * PAUSE)
    asyncio.run(go())
    assert [r.getMessage() for r in caplog.records] == ['ETH/USDT: ConnectionError: no route to host',
                                                        'ETH/USDT: well again']

def test_a_round_that_fails_for_a_reason_of_ours_does_not_end_the_keeper(caplog):
    market, ai = Market(), Says()
    ai.needed_history = lambda: 1 / 0
    async def go():
        keeper = keeper_of(market, ai=ai, clock=Clock(market.now + AFTER))
        task = asyncio.create_task(keeper.run())
        await until(lambda: 'keeper' in keeper.health)
        del ai.needed_history
        keeper.clock.now += H
        market.now += H
        await until(lambda: ai.seen and 'keeper' not in keeper.health)
        task.cancel()
        await asyncio.wait([task])
    asyncio.run(go())

def test_memory_stays():
    market, ai = Market(START + 900 * H), Says(need=100)
    async def go():
        keeper = keeper_of(market, ai=ai)
        for _ in range(25):
            market.now += 28 * H
            await keeper.once(market.now)
            ai.seen.clear()
            assert len(keeper.bars) == 3 * (100 + SPARE)
    asyncio.run(go())

# ---- through the network, with the exchanges that bots have

@pytest.fixture(scope='module')
def replay():
    pytest.importorskip('ccxt')
    with replaying(BARS, start=str(START + 900 * H)) as exchange: yield exchange

@pytest.mark.parametrize('awaited', [False, True])
def test_ccxt_through_faults(replay, awaited):
    import ccxt, ccxt.async_support
    ai = Says(need=700)
    async def go():
        exchange = (ccxt.async_support if awaited else ccxt).binance(replay.ccxt_config())
        keeper = Keeper(ai, find_candles(SimpleNamespace(exchange=exchange)), deadline=LONG)
        assert keeper.candles.is_async == awaited
        try:
            for faults in ({}, dict(http500=.5, malformed=.3), dict(http429=1.), {}, dict(hole=.3), {}):
                replay.faults(**dict.fromkeys(FAULTS, 0.) | faults)
                replay.step(1)
                for k in range(6):
                    said = await keeper.once(replay.time() + k * 10 * PAUSE)
                    assert set(said) == set(COINS) and (faults or not any(keeper.health.values()) or k == 0)
            assert keeper.health == dict.fromkeys(COINS)
            now = replay.time()
            expected = BARS[BARS['time'].between(now - 900 * H, now - H)].reset_index(drop=True)
            assert len(expected) == 3 * 900
            pd.testing.assert_frame_equal(keeper.bars[list(expected)], expected)
        finally:
            replay.faults(**dict.fromkeys(FAULTS, 0.))
            if awaited: await exchange.close()
            await keeper.close()
    asyncio.run(go())

# ---- the whole way

@pytest.fixture(scope='module')
def model(one_thread):
    "A model of three coins whose network nobody has trained, its bars, and a time until which it knows them"
    bars, end = market_of(24 * 160), START + 24 * 155 * H
    study = Study.of(to_panel(bars[bars['time'] < end]), (4, 24))
    f = weigh([untrained(study)], study.inputs, study.targets, study.parts)[0]
    terms = replace(TERMS, symbols=COINS, book=Declared.of('timing', 2, (4, 24), '1h').plain())
    return Snapshot(f, terms), bars, end

def ai_of(snapshot):
    ai = UltimateTradingAI(dict(act_on='FAIL'), device='cpu')
    ai.snapshot = copy.deepcopy(snapshot)
    return ai

def test_as_many_bars_are_kept_as_a_prediction_looks_at(): assert SPARE >= newest.SPARE

def test_signals_are_those_of_the_whole_history(model):
    snapshot, bars, end = model
    ours, other, market = ai_of(snapshot), ai_of(snapshot), Market(end, bars=bars)
    bot = SimpleNamespace(exchange=async_exchange(market))
    async def late(rows): await asyncio.Event().wait()
    async def go():
        keeper = Keeper(ours, find_candles(bot), deadline=LONG)
        for k in range(6):
            market.now, given = end + k * H, bars['time'] < end + k * H
            if k == 4:
                keeper.deadline, market.faults['XRP/USDT'] = 5., late
                given &= (bars['symbol'] != 'XRP/USDT') | (bars['time'] < end + (k - 1) * H)
            said = await keeper.once(market.now)
            assert 'model' not in keeper.health, keeper.health
            expected = other.predict_sync(bars[given], now=market.now)
            assert near({s: x['prediction'] for s, x in said.items()}, expected)
            signals = {s: other.get_trading_signal(s, now=market.now) for s in COINS}
            for s, x in said.items():
                assert [x['signal'][k] for k in ('action', 'why')] == [signals[s][k] for k in ('action', 'why')]
            if k != 4: assert said['BTC/USDT']['prediction']['faults'] == []
            else:
                assert said['XRP/USDT']['signal']['why'] != '' and keeper.health['XRP/USDT'].startswith('no answer')
                assert said['XRP/USDT']['prediction']['data_time'] == (end + (k - 1) * H).isoformat()
                market.faults.clear()
                await keeper.close()
                keeper.deadline = LONG
    asyncio.run(go())

# ---- the guide

PAGE_OF_BOTS = Path(__file__).parents[1]/'nbs'/'guide'/'in_your_bot.ipynb'
EXAMPLES = {}
for _cell in json.loads(PAGE_OF_BOTS.read_text(encoding='utf-8'))['cells']:
    _found = re.search(r'^## (.+?)\n(?:.*?)```python\n(.*?)```', ''.join(_cell['source']), re.S)
    if _found: EXAMPLES[_found[1]] = _found[2]
NAMED = dict(ai=UltimateTradingAI, ai_system=UltimateTradingAI, keeper=Keeper)    # What a name in an example is

def called(tree):
    "Calls of ours in an example, each with what is called"
    ours = {a.asname or a.name: getattr(importlib.import_module(n.module), a.name) for n in ast.walk(tree)
            if isinstance(n, ast.ImportFrom) and n.module.split('.')[0] == 'cryptoml' for a in n.names}
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        f = call.func
        if isinstance(f, ast.Name) and f.id in ours: yield call, ours[f.id], 0
        if not isinstance(f, ast.Attribute): continue
        owner = f.value.attr if isinstance(f.value, ast.Attribute) else getattr(f.value, 'id', None)
        if owner in NAMED: yield call, getattr(NAMED[owner], f.attr), 1

@pytest.mark.parametrize('name', EXAMPLES)
def test_every_call_in_the_guide_is_one_that_there_is(name):
    calls = list(called(ast.parse(EXAMPLES[name])))
    assert calls
    for call, f, own in calls:
        inspect.signature(f).bind(*[None] * (own + len(call.args)), **{k.arg: None for k in call.keywords})

def test_the_guide_is_short_and_places_no_order():
    assert list(EXAMPLES) == ['The book that was judged', 'A bot of your own', 'Newer weights', 'Sizes that are learnt',
                              'News', 'Jesse', 'Hummingbot', 'NautilusTrader']
    for code in EXAMPLES.values(): assert not re.search(r'create_order|\.buy\(|\.sell\(|submit_order|self\.buy =', code)

def modules_of(monkeypatch, **names):
    "Stand-ins of a project's modules; a name is a class and its module"
    for name, (module, value) in names.items():
        parts = module.split('.')
        for k in range(len(parts)):
            path = '.'.join(parts[:k + 1])
            if path not in sys.modules: monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        setattr(sys.modules[module], name, value)

@pytest.fixture
def shelf(model, monkeypatch):
    "Whatever is loaded is our model"
    snapshot, bars, end = model
    def load_state(self, path=None): self.snapshot = copy.deepcopy(snapshot)
    monkeypatch.setattr(UltimateTradingAI, 'load_state', load_state)
    return Market(end, bars=bars)

def run_example(name):
    "Its names"
    space = {'__name__': 'example'}
    exec(compile(EXAMPLES[name], name, 'exec'), space)
    return space

def test_the_strategy_for_jesse_runs(shelf, monkeypatch, capsys):
    class Strategy:
        exchange, timeframe, symbol = 'Binance', '1h', 'ETH-USDT'
        @property
        def time(self): return int(shelf.now.timestamp() * 1000)
        def get_candles(self, exchange, symbol, timeframe):
            mine = shelf.of(symbol.replace('-', '/'))[:-1]
            times = mine['time'].astype('int64').to_numpy()[:, None] / 1000
            return np.concatenate([times, mine[['open', 'close', 'high', 'low', 'volume']].to_numpy()], 1)
    modules_of(monkeypatch, Strategy=('jesse.strategies', Strategy))
    space = run_example('Jesse')
    strategy = space['Signals']()
    strategy.before()
    assert strategy.signal['symbol'] == 'ETH/USDT' and strategy.signal['data_time'] == shelf.now.isoformat()
    assert not (strategy.should_long() and strategy.should_short())
    other = ai_of(space['ai'].snapshot)
    other.predict_sync(shelf.bars[shelf.bars['time'] < shelf.now], now=shelf.now)
    assert strategy.signal == other.get_trading_signal('ETH/USDT', now=shelf.now)
    strategy.go_long()
    assert 'ETH-USDT' in capsys.readouterr().out

def test_the_script_for_hummingbot_runs(shelf, monkeypatch):
    told = []
    @dataclass
    class CandlesConfig:
        connector: str
        trading_pair: str
        interval: str = '1m'
        max_records: int = 500
    class Feed:
        def __init__(self, config): self.config, self.running = config, False
        def start(self): self.running = True
        def stop(self): self.running = False
        @property
        def candles_df(self):
            assert self.config.interval == '1h' and self.running
            mine = shelf.of(self.config.trading_pair.replace('-', '/')).tail(self.config.max_records)
            return mine.assign(timestamp=mine['time'].astype('int64') / 1e6).drop(columns=['time', 'symbol'])
    class ScriptStrategyBase:
        def __init__(self, connectors, config=None): pass
        def logger(self): return SimpleNamespace(info=told.append)
    modules_of(monkeypatch,
               CandlesFactory=('hummingbot.data_feed.candles_feed.candles_factory', SimpleNamespace(get_candle=Feed)),
               CandlesConfig=('hummingbot.data_feed.candles_feed.data_types', CandlesConfig),
               ScriptStrategyBase=('hummingbot.strategy.script_strategy_base', ScriptStrategyBase))
    monkeypatch.setattr(Keeper, 'clock', property(lambda self: lambda: shelf.now + AFTER, lambda self, f: None),
                        raising=False)
    async def go():
        script = run_example('Hummingbot')['Signals']({})
        await until(lambda: script.keeper.said or 'keeper' in script.keeper.health)
        assert script.keeper.health == dict.fromkeys(COINS)
        script.on_tick()
        assert len(told) == 3 and 'no prediction' not in told[0]
        await script.on_stop()
        assert not any(f.running for f in script.feeds.values())
    asyncio.run(go())

def test_the_strategy_for_nautilus_runs(shelf, monkeypatch):
    told, asked = [], []
    class StrategyConfig:
        def __init_subclass__(cls, frozen=False): pass
    @dataclass
    class Bar:
        symbol: str
        numbers: list
        ts_event: int
        def __post_init__(self):
            self.open, self.high, self.low, self.close, self.volume = self.numbers
            value = SimpleNamespace(value=self.symbol.replace('/', ''))
            self.bar_type = SimpleNamespace(instrument_id=SimpleNamespace(symbol=value))
    class Strategy:
        clock = SimpleNamespace(utc_now=lambda: shelf.now, timestamp_ns=lambda: shelf.now.value)
        log = SimpleNamespace(info=told.append)
        def request_bars(self, bar_type, start): asked.append((bar_type, start))
        def subscribe_bars(self, bar_type): pass
    modules_of(monkeypatch, StrategyConfig=('nautilus_trader.config', StrategyConfig),
               Bar=('nautilus_trader.model.data', Bar), BarType=('nautilus_trader.model.data', str),
               Strategy=('nautilus_trader.trading.strategy', Strategy))
    strategy = run_example('NautilusTrader')['Signals']()
    strategy.config = SimpleNamespace(bar_types=COINS, model='any')
    strategy.on_start()
    for symbol, start in asked:
        mine = shelf.of(symbol)[:-1]
        mine = mine[mine['time'] >= start]
        closes, rows = mine['time'] + H, mine[CANDLE].to_numpy().tolist()
        *past, last = [Bar(symbol, row, t.value) for t, row in zip(closes, rows)]
        for bar in past: strategy.on_historical_data(bar)
        assert not told
        strategy.on_bar(last)
    said = strategy.ai.get_trading_signal('XRP/USDT', now=shelf.now)
    assert len(told) == 3 and said['data_time'] == shelf.now.isoformat()
