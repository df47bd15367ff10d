"""The run configs of Huginn's trainer load as ours, and mean the same steps, batch and optimizer."""

import json
from dataclasses import replace

import pytest

from torchtitan_rd.__main__ import main
from torchtitan_rd.config import load
from torchtitan_rd.data import BatchDims
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.huginn_config import Updates
from torchtitan_rd.job import Environment
from torchtitan_rd.run_plan import resolve

ALONE = Environment(rank=0, local_rank=0, world_size=1, local_world_size=1, log_level="INFO")

# What the shipped run configs have in common.
COMMON = """  betas: [0.9, 0.95]
  update_clipping: true
  atan_adam: true
  running_init: true
  decouple_wd: true
no_weight_decay_for_bias_and_norm_params: true
lr_schedule: trapezoid
warmup_steps: 4096
cooldown_steps: 4096
min_lr: 0.0
"""

HUGINN_V2 = """
run_name: huginn-v2
out_dir: {folder}/out
model_name: nebel-raven-3.5b
model_overwrite:
  attn_impl: tridao
  use_fused_head: pytorch
  lockstep_n: true
  lockstep_k: true
  mup_model_scaling_factor: 1
world_batch_size: 4096
micro_batch_size: 1
block_size: 4096
max_tokens: 4e12
seed: 233
optimizer: ELLISAdam
optim_config:
  lr: 4e-5
  weight_decay: 4e-5
{common}fabric_strategy: simple-ddp
fabric:
  optim_sharding: true
compile_model: true
dynamo_ddp_config: python_reducer
gradient_checkpointing: true
loss_guardrail_active: false
skip_nonfinite_grads: false
log_step_interval: 4
save_step_interval: 128
eval_step_interval: 128
eval_iters: 1
save_n_min_before_job_done: 5
save_last_step: true
partial_depth_eval: [1, 4, 8, 16, 64]
all_block_size_tensors: true
pad_to_block_size: true
data_config:
  train_data: [{{type: pqds-pure, prefix: train, data_dir: "{folder}/data"}}]
  val_data: [{{type: pqds-pure, prefix: val, data_dir: "{folder}/data"}}]
""".replace("{common}", COMMON)

BASELINE = HUGINN_V2.replace("micro_batch_size: 1", "micro_batch_size: 2").replace(
    "model_overwrite:\n",
    "model_overwrite:\n  mean_recurrence: 1\n  mean_backprop_depth: 1\n  sampling_scheme: non-recurrent\n",
)

RECURRENT = """
run_name: recurrent
model_name: magpie-150m
model_overwrite:
  vocab_size: 32000
  lockstep_n: true
  lockstep_k: true
  mup_model_scaling_factor: 1
world_batch_size: 1024
micro_batch_size: 8
batch_size_ramp: 65536
block_size: 4096
max_tokens: 1e10
seed: 233
optimizer: ELLISAdam
optim_config:
  lr: 4e-4
  weight_decay: 2e-5
{common}compile_model: true
loss_guardrail_active: true
skip_nonfinite_grads: true
log_step_interval: 256
save_step_interval: 2048
eval_step_interval: 2048
eval_iters: 64
partial_depth_eval: [1, 4, 8, 16, 64]
data_config:
  train_data: [{{type: pkds, prefix: train, data_dir: "{folder}/data"}}]
  val_data: [{{type: pkds, prefix: val, data_dir: "{folder}/data"}}]
""".replace("{common}", COMMON)


@pytest.fixture
def read(tmp_path):
    for part in ("train", "val"):
        (tmp_path / "data" / part).mkdir(parents=True)
        (tmp_path / "data" / part / "000_00000.parquet").touch()

    def load_text(text, ranks=1, *overrides):
        path = tmp_path / "run.yaml"
        path.write_text(text.format(folder=tmp_path))
        environment = replace(ALONE, world_size=ranks)
        return load(["--job.config_file", str(path), *overrides], environment)

    return load_text


ELLIS = {
    "name": "ELLISAdam",
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-6,  # of that optimizer, where the config leaves it out
    "update_clipping": True,
    "atan_adam": True,
    "running_init": True,
    "decouple_wd": True,
    "no_weight_decay_for_bias_and_norm": True,
    "nesterov": False,
}


