"Draw the detections of several models side by side."

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..evaluation.plot_style import COLORS, safe_label, styled_figure
from .metrics import detect


def show_detections(
    models: dict,
    images: Sequence[Tensor],
    targets: Sequence[dict] | None = None,
    *,
    classes: list | None = None,
    score: float = 0.5,
) -> Any:
    """Draw the detections of several models side by side, with one row per image, and return the
    figure.

    Args:
        models: {name: detector}.
        images: Tensors (C, H, W) with values from 0 to 1.
        targets: One dict per image, with 'boxes' and 'labels'. The labeled boxes are drawn in the
            first column. None to omit this column.
        classes: Names of the classes, starting with class 1. None to use the class indices.
        score: Minimum score of detections to draw.
    """
    columns = {} if targets is None else {'labels': targets}
    columns |= {k: detect(m, images) for k, m in models.items()}
    with styled_figure(2.6 * len(columns), 2.2 * len(images)) as fig:
        axes = fig.subplots(len(images), len(columns), squeeze=False)
        for row, x in zip(axes, images):
            for ax in row:
                ax.imshow(x.detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy())
                ax.set_axis_off()
        for i, (name, found) in enumerate(columns.items()):
            axes[0, i].set_title(safe_label(name))
            for ax, o in zip(axes[:, i], found):
                draw_boxes(ax, o, classes, score)
    return fig


def draw_boxes(ax: Any, found: dict, classes: Sequence | None, score: float) -> None:
    from matplotlib.patches import Rectangle

    boxes, labels = found['boxes'].tolist(), found['labels'].tolist()
    scores = found['scores'].tolist() if 'scores' in found else [None] * len(boxes)
    for (x1, y1, x2, y2), c, s in zip(boxes, labels, scores):
        if s is not None and s < score:
            continue
        color = COLORS[c % len(COLORS)]
        ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=color, linewidth=1.2))
        name = str(c) if classes is None else classes[c - 1]
        text = name if s is None else f'{name} {s:.2f}'
        ax.text(x1, y1 - 1, safe_label(text), color=color, fontsize=6)
