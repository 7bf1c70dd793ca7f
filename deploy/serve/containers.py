"""Which version of TensorRT a Triton container holds, from `containers.toml`, which names its source."""

import functools
import tomllib
from collections.abc import Mapping
from pathlib import Path

from calib.errors import UserError, suggestion


@functools.cache
def tensorrt_versions() -> Mapping[str, str]:
    """Tag of the container -> version of its TensorRT."""
    return tomllib.loads(Path(__file__).with_name("containers.toml").read_text())["tensorrt"]


def tensorrt_of_container(tag: str) -> str:
    """The version of TensorRT in the Triton container `tag`, such as 26.07-trtllm-python-py3.

    Raises UserError for a container whose version is not known.
    """
    known = tensorrt_versions()
    if tag not in known:
        raise UserError(
            f"--triton '{tag}': the TensorRT of this container is not in deploy/serve/containers.toml, expected a tag from "
            f"{min(known)} to {max(known)}; read it off the image with `dpkg -l | grep nvinfer` and give --tensorrt "
            f"instead.{suggestion(tag, known)}"
        )
    return known[tag]


def same_release(one: str, other: str) -> bool:
    """Whether two versions of TensorRT agree in major, minor and patch number: an engine of one loads in the other."""
    return one.split(".")[:3] == other.split(".")[:3]
