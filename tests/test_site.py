"""The site as a reader meets it: every name and every feature has a place, the search finds it, nothing is fetched

A small site of real pages: the facade, the guide for bots, the catalogue and the index of names."""
import json, re, shutil
from pathlib import Path

import pytest

from cryptoml import docs
from cryptoml.features import catalogue
from cryptoml.integration import UltimateTradingAI
from cryptoml.links import SiteError, check_links, follow

root = Path(__file__).parents[1]
address = 'https://host/x'
shown = ('650_integration.ipynb', 'guide/in_your_bot.ipynb')
explained = [*catalogue().family.unique(), 'simulate']          # pages that the catalogue links to
methods = ('train_from_historical_data', 'predict', 'get_trading_signal', 'adapt_to_new_regime', 'save_state',
           'load_state')

def stub(name):
    raw = dict(cell_type='raw', metadata={}, source=f'---\ntitle: {name}\noutput-file: {name}.html\n---\n')
    return json.dumps(dict(cells=[raw], metadata={}, nbformat=4, nbformat_minor=5))

def write_alone(name, to):
    "A real page, without its links: the small site does not have what they lead to"
    docs.write_nb(docs.processed(root/'nbs'/name), to)
    nb = json.loads(to.read_text(encoding='utf-8'))
    for c in nb['cells']:
        if c['cell_type'] == 'markdown': c['source'] = re.sub(r'\]\([^)]*\)', ']', ''.join(c['source']))
    to.write_text(json.dumps(nb), encoding='utf-8')

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "Folder of the built site"
    tmp = tmp_path_factory.mktemp('site')
    proc = tmp/'_proc'
    proc.mkdir()
    (tmp/'nbs').mkdir()
    shutil.copy(root/'nbs'/shown[1], tmp/'nbs')                  # its imports tell what comes first on a page
    for name in shown:
        (proc/name).parent.mkdir(exist_ok=True)
        write_alone(name, proc/name)
    for name in ['index', *explained]: (proc/f'{name}.ipynb').write_text(stub(name), encoding='utf-8')
    contents = ['index.ipynb', *shown, *(f'{name}.ipynb' for name in explained), 'catalogue.html', 'api.html']
    web = {'title': 'x', 'site-url': address, 'sidebar': dict(contents=contents), 'repo-url': 'https://code/x'}
    assert docs.sphinx(proc, tmp/'out', web) == 0
    return tmp/'out'

def text_of(site, page): return (site/page).read_text(encoding='utf-8')

@pytest.fixture(scope='module')
def search(site):
    "The index that the search of the site reads"
    text = text_of(site, 'searchindex.js')
    return json.loads(text[text.index('{'):text.rindex('}') + 1])

def found(search, *words):
    "Pages with all of the words, as the search of the site finds them"
    from sphinx.search.en import SearchEnglish
    english = SearchEnglish({})
    pages = None
    for word in words:
        if word in english.stopwords: continue
        stem = english.stem(word)
        hits = set()
        for terms in (search['terms'], search['titleterms']):
            at = terms.get(stem, [])
            hits |= set(at if isinstance(at, list) else [at])
        pages = hits if pages is None else pages & hits
    return {search['docnames'][i] for i in pages or ()}

@pytest.mark.parametrize('name', methods)
def test_what_a_bot_calls_has_a_place(site, search, name):
    "An anchor, a sentence, a table of what goes in and comes out; in the index of names, and in the search"
    page, whole = text_of(site, 'integration.html'), f'UltimateTradingAI.{name}'
    at = page.index(f'<a id="{whole}"></a>')
    said = page[at:page.index('<a id=', at + 9)]
    sentence = ' '.join(getattr(UltimateTradingAI, name).__doc__.split())
    assert sentence.split(';')[0].split('`')[0].strip() in re.sub('<[^>]*>', '', said)
    assert '<table' in said and '<td' in said
    assert f'<a href="integration.html#{whole}">' in text_of(site, 'api.html')
    assert [(search['docnames'][i], anchor) for i, anchor in search['alltitles'][whole]] == [('integration', whole)]

def test_every_exported_class_and_method_has_a_place(site):
    import inspect
    from cryptoml import integration
    from cryptoml.reference import methods as of_class
    page = text_of(site, 'integration.html')
    for name in integration.__all__:
        what = getattr(integration, name)
        if not inspect.isclass(what) and not inspect.isfunction(what): continue
        names = [name, *(f'{name}.{m}' for m in (of_class(what) if inspect.isclass(what) else ()))]
        missing = [n for n in names if page.count(f'<a id="{n}"></a>') != 1]
        assert not missing, f'no place, or two, for {missing}'

