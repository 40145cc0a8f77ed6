"""The pruned forward passes give open_clip's own features and gradients."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_CONFIG, changed
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.runtime.models.pruned_forward import PrunedForward
from clipcid_cli.runtime.models.tower_modules import DenseImageTower
from clipcid_cli.runtime.precision import fast_attention

CAPTIONS = ["a red square", "", "two cats, a dog and a very long list of other animals of every kind and size", "sky"]


def load(tmp_path: Path, **changes: Any) -> ClipModel:
    """Make a model of the tiny configuration with some values of it changed; its projections are not square."""
    path = tmp_path / "model.json"
    path.write_text(json.dumps(changed(TINY_CONFIG, **{"embed_dim": 24} | changes)))
    return load_model(parse_model(str(path)), fresh_seed=3)


def features(
    model: ClipModel, pruned: bool, tokens: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, dict[str, Tensor], PrunedForward]:
    """Encode six images and the texts, and take gradients of a function of every feature."""
    module: Any = model.module
    module.to(dtype).zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(6, 3, 32, 32, generator=generator).to(dtype)
    towers = PrunedForward(module)
    if pruned:
        image, text = towers.encode_images(pixels), towers.encode_texts(tokens)
    else:
        image, text = module.encode_image(pixels), module.encode_text(tokens)
    (image.sin().sum() + text.cos().sum()).backward()
    gradients = {name: value.grad for name, value in module.named_parameters() if value.grad is not None}
    return image.detach(), text.detach(), gradients, towers


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vision_cfg__layers": 1, "text_cfg__layers": 1},
        {"custom_text": True},
        {"quick_gelu": True},
        {"vision_cfg__ls_init_value": 0.1, "text_cfg__ls_init_value": 0.1},
        {"text_cfg__proj_type": "none", "text_cfg__width": 24, "custom_text": True},
        {"text_cfg__proj_bias": True},
    ],
    ids=["plain", "one layer", "custom text", "quick gelu", "layer scale", "no projection", "projection with bias"],
)
def test_equal_to_open_clip(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = load(tmp_path, **changes)
    for captions in (CAPTIONS, ["word " * 40, "word " * 40]):
        compare_with_open_clip(model, model.tokenizer(captions))


def compare_with_open_clip(model: ClipModel, tokens: Tensor) -> None:
    # In float64, where what a wrong pass would change cannot hide behind rounding.
    image, text, gradients, _ = features(model, False, tokens, torch.float64)
    pruned_image, pruned_text, pruned_gradients, towers = features(model, True, tokens, torch.float64)
    assert (towers.prunes_images, towers.prunes_texts) == (True, True)
    torch.testing.assert_close(pruned_image, image, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pruned_text, text, rtol=1e-9, atol=1e-9)
    assert pruned_gradients.keys() == gradients.keys()
    for name, expected in gradients.items():
        torch.testing.assert_close(pruned_gradients[name], expected, rtol=1e-7, atol=1e-9)


def test_a_long_text_does_not_make_short_ones_attend_further(tmp_path: Path) -> None:
    model = load(tmp_path, text_cfg__context_length=77)
    tokens = model.tokenizer(["sky", "word " * 60, "a red square", "word " * 20, "", "word " * 70])
    compare_with_open_clip(model, tokens)

    def operations(texts: list[int]) -> int:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
            PrunedForward(model.module).encode_texts(tokens[texts])
        return counted.get_total_flops()

    assert operations([0, 1, 2, 3, 4, 5]) == operations([0, 2, 4]) + operations([3]) + operations([1, 5])


@pytest.mark.parametrize(
    ("changes", "image", "text"),
    [
        ({"vision_cfg__pool_type": "avg"}, False, True),
        ({"vision_cfg__attentional_pool": True}, False, True),
        ({"text_cfg__no_causal_mask": True, "custom_text": True}, True, False),
        ({"text_cfg__pool_type": "last", "custom_text": True}, True, False),
        ({"text_cfg__embed_cls": True, "custom_text": True}, True, False),
    ],
    ids=["average", "attention pooling", "not causal", "last token", "class token"],
)
def test_other_structures_go_open_clips_way(tmp_path: Path, changes: dict[str, Any], image: bool, text: bool) -> None:
    model = load(tmp_path, **changes)
    tokens = model.tokenizer(CAPTIONS)
    model.module.eval()
    plain_image, plain_text, _, _ = features(model, False, tokens)
    pruned_image, pruned_text, _, towers = features(model, True, tokens)
    assert (towers.prunes_images, towers.prunes_texts) == (image, text)
    torch.testing.assert_close(pruned_image, plain_image, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pruned_text, plain_text, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_no_bit_and_halves_the_memory(tmp_path: Path) -> None:
    model = load(tmp_path)
    tower: Any = model.module
    tower.train()
    tokens = model.tokenizer(CAPTIONS)
    found, saved = [], []
    with torch.autocast("cpu", dtype=torch.bfloat16), fast_attention(model.device, torch.bfloat16):
        for checkpoints in (False, True):
            tower.set_grad_checkpointing(checkpoints)
            sizes = list[int]()

            def note(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
                sizes.append(tensor.nbytes)
                return tensor

            with saved_tensors_hooks(note, lambda tensor: tensor):
                _, _, gradients, towers = features(model, True, tokens)
            found.append(gradients)
            saved.append(sum(sizes))
    assert towers.prunes_images
    assert towers.prunes_texts
    assert saved[1] < saved[0] / 2
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


class Keep(torch.nn.Module):
    """Stands where open_clip drops patches, and keeps given ones."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, rows: Tensor) -> Tensor:
        patches = torch.stack([image[numbers] for image, numbers in zip(rows[:, 1:], self.kept, strict=True)])
        return torch.cat([rows[:, :1], patches], dim=1)


