"""Make perturbed copies of the rows of a table, for unlabeled training samples."""

import torch

from ..base.outputs import DistillError

# fraction of a perturbed row's cells that are taken from other rows, as in AutoGluon's distillation
SWAPPED = 0.1


def perturbed_rows(x, n: int) -> tuple:
    """Return n copies of each row, in which 10% of the cells come from other rows of the batch.

    As a result, each column contains only values that occur in the data. AutoGluon also swaps cells
    in this way. Fakoor et al. (NeurIPS 2020, arXiv:2006.14284) compare several methods.

    Args:
        x: Inputs of a batch of a table, as tensors of shape (B, columns).
        n: Number of copies of each row.

    Returns:
        The perturbed inputs as tensors of shape (n * B, columns).
    """
    if not all(isinstance(o, torch.Tensor) and o.dim() == 2 for o in x):
        shapes = ', '.join(str(tuple(getattr(o, 'shape', ()))) for o in x)
        raise DistillError(
            f'perturbed in unlabeled= is for tables, with rows of numbers as inputs. Here they have shape {shapes}.'
        )

    def swap(o):
        rows = o.repeat(n, 1)
        other = o.gather(0, torch.randint(len(o), rows.shape, device=o.device))
        return other.where(torch.rand(rows.shape, device=o.device) < SWAPPED, rows)

    return tuple(map(swap, x))
