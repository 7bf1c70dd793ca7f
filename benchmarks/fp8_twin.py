"""The graph of a package with FP8 (E4M3) in place of INT8, to compare the speed of both on GPUs that compute FP8.

    x = q s, q in -127..127   becomes   x = q' s 127 / 448, q' a number of E4M3, whose largest is 448

Layers, shapes and scales per channel stay, so engines of both differ in the type of their products alone. Weights are those
of the integers, rounded again: this is about time, and no network that was calibrated for FP8.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 19  # the first with FP8
LARGEST_INT8, LARGEST_FP8 = 127, 448
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


def _in_fp8(tensor: TensorProto, name: str) -> TensorProto:
    """Integers (INT8) as FP8 numbers of the same share of the largest."""
    values = numpy_helper.to_array(tensor).astype(np.float32) * (LARGEST_FP8 / LARGEST_INT8)
    return helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, tensor.dims, values.flatten().tolist())


def _of_fp8(tensor: TensorProto, name: str) -> TensorProto:
    """The scale of FP8 where that of INT8 is `tensor`."""
    values = numpy_helper.to_array(tensor)
    return numpy_helper.from_array((values * (LARGEST_INT8 / LARGEST_FP8)).astype(values.dtype), name)


def fp8_twin(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of `model`, a network with INT8 quantizers, that rounds to FP8 where that rounds to INT8.

    Raises ValueError for a quantizer whose scale is no constant, or that has another type.
    """
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    for domain in twin.opset_import:
        if domain.domain in ("", "ai.onnx"):
            domain.version = max(domain.version, OPSET)
    before = {tensor.name: tensor for tensor in twin.graph.initializer}
    made: dict[str, TensorProto] = {}

    def replaced(name: str) -> str:
        """The name of what stands in FP8 for the input `name` of a quantizer."""
        if name not in before:
            return name  # a tensor that is computed
        new = f"{name}_fp8"
        if new not in made:
            made[new] = (_in_fp8 if before[name].data_type == TensorProto.INT8 else _of_fp8)(before[name], new)
        return new

    rounded = set()
    for node in twin.graph.node:
        if node.op_type not in QUANTIZERS:
            continue
        # the type is that of the zero point; one that dequantizes a constant may have none
        typed = before.get(node.input[2] if len(node.input) == 3 else node.input[0])
        if node.input[1] not in before or typed is None or typed.data_type != TensorProto.INT8:
            raise ValueError(f"'{node.name}' does not round to INT8 with a constant scale")
        if node.op_type == "QuantizeLinear":
            rounded |= {*node.output}
            node.input[1:] = [replaced(name) for name in node.input[1:]]
        else:
            node.input[:] = [replaced(name) for name in node.input]
    for value in twin.graph.value_info:
        if value.name in rounded:
            value.type.tensor_type.elem_type = TensorProto.FLOAT8E4M3FN
    read = {name for node in twin.graph.node for name in node.input}
    kept = [tensor for tensor in twin.graph.initializer if tensor.name in read]
    del twin.graph.initializer[:]
    twin.graph.initializer.extend([*kept, *made.values()])
    return twin
