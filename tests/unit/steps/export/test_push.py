"""Exports are uploaded by one commit, with their card, or not at all."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_server import TOKEN, HubServer, serve_hub

from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.formats.models.export_sidecar import ExportSidecar
from clipcid_cli.formats.sidecar import read_sidecar, sidecar_path
from clipcid_cli.steps.export.push import push, validate_push
from clipcid_cli.steps.export.run import run
from clipcid_cli.steps.settings.export import ExportSettings


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub, as HF_ENDPOINT and HF_TOKEN of this process name it."""
    with serve_hub() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished export, read-only."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    run(ExportSettings(model=str(tiny_model), out=folder))
    return folder


def read(folder: Path) -> ExportSidecar:
    sidecar = read_sidecar(sidecar_path(folder, "export"), ExportSidecar)
    assert sidecar is not None
    return sidecar


def test_what_was_checked_is_uploaded_by_one_commit(hub: HubServer, folder: Path, tiny_model: Path) -> None:
    result = run(ExportSettings(model=str(tiny_model), out=folder, push="acme/tiny"))
    names = {"README.md", "open_clip_config.json", "open_clip_model.safetensors", "parity.json"}
    assert hub.repositories["acme/tiny"] == {name: (folder / name).read_bytes() for name in names}
    assert hub.commits == {"acme/tiny": 1}
    assert hub.private == {"acme/tiny"}
    assert str(result.pushed).startswith(f"{hub.url}/acme/tiny/commit/")
    hub.repositories["acme/tiny"]["notes.md"] = b"theirs"
    push(folder, read(folder), "acme/tiny")  # again
    assert {*hub.repositories["acme/tiny"]} == names | {"notes.md"}


def test_what_the_hub_refuses_is_told_and_changes_nothing(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sidecar = read(folder)
    with pytest.raises(ClipcidError, match=r"--push other/tiny: the token of this machine may not write there \(403\)"):
        push(folder, sidecar, "other/tiny")
    for refused in ("PUT /lfs", "POST .*/commit/"):
        hub.refused = refused
        with pytest.raises(ClipcidError, match="did not take the files, of which none was committed"):
            push(folder, sidecar, "acme/tiny")
        assert hub.repositories == {"acme/tiny": {}}
    hub.refused, hub.ignored = "nothing", {"parity.json"}
    for earlier in ({}, {"parity.json": b"of an earlier commit"}):
        hub.repositories["acme/tiny"] |= earlier
        with pytest.raises(ClipcidError, match=r"the hub left out parity\.json, which the \.gitignore there may name"):
            push(folder, sidecar, "acme/tiny")
    hub.refused, hub.ignored = "GET .*/tree/", set()
    with pytest.raises(ClipcidError, match=r"the files are committed, and .* did not list what has arrived") as caught:
        push(folder, sidecar, "acme/tiny")
    assert "/acme/tiny/commit/" in caught.value.fix
    hub.refused = "nothing"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ClipcidError, match="does not know the token of this machine") as caught:
        validate_push("acme/tiny")
    assert "hf_wrong" not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere/token")
    with pytest.raises(ClipcidError, match="there is no token of the Hugging Face hub on this machine") as caught:
        validate_push("acme/tiny")
    assert "hf auth login" in caught.value.fix


def test_without_a_network_nothing_is_exported(
    hub: HubServer, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
    with pytest.raises(ClipcidError, match=r"127\.0\.0\.1:\d+ cannot be reached from here. Nothing was uploaded"):
        run(ExportSettings(model=str(tiny_model), out=tmp_path / "out", push="acme/tiny"))
    assert not (tmp_path / "out").exists()


def test_only_files_of_the_export_as_they_were_checked_are_uploaded(hub: HubServer, folder: Path) -> None:
    sidecar = read(folder)
    (folder.parent / "secret").write_text("key")
    sidecar.written = [*sidecar.written, "../secret"]
    with pytest.raises(ClipcidError, match=r"--push acme/tiny: \.\./secret of .* is outside of that folder"):
        push(folder, sidecar, "acme/tiny")
    config = folder / "open_clip_config.json"
    before = config.read_bytes()
    config.write_bytes(before + b" ")
    with pytest.raises(ClipcidError, match=r"open_clip_config\.json"):
        push(folder, sidecar, "acme/tiny")
    config.write_bytes(before)
    assert hub.repositories == {}


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "https://huggingface.co/acme/tiny", "../tiny"])
def test_what_is_no_name_of_a_repository_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="does not name a repository"):
        ExportSettings(push=name)
