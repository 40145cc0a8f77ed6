"""Finished evaluations: when they are taken as they are, what they keep, and that a run that fails leaves them whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import make_image

from clipcid_cli.errors import ClipcidError
from clipcid_cli.steps.evaluate import linear as eval_linear
from clipcid_cli.steps.evaluate import zeroshot as eval_zeroshot
from clipcid_cli.steps.evaluate.result import LinearResult, ZeroshotResult
from clipcid_cli.steps.settings.eval_linear import EvalLinearSettings
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings


def write_photos(folder: Path, seed: int, per_class: int = 4) -> Path:
    """Write one folder of images for each of two classes, every file of 8,000 bytes."""
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for image in range(per_class):
            content = make_image(seed + 100 * number + image).ljust(8000, b"\0")
            assert len(content) == 8000
            (folder / name / f"{image}.png").write_bytes(content)
    return folder


def read_all(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def test_zeroshot_results_are_of_these_images_and_outlive_failures(tiny_model: Path, tmp_path: Path) -> None:
    data = write_photos(tmp_path / "photos", 0)

    def evaluate(**more: Any) -> ZeroshotResult:
        arguments = {"model": str(tiny_model), "data": (str(data),), "work": tmp_path / "work", "workers": 0}
        found = eval_zeroshot.run(EvalZeroshotSettings(**arguments | {"bootstrap": 20} | more))
        assert isinstance(found, ZeroshotResult)
        return found

    first = evaluate(predictions=True)
    assert evaluate().reused
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
    with pytest.raises(ClipcidError, match="8 of 8 samples"):
        evaluate(overwrite=True)
    assert read_all(folder) == before
    write_photos(data, 50)
    replaced = evaluate(overwrite=True)
    assert not replaced.reused
    assert "predictions" not in replaced.files  # those were of the other images
    assert evaluate().reused


def test_a_probe_outlives_failures_and_serves_who_asks_for_no_curve(tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "photos"
    write_photos(data / "train", 0, 8)
    write_photos(data / "test", 50)

    def probe(shots: str | None) -> LinearResult:
        settings = EvalLinearSettings(
            model=str(tiny_model), data=str(data), work=tmp_path / "work", workers=0, shots=shots, shot_repeats=1
        )
        found = eval_linear.run(settings)
        assert isinstance(found, LinearResult)
        return found

    curve = probe("1,2")
    before = read_all(tmp_path / "work" / "eval")
    with pytest.raises(ClipcidError, match="--shots 1000"):
        probe("1000")
    assert read_all(tmp_path / "work" / "eval") == before
    plain = probe(None)
    assert plain == msgspec.structs.replace(curve, reused=True)
    other = probe("2")
    assert not other.reused
    assert [point.shots for point in other.shots] == [2]
