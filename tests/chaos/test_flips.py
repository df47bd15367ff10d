"""Bit flips in the checkpoints of runs as they are trained: in parts, on mixtures and on conversations.

Row 4 of docs/reliability.md; checkpoint/test_damage and chaos/test_kills flip those of one small model.
"""

import json
import random
from pathlib import Path

import pytest

from tests.chaos.harness import Job, flip_a_bit
from tests.test_finetune_chat import TEMPLATE
from torchtitan_rd.checkpoint import verify
from torchtitan_rd.conversion.tokenizer_files import tokenizer_files

STEPS = 6
KEYS = {"training__steps": STEPS, "checkpoint__async_mode": "disabled", "checkpoint__keep_latest_k": 4}
RAVEN = {
    "model__name": "raven",
    "model__flavor": "debug-demo",
    "model__overrides__n_layers": None,
    "model__overrides__n_layers_prelude": 1,
    "model__overrides__n_layers_coda": 1,
    "recurrence__lockstep": "false",
}


def mixture_of_conversations(folder: Path) -> Path:
    """-> a TOML file: half documents, half conversations, with a tokenizer that has a chat template"""
    folder.mkdir()
    for name, content in tokenizer_files("bytes").files.items():
        (folder / name).write_bytes(content)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    turns = [
        [{"role": "user", "content": f" {n} + {n}? "}, {"role": "assistant", "content": f"It is {2 * n}."}]
        for n in range(24)
    ]
    lines = [json.dumps({"messages": messages}) + "\n" for messages in turns]
    (folder / "train.jsonl").write_text("".join(lines))
    config = folder / "mixture.toml"
    config.write_text(f"""
[model]
tokenizer_path = "{folder}"
vocab_size = 258
[[training.mixture]]
name = "prose"
dataset = "pydoc-train"
weight = 0.5
[[training.mixture]]
name = "talk"
dataset = "chat"
dataset_path = "{folder / "train.jsonl"}"
weight = 0.5
""")
    return config


LAYOUTS = {
    "tensor parallel": {"parallelism__tensor_parallel_degree": 2},
    "context parallel": {"parallelism__context_parallel_degree": 2},
    "a raven whose ranks draw their own": RAVEN,
    "a mixture with conversations": {"training__dataset": None},
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_of_200_flips_is_found_and_three_runs_take_the_checkpoint_before(layout, tmp_path):
    job = Job(tmp_path, **KEYS, **LAYOUTS[layout])
    if "training__dataset" in LAYOUTS[layout]:
        job.arguments = [one for one in job.arguments if "dataset_path" not in one]
        job.arguments.append(f"--job.config_file={mixture_of_conversations(tmp_path / 'chat')}")
    job.finish(2)
    expected, rng = job.history(), random.Random(15)
    newest = job.checkpoints()[-1]
    files = sorted(newest.iterdir())
    assert {"__0_0.distcp", "__1_0.distcp"} <= {path.name for path in files}

    for trial in range(200):
        path = files[trial % len(files)]
        good = path.read_bytes()
        flip_a_bit(path, rng)
        assert verify(newest), f"trial {trial} in {path.name}"
        path.write_bytes(good)
    assert verify(newest) == []

    for name in ("state.json", "__1_0.distcp", rng.choice(files).name):
        flip_a_bit(job.checkpoints()[-1] / name, rng)
        error = job.finish(2).errors[0]
        assert f"resuming after step {STEPS - 1} " in error and f"step-{STEPS} is damaged: {name}" in error
        assert job.history() == expected
