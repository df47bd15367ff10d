"""The keys of [training] that the objective reads; `train_step.TrainingConfig` inherits them."""

from typing import Literal

from pydantic import Field, model_validator

from torchtitan_rd.config_loader import Section


class ObjectiveKeys(Section):
    goldfish_strategy: Literal["none", "static", "hash-table"] = "none"
    """Goldfish loss (arXiv 2406.10209): leave labels out of the loss so that text is not learned by heart. static:
    every goldfish_k-th position; hash-table: about every goldfish_k-th label, the same one wherever its context is."""
    goldfish_k: int = Field(4, ge=2)
    """Goldfish: one label in so many is left out."""
    goldfish_start_position: int = Field(0, ge=0)
    """Goldfish, static: the first position (from 0) that is left out."""
    goldfish_context_width: int = Field(13, ge=1)
    """Goldfish, hash-table: the labels that decide together whether the last of them is left out."""
    throttle: bool = False
    """Recurrent models: divide the objective by the recurrences that have a gradient (num_steps_with_grad)."""
    loss_guard: float | None = Field(None, gt=0.0)
    """Stop the run when the loss of a step exceeds this: neither its update nor a later one happens, and the error
    comes at once, on a GPU while the next step runs. The Huginn runs used 6."""
    loss_guard_after_tokens: int = Field(10_000_000_000, ge=0)
    """loss_guard: the number of tokens that must have been trained on before it watches."""

    @model_validator(mode="after")
    def _no_idle_keys(self) -> "ObjectiveKeys":
        used = {"none": (), "static": ("k", "start_position"), "hash-table": ("k", "context_width")}
        for key in ("k", "start_position", "context_width"):
            name = f"goldfish_{key}"
            value, default = getattr(self, name), ObjectiveKeys.model_fields[name].default
            if value != default and key not in used[self.goldfish_strategy]:
                raise ValueError(
                    f'{name} = {value} has no effect on goldfish_strategy = "{self.goldfish_strategy}": unset {name} '
                    f"or change goldfish_strategy"
                )
        watch_from = ObjectiveKeys.model_fields["loss_guard_after_tokens"].default
        if self.loss_guard is None and self.loss_guard_after_tokens != watch_from:
            raise ValueError("loss_guard_after_tokens has no effect without loss_guard: set both or neither")
        return self
