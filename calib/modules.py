"""Replacement of a module inside a network by name."""

from torch import nn


def replace_module(net: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule `name` of `net` (edits `net`)."""
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, module)
