"""Branches fitted on the real DINOv2 ViT-S: simulation and ONNX Runtime compute the same integers with them, too.

The branches are those in INT8; one in FP32 is a MatMul that rounds nothing (tests/contract/test_recipes.py).
"""

import pytest
import torch

from calib.images.image_set import image_sets
from calib.images.preprocess import preprocessing_from_config
from calib.network.qdq import QuantLinear, quantized_net
from calib.quant_model import QuantModel
from calib.scales.calibrate import Config as CalibrateConfig
from calib.scales.calibrate import calibrate
from calib.structure.structure import structure_of
from calib.weights.load import load_net
from calib.weights.zoo import resolve_model
from compensation.qwt import Config, candidates
from deploy.bridge.export import export_pair
from deploy.bridge.parity import compare_with_onnx
from deploy.stages import halves_of
from tests.tiny import rounded

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def calibrated():
    """(model with percentile scales, its halves of four images each, two other images)."""
    loaded = load_net(resolve_model("dinov2_s"), "auto", 0)
    calibration, evaluation = image_sets(None, None, preprocessing_from_config(loaded.data_config), 8, seed=0)
    halves = halves_of(calibration, lambda part: [torch.from_numpy(batch.copy()) for batch in part.batches(2)])
    model = QuantModel.of("dinov2_s", loaded.net, structure_of(loaded.net, next(iter(halves[0]))[:1]))
    model = rounded(calibrate(model, halves, CalibrateConfig("percentile", 99.99)), halves)
    return model, halves, next(evaluation.subset(0, 2).batches(2)).copy()


def test_simulation_and_onnx_agree_with_fitted_branches(calibrated):
    model, halves, images = calibrated
    offer = candidates(model, halves, Config(forms=("shared", "shared_mlp"), min_r2_per_kernel=0.0))
    found = offer.candidates[-1].whole
    assert len(found.branches) >= 3, offer.notes  # scales this plain leave much to mend
    net = quantized_net(found)
    _, fp32 = export_pair(net, images.shape[2:])
    layers = {name for name, module in net.named_modules() if isinstance(module, QuantLinear)}
    branches = {f"{block}.branch" for block in found.branches}
    assert branches <= layers
    assert f"{next(iter(found.branches))}.branch" in {node.name.rpartition("/")[0] for node in fp32.graph.node}
    parity = compare_with_onnx(net, fp32, images)
    assert parity.failure() is None
    assert parity.rel_l2 < 1e-5  # float32 sums in another order
