"""The held-out loss: weighted by tokens, the same on any number of ranks, and without effect on training."""

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.small_run import Setup, batches_of, hash_of, make
from torchtitan_rd.data import BatchDims, DatasetKeys, get_dataset, load_tokenizer
from torchtitan_rd.errors import ConfigError, DataError
from torchtitan_rd.model_spec import SINGLE_READ_OUT
from torchtitan_rd.validation import ValidationConfig, read_held_out, validate, validation_keys


def train(rank, world_size, validating):
    config, model, step = make(Setup(padded=True), world_size)
    held_out = batches_of(99, rank, world_size, config, padded=True)
    losses, held_out_losses = [], []
    for number in (1, 2, 3):
        losses.append(step(number, batches_of(number, rank, world_size, config, padded=True)).loss)
        if validating:
            held_out_losses.append(
                validate(model, held_out, torch.device("cpu"), SINGLE_READ_OUT)["val_loss"]
            )
    return losses, held_out_losses, hash_of(model), model.training


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_is_bit_for_bit_what_it_is_without_validation(world_size):
    for (losses, _, weights, training), (expected, _, same, _) in zip(
        run_on_ranks(world_size, train, True), run_on_ranks(world_size, train, False), strict=True
    ):
        assert losses == expected and weights == same and training


def test_the_loss_is_the_same_on_one_and_two_ranks_under_uneven_padding():
    one = run_on_ranks(1, train, True)[0][1]
    for two in run_on_ranks(2, train, True):
        assert two[1] == pytest.approx(one, abs=1e-6)
    assert len(set(one)) == 3, "the model changes between validations"


def test_the_loss_is_a_mean_over_tokens_not_over_batches():
    assert run_on_ranks(1, against_cross_entropy) == [True]


def against_cross_entropy(rank, world_size):
    config, model, _ = make(Setup(sections={"training": {"local_batch_size": 2}}), world_size)
    batches = batches_of(5, rank, world_size, config, padded=True)
    found = validate(model, batches, torch.device("cpu"), SINGLE_READ_OUT)["val_loss"]
    logits = torch.cat([model(batch.inputs) for batch in batches]).flatten(0, 1)
    labels = torch.cat([batch.labels for batch in batches]).flatten()
    return abs(found - torch.nn.functional.cross_entropy(logits, labels).item()) < 1e-6


def held_out_ids(degree: int, keys: DatasetKeys) -> torch.Tensor:
    options = {"tokenizer": load_tokenizer("bytes"), "vocab_size": 258, "seed": 0}
    ranks = [BatchDims.resolve(keys, rank, degree) for rank in range(degree)]
    batches = [batch for dims in ranks for batch in read_held_out(keys, dims, "validation", **options)]
    return torch.cat([batch.inputs for batch in batches])


def test_the_held_out_set_does_not_depend_on_the_number_of_ranks():
    training = DatasetKeys(dataset="pydoc-train", seq_len=32, local_batch_size=2, shuffle_seed=4)
    config = ValidationConfig(enable=True, dataset="pydoc-validation", sequences=8)
    sets = [held_out_ids(degree, validation_keys(config, training, degree)) for degree in (1, 2, 4)]
    assert sets[0].shape == (8, 32)
    assert all(torch.equal(ids, sets[0]) for ids in sets)


def test_a_local_folder_is_validated_on_the_files_of_its_split(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text('{"text": "' + split[0] * 200 + '"}\n')
    training = DatasetKeys(dataset="text", dataset_path=str(tmp_path), seq_len=16, local_batch_size=1)
    ids = held_out_ids(1, validation_keys(ValidationConfig(sequences=1), training, 1))
    assert set(ids.flatten().tolist()) <= {ord("v"), 256, 257}
    (tmp_path / "validation.jsonl").unlink()
    with pytest.raises(DataError, match="named after the split 'validation'"):
        held_out_ids(1, validation_keys(ValidationConfig(sequences=1), training, 1))


@pytest.mark.parametrize(("sequences", "repeats"), [(4, False), (16, True)])
def test_held_out_data_that_is_too_little_for_its_number_of_rows_is_said(
    sequences, repeats, tmp_path, caplog
):
    """4 documents of 41 ids, where a row takes 17."""
    (tmp_path / "validation.jsonl").write_text('{"text": "0123456789012345678901234567890123456789"}\n' * 4)
    training = DatasetKeys(dataset="text", dataset_path=str(tmp_path), seq_len=16, local_batch_size=1)
    ids = held_out_ids(2, validation_keys(ValidationConfig(sequences=sequences), training, 2))
    assert ids.shape == (sequences, 16)
    said = [record.message for record in caplog.records if "more than once" in record.message]
    assert bool(said) == repeats
    assert all("fewer than 16 rows of 16 tokens" in line for line in said)


def test_the_source_of_training_is_that_of_its_own_data_set_s_held_out_rows_alone():
    training = DatasetKeys(dataset="rodent", source_dataset="lab 1", local_batch_size=1)
    own, other = (ValidationConfig(dataset=name, sequences=1) for name in ("rodent", "primate"))
    assert validation_keys(own, training, 1).source_dataset == "lab 1"
    assert validation_keys(other, training, 1).source_dataset is None


def test_packed_held_out_rows_have_ids_of_their_own_beside_training_on_text(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pa.array([[5, 7, 6, 9, 9]] * 4, pa.list_(pa.int32()))
    pq.write_table(pa.table({"input_ids": rows}), tmp_path / "rows.parquet")
    training = DatasetKeys(dataset="text", seq_len=4, local_batch_size=1, document_mask=True)
    packed = {"dataset": "packed", "dataset_path": str(tmp_path / "rows.parquet"), "sequences": 1}
    keys = validation_keys(ValidationConfig(**packed, pad_id=9, eos_id=7), training, 1)
    assert held_out_ids(1, keys).tolist() == [[5, 7, 6, 7]]
    with pytest.raises(
        ConfigError, match=r"needs validation\.eos_id for validation\.pad_id or document_mask"
    ):
        get_dataset(validation_keys(ValidationConfig(**packed), training, 1), "validation")
    with pytest.raises(ConfigError, match=r"unset validation\.pad_id and validation\.eos_id"):
        own = ValidationConfig(dataset="pydoc-validation", sequences=1, eos_id=7)
        get_dataset(validation_keys(own, training, 1), "validation")


def test_a_set_that_does_not_divide_is_refused_by_its_own_key():
    with pytest.raises(ConfigError, match=r"validation\.sequences = 6 is not a multiple"):
        validation_keys(ValidationConfig(sequences=6), DatasetKeys(local_batch_size=2), 2)


def test_validation_is_due_by_the_step_alone():
    config = ValidationConfig(enable=True, freq=4)
    assert [step for step in range(1, 11) if config.is_due(step, 10)] == [4, 8, 10]
