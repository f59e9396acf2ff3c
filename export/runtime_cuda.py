"""Run an ONNX file on ONNX Runtime's CUDA provider, to measure it. Not executed by us: no machine of ours has a GPU.

What was tried is the same code with its memory on the CPU, and the refusal where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fusepress.export.runtime import OnnxSession
from fusepress.pipeline.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor


class CudaSession(OnnxSession):
    """An ONNX model on the GPU of this machine; operators that the provider lacks run on the CPU.

    Args:
        path: the ONNX file.

    Raises:
        ExportError: the file is missing, ONNX Runtime refuses it, or its CUDA provider does not load here.
    """

    PROVIDER: ClassVar[str] = "CUDAExecutionProvider"
    MEMORY: ClassVar[str] = "cuda"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        loaded = self._session.get_providers()
        if self.PROVIDER not in loaded:  # it falls back without a word
            raise ExportError(
                f"expected ONNX Runtime's {self.PROVIDER}; got {', '.join(loaded)} alone; measure where `nvidia-smi` "
                "names a GPU, with the CUDA and cuDNN libraries that onnxruntime-gpu asks for, or take --runtime cpu"
            )

    def timed_callable(self, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
        """One inference of the first sample, without copies to and from the host; it ends when the GPU has."""
        import onnxruntime

        arrays = {name: value[:1].detach().cpu().contiguous().numpy() for name, value in inputs.items()}
        binding = self._session.io_binding()
        for name, array in self._samples(arrays)[0].items():
            there = onnxruntime.OrtValue.ortvalue_from_numpy(array, self.MEMORY, 0)
            binding.bind_ortvalue_input(name, there)
        for name in self.outputs:
            binding.bind_output(name, self.MEMORY, 0)
        session = self._session

        def run() -> None:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return run
