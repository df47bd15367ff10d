"""A dense Llama becomes depth-recurrent (arXiv 2511.07384).

Its layers, by number, go to prelude, core and coda; those in between are dropped. Embedding, head and norm
stay what they were. Each iteration takes the embedded input in by an adapter, the only new weight.

    split = Split.parse("0-3", "10-17", "18-21")
    proof = to_raven(open_dense(Path("TinyLlama")), split, Path("retrofitted"))
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from torchtitan_rd.checkpoint import TensorInfo
from torchtitan_rd.checkpoint.safe_reader import METADATA
from torchtitan_rd.conversion import verification
from torchtitan_rd.conversion.dcp import open_dcp
from torchtitan_rd.conversion.huggingface import require_complete
from torchtitan_rd.conversion.output import check_output
from torchtitan_rd.conversion.pipeline import open_released, to_dcp, to_hf
from torchtitan_rd.conversion.weights import Weights, matching_flavor, model_tensors, total_bytes
from torchtitan_rd.errors import CheckpointError, ConfigError
from torchtitan_rd.models.llama.shape import LlamaShape
from torchtitan_rd.models.raven import RAVEN
from torchtitan_rd.models.raven.shape import RavenShape
from torchtitan_rd.parallelism.init import parameter_seed

ADAPTER = "transformer.recurrence.iteration.adapter.weight"
NONE = "none"
_TOP = {  # the raven's name -> the Llama's
    "transformer.wte.weight": "tok_embeddings.weight",
    "transformer.ln_f.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {  # several of the Llama's are one matrix in a raven, row after row
    "norm_1.weight": ("attention_norm.weight",),
    "attn.Wqkv.weight": ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight"),
    "attn.proj.weight": ("attention.wo.weight",),
    "norm_2.weight": ("ffn_norm.weight",),
    "mlp.fc.weight": ("feed_forward.w1.weight", "feed_forward.w3.weight"),
    "mlp.proj.weight": ("feed_forward.w2.weight",),
}


@dataclass(frozen=True)
class Split:
    """The numbers of the dense layers, from 0, that become prelude, core and coda."""

    prelude: range
    core: range
    coda: range

    @classmethod
    def parse(cls, prelude: str, core: str, coda: str) -> "Split":
        """Each is as "0-3" or "7"; prelude and coda may be "none". Raises ConfigError for parts that do not
        follow each other.
        """
        if core == NONE:
            raise ConfigError("--core none: there must be a layer to iterate")
        split = cls(_range("prelude", prelude), _range("core", core), _range("coda", coda))
        parts = [(name, part) for name, part in vars(split).items() if part]
        for (name, part), (later, after) in itertools.pairwise(parts):
            if after.start < part.stop:
                raise ConfigError(
                    f"--{name} {part.start}-{part.stop - 1} and --{later} {after.start}-{after.stop - 1} "
                    f"overlap or are reversed: layers keep their order, so --{later} starts at {part.stop} "
                    f"or later"
                )
        return split

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that are kept, in their order."""
        return (*self.prelude, *self.core, *self.coda)

    def check(self, n_layers: int) -> None:
        """Raises ConfigError for a layer that the dense model does not have."""
        for name, part in vars(self).items():
            if part and part.stop > n_layers:
                raise ConfigError(
                    f"--{name} names layer {part.stop - 1}, but the dense model has the layers "
                    f"0 to {n_layers - 1}"
                )


def _range(name: str, text: str) -> range:
    if text == NONE:
        return range(0)
    found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", text)
    if found is None:
        raise ConfigError(f"--{name} {text}: give the first and the last layer, as in 0-3, or one layer")
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise ConfigError(f"--{name} {text} runs backwards: did you mean {last}-{first}?")
    return range(first, last + 1)


