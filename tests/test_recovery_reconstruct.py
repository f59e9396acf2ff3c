"""Layers fitted in closed form to the dense model's: least squares, what it recovers, and what it leaves alone."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusepress.pipeline.api import make_context, new_record, preflight
from fusepress.pipeline.console import Reporter
from fusepress.pipeline.errors import RecipeError, StageError
from fusepress.pipeline.graph import activations
from fusepress.pipeline.graph.activations import called_layers
from fusepress.pipeline.graph.apply import apply_plan
from fusepress.pipeline.graph.groups import find_groups
from fusepress.pipeline.graph.plan import PrunePlan
from fusepress.pipeline.graph.regression import Moments, fit_layer, moments_with
from fusepress.pipeline.recipe import load_recipe
from fusepress.pipeline.recovery.reconstruct import reconstruct
from fusepress.pipeline.report.html import render
from fusepress.pipeline.runner import run_stages
from fusepress.pipeline.stages import STAGES
from fusepress.pipeline.stages.finetune import Finetune
from fusepress.pipeline.store import Store
from fusepress.pipeline.task import Batch, LoadedTask
from tests.recovery_runs import toy_project
from tests.scoring_toys import loaded
from tests.test_report import check_page

SIZE = 12


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    torch.manual_seed(0)


# One layer

LAYERS = {
    "linear": (nn.Linear(5, 3), nn.Linear(5, 4), (40, 5)),
    "linear over tokens": (nn.Linear(5, 3, bias=False), nn.Linear(5, 4), (6, 9, 5)),
    "convolution": (nn.Conv2d(4, 3, 3, stride=2, padding=1), nn.Conv2d(4, 5, 3, stride=2, padding=1), (6, 4, 9, 9)),
    "no bias": (nn.Conv2d(4, 3, 3, bias=False), nn.Conv2d(4, 5, 3), (6, 4, 9, 9)),
    "one dimension": (nn.Conv1d(4, 3, 3, dilation=2), nn.Conv1d(4, 4, 3, dilation=2), (9, 4, 15)),
    "groups": (nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 6, 3, groups=1), (6, 4, 9, 9)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 3, groups=2), (6, 4, 9, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_becomes_the_least_squares_fit(name: str) -> None:
    layer, target, shape = copy.deepcopy(LAYERS[name])
    model, wanted = nn.Sequential(layer), nn.Sequential(nn.Identity(), target)
    batches = [{"input": torch.randn(shape)} for _ in range(2)]
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear)
    rows = torch.tensor([0, 2, 3, 1][: layer.weight.shape[0]])
    start = copy.deepcopy(layer)
    found = called_layers(model, batches[0], ["0.weight"])["0.weight"]
    with torch.no_grad():
        before, after = fit_layer(layer, moments_with(model, found, wanted, target, rows, batches), 0.0)

    x = torch.cat([batch["input"] for batch in batches])
    along = 1 if isinstance(layer, nn.Conv1d | nn.Conv2d) else -1
    y = target(x).index_select(along, rows).detach()

    def slopes(at: nn.Module) -> list[Tensor]:
        wide = copy.deepcopy(at).double()
        F.mse_loss(wide(x.double()), y.double()).backward()
        return [parameter.grad for parameter in wide.parameters() if parameter.grad is not None]

    for here, there in zip(slopes(layer), slopes(start), strict=True):  # it is convex: no slope, no better place
        assert float(here.abs().max()) < 1e-4 * float(there.abs().max())
    over = [d for d in range(y.ndim) if d != along % y.ndim]
    whole = float((y.var(over, correction=0) if layer.bias is not None else y.square().mean(over)).sum())
    count = len(rows)
    assert before == pytest.approx(count * float(F.mse_loss(start(x), y).detach()) / whole, rel=1e-3)
    assert after == pytest.approx(count * float(F.mse_loss(layer(x), y).detach()) / whole, rel=1e-3, abs=1e-6)
    assert after < before


def test_damping_leaves_weights_of_silent_inputs_where_they_are() -> None:
    layer, target = nn.Linear(3, 2), nn.Linear(3, 2)
    x = torch.randn(50, 3)
    x[:, 1] = 0.0
    start = layer.weight.detach().clone()
    model, wanted = nn.Sequential(layer), nn.Sequential(target)
    found = called_layers(model, {"input": x}, ["0.weight"])["0.weight"]
    fit_layer(layer, moments_with(model, found, wanted, target, torch.arange(2), [{"input": x}]), 1e-6)
    torch.testing.assert_close(layer.weight[:, 1], start[:, 1])
    torch.testing.assert_close(layer.weight[:, [0, 2]], target.weight[:, [0, 2]], rtol=1e-4, atol=1e-5)


def test_inputs_far_from_zero_are_fitted_as_those_around_it() -> None:
    layer, target = nn.Linear(6, 2), nn.Linear(6, 2)
    x = torch.randn(4000, 6) + 3000.0
    model, wanted = nn.Sequential(layer), nn.Sequential(target.double())
    wanted[0].register_forward_pre_hook(lambda _module, args: (args[0].double(),))
    found = called_layers(model, {"input": x}, ["0.weight"])["0.weight"]
    fit_layer(layer, moments_with(model, found, wanted, target, torch.arange(2), [{"input": x}]), 1e-6)
    torch.testing.assert_close(layer.weight.double(), target.weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("more", [1, 4])
def test_other_positions_than_the_dense_models_are_refused(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "CHUNK", 4 * 3)  # chunks of four positions
    layer, target = nn.Linear(3, 2), nn.Linear(3, 2)
    model, wanted = nn.Sequential(layer), nn.Sequential(target)
    longer = nn.Sequential(nn.Identity(), layer)
    longer[0].register_forward_hook(lambda _module, _args, x: torch.cat([x, x[:more]]))
    found = called_layers(model, {"input": torch.ones(8, 3)}, ["0.weight"])["0.weight"]
    with pytest.raises(StageError, match=rf"at the 8 positions .* at; got {8 + more}; set finetune"):
        moments_with(longer, found, wanted, target, torch.arange(2), [{"input": torch.ones(8, 3)}])


def test_a_layer_that_saw_nothing_stays_as_it_is() -> None:
    layer = nn.Linear(3, 2)
    start = copy.deepcopy(layer.state_dict())
    nothing = Moments.zeros(1, 2, 3, torch.device("cpu")).finish()
    assert fit_layer(layer, nothing, 1e-3) == (0.0, 0.0)
    assert all(torch.equal(value, start[name]) for name, value in layer.state_dict().items())


# Networks


class Net(nn.Module):
    """Two branches of convolutions with norms, joined, a module that is called twice, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.camera = nn.Sequential(self._block(3), self._block(SIZE))
        self.lidar = self._block(2)
        self.fuser = nn.Sequential(nn.Conv2d(2 * SIZE, SIZE, 1, bias=False), nn.BatchNorm2d(SIZE), nn.ReLU())
        self.twice = nn.Sequential(nn.Conv2d(SIZE, SIZE, 3, padding=1), nn.Tanh())
        self.head = nn.Linear(SIZE, 3)

    @staticmethod
    def _block(channels: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels, SIZE, 3, padding=1, bias=False), nn.BatchNorm2d(SIZE), nn.ReLU())

    def forward(self, image: Tensor, scan: Tensor) -> Tensor:
        x = self.fuser(torch.cat([self.camera(image), self.lidar(scan)], 1))
        out: Tensor = self.head(self.twice(self.twice(x)).mean((2, 3)))
        return out


