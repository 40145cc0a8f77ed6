"""Exports: what they are compared on, the gate of what quantisation may cost, and what a model card states."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import warnings
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from balance_data import heard
from conftest import make_image, shard_members, write_class_folders, write_tar
from families import FAMILIES, write_family
from markdown_it import MarkdownIt
from sidecars import make_sidecar

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import open_dataset
from clipcid_cli.formats.fingerprint import record
from clipcid_cli.formats.models.export_sidecar import Parity, PredictionParity
from clipcid_cli.formats.results.metrics import SIDECARS, EvaluationSidecar, Metrics, write_metrics
from clipcid_cli.formats.results.run_folder import DistillSidecar, RunFolder
from clipcid_cli.formats.sidecar import sidecar_path
from clipcid_cli.records import ModelRecord
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import CONFIG_NAME, ModelName, parse_model
from clipcid_cli.steps.export.card import render_card
from clipcid_cli.steps.export.check import Checker
from clipcid_cli.steps.export.folders import write_hf
from clipcid_cli.steps.export.inputs import (
    CheckInputs,
    Classes,
    find_classes,
    find_data,
    read_inputs,
    validate_measurable,
)
from clipcid_cli.steps.export.limits import validate_parity
from clipcid_cli.steps.export.run import ExportResult, run
from clipcid_cli.steps.settings.export import ExportSettings

NAMES = ("cat", "dog", "cow")
QUANTIZED = ExportSettings(format=("onnx",), quantize=("int8",), max_accuracy_drop=0.2)

# Files of each form by which a card goes; `config.json` is written for transformers.js, too.
_ONNX_FILES = ("image_encoder.onnx", "text_encoder.onnx", "tokenizer.json", "config.json", "onnx/text_model.onnx")
FORMS = {
    "open-clip": ("open_clip_config.json", "open_clip_model.safetensors"),
    "hf": ("config.json", "model.safetensors", "tokenizer.json"),
    "onnx": _ONNX_FILES,
    "executorch": ("image_encoder.pte", "text_encoder.pte", "encoders.json", "tokenizer.json"),
    "web": (*_ONNX_FILES, "web/index.html"),
}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ClipModel:
    return load_model(parse_model(str(tiny_model)))


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images each of three classes, in folders called a_cat, b_dog and c_cow."""
    classes = {"a_cat": range(12), "b_dog": range(12, 24), "c_cow": range(24, 36)}
    return write_class_folders(tmp_path_factory.mktemp("drawings"), classes)


def collect(
    model: ClipModel,
    data: Path,
    names: Sequence[str] | None = None,
    count: int | None = None,
    bad: float | None = None,
) -> CheckInputs:
    classes = None if names is None else Classes(tuple(names), ("a {c}",))
    settings = ExportSettings(data=str(data), check_images=count, max_bad_fraction=bad)
    return read_inputs(model, find_data(settings), classes, settings)


def test_a_loss_over_the_limit_is_an_error_that_says_by_how_much(model: ClipModel, drawings: Path) -> None:
    inputs = collect(model, drawings)
    settings = ExportSettings(max_accuracy_drop=0.05)
    checker = Checker(model, inputs, settings)
    top = checker.expected.predicted
    assert top is not None
    right = top == inputs.labels
    assert right.any()
    worse = np.where(right, (top + 1) % 3, top)
    share = float(right.mean())
    said = (
        rf"onnx-int8: acc1 falls from {share:.4f} to 0.0000 on 36 images, by {100 * share:.2f} points \(allowed 5.00\)"
    )
    found = checker.compare_answers(worse, gated=True)
    assert found.drop == pytest.approx(share)
    assert found.agreement == pytest.approx(1 - share)
    with pytest.raises(ClipcidError, match=said):
        validate_parity("onnx-int8", make_parity("int8", zeroshot=found), "m", settings)
    # fp32 forms are judged by their rows alone, and a gain is no loss.
    for nearest, gated in ((worse, False), (inputs.labels, True)):
        zeroshot = checker.compare_answers(nearest, gated=gated)
        validate_parity("onnx", make_parity("fp32", zeroshot=zeroshot), "m", settings)


def make_parity(kind: str, zeroshot: PredictionParity | None = None, **found: Any) -> Parity:
    return Parity(precision=kind, bytes=1, images_per_second=1.0, zeroshot=zeroshot, **found)


