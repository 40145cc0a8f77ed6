"""Make the quickstart's data from three npm packages, byte for byte.

    python recipes/quickstart/build_data.py [--packages DIR] [--out DIR]

Writes ``pairs/`` (image-text shards to train on), ``classification/`` and ``retrieval/`` (CLIP_benchmark webdataset
folders to measure on). What is in them, and whose art it is, is told in ``data/README.md``.

The split is by concept: an emoji is trained on with all its drawings or held out with all of them. Genders and
directions of one person, and emoji that a vendor draws with the same pixels (Norway and Bouvet Island share a flag),
stay on one side.
"""

import argparse
import base64
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
from PIL import Image, features

HERE = Path(__file__).resolve().parent

# WebP bytes depend on the encoder, which Pillow's wheels carry inside.
PILLOW_VERSION = "13.0.0"
LIBWEBP_VERSION = "1.6.0"

# npm's own sha512 of each package, so that another file under the same name is refused.
PACKAGES = {
    "emoji-datasource-google-16.0.0": (
        "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="
    ),
    "emoji-datasource-twitter-16.0.0": (
        "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ=="
    ),
    "emojilib-4.0.3": "KbWiYre9aRSaPbHrHZIz9zmoM+21LAsK1VFJtnTh1VCtWE/rNMDviGhQTmselFl95dhqtGlY22iH0leG5BuW0g==",
}
VENDORS = ("google", "twitter")

IMAGE_SIZE = 64
WEBP_QUALITY = 80
NUM_SHARDS = 6
NUM_KEYWORDS = 4
MAX_CAPTION_WORDS = 14
# The first number at which every class has at least two held-out concepts; nothing was trained to choose it.
SPLIT_SEED = 14
HELD_OUT_ONE_IN = 5
# A flag never seen cannot be named from its picture, so few are held out and none is in the retrieval set.
HELD_OUT_FLAGS_ONE_IN = 20
MAX_TEST_CONCEPTS_PER_CLASS = 12
MAX_TRAIN_CONCEPTS_PER_CLASS = 30

SKIN_TONES = {
    "1F3FB": "light",
    "1F3FC": "medium light",
    "1F3FD": "medium",
    "1F3FE": "medium dark",
    "1F3FF": "dark",
}

CLASSES: dict[str, list[str]] = tomllib.loads((HERE / "data" / "classes.toml").read_text(encoding="utf-8"))
CLASS_OF_SUBCATEGORY = {sub: index for index, subs in enumerate(CLASSES.values()) for sub in subs}
TEMPLATES = ("{c}",)


@dataclass(frozen=True)
class Concept:
    """One base emoji: its code points in Unicode's notation, how it is called, and where Unicode files it."""

    unified: str
    name: str
    keywords: tuple[str, ...]
    category: str
    subcategory: str


@dataclass(frozen=True)
class Drawing:
    """One vendor's picture of a concept, in one skin tone or in none."""

    key: str
    vendor: str
    concept: Concept
    unified: str
    skin_tone: str | None
    webp: bytes
    pixels: bytes  # digest of the RGB pixels before WebP

    def json(self) -> bytes:
        """The sample's attributes, one compact line of UTF-8."""
        concept = self.concept
        attributes = {
            "vendor": self.vendor,
            "base": concept.unified,
            "unified": self.unified,
            "name": concept.name,
            "category": concept.category,
            "subcategory": concept.subcategory,
            "skin_tone": self.skin_tone,
        }
        return json.dumps(attributes, ensure_ascii=False, separators=(",", ":")).encode()


def stable_number(text: str) -> int:
    """A 64-bit number that depends on the text alone, for splits and orders that never change."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def fetch_packages(folder: Path) -> None:
    """Download the packages from the npm registry into the folder, those already there excepted."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        if (folder / f"{package}.tgz").exists():
            continue
        name, _, version = package.rpartition("-")
        command = ["npm", "pack", "--silent", f"{name}@{version}", "--pack-destination", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise SystemExit(
                "npm is not installed: install Node.js, or give --packages a folder of the .tgz files"
            ) from None
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"'{' '.join(command)}' failed: {error.stderr.strip()}") from None


