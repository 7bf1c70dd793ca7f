"""The model of Triton's Python backend that makes boxes of a detector's outputs, as the package was judged.

Triton finds this file as `model.py` beside `boxes.json` and a copy of the files of this tool that it imports.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from calib.task import boxes_of
from deploy.measure.boxes import MOST, Found, decoded
from deploy.serve.models.self_test import require_sound_tensors

BOXES = "boxes.json"


def rows(every: list[Found], image: tuple[int, int]) -> dict[str, np.ndarray]:
    """The boxes of all images by name of the tensor, in rows of `MOST`; those behind the last box are zero.

    `image`: height and width in pixels, of which places become shares.
    """
    count = np.array([[len(each.scores)] for each in every], np.int64)
    places, scores = np.zeros((len(every), MOST, 4), np.float32), np.zeros((len(every), MOST), np.float32)
    classes = np.zeros((len(every), MOST), np.int64)
    height, width = image
    for index, each in enumerate(every):
        found = slice(len(each.scores))
        places[index, found] = each.places / (width, height, width, height)
        scores[index, found], classes[index, found] = each.scores, each.classes
    return {
        "num_detections": count,
        "detection_boxes": places,
        "detection_scores": scores,
        "detection_classes": classes,
    }


class TritonPythonModel:
    """One instance: nothing but how the outputs become boxes."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Read what the package says of them."""
        require_sound_tensors(pb_utils)
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        self.inputs = {each["name"]: tuple(map(int, each["dims"])) for each in config["input"]}
        self.boxes = boxes_of(json.loads((folder / BOXES).read_text()), self.inputs, BOXES)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request."""
        return [self._answer(each) for each in requests]

    def _answer(self, request: Any) -> Any:
        outputs = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
        found = rows(list(decoded(outputs, self.boxes)), self.boxes.image)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in found.items()])
