"Lightning: a callback that leaves the training step as it is, and a ready module."

import re

import pytest
import torch
import torch.nn.functional as F
import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    LearningRateFinder,
    ModelCheckpoint,
    WeightAveraging,
)
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel
from fastdistill import DistillError, DistillWarning, Teacher, Term, kd, losses, soft_labels
from fastdistill.lightning import DistillCallback, DistillModule

# what Lightning warns of about itself, and about loaders as small as these
pytestmark = [
    pytest.mark.filterwarnings(f'ignore:{m}')
    for m in (
        ':lightning.fabric.utilities.warnings.PossibleUserWarning',
        '.*isinstance.treespec, LeafSpec.',
        'The teacher is (no|hardly) better than chance',
    )
]  # these are untrained
refuses = lambda text: pytest.raises(DistillError, match=text)
T, ALPHA = 2.0, 0.7


def net(width, dropout=0.0):
    return nn.Sequential(
        nn.Linear(6, width),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 3),
    )


def data(n=24, size=8):
    g = torch.Generator().manual_seed(0)
    return DataLoader(
        TensorDataset(torch.randn(n, 6, generator=g), torch.randint(3, (n,), generator=g)), size
    )


class Mine(pl.LightningModule):
    "Somebody's module, which knows no teacher"

    def __init__(self, width=8, dropout=0.0, lr=0.1, named=True):
        super().__init__()
        self.model, self.lr, self.named, self.seen = net(width, dropout), lr, named, []

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy((self.model if self.named else self)(x), y)
        self.log('mine', loss)
        return loss if self.named else dict(loss=loss, extra=batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log('val_loss', F.cross_entropy(self(batch[0]), batch[1]))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(outputs['loss'].item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


def trainer(folder, *callbacks, steps=3, **kwargs):
    return pl.Trainer(
        **{
            **dict(
                max_steps=steps,
                accelerator='cpu',
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
                default_root_dir=folder,
                callbacks=list(callbacks),
            ),
            **kwargs,
        }
    )


def by_hand(student, teacher, x, y, alpha=ALPHA):
    with torch.no_grad():
        t = F.log_softmax(teacher.eval()(x) / T, 1)
    s = student(x)
    return (1 - alpha) * F.cross_entropy(s, y) + alpha * T**2 * (
        t.exp() * (t - F.log_softmax(s / T, 1))
    ).sum(1).mean()


@pytest.mark.parametrize('named', [True, False])
def test_a_callback_adds_the_teacher_to_a_training_step(named, tmp_path):
    module, teacher = Mine(named=named), net(16)
    copy = net(8)
    copy.load_state_dict(module.model.state_dict())
    trainer(
        tmp_path, DistillCallback(teacher, kd(T=T, alpha=ALPHA), student='model' if named else None)
    ).fit(module, data())
    opt, expected = torch.optim.SGD(copy.parameters(), 0.1, momentum=0.9), []
    for x, y in data():
        loss = by_hand(copy, teacher, x, y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        expected.append(loss.item())
    assert module.seen == pytest.approx(expected, rel=1e-5)
    for a, b in zip(copy.parameters(), module.model.parameters()):
        torch.testing.assert_close(a, b)


class OfSeveral(Mine):
    "Its batch holds a batch of each loader; it learns from the first"

    def training_step(self, batch, batch_idx):
        x, y = next(iter(batch.values() if isinstance(batch, dict) else batch))
        return F.cross_entropy(self.model(x), y)


LOADERS = dict(
    dict=(lambda: dict(a=data(), b=shuffled()), 'a'),
    list=(lambda: [data(), shuffled()], 0),
    combined=(lambda: CombinedLoader([data(), shuffled()], 'max_size_cycle'), 0),
)


@pytest.mark.parametrize('recipe', [kd(T=T, alpha=ALPHA), None], ids=['kd', 'automatic'])
@pytest.mark.parametrize('loaders, first', LOADERS.values(), ids=LOADERS)
def test_several_loaders_need_a_function_that_splits_their_batch(tmp_path, loaders, first, recipe):
    def fit(**options):
        torch.manual_seed(0)
        module, teacher = OfSeveral(), net(16)
        callback = DistillCallback(teacher, recipe, student='model', **options)
        trainer(tmp_path, callback).fit(module, loaders())
        return module, teacher

    advice = re.escape(f'split=lambda batch: (batch[{first!r}][0], batch[{first!r}][1:])')
    for check in (True, False):
        with refuses(
            f'of 2 DataLoaders, and each batch contains one batch from each of them.*{advice}'
        ):
            fit(check=check)
    module, teacher = fit(split=lambda batch: (batch[first][0], batch[first][1:]))
    if recipe is not None:
        torch.manual_seed(0)
        copy = OfSeveral().model
        x, y = next(iter(data()))
        assert module.seen[0] == pytest.approx(by_hand(copy, teacher, x, y).item(), rel=1e-5)


def shuffled():
    return DataLoader(data().dataset, 8, shuffle=True)


def test_loaders_of_inputs_and_labels_need_no_function(tmp_path):
    x, y = data().dataset.tensors
    module, alone = Mine(), Mine()
    alone.load_state_dict(module.state_dict())
    teacher = net(16)
    for m, loader in ((alone, data()), (module, [DataLoader(x, 8), DataLoader(y, 8)])):
        trainer(tmp_path, DistillCallback(teacher, kd(), student='model')).fit(m, loader)
    assert module.seen == alone.seen


def test_alpha_0_trains_bit_for_bit_as_without_it(tmp_path):
    ends = []
    for cbs in ([], [DistillCallback(net(16), kd(alpha=0), student='model')]):
        torch.manual_seed(0)
        module = Mine(dropout=0.3)
        trainer(tmp_path, *cbs, steps=6, accumulate_grad_batches=2, max_epochs=9).fit(
            module, data()
        )
        ends.append(module.state_dict())
    for k, v in ends[0].items():
        assert torch.equal(v, ends[1][k]), k


def test_looking_at_batches_does_not_change_the_order_of_a_loader_with_its_own_generator(tmp_path):
    def shuffled():
        dataset, g = data().dataset, torch.Generator().manual_seed(5)
        return DataLoader(dataset, 8, shuffle=True, generator=g)

    ends = []
    term = Term(losses.hint, weight=0, layers={'1': '1'})  # its projector is built from a batch
    for cbs in ([], [DistillCallback(net(16), kd(alpha=0) + term, student='model')]):
        torch.manual_seed(0)
        module = Mine()
        trainer(tmp_path, *cbs, steps=6, max_epochs=9).fit(module, shuffled())
        ends.append(module.state_dict())
    for k, v in ends[0].items():
        assert torch.equal(v, ends[1][k]), k


class Augments:
    "A module or a data module that changes batches with a generator of its own"

    rng = None

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.rng is None:
            self.rng = torch.Generator().manual_seed(3)
        x, y = batch
        return x + torch.randn(x.shape, generator=self.rng), y


class AugmentsItself(Augments, Mine):
    pass


class AugmentedData(Augments, pl.LightningDataModule):
    def train_dataloader(self):
        return data()


@pytest.mark.parametrize('place', ['module', 'data'])
def test_looking_at_batches_draws_no_numbers_of_hooks_that_change_batches(tmp_path, place):
    ends = []
    term = Term(losses.hint, weight=0, layers={'1': '1'})  # its projector is built from a batch
    for cbs in ([], [DistillCallback(net(16), kd(alpha=0) + term, student='model')]):
        torch.manual_seed(0)
        module = AugmentsItself() if place == 'module' else Mine()
        source = data() if place == 'module' else AugmentedData()
        trainer(tmp_path, *cbs, steps=6, max_epochs=9).fit(module, source)
        ends.append(module.state_dict())
    for k, v in ends[0].items():
        assert torch.equal(v, ends[1][k]), k


class Doubles:
    "A module or a data module whose batches have half of the student's inputs until it is asked"

    def on_before_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return torch.cat([x, -x], 1), y


class DoublesItself(Doubles, Mine):
    pass


def halves():
    x = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.argmin(1)), 8)


class DoubledData(Doubles, pl.LightningDataModule):
    def train_dataloader(self):
        return halves()


@pytest.mark.parametrize('precision', ['32-true', '64-true', 'bf16-true'])
@pytest.mark.parametrize('place', ['module', 'data'])
def test_batches_are_looked_at_as_the_training_step_gets_them(tmp_path, capsys, place, precision):
    "The check scores them, and projectors are built from them"
    teacher = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    teacher[0].weight.data, teacher[0].bias.data = torch.eye(8, 6), torch.zeros(8)
    teacher[1].weight.data, teacher[1].bias.data = 9 * torch.eye(3, 8).roll(3, 1), torch.zeros(3)
    term = Term(losses.hint, grad_ratio=0.1, layers={'0': '0'}, projector='linear')
    callback = DistillCallback(teacher, kd(T=T, alpha=ALPHA) + term, student='model')
    module = DoublesItself() if place == 'module' else Mine()
    source = halves() if place == 'module' else DoubledData()
    trainer(tmp_path, callback, precision=precision).fit(module, source)
    assert 'teacher 1.000' in capsys.readouterr().out
    assert len(module.seen) == 3


class CallsTwice(Mine):
    "Its step calls the student with other inputs too"

    def __init__(self, gradient, twice=True, **kwargs):
        super().__init__(**kwargs)
        self.gradient, self.twice = gradient, twice

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.model(x)
        if self.twice:
            with torch.set_grad_enabled(self.gradient):
                self.model(2 * x + 1)
        return F.cross_entropy(out, y)


@pytest.mark.parametrize('gradient', [True, False])
def test_the_call_with_the_inputs_of_the_batch_is_compared(gradient, tmp_path):
    teacher, recipe = net(16), kd() + Term(losses.sp, layers={'1': '1'}, weight=0.1)
    ends = []
    for twice in (False, True):
        torch.manual_seed(0)
        module = CallsTwice(gradient, twice)
        trainer(tmp_path, DistillCallback(teacher, recipe, student='model')).fit(module, data())
        ends.append(module.state_dict())
    for k, v in ends[0].items():
        assert torch.equal(v, ends[1][k]), k


class ChangesInputs(Mine):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.model(x + 1), y)


