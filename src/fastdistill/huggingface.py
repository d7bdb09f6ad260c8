"Distillation with Hugging Face's `Trainer`, and students made of their teacher's own layers."
import copy, inspect, os, re
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
try:
    import accelerate  # noqa: F401 (the Trainer needs it)
    from transformers import Trainer
except ImportError as e:
    raise ImportError("fastdistill.huggingface needs transformers and accelerate: pip install 'fastdistill[hf]'") from e
from .automatic import Distiller
from .batch import next_tokens
from .doctor.classes import map_classes
from .features.calls import is_hf, predicts_next
from .features.names import unwrap
from .features.probe import untouched
from .features.taps import Taps
from .outputs import DistillError
from .ranks import mean_over_ranks
from .replay.seeds import RandomGuard
from .teacher.teacher import Teacher
from .trainers import (add_parameters, average_gradients, complete, load_state, needs_example, reset_gradients,
                       takes_part, training_state)

__all__ = ['DistillationMixin', 'DistillationTrainer', 'student_from']

STATE_FILE = 'distillation.pt' # in a checkpoint's folder
PROBLEM_KINDS = dict(regression='regression', single_label_classification='softmax',
                     multi_label_classification='sigmoid')
QUESTIONS = ['start_positions', 'end_positions']


class DistillationMixin:
    """A teacher for your own `Trainer`: `class MyTrainer(DistillationMixin, Trainer)`. It replaces the loss of training
    batches. All else is the Trainer's: the evaluation loss is the labels' own, and only the student is saved"""
    def __init__(
        self,
        *args, # of the Trainer
        teacher, # a model, a `Teacher`, or a list of these (an ensemble)
        recipe=None, # `kd()`, `kd() + at()`, a `Term`; None: `auto` chooses, by what the student predicts
        kind:str|None=None, # 'softmax', 'sigmoid' or 'regression'; None: by the student's config and the labels
        axis:int|None=None, # class axis; None: the last, and 1 for questions and pixels
        output=None, # which output is distilled, of both models: a name or a function; None: 'logits'
        check:bool=True, # look for mistakes in the first batch
        **kwargs # of the Trainer
    ):
        self.teacher,self.recipe = teacher if isinstance(teacher, Teacher) else Teacher(teacher),recipe
        self.asked = dict(kind=kind, axis=axis, output=output, check=check)
        self.distiller,self.part_means = None,PartMeans()
        self.counts_items = self.last_step = None
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise DistillError(f"This process has {self.args.n_gpu} GPUs, which the Trainer would use by DataParallel, "
                               "where layers can't be read. Start one process for each with torchrun or accelerate "
                               "launch, or choose one with CUDA_VISIBLE_DEVICES=0.")

    # before the first batch

    def create_optimizer(self, *args, **kwargs):
        "The Trainer's optimizer, which trains the projectors too"
        if self.distiller is None or self.distiller.student is not self.model: self._build()
        optimizer = super().create_optimizer(*args, **kwargs)
        add_parameters(optimizer, self.distiller)
        return optimizer

    def _build(self):
        "The Distiller of this model"
        batch = self._example() if self._needs_labels() else None
        task = self._task(batch)
        output = question_logits if self._answers and self.asked['output'] is None else self.asked['output']
        self.distiller = d = Distiller(self.model, teacher_for(self.teacher, self.model, task, output), self.recipe,
                                       output=output, check=self.asked['check'], **task)
        d.links.to(self.args.device)
        if needs_example(d): self._complete(self._example() if batch is None else batch)
        d.teacher.start()

    def _complete(self, batch):
        student,_ = self._inputs(batch)
        labels = [student.pop(k) for k in self.label_names if k in student]
        complete(self.distiller, student, bool(labels))

    def _example(self):
        "A training batch. Drawing it changes nothing"
        collate = self._get_collator_with_removed_columns(self.data_collator)
        with RandomGuard():
            loader = (self.get_train_dataloader() if self.train_dataset is None else
                      DataLoader(self.train_dataset, self.args.train_batch_size, collate_fn=collate))
            return self._prepare_inputs(next(iter(loader)))

    # what the student predicts

    @property
    def _answers(self): return list(self.label_names) == QUESTIONS

    def _needs_labels(self):
        "Do only the labels show whether the student predicts one class or several labels?"
        config = getattr(self.model, 'config', None)
        known = self.asked['kind'] or getattr(config, 'problem_type', None) or getattr(config, 'num_labels', 2) == 1
        return not known and type(self.model).__name__.endswith(('SequenceClassification', 'ImageClassification'))

    def _task(self, batch):
        "`kind`, `axis` and `ignore_index` of the Distiller"
        config,name = getattr(self.model, 'config', None),type(self.model).__name__
        several = batch is not None and any(is_float(batch.get(k)) for k in self.label_names)
        one = name.endswith('SequenceClassification') and getattr(config, 'num_labels', 2) == 1
        kind = 'regression' if one else 'sigmoid' if several else 'softmax'
        kind = PROBLEM_KINDS.get(getattr(config, 'problem_type', None), kind)
        kind = self.asked['kind'] or kind
        axis = 1 if self._answers or name.endswith('Segmentation') else -1
        return dict(kind=kind, axis=axis if self.asked['axis'] is None else self.asked['axis'],
                    ignore_index=getattr(config, 'semantic_loss_ignore_index', None))

    # the inputs of both models

    def _set_signature_columns_if_needed(self):
        "Columns that the teacher alone takes, as token_type_ids, stay in the batches"
        new = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if new: self._signature_columns += [n for n in names_taken(self.teacher) if n not in self._signature_columns]

    def _inputs(self, batch):
        "(the student's inputs with the labels, the teacher's inputs)"
        student,teacher = names_taken(self.model),names_taken(self.teacher)
        plain = {k: v for k,v in batch.items() if k not in self.label_names}
        of_student = {k: v for k,v in plain.items() if k in student or k not in teacher}
        if not any(k in student for k in plain): of_student = plain
        of_teacher = {k: v for k,v in plain.items() if k in teacher} or plain
        return {**of_student, **{k: v for k,v in batch.items() if k in self.label_names}},of_teacher

    # a batch

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        "The loss of a training batch with the teacher's part; in evaluation the labels' own"
        x,x_teacher = self._inputs(inputs)
        progress = self.state.global_step/self.state.max_steps if self.state.max_steps else None
        if not model.training or not takes_part(self.distiller, progress):
            return super().compute_loss(model, x, return_outputs=return_outputs, **kwargs)
        d,scale = self.distiller,self._scale(x, **kwargs)
        with Taps(model, d.student_layers(d.active_terms(progress))) as taps:
            task,raw = self._run(model, x, kwargs)
            s = d.student_outputs(without_loss(raw, task), taps.pop(), self._tokens(x))
        with self.accelerator.autocast(): t = d.teacher_outputs(x_teacher, progress)
        targets = self._targets(x, s.logits)
        self._hide_padding(x, s, t)
        r = d.compute(s, t, None if task is None else task/scale, targets, progress=progress)
        self.part_means.add(r)
        return (r.total*scale, raw) if return_outputs else r.total*scale

    def _run(self, model, x, options):
        "The labels' own loss, as the Trainer computes it (None without labels), and what the student returned"
        if not any(k in x for k in self.label_names): return None,model(**x)
        return super().compute_loss(model, dict(x), return_outputs=True, **options)

    def _scale(self, x, num_items_in_batch=None):
        """By what the Trainer multiplies the mean over this batch's labels. It counts the labels of all batches before
        the optimizer's step, `num_items_in_batch`, and may average them over processes"""
        mine = getattr(self, 'model_accepts_loss_kwargs', False) or getattr(self, 'compute_loss_func', None) is not None
        if num_items_in_batch is None or not mine: return 1
        ranks = self.accelerator.num_processes if getattr(self.args, 'average_tokens_across_devices', False) else 1
        if not self._counts_items(x): return ranks
        y = x['labels'][..., 1:] if predicts_next(self.model) else x['labels']
        return y.ne(-100).sum().clamp_min(1)*ranks/num_items_in_batch

    def _counts_items(self, x):
        "Is the labels' loss divided by `num_items_in_batch`? Some models ignore it, as one trial shows"
        if self.counts_items is None:
            tried = []
            with untouched(self.model):
                for n in map(torch.tensor, (1, 2)):
                    tried.append(super().compute_loss(self.model, dict(x), num_items_in_batch=n))
            self.counts_items = not torch.equal(*tried)
        return self.counts_items

    def _tokens(self, x):
        "The inputs whose padding hides positions of the logits: not those of an encoder beside a decoder"
        return () if getattr(getattr(self.model, 'config', None), 'is_encoder_decoder', False) else x

    def _targets(self, x, logits):
        "The labels, each where it is predicted"
        y = tuple(x[k] for k in self.label_names if k in x)
        if self._answers and y:
            y = torch.stack([o.reshape(-1).clamp_min(0) for o in y], -1)
            return y.where(y < logits.shape[1], -100),
        if y and predicts_next(self.model): return next_tokens(y[0], -100),*y[1:]
        return y

    def _hide_padding(self, x, *outputs):
        "An answer neither begins nor ends at a padded token"
        if not self._answers or 'attention_mask' not in x: return
        for o in outputs:
            if o is not None: o.logits = o.logits.masked_fill(x['attention_mask'][..., None] == 0, -1e4)

    # around the batches

    def train(self, *args, **kwargs):
        "Train the student; see `Trainer.train`"
        try: return super().train(*args, **kwargs)
        finally:
            if self.distiller is not None: self.distiller.teacher.stop()

    def training_step(self, *args, **kwargs):
        # subtle: after a step, the Trainer resets the gradients of the model, and not those of its optimizer
        if self.last_step != self.state.global_step: reset_gradients(self.distiller)
        self.last_step = self.state.global_step
        loss = super().training_step(*args, **kwargs)
        average_gradients(self.distiller)
        return loss

    def log(self, logs, *args, **kwargs):
        "Add the mean of each part to the logs of the training loss"
        super().log({**logs, **self.part_means.pop()} if 'loss' in logs else logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save: torch.save(training_state(self.distiller), os.path.join(output_dir, STATE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        file = None if checkpoint is None else os.path.join(checkpoint, STATE_FILE)
        if file is not None and os.path.isfile(file):
            load_state(self.distiller, torch.load(file, map_location='cpu', weights_only=True))


class DistillationTrainer(DistillationMixin, Trainer):
    "`Trainer` with a teacher: `DistillationTrainer(model, args, train_dataset=..., teacher=..., recipe=kd())`"


class PartMeans:
    "Means of each part of the loss over the training batches since the last log"
    def __init__(self): self.sums,self.n = {},0

    def add(self, r):
        parts = r.parts if r.task is None else dict(task=r.task.detach(), **r.parts)
        for k,v in parts.items():
            total,n = self.sums.get(k, (0., 0))
            self.sums[k] = total + v,n + 1

    def pop(self):
        means = {f'{k}_loss': (v/n).float() for k,(v,n) in self.sums.items()}
        self.sums = {}
        mean_over_ranks(means.values())
        return {k: v.item() for k,v in means.items()}


# both models

def is_float(y): return isinstance(y, Tensor) and y.is_floating_point()


def names_taken(
    model # a module, or a `Teacher`
) -> set:
    "Names of the arguments of its forward, or of all members of an ensemble"
    modules = model.modules if isinstance(model, Teacher) else [model]
    return {n for m in modules for n in inspect.signature(unwrap(m).forward).parameters}


def without_loss(raw, task):
    "What the student returned, without the loss that stands first in a tuple"
    return raw[1:] if isinstance(raw, tuple) and isinstance(raw[0], Tensor) and not raw[0].dim() else raw


def question_logits(out):
    "The logits of where an answer begins and ends: (B, L, 2), classes along axis 1"
    return torch.stack([out.start_logits, out.end_logits], -1)


def names_by_id(model):
    "Names of the classes by the model's `id2label`; None if they are only numbered"
    id2label = getattr(getattr(model, 'config', None), 'id2label', None)
    if not id2label or all(re.fullmatch(r'LABEL_\d+', str(v)) for v in id2label.values()): return None
    return [str(id2label[k]) for k in sorted(id2label, key=int)]


def teacher_for(teacher, student, task, output):
    "The teacher with the student's kind of outputs, and its classes in the student's order"
    new = dict(kind=task['kind'], axis=task['axis'], output=output)
    if task['kind'] != 'regression' and output is not question_logits: new |= in_order_of(student, teacher)
    return Teacher(teacher, **{k: v for k,v in new.items() if k not in teacher.given})


def in_order_of(student, teacher):
    "The option `select` that brings the teacher's classes into the student's order; none if this is its order"
    if 'select' in teacher.given: return {}
    for m in teacher.members: refuse_other_order(student, m)
    found = map_classes(names_by_id(student), names_by_id(teacher.module))
    if found is None or found.same: return {}
    if found.missing:
        raise DistillError("By id2label, the teacher does not have the student's classes "
                           f"{', '.join(found.missing[:5])}, and the student not the teacher's {', '.join(found.extra[:5]) or '(none)'}. Give both "
                           "models the same names, or name the teacher's class of each of the student's: "
                           "Teacher(model, select=[...]).")
    return dict(select=found.order)


def refuse_other_order(student, member):
    if option := in_order_of(student, member):
        raise DistillError(f"By id2label, {member.name} of the ensemble has its classes in another order: "
                           f"Teacher(model, select={option['select']}) brings them into the student's.")


# students

def student_from(
    teacher:nn.Module, # a model of transformers
    layers # numbers of the teacher's blocks that the student gets, as [0, 2, 4]; -1 is the last
):
    """A model like the teacher, with some of its blocks: embeddings, head and these blocks are copies of the teacher's
    (DistilBERT, arXiv:1910.01108)"""
    if not is_hf(teacher):
        raise DistillError(f"student_from needs a model of transformers, not {type(teacher).__name__}. Other models: "
                           "copy.deepcopy(teacher), and shorten its list of blocks.")
    name,n = blocks_of(teacher)
    if wrong := [i for i in layers if not -n <= i < n]:
        raise DistillError(f"layers={list(layers)}: {type(teacher).__name__} has {n} blocks in {name}, 0 to {n-1}, "
                           f"and no {wrong[0]}")
    layers = [i % n for i in layers]
    student = type(teacher)(shorter(teacher.config, layers, n)).to(teacher.device, teacher.dtype)
    student.load_state_dict(kept(teacher.state_dict(), name, layers))
    if getattr(teacher, 'generation_config', None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.train(teacher.training)


def blocks_of(model):
    "Name and length of the one list of blocks"
    n = getattr(model.config, 'num_hidden_layers', None)
    lists = [k for k,m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n]
    outer = [k for k in lists if not any(k.startswith(f'{o}.') for o in lists)]
    if len(outer) == 1: return outer[0],n
    raise DistillError(f"{type(model).__name__} has {len(outer)} lists of num_hidden_layers={n} blocks "
                       f"({', '.join(outer) or 'none'}); student_from needs exactly one. Make the student from a "
                       "config.")


def shorter(config, layers, n):
    "The config of a model with these blocks"
    config = copy.deepcopy(config)
    for k,v in vars(config).items():
        if isinstance(v, list) and len(v) == n and n > 1: setattr(config, k, [v[i] for i in layers])
    config.num_hidden_layers = len(layers)
    return config


def kept(state, name, layers):
    "The weights of these blocks, with their new numbers, and of all that is outside the blocks"
    out = {k: v for k,v in state.items() if not k.startswith(f'{name}.')}
    for new,old in enumerate(layers):
        old = f'{name}.{old}.'
        out |= {f'{name}.{new}.{k.removeprefix(old)}': v for k,v in state.items() if k.startswith(old)}
    return out
