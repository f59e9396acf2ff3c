"""Features of the dense model as a teacher: which of their channels a student kept, and what they are compared by."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusepress.pipeline.errors import CheckpointError, TaskError
from fusepress.pipeline.graph.apply import apply_plan, gate_model
from fusepress.pipeline.graph.check import sample_kept
from fusepress.pipeline.graph.groups import find_groups
from fusepress.pipeline.graph.plan import PrunePlan
from fusepress.pipeline.recovery.features import (
    FeatureTap,
    FeatureTeacher,
    Kept,
    default_points,
    feature_loss,
    find_fuser,
    kept_channels,
    teach_features,
    tensors_in,
)
from tests import graph_models as zoo

BRANCHES = {"camera": ["camera"], "lidar": ["lidar"]}


class Join(nn.Module):
    """Concatenates and, as a lift to several heights does, repeats one of its inputs."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b, 0.5 * a], 1)


class Spread(nn.Module):
    """Several tensors, one of them with the channels last."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"fine": x, "rest": (F.avg_pool2d(x, 2), x.mean((2, 3)).unsqueeze(1))}


class Fusion(nn.Module):
    """Two branches, a concatenation as a module of its own, a fuser that is called twice, a mixing point, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.camera = nn.Sequential(zoo.conv_bn(3, 12), zoo.conv_bn(12, 8))
        self.lidar = zoo.conv_bn(2, 16)
        self.join, self.spread, self.soft = Join(), Spread(), nn.Softmax(dim=1)
        self.fuser = nn.Sequential(zoo.conv_bn(32, 16))
        self.twice = zoo.conv_bn(16, 16)
        self.head = nn.ModuleDict({"seg": nn.Conv2d(16, 4, 1), "box": nn.Conv2d(16, 2, 1)})

    def forward(self, image: Tensor, scan: Tensor) -> dict[str, Tensor]:
        x = self.fuser(self.join(self.camera(image), self.lidar(scan)))
        x = self.twice(self.twice(x))
        y = self.spread(x)["fine"]
        return {"seg": self.head["seg"](y), "box": self.head["box"](y)}


def inputs() -> dict[str, Tensor]:
    return {"image": zoo.image(4, seed=1), "scan": zoo.image(4, channels=2, seed=2)}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def fusion() -> tuple[nn.Module, PrunePlan]:
    """A dense model with settled norms and a plan that narrows every group of it."""
    torch.manual_seed(0)
    model = zoo.settled(Fusion())
    graph = find_groups(model, inputs(), BRANCHES, blocks=False)
    plan = graph.plan({group.id: sample_kept(group, 0.4) for group in graph.groups})
    assert len(plan.groups) >= 4
    return model, plan


def kept_of(plan: PrunePlan, producer: str) -> list[int]:
    return list(
        next(g.kept for g in plan.groups if any(m.param == producer and m.role == "producer" for m in g.members))
    )


def features_of(model: nn.Module, points: list[str], given: dict[str, Tensor]) -> dict[str, Tensor]:
    tap = FeatureTap(model, points)
    with torch.no_grad():
        model(**given)
    found = tap.take()
    tap.close()
    return found


POINTS = ["camera", "lidar", "join", "fuser", "twice", "spread", "head.seg"]


# --- which channels -----------------------------------------------------------------------------------------------


def test_kept_channels_are_the_plans_through_concatenation_repetition_and_transposition(
    fusion: tuple[nn.Module, PrunePlan],
) -> None:
    model, plan = fusion
    kept, refused = kept_channels(model, plan, inputs(), POINTS)
    camera, lidar = kept_of(plan, "camera.1.0.weight"), kept_of(plan, "lidar.0.weight")
    fused = kept_of(plan, "fuser.0.0.weight")
    assert len(camera) < 8
    assert len(lidar) < 16
    assert kept["camera"] == Kept(dim=1, index=tuple(camera))
    assert kept["lidar"] == Kept(dim=1, index=tuple(lidar))
    joined = [*camera, *(8 + c for c in lidar), *(24 + c for c in camera)]
    assert kept["join"] == Kept(dim=1, index=tuple(joined))
    assert kept["fuser"] == Kept(dim=1, index=tuple(fused))
    assert kept["spread[2]"] == Kept(dim=2, index=tuple(fused)), "the channels of the third tensor are its last dim"
    assert kept["twice[0]"] == kept["twice[1]"] == kept["spread[0]"] == kept["spread[1]"] == kept["fuser"]
    assert kept["head.seg"] is None, "what the task keeps is compared whole"
    assert not refused


