"""What is said of a GPU is what its driver says, and where there is none, why."""

import subprocess

import pytest

from deploy.gpu import why_no_gpu
from tests.gpu.fake_cuda import ROOT, fake_cuda, printed

ASKED = "from deploy.gpu import gpu, why_no_gpu; print(why_no_gpu() or gpu())"
WITHOUT_BINDINGS = "import sys; sys.modules['cuda.bindings'] = None; "
no_driver = pytest.mark.skipif(why_no_gpu() is None, reason="there is a GPU")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return fake_cuda(tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize(("version", "cuda"), [("13000", "13.0"), ("12040", "12.4"), ("13020", "13.2")])
def test_a_gpu_is_described_by_its_driver(library, version, cuda):
    found = printed(ASKED, library, FAKE_CUDA_VERSION=version)
    assert found.startswith(f"Gpu(name='Made-up GPU', compute_capability=89, memory=25769803776, cuda='{cuda}'")


def test_a_driver_without_a_visible_gpu_says_so(library):
    found = printed(ASKED, library, FAKE_CUDA_DEVICES="0", CUDA_VISIBLE_DEVICES="7")
    assert found == (
        "the NVIDIA driver finds no usable GPU (cuInit: CUDA_ERROR_NO_DEVICE, with CUDA_VISIBLE_DEVICES='7')"
    )


def test_the_description_of_the_machine_holds_the_gpu(library):
    script = "from deploy.host import describe; found = describe(); print(found['gpu'], found['compute_capability'])"
    assert printed(script, library) == "Made-up GPU 89"


@no_driver
def test_a_machine_without_a_driver_says_so():
    assert printed(ASKED, None) == "no NVIDIA driver"


def test_missing_bindings_are_named():
    assert printed(WITHOUT_BINDINGS + ASKED, None) == "the package cuda-bindings is not installed"


HEADERS = {
    "none": (None, "requirements.txt (no NVIDIA driver found)"),
    "580": ("| NVIDIA-SMI 580.82  Driver Version: 580.82  CUDA Version: 13.0     |",
            "requirements-gpu.txt (an NVIDIA driver for CUDA 13 is present)"),
    "550": ("| NVIDIA-SMI 550.54  Driver Version: 550.54  CUDA Version: 12.4     |",
            "requirements-gpu-cuda12.txt (an NVIDIA driver for CUDA 12 is present)"),
    "other": ("| NVIDIA-SMI 600.1  KMD Version: 600.1  CUDA UMD Version: 13.4     |",
              "requirements-gpu.txt (an NVIDIA driver for CUDA 13 is present)"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_setup_chooses_by_the_driver_and_notices_one_that_comes_later(tmp_path, case, monkeypatch):
    header, expected = HEADERS[case]
    tool = tmp_path / "bin/nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho '{header}'\n" if header else "#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    venv = tmp_path / "venv"
    venv.mkdir()
    command = ["make", "--dry-run", "setup", f"VENV={venv}"]
    ready = venv / f".ready-{expected.split('.txt')[0]}"
    others = {".ready-requirements", ".ready-requirements-gpu", ".ready-requirements-gpu-cuda12"} - {ready.name}
    for other in others:  # set up before the driver was there
        (venv / other).touch()
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"with {expected}" in said
    ready.touch()
    assert "setting up" not in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@no_driver
def test_pycuda_is_not_compiled_where_there_is_no_driver(tmp_path):
    ready = ("-o", f"{tmp_path}/.ready-requirements", "REQUIREMENTS=requirements.txt")
    command = ["make", "setup-pycuda", f"VENV={tmp_path}", *ready]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error: no NVIDIA driver (libcuda.so.1): PyCUDA is for a GPU host"
