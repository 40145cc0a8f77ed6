"""Loads CLIP models by open_clip, with trained weights or fresh ones, and refuses what could not be used."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import torch

from clipcid_cli.errors import ClipcidError, in_one_line
from clipcid_cli.records import ModelRecord
from clipcid_cli.runtime.libraries import quiet_libraries
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.guarded_open_clip import import_towers, open_clip
from clipcid_cli.runtime.models.hub import reaching_hub
from clipcid_cli.runtime.models.names import (
    CONFIG_NAME,
    HF_CONFIG_NAME,
    ModelName,
    find_weights,
    hash_weights,
    read_config,
    validate_hub_name,
    validate_passed_on,
    validate_weights,
)
from clipcid_cli.runtime.models.tokenizers import load_tokenizer

_FOLDER_HINT = (
    "Pass a local folder instead, as in --model /path/to/folder (--teacher and --student likewise), that holds "
    f"{CONFIG_NAME} and the weights; open_clip's local-dir:/path/to/folder means the same."
)


def load_model(
    name: ModelName,
    device: torch.device | str = "cpu",
    fresh_seed: int | None = None,
    config: dict[str, Any] | None = None,
) -> ClipModel:
    """Load a CLIP model; an ``architecture`` or ``config`` needs a seed for random weights.

    Args:
        config: Taken in place of the model's own ``model_cfg``, for random weights.
    """
    with quiet_libraries():
        config = config or _find_config(name)
        _validate_transformers(name, config)
        if name.has_weights:
            module, weights = _load_trained(name, config)
            weights_hash = hash_weights(weights)
        elif fresh_seed is None:
            raise ClipcidError(f"Model {name.spec} has no weights.", _FOLDER_HINT)
        else:
            module = _start_fresh(name, config, fresh_seed)
            weights_hash = f"fresh:{fresh_seed}"
        tokenizer = load_tokenizer(name, config)
    _validate_finite(name, module)
    module.eval().to(device)
    # Through JSON, so that tuples become lists, as in sidecars.
    preprocess = json.loads(json.dumps(dict(cast(Any, module).visual.preprocess_cfg)))
    size = preprocess["size"]
    tokenizer_name = config["text_cfg"].get("hf_tokenizer_name")
    info = ModelRecord(
        spec=name.spec,
        slug=name.slug,
        architecture=name.architecture,
        tag=name.tag,
        weights_hash=weights_hash,
        preprocess=preprocess,
        context_length=int(tokenizer.whole.context_length),
        embed_dim=int(config["embed_dim"]),
        image_size=(size, size) if isinstance(size, int) else (size[0], size[1]),
        parameters=sum(map(torch.numel, module.parameters())),
        tokenizer=" ".join(filter(None, (type(tokenizer.whole).__name__, tokenizer_name))),
        config=config,
    )
    model = ClipModel(info, module, tokenizer, torch.device(device))
    _validate_towers(model)
    info = msgspec.structs.replace(info, logit_scale=model.logit_scale, logit_bias=model.logit_bias)
    return dataclasses.replace(model, info=info)


def _find_config(name: ModelName) -> dict[str, Any]:
    """Return open_clip's ``model_cfg`` of a model; a tag's has its own activation."""
    if name.path is not None:
        return read_config(name.path)[0]
    if name.kind == "hub":
        with reaching_hub(f"files of model {name.spec}", _FOLDER_HINT):
            hub_config = cast(dict[str, Any], open_clip.get_model_config(name.spec))
        validate_passed_on(f"Model {name.spec}", hub_config)
        return hub_config
    config = cast(dict[str, Any], open_clip.get_model_config(name.architecture))
    if name.tag is not None:
        # The one the weights were trained with, whatever the architecture's.
        config["quick_gelu"] = bool(open_clip.get_pretrained_cfg(name.architecture, name.tag).get("quick_gelu", False))
    return config


def _validate_transformers(name: ModelName, config: dict[str, Any]) -> None:
    """Refuse, before anything is downloaded, a text tower or tokenizer of a library that is not installed."""
    text = config["text_cfg"]
    needs = text.get("hf_model_name") or text.get("hf_tokenizer_name")
    if needs and importlib.util.find_spec("transformers") is None:
        raise ClipcidError(
            f"Model {name.spec} reads texts as {needs} does, with transformers, which is not installed.",
            "Install it, in the checkout of clipcid: pip install '.[export]'",
        )


def _load_trained(name: ModelName, config: dict[str, Any]) -> tuple[torch.nn.Module, Path]:
    """Load a model with its weights, and tell the file of these."""
    if name.path is not None:
        weights = find_weights(name.path)
        assert weights is not None, "or it would be a configuration"
        validate_weights(config, weights)
        own = _own_text_tower(config, name)
        return _create(name, f"local-dir:{name.path}", config, require_pretrained=True, **own), weights
    if name.kind == "hub":
        with reaching_hub(f"weights of model {name.spec}", _FOLDER_HINT):
            weights = Path(open_clip.pretrained.download_pretrained_from_hf(name.spec.removeprefix("hf-hub:")))
        validate_weights(config, weights)
        own = _own_text_tower(config, name)
        return _create(name, name.spec, config, require_pretrained=True, **own), weights
    architecture, tag = cast(str, name.architecture), cast(str, name.tag)
    known = open_clip.get_pretrained_cfg(architecture, tag)
    if not known:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise ClipcidError(
            f"Model {name.spec}: open_clip has no weights {tag} for {architecture}.",
            f"Tags it has: {', '.join(tags)}. " + _FOLDER_HINT if tags else _FOLDER_HINT,
        )
    with reaching_hub(f"weights of model {name.spec}", _FOLDER_HINT):
        weights = Path(open_clip.pretrained.download_pretrained(known))
    preprocess = {key: known[key] for key in ("mean", "std", "interpolation", "resize_mode", "size") if key in known}
    module = _create(
        name,
        architecture,
        config,
        pretrained=str(weights),
        quick_gelu=config["quick_gelu"],
        force_preprocess_cfg=preprocess,
    )
    return module, weights


def _start_fresh(name: ModelName, config: dict[str, Any], seed: int) -> torch.nn.Module:
    """Build an architecture with random weights that depend on the seed only; global generators are unchanged."""
    content: dict[str, Any] = {"model_cfg": config, "preprocess_cfg": {}}
    if name.path is not None:
        content["model_cfg"] = config | _own_text_tower(config, name)
        content["preprocess_cfg"] = read_config(name.path)[1]
    with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng(devices=[]):
        Path(scratch, CONFIG_NAME).write_text(json.dumps(content))
        torch.manual_seed(seed)
        module = _create(name, f"local-dir:{scratch}", config, load_weights=False, pretrained_text=False)
        decoder: Any = getattr(module, "text_decoder", None)
        if decoder is not None:  # CoCa's, whose projection open_clip 3.3 leaves as the memory was
            torch.nn.init.normal_(decoder.text_projection, std=decoder.width**-0.5)
        return module


def _own_text_tower(config: dict[str, Any], name: ModelName) -> dict[str, Any]:
    """Return the ``text_cfg`` that reads a Hugging Face text tower from the model's own folder, where its config.json is.

    open_clip reads it from a hub or a fixed path, which a copied folder, or one without a network, does not have.
    """
    text = config["text_cfg"]
    folder = name.folder
    if not text.get("hf_model_name"):
        return {}
    if folder is None or not (folder / HF_CONFIG_NAME).is_file():
        validate_hub_name(name, "hf_model_name", text["hf_model_name"])
        return {}
    return {"text_cfg": text | {"hf_model_name": str(folder), "hf_model_pretrained": False}}


def _create(name: ModelName, source: str, config: dict[str, Any], **options: Any) -> torch.nn.Module:
    try:
        import_towers(config)
        # Weights run nothing: open_clip reads them by safetensors or with `weights_only`. `validate_passed_on` has refused
        # settings that would run code, and `import_towers` refuses code on a hub.
        return cast(torch.nn.Module, open_clip.create_model(source, precision="fp32", device="cpu", **options))
    except Exception as error:  # open_clip raises whatever PyTorch, safetensors or json do for a file that does not fit
        raise ClipcidError(
            f"Model {name.spec} could not be loaded: {in_one_line(error, 400)}",
            f"Check that the weights are complete and match the architecture in {CONFIG_NAME}; copy or download them again.",
        ) from error


def _validate_finite(name: ModelName, module: torch.nn.Module) -> None:
    """Refuse weights with NaN or infinite entries, which make every embedding NaN; buffers of masks hold infinities."""
    for parameter, values in module.named_parameters():
        if values.numel() and not all(map(torch.isfinite, torch.aminmax(values.detach()))):
            bad = int((~torch.isfinite(values)).sum())
            raise ClipcidError(
                f"Model {name.spec} has weights that are not finite: {bad:,} of the {values.numel():,} entries of "
                f"{parameter}.",
                "Choose another model, or an earlier checkpoint: a training that diverged leaves such weights.",
            )


def _validate_towers(model: ClipModel) -> None:
    """Refuse towers that cannot take the images and texts that the configuration declares, or make rows of other widths."""
    info = model.info
    module = cast(Any, model.module)
    height, width = info.image_size
    takes: dict[str, Callable[[], torch.Tensor]] = {
        f"an image of {height} × {width} pixels": lambda: module.encode_image(
            model.normalize(torch.zeros(1, height, width, 3, dtype=torch.uint8))
        ),
        f"a text of {info.context_length} tokens": lambda: module.encode_text(
            model.tokenizer(["a photo"]).to(model.device)
        ),
    }
    fix = f"Compare vision_cfg, text_cfg and embed_dim in {CONFIG_NAME} with the weights."
    widths = list[int]()
    for what, encode in takes.items():
        try:
            # Not in inference mode: what a module keeps of its first pass could not be trained.
            with torch.no_grad():
                widths.append(int(encode().shape[-1]))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a module raises whatever its layers do with a shape that does not fit
            raise ClipcidError(f"Model {info.spec} cannot encode {what}: {in_one_line(error, 400)}", fix) from error
    if widths != [info.embed_dim] * 2:
        raise ClipcidError(
            f"Model {info.spec}: its image tower makes rows of {widths[0]:,} values, its text tower of {widths[1]:,}; "
            f"embed_dim is {info.embed_dim:,}.",
            fix,
        )
