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
    """text: what it does, in one line. module: below torchtitan_rd, with main(arguments) -> exit status; by
    default the one in commands/ that is called as the command.
    leading: arguments that stand before the user's, where a command is another name for part of one.
    """

    text: str
    module: str | None = None
    leading: tuple[str, ...] = ()


COMMANDS = {
    "train": Command("train from a TOML file (torchrun starts torchtitan_rd.train itself)", "train"),
    "pretrain": Command("the same; the file may also be named by --config"),
    "config": Command("print the resolved config with the origin of every value"),
    "plan": Command("memory, time and disk of a run before it is queued; what makes it fit"),
    "rehearse": Command("the whole life of a run once, small, on this machine: go or no-go"),
    "doctor": Command("what this environment can do, what is missing, and which rank is slow"),
    "launch": Command("submit a run to Slurm, as one job or a chain, with what it takes"),
    "generate-cfg": Command("write the config of a run of 22 tokens a parameter"),
    "count-params": Command("parameters of a model, in all and by part"),
    "data": Command("prepare data, or look for what would stop a run on it"),
    "download-dataset": Command("fetch a data set from the Hugging Face hub"),
    "convert-ckpt": Command("a checkpoint as a Hugging Face folder"),
    "eval": Command("loss, perplexity, tasks, and baselines of a trained model", "commands.evaluate"),
    "pt-ppl": Command("another name for eval pt-ppl", "commands.evaluate", ("pt-ppl",)),
    "hf-ppl": Command("another name for eval hf-ppl", "commands.evaluate", ("hf-ppl",)),
    "hf-lm-eval": Command("another name for eval hf-lm-eval", "commands.evaluate", ("hf-lm-eval",)),
    "generate": Command("continue prompts with a trained model"),
    "hf-gen": Command("the same with the flags of the CLM tutorial"),
    "generate-spikes": Command("continue recordings with a model of spikes"),
    "pareto": Command("loss against iterations and memory under every exit criterion"),
    "layers": Command("how much each layer of a dense model changes the residual stream"),
    "report": Command("runs as one HTML page of charts"),
    "checkpoints": Command("list the checkpoints of a run; --prune clears away leftovers"),
    "verify": Command("check a checkpoint's files against its manifest"),
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
    module = command.module or f"commands.{name.replace('-', '_')}"
    init_logging()
    try:
        return importlib.import_module(f"torchtitan_rd.{module}").main([*command.leading, *rest])
    except TorchtitanRDError as error:
        print(mask_text(f"{type(error).__name__}: {error}"), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
