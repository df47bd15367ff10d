"""Each mistake: one clear message, exit status 1, nothing written."""

import json
import os
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.conversion.common import script, tiny, weights_of
from torchtitan_rd.conversion.dcp import open_dcp
from torchtitan_rd.conversion.pipeline import open_released, to_dcp, to_hf
from torchtitan_rd.errors import CheckpointError

META = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 62,
    "rope_theta": 500000,
}


@pytest.fixture
def folders(tmp_path):
    """One good folder of each kind: hf, dcp, raven (DCP), meta."""
    model = tiny("llama3", vocab_size=62)
    to_hf(weights_of(model), tmp_path / "hf", verify=False)
    to_dcp(weights_of(model), tmp_path / "dcp", verify=False)
    to_dcp(weights_of(tiny("raven"), "raven"), tmp_path / "raven", verify=False)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "params.json").write_text(json.dumps(META))
    halves = [{}, {}]
    for name, tensor in model.state_dict().items():
        dim = None if "norm" in name else 1 if name.endswith(("wo.weight", "w2.weight")) else 0
        parts = [tensor, tensor] if dim is None else [part.clone() for part in tensor.chunk(2, dim)]
        for half, part in zip(halves, parts, strict=True):
            half[name] = part
    for number, half in enumerate(halves):
        torch.save(half, tmp_path / "meta" / f"consolidated.0{number}.pth")
    return tmp_path


def refuses(capsys, name, folders, source, *arguments, match, output="out"):
    before = sorted(folders.rglob("*"))
    code = script(name)("--input_dir", folders / source, "--output_dir", folders / output, *arguments)
    errors = capsys.readouterr().err
    assert code == 1, errors
    lines = [line for line in errors.splitlines() if "Error: " in line]
    assert len(lines) == 1 and match in errors, errors
    assert "Traceback" not in errors
    assert sorted(folders.rglob("*")) == before


def refuses_llama(capsys, folders, match):
    """The Hugging Face folder `hf`, read as what it is."""
    refuses(capsys, "hf_to_dcp", folders, "hf", "--model", "llama3", match=match)


def edit(path, change):
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def test_every_good_folder_converts(folders, capsys):
    for name, source, *arguments in (
        ("llama_to_dcp", "meta"),
        ("llama_to_dcp", "hf", "--keep_embeddings"),
        ("hf_to_dcp", "hf", "--model", "llama3"),
        ("dcp_to_llama", "dcp"),
        ("dcp_to_llama", "dcp", "--format", "pth"),
        ("dcp_to_hf", "raven", "--model", "raven"),
    ):
        code = script(name)(
            "--input_dir", folders / source, "--output_dir", folders / "out", "--no-verify", *arguments
        )
        assert code == 0, capsys.readouterr().err
        assert "wrote" in capsys.readouterr().out
        shutil.rmtree(folders / "out")


def test_missing_params_json(folders, capsys):
    (folders / "meta" / "params.json").unlink()
    refuses(capsys, "llama_to_dcp", folders, "meta", match="params.json")


@pytest.mark.parametrize("number", [0, 1])
def test_a_missing_shard(folders, capsys, number):
    (folders / "meta" / f"consolidated.0{number}.pth").unlink()
    refuses(
        capsys,
        "llama_to_dcp",
        folders,
        "meta",
        match="consolidated.00.pth" if number == 0 else "shard missing",
    )


def test_a_missing_input_folder(folders, capsys):
    refuses(capsys, "hf_to_dcp", folders, "nowhere", "--model", "raven", match="nowhere does not exist")
    refuses(capsys, "dcp_to_hf", folders, "nowhere", match="is not a checkpoint")


def test_truncated_safetensors(folders, capsys):
    path = folders / "hf" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refuses_llama(capsys, folders, match="model.safetensors is damaged or truncated")


def test_a_missing_safetensors_file_of_an_index(folders, capsys):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folders / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses_llama(capsys, folders, match="00001-of-00002.safetensors is missing")


