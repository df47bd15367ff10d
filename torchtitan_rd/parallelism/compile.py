"""[compile]: each block is compiled in place (`module.compile()`), so names and checkpoint keys stay clean."""

from collections.abc import Sequence

from torch import nn

from torchtitan_rd.config_loader import Section


class CompileConfig(Section):
    enable: bool = False
    """Compile every transformer block with torch.compile. Identical blocks share one compilation."""
    backend: str = "inductor"
    """The torch.compile backend."""


def apply_compile(blocks: Sequence[nn.Module], config: CompileConfig) -> None:
    if config.enable:
        for block in blocks:
            block.compile(backend=config.backend, fullgraph=True)
