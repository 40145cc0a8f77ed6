"""The report of a training run."""

from __future__ import annotations

import re

from clipcid_cli.steps.distill.report import draw_recalls


def test_the_axis_of_recalls_ends_near_the_highest() -> None:
    results = [{"step": 100 * part, "image_retrieval_recall@1": 0.005 * part} for part in (1, 2, 3, 4)]
    # In percent; steps are whole numbers.
    ticks = [float(text) for text in re.findall(r">(\d\.\d+)</text>", draw_recalls(results))]
    assert 1.5 <= max(ticks) <= 2.5
