"""`python -m torchtitan_rd <command>` (or `torchtitan-rd`): a table of commands,
each imported when called.
"""

import importlib
import os
import select
import sys
from typing import NamedTuple

from torchtitan_rd.errors import TorchtitanRDError
from torchtitan_rd.log import init_logging
from torchtitan_rd.masking import mask_text

NOBODY_READS = 128 + 13
"""The status that shells give a program whose output nobody reads any more (SIGPIPE)."""


class Command(NamedTuple):
    """module: has main(arguments) -> exit status. text: what it does, in one line.
    leading: arguments that stand before the user's, where a command is another name for part of one.
    """

    module: str
    text: str
    leading: tuple[str, ...] = ()


COMMANDS = {
    "train": Command(
        "torchtitan_rd.train", "train from a TOML file (torchrun starts torchtitan_rd.train itself)"
    ),
    "pretrain": Command(
        "torchtitan_rd.commands.pretrain", "the same; the file may also be named by --config"
    ),
    "config": Command(
        "torchtitan_rd.commands.config", "print the resolved config with the origin of every value"
    ),
    "plan": Command(
        "torchtitan_rd.commands.plan", "memory, time and disk of a run before it is queued; what makes it fit"
    ),
    "rehearse": Command(
        "torchtitan_rd.commands.rehearse", "the whole life of a run once, small, on this machine: go or no-go"
    ),
    "doctor": Command(
        "torchtitan_rd.commands.doctor",
        "what this environment can do, what is missing, and which rank is slow",
    ),
    "launch": Command(
        "torchtitan_rd.commands.launch", "submit a run to Slurm, as one job or a chain, with what it takes"
    ),
    "generate-cfg": Command(
        "torchtitan_rd.commands.generate_cfg", "write the config of a run of 22 tokens a parameter"
    ),
    "count-params": Command(
        "torchtitan_rd.commands.count_params", "parameters of a model, in all and by part"
    ),
    "data": Command("torchtitan_rd.commands.data", "prepare data, or look for what would stop a run on it"),
    "download-dataset": Command(
        "torchtitan_rd.commands.download_dataset", "fetch a data set from the Hugging Face hub"
    ),
    "convert-ckpt": Command("torchtitan_rd.commands.convert_ckpt", "a checkpoint as a Hugging Face folder"),
    "eval": Command(
        "torchtitan_rd.commands.evaluate", "loss, perplexity, tasks, and baselines of a trained model"
    ),
    "pt-ppl": Command("torchtitan_rd.commands.evaluate", "another name for eval pt-ppl", ("pt-ppl",)),
    "hf-ppl": Command("torchtitan_rd.commands.evaluate", "another name for eval hf-ppl", ("hf-ppl",)),
    "hf-lm-eval": Command(
        "torchtitan_rd.commands.evaluate", "another name for eval hf-lm-eval", ("hf-lm-eval",)
    ),
    "generate": Command("torchtitan_rd.commands.generate", "continue prompts with a trained model"),
    "hf-gen": Command("torchtitan_rd.commands.hf_gen", "the same with the flags of the CLM tutorial"),
    "generate-spikes": Command(
        "torchtitan_rd.commands.generate_spikes", "continue recordings with a model of spikes"
    ),
    "pareto": Command(
        "torchtitan_rd.commands.pareto", "loss against iterations and memory under every exit criterion"
    ),
    "layers": Command(
        "torchtitan_rd.commands.layers", "how much each layer of a dense model changes the residual stream"
    ),
    "report": Command("torchtitan_rd.commands.report", "runs as one HTML page of charts"),
    "checkpoints": Command(
        "torchtitan_rd.commands.checkpoints", "list the checkpoints of a run; --prune clears away leftovers"
    ),
    "verify": Command("torchtitan_rd.commands.verify", "check a checkpoint's files against its manifest"),
}


def usage() -> str:
    lines = [f"  {name:<16} {command.text}" for name, command in COMMANDS.items()]
    text = "\n".join(lines)
    return (
        f"usage: torchtitan-rd COMMAND [arguments]\n\ncommands:\n{text}\n\n"
        "`torchtitan-rd COMMAND --help` says more of each, with examples."
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status. A user's mistake is one message on stderr and status 1; a
    reader that goes, as `head` does, ends the command without a word.
    """
    try:
        status = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()  # what is left would be written behind all handlers
        return status
    except BrokenPipeError:
        if not _reader_is_gone():  # of another pipe, as between the processes of a loader
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # what stands in for it is no file
        return False
    poll = select.poll()
    poll.register(output, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        from torchtitan_rd.config_loader import nearest

        print(f"torchtitan-rd: unknown command {name!r}{nearest(name, COMMANDS)}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    init_logging()
    try:
        return importlib.import_module(command.module).main([*command.leading, *rest])
    except TorchtitanRDError as error:
        print(mask_text(f"{type(error).__name__}: {error}"), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
