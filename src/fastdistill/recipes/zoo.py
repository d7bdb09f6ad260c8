"Recipes: functions that return terms with their paper's defaults. `+` joins them."
import copy
from .. import losses
from ..losses._base import loss
from ..base.outputs import DistillError
from .schedule import rest_of, schedule
from .term import Recipe, Term, long_name_too

__all__ = ['ab', 'abkd', 'at', 'cc', 'cwd', 'dist', 'dkd', 'fsp', 'gram', 'hard_labels', 'hint', 'ickd', 'ifvd', 'kd',
           'logit_std', 'nkd', 'nst', 'ofd', 'pairwise', 'pkd', 'pkt', 'pretrain', 'rkd', 'rld', 'seed',
           'soft_labels', 'sp', 'taid', 'ttm', 'uld', 'vid', 'wttm']


@loss(kind='softmax', match='shape')
def kl_per_class(s, t, *, T=4., axis=1, mask=None, reduction='mean'):
    "`kl` divided by the number of classes too, as `nn.KLDivLoss()` and `F.kl_div(..., reduction='mean')` do"
    return losses.kl(s, t, T=T, axis=axis, mask=mask, reduction=reduction)/s.shape[axis]


@long_name_too
def kd(
    T=4., # temperature, number or schedule; `temperature=` is the same
    alpha=.9, # weight of the teacher; the labels have 1-alpha. Number or schedule
    class_mean:bool=False # average over classes too: the scale of older scripts; the same as an alpha that is smaller
):
    """alpha T^2 KL(teacher || student) + (1-alpha) labels (Hinton 2015, arXiv:1503.02531), in the form that fits what
    the model predicts: softmax over classes, sigmoid per label (multi-label), or numbers (regression, where T has no
    meaning)"""
    alpha = schedule(alpha, 'alpha')
    if not callable(alpha) and not 0 <= alpha <= 1:
        raise DistillError(f"alpha={alpha}: it is the teacher's share, from 0 (labels alone) to 1 (teacher alone)")
    return Recipe(Term(kl_per_class if class_mean else losses.soft_targets, weight=alpha, T=T, name='kd'),
                  task=rest_of(alpha))


@long_name_too
def soft_labels(T=1.):
    "The teacher alone makes the labels: kd with alpha 1. Batches need no labels"
    return kd(T, alpha=1.)


def hard_labels(
    alpha=1. # weight of the teacher's labels; the true ones have 1-alpha (DeiT: .5)
):
    "Cross-entropy with the class that the teacher would choose (DeiT, arXiv:2012.12877)"
    alpha = schedule(alpha, 'alpha')
    return Recipe(Term(losses.hard, weight=alpha, name='hard'), task=rest_of(alpha))


@long_name_too
def dkd(
    alpha:float=1., # weight of the target class's part
    beta:float=8., # weight of the other classes' part: the authors' for CIFAR-100 2 to 8, by pair; for ImageNet .5
    T=4., # temperature
    weight=None, # of both; the authors let it grow over the first 20 of 240 epochs: ('warmup', 1.)
    share=None # in place of a weight: the length of its gradient beside the labels', see `Term`
):
    "Decoupled distillation beside the labels' own loss (CVPR 2022, arXiv:2203.08679)"
    return Recipe(Term(losses.dkd, weight=weight, share=share, alpha=alpha, beta=beta, T=T, name='dkd'))


@long_name_too
def nkd(
    gamma:float=1.5, # weight of the other classes' part: the authors' for ImageNet; for CIFAR-100 3.5, with T=3
    T=1., # temperature of that part
    weight=None, # 1 if neither weight nor share is given
    share=None # in place of a weight: the length of its gradient beside the labels', see `Term`
):
    "Normalized distillation beside the labels' own loss (ICCV 2023, arXiv:2303.13005)"
    return Recipe(Term(losses.nkd, weight=weight, share=share, gamma=gamma, T=T, name='nkd'))


@long_name_too
def dist(
    beta:float=1., # weight of the relation between classes; the authors' CIFAR-100: 2
    gamma:float=1., # weight of the relation within a class; CIFAR-100: 2
    T=1., # 4 for CIFAR-100
    weight=None, # 1 if neither weight nor share is given
    share=None # in place of a weight: the length of its gradient beside the labels', see `Term`
):
    "Correlation between and within classes, beside the labels' own loss (NeurIPS 2022, arXiv:2205.10536)"
    return Recipe(Term(losses.dist, weight=weight, share=share, beta=beta, gamma=gamma, T=T, name='dist'))


