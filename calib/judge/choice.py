"""Which of several changes to a network lower its output error: the error of the changed layer alone does not tell.

To first order in the changes d_l (B, ...) of what modules l return, with g_l = dr.y / d(output of l) and r ~ N(0, I) as in
calib/judge/first_order.py, the output misses the exact one by

    t = r.(y_exact - y) - sum over the changes made of g_l . d_l

One backward pass per r gives every term at once, so any number of choices can be compared: errors that cancel each other,
or add up, are seen.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from calib.hooks import input_hooks, output_hooks
from calib.judge.first_order import by_image, leaf, projections

IMAGES = 16  # per part
BATCH = 2  # images at a time

Change = Callable[[str, Tensor, Tensor], Tensor]  # (module, what it reads, what it returns) -> d of the latter


def output_terms(
    net: nn.Module, exact: nn.Module, modules: Sequence[str], images: Tensor, change: Change, generator: torch.Generator
) -> Tensor:
    """(B K, 1 + L): r.(y_exact - y), then -g_l . d_l of the L `modules` of `net`, for each image and each r."""
    read: dict[str, Tensor] = {}
    changes: dict[str, list[Tensor]] = {name: [] for name in modules}  # one per call
    outputs: dict[str, list[Tensor]] = {name: [] for name in modules}

    def keep_input(name: str, _module: nn.Module, x: Tensor) -> None:
        read[name] = x.detach()

    def keep_output(name: str, y: Tensor) -> Tensor:
        changes[name].append(change(name, read.pop(name), y.detach()).detach())
        outputs[name].append(leaf(y))
        return outputs[name][-1].clone()  # an activation in place may follow: gradients are wanted before it

    with (
        torch.enable_grad(),
        input_hooks(net, modules, keep_input, first=True),
        output_hooks(net, modules, keep_output),
    ):
        y = net(images)
    # A layer whose output only chooses (top-k) has no gradient: zero, to first order.
    wanted = [each for name in modules for each in outputs[name]]
    difference, found = exact(images).detach() - y.detach(), []

    def by_images(one: Tensor, other: Tensor) -> Tensor:
        return by_image((one * other).detach(), len(images)).sum(1)

    for vector in projections(y, generator):
        gradients = iter(
            torch.autograd.grad(y, wanted, vector, retain_graph=True, materialize_grads=True) if wanted else ()
        )
        terms = [by_images(vector, difference)]
        for name in modules:
            terms.append(-torch.stack([by_images(next(gradients), d) for d in changes[name]]).sum(0))
        found.append(torch.stack(terms, 1))
    return torch.cat(found).double()


def least_error(terms: Tensor, costs: Tensor) -> list[bool]:
    """Return which of L changes to make: least sum over samples of t^2 plus `costs` (L,) of those made.

    `terms` (S, 1 + L) as of `output_terms`. One change at a time goes in or out, the one that gains most, from none and
    from all.
    """
    missing, gains = terms[:, 0], terms[:, 1:]

    def cost(made: Tensor) -> float:
        return float((missing + gains @ made).square().sum() + (costs * made).sum())

    ends = []
    for made in (gains.new_zeros(gains.shape[1]), gains.new_ones(gains.shape[1])):
        now = cost(made)
        while True:
            flipped = torch.where(torch.eye(len(made), dtype=torch.bool), 1 - made, made)
            found = [cost(each) for each in flipped]
            best = min(range(len(found)), key=lambda index: found[index])
            if not found[best] < now:  # so, too, where nothing is a number
                break
            now, made = found[best], flipped[best]
        ends.append((now, made))
    return [bool(each) for each in min(ends, key=lambda end: end[0])[1]]
