"""Judges a trained model, or a baseline. `torchtitan-rd eval KIND --help` says more of each."""

import importlib
import sys

KINDS = {
    "loss": ("torchtitan_rd.commands.eval_loss", "loss on a run's held-out data"),
    "depth": (
        "torchtitan_rd.commands.eval_loss",
        "the same at many depths of a recurrent model, in one pass",
    ),
    "pt-ppl": ("torchtitan_rd.commands.eval_ppl", "perplexity of a checkpoint on a data set"),
    "hf-ppl": (
        "torchtitan_rd.commands.eval_ppl",
        "the same of a Hugging Face folder, by the transformers library",
    ),
    "hf-lm-eval": ("torchtitan_rd.commands.eval_harness", "tasks of lm-evaluation-harness"),
    "lm-eval": ("torchtitan_rd.commands.eval_harness", "its own command line, with checkpoints as a model"),
    "ngram": ("torchtitan_rd.commands.eval_ngram", "the loss of smoothed n-gram counts, a baseline"),
}


def main(arguments: list[str]) -> int:
    """Runs one kind; returns the exit status."""
    usage = "usage: torchtitan-rd eval KIND [arguments]\n\nkinds:\n" + "\n".join(
        f"  {name:<11} {text}" for name, (_, text) in KINDS.items()
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0
    kind, *rest = arguments
    if kind not in KINDS:
        print(f"torchtitan-rd eval: unknown kind {kind!r}\n{usage}", file=sys.stderr)
        return 2
    return importlib.import_module(KINDS[kind][0]).main(kind, rest)
