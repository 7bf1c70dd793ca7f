"""Branches fitted on the real DINOv2 ViT-S: simulation and ONNX Runtime compute the same integers with them, too."""

import pytest
import torch

from calib.families import family_of
from calib.images.image_set import image_sets
from calib.images.preprocess import preprocessing_from_config
from calib.methods import rtn
from calib.network.qdq import QuantLinear, quantized_net
from calib.quant_model import QuantModel
from calib.scales.calibrate import Config as CalibrateConfig
from calib.scales.calibrate import calibrate
from calib.weights.load import load_net
from calib.weights.zoo import resolve_model
from compensation.qwt import Config, compensate
from deploy.bridge.export import export_pair
from deploy.bridge.parity import compare_with_onnx

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def calibrated():
    """(model with percentile scales, its folds of eight images, two other images)."""
    loaded = load_net(resolve_model("dinov2_s"), "auto", 0)
    calibration, evaluation = image_sets(None, None, preprocessing_from_config(loaded.data_config), 16, seed=0)
    folds = [[torch.from_numpy(batch.copy()) for batch in part.batches(4)] for part in calibration.folds()]
    model = QuantModel.of("dinov2_s", loaded.net, family_of(loaded.net))
    model = rtn.reduce_error(calibrate(model, folds, CalibrateConfig("percentile", 99.99)), folds, rtn.Config())
    return model, folds, next(evaluation.subset(0, 2).batches(2)).copy()


@pytest.mark.parametrize("form", ["dense", "shared", "shared_mlp"])
def test_simulation_and_onnx_agree_with_fitted_branches(calibrated, form):
    model, folds, images = calibrated
    found = compensate(model, folds, Config(forms=(form,), kernel_price=0.0))
    assert len(found.branches) >= 3, found.history[-1].notes  # scales this plain leave much to mend
    net = quantized_net(found)
    _, fp32 = export_pair(net, images.shape[2:])
    layers = {name for name, module in net.named_modules() if isinstance(module, QuantLinear)}
    branches = {f"{block}.branch" for block in found.branches}
    assert branches & layers == (branches if form != "dense" else set())
    assert f"{next(iter(found.branches))}.branch" in {node.name.rpartition("/")[0] for node in fp32.graph.node}
    parity = compare_with_onnx(net, fp32, images)
    assert parity.failure() is None
    assert parity.rel_l2 < 1e-5  # float32 sums in another order
