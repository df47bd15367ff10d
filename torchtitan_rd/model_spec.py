"""What a model family must provide, as types. The trainer, the parallelisms and the converters know models
only through this; it stands on the ground floor and imports torch and model_steps.py alone.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import nn

from torchtitan_rd.model_steps import Steps

NumSteps: TypeAlias = tuple[int, int]
"""(n, k): iterations of a recurrent model without gradient, then with."""

InitFn = Callable[[torch.Tensor, torch.Generator], None]
"""Fills a whole tensor in place."""

ReadOut = Callable[[torch.Tensor], Any]
"""What is made of logits (B, S, V), for example the sum of their losses. Where ranks share the vocabulary
they are a DTensor, sharded over V."""


class FusedReadOut(ABC):
    """A read-out that multiplies with the head itself, so that not all logits need be in memory at a time."""

    @abstractmethod
    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor) -> Any:
        """hidden: (B, S, E), what the head would multiply. weight: (V, E), the head's, in the same type;
        a DTensor sharded by rows where ranks share the vocabulary.
        """


class AttentionShape(NamedTuple):
    """Query heads, key and value heads, and the size of one head."""

    n_heads: int
    n_kv_heads: int
    head_dim: int


class ModelShape(Protocol):
    """What every family's shape has. It is a frozen dataclass: its fields are what `[model.overrides]` may
    replace, and each decides about the weights or about what they compute.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def vocab_size(self) -> int:
        """Rows of embedding and head."""

    @property
    def max_seq_len(self) -> int:
        """The context that an export states. It sizes nothing."""

    @property
    def attention_shape(self) -> AttentionShape: ...

    def resolved(self) -> "ModelShape":
        """The same shape with every size stated that follows from others, so that two can be compared."""


class Model(nn.Module, ABC):
    """A family's module: single-device maths only, built under `torch.device("meta")`.

    `forward(tokens (B, S) int64, document_ids (B, S) int32 | None, **kwargs of its
    ForwardInputs)` -> logits (B, S, V) in float32. Called with `read_out=` (a ReadOut or a FusedReadOut),
    forward returns the list of what that gives: one result, or as many as the inputs ask for, with one set of
    logits in memory at a time, or with a part of one.
    """

    @abstractmethod
    def init_buffers(self, device: torch.device | str) -> None:
        """Fills the non-persistent buffers (rotary tables), which `to_empty` leaves undefined."""


class GatedFeedForward(nn.Module, ABC):
    """down(silu(gate x) * up x), of each token alone (SwiGLU, arXiv 2002.05202)."""

    @abstractmethod
    def matrices(self) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """-> (gate (I, E), up (I, E)), or both in one (2 I, E); and down (E, I)."""


Shape = TypeVar("Shape", bound=ModelShape)
Shape_contra = TypeVar("Shape_contra", bound=ModelShape, contravariant=True)
Family = TypeVar("Family", bound=Model)


class Loop(NamedTuple):
    """A part of the model that one forward runs several times.

    unit: the submodule whose forward holds the whole loop. It is one FSDP unit, and what lies in it is none:
        so it is gathered once, and the number of collectives does not depend on the number of iterations.
    iteration: the submodule of it that one iteration calls: a region of activation checkpointing.
    """

    unit: str
    iteration: str


@dataclass(frozen=True, kw_only=True)
class WrapPlan:
    """What to wrap, as data: names of submodules (`layers.0`) in the order in which forward reaches them.

    blocks: each is one activation-checkpointed, compiled and, outside of loops, sharded unit.
    shard_only: each tuple is one more FSDP unit (embedding; final norm with the head). The last one is needed
        first in backward, so it is not resharded after forward unless the user says `always`.
    loops: what is run several times, if anything.
    full_precision: names of small parameters that compute in float32 where the others do in a smaller
        type: every rank then holds them whole (parallelism/fsdp.py). With float32 everywhere they are
        sharded as the others.
    feed_forwards: the GatedFeedForward modules, which may compute a few tokens at a time.
    attentions: the modules whose `attend(q, k, v, mask)`, an attribute, is all that joins tokens: heads
        (B, H, S, D) each, as models/attention.py has it.
    embedding: the module that takes the tokens of whole rows (B, S), whatever each rank computes of them.
    rotary: the module that makes the table of their positions, S -> (S, ...).
    float32_units: the first name of each unit that is gathered in float32 too; "" is the root.
        What multiplies with a matrix of such a unit casts it itself.
    Parameters in none of the units stay with the root unit: tied embedding and head must both be there.
    """

    blocks: tuple[str, ...]
    shard_only: tuple[tuple[str, ...], ...] = ()
    loops: tuple[Loop, ...] = ()
    full_precision: tuple[str, ...] = ()
    feed_forwards: tuple[str, ...] = ()
    float32_units: tuple[str, ...] = ()
    attentions: tuple[str, ...] = ()
    embedding: str = ""
    rotary: str = ""