@pytest.mark.parametrize(
    ("text", "ranks", "batch", "rates"),
    [(HUGINN_V2, 4096, (4096, 1), (4e-5, 4e-5)), (BASELINE, 2048, (4096, 2), (4e-5, 4e-5))],
    ids=["huginn_v2", "baseline"],
)
def test_the_large_runs_have_their_steps_batch_and_optimizer(text, ranks, batch, rates, read):
    loaded = read(text, ranks)
    config = loaded.config
    training, schedule = config.training, config.lr_scheduler
    assert training.steps == int(4e12 / (4096 * 4096)) == 238418
    assert (training.global_batch_size, training.local_batch_size) == batch and training.batch_ramp_steps == 0
    assert (schedule.schedule, schedule.convention, schedule.min_lr_factor) == ("trapezoid", "huginn", 0.0)
    assert (schedule.warmup_steps, schedule.cooldown_steps) == (4096, 4096)
    optimizer = config.optimizer.model_dump()
    assert {key: optimizer[key] for key in ELLIS} == ELLIS and (
        optimizer["lr"],
        optimizer["weight_decay"],
    ) == rates

    assert (config.metrics.log_freq, config.checkpoint.interval, config.validation.freq) == (4, 128, 128)
    assert config.validation.sequences == batch[1] * ranks
    assert (training.on_nonfinite, training.loss_guard, training.seed) == ("stop", None, 233)
    assert config.activation_checkpoint.mode == "full" and config.compile.enable
    plan = resolve(config, replace(ALONE, world_size=ranks))
    assert plan.count_parameters() == 3_564_976_800 and plan.batch.accumulation == 1
    expected = (
        "non-recurrent, mean 1, with gradient 1" if text is BASELINE else "filling, mean 32, with gradient 8"
    )
    assert expected in plan.draws.family.report()


def test_what_has_no_counterpart_is_named_in_one_warning(read):
    warnings = read(HUGINN_V2, 4096).warnings
    (line,) = [warning for warning in warnings if "not carried over" in warning]
    for name in ("attn_impl", "use_fused_head", "simple-ddp", "python_reducer", "optim_sharding"):
        assert name in line
    for carried in ("world_batch_size", "lr_schedule", "lockstep"):
        assert carried not in line
    assert any("set training.pad_id" in warning for warning in warnings)


def test_the_small_run_has_the_tokens_of_its_growing_batch(read):
    """Against the rows that the run's own batch has at each step."""
    loaded = read(RECURRENT, 8)
    config, rows = loaded.config, 1e10 / 4096
    training, schedule = config.training, config.lr_scheduler
    dims = BatchDims.resolve(training, 0, 8)
    assert dims.stages == 16 and training.batch_ramp_steps == round(2 * 65536 / 17)
    ends = []
    for step in range(1, training.steps + 2):
        ends.append((ends[-1] if ends else 0) + dims.rows_at(step))
    assert ends[training.steps - 1] <= rows < ends[training.steps]

    # 4096 microbatches of 64 sequences each at both ends of the rate.
    assert abs(ends[schedule.warmup_steps - 1] - 4096 * 64) <= dims.rows_at(schedule.warmup_steps + 1)
    falling = ends[training.steps - 1] - ends[training.steps - schedule.cooldown_steps - 1]
    assert abs(falling - 4096 * 64) <= 1024
    assert (config.metrics.log_freq, config.checkpoint.interval, config.validation.freq) == (16, 128, 128)
    assert (training.loss_guard, training.on_nonfinite) == (6.0, "skip")
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (4e-4, 2e-5)
    assert config.model.vocab_size == 32000 and config.activation_checkpoint.mode == "none"
    assert config.validation.sequences == 64 * 8 * 8
    assert any("'pkds' is not carried over" in warning for warning in loaded.warnings)


def test_without_the_ramp_its_counts_are_divided_by_16_as_the_page_says(read):
    config = read(RECURRENT.replace("batch_size_ramp: 65536\n", ""), 8).config
    assert (config.lr_scheduler.warmup_steps, config.lr_scheduler.cooldown_steps) == (256, 256)
    assert config.training.steps == int(1e10 / (1024 * 4096)) == 2384
    assert config.training.batch_ramp_steps == 0


