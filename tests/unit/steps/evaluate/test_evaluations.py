"""Evaluations: comparing two results, fits on given features, and when finished ones are taken as they are."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from balance_data import heard
from conftest import make_image, write_class_folders
from rich.console import Console
from sidecars import make_sidecar

from clipcid_cli.algorithms.probe import ProbeProblem
from clipcid_cli.commands.comparison import show_comparison
from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.formats.data.benchmark import hash_lines
from clipcid_cli.formats.files import write_json
from clipcid_cli.formats.fingerprint import record
from clipcid_cli.formats.results.features import ImageFeatures
from clipcid_cli.formats.results.metrics import (
    EvaluationSidecar,
    LinesRecord,
    Metrics,
    predictions_path,
    read_metrics,
    write_metrics,
    write_predictions,
)
from clipcid_cli.formats.sidecar import seal, sidecar_path
from clipcid_cli.records import Draws
from clipcid_cli.runtime.models.names import ModelName
from clipcid_cli.steps.evaluate import linear as eval_linear
from clipcid_cli.steps.evaluate import zeroshot as eval_zeroshot
from clipcid_cli.steps.evaluate.compare import compare_results
from clipcid_cli.steps.evaluate.comparison import ComparisonResult, ComparisonResults
from clipcid_cli.steps.evaluate.linear import warn_of_repeats
from clipcid_cli.steps.evaluate.means import average_results
from clipcid_cli.steps.evaluate.probe_fits import ProbeFits
from clipcid_cli.steps.evaluate.probe_plan import ProbePlan
from clipcid_cli.steps.evaluate.probe_result import LinearResult
from clipcid_cli.steps.evaluate.result import ZeroshotResult
from clipcid_cli.steps.settings.eval_linear import EvalLinearSettings
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings


def write_result(
    path: Path, keys: str, labels: list[int], classes: int = 2, templates: tuple[str, ...] | None = None
) -> None:
    """Write metrics and predictions of an image a key and, where templates are given, the sidecar that records them."""
    kind = {"dataset": "d", "model": "m", "pretrained": "p", "task": "zeroshot_classification", "language": "en"}
    write_metrics(path, Metrics(**kind, metrics={"acc1": 0.5}))
    rows = {"key": list(keys), "label": labels, "predicted": [0, 1]}
    rows |= {"top": [[0, 1], [1, 0]], "scores": [[0.2, 0.1], [0.3, 0.1]]}
    write_predictions(predictions_path(path), "classification", "m", "d", classes, rows)
    if templates is not None:
        prompts = {
            "class_names": LinesRecord("folder names", 2, hash_lines(("cat", "dog"))),
            "templates": LinesRecord(f"{path.stem}.txt", len(templates), hash_lines(templates)),
        }
        sidecar = path.parent / "sidecars" / path.name
        sidecar.parent.mkdir(exist_ok=True)
        write_json(sidecar, make_sidecar(EvaluationSidecar, prompts=msgspec.to_builtins(prompts)))


def compare(one: Path, other: Path) -> tuple[ComparisonResult, str]:
    """Compare two results; returns the answer and what was said."""
    with heard() as told:
        answer = compare_results(EvalZeroshotSettings(model=str(one), data=(str(other),), compare=True))
    assert isinstance(answer, ComparisonResult)
    return answer, "\n".join(told)


def test_comparison_of_other_data_is_refused(tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    write_result(a, "xy", [0, 1])
    for keys, labels, classes, message in (
        ("xz", [0, 1], 2, "2 of d, 2 of d, 1 in both"),
        ("xy", [0, 0], 2, "different classes"),
        ("xy", [0, 1], 3, "different classes"),
    ):
        write_result(b, keys, labels, classes)
        with pytest.raises(ClipcidError, match=message):
            compare(a, b)
    write_result(b, "yx", [1, 0])  # the order of the rows does not matter
    assert compare(a, b)[0].images == 2
    with pytest.raises(ClipcidError, match="There is no metrics file") as missing:
        compare(a, tmp_path / "bb.json")
    assert str(b) in str(missing.value.fix)
    assert str(a) not in str(missing.value.fix)


def test_scores_of_other_prompts_are_told_apart(tmp_path: Path) -> None:
    """Of the same model, data and classes: only the sidecars know that the templates were others."""
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    write_result(a, "xy", [0, 1], templates=("a {c}",))
    write_result(b, "xy", [0, 1])
    result, told = compare(a, b)
    assert result.prompts is None
    assert "No entry `prompts` records the class names and templates of B" in told
    write_result(b, "xy", [0, 1], templates=("a {c}",))
    result, told = compare(a, b)
    assert "templates" not in told
    assert result.prompts is not None
    digest = result.prompts["templates"].first.hash
    write_result(b, "xy", [0, 1], templates=("a {c}", "the {c}"))
    result, told = compare(a, b)
    assert "The templates differ, so the scores differ by more than the models" in told
    assert result.prompts is not None
    assert f"of A 1, a.txt ({digest}); of B 2, b.txt ({result.prompts['templates'].second.hash})" in told
    assert result.prompts["class_names"].same
    sidecar = tmp_path / "sidecars" / "b.json"
    sidecar.write_text(sidecar.read_text().replace('"number": 2', '"number": "two"'))
    with pytest.raises(ClipcidError, match="it was edited, or is damaged"):
        compare(a, b)


def write_answers(path: Path, model: str, right: int, images: int, dataset: str = "d") -> Path:
    """Write metrics and predictions of a model that has so many of its images right."""
    kind = {"dataset": dataset, "model": model, "pretrained": "p", "task": "zeroshot_classification", "language": "en"}
    write_metrics(path, Metrics(**kind, metrics={"acc1": right / images}))
    predicted = [0] * right + [1] * (images - right)
    rows = {"key": [f"{image:04}" for image in range(images)], "label": [0] * images, "predicted": predicted}
    rows |= {"top": [[0, 1]] * images, "scores": [[0.2, 0.1]] * images}
    write_predictions(predictions_path(path), "classification", model, dataset, 2, rows)
    return path


@pytest.mark.parametrize(
    ("right", "margin", "no_worse", "equivalent", "said"),
    [
        (902, None, None, None, "may be due to chance"),
        (902, 1.0, True, True, "A (a) and B (b) are equivalent within 1 point"),
        (902, 0.1, True, False, "B (b) is no worse than A (a) by 0.1 points"),
        (895, 0.1, False, False, "A (a) is no worse than B (b) by 0.1 points"),
        (880, 1.0, False, False, "A (a) is no worse than B (b) by 1 point"),
        (880, 4.0, True, True, "equivalent within 4 points"),
    ],
)
def test_a_margin_tells_no_worse_from_not_significant(
    right: int, margin: float | None, no_worse: bool | None, equivalent: bool | None, said: str, tmp_path: Path
) -> None:
    files = [
        str(write_answers(tmp_path / f"{name}.json", name, count, 1000)) for name, count in (("a", 900), ("b", right))
    ]
    with heard() as told:
        answer = compare_results(EvalZeroshotSettings(model=files[0], data=(files[1],), compare=True, margin=margin))
    assert isinstance(answer, ComparisonResult)
    judged = answer.differences["acc1"]
    low, high = (100 * end for end in judged.interval)
    assert (judged.no_worse, judged.equivalent) == (no_worse, equivalent)
    if margin is not None:
        assert (no_worse, equivalent) == (low > -margin, -margin < low and high < margin)
    assert said in judged.verdict
    assert answer.margin == margin
    assert any("This compares two checkpoints, not two methods" in line for line in told)


def test_several_data_sets_are_compared_on_their_mean(tmp_path: Path) -> None:
    right = {("pets", "a"): 500, ("pets", "b"): 560, ("dtd", "a"): 300, ("dtd", "b"): 330}
    for (dataset, model), count in right.items():
        write_answers(tmp_path / f"{dataset}_{model}.json", model, count, 1000, dataset)
    sides = [str(tmp_path / f"*_{model}.json") for model in "ab"]
    with heard() as told:
        answer = compare_results(EvalZeroshotSettings(model=sides[0], data=(sides[1],), compare=True, margin=1.0))
    assert isinstance(answer, ComparisonResults)
    assert [one.dataset for one in answer.results] == ["dtd", "pets"]
    (mean,) = answer.means
    assert mean.counted == {"dtd": "acc1", "pets": "mean_per_class_recall"}
    assert mean.difference == pytest.approx(0.045)
    own = [one.differences[mean.counted[one.dataset]] for one in answer.results]
    widths = [judged.interval[1] - judged.interval[0] for judged in own]
    assert mean.interval[1] - mean.interval[0] == pytest.approx(np.hypot(*widths) / 2, rel=0.1)
    assert (mean.real, mean.no_worse, mean.p_value) == (True, True, None)
    assert "mean over dtd, pets: B is better than A, and the difference is real" in "\n".join(told)
    text = io.StringIO()
    show_comparison(answer, Console(file=text, width=80))
    assert "B against A on the mean over dtd, pets" in text.getvalue()
    assert "Student's t" not in text.getvalue()
    # Three seeds of each side are paired through both data sets.
    files = {model: [str(tmp_path / f"{dataset}_{model}.json") for dataset in ("dtd", "pets")] for model in "ab"}
    seeds = [",".join(3 * files[model]) for model in "ab"]
    with heard() as told:
        answer = compare_results(EvalZeroshotSettings(model=seeds[0], data=(seeds[1],), compare=True))
    assert isinstance(answer, ComparisonResults)
    assert answer.means[0].first == Draws.from_values([0.4, 0.4, 0.4])
    assert not any("two checkpoints" in line for line in told)
    show_comparison(answer, Console(file=text, width=80))
    assert "over images and, by Student's t, over seeds" in text.getvalue()

    (tmp_path / "dtd_b.json").unlink()
    with pytest.raises(ClipcidError, match="B has no result on dtd"):
        compare_results(EvalZeroshotSettings(model=sides[0], data=(sides[1],), compare=True))


def test_images_that_belong_together_are_drawn_together(tmp_path: Path) -> None:
    files = [write_answers(tmp_path / f"{name}.json", name, right, 1000) for name, right in (("a", 900), ("b", 880))]
    # The twenty images that one model alone has wrong are copies of each other: one thing that it does not know.
    groups = [(f"{image:04}", "copies" if 880 <= image < 900 else "") for image in range(1000)]
    table = tmp_path / "groups.csv"

    def write(rows: list[tuple[str, str]]) -> None:
        table.write_text("key,concept\n" + "".join(f"{key},{group}\n" for key, group in rows))

    write(groups)
    alone = EvalZeroshotSettings(model=str(files[0]), data=(str(files[1]),), compare=True)
    grouped = dataclasses.replace(alone, groups=table, group_column="concept")
    with heard() as told:
        answers = [compare_results(settings) for settings in (alone, grouped)]
    assert [answer.groups for answer in answers if isinstance(answer, ComparisonResult)] == [None, 981]
    judged = [answer.differences["acc1"] for answer in answers if isinstance(answer, ComparisonResult)]
    assert [one.difference for one in judged] == [pytest.approx(-0.02)] * 2
    assert [one.real for one in judged] == [True, False]
    assert judged[1].p_value is None
    assert "d: 1,000 images in 981 groups by concept of" in "\n".join(told)
    for rows, message in (
        (groups[1:], "has no row for 1 of 1,000 images, such as 0000"),
        ([*groups, ("0001", "other")], "puts 0001 into two groups, '' and 'other'"),
        ([(key, "one") for key, _ in groups], "puts all 1,000 images into one group"),
    ):
        write(rows)
        with pytest.raises(ClipcidError, match=message):
            compare_results(grouped)
    with pytest.raises(ClipcidError, match="has no column 'component'; it has key, concept"):
        compare_results(dataclasses.replace(alone, groups=table))
    with pytest.raises(UsageError, match="--group-column has no effect without --groups"):
        dataclasses.replace(alone, group_column="concept")


def test_the_mean_over_measured_data_sets_has_an_interval() -> None:
    def result(dataset: str, value: float | None, low: float, high: float, task: str = "classification") -> Any:
        return msgspec.convert(
            {
                "dataset": dataset,
                "model": "m",
                "pretrained": "p",
                "task": task,
                "language": "en",
                "prompts": None,
                "groups": None,
                "metrics": {"acc1": value},
                "customary": "acc1",
                "intervals": {"acc1": (low, high)},
                "chance": {},
                "majority": None,
                "images": 9,
                "skipped": {},
                "images_per_second": 1,
                "seconds": {},
                "files": {},
                "reused": False,
            },
            ZeroshotResult,
        )

    results = [result("a", 0.5, 0.47, 0.56), result("b", 0.7, 0.66, 0.78), result("c", 0.1, 0.1, 0.1, "retrieval")]
    (mean,) = average_results(results)
    assert mean.counted == {"a": "acc1", "b": "acc1"}
    assert mean.value == pytest.approx(0.6)
    assert mean.interval == pytest.approx((0.575, 0.65))
    assert average_results([*results, result("d", None, 0, 0)]) == []  # of some data sets a mean would mislead


def test_a_margin_without_a_comparison_is_refused() -> None:
    with pytest.raises(UsageError, match="--margin has no effect without --compare"):
        EvalZeroshotSettings(model="m", data=("d",), margin=1.0)


def test_a_pattern_of_models_is_matched_as_one_of_results(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("s10", "s2", "[s]1"):
        shutil.copytree(tiny_model, tmp_path / "runs" / name)
    (tmp_path / "runs" / "notes").mkdir()
    data = str(write_class_folders(tmp_path / "data", {"a": (0,), "b": (1,)}))

    def models(model: str | None, *others: str) -> list[str]:
        settings = EvalZeroshotSettings(model=model, data=(data,), models=others, work=tmp_path / "work")
        return [name.slug for name in eval_zeroshot.make_plan(settings).names]

    runs = tmp_path / "runs"
    assert models(f"{runs}/*") == ["s-1-14fddd61", "s2", "s10"]
    assert models(f"{runs}/s*", f"{runs}/[s]1") == ["s2", "s10", "s-1-14fddd61"]
    assert models(f"{runs}/s2", f"{runs}/s?0") == ["s2", "s10"]
    with pytest.raises(ClipcidError, match=r"runs/x\*"):
        models(f"{runs}/x*")


COUNTS = {"train": 20, "val": 3, "test": 8}  # images of each class


def make_images(counts: list[int], seed: int = 0) -> ImageFeatures:
    """Make unit rows around one centre for each class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    centres = torch.randn(len(counts), 6, generator=torch.Generator().manual_seed(9))
    rows = 0.7 * centres[labels] + torch.randn(len(labels), 6, generator=generator)
    return ImageFeatures(torch.nn.functional.normalize(rows, dim=1), labels)


