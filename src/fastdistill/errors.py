"The error for a mistake, and the warning for a probable one."

__all__ = ['DistillError', 'DistillWarning']


class DistillError(ValueError):
    "A mistake that training might not show. The message names what was given, what is possible and what to do"


class DistillWarning(UserWarning):
    "Something that is probably, but not certainly, a mistake"
