"""Flavors and shipped runs that claim to be another model's block: field by field."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from torchtitan_rd.config import load
from torchtitan_rd.job import Environment
from torchtitan_rd.models import MODELS, get_flavor
from torchtitan_rd.models.raven.shape import RAVEN_FLAVORS
from torchtitan_rd.train import Trainer

CONFIGS = Path(__file__).parents[3] / "train_configs"
ENVIRONMENT = Environment(rank=0, local_rank=0, world_size=1, local_world_size=1, log_level="WARNING")
HUGINN, MAGPIE = RAVEN_FLAVORS["nebel-raven-3.5b"], RAVEN_FLAVORS["magpie-150m"]
SIZES = ("dim", "ffn_dim", "n_layers_prelude", "n_layers_core", "n_layers_coda", "mean_recurrence")
SIZES = (*SIZES, "mean_backprop_depth")


def test_the_raven_of_131072_spikes_is_huginns_block_in_magpies_sizes_with_heads_of_128():
    path = CONFIGS / "raven_primate_131k.toml"
    built = Trainer(load(["--job.config_file", str(path)], ENVIRONMENT), ENVIRONMENT).plan.shape
    assert built.attention_shape == (8, 8, 128)
    assert {name: getattr(built, name) for name in SIZES} == {name: getattr(MAGPIE, name) for name in SIZES}
    # Whatever is no size is Huginn's, but for what the data and their context ask for.
    asked = {"vocab_size": 256, "rope_theta": 500_000.0, "max_seq_len": 131_072, "n_heads": 8}
    expected = asdict(HUGINN) | {name: getattr(MAGPIE, name) for name in SIZES} | asked
    assert asdict(built) == expected
    assert (built.qk_bias, built.norm_eps, built.block, built.init_strategy) == (
        True,
        1e-6,
        "sandwich",
        "takase",
    )


def test_an_override_replaces_its_field_alone():
    changed = get_flavor(MODELS["raven"], "magpie-150m", {"block": "sandwich"})
    assert changed == replace(MAGPIE, block="sandwich") and not changed.qk_bias and changed.norm_eps == 1e-5


@pytest.mark.parametrize(
    ("flavor", "base", "different"),
    [
        ("corone-raven-3.5b", "nebel-raven-3.5b", {"block": "pre"}),
        (
            "baby-recurrent-200m",
            "magpie-150m",
            {
                "ffn_dim": 2816,
                "n_kv_heads": 8,
                "vocab_size": 32000,
                "sampling_scheme": "poisson-unbounded",
                "tie_word_embeddings": False,
            },
        ),
    ],
)
def test_a_flavor_differs_from_its_relative_in_these_fields_only(flavor, base, different):
    """Facts of the public registry."""
    assert RAVEN_FLAVORS[flavor] == replace(RAVEN_FLAVORS[base], **different)
    assert not [name for name in different if getattr(RAVEN_FLAVORS[base], name) == different[name]]
