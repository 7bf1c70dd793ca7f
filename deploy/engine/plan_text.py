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
   program before it, the launch with the same outputs. Only the inside tells what is multiplied:
   `__myl_CastMulFc` reads INT8, casts, and multiplies in FP16.
3. Each optimization profile has its own copy of a program, with outputs called "y [profile 1].1". A request may
   use any profile, so the copy with the fewest INT8 products counts.
4. All GPU architectures of an engine share one program.
5. The operands of `fully_connected` and `corrltn` (a convolution) are activation, weight, alpha, beta, bias.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, takewhile

from calib.errors import UserError
from deploy.engine.kernels import (
    PRECISIONS,
    Kernel,
    Kind,
    count_kernels,
    dtype_from_text,
    kind_from_generated_name,
    layers_from_metadata,
)

WRITTEN_FOR = "1.7"

_OPERATIONS: dict[str, Kind] = {"fully_connected": "gemm", "corrltn": "conv", "deconvolution": "conv"}
_NO_LAUNCH = {"shape_call", "signal", "wait"}

_START = b"header {\n  version = "
_PROGRAM = re.compile(rb"header \{\n(  version = .*?)\n\}\ndescriptors \{\n(.*?)\n\}\nmain \{\n(.*?)\n\}", re.DOTALL)
_NAMES = r'(?:_args)?=\{((?:\s*"[^"]*")*)\s*\}'
_INPUTS = re.compile(" input" + _NAMES)
_OUTPUTS = re.compile(" output" + _NAMES)
_PROGRAM_OUTPUTS = re.compile("^  outputs" + _NAMES, re.MULTILINE)
_DESCRIPTOR = re.compile(r'^  (?:sub_)?tensor=\{.* name="([^"]*)".* type=(\w+) \}$', re.MULTILINE)
_LAUNCH = re.compile(r'^  (\w+)=\{ name=(?:"([^"]*)"|(\S+))(.*)$', re.MULTILINE)
_LAYERS = re.compile(r' layers="([^"]*)"')


@dataclass(frozen=True)
class _Program:
    outputs: tuple[str, ...]  # without the profile in their names
    is_inside: bool  # of a launch of the program before it
    dtypes: Mapping[str, str]  # by tensor name
    main: str


def _names(pattern: re.Pattern[str], text: str) -> tuple[str, ...]:
    found = pattern.search(text)
    return tuple(re.findall('"([^"]*)"', found[1])) if found else ()


def _of_any_profile(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(re.sub(r" \[profile \d+\]", "", name) for name in names)


def _programs(plan: bytes) -> list[_Program]:
    found = [[part.decode("utf-8", "replace") for part in match.groups()] for match in _PROGRAM.finditer(plan)]
    if not found or len(found) != plan.count(_START):
        raise UserError(
            "cannot tell which kernels this engine runs: expected the program text 'header {..} descriptors "
            f"{{..}} main {{..}}' of tensorrt-rtx {WRITTEN_FOR} in it, found "
            f"{'only parts of it' if _START in plan else 'none'}; "
            f"build the engine again with tensorrt-rtx {WRITTEN_FOR}"
        )
    return [
        _Program(
            outputs=_of_any_profile(_names(_PROGRAM_OUTPUTS, header)),
            is_inside="accelerators={*}" in header,
            dtypes={name: dtype_from_text(dtype) for name, dtype in _DESCRIPTOR.findall(descriptors)},
            main=main,
        )
        for header, descriptors, main in found
    ]


def _kernel(operation: str, name: str, text: str, dtypes: Mapping[str, str], inside: tuple[Kernel, ...]) -> Kernel:
    inputs = tuple(dtypes.get(tensor, "unknown") for tensor in _names(_INPUTS, text))
    outputs = tuple(dtypes.get(tensor, "unknown") for tensor in _names(_OUTPUTS, text))
    layers = _LAYERS.search(text)
    kind = _OPERATIONS.get(operation) or kind_from_generated_name(name)
    if operation not in _OPERATIONS and kind in ("gemm", "conv"):
        inputs = ("unknown",) * len(inputs)  # a fused kernel may convert its inputs before it multiplies
    if products := [kernel for kernel in inside if kernel.kind in ("gemm", "conv")]:
        worst = max(products, key=lambda kernel: PRECISIONS.index(kernel.precision))
        kind, inputs = worst.kind, worst.inputs
    return Kernel(name, kind, inputs, outputs, layers_from_metadata(layers[1]) if layers else ())


def _kernels(program: _Program, insides: Mapping[tuple[str, ...], _Program]) -> tuple[Kernel, ...]:
    """The launches of `program` in order. `insides`: the programs inside its launches, by their outputs."""
    kernels = []
    for operation, quoted, bare, text in _LAUNCH.findall(program.main):
        if operation in _NO_LAUNCH:
            continue
        inner = insides.get(_of_any_profile(_names(_OUTPUTS, text)))
        inside = _kernels(inner, {}) if inner else ()
        kernels.append(_kernel(operation, quoted or bare, text, program.dtypes, inside))
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
            copies[program.outputs].append(_kernels(program, {inner.outputs: inner for inner in insides}))
    worst = [max(group, key=_badness) for group in copies.values()]
    return tuple(chain.from_iterable(worst))
