"""What a row says of the recurrent state and of its depth, against the model computed once more by hand."""

import pytest
import torch
import torch.nn.functional as F

from tests.launch import rows
from tests.models.raven.test_model import Restated
from tests.models.raven.tiny import RETROFITTED, some_state, tiny_config, tiny_raven
from tests.ranks import run_on_ranks
from tests.small_run import SEQ_LEN, VOCAB, Setup, batches_of, config_of
from tests.test_trainer import ALONE, SMALL
from torchtitan_rd.build_model import build_model
from torchtitan_rd.config import load
from torchtitan_rd.model_spec import ForwardInputs
from torchtitan_rd.models import get_spec
from torchtitan_rd.models.raven.recurrence import DepthSampler, RecurrenceConfig
from torchtitan_rd.models.raven.telemetry import StateTelemetry, token_correlation
from torchtitan_rd.optimizer import build_optimizer
from torchtitan_rd.parallelism import ParallelDims
from torchtitan_rd.train import Trainer
from torchtitan_rd.train_step import TrainStep

CPU = torch.device("cpu")
MICROBATCH = 2
DRAWS = [(2, 1), (0, 3), (3, 2), (1, 0)]  # of a rank's microbatches; what is described is the last one


def length(x):
    return x.square().sum(-1).sqrt()


def correlation(x_BSE):
    """Over all pairs of tokens, one after the other: the cosine of the two, each less its own mean."""
    batch, tokens, _ = x_BSE.shape
    total = 0.0
    for row in x_BSE:
        centred = [token - token.mean() for token in row]
        total += sum(float(F.cosine_similarity(a, b, dim=0)) for a in centred for b in centred)
    return total / batch / tokens**2 - 1 / tokens


def by_hand(config, weights, tokens, draw, state):
    model = Restated(config, weights)
    e, previous, s = model.embed(tokens), None, state
    for _ in range(sum(draw)):
        previous, s = s, model.iterate(s, e)
    x = model.latent(s)
    y = model.norm(model.blocks(x, "coda", config.n_layers_coda), "transformer.ln_f")
    return {
        "recurrent_residual": float(length(x - previous).mean()),
        "rel_residual": float((length(x - previous) / length(x)).mean()),
        "recurrent_diff": float(length(x - e).mean()),
        "recurrent_state_norm": float(length(x).mean()),
        "last_hidden_norm": float(length(y).mean()),
        "recurrent_state_token_corr": correlation(x),
        "last_hidden_token_corr": correlation(y),
    }


@torch.no_grad()
def scale_norms(model):
    """Off their initial 1, with which the norms of all states are alike."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_f" in name:
            weight = parameter.to_local()
            weight *= 1 + 0.5 * torch.rand(weight.shape, generator=generator)


def described_step(rank, world_size, mode, fields):
    """One step of all microbatches; returns what telemetry read of it, and the same by hand."""
    sections = {"training": {"local_batch_size": MICROBATCH}, "activation_checkpoint": {"mode": mode}}
    config, spec = config_of(Setup(sections=sections), world_size), get_spec("raven")
    mesh = ParallelDims.resolve(config.parallelism, world_size).build_mesh("cpu")
    model = build_model(config, spec, tiny_config(vocab_size=VOCAB, **fields), mesh, CPU)
    scale_norms(model)
    weights = {name: tensor.full_tensor().clone() for name, tensor in model.state_dict().items()}
    batches = batches_of(1, rank, world_size, config, padded=True)
    draws = DRAWS[-len(batches) :]
    states = [some_state(MICROBATCH, SEQ_LEN, seed=rank * 10 + number) for number in range(len(batches))]

    def inputs(step, number, batch):
        return ForwardInputs({"num_steps": draws[number], "initial_state": states[number]}, draws[number])

    step = TrainStep(
        model, build_optimizer(model, config.optimizer), config.training, CPU, forward_inputs=inputs
    )
    with spec.telemetry(model) as telemetry:
        step(1, batches)
    found = telemetry.read()
    step(2, batches)  # outside of the context: nothing more is seen
    assert telemetry.read() == found
    return found, by_hand(model.shape, weights, batches[-1].inputs, draws[-1], states[-1])


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("fields", [{}, RETROFITTED], ids=["huginn", "retrofitted"])
def test_every_value_is_its_formula_for_the_last_microbatch_of_a_step(world_size, mode, fields):
    for found, expected in run_on_ranks(world_size, described_step, mode, fields):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
        values = [abs(value) for value in expected.values()]
        assert min(values) > 1e-3, values
        assert len({round(value, 3) for value in values}) == len(values), "each is one of its own"


def test_without_an_iteration_there_is_nothing_to_describe():
    model = tiny_raven()
    with StateTelemetry(model) as telemetry:
        model(torch.zeros(1, 4, dtype=torch.int64), num_steps=(0, 0), initial_state=some_state(1, 4))
    assert telemetry.read() == {}


def test_tokens_that_are_alike_correlate_and_independent_ones_do_not():
    row = torch.randn(64, generator=torch.Generator().manual_seed(0))
    alike = torch.stack([row, 3 * row, row + 5]).unsqueeze(0)
    assert float(token_correlation(alike)) == pytest.approx(1 - 1 / 3)
    apart = torch.randn(4, 200, 64, generator=torch.Generator().manual_seed(1))
    assert float(token_correlation(apart)) == pytest.approx(0, abs=2e-3)
    assert float(token_correlation(apart)) == pytest.approx(correlation(apart[:, :]), abs=1e-6)


@pytest.mark.parametrize("draw_per", ["step", "microbatch"])
def test_the_depths_of_a_row_are_the_mean_draws_of_its_step(draw_per, tmp_path):
    """Two microbatches a step: the same draw twice, or the draws number 2 s - 1 and 2 s of step s."""
    raven = [key for key in SMALL if "n_layers" not in key]
    raven += ["--model.name=raven", "--model.flavor=debug-demo", "--model.overrides.n_heads=2"]
    raven += [
        f"--recurrence.draw_per={draw_per}",
        "--training.local_batch_size=1",
        "--training.global_batch_size=2",
    ]
    run = Trainer(load([*raven, "--metrics.log_freq=1", f"--job.dump_folder={tmp_path}"], ALONE), ALONE)
    run.run()
    sampler = DepthSampler(
        RecurrenceConfig(draw_per=draw_per),
        scheme=run.plan.shape.sampling_scheme,
        mean_recurrence=run.plan.shape.mean_recurrence,
        mean_backprop_depth=run.plan.shape.mean_backprop_depth,
        total_steps=6,
    )
    found = rows(tmp_path)
    assert len(found) == 6
    for row in found:
        draws = [sampler.draw(row["step"], microbatch=2 * row["step"] - 1 + number) for number in (0, 1)]
        assert row["num_steps_no_grad"] == sum(n for n, _ in draws) / 2
        assert row["num_steps_with_grad"] == sum(k for _, k in draws) / 2
    assert len({row["num_steps_no_grad"] for row in found}) > 1
