"""The promise of every file in calib/methods/."""

import pkgutil

import pytest
import torch

import calib.methods
from calib.methods import rtn
from calib.network.fold import fold_affine
from calib.network.qdq import quantized_net
from calib.scales.calibrate import Config, calibrate
from deploy.recipe import method_module
from tests.tiny import tiny_batches, tiny_model

METHODS = [item.name for item in pkgutil.iter_modules(calib.methods.__path__)]


def calibrated(family: str):
    batches = tiny_batches(8)
    folds = [batches[:4], batches[4:]]
    return calibrate(fold_affine(tiny_model(family), batches[0][:1]), folds, Config("max")), folds


def output_error(model, folds) -> float:
    net = quantized_net(model)
    with torch.no_grad():
        return sum(float((net(x) - model.float_net(x)).pow(2).sum()) for batches in folds for x in batches)


@pytest.mark.parametrize("family", ["vit", "mobilenet"])
@pytest.mark.parametrize("method", METHODS)
def test_error_is_not_above_round_to_nearest(method, family):
    model, folds = calibrated(family)
    module = method_module(method)
    found = module.reduce_error(model, folds, module.Config())
    assert output_error(found, folds) <= output_error(rtn.reduce_error(model, folds, rtn.Config()), folds)


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_gives_the_same_integers_and_the_input_model_is_untouched(method):
    model, folds = calibrated("vit")
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    module = method_module(method)
    first, second = (quantized_net(module.reduce_error(model, folds, module.Config())) for _ in range(2))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_every_layer_gets_weight_parameters_and_the_history_a_record(method):
    model, folds = calibrated("vit")
    module = method_module(method)
    found = module.reduce_error(model, folds, module.Config())
    assert set(found.quantized_layers) == set(model.layers)
    assert found.history[-1].stage == method
    assert found.history[-1].notes


@pytest.mark.parametrize("method", [method for method in METHODS if method != "rtn"])
def test_a_repair_says_what_it_did_to_the_output_on_other_photographs(method):
    model, folds = calibrated("vit")
    module = method_module(method)
    record = module.reduce_error(model, folds, module.Config()).history[-1]
    assert record.sqnr_before_db is not None
    assert record.sqnr_after_db >= record.sqnr_before_db
