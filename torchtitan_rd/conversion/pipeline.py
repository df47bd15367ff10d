"""The conversions, from checks to proof: what the scripts in convert/, the trainer and other programs call.

weights = open_dcp(Path("outputs/checkpoint/step-500"))             # or open_released(Path("Llama-3.2-1B"))
to_hf(with_tokenizer(weights), Path("exported"))                    # or to_dcp, to_pth
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from torchtitan_rd.checkpoint.folders import STATE
from torchtitan_rd.conversion import verification
from torchtitan_rd.conversion.dcp import job_config, open_dcp, write_dcp
from torchtitan_rd.conversion.huggingface import CONFIG_JSON, open_hf, require_complete, write_hf
from torchtitan_rd.conversion.huginn import open_huginn
from torchtitan_rd.conversion.meta import open_meta
from torchtitan_rd.conversion.output import Refused, check_output, staged
from torchtitan_rd.conversion.pth import GGUF_REMEDY, open_pth, write_pth
from torchtitan_rd.conversion.tokenizer_files import (
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    same_ids,
    tokenizer_files,
)
from torchtitan_rd.conversion.weights import GENERATION_CONFIG, Weights, select_tensors, total_bytes
from torchtitan_rd.data import TOKENIZED, Tokenizer, load_tokenizer, trained_kind
from torchtitan_rd.data.hub import hub_tokenizer
from torchtitan_rd.data.spikes import SPIKE_VOCAB_SIZE
from torchtitan_rd.errors import CheckpointError, ConfigError, TorchtitanRDError
from torchtitan_rd.log import logger
from torchtitan_rd.models import get_spec

PTH = "checkpoint.pth"
PAD = "pad_token_id"
TOKENIZERS = (TOKENIZER_JSON, TOKENIZER_MODEL)


def open_released(path: Path, *, model: str | None = None, flavor: str | None = None) -> Weights:
    """Weights that another program wrote: a Hugging Face folder, Meta's files, or a training file of Huginn.

    model: the family that they must be of. flavor: the shape, where a training file does not tell it.
    Reads names and shapes only. Raises ConfigError, CheckpointError.
    """
    ggufs = sorted(path.glob("*.gguf"))
    if path.is_file():
        weights = open_huginn(path, flavor)
    elif not path.is_dir():
        raise CheckpointError(f"{path} does not exist")
    elif ggufs and not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise CheckpointError(
            f"{path} holds only GGUF files ({ggufs[0].name}), which are not read here; {GGUF_REMEDY}"
        )
    elif (path / CONFIG_JSON).exists():
        weights = open_hf(path, model=model)
    else:
        weights = open_meta(path)
    if model is not None and get_spec(model).hf is not weights.spec.hf:
        raise ConfigError(
            f"--model {model}: {path} holds a {weights.spec.name}; use --model {weights.spec.name}"
        )
    return weights


def with_tokenizer(weights: Weights, tokenizer_path: str | None = None) -> Weights:
    """The weights with the tokenizer that they were trained with, as Hugging Face's library loads it.

    tokenizer_path: one that `model.tokenizer_path` could name, instead of what the checkpoint says (and,
    of one on the hub, at the commit that it notes); "none" for none. Spikes have no tokenizer; their
    separator is stated as bos. Raises ConfigError if the tokenizer is out of reach.
    """
    config = weights.job_config or {}
    training, kept = config.get("training", {}), weights.files
    states: list[Path] = []
    kind = trained_kind(training)
    if tokenizer_path == "none":
        return replace(weights, files={name: kept[name] for name in kept if name == GENERATION_CONFIG})
    if tokenizer_path is None and not any(name in kept for name in TOKENIZERS):
        if kind == "spikes":
            # The model may have padded rows beyond.
            ids = config.get("model", {}).get("vocab_size", SPIKE_VOCAB_SIZE)
            return replace(weights, token_ids={"bos_token_id": ids - 1, "eos_token_id": None})
        if kind == "packed":
            ids = {"eos_token_id": training.get("eos_id"), "pad_token_id": training.get("pad_id")}
            return replace(weights, token_ids={**weights.token_ids, **ids})
        tokenizer_path = config.get("model", {}).get("tokenizer_path") if kind in TOKENIZED else None
        states = [Path(weights.origin) / STATE]
    if tokenizer_path is None and "tokenizer.model" in kept and "tokenizer.json" not in kept:
        # Meta's, which transformers does not load.
        tokenizer_path = str(Path(weights.origin) / "tokenizer.model")
    if tokenizer_path is None:
        return weights
    found = tokenizer_files(tokenizer_path, states)
    beyond = [name for name, id_ in found.token_ids.items() if id_ >= weights.shape.vocab_size]
    if beyond and beyond != [PAD]:
        raise ConfigError(
            f"the tokenizer {tokenizer_path!r} has {beyond[0]} = {found.token_ids[beyond[0]]}, "
            f"beyond the model's vocabulary of {weights.shape.vocab_size}: "
            "name the right one with --tokenizer_path, or none"
        )
    # A pad that was added to the tokenizer alone: config.json states none that the model has no row for.
    ids = {name: id_ for name, id_ in found.token_ids.items() if name not in beyond}
    return replace(weights, files={**kept, **found.files}, token_ids={**weights.token_ids, **ids})


def warn_of_another_tokenizer(folder: Path, tokenizer_path: str, tokenizer: Tokenizer) -> None:
    """For a run on text with `model.tokenizer_path`, which is `tokenizer`, that starts from the weights in
    `folder`: logs a warning unless these were made with a tokenizer that gives the same ids, or do not tell.
    Compared by content; theirs on the hub is read at the commit that they note.
    """
    config = job_config(folder) or {}
    places = [
        place
        for place in (folder, folder / "original")
        if any((place / name).is_file() for name in TOKENIZERS)
    ]

    training = config.get("training", {})
    if places:
        theirs = str(places[0])
    elif trained_kind(training) in TOKENIZED:
        theirs = config.get("model", {}).get("tokenizer_path", "bytes")
    else:
        return

    try:
        theirs = hub_tokenizer(theirs, [folder / STATE])
        if same_ids(load_tokenizer(theirs), tokenizer):
            return
        found = "which gives other ids than"
    except TorchtitanRDError as error:
        found = f"which cannot be compared ({error}) with"

    logger.warning(
        "the weights in %s were made with the tokenizer %s, %s model.tokenizer_path = %r of this run: set "
        "model.tokenizer_path = %r, unless the embedding is to be learned anew",
        *(folder, theirs, found, tokenizer_path, theirs),
    )


def to_dcp(
    weights: Weights, output: Path, *, force: bool = False, verify: bool | None = None, progress: bool = False
) -> str:
    """Writes a checkpoint that runs can start from (`step-0`, or for `checkpoint.initial_load_path`).

    weights: may be a part of the model's.
    force: replaces a folder that holds a converted model.
    verify: compare the logits of the result with those of transformers; None: if that is possible here.
    progress: show a bar on stderr.
    Returns a sentence on the proof. Raises ConfigError, CheckpointError; then nothing is left of the output,
    but if the proof failed: then it is kept beside its place, as the message says.
    """
    obstacle = _check(weights, output, force, verify)
    with staged(output) as folder:
        with _with_bar(weights, "to DCP", progress) as counted:
            write_dcp(counted, folder, output.name)

        def prove() -> verification.Comparison:
            written = open_dcp(folder)
            # What was left out (an embedding) is taken from the source, so that the rest can be compared.
            whole = replace(
                weights,
                read=lambda name: (written if name in written.tensors else weights).read(name),
                hf_folder=None,
            )
            ours = verification.native(whole)
            if weights.hf_folder is not None:
                theirs = verification.transformers_logits(weights.hf_folder, weights, ours.steps)
            else:
                theirs = verification.transformers_logits_from(weights, ours.steps)
            return verification.compare(ours, theirs)

        return _proof(prove, verify, obstacle)


def to_hf(
    weights: Weights, output: Path, *, force: bool = False, verify: bool | None = None, progress: bool = False
) -> str:
    """Writes a complete Hugging Face folder; see `to_dcp`."""
    require_complete(weights)
    obstacle = _check(weights, output, force, verify)
    with staged(output) as folder:
        stored = select_tensors(weights, weights.spec.hf.key_map(weights.shape))
        with _with_bar(stored, "to Hugging Face", progress) as counted:
            write_hf(counted, folder)

        def prove() -> verification.Comparison:
            ours = verification.native(weights)
            return verification.compare(ours, verification.transformers_logits(folder, weights, ours.steps))

        return _proof(prove, verify, obstacle)


def to_pth(
    weights: Weights, output: Path, *, force: bool = False, verify: bool | None = None, progress: bool = False
) -> str:
    """Writes `checkpoint.pth`, the model's state dict by our names; see `to_dcp`.
    The proof compares every tensor.
    """
    check_output(output, Path(weights.origin), total_bytes(weights.tensors), force=force)
    with staged(output) as folder:
        with _with_bar(weights, "to .pth", progress) as counted:
            write_pth(folder / PTH, counted.tensors, counted.read)
        if verify is False:
            return "not verified: --no-verify"
        written = open_pth(folder / PTH)
        different = [name for name in weights.tensors if not torch.equal(written[name], weights.read(name))]
        if different or written.keys() != weights.tensors.keys():
            raise Refused(f"verification failed: {different} differ")
        return f"verified: all {len(written)} tensors are equal"


def _check(weights: Weights, output: Path, force: bool, verify: bool | None) -> str | None:
    """What can be wrong before anything is written. Returns why there will be no verification, if so."""
    obstacle = "--no-verify" if verify is False else verification.unavailable(weights)
    if verify and obstacle:
        raise ConfigError(f"--verify: {obstacle}")
    needed = total_bytes(weights.tensors) + sum(map(len, weights.files.values()))
    check_output(output, Path(weights.origin), needed, force=force)
    return obstacle


def _proof(prove: Callable[[], verification.Comparison], verify: bool | None, obstacle: str | None) -> str:
    if obstacle is not None:
        return f"not verified: {obstacle}"
    try:
        comparison = prove()
    except CheckpointError as error:
        raise Refused(f"verification failed: {error}") from error
    if not comparison.passed:
        raise Refused(f"verification failed: {comparison}")
    return f"verified: {comparison}"


@contextmanager
def _with_bar(weights: Weights, title: str, show: bool) -> Iterator[Weights]:
    """The same weights, whose `read` moves a bar on stderr."""
    from tqdm import tqdm

    logger.info("%s: %s %s from %s", title, weights.spec.name, weights.flavor, weights.origin)
    with tqdm(
        total=total_bytes(weights.tensors), unit="B", unit_scale=True, desc=title, disable=not show
    ) as bar:

        def read(name: str) -> torch.Tensor:
            tensor = weights.read(name)
            bar.update(tensor.nbytes)
            return tensor

        yield replace(weights, read=read)
