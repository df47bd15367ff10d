"""A trained model from disk: a DCP step folder of any number of ranks, or a Hugging Face folder."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from torchtitan_rd.checkpoint.folders import STATE, STEP, step_of
from torchtitan_rd.checkpoint.safe_reader import METADATA
from torchtitan_rd.conversion.dcp import open_dcp
from torchtitan_rd.conversion.huggingface import CONFIG_JSON, require_complete
from torchtitan_rd.conversion.pipeline import TOKENIZERS, open_released, with_tokenizer
from torchtitan_rd.conversion.weights import Weights, model_tensors
from torchtitan_rd.data import TOKENIZED, Tokenizer, load_tokenizer, trained_kind
from torchtitan_rd.data.hub import hub_tokenizer
from torchtitan_rd.data.spikes import SPIKE_VOCAB_SIZE
from torchtitan_rd.data.tokenizer import fits
from torchtitan_rd.errors import CheckpointError, ConfigError, TorchtitanRDError
from torchtitan_rd.log import logger
from torchtitan_rd.model_spec import ModelSpec

CHECKPOINT_FOLDER = "checkpoint"


@dataclass(frozen=True)
class Source:
    """Where a model came from. folder: with its weights. kind: of the data that it was trained on (`text`,
    `spikes`, `packed`), None if unknown. vocab_size: ids that the data had; the model may have padded rows
    beyond. eos_ids: what ends a text."""

    folder: Path
    kind: str | None
    vocab_size: int
    eos_ids: tuple[int, ...]


class Loaded(NamedTuple):
    """shape: the model's config. model: in evaluation mode, without gradients. tokenizer: None for spikes,
    and where there is none. source: where all of it came from."""

    spec: ModelSpec
    shape: Any
    model: nn.Module
    tokenizer: Tokenizer | None
    source: Source


def load_model(
    path: Path | str,
    *,
    model: str | None = None,
    flavor: str | None = None,
    tokenizer_path: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Loaded:
    """path: a step folder, the folder of a run (its latest step is taken), or an exported or released folder.

    model: the family that it must be of; with flavor, the shape of a checkpoint that does not tell its own.
    tokenizer_path: instead of the one that it was trained with; "none": without one.
    dtype: of the matrices; None: as stored. What training keeps in float32 (WrapPlan) is float32 here too.
    Raises CheckpointError, ConfigError, DataError.
    """
    weights = open_weights(Path(path), model=model, flavor=flavor)
    require_complete(weights)
    source = source_of(weights)
    tokenizer = _tokenizer_of(weights, source, tokenizer_path)
    if tokenizer is not None and not fits(tokenizer, weights.shape.vocab_size):
        raise ConfigError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the model in {path} a vocabulary "
            f"of {weights.shape.vocab_size}: name its own with --tokenizer"
        )
    return Loaded(
        weights.spec, weights.shape, _filled(weights, dtype, torch.device(device)), tokenizer, source
    )


def open_weights(path: Path, *, model: str | None = None, flavor: str | None = None) -> Weights:
    """Raises CheckpointError for a path with no model, ConfigError for one of another family than `model`."""
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist: name a step-N folder, a run's folder, or an exported folder"
        )
    path = latest_step(path)
    if path.is_dir() and (path / METADATA).exists():
        return open_dcp(path, model=model, flavor=flavor)
    if path.is_dir() and not any((path / name).exists() for name in (CONFIG_JSON, "params.json", "original")):
        raise CheckpointError(
            f"{path} holds neither a checkpoint (.metadata) nor a Hugging Face model ({CONFIG_JSON})"
        )
    return open_released(path, model=model, flavor=flavor)


def latest_step(path: Path) -> Path:
    """The latest step folder in `path`, the folder of a run or of its checkpoints; any other as it is."""
    for place in (path, path / CHECKPOINT_FOLDER):
        steps = [p for p in place.iterdir() if STEP.fullmatch(p.name)] if place.is_dir() else []
        if steps:
            found = max(steps, key=lambda p: step_of(p.name) or 0)
            logger.info("reading %s", found)
            return found
    return path


def source_of(weights: Weights) -> Source:
    """What the weights say about where they came from."""
    config = weights.job_config or {}
    kind = trained_kind(config.get("training", {}))
    ids = config.get("model", {}).get("vocab_size")
    if ids is None:
        ids = SPIKE_VOCAB_SIZE if kind == "spikes" else _ids_of_export(weights)
    eos = weights.token_ids.get("eos_token_id")
    if eos is None and kind == "packed":
        eos = config["training"].get("eos_id")
    eos_ids = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)
    return Source(Path(weights.origin), kind, ids, eos_ids)


def _ids_of_export(weights: Weights) -> int:
    """A model of spikes states its separator, the last id of the data, as bos (conversion/pipeline.py), and
    has neither an end of text nor a tokenizer.
    """
    separator = weights.token_ids.get("bos_token_id")
    has_tokenizer = any(name in weights.files for name in TOKENIZERS)
    if separator is None or has_tokenizer or weights.token_ids.get("eos_token_id") is not None:
        return weights.shape.vocab_size
    return separator + 1


def _tokenizer_of(weights: Weights, source: Source, tokenizer_path: str | None) -> Tokenizer | None:
    if tokenizer_path == "none" or (tokenizer_path is None and source.kind == "spikes"):
        return None
    if tokenizer_path is not None:
        return load_tokenizer(tokenizer_path)
    if any((source.folder / name).is_file() for name in TOKENIZERS):
        return load_tokenizer(str(source.folder))
    if source.kind not in TOKENIZED:
        return None
    named = (weights.job_config or {}).get("model", {}).get("tokenizer_path", "bytes")
    try:
        return load_tokenizer(hub_tokenizer(named, [source.folder / STATE]))
    except TorchtitanRDError as error:
        raise ConfigError(
            f"{weights.origin} was trained with a tokenizer that is out of reach: {error}"
        ) from error


def transformers_tokenizer(
    path: Path | str,
    tokenizer_path: str | None = None,
    *,
    model: str | None = None,
    flavor: str | None = None,
) -> Any:
    """The tokenizer of the transformers library that an export of the model in `path` has.

    The arguments are those of `load_model`. Raises CheckpointError, ConfigError, DataError.
    """
    from transformers import AutoTokenizer

    weights = with_tokenizer(open_weights(Path(path), model=model, flavor=flavor), tokenizer_path)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in weights.files.items():
            (Path(folder) / name).write_bytes(content)
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} has no tokenizer that transformers can read: {error}") from None


@torch.no_grad()
def _filled(weights: Weights, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    _, tied = model_tensors(weights.spec, weights.shape)
    with torch.device("meta"):
        model: Any = weights.spec.build(weights.shape)
    plan = weights.spec.wrap_plan(model)
    wide = set(plan.full_precision)
    if plan.float32_units:
        wide |= {
            f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)
        }

    def place(name: str, parameter: nn.Parameter) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, parameter)

    for name in weights.tensors:
        if name not in tied:
            tensor = weights.read(name).to(device)
            kept = torch.float32 if name in wide else dtype or tensor.dtype
            place(name, nn.Parameter(tensor.to(kept, copy=True), requires_grad=False))
    for second, first in tied.items():
        owner, _, leaf = first.rpartition(".")
        shared = getattr(model.get_submodule(owner), leaf)
        kept = dtype or weights.tensors[first].dtype
        place(second, shared if shared.dtype == kept else nn.Parameter(shared.to(kept), requires_grad=False))
    model.init_buffers(device)
    return lay_out(model.eval())


@torch.no_grad()
def lay_out(model: nn.Module) -> nn.Module:
    """Stores matrices on the CPU column by column; shapes and values stay. The product with a single token,
    which is most of generation, then reads memory in order while it adds up: 0.7 times the time. Tied
    embeddings are looked up by row: they stay.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.is_cpu and id(module.weight) not in embeddings:
            module.weight.data = module.weight.data.t().contiguous().t()
    return model
