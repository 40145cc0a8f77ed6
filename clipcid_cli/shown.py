"""How text is shown to people: without the secrets of addresses and commands, and with control characters as text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

REDACTED = "REDACTED"
"""What stands in place of a secret."""

# No pattern looks back far or tries a long stretch twice: names may be as long as a stranger likes.
_ADDRESS = re.compile(r"(?:\b(?:https?|ftps?))?://[^\s'\"]+")
# What stands before a server's name: name and password, or a token. In `abfs://container@account/` it is no secret.
_LOGIN = re.compile(r"(?P<before>\b(?:https?|ftps?)://)[^/?#]*@|(?P<other>://)[^/?#:@]*:[^/?#]*@")
# Names by which addresses are signed (S3, Google, Azure, CloudFront, Akamai, …). Dates change with every signature.
_SIGNATURE = r"""
    x-(?:amz|goog|oss|cos|obs|tos|ms)-[\w-]+ | awsaccesskeyid | googleaccessid | ossaccesskeyid | q-[\w-]+
    | sig | se | st | ske | skt | skoid | sktid | expires | policy | key-pair-id | hdn(?:ea|ts)
    | sign | pwd | pass | auth | jwt
    | key(?!=[^&\#]*\.[a-z]\w{1,6}(?:[&\#]|::|$))"""  # that of an object ends as a file does
# Parts of names of secrets anywhere: in a query, before `=` in a command, in a flag or a header.
_SECRET = r"token|secret|passw|signature|credential|api[_-]?key|access[_-]?key|authorization|bearer|cookie|session"
_QUERY = re.compile(
    rf"""(?P<name>[?&;](?:{_SIGNATURE} | [\w.-]{{0,64}}(?:{_SECRET})[\w.-]{{0,64}})=)
    (?:(?!::)[^&\#])+?(?=[.,:;)\]]{{0,4}}(?:[&\#]|::|$))""",
    re.IGNORECASE | re.VERBOSE,
)

_COMMAND = re.compile(r"pipe:.+", re.DOTALL)
_VALUE = r"""(?P<value>"[^"]*"|'[^']*'|(?:\\.|[^\s'"\\])+)"""
_HEADER_NAME = rf"[\w-]{{0,64}}(?:{_SECRET}|-key|-auth)[\w-]{{0,64}}"
_IN_COMMAND = (
    # A header in quotation marks, which end it, and one without.
    re.compile(rf"""(?P<name>(?P<mark>['"]){_HEADER_NAME}:\s*)(?P<value>(?:(?!(?P=mark)).)+)""", re.IGNORECASE),
    re.compile(rf"""(?P<name>(?<![\w'"-]){_HEADER_NAME}:\s*){_VALUE}""", re.IGNORECASE),
    # `--password X`, `--token=X`, `AWS_SECRET_ACCESS_KEY=X`
    re.compile(rf"(?P<name>--[\w-]{{0,64}}(?:{_SECRET})[\w-]{{0,64}}[ =]){_VALUE}", re.IGNORECASE),
    re.compile(
        rf"""(?P<name>(?<![\w$/-])\w{{0,64}}(?:{_SECRET})\w{{0,64}}=)(?P<value>"[^"]*"|'[^']*'|[^\s'"&]+)""",
        re.IGNORECASE,
    ),
    # curl's name and password, and its cookie.
    re.compile(
        r"""(?P<name>(?<!\S)(?:-u|-U|--user|--proxy-user)[ =]?)"""
        r"""(?P<value>"[^":]*:[^"]*"|'[^':]*:[^']*'|[^\s'":]+:[^\s'"]*)"""
    ),
    re.compile(rf"(?P<name>(?<!\S)-b ){_VALUE}"),
)
# A variable is no secret: the shell puts its value there when the command runs.
_VARIABLE = re.compile(r"""['"]?(?:(?:bearer|basic|token)\s+)?(?:\$\{?\w+\}?|\$\([^)]*\))['"]?""", re.IGNORECASE)

# C0 but tab and line feed, DEL, C1, and Unicode's Bidi_Control.
_CONTROLS = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for code in (
        *(code for code in range(0x20) if chr(code) not in "\t\n"),
        *range(0x7F, 0xA0),
        *(0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)),
    )
}


def plain(text: str) -> str:
    """Return a text as it may reach a terminal, a log file or a page: secrets redacted, control characters visible."""
    return redact(visible(text))  # in this order: a control character must not end an address


def visible(text: str) -> str:
    r"""Return a text with its control characters as text, ``\x1b``, so that a terminal does nothing but show it.

    Tabs and line feeds stay, which messages have.
    """
    return text if text.isprintable() else text.translate(_CONTROLS)


def redact(text: str) -> str:
    """Return a text without what is secret in its addresses and ``pipe:`` commands.

    These are names and passwords before a server's name, the values by which an address is signed, and in commands headers,
    flags and variables that are called like a secret. Equal texts stay equal, and so do addresses signed anew.
    """
    if not _may_hold_secret(text):
        return text
    text = _ADDRESS.sub(lambda address: _redact_address(address[0]), text)
    return _COMMAND.sub(lambda command: _redact_command(command[0]), text)


def redact_all(value: Any) -> Any:
    """Redact every text within JSON values."""
    # JSON escapes neither an address nor a command, and most values hold none.
    return _redact_within(value) if _may_hold_secret(json.dumps(value)) else value


def _may_hold_secret(text: str) -> bool:
    return "://" in text or "pipe:" in text


def _redact_within(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {name: _redact_within(inner) for name, inner in value.items()}
    return [_redact_within(inner) for inner in value] if isinstance(value, list | tuple) else value


def is_redacted(spec: str) -> bool:
    """Tell whether data was named by an address or a command whose secrets are not recorded: it cannot be opened."""
    return re.search(rf"://{REDACTED}@|={REDACTED}\b", spec) is not None


def _redact_address(address: str) -> str:
    address = _LOGIN.sub(lambda login: f"{login['before'] or login['other']}{REDACTED}@", address)
    return _QUERY.sub(lambda part: part["name"] + REDACTED, address)


def _redact_command(command: str) -> str:
    for pattern in _IN_COMMAND:
        command = pattern.sub(_redact_value, command)
    return command


def _redact_value(part: re.Match[str]) -> str:
    return part[0] if _VARIABLE.fullmatch(part["value"]) else part["name"] + REDACTED


def short_name(spec: str) -> str:
    """Name data or a model: a local folder by its last part, since its path means nothing on another machine."""
    return spec if ":" in spec else Path(spec).name


# What stands in titles for parts of the names that metrics have in files.
_IN_TITLES = {
    "mean_per_class_recall": "mean per class",
    "mean_average_precision": "mAP",
    "11_point": "11-point",
    "_retrieval_recall@": " R@",
    "_": " ",
}


def metric_title(name: str) -> str:
    """Write a metric's name as people read it: ``mean per class``, ``image R@5``, ``mAP 11-point``."""
    title = name.removeprefix("lp_")
    for part, words in _IN_TITLES.items():
        title = title.replace(part, words)
    return title
