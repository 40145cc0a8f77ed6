"""`runs`: what a work directory holds, as one table and one page, read from sidecars, metrics files and logs.

Runs that differ in nothing but their seed are one row: their metrics have a mean and a standard deviation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import msgspec

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.samples import natural_key
from clipcid_cli.formats.embeddings.sidecar import EmbedSidecar
from clipcid_cli.formats.files import write_text
from clipcid_cli.formats.fingerprint import hash_json
from clipcid_cli.formats.models.export_sidecar import ExportSidecar
from clipcid_cli.formats.output import find_works, unfinished
from clipcid_cli.formats.report import PALETTE, make_figure, render_report, svg
from clipcid_cli.formats.results.clusters import ClusterSidecar
from clipcid_cli.formats.results.evaluations import LinearSidecar, ZeroshotSidecar
from clipcid_cli.formats.results.keep_list import BalanceSidecar
from clipcid_cli.formats.results.metrics import (
    SUMMARY_REPORT,
    Metrics,
    find_variant,
    read_metrics,
    read_metrics_sidecar,
)
from clipcid_cli.formats.results.run_folder import (
    DistillSidecar,
    RunFolder,
    last_step,
    planned_steps,
    read_lines,
)
from clipcid_cli.formats.sidecar import Sidecar, read_sidecar, sidecar_path
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.records import Draws
from clipcid_cli.shown import metric_title
from clipcid_cli.steps import reporting
from clipcid_cli.steps.outdated import find_outdated
from clipcid_cli.steps.settings.runs import RunsSettings

if TYPE_CHECKING:
    from markupsafe import Markup

_Kind = TypeVar("_Kind", bound=Sidecar)

# What is drawn of the held-out part; of each data set of --eval-data the first of these that there is.
_HELD_OUT = {
    "image_retrieval_recall@1": "image R@1",
    "text_retrieval_recall@1": "text R@1",
    "teacher_retrieval_recall@1": "teacher R@1",
}
_NAMED = ("acc1", "image_retrieval_recall@1", "mean_average_precision")
_MOST_FIGURES = 6
_UNREADABLE = (ClipcidError, OSError, LookupError, TypeError, ValueError)  # raised by files of strangers
_STYLES = ("-", "--", ":")
_MOST_DRAWN = len(PALETTE) * len(_STYLES)
_MOST_POINTS = 500
# Metrics in which the runs are listed, on the page and on a screen.
_LISTED = tuple(f"{side}_retrieval_recall@{k}" for side in ("image", "text", "teacher") for k in (1, 5))


class Made(msgspec.Struct):
    """The output of a step that is no run and no evaluation."""

    step: str
    name: str  # of its folder in the work directory
    about: str
    report: str | None  # relative to the work directory
    outdated: list[str] = []  # ``other embeddings`` or ``another keep list`` than is there now, from which it was made


class RunRow(msgspec.Struct):
    """Runs of `distill` that differ in their seed alone."""

    name: str  # what the names begin with, and * for the rest
    names: list[str]
    seeds: list[int]
    losses: dict[str, str]  # weights, D the width of the space in which student and teacher are compared: ``2000/D``
    student: str
    steps: int
    planned: int | None  # steps of an unfinished run in the end; None where that is not recorded
    samples: int
    held_out: int | None  # images of the held-out part; None of an unfinished run
    finished: bool
    metrics: dict[str, Draws]  # of the last evaluation: of the held-out part, and NAME/METRIC
    chance: dict[str, float]  # of the held-out part
    reports: list[str]


class EvaluationRow(msgspec.Struct):
    """What was measured of a model, or of students that differ in their seed alone, on a data set."""

    dataset: str
    task: str
    variant: str  # ``templates-simple``, of other class names, templates or captions than the data set's
    model: str
    models: list[str]
    images: int | None
    customary: str | None
    metrics: dict[str, Draws]
    intervals: dict[str, tuple[float, float]]  # of a single model
    chance: dict[str, float]
    majority: float | None
    prompts: str  # hashes of class names and templates: scores of other ones are not comparable
    files: list[str]


class Unreadable(msgspec.Struct):
    """A file that could not be read, and why not."""

    path: str
    why: str


class Contents(msgspec.Struct):
    """All that a work directory holds."""

    work: str
    made: list[Made]
    runs: list[RunRow]
    evaluations: list[EvaluationRow]
    unreadable: list[Unreadable]
    files: dict[str, str]


@dataclasses.dataclass(frozen=True)
class _Run:
    """One run, and what makes it one of several that differ in their seed alone."""

    folder: RunFolder
    sidecar: DistillSidecar | None  # None of an unfinished one
    results: list[dict[str, Any]]
    step: int  # the last that was logged
    seed: int
    likeness: str  # equal for runs that differ in their seed alone

    @classmethod
    def of(cls, folder: RunFolder, sidecar: DistillSidecar | None, results: list[dict[str, Any]]) -> _Run:
        if sidecar is None:
            trained = read_lines(folder.train_log)
            return cls(folder, None, results, last_step(results, trained), 0, folder.path.name)
        settings = {name: value for name, value in sidecar.settings.items() if name != "seed"}
        # Fresh weights depend on the seed.
        student = {name: value for name, value in settings.pop("student", {}).items() if name != "weights"}
        inputs = sorted([file.size, file.hash] for file in sidecar.inputs)
        likeness = hash_json([settings, student, sidecar.model, inputs])
        steps = int(sidecar.result["steps"])
        return cls(folder, sidecar, results, steps, int(sidecar.settings["seed"]), likeness)

    @property
    def name(self) -> str:
        return self.folder.path.name


def _describe_embedded(embedded: EmbedSidecar) -> str:
    settings = embedded.made
    about = f"{embedded.counts['images']:,} images of {embedded.data.spec}, by {embedded.model.spec}"
    if settings.views:
        about += f", {settings.views} views of each"
    return about if settings.text else f"{about}, without captions"


def _describe_balanced(balanced: BalanceSidecar) -> str:
    kept, images = balanced.result["kept"], balanced.result["images"]
    return f"{kept:,} of {images:,} images kept ({kept / max(1, images):.1%})"


def _describe_clustered(clustered: ClusterSidecar) -> str:
    result = clustered.result
    return f"{result['clusters']:,} clusters of {result['images']:,} images, mean similarity {result['objective']:.3f}"


def _describe_exported(exported: ExportSidecar) -> str:
    return f"{exported.model['spec']} as {', '.join(exported.parity) or 'open-clip'}"


# Step, its sidecars in the work directory, their type, and what is said of one.
_MADE: tuple[tuple[str, str, Any, Callable[[Any], str]], ...] = (
    ("embed", "embeddings/*/embed.json", EmbedSidecar, _describe_embedded),
    ("balance", "balance/balance.json", BalanceSidecar, _describe_balanced),
    ("cluster", "clusters/cluster.json", ClusterSidecar, _describe_clustered),
    ("export", "export/*/export.json", ExportSidecar, _describe_exported),
)


class _Reader:
    """Reads a work directory; a file that cannot be read is listed, and ends nothing."""

    def __init__(self, work: WorkDirectory) -> None:
        self.work = work
        self.unreadable: list[Unreadable] = []

    def attempt(self, path: Path, read: Callable[[], Any]) -> Any:
        """Return what is read; None where it cannot be."""
        try:
            return read()
        except _UNREADABLE as error:
            why = error.message if isinstance(error, ClipcidError) else f"{type(error).__name__}: {error}"
            self.unreadable.append(Unreadable(self.work.name_of(path), why))
            return None

    def sidecars(self, pattern: str, kind: type[_Kind]) -> Iterator[tuple[Path, _Kind]]:
        """Yield the folders whose sidecars match a pattern, with these, in natural order."""
        for path in sorted(self.work.path.glob(pattern), key=lambda path: natural_key(str(path))):
            sidecar = self.attempt(path, functools.partial(read_sidecar, path, kind))
            if sidecar is not None:
                yield path.parent, sidecar

    def made(self) -> Iterator[Made]:
        """Yield what the steps before and after the training made."""
        for step, pattern, kind, describe in _MADE:
            for folder, sidecar in self.sidecars(pattern, kind):
                about = self.attempt(folder, functools.partial(describe, sidecar))
                outdated: list[str] = []
                with suppress(*_UNREADABLE):  # what cannot be read is listed by its own name
                    outdated = find_outdated(self.work, sidecar)
                if about is not None:
                    yield self._describe(step, folder, about, outdated)
        summary = self.work.eval_summary / SUMMARY_REPORT
        if summary.exists():
            yield self._describe("eval-zeroshot", summary.parent, "examples and classes of the last evaluation")
        for step, folder in (("balance", self.work.balance), ("cluster", self.work.clusters)):
            if not sidecar_path(folder, step).exists() and unfinished(folder, step) is not None:
                yield self._describe(step, folder, "unfinished: the same command resumes it")

    def _describe(self, step: str, folder: Path, about: str, outdated: Sequence[str] = ()) -> Made:
        report = folder / "report.html"
        if outdated:
            about += f"; outdated: made from {' and '.join(outdated)} than lies there now"
        shown = self.work.name_of(report) if report.exists() else None
        return Made(step, self.work.name_of(folder), about, shown, [*outdated])

    def runs(self) -> list[_Run]:
        """Return the runs of `distill`, finished or not."""
        runs = list[_Run]()
        folders = (path for path in (self.work.path / "distill").glob("*") if path.is_dir())
        for path in sorted(folders, key=lambda path: natural_key(path.name)):
            folder = RunFolder(path)
            record = sidecar_path(path, "distill")
            sidecar = self.attempt(record, functools.partial(read_sidecar, record, DistillSidecar))
            results = self.attempt(folder.results_log, functools.partial(read_lines, folder.results_log)) or []
            one = self.attempt(record, functools.partial(_Run.of, folder, sidecar, results))
            if one is not None and (sidecar is not None or results or one.step or find_works(path, "distill")):
                runs.append(one)
        return runs

    def evaluations(self) -> Iterator[tuple[Path, Metrics, ZeroshotSidecar | LinearSidecar | None]]:
        """Yield metrics files with their sidecars; those of other tools have none."""
        for path in sorted(self.work.eval.glob("*.json"), key=lambda path: natural_key(path.name)):
            metrics = self.attempt(path, functools.partial(read_metrics, path))
            if metrics is None:
                continue
            kind = LinearSidecar if metrics.task == "linear_probe" else ZeroshotSidecar
            yield path, metrics, self.attempt(path, functools.partial(read_metrics_sidecar, path, kind))


def run(settings: RunsSettings) -> Contents:
    """List what the work directory holds, and write its page; a dry run writes none."""
    work = WorkDirectory(settings.work)
    if not work.path.is_dir():
        raise ClipcidError(f"There is no work directory {work.path}.", "Name one with --work, or run a step first.")
    reader = _Reader(work)
    outputs = list(reader.made())
    described = [
        (runs, row)
        for runs in _group(reader.runs())
        if (row := reader.attempt(runs[0].folder.path, functools.partial(_describe_runs, reader, runs))) is not None
    ]
    groups, rows = [runs for runs, _ in described], [row for _, row in described]
    evaluations = _describe_evaluations(reader, groups)
    contents = Contents(str(work.path), outputs, rows, evaluations, reader.unreadable, {})
    for file in contents.unreadable:
        reporting.warn(f"{file.path} is left out: {file.why}")
    if not settings.dry_run:
        page = render_report("runs.html", **_page(contents, groups))
        write_text(work.index_page, page, shared=True)  # two commands may write it at once
        contents.files["index"] = str(work.index_page)
    return contents


def _group(runs: Sequence[_Run]) -> list[list[_Run]]:
    """Put runs that differ in their seed alone together, in the order of the first of each."""
    groups = dict[str, list[_Run]]()
    for one in runs:
        alike = groups.setdefault(one.likeness, [])
        # A seed twice: they differ in something that is not recorded, such as the model they started from.
        if any(other.seed == one.seed for other in alike):
            groups[f"{one.likeness} {one.name}"] = [one]
        else:
            alike.append(one)
    return [sorted(group, key=lambda one: one.seed) for group in groups.values()]


def _name_together(names: Sequence[str]) -> str:
    """Return the name of a group: what its names begin with, and ``*``."""
    if len(names) == 1:
        return names[0]
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    prefix = "".join(letters[0] for letters in alike)
    return f"{prefix}*" if prefix else ", ".join(names)


def _spread(values: Sequence[dict[str, Any]]) -> dict[str, Draws]:
    """Return the metrics that all have a value of."""
    names = [name for name in values[0] if all(_is_number(figures.get(name)) for figures in values)] if values else []
    return {name: Draws.from_values([float(figures[name]) for figures in values]) for name in names}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _describe_runs(reader: _Reader, runs: Sequence[_Run]) -> RunRow:
    first = runs[0].sidecar
    names = [one.name for one in runs]
    last = [{name: value for name, value in one.results[-1].items() if name != "step"} for one in runs if one.results]
    reports = [reader.work.name_of(one.folder.report) for one in runs if one.folder.report.exists()]
    if first is None:
        return RunRow(
            name=names[0],
            names=names,
            seeds=[],
            losses={},
            student="",
            steps=runs[0].step,
            planned=planned_steps(runs[0].folder.path),
            samples=0,
            held_out=None,
            finished=False,
            metrics=_spread(last),
            chance={},
            reports=reports,
        )
    held_out = first.counts.get("held_out")
    losses = {
        name: f"{weight['value']:.3g}{'/D' if weight.get('per_width') else ''}"
        for name, weight in first.made.losses.items()
    }
    return RunRow(
        name=_name_together(names),
        names=names,
        seeds=[one.seed for one in runs],
        losses=losses,
        student=str(first.model["spec"]),
        steps=runs[0].step,
        planned=None,
        samples=int(first.result["samples"]),
        held_out=None if held_out is None else int(held_out),
        finished=True,
        metrics=_spread([one.sidecar.result["metrics"] for one in runs if one.sidecar is not None]),
        chance=first.result.get("chance", {}),
        reports=reports,
    )


def _describe_evaluations(reader: _Reader, groups: Sequence[Sequence[_Run]]) -> list[EvaluationRow]:
    """Put the evaluations of students of one group together, and list all by task and data set."""
    place_of = {one.folder.path.resolve(): place for place, runs in enumerate(groups) for one in runs}
    by_model = dict[tuple[Any, ...], list[tuple[Path, Metrics, ZeroshotSidecar | LinearSidecar | None]]]()
    for path, metrics, sidecar in reader.evaluations():
        student = _find_student(metrics)
        place = place_of.get(student.parent)
        # A student and its weight average are two models; a model of no run stands alone.
        model = path.name if place is None else (place, student.name)
        variant = find_variant(path, metrics.task)
        prompts = "" if sidecar is None else " ".join(lines.hash for lines in (sidecar.prompts or {}).values())
        key = (metrics.task, metrics.dataset, prompts, variant, tuple(metrics.metrics), model)
        alike = by_model.setdefault(key, [])
        # A model twice: what was measured differs in something that is not recorded.
        if any(_find_student(other) == student for _, other, _ in alike):
            by_model[*key, path.name] = [(path, metrics, sidecar)]
        else:
            alike.append((path, metrics, sidecar))
    rows = [
        reader.attempt(files[0][0], functools.partial(_describe_evaluation, reader, key[2], files))
        for key, files in by_model.items()
    ]
    return sorted(
        (row for row in rows if row is not None),
        key=lambda row: (row.task, row.dataset, row.variant, natural_key(row.model)),
    )


def _find_student(metrics: Metrics) -> Path:
    """Return the folder of the model that was measured; for one that has none a path where nothing is."""
    return Path(str(metrics.pretrained)).resolve()


def _describe_evaluation(
    reader: _Reader, prompts: str, files: Sequence[tuple[Path, Metrics, ZeroshotSidecar | LinearSidecar | None]]
) -> EvaluationRow:
    _, metrics, sidecar = files[0]
    models = [_show_model(measured) for _, measured, _ in files]
    about: dict[str, Any] = {"customary": None, "intervals": {}, "chance": {}, "majority": None, "images": None}
    if isinstance(sidecar, ZeroshotSidecar):
        about = {name: getattr(sidecar, name) for name in ("customary", "intervals", "chance", "majority")}
        about["images"] = sidecar.counts["images"]
    elif sidecar is not None:
        about |= {name: sidecar.result.get(name) for name in ("majority", "images")}
        intervals = sidecar.result.get("intervals", {})  # earlier probes have none
        about["intervals"] = msgspec.convert(intervals, dict[str, tuple[float, float]])
        about |= {"chance": sidecar.result.get("chance", {}), "customary": f"lp_{sidecar.result['metric']}"}
    if len(files) > 1:
        about["intervals"] = {}
    return EvaluationRow(
        dataset=metrics.dataset,
        task=metrics.task,
        variant=find_variant(files[0][0], metrics.task),
        model=_name_together(models),
        models=models,
        metrics=_spread([measured.metrics for _, measured, _ in files]),
        prompts=prompts,
        files=[reader.work.name_of(path) for path, _, _ in files],
        **about,
    )


def _show_model(metrics: Metrics) -> str:
    """Return a model's name for people: of a folder without its path."""
    pretrained = str(metrics.pretrained)
    is_folder = "/" in pretrained or pretrained in ("", metrics.model)
    return metrics.model if is_folder else f"{metrics.model} {pretrained}"


