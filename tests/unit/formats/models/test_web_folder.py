"""What the page of `export --format web` runs by, from files that `npm pack` wrote."""

import tarfile
from pathlib import Path

import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.web_folder import validate_packages, write_engine


def test_without_npm_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClipcidError, match="npm pack onnxruntime-web@"):
        validate_packages(None)


@pytest.mark.parametrize(("kept", "reason"), [(0.5, "cannot be read as npm's"), (1, "is a folder")])
def test_a_damaged_package_is_named(tmp_path: Path, kept: float, reason: str) -> None:
    archive = tmp_path / "onnxruntime-web-1.30.0.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        folder = tarfile.TarInfo("package/dist/ort.wasm.bundle.min.mjs")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    content = archive.read_bytes()
    archive.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ClipcidError, match=f"{archive.name} .*{reason}"):
        write_engine(tmp_path / "web", tmp_path)
