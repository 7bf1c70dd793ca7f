"""The backend ONNX Runtime: INT8 kernels of a CPU, for hosts without an NVIDIA GPU. Its engine is a graph.

The engine is the FP32-typed graph with ONNX Runtime's integer kernels written into it (deploy/graph/integer_kernels.py), for
any session of ONNX Runtime. Where the kernels for unsigned activations saturate, as on x86 processors without VNNI, it is
the graph itself. What is computed in integers is read from the graph as a session optimizes it on this machine.
"""

import importlib.metadata
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.errors import UserError
from deploy.engine.backends import ONNXRUNTIME, Built
from deploy.engine.build import Profile
from deploy.engine.builder import DEFAULT, Builder
from deploy.engine.device import Device
from deploy.engine.graph_runner import GraphRunner
from deploy.engine.kernels import Kernel, Kind
from deploy.engine.loading import why_not_loaded
from deploy.graph.integer_operators import ATTENTION, INTEGER_CONVOLUTIONS, INTEGER_PRODUCTS, computed_nodes
from deploy.host import int8_instructions, processor
from deploy.measure.integer_graph import optimized
from deploy.measure.ort_options import saturates

if TYPE_CHECKING:
    import onnx

NAME = ONNXRUNTIME
INSTALL = "make setup"
FP16 = False  # its kernels multiply integers or FP32
APART = (
    "ONNX Runtime has no fused INT8 attention: its products run as kernels of their own, slower than attention in FP32, "
    "which is fused with the products of q, k and v; a recipe without [attention] suits this target"
)
KINDS: dict[str, tuple[Kind, str]] = {  # by operator of the optimized graph: what it multiplies, and in which type
    **dict.fromkeys(INTEGER_PRODUCTS, ("gemm", "int8")),
    **dict.fromkeys(INTEGER_CONVOLUTIONS, ("conv", "int8")),
    **dict.fromkeys(("MatMul", "Gemm", "FusedMatMul", "FusedGemm"), ("gemm", "fp32")),
    **dict.fromkeys(("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose"), ("conv", "fp32")),
    **dict.fromkeys(("Attention", "MultiHeadAttention", ATTENTION), ("attention", "fp32")),
}


def cannot_build() -> str | None:
    """The reason why no engine can be built on this machine, or None."""
    return why_not_loaded(NAME, INSTALL)


def cannot_run() -> str | None:
    """The reason why no engine can be run on this machine, or None."""
    return cannot_build()


def version() -> str:
    """The version of the installed package."""
    return importlib.metadata.version("onnxruntime")


def depends_on() -> dict[str, Any]:
    """What of this machine, beside the version, decides an engine."""
    return {"processor": processor(), "instructions": int8_instructions(), "saturates": saturates()}


def require_target(sms: tuple[int, ...] | None, builder: Builder = DEFAULT) -> None:
    """Raise UserError for any GPU architecture, and anything told to a builder."""
    builder.require_none(NAME)
    if sms:
        raise UserError("TARGET=onnxruntime builds for CPUs: leave SM= out, or choose TARGET=tensorrt or tensorrt_rtx")


def device_name() -> str:
    """What engines run on here."""
    return processor()


def runner(plan: bytes, _gpu: Device | None = None, _kernels_file: Path | None = None) -> GraphRunner:
    """What runs the engine `plan` inside its `with`; a GPU and its kernels are of no use to it."""
    return GraphRunner(plan)


def kernels_of(optimized: "onnx.ModelProto") -> tuple[Kernel, ...]:
    """One kernel per node of a graph as ONNX Runtime has optimized it. QAttention is an attention in FP32 that multiplies
    integers for its q, k and v.
    """
    found = []
    for node in optimized.graph.node:
        name, nodes = f"{node.name} ({node.op_type})", computed_nodes(node.name, node.op_type)
        kind, dtype = KINDS.get(node.op_type, ("cast" if node.op_type == "Cast" else "other", "unknown"))
        factors = 3 if kind == "attention" else 2
        integers = nodes if node.op_type == ATTENTION else ()
        found.append(Kernel(name, kind, (dtype,) * factors, (), nodes, int8_layers=integers))
    return tuple(found)


def build(model: "onnx.ModelProto", profile: Profile, sms: tuple[int, ...] | None, builder: Builder = DEFAULT) -> Built:
    """Write the integer kernels of ONNX Runtime into the FP32-typed `model`; `profile` is recorded, any batch runs.

    Raises UserError for any GPU architecture in `sms`.
    """
    from deploy.engine.audit import planned_attention  # needs onnx, which a server has not
    from deploy.graph.integer_kernels import integer_kernels

    require_target(sms, builder)
    rewritten, written = (model, {}) if saturates() else integer_kernels(model)
    plan = rewritten.SerializeToString()
    computed = optimized(plan)
    return Built(
        plan=plan,
        backend=NAME,
        version=version(),
        targets=(f"CPU {platform.machine()}",),
        kernels=kernels_of(computed),
        layers={"nodes": [{"name": node.name, "operator": node.op_type} for node in computed.graph.node]},
        settings={"profile": [1, profile.opt, profile.maximum], "integer_kernels": written},
        notes=(APART,) if planned_attention(model) else (),
    )
