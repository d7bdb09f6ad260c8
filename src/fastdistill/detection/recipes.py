"Recipes for detectors."

from ..features.layer_pairs import LayersLike
from ..features.projectors import ProjectorLike
from ..losses.detection import FGD, MGD, anchor_kl, box_deltas, scored_hint
from ..losses.detection import crosskd as crosskd_loss
from ..recipes.schedule import ScheduleLike
from ..recipes.term import Recipe, Term
from ..recipes.zoo import layer_recipe, pkd

ANCHOR_CLASSES, ANCHOR_BOXES = 'head@[cls_logits]', 'head@[bbox_regression]'


def anchors(
    weight: float = 1.0,
    boxes: float = 1.0,
    *,
    T: float = 1.0,
    sure: float = 0.5,
    background: int | None = None,
) -> Recipe:
    """Match the outputs of dense heads that have the same anchors. Class probabilities are weighted
    by the teacher's probability of an object. Boxes are compared only where the teacher is
    confident.

    Args:
        weight: Weight of the loss for class probabilities.
        boxes: Weight of the loss for boxes. 0 to omit this loss.
        T: Temperature of the class probabilities.
        sure: Probability of an object above which the box of an anchor is included.
        background: Index of the background class, for a softmax over classes (0 for an SSD). None
            for a sigmoid per class, as in RetinaNet and FCOS.
    """
    terms = [
        Term(
            anchor_kl,
            weight=weight,
            layers=[ANCHOR_CLASSES],
            T=T,
            background=background,
            name='anchor_classes',
        )
    ]
    if boxes:
        terms.append(
            Term(
                box_deltas,
                weight=boxes,
                layers=[ANCHOR_CLASSES, ANCHOR_BOXES],
                sure=sure,
                background=background,
                name='anchor_boxes',
            )
        )
    return Recipe(*terms)


def crosskd(
    layers: LayersLike = 'auto',
    weight: ScheduleLike | None = None,
    boxes: float = 1.0,
    *,
    T: float = 1.0,
    sure: float = 0.5,
    projector: ProjectorLike = 'auto',
    stop_at: float | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Match the predictions of the teacher's head for the student's feature maps with those for the
    teacher's own maps (CrossKD, arXiv:2306.11369). The teacher must have a dense head (RetinaNet,
    FCOS, SSD). The student can be any detector.

    Args:
        layers: As in `DetectionDistiller`. 'auto' compares all levels.
        weight: Number or schedule.
        boxes: Weight of the boxes relative to the classes. 0 to leave them out.
        T: Temperature of the class probabilities.
        sure: Probability of an object above which the box of an anchor is included.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses, measured at the levels of the term. 0.1 if neither `weight` nor
            `grad_ratio` is given.
    """
    options = dict(boxes=boxes, T=T, sure=sure, projector=projector)
    return layer_recipe(crosskd_loss, None, layers, weight, stop_at, grad_ratio, **options)


def scored(
    layers: LayersLike = 'auto',
    weight: ScheduleLike | None = None,
    projector: ProjectorLike = 'auto',
    stop_at: float | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Match feature maps where the teacher sees objects. Squared differences are weighted by the
    teacher's probability of an object at each position.

    Args:
        layers: As in `DetectionDistiller`. 'auto' compares all levels.
        weight: Number or schedule.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses, measured at the levels of the term. 0.1 if neither `weight` nor
            `grad_ratio` is given.
    """
    return layer_recipe(scored_hint, None, layers, weight, stop_at, grad_ratio, projector=projector)


def mgd(
    layers: LayersLike = 'auto',
    weight: ScheduleLike | None = None,
    drop: float = 0.65,
    projector: ProjectorLike = 'auto',
    stop_at: float | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Generate the teacher's feature maps from randomly masked feature maps of the student (MGD,
    arXiv:2205.01529).

    Args:
        layers: As in `DetectionDistiller`. 'auto' compares all levels.
        weight: Number or schedule.
        drop: Probability that a position of the student's map is hidden.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses, measured at the levels of the term. 0.1 if neither `weight` nor
            `grad_ratio` is given.
    """
    return layer_recipe(
        MGD(drop=drop), None, layers, weight, stop_at, grad_ratio, projector=projector
    )


def fgd(
    layers: LayersLike = 'auto',
    weight: ScheduleLike | None = None,
    T: float = 0.5,
    background: float = 0.5,
    attention: float = 1.0,
    relation: float = 0.005,
    projector: ProjectorLike = 'auto',
    stop_at: float | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Match feature maps separately inside and outside of the labeled boxes, weighted by the
    teacher's attention, and match their global context (FGD, arXiv:2111.11837).

    Args:
        layers: As in `DetectionDistiller`. 'auto' compares all levels.
        weight: Number, schedule or 'paper'. 'paper' is 0.001, the default of the authors' code.
        T: Temperature of the attention.
        background: Weight of the positions outside of boxes.
        attention: Weight of the differences between the attention maps.
        relation: Weight of the maps with global context.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses, measured at the levels of the term. 0.1 if neither `weight` nor
            `grad_ratio` is given.
    """
    loss = FGD(T=T, background=background, attention=attention, relation=relation)
    return layer_recipe(loss, 1e-3, layers, weight, stop_at, grad_ratio, projector=projector)


def automatic() -> Recipe:
    """Return the default recipe of a `DetectionDistiller`, which is `pkd` on all pairs of levels
    with a gradient ratio of 0.3.

    With the authors' weight of 6, two small students on blood cells lost precision
    (benchmarks/LOG.md).
    """
    return pkd(grad_ratio=0.3)
