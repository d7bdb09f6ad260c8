"""A small AWD-LSTM learns to write like Python's reference manual, alone and with a larger one as its teacher. The
last line compares perplexities on unseen chapters (lower is better).

Data: texts. Teacher: a larger network. Trainer: fastai.
"""

import sys
from pydoc_data.topics import topics  # the manual's text, which comes with Python
from fastai.text.all import *
from fastdistill.fastai import *


def data(n):
    df = pd.DataFrame(dict(text=[topics[k] for k in sorted(topics)])).sample(n, random_state=0)
    df['is_valid'] = np.arange(n) >= 0.8 * n
    return TextDataLoaders.from_df(
        df, text_col='text', valid_col='is_valid', is_lm=True, seq_len=32, bs=32, num_workers=0
    )


def main(quick=False, seed=42):
    set_seed(seed)
    dls = data(8 if quick else 40)
    epochs = 1 if quick else 4

    def learner(size):
        set_seed(seed)  # the students start from the same weights
        config = {**awd_lstm_lm_config, 'emb_sz': size, 'n_hid': 2 * size, 'n_layers': 2}
        return language_model_learner(
            dls, AWD_LSTM, config=config, pretrained=False, drop_mult=0.3, metrics=Perplexity()
        )

    teacher = learner(128)
    teacher.fit_one_cycle(epochs, 1e-2)
    alone, student = learner(24), learner(24)
    alone.fit_one_cycle(epochs, 1e-2)
    student.distill(teacher, epochs, 1e-2, T=1, alpha=0.5)

    t, a, s = [l.validate()[1] for l in (teacher, alone, student)]
    print(f'perplexity: teacher {t:.1f}, student alone {a:.1f}, student distilled {s:.1f}')


if __name__ == '__main__':
    main('--quick' in sys.argv)
