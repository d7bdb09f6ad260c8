"What is compared: recipes of the library, and recipes that other tools suggest, in its words."

from collections.abc import Callable
from dataclasses import dataclass
import torch.nn.functional as F
from fastdistill import Recipe, Term, at, auto, dist, dkd, hint, kd, losses, soft_labels
from fastdistill.recipes import abkd, nkd, rld, taid, ttm, wttm
from fastdistill.recipes.default import softening_temperature

PLAIN = 'classes pixels tokens labels numbers'
SOFT = 'classes pixels tokens'  # softmax


@dataclass(frozen=True)
class Candidate:
    "A recipe, and for which outputs it is"

    name: str
    recipe: Callable  # () -> Recipe, or None for labels alone
    outputs: str = SOFT
    tier: str = 'core'  # 'peer': suggested by another tool; the others said in which order protocol 1 ran them
    smoothing: float = 0.0  # of the labels, in protocol 1
    classes: int = 1  # fewest that it is for
    tasks: str = ''  # these alone
    measures: bool = False  # `recipe` gets the teacher's outputs for the training set
    shown: str = (
        ''  # its name in the tables, if the result files have a name that does not say what it is
    )

    def fits(self, cell, classes):
        return (
            cell.output in self.outputs.split()
            and classes >= self.classes
            and (not self.tasks or cell.task in self.tasks.split())
        )


def alone():
    return None


