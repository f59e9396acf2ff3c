"""Masking a modality, and a model that comes back as it was."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fusepress.pipeline.errors import TaskError
from fusepress.pipeline.scoring.masking import (
    branch_of_parameters,
    check_masked_gradients,
    masked,
    masking_equals_zeroing,
    untouched,
    zeros_like_output,
)
from tests.scoring_toys import ConvToy, state_bytes


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_masked_modality_does_not_reach_the_output() -> None:
    toy = ConvToy()
    model = toy.model.eval()
    inputs = toy.task.user.data[0].inputs
    other = {**inputs, "lidar": torch.randn_like(inputs["lidar"])}
    with masked(model, ["lidar"], "lidar"):
        first, second = model(**inputs)["map"], model(**other)["map"]
    assert torch.equal(first, second)
    assert not torch.equal(model(**inputs)["map"], model(**other)["map"])  # unmasked it does
    alone = model.head(torch.relu(model.fuse(model.get_submodule("camera")(inputs["camera"]))))
    assert torch.equal(first, alone)  # the features were added, so zeros leave the camera alone


def test_a_masked_modality_gets_no_gradient() -> None:
    toy = ConvToy()
    model = toy.model.eval()
    with masked(model, ["lidar"], "lidar"):
        model(**toy.task.user.data[0].inputs)["map"].square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is None or not g.any() for name, g in gradients.items() if name.startswith("lidar."))
    for name, gradient in gradients.items():
        assert name.startswith("lidar.") or (gradient is not None and bool(gradient.any())), name
    check_masked_gradients(model, branch_of_parameters(model, toy.task.branches), "lidar")


def test_the_mask_ends_with_its_context_even_after_an_error() -> None:
    toy = ConvToy()
    model = toy.model.eval()
    inputs = toy.task.user.data[0].inputs
    expected = model(**inputs)["map"]
    with pytest.raises(RuntimeError, match="boom"), masked(model, ["lidar"], "lidar"):
        raise RuntimeError("boom")
    assert torch.equal(model(**inputs)["map"], expected)


def test_masking_equals_zeroing_all_parameters_where_they_make_a_zero_map() -> None:
    toy = ConvToy()
    before = state_bytes(toy.model.eval())
    for modality in toy.modalities:
        assert masking_equals_zeroing(toy.model, toy.task.user.data[0].inputs, toy.task.branches, modality)
    assert state_bytes(toy.model) == before


def test_masking_differs_from_zeroing_behind_a_sigmoid() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lidar = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid())
            self.head = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Any:
            out: Tensor = self.head(self.lidar(x))
            return [out]

    model = Gated().eval()
    assert not masking_equals_zeroing(model, {"x": torch.randn(2, 2)}, {"lidar": ["lidar"]}, "lidar")


class Pair(NamedTuple):
    feature: Tensor
    indices: Tensor


@dataclass
class Voxels:
    features: Tensor
    shape: tuple[int, int] = (4, 4)


class Sparse:
    """Looks like a sparse convolution tensor."""

    def __init__(self, features: Tensor) -> None:
        self.features = features

    def replace_feature(self, features: Tensor) -> Sparse:
        return Sparse(features)


def test_every_kind_of_output_becomes_zero_and_indices_stay() -> None:
    ones, index = torch.ones(2, 3), torch.tensor([3, 4])
    nested = {"a": [ones, (ones, None)], "b": OrderedDict(i=index, f=Pair(ones, index)), "v": Voxels(ones), "n": 3}
    result = zeros_like_output(nested)
    assert not result["a"][0].any()
    assert not result["a"][1][0].any()
    assert result["a"][1][1] is None
    assert isinstance(result["b"], OrderedDict)
    assert isinstance(result["b"]["f"], Pair)
    assert not result["b"]["f"].feature.any()
    assert torch.equal(result["b"]["i"], index)
    assert torch.equal(result["b"]["f"].indices, index)
    assert not result["v"].features.any()
    assert result["v"].shape == (4, 4)
    assert result["n"] == 3
    assert not zeros_like_output(Sparse(ones)).features.any()
    assert bool(ones.all())  # the original is not written to


def test_a_nan_in_a_masked_branch_does_not_get_through() -> None:
    assert torch.equal(zeros_like_output(torch.full((3,), float("nan"))), torch.zeros(3))


def test_an_output_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(TaskError, match=r"expected branch 'x' to return tensors.*got set; name modules"):
        zeros_like_output({1, 2}, where="branch 'x'")


class Bypass(nn.Module):
    """Calls the inner module of a branch itself, and a list of stages one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.camera = nn.ModuleDict({"body": nn.Linear(2, 2)})
        self.lidar = nn.Sequential(nn.Linear(2, 2))
        self.stages = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = x + stage(x)
        out: Tensor = self.camera["body"](x) + self.lidar[0](x)
        return out


