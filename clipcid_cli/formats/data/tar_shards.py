"""Samples in tars: members that agree in their names up to the first dot, as webdataset writes them.

open     `open_tars`          wrong flags end the run
look     `find_cut`           damage of a local tar ends the run; where one is truncated, `allow_cut` decides
         `validate_shards`    no image in the first shards, or one key in two of them, ends the run
list     `read_members`       headers alone; of a stream the contents too. Damage ends the run and names the shard
place    `_read_own`          a sample's members; one that cannot be a sample is counted by its reason in `Skips`
read     `ByteRange.read`     an OSError, which `decode.read_image` turns into a reason too
decode   `decode_image`       a damaged image is a reason, never an error
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import chain, islice
from pathlib import Path

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.addresses import is_pipe, is_remote, is_url
from clipcid_cli.formats.data.captions import JSON, MOST_TEXT, TXT, gather_captions, member_of, split_captions
from clipcid_cli.formats.data.opening import naming_shard
from clipcid_cli.formats.data.samples import IMAGE_SUFFIXES, ByteRange, Sample
from clipcid_cli.formats.data.shard import Opened, ReadOptions, Shard
from clipcid_cli.formats.data.shard_files import name_shards
from clipcid_cli.formats.data.tars import (
    CutTarError,
    Group,
    Member,
    group_members,
    read_members,
    validate_tar,
)
from clipcid_cli.formats.skips import Skips

_CLASS = re.compile(rb"[+-]?[0-9]{1,9}")
_MOST_OF_CLASS = 1_024  # bytes of a ``.cls``
_OTHERS = ("cls", "npy", JSON)  # members that are read beside image and captions
_PROBED = 100  # samples of a tar behind a URL, whose places tell how many it has
_SAMPLES_OF_COMMAND = 10_000  # as img2dataset makes shards


def open_tars(files: Sequence[str], options: ReadOptions, *, is_benchmark: bool) -> Opened:
    """Open tars as shards; in CLIP_benchmark's folders each line of a ``.txt`` is a caption."""
    _validate_member_keys(options.caption_keys)
    shards = [
        TarShard(
            name,
            file,
            prefix_keys=options.prefix_keys,
            max_sample_bytes=options.max_sample_bytes,
            caption_lines=options.caption_lines or is_benchmark,
            caption_keys=options.caption_keys or (TXT,),
        )
        for name, file in zip(name_shards(files), files, strict=True)
    ]
    return Opened("benchmark" if is_benchmark else "webdataset", shards)


def _validate_member_keys(keys: Sequence[str]) -> None:
    """Refuse keys of captions whose members hold no texts."""
    for key in keys:
        if key.lower() == JSON:
            raise ClipcidError(
                "--caption-key json would take all of each .json as a caption.",
                "Name a field of the .json: --caption-key json:FIELD",
            )
        if key.lower() in (*IMAGE_SUFFIXES, "npy"):
            raise ClipcidError(
                f"--caption-key {key} names files that hold no text.", "Name those of captions, such as txt."
            )


