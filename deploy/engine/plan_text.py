"""Reads the kernels of a TensorRT-RTX engine from the program text inside it, without a GPU or a TensorRT package.

The text is undocumented. An engine of tensorrt-rtx 1.7 holds one or more programs of this shape:

    header { .. outputs={ "y.1" } .. accelerators={sm86 sm89 } }
    descriptors {
      tensor={ .. name="x.1" .. type=int8 }
      sub_tensor={ base="x.1" .. name="x_2^deref" .. type=int8 }
    }
    main {
      fully_connected={ name="f" output={"y.1" } input={"x_2^deref" "w" .. } .. layers="[ONNX Layer: f]" }
    }
    shape_main { arithmetic on shapes, on the host }

1. A name ending in `^deref` is a view of another tensor; a `sub_tensor` of that very name describes it.
2. A program with accelerators={*} is the inside of one launch (`runtime_fusion`, `runtime_function`) of the
   program before it, the launch with the same outputs; where outputs have other names inside, the launch that covers all
   ONNX nodes of the products inside. Only the inside tells what is multiplied: `__myl_CastMulFc` reads INT8, casts, and
   multiplies in FP16.
3. Each optimization profile has its own copy of a program, with outputs called "y [profile 1].1". A request may
   use any profile, so the copy with the fewest INT8 products counts.
4. All GPU architectures of an engine share one program.
5. The operands of `fully_connected` and `corrltn` (a convolution) are activation, weight, alpha, beta, bias.
6. The operands of a fused attention are q, k, masks, v, and perhaps scales.
7. A dimension is a number or the name of a number that `shape_main` computes from the batch size (shape_text.py). Operands
   that are one INT64 or bool are such numbers, no tensors.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from math import prod

from calib.errors import UserError
from deploy.engine.kernels import (
    PRECISIONS,
    Kernel,
    KernelTensor,
    Kind,
    attention_factors,
    attention_macs,
    conv_macs,
    count_kernels,
    dtype_from_text,
    kind_from_generated_name,
    layers_from_metadata,
    product_macs,
)
from deploy.engine.shape_text import dimensions, names_from, shape

WRITTEN_FOR = "1.7"

_OPERATIONS: dict[str, Kind] = {"fully_connected": "gemm", "corrltn": "conv", "deconvolution": "conv"}
_NO_LAUNCH = {"shape_call", "signal", "wait"}
_OUTER = {"runtime_fusion", "runtime_function"}  # launches that have an inside

_START = b"header {\n  version = "
_PROGRAM = re.compile(
    rb"header \{\n(  version = .*?)\n\}\ndescriptors \{\n(.*?)\n\}\nmain \{\n(.*?)\n\}(?:\nshape_main \{\n(.*?)\n\})?",
    re.DOTALL,
)
_NAMES = r'(?:_args)?=\{((?:\s*"[^"]*")*)\s*\}'
_INPUTS = re.compile(" input" + _NAMES)
_OUTPUTS = re.compile(" output" + _NAMES)
_PROGRAM_OUTPUTS = re.compile("^  outputs" + _NAMES, re.MULTILINE)
_DESCRIPTOR = re.compile(
    r'^  (?:sub_)?tensor=\{(?:.* dims=\{([^}]*)\})?.* name="([^"]*)".* type=(\w+) \}$', re.MULTILINE
)
_DIM = re.compile(r'"([^"]*)"|(\d+)')
_LAUNCH = re.compile(r'^  (\w+)=\{ name=(?:"([^"]*)"|(\S+))(.*)$', re.MULTILINE)
_LAYERS = re.compile(r' layers="([^"]*)"')


@dataclass(frozen=True)
class _Program:
    outputs: tuple[str, ...]  # without the profile in their names
    is_inside: bool  # of a launch of the program before it
    tensors: Mapping[str, KernelTensor]
    main: str


def _of_any_profile(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(re.sub(r" \[profile \d+\]", "", name) for name in names)


def _tensor(descriptor: re.Match[str], one: Mapping[str, int], two: Mapping[str, int]) -> KernelTensor:
    """The tensor of a `descriptor`. `one`, `two`: the values of named dimensions for one and for two images."""
    dims, name, dtype = descriptor[1], descriptor[2], dtype_from_text(descriptor[3])
    listed = [] if dims is None else [quoted or number for quoted, number in _DIM.findall(dims)]
    first, second = shape(listed, one), shape(listed, two)
    if dims is None or first is None or second is None:
        return KernelTensor(name, dtype, None)
    grows = prod(second) != prod(first)
    return KernelTensor(name, dtype, None if grows and prod(second) != 2 * prod(first) else first, grows)


def _programs(plan: bytes) -> list[_Program]:
    found = [[(part or b"").decode("utf-8", "replace") for part in match.groups()] for match in _PROGRAM.finditer(plan)]
    if not found or len(found) != plan.count(_START):
        raise UserError(
            "cannot tell which kernels this engine runs: expected the program text 'header {..} descriptors "
            f"{{..}} main {{..}}' of tensorrt-rtx {WRITTEN_FOR} in it, found "
            f"{'only parts of it' if _START in plan else 'none'}; "
            f"build the engine again with tensorrt-rtx {WRITTEN_FOR}"
        )
    programs, one, two = [], {}, {}
    for header, descriptors, main, shape_main in found:
        is_inside = "accelerators={*}" in header
        if not is_inside:  # an inside uses the numbers of the program that it belongs to
            one, two = dimensions(header, shape_main, 1), dimensions(header, shape_main, 2)
        tensors = (_tensor(descriptor, one, two) for descriptor in _DESCRIPTOR.finditer(descriptors))
        outputs = _of_any_profile(names_from(_PROGRAM_OUTPUTS, header))
        programs.append(_Program(outputs, is_inside, {tensor.name: tensor for tensor in tensors}, main))
    return programs


def _macs(operation: str, kind: Kind, reads: tuple[KernelTensor, ...], writes: tuple[KernelTensor, ...]) -> int | None:
    """The multiply-adds per image of a kernel without an inside; None if they are unknown."""
    if kind == "attention":
        return attention_macs(attention_factors(reads), writes)
    if operation not in _OPERATIONS or len(reads) < 2 or not writes:
        return None
    if operation == "fully_connected":
        return product_macs(reads[1], writes[0])
    return conv_macs(reads[1], writes[0] if operation == "corrltn" else reads[0])


def _kernel(
    operation: str, name: str, text: str, tensors: Mapping[str, KernelTensor], inside: tuple[Kernel, ...]
) -> Kernel:
    def operands(pattern: re.Pattern[str]) -> tuple[KernelTensor, ...]:
        found = (tensors.get(each, KernelTensor(each, "unknown", None)) for each in names_from(pattern, text))
        return tuple(each for each in found if not (each.dtype in ("int64", "bool") and each.dims == (1,)))

    reads, writes = operands(_INPUTS), operands(_OUTPUTS)
    layers = _LAYERS.search(text)
    kind = _OPERATIONS.get(operation) or kind_from_generated_name(name)
    factors = attention_factors(reads) if kind == "attention" else ()
    rest = [tensor for tensor in reads if tensor not in factors]
    inputs, macs = tuple(tensor.dtype for tensor in (*factors, *rest)), _macs(operation, kind, reads, writes)
    if operation not in _OPERATIONS and kind in ("gemm", "conv") and {*inputs} != {"fp16"}:
        inputs = ("unknown",) * len(inputs)  # a fused kernel may convert its inputs before it multiplies
    if products := [kernel for kernel in inside if kernel.kind in ("gemm", "conv")]:
        worst = max(products, key=lambda kernel: PRECISIONS.index(kernel.precision))
        kind, inputs, counts = worst.kind, worst.inputs, [kernel.macs for kernel in products]
        macs = None if None in counts else sum(count or 0 for count in counts)
    outputs = tuple(tensor.dtype for tensor in writes)
    return Kernel(name, kind, inputs, outputs, layers_from_metadata(layers[1]) if layers else (), reads, writes, macs)


def _inside_of(
    outputs: tuple[str, ...], layers: Collection[str], insides: Sequence[tuple[_Program, tuple[Kernel, ...]]]
) -> tuple[Kernel, ...]:
    """The kernels inside the launch that has these `outputs` and covers these `layers`; empty if nothing tells them."""
    for inner, kernels in insides:
        if inner.outputs == outputs:
            return kernels
    for _, kernels in insides:
        multiplied = {layer for kernel in kernels if kernel.kind in ("gemm", "conv") for layer in kernel.layers}
        if multiplied and multiplied <= {*layers}:
            return kernels
    return ()


def _kernels(program: _Program, insides: Sequence[tuple[_Program, tuple[Kernel, ...]]]) -> tuple[Kernel, ...]:
    """The launches of `program` in order. `insides`: the programs inside its launches, with their kernels."""
    kernels = []
    for operation, quoted, bare, text in _LAUNCH.findall(program.main):
        if operation in _NO_LAUNCH:
            continue
        inside: tuple[Kernel, ...] = ()
        if operation in _OUTER:
            layers = layers_from_metadata(found[1]) if (found := _LAYERS.search(text)) else ()
            inside = _inside_of(_of_any_profile(names_from(_OUTPUTS, text)), layers, insides)
        kernels.append(_kernel(operation, quoted or bare, text, program.tensors, inside))
    return tuple(kernels)


def _badness(kernels: tuple[Kernel, ...]) -> tuple[int, ...]:
    int8, fp16, fp32, unknown = (
        sum(count_kernels(kernels, kind, precision) for kind in ("gemm", "conv")) for precision in PRECISIONS
    )
    return -int8, unknown, fp32, fp16


def kernels_from_rtx_plan(plan: bytes) -> tuple[Kernel, ...]:
    """The kernels of the TensorRT-RTX engine `plan`, in order of launch.

    If optimization profiles differ, the one with the fewest INT8 products counts. Raises UserError if the engine holds no
    complete program text, as another version of TensorRT-RTX may write.
    """
    programs = _programs(plan)
    copies: dict[tuple[str, ...], list[tuple[Kernel, ...]]] = defaultdict(list)
    for index, program in enumerate(programs):
        if not program.is_inside:
            insides = takewhile(lambda other: other.is_inside, programs[index + 1 :])
            copies[program.outputs].append(_kernels(program, [(inner, _kernels(inner, ())) for inner in insides]))
    worst = [max(group, key=_badness) for group in copies.values()]
    return tuple(chain.from_iterable(worst))
