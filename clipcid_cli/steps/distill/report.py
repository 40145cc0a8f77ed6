"""The report of a training run: curves, student next to teacher, examples of retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

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
from clipcid_cli.steps.distill.inputs import Inputs
from clipcid_cli.steps.distill.loop import Loop
from clipcid_cli.steps.distill.stored_teacher import OnlineTeacher
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.fields import output_settings

if TYPE_CHECKING:
    from markupsafe import Markup

_NUM_EXAMPLES = 8
_NUM_FOUND = 6
_POINTS = 1_000
# What is drawn of a data set of --eval-data, and what it is called.
_NAMED = {"acc1": "acc1", "image_retrieval_recall@1": "image R@1"}


def write_report(folder: RunFolder, settings: DistillSettings, student: ClipModel, inputs: Inputs, loop: Loop) -> str:
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
        batch_size=loop.batches.batch_size,
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
        rate_figure=_draw("Learning rate", log, [Curve("lr", "")], ylabel="learning rate"),
        scale_figure=_draw_scales(log),
        compared=compared,
        compared_on=0 if loop.evaluation.held_out is None else len(loop.evaluation.held_out.samples),
        examples=examples,
        inputs=_list_inputs(inputs),
        settings=output_settings(settings),
    )


def _compare(held_out: HeldOut, students: dict[str, tuple[Tensor, Tensor]], inputs: Inputs) -> list[dict[str, Any]]:
    """Measure students and teacher on the held-out samples with a stored embedding; of a student alone, nothing.

    Args:
        students: Image and text rows by name.
    """
    embeddings, known, rows = inputs.embeddings, np.arange(len(held_out.samples)), dict(students)
    if embeddings is not None and embeddings.has_texts:
        places = inputs.held_out.column("embeddings")[held_out.rows].astype(np.int64)
        known = np.flatnonzero(places >= 0)
        of_teacher = [side.take(places[known]) for side in (embeddings.rows(Kind.IMAGES), embeddings.rows(Kind.TEXTS))]
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


class Curve(NamedTuple):
    """What is drawn of a log: the values of one entry of its lines, over the steps."""

    entry: str
    label: str
    color: str = PALETTE[0]
    style: str = "-"


def _draw(
    title: str, log: Sequence[dict[str, Any]], curves: Sequence[Curve], *, smooth: bool = False, **axes_settings: Any
) -> Markup:
    """Draw curves over the steps of the run, each over the lines that have it; smoothed ones with the values faint."""
    figure = make_figure()
    axes = figure.subplots()
    for curve in curves:
        lines = [line for line in log if curve.entry in line]
        if not lines:
            continue
        lines = lines[:: max(1, len(lines) // _POINTS)]
        steps = [line["step"] for line in lines]
        values = np.array([line[curve.entry] for line in lines])
        if smooth:
            axes.plot(steps, values, color=curve.color, alpha=0.25, linewidth=0.8)
            values = _smooth(values)
        axes.plot(steps, values, curve.style, color=curve.color, label=curve.label)
    axes.set(xlabel="step", **axes_settings)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return svg(figure, f"{title} over the steps of the run")


def _color(entries: Sequence[str], labels: Sequence[str]) -> list[Curve]:
    """Give curves the colours of the palette in turn."""
    return [Curve(*curve) for curve in zip(entries, labels, cycle(PALETTE), strict=False)]


def _draw_losses(log: Sequence[dict[str, Any]], names: Sequence[str]) -> Markup:
    return _draw("Losses", log, _color([f"loss_{name}" for name in names], names), smooth=True, ylabel="loss")


def _draw_recalls(results: Sequence[dict[str, Any]]) -> Markup:
    curves = [
        Curve(f"{prefix}{side}_retrieval_recall@{k}", f"{side} R@{k}{', EMA' * bool(prefix)}", color, style)
        for side, color in zip(("image", "text"), PALETTE, strict=False)
        for prefix, k, style in (("", 1, "-"), ("", 5, "--"), (EMA, 1, ":"))
    ]
    return _draw("Recall on the held-out part", results, curves, ylabel="recall", ylim=(0, 1))


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
    curves = _color(list(labels), list(labels.values()))
    return _draw("Measurements on the named data sets", results, curves, ylim=(0, None))


def _draw_scales(log: Sequence[dict[str, Any]]) -> Markup:
    entries = [name for name in (log[0] if log else {}) if name.startswith("scale_")]
    curves = _color(entries, [name.removeprefix("scale_") for name in entries])
    return _draw("Logit scales", log, curves, ylabel="logit scale")


def _smooth(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Running mean over about a fiftieth of the run, over fewer values at its ends."""
    width = max(1, len(values) // 50)
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _list_inputs(inputs: Inputs) -> list[tuple[str, str]]:
    keep_list = "none: all samples" if inputs.keep_list is None else str(inputs.keep_list.path)
    found = [("data", inputs.dataset.spec), ("keep list", keep_list)]
    if isinstance(inputs.teacher, OnlineTeacher):
        found.append(("teacher", f"{inputs.teacher.name.spec}, run alongside the student"))
    if inputs.embeddings is not None:
        found.append(("embeddings", str(inputs.embeddings.folder)))
    if inputs.clusters is not None:
        found.append(("clusters", str(inputs.clusters.files.folder)))
    return found
