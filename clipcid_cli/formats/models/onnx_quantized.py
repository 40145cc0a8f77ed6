"""Quantized variants of an ONNX file: weights of 16 or 8 bits, in standard operators that ONNX Runtime supports."""

from __future__ import annotations

from pathlib import Path

from clipcid_cli.formats.models.onnx_file import PROTOBUF_LIMIT

# Operators that compute in 16 bits in a half-precision graph, as under PyTorch's autocast: products and look-ups. All others
# compute in 32 bits from weights stored in 16: norms lose most in 16 bits, and on a CPU, ONNX Runtime 1.32 crashes while it
# loads a ViT whose patches or norms are in 16 bits.
_IN_FP16 = frozenset({"MatMul", "Gemm", "Gather"})


def write_quantized(source: Path, target: Path, kind: str) -> None:
    """Write a quantized variant of an ONNX file; inputs, outputs and metadata stay as they are.

    Args:
        source: A file of float32 weights.
        kind: ``fp16``: weights and matrix products in 16 bits, half the size. ``int8``: weights of matrix products and
            embedding tables in 8 bits, one scale per column, the other factor quantized at run time (dynamic
            quantization); a quarter of the size. Weights use 7 of the 8 bits, so that sums of products do not overflow
            the 16-bit accumulators of x86 processors without VNNI.
    """
    import onnx

    if kind == "fp16":
        _write_fp16(source, target)
    else:
        _write_int8(source, target)
    # Quantization drops the metadata.
    small, whole = onnx.load(target, load_external_data=False), onnx.load(source, load_external_data=False)
    onnx.helper.set_model_props(small, {entry.key: entry.value for entry in whole.metadata_props} | {"weights": kind})
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


def _write_int8(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source,
        target,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=True,
        use_external_data_format=source.with_name(f"{source.name}.data").exists(),
    )
