"Mistakes that are named before training, and probable ones."

__all__ = ['DistillError', 'DistillWarning']


class DistillError(ValueError):
    "A mistake that training would not have shown: the message says what was given, what is possible, what to do"


class DistillWarning(UserWarning):
    "Something that is probably, but not certainly, a mistake"
