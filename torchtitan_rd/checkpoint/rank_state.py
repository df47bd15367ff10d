"""The state that each rank has of its own, as of random generators. All start from one seed,
so mostly all are alike.

Rank 0's stands in `state.json`, and only a rank whose state differs writes a file of its own.
All ranks' states in one JSON would be 114 MB at 4096 ranks, gathered, written and parsed by each of them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchtitan_rd.checkpoint.manifest import Manifest, second_look
from torchtitan_rd.checkpoint.rank_group import RankGroup

PER_RANK = "of_each_rank"  # the key in state.json that lists the keys which belong to rank 0


def divide(own: Mapping[str, Any], ranks: RankGroup) -> tuple[dict[str, Any], dict[str, str]]:
    """(entries for state.json, this rank's own file: name -> text, or nothing). Collective.

    own: JSON values of this rank, under the same keys on every rank.
    """
    if not own:
        return {}, {}
    text = json.dumps(own)
    shared = ranks.from_rank0(lambda: text)
    files = {} if text == shared else {_file_of(ranks.rank): text}
    return {**json.loads(shared), PER_RANK: sorted(own)}, files


def unite(state: Mapping[str, Any], path: Path, manifest: Manifest, ranks: RankGroup) -> dict[str, Any]:
    """`state` as this rank had it when `path` was saved.
    Another number of ranks gets none of the ranks' own entries.

    Collective. Raises CheckpointError on every rank if a file cannot be read.
    """
    own_keys = state.get(PER_RANK, [])
    united = {key: value for key, value in state.items() if key != PER_RANK}
    if manifest.world_size != ranks.world_size:
        return {key: value for key, value in united.items() if key not in own_keys}

    def read_own() -> None:
        name = _file_of(ranks.rank)
        if name in manifest.files:
            united.update(json.loads(second_look(lambda: (path / name).read_bytes())))

    ranks.agree(read_own)
    return united


def _file_of(rank: int) -> str:
    """Begins like the name of the rank's tensors, whose hashes the same rank computes."""
    return f"__{rank}_state.json"
