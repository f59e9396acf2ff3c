"""The sparsify stage under every way to choose and recover, down to the INT8 file."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import fusepress
from fusepress.pipeline.api import make_context, new_record, preflight
from fusepress.pipeline.console import Reporter
from fusepress.pipeline.distributed import rank
from fusepress.pipeline.errors import ExportError, RecipeError, StageError
from fusepress.pipeline.evidence import RunRecord
from fusepress.pipeline.graph.masks import (
    MaskHolder,
    load_masks,
    save_masks,
    violations_2to4,
    weights_unstructured,
)
from fusepress.pipeline.recipe import load_recipe
from fusepress.pipeline.recovery.checkpoint import tensors_sha256
from fusepress.pipeline.recovery.placement import all_tensors
from fusepress.pipeline.runner import run_stages
from fusepress.pipeline.stages import STAGES
from fusepress.pipeline.stages.base import Context
from fusepress.pipeline.stages.common import current_model
from fusepress.pipeline.stages.export import confirmed_sparsity
from fusepress.pipeline.stages.masking import Masked, layer_table, mask_model, sparsity_facts
from fusepress.pipeline.stages.sparsify import section
from fusepress.pipeline.store import Store
from tests.ranks import run_ranks
from tests.recovery_runs import toy_project

RECIPE: dict[str, Any] = {
    "task": "sparsify_toy.py:Toy",
    "checkpoint": "dense.safetensors",
    "target": "jetson-agx-orin-64gb",
    "score": {"method": "taylor", "batches": 2},
    "prune": {"macs": 0.7, "align": 8},
    "finetune": {"steps": 0},
    "sparsify": {"steps": 6, "lr": 1e-3, "samples": 8},
    "quantize": {"precision": "int8", "samples": 8, "method": "max"},
}
TRAINED = ("baseline", "score", "prune", "sparsify")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_project(tmp_path_factory.mktemp("sparsify"), RECIPE, steps=40)


def compress(
    project: Path, name: str, *overrides: str, stages: tuple[str, ...] = TRAINED
) -> tuple[RunRecord, Context, Path]:
    """The stages up to the one in question; the store is shared, so what they have in common is made once."""
    loaded = load_recipe(project / "recipe.yaml", [f"sparsify.{text}" for text in overrides])
    ctx = make_context(loaded, Reporter(quiet=True))
    folder = project / "runs" / name
    preflight(ctx, Store(folder.parent / ".store"))
    record = new_record(ctx, folder, "")
    run_stages(ctx, [stage for stage in STAGES if stage.name in stages], record, folder)
    return record, ctx, folder


def details_of(record: RunRecord, stage: str = "sparsify") -> dict[str, Any]:
    found = record.stage(stage)
    assert found is not None
    return found.details


@pytest.fixture(scope="module")
def released(project: Path) -> tuple[RunRecord, Context, Path]:
    """Everything at once: permuted, chosen by SparseGPT, recovered by SparseLoRA, exported, quantised."""
    options = ("choose=sparsegpt", "permute=true", "recover=sparselora", "max_trainable=0.2")
    return compress(project, "int8", *options, stages=(*TRAINED, "export", "quantize"))


def test_every_masked_layer_is_found_in_the_int8_file_by_both_checkers(
    released: tuple[RunRecord, Context, Path],
) -> None:
    record, _, _ = released
    masked = [row["param"] for row in details_of(record)["layers"] if row["status"] == "masked"]
    assert len(masked) == 7
    for stage in ("export", "quantize"):
        facts = details_of(record, stage)["sparsity"]
        assert facts["masked"] == facts["masked_confirmed"] == len(masked)
        assert facts["masked_not_exported"] == []
        assert facts["polygraphy_layers"] >= len(masked)


def test_at_most_two_of_four_are_not_zero_in_torch_and_in_the_file(released: tuple[RunRecord, Context, Path]) -> None:
    _, ctx, _ = released
    masks = load_masks(ctx.artifacts["masks"])
    model = fusepress.load(ctx.task.build_model(), ctx.artifacts["plan"], ctx.artifacts["weights"])
    for name, mask in masks.items():
        weight = model.get_parameter(name).detach()
        assert violations_2to4(weight) == 0
        assert not weight[~mask].view(torch.int32).any()
    proto = onnx.load(ctx.artifacts["onnx"])
    tensors = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    seen = 0
    for name in masks:  # convolutions keep their weights' names through Q/DQ, in torch's layout
        if name in tensors and tensors[name].ndim == 4:
            assert violations_2to4(torch.from_numpy(tensors[name].astype("float32"))) == 0
            seen += 1
    assert seen == 5


def test_the_report_says_what_was_kept_trained_and_reordered(released: tuple[RunRecord, Context, Path]) -> None:
    record, ctx, folder = released
    details = details_of(record)
    rows, facts = details["layers"], details["sparsity"]
    for row in rows:
        if row["status"] == "masked":
            assert row["density"] == 0.5
            assert 0.5 < row["kept_magnitude"] < 1
            assert row["error"] < row["error_magnitude"]
        else:
            assert row["reason"]
    assert facts["kept_after_permuting"] > facts["kept_before_permuting"]
    assert 0 < facts["sparselora"]["fraction"] <= 0.2
    assert set(facts["density"]) == {*ctx.task.branches, "fusion"}
    saved = json.loads((folder / "sparsify/permutation.json").read_text())
    widths = {group["id"]: group["kept"] for group in details_of(record, "prune")["groups"]}
    assert saved["orders"]
    for group, order in saved["orders"].items():
        assert sorted(order) == list(range(widths[group]))


def test_a_pattern_that_did_not_survive_is_refused(released: tuple[RunRecord, Context, Path], tmp_path: Path) -> None:
    _, ctx, _ = released
    masks = load_masks(ctx.artifacts["masks"])
    dense = next(
        row["param"] for row in details_of(released[0])["layers"] if "transposed" not in row.get("reason", "x")
    )
    masks[dense] = torch.ones(1, dtype=torch.bool)
    save_masks(masks, tmp_path / "masks.safetensors")
    before = ctx.artifacts["masks"]
    try:
        ctx.artifacts["masks"] = tmp_path / "masks.safetensors"
        with pytest.raises(ExportError, match="expected 2:4 in every masked layer; got 1 without it"):
            confirmed_sparsity(ctx.artifacts["onnx"], ctx)
    finally:
        ctx.artifacts["masks"] = before


@pytest.fixture(scope="module")
def pruned(released: tuple[RunRecord, Context, Path]) -> Context:
    """The run up to the pruned model."""
    _, ctx, folder = released
    before = make_context(load_recipe(ctx.loaded.path), Reporter(quiet=True))
    for name in ("dense_weights", "groups", "plan"):
        before.add_artifact(name, ctx.artifacts[name])
    before.add_artifact("weights", folder / "prune/pruned.safetensors")
    return before


def mask(pruned: Context, *overrides: str) -> tuple[Context, nn.Module, Masked]:
    """The pruned model as the stage masks it, before recovery."""
    loaded = load_recipe(pruned.loaded.path, [f"sparsify.{text}" for text in overrides])
    ctx = make_context(loaded, Reporter(quiet=True))
    for name, path in pruned.artifacts.items():
        ctx.add_artifact(name, path)
    model = current_model(ctx)
    found = mask_model(ctx, model)
    MaskHolder(found.masks).check(model)
    return ctx, model, found


def test_each_criterion_chooses_other_weights_of_the_same_layers(pruned: Context) -> None:
    found = {choose: mask(pruned, f"choose={choose}") for choose in ("magnitude", "score", "sparsegpt")}
    masks = {choose: masked.masks for choose, (_, _, masked) in found.items()}
    names = set(masks["magnitude"])
    assert all(set(other) == names for other in masks.values())
    for one, other in itertools.combinations(masks.values(), 2):
        assert any(not torch.equal(one[name], other[name]) for name in names)
    before = current_model(pruned)
    for choose, (_, model, masked) in found.items():
        for name, kept in masked.masks.items():
            old, new = before.get_parameter(name)[kept], model.get_parameter(name)[kept]
            assert torch.equal(old, new) == (choose != "sparsegpt")  # which makes up for what went
            assert masked.magnitude[name] <= found["magnitude"][2].magnitude[name] + 1e-6


def test_the_function_does_not_change_where_channels_are_permuted(pruned: Context) -> None:
    _, model, found = mask(pruned, "permute=true", "choose=score")
    assert found.permutation is not None
    assert found.permutation.orders
    plain = mask(pruned, "choose=score")[2]
    with found.permutation.undone(model, found.masks):
        assert any(not torch.equal(found.masks[name], plain.masks[name]) for name in plain.masks)
        before = current_model(pruned)
        for name, kept in found.masks.items():
            assert torch.equal(model.get_parameter(name), before.get_parameter(name) * kept)


def test_modalities_that_are_not_named_stay_dense(pruned: Context) -> None:
    ctx, model, found = mask(pruned, "modalities=[camera]")
    assert found.masks
    assert all(name.startswith("camera") for name in found.masks)
    rows = layer_table(model, found)
    assert any(row.get("reason") == "lidar stays dense: it is not among sparsify.modalities" for row in rows)
    facts = sparsity_facts(rows, found, section(ctx))
    assert facts["density"]["lidar"] == facts["density"]["fusion"] == 1.0
    assert 0.5 < facts["density"]["camera"] < 0.6  # but for the first layer


def test_a_model_without_a_weight_that_can_be_masked_is_refused(pruned: Context) -> None:
    ctx, _, _ = mask(pruned)
    narrow = nn.ModuleDict({"camera": nn.Conv2d(3, 8, 1), "lidar": nn.Conv2d(2, 8, 1)})
    with pytest.raises(
        StageError, match=r"expected weights to mask in the pattern 2:4; got none \(2 input .*\) at ModuleDict; mask"
    ):
        mask_model(ctx, narrow)


@pytest.mark.parametrize("choose", ["magnitude", "sparsegpt"])
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("sparsity=0.7",), {"camera": 0.7, "lidar": 0.7, "fusion": 0.7}),
        (("spread={camera: 0.9, lidar: 0.5}",), {"camera": 0.9, "lidar": 0.5, "fusion": 0.0}),
    ],
    ids=["equal", "named"],
)
def test_unstructured_zeros_are_spread_as_the_recipe_says(
    pruned: Context, overrides: tuple[str, ...], expected: dict[str, float], choose: str
) -> None:
    ctx, model, found = mask(pruned, "pattern=unstructured", f"choose={choose}", *overrides)
    density = sparsity_facts(layer_table(model, found), found, section(ctx))["density"]
    assert density == {branch: pytest.approx(1 - sparsity, abs=0.01) for branch, sparsity in expected.items()}


def test_the_spread_is_searched_on_the_calib_split_at_equal_zeros(pruned: Context) -> None:
    _, model, found = mask(pruned, "pattern=unstructured", "sparsity=0.6", "spread=search", "scope=branch")
    assert found.search is not None
    values = [value for _, value in found.search.tried]
    assert len(values) > 3
    assert found.search.value == max(values)
    total = sum(weight.numel() for weight in weights_unstructured(model)[0].values())
    assert sum(int((~kept).sum()) for kept in found.masks.values()) == pytest.approx(0.6 * total, abs=3)


def masked_elsewhere(project: str) -> list[dict[str, Any]]:
    """What a rank goes on with; the others' weights are a little off, as other processors would round them."""
    found = []
    for overrides in (
        ("choose=sparsegpt", "permute=true"),
        ("pattern=unstructured", "spread={camera: 0.7, lidar: 0.4}"),
    ):
        loaded = load_recipe(Path(project) / "recipe.yaml", [f"sparsify.{text}" for text in overrides])
        ctx = make_context(loaded, Reporter(quiet=True))
        ctx.add_artifact("dense_weights", Path(project) / "dense.safetensors")
        model = current_model(ctx)
        generator = torch.Generator().manual_seed(rank())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05 * rank())
        masked = mask_model(ctx, model)
        MaskHolder(masked.masks).check(model)
        found.append(
            {
                "masks": tensors_sha256(masked.masks),
                "model": tensors_sha256(all_tensors(model)),
                "orders": masked.permutation.to_dict()["orders"] if masked.permutation else None,
                "rows": layer_table(model, masked),
            }
        )
    return found


