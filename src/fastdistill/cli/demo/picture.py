"""Draw the picture of the demo, with the score of each student and the test images on which
distillation helps most.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ...evaluation.plot_style import COLORS, GREY, INK, PALE, styled_figure
from .results import ALONE, Results

T = 4.0  # temperature of the teacher's probabilities in the picture


def draw_results(r: Results, task: Any, teacher: Any, students: Any, path: Path) -> None:
    """Save the picture of the results `r`."""
    with styled_figure(11, 5) as fig:
        left, right = fig.subfigures(1, 2, width_ratios=(1.1, 1), wspace=0.04)
        draw_scores(left, r)
        draw_items(right, task, teacher, students)
        fig.savefig(path, dpi=150)


def title(fig: Any, text: str) -> None:
    fig.suptitle(text, x=0.03, ha='left', fontsize=12, fontweight='bold')


def draw_scores(fig: Any, r: Any) -> None:
    """Draw a dot for each student, a line through the dots with the same seed, a bar at each mean,
    and a line at the teacher's score.
    """
    title(fig, f'{r.data}\n{r.params["student"]:,} parameters learn from {r.params["teacher"]:,}')
    ax, ways = fig.subplots(), list(r.scores)
    for seed in zip(*r.scores.values()):
        ax.plot(range(len(ways)), [100 * o for o in seed], color=PALE, lw=1, zorder=1)
    for i, (way, color) in enumerate(zip(ways, COLORS)):
        xs = [100 * o for o in r.scores[way]]
        m = sum(xs) / len(xs)
        ax.scatter([i] * len(xs), xs, s=36, color=color, edgecolor='white', lw=0.8, zorder=3)
        ax.hlines(m, i - 0.2, i + 0.2, color=color, lw=3, zorder=2)
        ax.annotate(
            f'{m:.1f}', (i + 0.23, m), color=color, va='center', fontsize=14, fontweight='bold'
        )
    t = 100 * r.teacher
    ax.axhline(t, color=INK, lw=1.2, ls=(0, (4, 3)), zorder=0)
    ax.annotate(
        f'teacher {t:.1f}',
        (-0.42, t),
        xytext=(0, -5),
        textcoords='offset points',
        va='top',
        fontweight='bold',
    )
    ax.set_xticks(range(len(ways)), ways, fontsize=11)
    ax.set(xlim=(-0.5, len(ways) - 0.3), ylabel='accuracy on the test set, %')
    ax.set_title(
        'each dot is a student; students of a seed are connected; bars are means', loc='left'
    )
    ax.spines[['top', 'right']].set_visible(False)
    ax.tick_params(length=0)


def draw_items(fig: Any, task: Any, teacher: Any, students: Any, n: int = 4) -> None:
    """Draw test images that distilled students classify correctly more often than students trained
    alone. Next to each image, draw the teacher's soft labels.
    """
    title(fig, 'Where teaching helps most\n')
    y, x = task.test[1], task.test[0]
    right = {
        way: torch.stack([s.out.argmax(1) == y for s in ss]).sum(0) for way, ss in students.items()
    }
    gain = sum(v for k, v in right.items() if k != ALONE) - (len(right) - 1) * right[ALONE]
    soft = F.softmax(teacher.out / T, 1)
    # in case of ties, prefer images whose second most likely class has a high teacher probability
    order = (gain + soft.topk(2).values[:, 1]).where(teacher.out.argmax(1) == y, -torch.inf)
    # select one image per class
    best = torch.stack([order.where(y == c, -torch.inf).max(0).indices for c in y.unique()])
    best = best[order[best].topk(min(n, len(best))).indices]
    axs, widest = fig.subplots(n, 3, width_ratios=(1, 1.9, 1.5)), soft[best].max().item()
    heads = '', f'correct, out of {len(students[ALONE])} students', f'teacher, T={T:g}'
    for ax, head in zip(axs[0], heads):
        ax.set_title(head, loc='left')
    for (im, text, bars), i in zip(axs, best.tolist()):
        im.imshow(x[i, 0].numpy(), interpolation='nearest', cmap='gray_r')
        for k, ((way, v), color) in enumerate(zip(right.items(), COLORS)):
            wrong = (
                f' (predicts {predicted_class(students[ALONE], i, task)})' if way == ALONE else ''
            )
            text.text(
                0,
                0.78 - 0.28 * k,
                f'{v[i]}',
                color=color,
                va='center',
                fontsize=12,
                fontweight='bold',
            )
            text.text(0.1, 0.78 - 0.28 * k, way + wrong, color=color, va='center')
        top = soft[i].topk(3)
        bars.barh(range(3), top.values.tolist(), color=[INK, GREY, GREY], height=0.62)
        for k, v in enumerate(top.values.tolist()):
            bars.annotate(
                f'{100 * v:.0f}%',
                (v, k),
                xytext=(4, 0),
                textcoords='offset points',
                va='center',
                color=GREY,
                fontsize=9,
            )
        bars.set_yticks(range(3), [task.classes[c] for c in top.indices])
        bars.set(xlim=(0, 1.25 * widest), xticks=[])
        bars.invert_yaxis()
        for ax in (im, text):
            ax.axis('off')
        bars.spines[:].set_visible(False)
        bars.tick_params(length=0)


def predicted_class(students: Any, i: int, task: Any) -> str:
    """Return the class that most of the `students` predict for item `i`."""
    return task.classes[torch.stack([s.out[i] for s in students]).argmax(1).mode().values]
