"The same student, teacher, recipe and batches in a plain loop, fastai, Lightning, Hugging Face and accelerate: the same losses and weights."

import copy, subprocess, sys
from functools import partial
import pytest
import torch
import torch.nn.functional as F
import apps  # noqa: F401 (before the rest of fastai: it keeps its warnings quiet)
import fastai.basics as fa
import lightning.pytorch as pl
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset
from transformers import TrainingArguments
from fastdistill import Distiller, Term, kd, losses
from fastdistill.fastai import KnowledgeDistillation
from fastdistill.huggingface import DistillationTrainer
from fastdistill.lightning import DistillCallback, DistillModule

pytestmark = [
    pytest.mark.filterwarnings(f'ignore:{m}')
    for m in (
        ':lightning.fabric.utilities.warnings.PossibleUserWarning',
        '.*isinstance.treespec, LeafSpec.',
        'The teacher is (no|hardly) better than chance',
    )
]  # these are untrained
STEPS, SIZE, LR, MOM = 5, 8, 0.05, 0.9


class Net(nn.Module):
    "With labels, it also returns its loss, as the Trainer of transformers wants it"

    def __init__(self, width):
        super().__init__()
        self.body, self.head = (
            nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
            nn.Linear(width, 3),
        )

    def forward(self, x, labels=None):
        logits = self.head(self.body(x))
        return (
            logits if labels is None else dict(loss=F.cross_entropy(logits, labels), logits=logits)
        )


@pytest.fixture(scope='module')
def start():
    "Student, teacher, projector and data, with which every face begins"
    torch.manual_seed(0)
    x = torch.randn(STEPS * SIZE, 6)
    return dict(
        student=Net(8),
        teacher=Net(16),
        projector=nn.Linear(8, 16),
        data=(x, torch.randint(3, (len(x),))),
    )


def recipe(start):
    return kd(T=2, alpha=('linear', 0.8, 0.4)) + Term(
        losses.hint,
        layers={'body': 'body'},
        projector=copy.deepcopy(start['projector']),
        weight=0.2,
    )


def loader(start):
    return DataLoader(TensorDataset(*start['data']), SIZE)


def sgd(params, lr=LR):
    return torch.optim.SGD(params, lr, momentum=MOM)


def plain(start, folder):
    student, seen = copy.deepcopy(start['student']), []
    d = Distiller(student, start['teacher'], recipe(start), example=start['data'][0][:SIZE])
    opt = sgd(d.parameters())
    for i, (x, y) in enumerate(loader(start)):
        loss = d(x, y, progress=i / STEPS).total
        loss.backward()
        opt.step()
        opt.zero_grad()
        seen.append(loss.item())
    return seen, student, d


def accelerated(start, folder):
    "The Distiller is what accelerate prepares: not the student, and not the teacher. The student may be compiled and averaged"
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, student, seen = Accelerator(cpu=True), copy.deepcopy(start['student']), []
    student.compile(backend='eager')
    d = Distiller(student, start['teacher'], recipe(start), example=start['data'][0][:SIZE])
    average = AveragedModel(student)
    prepared, opt, batches = accelerator.prepare(d, sgd(d.parameters()), loader(start))
    with d.teacher:
        for i, (x, y) in enumerate(batches):
            loss = prepared(x, y, progress=i / STEPS).total
            accelerator.backward(loss)
            opt.step()
            opt.zero_grad()
            average.update_parameters(student)
            seen.append(loss.item())
    assert accelerator.unwrap_model(prepared).student is student and not any(
        'teacher' in k for k in prepared.state_dict()
    )
    assert set(average.module.state_dict()) == set(start['student'].state_dict())
    accelerator.save_state(folder)
    assert (folder / 'model.safetensors').exists()
    return seen, student, d


class Noted(fa.Callback):
    order = 20

    def __init__(self):
        super().__init__()
        self.seen = []

    def after_backward(self):
        self.seen.append(self.learn.loss.item())


