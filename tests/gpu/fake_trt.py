"""TensorRT without a GPU: objects that have exactly the members of the real bindings (tests/gpu/bindings.py).

An engine of it is the ONNX graph that was parsed, run by ONNX Runtime on the addresses that it is given. A misspelt member,
a wrong number of arguments, an enum that a version lacks: each fails as with the real package.
"""

import json
import pickle
from enum import IntEnum
from types import ModuleType

import numpy as np
import onnx
import onnxruntime as ort

from deploy.engine.audit import planned_layers
from tests.gpu.host_device import at

DTYPES = {
    onnx.TensorProto.FLOAT: ("FLOAT", np.float32), onnx.TensorProto.FLOAT16: ("HALF", np.float16),
    onnx.TensorProto.INT64: ("INT64", np.int64), onnx.TensorProto.BOOL: ("BOOL", np.bool_),
    onnx.TensorProto.BFLOAT16: ("BF16", None),
}  # fmt: skip


class Faked:
    """An object of a class of the bindings. `does`: what its methods do and its attributes are; other members raise."""

    def __init__(self, api, kind, **does):
        assert does.keys() <= api.classes[kind].keys(), f"{kind} {api.version} lacks {does.keys() - api.classes[kind]}"
        self.__dict__.update(_api=api, _kind=kind, _does=does)

    def _known(self, name):
        if name not in self._api.classes[self._kind]:
            raise AttributeError(f"{self._kind} of {self._api.module} {self._api.version} has no '{name}'")

    def __getattr__(self, name):
        self._known(name)
        assert name in self._does, f"the stand-in for {self._kind} does not do '{name}'"
        found = self._does[name]
        return self._checked(name, found) if callable(found) else found

    def __setattr__(self, name, value):
        self._known(name)
        assert not self._api.arities(self._kind, name), f"'{name}' of {self._kind} is a method"
        self._does[name] = value

    def _checked(self, name, method):
        def call(*arguments):
            arities = self._api.arities(self._kind, name)
            assert any(least <= len(arguments) <= most for least, most in arities), f"{self._kind}.{name}: {arities}"
            return method(*arguments)

        return call


