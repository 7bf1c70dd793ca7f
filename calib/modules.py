"""Modules inside a network: by name, their replacement, the one name of one at several places, what one returns."""

import re
from typing import Any

from torch import Tensor, nn


def replace_module(net: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule `name` of `net`, at every place where it lies (edits `net`).

    `module` may contain the one that it replaces.
    """
    replaced = net.get_submodule(name)
    places = [
        (parent, child) for parent in net.modules() for child, each in parent._modules.items() if each is replaced
    ]
    for parent, child in places:
        setattr(parent, child, module)


def first_names(net: nn.Module) -> dict[str, str]:
    """Return, for every name of a module of `net`, the first one of the same module: that of `net.named_modules()`."""
    first = {id(module): name for name, module in net.named_modules()}
    return {name: first[id(module)] for name, module in net.named_modules(remove_duplicate=False)}


def without_call(name: str) -> str:
    """Return the name of a module without the number that torch.export gives to its second and later calls."""
    return re.sub(r"@\d+", "", name)


def returned(output: Any) -> Any:
    """Return the first of several things that a module returns in a tuple or list; a lone one as it is."""
    return output[0] if isinstance(output, tuple | list) and output else output


def with_returned(output: Any, tensor: Tensor) -> Any:
    """Return `output` with `tensor` in the place of what `returned` gives."""
    if hasattr(output, "_replace"):  # a named tuple
        return output._replace(**{output._fields[0]: tensor})
    return type(output)((tensor, *output[1:])) if isinstance(output, tuple | list) else tensor
