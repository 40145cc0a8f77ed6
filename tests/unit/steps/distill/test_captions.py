"""Captions, their variants and further texts: embedded each with its row, and shown with the teacher's row of that text."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_caption
from sidecars import edit_sidecar
from teaching_data import FP32, embed_data, join, train, write_captions, write_student

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data import texts as text_data
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.augment import Processor
from clipcid_cli.runtime.models.clip_model import ClipModel, load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps.distill.batches import Batches, BatchMaker, TrainingBatch
from clipcid_cli.steps.embed import run as embed
from clipcid_cli.steps.settings.embed import EmbedSettings

COUNTS = (1, 3, 2, 5, 1, 4)


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


def test_a_caption_is_drawn_anew_each_epoch_with_its_own_row(
    data: Path, plain: Path, teacher: ClipModel, tmp_path: Path
) -> None:
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
    assert join(data, first).inputs.first_captions, "without rows of the others the first is shown"


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
    made = {"views": 2, "view_kind": ("strong", "mix"), "crop_scale": 0.5, "seed": 7, "text_variants": 2}
    embed_data(write_captions(tmp_path / "then", embedded), tiny_model, folder, batch_size=16, **made)
    changed = write_captions(tmp_path / "now", now)
    with pytest.raises(ClipcidError, match=differing) as raised:
        join(changed, folder)
    # The command makes all that there is, and can be copied.
    words = shlex.split(raised.value.fix.removeprefix("Run: "))
    given = ["--model", str(tiny_model), "--out", str(folder), "--views", "2", "--view-kind", "strong,mix"]
    given += ["--crop-scale", "0.5", "--text-variants", "2", "--seed", "7", "--overwrite"]
    given += ["--precision", "fp32", "--batch-size", "16"]
    assert words[:3] == ["clipcid", "embed", str(changed)]
    assert sorted(words[3:]) == sorted(given)


TEXTS = [make_caption(number) for number in range(500, 523)]


@pytest.fixture(scope="module")
def work(tiny_shards: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with embeddings of the tiny shards, two variants of each caption, and texts in files of ten."""
    folder = tmp_path_factory.mktemp("extra")
    embed_data(tiny_shards, tiny_model, folder / "embeddings" / "tiny", text_variants=2)
    (folder / "lines.txt").write_text("\n".join(TEXTS))
    given = {"precision": "fp32", "batch_size": 4, "workers": 0, "device": "cpu", "model": str(tiny_model)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_data, "TEXTS_A_SHARD", 10)
        embed.run(EmbedSettings(texts=folder / "lines.txt", out=folder / "texts" / "tiny", **given))
    return folder


def test_texts_that_do_not_fit_the_teacher_are_refused(work: Path, tiny_shards: Path, tmp_path: Path) -> None:
    embeddings = work / "embeddings" / "tiny"
    copied = shutil.copytree(work / "texts" / "tiny", tmp_path / "texts")
    edit_sidecar(copied / "texts.json", lambda found: found["model"].update(weights_hash="another", spec="Other"))
    with pytest.raises(ClipcidError, match=r"were embedded by Other, width 32; .* of .*tiny, other weights, width 32"):
        join(tiny_shards, embeddings, extra_texts=4, texts=copied)
    path = copied / "text_emb" / "text_emb_0000.npy"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ClipcidError, match="text_emb_0000"):
        join(tiny_shards, embeddings, extra_texts=4, texts=copied)
    (copied / "texts.json").unlink()
    with pytest.raises(ClipcidError, match="There are none in"):
        join(tiny_shards, embeddings, extra_texts=4, texts=copied)


@pytest.mark.parametrize("of_lines", [True, False])
def test_processes_share_what_one_would_take(of_lines: bool, work: Path, tiny_shards: Path, teacher: ClipModel) -> None:
    texts = work / "texts" / "tiny" if of_lines else None
    run = join(tiny_shards, work / "embeddings" / "tiny", extra_texts=12, texts=texts)
    assert run.inputs.extra_texts is not None
    assert (run.inputs.extra_texts.variants is None) == of_lines
    maker = BatchMaker(run.settings, run.inputs, Processor.of(teacher))

    def make(step: int, rank: int, size: int) -> TrainingBatch:
        made = Batches(run.inputs, maker, None, 6, 3, DistContext(rank, size, rank, torch.device("cpu")))
        [dealt] = made.deal(range(step, step + 1))
        return made.finish(dealt, made.make(dealt))

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


def test_by_default_further_texts_are_as_many_as_samples_where_there_are_any(
    work: Path, plain: Path, data: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    embeddings, lines = work / "embeddings" / "tiny", work / "texts" / "tiny"
    assert join(tiny_shards, embeddings).inputs.num_extra_texts(6) == 6
    given = join(tiny_shards, embeddings, texts=lines).inputs.extra_texts
    assert given is not None
    assert given.variants is None, "they are lines"
    assert join(tiny_shards, embeddings, preset="dr").inputs.num_extra_texts(6) == 0, "no loss takes them"
    assert join(data, plain).inputs.num_extra_texts(6) == 0, "there are none"
    common = {"student": str(write_student(tmp_path)), "embeddings": (embeddings,), "teacher_space": "project"}
    common |= {"preset": "clip-kd", "steps": 3}
    without, _ = train(tmp_path / "a", tiny_shards, **common, extra_texts=0)
    shown, said = train(tmp_path / "b", tiny_shards, **common, extra_texts=5, texts=lines)
    assert f"Extra texts, for the text tower alone: of {lines}, 23 texts." in said
    assert "Each step the text tower sees 5 further texts." in said
    assert shown[0]["loss_fd"] != without[0]["loss_fd"]
    assert shown[0]["loss_icl"] == pytest.approx(without[0]["loss_icl"], rel=1e-5)
    parts, _ = train(tmp_path / "c", tiny_shards, accum_freq=4, workers=1, **common, extra_texts=5, texts=lines)
    for one, other in zip(shown, parts, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