class FakeTensorRT(ModuleType):
    """The module tensorrt, or tensorrt_rtx, over a `HostDevice`. `broken`: what goes wrong, by the place where it does."""

    def __init__(self, api, device, broken=None):
        super().__init__(api.module)
        self.api, self.device, self.broken, self.__version__ = api, device, broken or {}, api.version
        for name, members in api.enums.items():
            if "." not in name:
                setattr(self, name, IntEnum(name, members))
        severity = IntEnum("Severity", api.enums["ILogger.Severity"])
        self.ILogger = type("ILogger", (), {"Severity": severity, "__init__": lambda _self: None})
        self.flags = self.contexts = 0
        self.Runtime = type("Runtime", (), dict.fromkeys(api.classes["Runtime"]))
        self.Runtime.__new__ = lambda _kind, logger: self.runtime(logger)

    def says(self, logger, text, severity="ERROR"):
        logger.log(self.ILogger.Severity[severity], text)

    # Building.

    def Builder(self, logger):  # noqa: N802
        def network(flags=0):
            self.flags = flags
            return Faked(self.api, "INetworkDefinition", num_inputs=0)

        def serialized(made, config):
            if "build" in self.broken:
                return self.says(logger, self.broken["build"])
            self.says(logger, "a warning", "WARNING")
            assert config.profiling_verbosity == self.ProfilingVerbosity.DETAILED
            return pickle.dumps((made._does["model"], config._does["profile"]))

        def timing_cache(content):
            if content == b"damaged":
                return None
            return Faked(self.api, "ITimingCache", serialize=lambda: memoryview(content + b"timed "))

        def taken(cache, ignore_mismatch):
            assert ignore_mismatch is False
            return not bytes(cache.serialize()).startswith(b"another GPU")

        def config():
            made = Faked(self.api, "IBuilderConfig", create_timing_cache=timing_cache, set_timing_cache=taken)
            made._does["add_optimization_profile"] = lambda profile: made._does.update(profile=profile._does["shapes"])
            return made

        def profile():
            made = Faked(self.api, "IOptimizationProfile")
            shapes = made._does["shapes"] = {}
            made._does["set_shape"] = lambda name, *limits: shapes.update({name: limits})
            return made

        return Faked(
            self.api, "Builder", create_network=network, create_builder_config=config,
            create_optimization_profile=profile, build_serialized_network=serialized,
        )  # fmt: skip

    def OnnxParser(self, network, logger):  # noqa: N802
        def parse(text):
            if "parse" in self.broken:
                return False
            model = onnx.load_from_string(text)
            shapes = [(each.name, _shape(each)) for each in model.graph.input]
            inputs = [Faked(self.api, "ITensor", name=name, shape=shape) for name, shape in shapes]
            network._does.update(model=text, num_inputs=len(inputs), get_input=inputs.__getitem__)
            return True

        assert logger
        error = Faked(
            self.api, "ParserError", node_name=lambda: "a/Conv", node_operator=lambda: "Conv",
            desc=lambda: self.broken["parse"],
        )  # fmt: skip
        return Faked(self.api, "OnnxParser", parse=parse, get_error=[error].__getitem__)

    # Running.

    def runtime(self, logger):
        def deserialized(plan):
            if "load" in self.broken:
                return self.says(logger, self.broken["load"])
            return self.engine(logger, *pickle.loads(plan))

        def validity(_plan):
            bits = self.broken.get("validity")
            return (self.EngineValidity.VALID, 0) if bits is None else (self.EngineValidity.INVALID, bits)

        judges = {"get_engine_validity": validity} if self.api.module == "tensorrt_rtx" else {}
        return Faked(self.api, "Runtime", deserialize_cuda_engine=deserialized, **judges)

    def engine(self, logger, text, profile):
        model = onnx.load_from_string(text)
        inputs, outputs = ({each.name: each for each in some} for some in (model.graph.input, model.graph.output))
        every = {**inputs, **outputs}
        inspector = Faked(self.api, "EngineInspector", get_engine_information=lambda _format: inspected(model))

        def context(config=None):
            assert (config is not None) == (self.api.module == "tensorrt_rtx")
            return None if "context" in self.broken else self.context(logger, text, inputs, outputs, profile)

        return Faked(
            self.api, "ICudaEngine",
            num_io_tensors=len(every),
            get_tensor_name=list(every).__getitem__,
            get_tensor_mode=lambda name: self.TensorIOMode.INPUT if name in inputs else self.TensorIOMode.OUTPUT,
            get_tensor_dtype=lambda name: self.DataType[DTYPES[every[name].type.tensor_type.elem_type][0]],
            get_tensor_shape=lambda name: _shape(every[name]),
            get_tensor_profile_shape=lambda name, index: [profile[name]][index],
            create_engine_inspector=lambda: inspector,
            create_execution_context=context,
            create_runtime_config=self.runtime_config,
        )  # fmt: skip

    def runtime_config(self):
        taken = []

        def compiled():
            assert taken, "the cache was never given to the configuration"
            return b"compiled kernels"

        cache = Faked(
            self.api, "IRuntimeCache", deserialize=lambda data: self.__dict__.update(read=bytes(data)) or True,
            serialize=compiled,
        )  # fmt: skip
        return Faked(
            self.api,
            "IRuntimeConfig",
            create_runtime_cache=lambda: cache,
            set_runtime_cache=lambda given: taken.append(given is cache) or True,
        )

    def context(self, logger, text, inputs, outputs, profile):
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(text, options, providers=["CPUExecutionProvider"])
        shapes, addresses = {}, {}

        def set_shape(name, shape):
            least, _, most = profile[name]
            if not all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
                return self.says(logger, f"shape of {name} is outside of its profile\n[ at profile.cpp ]") or False
            shapes[name] = tuple(shape)
            return True

        def shape_of(name):
            (batch,) = {shape[0] for shape in shapes.values()}
            return (batch, *_shape({**inputs, **outputs}[name])[1:])

        def array(name):
            kind = DTYPES[{**inputs, **outputs}[name].type.tensor_type.elem_type][1]
            return at(addresses[name], shape_of(name), kind)

        def run():
            found = session.run(list(outputs), {name: array(name) for name in inputs})
            for name, value in zip(outputs, found, strict=True):
                array(name)[...] = self.broken.get("outputs", lambda each: each)(value)

        def execute(stream):
            assert stream
            assert addresses.keys() == {*inputs, *outputs}
            if "run" in self.broken:
                return self.says(logger, self.broken["run"]) or False
            self.device.do(run)
            return True

        self.contexts += 1
        return Faked(
            self.api, "IExecutionContext",
            set_input_shape=set_shape,
            infer_shapes=lambda: [name for name in inputs if name not in shapes],
            get_tensor_shape=shape_of,
            set_tensor_address=lambda name, address: addresses.update({name: address}) or True,
            execute_async_v3=execute,
        )  # fmt: skip


def _shape(value):
    """The shape of a graph's input or output, -1 for a dimension that has a name."""
    return tuple(each.dim_value or -1 for each in value.type.tensor_type.shape.dim)


def inspected(model):
    """What the inspector says of an engine that runs every planned layer as an INT8 GEMM."""
    int8 = [{"Name": "t", "Format/Datatype": "Row-major Int8"}]
    layers = [
        {
            "Name": name, "LayerType": "gemm", "Inputs": int8, "Outputs": int8, "Weights": {"Type": "Int8"},
            "TacticName": "sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize64x64", "Metadata": f"[ONNX Layer: {name}]",
        }
        for name in planned_layers(model)
    ]  # fmt: skip
    return json.dumps({"Layers": layers or [{"Name": "nothing", "LayerType": "kgen", "Inputs": [], "Outputs": []}]})