def read_package(folder: Path, package: str, wanted: re.Pattern[str]) -> dict[str, bytes]:
    """Files of a checked .tgz whose path inside it matches, by that path."""
    path = folder / f"{package}.tgz"
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != PACKAGES[package]:
        raise SystemExit(f"{path} is not the published package: its sha512 is {digest}, not {PACKAGES[package]}")
    files = {}
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member) if wanted.fullmatch(member.name) else None
            if content is not None:
                files[member.name] = content.read()
    return files


def to_text(code: str) -> str:
    """The characters of a code such as ``1F468-200D-1F33E``."""
    return "".join(chr(int(point, 16)) for point in code.split("-"))


def read_words(entry: Mapping[str, Any], library: Mapping[str, Sequence[str]]) -> tuple[str, tuple[str, ...]]:
    """Name and keywords of an emoji: Unicode's short name as emojilib spells it, its keywords and Slack's names."""
    words = library[to_text(entry["unified"])]
    name = words[0].replace("_", " ").strip()
    # emojilib writes "woman_s_hat" and "one_o_clock".
    name = re.sub(r"(?<=man|men|ker) s\b", "'s", name).replace("o clock", "o'clock")
    if name == "keycap":  # emojilib calls both * and # so
        name = entry["name"].lower()
    if entry["subcategory"] in ("country-flag", "subdivision-flag"):
        name = re.sub(r"^flag (.+)$", r"flag of \1", name)
    keywords = []
    for keyword in (*words[1:], *entry["short_names"]):
        text = re.sub(r"[\s_-]+", " ", keyword).strip().lower()
        # Emoticons, clock readings and two-letter country codes are not words a caption would have.
        if re.fullmatch(r"[^\W\d_]{3,}( [^\W\d_]+)*", text) and text not in keywords:
            keywords.append(text)
    return name, tuple(keywords)


def describe_skin_tones(codes: str | None) -> str | None:
    """``1F3FB-1F3FD`` as "light and medium"."""
    return None if codes is None else " and ".join(dict.fromkeys(SKIN_TONES[code] for code in codes.split("-")))


def write_caption(concept: Concept, skin_tone: str | None, order: str | None) -> str:
    """The name, the skin tone, and keywords that add a word, as many as a context of 24 tokens takes.

    Args:
        concept: The emoji.
        skin_tone: Its skin tone or tones in words.
        order: What the choice of keywords is drawn from, so that drawings of one concept differ in them as captions
            of the web do; None takes the library's first ones.
    """
    caption = concept.name
    if skin_tone is not None:
        joint = "and" if " with " in caption else "with"
        plural = "s" if " and " in skin_tone else ""
        caption += f" {joint} {skin_tone} skin tone{plural}"
    words = set(re.findall(r"\w+", caption))
    keywords = list(concept.keywords)
    if order is not None:
        keywords.sort(key=lambda keyword: stable_number(f"{order} {keyword}"))
    chosen = 0
    for keyword in keywords:
        new = set(keyword.split()) - words
        if new and chosen < NUM_KEYWORDS and len(words | new) <= MAX_CAPTION_WORDS:
            caption += f", {keyword}"
            words |= new
            chosen += 1
    return caption


def convert_image(png: bytes) -> tuple[bytes, bytes]:
    """Flatten a drawing on white: the WebP file, and a digest of the pixels that went into it."""
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    if drawing.size != (IMAGE_SIZE, IMAGE_SIZE):
        raise SystemExit(f"expected drawings of {IMAGE_SIZE} x {IMAGE_SIZE} pixels, found one of {drawing.size}")
    flat = Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing).convert("RGB")
    file = io.BytesIO()
    flat.save(file, "WEBP", quality=WEBP_QUALITY, method=6)
    return file.getvalue(), hashlib.sha256(flat.tobytes()).digest()