def test_the_same_config_on_other_ranks_has_other_counts_but_the_same_tokens(read):
    text = RECURRENT.replace("batch_size_ramp: 65536\n", "")
    two, sixteen = (read(text, ranks).config for ranks in (2, 16))
    assert (two.lr_scheduler.warmup_steps, sixteen.lr_scheduler.warmup_steps) == (64, 512)
    assert two.training.steps == sixteen.training.steps == 2384


@pytest.mark.parametrize("microbatches", [1, 2, 16])
@pytest.mark.parametrize("ramp", [0, 100, 65536])
def test_updates_are_counted_as_one_by_one(microbatches, ramp):
    updates = Updates(microbatches, ramp)
    done = 0
    for step in range(1, 2000):
        size = (
            -(-step * microbatches // updates.ramp)
            if updates.ramp > 0 and step <= updates.ramp
            else microbatches
        )
        done += size
        assert updates.in_first(done) == pytest.approx(step)
    assert (updates.ramp == 0) is (ramp == 0 or microbatches == 1)


def test_what_is_left_out_has_that_trainers_default_not_ours(read):
    config = read(
        "model_name: magpie-150m\nworld_batch_size: 8\nmicro_batch_size: 4\nmax_steps: 10\n", 1
    ).config
    assert (config.training.seed, config.training.seq_len) == (1337, 2048)
    assert (config.lr_scheduler.schedule, config.lr_scheduler.warmup_steps) == ("cosine", 0)
    assert config.lr_scheduler.min_lr_factor == pytest.approx(0.1)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay, optimizer.beta2) == (
        "AdamW",
        4e-4,
        0.1,
        0.95,
    )
    assert config.activation_checkpoint.mode == "none" and not config.recurrence.lockstep
    assert (config.training.steps, config.metrics.log_freq, config.checkpoint.interval) == (5, 1, 1000)
    assert config.model.vocab_size == 65536 and config.recurrence.draw_per == "microbatch"


def test_fields_of_the_model_get_our_names(read):
    text = (
        "model_name: magpie-150m\nworld_batch_size: 4\nmax_steps: 8\nmodel_overwrite:\n"
        "  n_embd: 64\n  num_attention_heads: 4\n  intermediate_size: 96\n  block_class_name: SandwichBlock\n"
        "  rope_settings: {{rope_base: 10000.0, use_rope: true}}\n  padding_multiple: 512\n"
        "  activation_checkpoint_impl: per-block\n  mcleish_throttle: true\n  injection_type: linear\n"
        "goldfish: {{strategy: hash-table, k_token_loss_dropout: 3, context_width: 5, start_position: 0}}\n"
        "fabric: {{all_reduce_dtype: bf16}}\n"
    )
    config = read(text).config
    assert config.model.overrides == {
        "dim": 64,
        "n_heads": 4,
        "ffn_dim": 96,
        "block": "sandwich",
        "rope_theta": 10000.0,
        "injection": "linear",
    }
    assert config.model.vocab_padding_multiple == 512 and config.training.throttle
    assert config.activation_checkpoint.recurrent_region == "block"
    training = config.training
    assert (training.goldfish_strategy, training.goldfish_k, training.goldfish_context_width) == (
        "hash-table",
        3,
        5,
    )
    assert training.mixed_precision_reduce == "bfloat16"


def test_the_command_line_overrides_such_a_file_too(read):
    config = read(HUGINN_V2, 4096, "--training.steps=7", "--optimizer_args.lr=1e-3").config
    assert (config.training.steps, config.optimizer.lr) == (7, 1e-3)


def test_config_reads_such_a_file_as_on_the_ranks_it_is_told(read, tmp_path, capsys):
    read(RECURRENT)
    path, data = str(tmp_path / "run.yaml"), f"--training.dataset_path={tmp_path}/data/train/*.parquet"
    held_out = ["--validation.dataset_path", f"{tmp_path}/data/val/*.parquet"]
    assert main(["config", "--ranks", "8", path, data, *held_out]) == 0
    out = capsys.readouterr().out
    assert "grows in 16 stages" in out and "run.yaml:3: model_name" in out.replace(
        "run.yaml:2:", "run.yaml:3:"
    )
    assert "default of grad_clip there" in out


