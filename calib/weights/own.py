"""A network of the user's own: `package.module:factory`, or `path/to/file.py:factory`, that builds an `nn.Module`."""

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.errors import UserError, suggestion
from calib.store.digests import file_sha256
from calib.store.paths import expanded

if TYPE_CHECKING:
    from torch import nn

FORM = "expected package.module:factory or path/to/file.py:factory"
# Files that a network cannot be built from, by their endings.
NO_CODE = {
    **dict.fromkeys((".onnx",), "an ONNX graph"),
    **dict.fromkeys((".engine", ".plan", ".trt"), "a TensorRT engine"),
    **dict.fromkeys((".tflite", ".h5", ".keras", ".pb"), "a TensorFlow model"),
    **dict.fromkeys((".pth", ".pt", ".safetensors", ".ckpt", ".bin", ".tar", ".npz"), "a checkpoint of weights"),
}


def no_network(text: str) -> str:
    """Return a sentence on a file, given for a network, that holds none in PyTorch; empty for anything else."""
    kind = NO_CODE.get(Path(text.rpartition(":")[0] or text).suffix.lower()) or NO_CODE.get(Path(text).suffix.lower())
    if kind is None:
        return ""
    weights = "WEIGHTS= takes it" if kind.endswith("weights") else "WEIGHTS= takes the checkpoint it was exported from"
    return f" This is {kind}: a network is a timm name (MODEL=) or a file.py:factory (MODULE=); {weights}."


def identity(factory: str) -> dict[str, str | None]:
    """Return the factory and the sha256 of the file it is in; what that file imports is not part of it."""
    module = sys.modules[_module_name(_parts(factory)[0])]
    file = getattr(module, "__file__", None)
    return {"factory": factory, "file": file, "sha256": file and file_sha256(Path(file))}


def _imported(where: str) -> Any:
    """The module called `where`, or in the file `where`. Runs the user's code."""
    if not where.endswith(".py"):
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        return importlib.import_module(where)
    path = expanded(where, "MODULE").resolve()
    if not path.is_file():
        raise UserError(f"MODULE: '{where}' does not exist; {FORM}")
    name = _module_name(where)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up there
    sys.path.insert(0, str(path.parent))  # files beside it can be imported
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def _module_name(where: str) -> str:
    """Return the name that a file or module is imported by; a file's has a prefix, to replace no installed module."""
    return f"own_network_{Path(where).stem}" if where.endswith(".py") else where


def _parts(factory: str) -> tuple[str, str]:
    """Return (the file or module, the name in it). Raises UserError for another form."""
    where, _, attribute = factory.rpartition(":")
    wrong = no_network(factory)
    if wrong or not where or not attribute.isidentifier():
        raise UserError(f"MODULE='{factory}': {FORM}.{wrong}")
    return where, attribute


def name_of(factory: str) -> str:
    """Return a name for the network: that of the file or module, and of the factory in it.

    Raises UserError if `factory` is of another form.
    """
    where, attribute = _parts(factory)
    stem = Path(where).stem if where.endswith(".py") else where.rpartition(".")[2]
    return f"{stem}.{attribute}"


def build(factory: str) -> "nn.Module":
    """Return the network that `factory` builds, in eval mode.

    Raises UserError if it cannot be found, fails, or returns something else.
    """
    import torch
    from torch import nn

    where, attribute = _parts(factory)
    try:
        module = _imported(where)
        found: Callable[[], Any] | None = getattr(module, attribute, None)
        if found is None:
            hint = suggestion(attribute, vars(module))
            raise UserError(f"MODULE='{factory}': {where} has no '{attribute}'; {FORM}.{hint}")
        net = found if isinstance(found, nn.Module) else found()
    except UserError:
        raise
    except SystemExit as error:
        raise UserError(
            f"MODULE='{factory}' ended the process (SystemExit: {error}): expected a file that can be imported; put what a "
            f"script does behind if __name__ == '__main__'"
        ) from error
    except Exception as error:  # the user's own code may raise anything
        last = traceback.extract_tb(error.__traceback__)[-1]
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        place = "" if last.filename == __file__ else f" ({last.filename}, line {last.lineno})"
        raise UserError(
            f"MODULE='{factory}' failed with {line}{place}: expected a module that can be "
            f"imported and a factory without arguments"
        ) from error
    if not isinstance(net, nn.Module):
        raise UserError(f"MODULE='{factory}' gives a {type(net).__name__}: expected a torch.nn.Module")
    net = getattr(net, "_orig_mod", net)  # what torch.compile has wrapped
    if any(isinstance(module, torch.jit.ScriptModule) for module in net.modules()):
        raise UserError(f"MODULE='{factory}' gives a TorchScript module: expected the nn.Module that it was made from")
    return net.float().eval()
