"""Fine-tuning in two real processes: as one with both shards, and without a trace of one that was lost."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusepress.pipeline.distributed import rank
from fusepress.pipeline.errors import TaskError, TrainingError, UsageError
from fusepress.pipeline.evaluate import evaluate, torch_predict
from fusepress.pipeline.graph.masks import MaskHolder, masks_2to4
from fusepress.pipeline.recipe import FinetuneConfig
from fusepress.pipeline.recovery.checkpoint import tensors_sha256
from fusepress.pipeline.recovery.contract import TrainProgress
from fusepress.pipeline.recovery.distributed import sum_losses
from fusepress.pipeline.recovery.early_stop import EarlyStop
from fusepress.pipeline.recovery.finetune import finetune
from fusepress.pipeline.task import LoadedTask, load_task
from tests.ranks import run_ranks, start_ranks

TESTS = Path(__file__).parent
HERE = "tests.test_recovery_distributed"
FROZEN = {"steps": 6, "lr": 0.01, "freeze_batchnorm": True, "checkpoint_every": 100}
# all that a process has of its own: dropout, norms, dead sensors
LIVELY = {"steps": 12, "lr": 0.02, "modality_dropout": 0.3, "checkpoint_every": 5, "eval_every": 6, "early_stop": True}


def toy(task: LoadedTask) -> Any:
    return sys.modules[type(task.user).__module__]


def forget(module: nn.Module, _inputs: Any) -> None:
    """Without a counter of forward passes a large batch is the sum of small ones."""
    module.get_buffer("calls").fill_(-1.0)


def quiet_models(task: LoadedTask) -> tuple[nn.Module, nn.Module]:
    """A student without dropout, and its teacher."""
    student, teacher = toy(task).models()
    student.drop.p = 0.0
    student.register_forward_pre_hook(forget)
    return student, teacher


# --- what the processes run --------------------------------------------------------------------------------------


def frozen(folder: str, **changes: Any) -> dict[str, Any]:
    """Train without anything that is a process's own."""
    torch.set_num_threads(1)
    task = load_task("recovery_toy.py:Uneven", base=TESTS)
    student, teacher = quiet_models(task)
    config = FinetuneConfig.model_validate({**FROZEN, **changes})
    result = finetune(student, teacher, task, config, seed=3, workdir=Path(folder) / str(rank()))
    weights = {name: value.tolist() for name, value in toy(task).everything(student).items()}
    return {"weights": weights, "history": result.history}


def together(folder: str, sections: list[dict[str, Any]]) -> dict[str, Any]:
    """All that the ranks do in one start, for a start takes seconds."""
    runs = [frozen(f"{folder}/{number}", **section) for number, section in enumerate(sections)]
    sharded = [sharded_run(f"{folder}/fsdp{masked}", masked=masked) for masked in (False, True)]
    return {
        "runs": runs,
        "statistics": first_statistics(f"{folder}/statistics"),
        "sharded": sharded,
        "tied": tied(f"{folder}/tied"),
        "lacking": lacking(f"{folder}/lacking"),
        "apart": apart(f"{folder}/apart"),
        "sums": sum_losses({"class": 1.0, "size": 2.0} if rank() == 0 else {"boxes": 8.0, "class": 4.0}),
    }


def apart(folder: str) -> dict[str, Any]:
    """Train a student whose weights and statistics are another's on rank 1, by rounding before training, say."""
    task = load_task("recovery_toy.py:Uneven", base=TESTS)
    student, teacher = quiet_models(task)
    if rank() == 1:
        with torch.no_grad():
            student.get_parameter("head.weight").add_(0.01)
            student.get_buffer("camera.1.running_mean").add_(0.1)
    finetune(student, teacher, task, FinetuneConfig.model_validate(FROZEN), seed=3, workdir=Path(folder))
    return {name: value.tolist() for name, value in toy(task).everything(student).items()}


def lacking(folder: str) -> str:
    """Why losses that rank 1 lacks cannot be balanced."""
    task = load_task("recovery_toy.py:Uneven", base=TESTS)
    student, _ = quiet_models(task)
    losses = type(task.user).losses
    kept = ("class", "size")[: 2 - rank()]
    task.user.losses = lambda *given: {name: losses(task.user, *given)[name] for name in kept}
    config = FinetuneConfig.model_validate({**FROZEN, "distill": False, "loss_weights": "uncertainty"})
    try:
        finetune(student, None, task, config, seed=3, workdir=Path(folder))
    except TaskError as error:
        return str(error)
    return ""


