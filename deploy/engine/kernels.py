"""The kernels of an engine, one `Kernel` per launch, in a form that does not depend on the version of TensorRT.

Both readers, `plan_text` and `inspector`, return it, so `audit` does not depend on how an engine describes itself.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["gemm", "conv", "attention", "cast", "other"]

PRECISIONS = ("int8", "fp16", "fp32", "unknown")  # from best to worst
FACTORS: dict[Kind, int] = {"gemm": 2, "conv": 2, "attention": 3}  # how many inputs are multiplied

_DTYPES = {
    **{"half": "fp16", "float16": "fp16", "fp16": "fp16", "float": "fp32", "float32": "fp32", "fp32": "fp32"},
    **{"bfloat16": "bf16", "bf16": "bf16", "fp8": "fp8", "e4m3": "fp8", "bool": "bool"},
    **{name: name for name in ("int4", "int8", "uint8", "int32", "int64")},
}
_BYTES = {
    **{"int4": 0.5, "int8": 1, "uint8": 1, "fp8": 1, "bool": 1},
    **{"fp16": 2, "bf16": 2, "fp32": 4, "int32": 4, "int64": 8},
}
_LAYER = re.compile(r"\[ONNX Layer: (.*?)\](?=[\s\[]|$)")  # separated by \x1e or \x1f, which count as space
_GENERATED = re.compile(r"__myl_([A-Za-z]+)")
_MOVES = {"Cast", "Move", "Resh", "Tran"}
_COPIES = _MOVES | {"Slic", "Conc", "Repl"}


@dataclass(frozen=True)
class KernelTensor:
    """A tensor that a kernel reads or writes. `dims`: its shape for one image; None if it cannot be read.

    `grows`: whether it has so many elements for every image of a batch, as activations have and weights do not.
    """

    name: str
    dtype: str  # as in `Kernel.inputs`
    dims: tuple[int, ...] | None
    grows: bool = False

    @property
    def elements(self) -> int:
        """The number of elements for one image; 0 for an unknown shape."""
        return math.prod(self.dims) if self.dims is not None else 0

    def bytes(self, batch: int) -> float:
        """The size in bytes for a `batch` of images; 0 for an unknown shape or type."""
        return self.elements * _BYTES.get(self.dtype, 0) * (batch if self.grows else 1)


@dataclass(frozen=True)
class Kernel:
    """One launch of a kernel.

    `inputs`, `outputs`: types "int8", "fp16", "fp32", "int32", "int64", "bool", ... or "unknown". The factors come first:
    activation and weight of a gemm or conv; q, k and v of an attention. `layers`: names of the ONNX nodes it covers.
    `reads`, `writes`: its tensors, those of shape arithmetic left out. `macs`: multiply-adds per image of a gemm, conv or
    attention; None if they cannot be read. `int8_layers`: those of `layers` that it multiplies in INT8 whatever its own
    factors are, as an attention in FP32 may do with the products of its q, k and v.
    """

    name: str
    kind: Kind
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[str, ...]
    reads: tuple[KernelTensor, ...] = ()
    writes: tuple[KernelTensor, ...] = ()
    macs: int | None = None
    int8_layers: tuple[str, ...] = ()

    @property
    def precision(self) -> str:
        """The widest type of the factors, one of PRECISIONS; "unknown" for other types or a missing factor."""
        count = FACTORS.get(self.kind, 0)
        factors = [dtype if dtype in PRECISIONS else "unknown" for dtype in self.inputs[:count]]
        return max(factors, key=PRECISIONS.index) if factors and len(factors) == count else "unknown"


def attention_factors(reads: Sequence[KernelTensor]) -> tuple[KernelTensor, ...]:
    """(q, k, v) among the tensors of a fused attention, which lists q, k, masks and v, then perhaps scales of one element.

    Fewer than three if it has fewer tensors.
    """
    tensors = [tensor for tensor in reads if tensor.dims is None or tensor.elements > 1]
    return (*tensors[:2], *tensors[2:][-1:])


def attention_macs(factors: Sequence[KernelTensor], written: Sequence[KernelTensor]) -> int | None:
    """The multiply-adds per image of q k^T and P v; None if a shape is unknown.

    q (.., S, D) and k with D S_k elements for every D S of q, in any order; the output has D_v values for every row of q.
    """
    if len(factors) < 3 or not written or any(each.dims is None for each in (*factors, written[0])):
        return None
    q, k, out = factors[0], factors[1], written[0]
    rows = q.dims[-2] if q.dims and len(q.dims) > 1 else 1
    keys = rows * k.elements // q.elements if q.elements else 0
    return (q.elements + out.elements) * keys


def product_macs(weight: KernelTensor, out: KernelTensor) -> int | None:
    """The multiply-adds per image of a product with `weight` (.., K, N) that returns `out` (.., M, N); None if unknown."""
    if weight.dims is None or not out.dims:
        return None
    columns = math.prod(weight.dims[:-2]) * out.dims[-1]  # of all matrices: as many as heads in q k^T, else one
    return out.elements * (weight.elements // columns) if columns and weight.elements % columns == 0 else None


def conv_macs(weight: KernelTensor, out: KernelTensor) -> int | None:
    """The multiply-adds per image of a convolution with `weight` (C_out, C_in / groups, ..) that returns `out`."""
    if weight.dims is None or out.dims is None:
        return None
    return out.elements * math.prod(weight.dims[1:])


def bytes_moved(kernels: Iterable[Kernel], batch: int) -> float:
    """The sizes of all tensors that the `kernels` read and write for a `batch` of images, in bytes.

    It is an upper bound of the traffic with the GPU's memory: what a cache still holds is counted again. A tensor that a
    kernel reads twice is counted once for each time it is listed.
    """
    return sum(tensor.bytes(batch) for kernel in kernels for tensor in (*kernel.reads, *kernel.writes))


def megabytes_per_image(kernels: Iterable[Kernel], batch: int) -> float:
    """`bytes_moved` for one image of the `batch`, in 10^6 bytes."""
    return bytes_moved(kernels, batch) / batch / 1e6


def count_kernels(kernels: Iterable[Kernel], kind: Kind, precision: str) -> int:
    """The number of kernels of this `kind` that multiply in this `precision`."""
    return sum(kernel.kind == kind and kernel.precision == precision for kernel in kernels)


def dtype_from_text(text: str) -> str:
    """The type that `text` names, e.g. "half", "Row-major Int8", "Row major linear FP32"; "unknown" if it names none."""
    words = (word.lower() for word in re.findall(r"[A-Za-z]+\d*", text))
    return next((_DTYPES[word] for word in words if word in _DTYPES), "unknown")


def layers_from_metadata(text: str) -> tuple[str, ...]:
    """The distinct node names in "[ONNX Layer: a]\\x1f[ONNX Layer: b]", in order."""
    return tuple(dict.fromkeys(_LAYER.findall(text)))


def _generated_operations(name: str) -> set[str]:
    """The operations in the name of a kernel that the compiler generated, e.g. {"Cast", "Mul", "Fc"}; else none."""
    generated = _GENERATED.match(name)
    return set(re.findall(r"[A-Z][a-z]*", generated[1])) if generated else set()


def only_moves(kernel: Kernel) -> bool:
    """Whether `kernel` computes nothing: it changes the type, the layout or the place of numbers."""
    operations = _generated_operations(kernel.name)
    return kernel.kind == "cast" or (bool(operations) and operations <= _COPIES) or "Reformatting" in kernel.name


def kind_from_generated_name(name: str) -> Kind:
    """The kind of a kernel that TensorRT's compiler generated and named, e.g. "__myl_CastMulFc" or "_gemm_mha_v2".

    A "cast" changes types and perhaps the layout, nothing else.
    """
    if re.search(r"_f?mha", name):
        return "attention"
    operations = _generated_operations(name)
    if "Fc" in operations:
        return "gemm"
    if "Conv" in operations:
        return "conv"
    return "cast" if "Cast" in operations and operations <= _MOVES else "other"