def test_images_of_training_in_the_test_are_a_warning() -> None:
    splits = {name: make_images([count, count], seed) for seed, (name, count) in enumerate(COUNTS.items())}
    with heard() as told:
        warn_of_repeats(splits)
    assert told == []
    splits["test"].rows[:3] = splits["train"].rows[[4, 30, 7]]
    splits["test"].rows[2:5] = splits["val"].rows[[5, 1, 2]]
    with heard() as told:
        warn_of_repeats(splits)
    assert "5 of 16 test images are among those of training too" in "\n".join(told)


def make_fits(images: ImageFeatures, **settings: Any) -> ProbeFits:
    return ProbeFits({"train": images}, make_plan(int(images.labels.max()) + 1, **settings))


def make_plan(classes: int, metric: str = "acc1", **settings: Any) -> ProbePlan:
    chosen = EvalLinearSettings(data="nowhere", **settings)
    names = tuple(map(str, range(classes)))
    return ProbePlan(ModelName("m", "tag"), "nowhere", names, metric, {}, Path("metrics.json"), chosen)


def test_few_shot_probes_see_no_image_that_chooses_their_strength() -> None:
    images = make_images([30, 30, 6])
    with heard() as told:
        fits = make_fits(images, shots="8,2", shot_repeats=2)
    assert told == ["--shots 8: 1 of 3 classes have fewer images, all of which are used."]
    assert len(fits.split.fitted) + len(fits.split.held_out) == len(images)
    held_out = {tuple(row) for row in fits.split.held_out.rows.tolist()}
    assert held_out.isdisjoint({tuple(row) for row in fits.split.fitted.rows.tolist()})
    curve = fits.few_shots(make_images([20, 20, 20], seed=1))
    assert [(point.shots, point.images) for point in curve] == [(2, 6), (8, 21)]
    half = make_fits(images, val_fraction=0.5)
    assert (len(half.split.fitted), len(half.split.held_out), len(half.images)) == (33, 33, 66)
    assert half.folds == [half.split]
    assert all(len(set(point.metrics["lp_acc1"].values)) <= 2 for point in curve)
    again = make_fits(images, shots="8", shot_repeats=2).few_shots(make_images([20, 20, 20], seed=1))
    assert again == curve[1:]


