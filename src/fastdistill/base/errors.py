"The error for a mistake, and the warning for a probable one."

import warnings
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

__all__ = ['DistillError', 'DistillWarning', 'close_name', 'options_of_group']


class DistillError(ValueError):
    """A mistake that might go unnoticed in training. The message says what was given, what is
    allowed and what to do.
    """


class DistillWarning(UserWarning):
    """Something that is probably, but not certainly, a mistake."""


def close_name(name: str, have: Iterable[str]) -> str:
    """Ask whether the most similar name was meant. Empty if none is similar."""
    close = get_close_matches(name, have, 1)
    return f' (did you mean {close[0]!r}?)' if close else ''


def options_of_group(group: str, given: Mapping | None, have: Iterable[str]) -> dict:
    """Return the options in a group, an argument that is a dict. Empty for None.

    Args:
        group: Name of the argument.
        given: Its value.
        have: Names of the options that it may have.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping) or set(given) - set(have):
        raise DistillError(
            f'{group}={given!r}: must be a dict with any of {", ".join(map(repr, have))}'
        )
    return dict(given)


# each training must show its warnings, but Python would show equal warnings only once per process. The user's filters
# come before this one
warnings.filterwarnings('always', category=DistillWarning, append=True)
