"""Every notebook runs, and has the shape the site and the exporter count on"""
import ast, io, json, multiprocessing, os, re, sys, tempfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

root = Path(__file__).parents[1]
nbs = root/'nbs'
notebooks = sorted(nbs.glob('*.ipynb'))
guide = sorted((nbs/'guide').glob('*.ipynb'))        # pages without a module
everything = notebooks + guide + sorted((nbs/'jobs').glob('*.ipynb'))

skipped = ['slow', 'gpu'] if 'CRYPTOML_DATA' in os.environ else ['slow', 'gpu', 'data']
preloaded = ['torch', 'torch._dynamo', 'numba', 'pandas', 'scipy.stats', 'matplotlib.pyplot', 'lightgbm', 'nbdev.test',
             'fastcore.test']
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(root/'settings.ini', encoding='utf-8')

def name(path): return path.stem
def contents(path): return json.loads(path.read_text(encoding='utf-8'))
def cells(path, kind): return [c for c in contents(path)['cells'] if c['cell_type'] == kind]
def sources(path, kind): return [''.join(c['source']) for c in cells(path, kind)]
def exported(path): return [s for s in sources(path, 'code') if re.match(r'#\|\s*export', s)]

def execute(nb, send):
    "In a process of its own: run the notebook, send whether it passed and what it said"
    sys.path.insert(0, str(root))
    from nbdev import test as runner   # its name would be collected
    sys.stderr = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        os.environ['CRYPTOML_LEDGER'] = str(Path(folder)/'ledger.jsonl')   # its trials are no other notebook's
        ok, _ = runner.test_nb(nb, skip_flags=skipped)
    send.send((ok, sys.stderr.getvalue()))

@pytest.mark.parametrize('nb', notebooks + guide, ids=name)
def test_notebook(nb):
    "One after another, each in a fresh fork of a process that has only imported what all of them import"
    context = multiprocessing.get_context('spawn' if sys.platform == 'win32' else 'forkserver')
    if sys.platform != 'win32': context.set_forkserver_preload(preloaded)
    receive, send = context.Pipe(duplex=False)
    p = context.Process(target=execute, args=(nb, send))
    p.start()
    send.close()
    try: ok, said = receive.recv()
    except EOFError: ok, said = False, 'its process died'
    p.join()
    assert ok, f'{nb.name} failed:\n{said[-6000:]}'

@pytest.mark.parametrize('nb', everything, ids=name)
def test_shape(nb):
    assert contents(nb)['metadata']['kernelspec']['name'] == 'python3'
    kinds = {o['output_type'] for c in cells(nb, 'code') for o in c['outputs']}
    assert 'error' not in kinds, 'an output is an error'
    title = sources(nb, 'markdown')[0].strip()
    assert re.fullmatch('# .+\n\n> .+', title), f'the title cell holds more than title and subtitle: {title}'
    marked = [s for s in sources(nb, 'markdown') if '%% [markdown]' in s]
    assert not marked, f'a cell begins within another one: {marked[0][-200:]}'

@pytest.mark.parametrize('nb', everything, ids=name)
def test_no_place_of_one_machine(nb):
    places = re.findall(r'(?<![\w.])/(?:work|tmp|root|home|Users)/\w+', nb.read_text(encoding='utf-8'))
    assert not places, f'{nb.name} names {places[0]}'

