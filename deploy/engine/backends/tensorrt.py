"""The backend TensorRT (10.12+ and 11), which builds on the GPU that the engine will run on. It is for production."""

import onnx

from calib.errors import UserError
from deploy.engine.backends import Built
from deploy.engine.build import Profile, serialize_network
from deploy.engine.inspector import kernels_from_inspector
from deploy.engine.loading import why_not_loaded
from deploy.gpu import gpu, why_no_gpu

NAME = "tensorrt"
INSTALL = "make setup, on a GPU host"
OLDEST = (10, 12)  # strong typing with FP16 Q/DQ scales


def cannot_build() -> str | None:
    """The reason why no engine can be built on this machine, or None."""
    if reason := why_not_loaded(NAME, INSTALL):
        return reason
    if reason := why_no_gpu():
        return f"{reason}, and TensorRT times its kernels on the GPU"
    major, minor = (int(part) for part in version().split(".")[:2])
    if (major, minor) < OLDEST:
        return f"tensorrt {version()} is older than {OLDEST[0]}.{OLDEST[1]} ({INSTALL})"
    return None


def cannot_run() -> str | None:
    """The reason why no engine can be run on this machine, or None."""
    return cannot_build()


def version() -> str:
    """The version of the installed package."""
    import tensorrt as trt

    return trt.__version__


def require_target(sms: tuple[int, ...] | None) -> None:
    """Raise UserError for another GPU architecture than this host's."""
    here = gpu().compute_capability
    if sms and tuple(sms) != (here,):
        raise UserError(f"TARGET=tensorrt builds for this host's SM{here} only, not for SM={','.join(map(str, sms))}")


def build(model: onnx.ModelProto, profile: Profile, sms: tuple[int, ...] | None) -> Built:
    """Build `model` for the GPU of this machine.

    Raises UserError if `sms` names another architecture, or if the engine cannot be built.
    """
    import tensorrt as trt

    require_target(sms)
    here = gpu().compute_capability
    plan, warnings = serialize_network(trt, model.SerializeToString(), profile, lambda _config: None)
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise UserError("the engine just built cannot be loaded on this GPU: run `make doctor`")
    inspector = engine.create_engine_inspector()
    return Built(
        plan=plan,
        backend=NAME,
        version=version(),
        targets=(f"SM{here}",),
        kernels=kernels_from_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON)),
        settings={"profile": [1, profile.opt, profile.maximum], "gpu": gpu().name, "graph_rewrites": []},
        notes=warnings[:5],
    )