def dense_and_task(nan: bool = False) -> tuple[Net, LoadedTask]:
    model = Net()
    data = [Batch(inputs={"image": torch.randn(4, 3, 6, 6), "scan": torch.randn(4, 2, 6, 6)}) for _ in range(6)]
    if nan:
        data[0].inputs["scan"][0, 0, 0, 0] = torch.nan
    with torch.no_grad():
        for batch in data[1:]:  # running statistics of something
            model(**batch.inputs)
    branches = {"camera": ["camera"], "lidar": ["lidar"]}
    return model.eval(), loaded(data, branches, lambda outputs, _: {"sum": outputs.square().sum()})


def plan_of(model: nn.Module, task: LoadedTask, gone: int) -> PrunePlan:
    inputs = next(task.train_batches(0)).inputs
    graph = find_groups(model, inputs, task.branches, ())
    return graph.plan({group.id: range(group.width - gone) for group in graph.groups})


def twins(model: Net) -> None:
    """Make the last channels of every block that a group allows positive multiples of the first ones."""
    with torch.no_grad():
        for path in ("camera.0", "camera.1", "lidar"):
            conv, norm = model.get_submodule(f"{path}.0"), model.get_submodule(f"{path}.1")
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            for k in range(3):
                conv.weight[SIZE - 1 - k] = 2.0 * conv.weight[k]
                for value, factor in (
                    (norm.weight, 1.0),
                    (norm.bias, 3.0),
                    (norm.running_mean, 2.0),
                    (norm.running_var, 4.0),
                ):
                    value[SIZE - 1 - k] = factor * value[k]
            norm.bias[SIZE - 3 :] = 0.0
            norm.bias[:3] = 0.0
            norm.eps = 0.0


