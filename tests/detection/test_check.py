"Mistakes that are found before training. The teacher is a detector that paints what it is told."

import pytest, torch
from detectors import batch, detector
from torch import nn
from fastdistill.recipes import pkd
from fastdistill.base.outputs import DistillError
from fastdistill.detection import DetectionDistiller, anchors
from fastdistill.detection.check import check_detections, seeing_size, top_matches


class Knows(nn.Module):
    "Finds the rectangles of `batch`, with labels changed by `rename`, if the image is large enough"

    def __init__(self, targets, rename=lambda y: y, least=0):
        super().__init__()
        self.transform = detector('RetinaNet').transform
        self.targets, self.rename, self.least = targets, rename, least

    def forward(self, images):
        self.transform.eval()
        seen = self.transform(images)[0].tensors.shape[2]
        found = []
        for t in self.targets[: len(images)]:
            boxes = t['boxes'] if seen >= self.least else t['boxes'][:0]
            labels = self.rename(t['labels'])[: len(boxes)]
            found.append(dict(boxes=boxes, labels=labels, scores=torch.ones(len(boxes))))
        return found


IMAGES, TARGETS = batch(16, seed=3)
BATCHES = [(IMAGES, TARGETS)]


def findings(teacher, heads=True, transform=None):
    return [str(f) for f in check_detections(teacher, BATCHES, transform, heads)]


def test_a_good_teacher_has_no_findings():
    assert findings(Knows(TARGETS), transform=detector('SSD').transform) == []


def test_a_teacher_that_finds_nothing_is_in_doubt():
    found = check_detections(Knows(TARGETS, least=999), BATCHES, None, True)
    assert 'finds 0% of 32 labeled boxes' in str(found[0])
    assert found[0].level == 'warning'
    assert found.doubt


def test_a_shifted_background_is_named():
    (found,) = findings(Knows(TARGETS, lambda y: y - 1))
    assert found.startswith('error: For boxes that it finds, the teacher predicts label 1 as 0')
    assert 'shifted by one, as if only one of the models counted the background as a class' in found


def test_a_different_class_order_is_named():
    order = torch.tensor([0, 3, 1, 2])
    (found,) = findings(Knows(TARGETS, lambda y: order[y]))
    assert '1 as 3, 2 as 1, 3 as 2' in found
    assert 'in a different order' in found


def test_one_class_for_all_is_not_a_different_order():
    (found,) = findings(Knows(TARGETS, lambda y: y * 0 + 1))
    assert 'its classes agree with the labels for only' in found
    assert 'was it trained on them' in found


def test_feature_maps_may_be_compared_with_different_classes():
    order = torch.tensor([0, 3, 1, 2])
    (found,) = findings(Knows(TARGETS, lambda y: order[y]), heads=False)
    assert found.startswith('warning: ')
    assert 'Feature maps can be compared nevertheless' in found


def test_a_teacher_that_needs_larger_images_is_named():
    small = detector('RetinaNet', min_size=32).transform
    (found,) = findings(Knows(TARGETS, least=64), transform=small)
    assert (
        "At the student's image size, the teacher finds 0% of the boxes, but 100% at its own size"
        in found
    )
    assert 'Pass size=' in found


def test_resizing_like_the_student_leaves_the_teacher_alone():
    teacher = detector('RetinaNet', image_mean=[0.1, 0.2, 0.3])
    before = teacher.transform
    other = seeing_size(teacher, detector('SSD', size=(96, 128)).transform)
    assert teacher.transform is before
    assert other.transform.fixed_size == (96, 128)
    assert other.transform.image_mean == [0.1, 0.2, 0.3]
    assert other.backbone is teacher.backbone


def test_matches_are_one_to_one_and_of_the_most_certain():
    box = torch.tensor([[0.0, 0, 10, 10]])
    found = dict(
        boxes=torch.cat([box, box + 1, box + 50]),
        labels=torch.tensor([1, 2, 3]),
        scores=torch.tensor([0.2, 0.9, 0.8]),
    )
    target = dict(boxes=torch.cat([box, box + 50]), labels=torch.tensor([1, 3]))
    # the first detection is the third in certainty, of two boxes
    assert sorted(top_matches([found], [target])) == [(1, 2), (3, 3)]


def test_a_distiller_checks_a_loader_and_changes_nothing():
    student, teacher = detector('RetinaNet').train(), detector('RetinaNet', seed=1)
    distiller = DetectionDistiller(student, teacher, pkd())
    loader = torch.utils.data.DataLoader([batch(seed=1), batch(seed=2)], batch_size=None)
    state = torch.get_rng_state()
    found = distiller.check(loader)
    assert any('labeled boxes with as many detections' in str(f) for f in found)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in student.modules())


def test_a_distiller_checks_targets_first():
    distiller = DetectionDistiller(detector('RetinaNet'), detector('RetinaNet', seed=1), anchors())
    images, targets = batch()
    wrong = [dict(t, labels=t['labels'] - 1) for t in targets]
    with pytest.raises(DistillError, match='Add 1 to each'):
        distiller.check(images, wrong).enforce()


def test_shared_parameters_are_found():
    model = detector('RetinaNet')
    with pytest.raises(DistillError, match='share'):
        DetectionDistiller(model, model, pkd())


def test_batches_without_boxes_say_that_nothing_was_checked():
    images, targets = batch(boxes=0)
    (found,) = check_detections(Knows(targets), [(images, targets)], None, True)
    assert 'have no boxes' in str(found)
