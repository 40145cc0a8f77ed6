"""Tars: the place of each member, read from the headers alone, so that any sample is one read away.

New tars are made of existing ones by copying members byte for byte.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Set
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.addresses import is_pipe, is_remote
from clipcid_cli.formats.data.opening import naming_shard, open_source
from clipcid_cli.formats.data.samples import MAX_SAMPLE_BYTES
from clipcid_cli.formats.data.shard_files import FORMS
from clipcid_cli.formats.files import atomic_file, open_regular

_BLOCK = tarfile.BLOCKSIZE
_READ = 2**17  # of a stream at a time
_LISTS = {".csv", ".tsv"}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}
_OCTAL = re.compile(rb"[ ]*[0-7]+[ ]*(\0.*)?", re.DOTALL)
_SIZE = re.compile(rb"\x80.*|[ ]*[0-7]*[ ]*(\0.*)?", re.DOTALL)  # GNU's binary form of a large number, or octal digits
_EXTENSIONS = b"xXgLK"  # types of headers that say more of the next member
_LARGEST_EXTENSION = 2**20  # bytes of a long name or of pax records; real ones have a few hundred
_LONGEST_NAME = 4_096  # bytes, as of a path in Linux
# A tar ends with two empty blocks and is padded to records of twenty, as tar programs write it.
_END = bytes(2 * _BLOCK)
_RECORD = 20 * _BLOCK
_COPY = 2**24  # bytes at a time

_FIX = "Make the shard again, or remove it from the data."
COPY_AGAIN = "Copy or download it again, or remove it from the data."


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int  # of its content
    size: int
    start: int  # of its headers, including those of a long name
    data: bytes | None = None  # its content, or the beginning of one that is too large, where it was read from a stream
    is_cut: bool = False  # whether the tar ends within it

    @property
    def end(self) -> int:
        """First byte after its content and padding."""
        return self.offset + -(-self.size // _BLOCK) * _BLOCK


class CutTarError(ClipcidError):
    """A tar on the disk ends too early; the samples before its end can be read."""


class _DamageError(Exception):
    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position


class _Header(tarfile.TarInfo):
    """A header that is checked before it is believed: tarfile takes a damaged one for the end of the tar."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        return cls._read(bytes(buf), encoding, errors, super().frombuf)

    @classmethod
    def _frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str, *, dircheck: bool = True) -> _Header:
        """By this Pythons since 3.13.4 read all headers, past `frombuf`."""
        read = super()._frombuf  # type: ignore[misc]  # not in its stubs
        return cls._read(bytes(buf), encoding, errors, partial(read, dircheck=dircheck))

    @classmethod
    def _read(cls, block: bytes, encoding: str, errors: str, read: Callable[[bytes, str, str], _Header]) -> _Header:
        size = block[124:136]
        checksum = block[148:156]
        if block[156:157] == tarfile.REGTYPE and _OCTAL.fullmatch(size) and _OCTAL.fullmatch(checksum):
            blank = len(checksum) * ord(" ")  # what the checksum's own field counts as
            total = sum(block.translate(None, b"\0"))  # zeros, most of a header, take two thirds of the time
            if total - sum(checksum) + blank == int(checksum.split(b"\0", 1)[0], 8):
                # tarfile would read owner, mode and dates too, and take 17 µs a member in place of 8.
                name = block[:100].split(b"\0", 1)[0].decode(encoding, errors)
                prefix = block[345:500].split(b"\0", 1)[0].decode(encoding, errors)
                header = cls(f"{prefix}/{name}" if prefix else name)
                header.size = int(size.split(b"\0", 1)[0], 8)
                return header
        header = read(block, encoding, errors)
        if not _SIZE.fullmatch(size):
            raise tarfile.HeaderError(f"{size!r} is not a size")
        if header.type in _EXTENSIONS and header.size > _LARGEST_EXTENSION:
            raise tarfile.HeaderError(f"its extended header has {header.size:,} bytes")
        return header

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        assert tar.fileobj is not None
        position = tar.fileobj.tell()
        try:
            header = super().fromtarfile(tar)
            size = header.pax_headers.get("size")
            if size is not None and not (size.isascii() and size.isdigit()):
                raise tarfile.HeaderError(f"{size[:40]!r} is not a size")
            if "\0" in header.name:
                raise tarfile.HeaderError("its pax record is broken")
            if 4 * len(header.name) > _LONGEST_NAME < (length := len(os.fsencode(header.name))):
                raise tarfile.HeaderError(f"its name has {length:,} bytes, more than {_LONGEST_NAME:,}")
        except (_DamageError, ClipcidError, OSError):
            raise
        except (tarfile.EOFHeaderError, tarfile.EmptyHeaderError):  # type: ignore[attr-defined]  # the end
            raise
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]  # not in its stubs
            raise _DamageError(position, f"there is no tar header: {error}") from error
        except Exception as error:  # what tarfile's arithmetic makes of numbers that lie
            raise _DamageError(position, str(error)) from error
        return header


