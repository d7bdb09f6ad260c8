"A teacher's detections in a file, instead of the teacher."

import pickle
import numpy as np
import apps, processes, pytest, torch
from detectors import batch, detector
from safetensors.numpy import load_file, save_file
from fastdistill.base.outputs import DistillError
from fastdistill.detection import (
    StoredDetections,
    best_threshold,
    detect,
    pseudo_labels,
    store_detections,
    teacher_labels,
)

NAMES = ['a/1.jpg', 'a/2.jpg', 'b/1.jpg', 'b/2.jpg']


def finder(**options):
    "A detector that has a few detections in each image"
    options = dict(score_thresh=0.0, detections_per_img=5, seed=1) | options
    return detector('RetinaNet', **options)


def in_batches(images, names=NAMES, n=2):
    return [(images[i : i + n], names[i : i + n]) for i in range(0, len(images), n)]


@pytest.fixture
def stored(tmp_path):
    "(teacher, images, targets, stored detections)"
    teacher, (images, targets) = finder(), batch(4)
    return teacher, images, targets, store_detections(teacher, in_batches(images), tmp_path / 'd')


def assert_equal(found, want):
    assert len(found) == len(want)
    for a, b in zip(found, want):
        assert a.keys() == b.keys()
        for k in a:
            assert a[k].dtype == b[k].dtype
            assert torch.equal(a[k], b[k])


def test_they_are_those_of_the_teacher_in_any_order(stored):
    teacher, images, _, found = stored
    want = detect(teacher, images)
    assert sum(len(o['boxes']) for o in want) > 4
    assert_equal(found(NAMES), want)
    again = pickle.loads(pickle.dumps(StoredDetections(found.path, teacher)))
    assert_equal(again([NAMES[2], NAMES[0]]), [want[2], want[0]])
    assert len(again) == 4


def test_thresholds_and_labels_are_those_of_the_teacher(stored):
    teacher, images, targets, found = stored
    order = [3, 1, 0]
    pick = lambda rows: [rows[i] for i in order]
    live = best_threshold(teacher, [(pick(images), pick(targets))], iou=0.1)
    best = best_threshold(found, [(pick(NAMES), pick(targets))], iou=0.1)
    assert best == live
    assert_equal(teacher_labels(found, NAMES, best), teacher_labels(teacher, images, best))


def test_an_image_without_detections_is_stored_too(tmp_path):
    teacher, (images, _) = finder(score_thresh=1.0), batch(2)
    found = store_detections(teacher, [(images, NAMES[:2])], tmp_path / 'd')
    assert_equal(found(NAMES[:2]), detect(teacher, images))
    assert teacher_labels(found, NAMES[:1], 0.0)[0]['boxes'].shape == (0, 4)


