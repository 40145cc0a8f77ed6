"""Views and further captions: stored beside the embeddings, and shown again as the teacher saw them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import embed_with_open_clip, make_caption, make_image
from PIL import Image
from teaching_data import (
    FP32,
    embed_data,
    encode_shown,
    join,
    read_params,
    shown_views,
    train,
    write_captions,
    write_student,
)
from torchvision.transforms.functional import resized_crop, to_tensor

from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.formats.embeddings.folder import Embeddings, RowMap, open_embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.runtime.models.augment import Augmentation, View
from clipcid_cli.runtime.models.clip_model import ClipModel, load_model
from clipcid_cli.runtime.models.decode import decode_image
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps.settings.embed import EmbedSettings

VIEWS = {"views": 3, "crop_scale": 0.3, "color_jitter": 0.4, "gray_probability": 0.2, "seed": 5}
COUNTS = (1, 3, 2, 5, 1, 4)


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> ClipModel:
    return load_model(parse_model(str(tiny_model)))


@pytest.fixture(scope="module")
def stored(tiny_shards: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three views of each image of the tiny shards."""
    out = tmp_path_factory.mktemp("views") / "tiny"
    embed_data(tiny_shards, tiny_model, out, **VIEWS)
    return out


def test_views_are_repaired_as_images_are(stored: Path) -> None:
    """Each row is the same to the bit, read alone or among others; captions stay."""
    raw = open_embeddings(stored)
    numbers = np.random.default_rng(0).normal(size=(raw.width, raw.width))
    map_DD = np.round(numbers * 2**16).astype(np.float32) / 2**16
    repaired = raw.mapped(RowMap(map_DD, FileRecord("repair.npz", 1, "a")))
    for kind in (Kind.IMAGES, Kind.VIEWS):
        rows = repaired.rows(kind)
        found = rows.read(0, len(rows))
        exact = raw.rows(kind).read(0, len(rows)).astype(np.float64) @ map_DD.astype(np.float64)
        np.testing.assert_allclose(found, exact / np.linalg.norm(exact, axis=1, keepdims=True), atol=1e-3)
        places = np.array([7, 2, 11])
        np.testing.assert_array_equal(rows.take(places), found[places])
        np.testing.assert_array_equal(rows.read(5, 6)[0], found[5])
    texts = [each.rows(Kind.TEXTS).read(0, raw.num_rows) for each in (raw, repaired)]
    np.testing.assert_array_equal(*texts)


