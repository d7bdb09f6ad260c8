"Hugging Face: each kind of model against a loss written out by hand; the Trainer's own features; students from their teachers."

import copy
import re
from contextlib import nullcontext
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn
from transformers import Trainer, TrainingArguments
from fastdistill import DistillError, Teacher, Term, at, kd, losses, soft_labels
from fastdistill.huggingface import DistillationMixin, DistillationTrainer, student_from

pytestmark = [
    pytest.mark.usefixtures('old_objects_frozen'),
    pytest.mark.filterwarnings(
        'ignore:The teacher is (no|hardly) better than chance',
        "ignore:The teacher's batch norm statistics",  # untrained ones
        'ignore:Version v4.12.0 introduces a better way:FutureWarning',  # of EncoderDecoderModel
    ),
]
VOCAB, T, ALPHA = 40, 2.0, 0.7
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
refuses = lambda text: pytest.raises(DistillError, match=text)


def bert(kind='SequenceClassification', width=16, layers=2, **kwargs):
    config = hf.BertConfig(
        **{
            **dict(
                vocab_size=VOCAB,
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=2,
                intermediate_size=width,
                num_labels=3,
            ),
            **NO_DROPOUT,
            **kwargs,
        }
    )
    return getattr(hf, f'BertFor{kind}')(config)


def distilbert(width=16, layers=2, dropout=0.0, **kwargs):
    return hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(
            vocab_size=VOCAB,
            dim=width,
            n_layers=layers,
            n_heads=2,
            hidden_dim=width,
            dropout=dropout,
            attention_dropout=dropout,
            seq_classif_dropout=0.0,
            num_labels=3,
            **kwargs,
        )
    )


def gpt2(width=16, layers=2):
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=VOCAB,
            n_embd=width,
            n_layer=layers,
            n_head=2,
            n_positions=16,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def vit(width=16, layers=2):
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=width,
            image_size=16,
            patch_size=8,
            num_labels=3,
            **NO_DROPOUT,
        )
    )


def segformer(width=8):
    return hf.SegformerForSemanticSegmentation(
        hf.SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[width] * 2,
            patch_sizes=[3, 3],
            strides=[2, 2],
            num_attention_heads=[1, 1],
            mlp_ratios=[2, 2],
            decoder_hidden_size=width,
            num_labels=3,
            classifier_dropout_prob=0.0,
            drop_path_rate=0.0,
            **NO_DROPOUT,
        )
    )


def t5(width=16, layers=1):
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCAB,
            d_model=width,
            d_kv=8,
            d_ff=width,
            num_layers=layers,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


def llava(width=16):
    sizes = dict(intermediate_size=width, num_hidden_layers=1, num_attention_heads=2)
    image = dict(model_type='clip_vision_model', hidden_size=8, image_size=8, patch_size=4)
    text = dict(model_type='llama', hidden_size=width, vocab_size=VOCAB, num_key_value_heads=1)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=image | sizes,
            text_config=text | sizes,
            image_token_index=VOCAB - 1,
            vision_feature_layer=-1,
        )
    )


def spectrograms(width=16):
    return hf.ASTForAudioClassification(
        hf.ASTConfig(
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=width,
            patch_size=4,
            frequency_stride=4,
            time_stride=4,
            max_length=8,
            num_mel_bins=8,
            num_labels=3,
            **NO_DROPOUT,
        )
    )


def encoder_decoder(config, width, layers, **options):
    return config(
        vocab_size=VOCAB,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=width,
        decoder_ffn_dim=width,
        dropout=0.0,
        decoder_start_token_id=2,
        **options,
    )


def bart(width=16, layers=1):
    options = dict(max_position_embeddings=16, forced_eos_token_id=None)
    return hf.BartForConditionalGeneration(encoder_decoder(hf.BartConfig, width, layers, **options))


def bart_decoder(width=16):
    return hf.BartForCausalLM(encoder_decoder(hf.BartConfig, width, 1, max_position_embeddings=16))


def bert_to_bert(width=16):
    encoder, decoder = (bert(width=width, **o).config for o in ({}, dict(is_decoder=True)))
    decoder.add_cross_attention = True
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return hf.EncoderDecoderModel(config)


def whisper(width=16, layers=1):
    options = dict(num_mel_bins=4, max_source_positions=8, max_target_positions=16)
    tokens = dict(pad_token_id=1, bos_token_id=2, eos_token_id=2)
    return hf.WhisperForConditionalGeneration(
        encoder_decoder(hf.WhisperConfig, width, layers, **options, **tokens)
    )


def loud(model):
    "Weights large enough that predictions differ"
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(12)
    return model


def texts(n=8, length=9, label=None, types=False):
    "Token sequences of two lengths, padded; the labels by `label(i, length of the text)`"
    for i in range(n):
        k = length if i % 2 else length - 4
        ids = torch.cat([torch.randint(1, VOCAB, (k,)), torch.zeros(length - k, dtype=torch.long)])
        x = dict(input_ids=ids, attention_mask=(torch.arange(length) < k).long())
        if types:
            x['token_type_ids'] = (torch.arange(length) > 2).long()
        yield {**x, **(dict(labels=i % 3) if label is None else label(i, k, ids))}


def tokens(i, k, ids):
    return dict(
        labels=torch.where(
            (torch.arange(len(ids)) < k) & (torch.arange(len(ids)) > 0), ids % 3, -100
        )
    )


def words(i, k, ids):
    return dict(
        labels=torch.where(
            (torch.arange(len(ids)) < k) & (torch.arange(len(ids)) % 2 == 1), ids, -100
        )
    )


def causal(i, k, ids):
    return dict(labels=torch.where(torch.arange(len(ids)) < k, ids, -100))


def answers(i, k, ids):
    return dict(start_positions=1, end_positions=k - 1)


def far_answers(i, k, ids):
    return dict(start_positions=1, end_positions=k - 1 if i else 30)  # cut off: outside of the text


def numbers(i, k, ids):
    return dict(labels=float(i) / 4)


def several(i, k, ids):
    return dict(labels=(torch.arange(3) <= i % 3).float())


def pictures(n=8):
    return [dict(pixel_values=torch.randn(3, 16, 16), labels=i % 3) for i in range(n)]


def args(folder, **kwargs):
    return TrainingArguments(
        str(folder),
        **{
            **dict(
                per_device_train_batch_size=8,
                max_steps=1,
                logging_steps=1,
                learning_rate=1e-2,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                save_strategy='no',
                dataloader_pin_memory=False,
                max_grad_norm=0.0,
            ),
            **kwargs,
        },
    )


def collated(data):
    return hf.default_data_collator(data)


# the loss, by hand


