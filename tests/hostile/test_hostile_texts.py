"""Texts from strangers, and the user's own secrets: what is printed, written and published."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import STUDENT, make_caption, make_image, shard_members, write_classified, write_tar
from hostile_files import tar_of
from hostile_place import Place
from hostile_server import serve_lies, whole
from markdown_it import MarkdownIt

_ANY = ("--max-bad-fraction", 1)
_EVIL = "\x1b]0;owned\x07\x1b[31mred\x1b[0m\x9b2J\u202egnp.\u2066x\r\x08"
_LIVE = "[click](javascript:alert(1)) <img src=x onerror=alert(2)> **bold** ![p](http://evil.test/p.png) `a` <http://evil.test>"
_SCRIPT = "</script><script>alert(3)</script>"
_SHORT = (
    "--student",
    "student.json",
    "--preset",
    "clip-kd",
    "--steps",
    "1",
    "--batch-size",
    "4",
    "--val-fraction",
    "0",
)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path / "place")
    (place.work / "student.json").write_text(json.dumps(STUDENT))
    return place


def read_pages(place: Place) -> dict[str, str]:
    """Return the reports and model cards that commands have written."""
    pages = (path for suffix in ("html", "md") for path in place.work.rglob(f"*.{suffix}"))
    return {path.name: path.read_text() for path in pages}


def test_names_of_members_do_not_reach_the_terminal(place: Place, tiny_model: Path) -> None:
    members = shard_members(0, 6)
    members += [(f"{_EVIL}.png", make_image(7)), (f"{_EVIL}.txt", _EVIL.encode()), (f"a{_EVIL}.txt", b"no image")]
    members += [(f"{_EVIL}.png", make_image(8)), (f"broken{_EVIL}.png", b"no image"), (f"broken{_EVIL}.txt", b"x")]
    path = tar_of(place.data / f"shard{_EVIL.replace('/', '')}.tar", members)
    for words in (
        ("embed", path, "--model", tiny_model, *_ANY),
        ("balance", "--keep", "0.8"),
        ("balance", "--keep", "0.5"),
    ):
        outcome = place.run(*words)
        assert not outcome.problems(), outcome
    cut = place.data / "cut.tar"
    cut.write_bytes(tar_of(place.data / "cut.tar", [(f"cut{_EVIL}.png", make_image(7))]).read_bytes()[:1600])
    sparse = tarfile.TarInfo(f"sparse{_EVIL}.png")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    tar_of(place.data / "sparse.tar", [sparse])
    for name in ("cut.tar", "sparse.tar"):
        outcome = place.run("embed", place.data / name, "--model", tiny_model, "--out", "other", *_ANY)
        assert not outcome.problems(), outcome
        assert outcome.run.returncode == 1, outcome
    for name, page in read_pages(place).items():
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page), name


def test_cells_and_classes_do_not_reach_the_terminal(place: Place, tiny_model: Path) -> None:
    evil = _EVIL.replace("\r", "")
    (place.data / "0.png").write_bytes(make_image(0))
    path = place.data / "list.tsv"
    path.write_text(f"filepath\ttitle\n0.png\t{evil}\nmissing{evil}.png\tx\ns3://{evil}/a.png\ty\n", newline="\n")
    outcome = place.run("embed", path, "--model", tiny_model, *_ANY)
    assert not outcome.problems(), outcome
    for name in ("one", f"two{evil}"):
        (place.data / "classes" / name).mkdir(parents=True)
        (place.data / "classes" / name / "1.png").write_bytes(make_image(len(name)))
    outcome = place.run("eval-zeroshot", tiny_model, place.data / "classes")
    assert not outcome.problems(), outcome
    outcome = place.run("eval-zeroshot", place.data / evil, place.data / "classes")
    assert not outcome.problems(), outcome


class _Tags(HTMLParser):
    """What of a page is alive: scripts, what is loaded or opened, and handlers."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts = 0
        self.targets: list[str] = []
        self.handlers: list[str] = []
        self.policy = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        for name, value in attrs:
            if name in ("src", "href", "action", "formaction", "data") and not (value or "").startswith(
                ("#", "data:image/")
            ):
                self.targets.append(f"{tag} {value}")
            if name.startswith("on"):
                self.handlers.append(f"{tag} {name}")
        if tag == "meta" and ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs).get("content") or ""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Place:
    """What commands publish of data, classes and a model whose names are Markdown and HTML."""
    place = Place(tmp_path_factory.mktemp("published") / "place")
    (place.work / "student.json").write_text(json.dumps(STUDENT))
    data = place.data / _LIVE.replace("/", "-")
    members = [(name, data_) for name, data_ in shard_members(0, 12, captions=False, classes=2)]
    members += [(f"{index:06d}.txt", f"{_LIVE} {_SCRIPT}".encode()) for index in range(12)]
    write_tar(data / f"{_SCRIPT.replace('/', '-')}.tar", sorted(members))
    (data / "classnames.txt").write_text(f"{_LIVE}\n{_SCRIPT} | cell\n")
    (data / "templates.txt").write_text(f"{{c}} {_SCRIPT}\n")
    model = place.data / "model [x](http:) <b>"
    shutil.copytree(tiny_model, model)
    for words in (
        ("embed", data, "--model", model, "--out", "embeddings"),
        ("balance", "--embeddings", "embeddings", "--keep", "0.8"),
        ("distill", data, "--embeddings", "embeddings", "--keep-list", "none", *_SHORT, "--name", "run"),
        ("eval-zeroshot", "clipcid-work/distill/run/student", data, "--task", "classification"),
        ("export", "clipcid-work/distill/run/student", "--format", "open-clip", "--out", "exported"),
    ):
        outcome = place.run(*words)
        assert not outcome.problems(), outcome
        assert outcome.run.returncode == 0, outcome
    return place


