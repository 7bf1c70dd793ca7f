import json

import pytest

from calib.errors import UserError
from deploy.engine.kernels import Kernel, KernelTensor
from deploy.explain.kernel_list import KernelLists, lists_to_json, read_lists
from deploy.package import KERNELS

ONE = Kernel(
    "k", "gemm", ("int8", "int8"), ("fp16",), ("fc/MatMul",),
    (KernelTensor("x", "int8", (16, 64), True), KernelTensor("w", "int8", None)), (KernelTensor("y", "fp16", (), True),),
    1024,
)  # fmt: skip


@pytest.mark.parametrize("lists", [KernelLists((ONE, ONE), (ONE,)), KernelLists((ONE,), None, "weights exceed FP16")])
def test_lists_are_read_as_they_were_written(tmp_path, lists):
    (tmp_path / KERNELS).write_text(json.dumps(lists_to_json(lists)))
    assert read_lists(tmp_path) == lists


def test_a_folder_without_a_list_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no kernels\.json at .*make engine"):
        read_lists(tmp_path)


@pytest.mark.parametrize("change", [{"int8": [3]}, {"int8": [{"name": "k"}]}, {"int8": None}, {"fp16": [{"no": 1}]}])
def test_another_content_is_refused(tmp_path, change):
    (tmp_path / KERNELS).write_text(json.dumps(lists_to_json(KernelLists((ONE,), None)) | change))
    with pytest.raises(UserError, match="build the package again"):
        read_lists(tmp_path)


def test_the_traffic_is_that_of_both_engines_per_image():
    found = KernelLists((ONE, ONE), (ONE,)).traffic(4)
    assert found == {"batch": 4, "mb_per_image": 2 * 1026 / 1e6, "fp16_kernels": 1, "fp16_mb_per_image": 1026 / 1e6}
    assert KernelLists((ONE,), None).traffic(1)["fp16_mb_per_image"] is None
