"""A layer as a matrix product on a sample of its inputs, on which searches measure the output error of the layer.

    y[t, g, n] = sum_k rows[t, g, k] weight[g, n, k]

T sampled rows, G groups (1 for a Linear), N outputs and K inputs per group. A row of a convolution is one patch:
K = (in / groups) kh kw, the channel being the slow index.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib.hooks import input_hooks


def weight_matrix(layer: nn.Module) -> Tensor:
    """The weight of a Linear or Conv2d as (G, N, K)."""
    weight = layer.get_parameter("weight").detach()
    groups = int(getattr(layer, "groups", 1))
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def channel_axis(layer: nn.Module) -> int:
    """The axis of the channels in the input of a Linear or Conv2d."""
    return 1 if isinstance(layer, nn.Conv2d) else -1


def sample_rows(layer: nn.Module, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random rows (T, G, K) of the input `x` of `layer`."""
    if not isinstance(layer, nn.Conv2d):
        rows = x.reshape(-1, x.shape[-1])
        return rows[torch.randint(len(rows), (count,), generator=generator, device="cpu")][:, None]
    images = torch.randint(len(x), (count,), generator=generator, device="cpu").sort().values
    parts = []
    for image in images.unique():
        patches = F.unfold(x[image : image + 1], layer.kernel_size, layer.dilation, _pair(layer.padding), layer.stride)[
            0
        ]
        chosen = torch.randint(patches.shape[1], (int((images == image).sum()),), generator=generator, device="cpu")
        parts.append(patches[:, chosen].T)
    return torch.cat(parts).reshape(count, layer.groups, -1)


def rows_of(layer: nn.Module, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """All rows (T, G, K) of the input `x` of `layer`, or `count` random ones if there are more."""
    if isinstance(layer, nn.Conv2d):
        patches = F.unfold(x[:, :1], layer.kernel_size, layer.dilation, _pair(layer.padding), layer.stride)
        if len(x) * patches.shape[2] > count:
            return sample_rows(layer, x, count, generator)
        patches = F.unfold(x, layer.kernel_size, layer.dilation, _pair(layer.padding), layer.stride)
        return patches.transpose(1, 2).reshape(-1, layer.groups, patches.shape[1] // layer.groups)
    rows = x.reshape(-1, 1, x.shape[-1])
    return rows if len(rows) <= count else sample_rows(layer, x, count, generator)


def _pair(padding: object) -> tuple[int, int]:
    if not isinstance(padding, tuple):
        raise TypeError(f"convolution padding {padding!r} is not a pair of numbers")
    return padding


def _but_channels(layer: nn.Module, x: Tensor) -> list[int]:
    """All axes of the input `x` of `layer` except that of the channels."""
    return [axis for axis in range(x.ndim) if axis != channel_axis(layer) % x.ndim]


class Extremes:
    """The minimum and maximum (C,) of every input channel of layers, over all images observed."""

    def __init__(self) -> None:
        self.low: dict[str, Tensor] = {}
        self.high: dict[str, Tensor] = {}

    def add(self, name: str, layer: nn.Module, x: Tensor) -> None:
        """Extend the ranges of the layer `name` by its input `x`."""
        axes = _but_channels(layer, x)
        low, high = x.amin(axes), x.amax(axes)
        self.low[name] = torch.minimum(self.low.get(name, low), low)
        self.high[name] = torch.maximum(self.high.get(name, high), high)

    def merge(self, other: "Extremes") -> "Extremes":
        """New extremes over the images of both operands."""
        merged = Extremes()
        merged.low = {name: torch.minimum(low, other.low[name]) for name, low in self.low.items()}
        merged.high = {name: torch.maximum(high, other.high[name]) for name, high in self.high.items()}
        return merged


class Means:
    """The mean of every input channel of layers, over all images observed."""

    def __init__(self) -> None:
        self.total: dict[str, Tensor] = {}  # (C,) float64
        self.count: Counter[str] = Counter()

    def add(self, name: str, layer: nn.Module, x: Tensor) -> None:
        """Add the input `x` of the layer `name` to its mean."""
        total = x.sum(_but_channels(layer, x), dtype=torch.float64)
        self.total[name] = self.total.get(name, 0.0) + total
        self.count[name] += x.numel() // len(total)

    def of(self, name: str) -> Tensor:
        """The means of the input channels of the layer `name`, (C,) float32."""
        return (self.total[name] / self.count[name]).float()

    def merge(self, other: "Means") -> "Means":
        """New means over the images of both operands."""
        merged = Means()
        merged.total = {name: total + other.total[name] for name, total in self.total.items()}
        merged.count = self.count + other.count
        return merged


def look_at_inputs(net: nn.Module, layers: Iterable[str], batches: Iterable[Tensor], *seen: Extremes | Means) -> None:
    """Run `net` on `batches` and add the inputs of `layers` to each of the statistics `seen` (edits them)."""
    with contextlib.ExitStack() as hooks, torch.inference_mode():
        for each in seen:
            hooks.enter_context(input_hooks(net, layers, each.add))
        for batch in batches:
            net(batch)


def input_rows(
    net: nn.Module, layers: Iterable[str], batches: Iterable[Tensor], count: int, seed: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Yield, for every batch that `net` runs on, layer name -> rows (T, G, K) of the layer's input, up to `count` a call.

    The same seed selects the same rows, also in another network with layers of the same shapes.
    """
    generators = {name: torch.Generator().manual_seed(seed) for name in layers}
    rows: dict[str, list[Tensor]] = {}

    def take(name: str, layer: nn.Module, x: Tensor) -> None:
        rows.setdefault(name, []).append(rows_of(layer, x, count, generators[name]))

    for batch in batches:
        with input_hooks(net, generators, take), torch.inference_mode():
            net(batch)
        yield {name: torch.cat(calls) for name, calls in rows.items()}
        rows.clear()


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """The output y (G, T, N) of a layer for `rows` (T, G, K) and `weight` (G, N, K)."""
    return torch.matmul(rows.transpose(0, 1), weight.transpose(1, 2))
