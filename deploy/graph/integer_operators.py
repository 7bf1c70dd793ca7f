"""The operators with which ONNX Runtime multiplies integers, and the layers that their nodes compute."""

MICROSOFT = "com.microsoft"  # their domain
# those that deploy/graph/integer_kernels.py writes
PRODUCT, CONVOLUTION, ATTENTION = "MatMulIntegerToFloat", "QLinearConv", "QAttention"
INTEGER_PRODUCTS = frozenset({PRODUCT, "MatMulInteger", "QLinearMatMul", "QGemm"})
INTEGER_CONVOLUTIONS = frozenset({CONVOLUTION, "ConvInteger"})
BETWEEN = "+"  # the names of nodes that one kernel computes


def computed_nodes(name: str, operator: str) -> tuple[str, ...]:
    """The names of the nodes of the Q/DQ graph that the node `name` computes, which is its own unless it was written here.

    A written node is called `<node>/<operator>`, or `<node>+<node>+<node>/<operator>` for queries, keys and values.
    """
    return tuple(name.rpartition("/")[0].split(BETWEEN)) if operator in (PRODUCT, CONVOLUTION, ATTENTION) else (name,)
