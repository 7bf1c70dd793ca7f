"""The backend TensorRT-RTX, which builds for one or several GPU architectures on a machine without a GPU."""

import importlib.metadata

import onnx

from calib.errors import UserError
from deploy.engine.backends import Built
from deploy.engine.build import Profile, serialize_network
from deploy.engine.loading import why_not_loaded
from deploy.engine.plan_text import kernels_from_rtx_plan
from deploy.gpu import why_no_gpu
from deploy.graph.names import operator_from_name
from deploy.graph.split_channel_scales import split_channel_scales

NAME = "tensorrt_rtx"
INSTALL = "make setup"
DEFAULT_SMS = (86, 89, 120)
SUPPORTED_SMS = (75, 80, 86, 89, 120, 121)

CONVOLUTION_NOTE = (
    "TensorRT-RTX documents no INT8 convolution kernels: its plan shows INT8 operands with FP32 results, and what runs is "
    "chosen on the GPU; for a CNN build with TARGET=tensorrt on a GPU host"
)


def cannot_build() -> str | None:
    """The reason why no engine can be built on this machine, or None."""
    return why_not_loaded(NAME, INSTALL)


def cannot_run() -> str | None:
    """The reason why no engine can be run on this machine, or None."""
    return cannot_build() or why_no_gpu()


def version() -> str:
    """The version of the installed package."""
    return importlib.metadata.version("tensorrt_rtx")


def require_target(sms: tuple[int, ...] | None) -> None:
    """Raise UserError for a GPU architecture that TensorRT-RTX does not support."""
    if wrong := [sm for sm in sms or () if sm not in SUPPORTED_SMS]:
        raise UserError(
            f"TensorRT-RTX has no target SM{wrong[0]}: expected some of {', '.join(map(str, SUPPORTED_SMS))}; "
            f"for other GPUs build with TARGET=tensorrt on that GPU"
        )


def build(model: onnx.ModelProto, profile: Profile, sms: tuple[int, ...] | None) -> Built:
    """Build `model` for the architectures `sms` (default: DEFAULT_SMS).

    Raises UserError for one that TensorRT-RTX does not support, or if the engine cannot be built.
    """
    import tensorrt_rtx as trt

    require_target(sms)
    sms = sms or DEFAULT_SMS

    def configure(config: trt.IBuilderConfig) -> None:
        config.num_compute_capabilities = len(sms)
        for index, sm in enumerate(sms):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)

    safe = split_channel_scales(model)
    plan, _ = serialize_network(trt, safe.SerializeToString(), profile, configure)
    weights = (node.input[1] for node in model.graph.node if node.op_type == "Conv")
    has_quantized_convs = any(operator_from_name(weight) == "DequantizeLinear" for weight in weights)
    return Built(
        plan=plan,
        backend=NAME,
        version=version(),
        targets=tuple(f"SM{sm}" for sm in sms),
        kernels=kernels_from_rtx_plan(plan),
        settings={
            "profile": [1, profile.opt, profile.maximum],
            "compute_capabilities": list(sms),
            "graph_rewrites": ["split_channel_scales"],
        },
        notes=(CONVOLUTION_NOTE,) if has_quantized_convs else (),
    )