@dataclasses.dataclass(frozen=True)
class TarShard(Shard):
    """A tar on this disk, behind a URL, or that a command writes."""

    caption_lines: bool = False  # whether each line of a ``.txt`` is a caption of its own
    caption_keys: tuple[str, ...] = (TXT,)  # where captions are: extensions of members, or fields of the json member
    is_cut: bool = False  # whether it ends too early, and the samples before the end are used

    def _read_own(self, skips: Skips) -> Iterator[Sample]:
        """Yield the samples in order; count keys without an image, that occur earlier, or with a text that is too large.

        An image that is too large is counted where images are read.
        What is behind a URL or a command is read once, and the samples come with their bytes. Of a local file only the
        headers, captions and classes are read.
        """
        seen: set[str] = set()
        texts = {*map(member_of, self.caption_keys), *_OTHERS}
        with naming_shard(self.source):
            members = read_members(self.source, self.max_sample_bytes, allow_cut=self.is_cut)
            for group in group_members(members):
                where = f"{self.name}/{group.key}"
                if group.is_cut:
                    skips.add("cut_off", where)
                    continue
                for _ in range(group.repeats):
                    skips.add("duplicate_key", where)
                image = self._find_image(group.members)
                if group.key in seen:
                    skips.add("duplicate_key", where)
                elif image is None:
                    skips.add("no_image", where)
                elif self._has_large_text(group.members, texts):
                    skips.add("too_many_bytes", where)
                else:
                    yield self._make_sample(group, image, skips)
                seen.add(group.key)

    def _find_image(self, members: Mapping[str, Member]) -> ByteRange | None:
        for suffix in IMAGE_SUFFIXES:
            if suffix in members:
                return self._place(members[suffix])
        return None

    def _has_large_text(self, members: Mapping[str, Member], texts: Set[str]) -> bool:
        for suffix, member in members.items():  # noqa: SIM110  # of every sample, and `any` takes twice the time
            if member.size > self.max_sample_bytes and suffix in texts:
                return True
        return False

    def _make_sample(self, group: Group, image: ByteRange, skips: Skips) -> Sample:
        members = group.members
        texts = list[ByteRange | None]()
        captions = list[tuple[str, ...]]()
        for key in self.caption_keys:
            text = self._place(members.get(member_of(key)), MOST_TEXT + 1)
            texts.append(text)
            captions.append(self._split(text, key, skips))
        label = self._place(members.get("cls"), _MOST_OF_CLASS)
        return Sample(
            key=group.key,
            image=image,
            captions=gather_captions(self.caption_keys, captions, skips),
            label=None if label is None else _parse_label(label.read()),
            multi_hot=self._place(members.get("npy")),
            attributes=self._place(members.get(JSON), MOST_TEXT + 1),
            # A command's output passes, so that its captions are to be kept in the index.
            captions_at=() if is_pipe(self.source) else tuple(texts),
        )

    def _place(self, member: Member | None, most: int | None = None) -> ByteRange | None:
        """Return where a member is, or its first `most` bytes."""
        if member is None:
            return None
        size = member.size if most is None else min(member.size, most)
        data = None if member.data is None or len(member.data) < size else member.data[:size]
        return ByteRange(self.source, member.offset, size, data, max_bytes=self.max_sample_bytes)

    def _split(self, text: ByteRange | None, key: str, skips: Skips | None = None) -> tuple[str, ...]:
        if text is None:
            return ()
        return split_captions(text.read(), key, a_line_each=self.caption_lines, skips=skips)

    def read_captions(self, places: Sequence[ByteRange | None]) -> tuple[str, ...]:
        try:
            captions = [self._split(text, key) for text, key in zip(places, self.caption_keys, strict=True)]
        except OSError as error:
            raise ClipcidError(
                f"The captions in {self.source} cannot be read: {error}.",
                "Put the file back, then run the same command again.",
            ) from error
        return tuple(chain.from_iterable(captions))

    def find_cut(self) -> str:
        if not is_remote(self.source):
            try:
                validate_tar(Path(self.source))
            except CutTarError as error:
                return error.message
        return ""

    def estimate_samples(self) -> int:
        if is_pipe(self.source):
            return _SAMPLES_OF_COMMAND
        if not is_url(self.source):
            groups = group_members(read_members(self.source, allow_cut=True))
            return sum(self._find_image(group.members) is not None for group in groups)
        first = list(islice(self.stream(), _PROBED))
        if len(first) < _PROBED:
            return len(first)
        bytes_read = first[-1].image.offset - first[0].image.offset
        return round(self.fingerprint().size * (_PROBED - 1) / bytes_read)


def _parse_label(text: bytes) -> int | None:
    """Return the number of a class; None where it is no number, so that evaluations leave the sample out as `no_label`."""
    text = text.strip()
    return int(text) if _CLASS.fullmatch(text) else None
