"""Models from disk: step folders and Hugging Face folders give the same text,
and what is wrong is said in one line.
"""

import json
import shutil

import numpy as np
import pytest
import torch

from tests.conversion.common import tiny, weights_of
from tests.inference.common import prompts
from tests.launch import launch
from torchtitan_rd.__main__ import main
from torchtitan_rd.conversion.dcp import open_dcp, write_dcp
from torchtitan_rd.conversion.huggingface import write_hf
from torchtitan_rd.conversion.pipeline import to_hf, with_tokenizer
from torchtitan_rd.conversion.tokenizer_files import tokenizer_files
from torchtitan_rd.data import DatasetKeys
from torchtitan_rd.errors import CheckpointError, ConfigError
from torchtitan_rd.inference import (
    ExitPolicy,
    Settings,
    encode_prompt,
    generate,
    load_model,
    transformers_tokenizer,
)
from torchtitan_rd.inference.evaluation import check_vocabulary, open_held_out
from torchtitan_rd.inference.loading import lay_out
from torchtitan_rd.train import Trainer

FAMILIES = {"llama3": {"tie_word_embeddings": True}, "raven": {}}


@pytest.fixture(scope="module", params=FAMILIES)
def folders(request, tmp_path_factory):
    """-> (family, model, step folder, Hugging Face folder)."""
    model = tiny(request.param, **FAMILIES[request.param])
    weights = weights_of(model, request.param)
    step, hf = (tmp_path_factory.mktemp(request.param) / name for name in ("step-7", "hf"))
    for folder in (step, hf):
        folder.mkdir()
    write_dcp(weights, step, "step-7")
    write_hf(weights, hf)
    return request.param, model, step, hf


def ids(loaded, **options):
    settings = Settings(max_new_tokens=8, **options)
    return [answer.ids for answer in generate(loaded, prompts(5, 3), settings).rows]


def test_a_step_folder_and_a_hugging_face_folder_are_the_model_that_was_saved(folders):
    family, model, step, hf = folders
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = [load_model(place) for place in (step, str(hf), step.parent)]
    for loaded in found:
        assert (
            loaded.spec.name == family
            and loaded.shape.attention_shape == model.shape.attention_shape
            and not loaded.model.training
        )
        parameters = dict(loaded.model.named_parameters())
        assert parameters.keys() == expected.keys() and not any(p.requires_grad for p in parameters.values())
        assert all(torch.equal(parameters[name], expected[name]) for name in expected)
    assert ids(found[0]) == ids(found[1])


def test_what_training_keeps_in_float32_stays_float32(folders):
    family, _, step, _ = folders
    loaded = load_model(step, dtype=torch.bfloat16)
    kinds = {name: p.dtype for name, p in loaded.model.named_parameters(remove_duplicate=False)}
    wide = {name for name, dtype in kinds.items() if dtype == torch.float32}
    if family == "raven":
        assert wide == {
            name for name in kinds if "norm" in name or "ln_f" in name or "qk_bias" in name or "wte" in name
        }
        assert kinds["lm_head.weight"] == torch.bfloat16  # its own copy: training multiplies in bfloat16, too
    else:
        assert not wide
    found = generate(loaded, prompts(5), Settings(max_new_tokens=4))
    assert (
        len(found.rows[0].ids) == 4
        and found.kv_bytes == generate(load_model(step), prompts(5), Settings(4)).kv_bytes / 2
    )


def test_matrices_lie_by_column_but_for_those_that_are_looked_up_by_row():
    model = lay_out(tiny("llama3"))
    assert model.layers[0].attention.wq.weight.stride()[0] == 1 and model.output.weight.stride()[0] == 1
    assert model.tok_embeddings.weight.is_contiguous()
    assert lay_out(tiny("llama3", tie_word_embeddings=True)).output.weight.is_contiguous()


def test_our_generation_is_that_of_the_exported_code(folders, tmp_path):
    """Which transformers runs: the same first states from the same seed, and the same greedy tokens."""
    from transformers import AutoModelForCausalLM

    family, _, _, hf = folders
    folder = shutil.copytree(hf, tmp_path / f"export_{family}")
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    options = {"num_steps": 5, "state_seed": 3} if family == "raven" else {}
    (prompt,) = prompts(6)
    tokens = torch.tensor([prompt])
    expected = theirs.generate(
        tokens, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(tokens), **options
    )
    depth = {"depth": 5, "seed": 3} if family == "raven" else {}
    (answer,) = generate(load_model(folder), [prompt], Settings(max_new_tokens=12, **depth)).rows
    assert answer.ids == expected[0, 6:].tolist()


def test_the_model_of_another_family_or_of_none_is_refused(folders, tmp_path):
    family, _, step, hf = folders
    other = "llama3" if family == "raven" else "raven"
    for place in (step, hf):
        with pytest.raises(ConfigError, match=f"--model {other}: .* holds a .*use --model"):
            load_model(place, model=other)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        load_model(tmp_path / "empty")


