"""Sidecars: ``<step>.json`` beside an output, as types, with a checksum: one that was edited is refused where it is read.

Entries that steps look into are attributes. Settings, counts and results, which are compared or given back as they are,
stay JSON values. Entries that a type does not name are ignored.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from clipcid_cli import __version__
from clipcid_cli.errors import ClipcidError, flag_words
from clipcid_cli.formats.files import read_regular, reading, write_json
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.shown import redact_all
from clipcid_cli.typed import made_by, this_command

FORMAT_VERSION = 2
LARGEST_SIDECAR = 2**30
"""Bytes of a sidecar: one that lists a million shards has 300 MB."""

AnySidecar = TypeVar("AnySidecar", bound="Sidecar")


class Run(msgspec.Struct, kw_only=True):
    """What decides an output: the settings, as JSON values, and the contents of the inputs."""

    settings: dict[str, Any]
    inputs: list[FileRecord]


class Sidecar(Run, kw_only=True):
    """What every sidecar holds."""

    format_version: int
    tool: str
    tool_version: str
    step: str
    outputs: list[FileRecord] = []  # the files that it stands for, relative to its folder
    counts: dict[str, Any]  # numbers of samples or rows read, used and skipped by reason
    seconds: dict[str, int | float]  # time by phase
    command: list[str] = []  # the command as typed, word by word; empty where a step was called from Python

    def records(self, folder: Path) -> list[FileRecord]:
        """Return what is recorded of the files, whose paths are relative to the sidecar's `folder`."""
        return self.outputs

    def files(self, folder: Path) -> set[str]:
        """Return the files that a later output, where it lacks them, removes."""
        return {file.path for file in self.records(folder)}


class DataSpec(msgspec.Struct, omit_defaults=True):
    """What opens data again: its name, and the flags by which it was read."""

    spec: str
    keys: str
    image: str
    caption: str
    key: str
    caption_lines: bool = False
    caption_key: tuple[str, ...] = ()
    list_root: str | None = None
    list_separator: str | None = None
    list_encoding: str | None = None


class ModelRecord(msgspec.Struct, kw_only=True):
    """The model that made embeddings: the fields of `ModelInfo`, and the scale and bias of its cosines."""

    spec: str
    weights_hash: str
    slug: str = ""
    architecture: str | None = None
    tag: str | None = None
    preprocess: dict[str, Any] = {}
    context_length: int = 0
    embed_dim: int = 0
    image_size: tuple[int, int] = (0, 0)
    parameters: int = 0
    tokenizer: str = ""
    config: dict[str, Any]
    logit_scale: float | None = None
    logit_bias: float | None = None


class EmbedMade(msgspec.Struct):
    """Settings of `embed`; those with a default are recorded where there are views or text variants."""

    text: bool
    keys: str
    fast_decode: bool
    precision: str
    batch_size: int
    preprocess: str
    caption_lines: bool = False
    caption_key: tuple[str, ...] = ()
    views: int = 0
    view_kind: tuple[str, ...] = ("crop",)
    crop_scale: float = 0.9
    color_jitter: float = 0.0
    gray_probability: float = 0.0
    text_variants: int = 0
    seed: int = 0


class EmbedSidecar(Sidecar, kw_only=True):
    """``embed.json``, of a folder of embeddings whose manifest names the files."""

    model: ModelRecord
    images_per_second: float | None
    data: DataSpec
    run: dict[str, Any] = {}

    @property
    def made(self) -> EmbedMade:
        """What is read of the settings."""
        return msgspec.convert(self.settings, EmbedMade)

    def records(self, folder: Path) -> list[FileRecord]:
        """Return what is recorded of the files of the manifest too."""
        from clipcid_cli.formats.parquet import read_rows  # few commands need it

        path = folder / "manifest.parquet"
        fix = "Embed again."
        shards = read_rows(path, fix, ["files"])
        with reading(path, "a manifest of embeddings", fix):
            files = [file for shard in shards for file in shard["files"].values() if file is not None]
            return self.outputs + msgspec.convert(files, list[FileRecord])


class ForestSidecar(Sidecar, kw_only=True):
    """``forest.json``: the distance up to which the forest is complete."""

    cutoff: float


class PairingFigures(msgspec.Struct):
    """How well a teacher's captions find their own images among those of other captions, beside a guess."""

    pairs: int
    candidates: int  # images that a caption ranks, in the mean
    median_rank: float
    chance_rank: float
    recall_at_1: float
    chance_at_1: float
    recall_at_10: float
    chance_at_10: float
    near_chance: bool
    repaired: bool  # whether after the teacher's repair, of captions that it was not fitted to

    def __str__(self) -> str:
        ranks = f"median rank {self.median_rank:,.0f} of {self.candidates:,} (chance {self.chance_rank:,.0f})"
        recalls = ((1, self.recall_at_1, self.chance_at_1), (10, self.recall_at_10, self.chance_at_10))
        shares = [f"R@{k} {100 * recall:.1f}% (chance {100 * chance:.2g}%)" for k, recall, chance in recalls]
        return f"{ranks}, {', '.join(shares)}"


