"Trainings that two processes share, or that one does with batches twice as large: `test_two_ranks.py` runs both and compares."

import warnings
import torch
from unittest.mock import patch
from torch import nn
import apps
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, SGD, noop, set_seed
from fastdistill import Distiller, Recipe, Teacher, losses, recipes
from fastdistill.fastai import KnowledgeDistillation, Term, cache_teacher, kd
from fastdistill.base.distributed import on_first, rank, world_size
from fastdistill.recipes.gradient_balance import GradientRatio

BS, N, VALID = 8, 64, 32  # of one process; items
IN_A_LOOP = (
    'logits',
    'features',
    'relations',
    'queue_relations',
    'relations_of_logits',
    'standardized_relations',
    'shares',
    'limited_shares',
)  # in plain PyTorch too
IN_THE_TRAINER = 'bert', 'gpt2'
HINT = dict(layers={'2': '2'}, projector='linear')


def silent_on_one(s, t):
    "No gradient in the second process"
    return (s - t).pow(2).mean() * 2 if rank() == 0 else t.new_zeros(())


def half_silent(s, t):
    "The same in one process: the first half of the batch counts"
    return (s - t)[: len(s) // 2].pow(2).mean()


def cases():
    silent = half_silent if world_size() == 1 else silent_on_one
    return dict(
        logits=kd(),
        teacher_alone=kd(alpha=1.0),
        features=kd() + Term(losses.hint, weight=0.5, **HINT),
        relations=kd()
        + Term(losses.rkd, weight=0.5, layers={'2': '2'})
        + recipes.sp({'0': '0'}, weight=1.0)
        + recipes.pkt({'2': '2'}, weight=1.0),
        queue_relations=Recipe(recipes.seed({'2': '2'}, weight=1.0, size=20), kd()),
        relations_of_logits=recipes.dist() + Term(losses.pkd, weight=1.0, **HINT),
        standardized_relations=Recipe(Term(losses.standardized(losses.dist))),
        shares=kd()
        + Term(losses.hint, grad_ratio=0.3, **HINT)
        + recipes.rkd({'2': '2'}, grad_ratio=0.2),
        limited_shares=kd() + Term(losses.hint, grad_ratio=0.3, **HINT),
        fading=Recipe(Term(losses.kl, grad_ratio=3, fade=0.2, T=1.0)),
        one_silent=kd() + Term(silent, weight=0.5, **HINT),
        cached=kd(),
        cached_hidden=Recipe(Term(losses.kl, grad_ratio=3, T=1.0)),
    )


def items():
    "In one process each batch holds what the two processes get as their batches of the same number"
    x, y = apps.rows(N + VALID)
    train = [*zip(x, y)]
    train, valid = train[:N], train[N:]
    if world_size() > 1:
        return train, valid
    half = N // 2
    return [
        o for i in range(0, half, BS) for r in (0, half) for o in train[r + i : r + i + BS]
    ], valid


def models():
    set_seed(0)
    student, teacher = apps.mlp(6), apps.mlp(16)
    teacher.load_state_dict(apps.wise())
    return student, teacher


def loaders():
    return DataLoaders.from_dsets(
        *items(), bs=BS * 2 // world_size(), shuffle=False, num_workers=0, device='cpu'
    )


def in_fastai(recipe, teacher, student):
    "(weights of student and projectors, the last row of the table)"
    learn = Learner(loaders(), student, loss_func=CrossEntropyLossFlat(), opt_func=SGD)
    learn.logger = noop
    cb = KnowledgeDistillation(teacher, recipe, check=False)
    set_seed(0)
    with learn.no_bar():
        if world_size() > 1:
            with learn.distrib_ctx(sync_bn=False, cpu=True):
                learn.fit(2, 0.1, cbs=cb)
        else:
            learn.fit(2, 0.1, cbs=cb)
    ps = [*learn.model.parameters(), *cb.distiller.own_parameters()]
    return [p.detach() for p in ps], [float(v) for v in learn.recorder.values[-1]]


def sharded(teacher):
    "A teacher of which each process holds a part"
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh('cpu', (world_size(),))
    for m in [*teacher, teacher]:
        if len([*m.parameters()]):
            fully_shard(m, mesh=mesh)
    return teacher


def in_a_loop(recipe, teacher, student):
    """The same in plain PyTorch, with the whole Distiller in DistributedDataParallel. In float64, where few differences
    can hide in rounding; projectors have float32"""
    student, teacher = student.double(), teacher.double()
    train, _ = items()
    bs = BS * 2 // world_size()
    mine = train[rank() * N // world_size() :][: N // world_size()]
    batches = [
        (x.double(), y)
        for x, y in (map(torch.stack, zip(*mine[i : i + bs])) for i in range(0, len(mine), bs))
    ]
    set_seed(0)
    distiller = Distiller(student, Teacher(teacher), recipe, example=batches[0][0], check=False)
    model = distiller if world_size() == 1 else nn.parallel.DistributedDataParallel(distiller)
    opt = torch.optim.SGD(distiller.parameters(), 0.1, momentum=0.9)
    with distiller.teacher:
        for x, y in batches * 2:
            opt.zero_grad()
            model(x, y).total.backward()
            opt.step()
    del model  # subtle: DistributedDataParallel must end before its group of processes
    return [p.detach() for p in distiller.parameters()]


def transformer(kind, width):
    "Without dropout; weights large enough that predictions differ"
    import transformers as hf

    if kind == 'bert':
        model = hf.BertForSequenceClassification(
            hf.BertConfig(
                vocab_size=40,
                hidden_size=width,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=width,
                num_labels=3,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )
    else:
        model = hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=40,
                n_embd=width,
                n_layer=1,
                n_head=2,
                n_positions=16,
                bos_token_id=0,
                eos_token_id=0,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        )
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(8)
    return model


def in_trainer(kind, folder):
    """Hugging Face's `Trainer`, which shuffles alike in one and in two processes. GPT-2's texts have lengths of their own, and its
    loss is a mean over the words of all processes. By default the Trainer multiplies every loss by the number of processes, BERT's
    too, which it does not divide by the number of items"""
    from transformers import TrainingArguments
    from fastdistill.huggingface import DistillationTrainer

    set_seed(0)
    student, teacher = transformer(kind, 8), transformer(kind, 16)
    ids = torch.randint(1, 40, (N, 9))
    words = [ids[i].where(torch.arange(9) < 4 + i % 6, -100) for i in range(N)]
    data = [dict(input_ids=ids[i], labels=i % 3 if kind == 'bert' else words[i]) for i in range(N)]
    args = TrainingArguments(
        str(folder / kind),
        per_device_train_batch_size=BS * 2 // world_size(),
        num_train_epochs=2,
        logging_steps=1,
        learning_rate=0.02,
        optim='sgd',
        average_tokens_across_devices=kind == 'gpt2',
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy='no',
        dataloader_pin_memory=False,
    )
    layers = dict(
        bert={'bert.encoder.layer.0': 'bert.encoder.layer.0'},
        gpt2={'transformer.h.0': 'transformer.h.0'},
    )[kind]
    trainer = DistillationTrainer(
        student,
        args,
        train_dataset=data,
        teacher=teacher,
        recipe=kd(T=2, alpha=0.7) + Term(losses.hint, layers=layers, weight=0.1),
    )
    trainer.train()
    ps = [*trainer.model.parameters(), *trainer.distiller.own_parameters()]
    return [p.detach() for p in ps], [
        [h[k] for k in ('loss', 'task_loss', 'kd_loss', 'hint_loss')]
        for h in trainer.state.log_history
        if 'loss' in h
    ]


def chosen():
    "T of the default recipe in a plain loop and in fastai. The first process may also check the teacher alone, and waits for nobody"
    student, teacher = models()
    x, y = map(torch.stack, zip(*items()[0][rank() * N // 2 :][:BS]))
    d = Distiller(student, Teacher(teacher), check=False)
    d(x, y)
    learn = Learner(loaders(), models()[0], loss_func=CrossEntropyLossFlat(), opt_func=SGD)
    learn.logger = noop
    on_first(lambda: len(learn.check_teacher(teacher)))
    cb = KnowledgeDistillation(teacher, check=False)
    with learn.no_bar():
        if world_size() > 1:
            with learn.distrib_ctx(sync_bn=False, cpu=True):
                learn.fit(1, 0.1, cbs=cb)
        else:
            learn.fit(1, 0.1, cbs=cb)
    return [o.recipe.terms[0].options['T'] for o in (d, cb)]


def run(folder, names=None):
    "name -> what the training left"
    out = {kind: in_trainer(kind, folder) for kind in IN_THE_TRAINER} | dict(chosen=chosen())
    for name, recipe in cases().items():
        student, teacher = models()
        if name.startswith('cached'):
            store = dict(dtype='float32')
            if name == 'cached_hidden':
                store = dict(kind='hidden', dtype='float32')
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                teacher = cache_teacher(
                    teacher,
                    loaders(),
                    folder / f'{name} of {world_size()}',
                    views=0,
                    store=store,
                    kind='softmax',
                    axis=1,
                    valid=True,
                )
        # so high that the gradient against different samples decides
        floor = 3.0 if name in ('limited_shares', 'cached_hidden') else GradientRatio.FLOOR
        with patch.object(GradientRatio, 'FLOOR', floor):
            out[name] = in_fastai(recipe, teacher, student)
            if name in IN_A_LOOP:
                out[f'{name} in a loop'] = in_a_loop(recipe, *models()[::-1]), []
    student, teacher = models()
    out['sharded teacher in a loop'] = (
        in_a_loop(kd(), teacher if world_size() == 1 else sharded(teacher.double()), student),
        [],
    )
    return out


def one_of_two(folder):
    "What each of two processes does"
    import fastai.distributed  # noqa: F401

    warnings.simplefilter('ignore')
    apps.distributed_on_cpu()
    torch.distributed.init_process_group('gloo')
    torch.save(run(folder), folder / f'{rank()}.pt')
    apps.leave_together()
