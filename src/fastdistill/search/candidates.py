"""Choose candidate recipes for a task, and the values to try for their options."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .. import losses
from ..base.outputs import DistillError
from ..recipes.default import auto
from ..recipes.recipe_text import as_recipe
from ..recipes.term import Recipe, Term
from ..recipes.zoo import at, cwd, dist, dkd, hint, kd, pkt, rkd, ttm

GRAD_RATIOS = 1, 0.3, 3, 10  # ratios of a term's gradient norm to that of the task loss
SMALL_GRAD_RATIOS = 0.1, 0.03, 0.3, 1  # gradient ratios for terms that compare layers


@dataclass
class Candidate:
    """A recipe whose options are searched.

    Attributes:
        name: Name of the recipe.
        make: fn(**options) -> recipe, or {head name: recipe}.
        options: {option: values to try}, with the default first.
        text: The recipe as code, with '{}' for the options.
    """

    name: str
    make: Callable
    options: dict = field(default_factory=dict)
    text: str = '{}'

    def recipe(self, options: Mapping[str, Any]) -> Recipe | Mapping[str, Any]:
        made = self.make(**options)
        return made if isinstance(made, Mapping) else Recipe(made)

    def written(self, options: Mapping[str, Any]) -> str:
        """Return the recipe as code."""
        # subtle: text written by the user may contain braces
        if not self.options:
            return self.text
        return self.text.format(', '.join(f'{k}={v:g}' for k, v in options.items()))


def term(name: str, loss: Callable, options: dict, written: str | None = None) -> Candidate:
    """Return a candidate that adds one term to the task loss, weighted by a gradient ratio."""
    return Candidate(
        name, lambda **o: Term(loss, **o), options, f'Term(losses.{written or name}, {{}})'
    )


# training on labels only. With alpha=0, training is the same as without a teacher
LABELS = Candidate('labels alone', lambda: kd(alpha=0.0), {}, 'kd(alpha=0)')


def candidates_for(
    kind: str = 'softmax',
    *,
    classes: int | None = None,
    dense: bool = False,
    maps: bool = False,
    layers: bool = False,
    teacher: Tensor | None = None,
    doubt: str | None = None,
) -> list[Candidate]:
    """Return the recipes that fit a task, with the choice of `auto` first.

    Training on labels only is not included, because all recipes are compared with it.

    Args:
        kind: Kind of the outputs: 'softmax', 'sigmoid' or 'regression'.
        classes: Number of classes of a softmax. None if unknown.
        dense: True if each sample has many predictions, e.g. for pixels or tokens.
        maps: True if the predictions form a map (B, C, H, W).
        layers: If True, include recipes that compare layers. Such recipes need the teacher to run
            during training.
        teacher: Teacher logits, as in `auto`.
        doubt: As in `auto`.
    """
    chosen = auto(kind, classes=classes, dense=dense, teacher=teacher, doubt=doubt)
    text = chosen.text.removeprefix('labels + ')
    found = [Candidate('auto', lambda: chosen, {}, text), *between_outputs(kind, classes, dense)]
    if maps and kind == 'softmax':
        found.append(
            Candidate('cwd', cwd, dict(T=(4, 1), grad_ratio=GRAD_RATIOS), 'recipes.cwd({})')
        )
    return found + (between_layers() if layers else [])


def candidates_for_heads(facts: dict, layers: bool = False) -> list[Candidate]:
    """Return recipes that fit all heads of a student. Each recipe is used for all heads.

    If the recipes that `auto` chooses for the heads give the task loss the same weight, they are
    combined as the first candidate.

    Args:
        facts: {head name: arguments of `candidates_for`}.
        layers: As in `candidates_for`.
    """
    own = {k: candidates_for(**f)[0] for k, f in facts.items()}
    each: dict[str, Any] = {k: c.recipe({}) for k, c in own.items()}
    chosen = Candidate('auto', lambda: each, {}, repr({k: c.text for k, c in own.items()}))
    first = [chosen] if len({r.task_at(0.0) for r in each.values()}) == 1 else []
    known = [n for f in facts.values() if (n := f.get('classes')) is not None]
    kinds = {f['kind'] for f in facts.values()}
    dense = any(f.get('dense') for f in facts.values())
    found = [between_outputs(k, min(known, default=None), dense) for k in sorted(kinds)]
    # if the heads have different kinds of outputs, keep only kd, which uses a suitable loss for
    # each head
    same = found[0] if len(kinds) == 1 else [c for c in found[-1] if c.name == 'kd']
    return first + same + (between_layers() if layers else [])


def between_outputs(kind: str, classes: int | None, dense: bool) -> list[Candidate]:
    """Return recipes that compare the outputs of the models."""
    alphas = 0.5, 0.3, 0.9
    if kind == 'regression':
        return [
            Candidate('kd', kd, dict(alpha=alphas), 'kd({})'),
            term('regression', losses.regression, dict(grad_ratio=GRAD_RATIOS)),
        ]
    classic = Candidate('kd', kd, dict(T=(1, 2, 4), alpha=alphas), 'kd({})')
    if kind == 'sigmoid':
        return [
            classic,
            term('binary_kl', losses.binary_kl, dict(T=(1, 2, 4), grad_ratio=GRAD_RATIOS)),
        ]
    found = [
        classic,
        term('kl', losses.kl, dict(T=(1, 2, 4, 10), grad_ratio=GRAD_RATIOS)),
        Candidate('ttm', ttm, dict(T=(2, 4), grad_ratio=GRAD_RATIOS), 'recipes.ttm({})'),
    ]
    # with two classes, the correlation between the models' probabilities is always 1 or -1
    if (classes or 2) > 2:
        found.append(
            Candidate(
                'dist',
                lambda **o: dist(beta=2, gamma=2, **o),
                dict(T=(4, 1, 10), grad_ratio=GRAD_RATIOS),
                'recipes.dist(beta=2, gamma=2, {})',
            )
        )
    if (classes or 2) > 2 and not dense:
        found += [
            term(
                'logit_std',
                losses.standardized(losses.kl),
                dict(T=(2,), grad_ratio=GRAD_RATIOS),
                'standardized(losses.kl)',
            ),
            Candidate('dkd', dkd, dict(T=(4, 1), beta=(8, 2), grad_ratio=GRAD_RATIOS), 'dkd({})'),
        ]
    return found


def between_layers() -> list[Candidate]:
    """Return recipes that compare layers of the models."""
    return [
        Candidate(
            make.__name__,
            make,
            dict(grad_ratio=SMALL_GRAD_RATIOS),
            f'recipes.{make.__name__}({{}})',
        )
        for make in (hint, at, rkd, pkt)
    ]


def given_candidates(recipes: dict) -> list[Candidate]:
    """Return the user's recipes as candidates, for which only the learning rate is searched.

    Args:
        recipes: {name: recipe}. A recipe can also be a term, a text, a dict {head name: recipe}, or
            a function without arguments that returns a recipe.
    """
    if not isinstance(recipes, dict) or not recipes:
        raise DistillError(
            f'recipes={recipes!r}: must be a dict {{name: recipe}}, as in dict(mild=kd(T=1, alpha=.3), '
            'dist=recipes.dist(grad_ratio=1)).'
        )

    def candidate(name: Any, o: Any) -> Candidate:
        if isinstance(o, Mapping):
            each = {k: as_recipe(v) for k, v in o.items()}
            return Candidate(str(name), lambda: each, {}, str(name))
        r = as_recipe(o) if isinstance(o, str | Recipe | Term) else o
        if r is None:
            raise DistillError(
                f'recipes={{{name!r}: {o!r}}}: omit recipes= to try the recipes that fit the task.'
            )
        make = (lambda: r) if isinstance(r, Recipe) else r
        if not callable(make):
            raise DistillError(f'recipes={{{name!r}: {o!r}}}: this is not a recipe. Try kd().')
        return Candidate(str(name), make, {}, o if isinstance(o, str) else str(name))

    return [candidate(k, v) for k, v in recipes.items()]
