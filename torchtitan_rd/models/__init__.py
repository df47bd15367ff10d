"""The registry of models: one row a family."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from torchtitan_rd.config_loader import nearest
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.model_spec import ModelSpec, Shape
from torchtitan_rd.models.llama import AIXSIM, LLAMA3
from torchtitan_rd.models.raven import RAVEN

MODELS: dict[str, ModelSpec] = {
    "llama3": LLAMA3,
    "llama": LLAMA3,  # the name in the older configs
    "aixsim": AIXSIM,
    "raven": RAVEN,
}


def get_spec(name: str) -> ModelSpec:
    """The model family `name`. Raises ConfigError with the nearest name."""
    if name not in MODELS:
        raise ConfigError(f"model.name = {name!r} is no model family{nearest(name, MODELS)}")
    return MODELS[name]


def get_flavor(spec: ModelSpec[Shape, Any], flavor: str, overrides: Mapping[str, Any] | None = None) -> Shape:
    """The shape of a flavor, with some of its fields replaced (a table, as TOML gives it, for a nested one).

    Raises ConfigError for an unknown flavor or field, a value of the wrong type,
    and values at odds with each other.
    """
    if flavor not in spec.flavors:
        raise ConfigError(
            f"model.flavor = {flavor!r} is no flavor of {spec.name}{nearest(flavor, spec.flavors)}"
        )
    config = spec.flavors[flavor]
    types = typing.get_type_hints(type(config))
    fields = [field.name for field in dataclasses.fields(config)]
    values = {}
    for name, raw in (overrides or {}).items():
        if name in spec.foreign:
            raise ConfigError(f"model.overrides.{name}: {spec.foreign[name]}")
        if name not in fields:
            raise ConfigError(
                f"model.overrides.{name} is no field of {type(config).__name__}{nearest(name, fields)}"
            )
        try:
            # JSON mode is strict about numbers and yet builds nested dataclasses from tables.
            values[name] = TypeAdapter(types[name]).validate_json(json.dumps(raw, default=str), strict=True)
        except ValidationError as error:
            problems = [" ".join((*map(str, entry["loc"]), entry["msg"])) for entry in error.errors()]
            raise ConfigError(f"model.overrides.{name} = {raw!r}: {'; '.join(problems)}") from None
        except ConfigError as error:
            raise ConfigError(f"model.overrides.{name}: {error}") from None
    try:
        return dataclasses.replace(config, **values)
    except ConfigError as error:
        raise ConfigError(
            f"{spec.name} {flavor} with model.overrides {dict(overrides or {})}: {error}"
        ) from None
