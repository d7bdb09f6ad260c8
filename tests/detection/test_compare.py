"Average precision, labels from a teacher, and the report, against torchmetrics and plain loops."

import numpy as np
import pytest, torch
from detectors import batch, detector
from torch import nn
from fastdistill.base.outputs import DistillError
from fastdistill.detection import (
    average_precision,
    best_threshold,
    compare_detectors,
    detect,
    show_detections,
    teacher_labels,
)
from fastdistill.detection.compare import map_measures
from fastdistill.detection.box_matches import match_image, precision_of_sums, sums_of_images


class Finds(nn.Module):
    "Returns given detections, image by image"

    def __init__(self, found):
        super().__init__()
        self.found, self.last = found, nn.Linear(1, 1)

    def forward(self, images):
        return [dict(self.found[int(x[0, 0, 0] * 1000 + 0.5)]) for x in images]


def noisy(n=12, seed=0, good=0.7):
    "Images that know their number, targets, and detections of some quality"
    g = torch.Generator().manual_seed(seed)
    images, targets, found = [], [], []
    for i in range(n):
        x = torch.zeros(3, 64, 64)
        x[0, 0, 0] = i / 1000
        k = int(torch.randint(1, 6, (1,), generator=g))
        corner = torch.rand(k, 2, generator=g) * 40
        boxes = torch.cat([corner, corner + 8 + torch.rand(k, 2, generator=g) * 15], 1)
        labels = torch.randint(1, 4, (k,), generator=g)
        wrong = torch.rand(k, generator=g) > good
        moved = boxes + torch.randn(k, 4, generator=g) * (0.8 + 4 * wrong[:, None])
        moved[:, 2:] = torch.maximum(moved[:, 2:], moved[:, :2] + 1)
        extra = torch.rand(4, 2, generator=g) * 40
        extra = torch.cat([extra, extra + 12], 1)
        scores = torch.rand(k + 4, generator=g)
        scores[:k] += 0.4
        images.append(x)
        targets.append(dict(boxes=boxes, labels=labels))
        found.append(
            dict(
                boxes=torch.cat([moved, extra]),
                scores=scores / 1.5,
                labels=torch.cat([labels, torch.randint(1, 4, (4,), generator=g)]),
            )
        )
    return images, targets, found


@pytest.mark.parametrize('seed', range(3))
def test_precision_of_sums_equals_torchmetrics(seed):
    _, targets, found = noisy(10, seed)
    want = average_precision(found, targets)
    matches = [match_image(d, t) for d, t in zip(found, targets)]
    sums = {k: v.sum(0)[None] for k, v in sums_of_images(matches, [1, 2, 3]).items()}
    each = precision_of_sums(sums)[0]
    # fewer than 100 detections of a class, so no two share a bin. pycocotools misses some recalls that are exact
    # multiples of 0.01 by a rounding error, as those of one class for seed 1
    near = lambda v: pytest.approx(v, abs=5e-3 if seed == 1 else 1e-6)
    assert each.mean() == near(want.map)
    assert each[:, 0].mean() == near(want.map50)
    assert each.mean(1).tolist() == near(list(want.classes.values()))


def test_bins_of_many_detections_change_little():
    _, targets, found = noisy(200, 1)
    want = average_precision(found, targets)
    matches = [match_image(d, t) for d, t in zip(found, targets)]
    sums = {k: v.sum(0)[None] for k, v in sums_of_images(matches, [1, 2, 3]).items()}
    assert precision_of_sums(sums)[0].mean() == pytest.approx(want.map, abs=0.01)


def test_100_detections_of_each_class_count_in_an_image():
    "Images with 40 detections of four classes each, and 130 of a fifth one"
    g = torch.Generator().manual_seed(0)
    targets, found = [], []
    for _ in range(2):
        labels = torch.tensor([1, 2, 3, 4]).repeat_interleave(40)
        labels = torch.cat([labels, torch.full((130,), 5)])
        corner = torch.rand(len(labels), 2, generator=g) * 400
        boxes = torch.cat([corner, corner + 30], 1)
        targets.append(dict(boxes=boxes, labels=labels))
        moved = boxes + 1.5 * torch.randn(boxes.shape, generator=g)
        scores = torch.rand(len(labels), generator=g)
        found.append(dict(boxes=moved, scores=scores, labels=labels))
    want = average_precision(found, targets)
    assert want.classes[5] < 0.9 * want.classes[1]  # the last 30 detections of an image don't count
    matches = [match_image(d, t) for d, t in zip(found, targets)]
    sums = {k: v.sum(0)[None] for k, v in sums_of_images(matches, [1, 2, 3, 4, 5]).items()}
    each = precision_of_sums(sums)[0].mean(1)
    assert each.tolist() == pytest.approx(list(want.classes.values()), abs=5e-3)


@pytest.mark.parametrize('classes', [['#na#', 'a', 'b', 'c'], ['__background__', 'a'], ['a', 'b']])
def test_names_that_do_not_begin_with_class_1_are_refused(classes):
    images, targets, found = noisy(5)
    with pytest.raises(DistillError, match='at least 3 names, starting with class 1'):
        compare_detectors(
            dict(a=Finds(found)), [(images, targets)], classes=classes, repeats=10, seconds=0
        )


