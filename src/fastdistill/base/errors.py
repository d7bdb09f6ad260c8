"Define the error for mistakes and the warning for probable mistakes."

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral
from typing import Any


class DistillError(ValueError):
    """Error for mistakes, including those that could otherwise go unnoticed during training. The
    message says what was given, what is allowed and what to do.
    """

    def __init__(self, *args: object):
        super().__init__(*args)
        self.message = ValueError.__str__(self)

    # subtle: fastai changes `args`, so that they begin with the names of a callback and an event
    def __str__(self) -> str:
        return self.message


class DistillWarning(UserWarning):
    """Warning for something that is probably a mistake."""


def close_name(name: str, have: Iterable[str]) -> str:
    """Return the text ' (did you mean ...?)' with the most similar name. Return an empty string if
    no name is similar.
    """
    close = get_close_matches(name, have, 1)
    return f' (did you mean {close[0]!r}?)' if close else ''


def few_names(names: Sequence, n: int = 5) -> str:
    """Return the first names as text, with dots if there are more."""
    return ', '.join(map(str, names[:n])) + (' ...' if len(names) > n else '')


def check_choice(name: str, value: object, allowed: Collection) -> None:
    """Raise a DistillError if an option does not have one of its allowed values."""
    if value not in allowed:
        raise DistillError(f'{name}={value!r}: must be one of {", ".join(map(repr, allowed))}')


def is_whole(o: object) -> bool:
    return isinstance(o, Integral) and not isinstance(o, bool)


def check_whole(
    name: str, value: Any, least: int = 1, most: int | None = None, none: bool = False
) -> None:
    """Raise a DistillError if an option is not a whole number in a range. With `none`, None is
    allowed.
    """
    if none and value is None:
        return
    if not is_whole(value) or value < least or most is not None and value > most:
        allowed = f'of at least {least}' if most is None else f'from {least} to {most}'
        raise DistillError(
            f'{name}={value!r}: must be a whole number {allowed}{", or None" * none}.'
        )


def options_of_group(group: str, given: Mapping | None, have: Iterable[str]) -> dict:
    """Return the options in a group, which is an argument that is a dict. Return an empty dict for
    None.

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


# Show equal warnings again, because a process may train several models.
# Filters set by the user take precedence.
warnings.filterwarnings('always', category=DistillWarning, append=True)
