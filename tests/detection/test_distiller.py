"A DetectionDistiller in a plain loop: torchvision's losses and the terms."

import copy
import pytest, torch
from detectors import KINDS, batch, detector
from torch import nn
from torchvision.models.detection.ssdlite import SSDLiteHead
from fastdistill import Recipe, Teacher, Term, kd, losses
from fastdistill.recipes import cwd, pkd
from fastdistill.base.outputs import DistillError
from fastdistill.detection import DetectionDistiller, anchors, crosskd, fgd, mgd, scored


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def values(found):
    return {k: v.item() for k, v in found.items()}


@pytest.mark.parametrize('kind', KINDS)
def test_returns_torchvisions_own_losses_and_the_terms(kind):
    student, teacher = detector(kind), detector('RetinaNet', width=12, seed=1)
    distiller = DetectionDistiller(student.train(), teacher, pkd(weight=1.0))
    images, targets = batch()
    torch.manual_seed(5)
    found = distiller(images, targets)
    fresh = detector(kind).train()
    torch.manual_seed(5)
    own = fresh(images, targets)
    assert list(found) == [*own, 'pkd']
    assert {k: v.item() for k, v in own.items()} == {k: found[k].item() for k in own}
    assert found['pkd'].item() > 0


def test_with_a_gradient_ratio_all_losses_are_divided():
    student, teacher = detector('RetinaNet'), detector('RetinaNet', width=12, seed=1)
    images, targets = batch()
    own = copy.deepcopy(student).train()(images, targets)
    found = DetectionDistiller(student.train(), teacher, pkd(grad_ratio=0.5))(images, targets)
    assert {k: found[k].item() for k in own} == pytest.approx(
        {k: v.item() / 1.5 for k, v in own.items()}
    )


@pytest.mark.parametrize('kind', KINDS)
def test_any_of_them_teaches(kind):
    student, teacher = detector('RetinaNet').train(), detector(kind, width=12, seed=1)
    found = DetectionDistiller(student, teacher, scored(grad_ratio=0.5))(*batch())
    sum(found.values()).backward()
    assert found['scored_hint'].item() > 0
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize('recipe', [pkd(weight=0.0), Recipe()], ids=['weight 0', 'no terms'])
@pytest.mark.parametrize('kind', ['RetinaNet', 'FasterRCNN'])
def test_weight_0_trains_bit_for_bit_as_without_a_teacher(kind, recipe):
    trained = []
    for way in (None, recipe):
        model = detector(kind).train()
        step = model
        if way is not None:
            step = DetectionDistiller(model, detector('FCOS', seed=1), way)
        opt = torch.optim.SGD(model.parameters(), 0.1)
        torch.manual_seed(3)
        for seed in range(3):
            opt.zero_grad()
            sum(step(*batch(seed=seed)).values()).backward()
            opt.step()
        trained.append(model.state_dict())
    assert all(torch.equal(v, trained[1][k]) for k, v in trained[0].items())


def test_the_teacher_stays_as_it_was():
    teacher = detector('FasterRCNN', seed=1).train()
    teacher.roi_heads.eval()
    before = copy.deepcopy(teacher.state_dict())
    modes = [m.training for m in teacher.modules()]
    distiller = DetectionDistiller(detector('SSD').train(), teacher, pkd())
    with distiller.teacher:
        for seed in range(2):
            sum(distiller(*batch(seed=seed)).values()).backward()
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert [m.training for m in teacher.modules()] == modes
    assert all(p.grad is None for p in teacher.parameters())
    assert hooks(teacher) == 0


def test_the_teacher_is_no_part_of_what_is_trained_or_saved():
    student, teacher = detector('SSD'), detector('RetinaNet', width=12, seed=1)
    distiller = DetectionDistiller(student, teacher, pkd())
    theirs = {id(p) for p in teacher.parameters()}
    assert not theirs & {id(p) for p in distiller.parameters()}
    assert {k.split('.')[0] for k in distiller.state_dict()} == {'student', 'links', '_extra_state'}


