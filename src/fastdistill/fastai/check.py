"Check a teacher and a Learner before training, for mistakes that training would not show."
from contextlib import closing
from types import SimpleNamespace
from torch.nn.parameter import is_lazy
from ..doctor.classes import map_classes
from ..doctor.findings import Finding, Findings, few_names
from ..doctor.outputs import BATCHES, check_outputs, single_teachers
from ..doctor.shared import shared_parameters
from ..outputs import DistillError
from .batches import PreparationError, prepared_batches
from .task import task_of
from ..teacher.hidden import has_reset, why_no_reset
from .teachers import class_names, teacher_of
from .vocab import CODES, describe_difference, vocab_of

__all__ = ['check_optimizer', 'check_teacher', 'find_mistakes', 'weight_shapes']

KIND_IN_WORDS = dict(softmax='one class of several (softmax)', sigmoid='each label by itself (sigmoid)',
                     regression='numbers (regression)')


def check_teacher(
    learn, # the student's Learner, or its DataLoaders alone
    teacher, # what `KnowledgeDistillation` takes
    task=None, # what the student predicts; None: read from its loss function
    recipe=None, # recipe or term of the training; None: unknown
    n:int=BATCHES, # number of validation batches to read, and a quarter as many training batches
    output=None # which of the student's outputs is distilled, as in `Distiller`
) -> Findings:
    "Compare the inputs that the teacher expects with those that it will get, and score it on a few batches"
    if not hasattr(learn, 'dls'):
        learn = SimpleNamespace(dls=learn, model=None, loss_func=getattr(learn, 'loss_func', None))
    task = task or task_of(learn.loss_func)
    return find_mistakes(learn, teacher_of(teacher, learn, task), task, recipe, n, output)


def weight_shapes(model):
    "What projectors are built for. Masks do not change it, the removal of channels does"
    return sorted(p.shape for p in model.parameters() if not is_lazy(p))


def check_optimizer(learn):
    "Refuse an optimizer that was made before the layers got other weights, as from pruning: it would not train them"
    if learn.opt is None: return        # no training, as in `summary` and `tta`
    stepped = {p for ps in learn.opt.param_lists for p in ps}
    weights = {p: n for n,p in learn.model.named_parameters() if p.requires_grad}
    # a loss function may have weights of its own
    gone = stepped - {*learn.model.parameters(), *getattr(learn.loss_func, 'parameters', list)()}
    if gone and (new := [n for p,n in weights.items() if p not in stepped]):
        raise DistillError("The Learner's optimizer was made before the model got other weights "
                           f"({few_names(new, 3)}), as from pruning its layers, and would not train them. Call "
                           "learn.create_opt() first, or make a new Learner with this model.")


def find_mistakes(
    learn, # as in `check_teacher`
    teacher, # a `Teacher` that `teacher_of` made for this Learner and task
    task, # what the student predicts
    recipe=None, # as in `check_teacher`
    n:int=BATCHES, # as in `check_teacher`
    output=None # as in `check_teacher`
) -> Findings:
    "The findings about a teacher that is built already"
    found = Findings(shared_parameters(learn.model, teacher))
    for f in (resets, kinds, labels, codings, normalization): found += f(learn, teacher, task)
    if found.errors: return found
    valid,train = prepared_batches(learn, n, max(1, n//4))
    try:
        with closing(valid), closing(train):
            seen = check_outputs(teacher, task, valid, learn.model, train=train, recipe=recipe,
                                 names=vocab_of(learn.dls), output=output)
    except PreparationError as e:
        found.append(Finding('note', f"The teacher was not run, since this callback does not run outside of a fit: {e}",
                             "The teacher's score is unknown; teacher.validate() shows it"))
    else:
        found += seen
        found.facts = seen.facts
    return found


def with_learners(teacher): return [o for o in single_teachers(teacher) if o.learner is not None]

def resets(learn, teacher, task):
    "fastai calls the student's method `reset`, even if it changes weights"
    if has_reset(learn.model) and (why := why_no_reset(learn.model)):
        yield Finding('error', f"The student's method reset() {why}, and fastai calls it whenever it fits, validates "
                               "or predicts",
                      "Give the method another name")


def kinds(learn, teacher, task):
    "Student and teacher predict the same kind of thing"
    own = known_kind(learn.loss_func)
    # subtle: without a student, for a cache, kind='regression' stores a teacher's embeddings as they are
    if own not in (None, task.kind) and not (learn.model is None and task.kind == 'regression'):
        yield Finding('error', f"You asked for kind={task.kind!r}, but the student's loss is for {KIND_IN_WORDS[own]}",
                      f"Do not pass kind, or pass kind={own!r}")
    for t in with_learners(teacher):
        if (theirs := known_kind(t.learner.loss_func)) not in (None, task.kind):
            yield Finding('error', f"The teacher was trained to predict {KIND_IN_WORDS[theirs]}, the student predicts "
                          f"{KIND_IN_WORDS[task.kind]}",
                          "Use a teacher of the student's task, or give both the same kind of loss function")


def known_kind(loss_func):
    try: return task_of(loss_func).kind
    except DistillError: return None


def labels(learn, teacher, task):
    "The student's classes, among the teacher's"
    for o in single_teachers(teacher):
        names = class_names(o, learn.dls)
        found = None if task.kind == 'regression' else map_classes(vocab_of(learn.dls), names)
        if found is None or found.same: continue
        if found.missing and o.known_classes is None:
            yield Finding('error', f"The teacher does not have {len(found.missing)} of the student's classes "
                          f"({few_names(found.missing, 5)}); it has {few_names(names, 8)}",
                          "Use a teacher trained on the student's classes, or train the student on the teacher's"
                          + of_shared(found, vocab_of(learn.dls), names))
        elif o.known_classes is not None: continue      # the user chose them
        else:
            extra = f", and {len(found.extra)} more, which are not used" if found.extra else ''
            yield Finding('note', f"The teacher has the student's classes in another order{extra}",
                          "Its outputs are mapped by name")


def of_shared(found, student, teacher):
    "How to distill the classes that both models have"
    if len(found.shared) < 2: return ''
    at = lambda names: few_names([names.index(c) for c in found.shared], 20)
    return (f". To distill the {len(found.shared)} that both have, and leave the others to the labels: "
            f"Teacher(model, select=[{at(teacher)}], classes=[{at(student)}])")


def codings(learn, teacher, task):
    "Both models must code tokens and categories by the same numbers"
    for o in with_learners(teacher):
        if o.inputs is not None: continue       # it translates them
        a,b = learn.dls,o.learner.dls
        for name,read in CODES.items():
            s,t = read(a),read(b)
            if s is None or t is None or s == t: continue
            yield Finding('error', f"Student and teacher code their {name} differently ({describe_difference(s, t)}), "
                          "so the same numbers have another meaning for the teacher",
                          f"Make the student's DataLoaders with the teacher's coding: {CODING_FIXES[name]}")


SAME_TABLE = "the teacher's own dls, or teacher.dls.train_ds.new(df) for another table"
CODING_FIXES = {'tokens': "TextDataLoaders(..., text_vocab=...) or TextBlock(vocab=...) with its token vocab",
                'categories': SAME_TABLE, 'columns of numbers': SAME_TABLE}


def normalization(learn, teacher, task):
    if teacher.adapts:
        yield Finding('note', f"The teacher was trained with another normalization ({teacher.adapts})",
                      "Its images are normalized accordingly")
