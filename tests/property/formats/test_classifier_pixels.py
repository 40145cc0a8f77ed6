"""Resizing, cropping and normalising inside an ONNX file: for images of any size, the pixels of open_clip's transform."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from clipcid_cli.formats.models.onnx_file import write_classifier

SIDE = 8
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def preprocess(resize_mode: str, interpolation: str) -> dict[str, object]:
    return {
        "size": [SIDE, SIDE],
        "mean": list(MEAN),
        "std": list(STD),
        "resize_mode": resize_mode,
        "interpolation": interpolation,
    }


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], onnxruntime.InferenceSession]:
    """Classifiers whose encoder only flattens, and whose classes are its entries: their logits are the pixels."""
    folder = tmp_path_factory.mktemp("pixels")
    width = 3 * SIDE * SIDE
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["pixel_values"], ["image_embeds"], axis=1)],
        "flatten",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("image_embeds", TensorProto.FLOAT, ["batch", width])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    names = [str(number) for number in range(width)]
    made = {}
    for resize_mode in ("shortest", "squash"):
        for interpolation in ("bicubic", "bilinear"):
            path = folder / f"{resize_mode}-{interpolation}.onnx"
            pixels = json.dumps(preprocess(resize_mode, interpolation))
            helper.set_model_props(model, {"preprocess": pixels, "logit_scale": "1", "logit_bias": "0"})
            onnx.save(model, folder / "flat.onnx")
            write_classifier(path, folder / "flat.onnx", np.eye(width, dtype=np.float32), names, ["{}"])
            onnx.checker.check_model(onnx.load(path), full_check=True)
            made[resize_mode, interpolation] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return made


@settings(max_examples=60)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    seed=st.integers(0, 9),
    resize_mode=st.sampled_from(["shortest", "squash"]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
)
def test_pixels_are_those_of_open_clip(
    sessions: dict[tuple[str, str], onnxruntime.InferenceSession],
    width: int,
    height: int,
    seed: int,
    resize_mode: str,
    interpolation: str,
) -> None:
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    config = PreprocessCfg(**preprocess(resize_mode, interpolation))
    expected = image_transform_v2(config, is_train=False)(image).numpy()
    (found,) = sessions[resize_mode, interpolation].run(["logits"], {"image": np.asarray(image)[None]})
    levels = np.abs(found.reshape(3, SIDE, SIDE) - expected) * np.reshape(STD, (3, 1, 1)) * 255
    # A byte between two levels may be rounded the other way; a wrong filter or crop moves bytes by tens of levels.
    assert levels.max() < 1.01