def default(t, rows=2048):
    "The library's, which looks at the teacher's outputs for some training items"
    t = t.reshape(-1, t.shape[-1])
    return auto(classes=t.shape[-1], teacher=t[:: max(len(t) // rows, 1)])


def varied(even=0.9, beta=2.0, gamma=2.0, ratio=3.0, fade=1.0):
    "The library's default for classes, with other constants"
    return lambda t: dist(
        T=float(f'{softening_temperature(t, even):.2g}'),
        beta=beta,
        gamma=gamma,
        grad_ratio=ratio,
        fade=fade,
    )


def share(loss, r, **options):
    return lambda: Recipe(Term(loss, grad_ratio=r, **options))


C = Candidate
CANDIDATES = [
    C('labels', alone, PLAIN),
    C('kd(1,.9)', lambda: kd(1.0, 0.9)),
    C('soft(1)', lambda: soft_labels(1.0), PLAIN),
    C('kl(1)x3', share(losses.kl, 3.0, T=1.0)),
    C('kl(2)x3', share(losses.kl, 3.0, T=2.0)),
    C('kl(4)x3', share(losses.kl, 3.0, T=4.0)),
    C('dist(4)x3', lambda: dist(T=4.0, beta=2.0, gamma=2.0, grad_ratio=3.0)),
    C('kd(4,.9)', lambda: kd(4.0, 0.9)),
    C('kd(1,.5)', lambda: kd(1.0, 0.5)),
    C('binary(1)x1', share(losses.binary_kl, 1.0, T=1.0), 'labels'),
    C('binary(1)x3', share(losses.binary_kl, 3.0, T=1.0), 'labels'),
    C('kd(.5)', lambda: kd(1.0, 0.5), 'labels numbers'),
    C('kd(.9)', lambda: kd(1.0, 0.9), 'labels numbers'),
    C('regressionx1', share(losses.regression, 1.0), 'numbers'),
    C('regressionx3', share(losses.regression, 3.0), 'numbers'),
    C('cwd(4)w3', lambda: Recipe(Term(losses.cwd, weight=3.0, T=4.0)), 'pixels'),
    C('cwd(4)x1', share(losses.cwd, 1.0, T=4.0), 'pixels'),
    C('cwd(4)x3', share(losses.cwd, 3.0, T=4.0), 'pixels'),
    # suggested by other tools; tests/project/test_quality.py reads their defaults from the installed packages. fasterai: `SoftTarget` with its weight. timm: `LogitDistillationTask`
    # without a weight. torchdistill has no default; kd(1,.5) is its configuration for ImageNet, kd(4,.1) the one for CIFAR-10. Keras: its code example, T=10 and alpha=.1 for the labels;
    # its `Distiller` has T=3 and one half, kd(3,.5).
    C('kd(5,.5)', lambda: kd(5.0, 0.5), SOFT, 'peer'),
    C('timm', lambda: Recipe(Term(losses.kl, weight=1.0, T=1.0)), SOFT, 'peer', shown='kl(1)w1'),
    C('keras', lambda: kd(10.0, 0.9), SOFT, 'peer', shown='kd(10,.9)'),
    C(
        'fasterai', lambda: kd(20.0, 0.9), SOFT, 'more', shown='kd(20,.9)'
    ),  # the name is a mistake: fasterai suggests kd(5,.5)
    C('kd(3,.5)', lambda: kd(3.0, 0.5), SOFT, 'peer'),
    C('kd(4,.1)', lambda: kd(4.0, 0.1), SOFT, 'peer'),
    C(
        'mse(.5)',
        lambda: Recipe(Term(F.mse_loss, weight=0.5, name='mse'), task=0.5),
        'labels numbers',
        'peer',
    ),
    # where time allows
    C('smoothing', alone, 'classes pixels tokens labels', 'more', smoothing=0.1),
    C('kd(4,.9->.2)', lambda: kd(4.0, ('cosine', 0.9, 0.2)), SOFT, 'more'),
    C('dist(4)x1', lambda: dist(T=4.0, beta=2.0, gamma=2.0, grad_ratio=1.0), SOFT, 'more'),
    C('dist(4)x.3', lambda: dist(T=4.0, beta=2.0, gamma=2.0, grad_ratio=0.3), SOFT, 'more'),
    C(
        'dist(4)x10',
        lambda: dist(T=4.0, beta=2.0, gamma=2.0, grad_ratio=10.0),
        SOFT,
        'more',
        classes=3,
    ),
    C('dist(1)x3', lambda: dist(grad_ratio=3.0), SOFT, 'more', classes=3),
    C(
        'dist(10)x3',
        lambda: dist(T=10.0, beta=2.0, gamma=2.0, grad_ratio=3.0),
        SOFT,
        'more',
        classes=3,
    ),
    C('kd(1,.3)', lambda: kd(1.0, 0.3), SOFT, 'more'),
    C('dist(auto)x3', default, SOFT, 'more', classes=3, measures=True),
    C(
        'dist(20)x3',
        lambda: dist(T=20.0, beta=2.0, gamma=2.0, grad_ratio=3.0),
        SOFT,
        'more',
        classes=3,
    ),
    C('kl(1)x1', share(losses.kl, 1.0, T=1.0), SOFT, 'more'),
    C('kl(2)x1', share(losses.kl, 1.0, T=2.0), SOFT, 'more'),
    C('kl(4)x1', share(losses.kl, 1.0, T=4.0), SOFT, 'more'),
    C('ttm(2)x1', lambda: ttm(2.0, grad_ratio=1.0), SOFT, 'more'),
    C('ttm(4)x1', lambda: ttm(4.0, grad_ratio=1.0), SOFT, 'more'),
    C('ttm(2)x3', lambda: ttm(2.0, grad_ratio=3.0), SOFT, 'more'),
    C('dkdx1', lambda: dkd(grad_ratio=1.0), SOFT, 'more', classes=3),
    C('dkdx.3', lambda: dkd(grad_ratio=0.3), SOFT, 'more', classes=3),
    C(
        'logit_std(2)x1',
        share(losses.standardized(losses.kl), 1.0, T=2.0, name='logit_std'),
        'classes tokens',
        'more',
        classes=3,
    ),
    C(
        'logit_std(2)x3',
        share(losses.standardized(losses.kl), 3.0, T=2.0, name='logit_std'),
        'classes tokens',
        'more',
        classes=3,
    ),
    C('nkdx1', lambda: nkd(grad_ratio=1.0), SOFT, 'more', classes=3),
    C('taidx1', lambda: taid(grad_ratio=1.0), SOFT, 'more'),
    C('rldx1', lambda: rld(grad_ratio=1.0), SOFT, 'more', classes=3),
    C('abkdx1', lambda: abkd(grad_ratio=1.0), SOFT, 'more'),
    C('wttmx1', lambda: wttm(grad_ratio=1.0), SOFT, 'more'),
    C('skewedx1', share(losses.skewed_kl, 1.0), SOFT, 'more'),
    # the default with one of its constants changed
    *(
        C(f'default, {name}', varied(**options), SOFT, 'constant', classes=3, measures=True)
        for name, options in {
            'even .8': dict(even=0.8),
            'even .97': dict(even=0.97),
            'beta 1, gamma 3': dict(beta=1.0, gamma=3.0),
            'beta 3, gamma 1': dict(beta=3.0, gamma=1.0),
            'ratio 1': dict(ratio=1.0),
            'ratio 10': dict(ratio=10.0),
            'no fade': dict(fade=0.0),
            'fade .2': dict(fade=0.2),
            'fade .5': dict(fade=0.5),
        }.items()
    ),
    *(
        C(
            f'default of {outputs}, {name}',
            share(loss, r, fade=fade, **options),
            outputs,
            'constant',
        )
        for outputs, loss, options in (
            ('labels', losses.binary_kl, dict(T=1)),
            ('numbers', losses.regression, {}),
        )
        for name, r, fade in (
            ('ratio 0.3', 0.3, 0.2),
            ('ratio 1', 1.0, 0.2),
            ('ratio 10', 10.0, 0.2),
            ('no fade', 3.0, 0.0),
            ('fade .5', 3.0, 0.5),
            ('fade 1', 3.0, 1.0),
        )
    ),
    C('kd(.3)', lambda: kd(1.0, 0.3), 'labels', 'more'),
    C('kd(.1)', lambda: kd(1.0, 0.1), 'labels', 'more'),
    C('regressionx.3', share(losses.regression, 0.3), 'numbers', 'more'),
    C('binary(1)x.3', share(losses.binary_kl, 0.3, T=1.0), 'labels', 'more'),
    C('binary(2)x3', share(losses.binary_kl, 3.0, T=2.0), 'labels', 'more'),
    C('kd(4,.9)sigmoid', lambda: kd(4.0, 0.9), 'labels', 'more'),
    *(
        C(
            f'{n}x{r:g}',
            lambda f=f, r=r: f(grad_ratio=r),
            'classes numbers',
            'more',
            tasks='digits100 points cifar5000',
        )
        for n, f in dict(hint=hint, at=at).items()
        for r in (0.03, 0.1, 0.3, 1.0)
    ),
]
CANDIDATES = {c.name: c for c in CANDIDATES}
