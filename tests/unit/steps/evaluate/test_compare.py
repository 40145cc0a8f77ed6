"""`eval-zeroshot --compare`: how it calls two results, and results of other data or other prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from balance_data import heard
from sidecars import make_sidecar

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.benchmark import hash_lines
from clipcid_cli.formats.files import write_json
from clipcid_cli.formats.results.metrics import Metrics, predictions_path, write_metrics, write_predictions
from clipcid_cli.formats.sidecar import EvaluationSidecar, LinesRecord
from clipcid_cli.steps.evaluate.compare import compare_results
from clipcid_cli.steps.evaluate.result import ComparisonResult
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings


def make_metrics(task: str, metrics: dict[str, Any], pretrained: str = "p") -> Metrics:
    return Metrics(dataset="d", model="m", pretrained=pretrained, task=task, language="en", metrics=metrics)


def test_comparison_of_other_data_is_refused(tmp_path: Path) -> None:
    settings = EvalZeroshotSettings(model=str(tmp_path / "a.json"), data=(str(tmp_path / "b.json"),), compare=True)
    columns = {"predicted": [0, 1], "top": [[0, 1], [1, 0]], "scores": [[0.2, 0.1], [0.3, 0.1]]}

    def write(name: str, keys: list[str], labels: list[int], classes: int = 2) -> None:
        write_metrics(tmp_path / f"{name}.json", make_metrics("zeroshot_classification", {"acc1": 0.5}))
        path, rows = predictions_path(tmp_path / f"{name}.json"), columns | {"key": keys, "label": labels}
        write_predictions(path, "classification", "m", "d", classes, rows)

    write("a", ["x", "y"], [0, 1])
    for keys, labels, classes, message in (
        (["x", "z"], [0, 1], 2, "2 of d, 2 of d, 1 in both"),
        (["x", "y"], [0, 0], 2, "other classes"),
        (["x", "y"], [0, 1], 3, "other classes"),
    ):
        write("b", keys, labels, classes)
        with pytest.raises(ClipcidError, match=message):
            compare_results(settings)
    write("b", ["y", "x"], [1, 0])  # the order of the rows does not matter
    assert compare_results(settings).images == 2


def test_scores_of_other_prompts_are_told_apart(tmp_path: Path) -> None:
    """Of the same model, data and classes: only the sidecars know that the templates were others."""
    columns = {"key": ["x", "y"], "label": [0, 1], "predicted": [0, 1], "top": [[0, 1], [1, 0]], "scores": [[1, 0]] * 2}

    def write(name: str, templates: tuple[str, ...] | None) -> None:
        path = tmp_path / f"{name}.json"
        write_metrics(path, make_metrics("zeroshot_classification", {"acc1": 0.5}))
        write_predictions(predictions_path(path), "classification", "m", "d", 2, columns)
        if templates is not None:
            prompts = {
                "class_names": LinesRecord("folder names", 2, hash_lines(("cat", "dog"))),
                "templates": LinesRecord(f"{name}.txt", len(templates), hash_lines(templates)),
            }
            (path.parent / "sidecars").mkdir(exist_ok=True)
            write_json(
                path.parent / "sidecars" / f"{name}.json",
                make_sidecar(EvaluationSidecar, prompts=msgspec.to_builtins(prompts)),
            )

    def compare() -> tuple[ComparisonResult, str]:
        settings = EvalZeroshotSettings(model=str(tmp_path / "a.json"), data=(str(tmp_path / "b.json"),), compare=True)
        with heard() as told:
            return compare_results(settings), "\n".join(told)

    write("a", ("a {c}",))
    write("b", None)
    result, told = compare()
    assert result.prompts is None
    assert "No entry `prompts` records the class names and templates of B" in told
    write("b", ("a {c}",))
    result, told = compare()
    assert "templates" not in told
    assert result.prompts is not None
    digest = result.prompts["templates"].first.hash
    write("b", ("a {c}", "the {c}"))
    result, told = compare()
    assert "The templates differ, so the scores differ by more than the models" in told
    assert result.prompts is not None
    assert f"of A 1, a.txt ({digest}); of B 2, b.txt ({result.prompts['templates'].second.hash})" in told
    assert result.prompts["class_names"].same
    sidecar = tmp_path / "sidecars" / "b.json"
    sidecar.write_text(sidecar.read_text().replace('"number": 2', '"number": "two"'))
    with pytest.raises(ClipcidError, match="it was edited, or is damaged"):
        compare()