@dataclass(frozen=True, kw_only=True)
class SharedModule:
    """A module of which each rank of a tensor-parallel group computes a share, for all tokens of the group.

    columns: each linear whose rows are shared out -> how many rows each of the matrices has that it is made
        of, in their order: (I,), or (I, I) for gate and up in one. A rank has its share of each of them.
    rows: the linear behind them, whose columns are shared out; its outputs are summed over the ranks.
    by_head: parameters of the module itself -> their dimension of query heads, of which a rank uses its own.
    """

    name: str
    columns: Mapping[str, tuple[int, ...]]
    rows: str
    by_head: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """What tensor parallelism shares out, as data: names of submodules.

    shared: between them, each rank has its part of the tokens. So what is neither named here nor in one of
        them (norms, a raven's adapter) is held whole by each rank and must treat each token alone.
    embedding, head: their rows are the ids of the vocabulary.
    counts: what must be a multiple of the degree: its name for people -> the number.
    """

    shared: tuple[SharedModule, ...]
    embedding: str
    head: str
    counts: Mapping[str, int]


@dataclass(frozen=True)
class FlopCount:
    """Exact floating-point operations of one training step, per token (forward and backward, no recompute).

    matmul: weight matmuls, 6 per weight that multiplies (embedding lookups are 0).
    attention_full: attention scores and values over all S x S pairs (the Megatron convention).
    attention_causal: the same over the S (S + 1) / 2 pairs that a causal mask leaves.
    """

    matmul: float
    attention_full: float
    attention_causal: float


class CountFlops(Protocol[Shape_contra]):
    """num_steps: the iterations where depths are drawn, in which the count is linear, so that means over
    draws give the mean count; None: the model's mean depth. A family that draws none ignores it.
    """

    def __call__(
        self, shape: Shape_contra, seq_len: int, num_steps: tuple[float, float] | None = None
    ) -> FlopCount: ...


@dataclass(frozen=True)
class Microbatch:
    """Where a microbatch stands in the run: all that what a model draws may depend on.

    step: the optimizer update, from 1. count: microbatches of one rank since the start of the run,
        this one included.
    samples: the row of each of its sequences in the global batch of the step, which knows no ranks.
    rank: data rank. seq_len, device, dtype: layout of the activations.
    positions: those of each sequence that this rank computes, which alone the inputs are to be of; None: all.
    """

    step: int
    count: int
    rank: int
    samples: Sequence[int]
    seq_len: int
    device: torch.device
    dtype: torch.dtype
    positions: range | None = None


@dataclass(frozen=True)
class ForwardInputs:
    """kwargs: what forward takes beside tokens and document ids. num_steps: the iterations that were drawn,
    for the FLOP count and the log.
    """

    kwargs: Mapping[str, Any]
    num_steps: NumSteps


NO_INPUTS = ForwardInputs({}, (0, 0))


class DrawnInputs(Protocol):
    """What one run draws for forward. Everything is a function of the microbatch's place in the run."""

    @property
    def mean_depth(self) -> int:
        """Iterations of the model in validation."""

    def __call__(self, microbatch: Microbatch) -> ForwardInputs:
        """The inputs of one training microbatch."""

    def at_depths(self, depths: Sequence[int], microbatch: Microbatch) -> ForwardInputs:
        """The inputs of one forward with a read-out at each of the ascending `depths`, none with gradient."""

    def report(self) -> str:
        """What is drawn, in one line for the log."""


class MakeInputs(Protocol[Shape_contra]):
    """recurrence: the section [recurrence]; None: its defaults. seed, total_steps: of [training].

    Raises ConfigError if the settings cannot go together.
    """

    def __call__(
        self, shape: Shape_contra, recurrence: Any, /, *, seed: int, total_steps: int
    ) -> DrawnInputs: ...