def test_all_processes_go_on_with_the_masks_weights_and_order_of_rank_0(project: Path) -> None:
    lead, follower = run_ranks("tests.test_sparsify_stage:masked_elsewhere", timeout_s=300, project=str(project))
    assert lead == follower
    assert lead[0]["orders"]
    assert json.loads(json.dumps(masked_elsewhere(str(project)))) == lead  # rank 0 is not disturbed by the others


@pytest.mark.parametrize("choose", ["magnitude", "sparsegpt"])
def test_it_is_said_whose_masks_a_spread_is_judged_with(
    pruned: Context, caplog: pytest.LogCaptureFixture, choose: str
) -> None:
    ctx, model, found = mask(pruned, "pattern=unstructured", "sparsity=0.6", "spread=search", f"choose={choose}")
    said = sparsity_facts(layer_table(model, found), found, section(ctx))["spreads_judged"]
    logged = [record.getMessage() for record in caplog.records if "spread" in record.getMessage()]
    if choose == "magnitude":
        assert said == "by masks of magnitude, as those of the result are"
        assert not logged
        return
    assert said.startswith("by masks of magnitude, for dozens of SparseGPT's would take too long")
    assert logged == [f"the spread of zeros is judged {said}"]
    by_magnitude = mask(pruned, "pattern=unstructured", "sparsity=0.6", "spread=search")[2]
    assert found.search == by_magnitude.search
    assert any(not torch.equal(kept, by_magnitude.masks[name]) for name, kept in found.masks.items())


