"""Writes the config of a run that trains a model on about 22 tokens a parameter (Chinchilla, CLM).

torchtitan-rd generate-cfg --model_flavor 60M --batch_size 48 --data_parallel_replicate_degree 2 \\
    --compile true --save_path configs/tutorial-60M.yaml
torchtitan-rd generate-cfg --model_arch raven --model_flavor magpie-huginn-150m --budget effective \\
    --dataset packed --dataset_path rows/ --vocab_size 32000 --num_gpus 8 --save_path configs/magpie.toml
torchtitan-rd config configs/tutorial-60M.yaml          # what it runs

The path says the format: .yaml, .yml or .toml. The file holds only keys that differ from the defaults.
docs/commands.md describes it.
"""

import argparse
from pathlib import Path
from typing import Any

from torchtitan_rd.budget import CLM_TOKENIZER, BudgetedRun, budgeted_run
from torchtitan_rd.commands.parsers import parser_of
from torchtitan_rd.config import JobConfig
from torchtitan_rd.config_file import config_text
from torchtitan_rd.config_loader import load_config
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.models import get_flavor, get_spec
from torchtitan_rd.whole_file import whole_file

PRECISIONS = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp32": "float32", "float32": "float32"}


def main(arguments: list[str]) -> int:
    chosen = _parser().parse_args(arguments)
    # Names of the model first: a path follows from them.
    get_flavor(get_spec(chosen.model_arch), chosen.model_flavor)
    path = Path(chosen.save_path or f"configs/{chosen.model_arch}-{chosen.model_flavor}.yaml").expanduser()
    config_text(path, {})
    if path.exists() and not chosen.overwrite:
        raise ConfigError(f"--save_path {path} exists: pass --overwrite to replace it")

    run = budgeted_run(
        _config(chosen),
        num_gpus=chosen.num_gpus,
        tokens_per_parameter=chosen.token_num_scale,
        size=chosen.budget,
    )
    lines = report(run, chosen)
    _write(path, config_text(path, _sections(run.config), comment="\n".join(lines)))
    print("\n".join([*lines, f"wrote {path}"]))
    return 0


def report(run: BudgetedRun, chosen: argparse.Namespace) -> list[str]:
    """What was counted and decided, a line each."""
    training, budget = run.config.training, run.budgets[chosen.budget]
    degrees = run.config.parallelism
    ranks = (
        f"{run.ranks} GPUs: {degrees.data_parallel_replicate_degree} x "
        f"{degrees.data_parallel_shard_degree} (replicate x shard)"
    )
    if -1 in (chosen.data_parallel_shard_degree, chosen.data_parallel_replicate_degree):
        ranks += (
            ", of which --num_gpus decided one"
            if chosen.num_gpus
            else "; a degree of -1 counts as 1 without --num_gpus"
        )

    lines = [
        f"{run.config.model.name} {run.config.model.flavor}: {run.count.total:,} parameters, "
        f"{run.count.without_input_embedding:,} without the input embedding; vocabulary {run.vocab_size:,}",
        ranks,
        f"batch: {training.global_batch_size} sequences of {training.seq_len} tokens = "
        f"{training.global_batch_size * training.seq_len:,} tokens a step",
    ]
    for size, one in run.budgets.items():
        used = " (used)" if len(run.budgets) > 1 and one is budget else ""
        unfolded = f", unfolded to {run.count.mean_depth} iterations," if size == "effective" else ""
        lines.append(
            f"budget by the {size} {one.parameters:,} parameters{unfolded} x {chosen.token_num_scale:g}: "
            f"{one.tokens:,} tokens, {one.steps:,} steps, {one.warmup_steps:,} of them to warm up{used}"
        )
    return lines


