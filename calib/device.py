"""The device that the torch half computes on."""

import re

import torch

from calib.errors import UserError

CPU = torch.device("cpu")


def chosen_device(name: str) -> torch.device:
    """Return the device called `name`: cpu, cuda, cuda:1, or for auto a CUDA device if there is one.

    Raises UserError for another name, and for a device that is not there.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return CPU
    found = re.fullmatch(r"cuda(?::(\d+))?", "cuda" if name == "auto" else name)
    if not found:
        raise UserError(f"DEVICE='{name}': expected auto, cpu, cuda or cuda:1")
    index, count = int(found[1] or 0), torch.cuda.device_count()
    if index >= count:
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        raise UserError(
            f"DEVICE='{name}': torch {torch.__version__} {built} and finds {count} CUDA devices: expected auto or cpu here"
        )
    return torch.device("cuda", index)
