"""The state of one `make engine`: what was asked for, and what the stages have found out so far."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import torch
    from torch import nn

    from calib.images.image_set import ImageSet
    from calib.network.fp16_range import Fp16Range
    from calib.outputs import Output
    from calib.quant_model import QuantModel
    from calib.scales.coverage import Coverage
    from calib.task import Task
    from calib.weights.load import LoadedNet
    from calib.weights.zoo import ModelSpec
    from deploy.acceptance import Acceptance
    from deploy.bridge.parity import Parity
    from deploy.engine.audit import Audit
    from deploy.engine.backends import Built
    from deploy.execution import Execution
    from deploy.explain.kernel_list import KernelLists
    from deploy.kept_engines import KeptEngines
    from deploy.kept_states import KeptStates
    from deploy.options import Options
    from deploy.progress import Progress
    from deploy.recipe import Recipe
    from deploy.stages import CalibrationImages
    from deploy.verify import CpuSpeed, Reference, Verdict


@dataclass
class Run:
    """Given at the start: what was asked for. The rest does not exist before the stage that writes it.

    `folder` takes the files of the package and becomes `final`, `scratch` takes those that go away; `kept` and
    `engines`: states and engines of earlier runs.
    """

    name: str
    options: "Options"
    spec: "ModelSpec"
    recipe: "Recipe"
    backend: ModuleType
    final: Path
    folder: Path
    scratch: Path
    progress: "Progress"
    kept: "KeptStates"
    engines: "KeptEngines"
    device: "torch.device"  # of the torch half
    anew: bool = False  # the stage that --from names has been reached: nothing is taken from earlier runs any more
    taken: dict[str, str] = field(default_factory=dict)  # stage -> key of what was taken

    # after stage `parity` the networks of `loaded` and `model` are empty modules: later stages read the graphs
    loaded: "LoadedNet" = field(init=False)
    outputs: "tuple[Output, ...]" = field(init=False)
    task: "Task" = field(init=False)  # what the outputs are
    model: "QuantModel" = field(init=False)
    calibration: "ImageSet" = field(init=False)
    evaluation: "ImageSet" = field(init=False)
    annotations: "list[np.ndarray] | None" = field(init=False)  # boxes of the evaluation images (K, 6) each
    golden: "np.ndarray" = field(init=False)  # a few evaluation images (B, 3, H, W), which go into the package
    images: "CalibrationImages" = field(init=False)
    key: str = field(init=False)  # of the state of `model`
    fp16_range: "Fp16Range" = field(init=False)
    coverage: "Coverage" = field(init=False)
    simulation: "nn.Module" = field(init=False)  # `model` with its rounding, in torch; deleted after stage `parity`
    graph: "onnx.ModelProto" = field(init=False)  # model.onnx
    fp32: "onnx.ModelProto" = field(init=False)
    # what the engine is built from, without its branches; None: it has none
    graph_without_branches: "onnx.ModelProto | None" = field(init=False)
    beyond_fp16: str = field(init=False)  # why the float network does not fit FP16 types; "": it does
    float_model: Path = field(init=False)  # the network before quantization, as ONNX
    parity: "Parity" = field(init=False)
    # what float network and simulation make of the golden images, as the package has it
    golden_outputs: "dict[str, np.ndarray]" = field(init=False)
    planned: tuple[str, ...] = field(init=False)  # ONNX nodes of INT8 layers
    planned_attention: tuple[str, ...] = field(init=False)  # ... and of products inside INT8 attentions
    built: "Built" = field(init=False)
    engine_without_branches: "Built | None" = field(init=False)  # if there are any
    kernels: "KernelLists" = field(init=False)  # of the engine and of its FP16 twin
    audit: "Audit" = field(init=False)
    reference: "Reference" = field(init=False)  # the images that judge, and what the float network computes of them
    verdict: "Verdict" = field(init=False)
    execution: "Execution" = field(init=False)
    speed: "CpuSpeed" = field(init=False)
    acceptance: "Acceptance" = field(init=False)  # of the limits that were given
    report: dict[str, Any] = field(init=False)


GIVEN = tuple(each.name for each in fields(Run) if each.init)