def read_drawings(folder: Path) -> list[Drawing]:
    """All drawings of both vendors, skin tones included."""
    library = json.loads(
        read_package(folder, "emojilib-4.0.3", re.compile(r"package/dist/emoji-en-US\.json")).popitem()[1]
    )
    drawings = []
    for vendor in VENDORS:
        wanted = re.compile(rf"package/(emoji\.json|img/{vendor}/64/[^/]+\.png)")
        files = read_package(folder, f"emoji-datasource-{vendor}-16.0.0", wanted)
        for entry in json.loads(files["package/emoji.json"]):
            if entry["category"] == "Component":  # swatches of skin tones, not things
                continue
            name, keywords = read_words(entry, library)
            concept = Concept(entry["unified"], name, keywords, entry["category"], entry["subcategory"])
            for codes, variant in ((None, entry), *entry.get("skin_variations", {}).items()):
                # Without this flag the picture could be another vendor's, standing in.
                if not variant[f"has_img_{vendor}"]:
                    continue
                webp, pixels = convert_image(files[f"package/img/{vendor}/64/{variant['image']}"])
                key = f"{vendor}-{Path(variant['image']).stem}"
                tone = describe_skin_tones(codes)
                drawings.append(Drawing(key, vendor, concept, variant["unified"], tone, webp, pixels))
    return drawings


def kin(unified: str) -> str:
    """What a base emoji shares with its other genders and directions: ``1F3C3`` for all who run.

    Women and men become persons, girls and boys children; the gender sign, the arrow that turns a person round and
    the variation selector are left out.
    """
    neutral = {"1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2"}
    points = [neutral.get(point, point) for point in unified.split("-") if point != "FE0F"]
    text = "-".join(points)
    return re.sub(r"-200D-(2640|2642|27A1)", "", text)


def find_held_out(drawings: Sequence[Drawing]) -> set[str]:
    """Base emoji that are kept from training, by a hash of what they share with their kin and look-alikes."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    for drawing in drawings:
        first, second = sorted((find(kin(drawing.concept.unified)), find(f"~{drawing.pixels.hex()}")))
        leader[second] = first
    held_out = set()
    for drawing in drawings:
        concept = drawing.concept
        one_in = HELD_OUT_FLAGS_ONE_IN if concept.subcategory == "country-flag" else HELD_OUT_ONE_IN
        if stable_number(f"split {SPLIT_SEED} {find(kin(concept.unified))}") % one_in == 0:
            held_out.add(concept.unified)
    return held_out


def write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """A tar of the members in their order, with nothing in it that depends on when and where it was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """A text file of the lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())


def write_pairs(folder: Path, drawings: Sequence[Drawing]) -> None:
    """Image-text shards in an order by hash, so that every shard is a fair sample."""
    ordered = sorted(drawings, key=lambda drawing: stable_number(drawing.key))
    for shard in range(NUM_SHARDS):
        members: list[tuple[str, bytes]] = []
        for drawing in ordered[len(ordered) * shard // NUM_SHARDS : len(ordered) * (shard + 1) // NUM_SHARDS]:
            caption = write_caption(drawing.concept, drawing.skin_tone, order=drawing.key)
            members.append((f"{drawing.key}.webp", drawing.webp))
            members.append((f"{drawing.key}.txt", caption.encode()))
            members.append((f"{drawing.key}.json", drawing.json()))
        write_shard(folder / f"{shard:05d}.tar", members)


def untoned_by_concept(drawings: Iterable[Drawing]) -> Iterator[list[Drawing]]:
    """The vendors' drawings without skin tone, concept by concept, in an order by hash."""
    by_concept = defaultdict(list)
    for drawing in drawings:
        if drawing.skin_tone is None:
            by_concept[drawing.concept.unified].append(drawing)
    for unified in sorted(by_concept, key=stable_number):
        yield by_concept[unified]


