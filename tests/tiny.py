"""Small networks of every family, with weights that quantization really changes."""

import functools
from dataclasses import replace

import timm
import torch
from torch import nn

from calib.images.batches import Half, Part
from calib.network.fold import fold_affine
from calib.network.qdq import quantized_net
from calib.precision import INT8_ENGINE, Precision
from calib.quant_model import QuantModel
from calib.scales.calibrate import Config, calibrate
from calib.structure.structure import Structure, structure_of
from deploy.recipe import recipe_from_tables
from deploy.stages import CalibrationImages, repair_stages

SIZE = 32

# One small instance per family: timm's own test networks, or a real class with small numbers.
TINY = {
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": SIZE, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
    ),
    "resnet": ("test_resnet", {}),
    "mobilenet": ("mobilenetv2_035", {}),
    "regnet": ("regnetx_002", {}),
}


def tiny_net(family: str, seed: int = 0) -> nn.Module:
    """A network in eval mode, float32, random but with uneven channels and running statistics."""
    torch.manual_seed(seed)
    name, options = TINY[family]
    net = timm.create_model(name, **options).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2.0)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
            elif isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.2, 3.0)
                module.bias.normal_(0, 0.3)
            elif isinstance(module, nn.Linear):
                module.weight.mul_(4)
    return net


@functools.cache
def tiny_structure(family: str) -> Structure:
    """The structure of a tiny network before folding, which its weights do not decide."""
    return structure_of(tiny_net(family), torch.zeros(1, 3, SIZE, SIZE))


def tiny_model(family: str, seed: int = 0) -> QuantModel:
    structure = tiny_structure(family)
    return QuantModel.of(family, tiny_net(family, seed), structure)


def tiny_batches(count: int = 3, batch: int = 4, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, SIZE, SIZE, generator=generator) for _ in range(count)]


def same_numbers(one: QuantModel, other: QuantModel) -> bool:
    """Whether the networks of both hold the same weights and biases."""
    numbers = other.net.state_dict()
    return all(torch.equal(value, numbers[name]) for name, value in one.net.state_dict().items())


def half_of(batches: list[torch.Tensor]) -> Half:
    """A half whose first batches are one part and whose other batches are the other; one batch is both."""
    middle = max(len(batches) // 2, 1)
    return Half((Part(batches[:middle]), Part(batches[middle:] or batches)))


def tiny_halves(count: int = 4, batch: int = 4, seed: int = 1) -> list[Half]:
    """Two halves of `count` batches each."""
    return [half_of(tiny_batches(count, batch, seed)), half_of(tiny_batches(count, batch, seed + 100))]


def rounded(model: QuantModel, halves: list[Half], method: str = "rtn", **options) -> QuantModel:
    """`model`, calibrated, with its weights rounded by `method` as the spine does it."""
    recipe = recipe_from_tables("test", {"method": {"name": method, **options}}, "test")
    (stage,) = repair_stages(recipe)
    return stage.run(model, CalibrationImages(next(iter(halves[0]))[:1], halves))


def calibrated(family: str, halves: list[Half], precision: Precision = INT8_ENGINE) -> QuantModel:
    """A tiny network whose inputs have scales, by their largest value."""
    model = fold_affine(replace(tiny_model(family), precision=precision), next(iter(halves[0]))[:1])
    return calibrate(model, halves, Config("max"))


@torch.no_grad()
def output_db(model: QuantModel, seed: int = 9) -> float:
    """Output SQNR (dB) on images that no half holds."""
    images = torch.cat(tiny_batches(4, seed=seed))
    exact = model.float_net(images).double()
    return float(10 * torch.log10(exact.square().sum() / (quantized_net(model)(images) - exact).square().sum()))