def test_a_model_card_has_no_links_of_strangers(published: Place) -> None:
    (card,) = published.work.rglob("README.md")
    tokens = list(_walk(MarkdownIt("commonmark", {"html": True}).enable("table").parse(card.read_text())))
    alive = [
        token.content or str(token.attrs) for token in tokens if token.type in ("html_block", "html_inline", "image")
    ]
    alive += [str(token.attrs["href"]) for token in tokens if token.type == "link_open"]
    assert not alive, card.read_text()


def _walk(tokens: object) -> Iterator[object]:
    for token in tokens or ():
        yield token
        yield from _walk(token.children)


def test_reports_run_nothing_and_load_nothing(published: Place) -> None:
    pages = {path: path.read_text() for path in published.work.rglob("*.html")}
    assert len(pages) >= 3
    for path, page in pages.items():
        tags = _Tags()
        tags.feed(page)
        assert (tags.scripts, tags.targets, tags.handlers) == (0, [], []), path


def test_reports_have_a_policy_that_forbids_to_load(published: Place) -> None:
    for path in published.work.rglob("*.html"):
        tags = _Tags()
        tags.feed(path.read_text())
        assert "default-src 'none'" in tags.policy, path
        assert "unsafe-eval" not in tags.policy, path


def test_packages_of_a_page_are_those_of_npm(place: Place, tiny_model: Path) -> None:
    """A folder of packages, or a registry, may hold others of the same names."""
    packages = place.data / "packages"
    packages.mkdir()
    for name, files in {
        "onnxruntime-web-1.30.0.tgz": ("dist/ort.wasm.bundle.min.mjs", "dist/ort-wasm-simd-threaded.wasm"),
        "huggingface-tokenizers-0.2.0.tgz": ("dist/tokenizers.min.mjs", "LICENSE"),
    }.items():
        with tarfile.open(packages / name, "w:gz") as archive:
            for file in files:
                header = tarfile.TarInfo(f"package/{file}")
                header.size = 8
                archive.addfile(header, io.BytesIO(b"alert(4)"))
    words = ("export", tiny_model, "--format", "web", "--npm-packages", packages, "--out", "exported")
    outcome = place.run(*words, seconds=120)
    assert not outcome.problems(), outcome
    foreign = [path for path in place.work.rglob("*") if path.is_file() and path.read_bytes() == b"alert(4)"]
    assert not foreign, outcome
    assert outcome.run.returncode == 1, outcome


