"""What a batch shows, and the teacher's rows of just that: captions, views, further texts, and a teacher alongside."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY_CONFIG, make_caption, make_image, write_tar, write_tiny_model
from distill_data import train
from PIL import Image
from sidecars import edit_sidecar
from teaching_data import (
    ALONE,
    FP32,
    assert_bytes_are_counted,
    embed_data,
    encode_shown,
    join,
    read_keys,
    read_params,
    shown_views,
    write_captions,
    write_student,
)

from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.formats.embeddings.folder import Embeddings, open_embeddings
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.augment import Augmentation
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.decode import decode_image
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.runtime.models.renderer import Processor
from clipcid_cli.runtime.models.views import MixedView, mix_pixels
from clipcid_cli.steps import cluster
from clipcid_cli.steps.distill import batches
from clipcid_cli.steps.distill.batches import Batches, BatchMaker
from clipcid_cli.steps.distill.online_teacher import describe_weights
from clipcid_cli.steps.distill.stored import TeacherFolders, find_embeddings
from clipcid_cli.steps.distill.training_batch import TrainingBatch
from clipcid_cli.steps.embed.request import ensure_embeddings
from clipcid_cli.steps.embed.result import EmbedCost
from clipcid_cli.steps.settings.balance import BalanceSettings
from clipcid_cli.steps.settings.cluster import ClusterSettings
from clipcid_cli.steps.settings.distill import DistillSettings

COUNTS = (1, 3, 2, 5, 1, 4)
# Batches of 40 pictures hold ten samples, with 1 + 3 pictures each.
MIXED = {
    "views": 3,
    "view_kind": ("crop", "mix,crop"),
    "crop_scale": 0.3,
    "color_jitter": 0.4,
    "gray_probability": 0.2,
    "seed": 5,
    "batch_size": 40,
}


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> ClipModel:
    return load_model(parse_model(str(tiny_model)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of one to five captions an image."""
    return write_captions(tmp_path_factory.mktemp("captions") / "data", COUNTS)


@pytest.fixture(scope="module")
def plain(data: Path, tiny_model: Path) -> Path:
    embed_data(data, tiny_model, data.parent / "plain")
    return data.parent / "plain"


def test_captions_are_drawn_each_with_its_row(data: Path, plain: Path, teacher: ClipModel, tmp_path: Path) -> None:
    run = join(data, plain)
    seen = [set[int]() for _ in range(6)]
    for epoch in range(12):
        rows, batch = run.show(teacher, epoch)
        for place, row in enumerate(rows):
            tokens = teacher.tokenizer([make_caption(100 * row + line) for line in range(COUNTS[row])])
            [caption] = (tokens == batch.tokens[place]).all(dim=1).nonzero().flatten().tolist()
            seen[row].add(caption)
        assert (run.teach(batch)[1] - teacher.encode_texts(batch.tokens, FP32)).abs().max() < 6e-4
    assert sum(map(len, seen)) > 12, "most captions are shown in twelve epochs"
    first = shutil.copytree(
        plain, tmp_path / "first", ignore=shutil.ignore_patterns("*.json", "manifest*", "captions*")
    )
    assert join(data, first).inputs.teacher.first_captions, "without rows of the others the first is shown"


