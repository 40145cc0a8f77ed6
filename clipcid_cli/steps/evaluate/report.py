"""The table and the report of an `eval-zeroshot`: all pairs of one call, from their metrics files and sidecars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipcid_cli.formats.atomic import write_text
from clipcid_cli.formats.data.samples import Location
from clipcid_cli.formats.output import read_sidecar, sidecar_path
from clipcid_cli.formats.report import render_report, thumbnail
from clipcid_cli.formats.results.metrics import SIDECARS, write_results
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.decode import SkippedImage, read_image
from clipcid_cli.steps.reporting import Reporter

_WORST_SHOWN = 8


def write_summary(work: WorkDirectory, results: list[dict[str, Any]], reporter: Reporter) -> dict[str, str]:
    """Write the table (csv) and the report of one call; those of the call before are replaced.

    Args:
        results: The objects that `eval-zeroshot` answers with, one a pair.
        reporter: Told when example images have gone.

    Returns:
        ``table`` and ``report``: their paths.
    """
    table, report = work.eval_summary / "results.csv", work.eval_summary / "report.html"
    table.parent.mkdir(parents=True, exist_ok=True)
    write_results(table, [_row(result) for result in results])
    gone = _Gone()
    page = render_report(
        "eval_zeroshot.html",
        tables=_tables(results),
        details=[_detail(result, gone) for result in results],
    )
    if gone.count:
        reporter.note(f"{report}: {gone.count} example images are left out, since they are no longer where they were.")
    write_text(report, page)
    return {"table": str(table), "report": str(report)}


def _row(result: dict[str, Any]) -> dict[str, Any]:
    """One line of the csv: every metric with the ends of its interval."""
    row = {name: result[name] for name in ("model", "pretrained", "dataset", "task", "images")}
    row |= {"images_per_second": result["images_per_second"], "customary": result["customary"]}
    for name, value in result["metrics"].items():
        low, high = result["intervals"].get(name, (None, None))
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return row


def _tables(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One table for each set of metrics: data sets and models down, metrics across."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(tuple(result["metrics"]), []).append(result)
    return [
        {"columns": [_title(name) for name in names], "rows": [_table_row(result) for result in group]}
        for names, group in groups.items()
    ]


def _table_row(result: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": _model_name(result),
        "dataset": result["dataset"],
        "images": result["images"],
        "cells": [
            {
                "value": _percent(value),
                "interval": _interval(result["intervals"].get(name)),
                "customary": name == result["customary"],
            }
            for name, value in result["metrics"].items()
        ],
    }


def _detail(result: dict[str, Any], gone: _Gone) -> dict[str, Any]:
    """What the report says of one pair beside its numbers."""
    metrics = Path(result["files"]["metrics"])
    sidecar = read_sidecar(sidecar_path(metrics.parent / SIDECARS, metrics.stem))
    assert sidecar is not None, "a result has its sidecar"
    present = [row for row in sidecar["per_class"] if row["images"]]
    ordered = sorted(present, key=lambda row: row["value"])
    examples = [example | {"source": gone.picture(example)} for example in sidecar["examples"]]
    examples = [example for example in examples if example["source"]]
    wrong: dict[str, list[dict[str, Any]]] = {}
    for example in examples:
        if example["label"] != example["predicted"]:
            wrong.setdefault(example["label"], []).append(example)
    return {
        "model": _model_name(result),
        "dataset": result["dataset"],
        "measure": "average precision" if sidecar["settings"]["multi_label"] else "recall",
        "worst": [_class_row(row) for row in ordered[:_WORST_SHOWN]],
        "classes": [_class_row(row) for row in sidecar["per_class"]] if len(present) > _WORST_SHOWN else [],
        "right": [example for example in examples if example["label"] == example["predicted"]],
        "wrong": wrong,
        "settings": {
            "templates": ", ".join(sidecar["settings"]["templates"][:3])
            + (" …" if len(sidecar["settings"]["templates"]) > 3 else ""),
            "precision": sidecar["settings"]["precision"],
            "batch size": sidecar["settings"]["batch_size"],
            "skipped": ", ".join(f"{count} {reason}" for reason, count in result["skipped"].items()) or "nothing",
            "metrics file": result["files"]["metrics"],
        },
    }


def _class_row(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"value": _percent(row["value"])}


class _Gone:
    """Reads example images and counts those that cannot be read any more."""

    def __init__(self) -> None:
        self.count = 0

    def picture(self, example: dict[str, Any]) -> str:
        """Return an example's thumbnail, empty when the image has gone."""
        image = read_image(Location(example["path"], example["offset"], example["size"]))
        if isinstance(image, SkippedImage):
            self.count += 1
            return ""
        return thumbnail(image)


def _model_name(result: dict[str, Any]) -> str:
    folder = Path(result["pretrained"]).is_dir()
    return str(result["model"]) if folder else f"{result['model']} {result['pretrained']}"


def _title(name: str) -> str:
    titles = {
        "mean_per_class_recall": "mean per class",
        "mean_average_precision": "mAP",
        "mean_average_precision_11_point": "mAP, 11 points",
    }
    return titles.get(name, name.replace("_retrieval_recall@", " R@"))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _interval(bounds: list[float] | None) -> str:
    return "" if bounds is None else f"{100 * bounds[0]:.1f} … {100 * bounds[1]:.1f}"
