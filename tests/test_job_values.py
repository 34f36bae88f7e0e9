"""The values of a job: refused in one sentence before anything starts; what papermill and Jupyter would make of them"""
import ast, errno, json, os, subprocess, sys, textwrap

import pytest

from cryptoml import jobs, runs
from cryptoml import parameters as reading
from cryptoml.backtest import Costs
from cryptoml.forecaster import ForecasterConfig
from cryptoml.integration import Config
from cryptoml.parameters import JobError, JobFailed, check, convert, parameters
from cryptoml.runs import find, run
from cryptoml.network import LARGEST, MODELS, SIZES
from cryptoml.settings import LONGEST, MODEL_NAMES, RULES, SIZE_NAMES, SettingError, check_settings
from cryptoml.trainer import TrainerError, pick_device

TRAIN = find('train')

def notebook(path, *cells):
    "A job notebook: the parameters, the checks, and what it does"
    def cell(i, source):
        tags = [['parameters'], ['checks']][i:i + 1]
        meta = dict(tags=tags[0] if tags else [])
        return dict(cell_type='code', id=f'c{i}', metadata=meta, execution_count=None, outputs=[], source=source)
    made = [cell(i, textwrap.dedent(source)) for i, source in enumerate(cells)]
    meta = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    path.write_text(json.dumps(dict(cells=made, metadata=meta, nbformat=4, nbformat_minor=5)))
    return path

