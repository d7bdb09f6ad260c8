"""Each parameter is explained by a comment behind it.

Here these comments become part of the docstring, so that `help()` and tooltips of editors show them."""
import inspect, linecache, re
from itertools import takewhile

__all__ = ['explain', 'explain_all', 'parameter_comments']


def explain_all(
    module # whose `__all__` names functions and classes
):
    "`explain` every public name of a module"
    for n in module.__all__: explain(getattr(module, n))


def explain(o):
    "Append the comments on the parameters of a function or class to its docstring; a second call changes nothing"
    fn = o if inspect.isroutine(o) else None
    if isinstance(o, type): fn = getattr(o, 'fn', None) or vars(o).get('__init__')
    fields = isinstance(o, type) and hasattr(o, '__dataclass_fields__')
    if o.__doc__ is None or HEAD in o.__doc__ or (fn is None and not fields): return o
    said = field_comments(o) if fields else parameter_comments(fn)
    if said:
        o.__doc__ = inspect.cleandoc(o.__doc__) + '\n\n' + HEAD + ''.join(f'\n    {k}: {v}' for k,v in said.items())
    return o


HEAD = 'Args:'


def parameter_comments(fn) -> dict:
    "Parameter -> the comment behind it, for a function whose parameters stand on lines of their own"
    fn = inspect.unwrap(fn)
    code = getattr(fn, '__code__', None)
    if code is None: return {}
    lines = linecache.getlines(code.co_filename)[code.co_firstlineno-1:]
    start = next((i for i,l in enumerate(lines) if re.match(r'\s*def ', l)), None)      # decorators come before it
    if start is None or not lines[start].rstrip().endswith('('): return {}
    signature = takewhile(lambda l: not re.match(r'\s*\)', l), lines[start+1:])
    return comments(signature, code.co_varnames[:code.co_argcount+code.co_kwonlyargcount+2])


def field_comments(cls) -> dict:
    "The same for the fields of a dataclass"
    lines = linecache.getlines(inspect.getsourcefile(cls) or '')
    start = next((i for i,l in enumerate(lines) if re.match(rf'class {cls.__name__}\b', l)), len(lines))
    body = []
    for l in lines[start+1:]:
        if re.match(r'\s*(def |@)|\S', l): break
        body.append(l)
    return comments(body, list(cls.__dataclass_fields__))


def comments(lines, names):
    "Name -> comment, of lines with one or more names and then a comment. A comment may continue in lines of its own"
    said,last = {},None
    for l in lines:
        code,_,comment = l.strip().partition('# ')
        found = [n for n in names if re.search(rf'(?<![\w.\'"]){n}\s*(?=[:=,]|$)', code)]
        if found: last = ', '.join(found)
        if comment and last: said[last] = f'{said[last]} {comment}' if last in said else comment
    return said
