"""What `make engine` was asked for."""

import shlex
from dataclasses import dataclass, field

from deploy.acceptance import Limits
from deploy.engine.build import Profile
from deploy.engine.builder import DEFAULT, Builder, Wanted


@dataclass(frozen=True)
class Options:
    """What `make engine` was asked for."""

    model: str = "dinov2_s"
    module: str | None = None  # package.module:factory or file.py:factory of a network of the user's own, instead
    input_size: tuple[int, int] | None = None  # height and width in pixels; None: the network's own
    weights: str = "auto"  # auto | pretrained | random | a checkpoint file
    calib: str | None = None  # folder, .npy or .npz; None: the built-in sample
    evaluation: str | None = None  # folder, .npy or .npz; None: held-out calibration images
    calib_images: int = 512
    recipe: str = "int8"
    target: str = "auto"  # auto or the name of a backend
    sms: tuple[int, ...] | None = None  # GPU architectures; None: the backend's default
    profile: Profile = field(default_factory=Profile)
    builder: Builder = DEFAULT  # what TensorRT's builder is told
    floats: str = "fp16"  # types of model.onnx beside its integers: fp16 | fp32
    out: str = "artifacts"
    device: str = "auto"  # of the torch half: auto | cpu | cuda | cuda:1
    seed: int = 0
    limits: Limits = field(default_factory=Limits)  # that the package has to keep
    max_extra_kernels: int | None = None  # of all branches together; None: as the recipe says
    max_extra_bytes: int | None = None
    cache: bool = True  # take states kept for exactly the same input, and keep new ones; keep unfinished training
    begin: str | None = None  # stage to run anew from; what comes before is taken from kept states. None: what is kept
    until: str | None = None  # stage to stop after. None: the last

    @property
    def half(self) -> bool:
        """Whether model.onnx has FP16 types."""
        return self.floats == "fp16"

    def built_for(self) -> Wanted:
        """What its engines are built for."""
        return Wanted(self.profile, self.sms, self.builder)

    def _flags(self) -> dict[str, str]:
        """What the command line calls the options that decide a package, and their values; None has no flag."""
        found = {
            "module": self.module,
            "input": "x".join(map(str, self.input_size)) if self.input_size else None,
            "weights": self.weights,
            "calib": self.calib,
            "eval": self.evaluation,
            "calib-images": self.calib_images,
            "target": self.target,
            "sm": ",".join(map(str, self.sms)) if self.sms else None,
            "builder": str(self.builder) or None,
            "float": self.floats,
            "batch": self.profile.opt,
            "max-batch": self.profile.maximum,
            "device": self.device,
            "seed": self.seed,
            "max-drop": self.limits.max_drop,
            "min-speedup": self.limits.min_speedup,
            "max-extra-kernels": self.max_extra_kernels,
            "max-extra-bytes": self.max_extra_bytes,
        }
        return {f"--{name}": str(value) for name, value in found.items() if value is not None}

    def command(self) -> str:
        """The command that asks for the same package: the model, the recipe and what differs from the defaults."""
        usual = Options()._flags()
        model = [] if self.module else ["--model", self.model]
        given = [part for flag in self._flags().items() if flag not in usual.items() for part in flag]
        return shlex.join(["python", "-m", "deploy", "engine", *model, "--recipe", self.recipe, *given])
