"""Two processes and one: the same batches, scores, plans, distortion tables and evaluations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fusepress.pipeline import distributed
from fusepress.pipeline.errors import StageError, TaskError
from fusepress.pipeline.evaluate import Evaluation, evaluate, torch_predict
from fusepress.pipeline.graph.cost import CostModel
from fusepress.pipeline.pruning.allocate import allocate
from fusepress.pipeline.pruning.distortion import distortion_table
from fusepress.pipeline.recipe import DistortionConfig, PruneConfig, ScoreConfig
from fusepress.pipeline.scoring.altermoma import score_altermoma, weight_scores
from fusepress.pipeline.scoring.criteria import score_channels
from fusepress.pipeline.scoring.gradients import Passes, mean_gradients, mean_loss, scoring_batches
from fusepress.pipeline.scoring.grasp import grasp_weights, score_grasp
from fusepress.pipeline.scoring.masking import untouched
from fusepress.pipeline.scoring.prospr import prospr_weights
from fusepress.pipeline.scoring.sensitivity import score_taylor, snip_weights, taylor_weights
from fusepress.pipeline.task import Batch, LoadedTask, TaskSource, check_shards
from tests.ranks import run_ranks
from tests.scoring_toys import ConvToy
from tests.test_distortion import every_width, graph_of

DTYPES = {"float32": torch.float32, "float64": torch.float64}
FISHER = DistortionConfig(samples=7, eta=0.5, draws=1, fisher_every=2)


class Dealt:
    """A finite task: every split has `length` batches; those of `train` move with the seed."""

    def __init__(self, length: int = 5) -> None:
        self.length = length

    def batches(self, split: str, seed: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        for number in range(start * world + rank, self.length, world):
            size = 1 + number % 3
            drawn = torch.randn(size, 3, generator=torch.Generator().manual_seed(100 * seed + number))
            ids = [f"{split}-{seed}-{number}-{row}" for row in range(size)]
            yield Batch(inputs={"x": drawn}, targets={"y": drawn.sum(1)}, sample_ids=ids, groups=[f"g{number}"] * size)

    def sample_stats(self, outputs: Tensor, batch: Batch) -> dict[str, Any]:
        return {"error": (outputs - batch.targets["y"]).abs(), "pair": torch.stack([outputs, outputs**2], 1)}

    def score(self, stats: dict[str, Any]) -> dict[str, float]:
        return {"error": float(stats["error"].mean())}


def _dealt(user: Any) -> LoadedTask:
    source = TaskSource(spec="toys:Dealt", files=(Path(__file__),))
    return LoadedTask(user=user, source=source, branches={"x": [""]}, metrics={"error": "min"}, keep=[])


class Sum(torch.nn.Module):
    """x -> its weighted sum: a model whose outputs are known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.3, -1.0, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


# ----------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize(("length", "world"), [(7, 1), (7, 2), (7, 3), (6, 3), (2, 5), (1, 4), (8, 8), (9, 4)])
def test_the_ranks_streams_together_are_that_of_one_process_across_epochs(length: int, world: int) -> None:
    task = _dealt(Dealt(length))
    whole = [b.sample_ids[0] for b in itertools.islice(task.train_batches(3), 6 * world + 2 * length)]
    for rank in range(world):
        for start in (0, 1, 3):
            stream = task.train_batches(3, start=start, rank=rank, world=world)
            found = [b.sample_ids[0] for b in itertools.islice(stream, 2)]
            assert found == whole[start * world + rank :: world][:2]
        long = task.train_batches(3, rank=rank, world=world)
        assert [b.sample_ids[0] for b in itertools.islice(long, len(whole[rank::world]))] == whole[rank::world]


