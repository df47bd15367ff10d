"""The tensors that an exported raven has. vLLM itself says nothing of a matrix that a folder lacks, and stops
at one of another shape without a word. Needs neither vLLM nor torch.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torchtitan_rd_vllm.settings import ServingError


def shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name in the file -> shape, of every parameter of the model; a tied head is none of them."""
    width, hidden = config.n_embd, config.intermediate_size
    queries = config.n_heads * config.head_dim
    block: dict[str, tuple[int, ...]] = {
        "attn.Wqkv.weight": (queries + 2 * config.num_key_value_heads * config.head_dim, width),
        "attn.proj.weight": (width, queries),
        "mlp.fc.weight": (2 * hidden, width),
        "mlp.proj.weight": (width, hidden),
    }
    norms = 4 if config.block_class_name == "SandwichBlock" else 2
    block |= {f"norm_{number}.weight": (width,) for number in range(1, norms + 1)}
    if config.qk_bias:
        block["attn.qk_bias"] = (2, 1, config.n_heads, config.head_dim)

    found = {"transformer.wte.weight": (config.vocab_size, width), "transformer.ln_f.weight": (width,)}
    if config.injection_type == "linear":
        found["transformer.adapter.weight"] = (width, 2 * width)
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (config.vocab_size, width)
    for part, number in (
        ("prelude", config.n_layers_in_prelude),
        ("core_block", config.n_layers_in_recurrent_block),
        ("coda", config.n_layers_in_coda),
    ):
        for i in range(number):
            found |= {f"transformer.{part}.{i}.{name}": shape for name, shape in block.items()}
    return found


def checked(
    weights: Iterable[tuple[str, Any]], wanted: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Any]]:
    """The same weights. Raises ServingError at one of another shape, and at the end if some are missing."""
    left = dict(wanted)
    for name, tensor in weights:
        shape = left.pop(name, None)
        if shape is not None and tuple(tensor.shape) != shape:
            raise ServingError(
                f"{name} is {tuple(tensor.shape)}, but config.json says {shape}: export the model again"
            )
        yield name, tensor
    if left:
        count = f"{len(left)} tensors of {len(wanted)}"
        raise ServingError(f"the folder lacks {next(iter(left))} ({count}): export the model again")
