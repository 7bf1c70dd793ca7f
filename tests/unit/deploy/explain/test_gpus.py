import pytest

from calib.errors import UserError
from deploy.explain.gpus import GPUS, gpu_from_name


def test_names_in_small_letters_and_with_spaces():
    assert gpu_from_name("rtx 4090") == GPUS["RTX4090"]


def test_an_unknown_gpu_is_refused_with_what_is_known():
    with pytest.raises(UserError, match=r"no figures of the GPU 'A11': expected T4, .*H100"):
        gpu_from_name("A11")


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_tensor_cores_multiply_int8_twice_as_fast_as_fp16(gpu):
    assert 1.9 < gpu.int8 / gpu.fp16 < 2.1
    assert 100e9 < gpu.bandwidth < 5e12
