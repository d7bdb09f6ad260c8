"""Train torchvision detectors with a Learner, with or without a teacher."""

from contextlib import ExitStack
from typing import Any

from fastai.basics import Callback, DataLoaders, L, Learner, Metric
from fastai.data.transforms import Normalize
from torch import nn

from ..base.errors import DistillError, check_choice
from ..base.outputs import as_plain
from ..detection.detection_plots import show_detections
from ..detection.distiller import DetectionDistiller
from ..detection.metrics import average_precision
from ..detection.torchvision_detectors import checked_detector
from ..detection.validation_loss import validation_losses
from ..distiller.loader_batches import read_apart
from ..distiller.trainer_integration import takes_part
from ..recipes.term import Recipe, Term
from .callback_arguments import check_epochs
from .learner_notes import notes_of
from .patches import DistillationCallback
from .projector_opt import ProjectorOptimizer

__all__ = ['DetectorCallback', 'DetectorDistillation', 'DetectorLearner', 'MeanAveragePrecision']


def images_and_targets(xb, yb) -> tuple:
    """Convert a fastai batch to the images and targets that torchvision detectors take.

    The batch comes from `ImageBlock, BBoxBlock, BBoxLblBlock`. The returned boxes are in pixels,
    and padded boxes are removed.

    Args:
        xb: A tuple that contains the images.
        yb: A tuple of boxes scaled to [-1, 1], (B, N, 4), and labels, (B, N). Label 0 marks a
            padded box.
    """
    if len(yb) != 2:
        raise DistillError(
            f'A batch has {len(yb)} targets, but a detector needs boxes and labels: '
            'DataBlock((ImageBlock, BBoxBlock, BBoxLblBlock), n_inp=1, ...).'
        )
    x, boxes, labels = map(as_plain, (xb[0], *yb))
    height, width = x.shape[2:]
    size = boxes.new_tensor([width, height, width, height])
    boxes = (boxes.reshape(len(x), -1, 4) + 1) / 2 * size
    targets = [dict(boxes=b[y > 0], labels=y[y > 0].long()) for b, y in zip(boxes, labels)]
    return list(x), targets


class DetectorLoss:
    """Computes the sum of torchvision's losses. In validation, `DetectorCallback` sets the
    value.
    """

    def __init__(self) -> None:
        self.valid = None

    def __call__(self, pred: Any, *yb: Any) -> Any:
        return sum(pred.values()) if isinstance(pred, dict) else self.valid

    def decodes(self, pred):
        return pred

    def activation(self, pred):
        return pred


class DetectorCallback(Callback):
    """Passes images and targets to a torchvision detector.

    In validation, the loss is computed by `detection.validation_losses`, and the predictions are
    the detected boxes.
    """

    order = -4

    def before_fit(self) -> None:
        for dl in self.dls.loaders:
            if any(isinstance(o, Normalize) for o in getattr(dl.after_batch, 'fs', ())):
                raise DistillError(
                    'These DataLoaders normalize the images, but a detector of torchvision does so '
                    'itself: build them without Normalize.'
                )

    def before_batch(self) -> None:
        images, targets = images_and_targets(self.xb, self.yb)
        self.learn.detector_targets = targets
        self.learn.xb = (images, targets) if self.training else (images,)
        if not self.training:
            losses = validation_losses(self.model, images, targets)
            self.learn.loss_func.valid = sum(losses.values())


class MeanAveragePrecision(Metric):
    """Mean average precision on the validation set, computed by torchmetrics.

    Args:
        measure: 'map' averages over IoU thresholds from 0.5 to 0.95. 'map50' uses the threshold
            0.5.
    """

    def __init__(self, measure: str = 'map'):
        check_choice('measure', measure, ('map', 'map50'))
        self.measure = measure
        self.reset()

    def reset(self) -> None:
        self.found, self.targets = [], []

    def accumulate(self, learn: Learner) -> None:
        self.found += learn.pred
        self.targets += learn.detector_targets

    @property
    def value(self) -> float | None:
        if not self.targets:
            return None
        return getattr(average_precision(self.found, self.targets), self.measure)

    @property
    def name(self) -> str:
        return self.measure


