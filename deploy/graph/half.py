"""No FP32 in a graph of FP16: an engine would compute whatever depends on it in FP32, and cast on either side.

One operand of FP32 makes the result FP32. Here every FP32 constant becomes FP16, and every cast to FP32 one to FP16. A
finite constant beyond FP16, such as the least number that masks add, becomes the largest that FP16 holds. What then no
longer fits FP16 shows in the verification of the FP16 graph.
"""

import numpy as np
import onnx_ir as ir

FP16_MAX = float(np.finfo(np.float16).max)
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def _fp16(values: np.ndarray) -> np.ndarray:
    """Return float32 `values` in FP16: finite ones stay finite, what is infinite stays so."""
    return np.where(np.isinf(values), values, np.clip(values, -FP16_MAX, FP16_MAX)).astype(np.float16)


def _as_half(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(_fp16(tensor.numpy()), name=tensor.name)


def _halve_attributes(node: ir.Node) -> None:
    for name, attribute in list(node.attributes.items()):
        if attribute.type is ir.AttributeType.TENSOR and attribute.as_tensor().dtype is FLOAT:
            node.attributes[name] = ir.AttrTensor(name, _as_half(attribute.as_tensor()))
        elif node.op_type == "Constant" and name in ("value_float", "value_floats"):
            value = _fp16(np.array(attribute.value, np.float32))
            del node.attributes[name]
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(value))
        elif name in ("to", "dtype", "output_dtype") and attribute.value == FLOAT:
            node.attributes[name] = ir.AttrInt64(name, HALF)


def _restore_resize(model: ir.Model) -> None:
    """Give every Resize its scales in FP32 again: the operator knows no other type for them (edits `model`)."""
    for node in [node for node in model.graph if node.op_type == "Resize" and len(node.inputs) > 2]:
        scales = node.inputs[2]
        tensor = None if scales is None else ir.convenience.get_const_tensor(scales)
        if tensor is None or tensor.dtype is not HALF:
            continue
        name = f"{node.outputs[0].name}_scales"
        single = ir.tensor(tensor.numpy().astype(np.float32), name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(FLOAT), shape=ir.Shape(list(tensor.numpy().shape)), const_value=single
        )
        model.graph.initializers[name] = value
        node.replace_input_with(2, value)


def no_fp32(model: ir.Model) -> None:
    """Turn all of `model` that is FP32 into FP16, and drop casts that then change nothing (edits `model`)."""
    for value in model.graph.inputs:
        if value.dtype is FLOAT:
            value.type = ir.TensorType(HALF)
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype is FLOAT:
            value.const_value, value.type = _as_half(value.const_value), ir.TensorType(HALF)
    for node in list(model.graph):
        _halve_attributes(node)
        for value in node.outputs:
            if value.dtype is FLOAT:
                value.type = ir.TensorType(HALF)
        given = node.inputs[0] if node.op_type == "Cast" else None
        idle = given is not None and given.dtype is HALF and node.attributes["to"].as_int() == HALF
        if idle and node.outputs[0] not in model.graph.outputs:
            ir.convenience.replace_all_uses_with(node.outputs[0], given)  # type: ignore[arg-type]
            model.graph.remove(node, safe=True)
    _restore_resize(model)
