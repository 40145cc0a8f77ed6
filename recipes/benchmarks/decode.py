"""JPEG decoders beside Pillow: images a second on one core, up to the pixels a ViT-L-14 is shown, and whether they differ.

    python recipes/benchmarks/decode.py                 Pillow, Pillow's draft (--fast-decode), torchvision, simplejpeg

A decoder that is not installed is left out (`pip install simplejpeg`). Images are noise of all scales, as strong at each as
in photographs, in JPEG of quality 90 with half the colour resolution. Rounds of all decoders alternate; CPU seconds.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image, features

sys.path.insert(0, str(Path(__file__).parent))
from balance import describe_machine

from clipcid_cli.runtime.models.clip_model import PixelTransform
from clipcid_cli.runtime.models.decode import decode_image

SIDE = 224
SIZES = ((256, 256), (384, 288), (512, 512))
Decode = Callable[[bytes], Image.Image]


def make_jpegs(width: int, height: int, number: int) -> list[bytes]:
    """Make images of noise whose strength falls with its frequency as in photographs."""
    random = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    found = []
    for _ in range(number):
        waves = np.fft.rfft2(random.normal(size=(3, height, width))) / frequency**1.2
        waves[:, 0, 0] = 0
        noise = np.fft.irfft2(waves, s=(height, width)).transpose(1, 2, 0)
        pixels = np.clip(128 + 50 * noise / noise.std(), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def find_decoders() -> dict[str, Decode]:
    """Return the decoders that are installed, by name; the first is the package's own."""
    found: dict[str, Decode] = {
        "Pillow": decode_image,
        "Pillow, draft": partial(decode_image, draft_size=(2 * SIDE, 2 * SIDE)),
    }
    try:
        from torchvision.io import ImageReadMode, decode_jpeg

        def by_torchvision(data: bytes) -> Image.Image:
            pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
            return Image.fromarray(pixels.permute(1, 2, 0).numpy())

        by_torchvision(make_jpegs(16, 16, 1)[0])
        found["torchvision"] = by_torchvision
    except (ImportError, RuntimeError) as error:
        print(f"torchvision is left out: {error}", file=sys.stderr)
    try:
        import simplejpeg

        found["simplejpeg"] = lambda data: Image.fromarray(simplejpeg.decode_jpeg(data))
    except ImportError:
        print("simplejpeg is left out: it is not installed", file=sys.stderr)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps = open_clip.image_transform(SIDE, is_train=False).transforms
    transform = PixelTransform(list(steps[:2]))  # resize and crop, as `embed`
    decoders = find_decoders()
    turbo = features.version_feature("libjpeg_turbo")
    print(f"{describe_machine(1)}; Pillow {Image.__version__} with libjpeg-turbo {turbo}\n")
    print(
        "| image | decoder | images/s a core | beside Pillow | largest difference of a pixel |\n|---|---|---|---|---|"
    )
    for width, height in SIZES:
        jpegs = make_jpegs(width, height, arguments.images)
        seconds = dict.fromkeys(decoders, np.inf)
        for _ in range(arguments.rounds):
            for name, decode in decoders.items():
                started = time.process_time()
                for data in jpegs:
                    transform(decode(data))
                seconds[name] = min(seconds[name], time.process_time() - started)
        expected = [transform(decode_image(data)).int() for data in jpegs]
        for name, decode in decoders.items():
            pairs = zip(jpegs, expected, strict=True)
            largest = max(int((transform(decode(data)).int() - pixels).abs().max()) for data, pixels in pairs)
            ratio = seconds["Pillow"] / seconds[name]
            speed = arguments.images / seconds[name]
            print(f"| {width} x {height} | {name} | {speed:,.0f} | {ratio:.2f} | {largest} |")


if __name__ == "__main__":
    main()
