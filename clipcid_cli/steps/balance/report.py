"""The report of `balance`: what is kept at each cut-off, how large sets are and what some look like, and what changed."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from clipcid_cli.algorithms.near.block import load_block
from clipcid_cli.algorithms.near.edges import Edges, sort_edges
from clipcid_cli.algorithms.near.exact import BoolArray, FloatArray, IntArray
from clipcid_cli.algorithms.near.search import near_pairs
from clipcid_cli.algorithms.sets.star import count_kept, star_cover
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.addresses import is_remote
from clipcid_cli.formats.data.benchmark import find_benchmark_folder, read_class_names
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.files import describe, write_text
from clipcid_cli.formats.report import PALETTE, make_figure, render_report, svg, thumbnail
from clipcid_cli.formats.results.forest import SetTable
from clipcid_cli.formats.results.keep_list import BalanceSidecar
from clipcid_cli.formats.skips import REASONS
from clipcid_cli.runtime.models.decode import SkippedImage, decode_image
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalancePlan, BalanceRows, BalanceRun
from clipcid_cli.steps.balance.compute import Outcome
from clipcid_cli.steps.balance.filters.against import NearReferences
from clipcid_cli.steps.balance.result import BalanceResult
from clipcid_cli.steps.balance.samples import SampleFinder, open_data, open_recorded, take_texts
from clipcid_cli.steps.balance.sets import NotComputed, OtherLinkage, Sets
from clipcid_cli.steps.settings.balance import LINKAGES
from clipcid_cli.typed import this_command

REPORT = "report.html"

_SETS_SHOWN = 12
_IMAGES_SHOWN = 9
_PAIRS_SHOWN = 8
_REFERENCES_SHOWN = 12
_CHAINS_SHOWN = 8
_STARS_SHOWN = 8
# Different images of a set that stars are made of for the report: all their pairs take a fifth of a second on two cores.
_MAX_STARRED = 4096
# Pixels of the longer side of a picture.
_SIDE = 96
_UNKNOWN = "it is not recorded which data the embeddings were made from."
# Classes are stored with the images, so reading them reads the headers of every shard: some seconds for this many images.
_MAX_LABELS = 2**17
# Local shards without an index that a report lists to find pictures by key alone: seconds to a minute.
_MAX_LISTED = 128
# Beyond this many images, the captions of every second, third, … are read; a share is then known within 0.2 points.
_MAX_CAPTIONS = 2**19
_CAPTIONS_AT_ONCE = 2**16
_CHANGES_SHOWN = 15
_MIN_WORD = 3
# English words of three letters and more that do not describe an image.
_ENGLISH = (
    "about above after again all also and any are because been before being below between both but can could did does "
    "doing down during each few for from further had has have having her here hers him his how into its itself just may "
    "might more most much must nor not now off once only other our out over own per same she should some such than that "
    "the their them then there these they this those through too under until upon very via was were what when where which "
    "while who whom why will with within without would you your"
)


def has_new_pictures(plan: BalancePlan, finished: BalanceSidecar) -> bool:
    """Tell whether a picture can be read now that the report of a finished output could not show."""
    if not finished.pictures.unread:
        return False
    shards, keys = map(list, zip(*finished.pictures.unread, strict=True))
    return any(ReportPictures(plan).read(shards, keys))


def write_report(found: Outcome, result: BalanceResult, warnings: list[str]) -> dict[str, Any]:
    """Write the report as one page, with what the user was warned of.

    Returns:
        For the sidecar, which pictures are in it: ``{"shown": number, "unread": [[shard, key], …], "why": reason}``.
    """
    run, sets, other = found.run, found.sets, found.other
    measured = sets.table
    largest = np.argsort(-measured.size, kind="stable")[:_SETS_SHOWN]
    shown = [_choose_members(sets, label) for label in measured.label[largest].tolist()]
    alone = np.ones(run.rows.num_searched - measured.size.sum(), np.int64)
    end = 0 if sets.threshold is None else len(found.forest.up_to(sets.threshold))
    inside, outside = found.forest[max(0, end - _PAIRS_SHOWN) : end], found.forest[end : end + _PAIRS_SHOWN]
    chains = find_chains(run, sets, measured)
    chained = [np.array(chain["shown"]) for chain in chains]
    wanted = np.unique(np.concatenate([*shown, *chained, inside.a, inside.b, outside.a, outside.b]))
    gallery = ReportPictures(run)
    loaded = gallery.load(run.rows.numbers[wanted.astype(sets.labels.dtype)])
    pictures = dict(zip(wanted.tolist(), loaded, strict=True))
    for row, picture in pictures.items():
        picture.kept = bool(found.is_kept[row])
        picture.distance = float(sets.distances[row])

    def show(edges: Edges) -> list[dict[str, Any]]:
        ones, others = ([pictures[row] for row in each.tolist()] for each in (edges.a, edges.b))
        return _pair_up(ones, others, edges.weight)

    recorded = {"shown": gallery.shown, "unread": list(gallery.unread), "why": next(iter(gallery.unread.values()), "")}
    if missing := len(gallery.unread):
        warning = (
            f"The report shows {gallery.shown:,} of {gallery.shown + missing:,} pictures: {recorded['why']} Once they can "
            "be read, the same command adds them."
        )
        reporting.warn(warning)
        warnings = [*warnings, warning]
    write_text(
        run.work / REPORT,
        render_report(
            "balance.html",
            result=result,
            command=shlex.join(this_command()),
            linkage=run.settings.linkage,
            warnings=warnings,
            num_sets=len(measured),
            why_no_other=other.reason if isinstance(other, NotComputed) else "",
            curve_figure=_draw_curves(run, sets, other),
            sizes=_count_sizes(np.concatenate([measured.size, alone])),
            sets=[
                {"size": size, "images": [pictures[row] for row in members.tolist()]}
                for size, members in zip(measured.size[largest].tolist(), shown, strict=True)
            ],
            chains=[{"set": chain, "images": [pictures[row] for row in chain["shown"]]} for chain in chains],
            inside=show(inside),
            outside=show(outside),
            why_no_images=gallery.closed,
            classes=compare_classes(gallery.data, run.embeddings, run.rows, found.is_kept),
            cluster_sizes=[] if found.cap is None else _count_sizes(found.cap.before, found.cap.most),
            near=[] if found.near is None else _show_near(run, found.near, gallery),
            window_figure=None if found.captions is None else found.captions.draw(),
            reasons=REASONS,
            embeddings=str(run.embeddings.folder),
        ),
    )
    return recorded


def find_chains(run: BalanceRun, sets: Sets, table: SetTable) -> list[dict[str, Any]]:
    """Return the sets with most images beyond the cut-off, the widest of equals first; none for stars.

    Returns:
        What the table has of each, and: ``beyond``, how many of its images are farther than the cut-off from the one kept;
        ``stars``, the images that stars would keep of it, those that represent most first, None where it has too many to
        compare; ``shown``, those of its images that the report shows.
    """
    if sets.threshold is None or run.settings.linkage == "star":
        return []
    is_beyond = sets.distances > np.float32(sets.threshold)
    beyond = np.bincount(sets.labels[is_beyond], minlength=len(sets.labels))[table.label]
    order = np.lexsort((table.label, -table.diameter, -beyond))[:_CHAINS_SHOWN]
    copies = run.rows.count_copies()
    chains = []
    for place in order[beyond[order] > 0].tolist():
        chain = {name: column[place].item() for name, column in vars(table).items()}
        stars = _find_stars(run, sets, chain["label"], sets.threshold, copies)
        shown = [chain["representative"], chain["farthest"], *(stars or ())[:_STARS_SHOWN]]
        chains.append(chain | {"beyond": int(beyond[place]), "stars": stars, "shown": shown})
    return chains


def _find_stars(run: BalanceRun, sets: Sets, label: int, cutoff: float, copies: IntArray) -> list[int] | None:
    """Cover a set by stars, which never leave it, given how many rows equal each unique row, int64 [U]."""
    rows = run.rows
    place = np.flatnonzero(sets.labels[rows.unique] == label)
    if len(place) > _MAX_STARRED:
        return None
    numbers = np.arange(len(place), dtype=rows.unique.dtype)
    block = load_block(lambda some: rows.read(rows.unique[place[some]]), numbers, run.context.device, run.scan.dtype)
    pairs = sort_edges(Edges.concatenate(near_pairs(block, block, cutoff)))
    representatives = star_cover(pairs, copies[place])
    represented = np.bincount(representatives, weights=copies[place], minlength=len(place))
    order = np.argsort(-represented, kind="stable")[: count_kept(representatives)]
    found: list[int] = rows.unique[place[order]].tolist()
    return found


def _choose_members(sets: Sets, label: int) -> IntArray:
    """Return the kept image and then others by distance: all of a small set, the nearest and farthest of a large one."""
    members = np.flatnonzero(sets.labels == label)
    is_kept = sets.representatives[members] == members
    members = members[np.lexsort((members, sets.distances[members], ~is_kept))]
    if len(members) > _IMAGES_SHOWN:
        half = _IMAGES_SHOWN // 2
        members = np.concatenate([members[:half], members[-half:]])
    return members


def _pair_up(ones: Iterable[Picture], others: Iterable[Picture], distances: FloatArray) -> list[dict[str, Any]]:
    pairs = zip(ones, others, distances.tolist(), strict=True)
    return [{"a": one, "b": other, "distance": distance} for one, other, distance in pairs]


def _show_near(run: BalanceRun, near: NearReferences, gallery: ReportPictures) -> list[dict[str, Any]]:
    """Choose some pairs of each reference, from the nearest to the farthest, and load their images."""
    shown = []
    for number, reference in enumerate(near.references):
        rows = np.flatnonzero(near.owner == number)
        rows = rows[np.argsort(near.distance[rows], kind="stable")]
        chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), _REFERENCES_SHOWN)).round().astype(np.int64)]
        theirs = ReportPictures(run, reference.embeddings)
        ours = gallery.load(run.rows.numbers[chosen])
        pairs = _pair_up(ours, theirs.load(near.row[chosen]), near.distance[chosen])
        shown.append({"name": reference.name, "number": len(rows), "pairs": pairs})
    return shown


def _count_sizes(sizes: IntArray, most: int | None = None) -> list[dict[str, Any]]:
    """Count sets and the images in them by size, int64 [S], in powers of two; of each, `most` images stay."""
    sizes = sizes[sizes > 0]
    power = np.ceil(np.log2(sizes)).astype(np.int64)
    left = sizes if most is None else np.minimum(sizes, most)
    num_sets, images, after = (np.bincount(power, weights=each).astype(np.int64) for each in (None, sizes, left))
    return [
        {
            "name": f"{2**p}" if p < 2 else f"{2 ** (p - 1) + 1:,}–{2**p:,}",
            "sets": int(num_sets[p]),
            "images": int(images[p]),
            "share": images[p] / images.max(),
            "after": int(after[p]),
        }
        for p in np.flatnonzero(num_sets).tolist()
    ]


def _draw_curves(run: BalanceRun, sets: Sets, other: OtherLinkage | NotComputed) -> Markup:
    """Draw the share kept over the cut-off, by both linkages where both are known, and the points at the cut-off."""
    num_images, linkage = run.rows.num_searched, run.settings.linkage
    lines = [(linkage, sets.curve, sets.num_kept)]
    if isinstance(other, OtherLinkage):
        lines.append((other.result.linkage, other.curve, other.result.kept))
    most_kept = max(num_kept for _, _, num_kept in lines)
    figure = make_figure()
    axes = figure.add_subplot()
    for name, curve, num_kept in lines:
        color = PALETTE[LINKAGES.index(name)]
        distances = np.concatenate([[0.0], curve.distance])
        kept = np.concatenate([[num_images], curve.kept]) / num_images
        # Single linkage is known between two points, stars are not: only that the curve lies between them.
        style: dict[str, Any] = {"drawstyle": "steps-post"} if name == "single" else {}
        axes.plot(distances, kept, color=color, label=f"{name} (chosen)" if name == linkage else name, **style)
        if sets.threshold is not None:
            point = (sets.threshold, num_kept / num_images)
            axes.plot(*point, "o", color=color)
            # The number of the upper line is placed above it, that of the lower one below, unless the axis is there.
            place: dict[str, Any] = {"xytext": (4, 5), "horizontalalignment": "left"}
            if (num_kept < most_kept or len(lines) == 1) and point[1] > 0.12:
                place = {"xytext": (-7, -13), "horizontalalignment": "right"}
            axes.annotate(f"{num_kept / num_images:.1%}", point, textcoords="offset points", **place)
    if sets.threshold is not None:
        axes.axvline(sets.threshold, color=PALETTE[4], linewidth=0.8, linestyle=":")
    farthest = max(float(curve.distance[-1]) for _, curve, _ in lines)
    axes.set(xlabel="cut-off ε", ylabel="share kept", xlim=(0, 1.15 * farthest or 1), ylim=(0, 1.02))
    axes.legend(loc="lower left", frameon=False)
    return svg(figure, "Share of images kept over the cut-off")


@dataclasses.dataclass
class Picture:
    """One image: its thumbnail as a ``data:`` URL, empty where it cannot be shown; its distance to the representative."""

    key: str
    source: str
    kept: bool = False
    distance: float = 0.0


class ReportPictures:
    """Loads pictures, and counts those shown."""

    def __init__(self, plan: BalancePlan, reference: Embeddings | None = None) -> None:
        """Open the data, or that which the embeddings of a reference record."""
        settings = plan.settings
        self._workers = settings.workers
        self._embeddings = plan.embeddings if reference is None else reference
        self.data: Dataset | None = None  # the data; None where it is not known, or cannot be opened
        self.shown = 0
        self.unread = dict[tuple[str, str], str]()  # why other pictures are not shown, by shard and key
        try:
            self.data = (
                open_data(settings, plan.embeddings) if reference is None else open_recorded(settings, reference)
            )
            self.closed = _UNKNOWN if self.data is None else ""  # why there is none
        except ClipcidError as error:
            self.closed = error.message

    def load(self, numbers: IntArray) -> list[Picture]:
        """Load the thumbnails of n rows of the embeddings; without the data there are keys only."""
        embeddings = self._embeddings
        shards, keys = (take_texts(embeddings, read, numbers) for read in (embeddings.shards_of, embeddings.keys_of))
        sources = self.read(shards, keys)
        return [Picture(key, source) for key, source in zip(keys, sources, strict=True)]

    def read(self, shards: list[str], keys: list[str]) -> list[str]:
        """Return thumbnails as ``data:`` URLs, empty where there is none."""
        if self.data is None:
            if self.closed != _UNKNOWN:
                self.unread |= dict.fromkeys(zip(shards, keys, strict=True), self.closed)
            return [""] * len(keys)
        finder = SampleFinder(self.data, self._workers)
        found: list[Sample | None] | None = None
        if finder.searches_all(shards):  # once for all of them
            try:
                _validate_short(self.data)
                found = finder.find(shards, keys)
            except (ClipcidError, OSError) as error:
                self.unread |= dict.fromkeys(zip(shards, keys, strict=True), _say_why(error, self.data.spec))
                return [""] * len(keys)
        sources = [""] * len(keys)
        for number, (shard, key) in enumerate(zip(shards, keys, strict=True)):
            where = f"shard {shard}"
            try:
                sample = finder.find([shard], [key])[0] if found is None else found[number]
                if sample is None:
                    self.unread[shard, key] = f"the data has no image {key}."
                    continue
                where = sample.image.path
                image = decode_image(sample.image.read(), draft_size=(_SIDE, _SIDE))
                if isinstance(image, SkippedImage):
                    self.unread[shard, key] = f"{where} has an {REASONS[image.reason]}, {key}."
                    continue
                sources[number] = thumbnail(image, _SIDE)
                self.shown += 1
            except (ClipcidError, OSError) as error:
                self.unread[shard, key] = _say_why(error, where)
        return sources


def _say_why(error: ClipcidError | OSError, where: str) -> str:
    if isinstance(error, ClipcidError):
        return error.message
    return f"{error.filename or where} cannot be read: {describe(error)}."


def _validate_short(data: Dataset) -> None:
    """Refuse to list data of many shards, or behind URLs, for a report alone."""
    remote = any(is_remote(shard.file) for shard in data.shards)
    if data.index is None and (remote or len(data.shards) > _MAX_LISTED):
        raise ClipcidError(
            f"{data.spec} has no index yet, which distill and --select resolution make, and its {len(data.shards):,} shards "
            "are not listed for a report alone.",
            "Run one of these first.",
        )


@dataclasses.dataclass(frozen=True)
class LargestChanges:
    """The classes or words whose share changed most, the largest change first, and what was counted and what was not."""

    kind: str  # ``class``, ``word``, or empty where there are neither classes nor captions
    note: str
    # Those with a larger share of the kept images than of all: ``name``, the images ``before`` and ``after``,
    # ``share_before`` and ``share_after``.
    risen: list[dict[Any, Any]]
    fallen: list[dict[Any, Any]]  # those with a smaller share


def compare_classes(data: Dataset | None, embeddings: Embeddings, rows: BalanceRows, kept: BoolArray) -> LargestChanges:
    """Compare the kept images, bool [N], with all: by class where the data has classes, else by the words of captions.

    Classes are read where the data is local and has at most `_MAX_LABELS` images; captions are in the metadata.
    """
    unread = ""
    if data is not None and not any(is_remote(shard.file) for shard in data.shards):
        try:
            if any(sample.label is not None for sample in data.shards[0].samples()):
                labels = _read_labels(data) if len(rows) <= _MAX_LABELS else None
                if labels is not None:
                    return _compare_labels(data, labels, embeddings, rows, kept)
                unread = f" The classes of more than {_MAX_LABELS:,} images are not read for a report."
        except (ClipcidError, OSError) as error:
            unread = f" The classes cannot be read: {error}"
    step = max(1, -(-len(rows) // _MAX_CAPTIONS))
    pieces = embeddings.take_column(embeddings.captions_of, rows.numbers[::step])
    captions = pa.chunked_array(pieces, pa.large_string()).combine_chunks()
    kept = kept[::step]
    has_caption = pc.not_equal(captions, "").to_numpy(zero_copy_only=False)
    before, after = (int(np.count_nonzero(each)) for each in (has_caption, has_caption & kept))
    if not before:
        return LargestChanges("", f"There are neither classes nor captions to compare.{unread}", [], [])
    sample = f" (a sample of one image in {step})" if step > 1 else ""
    note = (
        f"Share of images whose caption has the word, among the {before:,} images and the {after:,} kept ones that have a "
        f"caption{sample}. Words of fewer than three letters and common English words are omitted.{unread}"
    )
    return LargestChanges("word", note, *_find_changes(count_words(captions, kept), before, after))


def _read_labels(data: Dataset) -> dict[str, int | None] | None:
    """Read the class of each image by its key; None where there are more than `_MAX_LABELS`."""
    samples = itertools.chain.from_iterable(shard.samples() for shard in data.shards)
    found = {sample.key: sample.label for sample in itertools.islice(samples, _MAX_LABELS + 1)}
    return found if len(found) <= _MAX_LABELS else None


def _compare_labels(
    data: Dataset, found: dict[str, int | None], embeddings: Embeddings, rows: BalanceRows, kept: BoolArray
) -> LargestChanges:
    labels = pd.Series(map(found.get, take_texts(embeddings, embeddings.keys_of, rows.numbers)), dtype="Int64")
    grouped = pd.DataFrame({"label": labels, "kept": kept}).groupby("label")["kept"]
    counts = pd.DataFrame({"before": grouped.size(), "after": grouped.sum()})
    counts["name"] = _name_classes(data, counts.index.tolist())
    before, after = (int(counts[each].sum()) for each in ("before", "after"))
    note = (
        f"Share of each of {len(counts):,} classes, among the {before:,} images and the {after:,} kept ones that have "
    )
    return LargestChanges("class", f"{note}one.", *_find_changes(counts, before, after))


def _name_classes(data: Dataset, labels: list[int]) -> list[str]:
    """Name the classes by their folders, by the data set's list of names, or else by number."""
    path = find_benchmark_folder(data.spec).class_names if data.kind == "benchmark" else None
    names = data.classes if data.classes is not None else () if path is None else read_class_names(path)
    return [names[label] if label < len(names) else f"class {label}" for label in labels]


