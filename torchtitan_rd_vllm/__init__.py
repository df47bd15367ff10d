"""Exported ravens in vLLM (docs/serving.md).

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). The package needs
torchtitan_rd nowhere: a raven's folder says all there is to know of it.
"""

ARCHITECTURE = "RavenForCausalLM"
"""What config.json calls the model."""


def register() -> None:
    """Makes vLLM know the architecture, the fields of its config.json, and what its settings may be together.

    May be called several times in one process.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from torchtitan_rd_vllm.checks import RavenChecks
    from torchtitan_rd_vllm.configuration import RavenConfig

    # With the class at hand the folder's own Python files are not run: no trust_remote_code is needed.
    _CONFIG_REGISTRY[RavenConfig.model_type] = RavenConfig
    MODELS_CONFIG_MAP[ARCHITECTURE] = RavenChecks
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # By name: vLLM imports the model where it is built, after the process has its device.
        ModelRegistry.register_model(ARCHITECTURE, "torchtitan_rd_vllm.model:RavenForCausalLM")
