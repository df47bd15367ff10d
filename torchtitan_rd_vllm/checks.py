"""What vLLM asks before it starts anything: whether its settings and the model's go together."""

from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from torchtitan_rd_vllm.settings import KVCache, ServingError, check_parallel

logger = init_logger("vllm.torchtitan_rd")


class RavenChecks(VerifyAndUpdateConfig):
    """Called once, in the process that the user started. Raises ServingError."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        model = vllm_config.model_config
        config = model.hf_config
        serving = config.serving()
        check_parallel(
            vllm_config.parallel_config.tensor_parallel_size,
            config.n_heads,
            config.num_key_value_heads,
            {"n_embd": config.n_embd, "intermediate_size": config.intermediate_size},
        )
        if serving.exits and not model.enforce_eager:
            raise ServingError(
                "exit_criterion looks at the state between iterations, which no graph can: "
                "add --enforce-eager"
            )

        cache = KVCache(serving.kv_cache, config.n_layers_in_recurrent_block, serving.mean_recurrence)
        if cache.is_shared:
            _compute_prompts_whole(vllm_config)


def _compute_prompts_whole(vllm_config: Any) -> None:
    """Where iterations share keys and values, a token sees the current iteration of those computed together
    with it, and the last one of those before. So a prompt must not be cut, neither by the scheduler nor by
    what another request has left: its tokens would depend on the traffic.
    """
    scheduler, longest = vllm_config.scheduler_config, vllm_config.model_config.max_model_len
    vllm_config.cache_config.enable_prefix_caching = False
    scheduler.enable_chunked_prefill = False
    scheduler.long_prefill_token_threshold = 0  # else longer prompts are cut there, chunked prefill or not
    if scheduler.max_num_batched_tokens < longest:
        scheduler.max_num_batched_tokens = longest
    logger.info(
        "kv_cache is shared by iterations: prompts are computed whole, without prefix caching "
        "(up to %d tokens in a step)",
        scheduler.max_num_batched_tokens,
    )
