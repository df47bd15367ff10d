"""`python -m torchtitan_rd <command>` (or `torchtitan-rd`): a table of commands,
each imported when called.
"""

import importlib
import sys

from torchtitan_rd.errors import TorchtitanRDError
from torchtitan_rd.log import init_logging
from torchtitan_rd.masking import mask_text

COMMANDS = {
    "train": ("torchtitan_rd.train", "train from a TOML file (torchrun starts torchtitan_rd.train itself)"),
    "config": ("torchtitan_rd.commands.config", "print the resolved config with the origin of every value"),
    "data": ("torchtitan_rd.commands.data", "prepare data, or look for what would stop a run on it"),
    "eval": ("torchtitan_rd.commands.evaluate", "loss, perplexity, tasks, and baselines of a trained model"),
    "generate": ("torchtitan_rd.commands.generate", "continue prompts with a trained model"),
    "generate-spikes": (
        "torchtitan_rd.commands.generate_spikes",
        "continue recordings with a model of spikes",
    ),
    "pareto": (
        "torchtitan_rd.commands.pareto",
        "loss against iterations and memory under every exit criterion",
    ),
    "report": ("torchtitan_rd.commands.report", "runs as one HTML page of charts"),
    "verify": ("torchtitan_rd.commands.verify", "check a checkpoint's files against its manifest"),
}


def usage() -> str:
    lines = [f"  {name:<15} {text}" for name, (_, text) in COMMANDS.items()]
    return "usage: torchtitan-rd COMMAND [arguments]\n\ncommands:\n" + "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status. A user's mistake is one message on stderr and status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"torchtitan-rd: unknown command {command!r}\n{usage()}", file=sys.stderr)
        return 2
    init_logging()
    try:
        return importlib.import_module(COMMANDS[command][0]).main(rest)
    except TorchtitanRDError as error:
        print(mask_text(f"{type(error).__name__}: {error}"), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
