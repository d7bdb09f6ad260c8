"""Lightning: your own module stays as it is, and a callback adds the teacher's part of the loss. A small network learns
two-digit numbers, alone and with a larger one as its teacher. The last line compares the accuracies on digits by
different writers.

Data: images. Teacher: a larger network. Trainer: Lightning.
"""

import logging, sys, warnings
import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from fastdistill.lightning import DistillCallback

warnings.filterwarnings('ignore', module='lightning')  # about few workers, and PyTorch's trees
logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)


def numbers(n, first, last):
    "Pictures of two of the digits from `first` to `last` side by side, and the numbers from 0 to 99 that they make"
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    i, j = torch.randint(first, last, (2, n), generator=torch.Generator().manual_seed(0))
    return torch.cat([x[i], x[j]], 2)[:, None], 10 * y[i] + y[j]


class Numbers(L.LightningModule):
    def __init__(self, widths, lr, steps):
        super().__init__()
        conv = lambda i, o: nn.Sequential(
            nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()
        )
        head = nn.Flatten(), nn.Linear(2 * widths[-1], 100)
        self.model = nn.Sequential(*map(conv, (1, *widths), widths), *head)
        self.lr, self.steps = lr, steps

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def configure_optimizers(self):
        opt = torch.optim.AdamW(self.parameters(), self.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, self.lr, self.steps)
        return [opt], [dict(scheduler=schedule, interval='step')]


def main(quick=False, seed=42):
    data = TensorDataset(*numbers(200 if quick else 600, 0, 1200))
    epochs = 1 if quick else 20

    def trained(widths, lr, teacher=None):
        L.seed_everything(seed, verbose=False)  # the students start from the same weights
        loader = DataLoader(data, batch_size=50, shuffle=True)
        module = Numbers(widths, lr, epochs * len(loader))
        callbacks = [DistillCallback(teacher, student='model')] if teacher else []
        trainer = L.Trainer(
            max_epochs=epochs,
            callbacks=callbacks,
            accelerator='cpu',
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader)
        return module.model

    @torch.no_grad()
    def accuracy(model):
        x, y = numbers(1000, 1200, 1797)
        return (model.eval()(x).argmax(1) == y).float().mean().item()

    teacher = trained((64, 128, 256), 5e-3)
    alone, student = trained((8, 16, 32), 1e-2), trained((8, 16, 32), 1e-2, teacher)
    t, a, s = [accuracy(m) for m in (teacher, alone, student)]
    print(f'accuracy: teacher {t:.3f}, student alone {a:.3f}, student distilled {s:.3f}')


if __name__ == '__main__':
    main('--quick' in sys.argv)