def by_classes(s, t, x, where=None):
    "Rows of logits, T^2 KL and cross-entropy, both means over the rows that count"
    y = x['labels'].reshape(-1)
    s, t = s.reshape(-1, s.shape[-1]), t.reshape(-1, t.shape[-1])
    on = (y != -100) if where is None else where.reshape(-1)
    kl = (
        T**2
        * (F.softmax(t / T, -1) * (F.log_softmax(t / T, -1) - F.log_softmax(s / T, -1)))
        .sum(-1)[on]
        .mean()
    )
    return (1 - ALPHA) * F.cross_entropy(s, y) + ALPHA * kl


def sequences(s, t, x):
    return by_classes(s.logits, t.logits, x)


def shifted(s, t, x):
    return by_classes(s.logits[:, :-1], t.logits[:, :-1], dict(labels=x['labels'][:, 1:]))


def questions(s, t, x):
    "Start and end, one sample at a time; padded positions are none of the classes of the teacher's part"
    kl = ce = 0.0
    for head in ('start', 'end'):
        a, b, y = s[f'{head}_logits'], t[f'{head}_logits'], x[f'{head}_positions']
        good = [i for i in range(len(y)) if y[i] < a.shape[1]]
        ce += sum(F.cross_entropy(a[i], y[i]) for i in good) / len(good)
        for i in good:
            p, q = [F.log_softmax(o[i][x['attention_mask'][i] > 0] / T, 0) for o in (a, b)]
            kl += T**2 * (q.exp() * (q - p)).sum()
    n = sum((x[f'{h}_positions'] < a.shape[1]).sum() for h in ('start', 'end'))
    return (1 - ALPHA) * ce / 2 + ALPHA * kl / n


def regression(s, t, x):
    return (1 - ALPHA) * F.mse_loss(s.logits[:, 0], x['labels']) + ALPHA * (
        s.logits - t.logits
    ).pow(2).mean()


def several_by_hand(s, t, x):
    "T^2 times both outcomes' KL, mean over labels and samples"
    a, b = s.logits / T, t.logits / T
    kl = F.binary_cross_entropy_with_logits(
        a, b.sigmoid(), reduction='none'
    ) - F.binary_cross_entropy_with_logits(b, b.sigmoid(), reduction='none')
    return (1 - ALPHA) * F.binary_cross_entropy_with_logits(
        s.logits, x['labels']
    ) + ALPHA * T**2 * kl.mean()


def pixels(s, t, x):
    "The task loss on the enlarged logits, the teacher's part on those that the model returns"
    a, b = [F.log_softmax(o.logits / T, 1) for o in (s, t)]
    big = F.interpolate(s.logits, x['labels'].shape[-2:], mode='bilinear', align_corners=False)
    return (1 - ALPHA) * F.cross_entropy(big, x['labels'], ignore_index=255) + ALPHA * T**2 * (
        b.exp() * (b - a)
    ).sum(1).mean()


def sounds(n=8):
    return [
        dict(input_features=torch.randn(4, 16), labels=row['labels'])
        for row in texts(n, label=words)
    ]


def captions(n=8):
    "The first 4 tokens are an image"
    for _ in range(n):
        words = torch.randint(1, VOCAB - 1, (6,))
        ids = torch.cat([torch.full((4,), VOCAB - 1), words])
        labels = torch.cat([torch.full((4,), -100), words])
        yield dict(input_ids=ids, labels=labels, pixel_values=torch.randn(3, 8, 8))


def noises(n=8):
    return [
        dict(input_values=torch.randn(8, 8), labels=several(i, 0, None)['labels']) for i in range(n)
    ]


def masks(n=8):
    return [
        dict(pixel_values=torch.randn(3, 32, 32), labels=torch.randint(3, (32, 32)))
        for _ in range(n)
    ]


TASKS = dict(
    sequences=(bert, lambda: texts(), sequences),
    tokens=(
        lambda **k: bert('TokenClassification', **k),
        lambda **k: texts(label=tokens, **k),
        sequences,
    ),
    questions=(
        lambda **k: bert('QuestionAnswering', num_labels=2, **k),
        lambda: texts(label=answers),
        questions,
    ),
    far_answers=(
        lambda **k: bert('QuestionAnswering', num_labels=2, **k),
        lambda: texts(label=far_answers),
        questions,
    ),
    masked_words=(lambda **k: bert('MaskedLM', **k), lambda: texts(label=words), sequences),
    next_words=(gpt2, lambda: texts(label=causal), shifted),
    translations=(t5, lambda: texts(label=words), sequences),
    summaries=(bart, lambda: texts(label=words), sequences),
    bert_to_bert=(bert_to_bert, lambda: texts(label=words), sequences),
    transcripts=(whisper, sounds, sequences),
    shifted_before=(bart_decoder, lambda: texts(label=words), sequences),
    captions=(llava, captions, shifted),
    images=(vit, pictures, sequences),
    numbers=(
        lambda **k: bert(num_labels=1, **k),
        lambda **k: texts(label=numbers, **k),
        regression,
    ),
    several=(lambda **k: bert(**k), lambda: texts(label=several), several_by_hand),
    several_sounds=(spectrograms, noises, several_by_hand),
    pixels=(segformer, masks, pixels),
)


@pytest.mark.parametrize('task', TASKS)
def test_the_loss_of_each_kind_of_model_is_that_by_hand(task, tmp_path):
    make, data, by_hand = TASKS[task]
    student, teacher, data = loud(make(width=8)), loud(make(width=16)), list(data())
    x = collated(data)
    with torch.no_grad():  # copies, because a model stores the kind of its first labels
        s, t = copy.deepcopy(student).train()(**x), copy.deepcopy(teacher).eval()(**x)
    trainer = DistillationTrainer(
        student, args(tmp_path), train_dataset=data, teacher=teacher, recipe=kd(T=T, alpha=ALPHA)
    )
    trainer.train()
    h, expected = trainer.state.log_history[0], by_hand(s, t, x).item()
    assert (1 - ALPHA) * h['task_loss'] + ALPHA * h['kd_loss'] == pytest.approx(
        expected, rel=1e-5
    ) and abs(expected - s.loss.item()) > 0.01
    if task != 'next_words':
        assert h['loss'] == pytest.approx(expected, rel=1e-5)


