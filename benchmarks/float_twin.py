"""The float network that a package was made of, which it does not hold: loaded again, and refused if it is another."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from calib.errors import UserError
from calib.weights.load import load_net
from calib.weights.zoo import spec_of
from deploy.package import MANIFEST, RANDOM, read_json


class FloatTwin(NamedTuple):
    """A float network and the height and width of its images."""

    net: nn.Module
    size: tuple[int, int]


def float_twin(folder: Path, weights: str) -> FloatTwin:
    """Return the float network of the package in `folder`; `weights` as in `make engine`, random ones by themselves.

    Raises UserError if they are others than those of the package, or if that is of a network of one's own.
    """
    manifest = read_json(folder / MANIFEST)
    made_of, images = manifest["weights"], manifest["preprocessing"]
    if made_of["module"] is not None:
        raise UserError(f"'{folder}' is of a network of your own: expected one of a short name or of timm")
    if images is None:
        raise UserError(f"'{folder}' takes named inputs: expected a package of a network of images")
    size = images["height"], images["width"]
    name = manifest["model"].removesuffix(RANDOM)
    loaded = load_net(spec_of(name, None, size), "random" if made_of["random"] else weights)
    if loaded.sha256 != made_of["sha256"]:
        raise UserError(f"the weights of '{folder}' are others ({made_of['source']}): expected them as --weights")
    return FloatTwin(loaded.net, size)
