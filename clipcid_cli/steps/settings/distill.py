"""Settings of `clipcid distill`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import ClassVar

from clipcid_cli.algorithms.losses.registry import DEFAULT_PRESET, LOSSES, PRESETS, Weight, select_losses
from clipcid_cli.errors import UsageError
from clipcid_cli.steps.settings.augmentation import color_jitter_option, crop_scale_option, gray_probability_option
from clipcid_cli.steps.settings.cluster_loss import (
    candidate_correction_option,
    candidate_ratio_option,
    cluster_temperature_option,
    cluster_towers_option,
    clusters_option,
    label_share_option,
    min_candidates_option,
    refuse_cluster_flags,
)
from clipcid_cli.steps.settings.fields import argument, option
from clipcid_cli.steps.settings.optimisation import (
    beta_option,
    decay_option,
    ema_option,
    eps_option,
    lr_option,
    optimizer_option,
)
from clipcid_cli.steps.settings.shared import BRIEF_SPINS, ReadingSettings, npz_array_option
from clipcid_cli.steps.settings.teacher_extras import (
    DEFAULT_VARIANT_SHARE,
    extra_texts_option,
    text_variant_share_option,
    texts_option,
    views_option,
)

NO_TEACHER = "none"

_MODELS = "Models"
_INPUTS = "Inputs"
_LOSS = "Losses"
_LENGTH = "Length of the training"
_OPTIMISER = "Optimizer"
_AUGMENT = "Augmentation"
_MEMORY = "Memory and speed"
_OUTPUT = "Output, checkpoints and evaluation"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillSettings(ReadingSettings):
    """Settings of the step `distill`."""

    # A step of a small student is a thousand short parallel sections: waking a sleeping thread for each doubled its time on
    # 2 cores (88 ms against 45 ms).
    openmp_spins: ClassVar[str] = BRIEF_SPINS

    data: str | None = argument(
        None,
        "Images and captions: a folder of tar shards, one tar, a pattern such as x/{00000..00099}.tar, a folder of images, "
        "or a csv, tsv or parquet list. By default, the data of the teacher's embeddings.",
        metavar="DATA",
    )
    teacher: str | None = option(
        None,
        "Model to learn from; `none` trains without one. By default, the model of the embeddings in the work directory.",
        group=_MODELS,
        metavar="MODEL",
    )
    online_teacher: bool = option(
        False,
        "Run the teacher in every training step, on the same crops and captions as the student, instead of reading stored "
        "embeddings.",
        group=_MODELS,
    )
    student: str | None = option(
        None,
        "Model to train: an architecture or a .json file of one (random weights), or a model whose weights to start from.",
        group=_MODELS,
        metavar="MODEL",
    )
    init_from: str | None = option(
        None,
        "Model to initialize the student from. Of a deeper model every N-th layer is copied, of a wider one evenly spaced "
        "heads and channels.",
        group=_MODELS,
        metavar="MODEL",
    )
    init_towers: str = option(
        "both",
        "Towers that --init-from initializes.",
        group=_MODELS,
        choices=("both", "image", "text"),
    )
    freeze_image: bool = option(False, "Freeze the image tower and train only the text tower.", group=_MODELS)
    freeze_text: bool = option(False, "Freeze the text tower and train only the image tower.", group=_MODELS)
    embeddings: Path | None = option(
        None,
        "Folder of the teacher's embeddings; by default those in the work directory.",
        group=_INPUTS,
        operational=True,
    )
    npz_array: str | None = npz_array_option(_INPUTS)
    cache_size: float = option(
        50.0,
        "Most disk space, in GB, for copies of shards behind a URL; the least recently used make room. The folder is "
        "CLIPCID_CACHE, by default ~/.cache/clipcid.",
        group=_INPUTS,
        minimum=0.0,
        above_minimum=True,
        metavar="GB",
        operational=True,
    )
    views: str | None = views_option(_INPUTS)
    text_variant_share: float | None = text_variant_share_option(_INPUTS)
    extra_texts: int | None = extra_texts_option(_INPUTS)
    texts: Path | None = texts_option(_INPUTS)
    keep_list: str | None = option(
        None,
        "Keep list of `clipcid balance`: train only on its kept images, or on all with `none`. By default, the work "
        "directory's if there is one.",
        group=_INPUTS,
        metavar="FILE",
        operational=True,
    )
    clusters: Path | None = clusters_option(_INPUTS)
    preset: str | None = option(
        None,
        "Combination of losses: "
        + "; ".join(f"`{name}` = {' + '.join(losses)}" for name, losses in PRESETS.items())
        + f". By default {DEFAULT_PRESET}, or clip without a teacher.",
        group=_LOSS,
        choices=tuple(PRESETS),
    )
    loss: tuple[str, ...] = option(
        (),
        "Add a loss or change its weight in the preset; may be repeated. Names: " + ", ".join(LOSSES) + ".",
        group=_LOSS,
        metavar="NAME=WEIGHT",
    )
    teacher_space: str = option(
        "auto",
        "How embeddings of different widths are compared: `pca` reduces the teacher's to the student's width, `project` "
        "learns a linear layer per tower, `auto` uses pca if it keeps 98% of the variance.",
        group=_LOSS,
        choices=("auto", "pca", "project"),
    )
    cluster_towers: str = cluster_towers_option(_LOSS)
    label_share: float = label_share_option(_LOSS)
    candidate_ratio: float = candidate_ratio_option(_LOSS)
    min_candidates: int = min_candidates_option(_LOSS)
    candidate_correction: bool = candidate_correction_option(_LOSS)
    cluster_temperature: float | None = cluster_temperature_option(_LOSS)
    batch_size: int | None = option(
        None,
        "Samples per batch over all processes; by default at most 256, on GPUs up to 512 for each if that leaves 20,000 "
        "steps.",
        group=_LENGTH,
        minimum=1,
    )
    epochs: int | None = option(None, "Passes over the data; by default 32.", group=_LENGTH, minimum=1)
    steps: int | None = option(None, "Optimizer steps, instead of --epochs.", group=_LENGTH, minimum=1)
    accum_freq: int = option(
        1,
        "Encode each batch in this many parts to save memory; the losses still see the whole batch.",
        group=_MEMORY,
        minimum=1,
    )
    local_loss: bool = option(
        True,
        "Compute in each process only the losses of its own rows; without it, each computes those of all, in more time and "
        "memory. The gradient is the same.",
        group=_MEMORY,
    )
    gather_with_grad: bool = option(
        False,
        "Accepted for compatibility with open_clip; gradients always flow to the features of every process.",
        group=_MEMORY,
        operational=True,
    )
    grad_checkpointing: bool = option(
        False,
        "Recompute activations in the backward pass: less memory, about a third more time.",
        group=_MEMORY,
        operational=True,
    )
    fast_decode: bool = option(
        False,
        "Decode large JPEGs at reduced resolution, at least twice the student's input size, or more with a small "
        "--crop-scale. Faster; pixels differ slightly. Evaluation does not use it.",
        group=_MEMORY,
    )
    torchcompile: bool = option(
        False, "Compile the towers with torch.compile; the first steps take longer.", group=_MEMORY
    )
    optimizer: str = optimizer_option(_OPTIMISER)
    lr: float | None = lr_option(_OPTIMISER)
    wd: float = decay_option(_OPTIMISER)
    beta1: float = beta_option(_OPTIMISER, 0.9, "gradient mean")
    beta2: float = beta_option(_OPTIMISER, 0.98, "squared gradient")
    eps: float = eps_option(_OPTIMISER)
    warmup: int | None = option(
        None,
        "Steps of linear warm-up before the cosine schedule; by default a tenth of the run, at most 2,000.",
        group=_OPTIMISER,
        minimum=0,
    )
    grad_clip_norm: float | None = option(
        1.0, "Maximum gradient norm; 0 disables clipping.", group=_OPTIMISER, minimum=0.0
    )
    ema: float | None = ema_option(_OPTIMISER)
    crop_scale: float = crop_scale_option(_AUGMENT)
    color_jitter: float = color_jitter_option(_AUGMENT)
    gray_probability: float = gray_probability_option(_AUGMENT)
    caption_dropout: float = option(
        0.0,
        "Probability of dropping each comma-separated part of a caption except the first, for captions that end in "
        "keywords. Not possible with stored teacher embeddings.",
        group=_AUGMENT,
        minimum=0.0,
        maximum=1.0,
    )
    name: str | None = option(
        None,
        "Name of the run and its folder; by default made of student, preset and seed.",
        group=_OUTPUT,
        metavar="NAME",
        operational=True,
    )
    val_fraction: float = option(
        0.01,
        "Share of the samples held out for validation, chosen by a hash of the key.",
        group=_OUTPUT,
        minimum=0.0,
        maximum=0.5,
    )
    eval_every: int | None = option(
        None,
        "Steps between evaluations on the held-out samples; by default a tenth of the run.",
        group=_OUTPUT,
        minimum=1,
    )
    eval_data: tuple[str, ...] = option(
        (),
        "Data set to measure at each evaluation, and at the end by `clipcid eval-zeroshot`; may be repeated.",
        group=_OUTPUT,
        metavar="DATA",
        operational=True,
    )
    report_to: str = option(
        "none",
        "Also write TensorBoard logs to tensorboard/ in the run's folder.",
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
        "`auto` continues an unfinished run with the same settings from its last checkpoint, `latest` fails if there is "
        "none, `never` starts over.",
        group=_OUTPUT,
        choices=("auto", "latest", "never"),
        operational=True,
    )

    def __post_init__(self) -> None:
        """Check what involves several fields."""
        super().__post_init__()
        if self.student is None:
            raise UsageError(
                "No student was given.", "Give --student, e.g. --student ViT-B-32 or a .json file of an architecture."
            )
        if self.freeze_image and self.freeze_text:
            raise UsageError("--freeze-image with --freeze-text leaves nothing to train.", "Omit one of the two.")
        if self.init_towers != "both" and self.init_from is None:
            raise UsageError(f"--init-towers {self.init_towers} needs --init-from.", "Add --init-from MODEL.")
        if self.resume == "latest" and self.overwrite:
            raise UsageError("--resume latest goes on with a run that --overwrite discards.", "Omit one of the two.")
        if self.name is not None and (self.name in ("", "..") or Path(self.name).name != self.name):
            raise UsageError(f"--name {self.name!r} is not the name of one folder.", "Use a name without slashes.")
        if self.epochs is not None and self.steps is not None:
            raise UsageError("--epochs and --steps were both given.", "Omit one of the two.")
        if self.teacher == NO_TEACHER:
            for name in self.losses():
                if LOSSES[name].needs_teacher:
                    raise UsageError(
                        f"--teacher is none, but the loss {name} needs a teacher.",
                        f"Name a teacher, or use --preset clip without --loss {name}=….",
                    )
        if self.caption_dropout and self.needs_teacher and not self.online_teacher:
            raise UsageError(
                "--caption-dropout changes captions, but the teacher's text embeddings are of the full captions.",
                "Omit it, add --online-teacher, or train without a teacher.",
            )
        if self.online_teacher and not self.needs_teacher:
            raise UsageError(
                "--online-teacher was given, but no loss of the run needs a teacher.", "Omit --online-teacher."
            )
        if self.torchcompile and any(LOSSES[name].reads_tokens for name in self.losses()):
            raise UsageError(
                "--torchcompile compiles no pass that gives the features of patches and tokens, which td reads.",
                "Omit --torchcompile, or use --loss td=0.",
            )
        if not any(LOSSES[name].needs_clusters for name in self.losses()):
            refuse_cluster_flags(self)
        self._check_stored_extras()
        if self.extra_texts or self.texts is not None:
            self._check_extra_texts()
        if not self.losses():
            raise UsageError("All losses have a weight of 0.", "Give at least one --loss a weight above 0.")

    def _check_stored_extras(self) -> None:
        given = {
            "--views stored": self.views == "stored",
            "--text-variant-share": bool(self.text_variant_share),
            "--texts": self.texts is not None,
        }
        flags = " and ".join(flag for flag, is_given in given.items() if is_given)
        if flags and (self.online_teacher or not self.needs_teacher):
            reason = "--online-teacher reads none" if self.online_teacher else "no loss of the run needs a teacher"
            raise UsageError(
                f"{flags}: for what the teacher has embedded, but {reason}.",
                f"Omit {flags}" + (", or --online-teacher." if self.online_teacher else "."),
            )

    def _check_extra_texts(self) -> None:
        flag = f"--extra-texts {self.extra_texts}" if self.extra_texts else "--texts"
        if self.extra_texts == 0:
            raise UsageError("--texts names the texts for --extra-texts, but that is 0.", "Omit one of the two.")
        taking = [name for name, entry in LOSSES.items() if entry.takes_extra_texts]
        if not set(taking) & self.losses().keys():
            raise UsageError(
                f"{flag}, but no loss of the run takes texts without images.",
                f"Add one that does ({', '.join(taking)}), or omit {flag}.",
            )
        if self.online_teacher or self.freeze_text:
            other = "--online-teacher" if self.online_teacher else "--freeze-text"
            raise UsageError(
                f"{flag} trains the text tower on stored embeddings of texts: not with {other}.", "Omit one of the two."
            )

    @property
    def shows_views(self) -> bool:
        """Whether stored views are shown, where there are any."""
        return self.views != "none"

    @property
    def shows_extra_texts(self) -> bool:
        """Whether further texts are shown, where there are any."""
        taken = any(LOSSES[name].takes_extra_texts for name in self.losses())
        return taken and self.extra_texts != 0 and not (self.online_teacher or self.freeze_text)

    @property
    def variant_share(self) -> float:
        """Share of the captions shown as a text variant, where there are any."""
        return DEFAULT_VARIANT_SHARE if self.text_variant_share is None else self.text_variant_share

    @property
    def chosen_preset(self) -> str:
        """The preset: as given, else the default with a teacher or without."""
        return self.preset or ("clip" if self.teacher == NO_TEACHER else DEFAULT_PRESET)

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
        raise UsageError(
            f"--loss {text}: the weight must be a number of at least 0.", f"For example: --loss {name}=0.5"
        )
    return name, weight
