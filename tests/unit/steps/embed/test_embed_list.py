"""`embed` of a list: what is said before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import make_image

from clipcid_cli.errors import ClipcidError
from clipcid_cli.steps.embed import run as embed
from clipcid_cli.steps.settings.embed import EmbedSettings


def embed_list(source: Path, model: Path, **flags: Any) -> None:
    out = source.parent / "out"
    given = {"precision": "fp32", "batch_size": 4, "workers": 0, "device": "cpu"} | flags
    embed.run(EmbedSettings(data=str(source), model=str(model), work=source.parent / "work", out=out, **given))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(make_image(number))
    path = tmp_path / "list.csv"
    path.write_text("filepath,title,Nr\n" + "".join(f"{number}.png,a cat,n{number}\n" for number in range(4)))
    return path


def test_a_list_that_is_read_by_other_flags_is_not_called_changed(table: Path, tiny_model: Path) -> None:
    embed_list(table, tiny_model)
    with pytest.raises(ClipcidError, match="other settings or inputs") as refused:
        embed_list(table, tiny_model, key_column="Nr")
    assert refused.value.message.splitlines()[1:] == ['  settings.key_column: "key" there, "Nr" now']
    table.write_text(table.read_text().replace("a cat", "a dog"))
    with pytest.raises(ClipcidError, match="other settings or inputs") as refused:
        embed_list(table, tiny_model)
    assert refused.value.message.splitlines()[1:] == [f"  data: {table} has changed"]
    other = table.rename(table.with_name("other.csv"))
    with pytest.raises(ClipcidError, match="other settings or inputs") as refused:
        embed_list(other, tiny_model)
    assert refused.value.message.splitlines()[1:] == [f"  data: {table} before, {other} now"]


def test_where_a_list_has_no_captions_its_columns_are_named(table: Path, tiny_model: Path) -> None:
    table.write_text(table.read_text().replace("title", "caption"))
    with pytest.raises(ClipcidError) as refused:
        embed_list(table, tiny_model)
    columns = "the list has the columns filepath, caption, Nr."
    assert refused.value.message == f"{table}: no sample of the first shard has a caption; {columns}"
    first, second = refused.value.fix.splitlines()
    assert first == "Name their column with --caption-column."
    assert second == "Or add --no-text to embed the images alone."


def test_images_alone_are_advised_only_where_that_suffices(table: Path, tiny_model: Path) -> None:
    with table.open("a") as file:
        file.write("0.png,,again\n")
    table.write_text(table.read_text().replace("1.png,a cat", "1.png,"))
    for more, suffices in (("", False), ("key", True)):
        flags = {"key_column": "Nr"} if more else {}
        with pytest.raises(ClipcidError, match="cannot be used") as refused:
            embed_list(table, tiny_model, overwrite=True, **flags)
        assert ("--no-text" in refused.value.fix) == suffices, refused.value
