"""What one forward and its loss take: some rows of the global batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

IGNORE_INDEX = -100
"""The label that the loss leaves out (torch's default `ignore_index`)."""


def at_positions(labels: Tensor, positions: range | None) -> Tensor:
    """(B, S) -> (B, number of positions): the labels of the tokens that a rank computes; None: all."""
    return labels if positions is None else labels[:, positions.start : positions.stop]


@dataclass(frozen=True)
class Batch:
    """One microbatch of one rank: inputs and labels (B, S) int64, document_ids (B, S) int32 or None.

    Labels are the inputs one position later; IGNORE_INDEX is not to be predicted.
    rows: the number of each row in the global batch of its step, whatever the ranks; empty where nobody asks.
    """

    inputs: Tensor
    labels: Tensor
    document_ids: Tensor | None = None
    rows: Sequence[int] = ()

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory."""
        documents = None if self.document_ids is None else self.document_ids.pin_memory()
        return replace(
            self, inputs=self.inputs.pin_memory(), labels=self.labels.pin_memory(), document_ids=documents
        )
