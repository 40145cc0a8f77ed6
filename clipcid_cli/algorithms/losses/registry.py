"""The one table of losses: name, what it is, what it needs, and the presets that combine them.

Command-line choices, help texts, documentation and tests read this file. It does not import torch, so that usage errors
answer at once; the functions themselves are imported by `load_loss`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

# Where CLIP's logit scale starts.
CLIP_SCALE = 1 / 0.07
# MobileCLIP and TinyCLIP sharpen the teacher's similarities with the largest scale CLIP training reaches.
AFFINITY_SCALE = 100.0


# What a loss may read beside the features of the images and captions shown, by its name in `LossEntry.reads`.
TOKENS = "tokens"  # the student's features of patches and of caption tokens
MASKED_IMAGES = "masked images"  # its features of images in a further pass, in which most patches are hidden
CLUSTERS = "clusters"  # the teacher's
TEACHER_SCALE = "teacher scale"
TEACHER_BIAS = "teacher bias"
READABLE = frozenset({TOKENS, MASKED_IMAGES, CLUSTERS, TEACHER_SCALE, TEACHER_BIAS})

# Numbers of each sample that a loss may be called with, by their names in `LossEntry.sample_inputs`: computed by the
# functions of these names in `steps/distill/sample_inputs.py`.
SAMPLE_INPUTS = ("width", "height")

MASKED_PATCHES = 0.75
"""Share of an image's patches that are hidden in the further pass."""


@dataclasses.dataclass(frozen=True)
class LossEntry:
    """One loss of the registry."""

    name: str
    # What it compares, for docs/distill.md.
    summary: str
    # ``module:function`` in this folder, called as ``f(batch)`` with what it learns itself (``scale``, ``fusion``), and with
    # the numbers of each sample that it reads.
    function: str
    scale: float | None = None  # where a logit scale of its own starts, which is kept in 1 … 100
    fuses: bool = False  # whether it learns layers that join student and teacher, one for images and one for captions
    reads: frozenset[str] = frozenset()  # some of `READABLE`
    sample_inputs: tuple[str, ...] = ()  # some of `SAMPLE_INPUTS`: the function has an argument of each name
    needs_teacher: bool = True
    needs_bias: bool = False  # whether it trains the student's own ``logit_bias``
    # Whether it is a distance of single features, student to teacher: such losses allow a higher learning rate, and by
    # default a teacher near chance is not followed by them.
    compares_features: bool = False
    teaches_extra_texts: bool = False  # whether it also teaches texts without images (``--extra-texts``)
    one_tower: bool = False  # whether a teacher of images alone, or of captions alone, can serve it
    image_alone: bool = False  # whether it can train an image tower without captions, by the teacher's image rows
    # Where features are compared: ``own`` compares student with student only, ``teacher`` compares across and so needs
    # equal widths (see ``--teacher-space``).
    space: Literal["own", "teacher"] = "teacher"

    def __post_init__(self) -> None:
        unknown = {*self.reads} - READABLE | {*self.sample_inputs} - {*SAMPLE_INPUTS}
        if unknown:
            raise ValueError(f"the loss {self.name} reads what there is not: {', '.join(sorted(unknown))}")


