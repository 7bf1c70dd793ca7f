"""The names of ONNX nodes: `<layer>/<operator>`, the contract between graph, simulation and engine.

`blocks.3.attn.qkv/MatMul` is the MatMul of the torch module `blocks.3.attn.qkv`, `blocks.3.attn/MatMul_1` the second
MatMul of `blocks.3.attn`. The first output of a node has the name of the node, output i > 0 the name `<node>:<i>`. The
kernels of an engine refer to nodes by these names, and so do the parity check and the audit: no other module may put
such a name together or take one apart.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from calib.errors import UserError

if TYPE_CHECKING:
    import onnx

INPUT = "input"  # of every graph
NETWORK = "net"  # the layer of nodes that lie in no module but the network itself
_NAME = re.compile(r"(?P<layer>.*)/(?P<operator>[^/]*?)(?P<repeat>_\d+)?(?P<output>:\d+)?")


def node_name(layer: str, operator: str, repeat: int = 0) -> str:
    """The name of node number `repeat` (from 0) with this operator in `layer`, the dotted name of a torch module."""
    return f"{layer or NETWORK}/{operator}" + (f"_{repeat}" if repeat else "")


def value_name(node: str, output: int = 0) -> str:
    """The name of output number `output` of the node called `node`."""
    return f"{node}:{output}" if output else node


def layer_from_name(name: str) -> str:
    """The layer that a node or value belongs to; an empty string for a name without a layer."""
    return name.rpartition("/")[0]


def operator_from_name(name: str) -> str:
    """The operator of a node, or of the node that returns a value; an empty string for a name of another form."""
    found = _NAME.fullmatch(name)
    return found["operator"] if found else ""


def renamed_operator(name: str, operator: str) -> str:
    """The name that `name` has with another operator: the same layer, the same number."""
    found = _NAME.fullmatch(name)
    return f"{found['layer']}/{operator}{found['repeat'] or ''}" if found else f"{name}/{operator}"


def constant_name(value: str, role: str) -> str:
    """The name of an initializer that belongs to the value or node called `value`."""
    return f"{value}/{role}"


def nodes_by_layer(model: "onnx.ModelProto", *operators: str) -> "dict[str, list[onnx.NodeProto]]":
    """Layer -> its nodes with one of these operators, in graph order: one for every call of the layer."""
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        if node.op_type in operators:
            found.setdefault(layer_from_name(node.name), []).append(node)
    return found


def require_unique(model: "onnx.ModelProto", names: Iterable[str]) -> tuple[str, ...]:
    """`names`, each of which has to be the name of exactly one node of `model`. Raises UserError naming the first other."""
    names, uses = tuple(names), Counter(node.name for node in model.graph.node)
    if shared := [name for name in names if not name or uses[name] > 1]:
        raise UserError(
            f"ONNX node name '{shared[0]}' of a quantized layer is used {uses[shared[0]]} times: expected a "
            "name of its own for each node, to find it again in the engine; name the nodes before building"
        )
    return names