def test_a_student_of_indexed_channels_loses_exactly_nothing(fusion: tuple[nn.Module, PrunePlan]) -> None:
    model, plan = fusion
    kept, _ = kept_channels(model, plan, inputs(), POINTS)
    for name, dense in features_of(model, POINTS, inputs()).items():
        part = kept[name]
        student = (dense if part is None else dense.index_select(part.dim, torch.tensor(part.index))).clone()
        student.requires_grad_()
        loss = feature_loss(student, dense, part)
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert student.grad is not None
        assert float(student.grad.abs().max()) == 0.0
        if part is not None:
            shifted = Kept(dim=part.dim, index=(*part.index[1:], part.index[0]))
            assert float(feature_loss(student.detach(), dense, shifted)) > 0.01, "the order of the channels matters"


def test_the_pruned_model_learns_nothing_from_the_dense_one_whose_other_channels_are_dead(
    fusion: tuple[nn.Module, PrunePlan],
) -> None:
    dense, plan = copy.deepcopy(fusion[0]).double(), fusion[1]
    given = {name: value.double() for name, value in inputs().items()}
    student, gated = apply_plan(copy.deepcopy(dense), plan), gate_model(dense, plan)
    taught = teach_features(student, gated, plan, given, BRANCHES, POINTS)
    losses = losses_of(taught, student, gated, given)
    assert set(losses) >= {"camera", "lidar", "join", "fuser", "head.seg"}
    assert max(losses.values()) < 1e-20
    taught.close()
    whole = teach_features(student, dense, plan, given, BRANCHES, POINTS)
    alive = losses_of(whole, student, dense, given)
    assert alive["lidar"] < 1e-20, "its own input is whole, so its channels are the teacher's"
    assert min(alive["join"], alive["fuser"], alive["head.seg"]) > 1e-4
    whole.close()


def losses_of(
    taught: FeatureTeacher, student: nn.Module, teacher: nn.Module, given: dict[str, Tensor]
) -> dict[str, float]:
    student(**given)
    with torch.no_grad():
        teacher(**given)
    return {name: float(loss.detach()) for name, loss in taught.losses().items()}


def test_without_a_plan_all_channels_are_kept(fusion: tuple[nn.Module, PrunePlan]) -> None:
    kept, refused = kept_channels(fusion[0], None, inputs(), ["camera", "join"])
    assert kept == {"camera": None, "join": None}
    assert not refused


@pytest.mark.parametrize(
    ("make", "given", "points"),
    [
        (zoo.Concat, {"x": zoo.image()}, ["a", "b", "mix"]),
        (zoo.Residual, {"x": zoo.image()}, ["stem", "a", "bn"]),
        (zoo.Depthwise, {"x": zoo.image()}, ["stem", "dw", "se", "pw"]),
        (zoo.Decoder, {"x": zoo.image()}, ["up", "dw", "wide"]),
        (zoo.ConvNext, {"x": zoo.image()}, ["stem", "blocks", "blocks.0.norm", "blocks.0.up"]),
        (zoo.GroupNormed, {"x": zoo.image()}, ["a", "gn"]),
        (zoo.Attention, {"x": zoo.image(channels=12)}, ["v"]),
        (zoo.PillarNet, zoo.pillar_inputs(), ["camera", "lidar.point", "lidar.bev", "fuse"]),
        (lambda: zoo.Pyramid(add=False), {"x": zoo.image()}, ["fine", "lateral_coarse", "lateral_fine"]),
    ],
    ids=["concat", "residual", "depthwise", "decoder", "convnext", "groupnorm", "attention", "pillars", "pyramid"],
)
def test_kept_channels_are_told_in_every_shape_of_model(make: Any, given: dict[str, Tensor], points: list[str]) -> None:
    model = zoo.settled(make())
    graph = find_groups(model, given, {}, blocks=False)
    plan = graph.plan({group.id: sample_kept(group, 0.4) for group in graph.groups})
    kept, refused = kept_channels(model, plan, given, points)
    assert not refused
    student, gated = apply_plan(copy.deepcopy(model), plan), gate_model(model, plan)
    wanted = features_of(gated, points, given)
    for name, mine in features_of(student, points, given).items():
        part = kept[name]
        assert part is not None
        assert 0 < len(part.index) < wanted[name].shape[part.dim]
        torch.testing.assert_close(mine, part.of(wanted[name]), rtol=1e-4, atol=1e-5)


