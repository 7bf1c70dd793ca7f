import types

import numpy as np
import pytest

from deploy.serve.models.self_test import require_sound_tensors


def backend(falsify):
    """A module like Triton's, whose tensors are read by `falsify`."""

    class Tensor:
        def __init__(self, _name, array):
            self.array = array

        def to_dlpack(self):
            return self.array

        @classmethod
        def from_dlpack(cls, name, capsule):
            return cls(name, falsify(capsule))

        def as_numpy(self):
            return self.array

    return types.SimpleNamespace(Tensor=Tensor)


def test_sound_tensors_pass():
    require_sound_tensors(backend(np.copy))


WRONG = {
    "first value everywhere": lambda array: np.full_like(array, array.flat[0]),  # what numpy 2 gives on Triton 2.51
    "nothing": lambda array: array[:0],
    "one value less exact": lambda array: np.where(array == 6, np.nextafter(array, 0), array),
    "whole numbers in another order": lambda array: array[::-1] if array.dtype == np.int64 else array,
}


@pytest.mark.parametrize("case", WRONG)
def test_false_tensors_keep_the_model_from_loading(case):
    with pytest.raises(RuntimeError, match=r"returns other numbers than it was given .*'numpy<2'"):
        require_sound_tensors(backend(WRONG[case]))