def test_tables_do_not_say_what_nobody_said(site):
    cells = re.findall(r'<td[^>]*>(.*?)</td>', text_of(site, 'integration.html'), re.S)
    said = {re.sub('<[^>]*>', '', c).strip() for c in cells}
    assert not said & {'NoneType', 'inspect._empty', '_empty', 'None | None'}

def test_what_others_use_comes_first(site):
    "Before the first heading of the story; what only the page uses is folded away"
    page = text_of(site, 'integration.html')
    table, folded = page.index('<table class="names">'), page.index('<details class="names">')
    assert table < folded < page.index('<h2')
    assert '#UltimateTradingAI"' in page[table:folded] and '#own_settings"' in page[folded:page.index('</details>')]

@pytest.mark.parametrize('word', list(catalogue()['name'][::40]))
def test_a_feature_is_found_by_its_name(site, search, word):
    assert [(search['docnames'][i], anchor) for i, anchor in search['alltitles'][word]] == [('catalogue', word)]
    assert f'id="{word}"' in text_of(site, 'catalogue.html')

def test_the_catalogue_is_whole(site):
    "Each feature once; drawn where the simulated market has it; small; readable without scripts"
    page, table = text_of(site, 'catalogue.html'), catalogue()
    assert re.findall(r'<div class="feature of-filter" id="(\w+)"', page) == list(table['name'])
    assert (site/'catalogue.html').stat().st_size < 1.5e6
    for f in table.itertuples(index=False):
        entry = page[page.index(f'<div class="feature of-filter" id="{f.name}"'):][:6000]
        assert f'settled after {f.warm_up} bar' in entry
    assert page.count('<svg class="spark"') > 200

def test_how_much_history(search):
    assert 'integration' in found(search, 'how', 'much', 'history')
    assert not found(search, 'how', 'much', 'marzipan')

def test_nothing_is_fetched_and_no_link_is_dead(site):
    found = follow(site, address)
    assert not found.dead and not found.fetched and found.anchors > 600

@pytest.mark.parametrize('planted, said', [
    ('<a href="integration.html#UltimateTradingAI.forget">x</a>', 'there is no such place on integration.html'),
    ('<a href="https://host/x/gone.html">x</a>', 'there is no gone.html'),
    ('<a href="/x/api.html#nobody">x</a>', 'there is no such place on api.html'),
    ('<a href="guide/../guide/nowhere.html?q=1#a">x</a>', 'there is no guide/nowhere.html'),
    ('<img src="lost.png">', 'there is no lost.png'),
    ('<link rel="stylesheet" href="https://cdn/a.css">', 'from elsewhere'),
    ('<script src="//cdn/a.js"></script>', 'from elsewhere'),
])
def test_a_planted_fault_fails_the_build(site, tmp_path, planted, said):
    copy = shutil.copytree(site, tmp_path/'site')
    (copy/'index.html').write_text(text_of(site, 'index.html').replace('</body>', planted + '</body>'))
    with pytest.raises(SiteError, match='1 links to mend') as e: check_links(copy, address)
    assert said in str(e.value) and 'index.html' in str(e.value)

def test_links_to_the_source_and_the_neighbours(site):
    page = text_of(site, 'integration.html')
    assert 'https://code/x/edit/main/nbs/650_integration.ipynb' in page
    assert 'https://code/x/blob/main/nbs/650_integration.ipynb' in page
    after = re.search(r'<a class="next-page" href="([^"]+)"', page)
    assert after[1] == 'guide/in_your_bot.html'
    assert 'code/x/edit' not in text_of(site, 'api.html')        # it has no notebook

def test_for_the_world_outside(site):
    for name in ('index', 'integration', 'guide/in_your_bot', 'catalogue', 'api'):
        assert f'{address}/{name}.html' in text_of(site, 'llms-full.txt')
        assert f'<loc>{address}/{name}.html</loc>' in text_of(site, 'sitemap.xml')
    lines = text_of(site, 'llms.txt').splitlines()
    assert lines[0].startswith('# ') and lines[2].startswith('> ')
    whole = text_of(site, 'llms-full.txt')
    assert 'class UltimateTradingAI' in whole and 'image/png' not in whole
    assert 'href="/x/index.html"' in text_of(site, '404.html')
