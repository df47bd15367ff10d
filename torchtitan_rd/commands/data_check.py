"""Reads every row of a run's data and lists those that would stop the run.

torchtitan-rd data check X.toml [--section.key value ...]

Status 0: every row can be trained on. Status 1: some cannot; each is printed with the reason,
and the value of training.skip_ranges that leaves them out.
"""

import sys
from pathlib import Path

from torchtitan_rd.checkpoint import saved_states
from torchtitan_rd.config import load_and_warn
from torchtitan_rd.data import (
    DataRanks,
    DataSet,
    check_held_out,
    dataset_vocab_size,
    get_dataset,
    load_tokenizer,
    training_sets,
)
from torchtitan_rd.data.check import Report, scan
from torchtitan_rd.job import Environment
from torchtitan_rd.validation import validation_keys

_SHOWN = 50


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit status."""
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return 0
    if not arguments[0].startswith("--"):
        arguments = ["--job.config_file", *arguments]
    loaded = load_and_warn(arguments, Environment.read())
    config = loaded.config
    parts = [(one, "train") for one in training_sets(config.training, steps=config.training.steps)]
    if config.validation.enable:
        held_out = validation_keys(config.validation, config.training, data_degree=1)
        row = get_dataset(held_out, "validation", config.validation.split)
        held = DataSet(held_out, row, section="validation")
        check_held_out([one for one, _ in parts], held, config.validation.split)
        parts.append((held, config.validation.split))

    # What the run in this dump folder reads of the hub is checked, not what is newest there.
    states = saved_states(config.checkpoint, Path(config.job.dump_folder))
    alone = DataRanks(lambda value: [value], 0, 0, states)
    tokenized = any(one.row.needs_tokenizer for one, _ in parts)
    tokenizer = load_tokenizer(alone.tokenizer(config.model.tokenizer_path)) if tokenized else None
    vocab_size = config.model.vocab_size or dataset_vocab_size(config.training, tokenizer)
    bad = 0
    for one, split in parts:
        keys = alone.pinned(one.keys, one.row, split, one.name)
        report = scan(
            keys, tokenizer=tokenizer, vocab_size=vocab_size, seed=config.training.seed, split=split
        )
        bad += len(report.problems)
        _print(one.section, report)
    return int(bad > 0)


def _print(section: str, report: Report) -> None:
    own = "training" if section == "validation" else section
    for problem in list(report.problems.values())[:_SHOWN]:
        print(problem if section in ("training", "validation") else f"{section}: {problem}")
    if len(report.problems) > _SHOWN:
        print(f"... and {len(report.problems) - _SHOWN} more")
    sys.stdout.write(
        f"{section}: {report.rows:,} rows, {report.size:,} {report.unit}; "
        f"{report.empty:,} empty, {report.skipped:,} skipped by {own}.skip_ranges, "
        f"{len(report.problems):,} that would stop a run\n"
    )
    if report.unlearned:
        print(
            f"{section}: {report.unlearned:,} conversations have no label within training.seq_len, where "
            "pack_samples = false cuts them off: nothing of them is learned"
        )
    if report.problems:
        print(f"to leave these out: skip_ranges = {report.skip_ranges}")