def open_dense(
    folder: Path,
    *,
    model: str | None = None,
    flavor: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Weights:
    """A whole dense Llama: a checkpoint of ours, a Hugging Face folder, or Meta's files.

    Reads names and shapes only. model, flavor, overrides: the shape of a checkpoint that does not tell its
    own. Raises CheckpointError, ConfigError.
    """
    if (folder / METADATA).exists():
        weights = open_dcp(folder, model=model, flavor=flavor, overrides=overrides)
    else:
        weights = open_released(folder, model=model)
    shape = llama_shape(weights)
    if shape.norm_type != "rmsnorm":
        raise ConfigError(
            f"{folder} has norm_type = {shape.norm_type!r}, which a raven lacks: only 'rmsnorm'"
        )
    require_complete(weights)
    return weights


def llama_shape(weights: Weights) -> LlamaShape:
    """The shape of a dense Llama. Raises ConfigError for another model."""
    if not isinstance(weights.shape, LlamaShape):
        raise ConfigError(
            f"{weights.origin} holds a {weights.spec.name}, which is no dense Llama: "
            f"its layers cannot be split"
        )
    return weights.shape


def raven_shape(
    dense: LlamaShape,
    split: Split,
    *,
    adapter: str = "identity",
    mean_recurrence: int = 32,
    mean_backprop_depth: int = 8,
) -> RavenShape:
    """The shape of the raven that these layers make. Raises ConfigError."""
    heads, kv_heads, head_dim = dense.attention_shape
    same = (
        "dim",
        "vocab_size",
        "norm_eps",
        "rope_theta",
        "rope_scaling",
        "tie_word_embeddings",
        "max_seq_len",
    )

    return RavenShape(
        **{name: getattr(dense, name) for name in same},
        n_heads=heads,
        n_kv_heads=None if kv_heads == heads else kv_heads,
        head_dim=None if head_dim * heads == dense.dim else head_dim,
        ffn_dim=dense.hidden_dim,
        n_layers_prelude=len(split.prelude),
        n_layers_core=len(split.core),
        n_layers_coda=len(split.coda),
        mean_recurrence=mean_recurrence,
        mean_backprop_depth=mean_backprop_depth,
        block="pre",
        final_norm="once",
        qk_bias=False,
        adapter_start=adapter,
        init_strategy="scaled",
    )


def retrofitted(dense: Weights, split: Split, *, seed: int = 0, **fields: Any) -> Weights:
    """The dense weights as those of a raven, each read when its turn comes. fields: of `raven_shape`; seed:
    of a random adapter. The tokenizer goes along, and not how the dense model was trained.
    Raises ConfigError.
    """
    split.check(llama_shape(dense).n_layers)
    shape = raven_shape(llama_shape(dense), split, **fields)
    wanted, _ = model_tensors(RAVEN, shape)
    sources = _sources(split, wanted)
    if shape.tie_word_embeddings and "output.weight" not in dense.tensors:
        sources["lm_head.weight"] = sources["transformer.wte.weight"]
    dtype = dense.tensors["layers.0.attention.wq.weight"].dtype

    def read(name: str) -> torch.Tensor:
        if name == ADAPTER:
            return _new_adapter(shape, seed).to(dtype)
        parts = [dense.read(source) for source in sources[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def dtype_of(name: str) -> torch.dtype:
        return dtype if name == ADAPTER else dense.tensors[sources[name][0]].dtype

    return replace(
        dense,
        spec=RAVEN,
        shape=shape,
        flavor=matching_flavor(RAVEN, shape),
        tensors={name: TensorInfo(size, dtype_of(name)) for name, size in wanted.items()},
        read=read,
        step=None,
        job_config=None,
        hf_folder=None,
    )


def without_layers(dense: Weights, kept: tuple[int, ...]) -> Weights:
    """The dense model with these layers alone, as weights of a smaller dense model."""
    source = {}
    for name in model_tensors(dense.spec, replace(llama_shape(dense), n_layers=len(kept)))[0]:
        top, _, rest = name.removeprefix("layers.").partition(".")
        source[name] = f"layers.{kept[int(top)]}.{rest}" if name.startswith("layers.") else name
    return replace(
        dense,
        shape=replace(llama_shape(dense), n_layers=len(kept)),
        tensors={name: dense.tensors[old] for name, old in source.items() if old in dense.tensors},
        read=lambda name: dense.read(source[name]),
    )


def prove(dense: Weights, raven: Weights, split: Split) -> str:
    """With the identity for an adapter, one iteration of the raven must give the logits that the transformers
    library computes with the dense model without its dropped layers, whatever the first state is.

    -> what was found. Raises CheckpointError if they differ.
    """
    identity = torch.zeros(raven.tensors[ADAPTER].shape)
    identity[:, len(identity) :].fill_diagonal_(1.0)
    passing = replace(raven, read=lambda name: identity if name == ADAPTER else raven.read(name))
    ours = verification.native(passing, num_steps=1)
    expected = verification.transformers_logits_from(without_layers(dense, split.layers))
    comparison = verification.compare(ours, expected)
    layers = llama_shape(dense).n_layers
    dropped = layers - len(split.layers)
    text = f"one iteration and the dense model without {dropped} of {layers} layers: {comparison}"
    if not comparison.passed:
        raise CheckpointError(f"verification failed: {text}")
    if not torch.equal(ours.logits, verification.native_logits(passing, num_steps=1, seed=1)):
        raise CheckpointError(
            "verification failed: the first state changes the logits, in spite of the adapter"
        )
    return f"{text}, whatever the first state"


def to_raven(
    dense: Weights,
    split: Split,
    output: Path,
    *,
    dcp: bool = False,
    force: bool = False,
    verify: bool | None = None,
    progress: bool = False,
    **fields: Any,
) -> tuple[Weights, str]:
    """Writes the raven as a Hugging Face folder, or with dcp as a checkpoint. fields: of `retrofitted`.

    First it is proven against the dense model, then what was written against the raven (`pipeline.to_hf`,
    which tells the other arguments). -> the raven, and a sentence on both proofs.
    Raises ConfigError, CheckpointError.
    """
    raven = retrofitted(dense, split, **fields)
    check_output(output, Path(dense.origin), total_bytes(raven.tensors), force=force)
    obstacle = "--no-verify" if verify is False else verification.unavailable(dense)
    if verify and obstacle:
        raise ConfigError(f"--verify: {obstacle}")
    proof = f"not compared with the dense model: {obstacle}" if obstacle else prove(dense, raven, split)
    written = (to_dcp if dcp else to_hf)(raven, output, force=force, verify=verify, progress=progress)
    return raven, f"{proof}\n{written}"


def _sources(split: Split, wanted: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The raven's name -> the dense model's, for all but the adapter."""
    sources: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in _TOP.items() if ours in wanted}
    parts = {"prelude": split.prelude, "recurrence.iteration.core_block": split.core, "coda": split.coda}
    for part, layers in parts.items():
        for place, layer in enumerate(layers):
            for ours, theirs in _LAYER.items():
                names = tuple(f"layers.{layer}.{name}" for name in theirs)
                sources[f"transformer.{part}.{place}.{ours}"] = names
    return sources


def _new_adapter(shape: RavenShape, seed: int) -> torch.Tensor:
    """As training starts it (models/raven/init.py), in float32."""
    with torch.device("meta"):
        fills = RAVEN.inits(RAVEN.build(shape))
    weight = torch.empty(shape.dim, 2 * shape.dim)
    fills[ADAPTER](weight, torch.Generator().manual_seed(parameter_seed(seed, ADAPTER)))
    return weight