def test_projectors_exist_before_the_first_batch():
    distiller = DetectionDistiller(detector('SSD'), detector('RetinaNet', width=12, seed=1), pkd())
    # 8 -> 12 channels without bias, and a batch norm, at each of three levels
    assert sum(p.numel() for p in distiller.own_parameters()) == 3 * (8 * 12 + 2 * 12)


def test_nothing_is_left_behind():
    student = detector('FasterRCNN').train()
    distiller = DetectionDistiller(student, detector('RetinaNet', seed=1), pkd())
    distiller(*batch())
    assert hooks(student) == 0
    images, targets = batch()
    distiller.unchecked = set()
    with pytest.raises(AssertionError):
        distiller(images, [dict(t, boxes=t['boxes'][:, :3]) for t in targets])
    assert hooks(student) == 0
    assert all(m.training for m in student.modules())


def test_building_it_changes_no_random_state_or_mode():
    student = detector('FasterRCNN').train()
    student.backbone.eval()
    modes, state = [m.training for m in student.modules()], torch.get_rng_state()
    before = copy.deepcopy(student.state_dict())
    DetectionDistiller(student, detector('RetinaNet', width=8, seed=0), Recipe())
    torch.set_rng_state(state)
    DetectionDistiller(student, detector('RetinaNet', width=8), Recipe())
    assert [m.training for m in student.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


# what the teacher sees


def seen_by(teacher):
    "A list that receives the pixels that reach a teacher's backbone"
    found = []
    teacher.backbone.register_forward_pre_hook(lambda m, x: found.append(x[0].clone()))
    return found


def test_the_teacher_sees_the_students_pixels_under_its_own_normalization():
    sizes = [(64, 80), (48, 64)]  # padded in the batch
    teacher = detector('RetinaNet', seed=1, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.4, 0.3])
    distiller = DetectionDistiller(detector('FCOS').train(), teacher, pkd())
    images, targets = batch(size=sizes)
    found = seen_by(teacher)
    distiller(images, targets)
    # torchvision's own way, of the same sizes
    want = teacher.eval().transform(images)[0].tensors
    torch.testing.assert_close(found[-1], want, rtol=1e-5, atol=1e-5)


def test_a_teacher_with_a_fixed_size_is_asked_at_that_size():
    teacher = detector('SSD', size=(96, 128), seed=1)
    distiller = DetectionDistiller(detector('RetinaNet').train(), teacher, pkd())
    found = seen_by(teacher)
    distiller(*batch())
    assert found[-1].shape[2:] == (128, 96)  # torchvision gives width first
    assert [(p.s_shape[2], p.t_shape[2]) for p in distiller.pairs] == [(32, 16), (16, 8), (8, 4)]


def test_size_asks_the_teacher_at_a_larger_size():
    teacher = detector('RetinaNet', seed=1)
    distiller = DetectionDistiller(detector('FCOS').train(), teacher, pkd(), size=96)
    found = seen_by(teacher)
    sum(distiller(*batch()).values()).backward()
    assert found[-1].shape[2:] == (96, 96)


def test_a_teacher_object_keeps_its_options():
    teacher = Teacher(detector('RetinaNet', seed=1), run=dict(precision='fp32'), name='mine')
    distiller = DetectionDistiller(detector('FCOS'), teacher, pkd())
    assert distiller.teacher.name == 'mine'
    assert distiller.teacher.run == dict(precision='fp32')


# pairs and terms


def test_levels_pair_by_stride():
    student, teacher = detector('SSD', names='abc'), detector('RetinaNet', names='12')
    distiller = DetectionDistiller(student, teacher, pkd())
    assert distiller.head.level_pairs == [
        ('backbone@[a]', 'backbone@[1]'),
        ('backbone@[b]', 'backbone@[2]'),
    ]


def test_a_backbone_without_a_pyramid_is_one_level():
    student = detector('RetinaNet', names='0')
    student.backbone.forward = lambda x: student.backbone.down[0](student.backbone.stem(x))
    distiller = DetectionDistiller(student.train(), detector('SSD', seed=1), scored())
    assert distiller.head.level_pairs == [('backbone', 'backbone@[0]')]
    assert distiller(*batch())['scored_hint'].item() > 0


