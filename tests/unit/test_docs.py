"""The documents: every link, anchor and file name in them leads somewhere, and so does every link from the code."""

import re
from functools import cache
from pathlib import Path

import msgspec
import pytest

from clipcid_cli.algorithms.losses.registry import LOSSES, PRESETS
from clipcid_cli.formats.results import clusters, forest, keep_list, metrics
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.steps.balance.result import BalanceResult
from clipcid_cli.steps.cluster import ClusterResult
from clipcid_cli.steps.distill.result import Distilled
from clipcid_cli.steps.embed.result import EmbedPart
from clipcid_cli.steps.evaluate.probe_result import LinearResult
from clipcid_cli.steps.evaluate.result import ZeroshotResult
from clipcid_cli.steps.runs import Contents
from clipcid_cli.steps.verify import VerifyResult

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        *(ROOT / ".github").rglob("*.md"),
        *(ROOT / "clipcid_cli").rglob("*.md"),
        *(path for path in (ROOT / "recipes").rglob("*.md") if "work" not in path.parts),
    ]
)
SOURCES = sorted([*(ROOT / "clipcid_cli").rglob("*.py"), *(ROOT / "tests").rglob("*.py")])
# Where the documents mean a path of this repository by these beginnings.
TOP = ("clipcid_cli/", "recipes/", "tests/", ".ci/", ".github/")
ROOMS = ("commands/", "steps/", "algorithms/", "training/", "runtime/", "formats/", "docs/")

_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HTML_LINK = re.compile(r"<(?:img|a|source)\b[^>]*?\b(?:src|href|srcset)=\"([^\"]+)\"")
_PATH = re.compile(r"`([\w.-]+(?:/[\w.-]+)*(?:/|\.(?:py|sh|md|html|toml|json)))`")


def prose_of(path: Path) -> str:
    """The text without fenced blocks."""
    return _FENCE.sub("", path.read_text(encoding="utf-8"))


