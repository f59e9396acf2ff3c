"""Graph clean-up of an ONNX file, with a check that it still computes the same."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fusepress.export.onnx import ExportInfo, load_onnx, save_onnx
from fusepress.export.parity import check_parity, require_parity
from fusepress.export.runtime import OnnxSession
from fusepress.pipeline.errors import ExportError
from fusepress.pipeline.task import Batch

SLIM_TOLERANCE = 1e-5  # float32: folding constants and merging operators changes the order of sums only
# torch's exporter has folded what is worth folding; folding more would write the zeros of a BEV canvas into the file
FOLD_LIMIT_BYTES = 1024
# MatMul + Add on 3-D input would become Reshape, Gemm, Reshape
SKIPPED_FUSIONS = ["FusionGemm"]


def slim(
    path_in: Path, path_out: Path, batches: Iterable[Batch] | None = None, *, max_rel: float = SLIM_TOLERANCE
) -> ExportInfo:
    """Simplify a model with onnxslim, check it against the original and write it.

    Args:
        path_in: an ONNX file without Q/DQ.
        path_out: where the simpler model goes; written only when it passed.
        batches: what both models are run on; None takes made-up inputs (noise; zeros for indices).
        max_rel: largest allowed difference, relative to each output's scale.

    Raises:
        ExportError: onnxslim fails, changes names or shapes, or changes what is computed.
    """
    import onnxslim

    proto = load_onnx(path_in)
    names = [[v.name for v in values] for values in (proto.graph.input, proto.graph.output)]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            slimmed = onnxslim.slim(
                type(proto).FromString(proto.SerializeToString()),
                size_threshold=FOLD_LIMIT_BYTES,
                skip_fusion_patterns=SKIPPED_FUSIONS,
            )
    except Exception as error:  # a third party's pass may raise anything
        raise ExportError(
            f"expected onnxslim to simplify the model; got {type(error).__name__}: {error} at {path_in}; "
            "report it with the model"
        ) from error
    if slimmed is None or [[v.name for v in values] for values in (slimmed.graph.input, slimmed.graph.output)] != names:
        raise ExportError(f"expected the same inputs and outputs after onnxslim; got others at {path_in}; report it")
    candidate = path_out.with_name(f".{path_out.name}.candidate")
    try:
        save_onnx(slimmed, candidate)
        before, after = OnnxSession(path_in, 1), OnnxSession(candidate, 1)
        parity = check_parity(before, after, batches if batches is not None else [made_up_batch(before)])
        require_parity(parity, max_rel, what="the simplified model")
        return save_onnx(slimmed, path_out)
    finally:
        candidate.unlink(missing_ok=True)


def made_up_batch(session: OnnxSession, seed: int = 0) -> Batch:
    """One sample of the graph's own shapes: noise, and zeros for indices."""
    import torch

    noise = np.random.default_rng(seed)
    inputs = {}
    for name, shape in session.inputs.items():
        dtype = session.dtype(name)
        floating = np.issubdtype(dtype, np.floating)
        array = noise.standard_normal(shape).astype(dtype) if floating else np.zeros(shape, dtype)
        inputs[name] = torch.from_numpy(array)
    return Batch(inputs=inputs, sample_ids=["made-up input"])
