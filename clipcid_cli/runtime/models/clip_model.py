"""CLIP models, loaded by open_clip: how they take images and texts, and the rows they make of them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import socket
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, cast

import huggingface_hub.constants as hub
import torch
from PIL import Image

from clipcid_cli.errors import ClipcidError, in_one_line
from clipcid_cli.runtime.libraries import quiet_libraries
from clipcid_cli.runtime.models.names import (
    CONFIG_NAME,
    HF_CONFIG_NAME,
    ModelName,
    find_weights,
    hash_weights,
    read_config,
    read_json,
    validate_hub_name,
    validate_passed_on,
    validate_weights,
)
from clipcid_cli.runtime.models.pruned_forward import PrunedForward, is_plain_attention
from clipcid_cli.runtime.precision import Precision

Transform = Callable[[Image.Image], torch.Tensor]
Tokenizer = Callable[[list[str]], torch.Tensor]

LONGEST_TEXT = 8_192
"""Characters of a text that are tokenized: 100 for each of a CLIP's 77 tokens. What follows could hardly reach the model,
and a tokenizer's cleaning of a caption of megabytes takes minutes."""

# Where SigLIP's logit scale and bias start (Zhai et al. 2023, arXiv 2303.15343).
SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0

# Images that a tower of convolutions takes at once on a CPU: what a layer makes of so many stays in the caches. 64 at once
# took 144 ms an image with an RN50 and 44 with an EfficientNet-Lite0, 8 at once 84 and 14 (2 cores of an EPYC). ViTs gain
# nothing.
_CONVOLVED_AT_ONCE = 8

_TOKENIZER_FILES = ("tokenizer*.json", "vocab.*", "*.model")
_VOCABULARY_ENTRIES = ("vocab_file", "merges_file", "spm_file", "source_spm", "target_spm", "tokenizer_file")
_TOKENIZER_HINT = (
    f"Name a model's folder that holds {CONFIG_NAME} and the tokenizer's files, tokenizer.json and others."
)
_FOLDER_HINT = (
    "Pass a local folder instead, as in --model /path/to/folder (--teacher and --student likewise), that holds "
    f"{CONFIG_NAME} and the weights; open_clip's local-dir:/path/to/folder means the same."
)


@dataclasses.dataclass(frozen=True)
class PixelTransform:
    """The steps of open_clip's transform on a PIL image, then conversion to bytes."""

    steps: list[Callable[[Image.Image], Image.Image]]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """RGB image of any size to uint8 [H, W, 3], 0…255."""
        for step in self.steps:
            image = step(image)
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def normalize_pixels(pixels: torch.Tensor, preprocess: dict[str, Any]) -> torch.Tensor:
    """Scale and shift bytes, [B, H, W, 3], as torchvision's ToTensor and Normalize do: float32 [B, 3, H, W], contiguous."""
    mean, std = (_per_channel(tuple(preprocess[name]), pixels.device) for name in ("mean", "std"))
    channels_first = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return channels_first.div_(255).sub_(mean).div_(std)


@lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return float32 [3, 1, 1]; kept, since every copy to a GPU makes the host wait."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)


def hash_preprocess(preprocess: dict[str, Any], *, fast_decode: bool) -> str:
    """Hash everything that determines the pixels a model sees."""
    text = json.dumps(
        {"preprocess": preprocess, "fast_decode": fast_decode, "alpha": "white", "exif": "ignored"}, sort_keys=True
    )
    return "blake2b:" + hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclasses.dataclass(frozen=True)
