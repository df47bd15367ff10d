"""Imports run one way (docs/architecture.md): nothing imports what stands further right,
and there is no circle.
"""

import ast
import functools
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "torchtitan_rd"

# The first name of a module below torchtitan_rd -> its place.
# Rooms of equal place may import each other, if allowed.
PLACES = {
    **dict.fromkeys(
        (
            "",
            "errors",
            "masking",
            "log",
            "config_file",
            "config_loader",
            "config_values",
            "model_spec",
            "model_steps",
            "batch",
            "whole_file",
        ),
        0,
    ),
    "parallelism": 1,
    **dict.fromkeys(
        (
            "models",
            "data",
            "optimizer",
            "lr_scheduler",
            "loss",
            "chunked_loss",
            "checkpoint",
            "metrics",
            "preflight",
            "profiling",
            "heartbeat",
            "job",
            "reliability",
            "signals",
        ),
        2,
    ),
    "train_step": 3,
    "conversion": 3,
    "validation": 3,
    "draws": 3,
    "old_keys": 4,
    "huginn_keys": 4,
    "huginn_mixture": 4,
    "huginn_config": 4,
    "inference": 4,
    "preparation": 4,
    "config": 4,
    "build_model": 5,
    "run_plan": 5,
    "budget": 6,
    "planning": 6,
    "diagnosis": 4,
    "rehearsal": 6,
    "slurm": 1,
    "parts": 6,
    "run_state": 6,
    "train": 7,
    "commands": 8,
    "__main__": 9,
}
ALLOWED_NEIGHBOURS = {
    ("chunked_loss", "loss"),
    ("config", "old_keys"),
    ("config", "huginn_config"),
    ("huginn_config", "huginn_keys"),
    ("huginn_config", "huginn_mixture"),
    ("huginn_mixture", "huginn_keys"),
    ("job", "reliability"),
    ("run_state", "parts"),
}


# Copied beside exported weights and run by the transformers library, which wants relative imports;
# nothing imports it.
REMOTE_CODE = PACKAGE / "models" / "raven" / "huggingface"


@functools.cache
def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent != REMOTE_CODE
    }


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """The package's own modules that a file imports anywhere, lazily too."""
    found = set()
    known = modules()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = names & set(known)
            found |= submodules or {node.module}
    return frozenset(name for name in found if name.split(".")[0] == PACKAGE.name)


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_every_room_has_a_place():
    assert {room(module) for module in modules()} == set(PLACES)


def test_nothing_imports_what_stands_further_right():
    pairs = [(module, imported) for module, path in modules().items() for imported in imports(path)]
    for module, imported in pairs:
        own, other = room(module), room(imported)
        if other in ("", own) or (own, other) in ALLOWED_NEIGHBOURS:
            continue
        if own == "__main__":  # the console entry imports commands by name only
            assert PLACES[other] == 0
        base = PLACES[other] < PLACES[own] or PLACES[own] == PLACES[other] == 0
        assert base, f"{module} imports {imported}"


@pytest.mark.parametrize(
    "script", sorted((PACKAGE.parent / "convert").glob("*.py")), ids=lambda path: path.name
)
def test_the_converters_scripts_hold_no_logic(script):
    assert imports(script) and all(room(imported) == "conversion" for imported in imports(script))
    assert script.read_text().count("\n") < 40


def test_the_code_that_leaves_with_the_weights_stands_alone():
    for path in REMOTE_CODE.glob("*.py"):
        assert "torchtitan_rd" not in path.read_text()


def test_there_is_no_circle():
    graph = {module: imports(path) for module, path in modules().items()}
    done, path = set(), []

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done or module not in graph:
            return
        path.append(module)
        for imported in sorted(graph[module] - {module}):
            visit(imported)
        path.pop()
        done.add(module)

    for module in graph:
        visit(module)


@pytest.mark.parametrize(
    ("name", "own"), [("model_spec", {f"{PACKAGE.name}.model_steps"}), ("model_steps", set())]
)
def test_the_contract_of_the_models_imports_torch_alone(name, own):
    path = PACKAGE / f"{name}.py"
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        )
    }
    assert imported - sys.stdlib_module_names - {PACKAGE.name} == {"torch"}
    assert imports(path) == own


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_module_uses_a_private_name_of_another():
    for module, path in modules().items():
        own: set[str] = set()  # names of this package's modules and classes, as they are called here
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(PACKAGE.name):
                names = [alias.name for alias in node.names]
                assert not [name for name in names if private(name)], f"{module} imports {names}"
                own |= {alias.asname or alias.name for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in own:
                assert not private(node.attr), f"{module}: {node.value.id}.{node.attr}"


# Where weights of a family come from or become another's, and whose section the config is made of.
OF_FAMILIES = {
    "conversion.meta": {"llama"},
    "conversion.huginn": {"raven"},
    "conversion.retrofit": {"llama", "raven"},
    "config": {"raven"},
    "huginn_keys": {"raven"},
    "huginn_config": {"raven"},
}


def test_only_the_rooms_of_a_family_know_it():
    families = {
        path.name for path in (PACKAGE / "models").iterdir() if path.is_dir() and path.name != "__pycache__"
    }
    assert families == {"llama", "raven"}
    for module, path in modules().items():
        name = module.removeprefix(f"{PACKAGE.name}.")
        if name == "models":
            continue
        for imported in imports(path):
            parts = imported.split(".")[1:]
            if parts[:1] == ["models"] and parts[1:2] and parts[1] in families:
                assert name.startswith(f"models.{parts[1]}") or parts[1] in OF_FAMILIES.get(name, ()), (
                    f"{name}: {imported}"
                )


def test_parallelism_names_no_model_and_models_no_parallelism():
    for module, path in modules().items():
        text = path.read_text().lower()
        if room(module) == "parallelism":
            assert "import" in text and "llama(" not in text and "torchtitan_rd.models" not in text, module
        if room(module) == "models":
            assert "torch.distributed" not in text, module
