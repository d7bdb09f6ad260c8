"What a student is worth: accuracy, mean IoU, mean average precision, R2 or bits; and whether its probabilities are right."

import math
import numpy as np
import torch
import torch.nn.functional as F

# the measure by which recipes are compared, in points: more is better
MAIN = dict(classes='accuracy', pixels='miou', tokens='bits', labels='map', numbers='r2')


def ece(p, hit, bins=15):
    "Expected calibration error: mean distance of confidence and accuracy over equally wide bins of confidence"
    at = (p * bins).long().clamp_max(bins - 1)
    n = torch.bincount(at, minlength=bins).double()
    gap = torch.bincount(at, p.double(), bins) - torch.bincount(at, hit.double(), bins)
    return (gap.abs().sum() / n.sum()).item()


def right(output, s, y, void=-100):
    "How sure each prediction is, and whether it is right, both (N,)"
    if output == 'labels':
        p = s.sigmoid()
        return torch.maximum(p, 1 - p).flatten(), ((p > 0.5) == (y > 0.5)).flatten()
    if output != 'classes':
        s, y = rows(output, s, y, void)
    p, top = s.softmax(1).max(1)
    return p, top == y


def rows(output, s, y, void=-100):
    "Logits (N, C) and class numbers (N,) of all pixels (B, C, H, W) or tokens (B, L, C) that count"
    if output == 'pixels':
        s = s.movedim(1, -1)
    s, y = s.reshape(-1, s.shape[-1]), y.reshape(-1)
    return s[y != void], y[y != void]


def of_classes(s, y):
    "Accuracy, NLL and ECE of logits (N, C) and class numbers (N,)"
    p, hit = right('classes', s, y)
    return dict(
        accuracy=hit.double().mean().item(), nll=F.cross_entropy(s, y).item(), ece=ece(p, hit)
    )


def of_pixels(s, y, void=-100):
    "The same over all pixels, and the mean IoU of the classes that occur; s (N, C, H, W), y (N, H, W)"
    c = s.shape[1]
    s, y = rows('pixels', s, y, void)
    m = torch.bincount(c * y + s.argmax(1), minlength=c * c).reshape(c, c).double()
    union = m.sum(0) + m.sum(1) - m.diag()
    return dict(of_classes(s, y), miou=(m.diag() / union)[union > 0].mean().item())


def of_tokens(s, y):
    "The same of logits (N, L, C), and the bits that a token costs"
    r = of_classes(*rows('tokens', s, y))
    return dict(r, bits=r['nll'] / math.log(2), perplexity=math.exp(r['nll']))


def average_precision(score, y):
    "Mean precision at the ranks of the positive items"
    y = y[np.argsort(-score, kind='stable')]
    return float((np.cumsum(y) / np.arange(1, len(y) + 1))[y > 0].mean())


def of_labels(s, y):
    "Mean average precision over labels, micro F1 at .5, NLL and ECE of logits and 0-or-1 labels (N, C)"
    on = s.sigmoid() > 0.5
    ap = [
        average_precision(s[:, c].numpy(), y[:, c].numpy())
        for c in range(y.shape[1])
        if y[:, c].any()
    ]
    f1 = (2 * (on * y).sum() / (on.sum() + y.sum())).item()
    return dict(
        map=float(np.mean(ap)),
        f1=f1,
        nll=F.binary_cross_entropy_with_logits(s, y).item(),
        ece=ece(*right('labels', s, y)),
    )


def of_numbers(s, y):
    "R2 (mean over the outputs) and mean absolute error of (N, D)"
    r2 = 1 - (s - y).pow(2).sum(0) / (y - y.mean(0)).pow(2).sum(0)
    return dict(r2=r2.mean().item(), mae=(s - y).abs().mean().item())


def measure(output, s, y, **options):
    return globals()[f'of_{output}'](s.float(), y, **options)


def score(output, found):
    "The main measure in points; more is better"
    v = 100 * found[MAIN[output]]
    return -v if output == 'tokens' else v
