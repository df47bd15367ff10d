"""Proves a conversion: the same tokens through our model and through the transformers library's,
in float32 on CPU. conversion/pipeline.py refuses what does not pass.

Both read the same numbers, so the type that they are stored in does not count.
One model is in memory at a time. Shapes: B batch, S sequence, V vocabulary.
"""

import hashlib
import importlib.metadata
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan_rd.conversion.memory import available_bytes
from torchtitan_rd.conversion.weights import Weights, model_tensors
from torchtitan_rd.errors import CheckpointError
from torchtitan_rd.model_spec import DrawnInputs, Microbatch

LENGTH = 128  # tokens
MAX_STEPS = 4  # iterations of a recurrent model: an error shows in a few, and each costs time
MAX_KL = 1e-6  # nats: wrong conversions have 1e-4 and far more, right ones of trained models 1e-9 and less
# Times the rounding noise: right implementations differ by about 1, wrong ones by 13 and far more.
MAX_NOISES = 5.0
# Where each sum over features is cut in two for a measurement of the noise, as a share of its length.
_CUTS = (1 / 2, 1 / 3, 3 / 4)


@dataclass(frozen=True)
class Native:
    """What our model computes for the fixed tokens. logits: (1, S, V).
    noise, noise_kl: how far rounding alone moves them (see `native`). steps: iterations of a recurrent model.
    """

    logits: torch.Tensor
    noise: float
    noise_kl: float
    steps: int | None


@dataclass(frozen=True)
class Comparison:
    """error: root mean square of the differences of all logits. noise: the same between right
    implementations, as measured. kl: KL(ours || theirs), nats, mean over tokens. max_difference:
    of any logit, for people. steps: iterations of a recurrent model. problem: why the logits
    cannot be compared, if so.
    """

    error: float
    noise: float
    kl: float
    max_difference: float
    tokens: int
    steps: int | None = None
    problem: str | None = None

    @property
    def passed(self) -> bool:
        return self.problem is None and self.kl <= MAX_KL and self.error <= MAX_NOISES * self.noise

    def __str__(self) -> str:
        if self.problem is not None:
            return f"{self.problem}: DIFFERENT"
        over = f"{self.tokens} tokens" + (f" and {self.steps} iterations" if self.steps is not None else "")
        return (
            f"max |delta logit| {self.max_difference:.1e}, "
            f"rms {self.error:.1e} (at most {MAX_NOISES:.0f} times the rounding noise of {self.noise:.1e}), "
            f"KL {self.kl:.1e} nats (at most {MAX_KL:.0e}) over {over}: "
            f"{'equal' if self.passed else 'DIFFERENT'}"
        )


def compare(ours: Native, theirs: torch.Tensor) -> Comparison:
    """Compares with logits (1, S, V) of the same tokens that another implementation has computed."""
    tokens = ours.logits[..., 0].numel()

    def incomparable(problem: str) -> Comparison:
        return Comparison(math.nan, math.nan, math.nan, math.nan, tokens, ours.steps, problem)

    if ours.logits.shape != theirs.shape:
        return incomparable(
            f"logits are {tuple(ours.logits.shape)} here and {tuple(theirs.shape)} in transformers"
        )
    for where, logits in (("here", ours.logits), ("in transformers", theirs)):
        if broken := int((~logits.isfinite()).sum()):
            return incomparable(f"{broken} logits {where} are nan or infinite")
    difference = float((ours.logits - theirs).abs().max())
    kl = divergence(ours.logits, theirs)
    return Comparison(_distance(ours.logits, theirs), ours.noise, kl, difference, tokens, ours.steps)


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """KL(p || q) of logits (B, S, V): nats, mean over tokens."""
    total = 0.0
    # To save memory.
    for some_p, some_q in zip(p.flatten(0, -2).split(16), q.flatten(0, -2).split(16), strict=True):
        log_p, log_q = some_p.double().log_softmax(-1), some_q.double().log_softmax(-1)
        total += float(F.kl_div(log_q, log_p, log_target=True, reduction="sum"))
    return total / p[..., 0].numel()


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).double().square().mean().sqrt())


def fixed_tokens(vocab_size: int, length: int = LENGTH) -> torch.Tensor:
    """-> (1, length) ids, evenly from 0 to vocab_size - 1, in a fixed shuffled order."""
    spread = torch.linspace(0, vocab_size - 1, length, dtype=torch.float64).round().long()
    return spread[torch.randperm(length, generator=torch.Generator().manual_seed(0))].unsqueeze(0)


def verification_steps(weights: Weights) -> int | None:
    """The iterations at which a recurrent model is compared by default; None for a model of another kind."""
    drawer = _drawer(weights)
    return None if drawer is None else min(drawer.mean_depth, MAX_STEPS)


