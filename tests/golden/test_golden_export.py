"""Export: what all forms of the trained teacher reach. tests/cli/ has what each computes."""

from __future__ import annotations

from pathlib import Path

from golden import ask, check, make_place, plain


def test_the_answer(tmp_path: Path) -> None:
    """All forms at once, into one folder."""
    place = make_place(tmp_path)
    forms = [word for form in ("open-clip", "hf", "onnx") for word in ("--format", form)]
    checked = ("--data", "data/classification", "--classnames", "data/classification", "--check-images", 200)
    quantized = ("--quantize", "int8", "--max-accuracy-drop", 0.05)
    answer = ask(place, "export", "teacher", *forms, *checked, *quantized, "--out", "out", "--work", "work")
    int8 = answer["parity"]["onnx-int8"]
    assert int8["zeroshot"]["drop"] <= 0.05
    assert min(int8["image"]["min_cosine"], int8["text"]["min_cosine"]) >= 0.99
    parity = {form: sorted(found) for form, found in answer["parity"].items()}
    check("export", {"json": plain(answer) | {"parity": parity}})
