"""Print the source tree: each package and module with the first sentence of its docstring.

python scripts/source_tree.py            # all packages
python scripts/source_tree.py teachers   # one of them
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1] / 'src' / 'fastdistill'


def first_sentence(file: Path) -> str:
    """Return the first sentence of a module's docstring, on one line."""
    doc = ast.get_docstring(ast.parse(file.read_text(encoding='utf-8'))) or ''
    return re.split(r'(?<=\.)\s', ' '.join(doc.split()), maxsplit=1)[0]


def source_tree(package: str = '') -> list[tuple[str, str]]:
    """Return (path, first sentence) of each module, packages before their modules.

    Args:
        package: Name of a package, such as 'teachers'. Empty for all.
    """
    files = sorted(ROOT.joinpath(package).rglob('*.py'), key=lambda f: (f.parent, f.name))
    named = [f.parent if f.name == '__init__.py' else f for f in files]
    return [(f'{n.relative_to(ROOT.parent)}', first_sentence(f)) for n, f in zip(named, files)]


if __name__ == '__main__':
    for path, text in source_tree(*sys.argv[1:]):
        print(f'{path:52} {text}')
