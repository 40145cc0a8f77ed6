"""What tests of the teacher's side share: data with several captions, embeddings made here, and batches of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from balance_data import Listener
from conftest import make_caption, make_image, write_tar

from clipcid_cli.algorithms.losses.batch import LossBatch
from clipcid_cli.formats.data.dataset import Dataset, open_dataset
from clipcid_cli.formats.embeddings.folder import Embeddings, open_embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.runtime.machine import open_machine
from clipcid_cli.runtime.models.augment import apply_colors
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.preprocess import normalize_pixels
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.steps.data_index import ensure_index
from clipcid_cli.steps.distill import run as distill
from clipcid_cli.steps.distill.batches import BatchMaker, BatchOrder, TrainingBatch
from clipcid_cli.steps.distill.objective import Teacher
from clipcid_cli.steps.distill.samples import Sources, match_samples
from clipcid_cli.steps.distill.teacher_inputs import TeacherInputs, check_keys, use_stored
from clipcid_cli.steps.embed import run as embed
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.embed import EmbedSettings

FP32 = Precision("fp32", torch.float32, "a test")
STUDENT = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 24, "layers": 1, "width": 32, "head_width": 16, "patch_size": 12},
    "text_cfg": {"context_length": 10, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


def write_captions(folder: Path, counts: tuple[int, ...]) -> Path:
    """Write a CLIP_benchmark folder of two shards, as many lines of captions beside each image as `counts` says."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nshards.txt").write_text("2")
    half = len(counts) // 2
    for shard, numbers in enumerate((range(half), range(half, len(counts)))):
        members = []
        for number in numbers:
            lines = "\n".join(make_caption(100 * number + line) for line in range(counts[number]))
            members += [(f"s{number}.png", make_image(number)), (f"s{number}.txt", lines.encode())]
        write_tar(folder / f"{shard}.tar", members)
    return folder


def write_student(folder: Path, config: dict[str, Any] = STUDENT) -> Path:
    """Write an architecture that differs from the tiny teacher in width, resolution and context."""
    path = folder / "student.json"
    path.write_text(json.dumps(config))
    return path


def embed_data(data: Path, model: Path, out: Path, **settings: Any) -> None:
    """Run `embed` in this process: fp32, batches of 8, no workers unless told otherwise."""
    given = {"precision": "fp32", "batch_size": 8, "workers": 0, "device": "cpu"} | settings
    embed.run(EmbedSettings(data=str(data), model=str(model), out=out, **given), Listener())


def read_params(embeddings: Embeddings, row: int, view: int) -> npt.NDArray[np.float32]:
    """Return what reproduces one of an image's views."""
    place = row * embeddings.num_each(Kind.VIEWS) + view
    return np.array(embeddings.rows(Kind.VIEW_PARAMS).read(place, place + 1)[0])


def read_keys(embeddings: Embeddings) -> list[str]:
    """Return the keys of all rows."""
    return [key for file in embeddings.files for key in embeddings.keys_of(file).to_pylist()]


def train(work: Path, data: Path, **settings: Any) -> tuple[list[dict[str, Any]], str]:
    """Run `distill` in this process; returns its log without what depends on the clock, and what it said."""
    listener = Listener()
    given = {
        "preset": "cid",
        "batch_size": 8,
        "workers": 0,
        "device": "cpu",
        "steps": 4,
        "name": "run",
        "val_fraction": 0.2,
    } | settings
    result = distill.run(DistillSettings(work=work, data=str(data), **given), listener)
    log = [json.loads(line) for line in Path(result["files"]["train_log"]).read_text().splitlines()]
    clock = ("samples_per_second", "data_wait_share")
    return [{name: line[name] for name in line if name not in clock} for line in log], "\n".join(listener.told)


def index_data(dataset: Dataset, folder: Path) -> Dataset:
    """Return a data set with an index of its own."""
    dataset = dataclasses.replace(dataset, index_folder=folder / "index")
    with open_machine("cpu") as machine:
        return ensure_index(dataset, machine, 0, Listener())


def join(data: Path, folder: Path, **settings: Any) -> tuple[Embeddings, TeacherInputs, Dataset]:
    """Match embeddings with the data they were made of; all samples are trained on."""
    scratch = Path(mkdtemp(dir=folder.parent))
    dataset, embeddings = index_data(open_dataset(str(data)), scratch), open_embeddings(folder)
    check_keys(embeddings, dataset)
    given = DistillSettings(data=str(data), student="student.json", **({"preset": "clip-kd"} | settings))
    matched = match_samples(dataset, Sources(embeddings=embeddings), 0.0, scratch, Listener())
    return embeddings, use_stored(given, embeddings, matched.training, matched.counts, Listener()), dataset


def make_epoch(
    teacher_inputs: TeacherInputs, dataset: Dataset, maker: BatchMaker, epoch: int, *, replay: bool = False
) -> TrainingBatch:
    """Make one batch of a whole epoch, seed 3; with the stored views if `replay`."""
    samples, stored_views = teacher_inputs.samples, teacher_inputs.stored_views(3) if replay else None
    order = BatchOrder(dataset, samples, 3, samples.total, stored_views)
    return maker(next(order.iterate(epoch, epoch + 1, 0, 1)))


def encode_shown(model: ClipModel, batch: TrainingBatch) -> tuple[np.ndarray, np.ndarray]:
    """Embed what a batch shows, pixels in their colours and tokens: float32 rows [b, D] of images and of texts."""
    pixels = normalize_pixels(apply_colors(batch.pixels, batch.colors), model.info.preprocess)
    return model.encode_images(pixels, FP32).numpy(), model.encode_texts(batch.tokens, FP32).numpy()


def add_targets(teacher: Teacher, batch: TrainingBatch, width: int, step: int = 0) -> LossBatch:
    """Return some student's side of a whole batch with the teacher's."""
    targets = teacher.prepare(batch, batch.rows.numpy(), step)
    return teacher.add_targets(student_side(len(batch.rows), width), batch, targets)


def student_side(rows: int, width: int) -> LossBatch:
    """Make some student's side of a batch, to which a teacher adds its own."""
    random = torch.Generator().manual_seed(0)
    image, text = torch.nn.functional.normalize(torch.randn(2, rows, width, generator=random), dim=2)
    return LossBatch(image, text, torch.tensor(10.0), image, text)
