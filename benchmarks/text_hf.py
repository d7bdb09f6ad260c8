"""Text classes with Hugging Face's `Trainer`, in the form of its GLUE script: a BERT from scratch with a word-level tokenizer as the
teacher, and a small BERT alone, distilled, and made of its teacher's layers. Prints the test accuracy of each run and the means, and
writes OUT/TASK.json.

    python benchmarks/text_hf.py --data ../shared/data/text --task trec --out benchmarks/results/text_hf"""

import argparse, csv, gzip, json, tempfile, time
from pathlib import Path
from statistics import mean, stdev
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers import DataCollatorWithPadding, set_seed
from fastdistill import kd
from fastdistill.huggingface import DistillationTrainer, student_from

TASKS = dict(sst2=('label', 'train', 'dev', 'test'), trec=('coarse', 'train', None, 'test'))


def read(folder, task):
    "(texts, class numbers) of training and test set, and the names of the classes"
    column, *parts = TASKS[task]
    parts = [p for p in parts if p != 'dev' and p]
    rows = [list(csv.DictReader(gzip.open(folder / task / f'{p}.csv.gz', 'rt'))) for p in parts]
    names = sorted({r[column] for r in rows[0]})
    return [
        ([r['text'].lower() for r in part], [names.index(r[column]) for r in part]) for part in rows
    ], names


def tokenizer_of(texts, size=8000):
    t = Tokenizer(models.WordLevel(unk_token='[UNK]'))
    t.normalizer, t.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    t.train_from_iterator(
        texts,
        trainers.WordLevelTrainer(
            vocab_size=size,
            min_frequency=2,
            special_tokens=['[PAD]', '[UNK]', '[CLS]', '[SEP]'],
            show_progress=False,
        ),
    )
    t.post_processor = processors.TemplateProcessing(
        single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=t,
        pad_token='[PAD]',
        unk_token='[UNK]',
        cls_token='[CLS]',
        sep_token='[SEP]',
    )


def bert(tokenizer, names, width, layers):
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=4 * width,
            max_position_embeddings=64,
            id2label=dict(enumerate(names)),
            label2id={n: i for i, n in enumerate(names)},
        )
    )


def accuracy(p):
    return dict(accuracy=float((p.predictions.argmax(-1) == p.label_ids).mean()))


def main():
    p = argparse.ArgumentParser()
    p.add_argument('--data', type=Path, required=True)
    p.add_argument('--task', choices=TASKS, default='trec')
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--epochs', type=int, default=4)
    p.add_argument('--out', type=Path, default=Path('benchmarks/results/text_hf'))
    a, rows = p.parse_args(), []
    a.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    (train, test), names = read(a.data, a.task)
    tokenizer = tokenizer_of(train[0])
    sets = [
        [
            {
                **tokenizer(t, truncation=True, max_length=64, return_token_type_ids=False),
                'labels': y,
            }
            for t, y in zip(*part)
        ]
        for part in (train, test)
    ]

    def fit(name, model, seed, **kwargs):
        cls = DistillationTrainer if kwargs else Trainer
        args = TrainingArguments(
            tempfile.gettempdir(),
            per_device_train_batch_size=32,
            per_device_eval_batch_size=128,
            num_train_epochs=a.epochs,
            learning_rate=1e-3,
            lr_scheduler_type='cosine',
            warmup_steps=100,
            weight_decay=0.01,
            seed=seed,
            report_to=[],
            disable_tqdm=True,
            save_strategy='no',
            logging_strategy='epoch',
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer, start = (
            cls(
                model,
                args,
                train_dataset=sets[0],
                eval_dataset=sets[1],
                data_collator=DataCollatorWithPadding(tokenizer),
                compute_metrics=accuracy,
                **kwargs,
            ),
            time.time(),
        )
        trainer.train()
        score = trainer.evaluate()['eval_accuracy']
        rows.append(
            dict(
                run=name,
                seed=seed,
                accuracy=round(score, 4),
                parameters=model.num_parameters(),
                seconds=round(time.time() - start),
                epochs=a.epochs,
            )
        )
        print(json.dumps(rows[-1]), flush=True)
        (a.out / f'{a.task}.json').write_text(json.dumps(rows, indent=1))
        return model

    for seed in range(a.seeds):

        def small(seed=seed):
            set_seed(seed)
            return bert(tokenizer, names, 32, 1)

        set_seed(seed)
        teacher = fit('teacher', bert(tokenizer, names, 96, 2), seed)
        fit('alone', small(), seed)
        fit('kd(T=2, alpha=.7)', small(), seed, teacher=teacher, recipe=kd(T=2, alpha=0.7))
        fit('automatic recipe', small(), seed, teacher=teacher)
        fit(
            'first layer, kd(T=2, alpha=.7)',
            student_from(teacher, [0]),
            seed,
            teacher=teacher,
            recipe=kd(T=2, alpha=0.7),
        )
        fit('first layer, alone', student_from(teacher, [0]), seed)
    for name in dict.fromkeys(r['run'] for r in rows):
        scores = [r['accuracy'] for r in rows if r['run'] == name]
        print(f'{name}: {mean(scores):.3f}, std {stdev(scores) if len(scores) > 1 else 0:.3f}')


if __name__ == '__main__':
    main()
