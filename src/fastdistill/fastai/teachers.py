"""Convert Learners, exported Learners and everything that `Teacher` accepts to a `Teacher`."""

import warnings
from collections.abc import Mapping
from operator import is_
from pathlib import Path

from fastai.basics import L, Learner, load_learner, to_device
from fastai.data.transforms import IntToFloatTensor, Normalize
from fastai.text.data import SortedDL
from fastai.vision.augment import (
    AffineCoordTfm,
    CropPad,
    RandomCrop,
    RandomResizedCrop,
    RandomResizedCropGPU,
    RatioResize,
    Resize,
)
from fastai.vision.core import Image, PILImage
from torch import Tensor, nn

from ..base.atomic_files import check_regular_file
from ..base.class_mapping import class_groups
from ..base.errors import DistillError, DistillWarning, few_names
from ..base.outputs import as_plain
from ..base.random_state import RandomGuard
from ..base.transform_random_state import Generators
from ..cache.reader import TeacherCache, is_cache
from ..checks.class_order import map_classes
from ..checks.teacher_outputs import single_teachers
from ..teachers.estimator import Estimator, is_estimator, load_estimator
from ..teachers.image_normalization import affine, stats_of, timm_cfg
from ..teachers.model_loading import OF_RUN, holds_weights, warn_of_code, why_no_teacher
from ..teachers.teacher import Teacher, given_options, grouped_options, with_defaults
from .class_names import different_codes, vocab_of
from .tables import TableEstimator, table_of

# {suffix: how to write such a file}
PICKLES = {
    '.pkl': 'teacher_learner.export({!r}) writes an exported Learner.',
    '.joblib': 'joblib.dump(estimator, {!r}) writes an estimator.',
}


def teacher_of(obj, learn=None, task=None, **kwargs) -> Teacher:
    """Convert `obj` to a `Teacher` for the batches of `learn`.

    Images are converted from the student's normalization to the teacher's normalization. Images are
    also resized to the size on which the teacher's Learner was trained.

    The normalization and image size of a teacher's Learner are read from its DataLoaders when this
    function is called. A pretrained `vision_learner` adds `Normalize` to its DataLoaders. So if the
    student uses the same DataLoaders as the teacher, the teacher's normalization changes too. Give
    each model its own DataLoaders.

    If the teacher is a Learner, the attribute `learner` of the result is this Learner.

    Args:
        obj: A Learner, an exported Learner (.pkl), the folder of a run of `fastdistill train`, an
            exported estimator (.joblib), anything that `Teacher` accepts, or a list of these. Code
            in .pkl and .joblib files is executed.
        learn: The student's Learner or its DataLoaders, which provide normalization and class
            names.
        task: What the student predicts. The task determines kind, axis, and the order of a
            Learner's classes.
        **kwargs: Options of `Teacher`.
    """
    dls = getattr(learn, 'dls', learn)
    if task is not None:
        kwargs = dict(kind=task.kind, axis=task.axis) | kwargs
    if dls is not None:
        kwargs = getattr(dls, 'options_of_teacher', {}) | kwargs
        kwargs.setdefault('input_stats', image_stats(dls))
    if isinstance(obj, (str, Path)):
        student = Path(obj) / OF_RUN
        if Path(obj).suffix in PICKLES or student.is_file():
            obj = exported(student if student.is_file() else Path(obj))
    refuse_heads(obj)
    refuse_stored(obj)
    if is_estimator(obj):
        obj = Teacher(obj)
    ensemble = None
    if isinstance(obj, Teacher) and obj.members:
        ensemble = with_numbers(obj, dls)
        kwargs |= given_options(ensemble)
        obj = ensemble.members
    if isinstance(obj, (list, tuple, L)):
        of_members = {k: v for k, v in kwargs.items() if k in ('stats', 'input_stats')}
        # `select` and `classes` of an ensemble refer to the members' classes in their own order
        task = None if kwargs.keys() & {'select', 'classes'} else task
        members = [teacher_of(o, learn, task, **of_members) for o in obj]
        same = ensemble is not None and all(map(is_, members, obj))
        return with_defaults(ensemble if same else Teacher(members), **kwargs)
    if isinstance(obj, Learner):
        own = (
            {'stats': image_stats(obj.dls)}
            | other_size(dls, obj.dls)
            | in_order(dls, vocab_of(same_column(dls, obj.dls)), task)
        )
        teacher = Teacher(obj.model, **grouped_options(own | kwargs))
        teacher.learner = obj
        return teacher
    if isinstance(obj, Teacher):
        if obj.needs:
            # the teacher reads raw items, not the student's normalized batches
            kwargs.pop('input_stats', None)
        kwargs = own_options(obj, dls, task) | kwargs
        return on_table(with_defaults(with_numbers(obj, dls), **kwargs), dls)
    if isinstance(obj, nn.Module) and 'stats' not in kwargs and dls is not None:
        kwargs['stats'] = of_module(obj, kwargs['input_stats'])
    teacher = Teacher(obj, **grouped_options(kwargs))
    return with_defaults(teacher, **own_options(teacher, dls, task))