def test_a_gradient_ratio_in_question_answering_is_measured_at_the_start_and_end_logits(tmp_path):
    make, data, _ = TASKS['questions']
    student, teacher, data, ratio = loud(make(width=8)), loud(make(width=16)), list(data()), 0.5
    x = collated(data)
    s = student.train()(**x)
    with torch.no_grad():
        t = teacher.eval()(**x)
    at = s.start_logits, s.end_logits
    hide = lambda o: o.masked_fill(x['attention_mask'] == 0, -1e4)

    def kl(rolled):
        pairs = zip(at, (t.start_logits, t.end_logits))
        rows = [(hide(a).log_softmax(1), hide(b).log_softmax(1).roll(rolled, 0)) for a, b in pairs]
        return sum((q.exp() * (q - p)).sum(1).mean() for p, q in rows) / 2

    norm = lambda v: torch.cat(torch.autograd.grad(v, at, retain_graph=True)).norm()
    task, term, far = norm(s.loss), norm(kl(0)), norm(kl(1))
    weight = ratio * task / max(term, 0.7 * far)
    expected = (s.loss + weight * kl(0)) / (1 + ratio)
    recipes = Term(losses.kl, grad_ratio=ratio, T=1), None
    trainers = [
        DistillationTrainer(student, args(tmp_path), train_dataset=data, teacher=teacher, recipe=r)
        for r in recipes
    ]
    for trainer in trainers:
        trainer.train()
    assert trainers[0].state.log_history[0]['loss'] == pytest.approx(expected.item(), rel=1e-5)
    assert trainers[1].distiller.ratios  # of the default recipe


class Answers(nn.Module):
    "Returns the outputs of a model for question answering in a different form"

    def __init__(self, inner, form):
        super().__init__()
        self.inner, self.form = inner, form

    def forward(self, input_ids, attention_mask, end_positions=None, start_positions=None):
        y = dict(start_positions=start_positions, end_positions=end_positions)
        return self.form(self.inner(input_ids, attention_mask, **y))


def test_question_answering_reads_dicts_and_tuples_in_any_order_of_the_labels(tmp_path):
    make, data, _ = TASKS['questions']
    student, teacher, data, logs = loud(make(width=8)), loud(make(width=16)), list(data()), []

    def train(s, t):
        options = dict(train_dataset=data, teacher=t, recipe=kd(T=T, alpha=ALPHA))
        names = ['end_positions', 'start_positions']
        trainer = DistillationTrainer(
            s, args(tmp_path, learning_rate=0.0, label_names=names), **options
        )
        trainer.train()
        h = trainer.state.log_history[0]
        logs.append([h['task_loss'], h['kd_loss']])

    train(student, teacher)
    for form in (dict, lambda out: out.to_tuple()):
        train(Answers(student, form), Answers(teacher, form))
        assert logs[-1] == pytest.approx(logs[0], rel=1e-5)
    with refuses('must return start_logits .* a SequenceClassifierOutput with the keys logits'):
        train(student, bert())


def test_the_loss_is_on_the_scale_that_the_trainer_gives_the_labels(tmp_path):
    "The Trainer divides GPT-2's loss by all labels, the first of each text included, which no model predicts"
    data = list(texts(label=causal))
    make, teacher, logs = TASKS['next_words'][0], loud(gpt2(16)), []
    for cls, more in (
        (Trainer, {}),
        (DistillationTrainer, dict(teacher=teacher, recipe=kd(T=T, alpha=ALPHA))),
    ):
        torch.manual_seed(0)
        trainer = cls(
            loud(make(width=8)),
            args(tmp_path, optim='sgd', learning_rate=0.0),
            train_dataset=data,
            **more,
        )
        trainer.train()
        logs.append(trainer.state.log_history[0])
    plain, h = logs
    x = collated(data)
    with torch.no_grad():
        mean = trainer.model.train()(**x).loss.item()
    assert h['task_loss'] == pytest.approx(mean, rel=1e-5)
    assert h['loss'] == pytest.approx(
        ((1 - ALPHA) * h['task_loss'] + ALPHA * h['kd_loss']) * plain['loss'] / mean, rel=1e-5
    )


# the Trainer's own features


@pytest.mark.parametrize(
    'task', ['sequences', 'tokens', 'questions', 'next_words', 'summaries', 'bert_to_bert']
)
def test_alpha_0_trains_bit_for_bit_as_the_plain_trainer(task, tmp_path):
    make, data, _ = TASKS[task]
    data, teacher, runs = list(data()), make(), []
    ours = dict(teacher=teacher, recipe=kd(alpha=0))
    for cls, more in ((Trainer, {}), (DistillationTrainer, ours)):
        torch.manual_seed(0)
        m, measured = make(width=8), []
        for layer in m.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.1
        options = dict(max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2)
        trainer = cls(
            m,
            args(tmp_path, **options),
            train_dataset=data,
            eval_dataset=data,
            compute_metrics=lambda p, measured=measured: measured.append(p) or {},
            **more,
        )
        trainer.train()
        trainer.evaluate()
        leaves = torch.utils._pytree.tree_leaves([measured[0].predictions, measured[0].label_ids])
        runs.append([*m.state_dict().values(), *map(torch.as_tensor, leaves)])
    assert len(runs[0]) == len(runs[1])
    for expected, got in zip(*runs):
        assert torch.equal(got, expected)


class Drawn:
    "A dataset or a collator that draws from a generator of its own, which it creates at its first use"

    generator = None

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return dict(input_ids=self.drawn(5), labels=i % 3)

    def __call__(self, rows):
        batch = collated(rows)
        return {**batch, 'input_ids': batch['input_ids'] * (self.drawn(9) % 2)}

    def drawn(self, n):
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(0)
        return torch.randint(VOCAB, (n,), generator=self.generator)


@pytest.mark.parametrize('place', ['dataset', 'collator'])
def test_checks_do_not_change_what_a_dataset_or_a_collator_draws(tmp_path, place):
    students, rows = [], list(texts())
    layer = 'bert.encoder.layer.1'
    recipe = kd(alpha=0) + Term(losses.hint, weight=0, layers={layer: layer})
    for cls, more in ((Trainer, {}), (DistillationTrainer, dict(teacher=bert(), recipe=recipe))):
        torch.manual_seed(0)
        m = bert()
        training = args(tmp_path, max_steps=3, per_device_train_batch_size=2)
        data = dict(dataset=(Drawn(), collated), collator=(rows, Drawn()))[place]
        cls(m, training, data_collator=data[1], train_dataset=data[0], **more).train()
        students.append(m.state_dict())
    for k, v in students[0].items():
        assert torch.equal(v, students[1][k]), k


class OnItems(nn.Module):
    "Its loss is divided as the Trainer wants it: by the labels of all batches before a step"

    accepts_loss_kwargs = True

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, labels=None, num_items_in_batch=None, **x):
        logits = self.inner(**x).logits
        if labels is None:
            return dict(logits=logits)
        loss = F.cross_entropy(
            logits.flatten(0, -2),
            labels.flatten(),
            reduction='mean' if num_items_in_batch is None else 'sum',
        )
        return dict(
            loss=loss if num_items_in_batch is None else loss / num_items_in_batch, logits=logits
        )


