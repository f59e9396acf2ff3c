"""The qat stage (pipeline/stages/qat.py): what it trains, what the release gets of it, and what it leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusepress.calib.qat import TrainedScales, placement_of
from fusepress.calib.quantize import draft_qdq
from fusepress.export.onnx import export_onnx, load_onnx
from fusepress.pipeline.api import preflight
from fusepress.pipeline.errors import RecipeError, TaskError
from fusepress.pipeline.evidence import RunRecord
from fusepress.pipeline.graph.fakequant import fake_quantised
from fusepress.pipeline.graph.masks import load_masks
from fusepress.pipeline.recipe import FinetuneConfig, load_recipe
from fusepress.pipeline.recovery.finetune import finetune
from fusepress.pipeline.stages.qat import Qat, training_section
from fusepress.pipeline.stages.quantize import Quantize
from fusepress.pipeline.store import Store
from fusepress.pipeline.task import load_task
from tests.quantize_runs import context_of, int8_recipe, run_some, stage_of
from tests.recovery_runs import Killed, kill_at, same, toy_project
from tests.sparsify_toy import Net

RECIPE = int8_recipe("sparsify_toy.py:Toy", method="max", search=False, sensitivity=False)
RECIPE["finetune"] = {"steps": 0, "distill": True}
CHAIN = ("baseline", "sparsify", "qat", "export", "quantize")
OUTLIER = 150.0


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained toy, and the same function with one outlier channel in each branch, which no range of INT8 suits."""
    folder = toy_project(tmp_path_factory.mktemp("qat"), RECIPE, steps=60)
    weights = load_file(folder / "dense.safetensors")
    for norm, following in (("camera.0.1", "camera.1.0"), ("lidar.0.1", "lidar.1.0")):
        weights[f"{norm}.weight"][0] *= OUTLIER
        weights[f"{norm}.bias"][0] *= OUTLIER
        weights[f"{following}.weight"][:, 0] /= OUTLIER
    save_file(weights, folder / "outlier.safetensors")
    return folder


def ran(project: Path, name: str, *overrides: str, names: tuple[str, ...] = CHAIN) -> tuple[RunRecord, Path]:
    return run_some(project, name, names, *overrides)


def accuracy(record: RunRecord, name: str) -> float:
    return next(m.value for m in stage_of(record, name).measurements if m.name == "accuracy.accuracy")


def test_no_steps_release_the_bytes_that_calibration_alone_releases(project: Path) -> None:
    """By modelopt's own method too, whose scales are no limit over 127."""
    _, alone = ran(project, "ptq", "quantize.method=entropy")
    record, trained = ran(project, "zero", "quantize.method=entropy", "qat={steps: 0, ranges: learned}")
    assert (alone / "quantize/model.onnx").read_bytes() == (trained / "quantize/model.onnx").read_bytes()
    assert stage_of(record, "qat").details["not_followed"] == {}
    assert stage_of(record, "qat").details["followed_nodes"] > 5


def test_what_an_outlier_costs_training_wins_back(project: Path) -> None:
    options = ("checkpoint=outlier.safetensors",)
    ptq, _ = ran(project, "outlier", *options)
    qat, folder = ran(project, "outlier-qat", *options, "qat={steps: 40, lr: 1.0e-3, ranges: learned}")
    lost = accuracy(ptq, "baseline") - accuracy(ptq, "quantize")
    kept = accuracy(qat, "baseline") - accuracy(qat, "quantize")
    assert lost > 0.05
    assert kept < 0.3 * lost
    details = stage_of(qat, "qat").details
    assert details["calib"]["after"]["accuracy"] > details["calib"]["before"]["accuracy"] + 0.5 * lost
    # what torch said of the quantised model is what ONNX Runtime says of the released file, up to its FP16 remainder
    assert accuracy(qat, "qat") == pytest.approx(accuracy(qat, "quantize"), abs=0.01)
    assert {m.precision for m in stage_of(qat, "qat").measurements if m.name == "accuracy.accuracy"} == {"int8"}
    coverage = stage_of(qat, "quantize").details["coverage"]
    assert coverage["method"] == "max, then learned in training"
    scales = TrainedScales.read(folder / "qat/scales.json").scales
    assert min(scales.values()) > 0


