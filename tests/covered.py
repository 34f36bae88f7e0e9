"""What share of the exported code the tests run: the second half of `make coverage`

What counts is a line of cryptoml/*.py. The cells of a notebook are no exported code, and only what they import counts.
A kernel does not count: a function whose text is handed to numba runs as machine code, where no line can be seen. Which
those are is not listed here: everything that compiles is made to do so once, and each text that is asked for is noted.
Kernels are checked against second implementations, line by line of their formulas, in the file of their family."""
import ast, importlib, inspect, sys, textwrap
from collections import defaultdict
from pathlib import Path

root = Path(__file__).parents[1]
sys.path = [str(root), *(p for p in sys.path if Path(p or '.').resolve() != root/'tests')]   # not this file
LEAST = 90   # Percent of all
SHOWN = 90   # Percent of a module below which its missing lines are told

def lines_of(f):
    "File of a function, and its lines with those of its decorators"
    code = getattr(f, 'py_func', f).__code__
    text, first = inspect.getsourcelines(code)
    body = ast.parse(textwrap.dedent(''.join(text))).body[0].body
    return Path(code.co_filename), range(first + body[0].lineno - 1, first + len(text))

def kernels():
    "Lines of the functions that numba is given as text, by file"
    from cryptoml import compile as compiler
    asked = set()
    plain = compiler.text_of
    def noted(f):
        asked.add(f)
        return plain(f)
    compiler.text_of = noted
    for path in sorted((root/'cryptoml').glob('[!_]*.py')):
        if path.stem != 'docs': importlib.import_module(f'cryptoml.{path.stem}')
    compile_all()
    found = defaultdict(set)
    for f in asked:
        path, lines = lines_of(f)
        found[path] |= {*lines}
    return found

def compile_all():
    "Whatever compiles, once: steps of all families, accounts, trees, the lanes of an agent"
    import numpy as np
    from cryptoml import boosting, environment
    from cryptoml.backtest import backtest
    from cryptoml.features import AdvancedFeatureEngineer
    from cryptoml.simulate import simulate
    bars = simulate(n_symbols=2, n_bars=300).bars
    AdvancedFeatureEngineer().transform(bars)
    opens = bars.pivot(index='time', columns='symbol', values='open').to_numpy().T
    backtest(np.zeros(opens.shape), opens)
    for f in (boosting.compiled_descend, boosting.compiled_compare, environment._driven): f()

def main():
    from coverage import Coverage
    measured = Coverage(config_file=str(root/'tests'/'coveragerc'), data_file=str(root/'.coverage'))
    measured.load()             # pytest has put the files of all processes together
    compiled = kernels()
    rows = []
    for path in sorted((root/'cryptoml').glob('[!_]*.py')):
        _, statements, _, missing, _ = measured.analysis2(str(path))
        counted = {*statements} - compiled[path]
        rows.append((path.stem, counted, counted & {*missing}, len({*statements} & compiled[path])))
    for name, counted, missing, kernel in rows:
        share = 100 * (1 - len(missing) / max(len(counted), 1))
        apart = f', {kernel} of kernels apart' if kernel else ''
        told = f'  missing {spans(missing)}' if share < SHOWN else ''
        print(f'{name:16} {len(counted):5} lines {share:6.1f} %{apart}{told}')
    total = sum(len(counted) for _, counted, _, _ in rows)
    lost = sum(len(missing) for _, _, missing, _ in rows)
    share = 100 * (1 - lost / total)
    print(f'{"all":16} {total:5} lines {share:6.1f} %')
    return 0 if share >= LEAST else 1

def spans(lines):
    "Numbers as a reader wants them: 3-5, 9"
    parts = []
    for n in sorted(lines):
        if parts and n == parts[-1][1] + 1: parts[-1][1] = n
        else: parts.append([n, n])
    return ', '.join(f'{a}-{b}' if a < b else f'{a}' for a, b in parts)

if __name__ == '__main__': sys.exit(main())
