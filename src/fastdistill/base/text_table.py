"""Format a table as text."""

from collections.abc import Iterable, Sequence


def text_table(head: Sequence[str], rows: Iterable[Sequence]) -> str:
    """Format rows as lines of text with aligned columns."""
    rows = [[str(o) for o in r] for r in [head, *rows]]
    wide = [max(map(len, c)) for c in zip(*rows)]
    lines = ['  '.join(o.ljust(w) for o, w in zip(r, wide)).rstrip() for r in rows]
    return '\n'.join([lines[0], '-' * max(map(len, lines)), *lines[1:]])
