"""Settings of `distill`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from clipcid_cli.algorithms.losses.registry import (
    AFFINITY_SCALE,
    CLIP_SCALE,
    CLUSTERS,
    DEFAULT_PRESET,
    LOSSES,
    NEAR_CHANCE,
    PRESETS,
    SAMPLE_INPUTS,
    TOKENS,
    LossEntry,
    Weight,
    select_losses,
)
from clipcid_cli.errors import UsageError
from clipcid_cli.formats.loss_file import FUSION, SCALE, LossFile, names_loss_file, read_loss_file
from clipcid_cli.steps.settings.gpu_plan import GpuPlanSettings
from clipcid_cli.steps.settings.shared import (
    ABOVE_0,
    AT_LEAST_1,
    BRIEF_SPINS,
    FRACTION,
    AugmentationSettings,
    KeptSettings,
    Range,
    ReadingSettings,
    TrainingDataSettings,
    flag_of,
    given_fields,
    group,
)

NO_TEACHER = "none"
DEFAULT_EPOCHS = 32
# Samples of a batch by default: at least so many (fewer if the data has fewer), with --steps so many for each GPU. On GPUs
# without --steps as many as fit, up to CLIP's own batch, as long as that leaves so many steps.
_SMALLEST_BATCH = 256
_LARGEST_BATCH = 32_768
_ENOUGH_STEPS = 20_000
OPTIMIZERS = ("muon", "adamw")

# The flags of one loss, and how to have that loss.
_FLAGS_OF = {
    "cluster": (
        "clusters",
        "cluster_towers",
        "label_share",
        "candidate_ratio",
        "min_candidates",
        "candidate_correction",
        "cluster_temperature",
    ),
    "affinity": ("affinity_scale",),
}
_TO_HAVE = {"cluster": "--preset cid or --loss cluster=0.5", "affinity": "--preset dr or --loss affinity=0.75"}
_OF_EXTRA_TEXTS = [name for name, loss in LOSSES.items() if loss.teaches_extra_texts]

_models = group("Models")
_input = group("Inputs")
_loss = group("Losses")
_length = group("Length of the training")
_memory = group("Memory and speed")
_optimizer = group("Optimizer")
_augment = group("Augmentation")
_output = group("Output, checkpoints and evaluation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillSettings(AugmentationSettings, KeptSettings, TrainingDataSettings, GpuPlanSettings):
    """Settings of `distill`."""

    # A step of a small student is a thousand short parallel sections: waking a sleeping thread for each doubled its time on
    # 2 cores (88 ms against 45 ms).
    openmp_spins: ClassVar[str] = BRIEF_SPINS

    teacher: tuple[str, ...] = _models(
        (),
        "Model to learn from; `none` trains without one. By default, the model of the embeddings in the work directory. May "
        "be repeated: several teachers, whose cosines are averaged.",
        metavar="MODEL",
    )
    online_teacher: bool = _models(
        False,
        "Run the teacher in every training step, on the same crops and captions as the student, instead of reading stored "
        "embeddings.",
    )
    student: str | None = _models(
        None,
        "Model to train: an architecture or a .json file of one (random weights), or a model whose weights to start from.",
        metavar="MODEL",
    )
    init_from: str | None = _models(
        None,
        "Model to initialize the student from. From a deeper model every N-th layer is copied, from a wider one "
        "evenly spaced heads and channels.",
        metavar="MODEL",
    )
    init_towers: str = _models("both", "Towers that --init-from initializes.", choices=("both", "image", "text"))
    text_tower: str = _models(
        "own",
        "`teacher` keeps the teacher's text tower and logit scale, and trains an image tower for them, so that stored "
        "embeddings of texts stay valid. The data needs no captions.",
        choices=("own", "teacher"),
    )
    freeze_image: bool = _models(False, "Freeze the image tower and train only the text tower.")
    freeze_text: bool = _models(False, "Freeze the text tower and train only the image tower.")
    cache_size: float = _input(
        50.0,
        "Maximum disk space, in GB, for copies of remote shards; the least recently used are removed. The folder is "
        "CLIPCID_CACHE, by default ~/.cache/clipcid.",
        within=ABOVE_0,
        metavar="GB",
        operational=True,
    )
    student_caption_key: tuple[str, ...] = _input(
        (),
        "Where the captions are that the student reads, as for --caption-key: translations of those that the teacher has "
        "embedded. A sample without one is left out; of several the first is taken.",
        metavar="KEY",
    )
    views: str | None = _input(
        None,
        "`stored`, the default, trains on the views of `embed --views`, if there are any, each with its own teacher "
        "embedding. `none` draws new views and uses the teacher's embedding of the whole image.",
        choices=("stored", "none"),
    )
    extra_texts: int | None = _input(
        None,
        f"Further texts in each batch, for the text tower alone, by losses {' and '.join(_OF_EXTRA_TEXTS)}: those of "
        "`embed --text-variants`. By default one per sample, if there are such texts; 0 for none.",
        within=Range(0),
    )
    clusters: Path | None = _input(
        None, "Output folder of `clipcid cluster`; by default the one in the work directory.", operational=True
    )
    preset: str | None = _loss(
        None,
        "Combination of losses: "
        + "; ".join(f"`{name}` = {' + '.join(losses)}" for name, losses in PRESETS.items())
        + f". By default {DEFAULT_PRESET}, or clip without a teacher.",
        choices=tuple(PRESETS),
    )
    loss: tuple[str, ...] = _loss(
        (),
        "Add a loss or change its weight in the preset; may be repeated. Names: "
        + ", ".join(LOSSES)
        + "; or FILE.py:FUNCTION, a loss of your own.",
        metavar="NAME=WEIGHT",
    )
    affinity_scale: float = _loss(
        AFFINITY_SCALE,
        "Scale of the teacher's similarities in the loss affinity; a lower one softens its targets.",
        within=ABOVE_0,
    )
    teacher_space: str = _loss(
        "auto",
        "How embeddings of different widths are compared: `pca` reduces the teacher's to the student's width, `project` "
        "learns a linear layer per tower, `auto` uses pca if it keeps 98% of the squared length.",
        choices=("auto", "pca", "project"),
    )
    cluster_towers: str = _loss(
        "auto",
        "Student towers that the cluster loss trains. `both` needs clusters made with text embeddings; `auto` uses both "
        "where possible.",
        choices=("auto", "image", "both"),
    )
    label_share: float = _loss(
        0.5,
        "Weight α of the k-means label in the cluster target; the rest is the teacher's soft distribution over clusters.",
        within=FRACTION,
    )
    candidate_ratio: float = _loss(
        0.1,
        "Share of all centroids that are sampled as negatives for a batch, in addition to the batch's own clusters.",
        within=FRACTION,
    )
    min_candidates: int = _loss(
        4096, "Minimum number of centroids a batch is compared with; all if there are fewer.", within=AT_LEAST_1
    )
    candidate_correction: bool = _loss(
        True,
        "Correct the softmax over sampled centroids for their sampling rate; without it, the batch's own clusters are "
        "overestimated.",
    )
    cluster_temperature: float | None = _loss(
        None,
        "Temperature of the teacher's distribution over clusters; by default the one that `clipcid cluster` chose.",
        within=ABOVE_0,
    )
    batch_size: int | None = _length(
        None,
        "Samples per batch over all processes; by default at most 256; on GPUs as many as fit into 80% of their memory if "
        "that leaves 20,000 steps, or with --steps 256 per GPU.",
        within=AT_LEAST_1,
    )
    epochs: int | None = _length(None, "Passes over the data; by default 32.", within=AT_LEAST_1)
    steps: int | None = _length(None, "Optimizer steps, instead of --epochs.", within=AT_LEAST_1)
    accum_freq: int = _memory(
        1,
        "Encode each batch in this many parts to save memory; the losses still see the whole batch.",
        within=AT_LEAST_1,
    )
    local_loss: bool = _memory(
        True,
        "Compute in each process only the losses of its own rows; otherwise each computes those of all rows, with "
        "more time and memory. The gradient is the same.",
    )
    grad_checkpointing: bool = _memory(
        False, "Recompute activations in the backward pass: less memory, about a third more time.", operational=True
    )
    fast_decode: bool = _memory(
        False,
        "Decode large JPEGs at reduced resolution, at least twice the student's input size, or more with a small "
        "--crop-scale. Faster; pixels differ slightly. Evaluation does not use it.",
    )
    torchcompile: bool = _memory(
        False,
        "Compile the towers with torch.compile, but not an open_clip text tower, whose text length varies by batch; "
        "the first steps take longer.",
    )
    optimizer: str = _optimizer(
        "muon",
        "`muon` updates the layers of the towers by Muon, the rest by AdamW; `adamw` updates all by AdamW.",
        choices=OPTIMIZERS,
    )
    lr: float | None = _optimizer(
        None,
        "Peak learning rate; by default it follows from losses, optimizer, batch size and the student's width, and "
        "is a tenth of that for already trained weights; the run prints it.",
        within=ABOVE_0,
    )
    wd: float = _optimizer(
        0.2, "Weight decay; not applied to norms, biases, scales and the parameters of losses.", within=Range(0)
    )
    beta1: float = _optimizer(0.9, "AdamW's decay rate of the gradient mean.", within=Range(0, 0.9999))
    beta2: float = _optimizer(0.98, "AdamW's decay rate of the squared gradient.", within=Range(0, 0.9999))
    eps: float = _optimizer(1e-6, "AdamW's epsilon.", within=ABOVE_0)
    warmup: int | None = _optimizer(
        None,
        "Steps of linear warm-up before the cosine schedule; by default a tenth of the run, at most 2,000.",
        within=Range(0),
    )
    grad_clip_norm: float | None = _optimizer(1.0, "Maximum gradient norm; 0 disables clipping.", within=Range(0))
    ema: float | None = _optimizer(
        None,
        "Also keep an exponential moving average of the student's weights with this decay, such as 0.999; it is evaluated "
        "beside the student and written to student-ema/, for `clipcid export --ema`. Takes 4 bytes per trained parameter.",
        within=Range(0, 0.999999, min_open=True),
        metavar="DECAY",
    )
    caption_dropout: float = _augment(
        0.0,
        "Probability of dropping each comma-separated part of a caption except the first, for captions that end in "
        "keywords. Not possible with stored teacher embeddings.",
        within=FRACTION,
    )
    name: str | None = _output(
        None,
        "Name of the run and its folder; by default made from student, preset and seed.",
        metavar="NAME",
        operational=True,
    )
    val_fraction: float = _output(
        0.01, "Share of the samples held out for validation, chosen by a hash of the key.", within=Range(0, 0.5)
    )
    eval_every: int | None = _output(
        None, "Steps between evaluations on the held-out samples; by default a tenth of the run.", within=AT_LEAST_1
    )
    eval_data: tuple[str, ...] = _output(
        (),
        "Data set to measure at each evaluation, and at the end by `clipcid eval-zeroshot`; may be repeated.",
        metavar="DATA",
        operational=True,
    )
    report_to: str = _output(
        "none",
        "Also log to TensorBoard, in tensorboard/ of the run's folder, or to Weights & Biases (project clipcid, or that of "
        "WANDB_PROJECT).",
        choices=("none", "tensorboard", "wandb"),
        operational=True,
    )
    checkpoint_every: int | None = _output(
        None,
        "Steps between checkpoints, at most; by default a tenth of the run, at most 1,000. After 8 minutes there is one in "
        "any case.",
        within=AT_LEAST_1,
        operational=True,
    )
    resume: str = _output(
        "auto",
        "`auto` continues an unfinished run with the same settings from its last checkpoint, `latest` fails if there is "
        "none, `never` starts over.",
        choices=("auto", "latest", "never"),
        operational=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.losses:
            raise UsageError("All losses have a weight of 0.", "Give at least one --loss a weight above 0.")
        if self.student is None:
            raise UsageError(
                "No student was given.", "Give --student, e.g. --student ViT-B-32 or a .json file of an architecture."
            )
        if self.freeze_image and self.freeze_text:
            raise UsageError("--freeze-image with --freeze-text leaves nothing to train.", "Omit one of the two.")
        if self.keeps_text_tower:
            self._validate_kept_text_tower()
        if self.student_caption_key:
            self._validate_student_captions()
        if self.init_towers != "both" and self.init_from is None:
            raise UsageError(f"--init-towers {self.init_towers} needs --init-from.", "Add --init-from MODEL.")
        if self.resume == "latest" and self.overwrite:
            raise UsageError("--resume latest goes on with a run that --overwrite discards.", "Omit one of the two.")
        if self.name is not None and (self.name in ("", "..") or Path(self.name).name != self.name):
            raise UsageError(f"--name {self.name!r} is not the name of one folder.", "Use a name without slashes.")
        if self.epochs is not None and self.steps is not None:
            raise UsageError("--epochs and --steps were both given.", "Omit one of the two.")
        self._validate_teachers()
        if self.has_no_teacher:
            for loss in self.losses:
                if loss.needs_teacher:
                    raise UsageError(
                        f"--teacher is none, but the loss {loss.name} needs a teacher.",
                        f"Name a teacher, or use --preset clip without --loss {loss.name}=….",
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
        for loss in self.losses:
            if self.torchcompile and TOKENS in loss.reads:
                raise UsageError(
                    f"--torchcompile compiles no pass that gives the features of patches and tokens, which {loss.name} "
                    "reads.",
                    f"Omit --torchcompile, or use --loss {loss.name}=0.",
                )
        for name in _FLAGS_OF:
            if LOSSES[name] not in self.losses:
                self._validate_no_flags_of(name)
        self._validate_stored_extras()
        if self.extra_texts:
            self._validate_extra_texts()

    def _validate_teachers(self) -> None:
        if NO_TEACHER in self.teacher and len(self.teacher) > 1:
            raise UsageError("--teacher none was given beside other teachers.", "Omit one of the two.")
        named, folders = len(self.teacher), len(self.embeddings)
        if named and folders and named != folders and not self.has_no_teacher:
            raise UsageError(
                f"--teacher was given {named} times, --embeddings {folders}.",
                "Give one --embeddings for each teacher, in their order; or only one of the two flags.",
            )
        if self.num_teachers > 1 and self.online_teacher:
            raise UsageError(
                f"--online-teacher works with one teacher, and there are {self.num_teachers}.",
                "Omit --online-teacher, or name one teacher.",
            )

    def _validate_kept_text_tower(self) -> None:
        if self.has_no_teacher or self.num_teachers > 1:
            teachers = "--teacher none has none" if self.has_no_teacher else f"there are {self.num_teachers} teachers"
            raise UsageError(
                f"--text-tower teacher keeps the text tower of one teacher, and {teachers}.",
                "Name one --teacher, or omit --text-tower.",
            )
        changing = {
            "--freeze-image": self.freeze_image,
            "--init-towers text": self.init_towers == "text",
            "--cluster-towers both": self.cluster_towers == "both",
            "--teacher-space project": self.teacher_space == "project",
        }
        for flag, is_given in changing.items():
            if is_given:
                raise UsageError(
                    f"--text-tower teacher trains the image tower alone, in the teacher's own space: not with {flag}.",
                    f"Omit {flag} or --text-tower.",
                )
        for loss in self.losses:
            if TOKENS in loss.reads:
                raise UsageError(
                    f"The loss {loss.name} trains the text tower on its tokens, and --text-tower teacher runs none.",
                    f"Use --loss {loss.name}=0, or omit --text-tower.",
                )

    def _validate_student_captions(self) -> None:
        flag = f"--student-caption-key {self.student_caption_key[0]}"
        if not self.needs_teacher:
            raise UsageError(
                f"{flag}: no loss of the run needs a teacher, which would read other captions.", "Use --caption-key."
            )
        for other, is_given in {
            "--online-teacher": self.online_teacher,
            "--text-tower teacher": self.keeps_text_tower,
            f"--extra-texts {self.extra_texts}": bool(self.extra_texts),
        }.items():
            if is_given:
                raise UsageError(
                    f"{flag} trains a text tower on translations of captions with stored embeddings: not with {other}.",
                    f"Omit {other}.",
                )

    def _validate_no_flags_of(self, loss: str) -> None:
        given = [flag_of(field) for field in given_fields(self) if field.name in _FLAGS_OF[loss]]
        if given:
            flags = ", ".join(given)
            fix = f"Omit {flags}"
            if not self.has_no_teacher:
                fix += f", or use {_TO_HAVE[loss]}"
            raise UsageError(f"{flags}: only for the {loss} loss, which the run does not have.", f"{fix}.")

    def _validate_stored_extras(self) -> None:
        if self.views == "stored" and (self.online_teacher or not self.needs_teacher):
            reason = "--online-teacher reads none" if self.online_teacher else "no loss of the run needs a teacher"
            raise UsageError(
                f"--views stored: only for stored embeddings of a teacher, but {reason}.",
                "Omit --views stored" + (", or --online-teacher." if self.online_teacher else "."),
            )

    def _validate_extra_texts(self) -> None:
        flag = f"--extra-texts {self.extra_texts}"
        if not any(loss.teaches_extra_texts for loss in self.losses):
            raise UsageError(
                f"{flag}, but no loss of the run takes texts without images.",
                f"Add one that does ({', '.join(_OF_EXTRA_TEXTS)}), or omit {flag}.",
            )
        if self.online_teacher or not self.trains_text:
            frozen = "--text-tower teacher" if self.keeps_text_tower else "--freeze-text"
            other = "--online-teacher" if self.online_teacher else frozen
            raise UsageError(
                f"{flag} trains the text tower on stored embeddings of texts: not with {other}.", "Omit one of the two."
            )

    @property
    def shows_views(self) -> bool:
        """Whether stored views are shown, where there are any."""
        return self.views != "none"

    def shows_extra_texts(self, losses: Collection[LossEntry]) -> bool:
        """Tell whether a run of such losses shows further texts, where there are any."""
        taken = any(loss.teaches_extra_texts for loss in losses)
        are_read = self.trains_text and not (self.online_teacher or self.student_caption_key)
        return taken and self.extra_texts != 0 and are_read

    def read_for_student(self) -> DistillSettings:
        """Return the settings by which the student's captions are read, where the teacher has read others."""
        if not self.student_caption_key:
            return self
        unnamed = ReadingSettings.caption_column
        return dataclasses.replace(self, caption_key=self.student_caption_key, caption_column=unnamed)

    @property
    def keeps_text_tower(self) -> bool:
        """Whether the student's text tower is the teacher's."""
        return self.text_tower == "teacher"

    @property
    def without_captions(self) -> str:
        """How to train on images alone, for errors; empty where what else was given rules that out."""
        try:
            alone = dataclasses.replace(self, text_tower="teacher")
        except UsageError:
            return ""
        needing = [loss.name for loss in alone.losses if alone.needs_teacher_texts(loss)]
        if len(needing) == len(alone.losses) or any(map(alone.typed_losses.get, needing)):
            return ""
        return "Train an image tower alone, beside the teacher's text tower: add --text-tower teacher."

    @property
    def trains_text(self) -> bool:
        """Whether the student's text tower is trained."""
        return not (self.freeze_text or self.keeps_text_tower)

    def needs_teacher_texts(self, loss: LossEntry) -> bool:
        """Tell whether a loss cannot do without the teacher's rows of captions."""
        return not (loss.image_alone if self.keeps_text_tower else loss.one_tower)

    @property
    def may_drop_losses(self) -> bool:
        """Whether losses that were not typed are left out where the teacher has no rows of captions for them."""
        return self.keeps_text_tower or (self.preset is None and not self.has_no_teacher)

    @property
    def shows_captions(self) -> bool:
        """Whether samples show captions: beside the teacher's text tower only losses that need its rows of them do."""
        return not self.keeps_text_tower or any(map(self.needs_teacher_texts, self.losses))

    @property
    def has_no_teacher(self) -> bool:
        """Whether there is to be none."""
        return self.teacher == (NO_TEACHER,)

    @property
    def named_teacher(self) -> str | None:
        """The teacher that was named, of several the first; None where there is none, or its embeddings name it."""
        return None if self.has_no_teacher else next(iter(self.teacher), None)

    @property
    def num_teachers(self) -> int:
        return max(super().num_teachers, len(self.teacher))

    @property
    def chosen_preset(self) -> str:
        """The preset: as given, else the default with a teacher or without."""
        return self.preset or ("clip" if self.has_no_teacher else DEFAULT_PRESET)

    def default_batch_size(self, samples: int, processes: int, fitting: int | None) -> int:
        """Return the samples of a batch of all processes where ``--batch-size`` does not say.

        On GPUs it is the largest power of two that fits and leaves enough steps, within the bounds.

        Args:
            fitting: Samples whose training fits into a GPU's memory; None on CPUs.
        """
        batch_size = _SMALLEST_BATCH
        if fitting is not None and self.steps is not None:
            batch_size = processes * min(_SMALLEST_BATCH, fitting)
        elif fitting is not None:
            shown = (self.epochs or DEFAULT_EPOCHS) * samples
            wanted = min(_LARGEST_BATCH, max(_SMALLEST_BATCH, shown // _ENOUGH_STEPS))
            batch_size = 2 ** (max(1, min(processes * fitting, wanted)).bit_length() - 1)
        divisor = processes * self.accum_freq
        return max(divisor, min(batch_size, samples) // divisor * divisor)

    def name_losses(self, losses: Mapping[LossEntry, Weight]) -> str:
        """Name what a run combines: its preset, the losses that took the place of the default one, or what is left of it."""
        if losses != self.losses:
            return "-".join(loss.name for loss in losses)
        preset = PRESETS[self.chosen_preset]
        # Of images without captions, for example.
        lacks_some = self.may_drop_losses and any(self.typed_losses.get(name) == 0 for name in preset)
        return "-".join(loss.name for loss in losses) if lacks_some else self.chosen_preset

    @cached_property
    def losses(self) -> dict[LossEntry, Weight]:
        """The losses asked for with their weights, in registry order; the run's are in `Inputs.losses`."""
        return self._select(PRESETS[self.chosen_preset])

    @property
    def losses_near_chance(self) -> dict[LossEntry, Weight]:
        """Those in their place where the teacher is near chance: a preset that was typed stays."""
        return self.losses if self.preset is not None else self._select(NEAR_CHANCE)

    def _select(self, preset: Mapping[str, Weight]) -> dict[LossEntry, Weight]:
        weights = select_losses(preset, self.typed_losses)
        return {self._own_entry(name) if name in self.own_losses else LOSSES[name]: weights[name] for name in weights}

    @cached_property
    def typed_losses(self) -> dict[str, float]:
        """The weights of ``--loss`` by name; of a loss of the user's own the function's name."""
        return {name.rpartition(":")[2]: weight for name, weight in map(_parse_loss, self.loss)}

    @cached_property
    def own_losses(self) -> dict[str, LossFile]:
        """The losses of ``--loss`` in the user's own files by name, as they were when first asked for."""
        files = dict[str, LossFile]()
        for name in dict.fromkeys(name for name, _ in map(_parse_loss, self.loss) if names_loss_file(name)):
            file = read_loss_file(name, SAMPLE_INPUTS)
            if file.name in LOSSES or file.name in files:
                raise UsageError(
                    f"--loss {name}: another loss is called {file.name}, too, and so would be its values in the log.",
                    "Rename your function.",
                )
            files[file.name] = file
        return files

    def _own_entry(self, name: str) -> LossEntry:
        """Describe a loss of the user's own: it is given all of a teacher, if there is one."""
        file = self.own_losses[name]
        return LossEntry(
            name,
            f"of {file.path}",
            function="",
            scale=CLIP_SCALE if SCALE in file.arguments else None,
            fuses=FUSION in file.arguments,
            sample_inputs=tuple(name for name in SAMPLE_INPUTS if name in file.arguments),
            needs_teacher=not self.has_no_teacher,
        )

    @property
    def needs_clusters(self) -> bool:
        """Whether any loss of the run reads the teacher's clusters."""
        return any(CLUSTERS in loss.reads for loss in self.losses)

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss of the run reads teacher embeddings; beside the teacher's text tower they are the captions."""
        return self.keeps_text_tower or any(loss.needs_teacher for loss in self.losses)


def _parse_loss(text: str) -> tuple[str, float]:
    name, equals, value = text.rpartition("=")
    if not equals:
        name = text
    if name not in LOSSES and not names_loss_file(name):
        raise UsageError(
            f"--loss {text}: there is no loss {name!r}.",
            f"Losses are: {', '.join(LOSSES)}; or one of your own: my_losses.py:name=1",
        )
    try:
        weight = float(value)
    except ValueError:
        weight = math.nan
    if not equals or not 0 <= weight < math.inf:
        raise UsageError(
            f"--loss {text}: the weight must be a number of at least 0.", f"For example: --loss {name}=0.5"
        )
    return name, weight