def own_options(teacher, dls, task):
    """Return the order of a teacher's classes, and the normalization stored in its file."""
    own = {}
    if dls is not None and not teacher.given & {'select', 'classes'}:
        own = in_order(dls, class_names(teacher, dls), task)
    normal = facts_of_model(teacher).get('normalization')
    if normal and teacher.inputs is None and not teacher.needs and dls is not None:
        own |= dict(stats=(normal['mean'], normal['std']))
    return own


def facts_of_model(teacher):
    """Return the facts stored in the file of an exported student, or an empty dict."""
    return getattr(teacher.model, 'facts', None) or {}


def refuse_stored(teacher):
    """Raise a DistillError if a cache is given, but the teacher has to run."""
    if isinstance(teacher, TeacherCache) or is_cache(teacher):
        folder = teacher.folder if isinstance(teacher, TeacherCache) else teacher
        raise DistillError(
            f"{folder} contains a teacher's outputs for the training set, but here the teacher has "
            'to run: pass the model itself.'
        )


def is_heads(teacher):
    """Return True for a dict of teachers, one for each head.

    Raises:
        DistillError: The dict contains weights.
    """
    if not isinstance(teacher, Mapping):
        return False
    if holds_weights(teacher):
        raise DistillError(
            'This dict contains weights (a state_dict or a checkpoint), not teachers: build the '
            'model, load the weights with model.load_state_dict(...), and pass the model as the '
            'teacher.'
        )
    return True


def refuse_heads(teacher):
    """Raise a DistillError if a dict of teachers is given, but a single teacher is needed."""
    if is_heads(teacher):
        raise DistillError(
            'A dict contains one teacher for each head of a student. Pass a single teacher here, '
            'or a list (an ensemble).'
        )


def on_table(teacher, dls):
    """Return a Teacher whose estimator receives the rows of a table before the transforms."""
    e = teacher.model
    if isinstance(e, Estimator) and teacher.inputs is None and teacher.items is None:
        refuse_tokens(e, dls)
    if not isinstance(e, Estimator) or table_of(dls) is None or getattr(e, 'dls', None) is dls:
        return teacher
    teacher = Teacher(teacher)
    teacher.model = TableEstimator(e, dls)
    return teacher


def refuse_tokens(estimator, dls):
    """Raise a DistillError if the batches contain the tokens of texts."""
    if not isinstance(getattr(dls, 'train', None), SortedDL):
        return
    raise DistillError(
        f'The batches contain token ids, which {estimator.__name__} cannot read. If it reads '
        'texts, such as a pipeline with a TfidfVectorizer, pass the texts of the items: '
        "Teacher(pipeline, items=lambda rows: rows['text']), where 'text' is the column of the "
        'texts.'
    )


def class_names(teacher, dls):
    """Return the names of the teacher's classes, in the order of its outputs. None if unknown.

    The classes of an estimator are often the numbers 0, 1, 2, ... Numbers are treated as names only
    if the student's classes have the same names.

    Args:
        teacher: A single `Teacher`, not an ensemble.
        dls: The student's DataLoaders.
    """
    if teacher.learner is not None:
        return vocab_of(same_column(dls, teacher.learner.dls))
    if names := facts_of_model(teacher).get('classes'):
        return names
    e = teacher.model
    if not isinstance(e, Estimator) or teacher.kind != 'softmax' or e.classes is None:
        return None
    own, mine = list(map(str, e.classes)), vocab_of(dls)
    are_numbers = own == [str(i) for i in range(len(own))] and not set(own) & set(mine or own)
    return None if are_numbers else own


