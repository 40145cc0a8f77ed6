"""Names that are odd but legal: braces, tildes, and bytes that are not UTF-8."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import make_image, shard_members, write_tar
from one_process import OneProcess

LATIN = os.fsdecode(b"caf\xe9")


@pytest.fixture(scope="module")
def clipcid() -> Iterator[OneProcess]:
    process = OneProcess()
    yield process
    process.close()


@pytest.mark.parametrize("name", ["b{1}", "{00..03}", "./~x", "{", "x y\n"])
def test_a_folder_may_be_called_like_a_pattern_or_a_user(
    clipcid: OneProcess, tiny_model: Path, tmp_path: Path, name: str
) -> None:
    write_tar(tmp_path / name / "0.tar", shard_members(0, 4))
    model = "./~model"
    shutil.copytree(tiny_model, tmp_path / "~model")
    found = clipcid("embed", name, "--model", model, "--out", "rows", "--json", cwd=tmp_path)
    assert found.code == 0, found
    assert found.json["images"] == 4


@pytest.mark.parametrize("place", ["image", "member", "shard"])
def test_a_name_that_is_not_utf8_is_told(clipcid: OneProcess, tiny_model: Path, tmp_path: Path, place: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    if place == "image":
        (data / f"{LATIN}.png").write_bytes(make_image(0))
    elif place == "member":
        write_tar(data / "0.tar", [(f"{LATIN}.png", make_image(0))])
    else:
        write_tar(data / f"{LATIN}.tar", shard_members(0, 3))
    found = clipcid("embed", data, "--model", tiny_model, "--no-text", "--out", "rows", cwd=tmp_path)
    assert found.code == 1, found
    assert not found.problems(), found
    assert "the name of a file is not UTF-8: caf" in found.err
    assert not (tmp_path / "rows/embed.json").exists()


def test_data_in_a_folder_that_is_not_utf8_is_fine_and_a_work_directory_there_is_refused(
    clipcid: OneProcess, tiny_model: Path, tmp_path: Path
) -> None:
    write_tar(tmp_path / LATIN / "0.tar", shard_members(0, 4))
    found = clipcid("embed", LATIN, "--model", tiny_model, "--out", "rows", cwd=tmp_path)
    assert found.code == 0, found
    found = clipcid("balance", "--keep", "0.5", "--work", LATIN, "--embeddings", "rows", cwd=tmp_path)
    assert found.code == 2, found
    assert "--work is 'caf\\udce9', which is not UTF-8" in found.err
