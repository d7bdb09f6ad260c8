"The ways to store a teacher's outputs, in fits of fastai."

import apps
import pytest
import torch

from fastdistill.base.outputs import DistillError, Draws, LinearLogits
from fastdistill.cache.output_layer import find_output_layer
from fastdistill.fastai import KnowledgeDistillation, cache_teacher, kd, recipes, verify_cache
from fastdistill.fastai.teachers import teacher_of
from fastdistill.losses import chunks


def store(learn, teacher, path, **options):
    return cache_teacher(teacher, learn.dls, path, check=False, progress=False, **options)


@pytest.mark.parametrize(
    'app,layer',
    [
        ('language_model', '1.decoder'),
        ('text_classifier', '1.layers.1.1'),
        ('image', None),
        ('tabular', None),
    ],
)
def test_the_output_layer_is_found(app, layer):
    learn, teacher = apps.pair(app)
    teacher = teacher_of(teacher, learn)
    x = learn.dls.one_batch()[: learn.dls.n_inp]
    found = find_output_layer(teacher, lambda t: t(*x))
    assert layer is None or found.name == layer
    assert teacher.module.get_submodule(found.name).weight.shape == found.weight.shape


def test_a_language_model_learns_from_hidden_states(tmp_path, monkeypatch):
    "As from all logits, though no tensor of all the teacher's logits exists"
    found = []
    for name in ('float32', 'hidden'):
        learn, teacher = apps.pair('language_model')
        way = name if name == 'float32' else dict(kind='hidden', dtype='float32')
        cache = store(learn, teacher, tmp_path / name, store=way)
        if name == 'hidden':
            dense, rows = LinearLogits.dense, []
            monkeypatch.setattr(chunks, 'ON_CPU', 200)
            monkeypatch.setattr(chunks, 'TEACHER_ROWS', 1)
            monkeypatch.setattr(
                LinearLogits, 'dense', lambda self: rows.append(len(self.hidden)) or dense(self)
            )
        torch.manual_seed(0)
        with learn.no_bar(), learn.no_logging():
            learn.distill(cache, 1, 1e-2, kd(T=2, alpha=0.5), check=False)
        found.append([p.detach().clone() for p in learn.model.parameters()])
    assert rows and max(rows) < len(learn.dls.train.dataset) * 8
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_hidden_states_of_a_language_model_are_verified(tmp_path):
    learn, teacher = apps.pair('language_model')
    cache = store(learn, teacher, tmp_path, store='hidden')
    v = verify_cache(cache, teacher, learn.dls, n=8)
    assert v.share < 0.02
    width = teacher.model[1].decoder.in_features
    assert cache.manifest.layout.bytes == 8 * (width + 8)


def test_draws_choose_their_recipe(tmp_path):
    learn, teacher = apps.pair('image')
    cache = store(learn, teacher, tmp_path, store=dict(draws=20, T=2.0))
    assert isinstance(cache.outputs([0]).logits, Draws)
    cb = KnowledgeDistillation(cache)
    with learn.no_bar():
        learn.fit(1, 1e-3, cbs=cb)
    assert str(cb.recipe).startswith(
        'kd(T=2, alpha=.5) (the stored draws are unbiased for kl at T=2'
    )


def test_draws_are_refused_before_training(tmp_path):
    learn, teacher = apps.pair('image')
    cache = store(learn, teacher, tmp_path, store='draws')
    before = [p.detach().clone() for p in learn.model.parameters()]
    with (
        learn.no_bar(),
        pytest.raises(DistillError, match="dist is not linear in the teacher's prob"),
    ):
        learn.distill(cache, 1, 1e-3, recipes.dist(T=1))
    assert all(torch.equal(a, b) for a, b in zip(before, learn.model.parameters()))


def test_the_validation_set_is_stored_in_the_same_way(tmp_path):
    learn, teacher = apps.pair('image')
    cache = store(learn, teacher, tmp_path, store='hidden', valid=True)
    for c in (cache, cache.valid):
        assert isinstance(c.outputs([0]).logits, LinearLogits)
    with learn.no_bar(), learn.no_logging():
        learn.distill(cache, 1, 1e-3)
