"""The table (csv) and the report of all pairs that one `eval-zeroshot` measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.samples import ByteRange
from clipcid_cli.formats.files import write_text
from clipcid_cli.formats.report import render_report, thumbnail
from clipcid_cli.formats.results.evaluations import Example, ZeroshotSidecar
from clipcid_cli.formats.results.metrics import SUMMARY_REPORT, SUMMARY_TABLE, read_metrics_sidecar, write_results
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.decode import SkippedImage, read_image
from clipcid_cli.shown import is_redacted, metric_title
from clipcid_cli.steps import reporting
from clipcid_cli.steps.evaluate.result import ZeroshotResult

_WORST_SHOWN = 8


def write_summary(
    work: WorkDirectory, results: Sequence[ZeroshotResult], datasets: Sequence[Dataset]
) -> dict[str, str]:
    """Write the table (csv) and the report of a call over those of the call before, and return their paths.

    Args:
        datasets: What each result was measured on.
    """
    table = work.eval_summary / SUMMARY_TABLE
    report = work.eval_summary / SUMMARY_REPORT
    table.parent.mkdir(parents=True, exist_ok=True)
    write_results(table, [_row(result) for result in results])
    details = [_detail(result, dataset) for result, dataset in zip(results, datasets, strict=True)]
    page = render_report("eval_zeroshot.html", tables=_tables(results), details=details)
    missing = sum(detail["missing_examples"] for detail in details)
    if missing:
        reporting.note(f"{report}: {missing} example images are left out, since they can no longer be read.")
    write_text(report, page, shared=True)  # two evaluations may end at once
    return {"table": str(table), "report": str(report)}


def _row(result: ZeroshotResult) -> dict[str, Any]:
    """Return the pair's row of the csv: every metric with the ends of its interval."""
    columns = ("model", "pretrained", "dataset", "task", "images", "images_per_second", "customary")
    row = {name: getattr(result, name) for name in columns}
    row |= {f"{kind}_hash": lines.hash for kind, lines in (result.prompts or {}).items()}
    row["majority"] = result.majority
    for name, value in result.metrics.items():
        low, high = result.intervals.get(name, (None, None))
        row |= {name: value, f"{name}_low": low, f"{name}_high": high, f"{name}_chance": result.chance.get(name)}
    return row


def _tables(results: Sequence[ZeroshotResult]) -> list[dict[str, Any]]:
    """Return a table for each set of metrics: data sets and models down, metrics across."""
    groups: dict[tuple[str, ...], list[ZeroshotResult]] = {}
    for result in results:
        groups.setdefault(tuple(result.metrics), []).append(result)
    return [
        {"columns": [(name, metric_title(name)) for name in names], "rows": group, "chance": _describe_chance(group)}
        for names, group in groups.items()
    ]


def _describe_chance(results: list[ZeroshotResult]) -> list[str]:
    """Write what a guess scores on each data set, and what predicting its largest class does."""
    lines = []
    for result in results:
        guessed = ", ".join(f"{metric_title(name)} {100 * value:.1f}" for name, value in result.chance.items())
        majority = "" if result.majority is None else f"; always the largest class: acc1 {100 * result.majority:.1f}"
        if guessed:
            lines.append(f"Chance on {result.dataset}: {guessed}{majority}.")
    return list(dict.fromkeys(lines))


def _detail(result: ZeroshotResult, dataset: Dataset) -> dict[str, Any]:
    """Return what the report shows of one pair below the table of metrics; images are shown from the data set alone."""
    sidecar = read_metrics_sidecar(Path(result.files["metrics"]), ZeroshotSidecar)
    assert sidecar is not None, "a result has its sidecar"
    settings = sidecar.settings
    own = dataset.choose_own(example.path for example in sidecar.examples)  # the sidecar may be someone else's
    ordered = sorted(
        (score for score in sidecar.per_class if score.images and score.value is not None),
        key=lambda score: score.value or 0.0,
    )
    examples = [
        msgspec.structs.asdict(example) | {"source": source}
        for example in sidecar.examples
        if example.path in own and (source := _thumbnail(example)) is not None
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
            "skipped": ", ".join(f"{count} {reason}" for reason, count in result.skipped.items()) or "nothing",
            "metrics file": result.files["metrics"],
        },
    }


def _thumbnail(example: Example) -> str | None:
    """Return an example's image as a small ``data:`` URL; None when it can no longer be read, or its address is secret."""
    if is_redacted(example.path):
        return None
    image = read_image(ByteRange(example.path, example.offset, example.size, column=example.column))
    return None if isinstance(image, SkippedImage) else thumbnail(image)