class BoundedTokenizer:
    """A tokenizer that reads the first `LONGEST_TEXT` characters of each text; picklable."""

    whole: Any  # open_clip's own

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Return int64 [B, L]."""
        return cast(torch.Tensor, self.whole([text[:LONGEST_TEXT] for text in texts]))


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """Description of a model, as sidecars record it."""

    spec: str  # the name it was loaded by, including the tag of its weights
    slug: str  # the name for files and folders
    architecture: str | None  # open_clip's name; None for a folder or file, as is the tag
    tag: str | None
    weights_hash: str  # `blake2b:…` of the weights file's bytes; `fresh:SEED` for random weights
    preprocess: dict[str, Any]  # open_clip's PreprocessCfg
    context_length: int
    embed_dim: int
    image_size: tuple[int, int]
    parameters: int
    tokenizer: str  # its class and, where it has one, its Hugging Face name
    config: dict[str, Any]  # open_clip's `model_cfg`, from which the architecture can be built

    @property
    def preprocess_hash(self) -> str:
        """Hash of everything that determines the pixels a model sees, without --fast-decode."""
        return hash_preprocess(self.preprocess, fast_decode=False)


@dataclasses.dataclass(frozen=True)
class ClipModel:
    """A CLIP model on its device, in evaluation mode, with float32 weights."""

    info: ModelInfo
    module: torch.nn.Module
    tokenizer: BoundedTokenizer
    device: torch.device

    @property
    def logit_scale(self) -> float:
        """Factor on cosine similarities before the softmax: exp of the learned parameter."""
        return float(cast(torch.Tensor, self.module.logit_scale).detach().exp())

    @property
    def logit_bias(self) -> float | None:
        """What is added to scaled cosine similarities, in models trained with a sigmoid loss; None in others."""
        bias = getattr(self.module, "logit_bias", None)
        return float(bias.detach()) if isinstance(bias, torch.Tensor) else None

    def with_logit_bias(self) -> ClipModel:
        """Return a model that has a logit bias: itself, or with a new one, and the scale that goes with it."""
        if self.logit_bias is not None:
            return self
        log_scale = cast(torch.nn.Parameter, self.module.logit_scale)
        with torch.no_grad():
            log_scale.fill_(math.log(SIGMOID_SCALE))
        self.module.logit_bias = torch.nn.Parameter(torch.full_like(log_scale, SIGMOID_BIAS))
        starts = {"init_logit_scale": math.log(SIGMOID_SCALE), "init_logit_bias": SIGMOID_BIAS}
        info = dataclasses.replace(self.info, parameters=self.info.parameters + 1, config=self.info.config | starts)
        return dataclasses.replace(self, info=info)

    def cast_products(self, precision: Precision) -> None:
        """Convert the weights of matrix products and convolutions to `precision`, for a model that only encodes.

        Autocast alone casts them at every call, and for attention layers once per sample: a ViT-B-32 embedded 33 images per
        second in fp32, 38 under bf16 autocast, and 151 with its weights cast once (2 cores with AMX).
        """
        for module in self.module.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) or is_plain_attention(module):
                module.to(precision.dtype)

    @cached_property
    def _towers(self) -> PrunedForward:
        return PrunedForward(self.module)

    @cached_property
    def _at_once(self) -> int:
        modules = cast(torch.nn.Module, self.module.visual).modules()
        convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in modules)
        is_vit = convolutions <= 1  # which cuts its patches
        return 2**20 if is_vit or self.device.type != "cpu" else _CONVOLVED_AT_ONCE

    def pixel_transform(self) -> Transform:
        """Return the model's own resize and crop; after `normalize`, open_clip's evaluation transform bit for bit."""
        from clipcid_cli.runtime.models.lean_open_clip import open_clip

        preprocess = open_clip.transform.PreprocessCfg(**self.info.preprocess)
        whole = open_clip.transform.image_transform_v2(preprocess, is_train=False)
        return PixelTransform(whole.transforms[:-2])  # without its last two, ToTensor and Normalize

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalise pixels, uint8 [B, H, W, 3] on any device, for the image tower: float32 [B, 3, H, W] on the model's."""
        return normalize_pixels(pixels.to(self.device, non_blocking=True), self.info.preprocess)

    def encode_images(self, pixels: torch.Tensor, precision: Precision) -> torch.Tensor:
        """Embed pixels, uint8 [B, H, W, 3] or normalised float32 [B, 3, H, W], to unit rows, float32 [B, D]."""
        prepared = self.normalize(pixels) if pixels.dtype == torch.uint8 else pixels.to(self.device)
        with torch.inference_mode(), precision.autocast(self.device):
            features = torch.cat([self._towers.encode_images(part) for part in torch.split(prepared, self._at_once)])
        return torch.nn.functional.normalize(features.float(), dim=-1)

    def encode_texts(self, tokens: torch.Tensor, precision: Precision) -> torch.Tensor:
        """Embed tokens, int64 [B, L] as `tokenizer` gives them, to unit rows, float32 [B, D] on the model's device."""
        with torch.inference_mode(), precision.autocast(self.device):
            features = self._towers.encode_texts(tokens)
        return torch.nn.functional.normalize(features.float(), dim=-1)


