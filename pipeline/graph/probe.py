"""A quick ONNX of a torch model, for the latency after each stage; the released file comes from `export/`."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fusepress.pipeline.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor, nn

OPSET = 18


def probe_onnx(
    model: nn.Module, example_inputs: Mapping[str, Tensor], output_names: Sequence[str], *, opset: int = OPSET
) -> bytes:
    """Export a model for one sample, weights inside the file.

    Args:
        model: any state; it is left as it was.
        example_inputs: inputs by name, batch first; the first sample is used, so the batch is 1.
        output_names: names of the graph's outputs, in the model's order.
        opset: ONNX operator set.

    Returns:
        The serialised ONNX model.

    Raises:
        ExportError: the exporter does not know how to write the model.
    """
    import torch

    frozen = copy.deepcopy(model).cpu().eval()
    inputs = {name: value[:1].detach().cpu().clone() for name, value in example_inputs.items()}
    with tempfile.TemporaryDirectory() as folder, _silence():
        path = Path(folder) / "probe.onnx"
        try:
            torch.onnx.export(
                frozen,
                (),
                path,
                kwargs=inputs,
                input_names=list(inputs),
                output_names=list(output_names),
                opset_version=opset,
                dynamo=True,
                external_data=False,
                optimize=True,
                verbose=False,
            )
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0][:300]
            raise ExportError(
                f"expected a model that torch.onnx can export; got {type(error).__name__}: {first} "
                f"at {type(model).__name__}; replace what it names by exportable operations"
            ) from error
        return path.read_bytes()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporter prints progress and warns of its own internals."""
    names = ("torch.onnx", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