_TOKEN, _PASSWORD, _SIGNATURE = "t0kenofmine", "passw0rdofmine", "s1gnatureofmine"


def test_secrets_of_a_command_are_not_written_down(place: Place, tiny_model: Path) -> None:
    write_tar(place.data / "0.tar", shard_members(0, 12))
    write_classified(place.data / "classified")
    command = f'cat {place.data}/0.tar; : curl -H "Authorization: Bearer {_TOKEN}"'
    data = f"pipe:{command}"
    for words in (
        ("embed", data, "--model", tiny_model),
        ("balance", "--keep", "0.8"),
        ("distill", data, "--teacher", tiny_model, *_SHORT, "--name", "run"),
        ("export", "clipcid-work/distill/run/student", "--format", "open-clip", "--out", "exported"),
        ("embed", data, "--model", tiny_model, "--keys", "shard"),
        ("embed", f"pipe:exit 3; {command}", "--model", tiny_model, "--out", "other"),
    ):
        outcome = place.run(*words, commands=[command])
        assert not outcome.problems(), outcome
        assert not place.find_secrets(outcome, [_TOKEN]), outcome


def test_secrets_of_an_address_are_not_written_down(place: Place, tiny_model: Path) -> None:
    content = write_tar(place.root / "0.tar", shard_members(0, 12)).read_bytes()
    with serve_lies() as server:
        server.answers["/0.tar"] = whole(content)
        address = f"http://me:{_PASSWORD}@{server.address}/0.tar"
        server.answers["/0.png"] = whole(make_image(3))
        cells = [f"{server.url}/{name}?X-Amz-Signature={_SIGNATURE}" for name in ("0.png", "missing.png")]
        rows = [f"{cell}\t{make_caption(1)}" for cell in cells]
        (place.data / "list.tsv").write_text("\n".join(["filepath\ttitle", *rows, ""]))
        for words in (
            ("embed", address, "--model", tiny_model),
            ("distill", address, "--teacher", tiny_model, *_SHORT, "--name", "run"),
            ("export", "clipcid-work/distill/run/student", "--format", "open-clip", "--out", "exported"),
            ("embed", address.replace("0.tar", "missing.tar"), "--model", tiny_model, "--out", "other"),
        ):
            outcome = place.run(*words, hosts=[server.address], seconds=60)
            assert not outcome.problems(), outcome
            assert not place.find_secrets(outcome, [_PASSWORD]), outcome
        outcome = place.run("embed", place.data / "list.tsv", "--model", tiny_model, *_ANY, hosts=[server.address])
    assert not outcome.problems(), outcome
    printed = {"stdout": outcome.run.stdout, "stderr": outcome.run.stderr}
    assert not [name for name, text in printed.items() if _SIGNATURE in text], outcome


def test_actions_and_indexes_are_pinned() -> None:
    """What runs with the repository's rights, and where packages come from."""
    root = Path(__file__).parents[2]
    uses = [
        line.partition("uses:")[2].split("#")[0].strip()
        for path in (root / ".github/workflows").glob("*.yml")
        for line in path.read_text().splitlines()
        if "uses:" in line
    ]
    assert uses
    assert [use for use in uses if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", use)] == []
    scripts = [
        path for folder in ("recipes", ".ci", ".github") for path in (root / folder).rglob("*") if path.is_file()
    ]
    assert [str(path) for path in scripts if "--extra-index-url" in path.read_text(errors="replace")] == []
