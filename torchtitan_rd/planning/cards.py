"""The GPUs that a plan can be made for: memory and dense bfloat16 peak of each, and the source of both."""

import math
from typing import NamedTuple

from torchtitan_rd.config_loader import nearest
from torchtitan_rd.errors import ConfigError

GIB = 2**30


class Card(NamedTuple):
    """memory_gib: what a program can have of it, in GiB. tflops: dense bfloat16 peak in 1e12 FLOP/s; None if
    it is not known. source: of the figures.
    """

    name: str
    memory_gib: float
    tflops: float | None
    source: str


_USABLE = "memory: what torch reports as its total, from messages of such cards"
CARDS = {
    card.name: card
    for card in (
        Card("a100-40", 39.4, 312.0, f"NVIDIA A100 data sheet: 40 GB; {_USABLE}"),
        Card("a100-80", 79.1, 312.0, f"NVIDIA A100 data sheet: 80 GB; {_USABLE}"),
        Card("h100-80", 79.1, 989.0, f"NVIDIA H100 data sheet, SXM5: 80 GB, 1979 sparse; {_USABLE}"),
        Card("h100-nvl", 93.1, 835.0, f"NVIDIA H100 data sheet, NVL: 94 GB, 1671 sparse; {_USABLE}"),
        Card("h200", 139.8, 989.0, f"NVIDIA H200 data sheet, SXM: 141 GB, 1979 sparse; {_USABLE}"),
        Card("gh200-96", 94.5, 990.0, f"NVIDIA GH200 data sheet: 96 GB HBM3, 990 dense; {_USABLE}"),
        Card("gh200-144", 134.1, 990.0, "NVIDIA GH200 data sheet: 144 GB HBM3e (1e9 bytes each), 990 dense"),
        Card("mi250x", 63.9, 191.5, f"AMD MI250X data sheet, one die of two: 64 GB, 383 of both; {_USABLE}"),
        Card("mi300x", 191.9, 1307.0, f"AMD MI300X data sheet: 192 GB, 1307 dense; {_USABLE}"),
    )
}


def find_card(name: str | None, memory_gib: float | None, tflops: float | None) -> Card:
    """The card of a name, with figures in place of its own where they are given; or one of figures alone.
    Raises ConfigError.
    """
    for flag, figure in (("--gpu_memory_gb", memory_gib), ("--gpu_tflops", tflops)):
        if figure is not None and not 0 < figure < math.inf:
            raise ConfigError(f"{flag} {figure}: must be a number above 0")
    if name is None:
        if memory_gib is None:
            raise ConfigError(f"--gpu says which card it is: {', '.join(CARDS)}; or pass --gpu_memory_gb")
        return Card("this card", memory_gib, tflops, "as given")
    if name not in CARDS:
        raise ConfigError(
            f"--gpu {name}: unknown card{nearest(name, CARDS)} (known are {', '.join(CARDS)}; "
            "for another pass --gpu_memory_gb and --gpu_tflops instead)"
        )
    card = CARDS[name]
    return card._replace(memory_gib=memory_gib or card.memory_gib, tflops=tflops or card.tflops)