def check_same_codes(teacher, dls, task, name):
    """Raise a DistillError if a model's Learner has different classes than these data, or encodes
    the inputs differently. The predictions would then be wrong, without any other error.

    Args:
        teacher: The model as a `Teacher`, created by `teacher_of` for these data.
        dls: DataLoaders of the data.
        task: What the models predict.
        name: Name of the model in messages.
    """
    for o in single_teachers(teacher):
        names = class_names(o, dls)
        found = None if task.kind == 'regression' else map_classes(vocab_of(dls), names)
        if found is not None and found.missing and o.classes is None:
            raise DistillError(
                f'{name} does not have {len(found.missing)} of the classes of these data '
                f'({few_names(found.missing, 5)}); it has {few_names(names, 8)}. Use data with the '
                'classes on which it was trained.'
            )
        if o.learner is None or o.inputs is not None:
            continue
        for what, difference in different_codes(dls, o.learner.dls):
            raise DistillError(
                f'{name} was trained on data that encode their {what} differently ({difference}), '
                'so the same numbers have different meanings for it. Use data with its own '
                'encoding, such as dls.test_dl(..., with_labels=True) of its DataLoaders.'
            )


def same_column(dls, theirs):
    """Return the teacher's DataLoaders. If `dls` are restricted to one head, restrict the teacher's
    DataLoaders too.
    """
    return dls.column_of(theirs) if hasattr(dls, 'column_of') else theirs


def with_numbers(teacher, dls):
    """Return a Teacher whose `classes` are indices of the student's classes instead of names."""
    if teacher.classes is None or dls is None or (vocab := vocab_of(dls)) is None:
        return teacher
    return Teacher(teacher, classes=class_groups(teacher.classes, 'classes', vocab))


def other_size(dls, theirs):
    """Return the option that resizes images to the size on which a teacher was trained.

    Return an empty dict if the student's images already have this size.
    """
    size = None if dls is None else size_of_images(theirs)
    return {} if size is None or size == size_of_images(dls) else dict(size=size)


def in_order(dls, names, task):
    """Return the option that puts a teacher's classes in the student's order.

    Return an empty dict if both models have the same order, or if the order is unknown.
    """
    if names is None or dls is None or task is None or task.kind == 'regression':
        return {}
    found = map_classes(vocab_of(dls), names)
    return {} if found is None or found.order is None else dict(select=found.order)


def of_module(model, given):
    """Return the option `stats` for a module.

    Modules of timm describe the normalization of their images. Modules of torchvision don't
    describe it. For a torchvision module, warn if the student does not use the normalization of
    ImageNet.
    """
    if timm_cfg(model):
        return 'auto'
    if not type(model).__module__.startswith('torchvision.models') or given is None:
        return None
    if affine(stats_of(given), stats_of('imagenet')) is None:
        return None
    warnings.warn(
        f"torchvision's {type(model).__name__} does not show how its images were normalized: it gets the "
        "student's images unchanged. If it has published weights, use "
        "Teacher(model, images=dict(stats='imagenet')). If it was trained on batches like these, use Teacher(model).",
        DistillWarning,
        stacklevel=3,
    )


def exported(path):
    """Load a Learner or an estimator from a pickle."""
    check_regular_file(path)
    if not path.is_file():
        raise DistillError(
            f'There is no file {str(path)!r}. {PICKLES[path.suffix].format(path.name)}'
        )
    warn_of_code(path)
    if path.suffix == '.joblib':
        return load_estimator(path)
    try:
        with warnings.catch_warnings():
            # this warning is not needed, because `warn_of_code` has already warned
            warnings.filterwarnings('ignore', message='load_learner. uses Python')
            return load_learner(path)
    # subtle: any error is possible, since pickle executes instructions in the file
    except Exception as e:
        if isinstance(e, AttributeError) and e.name == 'dls' and holds_weights(e.obj):
            raise DistillError(
                f'{path} does not contain a Learner. {why_no_teacher(e.obj)} Or pass a file that '
                'learn.export wrote.'
            ) from e
        reason = ' '.join(f'{type(e).__name__}: {e}'.split())
        raise DistillError(
            f'{path} could not be loaded as an exported Learner ({reason}). Did learn.export write '
            'it? Can everything in it be imported here: packages, your own functions and classes? '
            'The name of an estimator file written by joblib.dump must end in .joblib.'
        ) from e


def image_stats(dls) -> tuple:
    """Return (mean, std) of the `Normalize` transform of the batches, or (0, 1) if there is none.
    The numbers are for pixels from 0 to 1, even if `IntToFloatTensor` produces a different range.
    """
    tfms = getattr(getattr(dls, 'after_batch', None), 'fs', [])
    n = next((t for t in tfms if isinstance(t, Normalize)), None)
    scale = next((t.div / 255 for t in tfms if isinstance(t, IntToFloatTensor)), 1)
    mean, std = (0.0, 1.0) if n is None else (n.mean, n.std)
    return (mean, std) if scale == 1 else (mean * scale, std * scale)