class CallsTwiceWithChanged(ChangesInputs):
    def training_step(self, batch, batch_idx):
        self.model(batch[0] + 2)
        return super().training_step(batch, batch_idx)


def test_inputs_that_change_inside_the_step_are_reported(tmp_path):
    t = trainer(tmp_path, DistillCallback(net(16), kd(), student='model'))
    with pytest.warns(DistillWarning, match='Change the inputs before the step'):
        t.fit(ChangesInputs(), data())
    t = trainer(tmp_path, DistillCallback(net(16), kd(), student='model'))
    with refuses('calls the student, Sequential, 2 times'):
        t.fit(CallsTwiceWithChanged(), data())
    split = lambda batch: (batch[0] + 1, batch[1:])
    t = trainer(tmp_path, DistillCallback(net(16), kd(), student='model', split=split))
    t.fit(CallsTwiceWithChanged(), data())


def module_of(teacher, width=8, recipe=None, dropout=0.0):
    torch.manual_seed(0)
    return DistillModule(
        net(width, dropout),
        teacher,
        kd() + Term(losses.hint, layers={'1': '1'}, grad_ratio=0.5) if recipe is None else recipe,
        lr=1e-2,
    )


def test_a_ready_module_logs_the_parts_and_validates_by_the_labels(tmp_path):
    module = module_of(net(16), recipe=kd(T=T, alpha=ALPHA))
    x, y = next(iter(data(n=8)))
    t = trainer(tmp_path, steps=1)
    before = F.cross_entropy(module.student(x), y).item()
    t.fit(module, data(n=8), data(n=8))
    assert (
        t.callback_metrics['task_loss'].item() == pytest.approx(before)
        and t.callback_metrics['kd_loss'] > 0
    )
    with torch.no_grad():
        assert t.callback_metrics['val_loss'].item() == pytest.approx(
            F.cross_entropy(module.student(x), y).item()
        )
    assert t.test(module, data(n=8), verbose=False)[0].keys() == {'test_loss'}


