"""ONNX files: a PyTorch module as a graph with a dynamic batch, readable without PyTorch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from clipcid_cli.errors import ClipcidError

# Names of inputs and outputs, as in Hugging Face's CLIPModel; `DENSE_EMBEDS` is ours.
PIXEL_VALUES, INPUT_IDS = "pixel_values", "input_ids"
IMAGE_EMBEDS, TEXT_EMBEDS, DENSE_EMBEDS = "image_embeds", "text_embeds", "dense_embeds"

# Larger files cannot be one protobuf; their weights go to a file next to them.
PROTOBUF_LIMIT = 2**31

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_onnx_installed() -> None:
    """Make sure that the packages which write and run ONNX files are installed.

    Raises:
        ClipcidError: naming the missing packages and the command that installs them.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ClipcidError(
            f"--format onnx needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed.",
            "Install them: pip install 'clipcid[export]'",
        )


def write_onnx(
    path: Path,
    module: torch.nn.Module,
    example: torch.Tensor,
    *,
    input_name: str,
    output_names: Sequence[str],
    opset: int,
    metadata: Mapping[str, str],
) -> None:
    """Write a module with one input as an ONNX file, its first axis of any size.

    Weights above 2 GB, the limit of one protobuf, go to ``<name>.onnx.data`` next to it.

    Args:
        path: Where to write; a ``.onnx`` name.
        module: In evaluation mode, on the CPU.
        example: An input with at least two rows: PyTorch would treat an axis of one as fixed.
        input_name: Name of the argument of the module's ``forward``, and of the graph's input.
        output_names: Names of the graph's outputs, in the order the module returns them.
        metadata: Texts stored in the file, such as how pixels are prepared.

    Raises:
        ClipcidError: when the exporter cannot express the module.
    """
    assert len(example) >= 2
    try:
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            verbose=False,
            input_names=[input_name],
            output_names=list(output_names),
            dynamic_shapes={input_name: {0: torch.export.Dim("batch")}},
            opset_version=opset,
        )
    except Exception as error:  # torch.export and the exporter raise many kinds for what they cannot express
        reason = " ".join(str(error).split())[:300]
        raise ClipcidError(
            f"{path.name}: PyTorch's exporter cannot express this model in ONNX opset {opset}: {reason}",
            "Try another --opset, or export with --format open-clip; --debug shows where it stopped.",
        ) from error
    assert program is not None
    for graph in program.model.graphs():
        for node in graph:
            node.metadata_props.clear()  # the exporter's stack traces: paths of the machine it ran on
            node.doc_string = None
    program.model.metadata_props.update(metadata)
    program.save(str(path))
