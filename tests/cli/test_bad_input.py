"""Every subcommand that reads data meets every kind of bad data with one clear error and leaves nothing behind.

A subcommand's cases run one after another in one process, each in a folder of its own, since loading PyTorch takes longer
than all of them.
"""

import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import clean_environment, make_image, shard_members, write_tar

# How each subcommand is told its data; DATA, MODEL and STUDENT are filled in.
COMMANDS = {
    "embed": ["embed", "DATA", "--model", "MODEL"],
    "balance": ["balance", "DATA", "--model", "MODEL", "--keep", "0.5"],
    "distill": ["distill", "DATA", "--teacher", "none", "--student", "STUDENT", "--steps", "2", "--batch-size", "4"],
    "eval-zeroshot": ["eval-zeroshot", "MODEL", "DATA", "--task", "retrieval"],
    "eval-linear": ["eval-linear", "MODEL", "--train", "DATA", "--test", "DATA"],
}

PROGRAM = """
import contextlib, io, json, os, sys, time
from pathlib import Path
from clipcid_cli.cli import main

for line in sys.stdin:
    case = json.loads(line)
    Path(case["cwd"]).mkdir()
    os.chdir(case["cwd"])
    out, err, started = io.StringIO(), io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(case["arguments"])
        except SystemExit as leaving:
            code = leaving.code
    files = sorted(str(path) for path in Path().rglob("*") if path.is_file())
    print(json.dumps({"name": case["name"], "code": code, "err": err.getvalue(), "files": files}), flush=True)
"""


def by_sample(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Give each member a class and bring members of one sample together, as webdataset's grouping needs them."""
    classes = [(f"{name.split('.')[0]}.cls", b"0") for name, _ in members if name.endswith(".png")]
    return sorted([*members, *classes], key=lambda member: member[0].split(".")[0])


def no_such_folder(folder: Path) -> Path:
    return folder / "nowhere"


def empty_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def text_named_tar(folder: Path) -> Path:
    folder.mkdir()
    (folder / "00000.tar").write_text("this is not an archive\n" * 100)
    return folder


def truncated_tar(folder: Path) -> Path:
    path = write_tar(folder / "00000.tar", shard_members(0, 6))
    path.write_bytes(path.read_bytes()[:7000])
    return folder


def no_images(folder: Path) -> Path:
    write_tar(folder / "00000.tar", [(f"{number:03d}.txt", b"a caption") for number in range(6)])
    return folder


def unreadable_images(folder: Path) -> Path:
    members = [
        (name, make_image(1)[:60] if name.endswith(".png") else data)
        for name, data in shard_members(0, 6)
        if not name.endswith(".json")
    ]
    write_tar(folder / "00000.tar", by_sample(members))
    return folder


def keys_repeat_across_shards(folder: Path) -> Path:
    for shard in ("00000.tar", "00001.tar"):
        write_tar(folder / shard, shard_members(0, 6))
    return folder


def keys_repeat_within_a_shard(folder: Path) -> Path:
    members = by_sample(shard_members(0, 3))
    write_tar(folder / "00000.tar", [*members, *members])
    return folder


def no_captions_or_classes(folder: Path) -> Path:
    write_tar(folder / "00000.tar", shard_members(0, 6, captions=False))
    return folder


# What makes the data, and words that the error must say; each subcommand says the same of the same data.
CASES: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "no such folder": (no_such_folder, ["nowhere"]),
    "empty folder": (empty_folder, ["empty folder"]),
    "text file named .tar": (text_named_tar, ["00000.tar"]),
    "truncated tar": (truncated_tar, ["00000.tar"]),
    "shard without images": (no_images, ["image"]),
    "unreadable images": (unreadable_images, ["6"]),
    "keys repeat across shards": (keys_repeat_across_shards, ["--keys shard"]),
    "keys repeat within a shard": (keys_repeat_within_a_shard, ["3 of 6 samples", "00000/000000"]),
    "no captions or classes": (no_captions_or_classes, []),
}
# These are found when the data is read, not when it is opened: what was listed by then stays. All others leave nothing.
FOUND_LATE = {"unreadable images", "keys repeat within a shard", "no captions or classes"}
# What docs/files.md calls caches, and what belongs to an unfinished output: none of it has the name of a result.
MAY_STAY = re.compile(
    r"clipcid-work/(index/[0-9a-f]{16}/(\.lock|\d{8}\.arrow|shards\.parquet|matched-[0-9a-f]{16}/[a-z_.]+)"
    r"|[\w/-]+/\.[\w-]+\.(lock|plan\.json))"
)
# Half of the samples are good: their rows are an unfinished output, which a higher --max-bad-fraction finishes.
HALF = [
    f"clipcid-work/embeddings/tiny/{name}"
    for name in (
        ".shards/0000.json",
        "img_emb/img_emb_0000.npy",
        "metadata/metadata_0000.parquet",
        "text_emb/text_emb_0000.npy",
    )
]
# An image needs no caption to be balanced.
FINE = {("balance", "no captions or classes")}


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_data_is_one_clear_error(command: str, tmp_path: Path, tiny_model: Path) -> None:
    student = tmp_path / "student.json"
    student.write_text(json.dumps(json.loads((tiny_model / "open_clip_config.json").read_text())["model_cfg"]))
    cases = []
    for name, (make, _) in CASES.items():
        fill = {"DATA": str(make(tmp_path / name)), "MODEL": str(tiny_model), "STUDENT": str(student)}
        arguments = [fill.get(word, word) for word in COMMANDS[command]]
        cases.append({"name": name, "cwd": str(tmp_path / f"in {name}"), "arguments": [*arguments, "--workers", "0"]})
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input="\n".join(map(json.dumps, cases)),
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert [outcome["name"] for outcome in outcomes] == list(CASES)
    for outcome in outcomes:
        if (command, outcome["name"]) in FINE:
            assert outcome["code"] == 0, outcome
            continue
        assert outcome["code"] in (1, 2), outcome
        assert outcome["err"].count("Error: ") == 1, outcome
        assert "Traceback" not in outcome["err"], outcome
        assert "This is a bug" not in outcome["err"], outcome
        for words in CASES[outcome["name"]][1]:
            assert words in outcome["err"], outcome
        late = outcome["name"] in FOUND_LATE
        left = [file for file in outcome["files"] if not (late and MAY_STAY.fullmatch(file))]
        is_half = command in ("embed", "balance") and outcome["name"] == "keys repeat within a shard"
        assert left == (HALF if is_half else []), outcome


def test_the_truncated_tar_of_these_tests_is_one(tmp_path: Path) -> None:
    truncated_tar(tmp_path)
    with pytest.raises(tarfile.ReadError), tarfile.open(tmp_path / "00000.tar") as archive:
        archive.getmembers()
