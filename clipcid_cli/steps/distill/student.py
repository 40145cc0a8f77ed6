"""The student before training (loaded, filled from a larger model, towers frozen) and after."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from clipcid_cli.algorithms.losses.registry import MASKED_IMAGES, MASKED_PATCHES, TOKENS
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.files import describe
from clipcid_cli.formats.models.open_clip_folder import write_model_folder
from clipcid_cli.formats.results.run_folder import RunFolder
from clipcid_cli.runtime.models.augment import Masking
from clipcid_cli.runtime.models.clip_model import ClipModel, normalize_pixels
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import with_default_tag
from clipcid_cli.runtime.models.pruned_forward import PrunedForward
from clipcid_cli.runtime.models.views import apply_colors
from clipcid_cli.runtime.precision import Precision, choose_precision, fast_attention
from clipcid_cli.steps import reporting
from clipcid_cli.steps.distill.training_batch import TrainingBatch
from clipcid_cli.steps.models import find_model
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.training.gradients import Features, GradCache
from clipcid_cli.training.train_state import TrainState

# Runs both towers on normalised pixels (on the model's device) and tokens (on the CPU): features [b, d], not normalised.
# Without tokens there are none of texts.
EncodeBoth = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


@dataclasses.dataclass(frozen=True)
class Student:
    """A model to train."""

    # Its ``info.weights_hash`` identifies its initial weights.
    model: ClipModel
    precision: Precision
    pruned: PrunedForward
    encode_both: EncodeBoth  # the pruned passes, or the compiled ones
    frozen: list[nn.Module]  # modules that stay in evaluation mode
    starts_trained: bool  # whether a tower that is trained starts from weights that were trained before
    reads_tokens: bool  # whether a loss reads features of patches and tokens
    masking: Masking | None  # of a further pass over the images; None where no loss has one
    text_folder: Path | None  # model folder from which the configuration of a Hugging Face text tower is taken along

    def train(self) -> None:
        """Switch to training, but for what is frozen."""
        self.model.module.train()
        for module in self.frozen:
            module.eval()

    def encode(self, batch: TrainingBatch, seeds: Sequence[int]) -> GradCache:
        """Encode a process's part of a batch, in as many parts as there are seeds (of dropout and the like)."""
        columns = [
            [None] * len(seeds) if rows is None else rows.tensor_split(len(seeds))
            for rows in (batch.pixels, batch.colors, batch.tokens, batch.kept_patches)
        ]
        return GradCache(lambda index: self._encode(*(parts[index] for parts in columns)), seeds)

    def _encode(self, pixels: Any, colors: Tensor | None, tokens: Any, kept_patches: Tensor | None) -> Features:
        if colors is not None:
            pixels = apply_colors(pixels, colors)
        pixels = normalize_pixels(pixels, self.model.info.preprocess)
        device = self.model.device
        with self.precision.autocast(device), fast_attention(device, self.precision.dtype):
            if self.reads_tokens:
                image, text, image_tokens, text_tokens = self.pruned.encode_tokens(pixels, tokens)
                features = Features(image, text, None, image_tokens, text_tokens)
            else:
                features = Features(*self.encode_both(pixels, tokens))
            if kept_patches is not None:
                masked = self.pruned.encode_masked_images(pixels, kept_patches)
                features = features._replace(masked_image=masked)
        return features

    def backward(self, encoded: GradCache, before_last: Callable[[], None]) -> None:
        """Propagate the gradients of the features through the towers, see `GradCache.backward`."""
        # Layers that are computed again (--grad-checkpointing) need the attention kernel they had.
        with fast_attention(self.model.device, self.precision.dtype):
            encoded.backward(before_last)


def load_student(settings: DistillSettings, device: torch.device) -> Student:
    """Load the student as ``--student``, ``--init-from`` and ``--freeze-…`` say."""
    name = find_model(str(settings.student))
    text_folder = name.folder
    if settings.keeps_text_tower:
        from clipcid_cli.steps.distill.kept_text import load_beside_teacher

        model, text_folder = load_beside_teacher(settings, name, device)
    else:
        model = load_model(name, device, fresh_seed=settings.seed)
    if any(loss.needs_bias for loss in settings.losses):
        before, had_bias = model.logit_scale, model.logit_bias is not None
        model = model.with_logit_bias()
        if name.has_weights and not had_bias:
            reporting.note(
                f"The student gets a logit bias, {model.logit_bias:g}, and with it a new logit scale: {before:.3g} → "
                f"{model.logit_scale:.3g}."
            )
    starts_trained = {"image", "text"} if name.has_weights else set()
    if settings.init_from is not None:
        towers = "image" if settings.keeps_text_tower else settings.init_towers
        model = _inherit(model, settings.init_from, towers)
        starts_trained |= {"image", "text"} if towers == "both" else {towers}
    frozen: list[nn.Module] = []
    for tower, is_frozen in (("image", settings.freeze_image), ("text", not settings.trains_text)):
        if is_frozen:
            from clipcid_cli.runtime.models.tower_modules import freeze

            frozen += freeze(model.module, tower)
            starts_trained -= {tower}
    pruned = PrunedForward(model.module)
    if not pruned.prunes_texts and not settings.keeps_text_tower:
        reporting.note(
            f"Texts are encoded at their full length of {model.info.context_length} tokens: only causal text towers of "
            "open_clip, read at the end of a text, can skip the padding."
        )
    reads_tokens = [loss.name for loss in settings.losses if TOKENS in loss.reads]
    if reads_tokens and not pruned.has_tokens:
        raise _other_towers(
            model, reads_tokens[0], "reads patches and tokens", ", or its text tower not open_clip's own"
        )
    if settings.grad_checkpointing:
        _checkpoint_layers(model)
    return Student(
        model=model,
        precision=choose_precision(settings.precision, device, "train", _count_encoding(model, settings)),
        pruned=pruned,
        encode_both=_compile_towers(pruned) if settings.torchcompile else pruned,
        frozen=frozen,
        starts_trained=bool(starts_trained),
        reads_tokens=bool(reads_tokens),
        masking=_plan_masking(settings, model, pruned.num_patches),
        text_folder=text_folder,
    )


