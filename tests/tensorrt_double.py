"""A test double of the `tensorrt` module: it builds nothing, and only has the shape of its Python interface.

Which version it plays is in the environment variable TENSORRT_DOUBLE (8, 10 or 11); what differs between them are the
enumerations that exist and the layout of the inspector's JSON, as NVIDIA's migration guide tells it. Tests copy this
file to a folder as `tensorrt.py`, so that the worker imports it. It proves the branches of our code, nothing else.
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx

PLAYS = int(os.environ.get("TENSORRT_DOUBLE", "10"))
__version__ = {8: "8.5.2", 10: "10.3.0", 11: "11.4.1"}[PLAYS]
DLA_OPERATORS = ("Conv", "Relu")
CLOCK_NS = [0]  # what inferences take, by this clock alone


class ILogger:
    def __init__(self) -> None:
        pass


class Logger(ILogger):
    ERROR, WARNING = 1, 2

    def __init__(self, severity: int) -> None:
        super().__init__()


class IProgressMonitor:
    def __init__(self) -> None:
        pass


class BuilderFlag(enum.IntEnum):
    SPARSE_WEIGHTS = 2
    GPU_FALLBACK = 3
    if PLAYS < 11:
        FP16 = 0
        INT8 = 1


TensorIOMode = enum.IntEnum("TensorIOMode", {"INPUT": 1, "OUTPUT": 2})
DataType = enum.Enum("DataType", {"FLOAT": 0, "INT64": 1})
MemoryPoolType = enum.IntEnum(
    "MemoryPoolType", {"WORKSPACE": 0, "DLA_MANAGED_SRAM": 1, "DLA_LOCAL_DRAM": 2, "DLA_GLOBAL_DRAM": 3}
)
DeviceType = enum.IntEnum("DeviceType", {"GPU": 0, "DLA": 1})
ProfilingVerbosity = enum.IntEnum("ProfilingVerbosity", {"DETAILED": 2})
LayerInformationFormat = enum.IntEnum("LayerInformationFormat", {"JSON": 1})
if PLAYS >= 10:
    NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1})


class _Cache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data or b"timings"


class _Config:
    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.flags: set[int] = set()
        self.profiles: list[Any] = []
        self.pools: dict[int, int] = {}
        self.cache: _Cache | None = None
        self.progress_monitor: Any = None
        self.default_device_type = DeviceType.GPU
        self.DLA_core = -1

    def set_flag(self, flag: int) -> None:
        self.flags.add(flag)

    def set_memory_pool_limit(self, pool: int, size: int) -> None:
        self.pools[pool] = size

    def add_optimization_profile(self, profile: Any) -> None:
        self.profiles.append(profile)

    def create_timing_cache(self, data: bytes) -> _Cache:
        return _Cache(data)

    def set_timing_cache(self, cache: _Cache, ignore_mismatch: bool) -> bool:
        if cache.data not in (b"", b"timings"):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> _Cache | None:
        return self.cache

    def can_run_on_DLA(self, layer: Any) -> bool:
        return layer.op in DLA_OPERATORS


class _Network:
    def __init__(self, flags: int) -> None:
        self.strongly_typed = bool(flags)
        self.layers: list[Any] = []
        self.tensors: list[Any] = []

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_layer(self, index: int) -> Any:
        return self.layers[index]


class Builder:
    num_DLA_cores = 2 if PLAYS == 10 else 0  # noqa: N815  the library's name

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def create_network(self, flags: int) -> _Network:
        return _Network(flags)

    def create_builder_config(self) -> _Config:
        return _Config(self.logger)

    def create_optimization_profile(self) -> Any:
        shapes: dict[str, Any] = {}
        return SimpleNamespace(shapes=shapes, set_shape=lambda name, *rows: shapes.__setitem__(name, rows))

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes:
        convolutions = [layer.name for layer in network.layers if layer.op == "Conv"]
        if BuilderFlag.SPARSE_WEIGHTS in config.flags:
            listed = "(Sparsity) Layers eligible for sparse math: " + ", ".join(convolutions)
            picked = f"(Sparsity) TRT inference plan picked sparse implementation for layers: {convolutions[0]}"
            self.logger.log("Severity.INFO", listed)
            self.logger.log("Severity.INFO", picked)
        if config.progress_monitor is not None:
            config.progress_monitor.phase_start("Building", None, len(network.layers))
            for step, _ in enumerate(network.layers):
                config.progress_monitor.step_complete("Building", step)
            config.progress_monitor.phase_finish("Building")
        plan = {
            "strongly_typed": network.strongly_typed,
            "flags": sorted(int(flag) for flag in config.flags),
            "pools": {str(int(pool)): size for pool, size in config.pools.items()},
            "shapes": [profile.shapes for profile in config.profiles],
            "device": [int(config.default_device_type), config.DLA_core],
            "tensors": network.tensors,
            "layers": [[layer.name, layer.op] for layer in network.layers],
            "filling": "x" * 1024,
        }
        return json.dumps(plan).encode()


class OnnxParser:
    num_errors = 0

    def __init__(self, network: _Network, logger: Any) -> None:
        self.network = network

    def supports_operator(self, name: str) -> bool:
        return name != "Det"

    def parse_from_file(self, path: str) -> bool:
        graph = onnx.load(Path(path)).graph
        self.network.layers = [SimpleNamespace(name=node.name, op=node.op_type) for node in graph.node]
        self.network.tensors = [
            [v.name, [d.dim_value for d in v.type.tensor_type.shape.dim], v.type.tensor_type.elem_type, is_input]
            for values, is_input in ((graph.input, True), (graph.output, False))
            for v in values
        ]
        return True


class Runtime:
    def __init__(self, logger: Any) -> None:
        pass

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        return _Engine(json.loads(plan)) if plan.startswith(b"{") else None


class _Engine:
    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.tensors: dict[str, tuple[list[int], int, bool]] = {
            name: (shape, kind, is_input) for name, shape, kind, is_input in plan["tensors"]
        }
        self.num_io_tensors = len(self.tensors)

    def create_engine_inspector(self) -> Any:
        text = json.dumps(_inspection(self.plan["layers"]))
        return SimpleNamespace(get_engine_information=lambda layout: text)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if self.tensors[name][2] else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name][0])

    def get_tensor_dtype(self, name: str) -> Any:
        return DataType.FLOAT if self.tensors[name][1] == 1 else DataType.INT64

    def create_execution_context(self) -> _Context:
        return _Context(self)


class _Context:
    """Writes the sum of the first input into the first element of each output, on the CPU."""

    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def _floats(self, name: str) -> Any:
        shape = self.engine.get_tensor_shape(name)
        count = 1
        for size in shape:
            count *= size
        return (ctypes.c_float * count).from_address(self.addresses[name])

    def execute_async_v3(self, stream: int) -> bool:
        sparse = int(BuilderFlag.SPARSE_WEIGHTS) in self.engine.plan["flags"]
        slow = os.environ.get("TENSORRT_DOUBLE_SLOW", "plain")
        CLOCK_NS[0] += 4_000_000 if sparse == (slow == "sparse") else 1_000_000
        names = list(self.engine.tensors)
        first = next(name for name in names if self.engine.tensors[name][2])
        total = sum(self._floats(first))
        for name in names:
            if not self.engine.tensors[name][2]:
                self._floats(name)[0] = total
        return True


def _inspection(layers: list[list[str]]) -> dict[str, Any]:
    """The inspector's JSON, in the layout of the version played."""

    def tensor(name: str) -> dict[str, Any]:
        if PLAYS == 10:
            return {"Name": name, "Dimensions": [1], "Format/Datatype": "Row major linear FP16 format"}
        return {"Name": name, "Dimensions": [1], "Format": "Row major linear", "Datatype": "Half"}

    rows = [
        {
            "Name": name,
            "LayerType": "CaskConvolution" if op == "Conv" else "PointWise",
            "Inputs": [tensor("a")],
            "Outputs": [tensor("b")],
            "TacticName": "sm80_xmma_fprop_sparse_conv" if op == "Conv" else "generated",
            "HasSparseWeights": int(op == "Conv"),
            "Metadata": f"[ONNX Layer: {name}]",
        }
        for name, op in layers
    ]
    return {"Layers": rows} | ({"Bindings": ["a"]} if PLAYS == 10 else {"I/O Tensors": [tensor("a")]})
