"""ONNX files of encoders whose batch is fixed."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from conftest import Clipcid

from clipcid_cli.errors import UsageError
from clipcid_cli.runtime.models.exported import OnnxSession
from clipcid_cli.steps.settings.export import ExportSettings


def test_a_file_with_a_fixed_batch_is_given_rows_one_by_one(tmp_path: Path) -> None:
    graph = "g (float[1, 2] x) => (float[1, 2] y, float[1, 2] z) { y = Neg (x)\n z = Abs (x) }"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {graph}')
    onnx.save(model, tmp_path / "fixed.onnx")
    rows = torch.tensor([[1.0, -2], [3, 4], [-5, 6]])
    outputs = OnnxSession(tmp_path / "fixed.onnx").run(rows)
    assert torch.equal(outputs["y"], -rows)
    assert torch.equal(outputs["z"], rows.abs())


def test_what_takes_several_at_once_has_no_fixed_batch() -> None:
    for others in ({"format": ("web",)}, {"format": ("onnx",), "classnames": Path("names.txt")}):
        with pytest.raises(UsageError, match="--static fixes the batch of the encoders at one"):
            ExportSettings(static=True, **others)  # type: ignore[arg-type]


@pytest.mark.slow
def test_static_encoders_have_no_shape_that_depends_on_the_input(
    clipcid: Clipcid, tiny_model: Path, tmp_path: Path
) -> None:
    run = clipcid("export", tiny_model, "--format", "onnx", "--static", "--out", "fixed", "--json")
    assert run.json["parity"]["onnx"]["image"]["min_cosine"] > 0.99999
    for name, taken in (("image", [1, 3, 32, 32]), ("text", [1, 12])):
        session = onnxruntime.InferenceSession(tmp_path / "fixed" / f"{name}_encoder.onnx")
        assert [axes.shape for axes in (*session.get_inputs(), *session.get_outputs())] == [taken, [1, 32]]
    assert not (tmp_path / "fixed" / "onnx").exists()
