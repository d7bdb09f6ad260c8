"""Check whether stored outputs are suitable for a recipe."""

from collections.abc import Iterator
from typing import Any

from ..base.outputs import Draws, Outputs, TopK
from ..cache.store_choice import BAD, loss_at
from .findings import Finding

LITTLE_LOSS = 0.05  # losses of T^2 times the KL, in nats, are not reported up to this value
MISSING = 0.25  # maximum fraction of the softened probability in classes that are not stored


def check_stored(recipe: Any, teacher: Outputs, kind: str) -> Iterator[Finding]:
    """Find terms for which the stored outputs are not suitable.

    Args:
        recipe: A recipe.
        teacher: Stored `Outputs` of a batch, decoded by a cache.
        kind: Kind of the student's outputs.
    """
    t = teacher.logits
    on_logits = any(term.layers is None for term in recipe.terms)
    if kind != 'softmax' and on_logits and isinstance(t, TopK | Draws):
        yield Finding(
            'error',
            'The stored outputs are probabilities of the likeliest of several classes, but the model '
            f'predicts {dict(sigmoid="separate labels").get(kind, "numbers")}',
            "Store the outputs themselves: Teacher(model, kind=...) and store='float16' or 'float32'",
            about='store',
        )
        return
    for term in recipe.terms:
        if term.layers is not None:
            continue
        if isinstance(t, Draws):
            yield from unsuited_draws(term, t)
        if isinstance(t, TopK) and term.compares_logits:
            yield Finding(
                'warning',
                f'The cache stores log-probabilities of the likeliest classes, so {term.name} gets these '
                'instead of logits. They differ from the logits by a number that varies between samples',
                "Store the logits: store='int8' or 'float16', or compare probabilities, e.g. with kd(T=1)",
                about='store',
            )
        elif teacher.lost is not None or isinstance(t, TopK) and t.ids.shape[-1] < t.n:
            yield from lossy_classes(term, t, teacher.lost)


def unsuited_draws(term: Any, t: Draws) -> Iterator[Finding]:
    T = term.temperature
    if not term.linear:
        text = t.refusal(term.name)
    elif T != t.T or term.scheduled_temperature:
        text = t.refusal(term.name, T)
    elif term.fade:
        text = t.refusal_to_fade(term.name)
    else:
        return
    what, _, do = text.partition('. Use ')
    yield Finding('error', what, f'Use {do}'.removesuffix('.'), about='store')


def lossy_classes(term: Any, t: Any, lost: Any) -> Iterator[Finding]:
    """Yield a finding if a term loses much information because some classes are not stored, or only
    approximately.
    """
    T, what = term.temperature or 1.0, 'approximate logits'
    if isinstance(t, TopK):
        what = f'the {t.ids.shape[-1]} likeliest of {t.n:,} classes'
    stored = f'The cache stores {what}, and {term.name} uses them at T={T:g}'
    if lost is not None:
        found = loss_at(lost, T)
        told = (
            f"at this temperature, {100 * found['share']:.0f}% of the teacher's information is lost (KL "
            f'{found["kl"]:.2g} nats), and the correlations of its outputs '
            f'fall by {found["correlation"]:.2f}, measured when the cache was written'
        )
        bad = found['correlation' if term.relates else 'share'] > BAD
        bad = bad and (term.relates or T**2 * found['kl'] > LITTLE_LOSS)
    else:
        missing = missing_probability(t, T)
        told = f'{100 * missing:.0f}% of its probability at this temperature is in classes that are not stored'
        bad = missing > MISSING
    if bad:
        yield Finding(
            'warning',
            f'{stored}: {told}',
            "Store the outputs in a different format: cache_teacher(..., store='auto') compares all "
            'formats' + (', or use kd(T=1)' if T > 1 or term.relates else ''),
            about='store',
        )


def missing_probability(t: TopK, T: float) -> float:
    """Return the mean probability, at temperature `T`, of the classes that are not stored."""
    if t.tail == 'bucket':
        return 1 - float(t.values.logsumexp(-1).exp().mean())
    p = (t.dense().movedim(t.axis, -1) / T).softmax(-1)
    return 1 - float(p.gather(-1, t.ids).sum(-1).mean())
