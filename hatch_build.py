"""Builds the wheel's copies of the sources: their docstrings explain the parameters.

Editors show the docstring of a function, but not the comments in its signature. At run time `fastdistill.base.parameter_docs` adds
these to the docstring; here they are added to the text. The comments in the sources are the only original."""
import ast, importlib.util, shutil, tempfile, textwrap
from pathlib import Path
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = 'src/fastdistill'


class DocstringsHook(BuildHookInterface):
    "Puts the explained copies into the wheel, in place of the sources"
    def initialize(self, version, build_data):
        if version == 'editable': return        # an editable install runs the sources themselves
        # `fastdistill methods` shows parts of them
        build_data['force_include'][str(Path(self.root)/'docs'/'methods')] = 'fastdistill/cards'
        self.folder = Path(tempfile.mkdtemp())
        source = Path(self.root)/PACKAGE
        docments = load(source/'docments.py')
        for path in sorted(source.rglob('*.py')):
            name,text = path.relative_to(source),path.read_text('utf-8')
            if (new := explained(text, docments)) == text: continue
            copy = self.folder/name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(new, 'utf-8')
            build_data['force_include'][str(copy)] = f'fastdistill/{name.as_posix()}'

    def finalize(self, version, build_data, artifact_path):
        if version != 'editable': shutil.rmtree(self.folder)


def load(path):
    "The module in a file, without the package around it"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def explained(
    text:str, # of a Python file
    docments # the module `fastdistill.base.parameter_docs`
) -> str:
    "The file with a section about the parameters in the docstrings of its functions and classes"
    tree,lines = ast.parse(text),text.encode().splitlines(keepends=True)
    for d in sorted(documented(tree), key=lambda d: -d.body[0].lineno):     # from the end, so that places stay right
        node = d.body[0].value
        new = docments.with_comments(node.value, comments_of(d, text.split('\n'), docments))
        if new == node.value: continue
        i,j = node.lineno-1,node.end_lineno-1
        before,after = lines[i][:node.col_offset],lines[j][node.end_col_offset:]
        lines[i:j+1] = [before + literal(new, d.col_offset+4).encode() + after]
    return b''.join(lines).decode()


def documented(tree):
    "Functions and classes that have a docstring"
    found = (ast.FunctionDef, ast.ClassDef)
    return [d for d in ast.walk(tree) if isinstance(d, found) and ast.get_docstring(d) is not None]


def comments_of(d, lines, docments):
    "Parameter -> comment, of a function; of a class, for the parameters of its `__init__`, or for its fields"
    if isinstance(d, ast.FunctionDef):
        a = d.args
        names = [o.arg for o in [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg] if o is not None]
        return docments.signature_comments(lines[d.lineno-1:], names)
    if any('dataclass' in ast.unparse(o) for o in d.decorator_list):
        fields = [o.target.id for o in d.body if isinstance(o, ast.AnnAssign)]
        return docments.body_comments(lines[d.lineno-1:], fields)
    init = [o for o in d.body if isinstance(o, ast.FunctionDef) and o.name == '__init__']
    return comments_of(init[0], lines, docments) if init else {}


def literal(text, indent):
    "A docstring as it stands in a file"
    text = text.replace('\\', '\\\\').replace('"""', r'\"\"\"')
    return '"""' + textwrap.indent(text, ' '*indent).lstrip() + '\n' + ' '*indent + '"""'
