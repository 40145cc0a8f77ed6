"""Metrics files: one JSON object for a model on a data set, in CLIP_benchmark's fields, so that its tools read them.

The folder `eval/` holds nothing else but `sidecars/`, where a sidecar for each says how it was made.

Source: LAION-AI/CLIP_benchmark 1.6.2, cli.py (`eval` writes them, `build` makes a table of them).
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_json, write_text
from clipcid_cli.formats.fingerprint import refuse_changed
from clipcid_cli.formats.reading import describe, read_regular
from clipcid_cli.formats.sidecar import EvaluationSidecar, Kind, read_sidecar, sidecar_path

SIDECARS = "sidecars"
FIELDS = ("dataset", "model", "pretrained", "task", "language", "metrics")
_NAMES = ("dataset", "model", "task")


def make_metrics(
    *,
    dataset: str,
    model: str,
    pretrained: str,
    task: str,
    metrics: Mapping[str, float],
    language: str = "en",
) -> dict[str, Any]:
    """Put metrics into CLIP_benchmark's fields.

    Args:
        dataset: Name of the data set.
        pretrained: Tag of its weights, or the folder they were read from.
        task: ``zeroshot_classification``, ``zeroshot_retrieval`` or ``linear_probe``.
        metrics: Values by name; NaN becomes null, since JSON has none.
        language: Language of class names and captions.
    """
    return {
        "dataset": dataset,
        "model": model,
        "pretrained": pretrained,
        "task": task,
        "language": language,
        "metrics": {name: None if math.isnan(value) else value for name, value in metrics.items()},
    }


def metrics_stem(dataset: str, model: str, task: str) -> str:
    """Return the name of a metrics file without its suffix, e.g. ``food101_ViT-B-32_zeroshot_classification``."""
    return "_".join(re.sub(r"[^\w.-]+", "-", part).strip("-.") or "unnamed" for part in (dataset, model, task))


def write_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    """Write a metrics file.

    Args:
        metrics: What :func:`make_metrics` returned.
    """
    write_json(path, {field: metrics[field] for field in FIELDS})


def read_metrics_sidecar(path: Path, kind: type[Kind]) -> Kind | None:
    """Read the sidecar that says how a metrics file was made; None when there is none."""
    return read_sidecar(sidecar_path(path.parent / SIDECARS, path.stem), kind)


def refuse_changed_metrics(path: Path, fix: str) -> EvaluationSidecar | None:
    """Refuse a metrics file, or its predictions, that differ from what their sidecar records.

    Args:
        fix: What to run to make them again.

    Returns:
        The sidecar; None when there is none.
    """
    sidecar = read_metrics_sidecar(path, EvaluationSidecar)
    if sidecar is not None:
        folder = path.parent / SIDECARS
        refuse_changed(folder, sidecar.outputs, sidecar_path(folder, path.stem), fix)
    return sidecar


def read_metrics(path: Path) -> dict[str, Any]:
    """Read a metrics file, ours or CLIP_benchmark's."""
    try:
        content = json.loads(read_regular(path))
        found = {field: content[field] for field in FIELDS}
        if not isinstance(found["metrics"], dict) or not all(isinstance(found[name], str) for name in _NAMES):
            raise TypeError
        return found
    except OSError as error:
        raise ClipcidError(f"{path} cannot be read: {describe(error)}.", "Run the evaluation again.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ClipcidError(
            f"{path} is not a metrics file: it must be a JSON object with {', '.join(FIELDS)}.",
            "Remove it and run the evaluation again.",
        ) from error


def summary_table(folder: Path) -> Path:
    """Return where the csv of all pairs of one `eval-zeroshot` is."""
    return folder / "results.csv"


def summary_report(folder: Path) -> Path:
    """Return where the report on all pairs of one `eval-zeroshot` is."""
    return folder / "report.html"


def write_results(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as csv; a value that is None or absent is an empty cell. Several processes may do so at once."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue(), shared=True)
