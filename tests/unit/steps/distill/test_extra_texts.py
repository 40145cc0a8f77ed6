"""Further texts: embedded without images, drawn by seed and step, and taught to the text tower by `fd`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_caption
from safetensors.torch import load_file
from sidecars import edit_sidecar
from teaching_data import ALONE, FP32, Listener, embed_data, join, student_side, train, write_student

from clipcid_cli.algorithms.losses.features import feature_distance
from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.formats.data import texts as text_data
from clipcid_cli.formats.embeddings.text_folder import open_texts
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.augment import Processor
from clipcid_cli.runtime.models.clip_model import ClipModel, load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps.distill import batches
from clipcid_cli.steps.distill.batches import Batches, BatchMaker, TrainingBatch
from clipcid_cli.steps.embed import run as embed
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.embed import EmbedSettings

TEXTS = [make_caption(number) for number in range(500, 523)]


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> ClipModel:
    return load_model(parse_model(str(tiny_model)))


def embed_lines(source: Path, model: Path, out: Path, **settings: object) -> Any:
    given = {"precision": "fp32", "batch_size": 4, "workers": 0, "device": "cpu"} | settings
    return embed.run(EmbedSettings(texts=source, model=str(model), out=out, **given), Listener())


@pytest.fixture(scope="module")
def work(tiny_shards: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with embeddings of the tiny shards, two variants of each caption, and texts in files of ten."""
    folder = tmp_path_factory.mktemp("extra")
    embed_data(tiny_shards, tiny_model, folder / "embeddings" / "tiny", text_variants=2)
    (folder / "lines.txt").write_text("\n".join(TEXTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_data, "TEXTS_A_SHARD", 10)
        result = embed_lines(folder / "lines.txt", tiny_model, folder / "texts" / "tiny")
        assert (result.texts, result.skipped) == (23, {})
        embed_lines(folder / "lines.txt", tiny_model, folder / "again", workers=1)
        (folder / "again" / "texts.json").unlink()
        (folder / "again" / "text_emb" / "text_emb_0001.npy").unlink()
    return folder


def test_each_text_has_its_row(work: Path, teacher: ClipModel) -> None:
    texts = open_texts(work / "texts" / "tiny")
    assert texts.rows.shape == (23, 32)
    assert texts.lines.batch_sizes() == [10, 10, 3]
    expected = teacher.encode_texts(teacher.tokenizer(TEXTS), FP32).numpy()
    assert np.abs(texts.rows.read(0, 23) - expected).max() < 6e-4
    for number in (0, 2):
        name = f"text_emb/text_emb_000{number}.npy"
        assert (work / "again" / name).read_bytes() == (work / "texts" / "tiny" / name).read_bytes()


def test_texts_of_another_model_or_damaged_ones_are_refused(
    work: Path, tiny_shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    embeddings = work / "embeddings" / "tiny"
    with pytest.raises(ClipcidError, match="There are none in"):
        join(tiny_shards, embeddings, extra_texts=4, texts=work / "again")
    copied = tmp_path / "texts"
    embed_lines(work / "lines.txt", tiny_model, copied)
    edit_sidecar(copied / "texts.json", lambda found: found["model"].update(weights_hash="another", spec="Other"))
    with pytest.raises(ClipcidError, match=r"were embedded by Other, width 32; .* of .*tiny, other weights, width 32"):
        join(tiny_shards, embeddings, extra_texts=4, texts=copied)
    path = copied / "text_emb" / "text_emb_0000.npy"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ClipcidError, match="text_emb_0000"):
        join(tiny_shards, embeddings, extra_texts=4, texts=copied)


@pytest.mark.parametrize("of_lines", [True, False])
def test_processes_share_what_one_would_take(of_lines: bool, work: Path, tiny_shards: Path, teacher: ClipModel) -> None:
    texts = work / "texts" / "tiny" if of_lines else None
    run = join(tiny_shards, work / "embeddings" / "tiny", extra_texts=12, texts=texts)
    extra = run.inputs.extra_texts
    assert extra is not None
    assert (extra.variants is None) == of_lines
    maker = BatchMaker(run.settings, run.inputs, Processor.of(teacher))

    def make(step: int, rank: int, size: int) -> TrainingBatch:
        batches = Batches(run.inputs, maker, None, 6, 3, DistContext(rank, size, rank, torch.device("cpu")))
        [dealt] = batches.deal(range(step, step + 1))
        return batches.finish(dealt, batches.make(dealt))

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


def test_parts_of_a_batch_are_joined_in_order(
    work: Path, tiny_shards: Path, teacher: ClipModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = join(tiny_shards, work / "embeddings" / "tiny", extra_texts=12, color_jitter=0.5)
    _, whole = run.show(teacher)
    monkeypatch.setattr(batches, "_MAX_ITEMS", 5)
    _, joined = run.show(teacher)
    for field in dataclasses.fields(whole):
        one, other = getattr(whole, field.name), getattr(joined, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name


def test_fd_takes_the_mean_over_captions_and_further_texts() -> None:
    random = np.random.default_rng(0)
    rows = [torch.from_numpy(random.normal(size=(5, 7))) for _ in range(4)]
    extra, taught = (torch.from_numpy(random.normal(size=(3, 7))) for _ in range(2))
    image, text, teacher_image, teacher_text = rows
    batch = dataclasses.replace(
        student_side(5, 7),
        image_BD=image,
        text_BD=text,
        teacher_image_BD=teacher_image,
        teacher_text_BD=teacher_text,
        extra_text_ED=extra.clone().requires_grad_(),
        teacher_extra_text_ED=taught,
        num_extra=3,
    )
    of_images = sum(float(((image[i] - teacher_image[i]) ** 2).sum()) for i in range(5)) / 5
    of_texts = sum(float(((text[i] - teacher_text[i]) ** 2).sum()) for i in range(5))
    of_texts = (of_texts + sum(float(((extra[i] - taught[i]) ** 2).sum()) for i in range(3))) / 8
    loss = feature_distance(batch)
    assert float(loss.detach()) == pytest.approx(of_images + of_texts, rel=1e-12)
    loss.backward()
    assert batch.extra_text_ED is not None
    assert batch.extra_text_ED.grad is not None
    np.testing.assert_allclose(batch.extra_text_ED.grad.numpy(), 2 * (extra - taught).numpy() / 8, rtol=1e-12)
    of_extra = sum(float(((extra[i] - taught[i]) ** 2).sum()) for i in range(3)) / 3
    without_captions = feature_distance(dataclasses.replace(batch, teacher_text_BD=None))
    assert float(without_captions.detach()) == pytest.approx(of_images + of_extra, rel=1e-12)


def test_they_train_the_text_tower_and_parts_change_nothing(work: Path, tiny_shards: Path, tmp_path: Path) -> None:
    student = str(write_student(tmp_path))
    common = {"student": student, "embeddings": work / "embeddings" / "tiny", "preset": "clip-kd"}
    common |= {"teacher_space": "project", "steps": 3}
    without, _ = train(tmp_path / "a", tiny_shards, **common, extra_texts=0)
    given = {"extra_texts": 5, "texts": work / "texts" / "tiny"}
    shown, said = train(tmp_path / "b", tiny_shards, **common, **given)
    assert f"Extra texts, for the text tower alone: of {work / 'texts' / 'tiny'}, 23 texts." in said
    assert "Each step the text tower sees 5 further texts." in said
    assert shown[0]["loss_fd"] != without[0]["loss_fd"]
    assert shown[0]["loss_icl"] == pytest.approx(without[0]["loss_icl"], rel=1e-5)
    parts, _ = train(tmp_path / "c", tiny_shards, accum_freq=4, workers=1, **common, **given)
    for one, other in zip(shown, parts, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_embeddings_of_images_alone_teach_the_text_tower_by_them(
    work: Path, tiny_shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    embed_data(tiny_shards, tiny_model, tmp_path / "images", text=False)
    common = {"student": str(write_student(tmp_path)), "embeddings": tmp_path / "images", "teacher_space": "project"}
    common |= {"preset": "clip", "loss": ("clip=0", "fd=1"), "steps": 2, "lr": 0.01, "wd": 0.0}
    students = []
    for seen, extra in enumerate((1, 5)):
        given = {"extra_texts": extra, "texts": work / "texts" / "tiny"}
        train(tmp_path / str(seen), tiny_shards, **common, **given)
        [path] = (tmp_path / str(seen)).rglob("open_clip_model.safetensors")
        students.append(load_file(path))
    assert not torch.equal(*(state["text_projection"] for state in students)), "other texts, another text tower"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "cid"}, "no loss of the run takes texts without images"),
        ({"preset": "clip-kd", "freeze_text": True}, "not with --freeze-text"),
        ({"preset": "clip-kd", "online_teacher": True}, "not with --online-teacher"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DistillSettings(student="x", extra_texts=4, **settings)


def test_without_any_texts_the_command_is_named(tiny_shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    embed_data(tiny_shards, tiny_model, tmp_path / "tiny")
    with pytest.raises(ClipcidError, match="--extra-texts 4, but there are no texts") as raised:
        join(tiny_shards, tmp_path / "tiny", extra_texts=4)
    assert "--text-variants 4" in raised.value.fix


def test_by_default_they_are_as_many_as_samples_where_there_are_any(
    work: Path, tiny_shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    embeddings = work / "embeddings" / "tiny"
    run = join(tiny_shards, embeddings)
    assert run.inputs.num_extra_texts(6) == 6
    assert run.inputs.extra_texts.variants is not None
    run = join(tiny_shards, embeddings, texts=work / "texts" / "tiny")
    assert run.inputs.extra_texts.variants is None, "they are lines"
    assert join(tiny_shards, embeddings, preset="dr").inputs.num_extra_texts(6) == 0, "no loss takes them"
    embed_data(tiny_shards, tiny_model, tmp_path / "tiny")
    assert join(tiny_shards, tmp_path / "tiny").inputs.num_extra_texts(6) == 0, "there are none"
    common = {
        "student": str(write_student(tmp_path)),
        "teacher_space": "project",
        "steps": 1,
        "batch_size": 6,
        "preset": "fd-instance",
    }
    _, said = train(tmp_path / "run", tiny_shards, embeddings=embeddings, **common)
    assert "Each step the text tower sees 6 further texts." in said


def test_texts_are_embedded_alone() -> None:
    with pytest.raises(UsageError, match="--texts embeds a file of texts alone"):
        EmbedSettings(texts=Path("x"), data="y")


def test_variants_are_of_the_shards_that_the_batch_reads(tiny_shards: Path, work: Path) -> None:
    run, read = join(tiny_shards, work / "embeddings" / "tiny", extra_texts=12), list[int]()
    for dealt in Batches(run.inputs, lambda _: NotImplemented, None, 1, 3, ALONE).deal(range(240)):
        [part] = dealt.work
        [item] = part.items
        assert {text.sample.part.path for text in part.extra_texts if text.sample} == {item.sample.part.path}
        assert len(part.extra_texts) == 12
        read += [text.row for text in part.extra_texts]
    rows, counts = np.unique(read, return_counts=True)
    assert rows.tolist() == list(range(48)), "all variants come up"
    assert counts.max() < 3 * counts.min(), "about equally often"
