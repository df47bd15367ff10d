"""The configs of the systems that this one follows, key for key as they were written, load with warnings."""

import pytest

from torchtitan_rd.config import load
from torchtitan_rd.job import Environment

ENVIRONMENT = Environment(rank=0, local_rank=0, world_size=1, local_world_size=1, log_level="INFO")

NEURAL = """
[job]
dump_folder = "./outputs/{name}"
description = "{name} training"
[profiling]
enable_profiling = false
save_traces_folder = "profile_trace"
profile_freq = 10
[metrics]
log_freq = {log}
enable_tensorboard = false
save_tb_folder = "tb"
[model]
name = "llama3"
flavor = "8B"
norm_type = "rmsnorm"
[optimizer]
name = "AdamW"
lr = {lr}
[training]
batch_size = 1
seq_len = 131072
vocab_size = 256
warmup_steps = {warmup}
max_norm = 1.0
steps = {steps}
data_parallel_replicate_degree = 1
data_parallel_shard_degree = -1
tensor_parallel_degree = 1
compile = false
dataset = "{dataset}"
[experimental]
pipeline_parallel_degree = 1
[checkpoint]
enable_checkpoint = true
folder = "checkpoint"
interval_type = "steps"
interval = {save}
model_weights_only = false
export_dtype = "bfloat16"
async_mode = "async"
[activation_checkpoint]
mode = 'full'
selective_ac_option = 'op'
[float8]
enable_float8_linear = false
"""

CLM = """
activation_checkpoint_args:
  mode: selective
  selective_ac_option: '2'
checkpoint_args:
  async_mode: disabled
  create_seed_checkpoint: false
  enable_checkpoint: true
  exclude_from_loading: []
  export_dtype: float32
  folder: 20250307-111612
  interval: 500
  interval_type: steps
  keep_latest_k: 3
  load_step: -1
  model_weights_only: false
comm_args:
  init_timeout_seconds: 300
  trace_buf_size: 20000
  train_timeout_seconds: 100
experimental_args:
  context_parallel_degree: 1
  context_parallel_rotate_method: allgather
  enable_async_tensor_parallel: false
  enable_compiled_autograd: false
  pipeline_parallel_degree: 1
  pipeline_parallel_microbatches: null
  pipeline_parallel_schedule: 1F1B
  pipeline_parallel_schedule_csv: ''
  pipeline_parallel_split_points: []
float8_args:
  enable_float8_linear: false
  enable_fsdp_float8_all_gather: false
  precompute_float8_dynamic_scale_for_fsdp: false
job_args:
  description: Pretrain aixsim 60M
  dump_folder: outputs/checkpoints/aixsim-60M
  print_args: false
  use_for_integration_test: false
memory_estimation_args:
  disable_fake_mode: false
  enabled: false
metrics_args:
  disable_color_printing: false
  enable_tensorboard: false
  enable_wandb: true
  log_freq: 10
  rank_0_only: true
  save_tb_folder: tb
model_args:
  flavor: 60M
  name: aixsim
  norm_type: rmsnorm
  tokenizer_path: HuggingFaceTB/cosmo2-tokenizer
optimizer_args:
  early_step_in_backward: false
  fused: false
  lr: 0.0001
  name: AdamW
profiling_args:
  enable_memory_snapshot: false
  enable_profiling: false
  profile_freq: 10
  save_memory_snapshot_folder: memory_snapshot
  save_traces_folder: profile_traces
training_args:
  batch_size: 48
  compile: true
  data_parallel_replicate_degree: 1
  data_parallel_shard_degree: 2
  dataset: fineweb-edu
  dataset_path: HuggingFaceFW/fineweb-edu
  deterministic: false
  disable_loss_parallel: false
  enable_cpu_offload: false
  fsdp_reshard_after_forward: default
  gc_freq: 50
  max_norm: 1.0
  mixed_precision_param: bfloat16
  mixed_precision_reduce: float32
  seed: 42
  seq_len: 2048
  steps: 7075
  tensor_parallel_degree: 1
  warmup_steps: 1415
"""

RUNS = {  # what the configurations of the Neural Pile differ in
    "primate": {"log": 390, "save": 390, "lr": 3e-4, "warmup": 1000, "steps": 50000, "dataset": "primate"},
    "lang_primate": {
        "log": 235,
        "save": 235,
        "lr": 3e-4,
        "warmup": 1000,
        "steps": 30000,
        "dataset": "primate",
    },
    "synthetic_primate": {
        "log": 240,
        "save": 240,
        "lr": 3e-4,
        "warmup": 1000,
        "steps": 50000,
        "dataset": "primate",
    },
    "synthetic": {
        "log": 60,
        "save": 240,
        "lr": 3e-5,
        "warmup": 2000,
        "steps": 500000,
        "dataset": "synthetic",
    },
}


def load_text(path, text):
    path.write_text(text)
    return load(["--job.config_file", str(path)], ENVIRONMENT)


@pytest.mark.parametrize("name", RUNS)
def test_a_neural_pile_toml_loads_and_says_what_ours_says(name, tmp_path):
    loaded = load_text(tmp_path / "x.toml", NEURAL.format(name=f"{name}_8B_131k", **RUNS[name]))
    assert any("training.batch_size is now" in warning for warning in loaded.warnings)
    ours = load(["--job.config_file", f"train_configs/{name}_8b_131k.toml"], ENVIRONMENT).config.as_dict()
    theirs = loaded.config.as_dict()
    differ = {
        f"{section}.{key}": (value, theirs[section][key])
        for section, keys in ours.items()
        for key, value in keys.items()
        if value != theirs[section][key]
    }
    # Only what names the file, a folder of an unused feature, an unused option,
    # or repeats a flavor's own value.
    assert set(differ) <= {
        "job.config_file",
        "job.description",
        "model.overrides",
        "profiling.save_traces_folder",
        "activation_checkpoint.selective_ac_option",
    }, differ


def test_the_clm_config_loads_from_yaml_with_the_suffix_args(tmp_path):
    loaded = load_text(tmp_path / "x.yaml", CLM)
    config = loaded.config
    assert (config.model.name, config.model.flavor, config.training.local_batch_size) == ("aixsim", "60M", 48)
    assert config.compile.enable and config.lr_scheduler.warmup_steps == 1415 and config.metrics.enable_wandb
    assert config.optimizer.implementation == "foreach"
    assert config.parallelism.data_parallel_shard_degree == 2
    assert len(loaded.warnings) > 10
