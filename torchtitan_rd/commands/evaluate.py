"""Judges a trained model, or a baseline. `torchtitan-rd eval KIND --help` says more of each.

torchtitan-rd eval loss train_configs/debug.toml outputs/debug
torchtitan-rd eval pt-ppl aixsim 60M outputs/aixsim-60M/checkpoint/step-7075
"""

import importlib
import sys

from torchtitan_rd.config_loader import nearest

# Name -> module in commands/, and what it tells.
KINDS = {
    "loss": ("eval_loss", "loss on a run's held-out data"),
    "depth": ("eval_loss", "the same at many depths of a recurrent model, in one pass"),
    "pt-ppl": ("eval_ppl", "perplexity of a checkpoint on a data set"),
    "hf-ppl": ("eval_ppl", "the same of a Hugging Face folder, by the transformers library"),
    "hf-lm-eval": ("eval_harness", "tasks of lm-evaluation-harness"),
    "lm-eval": ("eval_harness", "its own command line, with checkpoints as a model"),
    "ngram": ("eval_ngram", "the loss of smoothed n-gram counts, a baseline"),
}


def main(arguments: list[str]) -> int:
    """Runs one kind; returns the exit status."""
    kinds = "\n".join(f"  {name:<11} {text}" for name, (_, text) in KINDS.items())
    usage = f"usage: torchtitan-rd eval KIND [arguments]\n\n{__doc__}\nkinds:\n{kinds}"
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0
    kind, *rest = arguments
    if kind not in KINDS:
        print(f"torchtitan-rd eval: unknown kind {kind!r}{nearest(kind, KINDS)}", file=sys.stderr)
        return 2
    return importlib.import_module(f"torchtitan_rd.commands.{KINDS[kind][0]}").main(kind, rest)
