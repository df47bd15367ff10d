"""What must agree between a checkpoint and the run that loads it.
Pure functions: each raises one CheckpointError.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torchtitan_rd.checkpoint.manifest import TensorEntry, TensorTable
from torchtitan_rd.errors import CheckpointError, listed

Tables = Mapping[str, Any]


def check_model_shape(
    saved: Tables, wanted: Tables, name: str, defaults: Tables = MappingProxyType({})
) -> None:
    """Every field of the model's shape must be the same; one that the checkpoint is too old to know, None,
    False, or its value in `defaults`, by which older programs computed.
    """
    known = {
        name: value
        for name, value in wanted.items()
        if name in saved or not (value is None or value is False or value == defaults.get(name))
    }
    fields = sorted(f for f in {*saved, *known} if saved.get(f) != known.get(f))
    if fields:
        differences = _lines(f"{f}: {saved.get(f)!r} there, {wanted.get(f)!r} here" for f in fields)
        raise CheckpointError(
            f"{name} is of another model:\n{differences}\n"
            "set these back, or start a new run with another checkpoint.folder "
            "(and checkpoint.initial_load_path)"
        )


def arithmetic_differences(saved: Tables, wanted: Tables, arithmetic: Iterable[str]) -> list[str]:
    """What makes initial weights mean something else in this run than where they come from, one line each.

    arithmetic: the fields of the model's shape that change what the same tensors compute
    (`ModelSpec.arithmetic`).
    """
    return [
        f"{field} is {wanted[field]!r} in this run, {saved[field]!r} where the weights were made"
        for field in arithmetic
        if field in saved and field in wanted and saved[field] != wanted[field]
    ]


def check_heads(saved: Tables, wanted: Tables, name: str) -> None:
    """Initial weights must be cut into heads as this run cuts them: where the width of a head differs,
    tensors of the same shape mean something else. Where it is the same, another number of heads is another
    shape, and so is another width of the model: `plan_initial_load` tells of these.
    """
    there, here = _head_sizes(saved), _head_sizes(wanted)
    alike = there and here and saved["dim"] == wanted["dim"]
    if alike and there["head_dim"] != here["head_dim"]:
        differences = _lines(
            f"{field}: {there[field]} there, {here[field]} here"
            for field in there
            if there[field] != here[field]
        )
        raise CheckpointError(
            f"{name} was made with other attention heads, so that its tensors would be cut elsewhere:\n"
            f"{differences}\nset model.flavor, or these in [model.overrides], to what it was made with"
        )


def _head_sizes(fields: Tables) -> dict[str, int]:
    """As `attention_shape` of the model's shape has them; empty for a shape that is not known."""
    if not {"dim", "n_heads"} <= fields.keys():
        return {}
    heads = fields["n_heads"]
    return {
        "n_heads": heads,
        "n_kv_heads": fields.get("n_kv_heads") or heads,
        "head_dim": fields.get("head_dim") or fields["dim"] // heads,
    }


def check_config(saved: Tables, wanted: Tables, must_match: Collection[str], name: str) -> list[str]:
    """Keys in `must_match` (`section.key`) must be the same;
    the other differences are returned, one line each.

    saved, wanted: {section: {key: value}}; a key without a value is absent.
    """
    differing = {}
    for section in sorted({*saved, *wanted}):
        there, here = saved.get(section, {}), wanted.get(section, {})
        for key in sorted({*there, *here}):
            if there.get(key) != here.get(key):
                differing[f"{section}.{key}"] = (
                    f"{section}.{key}: {there.get(key)!r} there, {here.get(key)!r} here"
                )
    fatal = [line for key, line in differing.items() if key in must_match]
    if fatal:
        raise CheckpointError(
            f"{name} was written with other settings, which must not change within a run:\n{_lines(fatal)}\n"
            "set these back, or start a new run with another checkpoint.folder "
            "(and checkpoint.initial_load_path)"
        )
    return [line for key, line in differing.items() if key not in must_match]


