"A detector in a Learner: data blocks with boxes, validation loss, mean average precision, a teacher."

import numpy as np
import pytest, torch
import apps  # before the rest of fastai: it keeps its warnings quiet
from detectors import batch, detector, fastai_loaders
from fastai.basics import Callback, CancelFitException, load_learner
from fastai.vision.all import Normalize, aug_transforms, set_seed
from fastdistill.recipes import pkd
from fastdistill.base.outputs import DistillError
from fastdistill.detection import validation_losses
from fastdistill.fastai.detector import (
    DetectorDistillation,
    DetectorLearner,
    MeanAveragePrecision,
    images_and_targets,
)

IMAGES, TARGETS = batch(8, seed=4)


def loaders(bs=2, tfms=()):
    return fastai_loaders(IMAGES, TARGETS, bs, tfms)


def learner(kind='RetinaNet', tfms=(), **options):
    learn = DetectorLearner(loaders(tfms=tfms), detector(kind, **options))
    learn.remove_cb(learn.progress) if hasattr(learn, 'progress') else None
    return learn


def test_a_batch_has_boxes_in_pixels_and_no_padding():
    dls = loaders(4)
    b = dls.valid.one_batch()
    images, targets = images_and_targets(b[:1], b[1:])
    for x, t, i in zip(images, targets, dls.valid_ds.items):
        torch.testing.assert_close(t['boxes'], TARGETS[i]['boxes'], atol=1e-4, rtol=0)
        assert torch.equal(t['labels'], TARGETS[i]['labels'])
        assert x.max() <= 1


def test_the_validation_loss_is_torchvisions():
    learn = learner()
    with learn.no_bar(), learn.no_logging():
        loss, *scores = learn.validate()
    want = []
    for b in learn.dls.valid:
        found = validation_losses(learn.model, *images_and_targets(b[:1], b[1:]))
        want.append(sum(found.values()).item())
    assert loss == pytest.approx(np.mean(want), rel=1e-5)
    assert [m.name for m in learn.metrics] == ['map', 'map50']
    assert all(0 <= s <= 1 for s in scores)


def test_a_learner_distills_and_leaves_nothing_behind():
    learn, teacher = learner('SSD'), learner('RetinaNet', width=12, seed=1)
    before = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    with learn.no_bar(), learn.no_logging():
        cb = learn.distill(teacher, 1, 1e-3, pkd(grad_ratio=0.5), check=False)
    assert not learn.cbs.filter(lambda o: type(o) is type(cb))
    assert len(learn.model._forward_hooks) + len(learn.model.backbone._forward_hooks) == 0
    assert all(torch.equal(v, before[k]) for k, v in teacher.model.state_dict().items())
    assert cb.distiller.ratios['pkd'].measured == 2
    # the projectors learn too: the scale of their batch norm begins at 1
    assert (cb.distiller.links['pkd'][0].projector.map[1].weight != 1).any()


class Interrupt(Callback):
    def after_loss(self):
        raise KeyboardInterrupt


def test_an_interrupt_leaves_nothing_behind():
    learn, teacher = learner('SSD'), detector('RetinaNet', width=12, seed=1).train()
    had = [*learn.cbs]
    with learn.no_bar(), learn.no_logging(), pytest.raises(KeyboardInterrupt):
        learn.distill(teacher, 1, 1e-3, pkd(grad_ratio=0.5), check=False, cbs=Interrupt())
    assert [*learn.cbs] == had
    assert teacher.training
    assert not any(m._forward_hooks for m in learn.model.modules())


def test_an_exported_learner_does_not_hold_the_teacher(tmp_path):
    learn, cb = learner('SSD'), DetectorDistillation(detector('RetinaNet', width=12, seed=1))
    learn.path = tmp_path
    learn.add_cb(cb)
    learn.export()
    loaded = load_learner(tmp_path / 'export.pkl')
    assert not any(isinstance(c, DetectorDistillation) for c in loaded.cbs)
    assert cb in learn.cbs


def test_a_callback_that_stays_distills_after_a_validation():
    learn, teacher = learner('SSD'), detector('RetinaNet', width=12, seed=1).train()
    cb = DetectorDistillation(teacher, pkd(grad_ratio=0.5), check=False)
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(cb):
        learn.validate()
        assert cb.distiller is None
        assert teacher.training
        learn.fit(1, 1e-3)
    assert cb.distiller.ratios['pkd'].measured == 2


