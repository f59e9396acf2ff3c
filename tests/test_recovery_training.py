"""Training as users expect it: accumulation, frozen norms, number formats, compiling, loggers, an early stop."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fusepress.pipeline.errors import RecipeError, UsageError
from fusepress.pipeline.evaluate import Evaluation, evaluate, torch_predict
from fusepress.pipeline.recipe import FinetuneConfig, Recipe
from fusepress.pipeline.recovery import compiled, rng
from fusepress.pipeline.recovery.contract import TrainProgress
from fusepress.pipeline.recovery.early_stop import EarlyStop
from fusepress.pipeline.recovery.finetune import FinetuneResult, finetune
from fusepress.pipeline.task import Batch, LoadedTask, load_task
from tests.recovery_runs import Killed, kill_at, same, toy, trained

TESTS = Path(__file__).parent
CONFIG = FinetuneConfig(steps=12, lr=0.01, checkpoint_every=5, ema=0.9)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def task() -> LoadedTask:
    return load_task("recovery_toy.py:Toy", base=TESTS)


def train(
    task: LoadedTask, workdir: Path, config: FinetuneConfig = CONFIG, **options: Any
) -> tuple[FinetuneResult, dict[str, Tensor]]:
    return trained(task, workdir, config, **options)


def changed(**values: Any) -> FinetuneConfig:
    return FinetuneConfig.model_validate({**CONFIG.model_dump(), **values})


# --- accumulation -----------------------------------------------------------------------------------------------


def cut(batch: Batch, first: int, last: int) -> Batch:
    return Batch(
        inputs={name: value[first:last] for name, value in batch.inputs.items()},
        targets={name: value[first:last] for name, value in batch.targets.items()},
        sample_ids=list(batch.sample_ids)[first:last],
        groups=list(batch.groups)[first:last],
    )


def plain_student(task: LoadedTask) -> nn.Module:
    """Without what makes two small batches differ from a large one: dropout and a counter of forward passes."""
    student: nn.Module = toy(task).models()[0]
    student.get_submodule("drop").p = 0.0  # type: ignore[assignment]

    def forget(module: nn.Module, _inputs: Any) -> None:
        module.get_buffer("calls").fill_(-1.0)

    student.register_forward_pre_hook(forget)
    return student


@pytest.mark.parametrize("parts", [((0, 3), (3, 6)), ((0, 1), (1, 6)), ((0, 2), (2, 3), (3, 6))])
def test_accumulated_batches_make_the_step_of_one_large_batch(
    task: LoadedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: tuple[tuple[int, int], ...]
) -> None:
    config = changed(steps=6, freeze_batchnorm=True, distill=False)
    large = plain_student(task)
    one = finetune(large, None, task, config, seed=3, workdir=tmp_path / "large")
    whole = type(task.user).batches

    def batches(self: Any, split: str, seed: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        small = (cut(batch, *part) for batch in whole(self, split, seed) for part in parts)
        yield from list(small)[start:]

    monkeypatch.setattr(type(task.user), "batches", batches)
    student = plain_student(task)
    accumulating = config.model_copy(update={"accumulate": len(parts)})
    many = finetune(student, None, task, accumulating, seed=3, workdir=tmp_path / "small")
    for name, value in toy(task).everything(large).items():
        torch.testing.assert_close(toy(task).everything(student)[name], value, rtol=1e-5, atol=1e-6)
    assert [p["losses"] for p in many.history] == [pytest.approx(p["losses"], rel=1e-5) for p in one.history]
    unlike = finetune(plain_student(task), None, task, config, seed=3, workdir=tmp_path / "unlike")
    assert unlike.final_losses != pytest.approx(one.final_losses, rel=1e-3), "a single small batch is another step"


def test_an_accumulating_run_that_was_killed_ends_with_the_same_bits(task: LoadedTask, tmp_path: Path) -> None:
    config = changed(accumulate=3, modality_dropout=0.4)
    straight, weights = train(task, tmp_path / "straight", config)
    with pytest.raises(Killed):
        train(task, tmp_path / "killed", config, progress=kill_at(8))
    result, again = train(task, tmp_path / "killed", config)
    assert result.resumed_from == 5
    assert same(weights, again)
    assert result.history == straight.history


# --- batch norm, determinism, number formats ---------------------------------------------------------------------


def test_frozen_batch_norms_keep_their_statistics_and_go_on_learning(task: LoadedTask, tmp_path: Path) -> None:
    start = toy(task).everything(toy(task).models()[0])
    _, frozen = train(task, tmp_path / "frozen", changed(freeze_batchnorm=True))
    _, free = train(task, tmp_path / "free")
    for name in ("camera.1.running_mean", "camera.1.running_var", "camera.1.num_batches_tracked"):
        assert torch.equal(frozen[name], start[name])
        assert not torch.equal(free[name], start[name])
    assert not torch.equal(frozen["camera.1.weight"], start["camera.1.weight"])


@pytest.mark.parametrize("wanted", [True, False])
def test_kernels_are_repeatable_unless_that_is_switched_off(
    task: LoadedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    found: list[bool] = []
    losses = type(task.user).losses

    def watched(self: Any, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        found.append(torch.are_deterministic_algorithms_enabled())
        return dict(losses(self, outputs, batch))

    monkeypatch.setattr(type(task.user), "losses", watched)
    train(task, tmp_path, changed(deterministic=wanted, steps=2))
    assert set(found) == {wanted}
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_a_repeatable_form_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), rng.scope(0, torch.device("cpu")):
        for _ in range(3):
            torch.zeros(4).put_(torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))
    assert caplog.text.count("results may differ from run to run: put_ does not have a deterministic") == 1


def test_the_recipes_precision_is_that_of_the_passes(task: LoadedTask, tmp_path: Path) -> None:
    result, weights = train(task, tmp_path / "recipe", changed(precision="bf16"))
    assert result.precision == "bf16"
    assert same(weights, train(task, tmp_path / "argument", precision="bf16")[1])
    full, exact = train(task, tmp_path / "auto")
    assert full.precision == "fp32"
    assert not same(weights, exact)


# --- compiling --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch._dynamo's own
def test_a_compiled_student_trains_alike_and_keeps_its_names(
    task: LoadedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")  # all of torch.compile but the C++ compiler
    # frozen, for a bias before a batch norm has a gradient of rounding alone, which AdamW blows up
    config = changed(compile=True, freeze_batchnorm=True, steps=8)
    found = []
    for name, section in (("compiled", config), ("eager", config.model_copy(update={"compile": False}))):
        student, teacher = toy(task).models()
        student.drop.p = 0.0  # a compiled dropout draws other numbers
        result = finetune(student, teacher, task, section, seed=3, workdir=tmp_path / name)
        assert result.compiled == (name == "compiled")
        found.append(toy(task).everything(student))
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-3, atol=1e-4)
    names = [set(load_file(sorted((tmp_path / run).glob("*.safetensors"))[-1])) for run in ("compiled", "eager")]
    assert names[0] == names[1]
    _, weights = train(task, tmp_path / "straight", config)
    with pytest.raises(Killed):
        train(task, tmp_path / "killed", config, progress=kill_at(7))
    again, resumed = train(task, tmp_path / "killed", config)
    assert again.resumed_from == 5
    assert same(weights, resumed)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_that_does_not_compile_is_trained_without_and_the_log_says_why(
    task: LoadedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_graph: Any, _inputs: Any) -> Any:
        raise OSError("no C++ compiler found")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    with caplog.at_level(logging.WARNING):
        result, weights = train(task, tmp_path / "broken", changed(compile=True))
    assert "torch.compile does not take this model" in caplog.text
    assert "no C++ compiler found" in caplog.text
    assert not result.compiled
    assert same(weights, train(task, tmp_path / "eager")[1])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_real_compiler_trains_alike_and_resumes_to_the_same_bits(task: LoadedTask, tmp_path: Path) -> None:
    config = changed(compile=True)
    result, weights = train(task, tmp_path / "compiled", config)
    assert result.compiled
    with pytest.raises(Killed):
        train(task, tmp_path / "killed", config, progress=kill_at(7))
    assert same(weights, train(task, tmp_path / "killed", config)[1])


# --- loggers ----------------------------------------------------------------------------------------------------


def test_tensorboard_holds_every_step_once_though_the_run_was_killed(task: LoadedTask, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = changed(log=["tensorboard"])
    with pytest.raises(Killed):
        train(task, tmp_path, config, progress=kill_at(8))
    result, weights = train(task, tmp_path, config)
    assert result.resumed_from == 5
    found = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("class", "size", "distill.logits"):
        points = found.Scalars(f"loss/{name}")
        assert [point.step for point in points] == list(range(1, 13))
        wanted = [point["losses"][name] for point in result.history]
        assert [point.value for point in points] == pytest.approx(wanted, rel=1e-6)
    assert [point.value for point in found.Scalars("lr")] == pytest.approx([p["lr"] for p in result.history])
    assert same(weights, train(task, tmp_path / "plain")[1]), "a logger changes nothing"


def test_a_logger_added_to_a_run_that_was_killed_does_not_start_it_anew(task: LoadedTask, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with pytest.raises(Killed):
        train(task, tmp_path, progress=kill_at(8))
    result, _ = train(task, tmp_path, changed(log=["tensorboard"]))
    assert result.resumed_from == 5


@pytest.mark.filterwarnings("ignore")  # of mlflow and sqlalchemy
def test_mlflow_holds_every_step_in_one_run_though_it_was_killed(
    task: LoadedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = changed(log=["mlflow"])
    with pytest.raises(Killed):
        train(task, tmp_path, config, progress=kill_at(8))
    result, _ = train(task, tmp_path, config)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("fusepress").experiment_id])
    points = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "loss/class")}
    assert points == {point["step"]: pytest.approx(point["losses"]["class"]) for point in result.history}
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow")])
def test_a_logger_that_is_not_installed_is_told_before_the_first_step(
    task: LoadedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"the package {name} for finetune\.log; .*pip install fusepress\[{name}\]"):
        train(task, tmp_path, changed(log=[name]))
    assert not list(tmp_path.iterdir())


# --- early stop -------------------------------------------------------------------------------------------------


@pytest.fixture
def dense(task: LoadedTask) -> Evaluation:
    return evaluate(task, torch_predict(task, toy(task).models()[1]), "calib")


STOPPING = {"early_stop": True, "eval_every": 4, "checkpoint_every": 3, "lr": 0.03, "warmup": 0.0}


def test_training_stops_at_the_first_look_that_is_safely_within_the_gate(
    task: LoadedTask, tmp_path: Path, dense: Evaluation
) -> None:
    seen: list[TrainProgress] = []
    stop = EarlyStop(task, dense, max_drop=0.9)
    result, weights = train(task, tmp_path / "stopped", changed(**STOPPING), stop=stop, progress=seen.append)
    (look,) = result.looks
    assert (result.steps, look.step, look.met) == (4, 4, True)
    assert look.high is not None
    assert look.drop is not None
    assert look.drop <= look.high <= 0.9
    assert [now.look for now in seen] == [None, None, None, look]
    assert seen[-1].eta_s == 0
    student, _ = toy(task).models()
    student.load_state_dict({name: value for name, value in weights.items() if name != "calls"})
    student.calls = weights["calls"]
    now = evaluate(task, torch_predict(task, student), "calib")
    assert now.metrics["accuracy"] == look.value, "what was judged is what is returned: the averaged weights"
    assert look.drop == pytest.approx(dense.metrics["accuracy"] - look.value)
    again, unchanged = train(task, tmp_path / "stopped", changed(**STOPPING), stop=stop)
    assert (again.resumed_from, again.steps) == (4, 4)
    assert same(weights, unchanged)


def test_looking_changes_nothing_and_a_gate_out_of_reach_stops_nothing(
    task: LoadedTask, tmp_path: Path, dense: Evaluation
) -> None:
    stop = EarlyStop(task, dense, max_drop=-2.0)
    result, weights = train(task, tmp_path / "looking", changed(**STOPPING, modality_dropout=0.4), stop=stop)
    assert [(look.step, look.met) for look in result.looks] == [(4, False), (8, False), (12, False)]
    assert same(weights, train(task, tmp_path / "blind", changed(lr=0.03, warmup=0.0, modality_dropout=0.4))[1])


def test_killed_anywhere_it_stops_at_the_same_step_with_the_same_bits(
    task: LoadedTask, tmp_path: Path, dense: Evaluation
) -> None:
    looks = train(task, tmp_path / "all", changed(**STOPPING), stop=EarlyStop(task, dense, max_drop=-2.0))[0].looks
    first, second = (look.high for look in looks[:2])
    assert first is not None
    assert second is not None
    assert second < first, "the second look can be met where the first is not"
    stop = EarlyStop(task, dense, max_drop=(first + second) / 2)
    straight, weights = train(task, tmp_path / "straight", changed(**STOPPING), stop=stop)
    assert straight.steps == 8
    for step in range(2, 9):
        with pytest.raises(Killed):
            train(task, tmp_path / str(step), changed(**STOPPING), stop=stop, progress=kill_at(step))
        result, again = train(task, tmp_path / str(step), changed(**STOPPING), stop=stop)
        assert (result.steps, result.looks, result.history) == (8, straight.looks, straight.history)
        assert same(weights, again), f"killed after step {step}"


def test_the_evaluation_split_is_never_looked_at(
    task: LoadedTask, tmp_path: Path, dense: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[str] = set()
    batches = type(task.user).batches

    def watched(self: Any, split: str, seed: int, **options: Any) -> Iterator[Batch]:
        read.add(split)
        yield from batches(self, split, seed, **options)

    monkeypatch.setattr(type(task.user), "batches", watched)
    train(task, tmp_path, changed(**STOPPING), stop=EarlyStop(task, dense, max_drop=0.0))
    assert read == {"train", "calib"}


def test_a_metric_that_is_undefined_stops_neither_the_training_nor_its_checkpoints(
    task: LoadedTask, tmp_path: Path, dense: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    stop = EarlyStop(task, dense, max_drop=0.9)
    monkeypatch.setattr(type(task.user), "score", lambda _self, _stats: {"accuracy": float("nan")})
    config = changed(**STOPPING, log=["tensorboard"])
    result, weights = train(task, tmp_path, config, stop=stop)
    assert [(look.step, look.value, look.drop, look.met) for look in result.looks] == [
        (step, None, None, False) for step in (4, 8, 12)
    ]
    again, unchanged = train(task, tmp_path, config, stop=stop)
    assert (again.resumed_from, again.looks) == (12, result.looks)
    assert same(weights, unchanged)


def test_an_early_stop_needs_a_metric_of_the_task_and_a_gate(task: LoadedTask, dense: Evaluation) -> None:
    with pytest.raises(RecipeError, match=r"gates\.accuracy\.metric to be one of \['accuracy'\]; got 'miou'"):
        EarlyStop(task, dense, max_drop=0.1, metric="miou")
    recipe = {"task": "t.py:T", "checkpoint": "c.safetensors", "finetune": {"early_stop": True}}
    with pytest.raises(ValueError, match=r"`gates\.accuracy` with `finetune\.early_stop`.*add gates\.accuracy\.max_dr"):
        Recipe.model_validate(recipe)
    Recipe.model_validate({**recipe, "gates": {"accuracy": {"max_drop": 0.1}}})


# --- the task's own trainer --------------------------------------------------------------------------------------


def test_the_tasks_own_fit_is_not_told_of_what_is_our_loops_and_the_log_says_so(
    task: LoadedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(
        type(task.user), "fit", lambda _s, _m, steps, hooks: hooks.progress(steps, {"own": 0.5}), raising=False
    )
    with caplog.at_level(logging.WARNING):
        train(task, tmp_path, changed(accumulate=2, precision="bf16", log=["tensorboard"]))
    assert "it is not told of finetune.precision, finetune.accumulate" in caplog.text
    assert list((tmp_path / "tensorboard").iterdir()), "its losses are logged all the same"
