"""Meta's files: shards of every number and style give back the tensors bit by bit,
and each defect one message.
"""

import json
import logging

import pytest
import torch

from tests.models.tiny import some_tokens, tiny_llama
from torchtitan_rd.conversion import meta
from torchtitan_rd.conversion.meta import open_meta
from torchtitan_rd.errors import CheckpointError, ConfigError
from torchtitan_rd.models.layers import RopeScaling
from torchtitan_rd.models.llama.model import Llama
from torchtitan_rd.models.llama.shape import LlamaShape

COLUMNS, ROWS = ("wq", "wk", "wv", "w1", "w3", "output"), ("wo", "w2")
PARAMS = {"dim": 32, "n_layers": 2, "n_heads": 8, "n_kv_heads": 8, "norm_eps": 1e-5, "vocab_size": 64}
PARAMS |= {"multiple_of": 16, "ffn_dim_multiplier": 1.0, "rope_theta": 500_000.0}


def llama(**fields) -> Llama:
    model = tiny_llama(**{"n_heads": 8, "n_kv_heads": 8, "ffn_dim": 48, "vocab_size": 64, **fields})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += torch.linspace(-0.1, 0.1, len(parameter))
    return model


def write(folder, model: Llama, shards: int = 1, *, embedding_dim: int = 0, **params):
    """embedding_dim: along which the ranks share the embedding: 0 in Llama 3, 1 before."""
    folder.mkdir(exist_ok=True)
    dims = {**dict.fromkeys(COLUMNS, 0), **dict.fromkeys(ROWS, 1), "tok_embeddings": embedding_dim}
    tensors = {name: parameter.data for name, parameter in model.named_parameters()}
    for rank in range(shards):
        state = {
            name: tensor.chunk(shards, dims[name.split(".")[-2]])[rank].clone()
            if "norm" not in name
            else tensor
            for name, tensor in tensors.items()
        }
        torch.save(state | {"rope.freqs": torch.ones(2)}, folder / f"consolidated.{rank:02}.pth")
    write_params(folder, **params)
    return folder


def write_params(folder, **params) -> None:
    (folder / "params.json").write_text(json.dumps({**PARAMS, **params}))


def change(path, edit) -> None:
    state = torch.load(path)
    edit(state)
    torch.save(state, path)


def assert_holds(weights, model: Llama) -> None:
    wanted = model.state_dict()
    assert list(weights.tensors) == list(wanted)
    for name, tensor in wanted.items():
        found = weights.read(name)
        assert weights.tensors[name] == (tensor.shape, tensor.dtype)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor), name


@pytest.mark.parametrize("embedding_dim", [0, 1])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_shards_give_back_every_tensor_bit_by_bit(tmp_path, shards, embedding_dim):
    model = llama()
    assert_holds(open_meta(write(tmp_path, model, shards, embedding_dim=embedding_dim)), model)


def test_a_vocabulary_that_the_shards_cannot_share_evenly_comes_back_bit_by_bit(tmp_path):
    model = llama(vocab_size=61)
    assert_holds(open_meta(write(tmp_path, model, 2, vocab_size=61)), model)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_grouped_heads_and_bfloat16_come_back_bit_by_bit(tmp_path, shards):
    model = llama(n_kv_heads=4).bfloat16()
    assert_holds(open_meta(write(tmp_path, model, shards, n_kv_heads=4)), model)


def test_the_model_that_is_opened_computes_the_same_logits(tmp_path):
    model = llama(rope_theta=10_000.0, norm_eps=1e-6)
    weights = open_meta(write(tmp_path, model, 2, norm_eps=1e-6, rope_theta=None))
    again = Llama(weights.shape)
    again.load_state_dict({name: weights.read(name) for name in weights.tensors})
    assert torch.equal(again(some_tokens()), model(some_tokens()))


def test_the_shape_is_that_of_params_json_and_of_the_tensors(tmp_path):
    weights = open_meta(write(tmp_path, llama(n_kv_heads=2), 2, n_kv_heads=2))
    assert weights.shape == LlamaShape(
        dim=32,
        n_layers=2,
        n_heads=8,
        n_kv_heads=2,
        vocab_size=64,
        ffn_dim=48,
        norm_eps=1e-5,
        rope_theta=500_000.0,
        max_seq_len=8192,
    )
    assert (weights.spec.name, weights.flavor, weights.origin) == ("llama3", "custom", str(tmp_path))
    assert weights.step is None
    assert weights.files == {}


