"""How near, how small and how fast is what `export` writes? Looked at by programs that do not know clipcid.

    python recipes/benchmarks/export.py MODEL [MODEL …]       folders in open_clip's form
    python recipes/benchmarks/export.py --architecture ViT-B-32 --architecture ViT-B-32-quickgelu      with random weights
    python recipes/benchmarks/export.py recipes/quickstart/teacher --venvs DIR

Each model is exported by the real command in every form, with the classes of `--data` folded in. Then, on all images of
`--data`:

- hf: `CLIPModel` and `CLIPProcessor`, offline, from image files and words, against open_clip; with `--venvs` in an
  environment of its own (transformers, torch, torchvision, Pillow), made there once by pip.
- onnx: the encoders and the classifier under ONNX Runtime, against open_clip; with `--venvs` the example of
  docs/export.md runs in an environment that has onnxruntime, NumPy and Pillow only.

Speed is what `export` measured, PyTorch and each form one after another: of encoders from cropped images, the median batch
of 32; of classifiers from decoded images one by one, with resizing, beside open_clip's transform and encoder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

WIDTHS = (9, 7, 8, 9, 7, 7, 8, 7)
HERE = Path(__file__).resolve().parents[2]
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

# Run by the environment that knows transformers and nothing of clipcid: FOLDER IMAGES.npz OUT.npy
HF_SCRIPT = """
import sys, numpy, torch, transformers
from PIL import Image
folder, given, out = sys.argv[1:]
model = transformers.CLIPModel.from_pretrained(folder).eval()
processor = transformers.CLIPProcessor.from_pretrained(folder)
data = numpy.load(given)
images, words = [Image.open(path) for path in data["paths"]], [str(text) for text in data["prompts"]]
rows = []
with torch.no_grad():
    for start in range(0, len(images), 32):
        inputs = processor(images=images[start:start + 32], return_tensors="pt")
        rows.append(model.get_image_features(**inputs).pooler_output)
    tokens = processor(text=words, padding=True, truncation=True, return_tensors="pt")
    texts = model.get_text_features(**tokens).pooler_output
