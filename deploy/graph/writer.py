"""Adds nodes to an ONNX graph, named after the node that they take the place of."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from deploy.graph.constants import add_constant
from deploy.graph.names import constant_name, node_name


class Writer:
    """Writes nodes in a row behind a node, all named `<layer>/<operator>`; `layer` is by default the name of that node."""

    def __init__(self, behind: ir.Node, layer: str = "") -> None:
        assert behind.graph is not None
        self.graph, self.last = behind.graph, behind
        self.layer = layer or behind.name or behind.outputs[0].name or ""
        self.written: Counter[str] = Counter()

    def constant(self, role: str, array: np.ndarray) -> ir.Value:
        """The initializer `<layer>/<role>` with the numbers of `array`."""
        return add_constant(self.graph, constant_name(self.layer, role), array)

    def name_of(self, operator: str, repeat: int) -> str:
        """The name of node number `repeat` (from 0) with this operator."""
        return node_name(self.layer, operator, repeat)

    def node(
        self, operator: str, inputs: Sequence[ir.Value | None], domain: str = "", name: str = "", **attributes: Any
    ) -> ir.Value:
        """The output of a new node, called `name` or by default the next of its operator."""
        name = name or self.name_of(operator, self.written[operator])
        self.written[operator] += 1
        output = ir.Value(name=name)
        node = ir.node(operator, inputs, attributes or None, domain=domain, outputs=[output], name=name)
        self.graph.insert_after(self.last, node)
        self.last = node
        return output


def replace(value: ir.Value, by: ir.Value) -> None:
    """Let `by` take the place of `value`, and its name where the graph returns it."""
    if value.is_graph_output():
        assert value.name is not None
        name = value.name
        value.name, by.name = f"{name}/replaced", name
    by.shape, by.type = value.shape, value.type
    value.replace_all_uses_with(by, replace_graph_outputs=True)
