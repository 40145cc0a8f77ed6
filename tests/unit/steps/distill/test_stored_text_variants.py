"""Text variants, embedded beside the captions: which rows they are, and those whose texts are not known."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from sidecars import edit_sidecar
from teaching_data import FP32, embed_data, join, write_captions

from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.formats.embeddings.folder import open_embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.runtime.models.clip_model import ClipModel, load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.runtime.text_variants import TextVariants
from clipcid_cli.steps.settings.embed import EmbedSettings

COUNTS = (1, 3, 2, 5, 1, 4)
VARIANTS = {"text_variants": 3, "seed": 5}


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> ClipModel:
    return load_model(parse_model(str(tiny_model)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captions(tmp_path_factory.mktemp("variants") / "data", COUNTS)


@pytest.fixture(scope="module")
def stored(data: Path, tiny_model: Path) -> Path:
    embed_data(data, tiny_model, data.parent / "tiny", **VARIANTS)
    return data.parent / "tiny"


def captions_of(data: Path) -> list[tuple[str, ...]]:
    from clipcid_cli.formats.data.dataset import open_dataset

    return [sample.captions for shard in open_dataset(str(data)).shards for sample in shard.samples()]


def test_a_variant_has_the_row_of_its_text(stored: Path, data: Path, teacher: ClipModel) -> None:
    embeddings, make = open_embeddings(stored), TextVariants(3, 5)
    assert embeddings.num_each(Kind.VARIANTS) == 3
    assert embeddings.rows(Kind.VARIANTS).shape == (18, 32)
    texts = [make(captions, f"s{row}", number) for row, captions in enumerate(captions_of(data)) for number in range(3)]
    expected = teacher.encode_texts(teacher.tokenizer(texts), FP32).numpy()
    assert np.abs(embeddings.rows(Kind.VARIANTS).read(0, 18) - expected).max() < 6e-4


def test_the_rest_is_what_it_is_without_variants(stored: Path, data: Path, tiny_model: Path, tmp_path: Path) -> None:
    embed_data(data, tiny_model, tmp_path / "plain")
    for kind in ("img_emb", "text_emb", "captions_emb"):
        name = f"{kind}/{kind}_0001.npy"
        assert (tmp_path / "plain" / name).read_bytes() == (stored / name).read_bytes()
    embed_data(data, tiny_model, tmp_path / "two", **VARIANTS)
    name = "variant_emb/variant_emb_0001.npy"
    assert (tmp_path / "two" / name).read_bytes() == (stored / name).read_bytes()
    with pytest.raises(ClipcidError, match=r"settings\.text_variants: null there, 3 now"):
        embed_data(data, tiny_model, tmp_path / "plain", **VARIANTS)
    embed_data(data, tiny_model, tmp_path / "two", overwrite=True)
    assert not list((tmp_path / "two").glob("variant_emb/*.npy"))


def change_sidecar(folder: Path, copy: Path, **settings: object) -> Path:
    shutil.copytree(folder, copy)
    edit_sidecar(copy / "embed.json", lambda found: found["settings"].update(settings) or found.pop("outputs"))
    return copy


def test_variants_whose_texts_are_not_known_are_refused(stored: Path, data: Path, tmp_path: Path) -> None:
    for number, change in enumerate(({"text_variant_rules": 0}, {"text_variants": 2})):
        with pytest.raises(ClipcidError, match=r"holds 3 text variants of each row, but embed\.json") as raised:
            join(data, change_sidecar(stored, tmp_path / str(number), **change))
        assert "--text-variants 3" in raised.value.fix
        assert join(data, tmp_path / str(number), extra_texts=0).inputs.extra_texts is None


@pytest.mark.parametrize(
    ("embedded", "now", "differing"),
    [
        ((1, 1, 1, 1), (1, 1, 2, 1), "'s2' has 2 captions, but 1 were"),
        ((1, 2, 1, 1), (1, 1, 1, 1), "'s1' has 1 captions, but 2"),
    ],
)
def test_other_captions_than_those_varied_are_refused(
    embedded: tuple[int, ...], now: tuple[int, ...], differing: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "embedded by"
    made = {"views": 2, "view_kind": ("strong", "mix"), "crop_scale": 0.5, "seed": 7, "text_variants": 2}
    embed_data(write_captions(tmp_path / "then", embedded), tiny_model, folder, batch_size=16, **made)
    changed = write_captions(tmp_path / "now", now)
    with pytest.raises(ClipcidError, match=differing) as raised:
        join(changed, folder)
    # The command makes all that there is, and can be copied.
    words = shlex.split(raised.value.fix.removeprefix("Run: "))
    given = ["--model", str(tiny_model), "--out", str(folder), "--views", "2", "--view-kind", "strong,mix"]
    given += ["--crop-scale", "0.5", "--text-variants", "2", "--seed", "7", "--overwrite"]
    given += ["--precision", "fp32", "--batch-size", "16"]
    assert words[:3] == ["clipcid", "embed", str(changed)]
    assert sorted(words[3:]) == sorted(given)


def test_variants_of_another_shape_are_refused(stored: Path, tmp_path: Path) -> None:
    copy = change_sidecar(stored, tmp_path / "copy")
    for name in ("embed.json", "manifest.parquet"):
        (copy / name).unlink()
    path = copy / "variant_emb" / "variant_emb_0001.npy"
    np.save(path, np.load(path)[:, :2])
    with pytest.raises(ClipcidError, match=r"holds float16 \[3, 2, 32\]; float16 \[3, 3, 32\] would match"):
        open_embeddings(copy)
    np.save(path, np.zeros((2, 3, 32), np.float16))
    with pytest.raises(ClipcidError, match=r"holds float16 \[2, 3, 32\]; float16 \[3, 3, 32\] would match"):
        open_embeddings(copy)


def test_variants_need_captions() -> None:
    with pytest.raises(UsageError, match="--text-variants embeds captions, --no-text does not"):
        EmbedSettings(data="x", text_variants=2, text=False)