@pytest.mark.filterwarnings('ignore:Be aware that when using .ckpt_path.')
def test_a_checkpoint_holds_the_student_and_training_resumes_with_its_projectors(tmp_path):
    teacher = net(16)
    whole = module_of(teacher, dropout=0.3)
    saves = ModelCheckpoint(
        tmp_path, save_top_k=-1, save_on_train_epoch_end=True, filename='{epoch}'
    )
    trainer(tmp_path, Seeds(), saves, steps=4, max_epochs=9, enable_checkpointing=True).fit(
        whole, data()
    )
    state = torch.load(tmp_path / 'epoch=0.ckpt', weights_only=True)
    assert set(state['state_dict']) == {f'student.{k}' for k in whole.student.state_dict()}
    assert len(state['optimizer_states'][0]['state']) == len(list(whole.student.parameters())) + 2
    torch.manual_seed(5)  # another start: all must come from the checkpoint
    again = DistillModule(
        net(8, 0.3), teacher, kd() + Term(losses.hint, layers={'1': '1'}, grad_ratio=0.5), lr=1e-2
    )
    # one step further: after it, Lightning 2.6 itself begins the epoch again
    t2 = trainer(tmp_path, Seeds(), steps=4, max_epochs=9)
    t2.fit(again, data(), ckpt_path=tmp_path / 'epoch=0.ckpt', weights_only=True)
    for a, b in (
        (whole.student, again.student),
        (whole.callback.distiller.links, again.callback.distiller.links),
    ):
        assert a.state_dict()
        for (k, v), w in zip(a.state_dict().items(), b.state_dict().values()):
            assert torch.equal(v, w), k