def load_model(name: ModelName, device: torch.device | str = "cpu", fresh_seed: int | None = None) -> ClipModel:
    """Load a CLIP model; an ``architecture`` or ``config`` needs a seed for random weights."""
    with quiet_libraries():
        config = _find_config(name)
        _validate_transformers(name, config)
        if name.has_weights:
            module, weights = _load_trained(name, config)
            weights_hash = hash_weights(weights)
        elif fresh_seed is None:
            raise ClipcidError(f"Model {name.spec} has no weights.", _FOLDER_HINT)
        else:
            module = _start_fresh(name, config, fresh_seed)
            weights_hash = f"fresh:{fresh_seed}"
        tokenizer = _load_tokenizer(name, config)
    _validate_finite(name, module)
    module.eval().to(device)
    # Through JSON, so that tuples become lists, as in sidecars.
    preprocess = json.loads(json.dumps(dict(cast(Any, module).visual.preprocess_cfg)))
    size = preprocess["size"]
    tokenizer_name = config["text_cfg"].get("hf_tokenizer_name")
    info = ModelInfo(
        spec=name.spec,
        slug=name.slug,
        architecture=name.architecture,
        tag=name.tag,
        weights_hash=weights_hash,
        preprocess=preprocess,
        context_length=int(tokenizer.whole.context_length),
        embed_dim=int(config["embed_dim"]),
        image_size=(size, size) if isinstance(size, int) else (size[0], size[1]),
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        tokenizer=" ".join(filter(None, (type(tokenizer.whole).__name__, tokenizer_name))),
        config=config,
    )
    model = ClipModel(info, module, tokenizer, torch.device(device))
    _validate_towers(model)
    return model


def _find_config(name: ModelName) -> dict[str, Any]:
    """Return open_clip's ``model_cfg`` of a model; a tag's has its own activation."""
    from clipcid_cli.runtime.models.lean_open_clip import open_clip

    if name.path is not None:
        return read_config(name.path)[0]
    if name.kind == "hub":
        with _reaching_hub(f"files of model {name.spec}", _FOLDER_HINT):
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
    from clipcid_cli.runtime.models.lean_open_clip import open_clip

    if name.path is not None:
        weights = find_weights(name.path)
        assert weights is not None, "or it would be a configuration"
        validate_weights(config, weights)
        own = _own_text_tower(config, name)
        return _create(name, f"local-dir:{name.path}", config, require_pretrained=True, **own), weights
    if name.kind == "hub":
        with _reaching_hub(f"weights of model {name.spec}", _FOLDER_HINT):
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
    with _reaching_hub(f"weights of model {name.spec}", _FOLDER_HINT):
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
    from clipcid_cli.runtime.models.lean_open_clip import import_towers, open_clip

    try:
        import_towers(config)
        return cast(torch.nn.Module, open_clip.create_model(source, precision="fp32", device="cpu", **options))
    except Exception as error:  # open_clip raises whatever PyTorch, safetensors or json do for a file that does not fit
        raise ClipcidError(
            f"Model {name.spec} could not be loaded: {in_one_line(error, 400)}",
            f"Check that the weights are complete and match the architecture in {CONFIG_NAME}; copy or download them again.",
        ) from error