class Begins(Callback):
    def __init__(self, events):
        self.events = events

    def before_train(self):
        self.events.append('train')
        raise CancelFitException


@pytest.mark.filterwarnings('ignore:.*finds:')
def test_a_check_that_was_interrupted_runs_in_the_next_fit():
    learn, teacher, events = learner('SSD'), detector('RetinaNet', width=12, seed=1), []

    def interrupt(*_):
        events.append('check')
        if len(events) == 1:
            raise KeyboardInterrupt

    teacher.register_forward_pre_hook(interrupt)
    cbs = [DetectorDistillation(teacher, pkd()), Begins(events)]
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(cbs):
        with pytest.raises(KeyboardInterrupt):
            learn.fit(1, 1e-3)
        learn.fit(1, 1e-3)
    assert events[:2] == ['check', 'check']
    assert events[-1] == 'train'


@pytest.mark.filterwarnings(*apps.FASTAI_WARNINGS, 'ignore:numpy.core:DeprecationWarning')
def test_lr_find_leaves_the_projectors_and_measured_norms_as_they_were():
    learn, teacher = learner('SSD'), detector('RetinaNet', width=12, seed=1)
    cb = DetectorDistillation(teacher, pkd(grad_ratio=0.5), check=False)
    find = lambda: learn.lr_find(num_it=3, show_plot=False, suggest_funcs=None)
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(cb):
        find()
        assert cb.distiller is None
        learn.fit(1, 1e-3)
        d, before = cb.distiller, {k: v.clone() for k, v in cb.distiller.links.state_dict().items()}
        assert d.ratios['pkd'].measured == 2
        find()
    assert cb.distiller is d
    assert d.ratios['pkd'].measured == 2
    assert all(torch.equal(v, before[k]) for k, v in d.links.state_dict().items())


@pytest.mark.filterwarnings(*apps.FASTAI_WARNINGS, 'ignore:numpy.core:DeprecationWarning')
def test_a_reused_callback_forgets_the_norms_of_weights_that_were_replaced(tmp_path):
    learn, teacher = learner('SSD', path=tmp_path), detector('RetinaNet', width=12, seed=1)
    learn.save('before')
    cb = DetectorDistillation(teacher, pkd(grad_ratio=0.5), check=False)
    measured = []
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(cb):
        learn.fit(1, 1e-3)
        measured.append(cb.distiller.ratios['pkd'].measured)
        learn.fit(1, 1e-3)  # continues with the same weights
        measured.append(cb.distiller.ratios['pkd'].measured)
        learn.load('before', with_opt=False)
        learn.fit(1, 1e-3)
        measured.append(cb.distiller.ratios['pkd'].measured)
    assert measured == [2, 4, 2]


@pytest.mark.parametrize('check', [False, True])
@pytest.mark.filterwarnings(*apps.FASTAI_WARNINGS, 'ignore:.*finds:')
def test_weight_0_trains_bit_for_bit_as_without_a_teacher(check):
    trained = []
    for teacher in (None, detector('FCOS', seed=1)):
        learn = learner('FasterRCNN', tfms=aug_transforms(size=64, max_rotate=0))
        set_seed(0)
        with learn.no_bar(), learn.no_logging():
            if teacher is None:
                learn.fit_one_cycle(1, 1e-3)
            else:
                learn.distill(teacher, 1, 1e-3, pkd(weight=0.0), check=check)
        trained.append(learn.model.state_dict())
    assert all(torch.equal(v, trained[1][k]) for k, v in trained[0].items())


def test_results_are_drawn():
    learn = learner(score_thresh=0.0)
    fig = learn.show_results(max_n=2, score=0.0)
    assert [ax.get_title() for ax in fig.axes[:2]] == ['labels', 'detections']


def test_normalized_images_are_refused():
    learn = DetectorLearner(
        loaders(tfms=[Normalize.from_stats([0.5] * 3, [0.5] * 3)]), detector('RetinaNet')
    )
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(DistillError, match='build them without Normalize'):
            learn.fit(1)


def test_an_unknown_measure_is_refused():
    with pytest.raises(DistillError, match="measure='map75': must be one of 'map', 'map50'"):
        MeanAveragePrecision('map75')
