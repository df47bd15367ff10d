"""torchtitan_rd_vllm without vLLM: what it refuses, and that its copies of our rules are ours."""

import ast
import importlib
import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tomli
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.raven.remote import export, fresh_code, load  # noqa: F401 (a fixture)
from tests.models.raven.tiny import RETROFITTED, tiny_config, tiny_raven
from torchtitan_rd.inference.sharing import Sharing
from torchtitan_rd.models.raven.hf import HF
from torchtitan_rd.models.raven.model import Raven
from torchtitan_rd_vllm import first_state, rotary
from torchtitan_rd_vllm.settings import KVCache, Serving, ServingError, check_parallel
from torchtitan_rd_vllm.weights import checked, shapes

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "torchtitan_rd_vllm"
SOURCES = sorted(PLUGIN.glob("*.py"))
STRATEGIES = ("full", "latest-m4", "compress-s2", "latest-m4-compress-s2", "latest-m4-compress-s6")


@pytest.fixture
def folder(tmp_path):
    """As a conversion writes it, but for weights and code."""
    (tmp_path / "config.json").write_text(json.dumps(HF.config_fields(tiny_config())))
    return tmp_path


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The code that leaves with the weights, as a user loads it."""
    return load(export(tiny_raven(**RETROFITTED), tmp_path_factory.mktemp("made") / "export"))


def serve(*arguments):
    """`bash serve_raven.sh`, by a Python without vLLM -> what it says."""
    done = subprocess.run(
        ["bash", "serve_raven.sh", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "VLLM_PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 1 and not done.stdout
    return done.stderr.strip()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--depth", "0"), "mean_recurrence = 0 must be a number of iterations from 1"),
        (("--kv", "latst-m4"), "kv_cache = 'latst-m4' is no strategy that is served"),
        (
            ("--kv", "compress-s3"),
            "kv_cache = 'compress-s3': 3 must be a multiple of the model's 2 core layers",
        ),
        (("-tp", "3"), "tensor-parallel-size = 3 does not divide the model's 4 heads"),
        (("--state-seed", "x"), "--state-seed 'x' is neither a whole number nor none"),
        (("--exit", "latent-diff"), "use kv_cache = 'latest-m4' with exit_criterion"),
        (("--min-steps", "2"), "--min-steps has no effect without --exit latent-diff"),
        (("--hf-overrides", "{}"), "--hf-overrides: give its settings as --depth"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, tuple) else "",
)
def test_a_setting_that_cannot_be_served_is_refused(arguments, said, folder):
    from torchtitan_rd_vllm.__main__ import command

    with pytest.raises(ServingError) as refused:
        command([str(folder), *arguments])
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_mistake_and_a_missing_vllm_are_one_line_each(folder):
    assert serve(folder, "--depth", "0").startswith("torchtitan_rd_vllm: mean_recurrence = 0 must")
    assert "vLLM is not installed in" in (said := serve(folder)) and "\n" not in said


def test_a_folder_without_a_raven_is_refused(tmp_path):
    from torchtitan_rd_vllm.__main__ import command

    with pytest.raises(ServingError, match=r"has no config.json: give a folder that convert/dcp_to_hf.py"):
        command([str(tmp_path)])
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ServingError, match="holds no raven: its model_type is 'llama', not 'huginn_raven'"):
        command([str(tmp_path)])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ServingError, match=r"config.json is no JSON"):
        command([str(tmp_path)])


def test_flags_become_settings_and_the_others_reach_the_server(folder):
    from torchtitan_rd_vllm.__main__ import command

    leaving = "--exit latent-diff --exit-threshold 0.1 --min-steps 2"
    given = f"--depth 3 --kv latest-m4 --state-seed none {leaving} --port 80"
    model, name, flag, overrides, *rest = command([str(folder), *given.split()])
    assert (model, name, flag) == ("--model", str(folder), "--hf-overrides")
    assert json.loads(overrides) == {
        "mean_recurrence": 3,
        "kv_cache": "latest-m4",
        "state_seed": None,
        "exit_criterion": "latent-diff",
        "exit_threshold": 0.1,
        "exit_min_steps": 2,
    }
    assert rest == ["--tensor-parallel-size", "1", "--enforce-eager", "--port", "80"]
    assert "--enforce-eager" not in command([str(folder), "--depth", "3"])


@pytest.mark.parametrize(
    "field, value",
    [
        ("mean_recurrence", True),
        ("mean_recurrence", 2.5),
        ("mean_recurrence", 10**9),
        ("exit_min_steps", 0),
        ("state_seed", "0"),
        ("exit_criterion", "kl"),
        ("exit_threshold", -0.1),
        ("exit_threshold", float("nan")),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(field, value):
    with pytest.raises(ServingError, match=field):
        Serving(**{"mean_recurrence": 4, field: value})


def test_ranks_share_heads_or_copy_those_of_keys():
    for ranks in (1, 2, 4, 8):
        check_parallel(ranks, 8, 2, {"n_embd": 64})
    with pytest.raises(ServingError, match="neither divides the model's 3 heads of keys"):
        check_parallel(2, 6, 3, {})
    with pytest.raises(ServingError, match="does not divide n_embd = 30"):
        check_parallel(4, 8, 4, {"n_embd": 30})
    with pytest.raises(ServingError, match="must be at least 1"):
        check_parallel(0, 8, 4, {})


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("name", STRATEGIES)
def test_places_are_the_slots_of_our_cache(name, depth):
    ours, theirs = Sharing(name, 2, depth), KVCache(name, 2, depth)
    for step in range(depth):
        assert [theirs.place(step, layer) for layer in (0, 1)] == [ours.slot(step, layer) for layer in (0, 1)]
    assert theirs.places == ours.slots and theirs.is_shared == (ours.slots < 2 * depth)


@pytest.mark.parametrize("steps", [1, 2, 4, 5])
@pytest.mark.parametrize("name", [name for name in STRATEGIES if name.startswith("latest")])
def test_a_token_that_left_shows_in_each_place_what_ours_shows(name, steps):
    ours, theirs = Sharing(name, 2, 5), KVCache(name, 2, 5)
    held: dict[int, tuple[int, int]] = {}  # place -> (iteration, layer) that wrote it last
    for step in range(steps):
        for layer in (0, 1):
            held[theirs.place(step, layer)] = step, layer
    shown = [held[place] for place in ours.shown(steps)]
    for place, layer in theirs.unwritten(steps):
        held[place] = steps - 1, layer
    assert [held[place] for place in range(theirs.places)] == shown


def test_a_strategy_that_hides_tokens_goes_with_no_exit():
    for name in ("full", "compress-s2"):
        with pytest.raises(ServingError, match="use kv_cache = 'latest-m4"):
            KVCache(name, 2, 4).check_exits(True)
        KVCache(name, 2, 4).check_exits(False)
    KVCache("latest-m4", 2, 4).check_exits(True)


def configs(**fields):
    """Of the exported code's class, and of the plugin's, from one config.json."""
    from torchtitan_rd.models.raven.huggingface.configuration_raven import RavenConfig as Exported
    from torchtitan_rd_vllm.configuration import RavenConfig as Served

    written = HF.config_fields(tiny_config(**fields))
    return Exported(**written), Served(**written)


@pytest.mark.parametrize("fields", [{}, RETROFITTED, {"tie_word_embeddings": False, "clip_qkv": 2.0}])
def test_a_config_is_read_as_the_exported_code_reads_it(fields):
    from torchtitan_rd_vllm.fields import FIELDS

    exported, served = configs(**fields)
    shared = [name for name in FIELDS if hasattr(exported, name)]
    assert set(FIELDS) - set(shared) == {
        "kv_cache",
        "state_seed",
        "exit_criterion",
        "exit_threshold",
        "exit_min_steps",
    }
    for name in (*shared, "n_layers", "tie_word_embeddings", "embedding_scale", "hidden_size"):
        assert getattr(served, name) == getattr(exported, name), name


def test_defaults_are_those_of_the_exported_code():
    from torchtitan_rd.models.raven.huggingface.configuration_raven import RavenConfig as Exported
    from torchtitan_rd_vllm.configuration import RavenConfig as Served
    from torchtitan_rd_vllm.fields import FIELDS

    exported, served = Exported(), Served()
    for name in FIELDS.keys() & vars(exported).keys():
        assert getattr(served, name) == getattr(exported, name), name


def test_an_override_that_nothing_would_read_is_refused():
    _, served = configs()
    served.update({"kv_cache": "latest-m4", "mean_recurrence": 3})
    assert served.serving() == Serving(3, "latest-m4")
    with pytest.raises(ServingError, match="no field 'kv_cahce'; did you mean 'kv_cache'"):
        served.update({"kv_cahce": "full"})
    with pytest.raises(ServingError, match="block_class_name = 'Block' is not one of SandwichBlock"):
        type(served)(block_class_name="Block")
    with pytest.raises(ServingError, match="n_heads = 'four' must be a whole number of at least 1"):
        type(served)(n_heads="four")


@pytest.mark.parametrize("fields", [{}, RETROFITTED, {"block": "post", "injection": "add"}])
def test_the_tensors_that_are_wanted_are_those_of_an_export(fields):
    with torch.device("meta"):
        parameters = dict(Raven(tiny_config(**fields)).named_parameters())
    names = HF.key_map(tiny_config(**fields))
    wanted = shapes(configs(**fields)[1])
    assert wanted == {theirs: tuple(parameters[ours].shape) for ours, theirs in names.items()}


def test_a_missing_tensor_and_one_of_another_shape_are_refused_by_name():
    wanted = {"a": (2, 3), "b": (4,)}
    tensors = [("a", torch.zeros(2, 3)), ("freqs", torch.zeros(1)), ("b", torch.zeros(4))]
    assert list(checked(tensors, wanted)) == tensors
    with pytest.raises(ServingError, match=r"lacks b \(1 tensors of 2\)"):
        list(checked(tensors[:2], wanted))
    with pytest.raises(ServingError, match=r"b is \(5,\), but config.json says \(4,\)"):
        list(checked([tensors[0], ("b", torch.zeros(5))], wanted))


@pytest.mark.parametrize("kind", ["like-init", "normal", "embed", "unit"])
def test_the_first_state_is_that_of_the_exported_code_bit_by_bit(kind, exported):
    exported.config.state_init = kind
    _, served = configs(**RETROFITTED, state_init=kind)
    expected = exported.initial_state(torch.zeros(1, 5, 32), torch.arange(5)[None], state_seed=3)
    assert torch.equal(first_state.table(served, 5, 3), expected[0])
    assert not torch.equal(first_state.table(served, 5, 4), expected[0])


@pytest.fixture
def checks(monkeypatch):
    """checks.py without vLLM, of which it takes a logger and a base class."""
    config = "vllm.model_executor.models.config"
    for name in ("vllm", "vllm.logger", "vllm.model_executor", "vllm.model_executor.models", config):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vllm.logger"].init_logger = logging.getLogger
    sys.modules[config].VerifyAndUpdateConfig = object
    monkeypatch.delitem(sys.modules, "torchtitan_rd_vllm.checks", raising=False)
    yield importlib.import_module("torchtitan_rd_vllm.checks")
    del sys.modules["torchtitan_rd_vllm.checks"]


@pytest.mark.parametrize("kv_cache, whole", [("latest-m4-compress-s2", True), ("latest-m4", False)])
def test_prompts_are_computed_whole_where_iterations_share_keys(kv_cache, whole, checks):
    raven, _ = configs(**RETROFITTED)
    raven.serving = lambda: Serving(mean_recurrence=4, kv_cache=kv_cache)
    given = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=raven, enforce_eager=True, max_model_len=512),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        scheduler_config=SimpleNamespace(
            enable_chunked_prefill=True, max_num_batched_tokens=128, long_prefill_token_threshold=64
        ),
    )
    checks.RavenChecks.verify_and_update_config(given)
    scheduler = given.scheduler_config
    assert given.cache_config.enable_prefix_caching is scheduler.enable_chunked_prefill is not whole
    assert scheduler.max_num_batched_tokens == (512 if whole else 128)
    assert scheduler.long_prefill_token_threshold == (0 if whole else 64)


class Operators(TorchDispatchMode):
    """Remembers the names of all operators within it."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["like-init", "normal", "embed", "unit"])
