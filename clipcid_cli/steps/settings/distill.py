"""Settings of `clipcid distill`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import ClassVar

from clipcid_cli.algorithms.losses.registry import LOSSES, PRESETS, Weight, select_losses
from clipcid_cli.errors import UsageError
from clipcid_cli.steps.settings.augmentation import color_jitter_option, crop_scale_option, gray_probability_option
from clipcid_cli.steps.settings.fields import argument, option
from clipcid_cli.steps.settings.shared import BRIEF_SPINS, ReadingSettings, npz_array_option

NO_TEACHER = "none"

_MODELS = "Models"
_INPUTS = "Inputs"
_LOSS = "What is learned"
_LENGTH = "How long"
_OPTIMISER = "Optimiser"
_AUGMENT = "Augmentation"
_MEMORY = "Memory, speed and many processes"
_OUTPUT = "Output and checks"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillSettings(ReadingSettings):
    """Settings of the step `distill`."""

    # A step of a small student is a thousand short parallel sections: waking a sleeping thread for each doubled its time on
    # 2 cores (88 ms against 45 ms).
    openmp_spins: ClassVar[str] = BRIEF_SPINS

    data: str | None = argument(
        None,
        "Images and captions: a folder of tar shards, a tar, a brace pattern, an image folder or a list. By default the "
        "data the teacher's embeddings were made of.",
        metavar="DATA",
    )
    teacher: str | None = option(
        None,
        "Model to learn from; `none` trains without one. By default the one whose embeddings the work directory holds.",
        group=_MODELS,
    )
    online_teacher: bool = option(
        False,
        "Run the teacher beside the student, on the very crops and captions the student sees, instead of reading its "
        "embeddings: no embedding first, a forward pass of the teacher at every step.",
        group=_MODELS,
    )
    student: str | None = option(
        None,
        "Model to train: an architecture, a .json file of one (both start fresh), or weights to continue from.",
        group=_MODELS,
    )
    init_from: str | None = option(
        None,
        "Model whose weights the student starts from: of its layers every so-many-th, of wider ones evenly spaced heads "
        "and channels.",
        group=_MODELS,
        metavar="MODEL",
    )
    init_towers: str = option(
        "both",
        "Which towers --init-from fills.",
        group=_MODELS,
        choices=("both", "image", "text"),
    )
    freeze_image: bool = option(False, "Leave the image tower as it is and train the text tower.", group=_MODELS)
    freeze_text: bool = option(False, "Leave the text tower as it is and train the image tower.", group=_MODELS)
    embeddings: Path | None = option(
        None, "Folder of the teacher's embeddings; by default the work directory's.", group=_INPUTS, operational=True
    )
    npz_array: str | None = npz_array_option(_INPUTS)
    views: str = option(
        "stored",
        "`stored` shows the student the views that `embed --views` left, where there are any, with what the teacher said of "
        "each; `none` draws views anew and teaches what the teacher said of the whole image.",
        group=_INPUTS,
        choices=("stored", "none"),
    )
    keep_list: str | None = option(
        None,
        "Keep list of `clipcid balance`: train on its kept images only; `none` for all. By default the work directory's.",
        group=_INPUTS,
        operational=True,
    )
    clusters: Path | None = option(
        None, "Folder `clipcid cluster` wrote; by default the work directory's.", group=_INPUTS, operational=True
    )
    preset: str | None = option(
        None,
        "Set of losses: "
        + "; ".join(f"`{name}` = {' + '.join(losses)}" for name, losses in PRESETS.items())
        + ". By default cid, or clip where there is no teacher.",
        group=_LOSS,
        choices=tuple(PRESETS),
    )
    loss: tuple[str, ...] = option(
        (),
        "Change one weight of the preset or add a loss, as NAME=WEIGHT; may be repeated. Names: "
        + ", ".join(LOSSES)
        + ".",
        group=_LOSS,
        metavar="NAME=WEIGHT",
    )
    teacher_space: str = option(
        "auto",
        "Where student and teacher of different widths meet: `pca` rotates and cuts the teacher's embeddings, `project` "
        "learns a linear layer per tower, `auto` takes pca when it keeps 98% of the variance.",
        group=_LOSS,
        choices=("auto", "pca", "project"),
    )
    cluster_towers: str = option(
        "auto",
        "Which student towers the cluster loss teaches; `both` needs clusters made with text embeddings, `auto` takes both "
        "where they are, each sample shows one caption and the text tower is trained.",
        group=_LOSS,
        choices=("auto", "image", "both"),
    )
    label_share: float = option(
        0.5,
        "Share α of the k-means label in the cluster target; the rest is the teacher's distribution.",
        group=_LOSS,
        minimum=0.0,
        maximum=1.0,
    )
    candidate_ratio: float = option(
        0.1,
        "Share of all cluster centroids drawn at random beside those the batch names.",
        group=_LOSS,
        minimum=0.0,
        maximum=1.0,
    )
    min_candidates: int = option(
        4096,
        "Smallest number of cluster centroids a batch is compared with; all where there are fewer.",
        group=_LOSS,
        minimum=1,
    )
    candidate_correction: bool = option(
        True,
        "Count each centroid drawn at random for all those it represents; without, the batch's own clusters look too "
        "likely.",
        group=_LOSS,
    )
    cluster_temperature: float | None = option(
        None,
        "Temperature of the teacher's distribution over clusters; by default the one `clipcid cluster` chose and stored.",
        group=_LOSS,
        minimum=0.0,
        above_minimum=True,
    )
    batch_size: int | None = option(
        None, "Samples a batch, over all processes; by default at most 256.", group=_LENGTH, minimum=1
    )
    epochs: int | None = option(None, "Passes over the data; 32 unless --steps is given.", group=_LENGTH, minimum=1)
    steps: int | None = option(None, "Optimiser steps, instead of --epochs.", group=_LENGTH, minimum=1)
    accum_freq: int = option(
        1,
        "Encode a batch in this many parts, one at a time: the losses still see the whole batch, memory holds one part.",
        group=_MEMORY,
        minimum=1,
    )
    local_loss: bool = option(
        False,
        "Each process computes the losses of its own rows against everybody's, not all of them: with many processes that "
        "saves time and memory; the gradient is the same.",
        group=_MEMORY,
    )
    gather_with_grad: bool = option(
        False,
        "Always so here: gradients flow to the features of every process. Taken for commands written for open_clip.",
        group=_MEMORY,
        operational=True,
    )
    grad_checkpointing: bool = option(
        False,
        "Keep only the input of each layer for the backward pass and compute the rest again: less memory, about a third "
        "more time.",
        group=_MEMORY,
        operational=True,
    )
    torchcompile: bool = option(False, "Compile the towers (torch.compile); the first steps take long.", group=_MEMORY)
    lr: float = option(1e-3, "Peak learning rate.", group=_OPTIMISER, minimum=0.0, above_minimum=True)
    wd: float = option(
        0.2,
        "Weight decay; norms, biases, scales and the losses' own parameters have none.",
        group=_OPTIMISER,
        minimum=0.0,
    )
    beta1: float = option(0.9, "AdamW's decay of the mean.", group=_OPTIMISER, minimum=0.0, maximum=0.9999)
    beta2: float = option(0.98, "AdamW's decay of the square.", group=_OPTIMISER, minimum=0.0, maximum=0.9999)
    eps: float = option(
        1e-6, "AdamW's guard against division by zero.", group=_OPTIMISER, minimum=0.0, above_minimum=True
    )
    warmup: int | None = option(
        None,
        "Steps of linear warm-up before the cosine; by default a tenth of all, at most 2,000.",
        group=_OPTIMISER,
        minimum=0,
    )
    grad_clip_norm: float | None = option(
        1.0, "Largest norm of the gradient; 0 for no limit.", group=_OPTIMISER, minimum=0.0
    )
    crop_scale: float = crop_scale_option(_AUGMENT, "")
    color_jitter: float = color_jitter_option(_AUGMENT, "")
    gray_probability: float = gray_probability_option(_AUGMENT, "images")
    caption_dropout: float = option(
        0.0,
        "Probability with which each comma-separated part of a caption but the first is left out, anew each epoch; for "
        "captions that end in keywords, and not with a teacher's embeddings.",
        group=_AUGMENT,
        minimum=0.0,
        maximum=1.0,
    )
    name: str | None = option(
        None,
        "Name of the run and of its folder; by default student, preset and keep list make one.",
        group=_OUTPUT,
        operational=True,
    )
    val_fraction: float = option(
        0.01, "Share of the samples held out, chosen by their keys' hashes.", group=_OUTPUT, minimum=0.0, maximum=0.5
    )
    eval_every: int | None = option(
        None, "Steps between evaluations on the held-out part; by default a tenth of the run.", group=_OUTPUT, minimum=1
    )
    eval_data: tuple[str, ...] = option(
        (),
        "Data set measured zero-shot at each evaluation, as `clipcid eval-zeroshot` would; may be repeated.",
        group=_OUTPUT,
        metavar="DATA",
        operational=True,
    )
    report_to: str = option(
        "none",
        "Also write the log for TensorBoard, into the run's folder tensorboard/.",
        group=_OUTPUT,
        choices=("none", "tensorboard"),
        operational=True,
    )
    checkpoint_every: int | None = option(
        None,
        "Steps between checkpoints; by default a tenth of the run, at most 1,000.",
        group=_OUTPUT,
        minimum=1,
        operational=True,
    )
    resume: str = option(
        "auto",
        "`auto` goes on from the last checkpoint of an unfinished run of equal settings, `latest` demands that there is "
        "one, `never` starts an unfinished run over.",
        group=_OUTPUT,
        choices=("auto", "latest", "never"),
        operational=True,
    )

    def __post_init__(self) -> None:
        """Check what one field alone cannot tell."""
        super().__post_init__()
        if self.student is None:
            raise UsageError(
                "No student was named.", "Give --student, e.g. --student ViT-B-32 or a .json file of an architecture."
            )
        if self.freeze_image and self.freeze_text:
            raise UsageError("--freeze-image and --freeze-text leave nothing to train.", "Give one of them.")
        if self.init_towers != "both" and self.init_from is None:
            raise UsageError(f"--init-towers {self.init_towers} without --init-from.", "Say from which model.")
        if self.epochs is not None and self.steps is not None:
            raise UsageError("--epochs and --steps were both given.", "Give one of them.")
        if self.teacher == NO_TEACHER:
            for name in self.losses():
                if LOSSES[name].needs_teacher:
                    raise UsageError(
                        f"--teacher none, but the loss {name} learns from a teacher.",
                        f"Name a teacher, or use --preset clip without --loss {name}=….",
                    )
        if self.caption_dropout and self.needs_teacher and not self.online_teacher:
            raise UsageError(
                "--caption-dropout changes captions, and the teacher's text embeddings are of the whole ones.",
                "Leave it away, add --online-teacher, or train without a teacher.",
            )
        if self.online_teacher and not self.needs_teacher:
            raise UsageError("--online-teacher, but no loss of the run learns from a teacher.", "Leave it away.")
        if not self.losses():
            raise UsageError("No loss is left: every weight is 0.", "Give one --loss a weight above 0.")

    @property
    def chosen_preset(self) -> str:
        """The preset: as given, else `clip` without a teacher and `cid` with one."""
        return self.preset or ("clip" if self.teacher == NO_TEACHER else "cid")

    def losses(self) -> dict[str, Weight]:
        """Return the losses of the run with their weights, in registry order.

        Raises:
            UsageError: for a --loss that is not NAME=WEIGHT with a known name and a weight of at least 0.
        """
        return select_losses(self.chosen_preset, dict(_parse_loss(text) for text in self.loss))

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss of the run reads teacher embeddings."""
        return any(LOSSES[name].needs_teacher for name in self.losses())


def _parse_loss(text: str) -> tuple[str, float]:
    name, equals, number = text.partition("=")
    if name not in LOSSES:
        raise UsageError(f"--loss {text}: there is no loss {name!r}.", f"Losses are: {', '.join(LOSSES)}.")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not equals or not 0 <= weight < math.inf:
        raise UsageError(f"--loss {text}: the weight must be a number >= 0.", f"Write, for example, --loss {name}=0.5.")
    return name, weight
