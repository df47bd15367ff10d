"""[compile]: each block is compiled in place (`module.compile()`), so names and checkpoint
keys stay clean.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import model_validator
from torch import nn

from torchtitan_rd.config_loader import Section
from torchtitan_rd.errors import TrainingError


class CompileConfig(Section):
    enable: bool = False
    """Compile every transformer block with torch.compile. Identical blocks share one compilation."""
    backend: str = "inductor"
    """The torch.compile backend."""
    fail_on_recompile: bool = False
    """Stop where a block would be compiled again for what it has run before (with gradient or without),
    as for a new shape: an error with the guard that failed, in place of a silent pause of every rank.
    """

    @model_validator(mode="after")
    def _nothing_to_guard(self) -> "CompileConfig":
        if self.fail_on_recompile and not self.enable:
            raise ValueError("fail_on_recompile needs enable = true: nothing is compiled without it")
        return self


def apply_compile(
    blocks: Mapping[str, nn.Module],
    config: CompileConfig,
    around: Callable[[nn.Module, Callable], Callable] | None = None,
) -> None:
    """blocks: by their names, which errors give. around: a block and its compiled forward -> what to call
    in its place.
    """
    if not config.enable:
        return
    for name, block in blocks.items():
        if around is not None:
            compiled = torch.compile(block.forward, backend=config.backend, fullgraph=True)
            guarded = _compiled_once_a_mode(compiled, block, name) if config.fail_on_recompile else compiled
            block.forward = around(block, guarded)
            continue
        block.compile(backend=config.backend, fullgraph=True)
        call = block._compiled_call_impl  # made by the line before
        if config.fail_on_recompile and call is not None:
            block._compiled_call_impl = _compiled_once_a_mode(call, block, name)


def _compiled_once_a_mode(call: Callable, block: nn.Module, name: str) -> Callable:
    """`call`, the compiled block, that may compile in its first call in each mode and raises
    TrainingError after it.

    A mode is what a run rightly compiles for: gradients on or off, and whether the first argument needs one
    (without injection, a recurrent state does not in the first iteration after those without gradient).
    Depths are drawn, so no number of steps is sure to have seen every mode; hence modes, and not a warm-up.
    """
    compiled: set[tuple[bool, bool]] = set()
    what = f"{name} ({type(block).__name__}.forward)"  # FSDP gives the class another name afterwards

    def guarded(x: torch.Tensor, *args: Any) -> Any:
        mode = (torch.is_grad_enabled(), x.requires_grad)
        if mode not in compiled:
            output = call(x, *args)
            compiled.add(mode)
            return output
        try:
            with torch.compiler.set_stance("fail_on_recompile"):
                return call(x, *args)
        except RuntimeError as error:
            if "stance is 'fail_on_recompile'" not in str(error):
                raise
            _, _, guards = str(error).partition("\n")
            raise TrainingError(
                f"compile.fail_on_recompile: {what} would be compiled again\n{guards}\n"
                "keep the named input as it was in the first step, or set compile.fail_on_recompile to false"
            ) from error

    return guarded
