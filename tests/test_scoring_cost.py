"""What scoring costs: copies of the parameters, and whether the passes counted are the work done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fusepress.pipeline.graph.plan import Group, Member
from fusepress.pipeline.recipe import ScoreConfig
from fusepress.pipeline.scoring import selection
from fusepress.pipeline.scoring.criteria import score_channels, score_weights
from fusepress.pipeline.scoring.curvature import PRODUCT_PASSES, Curvature, hessian_product
from fusepress.pipeline.scoring.gradients import Passes
from fusepress.pipeline.scoring.substitute import Substitution
from fusepress.pipeline.task import Batch, LoadedTask
from tests.scoring_toys import ConvToy, NoSecond, ToyGraph, loaded, squared_error

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 48
LAYERS = 6  # of each modality, and of the fusion; a layer is one part in 18 of the model


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def _checkout() -> Iterator[None]:
    """`benchmarks` is a folder of the checkout, not of the installed package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield


def _stack() -> nn.Sequential:
    return nn.Sequential(*(part for _ in range(LAYERS) for part in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())))


class Stacks(nn.Module):
    """Two branches and a fusion, all of layers of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.camera, self.lidar, self.fusion = _stack(), _stack(), _stack()

    def forward(self, camera: Tensor, lidar: Tensor) -> Tensor:
        out: Tensor = self.fusion(self.camera(camera) + self.lidar(lidar))
        return out


def stacks() -> tuple[Stacks, LoadedTask, ToyGraph]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Stacks()
        # three samples: no activation has the shape of a weight
        data = [
            Batch(inputs={k: torch.randn(3, WIDTH) for k in ("camera", "lidar")}, targets={"y": torch.randn(3, WIDTH)})
            for _ in range(2)
        ]
    task = loaded(data, {"camera": ["camera"], "lidar": ["lidar"]}, squared_error)
    task.user.inputs_by_modality = {"camera": ["camera"], "lidar": ["lidar"]}
    groups = [
        Group(
            id=f"{branch}.0",
            branch=branch,
            width=WIDTH,
            members=(
                Member(param=f"{branch}.0.weight", dim=0),
                Member(param=f"{branch}.2.weight", dim=1, role="consumer"),
            ),
            producers=(f"{branch}.0.weight",),
        )
        for branch in ("camera", "lidar")
    ]
    return model, task, ToyGraph(groups)


def peak(model: nn.Module, score: Callable[[], Any]) -> float:
    from benchmarks.scoring_cost import LiveCopies

    with LiveCopies(model) as seen:
        score()
    assert seen.now <= seen.peak
    return float(seen.peak / (4 * seen.total))


def test_live_copies_are_counted_while_they_live() -> None:
    model = nn.Linear(8, 8, bias=False)

    def hold() -> None:
        first = torch.ones(8, 8)
        second = first + 1.0
        view = second.view(8, 8)
        del second  # its storage lives on in the view
        torch.ones(8, 7)  # of no parameter's shape
        del first
        third = view * 2.0
        del view, third
        torch.ones(8, 8)

    assert peak(model, hold) == 2.0


# theta or a gradient, the gradient that accumulates, scores:
# what each method needs at its fullest moment, and up to 0.3 for layers in flight
@pytest.mark.parametrize(
    ("changes", "channels", "weights"),
    [
        ({"method": "snip"}, 1, 1),
        ({"method": "taylor"}, 1, 2),
        ({"method": "altermoma", "beta": 0.0}, 1, 1),
        ({"method": "prospr"}, 2, 2),
        ({"method": "grasp"}, 2, 2),
        ({"method": "altermoma", "beta": 1.0}, 4 / 3, 8 / 3),  # a masked third has nothing; the fusion's first half
        # in rounds: what lies aside is in files
        ({"method": "imp", "rounds": 2}, 0, 1),
        ({"method": "synflow", "rounds": 3}, 2.3, 1),
        ({"method": "random", "rounds": 3}, 0, 1),
        ({"method": "snip", "rounds": 3}, 1, 1),
        ({"method": "taylor", "rounds": 3}, 1, 2),
        ({"method": "prospr", "rounds": 3}, 2, 2),
        ({"method": "grasp", "rounds": 3}, 2, 2),
        ({"method": "altermoma", "rounds": 3, "beta": 1.0}, 4 / 3, 8 / 3),
        # under dead sensors: a condition's scores and their shares
        ({"method": "snip", "robustness": 0.5}, 1, 2),
        ({"method": "altermoma", "robustness": 0.5, "beta": 1.0}, 4 / 3, 8 / 3),
    ],
    ids=lambda value: "-".join(str(v) for v in value.values()) if isinstance(value, dict) else "",
)
def test_copies_of_the_parameters(
    changes: dict[str, Any], channels: float, weights: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "BLOCK", 128)  # as small beside this network as it is beside others
    model, task, graph = stacks()
    config = ScoreConfig.model_validate({"batches": 2, "reactivation_batches": 2, **changes})
    assert peak(model, lambda: score_channels(model, task, graph, config, seed=0)) == pytest.approx(channels, abs=0.3)
    assert peak(model, lambda: score_weights(model, task, config, seed=0)) == pytest.approx(weights, abs=0.3)


def test_values_live_no_longer_than_an_operator() -> None:
    """Eight layers, whose values in float64 would be sixteen layers' worth in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(8)))
    names = {p: n for n, p in model.named_parameters()}
    plain = {n: p.detach() for p, n in names.items()}
    taken: list[str] = []
    substitution = Substitution(names, lambda n: plain[n].double(), lambda n, _value, _gradient: taken.append(n))

    def there_and_back() -> None:
        with substitution:
            model(torch.ones(3, 32, dtype=torch.float64)).sum().backward()

    assert peak(model, there_and_back) <= 3 * 2 / 8  # a value, a gradient, and one that goes, of one layer
    assert taken == [f"{index}.weight" for index in range(7, -1, -1)]


