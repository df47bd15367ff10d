"""[metrics]: what a run reports - console, metrics.jsonl, TensorBoard,
Weights & Biases - and how it is measured.
"""

from torchtitan_rd.metrics.devices import peak_flops
from torchtitan_rd.metrics.metrics import Metrics, MetricsConfig
from torchtitan_rd.metrics.results import StepNumbers, StepResult

__all__ = ["Metrics", "MetricsConfig", "StepNumbers", "StepResult", "peak_flops"]