def test_last_is_the_coarsest_pair_and_names_are_possible():
    student, teacher = detector('SSD'), detector('RetinaNet', seed=1)
    last = DetectionDistiller(student, teacher, pkd(layers='last'))
    assert [p.student for p in last.pairs] == ['backbone@[2]']
    mine = DetectionDistiller(student, teacher, pkd(layers={'backbone.stem': 'backbone.stem'}))
    assert [p.teacher for p in mine.pairs] == ['backbone.stem']


@pytest.mark.parametrize(
    'recipe',
    [
        cwd(layers='auto', T=1.0),
        scored(),
        mgd(),
        fgd(),
        crosskd(),
        fgd(weight='paper') + scored(),
        Term(losses.hint, layers='auto'),
        'pkd() + at()',
    ],
    ids=['cwd', 'scored', 'mgd', 'fgd', 'crosskd', 'both', 'hint', 'text'],
)
def test_terms_on_levels_train_the_student(recipe):
    student = detector('SSD').train()
    distiller = DetectionDistiller(student, detector('RetinaNet', width=12, seed=1), recipe)
    found = distiller(*batch())
    terms = [v for k, v in found.items() if k not in ('classification', 'bbox_regression')]
    sum(terms).backward()
    assert student.backbone.stem[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize('recipe', [crosskd, mgd, scored])
def test_a_recipe_without_a_published_weight_says_so(recipe):
    with pytest.raises(DistillError, match="weight='paper': there is no such weight"):
        recipe(weight='paper')


@pytest.mark.parametrize('size', [None, 96])
def test_terms_read_the_boxes_as_fractions_of_the_padded_images(size):
    seen = []

    def reads(s, t, y):
        seen.append(y)
        return (s - t).pow(2).mean()

    student = detector('RetinaNet', min_size=128, max_size=256).train()
    recipe = Term(reads, weight=1.0, layers='auto')
    distiller = DetectionDistiller(student, detector('FCOS', seed=1), recipe, size=size)
    images, targets = batch(size=[(64, 80), (32, 64)])
    targets[1] = {k: v[:0] for k, v in targets[1].items()}
    distiller(images, targets)
    assert len(seen) == 3
    # the first image is resized from 64 x 80 to 128 x 160 and padded to 128 x 256, the width of the second
    want = targets[0]['boxes'] * 2 / torch.tensor([256, 128, 256, 128])
    for boxes in seen:
        torch.testing.assert_close(boxes[0], want)
        assert boxes[1].shape == (0, 4)


@pytest.mark.parametrize('kind, background', [('RetinaNet', None), ('FCOS', None), ('SSD', 0)])
def test_equal_heads_compare_their_outputs(kind, background):
    student, teacher = detector(kind).train(), detector(kind, width=12, seed=1)
    recipe = anchors(sure=0.0, background=background)
    distiller = DetectionDistiller(student, teacher, recipe)
    images, targets = batch()
    found = distiller(images, targets)
    with torch.no_grad():
        student.eval()
        x, y = student.transform(images)[0].tensors, teacher.eval().transform(images)[0].tensors
        student.train()
        a = student.head(list(student.backbone(x).values()))
        b = teacher.head(list(teacher.backbone(y).values()))
    # the teacher is in evaluation mode, the student in training mode
    want = losses_of(a, b, background)
    assert found['anchor_classes'].item() == pytest.approx(want[0], rel=1e-4)
    assert found['anchor_boxes'].item() == pytest.approx(want[1], rel=1e-4)


@pytest.mark.parametrize('student', ['FasterRCNN', 'SSD'])
@pytest.mark.parametrize('kind, background', [('RetinaNet', None), ('FCOS', None), ('SSD', 0)])
def test_crosskd_compares_predictions_of_the_teachers_head(student, kind, background):
    options = {} if student == 'SSD' else dict(min_size=64, max_size=64)
    student = detector(student, **options).train()
    teacher = detector(kind, width=12, classes=6, seed=1).train()
    before = copy.deepcopy(teacher.state_dict())
    recipe = crosskd(weight=1.0, boxes=0.5, sure=0.1, projector='conv')
    distiller = DetectionDistiller(student, teacher, recipe)
    images, targets = batch()
    with distiller.teacher:
        found = distiller(images, targets)
    with torch.no_grad():
        teacher.eval()
        x, y = [o.eval().transform(images)[0].tensors for o in (student, teacher)]
        own, t = [[*o.backbone(p).values()] for o, p in ((student.train(), x), (teacher, y))]
        links = distiller.head.links['crosskd']
        s = [link.projector(a, b) for link, a, b in zip(links, own, t)]
        a, b = [teacher.head(maps) for maps in (s, t)]
        teacher.train()
    kl, boxes = losses_of(a, b, background, sure=0.1)
    assert found['crosskd'].item() == pytest.approx(kl + 0.5 * boxes, rel=1e-4)
    sum(found.values()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(m.training for m in teacher.modules())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_crosskd_leaves_batch_norms_of_the_teachers_head_alone():
    teacher = detector('SSD', seed=1).train()
    anchors_ = teacher.anchor_generator.num_anchors_per_location()
    teacher.head = SSDLiteHead([8] * 3, anchors_, 4, nn.BatchNorm2d)
    before = copy.deepcopy(teacher.state_dict())
    distiller = DetectionDistiller(detector('RetinaNet').train(), teacher, crosskd(weight=1.0))
    sum(distiller(*batch()).values()).backward()
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize(
    'teacher, recipe, message',
    [
        (dict(kind='FasterRCNN'), crosskd(), 'must be a RetinaNet, FCOS or SSD'),
        (dict(kind='SSD', names='0123'), crosskd(), 'the head of an SSD has separate layers'),
        (dict(kind='SSD'), crosskd(layers='last'), 'the head of an SSD has separate layers'),
        (dict(kind='FCOS'), crosskd({'backbone.stem': 'backbone.stem'}), 'is not a level of the'),
    ],
)
def test_crosskd_refuses_heads_that_cannot_run_on_the_maps(teacher, recipe, message):
    with pytest.raises(DistillError, match=message):
        DetectionDistiller(detector('RetinaNet'), detector(**teacher), recipe)


def losses_of(a, b, background, sure=0.0):
    from fastdistill.detection import anchor_kl, box_deltas

    both = lambda o: [o['cls_logits'], o['bbox_regression']]
    return (
        anchor_kl(a['cls_logits'], b['cls_logits'], background=background).item(),
        box_deltas(both(a), both(b), sure=sure, background=background).item(),
    )


@pytest.mark.parametrize('teacher', [dict(kind='SSD'), dict(kind='RetinaNet', classes=5)])
def test_different_heads_are_refused(teacher):
    with pytest.raises(DistillError, match='both detectors must have the same anchors and classes'):
        DetectionDistiller(detector('RetinaNet'), detector(**teacher), anchors())


def test_terms_on_logits_are_refused():
    with pytest.raises(DistillError, match='kd compares the logits of a model with one output'):
        DetectionDistiller(detector('RetinaNet'), detector('RetinaNet', seed=1), kd())


def test_other_models_are_refused():
    with pytest.raises(DistillError, match='The student is a Linear: it must be a RetinaNet'):
        DetectionDistiller(nn.Linear(2, 2), detector('RetinaNet'))
    with pytest.raises(DistillError, match='The teacher is a Linear: it must be a RetinaNet'):
        DetectionDistiller(detector('RetinaNet'), nn.Linear(2, 2))


def test_a_gradient_ratio_sets_the_norm_at_the_levels():
    student = detector('RetinaNet').train()
    distiller = DetectionDistiller(student, detector('FCOS', seed=1), pkd(grad_ratio=0.5))
    distiller.ratios['pkd'].FLOOR = 0.0
    feats, seen = [], lambda m, x, y: feats.extend(y.values())
    handle = student.backbone.register_forward_hook(seen)
    found = distiller(*batch())
    handle.remove()
    norm = lambda v: torch.stack(
        [g.norm() for g in torch.autograd.grad(v, feats, retain_graph=True)]
    ).norm()
    own = sum(v for k, v in found.items() if k != 'pkd')
    assert (norm(found['pkd']) / norm(own)).item() == pytest.approx(0.5, rel=1e-3)


def test_evaluation_mode_returns_the_students_detections():
    student = detector('RetinaNet').eval()
    distiller = DetectionDistiller(student, detector('FCOS', seed=1), pkd())
    images, _ = batch()
    with torch.no_grad():
        found, want = distiller(images), student(images)
    assert [o.keys() for o in found] == [o.keys() for o in want]
    assert torch.equal(found[0]['boxes'], want[0]['boxes'])


def test_training_in_evaluation_mode_says_what_to_call():
    distiller = DetectionDistiller(detector('RetinaNet').eval(), detector('FCOS', seed=1), pkd())
    with pytest.raises(DistillError, match=r'call distiller.train\(\) before training'):
        distiller(*batch())


def test_the_weight_of_the_task_scales_torchvisions_losses():
    student = detector('RetinaNet').train()
    recipe = Recipe(*pkd(weight=1.0).terms, task=0.5)
    images, targets = batch()
    own = student(images, targets)
    found = DetectionDistiller(student, detector('FCOS', seed=1), recipe)(images, targets)
    assert found['classification'].item() == pytest.approx(own['classification'].item() / 2)


def test_a_checkpoint_continues_the_same_training():
    def run(steps, state=None):
        distiller = DetectionDistiller(
            detector('SSD').train(), detector('RetinaNet', width=12, seed=1), pkd()
        )
        opt = torch.optim.SGD(distiller.parameters(), 0.01)
        if state:
            distiller.load_state_dict(state)
        for seed in steps:
            opt.zero_grad()
            sum(distiller(*batch(seed=seed)).values()).backward()
            opt.step()
        return distiller.state_dict()

    torch.manual_seed(0)
    whole = run(range(4))
    torch.manual_seed(0)
    half = copy.deepcopy(run(range(2)))
    parts = run(range(2, 4), half)
    assert all(torch.equal(v, parts[k]) for k, v in whole.items() if k != '_extra_state')


# targets


def broken(**changes):
    images, targets = batch(1)
    t = targets[0]
    return images, [t | {k: fn(t) for k, fn in changes.items()}]


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(labels=lambda t: t['labels'] - 1), 'Add 1 to each if yours start at 0'),
        (dict(labels=lambda t: t['labels'] + 3), 'has 4 classes, of which 0 is the background'),
        (dict(labels=lambda t: t['labels'][:1]), '2 boxes have 1 labels'),
        (dict(boxes=lambda t: t['boxes'][:, [2, 3, 0, 1]]), 'ends before it begins'),
        (dict(boxes=lambda t: t['boxes'] / 64), 'Boxes must be in pixels'),
        (dict(boxes=lambda t: t['boxes'] * 4), 'is outside of the image of 64x64 pixels'),
        (dict(boxes=lambda t: t['boxes'].new_zeros(0)), r'torch.zeros\(0, 4\)'),
        (dict(boxes=lambda t: None), "no tensor 'boxes'"),
    ],
    ids=['from 0', 'too high', 'count', 'swapped', 'fractions', 'outside', 'empty', 'missing'],
)
def test_wrong_targets_are_refused_before_training(changes, message):
    student = detector('RetinaNet').train()
    distiller = DetectionDistiller(student, detector('FCOS', seed=1), pkd())
    with pytest.raises(DistillError, match=message):
        distiller(*broken(**changes))


def test_images_without_boxes_are_fine():
    student = detector('RetinaNet').train()
    distiller = DetectionDistiller(student, detector('FCOS', seed=1), pkd())
    found = distiller(*batch(boxes=0))
    assert all(v.isfinite() for v in found.values())


def test_targets_of_fewer_images_are_refused():
    student = detector('RetinaNet').train()
    distiller = DetectionDistiller(student, detector('FCOS', seed=1), pkd())
    images, targets = batch()
    with pytest.raises(DistillError, match='2 images have 1 targets'):
        distiller(images, targets[:1])
    with pytest.raises(DistillError, match='2 images have none targets'):
        distiller(images)
