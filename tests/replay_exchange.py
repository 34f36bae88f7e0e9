"""A spot exchange on loopback that any ccxt bot can trade on: Binance's REST calls, answered from bars

In a test:

    with replaying(bars, start='2024-03-01') as exchange:      # bars: anything `read_bars` takes; None: simulated
        bot = ccxt.binance(exchange.ccxt_config())
        exchange.step(3)                                       # three bars later
        exchange.faults(http500=.5)                            # from now on

or as a process, `python tests/replay_exchange.py --port 8899 --clock rate --bars-per-s 2`, which ends by itself.

Clocks: step  the time moves by `step` and `set_time` only, or POST /_ctl/step?bars=1, /_ctl/set?ms=...
        rate  the time begins at --start and runs --bars-per-s bars a second
        wall  the time of this machine: the bars are moved by whole days so that --start is today
Faults, each a probability: http500, http429, timeout, malformed of a request; missing, duplicate of a bar, for good;
        hole: a bar is left out of one answer; ooo: two rows of an answer change places; stale: for a whole bar
        the market shows what it was ten bars ago.
What is real: the bars; simulated ones come with funding, and with daily values at /v4, as Coin Metrics gives them.
        Inside a bar the price walks open-low-high-close (a bar that rose) or open-high-low-close, and the bar in
        progress shows what was walked. The book, the trades and, without a frame of it, the funding rate are made up.
        Market orders walk the book, resting limit orders fill when a later bar trades through them; the fee is 0.1 %.
        Perpetuals share the bars of their coin and cannot be traded. The same seed and the same order of requests
        give the same answers.
"""
import argparse, bisect, hashlib, json, re, threading, time
from collections import Counter, defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit
from urllib.request import Request, urlopen

import numpy as np
import pandas as pd

FEE = 0.001
TRADES = 8                      # made up in each bar
PAGE = 100                      # days of on-chain values at once
HOUR = 3_600_000                # milliseconds, as all times here
DAY = 24 * HOUR
UNIT = dict(m=60_000, h=HOUR, d=DAY, w=7 * DAY)
FAULTS = ('http500', 'http429', 'timeout', 'malformed', 'missing', 'duplicate', 'hole', 'ooo', 'stale')
GARBAGE = ('[[1516406400000,"0.10', '{}', '<html>busy</html>', 'null', '[[null,null,null,null,null,null]]')
GROUPS = {'public': 'api/v3', 'private': 'api/v3', 'v1': 'api/v1', 'sapi': 'sapi/v1', 'sapiV2': 'sapi/v2',
          'sapiV3': 'sapi/v3', 'fapiPublic': 'fapi/v1', 'fapiPublicV2': 'fapi/v2', 'fapiPublicV3': 'fapi/v3',
          'fapiPrivate': 'fapi/v1', 'fapiData': 'futures/data', 'dapiPublic': 'dapi/v1'}

def chance(*parts):
    "A number in [0, 1) that depends on nothing but its arguments"
    digest = hashlib.blake2b('|'.join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'big') / 2**64

def text(x):
    "A number with every digit and no exponent"
    plain = repr(float(x))
    return np.format_float_positional(x, trim='0') if 'e' in plain else plain

def milliseconds(moment):
    moment = pd.Timestamp(moment)
    return (moment if moment.tz else moment.tz_localize('UTC')).value // 10**6

class Refused(Exception):
    "An answer that is an error of the exchange"
    def __init__(self, code, message, status=400):
        super().__init__(message)
        self.status, self.answer = status, dict(code=code, msg=message)

