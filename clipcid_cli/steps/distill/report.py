"""The report of a training run: curves, student next to teacher, examples of retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clipcid_cli.algorithms.metrics.retrieval import retrieval_metrics
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.report import PALETTE, make_figure, render_report, svg, thumbnail
from clipcid_cli.formats.results.run_folder import RunFolder, read_lines
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.decode import SkippedImage, read_image
from clipcid_cli.steps.distill.evaluation import EMA, HeldOut, embed_held_out
from clipcid_cli.steps.distill.inputs import TrainingInputs
from clipcid_cli.steps.distill.loop import Loop
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.fields import output_settings

if TYPE_CHECKING:
    from markupsafe import Markup

_NUM_EXAMPLES = 8
_NUM_FOUND = 6
_POINTS = 1_000
# What is drawn of a data set of --eval-data, and what it is called.
_NAMED = {"acc1": "acc1", "image_retrieval_recall@1": "image R@1"}


def write_report(
    folder: RunFolder, settings: DistillSettings, student: ClipModel, inputs: TrainingInputs, loop: Loop
) -> str:
    """Render the report of a finished run.

    Returns:
        The HTML page.
    """
    log, results = read_lines(folder.train_log), read_lines(folder.results_log)
    examples: list[dict[str, Any]] = []
    compared: list[dict[str, Any]] = []
    if loop.evaluation.held_out is not None:
        images, texts = embed_held_out(student, loop.evaluation.held_out)
        examples = _find_examples(loop.evaluation.held_out, images, texts)
        students = {"student": (images, texts)}
        if loop.trainer.average is not None:
            with loop.trainer.average.in_place():
                students["average (EMA)"] = embed_held_out(student, loop.evaluation.held_out)
        compared = _compare(loop.evaluation.held_out, students, inputs)
    return render_report(
        "distill.html",
        name=folder.path.name,
        student=student.info,
        losses=" + ".join(f"{weight:g} · {name}" for name, weight in loop.objective.weights.items()),
        steps=loop.schedule.steps,
        batch_size=loop.order.batch_size,
        training=inputs.training.total,
        held_out=inputs.held_out.total,
        headline=[
            (f"{side} recall at 1, held out", loop.metrics[name])
            for side in ("image", "text")
            if loop.evaluation.held_out is not None and (name := f"{side}_retrieval_recall@1") in loop.metrics
        ],
        loss_figure=_draw_losses(log, list(loop.objective.weights)),
        recall_figure=_draw_recalls(results) if loop.evaluation.held_out is not None and len(results) > 1 else None,
        named_figure=_draw_named(results) if len(results) > 1 else None,
        rate_figure=_draw_rate(log),
        scale_figure=_draw_scales(log),
        compared=compared,
        compared_on=0 if loop.evaluation.held_out is None else len(loop.evaluation.held_out.samples),
        examples=examples,
        inputs=_list_inputs(inputs),
        settings=output_settings(settings),
    )


def _compare(
    held_out: HeldOut, students: dict[str, tuple[Tensor, Tensor]], inputs: TrainingInputs
) -> list[dict[str, Any]]:
    """Measure students and teacher on the held-out samples with a stored embedding; of a student alone, nothing.

    Args:
        students: Image and text rows by name.
    """
    stored, known, rows = inputs.teacher_inputs, np.arange(len(held_out.samples)), dict(students)
    if stored is not None and stored.embeddings is not None and stored.embeddings.has_texts:
        places = inputs.held_out.embeddings()[held_out.rows].astype(np.int64)
        known = np.flatnonzero(places >= 0)
        of_teacher = [
            side.take(places[known])
            for side in (stored.embeddings.rows(Kind.IMAGES), stored.embeddings.rows(Kind.TEXTS))
        ]
        rows = {name: (images[known], texts[known]) for name, (images, texts) in students.items()}
        rows["teacher"] = (torch.from_numpy(of_teacher[0]).float(), torch.from_numpy(of_teacher[1]).float())
    if len(known) < 2 or len(rows) < 2:
        return []
    own = torch.arange(len(known))
    return [{"name": name, "metrics": retrieval_metrics(*sides, own)} for name, sides in rows.items()]


def _find_examples(held_out: HeldOut, images: Tensor, texts: Tensor) -> list[dict[str, Any]]:
    count = min(_NUM_FOUND, len(images))
    similarities, found = (texts[:_NUM_EXAMPLES] @ images.T).topk(count, dim=1)
    return [
        {
            "caption": held_out.samples[query].captions[0],
            "images": [
                {
                    "key": held_out.samples[place].key,
                    "source": _picture(held_out.samples[place]),
                    "similarity": similarity,
                    "right": place == query,
                }
                for place, similarity in zip(found[query].tolist(), similarities[query].tolist(), strict=True)
            ],
        }
        for query in range(len(found))
    ]


def _picture(sample: Sample) -> str:
    image = read_image(sample.image)
    return "" if isinstance(image, SkippedImage) else thumbnail(image)


def _draw_losses(log: Sequence[dict[str, Any]], names: Sequence[str]) -> Markup:
    figure = make_figure()
    axes = figure.subplots()
    for name, color in zip(names, _colors(len(names)), strict=True):
        steps, values = _series(log, f"loss_{name}")
        if steps:
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(steps, _smooth(np.array(values)), color=color, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    return svg(figure, "Losses over the steps of the run")


def _draw_recalls(results: Sequence[dict[str, Any]]) -> Markup:
    figure = make_figure()
    axes = figure.subplots()
    for side, color in zip(("image", "text"), PALETTE, strict=False):
        for k, style in ((1, "-"), (5, "--")):
            axes.plot(*_series(results, f"{side}_retrieval_recall@{k}"), style, color=color, label=f"{side} R@{k}")
        averaged = _series(results, f"{EMA}{side}_retrieval_recall@1")
        if averaged[0]:
            axes.plot(*averaged, ":", color=color, label=f"{side} R@1, EMA")
    axes.set_xlabel("step")
    axes.set_ylabel("recall")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, ncols=2)
    return svg(figure, "Recall on the held-out part over the steps of the run")


def _draw_named(results: Sequence[dict[str, Any]]) -> Markup | None:
    """Draw the metrics of the data sets of --eval-data: acc1 of classes, R@1 of captions; None where there are none.

    A run that was resumed may have been given other data sets: each is drawn over the lines that have it.
    """
    labels: dict[str, str] = {}
    for name in dict.fromkeys(name for line in results for name in line):
        data, slash, metric = name.removeprefix(EMA).rpartition("/")
        if slash and metric in _NAMED:
            labels[name] = f"{data} {_NAMED[metric]}" + ", EMA" * name.startswith(EMA)
    if not labels:
        return None
    figure = make_figure()
    axes = figure.subplots()
    for (name, label), color in zip(labels.items(), _colors(len(labels)), strict=True):
        axes.plot(*_series(results, name), color=color, label=label)
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return svg(figure, "Measurements on the named data sets over the steps of the run")


def _draw_rate(log: Sequence[dict[str, Any]]) -> Markup:
    figure = make_figure()
    axes = figure.subplots()
    axes.plot(*_series(log, "lr"), color=PALETTE[0])
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    return svg(figure, "Learning rate over the steps of the run")


def _draw_scales(log: Sequence[dict[str, Any]]) -> Markup:
    figure = make_figure()
    axes = figure.subplots()
    scales = [name for name in (log[0] if log else {}) if name.startswith("scale_")]
    for name, color in zip(scales, _colors(len(scales)), strict=True):
        axes.plot(*_series(log, name), color=color, label=name.removeprefix("scale_"))
    axes.set_xlabel("step")
    axes.set_ylabel("logit scale")
    axes.legend(frameon=False)
    return svg(figure, "Logit scales over the steps of the run")


def _colors(count: int) -> list[str]:
    return [PALETTE[number % len(PALETTE)] for number in range(count)]


def _series(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return steps and values of the lines that have an entry, thinned out to be drawn."""
    found = [(line["step"], line[name]) for line in lines if name in line]
    thin = found[:: max(1, len(found) // _POINTS)]
    return [step for step, _ in thin], [value for _, value in thin]


def _smooth(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Running mean over about a fiftieth of the run, over fewer values at its ends."""
    width = max(1, len(values) // 50)
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _list_inputs(inputs: TrainingInputs) -> list[tuple[str, str]]:
    keep_list = "none: all samples" if inputs.keep_list is None else str(inputs.keep_list.path)
    found = [("data", inputs.dataset.spec), ("keep list", keep_list)]
    if inputs.teacher_inputs is not None:
        if inputs.teacher_inputs.online is not None:
            found.append(("teacher", f"{inputs.teacher_inputs.online.spec}, run alongside the student"))
        if inputs.teacher_inputs.embeddings is not None:
            found.append(("embeddings", str(inputs.teacher_inputs.embeddings.folder)))
        if inputs.teacher_inputs.clusters is not None:
            found.append(("clusters", str(inputs.teacher_inputs.clusters.folder)))
    return found