@long_name_too
def ttm(
    T=4., # temperature of the teacher alone
    weight=None, # ours; the authors' is searched for each pair of models
    share=None # in place of a weight: the length of its gradient beside the labels', see `Term`
):
    """The student predicts the teacher's softened probabilities themselves, beside the labels' own loss (ICLR 2024,
    arXiv:2402.11148)"""
    return Recipe(Term(losses.ttm, weight=weight, share=share, T=T, name='ttm'))


@long_name_too
def uld(
    T=1.,
    weight=None, # the authors': 1.5; 1 if neither weight nor share is given
    share=None # in place of a weight: the length of its gradient beside the labels', see `Term`
):
    """Sorted probabilities, of a teacher with another vocabulary, beside the labels' own loss (TMLR 2025,
    arXiv:2402.12030)"""
    return Recipe(Term(losses.uld, weight=weight, share=share, T=T, name='uld'))


@long_name_too
def wttm(
    T=4., # temperature of the teacher alone
    weight=None, # ours; the authors' is searched for each pair of models
    share=None # in place of a weight: the length of its gradient beside the labels', see `Term`
):
    "`ttm` with more weight where the teacher is unsure, beside the labels' own loss (ICLR 2024, arXiv:2402.11148)"
    return Recipe(Term(losses.wttm, weight=weight, share=share, T=T, name='wttm'))


@long_name_too
def abkd(
    alpha:float=.8, # the authors' for CIFAR-100, ResNet-56 -> 20; (1, 0) is forward and (0, 1) reverse KL
    beta:float=.3,
    T=4.,
    weight=None, # 2 if neither weight nor share is given: the authors' 32 for that pair, without our T^2
    share=None # in place of a weight: the length of its gradient beside the labels', see `Term`
):
    "A divergence between forward and reverse KL beside the labels' own loss (ICML 2025, arXiv:2505.04560)"
    weight = 2. if weight is None and share is None else weight
    return Recipe(Term(losses.abkd, weight=weight, share=share, alpha=alpha, beta=beta, T=T, name='abkd'))


@long_name_too
def rld(
    alpha:float=1., # weight of the label's certainty
    beta:float=8., # weight of the classes that the teacher finds less likely than the label
    T=4.,
    weight=None, # of both
    share=None # in place of a weight: the length of its gradient beside the labels', see `Term`
):
    """Distillation without the classes that the teacher finds more likely than the label, beside the labels' own loss
    (ICCV 2025, arXiv:2408.07703)"""
    return Recipe(Term(losses.rld, weight=weight, share=share, alpha=alpha, beta=beta, T=T, name='rld'))


@long_name_too
def taid(
    start:float=.4, # the teacher's share of the target at the beginning, the authors'; it grows to 1
    T=1.,
    weight=None, # ours; Recipe(taid(), task=0.) trains on this term alone
    share=None # in place of a weight: the length of its gradient beside the labels', see `Term`
):
    "A target that moves from the student to the teacher while training goes on (TAID, ICLR 2025, arXiv:2501.16937)"
    return Recipe(Term(losses.taid, weight=weight, share=share, lam=('linear', start, 1.), T=T, name='taid'))


def logit_std(
    recipe # e.g. kd(T=2., alpha=.9): its terms on logits get both logits standardized
):
    """Logit standardization of any recipe (CVPR 2024, arXiv:2403.01427). The authors weigh it with 9 beside labels with
    .1: Recipe(Term(losses.standardized(losses.kl), weight=9., T=2.), task=.1)"""
    def std(t):
        if t.layers is not None: return t
        t = copy.copy(t)
        t.loss = losses.standardized(t.loss)
        return t
    recipe = Recipe(recipe)
    return Recipe(*map(std, recipe.terms), task=recipe.task)


# between layers, beside the labels' own loss (or kd()): `layers` as in `Term`. Papers' weights have scales of their
# networks, so that without weight= and share= a term begins with this share of the gradient
SHARE = .1

def scaled(
    weight, # number or schedule; 'paper'; None: not given
    share, # number or schedule; None: not given
    paper # the weight of the paper or of its authors' code
):
    "Options of a `Term` between layers"
    if weight is None and share is None: return dict(share=SHARE)
    return dict(weight=paper if isinstance(weight, str) and weight == 'paper' else weight, share=share)


def hint(
    layers='auto', # FitNets took one layer in the middle
    weight=None, # 'paper': 100, RepDistiller's
    projector='auto', # the paper's is a convolution
    stop_at=None, # FitNets' hint was a first phase: a share of the training
    share=None # in place of a weight; .1 if neither is given
):
    "The teacher's features themselves (FitNets, arXiv:1412.6550)"
    return Recipe(Term(losses.hint, **scaled(weight, share, 100.), layers=layers, projector=projector, stop_at=stop_at))


