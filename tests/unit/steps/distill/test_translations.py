"""The student reads translations of the captions that its teacher has embedded: of a tar's member, a field or a column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from balance_data import heard
from conftest import make_caption, make_image, write_tar
from teaching_data import FP32, embed_data, join

from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps.distill.held_out import HeldOut
from clipcid_cli.steps.distill.samples import list_skipped
from clipcid_cli.steps.settings.distill import DistillSettings

COUNT, WITHOUT = 8, 3


def translate(number: int) -> str:
    return f"un dessin {make_caption(number + 50)}"


def write_members(folder: Path, key: str) -> Path:
    members = list[tuple[str, bytes]]()
    for number in range(COUNT):
        english, french = make_caption(number), "" if number == WITHOUT else translate(number)
        members += [(f"s{number}.png", make_image(number)), (f"s{number}.txt", english.encode())]
        if key == "fr.txt" and french:
            members.append((f"s{number}.fr.txt", french.encode()))
        if key == "json:fr":
            members.append((f"s{number}.json", json.dumps({"fr": french}).encode()))
    write_tar(folder / "0.tar", members)
    return folder


def write_list(folder: Path) -> Path:
    folder.mkdir()
    lines = ["filepath,title,key,fr"]
    for number in range(COUNT):
        (folder / f"{number}.png").write_bytes(make_image(number))
        french = "" if number == WITHOUT else translate(number)
        lines.append(f"{number}.png,{make_caption(number)},s{number},{french}")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder / "list.csv"


@pytest.mark.parametrize("key", ["fr.txt", pytest.param("json:fr", marks=pytest.mark.slow), "fr"])
def test_translations_are_shown_with_the_rows_of_what_they_translate(
    key: str, tiny_model: Path, tmp_path: Path
) -> None:
    data = write_list(tmp_path / "data") if key == "fr" else write_members(tmp_path / "data", key)
    embed_data(data, tiny_model, tmp_path / "rows")
    student = load_model(parse_model(str(tiny_model)))
    with heard() as told:
        run = join(data, tmp_path / "rows", student_caption_key=(key,))
    assert f"The student reads captions {key}, the first of each sample, by the teacher's rows of its own." in told
    rows, batch = run.show(student)
    numbers = [int(ref.key.removeprefix("s")) for ref in run.inputs.refs(run.inputs.training, rows)]
    assert sorted(numbers) == [number for number in range(COUNT) if number != WITHOUT]
    assert batch.tokens.tolist() == student.tokenizer(list(map(translate, numbers))).tolist()
    english = student.encode_texts(student.tokenizer(list(map(make_caption, numbers))), FP32)
    assert (run.teach(batch)[1] - english).abs().max() < 6e-4
    # However many: data are seldom translated whole.
    assert run.inputs.usable.skips.counts == {"no_caption": 1}
    listed = [row for table in list_skipped(run.inputs.dataset, {}) for row in table.to_pylist()]
    assert [(row["key"], row["reason"]) for row in listed] == [(f"s{WITHOUT}", "no_caption")]

    measured = join(data, tmp_path / "rows", student_caption_key=(key,), val_fraction=0.5)
    held_out = HeldOut.read(measured.inputs, student)
    assert held_out is not None
    assert all(sample.captions == (translate(int(sample.key[1:])),) for sample in held_out.samples)


def test_a_key_that_no_sample_has_is_named_as_it_was_given(tiny_model: Path, tmp_path: Path) -> None:
    data = write_members(tmp_path / "data", "fr.txt")
    embed_data(data, tiny_model, tmp_path / "rows")
    with pytest.raises(ClipcidError, match=r"none of 8 samples has a caption de\.txt") as refused:
        join(data, tmp_path / "rows", student_caption_key=("de.txt",))
    assert "Check --student-caption-key" in refused.value.fix


def test_of_several_translations_the_first_is_shown_though_the_teacher_has_embedded_no_captions(
    tiny_model: Path, tmp_path: Path
) -> None:
    members = list[tuple[str, bytes]]()
    for number in range(COUNT):
        translations = [translate(number), "un autre"]
        members += [
            (f"s{number}.png", make_image(number)),
            (f"s{number}.json", json.dumps({"fr": translations}).encode()),
        ]
    data = write_tar(tmp_path / "data" / "0.tar", members).parent
    embed_data(data, tiny_model, tmp_path / "rows", text=False)
    student = load_model(parse_model(str(tiny_model)))
    with heard() as told:
        run = join(data, tmp_path / "rows", preset="cid", loss=("cluster=0",), student_caption_key=("json:fr",))
    assert "The student reads captions json:fr, the first of each sample." in told
    rows, batch = run.show(student)
    numbers = [int(ref.key.removeprefix("s")) for ref in run.inputs.refs(run.inputs.training, rows)]
    assert batch.tokens.tolist() == student.tokenizer(list(map(translate, numbers))).tolist()


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"teacher": ("none",)}, "no loss of the run needs a teacher"),
        ({"online_teacher": True}, "not with --online-teacher"),
        ({"extra_texts": 4}, "not with --extra-texts 4"),
    ],
)
def test_what_does_not_go_with_translations_is_wrong_usage(given: dict[str, Any], wrong: str) -> None:
    with pytest.raises(UsageError, match=wrong):
        DistillSettings(student="student.json", student_caption_key=("fr.txt",), **given)