def tied(folder: str) -> str:
    """Why a model two of whose blocks share a parameter is not spread."""
    task = load_task("recovery_toy.py:Uneven", base=TESTS)
    student, _ = quiet_models(task)
    student.get_submodule("lidar.1").weight = student.get_parameter("camera.1.weight")
    config = FinetuneConfig.model_validate({**FROZEN, "distill": False, "shard": "fsdp2"})
    try:
        finetune(student, None, task, config, seed=3, workdir=Path(folder))
    except TrainingError as error:
        return str(error)
    return ""


class Killed(Exception):
    """All ranks leave a training alike."""


def sharded_run(folder: str, *, masked: bool) -> dict[str, Any]:
    """FSDP2 and plain data-parallel training of one student, and FSDP2 left and taken up again."""
    task = load_task("recovery_toy.py:Uneven", base=TESTS)
    section = {**FROZEN, "steps": 5, "checkpoint_every": 2}

    def trained(name: str, leave_at: int = -1, **changes: Any) -> dict[str, Any]:
        student, teacher = quiet_models(task)
        kinds: set[str] = set()
        student.register_forward_pre_hook(
            lambda module, _i: kinds.add(type(module.get_parameter("head.weight")).__name__)
        )
        holder = MaskHolder(masks_2to4(student)[0]) if masked else None
        losses, calls = type(task.user).losses, 0

        def counted(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == leave_at:
                raise Killed
            return losses(task.user, *arguments)

        task.user.losses = counted
        config = FinetuneConfig.model_validate({**section, **changes})
        work = Path(folder) / name / str(rank())
        try:
            result = finetune(student, teacher, task, config, seed=3, workdir=work, masks=holder)
        except Killed:
            return {}
        weights = {key: value.tolist() for key, value in toy(task).everything(student).items()}
        return {
            "weights": weights,
            "history": result.history,
            "resumed_from": result.resumed_from,
            "kinds": sorted(kinds),
        }

    plain, spread = trained("plain"), trained("fsdp2", shard="fsdp2")
    trained("left", leave_at=5, shard="fsdp2")
    return {"plain": plain, "fsdp2": spread, "again": trained("left", shard="fsdp2")}


def lively(folder: str, kill_at: int = -1, **changes: Any) -> dict[str, Any]:
    """Train with all of it; rank 1 kills itself in its batch number `kill_at`."""
    torch.set_num_threads(1)
    task = load_task("recovery_toy.py:Uneven", base=TESTS)
    student, teacher = toy(task).models()
    dense = evaluate(task, torch_predict(task, teacher), "calib")
    config = FinetuneConfig.model_validate({**LIVELY, **changes})
    stop = EarlyStop(task, dense, max_drop=-2.0)
    losses, calls = task.user.losses, 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if rank() == 1 and calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return losses(*arguments)

    task.user.losses = counted
    seen: list[TrainProgress] = []
    work = Path(folder) / str(rank())
    result = finetune(student, teacher, task, config, seed=3, workdir=work, progress=seen.append, stop=stop)
    return {
        "sha256": tensors_sha256(toy(task).everything(student)),
        "history": result.history,
        "looks": [[look.step, look.value, look.high] for look in result.looks],
        "told": len(seen),
        "resumed_from": result.resumed_from,
        "written": work.exists(),
        "next": float(torch.rand(())),
    }


def first_statistics(folder: str) -> dict[str, list[float]]:
    """Running mean and variance after one step: of this rank's batch alone, and as training leaves them."""
    torch.set_num_threads(1)
    task = load_task("recovery_toy.py:Uneven", base=TESTS)
    alone, _ = quiet_models(task)
    alone(**next(task.train_batches(3, rank=rank(), world=2)).inputs)
    student, _ = quiet_models(task)
    config = FinetuneConfig(steps=1, distill=False)
    finetune(student, None, task, config, seed=3, workdir=Path(folder))
    return {"own": _statistics(alone), "together": _statistics(student)}


def _statistics(model: nn.Module) -> list[float]:
    norm = model.get_submodule("camera.1")
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    both: Tensor = torch.cat([mean, variance])
    return [float(value) for value in both]


# --- what must hold ----------------------------------------------------------------------------------------------


def close(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Equal to 1e-5 of the largest entry of each tensor."""
    for name, value in wanted.items():
        a, b = torch.tensor(found[name]), torch.tensor(value)
        assert float((a - b).abs().max()) <= 1e-5 * max(1e-3, float(b.abs().max())), name


SECTIONS: list[dict[str, Any]] = [
    {},
    {"accumulate": 2, "steps": 3},
    {"loss_weights": "uncertainty"},
    {"distill_features": 0.5},
]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("two"))
    return run_ranks(f"{HERE}:together", folder=folder, sections=SECTIONS)


@pytest.mark.parametrize("number", range(len(SECTIONS)))
def test_two_processes_train_as_one_that_accumulates_their_shards(
    both: list[dict[str, Any]], tmp_path: Path, number: int
) -> None:
    ranks, section = [found["runs"][number] for found in both], SECTIONS[number]
    assert ranks[0] == ranks[1], "both end with the same bits"
    one = frozen(str(tmp_path / "one"), **{**section, "accumulate": 2 * section.get("accumulate", 1)})
    close(ranks[0]["weights"], one["weights"])
    for mine, wanted in zip(ranks[0]["history"], one["history"], strict=True):
        assert mine["losses"] == pytest.approx(wanted["losses"], rel=1e-4)
    half = frozen(str(tmp_path / "half"), **section)
    with pytest.raises(AssertionError):
        close(half["weights"], one["weights"])


def test_all_processes_start_from_the_model_of_rank_0(both: list[dict[str, Any]]) -> None:
    assert both[0]["apart"] == both[1]["apart"]
    assert both[0]["apart"] == both[0]["runs"][SECTIONS.index({})]["weights"]


def test_losses_that_a_rank_lacks_count_as_nothing_there(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert found["sums"] == {"class": 5.0, "size": 2.0, "boxes": 8.0}


def test_losses_that_a_rank_lacks_cannot_be_balanced(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert found["lacking"].startswith(
            "expected the same losses in every batch, ['class', 'size'], to balance them; got ['class'] at Uneven"
        )


def test_a_parameter_of_two_blocks_is_refused_before_the_first_step(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert re.search(
            r"expected a model that torch's fully_shard takes; got ValueError: 1\.weight of a Sequential is a "
            r"parameter of another block, too; set finetune\.shard: none",
            found["tied"],
        )


def test_statistics_of_batch_norms_are_the_mean_of_the_processes(both: list[dict[str, Any]]) -> None:
    first, second = (found["statistics"] for found in both)
    assert first["together"] == second["together"]
    mean = [(a + b) / 2 for a, b in zip(first["own"], second["own"], strict=True)]
    assert first["together"] == pytest.approx(mean, rel=1e-5, abs=1e-7)
    assert first["own"] != pytest.approx(second["own"], rel=1e-3)


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_spread_over_two_processes_a_model_trains_as_data_parallel(both: list[dict[str, Any]], masked: bool) -> None:
    first, second = (found["sharded"][int(masked)] for found in both)
    assert first["fsdp2"]["weights"] == second["fsdp2"]["weights"], "both hold the whole model in the end"
    close(first["fsdp2"]["weights"], first["plain"]["weights"])
    for mine, wanted in zip(first["fsdp2"]["history"], first["plain"]["history"], strict=True):
        assert mine["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
    assert first["plain"]["kinds"] == ["Parameter"]
    assert "DTensor" in first["fsdp2"]["kinds"], "between steps a process holds its share only"
    assert first["again"]["resumed_from"] == 4
    assert first["again"]["weights"] == first["fsdp2"]["weights"], "left and taken up again: the same bits"
    if masked:
        zeros = sum(row.count(0.0) for row in first["fsdp2"]["weights"]["head.weight"])
        assert zeros == 3 * 16 // 2


def test_a_single_process_has_nobody_to_share_its_weights_with(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"two processes or more for finetune\.shard: fsdp2; got one; start with torc"):
        frozen(str(tmp_path), shard="fsdp2")
    with pytest.raises(
        ValueError, match=r"none of early_stop, .* with `shard: fsdp2`, .*; got compile, precision: fp16"
    ):
        FinetuneConfig(shard="fsdp2", compile=True, precision="fp16")


@pytest.mark.long
def test_a_lost_process_leaves_no_trace_after_the_restart(tmp_path: Path) -> None:
    straight = run_ranks(f"{HERE}:lively", folder=str(tmp_path / "straight"))
    assert straight[0]["sha256"] == straight[1]["sha256"]
    assert straight[0]["history"] == straight[1]["history"]
    assert [look[0] for look in straight[0]["looks"]] == [6, 12]
    assert [found["told"] for found in straight] == [12, 0], "rank 0 alone speaks"
    assert [found["written"] for found in straight] == [True, False], "and writes"
    folder = str(tmp_path / "killed")
    given = ["-m", "tests.ranks", f"{HERE}:lively"]
    arguments = f'{{"folder": "{folder}", "kill_at": 9}}'
    processes = start_ranks([[*given, arguments, str(tmp_path / f"{r}.json")] for r in range(2)])
    told = [process.communicate(timeout=120)[0] for process in processes]
    assert processes[1].returncode == -signal.SIGKILL
    assert processes[0].returncode > 0
    assert "no sign of life from rank 1" in told[0]
    again = run_ranks(f"{HERE}:lively", folder=folder)
    assert [found["resumed_from"] for found in again] == [5, 5], "rank 0 has the checkpoint, and both go on from it"
    for name in ("sha256", "history", "looks"):
        assert again[0][name] == again[1][name] == straight[0][name]
