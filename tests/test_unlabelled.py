"Inputs without labels beside the labelled batches: the teacher alone teaches there, in every application."
import pytest, torch
import torch.nn.functional as F
from torch import nn
import apps
from apps import APPS, pair, toy
from fastai.basics import Callback, CancelFitException, DataLoader, L
from fastdistill import Distiller, Outputs, Recipe
from fastdistill.fastai import DistillError, KnowledgeDistillation, Term, dkd, kd, losses, recipes, soft_labels
from fastdistill.fastai.unlabelled import perturbed_rows

pytestmark = pytest.mark.filterwarnings(*apps.FASTAI_WARNINGS)


def KD(teacher, *args, **kwargs): return KnowledgeDistillation(teacher, *args, check=False, **kwargs)

class First(Callback):
    "Keep the first step's gradients and inputs, and stop"
    order = 8
    def after_backward(self):
        self.grads,self.batch = [p.grad.clone() for p in self.model.parameters()],(self.x, self.y)
        raise CancelFitException


def test_a_step_is_the_labelled_batch_and_the_teacher_alone_on_the_other():
    student,teacher = toy()
    more = torch.randn(24, 8, generator=torch.Generator().manual_seed(5))
    first = First()
    student.fit(1, .1, cbs=[KD(teacher, kd(2., .7) + recipes.dist(share=.5), unlabelled=[(o,) for o in DataLoader(more, bs=24)]), first])
    x,y = first.batch
    s,t,su,tu = student.model(x),teacher(x).detach(),student.model(more),teacher(more).detach()
    base = .3*F.cross_entropy(s, y) + .7*losses.kl(s, t, T=2.)
    length = lambda v: torch.autograd.grad(v, s, retain_graph=True)[0].norm()
    w = .5*length(base)/length(losses.dist(s, t))
    total = base + w.detach()*losses.dist(s, t) + .7*losses.kl(su, tu, T=2.) + w.detach()*losses.dist(su, tu)
    for a,b in zip(first.grads, torch.autograd.grad(total, list(student.model.parameters()))): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_layers_are_compared_there_too_and_terms_that_read_labels_are_not():
    torch.manual_seed(0)
    net = lambda h: nn.Sequential(nn.Linear(8, h), nn.ReLU(), nn.Linear(h, 4))
    student,teacher,x = net(6),net(9),torch.randn(5, 8)
    d = Distiller(student, teacher, Recipe(Term(losses.hint, .2, layers={'1': '1'}, projector='linear'), *dkd().terms, *kd(3., .6).terms), example=x)
    f,s = student[:2](x),student(x)
    got = d.without_labels(Outputs(s, {'1': f}), d.teacher_outputs(x))
    want = .2*losses.hint(d.links['hint'][0].projector(f, teacher[:2](x)), teacher[:2](x)) + .6*losses.kl(s, teacher(x), T=3.)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


def items_of(app, learn):
    "More inputs of the kind that the learner's own items are"
    if app.name == 'tabular': return apps.table(20, seed=3).drop(columns='kind')
    if app.name.startswith('collab'): return apps.ratings(20, seed=3).drop(columns='rating')
    return L(learn.dls.train_ds.items)[:8] if hasattr(learn.dls.train_ds, 'tls') else None

@pytest.mark.parametrize('app', [a for a in APPS if a.name != 'language_model'], ids=lambda a: a.name)
def test_every_application_takes_items_without_labels(app):
    student,teacher = pair(app)
    items = items_of(app, student)
    if items is None: items = DataLoader(student.dls.train_ds, bs=4)
    calls = []
    class Count(nn.Module):
        def __init__(self, model): super().__init__(); self.model = model
        def forward(self, *x): calls.append(len(apps.plain(x)[0])); return self.model(*x)
        def reset(self): getattr(self.model, 'reset', lambda: None)()
    cb = KD(teacher, soft_labels(2.) if app.kind != 'regression' else kd(alpha=.5), unlabelled=items)
    steps = []
    class Steps(Callback):
        def after_batch(self):
            if self.training: steps.append(self.loss.item())
    student.fit(1, app.lr, cbs=[cb, Steps()])
    assert len(steps) == len(student.dls.train) and all(s == s for s in steps)
    assert cb.unlabelled.iterator is None and student.recorder.values


def test_items_get_the_training_sets_augmentation_and_are_all_used():
    student,teacher = pair('image')
    items = L(student.dls.train_ds.items)
    from fastdistill.fastai.unlabelled import loader_of
    loader = loader_of(items, student)
    assert loader.after_batch.fs == student.dls.train.after_batch.fs and loader.after_item.fs == student.dls.train.after_item.fs
    assert sum(len(b[0]) for b in loader) > len(items) - loader.bs and all(len(b) == 1 for b in loader)


def test_what_goes_wrong_is_said_before_the_first_batch(tmp_path):
    student,teacher = toy()
    more = DataLoader(torch.randn(24, 8), bs=8)
    with pytest.raises(DistillError, match='all terms read labels .dkd.: *.*Add one that reads none|all terms read labels'):
        student.fit(1, cbs=KD(teacher, dkd(), unlabelled=more))
    with pytest.raises(DistillError, match='need a teacher that runs'): KD(None, unlabelled=more)
    with pytest.raises(DistillError, match='there are no items in it'): student.fit(1, cbs=KD(teacher, unlabelled=[]))
    with pytest.raises(DistillError, match='perturbed=-1: it is how many rows'): KD(teacher, perturbed=-1)
    lm,big = pair('language_model')
    with pytest.raises(DistillError, match='A language model needs no labels: add the texts to its training set'): lm.fit(1, cbs=KD(big, unlabelled=['a']))
    image,big = pair('image')
    with pytest.raises(DistillError, match='perturbed= is for tables, with rows of numbers'): image.fit(1, cbs=KD(big, perturbed=2))
    with pytest.raises(DistillError, match="these items can't be prepared as the training set's are"): image.fit(1, cbs=KD(big, unlabelled=[object()]))


# tables

def test_a_perturbed_row_has_cells_of_its_column_and_most_of_its_own():
    torch.manual_seed(0)
    cats,conts = torch.randint(50, (64, 3)),torch.randn(64, 4)
    a,b = perturbed_rows((cats, conts), 5)
    assert a.shape == (320, 3) and b.shape == (320, 4) and a.dtype == cats.dtype
    for old,new in ((cats, a), (conts, b)):
        for c in range(old.shape[1]): assert set(new[:, c].tolist()) <= set(old[:, c].tolist())
    assert .05 < (b != conts.repeat(5, 1)).float().mean() < .15

def test_a_table_is_perturbed_by_one_argument():
    student,teacher = pair('tabular')
    seen = []
    tap = teacher.model.register_forward_hook(lambda m, x, y: seen.append(len(y)))
    student.distill(teacher, 1, .01, kd(1., .5), perturbed=3, check=False)
    tap.remove()
    bs = student.dls.train.bs
    assert 3*bs in seen and bs in seen

def test_without_either_nothing_changes():
    runs = []
    for options in ({}, dict(unlabelled=None, perturbed=0)):
        student,teacher = toy()
        student.fit(1, .1, cbs=KD(teacher, **options))
        runs.append([p.detach().clone() for p in student.model.parameters()])
    assert all(map(torch.equal, *runs))
