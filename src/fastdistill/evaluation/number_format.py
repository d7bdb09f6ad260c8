"Format numbers as text."

from typing import Any, NamedTuple

from .report_data import Estimate, MeasureInfo


def shown_text(o: Any) -> Any:
    """Replace control characters in a text, which could move or color the surrounding text. Return
    other objects unchanged.
    """
    if not isinstance(o, str) or o.isprintable():
        return o
    return ''.join(c if c.isprintable() else ' ' if c.isspace() else '�' for c in o)


UNITS = (1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')


def amount(v: float | None, unit: str = '') -> str:
    """Format a large number with three significant digits.

    Args:
        v: Number of parameters, operations or bytes. None if unknown.
        unit: Unit, such as 'B'.
    """
    if v is None:
        return '–'
    size, letter = next(((s, l) for s, l in UNITS if v >= s), (1, ''))
    return f'{three_digits(v / size)} {letter}{unit}'.strip() if letter or unit else f'{v:g}'


def three_digits(v: float) -> str:
    if 0 < v < 1:
        return f'{v:#.3g}'
    digits = 0 if v >= 100 or not v else 1 if v >= 10 else 2
    return f'{v:.{digits}f}'


def percent_text(v: float | None, digits: int = 1) -> str:
    return '–' if v is None else f'{100 * v:.{digits}f}%'


def p_text(p: float | None) -> str:
    return (
        'p is unknown'
        if p is None
        else 'p < 0.001'
        if p < 0.001
        else f'p = {p:.{3 if p < 0.1 else 2}f}'
    )


class Cell(NamedTuple):
    """A text with an optional smaller text below."""

    text: str
    small: str = ''

    def __str__(self) -> str:
        return f'{self.text} ({self.small})' if self.small else self.text


def estimate_text(e: Estimate, info: MeasureInfo, sign: bool = False) -> Cell:
    """Format an estimate and its interval. With `sign`, the estimate is a difference."""
    between = '' if e.low is None else f'{info.text(e.low, sign)} to {info.text(e.high, sign)}'
    unit = '' if e.value is None else info.points if sign else info.unit
    return Cell(info.text(e.value, sign) + unit, between)


def recovered_text(e: Estimate | None) -> Cell:
    """Format the fraction of the teacher's lead that a student recovers, and its interval."""
    if e is None or e.value is None:
        return Cell('–')
    between = '' if e.low is None else f'{100 * e.low:.0f} to {100 * (e.high or 0):.0f}%'
    return Cell(f'{100 * e.value:.0f}%', between)
