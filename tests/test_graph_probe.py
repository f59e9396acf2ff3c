"""The quick ONNX that latencies are predicted from."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from fusepress.pipeline.errors import ExportError
from fusepress.pipeline.graph.probe import probe_onnx
from tests import graph_models as zoo


def test_the_probe_computes_what_the_model_does_for_one_sample() -> None:
    model = zoo.settled(zoo.Stranger(shared=True))
    model.train()
    inputs = zoo.stranger_inputs()
    raw = probe_onnx(model, inputs, ["classes"])
    assert model.training
    onnx.checker.check_model(onnx.load_from_string(raw), full_check=True)
    session = onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["left", "right", "scan"]
    assert [i.shape[0] for i in session.get_inputs()] == [1, 1, 1]
    one = {name: value[:1] for name, value in inputs.items()}
    (got,) = session.run(["classes"], {name: value.numpy() for name, value in one.items()})
    with torch.no_grad():
        expected = model.eval()(**one)["classes"].numpy()
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_model_that_cannot_be_exported_is_a_clear_error() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if float(x.sum()) > 0 else x

    with pytest.raises(ExportError, match=r"expected a model that torch\.onnx can export; got .* at Branching"):
        probe_onnx(Branching(), {"x": zoo.image()}, ["y"])
