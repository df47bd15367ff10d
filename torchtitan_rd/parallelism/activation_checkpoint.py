"""[activation_checkpoint]: which activations are thrown away in forward and recomputed in backward.

A block's `forward` is replaced in place instead of wrapping the module,
so parameter names never change (a wrapper module shows in `named_parameters()`: pytorch/torchtitan#2622).
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from torchtitan_rd.config_loader import Section
from torchtitan_rd.model_spec import WrapPlan

# Costly to recompute: attention, and half of the matmuls (see _save_attention_and_half_of_the_matmuls).
_ATTENTION_OPS = frozenset(
    {
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.higher_order.flex_attention,
        # In an eager block: flex attention, compiled by itself.
        torch.ops.higher_order.inductor_compiled_code,
    }
)


class ActivationCheckpointConfig(Section):
    mode: Literal["none", "full", "selective"] = "selective"
    """none: keep all activations. full: recompute every block. selective: see selective_ac_option."""
    selective_ac_option: str = "2"
    """A number k: recompute every k-th block. "op": in every block keep attention and every second matmul."""

    recurrent_region: Literal["iteration", "block"] = "iteration"
    """mode = "full" of a recurrent model: recompute each iteration of the core as a whole,
    or each of its blocks.
    """

    keep: Literal["nothing", "attention"] = "nothing"
    """mode = "full": what a recomputed block holds beside its input. attention: what attention gives, and its
    log-sum-exp, so that attention is not repeated. That is one more tensor of the input's size a block. By
    reckoning an 8B at 131072 tokens then takes 176 GFLOP a token in place of 211.
    """
    keep_every: int = Field(1, ge=1)
    """keep = "attention": of every so-many-th block, in the order of forward, in each iteration alike."""
    offload: bool = False
    """mode = "full": the inputs of recomputed blocks wait for backward in host memory, not on the GPU. They
    are copied out and back beside the computation; of a recurrent model, the states of the iterations.
    """

    @field_validator("selective_ac_option")
    @classmethod
    def _number_or_op(cls, value: str) -> str:
        if value != "op" and not (value.isdecimal() and int(value) > 0):
            raise ValueError('must be "op" or a positive number in quotes, such as "2"')
        return value

    @model_validator(mode="after")
    def _no_idle_keys(self) -> "ActivationCheckpointConfig":
        if self.mode != "full":
            for key, value in (("keep", self.keep != "nothing"), ("offload", self.offload)):
                if value:
                    raise ValueError(f'{key} has an effect on mode = "full" alone: set that, or unset {key}')
        if self.keep == "nothing" and self.keep_every != 1:
            raise ValueError(f'keep_every = {self.keep_every} has no effect without keep = "attention"')
        return self


def checkpoint_regions(plan: WrapPlan, config: ActivationCheckpointConfig) -> list[str]:
    """The names of what is recomputed as one: the blocks,
    or the iterations of loops in place of their blocks.
    """
    if config.recurrent_region == "block" or config.mode != "full":
        return list(plan.blocks)
    looped = tuple(f"{iteration}." for _, iteration in plan.loops)
    return [*(name for name in plan.blocks if not name.startswith(looped)), *(it for _, it in plan.loops)]


def apply_activation_checkpointing(blocks: Sequence[nn.Module], config: ActivationCheckpointConfig) -> None:
    """Makes the chosen blocks recompute in backward. No model draws inside one, so RNG state is not preserved
    (docs/pytorch_traps.md, Recomputation and chance)."""
    if config.mode == "none":
        return
    by_op = config.mode == "selective" and config.selective_ac_option == "op"
    every = 1 if config.mode == "full" or by_op else int(config.selective_ac_option)
    for number, block in enumerate(blocks, 1):
        if number % every != 0:
            continue
        options: dict[str, Callable] = {}
        if by_op:
            options = {"context_fn": _save_attention_and_half_of_the_matmuls}
        elif config.keep == "attention":
            options = {"context_fn": _save_attention(number, config.keep_every)}
        block.forward = _recomputed(block.forward, options)


def _recomputed(forward: Callable, options: dict) -> Callable:
    # A function of its own, not functools.partial: torch.compile skips frames of torch's own files.
    def recomputed_forward(*args):
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options)

    return recomputed_forward


def _save_attention(number: int, every: int) -> Callable:
    """Makes contexts for forward and recomputation that keep every so-many-th attention and repeat the rest.

    number: of the region, and of its first attention: an iteration has several, which count on from there.
    """

    def contexts():
        attentions: dict[bool, int] = defaultdict(lambda: number - 1)

        def policy(context, op: Callable, *args, **kwargs) -> CheckpointPolicy:
            if op not in _ATTENTION_OPS:
                return CheckpointPolicy.PREFER_RECOMPUTE
            attentions[context.is_recompute] += 1
            keep = attentions[context.is_recompute] % every == 0
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    return contexts


def _save_attention_and_half_of_the_matmuls():
    """Contexts for forward and recomputation. Both must count alike,
    hence one counter for each of the two passes.
    """
    matmuls: dict[bool, int] = defaultdict(int)

    def policy(context, op: Callable, *args, **kwargs) -> CheckpointPolicy:
        save = op in _ATTENTION_OPS
        if op in (torch.ops.aten.mm.default, torch.ops.aten.linear.default):
            matmuls[context.is_recompute] += 1
            save = matmuls[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