def test_the_pattern_survives_training_to_the_last_bit(project: Path) -> None:
    options = ('sparsify={pattern: "2:4", recover: none}', "qat={steps: 4, lr: 1.0e-2}")
    record, folder = ran(project, "sparse", *options)
    masks = load_masks(folder / "sparsify/masks.safetensors")
    trained, start = load_file(folder / "qat/qat.safetensors"), load_file(folder / "sparsify/sparse.safetensors")
    for name, mask in masks.items():
        assert (trained[name][~mask] == 0).all()
        assert not torch.equal(trained[name], start[name])
    statistics = [name for name in start if "running" in name or "num_batches" in name]
    assert all(torch.equal(trained[name], start[name]) for name in statistics)
    sparsity = stage_of(record, "quantize").details["sparsity"]
    assert sparsity["masked_confirmed"] == len(masks) - len(sparsity["masked_not_exported"]) > 0


def test_where_nothing_is_left_quantised_the_model_of_before_is_released(project: Path) -> None:
    """A limit of 0 below the float model, which the task's own metric of agreement with it cannot meet."""
    record, folder = ran(
        project,
        "float",
        "checkpoint=outlier.safetensors",
        "qat={steps: 2, lr: 1.0e-5}",
        "quantize={precision: int8, samples: 8, method: max, max_drop: 0.0, sensitivity: false}",
    )
    details = stage_of(record, "quantize").details
    assert details["ladder"]["rung"] == "float"
    before = load_file(folder / "qat/before.safetensors")
    released = load_file(folder / record.artifacts["checkpoint"].path)
    assert same(before, released)
    assert not same(before, load_file(folder / "qat/qat.safetensors"))
    assert "the release is the model of before qat" in details["note"]


def test_a_killed_training_ends_with_the_same_weights_and_steps(project: Path, tmp_path: Path) -> None:
    task = load_task("sparsify_toy.py:Toy", base=project)
    batch = next(task.batches("calib", 0))
    example = {name: value[:4] for name, value in batch.inputs.items()}
    start = load_file(project / "outlier.safetensors")
    model = Net().eval()
    model.load_state_dict(start)
    export_onnx(model, example, ["output"], tmp_path / "model.onnx", opset=18)
    draft = draft_qdq(tmp_path / "model.onnx", {name: value.numpy() for name, value in example.items()})
    placement = placement_of(draft, 2)
    samples = [{name: value[i : i + 1] for name, value in example.items()} for i in range(2)]
    config = FinetuneConfig(steps=6, lr=1e-3, checkpoint_every=2, freeze_batchnorm=True, distill=False)

    def train(work: Path, **options: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
        model = Net().eval()
        model.load_state_dict(start)
        with fake_quantised(model, placement, samples, learn=True) as quantised:
            finetune(model, None, task, config, seed=1, workdir=work, **options)
            steps = quantised.steps()
        return dict(model.state_dict()), steps

    whole, steps = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "killed", progress=kill_at(5))
    resumed, resumed_steps = train(tmp_path / "killed")
    assert same(whole, resumed)
    assert steps == resumed_steps
    drafted = dict(
        zip(
            (t for ts in placement.groups for t in ts),
            np.repeat(placement.steps, [len(ts) for ts in placement.groups]),
            strict=True,
        )
    )
    assert any(steps[tensor] != float(step) for tensor, step in drafted.items())


# --- keys and mistakes ------------------------------------------------------------------------------------------------


