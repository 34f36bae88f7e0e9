"""The command itself: its version, its doctor, what a shell completes"""
import json, os, shutil, subprocess, sys, textwrap
from configparser import ConfigParser
from datetime import datetime
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cryptoml.completion import SHELLS
from cryptoml.doctor import (
    EXTRAS, FAULT, NOTE, OK, REQUIRED, cache, clock, conclusion, cores, data, extra, ledger, required, state, writable)
from cryptoml.parameters import parameters
from cryptoml.runs import jobs
from cryptoml.jobs import _commands

root = Path(__file__).parents[1]
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(root/'settings.ini', encoding='utf-8')
s = ini['DEFAULT']

def cryptoml(*argv, cwd, head='', **env):
    "The command in a process of its own"
    here = f'import sys; sys.path.insert(0, {str(root)!r})'
    do = f'from cryptoml.jobs import main; sys.exit(main({list(argv)!r}))'
    code = '\n'.join([here, textwrap.dedent(head), do])
    return subprocess.run([sys.executable, '-c', code], cwd=cwd, capture_output=True, text=True, env=os.environ | env)

def names(requirements): return {canonicalize_name(Requirement(r).name) for r in requirements.split()}

def test_the_doctor_asks_for_what_the_package_requires():
    assert set(map(canonicalize_name, REQUIRED)) == names(s['requirements'])
    for name, packages in EXTRAS.items():
        assert set(map(canonicalize_name, packages)) == names(s[f'{name}_requirements']), name
    of_users = {k.removesuffix('_requirements') for k in s if k.endswith('_requirements')} - {'dev', 'docs', 'check'}
    assert set(EXTRAS) == of_users

def test_version(tmp_path):
    done = cryptoml('--version', cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f'cryptoml {s["version"]}\n')

def test_the_doctor_of_a_healthy_machine(tmp_path):
    done = cryptoml('doctor', cwd=tmp_path, CRYPTOML_LEDGER=str(tmp_path/'ledger.jsonl'))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith('OK')
    assert not list(tmp_path.iterdir()), 'it left something behind'

def test_the_doctor_speaks_where_torch_is_missing(tmp_path):
    done = cryptoml('doctor', '--json', cwd=tmp_path, head='''
        import sys
        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.split('.')[0] == 'torch': raise ModuleNotFoundError(f'No module named {name!r}', name=name)
        sys.meta_path.insert(0, Block())
        ''')
    assert done.returncode == 1, done.stderr
    said = json.loads(done.stdout)
    faults = {f['name']: f['todo'] for f in said['findings'] if f['word'] == 'fault'}
    assert not said['ok'] and faults == dict(torch='pip install cryptoml brings it')

def test_more_threads_than_cores_are_told(tmp_path):
    done = cryptoml('doctor', '--json', cwd=tmp_path, head="""
        import torch, cryptoml.doctor
        torch.set_num_threads(8)
        cryptoml.doctor.cores = lambda: 2
        """)
    threads = next(f for f in json.loads(done.stdout)['findings'] if f['name'] == 'threads')
    assert (threads['word'], done.returncode) == ('note', 0) and 'set OMP_NUM_THREADS=2:' in threads['todo']

def test_who_has_read_enough_is_no_error(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(root)!r}); from cryptoml.jobs import main; sys.exit(main(['doctor']))"
    reader = subprocess.Popen(['true'], stdin=subprocess.PIPE)
    reader.wait()                                            # it is gone before the first line comes
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, stdout=reader.stdin, stderr=subprocess.PIPE)
    reader.stdin.close()
    assert (done.returncode, done.stderr) == (141, b'')

def test_what_the_doctor_finds(tmp_path, monkeypatch):
    "A package that breaks, a quota, a file where a folder must be, no cache, a wrong folder of data, a clock of 1970"
    (tmp_path/'broken_build.py').write_text('raise OSError("libgomp.so.1: no such file")')
    monkeypatch.syspath_prepend(tmp_path)
    assert required('broken_build').word == required('nowhere_at_all').word == FAULT
    monkeypatch.setitem(EXTRAS, 'other', ('numpy', 'nowhere-at-all'))
    assert extra('other').value.endswith('no nowhere-at-all') and extra('other').word == NOTE
    (tmp_path/'cpu.max').write_text('50000 100000')
    assert cores(tmp_path/'cpu.max') == .5 and cores(tmp_path/'none') >= 1
    assert writable('runs', tmp_path/'cpu.max'/'runs').word == state(tmp_path/'cpu.max'/'state').word == FAULT
    assert not [*(tmp_path/'new').parent.glob('new')] and writable('runs', tmp_path/'new').word == OK
    monkeypatch.setattr('cryptoml.compile.own_folder', lambda place, name: None)
    assert cache().word == NOTE and 'CRYPTOML_CACHE' in cache().todo
    monkeypatch.setenv('CRYPTOML_DATA', str(tmp_path/'nowhere'))
    assert data().word == NOTE
    monkeypatch.delenv('CRYPTOML_DATA')
    assert data().word == OK
    assert clock(datetime.fromisoformat('1970-01-01T00:00+00:00')).word == FAULT