def test_a_branch_that_forward_never_calls_is_named() -> None:
    model = Bypass()
    with (
        pytest.raises(TaskError, match=r"to call a module of branches\['lidar'\]; got no call of \['lidar'\]; list"),
        masked(model, ["lidar"], "lidar"),
    ):
        model(torch.ones(1, 2))


def test_a_container_stands_for_the_modules_in_it() -> None:
    model = Bypass()
    with masked(model, ["camera"], "camera"):
        assert torch.equal(model(torch.ones(1, 2)), model.lidar(model.stages[1](x := _stage(model)) + x))
    with masked(model, ["stages"], "stages"):
        expected = model.camera["body"](torch.ones(1, 2)) + model.lidar(torch.ones(1, 2))
        assert torch.equal(model(torch.ones(1, 2)), expected)


def _stage(model: Bypass) -> Tensor:
    ones = torch.ones(1, 2)
    out: Tensor = ones + model.stages[0](ones)
    return out


def test_a_leak_around_the_mask_is_named() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.camera = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.camera(x) + self.camera[0](x)  # an auxiliary path around the branch's output
            return out

    model = Leaky()
    with masked(model, ["camera"], "camera"):
        model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(TaskError, match=r"masking 'camera' to cut its branch off.*got a gradient at camera\.0\.weight"):
        check_masked_gradients(model, branch_of_parameters(model, {"camera": ["camera"]}), "camera")


