"""AlterMOMA against its closed forms and its own laws."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusepress.pipeline.errors import TaskError, TrainingError, UsageError
from fusepress.pipeline.recipe import ScoreConfig
from fusepress.pipeline.scoring.altermoma import Alternation, normalise, score_altermoma, weight_masks, weight_scores
from fusepress.pipeline.scoring.channels import ChannelScorer, WeightScorer
from fusepress.pipeline.scoring.gradients import Passes
from fusepress.pipeline.scoring.masking import branch_of_parameters, untouched
from fusepress.pipeline.task import Batch, LoadedTask
from tests.scoring_toys import (
    LINEAR,
    ConvToy,
    LinearFusion,
    ToyGraph,
    loaded,
    map_error,
    squared_error,
    state_bytes,
)

FAST = ScoreConfig(method="altermoma", beta=1.0, batches=2, reactivation_batches=3, reactivation_lr=0.02)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def raw(model: nn.Module, task: LoadedTask, config: ScoreConfig, masked: list[str]) -> tuple[Any, list[Any]]:
    """DeCI and the ReRI of each masked modality, not normalised."""
    scorer = WeightScorer(branch_of_parameters(model, task.branches))
    with untouched(model) as snapshot:
        run = Alternation(
            model=model,
            task=task,
            scorer=scorer,
            config=config,
            seed=0,
            passes=Passes(total=1),
            snapshot=snapshot,
        )
        return run.contribution()[0], [run.redundancy(modality)[0] for modality in masked]


def regression(n: int = 32, camera: int = 1, lidar: int = 1, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return Batch(inputs={"camera": draw(n, camera), "lidar": draw(n, lidar)}, targets={"y": draw(n)})


# T2: closed forms


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_scores_of_a_linear_model_are_the_closed_form(steps: int) -> None:
    batch = regression()
    x_c, x_l, y = batch.inputs["camera"][:, 0], batch.inputs["lidar"][:, 0], batch.targets["y"]
    a, b, lr = 0.7, -0.4, 0.05
    model = LinearFusion([a], [b])
    config = ScoreConfig(beta=1.0, batches=1, reactivation_batches=steps, reactivation_lr=lr)
    deci, (lidar_masked, camera_masked) = raw(model, loaded([batch], LINEAR), config, ["lidar", "camera"])
    h, k = (x_c * x_c).mean(), (x_l * x_l).mean()
    expected = abs(a * (a * h + b * (x_c * x_l).mean() - (x_c * y).mean()))
    assert float(deci["camera.weight"]) == pytest.approx(float(expected), rel=1e-13)
    g0 = a * h - (x_c * y).mean()
    assert float(lidar_masked["camera.weight"]) == pytest.approx(
        float((a * g0 * (1 - (1 - lr * h) ** steps)).abs()), rel=1e-12, abs=1e-15
    )
    g0 = b * k - (x_l * y).mean()
    assert float(camera_masked["lidar.weight"]) == pytest.approx(
        float((b * g0 * (1 - (1 - lr * k) ** steps)).abs()), rel=1e-12, abs=1e-15
    )
    assert set(lidar_masked) == {"camera.weight"}  # the masked branch gets no score in its own stage


def test_redundancy_of_a_vector_branch_follows_the_hessian() -> None:
    batch = regression(camera=4)
    weights = torch.tensor([0.5, -1.0, 0.3, 0.9], dtype=torch.float64)
    model = LinearFusion(weights.tolist(), [0.2])
    config = ScoreConfig(beta=1.0, batches=1, reactivation_batches=5, reactivation_lr=0.1)
    _, (found,) = raw(model, loaded([batch], LINEAR), config, ["lidar"])
    x = batch.inputs["camera"]
    hessian = x.T @ x / len(x)
    g0 = hessian @ weights - x.T @ batch.targets["y"] / len(x)
    shrink = torch.linalg.matrix_power(torch.eye(4).double() - 0.1 * hessian, 5)
    torch.testing.assert_close(found["camera.weight"], (weights * (g0 - shrink @ g0)).abs(), rtol=1e-12, atol=1e-15)


def test_the_mean_gradient_weighs_every_sample_alike() -> None:
    whole = regression(n=30, camera=2)
    parts = [
        Batch(inputs={k: v[i:j] for k, v in whole.inputs.items()}, targets={"y": whole.targets["y"][i:j]})
        for i, j in ((0, 4), (4, 20), (20, 30))
    ]
    config = ScoreConfig(beta=1.0, batches=3, reactivation_batches=0)
    split, _ = raw(LinearFusion([0.4, 1.0], [0.3]), loaded(parts, LINEAR), config, [])
    joint, _ = raw(
        LinearFusion([0.4, 1.0], [0.3]), loaded([whole], LINEAR), config.model_copy(update={"batches": 1}), []
    )
    for key, value in joint.items():
        torch.testing.assert_close(split[key], value, rtol=1e-12, atol=1e-15)


# T3: nothing learnt, nothing redundant


def test_without_reactivation_the_score_is_alpha_times_contribution() -> None:
    toy = ConvToy()
    config = ScoreConfig(beta=1.0, batches=2, reactivation_batches=0, alpha=0.75)
    scores, log = weight_scores(toy.model, toy.task, config, seed=0)
    deci, redundancies = raw(toy.model, toy.task, config, ["camera", "lidar"])
    assert all(not value.any() for stage in redundancies for value in stage.values())
    expected = normalise(deci, branch_of_parameters(toy.model, toy.task.branches))
    for name, value in scores.items():
        assert torch.equal(value, expected[name] * 0.75)
        assert bool(value.isfinite().all())
    assert [stage["loss_before"] == stage["loss_after"] for stage in log["stages"]] == [True, True]
    assert any("moved only" in note for note in log["notes"])


# T4: sums


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (1.0, 0.5), (0.25, 2.0)])
@pytest.mark.parametrize("modalities", [("camera", "lidar"), ("camera", "lidar", "radar")])
def test_scores_of_every_branch_add_up_to_alpha_minus_beta(
    alpha: float, beta: float, modalities: tuple[str, ...]
) -> None:
    toy = ConvToy(modalities)
    config = FAST.model_copy(update={"alpha": alpha, "beta": beta})
    for result in (weight_scores(toy.model, toy.task, config, seed=0)[1], _channels(toy, config).log):
        assert set(result["branches"]) == {*modalities, "fusion"}
        for branch in result["branches"].values():
            assert branch["sum"] == pytest.approx(alpha - beta, abs=1e-12)


def _channels(toy: ConvToy, config: ScoreConfig, seed: int = 0) -> Any:
    return score_altermoma(toy.model, toy.task, ToyGraph(toy.groups), config, seed=seed)


@pytest.mark.parametrize("modalities", [("camera", "lidar"), ("camera", "lidar", "radar")])
def test_scores_are_put_together_from_the_stages_in_which_a_branch_is_awake(modalities: tuple[str, ...]) -> None:
    toy = ConvToy(modalities)
    config = FAST.model_copy(update={"beta": 0.8})
    scores, _ = weight_scores(toy.model, toy.task, config, seed=0)
    branch_of = branch_of_parameters(toy.model, toy.task.branches)
    deci, stages = raw(toy.model, toy.task, config, list(modalities))
    deci = normalise(deci, branch_of)
    by_stage = dict(zip(modalities, (normalise(stage, branch_of) for stage in stages), strict=True))
    for name, value in scores.items():
        branch = branch_of[name]
        awake = [by_stage[m][name] for m in modalities if m != branch]
        expected = deci[name] - 0.8 * sum(awake, torch.zeros_like(value)) / len(awake)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-15)
        assert len(awake) == (len(modalities) if branch == "fusion" else len(modalities) - 1)


# T5: order and names


def test_the_order_of_masking_does_not_matter() -> None:
    for modalities in (("camera", "lidar"), ("camera", "lidar", "radar")):
        toy = ConvToy(modalities)
        results = [
            weight_scores(toy.model, toy.task, FAST, seed=0, order=order)[0]
            for order in itertools.permutations(modalities)
        ]
        for other in results[1:]:
            for name, value in results[0].items():
                if len(modalities) == 2:
                    assert torch.equal(value, other[name]), name
                torch.testing.assert_close(value, other[name], rtol=1e-12, atol=1e-15)


def test_renaming_modalities_only_renames_the_branches() -> None:
    toy = ConvToy()
    renamed = loaded(toy.task.user.data, {"lidar": ["camera"], "camera": ["lidar"]}, map_error)
    first, _ = weight_scores(toy.model, toy.task, FAST, seed=0)
    second, _ = weight_scores(toy.model, renamed, FAST, seed=0)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_swapping_the_branches_of_a_symmetric_model_swaps_the_scores() -> None:
    toy, mirrored = ConvToy(), ConvToy()
    swap = {"camera": "lidar", "lidar": "camera"}

    def swapped(name: str) -> str:
        head, _, rest = name.partition(".")
        return f"{swap.get(head, head)}.{rest}"

    mirrored.model.load_state_dict({swapped(name): value for name, value in toy.model.state_dict().items()})
    data = [
        Batch(inputs={swap[name]: value for name, value in batch.inputs.items()}, targets=batch.targets)
        for batch in toy.task.user.data
    ]
    first, _ = weight_scores(toy.model, toy.task, FAST, seed=0)
    second, _ = weight_scores(mirrored.model, loaded(data, mirrored.task.branches, map_error), FAST, seed=0)
    assert all(torch.equal(value, second[swapped(name)]) for name, value in first.items())
    assert not torch.equal(first["camera.stem.weight"], first["lidar.stem.weight"])


def test_an_order_that_leaves_a_modality_out_is_refused() -> None:
    toy = ConvToy()
    with pytest.raises(TaskError, match=r"order of the modalities \['camera', 'lidar'\]; got \['camera'\]; name each"):
        weight_scores(toy.model, toy.task, FAST, seed=0, order=["camera"])


# T6: the model comes back


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_model_comes_back_bit_identical_and_two_runs_agree(optimizer: str) -> None:
    toy = ConvToy(dtype=torch.float32)
    toy.model.train()
    toy.model.get_parameter("head.bias").requires_grad_(False)
    config = FAST.model_copy(update={"reactivation_optimizer": optimizer})
    before, random = state_bytes(toy.model), torch.get_rng_state()
    first = _channels(toy, config)
    assert state_bytes(toy.model) == before
    assert all(module.training for module in toy.model.modules())
    assert not toy.model.get_parameter("head.bias").requires_grad
    assert all(p.grad is None for p in toy.model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    second = _channels(toy, config)
    assert first.log == second.log
    for key, vector in first.channel.items():
        assert vector.tobytes() == second.channel[key].tobytes()


class FailsAt:
    """Losses that raise, or turn NaN, at the k-th pass."""

    def __init__(self, at: int, kind: str) -> None:
        self.at, self.kind, self.calls = at, kind, 0

    def __call__(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        self.calls += 1
        losses = map_error(outputs, batch)
        if self.calls == self.at:
            if self.kind == "raise":
                raise RuntimeError("the user's loss broke")
            losses["squared"] = losses["squared"] * float("nan")
        return losses


# passes with n = 2, B = 3: 1-2 contribution, 3-5 reactivation, 6-7 gB, 8-9 g0, then the second modality
@pytest.mark.parametrize(
    ("at", "where"),
    [
        (1, r"batch 0 \(contribution, nothing masked\)"),
        (4, r"reactivation step 1 \(camera masked\)"),
        (7, r"batch 1 \(camera masked, reactivated\)"),
        (9, r"batch 1 \(camera masked\)"),
        (11, r"reactivation step 1 \(lidar masked\)"),
    ],
)
def test_a_loss_that_is_not_finite_stops_with_advice_and_the_model_as_it_was(at: int, where: str) -> None:
    toy = ConvToy(losses=FailsAt(at, "nan"))
    toy.model.train()
    before = state_bytes(toy.model)
    with pytest.raises(TrainingError, match=rf"expected a finite loss; got .*nan.* at {where}; check .* lower score\."):
        _channels(toy, FAST)
    assert state_bytes(toy.model) == before
    assert toy.model.training


@pytest.mark.parametrize("at", [2, 3, 7, 8, 14])
def test_an_error_of_the_users_leaves_the_model_as_it_was(at: int) -> None:
    toy = ConvToy(losses=FailsAt(at, "raise"))
    before = state_bytes(toy.model)
    with pytest.raises(RuntimeError, match="the user's loss broke"):
        _channels(toy, FAST)
    assert state_bytes(toy.model) == before
    assert all(p.requires_grad and p.grad is None for p in toy.model.parameters())
    clean = ConvToy()
    toy.task.user.losses = map_error
    assert _channels(toy, FAST).log == _channels(clean, FAST).log  # no hook was left behind


def test_a_gradient_that_is_not_finite_names_the_parameter() -> None:
    def root(outputs: Any, batch: Batch) -> dict[str, Tensor]:
        return {"root": (outputs - outputs.detach()).sum().sqrt()}  # sqrt at zero: finite loss, infinite slope

    model = LinearFusion([0.5], [0.5])
    with pytest.raises(TrainingError, match=r"finite gradients; got NaN or infinity at camera\.weight \(contribution"):
        weight_scores(model, loaded([regression()], LINEAR, root), FAST, seed=0)


def test_a_gradient_that_is_not_finite_where_a_modality_is_masked_stops_before_the_first_step() -> None:
    def root(outputs: Any, batch: Batch) -> dict[str, Tensor]:
        return {"root": outputs.square().sum().sqrt()}  # finite slope but at zero, where a masked camera leaves it

    model = LinearFusion([0.5], [0.0])
    message = r"finite gradients; got NaN or infinity at lidar\.weight \(reactivation step 0 \(camera masked\)\)"
    with pytest.raises(TrainingError, match=message):
        weight_scores(model, loaded([regression()], LINEAR, root), FAST, seed=0)


def test_a_loss_without_a_graph_is_refused() -> None:
    def constant(outputs: Any, batch: Batch) -> dict[str, Tensor]:
        return {"constant": outputs.detach().sum()}

    with pytest.raises(TaskError, match=r"losses\(\) to depend on the model's parameters; got a constant"):
        weight_scores(LinearFusion([0.5], [0.5]), loaded([regression()], LINEAR, constant), FAST, seed=0)


# T7: scale of the loss


def test_scores_do_not_feel_the_scale_of_the_loss() -> None:
    def times_three(outputs: Any, batch: Batch) -> dict[str, Tensor]:
        return {name: 3.0 * value for name, value in map_error(outputs, batch).items()}

    plain, scaled = ConvToy(), ConvToy(losses=times_three)
    lower = FAST.model_copy(update={"reactivation_lr": FAST.reactivation_lr / 3.0})
    first, _ = weight_scores(plain.model, plain.task, FAST, seed=0)
    second, _ = weight_scores(scaled.model, scaled.task, lower, seed=0)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-9, atol=1e-13)


# T8: what the other sensor says too goes first


def two_signals() -> Batch:
    """y = z + u with z and u exactly uncorrelated; the camera sees both, the LiDAR only z."""
    z = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    u = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    return Batch(inputs={"camera": torch.stack([z, u], dim=1), "lidar": z[:, None]}, targets={"y": z + u})


@pytest.mark.parametrize("beta", [0.01, 1.0])
def test_at_the_optimum_all_redundancy_lies_on_the_shared_signal(beta: float) -> None:
    model = LinearFusion([0.25, 1.0], [0.75])  # z is split between the sensors, in fractions without rounding
    config = ScoreConfig(batches=1, reactivation_batches=10, reactivation_lr=0.1, beta=beta)
    scores, _ = weight_scores(model, loaded([two_signals()], LINEAR), config, seed=0)
    assert scores["camera.weight"].tolist() == pytest.approx([-beta, 0.0], abs=1e-14)  # the contribution is 0/0: zero
    assert scores["lidar.weight"].tolist() == pytest.approx([-beta])
    assert weight_masks({"camera": scores["camera.weight"]}, 0.5)["camera"].tolist() == [False, True]


def test_near_the_optimum_redundancy_turns_the_ranking_that_contribution_gives() -> None:
    model = LinearFusion([0.4, 1.05], [0.75])
    task = loaded([two_signals()], LINEAR)
    config = ScoreConfig(batches=1, reactivation_batches=10, reactivation_lr=0.1, beta=0.0)
    contribution = weight_scores(model, task, config, seed=0)[0]["camera.weight"]
    both = weight_scores(model, task, config.model_copy(update={"beta": 1.0}), seed=0)[0]["camera.weight"]
    assert contribution[0] > contribution[1]
    assert both[0] < both[1]


# T9: counts


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.333, 0.5, 0.9, 1.0])
def test_exactly_the_asked_number_of_weights_goes_even_with_ties(ratio: float) -> None:
    toy = ConvToy()
    scores, _ = weight_scores(toy.model, toy.task, FAST, seed=0)
    tied = {name: torch.zeros_like(value) for name, value in scores.items()}
    rounded = {name: (value * 1e3).round() for name, value in scores.items()}
    total = sum(value.numel() for value in scores.values())
    for candidate in (scores, tied, rounded):
        masks = weight_masks(candidate, ratio)
        assert sum(int((~mask).sum()) for mask in masks.values()) == round(ratio * total)
        assert all(masks[name].shape == value.shape for name, value in candidate.items())
        kept = torch.cat([candidate[name][mask] for name, mask in masks.items()])
        gone = torch.cat([candidate[name][~mask] for name, mask in masks.items()])
        assert not len(kept) or not len(gone) or float(kept.min()) >= float(gone.max())


def test_ties_are_broken_by_position() -> None:
    masks = weight_masks({"a": torch.zeros(2), "b": torch.zeros(2, 2)}, 0.5)
    assert masks["a"].tolist() == [False, False]
    assert masks["b"].tolist() == [[False, True], [True, True]]


def test_a_ratio_outside_zero_to_one_is_refused() -> None:
    with pytest.raises(UsageError, match=r"removed fraction from 0 to 1; got 80"):
        weight_masks({"a": torch.zeros(2)}, 80)


# SNIP, single modality


def test_without_redundancy_and_with_one_branch_the_ranking_is_snips() -> None:
    toy = ConvToy()
    whole = loaded(toy.task.user.data, {"all": [""]}, map_error)
    scores, log = weight_scores(toy.model, whole, FAST, seed=0)
    data = toy.task.user.data[:2]
    toy.model.eval()
    n = sum(batch.size for batch in data)
    for batch in data:
        loss = sum(map_error(toy.model(**batch.inputs), batch).values(), torch.zeros(()).double())
        (loss * batch.size / n).backward()
    products = {name: (p * p.grad).detach().abs() for name, p in toy.model.named_parameters() if p.grad is not None}
    total = torch.cat([value.flatten() for value in products.values()]).sum()
    for name, value in scores.items():
        torch.testing.assert_close(value, products[name] / total, rtol=1e-12, atol=1e-18)
    snip = weight_masks({name: value / total for name, value in products.items()}, 0.8)
    ours = weight_masks(scores, 0.8)
    assert all(torch.equal(mask, ours[name]) for name, mask in snip.items())
    assert log["passes"] == 2
    assert log["stages"] == []
    assert log["notes"] == [
        "one modality (all): nothing can be redundant beside another, so the score is the contribution (DeCI) alone"
    ]


def test_one_modality_and_a_head_leave_contribution_alone() -> None:
    toy = ConvToy(("camera",))
    result = _channels(toy, FAST)
    assert "DeCI) alone" in result.log["notes"][0]
    assert {name: branch["sum"] for name, branch in result.log["branches"].items()} == pytest.approx(
        {"camera": 1.0, "fusion": 1.0}
    )


def test_beta_zero_skips_the_redundancy_and_says_so() -> None:
    toy = ConvToy()
    result = _channels(toy, FAST.model_copy(update={"beta": 0.0}))
    assert result.log["passes"] == 2
    assert result.log["notes"] == ["beta is 0: the redundancy term was not computed"]


# What is done to the model meanwhile


class Watching:
    """Losses that look at the model at every pass."""

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.seen: list[dict[str, Any]] = []
        self.look: Callable[[nn.Module], dict[str, Any]] = lambda model: {}

    def __call__(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        assert self.model is not None
        self.seen.append({"batch": batch.sample_ids[0], **self.look(self.model)})
        return map_error(outputs, batch)


def watched(look: Callable[[nn.Module], dict[str, Any]]) -> tuple[ConvToy, Watching]:
    watching = Watching()
    toy = ConvToy(losses=watching)
    watching.model, watching.look = toy.model, look
    return toy, watching


def test_passes_are_counted_and_each_gradient_uses_the_same_data() -> None:
    toy, watching = watched(lambda model: {})
    fractions: list[float] = []
    result = score_altermoma(
        toy.model, toy.task, ToyGraph(toy.groups), FAST, seed=0, progress=lambda done, _: fractions.append(done)
    )
    ids = [seen["batch"] for seen in watching.seen]
    stage = ["2-0", "3-0", "4-0", "0-0", "1-0", "0-0", "1-0"]  # B = 3 batches after D, gB on D, g0 on D
    assert ids == ["0-0", "1-0", *stage, *stage]
    assert result.log["passes"] == len(ids) == 2 + 2 * (2 * 2 + 3)
    assert result.log["samples"] == 5
    assert fractions == sorted(fractions)
    assert len(fractions) == len(ids)
    assert fractions[-1] == 1.0


def test_reactivation_trains_the_unmasked_branches_and_the_fusion_and_nothing_else() -> None:
    watched_names = ("camera.conv1.weight", "lidar.conv1.weight", "fuse.weight", "head.bias")

    def look(model: nn.Module) -> dict[str, Any]:
        parameters = dict(model.named_parameters())
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return {
            "values": {name: parameters[name].detach().clone() for name in watched_names},
            "buffers": buffers,
            "training": any(module.training for module in model.modules()),
        }

    toy, watching = watched(look)
    toy.model.train()
    toy.model.get_parameter("head.bias").requires_grad_(False)  # frozen by the user: stays so
    _channels(toy, FAST)
    start = {name: p.detach() for name, p in toy.model.named_parameters()}
    first = watching.seen[0]
    assert not any(seen["training"] for seen in watching.seen)
    for seen in watching.seen:
        assert all(torch.equal(value, first["buffers"][name]) for name, value in seen["buffers"].items())
    moved = [
        {name for name in watched_names if not torch.equal(seen["values"][name], start[name])} for seen in watching.seen
    ]
    camera_masked, lidar_masked = {"lidar.conv1.weight", "fuse.weight"}, {"camera.conv1.weight", "fuse.weight"}
    expected: list[set[str]] = [set(), set()]
    for after in (camera_masked, lidar_masked):
        # the first step sees the initial weights, and so does the gradient that comes last
        expected += [set(), after, after, after, after, set(), set()]
    assert moved == expected


def test_a_model_that_is_frozen_as_a_whole_is_reactivated_all_the_same() -> None:
    toy, frozen = ConvToy(), ConvToy()
    frozen.model.requires_grad_(False)
    first, second = _channels(toy, FAST), _channels(frozen, FAST)
    assert first.log == second.log
    assert not any(p.requires_grad for p in frozen.model.parameters())


def test_two_copies_of_what_is_not_masked_are_held() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.camera = nn.Linear(64, 512)
            self.lidar = nn.Linear(64, 512)
            self.head = nn.Linear(512, 64)

        def forward(self, camera: Tensor, lidar: Tensor) -> Tensor:
            out: Tensor = self.head(torch.relu(self.camera(camera) + self.lidar(lidar)))
            return out

    model = Wide()
    peak = 0

    def counting(outputs: Any, batch: Batch) -> dict[str, Tensor]:
        nonlocal peak
        own = [p.grad for p in model.parameters() if p.grad is not None]  # not seen by the collector otherwise
        alive = {id(t): t for t in [*own, *(o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter))]}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive.values()}
        peak = max(peak, sum(storages.values()))
        return squared_error(outputs, batch)

    batch = Batch(inputs={k: torch.randn(2, 64) for k in ("camera", "lidar")}, targets={"y": torch.randn(2, 64)})
    names = ("camera", "lidar", "head")
    groups = [_linear_group(name) for name in names if name != "head"]
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    gc.collect()
    counting(torch.zeros(()), Batch(inputs=batch.inputs, targets={"y": torch.zeros(())}))
    before, peak = peak, 0  # what other tests left behind, and the model itself
    config = ScoreConfig(beta=1.0, batches=2, reactivation_batches=1)
    score_altermoma(model, loaded([batch], LINEAR, counting), ToyGraph(groups), config, seed=0)
    assert 1.2 * size < peak - before <= 1.5 * size  # of two thirds: theta or gB, and the gradient; plus activations


def _linear_group(name: str) -> Any:
    from tests.scoring_toys import conv_group

    return conv_group(name, name, 512, consumer="head.weight")


# The log


def test_the_log_tells_how_the_masked_loss_moved() -> None:
    toy = ConvToy()
    log = _channels(toy, FAST).log
    assert [stage["masked"] for stage in log["stages"]] == ["camera", "lidar"]
    for stage in log["stages"]:
        assert stage["loss_after"] < 0.99 * stage["loss_before"]
        assert stage["steps"] == 3
        assert stage["zeroed_parameters_equal"] is True
    assert log["notes"] == []


def test_a_learning_rate_that_is_too_small_or_too_large_is_noted() -> None:
    toy = ConvToy()
    small = _channels(toy, FAST.model_copy(update={"reactivation_lr": 1e-7})).log["notes"]
    large = _channels(toy, FAST.model_copy(update={"reactivation_lr": 0.8, "reactivation_batches": 1})).log["notes"]
    assert len(small) == len(large) == 2
    assert "with camera masked the loss moved only from" in small[0]
    assert "raise score.reactivation_lr" in small[0]
    assert "with lidar masked the loss rose from" in large[1]
    assert "lower score.reactivation_lr" in large[1]


def test_the_log_tells_what_each_branch_keeps_under_one_threshold() -> None:
    toy = ConvToy()
    result = _channels(toy, FAST)
    branches = result.log["branches"]
    assert {name: branch["count"] for name, branch in branches.items()} == {"camera": 12, "lidar": 12, "fusion": 5}
    flat = sorted(
        ((value, group.branch) for group in toy.groups for value in result.channel[group.id].tolist()), reverse=True
    )
    kept = [branch for _, branch in flat[: round(0.5 * 29)]]
    for name, branch in branches.items():
        assert branch["kept_at"]["0.5"] == pytest.approx(kept.count(name) / branch["count"])
        assert branch["min"] <= branch["mean"] <= branch["max"]


def test_channel_scores_are_the_channel_sums_of_the_raw_products() -> None:
    toy = ConvToy()
    config = FAST.model_copy(update={"aggregate": "literal", "beta": 0.0})
    scores = _channels(toy, config).channel
    products = _signed_products(toy)
    sums = {
        group.id: sum(
            (products[m.param].flatten(1).sum(1) if products[m.param].ndim > 1 else products[m.param])
            for m in group.by_role("producer")
        )
        for group in toy.groups
    }
    for branch in ("camera", "lidar", "fusion"):
        mine = [group.id for group in toy.groups if group.branch == branch]
        total = sum(float(torch.as_tensor(sums[key]).abs().sum()) for key in mine)
        for key in mine:
            expected = torch.as_tensor(sums[key]).abs() / total
            torch.testing.assert_close(torch.from_numpy(scores[key]).double(), expected, rtol=1e-6, atol=1e-9)


def _signed_products(toy: ConvToy) -> dict[str, Tensor]:
    toy.model.eval()
    data = toy.task.user.data[:2]
    n = sum(batch.size for batch in data)
    for batch in data:
        loss = sum(map_error(toy.model(**batch.inputs), batch).values(), torch.zeros(()).double())
        (loss * batch.size / n).backward()
    products = {name: (p * p.grad).detach() for name, p in toy.model.named_parameters() if p.grad is not None}
    toy.model.zero_grad(set_to_none=True)
    return products


def test_the_scorer_of_channels_and_of_weights_name_the_same_branches() -> None:
    toy = ConvToy()
    scorer = ChannelScorer(toy.model, toy.groups, "gate")
    branches = branch_of_parameters(toy.model, toy.task.branches)
    for group in toy.groups:
        assert scorer.branch_of[group.id] == branches[group.producers[0]]
