"""The kernels of an engine, one `Kernel` per launch, in a form that does not depend on the version of TensorRT.

Both readers, `plan_text` and `inspector`, return it, so `audit` does not depend on how an engine describes itself.
"""

import re
from collections.abc import Iterable
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
_LAYER = re.compile(r"\[ONNX Layer: (.*?)\](?=[\s\[]|$)")  # separated by \x1e or \x1f, which count as space
_GENERATED = re.compile(r"__myl_([A-Za-z]+)")
_MOVES = {"Cast", "Move", "Resh", "Tran"}


@dataclass(frozen=True)
class Kernel:
    """One launch of a kernel.

    `inputs`, `outputs`: types "int8", "fp16", "fp32", "int32", "int64", "bool", ... or "unknown". The factors come first:
    activation and weight of a gemm or conv; q, k and v of an attention. `layers`: names of the ONNX nodes it covers.
    """

    name: str
    kind: Kind
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[str, ...]

    @property
    def precision(self) -> str:
        """The widest type of the factors, one of PRECISIONS; "unknown" for other types or a missing factor."""
        count = FACTORS.get(self.kind, 0)
        factors = [dtype if dtype in PRECISIONS else "unknown" for dtype in self.inputs[:count]]
        return max(factors, key=PRECISIONS.index) if factors and len(factors) == count else "unknown"


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


def kind_from_generated_name(name: str) -> Kind:
    """The kind of a kernel that TensorRT's compiler generated and named, e.g. "__myl_CastMulFc" or "_gemm_mha_v2".

    A "cast" changes types and perhaps the layout, nothing else.
    """
    if re.search(r"_f?mha", name):
        return "attention"
    generated = _GENERATED.match(name)
    operations = set(re.findall(r"[A-Z][a-z]*", generated[1])) if generated else set()
    if "Fc" in operations:
        return "gemm"
    if "Conv" in operations:
        return "conv"
    return "cast" if "Cast" in operations and operations <= _MOVES else "other"