def said(job, capsys, *args):
    "What the command answers to a value, in one line, and nothing else"
    assert jobs.main([str(job), *args]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count('\n') == 1 and err.startswith('cryptoml: ')
    return err

# -- the train job refuses before it starts

REFUSED = [
    ('start', '2021-13-01', "start '2021-13-01' is no day and no moment"),
    ('start', 'tomorrow', "start 'tomorrow' is no day"),
    ('start', 'now', "start 'now' is no day"),                     # another one tomorrow
    ('start', '1/2/2021', 'is no day and no moment: write 2024-01-31'),   # the first of February?
    ('start', '{seed}', "start '{seed}' is no day"),
    ('end', '2021-02-30', "end '2021-02-30' is no day"),
    ('seed', '1e30', "seed must be int, got '1e30'"),
    ('seed', '1_000', "seed must be int, got '1_000'"),
    ('seed', '-1', 'seed must be a whole number from 0 to'),
    ('seed', str(2**63), 'seed must be a whole number from 0 to'),
    ('seed', '9' * 5000, 'seed must be int'),
    ('epochs', '３', "epochs must be int, got '３'"),
    ('epochs', '٣', 'epochs must be int'),
    ('epochs', '0', 'epochs must be a whole number from 1, got 0'),
    ('horizons', '', 'horizons must be different whole numbers of bars from 1 to 8192, got []'),
    ('horizons', '0', 'horizons must be different whole numbers'),
    ('horizons', '-4,8', 'horizons must be different whole numbers'),
    ('horizons', '4,4', 'got [4, 4]'),
    ('horizons', '4,,8', "horizons must be list[int], got '4,,8'"),
    ('horizons', '4;8', "horizons must be list[int], got '4;8'"),
    ('horizons', '9000', 'from 1 to 8192, got [9000]'),
    ('symbols', 'odd', "symbol 'odd' cannot be split into coin and quote"),
    ('symbols', 'BTC/USDT,', 'symbols must be list[str]'),
    ('symbols', 'a\nb', "symbol 'a\\nb' cannot be split"),
    ('compare', 'lstm,lstm', "compare must be different names among ungraphed, gat, tft, lstm, transformer, linear"),
    ('compare', 'network', 'the network itself is always there'),
    ('compare', 'rnn', "got ['rnn']"),
    ('size', 'huge', "size must be one of auto, small, base, large, got 'huge'"),
    ('book', 'long', "book must be one of auto, relative, timing, got 'long'"),
    ('long_only', 'maybe', "long_only must be bool, got 'maybe'"),
    ('fresh', '2', "fresh must be bool, got '2'"),
    ('networks', '0', 'networks must be a whole number from 1, got 0'),
    ('networks', '1.5', "networks must be int, got '1.5'"),
    ('device', 'gpu', "device must be 'auto', 'cpu', 'cuda' or 'cuda:1', got 'gpu'"),
    ('device', 'cuda:-1', 'device must be'),
    ('device', 'cuda:01', 'device must be'),
    ('device', 'cuda:99', "device 'cuda:99' is not there"),
    ('timeframe', '1x', "timeframe '1x' is not a length of time"),
    ('timeframe', '0h', "timeframe '0h' is not a length of time"),
    ('threads', '-1', 'threads must be a whole number from 1 to 1024'),
    ('threads', '100000', 'threads must be a whole number from 1 to 1024'),
    ('round_trip', '14', 'round_trip must be a fraction in [0, 1), got 14.0: 5 bp is 5e-4'),
    ('round_trip', '-0.1', 'round_trip must be a fraction'),
    ('round_trip', 'nan', "round_trip must be float, got 'nan'"),
    ('round_trip', '1e999', "round_trip must be float, got '1e999'"),
    ('borrow', '10', 'borrow must be a fraction in [0, 1), got 10.0'),
    ('signal', '-1', 'signal must be 0 (noise) or a positive strength'),
    ('question', 'two\nlines', 'question must be a text of one line'),
    ('question', 'caf\udce9', 'question must be str'),             # bytes of another encoding
    ('data', 'nowhere.parquet', "data: no such file: 'nowhere.parquet'"),
    ('data', '', "data: no such file: ''"),
    ('data', '~nobody-of-that-name/x.csv', 'data: no such file'),
    *((source, 'nowhere.csv', f"{source}: no such file: 'nowhere.csv'")
      for source in ('extra', 'onchain', 'orderbook', 'trades', 'cross_exchange', 'funding', 'sentiment')),
]

@pytest.mark.parametrize('name, value, sentence', REFUSED, ids=lambda x: ascii(x)[:24])
def test_refused_before_anything_starts(tmp_path, capsys, monkeypatch, name, value, sentence):
    monkeypatch.setattr(runs, 'execute', lambda *a: pytest.fail('a kernel was started'))
    out = tmp_path/'run'
    assert sentence in said('train', capsys, '--out', str(out), '-p', f'{name}={value}')
    assert not out.exists()

@pytest.mark.parametrize('given', [
    dict(start='2021', end='2021-06', symbols='btcusdt,ETH/USDT', timeframe='4h'),
    dict(start='2009-01-01', end='', horizons='1,8192', compare='', threads='0', epochs='1'),
    dict(round_trip='0', borrow='0', seed=str(2**63 - 1), question='carry, 2nd try', device='cpu', signal='0'),
    dict(compare='tft,linear,gat', size='large', device='auto', threads='4', seed='+7', borrow='.25'),
    dict(size='auto', book='relative', long_only='true', fresh='false', networks='3'),
], ids=str)
def test_what_is_possible_is_not_refused(given): assert check(TRAIN, given)

def test_bounds_in_their_order(capsys):
    args = '-p', 'start=2022-01-01', '-p', 'end=2021-01-01'
    assert 'start 2022-01-01 is not before end 2021-01-01' in said('train', capsys, *args)

def test_a_folder_is_data_and_no_source(tmp_path, capsys):
    assert check(TRAIN, dict(data=str(tmp_path)))['data'] == str(tmp_path)
    assert 'is a folder: name a file' in said('train', capsys, '-p', f'funding={tmp_path}')

@pytest.mark.parametrize('name, value, sentence', [
    ('noise', '-1', 'noise must be a whole number from 0, got -1'),
    ('coins', '0', 'coins must be a whole number from 1, got 0'),
    ('epochs', '0', 'epochs must be a whole number from 1, got 0'),
])
def test_the_evidence_job_asks_too(capsys, name, value, sentence):
    assert sentence in said('evidence', capsys, '-p', f'{name}={value}')

@pytest.mark.parametrize('job', runs.jobs())
def test_every_parameter_of_every_job_is_checked(job):
    checked = {n.id for n in ast.walk(ast.parse(reading._tagged(find(job), 'checks'))) if isinstance(n, ast.Name)}
    assert not parameters(find(job)).keys() - checked - {'out'}

def test_a_refusal_is_quick():
    "What takes seconds to import has not been imported, and no process was started"
    code = '''
        import subprocess, sys
        def never(*args, **kw): raise AssertionError('a process was started')
        subprocess.Popen.__init__ = never
        from cryptoml.jobs import main
        assert main(['train', '-p', 'device=tpu']) == 2
        print({'torch', 'numba', 'scipy', 'papermill', 'jupyter_client', 'ipykernel'} & set(sys.modules))
        '''
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout == 'set()\n', done.stderr

# -- one rule, whichever door a value comes by

def test_names_are_those_of_the_network():
    assert (tuple(SIZES), tuple(MODELS), LARGEST) == (SIZE_NAMES, MODEL_NAMES, LONGEST)

@pytest.mark.parametrize('bad', [
    dict(horizons=[]), dict(horizons=[4, 4]), dict(horizons=[0]), dict(horizons=[True, 2]), dict(size='huge'),
    dict(seed=-1), dict(seed=2**63), dict(round_trip=1), dict(round_trip=float('nan')), dict(borrow=5), dict(threads=0),
    dict(epochs=0), dict(model='rnn'), dict(device='tpu'), dict(question='a\nb'), dict(book='both'), dict(networks=0),
    dict(networks=True), dict(long_only=1), dict(fresh=None),
], ids=str)
def test_every_door_says_the_same(bad):
    (name, value), = bad.items()
    with pytest.raises(SettingError) as e: check_settings(**bad)
    doors = {
        Config: lambda: Config.read(bad),
        ForecasterConfig: lambda: ForecasterConfig(**bad),
        Costs: lambda: Costs.of(**dict(round_trip=.001) | bad),
        pick_device: lambda: pick_device(value),
    }
    takes = {
        Config: set(Config.__dataclass_fields__),
        ForecasterConfig: set(ForecasterConfig.__dataclass_fields__),
        Costs: {'round_trip', 'borrow'},
        pick_device: {'device'},
    }
    asked = [door for kind, door in doors.items() if name in takes[kind]]
    assert asked
    for door in asked:
        with pytest.raises((SettingError, TrainerError)) as f: door()
        assert str(f.value) == str(e.value)

def test_every_rule_is_asked_somewhere():
    fields = {*Config.__dataclass_fields__, *ForecasterConfig.__dataclass_fields__, *Costs.__dataclass_fields__}
    assert not RULES.keys() - fields - {'compare', 'device'}

# -- text that Python would read and a person may not have meant

@pytest.mark.parametrize('text, kind', [
    ('1_000', int), ('１２', int), ('1_0.5', float), ('infinity', float), ('1e400', float), ('0x10', int), ('', int),
    ('1,', list[int]), (',', list[str]), ('a\0b', str), ('1 2', int),
])
def test_not_guessed(text, kind):
    with pytest.raises(ValueError): convert(text, kind)

@pytest.mark.parametrize('text, kind, value', [
    (' 7 ', int, 7), ('+7', int, 7), ('1.', float, 1.), ('.5', float, .5), ('-1E-3', float, -.001),
    ('{seed}', str, '{seed}'), (' a ', str, ' a '),
])
def test_as_meant(text, kind, value): assert convert(text, kind) == value

@pytest.mark.parametrize('out, sentence', [
    ('caf\udce9', 'cannot be the name of a folder'),
    ('a\0b', 'cannot be the name of a folder'),
    ('x' * 300, 'File name too long'),
])
def test_folders_that_cannot_be(capsys, tmp_path, monkeypatch, out, sentence):
    monkeypatch.chdir(tmp_path)
    assert sentence in said('train', capsys, '--out', out)

# -- what papermill, Jupyter and other libraries make of it

PARAMETERS = """\
    seed: int = 0          # Filled into paths by papermill
    day: str = ''          # As text
    table: str = ''        # A file
    out: str = ''          # Folder
    """
CHECKS = "if seed < 0: raise ValueError(f'seed must be at least 0, got {seed}')"
TELL = """\
    import sys
    from cryptoml.state import write_json
    if table:
        import pandas as pd
        pd.read_csv(table)
    if day.startswith('20'):
        import pandas as pd
        pd.Timestamp(day)
    about = dict(python=sys.executable, prefix=sys.prefix, docs=bool(sys.__doc__ and write_json.__doc__))
    write_json(f'{out}/metrics.json', about | dict(day=day, out=out, table=table))
    """

@pytest.fixture
def tell(tmp_path): return notebook(tmp_path/'tell.ipynb', PARAMETERS, CHECKS, TELL)

def test_a_brace_is_a_brace_and_the_kernel_is_ours(tell, tmp_path, monkeypatch):
    "A folder named like a template, its neighbour, a kernel specification that names a Python that is gone, and -OO"
    for variable in ('JUPYTER_PATH', 'JUPYTER_DATA_DIR'):
        kernel = tmp_path/variable/'kernels'/'python3'
        kernel.mkdir(parents=True)
        spec = dict(argv=['/nonexistent/bin/python', '-m', 'ipykernel_launcher', '-f', '{connection_file}'],
                    display_name='Python 3', language='python')
        (kernel/'kernel.json').write_text(json.dumps(spec))
        monkeypatch.setenv(variable, str(tmp_path/variable))
    neighbour = tmp_path/'run_0 5% ü'
    neighbour.mkdir()
    (neighbour/'tell.ipynb').write_text('the notebook of another run')
    out = tmp_path/'run_{seed} 5% ü'
    day = '{seed} 100% {nothing} ü'
    monkeypatch.setenv('PYTHONOPTIMIZE', '2')                      # without docstrings LightGBM cannot be imported
    done = run(tell, out, day=day)
    assert done == dict(python=sys.executable, prefix=sys.prefix, docs=True, day=day, out=str(out), table='')
    assert (neighbour/'tell.ipynb').read_text() == 'the notebook of another run'
    assert {p.name for p in out.iterdir()} == {'LOCK', 'params.json', 'metrics.json', 'tell.ipynb'}
    assert {p.name for p in tmp_path.glob('run_*')} == {out.name, neighbour.name}

def test_refused_here_or_by_a_library_and_then_put_right(tell, tmp_path):
    out = tmp_path/'run'
    with pytest.raises(JobError, match='seed must be at least 0, got -1'): run(tell, out, seed=-1)
    assert not out.exists()
    with pytest.raises(JobError, match='2021-13-01'): run(tell, out, day='2021-13-01')         # pandas says it
    (tmp_path/'empty.csv').touch()
    with pytest.raises(JobError, match='No columns to parse'): run(tell, out, table=str(tmp_path/'empty.csv'))
    assert run(tell, out, day='2021-12-01')['day'] == '2021-12-01'

@pytest.mark.parametrize('name, users', [
    ('FileNotFoundError', True), ('OSError', True), ('PermissionError', True), ('UnicodeDecodeError', True),
    ('ParserError', True), ('ArrowInvalid', True), ('DateParseError', True), ('SettingError', True),
    ('KeyError', False), ('TypeError', False), ('AssertionError', False), ('RuntimeError', False), ('print', False),
])
def test_whose_mistake(name, users): assert runs._users(name, '') == users

def test_no_room_for_the_executed_notebook(tell, tmp_path, monkeypatch, capsys):
    def full(*args): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path/'tell.ipynb'))
    monkeypatch.setattr(runs, 'execute', full)
    assert jobs.main([str(tell), '--out', str(tmp_path/'run')]) == 2
    assert 'No space left on device; the same command continues' in capsys.readouterr().err

# -- the cell itself

@pytest.mark.parametrize('checks, kind, sentence', [
    ("raise OverflowError('too large')", JobError, '^too large$'),
    ("open('/nonexistent/file')", JobError, 'No such file'),
    ("print('loud'); symbols.sort(); seed.bit_length()", None, ''),
    ('nowhere', JobFailed, "tell.ipynb, cell tagged checks(.|\n)*name 'nowhere' is not defined"),
    ('if', JobFailed, 'invalid syntax'),
], ids=str)
def test_the_cell_of_checks(tmp_path, capsys, checks, kind, sentence):
    job = notebook(tmp_path/'tell.ipynb', "seed: int = 0\nsymbols: list[str] = ['B', 'A']\nout: str = ''", checks)
    if kind is None: assert check(job, {}) == dict(seed=0, symbols=['B', 'A'])    # not as the cell left them
    else:
        with pytest.raises(kind, match=sentence): check(job, {})
    assert not capsys.readouterr().out
