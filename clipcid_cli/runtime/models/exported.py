"""Running exported models on this machine's CPU: an ONNX file with ONNX Runtime, a Hugging Face folder with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from clipcid_cli.runtime.libraries import quiet_libraries


class OnnxSession:
    """An ONNX model with one input, and outputs by name."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.engine = f"ONNX Runtime {onnxruntime.__version__}"

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Run one batch of any size, as the PyTorch module takes it, and return the first output."""
        return self.run(batch)[self._outputs[0]]

    def run(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run one batch, and return every output by name."""
        outputs = self._session.run(None, {self._input: batch.numpy()})
        return {name: torch.from_numpy(output) for name, output in zip(self._outputs, outputs, strict=True)}


class HfClip:
    """A ``CLIPModel`` with its processor, loaded in float32 from a folder that `write_hf_folder` wrote."""

    def __init__(self, folder: Path) -> None:
        with quiet_libraries():
            import transformers

            transformers.utils.logging.disable_progress_bar()
            self._model = transformers.CLIPModel.from_pretrained(
                folder, local_files_only=True, torch_dtype=torch.float32
            ).eval()
            self._processor = transformers.CLIPProcessor.from_pretrained(folder, local_files_only=True)
        self.engine = f"transformers {transformers.__version__}"

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels, float32 [B, 3, H, W], to unit rows, float32 [B, D]."""
        return _unit_rows(self._model.get_image_features(pixel_values=pixels))

    def encode_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens, int64 [B, L], to unit rows, float32 [B, D]."""
        return _unit_rows(self._model.get_text_features(input_ids=tokens))

    def prepare_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """RGB images to normalised pixels, float32 [B, 3, H, W], by the folder's own image processor."""
        with quiet_libraries():
            return cast(torch.Tensor, self._processor(images=list(images), return_tensors="pt")["pixel_values"])

    def prepare_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts to tokens, int64 [B, L], by the folder's own tokenizer, padded to the model's length."""
        with quiet_libraries():
            tokens = self._processor(text=list(texts), padding="max_length", truncation=True, return_tensors="pt")
        return cast(torch.Tensor, tokens["input_ids"])


def _unit_rows(features: Any) -> torch.Tensor:
    # transformers 5 returns an object, 4 the tensor itself.
    rows = cast(torch.Tensor, getattr(features, "pooler_output", features))
    return torch.nn.functional.normalize(rows.float(), dim=-1)
