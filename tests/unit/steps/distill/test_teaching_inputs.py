"""Embeddings that match the teacher, or teachers, and the data, and hold what a run asks for; else refused with the fix."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from balance_data import heard, write_embeddings
from conftest import TINY_CONFIG, changed, shard_members, write_tar, write_tiny_model
from distill_data import train
from safetensors.numpy import load_file, save_file
from teaching_data import ALONE, embed_data, join, read_keys, write_student

from clipcid_cli.algorithms.losses.shared_space import SharedSpace
from clipcid_cli.algorithms.pairing import summarise_ranks
from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.formats.embeddings.combined import CombinedEmbeddings
from clipcid_cli.formats.embeddings.folder import open_embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps import cluster
from clipcid_cli.steps.distill import run as distill
from clipcid_cli.steps.distill.space import choose_space
from clipcid_cli.steps.distill.stored import open_stored
from clipcid_cli.steps.distill.teachers import Judgement, choose_losses
from clipcid_cli.steps.settings.cluster import ClusterSettings
from clipcid_cli.steps.settings.distill import DistillSettings

WIDTHS = {"one": 32, "two": 24, "vision": 16}


@pytest.fixture(scope="module")
def folders(tiny_shards: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Embeddings with a view of each image, of images alone, and of another tool."""
    root = tmp_path_factory.mktemp("embedded")
    embed_data(tiny_shards, tiny_model, root / "tiny", views=1)
    embed_data(tiny_shards, tiny_model, root / "images", text=False, fast_decode=True)
    rows = np.random.default_rng(0).normal(size=(24, 32)).astype(np.float16)
    write_embeddings(root / "foreign", rows)
    return {name: root / name for name in ("tiny", "images", "foreign")}


def open_for(model: Path, folder: Path) -> None:
    settings = DistillSettings(student="student.json", teacher=(str(model),), embeddings=(folder,))
    open_stored(settings, (folder,), None)