@pytest.mark.parametrize("curvature", ["exact", "difference"])
def test_a_hessian_product_counts_as_the_passes_whose_work_it_does(curvature: Curvature) -> None:
    toy = ConvToy()
    toy.model.eval()
    batches = toy.task.user.data[:2]

    def plain() -> None:
        for batch in batches:
            toy.model.zero_grad(set_to_none=True)
            torch.stack(list(toy.losses(toy.model(**batch.inputs), batch).values())).sum().backward()

    def product() -> None:
        vector = {parameter: torch.ones_like(parameter) for parameter in toy.model.parameters()}
        assert hessian_product(toy.model, toy.task, batches, vector, passes, "test", curvature=curvature) == curvature

    passes = Passes(total=1)
    with FlopCounterMode(display=False) as one:
        plain()
    with FlopCounterMode(display=False) as both:
        product()
    assert passes.done == 2 * PRODUCT_PASSES[curvature]
    assert both.get_total_flops() / one.get_total_flops() == pytest.approx(PRODUCT_PASSES[curvature], rel=0.05)


def test_a_try_that_falls_back_to_differences_counts_as_one_pass_more() -> None:
    forwards = 0

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            nonlocal forwards
            forwards += 1
            out: Tensor = NoSecond.apply(self.weight).square() + 0.0 * x.sum()  # type: ignore[no-untyped-call]
            return out

    model = Model()
    data = [Batch(inputs={"x": torch.zeros(1, 1, dtype=torch.float64)}) for _ in range(3)]
    task = loaded(data, {"all": [""]}, lambda outputs, _: {"sum": outputs.sum()})
    seen: list[float] = []
    config = ScoreConfig(method="grasp", batches=3)
    _, log = score_weights(model, task, config, seed=0, progress=lambda done, _: seen.append(done))
    assert log["curvature"] == "difference"
    assert log["passes"] == forwards == 3 + 1 + 2 * 3
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