def size_of_images(dls) -> tuple | None:
    """Return (height, width) of the images in the batches. Return None if unknown.

    The last of fastai's transforms that resizes images determines the size. If no transform resizes
    images, or if there are transforms of other packages, which may also resize them, the size of a
    few images is measured.
    """
    tfms = transforms_of(dls)
    size = next((s for s in map(size_after, reversed(tfms)) if s is not None), None)
    return size if size and are_of_fastai(tfms) else measured_size(getattr(dls, 'train', None))


def transforms_of(dl) -> list:
    """Return the transforms of items and batches."""
    names = ('after_item', 'before_batch', 'after_batch')
    return [t for k in names for t in getattr(getattr(dl, k, None), 'fs', ())]


def are_of_fastai(tfms) -> bool:
    """Return True if all transforms that run in validation are fastai's own."""
    return all(type(t).__module__.startswith('fastai.') for t in tfms if t.split_idx != 0)


def size_after(tfm):
    """Return (height, width) to which a transform resizes images. None if it does not resize
    them.
    """
    if isinstance(tfm, (Resize, RandomResizedCrop, CropPad, RandomCrop)):
        return tuple(tfm.size[::-1])
    if isinstance(tfm, RandomResizedCropGPU):
        return tuple(tfm.size)
    return tfm.cp_size if isinstance(tfm, AffineCoordTfm) else None


def resize_of_images(dls, size) -> dict:
    """Return how validation images are resized, as a dict for JSON: {'size', 'method', 'filter'}.

    The method is 'crop', 'squish' or 'pad' as in fastai's `Resize`, 'none' if images keep the size
    of their files, or 'unknown'. With 'pad', 'pad_mode' says how the border is filled.

    Args:
        dls: DataLoaders.
        size: (height, width) of the images in the batches.
    """
    tfms = transforms_of(dls.valid)
    out = dict(size=[*size], method='unknown', filter='unknown')
    resizes = [t for t in tfms if isinstance(t, RatioResize) or size_after(t) is not None]
    # only fastai's own transforms are known not to change the size or the pixels in validation
    # subtle: images that are not files get no IntToFloatTensor, and may have been resized before
    if not are_of_fastai(tfms) or not any(
        isinstance(t, IntToFloatTensor) and t.div == 255 for t in tfms
    ):
        return out
    if not resizes:
        return out | dict(method='none', filter='none')
    if len(resizes) > 1 or type(tfm := resizes[0]) is not Resize or tfm.size[::-1] != tuple(size):
        return out
    out |= dict(method=tfm.method, filter=Image.Resampling(tfm.mode).name.lower())
    return out | dict(pad_mode=tfm.pad_mode) if tfm.method == 'pad' else out


def measured_size(dl):
    """Return (height, width) of the images in the batches of a DataLoader, after looking at a few
    items. The DataLoader of an exported Learner has no items, so its transforms get black images.

    Return None if the items are not images, or have different sizes.
    """
    ds = getattr(dl, 'dataset', None)
    if not (hasattr(dl, 'do_item') and hasattr(ds, '__getitem__') and hasattr(ds, '__len__')):
        return None
    with RandomGuard(), Generators(ds, dl.after_item, dl.after_batch).seeded(0):
        # subtle: any error is possible, since datasets and transforms may be the user's own code. A
        # fit raises the error again.
        try:
            n = len(ds)
            items = [dl.do_item(i) for i in (0, n // 2, n - 1)] if n else [*black_items(dl)]
            sizes = {size_of_item(o) for o in items}
            if None in sizes or len(sizes) > 1:
                return None
            return size_of_batch(dl.after_batch(to_device(dl.do_batch(items), dl.device)))
        except Exception:
            return None


def black_items(dl):
    """Yield two black images of different sizes, after the item transforms."""
    for size in ((400, 300), (300, 400)):
        yield dl.after_item((PILImage.create(Image.new('RGB', size)),))


def size_of_item(x):
    """Return (height, width) of an item's first part. None if this part is not an image."""
    x = leading_part(x)
    if isinstance(x, Tensor):
        return tuple(as_plain(x).shape[-2:]) if x.dim() == 3 else None
    return x.size[::-1] if isinstance(x, Image.Image) else None


def size_of_batch(x):
    """Return (height, width) of the images that a batch begins with."""
    return tuple(as_plain(leading_part(x)).shape[-2:])


def leading_part(x):
    while isinstance(x, (tuple, list)) and len(x):
        x = x[0]
    return x
