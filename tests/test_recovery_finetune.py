"""Fine-tuning: what it minimises, what it keeps, and that being killed changes nothing."""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from fusepress.pipeline.errors import TaskError, TrainingError
from fusepress.pipeline.graph.masks import MaskHolder, masks_2to4
from fusepress.pipeline.recipe import FinetuneConfig
from fusepress.pipeline.recovery.checkpoint import PREFIX
from fusepress.pipeline.recovery.finetune import (
    FinetuneResult,
    FitHooks,
    TrainProgress,
    finetune,
    learning_rate,
    reestimate_batchnorm,
)
from fusepress.pipeline.recovery.precision import SKIPS_IN_A_ROW, Amp
from fusepress.pipeline.task import Batch, LoadedTask, load_task
from tests.recovery_runs import Killed, kill_at, same, toy, trained

TESTS = Path(__file__).parent
STEPS = 23
CONFIG = FinetuneConfig(steps=STEPS, lr=0.01, checkpoint_every=5, modality_dropout=0.3, ema=0.9)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def task() -> LoadedTask:
    return load_task("recovery_toy.py:Toy", base=TESTS)


def train(
    task: LoadedTask, workdir: Path, config: FinetuneConfig = CONFIG, **options: Any
) -> tuple[FinetuneResult, dict[str, Tensor]]:
    return trained(task, workdir, config, **options)


# --- what it does -----------------------------------------------------------------------------------------------


def test_training_lowers_the_losses_and_reports_them(task: LoadedTask, tmp_path: Path) -> None:
    seen: list[TrainProgress] = []
    config = FinetuneConfig(steps=120, lr=0.01, distill_weight=0.01, checkpoint_every=1000)
    result, _ = train(task, tmp_path, config, progress=seen.append)
    assert [now.step for now in seen] == list(range(1, 121))
    assert all(now.steps == 120 and now.eta_s >= 0 for now in seen)
    assert set(result.final_losses) == {"class", "size", "distill.logits", "distill.size"}
    assert result.final_losses == seen[-1].losses == result.history[-1]["losses"]
    early, late = (
        sum(p["losses"]["class"] + p["losses"]["size"] for p in part) / 20
        for part in (result.history[:20], result.history[-20:])
    )
    assert late < 0.6 * early
    assert result.steps == 120
    assert result.resumed_from is None


def test_no_steps_leave_every_bit_alone(task: LoadedTask, tmp_path: Path) -> None:
    before = toy(task).everything(toy(task).models()[0])
    result, after = train(task, tmp_path, FinetuneConfig(steps=0))
    assert same(before, after)
    assert (result.steps, result.final_losses, result.history) == (0, {}, [])


def test_the_schedule_warms_up_and_ends_near_zero() -> None:
    config = FinetuneConfig(steps=100, lr=2.0, warmup=0.1)
    rates = [learning_rate(config, step) for step in range(100)]
    assert all(a < b for a, b in itertools.pairwise(rates[:11]))
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.001
    assert learning_rate(FinetuneConfig(steps=1, lr=2.0), 0) == 2.0


