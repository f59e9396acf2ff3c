"""SparseLoRA: gradients, exact merging, the pattern, the share of trained parameters, and resuming."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fusepress.pipeline.errors import CheckpointError, RecipeError
from fusepress.pipeline.graph.apply import architecture_sha256, weights_bytes
from fusepress.pipeline.graph.masks import MaskHolder, masks_2to4, violations_2to4
from fusepress.pipeline.recipe import FinetuneConfig
from fusepress.pipeline.recovery.finetune import TrainProgress, finetune
from fusepress.pipeline.recovery.sparselora import MaskedLowRank, SparseLora, attach, choose_ranks
from fusepress.pipeline.recovery.weighting import shared_parameters
from fusepress.pipeline.task import LoadedTask, load_task

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def seeded(one_thread: None) -> None:
    torch.manual_seed(0)


class Mixed(nn.Module):
    """Each kind of layer that can be adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True, kdim=4, vdim=4)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(F.relu(self.grouped(F.relu(self.norm(self.stem(x)))))).flatten(2).transpose(1, 2)
        y = y + self.attention(y, y, y, need_weights=False)[0]
        y = y + self.cross(y, y[..., :4], y[..., 4:], need_weights=False)[0]
        return self.last(y.mean(1))  # type: ignore[no-any-return]


OPTIONS: dict[str, Any] = {"rank": 3, "alpha": 6.0, "max_trainable": 1.0, "seed": 0}


