"The validation loss of a detector."

import pytest, torch
from detectors import KINDS, batch, detector
from fastdistill.detection import validation_losses


@pytest.mark.parametrize('kind', KINDS)
def test_the_validation_loss_is_torchvisions_with_layers_in_evaluation_mode(kind):
    model = detector(kind).train()
    images, targets = batch()
    found = validation_losses(model, images, targets)
    # the same, made by hand: batch norms use their running statistics
    fresh = detector(kind).train()
    for m in fresh.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.eval()
    torch.manual_seed(0)
    want = fresh(images, targets)
    assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in want.items()}
    assert not any(v.requires_grad for v in found.values())


def test_it_changes_nothing_and_repeats():
    model = detector('FasterRCNN').train()
    model.backbone.eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = [validation_losses(model, *batch()) for _ in range(2)]
    assert [v.item() for v in first.values()] == [v.item() for v in second.values()]
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
