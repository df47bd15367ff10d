"""Depth-recurrent transformers (Huginn, arXiv 2502.05171) in Hugging Face's interface.
Needs torch and transformers.

    e = prelude(embedding * scale);  s = noise
    num_steps times:  s = core([s, e])
    logits = head(norm(coda(norm(s))))      # final_norm "once": head(norm(coda(s)))

Shapes: B batch, S sequence, K keys (cached ones and S), E n_embd, H heads, D head dim, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

# Of a local folder, older versions of transformers copy what this file itself imports and nothing else: so it
# names every file that lies beside it, with what a program that steps through a forward needs of it.
from .blocks_raven import (
    Adapter,
    Attention,
    Context,
    Linear,
    RMSNorm,
    SandwichBlock,
    TransformerPostNormBlock,
    TransformerPreNormBlock,
    positions_and_mask,
)
from .cache import KVCache
from .configuration_raven import RavenConfig
from .errors import ConfigError
from .exits import CRITERIA, ExitPolicy
from .generation_raven import AdaptiveGenerationMixin, RavenGeneration
from .model_steps import CacheLayout, KeyValues
from .sharing import Sharing
from .speculative import Drafting
from .stepper import Stepper, think
from .steps_raven import FAMILY, StepMixin

__all__ = [
    "CRITERIA",
    "FAMILY",
    "CacheLayout",
    "ConfigError",
    "Drafting",
    "ExitPolicy",
    "KVCache",
    "KeyValues",
    "RavenConfig",
    "RavenForCausalLM",
    "RavenGeneration",
    "RavenOutput",
    "Sharing",
    "Stepper",
    "think",
]

logger = logging.get_logger(__name__)
OF_RELEASED_CLASS = ("input_embeds", "output_details")  # arguments of huginn-0125's own forward
DETAILS = ("return_logits", "return_latents", "return_head")
# Not among forward's own names: a Trainer takes every one of those with "label" in it for a column that must
# be there, and without all of them reports no eval_loss.
OF_LOSS = ("shift_labels", "num_items_in_batch", "ignore_index")
# What transformers and its tokenizers pass to each model, and what follows from the other arguments here.
WITHOUT_MEANING = ("cache_position", "token_type_ids", "return_dict")

BLOCKS = {
    block.__name__: block for block in (SandwichBlock, TransformerPostNormBlock, TransformerPreNormBlock)
}


@dataclass
class RavenOutput(CausalLMOutputWithPast):
    """latent_states: s_r as the coda sees it, that is ln_f(s_r) unless final_norm is "once"; detached.
    hidden_states: on request, s_0 .. s_r and, last, the input of lm_head.
    """

    latent_states: torch.Tensor | None = None


class RavenForCausalLM(StepMixin, PreTrainedModel, AdaptiveGenerationMixin):
    """A causal language model that thinks for `num_steps` iterations. See `forward`, `generate`, and
    steps_raven.py for a forward in parts.
    """

    transformer: Any  # a ModuleDict, whose members have no types of their own
    lm_head: nn.Module
    config_class = RavenConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = list(BLOCKS)  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"^freqs_cis$"]  # noqa: RUF012 (rotary table of released files)
    _supports_sdpa = True  # and "eager"; transformers refuses the others by name
    _supports_cache_class = True
    _supports_static_cache = False
    _supports_quantized_cache = False

    def __init__(self, config: RavenConfig):
        super().__init__(config)
        block = BLOCKS[config.block_class_name]
        parts = {
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "prelude": nn.ModuleList(block(config) for _ in range(config.n_layers_in_prelude)),
            "core_block": nn.ModuleList(block(config) for _ in range(config.n_layers_in_recurrent_block)),
            "coda": nn.ModuleList(block(config) for _ in range(config.n_layers_in_coda)),
            "ln_f": RMSNorm(config.n_embd, config.norm_eps),  # used before the coda too, if twice
        }
        if config.injection_type == "linear":
            parts["adapter"] = Adapter(2 * config.n_embd, config.n_embd)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.wte = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As Huginn was trained: both halves of mlp.fc have the same std,
        unlike in the released modelling file.
        """
        if isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Attention) and module.qk_bias is not None:
            nn.init.zeros_(module.qk_bias)
        elif isinstance(module, Adapter) and self.config.adapter_start == "identity":
            if not getattr(module.weight, "_is_hf_initialized", False):
                nn.init.zeros_(module.weight)
                module.weight[:, self.config.n_embd :].fill_diagonal_(1.0)
        elif isinstance(module, nn.Linear | nn.Embedding):
            ends_branch = getattr(module, "ends_branch", False)
            std = self.config.weight_std / (
                math.sqrt(2 * self.config.effective_depth) if ends_branch else 1.0
            )
            if not self.config.init_orthogonal:
                nn.init.trunc_normal_(module.weight, 0.0, std, -3 * std, 3 * std)
            elif not getattr(module.weight, "_is_hf_initialized", False):  # parts do not inherit this mark
                for part in module.weight.split(getattr(module, "rows", len(module.weight))):
                    nn.init.orthogonal_(part, std * math.sqrt(max(part.shape)))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_steps: int | tuple[int, int] | None = None,
        input_states: torch.Tensor | None = None,
        init_scale: float = 1.0,
        state_seed: int | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> RavenOutput | tuple:
        """Tokens (B, S), or inputs_embeds (B, S, E) before they are scaled -> logits (B, S, V) in float32.

        attention_mask: (B, K), 0 at padding.
        position_ids: (B, S); by default tokens count from 0 after left padding.
        labels: (B, S), the input_ids themselves: shifted here, as in all classes of transformers; -100 is
            ignored. Labels made for the class released with huginn-0125 are to be given as shift_labels.
        use_cache: off unless asked for, as a cache holds num_steps times the keys and values of the core.
        num_steps: iterations, all without gradient; or a pair, without gradient and then with. By default
            config.mean_recurrence in evaluation; in training it is drawn from torch's global CPU generator.
        input_states: first states (B, S, E), or those of all tokens from the first one in the cache on.
        init_scale: factor on the noise that is the first state otherwise.
        state_seed: makes this noise a function of (state_seed, position) alone: cached equals uncached
            generation, and padding changes nothing. By default the device's global generator draws it.
        kwargs: shift_labels: (B, S), the token that follows each input token, in place of labels;
            num_items_in_batch and ignore_index go to the loss function;
            input_embeds and output_details are those of the released class. What is not known is refused.
        """
        released, loss_arguments = self._split(kwargs)
        if "input_embeds" in released:
            input_ids, inputs_embeds = None, released["input_embeds"]
        inputs_embeds = self._embedded(input_ids, inputs_embeds)

        past_key_values = self._cache(past_key_values, use_cache)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        position_ids, mask = positions_and_mask(inputs_embeds, attention_mask, position_ids, past)
        if input_states is None:
            s = self.initial_state(inputs_embeds, position_ids, init_scale, state_seed)
        else:
            s = _part_of(input_states, past, inputs_embeds.shape)
        steps = self._num_steps(num_steps)
        if past_key_values is not None:
            self._check_cache(past_key_values, sum(steps))
        context = Context(*self._rotary(position_ids), mask, past_key_values)

        e = inputs_embeds * self.config.embedding_scale
        for slot, block in enumerate(self.transformer.prelude):
            e = self._run(block, e, context, slot)
        s = e if s is None else s.to(e)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = self.iterate(s, e, context, steps, output_hidden_states)
        latent = x = self.latent(states[-1])
        for i, block in enumerate(self.transformer.coda):
            x = self._run(block, x, context, len(self.transformer.prelude) + i)
        x = self.transformer.ln_f(x)

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, kept]).float()
        loss = None
        if labels is not None or "shift_labels" in loss_arguments:
            loss = self.loss_function(logits, labels, logits.shape[-1], **loss_arguments)
        details = released.get("output_details", {})
        hidden = (*states, x) if output_hidden_states else x if details.get("return_head") else None
        return RavenOutput(
            loss,
            logits if details.get("return_logits", True) else None,
            past_key_values,
            hidden,
            latent_states=latent.detach() if details.get("return_latents", True) else None,
        )

    def _embedded(self, ids: torch.Tensor | None, embeds: torch.Tensor | None) -> torch.Tensor:
        if (ids is None) == (embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        return self.transformer.wte(ids) if embeds is None else embeds

    def _split(self, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Further arguments of forward -> (those of the released class, those of the loss function)."""
        given = {
            name: value for name, value in given.items() if value is not None and name not in WITHOUT_MEANING
        }
        if given.pop("output_attentions", False) or self.config.output_attentions:
            raise ValueError("output_attentions is not supported: attention weights are not kept")
        if self.config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"attn_implementation = {self.config._attn_implementation!r}: only 'sdpa' and 'eager'"
            )
        if unknown := sorted(given.keys() - {*OF_RELEASED_CLASS, *OF_LOSS}):
            raise TypeError(f"forward() takes no argument {', '.join(unknown)}: it would have no effect")
        released = {name: given[name] for name in OF_RELEASED_CLASS if name in given}
        for name, wanted in released.get("output_details", {}).items():
            if wanted and name not in DETAILS:
                raise ValueError(f"output_details: {name!r} is not supported, only {', '.join(DETAILS)}")
        return released, {name: given[name] for name in OF_LOSS if name in given}

    def _cache(self, given: DynamicCache | None, use_cache: bool | None) -> DynamicCache | None:
        wanted = given is not None or use_cache
        if wanted and self._recomputes():
            if given is not None and given.get_seq_length():
                raise ValueError(
                    "gradient checkpointing runs blocks twice and would fill a cache twice: use one of them"
                )
            logger.warning_once("use_cache is incompatible with gradient checkpointing: no cache is used")
            return None
        return DynamicCache() if wanted and given is None else given

    def _recomputes(self) -> bool:
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def iterate(
        self,
        s: torch.Tensor,
        e: torch.Tensor,
        context: Context,
        steps: tuple[int, int],
        keep_states: bool = False,
    ) -> list[torch.Tensor]:
        """The recurrence from state s (B, S, E) -> [final state], or [s_0, ...,
        s_r] if all are to be kept.
        """
        first_slot = len(self.transformer.prelude) + len(self.transformer.coda)
        states = [s]
        for step in range(sum(steps)):
            slot = first_slot + step * len(self.transformer.core_block)
            if step < steps[0]:
                with torch.no_grad():
                    s = self.core_step(s, e, context, slot)
            else:
                s = self._run(self.core_step, s, e, context, slot)
            states = [*states, s] if keep_states else [s]
        return states

    def _run(self, function: Any, *args: Any) -> torch.Tensor:
        if self._recomputes():
            # Never the reentrant form, transformers 4's default: it loses gradients where no input has one.
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
        return function(*args)

    def _num_steps(self, num_steps: Any) -> tuple[int, int]:
        """-> iterations (without gradient, with gradient)."""
        mean, backprop = self.config.mean_recurrence, self.config.mean_backprop_depth
        if num_steps is not None:
            # Not on torch's default device: a tensor on "meta" has no values, one on a GPU is waited for.
            steps = torch.as_tensor(num_steps, device="cpu").flatten().tolist()
            if len(steps) not in (1, 2) or min(steps) < 0 or not all(float(s).is_integer() for s in steps):
                raise ValueError(
                    f"num_steps = {num_steps} is neither a number of iterations nor a pair of them"
                )
            return int(steps[0]), int(steps[1]) if len(steps) == 2 else 0
        torch.rand(1, device="cpu")  # the released class draws this too: equal seeds stay equal
        if not self.training:
            return mean, 0
        if self.config.sampling_scheme.split("-curriculum-")[0] != "poisson-lognormal-filling":
            raise ValueError(f"depths of {self.config.sampling_scheme!r} are not drawn here: pass num_steps")
        sigma = 0.5
        rate = torch.zeros(1, device="cpu").log_normal_(math.log(max(mean, backprop)) - sigma**2 / 2, sigma)
        depth = int(torch.poisson(rate)) + 1
        return max(depth - backprop, 0), min(backprop, depth)

    def _check_cache(self, cache: Any, depth: int) -> None:
        """One slot a layer application: prelude, coda, then the core layers of each iteration."""
        if not isinstance(cache, DynamicCache):
            raise ValueError(f"past_key_values must be a DynamicCache, not a {type(cache).__name__}")
        slots = self.config.n_layers + (depth - 1) * len(self.transformer.core_block)
        if len(cache) not in (0, slots):
            remedy = (
                "pass the num_steps that it was made with; "
                "make new ones with DynamicCache(), without a config"
            )
            raise ValueError(
                f"the cache has {len(cache)} layers, but {depth} iterations need {slots}: {remedy}"
            )

    def _get_key_renaming_mapping(self, checkpoint_keys: list[str], *args: Any, **kwargs: Any) -> Any:
        # Of transformers 4, which looks for the device of each tensor of a file,
        # also of those that are not loaded.
        wanted = [key for key in checkpoint_keys if key != "freqs_cis"]
        return super()._get_key_renaming_mapping(wanted, *args, **kwargs)


def _part_of(states: torch.Tensor, past: int, shape: torch.Size) -> torch.Tensor:
    """First states of the tokens at hand, whose `shape` is (B, S, E);
    `states` may be those of all since the cache's first.
    """
    length = shape[1]
    part = states if states.shape[1] == length else states[:, past : past + length]
    if part.shape != shape:
        raise ValueError(f"input_states ends early: {tuple(part.shape)} of {tuple(shape)} is there")
    return part
