"""What errors inside a network do to its output, to first order: any number of candidates for one backward pass.

    y(x + e) ~ y(x) + J e        |J e|^2 = E (r^T J e)^2 = E (g . e)^2        g = J^T r        r ~ N(0, I)

One backward pass gives g at every layer. The g are few, so the figure is noisy, but candidates that are compared share them.
An error e of a weight does (dr.y / dW . e)^2; of rounding, where e is as large as a step D and independent from weight to
weight, that is on average sum (dr.y / dW)^2 D^2 / 12.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from calib.hooks import input_hooks, output_hooks
from calib.network.layer_rows import channel_axis
from calib.structure.moves import along_inputs

PROJECTIONS = 4  # r per image: with 32 images 128 samples of the mean, 1 dB
BATCH = 2  # images at a time: every layer's input and its gradients are in memory


class Seen(NamedTuple):
    """Of a few images, by layer: `inputs` x (B, ...), `gradients` g (K, B, ...) there, and what weights do if asked for.

    Of a layer that is called several times, all calls are one tensor x (images, P, C), or (images, C, P, 1) for maps.
    `weights`: sum over the K vectors r of (dr.y / dW)^2, in the shape of W, where W reads x less its mean. `images`: how
    many they are; a layer that reads windows of them has more than one first index per image.
    """

    inputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    images: int


def by_image(x: Tensor, images: int) -> Tensor:
    """Return what belongs to each image, (images, E), of x (images W, ...) in windows or (N, images, ...), tokens first.

    Raises ValueError if neither is its shape.
    """
    if len(x) % images == 0:
        return x.reshape(images, -1)
    if x.ndim > 1 and x.shape[1] == images:
        return x.transpose(0, 1).flatten(1)
    raise ValueError(f"no axis of a tensor {tuple(x.shape)} is that of {images} images")


def _as_one(calls: Sequence[Tensor], axis: int, images: int) -> Tensor:
    """Return the tensors of all `calls` of a layer as one, as `Seen` says; one call as it is.

    `axis` of the channels: -1 or 1.
    """
    if len(calls) == 1:
        return calls[0]
    channels = calls[0].shape[axis]
    rows = torch.cat([by_image(x.movedim(axis, -1), images).reshape(images, -1, channels) for x in calls], 1)
    return rows if axis == -1 else rows.transpose(1, 2).unsqueeze(3)


def noise_by_image(gradients: Tensor, error: Tensor, images: int) -> Tensor:
    """Return |y(x + e) - y(x)|^2 of every image (B,), K times as much; error (B, ...), `gradients` g (K, B, ...)."""
    if gradients.shape[1] % images == 0:
        slopes = gradients.reshape(len(gradients), images, -1)  # as `by_image` does, without a copy
    else:
        slopes = torch.stack([by_image(g, images) for g in gradients])
    change = by_image(error, images)
    # image by image: matrix times vector needs no tensor of the products
    return torch.stack([slopes[:, image] @ each for image, each in enumerate(change)]).square().sum(1)


def output_noise(gradients: Tensor, error: Tensor, images: int) -> Tensor:
    """Return the sum of `noise_by_image` over images, ()."""
    return noise_by_image(gradients, error, images).sum()


def leaf(x: Tensor) -> Tensor:
    """A copy of `x` to take gradients at: what follows may edit `x` in place, and what nothing before it learns has none."""
    return x.clone() if x.requires_grad else x.clone().requires_grad_()


def projections(output: Tensor, generator: torch.Generator) -> Tensor:
    """`PROJECTIONS` vectors r (K, *output.shape)."""
    return torch.randn(PROJECTIONS, *output.shape, generator=generator, device="cpu").to(output)


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


def _around(layer: nn.Module, mean: Tensor, of_weight: Tensor, of_output: Tensor) -> Tensor:
    """dr.y / dW if the layer read x - mean (C,), from that for x and from dr.y / db (out,)."""
    return of_weight - along_inputs(layer, mean) * of_output.reshape(-1, *[1] * (of_weight.ndim - 1))


def _seen(
    net: nn.Module,
    inputs: Mapping[str, Sequence[Tensor]],
    gradients: Sequence[Sequence[Tensor]],
    weights: dict[str, Tensor],
    images: int,
) -> Seen:
    """Return what was seen; `inputs`: those of each call, by layer; `gradients`: by r, of all calls in the same order."""
    x: dict[str, Tensor] = {}
    g: dict[str, Tensor] = {}
    start = 0
    for name, calls in inputs.items():
        axis, end = channel_axis(net.get_submodule(name)), start + len(calls)
        x[name] = _as_one(calls, axis, images)
        g[name] = torch.stack([_as_one(of_vector[start:end], axis, images) for of_vector in gradients])
        start = end
    return Seen(x, g, weights, images)


def output_gradients(
    net: nn.Module,
    layers: Sequence[str],
    images: Tensor,
    seed: int = 0,
    weights_around: Mapping[str, Tensor] | None = None,
) -> Iterator[Seen]:
    """What errors at `layers` do, for every few of `images`.

    `weights_around`: mean input (C,) by layer; errors of weights are then looked at too, one image at a time.
    """
    generator = torch.Generator().manual_seed(seed)
    means = weights_around or {}
    modules = {name: net.get_submodule(name) for name in means}
    weights = [module.get_parameter("weight") for module in modules.values()]
    inputs: dict[str, list[Tensor]] = {}  # one per call
    probes: dict[str, Tensor] = {}  # zeros added to outputs: their gradients are those of biases

    def keep(name: str, _layer: nn.Module, x: Tensor) -> Tensor:
        inputs.setdefault(name, []).append(leaf(x))
        return inputs[name][-1]

    def probe(name: str, y: Tensor) -> Tensor:
        axis = channel_axis(modules[name]) % y.ndim
        probes.setdefault(name, y.new_zeros(y.shape[axis], requires_grad=True))
        return y + probes[name].reshape(-1, *[1] * (y.ndim - 1 - axis))

    for batch in images.split(1 if means else BATCH):
        gradients: list[tuple[Tensor, ...]] = []
        squares = {name: torch.zeros_like(weight) for name, weight in zip(modules, weights, strict=True)}
        with _with_gradients(weights), torch.enable_grad():
            with input_hooks(net, layers, keep), output_hooks(net, modules, probe):
                output = net(batch)
            read = [x for name in layers for x in inputs[name]]
            asked = [*read, *weights, *(probes[name] for name in modules)]
            # A layer that only chooses what others read (top-k) has no gradient: zero, to first order.
            for vector in projections(output, generator):
                found = torch.autograd.grad(output, asked, vector, retain_graph=True, materialize_grads=True)
                gradients.append(found[: len(read)])
                of_weights, of_outputs = found[len(read) : len(read) + len(weights)], found[len(read) + len(weights) :]
                for (name, module), *pair in zip(modules.items(), of_weights, of_outputs, strict=True):
                    squares[name] += _around(module, means[name], *pair).detach().square()
        seen = {name: [x.detach() for x in inputs[name]] for name in layers}
        del output, read, asked, found  # the last that hold the graph
        inputs.clear()
        probes.clear()
        yield _seen(net, seen, gradients, squares, len(batch))
    with torch.no_grad():
        net(images[:1])  # what a network keeps of its last run has no graph then, and can be copied
