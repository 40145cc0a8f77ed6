"""What names and addresses become in a report, and what its page is allowed."""

from __future__ import annotations

import html
from typing import Any

import pytest

from clipcid_cli.formats.report import render_report

NAME = "https://ann:pw@host/\x1b[31m\u202e<b>"
SHOWN = html.escape(r"https://REDACTED@host/\x1b[31m\u202e<b>")
DETAIL: dict[str, Any] = {
    "model": NAME,
    "dataset": NAME,
    "prompts": {},
    "measure": "recall",
    "worst": [],
    "wrong": {NAME: [{"key": NAME, "source": "", "predicted": NAME}]},
    "right": [],
    "classes": [],
    "settings": {NAME: NAME},
}
EVALUATION = {"tables": [], "details": [DETAIL]}
TRAINING = {
    **dict.fromkeys(("name", "losses", "loss_figure", "rate_figure", "scale_figure"), NAME),
    **dict.fromkeys(("steps", "batch_size", "training", "held_out"), 1),
    **dict.fromkeys(("headline", "recall_figure", "named_figure", "compared", "examples"), ()),
    "student": {"spec": NAME, "parameters": 1},
    "inputs": [(NAME, NAME)],
    "settings": {NAME: NAME},
}


@pytest.mark.parametrize(
    ("template", "context", "count"), [("eval_zeroshot.html", EVALUATION, 8), ("distill.html", TRAINING, 11)]
)
def test_names_in_a_report_are_text(template: str, context: dict[str, Any], count: int) -> None:
    page = render_report(template, **context).replace("/<wbr>", "/")
    assert page.count(SHOWN) == count
    assert "".join(page.split()).isprintable()
    assert "ann" not in page.replace("annot", "")
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'; img-src data:"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in page
