"""How the settings and inputs of an existing output differ from those of a new run."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

_OLDER = "(not recorded by an earlier version)"


def list_differences(existing: dict[str, Any], identity: dict[str, Any]) -> dict[str, str]:
    """Compare the settings and inputs of an existing sidecar or plan with those of a new run.

    Returns:
        For each entry that differs, how: ``{"settings.keep": "0.5 there, 0.6 now"}``; of nested ones, the innermost.
    """
    found = _value_differences("settings", existing.get("settings", {}), identity["settings"])
    there = existing.get("inputs", [])
    old_inputs = [content_of(entry) for entry in there]
    new_inputs = [content_of(entry) for entry in identity["inputs"]]
    if len(old_inputs) != len(new_inputs):
        found["inputs"] = f"{len(old_inputs)} files there, {len(new_inputs)} now"
        shards = {content[:2]: content[2] for content in new_inputs}
        contents = set(new_inputs)
        changed = [entry for entry, content in zip(there, old_inputs, strict=True) if content not in contents]
        renamed = [entry for entry in changed if content_of(entry)[:2] in shards]
        gone = [entry for entry in changed if content_of(entry)[:2] not in shards]
        if renamed:
            new = shards[content_of(renamed[0])[:2]]
            found["inputs"] += (
                f"; {len(renamed)} shards have another name, such as {renamed[0].get('shard', _OLDER)}, now {new}"
            )
        if gone:
            names = ", ".join(Path(str(entry.get("path"))).name for entry in gone[:3])
            found["inputs"] += f"; changed or gone: {names}" + (f" and {len(gone) - 3} more" if len(gone) > 3 else "")
    else:
        for old, new, entry in zip(old_inputs, new_inputs, identity["inputs"], strict=True):
            if old != new:
                found[f"input {entry['path']}"] = (
                    f"shard {old[2] or _OLDER} there, {new[2]} now"
                    if old[:2] == new[:2]
                    else f"{old[0]} bytes ({old[1]}) there, {new[0]} bytes ({new[1]}) now"
                )
    return found


def serious_of(
    differences: dict[str, str],
    existing: dict[str, Any],
    inputs: Sequence[dict[str, Any]],
    replaceable: Collection[str] = (),
    *,
    may_grow: bool,
) -> dict[str, str]:
    """Return the differences from an existing sidecar or plan that are errors.

    Args:
        inputs: Those of the new run.
        replaceable: Names of settings in which an output may differ.
        may_grow: Whether inputs may have been added.
    """
    grown = may_grow and are_among(existing.get("inputs", []), inputs)
    return {
        name: told
        for name, told in differences.items()
        if name.removeprefix("settings.").split(".")[0] not in replaceable
        and (name.startswith("settings.") or not grown)
    }


def describe(differences: dict[str, str]) -> str:
    """Write the first eight, a line each."""
    told = [f"  {name}: {difference}" for name, difference in differences.items()]
    return "\n".join([*told[:8], *([f"  … and {len(told) - 8} more"] if len(told) > 8 else [])])


def content_of(entry: dict[str, Any]) -> tuple[Any, ...]:
    """Return what an input is compared by: size and hash, and the shard's name where the output holds it.

    Not its path: a folder that was moved, or is reached by another path, is still the same input.
    """
    return entry.get("size"), entry.get("hash"), entry.get("shard")


def are_among(earlier: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> bool:
    """Tell whether all inputs are still there, in the same order, whatever lies between them."""
    rest = iter([content_of(entry) for entry in now])
    return all(content_of(entry) in rest for entry in earlier)


def _value_differences(name: str, old: Any, new: Any) -> dict[str, str]:
    if old == new:
        return {}
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {name: f"{_short(old)} there, {_short(new)} now"}
    found: dict[str, str] = {}
    for key in [*new, *(key for key in old if key not in new)]:
        found |= _value_differences(f"{name}.{key}", old.get(key), new.get(key))
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"
