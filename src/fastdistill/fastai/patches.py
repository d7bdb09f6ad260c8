"""All changes that fastdistill makes to fastai.

| what | why | when |
|---|---|---|
| `DataBlock.__init__` | fastai counts a `TeacherBlock` and the label before it as inputs | import |
| `Datasets.decode` | `predict` etc. have no prediction for the teacher's column | first target |
| `Datasets.new_empty` | `export` would keep the teacher's column | first target |
| `TfmdDL._one_pass` | `export` would keep the type of the teacher's targets | first target |
| `TfmdDL._pre_show_batch` | fastai can't show a label together with a teacher target | first target |
| `defaults.callbacks` | labels, MixUp and metrics must not see the targets | first target |
| `Learner.fit` | cleans up, because fastai has no event after an error | import |
| `Learner.fine_tune` | schedules span both phases, see `KnowledgeDistillation(span=)` | import |
| `Learner.save` | the projectors are saved in a file next to the student's file | first callback |
| `Learner.load` | the projectors are loaded from that file | import |
| `Recorder.plot_loss` | `train_loss` has a different scale than the task losses | first callback |
| `Learner.distill` | a new method, in `learner.py` | import |
| `Learner.check_teacher` | a new method, in `learner.py` | import |
| `Learner.distill_find` | a new method, in `recipe_find.py` | import |
| `Learner.explain` | a new method, in `learner.py` | import |
| `Learner.calibrate` | a new method, in `learner.py` | import |
| `Learner.show_features` | a new method, in `learner.py` | import |

"First target" means: when the first `TeacherBlock` is created or unpickled, or when the first fit
begins that adds information about samples to its batches. "First callback" means: when the first
`KnowledgeDistillation` is created. Until the first target or callback, methods that are wrapped at
import behave like the original methods.

Why patches are needed:

- `DataBlock`, `Datasets`, `TfmdDL`: a block can't declare that it is not an input. fastai calls no
  transform that could remove a column when it decodes, exports or shows data. The way fastai shows
  a batch depends on the types of the input and the label.
- `defaults.callbacks`: this is fastai's own list of callbacks for new Learners.
- `fit`, `fine_tune`, `save`, `load`: callbacks get no event for interrupts, for the phases of
  `fine_tune`, for saving or for loading.
- `plot_loss`: it draws all losses on one axis, and has no option for a second axis.

Why some methods are wrapped at import:

- `DataBlock.__init__`: a `TeacherBlock` may be passed as a class. fastai creates the instance only
  right before it counts the inputs.
- `Learner.fit` and `Learner.fine_tune`: in `learn.fit(1, cbs=KnowledgeDistillation(teacher))`,
  Python looks up the method before it creates the callback.
- `Learner.load`: a student may be loaded before its callback is created.

Private names of fastai that are used without a patch, since there is no public alternative:

- `TfmdDL._n_inp` in `language_model.py`: `dls.n_inp = 1` does not change the DataLoaders, whose
  `n_inp` can't be set.
- `TfmdDL._types` in `compare.py`: these are the types of a batch, known without loading a batch.
- `Callback._only_train_loop` in `callback.py`: fastai's hooks remove callbacks with this attribute
  before they run the model.
- `Learner._do_fit`, `Learner._with_events` and `Learner._do_epoch` in
  `cli/training/resumable_fit.py`: a fit can't begin with a later epoch, and `SkipToEpoch` runs the
  events of all epochs.
- `DistributedDL._broadcast` and `DistributedTrainer._wrap_dl` in `cli/training/distributed_fit.py`:
  fastai broadcasts only on GPUs, and its trainer can't use a different DataLoader.

Tested with fastai 2.8.12. For each patch, `tests/fastai/test_patches.py` tests that the
patch fixes the problem, and that fastai has the problem without the patch.

Some fits add information about the samples to their batches. To do so, `sampled_batches.attach` sets
`create_batches` and `after_batch` of the Learner's DataLoaders, which are also arguments of
fastai's DataLoader. The DataLoaders are changed in place, since callbacks and users refer to the
same objects.
"""

import functools
import inspect
from pathlib import Path

import fastai.callback.schedule  # noqa: F401 (it gives Learner fine_tune)
from fastai.basics import (
    Callback,
    DataBlock,
    Datasets,
    L,
    Learner,
    Recorder,
    TensorBase,
    TfmdDL,
    defaults,
    join_path_file,
)

from ..base.distributed import rank
from ..base.model_state import read_state, write_state
from .learner_notes import notes_of
from .teacher_targets import TeacherTarget, TeacherTargets, makes_target, without_targets