@pytest.mark.parametrize('task', ['on_items', 'next_words', 'images', 'questions'])
def test_gradient_accumulation_changes_nothing(task, tmp_path):
    make, data, _ = TASKS['tokens' if task == 'on_items' else task]
    data, teacher, ends = list(data()), loud(make(width=16)), []
    for size, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        m = loud(make(width=8))
        if task == 'on_items':
            m = OnItems(m)
        trainer = DistillationTrainer(
            m,
            args(
                tmp_path,
                optim='sgd',
                max_steps=3,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
                remove_unused_columns=False,
            ),
            train_dataset=data,
            teacher=teacher,
            recipe=kd(T=T, alpha=ALPHA),
        )
        trainer.train()
        ends.append((m.state_dict(), [h['loss'] for h in trainer.state.log_history[:3]]))
    (whole, before), (parts, after) = ends
    assert after == pytest.approx(before, rel=1e-5)
    for k, v in whole.items():
        torch.testing.assert_close(parts[k], v, rtol=1e-5, atol=1e-6, msg=k)


def test_a_first_batch_without_labels_does_not_decide_how_the_others_are_scaled(tmp_path):
    "As with masked words, of which a short text may have none"
    data, teacher, ends = list(texts(label=causal)), loud(gpt2(16)), []
    for row in data[:2]:
        row['labels'] = torch.full_like(row['labels'], -100)

    class InOrder(DistillationTrainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    for size, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        trainer = InOrder(
            loud(gpt2(8)),
            args(
                tmp_path,
                optim='sgd',
                max_steps=2,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
            ),
            train_dataset=data,
            teacher=teacher,
            recipe=kd(T=T, alpha=ALPHA),
        )
        trainer.train()
        ends.append(
            (trainer.model.state_dict(), [h['loss'] for h in trainer.state.log_history[:2]])
        )
    (whole, before), (parts, after) = ends
    assert after == pytest.approx(before, rel=1e-5)
    for k, v in whole.items():
        torch.testing.assert_close(parts[k], v, rtol=1e-5, atol=1e-6, msg=k)


@pytest.mark.parametrize('task', ['tokens', 'numbers'])
def test_a_model_that_ignores_the_number_of_items_keeps_the_balance_of_labels_and_teacher(
    task, tmp_path
):
    "The Trainer adds up the losses of such models; the teacher's part grows like the labels'"
    make, data, _ = TASKS[task]
    data, teacher, logs = list(data(n=4)), loud(make(width=16)), []
    data = [o for o in data for _ in range(2)]
    for size, steps in ((8, 1), (4, 2)):
        torch.manual_seed(0)
        trainer = DistillationTrainer(
            loud(make(width=8)),
            args(
                tmp_path,
                optim='sgd',
                learning_rate=0.0,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
            ),
            train_dataset=data,
            teacher=teacher,
            recipe=kd(T=T, alpha=ALPHA),
        )
        trainer.train()
        h = trainer.state.log_history[0]
        logs.append(h['loss'] / ((1 - ALPHA) * h['task_loss'] + ALPHA * h['kd_loss']))
    plain = Trainer(
        loud(make(width=8)),
        args(
            tmp_path,
            learning_rate=0.0,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
        ),
        train_dataset=data,
    )
    plain.train()
    assert logs == pytest.approx([1, 2 if plain.model_accepts_loss_kwargs else 1], rel=1e-4)


def test_the_evaluation_loss_is_the_labels_own_and_metrics_are_the_trainers(tmp_path):
    data, student = list(texts()), bert()

    def accuracy(p):
        return dict(accuracy=float((p.predictions.argmax(-1) == p.label_ids).mean()))

    more = dict(eval_dataset=data, compute_metrics=accuracy)
    got = DistillationTrainer(
        student, args(tmp_path), teacher=bert(), recipe=kd(), **more
    ).evaluate()
    expected = Trainer(student, args(tmp_path), **more).evaluate()
    assert {k: got[k] for k in ('eval_loss', 'eval_accuracy')} == {
        k: expected[k] for k in ('eval_loss', 'eval_accuracy')
    }


def test_the_logs_show_each_part(tmp_path):
    trainer = DistillationTrainer(
        bert(width=8),
        args(tmp_path, max_steps=4, logging_steps=2),
        train_dataset=list(texts()),
        teacher=bert(),
        recipe=kd(T=T, alpha=ALPHA) + at(layers='last', weight=3.0),
    )
    trainer.train()
    first, second, *_ = trainer.state.log_history
    for h in (first, second):
        assert h['loss'] == pytest.approx(
            (1 - ALPHA) * h['task_loss'] + ALPHA * h['kd_loss'] + 3 * h['at_loss'], rel=1e-5
        )
    assert first['kd_loss'] != second['kd_loss']


class InterruptOnce(hf.TrainerCallback):
    done = False

    def on_step_end(self, *_, **kwargs):
        if not self.done:
            self.done = True
            raise KeyboardInterrupt


def test_the_logs_begin_anew_after_an_interrupt(tmp_path):
    trainer = DistillationTrainer(
        bert(width=8),
        args(tmp_path, max_steps=2, logging_steps=2),
        train_dataset=list(texts()),
        teacher=bert(),
        recipe=kd(T=T, alpha=ALPHA),
        callbacks=[InterruptOnce()],
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    h = trainer.state.log_history[0]
    assert h['loss'] == pytest.approx((1 - ALPHA) * h['task_loss'] + ALPHA * h['kd_loss'], rel=1e-5)


class SaveAfter(hf.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == self.step


def saving_trainer(folder, data, teacher, step, **options):
    "A trainer of 6 steps that saves after `step` of them, always with the same student"
    own = {k: options.pop(k) for k in ('recipe', 'check') if k in options}
    torch.manual_seed(0)
    return DistillationTrainer(
        loud(bert(width=8, hidden_dropout_prob=0.1)),
        args(folder, max_steps=6, **options),
        train_dataset=data,
        teacher=teacher,
        callbacks=[SaveAfter(step)],
        **own,
    )


def test_a_resumed_training_ends_like_one_that_was_not_interrupted(tmp_path):
    data, teacher = list(texts()), loud(bert(width=16))
    recipe = kd() + Term(losses.hint, layers='last', grad_ratio=0.2)
    whole, again = (
        saving_trainer(tmp_path / o, data, teacher, 3, recipe=recipe, per_device_train_batch_size=2)
        for o in 'ab'
    )
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / 'a' / 'checkpoint-3'))
    assert again.state.log_history[-2] == whole.state.log_history[-2]
    for a, b in ((whole.model, again.model), (whole.distiller.links, again.distiller.links)):
        assert a.state_dict()
        for (k, v), w in zip(a.state_dict().items(), b.state_dict().values()):
            assert torch.equal(v, w), k
    a, b = [t.distiller.ratios['hint'].factor_at(None) for t in (whole, again)]
    assert a == b


PLANS = dict(
    automatic=(None, 1),
    kd=(kd(), 2),
    layers=(kd() + Term(losses.hint, layers='last', grad_ratio=0.2), 2),
)


@pytest.mark.parametrize('recipe, accumulated', PLANS.values(), ids=PLANS)
@pytest.mark.parametrize('step', [1, 5])
def test_a_training_that_resumes_within_an_epoch_ends_the_same(tmp_path, recipe, accumulated, step):
    data, teacher = list(texts()), loud(bert(width=16))
    teacher.classifier.weight.data *= 20
    options = dict(per_device_train_batch_size=1, gradient_accumulation_steps=accumulated)
    whole, again = (
        saving_trainer(tmp_path / o, data, teacher, step, recipe=recipe, check=False, **options)
        for o in 'ab'
    )
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / 'a' / f'checkpoint-{step}'))
    assert step * accumulated % len(data)  # not at the end of an epoch
    assert again.distiller.get_extra_state().equal(whole.distiller.get_extra_state())
    for a, b in zip(whole.model.parameters(), again.model.parameters()):
        assert torch.equal(a, b)
    for a, b in zip(whole.distiller.own_parameters(), again.distiller.own_parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize('step', [1, 5])
@pytest.mark.parametrize('drawn', ['member', 'dropout'])
def test_a_training_that_resumes_draws_the_teachers_that_come_next(tmp_path, drawn, step):
    data = list(texts())
    if drawn == 'member':
        members = [loud(bert(width=16)) for _ in range(2)]
        teacher = Teacher(members, ensemble=dict(combine='sample'))
    else:
        teacher = Teacher(loud(bert(hidden_dropout_prob=0.5)), run=dict(mode='train'))
    options = dict(recipe=kd(), check=False, per_device_train_batch_size=1)
    whole, again = (saving_trainer(tmp_path / o, data, teacher, step, **options) for o in 'ab')
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / 'a' / f'checkpoint-{step}'))
    for a, b in zip(whole.model.parameters(), again.model.parameters()):
        assert torch.equal(a, b)


