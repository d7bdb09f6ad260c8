"A detector in Lightning: the same numbers as in a plain loop."

import pytest, torch
import lightning.pytorch as pl
from detectors import batch, detector
from torch.utils.data import DataLoader
from fastdistill.recipes import pkd
from fastdistill.detection import DetectionDistiller, fgd, scored
from fastdistill.lightning import DistillCallback

pytestmark = [
    pytest.mark.filterwarnings(f'ignore:{m}')
    for m in (
        ':lightning.fabric.utilities.warnings.PossibleUserWarning',
        '.*isinstance.treespec, LeafSpec.',
        'The teacher RetinaNet finds',
    )
]


class Module(pl.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def training_step(self, batch, i):
        return sum(self.model(*batch).values())

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), 0.01)


def data():
    images, targets = batch(6, seed=4)
    return list(zip(images, targets))


def collate(rows):
    return tuple(zip(*rows))


@pytest.mark.parametrize('recipe', [lambda: pkd(grad_ratio=0.5), lambda: scored() + fgd()])
def test_lightning_trains_as_a_plain_loop(recipe, tmp_path):
    teacher, models = detector('RetinaNet', width=12, seed=1), []
    torch.manual_seed(0)
    model = detector('SSD').train()
    distiller = DetectionDistiller(model, teacher, recipe())
    opt = torch.optim.SGD(distiller.parameters(), 0.01)
    for rows in DataLoader(data(), 2, collate_fn=collate):
        opt.zero_grad()
        sum(distiller(*rows).values()).backward()
        opt.step()
    models.append(model)
    torch.manual_seed(0)
    module = Module(detector('SSD').train())
    callback = DistillCallback(teacher, recipe(), student='model')
    trainer = pl.Trainer(
        max_epochs=1, callbacks=callback, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator='cpu',
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data(), 2, collate_fn=collate))
    models.append(module.model)
    assert any(k.endswith('_loss') and 'task' not in k for k in trainer.callback_metrics)
    for a, b in zip(*(m.state_dict().values() for m in models)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