def check_tensors(saved: TensorTable, wanted: TensorTable, name: str) -> None:
    """Both must have the same keys, shapes and types: torch itself ignores surplus keys and
    casts in silence.
    """
    absent, surplus = sorted({*wanted} - {*saved}), sorted({*saved} - {*wanted})
    if absent or surplus:
        parts = [f"has no {listed(absent)}"] if absent else []
        parts += [f"holds {listed(surplus)}, which this run does not load"] if surplus else []
        groups = sorted({key.partition(".")[0] for key in absent + surplus} - {"model"})
        remedy = (
            f"; to start {' and '.join(groups)} afresh, checkpoint.exclude_from_loading = {groups}"
            if groups
            else ""
        )
        raise CheckpointError(f"{name} {' and '.join(parts)}{remedy}")
    if differing := [key for key in sorted(saved) if saved[key] != wanted[key]]:
        lines = _there_and_here(saved, wanted, differing)
        raise CheckpointError(f"{name} holds other tensors than this run:\n{lines}")


def plan_initial_load(
    saved: TensorTable, wanted: TensorTable, excluded: Sequence[str], name: str
) -> list[str]:
    """The keys to take from a checkpoint of initial weights: those in both, less the excluded ones.

    Keys that it lacks keep their initial values. A shape may differ only if the key is excluded.
    """
    taken = [key for key in wanted if key in saved and not is_excluded(key, excluded)]
    if not taken:
        there = listed(sorted(saved))
        raise CheckpointError(f"{name} has none of the wanted tensors {listed(wanted)}; it holds {there}")
    differing = [key for key in taken if saved[key].shape != wanted[key].shape]
    if differing:
        lines = _there_and_here(saved, wanted, differing)
        remedy = sorted({key.removesuffix(".weight").removesuffix(".bias") for key in differing})
        raise CheckpointError(
            f"{name} has other shapes:\n{lines}\nto keep the initial values of these, set "
            f"checkpoint.exclude_from_loading = {remedy}"
        )
    return taken


def is_excluded(key: str, excluded: Iterable[str]) -> bool:
    """Whether `key` is one of `excluded`, or below one: `optimizer` covers `optimizer.output.exp_avg`."""
    return any(key == prefix or key.startswith(prefix + ".") for prefix in excluded)


def prune(state: Mapping[str, Any], excluded: Sequence[str], path: str = "") -> dict[str, Any]:
    """`state` without the excluded keys, at any depth."""
    return {
        key: prune(value, excluded, f"{path}{key}.") if isinstance(value, dict) else value
        for key, value in state.items()
        if not is_excluded(path + key, excluded)
    }


def check_exclusions(excluded: Iterable[str], keys: Iterable[str], name: str) -> None:
    """A name in `exclude_from_loading` that covers nothing is a slip, and would load what it should not."""
    keys = list(keys)
    for prefix in excluded:
        if not any(is_excluded(key, [prefix]) for key in keys):
            groups = sorted({key.partition(".")[0] for key in keys})
            raise CheckpointError(
                f"checkpoint.exclude_from_loading: {prefix!r} names nothing in {name}, "
                f"which holds {', '.join(groups)}"
            )


def flat_keys(state: Mapping[str, Any], path: str = "") -> list[str]:
    """The dotted names of all entries of a nested dict, leaves only."""
    found = []
    for key, value in state.items():
        found += flat_keys(value, f"{path}{key}.") if isinstance(value, dict) and value else [path + key]
    return found


def _there_and_here(saved: TensorTable, wanted: TensorTable, keys: Iterable[str]) -> str:
    def shown(entry: TensorEntry) -> str:
        return f"{entry.dtype} {tuple(entry.shape)}"

    return _lines(f"{key}: {shown(saved[key])} there, {shown(wanted[key])} here" for key in keys)


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)
