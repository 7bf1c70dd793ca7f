"""The model of Triton's Python backend that makes the network's input of image files, as calibration did.

Triton finds this file as `model.py` beside `preprocessing.json` and a copy of the files of this tool that it imports.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from PIL import Image

from calib.images.preprocess import Preprocessing, array_from_image
from deploy.serve.models.self_test import require_sound_tensors

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # a client chooses the bytes: no decoder beyond what images on the web need
PREPROCESSING = "preprocessing.json"
DTYPES = {"TYPE_FP16": np.float16, "TYPE_FP32": np.float32}


def array_from_bytes(data: bytes, preprocessing: Preprocessing) -> np.ndarray:
    """The preprocessed array, float32 (3, height, width), of an image file. Raises ValueError if it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return array_from_image(image, preprocessing)
    # Pillow's decoders raise anything on damaged bytes, and its guard refuses images of too many pixels
    except Exception as error:
        raise ValueError(type(error).__name__) from error


class TritonPythonModel:
    """One instance: nothing but the preprocessing of its package."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Read the preprocessing."""
        require_sound_tensors(pb_utils)
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        self.preprocessing = Preprocessing.from_json(json.loads((folder / PREPROCESSING).read_text()))
        self.input, self.output = config["input"][0]["name"], config["output"][0]["name"]
        self.dtype = DTYPES[config["output"][0]["data_type"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request: an error where one of its images cannot be decoded."""
        return [self._answer(each) for each in requests]

    def _answer(self, request: Any) -> Any:
        files = pb_utils.get_input_tensor_by_name(request, self.input).as_numpy().reshape(-1)
        arrays = []
        for index, data in enumerate(files):
            try:
                arrays.append(array_from_bytes(data, self.preprocessing))
            except ValueError as error:
                return pb_utils.InferenceResponse(
                    error=pb_utils.TritonError(
                        f"image {index} of the request cannot be decoded ({error}): expected {', '.join(FORMATS)}"
                    )
                )
        return pb_utils.InferenceResponse([pb_utils.Tensor(self.output, np.stack(arrays).astype(self.dtype))])
