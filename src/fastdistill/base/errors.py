"The error for a mistake, and the warning for a probable one."

import warnings
from difflib import get_close_matches

__all__ = ['DistillError', 'DistillWarning', 'close_name']


class DistillError(ValueError):
    """A mistake that training might not show. The message names what was given, what is possible
    and what to do.
    """


class DistillWarning(UserWarning):
    """Something that is probably, but not certainly, a mistake."""


def close_name(name, have):
    """A question about the most similar name; empty if none is similar."""
    close = get_close_matches(name, have, 1)
    return f' (did you mean {close[0]!r}?)' if close else ''


# each training says what is wrong with it, and Python would show an equal warning only once in a process. The user's
# filters stand before this one
warnings.filterwarnings('always', category=DistillWarning, append=True)
