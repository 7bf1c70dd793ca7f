"""Runs an engine on a GPU: named arrays in, named arrays out. No torch.

with EngineRunner(plan, tensorrt) as run:
    outputs = run({"input": images})
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np

from calib.errors import UserError
from deploy.engine.device import Device, open_device
from deploy.engine.load import Context, loaded_engine
from deploy.engine.logger import first_error, keeping_logger
from deploy.engine.tensors import EngineTensor, batches, require_inputs, tensors_of
from deploy.errors import ContractError


class EngineRunner:
    """The engine `plan` of the module `trt` (tensorrt or tensorrt_rtx), which holds GPU memory inside its `with`.

    `device`: by default the first visible GPU; it is closed at the end. `kernels_file`: where to keep what TensorRT-RTX
    compiles. Raises NoGpuError where there is no GPU, UserError where the engine cannot be loaded, and ContractError where
    it fails to run.
    """

    def __init__(
        self, plan: bytes, trt: ModuleType, device: Device | None = None, kernels_file: Path | None = None
    ) -> None:
        self._plan, self._trt, self._given_device, self._kernels_file = plan, trt, device, kernels_file

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            self.device = self._given_device or open_device()
            opened.callback(self.device.close)
            opened.callback(self._drop)  # what lives in GPU memory goes before the device does
            self._logger = keeping_logger(self._trt)
            self._runtime = self._trt.Runtime(self._logger)  # its engine needs it as long as it lives
            self._engine = loaded_engine(self._trt, self._runtime, self._logger, self._plan)
            self.tensors = tensors_of(self._trt, self._engine)
            self._kept = Context(self._trt, self._engine, self._logger, self._kernels_file)
            self._context = self._kept.context
            self.stream = self.device.stream()
            self._addresses = self._buffers()
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        with self._opened:
            self._kept.keep_kernels()

    def _drop(self) -> None:
        for name in ("_context", "_kept", "_engine", "_runtime"):
            self.__dict__.pop(name, None)

    def _require(self, done: Any, what: str) -> None:
        if not done:
            raise ContractError(f"the engine refuses {what}: {first_error(self._logger)}")

    def _buffers(self) -> dict[str, int]:
        """Device memory for the largest batch of every tensor, of which the context is told once."""
        found = {}
        for tensor in (*self.tensors.inputs.values(), *self.tensors.outputs.values()):
            size = self.tensors.most * int(np.prod(tensor.shape)) * tensor.dtype.itemsize
            try:
                found[tensor.name] = self.device.alloc(size)
            except RuntimeError as error:
                raise UserError(
                    f"the GPU has no {size / 1e6:.0f} MB left for '{tensor.name}' ({error}): free some, or build with a "
                    f"smaller MAX_BATCH"
                ) from error
            self._require(
                self._context.set_tensor_address(tensor.name, found[tensor.name]), f"memory of '{tensor.name}'"
            )
        return found

    def bind(self, given: Mapping[str, np.ndarray]) -> None:
        """Copy one batch, `least` to `most` images, to the GPU, and prepare the engine for its size."""
        self._sent = {name: np.ascontiguousarray(array) for name, array in given.items()}  # lives until it is copied
        for name, array in self._sent.items():
            self._require(self._context.set_input_shape(name, array.shape), f"shape {array.shape} of '{name}'")
            self.device.copy_in(self._addresses[name], array, self.stream)
        missing = self._context.infer_shapes()
        self._require(not missing, f"to tell its shapes ({', '.join(missing)})")

    def enqueue(self) -> None:
        """Put the engine's work for the batch bound last on `stream`."""
        self._require(self._context.execute_async_v3(self.stream), "to run")

    def _output(self, tensor: EngineTensor) -> np.ndarray:
        found = np.empty(tuple(self._context.get_tensor_shape(tensor.name)), tensor.dtype)
        self.device.copy_out(found, self._addresses[tensor.name], self.stream)
        return found

    def fetch(self) -> dict[str, np.ndarray]:
        """Wait for the outputs of the batch bound last; by name, in the engine's types."""
        found = {name: self._output(tensor) for name, tensor in self.tensors.outputs.items()}
        try:
            self.device.synchronize(self.stream)
        except RuntimeError as error:
            raise ContractError(f"the engine failed on the GPU ({error}): {first_error(self._logger)}") from error
        return found

    def __call__(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every output by name, one entry per image; more images than the engine takes at once run in several batches.

        `given`: one array (N, ...) for every input, in the engine's types. Raises UserError if it is not.
        """
        count, found = require_inputs(self.tensors, given), []
        for part in batches(count, self.tensors.least, self.tensors.most):
            self.bind({name: array[part] for name, array in given.items()})
            self.enqueue()
            found.append(self.fetch())
        return {name: np.concatenate([each[name] for each in found]) for name in self.tensors.outputs}
