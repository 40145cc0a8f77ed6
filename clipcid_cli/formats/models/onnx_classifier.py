"""A zero-shot classifier in one ONNX file: bytes of an image of any size in, one score per class out.

Resizing and cropping are operators of the graph. ONNX's antialiased cubic with coefficient −0.5 is Pillow's bicubic, but for
about one byte in 10,000, which is off by one level. (Where tall images are squashed, Pillow 13 and later resize the height
first, earlier ones and ONNX Runtime the width; bytes that are clipped in between then differ.)

Legend of shapes: N images, H × W pixels of any size, S the model's side, C classes, D width of the embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.onnx_file import IMAGE_EMBEDS, PIXEL_VALUES, PROTOBUF_LIMIT, read_metadata
from clipcid_cli.formats.models.pixels import pixel_problems, square_side

# ONNX's text form; names begin with pre_ and class_, since those of the encoder are between.
_PREPROCESS = Template("""
preprocess (uint8[batch, height, width, 3] image) => (float[batch, 3, $side, $side] pixel_values)
<int64[2] pre_square = {$side, $side}, int64[2] pre_axes = {2, 3}, float pre_half = {0.5}, float pre_255 = {255.0}>
{
    pre_planes = Transpose <perm = [0, 3, 1, 2]> (image)
    pre_count = Shape <end = 2> (pre_planes)
    pre_old_size = Shape <start = 2> (pre_planes)
    $new_size
    pre_sizes = Concat <axis = 0> (pre_count, pre_new_size)
    pre_resized = Resize
        <antialias = 1, coordinate_transformation_mode = "half_pixel", exclude_outside = 1, $filter>
        (pre_planes, , , pre_sizes)
    # Half a pixel of margin goes to the even side: torchvision rounds so, and ONNX's Round does.
    pre_margin = Sub (pre_new_size, pre_square)
    pre_margin_float = Cast <to = 1> (pre_margin)
    pre_half_margin = Mul (pre_margin_float, pre_half)
    pre_start_float = Round (pre_half_margin)
    pre_start = Cast <to = 7> (pre_start_float)
    pre_stop = Add (pre_start, pre_square)
    pre_cropped = Slice (pre_resized, pre_start, pre_stop, pre_axes)
    pre_values = Cast <to = 1> (pre_cropped)
    pre_unit = Div (pre_values, pre_255)
    pre_centred = Sub (pre_unit, pre_mean)
    pixel_values = Div (pre_centred, pre_std)
}""")
_NEW_SIZE = {
    "squash": "pre_new_size = Identity (pre_square)",
    # The shorter side becomes S; the longer one is rounded down to whole pixels, as torchvision does.
    "shortest": """pre_shorter = ReduceMin <keepdims = 1> (pre_old_size)
    pre_scaled = Mul (pre_old_size, pre_square)
    pre_new_size = Div (pre_scaled, pre_shorter)""",
}
_FILTERS = {
    "bicubic": 'mode = "cubic", cubic_coeff_a = -0.5',  # Pillow's coefficient; ONNX's own default is −0.75
    "bilinear": 'mode = "linear"',
}
_CLASSIFY = Template("""
classify (float[batch, $width] image_embeds) => (float[batch, $classes] logits, float[batch, $classes] probabilities)
{
    class_cosines = MatMul (image_embeds, class_weights)
    class_scaled = Mul (class_cosines, class_scale)
    logits = Add (class_scaled, class_bias)
    probabilities = Softmax <axis = -1> (logits)
}""")


def validate_for_classifier(preprocess: Mapping[str, Any]) -> None:
    """Refuse a model whose preprocessing, open_clip's ``preprocess_cfg``, cannot be part of the graph."""
    if problems := pixel_problems(preprocess):
        raise ClipcidError(
            f"classifier.onnx: {'; '.join(problems)}, which the graph cannot express.",
            "Omit --classnames, and prepare pixels as the metadata of image_encoder.onnx say.",
        )


def write_classifier(
    path: Path, encoder: Path, weights: np.ndarray[Any, Any], class_names: Sequence[str], templates: Sequence[str]
) -> None:
    """Put preprocessing before an image encoder and class weights after it.

    The input ``image`` is uint8, RGB, [N, H, W, 3] (ONNX fixes the number of axes); the outputs are ``logits`` (scale ×
    cosine + bias) and ``probabilities`` (their softmax), float32 [N, C].

    Args:
        encoder: From ``pixel_values`` to ``image_embeds``, with ``preprocess`` (one that `validate_for_classifier`
            accepted), ``logit_scale`` and ``logit_bias`` in its metadata.
        weights: Class weights, float32 [C, D], unit rows.
    """
    import onnx

    stored = [file for file in (encoder, encoder.with_name(f"{encoder.name}.data")) if file.exists()]
    size = sum(file.stat().st_size for file in stored) + weights.nbytes
    if size >= PROTOBUF_LIMIT:
        raise ClipcidError(
            f"{path.name}: a model of {size / 2**30:.1f} GiB does not fit into one ONNX file (limit 2 GiB).",
            "Omit --classnames, and use image_encoder.onnx, which keeps its weights in a second file.",
        )
    model = onnx.load(encoder)
    metadata = read_metadata(model)
    preprocess = json.loads(metadata["preprocess"])
    before = _parse(
        _PREPROCESS,
        {"pre_mean": np.reshape(preprocess["mean"], (3, 1, 1)), "pre_std": np.reshape(preprocess["std"], (3, 1, 1))},
        side=square_side(preprocess["size"]),
        new_size=_NEW_SIZE[preprocess["resize_mode"]],
        filter=_FILTERS[preprocess["interpolation"]],
    )
    after = _parse(
        _CLASSIFY,
        {
            "class_weights": weights.T,
            "class_scale": float(metadata["logit_scale"]),
            "class_bias": float(metadata["logit_bias"]),
        },
        classes=weights.shape[0],
        width=weights.shape[1],
    )
    merge = onnx.compose.merge_graphs
    graph = merge(before, model.graph, [(PIXEL_VALUES, PIXEL_VALUES)], outputs=[IMAGE_EMBEDS])  # without patches
    graph = merge(graph, after, [(IMAGE_EMBEDS, IMAGE_EMBEDS)], name="classifier", doc_string="")
    made = onnx.helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version, producer_name="clipcid"
    )
    metadata |= {
        "class_names": json.dumps(list(class_names), ensure_ascii=False),
        "templates": json.dumps(list(templates), ensure_ascii=False),
        "input": "uint8 RGB [N, H, W, 3], any size",
        "output": "logits (scale x cosine) and probabilities (their softmax), [N, classes]",
    }
    onnx.helper.set_model_props(made, metadata)
    onnx.save(made, path)


def _parse(text: Template, constants: Mapping[str, Any], **words: Any) -> Any:
    """Make a graph of its text, with further constants of float32."""
    from onnx import numpy_helper, parser

    graph = parser.parse_graph(text.substitute(words))
    for name, values in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(values, dtype="float32"), name))
    return graph
