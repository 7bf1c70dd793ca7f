"""The INT8 graph as ONNX Runtime computes it fastest on a CPU, and what of a graph it computes in integers."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.graph.integer_operators import ATTENTION, INTEGER_CONVOLUTIONS, INTEGER_PRODUCTS, computed_nodes
from deploy.measure.onnx_runner import THREADS, readable
from deploy.measure.ort_options import ort_options, saturates

if TYPE_CHECKING:
    import onnx


def integer_graph(model: Path) -> tuple[Path | bytes, dict[str, int]]:
    """(the INT8 graph `model` with integer kernels, operator -> how many deploy/graph/integer_kernels wrote).

    It is `model` itself where the kernels for unsigned activations saturate on this processor.
    """
    import onnx

    from deploy.graph.integer_kernels import integer_kernels

    if saturates():
        return model, {}
    rewritten, written = integer_kernels(onnx.load_model_from_string(model.read_bytes()))
    return rewritten.SerializeToString(), written


def optimized(model: Path | bytes) -> "onnx.ModelProto":
    """The graph `model` as a session of ONNX Runtime computes it on this CPU."""
    import onnx
    import onnxruntime as ort

    options = ort_options(THREADS)
    source = readable(model) if isinstance(model, Path) else model
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = os.path.join(folder, "optimized.onnx")
        ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath, load_external_data=False)


def integer_layers(model: Path | bytes) -> int:
    """The number of layers of `model` that ONNX Runtime computes in integers on this CPU: products and convolutions with a
    constant weight, not those of an attention.
    """
    integers, graph = INTEGER_PRODUCTS | INTEGER_CONVOLUTIONS | {ATTENTION}, optimized(model).graph
    weights = {each.name for each in graph.initializer if len(each.dims) > 1}
    nodes = [node for node in graph.node if node.op_type in integers and not weights.isdisjoint(node.input)]
    return sum(len(computed_nodes(node.name, node.op_type)) for node in nodes)