def reference(task: LoadedTask, config: FinetuneConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A plain loop without distillation and dropout: the last weights and their average."""
    model, _ = toy(task).models()
    model.drop.p = 0.0
    model.train()
    decayed = [p for n, p in model.named_parameters() if n in ("camera.0.weight", "lidar.0.weight", "head.weight")]
    decayed.append(model.size.weight)
    plain = [p for p in model.parameters() if all(p is not q for q in decayed)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    batches = [batch for epoch in range(4) for batch in task.batches("train", 3 + epoch)]
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.zero_grad()
        losses = task.losses(model(**batches[step].inputs), batches[step])
        (losses["class"] + losses["size"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        decay = min(config.ema, (step + 2) / (step + 11))
        average = {n: decay * average[n] + (1 - decay) * p.detach() for n, p in model.named_parameters()}
    return dict(model.named_parameters()), average


@pytest.mark.parametrize("ema", [0.0, 0.8])
def test_the_result_is_that_of_a_plain_loop_and_its_average(task: LoadedTask, tmp_path: Path, ema: float) -> None:
    config = FinetuneConfig(steps=20, lr=0.02, weight_decay=0.3, clip=0.5, ema=ema, distill=False)
    last, average = reference(task, config)
    student, _ = toy(task).models()
    student.drop.p = 0.0
    finetune(student, None, task, config, seed=3, workdir=tmp_path)
    wanted = average if ema else last
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=1e-5, atol=1e-6)
    apart = not torch.allclose(last["head.weight"], average["head.weight"], atol=1e-3)
    assert apart == (ema > 0), "the test tells the last weights from their average"


def test_distillation_brings_the_student_closer_to_the_teacher(task: LoadedTask, tmp_path: Path) -> None:
    batch = next(task.batches("eval", 77))
    gaps = []
    for weight in (0.0, 30.0):
        student, teacher = toy(task).models()
        config = FinetuneConfig(steps=60, lr=0.01, distill_weight=weight, checkpoint_every=1000)
        finetune(student, teacher, task, config, seed=0, workdir=tmp_path / str(weight))
        with torch.no_grad():
            outputs = student(**batch.inputs), teacher.eval()(**batch.inputs)
        gaps.append(float((outputs[0]["logits"] - outputs[1]["logits"]).abs().mean()))
    assert gaps[1] < 0.7 * gaps[0]


def test_the_teacher_is_left_as_it_was(task: LoadedTask, tmp_path: Path) -> None:
    student, teacher = toy(task).models()
    teacher.train()
    teacher.camera.eval()
    before = toy(task).everything(teacher)
    finetune(student, teacher, task, CONFIG, seed=3, workdir=tmp_path)
    assert same(before, toy(task).everything(teacher))
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert teacher.training
    assert not teacher.camera.training


def test_neither_the_callers_random_state_shapes_a_run_nor_the_run_it(task: LoadedTask, tmp_path: Path) -> None:
    results = []
    for number in (1, 2):
        torch.manual_seed(number)
        np.random.seed(number)  # noqa: NPY002
        random.seed(number)
        before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[index] # noqa: NPY002
        results.append(train(task, tmp_path / str(number))[1])
        after = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[index] # noqa: NPY002
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
        assert not torch.are_deterministic_algorithms_enabled()
    assert same(*results)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_trains_to_nearly_the_same(task: LoadedTask, tmp_path: Path, precision: str) -> None:
    _, full = train(task, tmp_path / "full")
    _, low = train(task, tmp_path / "low", precision=precision)
    assert all(value.dtype == full[name].dtype for name, value in low.items())
    assert not same(full, low)
    for name in ("head.weight", "camera.0.weight"):
        torch.testing.assert_close(low[name], full[name], rtol=0.2, atol=0.15)


def test_parameters_that_are_frozen_stay(task: LoadedTask, tmp_path: Path) -> None:
    student, teacher = toy(task).models()
    student.camera.requires_grad_(False)
    before = student.camera[0].weight.detach().clone()
    finetune(student, teacher, task, CONFIG, seed=3, workdir=tmp_path)
    assert torch.equal(student.camera[0].weight, before)


# --- masks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_masks_hold_through_training_and_its_resume(task: LoadedTask, tmp_path: Path, ema: float) -> None:
    config = CONFIG.model_copy(update={"ema": ema, "weight_decay": 0.1})
    masks, _ = masks_2to4(toy(task).models()[0])
    holder = MaskHolder(masks)
    _, straight = train(task, tmp_path / "a", config, masks=holder)
    with pytest.raises(Killed):
        train(task, tmp_path / "b", config, masks=holder, progress=kill_at(12))
    result, resumed = train(task, tmp_path / "b", config, masks=holder)
    assert result.resumed_from == 10
    assert same(straight, resumed)
    for name, mask in masks.items():
        assert int(straight[name][~mask].count_nonzero()) == 0
        assert int(straight[name][mask].count_nonzero()) == int(mask.sum())
    _, dense = train(task, tmp_path / "c", config)
    assert all(int((dense[name] == 0).sum()) == 0 for name in masks)


# --- killed and started again -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_killed_after_any_step_it_ends_with_the_same_bits(task: LoadedTask, tmp_path: Path, precision: str) -> None:
    straight, weights = train(task, tmp_path / "straight", precision=precision)
    for step in range(1, STEPS + 1, 1 if precision == "fp32" else 6):
        folder = tmp_path / str(step)
        with pytest.raises(Killed):
            train(task, folder, progress=kill_at(step), precision=precision)
        result, again = train(task, folder, precision=precision)
        assert result.resumed_from == ((step if step == STEPS else step // 5 * 5) or None)
        assert same(weights, again), f"killed after step {step}"
        assert result.history == straight.history
        assert result.final_losses == straight.final_losses
        assert len(list(folder.iterdir())) <= 4, "only the last two checkpoints are kept"


def test_a_process_killed_twice_by_sigkill_ends_with_the_same_bits(task: LoadedTask, tmp_path: Path) -> None:
    _, weights = train(task, tmp_path / "straight")
    folder = tmp_path / "killed"
    for step, code in ((8, -9), (17, -9), (-1, 0)):
        arguments = [str(folder), str(step), str(torch.get_num_threads()), CONFIG.model_dump_json()]
        done = subprocess.run([sys.executable, str(TESTS / "recovery_toy.py"), *arguments], capture_output=True)
        assert done.returncode == code, done.stderr.decode()
    assert same(weights, load_file(folder / "result.safetensors"))


def test_a_checkpoint_of_another_run_is_not_used(
    task: LoadedTask, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Killed):
        train(task, tmp_path / "a", progress=kill_at(12))
    other = CONFIG.model_copy(update={"lr": 0.02})
    with caplog.at_level(logging.WARNING):
        result, weights = train(task, tmp_path / "a", other)
    assert result.resumed_from is None
    assert "belongs to another training run" in caplog.text
    assert same(weights, train(task, tmp_path / "b", other)[1])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "absent", "seal"])
def test_a_damaged_checkpoint_is_told_and_an_earlier_one_used(
    task: LoadedTask, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    _, weights = train(task, tmp_path / "straight")
    folder = tmp_path / "damaged"
    with pytest.raises(Killed):
        train(task, folder, progress=kill_at(12))
    newest = folder / f"{PREFIX}00000010.safetensors"
    data = newest.read_bytes()
    if damage == "truncated":
        newest.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        newest.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    elif damage == "absent":
        newest.unlink()
    else:
        newest.with_suffix(".json").write_text('{"schema": 1, "iden')
    with caplog.at_level(logging.WARNING):
        result, again = train(task, folder)
    assert result.resumed_from == 5
    assert "train-00000010.json is damaged" in caplog.text
    assert same(weights, again)


def test_with_all_checkpoints_damaged_it_starts_from_zero(task: LoadedTask, tmp_path: Path) -> None:
    _, weights = train(task, tmp_path / "straight")
    folder = tmp_path / "damaged"
    with pytest.raises(Killed):
        train(task, folder, progress=kill_at(12))
    for path in folder.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    result, again = train(task, folder)
    assert result.resumed_from is None
    assert same(weights, again)


def test_tensors_without_their_seal_are_a_write_that_was_killed(task: LoadedTask, tmp_path: Path) -> None:
    _, weights = train(task, tmp_path / "straight")
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        train(task, folder, progress=kill_at(10))
    (folder / f"{PREFIX}00000010.json").unlink()
    result, again = train(task, folder)
    assert result.resumed_from == 5
    assert same(weights, again)


def test_a_finished_run_is_not_trained_again(task: LoadedTask, tmp_path: Path) -> None:
    straight, weights = train(task, tmp_path)
    result, again = train(task, tmp_path, progress=kill_at(STEPS))
    assert result.resumed_from == STEPS
    assert same(weights, again)
    assert result.final_losses == straight.final_losses


def test_checkpoints_hold_no_pickle(task: LoadedTask, tmp_path: Path) -> None:
    train(task, tmp_path)
    suffixes = sorted(path.suffix for path in tmp_path.iterdir())
    assert suffixes == [".json", ".json", ".safetensors", ".safetensors"]
    for path in tmp_path.glob("*.json"):
        assert json.loads(path.read_text())["schema"] == 1


# --- modality dropout -------------------------------------------------------------------------------------------


def watch(model: nn.Module, module: str) -> list[Tensor]:
    """Collects what a module gets."""
    seen: list[Tensor] = []
    model.get_submodule(module).register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach().clone()))
    return seen


def run_with_dropout(task: LoadedTask, workdir: Path, chance: float) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    student, _ = toy(task).models()
    student.drop.p = 0.0
    seen = watch(student, "camera.0"), watch(student, "head")
    config = FinetuneConfig(steps=60, distill=False, modality_dropout=chance, checkpoint_every=1000)
    finetune(student, None, task, config, seed=3, workdir=workdir)
    return student, *seen


def test_modality_dropout_blanks_one_modality_as_often_as_asked(task: LoadedTask, tmp_path: Path) -> None:
    _, images, _ = run_with_dropout(task, tmp_path / "a", 0.5)
    dead = sum(int(image.count_nonzero()) == 0 for image in images)
    assert 7 <= dead <= 23, "half of 60 batches, half of them the camera"
    _, images, _ = run_with_dropout(task, tmp_path / "b", 0.0)
    assert all(int(image.count_nonzero()) > 0 for image in images)


def test_the_teacher_shows_what_it_makes_of_the_same_dead_sensor(task: LoadedTask, tmp_path: Path) -> None:
    student, teacher = toy(task).models()
    seen = [(watch(model, "camera.0"), watch(model, "lidar.0")) for model in (student, teacher)]
    config = FinetuneConfig(steps=12, distill=True, modality_dropout=0.6, checkpoint_every=1000)
    finetune(student, teacher, task, config, seed=3, workdir=tmp_path)
    for own, taught in zip(*seen, strict=True):
        taught = taught[-12:]  # it may have been asked about the clean data before
        assert len(own) == len(taught) == 12
        assert all(torch.equal(a, b) for a, b in zip(own, taught, strict=True))
    dead = [
        int(camera.count_nonzero()) == 0 or int(lidar.count_nonzero()) == 0
        for camera, lidar in zip(*seen[0], strict=True)
    ]
    assert 0 < sum(dead) < 12


def test_without_inputs_by_modality_the_branch_is_zeroed(
    task: LoadedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(task.user), "inputs_by_modality", {})
    student, images, features = run_with_dropout(task, tmp_path, 0.5)
    assert all(int(image.count_nonzero()) > 0 for image in images)
    dead = [(int(f[:, :8].count_nonzero()) == 0, int(f[:, 8:].count_nonzero()) == 0) for f in features]
    assert all(not (camera and lidar) for camera, lidar in dead)
    assert 7 <= sum(camera for camera, _ in dead) <= 23
    assert 7 <= sum(lidar for _, lidar in dead) <= 23
    assert int(student.get_submodule("camera")(torch.ones(1, 4, 5, 5)).count_nonzero()) > 0, "the hooks are gone"


def test_dead_batches_do_not_enter_the_batch_norm_statistics(task: LoadedTask, tmp_path: Path) -> None:
    student, images, _ = run_with_dropout(task, tmp_path, 0.9999)
    assert len(images) == 60
    assert 18 <= sum(int(image.count_nonzero()) == 0 for image in images) <= 42, "every batch lacks one of the two"
    norm = student.get_submodule("camera.1")
    assert isinstance(norm, nn.BatchNorm2d)
    before = toy(task).models()[0].camera[1]
    assert same(dict(norm.named_buffers()), dict(before.named_buffers()))
    assert not torch.equal(norm.weight, torch.ones(8)), "the norm did learn"


# --- what goes wrong --------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(
    task: LoadedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def losses(self: Any, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        size = outputs["size"].mean()
        return {"size": size * math.nan if calls == 7 else size, "class": outputs["logits"].mean()}

    monkeypatch.setattr(type(task.user), "losses", losses)
    with pytest.raises(TrainingError, match=r"got size = nan at step 7 of 23 .*samples train-3-6-0, .*lower finetune"):
        train(task, tmp_path)


def test_a_gradient_that_is_not_finite_stops_the_run(
    task: LoadedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(self: Any, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        return {"root": (outputs["size"] * 0).square().sum().sqrt()}  # 0 with a NaN slope

    monkeypatch.setattr(type(task.user), "losses", losses)
    with pytest.raises(TrainingError, match=r"infinity in the gradient of .* at step 1 of 23"):
        train(task, tmp_path)


def test_float16_overflow_lowers_the_scale_until_it_is_hopeless() -> None:
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    amp = Amp("fp16", torch.device("cpu"))
    scale = amp.state()["scaler"]["scale"]
    for _ in range(SKIPS_IN_A_ROW - 1):
        optimizer.zero_grad()
        amp.backward(model(torch.ones(1, 2)).sum() * math.inf)
        amp.unscale(optimizer)
        amp.step(optimizer, model, 1.0, "step 1")
    assert torch.equal(model.weight, before), "an overflow is no step"
    assert amp.state()["scaler"]["scale"] == scale * 0.5 ** (SKIPS_IN_A_ROW - 1)
    optimizer.zero_grad()
    amp.backward(model(torch.ones(1, 2)).sum() * math.inf)
    amp.unscale(optimizer)
    with pytest.raises(TrainingError, match="infinity in the gradient of weight at step 20"):
        amp.step(optimizer, model, 1.0, "step 20")


def test_weights_that_blow_up_in_the_last_step_are_found(task: LoadedTask, tmp_path: Path) -> None:
    config = FinetuneConfig(steps=1, lr=1e20, weight_decay=1e30, ema=0, warmup=0, distill=False)
    with pytest.raises(TrainingError, match="expected finite weights after training; got NaN or infinity in"):
        train(task, tmp_path, config)


def test_losses_that_cannot_be_trained_on_are_the_tasks_fault(
    task: LoadedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(task.user), "losses", lambda _s, outputs, _b: {"a": outputs["size"].detach().mean()})
    with pytest.raises(TaskError, match=r"losses that depend on trainable parameters; got none at Toy\.losses"):
        train(task, tmp_path, FinetuneConfig(steps=2, distill=False))
    monkeypatch.setattr(type(task.user), "losses", lambda _s, outputs, _b: {"a": outputs["size"]})
    with pytest.raises(TaskError, match=r"scalar losses; got 'a' of shape \(6, 1\)"):
        train(task, tmp_path, FinetuneConfig(steps=2, distill=False))


# --- the user's own trainer -------------------------------------------------------------------------------------


def sgd_fit(self: Any, model: nn.Module, steps: int, hooks: FitHooks) -> None:
    """A trainer with everything that revives masked weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=hooks.lr, momentum=0.9, weight_decay=0.1)
    for step, batch in enumerate(list(self.batches("train", hooks.seed))[:steps]):
        optimizer.zero_grad()
        outputs = model(**batch.inputs)
        taught = hooks.loss(outputs, batch)
        loss = F.cross_entropy(outputs["logits"], batch.targets["label"])
        (loss + taught).backward()
        optimizer.step()
        hooks.after_step()
        hooks.progress(step + 1, {"class": float(loss.detach()), "taught": float(taught.detach())})