def test_the_params_of_llama_1_say_less(tmp_path):
    write(tmp_path, llama(), 2, embedding_dim=1, vocab_size=-1, n_kv_heads=None, rope_theta=None)
    shape = open_meta(tmp_path).shape
    assert (shape.vocab_size, shape.n_kv_heads, shape.rope_theta, shape.max_seq_len) == (
        64,
        8,
        10_000.0,
        4096,
    )
    write_params(tmp_path, rope_theta=1_000_000)  # Code Llama
    assert open_meta(tmp_path).shape.max_seq_len == 16_384


def test_a_file_without_head_is_tied(tmp_path):
    model = llama(tie_word_embeddings=True)
    weights = open_meta(write(tmp_path, model, 2))
    assert weights.shape.tie_word_embeddings
    assert_holds(weights, model)


def test_scaled_rope_is_that_of_llama_3_1_unless_it_is_told(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "torchtitan_rd"):
        shape = open_meta(write(tmp_path, llama(), use_scaled_rope=True)).shape
        assert (shape.rope_scaling, shape.max_seq_len) == (RopeScaling(8.0), 131_072)
        assert "rotary scaling by 8: it does not say, and Llama 3.1 has 8" in caplog.text
        write_params(tmp_path, use_scaled_rope=True, rope_scaling_factor=4)
        assert open_meta(tmp_path).shape.rope_scaling == RopeScaling(4.0)
        assert "rotary scaling by 4: rope_scaling_factor says so" in caplog.text
        write_params(tmp_path, use_scaled_rope=False)
        assert open_meta(tmp_path).shape.rope_scaling is None


@pytest.mark.parametrize(("sizes", "factor"), [((2048, 16), 32.0), ((3072, 28), 32.0), ((4096, 32), 8.0)])
def test_the_two_text_sizes_of_llama_3_2_are_known_by_their_shape(sizes, factor):
    params = {"dim": sizes[0], "n_layers": sizes[1], "use_scaled_rope": True}
    assert meta._scaling(params) == RopeScaling(factor)


def test_the_subfolder_original_is_found_and_the_tokenizer_goes_along(tmp_path):
    write(tmp_path / "original", llama())
    (tmp_path / "original" / "tokenizer.model").write_bytes(b"ranks")
    weights = open_meta(tmp_path)
    assert weights.files == {"tokenizer.model": b"ranks"}
    assert weights.origin == str(tmp_path)


@pytest.mark.parametrize(
    "key",
    ["moe", "moe_args", "quantization_args", "lora_args", "vision_chunk_size", "sliding_window", "head_dim"],
)
def test_a_setting_of_another_model_is_refused_by_name(tmp_path, key):
    with pytest.raises(ConfigError, match=rf"params\.json: {key} = 4 is not supported"):
        open_meta(write(tmp_path, llama(), **{key: 4}))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"dim": None}, "dim is missing"),
        ({"norm_eps": None}, "norm_eps is missing"),
        ({"dim": "32"}, "dim = '32' has the wrong type"),
        ({"n_layers": 2.0}, r"n_layers = 2\.0 has the wrong type"),
        ({"n_heads": True}, "n_heads = True has the wrong type"),
        ({"use_scaled_rope": 1}, "use_scaled_rope = 1 has the wrong type"),
        ({"n_kv_heads": 3}, r"n_heads = 8 is not divisible by n_kv_heads = 3"),
        ({"vocab_size": 0}, "vocab_size = 0 must be positive"),
    ],
)
def test_a_wrong_setting_is_one_message(tmp_path, params, message):
    with pytest.raises(ConfigError, match=rf"params\.json: {message}"):
        open_meta(write(tmp_path, llama(), **params))


