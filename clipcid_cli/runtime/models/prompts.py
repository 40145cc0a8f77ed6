"""open_clip's own lists: templates of prompts, and the class names of ImageNet."""

from __future__ import annotations

from typing import Any, cast

from clipcid_cli.runtime.models.guarded_open_clip import open_clip


def builtin_templates(name: str) -> tuple[str, ...]:
    """Return open_clip's templates, ``{c}`` for the class name: ``openai`` (80) or ``simple`` (the best 7 of them)."""
    lists = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}
    return tuple(template("{c}") for template in lists[name])


def builtin_class_names(name: str) -> dict[str, str]:
    """Return open_clip's class names of ``imagenet`` in the order of the labels, by timm's WordNet number (n01440764, …)."""
    from timm.data.imagenet_info import ImageNetInfo

    assert name == "imagenet", name
    synsets = cast(Any, ImageNetInfo("imagenet-1k")).label_names()
    return dict(zip(synsets, open_clip.IMAGENET_CLASSNAMES, strict=True))