def test_perfect_detections_have_precision_1():
    _, targets, _ = noisy()
    found = [dict(t, scores=torch.ones(len(t['labels']))) for t in targets]
    assert average_precision(found, targets).map == pytest.approx(1)
    matches = [match_image(d, t) for d, t in zip(found, targets)]
    sums = {k: v.sum(0)[None] for k, v in sums_of_images(matches, [1, 2, 3]).items()}
    assert [m.of(sums)[0] for m in map_measures()] == pytest.approx([1, 1])


def test_a_class_without_boxes_counts_nowhere():
    _, targets, found = noisy()
    matches = [match_image(d, t) for d, t in zip(found, targets)]
    sums = {k: v.sum(0)[None] for k, v in sums_of_images(matches, [1, 2, 3, 9]).items()}
    assert np.isnan(precision_of_sums(sums)[0, 3]).all()
    assert np.isfinite(map_measures()[0].of(sums)[0])


def test_a_report_compares_models_on_the_same_images():
    images, targets, good = noisy(40, good=1.0)
    _, _, bad = noisy(40, good=0.2)
    models = dict(alone=Finds(bad), distilled=Finds(good))
    batches = [(images[:25], targets[:25]), (images[25:], targets[25:])]
    r = compare_detectors(
        models, batches, classes=['a', 'b', 'c'], repeats=200, seconds=0.01, title='Rectangles'
    )
    assert r.baseline == 'alone'
    assert r.n == 40
    d = r.comparison('distilled').differences['map']
    assert d.significant
    assert d.value == pytest.approx(
        r.models['distilled'].measures['map'].value - r.models['alone'].measures['map'].value
    )
    assert r.models['alone'].cost.params == 2
    assert r.models['alone'].cost.latency[0].batch == 1
    text = r.to_markdown()
    assert 'mAP50' in text
    assert 'Average precision of each class' in text
    assert 'data:image' in r.to_html()
    assert type(r).from_json(r.to_json()).headline == 'map'


def test_models_are_left_as_they_were():
    model = detector('RetinaNet').train()
    model.backbone.eval()
    modes = [m.training for m in model.modules()]
    images, targets = batch()
    compare_detectors(dict(alone=model), [(images, targets)], repeats=10, seconds=0)
    assert [m.training for m in model.modules()] == modes


def test_images_without_boxes_can_not_be_compared():
    images, targets = batch(boxes=0)
    with pytest.raises(DistillError, match='no labeled boxes'):
        compare_detectors(dict(alone=detector('RetinaNet')), [(images, targets)])


def test_detect_changes_nothing():
    model = detector('FasterRCNN').train()
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    found = detect(model, batch()[0])
    assert set(found[0]) == {'boxes', 'labels', 'scores'}
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes


def test_pictures_have_a_column_for_each_model():
    images, targets, found = noisy(3)
    fig = show_detections(dict(a=Finds(found), b=Finds(found)), images, targets, score=0.0)
    assert [ax.get_title() for ax in fig.axes[:3]] == ['labels', 'a', 'b']
    assert len(fig.axes[1].patches) == len(found[0]['boxes'])
    assert len(fig.axes[0].patches) == len(targets[0]['boxes'])


# labels from a teacher


def f1_loop(found, targets, score):
    right = detections = boxes = 0
    for d, t in zip(found, targets):
        keep = d['scores'] >= score
        part = {k: v[keep] for k, v in d.items()}
        right += match_image(part, t, (0.5,)).right.sum()
        detections += int(keep.sum())
        boxes += len(t['boxes'])
    return 2 * right / (detections + boxes)


def test_the_threshold_has_the_highest_f1_of_all_scores():
    images, targets, found = noisy(20)
    best = best_threshold(Finds(found), [(images, targets)])
    scores = sorted({float(s) for d in found for s in d['scores']})
    values = [f1_loop(found, targets, s) for s in scores]
    assert best.f1 == pytest.approx(max(values))
    assert f1_loop(found, targets, best.score) == pytest.approx(best.f1)


def test_labels_are_the_certain_boxes_on_the_device_of_the_images():
    images, targets, found = noisy(4)
    best = best_threshold(Finds(found), [(images, targets)])
    labels = teacher_labels(Finds(found), images, best)
    for o, d in zip(labels, found):
        keep = d['scores'] >= best.score
        assert torch.equal(o['boxes'], d['boxes'][keep])
        assert set(o) == {'boxes', 'labels'}


def test_a_student_learns_from_labels_of_a_teacher():
    teacher, student = detector('RetinaNet'), detector('SSD').train()
    images, _ = batch()
    labels = teacher_labels(teacher, images, 0.0)
    found = student(images, labels)
    assert all(v.isfinite() for v in found.values())


def test_a_threshold_needs_labeled_boxes():
    images, targets, found = noisy(2)
    empty = [dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))] * 2
    with pytest.raises(DistillError, match='no labeled boxes'):
        best_threshold(Finds(found), [(images, empty)])
