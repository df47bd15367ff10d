"""What set-up installs is what was tested: constraints.txt pins every direct dependency within its range."""

import re
from pathlib import Path

import pytest
import tomli
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINNED = ("dev", "wandb", "lm-eval")  # the extras that tests or recipes use
DIRECT = [
    Requirement(line)
    for line in [*PROJECT["dependencies"], *(line for name in PINNED for line in EXTRAS[name])]
]


def pins() -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return [Requirement(line) for line in lines if line]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
@pytest.mark.parametrize("needed", DIRECT, ids=lambda requirement: requirement.name)
def test_every_direct_dependency_has_one_pin_within_its_range(needed, python):
    here = {"python_version": python, "python_full_version": f"{python}.0"}
    found = [p for p in pins() if p.name == needed.name and (p.marker is None or p.marker.evaluate(here))]
    (pin,) = found
    (exact,) = pin.specifier
    assert exact.operator == "==" and not exact.version.endswith("*")
    assert needed.specifier.contains(exact.version)


def test_nothing_is_pinned_that_nothing_needs():
    assert {pin.name for pin in pins()} == {needed.name for needed in DIRECT}


def test_torch_stays_where_the_figures_were_measured():
    assert [str(pin.specifier) for pin in pins() if pin.name == "torch"] == ["==2.13.0"]


def test_set_up_installs_with_the_constraints():
    assert re.search(r"pip install .* -c .*constraints\.txt", (ROOT / "scripts" / "env.sh").read_text())
