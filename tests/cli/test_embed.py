"""`clipcid embed` from the command line: what it writes, how it resumes, and that its bytes never vary."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    Run,
    make_caption,
    make_image,
    run_clipcid,
    run_command,
    shard_members,
    start_clipcid,
    torchrun_command,
    write_tar,
)
from PIL import Image

Call = Callable[..., Run]


def hash_rows(folder: Path) -> dict[str, str]:
    """Hash every file of embeddings; sidecar and manifest have times in them."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in (".npy", ".parquet"))
    files = [path for path in found if "index" not in path.parts and path.name != "manifest.parquet"]
    return {str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def embedded(tiny_shards: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One plain run in a folder of its own: fp32, batches of 8."""
    folder = tmp_path_factory.mktemp("embedded")
    arguments = ["embed", str(tiny_shards), "--model", str(tiny_model)]
    options = ["--precision", "fp32", "--batch-size", "8", "--workers", "1", "--json"]
    return run_clipcid(*arguments, *options, cwd=folder)


def test_result_and_files(embedded: Run, tiny_shards: Path, tiny_model: Path) -> None:
    result = embedded.json
    assert list(result) == ["images", "skipped", "images_per_second", "seconds", "files"]
    assert (result["images"], result["skipped"]) == (24, {})
    assert list(result["seconds"]) == ["read", "encode", "write"]
    folder = embedded.cwd / "clipcid-work" / "embeddings" / "tiny"
    assert result["files"]["embeddings"] == "clipcid-work/embeddings/tiny"
    assert list(hash_rows(folder)) == [
        f"{kind}/{kind}_000{number}.{form}"
        for kind, form in (("img_emb", "npy"), ("metadata", "parquet"), ("text_emb", "npy"))
        for number in (0, 1)
    ]
    sidecar = json.loads((folder / "embed.json").read_text())
    assert [Path(entry["path"]).name for entry in sidecar["inputs"]] == [tiny_shards.name]
    assert [entry["path"] for entry in sidecar["outputs"]] == ["manifest.parquet"]
    assert sidecar["counts"] == {"images": 24, "read": 24, "skipped": {}, "laid_on_white": 0, "from_16_bit": 0}
    assert sidecar["data"]["spec"] == str(tiny_shards)
    assert sidecar["model"]["spec"] == str(tiny_model)
    assert sidecar["settings"]["precision"] == "fp32"


def test_rows_are_open_clips(embedded: Run, tiny_model: Path) -> None:
    import io

    import open_clip
    import pandas as pd

    folder = embedded.cwd / "clipcid-work" / "embeddings" / "tiny"
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tiny_model}")
    pixels = torch.stack([transform(Image.open(io.BytesIO(make_image(number)))) for number in range(14)])
    tokens = open_clip.get_tokenizer(f"local-dir:{tiny_model}")([make_caption(number) for number in range(14)])
    with torch.no_grad():
        images = model.eval().encode_image(pixels, normalize=True).numpy()
        texts = model.encode_text(tokens, normalize=True).numpy()
    rows = np.load(folder / "img_emb" / "img_emb_0000.npy")
    assert rows.dtype == np.float16
    assert np.abs(rows - images).max() < 3e-4
    assert np.abs(np.load(folder / "text_emb" / "text_emb_0000.npy") - texts).max() < 3e-4
    metadata = pd.read_parquet(folder / "metadata" / "metadata_0001.parquet")
    assert list(metadata.columns) == ["key", "shard", "caption"]
    assert metadata.key[0] == "000014"
    assert set(metadata.shard) == {"00001"}
    assert metadata.caption[9] == make_caption(23)


def test_bytes_do_not_depend_on_workers_or_processes(
    embedded: Run, clipcid: Call, tiny_shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    expected = hash_rows(embedded.cwd)
    command = ["embed", tiny_shards, "--model", tiny_model, "--precision", "fp32", "--batch-size", 8, "--json"]
    clipcid(*command, "--workers", 0, "--out", tmp_path / "none")
    clipcid(*command, "--workers", 3, "--out", tmp_path / "three")
    together = [*torchrun_command(2), *map(str, command), "--out", "two-processes"]
    assert run_command(together, tmp_path, True, 300, None).json["images"] == 24
    prefix = "clipcid-work/embeddings/tiny/"
    for name in ("none", "three", "two-processes"):
        assert {prefix + path: value for path, value in hash_rows(tmp_path / name).items()} == expected


def test_a_finished_output_is_kept_and_a_different_one_refused(
    embedded: Run, clipcid: Call, tiny_shards: Path, tiny_model: Path
) -> None:
    work = embedded.cwd / "clipcid-work"
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*.*") if path.suffix != ".lock"}
    (emptied,) = (path / ".embed-0123456789abcdef" for path in (work / "embeddings").iterdir() if path.is_dir())
    emptied.mkdir()  # what a run leaves that is killed while it removes its work folder
    again = clipcid("embed", "--model", tiny_model, "--work", work, "--json")
    assert not emptied.exists()
    assert again.json == embedded.json | {"files": again.json["files"]}
    assert f"Taking the data of the embeddings in {work}" in " ".join(again.stderr.split())
    for dry in ((), ("--dry-run",)):
        other = clipcid("embed", tiny_shards, "--model", tiny_model, "--work", work, "--no-text", *dry, check=False)
        assert other.returncode == 1
        assert "settings.text: true there, false now" in other.stderr
        assert "--overwrite" in other.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("file", ["rows.npy", "img_emb/img_emb_0000.npy", "a.npz", "inner/a.npz"])
def test_embeddings_of_another_tool_are_never_mixed_with_ones_of_ours(
    clipcid: Call, tiny_shards: Path, tiny_model: Path, tmp_path: Path, file: str
) -> None:
    path = tmp_path / "out" / file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    run = clipcid("embed", tiny_shards, "--model", tiny_model, "--out", "out", "--overwrite", check=False)
    assert run.returncode == 1
    assert f"Error: out contains embeddings that clipcid did not write, such as out/{file}.\n" in run.stderr
    assert [found for found in (tmp_path / "out").rglob("*") if found.is_file()] == [path]


def test_the_output_of_another_step_is_not_written_into(
    clipcid: Call, tiny_shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "distill.json").write_text("{}")
    run = clipcid("embed", tiny_shards, "--model", tiny_model, "--out", "run", "--overwrite", check=False)
    assert run.returncode == 1
    assert "run holds the output of clipcid distill." in run.stderr


def test_overwriting_replaces_all(clipcid: Call, tiny_shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    clipcid("embed", tiny_shards, "--model", tiny_model, "--out", out)
    data = write_tar(tmp_path / "other.tar", shard_members(50, 5))
    run = clipcid("embed", data, "--model", tiny_model, "--out", out, "--no-text", "--overwrite", "--json")
    assert run.json["images"] == 5
    assert list(hash_rows(out)) == ["img_emb/img_emb_0000.npy", "metadata/metadata_0000.parquet"]
    assert len(np.load(out / "img_emb" / "img_emb_0000.npy")) == 5


def test_shards_that_were_added_are_embedded_alone(
    clipcid: Call, tiny_shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    write_tar(tmp_path / "data" / "00000.tar", shard_members(0, 5))
    call = ("embed", "data", "--model", tiny_model, "--out", "out")
    clipcid(*call)
    first = hash_rows(tmp_path / "out")
    write_tar(tmp_path / "data" / "00002.tar", shard_members(9, 4))
    assert "1 of 2 shards are already embedded." in clipcid(*call).stderr
    assert first.items() < hash_rows(tmp_path / "out").items()
    # One in between: files after it get other numbers, and are not made again.
    write_tar(tmp_path / "data" / "00001.tar", shard_members(5, 4))
    assert "2 of 3 shards are already embedded." in clipcid(*call).stderr
    clipcid(*call[:4], "--out", "whole")
    assert hash_rows(tmp_path / "out") == hash_rows(tmp_path / "whole")
    assert not list((tmp_path / "out").glob(".embed-*"))
    (tmp_path / "data" / "00000.tar").unlink()
    refused = clipcid(*call, check=False)
    assert refused.returncode == 1
    assert "3 files there, 2 now; changed or gone: 00000.tar" in " ".join(refused.stderr.split())


def test_data_whose_shards_got_other_names_are_refused_since_later_files_repeat_them(
    clipcid: Call, tiny_model: Path, tmp_path: Path
) -> None:
    write_tar(tmp_path / "laion" / "00000.tar", shard_members(0, 5))
    write_tar(tmp_path / "redcaps" / "00000.tar", shard_members(5, 5))
    clipcid("embed", "laion", "--model", tiny_model)
    refused = clipcid("embed", "laion::redcaps", "--model", tiny_model, check=False)
    assert refused.returncode == 1
    told = " ".join(refused.stderr.split())
    assert "1 files there, 2 now; 1 shards have another name, such as 00000, now laion/00000" in told
    (tmp_path / "redcaps" / "00000.tar").rename(tmp_path / "redcaps" / "1.tar")
    grown = clipcid("embed", "laion::redcaps", "--model", tiny_model)
    assert "1 of 2 shards are already embedded." in grown.stderr


def test_what_could_not_be_used_at_all_does_not_stand_in_the_way_of_other_input(
    clipcid: Call, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "list.csv").write_text("filepath,title\nnowhere.png,a cat\n")
    refused = clipcid("embed", "list.csv", "--model", tiny_model, check=False)
    assert "None of the 1 samples" in refused.stderr
    (tmp_path / "1.png").write_bytes(make_image(1))
    (tmp_path / "list.csv").write_text("filepath,title\n1.png,a cat\n")
    assert clipcid("embed", "list.csv", "--model", tiny_model, "--json").json["images"] == 1


def test_an_empty_first_shard_does_not_mean_that_there_are_no_captions(
    clipcid: Call, tiny_model: Path, tmp_path: Path
) -> None:
    write_tar(tmp_path / "data" / "0.tar", [])
    write_tar(tmp_path / "data" / "1.tar", shard_members(0, 5))
    for out in ("new", "again"):  # the second time the data has an index
        run = clipcid("embed", "data", "--model", tiny_model, "--out", out, "--json")
        assert run.json["images"] == 5
    assert len(np.load(tmp_path / "new" / "text_emb" / "text_emb_0001.npy")) == 5


def test_killed_and_resumed_gives_the_same_bytes(clipcid: Call, tiny_model: Path, tmp_path: Path) -> None:
    for number in range(24):
        members = [(f"bad{number}.png", b"no image"), *shard_members(10 * number, 10)]
        write_tar(tmp_path / "data" / f"{number}.tar", members)
    options = ["--precision", "fp32", "--batch-size", "4", "--views", "2", "--color-jitter", "0.3"]
    options += ["--max-bad-fraction", "0.1", "--out"]
    command = ["embed", "data", "--model", str(tiny_model), *options]
    process = start_clipcid(*command, "cut", cwd=tmp_path)
    while not any((tmp_path / "cut").glob(".embed-*/.shards/0*")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list((tmp_path / "cut").glob(".embed-*/.shards/0*")))
    assert not (tmp_path / "cut" / "embed.json").exists()
    assert 0 < done < 24
    resumed = clipcid(*command, "cut", "--json")
    assert f"{done} of 24 shards are already embedded" in " ".join(resumed.stderr.split())
    assert resumed.json["images"] == 240
    whole = clipcid(*command, "whole")
    assert hash_rows(tmp_path / "cut") == hash_rows(tmp_path / "whole")
    assert "cannot be decoded" in whole.stderr
    assert "cannot be decoded" not in resumed.stderr  # the killed run looked at the data
    assert len(list((tmp_path / "cut").glob("view_*/view_*.npy"))) == 48


def png_with_alpha() -> bytes:
    import io

    buffer = io.BytesIO()
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def png_of_16_bits() -> bytes:
    import io

    buffer = io.BytesIO()
    Image.fromarray(np.full((40, 40), 26_000, np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def test_what_is_skipped_is_counted_and_named(clipcid: Call, tiny_model: Path, tmp_path: Path) -> None:
    members = [
        *shard_members(0, 20),
        ("bad.png", b"no image"),
        ("bad.txt", b"x"),
        ("mute.png", make_image(30)),
        ("alpha.png", png_with_alpha()),
        ("alpha.txt", b"clear"),
        ("deep.png", png_of_16_bits()),
        ("deep.txt", b"grey"),
        ("000003.png", make_image(31)),
        ("000003.txt", b"again"),
    ]
    data = write_tar(tmp_path / "a.tar", members)
    run = clipcid("embed", data, "--model", tiny_model, "--json", "--max-bad-fraction", 0.2)
    assert run.json["images"] == 22
    assert run.json["skipped"] == {"duplicate_key": 1, "no_caption": 1, "unreadable_image": 1}
    assert "unreadable image: a/bad" in run.stderr
    assert "1 images have transparent pixels" in " ".join(run.stderr.split())
    assert "1 images have 16 bits of grey" in " ".join(run.stderr.split())
    strict = clipcid("embed", data, "--model", tiny_model, "--out", tmp_path / "strict", check=False)
    assert strict.returncode == 1
    assert "3 of 25 samples" in strict.stderr
    assert "--max-bad-fraction" in strict.stderr
    assert "--no-text" in strict.stderr
    assert not (tmp_path / "strict" / "embed.json").exists()


def test_a_step_that_needs_captions_is_not_told_to_go_without(clipcid: Call, tiny_model: Path, tmp_path: Path) -> None:
    data = write_tar(tmp_path / "a.tar", shard_members(0, 6, captions=False))
    run = clipcid("distill", data, "--teacher", tiny_model, "--student", tiny_model, check=False)
    assert run.returncode == 1
    assert "Put captions next to the images" in " ".join(run.stderr.split())
    assert "--no-text" not in run.stderr


def test_other_forms_of_data(clipcid: Call, tiny_model: Path, tmp_path: Path) -> None:
    for number in range(6):
        path = tmp_path / "photos" / f"class-{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_image(number, side=300, kind="JPEG"))
    silent = clipcid("embed", "photos", "--model", tiny_model, check=False)
    assert silent.returncode == 1
    assert "--no-text" in silent.stderr
    run = clipcid("embed", "photos", "--model", tiny_model, "--no-text", "--fast-decode", "--json")
    assert run.json["images"] == 6
    (tmp_path / "list.csv").write_text("path,words\nphotos/class-0/0.jpg,one\nphotos/class-1/1.jpg,two\n")
    columns = ["--image-column", "path", "--caption-column", "words"]
    listed = clipcid("embed", "list.csv", "--model", tiny_model, "--out", "listed", "--json", *columns)
    assert listed.json["images"] == 2
    # What the sidecar says of the data is enough to read it again.
    again = clipcid("embed", "list.csv", "--model", tiny_model, "--out", "listed", "--json", *columns)
    assert again.json == listed.json


def test_lines_of_a_text_are_captions_where_that_is_asked_for(clipcid: Call, tiny_model: Path, tmp_path: Path) -> None:
    members = [(f"{number}.png", make_image(number)) for number in range(4)]
    members += [(f"{number}.txt", b"a red door\nan old door") for number in range(4)]
    write_tar(tmp_path / "data" / "0.tar", sorted(members))
    (tmp_path / "photos").mkdir()
    for name, content in members:
        (tmp_path / "photos" / name).write_bytes(content)
    for data in ("data", "photos"):
        whole = clipcid("embed", data, "--model", tiny_model, "--work", f"{data}-whole")
        assert re.search(r"with\s+--caption-lines", whole.stderr)
        lines = clipcid("embed", data, "--model", tiny_model, "--work", f"{data}-lines", "--caption-lines")
        assert "--caption-lines" not in lines.stderr
        folder = tmp_path / f"{data}-lines" / "embeddings" / "tiny"
        assert np.load(folder / "captions_emb" / "captions_emb_0000.npy").shape[0] == 4
        other = clipcid("embed", data, "--model", tiny_model, "--work", f"{data}-lines", check=False)
        assert "caption_lines: true there" in other.stderr
    clipcid("embed", "--model", tiny_model, "--work", "data-lines", "--caption-lines")  # the data as recorded


def test_dry_run_writes_nothing(clipcid: Call, tiny_shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    run = clipcid("embed", tiny_shards, "--model", tiny_model, "--dry-run", "--json")
    assert (run.json["images"], run.json["shards"], run.json["bytes"]) == (24, 2, 24 * 32 * 2 * 2)
    assert "checked 2 of 2 shards, 6 samples: all can be decoded." in run.stderr
    run = clipcid("embed", tiny_shards, "--model", tiny_model, "--views", 3, "--dry-run", "--json", "--workers", 1)
    assert run.json["bytes"] == 24 * 32 * 2 * 2 + 24 * 3 * (32 * 2 + 16 * 4)
    assert run.json["free_bytes"] > run.json["bytes"]
    assert run.json["host_memory_bytes"] > run.json["shared_memory_bytes"] > 0
    shown = clipcid("embed", tiny_shards, "--model", tiny_model, "--dry-run", "--workers", 2).stderr
    assert re.search(r"disk +3\.07 kB, 128 bytes an image", shown)
    assert re.search(r"memory +up to .* of each host, .* of it in\s+/dev/shm", shown)
    student = ("--student", tiny_model / "open_clip_config.json")
    for step in (("balance", "--model", tiny_model, "--keep", 0.5), ("distill", "--teacher", tiny_model, *student)):
        first = clipcid(step[0], tiny_shards, *step[1:], "--dry-run", "--json")
        assert (first.json["dry_run"], first.json["images"]) == (True, 24)
        assert "There are no embeddings of" in first.stderr
    assert re.search(r"Would embed\s+images +about 24", clipcid("distill", tiny_shards, *step[1:], "--dry-run").stderr)
    many = ("--dry-run", "--workers", 20_000_000)
    run = clipcid("embed", tiny_shards, "--model", tiny_model, *many, check=False)
    assert re.search(r"workers of this host and their batches take up to\s+[\d,.]+\s+GB", run.stderr)
    assert not (tmp_path / "clipcid-work").exists()


def test_a_teacher_no_hub_gives_is_told_within_seconds(binary: Call, tiny_shards: Path) -> None:
    run = binary("embed", tiny_shards, check=False, env={"HF_HUB_OFFLINE": "0"})
    assert run.returncode == 1
    text = " ".join(run.stderr.split())
    assert "ViT-L-14:laion2b_s32b_b82k" in text
    assert "--model /path/to/folder" in text
    assert "Traceback" not in text
    # The hub's client says when it tries again, which it does for 46 seconds.
    assert "Retrying" not in text


def test_a_model_that_no_process_can_load_is_told_once(
    torchrun: Callable[..., Run], tiny_model: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    weights = broken / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    write_tar(tmp_path / "data" / "00000.tar", shard_members(0, 3))
    run = torchrun(2, "embed", tmp_path / "data", "--model", broken, "--out", tmp_path / "emb", check=False)
    assert run.returncode != 0
    told = [line for line in run.stderr.splitlines() if line.startswith("Error:") and "could not be loaded" in line]
    assert len(told) == 1
    assert not (tmp_path / "emb" / "img_emb").exists()