def test_of_few_images_each_chooses_the_strength_once() -> None:
    images = make_images([20, 9, 1])
    fits = make_fits(images)
    held_out = [tuple(row) for fold in fits.folds for row in fold.held_out.rows.tolist()]
    assert sorted(held_out) == sorted(tuple(row) for row in images.rows[:29].tolist())  # the last is alone in its class
    assert [len(fold.held_out) for fold in fits.folds] == [6, 6, 6, 6, 5]
    with heard() as told:
        points, best = fits.sweep()
    assert "values of C on 30 images in 5 folds" in told[0]
    right = 0
    for fold in fits.folds:
        assert len(fold.fitted) + len(fold.held_out) == len(images)
        solution = ProbeProblem(fold.fitted.rows, fold.fitted.labels, 3).fit(best.c)
        (scores,) = solution.classifier.scores(fold.held_out.rows)
        right += int((scores.argmax(dim=1) == fold.held_out.labels).sum())
    assert best.score == right / 29 == max(point.score for point in points)
    # Of many a fifth is enough, and costs a fifth.
    assert [len(make_fits(make_images([2500, count])).folds) for count in (2499, 2500)] == [5, 1]


def test_a_best_strength_at_an_end_is_told_once_for_each_number_of_shots() -> None:
    # Classes that any strength tells apart: the strongest regularisation is taken, an end of the range.
    apart = ImageFeatures(torch.eye(2).repeat_interleave(20, dim=0), torch.arange(2).repeat_interleave(20))
    with heard() as told:
        curve = make_fits(apart, shots="1,4", shot_repeats=3).few_shots(apart)
    assert [point.at_edge for point in curve] == [3, 3]
    assert [text.partition(" an end of")[0] for text in told] == [
        "--shots 1: the best C of 3 of 3 draws is",
        "--shots 4: the best C of 3 of 3 draws is",
    ]


