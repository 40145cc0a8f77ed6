"""Names of models, parsed without importing PyTorch, so that a wrong name is an error at once.

A model is one of: an open_clip architecture (``ViT-B-32``); an architecture with the tag of its weights
(``ViT-B-32:laion2b_s34b_b79k``); a Hugging Face repository (``hf-hub:org/name``); a folder with configuration and
weights (an export, a distill run's ``student/``); only a configuration (a ``.json`` file, or a folder without weights).
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.util
import json
import os
import re
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from clipcid_cli.errors import ClipcidError
from clipcid_cli.file_names import file_name

Kind = Literal["architecture", "tag", "hub", "folder", "config"]

CONFIG_NAME = "open_clip_config.json"
HF_CONFIG_NAME = "config.json"  # of a Hugging Face text tower, next to the model's own

# The order in which open_clip 3.3 picks one of several weight files of a folder (factory._find_checkpoint_in_dir).
_WEIGHT_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)

# Weights of a bare architecture used as a teacher. Only tags trained with the architecture's own activation are listed: the
# first tag of open_clip is often `openai`, whose QuickGELU the bare architecture lacks.
DEFAULT_TAGS = {
    "ViT-B-32": "laion2b_s34b_b79k",
    "ViT-B-32-256": "datacomp_s34b_b86k",
    "ViT-B-16": "laion2b_s34b_b88k",
    "ViT-B-16-plus-240": "laion400m_e32",
    "ViT-L-14": "laion2b_s32b_b82k",
    "ViT-H-14": "laion2b_s32b_b79k",
    "ViT-g-14": "laion2b_s34b_b88k",
    "ViT-bigG-14": "laion2b_s39b_b160k",
    "ViT-L-14-336-quickgelu": "openai",
    "ViT-H-14-quickgelu": "dfn5b",
    "ViT-H-14-378-quickgelu": "dfn5b",
    "RN50-quickgelu": "openai",
    "RN101-quickgelu": "openai",
    "convnext_base_w": "laion2b_s13b_b82k_augreg",
    "convnext_large_d_320": "laion2b_s29b_b131k_ft_soup",
    "convnext_xxlarge": "laion2b_s34b_b82k_augreg_soup",
    "EVA02-B-16": "merged2b_s8b_b131k",
    "EVA02-L-14": "merged2b_s4b_b131k",
    "EVA02-L-14-336": "merged2b_s6b_b61k",
    "MobileCLIP-S1": "datacompdr",
    "MobileCLIP-S2": "datacompdr",
    "MobileCLIP-B": "datacompdr_lt",
    "ViT-B-16-quickgelu": "dfn2b",
    "ViT-L-14-quickgelu": "dfn2b",
} | {
    f"{name}-{size}": tag
    for name, sizes, tag in (
        ("MobileCLIP2", "S0 S2 S3 S4 B L-14", "dfndr2b"),
        ("PE-Core", "T-16-384 S-16-384 B-16 L-14-336 bigG-14-448", "meta"),
        ("ViT", "H-14-worldwide-quickgelu H-14-worldwide-378", "metaclip2_worldwide"),
        ("ViT", "bigG-14-worldwide bigG-14-worldwide-378", "metaclip2_worldwide"),
        ("ViT", "B-16-SigLIP B-16-SigLIP-256 B-16-SigLIP-384 B-16-SigLIP-512 B-16-SigLIP-i18n-256", "webli"),
        ("ViT", "L-16-SigLIP-256 L-16-SigLIP-384 SO400M-14-SigLIP SO400M-14-SigLIP-384", "webli"),
        ("ViT", "B-32-SigLIP2-256 B-16-SigLIP2 B-16-SigLIP2-256 B-16-SigLIP2-384 B-16-SigLIP2-512", "webli"),
        ("ViT", "L-16-SigLIP2-256 L-16-SigLIP2-384 L-16-SigLIP2-512 SO400M-14-SigLIP2", "webli"),
        ("ViT", "SO400M-16-SigLIP2-256 SO400M-16-SigLIP2-384 SO400M-16-SigLIP2-512", "webli"),
        ("ViT", "gopt-16-SigLIP2-256 gopt-16-SigLIP2-384", "webli"),
    )
    for size in sizes.split()
}

_LOCAL_HINT = (
    f"Give a local folder with {CONFIG_NAME} and the weights: /path/to/folder (open_clip's "
    "local-dir:/path/to/folder means the same)."
)

# What open_clip and a tokenizer of transformers are given of ``tokenizer_kwargs``. Others name files or run code.
_TOKENIZER_OPTIONS = (
    "clean",
    "context_length",
    "language",
    "padding_side",
    "reduction_mask",
    "strip_sep_token",
    "use_fast",
)
_LARGEST_CONFIG = 2**26
_TIMM_NAME = re.compile(r"[A-Za-z0-9_.-]+")  # timm's own; with a prefix, it names a folder or a repository
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9_.-]+)?")

# No model has more; some of these make memory before there are weights to compare with.
_Count = Annotated[int, msgspec.Meta(ge=1, le=2**16)]
_Side = Annotated[int, msgspec.Meta(ge=1, le=2**13)]  # of an image, in pixels
_Layers = Annotated[int, msgspec.Meta(ge=1, le=1024)]
_Channels = Annotated[list[float], msgspec.Meta(min_length=3, max_length=3)]


class _Tower(msgspec.Struct):
    """Those entries of a tower that are read here, or count something; open_clip knows more, and checks those itself."""

    layers: _Layers | list[_Layers] | None = None
    width: _Count | None = None
    heads: _Count | None = None
    head_width: _Count | None = None
    patch_size: _Count | list[_Count] | None = None
    image_size: _Side | list[_Side] | None = None
    context_length: _Side | None = None
    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=2**24)] | None = None
    tokenizer_kwargs: dict[str, Any] | None = None


class _Architecture(msgspec.Struct):
    embed_dim: Annotated[int, msgspec.Meta(ge=1, lt=2**20)]
    vision_cfg: _Tower
    text_cfg: _Tower


class _Preprocess(msgspec.Struct):
    """What open_clip takes for granted of the pixels' description, or asserts."""

    mean: _Channels | None = None
    std: _Channels | None = None
    size: _Count | Annotated[list[_Count], msgspec.Meta(min_length=2, max_length=2)] | None = None
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    mode: Literal["RGB"] = "RGB"