def _page(contents: Contents, groups: Sequence[Sequence[_Run]]) -> dict[str, Any]:
    """Return what the template shows."""
    tasks = dict[tuple[str, ...], list[EvaluationRow]]()
    for row in contents.evaluations:
        tasks.setdefault((row.task, *row.metrics), []).append(row)
    chance = {name: _range([row.chance[name] for row in contents.runs if name in row.chance]) for name in _LISTED}
    return {
        "contents": contents,
        "num_runs": sum(len(row.names) for row in contents.runs),
        "num_evaluations": sum(len(row.models) for row in contents.evaluations),
        "chance": {name: text for name, text in chance.items() if text},
        "listed": [name for name in _LISTED if any(name in row.metrics for row in contents.runs)],
        "tables": [
            {"task": key[0], "metrics": key[1:], "rows": rows, "guesses": _guesses(rows)} for key, rows in tasks.items()
        ],
        "figures": list(_draw_curves(contents.runs, groups)),
        "link": lambda path: quote(path),
        "title": metric_title,
    }


def _guesses(rows: Sequence[EvaluationRow]) -> list[dict[str, Any]]:
    """Return what stands below a table of evaluations: for each data set chance, and always the largest class."""
    guesses = list[dict[str, Any]]()
    for row in {row.dataset: row for row in rows}.values():
        if row.chance:
            cells = {name: f"{100 * value:.1f}" for name, value in row.chance.items()}
            guesses.append({"label": f"{row.dataset}: chance", "cells": cells})
        if row.majority is not None:
            accuracy = next((name for name in row.metrics if name.endswith("acc1")), "acc1")
            cells = {accuracy: f"{100 * row.majority:.1f}"}
            guesses.append({"label": f"{row.dataset}: always the largest class", "cells": cells})
    return guesses