def test_masked_images_are_those_of_open_clip_without_the_other_patches(tmp_path: Path) -> None:
    module: Any = load(tmp_path).module.double()
    passes = PrunedForward(module)
    assert passes.num_patches == 16
    random = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, 3, 32, 32, generator=random).double()
    kept = torch.stack([torch.randperm(16, generator=random)[:4].sort().values for _ in range(3)])
    found = passes.encode_masked_images(pixels, kept)
    module.visual.patch_dropout = Keep(kept)
    torch.testing.assert_close(found, module.encode_image(pixels), rtol=1e-9, atol=1e-9)
    assert passes.num_patches is None  # whose numbers would be those of other patches


@pytest.mark.parametrize(
    "changes",
    [{}, {"custom_text": True}, {"text_cfg__proj_bias": True}, {"vision_cfg__layers": 1, "text_cfg__layers": 1}],
)
def test_tokens_are_those_of_open_clip(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = load(tmp_path, **changes)
    module: Any = model.module.double()
    passes, tokens = PrunedForward(module), model.tokenizer(CAPTIONS)
    assert passes.has_tokens
    pixels = torch.randn(len(CAPTIONS), 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    image, text, patches, pieces = passes.encode_tokens(pixels, tokens)
    torch.testing.assert_close(image, module.encode_image(pixels), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(text, module.encode_text(tokens), rtol=1e-9, atol=1e-9)
    _, dense = DenseImageTower(module)(pixels)
    torch.testing.assert_close(patches, dense.flatten(1, 2), rtol=1e-9, atol=1e-9)
    assert pieces.shape == (len(CAPTIONS), 12, 24)
    whole: Any = getattr(module, "text", module)
    for number, end in enumerate(tokens.argmax(dim=1).tolist()):
        assert pieces[number, end + 1 :].abs().sum() == 0
        row = whole.token_embedding(tokens[number, : end + 1]) + whole.positional_embedding[: end + 1]
        mask = whole.attn_mask[: end + 1, : end + 1].double()
        through = whole.ln_final(whole.transformer(row[None], attn_mask=mask))[0]
        projection = whole.text_projection
        expected = projection(through) if isinstance(projection, torch.nn.Linear) else through @ projection
        torch.testing.assert_close(pieces[number, : end + 1], expected, rtol=1e-9, atol=1e-9)
