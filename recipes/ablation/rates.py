"""Try the rule of the default learning rate on students of other widths and batches: python rates.py --work DIRECTORY.

The losses of `clip-kd`, on the pairs of the ablation's drawings, for as many samples each; width, batch and rate differ.
Finished students are in rates.jsonl and are not trained again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ablation import Log, commit, machine, say
from inputs import QUICKSTART, TEACHER, clipcid, cut_sets

HERE = Path(__file__).resolve().parent
# Of both towers; the embedding is half as wide again, as the quickstart's student has it.
WIDTHS = (64, 128, 256)
BATCH_SIZES = (64, 256, 1_024)
# Times the rule without its cap.
FACTORS = (0.5, 1.0, 0.25, 2.0)
SAMPLES = 64_000
RATE_AT_64 = 6e-3
SETS = {"tuning": "tune-drawings-retrieval", "reported": "report-drawings-retrieval"}
DIRECTIONS = ("image_retrieval_recall@1", "text_retrieval_recall@1")


def trials() -> Iterator[tuple[int, int, float]]:
    """Yield width, batch size and factor: the corners first."""
    cells = [(width, batch) for width in WIDTHS for batch in BATCH_SIZES]
    cells.sort(key=lambda cell: (WIDTHS.index(cell[0]) % 2 + BATCH_SIZES.index(cell[1]) % 2, cell))
    for width, batch in cells:
        for factor in FACTORS:
            yield width, batch, factor


def write_student(folder: Path, width: int) -> Path:
    """Write the quickstart's student at another width."""
    config = json.loads((QUICKSTART / "student.json").read_text(encoding="utf-8"))
    config["embed_dim"] = width * 3 // 2
    for tower in ("vision_cfg", "text_cfg"):
        config[tower]["width"] = width
    config["text_cfg"]["heads"] = width // config["vision_cfg"]["head_width"]
    path = folder / f"student-{width}.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def train(work: Path, width: int, batch_size: int, factor: float) -> dict[str, Any]:
    """Train and measure one student."""
    rate = float(f"{factor * RATE_AT_64 * math.sqrt(batch_size / 64):.3g}")
    name = f"width{width}-batch{batch_size}-lr{rate:g}"
    steps = SAMPLES // batch_size
    result = clipcid(
        "distill", work / "pairs", "--preset", "clip-kd", "--teacher", TEACHER, "--student", write_student(work, width),
        "--keep-list", "none",
        "--lr", rate, "--steps", steps, "--batch-size", batch_size, "--val-fraction", 0, "--checkpoint-every", steps,
        "--extra-texts", 0, "--views", "none", "--work", work, "--name", name, "--overwrite",
    )  # fmt: skip
    metrics = {}
    for side, dataset in SETS.items():
        student = work / "distill" / name / "student"
        answer = clipcid(
            "eval-zeroshot",
            student,
            work / "sets" / dataset,
            "--bootstrap",
            0,
            "--work",
            work / "measured",
            "--overwrite",
        )
        metrics[side] = statistics.mean(answer["metrics"][direction] for direction in DIRECTIONS)
    return {"rate": rate, "steps": steps, "losses": result["losses"], "seconds": result["seconds"], "R@1": metrics}


def main() -> None:
    """Train what is not in the log yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--log", type=Path, default=HERE / "rates.jsonl")
    given = parser.parse_args()
    work, log = given.work.resolve(), Log(given.log)
    cut_sets(work)
    for width, batch_size, factor in trials():
        run = f"width {width}, batch {batch_size}, factor {factor:g}"
        if run in log.entries:
            continue
        entry = train(work, width, batch_size, factor)
        entry |= {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        entry |= {"commit": commit(), "machine": machine()}
        log.add({"run": run, "width": width, "batch_size": batch_size, "factor": factor} | entry)
        say(f"{run}: {entry['R@1']}")


if __name__ == "__main__":
    main()
