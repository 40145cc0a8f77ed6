"""`clipcid embed` from the command line: what it writes, how it resumes, and that its bytes never vary."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import (
    Clipcid,
    Run,
    kill_when,
    make_image,
    run_clipcid,
    run_command,
    shard_members,
    torchrun_command,
    write_tar,
    write_tiny_model,
)
from PIL import Image

from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps.embed.request import embed_images_first
from clipcid_cli.steps.settings.embed import EmbedSettings


def hash_rows(folder: Path) -> dict[str, str]:
    """Hash every file of embeddings; sidecar and manifest have times in them."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in (".npy", ".parquet"))
    files = [path for path in found if "index" not in path.parts and path.name != "manifest.parquet"]
    return {str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest() for path in files}


def read_skipped(path: str) -> list[tuple[str, ...]]:
    return [tuple(row.values()) for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def embedded(tiny_shards: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One plain run in a folder of its own: fp32, batches of 8."""
    folder = tmp_path_factory.mktemp("embedded")
    arguments = ["embed", str(tiny_shards), "--model", str(tiny_model)]
    options = ["--precision", "fp32", "--batch-size", "8", "--json"]
    return run_clipcid(*arguments, *options, cwd=folder)


def test_bytes_do_not_depend_on_workers_or_processes(
    embedded: Run, clipcid: Clipcid, tiny_shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    expected = hash_rows(embedded.cwd / "clipcid-work" / "embeddings" / "tiny")
    command = ["embed", tiny_shards, "--model", tiny_model, "--precision", "fp32", "--batch-size", 8, "--json"]
    began = time.monotonic()
    seconds = clipcid(*command, "--workers", 2, "--out", "workers").json["seconds"]
    assert 0 < sum(seconds.values()) < time.monotonic() - began
    together = [*torchrun_command(2), *map(str, command), "--out", "two-processes"]
    assert run_command(together, tmp_path, True, 300, None).json["images"] == 24
    assert hash_rows(tmp_path / "workers") == hash_rows(tmp_path / "two-processes") == expected


def test_a_finished_output_is_kept(embedded: Run, clipcid: Clipcid, tiny_shards: Path, tiny_model: Path) -> None:
    work = embedded.cwd / "clipcid-work"
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*.*") if path.suffix != ".lock"}
    (emptied,) = (path / ".embed-0123456789abcdef" for path in (work / "embeddings").iterdir() if path.is_dir())
    emptied.mkdir()  # what a run leaves that is killed while it removes its work folder
    again = clipcid("embed", "--model", tiny_model, "--work", work, "--json")
    assert not emptied.exists()
    assert again.json == embedded.json | {"files": again.json["files"]}
    assert f"Taking the data of the embeddings in {work}" in again.said
    for dry in ((), ("--dry-run",)):
        other = clipcid("embed", tiny_shards, "--model", tiny_model, "--work", work, "--no-text", *dry, code=1)
        assert "settings.text: true there, false now" in other.stderr
        assert "--overwrite" in other.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("file", ["rows.npy", "img_emb/img_emb_0000.npy", "a.npz", "inner/a.npz", "distill.json"])
def test_what_others_wrote(clipcid: Clipcid, tiny_shards: Path, tiny_model: Path, tmp_path: Path, file: str) -> None:
    path = tmp_path / "out" / file
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    told = clipcid("embed", tiny_shards, "--model", tiny_model, "--out", "out", "--overwrite", code=1).said
    if file == "distill.json":
        assert "Error: out holds the output of clipcid distill." in told
    else:
        assert f"Error: out contains embeddings that clipcid did not write, such as out/{file}." in told
    pattern = "[!.]*" if file == "distill.json" else "*"
    assert [found for found in (tmp_path / "out").rglob(pattern) if found.is_file()] == [path]


def test_added_shards_are_embedded_alone(clipcid: Clipcid, tiny_shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "data" / "00000.tar", shard_members(0, 5))
    call = ("embed", "data", "--model", tiny_model, "--out", "out")
    clipcid(*call)
    first = hash_rows(tmp_path / "out")
    write_tar(tmp_path / "data" / "00002.tar", shard_members(9, 4))
    for name in (
        "list.csv",
        "00002.parquet",
        "README.md",
        "cat/0.PNG",
        "about/0.json",
    ):  # of a tar's name: its metadata
        (tmp_path / "data" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / name).touch()
    told = clipcid(*call).stderr
    assert "1 of 2 shards are already embedded." in told
    assert "its .tar files (2) are read, and not what is beside them (.csv: 1, folders of images or tars: 1)." in told
    assert first.items() < hash_rows(tmp_path / "out").items()
    # One in between: files after it get other numbers, and are not made again.
    write_tar(tmp_path / "data" / "00001.tar", shard_members(5, 4))
    assert "2 of 3 shards are already embedded." in clipcid(*call).stderr
    clipcid(*call[:4], "--out", "whole")
    assert hash_rows(tmp_path / "out") == hash_rows(tmp_path / "whole")
    assert not list((tmp_path / "out").glob(".embed-*"))
    (tmp_path / "data" / "00000.tar").unlink()
    assert "3 shards before, 2 now; changed or gone: 00000.tar" in clipcid(*call, code=1).said


def test_other_keys_keep_the_rows(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    for number in range(3):
        members = [*shard_members(5 * number, 5), (f"{number}x.png", b"no image"), (f"{number}x.txt", b"a")]
        write_tar(tmp_path / "data" / f"{number}.tar", members)
    call = ("embed", "data", "--model", tiny_model, "--max-bad-fraction", 0.5)
    clipcid(*call, "--keys", "shard", "--out", "whole")
    clipcid(*call, "--out", "plain")
    # Killed after the first shard, then with other keys: as after keys that repeat across shards.
    (tmp_path / "out").mkdir()
    kill_when(tmp_path / "out", "0000.json", ["0002.json", "embed.json"], *call, "--out", "out", cwd=tmp_path)
    told = clipcid(*call, "--keys", "shard", "--out", "out").said
    assert re.search("[12] of 3 shards are already embedded", told)
    assert hash_rows(tmp_path / "out") == hash_rows(tmp_path / "whole")
    # What is finished is not replaced in silence.
    assert 'settings.keys: "shard" there, "sample" now' in clipcid(*call, "--out", "out", code=1).said
    assert "3 of 3 shards are already embedded" in clipcid(*call, "--out", "out", "--overwrite").said
    assert hash_rows(tmp_path / "out") == hash_rows(tmp_path / "plain")


def test_models_of_one_name_have_folders_of_their_own(
    clipcid: Clipcid, tiny_shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    data = tiny_shards / "00001.tar"
    own = {}
    for place, seed in (("a", 1), ("b", 2), ("c", 1)):  # the third is a copy of the first
        write_tiny_model(tmp_path / place / "tiny", seed=seed)
        made = clipcid("embed", data, "--model", f"{place}/tiny", "--json").json
        own[place] = Path(made["files"]["embeddings"]).name
    assert own["a"] == own["c"] == "tiny"
    assert re.fullmatch("tiny-[0-9a-f]{8}", own["b"])
    # The same place with other weights is the same model, trained again.
    write_tiny_model(tmp_path / "a" / "tiny", seed=3)
    assert "settings.weights: " in clipcid("embed", data, "--model", "a/tiny", code=1).said


def test_shards_with_other_names_are_refused(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "laion" / "00000.tar", shard_members(0, 5))
    write_tar(tmp_path / "redcaps" / "00000.tar", shard_members(5, 5))
    clipcid("embed", "laion", "--model", tiny_model)
    told = clipcid("embed", "laion::redcaps", "--model", tiny_model, code=1).said
    assert "shards renamed: 1, first 00000, now laion/00000" in told
    (tmp_path / "redcaps" / "00000.tar").rename(tmp_path / "redcaps" / "1.tar")
    assert "1 of 2 shards are already embedded." in clipcid("embed", "laion::redcaps", "--model", tiny_model).stderr


def test_embeddings_of_other_data_are_not_replaced_for_want_of_captions(
    clipcid: Clipcid, tiny_model: Path, tmp_path: Path
) -> None:
    write_tar(tmp_path / "laion" / "0.tar", shard_members(0, 5))
    write_tar(tmp_path / "mute" / "1.tar", [member for member in shard_members(5, 3) if member[0].endswith("png")])
    clipcid("embed", "laion", "--model", tiny_model)
    told = clipcid("balance", "mute", "--model", tiny_model, "--keep", 0.5, code=1).said
    assert f"data: {tmp_path}/laion before, {tmp_path}/mute now" in told
    assert "--no-text" not in told
    for work, flags in (("clipcid-work", "--work OTHER --no-text"), ("new", "--work new --no-text --overwrite")):
        request = EmbedSettings(data="mute", work=tmp_path / work)
        advice = embed_images_first(request, parse_model(str(tiny_model))).replace(str(tmp_path / "new"), "new")
        assert f"clipcid embed mute --model {tiny_model} {flags}" in advice
    call = ("embed", "mute", "--model", tiny_model, "--no-text", "--overwrite")
    replaced = f"The embeddings in clipcid-work/embeddings/tiny (5 images of {tmp_path}/laion) will be replaced."
    assert replaced in clipcid(*call, "--dry-run").said
    assert replaced in clipcid(*call).said
    assert "will be replaced" not in clipcid(*call).said


def test_unusable_input_leaves_nothing_behind(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("filepath,title\nnowhere.png,a cat\n")
    for allowed, told in ((0.01, "1 sample: none can be used"), (1, "None of the 1 samples")):
        call = ("embed", "list.csv", "--model", tiny_model, "--max-bad-fraction", allowed)
        assert told in clipcid(*call, code=1).stderr
    (tmp_path / "1.png").write_bytes(make_image(1))
    (tmp_path / "list.csv").write_text("filepath,title\n1.png,a cat\n")
    assert clipcid("embed", "list.csv", "--model", tiny_model, "--json").json["images"] == 1


def test_an_empty_first_shard_says_nothing_of_captions(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "data" / "0.tar", [])
    write_tar(tmp_path / "data" / "1.tar", shard_members(0, 5))
    for out in ("new", "again"):  # the second time the data has an index
        run = clipcid("embed", "data", "--model", tiny_model, "--out", out, "--json")
        assert run.json["images"] == 5
    assert len(np.load(tmp_path / "new" / "text_emb" / "text_emb_0001.npy")) == 5


def as_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_what_is_missing_of_a_truncated_shard_is_estimated(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    for number in range(3):
        path = write_tar(tmp_path / f"data/{number}.tar", shard_members(4 * number, 4))
    os.truncate(path, path.read_bytes().index(b"000010.png") + 600)
    run = clipcid("embed", "data", "--model", tiny_model, "--max-bad-fraction", 0.3, "--json")
    counts = json.loads(Path(run.json["files"]["sidecar"]).read_text())["counts"]
    assert (counts["read"], counts["skipped"]) == (11, {"cut_off": 1})
    assert 0.1 < counts["missing_fraction"] < 0.3
    assert f"about {counts['missing_fraction']:.1%} of the data is missing" in run.said


def test_what_is_skipped_is_counted_and_named(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    members = [
        *shard_members(0, 20),
        ("bad.png", b"no image"),
        ("bad.txt", b"x"),
        ("mute.png", make_image(30)),
        ("alpha.png", as_png(Image.new("RGBA", (40, 40), (0, 0, 0, 0)))),
        ("alpha.txt", b"clear"),
        ("deep.png", as_png(Image.fromarray(np.full((40, 40), 26_000, np.uint16)))),
        ("deep.txt", b"grey"),
        ("000003.png", make_image(31)),
        ("000003.txt", b"again"),
    ]
    data = write_tar(tmp_path / "a.tar", members)
    run = clipcid("embed", data, "--model", tiny_model, "--json", "--max-bad-fraction", 0.2)
    assert run.json["images"] == 22
    assert run.json["skipped"] == {"duplicate_key": 1, "no_caption": 1, "unreadable_image": 1}
    assert "unreadable image: a/bad" in run.stderr
    skipped = [("bad", "a", "unreadable_image"), ("000003", "a", "duplicate_key"), ("mute", "a", "no_caption")]
    assert read_skipped(run.json["files"]["skipped"]) == skipped
    # From the index, and with prefixed keys; `balance` adds to those of the embeddings.
    for keys, key in (("sample", "bad"), ("shard", "a/bad")):
        given = ("--model", tiny_model, "--max-bad-fraction", 0.2, "--work", keys, "--keys", keys, "--json")
        assert read_skipped(clipcid("embed", data, *given).json["files"]["skipped"])[0] == (
            key,
            "a",
            "unreadable_image",
        )
    balanced = clipcid("balance", "--keep", 0.9, "--json").json
    assert (balanced["files"]["skipped"], balanced["skipped"]) == (
        "clipcid-work/balance/skipped.parquet",
        run.json["skipped"],
    )
    assert read_skipped(balanced["files"]["skipped"]) == skipped
    assert "Images with transparent pixels, shown on white: 1." in run.said
    assert "Images with 16 bits of grey, scaled to 8: 1." in run.said
    strict = clipcid("embed", data, "--model", tiny_model, "--out", tmp_path / "strict", code=1)
    assert "3 of 25 samples" in strict.stderr
    assert "--max-bad-fraction" in strict.stderr
    assert "--no-text" not in strict.stderr  # it would leave two
    assert not (tmp_path / "strict" / "embed.json").exists()


def test_columns_of_a_list_are_remembered(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(make_image(number, side=300, kind="JPEG"))
    (tmp_path / "list.csv").write_text("path,words\n0.jpg,one\n1.jpg,two\n")
    call = ("embed", "list.csv", "--model", tiny_model, "--image-column", "path", "--caption-column", "words", "--json")
    listed = clipcid(*call, "--fast-decode")
    assert listed.json["images"] == 2
    assert clipcid(*call, "--fast-decode").json == listed.json


def test_lines_of_a_text_are_captions_where_asked_for(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    members = [(f"{number}.png", make_image(number)) for number in range(4)]
    members += [(f"{number}.txt", b"a red door\nan old door") for number in range(4)]
    write_tar(tmp_path / "data" / "0.tar", sorted(members))
    (tmp_path / "photos").mkdir()
    for name, content in members:
        (tmp_path / "photos" / name).write_bytes(content)
    for data in ("data", "photos"):
        call = ("embed", data, "--model", tiny_model, "--work", f"{data}-lines")
        assert "with --caption-lines" in clipcid(*call, "--dry-run").said
        assert "--caption-lines" not in clipcid(*call, "--caption-lines").stderr
        folder = tmp_path / f"{data}-lines" / "embeddings" / "tiny"
        assert np.load(folder / "captions_emb" / "captions_emb_0000.npy").shape[0] == 4
        assert "caption_lines: true there" in clipcid(*call, code=1).stderr
    again = clipcid("embed", "--work", "data-lines", "--caption-lines").said  # data and model as recorded
    assert f"Model: {tiny_model}, that of the embeddings in data-lines." in again


def test_dry_run_writes_nothing(clipcid: Clipcid, tiny_shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    call = ("embed", tiny_shards, "--model", tiny_model, "--dry-run")
    run = clipcid(*call, "--json")
    assert (run.json["images"], run.json["shards"], run.json["bytes"]) == (24, 2, 24 * 32 * 2 * 2)
    assert "checked 2 of 2 shards, 6 samples: all can be decoded." in run.stderr
    run = clipcid(*call, "--views", 3, "--json", "--workers", 1)
    assert run.json["bytes"] == 24 * 32 * 2 * 2 + 24 * 3 * (32 * 2 + 16 * 4)
    assert run.json["free_bytes"] > run.json["bytes"]
    assert run.json["host_memory_bytes"] > run.json["shared_memory_bytes"] > 0
    refused = clipcid(*call, "--workers", 20_000_000, check=False)
    assert re.search(r"workers of this host and their batches take up to\s+[\d,.]+\s+GB", refused.stderr)
    student = ("--student", tiny_model / "open_clip_config.json")
    for step in (("balance", "--model", tiny_model, "--keep", 0.5), ("distill", "--teacher", tiny_model, *student)):
        first = clipcid(step[0], tiny_shards, *step[1:], "--dry-run", "--json")
        assert (first.json["dry_run"], first.json["images"]) == (True, 24)
        assert "There are no embeddings of" in first.stderr
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(make_image(0))
    told = clipcid("balance", "images", "--model", tiny_model, "--keep", 0.5, "--dry-run").said
    assert re.search(r"clipcid embed images --model \S+ --no-text", told)
    assert re.search(r"Would embed\s+images +about 24", clipcid("distill", tiny_shards, *step[1:], "--dry-run").stderr)
    assert not (tmp_path / "clipcid-work").exists()


def test_a_teacher_no_hub_gives_is_told_within_seconds(binary: Clipcid, tiny_shards: Path) -> None:
    run = binary("embed", tiny_shards, check=False, env={"HF_HUB_OFFLINE": "0"})
    assert run.returncode == 1
    assert "--model /path/to/folder" in run.said
    # The hub's client says when it tries again, which it does for 46 seconds.
    assert "Retrying" not in run.stderr


def test_a_model_that_no_process_can_load_is_told_once(torchrun: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    weights = broken / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    write_tar(tmp_path / "data" / "00000.tar", shard_members(0, 3))
    run = torchrun(2, "embed", tmp_path / "data", "--model", broken, "--out", tmp_path / "emb", check=False)
    assert run.returncode != 0
    told = [line for line in run.stderr.splitlines() if line.startswith("Error:") and "has 1,000 bytes" in line]
    assert len(told) == 1
    assert not (tmp_path / "emb" / "img_emb").exists()