def count_words(captions: pa.LargeStringArray, kept: BoolArray) -> pd.DataFrame:
    """Count the images whose caption has a word, runs of letters of any script in lower case; the omitted ones left out.

    Returns:
        For each word, in the order of their characters, its ``name``, and the images ``before`` and, of the kept, ``after``.
    """
    counts = list[pd.DataFrame]()
    for at in range(0, len(captions), _CAPTIONS_AT_ONCE):
        lists = pc.split_pattern_regex(pc.utf8_lower(captions.slice(at, _CAPTIONS_AT_ONCE)), r"[^\p{L}\p{M}]+")
        words = pc.list_flatten(lists).dictionary_encode()
        names = np.array(words.dictionary.to_pylist(), object)
        # Each pair of a caption and a word once, however often the word occurs in it.
        pairs = pd.unique(pc.list_parent_indices(lists).to_numpy() * len(names) + words.indices.to_numpy())
        caption, word = np.divmod(pairs, len(names))
        before, after = (np.bincount(each, minlength=len(names)) for each in (word, word[kept[at + caption]]))
        counts.append(pd.DataFrame({"before": before, "after": after}, names))
    found = pd.concat(counts).groupby(level=0).sum().rename_axis("name").reset_index()
    is_counted = (found["name"].str.len() >= _MIN_WORD) & ~found["name"].isin(_ENGLISH.split())
    return found.loc[is_counted]


def _find_changes(counts: pd.DataFrame, before: int, after: int) -> list[list[dict[Any, Any]]]:
    """Return what rose most and what fell most in its share of the images with a class or caption, ties in order."""
    shares = counts.assign(share_before=counts["before"] / before, share_after=counts["after"] / max(1, after))
    rise = shares["share_after"] - shares["share_before"]
    risen = rise[rise > 0].sort_values(ascending=False, kind="stable")
    fallen = rise[rise < 0].sort_values(kind="stable")
    return [shares.loc[each.index[:_CHANGES_SHOWN]].to_dict("records") for each in (risen, fallen)]
