"""The loop on paper, against an exchange with every fault we know; the commands as processes; the endpoint

`CRYPTOML_LIVE_BARS=1000` (`make faults`) follows a thousand bars, in place of some dozens.
"""
import contextlib, json, os, re, shutil, signal, socket, subprocess, sys, threading, time, urllib.error, urllib.request
from dataclasses import replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import cryptoml
from cryptoml.data import CANDLE
from cryptoml.feeds import Feed
from cryptoml.integration import UltimateTradingAI
from cryptoml.jobs import main
from cryptoml.answers import Desk, Handler, Server, load_ai, say
from cryptoml.paper import Paper
from cryptoml.parity import differing, parity, CLOSE
from cryptoml.live import Live, Settings, alerts_of
from cryptoml.simulate import simulate
from cryptoml.state import StateError, load, read_lines, save
from replay_exchange import replaying

ccxt = pytest.importorskip('ccxt')
pytestmark = pytest.mark.usefixtures('one_thread')

BARS = int(os.environ.get('CRYPTOML_LIVE_BARS', 48))
HISTORY = 3700
H = pd.Timedelta('1h')
LEAST = .4
TOKEN = 'a token of the tests'
HANGS = 600   # Seconds after which something hangs: never a measure of speed
FAULTS = dict(http500=.03, http429=.02, timeout=.005, malformed=.03, missing=.002, duplicate=.003, hole=.01, ooo=.02,
              stale=.02)

class Model:
    "A model of four coins in a folder, and the bars that come after its training"
    def __init__(self, folder):
        self.state = folder/'state'
        market = simulate(n_symbols=5, n_bars=HISTORY + BARS + 24, seed=3).bars
        market = market[['time', 'symbol', *CANDLE]]                         # what ccxt gives
        self.late = market['symbol'].unique()[4]                             # a coin that comes after the training
        self.bars = market[market['symbol'] != self.late].reset_index(drop=True)
        self.everything = market
        self.born = self.bars['time'].min() + HISTORY * H
        ai = UltimateTradingAI(dict(horizons=[4, 24], state_dir=str(self.state)), device='cpu')
        ai.train_sync(self.bars[self.bars['time'] < self.born], epochs=1)
        ai.save_state()

    def upto(self, now): return self.bars[self.bars['time'] + H <= now]

@pytest.fixture(scope='module')
def model(tmp_path_factory): return Model(tmp_path_factory.mktemp('model'))

@pytest.fixture(scope='module')
def ai(model): return load_ai(model.state, 'FAIL')

# ---- the loop

PLANTED = ['spike', 'zero', 'upside down', 'other unit']

