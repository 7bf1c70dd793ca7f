"""Builds a serialized engine from ONNX: the part that TensorRT and TensorRT-RTX share, as their Python API is the same."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from calib.errors import UserError
from deploy.engine.logger import first_error, keeping_logger, one_line


@dataclass(frozen=True)
class Profile:
    """The batch sizes that an engine accepts: 1 to `maximum`, optimized for `opt`. Raises UserError for other orders."""

    opt: int = 8
    maximum: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.opt <= self.maximum:
            raise UserError(f"batch profile 1/{self.opt}/{self.maximum}: expected 1 <= BATCH <= MAX_BATCH")


UNKNOWN_OPERATOR = "Plugin not found"  # what the parser says of one that it has none for


def _strongly_typed_flags(trt: ModuleType) -> int:
    """Strong typing is a creation flag in TensorRT 10, the only mode since 11 and in RTX."""
    weakly_typed_exists = trt.__name__ == "tensorrt" and int(trt.__version__.split(".")[0]) < 11
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if weakly_typed_exists else 0


def serialize_network(
    trt: ModuleType, model: bytes, profile: Profile, configure: Callable[[Any], None]
) -> tuple[bytes, tuple[str, ...]]:
    """Build the serialized ONNX `model` with the module `trt`; `configure` edits the builder configuration.

    Returns (serialized engine, distinct warnings of the builder). Raises UserError with the first error of the parser or
    builder.
    """
    logger = keeping_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(_strongly_typed_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        error = parser.get_error(0)
        said = one_line(error.desc())
        if UNKNOWN_OPERATOR in said:
            said = (
                f"it has no operator {error.node_operator()}; compute that part in another way, or outside the engine"
            )
        raise UserError(f"{trt.__name__} {trt.__version__} rejects node '{error.node_name()}': {said}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the audit reads kernel types from the engine
    shapes = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        rest = tuple(tensor.shape)[1:]
        shapes.set_shape(tensor.name, (1, *rest), (profile.opt, *rest), (profile.maximum, *rest))
    config.add_optimization_profile(shapes)
    configure(config)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UserError(f"{trt.__name__} {trt.__version__} could not build the engine: {first_error(logger)}")
    return bytes(engine), tuple(dict.fromkeys(logger.warnings))
