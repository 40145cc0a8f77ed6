"""The data under recipes/quickstart/data: what its README says of it holds, and its script makes it."""

import importlib.util
import json
import shutil
import subprocess
import sys
import tarfile
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"
DATA = QUICKSTART / "data"

Samples = dict[str, dict[str, bytes]]


@cache
def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_data", QUICKSTART / "build_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_data"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@cache
def read_samples(folder: str) -> Samples:
    samples: Samples = {}
    for path in sorted((DATA / folder).glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                key, _, suffix = member.name.partition(".")
                content = archive.extractfile(member)
                assert content is not None
                files = samples.setdefault(key, {})
                assert suffix not in files, f"{path} has {member.name} twice"
                files[suffix] = content.read()
    return samples


def concepts(samples: Samples) -> set[str]:
    """The emoji of samples without skin tone, from their keys, in one form for all genders and directions."""
    return {load_script().kin(key.split("-", 1)[1].upper()) for key in samples}


def test_counts_are_those_of_the_readme() -> None:
    pairs = read_samples("pairs")
    folders = ("pairs", "classification/train", "classification/test", "retrieval/test")
    assert [len(read_samples(folder)) for folder in folders] == [5724, 1126, 644, 344]
    assert len({json.loads(files["json"])["base"] for files in pairs.values()}) == 1547
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    for number in ("5,724", "1,547", "1,126", "322", "344", "52 classes"):
        assert number in readme


@pytest.mark.parametrize("folder", ["retrieval/test", "classification/test"])
def test_no_held_out_concept_or_image_is_trained_on(folder: str) -> None:
    pairs, probe, held_out = map(read_samples, ("pairs", "classification/train", folder))
    trained = {load_script().kin(json.loads(files["json"])["base"]) for files in pairs.values()}
    assert concepts(probe) <= trained
    assert concepts(held_out)
    assert not concepts(held_out) & trained
    images = {files["webp"] for files in pairs.values()}
    assert not [key for key, files in held_out.items() if files["webp"] in images]


@pytest.mark.slow
def test_script_makes_the_shipped_bytes(tmp_path: Path) -> None:
    assert shutil.which("npm"), (
        "remaking the data needs npm and the npm registry: install Node.js, or deselect this test"
    )
    command = [sys.executable, str(QUICKSTART / "build_data.py"), "--out", str(tmp_path / "data")]
    command += ["--packages", str(tmp_path / "packages")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    made = {path.relative_to(tmp_path / "data") for path in (tmp_path / "data").rglob("*") if path.is_file()}
    shipped = {
        path.relative_to(DATA)
        for folder in ("pairs", "classification", "retrieval")
        for path in (DATA / folder).rglob("*")
        if path.is_file()
    }
    assert made == shipped
    different = [
        str(path) for path in sorted(made) if (tmp_path / "data" / path).read_bytes() != (DATA / path).read_bytes()
    ]
    assert not different
