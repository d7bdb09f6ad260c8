"""Look up the names of classes, tokens and categories, and compare their order."""

import torch
from fastai.basics import DataLoaders, TfmdDL, is_listy, nested_attr
from fastai.text.data import reverse_text
from torch import Tensor

from ..base.errors import DistillError, few_names
from ..checks.class_order import map_classes
from .language_model import is_stream

# names of classes that are not learned
VOID = 'void', 'ignore', 'unlabeled', 'unlabelled'


def vocab_of(dls):
    """Return the class names in the order of the outputs. Return None if the classes have no
    names.
    """
    v = None if is_stream(dls.train) else getattr(dls, 'vocab', None)
    if v is None:
        v = mask_codes(dls)
    if v is None or isinstance(v, dict):
        return None
    # one vocab per block, e.g. (tokens, classes)
    if len(v) and all(hasattr(o, '__len__') and not isinstance(o, str) for o in v):
        v = v[-1]
    return list(map(str, v))


def mask_codes(dls):
    """Return the class names of masks. Return None for other labels."""
    return nested_attr(dls, 'train.after_item.vocab')


def void_class(names) -> int | None:
    """Return the index of the class for pixels without a label. None if there is no such class."""
    return next((i for i, c in enumerate(names) if str(c).lower() in VOID), None)


def ignored_name(task, names) -> str:
    """Return the name of the label that losses ignore.

    Args:
        task: What a model predicts.
        names: Class names, or None if unknown.
    """
    i = task.ignore_index
    if i == type(task).ignore_index:
        return 'no label'
    return f'{names[i]} (label {i})' if names is not None and 0 <= i < len(names) else f'label {i}'


def stored_order(teacher, student, whole=False) -> Tensor | None:
    """Return the index of the stored column for each class of the labels.

    Args:
        teacher: Class names of the stored outputs, in the order of the columns.
        student: Vocab of the labels.
        whole: True if a row has the logits of all classes. Classes that the labels do not have are
            then ignored, as those of a running teacher are.

    Returns:
        An index tensor, or None if both orders are the same.

    Raises:
        DistillError: Classes are missing, or can't be ignored.
    """
    if student is None:
        raise DistillError(
            "The teacher's classes have names, but the labels have no vocab to map them to: "
            'remove vocab=.'
        )
    found = map_classes(
        student[-1] if len(student) and isinstance(student[-1], (list, tuple)) else student, teacher
    )
    if found.missing:
        raise DistillError(
            f'The teacher does not have the class(es) {few_names(found.missing)}: '
            f'it has {few_names(teacher, 10)}.'
        )
    if found.extra and not whole:
        raise DistillError(
            f'The teacher has {len(teacher)} classes, but the labels have '
            f'{len(teacher) - len(found.extra)}, whose probabilities would not sum to 1. Remove '
            f"{few_names(found.extra)} from the teacher's outputs with Teacher(model, "
            'select=...).'
        )
    return None if found.order is None else torch.tensor(found.order)


def tokens(dls):
    v = getattr(dls, 'vocab', None)
    if v is None:
        return None
    if is_stream(dls.train):
        return list(v)
    return list(v[0]) if is_listy(v) and len(v) > 1 and is_listy(v[0]) else None


def encoding_of_text(dls) -> dict | None:
    """Return a plain-data description of how texts become token ids. None if the data are not
    texts.

    The id of a token is its position in `vocab`. Unknown tokens have the id 0. `tokenizer` is the
    name of a class of fastai.text.core, or a call of this class as source code. `rules` lists the
    names of the functions that change a text before it is split.
    """
    if (vocab := tokens(dls)) is None:
        return None
    tok, rules = nested_attr(dls, 'tok'), getattr(dls, 'rules', None) or ()
    made = dict(
        SpacyTokenizer=nested_attr(tok, 'pipe.__self__.lang'),
        BaseTokenizer=getattr(tok, 'split_char', None),
    ).get(name := type(tok).__name__)
    return dict(
        vocab=vocab,
        tokenizer=None if tok is None else name if made is None else f'{name}({made!r})',
        rules=[getattr(r, '__name__', str(r)) for r in rules],
    )


def categories(dls):
    c = getattr(dls, 'classes', None)
    return {k: list(v) for k, v in c.items()} if isinstance(c, dict) and c else None


def scales(dls):
    """Return the means and standard deviations of a table's columns, in the order of the columns."""
    procs = getattr(getattr(dls, 'procs', None), 'fs', [])
    p = next((p for p in procs if hasattr(p, 'means') and hasattr(p, 'stds')), None)
    if p is None:
        return {k: None for k in getattr(dls, 'cont_names', None) or ()} or None
    return {k: (round(float(p.means[k]), 5), round(float(p.stds[k]), 5)) for k in p.means}


CODES = {'tokens': tokens, 'categories': categories, 'columns of numbers': scales}


def direction(dls) -> str | None:
    """Return the direction in which texts are read. None if it is unknown, or without texts."""
    tls = getattr(getattr(dls.train, 'dataset', None), 'tls', None)
    if not tls or tokens(dls) is None:
        return None
    names = [getattr(t, 'name', None) for t in tls[0].tfms.fs]
    return 'backward' if reverse_text.__name__ in names else 'forward'


def different_codes(dls, other):
    """Yield (what, difference in words) for each kind of input that two DataLoaders encode
    differently.
    """
    s, t = direction(dls), direction(other)
    if None not in (s, t) and s != t:
        yield 'texts', f'{s} and {t}'
    for name, read in CODES.items():
        s, t = read(dls), read(other)
        # subtle: dicts are equal in any order, but the order of the columns matters
        if s is not None and t is not None and (s != t or [*s] != [*t]):
            yield name, describe_difference(s, t)


def check_same_data(dls, other, who):
    """Raise a DistillError if a Learner can't use other data, because their classes or codes
    differ.

    Args:
        dls: The Learner's DataLoaders.
        other: Other DataLoaders, or a single DataLoader.
        who: Name of the Learner in messages.
    """
    if isinstance(other, TfmdDL):
        other = DataLoaders(other)
    elif not hasattr(other, 'loaders'):
        return  # a DataLoader of PyTorch has no names
    own, theirs = vocab_of(dls), vocab_of(other)
    found = [*different_codes(dls, other)]
    if None not in (own, theirs) and own != theirs:
        found.insert(0, ('classes', describe_difference(own, theirs)))
    for what, difference in found:
        raise DistillError(
            f'{who} and these data encode their {what} differently ({difference}), so the same '
            'numbers have different meanings. Create the data with the encoding used in training, '
            'e.g. with dls.test_dl(items, with_labels=True).'
        )


def describe_difference(s, t):
    if isinstance(s, dict):
        if s == t:
            return 'in their order: ' + ', '.join(s) + ' and ' + ', '.join(t)
        if unmatched := [k for k in {**s, **t} if k not in s or k not in t]:
            return f'not in both: {few_names(unmatched)}'
        return 'in ' + ', '.join([k for k in s if s[k] != t[k]][:3])
    if len(s) != len(t):
        return f'{len(s)} and {len(t)} of them'
    return 'first {!r} and {!r}'.format(*next((x, y) for x, y in zip(s, t) if x != y))
