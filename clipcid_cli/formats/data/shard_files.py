"""The files of shards that data names: a tar or parquet file, a folder of them, a pattern, or several of these."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.addresses import is_pipe, is_remote, is_url, strip_file_scheme, without_query
from clipcid_cli.formats.data.samples import natural_key
from clipcid_cli.formats.files import LARGEST_TEXT, read_regular, reading
from clipcid_cli.shown import redact

FORMS = (
    "Give a folder of .tar shards or of parquet files with images, one such file, a pattern such as "
    "data/{00000..00099}.tar, a folder of images, or a csv, tsv or parquet list."
)
"""What a user can give as data."""

SEPARATOR = "::"
"""Between several folders, tars or patterns, as webdataset writes them."""

SHARD_SUFFIXES = (".tar", ".parquet")
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_SPLIT = re.compile(r"(.+)-\d+-of-(\d+).*[.]parquet$")  # as ``datasets`` names files

NUM_SHARDS = "nshards.txt"
"""File of CLIP_benchmark's in the folder of a split."""
_NUMBER = re.compile("0|[1-9][0-9]{0,8}")  # of shards, or of one in its file's name


def find_files(spec: str) -> list[str] | None:
    """List the tars or parquet files that `spec` refers to, in natural order; None for a folder without any."""
    if os.path.isfile(spec):
        return [spec]
    files = _find_matches(spec) if _is_pattern(spec) else _find_named(spec)
    return sorted(files, key=natural_key) or None


def _find_named(spec: str) -> list[str]:
    """List the files of one name, which is no pattern; none for a folder without any."""
    if is_pipe(spec):
        files = [spec]
    elif is_url(spec):
        files = _find_behind_url(spec)
    elif os.path.isdir(spec):
        files = _list_folder(spec)
    else:
        files = glob.glob(spec)
        if not files:
            raise ClipcidError(f"There is no data at {spec}.", FORMS)
    return files


def _is_pattern(spec: str) -> bool:
    """Tell whether a name holds braces or several names; a folder may be called like a pattern."""
    return (SEPARATOR in spec or "{" in spec) and (is_remote(spec) or not os.path.exists(spec))


def _find_matches(pattern: str) -> list[str]:
    from clipcid_cli.formats.data.patterns import expand

    files = list[str]()
    for part in expand(pattern):
        if is_remote(part) or os.path.isdir(part):
            # Not as a pattern again: `a{:,x}:b` makes `a::b`, whose parts nobody has looked at.
            inside = _find_named(part)
            if not inside:
                raise ClipcidError(f"{part} contains no .tar shard.", FORMS)
            files += inside
        else:
            files += glob.glob(part) or [part]  # a tar may turn out to be missing
    return files


def _find_behind_url(url: str) -> list[str]:
    if without_query(url).lower().endswith(SHARD_SUFFIXES):
        return [url]
    from clipcid_cli.formats.data.remote import list_folder

    files = _choose_form(url, list_folder(url))
    if not files:
        raise ClipcidError(
            f"{url} contains no .tar shard.", "Give a pattern such as s3://bucket/data/{00000..00099}.tar."
        )
    return files


def _list_folder(folder: str) -> list[str]:
    if is_benchmark(folder):
        return list_benchmark_tars(Path(folder))
    return _choose_form(folder, [os.path.join(folder, name) for name in os.listdir(folder) if not name.startswith(".")])


def _choose_form(folder: str, paths: list[str]) -> list[str]:
    """Return the tars of a folder, or else its parquet files: tools write these beside tars, without images."""
    tars, tables = ([path for path in paths if without_query(path).lower().endswith(form)] for form in SHARD_SUFFIXES)
    if tars:
        refuse_compressed(folder, paths)
        return tars
    _refuse_several_splits(folder, tables)
    return tables


def _refuse_several_splits(folder: str, tables: list[str]) -> None:
    matches = [_SPLIT.match(path.rpartition("/")[2]) for path in tables]
    splits = {match[1]: int(match[2]) for match in matches if match is not None}
    if len(splits) < 2:
        return
    patterns = list[str]()
    for split, count in sorted(splits.items()):
        end = f"{{00000..{count - 1:05d}}}-of-{count:05d}.parquet" if is_url(folder) else "*"
        patterns.append(f'"{folder.rstrip("/")}/{split}-{end}"')
    raise ClipcidError(f"{folder} holds several splits of a data set.", f"Give one of them: {', '.join(patterns)}.")


