"""How many parameters a model has: in all, by part, without its input embedding, and unrolled over depths."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchtitan_rd.model_spec import ModelSpec


@dataclass(frozen=True)
class ParameterCount:
    """parts: parameters by what they belong to, in the model's order; of blocks, one entry for all of a kind.
    A tied matrix counts once.

    input_embedding: those that a token is only looked up in. 0 where the matrix is tied to the head: then
        it multiplies too.
    looped: those of blocks that one forward runs several times (the core of a recurrent model).
    mean_depth: how often, in training, on average; None without a recurrence.
    """

    parts: Mapping[str, int]
    input_embedding: int
    looped: int = 0
    mean_depth: int | None = None

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def without_input_embedding(self) -> int:
        return self.total - self.input_embedding

    def unfolded(self, depth: int) -> int:
        """Of the model without a recurrence whose blocks are as many as a token passes at this depth.

        As Huginn's authors count (arXiv 2502.05171): blocks once an iteration, the adapter once.
        """
        return self.total + (depth - 1) * self.looped

    @property
    def effective(self) -> int:
        """Without the input embedding, unfolded to the mean depth."""
        return self.unfolded(self.mean_depth or 1) - self.input_embedding


def count_parameters(spec: ModelSpec, shape: Any) -> ParameterCount:
    """Builds the model without its numbers."""
    with torch.device("meta"):
        model = spec.build(shape)
    plan = spec.wrap_plan(model)
    inside = tuple(f"{loop.unit}." for loop in plan.loops)
    looped = tuple(f"{name}." for name in plan.blocks if name.startswith(inside))

    parts: Counter[str] = Counter()
    in_loops = 0
    for name, parameter in model.named_parameters():
        parts[_part_of(name)] += parameter.numel()
        in_loops += parameter.numel() if name.startswith(looped) else 0

    mean_depth = spec.inputs(shape, None, seed=0, total_steps=1).mean_depth if spec.inputs else None
    return ParameterCount(dict(parts), _input_embedding(model), in_loops, mean_depth)


def _part_of(name: str) -> str:
    """`layers.3.attention.wq.weight` -> `layers.*.attention`; `norm.weight` -> `norm`. The norms of a block,
    of a few parameters each, are one part.
    """
    in_block = re.match(r"(.+?)\.\d+\.([^.]+?)(_\d+)?\.", name)
    return f"{in_block[1]}.*.{in_block[2]}" if in_block else name.rpartition(".")[0]


def _input_embedding(model: nn.Module) -> int:
    """Parameters of embeddings that no other module has too."""
    owners: dict[int, int] = defaultdict(int)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] += 1
    own = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    return sum(weight.numel() for weight in own if owners[id(weight)] == 1)