def read_members(path: str | Path, max_bytes: int = MAX_SAMPLE_BYTES, *, allow_cut: bool = False) -> Iterator[Member]:
    """List the regular files of a tar, in order, from its headers; of a URL or a command, with their content.

    Understands POSIX (ustar, pax) and GNU long names, as Python, GNU tar and bsdtar write them. A header that is damaged, a
    name of more than 4,096 bytes, a member that extends beyond the end of the file and a sparse one are errors.

    Args:
        max_bytes: Of the content of a larger member no more is read.
        allow_cut: Whether a member that a local file ends within is the last one, marked so, and no CutTarError.
    """
    path = str(path)
    name = ""
    remote = is_remote(path)
    with naming_shard(path), open_source(path) as file:
        end = None if remote else os.fstat(file.fileno()).st_size
        try:
            options: Any = {"tarinfo": _Header, "encoding": "utf-8", "errors": "surrogateescape"}
            # Nothing is extracted: names of members become keys, and the path of no file.
            with tarfile.open(path, "r|" if remote else "r:", file, _READ, **options) as tar:
                while (header := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # else it keeps a kilobyte a member
                    name = header.name
                    records = header.pax_headers  # most have none
                    if header.issparse() or (records and any(key.startswith("GNU.sparse.") for key in records)):
                        raise ClipcidError(
                            f"Shard {path} holds {name} as a sparse file, whose content is stored in pieces.",
                            "Write the shard again without tar's --sparse.",
                        )
                    if not header.isreg():
                        continue
                    member = Member(name, header.offset_data, header.size, header.offset)
                    # Content is padded to whole blocks, so a tar may also be truncated within the padding.
                    if end is not None and member.end > end:
                        if allow_cut:
                            yield member._replace(is_cut=True)
                            return
                        raise CutTarError(
                            f"Shard {path} is truncated: {name} should end at byte {member.end:,}, the file has {end:,}.",
                            COPY_AGAIN,
                        )
                    content = tar.extractfile(header) if remote else None  # a stream does not come back to it
                    yield member if content is None else member._replace(data=content.read(max_bytes))
            while is_pipe(path) and file.read(_READ):  # whether a command fails is known at its end
                pass
        except _DamageError as error:
            if end is not None and error.position < end < error.position + _BLOCK:  # within a header
                if allow_cut:
                    yield Member(name, end, 0, error.position, is_cut=True)
                    return
                problem = f"Shard {path} is truncated: it ends within a header, after {name}."
                raise CutTarError(problem, COPY_AGAIN) from error
            where = f"{error.position:,}" if end is None else f"{error.position:,} of {end:,}"
            raise ClipcidError(f"Shard {path} is damaged at byte {where}: {error}.", _FIX) from error
        except tarfile.ReadError as error:
            problem = f"is truncated: it ends within {name}" if name else "is empty: 0 bytes"
            raise ClipcidError(f"Shard {path} {problem}.", _FIX) from error


def validate_tar(path: Path) -> None:
    """Check that a tar is complete by its first and last block; by all headers if it does not end with two empty blocks.

    A CutTarError where it ends too early.
    """
    with naming_shard(str(path)), open_source(str(path)) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(_BLOCK)
        file.seek(max(0, size - 2 * _BLOCK))
        tail = file.read()
    for magic, form in _COMPRESSED.items():
        if head.startswith(magic) and _LISTS & {*path.suffixes}:
            raise ClipcidError(
                f"{path} is a compressed list ({form}), which is not read.", "Unpack it, and give the list."
            )
        if head.startswith(magic):
            raise ClipcidError(
                f"Shard {path} is compressed ({form}), so samples cannot be read from it one by one.",
                "Unpack it to a plain .tar first; compression does not make images smaller.",
            )
    try:
        if any(head):
            tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if path.suffix.lower() != ".tar":  # a list of a form that is not read, or whatever else was named
            raise ClipcidError(f"{path} holds no data that can be read: it is not a tar file.", FORMS) from error
        raise ClipcidError(f"Shard {path} is not a tar file.", _FIX) from error
    if not size or size % _BLOCK or any(tail):
        for _ in read_members(path):
            pass


@dataclasses.dataclass
class Group:
    """Consecutive members of one key, as of one sample."""

    key: str
    members: dict[str, Member] = dataclasses.field(default_factory=dict)  # the first of each suffix, in their order
    again: Counter[str] = dataclasses.field(default_factory=Counter)  # how often a suffix occurs after its first
    is_cut: bool = False  # whether the tar ends within one of them

    @property
    def repeats(self) -> int:
        """How often one of the suffixes occurs again: webdataset reads no shard with such a sample."""
        return max(self.again.values(), default=0)


def group_members(members: Iterable[Member]) -> Iterator[Group]:
    """Group consecutive members of one key: names that agree up to the first dot, as in webdataset."""
    group: Group | None = None
    for member in members:
        name = split_name(member.name)
        if name is None:
            continue
        key, suffix = name
        if group is None or group.key != key:
            if group is not None:
                yield group
            group = Group(key)
        if member.is_cut:
            group.is_cut = True
        elif suffix in group.members:
            group.again[suffix] += 1
        else:
            group.members[suffix] = member
    if group is not None:
        yield group


def split_name(name: str) -> tuple[str, str] | None:
    """Return a member's key and its suffix in small letters; None where it belongs to no sample.

    As webdataset's ``base_plus_ext``, without the 0.2 s of its import, and in linear time.
    """
    if name.startswith("__") and name.partition("/")[0][2:].endswith("__"):  # reserved by webdataset
        return None
    folder, slash, file = name.rpartition("/")
    base, dot, suffix = file.partition(".")
    if not dot or not (base or (slash and "." not in folder.rpartition("/")[2])):
        return None
    return folder + slash + base, suffix.lower()


class Copied(NamedTuple):
    """How many samples a shard has, and how many of them were copied."""

    samples: int
    read: int


def count_samples(source: Path) -> int:
    """Count the samples of a tar, including those without an image and one that it ends within."""
    count = 0
    for group in group_members(read_members(source, allow_cut=True)):
        count += 1 + group.repeats
    return count


def copy_samples(source: Path, target: Path, keys: Set[str]) -> Copied:
    """Copy the samples with the given keys from one tar to another.

    Every byte of their members, headers and padding included, is the source's; nothing is decoded or renamed. Of a key or a
    member that occurs twice the first is taken, as when reading.

    Args:
        keys: Keys of samples as stored, without a shard's name.
    """
    read = 0
    copied = set[str]()
    ranges = list[tuple[int, int]]()
    for group in group_members(read_members(source, allow_cut=True)):
        read += 1 + group.repeats
        if group.is_cut or group.key not in keys or group.key in copied:
            continue
        copied.add(group.key)
        for member in group.members.values():
            start = member.start
            if ranges and ranges[-1][1] == start:  # adjacent members are copied together
                start = ranges.pop()[0]
            ranges.append((start, member.end))
    with open_regular(source) as reader, atomic_file(target) as writer:
        for start, end in ranges:
            for offset in range(start, end, _COPY):
                size = min(_COPY, end - offset)
                # The padding of the last member may be missing in a tar without an end.
                writer.write(os.pread(reader.fileno(), size, offset).ljust(size, b"\0"))
        writer.write(_END + bytes(-(writer.tell() + len(_END)) % _RECORD))
    return Copied(len(copied), read)