def test_keys_follow_what_the_stage_reads(project: Path) -> None:
    def key(*overrides: str) -> str:
        ctx = context_of(project, "qat={steps: 5}", *overrides)
        return json.dumps(Qat().key_parts(ctx).config, sort_keys=True)

    unread = ("quantize.sensitivity=true", "gates.accuracy.max_drop=0.1", "finetune.steps=7", "finetune.reconstruct=4")
    assert key() == key(*unread)
    for other in ("qat.ranges=learned", "qat.lr=0.01", "quantize.method=mse", "quantize.samples=4", "finetune.ema=0.5"):
        assert key() != key(other)
    assert key() != key("quantize.exclude=[head]")


def test_training_follows_the_finetune_section_but_for_its_norms(project: Path) -> None:
    options = ["qat={steps: 5, lr: 0.5}", "finetune={steps: 9, ema: 0.5, distill_features: 1.0}"]
    ctx = context_of(project, *options)
    section = training_section(ctx)
    assert (section.steps, section.lr, section.ema, section.freeze_batchnorm) == (5, 0.5, 0.5, True)
    assert section.distill_features == 1.0
    permuted = 'sparsify={pattern: "2:4", permute: true}'
    ctx = context_of(project, *options, permuted)
    assert training_section(ctx).distill_features == 0.0


def test_qat_without_a_quantised_release_is_refused(project: Path) -> None:
    for precision in ("quantize.precision=fp16", "quantize=null"):
        with pytest.raises(RecipeError, match=r"expected `quantize\.precision` int8 or fp8 with `qat`"):
            load_recipe(project / "recipe.yaml", ["qat={steps: 5}", precision])
    with pytest.raises(RecipeError, match=r"expected `finetune\.shard: none` with `qat`"):
        load_recipe(project / "recipe.yaml", ["qat={steps: 5}", "finetune.shard=fsdp2"])
    with pytest.raises(RecipeError, match="expected method auto, max or percentile with precision fp8; got mse"):
        load_recipe(project / "recipe.yaml", ["quantize.precision=fp8", "quantize.method=mse"])
    (project / "model.onnx").write_bytes(b"")
    with pytest.raises(RecipeError, match="expected a torch checkpoint for finetune, qat; got the ONNX file"):
        context_of(project, "qat={steps: 5}", "checkpoint=model.onnx")


UNLABELLED = """
from dataclasses import replace

import torch
from sparsify_toy import Toy


class Unlabelled(Toy):
    def batches(self, split, seed, **options):
        for batch in super().batches(split, seed, **options):
            yield replace(batch, targets={TARGETS}) if split == "calib" else batch


class Empty(Toy):
    def batches(self, split, seed, **options):
        return iter(()) if split == "calib" else super().batches(split, seed, **options)


class Dead(Toy):
    def batches(self, split, seed, **options):
        for batch in super().batches(split, seed, **options):
            blank = {**batch.inputs, "scan": torch.zeros_like(batch.inputs["scan"])}
            yield replace(batch, inputs=blank) if split == "calib" else batch
"""


@pytest.mark.parametrize("targets", ["{}", '{"label": batch.targets["label"][:0]}'])
def test_a_calib_split_without_targets_fails_before_anything_is_spent(project: Path, targets: str) -> None:
    name = f"unlabelled_{len(targets)}"
    (project / f"{name}.py").write_text(UNLABELLED.replace("{TARGETS}", targets))
    store = Store(project / "runs" / f".{name}")
    options = [f"task={name}.py:Unlabelled", "quantize.search=true"]
    ctx = context_of(project, *options)
    with pytest.raises(TaskError, match=r"expected targets in the calib split .*; give its samples targets, or set"):
        preflight(ctx, store)
    ctx = context_of(project, options[0])
    preflight(ctx, store)  # nothing is judged on the split


def test_a_calib_split_that_no_range_can_be_measured_on_fails_before_anything_is_spent(project: Path) -> None:
    (project / "unlabelled.py").write_text(UNLABELLED.replace("{TARGETS}", "{}"))
    for kind, message in (("Empty", "to yield at least one batch; got none"), ("Dead", "lidar blank in all 8")):
        ctx = context_of(project, f"task=unlabelled.py:{kind}")
        with pytest.raises(TaskError, match=message):
            preflight(ctx, Store(project / "runs" / f".{kind}"))


