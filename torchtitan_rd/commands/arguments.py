"""Arguments that several commands have in common."""

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from torchtitan_rd.data import DATASETS
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.inference import Drafting, ExitPolicy, Sampling, Settings
from torchtitan_rd.inference.policy_file import read_policy
from torchtitan_rd.job import Environment
from torchtitan_rd.validation import ValidationConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPTS = ("prompt", "prompts_file", "prompt_ids")
SAMPLING = ("top_k", "top_p", "min_p")
EXITS = ("exit_threshold", "min_steps", "check_every", "full_depth_prompt")


def at_least_1(text: str) -> int:
    """For `type=` of argparse."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def device_of(chosen: argparse.Namespace, environment: Environment) -> torch.device:
    """What --device names (`cuda`: this rank's GPU), else this rank's GPU or the CPU. Raises ConfigError."""
    if chosen.device is None:
        return environment.device()
    try:
        device = torch.device(chosen.device)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {chosen.device}: it is cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {chosen.device}: there is no GPU here")
    # A process group wants to know which of several it is.
    return environment.device() if device.type == "cuda" and device.index is None else device


def narrowed(validation: ValidationConfig, chosen: argparse.Namespace, dataset: str) -> ValidationConfig:
    """The section [validation] with --split and --sequences in place of its own. dataset: of training. Raises
    ConfigError for a split of data that is made here: the result would bear its name and be of all of it.
    """
    dataset = validation.dataset or dataset
    if chosen.split is not None and dataset in DATASETS and DATASETS[dataset].samples:
        raise ConfigError(f"--split {chosen.split} has no effect: {dataset} is made here and has no splits")
    given = {name: getattr(chosen, name) for name in ("split", "sequences")}
    return validation.model_copy(update={name: value for name, value in given.items() if value is not None})


def check_outputs(chosen: argparse.Namespace, *flags: str) -> None:
    """Raises ConfigError for a file that cannot be written: before the work, not after it."""
    for flag in flags:
        given = getattr(chosen, flag)
        if given is None:
            continue
        path = Path(given).resolve()
        if path.is_dir():
            raise ConfigError(f"--{flag} {given} is a folder: name a file in it")
        if not path.parent.is_dir():
            raise ConfigError(f"--{flag} {given}: there is no such folder")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ConfigError(f"--{flag} {given} may not be written: its permissions forbid it")


def check_plots(chosen: argparse.Namespace, flag: str) -> None:
    """Raises ConfigError if the flag asks for a picture and there is nothing to draw it with."""
    if is_given(chosen, flag) and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"--{flag} needs matplotlib: pip install 'torchtitan_rd[plots]'")


def settings_of(chosen: argparse.Namespace) -> tuple[Settings, list[int]]:
    """-> settings, and the depths to run them at if there are several. Raises ConfigError."""
    try:
        depths = [int(depth) for depth in chosen.depths.split(",")] if chosen.depths else []
    except ValueError:
        raise ConfigError(f"--depths {chosen.depths}: whole numbers, as in 4,8,16") from None
    _refuse_what_has_no_effect(chosen)

    kv, exits = chosen.kv or "full", None
    if chosen.exit_policy:
        if chosen.exit:
            raise ConfigError("--exit-policy names a criterion already: leave out --exit")
        exits, kv = read_policy(Path(chosen.exit_policy), kv)
        if chosen.kv not in (None, kv):
            raise ConfigError(f"--exit-policy {chosen.exit_policy} names kv = {kv!r}: leave out --kv")
    elif chosen.exit:
        exits = ExitPolicy(
            chosen.exit,
            chosen.exit_threshold,
            min_steps=1 if chosen.min_steps is None else chosen.min_steps,
            every=1 if chosen.check_every is None else chosen.check_every,
            in_prefill=not chosen.full_depth_prompt,
        )

    drafting = None
    if chosen.draft_steps is not None:
        lookahead = 8 if chosen.lookahead is None else chosen.lookahead
        share = 1.0 if chosen.verification_threshold is None else chosen.verification_threshold
        drafting = Drafting(chosen.draft_steps, lookahead, share)
    temperature = chosen.temperature
    if temperature is None:
        temperature = 0.0 if drafting else 0.7  # drafts are verified greedily
    if temperature == 0:
        refuse(chosen, SAMPLING, "with temperature 0, which takes the most likely token")

    settings = Settings(
        max_new_tokens=chosen.max_new_tokens,
        sampling=Sampling(temperature, chosen.top_k, chosen.top_p, chosen.min_p, chosen.repetition_penalty),
        seed=chosen.seed,
        stop=tuple(chosen.stop),
        use_eos=not chosen.ignore_eos,
        depth=chosen.depth,
        kv=kv,
        exits=exits,
        continuous=chosen.continuous,
        init_scale=chosen.init_scale,
        drafting=drafting,
    )
    return settings, depths


def _refuse_what_has_no_effect(chosen: argparse.Namespace) -> None:
    if chosen.exit in (None, "none"):
        refuse(chosen, EXITS, "without --exit")
    if chosen.draft_steps is None:
        refuse(chosen, ("lookahead", "verification_threshold"), "without --draft-steps")
    if chosen.depths and chosen.depth is not None:
        raise ConfigError("--depth and --depths: give one of them")

    if not is_given(chosen, "chat"):
        refuse(chosen, ("system",), "without --chat")
    elif chosen.prompt_ids:
        raise ConfigError("--prompt-ids are taken as they are: leave out --chat, or give a --prompt")
    if is_given(chosen, "interactive"):
        refuse(chosen, (*PROMPTS, "depths", "batch_size", "json"), "with --interactive")


def refuse(chosen: argparse.Namespace, flags: Sequence[str], where: str) -> None:
    """Raises ConfigError if one of the flags is given."""
    for flag in flags:
        if is_given(chosen, flag):
            raise ConfigError(f"--{flag.replace('_', '-')} has no effect {where}")


def is_given(chosen: argparse.Namespace, flag: str) -> bool:
    """Of a command that has it. Zero is a value."""
    value = getattr(chosen, flag, None)
    return value is not None and value is not False and value != []


def add_path_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("path", help="step folder, run's folder, Hugging Face folder, or a repository on the hub")
    add("--revision", help="commit, branch or tag of the repository (default: the newest commit)")


def add_sampling_arguments(parser: argparse.ArgumentParser, temperature: float | None, told: str) -> None:
    """temperature: the default, which `told` tells."""
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=float, default=temperature, help=f"0: the most likely token ({told})")
    add("--top-k", type=int)
    add("--top-p", type=float)
    add("--min-p", type=float)
    add("--repetition-penalty", type=float, default=1.0)
    add("--seed", type=int, default=0, help="of draws and of first states")


def add_recurrent_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("recurrent models").add_argument
    add("--depth", type=int, help="iterations (default: the model's mean in training)")
    add("--kv", help="how positions share the cache, such as latest-m4 or compress-s16 (default full)")
    add("--exit", help="criterion to leave the recurrence by, such as kl or latent-diff")
    add("--exit-threshold", type=float, help="default: the criterion's")
    add("--exit-policy", help="a TOML file with criterion, threshold, min_steps, every, in_prefill, kv")
    add("--min-steps", type=int, help="iterations before the criterion counts (default 1)")
    add("--check-every", type=int, help="iterations between two checks (default 1)")
    add("--full-depth-prompt", action="store_true", help="the criterion is not asked in the prompt")
    add(
        "--continuous",
        action="store_true",
        help="a token's recurrence starts from the last state of the one before",
    )
    add("--init-scale", type=float, default=1.0, help="of the noise that is the first state; 0: none")
    add("--draft-steps", type=int, help="self-speculative decoding: iterations of a draft")
    add("--lookahead", type=int, help="tokens that are drafted before they are verified (default 8)")
    add("--verification-threshold", type=float, help="1, the default: only the most likely token is accepted")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", help="the family that it must be of")
    add("--flavor", help="the shape of a checkpoint that does not tell it")
    add("--dtype", choices=DTYPES, help="of the matrices (default: as stored)")
    add("--device", help="cpu or cuda (default: a GPU if there is one)")
