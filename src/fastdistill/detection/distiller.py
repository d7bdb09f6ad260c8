"Compute the loss of a batch for a detector that learns from another detector."

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from ..base.batch_samples import BatchSamples
from ..base.outputs import DistillError, Outputs
from ..base.random_state import RandomGuard
from ..checks.findings import Findings
from ..checks.shared_parameters import none_shared, shared_parameters
from ..checks.teacher_outputs import BATCHES
from ..distiller.distiller import Distiller
from ..distiller.head import Head
from ..distiller.layer_links import link_layers
from ..distiller.loader_batches import read_apart, spread_batches
from ..distiller.trainer_integration import takes_part
from ..features.layer_hooks import Taps, returned_by
from ..features.layer_names import split_suffixes
from ..features.probe import dry_run
from ..recipes.recipe_text import as_recipe
from ..recipes.term import Recipe, Term
from .check import check_detections
from .pyramid_levels import pair_levels
from .recipes import automatic
from .target_checks import check_targets
from .torchvision_detectors import (
    DetectorView,
    FrozenHead,
    as_levels,
    checked_detector,
    detector_inside,
    detector_name,
    detector_teacher,
    example_pixels,
    is_dense,
    level_names,
    level_scores,
)

BOXES = 'boxes'  # name of the labeled boxes among the teacher's outputs
OF_HEAD = 'head', 'rpn', 'scores'  # layers of a `DetectorView` that run only if the head runs


