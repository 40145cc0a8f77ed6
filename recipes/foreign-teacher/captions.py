"""Give photographs that lie in one folder per class a caption each: the class name through a template.

    python captions.py PHOTOS LIST.csv

Such captions say no more than the class; they are for data sets that have no others. The templates take turns.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

TEMPLATES = ("a photo of a {}.", "a {}.", "a picture that shows a {}.", "a close photo of one {}.")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def main(photos: Path, out: Path) -> None:
    """Write the list: path, caption and key of each photograph."""
    found = sorted(path for path in photos.glob("*/**/*") if path.suffix.lower() in SUFFIXES)
    if not found:
        sys.exit(f"{photos} holds no folders of images, one for each class.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("filepath", "title", "key"))
        for number, path in enumerate(found):
            inside = path.relative_to(photos)
            name = inside.parts[0].replace("_", " ")
            writer.writerow((path, TEMPLATES[number % len(TEMPLATES)].format(name), inside.with_suffix("").as_posix()))
    print(f"{len(found)} photographs, captions in {out}", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
