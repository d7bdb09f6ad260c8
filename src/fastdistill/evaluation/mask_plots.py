"""Plot predicted masks of several models, and where they differ from the labels and the teacher."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .plot_style import COLORS, GREY, INK, PALE, safe_label, styled_figure

N_COLORS = 20  # number of different colors

# colors of the lower row
RIGHT, WRONG, BOTH_WRONG, BETTER = PALE, COLORS[1], GREY, COLORS[2]


def plot_masks(
    images: Sequence[Any],
    labels: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    classes: Sequence[str],
    teacher: str | None = None,
    ignored: int | None = None,
) -> Any:
    """Plot images with their labels and the masks that each model predicts. Below each mask, show
    which pixels are right and wrong, and for a student, also whether the teacher is right.

    Args:
        images: Images, (N, H, W, 3).
        labels: Labels, (N, H, W).
        predictions: {model name: predicted classes, (N, H, W)}.
        classes: Names of the classes.
        teacher: Name of the teacher in `predictions`.
        ignored: Label of pixels that are not compared. These pixels are white.
    """
    from matplotlib.patches import Patch

    n, (h, w) = len(labels), labels.shape[1:]
    counts = labels != ignored
    maps = {'labels': labels, **predictions}
    shown = sorted({int(c) for m in maps.values() for c in np.unique(m[counts])})
    columns = 1 + len(maps)
    width = 1.6 * columns
    with styled_figure(width, 2 * n * 1.6 * h / w + 0.9) as fig:
        axs = fig.subplots(2 * n, columns, squeeze=False)
        for ax in axs.flat:
            ax.axis('off')
        for i in range(n):
            axs[2 * i, 0].imshow(images[i])
            for ax, m in zip(axs[2 * i, 1:], maps.values()):
                ax.imshow(painted(m[i], counts[i]), interpolation='nearest')
            for ax, (name, m) in zip(axs[2 * i + 1, 2:], predictions.items()):
                other = None if name == teacher or teacher is None else predictions[teacher][i]
                found = painted_errors(m[i], labels[i], counts[i], other)
                ax.imshow(found, interpolation='nearest')
        for ax, name in zip(axs[0], ('image', *maps)):
            ax.set_title(safe_label(name), loc='left')
        of_classes = [(safe_label(classes[c]), color_of_class(c)) for c in shown[:N_COLORS]]
        of_rows = [('right', RIGHT)]
        if teacher is None:
            of_rows.append(('wrong', WRONG))
        else:
            of_rows += [
                (f'wrong, {safe_label(teacher)} right', WRONG),
                (f'{safe_label(teacher)} wrong', BOTH_WRONG),
                (f'right, {safe_label(teacher)} wrong', BETTER),
            ]
        for place, rows in (('left', of_classes), ('right', of_rows)):
            fig.legend(
                [Patch(facecolor=color) for _, color in rows],
                [name for name, _ in rows],
                loc=f'outside lower {place}',
                ncols=-(-len(rows) // 3) if place == 'left' else 2,
                fontsize=8,
                labelcolor=INK,
                title='classes' if place == 'left' else 'below each mask',
                title_fontsize=8,
                alignment='left',
            )
    return fig


def color_of_class(c: int) -> Any:
    from matplotlib import colormaps

    return colormaps['tab20'](c % N_COLORS)[:3]


def painted(mask: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return a mask as an image with a color for each class, (H, W, 3)."""
    out = np.ones((*mask.shape, 3))
    for c in np.unique(mask[counts]):
        out[counts & (mask == c)] = color_of_class(int(c))
    return out


def painted_errors(
    mask: np.ndarray, labels: np.ndarray, counts: np.ndarray, other: np.ndarray | None
) -> np.ndarray:
    """Return an image with a color for right and wrong pixels, (H, W, 3).

    Args:
        mask, labels: Predicted and correct classes, (H, W).
        counts: True for the pixels to compare.
        other: Classes that the teacher predicts. None if `mask` is the teacher's.
    """
    from matplotlib.colors import to_rgb

    right = mask == labels
    if other is None:
        kinds = {RIGHT: right, BOTH_WRONG: ~right}
    else:
        also = other == labels
        kinds = {
            RIGHT: right & also,
            BETTER: right & ~also,
            WRONG: ~right & also,
            BOTH_WRONG: ~right & ~also,
        }
    out = np.ones((*mask.shape, 3))
    for color, where in kinds.items():
        out[counts & where] = to_rgb(color)
    return out
