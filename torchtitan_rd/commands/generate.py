"""Continues prompts with a trained model: a step folder, a run's folder, or an exported Hugging Face folder.

torchtitan-rd generate outputs/debug --prompt "The module" --temperature 0.7
torchtitan-rd generate outputs/recurrent_debug --prompt "The module" --depths 4,8,16,32
torchtitan-rd generate outputs/recurrent_debug --prompt "The module" --exit kl --kv latest-m4
torchrun --nproc_per_node 2 -m torchtitan_rd generate exported --prompts-file prompts.txt

docs/inference.md describes it. Models of spikes: torchtitan-rd generate-spikes.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tabulate import tabulate

from torchtitan_rd.errors import ConfigError
from torchtitan_rd.inference import (
    Answer,
    Drafting,
    ExitPolicy,
    Loaded,
    Report,
    Sampling,
    Settings,
    encode_chat,
    encode_prompt,
    generate,
    load_model,
)
from torchtitan_rd.inference.policy_file import read_policy
from torchtitan_rd.inference.ranks import over_ranks, process_group
from torchtitan_rd.job import Environment

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: list[str]) -> int:
    """Text goes to stdout, figures to stderr."""
    chosen = _parser().parse_args(arguments)
    settings, depths = settings_of(chosen)
    environment = Environment.read()
    loaded = load(chosen, environment)
    if loaded.source.kind == "spikes":
        raise ConfigError(f"{chosen.path} was trained on spikes: use torchtitan-rd generate-spikes")
    if chosen.interactive:
        return _converse(loaded, chosen, settings)

    prompts = _prompts(loaded, chosen)
    runs: list[int | None] = [*depths] or [settings.depth]
    with process_group(environment):
        for depth in runs:  # nothing is computed before all of them are known to be good
            replace(settings, depth=depth).check(loaded, prompts)
        reports = [_run(loaded, prompts, replace(settings, depth=d), chosen, environment) for d in runs]
    if environment.rank == 0:
        _print(chosen, prompts, loaded, depths, reports)
    return 0


def load(chosen: argparse.Namespace, environment: Environment) -> Loaded:
    """The model that the arguments of `add_model_arguments` describe."""
    return load_model(
        chosen.path,
        model=chosen.model,
        flavor=chosen.flavor,
        tokenizer_path=chosen.tokenizer,
        dtype=DTYPES.get(chosen.dtype),
        device=torch.device(chosen.device) if chosen.device else environment.device(),
    )


def _run(
    loaded: Loaded,
    prompts: Sequence[list[int]],
    settings: Settings,
    chosen: argparse.Namespace,
    environment: Environment,
) -> list[Report]:
    """-> one report a prompt on rank 0 (its batch's figures), nothing on the others."""
    streamed = _streams(chosen, prompts, environment)

    def own(numbers: Sequence[int]) -> list[Report]:
        reports = []
        size = chosen.batch_size or max(len(numbers), 1)
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            show = (lambda row, text: print(text, end="", flush=True)) if streamed else None
            report = generate(loaded, [prompts[n] for n in part], settings, numbers=part, on_text=show)
            reports += [replace(report, rows=[row]) for row in report.rows]
        return reports

    return over_ranks(len(prompts), environment, own) or []


def _streams(chosen: argparse.Namespace, prompts: Sequence[list[int]], environment: Environment) -> bool:
    return len(prompts) == environment.world_size == 1 and not (chosen.json or chosen.depths)


def _print(
    chosen: argparse.Namespace,
    prompts: Sequence[list[int]],
    loaded: Loaded,
    depths: Sequence[int],
    reports: Sequence[Sequence[Report]],
) -> None:
    if chosen.json:
        for depth, by_prompt in zip(depths or [chosen.depth], reports, strict=True):
            for report in by_prompt:
                print(json.dumps({"depth": depth, "kv_bytes": report.kv_bytes, **asdict(report.rows[0])}))
        return
    if depths:
        for number in range(len(prompts)):
            texts = [_text(by_prompt[number].rows[0]) for by_prompt in reports]
            print(
                tabulate(
                    [texts], headers=[f"depth {d}" for d in depths], maxcolwidths=max(100 // len(depths), 20)
                )
            )
    elif len(prompts) == 1 and reports[0][0].rows[0].text is not None and len(reports[0]) == 1:
        print()
    else:
        for number, report in enumerate(reports[0]):
            print(f"[{number}] {_text(report.rows[0])}")
    for number, by_prompt in enumerate(reports):
        print(_summary(depths[number] if depths else None, by_prompt), file=sys.stderr)


def _text(answer: Answer) -> str:
    return " ".join(map(str, answer.ids)) if answer.text is None else answer.text


def _summary(depth: int | None, reports: Sequence[Report]) -> str:
    answers = [report.rows[0] for report in reports]
    tokens = sum(len(answer.ids) for answer in answers)
    parts = [
        f"{tokens} tokens in {reports[0].seconds:.1f} s",
        f"KV cache {reports[0].kv_bytes / 2**20:.1f} MiB",
    ]
    steps = [n for answer in answers for n in answer.steps]
    if steps:
        parts.append(f"{sum(steps) / len(steps):.2f} iterations a token")
    if drafted := sum(report.drafted for report in reports):
        parts.append(
            f"{sum(report.accepted for report in reports) / drafted:.0%} of {drafted} drafted tokens accepted"
        )
    return ("" if depth is None else f"depth {depth}: ") + "; ".join(parts)


def _prompts(loaded: Loaded, chosen: argparse.Namespace) -> list[list[int]]:
    texts = list(chosen.prompt)
    if chosen.prompts_file:
        try:
            texts += Path(chosen.prompts_file).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"--prompts-file {chosen.prompts_file}: {error.strerror}") from None
    try:
        ids = [[int(id_) for id_ in text.replace(",", " ").split()] for text in chosen.prompt_ids]
    except ValueError:
        raise ConfigError(
            f"--prompt-ids {chosen.prompt_ids}: ids are whole numbers, as in '12 7 99'"
        ) from None
    if not texts and not ids:
        raise ConfigError("give a --prompt, --prompts-file, --prompt-ids, or --interactive")
    if chosen.chat:
        system = [{"role": "system", "content": chosen.system}] if chosen.system else []
        return [
            encode_chat(loaded.source.folder, [*system, {"role": "user", "content": text}]) for text in texts
        ] + ids
    return [encode_prompt(loaded.tokenizer, text) for text in texts] + ids


def _converse(loaded: Loaded, chosen: argparse.Namespace, settings: Settings) -> int:
    """Reads a line, answers it, until the end of the input. With --chat the conversation is remembered."""
    messages = [{"role": "system", "content": chosen.system}] if chosen.system else []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return 0
        if not line.strip():
            continue
        if chosen.chat:
            messages.append({"role": "user", "content": line})
            prompt = encode_chat(loaded.source.folder, messages)
        else:
            prompt = encode_prompt(loaded.tokenizer, line)
        report = generate(
            loaded, [prompt], settings, on_text=lambda row, text: print(text, end="", flush=True)
        )
        messages.append({"role": "assistant", "content": report.rows[0].text or ""})
        print()
        print(_summary(None, [report]), file=sys.stderr)


def settings_of(chosen: argparse.Namespace) -> tuple[Settings, list[int]]:
    """-> settings, and the depths to run them at if there are several. Raises ConfigError."""
    try:
        depths = [int(depth) for depth in chosen.depths.split(",")] if chosen.depths else []
    except ValueError:
        raise ConfigError(f"--depths {chosen.depths}: whole numbers, as in 4,8,16") from None
    _refuse_what_has_no_effect(chosen)

    kv, exits = chosen.kv, None
    if chosen.exit_policy:
        if chosen.exit:
            raise ConfigError("--exit-policy names a criterion already: leave out --exit")
        exits, kv = read_policy(Path(chosen.exit_policy), kv)
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
    def given(name: str) -> bool:
        value = getattr(chosen, name, None)
        return value is not None and value is not False  # zero is a value

    for needed, flags in (
        ("exit", ("exit_threshold", "min_steps", "check_every", "full_depth_prompt")),
        ("draft_steps", ("lookahead", "verification_threshold")),
        ("chat", ("system",)),
    ):
        for flag in flags:
            if given(flag) and not given(needed):
                raise ConfigError(
                    f"--{flag.replace('_', '-')} has no effect without --{needed.replace('_', '-')}"
                )
    if chosen.depths and chosen.depth is not None:
        raise ConfigError("--depth and --depths: give one of them")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchtitan-rd generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", help="step folder, run's folder, or Hugging Face folder")
    add = parser.add_argument_group("prompts").add_argument
    add("--prompt", action="append", default=[], help="may be given several times")
    add("--prompts-file", help="one prompt a line")
    add("--prompt-ids", action="append", default=[], help="token ids, for models without a tokenizer")
    add(
        "--chat", action="store_true", help="prompts are a user's messages: use the tokenizer's chat template"
    )
    add("--system", help="the system's message, with --chat")
    add("--interactive", action="store_true", help="read prompts from the terminal")

    add_sampling_arguments(parser, temperature=None, told="default 0.7; 0 with --draft-steps")
    add = parser.add_argument_group("length").add_argument
    add("--max-new-tokens", type=int, default=128)
    add("--stop", action="append", default=[], help="a string that ends the text; may be given several times")
    add("--ignore-eos", action="store_true")

    add_recurrent_arguments(parser)
    parser.add_argument("--depths", help="several --depth, side by side: 4,8,16,32")
    add_model_arguments(parser)
    parser.add_argument("--tokenizer", help="instead of the one it was trained with; 'none' for none")
    add = parser.add_argument_group("output").add_argument
    add("--batch-size", type=int, help="prompts at once (default: all)")
    add(
        "--json",
        action="store_true",
        help="a line a prompt: ids, text, iterations and exit values of every token",
    )
    return parser


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
    add("--kv", default="full", help="how positions share the cache, such as latest-m4 or compress-s16")
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
