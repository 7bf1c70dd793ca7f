"""Equalisation costs nothing at run time: the engine has as many kernels with it as without."""

import pytest

from calib.network.fold import fold_affine
from calib.network.qdq import quantized_net
from calib.scales.calibrate import Config as CalibrateConfig
from calib.scales.calibrate import calibrate
from calib.scales.equalise import Config, equalise
from deploy.bridge.export import export_pair
from tests.tiny import SIZE, rounded, tiny_batches, tiny_halves, tiny_model

pytestmark = pytest.mark.slow

HALVES = tiny_halves(2)


def kernels(model) -> int:
    from deploy.engine.backends import tensorrt_rtx
    from deploy.engine.build import Profile

    model = rounded(calibrate(model, HALVES, CalibrateConfig("max")), HALVES)
    fp16, _ = export_pair(quantized_net(model), (SIZE, SIZE))
    return len(tensorrt_rtx.build(fp16, Profile(2, 4), (89,)).kernels)


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_no_kernel_is_added(family):
    pytest.importorskip("tensorrt_rtx")
    model = fold_affine(tiny_model(family), tiny_batches(1)[0][:1])
    moved = equalise(model, HALVES, Config(exponents=(0.7,)))
    assert moved.moved
    assert kernels(moved) == kernels(model)
