"""ONNX files: a PyTorch module as a graph with a dynamic batch, readable without PyTorch, and its smaller variants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from clipcid_cli.errors import ClipcidError, in_one_line

# Names of an input and of outputs, as in Hugging Face's CLIPModel; `DENSE_EMBEDS` is ours.
PIXEL_VALUES = "pixel_values"
IMAGE_EMBEDS, TEXT_EMBEDS, DENSE_EMBEDS = "image_embeds", "text_embeds", "dense_embeds"

# Larger files cannot be one protobuf; their weights go to a file next to them.
PROTOBUF_LIMIT = 2**31

# Operators that compute in 16 bits in a half-precision graph, as under PyTorch's autocast: products and look-ups. All others
# compute in 32 bits from weights stored in 16: norms lose most in 16 bits, and on a CPU, ONNX Runtime 1.32 crashes while it
# loads a ViT whose patches or norms are in 16 bits.
_IN_FP16 = frozenset({"MatMul", "Gemm", "Gather"})


def write_onnx(
    path: Path,
    module: torch.nn.Module,
    example: torch.Tensor,
    output_names: Sequence[str],
    *,
    opset: int,
    metadata: Mapping[str, str],
) -> None:
    """Write a module as an ONNX file, the first axis of its input of any size.

    Weights above 2 GB, the limit of one protobuf, go to ``<name>.onnx.data`` next to it.

    Args:
        module: In evaluation mode, on the CPU; the input is called as the one argument of its ``forward``.
        example: An input with at least two rows: PyTorch would treat an axis of one as fixed.
    """
    try:
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            verbose=False,
            output_names=output_names,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
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


def read_metadata(model: Any) -> dict[str, str]:
    """Return the texts stored in a loaded ONNX model."""
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
    onnx.helper.set_model_props(small, read_metadata(whole) | {"weights": kind})
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
    converted.topological_sort()  # the converter appends its casts at the end
    model = converted.model
    # Shapes are inferred again, because the converter leaves some in their old number format.
    del model.graph.value_info[:]
    beside = model.ByteSize() >= PROTOBUF_LIMIT
    onnx.save(model, target, save_as_external_data=beside, location=f"{target.name}.data" if beside else None)
    onnx.shape_inference.infer_shapes_path(target, target)