class DistillationCallback(Callback):
    """Base class of the callbacks that the wrapped methods of `Learner` look for.

    When the first `DistillationCallback` is created, `save` and `plot_loss` are wrapped. The wrapped
    methods call `teardown(learn)`, `state_dict()` and `load_state_dict(state)`.

    Calls of `validate`, `get_preds`, `tta` etc., including those by other callbacks during a fit, have
    events of their own. These events are not part of a fit, so they only clean up after a batch.
    """

    n_inner = 0  # number of such calls that have begun but not ended

    def __init__(self):
        _patch_for_callback()
        super().__init__()

    def __call__(self, event_name):
        if not self._is_inner(event_name) or event_name in ('after_batch', 'after_cancel_batch'):
            return super().__call__(event_name)

    def _is_inner(self, event_name):
        """Return True if an event belongs to a validation or prediction, inside or outside a fit."""
        if notes_of(self.learn).fitting is not self:
            self.n_inner = 0
            return self.learn.lock.locked()
        # subtle: `tta` does not lock the Learner, and some calls have neither of these two events
        self.n_inner += event_name == 'before_fit'
        inner = self.n_inner > 0 or self.learn.lock.locked()
        self.n_inner -= self.n_inner > 0 and event_name == 'after_fit'
        return inner

    def after_fit(self):
        self.teardown(self.learn)

    # an exported Learner contains a callback that does nothing instead, so that it loads without
    # fastdistill
    def __reduce__(self):
        return Callback, ()

    def state_dict(self):
        """Return the state to save next to the student's file. Empty if there is none."""
        return {}

    def load_state_dict(self, state):
        """Restore what `state_dict` returned."""


def _n_inp_without_teacher(init):
    """Count the inputs without the label and the `TeacherBlock`s.

    If `n_inp` is not given, fastai counts all blocks but the last one as inputs.
    """
    sig = inspect.signature(init)

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        try:
            given = sig.bind(self, *args, **kwargs)
        except TypeError:
            return init(self, *args, **kwargs)  # raises fastai's own error
        blocks = given.arguments.get('blocks')
        if blocks is None:
            blocks = self.blocks
        n_teachers = sum(map(_is_teacher, blocks)) if isinstance(blocks, (list, tuple, L)) else 0
        if n_teachers and given.arguments.get('n_inp') is None:
            given.arguments['n_inp'] = max(1, len(blocks) - n_teachers - 1)
        init(*given.args, **given.kwargs)

    return __init__


def _is_teacher(block):
    """Return True for a `TeacherBlock` as an instance, a class or a `functools.partial` of the
    class.
    """
    return getattr(getattr(block, 'func', block), 'holds_teacher', False)


def _without_targets(tls):
    return [tl for tl in tls if not any(map(makes_target, tl.tfms.fs))]


def _decode_without_teacher(decode):
    """Decode an input and its prediction without the teacher's column."""

    @functools.wraps(decode)
    def _decode(self, o, full=True):
        tls = _without_targets(self.tls)
        if len(tls) < len(self.tls) and len(o) == len(tls):
            return tuple(tl.decode(v, full=full) for v, tl in zip(o, tls))
        return decode(self, o, full=full)

    return _decode


def _empty_without_teacher(new_empty):
    """Remove the teacher's column from the empty data of an exported student."""

    @functools.wraps(new_empty)
    def _new_empty(self):
        tls = _without_targets(self.tls)
        if len(tls) == len(self.tls):
            return new_empty(self)
        return type(self)(tls=[tl.new_empty() for tl in tls], n_inp=self.n_inp)

    return _new_empty


def _types_without_teacher(one_pass):
    """Replace the type of teacher targets with `TensorBase` in the types that DataLoaders store."""

    @functools.wraps(one_pass)
    def _one_pass(self):
        one_pass(self)
        plain = lambda o: TensorBase if isinstance(o, type) and issubclass(o, TeacherTarget) else o
        if isinstance(self._types, dict):
            self._types = {k: [plain(o) for o in v] for k, v in self._types.items()}

    return _one_pass


def _show_without_teacher(pre_show_batch):
    """Remove the teacher's target before a batch is shown.

    The way fastai shows a batch depends on the types of the input and the label.
    """

    @functools.wraps(pre_show_batch)
    def _pre_show_batch(self, b, max_n=9):
        return pre_show_batch(self, without_targets(b), max_n=max_n)

    return _pre_show_batch


def _callback_on(learn):
    return next((c for c in learn.cbs if isinstance(c, DistillationCallback)), None)


def _put_back_after(fit):
    """Remove distillation from the Learner at the end of a fit, even after an error."""

    @functools.wraps(fit)
    def _fit(self, *args, **kwargs):
        try:
            return fit(self, *args, **kwargs)
        finally:
            # subtle: after an error, `Learner.fit` has already removed the callbacks passed to it
            if (cb := notes_of(self).fitting) is not None:
                cb.teardown(self)

    return _fit


def _as_one_training(fine_tune):
    """Set `fine_tune_span` on the Learner during `fine_tune`.

    `fine_tune_span` contains the total number of epochs of both phases, and the number of finished
    epochs.
    """
    sig = inspect.signature(fine_tune)

    @functools.wraps(fine_tune)
    def _fine_tune(self, *args, **kwargs):
        given = sig.bind(self, *args, **kwargs)
        given.apply_defaults()
        self.fine_tune_span = dict(
            done=0, epochs=given.arguments['freeze_epochs'] + given.arguments['epochs']
        )
        try:
            return fine_tune(self, *args, **kwargs)
        finally:
            del self.fine_tune_span

    return _fine_tune


