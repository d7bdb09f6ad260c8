"""The protocol of whatever has a teacher's outputs for batches."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from .batch_samples import BatchSamples
from .outputs import Outputs

__all__ = ['OutputSource']


@runtime_checkable
class OutputSource(Protocol):
    """Teacher outputs for batches, from a model, a cache or the batch itself.

    Attributes:
        name: In messages.
        needs: What the samples of a batch must bring: 'items', 'rows' or 'target'. Empty if the
            inputs are enough.
    """

    name: str
    needs: str

    def start(self) -> None:
        """Prepare for many batches. A second call changes nothing."""

    def outputs(
        self, inputs: Sequence = (), samples: BatchSamples | None = None, layers: Sequence[str] = ()
    ) -> Outputs:
        """Return the teacher's outputs for a batch.

        Args:
            inputs: Inputs of the batch.
            samples: Its samples. None if they are unknown.
            layers: Names of layers that are read too.
        """

    def has_outputs(self, samples: BatchSamples | None) -> bool:
        """Return True if there are outputs for these samples. Stored ones may cover only the
        training set.
        """

    def probe(self, *x: Any, layers: Sequence[str] | None = None) -> Outputs:
        """Return outputs of the shapes of those for a batch. Nothing changes.

        Args:
            *x: Inputs of the batch.
            layers: Names of layers that are read. None for the source's own.
        """

    def named_modules(self) -> dict:
        """Return {name of a layer: module}. Empty if there is no model."""

    def say_with(self, fn: Callable | None) -> None:
        """Set where messages go.

        Args:
            fn: fn(text). None to print.
        """

    def reset(self) -> None:
        """Reset hidden states, before the first batch of a phase."""

    def stop(self) -> None:
        """Restore everything. May be called at any time, and twice."""
