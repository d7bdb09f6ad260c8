"Teachers without a head: the embedding as the target, live and stored, with labels and without."

import pytest, torch
import torch.nn.functional as F
from torch import nn
from apps import FASTAI_WARNINGS, pair, quiet, same, snapshot
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner
from fastai.callback.tracker import SaveModelCallback
from fastai.vision.all import create_vision_model, resnet18
from fastdistill import Distiller, Outputs, Teacher
from fastdistill.features.layer_pairs import pair as pair_layers
from fastdistill.fastai import (
    DistillError,
    KnowledgeDistillation,
    Recipe,
    cache_teacher,
    kd,
    recipes,
)

pytestmark = pytest.mark.filterwarnings(*FASTAI_WARNINGS)
timm = pytest.importorskip('timm')


def vit(n, dim=24, depth=2):
    return timm.create_model(
        'vit_tiny_patch16_224',
        img_size=16,
        patch_size=4,
        num_classes=n,
        depth=depth,
        embed_dim=dim,
        num_heads=3,
    )


def small(n=3):
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, n),
    )


def body():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2), nn.ReLU()
    )


class Overwrites(nn.Module):
    "As in VGG and MobileNetV3, an activation overwrites the embedding"

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3)
        self.head = nn.Sequential(
            nn.Linear(6, 8), nn.Dropout(0.1), nn.Hardswish(inplace=True), nn.Linear(8, 3)
        )

    def embed(self, x):
        return self.head[0](self.body(x).mean((2, 3)))

    def forward(self, x):
        return self.head[1:](self.embed(x))


def images(n=8):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def timm_embedding(m, x):
    return m.forward_head(m.forward_features(x), pre_logits=True)