# --- the loss -----------------------------------------------------------------------------------------------------


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_loss_is_the_squared_distance_of_standardised_features() -> None:
    student, teacher = normal(0, 3, 4, 5).double(), normal(1, 3, 4, 5).double()
    rows = [
        2 - 2 * float(torch.corrcoef(torch.stack([s.flatten(), t.flatten()]))[0, 1])
        for s, t in zip(student, teacher, strict=True)
    ]
    assert float(feature_loss(student, teacher)) == pytest.approx(sum(rows) / 3, rel=1e-4)


def test_the_loss_knows_neither_scale_nor_shift_and_is_a_mean_of_samples() -> None:
    student, teacher = normal(0, 6, 4, 5, 5), normal(1, 6, 4, 5, 5)
    loss = float(feature_loss(student, teacher))
    assert float(feature_loss(7 * student + 3, teacher)) == pytest.approx(loss, rel=1e-4)
    rows = [float(feature_loss(s[None], t[None])) for s, t in zip(student, teacher, strict=True)]
    assert loss == pytest.approx(sum(rows) / 6, rel=1e-5)
    assert float(feature_loss(-teacher, teacher)) == pytest.approx(4, rel=1e-3)


def test_no_gradient_reaches_the_teacher_and_dead_features_are_finite() -> None:
    student, teacher = normal(0, 2, 4, 3).requires_grad_(), normal(1, 2, 4, 3).requires_grad_()
    feature_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    dead = torch.zeros(2, 4, 3, requires_grad=True)
    feature_loss(dead, teacher).backward()
    assert dead.grad is not None
    assert bool(torch.isfinite(dead.grad).all())


def test_half_precision_features_are_compared_in_float32() -> None:
    loss = feature_loss(normal(0, 2, 4, 3).half(), normal(1, 2, 4, 3).half())
    assert loss.dtype == torch.float32


# --- points -------------------------------------------------------------------------------------------------------


def test_the_default_points_are_the_branches_and_the_fuser(fusion: tuple[nn.Module, PrunePlan]) -> None:
    model = fusion[0].train()
    assert default_points(model, inputs(), BRANCHES) == ["camera", "lidar", "fuser"]
    assert all(module.training for module in model.modules())
    model.eval()


