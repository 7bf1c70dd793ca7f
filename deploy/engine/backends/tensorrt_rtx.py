"""The backend TensorRT-RTX, which builds for one or several GPU architectures on a machine without a GPU."""

import importlib
import importlib.metadata
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.errors import UserError
from deploy.engine.architectures import RTX_DEFAULT, RTX_SMS, why_not_rtx
from deploy.engine.backends import Built
from deploy.engine.build import Profile, serialize_network
from deploy.engine.builder import DEFAULT, Builder
from deploy.engine.device import Device
from deploy.engine.loading import why_not_loaded
from deploy.engine.plan_text import kernels_from_rtx_plan
from deploy.engine.runner import EngineRunner
from deploy.gpu import gpu, why_no_gpu

if TYPE_CHECKING:
    import onnx

NAME = "tensorrt_rtx"
FP16 = True
INSTALL = "make setup"

PROGRAM = re.compile(rb"header \{\n  version = .*?\nmain \{\n.*?\n\}", re.DOTALL)  # see deploy/engine/plan_text.py

CONVOLUTION_NOTE = (
    "TensorRT-RTX documents no INT8 convolution kernels: its plan shows INT8 operands with float results, and what runs is "
    "chosen on the GPU; for a CNN build with TARGET=tensorrt on a GPU host"
)


def cannot_build() -> str | None:
    """The reason why no engine can be built on this machine, or None."""
    return why_not_loaded(NAME, INSTALL)


def cannot_run() -> str | None:
    """The reason why no engine can be run on this machine, or None."""
    return cannot_build() or why_no_gpu() or why_not_rtx()


def device_name() -> str:
    """What engines run on here. Raises NoGpuError without a GPU."""
    return gpu().name


def runner(plan: bytes, device: Device | None = None, kernels_file: Path | None = None) -> EngineRunner:
    """What runs the engine `plan` inside its `with`, by default on the first visible GPU."""
    return EngineRunner(plan, importlib.import_module(NAME), device, kernels_file)


def version() -> str:
    """The version of the installed package."""
    return importlib.metadata.version("tensorrt_rtx")


def depends_on() -> dict[str, Any]:
    """What of this machine, beside the version, decides an engine: nothing."""
    return {}


def require_target(sms: tuple[int, ...] | None, builder: Builder = DEFAULT) -> None:
    """Raise UserError for a GPU architecture that TensorRT-RTX does not support, or anything told to its builder."""
    builder.require_none(NAME)
    if wrong := [sm for sm in sms or () if sm not in RTX_SMS]:
        raise UserError(
            f"TensorRT-RTX has no target SM{wrong[0]}: expected some of {', '.join(map(str, RTX_SMS))}; "
            f"for other GPUs build with TARGET=tensorrt on that GPU"
        )


def build(model: "onnx.ModelProto", profile: Profile, sms: tuple[int, ...] | None, builder: Builder = DEFAULT) -> Built:
    """Build `model` for the architectures `sms`; None: for RTX_DEFAULT, with an engine of the same size.

    Raises UserError for one that TensorRT-RTX does not support, or if the engine cannot be built.
    """
    import tensorrt_rtx as trt

    from deploy.graph.names import operator_from_name
    from deploy.graph.split_channel_scales import split_channel_scales

    require_target(sms, builder)
    chosen = sms or ()

    def configure(config: trt.IBuilderConfig) -> None:
        config.num_compute_capabilities = len(chosen)
        for index, sm in enumerate(chosen):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)

    safe = split_channel_scales(model)
    plan, _ = serialize_network(trt, safe.SerializeToString(), profile, configure)
    weights = (node.input[1] for node in model.graph.node if node.op_type == "Conv")
    has_quantized_convs = any(operator_from_name(weight) == "DequantizeLinear" for weight in weights)
    return Built(
        plan=plan,
        backend=NAME,
        version=version(),
        targets=tuple(f"SM{sm}" for sm in chosen) or RTX_DEFAULT,
        kernels=kernels_from_rtx_plan(plan),
        layers={"programs": [text.decode("utf-8", "replace").splitlines() for text in PROGRAM.findall(plan)]},
        settings={
            "profile": [1, profile.opt, profile.maximum],
            "compute_capabilities": list(chosen),
            "graph_rewrites": ["split_channel_scales"],
        },
        notes=(CONVOLUTION_NOTE,) if has_quantized_convs else (),
    )