def at(
    layers='auto', # the end of each stage, as in the paper
    weight=None, # 'paper': 1000, the authors'
    p:float=2., # exponent of the activations
    stop_at=None,
    share=None # in place of a weight; .1 if neither is given
):
    "Where the activations are (attention transfer, arXiv:1612.03928)"
    return Recipe(Term(losses.at, **scaled(weight, share, 1000.), layers=layers, stop_at=stop_at, p=p))


def nst(
    layers='last', # as in the paper
    weight=None, # 'paper': 50, the authors'
    stop_at=None,
    share=None # in place of a weight; .1 if neither is given
):
    "Which patterns the channels select (neuron selectivity transfer, arXiv:1707.01219)"
    return Recipe(Term(losses.nst, **scaled(weight, share, 50.), layers=layers, stop_at=stop_at))


def fsp(
    layers='auto', # the ends of the stages
    weight=None, # 'paper': 1
    projector='auto', # where channels differ
    stop_at=None, # the paper's was a first phase
    share=None # in place of a weight; .1 if neither is given
):
    "How one layer's features become the next one's (Yim et al., CVPR 2017)"
    return Recipe(Term(losses.fsp, **scaled(weight, share, 1.), layers=layers, projector=projector, stop_at=stop_at))


def ab(
    layers='auto', # better by hand: values before the ReLU, as '0.7.1.relu@in'
    weight=None, # 'paper': 50, the authors' .003 x channels x positions of a CIFAR net's last stage
    margin:float=1.,
    projector='auto',
    stop_at=None, # the paper's was a first phase
    share=None # in place of a weight; .1 if neither is given
):
    "Which neurons are active (activation boundaries, arXiv:1811.03233)"
    how = scaled(weight, share, 50.)
    return Recipe(Term(losses.ab, **how, layers=layers, projector=projector, stop_at=stop_at, margin=margin))


def ofd(
    layers='auto', # better by hand: values before the ReLU; of a batch norm ('layer3.1.bn2@pre') for an exact margin
    weight=None, # 'paper': 10, the authors' for ImageNet with a ResNet-50, in this scale; 16 for CIFAR
    projector='conv_bn', # the authors'
    stop_at=None,
    share=None # in place of a weight; .1 if neither is given
):
    """The teacher's features before the ReLU, as far as they matter after it (overhaul of feature distillation,
    arXiv:1904.01866)"""
    return Recipe(Term(losses.OFD(), **scaled(weight, share, 10.), layers=layers, projector=projector, stop_at=stop_at))


def vid(
    layers='auto',
    weight=None, # 'paper': 1, RepDistiller's
    projector='mlp', # RepDistiller's, of 1x1 convolutions
    stop_at=None,
    share=None # in place of a weight; .1 if neither is given
):
    """The teacher's features, each channel as exactly as it can be foreseen (variational information distillation,
    arXiv:1904.05835)"""
    return Recipe(Term(losses.VID(), **scaled(weight, share, 1.), layers=layers, projector=projector, stop_at=stop_at))


def pkd(
    layers='auto', # the authors took the levels of a detector's feature pyramid
    weight=None, # 'paper': 6, theirs for two-stage detectors; 10 for RetinaNet
    projector='auto',
    stop_at=None,
    share=None # in place of a weight; .1 if neither is given
):
    "The teacher's features but for their scale: correlation of each channel (PKD, arXiv:2207.02039)"
    return Recipe(Term(losses.pkd, **scaled(weight, share, 6.), layers=layers, projector=projector, stop_at=stop_at))


def rkd(
    layers='last@mean', # pooled features, as the authors
    weight=None, # 'paper': 1
    w_d:float=25., # weight of the distances
    w_a:float=50., # and of the angles
    stop_at=None,
    share=None # in place of a weight; .1 if neither is given
):
    "How far samples are from each other, and at which angles (relational KD, arXiv:1904.05068)"
    return Recipe(Term(losses.rkd, **scaled(weight, share, 1.), layers=layers, stop_at=stop_at, w_d=w_d, w_a=w_a))


def sp(
    layers='last', # as the authors
    weight=None, # 'paper': 3000, theirs, for batches of 64
    stop_at=None,
    share=None # in place of a weight; .1 if neither is given
):
    "Which samples of a batch are alike (similarity-preserving KD, arXiv:1907.09682)"
    return Recipe(Term(losses.sp, **scaled(weight, share, 3000.), layers=layers, stop_at=stop_at))