class CallsThemTargets(nn.Module):
    "Its labels are called targets, and it computes its own loss"

    def __init__(self, width=8):
        super().__init__()
        self.net = bert(width=width)

    def forward(self, input_ids, attention_mask=None, targets=None):
        logits = self.net(input_ids=input_ids, attention_mask=attention_mask).logits
        loss = None if targets is None else F.cross_entropy(logits, targets)
        return dict(loss=loss, logits=logits)


CHOSEN = {'automatic': None, 'kd': kd(), 'soft labels': soft_labels()}


@pytest.mark.parametrize('recipe', CHOSEN.values(), ids=CHOSEN)
def test_labels_may_have_any_name_that_label_names_says(tmp_path, capsys, recipe):
    data, teacher = list(texts()), loud(bert(width=16))
    renamed = [{('targets' if k == 'labels' else k): v for k, v in o.items()} for o in data]

    def trainer_of(student, data, **options):
        return DistillationTrainer(
            student,
            args(tmp_path, **options),
            train_dataset=data,
            eval_dataset=data,
            teacher=teacher,
            recipe=recipe,
        )

    other = CallsThemTargets()
    student = bert(width=8)
    student.load_state_dict(other.net.state_dict())
    want, got = trainer_of(student, data), trainer_of(other, renamed, label_names=['targets'])
    printed = []
    for t in (want, got):
        t.train()
        printed.append([o for o in capsys.readouterr().out.splitlines() if 'fastdistill' in o])
    assert printed[1] == printed[0]
    assert 'student' in printed[0][0]  # the check knows the labels
    for k in ('loss', 'task_loss'):
        assert got.state.log_history[0][k] == pytest.approx(want.state.log_history[0][k], rel=1e-5)
    assert got.evaluate()['eval_loss'] == pytest.approx(want.evaluate()['eval_loss'], rel=1e-5)
    unnamed = trainer_of(CallsThemTargets(), renamed)
    error = refuses(r'label_names=\[\], but a batch has .*targets.*TrainingArguments.label_names=')
    with nullcontext() if recipe is CHOSEN['soft labels'] else error:  # they need no labels
        unnamed.train()


def test_a_resumed_training_keeps_the_recipe_that_was_chosen(tmp_path):
    "And the gradients that were measured; another first batch would give another temperature"
    data, teacher = list(texts()), loud(bert(width=16))
    teacher.classifier.weight.data *= 20  # sure enough to be softened
    options = dict(check=False, per_device_train_batch_size=2)
    whole, again, reversed_ = (
        saving_trainer(tmp_path / o, items, teacher, 3, **options)
        for o, items in zip('abc', (data, data, data[::-1]))
    )
    whole.train()
    checkpoint = str(tmp_path / 'a' / 'checkpoint-3')
    again.train(resume_from_checkpoint=checkpoint)
    assert whole.distiller.ratios  # a recipe with measured gradients was chosen
    assert again.distiller.head.chosen_text == whole.distiller.head.chosen_text
    assert again.distiller.ratios.state_dict() == whole.distiller.ratios.state_dict()
    for a, b in zip(whole.model.parameters(), again.model.parameters()):
        assert torch.equal(a, b)
    reversed_.create_optimizer()
    assert reversed_.distiller.head.chosen_text != whole.distiller.head.chosen_text
    reversed_.train(resume_from_checkpoint=checkpoint)
    assert reversed_.distiller.head.chosen_text == whole.distiller.head.chosen_text


def test_a_checkpoint_holds_only_the_student_and_projectors_are_trained(tmp_path):
    student = bert(width=8)
    trainer = DistillationTrainer(
        student,
        args(tmp_path, save_strategy='steps', save_steps=1, optim='sgd'),
        train_dataset=list(texts()),
        teacher=bert(width=16),
        recipe=soft_labels() + Term(losses.hint, layers='last', weight=1.0),
    )
    trainer._build()
    before = {k: v.clone() for k, v in trainer.distiller.links.state_dict().items()}
    trainer.train()
    assert before and all(
        not torch.equal(v, before[k]) for k, v in trainer.distiller.links.state_dict().items()
    )
    loaded = hf.BertForSequenceClassification.from_pretrained(tmp_path / 'checkpoint-1')
    for k, v in loaded.state_dict().items():
        assert torch.equal(v, student.state_dict()[k]), k
    assert sorted(loaded.state_dict()) == sorted(bert(width=8).state_dict())
    assert not any(m._forward_hooks for m in student.modules())


def test_a_checkpoint_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    trainer = DistillationTrainer(
        bert(width=8),
        args(tmp_path, save_strategy='steps', save_steps=1, optim='sgd'),
        train_dataset=list(texts()),
        teacher=bert(width=16),
        recipe=soft_labels() + Term(losses.hint, layers='last', weight=1.0),
    )
    trainer.train()
    file = tmp_path / 'checkpoint-1' / 'distillation.pt'
    before, save = file.read_bytes(), torch.save

    def half(state, f, **kwargs):
        if 'distillation.pt' not in str(getattr(f, 'name', f)):
            return save(state, f, **kwargs)
        (f if hasattr(f, 'write') else open(f, 'wb')).write(b'half')
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(torch, 'save', half)
        with pytest.raises(KeyboardInterrupt):
            trainer._save_optimizer_and_scheduler(str(file.parent))
    assert file.read_bytes() == before
    assert not list(file.parent.glob('*.tmp'))
    file.write_bytes(before[:100])
    with pytest.raises(DistillError, match='distillation.pt is damaged .* Resume from an earlier'):
        trainer.train(resume_from_checkpoint=str(file.parent))