@pytest.mark.filterwarnings('ignore:Be aware that when using .ckpt_path.')
@pytest.mark.parametrize('drawn', ['member', 'dropout'])
def test_a_training_that_resumes_draws_the_teachers_that_come_next(tmp_path, drawn):
    if drawn == 'member':
        teacher = Teacher([net(16), net(16)], ensemble=dict(combine='sample'))
    else:
        teacher = Teacher(net(16, dropout=0.5), run=dict(mode='train'))
    whole, again = module_of(teacher, recipe=kd()), module_of(teacher, recipe=kd())
    saves = ModelCheckpoint(
        tmp_path, save_top_k=-1, save_on_train_epoch_end=True, filename='{epoch}'
    )
    trainer(tmp_path, saves, max_epochs=3, steps=-1, enable_checkpointing=True).fit(whole, data())
    torch.manual_seed(5)
    trainer(tmp_path, max_epochs=3, steps=-1).fit(
        again, data(), ckpt_path=tmp_path / 'epoch=0.ckpt', weights_only=True
    )
    assert all(map(torch.equal, whole.student.parameters(), again.student.parameters()))


class Batches:
    "Batches that continue after a restart, as torchdata's StatefulDataLoader does"

    def __init__(self):
        self.batches, self.at = list(data()), 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.at %= len(self)
        while self.at < len(self):
            self.at += 1
            yield self.batches[self.at - 1]

    def state_dict(self):
        return dict(at=self.at)

    def load_state_dict(self, state):
        self.at = state['at']


@pytest.mark.filterwarnings('ignore:Be aware that when using .ckpt_path.')
@pytest.mark.parametrize('step', [1, 2, 5])
def test_a_training_that_resumes_in_mid_epoch_continues_with_the_next_batch(tmp_path, step):
    teacher = net(16)
    saves = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1, filename='{step}')
    run = lambda *cbs, **kw: trainer(tmp_path, *cbs, max_epochs=2, steps=-1, **kw)
    whole, again = [module_of(teacher, recipe=kd(T=('linear', 8, 2))) for _ in range(2)]
    run(saves, enable_checkpointing=True).fit(whole, Batches())
    file = tmp_path / f'step={step}.ckpt'
    run().fit(again, Batches(), ckpt_path=file, weights_only=True)
    assert all(map(torch.equal, whole.student.parameters(), again.student.parameters()))