@torch.no_grad()
def native(weights: Weights, num_steps: int | None = None) -> Native:
    """What our model computes, and how far rounding moves it: the model is run again with the terms of every
    sum over features (matrix products, attention scores, means of norms) added in another order.

        noise = max over orders o of rms(logits - logits_o), and at least 2^-23 rms(logits)

    num_steps: iterations of a recurrent model. By default `verification_steps`, halved while rounding alone
    moves the logits by more than MAX_KL / 100: a chaotic recurrence multiplies it with each iteration, until
    nothing can be told. Raises CheckpointError for a tensor of another shape than the model's.
    """
    model = _native_model(weights)
    steps = verification_steps(weights) if num_steps is None else num_steps
    while True:
        inputs = _forward_inputs(weights, steps)
        logits, noise, noise_kl = model(_tokens(weights), **inputs), 0.0, 0.0
        for cut in _CUTS:
            with _OtherOrder(cut):
                moved = model(_tokens(weights), **inputs)
            noise, noise_kl = max(noise, _distance(logits, moved)), max(noise_kl, divergence(logits, moved))
        if num_steps is not None or steps in (None, 1) or noise_kl <= MAX_KL / 100:
            rounding = torch.finfo(torch.float32).eps * float(logits.double().square().mean().sqrt())
            return Native(logits, max(noise, rounding), noise_kl, steps)
        steps //= 2


@torch.no_grad()
def native_logits(weights: Weights, num_steps: int | None = None, seed: int = 0) -> torch.Tensor:
    """-> (1, S, V): what our model with these weights computes for the fixed tokens. seed: of the first
    state of a recurrent model; 0 is that of all other functions here. See `native`.
    """
    return _native_model(weights)(_tokens(weights), **_forward_inputs(weights, num_steps, seed))


@torch.no_grad()
def _native_model(weights: Weights) -> nn.Module:
    _, tied = model_tensors(weights.spec, weights.shape)
    with torch.device("meta"):
        model = weights.spec.build(weights.shape)
    model.to_empty(device="cpu")
    model.init_buffers("cpu")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        if name in tied:  # to_empty has made two tensors of them
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, parameters[tied[name]])
        else:
            _fill(parameter, weights.read(name), f"{weights.origin}: {name}")
    return model


class _OtherOrder(TorchFunctionMode):
    """Computes the same with the terms of each sum over features added in another order.

    Matrix products are cut in two at the share `cut` of the features, which needs no copy of a weight.
    """

    def __init__(self, cut: float):
        super().__init__()
        self.cut = cut

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and args[1].shape[1] > 1:
            x, weight, bias = (*args, None)[:3]
            at = max(1, int(self.cut * weight.shape[1]))
            return func(x[..., at:], weight[:, at:], bias) + func(x[..., :at], weight[:, :at])
        if func is F.scaled_dot_product_attention:
            query, key, *rest = args
            return func(query.flip(-1), key.flip(-1), *rest, **kwargs)
        if func is torch.Tensor.mean and args[1:2] == (-1,):
            return func(args[0].roll(int(self.cut * args[0].shape[-1]), -1), *args[1:], **kwargs)
        return func(*args, **kwargs)


def transformers_logits(folder: Path, weights: Weights, num_steps: int | None = None) -> torch.Tensor:
    """-> (1, S, V): what transformers computes for the fixed tokens with the model that it
    loads from `folder`.

    weights: of the family and shape that the folder describes. The only Python files that are run are this
    package's. Raises CheckpointError if transformers does not load the folder.
    """
    with _place(weights, folder) as place:
        return _logits(_load("AutoModelForCausalLM", place, weights, str(folder)), weights, num_steps)


@torch.no_grad()
def transformers_model(folder: Path, weights: Weights, dtype: torch.dtype) -> nn.Module:
    """The model that transformers loads from `folder`, its parameters cast to `dtype`, in evaluation mode.

    weights: as above. Raises CheckpointError.
    """
    with _place(weights, folder) as place:
        model = _load("AutoModelForCausalLM", place, weights, str(folder))
    for parameter in model.parameters():  # not the rotary tables, which transformers keeps in float32 too
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def transformers_logits_from(weights: Weights, num_steps: int | None = None) -> torch.Tensor:
    """-> (1, S, V): the same for weights that lie in no Hugging Face folder: they are filled in from memory.

    Raises CheckpointError if the key map does not cover the model of the transformers library.
    """
    import transformers

    layout, shape = weights.spec.hf, weights.shape
    with _place(weights, None) as place:
        config = _load("AutoConfig", place, weights, "config.json")
        with _WithoutDraws():
            trust = {"trust_remote_code": bool(layout.code)}
            model = transformers.AutoModelForCausalLM.from_config(config, **trust).float()
    theirs = dict(model.named_parameters())
    names = layout.key_map(shape)
    if unknown := sorted(set(theirs) ^ set(names.values())):
        raise CheckpointError(f"transformers and the key map of {weights.spec.name} disagree about {unknown}")
    for ours, name in names.items():
        _fill(theirs[name], layout.to_hf(ours, weights.read(ours), shape), f"{weights.origin}: {ours}")
    return _logits(model, weights, num_steps)