@pytest.fixture(scope="module")
def captioned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data of one to five captions an image, and its embeddings."""
    folder = tmp_path_factory.mktemp("captions")
    data = write_captions(folder / "data", COUNTS)
    embed_data(data, tiny_model, folder / "tiny")
    return data, folder / "tiny"


def read_all(folder: Path) -> dict[str, bytes]:
    files = [
        path for path in folder.rglob("*") if path.suffix in (".npy", ".parquet") and path.name != "manifest.parquet"
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def caption_counts(embeddings: Embeddings) -> list[int]:
    return [count for file in embeddings.files for count in embeddings.counts_of(file).tolist()]


def test_views_are_what_their_parameters_say(stored: Path, tiny_model: Path) -> None:
    import open_clip

    embeddings = open_embeddings(stored)
    assert (embeddings.num_rows, embeddings.num_each(Kind.VIEWS)) == (24, 3)
    assert embeddings.rows(Kind.VIEWS).shape == (72, 32)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tiny_model}")
    boxes = set()
    for row, view in ((0, 0), (0, 2), (13, 1), (14, 0), (23, 2)):
        packed = read_params(embeddings, row, view)
        left, top, right, bottom = (int(edge) for edge in packed[:4])
        boxes.add((left, top, right, bottom))
        image = decode_image(make_image(3 if row == 20 else row))
        crop = to_tensor(resized_crop(image, top, left, bottom - top, right - left, [32, 32], interpolation=3))
        colors = torch.from_numpy(packed[4:].reshape(3, 4))
        shown = (torch.einsum("dc,chw->dhw", colors[:, :3], crop) + colors[:, 3, None, None]).clamp(0, 1)
        with torch.no_grad():
            expected = model.eval().encode_image((shown[None] - 0.5) / 0.5, normalize=True)[0].numpy()
        found = embeddings.rows(Kind.VIEWS).take(np.array([3 * row + view]))[0]
        assert np.abs(found - expected).max() < 6e-4
    assert len(boxes) == 5
    # The image's own row is what it is without views, whatever the shape of its batch.
    plain, _ = embed_with_open_clip(tiny_model, [make_image(number) for number in range(14)], ["a"])
    assert np.abs(embeddings.rows(Kind.IMAGES).read(0, 14) - plain.numpy()).max() < 3e-4


def test_the_same_bytes_for_any_workers_and_batches_of_the_same_size(
    stored: Path, tiny_shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    embed_data(tiny_shards, tiny_model, tmp_path / "two", workers=2, **VIEWS)
    assert read_all(tmp_path / "two") == read_all(stored)
    assert sorted(read_all(stored))[-2:] == ["view_params/view_params_0000.npy", "view_params/view_params_0001.npy"]
    other = tmp_path / "other"
    embed_data(tiny_shards, tiny_model, other, **(VIEWS | {"seed": 6}))
    assert read_all(other)["view_params/view_params_0000.npy"] != read_all(stored)["view_params/view_params_0000.npy"]
    assert read_all(other)["img_emb/img_emb_0000.npy"] == read_all(stored)["img_emb/img_emb_0000.npy"]
    with pytest.raises(ClipcidError, match=r"settings\.views: 3 there, null now"):
        embed_data(tiny_shards, tiny_model, other)
    embed_data(tiny_shards, tiny_model, other, overwrite=True)
    assert not list(other.glob("view_*/*.npy"))


def test_a_replayed_view_is_the_very_picture_the_teacher_embedded(
    stored: Path, tiny_shards: Path, teacher: ClipModel
) -> None:
    run = join(tiny_shards, stored)
    assert run.inputs.augmentation(Augmentation()) == Augmentation(0.3, 0.4, 0.2)
    seen = []
    for epoch in range(4):
        rows, batch = run.show(teacher, epoch)
        images, texts = encode_shown(teacher, batch)
        told = run.teach(batch)
        # float16 storage is all that lies between them.
        assert np.abs(told[0].numpy() - images).max() < 6e-4
        assert np.abs(told[1].numpy() - texts).max() < 6e-4
        views = shown_views(run, rows, batch)
        for place in (0, 7, 23):
            row = rows[place]
            view = View.unpack(read_params(run.embeddings, row, views[place]))
            image = decode_image(make_image(3 if row == 20 else row))
            expected = image.resize((32, 32), Image.Resampling.BICUBIC, box=view.box)
            assert np.array_equal(batch.pixels[place].numpy(), np.asarray(expected))
        seen.append([view for _, view in sorted(zip(rows, views, strict=True))])
    assert (np.sort(seen[:3], axis=0) == np.arange(3)[:, None]).all(), "three epochs show three views"
    assert seen[3] == seen[0]
    assert len(set(seen[0])) == 3, "samples begin with different views"


def test_distill_replays_unless_told_not_to(stored: Path, tiny_shards: Path, tmp_path: Path) -> None:
    student = str(write_student(tmp_path))
    common = {"student": student, "embeddings": stored, "preset": "clip-kd", "teacher_space": "project"}
    replayed, said = train(tmp_path / "a", tiny_shards, **common)
    assert "3 of each image are stored and replayed" in said
    again, _ = train(tmp_path / "b", tiny_shards, workers=2, crop_scale=0.5, **common)
    assert again == replayed, "views decide what is seen, workers do not"
    fresh, said = train(tmp_path / "c", tiny_shards, views="none", **common)
    assert "replayed" not in said
    assert fresh[0]["loss_fd"] != replayed[0]["loss_fd"]


def test_views_need_whole_images() -> None:
    with pytest.raises(UsageError, match="--fast-decode"):
        EmbedSettings(data="x", views=2, fast_decode=True)


def copy_unrecorded(folder: Path, copy: Path) -> None:
    """Copy embeddings without what records their files, so that changed ones are told by their shapes alone."""
    shutil.copytree(folder, copy)
    for name in ("embed.json", "manifest.parquet"):
        (copy / name).unlink()


@pytest.mark.parametrize(
    ("kind", "array", "message"),
    [
        (
            "view_emb",
            np.zeros((14, 2, 32), np.float16),
            r"view_params_0000.npy holds float32 \[14, 3, 16\]; float32 \[14, 2, 16\]",
        ),
        ("view_params", np.zeros((14, 3, 15), np.float32), r"holds float32 \[14, 3, 15\]"),
        ("view_params", None, "no view_params of the same number"),
    ],
)
def test_views_that_do_not_fit_are_refused(
    kind: str, array: np.ndarray | None, message: str, stored: Path, tmp_path: Path
) -> None:
    copy_unrecorded(stored, tmp_path / "copy")
    path = tmp_path / "copy" / kind / f"{kind}_0000.npy"
    if array is None:
        path.unlink()
    else:
        np.save(path, array)
    with pytest.raises(ClipcidError, match=message):
        open_embeddings(tmp_path / "copy")


def test_every_caption_has_its_row(captioned: tuple[Path, Path], tiny_model: Path) -> None:
    _, folder = captioned
    embeddings = open_embeddings(folder)
    assert Kind.FURTHER in embeddings.kinds
    assert caption_counts(embeddings) == list(COUNTS)
    first = [make_caption(100 * number) for number in range(6)]
    lines = [100 * number + line for number, count in enumerate(COUNTS) for line in range(1, count)]
    further = [make_caption(line) for line in lines]
    _, expected = embed_with_open_clip(tiny_model, [make_image(0)], first + further)
    assert np.abs(embeddings.rows(Kind.TEXTS).read(0, 6) - expected[:6].numpy()).max() < 3e-4
    assert embeddings.rows(Kind.FURTHER).shape == (10, 32)
    assert np.abs(embeddings.rows(Kind.FURTHER).read(0, 10) - expected[6:].numpy()).max() < 3e-4


def test_plain_data_has_no_further_files(stored: Path) -> None:
    embeddings = open_embeddings(stored)
    assert Kind.FURTHER not in embeddings.kinds
    assert not (stored / "captions_emb").exists()
    assert caption_counts(embeddings) == [1] * 24


def test_a_caption_is_drawn_anew_each_epoch_with_its_own_row(captioned: tuple[Path, Path], teacher: ClipModel) -> None:
    run = join(*captioned)
    assert not run.inputs.first_captions
    seen = [set[int]() for _ in range(6)]
    for epoch in range(12):
        rows, batch = run.show(teacher, epoch)
        for place, row in enumerate(rows):
            tokens = teacher.tokenizer([make_caption(100 * row + line) for line in range(COUNTS[row])])
            [caption] = (tokens == batch.tokens[place]).all(dim=1).nonzero().flatten().tolist()
            seen[row].add(caption)
        assert (run.teach(batch)[1] - teacher.encode_texts(batch.tokens, FP32)).abs().max() < 6e-4
    assert [len(found) for found in seen][0::4] == [1, 1]
    assert sum(map(len, seen)) > 12, "most captions are shown in twelve epochs"


def test_with_first_captions_alone_those_are_shown(captioned: tuple[Path, Path], tmp_path: Path) -> None:
    data, folder = captioned
    copy_unrecorded(folder, tmp_path / "first")
    shutil.rmtree(tmp_path / "first" / "captions_emb")
    assert join(data, tmp_path / "first").inputs.first_captions


def test_other_captions_than_were_embedded_are_refused(captioned: tuple[Path, Path], tmp_path: Path) -> None:
    changed = write_captions(tmp_path / "changed", (1, 3, 2, 4, 1, 4))
    with pytest.raises(ClipcidError, match="Sample 's3' has 4 captions, but 5 were embedded") as raised:
        join(changed, captioned[1])
    assert raised.value.fix.startswith(f"Run: clipcid embed {changed} --model ")


def test_counts_that_do_not_add_up_are_refused(captioned: tuple[Path, Path], tmp_path: Path) -> None:
    copy_unrecorded(captioned[1], tmp_path / "copy")
    path = tmp_path / "copy" / "captions_emb" / "captions_emb_0000.npy"
    np.save(path, np.load(path)[:-1])
    with pytest.raises(ClipcidError, match=r"has 2 rows; .* counts 3 captions after the first"):
        caption_counts(open_embeddings(tmp_path / "copy"))
