"""The TOML file that `generate --exit-policy` reads and `pareto --policy` writes."""

from pathlib import Path

import tomli

from torchtitan_rd.errors import ConfigError, nearest
from torchtitan_rd.inference.exits import CRITERIA, ExitPolicy

POLICY_KEYS = {
    "criterion": str,
    "threshold": float,
    "min_steps": int,
    "every": int,
    "in_prefill": bool,
    "kv": str,
}


def read_policy(path: Path, kv: str = "full") -> tuple[ExitPolicy, str]:
    """A TOML file with keys of POLICY_KEYS, criterion at least -> policy,
    and the cache's strategy (by default `kv`). Raises ConfigError.
    """
    try:
        table = tomli.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--exit-policy {path} cannot be read: {error}") from None
    for key, value in table.items():
        if key not in POLICY_KEYS:
            raise ConfigError(f"{path}: {key} is no key of an exit policy{nearest(key, POLICY_KEYS)}")
        kind = POLICY_KEYS[key]
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (
            kind is bool
        ):
            raise ConfigError(f"{path}: {key} = {value!r} must be a {kind.__name__}")
    if "criterion" not in table:
        raise ConfigError(f"{path}: names no criterion{nearest('', CRITERIA)}")
    kv = table.pop("kv", kv)
    return ExitPolicy(**table), kv
