"""Draws the loss of one or more runs over the tokens seen.

python benchmarks/plot_loss.py docs/loss_debug.png outputs/debug/metrics.jsonl [more/metrics.jsonl ...]
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def main(target: str, *journals: str) -> None:
    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    for journal in map(Path, journals):
        rows = [json.loads(line) for line in journal.read_text().splitlines()]
        axes.plot(
            [row["tokens_seen"] for row in rows], [row["loss"] for row in rows], label=journal.parent.name
        )
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("training loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