class RepairFigures(msgspec.Struct, omit_defaults=True):
    """How captions that a repair of a teacher was not fitted to find their images, before and after it."""

    repaired: bool  # whether the repair is taken
    steps: int  # those of the fit after which it was best
    # Mean of ln(1 + images of other captions nearer to the caption than its own), before and after.
    log_rank: tuple[float, float]
    standard_error: float  # of the difference of the two
    recall_at_1: tuple[float, float]  # share of the images whose nearest caption is their own, before and after
    chance_at_1: float  # of a guess
    pairs: int  # pairs that it was fitted to and judged by
    captions: int  # different captions of those
    pairing: PairingFigures | None = None  # of the repaired teacher

    @property
    def trust(self) -> float:
        """In (0, 1]: what the repair left of 1 + rank, in the geometric mean; 1 where there was nothing to repair."""
        before, after = self.log_rank
        return math.exp(after - before) if self.repaired else 1.0


class RepairSidecar(Sidecar, kw_only=True):
    """``repair.json``, beside ``repair.npz`` where the repair is taken."""

    result: RepairFigures


class Pictures(msgspec.Struct):
    """The pictures of a report: how many are shown, shard and key of those that could not be read, and why not."""

    shown: int
    unread: list[tuple[str, str]]
    why: str


class BalanceSidecar(Sidecar, kw_only=True):
    """``balance.json``; the embeddings are named relative to the work directory."""

    embeddings: str
    pictures: Pictures
    result: dict[str, Any]


class ClusterSidecar(Sidecar, kw_only=True):
    """``cluster.json``."""

    embeddings: str | list[str]  # relative to the work directory; several teachers' in a list
    keep_list: FileRecord | None  # None where all images were clustered
    model: ModelRecord | None  # None for embeddings of another tool
    # The map by which the teacher's image rows were repaired; None where they were taken as they are.
    repair: FileRecord | None = None
    # Which image rows centroids and similarities are of: ``stored``, as in the embeddings' files, or ``repaired``.
    space: str | None = None
    num_nearest: int
    temperatures: dict[str, float]  # by tower, τ_T of the soft labels
    result: dict[str, Any]


class DistillMade(msgspec.Struct):
    """What is read of the settings of `distill`."""

    losses: dict[str, dict[str, Any]]
    ema: float | None = None


class AppliedKeepList(msgspec.Struct):
    """A keep list that training applied, and how many of its images it keeps."""

    path: str
    kept: int
    images: int


class DistillSidecar(Sidecar, kw_only=True):
    """``distill.json``; without a keep list all samples were used."""

    model: dict[str, Any]
    data: DataSpec
    keep_list: AppliedKeepList | None
    result: dict[str, Any]

    @property
    def made(self) -> DistillMade:
        """What is read of the settings."""
        return msgspec.convert(self.settings, DistillMade)


class LinesRecord(msgspec.Struct):
    """Which class names or templates a score is of: those of other lines are not comparable."""

    source: str  # path of the file, or ``openai``, ``simple``, ``imagenet``, ``default``, ``folder names``, …
    number: int
    hash: str  # what ``b2sum -l 48`` prints of a file with these lines

    def __str__(self) -> str:
        return f"{self.number:,}, {self.source} ({self.hash})"


class EvaluationSidecar(Sidecar, kw_only=True):
    """The sidecar of an evaluation, in ``eval/sidecars/``; of a classification with `prompts`."""

    prompts: dict[str, LinesRecord] | None = None  # by ``class_names`` and ``templates``


class ClassScore(msgspec.Struct):
    """How well one class is told."""

    name: str = msgspec.field(name="class")
    images: int
    value: float | None  # recall or, where images have several classes, average precision; None without images
    confused_with: str | None = None  # the wrong class most often predicted for its images, and how often
    confused: int = 0


class Example(msgspec.Struct):
    """An image for the report: its class, the one predicted, and where its bytes are."""

    key: str
    label: str
    predicted: str
    path: str
    offset: int
    size: int | None
    column: str | None = None  # of a parquet file, whose row `offset` it is


class ZeroshotSidecar(EvaluationSidecar, kw_only=True):
    """The sidecar of a metrics file of `eval-zeroshot`."""

    images_per_second: float
    customary: str
    intervals: dict[str, tuple[float, float]]
    chance: dict[str, float] = {}
    majority: float | None = None
    per_class: list[ClassScore]
    examples: list[Example]


class LinearSidecar(EvaluationSidecar, kw_only=True):
    """The sidecar of an `eval-linear`."""

    result: dict[str, Any]
    solution: dict[str, Any]
    sweep: list[dict[str, Any]]


