"""What stands in front of a layer: a module that changes what the layer reads, and leaves the layer and its name alone.

It is a child of the layer, called by a hook, so that a copy of the network keeps it and a graph names it after the layer.
"""

import copy
from typing import Any

from torch import Tensor, nn

from calib.modules import replace_module

IN_FRONT = "input_scale_and_shift"  # what the module is called within its layer


def _change_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """The hook before a layer with such a module. A plain function, so that copies of the layer keep working."""
    return layer.get_submodule(IN_FRONT)(inputs[0]), *inputs[1:]


def in_front(layer: nn.Module) -> nn.Module | None:
    """Return what stands in front of `layer`, or None."""
    return layer._modules.get(IN_FRONT)


def put_in_front(layer: nn.Module, module: nn.Module) -> None:
    """Let `layer` read what `module` makes of its input; it replaces what stood there (edits `layer`)."""
    if in_front(layer) is None:
        layer.register_forward_pre_hook(_change_input)
    layer.add_module(IN_FRONT, module)


def alone(layer: nn.Module) -> nn.Module:
    """Return a copy of `layer` with nothing in front."""
    copied = copy.deepcopy(layer)
    if in_front(copied) is not None:
        del copied._modules[IN_FRONT]
        kept = {key: hook for key, hook in copied._forward_pre_hooks.items() if hook is not _change_input}
        copied._forward_pre_hooks.clear()
        copied._forward_pre_hooks.update(kept)
    return copied


def replace_layer(net: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the layer `name` of `net`, behind what stands in front of that (edits `net`).

    What stands in front of `layer` itself stays instead, if there is something.
    """
    before = in_front(net.get_submodule(name))
    if before is not None and in_front(layer) is None:
        put_in_front(layer, before)
    replace_module(net, name, layer)
