"Recipes: functions that return terms with their paper's defaults. `+` joins them."

import copy

from .. import losses
from ..base.outputs import DistillError
from ..losses._base import loss
from .schedule import rest_of, schedule
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
def kl_per_class(s, t, *, T=4.0, axis=1, mask=None, reduction='mean'):
    """`kl` divided by the number of classes too, as `nn.KLDivLoss()` and `F.kl_div(...,
    reduction='mean')` do.
    """
    return losses.kl(s, t, T=T, axis=axis, mask=mask, reduction=reduction) / s.shape[axis]


@long_name_too
def kd(T=4.0, alpha=0.9, class_mean: bool = False):
    """alpha T^2 KL(teacher || student) + (1-alpha) labels (Hinton 2015, arXiv:1503.02531), in the
    form that fits what the model predicts: softmax over classes, sigmoid per label (multi-label),
    or numbers (regression, where T has no meaning).

    Args:
        T: Temperature, number or schedule; `temperature=` is the same.
        alpha: Weight of the teacher; the labels have 1-alpha. Number or schedule.
        class_mean: Average over classes too: the scale of older scripts; the same as an alpha
            that is smaller.
    """
    alpha = schedule(alpha, 'alpha')
    if not callable(alpha) and not 0 <= alpha <= 1:
        raise DistillError(
            f"alpha={alpha}: it is the teacher's share, from 0 (labels alone) to 1 (teacher alone)"
        )
    return Recipe(
        Term(kl_per_class if class_mean else losses.soft_targets, weight=alpha, T=T, name='kd'),
        task=rest_of(alpha),
    )


@long_name_too
def soft_labels(T=1.0):
    """The teacher alone makes the labels: kd with alpha 1. Batches need no labels."""
    return kd(T, alpha=1.0)


def hard_labels(alpha=1.0):
    """Cross-entropy with the class that the teacher would choose (DeiT, arXiv:2012.12877).

    Args:
        alpha: Weight of the teacher's labels; the true ones have 1-alpha (DeiT: .5).
    """
    alpha = schedule(alpha, 'alpha')
    return Recipe(Term(losses.hard, weight=alpha, name='hard'), task=rest_of(alpha))


@long_name_too
def dkd(alpha: float = 1.0, beta: float = 8.0, T=4.0, weight=None, grad_ratio=None):
    """Decoupled distillation beside the task loss (CVPR 2022, arXiv:2203.08679).

    Args:
        alpha: Weight of the target class's part.
        beta: Weight of the other classes' part: the authors' for CIFAR-100 2 to 8, by pair; for
            ImageNet .5.
        T: Temperature.
        weight: Of both; the authors let it grow over the first 20 of 240 epochs: ('warmup',
            1.).
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, see `Term`.
    """
    return Recipe(
        Term(
            losses.dkd,
            weight=weight,
            grad_ratio=grad_ratio,
            alpha=alpha,
            beta=beta,
            T=T,
            name='dkd',
        )
    )


@long_name_too
def nkd(gamma: float = 1.5, T=1.0, weight=None, grad_ratio=None):
    """Normalized distillation beside the task loss (ICCV 2023, arXiv:2303.13005).

    Args:
        gamma: Weight of the other classes' part: the authors' for ImageNet; for CIFAR-100 3.5,
            with T=3.
        T: Temperature of that part.
        weight: 1 if neither weight nor grad_ratio is given.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, see `Term`.
    """
    return Recipe(
        Term(losses.nkd, weight=weight, grad_ratio=grad_ratio, gamma=gamma, T=T, name='nkd')
    )


@long_name_too
def dist(beta: float = 1.0, gamma: float = 1.0, T=1.0, weight=None, grad_ratio=None):
    """Correlation between and within classes, beside the task loss (NeurIPS 2022,
    arXiv:2205.10536).

    Args:
        beta: Weight of the relation between classes; the authors' CIFAR-100: 2.
        gamma: Weight of the relation within a class; CIFAR-100: 2.
        T: 4 for CIFAR-100.
        weight: 1 if neither weight nor grad_ratio is given.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, see `Term`.
    """
    return Recipe(
        Term(
            losses.dist,
            weight=weight,
            grad_ratio=grad_ratio,
            beta=beta,
            gamma=gamma,
            T=T,
            name='dist',
        )
    )


