"""The pages of the guide say what the package does: every message on one page, every module in one drawing"""
import ast, functools, importlib, json, re
from pathlib import Path
import yaml

root = Path(__file__).parents[1]
guide = root/'nbs'/'guide'
modules = {p.stem: p for p in sorted((root/'cryptoml').glob('*.py')) if not p.stem.startswith('_')}

def markdown(page):
    "The text of a page"
    cells = json.loads((guide/f'{page}.ipynb').read_text(encoding='utf-8'))['cells']
    return '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')

# What is said, collected from the code: of a sentence the fixed words, with … for what varies

class Sentences(ast.NodeVisitor):
    "The sentences that one module raises or warns with"
    def __init__(self, tree):
        self.functions = {f.name: f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)}
        self.found, self.within = set(), [tree]
        self.visit(tree)

    def visit_FunctionDef(self, node):
        self.within.append(node)
        self.generic_visit(node)
        self.within.pop()

    def visit_Raise(self, node):
        call = node.exc
        if isinstance(call, ast.Call):
            name = ast.unparse(call.func).removeprefix('self.')
            if name in self.functions: self.found |= set(self.returned(name, 0))          # raise _missing(e)
            for given in call.args: self.found |= {*self.said(given), *self.parts(given)}
        self.generic_visit(node)

    def visit_Call(self, node):
        name = ast.unparse(node.func)
        if name in ('warnings.warn', 'warn', 'self.warn') and node.args: self.found |= set(self.said(node.args[0]))
        if name in ('check_columns', 'refuse_early', 'log.warning'):
            self.found |= {s for a in [*node.args, *(k.value for k in node.keywords)] for s in self.said(a) if ' ' in s}
        self.generic_visit(node)

    def said(self, node, deep=0):
        "The sentences that an expression may give"
        if deep > 6: return ['…']
        if isinstance(node, ast.Constant): return [node.value] if isinstance(node.value, str) else ['…']
        if isinstance(node, ast.JoinedStr):
            return [''.join(v.value if isinstance(v, ast.Constant) else '…' for v in node.values)]
        if isinstance(node, ast.IfExp): return self.said(node.body, deep + 1) + self.said(node.orelse, deep + 1)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return [a + b for a in self.said(node.left, deep + 1) for b in self.said(node.right, deep + 1)]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).removeprefix('self.')
            if name in self.functions: return self.returned(name, deep + 1)
            if getattr(node.func, 'attr', '') == 'format': return self.said(node.func.value, deep)
            if any(isinstance(a, ast.JoinedStr) for a in node.args):
                return [s for a in node.args for s in self.said(a, deep + 1)]
        if isinstance(node, ast.Name): return self.bound(node.id, deep + 1) or ['…']
        return ['…']

    def returned(self, name, deep):
        self.within.append(self.functions[name])
        found = [s for r in ast.walk(self.functions[name]) if isinstance(r, ast.Return) and r.value
                 for s in self.said(r.value, deep)]
        self.within.pop()
        return found

    def bound(self, name, deep):
        "What a name stands for in the function around it"
        found = []
        for n in ast.walk(self.within[-1]):
            if isinstance(n, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in n.targets):
                found += self.said(n.value, deep)
            if isinstance(n, ast.NamedExpr) and n.target.id == name: found += self.said(n.value, deep)
            if isinstance(n, (ast.For, ast.comprehension)):
                if name in [t.id for t in ast.walk(n.target) if isinstance(t, ast.Name)]: found += self.listed(n.iter)
        return found

    def listed(self, node):
        "The sentences of a list, wherever it was made"
        if isinstance(node, ast.Name):
            found = []
            for n in ast.walk(self.within[-1]):
                if isinstance(n, ast.Assign) and any(getattr(t, 'id', None) == node.id for t in n.targets):
                    found += self.listed(n.value) if not isinstance(n.value, ast.Name) else []
                if isinstance(n, ast.AugAssign) and getattr(n.target, 'id', None) == node.id:
                    found += self.listed(n.value)
                if isinstance(n, ast.Call) and ast.unparse(n.func) == f'{node.id}.append':
                    found += self.listed(n.args[0])
            return found
        nodes = list(ast.walk(node))
        inside = {v for j in nodes if isinstance(j, ast.JoinedStr) for v in j.values}
        texts = [n for n in nodes if isinstance(n, (ast.Constant, ast.JoinedStr)) and n not in inside]
        return [s for n in texts for s in self.said(n) if ' ' in s.strip()]

    def parts(self, node):
        "Sentences that are joined into another one"
        return [s for n in ast.walk(node) if isinstance(n, ast.Call) and getattr(n.func, 'attr', '') == 'join'
                for a in n.args for s in self.listed(a)]

