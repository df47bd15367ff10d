"""Peak FLOP/s and peak memory of the device that this rank trains on."""

import re
import resource
import sys

import torch

GIB = 2**30

# Dense bfloat16 peaks in FLOP/s, from the vendors' data sheets (NVIDIA's figures include 2:4 sparsity, which
# doubles them). A pattern must match the whole name that torch.cuda.get_device_name() reports. A custom or
# partitioned device has another peak and another name ("NVIDIA A100-SXM-64GB", "... MIG 1g.10gb"), so a near
# match proves nothing.
_PEAK_BF16_FLOPS = (
    (r"(NVIDIA )?A100-(SXM4|PCIE)-(40|80)GB|NVIDIA A100 80GB PCIe", 312e12),
    (r"NVIDIA H100 80GB HBM3", 989e12),  # SXM5; 1979 sparse
    (r"NVIDIA H100 PCIe", 756e12),  # 1513 sparse
    (r"NVIDIA H(100|200) NVL", 835e12),  # 1671 sparse, per card
    (r"NVIDIA H200", 989e12),  # SXM; 1979 sparse
    (r"NVIDIA GH200 (120GB|480GB|144G HBM3e)", 990e12),  # 990 dense; 120 and 480 GB are the CPU's memory
    (r"AMD Instinct MI250X", 191.5e12),  # one die (GCD) of two, as torch sees it: half of 383
    (r"AMD Instinct MI300X( OAM| VF)?", 1307e12),
)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of `device` in FLOP/s; None for a CPU and any device not in the table:
    never a guess.
    """
    return peak_flops_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_by_name(name: str) -> float | None:
    return next((peak for pattern, peak in _PEAK_BF16_FLOPS if re.fullmatch(pattern, name)), None)


class PeakMemory:
    """Peak memory since the last call of `read`; on a CPU the peak resident set of the whole
    process so far.
    """

    def __init__(self, device: torch.device):
        self._device = device
        # The value by which ranks are compared.
        self.leading = "memory_max_reserved_gib" if device.type == "cuda" else "memory_max_rss_gib"
        if device.type == "cuda":
            self._capacity = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.reset_peak_memory_stats(device)

    def read(self) -> dict[str, float]:
        """Values in GiB, in percent of the device, or counts (since the start of the process).
        Resets the peaks.
        """
        if self._device.type != "cuda":
            return {"memory_max_rss_gib": _max_rss() / GIB}
        stats = torch.cuda.memory_stats(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        active, reserved = stats["active_bytes.all.peak"], stats["reserved_bytes.all.peak"]
        return {
            "memory_max_active_gib": active / GIB,
            "memory_max_active_pct": 100 * active / self._capacity,
            "memory_max_reserved_gib": reserved / GIB,
            "memory_max_reserved_pct": 100 * reserved / self._capacity,
            "memory_num_alloc_retries": stats["num_alloc_retries"],
            "memory_num_ooms": stats["num_ooms"],
        }


def _max_rss() -> int:
    """Bytes. getrusage counts in KiB, but in bytes on macOS."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
