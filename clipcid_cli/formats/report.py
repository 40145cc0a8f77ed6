"""Reports: self-contained HTML pages with a shared base page, inline SVG figures and inline thumbnails."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup
from PIL import Image

from clipcid_cli.shown import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Readable on light and dark pages; text and axes take the page's own colour through `currentColor`.
PALETTE = ("#3b78c3", "#d9822b", "#3f9b6c", "#b0579f", "#8a8f98")

# What Markdown, and what GitHub and the Hugging Face hub add to it, reads as a mark, a link, a formula or a mention. An
# underscore within a word is text; what HTML reads is escaped with the rest of a page.
_MARKS = re.compile(
    r"[\\`*\[\]~|#$@] | (?<![^\W_])_ | _(?![^\W_]) | :(?=//) | (?<=\bwww)[.] | (?<=\bmailto): | (?<=\bxmpp):",
    re.IGNORECASE | re.VERBOSE,
)

_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
# Largest width at which a figure is shown, per inch of its own width.
_PIXELS_PER_INCH = 105


def render_report(template: str, **context: Any) -> str:
    """Fill a template of ``formats/templates/``: a whole page without external resources. Text is made plain and escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("clipcid_cli.formats"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: plain(value) if type(value) is str else value,  # Markup is ours
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"plain": plain, "script_hash": _hash_script, "markdown": escape_markdown}
    return environment.get_template(template).render(**context)


def _hash_script(script: str) -> str:
    """Return by which a page's content security policy admits one script written in the page."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


def escape_markdown(value: object) -> str:
    """Return a value as one line of text for a page in Markdown, also for its tables: nothing in it is a mark or a link."""
    return _MARKS.sub(r"\\\g<0>", " ".join(plain(str(value)).splitlines()))


def make_figure() -> Figure:
    """Make a matplotlib figure whose text can be read on a phone, without touching pyplot's state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(4.6, 2.9), layout="constrained")  # inches


def svg(figure: Figure, label: str) -> Markup:
    """Turn a figure into inline SVG that follows the page's light or dark colours; `label` is for screen readers."""
    import matplotlib as mpl

    for axes in figure.axes:
        for spine in axes.spines.values():
            spine.set_alpha(0.4)
    buffer = io.StringIO()
    # A fixed salt and no date: the same figure gives the same bytes.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "clipcid", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace("#000000", "currentColor")
    # SVG text without a fill is black; the class gives it the page's colour. Scaling by the figure's width keeps its text
    # about as large as the page's.
    width = round(_PIXELS_PER_INCH * figure.get_figwidth())
    frame = Markup('<div class="figure" role="img" aria-label="{}" style="max-width: {}px">{}</div>')
    return frame.format(label, width, Markup(text))


def thumbnail(image: Image.Image, side: int = 96) -> str:
    """Turn an image into a ``data:`` URL of a small WebP, at most `side` pixels wide and high."""
    return "data:image/webp;base64," + base64.b64encode(encode_thumbnail(image, side)).decode("ascii")


def encode_thumbnail(image: Image.Image, side: int) -> bytes:
    """Turn an image into a small WebP, at most `side` pixels wide and high, without the metadata of its file."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()