LOSSES: Mapping[str, LossEntry] = {
    entry.name: entry
    for entry in (
        LossEntry(
            "clip",
            "contrastive loss of the student's images and captions",
            "contrastive:clip",
            needs_teacher=False,
            one_tower=True,
            space="own",
        ),
        LossEntry(
            "siglip",
            "sigmoid loss of each pair of the student's images and captions: matching or not",
            "contrastive:siglip",
            needs_bias=True,
            needs_teacher=False,
            one_tower=True,
            space="own",
        ),
        LossEntry(
            "instance",
            "student image against teacher caption and student caption against teacher image, both ways",
            "contrastive:instance",
            scale=CLIP_SCALE,
            one_tower=True,
        ),
        LossEntry(
            "instance-intra",
            "student image against teacher image and student caption against teacher caption, both ways",
            "contrastive:instance_intra",
            scale=CLIP_SCALE,
            one_tower=True,
            image_alone=True,
        ),
        LossEntry(
            "cluster",
            "student image against the teacher's clusters: label and soft assignment",
            "cluster:cluster",
            scale=CLIP_SCALE,
            reads=frozenset({CLUSTERS}),
            one_tower=True,
            image_alone=True,
        ),
        LossEntry(
            "fd",
            "squared distance of student and teacher features, summed over the width",
            "features:feature_distance",
            compares_features=True,
            teaches_extra_texts=True,
            one_tower=True,
            image_alone=True,
        ),
        LossEntry(
            "mfd",
            "`fd` in a further pass, where the student sees a quarter of each image's patches",
            "features:masked_feature_distance",
            reads=frozenset({MASKED_IMAGES}),
            compares_features=True,
            teaches_extra_texts=True,
            one_tower=True,
            image_alone=True,
        ),
        LossEntry(
            "icl",
            "student image to teacher caption and student caption to teacher image, one way",
            "contrastive:interactive",
            scale=CLIP_SCALE,
            one_tower=True,
        ),
        LossEntry(
            "crd",
            "divergence of the student's in-batch similarities from the teacher's",
            "relations:relation_divergence",
            reads=frozenset({TEACHER_SCALE}),
            space="own",
        ),
        LossEntry(
            "gd",
            "squared distance of the contrastive loss's gradients by student and by teacher features",
            "relations:gradient_distance",
            reads=frozenset({TEACHER_SCALE}),
        ),
        LossEntry(
            "afd",
            "contrastive loss of student and teacher features, joined by a learned layer per tower",
            "contrastive:fused",
            scale=CLIP_SCALE,
            fuses=True,
            space="own",
        ),
        LossEntry(
            "td",
            "distance of selected patches and tokens of the student from the teacher, by its confidence",
            "features:token_distance",
            reads=frozenset({TOKENS, TEACHER_SCALE}),
        ),
        LossEntry(
            "vrd",
            "teacher-student similarities of images follow those of captions; contrastive loss of each tower",
            "relations:vertical_relation",
            scale=CLIP_SCALE,
        ),
        LossEntry(
            "xrd",
            "similarities of teacher images to student captions agree with those of teacher captions to images",
            "relations:cross_relation",
        ),
        LossEntry(
            "affinity",
            "cross-entropy of the student's in-batch similarities to the teacher's at `--affinity-scale`",
            "relations:affinity",
            space="own",
        ),
        LossEntry(
            "siglip-kd",
            "`siglip`, with the teacher's probability that a pair matches as its target",
            "relations:sigmoid_relation",
            reads=frozenset({TEACHER_SCALE, TEACHER_BIAS}),
            needs_bias=True,
            space="own",
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Weight:
    """Factor of a loss in the total; one `per_width` is of a mean over D dimensions, so that our sum takes value/D."""

    value: float
    per_width: bool = False

    def at(self, width: int) -> float:
        """Return the factor in a space of so many dimensions."""
        return self.value / width if self.per_width else self.value


# cid: cross-entropy + KL at λ_clu = 1 had four times the gradient of either contrastive term in a trial. At 0.25 they are on
# an equal footing, which is 0.5 here, where α = ½ gives each of the two half of the weight. In recipes/ablation 0.5 and 1
# were better than 0.25 (R@10 +1.4 and +2.4 on drawings) and worse in nothing that it could tell.
# fd-instance: `clip` at 0.1 would train the student's logit scale as well, which the other two do not read. At 1 it gained
# in two of three worlds where the teacher pairs well (recipes/ablation/worlds.md), and lost 2.5 points on drawings with
# views and texts, none on their pairs alone.
# clip-kd and clip-rd: the weights of their papers. clip-td: our weight of our form of its loss. dr: λ within the range
# MobileCLIP studies.
_FD = Weight(2000.0, per_width=True)
_CLIP_KD = {"clip": Weight(1.0), "fd": _FD, "icl": Weight(1.0), "crd": Weight(1.0)}

PRESETS: Mapping[str, Mapping[str, Weight]] = {
    "clip": {"clip": Weight(1.0)},
    "fd-instance": {"clip": Weight(1.0), "instance": Weight(1 / 3), "fd": _FD},
    "cid": {"clip": Weight(1.0), "instance": Weight(1.0), "cluster": Weight(0.5)},
    "clip-kd": _CLIP_KD,
    "clip-rd": {**_CLIP_KD, "vrd": Weight(1.0), "xrd": Weight(1.0)},
    "clip-td": {"clip": Weight(1.0), "td": Weight(1.0)},
    "dr": {"clip": Weight(0.25), "affinity": Weight(0.75)},
}

# With a teacher: the preset of the least largest regret in recipes/ablation/worlds.md.
DEFAULT_PRESET = "clip-kd"
# In its place where the teacher is near chance: without features and relations.
NEAR_CHANCE: Mapping[str, Weight] = {"clip": Weight(1.0), "instance": Weight(1.0)}


def select_losses(preset: Mapping[str, Weight], typed: Mapping[str, float]) -> dict[str, Weight]:
    """Return a preset's losses in registry order, with the weights that were typed, without those of weight 0.

    Losses that are not in the registry come last. A run's data may lack what some need (`drop_losses_of_captions`), and its
    teacher may be near chance (`choose_losses`): what is left is in `Inputs.losses`.
    """
    weights = dict(preset) | {name: Weight(value) for name, value in typed.items()}
    own = [name for name in weights if name not in LOSSES]
    return {name: weights[name] for name in (*LOSSES, *own) if name in weights and weights[name].value > 0.0}


def list_sample_inputs(losses: Iterable[LossEntry]) -> list[str]:
    """List the numbers of each sample that some losses read, in the order of `SAMPLE_INPUTS`."""
    read = {name for loss in losses for name in loss.sample_inputs}
    return [name for name in SAMPLE_INPUTS if name in read]


def load_loss(name: str) -> Callable[..., Any]:
    """Import and return the function of a loss."""
    module, function = LOSSES[name].function.split(":")  # of the table above: what a user names is looked up there
    loaded: Callable[..., Any] = getattr(importlib.import_module(f"clipcid_cli.algorithms.losses.{module}"), function)
    return loaded
