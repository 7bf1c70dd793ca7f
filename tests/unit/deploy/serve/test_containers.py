import re
import tomllib
from pathlib import Path

import pytest

from calib.errors import UserError
from deploy.serve import containers
from deploy.serve.containers import same_release, tensorrt_of_container, tensorrt_versions


def test_the_table_names_a_source_at_one_commit():
    table = tomllib.loads((Path(containers.__file__).parent / "containers.toml").read_text())
    assert re.search(r"/blob/[0-9a-f]{40}/", table["source"])
    assert all(re.fullmatch(r"\d\d\.\d\d-[\w-]+", tag) for tag in tensorrt_versions())
    assert all(re.fullmatch(r"\d+(\.\d+){2,3}", version) for version in tensorrt_versions().values())


def test_a_container_that_is_not_in_the_table_is_not_guessed():
    assert tensorrt_of_container("26.07-trtllm-python-py3") == "10.14.1.48"
    with pytest.raises(UserError, match=r"--triton '26\.07': the TensorRT of this container is not in .*--tensorrt"):
        tensorrt_of_container("26.07")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.14.1.48", "10.14.1", True),
        ("10.14.1.48", "10.14.1.50", True),
        ("10.14.1", "10.14.2", False),
        ("10.14.1.48", "11.4.0.106", False),
    ],
)
def test_an_engine_loads_in_the_release_that_built_it(one, other, same):
    assert same_release(one, other) == same
