"""Secrets of addresses and commands are not shown, and control characters are shown as text."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipcid_cli.errors import ClipcidError
from clipcid_cli.shown import REDACTED, is_redacted, plain, redact, visible

R = REDACTED
SECRET = {
    "https://ann:pw@host/a.tar": f"https://{R}@host/a.tar",
    "https://ghp_token@host/{0..1}.tar": f"https://{R}@host/{{0..1}}.tar",
    "s3://key:secret@bucket/x": f"s3://{R}@bucket/x",
    "https://ann:p@ss@host/x?y=a@b": f"https://{R}@host/x?y=a@b",
    "https://b.s3.amazonaws.com/0.tar?X-Amz-Date=2&X-Amz-Signature=a%2Fb&versionId=3": (
        f"https://b.s3.amazonaws.com/0.tar?X-Amz-Date={R}&X-Amz-Signature={R}&versionId=3"
    ),
    "https://h/a.tar?sv=20&sig=ab%3D::https://h/b.tar?part=1&token=q": (
        f"https://h/a.tar?sv=20&sig={R}::https://h/b.tar?part=1&token={R}"
    ),
    "See (https://h/a.tar?token=abc); it is gone.": f"See (https://h/a.tar?token={R}); it is gone.",
    "https://h/get?key=AIzaSy": f"https://h/get?key={R}",
    'pipe:curl -H "Authorization: Bearer abc" x/{0..3}.tar': f'pipe:curl -H "Authorization: {R}" x/{{0..3}}.tar',
    r"pipe:curl -H Authorization:\ Bearer\ abc x/0.tar": f"pipe:curl -H Authorization:{R} x/0.tar",
    """embed 'pipe:curl -H '"'"'X-Api-Key: abc'"'"' x' --model m""": (
        f"""embed 'pipe:curl -H '"'"'X-Api-Key: {R}'"'"' x' --model m"""
    ),
    "pipe:curl --header='PRIVATE-TOKEN: abc' x": f"pipe:curl --header='PRIVATE-TOKEN: {R}' x",
    "pipe:curl -u ann:pw x": f"pipe:curl -u {R} x",
    "pipe:curl -b 'a=b' x": f"pipe:curl -b {R} x",
    "pipe:curl -d 'a=1&token=abc&b=2' x": f"pipe:curl -d 'a=1&token={R}&b=2' x",
    "pipe:wget --http-password=pw -O- x": f"pipe:wget --http-password={R} -O- x",
    "pipe:AWS_SECRET_ACCESS_KEY=abc aws s3 ls": f"pipe:AWS_SECRET_ACCESS_KEY={R} aws s3 ls",
    "pipe:curl 'https://h/x?X-Amz-Signature=abc' | cat": f"pipe:curl 'https://h/x?X-Amz-Signature={R}' | cat",
}
OPEN = (
    "/data/token=abc/{00000..00099}.tar",
    "abfs://container@account.dfs.core.windows.net/x",
    "hf://datasets/org/name@main/x",
    "https://h/get?key=a/00000.tar&part=1",
    'pipe:curl -H "Authorization: Bearer $TOKEN" https://h/0.tar',
    "pipe:aws s3 cp s3://bucket/{00000..00099}.tar -",
    "pipe:cat '/a/token=abc/{00000..00005}.tar'",
    "pipe:python -u fetch.py",
)


@pytest.mark.parametrize(("text", "expected"), SECRET.items())
def test_what_is_secret_is_not_shown(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected
    error = ClipcidError(f"{text} is gone", text)
    assert (error.message, error.fix, str(error)) == (
        f"{expected} is gone",
        expected,
        f"{expected} is gone\n{expected}",
    )
    assert is_redacted(expected) or "://" not in text


@pytest.mark.parametrize("text", OPEN)
def test_other_data_is_shown_as_it_was_typed(text: str) -> None:
    assert redact(text) == text
    assert not is_redacted(text)


@given(st.text())
def test_no_control_character_is_left(text: str) -> None:
    shown = visible(text)
    controls = {*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), *"\u061c\u200e\u200f\u202a\u202e\u2066\u2069"}
    assert not set(shown) & (controls - {"\t", "\n"})
    assert visible(shown) == shown


def test_control_characters_are_shown_as_text() -> None:
    title = "\x1b]0;owned\x07"
    assert plain(f"{title} a\rb\x9b2J \u202egpj.exe\u2069") == r"\x1b]0;owned\x07 a\x0db\x9b2J \u202egpj.exe\u2069"
    assert plain("日本の秋 😍 👩\u200d🚀\tcafé\n") == "日本の秋 😍 👩\u200d🚀\tcafé\n"


@pytest.mark.parametrize(
    "part", ["a+", "A", "@", "&a", "token", "token=.", "://", "https://x:", "'token", '-u "', "x-key-", "q-"]
)
def test_a_name_of_any_length_is_shown_at_once(part: str) -> None:
    name = part * (100_000 // len(part))
    for text in (f"https://h?{name}", f"pipe:{name}", f"pipe:-u ':{name}", f"{name}://"):
        started = time.process_time()
        plain(text)
        assert time.process_time() - started < 10  # a tenth of a second; a minute where a pattern tries a stretch twice
