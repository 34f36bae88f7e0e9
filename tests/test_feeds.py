"""Feeds against an exchange on loopback: deep pages, every fault, an exchange that goes and comes back, kill -9"""
import ast, inspect, json, logging, os, signal, subprocess, sys, textwrap, threading

import pandas as pd
import psutil
import pytest

from cryptoml import feeds, jobs, parameters, runs, sources
from cryptoml.data import Store
from cryptoml.feeds import Feed, FeedError, Health, Patience, gaps, opened, record_books, recorded_books
from cryptoml.sources import onchain
from cryptoml.microstructure import trades_frame
from cryptoml.simulate import simulate

ccxt = pytest.importorskip('ccxt')
from replay_exchange import PAGE, replaying

HOUR = pd.Timedelta('1h')
OHLCV = ['open', 'high', 'low', 'close', 'volume']
HANGS = 600   # Seconds after which something that should have happened never will

@pytest.fixture(scope='module')
def world(): return simulate(3, 24 * 800, seed=5)

@pytest.fixture
def exchange(world):
    "Open at 2022-04-01; three coins since 2022-01-01, for two years and more"
    with replaying(world.bars, funding=world.funding, chain=world.onchain, start='2022-04-01') as x: yield x

def feed_of(exchange, symbols=('BTC/USDT', 'ETH/USDT', 'SHIB/USDT'), **options):
    "A feed that waits for nothing but the exchange"
    keyless = exchange.ccxt_config(apiKey=None, secret=None)
    return Feed(ccxt.binance(keyless), symbols, '1h', **dict(pause=0) | options)

def truth(world, first, last, symbols=None):
    "Bars opened from `first` until before `last`"
    bars = world.bars[world.bars.time.between(pd.Timestamp(first, tz='UTC'), pd.Timestamp(last, tz='UTC'), 'left')]
    if symbols: bars = bars[bars.symbol.isin(symbols)]
    return bars[['time', 'symbol', *OHLCV]].reset_index(drop=True)

def same(a, b): pd.testing.assert_frame_equal(a.reset_index(drop=True), b, check_exact=True, check_dtype=False)
def requests(exchange, what='klines'): return sum(n for key, n in exchange.calls.items() if what in key)

# -- paging

