"""Reads the kernels of a TensorRT engine from the JSON of its `EngineInspector` (verbosity DETAILED).

This reader was written without a TensorRT engine. Its sources are NVIDIA's page "Migrating IEngineInspector Usage from
TensorRT 10.x to 11.x", graph files in the tests of trt-engine-explorer and the reader in the skill trt-perf-analysis (both
NVIDIA/TensorRT), and inspector output of TensorRT 10 in public repositories. So a field that is missing or new makes a
kernel "unknown", never INT8.

1. Types: 10.x has one field, "Format/Datatype": "Row-major Int8"; 11.x has "Format" and "Datatype". (The
   document's "Bindings" became "I/O Tensors"; neither is read here.)
2. A tactic such as `sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize..` names what is multiplied: the first and
   third type, i8 and i8. It outranks the tensors: an engine may read INT8 and multiply in FP32.
3. Without such a name the types of the tensors decide: the first input, then "Weights": {"Type": "Int8"} or
   "Constants". A kernel that the compiler generated may convert before it multiplies, so its tensors prove nothing.
4. "Dimensions" may hold one -1, the number of images. An engine of a fixed batch has none: then sizes and multiply-adds are
   those of its batch, at every batch asked for.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from calib.errors import UserError
from deploy.engine.kernels import (
    Kernel,
    KernelTensor,
    Kind,
    attention_factors,
    attention_macs,
    dtype_from_text,
    kind_from_generated_name,
    layers_from_metadata,
    product_macs,
)

_DETAILED = "build the engine with profiling_verbosity=DETAILED"
_DTYPE_FIELDS = ("Datatype", "DataType", "Format/Datatype", "Format/DataType")
_NO_LAUNCH = {"constant", "noop", "reshape", "shape_call", "signal", "signal_and_wait", "signal_wait", "wait"}
# The first part found in the lower-case LayerType decides: CaskGemmConvolution is a convolution.
_LAYER_TYPES: tuple[tuple[str, Kind], ...] = (
    ("convolution", "conv"),
    ("gemm", "gemm"),
    ("matrixmultiply", "gemm"),
    ("matrix_multiply", "gemm"),
    ("fullyconnected", "gemm"),
)
_TACTICS: tuple[tuple[str, Kind], ...] = (("_fprop_", "conv"), ("_gemm_", "gemm"))
_XMMA = re.compile(r"_(i8|bf16|f16|tf32|f32|e4m3)[a-z]+[\da-z]*_(i8|bf16|f16|tf32|f32|e4m3)[a-z]+\d+_")
_XMMA_DTYPES = {"i8": "int8", "bf16": "bf16", "f16": "fp16", "tf32": "fp32", "f32": "fp32", "e4m3": "fp8"}
_OTHER_TACTICS = (  # first pattern found decides; names that predate the scheme above
    ("int8|imma|i8816|i16832", "int8"),
    ("fp16|(?<!b)f16|hmma|h884|h1688|h16816", "fp16"),
    ("fp32|f32|sgemm|scudnn|ffma", "fp32"),
)


def _tensor(tensor: Mapping[str, Any]) -> KernelTensor:
    dtype = next((dtype_from_text(str(tensor[key])) for key in _DTYPE_FIELDS if key in tensor), "unknown")
    name, dims = str(tensor.get("Name") or ""), tensor.get("Dimensions")
    if not isinstance(dims, list) or not all(isinstance(dim, int) and dim >= -1 for dim in dims) or dims.count(-1) > 1:
        return KernelTensor(name, dtype, None)
    return KernelTensor(name, dtype, tuple(abs(dim) for dim in dims), -1 in dims)


def _tensors(listed: Any) -> tuple[KernelTensor, ...]:
    return tuple(_tensor(tensor) for tensor in listed or ())


def _weight(listed: Mapping[str, Any]) -> KernelTensor:
    """The weight of a layer, of which the document tells how many numbers it has, and not its shape."""
    count = listed.get("Count")
    return KernelTensor(
        "weight", dtype_from_text(str(listed.get("Type"))), (count,) if isinstance(count, int) else None
    )


def _macs(
    kind: Kind, activations: Sequence[KernelTensor], weights: Sequence[KernelTensor], outputs: Sequence[KernelTensor]
) -> int | None:
    """The multiply-adds per image of a kernel; None if they are unknown."""
    if kind == "attention":
        return attention_macs(attention_factors(activations), outputs)
    factors = [*activations[:1], *weights, *activations[1:]]
    if kind not in ("gemm", "conv") or len(factors) < 2 or not outputs:
        return None
    weight, out = factors[1], outputs[0]
    if kind == "gemm":
        return product_macs(weight, out)
    if weight.dims is None or out.dims is None or len(out.dims) < 2:
        return None
    return out.elements * (weight.elements // out.dims[1])  # channels come second, whatever the layout in memory


def _kind_unlisted(name: str, layer_type: str, tactic: str, dtypes: set[str]) -> Kind:
    """The kind of a layer whose LayerType is not listed. `dtypes`: the types of all its tensors."""
    if layer_type == "reformat":
        return "cast" if len(dtypes) > 1 and "int8" not in dtypes else "other"  # with INT8 it quantizes
    kind = kind_from_generated_name(name)
    return kind if kind != "other" else next((named for part, named in _TACTICS if part in tactic), kind)


def _factors_from_tactic(tactic: str) -> tuple[str, ...]:
    """The types of both factors according to the name of a tactic; empty if the name has none."""
    if xmma := _XMMA.search(tactic):
        return _XMMA_DTYPES[xmma[1]], _XMMA_DTYPES[xmma[2]]
    return next(((dtype, dtype) for pattern, dtype in _OTHER_TACTICS if re.search(pattern, tactic)), ())


def _kernel(layer: Mapping[str, Any]) -> Kernel:
    name, layer_type, tactic = (str(layer.get(key) or "") for key in ("Name", "LayerType", "TacticName"))
    activations, outputs, constants = (_tensors(layer.get(key)) for key in ("Inputs", "Outputs", "Constants"))
    if layer.get("Weights"):
        constants = (_weight(layer["Weights"]), *constants)
    dtypes = {tensor.dtype for tensor in (*activations, *outputs)}
    listed = next((kind for part, kind in _LAYER_TYPES if part in layer_type.lower()), None)
    kind = listed or _kind_unlisted(name, layer_type.lower(), tactic.lower(), dtypes)
    factors = attention_factors(activations) if kind == "attention" else ()
    rest = [tensor for tensor in activations if tensor not in factors]
    inputs = tuple(tensor.dtype for tensor in (*factors, *rest, *constants))
    if kind == "conv":  # its further inputs are residuals, never the weight
        weights = tuple(tensor.dtype for tensor in constants) or ("unknown",)
        inputs = (*inputs[: len(activations[:1])], *weights, *(tensor.dtype for tensor in activations[1:]))
    if kind in ("gemm", "conv"):
        inputs = _factors_from_tactic(tactic.lower()) or (inputs if listed else ("unknown",) * len(inputs))
    metadata = layer.get("Metadata")
    return Kernel(
        name=name,
        kind=kind,
        inputs=inputs,
        outputs=tuple(tensor.dtype for tensor in outputs),
        layers=layers_from_metadata(metadata) if isinstance(metadata, str) else (),
        reads=(*activations, *constants),
        writes=outputs,
        macs=_macs(kind, activations, constants, outputs),
    )


def kernels_from_inspector(text: str) -> tuple[Kernel, ...]:
    """The kernels in the order of the engine, from `get_engine_information(LayerInformationFormat.JSON)`.

    `text` may come from TensorRT 10 or 11, or be a list of layers alone. Raises UserError if it is no such document, or
    describes an engine that was built without DETAILED verbosity.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"engine information is not JSON ({error}): ask the inspector for JSON") from None
    layers = document.get("Layers") if isinstance(document, dict) else document
    if not isinstance(layers, list):
        raise UserError("engine information has no list 'Layers': expected TensorRT's engine inspector output as JSON")
    if not layers:
        raise UserError(f"engine information lists no layers, so nothing can be proved: {_DETAILED}")
    if not all(isinstance(layer, dict) and "Name" in layer for layer in layers):
        raise UserError(f"engine information gives layer names only, no types: {_DETAILED}")
    return tuple(_kernel(layer) for layer in layers if str(layer.get("LayerType", "")).lower() not in _NO_LAUNCH)
