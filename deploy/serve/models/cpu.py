"""The model of Triton's Python backend that runs a graph in ONNX Runtime: no GPU, the integers of the engine.

It is the engine where ONNX Runtime is what the package was built for, else model.fp32.onnx.

Triton finds this file as `model.py` beside the graph and beside a copy of the files of this tool that it imports.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from deploy.measure.onnx_runner import OnnxRunner
from deploy.serve.models.self_test import require_sound_tensors

REASON = 400  # characters of what ONNX Runtime says
GRAPH, ENGINE, MANIFEST = "model.fp32.onnx", "model.engine", "manifest.json"


class TritonPythonModel:
    """One instance: an ONNX Runtime session."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Load the graph. Raises RuntimeError, so that the model does not load, where it is not that of the manifest."""
        require_sound_tensors(pb_utils)
        folder = Path(args["model_repository"]) / args["model_version"]
        manifest = json.loads((folder / MANIFEST).read_text())
        file = ENGINE if manifest["engine"]["backend"] == "onnxruntime" else GRAPH
        graph = (folder / file).read_bytes()
        if hashlib.sha256(graph).hexdigest() != manifest["files"][file]["sha256"]:
            raise RuntimeError(f"{file} has changed since it was packaged (sha256 differs): install the package again")
        self.runner = OnnxRunner(graph)
        self.outputs = [each["name"] for each in json.loads(args["model_config"])["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run the samples of all requests as one batch; one by one where that fails, so that others are not hurt."""
        names = [each.name for each in self.runner.inputs]
        given = [
            {name: pb_utils.get_input_tensor_by_name(each, name).as_numpy() for name in names} for each in requests
        ]
        try:
            return self._answers(given)
        # ONNX Runtime's own, of many types: ids that a table has no row for
        except Exception as error:
            if len(requests) > 1:
                return [self.execute([each])[0] for each in requests]
            reason = " ".join(str(error).split())[:REASON]
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(f"the network cannot read this: {reason}"))]

    def _answers(self, given: list[dict[str, np.ndarray]]) -> list[Any]:
        """One response for each of `given`, inputs (B, ...) by name, which are run as one batch."""
        found = self.runner.named_outputs({name: np.concatenate([each[name] for each in given]) for name in given[0]})
        ends = np.cumsum([len(next(iter(each.values()))) for each in given])[:-1]
        rows = {name: np.split(found[name].astype(np.float32), ends) for name in self.outputs}
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(name, rows[name][index]) for name in self.outputs])
            for index in range(len(given))
        ]