@long_name_too
def ttm(T=4.0, weight=None, grad_ratio=None):
    """The student predicts the teacher's softened probabilities themselves, beside the labels' own
    loss (ICLR 2024, arXiv:2402.11148).

    Args:
        T: Temperature of the teacher alone.
        weight: Ours; the authors' is searched for each pair of models.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, see `Term`.
    """
    return Recipe(Term(losses.ttm, weight=weight, grad_ratio=grad_ratio, T=T, name='ttm'))


@long_name_too
def uld(T=1.0, weight=None, grad_ratio=None):
    """Sorted probabilities, of a teacher with another vocabulary, beside the task loss (TMLR
    2025, arXiv:2402.12030).

    Args:
        weight: The authors': 1.5; 1 if neither weight nor grad_ratio is given.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, see `Term`.
    """
    return Recipe(Term(losses.uld, weight=weight, grad_ratio=grad_ratio, T=T, name='uld'))


@long_name_too
def wttm(T=4.0, weight=None, grad_ratio=None):
    """`ttm` with more weight where the teacher is unsure, beside the task loss (ICLR 2024,
    arXiv:2402.11148).

    Args:
        T: Temperature of the teacher alone.
        weight: Ours; the authors' is searched for each pair of models.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, see `Term`.
    """
    return Recipe(Term(losses.wttm, weight=weight, grad_ratio=grad_ratio, T=T, name='wttm'))


@long_name_too
def abkd(alpha: float = 0.8, beta: float = 0.3, T=4.0, weight=None, grad_ratio=None):
    """A divergence between forward and reverse KL beside the task loss (ICML 2025,
    arXiv:2505.04560).

    Args:
        alpha: The authors' for CIFAR-100, ResNet-56 -> 20; (1, 0) is forward and (0, 1) reverse
            KL.
        weight: 2 if neither weight nor grad_ratio is given: the authors' 32 for that pair, without
            our T^2.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, see `Term`.
    """
    weight = 2.0 if weight is None and grad_ratio is None else weight
    return Recipe(
        Term(
            losses.abkd,
            weight=weight,
            grad_ratio=grad_ratio,
            alpha=alpha,
            beta=beta,
            T=T,
            name='abkd',
        )
    )


@long_name_too
def rld(alpha: float = 1.0, beta: float = 8.0, T=4.0, weight=None, grad_ratio=None):
    """Distillation without the classes that the teacher finds more likely than the label, beside
    the task loss (ICCV 2025, arXiv:2408.07703).

    Args:
        alpha: Weight of the label's certainty.
        beta: Weight of the classes that the teacher finds less likely than the label.
        weight: Of both.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, see `Term`.
    """
    return Recipe(
        Term(
            losses.rld,
            weight=weight,
            grad_ratio=grad_ratio,
            alpha=alpha,
            beta=beta,
            T=T,
            name='rld',
        )
    )


@long_name_too
def taid(start: float = 0.4, T=1.0, weight=None, grad_ratio=None):
    """A target that moves from the student to the teacher while training goes on (TAID, ICLR 2025,
    arXiv:2501.16937).

    Args:
        start: The teacher's share of the target at the beginning, the authors'; it grows to 1.
        weight: Ours; Recipe(taid(), task=0.) trains on this term alone.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, see `Term`.
    """
    return Recipe(
        Term(
            losses.taid,
            weight=weight,
            grad_ratio=grad_ratio,
            lam=('linear', start, 1.0),
            T=T,
            name='taid',
        )
    )


def logit_std(recipe):
    """Logit standardization of any recipe (CVPR 2024, arXiv:2403.01427). The authors weigh it with
    9 beside labels with .1: Recipe(Term(losses.standardized(losses.kl), weight=9., T=2.), task=.1).

    Args:
        recipe: e.g. kd(T=2., alpha=.9): its terms on logits get both logits standardized.
    """

    def std(t):
        if t.layers is not None:
            return t
        t = copy.copy(t)
        t.loss = losses.standardized(t.loss)
        return t

    recipe = Recipe(recipe)
    return Recipe(*map(std, recipe.terms), task=recipe.task)


