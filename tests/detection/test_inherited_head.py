"A student starts with the teacher's head."

import copy
import pytest, torch
from detectors import KINDS, batch, detector
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from fastdistill import Teacher
from fastdistill.base.outputs import DistillError
from fastdistill.detection import inherit_head

HEADS = {
    'RetinaNet': ['head.classification_head', 'head.regression_head'],
    'FasterRCNN': ['rpn.head', 'roi_heads.box_head', 'roi_heads.box_predictor'],
}
HEADS['FCOS'] = HEADS['SSD'] = HEADS['RetinaNet']
for name in ('mask', 'keypoint'):
    more = [f'roi_heads.{name}_head', f'roi_heads.{name}_predictor']
    HEADS[f'{name.capitalize()}RCNN'] = HEADS['FasterRCNN'] + more


def changed(before, model):
    "Names of the tensors that differ"
    now = model.state_dict()
    return {k for k, v in before.items() if not torch.equal(v, now[k])}


@pytest.mark.parametrize('kind', KINDS)
def test_only_the_head_is_copied(kind):
    student, teacher = detector(kind), detector(kind, seed=1)
    before, theirs = copy.deepcopy(student.state_dict()), copy.deepcopy(teacher.state_dict())
    found = inherit_head(student, teacher)
    assert found.copied == HEADS[kind]
    assert found.kept == {}
    own = tuple(f'{name}.' for name in HEADS[kind])
    assert all(k.startswith(own) for k in changed(before, student))
    assert not changed({k: v for k, v in theirs.items() if k.startswith(own)}, student)
    assert not changed(theirs, teacher)


def test_with_the_same_maps_the_student_predicts_the_same_boxes():
    student, teacher = detector('RetinaNet').eval(), detector('RetinaNet', seed=1).eval()
    inherit_head(student, Teacher(teacher))
    student.backbone = teacher.backbone
    images, _ = batch()
    for a, b in zip(student(images), teacher(images)):
        assert torch.equal(a['boxes'], b['boxes'])
        assert torch.equal(a['scores'], b['scores'])


def test_the_copy_is_trained_without_changing_the_teacher():
    student, teacher = detector('RetinaNet').train(), detector('RetinaNet', seed=1)
    inherit_head(student, teacher)
    before = copy.deepcopy(teacher.state_dict())
    sum(student(*batch()).values()).backward()
    with torch.no_grad():
        for p in student.parameters():
            p -= p.grad
    assert not changed(before, teacher)


class WithPyramid(nn.Module):
    "Levels of stride 8 and 16 with a feature pyramid under the given name"

    def __init__(self, channels, name, width=8):
        super().__init__()
        self.name, self.out_channels = name, width
        sizes = [3, *channels]
        self.stages = nn.ModuleList(
            nn.Conv2d(a, b, s, s) for a, b, s in zip(sizes, sizes[1:], [8, 2, 2])
        )
        setattr(self, name, FeaturePyramidNetwork(channels, width))

    def forward(self, x):
        maps = {}
        for i, stage in enumerate(self.stages):
            maps[str(i)] = x = stage(x)
        return getattr(self, self.name)(maps)


def with_pyramid(channels, name, seed=0):
    model = detector('RetinaNet', names='012'[: len(channels)], seed=seed)
    model.backbone = WithPyramid(channels, name)
    return model


def test_blocks_of_the_pyramid_are_copied_where_they_fit():
    student, teacher = with_pyramid([4, 6], 'fpn'), with_pyramid([4, 16], 'neck', seed=1)
    found = inherit_head(student, teacher)
    blocks = ['inner_blocks.0', 'layer_blocks.0', 'layer_blocks.1']
    assert found.copied == HEADS['RetinaNet'] + [f'backbone.fpn.{k}' for k in blocks]
    left = 'backbone.fpn.inner_blocks.1'
    assert list(found.kept) == [left]
    assert f'{left}: not copied, because 0.weight has the shape (8, 6, 1, 1)' in str(found)
    a, b = student.backbone.fpn.layer_blocks, teacher.backbone.neck.layer_blocks
    assert torch.equal(a[1][0].weight, b[1][0].weight)


def test_pyramids_with_different_numbers_of_levels_keep_their_own_weights():
    student, teacher = with_pyramid([4, 6], 'fpn'), with_pyramid([4, 6, 8], 'fpn', seed=1)
    # the anchors of both have to be equal
    teacher.anchor_generator = student.anchor_generator
    found = inherit_head(student, teacher)
    assert found.copied == HEADS['RetinaNet']
    assert len(found.kept) == 4


def test_with_other_classes_only_the_boxes_are_inherited():
    student, teacher = detector('RetinaNet'), detector('RetinaNet', classes=7, seed=1)
    found = inherit_head(student, teacher)
    assert found.copied == ['head.regression_head']
    assert 'head.classification_head: not copied, because cls_logits.weight has the shape' in str(
        found
    )


@pytest.mark.parametrize(
    'kind, options, message',
    [
        ('RetinaNet', dict(width=12), "No part of the teacher's head fits the student"),
        ('RetinaNet', dict(width=12), r'the shape \(8, 8, 3, 3\), in the teacher \(12, 12, 3, 3\)'),
        ('RetinaNet', dict(names='01'), 'the sizes .*: build the student with the same anchors'),
        ('FCOS', {}, 'different kinds of detectors, RetinaNet and FCOS: a head can only be'),
    ],
)
def test_a_head_that_does_not_fit_is_an_error_and_changes_nothing(kind, options, message):
    student, teacher = detector('RetinaNet'), detector(kind, seed=1, **options)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(DistillError, match=message):
        inherit_head(student, teacher)
    assert not changed(before, student)


def test_other_models_are_refused():
    with pytest.raises(DistillError, match='The teacher is a Linear: it must be a RetinaNet'):
        inherit_head(detector('RetinaNet'), nn.Linear(2, 2))
