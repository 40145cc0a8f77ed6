"""`eval-zeroshot --compare A B`: is the difference of two results more than the luck of which images there are?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from clipcid_cli.algorithms.metrics.average_precision import average_precision
from clipcid_cli.algorithms.metrics.intervals import (
    Array,
    draw_average_precision,
    draw_cells,
    interval,
    mcnemar,
    mean_recall,
    ratio,
)
from clipcid_cli.algorithms.metrics.retrieval import RECALL_AT
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.known_datasets import ELEVEN_POINT, MEAN_AVERAGE_PRECISION
from clipcid_cli.formats.results import predictions as predictions_file
from clipcid_cli.formats.results.metrics import read_metrics
from clipcid_cli.formats.results.predictions import Predictions, predictions_path, read_predictions
from clipcid_cli.steps.evaluate.measure import retrieval_values
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings

_CERTAIN = 0.05


@dataclasses.dataclass(frozen=True)
class _Draws:
    """A metric of both models, measured and drawn anew from the same images for both.

    Attributes:
        first: Value of the first model.
        difference_B: Second minus first, for each draw.
        p_value: McNemar's, where the metric counts images that are right or wrong.
    """

    first: float
    second: float
    difference_B: Array
    p_value: float | None = None


def compare_results(settings: EvalZeroshotSettings, reporter: Reporter) -> dict[str, Any]:
    """Compare two results on the same images.

    Returns:
        ``{"compared": [A, B], "dataset", "images", "differences": {metric: {first, second, difference, interval, p_value,
        real, verdict}}, "files": {}}``; differences are second minus first.

    Raises:
        ClipcidError: when a file or its predictions are missing, or the two are of different data.
    """
    paths = settings.compared
    records = [read_metrics(path) for path in paths]
    first, second = (read_predictions(predictions_path(path)) for path in paths)
    _refuse_other_data(first, second)
    images = len(first.table)
    names = _tell_apart(records, paths)
    differences = {name: _judge(name, draws, names) for name, draws in _draw(first, second, settings).items()}
    for judged in differences.values():
        reporter.note(judged["verdict"])
    return {
        "compared": [str(path) for path in paths],
        "models": [first.model, second.model],
        "dataset": first.dataset,
        "images": images,
        "differences": differences,
        "files": {},
    }


def _refuse_other_data(first: Predictions, second: Predictions) -> None:
    fix = "Compare results of the same data set: run eval-zeroshot --predictions for both models on it."
    if first.kind != second.kind:
        raise ClipcidError(f"One result is of {first.kind}, the other of {second.kind}.", fix)
    if not first.table["key"].equals(second.table["key"]):
        common = len(np.intersect1d(first.table["key"].to_numpy(), second.table["key"].to_numpy()))
        raise ClipcidError(
            f"The results are of different images: {len(first.table):,} of {first.dataset}, {len(second.table):,} of "
            f"{second.dataset}, {common:,} in both.",
            fix,
        )
    truth = {predictions_file.CLASSIFICATION: "label", predictions_file.MULTI_LABEL: "labels"}.get(first.kind)
    if truth is not None and (
        first.num_classes != second.num_classes or not first.table[truth].equals(second.table[truth])
    ):
        raise ClipcidError(
            f"The results are of the same images and other classes ({first.num_classes} and {second.num_classes}, or in "
            "another order).",
            fix,
        )
    if truth is None and not pc.list_value_length(first.table["image_ranks"]).equals(
        pc.list_value_length(second.table["image_ranks"])
    ):
        raise ClipcidError("The results are of the same images with other captions.", fix)


def _draw(first: Predictions, second: Predictions, settings: EvalZeroshotSettings) -> dict[str, _Draws]:
    if first.kind == predictions_file.MULTI_LABEL:
        return _draw_multi_label(first, second, settings)
    if first.kind == predictions_file.RETRIEVAL:
        return _draw_retrieval(first, second, settings)
    labels = first.table["label"].to_numpy()
    right, among = [], []
    for side in (first, second):
        right.append(side.table["predicted"].to_numpy() == labels)
        width = int(pc.max(pc.list_value_length(side.table["top"])).as_py())
        top = side.table["top"].combine_chunks().flatten().to_numpy().reshape(len(labels), width)
        among.append((top == labels[:, None]).any(axis=1))
    cells, draws = draw_cells(
        np.stack([labels, *right, *among], axis=1).astype(np.int64), settings.bootstrap, settings.seed
    )
    one = np.ones((1, len(labels)))
    found = {"acc1": _paired_shares(right, draws, cells[:, 1], cells[:, 2])}
    if first.num_classes >= 5:
        found["acc5"] = _paired_shares(among, draws, cells[:, 3], cells[:, 4])
    order = np.argsort(labels, kind="stable")
    recalls = [float(mean_recall(one, labels[order], side[order])[0]) for side in right]
    drawn = mean_recall(draws, cells[:, 0], cells[:, 2]) - mean_recall(draws, cells[:, 0], cells[:, 1])
    found["mean_per_class_recall"] = _Draws(recalls[0], recalls[1], drawn)
    return found


def _paired_shares(right: list[Array], draws: Array, first_U: Array, second_U: Array) -> _Draws:
    p_value = mcnemar(int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum()))
    shares = [float(side.mean()) for side in right]
    return _Draws(shares[0], shares[1], ratio(draws, second_U - first_U), p_value)


def _draw_retrieval(first: Predictions, second: Predictions, settings: EvalZeroshotSettings) -> dict[str, _Draws]:
    sides = []
    for side in (first, second):
        captions = torch.from_numpy(pc.list_value_length(side.table["image_ranks"]).to_numpy().astype(np.int64))
        image_ranks = torch.from_numpy(side.table["image_ranks"].combine_chunks().flatten().to_numpy().copy())
        sides.append(
            retrieval_values(image_ranks, torch.from_numpy(side.table["text_rank"].to_numpy().copy()), captions)
        )
    width = sides[0].shape[1]
    cells, draws = draw_cells(np.concatenate(sides, axis=1), settings.bootstrap, settings.seed)
    found = {}
    for place, k in enumerate(RECALL_AT):
        for direction, column, below in (("image", 1 + place, 0), ("text", 1 + len(RECALL_AT) + place, None)):
            values = [
                float(side[:, column].sum() / (len(side) if below is None else side[:, below].sum())) for side in sides
            ]
            gained = cells[:, width + column] - cells[:, column]
            # A caption is no unit of its own here (an image's captions stand and fall together), so McNemar has no say.
            p_value = None
            if below is None:
                hits = [side[:, column].astype(bool) for side in sides]
                p_value = mcnemar(int((hits[0] & ~hits[1]).sum()), int((hits[1] & ~hits[0]).sum()))
            drawn = ratio(draws, gained, None if below is None else cells[:, below])
            found[f"{direction}_retrieval_recall@{k}"] = _Draws(values[0], values[1], drawn, p_value)
    return dict(sorted(found.items(), key=lambda item: item[0].split("_")[0]))


def _draw_multi_label(first: Predictions, second: Predictions, settings: EvalZeroshotSettings) -> dict[str, _Draws]:
    positive = np.zeros((len(first.table), first.num_classes), dtype=bool)
    for row, classes in enumerate(first.table["labels"].to_pylist()):
        positive[row, classes] = True
    values, drawn = [], []
    for side in (first, second):
        scores = side.table["class_scores"].combine_chunks().flatten().to_numpy().reshape(positive.shape)
        precision = average_precision(torch.from_numpy(scores.copy()), torch.from_numpy(positive))
        values.append((precision.mean_area, precision.mean_eleven_point))
        drawn.append(draw_average_precision(scores, positive, settings.bootstrap, settings.seed))
    return {
        name: _Draws(values[0][place], values[1][place], drawn[1][place] - drawn[0][place])
        for place, name in enumerate((MEAN_AVERAGE_PRECISION, ELEVEN_POINT))
    }


def _judge(name: str, draws: _Draws, names: list[str]) -> dict[str, Any]:
    """Say in words what a difference is worth: real when its interval leaves out 0 and McNemar, where it applies, agrees."""
    low, high = interval(draws.difference_B)
    difference = draws.second - draws.first
    outside = low > 0 or high < 0
    real = outside and (draws.p_value is None or draws.p_value < _CERTAIN)
    better, worse = (1, 0) if difference > 0 else (0, 1)
    told = f"{100 * difference:+.2f} points, 95 % interval {100 * low:+.2f} … {100 * high:+.2f}"
    if draws.p_value is not None:
        told += f", McNemar p = {draws.p_value:.2g}"
    if real:
        verdict = f"{name}: {names[better]} is better than {names[worse]}, and the difference is real ({told})."
    elif difference == 0 and not outside:
        verdict = f"{name}: no difference ({told})."
    else:
        verdict = f"{name}: {names[better]} scores higher, but so small a difference can be chance ({told})."
    return {
        "first": draws.first,
        "second": draws.second,
        "difference": difference,
        "interval": [low, high],
        "p_value": draws.p_value,
        "real": real,
        "verdict": verdict,
    }


def _tell_apart(records: list[dict[str, Any]], paths: tuple[Path, Path]) -> list[str]:
    """Name both results by their models; by weights, or at last by files, where those are called alike."""
    called = [[str(record[field]) for record in records] for field in ("model", "pretrained")]
    first, second = next((pair for pair in called if pair[0] != pair[1]), [str(path) for path in paths])
    return [f"A ({first})", f"B ({second})"]
