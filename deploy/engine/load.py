"""Loads a serialized engine into the GPU: TensorRT 10.12+, 11 and TensorRT-RTX."""

from pathlib import Path
from types import ModuleType
from typing import Any

from calib.errors import UserError
from deploy.engine.architectures import why_not_rtx
from deploy.engine.logger import first_error
from deploy.gpu import why_no_gpu

# Why TensorRT-RTX does not take an engine: names of trt.EngineInvalidityDiagnostics, whose values are bits.
REASONS = {
    "VERSION_MISMATCH": "it was built by another version: build it again, or install the version in its manifest.json",
    "UNSUPPORTED_CC": "it was not built for this GPU's architecture: build it with SM= of this GPU, or without SM=",
    "OLD_CUDA_DRIVER": "the NVIDIA driver is too old for it: update the driver",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it: install a newer one",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory for it: free some, or build with a smaller MAX_BATCH",
    "MALFORMED_ENGINE": "it is no engine, or a damaged one: copy or build it again",
    "CUDA_ERROR": "CUDA failed while it was examined: run `make doctor`",
}


def is_rtx(trt: ModuleType) -> bool:
    """Whether the module is TensorRT-RTX's: it alone tells whether an engine is valid before it is loaded."""
    return hasattr(trt.Runtime, "get_engine_validity")


def why_invalid(trt: ModuleType, runtime: Any, plan: bytes) -> str | None:
    """The reason why TensorRT-RTX cannot load `plan` here, or None. It reads the header, not the body, of an engine.

    Where there is no GPU to judge it for, a header that is sound is no reason.
    """
    validity, found = runtime.get_engine_validity(plan)
    bits = int(found)
    if validity != trt.EngineValidity.INVALID:
        return None
    if bits & int(trt.EngineInvalidityDiagnostics.UNSUPPORTED_CC) and (reason := why_not_rtx()):
        return reason
    named = [text for name, text in REASONS.items() if bits & int(getattr(trt.EngineInvalidityDiagnostics, name))]
    return "; ".join(named) or why_no_gpu() or "no reason given"


def loaded_engine(trt: ModuleType, runtime: Any, logger: Any, plan: bytes) -> Any:
    """The engine of `plan`, on the current GPU. Raises UserError with TensorRT's reason in one line."""
    if is_rtx(trt) and (reason := why_invalid(trt, runtime, plan)):
        raise UserError(f"{trt.__name__} {trt.__version__} cannot load this engine here: {reason}")
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise UserError(f"{trt.__name__} {trt.__version__} cannot load this engine here: {first_error(logger)}")
    return engine


class Context:
    """An execution context of `engine`, and the kernels that TensorRT-RTX compiled for it, kept in `kernels_file`.

    TensorRT-RTX compiles its kernels when a shape first comes; kept, they make the next start faster. Raises UserError if
    the context cannot be made.
    """

    def __init__(self, trt: ModuleType, engine: Any, logger: Any, kernels_file: Path | None = None) -> None:
        self._cache, self._file = None, kernels_file
        if is_rtx(trt):
            config = engine.create_runtime_config()
            # the kernels for a shape are there when its first call returns: no call is timed with stand-ins
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            self._cache = config.create_runtime_cache()
            if kernels_file is not None and kernels_file.exists():
                self._cache.deserialize(kernels_file.read_bytes())  # one of another version is refused and written anew
            config.set_runtime_cache(self._cache)
            self.context = engine.create_execution_context(config)
        else:
            self.context = engine.create_execution_context()
        if self.context is None:
            raise UserError(
                f"{trt.__name__} {trt.__version__} cannot prepare the engine ({first_error(logger)}): free GPU memory, or "
                f"build with a smaller MAX_BATCH"
            )

    def keep_kernels(self) -> None:
        """Write what was compiled to `kernels_file`, if there is one."""
        if self._cache is not None and self._file is not None:
            self._file.write_bytes(bytes(self._cache.serialize()))