# between layers, beside the task loss (or kd()): `layers` as in `Term`. Papers' weights have scales of their
# networks, so that without weight= and share= a term begins with this share of the gradient
GRAD_RATIO = 0.1


def scaled(weight, grad_ratio, paper):
    """Options of a `Term` between layers.

    Args:
        weight: Number or schedule; 'paper'; None: not given.
        grad_ratio: Number or schedule; None if it was not given.
        paper: The weight of the paper or of its authors' code.
    """
    if weight is None and grad_ratio is None:
        return dict(grad_ratio=GRAD_RATIO)
    return dict(
        weight=paper if isinstance(weight, str) and weight == 'paper' else weight,
        grad_ratio=grad_ratio,
    )


def hint(layers='auto', weight=None, projector='auto', stop_at=None, grad_ratio=None):
    """The teacher's features themselves (FitNets, arXiv:1412.6550).

    Args:
        layers: FitNets took one layer in the middle.
        weight: 'paper': 100, RepDistiller's.
        projector: The paper's is a convolution.
        stop_at: FitNets' hint was a first phase: a share of the training.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, measured at its layers; 0.1 if neither is given.
    """
    return Recipe(
        Term(
            losses.hint,
            **scaled(weight, grad_ratio, 100.0),
            layers=layers,
            projector=projector,
            stop_at=stop_at,
        )
    )


def at(layers='auto', weight=None, p: float = 2.0, stop_at=None, grad_ratio=None):
    """Where the activations are (attention transfer, arXiv:1612.03928).

    Args:
        layers: The end of each stage, as in the paper.
        weight: 'paper': 1000, the authors'.
        p: Exponent of the activations.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, measured at its layers; 0.1 if neither is given.
    """
    return Recipe(
        Term(losses.at, **scaled(weight, grad_ratio, 1000.0), layers=layers, stop_at=stop_at, p=p)
    )


def nst(layers='last', weight=None, stop_at=None, grad_ratio=None):
    """Which patterns the channels select (neuron selectivity transfer, arXiv:1707.01219).

    Args:
        layers: As in the paper.
        weight: 'paper': 50, the authors'.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, measured at its layers; 0.1 if neither is given.
    """
    return Recipe(
        Term(losses.nst, **scaled(weight, grad_ratio, 50.0), layers=layers, stop_at=stop_at)
    )


def fsp(layers='auto', weight=None, projector='auto', stop_at=None, grad_ratio=None):
    """How one layer's features become the next one's (Yim et al., CVPR 2017).

    Args:
        layers: The ends of the stages.
        weight: 'paper': 1.
        projector: Where channels differ.
        stop_at: The paper's was a first phase.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, measured at its layers; 0.1 if neither is given.
    """
    return Recipe(
        Term(
            losses.fsp,
            **scaled(weight, grad_ratio, 1.0),
            layers=layers,
            projector=projector,
            stop_at=stop_at,
        )
    )


def ab(
    layers='auto', weight=None, margin: float = 1.0, projector='auto', stop_at=None, grad_ratio=None
):
    """Which neurons are active (activation boundaries, arXiv:1811.03233).

    Args:
        layers: Better by hand: values before the ReLU, as '0.7.1.relu@in'.
        weight: 'paper': 50, the authors' .003 x channels x positions of a CIFAR net's last
            stage.
        stop_at: The paper's was a first phase.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, measured at its layers; 0.1 if neither is given.
    """
    how = scaled(weight, grad_ratio, 50.0)
    return Recipe(
        Term(losses.ab, **how, layers=layers, projector=projector, stop_at=stop_at, margin=margin)
    )


def ofd(layers='auto', weight=None, projector='conv_bn', stop_at=None, grad_ratio=None):
    """The teacher's features before the ReLU, as far as they matter after it (overhaul of feature
    distillation, arXiv:1904.01866).

    Args:
        layers: Better by hand: values before the ReLU; of a batch norm ('layer3.1.bn2@pre') for
            an exact margin.
        weight: 'paper': 10, the authors' for ImageNet with a ResNet-50, in this scale; 16 for
            CIFAR.
        projector: The authors'.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, measured at its layers; 0.1 if neither is given.
    """
    return Recipe(
        Term(
            losses.OFD(),
            **scaled(weight, grad_ratio, 10.0),
            layers=layers,
            projector=projector,
            stop_at=stop_at,
        )
    )


