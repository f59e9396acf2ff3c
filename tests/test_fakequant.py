"""Fake quantisation (pipeline/graph/fakequant.py) against ONNX Runtime and closed forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fusepress.calib.qat import TrainedScales, placement_of, with_trained_scales
from fusepress.calib.qdq import QdqGraph
from fusepress.calib.quantize import Draft, draft_qdq
from fusepress.export.onnx import export_onnx
from fusepress.export.runtime import OnnxSession
from fusepress.pipeline.errors import QuantizeError
from fusepress.pipeline.graph.fakequant import NAME, fake_quantise, fake_quantised, weight_step
from fusepress.pipeline.graph.placement import GRID_MAX, Grid, Placement, QuantisedInput, QuantisedNode
from tests.export_toys import inputs, two_branch

Array = np.ndarray[Any, Any]
KINDS = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}


def onnx_round_trip(x: Array, step: Array, grid: Grid, axis: int | None = None) -> Array:
    """A QuantizeLinear and the DequantizeLinear behind it, by ONNX Runtime without optimisations."""
    zero = helper.make_tensor("zero", KINDS[grid], step.shape, b"\0" * step.size, raw=True)
    options: dict[str, Any] = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"], **options),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["y"], **options),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "step", "y")]
    graph = helper.make_graph(nodes, "g", values[:2], values[2:], [zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    plain = onnxruntime.SessionOptions()
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), plain, providers=["CPUExecutionProvider"])
    made: Array = session.run(None, {"x": x, "step": step})[0]
    return made


@pytest.mark.parametrize("grid", ["int8", "fp8"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-12, 8))
def test_a_tensor_is_rounded_as_onnx_rounds_it_bit_for_bit(grid: Grid, seed: int, exponent: int) -> None:
    random = np.random.default_rng(seed)
    step = np.float32(random.uniform(0.5, 1.0) * 2.0**exponent)
    halves = (random.integers(-300, 300, size=200) + 0.5).astype("f4") * step  # ties, and beyond both ends
    wide = random.normal(size=400).astype("f4") * step * np.float32(200)
    x = np.concatenate([halves, wide, np.array([0, -0.0, 127, 128, -128, -129, 448, -464], "f4") * step])
    made = fake_quantise(torch.from_numpy(x), torch.tensor(step), grid).numpy()
    np.testing.assert_array_equal(made, onnx_round_trip(x, np.asarray(step), grid))


@pytest.mark.parametrize("grid", ["int8", "fp8"])
def test_weights_are_rounded_as_onnx_rounds_them_by_channel(grid: Grid) -> None:
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[2] = 0  # a channel that is switched off
    step = weight_step(weight, grid, 0)
    made = fake_quantise(weight, step, grid)
    np.testing.assert_array_equal(made, onnx_round_trip(weight.numpy(), step.reshape(-1).numpy(), grid, axis=0))
    assert (made[2] == 0).all()
    peak = made.abs().amax((1, 2, 3)) / weight.abs().amax((1, 2, 3))
    torch.testing.assert_close(peak[[0, 1, 3, 4, 5]], torch.ones(5))  # the largest just does not saturate
    assert float(weight_step(weight, grid, None)) == float(weight.abs().max() / GRID_MAX[grid])


def test_the_gradient_passes_where_nothing_saturates_and_the_step_learns_by_lsq() -> None:
    """Equation 3 of LSQ, and its scale, written out."""
    step = torch.tensor(0.5, requires_grad=True)
    x = torch.tensor([-100.0, -64.0, -0.3, 0.0, 0.26, 63.7, 64.0, 90.0], requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    fake_quantise(x, step).backward(upstream)
    inside = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    assert x.grad is not None
    assert step.grad is not None
    torch.testing.assert_close(x.grad, upstream * inside)
    by_step = [-128.0, 0.0, -1 + 0.6, 0.0, 1 - 0.52, 127 - 127.4, 127.0, 127.0]
    expected = (upstream * torch.tensor(by_step)).sum() / (8 * 127) ** 0.5
    torch.testing.assert_close(step.grad, expected)


def test_the_step_in_fp8_learns_from_the_same_rounding_error() -> None:
    step = torch.tensor(1.0, requires_grad=True)
    x = torch.tensor([1.05, 500.0], requires_grad=True)
    fake_quantise(x, step, "fp8").sum().backward()
    assert x.grad is not None
    assert step.grad is not None
    assert x.grad.tolist() == [1.0, 0.0]
    torch.testing.assert_close(step.grad, torch.tensor((1.0 - 1.05 + 448.0) / (2 * 127) ** 0.5))


def test_a_relu_in_front_of_fp8_stays(tmp_path: Path) -> None:
    """ONNX Runtime's rewrite for INT8 that saturates at 0 takes it away where FP8's zero point is 0."""
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    step = helper.make_tensor("step", TensorProto.FLOAT, [], [0.01])
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "step", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [zero, step])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    (tmp_path / "relu.onnx").write_bytes(model.SerializeToString())
    found = OnnxSession(tmp_path / "relu.onnx", 1).run_numpy({"x": np.array([[-1.0, -0.5, 0.5]], np.float32)})
    np.testing.assert_allclose(found["y"], [[0.0, 0.0, 0.48]], rtol=1e-6)


def test_a_method_for_even_steps_is_refused_in_fp8(tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="expected ranges by one of max, percentile in FP8; got mse, which counts"):
        draft_qdq(tmp_path / "none.onnx", {}, precision="fp8", method="mse")


# --- a whole model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fakequant")


def drafted(folder: Path, model: nn.Module, example: dict[str, Tensor], names: list[str], grid: Grid) -> Draft:
    export_onnx(model, example, names, folder / "model.onnx", opset=18)
    data = {name: value.numpy() for name, value in example.items()}
    return draft_qdq(folder / "model.onnx", data, precision=grid)


@pytest.fixture(scope="module")
def drafts(folder: Path) -> dict[Grid, Draft]:
    """Of the network with every awkward operator."""
    grids: tuple[Grid, ...] = ("int8", "fp8")
    return {grid: drafted(folder, two_branch(), inputs(4), ["seg", "cls"], grid) for grid in grids}


def single(example: dict[str, Tensor], count: int = 2) -> list[dict[str, Tensor]]:
    return [{name: value[i : i + 1] for name, value in example.items()} for i in range(count)]


@pytest.mark.parametrize("grid", ["int8", "fp8"])
def test_the_model_computes_what_the_file_computes(folder: Path, drafts: dict[Grid, Draft], grid: Grid) -> None:
    """Convolutions with and without a folded norm, depthwise, on 3-D input, a residual, a concatenation."""
    model, example = two_branch(), inputs(4)
    with torch.no_grad():
        floating = model(**example)
    draft = drafts[grid]
    expected = OnnxSession(draft.write(folder / "qdq.onnx"), 1)(example)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with fake_quantised(model, placement_of(draft, 2), single(example)) as quantised, torch.no_grad():
        found = model(**example)
        assert NAME in model.state_dict()
    assert quantised.lost == {}
    assert {"fuse/Conv", "Add", "pillar2/MatMul"} <= set(quantised.followed)
    for name, value in expected.items():
        noise = float((value - floating[name]).abs().max())
        assert float((value - found[name]).abs().max()) < 1e-3 * noise, name  # rounding ties may fall otherwise
    with torch.no_grad():
        again = model(**example)
    assert all(torch.equal(again[name], floating[name]) for name in floating)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_folded_norm_is_trained_through_and_keeps_its_statistics(drafts: dict[Grid, Draft]) -> None:
    model, example = two_branch(), inputs(4)
    draft = drafts["int8"]
    norm = model.camera[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    mean = norm.running_mean.clone()
    with fake_quantised(model, placement_of(draft, 2), single(example), learn=True) as quantised:
        model.train()  # a training loop that does not freeze norms changes no statistics either
        model(**example)["seg"].square().mean().backward()
        steps = model.get_parameter(NAME)
        assert steps.grad is not None
        assert (steps.grad != 0).sum() > 3
        for name in ("camera.1.weight", "camera.1.bias", "camera.0.weight", "pillar2.weight"):
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            assert gradient.abs().max() > 0, name
        with torch.no_grad():
            steps.add_(1)  # twice the step
        told = quantised.steps()
    assert torch.equal(norm.running_mean, mean)
    scale = {tensor: 2 * step for tensor, step in zip(draft.ranges.tensors, _scales(draft), strict=True)}
    assert told == pytest.approx(scale, rel=1e-5)
    assert not hasattr(model, NAME)


def _scales(draft: Draft) -> list[float]:
    return [QdqGraph(draft.proto).scale(tensor) for tensor in draft.ranges.tensors]


class Reused(nn.Module):
    """A convolution that is called twice, a functional one, and sums in the model's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(16, 16, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(16, 16, 1, 1) / 4)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        once = F.relu(self.shared(x)) + x
        twice = F.relu(self.shared(once)) + once
        mixed = F.conv2d(input=twice, weight=self.weight, bias=None)
        tokens = mixed.flatten(2).transpose(1, 2)
        attended: Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return tokens + attended


