"The wheel's copies of the files: their docstrings explain parameters as `help()` does, and nothing else differs."
import ast, importlib, inspect, subprocess, sys, tarfile, zipfile
from pathlib import Path
import pytest
from fastcore.docments import docments as fastcores
import apps # noqa: F401 (before the rest of fastai: it keeps its warnings quiet)
from fastai.basics import Learner
import fastdistill.fastai # noqa: F401
from fastdistill import docments

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT/'src'/'fastdistill').rglob('*.py'))
sys.path.insert(0, str(ROOT))
from hatch_build import explained # noqa: E402
sys.path.remove(str(ROOT))

FACES = ['fastdistill', 'fastdistill.losses', 'fastdistill.recipes', 'fastdistill.fastai']
PUBLIC = {f'{m}.{n}': getattr(importlib.import_module(m), n) for m in FACES for n in importlib.import_module(m).__all__}
METHODS = {f'Learner.{n}': getattr(Learner, n) for n in ('distill', 'check_teacher', 'explain', 'show_features')}


def bare(text):
    "A file as a tree without docstrings"
    tree = ast.parse(text)
    for d in ast.walk(tree):
        if isinstance(d, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(d) is not None: d.body[0].value.value = ''
    return ast.dump(tree)


def written(o):
    "The docstring of a function or class in the wheel's copy of its file; None if a loss takes its function's"
    fn = inspect.unwrap(o)
    tree = ast.parse(explained(Path(inspect.getsourcefile(fn)).read_text(), docments))
    return ast.get_docstring(next(d for d in ast.walk(tree) if getattr(d, 'name', None) == fn.__name__))


@pytest.mark.parametrize('file', FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_the_code_of_a_file_is_the_same(file):
    text = file.read_text()
    new = explained(text, docments)
    assert bare(new) == bare(text) and explained(new, docments) == new


@pytest.mark.parametrize('name', [n for n,o in (PUBLIC | METHODS).items() if inspect.isroutine(o)])
def test_a_public_function_explains_its_parameters_in_the_file(name):
    o = (PUBLIC | METHODS)[name]
    doc = written(o)
    assert doc == inspect.getdoc(o)
    _,_,args = doc.partition('Args:\n')
    for p,said in fastcores(inspect.unwrap(o)).items():
        if said and p != 'return': assert p in args and said.split()[0] in args


@pytest.mark.parametrize('name', [n for n,o in PUBLIC.items() if isinstance(o, type)])
def test_a_public_class_explains_what_it_is_made_with_in_the_file(name):
    o = PUBLIC[name]
    doc = written(o)
    assert doc == inspect.getdoc(o) or doc is None and issubclass(o, fastdistill.losses.KL.__base__)


def test_quotes_other_letters_and_several_definitions_on_one_place_survive():
    text = '''def f(
    x, # a "\\\\d" of """three""", π
    # the y, with its \\n
    y=1
): r"Adds \\d 'é'"


class A:
    "Holds"
    def __init__(
        self, # no one
        z=2 # the z
    ):
        "Made"; self.z = z

    def g(self): "One line"; return self.z

@dataclass
class B:
    """Data

    of one"""
    u:int # the u
    v:int=1
    # after it
    def h(self): pass
'''
    new = explained(text, docments)
    assert bare(new) == bare(text) and new.count('\n') > text.count('\n')
    f,a,b = ast.parse(new).body
    assert ast.get_docstring(f) == 'Adds \\d \'é\'\n\nArgs:\n    x: a "\\\\d" of """three""", π\n    y: the y, with its \\n'
    assert ast.get_docstring(a) == 'Holds\n\nArgs:\n    self: no one\n    z: the z'
    assert ast.get_docstring(a.body[1]) == 'Made\n\nArgs:\n    self: no one\n    z: the z'
    assert ast.get_docstring(b) == 'Data\n\nof one\n\nArgs:\n    u: the u\n    v: after it'


def test_the_wheel_that_is_built_from_the_sdist_holds_these_files(tmp_path):
    build = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', tmp_path, ROOT], capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    sdist,wheel = tarfile.open(next(tmp_path.glob('*.tar.gz'))),zipfile.ZipFile(next(tmp_path.glob('*.whl')))
    outside = {n.partition('/')[2] for n in sdist.getnames()} - {n for n in map(str.__str__, wheel.namelist())}
    outside = {n for n in outside if not n.startswith(('src/', 'docs/methods/'))}
    cards = {p.name: p.read_text() for p in (ROOT/'docs'/'methods').glob('*.md')}
    assert cards == {n.rpartition('/')[2]: wheel.read(n).decode() for n in wheel.namelist() if n.startswith('fastdistill/cards/')}
    assert outside - {'.gitignore'} == {'CHANGELOG.md', 'LICENSE', 'PKG-INFO', 'README.md', 'hatch_build.py', 'pyproject.toml'}
    names = [n for n in wheel.namelist() if n.endswith('.py')]
    assert sorted(names) == sorted(f'fastdistill/{f.relative_to(ROOT/"src"/"fastdistill").as_posix()}' for f in FILES)
    for f in FILES:
        assert wheel.read(f'fastdistill/{f.relative_to(ROOT/"src"/"fastdistill").as_posix()}').decode() == explained(f.read_text(), docments)
