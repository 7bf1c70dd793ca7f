"""The configurations are what Triton's own class reads back, and say what the package says."""

from dataclasses import replace
from pathlib import Path

import pytest

from calib.images.preprocess import Preprocessing
from calib.task import Boxes
from deploy.serve.configs import (
    config_from_text,
    cpu_config,
    decode_config,
    engine_config,
    jpeg_config,
    preprocess_config,
    served_version,
    text_from_config,
)
from deploy.serve.shipped import ServedTensor, Shipped

SHIPPED = Shipped(
    folder=Path("nowhere"),
    id="ab" * 32,
    model="net",
    task="values",
    inputs=(ServedTensor("input", "float16", (3, 32, 48)),),
    outputs=(ServedTensor("scores_0", "float16", (8, 4, 6)), ServedTensor("boxes", "float16", (24, 4))),
    opt=8,
    largest=32,
    preprocessing=Preprocessing(32, 48, 36, 54, "bicubic", (0.5,) * 3, (0.5,) * 3),
    boxes=None,
    backend="tensorrt",
    version="10.14.1.48",
    targets=("SM89",),
    executed=True,
    failed=(),
    random=False,
    sample=False,
    driver=None,
    engine_bytes=1,
    bytes=1,
)
DETECTOR = replace(
    SHIPPED,
    task="boxes",
    outputs=(ServedTensor("scores", "float16", (24, 5)), ServedTensor("boxes", "float16", (24, 4))),
    boxes=Boxes("corners", (32, 48), 5),
)
NAMED = replace(
    SHIPPED,
    inputs=(
        ServedTensor("ids", "int64", (12,)),
        ServedTensor("t", "int32", ()),
        ServedTensor("kept", "bool", (8, 8)),
        ServedTensor("latent", "float16", (4, 8, 8)),
    ),
    preprocessing=None,
)
PLANS, MD5 = {"8.9": "model.plan"}, {"1/model.plan": "0" * 32}


def configs():
    return {
        "engine": engine_config(SHIPPED, "net", 1, PLANS, MD5),
        "cpu": cpu_config(SHIPPED, "net_cpu", 2),
        "preprocess": preprocess_config(SHIPPED, "net", 1, "float16"),
        "jpeg": jpeg_config(SHIPPED, "net", 1, None),
    }


@pytest.mark.parametrize("kind", ["engine", "cpu", "preprocess", "jpeg"])
def test_a_configuration_is_read_back_as_it_was_written(kind):
    config = configs()[kind]
    assert config_from_text(text_from_config(config)) == config
    assert config.max_batch_size == 32


def test_a_misspelt_field_cannot_be_read():
    from google.protobuf.text_format import ParseError

    for text in ('cc_model_filename { key: "8.9" }', "dynamic_batching { prefered_batch_size: 8 }"):
        with pytest.raises(ParseError):
            config_from_text(text)


def test_the_engine_s_model_says_all_that_a_server_could_guess_wrongly():
    from tritonclient.grpc.model_config_pb2 import TYPE_FP16

    config = configs()["engine"]
    assert (config.platform, config.backend) == ("tensorrt_plan", "")
    assert [(each.name, each.dims[:]) for each in config.input] == [("input", [3, 32, 48])]
    assert [(each.name, each.dims[:]) for each in config.output] == [("scores_0", [8, 4, 6]), ("boxes", [24, 4])]
    assert {each.data_type for each in (*config.input, *config.output)} == {TYPE_FP16}
    assert config.dynamic_batching.preferred_batch_size[:] == [8, 32]
    assert [each.batch_size for each in config.model_warmup] == [1, 8, 32]
    assert config.model_warmup[1].inputs["input"].dims[:] == [3, 32, 48]
    assert config.optimization.cuda.graphs
    assert config.parameters["manifest_id"].string_value == SHIPPED.id
    (agent,) = config.model_repository_agents.agents
    assert (agent.name, dict(agent.parameters)) == ("checksum", {"MD5:1/model.plan": "0" * 32})
    assert config.default_model_filename == "model.plan"
    assert not config.cc_model_filenames


