"""Constants of an ONNX graph: reading and adding them, and operators that apply them."""

import numpy as np
import onnx_ir as ir

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer or Constant node; None for a value computed at run time."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def add_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """The initializer called `name` with the numbers of `array`; it is made unless `graph` has it."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def insert_behind(node: ir.Node, operator: str, name: str, value: ir.Value) -> None:
    """Apply the element-wise `operator` with the constant `value` to what `node` returns (edits the graph).

    All that read the one read the other, called `name`; an output of the graph keeps its name.
    """
    before = node.outputs[0]
    behind = ir.Value(name=name, shape=before.shape, type=before.type)
    if before.is_graph_output():
        before.name, behind.name = node.name, before.name
    before.replace_all_uses_with(behind, replace_graph_outputs=True)
    assert node.graph is not None
    node.graph.insert_after(node, ir.node(operator, [before, value], outputs=[behind], name=name))
