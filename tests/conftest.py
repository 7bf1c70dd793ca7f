"""Fixtures of several folders."""

import pytest

from tests.gpu.bindings import WHEELS, rtx_api, tensorrt_api

APIS = {}


@pytest.fixture(scope="session")
def api_of(request, tmp_path_factory):
    """The bindings of a version of TensorRT, or of "rtx": read when a test first asks, from wheels kept between runs."""

    def found(version):
        if version not in APIS:
            cache = request.config.cache.mkdir("tensorrt_bindings")
            APIS[version] = (
                rtx_api() if version == "rtx" else tensorrt_api(version, cache, tmp_path_factory.mktemp("libraries"))
            )
        return APIS[version]

    return found


@pytest.fixture(params=[*WHEELS, "rtx"])
def api(request, api_of):
    """The bindings of every version in turn."""
    return api_of(request.param)
