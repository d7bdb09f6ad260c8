"""List the files of fastdistill that one training step from a cache enters, in the main process
and in a DataLoader worker.

python scripts/trace_step.py
"""

import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import torch
from fastai.basics import Callback, Learner
from fastai.data.all import CategoryBlock, DataBlock, IndexSplitter
from fastai.vision.all import FlipItem, ImageBlock, PILImage, aug_transforms
from torch import nn

import fastdistill
from fastdistill import Teacher, kd
from fastdistill.fastai import KnowledgeDistillation, cache_teacher

ROOT = Path(fastdistill.__file__).parent

# file -> why the step needs it
MAIN = {
    'fastai/transforms.py': 'runs the batch transforms with the numbers of each sample and view',
    'base/sample_seeds.py': 'the seed of each sample, view and transform',
    'base/random_state.py': 'the global random state is the same after the replay',
    'cache/per_sample.py': 'draws the numbers of all samples at once, each from its own seed',
    'fastai/teacher_targets.py': 'takes the samples out of the batch, before labels are used',
    'fastai/callback.py': 'the events: asks the source, adds the loss',
    'fastai/patches.py': 'whether a different callback validates in the middle of the fit',
    'fastai/learner_notes.py': 'which callback distills in this fit',
    'distiller/distiller.py': "asks the sources of all heads with their terms' layers",
    'distiller/heads.py': 'groups the heads whose teachers run at once',
    'distiller/head.py': 'compares the outputs of one head',
    'distiller/weight_changes.py': 'whether a teacher was started outside of a training',
    'fastai/training_step.py': 'adds the terms to the loss of the Learner',
    'fastai/fit_log.py': 'prints the gradient norms once they are measured',
    'fastai/held_outputs.py': 'the source: outputs that the batch brought',
    'fastai/cache_feed.py': 'the source: rows of this cache, with classes in the order of the labels',
    'base/batch_samples.py': 'whether MixUp mixed the batch',
    'base/mixup.py': 'would mix the outputs as MixUp mixed the batch',
    'cache/reader.py': 'decodes rows, with the classes that they are about',
    'cache/row_layout.py': 'the bytes of a row as tensors',
    'base/outputs.py': "the teacher's and the student's outputs",
    'features/layer_pairs.py': 'the inputs of the batch as a tuple',
    'recipes/recipe_loss.py': 'the loss: each term with its weight',
    'recipes/term.py': 'the options of a term at this point of the training',
    'recipes/schedule.py': 'the temperature and the weight at this point of the training',
    'recipes/batch_tensors.py': 'masks, and logits of all classes',
    'recipes/token_labels.py': 'the padding of tokens',
    'recipes/layer_link.py': 'the two tensors that a term compares',
    'losses/_base.py': 'options and reduction of a loss',
    'losses/response.py': 'the loss function',
    'losses/chunks.py': 'its gradient without large temporary tensors',
    'base/errors.py': 'whether an option is one of the allowed values',
    'base/task.py': 'whether values are finite, for this kind of outputs',
    'fastai/finite_check.py': 'stops if stored outputs are nan',
    'fastai/metrics.py': 'the column of the task loss in training',
    'fastai/unlabeled.py': 'whether there are unlabeled inputs too',
}
WORKER = {
    'fastai/sampled_batches.py': 'makes the items of a batch, and brings their samples and rows',
    'base/random_state.py': 'seeds the global generators for each item, and restores them',
    'base/sample_seeds.py': 'the view of each sample in this epoch, and its seed',
    'base/transform_random_state.py': 'seeds generators inside transforms',
    'cache/reader.py': 'reads rows',
    'cache/row_layout.py': 'the size of a row',
    'cache/manifest.py': 'which file a row is in (its first read in this worker)',
    'cache/file_store.py': 'maps the file (its first read in this worker)',
    'base/atomic_files.py': 'a readable error if the file is gone (its first read in this worker)',
}


def our_file(code):
    """The path of a code object's file inside the package; None for code of other packages."""
    path = Path(code.co_filename)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else None


def profiled(note):
    """Call `note(file)` for each call of a function of fastdistill in this thread."""

    def profile(frame, event, arg):
        if event == 'call' and (file := our_file(frame.f_code)):
            note(file)

    sys.setprofile(profile)


class OneStep(Callback):
    """Note what a step enters, from the end of the step before it."""

    order = 1000

    def __init__(self):
        super().__init__()
        self.entered = {}

    def after_batch(self):
        sys.setprofile(None)
        if self.training and self.iter == 0:
            profiled(lambda file: self.entered.setdefault(file))


def note_in(log, file):
    with open(log, 'a') as f:
        print(file, file=f)


def start_worker(log):
    profiled(partial(note_in, log))


def image(i):
    g = torch.Generator().manual_seed(i)
    return PILImage.create(torch.randint(0, 256, (16, 16, 3), generator=g, dtype=torch.uint8))


def label(i):
    return 'ab'[i % 2]


def entered_files():
    """(files of the main process, files of a worker), in the order in which they are entered."""
    dls = DataBlock(
        (ImageBlock, CategoryBlock),
        get_x=image,
        get_y=label,
        splitter=IndexSplitter(range(24, 32)),
        item_tfms=FlipItem(),
        batch_tfms=aug_transforms(do_flip=False),
    ).dataloaders(list(range(32)), bs=8, num_workers=0)
    model = lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2))
    with tempfile.TemporaryDirectory() as tmp, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        folder, log = Path(tmp) / 'cache', Path(tmp) / 'worker'
        cache = cache_teacher(Teacher(model()), dls, folder, views=2, check=False, progress=False)
        dls.train.fake_l.num_workers = 1
        dls.train.wif = partial(start_worker, log)
        step, learn = OneStep(), Learner(dls, model())
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-3, cbs=[KnowledgeDistillation(cache, kd()), step])
        sys.setprofile(None)
        return list(step.entered), list(dict.fromkeys(log.read_text().split()))


if __name__ == '__main__':
    named = ('main process', MAIN), ('worker', WORKER)
    for (where, why), files in zip(named, entered_files()):
        print(f'{where}: {len(files)} files')
        for file in files:
            print(f'  {file:27} {why.get(file, "?")}')
