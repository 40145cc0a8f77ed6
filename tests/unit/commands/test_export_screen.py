"""What `export` shows in the end: the table is explained, and where the pages are."""

import io
from pathlib import Path

from rich.console import Console

from clipcid_cli.commands.export import show
from clipcid_cli.formats.models.export_sidecar import Parity
from clipcid_cli.steps.export.run import ExportResult


def test_the_table_is_explained_without_an_accuracy_and_with_a_search(tmp_path: Path) -> None:
    parity = {
        "onnx": Parity(precision="fp32", bytes=1_000_000, images_per_second=100.0, zeroshot=None),
        "search": Parity(precision="fp32", bytes=2_000_000, agreement=1.0, zeroshot=None),
    }
    files = {name: str(tmp_path / f"{name}.html") for name in ("README", "web/index", "web/search")}
    shown = io.StringIO()
    show(ExportResult("tiny", files, parity), Console(file=shown, width=200))
    lines = [line.split() for line in shown.getvalue().splitlines()]
    assert ["search", "100.0%", "2.0"] in lines
    assert ["search", "http://localhost:8000/search.html"] in lines
    note = "cosine: the smallest to the original; same: images with the same prediction, or texts with the same nearest"
    assert f"{note} image; ms: for single images\n" in shown.getvalue()
    shown.truncate(0)
    show(ExportResult("tiny", {}, {"onnx": parity["onnx"]}), Console(file=shown, width=200))
    assert "same: images with the same prediction; ms: for single images\n" in shown.getvalue()
