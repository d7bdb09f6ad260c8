"""Each parameter is explained by a comment, behind it or on the lines before it.

Here these comments become part of the docstring, so that `help()` shows them. `hatch_build.py` does
the same in the wheel's copies of the files, for the tooltips of editors, which read the source.
"""
import inspect, linecache, re
from itertools import takewhile

__all__ = ['explain', 'explain_all', 'parameter_comments', 'signature_comments', 'with_comments']


def explain_all(
    module
):
    """`explain` every public name of a module.

    Args:
        module: Whose `__all__` names functions and classes.
    """
    for n in module.__all__: explain(getattr(module, n))


def explain(o):
    """Append the comments on the parameters of a function or class to its docstring; a second call
    changes nothing.
    """
    fn = o if inspect.isroutine(o) else None
    if isinstance(o, type): fn = getattr(o, 'fn', None) or vars(o).get('__init__')
    fields = isinstance(o, type) and hasattr(o, '__dataclass_fields__')
    if o.__doc__ is None or (fn is None and not fields): return o
    o.__doc__ = with_comments(o.__doc__, field_comments(o) if fields else parameter_comments(fn))
    return o


HEAD = 'Args:'

def with_comments(
    doc:str,
    comments:dict
) -> str:
    """The docstring with a section about the parameters, unless it has one or there is nothing to
    say.

    Args:
        doc: A docstring.
        comments: Parameter -> its comment.
    """
    if not comments or HEAD in doc: return doc
    return inspect.cleandoc(doc) + '\n\n' + HEAD + ''.join(f'\n    {k}: {v}' for k,v in comments.items())


def parameter_comments(fn) -> dict:
    """Parameter -> its comment, for a function whose parameters stand on lines of their own."""
    code = getattr(inspect.unwrap(fn), '__code__', None)
    if code is None: return {}
    lines = linecache.getlines(code.co_filename)[code.co_firstlineno-1:]
    return signature_comments(lines, code.co_varnames[:code.co_argcount+code.co_kwonlyargcount+2])


def signature_comments(
    lines,
    names
) -> dict:
    """`parameter_comments`, from the text alone.

    Args:
        lines: Of a file, from a function (or its decorators) on.
        names: Of its parameters.
    """
    start = next((i for i,l in enumerate(lines) if re.match(r'\s*def ', l)), None)      # decorators come before it
    if start is None or not lines[start].rstrip().endswith('('): return {}
    return comments(takewhile(lambda l: not re.match(r'\s*\)', l), lines[start+1:]), names)


def field_comments(cls) -> dict:
    """The same for the fields of a dataclass."""
    lines = linecache.getlines(inspect.getsourcefile(cls) or '')
    start = next((i for i,l in enumerate(lines) if re.match(rf'class {cls.__name__}\b', l)), len(lines))
    return body_comments(lines[start:], list(cls.__dataclass_fields__))


def body_comments(
    lines,
    names
) -> dict:
    """`field_comments`, from the text alone.

    Args:
        lines: Of a file, from a class on.
        names: Of its fields.
    """
    return comments(takewhile(lambda l: not re.match(r'\s*(def |@)|\S', l), lines[1:]), names)


def comments(lines, names):
    """Name -> comment. A line has one or more names and then a comment, which may continue in lines
    of its own.

    Before a name without a comment, such lines belong to that name, as in fastcore's docments.
    """
    said,last,own = {},None,[]      # `own`: comments in lines of their own since the last name
    def add(name, *texts): said[name] = ' '.join(filter(None, [said.get(name), *texts]))
    for l in lines:
        code,_,comment = l.strip().partition('# ')
        if not code: own.append(comment)
        found = ', '.join(n for n in names if re.search(rf'(?<![\w.\'"]){n}\s*(?=[:=,]|$)', code))
        if not found: continue
        if comment and last: add(last, *own)
        add(found, *([] if comment and last else own), comment)
        last,own = found,[]
    if last: add(last, *own)
    return {k: v for k,v in said.items() if v}