class Market:
    "The bars of one coin"
    def __init__(self, symbol, frame, bar):
        self.base, self.quote = symbol.split('/')
        self.id = self.base + self.quote
        self.bar = bar
        self.t = frame['time'].dt.as_unit('ms').astype('int64').to_numpy()
        self.o, self.h, self.l, self.c, self.v = (
            frame[k].to_numpy(float, copy=True) for k in ('open', 'high', 'low', 'close', 'volume'))
        level = self.c.mean()
        self.digits = int(np.clip(5 - np.floor(np.log10(level)), 0, 10))      # of a price
        self.lot = 5 if level > 1 else 3 if level > 1e-3 else 0              # digits of an amount
        self.least = '0.0001' if self.quote in ('BTC', 'ETH') else '5'       # value of an order
        self.spread = max(10.0**-self.digits / level, 0.1 * np.std(np.diff(np.log(self.c[-2000:]))), 2e-5)
        self.rate = None                                                     # times and rates of funding
        self.cache = {}

    def index(self, now): return int(np.searchsorted(self.t, now, 'right')) - 1

    def path(self, i, now):
        "Price, high, low and share of the bar's volume at a moment of bar i"
        part = min(1., (now - self.t[i]) / self.bar)
        o, h, l, c = self.o[i], self.h[i], self.l[i], self.c[i]
        turns = (o, l, h, c) if c >= o else (o, h, l, c)
        k = min(2, int(part * 3))
        price = turns[k] + (turns[k + 1] - turns[k]) * (part * 3 - k)
        seen = (*turns[:k + 1], price)
        return price, max(seen), min(seen), part

    def price(self, now):
        i = self.index(now)
        if i < 0: raise Refused(-1000, 'before the first bar', 503)
        return round(self.path(i, now)[0], self.digits)

    def whole(self, length):
        "All bars of a length: time, first bar of ours in it, open, high, low, close, volume"
        if length < self.bar or length % self.bar: raise Refused(-1120, 'Invalid interval.')
        if length not in self.cache:
            opens = self.t - self.t % length
            cut = np.flatnonzero(np.r_[True, opens[1:] != opens[:-1]])
            last = np.r_[cut[1:] - 1, len(opens) - 1]
            self.cache[length] = (opens[cut], cut, self.o[cut], np.maximum.reduceat(self.h, cut),
                                  np.minimum.reduceat(self.l, cut), self.c[last], np.add.reduceat(self.v, cut))
        return self.cache[length]

    def bars(self, length, now):
        "time, open, high, low, close, volume of the bars opened until now; the last one as far as it has come"
        t, cut, *values = self.whole(length)
        i = self.index(now)
        n = int(np.searchsorted(cut, i, 'right')) if i >= 0 else 0
        t, (o, h, l, c, v) = t[:n], (x[:n].copy() for x in values)
        if n:
            price, high, low, part = self.path(i, now)
            first = cut[n - 1]
            h[-1], l[-1], c[-1] = max([high, *self.h[first:i]]), min([low, *self.l[first:i]]), price
            v[-1] = self.v[first:i].sum() + self.v[i] * part
        return t, o, h, l, c, v

    def funding(self, t):
        "The rate at a moment: from the frame, else made up from the trend"
        if self.rate is not None:
            i = int(np.searchsorted(self.rate[0], t, 'right')) - 1
            return float(self.rate[1][i]) if i >= 0 else 1e-4
        i, before = (max(0, self.index(x)) for x in (t, t - 3 * DAY))
        return round(float(np.clip(1e-4 + 0.002 * np.log(self.c[i] / self.c[before]), -.003, .003)), 8)

def loaded(data, funding, chain, coins, bars, seed, timeframe):
    "Markets by id, daily on-chain values or None, and the length of a bar"
    from cryptoml.data import read_bars
    from cryptoml.simulate import simulate
    if data is None:
        made = simulate(coins, bars, seed=seed, timeframe=timeframe)
        data, funding, chain = made.bars, made.funding, made.onchain
    frame = read_bars(data)
    gaps = frame.groupby('symbol')['time'].diff().dt.total_seconds().dropna()
    bar = int(gaps.mode()[0] * 1000)
    markets = {}
    for symbol, part in frame.groupby('symbol'):
        market = Market(symbol, part.dropna(subset=['open', 'high', 'low', 'close']).fillna({'volume': 0.}), bar)
        markets[market.id] = market
        if funding is None: continue
        rows = funding[funding['symbol'] == symbol]
        market.rate = rows['time'].dt.as_unit('ms').astype('int64').to_numpy(), rows['funding_rate'].to_numpy()
    return markets, chain, bar

