"""No tensor is quantized a second time to the integers it already has.

A shortcut in INT8 is dequantized for a residual sum and for the layers that read it, which quantize their inputs by
themselves: with the same scale, because that is what the stage int8_shortcuts chose. The pair of operators in between
changes nothing, and hides from a compiler that all of them read one INT8 tensor.
"""

import numpy as np
import onnx_ir as ir

from deploy.graph.constants import DEQUANTIZE, QUANTIZE, constant


def _constants(node: ir.Node) -> list[np.ndarray] | None:
    """Return scale and zero point of a Q or DQ node; None if they are computed at run time."""
    found = [array for each in node.inputs[1:] if (array := constant(each)) is not None]
    return found if len(found) == len(node.inputs) - 1 else None


def read_the_same_integers(model: ir.Model) -> None:
    """Let whatever quantizes a dequantized tensor by the same numbers read its integers (edits `model`)."""
    for node in list(model.graph):
        given = node.inputs[0] if node.op_type == QUANTIZE else None
        before = None if given is None else given.producer()
        if before is None or before.op_type != DEQUANTIZE:
            continue
        own, earlier = _constants(node), _constants(before)
        if own is None or earlier is None or len(own) != len(earlier):
            continue
        if all(np.array_equal(one, other) and one.size == 1 for one, other in zip(own, earlier, strict=True)):
            ir.convenience.replace_all_uses_with(node.outputs[0], before.inputs[0])  # type: ignore[arg-type]
            model.graph.remove(node, safe=True)
