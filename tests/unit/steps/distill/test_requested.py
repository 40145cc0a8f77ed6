"""What a run asks the teacher's embeddings for by name, and they do not hold: refused with the command that makes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from teaching_data import embed_data, join, train, write_student

from clipcid_cli.errors import ClipcidError
from clipcid_cli.steps.embed import encoder


@pytest.fixture(scope="module")
def folders(tiny_shards: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Embeddings with views, and of images alone."""
    root = tmp_path_factory.mktemp("requested")
    embed_data(tiny_shards, tiny_model, root / "views", views=1)
    embed_data(tiny_shards, tiny_model, root / "images", text=False, fast_decode=True)
    return {"views": root / "views", "images": root / "images"}


@pytest.mark.parametrize(
    ("kind", "asked", "message", "flags"),
    [
        ("views", {"extra_texts": 4}, "but there are no texts", " --views 1 --text-variants 4"),
        ("images", {"views": "stored"}, "--views stored, but .* no views", " --no-text --views 4 --view-kind mix"),
        ("images", {"extra_texts": 4}, "but there are no texts", " --fast-decode --text-variants 4"),
    ],
)
def test_embeddings_that_lack_it(
    kind: str,
    asked: dict[str, Any],
    message: str,
    flags: str,
    folders: dict[str, Path],
    tiny_shards: Path,
    tiny_model: Path,
) -> None:
    with pytest.raises(ClipcidError, match=message) as raised:
        join(tiny_shards, folders[kind], preset="clip", loss=("clip=0", "fd=1"), **asked)
    command = "clipcid embed" + raised.value.fix.split("clipcid embed")[-1]
    expected = f"clipcid embed {tiny_shards} --model {tiny_model} --out {folders[kind]} --overwrite{flags}"
    made = json.loads((folders[kind] / "embed.json").read_text())["settings"]
    expected += f" --precision {made['precision']} --batch-size {made['batch_size']}"
    assert sorted(command.split(" --")) == sorted(expected.split(" --"))


def test_none_are_made_without_it(
    tiny_shards: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("embedding began")

    monkeypatch.setattr(encoder, "load_model", load)
    common = {"teacher": str(tiny_model), "student": str(write_student(tmp_path)), "preset": "clip-kd"}
    with pytest.raises(ClipcidError, match="holds no views") as raised:
        train(tmp_path / "work", tiny_shards, views="stored", **common)
    command = raised.value.fix.partition("run: ")[2]
    expected = f"clipcid embed {tiny_shards} --work {tmp_path / 'work'} --model {tiny_model} --views 4 --view-kind mix"
    assert sorted(command.split(" --")) == sorted(expected.split(" --"))
