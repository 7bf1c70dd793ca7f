"""Small graphs with a known defect, or none, and the engines that TensorRT-RTX builds of them."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from deploy.engine.build import Profile

SCALE, ZERO = np.float16(0.02), np.int8(0)
TEXT = '<ir_version: 10, opset_import: ["" : 21]> '


def weight(*shape, dtype=np.float16):
    values = np.random.default_rng(0).integers(-100, 100, shape)
    return values.astype(dtype) * (1 if dtype == np.int8 else dtype(0.01))


def graph(text, **initializers):
    """The graph in onnx's text form; `__` in the name of a node stands for a slash."""
    model = onnx.parser.parse_model(TEXT + text)
    for node in model.graph.node:
        node.name = node.name.replace("__", "/")
    every = {"s": SCALE, "z": ZERO, **initializers}
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in every.items() if name in used
    )
    onnx.checker.check_model(model)
    return model


def rounded(tensor, node=""):
    """QuantizeLinear and DequantizeLinear of `tensor`, whose result is called `<tensor>_d`."""
    node = node or tensor
    return (
        f"[{node}__QuantizeLinear] {tensor}_8 = QuantizeLinear({tensor}, s, z)"
        f"[{node}__DequantizeLinear] {tensor}_d = DequantizeLinear({tensor}_8, s, z)"
    )


def kernels_of(model):
    """The kernels of the engine that TensorRT-RTX builds of `model`."""
    pytest.importorskip("tensorrt_rtx")
    from deploy.engine.backends import tensorrt_rtx

    return tensorrt_rtx.build(model, Profile(), (89,)).kernels


def mlp(int8, activation="Relu", bias=False, cast=False, island=False):
    """fc1, an activation and fc2 on tokens (N, 16, 64).

    `cast`: fc2 reads its input behind a Cast to FP32. `island`: so does fc2, and what follows it is FP32 too.
    """

    def layer(name, read, write, w):
        before, factor = "", w
        if int8:
            before = rounded(read, name) + f"[{name}__DequantizeLinear_1] {w}_d = DequantizeLinear({w}, s, z)"
            read, factor = f"{read}_d", f"{w}_d"
        if cast and name == "fc2":
            before = rounded("k", name) + "[fc2__Cast] k32 = Cast<to=1>(k_d) [fc2__MatMul] p32 = MatMul(k32, w2_32)"
            return before + "[fc2__Cast_1] y = Cast<to=10>(p32)"
        if island and name == "fc2":
            before = "[fc2__Cast] k32 = Cast<to=1>(k) [fc2__MatMul] p32 = MatMul(k32, w2_32)"
            return before + "[end__Softmax] y32 = Softmax(p32) [fc2__Cast_1] y = Cast<to=10>(y32)"
        product = f"{write}_p" if bias else write
        after = f"[{name}__Add] {write} = Add({product}, {name}_b)" if bias else ""
        return f"{before} [{name}__MatMul] {product} = MatMul({read}, {factor}) {after}"

    middle = f"[act__{activation}] k = {activation}(h)"
    first, second = layer("fc1", "x", "h", "w1"), layer("fc2", "k", "y", "w2")
    dtype = np.int8 if int8 else np.float16
    return graph(
        f"g (float16[N,16,64] x) => (float16[N,16,64] y) {{ {first} {middle} {second} }}",
        **{
            "w1": weight(64, 256, dtype=dtype),
            "w2": weight(256, 64, dtype=dtype),
            "w2_32": weight(256, 64, dtype=np.float32),
        },
        **{"fc1_b": weight(256), "fc2_b": weight(64)},
    )


def attention(scores=True, mix=True, output=True):
    """Attention of 4 heads and a layer that reads it.

    `scores`, `mix`, `output`: whether q k^T, P v and the layer are INT8.
    """
    text = "g (float16[N,4,64,32] q, float16[N,4,32,64] k, float16[N,4,64,32] v) => (float16[N,4,64,16] y) {"
    text += rounded("q") + rounded("k") if scores else ""
    text += f"[attn__MatMul] h = MatMul({'q_d, k_d' if scores else 'q, k'})"
    text += "[attn__Mul] t = Mul(h, s) [attn__Softmax] p = Softmax<axis=-1>(t)"
    text += rounded("p") + rounded("v") if mix else ""
    text += f"[attn__MatMul_1] o = MatMul({'p_d, v_d' if mix else 'p, v'})"
    text += rounded("o") if output else ""
    read = "o_d" if output else "o"
    text += f"[proj__DequantizeLinear] w_d = DequantizeLinear(w, s, z) [proj__MatMul] y = MatMul({read}, w_d) }}"
    return graph(text, w=weight(32, 16, dtype=np.int8))


def residual(int8, shortcut=False):
    """Two convolutions and a shortcut around the second. `shortcut`: whether the other operand of the sum is INT8 too."""
    text = "g (float16[N,32,16,16] x) => (float16[N,32,16,16] y) {"
    for name, read, write in (("conv1", "x", "h"), ("conv2", "a", "r")):
        factor = f"w_{name}"
        if int8:
            text += rounded(read, name) + f"[{name}__DequantizeLinear_1] {factor}_d = DequantizeLinear({factor}, s, z)"
            read, factor = f"{read}_d", f"{factor}_d"
        text += f"[{name}__Conv] {write} = Conv<pads=[1,1,1,1]>({read}, {factor})"
        text += "[act1__Relu] a = Relu(h)" if name == "conv1" else ""
    other = "x_d" if shortcut else "x"
    text += f"[block__Add] t = Add(r, {other}) [act2__Relu] y = Relu(t) }}"
    dtype = np.int8 if int8 else np.float16
    return graph(text, w_conv1=weight(32, 32, 3, 3, dtype=dtype), w_conv2=weight(32, 32, 3, 3, dtype=dtype))