def test_what_cannot_be_drawn_or_held_out_is_refused() -> None:
    with pytest.raises(
        ClipcidError, match="no class has 17 training images besides those held out; the largest has 16"
    ):
        make_fits(make_images([20, 10]), shots="17")
    with pytest.raises(ClipcidError, match="none can be held out"):
        make_fits(make_images([1, 1]))
    without = ImageFeatures(torch.eye(4), torch.zeros(4, 2, dtype=torch.bool))
    with pytest.raises(ClipcidError, match="No validation image has a class"):
        ProbeFits({"train": without, "val": without}, make_plan(2, "mean_average_precision"))
    several = ImageFeatures(torch.eye(4), torch.ones(4, 2, dtype=torch.bool))
    with pytest.raises(ClipcidError, match="to all training images or to none"):
        ProbeFits({"train": several}, make_plan(2, "mean_average_precision"))


def write_photos(folder: Path, seed: int, per_class: int = 4) -> Path:
    """Write one folder of images for each of two classes, every file of 8,000 bytes."""
    classes = {"cat": range(per_class), "dog": range(100, 100 + per_class)}
    return write_class_folders(folder, classes, lambda number: make_image(seed + number).ljust(8000, b"\0"))


def read_all(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def leave_out(result: ZeroshotResult | LinearResult, metric: str) -> None:
    """Make a result that of a version which did not know a metric."""
    path = Path(result.files["metrics"])
    metrics = read_metrics(path)
    del metrics.metrics[metric]
    write_metrics(path, metrics)
    sidecar = sidecar_path(path.parent / "sidecars", path.stem)
    content = json.loads(sidecar.read_bytes())
    for file in content["outputs"]:
        file |= msgspec.to_builtins(record(sidecar.parent / file["path"])) | {"path": file["path"]}
    write_json(sidecar, seal(content))


def test_zeroshot_results_are_of_these_images_and_outlive_failures(tiny_model: Path, tmp_path: Path) -> None:
    data = write_photos(tmp_path / "photos", 0)

    def evaluate(**more: Any) -> ZeroshotResult:
        arguments = {"model": str(tiny_model), "data": (str(data),), "work": tmp_path / "work", "workers": 0}
        found = eval_zeroshot.run(EvalZeroshotSettings(**arguments | {"bootstrap": 20} | more))
        assert isinstance(found, ZeroshotResult)
        return found

    first = evaluate(predictions=True)
    assert evaluate().reused
    keys = pq.read_table(first.files["predictions"])["key"].to_pylist()
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("filepath,pair\n" + "".join(f"{key},{place // 2}\n" for place, key in enumerate(keys)))
    grouped = evaluate(groups=pairs, group_column="pair")
    assert (grouped.groups, grouped.reused, grouped.metrics) == (4, False, first.metrics)
    assert evaluate(groups=pairs, group_column="pair").reused
    with pytest.raises(ClipcidError, match="has no column 'kind'"):
        evaluate(groups=pairs, group_column="kind")
    rows = Path(first.files["predictions"])
    said = rows.read_bytes()
    # Other draws keep what was said of each image.
    drawn = evaluate(bootstrap=30)
    assert not drawn.reused
    assert drawn.files["predictions"] == str(rows)
    assert rows.read_bytes() == said

    # Other images of the same names and sizes are other data.
    folder = tmp_path / "work" / "eval"
    before = read_all(folder)
    write_photos(data, 50)
    with pytest.raises(ClipcidError, match="photos#images"):
        evaluate(bootstrap=30)
    for path in data.rglob("*.png"):
        path.write_bytes(b"no image".ljust(8000))
    with pytest.raises(ClipcidError, match="8 samples: none can be used"):
        evaluate(overwrite=True)
    assert read_all(folder) == before
    write_photos(data, 50)
    replaced = evaluate(overwrite=True)
    assert not replaced.reused
    assert "predictions" not in replaced.files  # those were of the other images
    assert evaluate().reused

    # A metric that a later version measures, too.
    leave_out(replaced, "acc1")
    with heard() as told:
        assert evaluate().metrics == replaced.metrics
    assert any(line.endswith("has no acc1; measuring " + str(tiny_model) + " on photos again.") for line in told), told
    assert evaluate().reused


def test_a_probe_outlives_failures_and_serves_who_asks_for_no_curve(tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "photos"
    write_photos(data / "train", 0, 8)
    write_photos(data / "test", 50)

    settings = EvalLinearSettings(
        model=str(tiny_model), data=str(data), work=tmp_path / "work", workers=0, shot_repeats=1, val_fraction=0.2
    )

    def probe(shots: str | None, **more: Any) -> LinearResult:
        found = eval_linear.run(dataclasses.replace(settings, shots=shots, **more))
        assert isinstance(found, LinearResult)
        return found

    def is_there(shots: str | None) -> bool:
        return eval_linear.run(dataclasses.replace(settings, shots=shots, dry_run=True)).reused

    curve = probe("1,2")
    before = read_all(tmp_path / "work" / "eval")
    with pytest.raises(ClipcidError, match="--shots 1000"):
        probe("1,2,1000")
    assert read_all(tmp_path / "work" / "eval") == before
    assert [is_there(shots) for shots in (None, "1,2", "2")] == [True, True, True]
    plain = probe(None)
    assert plain == msgspec.structs.replace(curve, reused=True)

    # Predictions of each test image make two probes comparable, by the words of `eval-zeroshot --compare`.
    with heard() as told:
        probe("1,2", predictions=True, knn="3")
    # What is not asked for again is not lost, also where something else is measured again.
    for asked, lost in (
        ({"knn": "5"}, "settings.knn: [3] there, [5] now"),
        ({"shots": "1,4"}, "settings.shots: [1, 2] there, [1, 4] now\n  settings.knn: [3] there, [] now"),
        ({"shots": "1,2", "knn": "3", "shot_repeats": 2}, "settings.shot_repeats: 1 there, 2 now"),
        ({"bootstrap": 30}, "settings.shots: [1, 2] there, [] now\n  settings.knn: [3] there, [] now"),
    ):
        for dry_run in (True, False):
            with pytest.raises(ClipcidError, match=re.escape(lost)):
                eval_linear.run(dataclasses.replace(settings, dry_run=dry_run, **asked))
    # A metric that a later version measures, too.
    leave_out(probe("1,2", knn="3"), "lp_acc1")
    with heard() as told_of_metric:
        assert "lp_acc1" in probe("1,2", knn="3").metrics
    assert "has no lp_acc1; measuring" in "\n".join(told_of_metric)
    (result,) = (tmp_path / "work" / "eval").glob("*.json")
    other = shutil.copytree(tmp_path / "work" / "eval", tmp_path / "other") / result.name
    rows = pq.read_table(predictions_path(other))
    wrong = pa.array([1 - label for label in rows["label"].to_pylist()], pa.int32())
    pq.write_table(rows.set_column(2, "predicted", wrong), predictions_path(other))
    (other.parent / "sidecars" / other.name).unlink()
    compared = EvalLinearSettings(model=str(result), data=str(other), compare=True, margin=1.0)
    with heard() as told:
        answer = eval_linear.run(compared)
    assert isinstance(answer, ComparisonResult)
    assert answer.prompts is None
    assert answer.images == plain.images
    judged = answer.differences["lp_acc1"]
    assert (judged.first, judged.second) == (plain.metrics["lp_acc1"], 0.0)
    assert not any("prompts" in line for line in told)
    with pytest.raises(ClipcidError, match="is a result of eval-linear, and eval-zeroshot compares its own"):
        compare(result, other)
    other = probe("2", overwrite=True, shot_repeats=2)
    assert not other.reused
    assert [point.shots for point in other.shots] == [2]