def test_each_step_begins_without_the_gradients_of_the_step_before(tmp_path):
    trainer = DistillationTrainer(
        bert(width=8),
        args(tmp_path, learning_rate=0.0, optim='sgd'),
        train_dataset=list(texts()),
        teacher=bert(width=16),
        recipe=soft_labels() + Term(losses.hint, layers='last', weight=1.0),
    )
    grads = []
    for steps in (1, 1, 3):
        trainer.args.max_steps = steps
        trainer.train()
        grads.append([p.grad.clone() for p in trainer.distiller.own_parameters()])
    for one, again, third in zip(*grads):
        torch.testing.assert_close(again, one)
        torch.testing.assert_close(third, one)
    assert not trainer.distiller.teacher.runner.started


def test_a_second_training_forgets_the_norms_of_weights_that_were_replaced(tmp_path):
    recipe = kd() + Term(losses.soft_ce, grad_ratio=0.5)
    data, teacher, student = list(texts()), loud(bert(width=16)), loud(bert(width=8))
    other = {k: v * 0.3 for k, v in student.state_dict().items()}

    def trainer_of(student):
        return DistillationTrainer(
            student,
            args(tmp_path, optim='sgd', lr_scheduler_type='constant', max_steps=3),
            train_dataset=data,
            teacher=teacher,
            recipe=recipe,
            check=False,
        )

    def trained(trainer):
        torch.manual_seed(1)
        trainer.train()
        return trainer.distiller.ratios['soft_ce'].batches

    used = trainer_of(student)
    assert trained(used) == 3
    assert trained(used) == 6  # the same weights: continued
    student.load_state_dict(other)
    fresh = trainer_of(loud(bert(width=8)))
    fresh.model.load_state_dict(other)
    assert trained(used) == trained(fresh) == 3
    for a, b in zip(used.model.parameters(), fresh.model.parameters()):
        assert torch.equal(a, b)


def test_the_teacher_is_a_guest(tmp_path):
    teacher = bert().train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    DistillationTrainer(
        bert(width=8),
        args(tmp_path, max_steps=2),
        train_dataset=list(texts()),
        teacher=teacher,
        recipe=kd(),
    ).train()
    assert teacher.training and all(
        p.requires_grad and p.grad is None for p in teacher.parameters()
    )
    for k, v in teacher.state_dict().items():
        assert torch.equal(v, before[k])


def test_bf16_gives_about_the_same_loss(tmp_path):
    data, losses_ = list(texts()), []
    teacher = loud(bert())
    for on in (False, True):
        torch.manual_seed(0)
        trainer = DistillationTrainer(
            loud(bert(width=8)),
            args(tmp_path, bf16=on),
            train_dataset=data,
            teacher=teacher,
            recipe=kd(T=T),
        )
        trainer.train()
        losses_.append(trainer.state.log_history[0]['loss'])
    assert losses_[0] != losses_[1] == pytest.approx(losses_[0], rel=0.05)


def test_without_a_recipe_it_is_chosen_and_a_schedule_follows_the_steps(tmp_path, capsys):
    data = list(texts())
    trainer = DistillationTrainer(
        bert(width=8), args(tmp_path), train_dataset=data, teacher=loud(bert()), check=False
    )
    trainer.train()
    assert (
        'recipe labels + dist' in capsys.readouterr().out
        and 'dist_loss' in trainer.state.log_history[0]
    )
    seen = []

    class Noted(DistillationTrainer):
        def compute_loss(self, *args, **kwargs):
            out = super().compute_loss(*args, **kwargs)
            seen.append(
                self.distiller.recipe.weights_at(self.state.global_step / self.state.max_steps)[
                    'kd'
                ]
            )
            return out

    Noted(
        bert(width=8),
        args(tmp_path, max_steps=4),
        train_dataset=data,
        teacher=bert(),
        recipe=kd(alpha=('linear', 0.8, 0.0)),
    ).train()
    assert seen == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_without_labels_the_teacher_alone_teaches(tmp_path):
    data = [{k: v for k, v in o.items() if k != 'labels'} for o in texts()]
    student, teacher = loud(bert(width=8)), loud(bert())
    with torch.no_grad():
        a, b = [F.log_softmax(m.eval()(**collated(data)).logits, -1) for m in (student, teacher)]
    trainer = DistillationTrainer(
        student, args(tmp_path), train_dataset=data, teacher=teacher, recipe=soft_labels()
    )
    trainer.train()
    assert trainer.state.log_history[0]['loss'] == pytest.approx(
        (b.exp() * (b - a)).sum(1).mean().item(), rel=1e-5
    )


def test_a_mixin_keeps_the_loss_of_your_own_trainer(tmp_path):
    weights = torch.tensor([1.0, 2.0, 5.0])

    class Weighted(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            y = inputs.pop('labels')
            out = model(**inputs)
            loss = F.cross_entropy(out.logits, y, weights)
            return (loss, out) if return_outputs else loss

    class Mine(DistillationMixin, Weighted):
        "both"

    student, data = loud(bert(width=8)), list(texts())
    with torch.no_grad():
        own = F.cross_entropy(
            student.train()(**collated(data)).logits, collated(data)['labels'], weights
        )
    trainer = Mine(
        student, args(tmp_path), train_dataset=data, teacher=bert(), recipe=kd(alpha=0.5)
    )
    trainer.train()
    assert trainer.state.log_history[0]['task_loss'] == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize('how', ['smoothed', 'function'])
def test_losses_that_the_trainer_computes_itself_are_kept(how, tmp_path):
    data, student = list(texts()), loud(bert(width=8))
    x = collated(data)
    with torch.no_grad():
        logits = student.train()(**x).logits

    def mine(out, labels, num_items_in_batch=None):
        return F.cross_entropy(out.logits, labels, reduction='sum') / num_items_in_batch

    more = dict(compute_loss_func=mine) if how == 'function' else {}
    trainer = DistillationTrainer(
        student,
        args(tmp_path, label_smoothing_factor=0.0 if more else 0.1),
        train_dataset=data,
        teacher=bert(),
        recipe=kd(alpha=0.5),
        **more,
    )
    trainer.train()
    expected = F.cross_entropy(logits, x['labels'], label_smoothing=0.0 if more else 0.1)
    assert trainer.state.log_history[0]['task_loss'] == pytest.approx(expected.item(), rel=1e-5)


# both models


def test_classes_follow_the_students_order(tmp_path):
    names, order, data, ends = ['red', 'green', 'blue'], [2, 0, 1], list(texts()), []
    teacher = loud(bert(id2label=dict(enumerate(names))))
    turned = loud(bert(id2label={i: names[o] for i, o in enumerate(order)}))
    turned.load_state_dict(teacher.state_dict())
    for p, q in zip(turned.classifier.parameters(), teacher.classifier.parameters()):
        p.data = q.data[order]
    for t in (teacher, turned):
        torch.manual_seed(0)
        trainer = DistillationTrainer(
            bert(width=8, id2label=dict(enumerate(names))),
            args(tmp_path),
            train_dataset=data,
            teacher=t,
            recipe=kd(),
        )
        trainer.train()
        ends.append(trainer.state.log_history[0]['kd_loss'])
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)
    other = DistillationTrainer(
        bert(id2label=dict(enumerate(['red', 'green', 'yellow']))),
        args(tmp_path),
        train_dataset=data,
        teacher=teacher,
        recipe=kd(),
    )
    with refuses('classes yellow. Classes that only the teacher has: blue.*select='):
        other.train()
    ensemble = DistillationTrainer(
        bert(id2label=dict(enumerate(names))),
        args(tmp_path),
        train_dataset=data,
        teacher=[teacher, turned],
        recipe=kd(),
    )
    with refuses(re.escape('Teacher(model, select=[1, 2, 0])')):
        ensemble.train()
    given = DistillationTrainer(
        bert(id2label=dict(enumerate('abc'))),
        args(tmp_path),
        train_dataset=data,
        teacher=Teacher(teacher, select=[0, 1, 2]),
        recipe=kd(),
    )
    given.train()


