"""The keys of [optimizer]. Those of one optimizer alone stand with it, and are refused with any other."""

from typing import Literal

from pydantic import Field, model_validator

from torchtitan_rd.config_loader import MUST_MATCH
from torchtitan_rd.optimizer.ellis_adam import EllisKeys
from torchtitan_rd.optimizer.muon import MuonKeys


class OptimizerConfig(EllisKeys, MuonKeys):
    name: Literal["AdamW", "Adam", "ELLISAdam", "Muon"] = Field("AdamW", json_schema_extra=MUST_MATCH)
    """Adam here has no weight decay unless weight_decay is set (then it is L2 in the gradient).
    ELLISAdam: the AdamW variant of the Huginn runs. Muon: for the matrices, with AdamW for embeddings,
    head, norms and biases.
    """
    lr: float = Field(8e-4, gt=0.0)
    """The full learning rate; [lr_scheduler] multiplies it."""
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """Decay of the first moment."""
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    """Decay of the second moment."""
    eps: float = Field(1e-8, gt=0.0)
    """Added to the root of the second moment. (The Huginn runs used 1e-6.)"""
    weight_decay: float = Field(0.1, ge=0.0)
    """Weight decay, decoupled from the gradient in all but Adam; in ELLISAdam see decouple_wd too."""
    no_weight_decay_for_bias_and_norm: bool = False
    """Leave norms and biases out of the weight decay. Embeddings and head stay in it."""
    implementation: Literal["fused", "foreach", "for-loop"] = "fused"
    """Of Adam and AdamW. fused: one kernel for all; foreach: one an operation; for-loop: one a parameter and
    operation. ELLISAdam has one implementation only. foreach and for-loop take no flag from the device
    (training.on_nonfinite), so the host waits for the gradient norm in each step, as it does under
    training.enable_cpu_offload.
    """

    @model_validator(mode="after")
    def _no_foreign_keys(self) -> "OptimizerConfig":
        problems = []
        for owner, section in (("ELLISAdam", EllisKeys), ("Muon", MuonKeys)):
            foreign = section.model_fields if self.name != owner else {}
            for key, field in foreign.items():
                if (value := getattr(self, key)) != field.default:
                    problems.append(
                        f'{key} = {value!r} belongs to name = "{owner}", not to name = "{self.name}": '
                        f"unset {key} or change name"
                    )
        if self.name == "ELLISAdam" and self.implementation != "fused":
            problems.append(
                f'implementation = "{self.implementation}" has no effect on name = "ELLISAdam": '
                "unset implementation"
            )
        if self.eps_adjustment and self.atan_adam:
            problems.append("eps_adjustment = True has no effect with atan_adam = True: unset one of the two")
        if problems:
            raise ValueError("; ".join(problems))
        return self
