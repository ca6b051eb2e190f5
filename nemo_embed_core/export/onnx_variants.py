"""Smaller files beside onnx/model.onnx, made of its graph (pip install 'nemo_embed_core[serve]').

    onnx/model_fp16.onnx    y = fp32(fp16(x) fp16(W)) of every product with a weight; the rest stays fp32
    onnx/model_int8.onnx    onnxruntime's dynamic quantisation: W in int8 by column, x in uint8 by its range

Norms, positions, attention and pooling stay in fp32: squares leave the range of fp16 at 256, and angles of
positions lose their digits (products of positions in fp16 gave cosines below 0.9997 for a toy).
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_embed_core.errors import UserError
from nemo_embed_core.export.onnx import SINGLE_BYTES


def check_libraries(variants: Sequence[str]) -> None:
    """UserError without what writes them."""
    if "int8" in variants and importlib.util.find_spec("onnxruntime") is None:
        raise UserError("--variants int8 needs onnxruntime: pip install 'nemo_embed_core[serve]'")


def write_fp16(source: Path, file: Path) -> None:
    """Weights of products and of the embedding in fp16, each cast where it is used."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(source)
    graph, nodes = model.graph, list[Any]()
    weights = {entry.name: entry for entry in graph.initializer}
    halved = set[str]()
    for node in graph.node:
        at = {"MatMul": 1, "Gather": 0}.get(node.op_type)
        entry = weights.get(node.input[at]) if at is not None and len(node.input) > 1 else None
        if entry is None or len(entry.dims) != 2 or not (_is_fp32(entry) or entry.name in halved):
            nodes.append(node)
            continue
        if entry.name not in halved:
            values = numpy_helper.to_array(entry)
            if np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:
                raise UserError(f"{source}: {entry.name} has values beyond fp16's range: leave fp16 out")
            entry.CopyFrom(numpy_helper.from_array(values.astype(np.float16), entry.name))
            halved.add(entry.name)
        inputs, output = list(node.input), node.output[0]
        if node.op_type == "MatMul":
            half = f"{output}.fp16_input"
            nodes.append(
                helper.make_node("Cast", [inputs[0]], [half], f"{half}.cast", to=TensorProto.FLOAT16)
            )
            inputs[0] = half
        of = f"{output}.fp16"
        nodes.append(helper.make_node(node.op_type, inputs, [of], node.name))
        nodes[-1].attribute.extend(node.attribute)
        nodes.append(helper.make_node("Cast", [of], [output], f"{of}.cast", to=TensorProto.FLOAT))
    assert halved, f"{source} has no products with weights"
    # Whoever reads a weight elsewhere would meet another type.
    for node in nodes:
        is_ours = node.op_type in ("MatMul", "Gather") and node.output[0].endswith(".fp16")
        assert is_ours or not halved & set(node.input), node.name
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    large = sum(len(entry.raw_data) for entry in graph.initializer) > SINGLE_BYTES
    onnx.save(model, file, save_as_external_data=large, location=f"{file.name}.data")


def _is_fp32(entry: Any) -> bool:
    return bool(entry.data_type == 1)  # TensorProto.FLOAT


def write_int8(source: Path, file: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it proposes shape inference, which a graph of torch has behind it
    try:
        quantize_dynamic(
            source,
            file,
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=source.with_name(f"{source.name}.data").is_file(),
        )
    finally:
        root.setLevel(level)
