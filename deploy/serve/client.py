"""A Triton server seen through its own HTTP client: load a model, ask it, tell whether it is there."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from calib.errors import UserError
from deploy.errors import ContractError

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

LOAD_SECONDS = 600.0  # a large network, with its warm-ups
CONNECT_SECONDS = 10.0
TYPES = {"FP16": np.float16, "FP32": np.float32}

T = TypeVar("T")


class Client:
    """The server at `url`, host:port of its HTTP service.

    Every call raises UserError if nothing answers there, and ContractError with the server's words if it refuses.
    """

    def __init__(self, url: str) -> None:
        import tritonclient.http as http

        self.url = url
        self._http = http.InferenceServerClient(url, connection_timeout=CONNECT_SECONDS, network_timeout=LOAD_SECONDS)

    def _asked(self, call: Callable[[], T]) -> T:
        from tritonclient.utils import InferenceServerException

        try:
            return call()
        except InferenceServerException as error:
            raise ContractError(" ".join((error.message() or str(error)).split())) from error
        except OSError as error:
            raise UserError(
                f"no Triton server answers at '{self.url}' ({error}): expected the host:port of its HTTP service"
            ) from error

    def require_live(self) -> None:
        """Raise UserError if no server answers."""
        if not self._asked(self._http.is_server_live):
            raise UserError(f"the server at '{self.url}' is not live: start it again")

    def load(self, model: str, config: "ModelConfig | None" = None) -> None:
        """Load the model as `config` says, or as its file does. The version before serves until this one is ready."""
        from google.protobuf.json_format import MessageToJson

        text = None if config is None else MessageToJson(config, preserving_proto_field_name=True)
        self._asked(lambda: self._http.load_model(model, config=text))

    def ready(self, model: str) -> bool:
        """Whether a version of the model serves."""
        return bool(self._asked(lambda: self._http.is_model_ready(model)))

    def answer(self, model: str, inputs: Mapping[str, np.ndarray], version: str = "") -> dict[str, np.ndarray]:
        """The outputs by name. `inputs`: arrays (B, ...) by name in the model's types; objects are sent as bytes."""
        import tritonclient.http as http
        from tritonclient.utils import np_to_triton_dtype

        sent = []
        for name, array in inputs.items():
            tensor = http.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            sent.append(tensor.set_data_from_numpy(array))
        found: Any = self._asked(lambda: self._http.infer(model, sent, model_version=version))
        return {each["name"]: found.as_numpy(each["name"]) for each in found.get_response()["outputs"]}
