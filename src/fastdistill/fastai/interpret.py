"""Find the inputs on which a student disagrees with its teacher."""

from collections.abc import Callable
from typing import Any

import torch
from fastai.basics import Interpretation, L, Learner, TensorImageBase, noop, tuplify
from fastai.vision.data import get_grid

from ..base.model_state import restored
from ..base.outputs import DistillError
from ..base.random_state import guarded_random_state
from ..base.task import fit_labels
from ..evaluation.text_report import show
from ..losses import binary_kl, kl
from ..teachers.fast_copy import AS_IT_IS
from ..teachers.raw_items import items_at, with_items
from .class_names import check_same_data, vocab_of
from .language_model import is_stream
from .learner_heads import comparisons_of, options_of_heads
from .probe_batches import split_batch
from .raw_items import items_shown, raw_items, without_samples
from .teacher_targets import without_targets
from .teachers import check_same_codes, is_heads, teacher_of


class DistillInterpretation(Interpretation):
    """An `Interpretation` of fastai that ranks items by the disagreement of student and teacher.

    The attribute `losses` contains the distance between the two predictions for each item.
    `plot_top_losses` and `top_losses` work as usual. `show_disagreements` shows the predictions of
    both models.
    """

    # Set by `from_learner`. `student` and `teacher` are `Teacher` objects for both models. `head`
    # is the head to show. `differ` is True for items whose predicted classes differ.
    student = teacher = head = differ = None

    @classmethod
    def from_learner(
        cls,
        learn: Learner,
        teacher: Any,
        ds_idx: int = 1,
        dl: Any = None,
        act: Callable | None = None,
        kind: str | None = None,
    ) -> Any:
        """Run both models on all items and measure the distance between their predictions.

        The distance is KL(teacher || student) at T=1, averaged over the pixels of a mask that the
        loss function does not ignore. For regression, it is the MSE. If `teacher` is a dict {head
        name: teacher}, return a dict with an interpretation for each head.

        Args:
            learn: Learner of the student.
            teacher: Anything that `KnowledgeDistillation` accepts, except stored outputs.
            ds_idx: Index of the student's DataLoader, if `dl` is None.
            dl: A DataLoader with the student's data.
            act: Activation for the student's predictions. If None, the activation of the student's
                loss function is used.
            kind: 'softmax', 'sigmoid' or 'regression'. If None, the kind is derived from the loss
                function. For several heads, pass one value for all heads, or a dict {head name:
                kind}.
        """
        dl = learn.dls[ds_idx].new(shuffle=False, drop_last=False) if dl is None else dl
        check_same_data(learn.dls, dl, 'The Learner')
        if is_stream(dl):
            raise DistillError(
                'The samples of a language model are pieces of one long text, not items that can be '
                'shown. compare(...) measures its agreement with the teacher.'
            )
        heads = comparisons_of(teacher)
        kinds = options_of_heads(kind, 'kind', heads)
        found = {k: cls._of_head(learn, dl, act, h, kinds[k]) for k, h in heads.items()}
        return found if is_heads(teacher) else found['']

    @classmethod
    def _of_head(cls, learn, dl, act, head, kind):
        task = head.task_of(learn, kind)
        teacher = head.teacher_of(learn, task, run=AS_IT_IS)
        own = {} if head.output is None else dict(output=head.output)
        view = learn if head.output is None else head.of(learn)
        check_same_codes(teacher, view.dls, task, 'The teacher')
        student = teacher_of(learn, view, task, run=AS_IT_IS, **own)
        distances, differ = disagreements(learn, dl, student, teacher, task, head)
        out = cls(learn, dl, distances, act)
        out.student, out.teacher, out.differ = student, teacher, differ
        out.head = head if head.name else None
        return out

    def show_disagreements(self, k: int = 9, largest: bool = True, **kwargs: Any) -> None:
        """Show items with fastai's `show_results`. The teacher's prediction replaces the label.
        Items for which the models predict different classes come first. Items are then sorted by
        distance.

        With several heads, a plain grid or table shows the items with the predictions of both
        models.

        Args:
            k: Number of items.
            largest: If True, show the items with the largest distances. If False, show the items
                with the smallest distances.
            **kwargs: Options of fastai's `show_results`.
        """
        idxs = self.losses.argsort(descending=largest, stable=True)
        if largest:
            idxs = idxs[self.differ[idxs].int().argsort(descending=True, stable=True)]
        idxs = idxs[:k]
        if self.head is not None:
            show_rows(list(self._rows_of_head(idxs.tolist())))
            name_both()
            return
        inps, _, _, decoded, _ = self[idxs]
        inps = tuplify(inps)
        reads = self.teacher.needs == 'items'
        raw = items_at(raw_items(self.dl), idxs.tolist()) if reads else None
        taught = self._decoded(with_items(inps, raw))
        t, s = inps + tuplify(taught), inps + tuplify(decoded)
        try:
            self.dl.show_results(t, tuplify(decoded), max_n=len(idxs), **kwargs)
        # subtle: in fastai 2.8, `show_results` fails for texts, and for images with numeric labels
        except (TypeError, AttributeError):
            show_plainly(self.dl, t, s, len(idxs))
        name_both()

    def _rows_of_head(self, idxs):
        """Yield (item, teacher prediction, student prediction) for the items with these indices."""
        dl, names = self.dl.new(get_idxs=lambda: idxs), vocab_of(self.head.of(self.learn).dls)
        with (
            restored(dl),
            guarded_random_state(),
            items_shown([dl], self.teacher),
            self.student,
            self.teacher,
        ):
            for b in dl:
                b, raw = without_samples(b)
                x = with_items(split_batch(self.learn, b)[0], raw)
                items = self.dl.decode_batch(without_targets(b), len(x[0]), full=False)
                both = [predictions(m, x, names) for m in (self.teacher, self.student)]
                yield from ((item[0], t, s) for item, t, s in zip(items, *both))

    def _decoded(self, inps):
        """Return the teacher's predictions for these inputs, decoded like those of the student."""
        loss = self.learn.loss_func
        with guarded_random_state(), self.teacher as teacher:
            teacher.reset()
            logits = teacher(
                *(t.to(self.dl.device) if isinstance(t, torch.Tensor) else t for t in inps)
            ).logits.cpu()
        act = getattr(loss, 'activation', noop) if self.act is None else self.act
        return getattr(loss, 'decodes', noop)(act(logits))