def unavailable(weights: Weights) -> str | None:
    """Why the comparison cannot run here, with the remedy; None if it can. Does not import transformers."""
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return "transformers is not installed: pip install 'transformers>=4.53'"
    if _number(version) < (4, 53):
        return f"transformers {version} is too old: pip install 'transformers>=4.53'"
    needed, available = _bytes_needed(weights), available_bytes()
    if needed > available:
        return (
            f"it needs about {needed / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are available: "
            f"convert where there is more"
        )
    return None


def parameter_count(weights: Weights) -> int:
    """Numbers in the whole model; tied ones count once."""
    shapes, tied = model_tensors(weights.spec, weights.shape)
    return sum(shape.numel() for name, shape in shapes.items() if name not in tied)


def _bytes_needed(weights: Weights) -> int:
    """One float32 model with what loading and a forward take beside it, two tensors of logits,
    and their difference in float32 and twice in float64.
    """
    logits = _tokens(weights).numel() * weights.shape.vocab_size
    return int(4 * 1.3 * parameter_count(weights)) + (3 * 4 + 2 * 8) * logits


def _drawer(weights: Weights, seed: int = 0) -> DrawnInputs | None:
    make = weights.spec.inputs
    return None if make is None else make(weights.shape, None, seed=seed, total_steps=1)


def _forward_inputs(weights: Weights, num_steps: int | None, seed: int = 0) -> dict[str, Any]:
    """What forward takes beside tokens: for both sides the same first state, as validation draws it."""
    drawer = _drawer(weights, seed)
    if drawer is None:
        return {}
    length = _tokens(weights).shape[1]
    microbatch = Microbatch(
        step=0, count=0, samples=(0,), rank=0, seq_len=length, device=torch.device("cpu"), dtype=torch.float32
    )
    return dict(drawer.at_depths([num_steps or min(drawer.mean_depth, MAX_STEPS)], microbatch).kwargs)


def _tokens(weights: Weights) -> torch.Tensor:
    return fixed_tokens(weights.shape.vocab_size, min(LENGTH, weights.shape.max_seq_len))


def _fill(parameter: torch.Tensor, tensor: torch.Tensor, name: str) -> None:
    if parameter.shape != tensor.shape:
        raise CheckpointError(
            f"{name} has shape {tuple(tensor.shape)}, but the model wants {tuple(parameter.shape)}"
        )
    parameter.copy_(tensor)


@torch.no_grad()
def _logits(model: nn.Module, weights: Weights, num_steps: int | None) -> torch.Tensor:
    """`model`: of the transformers library."""
    inputs = weights.spec.hf.forward_arguments(_forward_inputs(weights, num_steps))
    return model.eval()(input_ids=_tokens(weights), **inputs).logits.float()


def _load(kind: str, place: Path, weights: Weights, shown: str) -> Any:
    import transformers

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": bool(weights.spec.hf.code)}
    if kind == "AutoModelForCausalLM":
        # Both names are understood from 4.56 to 5, but the old one is warned about.
        options["dtype" if _number(transformers.__version__) >= (4, 56) else "torch_dtype"] = torch.float32
    try:
        return getattr(transformers, kind).from_pretrained(place, **options)
    except Exception as error:  # a library boundary: each version and file format has its own kinds
        raise CheckpointError(f"transformers cannot load {shown}: {type(error).__name__}: {error}") from error


def _number(version: str) -> tuple[int, ...]:
    """ "4.57.6" -> (4, 57)."""
    return tuple(int(part) for part in version.split(".")[:2])


@contextmanager
def _place(weights: Weights, folder: Path | None) -> Iterator[Path]:
    """A folder for transformers to load: `folder` itself, if its library has the class. Else a passing
    one with links to the files of `folder`, but with this package's code: that of a downloaded folder
    is not to be trusted.

    folder: None if only a configuration is wanted.
    """
    layout = weights.spec.hf
    if folder is not None and not layout.code:
        yield folder
        return
    fields = layout.config_fields(weights.shape)
    if folder is not None:
        named = {key: fields[key] for key in ("architectures", "auto_map")}
        fields = {**json.loads((folder / "config.json").read_text(encoding="utf-8")), **named}
    code = layout.code_files()
    # transformers keeps modules by the name of the folder, also when its files change:
    # a name for each content.
    digest = hashlib.sha256(repr(sorted(code.items())).encode()).hexdigest()[:16]
    with tempfile.TemporaryDirectory() as parent:
        place = Path(parent) / f"torchtitan_rd_{digest}"
        place.mkdir()
        for file in folder.iterdir() if folder is not None else ():
            if file.is_file() and file.suffix != ".py" and file.name != "config.json":
                (place / file.name).symlink_to(file.resolve())
        for name, content in {**code, "config.json": json.dumps(fields).encode()}.items():
            (place / name).write_bytes(content)
        yield place


class _WithoutDraws(TorchDispatchMode):
    """Fills with the mean instead of at random, which takes minutes for a large model.

    Left as they are, tensors could be drawn again for ever: torch's truncated normal does so
    until all is in bounds.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.normal_.default:
            return args[0].fill_(args[1] if len(args) > 1 else 0.0)
        if func is torch.ops.aten.uniform_.default:
            return args[0].zero_()
        return func(*args, **(kwargs or {}))
