"""What tests of the teacher's side share: data with several captions, embeddings made here, and batches of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from conftest import changed, make_caption, make_image, write_tar
from distill_data import STUDENT
from torch import Tensor

from clipcid_cli.algorithms.losses.shared_space import project
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.runtime.distributed import DistContext, open_dist_context
from clipcid_cli.runtime.models.clip_model import ClipModel, normalize_pixels
from clipcid_cli.runtime.models.renderer import Processor
from clipcid_cli.runtime.models.views import apply_colors
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.steps.data_index import ensure_index
from clipcid_cli.steps.distill.batches import Batches, BatchMaker, DealtBatch
from clipcid_cli.steps.distill.inputs import Inputs, find_inputs
from clipcid_cli.steps.distill.online_teacher import OnlineTeacher, RunningModel
from clipcid_cli.steps.distill.space import choose_space
from clipcid_cli.steps.distill.teachers import Teacher, TeacherRows
from clipcid_cli.steps.distill.training_batch import TrainingBatch
from clipcid_cli.steps.embed import run as embed
from clipcid_cli.steps.embed.result import Embedded
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.embed import EmbedSettings

ALONE = DistContext(0, 1, 0, torch.device("cpu"))
FP32 = Precision("fp32", "a test")


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


def write_student(folder: Path) -> Path:
    """Write an architecture that differs from the tiny teacher in width, resolution and context."""
    path = folder / "student.json"
    sizes = {"vision_cfg__image_size": 24, "vision_cfg__patch_size": 12, "text_cfg__context_length": 10}
    path.write_text(json.dumps(changed(STUDENT, **sizes)))
    return path


def embed_data(data: Path, model: Path, out: Path, **settings: Any) -> Embedded:
    """Run `embed` in this process: fp32, batches of 8, no workers unless told otherwise."""
    given = {"precision": "fp32", "batch_size": 8, "workers": 0, "device": "cpu"} | settings
    return embed.run(EmbedSettings(data=str(data), model=str(model), out=out, **given))


def read_params(embeddings: Embeddings, row: int, view: int) -> npt.NDArray[np.float32]:
    """Return what reproduces one of an image's views."""
    place = row * embeddings.num_each(Kind.VIEWS) + view
    return np.array(embeddings.rows(Kind.VIEW_PARAMS).read(place, place + 1)[0])


def read_keys(embeddings: Embeddings) -> list[str]:
    """Return the keys of all rows."""
    return [key for file in embeddings.files for key in embeddings.keys_of(file).to_pylist()]


def index_data(dataset: Dataset, folder: Path) -> Dataset:
    """Return a data set with an index of its own."""
    dataset = dataclasses.replace(dataset, index_folder=folder / "index")
    with open_dist_context("cpu") as context:
        return ensure_index(dataset, context, 0)


def assert_bytes_are_counted(maker: BatchMaker, dealt: DealtBatch, parts: Sequence[TrainingBatch]) -> None:
    """Check that the bytes of the parts of a batch are those that are counted beforehand."""
    for work, part in zip(dealt.work, parts, strict=True):
        taken = sum(value.nbytes for value in vars(part).values() if isinstance(value, Tensor))
        assert maker.count_bytes(len(work.items), len(work.extra_texts)) == taken


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run reads, and the batches that it makes of it."""

    settings: DistillSettings
    inputs: Inputs

    def show(
        self, student: ClipModel, epoch: int = 0, teacher: ClipModel | None = None
    ) -> tuple[list[int], TrainingBatch]:
        """Make one batch of a whole epoch; with the rows of its samples among those to train on."""
        inputs = self._taught_by(teacher)
        maker = BatchMaker(self.settings, inputs, Processor.from_model(student))
        batches = Batches(inputs, maker, None, inputs.training.total, self.settings.seed, ALONE)
        [dealt] = batches.deal(range(epoch, epoch + 1))
        parts = batches.make_here(dealt)
        assert_bytes_are_counted(maker, dealt, parts)
        return dealt.rows.tolist(), batches.finish(dealt, parts)

    def teach(self, batch: TrainingBatch, width: int = 32, online: ClipModel | None = None) -> tuple[Tensor, ...]:
        """Return what the teacher tells a student of some width: rows of images, of captions and of further texts."""
        inputs = self._taught_by(online)
        teacher = inputs.teacher
        space = choose_space(inputs, width, ALONE)
        teacher.announce(inputs.losses)
        rows = teacher.rows(batch)
        assert isinstance(rows, TeacherRows)
        shared = (None if part is None else project(part.float(), space.axes) for part in rows)
        return tuple(shared)  # type: ignore[arg-type]  # None where there are none

    def _taught_by(self, model: ClipModel | None) -> Inputs:
        """Return the inputs with a model as the teacher that runs alongside the student, where one does."""
        teacher = self.inputs.teacher
        if isinstance(teacher, OnlineTeacher):
            teacher = Teacher() if model is None else dataclasses.replace(teacher, running=RunningModel(model, FP32))
        return dataclasses.replace(self.inputs, teacher=teacher)

    @property
    def embeddings(self) -> Embeddings:
        """The teacher's."""
        assert self.inputs.teacher.embeddings is not None
        return self.inputs.teacher.embeddings


def join(data: Path, folder: Path, **settings: Any) -> Run:
    """Match embeddings with the data they were made of; all samples are trained on, unless there is a keep list."""
    given: dict[str, Any] = {"work": Path(mkdtemp(dir=folder.parent)), "data": str(data), "student": "student.json"}
    given |= {
        "preset": "clip-kd",
        "keep_list": "none",
        "val_fraction": 0.0,
        "seed": 3,
        "workers": 0,
        "precision": "fp32",
    }
    asked = DistillSettings(**given | {"embeddings": (folder,)} | settings)
    return Run(asked, find_inputs(asked, asked.embeddings, None))


def encode_shown(model: ClipModel, batch: TrainingBatch) -> tuple[np.ndarray, np.ndarray]:
    """Embed what a batch shows, pixels in their colours and tokens: float32 rows [b, D] of images and of texts."""
    pixels = batch.pixels if batch.colors is None else apply_colors(batch.pixels, batch.colors)
    images = model.encode_images(normalize_pixels(pixels, model.info.preprocess), FP32)
    return images.numpy(), model.encode_texts(batch.tokens, FP32).numpy()


def shown_views(run: Run, rows: list[int], batch: TrainingBatch) -> list[int]:
    """Tell by the teacher's rows which stored view each sample shows; −1 for the whole image."""
    views, whole = run.embeddings.rows(Kind.VIEWS), run.embeddings.rows(Kind.IMAGES)
    count, found = run.inputs.teacher.num_views, list[int]()
    assert batch.teacher_image_bD is not None
    embedded = run.inputs.training.column("embeddings")[rows].tolist()
    for row, shown in zip(embedded, batch.teacher_image_bD.numpy(), strict=True):
        stored = np.concatenate([views.read(row * count, (row + 1) * count), whole.read(row, row + 1)])
        [place] = np.flatnonzero((stored == shown).all(axis=1)).tolist()
        found.append(-1 if place == count else place)
    return found
