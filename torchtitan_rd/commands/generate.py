"""Continues prompts with a trained model: a step folder, a run's folder, or an exported Hugging Face folder.

torchtitan-rd generate outputs/debug --prompt "The module" --temperature 0.7
torchtitan-rd generate outputs/recurrent_debug --prompt "The module" --depths 4,8,16,32
torchtitan-rd generate outputs/recurrent_debug --prompt "The module" --exit kl --kv latest-m4
torchtitan-rd generate tomg-group-umd/huginn-0125 --revision COMMIT --prompt "The"
torchrun --nproc_per_node 2 -m torchtitan_rd generate exported --prompts-file prompts.txt

docs/inference.md describes it. Models of spikes: torchtitan-rd generate-spikes.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

from torchtitan_rd.commands.arguments import (
    DTYPES,
    add_model_arguments,
    add_path_arguments,
    add_recurrent_arguments,
    add_sampling_arguments,
    at_least_1,
    device_of,
    settings_of,
)
from torchtitan_rd.commands.parsers import parser_of
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.inference import (
    Answer,
    Loaded,
    Report,
    Settings,
    encode_chat,
    encode_prompt,
    generate,
    load_model,
)
from torchtitan_rd.inference.loading import transformers_tokenizer
from torchtitan_rd.inference.ranks import model_folder, over_ranks, process_group
from torchtitan_rd.job import Environment


class Run(NamedTuple):
    """The prompts at one depth. reports: one a prompt, with the figures of its batch; nothing on ranks but 0.
    seconds: of all batches on all ranks.
    """

    reports: list[Report]
    seconds: float


def main(arguments: list[str]) -> int:
    """Text goes to stdout, figures to stderr."""
    chosen = _parser().parse_args(arguments)
    settings, depths = settings_of(chosen)
    environment = Environment.read()
    if chosen.interactive and environment.world_size > 1:
        raise ConfigError("--interactive reads from one terminal: start it without torchrun")
    device = device_of(chosen, environment)

    with process_group(environment, torch.device("cpu")):  # answers are small
        loaded = load(chosen, environment, device)
        if loaded.source.kind == "spikes":
            raise ConfigError(f"{chosen.path} was trained on spikes: use torchtitan-rd generate-spikes")
        if chosen.interactive:
            return _converse(loaded, chosen, settings)

        prompts = _prompts(loaded, chosen)
        each: list[int | None] = [*depths] or [settings.depth]
        for depth in each:  # nothing is computed before all of them are known to be good
            replace(settings, depth=depth).check(loaded, prompts)
        # The first prompt is rank 0's, so what is shown as it comes is shown by the rank that prints.
        streamed = len(prompts) == 1 and loaded.tokenizer is not None and not (chosen.json or depths)
        runs = [
            _run(loaded, prompts, replace(settings, depth=depth), chosen, environment, streamed)
            for depth in each
        ]

    if environment.rank == 0:
        _print(chosen, len(prompts), depths, runs, streamed)
    return 0


def load(chosen: argparse.Namespace, environment: Environment, device: torch.device) -> Loaded:
    """The model that the arguments of `add_model_arguments` describe. Collective."""
    return load_model(
        model_folder(chosen.path, chosen.revision, environment),
        model=chosen.model,
        flavor=chosen.flavor,
        tokenizer_path=chosen.tokenizer,
        dtype=DTYPES.get(chosen.dtype),
        device=device,
    )


def _run(
    loaded: Loaded,
    prompts: Sequence[list[int]],
    settings: Settings,
    chosen: argparse.Namespace,
    environment: Environment,
    streamed: bool,
) -> Run:
    begun = time.perf_counter()

    def own(numbers: Sequence[int]) -> list[Report]:
        reports = []
        size = chosen.batch_size or max(len(numbers), 1)
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            show = _show if streamed else None
            report = generate(loaded, [prompts[n] for n in part], settings, numbers=part, on_text=show)
            reports += [replace(report, rows=[row]) for row in report.rows]
        return reports

    reports = over_ranks(len(prompts), environment, own) or []
    return Run(reports, time.perf_counter() - begun)


def _show(row: int, text: str) -> None:
    print(text, end="", flush=True)


def _print(
    chosen: argparse.Namespace, count: int, depths: Sequence[int], runs: Sequence[Run], streamed: bool
) -> None:
    """count: of prompts. depths: several, or none for a single run. streamed: the text is there already."""
    if chosen.json:
        for depth, run in zip(depths or [chosen.depth], runs, strict=True):
            for report in run.reports:
                print(json.dumps({"depth": depth, "kv_bytes": report.kv_bytes, **asdict(report.rows[0])}))
        return
    if depths:
        for number in range(count):
            texts = [_text(run.reports[number].rows[0]) for run in runs]
            print(
                tabulate(
                    [texts], headers=[f"depth {d}" for d in depths], maxcolwidths=max(100 // len(depths), 20)
                )
            )
    elif count == 1:
        print("" if streamed else _text(runs[0].reports[0].rows[0]))
    else:
        for number, report in enumerate(runs[0].reports):
            print(f"[{number}] {_text(report.rows[0])}")
    for number, run in enumerate(runs):
        print(_summary(depths[number] if depths else None, run), file=sys.stderr)


def _text(answer: Answer) -> str:
    return " ".join(map(str, answer.ids)) if answer.text is None else answer.text


def _summary(depth: int | None, run: Run) -> str:
    reports = run.reports
    answers = [report.rows[0] for report in reports]
    tokens = sum(len(answer.ids) for answer in answers)
    parts = [
        f"{tokens} tokens in {run.seconds:.1f} s",
        f"KV cache {max(report.kv_bytes for report in reports) / 2**20:.1f} MiB",
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
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"--prompts-file {chosen.prompts_file} is no UTF-8 (byte {error.start}): convert it"
            ) from None

    try:
        ids = [[int(id_) for id_ in text.replace(",", " ").split()] for text in chosen.prompt_ids]
    except ValueError:
        raise ConfigError(
            f"--prompt-ids {chosen.prompt_ids}: ids are whole numbers, as in '12 7 99'"
        ) from None
    if not texts and not ids:
        raise ConfigError("give a --prompt, --prompts-file, --prompt-ids, or --interactive")
    if not chosen.chat:
        return [encode_prompt(loaded.tokenizer, text) for text in texts] + ids
    template = _chat_tokenizer(loaded, chosen)
    return [
        encode_chat(template, [*_system(chosen), {"role": "user", "content": text}]) for text in texts
    ] + ids


def _chat_tokenizer(loaded: Loaded, chosen: argparse.Namespace) -> Any:
    return transformers_tokenizer(
        loaded.source.folder, chosen.tokenizer, model=chosen.model, flavor=chosen.flavor
    )


def _system(chosen: argparse.Namespace) -> list[dict[str, str]]:
    return [{"role": "system", "content": chosen.system}] if chosen.system else []


def _converse(loaded: Loaded, chosen: argparse.Namespace, settings: Settings) -> int:
    """Reads a line, answers it, until the end of the input. With --chat the conversation is remembered."""
    settings.check(loaded, [])
    template = _chat_tokenizer(loaded, chosen) if chosen.chat else None
    messages = _system(chosen)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return 0
        if not line.strip():
            continue
        if template is not None:
            messages.append({"role": "user", "content": line})
            prompt = encode_chat(template, messages)
        else:
            prompt = encode_prompt(loaded.tokenizer, line)
        report = generate(loaded, [prompt], settings, on_text=_show)
        messages.append({"role": "assistant", "content": report.rows[0].text or ""})
        print()
        print(_summary(None, Run([report], report.seconds)), file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("generate", __doc__)
    add_path_arguments(parser)
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
    add("--batch-size", type=at_least_1, help="prompts at once (default: all)")
    add(
        "--json",
        action="store_true",
        help="a line a prompt: ids, text, iterations and exit values of every token",
    )
    return parser
