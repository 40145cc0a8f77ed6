"""A zero-shot classifier in one ONNX file: bytes of an image of any size in, one score per class out.

Resizing and cropping are operators of the graph, so whoever runs it needs no preprocessing of their own. ONNX's antialiased
cubic with coefficient −0.5 on bytes is Pillow's bicubic; ONNX Runtime gives the same bytes except for about one in
10,000, which is off by one level. (Where tall images are squashed, Pillow 13 and later resize the height first, earlier ones
and ONNX Runtime the width; bytes that are clipped in between then differ.)

Legend of shapes: N images, H × W pixels of any size, S the model's side, C classes, D width of the embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.onnx_file import IMAGE_EMBEDS, PIXEL_VALUES, PROTOBUF_LIMIT

IMAGE, LOGITS, PROBABILITIES = "image", "logits", "probabilities"
_MODES: dict[str, dict[str, Any]] = {
    # Pillow's coefficient; ONNX's own default is −0.75.
    "bicubic": {"mode": "cubic", "cubic_coeff_a": -0.5},
    "bilinear": {"mode": "linear"},
}


def check_pixels_expressible(preprocess: Mapping[str, Any]) -> int:
    """Make sure that the model's preprocessing can be part of the graph.

    Args:
        preprocess: open_clip's ``preprocess_cfg``, complete.

    Returns:
        S.

    Raises:
        ClipcidError: naming the entry that cannot.
    """
    size = preprocess["size"]
    sides = set(size) if isinstance(size, list | tuple) else {size}
    for name, good in (
        ("size", len(sides) == 1),
        ("resize_mode", preprocess["resize_mode"] in ("shortest", "squash")),
        ("interpolation", preprocess["interpolation"] in _MODES),
    ):
        if not good:
            raise ClipcidError(
                f"classifier.onnx: preprocess_cfg.{name} is {preprocess[name]!r}, which the graph cannot express.",
                "Omit --classnames, and prepare pixels as the metadata of image_encoder.onnx say.",
            )
    return int(sides.pop())


def write_classifier(
    path: Path,
    encoder: Path,
    weights: np.ndarray[Any, Any],
    *,
    scale: float,
    bias: float,
    preprocess: Mapping[str, Any],
    class_names: Sequence[str],
    templates: Sequence[str],
) -> None:
    """Put preprocessing before an image encoder and class weights after it.

    The input ``image`` is uint8, RGB, [N, H, W, 3] (ONNX fixes the number of axes); the outputs are ``logits`` (scale ×
    cosine + bias) and ``probabilities`` (their softmax), float32 [N, C]. Class names are in the metadata:
    ``class_names``, a JSON list.

    Args:
        encoder: Image encoder as `write_onnx` or `write_quantized` wrote it: ``pixel_values`` to ``image_embeds``.
        weights: Class weights, float32 [C, D], unit rows.
        bias: Added to the scaled cosines; 0 for most models.
        preprocess: open_clip's ``preprocess_cfg`` that `check_pixels_expressible` accepted.
        templates: Prompt templates that the weights were made with, for the metadata.

    Raises:
        ClipcidError: when it does not fit into one file.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(encoder)
    graph = model.graph
    constants: list[Any] = []

    def constant(name: str, values: Any, dtype: str) -> str:
        constants.append(numpy_helper.from_array(np.asarray(values, dtype=dtype), name))
        return name

    before = _preprocessing_nodes(preprocess, constant)
    after = [
        helper.make_node("MatMul", [IMAGE_EMBEDS, constant("class_weights", weights.T, "float32")], ["cosines"]),
        helper.make_node("Mul", ["cosines", constant("class_scale", scale, "float32")], ["scaled_cosines"]),
        helper.make_node("Add", ["scaled_cosines", constant("class_bias", bias, "float32")], [LOGITS]),
        helper.make_node("Softmax", [LOGITS], [PROBABILITIES], axis=-1),
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", len(class_names)])
        for name in (LOGITS, PROBABILITIES)
    ]
    image = helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, ["batch", "height", "width", 3])
    nodes = [*before, *_needed(graph.node, IMAGE_EMBEDS), *after]
    used = {name for node in nodes for name in node.input}
    stored = [*constants, *(tensor for tensor in graph.initializer if tensor.name in used)]
    whole = helper.make_graph(nodes, "classifier", [image], outputs, stored, value_info=graph.value_info)
    made = helper.make_model(whole, opset_imports=model.opset_import, ir_version=model.ir_version)
    made.producer_name = "clipcid"
    metadata = {entry.key: entry.value for entry in model.metadata_props} | {
        "class_names": json.dumps(list(class_names), ensure_ascii=False),
        "templates": json.dumps(list(templates), ensure_ascii=False),
        "input": "uint8 RGB [N, H, W, 3], any size",
        "output": "logits (scale x cosine) and probabilities (their softmax), [N, classes]",
    }
    helper.set_model_props(made, metadata)
    if made.ByteSize() >= PROTOBUF_LIMIT:
        raise ClipcidError(
            f"{path.name}: a model of {made.ByteSize() / 2**30:.1f} GiB does not fit into one ONNX file (limit 2 GiB).",
            "Omit --classnames, and use image_encoder.onnx, which keeps its weights in a second file.",
        )
    onnx.save(made, path)


