"""Weight scales with the least squared error.

Below 8 bits a scale that maps the largest weight to the largest integer is far from optimal.
"""

import torch
from torch import Tensor

from calib.quantizer import QParams, channel_qparams, fp16_scale

SHARES = torch.linspace(0.3, 1.0, 71)  # of the scale that maps the largest weight of a channel to the largest integer


def least_squares_qparams(weight: Tensor, bits: int) -> QParams:
    """Narrow-range parameters with one scale per output channel of `weight` (out, ...).

    Each scale minimises |w^ - w|^2 over SHARES (AdaQTransform, eq. 1).
    """
    rows = weight.detach().flatten(1)
    whole = channel_qparams(rows, bits)
    best, least = whole.scale, torch.full_like(whole.scale, torch.inf)
    for share in SHARES.tolist():
        params = QParams(fp16_scale(whole.scale * share), axis=0, narrow=True, bits=bits)
        error = (params.fake_quantize(rows) - rows).square().sum(1)
        best, least = torch.where(error < least, params.scale, best), torch.minimum(error, least)
    return QParams(best, axis=0, narrow=True, bits=bits)
