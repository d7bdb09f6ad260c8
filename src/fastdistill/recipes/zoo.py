"Recipes: functions that return terms with the defaults of their papers. `+` combines them."

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import losses
from ..base.outputs import DistillError
from ..features.layer_pairs import LayersLike
from ..features.projectors import ProjectorLike
from ..losses._base import loss
from .schedule import ScheduleLike, one_minus, schedule
from .term import Recipe, Term, long_name_too

__all__ = [
    'ab',
    'abkd',
    'at',
    'cc',
    'cwd',
    'dist',
    'dkd',
    'fsp',
    'gram',
    'hard_labels',
    'hint',
    'ickd',
    'ifvd',
    'kd',
    'logit_std',
    'nkd',
    'nst',
    'ofd',
    'pairwise',
    'pkd',
    'pkt',
    'pretrain',
    'rkd',
    'rld',
    'seed',
    'soft_labels',
    'sp',
    'taid',
    'ttm',
    'uld',
    'vid',
    'wttm',
]


@loss(kind='softmax', match='shape')
def kl_per_class(
    s: Tensor,
    t: Tensor,
    *,
    T: float = 4.0,
    axis: int = 1,
    mask: Tensor | None = None,
    reduction: str = 'mean',
) -> Tensor:
    """Compute `kl` divided by the number of classes, as `nn.KLDivLoss()` and `F.kl_div(...,
    reduction='mean')` do.
    """
    return losses.kl(s, t, T=T, axis=axis, mask=mask, reduction=reduction) / s.shape[axis]


@long_name_too
def kd(T: ScheduleLike = 4.0, alpha: ScheduleLike = 0.9, class_mean: bool = False) -> Recipe:
    """Combine soft targets and labels: alpha T^2 KL(teacher || student) + (1-alpha) task loss
    (Hinton 2015, arXiv:1503.02531).

    The loss depends on what the model predicts. It is `kl` for a softmax over classes, `binary_kl`
    for a sigmoid per label (multi-label), and `regression` for numbers. Regression ignores T.

    Args:
        T: Temperature, a number or schedule. `temperature` is an alias of `T`.
        alpha: Weight of the teacher, a number or schedule. The task loss has weight 1-alpha.
        class_mean: If True, also divide the KL by the number of classes, as many older scripts do.
            This has the same effect as a smaller alpha.
    """
    alpha = schedule(alpha, 'alpha')
    if not callable(alpha) and not 0 <= alpha <= 1:
        raise DistillError(
            f'alpha={alpha}: the weight of the teacher must be between 0 (labels only) and 1 '
            '(teacher only)'
        )
    return Recipe(
        Term(kl_per_class if class_mean else losses.soft_targets, weight=alpha, T=T, name='kd'),
        task=one_minus(alpha),
    )


@long_name_too
def soft_labels(T: ScheduleLike = 1.0) -> Recipe:
    """Learn only from the teacher, as `kd` with alpha=1. Batches do not need labels."""
    return kd(T, alpha=1.0)


def hard_labels(alpha: ScheduleLike = 1.0) -> Recipe:
    """Use the class that the teacher predicts as a label (DeiT, arXiv:2012.12877).

    Args:
        alpha: Weight of the teacher's labels. The true labels have weight 1-alpha (0.5 in DeiT).
    """
    alpha = schedule(alpha, 'alpha')
    return Recipe(Term(losses.hard, weight=alpha), task=one_minus(alpha))


