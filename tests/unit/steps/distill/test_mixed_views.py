"""Strong and mixed views: embedded by the teacher as their parameters say, and replayed to the pixel."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

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
    train,
    write_student,
)

from clipcid_cli.errors import UsageError
from clipcid_cli.formats.embeddings.folder import Embeddings, open_embeddings
from clipcid_cli.runtime.models.augment import MixedView, mix_pixels
from clipcid_cli.runtime.models.clip_model import ClipModel, load_model
from clipcid_cli.runtime.models.decode import decode_image, read_image
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps import encode
from clipcid_cli.steps.settings.embed import EmbedSettings

# Batches of 40 pictures hold ten samples, with 1 + 3 pictures each.
VIEWS = {"views": 3, "view_kind": ("strong", "mix,crop"), "crop_scale": 0.8, "seed": 5, "batch_size": 40}


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> ClipModel:
    return load_model(parse_model(str(tiny_model)))


@pytest.fixture(scope="module")
def stored(tiny_shards: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixed") / "tiny"
    embed_data(tiny_shards, tiny_model, out, **VIEWS)
    return out


def image_of(row: int) -> np.ndarray:
    return decode_image(make_image(3 if row == 20 else row))


def test_a_mixture_in_float64() -> None:
    random = np.random.default_rng(0)
    first, second = random.integers(0, 256, (2, 7, 5, 3)).astype(np.uint8)
    maps = random.normal(0, 0.5, (2, 3, 4)).astype(np.float32)
    packed = np.concatenate([np.arange(4), maps[0].ravel(), [0.625, -3], np.arange(4), maps[1].ravel()])
    view = MixedView.unpack(packed.astype(np.float32))
    assert (view.weight, view.partner) == (0.625, -3)
    assert np.array_equal(view.pack(), packed.astype(np.float32))
    colored = [
        np.clip(pixels.astype(np.float64) @ colors[:, :3].T.astype(np.float64) + 255.0 * colors[:, 3], 0, 255)
        for pixels, colors in zip((first, second), maps, strict=True)
    ]
    expected = 0.625 * colored[0] + 0.375 * colored[1]
    assert np.abs(mix_pixels(view, first, second).astype(np.float64) - expected).max() <= 0.5 + 1e-3


def test_kinds_of_views_are_what_their_parameters_say(stored: Path, teacher: ClipModel) -> None:
    embeddings = open_embeddings(stored)
    views = [[MixedView.unpack(read_params(embeddings, row, number)) for number in range(3)] for row in range(24)]
    areas = np.array([[np.ptp(v.first.box[::2]) * np.ptp(v.first.box[1::2]) for v in row] for row in views])
    whole = np.array([image_of(row).width * image_of(row).height for row in range(24)])
    assert (areas[:, 0] / whole).min() < 0.6, "strong crops are small"
    assert (areas[:, 1:] / whole[:, None]).min() > 0.75, "the others are as --crop-scale says"
    identity = np.eye(3, 4, dtype=np.float32)
    assert not any(np.array_equal(row[0].first.colors, identity) for row in views)
    assert all(np.array_equal(row[number].first.colors, identity) for row in views for number in (1, 2))
    weights = np.array([[view.weight for view in row] for row in views])
    assert (weights[:, [0, 2]] == 1).all()
    assert weights[:, 1].min() >= 0.5
    assert weights[:, 1].max() < 1
    assert np.ptp(weights[:, 1]) > 0.3
    partners = np.array([row[1].partner for row in views]) + np.arange(24)
    assert all(partner != row and (partner < 14) == (row < 14) for row, partner in enumerate(partners))
    assert len(set(partners.tolist())) > 8


def test_the_teacher_embedded_the_very_pixels_that_are_replayed(
    stored: Path, tiny_shards: Path, teacher: ClipModel
) -> None:
    run = join(tiny_shards, stored)
    for epoch in range(3):
        rows, batch = run.show(teacher, epoch)
        images, texts = encode_shown(teacher, batch)
        told = run.teach(batch)
        assert np.abs(told[0].numpy() - images).max() < 6e-4
        # A mixed view comes with the caption of its first image, whose weight is at least ½.
        assert np.abs(told[1].numpy() - texts).max() < 6e-4
        for place, (row, number) in enumerate(zip(rows, shown_views(run, rows, batch), strict=True)):
            view = MixedView.unpack(read_params(run.embeddings, row, number))
            first, second = (
                np.asarray(image_of(each).resize((32, 32), 3, box=box))
                for each, box in ((row, view.first.box), (row + int(view.partner), view.second.box))
            )
            expected = first if view.weight == 1 else mix_pixels(view, first, second)
            assert np.array_equal(batch.pixels[place].numpy(), expected)


def keep_some(folder: Path, embeddings: Embeddings, rows: list[int]) -> str:
    """Write a keep list of some rows."""
    keys = read_keys(embeddings)
    kept = [row in rows for row in range(len(keys))]
    pq.write_table(pa.table({"key": keys, "kept": kept}), folder / "keep.parquet")
    return str(folder / "keep.parquet")


def test_images_that_are_not_trained_on_are_not_mixed_in(
    stored: Path, tiny_shards: Path, teacher: ClipModel, tmp_path: Path
) -> None:
    trained = [row for row in range(24) if row % 3]
    keep_list = keep_some(tmp_path, open_embeddings(stored), trained)
    run, mixed, replaced = join(tiny_shards, stored, keep_list=keep_list), 0, 0
    for epoch in range(3):
        rows, batch = run.show(teacher, epoch)
        for row, number in zip(rows, shown_views(run, rows, batch), strict=True):
            view = MixedView.unpack(read_params(run.embeddings, trained[row], 1))
            is_seen = trained[row] + int(view.partner) in trained
            mixed += number == 1
            replaced += not is_seen
            assert number >= 0
            assert is_seen or number != 1
    assert mixed > 3
    assert replaced > 3


def test_without_a_view_that_can_be_shown_the_whole_image_is(
    tiny_shards: Path, tiny_model: Path, teacher: ClipModel, tmp_path: Path
) -> None:
    embed_data(tiny_shards, tiny_model, tmp_path / "tiny", **(VIEWS | {"views": 1, "view_kind": ("mix",)}))
    keep_list = keep_some(tmp_path, open_embeddings(tmp_path / "tiny"), [0, 20])  # of another shard each
    run = join(tiny_shards, tmp_path / "tiny", keep_list=keep_list, crop_scale=0.1, color_jitter=0.5)
    rows, batch = run.show(teacher)
    assert shown_views(run, rows, batch) == [-1, -1]
    assert batch.colors is None
    assert np.abs(run.teach(batch)[0].numpy() - encode_shown(teacher, batch)[0]).max() < 6e-4


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
    assert all((view.partner == 0) == (view.weight == 1) for _, view in views)
    assert MixedView.unpack(read_params(open_embeddings(tmp_path / "one"), 0, 0)).weight == 1
    with pytest.raises(UsageError, match="with --batch-size 5 and 2 views it holds one") as raised:
        embed_data(tmp_path / "one.tar", tiny_model, tmp_path / "five", **(given | {"batch_size": 5}))
    assert "--batch-size 6" in raised.value.fix


def test_images_of_a_batch_are_let_go_one_by_one(
    tiny_model: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, most = list[weakref.ref[Image.Image]](), list[int]()

    def read(*given: Any) -> Any:
        image = read_image(*given)
        held.append(weakref.ref(image))
        most.append(sum(each() is not None for each in held))
        return image

    monkeypatch.setattr(encode, "read_image", read)
    embed_data(tiny_shards, tiny_model, tmp_path / "tiny", **VIEWS)
    assert len(most) == 24
    assert max(most) <= 2, "the one before may live until the next is decoded"


def test_bytes_do_not_depend_on_workers_and_runs_replay(
    stored: Path, tiny_shards: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed_data(tiny_shards, tiny_model, tmp_path / "two", workers=2, **VIEWS)
    for kind in ("view_emb", "view_params"):
        for number in range(2):
            name = f"{kind}/{kind}_000{number}.npy"
            assert (tmp_path / "two" / name).read_bytes() == (stored / name).read_bytes()
    student = str(write_student(tmp_path))
    common = {"student": student, "embeddings": stored, "preset": "clip-kd", "teacher_space": "project"}
    one, said = train(tmp_path / "a", tiny_shards, **common)
    assert "3 of each image are stored and replayed" in said
    # No view is drawn: neither how it would be nor in which worker matters.
    drawn = {"crop_scale": 0.2, "color_jitter": 1.0, "gray_probability": 0.5}
    assert train(tmp_path / "b", tiny_shards, workers=1, **common, **drawn)[0] == one
    other, _ = train(tmp_path / "c", tiny_shards, views="none", **common, **drawn)
    assert other[0]["loss_fd"] != one[0]["loss_fd"]


def test_kinds_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UsageError, match="--view-kind cannot be 'cutmix'") as raised:
        EmbedSettings(data="x", views=2, view_kind=("mix,cutmix",))
    assert "crop, strong, mix" in raised.value.fix
    with pytest.raises(UsageError, match="no --views"):
        EmbedSettings(data="x", view_kind=("mix",))