TEACHERS = {
    'timm CNN': (lambda: timm.create_model('resnet10t', num_classes=0), lambda m, x: m(x)),
    'timm CNN whose last layer is a convolution': (
        lambda: timm.create_model('mobilenetv3_small_050', num_classes=0),
        lambda m, x: m(x),
    ),
    'timm ViT': (lambda: vit(0), lambda m, x: m(x)),
    'timm ViT with a head': (lambda: vit(7), timm_embedding),
    'timm CNN with a head': (lambda: timm.create_model('resnet10t', num_classes=7), timm_embedding),
    'CNN that overwrites it': (Overwrites, lambda m, x: m.embed(x)),
    'body': (body, lambda m, x: m(x).mean((2, 3))),
    'pooled body': (
        lambda: nn.Sequential(body(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        lambda m, x: m(x),
    ),
}
STUDENTS = {
    'CNN': (small, lambda m, x: m[:-1](x)),
    'timm CNN': (lambda: timm.create_model('resnet10t', num_classes=3), timm_embedding),
    'ViT': (lambda: vit(3), timm_embedding),
    'CNN that overwrites it': (Overwrites, lambda m, x: m.embed(x)),
    'vision_learner': (
        lambda: create_vision_model(resnet18, 3, pretrained=False),
        lambda m, x: m[1][:2](m[0](x)),
    ),
}


# each teacher with a student that needs a projector, and each student with two teachers
PAIRS = [('CNN', t) for t in TEACHERS] + [
    (s, t) for s in STUDENTS if s != 'CNN' for t in ('timm CNN', 'timm ViT with a head')
]


@pytest.mark.parametrize('student,teacher', PAIRS)
def test_the_embeddings_are_compared_as_directions(student, teacher):
    torch.manual_seed(1)
    (s, of_s), (t, of_t), x = STUDENTS[student], TEACHERS[teacher], images()
    s, t = s().eval(), t().eval()
    d = Distiller(
        s,
        Teacher(t, run=dict(precision='fp32', memory_format=None, fold_bn=False)),
        recipes.pretrain(),
        example=x,
    )
    d.eval()
    (link,) = d.links['cosine']
    with torch.no_grad():
        a, b = of_s(s, x), of_t(t, x)
    assert d.pairs[0].s_shape == a.shape and d.pairs[0].t_shape == b.shape
    if a.shape[1] != b.shape[1]:
        a = F.linear(a, *link.projector.map.parameters())
    want = sum(1 - (u @ v / u.norm() / v.norm()).item() for u, v in zip(a, b)) / len(a)
    r = d(x, torch.zeros(8, dtype=torch.long))
    assert r.total.item() == pytest.approx(want, abs=1e-4) and r.weights['task'] == 0


def labeled(model, labels=True, colors=0.0):
    x, y = images(32), torch.arange(32) % 3
    x = x + colors * torch.randn(32, 3, 1, 1, generator=torch.Generator().manual_seed(1))
    items = list(zip(x, y)) if labels else [(o,) for o in x]
    dls = DataLoaders.from_dsets(
        items[:24], items[24:], bs=8, num_workers=0, shuffle=False, device='cpu'
    )
    return quiet(Learner(dls, model, loss_func=CrossEntropyLossFlat()))[0]


@pytest.mark.parametrize('labels', [True, False], ids=['labels', 'no labels'])
def test_a_fit_pretrains_the_body_and_leaves_head_and_teacher_alone(labels):
    torch.manual_seed(0)
    student, teacher = labeled(small(), labels), timm.create_model('resnet10t', num_classes=0)
    was, (conv, head) = snapshot(teacher), [student.model[i].weight.clone() for i in (0, -1)]
    student.distill(teacher, 3, 1e-2, recipes.pretrain(), wd=0.0)
    assert (
        same(was, snapshot(teacher))
        and torch.equal(student.model[-1].weight, head)
        and not torch.equal(student.model[0].weight, conv)
    )
    if not labels:
        return
    first, *_, last = [
        v[student.recorder.metric_names.index('cosine_loss') - 1] for v in student.recorder.values
    ]
    assert last < first
    student.fine_tune(1, 1e-2)
    assert not torch.equal(student.model[-1].weight, head)


def test_labels_of_weight_0_change_nothing():
    ends = []
    for labels in (True, False):
        torch.manual_seed(0)
        student = labeled(small(), labels)
        torch.manual_seed(1)
        student.distill(body().eval(), 2, 1e-2, recipes.pretrain())
        ends.append(student.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values()))


def test_a_cache_of_embeddings_teaches_as_the_teacher_does(tmp_path):
    torch.manual_seed(0)
    teacher = nn.Sequential(body(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    teacher(images())  # its batch-norm statistics
    start, ends = small().state_dict(), []
    for source in (
        lambda dls: Teacher(teacher, run=dict(precision='fp32')),
        lambda dls: cache_teacher(
            Teacher(teacher, run=dict(precision='fp32')),
            dls,
            tmp_path / 'c',
            kind='regression',
            store=dict(dtype='float32'),
        ),
    ):
        student = labeled(small())
        student.model.load_state_dict(start)
        torch.manual_seed(1)
        student.distill(source(student.dls), 2, 1e-2, recipes.pretrain())
        ends.append(student.model.state_dict())
    assert all(
        torch.allclose(a.float(), b.float(), atol=1e-5)
        for a, b in zip(ends[0].values(), ends[1].values())
    )


def test_a_function_teaches_by_what_it_returns():
    model, x = timm.create_model('resnet10t', num_classes=0).eval(), images()
    d = Distiller(small(), lambda x: model(x), recipes.pretrain(), example=x)
    assert d.pairs[0].teacher == '' and "'' (its output)" in str(d.pairs)
    assert 0 < d(x).total < 2


def test_predictions_are_not_taken_for_embeddings():
    model, x = small().eval(), images()
    with pytest.raises(
        DistillError, match=r'has shape \(8, 3\), like the student.*Name the layers'
    ):
        Distiller(small(), lambda x: model(x), recipes.pretrain(), example=x)
    d = Distiller(
        small(), model, recipes.pretrain(), example=x
    )  # the layers of a module show its embedding
    assert d.pairs[0].teacher == d.pairs[0].student == '6'


def test_the_empty_name_is_the_output_and_names_can_be_given():
    s, t, x = small(), body().eval(), images()
    d = Distiller(s, t, recipes.pretrain({'4@mean': '@mean'}), example=x)
    assert (d.pairs[0].s_shape, d.pairs[0].t_shape) == ((8, 8), (8, 12))
    out = Outputs(torch.randn(2, 3), {'4@mean': torch.randn(2, 8)})
    t = torch.randn(2, 12, 3, 3)
    want = (
        1
        - F.cosine_similarity(
            d.links['cosine'][0].projector.map(out.feats['4@mean']), t.mean((2, 3))
        ).mean()
    )
    assert torch.allclose(d.compute(out, Outputs(t)).total, want, atol=1e-6)
    assert pair_layers(s, body(), x, 'embedding')[0].student == '6'


def test_terms_between_layers_need_no_outputs_that_fit():
    "A teacher of other classes is no mistake where no term compares the outputs"
    student, _ = pair('image')
    other = timm.create_model('resnet10t', num_classes=50)
    assert not [
        f for f in student.check_teacher(other, recipe=recipes.pretrain()) if f.level == 'error'
    ]
    assert [f for f in student.check_teacher(other, recipe=kd()) if f.level == 'error']


# the other two ways to learn from a teacher without a head


def alone(recipe):
    return Recipe(recipe, task=0.0)


def queue_of(cb):
    return cb.distiller.links['seed'][0].loss.queue


def cos(a, b):
    return F.cosine_similarity(a, b, dim=0).item()


@pytest.mark.parametrize('student', [small, lambda: vit(3)], ids=['CNN', 'ViT'])
@pytest.mark.parametrize(
    'name,options', [('seed', dict(size=8)), ('gram', {})]
)  # a queue that is full at once: its loss grows while it fills
def test_a_fit_without_labels_by_a_vit_lowers_the_loss(name, options, student):
    torch.manual_seed(0)
    learn, teacher = labeled(student(), colors=3.0), vit(0)
    was, head = snapshot(teacher), [p.clone() for p in [*learn.model.parameters()][-2:]]
    learn.distill(teacher, 8, 1e-2, alone(getattr(recipes, name)(weight=1.0, **options)), wd=0.0)
    assert same(was, snapshot(teacher)) and all(
        map(torch.equal, head, [*learn.model.parameters()][-2:])
    )
    losses = [v[0] for v in learn.recorder.values]
    assert losses[-1] < 0.97 * losses[2]


def test_similarities_of_tokens_are_those_of_the_picture_alone():
    "The class token is no position, and a CNN's map stays as it is"
    torch.manual_seed(0)
    x, s, t = images(2), vit(3, 12), vit(0)
    d = Distiller(
        s, Teacher(t, run=dict(precision='fp32')), alone(recipes.gram(weight=1.0)), example=x
    )
    d.eval()
    got = d(x).total.item()
    with torch.no_grad():
        tokens = [m.blocks(m._pos_embed(m.patch_embed(x)))[:, 1:] for m in (s.eval(), t.eval())]
    grams = [[[cos(a, b) for a in o for b in o] for o in z] for z in tokens]
    assert tokens[0].shape == (2, 16, 12) and not list(d.links.parameters())
    assert got == pytest.approx(
        sum((p - q) ** 2 for a, b in zip(*grams) for p, q in zip(a, b)) / (2 * 16 * 16), abs=1e-5
    )
    assert pair_layers(small(), t, x, 'last@map', match='grid')[0].s_shape == (2, 8, 3, 3)


def test_a_queue_resumes_with_the_fit(tmp_path):
    def begin():
        torch.manual_seed(0)
        learn, teacher = labeled(small()), body().eval()
        learn.path = tmp_path
        return learn, KnowledgeDistillation(
            teacher, Recipe(recipes.seed(weight=1.0, size=40), task=0.0), check=False
        )

    straight, cb = begin()
    for _ in range(2):
        straight.fit(1, 0.01, cbs=cb)
    first, cb1 = begin()
    first.fit(1, 0.01, cbs=[cb1, SaveModelCallback(every_epoch=True, with_opt=True)])
    assert (queue_of(cb1) != 0).any(
        1
    ).sum() == 24  # three batches of eight, and no validation batch
    second, cb2 = begin()
    second.create_opt()
    second.load('model_0', weights_only=False)
    second.fit(1, 0.01, cbs=cb2)
    assert torch.equal(queue_of(cb), queue_of(cb2)) and (queue_of(cb) != 0).any(1).all()
    assert all(map(torch.equal, straight.model.parameters(), second.model.parameters()))


def test_a_learning_rate_search_leaves_the_queue_as_it_was():
    torch.manual_seed(0)
    learn = labeled(small())
    cb = KnowledgeDistillation(
        body().eval(), Recipe(recipes.seed(weight=1.0, size=40), task=0.0), check=False
    )
    learn.fit(1, 0.01, cbs=cb)
    was = queue_of(cb).clone()
    learn.add_cb(cb)
    learn.lr_find(num_it=5, show_plot=False)
    assert torch.equal(was, queue_of(cb)) and was.abs().sum() > 0