class Telemetry(AbstractContextManager["Telemetry"], Protocol):
    """A context around forward passes of a model. It costs nothing outside of it."""

    def read(self, summed: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """What the last forward in it was like; empty if there was none.

        summed: a sum over this rank's tokens -> that over the tokens of all ranks that share its sequences.
        """


class ReadOuts(NamedTuple):
    """What one forward of a held-out batch is asked for.

    position: name of a loss -> which of the results that forward returns it is; several names may share one.
    inputs: number of the batch -> what forward takes beside tokens and document ids.
    """

    position: Mapping[str, int]
    inputs: Callable[[int], Mapping[str, Any]]


SINGLE_READ_OUT = ReadOuts({"val_loss": 0}, lambda number: {})


def _nothing(inputs_or_shape: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class HuggingFaceLayout(Generic[Shape]):
    """How the weights and the shape of a family stand in a Hugging Face folder.

    model_type: what its config.json says.
    key_map: shape -> {our name: theirs} of every weight that such a folder holds (a tied head is not stored).
    to_hf, from_hf: (our name, whole tensor, shape) -> the tensor on the other side; bitwise inverses.
    config_fields: shape -> fields of config.json.
        Raises ConfigError for a shape that the class there does not have.
    shape_of: fields of config.json -> shape. Raises ConfigError for what our model does not compute.
    buffers: shape -> {their name: tensor} that a folder holds beside the weights.
    derived: regular expression of their names that may be in a folder and follow from its
        config.json (rotary tables).
    code: files to put beside the weights, for a class that the transformers library does not have;
        modules of this package among them (`code_files`).
    forward_arguments: kwargs of our forward -> those with which their forward computes the same.
    example_arguments: shape -> what the example of the model card gives to their forward beside the tokens.
    example_generation: what it gives to their `generate`.
    usage: what the model card says below the example; Markdown.
    """

    model_type: str
    key_map: Callable[[Shape], dict[str, str]]
    to_hf: Callable[[str, torch.Tensor, Shape], torch.Tensor]
    from_hf: Callable[[str, torch.Tensor, Shape], torch.Tensor]
    config_fields: Callable[[Shape], dict[str, Any]]
    shape_of: Callable[[Mapping[str, Any]], Shape]
    buffers: Callable[[Shape], dict[str, torch.Tensor]]
    derived: str
    code: tuple[Path, ...] = ()
    forward_arguments: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing
    example_arguments: Callable[[Shape], dict[str, Any]] = _nothing
    example_generation: Mapping[str, Any] = field(default_factory=dict)
    usage: str = ""

    def code_files(self) -> dict[str, bytes]:
        """Name -> content of the files that leave with the weights. They lie in one folder there and must not
        need this package: what one imports from another, it imports from its neighbour.
        """
        own = re.compile(r"^from torchtitan_rd(?:\.\w+)*\.(\w+) import ", re.MULTILINE)
        return {
            path.name: own.sub(r"from .\1 import ", path.read_text("utf-8")).encode() for path in self.code
        }


@dataclass(frozen=True, kw_only=True)
class ModelSpec(Generic[Shape, Family]):
    """One model family.

    flavors: name -> shape.
    arithmetic: the fields of a shape that change what the same tensors compute.
    build: shape -> module.
    inits: module -> {parameter name: fill(full tensor in place, generator)};
        one entry for every unique parameter.
    wrap_plan: module -> WrapPlan.
    tensor_plan: module -> TensorPlan.
    flops: (shape, seq_len) -> FlopCount.
    hf: how it stands in a Hugging Face folder.
    inputs: what forward needs beside a batch; None if nothing.
    telemetry: None, or module -> what describes its forward passes.
    foreign: field that the configs of other programs have and this family's lacks -> what to
        tell who overrides it.
    steps: module -> its forward in parts, for inference (torchtitan_rd/inference);
        None for a family that has none.
    derived: names under which checkpoints of other programs hold, beside the weights, what follows from the
        shape (rotary tables); they are passed over.
    """

    name: str
    flavors: Mapping[str, Shape]
    arithmetic: tuple[str, ...]
    build: Callable[[Shape], Family]
    inits: Callable[[Family], dict[str, InitFn]]
    wrap_plan: Callable[[Family], WrapPlan]
    tensor_plan: Callable[[Family], TensorPlan]
    flops: CountFlops[Shape]
    hf: HuggingFaceLayout[Shape]
    inputs: MakeInputs[Shape] | None = None
    telemetry: Callable[[Family], Telemetry] | None = None
    foreign: Mapping[str, str] = field(default_factory=dict)
    steps: Callable[[Family], Steps] | None = None
    derived: tuple[str, ...] = ()
