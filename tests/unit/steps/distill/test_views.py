"""Views of images: embedded by the teacher as their parameters say, and replayed to the pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_image, write_tar
from PIL import Image
from teaching_data import (
    embed_data,
    encode_shown,
    join,
    read_keys,
    read_params,
    shown_views,
)

from clipcid_cli.errors import UsageError
from clipcid_cli.formats.embeddings.folder import Embeddings, open_embeddings
from clipcid_cli.runtime.models.augment import MixedView, mix_pixels
from clipcid_cli.runtime.models.clip_model import ClipModel, load_model
from clipcid_cli.runtime.models.decode import decode_image
from clipcid_cli.runtime.models.names import parse_model

# Batches of 40 pictures hold ten samples, with 1 + 3 pictures each.
MIXED = {"views": 3, "view_kind": ("strong", "mix,crop"), "crop_scale": 0.8, "seed": 5, "batch_size": 40}


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> ClipModel:
    return load_model(parse_model(str(tiny_model)))


@pytest.fixture(scope="module")
def mixed(tiny_shards: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A strong view, a mixture and a gentle crop of each image of the tiny shards."""
    out = tmp_path_factory.mktemp("mixed") / "tiny"
    embed_data(tiny_shards, tiny_model, out, **MIXED)
    return out


def image_of(row: int) -> Image.Image:
    return decode_image(make_image(3 if row == 20 else row))


def test_the_teacher_embedded_the_very_pixels_that_are_replayed(
    mixed: Path, tiny_shards: Path, teacher: ClipModel
) -> None:
    run, seen = join(tiny_shards, mixed), []
    for epoch in range(4):
        rows, batch = run.show(teacher, epoch)
        told, shown = run.teach(batch), shown_views(run, rows, batch)
        # A mixed view comes with the caption of its first image, whose weight is at least ½.
        for one, other in zip(told[:2], encode_shown(teacher, batch), strict=True):
            assert np.abs(one.numpy() - other).max() < 6e-4, "float16 storage is all that lies between them"
        for place, (row, number) in enumerate(zip(rows, shown, strict=True)):
            view = MixedView.unpack(read_params(run.embeddings, row, number))
            first, second = (
                np.asarray(image_of(each).resize((32, 32), 3, box=box))
                for each, box in ((row, view.first.box), (row + int(view.partner), view.second.box))
            )
            expected = first if view.weight == 1 else mix_pixels(view, first, second)
            assert np.array_equal(batch.pixels[place].numpy(), expected)
        seen.append([view for _, view in sorted(zip(rows, shown, strict=True))])
    assert (np.sort(seen[:3], axis=0) == np.arange(3)[:, None]).all(), "three epochs show three views"
    assert seen[3] == seen[0]
    assert len(set(seen[0])) == 3, "samples begin with different views"


def keep_some(folder: Path, embeddings: Embeddings, rows: list[int]) -> str:
    """Write a keep list of some rows."""
    keys = read_keys(embeddings)
    kept = [row in rows for row in range(len(keys))]
    pq.write_table(pa.table({"key": keys, "kept": kept}), folder / "keep.parquet")
    return str(folder / "keep.parquet")


def test_images_that_are_not_trained_on_are_not_mixed_in(
    mixed: Path, tiny_shards: Path, teacher: ClipModel, tmp_path: Path
) -> None:
    trained = [row for row in range(24) if row % 3]
    run = join(tiny_shards, mixed, keep_list=keep_some(tmp_path, open_embeddings(mixed), trained))
    num_mixed = num_replaced = 0
    for epoch in range(3):
        rows, batch = run.show(teacher, epoch)
        for row, number in zip(rows, shown_views(run, rows, batch), strict=True):
            view = MixedView.unpack(read_params(run.embeddings, trained[row], 1))
            is_seen = trained[row] + int(view.partner) in trained
            num_mixed += number == 1
            num_replaced += not is_seen
            assert number >= 0
            assert is_seen or number != 1
    assert min(num_mixed, num_replaced) > 3


def test_what_has_no_other_image_is_not_mixed(tiny_model: Path, tmp_path: Path) -> None:
    members = []
    for number in range(4):
        image = b"damaged" if number == 2 else make_image(number)
        members += [(f"s{number}.png", image), (f"s{number}.txt", b"a caption")]
    given = {"views": 2, "view_kind": ("mix",), "max_bad_fraction": 0.5, "batch_size": 12}
    for name, count in (("many", 8), ("one", 2)):
        write_tar(tmp_path / f"{name}.tar", members[:count])
        embed_data(tmp_path / f"{name}.tar", tiny_model, tmp_path / name, **given)
    embeddings = open_embeddings(tmp_path / "many")
    views = [(row, MixedView.unpack(read_params(embeddings, row, number))) for row in range(3) for number in range(2)]
    assert all(row + view.partner in (0, 1, 2) for row, view in views), "rows are counted without the damaged image"
    assert {view.weight == 1 for _, view in views} == {True, False}, "a damaged image is mixed into none"
    assert MixedView.unpack(read_params(open_embeddings(tmp_path / "one"), 0, 0)).weight == 1
    with pytest.raises(UsageError, match="with --batch-size 5 and 2 views it holds one") as raised:
        embed_data(tmp_path / "one.tar", tiny_model, tmp_path / "five", **(given | {"batch_size": 5}))
    assert "--batch-size 6" in raised.value.fix