def test_rows_that_are_no_numbers_pass_no_limit(model: ClipModel, drawings: Path) -> None:
    settings = ExportSettings(max_difference=1.0, max_accuracy_drop=1.0)
    checker = Checker(model, collect(model, drawings), settings)
    weights = drawings / "a_cat" / "0.png"  # any file, for its size
    for kind in ("fp32", "fp16", "int8"):
        nan = dataclasses.replace(checker.original, texts=lambda tokens: torch.full((len(tokens), 32), torch.nan))
        with pytest.raises(ClipcidError, match=r"the text encoder differs .* Nothing was written"):
            checker.check("onnx", kind, nan, [weights])
        with pytest.raises(ClipcidError, match=r"a cosine of image and class differs .* Nothing was written"):
            validate_parity("classifier", make_parity(kind, max_cosine_difference=torch.nan), "m", settings)
        with pytest.raises(ClipcidError, match=r"search: a cosine of image and text differs .* Nothing was written"):
            validate_parity("search", make_parity(kind, max_cosine_difference=torch.nan), "m", settings)


def test_a_processor_that_makes_other_pixels_is_refused(model: ClipModel, drawings: Path, tmp_path: Path) -> None:
    inputs = collect(model, drawings)
    inverted = dataclasses.replace(inputs, pixels=255 - inputs.pixels)
    with pytest.raises(
        ClipcidError, match=r"in the median picture \(allowed 4.00\), most in [abc]_\w+/\d+, by \d+\.\d\d\."
    ):
        write_hf(Checker(model, inverted, ExportSettings(format=("hf",))), tmp_path)