class _Configuration(msgspec.Struct):
    model_cfg: _Architecture
    preprocess_cfg: _Preprocess | None = None


@dataclasses.dataclass(frozen=True)
class ModelName:
    """A model as the user named it, see the module's docstring."""

    spec: str
    kind: Kind
    architecture: str | None = None  # of kinds `architecture` and `tag`
    tag: str | None = None
    path: Path | None = None  # the folder or file of kinds `folder` and `config`
    suffix: str = ""  # ends the `slug`, where another model of the same command has the same one

    @property
    def has_weights(self) -> bool:
        return self.kind not in ("architecture", "config")

    @property
    def folder(self) -> Path | None:
        """Folder of the configuration, which may hold a tokenizer's files; None for a name of open_clip or of a hub."""
        return self.path if self.path is None or self.path.is_dir() else self.path.parent

    @property
    def slug(self) -> str:
        """Name for files and folders, of ``[A-Za-z0-9._-]``; a distill run's student is called by run and student."""
        if self.path is not None:
            path = self.path.resolve()
            is_student = path.name in ("student", "student-ema")
            text = f"{path.parent.name}-{path.name}" if is_student else path.name.removesuffix(".json")
            name = file_name(text, empty="model")
        else:
            name = file_name(self.spec.removeprefix("hf-hub:"), separators=":/", empty="model")
        return name + self.suffix


