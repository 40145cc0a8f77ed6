"""Settings of `eval-zeroshot`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from clipcid_cli.errors import UsageError
from clipcid_cli.steps.settings.fields import argument, flag_of, option, setting_of
from clipcid_cli.steps.settings.shared import ReadingSettings

_WHAT = "Models and data"
_OUT = "Results"
# Settings that a comparison follows.
_COMPARING = frozenset({"model", "data", "bootstrap", "seed"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalZeroshotSettings(ReadingSettings):
    """Settings of `eval-zeroshot`."""

    model: str | None = argument(
        None,
        "Model to evaluate: a folder, architecture:tag or hf-hub:org/name. By default, the newest student in the work "
        "directory.",
    )
    data: tuple[str, ...] = argument(
        (),
        "Data sets: CLIP_benchmark folders, one folder of images per class, lists, tar shards, or names such as food101, "
        "imagenet, voc2007 with copies in --data-root. By default, retrieval on the samples that `clipcid distill` held "
        "out.",
    )
    models: tuple[str, ...] = option(
        (), "Another model to evaluate; may be repeated.", group=_WHAT, flag="--model", metavar="MODEL"
    )
    task: str = option(
        "auto",
        "What to measure. `auto` follows the data set's dataset_type.txt; without one, it measures classification if there "
        "are classes and retrieval if there are captions.",
        group=_WHAT,
        choices=("auto", "classification", "multilabel", "retrieval"),
    )
    classnames: str | None = option(
        None,
        "File with one class name per line, class 0 first, or `imagenet` for open_clip's names. By default, the data set's "
        "classnames.txt or folder names.",
        group=_WHAT,
        metavar="FILE",
    )
    templates: str | None = option(
        None,
        "File with one prompt template per line, with {c} or {} for the class name, or `openai` or `simple` for open_clip's "
        "80 or 7 templates. By default, the data set's zeroshot_classification_templates.txt, else `a photo of a {c}.`",
        group=_WHAT,
        metavar="FILE",
    )
    data_root: Path = option(
        Path("data"), "Folder with copies of the data sets given by name.", group=_WHAT, operational=True
    )
    split: str = option("test", "Split of a CLIP_benchmark folder to use.", group=_WHAT)
    bootstrap: int = option(
        1000,
        "Bootstrap samples for the 95% intervals; 0 disables them.",
        group=_OUT,
        minimum=0,
    )
    predictions: bool = option(
        False,
        "Also write the predictions for each image to a parquet file (key, label, predicted, top, scores).",
        group=_OUT,
        operational=True,
    )
    compare: bool = option(
        False,
        "Test whether two results differ significantly instead of measuring: `--compare A.json B.json`, two metrics files "
        "that were made with --predictions.",
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
                f"--compare needs two metrics files, but {len(named)} {'was' if len(named) == 1 else 'were'} given.",
                "Give both: clipcid eval-zeroshot --compare A.json B.json",
            )
        if self.bootstrap == 0:
            raise UsageError(
                "--compare needs bootstrap samples, but --bootstrap is 0.", "Omit --bootstrap or give --bootstrap 1000."
            )
        # Settings of a measurement have no effect here; ignoring them silently would mislead.
        idle = [
            flag_of(field)
            for field in dataclasses.fields(self)
            if field.name not in _COMPARING
            and (field.name == "predictions" or not setting_of(field).operational)
            and getattr(self, field.name) != field.default
        ]
        if idle:
            raise UsageError(
                f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect with --compare, which measures nothing.",
                "Give only --bootstrap and --seed with --compare.",
            )

    @property
    def compared(self) -> tuple[Path, Path]:
        """The two metrics files of ``--compare``."""
        assert self.compare
        assert self.model is not None
        return Path(self.model), Path(self.data[0])
