"""Checks an ONNX graph before an engine is built: what would TensorRT refuse, or accept and run slowly?

A strongly typed engine takes its types from the graph, so the rules are about types, scales and axes. A rule
maps the typed graph and its floating type to findings, one line each: `name: what is wrong, what was expected`.
"""

from collections.abc import Callable, Iterator

import numpy as np
import onnx
import onnx_ir as ir

from calib.errors import UserError
from deploy.graph.constants import DEQUANTIZE, QUANTIZE, constant

MIN_OPSET = 21
SUBGRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
# (operator, input, transposed by attribute) -> axis of a weight that is the operator's output channel
OUTPUT_CHANNEL = {
    ("Conv", 1, 0): 0,
    ("MatMul", 0, 0): -2,
    ("MatMul", 1, 0): -1,
    ("Gemm", 0, 0): -2,
    ("Gemm", 0, 1): -1,
    ("Gemm", 1, 0): -1,
    ("Gemm", 1, 1): -2,
}


def _typed(model: onnx.ModelProto) -> ir.Model:
    """`model` with inferred types. Recorded types are dropped first, because they may be out of date."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    while True:
        typed = onnx.shape_inference.infer_shapes(bare, data_prop=True)
        known = {each.name: each for each in (*typed.graph.value_info, *typed.graph.input)}
        # onnx infers no type for GroupNormalization, whose output has that of its input
        missing = [
            node
            for node in typed.graph.node
            if node.op_type == "GroupNormalization" and node.output[0] not in known and node.input[0] in known
        ]
        if not missing:
            return ir.from_proto(typed)
        for node in missing:
            recorded = bare.graph.value_info.add()
            recorded.CopyFrom(known[node.input[0]])
            recorded.name = node.output[0]


def _nodes(model: ir.Model, *op_types: str) -> Iterator[ir.Node]:
    return (node for node in model.graph if node.op_type in op_types)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from (value for value in node.outputs if value.name)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _int(node: ir.Node, attribute: str, default: int) -> int:
    return node.attributes[attribute].as_int() if attribute in node.attributes else default


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is not None and value.dtype.is_floating_point()


def _name(dtype: ir.DataType | None) -> str:
    return "unknown" if dtype is None else dtype.name


def _is_weight(value: ir.Value | None) -> bool:
    """Whether `value` is known when the engine is built: a constant, or one that the graph quantizes or transposes."""
    if value is None:
        return False
    node = value.producer()
    if node is not None and node.op_type in (QUANTIZE, "Transpose"):
        return _is_weight(node.inputs[0])
    return constant(value) is not None


def opset_is_current(model: ir.Model, _floats: ir.DataType) -> Iterator[str]:
    """Opset 21 defines int8 Q/DQ with FP16 scales, `output_dtype` and a whole Gelu."""
    opset = model.opset_imports.get("", 0)
    if opset < MIN_OPSET:
        yield f"opset: {opset}, expected {MIN_OPSET} or newer"


def graph_is_flat(model: ir.Model, _floats: ir.DataType) -> Iterator[str]:
    """The other rules look at the nodes of one graph. Nodes in functions and subgraphs would escape them."""
    for function in model.functions.values():
        yield f"{function.name}: a local function, expected its nodes inlined"
    for node in model.graph:
        if any(attribute.type in SUBGRAPHS for attribute in node.attributes.values()):
            yield f"{node.name}: {node.op_type} with a subgraph, expected a graph without control flow"


def floats_have_one_type(model: ir.Model, floats: ir.DataType) -> Iterator[str]:
    """The types of the graph are those of the engine: one FP32 value silently turns all that follows into FP32."""
    for value in _values(model):
        if value.uses() and all(use.node.op_type == "Resize" and use.idx == 2 for use in value.uses()):
            continue  # scales, which have to be FP32 and reach no arithmetic
        if value.dtype is None:
            yield f"{value.name}: type cannot be inferred, expected standard ONNX operators"
        elif _is_float(value) and value.dtype is not floats:
            yield f"{value.name}: type {value.dtype.name}, expected {floats.name}"


def nothing_casts_floats(model: ir.Model, _floats: ir.DataType) -> Iterator[str]:
    """A Cast costs a kernel. Behind a DequantizeLinear it also makes the matrix product write FP32."""
    for node in _nodes(model, "Cast", "CastLike"):
        source = node.inputs[0]
        assert source is not None
        producer = source.producer()
        if producer is not None and producer.op_type == DEQUANTIZE:
            yield f"{node.name}: {node.op_type} after {producer.name}, expected its consumer there"
        elif _is_float(source) and _is_float(node.outputs[0]):
            types = f"{_name(source.dtype)} to {_name(node.outputs[0].dtype)}"
            yield f"{node.name}: {node.op_type} from {types}, expected one float type throughout"


def scales_are_constants(model: ir.Model, floats: ir.DataType) -> Iterator[str]:
    """With a run-time scale there is no INT8 kernel, and the type of a scale is that of the dequantized tensor."""
    for node in _nodes(model, QUANTIZE, DEQUANTIZE):
        scale = constant(node.inputs[1])
        if scale is None:
            yield f"{node.name}: scale computed at run time, expected an initializer"
        elif scale.dtype != floats.numpy():
            yield f"{node.name}: scale of {scale.dtype}, expected {floats.numpy()}"
        elif not (np.isfinite(scale) & (scale > 0)).all():
            worst = scale[~(np.isfinite(scale) & (scale > 0))].flat[0]
            yield f"{node.name}: scale {worst}, expected finite and above zero"


def zero_points_are_zero(model: ir.Model, _floats: ir.DataType) -> Iterator[str]:
    """TensorRT quantizes symmetrically to int8. A missing zero point means int8 to TensorRT and uint8 to ONNX."""
    for node in _nodes(model, QUANTIZE, DEQUANTIZE):
        value = _input(node, 2)
        if value is None:
            if node.op_type == QUANTIZE and _int(node, "output_dtype", 0) != ir.DataType.INT8:
                yield f"{node.name}: no zero point (ONNX: uint8), expected an int8 zero or output_dtype=INT8"
            continue
        zero_point = constant(value)
        if value.dtype is not ir.DataType.INT8:
            yield f"{node.name}: zero point of {_name(value.dtype)}, expected INT8"
        elif zero_point is None:
            yield f"{node.name}: zero point computed at run time, expected an int8 zero"
        elif zero_point.any():
            yield f"{node.name}: zero point {zero_point[zero_point != 0].flat[0]}, expected 0"


def integers_are_int8(model: ir.Model, _floats: ir.DataType) -> Iterator[str]:
    """TensorRT does not dequantize int32: a bias stays an FP16 initializer. This tool writes no other integers."""
    for node in _nodes(model, DEQUANTIZE):
        value = node.inputs[0]
        assert value is not None
        producer = value.producer()
        quantized_here = producer is not None and producer.op_type == QUANTIZE
        if not quantized_here and value.dtype is not ir.DataType.INT8:
            yield f"{node.name}: dequantizes {_name(value.dtype)}, expected INT8 (a bias stays FP16)"


def activations_have_one_scale(model: ir.Model, _floats: ir.DataType) -> Iterator[str]:
    """A scale per input channel is no factor of the sum of products: TensorRT would multiply in FP16."""
    for node in _nodes(model, QUANTIZE, DEQUANTIZE):
        scale = constant(node.inputs[1])
        if scale is not None and scale.size > 1 and not _is_weight(node.inputs[0]):
            yield f"{node.name}: {scale.size} scales for an activation, expected one"


def _channel_axes(value: ir.Value, axis: int) -> Iterator[tuple[ir.Node, int, int]]:
    """(consumer, `axis` as it sees it, axis of its output channel) of a weight, through Transposes."""
    assert value.shape is not None
    rank = len(value.shape)
    for node, index in value.uses():
        key = node.op_type, index, _int(node, "transB" if index else "transA", 0)
        if node.op_type == "Transpose":
            perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(rank)[::-1]
            yield from _channel_axes(node.outputs[0], list(perm).index(axis))
        elif key in OUTPUT_CHANNEL:
            yield node, axis, OUTPUT_CHANNEL[key] % rank


def weight_axis_is_output_channel(model: ir.Model, _floats: ir.DataType) -> Iterator[str]:
    """Only a scale per output channel can be applied to the INT8 sum: otherwise TensorRT multiplies in FP16."""
    for node in _nodes(model, DEQUANTIZE):
        weight, scale = node.inputs[0], constant(node.inputs[1])
        if scale is None or scale.size == 1 or not _is_weight(weight):
            continue
        assert weight is not None
        assert weight.shape is not None
        written = _int(node, "axis", 1) % len(weight.shape)
        for consumer, axis, expected in _channel_axes(node.outputs[0], written):
            if axis != expected:
                where = f"axis {axis} of the weight of {consumer.name}"
                yield f"{node.name}: scales on {where}, expected {expected}"


def layer_norms_have_one_type(model: ir.Model, _floats: ir.DataType) -> Iterator[str]:
    """TensorRT refuses a LayerNormalization whose input, scale and bias differ in type."""
    for node in _nodes(model, "LayerNormalization"):
        types = [_name(value.dtype) for value in node.inputs if value is not None]
        if len(set(types)) > 1:
            yield f"{node.name}: input, scale and bias of {', '.join(types)}, expected one type"


Rule = Callable[[ir.Model, ir.DataType], Iterator[str]]
RULES: tuple[Rule, ...] = (
    opset_is_current,
    graph_is_flat,
    floats_have_one_type,
    nothing_casts_floats,
    scales_are_constants,
    zero_points_are_zero,
    integers_are_int8,
    activations_have_one_scale,
    weight_axis_is_output_channel,
    layer_norms_have_one_type,
)


def check_strongly_typed(model: onnx.ModelProto, half: bool = True) -> tuple[str, ...]:
    """The findings of all rules on `model`; empty if TensorRT runs the graph as written. `model` is not edited.

    `half`: its floating types are to be FP16, else FP32.
    """
    typed, floats = _typed(model), ir.DataType.FLOAT16 if half else ir.DataType.FLOAT
    return tuple(finding for rule in RULES for finding in rule(typed, floats))


def require_strongly_typed(model: onnx.ModelProto, half: bool = True) -> None:
    """Raise UserError with the number of findings and the first three of them, if there are any."""
    findings = check_strongly_typed(model, half)
    if findings:
        count = "1 finding" if len(findings) == 1 else f"{len(findings)} findings"
        more = f"; and {len(findings) - 3} more" if len(findings) > 3 else ""
        types = "FP16" if half else "FP32"
        raise UserError(
            f"the ONNX graph does not make a strongly typed INT8/{types} engine, {count}: "
            f"{'; '.join(findings[:3])}{more}. Export it again in {types} with symmetric int8"
        )