norm = torch.nn.functional.normalize
numpy.savez(out, images=norm(torch.cat(rows), dim=-1).numpy(), texts=norm(texts, dim=-1).numpy())
assert not any(name.startswith(("clipcid", "open_clip")) for name in sys.modules)
print("transformers", transformers.__version__)
"""


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="*", help="folders in open_clip's form")
    parser.add_argument("--architecture", action="append", default=[], help="architecture to try with random weights")
    parser.add_argument("--data", type=Path, default=HERE / "recipes/quickstart/data/classification")
    parser.add_argument("--images", type=int, default=1000, help="largest number of images, spread over the data")
    parser.add_argument("--venvs", type=Path, help="folder for the two fresh environments")
    parser.add_argument("--form", action="append", default=[], help="hf or onnx; both by default")
    arguments = parser.parse_args()
    print(describe_machine())
    with tempfile.TemporaryDirectory() as scratch:
        reference = prepare_data(arguments.data, arguments.images, Path(scratch))
        models = [*arguments.models, *(start_fresh(name, Path(scratch)) for name in arguments.architecture)]
        for model in models:
            show(model, reference, arguments, Path(scratch))


def show(model: Path, data: dict[str, Any], arguments: argparse.Namespace, scratch: Path) -> None:
    """Export one model and print what it is like."""
    folder = scratch / "exports" / model.name
    forms = arguments.form or ["hf", "onnx"]
    command = ["clipcid", "export", model, "--out", folder, "--data", arguments.data, "--quiet"]
    command += ["--check-images", arguments.images]
    command += ["--classnames", arguments.data, "--quantize", "fp16", "--quantize", "int8", "--dense"]
    if "onnx" not in forms:
        command = command[: command.index("--classnames")]
    subprocess.run([*map(str, command), *(word for form in forms for word in ("--format", form))], check=True)
    parity = json.loads((folder / "parity.json").read_text())
    base = parity["reference"]
    print(f"\n{model.name}: {base['bytes'] / 1e6:.1f} MB in PyTorch, {base['images_per_second']:.0f} images/s")
    names = ("cosine", "MB", "smaller", "images/s", "faster", "acc1", "drop", "same")
    print(f"{'form':<16} " + " ".join(f"{name:>{width}}" for name, width in zip(names, WIDTHS, strict=True)))
    for form, found in parity["parity"].items():
        print_form(form, found, base)
    expected = embed_with_open_clip(model, data)
    if "hf" in forms:
        python = make_venv(arguments.venvs, "hf", ["transformers", "torch", "torchvision", "pillow"])
        given, out = scratch / "given.npz", scratch / "rows.npz"
        np.savez(given, paths=data["paths"], prompts=data["prompts"])
        said = subprocess.run(
            [python, "-W", "ignore", "-c", HF_SCRIPT, folder, given, out],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | OFFLINE,
            cwd=scratch,
        )
        found = np.load(out)
        compare("hf, " + said.stdout.strip() + ", offline", expected, found["images"], found["texts"])
    if "onnx" in forms:
        images, texts, classified, engine = run_onnx(folder, expected, data)
        compare(f"onnx, {engine}", expected, images, texts)
        top = (expected["images"] @ expected["texts"].T).argmax(1)
        print(f"classifier.onnx from image files: {(classified == top).sum()} of {len(top)} the same class")
        python = make_venv(arguments.venvs, "ort", ["onnxruntime", "numpy", "pillow"])
        example = documented_example()
        answer = subprocess.run(
            [python, "-c", example, folder / "classifier.onnx", data["paths"][0]],
            check=True,
            capture_output=True,
            text=True,
            cwd=scratch,
        ).stdout
        first = answer.splitlines()[0].split(maxsplit=1)[1]
        right = first == data["names"][top[0]]
        print(f"docs/export.md's example, {len(example.strip().splitlines())} lines, in {python}: {first} ({right=})")


def print_form(form: str, found: dict[str, Any], base: dict[str, Any]) -> None:
    """Print what `export` measured of a form."""
    cosines = [found[tower]["min_cosine"] for tower in ("image", "text") if tower in found]
    speed = found.get("pytorch_images_per_second", base["images_per_second"])
    zeroshot = found["zeroshot"]
    smaller = f"{base['bytes'] / found['bytes']:.2f}×" if cosines else ""
    cosine = f"{min(cosines):.6f}" if cosines else ""
    print(
        f"{form:<16} {cosine:>9} {found['bytes'] / 1e6:>7.1f} {smaller:>8} "
        f"{found['images_per_second']:>9.0f} {found['images_per_second'] / speed:>6.2f}× "
        f"{100 * zeroshot['value']:>6.2f}% {100 * zeroshot['drop']:>+7.2f}% {100 * zeroshot['agreement']:>6.1f}%"
    )


def compare(name: str, expected: dict[str, Any], images: np.ndarray, texts: np.ndarray) -> None:
    """Print how near rows are to open_clip's, and whether each image's nearest class is the same."""
    ours = (expected["images"] @ expected["texts"].T).argmax(1)
    theirs = (images @ texts.T).argmax(1)
    print(
        f"{name}: {len(images)} images, cosine >= {(images * expected['images']).sum(1).min():.7f}; {len(texts)} prompts, "
        f"cosine >= {(texts * expected['texts']).sum(1).min():.7f}; {(ours == theirs).sum()} of {len(ours)} the same class"
    )


def prepare_data(data: Path, limit: int, scratch: Path) -> dict[str, Any]:
    """Write the images as RGB files, and the prompts of one template."""
    from clipcid_cli.formats.data.benchmark import (
        DEFAULT_TEMPLATES,
        fill_template,
        find_benchmark_folder,
        read_class_names,
        read_templates,
    )
    from clipcid_cli.formats.data.dataset import open_dataset
    from clipcid_cli.runtime.models.decode import decode_image

    folder = find_benchmark_folder(str(data))
    if folder.class_names is None:
        raise SystemExit(f"{data} has no classnames.txt, of which the benchmark makes its classes.")
    names = read_class_names(folder.class_names)
    template = (read_templates(folder.templates) if folder.templates else DEFAULT_TEMPLATES)[0]
    samples = [sample for shard in open_dataset(folder.data).shards for sample in shard.samples()]
    paths = []
    for place in np.linspace(0, len(samples) - 1, min(limit, len(samples))).round().astype(int):
        path = scratch / f"{len(paths):05d}.png"
        decode_image(samples[place].image.read()).save(path)
        paths.append(str(path))
    return {"names": names, "prompts": [fill_template(template, name) for name in names], "paths": paths}


def start_fresh(architecture: str, scratch: Path) -> Path:
    """Write an architecture of open_clip with random weights."""
    from clipcid_cli.formats.models.open_clip_folder import write_model_folder
    from clipcid_cli.runtime.models.load import load_model
    from clipcid_cli.runtime.models.names import parse_model

    model = load_model(parse_model(architecture), fresh_seed=0)
    folder = scratch / architecture
    write_model_folder(folder, model.info.config, model.info.preprocess, model.module.state_dict())
    return folder


def embed_with_open_clip(model: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Embed images and prompts as open_clip does by itself."""
    import open_clip
    import torch
    from PIL import Image

    module, _, transform = open_clip.create_model_and_transforms(f"local-dir:{model}")
    module.eval()
    pixels = torch.stack([transform(Image.open(path)) for path in data["paths"]])
    tokens = open_clip.get_tokenizer(f"local-dir:{model}")(data["prompts"])
    with torch.no_grad():
        images = torch.cat([module.encode_image(batch, normalize=True) for batch in pixels.split(32)])
        texts = module.encode_text(tokens, normalize=True)
    return {"images": images.numpy(), "texts": texts.numpy(), "pixels": pixels.numpy(), "tokens": tokens.numpy()}