def mixed(kind: torch.dtype = torch.float64) -> tuple[Mixed, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Mixed().to(kind).eval()
    return model, masks_2to4(model)[0]


def image(kind: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(kind)


def stirred(lora: SparseLora) -> SparseLora:
    """B away from zero, as after training."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in lora.model.named_parameters():
            if name.endswith(".b") and parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return lora


# --- one weight -------------------------------------------------------------------------------------------------------


def test_the_gradients_are_those_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 2, 3, dtype=torch.float64, generator=generator)
    mask = torch.rand(weight.shape, generator=generator) > 0.5
    update = MaskedLowRank(weight, mask, rank=2, alpha=5.0, generator=generator)
    nn.init.normal_(update.b, generator=generator)
    gradient = torch.randn(weight.shape, dtype=torch.float64, generator=generator)
    update(weight).backward(gradient)
    masked = (gradient * mask).flatten(1)
    assert update.a.grad is not None
    assert update.b.grad is not None
    torch.testing.assert_close(update.b.grad, 2.5 * masked @ update.a.T)
    torch.testing.assert_close(update.a.grad, 2.5 * update.b.T @ masked)


@pytest.mark.parametrize("mask_sum", [True, False])
def test_the_gradients_agree_with_finite_differences(mask_sum: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    mask = torch.rand(weight.shape, generator=generator) > 0.5
    update = MaskedLowRank(weight, mask, rank=2, alpha=5.0, generator=generator, mask_sum=mask_sum)
    x = torch.randn(3, 6, dtype=torch.float64, generator=generator)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(update, {"a": a, "b": b}, (weight,))
        return (x @ found.T).square().sum()

    nn.init.normal_(update.b, generator=generator)
    assert torch.autograd.gradcheck(loss, (update.a, update.b))


# --- the model --------------------------------------------------------------------------------------------------------


def test_before_the_first_step_it_is_the_masked_model() -> None:
    model, masks = mixed()
    plain = copy.deepcopy(model)
    MaskHolder(masks).apply(plain)
    lora = attach(model, masks, **OPTIONS)
    assert len(lora.report.ranks) == 10
    assert torch.equal(model(image()), plain(image()))
    lora.merge()
    assert weights_bytes(model) == weights_bytes(plain)


def test_merging_changes_no_bit_of_the_outputs_and_leaves_the_very_same_class_and_names() -> None:
    model, masks = mixed()
    sha, names, types = architecture_sha256(model), list(model.state_dict()), [type(m) for m in model.modules()]
    lora = stirred(attach(model, masks, **OPTIONS))
    assert architecture_sha256(model) != sha
    before = model(image())
    lora.merge()
    assert torch.equal(model(image()), before)
    assert (architecture_sha256(model), list(model.state_dict())) == (sha, names)
    assert [type(m) for m in model.modules()] == types
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_after_merging_the_pattern_holds_bit_for_bit(kind: torch.dtype) -> None:
    model, masks = mixed(kind)
    before = {name: model.get_parameter(name).detach().clone() for name in masks}
    stirred(attach(model, masks, **OPTIONS)).merge()
    for name, mask in masks.items():
        weight = model.get_parameter(name).detach()
        assert not weight[~mask].view(torch.int16 if kind == torch.bfloat16 else torch.int32).any()  # no -0.0 either
        assert violations_2to4(weight) == 0
        changed = (weight != before[name])[mask]
        assert changed.float().mean() > 0.9  # of the kept weights
    assert not torch.equal(model.stem.weight, mixed(kind)[0].stem.weight)  # no mask: an update without one


def test_lora_without_the_mask_on_the_sum_makes_the_weights_dense_again() -> None:
    """The control: the same updates merged as LoRA merges them."""
    model, masks = mixed()
    lora = stirred(attach(model, masks, mask_sum=False, **OPTIONS))
    before = model(image())
    lora.merge()
    assert torch.equal(model(image()), before)
    for name in masks:
        weight = model.get_parameter(name).detach()
        assert int(weight.count_nonzero()) == weight.numel()
        assert violations_2to4(weight) == weight.numel() // 4


def test_only_updates_norms_and_biases_are_trained_and_counted() -> None:
    model, masks = mixed()
    total = sum(p.numel() for p in model.parameters())
    lora = attach(model, masks, **OPTIONS)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith((".a", ".b", "bias")) or name.startswith("norm") for name in trained)
    report = lora.report
    assert report.total == total
    assert report.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.fraction == report.trained / total
    assert report.nonzero == total - sum(int((~mask).sum()) for mask in masks.values())
    without = attach(mixed()[0], masks, norms_and_biases=False, **OPTIONS)
    assert {name.rpartition(".")[2] for name, p in without.model.named_parameters() if p.requires_grad} == {"a", "b"}


@pytest.mark.parametrize("share", [0.35, 0.5])
def test_the_share_of_trained_parameters_is_kept(share: float) -> None:
    model, masks = mixed()
    lora = attach(model, masks, **{**OPTIONS, "max_trainable": share})
    assert 0 < lora.report.fraction <= share
    assert set(lora.report.frozen) == set(weights_of(mixed()[0])) - set(lora.report.ranks)


def weights_of(model: nn.Module) -> Mapping[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.ndim >= 2}


def test_a_share_without_room_is_refused() -> None:
    model, masks = mixed()
    with pytest.raises(RecipeError, match=r"room .* sparsify.max_trainable; got 0.05 of \d+ .* at Mixed; raise"):
        attach(model, masks, **{**OPTIONS, "max_trainable": 0.05})


def test_masks_of_another_model_are_refused() -> None:
    model, masks = mixed()
    with pytest.raises(CheckpointError, match="the masks belong to another model"):
        attach(model, {"nothing.weight": masks["last.weight"]}, **OPTIONS)


def test_what_the_user_froze_and_what_is_tied_keeps_its_values() -> None:
    model, masks = mixed()
    model.last.weight.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    lora = attach(model, masks, **OPTIONS)
    assert "last.weight" in lora.report.frozen
    assert not model.norm.bias.requires_grad
    lora.merge()
    assert not model.last.weight.requires_grad
    assert not model.norm.bias.requires_grad
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    tied = nn.Sequential(first, second, nn.Linear(8, 8))
    lora = attach(tied, {}, **OPTIONS)
    assert (list(lora.report.ranks), lora.report.frozen) == (["2.weight"], ("0.weight",))
    assert lora.merge()[0].weight is lora.model[1].weight  # type: ignore[index]


@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=6),
    most=st.integers(0, 9),
    room=st.integers(0, 3000),
)
def test_ranks_fit_and_nothing_that_fits_is_left(shapes: list[tuple[int, int]], most: int, room: int) -> None:
    named = {str(k): shape for k, shape in enumerate(shapes)}
    ranks = choose_ranks(named, most, room)
    spent = sum(ranks[name] * sum(shape) for name, shape in named.items())
    assert spent <= room
    for name, shape in named.items():
        assert ranks[name] <= min(most, *shape)
        assert ranks[name] == min(most, *shape) or spent + sum(shape) > room


def test_layers_get_a_like_share_of_their_own_parameters() -> None:
    """A rank of the wide layer is an eighth of the share that a rank of the narrow one is."""
    ranks = choose_ranks({"wide": (256, 2304), "narrow": (32, 288)}, 64, 16 * 2560 + 2 * 320)
    assert ranks == {"wide": 16, "narrow": 2}


# --- training ---------------------------------------------------------------------------------------------------------

CONFIG = FinetuneConfig(steps=24, lr=0.02, checkpoint_every=5, ema=0.9)


@pytest.fixture
def task() -> LoadedTask:
    return load_task("recovery_toy.py:Toy", base=TESTS)


class Killed(Exception):
    pass


def trained(task: LoadedTask, work: Path, kill: int = 0, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    toy = sys.modules[type(task.user).__module__]
    student, teacher = toy.models()
    masks, _ = masks_2to4(student)
    lora = attach(student, masks, **{**OPTIONS, **options})

    def progress(now: TrainProgress) -> None:
        if now.step == kill:
            raise Killed

    finetune(student, teacher, task, CONFIG, seed=3, workdir=work, progress=progress)
    return lora.merge(), masks


def test_training_moves_the_kept_weights_and_no_others(task: LoadedTask, tmp_path: Path) -> None:
    model, masks = trained(task, tmp_path)
    start = sys.modules[type(task.user).__module__].models()[0]
    for name, mask in masks.items():
        weight = model.get_parameter(name).detach()
        assert violations_2to4(weight) == 0
        assert int(weight[~mask].count_nonzero()) == 0
        assert not torch.equal(weight[mask], start.get_parameter(name).detach()[mask])


def test_killed_and_resumed_it_ends_with_the_same_bytes(task: LoadedTask, tmp_path: Path) -> None:
    straight, _ = trained(task, tmp_path / "a")
    with pytest.raises(Killed):
        trained(task, tmp_path / "b", kill=12)
    resumed, _ = trained(task, tmp_path / "b")
    assert weights_bytes(straight) == weights_bytes(resumed)
    other, _ = trained(task, tmp_path / "b", seed=1)  # other start values: not the same run
    assert weights_bytes(other) != weights_bytes(straight)


@pytest.mark.parametrize("shared", ["drop.0.weight", "drop.0", None], ids=["weight", "module", "found"])
def test_gradnorm_measures_at_the_updates_of_a_shared_weight(
    task: LoadedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: str | None
) -> None:
    monkeypatch.setattr(type(task.user), "shared", shared, raising=False)
    student, teacher = sys.modules[type(task.user).__module__].models()
    student.drop = nn.Sequential(nn.Linear(16, 16), nn.ReLU())  # what fuses the branches
    lora = attach(student, masks_2to4(student)[0], **{**OPTIONS, "max_trainable": 0.9})
    update = student.get_submodule("drop.0.parametrizations.weight.0")
    assert isinstance(update, MaskedLowRank)
    assert [id(p) for p in shared_parameters(student, task, 0)] == [id(update.a), id(update.b)]
    config = CONFIG.model_copy(update={"loss_weights": "gradnorm", "gradnorm_every": 1, "steps": 3})
    history = finetune(student, teacher, task, config, seed=3, workdir=tmp_path).history
    assert all(sum(point["weights"].values()) == pytest.approx(len(point["weights"])) for point in history)
    lora.merge()


@pytest.mark.parametrize("changed", [{"alpha": 12.0}, {"mask_sum": False}], ids=["scale", "plain"])
def test_a_checkpoint_of_other_updates_is_not_taken_up(
    task: LoadedTask, tmp_path: Path, changed: dict[str, Any]
) -> None:
    trained(task, tmp_path / "a")
    after_another, _ = trained(task, tmp_path / "a", **changed)
    fresh, _ = trained(task, tmp_path / "b", **changed)
    assert weights_bytes(after_another) == weights_bytes(fresh)
