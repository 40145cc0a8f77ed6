"""`clipcid verify` on what the commands have written: what it counts, what it finds, and that it changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Clipcid, make_image, run_clipcid, write_tar
from sidecars import edit_sidecar
from teaching_data import embed_data

from clipcid_cli.errors import ClipcidError
from clipcid_cli.steps.settings.verify import VerifySettings
from clipcid_cli.steps.verify import run


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_work_directory_is_verified_and_left_as_it_is(distill_place: Path, clipcid: Clipcid) -> None:
    work = distill_place / "clipcid-work"
    before = contents(work)
    found = clipcid("verify", "--read-data", "--json").json
    assert found == found | {"outputs": 2, "faults": [], "unfinished": []}
    recorded = [json.loads(path.read_text())["outputs"] for path in work.rglob("*.json") if path.parent.name != "index"]
    assert found["files"] > sum(map(len, recorded)), "those of the manifest count too"
    assert found["samples"] == json.loads(next(work.glob("embeddings/*/embed.json")).read_text())["counts"]["read"]
    assert contents(work) == before


def test_every_fault_is_a_line_and_the_exit_code_is_1(distill_place: Path, clipcid: Clipcid) -> None:
    work = distill_place / "clipcid-work"
    rows = next(work.glob("embeddings/*/img_emb/*.npy"))
    rows.write_bytes(rows.read_bytes()[:-1])
    (work / "clusters" / "clusters.parquet").unlink()
    (work / "clusters" / ".cluster-0123456789abcdef").mkdir()
    told = clipcid("verify", "--quiet", code=1).stderr.splitlines()
    size = rows.stat().st_size
    assert f"warning: {rows.relative_to(distill_place)} has {size:,} bytes; {size + 1:,} were written." in told
    assert len(told) == 2
    assert "is missing, although" in "".join(told)
    found = run(VerifySettings(folder=work))
    assert (len(found.faults), len(found.unfinished), found.exit_code) == (2, 1, 1)


def test_rows_and_data_are_compared_with_the_manifest(distill_place: Path, tiny_shards: Path, tmp_path: Path) -> None:
    folder = next((distill_place / "clipcid-work" / "embeddings").iterdir())
    (folder / "img_emb" / "more.npy").touch()
    (fault,) = run(VerifySettings(folder=folder)).faults
    assert "more.npy was added since" in fault.problem
    (folder / "img_emb" / "more.npy").unlink()
    shards = sorted(tiny_shards.glob("*.tar"))
    (tmp_path / "data").mkdir()
    for shard in shards[:-1]:
        (tmp_path / "data" / shard.name).write_bytes(shard.read_bytes())
    changed = tmp_path / "data" / shards[0].name
    changed.write_bytes(changed.read_bytes() + bytes(512))
    edit_sidecar(folder / "embed.json", lambda content: content["data"].update(spec=str(tmp_path / "data")))
    assert run(VerifySettings(folder=folder)).faults == []
    found = {fault.path: fault.problem for fault in run(VerifySettings(folder=folder, read_data=True)).faults}
    assert found[str(changed)].startswith("has changed since it was embedded: ")
    assert found[str(folder / "embed.json")] == f"was made from shard {shards[-1].stem}, which the data no longer has"


def test_images_that_were_skipped_need_not_be_there(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(make_image(number))
    (tmp_path / "list.csv").write_text("filepath\n" + "".join(f"{number}.png\n" for number in range(4)))
    clipcid("embed", "list.csv", "--model", tiny_model, "--no-text", "--max-bad-fraction", 0.5)
    settings = VerifySettings(folder=tmp_path / "clipcid-work", read_data=True)
    assert run(settings).faults == []
    (tmp_path / "0.png").unlink()
    (fault,) = run(settings).faults
    assert fault.problem == "has 1 images in 00000 that cannot be read"
    large = VerifySettings(folder=tmp_path / "clipcid-work", read_data=True, max_sample_bytes=1)
    assert run(large).faults[0].problem == "has 3 images in 00000 that cannot be read"


def test_captions_above_the_limit_are_not_verified(tiny_model: Path, tmp_path: Path) -> None:
    members = [("0.png", make_image(0)), ("0.txt", b"a dog"), ("1.png", make_image(1)), ("1.txt", b"a " * 900)]
    embed_data(write_tar(tmp_path / "0.tar", members), tiny_model, tmp_path / "rows")
    settings = VerifySettings(folder=tmp_path / "rows", read_data=True, max_sample_bytes=1_000)
    assert [fault.problem for fault in run(settings).faults] == ["has 1 images in 0 that cannot be read"]


def test_a_recorded_command_is_not_run(distill_place: Path, tmp_path: Path) -> None:
    folder = next((distill_place / "clipcid-work" / "embeddings").iterdir())
    command = f"pipe:touch {tmp_path / 'ran'}"
    edit_sidecar(folder / "embed.json", lambda content: content["data"].update(spec=command))
    (fault,) = run(VerifySettings(folder=folder, read_data=True)).faults
    assert "not run unless you give it yourself" in fault.problem
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_outputs_is_an_error(tmp_path: Path) -> None:
    for folder, message in ((tmp_path, "holds no output of clipcid"), (tmp_path / "nowhere", "There is no folder")):
        with pytest.raises(ClipcidError, match=message):
            run(VerifySettings(folder=folder))


def test_another_users_work_directory_may_be_verified(distill_place: Path) -> None:
    work = distill_place / "clipcid-work"
    (distill_place / "elsewhere").mkdir()
    (work / "distill").symlink_to(distill_place / "elsewhere")  # which no other command would write to
    told = run_clipcid("verify", cwd=distill_place, code=1).said
    assert "distill is a link out of the folder, and was not followed" in told
