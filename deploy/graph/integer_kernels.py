"""Rewrites a Q/DQ graph of FP32 types into one that ONNX Runtime computes in integers on a CPU.

On its own ONNX Runtime makes integer kernels of MatMuls, without their biases, and of convolutions that a QuantizeLinear
follows directly; the others it computes in FP32, slower than a float network. Here are written

1. Q(clip(conv(x, W) + b)) as QLinearConv, with the clips (Relu, Max, Min, Clip) and zero padding on integers behind it: Q is
   monotone, so Q(clip(y)) = clip(Q(y)) in every bit. The bias becomes an integer times s_x s_W.
2. x W + b of queries, keys and values and their attention as QAttention (deploy/graph/integer_attention.py).
3. Any other x W + b as MatMulIntegerToFloat, and 1 x 1 convolutions as well, whose channels are moved last for it.

Other convolutions stay. All that is not exact is the bias of QLinearConv, which moves by at most s_x s_W / 2, and the order
of FP32 operations. The operators are those of ONNX Runtime, so the graph is made when it is loaded and not shipped.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from deploy.graph.constants import QUANTIZE, add_constant, constant
from deploy.graph.integer_attention import as_attention
from deploy.graph.integer_factors import OFFSET, Factors, factors, made_unsigned, only_user, zero_point
from deploy.graph.integer_operators import ATTENTION, CONVOLUTION, MICROSOFT, PRODUCT
from deploy.graph.writer import Writer, replace

LARGEST_BIAS = 2.0**30  # leaves as much room for the sum of the products
Step = tuple[str, np.ndarray]  # Max or Min and a bound, () or (1, N, 1, 1); or Pad and how many zeros where


def _ints(node: ir.Node, name: str, default: Sequence[int]) -> list[int]:
    return list(node.attributes[name].as_ints()) if name in node.attributes else list(default)


def _write_product(write: Writer, found: Factors, x: ir.Value, weight: np.ndarray) -> ir.Value:
    bias = None if found.bias is None else write.constant("bias", found.bias.astype(np.float32))
    return write.node(
        PRODUCT,
        [x, write.constant("weight", weight), found.x_scale, write.constant("weight_scale", found.weight_scale),
         zero_point(write.graph), None, bias],
        MICROSOFT,
    )  # fmt: skip


def _steps_of(node: ir.Node, value: ir.Value) -> list[Step] | None:
    """What the `node` that reads `value` does to it; None if that does not commute with quantization."""
    others = [each for each in node.inputs if each is not value and each is not None]
    numbers = [constant(each) for each in others]
    known = [each for each in numbers if each is not None]
    if len(known) < len(others) or (node.inputs[0] is not value and node.op_type not in ("Max", "Min")):
        return None
    if node.op_type == "Relu":
        return [("Max", np.zeros((), np.float32))]
    if node.op_type in ("Max", "Min") and len(known) == 1:
        return [(node.op_type, known[0])]
    if node.op_type == "Clip" and len(known) == 2:
        return [("Max", known[0]), ("Min", known[1])]
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
    if node.op_type == "Pad" and mode == "constant" and len(known) < 3 and not any(known[1:]):
        return [("Pad", known[0])]
    return None


def _steps_until_quantized(value: ir.Value) -> tuple[list[Step], ir.Node] | None:
    """(the steps from `value` to a QuantizeLinear, that node); None if something else lies between."""
    steps: list[Step] = []
    while (node := only_user(value)) is not None:
        if node.op_type == QUANTIZE and node.inputs[0] is value:
            return steps, node
        found = _steps_of(node, value)
        if found is None:
            return None
        steps += found
        value = node.outputs[0]
    return None


def integer_steps(steps: Sequence[Step], scale: np.ndarray) -> Iterator[Step]:
    """The `steps` on y as steps on its integers round(y / `scale`) + 128 (uint8); bounds that none exceeds are left out."""
    for operator, number in steps:
        if operator == "Pad":
            yield operator, number
            continue
        integers = np.clip(np.rint(number / scale), -OFFSET, OFFSET - 1) + OFFSET
        if (integers != (0 if operator == "Max" else 2 * OFFSET - 1)).any():
            yield operator, integers.astype(np.uint8)


def _as_convolution(node: ir.Node, found: Factors) -> bool:
    """Write `node` and all up to a QuantizeLinear as QLinearConv and integer steps; False if something is in the way."""
    until = _steps_until_quantized(found.output)
    x_scale = constant(found.x_scale)
    if until is None or x_scale is None:
        return False
    steps, quantize = until
    step = np.float64(x_scale) * found.weight_scale
    bias = np.zeros(len(step)) if found.bias is None else np.rint(found.bias / step)
    scale = constant(quantize.inputs[1])
    if scale is None or (np.abs(bias) > LARGEST_BIAS).any() or not made_unsigned(quantize.outputs[0]):
        return False
    write = Writer(node)
    zero = zero_point(write.graph)
    inputs = [
        found.x, found.x_scale, zero, write.constant("weight", found.weight),
        write.constant("weight_scale", found.weight_scale), add_constant(write.graph, "weight_zero", np.array(0, np.int8)),
        quantize.inputs[1], zero, write.constant("bias", bias.astype(np.int32)),
    ]  # fmt: skip
    integers = write.node(CONVOLUTION, inputs, **{name: each.value for name, each in node.attributes.items()})
    for index, (operator, number) in enumerate(integer_steps(steps, scale)):
        rest = [write.constant(f"{operator}_{index}", number)] + ([zero] if operator == "Pad" else [])
        integers = write.node(operator, [integers, *rest])
    replace(quantize.outputs[0], integers)
    return True


def _as_product_of_channels(node: ir.Node, found: Factors) -> bool:
    """Write a 1 x 1 convolution as a product over channels that come last; False if `node` is none."""
    plain = "group" not in node.attributes or node.attributes["group"].as_int() == 1
    if found.weight.shape[2:] != (1, 1) or not plain or any(_ints(node, "pads", [0])):
        return False
    write, x = Writer(node), found.x
    strides = _ints(node, "strides", [1, 1])
    if strides != [1, 1]:
        ranges = {"starts": [0, 0], "ends": [1 << 30] * 2, "axes": [2, 3], "steps": strides}
        x = write.node("Slice", [x, *(write.constant(role, np.array(each)) for role, each in ranges.items())])
    x = write.node("Transpose", [x], perm=[0, 2, 3, 1])
    product = _write_product(write, found, x, np.ascontiguousarray(found.weight[:, :, 0, 0].T))
    replace(found.output, write.node("Transpose", [product], perm=[0, 3, 1, 2]))
    return True


def _as_product(node: ir.Node, found: Factors) -> bool:
    replace(found.output, _write_product(Writer(node), found, found.x, found.weight))
    return True


FORMS = {"MatMul": (_as_product,), "Conv": (_as_convolution, _as_product_of_channels)}


def integer_kernels(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, int]]:
    """(a new model with integer kernels, operator -> how many of them were written).

    `model` has FP32 types and INT8 weights with one scale per output channel, as the exporter writes it.
    """
    result = ir.from_proto(model)
    for node in [each for each in result.graph if each.op_type == "Softmax"]:
        as_attention(node)
    RemoveUnusedNodesPass()(result)
    for node in list(result.graph):
        forms = FORMS.get(node.op_type, ())
        found = factors(node) if forms else None
        if found is not None:
            any(form(node, found) for form in forms)  # the first that fits
    RemoveUnusedNodesPass()(result)
    result.opset_imports[MICROSOFT] = 1
    counts = Counter(node.op_type for node in result.graph if node.op_type in (PRODUCT, CONVOLUTION, ATTENTION))
    return ir.to_proto(result), dict(counts)
