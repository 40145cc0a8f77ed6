"""The table and the report of `eval-zeroshot`: all pairs of one call, from their metrics files and sidecars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from clipcid_cli.formats.atomic import write_text
from clipcid_cli.formats.data.samples import ByteRange
from clipcid_cli.formats.report import render_report, thumbnail
from clipcid_cli.formats.results.metrics import SUMMARY_REPORT, SUMMARY_TABLE, read_metrics_sidecar, write_results
from clipcid_cli.formats.sidecar import Calibrations, Example, ZeroshotSidecar
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.decode import SkippedImage, read_image
from clipcid_cli.steps import reporting
from clipcid_cli.steps.evaluate.result import ZeroshotResult

_WORST_SHOWN = 8


def write_summary(work: WorkDirectory, results: list[ZeroshotResult]) -> dict[str, str]:
    """Write the table (csv) and the report of one call, which replace those of the call before; return their paths."""
    table, report = (work.eval_summary / name for name in (SUMMARY_TABLE, SUMMARY_REPORT))
    table.parent.mkdir(parents=True, exist_ok=True)
    write_results(table, [_row(result) for result in results])
    details = [_detail(result) for result in results]
    page = render_report("eval_zeroshot.html", tables=_tables(results), details=details)
    missing = sum(detail["missing_examples"] for detail in details)
    if missing:
        reporting.note(f"{report}: {missing} example images are left out, since they can no longer be read.")
    write_text(report, page, shared=True)  # two evaluations may end at once
    return {"table": str(table), "report": str(report)}


def _row(result: ZeroshotResult) -> dict[str, Any]:
    """One row of the csv: every metric with the ends of its interval."""
    columns = ("model", "pretrained", "dataset", "task", "images", "images_per_second", "customary")
    row = {name: getattr(result, name) for name in columns}
    row |= {f"{kind}_hash": lines.hash for kind, lines in (result.prompts or {}).items()}
    for name, value in result.metrics.items():
        low, high = result.intervals.get(name, (None, None))
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return row


def _tables(results: list[ZeroshotResult]) -> list[dict[str, Any]]:
    """One table for each set of metrics: data sets and models down, metrics across."""
    groups: dict[tuple[str, ...], list[ZeroshotResult]] = {}
    for result in results:
        groups.setdefault(tuple(result.metrics), []).append(result)
    return [{"columns": [(name, _title(name)) for name in names], "rows": group} for names, group in groups.items()]


def _detail(result: ZeroshotResult) -> dict[str, Any]:
    """What the report shows of one pair below the table of metrics."""
    sidecar = read_metrics_sidecar(Path(result.files["metrics"]), ZeroshotSidecar)
    assert sidecar is not None, "a result has its sidecar"
    settings = sidecar.settings
    ordered = sorted(
        (score for score in sidecar.per_class if score.images and score.value is not None),
        key=lambda score: score.value or 0.0,
    )
    examples = [
        msgspec.structs.asdict(example) | {"source": source}
        for example in sidecar.examples
        if (source := _thumbnail(example)) is not None
    ]
    wrong: dict[str, list[dict[str, Any]]] = {}
    for example in examples:
        if example["label"] != example["predicted"]:
            wrong.setdefault(example["label"], []).append(example)
    return {
        "model": result.shown_model,
        "dataset": result.dataset,
        "prompts": {kind.replace("_", " "): str(lines) for kind, lines in (result.prompts or {}).items()},
        "measure": "average precision" if settings["multi_label"] else "recall",
        "worst": ordered[:_WORST_SHOWN],
        "classes": sidecar.per_class if len(ordered) > _WORST_SHOWN else [],
        "right": [example for example in examples if example["label"] == example["predicted"]],
        "wrong": wrong,
        "missing_examples": len(sidecar.examples) - len(examples),
        "settings": {
            "templates": ", ".join(settings["templates"][:3]) + (" …" if len(settings["templates"]) > 3 else ""),
            "precision": settings["precision"],
            "batch size": settings["batch_size"],
            **_describe_calibration(sidecar.calibration),
            "skipped": ", ".join(f"{count} {reason}" for reason, count in result.skipped.items()) or "nothing",
            "metrics file": result.files["metrics"],
        },
    }


def _describe_calibration(found: Calibrations | None) -> dict[str, str]:
    """Say how sure the model is of its answers, and at which temperature it would be as sure as it is right."""
    if found is None:
        return {}
    text = {"calibration error": str(found.all)}
    if found.after is not None and found.before is not None:
        others = f"the half that was not fitted on, {found.after.images:,} images"
        text["at the fitted temperature"] = f"{found.after}, before {found.before}: {others}"
    return text


def _thumbnail(example: Example) -> str | None:
    """Return an example's image as a small ``data:`` URL; None when it can no longer be read."""
    image = read_image(ByteRange(example.path, example.offset, example.size, column=example.column))
    return None if isinstance(image, SkippedImage) else thumbnail(image)


def _title(name: str) -> str:
    """Write a metric's name as the heading of a column."""
    short = name.replace("mean_per_class_recall", "mean per class").replace("_retrieval_recall@", " R@")
    return short.replace("mean_average_precision", "mAP").replace("_11_point", ", 11 points")
