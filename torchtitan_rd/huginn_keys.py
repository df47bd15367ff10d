"""What the run configs of Huginn's trainer (recurrent-pretraining) call our keys, and with which defaults.

huginn_config.py translates a file by these tables.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torchtitan_rd.errors import ConfigError
from torchtitan_rd.models.raven.released import NOT_BUILT, OPTIONS, ROTARY, SIZES


class Row(NamedTuple):
    """new: our key. default: what that trainer takes where the field is left out.
    convert: theirs -> ours, or None where ours is to keep its default.
    """

    new: str
    default: Any
    convert: Callable[[Any], Any] = lambda value: value


def _choice(known: Mapping[Any, Any]) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if value not in known:
            raise ConfigError(f"only {', '.join(map(str, known))} have a counterpart here")
        return known[value]

    return convert


def _flag(on: Any, off: Any) -> Callable[[Any], Any]:
    return lambda value: on if value else off


FIELDS: dict[str, Row] = {
    "run_name": Row("job.description", "default-run"),
    "out_dir": Row("job.dump_folder", None),
    "tokenizer_path": Row("model.tokenizer_path", None),
    "seed": Row("training.seed", 1337),
    "block_size": Row("training.seq_len", 2048),
    "world_batch_size": Row("training.global_batch_size", 2048),
    "micro_batch_size": Row("training.local_batch_size", 4),
    "dataloader_num_workers": Row("training.num_workers", 0),
    "grad_clip": Row("training.max_norm", 1.0, float),
    "z_regularization": Row("training.z_loss_weight", 0.0, float),
    "skip_nonfinite_grads": Row("training.on_nonfinite", False, _flag("skip", "stop")),
    "loss_guardrail_active": Row("training.loss_guard", False, _flag(6.0, None)),
    "fabric_precision": Row(
        "training.mixed_precision_param",
        "bf16-mixed",
        _choice({"bf16-mixed": "bfloat16", "32": "float32", 32: "float32", "32-true": "float32"}),
    ),
    "lr_schedule": Row("lr_scheduler.schedule", "cosine"),
    "no_weight_decay_for_bias_and_norm_params": Row("optimizer.no_weight_decay_for_bias_and_norm", False),
    "compile_model": Row("compile.enable", False),
    "fail_instead_of_recompile": Row("compile.fail_on_recompile", False),
    "gradient_checkpointing": Row("activation_checkpoint.mode", False, _flag("full", "none")),
    "model_checkpoint": Row("checkpoint.initial_load_path", None),
    "partial_depth_eval": Row("validation.partial_depth_eval", []),
    "logger_project": Row("metrics.wandb_project", None),
}
"""Fields that are translated singly."""

TOGETHER = (
    *("model_name", "model_overwrite", "optimizer", "optim_config", "min_lr", "goldfish", "data_config"),
    *("max_tokens", "max_steps", "warmup_steps", "cooldown_steps", "batch_size_ramp"),
    *("log_step_interval", "save_step_interval", "eval_step_interval", "eval_iters"),
    *("shuffle_filenames", "shuffle_blocks", "fabric"),
)
"""Fields that depend on each other."""

HARMLESS: dict[str, tuple[Any, ...]] = {
    "label_smoothing": (0, 0.0),
    "resume": (True,),
    "ignore_block_size_mismatch": (False,),
    "allow_nonfinite_loss": (False,),
    "save_first_step": (False,),
}
"""Fields of what is not built: only these values have a meaning here."""

WITHOUT_EFFECT = (
    *("model_impl", "fabric_strategy", "dynamo_ddp_config", "compile_optimizer"),
    *("compiled_autograd", "matmul_precision", "logger", "model_telemetry", "data_telemetry"),
    *("shape_watching_steps", "save_last_step", "save_n_min_before_job_done", "measure_utilization"),
    *("pad_to_block_size", "add_bos", "add_eos", "data_signature", "collate_checks_enabled"),
    *("all_block_size_tensors",),
)
"""Fields that decide where and how something is computed or logged, not what; or what packed rows settle."""

FLAVORS = {"debug-recurrent": "debug"}

OPTIMIZERS: dict[str, dict[str, Any]] = {  # what each takes where optim_config leaves it out
    "AdamW": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
    "Adam": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    "ELLISAdam": {"lr": 3e-4, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 1e-2},
}
OPTIM_CONFIG = {"lr": 4e-4, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
"""Where there is no optim_config at all."""
ELLIS_FLAGS = (
    *("update_clipping", "atan_adam", "running_init", "decouple_wd", "kahan_sum_compensation", "nesterov"),
    *("poly_ema_p", "tensor_wise_gradient_normalization", "eps_adjustment", "tensor_wise_finite_check"),
    *("adafactor_like_beta_corrections", "brute_force_clip"),
)
BUFFERS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

MODEL_FIELDS = {
    **{theirs: f"model.overrides.{ours}" for ours, theirs in SIZES.items()},
    **{option.name: f"model.overrides.{ours}" for ours, option in OPTIONS.items()},
    "rope_settings.rope_base": "model.overrides.rope_theta",
    "num_attention_heads": "model.overrides.n_heads",
    "num_key_value_heads": "model.overrides.n_kv_heads",
    "sampling_scheme": "recurrence.sampling_scheme",
    "vocab_size": "model.vocab_size",
    "padding_multiple": "model.vocab_padding_multiple",
    "mcleish_throttle": "training.throttle",
}
MODEL_HARMLESS = {
    **NOT_BUILT,
    **{f"rope_settings.{name}": known for name, known in ROTARY.items()},
    "norm_class_name": ("RMSNorm_llama", "RMSNorm", "TorchRMSNorm", "FusedRMSNorm"),
    "architecture_class_name": ("RecurrentGPT",),
}
MODEL_WITHOUT_EFFECT = ("attn_impl", "use_fused_head", "name", "hf_config")
REGIONS = {"per-iteration": "iteration", "per-block": "block"}

PACKED = ("pqds-pure", "pqds")
GOLDFISH = {"k_token_loss_dropout": "k", "start_position": "start_position", "context_width": "context_width"}
GOLDFISH_USED = {"static": ("k", "start_position"), "hash-table": ("k", "context_width")}
