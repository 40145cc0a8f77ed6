"""Running an ONNX file on this machine's CPU with ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import torch


class OnnxSession:
    """An ONNX model with one input and one output.

    Args:
        path: The ``.onnx`` file.
        threads: Threads of one operator.
    """

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name
        self.engine = f"ONNX Runtime {onnxruntime.__version__}"

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Run one batch of any size; same dtype and shape as the PyTorch module takes."""
        (output,) = self._session.run(None, {self._input: batch.numpy()})
        return torch.from_numpy(output)
