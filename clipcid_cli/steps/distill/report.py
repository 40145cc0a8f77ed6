"""The report of a training run: curves, student next to teacher, examples of retrieval."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from clipcid_cli.algorithms.metrics.chance import guess_captions
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.rows import Rows, take_captions
from clipcid_cli.formats.report import PALETTE, make_figure, render_report, svg, thumbnail
from clipcid_cli.formats.results.run_folder import AVERAGED, read_lines
from clipcid_cli.runtime.models.decode import SkippedImage, read_image
from clipcid_cli.shown import metric_title
from clipcid_cli.steps.distill.held_out import HeldOut
from clipcid_cli.steps.distill.inputs import Inputs
from clipcid_cli.steps.distill.trainer import Trainer
from clipcid_cli.steps.encode import Encoded
from clipcid_cli.steps.settings.shared import output_settings

if TYPE_CHECKING:
    from markupsafe import Markup

_NUM_EXAMPLES = 8
_NUM_FOUND = 6
_POINTS = 1_000
# What is drawn of a data set of --eval-data, and what it is called.
_NAMED = {"acc1": "acc1", "image_retrieval_recall@1": "image R@1"}
_SIDES = ("image", "text", "teacher")


def write_report(trainer: Trainer) -> str:
    """Render the report of a finished run, an HTML page."""
    plan = trainer.plan
    held_out = trainer.evaluation.held_out
    chance = trainer.evaluation.chance
    log = read_lines(plan.folder.train_log)
    results = read_lines(plan.folder.results_log)
    scales = {name: name.removeprefix("scale_") for name in (log[0] if log else {}) if name.startswith("scale_")}
    measured: dict[str, Any] = {"compared": [], "compared_on": "", "examples": []}
    if held_out is not None:
        rows = {"student": held_out.encode()}
        if trainer.state.ema is not None:
            with trainer.state.ema.swapped_in():
                rows["average (EMA)"] = held_out.encode()
        compared, compared_on = _compare(held_out, rows, plan.inputs, trainer.context.device)
        measured = {
            "compared": compared,
            "compared_on": compared_on,
            "examples": _find_examples(rows["student"]),
        }
    weights = trainer.objective.weights
    return render_report(
        "distill.html",
        name=plan.folder.path.name,
        student=trainer.student.model.info,
        headline=[
            (f"{side} recall at 1, held out (chance {100 * chance[name]:.2g} %)", trainer.metrics[name])
            for side in _SIDES
            if (name := f"{side}_retrieval_recall@1") in chance.keys() & trainer.metrics.keys()
        ],
        recall_figure=draw_recalls(results) if chance and len(results) > 1 else None,
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
        title=metric_title,
        **measured,
    )


def _compare(
    held_out: HeldOut, students: dict[str, Encoded], inputs: Inputs, device: torch.device
) -> tuple[list[dict[str, Any]], str]:
    """Measure students and teacher on the held-out samples with a stored embedding; say of how many, and by which captions.

    Where only first captions were embedded, all are measured by these.
    """
    stored = inputs.teacher.embeddings
    rows = students
    which = "all captions"
    if stored is not None and stored.has_texts:
        embedded = inputs.held_out.column("embeddings")[held_out.rows].astype(np.int64)
        known = np.flatnonzero(embedded >= 0)
        all_captions = Kind.FURTHER in stored.kinds or all(len(sample.captions) == 1 for sample in held_out.samples)
        all_captions &= not inputs.settings.student_caption_key
        which = which if all_captions else "the first caption of each"
        rows = {name: _take(encoded, known, all_captions) for name, encoded in students.items()}
        samples = rows["student"].samples
        rows["teacher"] = Encoded(samples, _stored_rows(stored, inputs, np.array(held_out.rows)[known], samples))
    count = len(rows["student"].samples)
    if count < 2 or len(rows) < 2:
        return [], ""
    chance = guess_captions(rows["student"].captions.numpy())
    metrics = {name: held_out.measure(encoded, device) for name, encoded in rows.items()} | {"chance": chance}
    return [
        {"name": name, "metrics": values} for name, values in metrics.items()
    ], f"{count:,} held-out samples, by {which}"


def _take(encoded: Encoded, places: npt.NDArray[np.int64], all_captions: bool) -> Encoded:
    """Return some of the samples, with all their captions or only the first of each."""
    samples = [encoded.samples[place] for place in places.tolist()]
    chosen = torch.from_numpy(places)
    if all_captions:
        of_texts = torch.isin(encoded.owners, chosen)
    else:
        samples = [dataclasses.replace(sample, captions=sample.captions[:1]) for sample in samples]
        of_texts = (encoded.captions.cumsum(0) - encoded.captions)[chosen]
    return Encoded(
        samples, {Kind.IMAGES: encoded.rows[Kind.IMAGES][chosen], Kind.TEXTS: encoded.rows[Kind.TEXTS][of_texts]}
    )


def _stored_rows(
    stored: Embeddings, inputs: Inputs, held_out: npt.NDArray[np.int64], samples: Sequence[Sample]
) -> dict[Kind, torch.Tensor]:
    """Read the teacher's rows of held-out samples, by their places among these, and of the captions of `samples`."""
    rows: dict[Kind, Rows] = {
        kind: stored.rows(kind) for kind in (Kind.IMAGES, Kind.TEXTS, Kind.FURTHER) if kind in stored.kinds
    }
    embedded = inputs.held_out.column("embeddings")[held_out].astype(np.int64)
    starts = inputs.held_out.column("captions")[held_out].astype(np.int64) if Kind.FURTHER in rows else embedded
    counts = np.array([len(sample.captions) for sample in samples])
    captions = np.concatenate([np.arange(count) for count in counts])
    texts = take_captions(rows, np.repeat(embedded, counts), captions, np.repeat(starts, counts))
    return {
        Kind.IMAGES: torch.from_numpy(rows[Kind.IMAGES].take(embedded)).float(),
        Kind.TEXTS: torch.from_numpy(texts).float(),
    }


