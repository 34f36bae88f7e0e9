"""The report of a run: a function of its folder, which answers first, publishes no rows and says SIMULATED"""
import html, json, re, shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np, pandas as pd, pytest

from cryptoml import jobs
from cryptoml.backtest import Costs, account_for
from cryptoml.ledger import Tried
from cryptoml.plots import coverage, at_volatility, calibration, equity_of, luck
from cryptoml.record import KEPT, ReportError, Run, books_table, read_run
from cryptoml.verdict import OWN, SIMULATED, row, verdict
from cryptoml.page import ASSETS, DIGEST, PERCENT, TERMS, figure_html, glossary, table_html, told
from cryptoml.report import coins_table, may_i, speaks_of, what_next, will_do, write_report
from cryptoml.state import read_json, write_json

COINS = ['BTC/USDT', 'ETH/USDT', 'SOL/USDT']
PRICE = 31_415.926     # Stands in the fans alone: a row of somebody's bars

def book(returns):
    "A coin that moves by these returns, held all the time"
    time = pd.date_range('2024-01-01', periods=len(returns) + 2, freq='D', tz='UTC')
    price = np.cumprod(np.r_[1., 1., 1 + returns])[None]
    return account_for(np.ones_like(price), price, Costs().scaled(0), time=time)

def decisions(target, n=3000):
    "An honest forecaster: what it calls 70 % likely comes in seven of ten cases"
    rng = np.random.default_rng(1)
    time = pd.date_range('2024-01-01', periods=n // 3, freq='4h', tz='UTC').repeat(3)
    said = rng.uniform(.2, .8, n).astype('float32')
    d = pd.DataFrame(dict(time=time, coin=COINS * (n // 3), sure=np.maximum(said, 1 - said),
                          side=np.sign(said - .5).astype('int8')))
    for h in (4, 24):
        d[f'{target} {h} said'], d[f'{target} {h} usual'] = said, np.float32(.55)
        d[f'{target} {h} came'] = (rng.random(n) < said).astype('int8')
    return d

def rows_of(target, n):
    figures = 'accuracy', 'accuracy 50%', 'accuracy 10%'
    gained = dict(majority=(.1, .05, .15), logistic=(0, -.02, .02))
    accuracy = [row(target, h, OWN, metric, (.6, .57, .63), n) for h in (4, 24) for metric in figures]
    gains = [row(target, 24, OWN, 'accuracy', gain, n, rival) for rival, gain in gained.items()]
    others = [row('book', 24, OWN, 'Sharpe', (1.5, .2, 2.8), 200), row('reach', 24, OWN, 'touched up', .09, n)]
    return accuracy + gains + others

def write_run(folder, kind='timing', threshold=.6, simulated=True, word=None, **facts):
    "What a run keeps"
    rng = np.random.default_rng(2)
    target = 'up_or_down' if kind == 'timing' else 'relative_direction'
    d = decisions(target)
    rival = 'hold' if kind == 'timing' else 'low volatility'
    books = {OWN: book(rng.normal(.002, .008, 240)), rival: book(rng.normal(0, .03, 240))}
    tried = Tried(3, 2., [], '/a/place/of/this/machine/ledger.jsonl', 'a1b2')
    v = verdict('a declared book' + SIMULATED * simulated, books[OWN], {rival: books[rival]}, tried)
    if word: v = replace(v, word=word)
    if word == 'FAIL': v = replace(v, gains={'cash': (-1., -2., -.5), rival: (.1, -.5, .7)})
    d.to_parquet(folder/'test.parquet')
    books_table({'costs as stated': books, 'twice the costs': books}).to_parquet(folder/'books.parquet')
    pd.DataFrame(rows_of(target, len(d))).to_parquet(folder/'rows.parquet')
    epochs = ('train_loss', 'valid_nats', 'valid_accuracy', 'valid_relative_accuracy', 'valid_loss')
    fan = dict(coin='BTC/USDT', at='2024-02-01T00:00:00', time=['2024-02-01', '2024-02-02'], price=[PRICE, PRICE],
               then=['2024-02-02'], paths=[[PRICE - 1, PRICE, PRICE + 1]])
    write_json(folder/'report.json', dict(
        job='train', simulated=simulated, symbols=COINS, hours=1., parts=dict(test=['2024-01-01', '2024-08-28', 9]),
        book=dict(kind=kind, horizons=[24], long_only=False, rival=rival, neutral=kind == 'relative'),
        policy=dict(hours=4., rate=.08, annual=.2), costs=dict(fee=5e-4, half_spread=1e-4, slippage=1e-4, borrow=.1),
        verdict=vars(v), threshold=threshold, absent=[], left_out={}, unfunded=['SOL/USDT'], more=[],
        data=dict(digest='d1', span=['2022-01-01', '2024-08-28'], symbols=COINS),
        bars=dict(headline='bars made by hand', defects=[]), needed=dict(rsi_14=.1, atr_14=.05),
        looked=dict(rsi_14=.6, atr_14=.4), attention=dict(lags=[1, 0], steps=[1, 2], values=[[.3, .7], [.4, .6]]),
        coins=np.eye(3).tolist(), coins_brought=[dict(coin=c, net=.1 * k, held=.5) for k, c in enumerate(COINS)],
        fans=[fan], shares=[dict(target='direction', horizon=24, shares=dict(network=.25, boosting=.75))],
        histories=dict(network=dict(epoch=[1, 2]) | {k: [.5, .6] for k in epochs}),
    ) | facts)
    asked = dict(parameters=dict(data='/secret/bars.parquet', epochs=3), versions=dict(torch='2'))
    write_json(folder/'params.json', asked | dict(threads=1, device='cpu', gpus=[], platform='a machine'))
    return folder

@pytest.fixture
def folder(tmp_path):
    (tmp_path/'run').mkdir()
    return write_run(tmp_path/'run')

class Tags(HTMLParser):
    "Elements that stand open, and what is said of pictures"
    void = {'meta', 'img', 'source', 'br', 'use', 'path', 'rect', 'image', 'stop', 'line', 'circle'}
    def __init__(self, page):
        super().__init__()
        self.open, self.wrong, self.pictures, self.heads = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if tag == 'img': self.pictures.append(a.get('alt'))
        if tag == 'svg': self.pictures.append(a.get('aria-label'))
        if tag == 'th': self.heads.append(a.get('scope'))
        if tag not in self.void: self.open.append(tag)

    def handle_startendtag(self, tag, attrs): pass

    def handle_endtag(self, tag):
        if tag in self.void: return
        if not self.open or self.open.pop() != tag: self.wrong.append(tag)

# ---- a function of the folder

def test_made_again_it_is_the_same(folder, tmp_path):
    first = write_report(folder)
    assert first == folder/'report.html'
    page = first.read_bytes()
    assert write_report(folder, tmp_path/'b.html').read_bytes() == page
    static = write_report(folder, tmp_path/'static.html', True).read_bytes()
    assert static == write_report(folder, tmp_path/'c.html', True).read_bytes() != page

def test_elsewhere_only_its_place_differs(folder, tmp_path):
    moved = shutil.copytree(folder, tmp_path/'moved')
    there = write_report(moved).read_text()
    assert there.replace(str(moved), str(folder)) == write_report(folder).read_text()

@pytest.mark.parametrize('gone', KEPT)
def test_what_is_missing_is_said(folder, gone):
    (folder/gone).unlink()
    with pytest.raises(ReportError, match=f'has no {gone}: a report is made from the folder of'): read_run(folder)

@pytest.mark.parametrize('broken', KEPT)
def test_what_is_broken_is_said(folder, broken):
    (folder/broken).write_bytes((folder/broken).read_bytes()[:99])
    with pytest.raises(ReportError, match='cannot be read .* run the job again'): write_report(folder)
    assert not (folder/'report.html').exists()

def test_without_parameters_it_is_made_as_well(folder):
    (folder/'params.json').unlink()
    assert 'Versions and machine' not in write_report(folder).read_text()

def test_the_command(folder, capsys, tmp_path):
    assert jobs.main(['report', str(folder)]) == 0
    assert f'report: {folder/"report.html"}' in capsys.readouterr().out
    assert jobs.main(['report', str(folder), '--static', '--out', str(tmp_path/'to'/'publish.html')]) == 0
    assert '<script' not in (tmp_path/'to'/'publish.html').read_text()
    assert jobs.main(['report', str(tmp_path)]) == 2 and 'has no report.json' in capsys.readouterr().err
    assert jobs.main(['report']) == 2 and jobs.main(['report', '--help']) == 0

# ---- the answers

@pytest.mark.parametrize('word', ['PASS', 'FAIL'])
def test_simulated_is_said_beside_every_word(folder, word):
    page = write_report(write_run(folder, word=word)).read_text()
    assert f'<title>{word} (SIMULATED): ' in page and f'{word} <span class="mark">SIMULATED</span>' in page
    assert 'Not with money: this market is SIMULATED' in page
    real = write_report(write_run(folder, word=word, simulated=False)).read_text()
    assert f'<title>{word}: ' in real and 'SIMULATED' not in real

@pytest.mark.parametrize('word, begins', [
    ('PASS', 'On paper first: after costs it beat cash and hold over'),
    ('INCONCLUSIVE', 'On paper only: in'),
    ('FAIL', 'No: after costs it did worse than cash')])
def test_may_i_run_it(folder, word, begins):
    v = read_run(write_run(folder, word=word, simulated=False)).verdict
    assert may_i(v).startswith(begins)
    faulty = may_i(replace(v, word='INCONCLUSIVE', faults=['the ledger was cut']))
    assert 'cannot pass as it stands: the ledger was cut' in faulty

def test_what_it_will_do(folder):
    said = will_do(read_run(folder))
    assert '3 coins (BTC, ETH, SOL)' in said and 'over 24 hours' in said and 'closes 8 % of the gap' in said
    said = will_do(read_run(write_run(folder, 'relative')))
    assert 'expects to do better' in said and 'against those it expects to do worse' in said

def test_how_often_it_speaks(folder):
    run = read_run(folder)
    share = ((run.decisions.sure >= .6) & (run.decisions.side != 0)).mean()
    assert f'from a confidence of 60.0 % on, at {100 * share:.0f} % of the decisions' in speaks_of(run)
    silent = read_run(write_run(folder, threshold=None))
    assert 'silent' in speaks_of(silent) and not silent.speaks.any()
    assert write_report(folder).stat().st_size > 50_000                          # the rest of the page is there as well

def test_what_next_loads_the_model(folder):
    text = html.unescape(re.sub('<[^>]+>', '', what_next(read_run(write_run(folder, simulated=False, word='PASS')))))
    assert f'ai.load_state({str(folder/"model")!r})' in text and f'cryptoml live --state {folder/"model"}' in text

def test_answers_and_equity_come_first(folder):
    page = write_report(folder).read_text()
    order = ['May I run it?', 'What will it do?', 'What next?', 'Equity after costs', 'By coin', 'How sure, how right',
             '<h2>Forecasts against members', 'All 2 gains', '<h2>What was traded', '<h2>Words']
    places = [page.index(x) for x in order]
    assert places == sorted(places)

# ---- what is drawn

def test_all_books_are_drawn_at_one_risk(folder):
    days, daily = read_run(folder).daily()
    page = write_report(folder).read_text()
    charts = [json.loads(c) for c in re.findall(r'application/json">(.*?)</script>', page)]
    drawn = {s['label']: s['values'] for s in charts[0]['series']}
    assert charts[0]['x'][0] == days[0].timestamp() and {OWN, 'hold', 'lower', 'upper'} == drawn.keys()
    for name, r in daily.items():
        curve = np.array([1, *drawn[name]])
        assert np.std(curve[1:] / curve[:-1] - 1) * np.sqrt(365) == pytest.approx(.2, rel=.02)
        assert drawn[name][-1] == pytest.approx(equity_of(at_volatility(r, .2))[-1], rel=1e-4)
    ran = ', '.join(f'{name} {100 * r.std() * np.sqrt(365):.1f} %' for name, r in daily.items())
    assert f'every book drawn at 20 % volatility a year (over the test they ran at: {ran})' in page

def test_the_band_is_wider_where_days_hang_together():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, .01, 600)
    slow = np.convolve(noise, np.ones(20) / 20 ** .5, 'same')
    slow *= noise.std() / slow.std()
    wide, narrow = (np.log(luck(r - r.mean(), 10)[:, -1]) for r in (slow, noise))
    assert np.ptp(wide) > 1.5 * np.ptp(narrow)
    assert np.isfinite(luck(np.full(50, -1.5))).all()            # who loses all has nothing left to lose

def test_tables_are_those_of_the_page(folder):
    run = read_run(folder)
    t = coins_table(run)
    p, y, day, at = run.stated('up_or_down', 24)
    eth = run.decisions.coin.to_numpy()[at] == 'ETH/USDT'
    right = (p.argmax(1) == y)[eth].mean()
    assert t.loc['ETH/USDT', 'right'] == pytest.approx(right) and t.n.sum() == len(y)
    assert t.loc['ETH/USDT', 'gain'] == pytest.approx(right - (y == 1)[eth].mean(), abs=1e-12)
    assert (t.lo < t.gain).all() and (t.gain < t.hi).all()
    c = calibration(p, y, day)
    assert ((c.lo < c.confidence) & (c.confidence < c.hi)).mean() > .7    # it is honest, and the intervals say so
    k = coverage(p, y, day)
    assert k.right.iloc[0] > k.right.iloc[-1] + .05                              # the surest are right more often

def test_each_picture_says_what_it_shows(folder):
    for page in (write_report(folder).read_text(), write_report(folder, static=True).read_text()):
        tags = Tags(page)
        assert not tags.wrong and not tags.open
        assert len(tags.pictures) >= 8 and all(alt and len(alt) > 20 for alt in tags.pictures)
        assert tags.heads and set(tags.heads) <= {'row', 'col'}
    last = equity_of(at_volatility(read_run(folder).daily()[1][OWN], .2))[-1]
    assert any(f'{OWN} ends at {last:.2f}' in alt for alt in tags.pictures)

def test_words_are_explained(folder):
    page = write_report(folder).read_text()
    said = page.split('<h2>Words')[1]
    for term in ('accuracy', 'drawdown', 'Sharpe', 'trials', 'threshold'): assert f'<dt>{term}</dt>' in said
    assert '<dt>QLIKE</dt>' not in said                                          # it is not used here
    assert glossary('nothing of the kind') == ''
    scores = ('accuracy', 'AUC', 'log-loss', 'MCC', 'ECE', 'R2', 'QLIKE', 'rank IC', 'pinball', 'coverage',
              'interval score', 'Sharpe', 'PSR', 'break-even')
    assert set(scores) <= TERMS.keys()

# ---- what must not be in it

def test_what_is_published_holds_no_rows_and_no_place(folder):
    page = write_report(folder, static=True).read_text()
    assert '<script' not in page and '<svg' not in page and 'application/json' not in page
    assert str(folder) not in page and '/secret' not in page and '/a/place' not in page and 'a machine' not in page
    assert str(PRICE) not in page and 'FOLDER/model' in page
    sources = re.findall(r'(?:src|srcset|href)="([^"]{0,15})', page)
    assert sources and all(s.startswith('data:image/png') for s in sources)

def test_nothing_is_fetched(folder):
    page = write_report(folder).read_text()
    assert not re.findall(r'(?:src|srcset|href|action)="(?!data:|#)', page)
    assert not re.findall(r'@import|url\((?!#|data:)', page)
    assert 'fetch(' not in page and 'XMLHttpRequest' not in page

def test_what_it_is_given_is_escaped(folder):
    bad = '<script>alert(1)</script>'
    write_run(folder, left_out={bad: bad}, absent=[bad], bars=dict(headline=bad, defects=[dict(note=bad)]),
              needed={bad: .1, 'b': .2}, shares=[dict(target=bad, horizon=24, shares={bad: .5})])
    page = write_report(folder).read_text()
    assert bad not in page and html.escape(bad) in page

def test_the_library_is_the_one_that_is_named():
    import hashlib
    assert hashlib.sha256((ASSETS/'uPlot.iife.min.js').read_bytes()).hexdigest() == DIGEST

def test_what_a_job_adds_stands_behind_the_answers(folder):
    page = write_report(write_run(folder, more=[['What the search found', '<p>Nothing.</p>']])).read_text()
    assert page.index('Equity after costs') < page.index('<h2>What the search found</h2>') < page.index('<h2>By coin')

def test_numbers_as_people_say_them():
    assert told('accuracy 50%', .027) == '2.7 %' and told('ECE', .5) == '50.0 %'
    assert told('Sharpe', 1.234, '+') == '+1.23'
    assert told('break-even bp', 227.06) == '227.1' and told('R2', float('nan')) == '' and 'R2' in PERCENT
    assert '<td>0.1235</td>' in table_html(pd.DataFrame(dict(a=[.12345])), index=False)
    assert '<td class="text"></td>' in table_html(pd.DataFrame(dict(a=[None])), index=False)

def test_a_figure_is_closed():
    import matplotlib.pyplot as plt
    before = plt.get_fignums()
    figure_html(plt.figure(), 'nothing')
    assert plt.get_fignums() == before

def test_a_run_reads_what_was_written(folder):
    run = read_run(folder)
    assert isinstance(run, Run) and run.facts == read_json(folder/'report.json') and run.horizon == 24
