"What a fit prints."

from fastai.basics import noop

from ..base.distributed import rank
from ..recipes.gradient_norms import shares_in_words

__all__ = ['FitLog']


class FitLog:
    """Prints during the fits of a callback: not inside `learn.no_logging()`, and on the first rank
    alone.
    """

    def __init__(self, callback):
        self.callback = callback
        self.reported = None  # shares of the gradient that were printed
        self.faded = set()  # terms whose fading was printed

    @property
    def is_on(self) -> bool:
        return self.callback.learn.logger is not noop and rank() == 0

    def __call__(self, text):
        if not self.is_on:
            return
        # fastai's bar in a terminal stands in the current line: it is wiped, and draws itself again below the text
        progress = getattr(self.callback.learn, 'progress', None)
        bar = getattr(progress, 'pbar', None) if hasattr(progress, 'mbar') else None
        width = getattr(bar, 'max_len', 0)
        print((f'\r{" " * width}\r' if width else '') + str(text))

    def forget(self):
        """Begin anew, with a new Distiller."""
        self.reported, self.faded = None, set()

    def report_shares(self, distiller, progress):
        """Print what was measured at the first training batch, and where a part counts for the
        first time.

        Args:
            progress: Of the training.
        """
        before, shares = self.reported, distiller.gradient_shares
        self.reported = shares
        if not shares or shares == before:
            return
        new = [printed_name(k) for k in shares if k not in before] if before else []
        terms = distiller.recipe.terms
        at_layers = {
            printed_name(t.name): t.weight_at(progress)
            for t in terms
            if t.layers is not None and t.has_grad_ratio
        }
        text = shares_in_words({printed_name(k): v for k, v in shares.items()}, at_layers)
        which = f' with {" and ".join(new)}' if before else ''
        self(f'fastdistill: gradient norms at the first batch{which}: {text}')

    def report_faded(self, distiller):
        """Print once of each term that less than half of its gradient ratio is left.

        Args:
            distiller: After an epoch of training.
        """
        if not self.is_on:
            return
        low = {k: v for k, v in distiller.faded.items() if v < 0.5 and k not in self.faded}
        self.faded |= low.keys()
        for k, v in low.items():
            self(
                f"fastdistill: the teacher adds little to the student's predictions on training "
                f'batches, so {v:.0%} of the gradient ratio of {printed_name(k)} is left. The labels '
                'get the rest'
            )


def printed_name(part: str) -> str:
    """'color labels' and 'color_kd' for the parts 'color.task' and 'color.kd' of a head."""
    head, dot, name = part.rpartition('.')
    if not dot:
        return part
    return f'{head} labels' if name == 'task' else f'{head}_{name}'
