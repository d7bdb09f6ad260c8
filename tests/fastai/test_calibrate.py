"`Learner.calibrate` on fastai's applications."

import pytest
import torch

import apps
from fastai.basics import load_learner
from fastdistill import DistillError
from fastdistill.fastai import *

# enough to learn something, but not everything
EPOCHS = dict(image=3, multi_label=8, unet=3, text_classifier=12, tabular=4)


@pytest.mark.parametrize('name', EPOCHS)
def test_the_validation_loss_is_the_calibrated_nll_and_the_classes_stay(name):
    torch.manual_seed(0)
    learn = getattr(apps, name)()[0]
    with learn.no_bar(), learn.no_logging():
        learn.fit(EPOCHS[name], 1e-2)
        before, y = learn.get_preds(act=lambda o: o)
        c = learn.calibrate()
        after, _ = learn.get_preds(act=lambda o: o)
    T = torch.tensor(c.temperature).view(-1, *[1] * (before.dim() - 2))
    assert c.layer is not None, c.reason
    assert torch.allclose(after, before / T, atol=1e-4)
    assert c.after['nll'] < c.before['nll']


def test_the_words_of_a_language_model_share_their_weights_so_nothing_is_folded():
    torch.manual_seed(0)
    learn = apps.language_model()[0]
    with learn.no_bar(), learn.no_logging():
        learn.fit(6, 1e-2)
        before = apps.snapshot(learn.model)
        c = learn.calibrate()
    assert c.layer is None
    assert 'shares its weight with' in c.reason
    assert apps.same(before, apps.snapshot(learn.model))


def test_data_other_than_the_validation_set_may_be_given():
    learn = apps.image()[0]
    c = learn.calibrate(learn.dls.train, fold=False)
    assert c.n == len(learn.dls.train_ds)


def test_numbers_are_not_calibrated():
    with pytest.raises(DistillError, match='predicts numbers'):
        apps.points()[0].calibrate()


@pytest.mark.filterwarnings('ignore:load_learner')
def test_an_exported_learner_is_calibrated_on_given_data(tmp_path):
    learn = apps.image()[0]
    learn.export(tmp_path / 's.pkl')
    exported = load_learner(tmp_path / 's.pkl')
    with pytest.raises(DistillError, match=r'An exported Learner contains no data: pass .*dl='):
        exported.calibrate()
    assert exported.calibrate(dl=learn.dls.valid).n == len(learn.dls.valid_ds)
