"""A recurrent run on the standard library's own prose, trained for a few steps by launched ranks."""

from pathlib import Path

from tests.launch import launch, rows

CONFIG = """
[job]
dump_folder = "{dump}"
[model]
name = "{name}"
flavor = "{flavor}"
[model.overrides]
dim = 32
n_heads = 2
ffn_dim = 48
[optimizer]
lr = 1e-2
[lr_scheduler]
warmup_steps = 2
[training]
dataset = "pydoc-train"
shuffle_seed = 0
seq_len = 32
local_batch_size = 2
global_batch_size = 4
steps = 6
mixed_precision_param = "float32"
[validation]
enable = true
dataset = "pydoc-validation"
freq = 3
sequences = 8
partial_depth_eval = [1, 3]
[activation_checkpoint]
mode = "none"
[checkpoint]
enable = true
interval = 3
[metrics]
log_freq = 1
[comm]
init_timeout_seconds = 60
train_timeout_seconds = 20
heartbeat_seconds = 0
"""


def train(
    folder: Path, name: str = "raven", flavor: str = "debug-demo", ranks: int = 1, **replaced: str
) -> Path:
    """-> the config's path; the run is in folder / "dump"."""
    text = CONFIG.format(dump=folder / "dump", name=name, flavor=flavor)
    for old, new in replaced.items():
        text = text.replace(old, new)
    if name != "raven" and "n_kv_heads" not in text:  # debug flavors of Llamas have more of both
        text = text.replace("n_heads = 2\n", "n_heads = 2\nn_kv_heads = 2\nn_layers = 2\n")
    path = folder / "run.toml"
    path.write_text(text)
    finished = launch(ranks, ["--job.config_file", str(path)])
    assert finished.codes == [0] * ranks, finished.errors
    return path


def last_losses(folder: Path) -> dict[str, float]:
    """What the trainer's last validation found."""
    return {name: value for name, value in rows(folder / "dump")[-1].items() if name.startswith("val_loss")}
