"""Experts and features as a recipe names them: found before anything is spent, part of the key, and taught."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fusepress.pipeline.api import common_facts, make_context
from fusepress.pipeline.console import Reporter
from fusepress.pipeline.errors import CheckpointError, RecipeError, TaskError
from fusepress.pipeline.graph.apply import apply_plan
from fusepress.pipeline.graph.groups import find_groups
from fusepress.pipeline.recipe import FinetuneConfig, load_recipe
from fusepress.pipeline.stages.base import Context
from fusepress.pipeline.stages.finetune import Finetune, train
from fusepress.pipeline.stages.sparsify import Sparsify
from fusepress.pipeline.stages.teachers import check_teaching, expert_models
from fusepress.pipeline.store import content_key
from fusepress.pipeline.task import first_batch

TASK = """
class Metre(nn.Module):
    def __init__(self):
        super().__init__()
        self.size = nn.Linear(4, 1)

    def forward(self, image, points):
        return {"size": self.size(points.mean(1))}


class Taught(Toy):
    def build_expert(self, name):
        return {"metre": Metre}[name]()
"""
RECIPE: dict[str, Any] = {
    "task": "toy.py:Taught",
    "checkpoint": "dense.safetensors",
    "target": "jetson-agx-orin-64gb",
    "finetune": {"steps": 3, "distill_features": 1.0, "teachers": {"metre": "metre.safetensors"}},
    "sparsify": {"pattern": "2:4", "steps": 2},
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    source = (Path(__file__).parent / "recovery_toy.py").read_text()
    (tmp_path / "toy.py").write_text(source + TASK)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    torch.manual_seed(0)
    save_file({"size.weight": torch.randn(1, 4), "size.bias": torch.randn(1)}, tmp_path / "metre.safetensors")
    ctx = context(tmp_path, "checkpoint=metre.safetensors")
    save_file(ctx.task.build_model().state_dict(), tmp_path / "dense.safetensors")
    return tmp_path


def context(project: Path, *overrides: str) -> Context:
    return make_context(load_recipe(project / "recipe.yaml", overrides), Reporter(quiet=True))


def test_the_finetune_stage_teaches_by_expert_and_by_the_channels_that_the_plan_kept(project: Path) -> None:
    ctx = context(project)
    ctx.add_artifact("dense_weights", project / "dense.safetensors")
    dense = ctx.task.build_model()
    dense.load_state_dict(load_file(project / "dense.safetensors"))
    graph = find_groups(dense, first_batch(ctx.task, "calib").inputs, ctx.task.branches, blocks=False)
    plan = graph.plan({group.id: range(0, group.width, 2) for group in graph.groups})
    (project / "plan.json").write_text(plan.to_json())
    ctx.add_artifact("plan", project / "plan.json")
    student = apply_plan(copy.deepcopy(dense), plan)
    assert ctx.recipe.finetune is not None
    details = train(ctx, student, ctx.recipe.finetune, project / "work")
    losses = details["final_losses"]
    assert {"distill.logits", "distill.size", "distill.features.camera", "distill.features.lidar"} < set(losses)
    expert = expert_models(ctx, ctx.recipe.finetune)["metre"]
    batch = first_batch(ctx.task, "eval")
    expected = batch.inputs["points"].mean(1) @ load_file(project / "metre.safetensors")["size.weight"].T
    bias = load_file(project / "metre.safetensors")["size.bias"]
    torch.testing.assert_close(expert(**batch.inputs)["size"], expected + bias)
    assert not expert.training
    assert expert_models(ctx, FinetuneConfig(distill=False)) == {}


def test_processes_that_share_a_run_must_have_the_same_experts_and_target(project: Path) -> None:
    facts = common_facts(context(project))
    assert common_facts(context(project)) == facts
    save_file({"size.weight": torch.ones(1, 4), "size.bias": torch.ones(1)}, project / "metre.safetensors")
    other = common_facts(context(project, "target=jetson-agx-orin-32gb"))
    assert {name for name in facts if facts[name] != other[name]} == {"recipe", "target profile", "teacher.metre"}


@pytest.mark.parametrize("stage", [Finetune(), Sparsify()], ids=["finetune", "sparsify"])
def test_an_experts_weights_are_part_of_the_key_and_their_place_is_not(project: Path, stage: Any) -> None:
    before = content_key(stage.key_parts(context(project)))
    assert content_key(stage.key_parts(context(project))) == before
    save_file({"size.weight": torch.ones(1, 4), "size.bias": torch.ones(1)}, project / "metre.safetensors")
    after = content_key(stage.key_parts(context(project)))
    assert after != before
    (project / "moved").mkdir()
    (project / "metre.safetensors").rename(project / "moved" / "metre.safetensors")
    moved = context(project, f"finetune.teachers.metre={project}/moved/metre.safetensors")
    assert content_key(stage.key_parts(moved)) == after


def test_what_is_missing_is_told_before_anything_is_spent(project: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"weights of the expert 'metre'; got no file at .*gone\.safetensors; corr"
    ):
        context(project, "finetune.teachers.metre=gone.safetensors")
    with pytest.raises(
        TaskError, match=r"Toy\.build_expert\(name\), because the recipe's finetune\.teachers names metre"
    ):
        context(project, "task=toy.py:Toy")
    ctx = context(project, "finetune.teachers.ruler=metre.safetensors")
    assert ctx.recipe.finetune is not None
    with pytest.raises(TaskError, match=r"Taught\.build_expert to make the expert 'ruler'; got KeyError: 'ruler'"):
        expert_models(ctx, ctx.recipe.finetune)


def test_teaching_is_tried_on_one_batch_before_anything_is_spent(project: Path) -> None:
    check_teaching(context(project))
    check_teaching(context(project, "finetune=null"))
    with pytest.raises(
        RecipeError, match=r"distill_points` to name modules of the model; got 'fuser'; .* \['camera', 'l"
    ):
        check_teaching(context(project, "finetune.distill_points=[fuser]"))
    save_file({"weight": torch.ones(1, 4)}, project / "other.safetensors")
    with pytest.raises(
        CheckpointError, match=r"a checkpoint of Metre; got another architecture at .*other\.safetensors"
    ):
        check_teaching(context(project, "finetune.teachers.metre=other.safetensors"))
    source = (project / "toy.py").read_text()
    (project / "toy.py").write_text(source.replace('{"size": self.size', '{"width": self.size'))
    with pytest.raises(TaskError, match=r"'metre' to return outputs of the dense model, .* got 'width'"):
        check_teaching(context(project))
    (project / "toy.py").write_text(source.replace("points.mean(1))", "points.mean(1)).expand(-1, 2)"))
    with pytest.raises(TaskError, match=r"the same outputs; got .*'size': \(2, 1\).* and .*'size': \(2, 2\)"):
        check_teaching(context(project))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["finetune.distill=false"],
            r"expected `distill: true` with `teachers`, `distill_features` or `reconstruct`; got false",
        ),
        (
            ["finetune.distill_features=0", "finetune.distill_points=[camera]"],
            r"expected `distill_features` above 0 with `distill_points`; got 0",
        ),
        (["finetune.loss_weights=kendall"], r"expected fixed, uncertainty, gradnorm, or factors .*; got 'kendall'"),
        (
            ["finetune.loss_weights={size: -1}"],
            r"factors of at least 0 by loss, e\.g\. \{boxes: 0\.5\}; got \{'size': -1\}",
        ),
        (
            ["finetune.compile=true"],
            r"expected `compile: false` with `distill_features` and with `loss_weights: gradnorm`; got true",
        ),
        (["finetune.distill_feature=1"], r"did you mean `distill_features`\?"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(project: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(project / "recipe.yaml", overrides)


def test_factors_of_losses_can_be_given_on_the_command_line(project: Path) -> None:
    recipe = load_recipe(project / "recipe.yaml", ["finetune.loss_weights.size=0.5"]).recipe
    assert recipe.finetune is not None
    assert recipe.finetune.loss_weights == {"size": 0.5}
