"""The configurations of the models that a Triton server runs for one package.

`NAME` is the engine, `NAME_cpu` its graph in ONNX Runtime. Where the network takes an image, each has companions:
`..._preprocess` makes tensors of image files, and `..._jpeg` is the ensemble of both: image files in, outputs out. For a
detector `..._boxes` makes boxes of its outputs, and the ensemble ends with it: image files in, boxes out. The
configurations are messages of Triton's own protobuf class, which the server reads back: a misspelt field cannot be written.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deploy.measure.boxes import MOST
from deploy.serve.shipped import FLOATS, ServedTensor, Shipped

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

CPU, PREPROCESS, JPEG, DECODE = "_cpu", "_preprocess", "_jpeg", "_boxes"  # ends of names
IMAGE = "image"  # the input of an ensemble: the bytes of an image file
LABELS = "labels.txt"
PLAN = "model.plan"
TENSORRT_PLAN = "tensorrt_plan"  # the platform of the engine's model
MANIFEST_ID = "manifest_id"  # the parameter of the engine and of its graph
TYPES = {
    "float16": "TYPE_FP16", "float32": "TYPE_FP32", "int64": "TYPE_INT64", "int32": "TYPE_INT32", "bool": "TYPE_BOOL",
}  # fmt: skip
# Of a detector: how many of the rows are boxes, best first; left, top, right and bottom in shares of the image's width and
# height; score; class.
DETECTIONS = (
    {"name": "num_detections", "data_type": "TYPE_INT64", "dims": [1]},
    {"name": "detection_boxes", "data_type": "TYPE_FP32", "dims": [MOST, 4]},
    {"name": "detection_scores", "data_type": "TYPE_FP32", "dims": [MOST]},
    {"name": "detection_classes", "data_type": "TYPE_INT64", "dims": [MOST]},
)
CPU_DTYPE = "float32"  # of what is floating in model.fp32.onnx


def _type(tensor: ServedTensor, dtype: str | None) -> str:
    """Triton's type of a tensor; `dtype` is that of floating ones, None: the engine's."""
    return TYPES[dtype if dtype and tensor.dtype in FLOATS else tensor.dtype]


def _dims(tensor: ServedTensor) -> tuple[int, ...]:
    """The axes that a client sends behind that of the batch: Triton takes none without, so one number has an axis of 1."""
    return tensor.shape or (1,)


def _tensor(tensor: ServedTensor, dtype: str | None = None, labels: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = {"name": tensor.name, "data_type": _type(tensor, dtype), "dims": _dims(tensor)}
    if not tensor.shape:
        found["reshape"] = {"shape": []}
    return {**found, "label_filename": LABELS} if labels else found


def _common(shipped: Shipped, name: str, version: int) -> dict[str, Any]:
    """What all models of a package share. Only `version` is served: a folder beside it waits until it is switched to."""
    return {
        "name": name,
        "max_batch_size": shipped.largest,
        "version_policy": {"specific": {"versions": [version]}},
    }


def _network(shipped: Shipped, sizes: Sequence[int], dtype: str | None = None, labels: bool = False) -> dict[str, Any]:
    """What engine and graph share: which package they are of, dynamic batching, one warm-up for each of `sizes`."""
    preferred = sorted({shipped.opt, shipped.largest} - {1})
    inputs = {
        each.name: {"data_type": _type(each, dtype), "dims": _dims(each), "zero_data": True} for each in shipped.inputs
    }
    return {
        "parameters": {MANIFEST_ID: {"string_value": shipped.id}},
        "input": [_tensor(each, dtype) for each in shipped.inputs],
        "output": [_tensor(each, dtype, labels) for each in shipped.outputs],
        "dynamic_batching": {"preferred_batch_size": preferred},
        "model_warmup": [{"name": f"batch {size}", "batch_size": size, "inputs": inputs} for size in sizes],
    }


def _message(values: Mapping[str, Any]) -> "ModelConfig":
    from google.protobuf.json_format import ParseDict
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    return ParseDict(values, ModelConfig())


def engine_config(
    shipped: Shipped, name: str, version: int, plans: Mapping[str, str], md5: Mapping[str, str], labels: bool = False
) -> "ModelConfig":
    """The model that runs the engine.

    `plans`: compute capability ("8.9") -> name of the plan file; of one architecture alone it is the default file.
    `md5`: path of a plan in the model's folder -> its MD5, which Triton's checksum agent compares before it loads.
    """
    many = {"cc_model_filenames": dict(plans)} if len(plans) > 1 else {"default_model_filename": PLAN}
    sizes = sorted({1, shipped.opt, shipped.largest})
    return _message(
        {
            **_common(shipped, name, version),
            **_network(shipped, sizes, labels=labels),
            **many,
            "platform": TENSORRT_PLAN,
            "instance_group": [{"kind": "KIND_GPU", "count": 1}],
            "optimization": {"cuda": {"graphs": True}},
            "model_repository_agents": {
                "agents": [{"name": "checksum", "parameters": {f"MD5:{path}": digest for path, digest in md5.items()}}]
            },
        }
    )


def cpu_config(shipped: Shipped, name: str, version: int, labels: bool = False) -> "ModelConfig":
    """The model that runs a graph in ONNX Runtime, with float32 in the place of FP16. It checks its own digest: no agent."""
    return _message(
        {
            **_common(shipped, name, version),
            **_network(shipped, sorted({1, shipped.opt}), CPU_DTYPE, labels),
            "backend": "python",
            "instance_group": [{"kind": "KIND_CPU", "count": 1}],
        }
    )


def preprocess_config(shipped: Shipped, name: str, version: int, dtype: str) -> "ModelConfig":
    """The model that makes tensors of `dtype` of image files."""
    return _message(
        {
            **_common(shipped, name + PREPROCESS, version),
            "backend": "python",
            "input": [{"name": IMAGE, "data_type": "TYPE_STRING", "dims": [1]}],
            "output": [_tensor(each, dtype) for each in shipped.inputs],
            "instance_group": [{"kind": "KIND_CPU", "count": 1}],
        }
    )


def decode_config(shipped: Shipped, name: str, version: int, dtype: str | None) -> "ModelConfig":
    """The model that makes boxes of what the detector `name` returns, whose type is `dtype` (None: the engine's)."""
    return _message(
        {
            **_common(shipped, name + DECODE, version),
            "backend": "python",
            "input": [_tensor(each, dtype) for each in shipped.outputs],
            "output": DETECTIONS,
            "instance_group": [{"kind": "KIND_CPU", "count": 1}],
        }
    )


def jpeg_config(shipped: Shipped, name: str, version: int, dtype: str | None, labels: bool = False) -> "ModelConfig":
    """The ensemble of the preprocessing and the model `name`, of whose outputs `dtype` is the type (None: the engine's).

    It ends with the boxes of a detector.
    """
    tensors = {each.name: each.name for each in shipped.inputs}
    returned = {each.name: f"raw_{each.name}" if shipped.boxes else each.name for each in shipped.outputs}
    steps = [
        {"model_name": name + PREPROCESS, "model_version": -1, "input_map": {IMAGE: IMAGE}, "output_map": tensors},
        {"model_name": name, "model_version": -1, "input_map": tensors, "output_map": returned},
    ]
    outputs: Sequence[Mapping[str, Any]] = [_tensor(each, dtype, labels) for each in shipped.outputs]
    if shipped.boxes:
        outputs, told = DETECTIONS, {each["name"]: each["name"] for each in DETECTIONS}
        steps.append({"model_name": name + DECODE, "model_version": -1, "input_map": returned, "output_map": told})
    return _message(
        {
            **_common(shipped, name + JPEG, version),
            "platform": "ensemble",
            "input": [{"name": IMAGE, "data_type": "TYPE_STRING", "dims": [1]}],
            "output": outputs,
            "ensemble_scheduling": {"step": steps},
        }
    )


def text_from_config(config: "ModelConfig") -> str:
    """The content of config.pbtxt."""
    from google.protobuf import text_format

    return text_format.MessageToString(config)


def config_from_text(text: str) -> "ModelConfig":
    """The inverse of `text_from_config`. Raises google.protobuf.text_format.ParseError for anything else."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    return text_format.Parse(text, ModelConfig())


def served_version(config: "ModelConfig") -> int:
    """The one version that a model of this tool serves."""
    (version,) = config.version_policy.specific.versions
    return int(version)
