"""Files of models on the Hugging Face hub: fetched where it answers, else taken from the local cache."""

from __future__ import annotations

import contextlib
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator

import huggingface_hub.constants as hub

from clipcid_cli.errors import ClipcidError, in_one_line


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
