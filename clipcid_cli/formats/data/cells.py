"""What the cells of a list may name: someone else may have written them.

A list on this disk is trusted with the whole disk and the web; one from elsewhere with nothing but its own folder and the
web. `Origin` says what of the web.
"""

from __future__ import annotations

import dataclasses
import os
import re
from functools import cached_property
from urllib.parse import unquote

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.addresses import (
    WEB_SCHEMES,
    is_chain,
    is_remote,
    is_url,
    scheme_of,
    strip_file_scheme,
    without_query,
)

_SEPARATOR = re.compile(r"[/\\]")
_CONTROL = re.compile(r"[\x00-\x1f]")  # of which some are dropped where addresses are read, so that `.\t.` means `..`
_MOST_QUOTED = 3  # times that `%25` may stand for `%`


@dataclasses.dataclass(frozen=True)
class Origin:
    """The list or folder that names images, which decides what a name may be.

    A list on this disk may name any file of the disk, also by `..`, and any web address but a link-local one. A list from
    elsewhere may name what is beside it, and web addresses that are no nearer to this machine than the list itself (see
    `web.network_of_list`). Either may name addresses of other schemes where the user allows these. A folder names files.
    """

    source: str  # a path, a URL, or a ``pipe:`` command whose output it is
    schemes: frozenset[str] = frozenset()  # of the URLs that may be named
    root: str | None = None  # the local folder that the user said relative names are relative to

    @cached_property
    def url(self) -> str | None:
        """Where the list came from; None where it was on a disk."""
        return self.source if is_remote(self.source) else None

    @cached_property
    def folder(self) -> str:
        """What relative names are relative to."""
        if self.root is not None:
            return self.root
        return without_query(self.source).rpartition("/")[0] if self.url else os.path.dirname(self.source)

    def locate(self, cell: str) -> str:
        """Return the path or URL that a cell names; a ClipcidError where it may not name it."""
        if self.is_plain(cell):
            return os.path.join(self.folder, cell)
        name = strip_file_scheme(cell)
        if is_url(name):
            path = name
        elif self.url is None:
            path = os.path.join(self.folder, name)
        elif self._is_beside(f"{self.folder}/{name}") and name == cell:
            path = f"{self.folder}/{name}"
        else:
            raise ClipcidError(
                f"List {self.source} names {cell!r}, and a list that is not on this disk may name no file on it.",
                "Name images by http(s) addresses, or relative to the list; or copy the list to a local folder.",
            )
        problem = self.why_refused(path)
        if problem:
            raise ClipcidError(f"List {self.source} names {cell!r}{problem}", self._fix(path))
        return path

    def _is_beside(self, path: str) -> bool:
        """Tell whether a path or URL is below the folder that a list from elsewhere names images by."""
        has_folder = is_url(self.folder) or self.root is not None
        return has_folder and path.startswith(f"{self.folder}/") and _stays_below(path.removeprefix(f"{self.folder}/"))

    def is_plain(self, cell: str) -> bool:
        """Tell whether a cell, or each of several in one text, is a local path beyond question, as most are."""
        return self.url is None and "://" not in cell

    def why_refused(self, path: str) -> str:
        """Say why what a name led to is not opened, as the end of a sentence; empty where it is."""
        if not is_url(path):
            return "" if self.url is None or self._is_beside(path) else ", a file on this disk."
        if is_chain(path):
            return ", which holds `::`: file systems read one through the other."
        if scheme_of(path) in self.schemes or (self.url is not None and self._is_beside(path)):
            return ""
        return f": the scheme {scheme_of(path)} is not read from lists."

    def _fix(self, path: str) -> str:
        if is_chain(path):
            return "Name images by http(s) addresses, or by files beside the list."
        return f"If you trust the list, allow it: --allow-scheme {scheme_of(path)}"


def _stays_below(name: str) -> bool:
    """Tell whether a name leads to no place outside its folder, however servers and file systems read it."""
    for _ in range(_MOST_QUOTED):
        name = unquote(name)
    if _CONTROL.search(name) or name != unquote(name):
        return False
    return name[:1] not in ("/", "\\", "~") and ".." not in _SEPARATOR.split(name)


def origin_of_list(source: str, allowed: tuple[str, ...], root: str | None = None) -> Origin:
    """Return the origin of what a list names, where the user allowed schemes beside http and https."""
    return Origin(source, WEB_SCHEMES | frozenset(allowed), root)
