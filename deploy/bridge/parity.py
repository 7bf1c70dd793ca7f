"""Parity of simulation and ONNX graph, compared layer by layer.

Two correct runs of a quantized network diverge: a sum that differs in its last bit sometimes rounds to another integer,
which changes more integers in the next layer, and after about ten layers the two outputs differ by as much as the
quantization noise (torch in float32 and in float64 do, too). So the end-to-end difference says little about errors. Here
every quantized layer of the simulation reads the integers that the ONNX graph computed, and its own integers are compared
with them: they may differ by one, and rarely.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from calib.input_rows import arrays_from_rows, inputs_of
from calib.network.qdq import QuantConv2d, Quantizer, QuantLinear
from calib.outputs import named_outputs, separate_outputs
from calib.quantizer import QParams, quantize
from deploy.graph.names import layer_from_name, nodes_by_layer
from deploy.measure.accuracy import relative_l2
from deploy.measure.onnx_runner import OnnxRunner

MAX_REL_L2 = 1e-3  # of the output if all integers are equal: the summation order of float32 causes about 1e-6
MAX_STEPS = 1  # the largest difference of two integers: a tie may round either way
MAX_MISMATCH = 1e-3  # the largest share of the integers of a layer that may differ
TIES = 2  # as many may always differ: of a few hundred integers two ties are more than that share


class Deviation(NamedTuple):
    """How the integers of a layer differ: a `share` of its `integers`, by at most `steps`."""

    share: float
    integers: int
    steps: int

    def beyond(self) -> bool:
        """Whether this is more than ties that round either way."""
        return self.steps > MAX_STEPS or round(self.share * self.integers) > max(TIES, MAX_MISMATCH * self.integers)


@dataclass(frozen=True)
class Parity:
    """The difference between simulation and graph on `images` images.

    `rel_l2`: relative L2 difference of the outputs, the largest of several, if every layer reads the same integers.
    `suspect`: the first layer beyond the limits, or else the one with the largest mismatch; `mismatch`: the share of its
    `integers` that differ; `steps`: their largest difference. `end_to_end_difference`: that of independent runs. `wrong`:
    the first layer that computes something else from the same integers, looked for only where a limit is exceeded.
    """

    images: int
    rel_l2: float
    suspect: str
    mismatch: float
    integers: int
    steps: int
    end_to_end_difference: float
    wrong: str = ""

    def to_json(self) -> dict[str, Any]:
        """The differences as plain values, for the report."""
        return asdict(self)

    def failure(self) -> str | None:
        """A sentence on the value beyond its limit, or None."""
        if Deviation(self.mismatch, self.integers, self.steps).beyond():
            return (
                f"layer '{self.suspect}' gets other integers in ONNX than in the simulation: {self.mismatch:.2%} differ, "
                f"by up to {self.steps} steps (at most {MAX_MISMATCH:.1%} by {MAX_STEPS} may); {self._where()}"
            )
        if self.rel_l2 > MAX_REL_L2:
            return (
                f"the ONNX output is {self.rel_l2:.1e} from the simulation (relative L2, at most {MAX_REL_L2:.0e} may be); "
                f"{self._where()}"
            )
        return None

    def _where(self) -> str:
        if self.wrong:
            return f"'{self.wrong}' is the first layer that computes something else from the same integers"
        return "every quantized layer computes the same from the same integers, so the difference arises between them"


def _also_returning(model: onnx.ModelProto, names: Iterable[str], dtype: int) -> onnx.ModelProto:
    """A copy of `model` that returns the tensors `names` of this type as well."""
    copied = onnx.ModelProto.FromString(model.SerializeToString())
    present = {output.name for output in model.graph.output}
    for name in (name for name in names if name not in present):
        copied.graph.output.append(onnx.helper.make_tensor_value_info(name, dtype, None))
    return copied


def with_integer_outputs(model: onnx.ModelProto, layers: Iterable[str]) -> tuple[onnx.ModelProto, dict[str, list[str]]]:
    """(a copy of `model` that also returns the integers that `layers` read, layer -> name of that output in each call).

    Layers that read the same tensor with the same scale share a QuantizeLinear; a Quantizer has one of its own.
    """
    producers = {output: node for node in model.graph.node for output in node.output}
    readers, own = nodes_by_layer(model, "MatMul", "Conv"), nodes_by_layer(model, "QuantizeLinear")
    integers = {
        layer: [producers[node.input[0]].input[0] for node in readers[layer]]
        if layer in readers
        else [node.output[0] for node in own[layer]]
        for layer in layers
    }
    names = dict.fromkeys(name for calls in integers.values() for name in calls)
    return _also_returning(model, names, onnx.TensorProto.INT8), integers


def _deviation(own: Tensor, given: Tensor) -> Deviation:
    difference = (own.int() - given.int()).abs()
    return Deviation(float((difference > 0).double().mean()), difference.numel(), int(difference.max()))


def _suspect(deviations: Mapping[str, Deviation]) -> str:
    """The first layer in order of execution that is beyond the limits; if none is, the one with the largest mismatch."""
    beyond = (name for name, deviation in deviations.items() if deviation.beyond())
    return next(beyond, max(deviations, key=lambda name: deviations[name]))


def _forced_run(
    net: nn.Module,
    images: Tensor,
    integers: Mapping[str, Sequence[Tensor]],
    look: Callable[[str, Tensor], None] = lambda _layer, _returned: None,
) -> tuple[Any, dict[str, Deviation]]:
    """(what `net` returns if each call of a quantized layer reads `integers`, the deviations of its own from them).

    `look` is given what each layer returns.
    """
    deviations: dict[str, Deviation] = {}
    calls: Counter[str] = Counter()

    def force(name: str, layer: nn.Module, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        scale = layer.get_buffer("scale" if isinstance(layer, Quantizer) else "input_scale")
        given, call = integers[name][calls[name]], f"{name}, call {calls[name] + 1}" if calls[name] else name
        calls[name] += 1
        deviations[call] = _deviation(quantize(x, QParams(scale)), given)
        returned = compute(given.to(scale.dtype) * scale)
        look(name, returned)
        return returned

    with contextlib.ExitStack() as forced, torch.inference_mode():
        for name in integers:
            layer = net.get_submodule(name)  # no hook before it: a branch beside it reads what it is given, unrounded
            forward = functools.partial(force, name, layer, layer.forward)
            forced.enter_context(patch.object(layer, "forward", forward))
        return net(images), deviations


def _wrong_layer(
    net: nn.Module, model: onnx.ModelProto, images: Tensor, integers: Mapping[str, Sequence[Tensor]]
) -> str:
    """The first layer of `net` that returns something else in `model`, in its last call, though both read `integers`."""
    last = {layer_from_name(node.name): node.output[0] for node in model.graph.node}
    layers = {
        name: last[name] for name in integers if name in last and not isinstance(net.get_submodule(name), Quantizer)
    }
    own: dict[str, np.ndarray] = {}

    def look(layer: str, returned: Tensor) -> None:
        if layer in layers:
            own[layer] = returned.numpy().copy()  # an activation in place may follow

    _forced_run(net, images, integers, look)
    probe = _also_returning(model, layers.values(), onnx.TensorProto.FLOAT)
    runner = OnnxRunner(probe.SerializeToString(), fused=False)
    found = runner.named_outputs(arrays_from_rows(inputs_of(net), images.numpy()))
    return next((layer for layer in own if not relative_l2(found[layers[layer]], own[layer]) <= MAX_REL_L2), "")


def compare_with_onnx(net: nn.Module, model: onnx.ModelProto, images: np.ndarray) -> Parity:
    """Compare the simulation `net` with its FP32-typed graph `model` on `images`, float32 (B, 3, H, W) or rows (B, N)."""
    layers = [name for name, module in net.named_modules() if isinstance(module, QuantLinear | QuantConv2d | Quantizer)]
    probe, integers = with_integer_outputs(model, layers)
    arrays = arrays_from_rows(inputs_of(net), images)
    outputs = OnnxRunner(probe.SerializeToString(), fused=False).named_outputs(arrays)
    given = {layer: [torch.from_numpy(outputs[name]) for name in calls] for layer, calls in integers.items()}
    tensor = torch.from_numpy(images)
    with torch.inference_mode(), separate_outputs(net):
        alone = named_outputs(net(tensor))
        forced, deviations = _forced_run(net, tensor, given)

    def apart_by(own: Mapping[str, Tensor]) -> float:
        return max(relative_l2(outputs[name], value.numpy()) for name, value in own.items())

    suspect = _suspect(deviations)
    found = Parity(
        images=len(images),
        rel_l2=apart_by(named_outputs(forced)),
        suspect=suspect,
        mismatch=deviations[suspect].share,
        integers=deviations[suspect].integers,
        steps=deviations[suspect].steps,
        end_to_end_difference=apart_by(alone),
    )
    if found.failure() is None:
        return found
    with separate_outputs(net):
        return replace(found, wrong=_wrong_layer(net, model, tensor, given))