def _config(chosen: argparse.Namespace) -> JobConfig:
    """All but what the budget decides. Through the loader, which tells of wrong values."""
    name = f"{chosen.model_arch}-{chosen.model_flavor}"
    if chosen.tensor_parallel_degree != 1:
        raise ConfigError("--tensor_parallel_degree: there is no tensor parallelism here; leave it at 1")
    settings = {
        "job.dump_folder": chosen.dump_folder or f"./outputs/{name}",
        "job.description": f"Pretrain {chosen.model_arch} {chosen.model_flavor}",
        "model.name": chosen.model_arch,
        "model.flavor": chosen.model_flavor,
        "model.tokenizer_path": chosen.tokenizer_path,
        "model.vocab_size": chosen.vocab_size,
        "optimizer.lr": chosen.learning_rate,
        # The degrees and the batch as they were asked for; the budget completes them.
        "training.dataset": chosen.dataset,
        "training.dataset_path": chosen.dataset_path,
        "training.seq_len": chosen.seq_len,
        "training.local_batch_size": chosen.batch_size,
        "training.mixed_precision_param": PRECISIONS[chosen.mixed_precision_param],
        "training.seed": chosen.seed,
        "parallelism.data_parallel_replicate_degree": chosen.data_parallel_replicate_degree,
        "parallelism.data_parallel_shard_degree": chosen.data_parallel_shard_degree,
        "compile.enable": chosen.compile,
        "checkpoint.enable": True,
        "checkpoint.keep_latest_k": chosen.keep_last_k_ckpts,
        "metrics.enable_wandb": chosen.enable_wandb,
    }
    arguments = [f"--{key}={value}" for key, value in settings.items() if value is not None]
    return load_config(JobConfig, arguments).config


def _sections(config: JobConfig) -> dict[str, dict[str, Any]]:
    """What differs from the defaults, and what a reader looks for first even where it does not."""
    changes = config.changes()
    always: dict[str, dict[str, Any]] = {
        "model": {"name": config.model.name, "flavor": config.model.flavor},
        "training": {"dataset": config.training.dataset, "seq_len": config.training.seq_len},
    }
    return changes | {section: keys | changes.get(section, {}) for section, keys in always.items()}


def _write(path: Path, text: str) -> None:
    """The whole file or none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--save_path {path}: {error.strerror}") from None
    with whole_file(path, "--save_path") as part:
        part.write_text(text, encoding="utf-8")


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("generate-cfg", __doc__, allow_abbrev=False)
    add = parser.add_argument_group("model and data").add_argument
    add("--model_arch", default="aixsim", help="model family (default aixsim)")
    add("--model_flavor", default="60M", help="its size (default 60M)")
    add("--dataset", default="fineweb-edu", help="a row of the table of data sets (default fineweb-edu)")
    add("--dataset_path", help="where to read it instead of the hub")
    add("--tokenizer_path", "--tokenizer", default=CLM_TOKENIZER, help=f"default {CLM_TOKENIZER}")
    add("--vocab_size", type=int, help="default: as many ids as the tokenizer (spikes: 256) has")
    add("--seq_len", type=int, default=2048, help="tokens of context (default 2048)")

    add = parser.add_argument_group("budget").add_argument
    add("--token_num_scale", type=float, default=22.0, help="tokens a parameter (default 22)")
    add(
        "--budget",
        choices=("stored", "effective"),
        default="stored",
        help="recurrent models: the parameters that count, as stored (default) or unfolded to the mean depth",
    )
    add("--batch_size", type=int, default=8, help="sequences of a GPU (default 8)")
    add("--data_parallel_replicate_degree", type=int, default=1, help="copies of the model (default 1)")
    add(
        "--data_parallel_shard_degree",
        type=int,
        default=-1,
        help="GPUs a copy; -1, the default: what is left",
    )
    add("--num_gpus", type=int, help="that a degree of -1 is worked out from (default: it counts as 1)")
    add("--tensor_parallel_degree", type=int, default=1, help="1 is all there is")

    add = parser.add_argument_group("training").add_argument
    add("--learning_rate", type=float, default=1e-4, help="default 1e-4")
    add("--mixed_precision_param", choices=PRECISIONS, default="bf16", help="default bf16")
    add("--compile", type=_switch, default=False, metavar="true|false", help="torch.compile (default false)")
    add("--seed", type=int, default=42, help="default 42")
    add("--keep_last_k_ckpts", type=int, default=3, help="checkpoints to keep (default 3)")
    add("--enable_wandb", type=_switch, default=True, metavar="true|false", help="default true")

    add = parser.add_argument_group("output").add_argument
    add("--save_path", help="default configs/ARCH-FLAVOR.yaml")
    add("--dump_folder", help="job.dump_folder of the run (default ./outputs/ARCH-FLAVOR)")
    add("--overwrite", action="store_true", help="replace the file")
    return parser