def test_classes_with_the_same_name_are_not_put_into_an_order(tmp_path):
    named = lambda names: bert(id2label=dict(enumerate(names)))
    cranes = ['crane', 'heron', 'crane']  # as in ImageNet: a bird and a machine

    def train(student, teacher):
        options = dict(train_dataset=list(texts()), teacher=teacher, recipe=kd())
        DistillationTrainer(student, args(tmp_path), **options).train()

    train(named(cranes), named(cranes))
    for student, teacher in ((cranes, sorted(cranes)), (cranes, ['heron', 'crane', 'gull'])):
        with refuses(r'Several classes are named crane, .* Teacher\(model, select='):
            train(named(student), named(teacher))
    train(named(cranes), Teacher(named(sorted(cranes)), select=[0, 2, 1]))


def test_a_teacher_gets_the_columns_that_its_student_has_no_argument_for(tmp_path):
    data, student, teacher = list(texts(types=True)), loud(distilbert()), loud(bert())
    x = collated(data)
    with torch.no_grad():
        t = teacher.eval()(**x).logits
        without = teacher(**{k: v for k, v in x.items() if k != 'token_type_ids'}).logits
        s = student.train()(**{k: v for k, v in x.items() if k != 'token_type_ids'}).logits
    trainer = DistillationTrainer(
        student,
        args(tmp_path),
        train_dataset=data,
        eval_dataset=data,
        teacher=teacher,
        recipe=kd(T=T, alpha=ALPHA),
    )
    trainer.train()
    trainer.evaluate()
    assert trainer.state.log_history[0]['loss'] == pytest.approx(
        by_classes(s, t, x).item(), rel=1e-5
    )
    assert abs(by_classes(s, t, x) - by_classes(s, without, x)) > 1e-3


class Wraps(nn.Module):
    "Its `forward` does not name all inputs of the model inside"

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids=None, labels=None, **x):
        if input_ids is not None:
            x['input_ids'] = input_ids
        return self.inner(labels=labels, **x)


def losses_and_evaluation(student, teacher, data, folder):
    "The task loss, the loss of KD and the evaluation loss of models that get all columns"
    trainer = DistillationTrainer(
        student,
        args(folder, learning_rate=0.0, remove_unused_columns=False, label_names=['labels']),
        train_dataset=data,
        eval_dataset=data,
        teacher=teacher,
        recipe=kd(T=T, alpha=ALPHA),
    )
    trainer.train()
    h = trainer.state.log_history[0]
    return [h['task_loss'], h['kd_loss'], trainer.evaluate()['eval_loss']]


def test_a_wrapper_gets_all_columns(tmp_path):
    data, logs = list(texts(types=True)), []
    student, teacher = loud(bert(width=8)), loud(bert(width=16))
    for s, t in ((student, teacher), (Wraps(student), teacher), (student, Wraps(teacher))):
        logs.append(losses_and_evaluation(s, t, data, tmp_path))
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)
    assert logs[2] == pytest.approx(logs[0], rel=1e-5)


def test_predictions_need_no_labels_and_no_columns_of_the_teacher(tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = bert(width=8)

        def forward(self, input_ids, attention_mask):
            return dict(logits=self.inner(input_ids, attention_mask).logits)

    data = [{k: v for k, v in row.items() if k != 'labels'} for row in texts(types=True)]
    student = Plain()
    ours = DistillationTrainer(student, args(tmp_path), teacher=bert(), recipe=kd())
    expected = Trainer(student, args(tmp_path)).predict(data).predictions
    assert (ours.predict(data).predictions == expected).all()


class Adapted(Wraps):
    "With the interface of PEFT's models"

    def __init__(self, inner):
        super().__init__(inner)
        self.config = inner.config

    def get_base_model(self):
        return self.inner


@pytest.mark.parametrize(
    'task', ['sequences', 'numbers', 'several', 'next_words', 'transcripts', 'pixels']
)
def test_a_model_of_peft_is_trained_like_the_model_inside(task, tmp_path):
    make, data, _ = TASKS[task]
    data, teacher, logs = list(data()), loud(make(width=16)), []
    if task == 'sequences':
        data = list(texts(types=True))
    student = loud(make(width=8))
    for model in (copy.deepcopy(student), Adapted(student)):
        logs.append(losses_and_evaluation(model, teacher, data, tmp_path))
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)


STUDENTS = dict(
    bert=(bert, 'bert.encoder.layer', lambda: texts()),
    distilbert=(distilbert, 'distilbert.transformer.layer', lambda: texts()),
    gpt2=(gpt2, 'transformer.h', lambda: texts(label=causal)),
    vit=(vit, None, pictures),
)


@pytest.mark.parametrize('name', STUDENTS)
def test_layers_pair_by_themselves(name, tmp_path):
    make, blocks, data = STUDENTS[name]
    student, teacher = make(width=8, layers=2), make(width=16, layers=4)
    if blocks is None:
        blocks = next(
            k for k, m in student.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 2
        )
    trainer = DistillationTrainer(
        student,
        args(tmp_path),
        train_dataset=list(data()),
        teacher=teacher,
        recipe=kd() + Term(losses.hint, layers='auto', grad_ratio=0.1),
    )
    trainer.train()
    assert [(p.student, p.teacher) for p in trainer.distiller.pairs] == [
        (f'{blocks}.0', f'{blocks}.1'),
        (f'{blocks}.1', f'{blocks}.3'),
    ]
    assert trainer.state.log_history[0]['hint_loss'] > 0