def test_a_task_that_does_not_deal_out_its_batches_is_refused() -> None:
    class Same(Dealt):
        def batches(self, split: str, seed: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
            return super().batches(split, seed, start=start)

    class Halves(Dealt):
        def batches(self, split: str, seed: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
            share = list(super().batches(split, seed))
            return iter(share[rank * len(share) // world : (rank + 1) * len(share) // world][start:])

    for rank in range(3):
        check_shards(_dealt(Dealt(4)), rank, 3)
    with pytest.raises(TaskError, match=r"expected batches\('train', 0, rank=1, world=2\) to deal out .* got another"):
        check_shards(_dealt(Same()), 1, 2)
    with pytest.raises(TaskError, match=r"its batch 1 is number 2 of batches\('train', 0\); got another"):
        check_shards(_dealt(Halves()), 0, 2)


# -------------------------------------------------------------------------------------------------- two against one


def everything() -> dict[str, Any]:
    """All that is shared, in one start of the processes."""
    return {
        "scores": {f"{name} {n}": _scores(DTYPES[name], n) for name in DTYPES for n in (1, 3)},
        "plan": _plan(),
        "tables": {name: _table(DTYPES[name]) for name in DTYPES},
        "evaluations": [_evaluation(**options) for options in ({}, {"limit": 2}, {"held": True})],
        "uneven": _uneven(),
    }


def _scores(dtype: torch.dtype, batches: int) -> dict[str, Any]:
    """Scores of single weights by every method that reads gradients; with one batch, rank 1 has none."""
    toy = ConvToy(dtype=dtype)
    config = ScoreConfig(
        method="altermoma", beta=1.0, batches=batches, reactivation_batches=2, reactivation_lr=0.05, normalise="branch"
    )
    found = {
        "altermoma": weight_scores(toy.model, toy.task, config, seed=0)[0],
        "snip": snip_weights(toy.model, toy.task, config, seed=0)[0],
        "taylor": taylor_weights(toy.model, toy.task, config, seed=0)[0],
        "grasp": grasp_weights(toy.model, toy.task, config, seed=0)[0],
        "difference": grasp_weights(toy.model, toy.task, config, seed=0, curvature="difference")[0],
        "prospr": prospr_weights(toy.model, toy.task, config, seed=0, order="full")[0],
    }
    graph = graph_of(toy.model, toy.groups)
    found["taylor channels"] = {
        key: torch.from_numpy(value)
        for key, value in score_taylor(toy.model, toy.task, graph, config, seed=0).channel.items()
    }
    found["grasp channels"] = {
        key: torch.from_numpy(value)
        for key, value in score_grasp(toy.model, toy.task, graph, config, seed=0).channel.items()
    }
    data = scoring_batches(toy.task, 0, batches)
    with untouched(toy.model):
        loss = mean_gradients(toy.model, toy.task, data, Passes(total=1), "test")
        again = mean_loss(toy.model, toy.task, data, "test")
    log = score_altermoma(toy.model, toy.task, graph, config, seed=0).log
    return {
        "values": {name: {key: v.flatten().tolist() for key, v in scores.items()} for name, scores in found.items()},
        "losses": [loss, again, *(one["loss_after"] for one in log["stages"])],
        "counts": [log["samples"], log["passes"]],
    }


def _plan() -> Any:
    """From fp64 scores to a plan, by tables of distortion and by importance."""
    toy = ConvToy()
    graph = graph_of(toy.model, toy.groups)
    config = ScoreConfig(method="altermoma", beta=1.0, batches=3, reactivation_batches=2, reactivation_lr=0.05)
    scores = score_channels(toy.model, toy.task, graph, config, seed=0).channel
    cost = CostModel(graph, toy.model, {name: value[:1] for name, value in toy.task.user.data[0].inputs.items()})
    prune = PruneConfig(macs=0.5, allocation="importance", min_channels=1, floor=0.1)
    return distributed.on_main(lambda: allocate(scores, graph, cost, prune, align=1).kept)


def _table(dtype: torch.dtype, out: Path | None = None) -> dict[str, Any]:
    toy = ConvToy(dtype=dtype)
    graph = graph_of(toy.model, toy.groups)
    draw = np.random.default_rng(0)
    scores = {group.id: draw.random(group.width).astype(np.float32) for group in graph.groups}
    table = distortion_table(toy.model, toy.task, graph, scores, every_width(graph), FISHER, seed=0, out=out)
    return {
        "curves": {key: [curve.distortion.tolist(), curve.fisher.tolist()] for key, curve in table.curves.items()},
        "facts": [table.samples, table.eta, list(table.notes), table.macs],
    }


def _evaluation(*, limit: int | None = None, held: bool = False) -> dict[str, Any]:
    task = _dealt(Dealt(5))
    batches = list(task.batches("eval", 0)) if held else None
    found: Evaluation = evaluate(task, torch_predict(task, Sum()), "eval", batches=batches, limit=limit)
    return {
        "stats": {name: value.tolist() for name, value in found.stats.items()},
        "ids": found.sample_ids,
        "groups": found.groups,
        "metrics": found.metrics,
    }


def _uneven() -> str:
    """What happens where a task keeps more batches for rank 0 than dealing gives."""

    class Greedy(Dealt):
        def batches(self, split: str, seed: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
            return iter([] if rank else list(super().batches(split, seed)))

    task = _dealt(Greedy())
    try:
        evaluate(task, torch_predict(task, Sum()), "eval")
    except StageError as error:
        return str(error)
    return "nothing"


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    import json

    found: dict[str, Any] = json.loads(json.dumps(everything()))
    return found


@pytest.fixture(scope="module")
def together() -> list[dict[str, Any]]:
    return run_ranks("tests.test_distributed_sharing:everything")


def test_both_ranks_find_the_same_bit_for_bit(together: list[dict[str, Any]]) -> None:
    assert together[0] == together[1]


@pytest.mark.parametrize("case", ["float32 1", "float32 3", "float64 1", "float64 3"])
def test_two_processes_score_as_one_bit_for_bit_but_for_the_order_of_grasps_halves(
    alone: dict[str, Any], together: list[dict[str, Any]], case: str
) -> None:
    one, two = alone["scores"][case], together[0]["scores"][case]
    assert one["counts"] == two["counts"]
    assert one["losses"] == two["losses"]
    assert one["values"].keys() == two["values"].keys()
    for method, scores in one["values"].items():
        if method == "grasp":  # one process adds each half of a batch's H g to the sum, two add up the batches
            apart = {"float32": 1e-5, "float64": 1e-10}[case.split()[0]]
            for key, values in scores.items():
                largest = max(map(abs, values))
                assert two["values"][method][key] == pytest.approx(values, rel=0.0, abs=apart * largest), key
        else:
            assert scores == two["values"][method], method
        assert any(max(map(abs, values)) > 0 for values in scores.values())


def test_two_processes_plan_as_one(alone: dict[str, Any], together: list[dict[str, Any]]) -> None:
    assert together[0]["plan"] == alone["plan"]
    widths = [len(kept) for kept in alone["plan"].values()]
    assert min(widths) < max(widths)  # something was removed


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_two_processes_measure_the_distortion_of_one(
    alone: dict[str, Any], together: list[dict[str, Any]], dtype: str
) -> None:
    assert together[0]["tables"][dtype] == alone["tables"][dtype]


def test_two_processes_evaluate_as_one_sample_for_sample(alone: dict[str, Any], together: list[dict[str, Any]]) -> None:
    assert together[0]["evaluations"] == alone["evaluations"]
    assert [len(one["ids"]) for one in alone["evaluations"]] == [9, 3, 9]


def test_shares_of_other_lengths_than_dealing_gives_are_refused(together: list[dict[str, Any]]) -> None:
    assert "expected items that were dealt out to 2 ranks in turn; got [5, 0] of them" in together[0]["uneven"]
    assert together[1]["uneven"] == together[0]["uneven"]
