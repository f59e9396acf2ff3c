"""Experts, features and learned loss weights in the training loop, also when it is killed."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusepress.pipeline.errors import TaskError
from fusepress.pipeline.graph.apply import apply_plan
from fusepress.pipeline.graph.groups import find_groups
from fusepress.pipeline.graph.plan import PrunePlan
from fusepress.pipeline.recipe import FinetuneConfig
from fusepress.pipeline.recovery.distill import Distiller
from fusepress.pipeline.recovery.finetune import FinetuneResult, FitHooks, finetune
from fusepress.pipeline.task import Batch, LoadedTask, load_task
from tests.recovery_runs import Killed, kill_at, same

TESTS = Path(__file__).parent
BASE: dict[str, Any] = {"steps": 12, "lr": 0.01, "checkpoint_every": 5, "modality_dropout": 0.3, "ema": 0.9}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> LoadedTask:
    loaded = load_task("recovery_toy.py:Toy", base=TESTS)
    monkeypatch.setattr(type(loaded.user), "shared", ["camera.0", "lidar.0"], raising=False)
    return loaded


def toy(task: LoadedTask) -> Any:
    return sys.modules[type(task.user).__module__]


class Expert(nn.Module):
    """Teaches some outputs of the toy, from one sensor; it has no other branch."""

    def __init__(self, *outputs: str, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.lidar = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        sizes = {"logits": 3, "size": 1, "extra": 2}
        self.heads = nn.ModuleDict({name: nn.Linear(8, sizes[name]) for name in outputs})

    def forward(self, image: Tensor, points: Tensor) -> dict[str, Tensor]:
        x = self.lidar(points).mean(1)
        return {name: head(x) for name, head in self.heads.items()}


def pruned(task: LoadedTask) -> tuple[nn.Module, nn.Module, PrunePlan]:
    """A student that lost channels of both branches, its dense model and the plan."""
    _, dense = toy(task).models()
    inputs = next(task.batches("train", 0)).inputs
    graph = find_groups(dense, inputs, task.branches, blocks=False)
    plan = graph.plan({group.id: range(0, group.width, 2) for group in graph.groups})
    assert len(plan.groups) == 2
    return apply_plan(copy.deepcopy(dense), plan), dense, plan


def train(task: LoadedTask, workdir: Path, options: dict[str, Any], **more: Any) -> tuple[FinetuneResult, nn.Module]:
    student, dense, plan = pruned(task)
    config = FinetuneConfig(**BASE | options)
    given = {"seed": 3, "workdir": workdir, "plan": plan, **more}
    return finetune(student, dense, task, config, **given), student


# --- killed and started again -------------------------------------------------------------------------------------

WAYS = {
    "uncertainty": {"loss_weights": "uncertainty", "distill_normalise": True},
    "gradnorm": {"loss_weights": "gradnorm", "gradnorm_every": 2},
    "gradnorm-accumulated": {"loss_weights": "gradnorm", "gradnorm_every": 3, "accumulate": 2},
    "features-and-experts": {"distill_features": 2.0, "loss_weights": {"size": 0.5, "distill.size": 2.0}},
}


@pytest.mark.parametrize("way", WAYS)
def test_killed_after_any_step_it_ends_with_the_same_bits(task: LoadedTask, tmp_path: Path, way: str) -> None:
    experts = {"metre": Expert("size")} if way == "features-and-experts" else None
    straight, model = train(task, tmp_path / "straight", WAYS[way], experts=experts)
    weights = toy(task).everything(model)
    for step in (3, 7, 11):
        folder = tmp_path / str(step)
        with pytest.raises(Killed):
            train(task, folder, WAYS[way], experts=experts, progress=kill_at(step))
        again, model = train(task, folder, WAYS[way], experts=experts)
        assert again.resumed_from == (step // 5 * 5 or None)
        assert same(weights, toy(task).everything(model)), f"killed after step {step}"
        assert again.history == straight.history
    plain, model = train(task, tmp_path / "plain", {})
    assert not same(weights, toy(task).everything(model)), "the option does something"
    assert ("weights" in straight.history[-1]) == way.startswith(("uncertainty", "gradnorm"))
    assert "weights" not in plain.history[-1]


@pytest.mark.parametrize("changed", ["teacher", "expert", "plan"])
def test_a_checkpoint_under_other_teachers_is_not_used(task: LoadedTask, tmp_path: Path, changed: str) -> None:
    student, dense, plan = pruned(task)
    config = FinetuneConfig(**BASE, distill_features=1.0)
    start = {name: value.clone() for name, value in student.state_dict().items()}

    def run(*, teacher: nn.Module, expert: nn.Module, progress: Any = None) -> FinetuneResult:
        student.load_state_dict(start)
        given = {"experts": {"metre": expert}, "plan": plan, "progress": progress}
        return finetune(student, teacher, task, config, seed=3, workdir=tmp_path, **given)

    with pytest.raises(Killed):
        run(teacher=dense, expert=Expert("size"), progress=kill_at(7))
    if changed == "plan":  # the same shapes, but other channels
        groups = [g.id for g in find_groups(dense, next(task.batches("train", 0)).inputs, task.branches).groups]
        graph = find_groups(dense, next(task.batches("train", 0)).inputs, task.branches, blocks=False)
        plan = graph.plan({group: range(1, 8, 2) for group in groups})
    other = copy.deepcopy(dense)
    other.get_parameter("head.bias").data += 1
    teacher, expert = other if changed == "teacher" else dense, Expert("size", seed=int(changed == "expert"))
    assert run(teacher=teacher, expert=expert).resumed_from is None
    student.load_state_dict(start)


# --- features -----------------------------------------------------------------------------------------------------


def test_features_are_taught_at_the_branches_with_a_weight_that_falls_to_nothing(
    task: LoadedTask, tmp_path: Path
) -> None:
    result, _ = train(task, tmp_path, {"distill_features": 2.0, "distill_weight": 0.0, "steps": 40})
    names = {"distill.features.camera", "distill.features.lidar"}
    assert set(result.final_losses) == {"class", "size", *names}
    assert result.history[0]["losses"]["distill.features.camera"] > 0.01
    assert (
        result.final_losses["distill.features.camera"] < 0.01 * result.history[0]["losses"]["distill.features.camera"]
    )


def test_teaching_features_brings_them_closer(task: LoadedTask, tmp_path: Path) -> None:
    gaps = []
    batch = next(task.batches("eval", 77))
    for weight in (0.0, 30.0):
        student, dense, plan = pruned(task)
        config = FinetuneConfig(steps=60, lr=0.01, distill_weight=0.0 if weight else 1e-9, distill_features=weight)
        finetune(student, dense, task, config, seed=0, workdir=tmp_path / str(weight), plan=plan)
        kept = list(next(g.kept for g in plan.groups if g.branch == "camera"))
        with torch.no_grad():
            mine = student.get_submodule("camera")(batch.inputs["image"])
            theirs = dense.eval().get_submodule("camera")(batch.inputs["image"])[:, kept]
        gaps.append(1 - float(torch.corrcoef(torch.stack([mine.flatten(), theirs.flatten()]))[0, 1]))
    assert gaps[1] < 0.5 * gaps[0]


def test_named_points_are_taught(task: LoadedTask, tmp_path: Path) -> None:
    result, _ = train(task, tmp_path, {"distill_features": 1.0, "distill_points": ("camera.0", "head")})
    features = {name for name in result.final_losses if "features" in name}
    assert features == {"distill.features.camera.0", "distill.features.head"}


def test_features_need_the_dense_model(task: LoadedTask, tmp_path: Path) -> None:
    student, _ = toy(task).models()
    config = FinetuneConfig(**BASE, distill_features=1.0)
    with pytest.raises(TaskError, match=r"dense model as a teacher of features; got experts alone; set finetune\.dist"):
        finetune(student, None, task, config, seed=0, workdir=tmp_path, experts={"metre": Expert("size")})


def test_nothing_is_left_on_the_models(task: LoadedTask, tmp_path: Path) -> None:
    student, dense, plan = pruned(task)
    expert = Expert("size").train()
    before = {id(model): toy(task).everything(model) for model in (dense, expert)}
    config = FinetuneConfig(**BASE, distill_features=1.0)
    finetune(student, dense, task, config, seed=0, workdir=tmp_path, plan=plan, experts={"metre": expert})
    for model in (student, dense, expert):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for model in (dense, expert):
        assert same(before[id(model)], toy(task).everything(model))
        assert all(parameter.grad is None for parameter in model.parameters())
    assert expert.training


def fit(self: Any, model: nn.Module, steps: int, hooks: FitHooks) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step, batch in enumerate(list(self.batches("train", 0))[:steps]):
        optimizer.zero_grad()
        taught = hooks.loss(model(**batch.inputs), batch)
        taught.backward()
        optimizer.step()
        hooks.after_step()
        hooks.progress(step + 1, {"taught": float(taught.detach())})


def test_the_users_own_fit_is_taught_features_too(
    task: LoadedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(task.user), "fit", fit, raising=False)
    options = {"steps": 6, "distill_weight": 1e-9, "distill_features": 1.0}
    taught = [point["losses"]["taught"] for point in train(task, tmp_path, options)[0].history]
    assert taught[0] > 0.01
    assert taught[-1] < 0.2 * taught[0], "the weight falls with the steps that the hooks were told of"


# --- experts ------------------------------------------------------------------------------------------------------


def distiller(task: LoadedTask, dense: nn.Module | None, **experts: nn.Module) -> Distiller:
    return Distiller(teacher=dense, task=task, temperature=2.0, experts=experts)


def test_each_output_is_taught_by_its_expert_and_the_others_by_the_dense_model(task: LoadedTask) -> None:
    _, dense = toy(task).models()
    expert = Expert("size").eval()
    both = distiller(task, dense, metre=expert)
    both.measure_scales(0, CPU)
    inputs = next(task.batches("train", 9)).inputs
    wanted = both.outputs(inputs)
    assert torch.equal(wanted["size"], expert(**inputs)["size"])
    assert torch.equal(wanted["logits"], dense.eval()(**inputs)["logits"])
    seen = torch.cat([expert(**batch.inputs)["size"] for batch in list(task.batches("train", 0))[:4]])
    assert both.scales["size"] == pytest.approx(float(seen.detach().std(correction=0)), rel=1e-4)


def test_the_dense_model_does_not_run_where_experts_teach_everything(task: LoadedTask) -> None:
    _, dense = toy(task).models()
    full = distiller(task, dense, metre=Expert("size"), eye=Expert("logits"))
    full.measure_scales(0, CPU)
    calls: list[int] = []
    dense.register_forward_hook(lambda *_: calls.append(1))
    inputs = next(task.batches("train", 9)).inputs
    assert set(full.outputs(inputs)) == {"size", "logits"}
    assert not calls
    half = distiller(task, dense, metre=Expert("size"))
    half.measure_scales(0, CPU)
    half.outputs(inputs)
    assert calls


def test_experts_alone_teach_what_they_return(task: LoadedTask, tmp_path: Path) -> None:
    student, _ = toy(task).models()
    config = FinetuneConfig(**BASE)
    result = finetune(student, None, task, config, seed=0, workdir=tmp_path, experts={"metre": Expert("size")})
    assert set(result.final_losses) == {"class", "size", "distill.size"}
    assert result.final_losses["distill.size"] > 0
    taught = distiller(task, None, metre=Expert("size"))
    taught.measure_scales(0, CPU)
    inputs = next(task.batches("train", 9)).inputs
    student.eval()
    assert set(taught.losses(student(**inputs), taught.outputs(inputs))) == {"distill.size"}


def test_an_expert_of_one_tensor_does_not_change_what_the_task_sees(task: LoadedTask) -> None:
    _, dense = toy(task).models()
    plain = nn.Module()
    plain.forward = lambda image, points: points.mean((1, 2))[:, None]
    only = distiller(task, None, eye=plain)
    inputs = next(task.batches("train", 9)).inputs
    task.as_dict(dense(**inputs))
    assert list(only.outputs(inputs)) == ["output"]
    assert task.single_output is False


def test_experts_that_do_not_fit_are_refused(task: LoadedTask) -> None:
    _, dense = toy(task).models()
    inputs = next(task.batches("train", 9)).inputs
    with pytest.raises(TaskError, match=r"one expert; got 'size' from 'a' and 'b'; let Toy\.build_expert return"):
        distiller(task, dense, a=Expert("size"), b=Expert("logits", "size")).outputs(inputs)
    with pytest.raises(TaskError, match=r"'a' to return outputs of the dense model, \['logits', 'size'\]; got 'extra'"):
        distiller(task, dense, a=Expert("extra")).outputs(inputs)
    student = {"logits": torch.zeros(6, 3), "size": torch.zeros(6, 2)}
    alone = distiller(task, None, a=Expert("size"))
    with pytest.raises(TaskError, match=r"student and experts to return the same outputs; got \{'size': \(6, 2\)\}"):
        alone.losses(student, alone.outputs(inputs))


def test_a_dead_branch_that_an_expert_lacks_is_no_fault(
    task: LoadedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(type(task.user), "inputs_by_modality")
    result, _ = train(task, tmp_path, {"modality_dropout": 0.99, "steps": 4}, experts={"metre": Expert("size")})
    assert result.steps == 4


# --- weights of losses --------------------------------------------------------------------------------------------


def test_losses_are_reported_without_their_weights(task: LoadedTask, tmp_path: Path) -> None:
    plain, weighed = (
        train(task, tmp_path / str(k), {"steps": 1, "loss_weights": weights})[0].final_losses
        for k, weights in enumerate(("fixed", {"class": 7.0}))
    )
    assert plain == weighed


def test_a_factor_of_zero_silences_a_loss(task: LoadedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = {"distill": False, "loss_weights": {"size": 0.0}}
    _, silenced = train(task, tmp_path / "a", quiet)
    original = type(task.user).losses

    def without(self: Any, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        return {"class": original(self, outputs, batch)["class"]}

    monkeypatch.setattr(type(task.user), "losses", without)
    _, alone = train(task, tmp_path / "b", {"distill": False})
    torch.testing.assert_close(silenced.get_parameter("camera.0.weight"), alone.get_parameter("camera.0.weight"))


def test_uncertainty_lowers_the_weight_of_a_loss_that_stays_large(
    task: LoadedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = type(task.user).losses

    def loud(self: Any, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        losses = original(self, outputs, batch)
        return {"class": losses["class"], "size": losses["size"] + 50.0}

    monkeypatch.setattr(type(task.user), "losses", loud)
    result, _ = train(task, tmp_path, {"loss_weights": "uncertainty", "steps": 40})
    weights = result.history[-1]["weights"]
    assert weights["size"] < 0.5
    assert weights["size"] < weights["class"]
    assert set(weights) == {"class", "size"}
