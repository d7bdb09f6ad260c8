"Define the error for mistakes and the warning for probable mistakes."

import warnings
from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ['DistillError', 'DistillWarning', 'close_name']


class DistillError(ValueError):
    """Error for mistakes, including those that could otherwise go unnoticed during training. The
    message says what was given, what is allowed and what to do.
    """


class DistillWarning(UserWarning):
    """Warning for something that is probably a mistake."""


def close_name(name: str, have: Iterable[str]) -> str:
    """Return the text ' (did you mean ...?)' with the most similar name. Return an empty string if
    no name is similar.
    """
    close = get_close_matches(name, have, 1)
    return f' (did you mean {close[0]!r}?)' if close else ''


# Show equal warnings again, because a process may run several trainings.
# Filters set by the user take precedence.
warnings.filterwarnings('always', category=DistillWarning, append=True)
