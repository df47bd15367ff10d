"""What train_retrofit_debug.sh computes: steps of the dense model at equal FLOPs, and the table at its end.

python scripts/retrofit_demo.py steps RECURRENT.toml DENSE.toml [--section.key value ...]
python scripts/retrofit_demo.py table FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

from torchtitan_rd.config import load
from torchtitan_rd.job import Environment
from torchtitan_rd.run_plan import RunPlan, resolve

RUNS = {
    "dense": "dense, before",
    "retrofitted": "retrofitted",
    "random": "recurrent from random weights",
    "dense_continued": "dense, continued",
}


def training_flops(plan: RunPlan, steps: int) -> float:
    """FLOPs of so many updates, forward and backward, without recompute: at the depths that they draw."""
    family, total = plan.draws.family, 0.0
    for step in range(1, steps + 1):
        depth = None if family is None else family.sampler.draw(step)
        count = plan.spec.flops(plan.shape, plan.seq_len, num_steps=depth)
        total += (count.matmul + count.attention_causal) * plan.tokens_per_step
    return total


def equal_steps(recurrent: str, dense: str, overrides: list[str]) -> int:
    """The number of updates of the dense model that cost what all of the recurrent one's do."""
    environment = Environment.read()

    def plan_of(path: str) -> tuple[RunPlan, int]:
        config = load(["--job.config_file", path, *overrides], environment).config
        return resolve(config, environment), config.training.steps

    wanted = training_flops(*plan_of(recurrent))
    return max(1, round(wanted / training_flops(plan_of(dense)[0], 1)))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The last held-out losses of each run, and what the recurrent ones started from."""
    rows = []
    for name, label in RUNS.items():
        lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        validated = [line for line in lines if line.get("val_loss") is not None]
        losses = {key: value for key, value in validated[-1].items() if key.startswith("val_loss")}
        rows.append({"run": label, "steps": validated[-1]["step"], **losses})
    return rows


def main(arguments: list[str]) -> int:
    kind, *rest = arguments
    if kind == "steps":
        print(equal_steps(rest[0], rest[1], rest[2:]))
    else:
        print(tabulate(rows_of(Path(rest[0])), headers="keys", floatfmt=".4f"))
        print(
            "held-out nats a byte; val_loss_R is at R iterations. Retrofitted, random and continued had "
            "equal training FLOPs; the first and the last of them had those of the dense run before."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
