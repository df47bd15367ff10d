"""What a run saves and goes on from (tensors, position in the data, generators), and going back to it."""

import json
from pathlib import Path
from typing import Any

import torch

from torchtitan_rd import job
from torchtitan_rd.config import JobConfig
from torchtitan_rd.conversion.dcp import open_dcp
from torchtitan_rd.conversion.pipeline import to_hf, warn_of_another_tokenizer, with_tokenizer
from torchtitan_rd.conversion.weights import cast_weights
from torchtitan_rd.data import merge_states
from torchtitan_rd.errors import CheckpointError
from torchtitan_rd.log import logger
from torchtitan_rd.masking import mask_text
from torchtitan_rd.optimizer import optimizer_state
from torchtitan_rd.parts import Parts
from torchtitan_rd.reliability.rollback import Rollbacks, Spike
from torchtitan_rd.run_plan import RunPlan


def tensors_of(parts: Parts) -> dict[str, dict[str, torch.Tensor]]:
    """Parameters, and the optimizer's state, by name; a load fills them in place."""
    return {
        "model": dict(parts.model.state_dict()),
        "optimizer": optimizer_state(parts.model, parts.optimizer),
    }


def state_of(parts: Parts, plan: RunPlan, step: int, tokens_seen: int) -> dict[str, Any]:
    """All that is not a tensor, the same on every rank. Collective."""
    data = merge_states(plan.dims.one_per_row(job.gather(parts.loader.state_dict())))
    return {"step": step, "tokens_seen": tokens_seen, "data": {**data, "batch": parts.queue.number}}


def save(
    parts: Parts, plan: RunPlan, step: int, tokens_seen: int, *, last_step: bool, required: bool
) -> None:
    """Saves all that the run goes on from. Collective. The last two as `Checkpointer.save` has them."""
    tensors, state = tensors_of(parts), state_of(parts, plan, step, tokens_seen)
    ends = {"last_step": last_step, "required": required}
    parts.checkpointer.save(step, tensors, state, own_state={"rng": job.rng_state()}, **ends)


def restore(
    parts: Parts, plan: RunPlan, config: JobConfig, environment: job.Environment
) -> dict[str, Any] | None:
    """Goes on from the newest checkpoint, else starts from given weights, else from the initial ones.

    Returns the state of the checkpoint; None if the run starts at step 1. Collective.
    """
    tensors = tensors_of(parts)
    state = parts.checkpointer.load(tensors)
    if state is None:
        loaded = parts.checkpointer.load_initial(tensors["model"])
        tokenized = any(one.row.needs_tokenizer for one in plan.sets)
        tokenizer = plan.tokenizer if tokenized else None
        if loaded is not None and tokenizer is not None and environment.rank == 0:
            warn_of_another_tokenizer(loaded, config.model.tokenizer_path, tokenizer)
        logger.info("starting at step 1")
        return None
    take_up(parts, state, environment)
    logger.info(
        "resuming after step %d of %d (%d tokens)", state["step"], config.training.steps, state["tokens_seen"]
    )
    return state


def take_up(parts: Parts, state: dict[str, Any], environment: job.Environment) -> None:
    """The position in the data and the generators of a checkpoint's state, as far as it has them."""
    if "data" in state:
        parts.loader.load_state_dict(state["data"])
        # Checkpoints of earlier versions are of runs that passed over nothing.
        parts.queue.number = state["data"].get("batch", state["step"])
    if rng := job.own_rng_state(state.get("rng"), environment):
        job.set_rng_state(rng)


def save_seed(parts: Parts, step: int) -> None:
    """`step-0`: the weights that a run starts from, whatever the number of its ranks."""
    if step > 0:
        raise CheckpointError(
            "checkpoint.create_seed_checkpoint: this run has checkpoints; use another folder"
        )
    parts.checkpointer.save(0, {"model": tensors_of(parts)["model"]}, {}, required=True)


def export_hf(parts: Parts, step: int, export_dtype: str) -> None:
    """Writes a saved step as a Hugging Face folder, on one rank. Collective."""

    def write(checkpoint: Path, folder: Path) -> None:
        weights = cast_weights(open_dcp(checkpoint), getattr(torch, export_dtype))
        to_hf(with_tokenizer(weights), folder, verify=False)
        logger.info("exported %s", folder)

    parts.checkpointer.export(step, write)


def write_documents(parts: Parts, config: JobConfig, dump_folder: Path) -> None:
    """What runs, and on what data, for people; on one rank."""
    config.write(dump_folder / "config.toml")
    record = mask_text(json.dumps(parts.loader.record, indent=1))
    (dump_folder / "data.json").write_text(record, encoding="utf-8")


def roll_back(
    parts: Parts, rollbacks: Rollbacks, spike: Spike, environment: job.Environment
) -> dict[str, Any] | None:
    """Goes back to a checkpoint from before `spike`, and on past its batches; returns the checkpoint's state.

    None, with nothing changed, if there is no such checkpoint. Collective. Raises TrainingError if there have
    been too many.
    """
    rollbacks.refuse_one_too_many(spike)
    parts.train_step.settle()
    # The update before the spike's step may be what spoilt it, so it goes too.
    state = parts.checkpointer.go_back(tensors_of(parts), before=spike.step - 1)
    if state is None:
        logger.warning("%s: there is no checkpoint from before to go back to; training goes on", spike)
        return None
    take_up(parts, state, environment)
    parts.queue.pass_over(rollbacks.add(spike, state["step"]))
    parts.train_step.saved = False
    parts.metrics.close()  # as after a restart: rows of the steps that are run again go
    parts.metrics.start(state["step"], state["tokens_seen"], differs=True)
    return state