class Wrapped(nn.Module):
    """The network inside a wrapper, its branches in a dict, its fusion between two calls of a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict(
            {"early": zoo.conv_bn(3, 8), "mix": zoo.conv_bn(8, 8), "late": zoo.conv_bn(8, 8), "neck": zoo.conv_bn(8, 8)}
        )
        self.norm = nn.ReLU()
        self.heads = nn.ModuleList([nn.Conv2d(8, 2, 1)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.net["late"](self.net["mix"](self.net["early"](x)))
        return self.heads[0](self.norm(self.net["neck"](x)))  # type: ignore[no-any-return]


def test_the_fuser_runs_after_all_branches_and_is_no_output() -> None:
    branches = {"camera": ["net.early", "net.late"]}
    assert find_fuser(Wrapped(), {"x": zoo.image()}, branches) == "net.neck"
    assert default_points(Wrapped(), {"x": zoo.image()}, branches) == ["net.early", "net.late", "net.neck"]
    bare = nn.ModuleDict({"camera": zoo.conv_bn(3, 8), "head": nn.Conv2d(8, 2, 1)})
    bare.forward = lambda x: bare["head"](bare["camera"](x))
    assert find_fuser(bare, {"x": zoo.image()}, {"camera": ["camera"]}) is None


class Staged(nn.Module):
    """Branches whose stages are called one by one, with a fusion between them: nobody calls the branch itself."""

    def __init__(self) -> None:
        super().__init__()
        self.camera = nn.ModuleDict({"late": zoo.conv_bn(8, 8), "stages": nn.ModuleList([zoo.conv_bn(3, 8)])})
        self.lidar, self.mix = zoo.conv_bn(2, 8), zoo.conv_bn(8, 8)
        self.neck, self.head = zoo.conv_bn(8, 8), nn.Conv2d(8, 2, 1)

    def forward(self, image: Tensor, scan: Tensor) -> Tensor:
        mixed = self.mix(self.camera["stages"][0](image) + self.lidar(scan))  # type: ignore[index]
        return self.head(self.neck(self.camera["late"](mixed)))  # type: ignore[no-any-return]


def test_a_branch_that_is_called_in_parts_returns_what_its_last_part_does() -> None:
    assert default_points(Staged(), inputs(), BRANCHES) == ["camera.late", "lidar", "neck"]


def test_a_tap_sees_the_latest_forward_pass_and_only_those_with_a_graph_if_asked() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    tap, strict = FeatureTap(model, ["0"]), FeatureTap(model, ["0"], graph_only=True)
    model(zoo.image(seed=1))
    first = strict.take()["0"]
    assert first.requires_grad
    with torch.no_grad():
        model(zoo.image(seed=2))
    assert not strict.take()
    latest = tap.take()
    assert list(latest) == ["0"]
    assert torch.equal(latest["0"], model[0](zoo.image(seed=2)))
    tap.close()
    strict.close()
    model(zoo.image())
    assert not tap.take()
    assert not model._forward_pre_hooks
    assert not model[0]._forward_hooks


def test_only_numbers_that_have_gradients_are_features() -> None:
    x, cells = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    assert [id(t) for t in tensors_in({"a": (x, cells), "b": [None, x]})] == [id(x), id(x)]


# --- what is refused ----------------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """A point whose channels nobody can tell apart: a matrix of its own mixes them, and their number sets its size."""

    def __init__(self) -> None:
        super().__init__()
        self.camera, self.mix, self.head = zoo.conv_bn(3, 16), nn.Identity(), nn.Conv2d(16, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.camera(image)
        self.mix(torch.einsum("nchw,nc->nchw", x.cumsum(1), x.mean((2, 3))))
        return self.head(x)  # type: ignore[no-any-return]


def mixing() -> tuple[nn.Module, PrunePlan, dict[str, Tensor]]:
    model, given = zoo.settled(Mixing()), {"image": zoo.image()}
    graph = find_groups(model, given, {}, blocks=False)
    return model, graph.plan({graph.groups[0].id: [0, 3, 5, 11]}), given


def test_a_named_point_that_cannot_be_told_is_refused_with_the_reason() -> None:
    model, plan, given = mixing()
    student = apply_plan(copy.deepcopy(model), plan)
    with pytest.raises(TaskError, match=r"kept channels can be told; got 'mix': .* of its 16 channels are free"):
        teach_features(student, model, plan, given, {}, ["mix"])
    with pytest.raises(
        TaskError, match=r"modules of the model; got 'mux'; its top modules are \['camera', 'mix', 'head'"
    ):
        teach_features(student, model, plan, given, {}, ["mux"])


def test_a_default_point_that_cannot_be_told_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model, plan, given = mixing()
    student = apply_plan(copy.deepcopy(model), plan)
    with caplog.at_level(logging.INFO):
        taught = teach_features(student, model, plan, given, {"a": ["camera"], "b": ["mix"]})
    assert list(taught.kept) == ["camera"]
    assert "the dense model teaches its features at camera (4 channels)" in caplog.text
    assert "the features of mix are not taught" in caplog.text
    taught.close()
    with pytest.raises(TaskError, match=r"features to teach at \['mix'\]; got none .*distill_features to 0"):
        teach_features(student, model, plan, given, {"b": ["mix"]})


def test_a_point_that_is_not_called_is_refused() -> None:
    model, given = zoo.Stubborn().eval(), {"x": zoo.image()}
    _, refused = kept_channels(model, None, given, ["unused", "sized"])
    assert refused == {"unused": "the forward pass does not call it, or it returns no tensor"}


def test_a_plan_of_another_model_is_refused(fusion: tuple[nn.Module, PrunePlan]) -> None:
    with pytest.raises(CheckpointError, match="expected the architecture"):
        kept_channels(zoo.Concat(), fusion[1], {"x": zoo.image()}, ["a"])


def test_losses_before_a_forward_pass_are_refused(fusion: tuple[nn.Module, PrunePlan]) -> None:
    model, plan = fusion
    taught = teach_features(apply_plan(copy.deepcopy(model), plan), model, plan, inputs(), BRANCHES)
    with pytest.raises(TaskError, match=r"of a forward pass of both models; got none of 'camera'; call the student"):
        taught.losses()
    taught.close()


def test_neither_model_is_changed(fusion: tuple[nn.Module, PrunePlan]) -> None:
    model, plan = fusion
    before = {name: value.clone() for name, value in model.state_dict().items()}
    student = apply_plan(copy.deepcopy(model), plan)
    teach_features(student, model, plan, inputs(), BRANCHES).close()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())
