"What would go wrong in silence between a teacher and a Learner, reported before training."
from types import SimpleNamespace
from fastai.basics import is_listy
from ..doctor import BATCHES, KIND_IN_WORDS, Finding, Findings, check_outputs, few_names, single_teachers
from ..outputs import DistillError, as_plain
from .task import task_of
from ..teacher.hidden import has_reset, why_no_reset
from .teachers import teacher_of
from .vocab import CODES, describe_difference, map_classes, vocab_of

__all__ = ['check_teacher', 'find_mistakes']


def check_teacher(
    learn, # the student's Learner, or its DataLoaders alone
    teacher, # what `KnowledgeDistillation` takes
    task=None, # what the student predicts; None: read off its loss function
    output=None # which of the student's outputs is distilled, as in `Distiller`
) -> Findings:
    "Compare what the teacher expects with what it will be given; a few validation batches tell whether it knows the task"
    if not hasattr(learn, 'dls'): learn = SimpleNamespace(dls=learn, model=None, loss_func=getattr(learn, 'loss_func', None))
    task = task or task_of(learn.loss_func)
    return find_mistakes(learn, teacher_of(teacher, learn, task), task, output)


def find_mistakes(
    learn, # as in `check_teacher`
    teacher, # a `Teacher` that `teacher_of` made for this Learner and task
    task, # what the student predicts
    output=None # as in `check_teacher`
) -> Findings:
    "The findings about a teacher that is built already"
    found = Findings()
    for f in (shared_parameters, resets, kinds, labels, codings, normalization): found += f(learn, teacher, task)
    if not any(f.level == 'error' for f in found): found += check_outputs(teacher, task, checked_batches(learn), learn.model, output)
    return found


def with_learners(teacher): return [o for o in single_teachers(teacher) if o.learner is not None]

def shared_parameters(learn, teacher, task):
    "Parameters that the student trains must not be the teacher's"
    if learn.model is None: return
    ids = teacher.parameters_ids
    if both := [n for n,p in learn.model.named_parameters() if id(p) in ids]:
        yield Finding('error',
                      f"Student and teacher share {len(both)} parameters ({few_names(both, 3)}), so the teacher would change with the student",
                      "Build the student from a copy: copy.deepcopy(teacher.model)")


def resets(learn, teacher, task):
    "fastai calls the student's `reset` whatever it does"
    if has_reset(learn.model) and (why := why_no_reset(learn.model)):
        yield Finding('error', f"The student's method reset() {why}, and fastai calls it whenever it fits, validates or predicts",
                      "Give the method another name")


def kinds(learn, teacher, task):
    "Student and teacher answer the same kind of question"
    own = known_kind(learn.loss_func)
    if own not in (None, task.kind):
        yield Finding('error', f"You asked for kind={task.kind!r}, but the student's loss is one of {KIND_IN_WORDS[own]}",
                      f"Leave kind out, or pass kind={own!r}")
    for t in with_learners(teacher):
        if (theirs := known_kind(t.learner.loss_func)) not in (None, task.kind):
            yield Finding('error', f"The teacher was trained to give {KIND_IN_WORDS[theirs]}, the student gives {KIND_IN_WORDS[task.kind]}",
                          "Take a teacher of the student's task, or give both the same kind of loss function")


def known_kind(loss_func):
    try: return task_of(loss_func).kind
    except DistillError: return None


def labels(learn, teacher, task):
    "The student's classes, among the teacher's"
    for o in with_learners(teacher):
        found = None if task.kind == 'regression' else map_classes(vocab_of(learn.dls), vocab_of(o.learner.dls))
        if found is None or found.same: continue
        if found.missing:
            yield Finding('error', f"The teacher does not know {len(found.missing)} of the student's classes ({few_names(found.missing, 5)}); "
                          f"it knows {few_names(vocab_of(o.learner.dls), 8)}",
                          "Take a teacher trained on the student's classes, or train the student on the teacher's")
        else:
            extra = f", and {len(found.extra)} more that are left out" if found.extra else ''
            yield Finding('note', f"The teacher has the student's classes in another order{extra}", "Its outputs are mapped by name")


def codings(learn, teacher, task):
    "Tokens and categories are numbers that only mean the same under the same coding"
    for o in with_learners(teacher):
        a,b = learn.dls,o.learner.dls
        for name,read in CODES.items():
            s,t = read(a),read(b)
            if s is None or t is None or s == t: continue
            yield Finding('error', f"Student and teacher code their {name} differently ({describe_difference(s, t)}), "
                          "so the teacher would read others than the student",
                          f"Make the student's DataLoaders with the teacher's coding: {CODING_FIXES[name]}")


SAME_TABLE = "the teacher's own dls, or teacher.dls.train_ds.new(df) for another table"
CODING_FIXES = {'tokens': "TextDataLoaders(..., text_vocab=...) or TextBlock(vocab=...) with its token vocab", 'categories': SAME_TABLE,
       'columns of numbers': SAME_TABLE}


def normalization(learn, teacher, task):
    if teacher.adapts:
        yield Finding('note', f"The teacher was trained with another normalisation ({teacher.adapts})", "Its input is re-normalised")


def valid_batches(dl):
    "Some batches from all over the validation set, which is often sorted by class"
    if hasattr(dl, 'shuffle_fn'): dl = dl.new(shuffle=True, drop_last=False, num_workers=0)    # the learner's own is left alone
    for _,b in zip(range(BATCHES), dl): yield b


def checked_batches(learn):
    "(inputs, targets) of the batches that the doctor looks at"
    if len(learn.dls.loaders) < 2 or getattr(learn.dls.valid, 'n', None) == 0: return
    yield from (split_batch(learn, b) for b in valid_batches(learn.dls.valid))


def split_batch(learn, b):
    if learn.model is not None: b = learn._set_device(b)
    b = tuple(b) if is_listy(b) else (b,)
    n = getattr(learn.dls, 'n_inp', 1 if len(b) == 1 else len(b)-1)
    return tuple(map(as_plain, b[:n])),tuple(map(as_plain, b[n:]))