class RowParity(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How close the rows of an exported tower are to the original's, over samples in batches of several sizes.

    Of patches the shape is ``["batch", h, w, D]``.
    """

    batch_sizes: tuple[int, ...]
    samples: int
    max_difference: float
    min_cosine: float
    shape: list[str | int] | None = None


class PredictionParity(msgspec.Struct, kw_only=True):
    """Whether an export finds the class or the caption of images as the original does."""

    measure: str  # ``acc1`` or ``text_retrieval_recall@1``; `value` is the export's, `pytorch` the original's
    images: int
    candidates: int
    agreement: float  # fraction of the images with the same answer
    value: float
    pytorch: float
    drop: float
    gated: bool  # whether a drop over the limit is an error

    def __str__(self) -> str:
        return f"{100 * self.pytorch:.1f} → {100 * self.value:.1f}"


class Latency(msgspec.Struct):
    """Milliseconds that single images take: the median, and what one in twenty exceeds."""

    p50: float
    p95: float

    def __str__(self) -> str:
        return f"{self.p50:.1f} / {self.p95:.1f}"


class Parity(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How close one exported form is to the original, its size and speed: an entry of `parity.json`.

    Encoders have `image`, `text` and maybe `dense`; a classifier has what follows them up to `agreement`, as the search of
    images, where `agreement` is the fraction of the texts with the same nearest image.
    """

    precision: str
    image: RowParity | None = None
    text: RowParity | None = None
    dense: RowParity | None = None
    images: int | None = None
    max_cosine_difference: float | None = None
    agreement: float | None = None
    bytes: int
    images_per_second: float | None = None
    latency_ms: Latency | None = None
    pytorch_images_per_second: float | None = None
    zeroshot: PredictionParity | None
    opset: int | None = None
    engine: str | None = None
    processor: dict[str, int | float] | None = None
    tokenizer: dict[str, int] | None = None

    @property
    def same_answers(self) -> float | None:
        """Fraction of the images with the same answer, where there are answers."""
        return self.agreement if self.zeroshot is None else self.zeroshot.agreement

    @property
    def min_cosine(self) -> float | None:
        """The smallest cosine of any output with the original's; None of a classifier, which has none."""
        return min((rows.min_cosine for rows in (self.image, self.text, self.dense) if rows is not None), default=None)


class ExportSidecar(Sidecar, kw_only=True):
    """``export.json``; `written` names all files, `parity` is by form."""

    model: dict[str, Any]
    written: list[str]
    parity: dict[str, Parity]

    def files(self, folder: Path) -> set[str]:
        return set(self.written)


def sidecar_path(folder: Path, step: str) -> Path:
    """Return the path of the sidecar of a step's output."""
    return folder / f"{step}.json"


def read_sidecar(path: Path, kind: type[AnySidecar], fix: str | None = None) -> AnySidecar | None:
    """Read a sidecar; None when there is none. `fix` says what to do about one that is damaged, or of an earlier version."""
    if not path.exists():
        return None
    with reading(path, "a sidecar of clipcid", fix or "Remove it, or choose another folder."):
        content = json.loads(
            read_regular(path, LARGEST_SIDECAR)
        )  # msgspec's own parser refuses names of files that are not UTF-8
        version = msgspec.convert(content["format_version"], int)
        if version < FORMAT_VERSION:
            raise ClipcidError(
                f"{path} was written by an earlier clipcid, in format version {version}; this one has {FORMAT_VERSION}.",
                fix or "Run its command again with --overwrite.",
            )
        if version > FORMAT_VERSION:
            raise ClipcidError(
                f"{path} has format version {version}; this clipcid {__version__} knows up to {FORMAT_VERSION}.",
                "Upgrade clipcid, or choose another folder.",
            )
        if content.get("checksum") != seal(content)["checksum"]:
            raise ValueError("it was edited, or is damaged")
        return msgspec.convert(content, kind)


def run_again(step: str, sidecar: Sidecar | None, **flags: Any) -> str:
    """Return the fix that makes an output anew: the flags to add to its command, which is shown as it was typed."""
    fix = f"Run {step} again with {flag_words(**flags, overwrite=True)}"
    command = [] if sidecar is None else sidecar.command
    return "\n".join(filter(None, [f"{fix}.", made_by("The output that is there was", command)]))


def write_sidecar(path: Path, sidecar: Sidecar) -> None:
    """Write a sidecar with its checksum."""
    write_json(path, seal(msgspec.to_builtins(sidecar)))


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a sidecar with the checksum that belongs to them."""
    plain = {name: value for name, value in content.items() if name != "checksum"}
    digest = hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=16)
    return plain | {"checksum": f"blake2b:{digest.hexdigest()}"}


def make_sidecar(kind: type[AnySidecar], step: str, run: Run, entries: dict[str, Any]) -> AnySidecar:
    """Return the sidecar of a run, as `read_sidecar` will."""
    content = {"format_version": FORMAT_VERSION, "tool": "clipcid", "tool_version": __version__, "step": step}
    seconds = {phase: round(value, 3) for phase, value in entries["seconds"].items()}
    content |= {"settings": run.settings, "inputs": run.inputs, **entries, "seconds": seconds}
    content["command"] = this_command()
    assert content.keys() <= {*kind.__struct_fields__}, content.keys() - {*kind.__struct_fields__}
    plain = msgspec.to_builtins(content, enc_hook=lambda number: number.item())  # NumPy's numbers
    return msgspec.convert(redact_all(plain), kind)
