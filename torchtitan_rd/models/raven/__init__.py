"""Depth-recurrent transformers (Huginn, arXiv 2502.05171).

Parameter names are those of the released Hugging Face state dict but for the two modules that hold the
loop: dropping `recurrence.iteration.` from `transformer.recurrence.iteration.{adapter,core_block.<i>}...`
gives the released name.
"""

from torchtitan_rd.model_spec import ModelSpec
from torchtitan_rd.models.raven.hf import HF
from torchtitan_rd.models.raven.init import inits
from torchtitan_rd.models.raven.inputs import RavenInputs
from torchtitan_rd.models.raven.model import Raven
from torchtitan_rd.models.raven.plan import tensor_plan, wrap_plan
from torchtitan_rd.models.raven.recurrence import RecurrenceConfig
from torchtitan_rd.models.raven.released import FOREIGN
from torchtitan_rd.models.raven.shape import ARITHMETIC, RAVEN_FLAVORS, count_flops
from torchtitan_rd.models.raven.steps import RavenSteps
from torchtitan_rd.models.raven.telemetry import StateTelemetry

__all__ = ["RAVEN", "RecurrenceConfig"]

RAVEN = ModelSpec(
    name="raven",
    flavors=RAVEN_FLAVORS,
    arithmetic=ARITHMETIC,
    build=Raven,
    inits=inits,
    wrap_plan=wrap_plan,
    tensor_plan=tensor_plan,
    flops=count_flops,
    hf=HF,
    inputs=RavenInputs,
    telemetry=StateTelemetry,
    foreign=FOREIGN,
    steps=RavenSteps,
)