def test_engines_of_several_gpus_are_told_apart_by_compute_capability():
    plans = {"8.0": "model_sm80.plan", "12.0": "model_sm120.plan"}
    config = engine_config(SHIPPED, "net", 1, plans, {})
    assert dict(config.cc_model_filenames) == plans
    assert config.default_model_filename == ""


def test_the_graph_s_model_takes_float32_and_needs_no_agent():
    from tritonclient.grpc.model_config_pb2 import TYPE_FP32

    config = configs()["cpu"]
    assert config.backend == "python"
    assert {each.data_type for each in (*config.input, *config.output)} == {TYPE_FP32}
    assert not config.HasField("model_repository_agents")
    assert config.parameters["manifest_id"].string_value == SHIPPED.id
    assert served_version(config) == 2


def test_an_ensemble_leads_image_files_through_the_preprocessing_into_the_model():
    config = configs()["jpeg"]
    first, second = config.ensemble_scheduling.step
    assert (first.model_name, second.model_name) == ("net_preprocess", "net")
    assert first.output_map["input"] == second.input_map["input"]
    assert dict(second.output_map) == {"scores_0": "scores_0", "boxes": "boxes"}


def test_the_ensemble_of_a_detector_ends_with_its_boxes():
    from tritonclient.grpc.model_config_pb2 import TYPE_FP16, TYPE_FP32

    config = jpeg_config(DETECTOR, "net", 1, None)
    *_, network, boxes = config.ensemble_scheduling.step
    assert boxes.model_name == "net_boxes"
    assert {network.output_map[name]: name for name in ("scores", "boxes")} == {
        value: name for name, value in boxes.input_map.items()
    }
    decode = decode_config(DETECTOR, "net", 1, None)
    assert config.output == decode.output
    assert [(each.name, each.dims[:]) for each in decode.output] == [
        ("num_detections", [1]), ("detection_boxes", [100, 4]), ("detection_scores", [100]), ("detection_classes", [100])
    ]  # fmt: skip
    assert [(each.name, each.data_type) for each in decode.input] == [("scores", TYPE_FP16), ("boxes", TYPE_FP16)]
    assert {each.data_type for each in decode_config(DETECTOR, "net_cpu", 1, "float32").input} == {TYPE_FP32}


def test_a_batch_of_one_is_no_preferred_size():
    config = cpu_config(replace(SHIPPED, opt=1, largest=1), "net_cpu", 1)
    assert config.HasField("dynamic_batching")
    assert config.dynamic_batching.preferred_batch_size[:] == []
    assert [each.batch_size for each in config.model_warmup] == [1]


def test_labels_are_named_for_the_outputs():
    assert [each.label_filename for each in cpu_config(SHIPPED, "net_cpu", 1, labels=True).output] == ["labels.txt"] * 2
    assert [each.label_filename for each in cpu_config(SHIPPED, "net_cpu", 1).output] == ["", ""]


def test_named_inputs_keep_their_types_and_only_floating_ones_differ_between_engine_and_graph():
    from tritonclient.grpc import model_config_pb2 as triton

    others = [("ids", triton.TYPE_INT64), ("t", triton.TYPE_INT32), ("kept", triton.TYPE_BOOL)]
    for config, floating in (
        (engine_config(NAMED, "net", 1, PLANS, MD5), triton.TYPE_FP16),
        (cpu_config(NAMED, "net_cpu", 1), triton.TYPE_FP32),
    ):
        assert [(each.name, each.data_type) for each in config.input] == [*others, ("latent", floating)]
        warm_up = config.model_warmup[0].inputs
        assert {name: each.data_type for name, each in warm_up.items()} == dict([*others, ("latent", floating)])
        assert [each.dims[:] for each in config.input] == [[12], [1], [8, 8], [4, 8, 8]]
        assert [each.HasField("reshape") for each in config.input] == [False, True, False, False]
        assert config.input[1].reshape.shape[:] == []
        assert config_from_text(text_from_config(config)) == config
