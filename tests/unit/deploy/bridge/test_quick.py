"""Quick exports give the graphs of plain ones and leave nothing behind."""

import gc
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deploy.bridge import export, quick
from deploy.bridge.export import export_float
from deploy.bridge.quick import quick_export
from deploy.measure.onnx_runner import OnnxRunner


class Edited(nn.Module):
    """What an activation in place has written is read again, and so are the limits of another one."""

    def __init__(self, inplace: bool = True):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.act, self.tight = nn.ReLU6(inplace), nn.Hardtanh(-0.1, 0.2, inplace)

    def forward(self, x):
        x = self.first(x) * 9
        y = self.second(self.act(x)) + x
        return self.head((self.tight(y) + y).mean((2, 3)))


@pytest.mark.parametrize("inplace", [True, False])
def test_a_graph_is_the_same_byte_for_byte_and_computes_what_the_network_does(inplace, monkeypatch):
    torch.manual_seed(0)
    net, images = Edited(inplace).eval(), torch.randn(2, 3, 8, 8)
    quick = export_float(net, (8, 8)).SerializeToString(deterministic=True)
    monkeypatch.setattr(export, "quick_export", lambda: nullcontext([]))
    assert quick == export_float(net, (8, 8)).SerializeToString(deterministic=True)
    found = OnnxRunner(quick)(images.numpy())
    torch.testing.assert_close(torch.from_numpy(found), net(images).detach(), rtol=1e-4, atol=1e-5)


def test_everything_is_as_before_behind_an_export_even_one_that_fails():
    before = F.hardtanh, quick.onnxscript_apis.get_torchlib_ops, quick.onnxscript_apis.optimize

    def fails():
        with quick_export():
            assert not gc.isenabled()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert gc.isenabled()
    assert (F.hardtanh, quick.onnxscript_apis.get_torchlib_ops, quick.onnxscript_apis.optimize) == before


def test_operators_are_read_once(monkeypatch):
    read = []
    monkeypatch.setattr(quick.onnxscript_apis, quick.OPERATORS, lambda: read.append(1))
    for _ in range(2):
        with quick_export():
            quick.onnxscript_apis.get_torchlib_ops()
    assert read == [1]


def test_a_torch_without_these_functions_exports_as_well(monkeypatch):
    monkeypatch.setattr(quick, "onnxscript_apis", None)
    net = Edited().eval()
    found = OnnxRunner(export_float(net, (8, 8)).SerializeToString())(torch.ones(2, 3, 8, 8).numpy())
    torch.testing.assert_close(torch.from_numpy(found), net(torch.ones(2, 3, 8, 8)).detach(), rtol=1e-4, atol=1e-5)
