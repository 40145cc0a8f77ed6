"""A student filled from a larger model: which layers, heads and channels, and what it refuses."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
from conftest import TINY_CONFIG, changed
from torch import nn

from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.models.inherit import evenly_spaced, inherit
from clipcid_cli.runtime.models.towers import freeze

TEACHER = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 48, "layers": 4, "width": 64, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 500, "width": 64, "heads": 4, "layers": 3},
}


def make(config: dict, seed: int) -> nn.Module:  # type: ignore[type-arg]
    torch.manual_seed(seed)
    model: nn.Module = open_clip.CLIP(**copy.deepcopy(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def smaller(**changes: object) -> dict:  # type: ignore[type-arg]
    return changed(TEACHER, **changes)


def test_fewer_layers_take_the_first_the_last_and_between() -> None:
    student, source = make(smaller(vision_cfg__layers=2, text_cfg__layers=2), 0), make(TEACHER, 1)
    assert inherit(student, source, "both") == []
    own, others = student.state_dict(), source.state_dict()
    for prefix, pairs in (("visual.transformer", {0: 0, 1: 3}), ("transformer", {0: 0, 1: 2})):
        for here, there in pairs.items():
            name = f"{prefix}.resblocks.%d.mlp.c_fc.weight"
            assert torch.equal(own[name % here], others[name % there])


def test_a_narrower_tower_takes_whole_heads_and_the_same_channels_everywhere() -> None:
    student, source = make(smaller(vision_cfg__width=32, embed_dim=48), 0), make(TEACHER, 1)
    assert inherit(student, source, "image") == []
    own, others = student.state_dict(), source.state_dict()
    channels = evenly_spaced(32, 64)
    heads = torch.cat([torch.arange(16), 48 + torch.arange(16)])  # heads 0 and 3 of 4
    name = "visual.transformer.resblocks.1.attn.in_proj_weight"
    rows = torch.cat([heads, 64 + heads, 128 + heads])
    assert torch.equal(own[name], others[name][rows][:, channels])
    name = "visual.transformer.resblocks.1.attn.out_proj.weight"
    assert torch.equal(own[name], others[name][channels][:, heads])
    name = "visual.positional_embedding"
    assert torch.equal(own[name], others[name][:, channels])
    assert torch.equal(own["visual.proj"], others["visual.proj"][channels])


def test_other_sizes_of_image_text_and_vocabulary() -> None:
    config = smaller(vision_cfg__image_size=32, text_cfg__context_length=10, text_cfg__vocab_size=400)
    student, source = make(config, 0), make(TEACHER, 1)
    before = student.token_embedding.weight.detach().clone()
    assert inherit(student, source, "both") == ["token_embedding.weight"]
    assert torch.equal(student.token_embedding.weight, before)
    assert torch.equal(student.positional_embedding, source.positional_embedding[:10])
    assert torch.equal(student.visual.positional_embedding[0], source.visual.positional_embedding[0])
    # A constant grid stays that constant when it is resampled.
    with torch.no_grad():
        source.visual.positional_embedding[1:] = 0.25
    inherit(student, source, "image")
    torch.testing.assert_close(student.visual.positional_embedding[1:], torch.full((4, 64), 0.25))


def test_one_tower_leaves_the_other_as_it_was() -> None:
    student, source = make(TEACHER, 0), make(TEACHER, 1)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    inherit(student, source, "text")
    after = student.state_dict()
    for name, tensor in before.items():
        same = torch.equal(after[name], tensor)
        assert same == (name.startswith("visual.") or name == "logit_scale"), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_cfg__layers": 6}, "6 layers"),
        ({"vision_cfg__width": 128}, "larger"),
        ({"text_cfg__context_length": 32}, "32 tokens"),
    ],
)
def test_refuses_a_model_that_is_smaller_or_of_another_kind(changes: dict[str, int], words: str) -> None:
    source = make(TEACHER, 1)
    with pytest.raises(ClipcidError, match=words):
        inherit(make(smaller(**changes), 0), source, "both")
    with pytest.raises(ClipcidError, match="different kinds"):
        inherit(nn.Sequential(nn.Linear(3, 3)), source, "both")


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_frozen_tower_has_no_trained_parameter(tower: str) -> None:
    model: nn.Module = open_clip.CLIP(**TINY_CONFIG)
    modules = freeze(model, tower)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "logit_scale" in trained
    assert any(name.startswith("visual.") for name in trained) == (tower == "text")
    assert ("token_embedding.weight" in trained) == (tower == "image")
    assert (model.visual in modules) == (tower == "image")