@pytest.mark.parametrize(
    "overrides",
    [("modalities=[radar]",), ("pattern=unstructured", "spread={radar: 0.5}")],
    ids=["2:4", "unstructured"],
)
def test_a_modality_that_the_task_does_not_have_is_refused(project: Path, overrides: tuple[str, ...]) -> None:
    loaded = load_recipe(project / "recipe.yaml", [f"sparsify.{text}" for text in overrides])
    with pytest.raises(RecipeError, match=r"expected `sparsify\.\w+` to name a branch of the task, .* got 'radar'"):
        make_context(loaded, Reporter(quiet=True))


def test_unstructured_zeros_survive_in_the_file(project: Path) -> None:
    options = ("pattern=unstructured", "sparsity=0.8", "recover=sparselora", "max_trainable=0.3")
    record, ctx, _ = compress(project, "zeros", *options, stages=(*TRAINED, "export"))
    layers = {layer["name"]: layer["zeros"] for layer in details_of(record, "export")["sparsity"]["layers"]}
    assert min(layers.values()) == pytest.approx(0.8, abs=0.05)
    none = {name: torch.zeros_like(mask) for name, mask in load_masks(ctx.artifacts["masks"]).items()}
    save_masks(none, ctx.artifacts["masks"])
    with pytest.raises(ExportError, match=r"expected 1\.0000 of .* to be zero; got 0\."):
        confirmed_sparsity(ctx.artifacts["onnx"], ctx)
