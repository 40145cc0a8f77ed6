"""Settings of `export`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from clipcid_cli.errors import UsageError
from clipcid_cli.steps.settings.fields import argument, option
from clipcid_cli.steps.settings.shared import SharedSettings

FORMATS = ("open-clip", "onnx")
_WRITE = "What is written"
_CHECK = "How it is checked"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings(SharedSettings):
    """Settings of `export`."""

    model: str | None = argument(
        None, "Model to export: a folder or architecture:tag. By default the work directory's newest student."
    )
    format: tuple[str, ...] = option(
        ("open-clip",),
        "Form to write; give it several times for several. `open-clip` is a folder that open_clip loads as local-dir:DIR; "
        "`onnx` is an image and a text encoder with a dynamic batch.",
        group=_WRITE,
        choices=FORMATS,
    )
    out: Path | None = option(
        None, "Folder to write to; by default export/<model> in the work directory.", group=_WRITE, operational=True
    )
    opset: int = option(20, "Version of ONNX's operators.", group=_WRITE, minimum=18, maximum=23)
    data: str | None = option(
        None,
        "Images (and captions) to check with; by default those the work directory's embeddings were made of, else drawn "
        "patterns and shipped sentences.",
        group=_CHECK,
        operational=True,
    )
    max_difference: float | None = option(
        None,
        "Largest allowed difference of an entry of a unit row; by default 0.0001 for fp32, 0.005 for fp16, 0.02 for bf16.",
        group=_CHECK,
        minimum=0.0,
        operational=True,
    )

    def __post_init__(self) -> None:
        """Check that what was asked for goes together."""
        super().__post_init__()
        if len(set(self.format)) < len(self.format):
            raise UsageError(f"--format was given twice: {', '.join(self.format)}.", "Name each form once.")
        if "onnx" in self.format and self.precision not in ("auto", "fp32"):
            raise UsageError(
                f"--precision {self.precision} does not go with --format onnx, which is written in fp32.",
                "Export the two forms by two commands with different --out.",
            )
