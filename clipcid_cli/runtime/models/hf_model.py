"""Running a Hugging Face folder on this machine's CPU with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from clipcid_cli.runtime.quiet import quiet_libraries


class HfClip:
    """A ``CLIPModel`` with its processor, loaded from a local folder in float32.

    Args:
        folder: As `write_hf_folder` wrote it.
    """

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
            pixels = self._processor(images=list(images), return_tensors="pt")["pixel_values"]
        assert isinstance(pixels, torch.Tensor)
        return pixels

    def prepare_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts to tokens, int64 [B, L], by the folder's own tokenizer, padded to the model's length."""
        with quiet_libraries():
            tokens = self._processor(text=list(texts), padding="max_length", truncation=True, return_tensors="pt")
        ids = tokens["input_ids"]
        assert isinstance(ids, torch.Tensor)
        return ids


def _unit_rows(features: Any) -> torch.Tensor:
    # transformers 5 returns an object, 4 the tensor itself.
    rows = getattr(features, "pooler_output", features)
    assert isinstance(rows, torch.Tensor)
    return torch.nn.functional.normalize(rows.float(), dim=-1)
