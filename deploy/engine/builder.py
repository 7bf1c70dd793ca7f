"""What TensorRT's builder may be told beside the graph and the batches (BUILDER=).

level=0..5            how long it looks for fast kernels (builder optimization level); TensorRT's own is 3
aux_streams=0,1,..    CUDA streams beside the main one that kernels may run on at once; TensorRT decides without it
gpus=ampere+          the engine runs on every GPU from compute capability 8.0 on, at some loss of speed;
gpus=same             on every GPU of this one's compute capability; without it on GPUs like this one
"""

import re
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from calib.errors import UserError, suggestion
from deploy.engine.build import Profile

EXPECTED = "expected level=0..5, aux_streams=0.. or gpus=same|ampere+, several with commas between"
HARDWARE = {"same": "SAME_COMPUTE_CAPABILITY", "ampere+": "AMPERE_PLUS"}  # trt.HardwareCompatibilityLevel
MOST_LEVEL = 5


@dataclass(frozen=True)
class Builder:
    """Settings of TensorRT's builder, as the top of this file tells; one that is None is left to TensorRT."""

    level: int | None = None
    aux_streams: int | None = None
    gpus: str | None = None

    @classmethod
    def from_text(cls, text: str) -> "Builder":
        """Read "level=5,gpus=ampere+". Raises UserError for anything else."""
        found: dict[str, Any] = {}
        for part in filter(None, (each.strip() for each in text.split(","))):
            name, _, value = (each.strip() for each in part.partition("="))
            if name not in cls.__dataclass_fields__:
                raise UserError(
                    f"BUILDER='{text}': no '{name}'; {EXPECTED}.{suggestion(name, cls.__dataclass_fields__)}"
                )
            if name in found:
                raise UserError(f"BUILDER='{text}' tells '{name}' twice")
            fits = (
                value in HARDWARE
                if name == "gpus"
                else bool(re.fullmatch("[0-9]{1,2}", value)) and (name != "level" or int(value) <= MOST_LEVEL)
            )
            if not fits:
                raise UserError(f"BUILDER='{text}': {name} cannot be '{value}'; {EXPECTED}")
            found[name] = value if name == "gpus" else int(value)
        return cls(**found)

    def __str__(self) -> str:
        """As it is given."""
        return ",".join(f"{name}={value}" for name, value in asdict(self).items() if value is not None)

    def require_none(self, backend: str) -> None:
        """Raise UserError if anything is told to a `backend` whose builder takes none of it."""
        if self != DEFAULT:
            raise UserError(f"BUILDER={self} is for TARGET=tensorrt: that of {backend} takes none of it; leave it out")

    def configure(self, trt: ModuleType, config: Any) -> None:
        """Put this into a builder configuration (IBuilderConfig) of the module `trt` (edits `config`)."""
        if self.level is not None:
            config.builder_optimization_level = self.level
        if self.aux_streams is not None:
            config.max_aux_streams = self.aux_streams
        if self.gpus is not None:
            config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, HARDWARE[self.gpus])

    def targets(self, compute_capability: int) -> tuple[str, ...]:
        """The architectures that an engine runs on which a GPU of this compute capability has built."""
        return ("SM80+",) if self.gpus == "ampere+" else (f"SM{compute_capability}",)


DEFAULT = Builder()


@dataclass(frozen=True)
class Wanted:
    """What an engine is built for: batches, GPU architectures (None: the backend's default), what the builder is told."""

    profile: Profile
    sms: tuple[int, ...] | None
    builder: Builder = DEFAULT