def test_an_index_that_points_out_of_the_folder(folders, capsys):
    index = {"weight_map": {"model.norm.weight": "../other.safetensors"}}
    (folders / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses_llama(capsys, folders, match="no weight_map of files beside it")


def test_the_wrong_model_name(folders, capsys):
    refuses(
        capsys, "dcp_to_hf", folders, "raven", "--model", "llama3", match="holds a raven; use --model raven"
    )
    refuses(
        capsys,
        "hf_to_dcp",
        folders,
        "hf",
        "--model",
        "raven",
        match="holds a llama; use --model llama3 or aixsim",
    )
    refuses(
        capsys, "hf_to_dcp", folders, "meta", "--model", "raven", match="holds a llama3; use --model llama3"
    )


def test_a_shape_mismatch(folders, capsys):
    edit(folders / "hf" / "config.json", lambda fields: fields.update(intermediate_size=64))
    message = "mlp.gate_proj.weight has shape (48, 32), but its configuration says (64, 32)"
    refuses_llama(capsys, folders, match=message)
    message = "feed_forward.w1.weight has shape (48, 32), but its configuration says (64, 32)"
    refuses(capsys, "dcp_to_hf", folders, "dcp", "--override", "ffn_dim=64", match=message)


def test_a_tensor_too_few_or_too_many(folders, capsys):
    edit(folders / "hf" / "config.json", lambda fields: fields.update(num_hidden_layers=3))
    refuses_llama(capsys, folders, match="lacks model.layers.2.input_layernorm.weight")
    edit(folders / "hf" / "config.json", lambda fields: fields.update(num_hidden_layers=1))
    refuses_llama(capsys, folders, match="holds model.layers.1.input_layernorm.weight")


def test_a_field_of_a_wrong_type_names_the_file(folders, capsys):
    path = folders / "hf" / "config.json"
    edit(path, lambda fields: fields.update(hidden_size="32"))
    message = f"{path}: hidden_size = '32' must be a whole number"
    refuses_llama(capsys, folders, match=message)


def test_a_gguf_file_is_named_as_such_with_a_remedy(folders, capsys):
    (folders / "gguf").mkdir()
    file = folders / "gguf" / "model-q4.gguf"
    file.write_bytes(b"GGUF\x03\0\0\0" + bytes(600))
    message = "GGUF files (model-q4.gguf), which are not read here; download the Hugging Face folder"
    refuses(capsys, "llama_to_dcp", folders, "gguf", match=message)
    (folders / "gguf" / "config.json").write_bytes((folders / "hf" / "config.json").read_bytes())
    refuses(capsys, "hf_to_dcp", folders, "gguf", "--model", "llama3", match=message)
    refuses(capsys, "hf_to_dcp", folders, "gguf/model-q4.gguf", "--model", "raven", match="is a GGUF file")


def test_a_flipped_bit_in_metas_files_is_found(folders, capsys):
    path = folders / "meta" / "consolidated.01.pth"
    content = bytearray(path.read_bytes())
    content[content.index(torch.load(path)["norm.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    refuses(capsys, "llama_to_dcp", folders, "meta", match=f"{path}: the bytes of")


def test_a_model_that_is_not_ours(folders, capsys):
    edit(folders / "hf" / "config.json", lambda fields: fields.update(model_type="mistral"))
    refuses_llama(capsys, folders, match="model_type = 'mistral' is none of ours")


class Evil:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.mark.parametrize("file", [".metadata", "data"])
def test_a_malicious_pickle_is_refused_and_not_run(folders, capsys, file):
    canary = folders / "canary"
    if file == ".metadata":
        (folders / "dcp" / ".metadata").write_bytes(pickle.dumps(Evil(canary)))
        (folders / "dcp" / "manifest.json").unlink()
        refuses(capsys, "dcp_to_hf", folders, "dcp", match="refused: it names posix.mkdir")
    else:
        torch.save({"model.norm.weight": Evil(canary)}, folders / "hf" / "pytorch_model.bin")
        (folders / "hf" / "model.safetensors").unlink()
        refuses_llama(capsys, folders, match="pytorch_model.bin")
    assert not canary.exists()


def test_damaged_checkpoint_bytes(folders, capsys):
    file = max((folders / "dcp").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    refuses(capsys, "dcp_to_hf", folders, "dcp", "--no-verify", match="its bytes do not match their checksum")
    file.write_bytes(content[:-10])
    refuses(capsys, "dcp_to_hf", folders, "dcp", "--no-verify", match="damaged")


def test_an_output_folder_that_is_not_empty(folders, capsys):
    (folders / "out").mkdir()
    (folders / "out" / "mine").write_text("precious")
    refuses(
        capsys,
        "dcp_to_hf",
        folders,
        "dcp",
        match="is not empty: name another folder, or replace it with --force",
    )
    refuses(capsys, "dcp_to_hf", folders, "dcp", "--force", match="so --force does not replace it")
    refuses(capsys, "dcp_to_hf", folders, "dcp", "--force", match="is or holds the input", output="dcp")
    refuses(capsys, "dcp_to_hf", folders, "dcp", match="is not a folder", output="out/mine")


def test_force_replaces_an_earlier_result(folders, capsys):
    convert = script("dcp_to_hf")
    for arguments in ((), ("--force", "--export_dtype", "bfloat16")):
        assert (
            convert(
                "--input_dir", folders / "dcp", "--output_dir", folders / "out", "--no-verify", *arguments
            )
            == 0
        )
    assert json.loads((folders / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert not [path for path in folders.iterdir() if path.name.startswith(".")]


def test_a_disk_that_is_too_small(folders, capsys, monkeypatch):
    usage = shutil.disk_usage(folders)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refuses(capsys, "dcp_to_hf", folders, "dcp", match="1,000 are free: free some space")


def test_a_write_error_leaves_nothing(folders, capsys, monkeypatch):
    from torchtitan_rd.conversion import huggingface

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface, "write_safetensors", full)
    refuses(capsys, "dcp_to_hf", folders, "dcp", match="No space left on device", output="deep/er/out")


def test_a_push_without_a_token_or_a_name(folders, capsys, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refuses(capsys, "dcp_to_llama", folders, "dcp", "--push_to_hub", match="--hf_repo_name")
    push = ("--push_to_hub", "--hf_repo_name", "me/model")
    refuses(capsys, "dcp_to_llama", folders, "dcp", *push, match="token")


def test_a_seed_without_embeddings_cannot_be_exported(folders, capsys):
    arguments = ("--input_dir", folders / "hf", "--output_dir", folders / "seed", "--no-verify")
    assert script("llama_to_dcp")(*arguments) == 0
    assert {"tok_embeddings.weight", "output.weight"}.isdisjoint(open_dcp(folders / "seed").tensors)
    refuses(capsys, "dcp_to_llama", folders, "seed", match="lacks tok_embeddings.weight, output.weight")


def test_a_checkpoint_of_another_program_needs_its_shape(folders, capsys):
    dcp.save({"model": tiny("llama3").state_dict(), "optimizer": object()}, checkpoint_id=folders / "foreign")
    refuses(
        capsys, "dcp_to_hf", folders, "foreign", match="--model llama3 --flavor 8B --override vocab_size=256"
    )
    refuses(
        capsys,
        "dcp_to_hf",
        folders,
        "foreign",
        "--model",
        "llama3",
        "--flavor",
        "huge",
        match="no flavor of llama3",
    )
    shape = [f"--override={line}" for line in ("dim=32", "n_layers=2", "ffn_dim=48", "vocab_size=61")]
    arguments = ("--input_dir", folders / "foreign", "--output_dir", folders / "out", "--no-verify")
    assert script("dcp_to_hf")(*arguments, "--model", "llama3", "--flavor", "debug", *shape) == 0


@pytest.mark.parametrize("pair", ["rope_theta", "rope_theta=ten", "thetta=1"])
def test_a_wrong_override(folders, capsys, pair):
    refuses(capsys, "dcp_to_hf", folders, "dcp", "--override", pair, match=pair.split("=")[0])


def test_a_failed_verification_publishes_nothing_and_keeps_the_work_under_another_name(
    folders, capsys, monkeypatch
):
    from torchtitan_rd.conversion import verification

    convert = script("dcp_to_hf")
    assert convert("--input_dir", folders / "dcp", "--output_dir", folders / "good") == 0
    honest = verification.transformers_logits
    monkeypatch.setattr(verification, "transformers_logits", lambda *arguments: honest(*arguments) + 0.01)
    for name in ("out.unverified", "out.unverified-2"):
        assert convert("--input_dir", folders / "dcp", "--output_dir", folders / "out") == 1
        errors = capsys.readouterr().err
        assert "verification failed: max |delta logit|" in errors and not (folders / "out").exists()
        assert f"kept as {folders / name}" in errors and "Traceback" not in errors
        assert tree(folders / name) == tree(folders / "good")


def test_a_result_that_transformers_cannot_load_is_kept_under_another_name_too(folders, capsys, monkeypatch):
    from torchtitan_rd.conversion import verification

    def fails(*arguments):
        raise CheckpointError("transformers cannot load it: KeyError: 'x'")

    monkeypatch.setattr(verification, "transformers_logits", fails)
    arguments = ("--input_dir", folders / "dcp", "--output_dir", folders / "out", "--force")
    (folders / "out").mkdir()
    (folders / "out" / "config.json").write_text("of an earlier result")
    assert script("dcp_to_hf")(*arguments) == 1
    assert "verification failed: transformers cannot load it" in capsys.readouterr().err
    assert (folders / "out" / "config.json").read_text() == "of an earlier result"
    assert (folders / "out.unverified" / "model.safetensors").is_file()


def tree(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_config_json_of_brackets_within_brackets_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"a":' * 50_000)
    with pytest.raises(CheckpointError, match=r"config\.json is not readable JSON: maximum recursion depth"):
        open_released(tmp_path)