@pytest.mark.filterwarnings('ignore:Be aware that when using .ckpt_path.')
def test_the_recipe_that_was_chosen_and_what_was_measured_continue(tmp_path, capsys):
    teacher = net(16)
    with torch.no_grad():
        teacher[5].weight *= 20

    def module(seed):
        return (torch.manual_seed(seed), DistillModule(net(8), teacher, lr=1e-2, check=False))[1]

    whole, again = module(0), module(5)
    saves = ModelCheckpoint(
        tmp_path, save_top_k=-1, save_on_train_epoch_end=True, filename='{epoch}'
    )
    trainer(tmp_path, Seeds(), saves, steps=4, max_epochs=9, enable_checkpointing=True).fit(
        whole, data()
    )
    capsys.readouterr()
    trainer(tmp_path, Seeds(), steps=4, max_epochs=9).fit(
        again, data(), ckpt_path=tmp_path / 'epoch=0.ckpt', weights_only=True
    )
    assert 'fastdistill: recipe' not in capsys.readouterr().out
    a, b = [m.callback.distiller.state_dict() for m in (whole, again)]
    assert a.keys() == b.keys()
    assert all(torch.equal(v, b[k]) for k, v in a.items())


class Seeds(pl.Callback):
    "Lightning stores no random state: each batch has its own"

    def on_train_batch_start(self, trainer, *_):
        torch.manual_seed(trainer.global_step)


def test_accumulation_and_half_precision(tmp_path):
    teacher, ends = net(16), []
    for size, steps, precision in ((24, 1, '32-true'), (8, 3, '32-true'), (24, 1, 'bf16-mixed')):
        module = module_of(
            teacher, recipe=kd(T=T, alpha=ALPHA) + Term(losses.hint, layers={'1': '1'}, weight=0.1)
        )
        trainer(
            tmp_path, steps=4, max_epochs=9, accumulate_grad_batches=steps, precision=precision
        ).fit(module, data(size=size))
        ends.append([p.detach() for p in module.student.parameters()])
    for a, b, c in zip(*ends):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a, c, rtol=0.1, atol=0.02)
    assert any(not torch.equal(a, c) for a, _, c in zip(*ends))


class Stops(pl.Callback):
    def on_train_batch_end(self, *_):
        raise ValueError('stop')


@pytest.mark.parametrize('stops', [False, True])
def test_nothing_is_left_behind(stops, tmp_path):
    module, teacher = Mine(), net(16).train()
    cb = DistillCallback(
        teacher, kd() + Term(losses.hint, layers={'1': '1'}, grad_ratio=0.1), student='model'
    )
    t = trainer(tmp_path, cb, *([Stops()] if stops else []))
    if stops:
        with pytest.raises(ValueError, match='stop'):
            t.fit(module, data())
    else:
        t.fit(module, data())
    assert 'training_step' not in vars(module) and not any(
        m._forward_hooks for m in [*module.modules(), *teacher.modules()]
    )
    assert teacher.training and all(
        p.requires_grad and p.grad is None for p in teacher.parameters()
    )
    assert not any('teacher' in k for k in module.state_dict())
    trainer(tmp_path, cb).fit(module, data())  # again, with the same callback


@pytest.mark.filterwarnings('ignore:.*will run with no optimizer')
def test_a_fit_without_batches_or_optimizer_runs_as_without_a_teacher(tmp_path):
    class NoOptimizer(Mine):
        def configure_optimizers(self):
            return None

    for module, options in ((Mine(), dict(limit_train_batches=0)), (NoOptimizer(), {})):
        was = module.model[0].weight.clone()
        callback = DistillCallback(net(16), kd(), student='model')
        trainer(tmp_path, callback, **options).fit(module, data())
        assert torch.equal(module.model[0].weight, was)
        assert 'training_step' not in vars(module)


def test_an_averaged_model_is_one_of_the_student_alone(tmp_path):
    module = module_of(net(16))
    average = WeightAveraging(avg_fn=lambda a, p, n: 0.5 * a + 0.5 * p)
    trainer(tmp_path, average, steps=3).fit(module, data(), data())
    assert average._average_model.module.callback is module.callback