def choose_one(vendors: Sequence[Drawing]) -> Drawing:
    """One drawing of a concept, of either vendor in about half of the concepts."""
    return vendors[stable_number(f"vendor {vendors[0].concept.unified}") % len(vendors)]


def write_classification(folder: Path, trained: Sequence[Drawing], held_out: Sequence[Drawing]) -> None:
    """A CLIP_benchmark folder: a drawing of each concept to fit a probe on, both vendors' of held-out ones to test."""
    write_lines(folder / "classnames.txt", CLASSES)
    write_lines(folder / "zeroshot_classification_templates.txt", TEMPLATES)
    write_lines(folder / "dataset_type.txt", ["classification"])
    for split, drawings, limit in (
        ("train", trained, MAX_TRAIN_CONCEPTS_PER_CLASS),
        ("test", held_out, MAX_TEST_CONCEPTS_PER_CLASS),
    ):
        counts: dict[int, int] = defaultdict(int)
        members: list[tuple[str, bytes]] = []
        for vendors in untoned_by_concept(drawings):
            label = CLASS_OF_SUBCATEGORY.get(vendors[0].concept.subcategory)
            if label is None or counts[label] == limit:
                continue
            counts[label] += 1
            for drawing in vendors if split == "test" else [choose_one(vendors)]:
                members.append((f"{drawing.key}.webp", drawing.webp))
                members.append((f"{drawing.key}.cls", str(label).encode()))
        write_shard(folder / split / "0.tar", members)
        write_lines(folder / split / "nshards.txt", ["1"])


def write_retrieval(folder: Path, held_out: Sequence[Drawing]) -> None:
    """A CLIP_benchmark folder of one drawing and one caption for each held-out concept: recall is one to one."""
    write_lines(folder / "dataset_type.txt", ["retrieval"])
    members: list[tuple[str, bytes]] = []
    seen: set[bytes] = set()
    for vendors in untoned_by_concept(held_out):
        drawing = choose_one(vendors)
        if drawing.concept.subcategory == "country-flag" or drawing.pixels in seen:
            continue
        seen.add(drawing.pixels)
        members.append((f"{drawing.key}.webp", drawing.webp))
        members.append((f"{drawing.key}.txt", write_caption(drawing.concept, None, order=None).encode()))
    write_shard(folder / "test" / "0.tar", members)
    write_lines(folder / "test" / "nshards.txt", ["1"])


def main() -> None:
    """Check the encoder, fetch the packages, write the three sets."""
    parser = argparse.ArgumentParser(description="Make the quickstart's data from npm packages, byte for byte.")
    parser.add_argument(
        "--packages",
        type=Path,
        default=HERE / "work" / "packages",
        help="folder of the .tgz files; what it lacks is downloaded with npm",
    )
    parser.add_argument(
        "--out", type=Path, default=HERE / "data", help="where pairs/, classification/ and retrieval/ go"
    )
    arguments = parser.parse_args()

    found = (PIL.__version__, features.version("webp"))
    if found != (PILLOW_VERSION, LIBWEBP_VERSION):
        raise SystemExit(
            f"the data was encoded by Pillow {PILLOW_VERSION} with libwebp {LIBWEBP_VERSION}, "
            f"this is Pillow {found[0]} with libwebp {found[1]}: pip install pillow=={PILLOW_VERSION}"
        )
    fetch_packages(arguments.packages)
    drawings = read_drawings(arguments.packages)
    kept_away = find_held_out(drawings)
    trained = [drawing for drawing in drawings if drawing.concept.unified not in kept_away]
    held_out = [drawing for drawing in drawings if drawing.concept.unified in kept_away]
    write_pairs(arguments.out / "pairs", trained)
    write_classification(arguments.out / "classification", trained, held_out)
    write_retrieval(arguments.out / "retrieval", held_out)
    num_trained = len({drawing.concept.unified for drawing in trained})
    print(f"{len(trained)} pairs of {num_trained} concepts and {len(kept_away)} held-out concepts in {arguments.out}")


if __name__ == "__main__":
    main()