@pytest.mark.parametrize(
    ("part", "change", "both"),
    [
        (
            "preprocess_cfg",
            {"mean": [0.4, 0.5, 0.5]},
            r"preprocessing mean \[0\.5, .*; the teacher .*preprocessing mean \[0\.4, 0\.5, 0\.5\]",
        ),
        (
            "model_cfg",
            {"text_cfg__context_length": 10},
            "tokenizer context_length 12; the teacher .*tokenizer context_length 10",
        ),
        (
            "model_cfg",
            {"text_cfg__heads": 4},
            'architecture text_cfg .*"heads": 2.*; the teacher .*architecture text_cfg .*"heads": 4',
        ),
        ("weights", {}, "weights blake2b:[0-9a-f]{32}; the teacher .*weights blake2b:[0-9a-f]{32}"),
    ],
    ids=["preprocessing", "context", "heads", "weights"],
)
def test_another_teachers_embeddings_are_refused(
    part: str, change: dict[str, Any], both: str, folders: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    open_for(tiny_model, folders["tiny"])
    other = shutil.copytree(tiny_model, tmp_path / "tiny")
    if part == "weights":
        weights = load_file(other / "open_clip_model.safetensors")
        weights["logit_scale"] = np.asarray(weights["logit_scale"] + np.float32(1e-3))
        save_file(weights, other / "open_clip_model.safetensors")
    else:
        config = json.loads((other / "open_clip_config.json").read_text())
        config[part] = changed(config[part], **change)
        (other / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ClipcidError, match=both) as raised:
        open_for(other, folders["tiny"])
    assert re.search(rf"clipcid embed \S+ --model {other}", raised.value.fix)


@pytest.mark.parametrize(
    ("kind", "asked", "message", "flags"),
    [
        ("images", {"views": "stored"}, "--views stored, but .* no views", "--views 4 --view-kind mix"),
        ("images", {"extra_texts": 4}, "but there are no texts", "--text --text-variants 4"),
    ],
)
def test_what_is_asked_for_and_lacking_is_refused_with_the_flags_that_make_it(
    kind: str,
    asked: dict[str, Any],
    message: str,
    flags: str,
    folders: dict[str, Path],
    tiny_shards: Path,
) -> None:
    with pytest.raises(ClipcidError, match=message) as raised:
        join(tiny_shards, folders[kind], preset="clip", loss=("clip=0", "fd=1"), **asked)
    assert f"Run embed again with {flags} --overwrite." in raised.value.fix


def test_keys_of_another_form_are_refused(tiny_shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    embed_data(tiny_shards, tiny_model, tmp_path / "tiny", keys="shard")
    said = "were made with --keys shard, the data is read with --keys sample"
    with pytest.raises(ClipcidError, match=said) as raised:
        join(tiny_shards, tmp_path / "tiny")
    assert raised.value.fix == "Add --keys shard."


def test_samples_without_a_row_are_said_to_be_what_embed_skipped(tiny_model: Path, tmp_path: Path) -> None:
    data = write_tar(tmp_path / "0.tar", [*shard_members(0, 11), ("x.png", b"no image"), ("x.txt", b"a")])
    rows = tmp_path / "tiny"
    embed_data(data, tiny_model, rows, max_bad_fraction=0.5)
    with heard() as told:
        join(data, rows, max_bad_fraction=0.5)
    why = f"which are left out; {rows / 'skipped.parquet'} lists 1 that embed skipped."
    assert f"Without an embedding in {rows}: 1 of 12 samples, {why}" in told


def test_images_alone_are_taught(tiny_shards: Path, tiny_model: Path, folders: dict[str, Path]) -> None:
    run = join(tiny_shards, folders["images"], preset="clip", loss=("fd=1",), teacher_space="pca")
    assert not run.inputs.teacher.first_captions, "any caption may be shown where the teacher knows none"
    rows, batch = run.show(load_model(parse_model(str(tiny_model))))
    for width in (32, 24):
        image, text, _ = run.teach(batch, width)
        assert text is None
        assert image.shape == (24, width)
    stored = run.embeddings.rows(Kind.IMAGES).take(np.array(rows)).astype(np.float32)
    found = image.numpy()
    assert np.corrcoef((found @ found.T).ravel(), (stored @ stored.T).ravel())[0, 1] > 0.95
    # A loss that the run does not have decides nothing: without fd the student's rows are compared with one another only.
    settings = dataclasses.replace(run.settings, preset=None, loss=("instance=0", "crd=1"), teacher_space="auto")
    asked = dataclasses.replace(run.inputs, settings=settings, losses=settings.losses)
    left = dataclasses.replace(asked, losses=settings.losses_near_chance)
    assert choose_space(asked, 24, ALONE) != SharedSpace(32)
    assert choose_space(left, 24, ALONE) == SharedSpace(32)


@pytest.mark.parametrize(
    ("preset", "loss", "followed"),
    [
        ("clip-kd", (), "but followed, as --preset clip-kd says. Try --teacher none without --preset clip-kd."),
        ("clip", ("fd=3",), "but followed, as --loss fd=3 says. Try --teacher none without --loss fd=3."),
        (
            "cid",
            (),
            "and no loss follows its features (--preset cid stays). Try --teacher none without --preset cid.",
        ),
    ],
)
def test_who_has_a_teacher_near_chance_followed_is_said(preset: str, loss: tuple[str, ...], followed: str) -> None:
    pairing = summarise_ranks(np.arange(40), np.full(40, 39))  # as a guess ranks
    settings = DistillSettings(student="student.json", preset=preset, loss=loss)
    with heard() as told:
        assert choose_losses(settings, Judgement(pairing=pairing)) == settings.losses
    assert told[-1].endswith(f": near chance, {followed}")


@pytest.mark.parametrize(
    ("online", "message"),
    [(False, "captions are needed by: crd"), (True, "does not record which model made it")],
)
def test_embeddings_of_another_tool_that_say_too_little_are_refused(
    online: bool, message: str, tiny_shards: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    common = {"student": str(write_student(tmp_path)), "preset": "clip-kd", "online_teacher": online}
    with pytest.raises(ClipcidError, match=message) as raised:
        train(tmp_path / "work", tiny_shards, embeddings=(folders["foreign"],), **common)
    if not online:
        assert raised.value.fix.endswith("Or embed the captions too. Run: clipcid embed DATA --model MODEL --text")


@pytest.fixture(scope="module")
def place(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and their embeddings with views and variants; rows of images alone in another order, without one key."""
    root = tmp_path_factory.mktemp("teachers")
    for seed, name in enumerate(("one", "two")):
        model = write_tiny_model(root / "models" / name, TINY_CONFIG | {"embed_dim": WIDTHS[name]}, seed)
        extras: dict[str, Any] = {"views": 2, "view_kind": ("mix",), "text_variants": 2}
        embed_data(tiny_shards, model, root / "embeddings" / name, **extras)
    keys = [f"{number:06d}" for number in np.random.default_rng(1).permutation(24) if number != 5]
    rows = np.random.default_rng(0).normal(size=(len(keys), WIDTHS["vision"])).astype(np.float16)
    write_embeddings(root / "embeddings" / "vision", rows, keys=keys)
    return root


def teach(place: Path, data: Path, *names: str, **settings: Any) -> tuple[list[int], list[np.ndarray]]:
    """Return the numbers of a batch's samples, and what the teachers tell: rows of images, captions, further texts."""
    folders = tuple(place / "embeddings" / name for name in names)
    run = join(data, folders[0], embeddings=folders, **settings)
    rows, batch = run.show(load_model(parse_model(str(place / "models" / "one"))))
    numbers = [int(sample.key) for sample in run.inputs.refs(run.inputs.training, np.array(rows))]
    found = run.teach(batch, sum(WIDTHS[name] for name in names))
    return numbers, [rows.numpy() for rows in found if rows is not None]


def test_cosines_are_weighted_means_of_views_captions_and_further_texts(place: Path, tiny_shards: Path) -> None:
    one, two = (teach(place, tiny_shards, name)[1] for name in ("one", "two"))
    joint = teach(place, tiny_shards, "one", "two", teacher_weight=(3.0, 1.0))[1]
    assert len(joint) == 3
    for left in range(3):
        for right in range(3):
            expected = 0.75 * one[left] @ one[right].T + 0.25 * two[left] @ two[right].T
            np.testing.assert_allclose(joint[left] @ joint[right].T, expected, atol=2e-3)


def test_what_is_made_of_several_teachers_is_of_their_weights(place: Path) -> None:
    teachers = [open_embeddings(place / "embeddings" / name) for name in ("one", "two")]
    weightings = ((0.5, 0.5), (0.7, 0.3), (0.7, 0.3))
    one, other, again = (
        CombinedEmbeddings(teachers, weights, None).slug_in(WorkDirectory(place)) for weights in weightings
    )
    assert one != other == again
    assert one.startswith("one+two-")


def test_a_teacher_of_images_alone_adds_to_images(place: Path, tiny_shards: Path) -> None:
    """Captions are compared as by the other, images with captions likewise, but for a factor; what one lacks is left out."""
    with pytest.raises(ClipcidError, match=r"1 of 24 samples have no embedding in \S+vision\."):
        teach(place, tiny_shards, "vision", "one")
    strange = place / "embeddings" / "strange"
    write_embeddings(strange, np.eye(16, dtype=np.float16), keys=[f"x{number}" for number in range(16)])
    with pytest.raises(ClipcidError, match=r"strange has none of the 24 keys of \S+one\. .* '000000', .* 'x0'"):
        teach(place, tiny_shards, "one", "strange")
    suffixed = place / "embeddings" / "suffixed"
    write_embeddings(suffixed, np.eye(24, dtype=np.float16), keys=[f"{23 - row:06d}.jpg" for row in range(24)])
    own = r"(\d+) of \1 samples have .* '000000', one of the embeddings' '000000\.jpg'"
    with pytest.raises(ClipcidError, match=own) as refused:
        teach(place, tiny_shards, "suffixed", preset="clip", loss=("fd=1",))
    assert "Write the data's keys into the column key" in refused.value.fix
    with heard() as told:
        numbers, (images, texts) = teach(place, tiny_shards, "vision", "one", max_bad_fraction=0.1, extra_texts=0)
    assert any(
        re.fullmatch(r"Without an embedding in \S+: 1 of 24 samples, which are left out\.", line) for line in told
    )
    assert sorted(numbers) == [number for number in range(24) if number != 5]
    one, vision = (open_embeddings(place / "embeddings" / name) for name in ("one", "vision"))
    keys = list(map(int, read_keys(vision)))
    seen = vision.rows(Kind.IMAGES).take(np.array([keys.index(number) for number in numbers])).astype(np.float32)
    t, u = (one.rows(kind).take(np.array(numbers)).astype(np.float32) for kind in (Kind.IMAGES, Kind.TEXTS))
    for found, expected in (
        (images @ images.T, (seen @ seen.T + t @ t.T) / 2),
        (texts @ texts.T, u @ u.T),
        (images @ texts.T, t @ u.T / math.sqrt(2)),
    ):
        np.testing.assert_allclose(found, expected, atol=2e-3)


def test_images_alone_are_of_data_with_any_captions(place: Path, tiny_shards: Path, tmp_path: Path) -> None:
    work, model = tmp_path / "work", place / "models" / "one"
    embed_data(tiny_shards, model, work / "embeddings" / "one", text=False)
    given: dict[str, Any] = {"student": str(write_student(tmp_path)), "preset": "clip", "loss": ("fd=1",), "steps": 2}
    said = train(work, tiny_shards, teacher=(str(model),), caption_key=("txt",), **given)[1]
    assert "They are of images only" in said


def test_clusters_and_a_run_of_several_teachers(place: Path, tiny_shards: Path, tmp_path: Path) -> None:
    work, folders = tmp_path / "work", tuple(place / "embeddings" / name for name in ("one", "two"))
    common: dict[str, Any] = {"student": str(write_student(tmp_path)), "steps": 2, "embeddings": folders}

    def make_clusters(*of: Path, **settings: Any) -> None:
        given: dict[str, Any] = {"work": work, "num_clusters": 4, "iterations": 3, "device": "cpu", "overwrite": True}
        cluster.run(ClusterSettings(embeddings=of, **given, **settings))

    make_clusters(folders[0])
    with pytest.raises(
        ClipcidError, match=r"clusters in \S+ are of \S+one, the embeddings of \S+one \+ \S+two"
    ) as raised:
        train(work, tiny_shards, **common)
    assert f"--embeddings {folders[0]} --embeddings {folders[1]}" in raised.value.fix
    make_clusters(*folders)
    log, said = train(work, tiny_shards, **common)
    assert "joined by key to rows of width 56; weights 0.5, 0.5" in said
    assert "24 of the teacher's 56 dimensions" in said
    assert train(work, tiny_shards, **common)[0] == log
    weighted = common | {"teacher_weight": (2.0, 1.0), "preset": "clip-kd"}
    with pytest.raises(
        ClipcidError, match=r"are of \S+one \+ \S+two, the embeddings of 0\.667·\S+one \+ 0\.333·\S+two"
    ):
        train(work, tiny_shards, **weighted | {"preset": "cid"}, name="weighted")
    train(work, tiny_shards, **common | {"preset": "clip-kd", "name": "kd"})
    assert json.loads((work / "distill" / "kd" / "distill.json").read_text())["teacher"] == "one + two"
    with pytest.raises(ClipcidError, match="other settings or inputs"):
        train(work, tiny_shards, **weighted, name="kd")


def test_what_is_missing_of_several_teachers_is_named(place: Path, tiny_shards: Path, tmp_path: Path) -> None:
    work, teachers = tmp_path / "work", tuple(str(place / "models" / name) for name in ("one", "two"))
    given: dict[str, Any] = {"work": work, "data": str(tiny_shards), "teacher": teachers, "dry_run": True}
    given |= {"student": str(write_student(tmp_path)), "device": "cpu", "workers": 0}
    with pytest.raises(ClipcidError, match="There are no clusters") as raised:
        distill.run(DistillSettings(**given, preset="cid", teacher_weight=(2.0, 1.0)))
    folders = " ".join(f"--embeddings {work / 'embeddings' / name}" for name in ("one", "two"))
    assert f"clipcid cluster {folders} --teacher-weight 2.0 --teacher-weight 1.0 --work {work}" in raised.value.fix
    with pytest.raises(ClipcidError, match="There are no clusters") as raised:
        distill.run(
            DistillSettings(**given | {"teacher": ()}, preset="cid", embeddings=(place / "embeddings" / "one",))
        )
    assert f"clipcid cluster --embeddings {place / 'embeddings' / 'one'} --work {work}" in raised.value.fix
    with heard() as told:
        distill.run(DistillSettings(**given))
    assert f"That is the cost of {teachers[0]} alone" in told[-1]
    swapped = tuple(place / "embeddings" / name for name in ("two", "one"))
    with pytest.raises(ClipcidError, match="the teacher is") as raised:
        distill.run(DistillSettings(**given, embeddings=swapped))
    assert "Give --teacher in the order of --embeddings." in raised.value.fix


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher": ("a", "b"), "teacher_weight": (1.0,)}, "--teacher-weight was given 1 times, for 2 teachers"),
        ({"teacher": ("a", "b"), "teacher_weight": (1.0, math.inf)}, r"--teacher-weight inf is not in the range x>0"),
        ({"teacher": ("a", "b"), "embeddings": (Path("c"),)}, "--teacher was given 2 times, --embeddings 1"),
        ({"teacher": ("a", "none")}, "--teacher none was given beside other teachers"),
        ({"teacher": ("a", "b"), "online_teacher": True}, "--online-teacher works with one teacher, and there are 2"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DistillSettings(student="s.json", **given)
