"""The types of what sidecars and plans hold: an edited or damaged one is refused where it is read, not where it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_KINDS = {
    "format_version": int,
    "settings": dict,
    "inputs": list,
    "outputs": list,
    "counts": dict,
    "data": dict,
    "pictures": dict,
    "result": dict,
    "flags": dict,
}
_DESCRIBED: dict[str, dict[str, type]] = {
    "inputs": {"size": int, "hash": str},
    "outputs": {"path": str, "size": int, "time": int, "hash": str},
}
# What opens a data set again: see `Dataset.describe`.
_OF_DATA = ("spec", "keys", "image", "caption", "key")
_NUMBER = int | float
# What a finished step says again when it is run once more, by name: see `_fits`.
_RESULT: dict[str, Any] = {
    **dict.fromkeys(("images", "searched", "clusters", "classes", "train_images", "validation_images"), _NUMBER),
    **dict.fromkeys(("kept", "keep_ratio", "components", "largest_component", "uncovered_ratio"), _NUMBER),
    **dict.fromkeys(("objective", "iterations", "c", "validation_score"), _NUMBER),
    **dict.fromkeys(("steps", "samples", "samples_per_second"), _NUMBER),
    **{name: {...: _NUMBER} for name in ("seconds", "losses", "metrics", "dropped_by")},
    "threshold": _NUMBER | None,
    "other_linkage": {None: None, "kept": _NUMBER, "uncovered_ratio": _NUMBER},
    "audit": {None: None, ...: _NUMBER},
    "caption_window": {None: None, **dict.fromkeys(("inside", "below", "above", "without"), _NUMBER)},
    "cluster_cap": {None: None, ...: _NUMBER},
    "against": {
        None: None,
        "dropped": _NUMBER,
        "threshold": _NUMBER,
        "references": [{"name": str, "nearest": _NUMBER}],
    },
    "sweep": {"c": [_NUMBER, ...], "score": [_NUMBER, ...]},
    "shots": [
        {
            "shots": _NUMBER,
            "images": _NUMBER,
            "c": [_NUMBER, ...],
            "metrics": {...: dict.fromkeys(("mean", "std"), _NUMBER | None)},
        }
    ],
}


_EXAMPLE = {
    **dict.fromkeys(("key", "label", "predicted", "path"), str),
    **dict.fromkeys(("offset", "size"), int | None),
}
# What is beside the result, by name.
_OTHERS: dict[str, Any] = {
    "written": [str],
    "examples": [_EXAMPLE],
    "per_class": [{"class": str, "images": _NUMBER, "value": _NUMBER | None}],  # null for a class without images
}


def check_entries(sidecar: dict[str, Any]) -> None:
    """Check the types of the entries of a sidecar or plan that steps read.

    Raises:
        TypeError: naming the first of another type.
    """
    for name, kind in _KINDS.items():
        if name in sidecar and not isinstance(sidecar[name], kind):
            raise TypeError(f"its entry {name!r} is {str(sidecar[name])[:40]!r}")
    for name, fields in _DESCRIBED.items():
        for entry in sidecar.get(name, []):
            if not isinstance(entry, dict) or any(not isinstance(entry.get(key), kind) for key, kind in fields.items()):
                raise TypeError(f"its entry {name!r} holds {str(entry)[:80]!r}")
    inner = {
        "counts.skipped": _are_counts(sidecar.get("counts", {}).get("skipped", {})),
        "data": all(isinstance(sidecar["data"].get(name), str) for name in _OF_DATA) if "data" in sidecar else True,
        "model": _is_model(sidecar["model"], sidecar.get("step")) if "model" in sidecar else True,
        "intervals": all(map(_is_interval, _values(sidecar.get("intervals", {})))),
        "parity": all(isinstance(found, dict) for found in _values(sidecar.get("parity", {}))),
        "seconds": all(isinstance(time, int | float) for time in _values(sidecar.get("seconds", {}))),
        "counts": all(isinstance(count, int | float | dict | None) for count in _values(sidecar.get("counts", {}))),
        "calibration": isinstance(sidecar.get("calibration"), dict | None),
        "images_per_second": isinstance(sidecar.get("images_per_second"), int | float | None),
        "texts_per_second": isinstance(sidecar.get("texts_per_second"), int | float | None),
        "pictures": _are_places(sidecar.get("pictures", {}).get("unread", [])),
        "prompts": sidecar.get("prompts") is None or _are_lines(sidecar["prompts"]),
    }
    made, keep_list = sidecar.get("settings", {}), sidecar.get("keep_list")
    inner |= {
        "settings.losses": _fits(made.get("losses", {}), {...: {"value": _NUMBER}}),
        "settings.against": _are_all(made.get("against"), _is_reference),
        "settings.view_kind": _are_all(made.get("view_kind"), lambda kind: isinstance(kind, str)),
        "keep_list": keep_list is None or _is_keep_list(keep_list),
    }
    result = sidecar.get("result", {})
    inner |= {f"result.{name}": _fits(result[name], shape) for name, shape in _RESULT.items() if name in result}
    for name in {"images", "searched"} & result.keys():  # shares of them are shown
        inner[f"result.{name}"] &= result[name] != 0
    counts = sidecar.get("counts", {})
    inner |= {f"counts.{name}": isinstance(counts[name], _NUMBER) for name in {"used", "read"} & counts.keys()}
    inner |= {name: _fits(sidecar[name], shape) for name, shape in _OTHERS.items() if name in sidecar}
    inner["result.skipped"] = _are_counts(result.get("skipped", {}))
    for name, fits in inner.items():
        if not fits:
            outer, _, name_there = name.partition(".")
            found = sidecar[outer][name_there] if name_there else sidecar[outer]
            raise TypeError(f"its entry {name!r} is {str(found)[:80]!r}")


def _is_keep_list(value: Any) -> bool:
    """Tell whether it is where a keep list is, and how many of how many images it keeps."""
    fits = _fits(value, {"path": str, "kept": int, "images": int})
    return fits and "path" in value and value.get("images") != 0  # shares of them are shown


def _are_all(values: Any, fits: Callable[[Any], bool]) -> bool:
    """Tell whether it is nothing or a list of such values."""
    return values is None or (isinstance(values, list) and all(map(fits, values)))


def _is_reference(value: Any) -> bool:
    """Tell whether it is the name of a reference and the hash of its rows."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], str)


