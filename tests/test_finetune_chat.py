"""train_configs/finetune_chat.toml as it stands, on a tiny model and a tiny file: from given weights, on the
answers alone, and on after a stop as if there had been none.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from torchtitan_rd import job
from torchtitan_rd.config import load
from torchtitan_rd.conversion.tokenizer_files import tokenizer_files
from torchtitan_rd.train import Trainer
from torchtitan_rd.train_step import TrainStep

ALONE = job.Environment(rank=0, local_rank=0, world_size=1, local_world_size=1, log_level="WARNING")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'][0] + ':' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '\\n' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
SEQ_LEN = 40


@pytest.fixture
def start(tmp_path, monkeypatch):
    """steps, keys -> the rows of metrics.jsonl of a run of the shipped recipe."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, content in tokenizer_files("bytes").files.items():
        Path(tmp_path / "tokenizer").mkdir(exist_ok=True)
        (tmp_path / "tokenizer" / name).write_bytes(content)
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    Path(tmp_path / "rows").mkdir()
    for split, count in (("train", 24), ("test", 8)):
        rows = [{"question": f" {i} + {i}? ", "answer": f"It is {2 * i}.{'!' * i}"} for i in range(count)]
        (tmp_path / "rows" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(folder: str, **keys) -> list[dict]:
        small = {
            "job.dump_folder": tmp_path / folder,
            "job.config_file": "train_configs/finetune_chat.toml",
            "model.flavor": "debug",
            "model.tokenizer_path": tmp_path / "tokenizer",
            "model.vocab_size": 258,
            "training.dataset_path": tmp_path / "rows",
            "training.seq_len": SEQ_LEN,
            "training.global_batch_size": 4,
            "training.steps": 4,
            "training.mixed_precision_param": "float32",
            "lr_scheduler.warmup_steps": 1,
            "lr_scheduler.cooldown_steps": 1,
            "optimizer.lr": 1e-2,
            "validation.sequences": 8,
            "validation.partial_depth_eval": [1],
            "checkpoint.interval": 2,
            "metrics.log_freq": 1,
            "comm.heartbeat_seconds": 0,
            **keys,
        }
        Trainer(load([f"--{key}={value}" for key, value in small.items()], ALONE), ALONE).run()
        log = tmp_path / folder / "metrics.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    return start


def test_the_recipe_learns_answers_from_given_weights_and_goes_on_exactly(start, tmp_path, monkeypatch):
    losses, step = [], TrainStep.__call__

    def recorded(self, number, batches, tokens_seen):
        losses.append(expected_loss(self, number, batches, tmp_path))
        return step(self, number, batches, tokens_seen)

    start("given", **{"checkpoint.create_seed_checkpoint": "true", "training.seed": 1})
    monkeypatch.setattr(TrainStep, "__call__", recorded)
    given = {"checkpoint.initial_load_path": tmp_path / "given" / "checkpoint"}
    rows = start("whole", **given)
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(losses, abs=1e-5)
    assert losses[-1] < losses[0] and "val_loss" in rows[-1]
    assert start("other weights")[0]["loss"] != rows[0]["loss"]

    # What a kill after step 3 would leave.
    step_2 = Path("checkpoint") / "step-2"
    shutil.copytree(tmp_path / "whole" / step_2, tmp_path / "resumed" / step_2)
    resumed = start("resumed", **given)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in rows if row["step"] > 2]


def expected_loss(step, number, batches, folder) -> float:
    """Of the tokens that transformers marks as the assistant's in the rows of this batch."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    by_ids = {}
    for line in (folder / "rows" / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        encoded = tokenizer.apply_chat_template(
            [
                {"role": "user", "content": row["question"].strip()},
                {"role": "assistant", "content": row["answer"].strip()},
            ],
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = (encoded[key][: SEQ_LEN + 1] for key in ("input_ids", "assistant_masks"))
        by_ids[tuple(ids[:12])] = (ids, mask)

    losses = []
    for place, batch in enumerate(batches):
        drawn = step.forward_inputs(number, place, batch)
        with torch.no_grad():
            logits = step.model(batch.inputs, batch.document_ids, **drawn.kwargs)
        for inputs, out in zip(batch.inputs.tolist(), logits, strict=True):
            ids, mask = by_ids[tuple(inputs[:12])]
            for position in range(len(ids) - 1):
                if mask[position + 1]:
                    losses.append(F.cross_entropy(out[position], torch.tensor(ids[position + 1])))
    return torch.stack(losses).mean().item()
