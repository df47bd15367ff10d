"""Tasks of lm-evaluation-harness (the extra lm-eval).

torchtitan-rd eval hf-lm-eval exported/ --tasks "['wikitext']" --dtype float16
torchtitan-rd eval lm-eval run --model torchtitan_rd --model_args pretrained=outputs/debug --tasks arc_easy
torchtitan-rd eval lm-eval run --model torchtitan_rd --tasks gsm8k_cot --apply_chat_template \\
    --model_args pretrained=outputs/raven,depth=32,exit=kl,exit_threshold=0.001

hf-lm-eval evaluates a Hugging Face folder by lm_eval's own model; lm-eval is lm_eval's command line
with the model torchtitan_rd known to it, which reads step folders too. docs/evaluation.md describes it.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from torchtitan_rd.commands.parsers import parser_of
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.inference.loading import open_weights
from torchtitan_rd.whole_file import whole_file

RESULTS = "results.yaml"


def main(kind: str, arguments: list[str]) -> int:
    if kind == "lm-eval":
        _find_lm_eval()
        return _command_line(arguments)
    chosen = _parser().parse_args(arguments)
    _find_lm_eval()
    tasks = parse_tasks(chosen.tasks)
    weights = open_weights(Path(chosen.model))  # names a mistake before anything is built

    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    manager = TaskManager(include_path=chosen.include_path)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ConfigError(f"--tasks: lm_eval knows no {', '.join(unknown)}")

    found = simple_evaluate(
        model="hf",
        model_args={
            "pretrained": chosen.model,
            "tokenizer": chosen.tokenizer or chosen.model,
            "dtype": chosen.dtype,
            "max_length": chosen.max_seq_len,
            "trust_remote_code": bool(weights.spec.hf.code) and chosen.trust_remote_code,
        },
        tasks=tasks,
        num_fewshot=chosen.num_fewshot,
        batch_size=chosen.batch_size,
        limit=chosen.limit,
        device=chosen.device,
        task_manager=manager,
    )

    print(make_table(found))
    if "groups" in found:
        print(make_table(found, "groups"))
    if chosen.save_dir is not None:
        _save({key: value for key, value in found.items() if key != "samples"}, Path(chosen.save_dir))
    return 0


def _find_lm_eval() -> None:
    """Makes our model known to it. Raises ConfigError if it is missing."""
    importlib.import_module("torchtitan_rd.inference.harness")


def parse_tasks(text: str) -> list[str]:
    """`a,b`, or a list as in "['a', 'b']". Raises ConfigError if there are none."""
    tasks = [task.strip(" '\"") for task in text.strip().removeprefix("[").removesuffix("]").split(",")]
    if not all(tasks):
        raise ConfigError(f"--tasks {text!r}: names of tasks, as in wikitext,arc_easy")
    return tasks


def _command_line(arguments: list[str]) -> int:
    """lm_eval reads sys.argv."""
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0


def _save(results: dict[str, Any], folder: Path) -> None:
    plain = json.loads(json.dumps(results, default=str))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--save_dir {folder}: {error.strerror}") from None
    with whole_file(folder / RESULTS, "--save_dir") as part:
        part.write_text(yaml.safe_dump(plain), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("eval hf-lm-eval", __doc__)
    add = parser.add_argument
    add("model", help="Hugging Face folder")
    add("--tokenizer", help="folder of another tokenizer")
    add("--tasks", default="wikitext", help="names, as in wikitext,arc_easy (default wikitext)")
    add("--include_path", help="folder with YAML files of further tasks")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    add("--num_fewshot", type=int)
    add("--batch_size", default="32")
    add("--limit", type=float, help="examples at most; below 1: this share of them")
    add("--max_seq_len", type=int, default=2048)
    add("--save_dir", help=f"write {RESULTS} there")
    add("--device", help="cpu or cuda")
    add("--trust_remote_code", action="store_true", help="run the Python files in the folder (a raven's)")
    return parser