class DetectionHead(Head):
    """`Head` that compares two detectors. The detectors are compared only by their layers, because
    a detector has no single output with logits.
    """

    @property
    def detector(self) -> Any:
        """The student without wrappers such as DDP."""
        return checked_detector(self.student, 'student')

    def take(self, recipe: Recipe) -> None:
        for t in recipe.terms:
            if t.layers is None:
                raise DistillError(
                    f'{t.name} compares the logits of a model with one output, but a detector '
                    'predicts classes and boxes at many positions. Compare feature maps, as in '
                    'pkd(), or the outputs of equal heads, as in detection.anchors().'
                )
        super().take(recipe)

    def setup(self, x: tuple = ()) -> None:
        """Pair the levels and build projectors. This method runs both models on an empty image, and
        restores the models and the random state.
        """
        pixels, teacher = example_pixels(self.detector), self.teacher.as_it_is()
        view, x = DetectorView(self.detector), (pixels, None, self._compares_heads())
        with RandomGuard([pixels.device.index] if pixels.is_cuda else []):
            self.level_pairs = self._paired_levels(view, x)
            self.pairs, links = link_layers(view, teacher, x, self.layered, self._levels_of)
        self.links.update(links)
        for t in filter(runs_teacher_head, self.layered):
            self._check_teacher_head(t.name, [k.layers[1] for k in self.links[t.name]])

    def _compares_heads(self) -> bool:
        """Return True if a term compares the outputs of the heads. Raise a DistillError if the
        heads have different anchors or classes.
        """
        heads = [
            t
            for t in self.layered
            if not isinstance(t.layers, str) and runs_head(layers_named(t.layers))
        ]
        if heads and not same_anchors(self.detector, self.teacher):
            raise DistillError(
                'The recipe compares the outputs of the heads, so both detectors must have the same '
                f'anchors and classes, but {detector_name(self.detector)} and {self.teacher.name} '
                'differ. Compare feature maps, as in pkd().'
            )
        return bool(heads)

    def _check_teacher_head(self, name: str, layers: list) -> None:
        """Raise a DistillError if the teacher's head cannot run on these layers.

        Args:
            name: Name of the term.
            layers: The layers of the teacher that the term compares.
        """
        view = self.teacher.module
        if not view.dense:
            raise DistillError(
                f"{name} runs the teacher's head on the student's feature maps, so the teacher must "
                f'be a RetinaNet, FCOS or SSD, but it is a {self.teacher.name}. Compare feature maps, '
                'as in pkd().'
            )
        for n in layers:
            level_scores(n)  # raises an error if this is not a level
        if view.scores.softmax and layers != self.teacher_levels:
            raise DistillError(
                f'{name} compares the levels {", ".join(layers)} of the teacher, but the head of an '
                f'SSD has separate layers for each of {", ".join(self.teacher_levels)}: use a student '
                'with as many levels, or compare feature maps, as in pkd().'
            )

    def _paired_levels(self, view: DetectorView, x: Sequence) -> list[tuple[str, str]]:
        """Return a list of (student level, teacher level), as names of layers."""
        shapes: list[dict] = []
        runs: Sequence[tuple[Any, Callable]] = (
            (view, lambda: dry_run(view, *x)),
            (self.teacher.module, lambda: self.teacher.as_it_is().probe(*x)),
        )
        for model, run in runs:
            with returned_by(model.backbone) as seen:
                run()
            names = level_names(seen[-1])
            shapes.append({n: tuple(o.shape) for n, o in zip(names, as_levels(seen[-1]).values())})
        (s, t), size = shapes, tuple(x[0].shape[2:])
        self.teacher_levels = list(t)
        return pair_levels(s, t, size, self.teacher.size or size)

    def _levels_of(self, term: Any) -> Any:
        """Convert 'auto' and 'last' to pairs of levels. Return other layers unchanged."""
        layers = term.layers
        word, *others = split_suffixes(layers) if isinstance(layers, str) else ['']
        if word not in ('auto', 'last'):
            return layers
        how = ''.join(f'@{h}' for h in others if h != 'map')
        pairs = self.level_pairs[-1:] if word == 'last' else self.level_pairs
        return [(s + how, t + how) for s, t in pairs]

    def student_outputs(self, raw: Any, feats: dict, x: Any) -> Outputs:
        """Return the outputs of the student's layers. The losses in `raw` are ignored, because
        terms do not compare losses.
        """
        return Outputs(feats=feats)

    def _of_labels(self, term: Any, b: Any, targets: Sequence, options: dict[str, Any]) -> Tensor:
        """Compute the value of a term. If it reads labels, it gets the teacher's scores at its
        levels if it compares all levels at once, and the boxes of each image otherwise. If it has a
        required option `head`, it gets the teacher's head.
        """
        if runs_teacher_head(term):
            view = self.teacher.module
            own = dict(head=FrozenHead(view.head), background=0 if view.scores.softmax else None)
            given = {**term.options, **term.held}
            options |= {k: v for k, v in own.items() if k in term.accepts - given.keys()}
        if term.n_targets:
            names = self.read_by([term])
            found = [b.teacher.feats[n] for n in names]
            targets = [found if term.lists else found[0]]
        return super()._of_labels(term, b, targets, options)

    def read_by(self, terms: Iterable) -> list[str]:
        """Return the names of the scores and boxes that terms read as labels."""
        names = [
            level_scores(k.layers[1]) if t.lists else BOXES
            for t in terms
            if t.n_targets
            for k in self.links[t.name]
        ]
        return list(dict.fromkeys(names))


