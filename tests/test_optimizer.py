"""Which optimizer over which parameters, and state as named tensors;
ELLISAdam and Muon have files of their own.
"""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tests.ranks import run_on_ranks
from tests.small_run import Setup, train
from torchtitan_rd.config import JobConfig, load
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.job import Environment
from torchtitan_rd.models import get_flavor, get_spec
from torchtitan_rd.optimizer import OptimizerConfig, build_optimizer, optimizer_state, set_lr
from torchtitan_rd.optimizer.groups import EMBEDDINGS, MATRICES, NORMS, group_of

ENVIRONMENT = Environment(rank=0, local_rank=0, world_size=1, local_world_size=1, log_level="WARNING")


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def update(model, optimizer):
    model(torch.ones(3, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_every_implementation_gives_the_same_updates(name, implementation):
    models = [small_model(), small_model()]
    for model, kind in zip(models, ("for-loop", implementation), strict=True):
        optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=1e-2, implementation=kind))
        for _ in range(3):
            update(model, optimizer)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_norms_and_biases_can_be_left_out_of_the_weight_decay():
    optimizer = build_optimizer(
        small_model(), OptimizerConfig(no_weight_decay_for_bias_and_norm=True, weight_decay=0.3)
    )
    decays = {
        tuple(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert decays == {(8, 4): 0.3, (2, 8): 0.3, (8,): 0.0, (2,): 0.0}


def test_making_the_state_early_changes_no_parameter_and_no_later_update():
    plain, early = small_model(), small_model()
    plain_optimizer = build_optimizer(plain, OptimizerConfig(lr=1e-2))
    early_optimizer = build_optimizer(early, OptimizerConfig(lr=1e-2))
    state = optimizer_state(early, early_optimizer)
    assert set(state) == {
        f"{n}.{k}" for n, _ in early.named_parameters() for k in ("exp_avg", "exp_avg_sq", "step")
    }
    assert all(not tensor.any() for tensor in state.values())
    for a, b in zip(plain.parameters(), early.parameters(), strict=True):
        assert torch.equal(a, b)
    for model, optimizer in ((plain, plain_optimizer), (early, early_optimizer)):
        update(model, optimizer)
    for a, b in zip(plain.parameters(), early.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_rate_of_every_group_follows_the_factor():
    optimizer = build_optimizer(
        small_model(), OptimizerConfig(lr=0.5, no_weight_decay_for_bias_and_norm=True)
    )
    assert set_lr(optimizer, 0.25) == 0.125
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


RAVEN = {  # specs of the released model
    "transformer.wte.weight": (2, EMBEDDINGS),
    "transformer.prelude.0.norm_1.weight": (1, NORMS),
    "transformer.core_block.3.attn.Wqkv.weight": (2, MATRICES),
    "transformer.core_block.3.attn.qk_bias": (4, NORMS),
    "transformer.core_block.3.attn.proj.weight": (2, MATRICES),
    "transformer.coda.1.mlp.fc.weight": (2, MATRICES),
    "transformer.adapter.weight": (2, MATRICES),
    "transformer.ln_f.weight": (1, NORMS),
    "lm_head.weight": (2, EMBEDDINGS),
}


@pytest.mark.parametrize("name", RAVEN)
def test_every_parameter_of_the_recurrent_model_has_its_group(name):
    ndim, expected = RAVEN[name]
    assert group_of(name, ndim) == expected


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_of_llama_is_in_one_group(tied):
    spec = get_spec("llama3")
    model = spec.build(get_flavor(spec, "debug", {"dim": 32, "n_layers": 2, "tie_word_embeddings": tied}))
    optimizer = build_optimizer(model, OptimizerConfig(no_weight_decay_for_bias_and_norm=True))
    kinds = {id(p): group["kind"] for group in optimizer.param_groups for p in group["params"]}
    assert len(kinds) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        expected = EMBEDDINGS if name in ("tok_embeddings.weight", "output.weight") else NORMS
        expected = MATRICES if name.split(".")[-2][0] == "w" else expected
        assert kinds[id(parameter)] == expected, name
    decays = {group["kind"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {MATRICES: 0.1, EMBEDDINGS: 0.1, NORMS: 0.0}


def test_a_parameter_that_no_rule_knows_is_refused():
    with pytest.raises(ConfigError, match=r"'conv.weight' with 3 dimensions"):
        group_of("conv.weight", 3)


FOREIGN = {
    "running_init": ({"running_init": True}, 'belongs to name = "ELLISAdam", not to name = "AdamW"'),
    "an option of Muon": ({"name": "ELLISAdam", "muon_ns_steps": 4}, 'belongs to name = "Muon"'),
    "decouple_wd": ({"name": "Muon", "decouple_wd": False}, "decouple_wd = False"),
    "implementation": ({"name": "ELLISAdam", "implementation": "foreach"}, "unset implementation"),
    "eps under atan2": (
        {"name": "ELLISAdam", "atan_adam": True, "eps_adjustment": True},
        "unset one of the two",
    ),
    "a negative exponent": ({"name": "ELLISAdam", "poly_ema_p": -1.0}, "greater than 0"),
}


@pytest.mark.parametrize("mistake", FOREIGN)
def test_an_option_of_another_optimizer_is_refused_by_both_names(mistake):
    keys, expected = FOREIGN[mistake]
    with pytest.raises(ValidationError, match=expected):
        OptimizerConfig(**keys)


def test_the_refusal_reaches_the_command_line_as_one_message():
    arguments = ["--training.steps=1", "--optimizer.running_init", "--optimizer.nesterov"]
    with pytest.raises(
        ConfigError, match=r"^\[optimizer\]: running_init = True belongs .*; nesterov = True belongs"
    ):
        load(arguments, ENVIRONMENT)


@pytest.mark.parametrize("name", ["AdamW", "Adam", "ELLISAdam", "Muon"])
def test_a_written_config_loads_again(name, tmp_path):
    JobConfig(optimizer=OptimizerConfig(name=name)).write(tmp_path / "config.toml")
    loaded = load(["--job.config_file", str(tmp_path / "config.toml")], ENVIRONMENT)
    assert loaded.config.optimizer == OptimizerConfig(name=name)


TRAINED = {
    "ELLISAdam": {"update_clipping": True, "atan_adam": True, "running_init": True, "eps": 1e-6},
    "Muon": {},
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_sharded_model_trains_as_a_whole_one_does(name):
    sections = {"optimizer": {"name": name, "lr": 1e-3, **TRAINED[name]}}
    plain = run_on_ranks(1, train, Setup(sections=sections, steps=4))[0]
    assert plain["before"] != plain["after"]
    hsdp = {**sections, "parallelism": {"data_parallel_replicate_degree": 2}}
    for world_size, setup in ((2, Setup(sections=sections, steps=4)), (4, Setup(sections=hsdp, steps=4))):
        for result in run_on_ranks(world_size, train, setup):
            # bfloat16 inside Muon turns a last-bit difference of the summed gradients into a larger one
            assert result["losses"] == pytest.approx(
                plain["losses"], abs=1e-5 if name == "ELLISAdam" else 2e-3
            )
