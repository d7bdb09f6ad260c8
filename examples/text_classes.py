"""Is this paragraph from the documentation of NumPy, pandas or PyTorch? A small AWD-LSTM learns this from 400
paragraphs, alone and with a larger one that has learned from 1,300. The last line compares the accuracies on unseen
paragraphs.

Data: texts. Teacher: a larger network. Trainer: fastai.
"""

import inspect, sys
from fastai.text.all import *
from fastdistill.fastai import *


def paragraphs(library, n, words=12):
    "The first words of `n` paragraphs of the library's docstrings"
    docs = {
        inspect.getdoc(o) or '' for name, o in vars(library).items() if not name.startswith('_')
    }
    texts = [p.split() for d in docs for p in d.split('\n\n') if '>>>' not in p]
    return random.Random(0).sample(
        sorted({' '.join(t[:words]) for t in texts if len(t) >= words}), n
    )


def data(df, vocab=None):
    return TextDataLoaders.from_df(
        df,
        text_col='text',
        label_col='library',
        valid_col='is_valid',
        text_vocab=vocab,
        bs=32,
        num_workers=0,
    )


def main(quick=False, seed=42):
    set_seed(seed)
    n_many, n_few, n_valid = (200, 100, 50) if quick else (1300, 400, 500)
    rows = [(p, lib.__name__) for lib in (np, pd, torch) for p in paragraphs(lib, 600)]
    df = pd.DataFrame(rows, columns=['text', 'library'])
    df = df.sample(n_valid + n_many, random_state=0)
    df['is_valid'] = np.arange(len(df)) < n_valid
    many = data(df)
    few = data(df[: n_valid + n_few], many.vocab[0])  # the same word numbers

    def learner(dls, size):
        set_seed(seed)  # the students start from the same weights
        config = {**awd_lstm_clas_config, 'emb_sz': size, 'n_hid': 2 * size, 'n_layers': 2}
        return text_classifier_learner(
            dls, AWD_LSTM, config=config, pretrained=False, metrics=accuracy
        )

    epochs = 1 if quick else 10
    teacher = learner(many, 64)
    teacher.fit_one_cycle(epochs, 1e-2)
    alone, student = learner(few, 16), learner(few, 16)
    alone.fit_one_cycle(epochs, 1e-2)
    student.distill(teacher, epochs, 1e-2)

    t, a, s = [l.validate()[1] for l in (teacher, alone, student)]
    print(f'accuracy: teacher {t:.3f}, student alone {a:.3f}, student distilled {s:.3f}')


if __name__ == '__main__':
    main('--quick' in sys.argv)