def _fits(value: Any, shape: Any) -> bool:
    """Tell whether a value has a shape.

    Args:
        shape: A type; the shape of each item in a list, followed by ``...`` where there must be one; or those of the
            entries of an object by name, with that of all others under ``...`` and a None where the object may be null.
            A missing entry is told where it is read.
    """
    if isinstance(shape, list):
        return isinstance(value, list) and len(value) >= len(shape) - 1 and all(_fits(item, shape[0]) for item in value)
    if not isinstance(shape, dict):
        return isinstance(value, shape)
    if not isinstance(value, dict):
        return value is None and None in shape
    return all(_fits(entry, shape.get(name, shape.get(..., object))) for name, entry in value.items())


def _are_counts(skipped: Any) -> bool:
    """Tell whether they are numbers by reason, or by part of the data and reason."""
    if not isinstance(skipped, dict):
        return False
    return all(_are_counts(count) if isinstance(count, dict) else isinstance(count, int) for count in skipped.values())


def _are_lines(prompts: Any) -> bool:
    """Tell whether they are descriptions of class names and templates."""
    fields = {"source": str, "number": int, "hash": str}
    return isinstance(prompts, dict) and all(
        isinstance(prompts.get(name), dict)
        and all(isinstance(prompts[name].get(key), kind) for key, kind in fields.items())
        for name in ("class_names", "templates")
    )


def _values(found: Any) -> list[Any]:
    """Return the values of an object; of anything else, one that is none of the right type."""
    return list(found.values()) if isinstance(found, dict) else [None]


def _is_interval(bounds: Any) -> bool:
    """Tell whether it is a lower and an upper bound."""
    return isinstance(bounds, list) and len(bounds) == 2 and all(isinstance(bound, int | float) for bound in bounds)


def _is_model(model: Any, step: Any) -> bool:
    """Tell whether it describes a model; clusters of another tool's embeddings have none."""
    if not isinstance(model, dict):
        return model is None and step == "cluster"
    config = model.get("config", {})
    towers = [config.get(name, {}) for name in ("text_cfg", "vision_cfg")] if isinstance(config, dict) else [config]
    objects = all(isinstance(found, dict) for found in (*towers, model.get("preprocess", {})))
    return objects and all(isinstance(model.get(name, ""), str) for name in ("spec", "weights_hash"))


def _are_places(unread: Any) -> bool:
    """Tell whether they are pairs of shard and key."""
    return isinstance(unread, list) and all(
        isinstance(place, list) and [type(name) for name in place] == [str, str] for place in unread
    )