def test_a_first_state_without_a_seed_is_drawn_without_asking_the_device(kind):
    """What waits for the device breaks the capture of a CUDA graph."""
    _, served = configs(**RETROFITTED, state_init=kind)
    with Operators() as seen:
        first_state.noise(served, torch.empty(8, 32))
    assert "uniform_" in seen.names or "normal_" in seen.names
    assert seen.names.isdisjoint({"_local_scalar_dense", "item", "nonzero", "masked_select"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_first_state_without_a_seed_is_the_normal_cut_at_three_deviations(dtype):
    _, served = configs(**RETROFITTED, state_init="like-init")
    x = torch.empty(20_000, 32, dtype=dtype)
    torch.manual_seed(0)
    drawn = first_state.noise(served, x)
    assert drawn.dtype == dtype and drawn.shape == x.shape
    deviations = drawn.double() / (math.sqrt(2 / (5 * 32)) * served.embedding_scale)

    assert float(deviations.abs().max()) == pytest.approx(3.0, abs=0.02)
    # Of a normal cut at c the variance is 1 - 2 c density(c) / mass(-c, c).
    mass = math.erf(3 / math.sqrt(2))
    variance = 1 - 2 * 3 * math.exp(-4.5) / math.sqrt(2 * math.pi) / mass
    assert float(deviations.var()) == pytest.approx(variance, rel=0.01)
    assert abs(float(deviations.mean())) < 0.01
    below = float((deviations < 1.0).double().mean())
    assert below == pytest.approx(0.5 + math.erf(1 / math.sqrt(2)) / 2 / mass, abs=5e-3)


def test_noise_is_none_of_a_state_that_starts_elsewhere():
    assert first_state.is_noise(SimpleNamespace(injection_type="linear", state_init="unit"))
    assert not first_state.is_noise(SimpleNamespace(injection_type="linear", state_init="zero"))
    assert not first_state.is_noise(SimpleNamespace(injection_type="none", state_init="unit"))


@pytest.mark.parametrize("scaling", [None, RETROFITTED["rope_scaling"]], ids=["plain", "stretched"])
def test_rotary_positions_are_those_of_the_exported_code(scaling, exported):
    config, served = configs(**{**RETROFITTED, "rope_scaling": scaling})
    exported.config.llama3_rope = config.llama3_rope
    cos, sin = exported._rotary(torch.arange(40)[None])
    angles = torch.arange(40)[:, None, None].float() * rotary.frequencies(served)
    assert torch.equal(angles.cos(), cos[0]) and torch.equal(angles.sin(), sin[0])

    x = torch.randn(40, 3, 16, generator=torch.Generator().manual_seed(0))
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(
        rotary.rotate(x, angles.cos(), angles.sin()), torch.view_as_real(turned).flatten(-2)
    )


def test_the_plugin_imports_nothing_of_the_trainer_and_vllm_finds_it():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "torchtitan_rd"], path
    project = tomli.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["torchtitan_rd"].partition(":")
    assert callable(getattr(__import__(module), function))


def test_the_plugin_keeps_the_rules_of_the_house():
    for path in SOURCES:
        text = path.read_text()
        assert text.isascii() and text.count("\n") <= 400
        nodes = list(ast.walk(ast.parse(text)))
        assert not [node for node in nodes if isinstance(node, ast.Assert)], path
        assert "os.environ" not in text, path