def in_fastai(start, folder):
    student = copy.deepcopy(start['student'])
    train, valid = [
        fa.DataLoader(list(zip(*start['data'])), bs=SIZE, shuffle=False, num_workers=0)
        for _ in range(2)
    ]
    learn = fa.Learner(
        fa.DataLoaders(train, valid),
        student,
        fa.CrossEntropyLossFlat(),
        opt_func=partial(fa.OptimWrapper, opt=partial(torch.optim.SGD, momentum=MOM)),
    )
    noted, cb = Noted(), KnowledgeDistillation(start['teacher'], recipe(start), check=False)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, LR, cbs=[cb, noted])
    return noted.seen, student, cb.distiller


class Mine(pl.LightningModule):
    def __init__(self, student):
        super().__init__()
        self.net, self.seen = student, []

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return sgd(self.net.parameters())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(outputs['loss'].item())


class Ready(DistillModule):
    seen = property(lambda self: self.__dict__.setdefault('noted', []))
    on_train_batch_end = Mine.on_train_batch_end


def fitted(start, folder, module, *callbacks):
    pl.Trainer(
        max_epochs=1,
        accelerator='cpu',
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
    ).fit(module, loader(start))
    return module.seen


def in_lightning(start, folder):
    student = copy.deepcopy(start['student'])
    cb = DistillCallback(start['teacher'], recipe(start), student='net')
    return fitted(start, folder, Mine(student), cb), student, cb.distiller


def in_a_ready_module(start, folder):
    student = copy.deepcopy(start['student'])
    module = Ready(student, start['teacher'], recipe(start), lr=LR, optimizer=sgd)
    return fitted(start, folder, module), student, module.callback.distiller


class InOrder(DistillationTrainer):
    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def in_hugging_face(start, folder):
    student = copy.deepcopy(start['student'])
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=SIZE,
        num_train_epochs=1,
        logging_steps=1,
        lr_scheduler_type='constant',
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy='no',
        dataloader_pin_memory=False,
        max_grad_norm=0.0,
        learning_rate=LR,
    )
    trainer = InOrder(
        student,
        args,
        train_dataset=[dict(x=x, labels=y) for x, y in zip(*start['data'])],
        teacher=start['teacher'],
        recipe=recipe(start),
        optimizers=(sgd(student.parameters()), None),
    )
    trainer.train()
    return [h['loss'] for h in trainer.state.log_history[:STEPS]], student, trainer.distiller


FACES = dict(
    fastai=in_fastai,
    lightning=in_lightning,
    ready_module=in_a_ready_module,
    hugging_face=in_hugging_face,
    accelerate=accelerated,
)


@pytest.fixture(scope='module')
def reference(start):
    return plain(start, None)


@pytest.mark.parametrize('face', FACES)
def test_every_face_gives_the_losses_and_weights_of_a_plain_loop(start, reference, face, tmp_path):
    losses_, student, d = FACES[face](start, tmp_path)
    assert losses_ == pytest.approx(reference[0], abs=1e-6) and len(losses_) == STEPS
    for a, b, old in zip(
        reference[1].parameters(), student.parameters(), start['student'].parameters()
    ):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-6)
        assert (a - old).abs().max() > 1e-3
    for a, b in zip(reference[2].own_parameters(), d.own_parameters()):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-6)
    assert len(d.own_parameters()) == 2 and not torch.equal(
        d.own_parameters()[0], start['projector'].weight
    )


WITHOUT = [
    ('huggingface', 'transformers', 'hf'),
    ('huggingface', 'accelerate', 'hf'),
    ('lightning', 'lightning', 'lightning'),
]


@pytest.fixture(scope='module')
def said_without():
    "What the import of each face says where a framework is missing, all in one new Python"
    code = f"""
import importlib, sys
for face, needs, _ in {WITHOUT}:
    sys.modules[needs] = None
    try:
        importlib.import_module(f'fastdistill.{{face}}')
    except ImportError as e:
        print(face, needs, e)
    del sys.modules[needs]
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize('face, needs, extra', WITHOUT)
def test_without_its_framework_a_face_says_what_to_install(face, needs, extra, said_without):
    (said,) = [o for o in said_without if o.startswith(f'{face} {needs} ')]
    assert f"pip install 'fastdistill[{extra}]'" in said