# What is told and raises nothing: why a bar is left out, why a signal is HOLD, why a verdict cannot pass

TELL = dict(
    ledger=['read_ledger'],
    monitor=['_alarms_of', '_spell_said', '_shadow_report'],
    newest=['bar_faults', 'window_faults', 'masked', 'others_masked', 'unit_faults', 'examine'],
    signals=['clock_says', 'doubts_of_bar', 'doubts_of_forecast', 'doubts', 'unsure', 'make_signal', 'others_in_words',
             'against_in_words'],
    state=['_broken', '_witnessed'],
    study=['left_out'],
)

def told(tree, names):
    "The sentences of functions that give reasons"
    parts = Sentences(tree)
    for name in names:
        body = parts.functions[name].body
        if isinstance(body[0], ast.Expr): body = body[1:]                                        # its docstring
        nodes = [n for line in body for n in ast.walk(line)]
        inside = {v for j in nodes if isinstance(j, ast.JoinedStr) for v in j.values}
        for n in nodes:
            if isinstance(n, (ast.JoinedStr, ast.Constant)) and n not in inside:
                yield from (s for s in parts.said(n) if ' ' in s.strip())

ACTIONS = {'dropped', 'kept', 'sorted', 'snapped', 'masked', 'cut', 'joined'}

def defects(tree):
    "What a bar is called that is left out, or noticed"
    for n in ast.walk(tree):
        given = []
        if isinstance(n, ast.Yield) and isinstance(n.value, ast.Tuple): given = n.value.elts
        if isinstance(n, ast.Call) and ast.unparse(n.func) in ('rows_with', '_Finding', 'note'): given = n.args
        texts = {e.value for e in getattr(n, 'elts', []) if isinstance(e, ast.Constant)}
        if isinstance(n, ast.Tuple) and ACTIONS & texts: given = n.elts
        if len(given) > 2 and isinstance(given[0], ast.Constant): yield given[0].value

def fixed(sentence):
    "A sentence with … for each thing that varies, whoever fills it in"
    return ' '.join(re.sub(r'%[sd]|\{\w+(:[^}]*)?\}', '…', sentence).split())

@functools.cache
def collected():
    "Every sentence with two fixed words or more -> the modules that say it"
    found = {}
    for module, path in modules.items():
        tree = ast.parse(path.read_text(encoding='utf-8'))
        for s in {*Sentences(tree).found, *told(tree, TELL.get(module, []))}:
            if len(re.findall('[a-zA-Z]{2,}', fixed(s))) > 1: found.setdefault(fixed(s), []).append(module)
    return found

def words():
    "The single words that stand for a reason: of HOLD, and of a bar"
    from cryptoml.signals import HELD
    trees = [ast.parse(modules[name].read_text(encoding='utf-8')) for name in ('clean', 'panel')]
    return {*HELD, *(word for tree in trees for word in defects(tree))}

def messages_on_the_page():
    "The first lines of each entry: its messages, without the explanation"
    text = markdown('troubleshooting')
    listed = text[text.index('## A signal is HOLD'):]
    said = re.findall(r'^(?:- |  |  - )(?=`)(?:`` (.+?) ``|`([^`]+)`)\\?$', listed, re.M)
    return {fixed(a or b) for a, b in said}

def test_every_message_is_explained():
    here, single = messages_on_the_page(), words()
    told = [f'{", ".join(where)}: {s}' for s, where in collected().items() if s not in here | single]
    told += [f'a word: {w}' for w in sorted(single - here)]
    assert not told, f'guide/troubleshooting does not explain {len(told)} messages: {told[:20]}'

