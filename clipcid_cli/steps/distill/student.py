"""The student before training (loaded, filled from a larger model, towers frozen) and after."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from clipcid_cli.algorithms.losses.registry import LOSSES
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.open_clip_folder import write_model_folder
from clipcid_cli.formats.results.run_folder import RunFolder
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.models.augment import Masking
from clipcid_cli.runtime.models.clip_model import ClipModel, load_model
from clipcid_cli.runtime.models.inherit import inherit
from clipcid_cli.runtime.models.names import parse_model, with_default_tag
from clipcid_cli.runtime.models.pruned_forward import PrunedForward
from clipcid_cli.runtime.models.towers import freeze, image_tower_kind
from clipcid_cli.runtime.training.trainer import Trainer
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import DistillSettings


@dataclasses.dataclass(frozen=True)
class Student:
    """A model to train.

    Attributes:
        model: The model; its ``info.weights_hash`` identifies its initial weights.
        frozen: Modules that stay in evaluation mode.
        masking: The further pass over images whose patches are masked; None where no loss has one.
    """

    model: ClipModel
    frozen: list[nn.Module]
    masking: Masking | None = None


def load_student(settings: DistillSettings, machine: Machine, reporter: Reporter) -> Student:
    """Load the student as ``--student``, ``--init-from`` and ``--freeze-…`` say."""
    return machine.on_all(lambda: _load(settings, machine.device, reporter))


def _load(settings: DistillSettings, device: torch.device, reporter: Reporter) -> Student:
    model = load_model(parse_model(str(settings.student)), device, fresh_seed=settings.seed)
    if settings.init_from is not None:
        model = _inherit(model, settings.init_from, settings.init_towers, reporter)
    frozen: list[nn.Module] = []
    for tower, is_frozen in (("image", settings.freeze_image), ("text", settings.freeze_text)):
        if is_frozen:
            frozen += freeze(model.module, tower)
    if reads_tokens(settings) and not PrunedForward(model.module).has_tokens:
        raise ClipcidError(
            f"The loss td reads patches and tokens, which {model.info.spec} does not give: its image tower, "
            f"{image_tower_kind(model.module)}, must be a ViT of open_clip with a class token and without patch dropout, "
            "its text tower open_clip's own.",
            "Use --loss td=0, or fd in its place.",
        )
    if settings.grad_checkpointing:
        _checkpoint_layers(model)
    return Student(model, frozen, _plan_masking(settings, model, reporter))


def _plan_masking(settings: DistillSettings, model: ClipModel, reporter: Reporter) -> Masking | None:
    """Plan the further pass over masked images that a loss asks for; say what it costs."""
    shares = {name: LOSSES[name].masked_patches for name in settings.losses() if LOSSES[name].masked_patches}
    if not shares:
        return None
    name, share = max(shares.items(), key=lambda item: item[1])
    patches = PrunedForward(model.module).num_patches
    if patches is None:
        raise ClipcidError(
            f"--loss {name} masks patches of the images. The image tower of {model.info.spec}, "
            f"{image_tower_kind(model.module)}, is not a ViT of open_clip with a class token and without patch dropout.",
            f"Use --loss {name}=0, or fd in its place.",
        )
    masking = Masking.of(share, patches)
    # With the class token, which is always seen.
    cost = (masking.kept + 1) / (patches + 1)
    reporter.note(
        f"{name} encodes each image once more, with {masking.kept} of its {patches} patches: {cost:.0%} more work for the "
        "image tower."
    )
    return masking


def reads_tokens(settings: DistillSettings) -> bool:
    """Tell whether a loss reads features of patches and tokens."""
    return any(LOSSES[name].reads_tokens for name in settings.losses())


def _inherit(model: ClipModel, init_from: str, towers: str, reporter: Reporter) -> ClipModel:
    source = load_model(with_default_tag(parse_model(init_from)))
    not_inherited = inherit(model.module, source.module, towers)
    subject = "Both towers start" if towers == "both" else f"The {towers} tower starts"
    fresh = f", except {', '.join(not_inherited)}" if not_inherited else ""
    reporter.note(f"{subject} from {source.info.spec}{fresh}.")
    weights_hash = f"{model.info.weights_hash}+{towers}:{source.info.weights_hash}"
    return dataclasses.replace(model, info=dataclasses.replace(model.info, weights_hash=weights_hash))


def _checkpoint_layers(model: ClipModel) -> None:
    try:
        model.module.set_grad_checkpointing(True)  # type: ignore[operator]  # every CLIP of open_clip has it
    except (AttributeError, NotImplementedError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ClipcidError(
            f"--grad-checkpointing: a tower of {model.info.spec} does not support it ({reason}).",
            "Omit it and use --accum-freq, which saves memory with any model.",
        ) from error


def write_students(folder: RunFolder, student: ClipModel, source: str, trainer: Trainer) -> list[Path]:
    """Write the trained model, and the one with averaged weights where there is one, as open_clip folders.

    Args:
        source: What was trained, as the user named it; tokenizer files of a folder are taken along.

    Returns:
        The folders.
    """
    path, average = parse_model(source).path, trainer.average

    def write(target: Path) -> None:
        write_model_folder(
            target,
            student.info.config,
            student.info.preprocess,
            student.module.state_dict(),
            tokenizer_from=path if path is not None and path.is_dir() else None,
        )

    write(folder.student)
    if average is not None:
        with average.in_place():
            write(folder.student_ema)
    return folder.students(ema=average is not None)


def warn_of_batch_statistics(student: ClipModel, reporter: Reporter) -> None:
    """Warn where a batch is cut into parts and the student has batch normalisation."""
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in student.module.modules()):
        reporter.warn(
            "The student has batch normalisation, whose statistics are those of each part of a batch: "
            "--accum-freq and several processes change what it learns."
        )