def disagreements(learn, dl, student, teacher, task, head):
    """Return (distance between the predictions of both models, whether the predicted classes
    differ), both (n,), in the order of the items.
    """
    idxs = dl.get_idxs() if hasattr(dl, 'get_idxs') else None
    if idxs is not None:
        dl = dl.new(get_idxs=lambda: idxs)
    found = []
    with restored(dl), guarded_random_state(), items_shown([dl], teacher), student, teacher:
        for b in dl:
            b, raw = without_samples(b)
            x, y = split_batch(learn, b)
            x = with_items(x, raw)
            for m in (student, teacher):
                m.reset()
            s, t = student(*x).logits, teacher(*x).logits
            d = distance(s, t, task, y and head.labels(y))
            found.append((d.cpu(), different(s, t, task).cpu()))
    both = [torch.cat(o) for o in zip(*found)]
    return both if idxs is None else [o[torch.tensor(L(idxs)).argsort()] for o in both]


def different(s, t, task):
    """Return a bool tensor (B,) that is True for items for which the models predict different
    classes.
    """
    if task.kind == 'regression':
        return torch.zeros(len(s), dtype=torch.bool, device=s.device)
    a, b = (
        o > 0 if task.kind == 'sigmoid' else o.argmax(task.axis) for o in (s, t.reshape(s.shape))
    )
    return (a != b).reshape(len(s), -1).any(1)


def distance(s, t, task, y=()):
    """Return the distance between the predictions of both models for each item, (B,).

    Args:
        s, t: Logits of student and teacher.
        task: What they predict.
        y: Labels of the batch, as a tuple. Positions to ignore do not count.
    """
    if s.numel() != t.numel():
        raise DistillError(
            f"The student's outputs have shape {tuple(s.shape)}, the teacher's {tuple(t.shape)}."
        )
    rows = lambda v: v.reshape(len(v), -1)
    if task.kind == 'regression':
        return rows(s.float() - t.float().reshape(s.shape)).pow(2).mean(1)
    if task.kind == 'sigmoid':
        return rows(binary_kl(s, t, T=1.0, reduction='none')).mean(1)
    found = rows(kl(s, t, T=1.0, axis=task.axis, reduction='none'))
    y = fit_labels(y[0], s.shape, task) if y and isinstance(y[0], torch.Tensor) else None
    counts = torch.ones_like(found, dtype=torch.bool) if y is None else rows(y != task.ignore_index)
    return found.where(counts, 0.0).sum(1) / counts.sum(1).clamp_min(1)


def show_plainly(dl, t, s, n) -> None:
    """Show items with the predictions of teacher and student.

    Images are shown in a grid, and all other items in a table.
    """
    import matplotlib.pyplot as plt

    plt.close('all')  # close the empty figure that the failed `show_results` left
    taught, own = (dl.decode_batch(b, n, full=False) for b in (t, s))
    show_rows([(x, a, b) for (x, a), (_, b) in zip(taught, own)])


def show_rows(rows) -> None:
    """Show items with the predictions of both models.

    Args:
        rows: (item, teacher prediction, student prediction) for each item.
    """
    import pandas as pd

    if not isinstance(rows[0][0], TensorImageBase):
        names = ['input', 'teacher', 'student']
        df = pd.DataFrame([tuple(map(str, r)) for r in rows], columns=names)
        # subtle: fastai's `display_df` shows no table in a script
        show(df, lambda df, _: print(df.to_string()))
        return
    for ax, (x, a, b) in zip(get_grid(len(rows)), rows):
        x.show(ctx=ax, title='\n'.join(map(in_short, (a, b))))


def predictions(model, x, names):
    """Return a text with the model's prediction for each sample: the class name, or the outputs."""
    model.reset()
    found = model(*x).logits.cpu()
    if model.kind == 'softmax':
        found = found.movedim(model.axis, -1).argmax(-1)
        if names is not None and found.dim() == 1:
            return [names[i] for i in found.tolist()]
    return list(map(in_short, found))


def in_short(v):
    return f'{float(v):.4g}' if isinstance(v, torch.Tensor) and v.numel() == 1 else str(v)


def name_both() -> None:
    """Set the title of the last figure to explain that the teacher's prediction comes first."""
    import matplotlib.pyplot as plt

    if not plt.get_fignums():
        return
    fig = plt.gcf()
    if fig.get_suptitle() in ('', 'Target/Prediction'):
        fig.suptitle('Teacher/Student')
