"""A CLIP's towers: as PyTorch modules that exporters trace, frozen, and those of its exports, run on this machine's CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from clipcid_cli.runtime.libraries import quiet_libraries

# A tower, in PyTorch or elsewhere: prepared pixels or tokens to unit rows [B, D].
Encode = Callable[[Tensor], Tensor]


class ImageTower(nn.Module):
    """Normalised pixels, float32 [B, 3, H, W], to unit rows, float32 [B, D]."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip: Any = clip

    def forward(self, pixel_values: Tensor) -> Tensor:
        return cast(Tensor, self.clip.encode_image(pixel_values, normalize=True))


class TextTower(nn.Module):
    """Tokens, int64 [B, L], to unit rows, float32 [B, D]."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip: Any = clip

    def forward(self, input_ids: Tensor) -> Tensor:
        return cast(Tensor, self.clip.encode_text(input_ids, normalize=True))


class DenseImageTower(nn.Module):
    """Normalised pixels, float32 [B, 3, H, W], to unit rows [B, D] and the patches of the last layer [B, h, w, D].

    A patch's values are its token after the last block, the final norm and the projection that also makes the image's row,
    not normalised. Row 0 is the top of the image. (MaskCLIP also replaces the last block's attention by its values.)
    """

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.visual = cast(Any, clip).visual

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        found = self.visual.forward_intermediates(
            pixel_values, indices=1, normalize_intermediates=True, output_fmt="NLC"
        )
        rows = nn.functional.normalize(found["image_features"], dim=-1)
        patches = found["image_intermediates"][-1] @ self.visual.proj
        return rows, patches.unflatten(1, self.visual.grid_size)


def has_patches(clip: nn.Module) -> bool:
    """Tell whether the image tower is a ViT of open_clip whose patches end in the space of its image rows."""
    visual = cast(Any, clip).visual
    return (
        hasattr(visual, "grid_size")
        and hasattr(visual, "ln_post")
        and getattr(visual, "attn_pool", None) is None
        and getattr(visual, "proj", None) is not None
    )


def image_tower_kind(clip: nn.Module) -> str:
    """Return the class name of the image tower, for messages."""
    return type(cast(Any, clip).visual).__name__


def freeze(clip: nn.Module, tower: str) -> list[nn.Module]:
    """Freeze a tower, ``image`` or ``text``, and return its modules, which stay in evaluation mode."""
    for name, parameter in clip.named_parameters():
        if name not in ("logit_scale", "logit_bias") and name.startswith("visual.") == (tower == "image"):
            parameter.requires_grad_(False)
    return [part for name, part in clip.named_children() if (name == "visual") == (tower == "image")]


class OnnxSession:
    """An ONNX model with one input, and outputs by name, in ONNX Runtime."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.engine = f"ONNX Runtime {onnxruntime.__version__}"

    def __call__(self, batch: Tensor) -> Tensor:
        """Run one batch of any size, as the PyTorch module takes it, and return the first output."""
        return self.run(batch)[self._outputs[0]]

    def run(self, batch: Tensor) -> dict[str, Tensor]:
        outputs = self._session.run(None, {self._input: batch.numpy()})
        return {name: torch.from_numpy(output) for name, output in zip(self._outputs, outputs, strict=True)}


def read_tokens(path: Path, texts: list[str]) -> Tensor:
    """Return the tokens that a `tokenizer.json` makes of texts, int64 [B, L]."""
    import transformers

    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path)).backend_tokenizer
    return torch.tensor([encoding.ids for encoding in fast.encode_batch(texts)])


class HfClip:
    """A ``CLIPModel`` with its processor, loaded by transformers in float32 from a folder that `write_hf_folder` wrote."""

    def __init__(self, folder: Path) -> None:
        with quiet_libraries():
            import transformers

            transformers.utils.logging.disable_progress_bar()
            self._model = transformers.CLIPModel.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, torch_dtype=torch.float32
            ).eval()
            self._processor = transformers.CLIPProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        self.engine = f"transformers {transformers.__version__}"

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Normalised pixels, float32 [B, 3, H, W], to unit rows, float32 [B, D]."""
        return _unit_rows(self._model.get_image_features(pixel_values=pixels))

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """Tokens, int64 [B, L], to unit rows, float32 [B, D]."""
        return _unit_rows(self._model.get_text_features(input_ids=tokens))

    def prepare_image(self, image: Image.Image) -> Tensor:
        """RGB image to normalised pixels, float32 [1, 3, H, W], by the folder's own image processor."""
        with quiet_libraries():
            return cast(Tensor, self._processor(images=[image], return_tensors="pt")["pixel_values"])

    def prepare_texts(self, texts: list[str]) -> Tensor:
        """Texts to tokens, int64 [B, L], by the folder's own tokenizer, padded to the model's length."""
        with quiet_libraries():
            tokens = self._processor(text=texts, padding="max_length", truncation=True, return_tensors="pt")
        return cast(Tensor, tokens["input_ids"])


def _unit_rows(features: Any) -> Tensor:
    # transformers 5 returns an object, 4 the tensor itself.
    rows = cast(Tensor, getattr(features, "pooler_output", features))
    return nn.functional.normalize(rows.float(), dim=-1)