def test_what_cannot_be_followed_is_named_and_the_rest_is_quantised(folder: Path) -> None:
    torch.manual_seed(0)
    model, example = Reused().eval(), {"x": torch.randn(3, 16, 6, 6)}
    draft = drafted(folder, model, example, ["output"], "int8")
    placement = placement_of(draft, 2)
    convolutions = [node.name for node in placement.nodes if node.operator == "Conv"]
    assert len(convolutions) == 3
    with fake_quantised(model, placement, single(example)) as quantised, torch.no_grad():
        found = model(**example)
    assert set(convolutions) <= set(quantised.followed)
    inner = {node.name for node in placement.nodes if node.operator in ("MatMul", "Gemm")}
    assert set(quantised.lost) == inner != set()  # torch's attention computes them all in one call
    assert all(why == "no call of torch has its weights and magnitudes" for why in quantised.lost.values())
    assert quantised.lost.keys() <= draft.units().keys()
    expected = OnnxSession(draft.write(folder / "reused.onnx", list(quantised.lost)), 1)
    torch.testing.assert_close(found, expected(example)["output"], rtol=0, atol=1e-5)


def test_other_weights_or_other_samples_are_not_taken_for_the_files(drafts: dict[Grid, Draft]) -> None:
    model, example = two_branch(), inputs(4)
    placement = placement_of(drafts["int8"], 2)
    with fake_quantised(model, placement, single(inputs(4, seed=5))) as quantised:
        assert "fuse/Conv" in quantised.lost
    with torch.no_grad():
        model.fuse.weight[0, 0, 0, 0] += 1
    with fake_quantised(model, placement, single(example)) as quantised:
        assert "fuse/Conv" in quantised.lost
        assert "lidar.0/Conv" in quantised.followed


