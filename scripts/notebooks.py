"""Make a notebook of each example, run it, and store it with its outputs in out/notebooks.

python scripts/notebooks.py                 # all; a minute or two each
python scripts/notebooks.py image_classes   # only this one
python scripts/notebooks.py --no-run        # without outputs, to open and run yourself
"""

import argparse
import ast
import re
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / 'examples'
NOTEBOOKS = ROOT / 'out' / 'notebooks'
SECONDS = 1800  # for a cell, also where other programs run


def cells(text, title):
    """A script as cells: its docstring as text, the imports, each function or class, and the body of
    `main` at the top level, so that its variables can be looked at."""
    tree, lines = ast.parse(text), text.splitlines()
    yield new_markdown_cell(f'# {title}\n\n{ast.get_docstring(tree)}')
    block = []
    for node in tree.body[1:]:
        first = min([node.lineno, *(o.lineno for o in getattr(node, 'decorator_list', []))])
        source = '\n'.join(lines[first - 1 : node.end_lineno])
        if isinstance(node, ast.If):  # if __name__ == '__main__'
            continue
        if isinstance(node, ast.FunctionDef) and node.name == 'main':
            if block:
                yield new_code_cell('\n'.join(block))
                block = []
            last = node.body[-1]
            end = last.lineno - 1 if isinstance(last, ast.Return) else node.end_lineno
            body = lines[node.body[0].lineno - 1 : end]
            body = [re.sub('^    ', '', line) for line in body]
            yield new_code_cell('\n'.join(['quick, seed = False, 42', *body]))
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if block:
                yield new_code_cell('\n'.join(block))
                block = []
            yield new_code_cell(source)
        else:
            block.append(source)


def notebook(script):
    made = new_notebook(
        cells=[*cells(script.read_text(), script.stem.replace('_', ' ').capitalize())]
    )
    for i, cell in enumerate(made.cells):
        cell.id = f'{script.stem}-{i}'  # the same each time
    made.metadata.kernelspec = dict(name='python3', display_name='Python 3', language='python')
    return made


def run(made):
    from nbclient import NotebookClient

    NotebookClient(made, timeout=SECONDS, kernel_name='python3').execute()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*', help='of examples, without .py; default: all')
    parser.add_argument('--no-run', action='store_true')
    args = parser.parse_args()
    NOTEBOOKS.mkdir(parents=True, exist_ok=True)
    for script in sorted(EXAMPLES.glob('*.py')):
        if args.names and script.stem not in args.names:
            continue
        made = notebook(script)
        if not args.no_run:
            run(made)
        path = NOTEBOOKS / f'{script.stem}.ipynb'
        nbformat.write(made, path)
        print(path.relative_to(ROOT), flush=True)


if __name__ == '__main__':
    main()
