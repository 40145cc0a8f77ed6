"""Parts of embeddings in a folder or an object store, joined: what one process writes, or one error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
from balance_data import heard
from conftest import shard_members, write_tar
from teaching_data import embed_data

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.parts import DataPart, hold_part
from clipcid_cli.formats.output import find_works
from clipcid_cli.formats.sidecar import seal
from clipcid_cli.steps.embed import run as embed
from clipcid_cli.steps.settings.embed import EmbedSettings

BAD = [("bad.png", b"no image"), ("bad.txt", b"a cat")]
Objects = dict[str, bytes]


def join(place: Path | str, **settings: Any) -> Any:
    return embed.run(EmbedSettings(join=Path(place), device="cpu", **{"max_bad_fraction": 0.5} | settings))


def outcome(folder: Path) -> dict[str, Any]:
    """Read what embeddings are, but for times: bytes of rows, metadata and skipped samples, manifest, sidecar."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("*/*")}
    manifest = pq.read_table(folder / "manifest.parquet").to_pylist()
    for file in (file for shard in manifest for file in shard["files"].values()):
        del file["time"]
    sidecar = json.loads((folder / "embed.json").read_text())
    for name in ("seconds", "images_per_second", "command", "checksum", "outputs"):
        del sidecar[name]
    del sidecar["run"]["processes"]
    return files | {"manifest": manifest, "sidecar": sidecar, "skipped": (folder / "skipped.parquet").read_bytes()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for number in range(3):
        members = shard_members(number * 4, 4)
        write_tar(folder / f"{number:05d}.tar", [*members, *BAD] if number == 1 else members)
    return folder


@pytest.fixture(scope="module")
def one(data: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embeddings that one process writes."""
    out = tmp_path_factory.mktemp("one") / "out"
    embed_data(data, tiny_model, out, max_bad_fraction=0.5)
    return out


@pytest.fixture(scope="module")
def sent(data: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Objects:
    """The objects of two parts, by their names in the store."""
    work = tmp_path_factory.mktemp("work")
    for part in ("1/2", "0/2"):
        embed_data(data, tiny_model, Path("memory://sent/all"), part=part, work=work, max_bad_fraction=0.5)
        assert not [path for path in (work / ".sending").rglob("*") if path.is_file()]
    store = fsspec.filesystem("memory")
    return {name.removeprefix("/sent/all/"): store.cat(name) for name in store.find("/sent/all")}


def put(place: str, objects: Objects) -> None:
    store = fsspec.filesystem("memory")
    for name, content in objects.items():
        store.pipe(f"{place}/{name}", content)


def test_parts_in_a_folder_are_joined_to_what_one_process_writes(
    one: Path, data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def embed_part(part: str | None, **settings: Any) -> None:
        embed_data(data, tiny_model, out, part=part, max_bad_fraction=0.5, **settings)

    embed_part("1/3")
    with pytest.raises(ClipcidError, match=r"2 of 3 shards are missing in .*, of parts 0/3, 2/3"):
        join(out)
    with pytest.raises(ClipcidError, match=r"settings.batch_size: 8 there, 4 now"):
        embed_part("0/3", batch_size=4)
    (work,) = find_works(out, "embed")
    with hold_part(work, DataPart(0, 3)):  # while a part runs, nobody finishes, nor does the same
        # Part 1/2 has shards of it, and work of other settings would be removed while it runs.
        others = (
            lambda: embed_part("0/3"),
            lambda: embed_part("1/2"),
            lambda: embed_part("0/2", overwrite=True, batch_size=4),
        )
        for again in (lambda: join(out), lambda: embed_part(None), *others):
            with pytest.raises(ClipcidError, match=r"Part 0/3 of .* is being embedded"):
                again()
    embed_part("0/2")  # in how many parts does not matter
    begun = shutil.copytree(out, tmp_path / "begun")
    with heard() as told:
        join(out, model="ViT-B-32", batch_size=4)
    assert "since the parts record how they were made: --batch-size, --model." in told[0]
    assert outcome(out) == outcome(one)
    embed_data(data, tiny_model, begun, max_bad_fraction=0.5)  # the next step, say, does without the join
    assert outcome(begun) == outcome(one)
    written = [(folder / "img_emb/img_emb_0002.npy").stat().st_mtime_ns for folder in (out, begun)]
    assert written[0] == written[1]  # by the part


def test_parts_in_an_object_store_are_joined_here(
    one: Path, data: Path, sent: Objects, tiny_model: Path, tmp_path: Path
) -> None:
    put("/joined", sent)
    join("memory://joined", work=tmp_path / "work")
    (out,) = (tmp_path / "work/embeddings").iterdir()
    assert outcome(out) == outcome(one)
    join("memory://joined", work=tmp_path / "work")
    # A shard whose record is gone, or torn, is made again; other parts are not.
    store = fsspec.filesystem("memory")
    for name in (name for name in sent if name.endswith(("/.shards/0000.json", "/0002.json"))):
        store.pipe(f"/joined/{name}", sent[name][: 20 * name.endswith("0002.json")])
    with pytest.raises(ClipcidError, match="2 of 3 shards are missing in memory://joined, of part 0/2"):
        join("memory://joined", out=tmp_path / "again")
    embed_data(data, tiny_model, Path("memory://joined"), part="0/2", work=tmp_path / "w", max_bad_fraction=0.5)
    join("memory://joined", out=tmp_path / "again")
    assert outcome(tmp_path / "again") == outcome(one)
    with pytest.raises(ClipcidError, match=r"other settings or inputs:\n.*batch_size: 8 there, 4 now"):
        embed_data(data, tiny_model, Path("memory://joined"), part="0/2", work=tmp_path / "w", batch_size=4)


def edit(objects: Objects, ending: str, change: Callable[[Any], Any]) -> None:
    """Change the JSON of an object, and seal a record again, as whoever means harm would."""
    name = next(name for name in objects if name.endswith(ending))
    content = json.loads(objects[name])
    change(content)
    objects[name] = json.dumps(content if ending == ".run.json" else seal(content)).encode()


def lead_out(record: Any) -> None:
    record["files"]["img_emb"]["path"] = "../../../../../out.npy"


def add_part(record: Any) -> None:
    record["files"]["../../../../out"] = record["files"]["img_emb"] | {"path": "../../../../out/x"}


def promise(record: Any) -> None:
    record["files"]["img_emb"]["size"] = 2**60


def promise_less_than_none(record: Any) -> None:
    record["files"]["img_emb"]["size"] = -2


def claim_other(record: Any) -> None:
    record["identity"] = "0" * 32


@pytest.mark.parametrize(
    ("ending", "change", "problem"),
    [
        ("img_emb_0001.npy", lambda data: data[:-1] + b"?", r"img_emb_0001\.npy has changed since its record"),
        (
            "img_emb_0001.npy",
            lambda data: data + b"?",
            r"img_emb_0001\.npy has more than [\d,]+ bytes; its record says",
        ),
        ("img_emb_0001.npy", lambda data: data[:-1], r"img_emb_0001\.npy has [\d,]+ bytes; its record says"),
        ("0001.skipped.parquet", lambda data: b"?" * len(data), r"skipped\.parquet has changed since its record"),
        (".shards/0001.json", lead_out, "is not the record of shard 00001"),
        (".shards/0001.json", add_part, "is not the record of shard 00001"),
        (".shards/0001.json", claim_other, "is not the record of shard 00001"),
        (".shards/0001.json", promise_less_than_none, "is not the record of shard 00001"),
        (".parts/0-of-2.json", lambda record: record.update(timings=[{"embedded": 1.5}]), "has no times of processes"),
        (".shards/0001.json", promise, "1,152,921,504,606,8.* are free"),
        (".shards/0001.json", lambda record: record["input"].update(size=1), "are not those of the data"),
        (".parts/0-of-2.json", lambda record: record.update(shards=4), "are of 3 and of 4 shards"),
        (".parts/0-of-2.json", lambda record: record["facts"]["model"].update(slug="../x"), "which names no folder"),
        (".run.json", lambda run: run["settings"].update(text=False), "holds no parts"),
    ],
)
def test_a_store_of_strangers_is_refused(
    sent: Objects, tmp_path: Path, ending: str, change: Callable[[Any], Any], problem: str
) -> None:
    objects = dict(sent)
    if ending.endswith(".json"):
        edit(objects, ending, change)
    else:
        name = next(name for name in objects if name.endswith(ending))
        objects[name] = change(objects[name])
    put("/strange", objects)
    with pytest.raises(ClipcidError, match=problem):
        join("memory://strange", work=tmp_path / "deep/below/work")
    assert not [path for path in tmp_path.rglob("*") if path.name in ("out", "out.npy", "x", "embed.json")]
    fsspec.filesystem("memory").rm("/strange", recursive=True)


def test_a_record_that_names_a_file_elsewhere_is_refused(data: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    embed_data(data, tiny_model, out, part="0/1", max_bad_fraction=0.5)
    (work,) = find_works(out, "embed")
    path = work / ".shards/0001.json"
    record = json.loads(path.read_text())
    metadata = record["files"]["metadata"]
    (work / metadata["path"]).rename(tmp_path / "elsewhere.parquet")
    metadata["path"] = "../../elsewhere.parquet"
    path.write_text(json.dumps(seal(record)))
    with pytest.raises(ClipcidError, match=r"Shard 00001 in .* is not what its record says"):
        join(out)


def test_a_key_of_two_parts_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for name in ("a", "b"):  # of data behind URLs keys are seen when it is read, by each part its own
        store.pipe(f"/repeated/{name}.tar", write_tar(tmp_path / "one.tar", shard_members(0, 2)).read_bytes())
    for part in ("0/2", "1/2"):
        embed_data("memory://repeated/{a,b}.tar", tiny_model, tmp_path / "out", part=part)
    with pytest.raises(ClipcidError, match="Key '000000' occurs in shard a and again in shard b"):
        join(tmp_path / "out")
