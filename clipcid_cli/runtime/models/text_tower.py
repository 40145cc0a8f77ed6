"""One CLIP of two: a student's image tower beside the text tower, tokenizer and logit scale of its teacher.

The image tower is built for embeddings as wide as the teacher's. The teacher's module takes it in place of its own, so the
text tower may be of any kind, and open_clip loads what is saved as it loads the teacher.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import msgspec
import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import ModelName, find_config

# Every CLIP of open_clip has a text tower: the smallest, until the teacher's takes its place.
_STAND_IN = {"context_length": 8, "vocab_size": 49_408, "width": 8, "heads": 1, "layers": 1}


def put_beside(
    name: ModelName, teacher: ClipModel, device: torch.device, fresh_seed: int
) -> tuple[ClipModel, list[str]]:
    """Put the image tower that a name means beside a teacher's text tower, whose weights and scale are not trained.

    Returns:
        The model, and the names of those tensors that stay random since the named model has them in other shapes.
    """
    info = teacher.info
    if "multimodal_cfg" in info.config:
        raise ClipcidError(
            f"The text tower of {info.spec} is a part of CoCa, which writes captions from its own image tower.",
            "Use another teacher, or omit --text-tower.",
        )
    trained = load_model(name) if name.has_weights else None
    own = find_config(name) if trained is None else trained.info.config
    assert own is not None, "models on a hub have weights"
    towers = {
        "embed_dim": info.embed_dim,
        "vision_cfg": _widened(own, info.embed_dim),
        "quick_gelu": _choose_activation(name, own, info.spec, info.config),
    }
    unnamed = dataclasses.replace(name, kind="architecture" if name.path is None else "config")
    model = load_model(unnamed, fresh_seed=fresh_seed, config=towers | {"text_cfg": _STAND_IN})
    random = [] if trained is None else _copy_image_tower(model.module, trained.module)
    module = cast(Any, teacher.module)
    module.visual = model.module.visual
    module.logit_scale.requires_grad_(False)
    if teacher.logit_bias is not None:
        module.logit_bias.requires_grad_(False)
    image_hash = model.info.weights_hash if trained is None else trained.info.weights_hash
    joined = msgspec.structs.replace(
        info,
        spec=name.spec,
        slug=f"{name.slug}-image",
        architecture=None,
        tag=None,
        weights_hash=f"{image_hash}+text:{info.weights_hash}",
        preprocess=(trained or model).info.preprocess,
        image_size=model.info.image_size,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        config=info.config | towers,
    )
    return dataclasses.replace(teacher, info=joined, module=module.to(device), device=device), random


def _widened(config: dict[str, Any], width: int) -> dict[str, Any]:
    """Return the ``vision_cfg`` for embeddings of a width; a tower without a layer that makes them gets one."""
    vision: dict[str, Any] = config["vision_cfg"]
    ends_bare = vision.get("timm_model_name") and vision.get("timm_proj", "linear") == "none"
    return vision | {"timm_proj": "linear"} if ends_bare and config["embed_dim"] != width else vision


def _choose_activation(name: ModelName, own: dict[str, Any], teacher: str, config: dict[str, Any]) -> bool:
    """Return open_clip's ``quick_gelu``, one for both towers; refuse weights that were trained with the other activation."""
    here, there = (bool(model.get("quick_gelu", False)) for model in (own, config))
    if config["text_cfg"].get("hf_model_name"):
        return here  # transformers' towers have their own
    reads_it = isinstance(own["vision_cfg"].get("layers", 12), int) and not own["vision_cfg"].get("timm_model_name")
    if name.has_weights and reads_it and here != there:
        ours, theirs = ("QuickGELU" if quick else "GELU" for quick in (here, there))
        raise ClipcidError(
            f"The image tower of {name.spec} was trained with {ours}, the text tower of {teacher} with {theirs}, and a "
            "model of open_clip has one activation.",
            "Start from weights of the teacher's activation, or from random ones: name an architecture without a tag.",
        )
    return there


def _copy_image_tower(target: torch.nn.Module, source: torch.nn.Module) -> list[str]:
    """Copy what has the same shape, in place; return the names of the rest, which ends in embeddings of another width."""
    own, others = (cast(Any, model).visual.state_dict() for model in (target, source))
    random = list[str]()
    for name, tensor in own.items():
        if name in others and others[name].shape == tensor.shape:
            tensor.copy_(others[name])
        else:
            random.append(name)
    return random
