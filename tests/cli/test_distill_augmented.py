"""Views, text variants and texts without images from the command line: embedded, shown in training, and after a kill."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

from conftest import Run, make_caption, start_clipcid
from distill_data import SHORT, STUDENT, losses, student_bytes

Clipcid = Callable[..., Run]


def test_what_the_teacher_embedded_is_shown_and_a_killed_run_goes_on(
    clipcid: Clipcid, binary: Clipcid, tiny_shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "student.json").write_text(json.dumps(STUDENT))
    (tmp_path / "lines.txt").write_text("\n\n".join(make_caption(number) for number in range(500, 512)))
    model = ("--model", tiny_model, "--workers", 0)
    beside = ("--views", 3, "--view-kind", "strong", "--view-kind", "mix,crop", "--text-variants", 2)
    made = clipcid("embed", tiny_shards, *model, *beside, "--json")
    said = " ".join(made.stderr.split())
    assert "Of each image 3 views (strong, mix, crop; mixtures within batches of 16 images) and 2 text variants" in said
    folder = tmp_path / made.json["files"]["embeddings"]
    kinds = {path.name for path in folder.glob("*_*") if path.is_dir()}
    assert kinds == {"img_emb", "text_emb", "view_emb", "view_params", "variant_emb"}
    texts = clipcid("embed", "--texts", "lines.txt", "--out", "texts", *model, "--json").json
    assert (texts["texts"], texts["skipped"], texts["files"]["texts"]) == (12, {"empty_line": 11}, "texts")
    arguments = ("distill", *SHORT, "--preset", "fd-instance")
    lines = " ".join(binary(*arguments, "--texts", "texts", "--steps", 2, "--name", "lines").stderr.split())
    assert "Views: 3 of each image are stored and replayed" in lines
    assert "Extra texts, for the text tower alone: of texts, 12 texts." in lines
    assert "Each step the text tower sees 8 further texts." in lines, "as many as samples"
    # The further texts are variants now: they depend on which shards a batch reads.
    arguments += ("--steps", 20, "--checkpoint-every", 2)
    assert "of the 2 variants of each sample's captions" in " ".join(
        clipcid(*arguments, "--name", "whole").stderr.split()
    )
    runs = tmp_path / "clipcid-work" / "distill"
    process = start_clipcid(*arguments, "--name", "killed", cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list((runs / "killed" / "checkpoints").glob("step_*.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (runs / "killed" / "distill.json").exists(), "it was too fast to be killed"
    assert "Resuming at step" in clipcid(*arguments, "--name", "killed").stderr
    assert losses(runs / "killed") == losses(runs / "whole")
    assert losses(runs / "whole")[0]["scale_student"] != losses(runs / "whole")[-1]["scale_student"], "it is trained"
    assert student_bytes(runs / "killed") == student_bytes(runs / "whole")
    assert losses(runs / "lines")[0]["loss_fd"] != losses(runs / "whole")[0]["loss_fd"], "they were shown other texts"
