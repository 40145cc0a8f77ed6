"""Running an ONNX file on this machine's CPU with ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import torch


class OnnxSession:
    """An ONNX model with one input, and outputs by name."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.engine = f"ONNX Runtime {onnxruntime.__version__}"

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Run one batch of any size; same dtype and shape as the PyTorch module takes.

        Returns:
            The first output.
        """
        return next(iter(self.run(batch).values()))

    def run(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run one batch of any size, and return every output by name."""
        outputs = self._session.run(None, {self._input: batch.numpy()})
        return {name: torch.from_numpy(output) for name, output in zip(self._outputs, outputs, strict=True)}
