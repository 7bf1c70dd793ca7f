"""What errors inside a network do to its output, to first order: any number of candidates for one backward pass.

    y(x + e) ~ y(x) + J e        |J e|^2 = E (r^T J e)^2 = E (g . e)^2        g = J^T r        r ~ N(0, I)

One backward pass gives g at every layer. The g are few, so the figure is noisy, but candidates that are compared share them.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from calib.hooks import input_hooks

PROJECTIONS = 4  # r per image: with 32 images 128 samples of the mean, 1 dB
BATCH = 2  # images at a time: every layer's input and its gradients are in memory


def output_gradients(
    net: nn.Module, layers: Sequence[str], images: Tensor, seed: int = 0
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """For every few of `images`: what each layer reads, x (B, ...), and the g there, (K, B, ...)."""
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}

    def keep(name: str, _layer: nn.Module, x: Tensor) -> Tensor:
        # a copy, because an activation in place may follow; the first layer reads images, which have no gradient
        inputs[name] = x.clone() if x.requires_grad else x.clone().requires_grad_()
        return inputs[name]

    for batch in images.split(BATCH):
        with input_hooks(net, layers, keep), torch.enable_grad():
            output = net(batch)
        read = [inputs[name] for name in layers]
        vectors = torch.randn(PROJECTIONS, *output.shape, generator=generator).to(output.dtype)
        gradients = [torch.autograd.grad(output, read, vector, retain_graph=True) for vector in vectors]
        seen = {name: x.detach() for name, x in inputs.items()}
        del output, read  # the last that hold the graph
        inputs.clear()
        yield seen, {name: torch.stack(parts) for name, parts in zip(layers, zip(*gradients, strict=True), strict=True)}
