"""What networks and engines return: arrays by name."""

from collections.abc import Mapping

import numpy as np

Outputs = Mapping[str, np.ndarray]  # by name, one entry per image on the first axis


def only(outputs: Outputs) -> np.ndarray:
    """The single output. Raises ValueError if there are several."""
    (found,) = outputs.values()
    return found