class DetectionDistiller(Distiller):
    """A torchvision detector, a teacher, and a recipe. In training mode, `losses =
    distiller(images, targets)` returns torchvision's dict of losses, with one more entry per term.
    Call `backward` on the sum of all entries. In evaluation mode, `distiller(images)` returns the
    student's detections.

    The student's transform resizes and normalizes the images once. The teacher gets the same
    pixels, converted to its own normalization.

    In a term, `layers='auto'` compares the levels of both feature pyramids, paired by stride.

    Args:
        student: A RetinaNet, FCOS, SSD, SSDLite, Faster R-CNN, Mask R-CNN or Keypoint R-CNN.
        teacher: A detector of any of these kinds, or a `Teacher` of such a detector. The number of
            classes may differ if only feature maps are compared.
        recipe: A recipe such as `pkd()`, a `Term`, or a recipe as text. None for
            `pkd(grad_ratio=0.3)`.
        size: Height and width to which the student's pixels are resized for the teacher. None for
            the teacher's fixed size, if it has one (as an SSD does), or else the student's size.
        check: If True, check the targets of the first batch.
    """

    head_class = DetectionHead

    def __init__(
        self,
        student: nn.Module,
        teacher: Any,
        recipe: Term | Recipe | str | None = None,
        *,
        size: int | tuple | None = None,
        check: bool = True,
    ):
        detector = checked_detector(student, 'student')
        theirs, teacher = detector_inside(teacher), detector_teacher(teacher, detector, size)
        # the targets are checked in `forward`, before the student runs
        super().__init__(student, teacher, Recipe(), shift_labels=False, check=False)
        self.unchecked = check
        if check:
            Findings(shared_parameters(student, self.head.teacher)).enforce()
        # subtle: store the teacher in a tuple, because a module stored as an attribute would be
        # trained and saved
        self.detectors = (theirs,)
        self.batch: Any = None  # the last images and targets after the student's transform
        # do not report gradient norms for the first batch, because a new head passes on almost no
        # gradient
        self.head.measures = False
        self.head.take(as_recipe(recipe) or automatic())
        self.setup()

    @property
    def detector(self) -> Any:
        """The student without wrappers such as DDP."""
        return self.head.detector

    # run on a batch

    def forward(  # type: ignore[override] # what torchvision's detectors return
        self,
        images: Sequence[Tensor],
        targets: Sequence[dict] | None = None,
        progress: float | None = None,
    ) -> dict | list:
        """Run student and teacher on a batch and compare them.

        Args:
            images: Tensors (C, H, W) with values from 0 to 1, as torchvision's detectors take them.
            targets: One dict per image, with 'boxes' and 'labels'. None in evaluation mode.
            progress: Progress of the training, from 0 to 1, for schedules.

        Returns:
            In training mode, a dict with torchvision's losses and the weighted terms, by name. In
            evaluation mode, the detections.
        """
        if not self.student.training:
            if targets is not None and torch.is_grad_enabled():
                raise DistillError(
                    'The student is in evaluation mode, in which torchvision returns detections '
                    'instead of losses: call distiller.train() before training.'
                )
            return self.student(images, targets)
        if self.unchecked:
            check_targets(images, targets, self.detector).enforce()
            self.unchecked = False
        if not takes_part(self, progress):
            return self.student(images, targets)
        with self.reading(progress) as taps:
            losses = self.student(images, targets)
            feats = taps.pop()
        student = self.head.student_outputs(losses, feats, images)
        teacher = self.teacher_outputs(images, progress)
        return self.weighted_losses(losses, student, teacher, progress)

    def weighted_losses(
        self, losses: dict, student: Outputs, teacher: Outputs | None, progress: float | None
    ) -> dict:
        """Return torchvision's losses and the terms by name, each times its weight.

        Args:
            losses: Losses that the student returned for a batch.
            student: Student outputs for the same batch.
            teacher: Teacher outputs for the same batch. None if no term needs the teacher.
            progress: Fraction of the training that is done, from 0 to 1, for schedules.
        """
        r = self.compute(student, teacher, sum(losses.values()), progress=progress)
        task = r.weights['task']
        if task != 1:
            losses = {k: task * v for k, v in losses.items()} if task else {}
        return {**losses, **r.terms}

    @contextmanager
    def reading(self, progress: float | None = None) -> Iterator[Taps]:
        """Read the student's layers as in `Distiller`. Also store the pixels and the targets of the
        batch.
        """
        with returned_by(self.detector.transform) as batches, super().reading(progress) as taps:
            yield taps
        self.batch = batches[-1] if batches else None

    def teacher_outputs(
        self, x: Any = None, progress: float | None = None, samples: BatchSamples | None = None
    ) -> Outputs | None:
        """Return the outputs of the teacher's layers for the last batch on which the student ran
        inside `reading`. Return None if no term needs them.

        Args:
            x: Ignored. The teacher gets the pixels from the student's transform.
            progress: Progress of the training, from 0 to 1, for schedules.
            samples: Ignored.
        """
        terms, (batch, self.batch) = self.active_terms(progress), (self.batch, None)
        if not terms:
            return None
        head, (images, targets) = cast(DetectionHead, self.head), batch
        read = head.read_by(terms)
        names = [*head.layers(1, terms), *(n for n in read if n != BOXES)]
        args = images.tensors, padded_sizes(images), runs_head(names)
        feats: dict[str, Any] = head.teacher.outputs(args, layers=names).feats
        if BOXES in read:
            height, width = images.tensors.shape[2:]
            feats[BOXES] = [
                t['boxes'] / t['boxes'].new_tensor([width, height] * 2) for t in targets
            ]
        return Outputs(feats=feats)

    # checks

    def check(self, x: Any, *targets: Any, n: int = BATCHES) -> Findings:
        """Check for mistakes that would otherwise go unnoticed. The checks find targets in the wrong
        format, a teacher that finds hardly any boxes, a different order of classes (such as a shift
        by the background class), and images that are too small for the teacher. Neither model is
        changed.

        Args:
            x: A DataLoader of (images, targets), or the images of one batch.
            *targets: Targets of the batch, if `x` contains images.
            n: Number of batches to read from a DataLoader.
        """
        if targets:
            return self.check_batches([(x, targets)], n)
        with read_apart(x):
            return self.check_batches(((o[0], o[1:]) for o in spread_batches(x, n)), n)

    def check_batches(
        self, batches: Iterable, n: int = BATCHES, *, placed: bool = False, part: str = ''
    ) -> Findings:
        """Check batches that are already split into images and targets (see `check`).

        Args:
            batches: Iterable of (images, (targets,)).
            n: Number of batches to read.
            placed: Ignored.
            part: Ignored.
        """
        found, teacher = Findings(), self.detectors[0]
        found.add(
            'parameters',
            shared_parameters(self.student, self.head.teacher),
            none_shared(self.student, self.head.teacher),
        )
        batches = [(x, y[0]) for x, y in islice(batches, n)]
        for x, y in batches:
            if wrong := check_targets(x, y, self.detector).errors:
                found.add('targets', wrong)
                return found
        transform = self.detector.transform if self.head.teacher.size is None else None
        heads = any(runs_head([p.teacher]) for p in self.pairs or ())
        found.join(check_detections(teacher, batches, transform, heads))
        self.head.doubt = found.doubt
        return found


