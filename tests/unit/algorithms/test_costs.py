"""The formulas of a CLIP's costs beside what PyTorch counts of the real passes."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import TINY_CONFIG, changed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clipcid_cli.algorithms.costs import describe_clip
from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.models.pruned_forward import PrunedForward

_SAMPLES, _TOKENS = 2, 9
_CONFIG = changed(
    TINY_CONFIG,
    vision_cfg__width=64,
    vision_cfg__layers=4,
    vision_cfg__mlp_ratio=3.0,
    text_cfg__width=48,
    text_cfg__heads=4,
    text_cfg__layers=3,
)


def make_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.zeros(_SAMPLES, 12, dtype=torch.long)
    tokens[:, : _TOKENS - 1] = 5
    tokens[:, _TOKENS - 1] = 49407  # the end of a text
    return torch.zeros(_SAMPLES, 3, 32, 32), tokens


def test_operations_and_parameters_are_those_of_the_model() -> None:
    module = open_clip.CLIP(**_CONFIG)
    clip = describe_clip(_CONFIG, _TOKENS)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        features = PrunedForward(module)(*make_inputs())
    assert forward.get_total_flops() == _SAMPLES * clip.operations
    with FlopCounterMode(display=False) as backward:
        torch.stack(features).sum().backward()
    both = forward.get_total_flops() + backward.get_total_flops()
    # No gradient reaches the pixels.
    assert both == pytest.approx(_SAMPLES * clip.training_operations, rel=0.05)
    assert clip.parameters == sum(parameter.numel() for parameter in module.parameters())


def test_what_waits_for_the_backward_pass_is_estimated_within_a_quarter() -> None:
    module = open_clip.CLIP(**_CONFIG)
    of_model = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept = dict[int, torch.UntypedStorage]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = PrunedForward(module)(*make_inputs())
    taken = sum(storage.nbytes() for place, storage in kept.items() if place not in of_model)
    assert len(features) == 2
    assert _SAMPLES * describe_clip(_CONFIG, _TOKENS).kept_bytes(mixed=False) == pytest.approx(taken, rel=0.25)


def test_muon_is_counted_by_its_products() -> None:
    from clipcid_cli.training.optimisers import orthogonalise

    clip = describe_clip(_CONFIG)
    with FlopCounterMode(display=False) as counted:
        for short, long in (*clip.image.matrices(), *clip.text.matrices()):
            orthogonalise(torch.ones(1, short, long), torch.float32)
    assert counted.get_total_flops() == clip.optimizer_operations


@pytest.mark.parametrize("name", ["RN50", "ViT-B-16-SigLIP", "roberta-ViT-B-32"])
def test_other_towers_are_refused(name: str) -> None:
    config = json.loads((Path(open_clip.__file__).parent / "model_configs" / f"{name}.json").read_text())
    with pytest.raises(ClipcidError, match="operations of this model are not known"):
        describe_clip(config)
