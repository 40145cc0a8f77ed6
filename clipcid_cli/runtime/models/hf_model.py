"""Running a Hugging Face folder on this machine's CPU with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from clipcid_cli.runtime.quiet import quiet_libraries


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
