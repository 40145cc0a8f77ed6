"""Is `embed` faster than a plain open_clip loop, with the same rows? The same model folder and the same shards through both.

    python recipes/benchmarks/embed.py                              the shipped teacher and pairs, one worker, 5 rounds
    python recipes/benchmarks/embed.py --data DIR --model DIR --workers 4 --batch-size 256

The loop is what open_clip's documentation shows: a webdataset pipeline (its preprocessing and tokenizer) in a DataLoader
of as many workers, `encode_image` and `encode_text` under inference_mode, unit rows kept as float16. Both compute in fp32.

Each side is a process of its own, in turn: A B A B … Two rates are printed: of the loop alone, from the first batch asked
for to the last row, with the start of the workers; and of the whole command, with imports and the loading of the model.
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
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from balance import describe_machine

SHIPPED = Path(__file__).parents[1] / "quickstart"
TOLERANCE = 1e-3


def main() -> None:
    """Print both sides, the ratios, and the largest difference of the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=SHIPPED / "data" / "pairs", help="folder of tar shards")
    parser.add_argument("--model", type=Path, default=SHIPPED / "teacher", help="open_clip folder")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loop", type=Path, help="run the open_clip loop alone and write its rows here")
    arguments = parser.parse_args()
    if arguments.loop is not None:
        run_loop(arguments)
        return
    print(describe_machine(os.cpu_count() or 1))
    print(f"{arguments.data}, {arguments.model}, {arguments.workers} workers, batches of {arguments.batch_size}, fp32")
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, rows = Path(scratch), Path(scratch, "rows.npz")
        settings = [
            f"--workers={arguments.workers}",
            f"--batch-size={arguments.batch_size}",
            f"--model={arguments.model}",
        ]
        clipcid = [str(Path(sys.executable).with_name("clipcid")), "embed", str(arguments.data), *settings]
        clipcid += ["--precision=fp32", "--json", "--quiet"]
        loop = [sys.executable, __file__, f"--data={arguments.data}", *settings, f"--loop={rows}"]
        for number in range(arguments.rounds):
            for side, command in (("clipcid", [*clipcid, f"--work={folder / str(number)}"]), ("open_clip", loop)):
                result, seconds = run(command)
                rates.setdefault(f"{side}, loop", []).append(result["images_per_second"])
                rates.setdefault(f"{side}, whole command", []).append(result["images"] / seconds)
        difference = compare(next((folder / "0" / "embeddings").iterdir()), rows)
    for name, values in rates.items():
        print(f"{name:>26}: {median(values):7.1f} images/s ({min(values):.1f} … {max(values):.1f})")
    for part in ("loop", "whole command"):
        ratio = median(rates[f"clipcid, {part}"]) / median(rates[f"open_clip, {part}"])
        print(f"{part}: clipcid is {ratio:.2f} times as fast")
    print(f"largest difference of a number in a row: {difference:.1e}")
    if difference > TOLERANCE:
        raise SystemExit(f"The rows of the two sides differ by up to {difference:.1e}; {TOLERANCE:.1e} is allowed.")


def run(command: list[str]) -> tuple[dict[str, Any], float]:
    """Run one side; its JSON and seconds from start to exit."""
    started = time.perf_counter()
    done = subprocess.run(
        command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout), seconds


def run_loop(arguments: argparse.Namespace) -> None:
    """Embed with open_clip and webdataset alone; print images and images a second, and write keys and rows."""
    import open_clip
    import torch
    import webdataset

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{arguments.model}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{arguments.model}")
    model.eval()
    shards = [str(path) for path in sorted(arguments.data.glob("*.tar"))]
    pipeline = (
        webdataset.WebDataset(shards, shardshuffle=False)
        .decode("pil")
        .rename(image="jpg;png;jpeg;webp", text="txt")
        .map_dict(image=preprocess, text=lambda text: tokenizer(text)[0])
        .to_tuple("__key__", "image", "text")
        .batched(arguments.batch_size)
    )
    keys, images, texts = list[str](), list[Any](), list[Any]()
    started = time.perf_counter()
    loader = torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=arguments.workers)
    with torch.inference_mode():
        for names, pixels, tokens in loader:
            keys.extend(names)
            images.append(model.encode_image(pixels, normalize=True).half().numpy())
            texts.append(model.encode_text(tokens, normalize=True).half().numpy())
    seconds = time.perf_counter() - started
    np.savez(arguments.loop, keys=keys, images=np.concatenate(images), texts=np.concatenate(texts))
    print(json.dumps({"images": len(keys), "images_per_second": len(keys) / seconds}))


def compare(embeddings: Path, rows: Path) -> float:
    """Return the largest difference between the rows of both sides, which are matched by key."""
    theirs = np.load(rows)
    order = {key: row for row, key in enumerate(theirs["keys"].tolist())}
    largest, matched = 0.0, 0
    for table in sorted((embeddings / "metadata").glob("*.parquet")):
        number = table.stem.rpartition("_")[2]
        places = [order[key] for key in pq.read_table(table)["key"].to_pylist()]
        matched += len(places)
        for part, name in (("img_emb", "images"), ("text_emb", "texts")):
            own = np.load(embeddings / part / f"{part}_{number}.npy").astype(np.float32)
            largest = max(largest, float(np.abs(own - theirs[name][places].astype(np.float32)).max()))
    if matched != len(order):
        raise SystemExit(f"clipcid embedded {matched:,} images, the loop of open_clip {len(order):,}.")
    return largest


if __name__ == "__main__":
    main()