def _find_examples(encoded: Encoded) -> list[dict[str, Any]]:
    samples, images = encoded.samples, encoded.rows[Kind.IMAGES]
    firsts = (encoded.captions.cumsum(0) - encoded.captions)[:_NUM_EXAMPLES]
    similarities, nearest = (encoded.rows[Kind.TEXTS][firsts] @ images.T).topk(min(_NUM_FOUND, len(images)), dim=1)
    return [
        {
            "caption": samples[query].captions[0],
            "images": [
                _picture(samples[place]) | {"similarity": similarity, "right": place == query}
                for place, similarity in zip(nearest[query].tolist(), similarities[query].tolist(), strict=True)
            ],
        }
        for query in range(len(nearest))
    ]


def _picture(sample: Sample) -> dict[str, Any]:
    image = read_image(sample.image)
    return {"key": sample.key, "source": "" if isinstance(image, SkippedImage) else thumbnail(image)}


def _draw(
    title: str,
    log: Sequence[dict[str, Any]],
    labels: Mapping[str, str],
    *,
    smooth: bool = False,
    percent: bool = False,
    **axes_settings: Any,
) -> Markup:
    """Draw entries of a log by their labels, each over the lines that have it; smoothed ones with the values faint."""
    figure = make_figure()
    axes = figure.subplots()
    for (entry, label), color in zip(labels.items(), cycle(PALETTE), strict=False):
        lines = [line for line in log if entry in line]
        lines = lines[:: max(1, len(lines) // _POINTS)]
        values = pd.Series([line[entry] for line in lines], [line["step"] for line in lines], dtype=float)
        if percent:
            values *= 100
        if smooth:
            axes.plot(values, color=color, alpha=0.25, linewidth=0.8)
            # The mean over about a fiftieth of the run.
            values = values.rolling(max(1, len(values) // 50), min_periods=1, center=True).mean()
        axes.plot(values, ":" if entry.startswith(AVERAGED) else "-", color=color, label=label)
    if percent:
        axes_settings |= {"ylabel": "%", "ylim": (0, None)}
    axes.set(xlabel="step", **axes_settings)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return svg(figure, f"{title} over the steps of the run")


def draw_recalls(results: Sequence[dict[str, Any]]) -> Markup:
    """Draw the recalls on the held-out part, from the evaluations of a run."""
    labels = {
        entry: f"{side} R@{k}{', EMA' * bool(prefix)}"
        for prefix, k in (("", 1), ("", 5), (AVERAGED, 1))
        for side in _SIDES
        if (entry := f"{prefix}{side}_retrieval_recall@{k}") in results[0]
    }
    return _draw("Recall on the held-out part", results, labels, percent=True)


def _draw_named(results: Sequence[dict[str, Any]]) -> Markup | None:
    """Draw the metrics of the data sets of --eval-data: acc1 of classes, R@1 of captions; None where there are none."""
    labels: dict[str, str] = {}  # a run that was resumed may have been given other data sets
    for name in dict.fromkeys(name for line in results for name in line):
        data, slash, metric = name.removeprefix(AVERAGED).rpartition("/")
        if slash and metric in _NAMED:
            labels[name] = f"{data} {_NAMED[metric]}" + ", EMA" * name.startswith(AVERAGED)
    if not labels:
        return None
    return _draw("Measurements on the named data sets", results, labels, percent=True)


def _list_inputs(inputs: Inputs) -> list[tuple[str, str]]:
    listed = [("data", inputs.dataset.spec)]
    listed.append(("keep list", "none: all samples" if inputs.keep_list is None else str(inputs.keep_list.path)))
    teacher = inputs.teacher
    if teacher.online is not None:
        listed.append(("teacher", f"{teacher.online.spec}, run alongside the student"))
    if teacher.embeddings is not None:
        listed += teacher.embeddings.listed()
    listed += teacher.judgement.listed(inputs.settings)
    if inputs.clusters is not None:
        listed.append(("clusters", str(inputs.clusters.files.folder)))
    return listed