def spoilt(bars, born):
    "Wrong bars, one of a kind after another, and a coin that is taken off the exchange; where they are"
    bars, coins, gone = bars.copy(), list(bars['symbol'].unique()), born + BARS * 2 // 3 * H
    bars = bars[(bars['symbol'] != coins[3]) | (bars['time'] < gone)].reset_index(drop=True)
    wrong = {}
    for i, hour in enumerate(range(7, BARS, max(BARS // 24, 9))):
        at, coin, kind = born + hour * H, coins[i % 3], PLANTED[i % len(PLANTED)]
        row = bars.index[(bars['symbol'] == coin) & (bars['time'] == at)][0]
        if kind == 'spike': bars.loc[row, ['high', 'close']] *= 30
        if kind == 'zero': bars.loc[row, ['low', 'close']] = 0.
        if kind == 'upside down': bars.loc[row, ['high', 'low']] = bars.loc[row, ['low', 'high']].to_numpy()
        if kind == 'other unit': bars.loc[row, ['open', 'high', 'low', 'close']] *= 1000
        wrong[coin, at] = kind
    return bars, wrong, gone

@contextlib.contextmanager
def chat():
    "A webhook on loopback: what it is told, and the environment that names it"
    heard = SimpleNamespace(messages=[])
    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self):
            heard.messages.append(json.loads(self.rfile.read(int(self.headers['Content-Length']))))
            self.send_response(204)
            self.end_headers()
        def log_message(self, *_): pass
    with HTTPServer(('127.0.0.1', 0), Webhook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        heard.environment = dict(CRYPTOML_WEBHOOK=f'http://127.0.0.1:{server.server_port}/x', CRYPTOML_CHAT='7')
        yield heard
        server.shutdown()

def looped(exchange, ai, folder, model, **more):
    "A loop by the clock of a replay, which its sleep moves"
    feed = Feed(ccxt.binance(exchange.ccxt_config()), ai.live().terms.symbols, '1h', retries=6, pause=.002)
    def sleep(seconds): exchange.set_time(exchange.time() + pd.Timedelta(seconds, 's'))
    settings = Settings(str(model.state), 'FAIL', LEAST, equity=1000.)
    return Live(ai, feed, folder, settings, exchange.time, sleep, **{'tell': lambda line: None} | more)

def test_faults_of_an_exchange(model, tmp_path):
    "Nothing but HOLD on wrong bars, no exception, every signal computed again; a coin goes, one is added at a restart"
    bars, wrong, gone = spoilt(model.everything, model.born)
    with replaying(bars, start=model.born + .5 * H, faults=FAULTS, hang=.2, seed=1) as exchange, chat() as heard:
        began = time.monotonic()
        for added in (None, model.late):
            ai = load_ai(model.state, 'FAIL')
            loop = looped(exchange, ai, tmp_path, model, alerts=alerts_of(heard.environment))
            if added: ai.add_coin(added)
            loop.run(BARS // 2)
        seconds, injected = time.monotonic() - began, dict(exchange.injected)
    decisions = held_where_wrong(loop.journal, bars, wrong, gone)
    found = parity(tmp_path)
    said_alone(loop.journal, model)
    print(f'\n{len(decisions)} signals of {BARS} bars in {seconds:.0f} s, {len(wrong)} wrong bars, faults {injected}\n'
          f'{decisions.value_counts().to_dict()}\nparity {found}')
    assert {*FAULTS} <= {*injected} or BARS < 500
    of_late = [x.said[model.late] for x in loop.journal.entries() if model.late in x.said]
    assert len(read_lines(tmp_path/'signals.jsonl')) == 4 * BARS + BARS // 2
    assert (found['different'], found['lost']) == (0, 0)
    assert found['signals'] == 4 * found['entries'] + len(of_late) and found['entries'] > .75 * BARS
    assert {x['signal']['action'] for x in of_late} == {'HOLD'}                # nobody has judged it
    assert sum(not x['prediction']['faults'] for x in of_late) > .75 * len(of_late) > 0
    assert {'BUY', 'SELL'} & set(decisions), decisions.value_counts()
    assert np.isfinite([x['equity'] for x in read_lines(tmp_path/'equity.jsonl')]).all()
    faults = read_lines(tmp_path/'faults.jsonl')
    told = {re.match(r'cryptoml live, (\w+): ', x['text'])[1] for x in heard.messages}
    assert {x['where'] for x in faults} == {'feed', 'bars'} == told - {'monitor'}
    assert {x['chat_id'] for x in heard.messages} == {'7'}

def said_alone(journal, model):
    "A fresh model that is asked about one moment only says the same, but for the intervals, which learn"
    entries = journal.entries()
    for k in range(0, len(entries), max(len(entries) // 5, 1)):
        fresh = load_ai(model.state, 'FAIL')
        if model.late in entries[k].said: fresh.add_coin(model.late)
        again = say(fresh, journal.bars_at(k), entries[k].now, LEAST)
        for symbol, said in entries[k].said.items():
            found = differing(said, again[symbol])
            far = {name for name, x in found.items() if x > CLOSE} - {'prediction intervals'}
            assert not far, (k, symbol, found)

def held_where_wrong(journal, bars, wrong, gone):
    "What was said; every coin without a right bar of the moment was held, and no bar is there that nobody gave"
    truth = bars.set_index(['symbol', 'time'])[CANDLE]
    said = []
    for k, entry in enumerate(journal.entries()):
        had = journal.bars_at(k)
        due = entry.now.floor('1h') - H
        newest = had[had['time'] >= due].set_index(['symbol', 'time'])
        pd.testing.assert_frame_equal(newest[truth.columns], truth.loc[newest.index], check_dtype=False)
        assert (had['time'] <= due).all() and not had.duplicated(['symbol', 'time']).any()
        for symbol, x in entry.said.items():
            action = x['signal']['action']
            if (symbol, due) not in newest.index or (symbol, due) in wrong: assert action == 'HOLD', (symbol, due, x)
            said.append(action if action != 'HOLD' else x['signal']['why'])
    return pd.Series(said)

def test_killed_between_two_writes(model, tmp_path, monkeypatch):
    "A loop that dies before the account is saved does the bar again, and its account misses nothing"
    class Killed(BaseException): pass
    with replaying(model.bars, start=model.born + .5 * H) as exchange:
        loop = looped(exchange, load_ai(model.state, 'FAIL'), tmp_path, model)
        loop.run(3)
        def dies(self): raise Killed
        with monkeypatch.context() as m, pytest.raises(Killed):
            m.setattr(Paper, 'save', dies)
            loop.run(1)
        exchange.step(3)                                                    # nobody was there
        again = looped(exchange, load_ai(model.state, 'FAIL'), tmp_path, model)
        again.run(2)
    times = pd.DatetimeIndex([x.now for x in again.journal.entries()])
    assert len(times) == 6
    assert again.account.time == times[-1].floor('1h') - H
    assert parity(tmp_path)['different'] == 0

def test_parity_without_the_weights(model, ai, tmp_path):
    "What cannot be computed again is counted, and not taken for equal"
    with replaying(model.bars, start=model.born + .5 * H) as exchange: looped(exchange, ai, tmp_path, model).run(2)
    found = parity(tmp_path, tmp_path/'gone')
    assert (found['lost'], found['signals']) == (2, 0)
    assert main(['live', '--parity', str(tmp_path)]) == 0
    sessions = tmp_path/'sessions.jsonl'
    sessions.write_text(sessions.read_text().replace(ai.model_name(), 'other weights'))
    assert main(['live', '--parity', str(tmp_path)]) == 1

def test_parity_of_older_weights(model, tmp_path):
    "What was said by weights that a newer save has followed is computed again with them"
    state = shutil.copytree(model.state, tmp_path/'state')
    ai = load_ai(state, 'FAIL')
    with replaying(model.bars, start=model.born + .5 * H) as exchange:
        looped(exchange, ai, tmp_path/'out', SimpleNamespace(state=state)).run(2)
    tensors, about = load(state)
    next(iter(tensors['network_0'].values())).add_(.01)
    save(state, tensors, about)
    assert load_ai(state).model_name() != ai.model_name()
    found = parity(tmp_path/'out')
    assert (found['lost'], found['different'], found['entries']) == (0, 0, 2)

def test_one_loop_at_a_time(model, ai, tmp_path):
    with replaying(model.bars, start=model.born + .5 * H) as exchange:
        loop = looped(exchange, ai, tmp_path, model)
        failed = []
        def tell(line):
            other = looped(exchange, ai, tmp_path, model)
            try: other.run(1)
            except StateError as e: failed.append(str(e))
        loop.tell = tell
        import cryptoml.live
        wait, cryptoml.live.PATIENCE = cryptoml.live.PATIENCE, .1
        try: loop.run(1)
        finally: cryptoml.live.PATIENCE = wait
    assert len(failed) == 4 and 'is in use by process' in failed[0]

def test_an_account_of_other_coins_is_refused(tmp_path):
    from cryptoml.backtest import Costs
    Paper(tmp_path/'a.json', ['A/USDT'], Costs()).save()
    with pytest.raises(StateError, match='choose another folder'): Paper(tmp_path/'a.json', ['B/USDT'], Costs())
    (tmp_path/'b.json').write_text('[]')
    with pytest.raises(StateError, match='not an account'): Paper(tmp_path/'b.json', ['B/USDT'], Costs())

def test_no_order_anywhere():
    "Nowhere in the package an order is placed or a key is read"
    forbidden = re.compile(r'create_\w*order|createOrder|edit_order|apiKey|api_key|\.secret\b|withdraw\(|private_post')
    sources = list(Path(cryptoml.__file__).parent.rglob('*.py'))
    assert len(sources) > 30
    assert [p.name for p in sources if forbidden.search(p.read_text(encoding='utf-8'))] == []

# ---- the page

class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen, self.attributes = [], set(), []
    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes += attrs
        if tag not in ('meta', 'polyline', '!doctype'): self.open.append(tag)
    def handle_startendtag(self, tag, attrs): self.attributes += attrs
    def handle_endtag(self, tag): assert self.open.pop() == tag

def test_page_is_one_closed_file(model, ai, tmp_path):
    "Well-formed, without a script or anything from elsewhere; what came from outside is text"
    with replaying(model.bars, start=model.born + .5 * H) as exchange:
        loop = looped(exchange, ai, tmp_path, model)
        loop.run(3)
        loop.watch('feed', '<script>alert(1)</script>', '"><img src=x onerror=alert(2)>')
        loop.feed.health['BTC/USDT'].fails('<b onclick=x>', exchange.time())
        loop.run(1)
    text = (tmp_path/'status.html').read_text(encoding='utf-8')
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert not tags.seen & {'script', 'img', 'link', 'iframe', 'object'}
    assert not {k for k, v in tags.attributes} & {'src', 'href', 'onclick', 'onerror'}
    assert '&lt;script&gt;alert(1)' in text and 'prefers-color-scheme' in text and 'http-equiv="refresh"' in text
    assert 'url(' not in text and '@import' not in text

def test_what_was_promised_goes_with_the_state(model, tmp_path):
    "Copied elsewhere it is there; the page names what cannot be compared; an older state says that it has none"
    ai = load_ai(shutil.copytree(model.state, tmp_path/'elsewhere'/'state'), 'FAIL')
    terms = ai.live().terms
    figures = {(r['target'], r['horizon'], r['metric']) for r in terms.promised_rows if 'by' not in r}
    assert {('return', 24, 'coverage 90%'), ('direction', 4, 'ECE'), ('direction', 24, 'log-loss')} <= figures
    days = len(terms.judged_days)
    assert 20 <= days < 60
    with replaying(model.bars, start=model.born + .5 * H) as exchange:
        loop = looped(exchange, ai, tmp_path/'out', model)
        loop.run(8)
        said = (tmp_path/'out'/'status.html').read_text(encoding='utf-8')
        loop.terms, loop.reported = replace(terms, promises={}), (None, None)
        loop.run(1)
        older = (tmp_path/'out'/'status.html').read_text(encoding='utf-8')
    assert f'no dry spell can be told: {days} days of a judged book say little' in said
    assert 'earlier version' not in said
    for what in ('what validation promised', 'the days of the judged book'):
        assert f'{what} is not in this state, which an earlier version saved' in older

# ---- the commands, as processes

def cryptoml_command(*argv, **env):
    return subprocess.run([sys.executable, '-m', 'cryptoml.jobs', *map(str, argv)], capture_output=True, text=True,
                          env=os.environ | env, timeout=HANGS)

def test_predict_command(model, tmp_path):
    now = model.born + 5 * H
    model.upto(now).to_parquet(tmp_path/'bars.parquet')
    asked = ['predict', '--state', model.state, '--data', tmp_path/'bars.parquet', '--act-on', 'FAIL']
    done = cryptoml_command(*asked, '--now', now.isoformat(), '--min-confidence', LEAST)
    assert done.returncode == 0, done.stderr
    expected = say(load_ai(model.state, 'FAIL'), model.upto(now), now, LEAST)
    assert json.loads(done.stdout)['said'] == expected

def test_predict_in_one_process(model, tmp_path, capsys):
    "Faults of bars are HOLD and 0, mistakes are a sentence and 2"
    now = model.born + 5 * H
    bars = model.upto(now)
    bars.to_parquet(tmp_path/'bars.parquet')
    bars[bars['time'] >= now - 100 * H].to_parquet(tmp_path/'short.parquet')
    bars.drop(columns='close').to_parquet(tmp_path/'no_close.parquet')
    def ask(*argv, data='bars', state=model.state):
        code = main(['predict', '--state', str(state), '--data', str(tmp_path/f'{data}.parquet'), *argv])
        out = capsys.readouterr()
        return code, json.loads(out.out)['said'] if out.out else out.err
    code, said = ask()                                                       # today the bars are old
    assert code == 0 and {x['signal']['why'] for x in said.values()} <= {'stale', 'judged'}
    code, said = ask('--now', now.isoformat(), data='short')
    assert code == 0 and {x['signal']['why'] for x in said.values()} == {'fault'}
    code, said = ask('--now', now.isoformat(), '--symbol', 'BTCUSDT')
    assert code == 0 and list(said) == ['BTC/USDT']
    for argv, more, word in [
        (['--symbol', 'DOGE/USDT'], {},                    'not a coin of this model'),
        ([],                        dict(data='nothing'),  'nothing.parquet'),
        ([],                        dict(data='no_close'), 'close'),
        ([],                        dict(state=tmp_path),  'no'),
        (['--now', 'soon'],         {},                    'soon'),
        (['--min-confidence', '7'], {},                    'between 0 and 1'),
        (['--act-on', 'HOPE'],      {},                    'act-on'),
    ]:
        code, said = ask(*argv, **more)
        assert code == 2 and word in said and said.count('\n') == 1 and 'Traceback' not in said, said

def test_live_command(model, tmp_path):
    "One bar of an exchange that replays by the wall clock, then its parity"
    with replaying(model.bars, start=model.born + 30 * H, clock='wall') as exchange:
        asked = ['live', '--exchange', 'binance', '--paper', '--state', model.state, '--url', exchange.url, '--out',
                 tmp_path/'out', '--bars', 1, '--grace', 0, '--act-on', 'FAIL', '--min-confidence', LEAST]
        done = cryptoml_command(*asked)
    assert done.returncode == 0, done.stderr
    assert 'BTC/USDT' in done.stdout and (tmp_path/'out'/'status.html').exists()
    assert 'model' in json.loads((tmp_path/'out'/'sessions.jsonl').read_text())
    assert main(['live', '--parity', str(tmp_path/'out')]) == 0

@pytest.mark.parametrize('argv, word', [
    (['live'],                                                          'name an exchange'),
    (['live', '--exchange', 'binance'],                                 'add --paper'),
    (['live', '--exchange', 'binance', '--paper', '--equity', '-1'],    'above 0'),
    (['live', '--exchange', 'binance', '--paper', '--state', 'none'],   'no folder none'),
    (['live', '--parity', 'none'],                                      'not the folder of a live run'),
    (['serve', '--state', 'none'],                                      'no folder none'),
    (['predict'],                                                       '--data'),
    (['live', '--leverage', '9'],                                       '--leverage'),
])
def test_mistakes_are_a_sentence(argv, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert word in said and said.count('\n') == 1

def test_unknown_exchange_and_coin(model, capsys, tmp_path):
    known = ['live', '--paper', '--state', str(model.state), '--out', str(tmp_path), '--exchange']
    assert main([*known, 'binanze']) == 2
    assert 'did you mean binance' in capsys.readouterr().err

def test_usage_names_the_commands(capsys):
    assert main(['--help']) == 0
    said = capsys.readouterr().out
    assert all(f'cryptoml {name}' in said for name in ('predict', 'live', 'serve'))

# ---- the endpoint

@pytest.fixture
def server(model):
    server = Server(load_ai(model.state, 'FAIL'), port=0, token=TOKEN)
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.01))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()

def ask(server, content=b'', path='/predict', method='POST', **headers):
    place = 'http://{}:{}{}'.format(*server.server_address, path)
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = {'Authorization': f'Bearer {TOKEN}'} | {k.replace('_', '-'): v for k, v in headers.items()}
    request = urllib.request.Request(place, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=HANGS) as r: return r.status, json.load(r)
    except urllib.error.HTTPError as e: return e.code, json.load(e)

def rows(bars):
    def of(g): return [[int(t.timestamp() * 1000), *row] for t, row in zip(g['time'], g[CANDLE].to_numpy().tolist())]
    return {k: of(g) for k, g in bars.groupby('symbol')}

def test_endpoint_says_what_the_facade_says(model, server):
    "All bars, then only the newest; the step of the book"
    now, other = model.born + 3 * H, load_ai(model.state, 'FAIL')
    for close in (now, now + H, now + 2 * H):
        given = model.upto(close)
        if close > now: given = given[given['time'] == close - H]
        asked = dict(bars=rows(given), now=close.isoformat(), min_confidence=LEAST, held={}, equity=5.)
        status, told = ask(server, asked)
        expected = say(other, model.upto(close), close, LEAST)
        assert status == 200
        assert told['signals'] == {k: x['signal'] for k, x in expected.items()}
        assert told['predictions'] == {k: x['prediction'] for k, x in expected.items()}
        assert told['next_weights'] == other.next_weights({}, 5., now=close)
        assert told['model'] == other.model_name()

def test_endpoint_without_bars_holds(server):
    status, told = ask(server, {})
    assert status == 200 and {x['action'] for x in told['signals'].values()} == {'HOLD'}

@pytest.mark.parametrize('content, word', [
    (b'',                                             'not JSON'),
    (b'{"bars": ',                                    'not JSON'),
    (b'{"equity": Infinity}',                         'not JSON'),
    (b'[' * 100_000,                                  'not JSON'),
    (b'\xff\xfe',                                     'not JSON'),
    ([],                                              'an object'),
    (dict(bars='/etc/passwd'),                        'an object from coin'),
    (dict(bars={'BTC/USDT': '/etc/passwd'}),          'list of candles'),
    (dict(bars={'BTC/USDT': [['/etc/passwd'] * 6]}),  '1 candles'),
    (dict(bars={'BTC/USDT': [[1, 2, 3]]}),            '1 candles'),
    (dict(bars={'': [[1e12, 1, 1, 1, 1, 1]]}),        ''),
    (dict(bars={'BTC/USDT': [[1e300, 1, 1, 1, 1, 1]]}), ''),
    (dict(bars={'BTC/USDT': [[True, 1, 1, 1, 1, 1]]}), '1 candles'),
    (dict(candles={}),                                "no 'candles'"),
    (dict(now='soon'),                                'now is not a time'),
    (dict(now=dict(a=1)),                             'now is not a time'),
    (dict(min_confidence=2),                          'min_confidence'),
    (dict(min_confidence='x'),                        'min_confidence'),
    (dict(held=[1], equity=1),                        'held must'),
    (dict(held={}, equity=0),                         'equity must'),
    (dict(held={}, equity='x'),                       'equity must'),
    (dict(held={'BTC/USDT': 'x'}, equity=1),          'not a number'),
    (dict(held={'DOGE/USDT': 1}, equity=1),           'not a coin'),
], ids=lambda x: str(x)[:30])
def test_what_is_no_question_is_400(server, content, word):
    status, told = ask(server, content)
    assert status == 400 and list(told) == ['error'], told
    assert word in told['error'] and '\n' not in told['error'] and 'Traceback' not in told['error']

def test_a_token_is_needed(server):
    wrong = ('', 'Bearer', 'Bearer x', f'Basic {TOKEN}', f'Bearer {TOKEN[:-1]}', f'bearer{TOKEN}', 'Bearer \xe9\xe9')
    for given in wrong:
        status, told = ask(server, {}, Authorization=given)
        assert status == 401 and TOKEN not in str(told)

def test_other_paths_and_methods(server):
    assert ask(server, {}, path='/')[0] == 404
    assert ask(server, {}, path='/../../etc/passwd')[0] == 404
    assert ask(server, {}, method='GET')[0] == 405
    assert ask(server, {}, method='PUT')[0] == 501

def raw(server, text, wait=HANGS):
    with socket.create_connection(server.server_address, timeout=wait) as s:
        s.sendall(text)
        parts = []
        while part := s.recv(65536): parts.append(part)
    return b''.join(parts)

def test_a_body_has_bounds(server):
    head = f'POST /predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n'.encode()
    assert b' 413 ' in raw(server, head + b'Content-Length: 99999999999\r\n\r\n')
    for length in (b'', b'Content-Length: -1\r\n', b'Content-Length: x\r\n'):
        assert b' 411 ' in raw(server, head + length + b'\r\n')

def test_who_says_nothing_is_let_go(server, monkeypatch):
    monkeypatch.setattr(Handler, 'timeout', 1.)           # who means it has said all by then
    assert raw(server, b'POST /predict HTTP/1.1\r\n') == b''
    head = f'POST /predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n'.encode()
    assert raw(server, head + b'Content-Length: 100\r\n\r\n{') == b''
    assert ask(server, {})[0] == 200                                         # and the others are answered

def test_a_fault_of_ours_is_500_without_a_traceback(server, monkeypatch):
    def broken(self, asked): raise RuntimeError('inside')
    monkeypatch.setattr(Desk, 'answer', broken)
    status, told = ask(server, {})
    assert status == 500 and told == dict(error='it could not be answered: RuntimeError')

def test_side_by_side(model, server):
    "Questions of several threads are answered one after another, each with its own answer"
    now = model.born + 3 * H
    ask(server, dict(bars=rows(model.upto(now)), now=now.isoformat()))
    def one(_): return ask(server, dict(now=now.isoformat(), min_confidence=LEAST))[1]['signals']
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(4) as pool: answers = list(pool.map(one, range(8)))
    assert all(x == answers[0] for x in answers)

def test_serve_command(model):
    "As a process: the token of the environment, an address of loopback, and an end without a traceback"
    argv = [sys.executable, '-m', 'cryptoml.jobs', 'serve', '--state', model.state, '--port', '0']
    def heeds(): signal.signal(signal.SIGINT, signal.SIG_DFL)                # tests in the background ignore it
    with subprocess.Popen(argv, env=os.environ | dict(CRYPTOML_TOKEN=TOKEN), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, preexec_fn=heeds) as p:
        try:
            place = re.search(r'http://127\.0\.0\.1:(\d+)/predict', p.stdout.readline())
            class There: server_address = '127.0.0.1', int(place[1])
            assert ask(There, {})[0] == 200
            p.send_signal(signal.SIGINT)
            out, err = p.communicate(timeout=HANGS)
        finally: p.kill()
    assert TOKEN not in out + err and 'Traceback' not in err and p.returncode == 130

@pytest.mark.parametrize('host', ['0.0.0.0', '::', '192.0.2.1'])
def test_other_machines_are_kept_out(model, host, capsys):
    assert main(['serve', '--state', str(model.state), '--host', host, '--port', '0']) == 2
    assert 'add --anywhere' in capsys.readouterr().err

def test_a_port_that_is_taken(model, server, capsys):
    assert main(['serve', '--state', str(model.state), '--port', str(server.server_address[1])]) == 2
    assert 'cannot listen' in capsys.readouterr().err