def _load_tokenizer(name: ModelName, config: dict[str, Any]) -> BoundedTokenizer:
    """Load CLIP's tokenizer, or the Hugging Face one that a configuration names: the folder's own, or else the hub's."""
    from clipcid_cli.runtime.models.lean_open_clip import open_clip

    text = config["text_cfg"]
    options = {"context_length": text.get("context_length", 77)} | (text.get("tokenizer_kwargs") or {})
    hub_name = text.get("hf_tokenizer_name")
    if not hub_name:
        return BoundedTokenizer(open_clip.SimpleTokenizer(**options))
    folder = name.folder
    has_own = folder is not None and any(any(folder.glob(files)) for files in _TOKENIZER_FILES)
    load = partial(
        open_clip.tokenizer.HFTokenizer,
        tokenizer_mode=text.get("tokenizer_mode"),
        **options,
        trust_remote_code=False,
        local_files_only=has_own,
    )
    if not has_own:
        validate_hub_name(name, "hf_tokenizer_name", hub_name)
        with _reaching_hub(f"files of {hub_name}, the tokenizer of model {name.spec},", _TOKENIZER_HINT):
            return BoundedTokenizer(load(hub_name))
    assert folder is not None
    _validate_tokenizer_files(folder)
    try:
        return BoundedTokenizer(load(folder))
    except Exception as error:  # transformers raises OSError, ValueError, ImportError and its own
        raise ClipcidError(
            f"The tokenizer of model {name.spec} could not be loaded from {folder}: {in_one_line(error, 400)}",
            f"Put all files of {hub_name} there (tokenizer.json, tokenizer_config.json, …).",
        ) from error


def _validate_tokenizer_files(folder: Path) -> None:
    """Refuse a `tokenizer_config.json` that names a file outside its folder, which transformers 4 opens as it is named."""
    file = folder / "tokenizer_config.json"
    content: Any = {}
    with contextlib.suppress(OSError, ValueError, RecursionError):  # whatever is wrong with it, transformers tells
        content = read_json(file)
    for entry in _VOCABULARY_ENTRIES:
        value = content.get(entry) if isinstance(content, dict) else None
        if (
            isinstance(value, str)
            and os.path.exists(value)
            and not Path(value).resolve().is_relative_to(folder.resolve())
        ):
            raise ClipcidError(
                f"{file}: {entry} is {value!r}, a file outside the model's folder.",
                f"Choose another model, or remove the entry {entry}.",
            )


@contextlib.contextmanager
def _reaching_hub(what: str, fix: str) -> Iterator[None]:
    """Let a library fetch from the hub; without a network, from the local cache only.

    huggingface_hub retries each file six times with growing pauses: 46 s for one model that cannot be reached.
    """
    offline = hub.HF_HUB_OFFLINE
    reachable = offline or _answers(hub.ENDPOINT)
    hub.HF_HUB_OFFLINE = offline or not reachable
    try:
        yield
    except Exception as error:  # the http client, the hub's client and open_clip each raise their own
        why = f"{hub.ENDPOINT} cannot be reached from here"
        if offline:
            why = "the hub is disabled (HF_HUB_OFFLINE)"
        elif reachable:
            why = f"{hub.ENDPOINT} did not provide them: {in_one_line(error, 200)}"
        raise ClipcidError(f"The {what} are not in the local cache, and {why}.", fix) from error
    finally:
        hub.HF_HUB_OFFLINE = offline


def _answers(url: str) -> bool:
    """Tell whether the host of `url` accepts connections; a proxy is assumed to."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme in urllib.request.getproxies():
        return True
    port = parts.port or (443 if parts.scheme == "https" else 80)
    with contextlib.suppress(OSError):
        socket.create_connection((parts.hostname, port), timeout=5.0).close()
        return True
    return False


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


def builtin_templates(name: str) -> tuple[str, ...]:
    """Return open_clip's templates, ``{c}`` for the class name: ``openai`` (80) or ``simple`` (the best 7 of them)."""
    from clipcid_cli.runtime.models.lean_open_clip import open_clip

    lists = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}
    return tuple(template("{c}") for template in lists[name])


def builtin_class_names(name: str) -> dict[str, str]:
    """Return open_clip's class names of ``imagenet`` in the order of the labels, by timm's WordNet number (n01440764, …)."""
    from timm.data.imagenet_info import ImageNetInfo

    from clipcid_cli.runtime.models.lean_open_clip import open_clip

    assert name == "imagenet", name
    synsets = cast(Any, ImageNetInfo("imagenet-1k")).label_names()
    return dict(zip(synsets, open_clip.IMAGENET_CLASSNAMES, strict=True))
