"Build students from the layers of a teacher."

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..base.outputs import DistillError
from ..features.model_call import is_hf


def student_from(teacher: Any, layers: Sequence[int]) -> nn.Module:
    """Build a smaller copy of the teacher from some of its blocks (DistilBERT, arXiv:1910.01108).

    The embeddings, the head and the selected blocks are copied with their weights.

    Args:
        teacher: A model of transformers.
        layers: Indices of the teacher's blocks to keep, e.g. [0, 2, 4]. -1 is the last block.
    """
    if not is_hf(teacher):
        raise DistillError(
            f'student_from needs a model of transformers, not {type(teacher).__name__}. For other '
            'models, use copy.deepcopy(teacher) and shorten the list of blocks.'
        )
    name, n = blocks_of(teacher)
    if wrong := [i for i in layers if not -n <= i < n]:
        raise DistillError(
            f'layers={list(layers)}: {type(teacher).__name__} has {n} blocks in {name}, 0 to {n - 1}, '
            f'but no block {wrong[0]}'
        )
    layers = [i % n for i in layers]
    student = type(teacher)(shorter(teacher.config, layers, n)).to(teacher.device, teacher.dtype)
    student.load_state_dict(kept(teacher.state_dict(), name, layers))
    if getattr(teacher, 'generation_config', None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.train(teacher.training)


def blocks_of(model: Any) -> tuple[str, int]:
    """Return the name and the length of the model's list of blocks. Raise a DistillError if there
    is not exactly one list.
    """
    n: Any = getattr(model.config, 'num_hidden_layers', None)
    lists = [k for k, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n]
    outer = [k for k in lists if not any(k.startswith(f'{o}.') for o in lists)]
    if len(outer) == 1:
        return outer[0], n
    raise DistillError(
        f'{type(model).__name__} has {len(outer)} lists of num_hidden_layers={n} blocks '
        f'({", ".join(outer) or "none"}), but student_from needs exactly one. Build the student from '
        'a config.'
    )


def shorter(config: Any, layers: Sequence[int], n: int) -> Any:
    """Return the config of a model that has only these blocks."""
    config = copy.deepcopy(config)
    for k, v in vars(config).items():
        if isinstance(v, list) and len(v) == n and n > 1:
            setattr(config, k, [v[i] for i in layers])
    config.num_hidden_layers = len(layers)
    return config


def kept(state: Mapping[str, Any], name: str, layers: Sequence[int]) -> dict[str, Any]:
    """Return the weights of these blocks under new numbers, and all weights outside the list of
    blocks.
    """
    out = {k: v for k, v in state.items() if not k.startswith(f'{name}.')}
    for new, i in enumerate(layers):
        old = f'{name}.{i}.'
        out |= {
            f'{name}.{new}.{k.removeprefix(old)}': v for k, v in state.items() if k.startswith(old)
        }
    return out
