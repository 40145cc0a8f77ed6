"""What `embed` competes with: a plain loop of open_clip over the same shards. And models of random weights for both."""

from __future__ import annotations

import io
import os
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.flop_counter import FlopCounterMode

from clipcid_cli.formats.models.open_clip_folder import write_model_folder

BATCH = {"cuda": 256, "cpu": 64}
# Batches before the clock starts: workers and kernels are there then.
WARM_UP = 2


def write_random_model(name: str, folder: Path) -> int:
    """Write a model folder of an architecture with random weights; return the operations that a pair takes."""
    if not folder.exists():
        model, config = open_clip.create_model(name), open_clip.get_model_config(name)
        unfinished = folder.with_name(f"{name}.unfinished")
        write_model_folder(unfinished, config, dict(model.visual.preprocess_cfg), model.state_dict())
        unfinished.rename(folder)
    return count_flops(name)


def count_flops(name: str) -> int:
    """Count the operations of the matrix products and convolutions of one image and one caption, forward."""
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config(name))
        size = model.visual.image_size
        image = torch.zeros(1, 3, *(size if isinstance(size, tuple) else (size, size)))
        tokens = torch.zeros(1, model.context_length, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model.encode_image(image)
            model.encode_text(tokens)
    return int(counter.get_total_flops())


class Pairs(IterableDataset[Any]):
    """Transformed images and tokens of shards, each worker its own share of them."""

    def __init__(self, folder: Path, transform: Any, tokenizer: Any) -> None:
        self.shards, self.transform, self.tokenizer = sorted(folder.glob("*.tar")), transform, tokenizer

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for shard in self.shards[first::step]:
            with tarfile.open(shard) as archive:
                content: dict[str, bytes] = {}
                for member in archive:
                    file = archive.extractfile(member)
                    assert file is not None
                    content[Path(member.name).suffix] = file.read()
                    if len(content) == 2:
                        image = Image.open(io.BytesIO(content[".jpg"])).convert("RGB")
                        yield self.transform(image), self.tokenizer([content[".txt"].decode()])[0]
                        content.clear()


def embed_with_open_clip(model_folder: Path, shards: Path, device: torch.device) -> float:
    """Return the pairs a second, without the first batches."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{model_folder}", device=device)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{model_folder}")
    model.eval()
    workers = min(8, max(1, (os.cpu_count() or 2) - 1))
    loader = DataLoader(
        Pairs(shards, transform, tokenizer), BATCH[device.type], num_workers=workers, pin_memory=device.type == "cuda"
    )
    precision = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    rows, seen, started = [], 0, time.perf_counter()
    with torch.inference_mode(), precision:
        for number, (images, tokens) in enumerate(loader):
            images, tokens = (values.to(device, non_blocking=True) for values in (images, tokens))
            image, text = (model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True))
            rows.append((image.half().cpu(), text.half().cpu()))
            seen += len(images)
            if number + 1 == WARM_UP:
                seen, started = 0, time.perf_counter()
    return seen / (time.perf_counter() - started)
