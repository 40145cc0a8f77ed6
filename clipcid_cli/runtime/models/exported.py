"""Exports, loaded by the programs that they are for: ONNX Runtime and transformers, on this machine's CPU."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import threading
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from clipcid_cli.runtime.libraries import quiet_libraries, quiet_native_code
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.towers import Towers


class OnnxSession:
    """An ONNX model with one input, and outputs by name, in ONNX Runtime."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (taken,) = self._session.get_inputs()
        self._input = taken.name
        # The rows of a batch, where the file fixes them; else the axis has a name.
        self._at_once = taken.shape[0] if isinstance(taken.shape[0], int) else None
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.engine = f"ONNX Runtime {onnxruntime.__version__}"

    def __call__(self, batch: Tensor) -> Tensor:
        """Run one batch of any size, as the PyTorch module takes it, and return the first output."""
        return self.run(batch)[self._outputs[0]]

    def run(self, batch: Tensor) -> dict[str, Tensor]:
        parts = torch.split(batch, self._at_once or len(batch))
        outputs = zip(*(self._session.run(None, {self._input: part.numpy()}) for part in parts), strict=True)
        return {
            name: torch.cat([*map(torch.from_numpy, rows)]) for name, rows in zip(self._outputs, outputs, strict=True)
        }


class ExecutorchProgram:
    """An ExecuTorch program with one input, a batch of one, and one output, in ExecuTorch's own runtime."""

    def __init__(self, path: Path) -> None:
        from executorch.runtime import Runtime

        with quiet_native_code():  # it says which files about the processor it did not find
            self._program = Runtime.get().load_program(path)
            self._method = self._program.load_method("forward")
        self._lock = threading.Lock()
        self.engine = f"ExecuTorch {importlib.metadata.version('executorch')}, XNNPACK"

    def __call__(self, batch: Tensor) -> Tensor:
        """Run the rows of a batch one by one; several threads take turns."""
        with self._lock:
            # The next row is written where the last one was.
            return torch.cat([self._method.execute([row])[0].clone() for row in torch.split(batch, 1)])


def read_tokens(path: Path, texts: list[str]) -> Tensor:
    """Return the tokens that a `tokenizer.json` makes of texts, int64 [B, L]."""
    import transformers

    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path)).backend_tokenizer
    return torch.tensor([encoding.ids for encoding in fast.encode_batch(texts)])


class HfClip:
    """A model of transformers with its processor, loaded in float32 from a folder that `write_hf_folder` wrote."""

    def __init__(self, folder: Path) -> None:
        with quiet_libraries():
            import transformers

            transformers.utils.logging.disable_progress_bar()
            # Written by this run a moment ago; what it took over from a model's folder still must not run.
            self._model = transformers.AutoModel.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, torch_dtype=torch.float32
            ).eval()
            self._processor = transformers.AutoProcessor.from_pretrained(
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


def onnx_towers(image: OnnxSession, text: OnnxSession, original: Towers, model: ClipModel, dense: str | None) -> Towers:
    """Return the towers of two ONNX files, which take what the original takes.

    Args:
        dense: Name of the image encoder's output of patches, where it has one.
    """

    def encode_patches(pixels: Tensor) -> Tensor:
        assert dense is not None
        return image.run(model.normalize(pixels))[dense]

    return dataclasses.replace(
        original,
        images=lambda pixels: image(model.normalize(pixels)),
        texts=text,
        dense=None if dense is None else encode_patches,
    )


def hf_towers(clip: HfClip, original: Towers, model: ClipModel) -> Towers:
    """Return the towers of a folder of transformers, which take what the original takes."""
    inference = torch.inference_mode()
    return dataclasses.replace(
        original,
        images=inference(lambda pixels: clip.encode_images(model.normalize(pixels))),
        texts=inference(clip.encode_texts),
        dense=None,
    )
