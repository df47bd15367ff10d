"""Which cards hold long sequences: plans of the 8B Llama and the 3.5B raven, a line each (docs/planning.md).

    python benchmarks/long_context.py [rows, such as 1 3]

Nothing is computed. Recomputed in full, with `activation_checkpoint.offload`, `training.mlp_tile_tokens` 2048
and `training.loss_chunk_tokens` 1024, on cards of 80 GB; a raven block by block, at the mean draw and at the
95th percentile.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from torchtitan_rd.config import load
from torchtitan_rd.job import Environment
from torchtitan_rd.planning.cards import CARDS, GIB
from torchtitan_rd.planning.draws import depths_of
from torchtitan_rd.planning.making import resolve_without_data
from torchtitan_rd.planning.memory import measure

CONFIGS = Path(__file__).parent.parent / "train_configs"
CARD = CARDS["h100-80"]
THRIFTY = {
    "activation_checkpoint.mode": "full",
    "activation_checkpoint.offload": "true",
    "training.mlp_tile_tokens": 2048,
    "training.loss_chunk_tokens": 1024,
    "training.local_batch_size": 1,
    "training.global_batch_size": -1,
}


@dataclass(frozen=True)
class Row:
    model: str
    config: str
    tokens: int
    gpus: int
    keys: dict[str, Any] = field(default_factory=dict)


LLAMA = ("8B", "primate_8b_131k.toml")
RAVEN = ("raven 3.5B", "raven_3.5b_4k.toml")
BY_BLOCK = {
    "activation_checkpoint.recurrent_region": "block",
    "parallelism.data_parallel_replicate_degree": 1,
    "parallelism.data_parallel_shard_degree": -1,
}
ON_HOST = {"training.enable_cpu_offload": "true"}
ROWS = (
    Row(*LLAMA, 131072, 4),
    Row(*LLAMA, 131072, 1, ON_HOST),
    Row(*LLAMA, 2**20, 8, {"parallelism.context_parallel_degree": 8}),
    Row(*RAVEN, 131072, 1, {**BY_BLOCK, **ON_HOST}),
    Row(*RAVEN, 131072, 2, BY_BLOCK),
    Row(*RAVEN, 131072, 4, BY_BLOCK),
    Row(*RAVEN, 131072, 5, {**BY_BLOCK, "parallelism.context_parallel_degree": 5}),
)


def lines_of(row: Row) -> list[tuple[Any, ...]]:
    """One for each depth that is drawn."""
    keys = {**THRIFTY, **row.keys, "training.seq_len": row.tokens}
    if row.tokens % row.keys.get("parallelism.context_parallel_degree", 1):
        keys["training.seq_len"] = row.tokens // 5 * 5
    environment = Environment(0, 0, row.gpus, row.gpus, "INFO")
    arguments = [f"--{key}={value}" for key, value in keys.items()]
    loaded = load(["--job.config_file", str(CONFIGS / row.config), *arguments], environment)
    resolved = resolve_without_data(loaded.config, environment)
    config, plan = resolved.config, resolved.plan

    found = []
    for depth in [one for one in depths_of(plan, 2000).chosen if one.name != "max"]:
        need = measure(config, plan, [depth]).depths[0].need
        drawn = f"{depth.name} {depth.num_steps}" if depth.name else ""
        own = ", ".join(f"{key.partition('.')[2]} = {value}" for key, value in row.keys.items())
        left = need.headroom(CARD) / GIB
        sizes = (need.peak / GIB, need.reserved / GIB, left, need.saved_on_host / GIB)
        found.append(
            (row.model, drawn, f"{plan.seq_len:,}", row.gpus, own, *(f"{size:.1f}" for size in sizes))
        )
    return found


def main(chosen: list[str]) -> None:
    rows = [ROWS[int(number) - 1] for number in chosen] or ROWS
    headers = ("model", "draw", "tokens", "GPUs", "beside", "peak GiB", "with reserve", "left", "on host")
    print(tabulate([line for row in rows for line in lines_of(row)], headers, tablefmt="github"), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
