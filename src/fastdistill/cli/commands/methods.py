"`fastdistill methods`: list the losses and recipes, or show the details of one of them."

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

from ...base.errors import DistillError

# headings of the sections of a card that contain numbers
SECTIONS = 'Suggested values', 'When it helps'


def methods_command(
    words: Annotated[
        list[str] | None,
        typer.Argument(help='Name of a method, or words to search for. Default: all methods.'),
    ] = None,
    needs: Annotated[
        list[str] | None,
        typer.Option(
            help='Only methods that need this: logits, features, relations, '
            'classes, labels ...; may be given several times.'
        ),
    ] = None,
) -> None:
    """List the losses and recipes, or show one method with its parameters and the numbers from its
    card.

    Example: fastdistill methods kd.
    """
    from ...recipes.catalog import find_methods, method, methods

    words, console = words or [], Console()
    if len(words) == 1 and not needs and words[0] in {m.name for m in methods()}:
        show_method(method(words[0]), console)
    elif found := find_methods(' '.join(words), needs or []):
        list_methods(found, console)
    elif not needs:
        method(' '.join(words))  # raises an error that lists similar names
    else:
        raise DistillError(
            f'No method needs {" and ".join(needs)} and matches {" ".join(words)!r}.'
        )


def plain_table() -> Any:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    return table


def list_methods(found: Sequence, console: Any) -> None:
    """Print a list of methods, grouped by family."""
    for family in dict.fromkeys(m.family for m in found):
        table = plain_table()
        for m in found:
            if m.family != family:
                continue
            more = ' · '.join(filter(None, [m.form, ', '.join(m.needs), m.paper, m.page]))
            table.add_row(f'[bold]{m.name}[/]', f'{escape(m.line)}\n[dim]{escape(more)}[/]')
        console.print(f'\n[bold]{family}[/]', highlight=False)
        console.print(table, highlight=False)
    console.print('\nfastdistill methods NAME shows a method with its parameters.', highlight=False)


def show_method(m: Any, console: Any) -> None:
    """Print everything about one method."""
    from ...recipes.catalog import card_section

    console.print(f'[bold]{m.name}[/]  {escape(m.line)}\n', highlight=False)
    table = plain_table()
    facts = dict(use=m.use, compares=m.family, needs=', '.join(m.needs), paper=m.paper, page=m.page)
    for k, v in facts.items():
        if v:
            table.add_row(k, escape(v))
    console.print(table, highlight=False)
    for form, params in dict(recipe=m.recipe, loss=m.loss).items():
        if params is None:
            continue
        console.print(f'\n[bold]Parameters of the {form}[/]', highlight=False)
        table = plain_table()
        table.add_column(no_wrap=True)
        for p in params:
            table.add_row(p.name, escape(p.default), escape(p.says))
        console.print(table, highlight=False)
    for heading in SECTIONS:
        if text := card_section(m.card, heading):
            console.print(f'\n[bold]{heading}[/]', highlight=False)
            console.print(Markdown(text, hyperlinks=False))