def vid(layers='auto', weight=None, projector='mlp', stop_at=None, grad_ratio=None):
    """The teacher's features, each channel as exactly as it can be foreseen (variational
    information distillation, arXiv:1904.05835).

    Args:
        weight: 'paper': 1, RepDistiller's.
        projector: RepDistiller's, of 1x1 convolutions.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, measured at its layers; 0.1 if neither is given.
    """
    return Recipe(
        Term(
            losses.VID(),
            **scaled(weight, grad_ratio, 1.0),
            layers=layers,
            projector=projector,
            stop_at=stop_at,
        )
    )


def pkd(layers='auto', weight=None, projector='auto', stop_at=None, grad_ratio=None):
    """The teacher's features but for their scale: correlation of each channel (PKD,
    arXiv:2207.02039).

    Args:
        layers: The authors took the levels of a detector's feature pyramid.
        weight: 'paper': 6, theirs for two-stage detectors; 10 for RetinaNet.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, measured at its layers; 0.1 if neither is given.
    """
    return Recipe(
        Term(
            losses.pkd,
            **scaled(weight, grad_ratio, 6.0),
            layers=layers,
            projector=projector,
            stop_at=stop_at,
        )
    )


def rkd(
    layers='last@mean',
    weight=None,
    w_d: float = 25.0,
    w_a: float = 50.0,
    stop_at=None,
    grad_ratio=None,
):
    """How far samples are from each other, and at which angles (relational KD, arXiv:1904.05068).

    Args:
        layers: Pooled features, as the authors.
        weight: 'paper': 1.
        w_d: Weight of the distances.
        w_a: And of the angles.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, measured at its layers; 0.1 if neither is given.
    """
    return Recipe(
        Term(
            losses.rkd,
            **scaled(weight, grad_ratio, 1.0),
            layers=layers,
            stop_at=stop_at,
            w_d=w_d,
            w_a=w_a,
        )
    )


def sp(layers='last', weight=None, stop_at=None, grad_ratio=None):
    """Which samples of a batch are alike (similarity-preserving KD, arXiv:1907.09682).

    Args:
        layers: As the authors.
        weight: 'paper': 3000, theirs, for batches of 64.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, measured at its layers; 0.1 if neither is given.
    """
    return Recipe(
        Term(losses.sp, **scaled(weight, grad_ratio, 3000.0), layers=layers, stop_at=stop_at)
    )


def cc(
    layers='last@mean',
    weight=None,
    kernel: str = 'gaussian',
    gamma: float = 0.4,
    stop_at=None,
    grad_ratio=None,
):
    """Which samples of a batch are alike, by a kernel (correlation congruence, arXiv:1904.01802).

    Args:
        weight: 'paper': 100, ours: none is published for the paper's form.
        kernel: Or 'bilinear'.
        gamma: Of the gaussian.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, measured at its layers; 0.1 if neither is given.
    """
    how = scaled(weight, grad_ratio, 100.0)
    return Recipe(
        Term(losses.cc, **how, layers=layers, stop_at=stop_at, kernel=kernel, gamma=gamma)
    )


def pkt(layers='last@mean', weight=None, stop_at=None, grad_ratio=None):
    """Who are a sample's neighbors, as probabilities (probabilistic knowledge transfer,
    arXiv:1803.10837).

    Args:
        layers: Pooled features, as RepDistiller.
        weight: 'paper': 470, its 30000 for batches of 64, in this scale.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, measured at its layers; 0.1 if neither is given.
    """
    return Recipe(
        Term(losses.pkt, **scaled(weight, grad_ratio, 470.0), layers=layers, stop_at=stop_at)
    )