def test_params_json_missing_or_broken_is_one_message(tmp_path):
    write(tmp_path, llama())
    for content in ("{", "[1]", "\x00"):
        (tmp_path / "params.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"params\.json .*download it again"):
            open_meta(tmp_path)
    (tmp_path / "params.json").unlink()
    with pytest.raises(CheckpointError, match=r"params\.json is missing"):
        open_meta(tmp_path)


def test_a_folder_without_shards_is_one_message(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=rf"{folder} holds no consolidated\.00\.pth"):
            open_meta(folder)


def test_a_gap_in_the_numbers_names_the_missing_file(tmp_path):
    write(tmp_path, llama(), 4)
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(
        CheckpointError, match=r"consolidated\.01\.pth is missing, while consolidated\.03\.pth is there"
    ):
        open_meta(tmp_path)
    (tmp_path / "consolidated.00.pth").unlink()
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth is missing"):
        open_meta(tmp_path)


@pytest.mark.parametrize("embedding_dim", [0, 1])
@pytest.mark.parametrize("vocab_size", [64, -1])
@pytest.mark.parametrize("shards", [2, 4])
def test_a_missing_last_shard_is_found(tmp_path, shards, vocab_size, embedding_dim):
    """Half of the shards would make a consistent narrower model, were dim not told."""
    write(tmp_path, llama(), shards, embedding_dim=embedding_dim, vocab_size=vocab_size)
    for rank in range(shards // 2, shards):
        (tmp_path / f"consolidated.{rank:02}.pth").unlink()
    with pytest.raises(
        CheckpointError, match=r"has shape .*, but .* says .*consolidated\.00\.pth.*: is a shard missing"
    ):
        open_meta(tmp_path)


def test_a_missing_or_surplus_tensor_is_named(tmp_path):
    path = write(tmp_path, llama()) / "consolidated.00.pth"
    change(path, lambda state: state.pop("layers.1.attention.wo.weight"))
    with pytest.raises(CheckpointError, match=r"lacks layers\.1\.attention\.wo\.weight"):
        open_meta(tmp_path)
    change(path, lambda state: state.update({"layers.1.attention.wo.weight": torch.zeros(32, 32)}))
    change(path, lambda state: state.update({"layers.0.attention.q_norm.weight": torch.zeros(4)}))
    with pytest.raises(CheckpointError, match=r"holds layers\.0\.attention\.q_norm\.weight"):
        open_meta(tmp_path)
    change(path, lambda state: state.pop("tok_embeddings.weight"))
    with pytest.raises(CheckpointError, match=r"lacks tok_embeddings\.weight"):
        open_meta(tmp_path)


def test_shards_that_do_not_fit_together_are_named(tmp_path):
    write(tmp_path, llama(), 2)
    path = tmp_path / "consolidated.01.pth"
    original = path.read_bytes()
    change(path, lambda state: state.pop("norm.weight"))
    with pytest.raises(CheckpointError, match=r"norm\.weight is not in both of .*00\.pth and .*01\.pth"):
        open_meta(tmp_path)
    for name in ("norm.weight", "output.weight"):
        for edit in (torch.Tensor.bfloat16, lambda tensor: tensor[None], lambda tensor: tensor[..., :31]):
            path.write_bytes(original)
            change(path, lambda state, name=name, edit=edit: state.update({name: edit(state[name])}))
            with pytest.raises(CheckpointError, match=rf"{name} is not alike in all shards"):
                open_meta(tmp_path)
    path.write_bytes(original)
    change(path, lambda state: state.update({"norm.weight": state["norm.weight"] + 1}))
    weights = open_meta(tmp_path)
    weights.read("layers.0.ffn_norm.weight")
    with pytest.raises(CheckpointError, match=r"norm\.weight is not the same in all shards"):
        weights.read("norm.weight")


def test_a_damaged_shard_and_one_of_other_objects_are_named(tmp_path):
    path = write(tmp_path, llama()) / "consolidated.00.pth"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth is cut off: download it again"):
        open_meta(tmp_path)
    torch.save({"norm.weight": [1.0]}, path)
    with pytest.raises(CheckpointError, match=r"00\.pth: 'norm\.weight' is no plain tensor"):
        open_meta(tmp_path)
    torch.save([1.0], path)
    with pytest.raises(CheckpointError, match=r"00\.pth holds no dictionary"):
        open_meta(tmp_path)


def test_reading_one_tensor_touches_no_other(tmp_path, monkeypatch):
    weights = open_meta(write(tmp_path, llama(), 2))
    merged = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts, dim: merged.append(len(parts)) or cat(parts, dim))
    weights.read("layers.0.attention.wq.weight")
    assert merged == [2]
