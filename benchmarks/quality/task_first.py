"""First tries: 46 to 150 steps, a teacher that was trained as briefly, at the rate that fastai's `lr_find` suggests. Nothing was tuned.

python benchmarks/quality/task_first.py      # what `lr_find` suggests, for each teacher and each student"""

from functools import cache, partial
import task_dense, task_digits, task_imagenette, task_table, task_text, torch
import torch.nn.functional as F
from torch import nn
from loop import labels_loss, predict
from task_cifar import nets
from tasks import Cell, Data, Fast, Split, fit, kept

# cell -> the rates that `lr_find` suggests for its teacher and for its student
RATES = dict(
    first_photos=(0.00069, 0.00048),
    first_two_digits=(0.00033, 0.011),
    first_questions=(0.0044, 0.048),
    first_intents=(0.0076, 0.033),
    first_income=(0.0017, 0.0076),
    first_ages=(0.003, 0.013),
    first_streets=(0.0021, 0.0044),
    first_emotions=(0.003, 0.0052),
)


def photos():
    "1,000 photographs of ten kinds, 64 px, to train on"
    (x, y), (vx, vy) = task_imagenette.read('train'), task_imagenette.read('val')
    small = lambda x: F.interpolate(x.float(), size=(64, 64), mode='area').byte()
    parts = (x[:1000], y[:1000]), (x[1000:2000], y[1000:2000]), (vx[:2000], vy[:2000])
    return [(small(x), y) for x, y in parts]


def residual(depth, width):
    "A ResNet whose first layer has stride 2"
    stem = nn.Conv2d(3, 3, 3, 2, 1, bias=False)
    return task_imagenette.Photos(Fast(nn.Sequential(stem, nets().CifarResNet(depth, width=width))))


def wide(data):
    "A network that is as wide as the teachers of tables"
    return nn.Sequential(
        nn.Linear(data.extra['n_in'], 256),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(256, data.extra['n_out']),
    )


def photo_data():
    splits = kept('photos_64', lambda: dict(splits=photos()))['splits']
    return Data(*(Split(x, y, y) for x, y in splits))


# cell -> (kind of outputs, data, teacher, student, steps, batch)
TASKS = dict(
    first_photos=(
        'classes',
        photo_data,
        lambda d: residual(20, 32),
        lambda d: residual(8, 16),
        94,
        32,
    ),
    first_two_digits=(
        'classes',
        partial(task_digits.data, 'digits100'),
        lambda d: task_digits.Net(48, 96, 160, 100, d.extra['size']),
        task_digits.student,
        94,
        64,
    ),
    first_questions=(
        'classes',
        partial(task_text.data, 'trec'),
        lambda d: task_text.Bag(d.extra['n_words'], 128, d.extra['n_out'], 0.5),
        task_text.student(12),
        80,
        64,
    ),
    first_intents=(
        'classes',
        partial(task_text.data, 'banking77'),
        lambda d: task_text.Bag(d.extra['n_words'], 128, d.extra['n_out'], 0.5),
        task_text.student(12),
        150,
        64,
    ),
    first_income=(
        'classes',
        partial(task_table.data, 'income', 5000),
        wide,
        task_table.student,
        79,
        64,
    ),
    first_ages=('numbers', partial(task_table.data, 'age', 5000), wide, task_table.student, 79, 64),
    first_streets=(
        'pixels',
        partial(task_dense.data, 'camvid'),
        lambda d: Fast(task_dense.UNet(3, 16, task_dense.VOID)),
        task_dense.student(6),
        46,
        8,
    ),
    first_emotions=(
        'labels',
        partial(task_text.data, 'goemotions'),
        lambda d: task_text.Bag(d.extra['n_words'], 128, d.extra['n_out'], 0.5),
        task_text.student(12),
        150,
        64,
    ),
)
DATA_SETS = dict(
    first_photos='imagenette',
    first_two_digits='digits',
    first_questions='trec',
    first_intents='banking77',
    first_income='adult census',
    first_ages='adult census',
    first_streets='camvid',
    first_emotions='goemotions',
)


def inputs(name):
    "The data without missing numbers, which networks don't take"
    d = TASKS[name][1]()
    for s in (d.train, d.valid, d.test):
        if s.x.is_floating_point():
            s.x = s.x.nan_to_num()
    return d


def make(name):
    _, _, net, _, steps, bs = TASKS[name]
    d = inputs(name)
    torch.manual_seed(0)
    teacher = fit(
        net(d), d.train.x, d.train.y, steps, RATES[name][0], bs=bs, loss=labels_loss(cell(name))
    )
    splits = [(s.x, s.y, predict(teacher, s.x)) for s in (d.train, d.valid, d.test)]
    if TASKS[name][0] == 'pixels':
        splits = [(x, y, t.half()) for x, y, t in splits]
    return dict(splits=splits, extra=d.extra)


@cache
def data(name):
    d = kept(name, partial(make, name))
    return Data(*(Split(*s) for s in d['splits']), extra=d['extra'])


def cell(name):
    output, _, _, student, steps, bs = TASKS[name]
    return Cell(
        name,
        name,
        output,
        partial(data, name),
        student,
        steps,
        bs=bs,
        rates=RATES[name][1:],
        void=task_dense.VOID if output == 'pixels' else -100,
        source=DATA_SETS[name],
        first_try=True,
    )


CELLS = [cell(n) for n in TASKS]


def suggested(name, net):
    "What fastai's `lr_find` suggests to train this network on the labels"
    from fastai.learner import Learner
    from fastai.data.core import DataLoaders
    from fastai.optimizer import OptimWrapper

    d = inputs(name)
    torch.manual_seed(0)
    rows = torch.utils.data.TensorDataset(d.train.x, d.train.y)
    loader = torch.utils.data.DataLoader(rows, TASKS[name][5], shuffle=True, drop_last=True)
    learn = Learner(
        DataLoaders(loader, loader),
        net(d),
        loss_func=labels_loss(cell(name)),
        opt_func=partial(OptimWrapper, opt=partial(torch.optim.AdamW, weight_decay=0.01)),
    )
    with learn.no_bar(), learn.no_logging():
        return float(f'{learn.lr_find(show_plot=False).valley:.2g}')


if __name__ == '__main__':
    torch.set_num_threads(1)
    for name, task in TASKS.items():
        print(
            f'    {name}=({suggested(name, task[2]):g}, {suggested(name, task[3]):g}),', flush=True
        )
