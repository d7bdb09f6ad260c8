"""Hugging Face's Trainer with a teacher: is this paragraph from the documentation of NumPy, pandas or PyTorch? A small
BERT learns this from 400 paragraphs, alone and with a larger one that has learned from 1,300. The last line compares
the accuracies on unseen paragraphs. With your own models, `from_pretrained` replaces `bert`.

Data: texts. Teacher: a larger BERT. Trainer: Hugging Face.
"""

import inspect, re, sys, tempfile
from collections import Counter
import numpy as np
import pandas as pd
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers import set_seed
from fastdistill.huggingface import DistillationTrainer

LIBRARIES = [np, pd, torch]


def paragraphs(library, n, words=12):
    "The first words of `n` paragraphs of the library's docstrings"
    docs = {
        inspect.getdoc(getattr(library, name)) or ''
        for name in dir(library)
        if not name.startswith('_') and name.lower() != library.__name__
    }
    found = [p for d in sorted(docs) for p in d.split('\n\n') if len(p.split()) > words]
    found = [p for p in found if library.__name__ not in p.lower()]
    return [found[i].split()[:words] for i in np.random.default_rng(0).permutation(len(found))[:n]]


def dataset(n_valid, n_many):
    "Numbers of words, made from the training texts, and the library: validation, training"
    rows = [(p, i) for i, lib in enumerate(LIBRARIES) for p in paragraphs(lib, 600)]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[: n_valid + n_many]]
    texts = [[re.sub(r'\W', '', w).lower() for w in words] for words, _ in rows]
    count = Counter(w for words in texts[n_valid:] for w in words)
    number = {w: i + 2 for i, (w, _) in enumerate(count.most_common(2000))}  # 0: padding, 1: rare
    items = [
        dict(input_ids=torch.tensor([number.get(w, 1) for w in words]), labels=label)
        for words, (_, label) in zip(texts, rows)
    ]
    return items[:n_valid], items[n_valid:]


def bert(width, layers):
    config = BertConfig(
        vocab_size=2002,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        num_labels=len(LIBRARIES),
    )
    return BertForSequenceClassification(config)


def main(quick=False, seed=42):
    n_many, n_few, n_valid = (200, 100, 50) if quick else (1300, 400, 500)
    valid, many = dataset(n_valid, n_many)
    right = lambda p: dict(accuracy=(p.predictions.argmax(1) == p.label_ids).mean())

    def trained(width, layers, items, **teaching):
        set_seed(seed)  # the students start from the same weights
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder,
                num_train_epochs=1 if quick else 10,
                per_device_train_batch_size=32,
                learning_rate=1e-3,
                save_strategy='no',
                report_to=[],
                use_cpu=True,
                dataloader_pin_memory=False,
                disable_tqdm=True,
            )
            kind = DistillationTrainer if teaching else Trainer
            trainer = kind(bert(width, layers), args, train_dataset=items, eval_dataset=valid,
                           compute_metrics=right, **teaching)  # fmt: skip
            trainer.train()
            return trainer.model, trainer.evaluate()['eval_accuracy']

    teacher, t = trained(64, 2, many)
    alone, a = trained(16, 1, many[:n_few])
    student, s = trained(16, 1, many[:n_few], teacher=teacher)
    print(f'accuracy: teacher {t:.3f}, student alone {a:.3f}, student distilled {s:.3f}')


if __name__ == '__main__':
    main('--quick' in sys.argv)