def test_no_message_is_explained_that_nobody_says():
    stale = messages_on_the_page() - set(collected()) - words()
    assert not stale, f'guide/troubleshooting explains what the code does not say (any more): {sorted(stale)[:20]}'

def test_messages_are_collected_wherever_they_are_made():
    "The collector finds what is built at the raise, before it, in a loop, in a list and in a function of its own"
    code = """
def told(n): return f'{n} bars are too few'
def check(a, b):
    faults = []
    if a: faults.append(f'no column {a} at all')
    if faults: raise ValueError('; '.join(faults))
    rules = [(a > 0, f'a must rise, got {a}')]
    for holds, sentence in rules:
        if not holds: raise ValueError(sentence)
    what = f'nothing is in {b}' if b else 'give one of them'
    if b: raise DataError(what + ': look again')
    raise DataError(told(a))
"""
    assert {fixed(s) for s in Sentences(ast.parse(code)).found} >= {
        'no column … at all', 'a must rise, got …', '… bars are too few',
        'nothing is in …: look again', 'give one of them: look again'}

# ---- the drawing

def written(name):
    "What a cell of the page of the architecture gives a name"
    cells = json.loads((guide/'architecture.ipynb').read_text(encoding='utf-8'))['cells']
    for c in cells:
        if c['cell_type'] != 'code': continue
        for n in ast.parse(''.join(c['source'])).body:
            if isinstance(n, ast.Assign) and n.targets[0].id == name: return n.value
    raise AssertionError(f'guide/architecture gives no {name}')

def drawn():
    "Module -> its room, and room -> the rooms that it uses"
    rooms = rooms_of_the_house()
    pages = sorted((root/'nbs').glob('[0-9]*.ipynb'))
    return {p.stem[4:]: rooms[int(p.stem[0])] for p in pages}, ast.literal_eval(written('ARROWS'))

def rooms_of_the_house(): return ast.literal_eval(written('ROOMS').func.value).split()

def imported(module):
    tree = ast.parse(modules[module].read_text(encoding='utf-8'))
    return {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module}

def test_the_sidebar_shows_the_rooms():
    "Room by room, each in the order of its numbers"
    sections = yaml.safe_load((root/'_quarto.yml').read_text())['website']['sidebar']['contents'][-9:]
    numbered = [[n for n in s['contents'] if n[0].isdigit()] for s in sections]
    assert [s['section'].lower() for s in sections] == rooms_of_the_house()
    assert numbered == [sorted(p.name for p in (root/'nbs').glob(f'{i}*.ipynb')) for i in range(9)]

def test_the_arrows_are_the_imports():
    room, arrows = drawn()
    def reached(a): return {x for b in arrows.get(a, []) for x in {b} | reached(b)}
    uses = {(room[m], room[other], f'{m} imports {other}') for m in modules for other in imported(m)}
    undrawn = [how for a, b, how in sorted(uses) if a != b and b not in reached(a)]
    assert not undrawn, f'no arrow stands for {undrawn}'
    unused = [(a, b) for a in arrows for b in arrows[a] if not any((a, b) == u[:2] for u in uses)]
    implied = [(a, b) for a in arrows for b in arrows[a] if any(b in reached(c) for c in arrows[a] if c != b)]
    assert not unused and not implied, f'arrows without an import: {unused}; arrows that follow from others: {implied}'
    assert not any(a in reached(a) for a in arrows), 'the rooms go round in a circle'

def test_every_function_on_the_way_exists():
    "What the page of the architecture calls module.function"
    named = set(re.findall(r'`((?:%s)\.(?!json)\w+(?:\.\w+)?)`' % '|'.join(modules), markdown('architecture')))
    assert len(named) > 30
    for name in sorted(named):
        module, *path = name.split('.')
        found = importlib.import_module(f'cryptoml.{module}')
        for part in path: found = getattr(found, part, None)
        assert found is not None, f'guide/architecture names {name}, which is not there'
