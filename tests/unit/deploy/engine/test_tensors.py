"""A request is cut into as few batches as can be, of nearly equal sizes. Oracle: the properties themselves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.errors import UserError
from deploy.engine.tensors import batches


@given(st.integers(1, 300), st.integers(1, 40))
def test_every_image_is_in_one_batch(count, most):
    found = [range(count)[part] for part in batches(count, 1, most)]
    assert [image for part in found for image in part] == list(range(count))
    sizes = [len(part) for part in found]
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-count // most)


@pytest.mark.parametrize(("count", "least", "most"), [(0, 1, 4), (1, 2, 4), (5, 3, 4)])
def test_what_cannot_be_cut_is_refused(count, least, most):
    with pytest.raises(UserError, match=f"{count} images cannot be cut into batches of {least} to {most}"):
        list(batches(count, least, most))
