"A teacher with another tokenizer or other preprocessing: `inputs=` makes its inputs from the batch, in every face, live and stored."

import lightning.pytorch as pl
import pytest, torch
import transformers as hf
from torch import nn
from apps import FASTAI_WARNINGS, quiet
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner
from torch.utils.data import DataLoader, TensorDataset
from transformers import TrainingArguments
from fastdistill import Distiller, Teacher, at, hint, kd
from fastdistill.fastai import DistillError, KnowledgeDistillation, cache_teacher
from fastdistill.huggingface import DistillationTrainer
from fastdistill.lightning import DistillModule

pytestmark = pytest.mark.filterwarnings(*FASTAI_WARNINGS)
WORDS = ['[PAD]', *'the a cat dog sat ran home away'.split()]
ROWS = torch.tensor([[1, 3, 5, 7], [2, 4, 6, 8], [1, 4, 6, 0], [2, 3, 5, 0]] * 4)  # ids of `WORDS`
Y = torch.tensor([0, 1, 1, 0] * 4)


def text_of(ids):
    return [' '.join(WORDS[i] for i in row if i) for row in ids.tolist()]


def letters(texts):
    "The tokenizer of the teacher: letters"
    n = max(map(len, texts))
    ids = torch.tensor([[ord(c) - 31 for c in t] + [0] * (n - len(t)) for t in texts])
    return dict(input_ids=ids, attention_mask=(ids > 0).long())


def bert(vocab, width=8):
    torch.manual_seed(vocab)
    config = hf.BertConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return hf.BertForSequenceClassification(config).eval()


class Bag(nn.Module):
    def __init__(self, n=9, width=6):
        super().__init__()
        self.words, self.out = nn.EmbeddingBag(n, width), nn.Linear(width, 2)

    def forward(self, x):
        return self.out(self.words(x))


def of_ids(x):
    return letters(text_of(x))


def of_batch(batch):
    return letters(text_of(batch['input_ids']))


def wanted(t, ids=ROWS):
    with torch.no_grad():
        return t(**letters(text_of(ids))).logits


def softened(s, t):
    return (
        4
        * (t.div(2).softmax(1) * (t.div(2).log_softmax(1) - s.div(2).log_softmax(1))).sum(1).mean()
    )


def test_a_teacher_reads_its_own_tokens():
    t = bert(100)
    assert torch.allclose(Teacher(t, inputs=of_ids)(ROWS).logits, wanted(t), atol=1e-6)
    assert torch.allclose(
        Teacher(Teacher(t, inputs=of_ids), run=dict(batch=3))(ROWS).logits, wanted(t), atol=1e-6
    )
    both = Teacher(
        [Teacher(t, inputs=of_ids), Bag().eval()], ensemble=dict(combine='logits')
    )  # each member has its own
    assert torch.allclose(
        both(ROWS).logits, (wanted(t) + both.members[1](ROWS).logits) / 2, atol=1e-6
    )
    with pytest.raises(
        DistillError, match='inputs= of the teacher BertForSequenceClassification returned a list'
    ):
        Teacher(t, inputs=text_of)(ROWS)


def test_in_a_plain_loop_with_layers():
    t, s = bert(100), bert(9)
    batch = dict(input_ids=ROWS, attention_mask=(ROWS > 0).long())
    d = Distiller(
        s,
        Teacher(t, inputs=of_batch),
        kd(T=2, alpha=1.0)
        + hint(layers={'bert.pooler.activation': 'bert.pooler.activation'}, weight=1.0),
        example=batch,
    )
    r = d(batch, Y)
    assert torch.allclose(r.parts['kd'], softened(s(**batch).logits, wanted(t)), atol=1e-5)
    with torch.no_grad():
        a, b = s.bert(**batch).pooler_output, t.bert(**letters(text_of(ROWS))).pooler_output
    assert torch.allclose(r.parts['hint'], (a - b).pow(2).mean(), atol=1e-5)


def fastai_student():
    torch.manual_seed(0)
    items = list(zip(ROWS, Y))
    dls = DataLoaders.from_dsets(items, items, bs=8, num_workers=0, shuffle=False, device='cpu')
    return quiet(Learner(dls, Bag(), loss_func=CrossEntropyLossFlat()))[0]