@pytest.mark.parametrize('bars', [1, 998, 999, 1000, 1001, 1704, 2000])
def test_history_is_as_deep_as_asked(world, exchange, bars):
    feed = feed_of(exchange)
    first = exchange.time() - bars * HOUR
    same(feed.history(bars), truth(world, first.tz_localize(None), '2022-04-01'))
    assert requests(exchange) <= 3 * (bars // 1000 + 1)
    assert feed.health['BTC/USDT'] == Health('BTC/USDT', exchange.time() - HOUR)

def test_years_of_pages(world, exchange):
    exchange.set_time('2024-03-01 00:20')
    feed = feed_of(exchange, ['ETH/USDT', 'BTCUSDT'])
    got = feed.since('2022-01-01')                        # up to the exchange's own present
    same(got, truth(world, '2022-01-01', '2024-03-01', ['BTC/USDT', 'ETH/USDT']))
    assert requests(exchange) == 2 * 19 and gaps(got, '1h').empty

def test_a_span_in_the_past_and_one_coin_of_it(world, exchange):
    feed = feed_of(exchange)
    got = feed.since('2022-01-31 23:30', '2022-02-02', symbols=['SHIB/USDT'])
    same(got, truth(world, '2022-02-01', '2022-02-02', ['SHIB/USDT']))
    same(feed.since('2022-03-30', '2023-01-01'), truth(world, '2022-03-30', '2022-04-01'))   # not beyond the present
    assert feed.begins('BTC/USDT', '2021-01-01') == pd.Timestamp('2022-01-01', tz='UTC')
    assert len(feed.since('2022-04-01')) == 0

def test_newest_goes_on_from_bar_to_bar(world, exchange):
    feed = feed_of(exchange)
    parts = [feed.newest()]                               # the bar that has just closed
    for bars in (0, 1, 3, 1200):
        exchange.step(bars)
        parts.append(feed.newest())
    assert [len(p) for p in parts] == [3, 0, 3, 9, 3600]
    got = pd.concat(parts).sort_values(['symbol', 'time'])
    same(got, truth(world, '2022-03-31 23:00', exchange.time().tz_localize(None)))

@pytest.mark.parametrize('minutes', [0, 1, 20, 59])
def test_no_bar_in_progress(world, exchange, minutes):
    exchange.set_time(f'2022-04-01 00:{minutes:02}')
    feed = feed_of(exchange)
    same(feed.history(5), truth(world, '2022-03-31 19:00', '2022-04-01'))
    same(feed.since('2022-03-31', '2022-04-01 00:59:59'), truth(world, '2022-03-31', '2022-04-01'))

def test_a_bot_whose_clock_is_ahead_gets_no_bar_in_progress(world):
    with replaying(world.bars, start='2022-04-01 00:10', clock='rate', bars_per_s=.02) as x:
        feed = feed_of(x, pause=.05)
        assert x.time() < pd.Timestamp('2022-04-01 00:50', tz='UTC')
        got = feed.newest(now='2022-04-01 01:00:01')
        assert len(got) == 0 and 'has no closed bar of 2022-04-01 00:00' in feed.health['BTC/USDT'].error

# -- faults

FAULTY = ('http500', 'http429', 'timeout', 'malformed')

@pytest.mark.parametrize('kind', FAULTY)
def test_a_request_that_fails(world, exchange, kind):
    "Now and then: nothing is lost. Always: so many tries, one sentence, and the same feed goes on when it is over"
    exchange.hang = 3.
    feed = feed_of(exchange, ['BTC/USDT', 'ETH/USDT'], retries=8)
    honest = feed.exchange.timeout
    if kind == 'timeout': feed.exchange.timeout = 2000           # what does not hang has come by then, on any machine
    exchange.faults(**{kind: .3})
    same(feed.history(1704), truth(world, '2022-01-20', '2022-04-01', ['BTC/USDT', 'ETH/USDT']))
    assert exchange.injected[kind] > 0
    exchange.faults(**{kind: 1})
    if kind == 'timeout': exchange.hang, feed.exchange.timeout = .2, 100
    exchange.step()
    exchange.forget()
    for failures in (1, 2):
        assert len(feed.newest(now=exchange.time())) == 0
        health = feed.health['ETH/USDT']
        assert (health.failures, health.since, health.last) == (failures, exchange.time(), exchange.time() - 2 * HOUR)
        assert 'candles of ETH/USDT 1h did not come in 9 tries' in health.error and '\n' not in health.error
    assert requests(exchange) == 2 * 2 * 9
    with pytest.raises(FeedError, match='binance: time did not come in 9 tries'): feed.since('2022-03-01')
    exchange.faults(**{kind: 0})
    feed.exchange.timeout = honest
    assert len(feed.newest()) == 2 and feed.health['ETH/USDT'].error is None

def test_the_pauses_double(exchange):
    slept = []
    feed = feed_of(exchange, retries=4, pause=2., sleep=slept.append)
    exchange.faults(http500=1)
    with pytest.raises(FeedError): feed.since('2022-03-01')
    assert len(slept) == 4 and all(.5 <= s / 2 ** (n + 1) <= 1.5 for n, s in enumerate(slept))

def test_missing_bars_stay_missing_and_are_said(world, exchange, caplog):
    exchange.faults(missing=.02)
    feed = feed_of(exchange)
    with caplog.at_level(logging.WARNING, 'cryptoml'): got = feed.history(1704)
    whole = truth(world, '2022-01-20', '2022-04-01')
    there = whole.merge(got[['time', 'symbol']])
    same(got, there)                                                   # no row is invented
    lost = gaps(got, '1h')
    assert 60 < lost.bars.sum() == len(whole) - len(got)
    assert len([r for r in caplog.records if 'has no bar from' in r.message]) == len(lost)

def test_a_hole_in_one_answer_is_filled_by_the_exchange(world, exchange):
    exchange.faults(hole=.02)
    same(feed_of(exchange).history(1704), truth(world, '2022-01-20', '2022-04-01'))
    assert exchange.injected['hole'] > 60

def test_rows_that_come_twice_or_out_of_order(world, exchange):
    exchange.faults(duplicate=.05, ooo=1)
    feed = feed_of(exchange)
    same(feed.history(1704), truth(world, '2022-01-20', '2022-04-01'))
    twice = sum(feed.duplicates.values())                              # ccxt cuts a page to its limit, twins included
    assert 100 < twice <= exchange.injected['duplicate'] and exchange.injected['ooo']

def test_a_stale_market_is_said_and_its_last_bar_is_not_given(world, exchange):
    "What it shows ends in a bar that was in progress ten bars ago"
    feed = feed_of(exchange, ['BTC/USDT'])
    feed.history(10)
    exchange.step(25)
    exchange.faults(stale=1)
    first = feed.newest()
    same(first, truth(world, '2022-04-01', '2022-04-01 15:00', ['BTC/USDT']))
    assert feed.health['BTC/USDT'].error == 'binance has no closed bar of 2022-04-02 00:00:00+00:00'
    exchange.faults(stale=0)
    same(feed.newest(), truth(world, '2022-04-01 15:00', '2022-04-02 01:00', ['BTC/USDT']))
    assert feed.health['BTC/USDT'].failures == 0

def test_all_at_once(world, exchange):
    exchange.hang = 4.
    exchange.faults(http500=.1, http429=.1, malformed=.1, timeout=.02, hole=.01, duplicate=.02, ooo=.3)
    feed = feed_of(exchange, retries=12)
    feed.exchange.timeout = 3000
    same(feed.since('2022-01-01', '2022-04-01'), truth(world, '2022-01-01', '2022-04-01'))

def test_an_exchange_goes_and_comes_back(world, exchange):
    feed = feed_of(exchange, retries=1)
    feed.history(10)
    exchange.down()
    exchange.step(4)
    assert len(feed.newest(now=exchange.time())) == 0
    assert {(h.failures, h.last) for h in feed.health.values()} == {(1, pd.Timestamp('2022-03-31 23:00', tz='UTC'))}
    with pytest.raises(FeedError, match='did not come in 2 tries, last: (NetworkError|ExchangeNotAvailable)'):
        feed.history(10)
    exchange.up()
    same(feed.newest(), truth(world, '2022-04-01', '2022-04-01 04:00'))

def test_a_coin_that_hangs_keeps_nobody_waiting(world, exchange):
    feed = feed_of(exchange)
    feed.history(2)
    exchange.step(2)
    answer, release = exchange.respond, threading.Event()
    def respond(method, path, q):
        if q.get('symbol') == 'ETHUSDT': release.wait(HANGS)
        return answer(method, path, q)
    exchange.respond = respond
    got = feed.newest(deadline=1.)
    release.set()
    same(got, truth(world, '2022-04-01', '2022-04-01 02:00', ['BTC/USDT', 'SHIB/USDT']))
    assert feed.health['ETH/USDT'].error == 'binance did not answer within 1 s'
    same(feed.newest(), truth(world, '2022-04-01', '2022-04-01 02:00', ['ETH/USDT']))

def test_a_bar_that_has_changed_is_given_again_and_said(world, exchange, caplog):
    feed = feed_of(exchange, ['BTC/USDT'])
    feed.history(3)
    market = exchange.markets['BTCUSDT']
    market.v[market.index(exchange.now()) - 1] += 1
    market.cache.clear()
    exchange.step()
    got = feed.newest()
    assert len(got) == 2 and got.volume.iloc[0] == pytest.approx(truth(
        world, '2022-03-31 23:00', '2022-04-01', ['BTC/USDT']).volume.iloc[0] + 1)
    assert 'the bar of 2022-03-31 23:00:00+00:00 has changed since it was given' in caplog.text

def test_markets_that_are_malformed_once_are_asked_for_again(exchange):
    "ccxt takes a malformed list for an exchange without markets, or without this one"
    feed = feed_of(exchange)
    answer, left = exchange.respond, [3]
    def respond(method, path, q):
        if 'exchangeInfo' in path and left[0]:
            left[0] -= 1
            return 200, '{"symbols": []}'
        return answer(method, path, q)
    exchange.respond = respond
    assert len(feed.history(5)) == 15

# -- asked wrongly: one sentence

@pytest.mark.parametrize('act, says', [
    (lambda x: Feed('binanse', ['BTC/USDT'], '1h'), "ccxt knows no exchange 'binanse': did you mean binance"),
    (lambda x: Feed('binance', ['BTC/USDT'], '7m'), 'does not divide a day'),
    (lambda x: Feed('binance', ['BTC/USDT'], '10m'), 'binance has no bars of 10m: it has 1s, 1m'),
    (lambda x: Feed('binance', ['BTC/USDT', 'BTCUSDT'], '1h'), 'a coin is named twice'),
    (lambda x: Feed('binance', ['BTX/USDT'], '1h', url=x.url, pause=0).history(1),
     'binance has no market of BTX/USDT: did you mean BTC/USDT'),
    (lambda x: feed_of(x, ['BTX/USDT']).funding('2022-01-01'), 'binance has no perpetual of BTX/USDT'),
    (lambda x: opened(ccxt.binance(), 'http://127.0.0.1'), 'url goes with the name of an exchange'),
    (lambda x: opened('binance/x'), 'ccxt knows no exchange'),
    (lambda x: opened(dict()), 'a dict is no exchange of ccxt'),
], ids=range(9))
def test_a_sentence(exchange, act, says):
    with pytest.raises(FeedError) as e: act(exchange)
    assert says in str(e.value) and '\n' not in str(e.value)

def test_an_asynchronous_object_is_refused():
    import ccxt.async_support
    with pytest.raises(FeedError, match='asynchronous'): opened(ccxt.async_support.binance())

def test_without_ccxt(monkeypatch):
    monkeypatch.setitem(sys.modules, 'ccxt', None)
    with pytest.raises(FeedError, match=r"an exchange needs ccxt: pip install 'cryptoml\[exchange\]'"):
        Feed('binance', ['BTC/USDT'], '1h')

def test_by_name_every_address_is_replaced_and_no_key_is_there(exchange):
    feed = Feed('binance', ['BTC/USDT'], '1h', url=exchange.url, pause=0)
    assert all(v.startswith(exchange.url) for v in feed.exchange.urls['api'].values())
    assert not feed.exchange.apiKey and not feed.exchange.secret
    assert len(feed.history(2)) == 2

# -- books, trades, funding, on-chain

def test_books_are_recorded(exchange, tmp_path):
    feed = feed_of(exchange, retries=1)
    for _ in range(3):
        exchange.step()
        record_books(tmp_path, feed.books(now=exchange.time()))
    kept = recorded_books(tmp_path)
    assert len(kept) == 9 and (kept.time == kept.known).all()
    bids, asks = exchange.levels(exchange.markets['BTCUSDT'], exchange.now(), 20)
    row = kept[(kept.symbol == 'BTC/USDT')].iloc[-1]
    assert [(row.bid_price_20, row.bid_size_20), (row.ask_price_1, row.ask_size_1)] == [bids[19], asks[0]]
    exchange.faults(malformed=1)
    assert len(feed.books(now=exchange.time())) == 0 and feed.book_health['BTC/USDT'].failures == 1
    assert feed.health['BTC/USDT'].failures == 0

def test_trades(exchange):
    exchange.set_time('2022-04-01 00:31')
    feed = feed_of(exchange)
    got = feed.trades('BTC/USDT', now=exchange.time())
    assert len(got) == 1000 and got.time.is_monotonic_increasing and (got.known == exchange.time()).all()
    assert list(got) == list(trades_frame(got))
    exchange.faults(malformed=1)
    with pytest.raises(FeedError, match='trades of BTC/USDT did not come'): feed.trades('BTC/USDT')

def test_funding_is_the_source_that_features_read(world, exchange):
    exchange.set_time('2023-03-01 00:00')
    got = feed_of(exchange).funding('2022-02-01')
    whole = world.funding[world.funding.time.between('2022-02-01', '2023-03-01')].sort_values(['symbol', 'time'])
    pd.testing.assert_frame_equal(got, whole.reset_index(drop=True)[list(got)], check_dtype=False)
    assert requests(exchange, 'fundingRate') == 3 * 3
    exchange.faults(malformed=.5, http500=.2)
    feed = feed_of(exchange, ['ETH/USDT'], retries=20)
    pd.testing.assert_frame_equal(feed.funding('2022-02-01'), got[got.symbol == 'ETH/USDT'].reset_index(drop=True))

def test_on_chain_values_are_the_source_that_features_read(world, exchange):
    exchange.faults(http500=.2, http429=.2, malformed=.1)
    ask = dict(url=exchange.url + '/v4', patience=Patience(20, 0))
    got = onchain(['BTC/USDT', 'eth'], '2022-01-10', **ask)
    whole = world.onchain[world.onchain.asset.isin(['btc', 'eth']) & (world.onchain.known <= exchange.time())]
    whole = whole[whole.time >= '2022-01-10'].sort_values(['asset', 'time'], ignore_index=True)
    pd.testing.assert_frame_equal(got, whole[list(got)], check_dtype=False)
    assert len(got) > PAGE                                         # so there was a second page
    assert onchain(['btc'], '2022-01-10', '2022-01-12', **ask).time.dt.day.tolist() == [10, 11, 12]
    exchange.faults(http500=1)
    with pytest.raises(FeedError, match='on-chain values did not come in 2 tries, last: HTTP 500'):
        onchain(['btc'], '2022-01-10', url=exchange.url + '/v4', patience=Patience(1, 0))
    exchange.faults(http500=0, http429=0, malformed=0)
    with pytest.raises(FeedError, match='HTTP 404'): onchain(['btc'], '2022-01-10', url=exchange.url + '/v5')
    with pytest.raises(FeedError, match='no daily values of nothing'): onchain(['nothing'], '2022-01-10', **ask)
    exchange.down()
    with pytest.raises(FeedError, match='did not come in 1 tries'):
        onchain(['btc'], '2022-01-10', url=exchange.url, patience=Patience(0))

# -- suite 15

def test_importing_opens_no_socket_and_no_ccxt():
    code = '''
        import socket, sys
        def never(*args, **kw): raise AssertionError('a socket was opened')
        socket.socket.__init__ = never
        import cryptoml.feeds, cryptoml.sources
        print({'ccxt', 'requests', 'aiohttp'} & set(sys.modules))
        '''
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout == 'set()\n', done.stderr

def test_no_key_is_read():
    nodes = [n for module in (feeds, sources) for n in ast.walk(ast.parse(inspect.getsource(module)))]
    words = {n.attr for n in nodes if isinstance(n, ast.Attribute)} | {
        n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert not words & {'environ', 'getenv', 'apiKey', 'secret', 'password', 'netrc'}

# -- the download job

ASKED = '--exchange binance --symbols BTC/USDT,ETH/USDT --since 2021-01-01'.split()

def test_the_command_word_for_word(monkeypatch, tmp_path, capsys):
    "What it would do, without a network to do it in"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, 'run', lambda job, out, **given: dict(next='train on it: ...', given=given))
    assert jobs.main(['download', *ASKED]) == 0
    assert 'train on it' in capsys.readouterr().out
    values = parameters.check(runs.find('download'), jobs._command(['download', *ASKED]).given)
    assert values == dict(exchange='binance', symbols=['BTC/USDT', 'ETH/USDT'], timeframe='1h', since='2021-01-01',
                          until='', what=['candles'], url='')

@pytest.mark.parametrize('given, says', [
    (['--since', '2021-01-01'], 'symbols must name the coins: --symbols BTC/USDT,ETH/USDT'),
    (['--symbols', 'BTC/USDT'], 'since must name the first day'),
    ([*ASKED, '--until', '2020-01-01'], 'start 2021-01-01 is not before end 2020-01-01'),
    ([*ASKED, '--what', 'news'], 'what must be some of candles, funding, onchain'),
    ([*ASKED, '--timeframe', 'hourly'], "timeframe 'hourly' is not a length of time"),
    ([*ASKED, '--url', 'localhost'], 'url must be an address that begins with http'),
    (['--symbols', 'BTC/USDT,BTCUSDT', '--since', '2021'], 'a coin is named twice'),
    (['--exchange', 'binanse', '--symbols', 'BTC/USDT', '--since', '2021'], 'exchange must be the name of an exchange'),
], ids=lambda x: x[-2] if isinstance(x, list) else '')
def test_the_download_is_refused_before_anything_starts(given, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, 'execute', lambda *a: pytest.fail('a kernel was started'))
    assert jobs.main(['download', *given, '--out', str(tmp_path/'run')]) == 2
    assert says in capsys.readouterr().err and not (tmp_path/'run').exists()

def test_the_download_without_ccxt(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'ccxt', None)
    assert jobs.main(['download', *ASKED]) == 2
    assert capsys.readouterr().err == "cryptoml: an exchange needs ccxt: pip install 'cryptoml[exchange]'\n"

def downloaded(out, **given):
    "Run the cells of the job here, without a kernel"
    notebook = runs.find('download')
    out.mkdir(exist_ok=True)
    names = parameters.check(notebook, given) | dict(out=str(out), display=lambda x: None)
    cells = [c for c in parameters.cells_of(notebook) if c['cell_type'] == 'code' and not c['metadata']]
    for c in cells: exec(compile(''.join(c['source']), 'download', 'exec'), names)
    return json.loads((out/'metrics.json').read_text())

def files_of(out): return {p.relative_to(out): p.read_bytes() for p in sorted(out.rglob('*.parquet'))}

def test_a_download_that_is_killed_goes_on(world, exchange, tmp_path):
    "kill -9 in the third month of the second coin; the second start ends with the files of one that was left alone"
    exchange.set_time('2022-05-10 12:00')
    exchange.faults(duplicate=.01, missing=.001)
    given = dict(symbols='BTC/USDT,ETH/USDT', since='2021-12-01', until='2022-05-01', what='candles,funding,onchain',
                 url=exchange.url)
    whole = downloaded(tmp_path/'whole', **given)
    assert whole['coins'][1]['first'] == '2022-01-01T00:00:00+00:00' and not whole['again']
    assert whole['coins'][1]['missing'] == sum(g['bars'] for g in whole['gaps'] if g['symbol'] == 'ETH/USDT') > 0
    assert whole['coins'][0]['twice'] > 0 and whole['next'].startswith('train on it: cryptoml train --data ')
    stored = Store(tmp_path/'whole'/'bars').read()
    same(stored[['time', 'symbol', *OHLCV]], truth(world, '2022-01-01', '2022-05-01').merge(stored[['time', 'symbol']]))

    answer, reached, release = exchange.respond, threading.Event(), threading.Event()
    march = int(pd.Timestamp('2022-03-01', tz='UTC').timestamp() * 1000)
    def respond(method, path, q):
        if q.get('symbol') == 'ETHUSDT' and q.get('startTime') == str(march):
            reached.set()
            release.wait(HANGS)
        return answer(method, path, q)
    exchange.respond = respond
    out = tmp_path/'killed'
    line = [sys.executable, '-m', 'cryptoml.jobs', 'download', '--out', out]
    for name, value in given.items(): line += [f'--{name}', value]
    first = subprocess.Popen([*map(str, line)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert reached.wait(HANGS)
    kernel, = psutil.Process(first.pid).children()
    os.kill(first.pid, signal.SIGKILL)
    kernel.kill()
    first.wait()
    release.set()
    assert len(files_of(out)) == 4 + 2 and not (out/'metrics.json').exists()
    exchange.forget()
    found = runs.run('download', out, **given)
    assert 'train on it: cryptoml train --data' in jobs.summary(found, out)
    assert not any('symbol=BTCUSDT interval' in key for key in exchange.calls), 'what was there was asked for again'
    assert files_of(out) == files_of(tmp_path/'whole')
    changed = {'files', 'next'}
    assert {k: v for k, v in found.items() if k not in changed} == {k: v for k, v in whole.items() if k not in changed}

def test_a_download_without_an_end_is_asked_again(world, exchange, tmp_path):
    given = dict(symbols='ETH/USDT', since='2022-03-01', url=exchange.url)
    out = tmp_path/'run'
    assert downloaded(out, **given)['again'] and not runs.is_finished(out)
    exchange.step(40)
    exchange.forget()
    assert downloaded(out, **given)['coins'][0]['bars'] == 31 * 24 + 40
    assert requests(exchange) == 1
    stored = Store(out/'bars').read()
    same(stored[['time', 'symbol', *OHLCV]], truth(world, '2022-03-01', '2022-04-02 16:00', ['ETH/USDT']))
