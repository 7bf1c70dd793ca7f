"""Explicit zero points for ONNX Runtime on processors without VNNI.

If it has to compute exact sums there (deploy/measure/ort_options.py), ONNX Runtime turns INT8 weights into unsigned ones.
It then gives the weight of a convolution that has no zero points a single one for all channels, and refuses to run it.
Zero points that two weights share it replaces twice, and fails.
"""

import numpy as np
import onnx
from onnx import numpy_helper

from deploy.graph.names import constant_name


def with_zero_points(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give every DequantizeLinear with one scale per channel zero points of its own, all 0 (edits `model`, returns it)."""
    graph = model.graph
    channels = {each.name: each.dims[0] for each in graph.initializer if len(each.dims) == 1}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) == 2 and node.input[1] in channels:
            name = constant_name(node.output[0], "zero_points")
            graph.initializer.append(numpy_helper.from_array(np.zeros(channels[node.input[1]], np.int8), name))
            node.input.append(name)
    return model