def test_nodes_without_a_counterpart_are_told() -> None:
    node = QuantisedNode(
        name="a/Sin", operator="Sin", inputs=(QuantisedInput(index=0, group=0, amax=np.ones(1)),), weight=None
    )
    placement = Placement(grid="int8", nodes=(node,), groups=(("t",),), steps=np.array([0.1], np.float32))
    with fake_quantised(nn.Linear(2, 2), placement, [{"input": torch.ones(1, 2)}]) as quantised:
        assert quantised.lost == {"a/Sin": "Sin has no counterpart that is followed"}
        assert quantised.steps() == {"t": pytest.approx(0.1)}


class InPlace(nn.Module):
    """A sum that only its first operand tells of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.first(x)
        total.add_(self.second(x))
        return total


def test_a_sum_in_place_stays_in_place() -> None:
    torch.manual_seed(0)
    model, x = InPlace(), torch.randn(1, 3)
    sides = [model.first(x).detach(), model.second(x).detach()]
    operands = [QuantisedInput(index=i, group=i, amax=side.abs().max().numpy()[None]) for i, side in enumerate(sides)]
    node = QuantisedNode(name="Add", operator="Add", inputs=tuple(operands), weight=None)
    placement = Placement(grid="int8", nodes=(node,), groups=(("a",), ("b",)), steps=np.array([0.5, 0.25], np.float32))
    expected = fake_quantise(sides[0], torch.tensor(0.5)) + fake_quantise(sides[1], torch.tensor(0.25))
    with fake_quantised(model, placement, [{"x": x}], learn=True) as quantised:
        assert quantised.followed == ("Add",)
        found = model(x)
        assert torch.equal(found, expected)
        found.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Checkpointed(nn.Module):
    """A stem, then one block twice, whose activations are computed again in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.stem = nn.Conv2d(16, 16, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())

    def _region(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x) + x
        return y

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            if self.reentrant is None or not torch.is_grad_enabled():
                x = self._region(x)
            else:
                x = checkpoint(self._region, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_those_of_the_quantised_model_where_activations_are_checkpointed(
    folder: Path, reentrant: bool
) -> None:
    example = {"x": torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(2))}
    torch.manual_seed(1)
    plain, saving = Checkpointed(None).eval(), Checkpointed(reentrant).eval()
    saving.load_state_dict(plain.state_dict())
    placement = placement_of(drafted(folder, plain, example, ["output"], "int8"), 2)
    gradients = []
    for model in (plain, saving):
        with fake_quantised(model, placement, single(example), learn=True) as quantised:
            assert quantised.lost == {}
            model(**example).square().sum().backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert {"stem.weight", "block.0.weight", "block.1.bias", NAME} <= gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name
    # afterwards checkpointing is what it was
    runs = []
    saving.block.register_forward_pre_hook(lambda *_: runs.append(1))
    saving(**example).sum().backward()
    assert len(runs) == 4


