"""Settings of `eval-zeroshot`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from clipcid_cli.errors import UsageError
from clipcid_cli.steps.settings.fields import argument, flag_of, option, setting_of
from clipcid_cli.steps.settings.shared import ReadingSettings

_WHAT = "What is evaluated"
_OUT = "What is told"
# Settings that a comparison follows.
_COMPARING = frozenset({"model", "data", "bootstrap", "seed"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalZeroshotSettings(ReadingSettings):
    """Settings of `eval-zeroshot`."""

    model: str | None = argument(
        None,
        "Model to evaluate: a folder, architecture:tag or hf-hub:org/name. By default the work directory's newest student. "
        "The first positional is always the model.",
    )
    data: tuple[str, ...] = argument(
        (),
        "Data sets: CLIP_benchmark folders, class-per-folder images, lists, tar shards, or names such as food101, imagenet, "
        "voc2007 of copies in --data-root. With none, retrieval on the part that distill held out.",
    )
    models: tuple[str, ...] = option(
        (), "One more model; may be repeated.", group=_WHAT, flag="--model", metavar="MODEL"
    )
    task: str = option(
        "auto",
        "What to measure; `auto` follows the data set's dataset_type.txt, else classification where there are classes "
        "(multilabel where an image may have several) and retrieval where there are captions.",
        group=_WHAT,
        choices=("auto", "classification", "multilabel", "retrieval"),
    )
    classnames: str | None = option(
        None,
        "File with one class name a line; line 1 is class 0. Or `imagenet`: open_clip's names. By default the data set's "
        "classnames.txt or folder names.",
        group=_WHAT,
        metavar="FILE",
    )
    templates: str | None = option(
        None,
        "File with one prompt template a line, {c} or {} where the class name goes. Or `openai`, `simple`: open_clip's 80 "
        "and 7. By default the data set's zeroshot_classification_templates.txt, else `a photo of a {c}.`",
        group=_WHAT,
        metavar="FILE",
    )
    data_root: Path = option(
        Path("data"), "Folder of the copies of data sets that are given by name.", group=_WHAT, operational=True
    )
    split: str = option("test", "Split to use of a CLIP_benchmark folder that has several.", group=_WHAT)
    bootstrap: int = option(
        1000,
        "Draws of the images, with replacement, from which 95 % intervals are taken; 0 for none.",
        group=_OUT,
        minimum=0,
    )
    predictions: bool = option(
        False,
        "Also write what was said of each image, as parquet (key, label, predicted, top, scores), beside the sidecar.",
        group=_OUT,
        operational=True,
    )
    compare: bool = option(
        False,
        "Measure nothing, but tell whether the difference of two results is real: `--compare A.json B.json`, two metrics "
        "files of eval/ that were made with --predictions.",
        group=_OUT,
        operational=True,
    )

    def __post_init__(self) -> None:
        """Check that a comparison has two sides and no more to do."""
        super().__post_init__()
        if self.compare:
            self._check_comparison()

    def _check_comparison(self) -> None:
        named = [*([self.model] if self.model is not None else []), *self.data]
        if len(named) != 2:
            raise UsageError(
                f"--compare takes two metrics files; {len(named)} {'was' if len(named) == 1 else 'were'} named.",
                "Name both: clipcid eval-zeroshot --compare A.json B.json",
            )
        if self.bootstrap == 0:
            raise UsageError("--compare draws the images anew, and --bootstrap is 0.", "Give --bootstrap 1000.")
        # What decides a measurement decides nothing here, and its silence would mislead.
        idle = [
            flag_of(field)
            for field in dataclasses.fields(self)
            if field.name not in _COMPARING
            and (field.name == "predictions" or not setting_of(field).operational)
            and getattr(self, field.name) != field.default
        ]
        if idle:
            raise UsageError(
                f"--compare measures nothing: {', '.join(idle)} {'does' if len(idle) == 1 else 'do'} not go with it.",
                "Leave out all but --bootstrap and --seed, or measure first and compare then.",
            )

    @property
    def compared(self) -> tuple[Path, Path]:
        """The two metrics files of ``--compare``."""
        assert self.compare
        assert self.model is not None
        return Path(self.model), Path(self.data[0])