def seed(
    layers='embedding',
    weight=None,
    size: int = 4096,
    T_s: float = 0.2,
    T_t: float = 0.01,
    projector='auto',
    stop_at=None,
    grad_ratio=None,
):
    """Which of many samples are similar, by a queue of teacher embeddings (self-supervised SEED,
    arXiv:2101.04731).

    Args:
        layers: Both models' vectors before their heads; of a teacher without a head, its
            output.
        weight: 'paper': 1.
        size: Embeddings in the queue; the authors' for ImageNet: 65536.
        T_s: Temperature of the student.
        T_t: Of the teacher; .1 was better with one that was trained on labels.
        projector: Linear where sizes differ; the authors' is 'mlp'.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, measured at its layers; 0.1 if neither is given.
    """
    loss, how = losses.SEED(size=size, T_s=T_s, T_t=T_t), scaled(weight, grad_ratio, 1.0)
    return Recipe(Term(loss, **how, layers=layers, projector=projector, stop_at=stop_at))


def ickd(layers='last', weight=None, projector='conv_bn', stop_at=None, grad_ratio=None):
    """Which channels go together (inter-channel correlation, Liu et al., ICCV 2021).

    Args:
        weight: 'paper': 2.5, the authors' for CIFAR.
        projector: Theirs.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, measured at its layers; 0.1 if neither is given.
    """
    return Recipe(
        Term(
            losses.ickd,
            **scaled(weight, grad_ratio, 2.5),
            layers=layers,
            projector=projector,
            stop_at=stop_at,
        )
    )


@long_name_too
def cwd(layers=None, weight=None, T=4.0, projector='auto', stop_at=None, grad_ratio=None):
    """Where in the picture each channel is, for dense prediction (channel-wise KD,
    arXiv:2011.13256).

    Args:
        layers: The logits, or layers of maps.
        weight: 'paper': 3 on logits, 50 on features.
        grad_ratio: Use instead of `weight`. If neither is given: the paper's weight on logits, a ratio
            of 0.1 on features.
    """
    if layers is None and weight is None and grad_ratio is None:
        weight = 'paper'
    how = scaled(weight, grad_ratio, 3.0 if layers is None else 50.0)
    return Recipe(Term(losses.cwd, **how, layers=layers, projector=projector, stop_at=stop_at, T=T))


def pairwise(layers='last', weight=None, pool=0.5, stop_at=None, grad_ratio=None):
    """Which places of a picture are alike, for dense prediction (structured KD, arXiv:1903.04197).

    Args:
        weight: 'paper': .5, the authors'.
        pool: Size of a cell: pixels, or a share of the map.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, measured at its layers; 0.1 if neither is given.
    """
    return Recipe(
        Term(
            losses.pairwise,
            **scaled(weight, grad_ratio, 0.5),
            layers=layers,
            stop_at=stop_at,
            pool=pool,
        )
    )


def gram(layers='last@map', weight=None, stop_at=None, grad_ratio=None):
    """Which places of a picture are similar: `pairwise` of single positions (DINOv3's Gram loss,
    arXiv:2508.10104).

    Args:
        layers: Maps, and tokens without class and register tokens; for texts 'last'.
        weight: 'paper': 2.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, measured at its layers; 0.1 if neither is given.
    """
    how = scaled(weight, grad_ratio, 2.0)
    return Recipe(Term(losses.pairwise, **how, layers=layers, stop_at=stop_at, pool=1, name='gram'))


def ifvd(layers='last', weight=None, stop_at=None, grad_ratio=None):
    """How pixels of a class vary around their mean, for dense prediction (Wang et al., ECCV 2020).

    Args:
        weight: 'paper': 200, the authors'.
        grad_ratio: Use instead of `weight`: ratio of this term's gradient norm to that of all weighted
            losses, measured at its layers; 0.1 if neither is given.
    """
    return Recipe(
        Term(losses.ifvd, **scaled(weight, grad_ratio, 200.0), layers=layers, stop_at=stop_at)
    )


def pretrain(layers='embedding', projector='auto'):
    """The teacher's embeddings alone, as directions: no labels, for a backbone that is fine-tuned
    afterwards.

    Args:
        layers: Both models' vectors before their heads; of a teacher without a head, its
            output.
        projector: 'mlp' keeps more of the student's features its own.
    """
    return Recipe(Term(losses.cosine, layers=layers, projector=projector), task=0.0)