def parse_model(spec: str) -> ModelName:
    """Parse the name of a model."""
    if spec.startswith("hf-hub:"):
        return ModelName(spec, "hub")
    # Before it becomes a Path, which forgets the "./" that makes a name such as ./~x no user's.
    path = Path(os.path.expanduser(spec.removeprefix("local-dir:")))
    if path.is_dir():
        if not (path / CONFIG_NAME).is_file():
            raise ClipcidError(
                f"Model folder {path} has no {CONFIG_NAME}.",
                f"Give {path / 'student'}."
                if (path / "student" / CONFIG_NAME).is_file()
                else "Give a folder in open_clip's form: of clipcid export --format open-clip, a distill run's student/, or "
                "a download.",
            )
        return ModelName(spec, "folder" if find_weights(path) else "config", path=path)
    if spec.startswith(("local-dir:", ".", "/", "~")) or spec.endswith(".json"):
        if path.is_file() and path.suffix == ".json":
            return ModelName(spec, "config", path=path)
        fix = "Check the path." if spec.endswith(".json") else _LOCAL_HINT
        raise ClipcidError(f"Model {spec}: there is no such folder or .json file.", fix)
    named, _, tag = spec.partition(":")
    architecture = named.replace("/", "-")
    known = known_architectures()
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=3)
        hint = f"Close names: {', '.join(near)}. " if near else ""
        raise ClipcidError(
            f"Model {spec}: open_clip has no architecture {named}, and there is no folder of that name.",
            hint + _LOCAL_HINT,
        )
    return ModelName(spec, "tag" if tag else "architecture", architecture=architecture, tag=tag or None)


def with_default_tag(name: ModelName) -> ModelName:
    """Give a bare architecture, used as a teacher, its default weights."""
    if name.kind == "config":
        raise ClipcidError(f"Model {name.spec} is a configuration without weights.", _LOCAL_HINT)
    if name.kind != "architecture":
        return name
    assert name.architecture is not None
    if name.architecture not in DEFAULT_TAGS:
        raise ClipcidError(
            f"Model {name.spec} is an architecture without default weights.",
            f"Add a tag of open_clip, as in {name.spec}:TAG, or give a local folder.",
        )
    tag = DEFAULT_TAGS[name.architecture]
    return ModelName(f"{name.architecture}:{tag}", "tag", architecture=name.architecture, tag=tag)


def find_weights(folder: Path) -> Path | None:
    """Find the weights of an open_clip folder, by open_clip's own order of preference; None when there are none."""
    for name in _WEIGHT_NAMES:
        if (folder / name).is_file():
            return folder / name
    others = [path for suffix in ("*.safetensors", "*.bin", "*.pth") for path in folder.glob(suffix) if path.is_file()]
    return min(others, key=lambda path: (path.suffix != ".safetensors", path), default=None)


