"""Print messages during a fit."""

from fastai.basics import noop

from ..base.distributed import rank
from ..checks.explain import LITTLE_LEFT
from ..recipes.gradient_shares import shares_in_words


class FitLog:
    """Prints messages during the fits of a callback.

    Only the first process prints. Nothing is printed inside `learn.no_logging()`.
    """

    def __init__(self, callback):
        self.callback = callback
        self.reported = None  # gradient norms that were already printed
        self.faded = set()  # terms for which a faded gradient ratio was already printed

    @property
    def is_on(self) -> bool:
        return self.callback.learn.logger is not noop and rank() == 0

    def __call__(self, text):
        if not self.is_on:
            return
        # The terminal progress bar of fastai is on the current line. Clear this line. The bar is
        # redrawn below the message.
        progress = getattr(self.callback.learn, 'progress', None)
        bar = getattr(progress, 'pbar', None) if hasattr(progress, 'mbar') else None
        width = getattr(bar, 'max_len', 0)
        print((f'\r{" " * width}\r' if width else '') + str(text))

    def forget(self):
        """Forget which messages were already printed. Called for a new Distiller."""
        self.reported, self.faded = None, set()

    def report_shares(self, distiller, progress):
        """Print gradient norms at the first training batch, and when another term becomes active.

        Args:
            distiller: The `Distiller`.
            progress: Fraction of the training that is done, from 0 to 1.
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
        """Print a message, once per term, if less than a tenth of the term's gradient ratio is left.

        Args:
            distiller: The `Distiller`, after an epoch of training.
        """
        if not self.is_on:
            return
        low = {k: v for k, v in distiller.faded.items() if v < LITTLE_LEFT and k not in self.faded}
        self.faded |= low.keys()
        for k, v in low.items():
            self(
                "fastdistill: the teacher adds little to the student's predictions on training "
                f'batches, so the gradient ratio of {printed_name(k)} was reduced to {v:.0%}, in '
                'favor of the labels'
            )


def printed_name(part: str) -> str:
    """Return the name to print, such as 'color labels' for 'color.task' or 'color_kd' for
    'color.kd'.
    """
    head, dot, name = part.rpartition('.')
    if not dot:
        return part
    return f'{head} labels' if name == 'task' else f'{head}_{name}'
