"""The bridge: exports a torch network with Q/DQ operators to ONNX that TensorRT reads without changes.

A strongly typed engine takes its types from the graph, so one trace becomes two graphs: with FP16 types for TensorRT
(`model.onnx`) and with FP32 types for ONNX Runtime on a CPU (`model.fp32.onnx`), with the same integers and scales.
"""

import ast
import builtins
import io
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript import opset21
from onnxscript.optimizer._constant_folding import FoldConstantsPass
from torch import Tensor, nn

from calib.errors import UserError, first_line
from calib.grids import why_not_int8
from calib.input_rows import separate_inputs
from calib.modules import first_names, without_call
from calib.network.fp16_range import require_fp16_weights
from calib.network.qdq import SimulatedQuantizer  # the module defines the operators translated here, too
from calib.outputs import OUTPUT, outputs_of, separate_outputs
from calib.quiet import quiet
from deploy.bridge.quick import quick_export
from deploy.graph.half import no_fp32
from deploy.graph.names import INPUT, node_name, value_name
from deploy.graph.requantize import read_the_same_integers
from deploy.graph.separate_biases import separate_biases
from deploy.graph.zero_points import with_zero_points
from deploy.package import WEIGHTS

OPSET = 21  # has int8 Q/DQ with FP16 scales and native LayerNormalization/Gelu; newer ones give fused Attention nodes
op: Any = opset21  # its operators are typed for tracing functions, not for calls from translations
MASKED = -3e4  # a score that FP16 can hold
LARGEST_FILE = (1 << 31) - (1 << 24)  # bytes of weights: protobuf holds less than 2^31 with all else
LARGEST_CONSTANT = 1 << 24  # elements of a tensor that is computed at export


def _write_quantize_dequantize(x: Any, scale: Any) -> Any:
    zero_point = op.Constant(value=ir.to_proto(ir.tensor(0, dtype=ir.DataType.INT8, name="zero_point")))
    return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)


def _write_dequantize_weight(q: Any, scale: Any, axis: int) -> Any:
    return op.DequantizeLinear(q, scale, axis=axis) if len(scale.shape) else op.DequantizeLinear(q, scale)


