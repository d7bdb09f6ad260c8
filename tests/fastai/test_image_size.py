"A teacher that was trained on larger images than the student's, on scikit-learn's handwritten digits."

import functools
import re

import apps
import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy, set_seed
from fastai.vision.all import (
    CategoryBlock,
    DataBlock,
    ImageBlock,
    IndexSplitter,
    PILImageBW,
    RandomResizedCrop,
    Resize,
    aug_transforms,
)
from fastdistill.fastai import DistillWarning, KnowledgeDistillation, Teacher, check_teacher
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

pytestmark = pytest.mark.filterwarnings(*apps.FASTAI_WARNINGS)
N_TRAIN, N_VALID = 1024, 256
NAMES = [str(i) for i in range(10)]


@functools.cache
def pictures():
    "The digits, (56, 56) each, and their names"
    d = load_digits()
    large = [Image.fromarray((o * 15).astype('uint8')).resize((56, 56)) for o in d.images]
    return [PILImageBW(o) for o in large], [NAMES[y] for y in d.target]


def digits(item_tfms, vocab=NAMES, **kwargs):
    x, y = pictures()
    return DataBlock(
        (ImageBlock(PILImageBW), CategoryBlock(vocab=list(vocab), sort=False)),
        get_x=lambda i: x[i],
        get_y=lambda i: y[i],
        splitter=IndexSplitter(list(range(N_TRAIN, N_TRAIN + N_VALID))),
        item_tfms=item_tfms,
        **kwargs,
    ).dataloaders(list(range(N_TRAIN + N_VALID)), bs=32, num_workers=0)


def net(width=16):
    "Any size of images fits, but what it learns is how wide the strokes are"
    layers = []
    for i, o in ((1, width), (width, 2 * width), (2 * width, 2 * width)):
        layers += [nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    pool = [nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(18 * width, 10)]
    return nn.Sequential(*layers, *pool)


def learner(dls, model=None):
    return Learner(dls, model or net(4), loss_func=CrossEntropyLossFlat(), metrics=accuracy)


@functools.cache
def weights():
    set_seed(0)
    learn = learner(digits(Resize(40)), net())
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(4, 1e-2)
    return learn.model.state_dict()


def teacher(item_tfms=None, **kwargs):
    learn = learner(digits(item_tfms or Resize(40), **kwargs), net())
    learn.model.load_state_dict(weights())
    return learn


def own_score(learn):
    "At the size of its own images"
    with learn.no_bar():
        return learn.validate()[1]


def student(item_tfms=None, **kwargs):
    set_seed(0)
    return learner(digits(item_tfms or Resize(16), **kwargs))


def check(teacher, learn=None):
    return check_teacher(learn or student(), teacher, n_epoch=None)


def image_size(found):
    return [f.what for f in [*found, *found.in_order] if f.about == 'image size']


OTHER_SIZE = "The teacher was trained on images of 40 x 40 pixels, the student's have 16 x 16"
FORMS = dict(
    items=(dict(), dict()),
    batches=(
        dict(item_tfms=Resize(48), batch_tfms=aug_transforms(size=40, max_warp=0)),
        dict(item_tfms=Resize(32), batch_tfms=aug_transforms(size=16, max_warp=0)),
    ),
    crops=(
        dict(item_tfms=RandomResizedCrop(40, val_xtra=0)),
        dict(item_tfms=RandomResizedCrop(16, val_xtra=0)),
    ),
)


@pytest.mark.parametrize('theirs, mine', FORMS.values(), ids=FORMS)
def test_a_teacher_of_larger_images_scores_as_on_its_own(theirs, mine):
    t = teacher(**theirs)
    found = check(t, student(**mine))
    assert image_size(found) == [OTHER_SIZE]
    assert found.facts.n == N_VALID
    assert own_score(t) > 0.9
    assert found.facts.teacher_score == pytest.approx(own_score(t), abs=0.06)
    assert not found.doubt


def test_the_size_of_a_model_without_dataloaders_is_found_by_its_score_unless_it_is_given():
    t = teacher()
    whole, given, bare = (
        check(o) for o in (t, Teacher(t.model, images=dict(size=40)), Teacher(t.model))
    )
    assert image_size(given) == []
    assert 'of a different size' in image_size(bare)[0]
    assert re.search(r'images=dict\(size=(24|32|64)\)', str(bare.warnings[0]))
    assert given.facts.teacher_score == whole.facts.teacher_score
    assert bare.facts.teacher_score < 0.5


def fit(learn, teacher, n=1, **kwargs):
    "The callback after a training with the default recipe"
    cb = KnowledgeDistillation(teacher, **kwargs)
    with learn.no_bar(), learn.no_logging():
        learn.fit(n, 1e-2, cbs=cb)
    return cb


def test_a_teacher_of_larger_images_keeps_its_gradient_ratio():
    assert fit(student(), teacher()).distiller.faded['dist'] > 0.95


def test_a_teacher_that_gets_images_of_the_wrong_size_loses_its_gradient_ratio():
    with pytest.warns(DistillWarning, match='trained on images of a different size'):
        cb = fit(student(), Teacher(teacher().model))
    assert cb.distiller.faded['dist'] < 0.3


class Constant(nn.Module):
    def forward(self, x):
        return torch.arange(4.0).expand(len(x), -1)


class Reversed(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).flip(1)


def untrained(model):
    torch.manual_seed(3)
    return nn.Linear(8, 4)


DOUBTFUL = {
    'the same for all': lambda model: Constant(),
    'near chance': untrained,
    'another class order': Reversed,
}


@pytest.mark.parametrize('made', DOUBTFUL.values(), ids=DOUBTFUL)
def test_a_teacher_in_doubt_does_not_keep_its_gradient_ratio(made):
    learn, good = apps.toy()
    found = check_teacher(learn, made(good), n_epoch=None)
    assert found.doubt
    assert fit(learn, made(good), 3, check=False).distiller.faded['dist'] < 0.3