def claim_epochs(learn):
    """Return (epochs before this fit, total epochs) if this fit is a phase of a `fine_tune`.

    The epochs of this fit are added to the finished epochs. Return None if there is no `fine_tune`.
    """
    span = getattr(learn, 'fine_tune_span', None)
    if span is None:
        return None
    before, span['done'] = span['done'], span['done'] + learn.n_epoch
    return before, span['epochs']


def _file_beside(file):
    return Path(file).with_suffix('.distill.pth') if isinstance(file, (str, Path)) else None


def _with_projectors(save):
    """Save projectors in NAME.distill.pth next to the student's NAME.pth."""

    @functools.wraps(save)
    def _save(self, file, with_opt=True, **kwargs):
        saved = save(self, file, with_opt=with_opt, **kwargs)
        beside, cb = _file_beside(saved), _callback_on(self)
        if beside is None or rank() or hasattr(self, 'lr_finder'):
            return saved
        state = {} if not with_opt else notes_of(self).last_state if cb is None else cb.state_dict()
        if state and (state['links'] or state['distiller'] is not None):
            write_state(beside, state)
        else:
            beside.unlink(missing_ok=True)  # this file belonged to the student that was overwritten
        return saved

    return _save


def _with_its_projectors(load):
    """Load the projectors from the file next to the student's file, for the Learner's callback.

    If the Learner has no callback, the projectors are kept for the callback of the next fit.
    """

    @functools.wraps(load)
    def _load(self, file, device=None, with_opt=True, **kwargs):
        out = load(self, file, device=device, with_opt=with_opt, **kwargs)
        beside = _file_beside(join_path_file(file, self.path / self.model_dir, ext='.pth'))
        cb = _callback_on(self)
        if beside is None or not with_opt or hasattr(self, 'lr_finder'):
            return out
        notes_of(self).last_state = notes_of(self).loaded_state = None
        if not beside.is_file():
            return out
        state = read_state(
            beside,
            'It contains the projectors of this student: remove it to load only the student.',
        )
        # subtle: keep the state even with a callback, since the callback may be removed before the
        # next `save`
        notes_of(self).last_state = state
        if cb is not None:
            cb.load_state_dict(state)
        else:
            notes_of(self).loaded_state = {**state, 'file': beside.name}
        return out

    return _load


def _plot_labels_apart(plot_loss):
    """Plot the task losses of training and validation on a separate axis on the right."""

    @functools.wraps(plot_loss)
    def _plot_loss(self, skip_start=5, with_valid=True, log=False, show_epochs=False, ax=None):
        name = next((n for n in ('task_loss', 'train_task_loss') if n in self.metric_names), None)
        if name is None or not with_valid:
            return plot_loss(self, skip_start, with_valid, log, show_epochs, ax)
        ax = plot_loss(self, skip_start, False, log, show_epochs, ax)
        first = sum(i < skip_start for i in self.iters)
        right, lines = ax.twinx(), [*ax.lines[:1]]
        for n, label, color in (
            (name, 'train, labels', 'C1'),
            ('valid_loss', 'valid, labels', 'C2'),
        ):
            values = [v[self.metric_names.index(n) - 1] for v in self.values[first:]]
            lines += right.plot(
                self.iters[first:],
                [float('nan') if v is None else v for v in values],
                color=color,
                label=label,
            )
        ax.lines[0].set_label('train, with the teacher')
        ax.set_ylabel('loss with the teacher')
        right.set_ylabel('task loss')
        ax.legend(handles=lines)
        return ax

    return _plot_loss


def _once(cls, name, wrap):
    """Wrap a method, unless the method is already wrapped because this module was reloaded."""
    if hasattr(getattr(cls, name), '_knows_teacher'):
        return
    setattr(cls, name, wrap(getattr(cls, name)))
    getattr(cls, name)._knows_teacher = True


def patch_for_targets():
    """Wrap the methods that have to handle teacher targets. Further calls do nothing."""
    _once(Datasets, 'decode', _decode_without_teacher)
    _once(Datasets, 'new_empty', _empty_without_teacher)
    _once(TfmdDL, '_one_pass', _types_without_teacher)
    _once(TfmdDL, '_pre_show_batch', _show_without_teacher)
    if TeacherTargets not in defaults.callbacks:
        defaults.callbacks = [*defaults.callbacks, TeacherTargets]


def _patch_for_callback():
    _once(Learner, 'save', _with_projectors)
    _once(Recorder, 'plot_loss', _plot_labels_apart)


_once(DataBlock, '__init__', _n_inp_without_teacher)
_once(Learner, 'fit', _put_back_after)
_once(Learner, 'fine_tune', _as_one_training)
_once(Learner, 'load', _with_its_projectors)
