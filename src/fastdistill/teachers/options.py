"""Options of a `Teacher`: their groups, their defaults and their checks."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from ..base.class_mapping import class_groups
from ..base.errors import check_choice, options_of_group
from ..base.outputs import DistillError, check_axis, check_output
from .ensemble import member_weights
from .estimator import Estimator
from .fast_copy import DEFAULTS, check_run
from .image_normalization import height_and_width, stats_of
from .teacher_inputs import check_own_inputs

POSSIBLE = dict(
    mode=('eval', 'train'),
    combine=('probs', 'logits', 'sample'),
    kind=('softmax', 'sigmoid', 'regression'),
    outputs=('logits', 'probs'),
)

# {group of options: options that are attributes of a `Teacher`}. The group `run` has more options
GROUPS = dict(
    images=('stats', 'input_stats', 'size'), ensemble=('combine', 'weights'), run=('mode',)
)
# default values of the options in groups
UNLESS_GIVEN: dict[str, Any] = dict(
    stats=None, input_stats=None, size=None, combine='probs', weights=None, mode='eval', run={}
)

# options of an ensemble that its members do not inherit
OWN = 'weights', 'select', 'classes', 'layers', 'frame', 'name', 'run'


def ungrouped_options(options: dict) -> dict:
    """Flatten the groups in the arguments of `Teacher`."""
    out = {k: v for k, v in options.items() if k not in GROUPS}
    for group, names in GROUPS.items():
        if options.get(group) is None:
            continue
        have = (*DEFAULTS, *names) if group == 'run' else names
        given = options_of_group(group, options[group], have)
        out |= {k: v for k, v in given.items() if k in names}
        if group == 'run':
            out['run'] = {k: v for k, v in given.items() if k not in names}
    return out


def grouped_options(options: dict) -> dict:
    """Convert flat options to the grouped arguments of `Teacher`."""
    out = {k: v for k, v in options.items() if k not in UNLESS_GIVEN}
    for group, names in GROUPS.items():
        own = {k: options[k] for k in names if k in options}
        if group == 'run':
            own |= options.get('run') or {}
        if own or group in options:
            out[group] = own
    return out


def records_given(init: Callable) -> Callable:
    """Record the names of the options that were passed to `init` in the attribute `given`."""

    @wraps(init)
    def call(self: Any, *args: Any, **options: Any) -> None:
        self.given = frozenset(ungrouped_options(options))
        init(self, *args, **options)

    return call


def option_of(teacher: Any, name: str) -> Any:
    """Return the value of an option.

    Args:
        teacher: A `Teacher`.
        name: Name of the option, without its group.
    """
    return teacher.returns if name == 'outputs' else getattr(teacher, name)


def given_options(teacher: Any) -> dict:
    """Return the options that were given explicitly to a teacher, without groups."""
    return {k: option_of(teacher, k) for k in teacher.given}


def checked_options(options: Mapping, given: frozenset, model: Any, n_members: int = 0) -> dict:
    """Check options, and convert them to the values of the attributes of a `Teacher`.

    Args:
        options: A value for each option, without groups.
        given: Names of the options that were passed.
        model: Model of the teacher. None for an ensemble.
        n_members: Number of members of an ensemble.
    """
    o: dict[str, Any] = dict(options)
    for k, have in POSSIBLE.items():
        check_choice(k, o[k], have)
    if n_members:
        o['weights'] = member_weights(o['weights'], n_members)
    elif o['weights'] is not None:
        raise DistillError(
            'weights= is for the members of an ensemble, but this is one teacher: give a list'
        )
    else:
        o['stats'] = stats_of(o['stats'], model)
        o['input_stats'] = stats_of(o['input_stats'], option='input_stats')
    check_output(o['output'])
    check_own_inputs(o['inputs'], o['items'])
    check_run(o['run'], model)
    check_axis(o['axis'])
    o['select'] = class_groups(o['select'], 'select')
    o['classes'] = class_groups(o['classes'], 'classes', disjoint=True)
    if isinstance(model, Estimator) and 'outputs' not in given:
        o['outputs'] = 'logits' if o['kind'] == 'regression' else 'probs'
    o['size'] = height_and_width(o['size'])
    return o | dict(layers=list(o['layers']))