@cache
def anchors_of(path: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose_of(path), flags=re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        numbered = (f"{slug}-{number}" for number in range(1, 99))
        anchors.add(slug if slug not in anchors else next(name for name in numbered if name not in anchors))
    return anchors


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(path: Path) -> None:
    text = prose_of(path)
    for target in _LINK.findall(text) + _HTML_LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.is_relative_to(ROOT), target
        assert file.exists(), target
        assert not anchor or anchor in anchors_of(file), target


def test_every_link_from_the_code_leads_to_a_heading_of_the_documents() -> None:
    links = {
        (str(source.relative_to(ROOT)), link)
        for source in SOURCES
        for link in re.findall(r"\bdocs/[\w.-]+\.md(?:#[\w-]+)?", source.read_text(encoding="utf-8"))
    }
    assert len({source for source, link in links if link.startswith("docs/method.md#")}) >= 20
    for source, link in sorted(links):
        name, _, anchor = link.partition("#")
        path = ROOT / "clipcid_cli" / name
        assert path.is_file(), f"{source}: {link}"
        assert not anchor or anchor in anchors_of(path), f"{source}: {link}"


def test_every_file_of_the_repository_that_a_document_names_exists() -> None:
    documents = [path for path in DOCUMENTS if path.name != "CHANGELOG.md" and "recipes" not in path.parts]
    for document in documents:
        for name in _PATH.findall(prose_of(document)):
            if name.startswith((*TOP, *ROOMS)):
                root = ROOT if name.startswith(TOP) else ROOT / "clipcid_cli"
                assert (root / name).exists(), f"{document}: {name}"


def test_every_name_that_the_map_places_in_a_file_is_defined_there() -> None:
    page = " ".join(prose_of(ROOT / "clipcid_cli" / "README.md").split())
    places = re.findall(r"`(\w+)(?:\(…\))?` (?:in|of) `([\w./-]+\.py)`", page)
    assert len(places) >= 10
    for name, file in places:
        path = ROOT / file if file.startswith(TOP) else ROOT / "clipcid_cli" / file
        definition = re.compile(rf"^ *(def|class) {name}\b|^{name}\b.* = ", re.MULTILINE)
        assert definition.search(path.read_text(encoding="utf-8")), f"{name} is not in {file}"


def test_the_method_defines_every_loss_and_every_preset() -> None:
    method = (ROOT / "clipcid_cli" / "docs" / "method.md").read_text(encoding="utf-8")
    for name in (*LOSSES, *PRESETS):
        assert f"`{name}`" in method or f"preset {name}" in method, name


FILES_PAGE = (ROOT / "clipcid_cli" / "docs" / "files.md").read_text(encoding="utf-8")


def columns_under(heading: str) -> list[str]:
    """The names in the first column of the table below a heading of docs/files.md, in order."""
    section = re.split(r"^#+ ", FILES_PAGE.partition(f"\n## {heading}\n")[2], flags=re.MULTILINE)[0]
    cells = re.findall(r"^\| (`.+?`) \|", section, flags=re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_the_documented_columns_are_those_that_are_written() -> None:
    assert columns_under("Keep list") == keep_list._SCHEMA.names
    assert columns_under("Sets") == forest._SETS.names
    assert columns_under("Clusters") == clusters._SCHEMA.names
    assert columns_under("Metrics") == list(metrics.Metrics.__struct_fields__)
    predictions = {"classification": "classification", "several classes": "multilabel"}
    predictions |= {"retrieval": "retrieval", "associations": "association"}
    for row, kind in predictions.items():
        (line,) = re.findall(rf"^\| {row} \| (`key`.*) \|$", FILES_PAGE, flags=re.MULTILINE)
        columns = ["key", *metrics._COLUMNS[kind]]
        assert list(dict.fromkeys(name for name in re.findall(r"`(\w+)`", line) if name in columns)) == columns, row


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("embed", EmbedPart),
        ("balance", BalanceResult),
        ("cluster", ClusterResult),
        ("distill", Distilled),
        ("eval-zeroshot", ZeroshotResult),
        ("eval-linear", LinearResult),
        ("runs", Contents),
        ("verify", VerifyResult),
    ],
)
def test_every_field_of_an_answer_is_documented(command: str, answer: type[msgspec.Struct]) -> None:
    page = (ROOT / "clipcid_cli" / "docs" / "cli.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `{command}` \| (.*) \|$", page, flags=re.MULTILINE)
    if answer is LinearResult:
        row += " ".join(metrics.Metrics.__struct_fields__)  # CLIP_benchmark's, in the row above
    named = re.sub(r"\{[^}]*\}", "", row)  # without the fields of a field
    assert [field for field in answer.__struct_fields__ if not re.search(rf"(?<![-\w]){field}\b", named)] == []


def test_every_folder_of_the_work_directory_is_documented() -> None:
    work = WorkDirectory(Path("work"))
    named = [place for name, place in vars(work).items() if name != "path"]
    places = [*named, work.embeddings("m"), work.distill("n"), work.export("n")]
    tree = FILES_PAGE.partition("clipcid-work/\n")[2].partition("\n\n")[0]
    for place in places:
        assert re.search(rf"^ +{re.escape(place.relative_to('work').parts[0])}[/ ]", tree, flags=re.MULTILINE), place


def test_the_list_of_changes_says_nothing_twice() -> None:
    lines = [line.strip() for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()]
    long = [line for line in lines if len(line) > 30]  # others may be headings and ends of sentences
    assert [line for line in long if long.count(line) > 1] == []


def test_pictures_are_small_and_fetch_nothing() -> None:
    pictures = sorted((ROOT / "clipcid_cli" / "docs" / "images").iterdir())
    assert pictures
    for picture in pictures:
        assert picture.stat().st_size < 150_000, picture
        fetched = r"url\([\"']?http|href=[\"']http|<script"
        assert picture.suffix != ".svg" or not re.search(fetched, picture.read_text(encoding="utf-8")), picture
