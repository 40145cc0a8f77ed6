"""`embed --texts`: what is looked at before a model is loaded, and folders that hold other embeddings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from balance_data import heard, write_embeddings
from sidecars import make_sidecar, unfinish
from teaching_data import embed_data

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.sidecar import EmbedSidecar
from clipcid_cli.steps.embed import encoder
from clipcid_cli.steps.embed import run as embed
from clipcid_cli.steps.settings.embed import EmbedSettings


def embed_lines(source: Path, model: Path, out: Path, **settings: Any) -> tuple[dict[str, Any], str]:
    given = {"precision": "fp32", "batch_size": 4, "workers": 0, "device": "cpu"} | settings
    with heard() as told:
        result = embed.run(EmbedSettings(texts=source, model=str(model), out=out, **given))
    return msgspec.to_builtins(result), "\n".join(told)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lines") / "lines.txt"
    path.write_text("\n".join(f"a photo of {number} dogs" for number in range(6)))
    return path


@pytest.fixture(scope="module")
def texts(lines: Path, tiny_model: Path) -> Path:
    embed_lines(lines, tiny_model, lines.parent / "texts")
    return lines.parent / "texts"


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(encoder, "load_model", load)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("kind", ["images", "begun", "foreign", "foreign texts"])
def test_texts_leave_other_embeddings_alone(kind: str, lines: Path, tiny_model: Path, tmp_path: Path) -> None:
    rows = np.eye(5, 32, dtype=np.float16)
    folder = write_embeddings(tmp_path / "out", rows, texts=rows)
    if kind in ("images", "begun"):
        (folder / "embed.json").write_text(json.dumps(make_sidecar(EmbedSidecar)))
    if kind == "begun":
        unfinish(folder, "embed")
    if kind == "foreign texts":
        shutil.rmtree(folder / "img_emb")
    before = content(folder)
    expected = "clipcid did not write" if "foreign" in kind else "holds embeddings of images"
    with pytest.raises(ClipcidError, match=expected):
        embed_lines(lines, tiny_model, folder, overwrite=True)
    assert content(folder) == before


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("kind", ["texts", "begun texts", "foreign texts"])
def test_images_leave_texts_alone(kind: str, texts: Path, tiny_shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(texts, folder)
    if kind == "begun texts":
        unfinish(folder, "texts")
    if kind == "foreign texts":
        (folder / "texts.json").unlink()
    before = content(folder)
    with pytest.raises(ClipcidError, match="did not write" if kind == "foreign texts" else "texts without images"):
        embed_data(tiny_shards, tiny_model, folder, overwrite=True)
    assert content(folder) == before


@pytest.mark.usefixtures("no_model")
def test_what_is_finished_is_found_and_compared_without_the_model(lines: Path, texts: Path, tiny_model: Path) -> None:
    before = content(texts)
    for asked in ({}, {"precision": "auto", "batch_size": None}):
        result, said = embed_lines(lines, tiny_model, texts, **asked)
        assert result["texts"] == 6
        assert "already holds the embeddings of" in said
    assert content(texts) == before
    with pytest.raises(ClipcidError, match=r"settings\.batch_size: 4 there, 5 now"):
        embed_lines(lines, tiny_model, texts, batch_size=5)


def test_what_differs_is_refused(lines: Path, texts: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "others.txt").write_text("another text")
    with pytest.raises(ClipcidError, match="made with other settings or inputs"):
        embed_lines(tmp_path / "others.txt", tiny_model, texts)
    damaged = tmp_path / "damaged"
    shutil.copytree(texts, damaged)
    path = damaged / "text_emb" / "text_emb_0000.npy"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ClipcidError, match="has changed since"):
        embed_lines(lines, tiny_model, damaged)
    embed_lines(lines, tiny_model, damaged, overwrite=True)
    assert path.read_bytes() == (texts / "text_emb" / "text_emb_0000.npy").read_bytes()