# --- FP8 under the same ladder ----------------------------------------------------------------------------------------


def test_fp8_is_searched_and_trained_as_int8_is(project: Path) -> None:
    fp8 = (
        "target=jetson-agx-thor-t5000",
        "checkpoint=outlier.safetensors",
        "quantize={precision: fp8, samples: 8}",
        "qat={steps: 2}",
    )
    record, folder = ran(project, "fp8", *fp8)
    details = stage_of(record, "quantize").details
    assert details["ladder"]["rung"] == "fp8"
    assert "units in FP8" in details["ladder"]["reason"]
    assert details["precision"] == "fp8"
    reasons = {row["name"]: row["reason"] for row in details["coverage"]["layers"] if row["precision"] != "fp8"}
    assert "too few channels or a kernel without fp8 support" in reasons["camera.1.0/Conv"]  # 16 to 24
    assert {row["branch"] for row in details["sensitivity"]["branches"]} == {"fusion"}
    assert 0.2 < details["coverage"]["macs_share"] < 1
    assert stage_of(record, "qat").details["choice"].keys() >= {"output_error_by_max_percent"}
    assert "output_error_by_mse_percent" not in stage_of(record, "qat").details["choice"]
    assert accuracy(record, "qat") == pytest.approx(accuracy(record, "quantize"), abs=0.01)
    kinds = {t.data_type for t in load_onnx(folder / "quantize/model.onnx").graph.initializer if "zero_point" in t.name}
    assert kinds == {17}  # FLOAT8E4M3FN


# --- the same bytes ---------------------------------------------------------------------------------------------------

SCRIPT = """
import hashlib, json, sys
from pathlib import Path

from fusepress.pipeline.api import make_context, new_record
from fusepress.pipeline.console import Reporter
from fusepress.pipeline.recipe import load_recipe
from fusepress.pipeline.runner import run_stages
from fusepress.pipeline.stages import STAGES

folder = Path(sys.argv[2])
ctx = make_context(load_recipe(Path(sys.argv[1]), sys.argv[3:]), Reporter(quiet=True))
names = ("baseline", "sparsify", "qat", "export", "quantize")
run_stages(ctx, [s for s in STAGES if s.name in names], new_record(ctx, folder, ""), folder)
print(json.dumps({str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
                  for p in sorted(folder.rglob("*")) if p.suffix in (".onnx", ".safetensors")}))
"""


def test_two_processes_with_other_hash_seeds_write_the_same_bytes(project: Path) -> None:
    """Through sparsify, qat, slim and quantise; each in a store of its own."""
    (project / "once.py").write_text(SCRIPT)
    options = ['sparsify={pattern: "2:4", permute: true, steps: 2}', "qat={steps: 2, ranges: learned}"]
    options += ["quantize={precision: int8, samples: 8, search: false, sensitivity: false}"]
    found = []
    for seed in ("1", "77"):
        command = [sys.executable, "once.py", "recipe.yaml", str(project / f"seed-{seed}" / "run"), *options]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        made = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr
        found.append(json.loads(made.stdout.splitlines()[-1]))
    assert found[0] == found[1]
    assert {"sparsify/sparse.safetensors", "export/model.onnx", "quantize/model.onnx"} <= found[0].keys()


def test_the_quantised_file_reads_the_scales(project: Path) -> None:
    ctx = context_of(project, "qat={steps: 5}")
    path = project / "scales.json"
    TrainedScales(precision="int8", method="max", scales={"image": 0.1}).write(path)
    before = Quantize().key_parts(ctx).inputs
    ctx.add_artifact("scales", path)
    assert Quantize().key_parts(ctx).inputs == {**before, "scales": ctx.shas["scales"]}