def test_a_run_on_text_comes_with_its_tokenizer_and_a_run_on_spikes_without(tmp_path):
    from tests.test_house import ENVIRONMENT
    from torchtitan_rd.config import load

    common = [
        "--training.seq_len=16",
        "--training.local_batch_size=1",
        "--training.steps=1",
        "--checkpoint.enable",
    ]
    common += [
        "--model.overrides.dim=32",
        "--model.overrides.n_layers=1",
        "--training.mixed_precision_param=float32",
    ]
    for dataset, kind in (("pydoc", "text"), ("synthetic", "spikes")):
        folder = tmp_path / dataset
        arguments = [*common, f"--training.dataset={dataset}", f"--job.dump_folder={folder}"]
        Trainer(load(arguments, ENVIRONMENT), ENVIRONMENT).run()
        loaded = load_model(folder)
        assert loaded.source.kind == kind and (loaded.tokenizer is None) == (kind == "spikes")
        assert loaded.source.vocab_size == (256 if kind == "spikes" else 258)
    assert load_model(tmp_path / "pydoc", tokenizer_path="none").tokenizer is None
    with pytest.raises(ConfigError, match="has no tokenizer that transformers can read"):
        transformers_tokenizer(tmp_path / "synthetic")
    assert transformers_tokenizer(tmp_path / "pydoc").encode("a") == [97]
    with pytest.raises(ConfigError, match=r"the tokenizer has ids up to 257, .* vocabulary of 256"):
        load_model(tmp_path / "synthetic", tokenizer_path="bytes")


def test_a_pad_token_beyond_the_rows_of_a_model_stops_nothing(tmp_path, caplog):
    """Of a tokenizer with more special tokens than the model that it was released with has rows."""
    from tokenizers import Tokenizer

    from tests.test_house import ENVIRONMENT

    (tmp_path / "tokenizer").mkdir()
    for name, content in tokenizer_files("bytes").files.items():
        (tmp_path / "tokenizer" / name).write_bytes(content)
    file = tmp_path / "tokenizer" / "tokenizer.json"
    backend = Tokenizer.from_file(str(file))
    backend.add_special_tokens(["<pad>"])
    backend.save(str(file))
    config = file.with_name("tokenizer_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "pad_token": "<pad>"}))

    weights = with_tokenizer(weights_of(tiny("llama3", vocab_size=258)), str(file.parent))
    assert weights.token_ids == {"bos_token_id": 256, "eos_token_id": 257}
    to_hf(weights, tmp_path / "hf", verify=False)
    loaded = load_model(tmp_path / "hf")
    assert loaded.tokenizer.vocab_size == 259 and "special tokens from id 258 on" in caplog.text
    prompt = encode_prompt(loaded.tokenizer, "a <pad>")
    assert generate(loaded, [prompt], Settings(max_new_tokens=2)).rows[0].prompt_ids == [256, *b"a <pad>"]
    keys = DatasetKeys(dataset="pydoc", seq_len=16, local_batch_size=1, global_batch_size=1)
    held_out = open_held_out(keys, "train", ENVIRONMENT, tokenizer_path=str(tmp_path / "hf"))
    check_vocabulary(loaded.shape, held_out)


def test_the_separator_of_spikes_is_no_row_that_pads_the_vocabulary(tmp_path, capsys):
    """Of the run, and of its export, which says nothing of the data but its bos."""
    from tests.test_house import ENVIRONMENT
    from torchtitan_rd.config import load

    arguments = ["--training.dataset=synthetic", "--model.vocab_padding_multiple=300", "--training.steps=1"]
    arguments += ["--training.seq_len=16", "--training.local_batch_size=1", "--checkpoint.enable"]
    arguments += ["--model.overrides.dim=32", "--model.overrides.n_layers=1"]
    folder = tmp_path / "dump"
    Trainer(load([*arguments, f"--job.dump_folder={folder}"], ENVIRONMENT), ENVIRONMENT).run()
    exported = tmp_path / "exported"
    to_hf(with_tokenizer(open_dcp(folder / "checkpoint" / "step-1")), exported, verify=False)

    for place in (folder, exported):
        loaded = load_model(place)
        assert (loaded.shape.vocab_size, loaded.source.vocab_size) == (300, 256)
        making = ["generate-spikes", str(place), "--unconditional", "--n-neurons", "20", "--gen-t", "1"]
        assert main([*making, "--out", str(tmp_path)]) == 0
        made = np.load(capsys.readouterr().out.strip())
        assert made["prompt"][0] == made["gen"][0] == 255 and (made["gen"][1:] < 255).all()


def test_a_checkpoint_of_two_ranks_is_the_model_that_one_rank_trains(tmp_path):
    common = ["--training.seq_len=16", "--training.global_batch_size=2", "--training.local_batch_size=1"]
    common += [
        "--model.name=raven",
        "--model.flavor=debug-demo",
        "--model.vocab_size=258",
        "--model.overrides.dim=32",
    ]
    common += ["--training.mixed_precision_param=float32", "--training.steps=1", "--checkpoint.enable"]
    found = []
    for ranks in (1, 2):
        finished = launch(ranks, [*common, f"--job.dump_folder={tmp_path / str(ranks)}"])
        assert finished.codes == [0] * ranks, finished.errors
        found.append(load_model(tmp_path / str(ranks)))
    one, two = (dict(loaded.model.named_parameters()) for loaded in found)
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)
    assert ids(found[0]) == ids(found[1])


@pytest.mark.gpu
def test_a_gpu_gives_the_tokens_of_the_cpu(folders):
    _, _, step, _ = folders
    assert ids(load_model(step, device="cuda")) == ids(load_model(step))
    for kv in ("full", "latest-m4") if load_model(step).spec.name == "raven" else ():
        options = {"kv": kv, "exits": ExitPolicy("latent-diff", 0.5)}
        assert ids(load_model(step, device="cuda"), **options) == ids(load_model(step), **options)
