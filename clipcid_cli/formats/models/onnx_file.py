"""ONNX files: a PyTorch module as a graph with a dynamic batch, its smaller variants, and a classifier of whole images.

The classifier takes bytes of an image of any size; resizing and cropping are operators of its graph. ONNX's antialiased
cubic with coefficient −0.5 is Pillow's bicubic, but for about one byte in 10,000, which is off by one level. Sides are
resized in the order of the Pillow that is installed where the classifier is written.

Shape letters: N images, H × W pixels of any size, S the model's side, C classes, D width of the embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch

from clipcid_cli.errors import ClipcidError, in_one_line
from clipcid_cli.formats.models.open_clip_folder import HEIGHT_MAY_BE_FIRST, pixel_problems, square_side

# Names of an input and of outputs, as in Hugging Face's CLIPModel; `DENSE_EMBEDS` is ours.
PIXEL_VALUES = "pixel_values"
IMAGE_EMBEDS, TEXT_EMBEDS, DENSE_EMBEDS = "image_embeds", "text_embeds", "dense_embeds"

# Larger files cannot be one protobuf; their weights go to a file next to them.
_PROTOBUF_LIMIT = 2**31

# Operators that compute in 16 bits in a half-precision graph, as under PyTorch's autocast: products and look-ups. All others
# compute in 32 bits from weights stored in 16: norms lose most in 16 bits, and on a CPU, ONNX Runtime 1.32 crashes while it
# loads a ViT whose patches or norms are in 16 bits.
_IN_FP16 = frozenset({"MatMul", "Gemm", "Gather"})

# ONNX's text form; names begin with pre_ and class_, since those of the encoder are between.
_PREPROCESS = Template("""
preprocess (uint8[batch, height, width, 3] image) => (float[batch, 3, $side, $side] pixel_values)
<int64[2] pre_square = {$side, $side}, int64[2] pre_axes = {2, 3}, float pre_half = {0.5}, float pre_255 = {255.0}>
{
    pre_planes = Transpose <perm = [0, 3, 1, 2]> (image)
    pre_count = Shape <end = 2> (pre_planes)
    pre_old_size = Shape <start = 2> (pre_planes)
    $new_size
    $first_pass
    pre_sizes = Concat <axis = 0> (pre_count, pre_new_size)
    pre_resized = Resize <$filter> (pre_first, , , pre_sizes)
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
_ANTIALIASED = 'antialias = 1, coordinate_transformation_mode = "half_pixel", exclude_outside = 1'
_FILTERS = {
    # Pillow's coefficient; ONNX's own default is −0.75.
    "bicubic": f'{_ANTIALIASED}, mode = "cubic", cubic_coeff_a = -0.5',
    "bilinear": f'{_ANTIALIASED}, mode = "linear"',
}
# Before the last pass, where the order of the sides may vary: the height alone, where it shrinks by more than twice as many
# pixels as the width; else all stays as it is, and Resize takes the width first.
_HEIGHT_ALONE = Template("""pre_shrinks = Sub (pre_old_size, pre_new_size)
    pre_one_each = Constant <value = int64[2] {1, 1}> ()
    pre_height_shrinks, pre_width_shrinks = Split <axis = 0> (pre_shrinks, pre_one_each)
    pre_twice = Add (pre_width_shrinks, pre_width_shrinks)
    pre_none = Sub (pre_twice, pre_twice)
    pre_least = Max (pre_twice, pre_none)
    pre_height_first = Greater (pre_height_shrinks, pre_least)
    pre_is_height = Constant <value = bool[2] {1, 0}> ()
    pre_resized_alone = And (pre_is_height, pre_height_first)
    pre_first_size = Where (pre_resized_alone, pre_new_size, pre_old_size)
    pre_first_sizes = Concat <axis = 0> (pre_count, pre_first_size)
    pre_first = Resize <$filter> (pre_planes, , , pre_first_sizes)""")
_NOTHING_BEFORE = Template("pre_first = Identity (pre_planes)")
_CLASSIFY = Template("""
classify (float[batch, $width] image_embeds) => (float[batch, $classes] logits, float[batch, $classes] probabilities)
{
    class_cosines = MatMul (image_embeds, class_weights)
    class_scaled = Mul (class_cosines, class_scale)
    logits = Add (class_scaled, class_bias)
    probabilities = Softmax <axis = -1> (logits)
}""")


def write_onnx(
    path: Path,
    module: torch.nn.Module,
    example: torch.Tensor,
    output_names: Sequence[str],
    *,
    opset: int,
    metadata: Mapping[str, str],
    static: bool = False,
) -> None:
    """Write a module, in evaluation mode on the CPU, as an ONNX file; its input is called as the argument of ``forward``.

    Weights above 2 GB, the limit of one protobuf, go to ``<name>.onnx.data`` next to it.

    Args:
        example: An input with at least two rows: PyTorch would treat an axis of one as fixed.
        static: Whether the file takes one row at a time, so that no shape in it depends on the input.
    """
    try:
        program = torch.onnx.export(
            module,
            (example[:1] if static else example,),
            dynamo=True,
            verbose=False,
            output_names=output_names,
            dynamic_shapes=None if static else ({0: torch.export.Dim("batch")},),
            opset_version=opset,
        )
    except Exception as error:  # torch.export and the exporter raise many kinds for what they cannot express
        raise ClipcidError(
            f"{path.name}: PyTorch's exporter cannot express this model in ONNX opset {opset}: {in_one_line(error)}",
            "Try another --opset, or export with --format open-clip; --debug shows where it stopped.",
        ) from error
    assert program is not None
    for graph in program.model.graphs():
        for node in graph:
            node.metadata_props.clear()  # the exporter's stack traces: paths of the machine it ran on
            node.doc_string = None
    program.model.metadata_props.update(metadata)
    program.save(str(path))


def _read_metadata(model: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def write_quantized(source: Path, target: Path, kind: str) -> None:
    """Write a quantized variant of an ONNX file in standard operators; inputs, outputs and metadata stay as they are.

    Args:
        kind: ``fp16``: weights and matrix products in 16 bits. ``int8``: weights of matrix products and embedding tables in
            8 bits, one scale per column, the other factor quantized at run time; 7 of the 8 bits are used, so that sums do
            not overflow the 16-bit accumulators of x86 processors without VNNI.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if kind == "fp16":
        _write_fp16(source, target)
    else:
        quantize_dynamic(
            source,
            target,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            use_external_data_format=source.with_name(f"{source.name}.data").exists(),
        )
    # Quantization drops the metadata.
    small, whole = (onnx.load(path, load_external_data=False) for path in (target, source))
    onnx.helper.set_model_props(small, _read_metadata(whole) | {"weights": kind})
    target.write_bytes(small.SerializeToString())


def _write_fp16(source: Path, target: Path) -> None:
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    whole = onnx.load(source)
    in_fp32 = {node.op_type for node in whole.graph.node} - _IN_FP16
    converted = OnnxModel(
        convert_float_to_float16(whole, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *in_fp32])
    )
    _remove_rounding(converted.model.graph)
    converted.prune_graph()
    converted.topological_sort()  # the converter appends its casts at the end
    model = converted.model
    # Shapes are inferred again, because the converter leaves some in their old number format.
    del model.graph.value_info[:]
    beside = model.ByteSize() >= _PROTOBUF_LIMIT
    onnx.save(model, target, save_as_external_data=beside, location=f"{target.name}.data" if beside else None)
    onnx.shape_inference.infer_shapes_path(target, target)


def _remove_rounding(graph: Any) -> None:
    """Let operators in 32 bits pass on what they compute: the converter rounds all of it to 16 bits, unit rows too."""
    from onnx import TensorProto

    rounded = {node.output[0]: node.input[0] for node in graph.node if _is_cast(node, TensorProto.FLOAT16)}
    widened = [node for node in graph.node if _is_cast(node, TensorProto.FLOAT) and node.input[0] in rounded]
    exact = {node.output[0]: rounded[node.input[0]] for node in widened}
    for node in widened:
        graph.node.remove(node)
    # What is an output of the graph keeps the output's name.
    named = {exact[output.name]: output.name for output in graph.output if output.name in exact}
    for node in graph.node:
        node.input[:] = [named.get(name, name) for name in (exact.get(name, name) for name in node.input)]
        node.output[:] = [named.get(name, name) for name in node.output]


def _is_cast(node: Any, kind: int) -> bool:
    return bool(node.op_type == "Cast" and node.attribute[0].i == kind)


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
    if size >= _PROTOBUF_LIMIT:
        raise ClipcidError(
            f"{path.name}: a model of {size / 2**30:.1f} GiB does not fit into one ONNX file (limit 2 GiB).",
            "Omit --classnames, and use image_encoder.onnx, which keeps its weights in a second file.",
        )
    model = onnx.load(encoder)
    metadata = _read_metadata(model)
    preprocess = json.loads(metadata["preprocess"])
    resizing = {"filter": _FILTERS[preprocess["interpolation"]]}
    first_pass = _HEIGHT_ALONE if HEIGHT_MAY_BE_FIRST else _NOTHING_BEFORE
    before = _parse(
        _PREPROCESS,
        {"pre_mean": np.reshape(preprocess["mean"], (3, 1, 1)), "pre_std": np.reshape(preprocess["std"], (3, 1, 1))},
        side=square_side(preprocess["size"]),
        new_size=_NEW_SIZE[preprocess["resize_mode"]],
        first_pass=first_pass.substitute(resizing),
        **resizing,
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
    classifier = onnx.helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version, producer_name="clipcid"
    )
    metadata |= {
        "class_names": json.dumps(list(class_names), ensure_ascii=False),
        "templates": json.dumps(list(templates), ensure_ascii=False),
        "input": "uint8 RGB [N, H, W, 3], any size",
        "output": "logits (scale x cosine) and probabilities (their softmax), [N, classes]",
    }
    onnx.helper.set_model_props(classifier, metadata)
    onnx.save(classifier, path)


def _parse(text: Template, constants: Mapping[str, Any], **words: Any) -> Any:
    """Make a graph of its text, with further constants of float32."""
    from onnx import numpy_helper, parser

    # The words are this module's numbers and names: class names are metadata, and no part of the text.
    graph = parser.parse_graph(text.substitute(words))
    for name, values in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(values, dtype="float32"), name))
    return graph
