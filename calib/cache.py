"""What equalise, attention and calibrate decided, kept under everything that decided it.

A file is named after the sha256 of its description: weights, images, options, and the code and libraries that ran. Any
difference is another name, so a file is never out of date, only unused. It holds decisions, not modules: channel scales
that moved, quantizers, and the stages' records. Replaying them on the folded network gives bit for bit what the
stages gave. A file that is damaged, or was made from something else than its name says, is not used.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from calib.quant_model import QuantModel, StageRecord
from calib.quantizer import QParams
from calib.scales.equalise import apply_moves
from calib.store.kept_files import replacing, tensors_sha256
from calib.store.provenance import made_by
from calib.structure.moves import Moved

STAGES = ("equalise", "calibrate")


class _UnusableError(Exception):
    """Why a file that exists is not used."""


def _write(path: Path, content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """One safetensors file with `content` as metadata, whole or absent. Raises OSError."""
    text = json.dumps(content)
    with replacing(path) as fresh:
        save_file(tensors, fresh, {"content": text, "sha256": tensors_sha256(tensors, text)})


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `_write` wrote. Raises `_UnusableError` for anything else."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (safetensors.SafetensorError, OSError, UnicodeDecodeError) as error:
        raise _UnusableError(f"damaged ({error})") from error
    text = metadata.get("content", "")
    if tensors_sha256(tensors, text) != metadata.get("sha256"):
        raise _UnusableError("damaged (its sha256 differs)")
    return json.loads(text), tensors


@dataclass(frozen=True)
class Cache:
    """The file for one description; `inputs`: JSON values of everything that decides the result, beside the code.

    `folder`: where the files are, None to neither read nor write any.
    """

    inputs: dict[str, Any]
    folder: Path | None

    @property
    def description(self) -> dict[str, Any]:
        """`inputs` and `made_by`, as JSON gives them back."""
        return json.loads(json.dumps({**self.inputs, "made_by": made_by()}))

    @property
    def key(self) -> str:
        """Hex sha256 of the description."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()

    def _path(self) -> Path | None:
        return self.folder and self.folder / f"{self.key}.safetensors"

    def replayed(self, model: QuantModel) -> tuple[QuantModel | None, str]:
        """(`model` after those stages, what to tell the user); (None, why) where the stages have to run.

        `model` is the folded network the stages would start from; it is not changed.
        """
        path = self._path()
        if path is None:
            return None, "off"
        if not path.exists():
            return None, f"nothing kept for exactly this input ({self.key[:12]})"
        try:
            content, tensors = _read(path)
            if content["description"] != self.description:
                raise _UnusableError("made from other inputs than its name says")
        except _UnusableError as reason:
            return None, f"{path} is {reason}: not used"
        note = f"taken from cache {self.key[:12]}"
        moved = [
            Moved(producer, consumer, tensors[f"moved.{index}.scale"], tensors[f"moved.{index}.shift"])
            for index, (producer, consumer) in enumerate(content["moved"])
        ]
        model = apply_moves(model, moved).with_quantizers(
            {
                quantizer: QParams(
                    tensors[f"quantizer.{quantizer}"], zero_point=tensors.get(f"zero_point.{quantizer}"), **options
                )
                for quantizer, options in content["quantizers"].items()
            }
        )
        for record in content["records"]:
            model = model.with_record(StageRecord(**{**record, "notes": (*record["notes"], note)}))
        return model, f"{' and '.join(record['stage'] for record in content['records'])} {note}"

    def save(self, model: QuantModel) -> str:
        """Keep what the stages decided; returns what to tell the user. A place that cannot be written is no error."""
        path = self._path()
        if path is None:
            return "not kept: the cache is off"
        quantizers = {quantizer: model.qparams(quantizer) for quantizer in model.quantizers}
        content = {
            "description": self.description,
            "moved": [(each.producer, each.consumer) for each in model.moved],
            "quantizers": {
                quantizer: {"axis": params.axis, "narrow": params.narrow, "bits": params.bits}
                for quantizer, params in quantizers.items()
            },
            "records": [record.to_json() for record in model.history if record.stage in STAGES],
        }
        tensors = {f"quantizer.{quantizer}": params.scale for quantizer, params in quantizers.items()}
        tensors |= {
            f"zero_point.{s}": params.zero_point for s, params in quantizers.items() if params.zero_point is not None
        }
        for index, each in enumerate(model.moved):
            tensors |= {f"moved.{index}.scale": each.scale, f"moved.{index}.shift": each.shift}
        try:
            _write(path, content, tensors)
        except (OSError, safetensors.SafetensorError) as error:
            return f"not kept: {path.parent} cannot be written ({error})"
        return f"kept in the cache as {self.key[:12]}"
