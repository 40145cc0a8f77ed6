"""Files that are small on a disk and large in memory, or mean something else than they seem to; made at once."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_MEGABYTE = 2**20


def deflate_zeros(size: int, begin: bytes = b"") -> bytes:
    """Compress `begin` and then zeros, a thousandth of their size, in no time: compressed megabytes are repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = packer.compress(begin) + packer.flush(zlib.Z_FULL_FLUSH)
    megabyte = packer.compress(bytes(_MEGABYTE)) + packer.flush(zlib.Z_FULL_FLUSH)
    count, rest = divmod(size, _MEGABYTE)
    return head + megabyte * count + packer.compress(bytes(rest)) + packer.flush(zlib.Z_FINISH)


def zlib_zeros(size: int) -> bytes:
    """Compress zeros in the form that PNG and HTTP's "deflate" have."""
    return b"\x78\xda" + deflate_zeros(size) + struct.pack(">HH", size % 65521, 1)  # the checksum of so many zeros


def gzip_zeros(size: int, begin: bytes = b"") -> bytes:
    """Make a gzip file of zeros; its checksum is wrong, which shows only at its end."""
    return b"\x1f\x8b\x08" + bytes(6) + b"\xff" + deflate_zeros(size, begin) + struct.pack("<II", 0, size % 2**32)


def zip_file(members: dict[str, tuple[bytes, int]]) -> bytes:
    """Make a zip file, as npz files are, of deflated members: content and claimed size of each; checksums are wrong."""
    body, directory = b"", b""
    for name, (packed, size) in members.items():
        sizes = struct.pack("<III", 0, len(packed), size)
        fields = struct.pack("<HHHHH", 20, 0, 8, 0, 0)[:10]
        named = struct.pack("<HH", len(name), 0)
        directory += b"PK\x01\x02" + struct.pack("<H", 20) + fields + sizes + named
        directory += struct.pack("<HHHII", 0, 0, 0, 0, len(body)) + name.encode()
        body += b"PK\x03\x04" + fields + sizes + named + name.encode() + packed
    end = struct.pack("<HHHHIIH", 0, 0, len(members), len(members), len(directory), len(body), 0)
    return body + directory + b"PK\x05\x06" + end


def npy_header(shape: tuple[Any, ...], descr: str = "<f2") -> bytes:
    """Make the header of an npy file, whose rows may be missing."""
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def npz_bomb(rows: int, width: int) -> bytes:
    """Make DataComp's archive of embeddings that are all zero."""
    size = rows * width * 2
    header = npy_header((rows, width))
    return zip_file({"l14_img.npy": (deflate_zeros(size, header), len(header) + size)})


def png_bomb(width: int, height: int, depth: int = 16) -> bytes:
    """Make a black grey PNG."""
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    rows = height * (1 + width * depth // 8)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in ((b"IHDR", header), (b"IDAT", zlib_zeros(rows)), (b"IEND", b""))
    )


def parquet_bomb(path: Path, column: str, rows: int, size: int, *, binary: bool = False, **others: Any) -> Path:
    """Write a parquet file of `rows` equal texts of `size` bytes, of which it holds one; `others` are whole columns."""
    text = pa.array(["x" * size], pa.binary() if binary else pa.string())
    packed = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), text)
    table = pa.table({column: packed, **others})
    pq.write_table(table, path, store_schema=False, compression="zstd", dictionary_pagesize_limit=2**30)
    return path


def sparse_file(path: Path, size: int, begin: bytes = b"") -> Path:
    """Make a file that claims a size and takes a block of the disk."""
    path.write_bytes(begin)
    os.truncate(path, size)
    return path


def tar_of(path: Path, members: Iterable[tuple[str, bytes] | tarfile.TarInfo], form: int = tarfile.PAX_FORMAT) -> Path:
    """Write a tar of files and of headers as they are: links, devices, whatever they claim."""
    with tarfile.open(path, "w", format=form) as archive:
        for member in members:
            header, data = (
                (member, b"") if isinstance(member, tarfile.TarInfo) else (tarfile.TarInfo(member[0]), member[1])
            )
            if data:
                header.size = len(data)
            archive.addfile(header, io.BytesIO(data) if data else None)
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """Make the header of a link, device or FIFO."""
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    return header


def seal_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path