# students


@pytest.mark.parametrize('name', STUDENTS)
def test_a_student_from_its_teacher_computes_what_the_teacher_computes_without_the_other_blocks(
    name, tmp_path
):
    make, blocks, data = STUDENTS[name]
    teacher, x = loud(make(layers=4)).eval(), collated(list(data()))
    student = student_from(teacher, [0, 2, -1])
    assert (
        student.config.num_hidden_layers == 3
        and teacher.config.num_hidden_layers == 4
        and not student.training
    )
    blocks = blocks or next(
        k for k, m in teacher.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 4
    )
    with torch.no_grad():
        got = student(**x).logits
        teacher.get_submodule(blocks)[1] = Passes(teacher.get_submodule(blocks)[1])
        torch.testing.assert_close(got, teacher(**x).logits)
    student.save_pretrained(tmp_path)
    torch.testing.assert_close(type(teacher).from_pretrained(tmp_path)(**x).logits, got)
    assert not {p.data_ptr() for p in student.parameters()} & {
        p.data_ptr() for p in teacher.parameters()
    }


class Passes(nn.Module):
    "A block that does nothing, and returns it in the form of another"

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, *args, **kwargs):
        out = self.block(x, *args, **kwargs)
        return (x, *out[1:]) if isinstance(out, tuple) else x


def test_a_student_of_a_language_model_generates_as_without_a_cache():
    student = student_from(loud(gpt2(layers=4)).eval(), [1, 3])
    ids = torch.randint(1, VOCAB, (2, 4))
    grown = [
        student.generate(ids, max_new_tokens=5, do_sample=False, use_cache=on, pad_token_id=0)
        for on in (True, False)
    ]
    assert torch.equal(*grown)


def test_a_student_that_cannot_be_made_is_refused():
    with refuses(
        'BertForSequenceClassification has 2 blocks in bert.encoder.layer, 0 to 1, but no block 2'
    ):
        student_from(bert(), [0, 2])
    with refuses('needs a model of transformers, not Linear'):
        student_from(nn.Linear(2, 2), [0])
    with refuses('has . lists of num_hidden_layers'):
        student_from(
            hf.T5ForConditionalGeneration(
                hf.T5Config(vocab_size=VOCAB, d_model=8, d_ff=8, d_kv=4, num_layers=2, num_heads=2)
            ),
            [0],
        )


class Shows(nn.Module):
    "Predicts the class that the first token is, in an order of its outputs"

    def __init__(self, order):
        super().__init__()
        self.scale, self.order = nn.Parameter(torch.tensor(9.0)), order

    def forward(self, input_ids):
        return dict(logits=self.scale * F.one_hot(input_ids[:, 0] % 3, 3)[:, self.order].float())


@pytest.mark.parametrize('of_eval', [True, False])
def test_a_teacher_with_its_classes_in_a_different_order_is_refused_before_training(
    of_eval, tmp_path
):
    rows = [
        dict(input_ids=torch.tensor([i % VOCAB, 1, 2]), labels=i % VOCAB % 3) for i in range(64)
    ]

    def train(order, **kwargs):
        args = TrainingArguments(
            str(tmp_path),
            max_steps=2,
            report_to=[],
            use_cpu=True,
            save_strategy='no',
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = DistillationTrainer(
            bert(),
            args,
            train_dataset=rows,
            eval_dataset=rows if of_eval else None,
            teacher=Shows(order),
            recipe='kd(T=2)',
            **kwargs,
        )
        trainer.train()
        return trainer.state.global_step

    with refuses('class 0 and class 1 are swapped'):
        train([1, 0, 2])
    assert train([1, 0, 2], check=False) == 2
    assert train([0, 1, 2]) == 2


def test_objects_in_no_fixed_order_are_not_compared(tmp_path):
    def yolos(width):
        return hf.YolosForObjectDetection(
            hf.YolosConfig(
                hidden_size=width,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=width,
                image_size=[16, 16],
                patch_size=8,
                num_detection_tokens=4,
                num_labels=3,
            )
        )

    target = dict(class_labels=torch.tensor([1]), boxes=torch.full((1, 4), 0.4))
    data = [dict(pixel_values=torch.randn(3, 16, 16), labels=target) for _ in range(2)]

    def collate(rows):
        pixels = torch.stack([row['pixel_values'] for row in rows])
        return dict(pixel_values=pixels, labels=[row['labels'] for row in rows])

    def train(**options):
        options |= dict(train_dataset=data, data_collator=collate, teacher=yolos(16))
        trainer = DistillationTrainer(yolos(8), args(tmp_path), **options)
        trainer.train()
        return trainer.state.log_history[0]

    for recipe in (None, kd()):
        with refuses(r'YolosForObjectDetection predicts objects in no fixed order'):
            train(recipe=recipe)
    assert 'kd_loss' in train(recipe=kd(), output='logits')
    assert 'hint_loss' in train(recipe=Term(losses.hint, layers='last', weight=1.0))


def test_a_check_that_failed_runs_again_in_the_next_training(tmp_path):
    rows = [
        dict(input_ids=torch.tensor([i % VOCAB, 1, 2]), labels=i % VOCAB % 3) for i in range(64)
    ]
    trainer = DistillationTrainer(
        bert(), args(tmp_path), train_dataset=rows, teacher=Shows([1, 0, 2]), recipe=kd()
    )
    for _ in range(2):
        with refuses('class 0 and class 1 are swapped'):
            trainer.train()


def test_training_data_are_checked_if_those_of_the_evaluation_can_only_be_iterated(
    tmp_path, capsys
):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(texts())

    for data, says in (
        (list(texts()), 'accuracy on 8 training items'),
        (Stream(), 'the teacher was not checked'),
    ):
        DistillationTrainer(
            bert(width=8),
            args(tmp_path),
            train_dataset=data,
            eval_dataset=Stream(),
            teacher=bert(),
            recipe=kd(),
        ).train()
        assert says in capsys.readouterr().out


def test_an_untrained_teacher_is_a_warning_and_its_term_can_fade(tmp_path, capsys):
    rows = [dict(input_ids=torch.tensor([i % VOCAB, 1, 2]), labels=i % 3) for i in range(64)]
    args = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy='no',
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )

    class Flat(Shows):
        def forward(self, input_ids):
            return dict(logits=0 * super().forward(input_ids)['logits'])

    trainer = DistillationTrainer(bert(), args, train_dataset=rows, teacher=Flat([0, 1, 2]))
    with pytest.warns(UserWarning, match='no better than chance: .*64 training labels'):
        trainer.train()
    assert all(t.fade for t in trainer.distiller.recipe.terms)