def test_the_users_own_fit_trains_with_our_masks_and_our_teacher(
    task: LoadedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(task.user), "fit", sgd_fit, raising=False)
    student, teacher = toy(task).models()
    before = toy(task).everything(student)
    masks, _ = masks_2to4(student)
    seen: list[TrainProgress] = []
    config = FinetuneConfig(steps=5, lr=0.001)
    result = finetune(
        student, teacher, task, config, seed=3, workdir=tmp_path, masks=MaskHolder(masks), progress=seen.append
    )
    MaskHolder(masks).check(student)
    assert [now.step for now in seen] == [1, 2, 3, 4, 5]
    assert result.final_losses == seen[-1].losses
    assert result.final_losses["taught"] > 0
    assert not torch.equal(student.head.weight, before["head.weight"])
    assert not student.training


def test_a_fit_that_skips_the_hook_still_ends_masked_and_without_teacher_the_loss_is_zero(
    task: LoadedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[float] = []

    def fit(self: Any, model: nn.Module, steps: int, hooks: FitHooks) -> None:
        batch = next(self.batches("train", 0))
        taught.append(float(hooks.loss(model(**batch.inputs), batch)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1.0)

    monkeypatch.setattr(type(task.user), "fit", fit, raising=False)
    student, _ = toy(task).models()
    masks, _ = masks_2to4(student)
    finetune(student, None, task, FinetuneConfig(steps=3), seed=0, workdir=tmp_path, masks=MaskHolder(masks))
    MaskHolder(masks).check(student)
    assert taught == [0.0]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("crash", r"Toy\.fit\(model, steps, hooks\) to train; got KeyError: 'gone'"),
        ("nan-loss", r"got class = nan at step 1 of 3 of the task's own fit"),
        ("nan-weight", r"finite weights after training; got NaN or infinity in head\.bias"),
    ],
)
def test_a_fit_that_fails_is_a_training_error(
    task: LoadedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    def fit(self: Any, model: Any, steps: int, hooks: FitHooks) -> None:
        if fault == "crash":
            raise KeyError("gone")
        if fault == "nan-loss":
            hooks.progress(1, {"class": math.nan})
        model.head.bias.data.fill_(math.nan)

    monkeypatch.setattr(type(task.user), "fit", fit, raising=False)
    with pytest.raises(TrainingError, match=message):
        train(task, tmp_path, FinetuneConfig(steps=3))


# --- batch norm -------------------------------------------------------------------------------------------------


def test_batch_norm_statistics_become_the_average_over_the_batches(task: LoadedTask) -> None:
    student, _ = toy(task).models()
    student.lidar.train(False)
    before = toy(task).everything(student)
    modes = [module.training for module in student.modules()]
    state = torch.get_rng_state()
    assert reestimate_batchnorm(student, task, 5, seed=3) == 1
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in student.modules()] == modes
    norm = student.camera[1]
    assert norm.momentum == 0.1
    outputs = [student.camera[0](batch.inputs["image"]) for batch in list(task.batches("train", 3))[:5]]
    torch.testing.assert_close(norm.running_mean, torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([o.var((0, 2, 3)) for o in outputs]).mean(0))
    changed = {name for name, value in toy(task).everything(student).items() if not torch.equal(value, before[name])}
    assert changed == {"camera.1.running_mean", "camera.1.running_var", "camera.1.num_batches_tracked"}


def test_batch_norm_is_left_alone_where_there_is_nothing_to_do(task: LoadedTask) -> None:
    student, _ = toy(task).models()
    before = toy(task).everything(student)
    assert reestimate_batchnorm(student, task, 0, seed=3) == 0
    assert same(before, toy(task).everything(student))
    assert reestimate_batchnorm(nn.Linear(4, 4), task, 5, seed=3) == 0


def test_batch_norm_statistics_that_are_not_finite_are_refused(task: LoadedTask) -> None:
    student, _ = toy(task).models()
    student.camera[0].bias.data.fill_(math.inf)
    with pytest.raises(TrainingError, match=r"finite batch norm statistics; got NaN or infinity at camera\.1"):
        reestimate_batchnorm(student, task, 2, seed=3)
