"""The report of a training run: curves, student next to teacher, examples of retrieval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from clipcid_cli.algorithms.metrics.retrieval import retrieval_metrics
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.rows import Kind
from clipcid_cli.formats.report import PALETTE, make_figure, render_report, svg, thumbnail
from clipcid_cli.formats.results.run_folder import read_lines
from clipcid_cli.runtime.models.decode import SkippedImage, read_image
from clipcid_cli.steps.distill.evaluation import EMA, HeldOut
from clipcid_cli.steps.distill.inputs import Inputs
from clipcid_cli.steps.distill.trainer import Trainer
from clipcid_cli.steps.repair import describe_repair
from clipcid_cli.steps.settings.shared import output_settings

if TYPE_CHECKING:
    from markupsafe import Markup

_NUM_EXAMPLES = 8
_NUM_FOUND = 6
_POINTS = 1_000
# What is drawn of a data set of --eval-data, and what it is called.
_NAMED = {"acc1": "acc1", "image_retrieval_recall@1": "image R@1"}
_SIDES = ("image", "text")


def write_report(trainer: Trainer) -> str:
    """Render the report of a finished run, an HTML page."""
    plan = trainer.plan
    held_out = trainer.evaluation.held_out
    log = read_lines(plan.folder.train_log)
    results = read_lines(plan.folder.results_log)
    scales = {name: name.removeprefix("scale_") for name in (log[0] if log else {}) if name.startswith("scale_")}
    measured: dict[str, Any] = {"headline": [], "recall_figure": None, "compared": [], "compared_on": 0, "examples": []}
    if held_out is not None:
        rows = {"student": held_out.encode()}
        if trainer.state.ema is not None:
            with trainer.state.ema.swapped_in():
                rows["average (EMA)"] = held_out.encode()
        recalls = {f"{side} recall at 1, held out": f"{side}_retrieval_recall@1" for side in _SIDES}
        measured = {
            "headline": [(title, trainer.metrics[name]) for title, name in recalls.items() if name in trainer.metrics],
            "recall_figure": draw_recalls(results) if len(results) > 1 else None,
            "compared": _compare(held_out, rows, plan.inputs),
            "compared_on": len(held_out.samples),
            "examples": _find_examples(held_out.samples, *rows["student"]),
        }
    weights = trainer.objective.weights
    return render_report(
        "distill.html",
        name=plan.folder.path.name,
        student=trainer.student.model.info,
        losses=" + ".join(f"{weight:g} · {name}" for name, weight in weights.items()),
        steps=plan.steps,
        batch_size=plan.batch_size,
        training=plan.inputs.training.total,
        held_out=plan.inputs.held_out.total,
        loss_figure=_draw("Losses", log, {f"loss_{name}": name for name in weights}, smooth=True, ylabel="loss"),
        named_figure=_draw_named(results) if len(results) > 1 else None,
        rate_figure=_draw("Learning rate", log, {"lr": ""}, ylabel="learning rate"),
        scale_figure=_draw("Logit scales", log, scales, ylabel="logit scale"),
        inputs=_list_inputs(plan.inputs),
        settings=output_settings(plan.settings),
        **measured,
    )


def _compare(held_out: HeldOut, students: dict[str, tuple[Tensor, Tensor]], inputs: Inputs) -> list[dict[str, Any]]:
    """Measure students (rows of both towers) and teacher on the held-out samples with a stored embedding."""
    stored = inputs.embeddings
    rows = students
    if stored is not None and stored.has_texts:
        places = inputs.held_out.column("embeddings")[held_out.rows].astype(np.int64)
        known = np.flatnonzero(places >= 0)
        rows = {name: (images[known], texts[known]) for name, (images, texts) in students.items()}
        images, texts = (
            torch.from_numpy(stored.rows(kind).take(places[known])).float() for kind in (Kind.IMAGES, Kind.TEXTS)
        )
        rows["teacher"] = images, texts
    own = torch.arange(len(rows["student"][0]))
    if len(own) < 2 or len(rows) < 2:
        return []
    return [{"name": name, "metrics": retrieval_metrics(*sides, own)} for name, sides in rows.items()]


def _find_examples(samples: Sequence[Sample], images: Tensor, texts: Tensor) -> list[dict[str, Any]]:
    similarities, found = (texts[:_NUM_EXAMPLES] @ images.T).topk(min(_NUM_FOUND, len(images)), dim=1)
    return [
        {
            "caption": samples[query].captions[0],
            "images": [
                _picture(samples[place]) | {"similarity": similarity, "right": place == query}
                for place, similarity in zip(found[query].tolist(), similarities[query].tolist(), strict=True)
            ],
        }
        for query in range(len(found))
    ]


def _picture(sample: Sample) -> dict[str, Any]:
    image = read_image(sample.image)
    return {"key": sample.key, "source": "" if isinstance(image, SkippedImage) else thumbnail(image)}


def _draw(
    title: str, log: Sequence[dict[str, Any]], labels: Mapping[str, str], *, smooth: bool = False, **axes_settings: Any
) -> Markup:
    """Draw entries of a log by their labels, each over the lines that have it; smoothed ones with the values faint."""
    figure = make_figure()
    axes = figure.subplots()
    for (entry, label), color in zip(labels.items(), cycle(PALETTE), strict=False):
        lines = [line for line in log if entry in line]
        lines = lines[:: max(1, len(lines) // _POINTS)]
        values = pd.Series([line[entry] for line in lines], [line["step"] for line in lines], dtype=float)
        if smooth:
            axes.plot(values, color=color, alpha=0.25, linewidth=0.8)
            # The mean over about a fiftieth of the run.
            values = values.rolling(max(1, len(values) // 50), min_periods=1, center=True).mean()
        axes.plot(values, ":" if entry.startswith(EMA) else "-", color=color, label=label)
    axes.set(xlabel="step", **axes_settings)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return svg(figure, f"{title} over the steps of the run")


def draw_recalls(results: Sequence[dict[str, Any]]) -> Markup:
    """Draw the recalls on the held-out part, from the evaluations of a run."""
    labels = {
        entry: f"{side} R@{k}{', EMA' * bool(prefix)}"
        for prefix, k in (("", 1), ("", 5), (EMA, 1))
        for side in _SIDES
        if (entry := f"{prefix}{side}_retrieval_recall@{k}") in results[0]
    }
    return _draw("Recall on the held-out part", results, labels, ylabel="recall", ylim=(0, None))


def _draw_named(results: Sequence[dict[str, Any]]) -> Markup | None:
    """Draw the metrics of the data sets of --eval-data: acc1 of classes, R@1 of captions; None where there are none."""
    labels: dict[str, str] = {}  # a run that was resumed may have been given other data sets
    for name in dict.fromkeys(name for line in results for name in line):
        data, slash, metric = name.removeprefix(EMA).rpartition("/")
        if slash and metric in _NAMED:
            labels[name] = f"{data} {_NAMED[metric]}" + ", EMA" * name.startswith(EMA)
    if not labels:
        return None
    return _draw("Measurements on the named data sets", results, labels, ylim=(0, None))


def _list_inputs(inputs: Inputs) -> list[tuple[str, str]]:
    found = [("data", inputs.dataset.spec)]
    found.append(("keep list", "none: all samples" if inputs.keep_list is None else str(inputs.keep_list.path)))
    if inputs.online is not None:
        found.append(("teacher", f"{inputs.online.spec}, run alongside the student"))
    if inputs.embeddings is not None:
        found += [("embeddings", str(member.folder)) for member in inputs.embeddings.members]
    if inputs.repair is not None:
        found.append(("repair", describe_repair(inputs.repair)))
    if inputs.clusters is not None:
        found.append(("clusters", str(inputs.clusters.files.folder)))
    return found
