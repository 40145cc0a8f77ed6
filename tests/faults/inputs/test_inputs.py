"""Settings, models and names that do not fit, found before the work. More of them are in the table of tests/cli/."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, make_image, run_clipcid, shard_members, write_tar

LATIN = os.fsdecode(b"caf\xe9")


def said(found: Run, code: int = 1) -> str:
    """Return the error of a command that must end with one, in one line."""
    assert found.returncode == code, found
    assert not found.problems(), found
    return found.said


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("work = 3", "[balance] work is 3, not a path"),
        ("json = 1", "[balance] json is 1, not true or false"),
        ("keep = true", "[balance] keep is True, not a number"),
        ("keep = [0.5]", "[balance] keep is [0.5], not a number"),
        ("keep = {}", "[balance] keep is {}, not a number"),
        ("seed = 1979-05-27", "[balance] seed is datetime.date(1979, 5, 27), not a number"),
        ("linkage = ['star']", "[balance] linkage is ['star'], not text"),
        ('data = "a\\u0000b"', "DATA holds a NUL character"),
        ("keep = inf", "'--keep' in c.toml: inf is not in the range 0<x<=1"),
        ("keep = nan", "--keep nan is not in the range 0<x<=1"),
        ("seed = 0.5", "'--seed' in c.toml: '0.5' is not a valid whole number"),
        ("linkage = 'double'", "'--linkage' in c.toml: 'double' is not one of"),
        ("[eval_zeroshot]", "[eval_zeroshot] is not a command. Did you mean [eval-zeroshot]?"),
        ("[distill]\nstudent = ViT-B-32", "texts in quotes, and switches as true or false"),
        ("keep = 0.5.5", "is not TOML"),
        ("keep = [" + "[" * 5000, "is not TOML"),
        ("seed = " + "9" * 5000, "is not TOML"),
        ("\udcff", ""),  # no text
    ],
)
def test_a_wrong_setting_is_a_usage_error_that_names_it(tmp_path: Path, line: str, expected: str) -> None:
    (tmp_path / "c.toml").write_text(f"[balance]\n{line}\n", errors="surrogateescape")
    assert expected in said(run_clipcid("balance", "--config", "c.toml", cwd=tmp_path, check=False), 2)
    assert os.listdir(tmp_path) == ["c.toml"]


@pytest.mark.parametrize(
    ("entry", "value", "reason"),
    [
        ("", [], "Expected `object`, got `array`."),
        ("model_cfg", [], "Expected `object`, got `array` - at `$.model_cfg`"),
        ("model_cfg.embed_dim", "32", "Expected `int`, got `str` - at `$.model_cfg.embed_dim`"),
        ("model_cfg.embed_dim", -4, "Expected `int` >= 1 - at `$.model_cfg.embed_dim`"),
        ("model_cfg.vision_cfg", [], "at `$.model_cfg.vision_cfg`"),
        ("model_cfg.vision_cfg.image_size", [32, "x"], "at `$.model_cfg.vision_cfg.image_size[1]`"),
        ("model_cfg.vision_cfg.patch_size", 0, ">= 1 - at `$.model_cfg.vision_cfg.patch_size`"),
        ("model_cfg.text_cfg.vocab_size", -1, ">= 1 - at `$.model_cfg.text_cfg.vocab_size`"),
        ("model_cfg.text_cfg.heads", 3, "must be divisible by num_heads"),
        ("model_cfg.text_cfg.hf_model_name", 7, "could not be loaded"),
        ("model_cfg.text_cfg.tokenizer_kwargs", [], "at `$.model_cfg.text_cfg.tokenizer_kwargs`"),
        ("model_cfg.text_cfg.nonsense", 1, "unexpected keyword argument 'nonsense'"),
        ("preprocess_cfg", 3, "got `int` - at `$.preprocess_cfg`"),
        ("preprocess_cfg.resize_mode", "x", "Invalid enum value 'x' - at `$.preprocess_cfg.resize_mode`"),
    ],
)
def test_a_model_whose_configuration_holds_nonsense_is_one_error(
    tiny_model: Path, tmp_path: Path, entry: str, value: Any, reason: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    path = model / "open_clip_config.json"
    config = {"": json.loads(path.read_text())}
    *outer, last = ("", *entry.split(".")) if entry else ("",)
    holder: Any = config
    for name in outer:
        holder = holder[name]
    holder[last] = value
    path.write_text(json.dumps(config[""]))
    assert reason in said(run_clipcid("export", model, "--format", "open-clip", cwd=tmp_path, check=False))


@pytest.mark.parametrize("name", ["b{1}", "{00..03}", "./~x", "{", "x y\n", LATIN])
def test_a_folder_may_be_called_like_a_pattern_or_a_user(tiny_model: Path, tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / name / "0.tar", shard_members(0, 4))
    shutil.copytree(tiny_model, tmp_path / "~model")
    found = run_clipcid("embed", name, "--model", "./~model", "--out", "rows", "--json", cwd=tmp_path)
    assert found.json["images"] == 4


def test_the_users_folder_is_known_where_no_shell_names_it(tiny_model: Path, tiny_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('[embed]\nout = "~/rows"\n')
    command = ("embed", tiny_shards, "--model", tiny_model, "--no-text", "--config=~/c.toml")
    run_clipcid(*command, cwd=tmp_path, env={"HOME": str(tmp_path)})
    assert (tmp_path / "rows" / "embed.json").exists()
    shutil.copytree(tiny_model, tmp_path / "model")
    for split, first in (("train", 0), ("test", 24)):
        write_tar(tmp_path / "data" / split / "0.tar", shard_members(first, 24, classes=3))
    (tmp_path / "names.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "said.txt").write_text("a {c}\n")
    prompts = ("--classnames=~/names.txt", "--templates=~/said.txt", "--task", "classification")
    for line in (("eval-zeroshot", "~/model", "~/data/test/0.tar", *prompts), ("eval-linear", "~/model", "~/data")):
        assert run_clipcid(*line, "--json", cwd=tmp_path, env={"HOME": str(tmp_path)}).json["images"] == 24


@pytest.mark.parametrize("place", ["image", "member", "shard", "work"])
def test_a_name_that_is_not_utf8_is_refused(tiny_model: Path, tmp_path: Path, place: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    members = shard_members(0, 3)
    if place == "image":
        (data / f"{LATIN}.png").write_bytes(make_image(0))
    elif place == "member":
        write_tar(data / "0.tar", [(f"{LATIN}.png", make_image(0))])
    else:
        write_tar(data / f"{LATIN if place == 'shard' else 0}.tar", members)
    work = LATIN if place == "work" else "work"
    found = run_clipcid("embed", data, "--model", tiny_model, "--no-text", "--work", work, cwd=tmp_path, check=False)
    if place == "work":
        assert "--work is 'caf\\udce9', which is not UTF-8" in said(found, 2)
    else:
        assert "the name of a file is not UTF-8: caf" in said(found)
    assert not list(tmp_path.rglob("embed.json"))
