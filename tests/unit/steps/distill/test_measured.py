"""What a run measures is what `eval-zeroshot` measures, by the same captions."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from conftest import make_caption, make_image, shard_members, write_class_folders, write_tar
from distill_data import train
from teaching_data import embed_data, write_captions, write_student

from clipcid_cli.errors import ClipcidError
from clipcid_cli.steps.distill.named_data import open_named_data
from clipcid_cli.steps.evaluate import zeroshot
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings


def test_the_held_out_part_is_measured_by_all_captions(tiny_model: Path, tmp_path: Path) -> None:
    data = write_captions(tmp_path / "data", (1, 3, 2, 1, 4, 1, 2, 2, 1, 3, 5, 1, 1, 2, 3, 1))
    embed_data(data, tiny_model, tmp_path / "teacher")
    given = {"student": str(write_student(tmp_path)), "preset": None, "embeddings": (tmp_path / "teacher",), "steps": 1}
    train(tmp_path / "work", data, **given, val_fraction=0.5, batch_size=2, with_report=True)
    run = tmp_path / "work" / "distill" / "run"
    logged = json.loads((run / "results.jsonl").read_text().splitlines()[-1])
    measured = zeroshot.run(EvalZeroshotSettings(work=tmp_path / "work", device="cpu", workers=0))
    assert isinstance(measured, zeroshot.ZeroshotResult)
    assert {name: logged[name] for name in measured.metrics} == pytest.approx(measured.metrics, abs=1e-6)
    assert json.loads((run / "distill.json").read_text())["result"]["chance"] == pytest.approx(measured.chance)
    report = " ".join((run / "report.html").read_text().split())
    assert "Student and teacher" in report
    assert "held-out samples, by all captions" in report
    value = 100 * measured.metrics["image_retrieval_recall@5"]
    chance = 100 * measured.chance["image_retrieval_recall@5"]
    assert re.search(rf'image R@5</td><td class="n">{value:.1f}</td>.*?{chance:.1f}</td></tr>', report)


@pytest.mark.parametrize("form", ["lines", "keys"])
def test_captions_of_eval_data_are_where_those_of_the_training_data_are(
    form: str, tmp_path: Path, tiny_shards: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for number in range(4):
        (other / f"{number}.png").write_bytes(make_image(number))
        (other / f"{number}.txt").write_text("\n".join(make_caption(10 * number + line) for line in range(3)))
    given = {"student": str(write_student(tmp_path)), "preset": None, "teacher": ("none",), "steps": 1}
    given |= {"data": str(tiny_shards)}
    if form == "lines":
        given |= {"caption_lines": True, "eval_data": (str(other),)}
    else:
        # Data with classes needs no captions.
        classes = write_class_folders(tmp_path / "classes", {"a": (0, 1), "b": (2, 3)})
        given |= {"caption_key": ("txt",), "eval_data": (str(classes), str(tiny_shards))}
    train(tmp_path / "work", **given)
    sidecars = tmp_path / "work" / "eval" / "sidecars"
    texts = {
        path.name.split("_")[0]: json.loads(path.read_text())["counts"]["texts"] for path in sidecars.glob("*.json")
    }
    assert texts == {"other": 12} if form == "lines" else {"classes": texts["classes"], tiny_shards.name: 24}


def test_eval_data_without_class_names_is_told_what_reaches_it(tmp_path: Path) -> None:
    data = tmp_path / "flags of all"
    write_tar(data / "0.tar", shard_members(0, 4, captions=False, classes=2))
    settings = DistillSettings(work=tmp_path, student="ViT-B-32", eval_data=(str(data),))
    with pytest.raises(ClipcidError) as caught:
        open_named_data(settings)
    assert caught.value.message == f"--eval-data: {data} has no class names."
    first, second = caught.value.fix.splitlines()
    assert first.startswith("Write one class name per line to classnames.txt in the folder of the data set, or ")
    assert second.startswith("Of the flags of eval-zeroshot only --caption-key and --caption-lines reach --eval-data.")
    assert second.endswith(f"measure it after the training: clipcid eval-zeroshot MODEL '{data}'")
    # What was given for the training data is not advised once more.
    listed = tmp_path / "list.csv"
    listed.write_text("filepath,title\n1.png,café\n", encoding="latin-1")
    with pytest.raises(ClipcidError) as caught:
        open_named_data(dataclasses.replace(settings, eval_data=(str(listed),), list_encoding="latin-1"))
    first, second = caught.value.fix.splitlines()
    assert first == "Only the training data is read by --list-encoding latin-1."
    assert second.endswith(f"clipcid eval-zeroshot MODEL {listed} --list-encoding latin-1")
    (data / "classnames.txt").write_text("one\ntwo\n")
    assert open_named_data(settings).tasks[0].class_names == ("one", "two")
    with pytest.raises(ClipcidError) as caught:
        open_named_data(dataclasses.replace(settings, eval_data=(str(data / "0.tar"),)))
    assert caught.value.fix.startswith("Give a file with one class name per line: --classnames FILE\n")