@long_name_too
def dkd(
    alpha: float = 1.0,
    beta: float = 8.0,
    T: ScheduleLike = 4.0,
    weight: ScheduleLike | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Add decoupled distillation to the task loss (CVPR 2022, arXiv:2203.08679).

    Args:
        alpha: Weight of the part of the loss for the target class.
        beta: Weight of the part of the loss for the other classes. The authors use 2 to 8 for
            CIFAR-100, depending on the models, and 0.5 for ImageNet.
        T: Temperature.
        weight: Weight of both parts. The authors increase the weight linearly over the first 20 of
            240 epochs, similar to ('warmup', 1.).
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses (see `Term`).
    """
    return Recipe(Term(losses.dkd, weight, grad_ratio=grad_ratio, alpha=alpha, beta=beta, T=T))


@long_name_too
def nkd(
    gamma: float = 1.5,
    T: ScheduleLike = 1.0,
    weight: ScheduleLike | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Add normalized distillation to the task loss (ICCV 2023, arXiv:2303.13005).

    Args:
        gamma: Weight of the part of the loss for the other classes. The authors use 1.5 for
            ImageNet, and 3.5 with T=3 for CIFAR-100.
        T: Temperature of the part of the loss for the other classes.
        weight: 1 if neither `weight` nor `grad_ratio` is given.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses (see `Term`).
    """
    return Recipe(Term(losses.nkd, weight, grad_ratio=grad_ratio, gamma=gamma, T=T))


@long_name_too
def dist(
    beta: float = 1.0,
    gamma: float = 1.0,
    T: ScheduleLike = 1.0,
    weight: ScheduleLike | None = None,
    grad_ratio: ScheduleLike | None = None,
    fade: float = 0.0,
) -> Recipe:
    """Add a loss for the correlations between and within classes to the task loss (NeurIPS 2022,
    arXiv:2205.10536).

    Args:
        beta: Weight of the correlation between the classes of a sample. The authors use 2 for
            CIFAR-100.
        gamma: Weight of the correlation between the samples of a class. The authors use 2 for
            CIFAR-100.
        T: Temperature. The authors use 4 for CIFAR-100.
        weight: 1 if neither `weight` nor `grad_ratio` is given.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses (see `Term`).
        fade: Gain of the teacher below which the gradient ratio falls, from 0 to 1 (see `Term`).
    """
    return Recipe(
        Term(losses.dist, weight, grad_ratio=grad_ratio, fade=fade, beta=beta, gamma=gamma, T=T)
    )


@long_name_too
def ttm(
    T: ScheduleLike = 4.0,
    weight: ScheduleLike | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Add transformed teacher matching to the task loss (ICLR 2024, arXiv:2402.11148). Only the
    teacher's probabilities are softened by a temperature.

    Args:
        T: Temperature of the teacher. The student has none.
        weight: 1 if neither `weight` nor `grad_ratio` is given. The authors tune this weight for
            each pair of models.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses (see `Term`).
    """
    return Recipe(Term(losses.ttm, weight, grad_ratio=grad_ratio, T=T))


@long_name_too
def uld(
    T: ScheduleLike = 1.0,
    weight: ScheduleLike | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Add the distance between sorted probabilities to the task loss, for a teacher with a
    different vocabulary (TMLR 2025, arXiv:2402.12030).

    Args:
        weight: 1 if neither `weight` nor `grad_ratio` is given. The authors use 1.5.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses (see `Term`).
    """
    return Recipe(Term(losses.uld, weight, grad_ratio=grad_ratio, T=T))


@long_name_too
def wttm(
    T: ScheduleLike = 4.0,
    weight: ScheduleLike | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Add `ttm`, with a larger weight where the teacher is less certain, to the task loss (ICLR
    2024, arXiv:2402.11148).

    Args:
        T: Temperature of the teacher. The student has none.
        weight: 1 if neither `weight` nor `grad_ratio` is given. The authors tune this weight for
            each pair of models.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses (see `Term`).
    """
    return Recipe(Term(losses.wttm, weight, grad_ratio=grad_ratio, T=T))


@long_name_too
def abkd(
    alpha: float = 0.8,
    beta: float = 0.3,
    T: ScheduleLike = 4.0,
    weight: ScheduleLike | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Add a divergence between forward and reverse KL to the task loss (ICML 2025,
    arXiv:2505.04560).

    Args:
        alpha: Exponent of the teacher's probabilities. The default is the authors' value for
            CIFAR-100 with a ResNet-56 as teacher and a ResNet-20 as student. With alpha=1 and
            beta=0, the loss is forward KL. With alpha=0 and beta=1, the loss is reverse KL.
        weight: 2 if neither `weight` nor `grad_ratio` is given. The authors use 32 for these
            models, and our loss already contains the factor T^2 = 16.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses (see `Term`).
    """
    weight = 2.0 if weight is None and grad_ratio is None else weight
    return Recipe(Term(losses.abkd, weight, grad_ratio=grad_ratio, alpha=alpha, beta=beta, T=T))


@long_name_too
def rld(
    alpha: float = 1.0,
    beta: float = 8.0,
    T: ScheduleLike = 4.0,
    weight: ScheduleLike | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Add refined logit distillation to the task loss (ICCV 2025, arXiv:2408.07703). Classes that
    the teacher considers more likely than the label are left out of this loss.

    Args:
        alpha: Weight of the part of the loss for the probability of the label.
        beta: Weight of the part of the loss for the classes that the teacher considers less likely
            than the label.
        weight: Weight of both parts. 1 if neither `weight` nor `grad_ratio` is given.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses (see `Term`).
    """
    return Recipe(Term(losses.rld, weight, grad_ratio=grad_ratio, alpha=alpha, beta=beta, T=T))


@long_name_too
def taid(
    start: float = 0.4,
    T: ScheduleLike = 1.0,
    weight: ScheduleLike | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Add a KL to a target that moves from the student to the teacher during training (TAID, ICLR
    2025, arXiv:2501.16937).

    Args:
        start: Weight of the teacher in the target at the beginning of the training. The weight
            grows linearly to 1. The default is the authors' value.
        weight: 1 if neither `weight` nor `grad_ratio` is given. Recipe(taid(), task=0.) trains
            without the task loss.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses (see `Term`).
    """
    return Recipe(Term(losses.taid, weight, grad_ratio=grad_ratio, lam=('linear', start, 1.0), T=T))


def logit_std(recipe: Term | Recipe) -> Recipe:
    """Standardize the logits of any recipe (CVPR 2024, arXiv:2403.01427).

    The authors use a weight of 9 for the KL and 0.1 for the task loss, as in
    Recipe(Term(losses.standardized(losses.kl), weight=9., T=2.), task=.1).

    Args:
        recipe: A recipe such as kd(T=2., alpha=.9). Terms on logits get the standardized logits of
            both models. Terms between layers do not change.
    """

    def std(t: Term) -> Term:
        if t.layers is not None:
            return t
        t = copy.copy(t)
        t.loss = losses.standardized(t.loss)
        # subtle: standardization needs the logits of all classes, even if the loss does not
        t.positionwise = t.linear = False
        return t

    recipe = Recipe(recipe)
    return Recipe(*map(std, recipe.terms), task=recipe.task)


# The recipes below compare layers and are added to the task loss or to kd().
# The default is this gradient ratio, because the papers' weights depend on the size of the network.
GRAD_RATIO = 0.1


def layer_recipe(
    loss: Callable,
    paper: float | None,
    layers: LayersLike | None,
    weight: ScheduleLike | None,
    stop_at: float | None,
    grad_ratio: ScheduleLike | None,
    **options: Any,
) -> Recipe:
    """Build a recipe with one term between layers.

    Args:
        paper: Weight from the paper or the authors' code, for weight='paper'. None if there is no
            such weight.
        weight: Number, schedule or 'paper'. None if it was not given.
        grad_ratio: Number or schedule. None if it was not given.
        **options: Further options of `Term`.
    """
    if weight is None and grad_ratio is None:
        grad_ratio = GRAD_RATIO
    elif isinstance(weight, str) and weight == 'paper':
        if paper is None:
            raise DistillError(
                "weight='paper': there is no such weight for this method. Pass a number, or "
                'grad_ratio=.'
            )
        weight = paper
    return Recipe(
        Term(loss, weight, grad_ratio=grad_ratio, layers=layers, stop_at=stop_at, **options)
    )


def hint(
    layers: LayersLike = 'auto',
    weight: ScheduleLike | None = None,
    projector: ProjectorLike = 'auto',
    stop_at: float | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Match the teacher's features directly (FitNets, arXiv:1412.6550).

    Args:
        layers: As in `Term`. FitNets used one layer in the middle.
        weight: 'paper' is 100, the weight in RepDistiller.
        projector: As in `Term`. The paper uses a convolution.
        stop_at: As in `Term`. FitNets used this loss only in the first phase of the training.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses, measured at the layers of the term. 0.1 if neither `weight` nor
            `grad_ratio` is given.
    """
    return layer_recipe(
        losses.hint, 100.0, layers, weight, stop_at, grad_ratio, projector=projector
    )


def at(
    layers: LayersLike = 'auto',
    weight: ScheduleLike | None = None,
    p: float = 2.0,
    stop_at: float | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Match where in the image the activations are large (attention transfer, arXiv:1612.03928).

    Args:
        layers: As in `Term`. 'auto' selects the end of each stage, as in the paper.
        weight: 'paper' is 1000, the authors' weight.
        p: Exponent of the activations.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses, measured at the layers of the term. 0.1 if neither `weight` nor
            `grad_ratio` is given.
    """
    return layer_recipe(losses.at, 1000.0, layers, weight, stop_at, grad_ratio, p=p)


def nst(
    layers: LayersLike = 'last',
    weight: ScheduleLike | None = None,
    stop_at: float | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Match the spatial patterns to which the channels respond (neuron selectivity transfer,
    arXiv:1707.01219).

    Args:
        layers: As in `Term`. The default is the paper's choice.
        weight: 'paper' is 50, the authors' weight.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses, measured at the layers of the term. 0.1 if neither `weight` nor
            `grad_ratio` is given.
    """
    return layer_recipe(losses.nst, 50.0, layers, weight, stop_at, grad_ratio)


def fsp(
    layers: LayersLike = 'auto',
    weight: ScheduleLike | None = None,
    projector: ProjectorLike = 'auto',
    stop_at: float | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Match how features change from one layer to the next (Yim et al., CVPR 2017).

    Args:
        layers: As in `Term`. 'auto' selects the end of each stage.
        weight: 'paper' is 1.
        projector: As in `Term`. Used where the numbers of channels differ.
        stop_at: As in `Term`. The paper used this loss only in the first phase of the training.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses, measured at the layers of the term. 0.1 if neither `weight` nor
            `grad_ratio` is given.
    """
    return layer_recipe(losses.fsp, 1.0, layers, weight, stop_at, grad_ratio, projector=projector)


def ab(
    layers: LayersLike = 'auto',
    weight: ScheduleLike | None = None,
    margin: float = 1.0,
    projector: ProjectorLike = 'auto',
    stop_at: float | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Match which neurons are active (activation boundaries, arXiv:1811.03233).

    Args:
        layers: As in `Term`. For best results, name layers whose values are taken before the ReLU,
            e.g. '0.7.1.relu@in'.
        weight: 'paper' is 50. The authors use a weight of 0.003 and sum over elements. Our loss
            averages over elements, so 0.003 is multiplied by the number of elements in the last
            stage of a CIFAR network.
        stop_at: As in `Term`. The paper used this loss only in the first phase of the training.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses, measured at the layers of the term. 0.1 if neither `weight` nor
            `grad_ratio` is given.
    """
    return layer_recipe(
        losses.ab, 50.0, layers, weight, stop_at, grad_ratio, projector=projector, margin=margin
    )


def ofd(
    layers: LayersLike = 'auto',
    weight: ScheduleLike | None = None,
    projector: ProjectorLike = 'conv_bn',
    stop_at: float | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Match the teacher's features before the ReLU, except for negative values that the ReLU sets
    to 0 anyway (overhaul of feature distillation, arXiv:1904.01866).

    Args:
        layers: As in `Term`. For best results, name layers whose values are taken before the ReLU.
            For an exact margin, name the output of a batch norm, e.g. 'layer3.1.bn2@pre'.
        weight: 'paper' is 10, the authors' weight for ImageNet with a ResNet-50, converted to a
            loss that averages over elements. The converted weight for CIFAR is 16.
        projector: As in `Term`. The default is the authors' choice.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses, measured at the layers of the term. 0.1 if neither `weight` nor
            `grad_ratio` is given.
    """
    return layer_recipe(
        losses.OFD(), 10.0, layers, weight, stop_at, grad_ratio, projector=projector
    )


def vid(
    layers: LayersLike = 'auto',
    weight: ScheduleLike | None = None,
    projector: ProjectorLike = 'mlp',
    stop_at: float | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Match the teacher's features, with a learned weight for each channel (variational information
    distillation, arXiv:1904.05835).

    Args:
        weight: 'paper' is 1, the weight in RepDistiller.
        projector: As in `Term`. The default consists of 1x1 convolutions, as in RepDistiller.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses, measured at the layers of the term. 0.1 if neither `weight` nor
            `grad_ratio` is given.
    """
    return layer_recipe(losses.VID(), 1.0, layers, weight, stop_at, grad_ratio, projector=projector)


def pkd(
    layers: LayersLike = 'auto',
    weight: ScheduleLike | None = None,
    projector: ProjectorLike = 'auto',
    stop_at: float | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Maximize the correlation of each channel with the teacher's channel, independent of the scale
    of the features (PKD, arXiv:2207.02039).

    Args:
        layers: As in `Term`. The authors used the levels of a detector's feature pyramid.
        weight: 'paper' is 6, the authors' weight for two-stage detectors. For RetinaNet, the
            authors use 10.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses, measured at the layers of the term. 0.1 if neither `weight` nor
            `grad_ratio` is given.
    """
    return layer_recipe(losses.pkd, 6.0, layers, weight, stop_at, grad_ratio, projector=projector)


def rkd(
    layers: LayersLike = 'last@mean',
    weight: ScheduleLike | None = None,
    w_d: float = 25.0,
    w_a: float = 50.0,
    stop_at: float | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Match the distances and angles between samples (relational KD, arXiv:1904.05068).

    Args:
        layers: As in `Term`. The default compares pooled features, as in the paper.
        weight: 'paper' is 1.
        w_d: Weight of the distances.
        w_a: Weight of the angles.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses, measured at the layers of the term. 0.1 if neither `weight` nor
            `grad_ratio` is given.
    """
    return layer_recipe(losses.rkd, 1.0, layers, weight, stop_at, grad_ratio, w_d=w_d, w_a=w_a)


def sp(
    layers: LayersLike = 'last',
    weight: ScheduleLike | None = None,
    stop_at: float | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Match which samples of a batch are similar (similarity-preserving KD, arXiv:1907.09682).

    Args:
        layers: As in `Term`. The default is the authors' choice.
        weight: 'paper' is 3000, the authors' weight for batches of 64.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses, measured at the layers of the term. 0.1 if neither `weight` nor
            `grad_ratio` is given.
    """
    return layer_recipe(losses.sp, 3000.0, layers, weight, stop_at, grad_ratio)


def cc(
    layers: LayersLike = 'last@mean',
    weight: ScheduleLike | None = None,
    kernel: str = 'gaussian',
    gamma: float = 0.4,
    stop_at: float | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Match which samples of a batch are similar, measured by a kernel (correlation congruence,
    arXiv:1904.01802).

    Args:
        weight: 'paper' is 100. We chose this value, because the paper does not give a weight for
            this form of the loss.
        kernel: 'gaussian' or 'bilinear'.
        gamma: Coefficient of the Gaussian kernel.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses, measured at the layers of the term. 0.1 if neither `weight` nor
            `grad_ratio` is given.
    """
    return layer_recipe(
        losses.cc, 100.0, layers, weight, stop_at, grad_ratio, kernel=kernel, gamma=gamma
    )


def pkt(
    layers: LayersLike = 'last@mean',
    weight: ScheduleLike | None = None,
    stop_at: float | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Match how similar each sample is to its neighbors in the batch, expressed as probabilities
    (probabilistic knowledge transfer, arXiv:1803.10837).

    Args:
        layers: As in `Term`. The default compares pooled features, as in RepDistiller.
        weight: 'paper' is 470. RepDistiller uses a weight of 30000 for batches of 64, which is
            converted here to the scale of our loss.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses, measured at the layers of the term. 0.1 if neither `weight` nor
            `grad_ratio` is given.
    """
    return layer_recipe(losses.pkt, 470.0, layers, weight, stop_at, grad_ratio)


def seed(
    layers: LayersLike = 'embedding',
    weight: ScheduleLike | None = None,
    size: int = 4096,
    T_s: float = 0.2,
    T_t: float = 0.01,
    projector: ProjectorLike = 'auto',
    stop_at: float | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Match the similarities of each sample to a queue of teacher embeddings (self-supervised SEED,
    arXiv:2101.04731).

    Args:
        layers: As in `Term`. The default compares the inputs of both models' heads. If the teacher
            has no head, its output is used.
        weight: 'paper' is 1.
        size: Number of embeddings in the queue. The authors use 65,536 for ImageNet.
        T_s: Temperature of the student.
        T_t: Temperature of the teacher. For teachers trained on labels, 0.1 worked better in our
            tests.
        projector: As in `Term`. 'auto' is a linear layer if the sizes of the embeddings differ. The
            authors use 'mlp'.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses, measured at the layers of the term. 0.1 if neither `weight` nor
            `grad_ratio` is given.
    """
    loss = losses.SEED(size=size, T_s=T_s, T_t=T_t)
    return layer_recipe(loss, 1.0, layers, weight, stop_at, grad_ratio, projector=projector)


def ickd(
    layers: LayersLike = 'last',
    weight: ScheduleLike | None = None,
    projector: ProjectorLike = 'conv_bn',
    stop_at: float | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Match which channels are correlated (inter-channel correlation, Liu et al., ICCV 2021).

    Args:
        weight: 'paper' is 2.5, the authors' weight for CIFAR.
        projector: As in `Term`. The default is the authors' choice.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses, measured at the layers of the term. 0.1 if neither `weight` nor
            `grad_ratio` is given.
    """
    return layer_recipe(losses.ickd, 2.5, layers, weight, stop_at, grad_ratio, projector=projector)


@long_name_too
def cwd(
    layers: LayersLike | None = None,
    weight: ScheduleLike | None = None,
    T: ScheduleLike = 4.0,
    projector: ProjectorLike = 'auto',
    stop_at: float | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Match where in the image each channel is active, for dense prediction (channel-wise KD,
    arXiv:2011.13256).

    Args:
        layers: As in `Term`. None to compare the logits. Layers must have feature maps.
        weight: 'paper' is 3 for logits and 50 for features.
        grad_ratio: Use instead of `weight` (see `Term`). If neither is given, logits get the
            paper's weight, and features get a gradient ratio of 0.1.
    """
    if layers is None and weight is None and grad_ratio is None:
        weight = 'paper'
    paper = 3.0 if layers is None else 50.0
    return layer_recipe(
        losses.cwd, paper, layers, weight, stop_at, grad_ratio, projector=projector, T=T
    )


def pairwise(
    layers: LayersLike = 'last',
    weight: ScheduleLike | None = None,
    pool: float = 0.5,
    stop_at: float | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Match which positions of an image are similar, for dense prediction (structured KD,
    arXiv:1903.04197).

    Args:
        weight: 'paper' is 0.5, the authors' weight.
        pool: Size of a pooling cell in pixels. A value below 1 is a fraction of the height and
            width of the map.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses, measured at the layers of the term. 0.1 if neither `weight` nor
            `grad_ratio` is given.
    """
    return layer_recipe(losses.pairwise, 0.5, layers, weight, stop_at, grad_ratio, pool=pool)


def gram(
    layers: LayersLike = 'last@map',
    weight: ScheduleLike | None = None,
    stop_at: float | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Match which positions of an image are similar, like `pairwise` without pooling (DINOv3's Gram
    loss, arXiv:2508.10104).

    Args:
        layers: As in `Term`. The default compares feature maps, or the patch tokens of a
            transformer without class and register tokens. Use 'last' for text.
        weight: 'paper' is 2.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses, measured at the layers of the term. 0.1 if neither `weight` nor
            `grad_ratio` is given.
    """
    return layer_recipe(
        losses.pairwise, 2.0, layers, weight, stop_at, grad_ratio, pool=1, name='gram'
    )


def ifvd(
    layers: LayersLike = 'last',
    weight: ScheduleLike | None = None,
    stop_at: float | None = None,
    grad_ratio: ScheduleLike | None = None,
) -> Recipe:
    """Match how the features of a class vary around their mean, for dense prediction (Wang et al.,
    ECCV 2020).

    Args:
        weight: 'paper' is 200, the authors' weight.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all
            weighted losses, measured at the layers of the term. 0.1 if neither `weight` nor
            `grad_ratio` is given.
    """
    return layer_recipe(losses.ifvd, 200.0, layers, weight, stop_at, grad_ratio)


def pretrain(layers: LayersLike = 'embedding', projector: ProjectorLike = 'auto') -> Recipe:
    """Pretrain a backbone on unlabeled inputs by matching the direction of the teacher's
    embeddings.

    Args:
        layers: As in `Term`. The default compares the inputs of both models' heads. If the teacher
            has no head, its output is used.
        projector: As in `Term`. With 'mlp', the student's features depend less on the teacher's.
    """
    return Recipe(Term(losses.cosine, layers=layers, projector=projector), task=0.0)