def test_an_interrupted_call_goes_on_where_it_stopped(stored, tmp_path):
    teacher, images, _, want = stored
    path, seen = tmp_path / 'again', []
    teacher.register_forward_pre_hook(lambda m, x: seen.append(len(x[0])))

    def interrupted():
        yield images[:2], NAMES[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store_detections(teacher, interrupted(), path)
    assert len(StoredDetections(path)) == 2
    # three images in a batch, of which one is stored already
    found = store_detections(teacher, in_batches(images[1:], NAMES[1:], 3), path)
    assert seen == [2, 2]
    assert_equal(found(NAMES), want(NAMES))
    written = path.stat().st_mtime_ns
    store_detections(teacher, in_batches(images), path)
    assert seen == [2, 2]
    assert path.stat().st_mtime_ns == written


def test_new_detections_are_written_before_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(pseudo_labels, 'WRITE_AFTER', -1)
    path, (images, _), stored = tmp_path / 'd', batch(4), []

    def batches():
        for b in in_batches(images):
            yield b
            stored.append(len(StoredDetections(path)))

    store_detections(finder(), batches(), path)
    assert stored == [2, 4]


def test_numbers_of_a_dataloader_and_images_can_be_names(tmp_path):
    teacher, (images, _) = finder(), batch(2)
    found = store_detections(teacher, [(images, torch.tensor([7, 8]))], tmp_path / 'numbers')
    assert_equal(found([8]), detect(teacher, images)[1:])
    found = store_detections(teacher, [(images, images)], tmp_path / 'images')
    assert_equal(found(images[1:]), detect(teacher, images)[1:])


def one_of_two(folder):
    "What each of two processes does: two images of its own, and one that both have"
    torch.distributed.init_process_group('gloo')
    (images, _), rank = batch(4), torch.distributed.get_rank()
    own = [0, 1, 2] if rank == 0 else [2, 3]
    batches = [([images[i]], [NAMES[i]]) for i in own]
    found = store_detections(finder(), batches, folder / 'd')
    assert len(found) == 4
    apps.leave_together()


def test_two_processes_store_their_images_in_one_file(tmp_path):
    both = processes.start_two(tmp_path / 'two', one_of_two, tmp_path)
    assert processes.ended(*both) == [0, 0], processes.said(tmp_path / 'two.0') + processes.said(
        tmp_path / 'two.1'
    )
    teacher, (images, _) = finder(), batch(4)
    found = StoredDetections(tmp_path / 'd', teacher)
    assert len(found) == 4
    assert_equal(found(NAMES), [detect(teacher, [x])[0] for x in images])
    assert [p.name for p in tmp_path.glob('d*')] == ['d']


def test_what_a_process_stored_before_an_interruption_is_added(stored, tmp_path):
    teacher, images, _, found = stored
    want = found(NAMES)
    found.path.rename(tmp_path / 'd.rank1')
    store_detections(teacher, in_batches(images[:1], NAMES[:1]), found.path)
    assert_equal(StoredDetections(found.path)(NAMES), want)
    assert not (tmp_path / 'd.rank1').exists()


# mistakes


def test_an_image_that_is_not_stored_is_named(stored):
    *_, found = stored
    with pytest.raises(DistillError, match="no detections for the image 'c.jpg'. It has .* for 4"):
        found(['a/1.jpg', 'c.jpg'])


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(seed=2), 'a teacher with different weights'),
        (dict(score_thresh=0.5), 'a teacher with score_thresh 0.0, not 0.5'),
        (dict(min_size=80), 'a teacher with transform.min_size.0 64, not 80'),
    ],
    ids=['weights', 'score', 'size'],
)
def test_a_different_teacher_is_refused(stored, changes, message):
    _, images, _, found = stored
    other = finder(**changes)
    with pytest.raises(DistillError, match=message):
        StoredDetections(found.path, other)
    with pytest.raises(DistillError, match=message):
        store_detections(other, in_batches(images), found.path)


def test_images_of_a_different_size_are_refused(stored):
    teacher, images, _, found = stored
    smaller = [x[:, :32] for x in images]
    with pytest.raises(DistillError, match='has 32x64 pixels, but its detections .* 64x64 pixels'):
        store_detections(teacher, in_batches(smaller), found.path)


def test_two_processes_with_different_images_of_one_name_are_told(stored, tmp_path):
    teacher, images, _, found = stored
    found.path.rename(tmp_path / 'd.rank0')
    store_detections(teacher, [([images[0][:, :32]], NAMES[:1])], tmp_path / 'e')
    (tmp_path / 'e').rename(tmp_path / 'd.rank1')
    with pytest.raises(
        DistillError, match='In .*d.rank1, an image has the same name as an image of a'
    ):
        store_detections(teacher, in_batches(images), found.path)


def test_wrong_names_are_refused(tmp_path):
    (images, targets), teacher = batch(2), finder()
    for names, message in [
        (['a', 'a'], "Two images have the name 'a'"),
        (['a'], '2 images have 1 names'),
        (targets, 'targets instead of names'),
    ]:
        with pytest.raises(DistillError, match=message):
            store_detections(teacher, [(images, names)], tmp_path / 'd')
    with pytest.raises(DistillError, match='There are no images'):
        store_detections(teacher, [], tmp_path / 'd')


def test_other_and_damaged_files_are_refused(stored, tmp_path):
    *_, found = stored
    path = tmp_path / 'x'
    about = dict(teacher='{"name": "a", "weights": "b", "options": {}}')
    good = load_file(found.path)

    def message(arrays, about=about):
        save_file(arrays, path, metadata=about)
        with pytest.raises(DistillError) as e:
            StoredDetections(path)
        return str(e.value)

    assert 'did not write this file' in message(dict(weight=np.zeros(3)))
    assert 'did not write this file' in message(good, {})
    assert 'number of boxes differs' in message(good | dict(counts=good['counts'] + 1))
    assert 'do not have unique keys' in message(good | dict(keys=good['keys'] * 0))
    assert 'labels are float32' in message(good | dict(labels=good['scores']))
    path.write_bytes(found.path.read_bytes()[:200])
    with pytest.raises(DistillError, match="Can't read the detections in"):
        StoredDetections(path)
    with pytest.raises(DistillError, match="Can't read the detections in .*/missing"):
        StoredDetections(tmp_path / 'missing')
