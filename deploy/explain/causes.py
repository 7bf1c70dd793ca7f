"""Why an INT8 engine is hardly faster than FP16: one function per cause.

Each looks at kernels alone and returns lines that name kernels and layers, or none. A cause that only shows against FP16
returns none without the FP16 twin. docs/why-is-int8-not-faster.md has a section for each.
"""

from collections.abc import Callable, Collection, Iterable, Sequence

from deploy.engine.kernels import Kernel, bytes_moved, megabytes_per_image, only_moves
from deploy.explain.compared import PRODUCTS, Compared, covered
from deploy.explain.roofline import BATCHES, LAUNCH_SECONDS, limit, seconds
from deploy.graph.names import layer_from_name, operator_from_name
from deploy.measure.latency import FASTER

ACTIVATIONS = (
    "Gelu",
    "Erf",
    "Relu",
    "LeakyRelu",
    "Clip",
    "Sigmoid",
    "HardSigmoid",
    "HardSwish",
    "Silu",
    "Tanh",
    "Elu",
    "Mish",
)
FEW_BYTES = 0.01  # of all that an engine moves: not worth a word
_SHOWN = 3  # named in a line

Lines = tuple[str, ...]


def _some(names: Iterable[str]) -> str:
    """The first of these names, and how many more there are."""
    listed = list(dict.fromkeys(names))
    more = len(listed) - _SHOWN
    return ", ".join(listed[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _number(things: Sequence[object], name: str) -> str:
    """How many `things` there are: "1 kernel", "2 kernels"."""
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _ordered(layers: Collection[str], kernels: Iterable[Kernel]) -> list[str]:
    """These `layers` in the order in which `kernels` cover them."""
    return list(dict.fromkeys(layer for kernel in kernels for layer in kernel.layers if layer in layers))


def _named(kernels: Iterable[Kernel]) -> str:
    """The first of these kernels, each with the first layer that it covers; those of one name are counted."""
    by_name: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, []).append(kernel)
    shown = []
    for name, same in by_name.items():
        first = next((kernel.layers[0] for kernel in same if kernel.layers), "")
        layer = f" [{first}{', ..' if len(same) > 1 else ''}]" if first else ""
        shown.append((f"{len(same)} x " if len(same) > 1 else "") + name + layer)
    return _some(shown)


def _megabytes(kernels: Iterable[Kernel], batch: int) -> str:
    """What these kernels move per image, as text."""
    return f"{megabytes_per_image(kernels, batch):.3g} MB"


def more_bytes(at: Compared) -> Lines:
    """The engine moves more bytes than FP16."""
    if at.fp16 is None or bytes_moved(at.int8, at.batch) <= bytes_moved(at.fp16, at.batch):
        return ()
    between = [kernel for kernel in at.int8 if kernel.kind not in (*PRODUCTS, "attention")]
    twin = [kernel for kernel in at.fp16 if kernel.kind not in (*PRODUCTS, "attention")]
    largest = sorted(between, key=lambda kernel: -bytes_moved([kernel], at.batch))
    return (
        f"{_megabytes(at.int8, at.batch)} per image at batch {at.batch}, FP16 {_megabytes(at.fp16, at.batch)}",
        f"kernels between products move {_megabytes(between, at.batch)}, in FP16 {_megabytes(twin, at.batch)}; the largest: "
        f"{_named(largest)}",
    )


def lost_int8(at: Compared) -> Lines:
    """A product reads INT8 and multiplies in float: its other factor is float, or lies behind a Cast or another operator."""
    lost = [
        kernel
        for kernel in at.int8
        if kernel.kind in PRODUCTS
        and kernel.precision in ("fp16", "fp32")
        and any(tensor.dtype == "int8" and tensor.elements > 1 for tensor in kernel.reads)
    ]
    return (f"{_number(lost, 'product')} with INT8 operands multiplied in float: {_named(lost)}",) if lost else ()


def casts(at: Compared) -> Lines:
    """Kernels that only change types or layouts, more of them than in FP16."""
    moving = [kernel for kernel in at.int8 if only_moves(kernel)]
    twin = [kernel for kernel in at.fp16 or () if only_moves(kernel)]
    if len(moving) <= len(twin):
        return ()
    known = {layer for kernel in twin for layer in kernel.layers}
    new = [kernel for kernel in moving if not kernel.layers or not known.issuperset(kernel.layers)]
    share = bytes_moved(moving, at.batch) / max(bytes_moved(at.int8, at.batch), 1)
    return (
        f"{_number(moving, 'kernel')} for types and layouts alone, {len(twin)} in FP16, with {share:.0%} of all bytes: "
        f"{_named(new or moving)}",
    )


def _products_around(softmax: str, kernels: Sequence[Kernel]) -> list[Kernel]:
    """The products q k^T and P v of the attention that the node `softmax` belongs to, or the module that it lies in."""
    module = layer_from_name(softmax)
    modules = {module, module.rpartition(".")[0]}
    return [
        kernel
        for kernel in kernels
        if kernel.kind in PRODUCTS
        and any(operator_from_name(layer) == "MatMul" and layer_from_name(layer) in modules for layer in kernel.layers)
    ]


def lost_attention(at: Compared) -> Lines:
    """An attention that FP16 computes in one kernel is several kernels; often only half of it is quantized."""
    outside = covered(at.int8, ["Softmax"], "gemm", "conv", "cast", "other")
    lost = outside & covered(at.fp16, ["Softmax"], "attention") if at.fp16 is not None else outside
    if not lost:
        return ()
    ordered = _ordered(lost, at.int8)
    around = {softmax: {kernel.precision for kernel in _products_around(softmax, at.int8)} for softmax in ordered}
    half = [softmax for softmax, precisions in around.items() if precisions >= {"int8", "fp16"}]
    lines = [f"{_number(ordered, 'attention')} of several kernels: {_some(ordered)}"]
    if half:
        lines.append(f"half INT8, one product INT8 and the other FP16: {_some(half)}")
    return tuple(lines)


def _float32_bytes(kernel: Kernel, sums: set[str], batch: int) -> float:
    """The bytes that `kernel` moves as FP32; the tensors in `sums` do not count."""
    every = (tensor for tensor in (*kernel.reads, *kernel.writes) if tensor.name not in sums)
    return sum(tensor.bytes(batch) for tensor in every if tensor.dtype == "fp32")


def _float32_kernels(kernels: Sequence[Kernel], batch: int, share: float) -> list[Kernel]:
    """The kernels that multiply in FP32, and those of whose bytes more than `share` are FP32, unless these are few bytes.

    What an INT8 convolution writes in FP32 is its sum, which counts as INT8.
    """
    sums = {tensor.name for kernel in kernels if kernel.kind == "conv" for tensor in kernel.writes}
    products = [kernel for kernel in kernels if kernel.kind != "other" and kernel.precision == "fp32"]
    moving = [
        kernel
        for kernel in kernels
        if kernel not in products and _float32_bytes(kernel, sums, batch) > share * bytes_moved([kernel], batch)
    ]
    few = sum(_float32_bytes(kernel, sums, batch) for kernel in moving) < FEW_BYTES * bytes_moved(kernels, batch)
    return products if few else [*products, *moving]


def fp32_island(at: Compared) -> Lines:
    """Kernels that multiply, or mostly move, FP32 where the FP16 engine has hardly any, as it has inside LayerNorm."""
    known = {layer for kernel in _float32_kernels(at.fp16 or (), at.batch, share=0.1) for layer in kernel.layers}
    new = [kernel for kernel in _float32_kernels(at.int8, at.batch, share=0.5) if known.isdisjoint(kernel.layers)]
    return (f"{_number(new, 'kernel')} in FP32: {_named(new)}",) if new else ()


def unfused_activation(at: Compared) -> Lines:
    """An activation that FP16 computes inside the product before it is a kernel of its own, or part of another."""
    if at.fp16 is None:
        return ()
    outside = covered(at.fp16, ACTIVATIONS, *PRODUCTS) & covered(at.int8, ACTIVATIONS, "other")
    lost = outside - covered(at.int8, ACTIVATIONS, *PRODUCTS)
    if not lost:
        return ()
    kernels = [kernel for kernel in at.int8 if lost.intersection(kernel.layers)]
    return (
        f"{_number([*lost], 'activation')} inside a product in FP16 and not in INT8; the kernels that compute them move "
        f"{_megabytes(kernels, at.batch)} per image: {_some(_ordered(lost, at.int8))}",
    )


def missing_shortcut(at: Compared) -> Lines:
    """A convolution and the sum behind it are two kernels, because the other operand of the sum is not INT8."""
    if not any(kernel.kind == "conv" and kernel.precision == "int8" for kernel in at.int8):
        return ()
    sums = covered(at.int8, ["Add"], "other")
    if at.fp16 is not None:
        sums &= covered(at.fp16, ["Add"], "conv")
    unfused = []
    for kernel in at.int8:
        operands = [tensor for tensor in kernel.reads if tensor.grows]
        same = [one for one in operands if any(one is not two and one.elements == two.elements for two in operands)]
        if sums.intersection(kernel.layers) and same and all(tensor.dtype != "int8" for tensor in same):
            unfused.append(kernel)
    return (
        (f"{_number(unfused, 'sum')} of a convolution and a shortcut without INT8: {_named(unfused)}",)
        if unfused
        else ()
    )


def small_products(at: Compared) -> Lines:
    """Most INT8 products are so small or so thin that their speed is not that of INT8 arithmetic."""
    products = [kernel for kernel in at.int8 if kernel.kind in PRODUCTS and kernel.precision == "int8"]
    small = [kernel for kernel in products if limit(kernel, at.gpu, at.batch) != "compute"]
    if 2 * len(small) <= len(products):
        return ()
    return (
        f"{len(small)} of {len(products)} INT8 products are limited by launch or memory at batch {at.batch}, not by "
        f"arithmetic: {_named(small)}",
    )


def launch_bound(at: Compared) -> Lines:
    """Most of the time goes to starting kernels."""
    short = [kernel for kernel in at.int8 if limit(kernel, at.gpu, at.batch) == "launch"]
    if 2 * len(short) * LAUNCH_SECONDS <= seconds(at.int8, at.gpu, at.batch):
        return ()
    more = "" if at.fp16 is None else f"; FP16 has {len(at.fp16)} kernels"
    floor = f"{LAUNCH_SECONDS * 1e6:.0f} us"
    return (
        f"{len(short)} of {len(at.int8)} kernels are shorter than the {floor} that a launch is assumed to take{more}",
    )


def batch_too_small(at: Compared) -> Lines:
    """INT8 gains nothing at this batch and something at a larger one."""
    if (now := at.ratio()) is None or now >= FASTER:
        return ()
    larger = {batch: at.ratio(batch) or 0.0 for batch in BATCHES if batch > at.batch}
    gains = [f"{ratio:.2f} for batch {batch}" for batch, ratio in larger.items() if ratio >= FASTER * max(now, 1)]
    return (f"FP16 / INT8 is estimated at {now:.2f} for batch {at.batch} without a cache, {gains[0]}",) if gains else ()


def fp8_is_better(at: Compared) -> Lines:
    """The GPU multiplies FP8 as fast as INT8, with less loss of accuracy."""
    if not at.gpu.has_fp8:
        return ()
    return (f"{at.gpu.name} (SM{at.gpu.sm}) multiplies FP8 as fast as INT8; this tool makes no FP8 engine",)


CAUSES: dict[str, Callable[[Compared], Lines]] = {
    "It moves more bytes than FP16": more_bytes,
    "INT8 operands multiplied in float": lost_int8,
    "Cast and reformat kernels": casts,
    "Attention is not fused": lost_attention,
    "FP32 island": fp32_island,
    "Activation is not fused": unfused_activation,
    "Shortcut without a quantizer": missing_shortcut,
    "Products are too small": small_products,
    "Launch bound": launch_bound,
    "Batch is too small": batch_too_small,
    "FP8 is the better choice": fp8_is_better,
}


def causes(at: Compared) -> dict[str, Lines]:
    """The causes that hold, with what they say."""
    found = {name: cause(at) for name, cause in CAUSES.items()}
    return {name: lines for name, lines in found.items() if lines}