def cc(
    layers='last@mean',
    weight=None, # 'paper': 100, ours: none is published for the paper's form
    kernel:str='gaussian', # or 'bilinear'
    gamma:float=.4, # of the gaussian
    stop_at=None,
    share=None # in place of a weight; .1 if neither is given
):
    "Which samples of a batch are alike, by a kernel (correlation congruence, arXiv:1904.01802)"
    how = scaled(weight, share, 100.)
    return Recipe(Term(losses.cc, **how, layers=layers, stop_at=stop_at, kernel=kernel, gamma=gamma))


def pkt(
    layers='last@mean', # pooled features, as RepDistiller
    weight=None, # 'paper': 470, its 30000 for batches of 64, in this scale
    stop_at=None,
    share=None # in place of a weight; .1 if neither is given
):
    "Who are a sample's neighbors, as probabilities (probabilistic knowledge transfer, arXiv:1803.10837)"
    return Recipe(Term(losses.pkt, **scaled(weight, share, 470.), layers=layers, stop_at=stop_at))


def seed(
    layers='embedding', # both models' vectors before their heads; of a teacher without a head, its output
    weight=None, # 'paper': 1
    size:int=4096, # embeddings in the queue; the authors' for ImageNet: 65536
    T_s:float=.2, # temperature of the student
    T_t:float=.01, # of the teacher; .1 was better with one that was trained on labels
    projector='auto', # linear where sizes differ; the authors' is 'mlp'
    stop_at=None,
    share=None # in place of a weight; .1 if neither is given
):
    "Which of many samples are similar, by a queue of teacher embeddings (self-supervised SEED, arXiv:2101.04731)"
    loss,how = losses.SEED(size=size, T_s=T_s, T_t=T_t),scaled(weight, share, 1.)
    return Recipe(Term(loss, **how, layers=layers, projector=projector, stop_at=stop_at))


def ickd(
    layers='last',
    weight=None, # 'paper': 2.5, the authors' for CIFAR
    projector='conv_bn', # theirs
    stop_at=None,
    share=None # in place of a weight; .1 if neither is given
):
    "Which channels go together (inter-channel correlation, Liu et al., ICCV 2021)"
    return Recipe(Term(losses.ickd, **scaled(weight, share, 2.5), layers=layers, projector=projector, stop_at=stop_at))


@long_name_too
def cwd(
    layers=None, # the logits, or layers of maps
    weight=None, # 'paper': 3 on logits, 50 on features
    T=4.,
    projector='auto',
    stop_at=None,
    share=None # in place of a weight. If neither is given, the paper's weight on logits and a share of .1 on features
):
    "Where in the picture each channel is, for dense prediction (channel-wise KD, arXiv:2011.13256)"
    if layers is None and weight is None and share is None: weight = 'paper'
    how = scaled(weight, share, 3. if layers is None else 50.)
    return Recipe(Term(losses.cwd, **how, layers=layers, projector=projector, stop_at=stop_at, T=T))


def pairwise(
    layers='last',
    weight=None, # 'paper': .5, the authors'
    pool=.5, # size of a cell: pixels, or a share of the map
    stop_at=None,
    share=None # in place of a weight; .1 if neither is given
):
    "Which places of a picture are alike, for dense prediction (structured KD, arXiv:1903.04197)"
    return Recipe(Term(losses.pairwise, **scaled(weight, share, .5), layers=layers, stop_at=stop_at, pool=pool))


def gram(
    layers='last@map', # maps, and tokens without class and register tokens; for texts 'last'
    weight=None, # 'paper': 2
    stop_at=None,
    share=None # in place of a weight; .1 if neither is given
):
    "Which places of a picture are similar: `pairwise` of single positions (DINOv3's Gram loss, arXiv:2508.10104)"
    how = scaled(weight, share, 2.)
    return Recipe(Term(losses.pairwise, **how, layers=layers, stop_at=stop_at, pool=1, name='gram'))


def ifvd(
    layers='last',
    weight=None, # 'paper': 200, the authors'
    stop_at=None,
    share=None # in place of a weight; .1 if neither is given
):
    "How pixels of a class vary around their mean, for dense prediction (Wang et al., ECCV 2020)"
    return Recipe(Term(losses.ifvd, **scaled(weight, share, 200.), layers=layers, stop_at=stop_at))


def pretrain(
    layers='embedding', # both models' vectors before their heads; of a teacher without a head, its output
    projector='auto' # 'mlp' keeps more of the student's features its own
):
    "The teacher's embeddings alone, as directions: no labels, for a backbone that is fine-tuned afterwards"
    return Recipe(Term(losses.cosine, layers=layers, projector=projector), task=0.)
