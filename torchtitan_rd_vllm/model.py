"""A depth-recurrent transformer (Huginn, arXiv 2502.05171) in vLLM, with the names of the exported weights.

    e = prelude(embedding * scale);  s = noise
    mean_recurrence times:  s = core([s, e])
    logits = head(norm(coda(norm(s))))      # final_norm "once": head(norm(coda(s)))

Shapes: T tokens of all sequences of a step, E n_embd, V vocabulary.
"""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.sequence import IntermediateTensors

from torchtitan_rd_vllm.first_state import is_noise, noise, table
from torchtitan_rd_vllm.layers import BLOCKS, Place, Rotary, heads_of_this_rank
from torchtitan_rd_vllm.rotary import frequencies
from torchtitan_rd_vllm.settings import KVCache, ServingError
from torchtitan_rd_vllm.weights import checked, shapes


class RavenModel(nn.Module):
    """Tokens to the input of the head."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        self.serving = config.serving()
        self.wte = VocabParallelEmbedding(config.vocab_size, config.n_embd, prefix=f"{prefix}.wte")

        block = BLOCKS[config.block_class_name]
        for name, number in (
            ("prelude", config.n_layers_in_prelude),
            ("core_block", config.n_layers_in_recurrent_block),
            ("coda", config.n_layers_in_coda),
        ):
            blocks = (block(vllm_config, f"{prefix}.{name}.{i}") for i in range(number))
            self.add_module(name, nn.ModuleList(blocks))

        if config.injection_type == "linear":
            self.adapter = ColumnParallelLinear(
                2 * config.n_embd,
                config.n_embd,
                bias=False,
                gather_output=True,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.adapter",
            )

        self.ln_f = RMSNorm(config.n_embd, eps=config.norm_eps)
        turning = frequencies(config).to(self.ln_f.weight.device)
        self.register_buffer("frequencies", turning, persistent=False)
        self._make_places(vllm_config, prefix)
        self._make_first_states(vllm_config)

    def _make_places(self, vllm_config: VllmConfig, prefix: str) -> None:
        """Places for keys and values: one a block outside the core, and the core's as `kv_cache` says."""
        config, serving = self.config, self.serving
        core = config.n_layers_in_recurrent_block
        self.cache = KVCache(serving.kv_cache, core, serving.mean_recurrence)
        heads, kv_heads = heads_of_this_rank(config)
        kv_heads = heads if config.qk_bias else kv_heads
        before, after = config.n_layers_in_prelude, config.n_layers_in_coda
        # vLLM orders caches by the one number in a layer's name.
        places = [
            Place(vllm_config, heads, kv_heads, f"{prefix}.places.{i}", serving.exits)
            for i in range(before + self.cache.places + after)
        ]
        self.places = nn.ModuleList(places)
        self.core_places = places[before : before + self.cache.places]
        self.coda_places = places[before + self.cache.places :]

    def _make_first_states(self, vllm_config: VllmConfig) -> None:
        """Buffer `first_states`: (positions, E) in the model's type; None if they depend on more."""
        rows, seed = None, self.serving.state_seed
        if seed is not None and is_noise(self.config):
            rows = table(self.config, vllm_config.model_config.max_model_len, seed).to(self.ln_f.weight)
        self.register_buffer("first_states", rows, persistent=False)

    def forward(self, e: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Embeddings (T, E) before they are scaled, positions (T,) -> (T, E)."""
        angles = positions[:, None, None].float() * self.frequencies
        rotary = Rotary(angles.cos(), angles.sin())
        e = e * self.config.embedding_scale
        for block, place in zip(self.prelude, self.places, strict=False):
            e = block(e, rotary, place)

        s = self.first_state(e, positions)
        for step in range(self.serving.mean_recurrence):
            previous, s = s, self.core_step(s, e, rotary, step)
            if self.serving.exits and self._may_leave(step + 1, s, previous):
                self._show_newest(step + 1)
                break

        x = self.ln_f(s) if self.config.final_norm == "twice" else s
        for block, place in zip(self.coda, self.coda_places, strict=True):
            x = block(x, rotary, place)
        return self.ln_f(x)

    def core_step(self, s: torch.Tensor, e: torch.Tensor, rotary: Rotary, step: int) -> torch.Tensor:
        """Iteration `step`, from 0: takes e into the state, then runs the core blocks."""
        injection = self.config.injection_type
        if injection == "linear":
            s, _ = self.adapter(torch.cat((s, e), dim=-1))
        elif injection in ("add", "gate"):
            s = s + e if injection == "add" else s * e
        for layer, block in enumerate(self.core_block):
            s = block(s, rotary, self.core_places[self.cache.place(step, layer)])
        return s

    def first_state(self, e: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """-> (T, E)."""
        if self.config.injection_type == "none":
            return e
        if not is_noise(self.config):
            return torch.zeros_like(e)
        if self.first_states is not None:
            return self.first_states[positions]
        drawn = noise(self.config, torch.empty_like(e))
        # Every rank draws; all go on from the draw of the first.
        return get_tp_group().broadcast(drawn) if get_tensor_model_parallel_world_size() > 1 else drawn

    def _may_leave(self, steps: int, s: torch.Tensor, previous: torch.Tensor) -> bool:
        """Whether ||s - previous|| / ||s||, its mean over the tokens at hand, is below the threshold in every
        sequence of this step. Waits for the device.
        """
        if not self.serving.exit_min_steps <= steps < self.serving.mean_recurrence:
            return False
        starts = _starts()
        if starts is None:
            return False
        moved = (s - previous).float().norm(dim=-1) / s.float().norm(dim=-1)
        value = means(moved, starts.to(moved.device)).max()
        if get_tensor_model_parallel_world_size() > 1:
            value = get_tp_group().broadcast(value)  # ranks that left at different steps would wait for ever
        return bool(value < self.serving.exit_threshold)

    def _show_newest(self, steps: int) -> None:
        """After `steps` iterations: deeper ones of later tokens see the newest keys and values of these."""
        newest = [
            self.core_places[self.cache.place(steps - 1, layer)].last for layer in range(self.cache.core)
        ]
        for place, layer in self.cache.unwritten(steps):
            self.core_places[place].keep(*newest[layer])


def _starts() -> torch.Tensor | None:
    """(sequences + 1,): where each sequence's tokens of this step start, and the end of the last.
    None: there are no sequences while vLLM measures memory.
    """
    metadata = get_forward_context().attn_metadata
    if metadata is None:
        return None
    one = next(iter(metadata.values())) if isinstance(metadata, dict) else None
    starts = getattr(one, "query_start_loc", None)
    if starts is None:
        raise ServingError(
            f"exit_criterion: {type(one or metadata).__name__} does not say where a sequence starts; "
            "choose another attention backend"
        )
    return starts


def means(x: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Means of (T,) over the tokens of each sequence that has any. starts: (sequences + 1,)."""
    lengths = starts.diff()
    lengths = lengths[lengths > 0]
    which = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths)
    return x.new_zeros(len(lengths)).index_add(0, which, x[: len(which)]) / lengths


class RavenForCausalLM(nn.Module):
    """What vLLM builds: `embed_input_ids`, `forward` and `compute_logits` have its signatures."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config, self.quant_config = config, vllm_config.quant_config
        self.transformer = RavenModel(vllm_config, maybe_prefix(prefix, "transformer"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.n_embd,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.transformer.wte)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(T,) -> (T, E), not scaled yet."""
        return self.transformer.wte(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens (T,), or their embeddings (T, E) -> the input of the head (T, E)."""
        return self.transformer(
            self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds, positions
        )

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """(T, E) -> (T, V)."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Names as exported. freqs_cis is a table for the released class; a tied head is the embedding."""
        skipped = ("freqs_cis", "lm_head.weight") if self.config.tie_word_embeddings else ("freqs_cis",)
        kept = (pair for pair in weights if pair[0] not in skipped)
        # Quantised matrices have shapes and companions of their own.
        wanted = shapes(self.config) if self.quant_config is None else {}
        return AutoWeightsLoader(self).load_weights(checked(kept, wanted))