@pytest.mark.parametrize("name", ["SigLIP 2", pytest.param("MetaCLIP 2", marks=pytest.mark.slow)])
def test_transformers_computes_what_models_with_other_tokenizers_do(name: str, tmp_path: Path) -> None:
    model = load_model(parse_model(str(write_family(tmp_path / "model", FAMILIES[name]))), fresh_seed=1)
    settings = ExportSettings(format=("hf",))
    parity = write_hf(Checker(model, read_inputs(model, None, None, settings), settings), tmp_path)["hf"]
    assert parity.tokenizer is not None
    assert parity.tokenizer["same"] == parity.tokenizer["texts"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        from transformers import AutoModel, AutoProcessor

        found, processor = (kind.from_pretrained(tmp_path) for kind in (AutoModel, AutoProcessor))
        texts = [" Two_Dogs,\n and a CAT", "red"]
        given = processor(text=texts, padding="max_length", truncation=True, return_tensors="pt")
        assert {*given} == {"input_ids"}, "padding is seen, as in open_clip"
        with torch.no_grad():
            rows = found.eval()(**given, pixel_values=torch.ones(2, 3, 32, 32))
            image_rows, text_rows, scale, *bias = model.module(torch.ones(2, 3, 32, 32), model.tokenizer(texts))
            logits = scale * image_rows @ text_rows.T + sum(bias)
    np.testing.assert_allclose(rows.image_embeds, image_rows, atol=1e-5)
    np.testing.assert_allclose(rows.text_embeds, text_rows, atol=1e-5)
    np.testing.assert_allclose(rows.logits_per_image, logits, atol=1e-4)


def test_patches_over_the_limit_are_refused(model: ClipModel, drawings: Path) -> None:
    settings = ExportSettings(format=("onnx",), dense=True, max_difference=1e-3)
    checker = Checker(model, collect(model, drawings), settings)
    weights = drawings / "a_cat" / "0.png"  # any file, for its size
    found = checker.check("onnx", "fp32", checker.original, [weights]).dense
    assert found is not None
    assert found.shape == ["batch", 4, 4, 32]
    dense = checker.original.dense
    assert dense is not None
    moved = dataclasses.replace(checker.original, dense=lambda pixels: 1.01 * dense(pixels))
    with pytest.raises(ClipcidError, match=r"onnx: the grid of patches differs from .* \(allowed 1e-03\)"):
        checker.check("onnx", "fp32", moved, [weights])


def test_images_that_cannot_be_read_are_counted_named_and_limited(model: ClipModel, tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02d}.png").write_bytes(make_image(number) if number != 7 else b"no image")
    with heard() as told:
        inputs = collect(model, tmp_path)
    assert len(inputs.pixels) == 19
    assert inputs.skips.counts == {"unreadable_image": 1}
    assert "1 × unreadable image: 07" in "\n".join(told)
    with pytest.raises(ClipcidError, match=r"1 of 20 samples in .* cannot be used: 5.0%, more than the allowed 4.0%"):
        collect(model, tmp_path, bad=0.04)
    for number in range(12):
        (tmp_path / f"{number:02d}.png").write_bytes(b"no image")
    for named in (str(tmp_path), None):  # None: the data of the work directory
        with pytest.raises(ClipcidError, match=r"12 of 20 samples in .* 60.0%, more than the allowed 50.0%"):
            read_inputs(model, open_dataset(tmp_path), None, ExportSettings(data=named))


def test_8_bits_need_classes_and_images(model: ClipModel, drawings: Path, tiny_shards: Path, tmp_path: Path) -> None:
    unnamed = collect(model, write_tar(tmp_path / "0.tar", shard_members(0, 4, captions=False, classes=2)))
    validate_measurable(unnamed, ExportSettings(format=("onnx",), quantize=("fp16",)))
    with pytest.raises(ClipcidError, match=r"neither captions nor names of classes in .*0\.tar") as caught:
        validate_measurable(unnamed, ExportSettings(format=("onnx",), quantize=("int8",)))
    assert "--classnames" in caught.value.fix
    # 24 captions: one is 4.17 points. 36 classified images: one is 2.78.
    for data, limit, warned in ((tiny_shards, 0.04, True), (drawings, 0.04, False), (drawings, 0.01, True)):
        options = ExportSettings(format=("onnx",), quantize=("int8",), max_accuracy_drop=limit)
        with heard() as told:
            validate_measurable(collect(model, data), options)
        assert any("so one image is" in text for text in told) == warned
    assert "on 36 images, so one image is 2.78 points" in "\n".join(told)


def test_images_without_a_caption_are_left_out_and_counted(model: ClipModel, tmp_path: Path) -> None:
    members = dict(shard_members(0, 12))
    captions = [name for name in members if name.endswith(".txt")]
    members[captions[4]] = b""
    data = write_tar(tmp_path / "0.tar", [*members.items()])
    with heard() as told:
        inputs = collect(model, data, NAMES)  # of which nothing says which image has which
    assert len(inputs.samples) == len(inputs.pixels) == 11
    assert inputs.measure == "text_retrieval_recall@1"
    assert inputs.skips.counts == {"no_caption": 1}
    assert f"1 × no caption: {Path(captions[4]).stem}" in "\n".join(told)
    validate_measurable(inputs, QUANTIZED)
    assert [sample.key for sample in inputs.samples] == [sample.key for sample in collect(model, data).samples]


def test_a_dry_run_refuses_what_the_run_does(tiny_model: Path, tmp_path: Path) -> None:
    data = write_tar(tmp_path / "0.tar", shard_members(0, 24, captions=False))
    settings = dataclasses.replace(QUANTIZED, model=str(tiny_model), data=str(data), work=tmp_path / "work")
    said = "neither captions nor classes in .*0.tar"
    for dry_run in (True, False):
        with pytest.raises(ClipcidError, match=said):
            run(dataclasses.replace(settings, dry_run=dry_run))
    write_tar(data, [*shard_members(0, 2), *shard_members(2, 22, captions=False)])
    for dry_run in (True, False):
        with pytest.raises(ClipcidError, match=r"of 24 images in .*0.tar only 2 have a caption"):
            run(dataclasses.replace(settings, dry_run=dry_run))
    assert not (tmp_path / "work").exists()


def test_folders_of_classes_name_them(drawings: Path, tmp_path: Path) -> None:
    with heard() as told:
        classes = find_classes(ExportSettings(format=("onnx",), classnames=drawings))
    assert classes is not None
    assert classes.names == ("a cat", "b dog", "c cow")
    assert "Classes: a cat, b dog, c cow" in told
    (renamed,) = dataclasses.replace(classes, names=("a cat", "b dog", "cow")).fingerprints()
    assert [renamed] != classes.fingerprints(), "another classifier"


def test_limits_hold_for_what_is_there(tiny_model: Path, drawings: Path, tiny_shards: Path, tmp_path: Path) -> None:
    def export(**changes: Any) -> ExportResult:
        settings = {"model": str(tiny_model), "out": tmp_path / "half", "precision": "fp16", "data": str(drawings)}
        return run(ExportSettings(**(settings | changes)))

    parity = export().parity
    before = {path.name: path.read_bytes() for path in (tmp_path / "half").iterdir()}
    assert export(max_difference=1e-2).parity == parity
    with pytest.raises(ClipcidError, match=r"open-clip: the image encoder differs .* \(allowed 1e-09\)"):
        export(max_difference=1e-9)
    # Other images, or fewer of them, are another check.
    for changes in ({"data": str(tiny_shards)}, {"check_images": 18}):
        with pytest.raises(ClipcidError, match="made with other settings or inputs") as caught:
            export(**changes)
        assert "#compared" in caught.value.message
    assert {path.name: path.read_bytes() for path in (tmp_path / "half").iterdir()} == before


def write_evaluation(
    work: Path,
    name: str,
    weights_hash: str,
    value: float,
    dataset: str | None = None,
    config: str = "",
    task: str = "zeroshot_classification",
    **counts: int,
) -> None:
    """Write what an evaluation leaves, as far as the card reads it."""
    (work / "eval" / SIDECARS).mkdir(parents=True, exist_ok=True)
    metrics = Metrics(
        dataset=dataset or name,
        model="m",
        pretrained="p",
        task=task,
        language="en",
        metrics={"acc1": value},
    )
    write_metrics(work / "eval" / f"{name}.json", metrics)
    inputs = [{"path": "m", "size": 1, "hash": weights_hash}]
    inputs += [{"path": "m/open_clip_config.json", "size": 1, "hash": config}] if config else []
    lines = [{"source": "default", "number": 1, "hash": digest} for digest in ("aa01", "bb02")]
    prompts = dict(zip(("class_names", "templates"), lines, strict=True))
    sidecar = make_sidecar(EvaluationSidecar, inputs=inputs, prompts=prompts, counts={"images": 1234} | counts)
    (work / "eval" / SIDECARS / f"{name}.json").write_text(json.dumps(sidecar))


def render(info: ModelRecord, source: ModelName, **settings: Any) -> str:
    return render_card(info, source, ExportSettings(**settings), {}, [])


def test_metrics_are_those_of_the_same_weights(model: ClipModel, tiny_model: Path, tmp_path: Path) -> None:
    write_evaluation(tmp_path, "own", "blake2b:aa", 0.5)
    write_evaluation(tmp_path, "same", "blake2b:aa", 0.5, config=record(tiny_model / "open_clip_config.json").hash)
    write_evaluation(tmp_path, "copied", "blake2b:aa", 0.5, dataset="own")
    write_evaluation(tmp_path, "others", "blake2b:bb", 0.25)
    write_evaluation(tmp_path, "sampled", "blake2b-sampled:aa", 0.75)
    own = msgspec.structs.replace(model.info, weights_hash="blake2b:aa")
    tagged = ModelName("ViT-B-32:laion2b_s34b_b79k", "tag", architecture="ViT-B-32", tag="laion2b_s34b_b79k")
    for source in (tagged, parse_model(str(tiny_model))):
        card = render(own, source, work=tmp_path)
        assert "| own | zeroshot_classification | acc1 | 1,234 | 0.5000 | aa01, bb02 |" in card
        assert card.count("| own |") == 1
        assert "| same |" in card
        assert "| others |" not in card
        assert "| sampled |" not in card
    assert "A linear probe is" not in card
    write_evaluation(tmp_path, "probe", "blake2b:aa", 0.8, task="linear_probe", repeated_images=12)
    card = render(own, tagged, work=tmp_path)
    assert "| probe | linear_probe, 12 test images among those of training | acc1 |" in card
    assert "A linear probe is fitted and measured on one split" in card
    write_evaluation(tmp_path, "changed", "blake2b:aa", 0.9, config="blake2b:cc")
    assert "| changed |" not in render(own, parse_model(str(tiny_model)), work=tmp_path)


def test_what_a_run_measured_is_stated_of_the_weights_it_wrote(model: ClipModel, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "distill" / "small")
    outputs = [
        {"path": "student", "size": 1, "hash": "blake2b:aa"},
        {"path": "average", "size": 1, "hash": "blake2b:ee"},
    ]
    recall = "image_retrieval_recall@1"
    result = {"steps": 1, "samples": 1, "metrics": {recall: 0.6, f"ema/{recall}": 0.5, f"flags/{recall}": 0.1}}
    counts = {"read": 1500, "used": 900, "held_out": 15, "skipped": {}}
    for folder in run.students(ema=True):
        folder.mkdir(parents=True)
        (folder / CONFIG_NAME).write_text("{}")
    sidecar = make_sidecar(DistillSidecar, outputs=outputs, result=result, counts=counts)
    sidecar_path(run.path, "distill").write_text(json.dumps(sidecar))

    def render_student(folder: Path, weights_hash: str) -> str:
        info = msgspec.structs.replace(model.info, weights_hash=weights_hash)
        source = ModelName(str(folder), "folder", path=folder)
        return render(info, source, work=tmp_path).replace("\\", "")

    def metrics_of(folder: Path, weights_hash: str) -> str:
        card = render_student(folder, weights_hash)
        return card.partition("## Metrics")[2].partition("## Files")[0]

    stated = metrics_of(run.student, "blake2b:aa")
    assert f"| data-held-out | retrieval | {recall} | up to 15 | 0.6000 |" in stated
    assert stated.count(recall) == 1
    assert f"| {recall} | up to 15 | 0.5000 |" in metrics_of(run.student_ema, "blake2b:ee")
    assert "Unknown." in metrics_of(run.student, "blake2b:bb")
    assert "| data; 900 of 1,500 samples used, 15 more held out |" in render_student(run.student, "blake2b:aa")
    write_evaluation(tmp_path, "own", "blake2b:aa", 0.75, dataset="data-held-out")
    assert recall not in metrics_of(run.student, "blake2b:aa")


def test_measurements_of_one_data_set_are_told_apart(model: ClipModel, tiny_model: Path, tmp_path: Path) -> None:
    stem, digest = "photos_m_zeroshot_classification", model.info.weights_hash
    for variant, value in (("", 0.5), ("_caption-lines", 0.25), ("_classnames-aa01_templates-openai", 0.75)):
        write_evaluation(tmp_path, stem + variant, digest, value, dataset="photos")
    card = render(model.info, parse_model(str(tiny_model)), work=tmp_path)
    for data, value in (
        ("photos", "0.5000"),
        ("photos (caption-lines)", "0.2500"),
        ("photos (classnames-aa01, templates-openai)", "0.7500"),
    ):
        assert f"| {data} | zeroshot_classification | acc1 | 1,234 | {value} |" in card


def test_metrics_of_other_weights_than_those_written_say_so(model: ClipModel, tiny_model: Path, tmp_path: Path) -> None:
    write_evaluation(tmp_path, "own", model.info.weights_hash, 0.5)
    source = parse_model(str(tiny_model))
    for precision, said in (
        ("fp16", "Measured on the original model, not on the fp16 weights here;"),
        ("auto", "Measured on the original model;"),
    ):
        assert said in render(model.info, source, work=tmp_path, precision=precision)
    assert "Measured on" not in render(model.info, source, work=tmp_path / "empty")


@pytest.mark.parametrize(
    "forms", [forms for count in (1, 2, 3, 4) for forms in combinations(FORMS, count)], ids="+".join
)
def test_a_card_shows_programs_for_what_is_in_the_folder(
    model: ClipModel, tiny_model: Path, forms: tuple[str, ...]
) -> None:
    files = sorted({file for form in forms for file in FORMS[form]})
    card = render_card(model.info, parse_model(str(tiny_model)), ExportSettings(format=forms), {}, files)
    programs = re.findall(r"^```(?:python|sh)\n(.*?)^```", card.partition("## Use")[2], re.DOTALL | re.MULTILINE)
    libraries = {
        "open-clip": "import open_clip",
        "hf": "import AutoModel",
        "onnx": "onnxruntime",
        "executorch": "executorch.runtime",
        "web": "python -m http.server",
    }
    needed = {*forms, "onnx"} if "web" in forms else {*forms}
    shown = {form for form, words in libraries.items() if any(words in program for program in programs)}
    assert shown == needed
    assert "FOLDER" not in card


def test_names_never_become_tags(model: ClipModel, tiny_model: Path, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>|\n<b>"
    write_evaluation(tmp_path, "own", model.info.weights_hash, 0.5, dataset=evil)
    named = msgspec.structs.replace(model.info, architecture=evil)
    card = render(named, parse_model(str(tiny_model)), work=tmp_path, license=evil)
    assert "<script" not in card
    assert "<b>" not in card
    assert "| &lt;script&gt;alert(1)&lt;/script&gt;\\| &lt;b&gt; | zeroshot_classification |" in card


def test_names_never_become_links_or_marks(model: ClipModel, tiny_model: Path, tmp_path: Path) -> None:
    evil = "[x](http://a.b) ![y](//c.d/e.png) <http://f.g> **h** _i_ `j` ~~k~~ |l\\| $m$ \x1b[31m www.n.o p@q.r https://s.t"
    write_evaluation(tmp_path, "own", model.info.weights_hash, 0.5, dataset=evil)
    named = msgspec.structs.replace(model.info, architecture=evil)
    card = render(named, parse_model(str(tiny_model)), work=tmp_path)
    page = MarkdownIt("commonmark").enable("table").render(card)
    shown = html.escape(evil.replace("\x1b", "\\x1b")).replace("&#x27;", "'")
    assert page.count(shown) == 2
    assert not re.search("<(a|img|em|strong|s) ", page.replace(">", " "))
    assert "\x1b" not in card
    # What GitHub and the hub make links of, wherever it stands.
    assert not re.search(r"(?<!\\)://|www\.|\w@", card.partition("## Use")[0])
