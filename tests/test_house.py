"""The rules of the house that a machine can hold (docs/architecture.md)."""

import ast
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from torchtitan_rd.commands.config import schema_page
from torchtitan_rd.config import JobConfig, load
from torchtitan_rd.config_loader import Section
from torchtitan_rd.conversion.tokenizer_files import tokenizer_files
from torchtitan_rd.job import Environment
from torchtitan_rd.model_spec import Microbatch
from torchtitan_rd.models import MODELS, get_flavor
from torchtitan_rd.models.raven import RecurrenceConfig
from torchtitan_rd.optimizer import OptimizerConfig
from torchtitan_rd.train import Trainer

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "torchtitan_rd"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TOOLS = [
    path
    for folder in ("convert", "benchmarks", "torchtitan_rd_vllm")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
ENVIRONMENT = Environment(rank=0, local_rank=0, world_size=1, local_world_size=1, log_level="WARNING")


def is_function(node) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def test_no_file_is_over_400_lines_and_no_function_over_80():
    for path in SOURCES:
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in filter(is_function, ast.walk(ast.parse(text))):
            assert node.end_lineno - node.lineno < 80, f"{path}: {node.name}"


def test_no_line_is_over_110_columns():
    for path in [*SOURCES, *TOOLS, *TESTS]:
        lines = enumerate(path.read_text().splitlines(), 1)
        assert [number for number, line in lines if len(line) > 110] == [], path


def test_a_long_function_has_air_and_a_line_sets_few_attributes():
    """In a function over 20 lines at most 20 follow each other without a blank one or a caption;
    an assignment sets less than three attributes.
    """
    for path in [*SOURCES, *TOOLS]:
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            place = f"{path}, line {getattr(node, 'lineno', 0)}"
            if is_function(node) and node.end_lineno - node.lineno >= 20:
                assert longest_run(node, text.splitlines()) <= 20, place
            if isinstance(node, ast.Assign):
                set_here = [part for target in node.targets for part in ast.walk(target)]
                assert sum(is_set_attribute(part) for part in set_here) < 3, place


def longest_run(function, lines) -> int:
    """Lines of a function's body, behind its docstring, that follow each other without a pause."""
    first = function.body[0]
    start = first.end_lineno if ast.get_docstring(function) is not None else first.lineno - 1
    run = longest = 0
    for line in lines[start : function.end_lineno]:
        run = 0 if not line.strip() or line.strip().startswith("#") else run + 1
        longest = max(longest, run)
    return longest


def is_set_attribute(part) -> bool:
    return isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)


def test_only_job_reads_the_environment():
    readers = {path.name for path in SOURCES if re.search(r"os\.(environ|getenv)", path.read_text())}
    assert readers == {"job.py"}


def test_user_mistakes_are_never_asserts():
    for path in SOURCES:
        asserts = [
            node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)
        ]
        assert not asserts, f"{path}: {asserts}"


def test_sources_are_ascii():
    for path in [
        *SOURCES,
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("*.sh"),
        *ROOT.glob("scripts/**/*.sh"),
    ]:
        assert path.read_bytes().isascii(), path


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_finds_nothing(command):
    found = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_type_checker_finds_nothing():
    """The whole package (pyproject.toml). About a minute where .mypy_cache is empty, seconds afterwards."""
    found = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_exceptions_from_the_type_checker_are_few_and_name_their_kind():
    lines = [line for path in SOURCES for line in path.read_text().splitlines() if "type: ignore" in line]
    assert len(lines) <= 6 and all(re.search(r"# type: ignore\[[a-z-]+\]", line) for line in lines), lines