def test_parts_of_a_batch_are_copied_by_another_thread(
    data: Path, plain: Path, teacher: ClipModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that trains would leave a GPU without work meanwhile."""
    monkeypatch.setattr(batches, "_MAX_ITEMS", 2)
    threads, copied = list[threading.Thread](), TrainingBatch.copied

    def copy(part: TrainingBatch) -> TrainingBatch:
        threads.append(threading.current_thread())
        return copied(part)

    monkeypatch.setattr(TrainingBatch, "copied", copy)
    run = join(data, plain)
    loaded = Batches(run.inputs, BatchMaker(run.settings, run.inputs, Processor.from_model(teacher)), None, 6, 3, ALONE)
    assert [len(batch) for batch in loaded.load(range(2), 0)] == [6, 6]
    assert len(threads) == 6
    assert threading.current_thread() not in threads


@pytest.mark.parametrize(
    ("embedded", "now", "differing"),
    [
        ((1, 1, 1, 1), (1, 1, 2, 1), "'s2' has 2 captions, but 1 were"),
        ((1, 2, 1, 1), (1, 1, 1, 1), "'s1' has 1 captions, but 2"),
    ],
)
def test_other_captions_than_those_embedded_are_refused(
    embedded: tuple[int, ...], now: tuple[int, ...], differing: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "embedded by"
    made = {"views": 2, "view_kind": ("crop", "mix"), "crop_scale": 0.5, "seed": 7, "text_variants": 2}
    embed_data(write_captions(tmp_path / "then", embedded), tiny_model, folder, batch_size=16, **made)
    changed = write_captions(tmp_path / "now", now)
    with pytest.raises(ClipcidError, match=differing) as raised:
        join(changed, folder)
    assert raised.value.fix.startswith("Run embed again with --overwrite.")


@pytest.fixture(scope="module")
def work(tiny_shards: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with embeddings of the tiny shards and two variants of each caption."""
    folder = tmp_path_factory.mktemp("extra")
    embed_data(tiny_shards, tiny_model, folder / "embeddings" / "tiny", text_variants=2)
    return folder


def test_processes_share_what_one_would_take(work: Path, tiny_shards: Path, teacher: ClipModel) -> None:
    run = join(tiny_shards, work / "embeddings" / "tiny", extra_texts=12)
    assert run.inputs.teacher.extra_texts is not None
    maker = BatchMaker(run.settings, run.inputs, Processor.from_model(teacher))

    def make(step: int, rank: int, size: int) -> TrainingBatch:
        made = Batches(run.inputs, maker, None, 6, 3, DistContext(rank, size, rank, torch.device("cpu")))
        [dealt] = made.deal(range(step, step + 1))
        parts = made.make_here(dealt)
        assert_bytes_are_counted(maker, dealt, parts)
        return made.finish(dealt, parts)

    seen = set()
    for step in (0, 1, 7):
        alone = make(step, 0, 1)
        parts = [make(step, rank, 3) for rank in range(3)]
        assert alone.teacher_extra_eD is not None
        assert torch.equal(torch.cat([part.teacher_extra_eD for part in parts]), alone.teacher_extra_eD)
        assert torch.equal(torch.cat([part.tokens[2:] for part in parts]), alone.tokens[6:])
        rows = alone.teacher_extra_eD.float()
        assert (teacher.encode_texts(alone.tokens[6:], FP32) - rows).abs().max() < 6e-4
        seen.update(map(tuple, alone.tokens[6:].tolist()))
    assert len(seen) > 12, "other steps draw other texts"


def test_further_texts_by_default(work: Path, plain: Path, data: Path, tiny_shards: Path, tmp_path: Path) -> None:
    embeddings = work / "embeddings" / "tiny"
    assert join(tiny_shards, embeddings).inputs.teacher.num_extra_texts(6) == 6
    assert join(tiny_shards, embeddings, preset="dr").inputs.teacher.num_extra_texts(6) == 0, "no loss takes them"
    assert join(data, plain).inputs.teacher.num_extra_texts(6) == 0, "there are none"
    common = {"student": str(write_student(tmp_path)), "embeddings": (embeddings,), "teacher_space": "project"}
    common |= {"preset": "clip-kd", "steps": 3}
    without, _ = train(tmp_path / "a", tiny_shards, **common, extra_texts=0)
    shown, said = train(tmp_path / "b", tiny_shards, **common, extra_texts=5)
    assert "Extra texts, for the text tower alone: from the 2 variants of each sample's captions." in said
    assert "Each step the text tower sees 5 further texts." in said
    assert "Shared space: the teacher's 32 dimensions, by a learned layer per student tower." in said
    assert shown[0]["loss_fd"] != without[0]["loss_fd"]
    assert shown[0]["loss_icl"] == pytest.approx(without[0]["loss_icl"], rel=1e-5)
    parts, _ = train(tmp_path / "c", tiny_shards, accum_freq=4, workers=1, **common, extra_texts=5)
    for one, other in zip(shown, parts, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.fixture(scope="module")
def mixed(tiny_shards: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A crop, a mixture and another crop of each image of the tiny shards."""
    out = tmp_path_factory.mktemp("mixed") / "tiny"
    embed_data(tiny_shards, tiny_model, out, **MIXED)
    return out


def image_of(row: int) -> Image.Image:
    return decode_image(make_image(3 if row == 20 else row))


def test_views_are_replayed_to_the_pixel(mixed: Path, tiny_shards: Path, teacher: ClipModel) -> None:
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


def test_views_of_a_kind_that_is_no_longer_drawn_may_show_anything(mixed: Path, tiny_shards: Path) -> None:
    teacher = join(tiny_shards, mixed).inputs.teacher
    chosen = Augmentation(crop_scale=1.0)
    assert teacher.augmentation(chosen) == Augmentation(crop_scale=0.3, color_jitter=0.4, gray_probability=0.2)
    embeddings = teacher.embeddings
    settings = embeddings.sidecar.settings | {"view_kind": ["strong"], "color_jitter": 0.0, "gray_probability": 0.0}
    embeddings.sidecar = msgspec.structs.replace(embeddings.sidecar, settings=settings)
    shown = teacher.augmentation(chosen)
    assert shown.changes_colors
    assert shown.crop_scale < 0.1


def test_embeddings_with_views_of_a_kind_that_is_no_longer_drawn_are_taken(
    mixed: Path, tiny_shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    data, work = shutil.copytree(tiny_shards, tmp_path / "data"), tmp_path / "work"
    folder = shutil.copytree(mixed, work / "embeddings" / tiny_model.name)
    made = {"view_kind": ["crop", "strong", "mix"], "strong_view": {"crop_scale": 0.3}}
    edit_sidecar(folder / "embed.json", lambda sidecar: sidecar["settings"].update(made))

    def balance() -> Path | EmbedCost:
        settings = BalanceSettings(keep=0.5, data=str(data), work=work)
        return ensure_embeddings(settings, ALONE, data=str(data), model=str(tiny_model))

    def distill(**given: Any) -> TeacherFolders | EmbedCost:
        settings = DistillSettings(student="student.json", teacher=(str(tiny_model),), work=work, **given)
        return find_embeddings(settings, ALONE)

    assert (balance(), distill(), distill(data=str(data))) == (folder, (folder,), (folder,))
    write_tar(data / "99999.tar", [("more.png", make_image(1)), ("more.txt", b"more")])
    for take in (balance, lambda: distill(data=str(data))):
        with pytest.raises(ClipcidError, match="its views are of a kind that is no longer drawn: strong") as refused:
            take()
        command = f"clipcid embed {data} --model {tiny_model} --work {work} --views 3 --crop-scale 0.3"
        flags = (
            "--color-jitter 0.4 --gray-probability 0.2 --view-kind crop --view-kind crop --view-kind mix --overwrite"
        )
        assert refused.value.fix == f"Embed all anew, with such crops: {command} {flags}"


def keep_some(folder: Path, embeddings: Embeddings, rows: list[int]) -> str:
    """Write a keep list of some rows."""
    keys = read_keys(embeddings)
    kept = [row in rows for row in range(len(keys))]
    pq.write_table(pa.table({"key": keys, "kept": kept}), folder / "keep.parquet")
    return str(folder / "keep.parquet")


def test_only_what_is_trained_on_is_mixed(mixed: Path, tiny_shards: Path, teacher: ClipModel, tmp_path: Path) -> None:
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


@pytest.fixture(scope="module")
def clustered(tiny_shards: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with the tiny teacher's embeddings and four clusters."""
    work = tmp_path_factory.mktemp("online") / "work"
    embed_data(tiny_shards, tiny_model, work / "embeddings" / "tiny")
    cluster.run(ClusterSettings(work=work, num_clusters=4, iterations=3, device="cpu"))
    return work


def test_it_sees_what_the_student_sees(tiny_shards: Path, teacher: ClipModel, clustered: Path) -> None:
    augmentation = {"crop_scale": 0.3, "color_jitter": 0.5, "gray_probability": 0.2}
    run = join(tiny_shards, clustered / "embeddings" / "tiny", online_teacher=True, **augmentation)
    config: dict[str, Any] = TINY_CONFIG | {"text_cfg": TINY_CONFIG["text_cfg"] | {"context_length": 7}}
    config["vision_cfg"] = TINY_CONFIG["vision_cfg"] | {"image_size": 48}
    larger = load_model(parse_model(str(write_tiny_model(clustered.parent / "other", config))))
    for model in (teacher, larger):
        _, batch = run.show(teacher, 1, model)
        size, length = model.info.image_size[0], model.info.context_length
        assert batch.teacher_pixels is not None
        assert batch.teacher_tokens is not None
        assert batch.teacher_pixels.shape == (24, size, size, 3)
        assert batch.teacher_tokens.shape == (24, length)
        told = run.teach(batch, 32, model)
        expected = encode_shown(model, run.show(model, 1)[1])
        for one, other in zip(told, expected, strict=False):
            np.testing.assert_allclose(one.numpy(), other, atol=1e-5)
        assert not told[0].is_inference(), "the losses must be able to keep it for their gradients"
    # Same view, another size: the larger picture made small is the smaller one, but for the filter.
    small = torch.nn.functional.interpolate(batch.teacher_pixels.permute(0, 3, 1, 2).float(), 32, mode="area")
    assert (small - batch.pixels.permute(0, 3, 1, 2)).abs().mean() < 8


def test_an_online_teacher_of_another_configuration_is_another_input(teacher: ClipModel) -> None:
    info = msgspec.structs.replace(teacher.info, config=teacher.info.config | {"quick_gelu": True})
    assert describe_weights(dataclasses.replace(teacher, info=info)).content != describe_weights(teacher).content


def test_it_teaches_as_its_embeddings(tiny_shards: Path, tiny_model: Path, clustered: Path, tmp_path: Path) -> None:
    # Stored rows are compared with in fp32: bf16, which `auto` takes on CPUs with matrix units, is off by more.
    common = {"student": str(write_student(tmp_path)), "crop_scale": 1.0, "teacher_space": "pca"}
    common |= {"precision": "fp32", "preset": "cid"}
    stored, _ = train(clustered, tiny_shards, name="stored", **common)
    online, said = train(
        clustered, tiny_shards, name="online", teacher=(str(tiny_model),), online_teacher=True, **common
    )
    assert "Online teacher: 1.6 M parameters, 32 px, 12 tokens" in said
    for one, other in zip(stored, online, strict=True):
        for name in ("loss", "loss_clip", "loss_instance", "loss_cluster"):
            assert other[name] == pytest.approx(one[name], abs=2e-3), name
    assert online != stored, "rows are not rounded to float16 on the way"
    other = write_tiny_model(tmp_path / "other", seed=3)
    with pytest.raises(
        ClipcidError, match=r"clusters in .* weights blake2b.*the teacher is .*, weights blake2b"
    ) as raised:
        train(clustered, tiny_shards, name="third", teacher=(str(other),), online_teacher=True, **common)
    assert f"clipcid embed {tiny_shards} --model {other}" in raised.value.fix