def test_a_full_disk_and_a_cut_ledger(tmp_path, monkeypatch):
    from cryptoml.ledger import tell
    monkeypatch.setenv('CRYPTOML_LEDGER', str(tmp_path/'ledger.jsonl'))
    tell(3, 'by hand')
    tell(4, 'by hand')
    assert [f.word for f in ledger()] == [OK]
    lines = (tmp_path/'ledger.jsonl').read_text().splitlines(keepends=True)
    (tmp_path/'ledger.jsonl').write_text(lines[0])
    assert {f.word for f in ledger()} == {FAULT}
    monkeypatch.setattr(shutil, 'disk_usage', lambda place: shutil._ntuple_diskusage(10, 9, 1))
    full = writable('runs', tmp_path)
    assert full.word == NOTE and conclusion([full]) == 'OK, with a note above'

@pytest.mark.parametrize('argv, said', [
    (['doctor', '--fast'], 'unrecognized arguments: --fast'),
    (['completion'], 'the following arguments are required: shell'),
    (['completion', 'tcsh'], "argument shell: invalid choice: 'tcsh'"),
], ids=' '.join)
def test_a_mistake_is_a_sentence(tmp_path, argv, said):
    done = cryptoml(*argv, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1

def offered(script, *words):
    "What bash offers for the last word"
    line = ' '.join(f"'{w}'" for w in words)
    asked = f'{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _cryptoml; echo "${{COMPREPLY[*]}}"'
    done = subprocess.run(['bash', '--norc', '-c', asked], capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.stdout.split()

@pytest.mark.skipif(not shutil.which('bash'), reason='needs bash')
def test_bash_offers_every_job_and_parameter():
    script = SHELLS['bash'](_commands())
    first = offered(script, 'cryptoml', '')
    assert {*jobs(), 'runs', 'trials', 'predict', 'live', 'serve', 'doctor', 'completion', '--version'} <= set(first)
    for name, notebook in jobs().items():
        wanted = {f'--{p}' for p in parameters(notebook)} | {'--out', '--each'}
        assert wanted <= set(offered(script, 'cryptoml', name, '--')), name
    assert offered(script, 'cryptoml', 'live', '--act-on', 'PA') == ['PASS']
    assert offered(script, 'cryptoml', 'trials', 'a') == ['add']
    assert offered(script, 'cryptoml', 'adapt', '--apply', '') == ['true', 'false']

@pytest.mark.parametrize('shell, check', dict(bash=['bash', '-n'], zsh=['zsh', '-fn'], fish=['fish', '-n']).items())
def test_a_shell_can_read_it(tmp_path, shell, check):
    if not shutil.which(shell): pytest.skip(f'{shell} is not installed')
    path = tmp_path/'script'
    path.write_text(SHELLS[shell](_commands()))
    done = subprocess.run([*check, path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')

@pytest.mark.skipif(not shutil.which('zsh'), reason='needs zsh')
def test_zsh_knows_the_function(tmp_path):
    (tmp_path/'_cryptoml').write_text(SHELLS['zsh'](_commands()))
    asked = f'fpath=({tmp_path} $fpath); autoload -U compinit; compinit -D -u; echo $_comps[cryptoml]'
    done = subprocess.run(['zsh', '-f', '-c', asked], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ('_cryptoml\n', '')

@pytest.mark.skipif(not shutil.which('fish'), reason='needs fish')
def test_fish_offers_a_parameter(tmp_path):
    script = SHELLS['fish'](_commands())
    done = subprocess.run(['fish', '--no-config', '-c', f"{script}\ncomplete -C 'cryptoml train --epo'"],
                          capture_output=True, text=True)
    assert done.stdout.startswith('--epochs\t'), done.stderr
