"""Files of models on the Hugging Face hub: fetched where it answers, else taken from the local cache; or uploaded."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub.constants as hub

from clipcid_cli.errors import ClipcidError, in_one_line
from clipcid_cli.runtime.libraries import quiet_libraries

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

_TOKEN_FIX = "Run hf auth login, or set HF_TOKEN, with a token that may write: https://huggingface.co/settings/tokens."


@contextlib.contextmanager
def reaching_hub(what: str, fix: str) -> Iterator[None]:
    """Let a library fetch from the hub; without a network, from the local cache only.

    huggingface_hub retries each file six times with growing pauses: 46 s for one model that cannot be reached.
    """
    offline = hub.HF_HUB_OFFLINE
    reachable = offline or _answers(hub.ENDPOINT)
    hub.HF_HUB_OFFLINE = offline or not reachable
    try:
        yield
    except Exception as error:  # the http client, the hub's client and open_clip each raise their own
        why = f"{hub.ENDPOINT} cannot be reached from here"
        if offline:
            why = "the hub is disabled (HF_HUB_OFFLINE)"
        elif reachable:
            why = f"{hub.ENDPOINT} did not provide them: {in_one_line(error, 200)}"
        raise ClipcidError(f"The {what} are not in the local cache, and {why}.", fix) from error
    finally:
        hub.HF_HUB_OFFLINE = offline


def _answers(url: str) -> bool:
    """Tell whether the host of `url` accepts connections; a proxy is assumed to."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme in urllib.request.getproxies():
        return True
    port = parts.port or (443 if parts.scheme == "https" else 80)
    with contextlib.suppress(OSError):
        socket.create_connection((parts.hostname, port), timeout=5.0).close()
        return True
    return False


def find_uploader(repository: str) -> str:
    """Return the account whose token this machine has, where huggingface_hub looks for it; refuse where there is none."""
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise ClipcidError(
            f"--push {repository}: there is no token of the Hugging Face hub on this machine.", _TOKEN_FIX
        )
    with _uploading(repository):
        return str(HfApi(endpoint=hub.ENDPOINT).whoami()["name"])


def upload(repository: str, folder: Path, names: Sequence[str], message: str) -> str:
    """Put files of a folder into a model repository by one commit, so that all or none arrive; return its address.

    A repository that does not exist is made, a private one. Its other files stay.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    api = HfApi(endpoint=hub.ENDPOINT)
    with _uploading(repository):
        api.create_repo(repository, private=True, exist_ok=True)
        files = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
        commit = api.create_commit(repository, files, commit_message=message)
    # The hub leaves out what a .gitignore of the repository names; a file of that name from an earlier commit stays.
    left_out = sorted(_find_unlike(api, repository, commit, files))
    if left_out:
        raise ClipcidError(
            f"--push {repository}: the hub left out {', '.join(left_out)}, which the .gitignore there may name.",
            f"Remove these from its .gitignore and run the command again; the commit is {commit.commit_url}.",
        )
    return str(commit.commit_url)


def _find_unlike(api: HfApi, repository: str, commit: CommitInfo, files: Sequence[CommitOperationAdd]) -> Iterator[str]:
    """Yield the names of files that a repository, after a commit, does not hold as they were sent."""
    try:
        with quiet_libraries():
            entries = list(api.list_repo_tree(repository, recursive=True, revision=commit.oid))
    except Exception as error:  # as in `_uploading`
        raise ClipcidError(
            f"--push {repository}: the files are committed, and {hub.ENDPOINT} did not list what has arrived: "
            f"{in_one_line(error, 300)}",
            f"See whether all have: {commit.commit_url}",
        ) from error
    there = {entry.path: entry for entry in entries}
    for file in files:
        entry = there.get(file.path_in_repo)
        if entry is None or not _is_sent(entry, file):
            yield file.path_in_repo


def _is_sent(entry: Any, file: CommitOperationAdd) -> bool:
    """Tell whether a file of a repository has the content that was sent: by its SHA-256, or as git hashes small ones."""
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == file.upload_info.sha256.hex())
    with file.as_file() as opened:
        content = opened.read()
    blob = f"blob {len(content)}\0".encode() + content
    return bool(entry.blob_id == hashlib.sha1(blob, usedforsecurity=False).hexdigest())


@contextlib.contextmanager
def _uploading(repository: str) -> Iterator[None]:
    """Say what the hub refuses, and how to be let in."""
    from huggingface_hub.errors import HfHubHTTPError

    what = f"--push {repository}: "
    later = "The same command uploads the export once that is mended; what is exported stays."
    if hub.HF_HUB_OFFLINE:
        raise ClipcidError(f"{what}the hub is disabled (HF_HUB_OFFLINE).", "Unset HF_HUB_OFFLINE, or omit --push.")
    if not _answers(hub.ENDPOINT):
        raise ClipcidError(f"{what}{hub.ENDPOINT} cannot be reached from here. Nothing was uploaded.", later)
    try:
        with quiet_libraries():
            yield
    except Exception as error:  # the http client, the hub's client and hf_xet each raise their own
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status == 401:
            raise ClipcidError(f"{what}{hub.ENDPOINT} does not know the token of this machine.", _TOKEN_FIX) from error
        if status in (403, 404):
            raise ClipcidError(
                f"{what}the token of this machine may not write there ({status}). Nothing was uploaded.",
                f"Choose a repository of yours, or a token with the right to write to this one. {later}",
            ) from error
        raise ClipcidError(
            f"{what}{hub.ENDPOINT} did not take the files, of which none was committed: {in_one_line(error, 300)}",
            later,
        ) from error