def padded_sizes(batch: ImageList) -> Tensor | None:
    """Return the fractions of height and width that are not padding, (B, 2). Return None if no
    image is padded.
    """
    whole = tuple(batch.tensors.shape[2:])
    if all(tuple(size) == whole for size in batch.image_sizes):
        return None
    sizes = torch.tensor(batch.image_sizes, device=batch.tensors.device, dtype=torch.float32)
    return sizes / sizes.new_tensor(whole)


def layers_named(layers: Any) -> list:
    """Return all layer names in the `layers` of a term, given as a dict, pairs or names."""
    items = layers.items() if isinstance(layers, Mapping) else layers
    return [n for o in items for n in ([o] if isinstance(o, str) else layers_named(o))]


def runs_teacher_head(term: Any) -> bool:
    """Return True if the loss of a term takes the teacher's head, as `crosskd` does."""
    given = {**term.options, **term.held}
    return term.defaults.get('head') is Parameter.empty and 'head' not in given


def runs_head(names: Iterable[str]) -> bool:
    return any(n.split('@')[0].split('.')[0] in OF_HEAD for n in names)


def same_anchors(student: Any, teacher: Any) -> bool:
    """Return True if student and teacher are dense detectors with the same classes and the same
    anchors.

    Args:
        student: A detector.
        teacher: A `Teacher` created by `detector_teacher`.
    """
    view = teacher.module
    if not is_dense(student) or not view.dense or teacher.size is not None:
        return False
    x = example_pixels(student)
    found = []
    for v in (DetectorView(student), view):
        with returned_by(v.backbone) as maps, returned_by(v.head) as out:
            pixels = x.to(next(v.parameters()).device)
            dry_run(v, pixels, None, True)
        maps = list(as_levels(maps[-1]).values())
        anchors = v.anchors(ImageList(pixels, [tuple(x.shape[2:])]), maps)
        found.append((v.scores.softmax, out[-1]['cls_logits'].shape, anchors[0]))
    (a, n, p), (b, m, q) = found
    return a == b and n == m and p.shape == q.shape and torch.allclose(p.cpu(), q.cpu())