def test_a_data_config_may_be_a_file_and_variables_are_expanded(read, tmp_path, monkeypatch):
    monkeypatch.setenv("ROWS", str(tmp_path / "data"))
    table = {"train_data": [{"type": "pqds-pure", "data_dir": "$ROWS/train"}]}
    (tmp_path / "data.json").write_text(json.dumps(table))
    start = "model_name: magpie-150m\nworld_batch_size: 4\nmax_steps: 8\n"
    config = read(start + "data_config: {folder}/data.json\n").config
    assert config.training.dataset_path == str(tmp_path / "data" / "train" / "*.parquet")
    assert not config.validation.enable
    resolve(config, ALONE)


def test_all_that_cannot_be_carried_over_is_one_error(read):
    text = HUGINN_V2.replace("optimizer: ELLISAdam", "optimizer: SOAP").replace("simple-ddp", "axonn_tp")
    text = text.replace(
        "lockstep_k: true", "lockstep_k: false\n  embed_step: true\n  n_embed: 3\n  block_size: 2048"
    )
    text = (
        text[: text.index("data_config:")] + "data_config: {{train_data: [{{type: pqds}}, {{type: pqds}}]}}\n"
    )
    text += "label_smoothing: 0.1\nresume: false\nfabric_precision: bf16-true\nblock_sise: 3\n"
    with pytest.raises(ConfigError) as caught:
        read(text, 4096)
    lines = str(caught.value).splitlines()
    named = (
        "label_smoothing = 0.1",
        "optimizer = 'SOAP'",
        "resume = False",
        "fabric_precision = 'bf16-true'",
        "fabric_strategy = 'axonn_tp'",
        "did you mean 'block_size'?",
        "lockstep_n = True",
        "embed_step = True",
        "n_embed = 3",
        "block_size = 2048",
        "data_config.train_data[0]",
        "data_config.train_data[1]",
    )
    assert len(lines) == len(named)
    for name in named:
        assert sum(name in line for line in lines) == 1, (name, lines)
    assert "did you mean 'n_embd'?" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("world_batch_size: 4096\n", "model_name is missing"),
        ("model_name: nebel-raven-3.6b\n", "did you mean 'nebel-raven-3.5b'?"),
        ("model_name: magpie-150m\nworld_batch_size: 6\n", "world_batch_size = 6 is not a multiple of"),
        ("model_name: magpie-150m\nwarmup_steps: many\n", "warmup_steps = 'many' must be a number"),
        ("model_name: magpie-150m\noptim_config: fast\n", "optim_config = 'fast' must be a table"),
        ("model_name: magpie-150m\noptim_config: {{betas: 3}}\n", "must be a pair"),
        ("model_name: magpie-150m\noptim_config: {{atan_adam: true}}\n", "no option of AdamW here"),
        ("model_name: magpie-150m\ndata_config: /nowhere.json\n", "cannot be read"),
        ("model_name: magpie-150m\ngoldfish: {{strategy: other}}\n", "goldfish.strategy = 'other'"),
        ("model_name: magpie-150m\nlr_schedule: step\n", "lr_schedule"),
        ("model_name: [magpie-150m]\n", "is no flavor of raven"),
        ("model_name: magpie-150m\noptimizer: [AdamW]\n", "optimizer = \"['AdamW']\""),
        ("model_name: magpie-150m\nmodel_overwrite: {{block_class_name: [3]}}\n", "block_class_name = [3]"),
        (
            "model_name: magpie-150m\nmodel_overwrite: {{norm_class_name: LayerNorm}}\n",
            "= 'LayerNorm' cannot",
        ),
        ("model_name: magpie-150m\nmax_tokens: 1e12\nmax_steps: 10000\n", "leave one of them out"),
    ],
)
def test_a_mistake_in_such_a_file_is_one_line(text, message, read):
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert message in str(caught.value) and "run.yaml" in str(caught.value)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("number", [".nan", ".inf", "1e400"])
def test_a_number_that_is_none_or_has_no_end_is_one_error(number, read):
    text = f"model_name: magpie-150m\nworld_batch_size: 4\nmax_steps: {number}\n"
    with pytest.raises(ConfigError, match=r"max_steps = (nan|inf) must be a number of at least 1"):
        read(text)


def test_a_field_that_stands_twice_is_an_error_with_its_line(read):
    text = "model_name: magpie-150m\nseed: 1\nworld_batch_size: 4\nseed: 2\nmax_steps: 3\n"
    with pytest.raises(ConfigError, match=r"the key 'seed' stands here twice(.|\n)*line 4"):
        read(text)
