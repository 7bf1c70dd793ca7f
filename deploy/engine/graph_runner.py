"""Runs the engine of the backend ONNX Runtime on this CPU, with the interface of `EngineRunner`."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np

from calib.errors import UserError
from deploy.engine.tensors import EngineTensor, EngineTensors, batches, require_inputs
from deploy.measure.onnx_runner import OnnxRunner

MOST = 64  # images at a time: any number runs, but each takes memory
DTYPES = {
    "float": np.float32, "float16": np.float16, "int8": np.int8, "uint8": np.uint8, "int32": np.int32, "int64": np.int64,
    "bool": np.bool_,
}  # fmt: skip


def _tensor(found: Any) -> EngineTensor:
    dtype = np.dtype(DTYPES[found.type.removeprefix("tensor(").removesuffix(")")])
    return EngineTensor(found.name, dtype, tuple(found.shape[1:]))


class GraphRunner:
    """The engine `plan`, a graph, inside its `with`. Raises UserError where ONNX Runtime cannot load it."""

    def __init__(self, plan: bytes) -> None:
        self._plan = plan

    def __enter__(self) -> Self:
        import onnxruntime as ort

        try:
            self._runner = OnnxRunner(self._plan)
        except Exception as error:  # ONNX Runtime raises types of its own, which share no other base
            raise UserError(
                f"ONNX Runtime {ort.__version__} cannot load the engine ({str(error).splitlines()[0]}): expected a graph "
                f"that TARGET=onnxruntime built; copy or build it again"
            ) from error
        inputs, outputs = self._runner.inputs, self._runner.session.get_outputs()
        self.tensors = EngineTensors(
            {each.name: _tensor(each) for each in inputs}, {each.name: _tensor(each) for each in outputs}, 1, MOST
        )
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        del self._runner

    def __call__(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every output by name, one entry per image; `given`: one array (N, ...) for every input, in the engine's types.

        Raises UserError if it is not.
        """
        count = require_inputs(self.tensors, given)
        parts = batches(count, self.tensors.least, self.tensors.most)
        found = [self._runner.named_outputs({name: array[part] for name, array in given.items()}) for part in parts]
        return {name: np.concatenate([each[name] for each in found]) for name in self.tensors.outputs}
