"""JPEG decoders beside Pillow: images a second on one core, up to the pixels a ViT-L-14 is shown, and whether they differ.

    python recipes/benchmarks/decode.py                 Pillow, Pillow's draft (--fast-decode), torchvision, simplejpeg
    python recipes/benchmarks/decode.py --views         views of images of several sizes, and mixtures of two

A decoder that is not installed is left out (`pip install simplejpeg`). Images are noise of all scales, as strong at each as
in photographs, in JPEG of quality 90 with half the colour resolution. Rounds of all decoders alternate; CPU seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
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

from clipcid_cli.runtime.models.augment import Augmentation, choose_view
from clipcid_cli.runtime.models.decode import decode_image
from clipcid_cli.runtime.models.renderer import Renderer
from clipcid_cli.runtime.models.views import MixedView, View, mix_pixels

SIDE = 224
SIZES = ((256, 256), (384, 288), (512, 512))
SIZES_OF_VIEWS = ((256, 256), (384, 384), (512, 512), (1024, 768))
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


def show_view(jpegs: list[bytes], number: int) -> tuple[View, np.ndarray]:
    """Decode an image and render a `strong` view of it, as a worker of `distill` does."""
    image = decode_image(jpegs[number % len(jpegs)])
    view = choose_view(Augmentation(0.3, 0.4, 0.2), *image.size, number)
    return view, Renderer({"size": SIDE})(image, view)


def show_mixture(jpegs: list[bytes], number: int) -> np.ndarray:
    """Mix the views of two images."""
    (view, pixels), (other, others) = show_view(jpegs, number), show_view(jpegs, number + 1)
    return mix_pixels(MixedView(view, 0.6, 1.0, other), pixels, others)


def print_views(num_images: int, rounds: int) -> None:
    """Print the table of views and mixtures."""
    print("| image | views, images/s a core | mixtures |\n|---|---|---|")
    for width, height in SIZES_OF_VIEWS:
        jpegs = make_jpegs(width, height, num_images)
        speeds = []
        for work in (show_view, show_mixture):
            seconds = np.inf
            for _ in range(rounds):
                started = time.process_time()
                for number in range(num_images):
                    work(jpegs, number)
                seconds = min(seconds, time.process_time() - started)
            speeds.append(f"{num_images / seconds:,.0f}")
        print(f"| {width} x {height} | {' | '.join(speeds)} |")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--views", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.views:
        print(f"{describe_machine(1)}; Pillow {Image.__version__}\n")
        print_views(arguments.images, arguments.rounds)
        return
    render = Renderer(dataclasses.asdict(open_clip.transform.PreprocessCfg(size=SIDE)))
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
                    render(decode(data))
                seconds[name] = min(seconds[name], time.process_time() - started)
        expected = [render(decode_image(data)).astype(int) for data in jpegs]
        for name, decode in decoders.items():
            pairs = zip(jpegs, expected, strict=True)
            largest = max(int(np.abs(render(decode(data)) - pixels).max()) for data, pixels in pairs)
            ratio = seconds["Pillow"] / seconds[name]
            speed = arguments.images / seconds[name]
            print(f"| {width} x {height} | {name} | {speed:,.0f} | {ratio:.2f} | {largest} |")


if __name__ == "__main__":
    main()