def _range(shares: Sequence[float]) -> str:
    """Write shares in percent, of different ones the least and the largest."""
    ends = dict.fromkeys(f"{100 * share:.1f}" for share in sorted(shares))
    return " … ".join([*ends][:: max(1, len(ends) - 1)])


def _draw_curves(rows: Sequence[RunRow], groups: Sequence[Sequence[_Run]]) -> Iterator[tuple[str, Markup]]:
    """Draw the metrics of all runs over the steps, those of one group in one colour, with a heading each."""
    drawn = {name: f"{title}, held out" for name, title in _HELD_OUT.items()}
    logged = dict.fromkeys(name for runs in groups for one in runs for line in one.results for name in line)
    for data in dict.fromkeys(name.rpartition("/")[0] for name in logged):
        metric = next((metric for metric in _NAMED if f"{data}/{metric}" in logged), None)
        if metric is not None and not data.startswith("ema"):  # of weight averages
            drawn[f"{data}/{metric}"] = f"{metric_title(metric)} on {data}"
    for name, title in list(drawn.items())[:_MOST_FIGURES]:
        ended = [place for place, row in enumerate(rows) if name in row.metrics]
        best = sorted(ended, key=lambda place: rows[place].metrics[name].mean or 0.0, reverse=True)[:_MOST_DRAWN]
        figure = _draw_curve(name, {place: (rows[place], groups[place]) for place in best})
        if figure is not None:
            some = f", the {len(best)} best of {len(ended)}" if len(best) < len(ended) else ""
            yield f"{title}{some}", figure


def _draw_curve(name: str, drawn: dict[int, tuple[RunRow, Sequence[_Run]]]) -> Markup | None:
    """Draw one metric of some groups, whose place among all decides colour and line: the same in all figures."""
    figure = make_figure()
    axes = figure.subplots()
    for place, (row, runs) in drawn.items():
        line = _STYLES[place // len(PALETTE) % len(_STYLES)]
        style: dict[str, Any] = {"color": PALETTE[place % len(PALETTE)], "linestyle": line}
        label: str | None = row.name.replace("$", r"\$")  # which begins a formula
        for one in runs:
            lines = [line for line in one.results if _is_number(line.get(name))]
            lines = lines[:: max(1, len(lines) // _MOST_POINTS)]
            if len(lines) > 1:
                values = [100 * line[name] for line in lines]
                axes.plot([line["step"] for line in lines], values, **style, linewidth=1.2, label=label)
                label = None  # one entry for all seeds
    if not axes.lines:
        return None
    axes.set(xlabel="step", ylabel="%", ylim=(0, None))
    axes.legend(frameon=False, fontsize="small")
    return svg(figure, f"{name} of the runs over their steps")