def refuse_compressed(folder: str, paths: list[str]) -> None:
    """Refuse a folder with compressed tars, which would be missing from the data; unpacked ones may lie beside them."""
    names = {path.rpartition("/")[2] for path in paths}
    packed = [name for name in sorted(names, key=natural_key) if name.lower().endswith(_COMPRESSED_TARS)]
    packed = [name for name in packed if f"{name[: name.lower().rindex('.t')]}.tar" not in names]
    # Tools that unpack a tar may call the folder like it.
    packed = [name for name in packed if not os.path.isdir(os.path.join(folder, name))]
    if packed:
        raise ClipcidError(
            f"{folder} contains compressed tars, from which samples cannot be read one by one: {len(packed):,}, "
            f"first {packed[0]}.",
            f"Unpack them to plain ones, for example: gunzip {folder.rstrip('/')}/{packed[0]}\n"
            f'Or name the plain ones alone, for example "{folder.rstrip("/")}/{{00000..00099}}.tar".',
        )


def is_parquet(file: str) -> bool:
    """Tell whether a file is called as parquet files are."""
    return without_query(file).lower().endswith(".parquet") and not is_pipe(file)


def is_benchmark(spec: str) -> bool:
    """Tell whether this is the folder of a split, with shards."""
    return not is_remote(spec) and Path(spec, NUM_SHARDS).is_file()


def list_benchmark_tars(folder: Path) -> list[str]:
    """List the shards of a split, all of which must be there."""
    with reading(folder / NUM_SHARDS, "a number of shards", "Fix the file."):
        text = read_regular(folder / NUM_SHARDS, LARGEST_TEXT).decode("utf-8", errors="replace").strip()
    if not _NUMBER.fullmatch(text) or int(text) == 0:
        raise ClipcidError(f"{folder / NUM_SHARDS} contains {text[:40]!r}, not a number of shards.", "Fix the file.")
    count = int(text)
    tars = (path for path in folder.glob("*.tar") if _NUMBER.fullmatch(path.stem) and path.is_file())
    numbers = {int(path.stem) for path in tars}
    missing = count - sum(index < count for index in numbers)
    if missing:
        first = next(index for index in range(count) if index not in numbers)
        raise ClipcidError(
            f"{folder} should contain {count} shards ({NUM_SHARDS}); {missing} are missing, first {first}.tar.",
            f"Copy them there, or fix {NUM_SHARDS}.",
        )
    return [str(folder / f"{index}.tar") for index in range(count)]


def split_spec(spec: str) -> list[str]:
    """Return the parts of a spec as they are opened: URLs, commands and absolute paths."""
    return [_normalize(part) for part in spec.split(SEPARATOR)]


def _normalize(spec: str) -> str:
    """Make a local path absolute."""
    spec = strip_file_scheme(spec)
    return spec if not spec or is_remote(spec) else os.path.abspath(os.path.expanduser(spec))


def name_shards(files: Sequence[str]) -> list[str]:
    """Name shards by their files, preceded by as many folders as it takes to distinguish them."""
    parts = list[list[str]]()
    for file in files:
        path = _path_in_command(redact(file)) if is_pipe(file) else redact(without_query(file))
        name = os.path.splitext(path)[0] if path.lower().endswith(SHARD_SUFFIXES) else path
        parts.append(name.split("/"))
    depth = 1
    if len(set(map(tuple, parts))) < len(files):
        raise ClipcidError("The pattern lists a shard twice.", "List each shard once.")
    while len({tuple(part[-depth:]) for part in parts}) < len(files):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _path_in_command(command: str) -> str:
    """Return the last word of a command that ends in ``.tar``, else the command without what a name cannot hold."""
    words = re.findall(r"[^\s'\"|;&<>()=]+\.tar(?![^\s'\"|;&<>()])", command, re.IGNORECASE)
    return words[-1] if words else re.sub(r"[^\w.-]+", "-", command)[-64:].strip("-.")