def _needed(nodes: Sequence[Any], output: str) -> list[Any]:
    """Return the nodes that an output depends on, in order, without those of other outputs."""
    needed, kept = {output}, []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    return kept[::-1]


def _preprocessing_nodes(preprocess: Mapping[str, Any], constant: Any) -> list[Any]:
    """Make the nodes from ``image`` to ``pixel_values``."""
    from onnx import TensorProto, helper

    side = check_pixels_expressible(preprocess)
    nodes: list[Any] = []

    def node(operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], name=f"preprocess/{output}", **attributes))
        return output

    planes = node("Transpose", [IMAGE], "pre_planes", perm=[0, 3, 1, 2])
    count, old = node("Shape", [planes], "pre_count", end=2), node("Shape", [planes], "pre_old_size", start=2)
    square = constant("pre_square", [side, side], "int64")
    if preprocess["resize_mode"] == "squash":
        new = square
    else:
        # The shorter side becomes S; the longer one is rounded down to whole pixels, as torchvision does.
        shorter = node("ReduceMin", [old], "pre_shorter", keepdims=1)
        new = node("Div", [node("Mul", [old, square], "pre_scaled"), shorter], "pre_new_size")
    resized = node(
        "Resize",
        [planes, "", "", node("Concat", [count, new], "pre_sizes", axis=0)],
        "pre_resized",
        antialias=1,
        coordinate_transformation_mode="half_pixel",
        exclude_outside=1,
        **_MODES[preprocess["interpolation"]],
    )
    # Half a pixel of margin goes to the even side: torchvision rounds so, and ONNX's Round does.
    margin = node("Cast", [node("Sub", [new, square], "pre_margin")], "pre_margin_float", to=TensorProto.FLOAT)
    half = node("Mul", [margin, constant("pre_half", 0.5, "float32")], "pre_half_margin")
    start = node("Cast", [node("Round", [half], "pre_start_float")], "pre_start", to=TensorProto.INT64)
    stop = node("Add", [start, square], "pre_stop")
    cropped = node("Slice", [resized, start, stop, constant("pre_axes", [2, 3], "int64")], "pre_cropped")
    values = node("Cast", [cropped], "pre_values", to=TensorProto.FLOAT)
    unit = node("Div", [values, constant("pre_255", 255.0, "float32")], "pre_unit")
    mean = constant("pre_mean", np.reshape(preprocess["mean"], (3, 1, 1)), "float32")
    std = constant("pre_std", np.reshape(preprocess["std"], (3, 1, 1)), "float32")
    node("Div", [node("Sub", [unit, mean], "pre_centred"), std], PIXEL_VALUES)
    return nodes
