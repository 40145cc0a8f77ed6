"""Make the pictures of the documents from what the quickstart left.

    python recipes/quickstart/pictures.py [WORK]

Needs Chromium, which takes the reports' pictures. The terminal's is drawn from what a real `clipcid balance` prints.
"""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

HERE = Path(__file__).resolve().parent
IMAGES = HERE.parents[1] / "clipcid_cli" / "docs" / "images"
COLUMNS = 80
WIDTH = 1000
# Picture → report in the work directory, and how many pixels of its top are shown.
REPORTS = {
    "balance-report.png": ("balance/report.html", 785),
    "distill-report.png": ("distill/taught/report.html", 1095),
    "evaluate-report.png": ("eval-zeroshot/report.html", 815),
}


def main() -> None:
    """Write all pictures."""
    work = Path(sys.argv[1] if len(sys.argv) > 1 else HERE / "work").resolve()
    IMAGES.mkdir(exist_ok=True)
    for name, (report, height) in REPORTS.items():
        shoot(work / report, IMAGES / name, height)
    draw_terminal(["clipcid", "balance", "--keep", "0.563"], work / "embeddings" / "teacher", IMAGES / "terminal.svg")


def shoot(page: Path, picture: Path, height: int) -> None:
    """Write the top of a page as it looks in a browser, in 128 colours."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "page.png"
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={WIDTH},{height + 200}"]
        subprocess.run(["chromium", *options, f"--screenshot={whole}", page.as_uri()], check=True, capture_output=True)
        image = Image.open(whole).convert("RGB").crop((0, 0, WIDTH, height))
    image.quantize(128, dither=Image.Dither.NONE).save(picture, optimize=True)


def draw_terminal(command: list[str], embeddings: Path, picture: Path) -> None:
    """Draw what a command prints about some embeddings, in an empty directory and a terminal of 80 columns."""
    terminal = {"COLUMNS": str(COLUMNS), "TERM": "xterm-256color", "TTY_INTERACTIVE": "0"}
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | terminal | {"CLIPCID_BALANCE_EMBEDDINGS": str(embeddings)}
        shown = run_in_terminal(command, Path(folder), environment)
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(f"$ {' '.join(command)}\n{shown}"))
    drawing = console.export_svg(title="clipcid")
    drawing = re.sub(r"@font-face\s*\{[^}]*\}\s*", "", drawing)  # which would be fetched from another site
    picture.write_text(drawing, encoding="utf-8")


def run_in_terminal(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    """Return what a command prints on a terminal, with its colours."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, COLUMNS))
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    output = b""
    with contextlib.suppress(OSError):  # as Linux says that the other end is closed
        while data := os.read(ours, 2**16):
            output += data
    os.close(ours)
    if process.wait():
        raise SystemExit(output.decode())
    return re.sub(r"\x1b\[\?25[lh]", "", output.decode().replace("\r\n", "\n"))  # the cursor, hidden and shown again


if __name__ == "__main__":
    main()
