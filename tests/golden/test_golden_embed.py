"""Embedding: the rows of the shipped data, in whatever form it is given, interrupted or not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import Clipcid, kill_when, write_tar
from golden import (
    FLAGS,
    RECORDING_ROWS,
    REFERENCES,
    ROWS,
    SHARDS,
    Arrays,
    ask,
    assert_same,
    check,
    make_place,
    plain,
    read_metadata,
    read_rows,
    read_samples,
    read_table,
)
from shard_server import serve

DRAWN = ("--crop-scale", 0.3, "--color-jitter", 0.4, "--gray-probability", 0.2)
AUGMENTED = ("--views", 2, "--view-kind", "crop,mix", *DRAWN, "--text-variants", 2)
KINDS = ("img_emb", "text_emb", "view_emb", "view_params", "variant_emb")
# Of an entry of a unit row in float16: two processors round differently.
TOLERANCE = 3e-4
# Samples that are embedded again in other forms: more than a batch of 64.
PART = 96


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("embed"))


@pytest.fixture(scope="module")
def embedded(place: Path) -> Any:
    """The answer of embedding two shards with views and text variants, in the work directory ``whole``."""
    return ask(place, "embed", SHARDS, "--model", "teacher", *AUGMENTED, "--work", "whole")


def read_embeddings(folder: Path) -> Arrays:
    return {kind: read_rows(folder, kind) for kind in KINDS} | read_metadata(folder)


def record_rows(folder: Path) -> None:
    """Make a folder's rows and metadata the fixed input of all that follows, as another tool would leave them."""
    shutil.rmtree(ROWS, ignore_errors=True)
    for kind in ("img_emb", "text_emb"):
        shutil.copytree(folder / kind, ROWS / kind)
    (ROWS / "metadata").mkdir()
    for path in (folder / "metadata").glob("*.parquet"):
        pd.DataFrame(read_table(path)).to_parquet(ROWS / "metadata" / path.name, index=False)


def record_references(place: Path) -> None:
    """Make the rows of the retrieval images the fixed references of balancing."""
    ask(place, "embed", "data/retrieval/test", "--model", "teacher", "--no-text", "--work", "of-references")
    shutil.rmtree(REFERENCES, ignore_errors=True)
    shutil.copytree(place / "of-references" / "embeddings" / "teacher" / "img_emb", REFERENCES / "img_emb")


def test_images_captions_views_and_variants(place: Path, embedded: Any) -> None:
    folder = place / "whole" / "embeddings" / "teacher"
    if RECORDING_ROWS:
        record_rows(folder)
        record_references(place)
    found = read_embeddings(folder)
    assert_same(read_metadata(folder), read_metadata(ROWS))
    rows = {kind: found[kind] for kind in ("img_emb", "text_emb")}
    assert_same(rows, {kind: read_rows(ROWS, kind) for kind in rows}, arrays_within=TOLERANCE)
    augmented = {kind: found[kind][::53] for kind in ("view_emb", "variant_emb")}
    check("embed-augmented", augmented, arrays_within=TOLERANCE)
    check("embed-view-params", {"view_params": found["view_params"][::53]}, arrays_within=1e-6)
    check("embed", {"json": plain(embedded)})


@pytest.fixture(scope="module")
def forms(place: Path) -> Path:
    """The first samples of the first shard as a folder of images, a list, a CLIP_benchmark split and a lone tar."""
    members = read_samples(PART)
    keys = [name.removesuffix(".txt") for name, _ in members if name.endswith(".txt")]
    forms = place / "forms"
    (forms / "images").mkdir(parents=True)
    for name, data in members:
        if not name.endswith(".json"):
            (forms / "images" / name).write_bytes(data)
    captions = {name.removesuffix(".txt"): data.decode() for name, data in members if name.endswith(".txt")}
    listed = {"filepath": [f"images/{key}.webp" for key in keys], "title": map(captions.get, keys), "key": keys}
    pd.DataFrame(listed).to_csv(forms / "list.csv", index=False)
    write_tar(forms / "split" / "0.tar", members)
    (forms / "split" / "nshards.txt").write_text("1\n")
    write_tar(forms / "served" / "00000.tar", members)
    return forms


@pytest.mark.parametrize("form", ["folder", "list", "split", "url"])
def test_other_forms_of_the_data_have_the_same_rows(place: Path, embedded: Any, forms: Path, form: str) -> None:
    data = {"folder": "forms/images", "list": "forms/list.csv", "split": "forms/split"}
    with serve(forms / "served") as server:
        source = data.get(form, f"{server.url}/00000.tar")
        cache = {"CLIPCID_CACHE": str(place / "cache")}
        ask(place, "embed", source, "--model", "teacher", "--work", form, env=cache)
    kinds = ("img_emb", "text_emb")
    folders = {"found": place / form / "embeddings" / "teacher", "whole": place / "whole" / "embeddings" / "teacher"}
    found, whole = (
        {kind: read_rows(folder, kind) for kind in kinds} | read_metadata(folder) for folder in folders.values()
    )
    assert len(found["key"]) == PART
    # A folder is in the order of its names; a list and a tar are in their own.
    where = {key: row for row, key in enumerate(whole["key"])}
    order = [where[key] for key in found["key"]]
    assert form == "folder" or order == list(range(PART))
    columns = (*kinds, "key", "caption")
    assert_same(
        {name: found[name] for name in columns}, {name: whole[name][order] for name in columns}, arrays_within=TOLERANCE
    )


@pytest.fixture(scope="module")
def few(place: Path) -> Arrays:
    """Rows of two small shards with views and text variants; they are in the folder ``few``."""
    members = read_samples(PART)
    middle = len(members) * 3 // 4 // 3 * 3  # of an image, a caption and attributes each
    write_tar(place / "few" / "00000.tar", members[:middle])
    write_tar(place / "few" / "00001.tar", members[middle:])
    ask(place, "embed", "few", "--model", "teacher", *AUGMENTED, "--work", "few-whole")
    return read_embeddings(place / "few-whole" / "embeddings" / "teacher")


def test_one_thread_and_two_workers_have_the_same_rows(
    place: Path, few: Arrays, binary: Clipcid, tmp_path: Path
) -> None:
    flags = [2 if before == "--workers" else word for before, word in zip(("", *FLAGS), FLAGS, strict=False)]
    binary("embed", place / "few", "--model", place / "teacher", *AUGMENTED, *flags, env={"OMP_NUM_THREADS": "1"})
    assert_same(read_embeddings(tmp_path / "clipcid-work" / "embeddings" / "teacher"), few)


def test_killed_and_repeated_has_the_same_rows(place: Path, few: Arrays) -> None:
    command = ("embed", "few", "--model", "teacher", *AUGMENTED, "--work", "killed")
    killed = place / "killed"
    kill_when(killed, "img_emb_0000.npy", ("img_emb_0001.npy", "embed.json"), *command, *FLAGS, cwd=place)
    ask(place, *command)
    assert_same(read_embeddings(killed / "embeddings" / "teacher"), few)