def difference(a: nn.Module, b: nn.Module, task: LoadedTask) -> float:
    with torch.no_grad():
        inputs = [batch.inputs for batch in itertools.islice(task.train_batches(3), 4)]
        return max(float((a(**x) - b(**x)).abs().max()) for x in inputs)


def test_what_the_kept_channels_can_tell_is_recovered_exactly() -> None:
    """Channels that are multiples of others are lost without any loss."""
    model, task = dense_and_task()
    twins(model)
    graph = find_groups(model, next(task.train_batches(0)).inputs, task.branches, ())
    twinned = {group.id for group in graph.groups if group.producers[0].split(".")[0] in ("camera", "lidar")}
    assert len(twinned) == 3
    plan = graph.plan({g.id: range(g.width - 3) if g.id in twinned else range(g.width) for g in graph.groups})
    student = apply_plan(copy.deepcopy(model), plan).eval()
    assert difference(student, model, task) > 1e-2
    fitted = reconstruct(student, model, plan, task, 16, 0, damping=1e-9)
    assert difference(student, model, task) < 1e-3
    assert [f.layer for f in fitted] == ["camera.0.0", "camera.1.0", "lidar.0", "fuser.0", "twice.0", "head"]
    assert all(f.after < 1e-3 for f in fitted)
    # behind a layer that is exact again nothing is left to mend
    assert [f.before > 0.01 for f in fitted] == [False, True, False, True, False, False]


def test_a_model_that_kept_everything_stays_as_it_is() -> None:
    model, task = dense_and_task()
    plan = plan_of(model, task, 0)
    student = apply_plan(copy.deepcopy(model), plan)
    for norm in (student.get_submodule("fuser.1"), student.get_submodule("lidar.1")):
        assert isinstance(norm, nn.BatchNorm2d)
        norm.reset_running_stats()  # as if they had been estimated anew
    fitted = reconstruct(student, model, plan, task, 8, 0)
    assert max(f.before for f in fitted) < 1e-3  # a head whose inputs hardly vary: sums are in float32
    assert difference(student, model, task) < 1e-3
    for own, dense in zip(student.buffers(), model.buffers(), strict=True):
        assert torch.equal(own, dense)


