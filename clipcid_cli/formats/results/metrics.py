"""Metrics files: one JSON object for a model on a data set, in CLIP_benchmark's fields, so that its tools read them.

The folder `eval/` holds nothing else but `sidecars/`, where a sidecar for each says how it was made.

Source: LAION-AI/CLIP_benchmark 1.6.2, cli.py (`eval` writes them, `build` makes a table of them).
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from clipcid_cli.formats.atomic import write_json, write_text
from clipcid_cli.formats.fingerprint import refuse_changed
from clipcid_cli.formats.reading import reading
from clipcid_cli.formats.sidecar import AnySidecar, EvaluationSidecar, read_sidecar, sidecar_path

SIDECARS = "sidecars"


class Metrics(msgspec.Struct):
    """CLIP_benchmark's fields.

    Attributes:
        task: ``zeroshot_classification``, ``zeroshot_retrieval`` or ``linear_probe``.
        metrics: Values by name; null for one that has none, such as acc5 of four classes.
    """

    dataset: str
    model: str
    pretrained: Any
    task: str
    language: Any
    metrics: dict[str, Any]


# The table and the report on all pairs of one `eval-zeroshot`.
SUMMARY_TABLE = "results.csv"
SUMMARY_REPORT = "report.html"


def metrics_stem(dataset: str, model: str, task: str) -> str:
    """Return the name of a metrics file without its suffix, e.g. ``food101_ViT-B-32_zeroshot_classification``."""
    return "_".join(re.sub(r"[^\w.-]+", "-", part).strip("-.") or "unnamed" for part in (dataset, model, task))


def write_metrics(path: Path, metrics: Metrics) -> None:
    """Write a metrics file."""
    write_json(path, msgspec.to_builtins(metrics))


def read_metrics_sidecar(path: Path, kind: type[AnySidecar]) -> AnySidecar | None:
    """Read the sidecar that says how a metrics file was made; None when there is none."""
    return read_sidecar(sidecar_path(path.parent / SIDECARS, path.stem), kind)


def refuse_changed_metrics(path: Path, fix: str) -> EvaluationSidecar | None:
    """Refuse a metrics file, or its predictions, that differ from what their sidecar records; return that, if any."""
    sidecar = read_metrics_sidecar(path, EvaluationSidecar)
    if sidecar is not None:
        folder = path.parent / SIDECARS
        refuse_changed(folder, sidecar.outputs, sidecar_path(folder, path.stem), fix)
    return sidecar


def read_metrics(path: Path) -> Metrics:
    """Read a metrics file, ours or CLIP_benchmark's."""
    fields = ", ".join(Metrics.__struct_fields__)
    with reading(path, f"metrics, a JSON object with {fields}", "Run the evaluation again."):
        return msgspec.convert(json.loads(path.read_bytes()), Metrics)


def write_results(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as csv; a value that is None or absent is an empty cell. Several processes may do so at once."""
    text = io.StringIO(newline="")
    # Not by pandas, whose import takes a twentieth of a short evaluation's time.
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue(), shared=True)
