"""What each layer of a dense model adds to the residual stream, to choose the layers of a recurrent one by
(docs/retrofit.md). Shapes: B batch, S sequence, E dim.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import nn

from torchtitan_rd.batch import Batch
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.inference.loading import Loaded
from torchtitan_rd.model_spec import ModelSpec


class LayerChange(NamedTuple):
    """Of layer number `layer`, means over all tokens.

    cosine: between its input and its output. A layer at 1 hardly turns the stream, and may go.
    change: ||output - input|| / ||input||.
    """

    layer: int
    cosine: float
    change: float


def require_dense(spec: ModelSpec) -> None:
    """Raises ConfigError for a recurrent model, whose core has an input and an output in each iteration."""
    if spec.inputs is not None:
        raise ConfigError(f"layers describes a dense model, and a {spec.name} is recurrent already")


@torch.no_grad()
def layer_changes(loaded: Loaded, batches: Sequence[Batch], device: torch.device) -> list[LayerChange]:
    """One forward over the batches; tokens of all documents count alike. Raises ConfigError."""
    require_dense(loaded.spec)
    names = loaded.spec.wrap_plan(loaded.model).blocks
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    tokens = 0

    def watch(row: int, block: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def note(module: nn.Module, inputs: tuple[torch.Tensor, ...], after_BSE: torch.Tensor) -> None:
            before, after = inputs[0].float(), after_BSE.float()
            cosines = torch.cosine_similarity(before, after, dim=-1)
            changes = (after - before).norm(dim=-1) / before.norm(dim=-1)
            sums[row] += torch.stack((cosines.double().sum(), changes.double().sum()))

        return block.register_forward_hook(note)

    with ExitStack() as hooks:
        for row, name in enumerate(names):
            hooks.callback(watch(row, loaded.model.get_submodule(name)).remove)
        for batch in batches:
            documents = None if batch.document_ids is None else batch.document_ids.to(device)
            # The logits, which nobody reads, are not all kept at a time.
            loaded.model(batch.inputs.to(device), documents, read_out=lambda logits: None)
            tokens += batch.inputs.numel()
    means = (sums / tokens).tolist()
    return [LayerChange(number, cosine, change) for number, (cosine, change) in enumerate(means)]