class DetectorDistillation(DistillationCallback):
    """Adds a teacher to a `DetectorLearner`, using the terms of a `DetectionDistiller`.

    Args:
        teacher: A detector, a `Teacher` of a detector, or a Learner with a detector.
        recipe, size, check: As in `DetectionDistiller`. With check=False, the check of the teacher
            on validation batches is also skipped.
    """

    order = -3

    def __init__(
        self,
        teacher: Any,
        recipe: Term | Recipe | str | None = None,
        *,
        size: int | tuple | None = None,
        check: bool = True,
    ):
        super().__init__()
        self.teacher = teacher.model if isinstance(teacher, Learner) else teacher
        self.recipe, self.size, self.check = recipe, size, check
        self.distiller = self.optimizer = self.before_finder = None
        self.stack = ExitStack()

    def before_fit(self) -> None:
        notes_of(self.learn).fitting = self
        if hasattr(self.learn, 'lr_finder'):  # it trains until the loss diverges
            self.before_finder = self.distiller, self.optimizer
            self.distiller = None
        if self.distiller is None or self.distiller.student is not self.model:
            d = DetectionDistiller(
                self.model, self.teacher, self.recipe, size=self.size, check=self.check
            )
            if self.check and self.before_finder is None and len(self.dls.loaders) > 1:
                batches = ((b[: self.dls.n_inp], b[self.dls.n_inp :]) for b in self.dls.valid)
                pairs = (images_and_targets(x, y) for x, y in batches)
                with read_apart(self.dls.valid):
                    found = d.check_batches((x, (y,)) for x, y in pairs)
                found.enforce()
            # subtle: set only now, so that the next fit checks again after an error
            self.distiller, self.optimizer = d, None
        self.distiller.links.to(next(self.model.parameters()).device)
        if self.optimizer is None and (own := self.distiller.own_parameters()):
            self.optimizer = ProjectorOptimizer(self.learn, own)
        self.learn.add_cbs(self.optimizer)
        self.distiller.start()

    def before_batch(self) -> None:
        self.reads = self.training and takes_part(self.distiller, self.pct_train)
        if self.reads:
            self.taps = self.stack.enter_context(self.distiller.reading(self.pct_train))

    def after_pred(self) -> None:
        if not self.reads:
            return
        feats = self.taps.pop()
        self.stack.close()
        d, losses = self.distiller, self.pred
        student = d.student_outputs(losses, feats, self.xb[0])
        teacher = d.teacher_outputs(self.xb[0], self.pct_train)
        self.learn.pred = d.weighted_losses(losses, student, teacher, self.pct_train)

    def after_cancel_batch(self) -> None:
        self.stack.close()

    def teardown(self, learn: Learner) -> None:
        """Restore everything. It is safe to call this twice."""
        notes_of(learn).fitting = None
        self.stack.close()
        if self.optimizer in learn.cbs:
            learn.remove_cb(self.optimizer)
        if self.distiller is not None:
            self.distiller.stop()
        if self.before_finder is not None:
            (self.distiller, self.optimizer), self.before_finder = self.before_finder, None


class DetectorLearner(Learner):
    """A Learner that trains a torchvision detector on images with bounding boxes.

    The DataLoaders are built from `ImageBlock, BBoxBlock, BBoxLblBlock`. The vocabulary's first
    entry, '#na#', is label 0, which is the background in torchvision.

    Args:
        dls: DataLoaders, without `Normalize`.
        model: The detector.
        metrics: Metrics to compute. If None, mean average precision is computed.
        cbs: Additional callbacks.
        **kwargs: Options of `Learner`.
    """

    def __init__(
        self,
        dls: DataLoaders,
        model: nn.Module,
        *,
        metrics: Any = None,
        cbs: Any = None,
        **kwargs: Any,
    ):
        checked_detector(model, 'student')
        metrics = (
            [MeanAveragePrecision(m) for m in ('map', 'map50')] if metrics is None else metrics
        )
        cbs = L(cbs) + DetectorCallback()
        super().__init__(dls, model, DetectorLoss(), metrics=metrics, cbs=cbs, **kwargs)

    def distill(
        self,
        teacher: Any,
        n_epoch: int,
        lr_max: Any = None,
        recipe: Term | Recipe | str | None = None,
        *,
        size: int | tuple | None = None,
        check: bool = True,
        cbs: Any = None,
        **kwargs: Any,
    ) -> 'DetectorDistillation':
        """Train with the 1cycle policy and a `DetectorDistillation` callback.

        Args:
            teacher: A detector, a `Teacher` of a detector, or a Learner with a detector.
            n_epoch: Number of epochs.
            lr_max: Maximum learning rate.
            recipe: A recipe such as `recipes.pkd()`. If None, the default of `DetectionDistiller`
                is used.
            size, check: As in `DetectorDistillation`.
            cbs: Additional callbacks.
            **kwargs: Options of `fit_one_cycle`.

        Returns:
            The `DetectorDistillation` callback.
        """
        check_epochs(n_epoch, lr_max)
        callback = DetectorDistillation(teacher, recipe, size=size, check=check)
        self.fit_one_cycle(n_epoch, lr_max, cbs=L(cbs) + callback, **kwargs)
        return callback

    def show_results(
        self, ds_idx: int = 1, dl: Any = None, max_n: int = 4, score: float = 0.5, **kwargs: Any
    ) -> Any:
        """Draw the labels and detections of some validation images, and return the figure.

        Args:
            ds_idx: Index of the DataLoader.
            dl: A DataLoader. If None, `ds_idx` selects one.
            max_n: Number of images.
            score: Minimum score of the detections to draw.
        """
        dl = self.dls[ds_idx] if dl is None else dl
        b = dl.one_batch()
        images, targets = images_and_targets(b[: self.dls.n_inp], b[self.dls.n_inp :])
        classes = list(self.dls.vocab)[1:]
        models = dict(detections=self.model)
        return show_detections(
            models, images[:max_n], targets[:max_n], classes=classes, score=score
        )
