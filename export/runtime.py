"""Run an ONNX file on ONNX Runtime's CPU provider, by the names of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fusepress.pipeline.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor

Array = np.ndarray[Any, Any]
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
# takes a Relu in front of an FP8 QuantizeLinear away, as if negative numbers saturated at 0 there (seen in 1.31.1)
WRONG_REWRITES = ["ReluQuantRewrite"]


class OnnxSession:
    """An ONNX model as a `predict` callable: `session(inputs) -> outputs`, tensors by name, any number of samples.

    A batch is run sample by sample where the graph has batch 1, which is how a target runs it.

    Args:
        path: the ONNX file.
        threads: threads within an operator; None leaves it to ONNX Runtime (all cores).
        integer_kernels: let ONNX Runtime fuse Q/DQ into its own integer kernels, which is what a CPU target runs.
            Off (default), Q/DQ is computed as written, in floating point: the integers of TensorRT's kernels, and the
            same numbers on every CPU. (Integer kernels saturate on CPUs without VNNI.)
        profile: beginning of the path of a profile of every node, which `end_profile` finishes; slows the session down.

    Raises:
        ExportError: the file is missing, or ONNX Runtime refuses it.
    """

    PROVIDER: ClassVar[str] = "CPUExecutionProvider"

    def __init__(
        self, path: Path, threads: int | None = None, *, integer_kernels: bool = False, profile: Path | None = None
    ) -> None:
        import onnxruntime

        if not Path(path).is_file():
            raise ExportError(f"expected an ONNX file; got none at {path}; correct the path")
        onnxruntime.set_default_logger_severity(4)
        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.inter_op_num_threads = 1
        if threads is not None:
            options.intra_op_num_threads = threads
        # two sessions are timed in turns, and one's idle threads must not spin while the other works
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.disable_quant_qdq", "0" if integer_kernels else "1")
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=[self.PROVIDER], disabled_optimizers=WRONG_REWRITES
            )
        except Exception as error:  # its binding raises a dozen kinds that share no public base
            kind = self.PROVIDER.removesuffix("ExecutionProvider")
            raise ExportError(
                f"expected a model that ONNX Runtime's {kind} provider can run; got {_short(error)} at {path}; "
                "take another precision for this operator, or report it with the model"
            ) from error
        self.path = Path(path)
        self.inputs: dict[str, tuple[int, ...]] = {v.name: tuple(v.shape) for v in self._session.get_inputs()}
        self.outputs: dict[str, tuple[int, ...]] = {v.name: tuple(v.shape) for v in self._session.get_outputs()}
        self._dtypes = {v.name: v.type for v in self._session.get_inputs()}

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name for N samples; inputs that the graph does not use are left out.

        Raises:
            ExportError: an input is missing, or has another shape or kind of number.
        """
        import torch

        arrays = {name: value.detach().cpu().contiguous().numpy() for name, value in inputs.items()}
        return {name: torch.from_numpy(value) for name, value in self.run_numpy(arrays).items()}

    def run_numpy(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """As calling, with numpy arrays.

        Raises:
            ExportError: an input is missing, or has another shape or kind of number.
        """
        parts = [self._run(feed) for feed in self._samples(feeds)]
        return {
            name: np.concatenate([part[i] for part in parts]) if len(parts) > 1 else parts[0][i]
            for i, name in enumerate(self.outputs)
        }

    def dtype(self, name: str) -> np.dtype[Any]:
        """The kind of number of a graph input."""
        return np.dtype(_DTYPES[self._dtypes[name]])

    def timed_callable(self, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
        """One inference of the first sample as a callable without conversions, for latency measurement."""
        arrays = {name: value[:1].detach().cpu().contiguous().numpy() for name, value in inputs.items()}
        feed = self._samples(arrays)[0]
        session, names = self._session, list(self.outputs)
        return lambda: session.run(names, feed)

    def end_profile(self) -> Path:
        """The profile that was asked for, as JSON in Chrome's format of traces."""
        return Path(self._session.end_profiling())

    def _run(self, feed: dict[str, Array]) -> list[Array]:
        try:
            results: list[Array] = self._session.run(list(self.outputs), feed)
        except Exception as error:  # see above
            raise ExportError(
                f"expected ONNX Runtime to run the model; got {_short(error)} at {self.path}; check index inputs "
                "against the sizes that they index"
            ) from error
        return results

    def _samples(self, feeds: Mapping[str, Array]) -> list[dict[str, Array]]:
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise ExportError(
                f"expected the inputs {list(self.inputs)}; got {list(feeds)}, without {missing}, at {self.path.name}; "
                "name the inputs as the task's batches do"
            )
        checked = {name: self._checked(name, np.asarray(feeds[name])) for name in self.inputs}
        sizes = {value.shape[0] for value in checked.values()}
        if len(sizes) != 1:
            shapes = {name: value.shape for name, value in checked.items()}
            raise ExportError(f"expected one batch size; got {shapes} at {self.path.name}; put the batch first")
        if next(iter(self.inputs.values()))[0] != 1:
            return [checked]
        return [
            {name: np.ascontiguousarray(v[i : i + 1]) for name, v in checked.items()} for i in range(next(iter(sizes)))
        ]

    def _checked(self, name: str, value: Array) -> Array:
        want = self.inputs[name]
        fits = value.ndim == len(want) and all(
            have == size or not isinstance(size, int) for have, size in zip(value.shape[1:], want[1:], strict=True)
        )
        if not fits or not (want[0] == 1 or not isinstance(want[0], int) or value.shape[0] == want[0]):
            raise ExportError(
                f"expected input {name!r} of shape (N, {', '.join(map(str, want[1:]))}); got {value.shape} at "
                f"{self.path.name}; feed the sizes that the model was exported with"
            )
        dtype = np.dtype(_DTYPES.get(self._dtypes[name], value.dtype))
        if dtype.kind != value.dtype.kind and not (dtype.kind in "iu" and value.dtype.kind in "iu"):
            raise ExportError(
                f"expected input {name!r} of type {dtype}; got {value.dtype} at {self.path.name}; convert it"
            )
        return value.astype(dtype, copy=False)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
