"""What the name of a file or of data is: a local path, a URL, or a `pipe:` command. Nothing is opened here."""

from __future__ import annotations

import re

WEB_SCHEMES = frozenset({"http", "https"})
"""Schemes of what a list from anywhere may name."""

_PIPE = "pipe:"
_FILES = (".tar", ".parquet", ".csv", ".tsv")
_REMOTE = re.compile(r"[A-Za-z][\w+.-]*://|pipe:")
_SCHEME = re.compile(r"([A-Za-z][\w+.-]*)://")
_FILE = re.compile("(?:file://)+", re.IGNORECASE)
CHAIN = "::"
"""In a URL of fsspec's: one file system reads another, some by templates that are code."""


def is_url(spec: str) -> bool:
    """Tell a URL from a local path."""
    return _SCHEME.match(spec) is not None


def scheme_of(spec: str) -> str:
    """Return the scheme of a URL in lower case; empty for a local path."""
    match = _SCHEME.match(spec)
    return "" if match is None else match[1].lower()


def is_web(spec: str) -> bool:
    """Tell whether this is an http or https address."""
    return scheme_of(spec) in WEB_SCHEMES


def is_written(url: str) -> bool:
    """Tell whether objects can be written behind a URL: web servers only send, and what is on this disk is a folder."""
    return not is_web(url) and scheme_of(url) not in ("file", "local")


def strip_file_scheme(spec: str) -> str:
    """Return the path that a ``file://`` address names, whatever it looks like then; anything else as it is."""
    match = _FILE.match(spec)
    if match is None:
        return spec
    path = spec[match.end() :]
    return path if path[:1] in ("", "/", "~") else f"./{path}"


def is_chain(url: str) -> bool:
    """Tell whether fsspec would take a URL for several file systems, one within the other."""
    return CHAIN in url


def is_pipe(spec: str) -> bool:
    """Tell whether this is a ``pipe:`` command, whose output is a tar."""
    return spec.startswith(_PIPE)


def is_remote(spec: str) -> bool:
    """Tell whether this is read as a stream: a URL or a command."""
    return _REMOTE.match(spec) is not None


def without_query(spec: str) -> str:
    """Return a web address without the query that signs it, where what is before that names a file; else all of it."""
    place, _, _ = spec.partition("?")
    return place if spec.startswith(("http://", "https://")) and place.lower().endswith(_FILES) else spec


def command_of(pipe: str) -> str:
    """Return the shell command of a ``pipe:`` spec."""
    return pipe.removeprefix(_PIPE)


def server_of(url: str) -> str:
    """Return the scheme and the host of a URL."""
    return "/".join(url.split("/")[:3])
