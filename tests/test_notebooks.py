"""Every notebook runs, and has the shape the site and the exporter count on"""
import ast, io, json, multiprocessing, os, re, sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

root = Path(__file__).parents[1]
nbs = root/'nbs'
notebooks = sorted(nbs.glob('*.ipynb'))
everything = notebooks + sorted((nbs/'jobs').glob('*.ipynb'))
name = lambda p: p.stem
skipped = ['slow', 'gpu'] + (['data'] if 'CRYPTOML_DATA' not in os.environ else [])
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(root/'settings.ini', encoding='utf-8')

def cells(path, kind=None): return [(''.join(c['source']), c) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if kind in (None, c['cell_type'])]
def exported(path): return [s for s, _ in cells(path, 'code') if re.match(r'#\|\s*export', s)]

def execute(nb, send):
    "In a process of its own: run the notebook, send whether it passed and what it said"
    sys.path.insert(0, str(root))
    from nbdev import test as runner   # its name would be collected
    sys.stderr = io.StringIO()
    ok, _ = runner.test_nb(nb, skip_flags=skipped)
    send.send((ok, sys.stderr.getvalue()))

@pytest.mark.parametrize('nb', notebooks, ids=name)
def test_notebook(nb):
    "One after another, each in a fresh fork of a process that has only imported what all of them import"
    context = multiprocessing.get_context('forkserver' if sys.platform != 'win32' else 'spawn')
    if sys.platform != 'win32': context.set_forkserver_preload(['torch', 'numba', 'pandas', 'scipy.stats', 'matplotlib.pyplot', 'nbdev.test', 'fastcore.test'])
    receive, send = context.Pipe(duplex=False)
    p = context.Process(target=execute, args=(nb, send)); p.start(); send.close()
    try: ok, said = receive.recv()
    except EOFError: ok, said = False, 'its process died'
    p.join()
    assert ok, f'{nb.name} failed:\n{said[-6000:]}'

@pytest.mark.parametrize('nb', everything, ids=name)
def test_shape(nb):
    meta = json.loads(nb.read_text(encoding='utf-8'))['metadata']
    assert meta['kernelspec']['name'] == 'python3'
    assert not [o for _, c in cells(nb, 'code') for o in c['outputs'] if o['output_type'] == 'error'], 'an output is an error'
    title = next(s for s, c in cells(nb, 'markdown')).strip().splitlines()
    assert len(title) == 3 and title[0].startswith('# ') and not title[1] and title[2].startswith('> '), f'the title cell holds more than title and subtitle: {title}'

@pytest.mark.parametrize('nb', everything, ids=name)
def test_no_place_of_one_machine(nb):
    places = re.findall(r'(?<![\w.])/(?:work|tmp|root|home|Users)/\w+', nb.read_text(encoding='utf-8'))
    assert not places, f'{nb.name} names {places[0]}'

@pytest.mark.parametrize('nb', [n for n in notebooks if n.stem != 'index'], ids=name)
def test_exported_cells(nb):
    assert (first := cells(nb, 'code')[0][0].strip()) == f'#| default_exp {nb.stem[3:]}', first
    code = exported(nb)
    assert all(len(s.splitlines()) <= 41 for s in code), 'an exported cell is over 40 lines'
    for s in code:
        for n in ast.walk(ast.parse(s)):
            assert not (isinstance(n, ast.ImportFrom) and n.names[0].name == '*'), f'star import: {s}'
            assert getattr(n, 'id', '') not in ('patch', 'show_doc', 'get_ipython'), f'{n.id}: {s}'
        assert not re.search(r'^\s*[%!]\w', s, re.M), f'magic: {s}'

def test_numbers():
    numbered = [n.stem for n in notebooks if n.stem != 'index']
    assert all(re.fullmatch(r'\d\d_[a-z]+', n) for n in numbered)
    assert len({n[:2] for n in numbered}) == len({n[3:] for n in numbered}) == len(numbered)

def test_jobs_are_no_tests():
    assert (nbs/'jobs'/'.notest').exists() and (root/'nbs'/'_quarto.yml').resolve() == root/'_quarto.yml'

def test_job_notebooks_have_parameters():
    from cryptoml.jobs import parameters
    for nb in (nbs/'jobs').glob('*.ipynb'):
        p = parameters(nb)
        assert 'out' in p and all(v.help for v in p.values()), f'{nb.name}: every parameter has a comment, and out is one of them'

def test_site_address():
    s, q = ini['DEFAULT'], yaml.safe_load((root/'_quarto.yml').read_text())
    assert s['doc_host'] + s['doc_baseurl'] == q['website']['site-url'], 'links to symbols are recognised by this address'
    assert q['project']['output-dir'] == s['doc_path']

def test_sidebar_lists_every_notebook():
    from cryptoml.docs import toctrees
    q = yaml.safe_load((root/'_quarto.yml').read_text())
    pages = {p.relative_to(nbs).as_posix(): p.stem for p in everything}
    assert '00_data' in toctrees(q['website']['sidebar']['contents'], pages)

def test_readme():
    from cryptoml.docs import readme
    text = (root/'README.md').read_text(encoding='utf-8')
    assert text == readme(json.loads((nbs/'index.ipynb').read_text(encoding='utf-8'))), 'README.md is not that of nbs/index.ipynb: run make docs'
    gone = [p for p in re.findall(r'\]\((?!https?:|#)([^)]+)\)', text) if not (root/p).exists()]
    assert not gone, f'README.md links to nothing: {gone}'
