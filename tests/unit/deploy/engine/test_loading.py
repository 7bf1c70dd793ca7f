"""A TensorRT that is installed but does not load is a reason in one line, and the next backend is taken."""

import sys

import pytest

from calib.errors import UserError
from deploy.doctor import examine
from deploy.engine.backends import choose_backend
from deploy.engine.loading import why_not_loaded

BROKEN = {
    "library": "raise ImportError('libnvinfer.so.11: cannot open shared object file:\\n No such file')",
    "file": "raise FileNotFoundError('Could not find: libnvinfer.so.11')",
    "driver": "raise RuntimeError('CUDA initialization failure with error: 35')",
}


@pytest.fixture(params=BROKEN)
def broken(request, tmp_path, monkeypatch):
    """A package tensorrt that raises when it is imported."""
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt/__init__.py").write_text(BROKEN[request.param])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)


@pytest.mark.usefixtures("broken")
def test_a_package_that_does_not_load_is_one_line_with_its_cause():
    reason = why_not_loaded("tensorrt", "make setup")
    assert reason.startswith("the package tensorrt is installed but cannot be loaded (")
    assert "libnvinfer" in reason or "error: 35" in reason
    assert reason.endswith("): make setup")
    assert "\n" not in reason


@pytest.mark.usefixtures("broken")
def test_doctor_and_the_choice_of_a_backend_go_on_without_it():
    pytest.importorskip("tensorrt_rtx")
    assert any("absent  tensorrt: cannot build: the package tensorrt is installed but" in x for x in examine().lines)
    backend, why = choose_backend("auto")
    assert backend.NAME == "tensorrt_rtx"
    assert "not tensorrt, the package tensorrt is installed but cannot be loaded" in why
    with pytest.raises(UserError, match="TARGET=tensorrt cannot build here: the package tensorrt is installed but"):
        choose_backend("tensorrt")


def test_a_package_that_loads_and_one_that_is_missing():
    assert why_not_loaded("json", "make setup") is None
    assert (
        why_not_loaded("no_such_package", "make setup") == "the package no_such_package is not installed (make setup)"
    )