@pytest.mark.parametrize("path", sorted(ROOT.glob("train_configs/*.toml")), ids=lambda path: path.name)
def test_every_shipped_config_loads_names_its_hardware_and_repeats_no_default(path, tmp_path):
    needed = ["--training.dataset_path", str(tmp_path)] if 'dataset = "packed"' in path.read_text() else []
    if 'dataset = "gsm8k"' in path.read_text():
        for name, content in tokenizer_files("bytes").files.items():
            (tmp_path / name).write_bytes(content)
        (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
        needed = ["--model.tokenizer_path", str(tmp_path)]
    (tmp_path / "train.parquet").touch()
    (tmp_path / "validation.parquet").touch()
    loaded = load(["--job.config_file", str(path), *needed], ENVIRONMENT)
    assert path.read_text().startswith("# Hardware: ")
    assert not loaded.warnings
    defaults = JobConfig().as_dict()
    for key in loaded.origins.keys() - {"job.config_file", "model.name", "model.flavor", "training.dataset"}:
        section, name, *_ = key.split(".")
        assert loaded.config.as_dict()[section][name] != defaults[section][name], f"{key} is the default"
    ranks = max(loaded.config.parallelism.data_parallel_shard_degree, 1)
    # Every check that needs neither data nor peers.
    trainer = Trainer(loaded, replace(ENVIRONMENT, world_size=ranks))
    assert trainer.plan.shape.vocab_size in (256, 258, 32000, 65536)


@pytest.mark.parametrize("script", sorted(ROOT.glob("train_*.sh")), ids=lambda path: path.name)
def test_every_script_is_short_names_one_toml_that_exists_and_passes_its_arguments_on(script):
    text = script.read_text()
    tomls = re.findall(
        r"train_configs/\S+\.toml", text.replace(" Arguments override train_configs/debug.toml.", "")
    )
    assert len(tomls) == 1 and (ROOT / tomls[0]).exists()
    assert '"$@"' in text and "source scripts/env.sh" in text
    assert len([line for line in text.splitlines() if not line.startswith("#")]) <= 6
    assert subprocess.run(["bash", "-n", script]).returncode == 0


@pytest.mark.parametrize("name", MODELS)
def test_every_model_builds_its_debug_flavor_and_runs(name):
    spec = MODELS[name]
    shape = get_flavor(spec, "debug")
    model = spec.build(shape)
    extra = {}
    if spec.inputs is not None:
        drawing = spec.inputs(shape, RecurrenceConfig(), seed=0, total_steps=1)
        extra = drawing(Microbatch(1, 1, 0, [0], 8, torch.device("cpu"), torch.float32)).kwargs
    logits = model(torch.zeros(1, 8, dtype=torch.int64), **extra)
    assert logits.shape[:2] == (1, 8) and logits.dtype == torch.float32


def test_every_section_has_the_room_of_its_name():
    owners = {
        "model": "models",
        "recurrence": "models",
        "training": "train_step",
        "comm": "job",
        "activation_checkpoint": "parallelism",
        "compile": "parallelism",
    }
    for section, info in JobConfig.model_fields.items():
        home = info.annotation.__module__.split(".")[1]
        assert home == owners.get(section, section), section


def test_every_key_is_documented():
    for section, info in JobConfig.model_fields.items():
        for key, field in info.annotation.model_fields.items():
            assert field.description, f"{section}.{key} has no docstring"


def test_the_configuration_page_is_generated_from_the_schema():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == schema_page() + "\n", (
        "run: python -m torchtitan_rd config --schema > docs/configuration.md"
    )


LIGHT = """
import sys
import torchtitan_rd, torchtitan_rd.train, torchtitan_rd.__main__
import torchtitan_rd.conversion.card, torchtitan_rd.conversion.hub
import torchtitan_rd.conversion.tokenizer_files, torchtitan_rd.conversion.verification
heavy = {"transformers", "datasets", "wandb", "triton", "tensorboard", "pandas", "pyarrow"}
heavy |= {"tokenizers", "tiktoken", "blobfile", "huggingface_hub"}
heavy &= set(sys.modules)
sys.exit(f"imported {sorted(heavy)}" if heavy else 0)
"""


def test_importing_the_trainer_and_the_converters_loads_no_heavy_library():
    found = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


@pytest.fixture
def keys_read(monkeypatch):
    """(name of the section's class, key) of each read, but for those of validators and of what
    else loads a config.

    A validator that looks at each key in turn would otherwise hide every key that nothing else reads.
    """
    read: set[tuple[str, str]] = set()
    plain = Section.__getattribute__

    def noting(self, name):
        if not name.startswith(("_", "model_")) and not is_loading(sys._getframe(1)):
            read.update((cls.__name__, name) for cls in type(self).__mro__ if issubclass(cls, Section))
        return plain(self, name)

    monkeypatch.setattr(Section, "__getattribute__", noting)
    return read


def is_loading(frame) -> bool:
    """Whether a config is being loaded or validated, here or in a caller."""
    while frame is not None:
        if frame.f_code is load.__code__ or frame.f_code in VALIDATORS:
            return True
        frame = frame.f_back
    return False


def validators_of(section):
    """The code of the functions that pydantic calls to check a section."""
    decorators = section.__pydantic_decorators__
    found = [*decorators.model_validators.values(), *decorators.field_validators.values()]
    return {getattr(validator.func, "__func__", validator.func).__code__ for validator in found}


VALIDATORS = set().union(*(validators_of(info.annotation) for info in JobConfig.model_fields.values()))


def test_a_key_that_validators_alone_look_at_is_not_read(keys_read):
    config = load(["--optimizer.name=ELLISAdam"], ENVIRONMENT).config  # whose validators look at every option
    OptimizerConfig(name="Muon")
    assert len(VALIDATORS) > 5 and not keys_read
    assert config.optimizer.atan_adam is False
    assert {key for _, key in keys_read} == {"optimizer", "atan_adam"}


def test_every_declared_key_is_read_by_the_code(keys_read, tmp_path):
    """Runs a few steps under settings that reach every branch a CPU can reach."""
    runs_that_reach_every_key(tmp_path)
    unread = [
        f"{section}.{key}"
        for section, info in JobConfig.model_fields.items()
        for key in info.annotation.model_fields
        if (info.annotation.__name__, key) not in keys_read
    ]
    # Read on the way to a device or a library that is not here; and while a config is loaded,
    # which names its own file; and where ranks meet.
    only_elsewhere = {
        "metrics.wandb_project",
        "comm.trace_buf_size",
        "comm.save_traces_folder",
        "comm.rendezvous_timeout_seconds",
    }
    text = "".join(path.read_text() for path in SOURCES)
    assert set(unread) <= {*only_elsewhere, "job.config_file"}, unread
    assert all(re.search(rf"\.{key.split('.')[1]}\b", text) for key in only_elsewhere)


def runs_that_reach_every_key(tmp_path):
    common = [
        "--training.seq_len=16",
        "--training.local_batch_size=1",
        "--model.overrides.dim=32",
        "--training.mixed_precision_param=float32",
        "--checkpoint.enable",
        "--lr_scheduler.warmup_steps=0",
    ]
    trapezoid = ["--lr_scheduler.schedule=trapezoid", "--lr_scheduler.cooldown_steps=1"]
    profiled = ["--profiling.enable_profiling", "--profiling.profile_freq=4", "--metrics.enable_tensorboard"]
    held_out = ["--validation.enable", "--validation.dataset=pydoc-validation", "--validation.sequences=2"]
    recurrent = [
        "--model.name=raven",
        "--model.flavor=debug-demo",
        "--model.vocab_size=258",
        "--training.throttle",
    ]
    recurrent += ["--recurrence.max_steps_no_grad=3", "--recurrence.mean_recurrence_start=4"]
    recurrent += ["--recurrence.mean_backprop_depth_start=2", "--training.mixed_precision_param=float32"]
    llama = ["--model.overrides.n_layers=1", "--training.mixed_precision_param=float32"]
    seconds = ["--checkpoint.interval_type=seconds", "--compile.enable", "--compile.backend=eager"]
    (tmp_path / "one.txt").write_text("a document that is cut\n" * 40)
    cut = ["--training.dataset=text", f"--training.dataset_path={tmp_path / 'one.txt'}"]
    cut += [f"--training.cache_folder={tmp_path / 'cache'}"]
    for folder, *variant in (
        (
            "a",
            "--training.steps=4",
            "--checkpoint.last_save_model_only",
            "--checkpoint.last_save_in_hf",
            "--checkpoint.interval=2",
            "--training.on_spike=rollback",
            "--training.spike_window=3",
            "--training.replay_interval=2",
            *trapezoid,
            *profiled,
        ),
        ("a", "--training.steps=5", "--checkpoint.exclude_from_loading=rng", "--training.on_nonfinite=skip"),
        ("b", "--training.steps=1", *seconds),
        ("c", "--checkpoint.create_seed_checkpoint"),
        (
            "d",
            "--training.steps=2",
            *recurrent,
            *held_out,
            "--optimizer.name=ELLISAdam",
            "--optimizer.atan_adam",
        ),
        ("e", "--training.steps=1", *llama, "--optimizer.name=Muon", "--training.goldfish_strategy=static"),
        (
            "f",
            "--training.steps=1",
            *llama,
            *cut,
            "--training.goldfish_strategy=hash-table",
            "--training.loss_guard=99",
        ),
        (
            "g",
            "--training.steps=2",
            *llama,
            "--training.batch_ramp_steps=2",
            "--training.global_batch_size=8",
            "--activation_checkpoint.mode=full",
            "--activation_checkpoint.keep=attention",
        ),
    ):
        arguments = [*common, *variant, f"--job.dump_folder={tmp_path / folder}"]
        Trainer(load(arguments, ENVIRONMENT), ENVIRONMENT).run()
