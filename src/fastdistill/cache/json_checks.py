"""Check the types and ranges of the entries of a JSON file.

Each error states the entry, its value and the allowed values.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from ..base.outputs import DistillError

DEPTH = 20  # maximum nesting of lists and objects. Real manifests have fewer levels


def shortened(o: Any, n: int = 200) -> str:
    return s if len(s := str(o)) <= n else s[:n] + ' ...'


@contextmanager
def located(place: str | Callable[[], str]) -> Iterator[None]:
    """Prepend the place, such as a row, to the errors raised in this context."""
    try:
        yield
    except DistillError as e:
        raise DistillError(f'{place() if callable(place) else place}: {e}') from None


def load_json(text: str | bytes) -> Any:
    """Parse JSON. Raise a DistillError if an object has the same name twice, because `json.loads`
    would keep only the last value.
    """
    return json.loads(text, object_pairs_hook=as_object)


def as_object(pairs: list[tuple[str, Any]]) -> dict:
    if len(o := dict(pairs)) == len(pairs):
        return o
    name = Counter(k for k, _ in pairs).most_common(1)[0][0]
    raise DistillError(f'an object has the name {shortened(repr(name), 100)} twice')


def parse_json(text: bytes) -> Any:
    """Parse a JSON file. Raise a DistillError for deep nesting or strings that can't be printed."""
    try:
        o = load_json(text)
        check_depth(o)
    except (ValueError, RecursionError) as e:
        raise DistillError(f'{shortened(e)}.') from e
    return o


def check_depth(o: Any, depth: int = DEPTH) -> None:
    if isinstance(o, str):
        o.encode()  # fails for strings that can't be printed (lone surrogates)
    if not isinstance(o, (dict, list)):
        return
    if not depth:
        raise DistillError(f'Lists and objects are nested more than {DEPTH} levels deep')
    for v in [*o, *o.values()] if isinstance(o, dict) else o:
        check_depth(v, depth - 1)


def refuse_entry(name: str, o: Any, allowed: object) -> NoReturn:
    raise DistillError(f'{name} is {shortened(repr(o), 100)}: it must be {allowed}.')


def whole_number(name: str, o: Any, low: int, high: int) -> int:
    # subtle: compare the type itself, because True is an instance of int
    if type(o) is not int or not low <= o <= high:
        refuse_entry(name, o, low if low == high else f'a whole number from {low} to {high}')
    return o


def json_list(name: str, o: Any, low: int, high: int) -> list:
    if not isinstance(o, list):
        refuse_entry(name, o, 'a list')
    if not low <= len(o) <= high:
        raise DistillError(
            f'{name} has {len(o)} entries: '
            + (f'it must have {low} to {high}.' if low < high else f'it must have {low}.')
        )
    return o


def json_object(
    name: str, o: Any, required: Iterable[str], optional: Iterable[str] | None = None
) -> dict:
    """Check that `o` is a dict with all required keys, and return it.

    All other keys must be in `optional`. If `optional` is None, any key is allowed.
    """
    if not isinstance(o, dict):
        refuse_entry(name, o, 'an object')
    if missing := [k for k in required if k not in o]:
        raise DistillError(f'{name} has no {", ".join(missing)}.')
    if optional is None:
        return o
    if unknown := [k for k in o if k not in required and k not in optional]:
        possible = ', '.join([*required, *optional])
        raise DistillError(
            f'{name} has an entry {shortened(repr(unknown[0]), 100)}: must be one of {possible}.'
        )
    return o


NAMES = {str: 'a string', float: 'a number', bool: 'true or false', dict: 'an object'}


def check_json(name: str, o: Any, spec: Any) -> None:
    """Check a value and everything in it.

    Args:
        name: Name of the value in errors.
        o: The value.
        spec: What the value must be:

            - a range: a whole number in this range,
            - `str`, `float`, `bool` or `dict`: a value of this type,
            - texts: one of these,
            - (pattern, description): a text that matches the pattern,
            - [spec, least, most]: a list of at least `least` and at most `most` such values,
            - {key: spec}: an object with these keys. A key that ends in '?' is optional,
            - (None, spec): None, or a value for `spec`,
            - None: any value.
    """
    match spec:
        case range():
            whole_number(name, o, spec.start, spec.stop - 1)
        case type():
            if type(o) is not spec:
                refuse_entry(name, o, NAMES[spec])
        case (None, inner):
            if o is not None:
                check_json(name, o, inner)
        case (re.Pattern() as pattern, description):
            if not isinstance(o, str) or not pattern.fullmatch(o):
                refuse_entry(name, o, description)
        case tuple():
            check_json(name, o, str)
            if o not in spec:
                refuse_entry(name, o, ' or '.join(map(repr, spec)))
        case [each, least, most]:
            for i, v in enumerate(json_list(name, o, least, most)):
                check_json(f'{name}[{i}]', v, each)
        case dict():
            optional = [k for k in spec if k.endswith('?')]
            required = [k for k in spec if k not in optional]
            json_object(name, o, required, [k[:-1] for k in optional])
            for k, each in spec.items():
                if (k := k.removesuffix('?')) in o:
                    check_json(f'{name}.{k}', o[k], each)