def _count_encoding(model: ClipModel, settings: DistillSettings) -> int:
    """Count the parameters of the towers that run in a step."""
    if not settings.keeps_text_tower:
        return model.info.parameters
    return sum(parameter.numel() for parameter in model.module.parameters() if parameter.requires_grad)


def _plan_masking(settings: DistillSettings, model: ClipModel, num_patches: int | None) -> Masking | None:
    """Plan the further pass over masked images that a loss asks for; say what it costs."""
    name = next((loss.name for loss in settings.losses if MASKED_IMAGES in loss.reads), None)
    if name is None:
        return None
    if num_patches is None:
        raise _other_towers(model, name, "masks patches of the images")
    masking = Masking.of(MASKED_PATCHES, num_patches)
    # With the class token, which is always seen.
    cost = (masking.kept + 1) / (num_patches + 1)
    reporting.note(
        f"{name} encodes each image once more, with {masking.kept} of its {num_patches} patches: {cost:.0%} more work for "
        "the image tower."
    )
    return masking


def _other_towers(model: ClipModel, loss: str, does: str, or_text: str = "") -> ClipcidError:
    from clipcid_cli.runtime.models.tower_modules import image_tower_kind

    return ClipcidError(
        f"--loss {loss} {does}. The image tower of {model.info.spec}, {image_tower_kind(model.module)}, is not a ViT of "
        f"open_clip with a class token and without patch dropout{or_text}.",
        f"Use --loss {loss}=0, or fd in its place.",
    )


def _compile_towers(pruned: PrunedForward) -> EncodeBoth:
    """Compile the forward passes with torch.compile, at the first call; but not of texts that are packed.

    Packed texts have another shape in each batch, for which the compiler would work anew; unpacked, captions that fill a
    fifth of the context would take several times the work.
    """
    encode_images = torch.compile(pruned.encode_images)
    encode_texts = pruned.encode_texts if pruned.prunes_texts else torch.compile(pruned.encode_texts)

    def call(pixels: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        try:
            return encode_images(pixels), None if tokens is None else encode_texts(tokens)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ClipcidError(
                f"--torchcompile: torch.compile failed: {describe(error)}.",
                "Omit --torchcompile; on a CPU it needs a C++ compiler (g++).",
            ) from error

    return call


def _inherit(model: ClipModel, init_from: str, towers: str) -> ClipModel:
    from clipcid_cli.runtime.models.inherit import inherit

    source = load_model(with_default_tag(find_model(init_from)))
    not_inherited = inherit(model.module, source.module, towers)
    subject = "Both towers start" if towers == "both" else f"The {towers} tower starts"
    fresh = f", except {', '.join(not_inherited)}" if not_inherited else ""
    reporting.note(f"{subject} from {source.info.spec}{fresh}.")
    weights_hash = f"{model.info.weights_hash}+{towers}:{source.info.weights_hash}"
    return dataclasses.replace(model, info=msgspec.structs.replace(model.info, weights_hash=weights_hash))


def _checkpoint_layers(model: ClipModel) -> None:
    try:
        model.module.set_grad_checkpointing(True)  # type: ignore[operator]  # every CLIP of open_clip has it
    except (AttributeError, NotImplementedError, AssertionError) as error:
        raise ClipcidError(
            f"--grad-checkpointing: a tower of {model.info.spec} does not support it ({describe(error)}).",
            "Omit it and use --accum-freq, which saves memory with any model.",
        ) from error


def write_students(folder: RunFolder, student: Student, state: TrainState) -> list[Path]:
    """Write the trained model, and the one with averaged weights where there is one, as open_clip folders."""
    model = student.model
    info = model.info
    folders = folder.students(ema=state.ema is not None)
    for target in folders:
        with state.ema.swapped_in() if state.ema is not None and target == folder.student_ema else nullcontext():
            tensors = model.module.state_dict()
            write_model_folder(
                target,
                info.config,
                info.preprocess,
                tensors,
                source=student.text_folder,
                tokenizer=model.tokenizer.whole,
            )
    return folders


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """Return the layers of batch normalisation."""
    return [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
