"""List all losses and recipes, with the information in their signatures, docstrings, `@loss`
attributes and cards.
"""

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import losses, recipes
from ..base.docstrings import parameter_texts
from ..base.errors import DistillError, check_choice
from .term import Term

FAMILIES = dict(
    response='outputs',
    divergence='outputs',
    transformed_teacher='outputs',
    decoupled='outputs',
    feature='features',
    relation='relations',
    dense='dense maps',
)  # {module in fastdistill.losses: what its losses compare}
KINDS_IN_WORDS = dict(
    softmax='classes', sigmoid='several labels', regression='numbers'
)  # names of the kinds of logits in messages
# {recipe: card}, for recipes whose card has a different name
CARDS = dict(
    kd='kl', soft_labels='kl', hard_labels='hard', logit_std='standardize', pretrain='cosine'
)


@dataclass
class Parameter:
    """An option of a loss or of a recipe.

    Attributes:
        default: Default value as code. Empty if the parameter is required.
        says: Description from the docstring.
    """

    name: str
    default: str
    says: str


@dataclass
class Method:
    """A recipe, a loss, or a recipe and a loss of the same name.

    Attributes:
        line: Description of what the method computes.
        family: What the method compares: outputs, features, relations or dense maps.
        needs: What the method needs, as a list. 'logits' or 'features' is always included.
            'relations' means that samples of a batch are compared with each other. 'classes',
            'several labels' or 'numbers' means that the logits must be of this kind. 'labels' means
            that the loss uses the labels.
        paper: Reference to the paper. Empty if the docstring does not name one.
        card: Name of the method's page in docs/methods, without the extension.
        recipe: Parameters of the recipe. None if the method has no recipe.
        loss: Parameters of the loss. None if the method has no loss.
    """

    name: str
    line: str
    family: str
    needs: list[str]
    paper: str
    card: str
    recipe: list[Parameter] | None = None
    loss: list[Parameter] | None = None

    @property
    def form(self) -> str:
        return ' and '.join(k for k in ('recipe', 'loss') if getattr(self, k) is not None)

    @property
    def use(self) -> str:
        """Code that uses the method in a recipe."""
        if self.recipe is None:
            return f'Term(losses.{self.name}, weight=1.)'
        first = 'kd()' if self.recipe and not self.recipe[0].default else ''
        return f'recipes.{self.name}({first})'

    @property
    def page(self) -> str:
        return f'docs/methods/{self.card}.md'


def method(name: str) -> Method:
    """Return the method of this name. An unknown name raises a `DistillError` that lists similar
    names.

    Args:
        name: Name of a recipe or a loss.
    """
    have = {m.name: m for m in methods()}
    if name in have:
        return have[name]
    near = [m.name for m in find_methods(name)] or list(have)
    raise DistillError(
        f'There is no method {name!r}. {"Similar" if len(near) < len(have) else "Available"} '
        f'methods: {", ".join(near)}.'
    )


def find_methods(text: str = '', needs: Iterable[str] = ()) -> list[Method]:
    """Return the methods that match, sorted by family.

    Args:
        text: Words to search for in the name, description, paper and family. All of them must
            occur.
        needs: Required entries of `Method.needs`.
    """
    have = list(dict.fromkeys(n for m in methods() for n in m.needs))
    for n in sorted(needs):
        check_choice('needs', n, have)
    words = text.lower().split()
    said = lambda m: ' '.join((m.name, m.line, m.paper, m.family, *m.needs)).lower()
    return [m for m in methods() if set(needs) <= set(m.needs) and all(w in said(m) for w in words)]


def methods() -> list[Method]:
    """Return all methods, sorted by family and name."""
    made = {n: getattr(recipes, n) for n in recipes.__all__}
    names = dict.fromkeys([*made, *losses.LOSSES])
    found = [_method(n, made.get(n), losses.LOSSES.get(n)) for n in names]
    order = list(dict.fromkeys(FAMILIES.values()))
    return sorted(found, key=lambda m: (order.index(m.family), m.name))


def _method(name: str, recipe: Callable | None, loss: Callable | None) -> Method:
    fn: Any = loss or _terms(recipe)[0].loss
    docs = [o.__doc__ for o in (recipe, loss) if o is not None]
    papers = [p for d in docs if (p := _paper(d))]
    where = FAMILIES[inspect.unwrap(fn).__module__.rpartition('.')[2]]
    asks = [p.name for p in inspect.signature(fn).parameters.values() if p.default is p.empty]
    on_outputs = (
        where == 'outputs' or recipe is not None and any(t.layers is None for t in _terms(recipe))
    )
    needs = ['logits'] if on_outputs else ['features']
    if where == 'relations' or getattr(fn, 'relates', False):
        needs.append('relations')
    if fn.kind in KINDS_IN_WORDS:
        needs.append(KINDS_IN_WORDS[fn.kind])
    if 'y' in asks:
        needs.append('labels')
    return Method(
        name,
        _line(docs[0]),
        where,
        needs,
        papers[0] if papers else '',
        CARDS.get(name, name),
        None if recipe is None else _parameters(recipe),
        None if loss is None else _parameters(loss),
    )


def _terms(recipe: Any) -> list[Term]:
    """Return the terms that a recipe creates with its default arguments."""
    first = next(iter(inspect.signature(recipe).parameters.values()), None)
    if first is not None and first.default is first.empty:
        return recipe(recipes.kd()).terms
    return recipe().terms


def _parameters(fn: Callable) -> list[Parameter]:
    says, params = parameter_texts(fn), inspect.signature(fn).parameters.values()
    return [
        Parameter(p.name, '' if p.default is p.empty else repr(p.default), says.get(p.name, ''))
        for p in params
    ]


def _text(doc: str | None) -> str:
    return ' '.join(inspect.cleandoc(doc or '').partition('\n\nArgs:')[0].split())


PAPER = re.compile(r' \(([^()]*(?:arXiv:\d+\.\d+|(?:19|20)\d\d)[^()]*)\)')


def _paper(doc: str | None) -> str:
    return m[1] if (m := PAPER.search(_text(doc))) else ''


def _line(doc: str | None) -> str:
    """Return the first sentence of a docstring, without the paper."""
    return re.split(r'(?<=\w)\. (?=[A-Z])', PAPER.sub('', _text(doc)))[0].split('\n')[0].rstrip('.')


def card_section(card: str, heading: str) -> str:
    """Return the text under a heading of a card, as Markdown. The result is empty if the cards are
    not installed.

    Args:
        card: Name of a card.
        heading: Beginning of the heading.
    """
    here = Path(__file__).parents[1]
    # the wheel contains the cards inside the package; a checkout has them in docs/
    for folder in (here / 'cards', here.parent.parent / 'docs' / 'methods'):
        if (folder / f'{card}.md').is_file():
            text = (folder / f'{card}.md').read_text(encoding='utf-8')
            found = re.search(
                rf'^## {re.escape(heading)}[^\n]*\n(.*?)(?=^## |\Z)', text, re.M | re.S
            )
            return (
                re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', found[1]).strip() if found else ''
            )  # remove links
    return ''