def read_json(file: Path) -> Any:
    """Read a configuration; an OSError where it is no file, or has more bytes than any configuration."""
    size = file.stat().st_size
    if not file.is_file() or size > _LARGEST_CONFIG:
        raise OSError(f"it is no file of at most {_LARGEST_CONFIG:,} bytes, and has {size:,}")
    return json.loads(file.read_bytes())


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the ``model_cfg`` and ``preprocess_cfg`` of a folder or of such a file; a bare ``model_cfg`` has no other."""
    file = path / CONFIG_NAME if path.is_dir() else path
    try:
        content = msgspec.convert(read_json(file), dict[str, Any])
        content = content if "model_cfg" in content else {"model_cfg": content}
        msgspec.convert(content, _Configuration)
    except (OSError, ValueError, RecursionError) as error:
        example = "one of open_clip's own, such as ViT-B-32.json"
        fix = _LOCAL_HINT if path.is_dir() else f"Correct it by {example}: it has embed_dim, vision_cfg and text_cfg."
        raise ClipcidError(f"{file} is not an open_clip configuration: {error}.", fix) from error
    validate_passed_on(str(file), content["model_cfg"], file.parent)
    return content["model_cfg"], content.get("preprocess_cfg") or {}


def validate_passed_on(source: str, config: dict[str, Any], folder: Path | None = None) -> None:
    """Refuse a ``model_cfg`` by which open_clip, timm or transformers would run code, or read files outside its `folder`."""
    options = [key for key in config["text_cfg"].get("tokenizer_kwargs") or {} if key not in _TOKENIZER_OPTIONS]
    if options:
        raise ClipcidError(
            f"{source}: text_cfg.tokenizer_kwargs has {', '.join(options)}, which a model may not ask for.",
            f"Choose another model, or remove it there: a model may give {', '.join(_TOKENIZER_OPTIONS)}.",
        )
    tower = config["vision_cfg"].get("timm_model_name")
    if not isinstance(tower, str) or not tower or _TIMM_NAME.fullmatch(tower):
        return
    place = Path(tower.removeprefix("local-dir:")).resolve() if tower.startswith("local-dir:") else None
    if folder is None or place is None or not place.is_relative_to(folder.resolve()):
        raise ClipcidError(
            f"{source}: vision_cfg.timm_model_name is {tower!r}, no architecture of timm and no folder in the model's.",
            "Choose another model, or name the architecture there as timm does: vit_base_patch16_siglip_224.",
        )


def validate_weights(config: dict[str, Any], weights: Path) -> None:
    """Refuse a configuration of a larger model than its weights can be of, which would be made before they are read."""
    least = _count_parameters(config["vision_cfg"], "timm_model_name")
    least += _count_parameters(config["text_cfg"], "hf_model_name")
    size = weights.stat().st_size
    if least > size:
        raise ClipcidError(
            f"{weights.parent} describes a model of more than {least:,} parameters, and {weights.name} has {size:,} bytes.",
            f"Copy or download the model again, or correct its {CONFIG_NAME}.",
        )


def _count_parameters(tower: dict[str, Any], other: str) -> int:
    """Count parameters of a transformer, at least: of its attention, positions and vocabulary; none of `other` libraries."""
    width, layers = tower.get("width"), tower.get("layers")
    if tower.get(other) or not isinstance(width, int) or not isinstance(layers, int):
        return 0
    side, patch = tower.get("image_size"), tower.get("patch_size")
    positions = tower.get("context_length") or 0
    if isinstance(side, int) and isinstance(patch, int):
        positions = (side // patch) ** 2
    return width * (4 * layers * width + positions + (tower.get("vocab_size") or 0))


def validate_hub_name(name: ModelName, entry: str, value: Any) -> None:
    """Refuse a path where a model's configuration names a repository: transformers would read what lies there.

    A ``.json`` file that the user named may lead to other folders.
    """
    is_own = name.kind in ("architecture", "tag") or (name.path is not None and not name.path.is_dir())
    if is_own or not isinstance(value, str):
        return
    if not _HUB_NAME.fullmatch(value) or ".." in value or os.path.lexists(value):
        raise ClipcidError(
            f"Model {name.spec}: text_cfg.{entry} is {value!r}, a path outside the model.",
            "Choose another model, or copy the files from there into the model's folder.",
        )


def find_config(name: ModelName) -> dict[str, Any] | None:
    """Return the ``model_cfg`` of a model without loading it; None for one on a hub."""
    if name.kind == "hub":
        return None
    return read_config(name.path or _config_folder() / f"{name.architecture}.json")[0]


def read_width(name: ModelName) -> int | None:
    """Return the width of a model's embeddings from its configuration, without loading it; None for one on a hub."""
    config = find_config(name)
    return None if config is None else int(config["embed_dim"])


@cache
def known_architectures() -> tuple[str, ...]:
    """List the architectures of the installed open_clip from its files, without importing it; not those of sounds."""
    paths = sorted(_config_folder().glob("*.json"))
    return tuple(path.stem for path in paths if {"vision_cfg", "text_cfg"} <= json.loads(path.read_text()).keys())


def _config_folder() -> Path:
    package = importlib.util.find_spec("open_clip")
    assert package is not None, "open_clip is a dependency"
    assert package.origin is not None, "open_clip is a package on disk"
    return Path(package.origin).parent / "model_configs"


def hash_weights(path: Path) -> str:
    """Hash a weights file, as `ModelRecord.weights_hash` records it."""
    with path.open("rb") as file:
        return "blake2b:" + hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()
