"""The options of all ONNX Runtime sessions: with them, results do not depend on the processor."""

import functools
from typing import Any

DEPTH = 64  # of the sum that tells whether a processor's INT8 kernels are exact
LARGEST = 127
EXACT_SUMS = "session.x64quantprecision"


def _options(threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return options


@functools.cache
def saturates() -> bool:
    """Whether ONNX Runtime's default INT8 kernels get the largest sum of products wrong on this processor.

    Those for processors without VNNI add two products in 16 bits. `EXACT_SUMS` selects others, which are exact there and
    slower than VNNI's elsewhere.
    """
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    constants = {
        "one": np.float32(1), "zero": np.int8(0), "weight": np.full((DEPTH, 16), LARGEST, np.int8),
        "ones": np.ones(16, np.float32), "zeros": np.zeros(16, np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["weight", "ones", "zeros"], ["w"], axis=1),
        helper.make_node("MatMul", ["xq", "w"], ["y"]),
    ]
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in (("x", DEPTH), ("y", 16))
    )
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "product", [x], [y], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), _options(1), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full((1, DEPTH), LARGEST, np.float32)})
    return not np.array_equal(found, np.full((1, 16), LARGEST * LARGEST * DEPTH))


def ort_options(threads: int) -> Any:
    """`SessionOptions` for `threads` threads that log nothing but errors, with exact sums of INT8 products."""
    options = _options(threads)
    if saturates():
        options.add_session_config_entry(EXACT_SUMS, "1")
    return options
