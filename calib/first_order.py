"""What errors inside a network do to its output, to first order: any number of candidates for one backward pass.

    y(x + e) ~ y(x) + J e        |J e|^2 = E (r^T J e)^2 = E (g . e)^2        g = J^T r        r ~ N(0, I)

One backward pass gives g at every layer. The g are few, so the figure is noisy, but candidates that are compared share them.
An error e of a weight does (dr.y / dW . e)^2; of rounding, where e is as large as a step D and independent from weight to
weight, that is on average sum (dr.y / dW)^2 D^2 / 12.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from calib.hooks import input_hooks

PROJECTIONS = 4  # r per image: with 32 images 128 samples of the mean, 1 dB
BATCH = 2  # images at a time: every layer's input and its gradients are in memory


class Seen(NamedTuple):
    """Of a few images, by layer: `inputs` x (B, ...), `gradients` g (K, B, ...) there, and what weights do if asked for.

    `weights`: sum over the K vectors r of (dr.y / dW)^2, in the shape of W.
    """

    inputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def output_noise(gradients: Tensor, error: Tensor) -> float:
    """|y(x + e) - y(x)|^2 summed over images, of an error (B, ...) where g is `gradients` (K, B, ...); K times as much."""
    return float((gradients * error).flatten(2).sum(2).square().sum())


@contextmanager
def _with_gradients(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    before = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_()
    try:
        yield
    finally:
        for weight, wanted in zip(weights, before, strict=True):
            weight.requires_grad_(wanted)


def output_gradients(
    net: nn.Module, layers: Sequence[str], images: Tensor, seed: int = 0, with_weights: bool = False
) -> Iterator[Seen]:
    """What errors at `layers` do, for every few of `images`; one at a time `with_weights`."""
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}
    weights = [net.get_submodule(name).get_parameter("weight") for name in layers] if with_weights else []

    def keep(name: str, _layer: nn.Module, x: Tensor) -> Tensor:
        # a copy, because an activation in place may follow; the first layer reads images, which have no gradient
        inputs[name] = x.clone() if x.requires_grad else x.clone().requires_grad_()
        return inputs[name]

    for batch in images.split(1 if with_weights else BATCH):
        gradients: list[tuple[Tensor, ...]] = []
        squares = [torch.zeros_like(weight) for weight in weights]
        with _with_gradients(weights), input_hooks(net, layers, keep), torch.enable_grad():
            output = net(batch)
            read = [inputs[name] for name in layers]
            vectors = torch.randn(PROJECTIONS, *output.shape, generator=generator).to(output.dtype)
            for vector in vectors:
                found = torch.autograd.grad(output, [*read, *weights], vector, retain_graph=True)
                gradients.append(found[: len(read)])
                for square, gradient in zip(squares, found[len(read) :], strict=True):
                    square.add_(gradient.square())
        x = {name: read.detach() for name, read in inputs.items()}
        del output, read, found  # the last that hold the graph
        inputs.clear()
        g = {name: torch.stack(parts) for name, parts in zip(layers, zip(*gradients, strict=True), strict=True)}
        yield Seen(x, g, dict(zip(layers, squares, strict=False)))