def _write_attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale=None,
    enable_gqa: bool = False,
):
    """Write softmax(q a (k b)^T) v with a b = s, the scale of the scores, without shape arithmetic on k.

    The exporter's own form reshapes k by its run-time shape, which costs a TensorRT engine two more kernels per block and a
    separate fused-attention kernel for each. If the scores were scaled instead of q and k, a packed qkv would not run in
    INT8, because the compiler would move the slices into the weight.
    """
    if dropout_p:
        raise UserError("attention with dropout cannot be exported: expected a network in eval mode")
    of_query, of_key = _factors_of(scale if scale is not None else query.shape[-1] ** -0.5)
    rank, tokens = len(query.shape), (query.shape[-2], key.shape[-2])
    if enable_gqa:
        key, value = (_repeated_heads(each, query.shape[1] // each.shape[1]) for each in (key, value))
    keys = op.Transpose(
        op.Mul(key, op.CastLike(op.Constant(value_float=of_key), key)), perm=[*range(rank - 2), rank - 1, rank - 2]
    )
    scores = op.MatMul(op.Mul(query, op.CastLike(op.Constant(value_float=of_query), query)), keys)
    if is_causal:
        seen = np.tril(np.ones(tokens, bool))
        attn_mask = op.Constant(value=ir.to_proto(ir.tensor(seen, name="seen")))
    if attn_mask is not None:
        boolean = is_causal or attn_mask.dtype == ir.DataType.BOOL
        scores = op.Add(scores, _mask_to_add(attn_mask, query) if boolean else attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _factors_of(scale: float) -> tuple[float, float]:
    """Two factors of `scale` near its root, the first with its sign: powers of two if it is one, so that no product with
    them is rounded.
    """
    mantissa, exponent = math.frexp(abs(scale))
    if mantissa != 0.5:
        return math.copysign(abs(scale) ** 0.5, scale), abs(scale) ** 0.5
    half = (exponent - 1) // 2
    return math.copysign(2.0**half, scale), 2.0 ** (exponent - 1 - half)


def _mask_to_add(mask: Any, like: Any) -> Any:
    """Return what is added to scores: 0 where `mask` is true, elsewhere a number whose exponential is 0 in FP16 too."""
    zero, never = (op.CastLike(op.Constant(value_float=value), like) for value in (0.0, MASKED))
    return op.Where(mask, zero, never)


def _repeated_heads(x: Any, times: int) -> Any:
    """Return `x` (B, H, N, d) with every head `times` times in a row."""
    axis = op.Constant(value_ints=[2])
    repeated = op.Concat(*[op.Unsqueeze(x, axis)] * times, axis=2)
    return op.Reshape(repeated, op.Constant(value_ints=[0, x.shape[1] * times, -1, x.shape[-1]]))


def _write_fold(
    x: Any, output_size: Sequence[int], kernel_size: Sequence[int], dilation: Any, padding: Any, stride: Any
) -> Any:
    """torch's fold (col2im) of patches (B, C kh kw, L), which TensorRT does not know: a transposed convolution adds them up.

    Channel c kh kw + i goes to position i of the window of channel c.
    """
    taps, height_width = math.prod(kernel_size), []
    for size, kernel, dilate, pad, step in zip(output_size, kernel_size, dilation, padding, stride, strict=True):
        height_width.append((size + 2 * pad - dilate * (kernel - 1) - 1) // step + 1)
    beyond = [
        size - ((count - 1) * step - 2 * pad + dilate * (kernel - 1) + 1)
        for size, count, kernel, dilate, pad, step in zip(
            output_size, height_width, kernel_size, dilation, padding, stride, strict=True
        )
    ]
    channels = x.shape[1] // taps
    weight = np.tile(np.eye(taps, dtype=np.float32).reshape(taps, 1, *kernel_size), (channels, 1, 1, 1))
    return op.ConvTranspose(
        op.Reshape(x, op.Constant(value_ints=[0, channels * taps, *height_width])),
        op.Constant(value=ir.to_proto(ir.tensor(weight, name="windows"))),
        group=channels, dilations=list(dilation), pads=[*padding, *padding], strides=list(stride), output_padding=beyond,
    )  # fmt: skip


TRANSLATION: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.scaled_dot_product_attention.default: _write_attention,
    torch.ops.aten.col2im.default: _write_fold,
    torch.ops.int8.quantize_dequantize.default: _write_quantize_dequantize,
    torch.ops.int8.dequantize_weight.default: _write_dequantize_weight,
}


def _module_of(node: ir.Node) -> str:
    """Dotted name of the torch module that produced `node`, empty for the network itself.

    The exporter records scopes `['', 'a', 'a.b', operator]`.
    """
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    modules = [scope for scope in scopes[:-1] if scope and not scope.startswith("_")]
    return without_call(modules[-1]) if modules else ""


def name_nodes(model: ir.Model, net: nn.Module) -> None:
    """Name every node and its outputs after its module of `net`, as deploy/graph/names.py says (edits `model`)."""
    first = first_names(net)
    seen: Counter[str] = Counter()  # by name: a module may be called as the network itself is here
    outputs = set(model.graph.outputs)
    for node in model.graph:
        own, operator = _module_of(node), node.op_type
        module = first.get(own, own)
        name = node_name(module, operator)
        node.name = node_name(module, operator, repeat=seen[name])
        seen[name] += 1
        for index, value in enumerate(node.outputs):
            if value not in outputs:
                value.name = value_name(node.name, index)


def _require_own_names(model: ir.Model, outputs: Sequence[str]) -> None:
    """Raise UserError if an output has the name of another value: TensorRT would report a graph with a cycle."""
    taken = {value.name for value in model.graph.inputs} | {*model.graph.initializers}
    for name in outputs:
        if name in taken:
            raise UserError(f"the output '{name}' has the name of an input or of a weight: expected another name")


def _require_any_number(model: ir.Model, kind: str) -> None:
    """Raise UserError if the graph takes one number of samples only."""
    for value in model.graph.inputs:
        if value.shape is None or value.shape.is_static(0):
            raise UserError(
                f"{kind} fixes the number of samples of '{value.name}' when it is traced: expected a forward pass for any "
                f"number; write x.shape[0] where it says int(x.shape[0]) or a number"
            )


def fold_constants(model: ir.Model) -> None:
    """Compute what depends on constants only, in the types of the graph (edits `model`); integer weights stay as they are.

    Position tables and masks are computed in FP32 by many networks, and would be islands of FP32 in an engine.
    """
    fold = FoldConstantsPass(
        shape_inference=False,
        input_size_limit=LARGEST_CONSTANT,
        output_size_limit=LARGEST_CONSTANT,
        should_fold=lambda node: False if node.op_type in ("DequantizeLinear", "QuantizeLinear") else None,
    )
    with _quiet():
        fold(model)


@contextmanager
def _said_in_one_line(kind: str) -> Iterator[None]:
    """Turn what the exporter raises into a UserError with the first line of its cause; a UserError stays as it is."""
    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        line = first_line(cause, 300)
        raise UserError(
            f"{kind} cannot be exported to ONNX ({type(cause).__name__}: {line}): expected operators that torch.onnx knows, "
            f"and code that keeps the type of its inputs"
        ) from error


@contextmanager
def _len_that_varies() -> Iterator[None]:
    """Let `len(x)` of a tensor be its first size as the trace knows it: Python's own makes a fixed number of it."""
    plain = builtins.len

    def traced(x: Any) -> Any:
        return x.shape[0] if isinstance(x, Tensor) and x.ndim else plain(x)

    builtins.len = traced
    try:
        yield
    finally:
        builtins.len = plain


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the progress that the exporter prints on stdout and stderr."""
    with quiet("torch.onnx"), redirect_stdout(io.StringIO()):
        yield


def onnx_from_net(
    net: nn.Module,
    example: Tensor | Mapping[str, Tensor],
    outputs: Sequence[str] = (OUTPUT,),
) -> onnx.ModelProto:
    """`net` as ONNX with a dynamic batch size; `example` determines shapes and types: images (B >= 2, 3, H, W), or the named
    inputs (B >= 2, ...) in the order of the forward pass, whose names the graph has.

    `outputs`: names, in the order that `net` returns them.

    Raises UserError for a quantizer that only a simulation can compute, whose name it says, for a forward pass that takes
    one number of samples only, and for what torch.onnx cannot export.
    """
    for module in net.modules():
        if isinstance(module, SimulatedQuantizer):
            raise UserError(
                f"quantizer '{module.quantizer}' has {why_not_int8(module.grid)}: it is simulated only, no INT8 kernel "
                f"of TensorRT reads it"
            )
    named = None if isinstance(example, Tensor) else dict(example)
    each = {0: torch.export.Dim("batch")}
    with (
        _quiet(),
        torch.no_grad(),
        _said_in_one_line(type(net).__name__),
        separate_outputs(net),
        _len_that_varies(),
        quick_export() as weights,
    ):
        program = torch.onnx.export(
            net,
            (example,) if named is None else (),
            kwargs=named,
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT] if named is None else list(named),
            output_names=list(outputs),
            dynamic_shapes=(each,) if named is None else dict.fromkeys(named, each),
            custom_translation_table=TRANSLATION,
            verbose=False,
        )
    assert program is not None
    _require_any_number(program.model, type(net).__name__)
    fold_constants(program.model)
    read_the_same_integers(program.model)
    name_nodes(program.model, net)
    _require_own_names(program.model, outputs)
    proto = program.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]
    for value in [*weights, *program.model.graph.initializers.values()]:
        value.const_value = None  # the exporter's rewriter keeps the graph that it saw last
    return proto


# (height, width) of images in pixels, or two or more rows of named inputs, float32 (B, N)
Example = tuple[int, int] | Tensor


def export_pair(net: nn.Module, example: Example, half: bool = True) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """(`model.onnx`, `model.fp32.onnx`) of a quantized network, traced once; `half`: the former has FP16 types, else FP32.

    Raises UserError if a weight or scale does not fit FP16 types.
    """
    if half:
        require_fp16_weights(net)
    traced = export_float(net, example)
    return halved(traced) if half else separate_biases(traced), _for_onnx_runtime(traced)


def export_fp16(net: nn.Module, example: Example) -> onnx.ModelProto:
    """`net` as ONNX with FP16 types, for an engine. Inputs of integers or truths stay so.

    Raises UserError if a weight or scale does not fit FP16.
    """
    require_fp16_weights(net)
    return halved(export_float(net, example))


def export_float(net: nn.Module, example: Example) -> onnx.ModelProto:
    """`net` as ONNX with FP32 types, as it is. That of the float network is the reference of fidelity and speed."""
    samples = example if isinstance(example, Tensor) else torch.zeros(2, 3, *example)
    names = [output.name for output in outputs_of(net, samples)]
    return onnx_from_net(net, separate_inputs(net, samples), names)


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a float graph to `path`; the weights of one that is too large for a file of protobuf go to a file beside it."""
    weights = sum(len(each.raw_data) for each in model.graph.initializer)
    if weights < LARGEST_FILE:
        onnx.save(model, path)
    else:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}{WEIGHTS}")


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """A new model with FP16 types of one with FP32 types, for an engine, which computes in the types of its graph."""
    half = ir.from_proto(model)
    no_fp32(half)
    return separate_biases(ir.to_proto(half))


def _for_onnx_runtime(model: onnx.ModelProto) -> onnx.ModelProto:
    return with_zero_points(separate_biases(model))
