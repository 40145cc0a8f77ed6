"""A student filled from a larger model: which layers, heads and channels, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import changed
from families import FAMILIES, write_family
from torch import nn

from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.models.inherit import evenly_spaced, inherit
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import parse_model

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


def rows_of_heads(parts: int) -> torch.Tensor:
    """The rows of heads 0 and 3 of 4, 16 wide each, in so many stacked matrices: of queries, keys and values."""
    heads = torch.cat([torch.arange(16), 48 + torch.arange(16)])
    return torch.cat([64 * part + heads for part in range(parts)])


def test_fewer_layers_take_the_first_the_last_and_between() -> None:
    student, source = make(smaller(vision_cfg__layers=2, text_cfg__layers=2), 0), make(TEACHER, 1)
    assert inherit(student, source, "both") == []
    own, others = student.state_dict(), source.state_dict()
    for prefix, pairs in (("visual.transformer", {0: 0, 1: 3}), ("transformer", {0: 0, 1: 2})):
        for here, there in pairs.items():
            name = f"{prefix}.resblocks.%d.mlp.c_fc.weight"
            assert torch.equal(own[name % here], others[name % there])


def test_pooling_by_attention_stays_as_it_is_and_its_heads_are_not_the_layers() -> None:
    pooled = {
        "vision_cfg__attentional_pool": True,
        "vision_cfg__attn_pooler_queries": 4,
        "vision_cfg__attn_pooler_heads": 3,
    }
    student, source = make(smaller(vision_cfg__width=32, **pooled), 0), make(smaller(**pooled), 1)
    left = inherit(student, source, "image")
    assert left
    assert all(name.startswith("image attn_pool.") for name in left)
    name = "visual.transformer.resblocks.1.attn.in_proj_bias"
    assert torch.equal(student.state_dict()[name], source.state_dict()[name][rows_of_heads(3)])


def test_a_narrower_tower_takes_whole_heads_and_the_same_channels_everywhere_and_the_other_stays() -> None:
    student, source = make(smaller(vision_cfg__width=32, embed_dim=48), 0), make(TEACHER, 1)
    before = copy.deepcopy(student.state_dict())
    assert inherit(student, source, "image") == []
    own, others = student.state_dict(), source.state_dict()
    channels = evenly_spaced(32, 64)
    name = "visual.transformer.resblocks.1.attn.in_proj_weight"
    assert torch.equal(own[name], others[name][rows_of_heads(3)][:, channels])
    name = "visual.transformer.resblocks.1.attn.out_proj.weight"
    assert torch.equal(own[name], others[name][channels][:, rows_of_heads(1)])
    name = "visual.positional_embedding"
    assert torch.equal(own[name], others[name][:, channels])
    assert torch.equal(own["visual.proj"], others["visual.proj"][channels])
    for name, tensor in before.items():
        assert torch.equal(own[name], tensor) == (not name.startswith("visual.")), name


def test_another_length_of_texts_and_another_vocabulary() -> None:
    config = smaller(text_cfg__context_length=10, text_cfg__vocab_size=400)
    student, source = make(config, 0), make(TEACHER, 1)
    before = student.token_embedding.weight.detach().clone()
    assert inherit(student, source, "both") == ["text token_embedding.weight"]
    assert torch.equal(student.token_embedding.weight, before)
    assert torch.equal(student.positional_embedding, source.positional_embedding[:10])


@pytest.mark.parametrize(
    ("there", "here"), [([32, 96], [16, 48]), ([64, 128], [32, 64]), ([32, 96], [48, 64])], ids=str
)
def test_positions_keep_their_rows_and_columns(there: list[int], here: list[int]) -> None:
    sizes = ({"vision_cfg__patch_size": 8, "vision_cfg__image_size": size} for size in (here, there))
    student, source = (make(smaller(**size), seed) for seed, size in enumerate(sizes))
    rows, columns = (side // 8 for side in there)
    with torch.no_grad():  # each row of patches is a constant of its own
        source.visual.positional_embedding[1:] = torch.arange(rows).repeat_interleave(columns)[:, None].float()
    assert inherit(student, source, "image") == []
    assert torch.equal(student.visual.positional_embedding[0], source.visual.positional_embedding[0])
    found = student.visual.positional_embedding[1:].unflatten(0, [side // 8 for side in here])
    torch.testing.assert_close(found, found[:, :1].expand_as(found))
    assert (found[1:] > found[:-1]).all()


def test_what_is_computed_otherwise_is_named() -> None:
    changes = {"vision_cfg__head_width": 32, "text_cfg__pool_type": "last"}
    student, source = make(smaller(**changes) | {"quick_gelu": True}, 0), make(TEACHER, 1)
    assert inherit(student, source, "both") == [
        "image activation (QuickGELU, GELU there)",
        "image width of heads (32, 16 there)",
        "text activation (QuickGELU, GELU there)",
        "text pooling (last, argmax there)",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_cfg__layers": 6}, "6 layers"),
        ({"vision_cfg__width": 128}, "larger"),
        ({"text_cfg__context_length": 32}, "32 tokens"),
    ],
)
def test_refuses_a_model_that_is_smaller(changes: dict[str, int], words: str) -> None:
    with pytest.raises(ClipcidError, match=words):
        inherit(make(smaller(**changes), 0), make(TEACHER, 1), "both")


def test_a_vit_of_timm_with_attention_pooling_takes_whole_heads_of_every_attention(tmp_path: Path) -> None:
    def make_siglip(seed: int, width: int, side: int, layers: int, **more: bool) -> nn.Module:
        family = FAMILIES["SigLIP"]
        smaller = family.smaller | {"embed_dim": width, "vision_cfg__image_size": side}
        trunk = {"img_size": side, "embed_dim": width, "num_heads": width // 16, "depth": layers, **more}
        folder = write_family(tmp_path / str(seed), dataclasses.replace(family, smaller=smaller, trunk=trunk))
        return load_model(parse_model(str(folder)), fresh_seed=seed).module

    student, source = make_siglip(0, 32, 32, 1), make_siglip(1, 64, 48, 2)
    with_class = make_siglip(2, 64, 48, 2, class_token=True)
    with pytest.raises(ClipcidError, match=r"4 positions for a grid of \(2, 2\) patches, the model's 10 for \(3, 3\)"):
        inherit(student, with_class, "image")
    assert inherit(student, source, "image") == []
    own, others = student.state_dict(), source.state_dict()
    channels = evenly_spaced(32, 64)
    for name, parts in {"blocks.0.attn.qkv": 3, "attn_pool.kv": 2, "attn_pool.q": 1}.items():
        found, there = (weights[f"visual.trunk.{name}.weight"] for weights in (own, others))
        assert torch.equal(found, there[rows_of_heads(parts)][:, channels])
    # A constant grid stays that constant when it is resampled: there is no class token.
    with torch.no_grad():
        source.visual.trunk.pos_embed.fill_(0.25)
    inherit(student, source, "image")
    torch.testing.assert_close(student.visual.trunk.pos_embed, torch.full((1, 4, 32), 0.25))


def test_chooses_channels_only_where_the_layout_of_the_attention_is_known() -> None:
    student = make(smaller(vision_cfg__width=32), 0)
    resnet = make(smaller(vision_cfg__layers=[1, 1, 1, 1]), 1)
    with pytest.raises(ClipcidError, match="image towers of student and model are of different kinds"):
        inherit(student, resnet, "both")
    # Attention of open_clip's own with norms of its own: tensors of the same names and shapes beside them.
    attention = {"vision_cfg__block_type": "custom", "vision_cfg__qk_norm": True}
    other = make(smaller(**attention), 1)
    assert other.visual.transformer.resblocks[0].attn.in_proj_weight.shape == (192, 64)
    with pytest.raises(ClipcidError, match="where the attention layout is known") as caught:
        inherit(student, other, "image")
    assert "--init-towers text" in str(caught.value.fix)
    assert inherit(make(smaller(**attention), 0), other, "image") == [], "its own is copied whole"
