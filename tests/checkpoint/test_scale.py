"""What is the same on all ranks, or under two names, is written once."""

import json
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.checkpoint.common import checkpointer, digest, training_state
from tests.ranks import run_on_ranks
from torchtitan_rd import job, train
from torchtitan_rd.checkpoint import SafeReader, rank_state, read_manifest, verify
from torchtitan_rd.checkpoint import checkpointer as checkpointer_module
from torchtitan_rd.conversion.dcp import open_dcp


def own_state_body(rank, world_size, dump, own):
    """Saves with `own[rank]` (None: only load), loads and returns the state."""
    checkpoints = checkpointer(dump)
    if own is not None:
        checkpoints.save(1, training_state(1), {"step": 1}, own_state={"rng": own[rank]})
    state = checkpoints.load(training_state(9))
    checkpoints.close()
    return state


def test_a_state_that_all_ranks_share_is_written_once(tmp_path):
    same = {"step": 1, "rng": {"words": [1, 2]}}
    assert run_on_ranks(2, own_state_body, tmp_path, [same["rng"]] * 2) == [same, same]
    step = tmp_path / "checkpoint" / "step-1"
    assert not list(step.glob("__*_state.json"))
    assert run_on_ranks(1, own_state_body, tmp_path, None) == [{"step": 1}], "another number of ranks"


def test_a_rank_whose_state_differs_gets_its_own_back_and_damage_to_it_is_seen(tmp_path):
    own = [{"words": [1, 2]}, {"words": [3, 4]}]
    expected = [{"step": 1, "rng": each} for each in own]
    assert run_on_ranks(2, own_state_body, tmp_path, own) == expected
    assert run_on_ranks(2, own_state_body, tmp_path, None) == expected
    assert run_on_ranks(1, own_state_body, tmp_path, None) == [{"step": 1}]
    step = tmp_path / "checkpoint" / "step-1"
    assert [path.name for path in step.glob("__*_state.json")] == ["__1_state.json"]
    (step / "__1_state.json").write_text('{"rng": {"words": [3, 5]}}')
    assert verify(step)


def test_states_of_all_ranks_in_one_list_as_earlier_versions_wrote_them_still_serve():
    environment = job.Environment(1, 1, 2, 2, "INFO")
    assert job.own_rng_state(["a", "b"], environment) == "b"
    assert job.own_rng_state(["a", "b", "c"], environment) is None
    assert job.own_rng_state({"python": 1}, environment) == {"python": 1}
    assert job.own_rng_state(None, environment) is None


class OneOfMany:
    """A rank among 4096, whose rank 0 says what `shared` is."""

    def __init__(self, rank, shared):
        self.rank, self.world_size, self._shared = rank, 4096, shared

    def from_rank0(self, make):
        return self._shared


def test_4096_ranks_of_one_seed_write_one_state(tmp_path):
    """28 kB where all of them in one JSON were 114 MB; and each rank takes milliseconds for its part."""
    own = {"rng": job.rng_state()}
    shared = json.dumps(own)
    started, files = time.perf_counter(), {}
    for rank in range(4096):
        entries, of_rank = rank_state.divide(own, OneOfMany(rank, shared))
        files |= of_rank
        if rank == 0:
            text = json.dumps(entries)
    assert files == {}
    assert len(text) < 40_000
    assert (time.perf_counter() - started) / 4096 < 0.05
    _, differing = rank_state.divide({"rng": "another"}, OneOfMany(7, shared))
    assert differing == {"__7_state.json": '{"rng": "another"}'}


def tied_state(seed):
    """The tests' state, with a head that is the embedding itself."""
    tensors = training_state(seed)
    tensors["model"]["output.weight"] = tensors["model"]["tok_embeddings.weight"]
    return tensors


def tied_body(rank, world_size, dump, mode):
    """Saves and loads; returns the digests of what was saved and of what came back."""
    checkpoints = checkpointer(dump, async_mode=mode)
    saved = tied_state(1)
    checkpoints.save(1, saved, {"step": 1})
    checkpoints.wait()
    tensors = tied_state(2)
    checkpoints.load(tensors)
    checkpoints.close()
    return digest(saved), digest(tensors)


@pytest.mark.parametrize("mode", ["disabled", "async"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_tied_head_is_written_once_and_found_under_both_names(tmp_path, world_size, mode):
    for saved, loaded in run_on_ranks(world_size, tied_body, tmp_path, mode):
        assert saved == loaded
    step = tmp_path / "checkpoint" / "step-1"
    metadata = SafeReader(step).read_metadata()
    rows = metadata.state_dict_metadata["model.output.weight"].chunks
    for chunk in rows:
        by_name = {
            index.fqn: (info.relative_path, info.offset)
            for index, info in metadata.storage_data.items()
            if index.offset == chunk.offsets
        }
        assert by_name["model.output.weight"] == by_name["model.tok_embeddings.weight"]
    assert set(SafeReader(step).tensors()) == set(read_manifest(step).tensors)
    # torch's own reader sees no difference
    read = {"model": {name: torch.zeros(5, 4) for name in ("output.weight", "tok_embeddings.weight")}}
    dcp.load(read, checkpoint_id=step)
    expected = training_state(1)["model"]["tok_embeddings.weight"]
    assert torch.equal(read["model"]["output.weight"], expected)
    assert torch.equal(read["model"]["tok_embeddings.weight"], expected)


def test_a_tied_head_that_was_written_twice_still_loads(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpointer_module, "find_aliases", lambda tensors: {})
        checkpoints = checkpointer(tmp_path)
        checkpoints.save(1, tied_state(1), {"step": 1})
        checkpoints.close()
    checkpoints = checkpointer(tmp_path)
    tensors = tied_state(2)
    assert checkpoints.load(tensors) == {"step": 1}
    assert digest(tensors) == digest(tied_state(1))
    checkpoints.close()


def test_tensors_that_are_merely_equal_keep_their_own_bytes(tmp_path):
    checkpoints = checkpointer(tmp_path)
    tensors = training_state(1)
    tensors["model"]["output.weight"] = tensors["model"]["tok_embeddings.weight"].clone()
    checkpoints.save(1, tensors, {"step": 1})
    checkpoints.close()
    storage = SafeReader(tmp_path / "checkpoint" / "step-1").read_metadata().storage_data
    assert len({(info.relative_path, info.offset) for info in storage.values()}) == len(storage)


def test_a_run_with_a_tied_head_writes_its_bytes_once_and_converters_see_both_names(tmp_path):
    arguments = [
        *(
            "--training.seq_len=16",
            "--training.local_batch_size=1",
            "--training.mixed_precision_param=float32",
        ),
        *(
            "--model.overrides.dim=128",
            "--model.overrides.n_layers=1",
            "--model.overrides.tie_word_embeddings=true",
        ),
        *(
            "--comm.heartbeat_seconds=0",
            "--checkpoint.enable",
            "--training.steps=1",
            f"--job.dump_folder={tmp_path}",
        ),
        *("--checkpoint.last_save_model_only", "--model.vocab_size=4096"),
    ]
    assert train.main(arguments) == 0
    step = tmp_path / "checkpoint" / "step-1-model"
    weights = open_dcp(step)
    assert {"tok_embeddings.weight", "output.weight"} <= set(weights.tensors)
    assert torch.equal(weights.read("tok_embeddings.weight"), weights.read("output.weight"))
    embedding = 4096 * 128 * 4
    stored = sum(path.stat().st_size for path in step.glob("*.distcp"))
    assert embedding < stored < 2 * embedding
