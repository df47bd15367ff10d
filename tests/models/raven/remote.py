"""The code that leaves with a raven's weights, as a user loads it."""

import json
import sys

import pytest
from safetensors.torch import save_file

from torchtitan_rd.models.raven.hf import HF


@pytest.fixture(scope="module", autouse=True)
def fresh_code(tmp_path_factory):
    """Remote code is copied to a cache and imported from there: neither may hold an older copy."""
    from transformers import dynamic_module_utils

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    with pytest.MonkeyPatch.context() as patch:
        # The cache that an earlier test has made importable would be found first.
        patch.setattr(
            sys, "path", [place for place in sys.path if place != dynamic_module_utils.HF_MODULES_CACHE]
        )
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        forget()
        yield
        forget()


def export(model, folder, **fields):
    """Writes what a conversion writes; `folder` also names the module of its code."""
    folder.mkdir(parents=True)
    names, weights = HF.key_map(model.shape), dict(model.named_parameters())
    tensors = {theirs: weights[ours].detach().contiguous() for ours, theirs in names.items()}
    save_file({**tensors, **HF.buffers(model.shape)}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**HF.config_fields(model.shape), **fields}))
    for name, content in HF.code_files().items():
        (folder / name).write_bytes(content)
    return folder


def load(folder, **kwargs):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs)
