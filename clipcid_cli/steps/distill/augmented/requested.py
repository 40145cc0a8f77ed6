"""Whether the teacher's embeddings hold the views and text variants that a run asks for by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.command import data_command
from clipcid_cli.formats.sidecar import EmbedSidecar
from clipcid_cli.steps.settings.distill import DistillSettings


def require_requested(
    settings: DistillSettings,
    folder: Path,
    sidecar: EmbedSidecar | None,
    *,
    views: int = 0,
    variants: int = 0,
    model: str | None = None,
) -> None:
    """Refuse embeddings without the views and text variants that were asked for.

    Args:
        folder: The embeddings.
        sidecar: Theirs; None where another tool made them, or there are none yet.
        views: Views of each image that they hold.
        variants: Text variants of each image that they hold.
        model: The teacher, where there are none yet.
    """
    missing: dict[str, dict[str, Any]] = {}
    if settings.views == "stored" and not views:
        missing["--views stored"] = {"views": 8, "view_kind": ("strong", "mix"), "fast_decode": False}
    if settings.text_variant_share and not variants:
        missing[f"--text-variant-share {settings.text_variant_share:g}"] = {"text": True, "text_variants": 8}
    if missing:
        flags = " and ".join(missing)
        more: dict[str, Any] = {name: value for fields in missing.values() for name, value in fields.items()}
        if sidecar is None:
            more |= {"work": settings.work} | ({"model": model} if model else {})
        lacking = " or ".join("views" if "views" in fields else "text variants" for fields in missing.values())
        raise ClipcidError(
            f"{flags}, but {folder} holds no {lacking}.",
            f"Omit {flags}, or run: {data_command(folder, sidecar, settings.data, **settings.data_flags, **more)}",
        )
