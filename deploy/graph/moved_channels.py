"""Which channels of an activation reach an input of an attention product, whatever operators split and transpose them.

Exporters and authors write the same heads in many ways (Split, Slice, Gather, Reshape and Transpose in any order). Instead
of telling these apart, coordinates are sent through the nodes, and what arrives is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from deploy.graph.constants import constant

MOVES = frozenset({"Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Split", "Gather", "Identity"})
SCALES = frozenset({"Mul", "Div"})
SAMPLES, UNKNOWN_LENGTH = 2, 3  # of the coordinates, where the graph leaves the number open


@dataclass(frozen=True)
class Heads:
    """What reaches (B, heads, tokens, width): channel `channels`[h, i] of the source (B, tokens, C), times `scale`."""

    source: ir.Value
    channels: np.ndarray
    scale: float


def data_input(node: ir.Node) -> ir.Value | None:
    """The value that the `node` of `MOVES` or `SCALES` moves or multiplies; None if its other inputs are not constant."""
    data = [each for each in node.inputs if each is not None and constant(each) is None]
    first_only = node.op_type != "Mul"
    return data[0] if len(data) == 1 and (data[0] is node.inputs[0] or not first_only) else None


def path_to(value: ir.Value) -> tuple[ir.Value, list[ir.Node]]:
    """(the value behind all moves and scalings that lead to `value`, these nodes in graph order)."""
    nodes: list[ir.Node] = []
    while (node := value.producer()) is not None and node.op_type in MOVES | SCALES:
        source = data_input(node)
        if source is None:
            break
        nodes.insert(0, node)
        value = source
    return value, nodes


def _length(source: ir.Value, axis: int) -> int:
    size = None if source.shape is None else source.shape[axis]
    return size if isinstance(size, int) else UNKNOWN_LENGTH


def computed(source: ir.Value, nodes: Sequence[ir.Node], target: ir.Value, array: np.ndarray) -> np.ndarray | None:
    """What `target` is when `source` is `array` (float32), through `nodes`; None if they do not take its shape."""
    read = [each for node in nodes for each in node.inputs if each is not None]
    constants = {str(each.name): number for each in read if (number := constant(each)) is not None}
    ends = [
        onnx.helper.make_tensor_value_info(str(each.name), onnx.TensorProto.FLOAT, None) for each in (source, target)
    ]
    initializers = [onnx.numpy_helper.from_array(number, name) for name, number in constants.items()]
    protos = [ir.serde.serialize_node(node) for node in nodes]
    graph = onnx.helper.make_graph(protos, "moves", ends[:1], ends[1:], initializers)
    opset = target.graph.opset_imports.get("", 20) if target.graph is not None else 20
    evaluator = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)]))
    try:
        return np.asarray(evaluator.run(None, {str(source.name): array})[0])  # type: ignore[index]
    except (ValueError, IndexError, RuntimeError):  # of numpy and of the evaluator: the shapes do not fit
        return None


def heads(value: ir.Value, transposed: bool = False) -> Heads | None:
    """What reaches `value` (B, heads, tokens, width), or (B, heads, width, tokens) if `transposed`.

    None if it is anything but the channels of one activation (B, tokens, C), times one number.
    """
    source, nodes = path_to(value)
    if source.shape is None or len(source.shape) != 3 or not isinstance(source.shape[2], int):
        return None
    shape = SAMPLES, _length(source, 1), source.shape[2]
    found = [
        computed(source, nodes, value, each) for each in (*np.indices(shape, np.float32), np.ones(shape, np.float32))
    ]
    arrived = [each for each in found if each is not None and each.ndim == 4]
    if len(arrived) < 4:
        return None
    sample, token, channel, ones = (each.swapaxes(2, 3) for each in arrived) if transposed else arrived
    scale = float(ones.flat[0])
    if ones.shape[0] != SAMPLES or ones.shape[2] != shape[1] or scale == 0 or (ones != ones.flat[0]).any():
        return None
    samples, tokens, channels = (np.rint(each / scale).astype(int) for each in (sample, token, channel))
    in_place = (
        np.array_equal(samples, np.broadcast_to(np.arange(SAMPLES)[:, None, None, None], samples.shape))
        and np.array_equal(tokens, np.broadcast_to(np.arange(shape[1])[:, None], tokens.shape))
        and np.array_equal(channels, np.broadcast_to(channels[:1, :, :1], channels.shape))
    )
    return Heads(source, channels[0, :, 0], scale) if in_place else None


def heads_joined(value: ir.Value, count: int, tokens: int, width: int) -> ir.Value | None:
    """The value behind `value` (B, `count`, `tokens`, `width`) that holds (B, tokens, heads x width), or None."""
    nodes: list[ir.Node] = []
    target = value
    coordinates = np.arange(SAMPLES * count * tokens * width, dtype=np.float32).reshape(SAMPLES, count, tokens, width)
    joined = coordinates.transpose(0, 2, 1, 3).reshape(SAMPLES, tokens, count * width)
    while not target.is_graph_output() and len(users := [user for user, _ in target.uses()]) == 1:
        if users[0].op_type not in MOVES or data_input(users[0]) is not target:
            return None
        nodes.append(users[0])
        target = users[0].outputs[0]
        found = computed(value, nodes, target, coordinates)
        if found is not None and np.array_equal(found, joined):
            return target
    return None
