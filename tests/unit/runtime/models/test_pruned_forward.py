"""The pruned forward passes give open_clip's own features and gradients."""

import json
from pathlib import Path
from typing import Any

import numpy as np
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
from clipcid_cli.runtime.models.packed_sizes import lengthen, round_up_texts
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
    model: ClipModel, pruned: bool, tokens: Tensor, dtype: torch.dtype = torch.float32, *, in_few_sizes: bool = False
) -> tuple[Tensor, Tensor, dict[str, Tensor], PrunedForward]:
    """Encode six images and the texts, and take gradients of a function of every feature."""
    module: Any = model.module
    module.to(dtype).zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(6, 3, 32, 32, generator=generator).to(dtype)
    towers = PrunedForward(module, in_few_sizes=in_few_sizes)
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


def compare_with_open_clip(model: ClipModel, tokens: Tensor, *, in_few_sizes: bool = False) -> None:
    # In float64, where what a wrong pass would change cannot hide behind rounding.
    image, text, gradients, _ = features(model, False, tokens, torch.float64)
    pruned_image, pruned_text, pruned_gradients, towers = features(
        model, True, tokens, torch.float64, in_few_sizes=in_few_sizes
    )
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


def test_batches_in_few_sizes_give_the_same_features_and_gradients(tmp_path: Path) -> None:
    model = load(tmp_path, text_cfg__context_length=77)
    random = np.random.default_rng(0)
    tower: Any = model.module
    places = list[Tensor]()
    tower.transformer.resblocks[0].mlp.register_forward_pre_hook(lambda _, inputs: places.append(inputs[0]))
    sizes = dict[bool, set[int]]()
    for in_few_sizes in (False, True):
        places.clear()
        for _ in range(12):
            counts = random.lognormal(2.5, 0.6, 64).astype(int)
            texts = model.tokenizer(["word " * count for count in counts.clip(1, 75)])
            with torch.no_grad():
                PrunedForward(tower, in_few_sizes=in_few_sizes).encode_texts(texts)
        sizes[in_few_sizes] = {len(rows) for rows in places}
    assert len(sizes[False]) == 12
    assert all(count % 16 == 0 for count in sizes[True])
    few = [["word " * count for count in counts] for counts in ((3, 9, 1, 20, 40, 75, 75, 2), (1, 1, 1), (80, 80))]
    for captions in few:
        compare_with_open_clip(model, model.tokenizer(captions), in_few_sizes=True)


def test_hundreds_of_batches_have_a_handful_of_sizes() -> None:
    random = np.random.default_rng(0)
    sizes, tokens, packed = set[int](), 0, 0
    for _ in range(200):
        lengths = torch.from_numpy(random.lognormal(np.log(15), 0.55, 512).astype(int).clip(3, 16))
        longer = lengthen(lengths, 16, 512)
        assert bool(((lengths <= longer) & (longer <= 16)).all())
        tokens, packed = tokens + int(lengths.sum()), packed + int(longer.sum())
        sizes.add(int(longer.sum()))
    assert len(sizes) <= 6
    assert packed < 1.02 * tokens
    assert [round_up_texts(count, 512) for count in (1, 32, 33)] == [32, 32, 64]
    full = torch.full((5,), 16)
    assert torch.equal(lengthen(full, 16, 512), full), "nothing can be added"


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
