"""Protocol for sources of teacher outputs."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from .batch_samples import BatchSamples
from .outputs import Outputs


@runtime_checkable
class OutputSource(Protocol):
    """Source of teacher outputs for batches: a model, a cache or the batch itself.

    Attributes:
        name: Name of the source in messages.
        needs: Field of `BatchSamples` that the source needs: 'items', 'rows' or 'target'. Empty if
            the inputs are enough.
    """

    name: str
    needs: str

    def start(self) -> Any:
        """Prepare the source for many batches. A second call does nothing."""

    def outputs(
        self, inputs: Sequence = (), samples: BatchSamples | None = None, layers: Sequence[str] = ()
    ) -> Outputs:
        """Return the teacher's outputs for a batch.

        Args:
            inputs: Inputs of the batch.
            samples: Information about the samples of the batch. None if unknown.
            layers: Names of layers whose outputs are also returned.
        """

    def has_outputs(self, samples: BatchSamples | None) -> bool:
        """Return True if there are outputs for these samples. Stored outputs may cover only the
        training set.
        """
        return True

    def probe(self, *x: Any, layers: Sequence[str] | None = None) -> Outputs:
        """Return outputs with the same shapes as those for a batch, without changing any state.

        Args:
            *x: Inputs of the batch.
            layers: Names of layers whose outputs are returned. None for all layers that the source
                provides.
        """

    def named_modules(self) -> dict:
        """Return {layer name: module}. The dict is empty if the source has no model."""
        return {}

    def reset(self) -> None:
        """Reset hidden states before the first batch of a training or validation phase."""

    def stop(self) -> None:
        """Restore the state from before `start`. It is safe to call this at any time, and more than
        once.
        """