def test_without_a_recipe_or_labels(tmp_path, capsys):
    module = DistillModule(net(8), net(16), check=False)
    t = trainer(tmp_path)
    t.fit(module, data())
    assert 'recipe labels + dist' in capsys.readouterr().out and 'dist_loss' in t.callback_metrics
    x = torch.randn(8, 6)
    student, teacher = net(8), net(16)
    with torch.no_grad():
        a, b = [F.log_softmax(m(x), 1) for m in (student, teacher)]
    t = trainer(tmp_path, steps=1)
    t.fit(DistillModule(student, teacher, soft_labels()), DataLoader(x, 8))
    assert t.callback_metrics['kd_loss'].item() == pytest.approx(
        (b.exp() * (b - a)).sum(1).mean().item(), rel=1e-5
    )
    t.validate(module, DataLoader(x, 8))
    assert 'val_loss' not in t.callback_metrics


class Unfreezes(BaseFinetuning):
    "Trains the first layer from the second epoch on"

    def freeze_before_training(self, module):
        self.freeze(module.model[0])

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.model[0], optimizer, lr=0.1)


class TrainsAFew(Mine):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], self.lr)


def test_a_callback_that_unfreezes_layers_works_without_projectors(tmp_path):
    def fitted(recipe):
        module = TrainsAFew()
        before = module.model[0].weight.clone()
        cbs = [Unfreezes(), DistillCallback(net(16), recipe, student='model')]
        trainer(tmp_path, *cbs, steps=6, max_epochs=2).fit(module, data())
        return not torch.equal(before, module.model[0].weight)

    assert fitted(kd())
    with refuses("Unfreezes needs all of the optimizer's parameters to belong to the module"):
        fitted(kd() + Term(losses.hint, layers={'1': '1'}, grad_ratio=0.1))


class Searches(LearningRateFinder):
    "Searches at the start of the fit, and again in the second epoch"

    def __init__(self):
        super().__init__(1e-4, 0.1, num_training_steps=4, update_attr=False)
        self.losses = []

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            self.lr_find(trainer, module)

    def lr_find(self, trainer, module):
        super().lr_find(trainer, module)
        self.losses.append(self.optimal_lr.results['loss'])


class OwnTeacher(Mine):
    "Computes the total loss itself"

    def training_step(self, batch, batch_idx):
        x, y = batch
        return by_hand(self.model, self.teacher, x, y)


def test_a_search_for_a_learning_rate_has_the_teacher_and_changes_nothing(tmp_path):
    def fitted(*cbs, module=Mine, recipe=None):
        torch.manual_seed(0)
        module, big = module(), net(16)
        vars(module)['teacher'] = big
        if recipe is not None:
            cbs = [*cbs, DistillCallback(big, recipe, student='model')]
        trainer(tmp_path, *cbs, steps=9, max_epochs=3).fit(module, data())
        return module

    recipe, by_itself, found = kd(T=T, alpha=ALPHA), Searches(), Searches()
    fitted(by_itself, module=OwnTeacher)
    fitted(found, recipe=recipe)
    for a, b in zip(by_itself.losses, found.losses, strict=True):
        assert a == pytest.approx(b)
    recipe += Term(losses.hint, layers={'1': '1'}, grad_ratio=0.1)
    plain, searched = fitted(recipe=recipe), fitted(Searches(), recipe=recipe)
    for a, b in zip(plain.parameters(), searched.parameters(), strict=True):
        assert torch.equal(a, b)


def test_data_that_can_only_be_iterated_are_not_read_and_the_note_says_so(tmp_path, capsys):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(data().dataset)

    fit = trainer(tmp_path, DistillCallback(net(16), kd(), student='model'), steps=1).fit
    fit(Mine(), DataLoader(Stream(), 8))
    assert 'the teacher was not checked. The dataset is empty, or it is an iterable dataset' in (
        capsys.readouterr().out
    )


