"The house: who may import whom, which names are public, how long a file may be."
import ast, importlib, re, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
SRC = ROOT/'src'/'fastdistill'
FILES = sorted(SRC.rglob('*.py'))
FACES = ['fastdistill', 'fastdistill.losses', 'fastdistill.fastai']

# room: which rooms it may import, all of them further up; which packages at the top of its files, and which only inside functions
LAW = dict(
    outputs=('', 'torch', ''),
    schedule=('outputs', '', ''),
    losses=('outputs', 'torch', ''),
    taps=('outputs', 'torch numpy', ''),
    projectors=('outputs taps', 'torch', ''),
    generators=('', 'torch numpy', ''),
    replay=('outputs generators', 'torch numpy', ''),
    cache=('outputs generators replay', 'torch numpy', 'fsspec fcntl msvcrt'),
    forms=('outputs', 'torch', 'onnxruntime'),
    pairs=('outputs taps projectors', 'torch', ''),
    plots=('outputs taps pairs', 'torch', 'matplotlib'),
    teacher=('outputs taps forms', 'torch', ''),
    distiller=('outputs schedule taps projectors pairs teacher', 'torch', ''),
    recipes=('outputs schedule losses distiller', 'torch', ''),
    __init__=('outputs schedule losses taps teacher distiller recipes cache', '', ''),
    fastai=('outputs losses taps plots generators replay cache teacher distiller recipes', 'torch numpy fastai', 'pandas'),
    demo=('outputs fastai', 'torch numpy fastai rich PIL', 'matplotlib sklearn'),
    cache_cli=('outputs cache fastai', 'torch typer rich', ''),
    cli=('outputs demo cache_cli __init__', 'typer rich', ''),
)


def room_of(file):
    part = file.relative_to(SRC).parts[0]
    return part.removesuffix('.py')


def imports(file):
    "(level, module, names, whether inside a function) of each import"
    tree = ast.parse(file.read_text())
    inner = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.Lambda)) for n in ast.walk(f)}
    for n in ast.walk(tree):
        if isinstance(n, ast.Import): yield from ((0, a.name, [], id(n) in inner) for a in n.names)
        if isinstance(n, ast.ImportFrom): yield n.level, n.module or '', [a.name for a in n.names], id(n) in inner


def rooms(file, level, module, names):
    "Which rooms a relative import enters"
    at = ['fastdistill', *file.relative_to(SRC).parts][:-level]
    path = [*at, *module.split('.')] if module else at
    if len(path) > 1: return [path[1]]
    return [o if (SRC/o).is_dir() or (SRC/f'{o}.py').exists() else '__init__' for o in names]


def test_the_law_has_no_circle():
    for i,(room,(may,*_)) in enumerate(LAW.items()): assert set(may.split()) <= set([*LAW][:i]) | {'__init__'}, room
    assert {room_of(f) for f in FILES} <= set(LAW), 'a new room needs a line in LAW'


@pytest.mark.parametrize('file', FILES, ids=lambda f: str(f.relative_to(SRC)))
def test_imports_keep_to_the_law(file):
    room = room_of(file)
    may,top,inside = (set(o.split()) for o in LAW[room])
    for level,module,names,inner in imports(file):
        if level: new = set(rooms(file, level, module, names)) - {room} - may
        else: new = {module.split('.')[0]} - set(sys.stdlib_module_names) - top - (inside if inner else set())
        assert not new, f"{room} may not import {', '.join(new)} {'inside a function' if inner else 'at the top'} (from {module or '.'})"
        assert '*' not in names or file.name == '__init__.py', f'import * from {module}: name what you import'


def test_import_fastdistill_brings_no_framework():
    code = "import fastdistill, sys; print(*{m.split('.')[0] for m in sys.modules} & {'fastai', 'matplotlib', 'timm', 'transformers', 'pandas', 'sklearn', 'PIL', 'rich', 'typer'})"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == ''


@pytest.mark.parametrize('file', FILES, ids=lambda f: str(f.relative_to(SRC)))
def test_a_file_is_short_and_catches_nothing_unnamed(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 400, 'split it by its own nouns'
    assert not [n.lineno for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ExceptHandler) and n.type is None]


def public():
    "module.name of all that users may rely on"
    return [f'{m}.{n}' for m in FACES for n in sorted(importlib.import_module(m).__all__)]


def test_public_names_are_decided():
    assert public() == (ROOT/'tests'/'api.txt').read_text().split(), 'decide, then write them anew: make api'


@pytest.mark.parametrize('face', FACES)
def test_public_names_exist_once_and_are_explained(face):
    m = importlib.import_module(face)
    assert len(set(m.__all__)) == len(m.__all__)
    for n in m.__all__: assert getattr(m, n).__doc__, f'{face}.{n} has no docstring'


def tracked():
    out = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True)
    if out.returncode: pytest.skip('no repository')
    return [ROOT/o for o in out.stdout.split('\0') if o and (ROOT/o).is_file()]


def test_no_path_of_one_machine():
    path = re.compile(r'(?<![\w.$~])/(home|root|work|opt|Users|mnt)/\w|\.\./(?=shared)')
    for f in tracked():
        if 'benchmarks' in f.parts or f.suffix in ('.png', '.safetensors', '.json'): continue
        assert not (found := path.search(f.read_text())), f'{f.relative_to(ROOT)}: {found}'


if __name__ == '__main__': print(*public(), sep='\n')
