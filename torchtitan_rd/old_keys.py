"""Keys of the older torchtitan 0.1 schema,
as the ancestors' files (gpt-neuro-arch, NewComputeBench) spell them.

Each loads with a warning that names its present key.
Keys of features that are gone load only with a value that asked for nothing; any other value is an error.
"""

from torchtitan_rd.config_loader import RenamedKey

_ANY_BOOL = (True, False)
_NOT_BUILT = "pipeline and asynchronous tensor parallelism are no part of this trainer; leave it out"
_LOSS_PARALLEL = "under tensor parallelism the loss is always taken of each rank's own logits"
_MEMORY = "use `torchtitan-rd plan FILE`"
_NO_FLOAT8 = "float8 is not supported; leave it off"


def _norm(value: object) -> object:
    return "rmsnorm" if value == "fused_rmsnorm" else value


OLD_KEYS: dict[str, RenamedKey] = {
    "job.use_for_integration_test": RenamedKey(None, harmless=_ANY_BOOL, remedy="it did nothing to a run"),
    "job.print_args": RenamedKey(None, harmless=_ANY_BOOL, remedy="use `torchtitan-rd config FILE`"),
    "model.norm_type": RenamedKey("model.overrides.norm_type", convert=_norm),
    "model.rope_theta": RenamedKey("model.overrides.rope_theta"),
    "model.hf_assets_path": RenamedKey("model.tokenizer_path"),
    "optimizer.fused": RenamedKey(
        "optimizer.implementation", value_type=bool, convert=lambda on: "fused" if on else "foreach"
    ),
    "optimizer.early_step_in_backward": RenamedKey(None, harmless=(False,), remedy="set it to false"),
    "training.batch_size": RenamedKey("training.local_batch_size"),
    "training.vocab_size": RenamedKey("model.vocab_size"),
    "training.warmup_steps": RenamedKey("lr_scheduler.warmup_steps"),
    "training.data_parallel_replicate_degree": RenamedKey("parallelism.data_parallel_replicate_degree"),
    "training.data_parallel_shard_degree": RenamedKey("parallelism.data_parallel_shard_degree"),
    "training.fsdp_reshard_after_forward": RenamedKey("parallelism.fsdp_reshard_after_forward"),
    "training.tensor_parallel_degree": RenamedKey("parallelism.tensor_parallel_degree"),
    "training.enable_loss_parallel": RenamedKey(None, harmless=_ANY_BOOL, remedy=_LOSS_PARALLEL),
    "training.disable_loss_parallel": RenamedKey(None, harmless=_ANY_BOOL, remedy=_LOSS_PARALLEL),
    "training.compile": RenamedKey("compile.enable"),
    "experimental.pipeline_parallel_degree": RenamedKey(None, harmless=(1,), remedy=_NOT_BUILT),
    "experimental.pipeline_parallel_split_points": RenamedKey(None, harmless=([], ""), remedy=_NOT_BUILT),
    "experimental.pipeline_parallel_schedule": RenamedKey(
        None,
        harmless=("1F1B", "1f1b", "gpipe", "interleaved_1f1b", "flexible_interleaved_1f1b"),
        remedy=_NOT_BUILT,
    ),
    "experimental.pipeline_parallel_schedule_csv": RenamedKey(None, harmless=("",), remedy=_NOT_BUILT),
    "experimental.pipeline_parallel_microbatches": RenamedKey(None, harmless=(None,), remedy=_NOT_BUILT),
    "experimental.context_parallel_degree": RenamedKey("parallelism.context_parallel_degree"),
    "experimental.context_parallel_rotate_method": RenamedKey(
        None, harmless=("allgather", "alltoall"), remedy="nothing is rotated: heads are exchanged for tokens"
    ),
    "experimental.enable_async_tensor_parallel": RenamedKey(None, harmless=(False,), remedy=_NOT_BUILT),
    "experimental.enable_compiled_autograd": RenamedKey(
        None, harmless=(False,), remedy="use [compile] enable"
    ),
    "checkpoint.enable_checkpoint": RenamedKey("checkpoint.enable"),
    "checkpoint.model_weights_only": RenamedKey("checkpoint.last_save_model_only"),
    "metrics.rank_0_only": RenamedKey(
        None, harmless=(True,), remedy="rank 0 writes the metrics of all ranks"
    ),
    "metrics.enable_color_printing": RenamedKey(
        "metrics.disable_color_printing", value_type=bool, convert=lambda on: not on
    ),
    "float8.enable_float8_linear": RenamedKey(None, harmless=(False,), remedy=_NO_FLOAT8),
    "float8.enable_fsdp_float8_all_gather": RenamedKey(None, harmless=(False,), remedy=_NO_FLOAT8),
    "float8.precompute_float8_dynamic_scale_for_fsdp": RenamedKey(None, harmless=(False,), remedy=_NO_FLOAT8),
    "float8.scaling_type_input": RenamedKey(None, harmless=("dynamic",), remedy=_NO_FLOAT8),
    "float8.scaling_type_weight": RenamedKey(None, harmless=("dynamic",), remedy=_NO_FLOAT8),
    "float8.scaling_type_grad_output": RenamedKey(None, harmless=("dynamic",), remedy=_NO_FLOAT8),
    "memory_estimation.enabled": RenamedKey(None, harmless=(False,), remedy=_MEMORY),
    "memory_estimation.disable_fake_mode": RenamedKey(None, harmless=_ANY_BOOL, remedy=_MEMORY),
}
