"""Run a TensorRT engine on this machine's GPU, by the names of its inputs and outputs. Not executed by us.

The interface is that of OnnxSession, so that one metric code judges both. Memory is torch's. Source: TensorRT 10 and 11
Python API (`execute_async_v3`); tried on a test double, with CPU memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusepress.pipeline.errors import BuildError

if TYPE_CHECKING:
    from torch import Tensor

_TYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


class EngineSession:
    """An engine as a `predict` callable: `session(inputs) -> outputs`, sample by sample where its batch is 1.

    Args:
        path: the plan.
        runtime: the library that built it.
        device: torch's name of the GPU.

    Raises:
        BuildError: the library cannot load the plan here.
    """

    def __init__(self, path: Path, runtime: str = "tensorrt", device: str = "cuda") -> None:
        import torch

        trt = importlib.import_module(runtime)
        self._logger = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._logger)  # must outlive the engine
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise BuildError(
                f"expected an engine that this GPU and {runtime} {trt.__version__} can load; got another at {path}; "
                "build it here"
            )
        self._context = self._engine.create_execution_context()
        self._device = device
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        fed = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        shapes = {name: tuple(self._engine.get_tensor_shape(name)) for name in names}
        self.inputs = {name: shapes[name] for name in names if fed[name]}
        self.outputs = {name: shapes[name] for name in names if not fed[name]}
        self._buffers: dict[str, Tensor] = {}
        for name in names:
            kind = str(self._engine.get_tensor_dtype(name)).rpartition(".")[2]
            self._buffers[name] = torch.zeros(shapes[name], dtype=getattr(torch, _TYPES[kind]), device=device)
            self._context.set_tensor_address(name, self._buffers[name].data_ptr())
        self._stream = torch.cuda.Stream() if device.startswith("cuda") else None

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name for N samples, on the CPU.

        Raises:
            BuildError: an input is missing or has another shape, or the engine fails.
        """
        import torch

        samples = next(iter(inputs.values())).shape[0]
        parts = []
        for index in range(samples):
            self._feed({name: value[index : index + 1] for name, value in inputs.items()})
            self._run()
            parts.append({name: self._buffers[name].detach().cpu().clone() for name in self.outputs})
        return {name: torch.cat([part[name] for part in parts]) for name in self.outputs}

    def timed_callable(self, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
        """One inference of the first sample, without copies to and from the host."""
        self._feed({name: value[:1] for name, value in inputs.items()})
        return self._run

    def _feed(self, sample: Mapping[str, Tensor]) -> None:
        for name, shape in self.inputs.items():
            got = tuple(sample[name].shape) if name in sample else None
            if got != shape:
                raise BuildError(
                    f"expected the engine's input {name!r} of shape {shape}; got {got}; feed what it was built for"
                )
            self._buffers[name].copy_(sample[name])

    def _run(self) -> None:
        import torch

        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        done: Any = self._context.execute_async_v3(self._stream.cuda_stream if self._stream is not None else 0)
        if self._stream is not None:
            self._stream.synchronize()
        if not done:
            raise BuildError("expected the engine to run; got a failure; see what TensorRT wrote to standard error")