class Exchange:
    "What is behind the address: the clock, the markets, one account"
    def __init__(self, data=None, funding=None, chain=None, start=None, clock='step', bars_per_s=1., seed=0, faults=(),
                 hang=30., balance=(('USDT', 1e5),), coins=3, bars=3000, timeframe='1h'):
        self.markets, self.chain, self.bar = loaded(data, funding, chain, coins, bars, seed, timeframe)
        self.seed, self.clock, self.bars_per_s, self.hang = seed, clock, bars_per_s, hang
        first, last = (f(f(m.t) for m in self.markets.values()) for f in (min, max))
        self.began = milliseconds(time.time_ns())
        self.origin = int(first) if start is None else milliseconds(start)
        self.shift = (self.began - self.origin) // DAY * DAY if clock == 'wall' else 0
        for m in self.markets.values():
            m.t = m.t + self.shift
            if m.rate is not None: m.rate = m.rate[0] + self.shift, m.rate[1]
        self.end = int(last) + self.bar + self.shift
        self.virtual = self.origin
        self.odds = dict.fromkeys(FAULTS, 0.)
        self.faults(**dict(faults))
        self.calls, self.injected, self.drawn, self.log = Counter(), Counter(), Counter(), []
        self.balance = defaultdict(lambda: [0., 0.], {k: [v, 0.] for k, v in dict(balance).items()})   # free, locked
        self.orders, self.fills, self.by_client = {}, [], {}
        self.lock = threading.RLock()
        self.server = None
        self.port = 0

    # the clock and the faults
    def now(self):
        now = self.virtual
        if self.clock == 'wall': now = milliseconds(time.time_ns())
        if self.clock == 'rate': now += (milliseconds(time.time_ns()) - self.began) * self.bars_per_s * self.bar / 1000
        return int(min(now, self.end))

    def time(self): return pd.Timestamp(self.now(), unit='ms', tz='UTC')
    def step(self, bars=1): self.virtual = int(min(self.virtual + bars * self.bar, self.end))
    def set_time(self, moment): self.virtual = milliseconds(moment)

    def faults(self, **odds):
        "From now on; those that are not named stay as they are"
        unknown = set(odds) - set(FAULTS)
        if unknown: raise ValueError(f'no fault {", ".join(unknown)}: there are {", ".join(FAULTS)}')
        self.odds |= {k: float(v) for k, v in odds.items()}

    def hits(self, kind, *key):
        "Whether a fault strikes what the key names"
        if not self.odds[kind]: return False
        hit = chance(kind, self.seed, *key) < self.odds[kind]
        self.injected[kind] += hit
        return hit

    def draws(self, kind, *key):
        "Whether a fault strikes this time"
        if not self.odds[kind]: return False
        self.drawn[kind, key] += 1
        return self.hits(kind, self.drawn[kind, key], *key)

    # market data
    def market(self, q):
        if q.get('symbol') not in self.markets: raise Refused(-1121, 'Invalid symbol.')
        return self.markets[q['symbol']]

    def info(self, m, swap):
        tick, lot = text(10.0**-m.digits), text(10.0**-m.lot)
        row = dict(symbol=m.id, status='TRADING', baseAsset=m.base, quoteAsset=m.quote, baseAssetPrecision=8,
                   quotePrecision=8, quoteAssetPrecision=8, pricePrecision=m.digits, quantityPrecision=m.lot,
                   isSpotTradingAllowed=True, isMarginTradingAllowed=False, permissions=['SPOT'],
                   permissionSets=[['SPOT']], orderTypes=['LIMIT', 'LIMIT_MAKER', 'MARKET', 'STOP_LOSS_LIMIT'])
        row['filters'] = [
            dict(filterType='PRICE_FILTER', minPrice=tick, maxPrice='10000000', tickSize=tick),
            dict(filterType='LOT_SIZE', minQty=lot, maxQty='90000000000', stepSize=lot),
            dict(filterType='MARKET_LOT_SIZE', minQty=lot, maxQty='90000000000', stepSize=lot),
            dict(filterType='MIN_NOTIONAL', notional=m.least) if swap else
            dict(filterType='NOTIONAL', minNotional=m.least, applyMinToMarket=True, maxNotional='9000000000')]
        if not swap: return row
        return row | dict(contractType='PERPETUAL', marginAsset=m.quote, pair=m.id, deliveryDate=4133404800000,
                          onboardDate=1569398400000, underlyingType='COIN', maintMarginPercent='2.5000',
                          requiredMarginPercent='5.0000')

    def seen(self, m):
        "The time whose market is shown: a stale one is ten bars old for a whole bar"
        now = self.now()
        return max(int(m.t[0]), now - 10 * m.bar) if self.hits('stale', m.id, (now - self.shift) // m.bar) else now

    def klines(self, q, most):
        m = self.market(q)
        length = int(q['interval'][:-1]) * UNIT[q['interval'][-1]]
        t, o, h, l, c, v = m.bars(length, self.seen(m))
        limit = min(int(q.get('limit', 500)), most)
        low = bisect.bisect_left(t, int(q['startTime'])) if q.get('startTime') else 0
        high = bisect.bisect_right(t, int(q['endTime'])) if q.get('endTime') else len(t)
        low, high = (low, min(high, low + limit)) if q.get('startTime') else (max(0, high - limit), high)
        rows = []
        for i in range(low, high):
            who = m.id, q['interval'], int(t[i]) - self.shift
            last = i == len(t) - 1
            if not last and (self.hits('missing', *who) or self.draws('hole', *who)): continue
            value = text(v[i] * c[i])
            row = [int(t[i]), text(o[i]), text(h[i]), text(l[i]), text(c[i]), text(v[i]), int(t[i]) + length - 1,
                   value, TRADES, text(v[i] / 2), text(v[i] * c[i] / 2), '0']
            rows += [row] * (1 + (not last and self.hits('duplicate', *who)))
        if len(rows) > 3 and self.draws('ooo', m.id, q['interval']): rows[-2], rows[-3] = rows[-3], rows[-2]
        return rows

    def levels(self, m, now, n):
        "n bids and n asks; their size follows the volume of the bar"
        price, i = m.price(now), m.index(now)
        tick, slot = 10.0**-m.digits, now // max(1000, m.bar // 60)
        lean = chance('lean', self.seed, m.id, slot) - .5
        sides = []
        for side in (-1, 1):
            prices = np.round(price * (1 + side * m.spread / 2 * np.arange(1, n + 1)), m.digits)
            step = np.maximum(np.abs(np.diff(prices)), tick)                 # no two levels at one price
            prices = np.round(prices[0] + side * np.r_[0, np.cumsum(step)], m.digits)
            share = [.5 + chance(side, self.seed, m.id, slot, k) for k in range(n)]
            size = np.maximum(10.0**-m.lot, (m.v[i] + 1e-9) * .02 * np.array(share) * (1 - side * lean))
            sides.append([(p, s) for p, s in zip(prices, size) if p > 0])
        return sides

    def depth(self, q):
        now = self.now()
        bids, asks = self.levels(self.market(q), now, min(int(q.get('limit', 100)), 500))
        written = dict(bids=[[text(p), text(s)] for p, s in bids], asks=[[text(p), text(s)] for p, s in asks])
        return dict(lastUpdateId=now, E=now, T=now) | written

    def ticker(self, m, name, swap):
        "ccxt tells spot from futures by the fields: a day of futures has no bid and ask"
        now = self.seen(m)
        t, o, h, l, c, v = m.bars(m.bar, now)
        day = bisect.bisect_left(t, now - DAY)
        price, first = float(c[-1]), float(o[day])
        (bid,), (ask,) = self.levels(m, now, 1)
        book = dict(bidPrice=text(bid[0]), bidQty=text(bid[1]), askPrice=text(ask[0]), askQty=text(ask[1]))
        if name == 'ticker/bookTicker': return dict(symbol=m.id) | book | (dict(time=self.now()) if swap else {})
        return dict(symbol=m.id, price=text(price), lastPrice=text(price), weightedAvgPrice=text(price), lastQty='1',
                    priceChange=text(price - first), priceChangePercent=f'{(price / first - 1) * 100:.3f}',
                    openPrice=text(first), prevClosePrice=text(first), highPrice=text(h[day:].max()),
                    lowPrice=text(l[day:].min()), volume=text(v[day:].sum()),
                    quoteVolume=text((v[day:] * c[day:]).sum()), openTime=int(t[day]), closeTime=now,
                    firstId=0, lastId=1, count=1) | ({} if swap else book)

    def of_all(self, q, row):
        "A row of the market asked for, or of each that has begun"
        if q.get('symbol'): return row(self.market(q))
        names = json.loads(q['symbols']) if q.get('symbols') else self.markets
        return [row(self.markets[k]) for k in names if k in self.markets and self.markets[k].t[0] <= self.now()]

    def trades(self, q):
        "Trades along each bar's path; an id is the bar's number times TRADES and what comes after it"
        m, now = self.market(q), self.now()
        limit = min(int(q.get('limit', 500)), 1000)
        i = m.index(now)
        done = int(np.clip((now - m.t[i]) * TRADES / m.bar + .5, 0, TRADES))
        first = max(0, i * TRADES + done - limit)
        if q.get('startTime'): first = int(np.searchsorted(m.t, int(q['startTime']))) * TRADES
        if q.get('fromId'): first = int(q['fromId'])
        end, rows = min(now, int(q.get('endTime') or now)), []
        for j in range(first, min(first + limit, len(m.t) * TRADES)):
            i, k = divmod(j, TRADES)
            when = int(m.t[i] + m.bar * (k + .5) / TRADES)
            if when > end: break
            price = round(m.path(i, when)[0], m.digits)
            sold = bool(price < m.path(i, max(m.t[i], when - m.bar // TRADES))[0])
            amount = text(m.v[i] / TRADES * (.5 + chance('amount', self.seed, m.id, j)))
            rows.append(dict(a=j, id=j, p=text(price), price=text(price), q=amount, qty=amount, f=j, l=j, T=when,
                             quoteQty=text(price * float(amount)), time=when, m=sold, isBuyerMaker=sold, M=True))
        return rows

    # perpetuals
    def premium(self, m):
        now = self.now()
        price = text(m.price(now))
        return dict(symbol=m.id, markPrice=price, indexPrice=price, estimatedSettlePrice=price, time=now,
                    interestRate='0.00010000', lastFundingRate=text(m.funding(now)),
                    nextFundingTime=now - now % (8 * HOUR) + 8 * HOUR)

    def settlements(self, q):
        m, now = self.market(q), self.now()
        limit = min(int(q.get('limit', 100)), 1000)
        end = min(now, int(q.get('endTime') or now))
        start = int(q.get('startTime') or max(int(m.t[0]), end - limit * 8 * HOUR))
        times = range(int(m.t[0]) // (8 * HOUR) * 8 * HOUR + 8 * HOUR, end + 1, 8 * HOUR)
        if m.rate is not None: times = m.rate[0].tolist()
        return [dict(symbol=m.id, fundingTime=t, fundingRate=text(m.funding(t)), markPrice=text(m.price(t)))
                for t in times if start <= t <= end][:limit]

    # a vendor of on-chain values, in the words of Coin Metrics
    def daily(self, q):
        "A page of days that are over, and the address of the next"
        rows = self.chain[self.chain['asset'].isin(q['assets'].split(',')) & (self.chain['known'] <= self.time())]
        rows = rows[rows['time'] >= pd.Timestamp(q['start_time'], tz='UTC')]
        if 'end_time' in q: rows = rows[rows['time'] <= pd.Timestamp(q['end_time'], tz='UTC')]
        names = [c for c in q['metrics'].split(',') if c in rows]
        at = int(q.get('next_page_token', 0))
        end = at + min(int(q.get('page_size', 100)), PAGE)
        page = rows.sort_values(['asset', 'time']).iloc[at:end].to_dict('records')
        stamp = '%Y-%m-%dT00:00:00.000000000Z'
        data = [dict(asset=r['asset'], time=r['time'].strftime(stamp)) | {k: text(r[k]) for k in names} for r in page]
        if end >= len(rows): return dict(data=data)
        following = f'{self.url}/v4/timeseries/asset-metrics?{urlencode(q | dict(next_page_token=end))}'
        return dict(data=data, next_page_url=following, next_page_token=str(end))

    # the account
    def account(self):
        rows = [dict(asset=k, free=text(free), locked=text(locked)) for k, (free, locked) in self.balance.items()]
        return dict(makerCommission=10, takerCommission=10, canTrade=True, accountType='SPOT', updateTime=self.now(),
                    balances=rows, permissions=['SPOT'], commissionRates=dict(maker=str(FEE), taker=str(FEE)))

    def place(self, q):
        m, now = self.market(q), self.now()
        if q.get('newClientOrderId') in self.by_client: raise Refused(-2010, 'Duplicate order sent.')
        bids, asks = self.levels(m, now, 50)
        buy, limit = q['side'] == 'BUY', 'LIMIT' in q['type']
        levels = asks if buy else bids
        price = float(q['price']) if limit else levels[0][0]
        amount = float(q['quantity']) if q.get('quantity') else float(q['quoteOrderQty']) / price
        amount = int(amount * 10**m.lot + 1e-9) / 10**m.lot
        if amount <= 0 or amount * price < float(m.least): raise Refused(-1013, 'Filter failure: NOTIONAL')
        asset, cost = (m.quote, amount * price) if buy else (m.base, amount)
        if self.balance[asset][0] + 1e-12 < cost:
            raise Refused(-2010, 'Account has insufficient balance for requested action.')
        number = len(self.orders) + 1
        client = q.get('newClientOrderId') or f'replay{number}'
        o = dict(symbol=m.id, orderId=number, orderListId=-1, clientOrderId=client, price=text(price if limit else 0),
                 origQty=text(amount), executedQty=text(0), cummulativeQuoteQty=text(0), status='NEW', fills=[],
                 timeInForce=q.get('timeInForce', 'GTC'), type=q['type'], side=q['side'], time=now, transactTime=now,
                 updateTime=now, workingTime=now, isWorking=True)
        self.orders[number] = self.by_client[client] = o
        if limit: self.reserve(asset, cost)
        self.take(o, m, levels, amount, price if limit else None)
        if o['status'] != 'FILLED' and q.get('timeInForce') in ('IOC', 'FOK'): self.cancel(o, 'EXPIRED')
        return o

    def reserve(self, asset, amount):
        self.balance[asset][0] -= amount
        self.balance[asset][1] += amount

    def take(self, o, m, levels, amount, limit):
        "Walk the book, no further than the limit; a market order that is larger than the book takes its last price"
        side = 1 if o['side'] == 'BUY' else -1
        left = amount
        spent = 0.
        for price, size in levels:
            if limit is not None and (price - limit) * side > 0: break
            part = min(left, size)
            left, spent = left - part, spent + part * price
        if limit is None: left, spent = 0., spent + left * levels[-1][0]
        if amount - left > 1e-12: self.fill(o, m, amount - left, spent / (amount - left), False)

    def fill(self, o, m, amount, price, maker):
        buy = o['side'] == 'BUY'
        got, paid = (m.base, m.quote) if buy else (m.quote, m.base)
        cost, income = (amount * price, amount) if buy else (amount, amount * price)
        if 'LIMIT' in o['type']: self.reserve(paid, -(amount * float(o['price']) if buy else amount))
        self.balance[paid][0] -= cost
        self.balance[got][0] += income * (1 - FEE)
        done = float(o['executedQty']) + amount
        full = done >= float(o['origQty']) - 1e-9
        value = float(o['cummulativeQuoteQty']) + amount * price
        o.update(executedQty=text(done), cummulativeQuoteQty=text(value), updateTime=self.now(),
                 status='FILLED' if full else 'PARTIALLY_FILLED')
        row = dict(symbol=m.id, id=len(self.fills) + 1, orderId=o['orderId'], price=text(price), qty=text(amount),
                   quoteQty=text(amount * price), commission=text(income * FEE), commissionAsset=got, time=self.now(),
                   isBuyer=buy, isMaker=maker, isBestMatch=True)
        self.fills.append(row)
        o['fills'].append(row | dict(tradeId=row['id']))

    def resting(self): return [o for o in self.orders.values() if o['status'] in ('NEW', 'PARTIALLY_FILLED')]

    def settle(self):
        "Fill resting orders whose price was traded through since"
        now = self.now()
        for o in self.resting():
            m, limit, buy = self.markets[o['symbol']], float(o['price']), o['side'] == 'BUY'
            since, until = m.index(o['time']) + 1, m.index(now)
            price = m.price(now)
            reached = min([price, *m.l[since:until]]) <= limit if buy else max([price, *m.h[since:until]]) >= limit
            if reached: self.fill(o, m, float(o['origQty']) - float(o['executedQty']), limit, True)

    def find(self, q):
        o = self.orders.get(int(q['orderId'])) if q.get('orderId') else self.by_client.get(q.get('origClientOrderId'))
        if not o: raise Refused(-2013, 'Order does not exist.')
        return o

    def cancel(self, o, status='CANCELED'):
        if o not in self.resting(): raise Refused(-2011, 'Unknown order sent.')
        m, left = self.markets[o['symbol']], float(o['origQty']) - float(o['executedQty'])
        asset, amount = (m.quote, left * float(o['price'])) if o['side'] == 'BUY' else (m.base, left)
        self.reserve(asset, -amount)
        o.update(status=status, updateTime=self.now())
        return o

    # one request
    def serves(self, swap):
        "What a GET is answered with, by the end of its path"
        coins = self.markets.values()
        interval = dict(fundingIntervalHours=8, adjustedFundingRateCap='0.02', adjustedFundingRateFloor='-0.02')
        both = {
            'ping': lambda q: {},
            'time': lambda q: dict(serverTime=self.now()),
            'exchangeInfo': lambda q: dict(timezone='UTC', serverTime=self.now(), rateLimits=[], exchangeFilters=[],
                                           symbols=[self.info(m, swap) for m in coins]),
            'klines': lambda q: self.klines(q, 1500 if swap else 1000),
            'depth': self.depth,
            **{k: self.trades for k in ('trades', 'aggTrades', 'historicalTrades')},
            **{k: lambda q, k=k: self.of_all(q, lambda m: self.ticker(m, k, swap))
               for k in ('ticker/24hr', 'ticker/bookTicker', 'ticker/price')},
        }
        return both | ({
            'markPriceKlines': lambda q: self.klines(q, 1500),
            'premiumIndex': lambda q: self.of_all(q, self.premium),
            'fundingRate': self.settlements,
            'fundingInfo': lambda q: [dict(symbol=m.id) | interval for m in coins],
        } if swap else {
            'capital/config/getall': lambda q: [],
            **{f'margin/{k}': lambda q: [] for k in ('allAssets', 'allPairs', 'isolated/allPairs')},
            'account': lambda q: self.account(),
            'order': self.find,
            'openOrders': lambda q: [o for o in self.resting() if q.get('symbol') in (None, o['symbol'])],
            'allOrders': lambda q: [o for o in self.orders.values() if q.get('symbol') in (None, o['symbol'])],
            'myTrades': lambda q: [f for f in self.fills if f['symbol'] == q.get('symbol')
                                   and q.get('orderId') in (None, str(f['orderId']))],
        })

    def answer(self, method, path, q):
        if path == '/v4/timeseries/asset-metrics' and self.chain is not None: return self.daily(q)
        found = re.fullmatch(r'/(\w+)/(?:v\d|data)/(.+)', path)
        family, name = found.groups() if found else ('', path)
        self.settle()
        if family == 'dapi' and name == 'exchangeInfo': return dict(symbols=[])
        act = self.serves(family in ('fapi', 'futures')).get(name) if method == 'GET' else {
            ('POST', 'api', 'order'): self.place,
            ('DELETE', 'api', 'order'): lambda q: self.cancel(self.find(q)),
        }.get((method, family, name))
        if act is None: raise Refused(-1, f'the replay exchange does not serve {method} {path}', 404)
        return act(q)

    def respond(self, method, path, q):
        "Status and text of an answer; None: the line goes dead"
        if path.startswith('/_ctl/'): return 200, json.dumps(self.control(path[6:], q))
        key = ' '.join([method, path, *(f'{k}={q[k]}' for k in ('symbol', 'interval', 'symbols', 'side') if k in q)])
        with self.lock:
            self.calls[key] += 1
            self.log.append((self.now(), key))
            kind = next((k for k in ('http500', 'http429', 'timeout', 'malformed') if self.draws(k, key)), None)
        if kind == 'http500': return 500, '{"code": -1001, "msg": "Internal error"}'
        if kind == 'http429': return 429, '{"code": -1003, "msg": "Too many requests."}'
        if kind == 'malformed': return 200, GARBAGE[self.injected[kind] % len(GARBAGE)]
        if kind == 'timeout': return time.sleep(self.hang)
        try:
            with self.lock: return 200, json.dumps(self.answer(method, path, q))
        except Refused as e: return e.status, json.dumps(e.answer)
        except (KeyError, ValueError, AttributeError) as e:
            return 400, json.dumps(dict(code=-1102, msg=f'bad parameter: {e!r}'))

    def control(self, what, q):
        "From another process"
        if what == 'step': self.step(int(q.get('bars', 1)))
        if what == 'set': self.virtual = int(q['ms'])
        if what == 'faults': self.faults(**q)
        if what == 'log': return self.log[-int(q.get('n', 2000)):]
        if what == 'reset_log': self.forget()
        return dict(now=self.now(), iso=str(self.time()), bar_ms=self.bar, shift_ms=self.shift, ends=self.end,
                    markets=sorted(self.markets), faults=self.odds, injected=dict(self.injected),
                    calls=dict(self.calls.most_common()), orders=len(self.orders))

    def forget(self):
        self.calls.clear()
        self.injected.clear()
        self.log.clear()

    # its address
    @property
    def url(self): return f'http://127.0.0.1:{self.port}'

    def ccxt_config(self, **more):
        "What a ccxt object is made with"
        api = {k: f'{self.url}/{path}' for k, path in GROUPS.items()}
        options = dict(fetchMarkets=dict(types=['spot', 'linear']), warnOnFetchOpenOrdersWithoutSymbol=False)
        return dict(apiKey='replay', secret='replay', urls=dict(api=api), timeout=5000, rateLimit=1,
                    options=options) | more

    def up(self):
        "Begin to answer, on the same port as before"
        self.server = Server(('127.0.0.1', self.port), Handler)
        self.server.exchange = self
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(.01,), daemon=True).start()

    def down(self):
        "Hang up, and refuse to be called"
        self.server.exchange = None
        self.server.shutdown()
        self.server.server_close()

class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 100
    exchange = None

    def handle_error(self, request, address): pass   # a client that left

class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def log_message(self, *_): pass

    def reply(self):
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0)).decode()
        exchange = self.server.exchange
        answer = exchange and exchange.respond(self.command, parts.path, dict(parse_qsl(parts.query) + parse_qsl(body)))
        if not answer or self.server.exchange is None:
            self.close_connection = True
            return
        status, written = answer
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(written)))
        self.end_headers()
        self.wfile.write(written.encode())

    do_GET = do_POST = do_DELETE = do_PUT = reply