def test_labels_of_a_language_model_are_shifted(tmp_path, capsys):
    def gpt2(width):
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=30,
                n_embd=width,
                n_layer=1,
                n_head=2,
                n_positions=8,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        )

    ids = torch.randint(30, (4, 8))
    rows = [dict(input_ids=i, labels=i) for i in ids]
    student, teacher = gpt2(8), gpt2(16)
    with torch.no_grad():
        own = student.train()(input_ids=ids, labels=ids).loss
    t = trainer(tmp_path, steps=1)
    t.fit(DistillModule(student, teacher, kd(), axis=-1, shift_labels=True), DataLoader(rows, 4))
    assert t.callback_metrics['task_loss'].item() == pytest.approx(own.item(), rel=1e-5)


def test_mistakes_are_named(tmp_path):
    class Other(Mine):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.model(batch[0]), batch[1])

    with refuses("training_step did not call the student, Other.*student='model'"):
        trainer(tmp_path, DistillCallback(net(16), kd())).fit(Other(), data())
    with refuses("student='net': Mine has no such module. It has: model"):
        trainer(tmp_path, DistillCallback(net(16), kd(), student='net')).fit(Mine(), data())

    class Manual(Mine):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with refuses('manual optimization'):
        trainer(tmp_path, DistillCallback(net(16), kd())).fit(Manual(), data())


class Swapped(nn.Module):
    "Knows the class of rows whose first columns show it, in a different order of its outputs"

    def forward(self, x):
        return 9 * x[:, [1, 0, 2]]


def shown(n=64):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=g)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 16)


def test_a_teacher_with_its_classes_in_a_different_order_is_refused_before_training(tmp_path):
    def fit(**kwargs):
        module = Mine()
        trainer = pl.Trainer(
            max_steps=2,
            accelerator='cpu',
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=DistillCallback(Swapped(), kd(), student='model', **kwargs),
        )
        trainer.fit(module, shown())
        return trainer.global_step

    with refuses('class 0 and class 1 are swapped'):
        fit()
    assert fit(check=False) == 2


def test_classes_of_a_sorted_loader_are_all_checked(tmp_path):
    "The first 8 batches hold only class 2, which this teacher has at its place"
    x, y = shown(600).dataset.tensors
    order = y.argsort(descending=True)
    rows = DataLoader(TensorDataset(x[order], y[order]), 16)
    with refuses('class 0 and class 1 are swapped'):
        trainer(tmp_path, DistillCallback(Swapped(), kd(), student='model')).fit(Mine(), rows)


class TwoHeads(pl.LightningModule):
    "Somebody's module with two outputs, and the loss of both"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, x):
        h = self.body(x).relu()
        return dict(a=self.a(h), b=self.b(h))

    def training_step(self, batch, batch_idx):
        x, *ys = batch
        return sum(F.cross_entropy(o, y) for o, y in zip(self(x).values(), ys))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_each_head_learns_from_its_teacher(tmp_path):
    x, a, b = torch.randn(8, 6), torch.randint(3, (8,)), torch.randint(4, (8,))
    ta, tb = nn.Linear(6, 3), nn.Linear(6, 4)
    module = TwoHeads()
    start = TwoHeads()
    callback = DistillCallback(dict(a=ta, b=tb), kd(T, ALPHA), check=False)
    pl.Trainer(
        max_steps=1,
        callbacks=callback,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator='cpu',
    ).fit(module, DataLoader(TensorDataset(x, a, b), 8))
    s = start(x)
    loss = (1 - ALPHA) * (F.cross_entropy(s['a'], a) + F.cross_entropy(s['b'], b)) + ALPHA * (
        losses.kl(s['a'], ta(x), T=T) + losses.kl(s['b'], tb(x), T=T)
    )
    loss.backward()
    for p, q in zip(module.parameters(), start.parameters()):
        torch.testing.assert_close(p, q - 0.1 * q.grad)


def test_a_ready_module_has_one_task_loss():
    with refuses('DistillModule has one task loss. For several heads, use DistillCallback'):
        DistillModule(TwoHeads(), dict(a=nn.Linear(6, 3), b=nn.Linear(6, 4)), kd())
