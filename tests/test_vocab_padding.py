"""model.vocab_padding_multiple: more rows in embedding and head; the data and its ids are as without it."""

import json

import numpy as np
import pytest
import torch

from tests.launch import rows
from torchtitan_rd.config import load
from torchtitan_rd.conversion.dcp import open_dcp
from torchtitan_rd.conversion.pipeline import to_hf, with_tokenizer
from torchtitan_rd.data import build_dataloader
from torchtitan_rd.errors import CheckpointError, DataError
from torchtitan_rd.job import Environment
from torchtitan_rd.models import MODELS, get_flavor
from torchtitan_rd.models.config import ModelConfig
from torchtitan_rd.parallelism import init_weights
from torchtitan_rd.train import Trainer

ENVIRONMENT = Environment(rank=0, local_rank=0, world_size=1, local_world_size=1, log_level="WARNING")
SMALL = {
    "llama3": ["--model.overrides.dim=32", "--model.overrides.n_layers=1"],
    "raven": [
        "--model.name=raven",
        "--model.flavor=debug-demo",
        "--model.overrides.dim=32",
        "--model.overrides.n_heads=2",
    ],
}


def trainer(tmp_path, *arguments, family="llama3"):
    common = [
        "--model.vocab_padding_multiple=64",
        "--training.seq_len=16",
        "--training.local_batch_size=2",
        "--training.mixed_precision_param=float32",
        "--training.steps=1",
        "--checkpoint.enable",
        "--comm.heartbeat_seconds=0",
        f"--job.dump_folder={tmp_path / 'dump'}",
    ]
    return Trainer(load([*common, *SMALL[family], *arguments], ENVIRONMENT), ENVIRONMENT)


@pytest.mark.parametrize(
    ("size", "multiple", "padded"), [(258, 1, 258), (258, 64, 320), (256, 64, 256), (1, 4096, 4096)]
)
def test_a_vocabulary_is_padded_to_the_next_multiple(size, multiple, padded):
    assert ModelConfig(vocab_padding_multiple=multiple).padded(size) == padded


@pytest.mark.parametrize("family", SMALL)
def test_the_rows_count_as_parameters_and_in_the_flops(family, tmp_path):
    run = trainer(tmp_path, family=family)
    assert (run.plan.vocab_size, run.plan.shape.vocab_size) == (258, 320)
    spec, seq_len = run.plan.spec, 16
    plain = get_flavor(spec, run.config.model.flavor, {**run.config.model.overrides, "vocab_size": 258})
    with torch.device("meta"):
        padded_count, count = (
            sum(p.numel() for p in spec.build(shape).parameters()) for shape in (run.plan.shape, plain)
        )
    tables = 1 if run.plan.shape.tie_word_embeddings else 2
    assert padded_count - count == tables * 62 * 32
    more = spec.flops(run.plan.shape, seq_len).matmul - spec.flops(plain, seq_len).matmul
    assert more == 6 * 62 * 32


def test_the_loss_of_a_step_is_over_all_rows(tmp_path):
    run = trainer(tmp_path)
    run.run()
    model = run.plan.spec.build(run.plan.shape)
    init_weights(model, run.plan.spec.inits(model), run.config.training.seed)
    loader = build_dataloader(
        run.config.training,
        run.plan.batch,
        tokenizer=run.plan.tokenizer,
        vocab_size=258,
        seed=run.config.training.seed,
        pin_memory=False,
    )
    [batch] = loader.next_step()
    loader.close()
    logits = model(batch.inputs).double()
    assert logits.shape[-1] == 320 and batch.inputs.max() < 258
    target = logits.gather(-1, batch.labels.unsqueeze(-1)).squeeze(-1)
    over_all, over_true = (
        (part.logsumexp(-1) - target).mean().item() for part in (logits, logits[..., :258])
    )
    [row] = rows(tmp_path / "dump")
    assert row["loss"] == pytest.approx(over_all, abs=1e-5) and over_all - over_true > 0.05


def packed(tmp_path, name, largest):
    """Two rows of ids, of which the first begins with `largest`; -> the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = [[largest, *range(16)], [*range(17)]]
    pq.write_table(pa.table({"input_ids": pa.array(table, pa.list_(pa.int32()))}), tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize(("trained", "held_out"), [(101, 99), (99, 101)])
def test_data_may_not_hold_a_padded_id(trained, held_out, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    run = trainer(
        tmp_path,
        *(
            "--training.dataset=packed",
            f"--training.dataset_path={packed(tmp_path, 'train.parquet', trained)}",
        ),
        *(
            "--validation.enable",
            f"--validation.dataset_path={packed(tmp_path, 'validation.parquet', held_out)}",
        ),
        *("--model.vocab_size=100", "--training.local_batch_size=1", "--validation.sequences=2"),
    )
    assert run.plan.shape.vocab_size == 128
    with pytest.raises(DataError, match=r"id 101, but the model's vocabulary is 0\.\.99"):
        run.run()


def test_spikes_keep_their_separator_and_an_export_states_it(tmp_path, monkeypatch):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    counts = np.random.default_rng(0).poisson(0.5, (4, 7, 80)).tolist()
    pq.write_table(
        pa.table({"spike_counts": pa.array(counts, pa.list_(pa.list_(pa.int32())))}), tmp_path / "s.parquet"
    )
    data = [
        "--training.dataset=primate",
        f"--training.dataset_path={tmp_path / 's.parquet'}",
        "--model.vocab_size=20",
    ]
    run = trainer(tmp_path, *data, family="raven")
    run.run()
    weights = with_tokenizer(open_dcp(tmp_path / "dump" / "checkpoint" / "step-1"))
    assert weights.shape == run.plan.shape and weights.token_ids["bos_token_id"] == 19
    to_hf(weights, tmp_path / "hf", verify=False)
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (fields["vocab_size"], fields["padding_multiple"], fields["bos_token_id"]) == (64, 1, 19)
    assert MODELS["raven"].hf.shape_of(fields) == run.plan.shape


def test_a_resumed_run_may_not_have_other_rows(tmp_path):
    trainer(tmp_path).run()
    other = trainer(tmp_path, "--model.vocab_padding_multiple=100", "--training.steps=2")
    with pytest.raises(CheckpointError, match="vocab_size: 320 there, 300 here"):
        other.run()