def test_it_brings_a_pruned_model_nearer_without_labels_and_repeats_itself() -> None:
    model, task = dense_and_task()
    plan = plan_of(model, task, 4)
    pruned = apply_plan(copy.deepcopy(model), plan).eval()
    before = difference(pruned, model, task)
    students = [copy.deepcopy(pruned) for _ in range(2)]
    told: list[float] = []
    for student in students:
        fitted = reconstruct(student, model, plan, task, 20, 0, progress=lambda done, _: told.append(done))
        assert all(f.after <= f.before + 1e-9 for f in fitted)
    assert difference(students[0], model, task) < 0.7 * before
    assert difference(students[0], students[1], task) == 0.0
    assert told[:6] == [number / 6 for number in range(6)]
    dense_now, _ = dense_and_task()
    assert not students[0].training
    assert dense_now.state_dict().keys() == model.state_dict().keys()


def test_features_that_are_not_finite_are_refused() -> None:
    model, task = dense_and_task(nan=True)
    plan = plan_of(model, dense_and_task()[1], 4)
    student = apply_plan(copy.deepcopy(model), plan)
    with pytest.raises(
        StageError, match=r"expected finite features .*; got NaN or infinity at .* of \w+\.[\w.]+; check"
    ):
        reconstruct(student, model, plan, task, 8, 0)


# The stage

RECIPE: dict[str, Any] = {
    "task": "sparsify_toy.py:Toy",
    "checkpoint": "dense.safetensors",
    "target": "jetson-agx-orin-64gb",
    "score": {"method": "magnitude"},
    "prune": {"macs": 0.5, "align": 1},
    "finetune": {"steps": 0, "reconstruct": 32},
    "gates": {"accuracy": {"max_drop": 0.9}},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_project(tmp_path_factory.mktemp("reconstruct"), RECIPE, steps=30)


def test_a_recipe_that_does_not_distil_cannot_reconstruct(project: Path) -> None:
    with pytest.raises(RecipeError, match=r"expected `distill: true` with .* or `reconstruct`; got false; remove them"):
        load_recipe(project / "recipe.yaml", ["finetune.distill=false"])


def test_the_stage_reconstructs_says_so_and_repeats_itself(project: Path, tmp_path: Path) -> None:
    ctx = make_context(load_recipe(project / "recipe.yaml"), Reporter(quiet=True))
    preflight(ctx, Store(tmp_path / ".store"))
    record = new_record(ctx, tmp_path / "run", "test")
    run_stages(
        ctx, [s for s in STAGES if s.name in ("baseline", "score", "prune", "finetune")], record, tmp_path / "run"
    )
    stage = record.stage("finetune")
    assert stage is not None
    details = stage.details
    assert details["reconstruction"].startswith(f"{len(details['reconstructed'])} layers fitted to the dense model's")
    assert details["reconstruction"] in check_page(render(record, tmp_path / "run")).words
    assert {"camera.0.0", "fuser.0", "mlp.2", "head"} <= {layer["layer"] for layer in details["reconstructed"]}
    mean = {when: sum(layer[when] for layer in details["reconstructed"]) for when in ("before", "after")}
    assert mean["after"] < mean["before"]

    fractions: list[float] = []

    class Heard(Reporter):
        def update(self, fraction: float, note: str = "") -> None:
            fractions.append(fraction)

    def again(name: str, *overrides: str) -> bytes:
        other = make_context(load_recipe(project / "recipe.yaml", overrides), Heard(quiet=True))
        other.add_artifact("dense_weights", project / "dense.safetensors")
        for artifact in ("plan", "weights"):
            (found,) = (tmp_path / "run" / "prune").glob({"plan": "*.json", "weights": "*.safetensors"}[artifact])
            other.add_artifact(artifact, found)
        (tmp_path / name).mkdir()
        fractions.clear()
        Finetune().run(other, tmp_path / name, tmp_path / f"work {name}")
        assert fractions == sorted(fractions)  # the bar never goes back
        return (tmp_path / name / "finetuned.safetensors").read_bytes()

    assert again("same") == (tmp_path / "run" / "finetune" / "finetuned.safetensors").read_bytes()
    assert again("none", "finetune.reconstruct=0") != again("same again")
    again("trained", "finetune.steps=4")
    assert len([f for f in fractions if 0 < f < 0.05]) > 2
    assert [f for f in fractions if 0.05 < f <= 0.8]
