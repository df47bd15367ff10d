"""Exported folders under the transformers versions that people have,
each in a virtual environment of its own.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conversion.common import tiny, weights_of
from tests.models.raven.tiny import RETROFITTED
from torchtitan_rd.conversion.pipeline import to_hf, with_tokenizer

VERSIONS = {
    "4.53": ("transformers==4.53.3", "huggingface-hub<1", "tokenizers<0.22"),
    "4.57": ("transformers==4.57.6", "huggingface-hub<1", "tokenizers<0.23"),
    "5.0": ("transformers==5.0.0", "huggingface-hub<2", "tokenizers<0.23"),
    "5.23": ("transformers==5.23.0", "huggingface-hub>=2", "tokenizers>=0.22"),
}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama3", {}),
    ("llama3", {"tie_word_embeddings": True}),
    ("raven", {}),
    ("raven", RETROFITTED),
]
CHILD = """
import json, sys, torch, transformers
sys.modules["torchtitan_rd"] = None  # what an export needs lies in it
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, ids, extra = sys.argv[1], torch.tensor(json.loads(sys.argv[2])), json.loads(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).float().eval()
tied = model.lm_head.weight is model.get_input_embeddings().weight
with torch.no_grad():
    logits = model(ids, **extra).logits
    given = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, **extra)
    given["attention_mask"] = torch.ones_like(ids)
    outputs = [model.generate(ids, use_cache=cache, **given).tolist() for cache in (True, False)]
if extra:  # a raven, with the arguments of its own
    given["return_dict_in_generate"] = True
    full, one, some = (
        model.generate(ids, criterion="kl", exit_threshold=at, **given) for at in (0, 1e9, "auto")
    )
    free = {**given, "min_new_tokens": None}
    plain, drafted = (model.generate(ids, **own, **free) for own in ({}, {"draft_steps": 2}))
    assert full.sequences.tolist() == outputs[0] and drafted.sequences.equal(plain.sequences)
    assert full.steps.eq(4).all() and one.steps.eq(1).all() and some.exit_values[0].shape[1] == 2
    chosen = {**given, "do_sample": True, "temperature": 0.8, "top_k": 20}
    draws = []
    for own in ({}, {"cache_lookup_strategy": "full"}):
        torch.manual_seed(0)
        draws.append(model.generate(ids, **chosen, **own).sequences.tolist())
    assert draws[0] == draws[1]
if extra:  # as a Trainer leaves it
    model.train()
    model.gradient_checkpointing_enable()
    following = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    ways = ({"labels": ids}, {"shift_labels": following})
    labelled = [model(ids, use_cache=True, **way, **extra).loss for way in ways]
    assert torch.equal(*labelled), labelled
    assert model.generate(ids, max_new_tokens=2, min_new_tokens=2, pad_token_id=0).shape == (2, 14)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
text = tokenizer.encode("Hi \\u00e9", add_special_tokens=False)
print(json.dumps([transformers.__version__, logits.tolist(), outputs, text, tied]))
"""


def environment(folder: Path, packages: tuple[str, ...]) -> Path:
    """Python of a new virtual environment with `packages`, and all else from this one."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    inherited = next(folder.glob("lib/python*/site-packages")) / "inherited.pth"
    inherited.write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "--ignore-installed", *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{packages} cannot be installed here: {done.stderr[-300:]}")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_exported_folders_load_offline_and_compute_the_same(version, tmp_path):
    python = environment(tmp_path / "environment", VERSIONS[version])
    ids = torch.randint(0, 258, (2, 12), generator=torch.Generator().manual_seed(0))
    for family, fields in MODELS:
        model = tiny(family, vocab_size=258, **fields)
        weights = with_tokenizer(weights_of(model, family), "bytes")
        folder = tmp_path / f"{family}{len(fields)}"
        to_hf(weights, folder, verify=False)
        state = torch.zeros(2, 12, 32)
        own = {"num_steps": (4, 0), "initial_state": state} if family == "raven" else {}
        extra = {"num_steps": 4, "init_scale": 0.0} if family == "raven" else {}
        variables = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "cache"),
            "PYTHONPATH": "",
        }
        command = [python, "-c", CHILD, folder, json.dumps(ids.tolist()), json.dumps(extra)]
        done = subprocess.run(command, capture_output=True, text=True, env=variables)
        assert done.returncode == 0, done.stderr
        answer = next(line for line in done.stdout.splitlines() if line.startswith("["))
        found, logits, (cached, uncached), text, tied = json.loads(answer)
        assert found.startswith(version)
        with torch.no_grad():
            assert (torch.tensor(logits) - model(ids, **own)).abs().max() <= 1e-5
        assert cached == uncached
        assert text == list("Hi \u00e9".encode())
        assert tied == model.shape.tie_word_embeddings
