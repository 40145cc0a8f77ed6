"""Samples that cannot be used: counted by reason, the first few named, an error when they are too many."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from clipcid_cli.errors import ClipcidError

# Why a sample is not used. The keys are those of the `skipped` entry of results and sidecars.
REASONS = {
    "no_image": "no image",
    "no_key": "no key",
    "no_caption": "no caption",
    "no_label": "no class",
    "duplicate_key": "key seen before in the shard",
    "not_found": "file not found",
    "http_error": "image that its server did not send",
    "unreadable_image": "unreadable image",
    "too_many_pixels": "image with too many pixels",
    "too_many_bytes": "file larger than --max-sample-bytes",
    "cut_off": "cut off by the end of its shard",
    "nan_row": "embedding that is zero or not finite",
}

# Captions that are used, though not as they are stored. The keys are those of the `captions` entry of `embed.json`.
CAPTION_CHANGES = {
    "not_utf8": "not UTF-8",
    "cut": "too long, cut",
    "several_lines": "of several lines, each taken as one caption (--caption-lines: each line of a .txt)",
    "without_image": "in a .txt beside images of other names, left out",
}

NAMED = 5
"""Samples of a reason that are named."""


@dataclasses.dataclass
class Skips:
    """Counts of unusable samples; and, of those that can be used, of missing captions by key, and of changed ones."""

    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    without: dict[str, int] = dataclasses.field(default_factory=dict)
    changed: dict[str, int] = dataclasses.field(default_factory=dict)  # by key of `CAPTION_CHANGES`
    # Key, shard and reason of each, of one shard or of data that is held in memory. Until `Shard.locate` has said them, the
    # key is a name and the shard is empty.
    listed: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @classmethod
    def of(cls, reasons: Mapping[str, str]) -> Skips:
        """Count samples of which each name has a reason."""
        skips = cls()
        for name, reason in reasons.items():
            skips.add(reason, name)
        return skips

    def add(self, reason: str, name: str) -> None:
        """Count one sample; its name is what a user would search for: its key, with the shard where that helps.

        Details may follow a reason, as in ``http_error: HTTP 403`` or ``not_found: /photos/1.jpg``; a path that ends with
        the name says nothing more.
        """
        reason, _, details = reason.partition(": ")
        assert reason in REASONS, reason
        named = f"{name} ({details})" if details and not f"/{details}".endswith(f"/{name}") else name
        self.merge(Skips({reason: 1}, {reason: [named]}, listed=[(name, "", reason)]))

    def counted(self) -> Skips:
        """Return the counts without the list of all samples, which is as long as the data."""
        return dataclasses.replace(self, listed=[])

    def miss(self, key: str, count: int = 1) -> None:
        """Count samples without a caption of this key."""
        self.without[key] = self.without.get(key, 0) + count

    def change(self, what: str, count: int = 1) -> None:
        """Count captions that are not used as they are stored."""
        assert what in CAPTION_CHANGES, what
        self.changed[what] = self.changed.get(what, 0) + count

    def merge(self, other: Skips) -> None:
        for key, count in other.without.items():
            self.miss(key, count)
        for what, count in other.changed.items():
            self.change(what, count)
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            names = self.examples.setdefault(reason, [])
            names.extend(other.examples.get(reason, [])[: NAMED - len(names)])
        self.listed.extend(other.listed)

    def describe(self) -> str:
        """Return what was skipped, one reason per line; empty when nothing was."""
        lines = []
        for reason, count in sorted(self.counts.items()):
            names = self.examples.get(reason, [])
            more = ", …" if count > len(names) else ""
            lines.append(f"  {count:,} × {REASONS[reason]}: {', '.join(names)}{more}")
        return "\n".join(lines)

    def check(self, read: int, max_bad_fraction: float, where: str, fix: str = "") -> None:
        """Raise an error when too many of the samples that were read, usable or not, are unusable.

        Args:
            max_bad_fraction: In [0, 1].
            fix: A further remedy, for the error.
        """
        if self.total <= max_bad_fraction * read:
            return
        raise ClipcidError(
            f"{self.total:,} of {read:,} samples in {where} cannot be used: {self.total / read:.1%}, "
            f"more than the allowed {max_bad_fraction:.1%}.\n{self.describe()}",
            "\n".join(filter(None, [fix, "Fix the data, or allow more with --max-bad-fraction."])),
        )
