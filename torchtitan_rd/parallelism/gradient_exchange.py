"""When within a step the ranks sum their gradients, and in which pieces."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from torchtitan_rd.parallelism.dims import ParallelismConfig
from torchtitan_rd.parallelism.fsdp import ShardingKeys

MIB = 2**20


class GradientExchange:
    """What of FSDP2 a train step steers: which microbatch ends in a sum over the ranks, and the sum over
    copies of the model (HSDP) where that is not left to FSDP2.
    """

    def __init__(
        self,
        model: nn.Module,
        parallelism: ParallelismConfig | None = None,
        sharding: ShardingKeys | None = None,
        mesh: DeviceMesh | None = None,
    ):
        """model: sharded by `parallelize` with the same keys and mesh. Without keys: their defaults."""
        keys = parallelism or ParallelismConfig()
        self.model = model
        self.each_microbatch = keys.reduce_each_microbatch
        self.stays_gathered = not self.each_microbatch and keys.fsdp_reshard_after_forward == "never"
        self.chunk_bytes = keys.all_reduce_chunk_mb * MIB
        self.dtype = getattr(torch, (sharding or ShardingKeys()).mixed_precision_reduce)
        self.copies: dist.ProcessGroup | None = None
        if mesh is None and self.chunk_bytes:
            raise ValueError("all_reduce_chunk_mb needs the mesh that the model was sharded on")
        if mesh is not None and sums_copies_itself(mesh, keys.all_reduce_chunk_mb):
            self.copies = mesh.get_group("dp_replicate")

    @property
    def is_first_copy(self) -> bool:
        """Whether this rank's shards are those that count in a sum over all ranks, of several copies that
        FSDP2 does not know of.
        """
        return self.copies is None or self.copies.rank() == 0

    def before_microbatch(self, *, is_last: bool) -> None:
        """To be called before each microbatch of a step.

        By default each microbatch's gradients are summed over the shards, and over copies of the model in
        the last alone: until then each shard keeps the sum over its own microbatches, in the type of the
        reduction and at no more than one sharded gradient of memory. A unit without a gradient in the last
        microbatch would keep it for a later step: which units have one must not differ between the
        microbatches of a step. Without `reduce_each_microbatch` the same holds of no unit: what has been
        kept is summed when the last backward ends.
        """
        if not isinstance(self.model, FSDPModule):
            return
        if self.each_microbatch:
            self.model.set_requires_all_reduce(is_last)
        else:
            self.model.set_requires_gradient_sync(is_last)
        if self.stays_gathered:
            self.model.set_reshard_after_backward(is_last)

    @torch.no_grad()
    def after_backward(self, parameters: Sequence[Tensor], device: torch.device) -> None:
        """To be called when the last backward of a step is over. Collective over the copies of the model.

        parameters: those that are trained. device: where ranks exchange, which is not that of gradients in
        host memory.
        """
        if self.copies is None:
            return
        gradients = [p.grad.to_local() for p in parameters if isinstance(p.grad, DTensor)]
        size = max(self.chunk_bytes // self.dtype.itemsize, 1)
        for parts in chunks([gradient.view(-1) for gradient in gradients], size):
            chunk = torch.cat([part.to(device, self.dtype) for part in parts])
            dist.all_reduce(chunk, group=self.copies)
            torch._foreach_copy_(parts, list(chunk.split([part.numel() for part in parts])))


def sums_copies_itself(mesh: DeviceMesh, chunk_mb: int) -> bool:
    """Whether gradients are summed over copies of the model here, and FSDP2 shards each copy by itself."""
    return chunk_mb > 0 and "dp_replicate" in (mesh.mesh_dim_names or ())


def chunks(flat: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Cuts 1-D tensors, as one after the other, into lists of `size` elements, fewer in the last."""
    parts: list[Tensor] = []
    room = size
    for rest in flat:
        while rest.numel():
            part, rest = rest[:room], rest[room:]
            parts.append(part)
            room -= part.numel()
            if not room:
                yield parts
                parts, room = [], size
    if parts:
        yield parts
