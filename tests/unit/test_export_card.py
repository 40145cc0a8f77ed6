"""The model card's metrics: those that were measured on the very weights, whatever the model was called."""

from __future__ import annotations

from pathlib import Path

import torch

from clipcid_cli.formats.metrics_file import SIDECARS, make_metrics, write_metrics
from clipcid_cli.formats.output import open_output
from clipcid_cli.runtime.encoder import load_model
from clipcid_cli.runtime.model_names import parse_model
from clipcid_cli.steps.export_card import describe_export
from clipcid_cli.steps.settings.export import ExportSettings


def test_metrics_are_found_by_the_hash_of_the_weights(tiny_model: Path, tmp_path: Path) -> None:
    info = load_model(parse_model(str(tiny_model)), torch.device("cpu")).info
    folder = tmp_path / "eval"
    for stem, weights in (("mine", info.weights_hash), ("other", "blake2b:00")):
        metrics = {"acc1": 0.25}
        write_metrics(
            folder / f"{stem}.json",
            make_metrics(dataset=stem, model="m", pretrained="p", task="zeroshot_classification", metrics=metrics),
        )
        inputs = [{"path": "ViT-B-32:openai", "size": 1, "hash": weights}]
        with open_output(folder / SIDECARS, stem, settings={}, inputs=inputs, overwrite=False) as output:
            output.commit(counts={}, seconds={})
    # A model with a tag has no folder of its own.
    card = describe_export(info, parse_model("ViT-B-32:openai"), ExportSettings(work=tmp_path), {})
    assert card.metrics == [("mine", "zeroshot_classification", "acc1", 0.25)]
