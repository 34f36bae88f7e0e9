"""What a type checker says of the package: `make types`

mypy reads every exported module, the inside of each function that has an annotation. It is told that a value may always
be None (the package says in a sentence what is not there yet), and that a name may take another type in the next line.
What it then still says and cannot know stands in one table, with the reason; anything else is a fault. A row that
nothing needs any more is one too."""
import re, subprocess, sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.types
root = Path(__file__).parents[1]
OPTIONS = ['--exclude', r'cryptoml/(docs|reference|_modidx)\.py', '--no-strict-optional', '--allow-redefinition',
           '--local-partial-types', '--ignore-missing-imports', '--disable-error-code',
           'var-annotated', '--no-error-summary']

KNOWN = {
    r'Too many arguments for|gets multiple values for keyword':
        'f(*items, last): mypy takes *items for all the parameters there are',
    r'"\*\*dict\[|after \*\* must be a mapping|\*\* expansion in TypedDict':
        'f(**settings): a dict of unlike values is taken for one in which every value may be anything',
    r'\bobject\]?"(?! has no)|Any \| dict\[Any, Any\]"; expected "str \| Buffer':
        'unlike items of a literal, in a line that knows which is which, are joined to object',
    r'"tuple\[[^"]*, \.\.\.\]"|[Ll]ist\[tuple\[|\*Generator|"Size"; expected':
        'tuple(... for ...) has the length of what it runs over, which mypy forgets',
    r'expected "Buffer"': 'arrays are buffers',
    r'ndarray\[|signedinteger|numpy\.bool|_ScalarT|Generator has incompatible item type "int"':
        "numpy's stubs: a number of an array is not int or float, a shape may be lost",
    r'Literal\[0\]\]?"|"float \| Any"; expected "Tensor"': 'sum() begins with 0',
    r'Tensor \| Module|Tensor" not callable|[^.]Module[";)]|Module object': 'an attribute of nn.Module is any module',
    r'has type "None"|"None" has no attribute|Value of type "None"': 'an attribute is None until it is there',
    r'Cannot determine type of': 'a class or a comprehension that asks itself',
    r'base class "tuple" defined the type': 'a NamedTuple with a field called count',
    r'"add" of "set" does not return': 'and: the second part is done for what it does',
    r'"BaseDistribution" has no|expected "Literal\[\'minimize\'': "optuna's names for kinds that we know",
    r'"(expr|mod)" has no attribute|"expr \| None"': 'the tree of a line whose kind was asked before',
    r'left operand|operand types for / \("str"': 'a text that became a length of time in the line above',
    r'"dict\[Any, Any\]"; expected "Prediction"|Prediction"; expected "dict\[|\| Prediction", expected "dict\[':
        'a TypedDict is a dict, for Python',
}

@pytest.fixture(scope='module')
def said():
    "Lines of errors"
    pytest.importorskip('mypy', reason='make types installs mypy')
    command = [sys.executable, '-m', 'mypy', *OPTIONS, 'cryptoml']
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if ' error: ' in line]

def test_the_checker_finds_a_fault(tmp_path):
    "A wrong type, a name that is not there, a return that is missing: the options do not hide them"
    path = tmp_path/'wrong.py'
    path.write_text('def f(x: int) -> str:\n    if x: return x\n    return "".lowr()\nf("a", y=1)\n')
    done = subprocess.run([sys.executable, '-m', 'mypy', *OPTIONS, path], capture_output=True, text=True)
    for kind in ('return-value', 'attr-defined', 'call-arg'): assert f'[{kind}]' in done.stdout, done.stdout

def test_nothing_but_what_is_known(said):
    unknown = [line for line in said if not any(re.search(k, line) for k in KNOWN)]
    assert not unknown, '\n'.join([f'{len(unknown)} faults:', *unknown])

def test_no_row_is_idle(said):
    idle = [k for k in KNOWN if not any(re.search(k, line) for line in said)]
    assert not idle

def test_public_parameters_are_named_with_their_default():
    "A default of None is said in the type: what a caller's checker reads"
    wrong = []
    for path in sorted((root/'cryptoml').glob('[!_]*.py')):
        for i, line in enumerate(path.read_text().splitlines(), 1):
            if re.match(r'\s+\w+: (str|int|float|bool|list|dict|tuple|np\.ndarray) = None,', line):
                wrong.append(f'{path.name}:{i}: {line.strip()}')
    assert not wrong, wrong
