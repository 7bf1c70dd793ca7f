"""Fixtures of several folders."""

import pytest

from tests.gpu.bindings import WHEELS, rtx_api, tensorrt_api

APIS = {}  # version -> its bindings, or the reason why there are none: asked for once


@pytest.fixture(scope="session")
def api_of(request, tmp_path_factory):
    """The bindings of a version of TensorRT, or of "rtx": read when a test first asks, from wheels kept between runs."""

    def read(version):
        if version == "rtx":
            return rtx_api()
        cache = request.config.cache.mkdir("tensorrt_bindings")
        return tensorrt_api(version, cache, tmp_path_factory.mktemp("libraries"))

    def found(version):
        if version not in APIS:
            try:
                APIS[version] = read(version)
            except pytest.skip.Exception as reason:
                APIS[version] = str(reason)
        if isinstance(APIS[version], str):
            pytest.skip(APIS[version])
        return APIS[version]

    return found


@pytest.fixture(params=[*WHEELS, "rtx"])
def api(request, api_of):
    """The bindings of every version in turn."""
    return api_of(request.param)
