"What cannot be right about one batch: shapes, class axis, labels and token ids that do not fit."
from dataclasses import replace
from math import prod
import torch
from torch import nn
from ..outputs import tensors_in
from .findings import Finding
from .tally import fit_labels

__all__ = ['embedding_rows', 'mismatches', 'unknown_ids']


def embedding_rows(modules):
    "Rows of the largest embedding in these modules; None if there is none"
    sizes = [m.num_embeddings for o in modules for m in o.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    return max(sizes, default=None)


def ids_in(x): return [t for t in tensors_in(x) if not t.is_floating_point() and t.dtype != torch.bool and t.numel()]


def unknown_ids(teacher, x):
    "Ids beyond every embedding of the teacher: looking them up would crash"
    rows = embedding_rows(teacher.modules)
    largest = max((int(t.max()) for t in ids_in(x)), default=-1) if rows is not None else -1
    if rows is not None and largest >= rows:
        yield Finding('error', f"The inputs have ids up to {largest}, but the teacher's largest embedding knows {rows} (0 to {rows-1})",
                      "Are these the token ids of another tokenizer (or the codes of other categories)? Make the student's data with "
                      "the teacher's tokenizer, or give a function that translates: KnowledgeDistillation(lambda x: ...)")


def mismatches(
    s, # shape of the student's outputs; None: unknown
    t, # shape of the teacher's
    y, # the labels; None: there are none
    task
):
    "Outputs and labels that do not belong together; the first one is enough, others follow from it"
    for find in (outputs_differ, one_class, labels_differ, labels_beyond):
        if (f := find(s, t, y, task)) is not None:
            yield f
            return


def outputs_differ(s, t, y, task):
    if s is None or (prod(s) == prod(t) if task.kind == 'regression' else s == t): return
    return Finding('error', f"The student's output has shape {tuple(s)}, the teacher's {tuple(t)}",
                   "Both need the same outputs: the same classes (or number of targets), and in dense tasks the same resolution. "
                   "Teacher(model, select=[...]) takes some of a teacher's classes; or wrap the teacher in a function that selects "
                   "or resizes: KnowledgeDistillation(lambda x: ...)")


def one_class(s, t, y, task):
    if task.kind != 'softmax' or (-len(t) <= task.axis < len(t) and t[task.axis] > 1): return
    if not -len(t) <= task.axis < len(t): return wrong_axis(f"Outputs of shape {tuple(t)} have no axis {task.axis} for the classes", [])
    return Finding('error', f"The outputs, of shape {tuple(t)}, have 1 class along axis {task.axis}, and its softmax is always 1",
                   "Is it one label, yes or no? Use BCEWithLogitsLossFlat, or kind='sigmoid'. Is it a number? kind='regression'. "
                   "Do the classes lie along another axis? Pass axis=")


def wrong_axis(what, fitting):
    return Finding('error', what, "Pass the class axis to KnowledgeDistillation, distill or check_teacher"
                   f"{f', axis={fitting[0]},' if len(fitting) == 1 else ''} or use a loss function that has it: CrossEntropyLossFlat(axis=...)")


def labels_differ(s, t, y, task):
    if y is None or fit_labels(y, t, task) is not None: return
    if task.kind != 'softmax':
        return Finding('error', f"The labels have shape {tuple(y.shape)}, the outputs {tuple(t)}", "Both need the same number of values")
    others = [i - len(t) if i == len(t)-1 else i for i in range(1, len(t)) if fit_labels(y, t, replace(task, axis=i)) is not None]
    fits = f": they fit classes along axis {' or '.join(map(str, others))}" if others else ''
    return wrong_axis(f"The outputs, of shape {tuple(t)}, have their classes along axis {task.axis}, but the labels have "
                      f"shape {tuple(y.shape)}{fits}", others)


def labels_beyond(s, t, y, task):
    if y is None or task.kind != 'softmax' or y.is_floating_point(): return
    n,wrong = t[task.axis],y[(y != task.ignore_index) & ((y < 0) | (y >= t[task.axis]))]
    if len(wrong):
        return Finding('error', f"There is a label {wrong[0].item()}, but the outputs have {n} classes, 0 to {n-1}",
                       "Give the model as many outputs as there are classes; a label that does not count is the loss function's ignore_index")
