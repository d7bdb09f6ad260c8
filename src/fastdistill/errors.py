"The error for a mistake, and the warning for a probable one."
import warnings

__all__ = ['DistillError', 'DistillWarning']


class DistillError(ValueError):
    "A mistake that training might not show. The message names what was given, what is possible and what to do"


class DistillWarning(UserWarning):
    "Something that is probably, but not certainly, a mistake"


# each training says what is wrong with it, and Python would show an equal warning only once in a process. The user's
# filters stand before this one
warnings.filterwarnings('always', category=DistillWarning, append=True)