def run_onnx(folder: Path, expected: dict[str, Any], data: dict[str, Any]) -> tuple[Any, Any, Any, str]:
    """Run the encoders on open_clip's pixels and tokens, the classifier on the files themselves."""
    import onnxruntime
    from PIL import Image

    def session(name: str) -> Any:
        return onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])

    encoder = session("image_encoder.onnx")
    batches = np.array_split(expected["pixels"], max(1, len(expected["pixels"]) // 32))
    images = np.concatenate([encoder.run(["image_embeds"], {"pixel_values": batch})[0] for batch in batches])
    (texts,) = session("text_encoder.onnx").run(["text_embeds"], {"input_ids": expected["tokens"]})
    classifier = session("classifier.onnx")
    classified = [
        int(classifier.run(["logits"], {"image": np.asarray(Image.open(path))[None]})[0].argmax())
        for path in data["paths"]
    ]
    return images, texts, np.array(classified), f"ONNX Runtime {onnxruntime.__version__}"


def documented_example() -> str:
    """Return the program for classifier.onnx of docs/export.md."""
    blocks = (HERE / "clipcid_cli" / "docs" / "export.md").read_text(encoding="utf-8").split("```python\n")[1:]
    return next(block.split("```")[0] for block in blocks if "onnxruntime.InferenceSession" in block)


def make_venv(parent: Path | None, name: str, packages: list[str]) -> Path:
    """Make an environment with these packages only, once; without a place for it, this one serves."""
    if parent is None:
        return Path(sys.executable)
    python = parent / name / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", parent / name], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def describe_machine() -> str:
    """Name the date, the processor and the engines."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    found = [name for name in ("avx512_vnni", "avx512_fp16", "amx_int8") if name in flags] or ["neither VNNI nor AMX"]
    return (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores of {model} ({', '.join(found)}), "
        f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads a side"
    )


if __name__ == "__main__":
    main()
