"""Weight steps with the least squared error: what fewer than 8 bits need, where the largest weight is a poor guide."""

import torch
from torch import Tensor

from calib.quantizer import QParams, channel_qparams, fp16_scale

SHARES = torch.linspace(0.3, 1.0, 71)  # of the step that maps a channel's largest weight to the largest integer


def least_squares_qparams(weight: Tensor, bits: int) -> QParams:
    """Narrow-range parameters per output channel of `weight` (out, ...) that minimise |w^ - w|^2 (AdaQTransform, eq. 1)."""
    rows = weight.detach().flatten(1)
    whole = channel_qparams(rows, bits)
    best, least = whole.scale, torch.full_like(whole.scale, torch.inf)
    for share in SHARES:
        params = QParams(fp16_scale(whole.scale * share), axis=0, narrow=True, bits=bits)
        error = (params.fake_quantize(rows) - rows).square().sum(1)
        best, least = torch.where(error < least, params.scale, best), torch.minimum(error, least)
    return QParams(best, axis=0, narrow=True, bits=bits)