# --- scales that come back --------------------------------------------------------------------------------------------


def test_scales_return_to_the_file_bit_for_bit(folder: Path, drafts: dict[Grid, Draft]) -> None:
    draft = drafts["int8"]
    with fake_quantised(two_branch(), placement_of(draft, 2), single(inputs(4))) as quantised:
        scales = quantised.steps()
    trained = TrainedScales(precision="int8", method="max, trained under", scales=scales)
    trained.write(folder / "scales.json")
    back, without = with_trained_scales(draft, TrainedScales.read(folder / "scales.json"))
    assert without == []
    assert back.proto.SerializeToString() == draft.proto.SerializeToString()
    assert back.method == "max, trained under"
    tensor = draft.ranges.tensors[0]
    fewer = TrainedScales(precision="int8", method="", scales={k: v for k, v in scales.items() if k != tensor})
    assert with_trained_scales(draft, fewer)[1] == [tensor]


def test_scales_of_another_precision_or_file_are_refused(folder: Path, drafts: dict[Grid, Draft]) -> None:
    draft = drafts["int8"]
    with pytest.raises(
        QuantizeError, match=r"expected scales of a training in int8; got fp8 at .*model\.onnx; run compress with"
    ):
        with_trained_scales(draft, TrainedScales(precision="fp8", method="", scales={}))
    (folder / "broken.json").write_text("{}")
    with pytest.raises(QuantizeError, match="expected the scales of the qat stage; got KeyError"):
        TrainedScales.read(folder / "broken.json")


def test_fp8_fills_its_range(drafts: dict[Grid, Draft]) -> None:
    """The largest magnitude of every tensor, and of every weight's channel, becomes E4M3's largest number."""
    draft = drafts["fp8"]
    limits = draft.ranges.limits("max")
    alone = [group for group in placement_of(draft, 1).groups if len(group) == 1]
    graph = QdqGraph(draft.proto)
    for (tensor,) in alone:
        assert graph.scale(tensor) == pytest.approx(limits[tensor] / 448, rel=1e-6)
    weight = graph.constant("fuse.weight")
    np.testing.assert_allclose(graph.constant("fuse.weight_scale"), np.abs(weight).max((1, 2, 3)) / 448, rtol=1e-6)