no_better_than_chance = pytest.mark.filterwarnings('ignore:The teacher is no better than chance')


@no_better_than_chance
def test_in_fastai_live_and_stored(tmp_path):
    ends, t = [], bert(100)
    for make in (
        lambda dls: Teacher(t, inputs=of_ids),
        lambda dls: lambda x: wanted(t, x),
        lambda dls: cache_teacher(
            Teacher(t, inputs=of_ids),
            dls,
            tmp_path / 'c',
            kind='softmax',
            axis=1,
            store=dict(dtype='float32'),
        ),
    ):
        learn = fastai_student()
        learn.fit(
            2, 1e-2, cbs=KnowledgeDistillation(make(learn.dls), kd(T=2, alpha=0.7), check=False)
        )
        ends.append(learn.model.state_dict())
    for other in ends[1:]:
        assert all(
            torch.allclose(a, b, atol=1e-5) for a, b in zip(ends[0].values(), other.values())
        )


@no_better_than_chance
def test_a_cache_of_other_inputs_is_another_teacher(tmp_path):
    t, learn = bert(100), fastai_student()

    def first(x):
        return letters(text_of(x))

    def second(x):
        return letters([o[::-1] for o in text_of(x)])

    cache_teacher(Teacher(t, inputs=first), learn.dls, tmp_path / 'c', kind='softmax', axis=1)
    with pytest.raises(DistillError, match='inputs'):
        cache_teacher(Teacher(t, inputs=second), learn.dls, tmp_path / 'c', kind='softmax', axis=1)


@no_better_than_chance
@pytest.mark.filterwarnings("ignore:The teacher's embedding has 512 rows")
def test_in_hugging_faces_trainer(tmp_path):
    t, s = bert(100), bert(9)
    data = [dict(input_ids=r, attention_mask=(r > 0).long(), labels=y) for r, y in zip(ROWS, Y)]
    batch = dict(input_ids=ROWS, attention_mask=(ROWS > 0).long())
    want = softened(s(**batch).logits, wanted(t)).item()
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=16,
        max_steps=1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy='no',
        disable_tqdm=True,
    )
    trainer = DistillationTrainer(
        s, args, train_dataset=data, teacher=Teacher(t, inputs=of_batch), recipe=kd(T=2, alpha=1.0)
    )
    trainer.train()
    assert trainer.state.log_history[0]['kd_loss'] == pytest.approx(want, rel=1e-3)


@pytest.mark.filterwarnings(
    'ignore::lightning.fabric.utilities.warnings.PossibleUserWarning',
    'ignore:.*isinstance.treespec, LeafSpec.',
    "ignore:The teacher's embedding has 512 rows",
    'ignore:The teacher is no better than chance',
)
def test_in_lightning(tmp_path):
    t, s = bert(100), Bag()
    want = 0.7 * softened(s(ROWS), wanted(t)) + 0.3 * nn.functional.cross_entropy(s(ROWS), Y)
    module = DistillModule(
        s, Teacher(t, inputs=of_ids), kd(T=2, alpha=0.7), lr=0.1, optimizer=torch.optim.SGD
    )
    wanted_grads = torch.autograd.grad(want, list(s.parameters()))
    ends = [p.detach() - 0.1 * g for p, g in zip(s.parameters(), wanted_grads)]
    pl.Trainer(
        max_steps=1,
        accelerator='cpu',
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    ).fit(module, DataLoader(TensorDataset(ROWS, Y), len(ROWS)))
    for a, b in zip(s.parameters(), ends):
        torch.testing.assert_close(a.detach(), b, rtol=1e-4, atol=1e-6)


def test_other_pictures_of_the_same_batch():
    net, x = (
        nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 2)).eval(),
        torch.randn(3, 3, 8, 8),
    )
    crop = lambda x: x[..., 2:6, 2:6]
    assert torch.allclose(Teacher(net, inputs=crop)(x).logits, net(crop(x)), atol=1e-6)
    student = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    teacher = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ).eval()
    d = Distiller(
        student, Teacher(teacher, inputs=crop), at(layers={'1': '1'}, weight=1.0), example=x
    )
    assert [p.t_shape for p in d.pairs] == [(3, 4, 2, 2)] and d(
        x, torch.zeros(3, dtype=torch.long)
    ).parts['at'] > 0