@contextmanager
def replaying(data=None, **options):
    "A running exchange, on a free port until the block ends; the options are those of `Exchange`"
    exchange = Exchange(data, **options)
    exchange.up()
    try: yield exchange
    finally:
        if exchange.server.exchange: exchange.down()

def command(url, what, **values):
    "Tell an exchange in another process something: step(bars), set(ms), faults(...), log, reset_log, state"
    query = '&'.join(f'{k}={v}' for k, v in values.items())
    with urlopen(Request(f'{url}/_ctl/{what}?{query}', method='POST'), timeout=10) as answer: return json.load(answer)

def pairs(written): return {k: float(v) for k, v in (part.split('=') for part in written.split(',') if part)}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', help='a file or folder of bars; default: the simulated market')
    p.add_argument('--funding', help='a parquet file of time, symbol, funding_rate')
    p.add_argument('--coins', type=int, default=3, help='of the simulated market')
    p.add_argument('--bars', type=int, default=3000, help='of each of its coins')
    p.add_argument('--timeframe', default='1h', help='of its bars')
    p.add_argument('--port', type=int, default=0, help='default: a free one')
    p.add_argument('--start', help='moment at which the replay begins; default: the first bar')
    p.add_argument('--clock', choices=('step', 'rate', 'wall'), default='wall')
    p.add_argument('--bars-per-s', type=float, default=1.)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--faults', type=pairs, default={}, help='http500=.03,malformed=.02')
    p.add_argument('--hang', type=float, default=30., help='seconds that a timeout lasts')
    p.add_argument('--balance', type=pairs, default=dict(USDT=1e5), help='BTC=10,USDT=100000')
    p.add_argument('--max-seconds', type=float, default=3600.)
    a = vars(p.parse_args())
    port, seconds = a.pop('port'), a.pop('max_seconds')
    if a['funding']: a['funding'] = pd.read_parquet(a['funding'])
    exchange = Exchange(**a)
    exchange.port = port
    exchange.up()
    print(f'replay exchange on {exchange.url} now={exchange.time():%Y-%m-%d %H:%M} bar={exchange.bar // 1000}s '
          f'{" ".join(exchange.markets)}', flush=True)
    time.sleep(seconds)
    exchange.down()

if __name__ == '__main__':
    import sys
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