def test_parameters_belong_to_their_branch_and_tied_ones_to_the_fusion() -> None:
    model = nn.Module()
    model.camera = nn.Linear(2, 2)
    model.camera_neck = nn.Linear(2, 2)
    model.lidar = nn.Linear(2, 2)
    model.head = nn.Linear(2, 2)
    model.lidar.bias = model.head.bias
    found = branch_of_parameters(model, {"camera": ["camera", "camera_neck"], "lidar": ["lidar"]})
    assert found == {
        "camera.weight": "camera",
        "camera.bias": "camera",
        "camera_neck.weight": "camera",
        "camera_neck.bias": "camera",
        "lidar.weight": "lidar",
        "lidar.bias": "fusion",
        "head.weight": "fusion",
    }


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ({"camera": ["camra"]}, r"branches\['camera'\] to name a module.*got 'camra'.*\['camera', 'lidar', 'stages'\]"),
        ({"fusion": ["camera"]}, r"modalities other than 'fusion'.*rename"),
        ({"a": ["camera"], "b": ["camera.body"]}, r"branches to be apart; got 'camera.body' of 'b' inside 'camera'"),
    ],
)
def test_wrong_branches_are_refused(branches: dict[str, list[str]], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        branch_of_parameters(Bypass(), branches)


@contextmanager
def _disturbed(model: nn.Module, *, fail: bool) -> Iterator[None]:
    """Do to a model everything that scoring does and more."""
    with untouched(model, seed=3) as snapshot:
        assert not any(module.training for module in model.modules())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert torch.is_grad_enabled()
        assert set(snapshot.initial) == set(model.parameters())
        model.train()
        model(**{name: torch.randn(2, 2, 6, 6).double() for name in ("camera", "lidar")})["map"].sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        backbone: Any = model.get_submodule("camera")
        backbone.stem_norm.running_mean = torch.zeros(6, dtype=torch.float64)  # another tensor in the buffer's place
        if fail:
            raise KeyError("in the middle")
        yield


@pytest.mark.parametrize("write", [lambda p: p.data.neg_(), lambda p: p.detach().view(-1)[:1].add_(1e-12)])
def test_a_changed_parameter_of_which_no_copy_was_kept_is_named(write: Callable[[Tensor], Tensor]) -> None:
    model = ConvToy().model
    model.head.requires_grad_(False)

    def change() -> None:
        with untouched(model, keep_values=False) as snapshot:
            assert not snapshot.initial
            write(model.fuse.weight)

    with pytest.raises(TaskError, match=r"leave the parameters as they are; got other values at \['fuse.weight'\] \(1"):
        change()
    assert model.training  # flags come back all the same
    assert not model.head.weight.requires_grad


@pytest.mark.parametrize("keep_values", [False, True])
def test_what_may_change_for_a_while_is_kept_no_longer(keep_values: bool) -> None:
    model = ConvToy().model
    before = state_bytes(model)
    with untouched(model, keep_values=keep_values) as snapshot:
        kept = set(snapshot.initial)
        for fail in (False, True):
            with suppress(KeyError), snapshot.changing(model.fuse.parameters()):
                assert set(snapshot.initial) == kept | set(model.fuse.parameters())
                model.fuse.weight.data.neg_()
                if fail:
                    raise KeyError("in the middle")
            assert set(snapshot.initial) == kept
            assert state_bytes(model) == before


def test_what_changes_beside_the_parameters_that_may_is_named() -> None:
    model = ConvToy().model

    def change() -> None:
        with untouched(model, keep_values=False) as snapshot, snapshot.changing(model.fuse.parameters()):
            model.fuse.weight.data.neg_()
            model.get_parameter("head.bias").data.neg_()

    with pytest.raises(TaskError, match=r"got other values at \['head.bias'\] \(1"):
        change()


def test_without_copies_buffers_and_flags_come_back_too() -> None:
    model = ConvToy().model
    before = state_bytes(model)
    with untouched(model, keep_values=False):
        model.train()
        model(**{name: torch.randn(2, 2, 6, 6).double() for name in ("camera", "lidar")})["map"].sum().backward()
        assert state_bytes(model) != before  # running statistics
    assert state_bytes(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_error_inside_is_not_hidden_by_the_check() -> None:
    model = ConvToy().model

    def fail() -> None:
        with untouched(model, keep_values=False):
            model.fuse.weight.data.neg_()
            raise KeyError("in the middle")

    with pytest.raises(KeyError, match="in the middle"):
        fail()


@pytest.mark.parametrize("fail", [False, True])
def test_a_model_comes_back_bit_identical(fail: bool) -> None:
    model = ConvToy().model
    model.train()
    model.get_submodule("lidar").eval()
    model.head.requires_grad_(False)
    model.fuse.weight.grad = torch.full_like(model.fuse.weight, 7.0)
    gradient = model.fuse.weight.grad
    values, random = state_bytes(model), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    if fail:
        with pytest.raises(KeyError, match="in the middle"), _disturbed(model, fail=True):
            pass
    else:
        with torch.no_grad(), _disturbed(model, fail=False):
            pass
    assert state_bytes(model) == values
    assert [module.training for module in model.modules()] == modes
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers
    assert model.fuse.weight.grad is gradient
    assert bool((gradient == 7.0).all())
    assert all(p.grad is None for p in model.parameters() if p is not model.fuse.weight)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"head.weight", "head.bias"}
    assert torch.equal(torch.get_rng_state(), random)
