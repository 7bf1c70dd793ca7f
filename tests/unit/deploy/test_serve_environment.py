"""The packages of requirements-serve.txt are enough to verify a package and to run its engine."""

import subprocess
import sys

WITHOUT = ("torch", "torchvision", "timm", "onnx", "onnx_ir", "onnxscript", "rich", "tensorrt", "tensorrt_rtx")
CODE = f"""
import sys
for name in {WITHOUT}:
    sys.modules[name] = None  # an import of it fails
import deploy.execution, deploy.verify, deploy.serve.preflight
from deploy.engine.backends import backends
from deploy.measure.ort_options import ort_options
ort_options(1)
print({{name: module.cannot_run() for name, module in backends().items()}})
"""


def test_nothing_else_is_imported_nor_by_a_session():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "'onnxruntime': None" in done.stdout
    assert "'tensorrt': 'the package tensorrt is not installed" in done.stdout  # a reason, no traceback
