"""The backend TensorRT (10.12+ and 11), which builds on the GPU that the engine will run on. It is for production."""

import importlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.errors import UserError
from deploy.engine.backends import Built
from deploy.engine.build import Profile, serialize_network
from deploy.engine.builder import DEFAULT, Builder
from deploy.engine.device import Device
from deploy.engine.inspector import kernels_from_inspector
from deploy.engine.load import loaded_engine
from deploy.engine.loading import why_not_loaded
from deploy.engine.logger import keeping_logger
from deploy.engine.runner import EngineRunner
from deploy.engine.timing_cache import Timings, timings_file
from deploy.gpu import gpu, why_no_gpu

if TYPE_CHECKING:
    import onnx

NAME = "tensorrt"
FP16 = True
INSTALL = "make setup, on a GPU host"
AMPERE = 80  # compute capability
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


def device_name() -> str:
    """What engines run on here. Raises NoGpuError without a GPU."""
    return gpu().name


def runner(plan: bytes, device: Device | None = None, kernels_file: Path | None = None) -> EngineRunner:
    """What runs the engine `plan` inside its `with`, by default on the first visible GPU."""
    return EngineRunner(plan, importlib.import_module(NAME), device, kernels_file)


def version() -> str:
    """The version of the installed package."""
    import tensorrt as trt

    return trt.__version__


def depends_on() -> dict[str, Any]:
    """What of this machine, beside the version, decides an engine."""
    return asdict(gpu())


def require_target(sms: tuple[int, ...] | None, builder: Builder = DEFAULT) -> None:
    """Raise UserError for another GPU architecture than this host's, or an engine that it cannot build for others."""
    here = gpu().compute_capability
    if builder.gpus == "ampere+" and here < AMPERE:
        raise UserError(f"BUILDER={builder}: this host's SM{here} is older than Ampere (SM{AMPERE}); leave gpus= out")
    if sms and tuple(sms) != (here,):
        raise UserError(f"TARGET=tensorrt builds for this host's SM{here} only, not for SM={','.join(map(str, sms))}")


def build(model: "onnx.ModelProto", profile: Profile, sms: tuple[int, ...] | None, builder: Builder = DEFAULT) -> Built:
    """Build `model` for the GPU of this machine.

    Raises UserError if `sms` names another architecture, or if the engine cannot be built.
    """
    import tensorrt as trt

    from deploy.graph.separate_biases import joined_biases

    require_target(sms, builder)
    here = gpu()
    timings = Timings(timings_file(version(), here.name))

    def configure(config: Any) -> None:
        timings.give(config)
        builder.configure(trt, config)

    plan, warnings = serialize_network(trt, joined_biases(model).SerializeToString(), profile, configure)
    why_not_kept = timings.keep()
    logger = keeping_logger(trt)
    runtime = trt.Runtime(logger)
    engine = loaded_engine(trt, runtime, logger, plan)
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return Built(
        plan=plan,
        backend=NAME,
        version=version(),
        targets=builder.targets(here.compute_capability),
        kernels=kernels_from_inspector(text),
        layers={"inspector": json.loads(text)},
        settings={
            "profile": [1, profile.opt, profile.maximum],
            "gpu": here.name,
            "graph_rewrites": ["joined_biases"],
            "builder": asdict(builder),
        },
        notes=(*warnings[:5], *filter(None, (why_not_kept,))),
    )
