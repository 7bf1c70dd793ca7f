"""Matrix products that are written in INT8 instead of FP16, because what an INT8 engine waits for is memory.

    y = c Q(x^ (t W)) + b        Q rounds the product itself, before its channels get their scales c and the bias

An INT8 product writes FP16 if scales per channel or a bias lie between it and the next quantizer: in a ViT INT8 moves more
bytes than FP16. With Q on the product itself it writes one byte per value, and the kernel behind reads one. Everything else
stays: scales, biases, the number of kernels.

Q costs accuracy, in some layers much. The threshold of Q is the largest value that calibration saw times a factor; what each
factor does to the output, to first order (calib/judge/first_order.py), chooses it. The layers that cost least per byte saved
are taken while they lose no more than the recipe allows (calib/judge/budget.py).
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from calib.grids import Unrounded, why_not_int8
from calib.hooks import input_hooks
from calib.images.batches import ROTATIONS, Half, spread_images
from calib.judge.budget import Budget
from calib.judge.first_order import output_gradients, output_noise
from calib.judge.held_out import LARGEST_DB, Candidate
from calib.network.qdq import quantized_net
from calib.quant_model import QuantModel, StageRecord
from calib.quantizer import QParams, qparams_from_amax

FACTORS = (0.5, 0.7, 0.85, 1.0, 1.25)  # of the largest product that calibration saw
IMAGES = 8  # per part of a half
PART = "output"  # of a layer: the module that rounds its product


@dataclass(frozen=True)
class Config:
    """What layers that write INT8 may cost."""

    max_loss_db: float = 0.5  # of SQNR at the network's output, all of them together

    def __post_init__(self) -> None:
        if not 0 <= self.max_loss_db <= LARGEST_DB:
            raise ValueError(f"max_loss_db {self.max_loss_db} is not a number from 0 to {LARGEST_DB:.0f}")


def _quantizer(layer: str) -> str:
    return f"{layer}:{PART}"


def _modules(layers: Sequence[str]) -> dict[str, str]:
    """Return the module that reads the product of each layer, as a key, and the layer."""
    return {f"{layer}.{PART}": layer for layer in layers}


def with_open_products(model: QuantModel, layers: Sequence[str]) -> nn.Module:
    """Return the quantized network with a module behind each product of `layers` that passes it on unrounded."""
    return quantized_net(model.with_quantizers({_quantizer(layer): Unrounded() for layer in layers}))


def linear_layers(model: QuantModel) -> list[str]:
    """Return the quantized linear layers that an engine computes in INT8."""
    return [
        name
        for name in model.quantized_layers
        if isinstance(model.net.get_submodule(name), nn.Linear) and not why_not_int8(model.quantizers[f"{name}:input"])
    ]


def reach(net: nn.Module, layers: Sequence[str], half: Half) -> tuple[dict[str, float], dict[str, int]]:
    """Return (largest |product|, values of it per image) of each layer, on all images of `half`."""
    modules, largest = _modules(layers), dict.fromkeys(layers, 0.0)
    sizes: dict[str, int] = {}

    def look(module: str, _module: nn.Module, x: Tensor) -> None:
        layer = modules[module]
        largest[layer] = max(largest[layer], float(x.abs().max()))
        sizes[layer] = x.numel() // images

    with input_hooks(net, modules, look), torch.inference_mode():
        for batch in half:
            images = len(batch)
            net(batch)
    return largest, sizes


def noise_of(
    net: nn.Module, layers: Sequence[str], largest: Mapping[str, float], images: Tensor
) -> dict[str, list[float]]:
    """Return by layer, for each of FACTORS, the squared error of the output if that product rounds, to first order."""
    found = {layer: [0.0] * len(FACTORS) for layer in layers}
    modules = _modules(layers)
    grids = {
        layer: [qparams_from_amax(torch.tensor(amax * factor)) for factor in FACTORS] for layer, amax in largest.items()
    }
    for seen in output_gradients(net, list(modules), images):
        with torch.no_grad():
            for module, layer in modules.items():
                x, gradients = seen.inputs[module], seen.gradients[module]
                for index, grid in enumerate(grids[layer]):
                    found[layer][index] += output_noise(gradients, grid.fake_quantize(x) - x)
    return found


class Products:
    """The products of a network whose layers are rounded, and what writing each of them in INT8 costs."""

    def __init__(self, model: QuantModel, layers: Sequence[str], halves: Sequence[Half]) -> None:
        self.model, self.layers = model, layers
        net = with_open_products(model, layers)
        seen = [reach(net, layers, half) for half in halves]
        self.sizes = seen[0][1]
        self.by_half = [largest for largest, _ in seen]
        self.whole = {layer: max(largest[layer] for largest in self.by_half) for layer in layers}
        noise = [
            [
                noise_of(net, layers, largest, spread_images(halves[index - 1].parts[part], IMAGES))
                for index, largest in enumerate(self.by_half)
            ]
            for part, _ in ROTATIONS
        ]
        self.noise = [self._summed(of_part) for of_part in noise]
        self.together = self._summed(self.noise)

    def _summed(self, several: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
        return {
            layer: [sum(each) for each in zip(*(one[layer] for one in several), strict=True)] for layer in self.layers
        }

    def order(self, noise: Mapping[str, Sequence[float]]) -> tuple[list[str], dict[str, float]]:
        """Return (layers, that with the least noise per value first; the noise of each at its best factor)."""
        cost = {layer: min(each) for layer, each in noise.items()}
        return sorted(self.layers, key=lambda layer: cost[layer] / self.sizes[layer]), cost

    def grids(
        self, largest: Mapping[str, float], noise: Mapping[str, Sequence[float]], layers: Sequence[str]
    ) -> dict[str, QParams]:
        """Return the quantizers of these products, each at the factor with the least noise."""
        best = {layer: FACTORS[min(range(len(FACTORS)), key=noise[layer].__getitem__)] for layer in layers}
        return {
            _quantizer(layer): qparams_from_amax(torch.tensor(largest[layer] * factor))
            for layer, factor in best.items()
        }

    def candidate(self, by_rotation: Sequence[Sequence[str]], layers: Sequence[str]) -> Candidate:
        """Return the network with the products of `layers` in INT8, in the trials of rotation r of `by_rotation[r]`."""
        trials = tuple(
            tuple(self.model.with_quantizers(self.grids(largest, noise, names)) for largest in self.by_half)
            for noise, names in zip(self.noise, by_rotation, strict=True)
        )
        whole = self.model.with_quantizers(self.grids(self.whole, self.together, layers))
        return Candidate(f"{len(layers)} of {len(self.layers)} linear layers write INT8", trials, whole)


def int8_products(model: QuantModel, halves: Sequence[Half], config: Config) -> QuantModel:
    """Return `model`, all of whose layers are rounded, with products in INT8 where the budget allows it.

    Where the images that judge show a loss over the budget, none is, and the network is what it was.
    """
    start = time.perf_counter()
    layers = linear_layers(model)
    if not layers:
        return model.with_record(StageRecord("int8_products", asdict(config), notes=("no linear layer is quantized",)))
    found = Products(model, layers, halves)
    budget = Budget(model, halves, found.candidate, config.max_loss_db)
    names = budget.affordable(*found.order(found.together), range(len(ROTATIONS)))
    by_rotation = [budget.affordable(*found.order(noise), [index]) for index, noise in enumerate(found.noise)]
    candidate, errors, within = budget.judged(by_rotation, names)
    note = (
        f"{candidate.name}: output SQNR {errors.db(1):.2f} dB against {errors.db(0):.2f} dB in FP16, on held-out images"
    )
    record = StageRecord(
        "int8_products",
        asdict(config),
        time.perf_counter() - start,
        errors.db(0),
        errors.db(1 if within else 0),
        (note if within else f"dropped, all products are written in FP16: {note}",),
    )
    return (candidate.whole if within else model).with_record(record)