def one_class_of_short_methods(code):
    "A class stands whole in one cell, however many methods it has"
    body = ast.parse(code).body
    if len(body) != 1 or not isinstance(body[0], ast.ClassDef): return False
    methods = [n for n in body[0].body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return all(n.end_lineno - n.body[0].lineno < 25 for n in methods)

@pytest.mark.parametrize('nb', [n for n in notebooks if n.stem != 'index'], ids=name)
def test_exported_cells(nb):
    assert sources(nb, 'code')[0].strip() == f'#| default_exp {nb.stem[4:]}'
    for s in exported(nb):
        assert len(s.splitlines()) <= 41 or one_class_of_short_methods(s), f'an exported cell is over 40 lines: {s}'
        assert not re.search(r'^\s*[%!]\w', s, re.M), f'magic: {s}'
        for n in ast.walk(ast.parse(s)):
            assert not (isinstance(n, ast.ImportFrom) and n.names[0].name == '*'), f'star import: {s}'
            assert getattr(n, 'id', '') not in ('patch', 'show_doc', 'get_ipython'), f'{n.id}: {s}'

def modules(path):
    "Modules of the package that the exported code of a notebook imports"
    code = '\n'.join(exported(path))
    return set(re.findall(r'^\s*(?:from|import) cryptoml\.(\w+)', code, re.M))

def test_a_module_imports_only_from_lower_numbers():
    numbered = [n for n in notebooks if n.stem != 'index']
    number = {n.stem[4:]: n.stem[:3] for n in numbered}
    upward = [f'{n.stem} imports {m}' for n in numbered for m in modules(n) if number[m] >= n.stem[:3]]
    assert not upward

scripts = sorted([*(root/'tests').glob('*.py'), *(root/'bench').glob('*.py')])

@pytest.mark.parametrize('path', everything + scripts, ids=lambda path: f'{path.parent.name}/{path.name}')
def test_lines_end_before_column_120(path):
    "A caption is a sentence that nbdev reads as one line; everything else can be said in two"
    code = sources(path, 'code') if path.suffix == '.ipynb' else [path.read_text(encoding='utf-8')]
    lines = [line for s in code for line in s.splitlines() if not line.startswith('#| fig-cap')]
    wide = [line for line in lines if len(line) > 120]
    assert not wide, f'{len(wide)} lines of {path.name} are over 120 columns, first: {wide[0].strip()}'

def test_numbers():
    numbered = [n.stem for n in notebooks if n.stem != 'index']
    assert all(re.fullmatch(r'\d{3}_[a-z]+', n) for n in numbered)
    assert len({n[:3] for n in numbered}) == len({n[4:] for n in numbered}) == len(numbered)

def test_no_page_has_an_address_of_the_site_itself():
    "A page named search would be where the search is"
    assert not {n.stem[4:] for n in notebooks} & {'search', 'genindex', 'index', 'api', 'catalogue', 'reports', '404'}

def test_jobs_are_no_tests():
    assert (nbs/'jobs'/'.notest').exists() and (root/'nbs'/'_quarto.yml').resolve() == root/'_quarto.yml'

def test_job_notebooks_have_parameters():
    from cryptoml.parameters import parameters
    for nb in (nbs/'jobs').glob('*.ipynb'):
        p = parameters(nb)
        assert 'out' in p, f'{nb.name} has no parameter out'
        assert all(v.help for v in p.values()), f'{nb.name}: a parameter has no comment'

def test_site_address():
    s = ini['DEFAULT']
    q = yaml.safe_load((root/'_quarto.yml').read_text())
    address = s['doc_host'] + s['doc_baseurl']
    assert address == q['website']['site-url'], 'links to symbols are recognised by this address'
    assert q['project']['output-dir'] == s['doc_path']

def test_sidebar_lists_every_notebook():
    from cryptoml.docs import toctrees
    q = yaml.safe_load((root/'_quarto.yml').read_text())
    pages = {p.relative_to(nbs).as_posix(): p.stem for p in everything}
    assert '055_data' in toctrees(q['website']['sidebar']['contents'], pages)

def test_readme():
    from cryptoml.docs import readme
    text = (root/'README.md').read_text(encoding='utf-8')
    assert text == readme(contents(nbs/'index.ipynb')), 'README.md is not that of nbs/index.ipynb: run make docs'
    gone = [p for p in re.findall(r'\]\((?!https?:|#)([^)]+)\)', text) if not (root/p).exists()]
    assert not gone, f'README.md links to nothing: {gone}'

def test_readme_of_the_tests():
    text = (root/'tests'/'README.md').read_text(encoding='utf-8')
    named = set(re.findall(r'`(test_\w+)\.py`', text)) | set(re.findall(r'`(\d{3}_\w+)`', text))
    there = {p.stem for p in (root/'tests').iterdir()} | {p.stem for p in notebooks}
    assert not named - there, f'tests/README.md names what is not there: {named - there}'

MOST_LINES = 850   # What a reader can hold in the head, and still much

@pytest.mark.parametrize('path', sorted((root/'cryptoml').glob('[!_]*.py')), ids=lambda path: path.stem)
def test_a_module_is_not_long(path):
    assert len(path.read_text(encoding='utf-8').splitlines()) <= MOST_LINES, 'cut it along its ideas'
