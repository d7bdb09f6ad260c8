"The loss of one batch of a detector that learns from another."

from collections.abc import Mapping
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from ..base.outputs import DistillError, Outputs
from ..base.random_state import RandomGuard
from ..checks.findings import Findings
from ..checks.outputs import BATCHES
from ..checks.shared_parameters import none_shared, shared_parameters
from ..distiller.distiller import Distiller
from ..distiller.head import Head
from ..distiller.integration import takes_part
from ..distiller.loader import own_generators
from ..features.layer_names import split_suffixes
from ..features.layer_pairs import PairTable, pair
from ..features.probe import dry_run
from ..features.taps import Taps, returned_by
from ..recipes.recipe_loss import Distilled
from ..recipes.term import Recipe
from ..recipes.text import as_recipe
from .check import check_detections
from .levels import pair_levels
from .models import (
    DetectorView,
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
from .recipes import automatic
from .targets import check_targets

__all__ = ['DetectionDistiller', 'same_anchors']

OF_HEAD = 'head', 'rpn', 'scores'  # layers of a view that run only with the head


class DetectionHead(Head):
    """The comparison of two detectors. The student's layers stand in place of its outputs."""

    @property
    def detector(self) -> nn.Module:
        """The student inside its wrappers."""
        return checked_detector(self.student, 'student')

    def take(self, recipe):
        for t in recipe.terms:
            if t.layers is None:
                raise DistillError(
                    f'{t.name} compares the logits of a model with one output, but a detector '
                    'predicts classes and boxes at many positions. Compare feature maps, as in '
                    'pkd(), or the outputs of equal heads, as in detection.anchors().'
                )
        super().take(recipe)

    def setup(self, x: tuple = ()):
        """Pair the levels and build projectors. It changes nothing, the random state included. It
        needs no batch.
        """
        pixels, teacher = example_pixels(self.detector), self.teacher.as_it_is()
        view, x = DetectorView(self.detector), (pixels, None, self._compares_heads())
        with RandomGuard([pixels.device.index] if pixels.is_cuda else []):
            self.level_pairs = self._paired_levels(view, x)
            tables = {
                t.name: pair(
                    view,
                    teacher,
                    x,
                    layers=self._named(t.layers),
                    match=t.match,
                    projector=t.projector,
                )
                for t in self.layered
            }
            self.pairs = PairTable(p for ps in tables.values() for p in ps)
            with Taps(view, dict.fromkeys(p.student for p in self.pairs)) as taps:
                dry_run(view, *x)
                s = taps.pop()
            t = teacher.probe(*x, layers=list(dict.fromkeys(p.teacher for p in self.pairs)))
            for term in self.layered:
                self.links[term.name] = nn.ModuleList(self._links(term, tables[term.name], s, t))

    def _compares_heads(self) -> bool:
        """Return True if a term compares the outputs of the heads, which must be of equal heads."""
        heads = [
            t
            for t in self.layered
            if not isinstance(t.layers, str) and runs_head(layers_named(t.layers))
        ]
        if heads:
            self._check_anchors()
        return bool(heads)

    def _paired_levels(self, view, x):
        """Return (student's level, teacher's level) of each pair, by the names of their layers."""
        shapes = []
        for model, run in (
            (view, lambda: dry_run(view, *x)),
            (self.teacher.module, lambda: self.teacher.as_it_is().probe(*x)),
        ):
            with returned_by(model.backbone) as seen:
                run()
            names = level_names(seen[-1])
            shapes.append({n: tuple(o.shape) for n, o in zip(names, as_levels(seen[-1]).values())})
        size = tuple(x[0].shape[2:])
        return pair_levels(*shapes, size, self.teacher.size or size)

    def _named(self, layers):
        """Return the layers of a term by name: 'auto' and 'last' mean levels."""
        word, *how = split_suffixes(layers) if isinstance(layers, str) else [None]
        if word not in ('auto', 'last'):
            return layers
        how = ''.join(f'@{h}' for h in how if h != 'map')
        pairs = self.level_pairs[-1:] if word == 'last' else self.level_pairs
        return [(s + how, t + how) for s, t in pairs]

    def _check_anchors(self):
        if not same_anchors(self.detector, self.teacher):
            raise DistillError(
                'The recipe compares the outputs of the heads, which needs the same anchors and '
                f'classes in both detectors: {detector_name(self.detector)} and {self.teacher.name} '
                'differ. Compare feature maps, as in pkd().'
            )

    def student_outputs(self, raw, feats: dict, x) -> Outputs:
        """The student's layers. Its losses are no outputs that terms compare."""
        return Outputs(feats=feats)

    def targets_at(self, x, logits, targets):
        """The targets as they are."""
        return targets

    def compute(
        self, student, teacher, task=None, targets=(), *, progress: float | None = None, mixed=None
    ) -> Distilled:
        """As in `Distiller`. The labels that terms read are the teacher's scores."""
        scored = self.scored_layers(self.active_terms(progress))
        scores = ([teacher.feats[n] for n in scored],) if scored else ()
        return super().compute(student, teacher, task, scores, progress=progress)

    def scored_layers(self, terms):
        """Return the names of the teacher's scores at the levels of terms that read them."""
        found = {tuple(k.layers[1] for k in self.links[t.name]) for t in terms if t.n_targets}
        if len(found) > 1:
            raise DistillError('Terms that read scores must compare the same levels.')
        return [level_scores(n) for n in found.pop()] if found else []

    def check_first(self, student, teacher, targets):
        """Targets are checked before the student runs."""


class DetectionDistiller(Distiller):
    """A detector of torchvision, its teacher, and a recipe: `losses = distiller(images, targets)`
    returns torchvision's own dictionary of losses plus an entry for each term. Their sum is what to
    call `backward` on. In evaluation mode, it returns the student's detections.

    The student's transform resizes and normalizes the images once. The teacher sees the same
    pixels under its own normalization.

    `layers='auto'` in a term means the levels of both feature pyramids, paired by their strides.

    Args:
        student: A RetinaNet, FCOS, SSD, SSDLite, Faster R-CNN, Mask R-CNN or Keypoint R-CNN.
        teacher: Any of these, or a `Teacher` of one. Its number of classes may differ if only
            feature maps are compared.
        recipe: A recipe such as `pkd()`, a `Term`, or a text. None for `pkd(weight='paper')`.
        size: Height and width to which the student's pixels are resized for the teacher. None for
            the student's size, or the teacher's own if it is fixed, as in an SSD.
        check: Look for mistakes in the targets of the first batch.
    """

    head_class = DetectionHead

    def __init__(
        self,
        student: nn.Module,
        teacher,
        recipe=None,
        *,
        size: int | tuple | None = None,
        check: bool = True,
    ):
        detector = checked_detector(student, 'student')
        theirs = detector_inside(teacher)
        teacher = detector_teacher(teacher, detector, size)
        super().__init__(student, teacher, Recipe(), check=check)
        # subtle: in a tuple, since a module as an attribute would be trained and saved
        self.detectors = (theirs,)
        recipe = as_recipe(recipe)
        if recipe is None:
            recipe = automatic()
        self.batch = None  # what the student's transform made of the last images
        # shares in the first batch would mislead, since a new head passes on almost no gradient
        self.head.measures = False
        self.head.take(recipe)
        self.setup()

    @property
    def detector(self) -> nn.Module:
        """The student inside its wrappers."""
        return self.head.detector

    # a batch

    def forward(self, images, targets=None, progress: float | None = None) -> dict | list:
        """Run student and teacher on a batch and compare them.

        Args:
            images: Tensors (C, H, W) from 0 to 1, as torchvision's detectors take them.
            targets: A dict for each image, with 'boxes' and 'labels'. None in evaluation mode.
            progress: Progress of the training, from 0 to 1, for schedules.

        Returns:
            In training mode, torchvision's losses and the weighted terms, by name. In evaluation
            mode, the detections.
        """
        if not self.student.training:
            if targets is not None and torch.is_grad_enabled():
                raise DistillError(
                    'The student is in evaluation mode, in which torchvision returns detections '
                    'instead of losses: call distiller.train() before training.'
                )
            return self.student(images, targets)
        if 'labels' in self.head.unchecked:
            check_targets(images, targets, self.detector).enforce()
            self.head.unchecked = set()
        if not takes_part(self, progress):
            return self.student(images, targets)
        with self.reading(progress) as (_, taps):
            losses = self.student(images, targets)
            feats = taps.pop()
        student = self.student_outputs(losses, feats, images)
        teacher = self.teacher_outputs(images, progress)
        r = self.compute(student, teacher, sum(losses.values()), progress=progress)
        task = r.weights['task']
        if task != 1:
            losses = {k: task * v for k, v in losses.items()} if task else {}
        return {**losses, **r.terms}

    @contextmanager
    def reading(self, progress: float | None = None):
        """As in `Distiller`. It also keeps the pixels of the batch, for the teacher."""
        with returned_by(self.detector.transform) as batches, super().reading(progress) as found:
            yield found
        self.batch = batches[-1][0] if batches else None

    def teacher_outputs(
        self, x=None, progress: float | None = None, samples=None
    ) -> Outputs | None:
        """The teacher's layers for the batch that the student ran on last, inside `reading`. None
        if no term needs them.

        Args:
            x: Not used: the teacher sees the pixels that the student's transform made.
            progress: Progress of the training, for schedules.
            samples: Not used.
        """
        terms, (batch, self.batch) = self.active_terms(progress), (self.batch, None)
        if not terms:
            return None
        names = [*self.head.layers(1, terms), *self.head.scored_layers(terms)]
        args = batch.tensors, padded_sizes(batch), runs_head(names)
        return Outputs(feats=self.teacher.outputs(args, layers=names).feats)

    # checks

    def check(self, x, *targets, n: int = BATCHES) -> Findings:
        """Return what would go wrong in silence: targets in a wrong form, a teacher that finds
        hardly any boxes, whose classes are in a different order or shifted by the background, or
        for which the student's images are too small. Both models stay as they are.

        Args:
            x: A DataLoader of (images, targets), or the images of one batch.
            *targets: The targets of one batch.
            n: Number of batches to read of a DataLoader.
        """
        if targets:
            return self.check_batches([(x, targets)], n)
        with own_generators(x):
            return self.check_batches(((o[0], o[1:]) for o in x), n)

    def check_batches(
        self, batches, n: int = BATCHES, *, placed: bool = False, part: str = ''
    ) -> Findings:
        """As `check`, for batches that are split already.

        Args:
            batches: (images, (targets,)) of each.
            n: How many are read.
            placed: Has no meaning here.
            part: Has no meaning here.
        """
        found, teacher = Findings(), self.detectors[0]
        found.add(
            'parameters',
            shared_parameters(self.student, self.teacher),
            none_shared(self.student, self.teacher),
        )
        batches = [(x, y[0]) for x, y in islice(batches, n)]
        for x, y in batches:
            if wrong := check_targets(x, y, self.detector).errors:
                found.add('targets', wrong)
                return found
        transform = self.detector.transform if self.teacher.size is None else None
        heads = any(runs_head([p.teacher]) for p in self.pairs)
        found.join(check_detections(teacher, batches, transform, heads))
        self.head.doubt = found.doubt
        return found


def padded_sizes(batch: ImageList) -> Tensor | None:
    """Return the fractions of height and width that are not padding, (B, 2). None without padding."""
    whole = tuple(batch.tensors.shape[2:])
    if all(tuple(size) == whole for size in batch.image_sizes):
        return None
    sizes = torch.tensor(batch.image_sizes, device=batch.tensors.device, dtype=torch.float32)
    return sizes / sizes.new_tensor(whole)


def layers_named(layers) -> list:
    """Return the names in the layers of a term: a dict, pairs or names."""
    items = layers.items() if isinstance(layers, Mapping) else layers
    return [n for o in items for n in ([o] if isinstance(o, str) else layers_named(o))]


def runs_head(names) -> bool:
    return any(n.split('@')[0].split('.')[0] in OF_HEAD for n in names)


def same_anchors(student, teacher) -> bool:
    """Return True if both are dense detectors that predict the same classes at the same anchors.

    Args:
        student: A detector.
        teacher: A `Teacher` that `detector_teacher` made.
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
