"""Detection on the street: targets, losses, decoding, and metrics against hand counts and a slow implementation."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusepress.pipeline.graph.groups import find_groups
from fusepress.pipeline.task import load_task

STREET = Path(__file__).resolve().parent.parent / "examples" / "street"
NAMES = ("car", "truck", "pedestrian")
load_task("multi_task.py:StreetDetectTask", base=STREET)  # imports its sibling modules
metrics: Any = importlib.import_module("detection_metrics")
detection: Any = importlib.import_module("detection")
world: Any = importlib.import_module("street_world")
pytestmark = pytest.mark.usefixtures("one_thread")


def box(x: float, y: float, length: float = 4.0, width: float = 2.0, height: float = 1.5, yaw: float = 0.0) -> Any:
    return [x, y, height / 2, length, width, height, yaw]


def matched(detections: Any, truths: Any) -> Any:
    """Matches of samples given as lists of (confidence, class, box) and (class, box)."""
    n, k = len(detections), max(1, *(len(one) for one in detections))
    slots = max(1, *(len(one) for one in truths))
    confidence, category, said = np.zeros((n, k)), np.zeros((n, k), np.int64), np.zeros((n, k, 7))
    kind, truth = np.full((n, slots), -1), np.zeros((n, slots, 7))
    for row, (some, there) in enumerate(zip(detections, truths, strict=True)):
        for place, (chance, number, what) in enumerate(sorted(some, key=lambda one: -one[0])):
            confidence[row, place], category[row, place], said[row, place] = chance, number, what
        for place, (number, what) in enumerate(there):
            kind[row, place], truth[row, place] = number, what
    return metrics.match(confidence, category, said, kind, truth, len(NAMES))


# ------------------------------------------------------------------------------------------------------ box errors


def test_box_errors_by_hand() -> None:
    one, other = np.array(box(0, 0, 4, 2, 1.5, 0.1)), np.array(box(3, 4, 2, 2, 1.5, 0.1 + math.pi))
    assert metrics.box_errors(one, other) == pytest.approx([5.0, 0.5, 0.0], abs=1e-12)  # half the volume; no front
    across = np.array(box(0, 0, yaw=0.1 - 0.3))
    assert metrics.box_errors(one, across)[2] == pytest.approx(0.3)
    assert metrics.box_errors(one, np.array(box(0, 0, yaw=0.1 + math.pi / 2)))[2] == pytest.approx(math.pi / 2)


# --------------------------------------------------------------------------------------------------------- matching


def test_the_more_confident_detection_takes_the_box_and_the_other_is_false() -> None:
    found = matched([[(0.9, 0, box(0.4, 0)), (0.8, 0, box(0, 0))]], [[(0, box(0, 0))]])
    assert found.hit[0].tolist() == [[True] * 4, [False] * 4]


def test_a_distance_decides_strictly_below_its_limit() -> None:
    found = matched([[(0.9, 0, box(1.0, 0))]], [[(0, box(0, 0))]])
    assert found.hit[0, 0].tolist() == [False, False, True, True]


def test_classes_and_samples_do_not_mix() -> None:
    found = matched([[(0.9, 1, box(0, 0))], [(0.9, 0, box(50, 0))]], [[(0, box(0, 0))], [(1, box(50, 0))]])
    assert not found.hit.any()
    assert found.truths.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert np.isnan(found.error).all()


def test_a_taken_box_leaves_the_next_nearest() -> None:
    found = matched([[(0.9, 0, box(0.3, 0)), (0.8, 0, box(0.2, 0))]], [[(0, box(0, 0)), (0, box(1.5, 0))]])
    assert found.hit[0].tolist() == [[True] * 4, [False, False, True, True]]
    assert found.error[0, :, 0] == pytest.approx([0.3, 1.3])


def test_unsorted_detections_are_refused() -> None:
    zeros, boxes = np.zeros((1, 2), np.int64), np.zeros((1, 2, 7))
    with pytest.raises(ValueError, match="expected detections from high to low confidence"):
        metrics.match(np.array([[0.1, 0.2]]), zeros, boxes, zeros, boxes, 3)


# ------------------------------------------------------------------------------------------- average precision, NDS*


def test_perfect_detections_score_one() -> None:
    truths = [[(number, box(5.0 * number, 3.0)) for number in range(3)] for _ in range(20)]
    detections = [[(0.5 + 0.01 * row, number, what) for number, what in one] for row, one in enumerate(truths)]
    found = metrics.score(matched(detections, truths), NAMES)
    assert found == pytest.approx(
        {"nds": 1.0, "map": 1.0, "ate_m": 0.0, "ase": 0.0, "aoe_rad": 0.0} | {f"ap_{name}": 1.0 for name in NAMES}
    )


def test_nothing_found_scores_zero_with_errors_of_one() -> None:
    found = metrics.score(matched([[]], [[(0, box(0, 0))]]), NAMES)
    assert (found["map"], found["nds"]) == (0.0, 0.0)
    assert [found[name] for name in metrics.ERRORS] == [1.0, 1.0, 1.0]


def test_half_of_the_boxes_found_gives_the_area_up_to_half_recall() -> None:
    hit = np.array([True] * 10)
    # precision 1 up to recall 0.5 and 0 beyond: 40 of the 90 grid points above a recall of 0.1
    assert metrics.average_precision(hit, 20) == pytest.approx(40 / 90)


def test_precision_by_hand_with_false_detections_in_front() -> None:
    # two false, then both boxes: precision 1/3 at recall 0.5, 1/2 at recall 1; interpolated in between, from 0 at 0
    hit = np.array([False, False, True, True])
    recall, precision = np.array([0, 0, 0.5, 1.0]), np.array([0, 0, 1 / 3, 1 / 2])
    area = sum(max(0.0, np.interp(k / 100, recall, precision) - 0.1) for k in range(11, 101)) / 90 / 0.9
    assert metrics.average_precision(hit, 2) == pytest.approx(area)


def test_errors_are_the_running_means_over_recall() -> None:
    confidence = np.array([0.9, 0.8])
    error = np.array([[0.2, 0, 0], [0.6, 0, 0]])
    found = metrics.mean_errors(confidence, np.array([True, True]), error, 2)
    # running means 0.2 and 0.4; constant up to recall 0.5, then linear in the confidence to recall 1
    expected = [0.2 if k <= 50 else 0.2 + 0.2 * (k - 50) / 50 for k in range(11, 101)]
    assert found[0] == pytest.approx(np.mean(expected))


def test_errors_are_one_where_recall_stays_at_a_tenth() -> None:
    found = metrics.mean_errors(np.array([0.9]), np.array([True]), np.zeros((1, 3)), 10)
    assert found.tolist() == [1.0, 1.0, 1.0]


def slow_score(detections: Any, truths: Any) -> dict[str, float]:
    """The definition, one detection at a time over all samples, as the benchmark describes it."""
    precisions, errors = [], []
    for number in range(3):
        total = sum(kind == number for one in truths for kind, _ in one)
        ranked = sorted(
            ((chance, row, what) for row, one in enumerate(detections) for chance, kind, what in one if kind == number),
            key=lambda item: -item[0],
        )
        for limit in (0.5, 1.0, 2.0, 4.0):
            taken: set[tuple[int, int]] = set()
            recall, precision, sure, sums, right = [], [], [], [], 0
            for place, (chance, row, what) in enumerate(ranked, start=1):
                best, where = math.inf, None
                for slot, (kind, there) in enumerate(truths[row]):
                    gap = math.hypot(what[0] - there[0], what[1] - there[1])
                    if kind == number and (row, slot) not in taken and gap < best:
                        best, where = gap, slot
                if where is not None and best < limit:
                    taken.add((row, where))
                    right += 1
                    there = truths[row][where][1]
                    turn = abs(what[6] - there[6]) % math.pi
                    common = math.prod(min(a, b) for a, b in zip(what[3:6], there[3:6], strict=True))
                    either = math.prod(what[3:6]) + math.prod(there[3:6]) - common
                    sums.append([best, 1 - common / either, min(turn, math.pi - turn)])
                    sure.append(chance)
                recall.append(right / total if total else 0.0)
                precision.append(right / place)
            points = [k / 100 for k in range(11, 101)]
            curve = [np.interp(p, recall, precision, right=0.0) if right else 0.0 for p in points]
            precisions.append(sum(max(0.0, float(value) - 0.1) for value in curve) / 90 / 0.9)
            if limit == 2.0:
                errors.append(_slow_errors(recall, [one[0] for one in ranked], sure, sums))
    mean_error = np.mean(errors, axis=0)
    mean_precision = float(np.mean(precisions))
    nds = (5 * mean_precision + sum(max(0.0, 1 - value) for value in mean_error)) / 8
    return {"nds": nds, "map": mean_precision} | dict(zip(metrics.ERRORS, map(float, mean_error), strict=True))


def _slow_errors(recall: Any, chances: Any, sure: Any, sums: Any) -> list[float]:
    if not sure:
        return [1.0, 1.0, 1.0]
    confidence = [float(np.interp(k / 100, recall, chances, right=0.0)) for k in range(101)]
    last = max((k for k in range(101) if confidence[k] > 0), default=0)
    if last < 11:
        return [1.0, 1.0, 1.0]
    found = []
    for axis in range(3):
        means = [sum(one[axis] for one in sums[: k + 1]) / (k + 1) for k in range(len(sums))]
        values = [float(np.interp(confidence[k], sure[::-1], means[::-1])) for k in range(11, last + 1)]
        found.append(sum(values) / len(values))
    return found


@st.composite
def worlds(draw: Any) -> tuple[Any, Any]:
    """A few samples of boxes near one another, detections around them, all confidences different."""
    place = st.floats(0, 6).map(lambda value: round(value, 3))
    some_box = st.builds(box, place, place, st.floats(1, 5), st.floats(1, 3), st.floats(1, 2), st.floats(-3, 3))
    n = draw(st.integers(1, 4))
    truths = [draw(st.lists(st.tuples(st.integers(0, 2), some_box), max_size=5)) for _ in range(n)]
    counts = [draw(st.integers(0, 6)) for _ in range(n)]
    chances = draw(st.lists(st.integers(1, 10**6), min_size=sum(counts), max_size=sum(counts), unique=True))
    detections = []
    for count in counts:
        mine, chances = chances[:count], chances[count:]
        detections.append([(value / 1e6, draw(st.integers(0, 2)), draw(some_box)) for value in mine])
    return detections, truths


@settings(max_examples=60, deadline=None)
@given(worlds())
def test_the_score_equals_the_slow_definition(case: tuple[Any, Any]) -> None:
    detections, truths = case
    found, expected = metrics.score(matched(detections, truths), NAMES), slow_score(detections, truths)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name


@settings(max_examples=30, deadline=None)
@given(worlds(), st.data())
def test_statistics_of_chosen_samples_score_like_these_samples(case: tuple[Any, Any], data: Any) -> None:
    """What a bootstrap does: rows are taken with repetition, and scored without matching anew."""
    detections, truths = case
    rows = data.draw(st.lists(st.integers(0, len(truths) - 1), min_size=1, max_size=6, unique=True))
    stats = metrics.as_stats(matched(detections, truths))
    few = metrics.from_stats({name: value[rows] for name, value in stats.items()})
    expected = slow_score([detections[row] for row in rows], [truths[row] for row in rows])
    assert metrics.score(few, NAMES)["nds"] == pytest.approx(expected["nds"], abs=1e-9)


def test_repeating_every_sample_changes_no_score() -> None:
    rng = np.random.default_rng(0)
    truths = [[(0, box(*rng.uniform(0, 9, 2))) for _ in range(4)] for _ in range(6)]
    detections = [[(float(rng.random()), 0, box(what[0] + rng.normal(), what[1])) for _, what in one] for one in truths]
    stats = metrics.as_stats(matched(detections, truths))
    twice = metrics.from_stats({name: np.repeat(value, 2, axis=0) for name, value in stats.items()})
    once = metrics.score(metrics.from_stats(stats), NAMES)
    assert metrics.score(twice, NAMES)["map"] == pytest.approx(once["map"], abs=0.02)  # ties interpolate elsewhere


# ------------------------------------------------------------------------------------------ targets, losses, decoding


def some_truth() -> tuple[torch.Tensor, torch.Tensor]:
    kind = torch.tensor([[0, 2, -1], [1, -1, 2]])
    boxes = torch.tensor(
        [
            [box(8.1, 1.3, yaw=0.3), box(15.0, -4.44, 1.0, 0.9, 1.7, -0.6), box(5, 5)],
            [box(12.0, 6.0, 7.0, 2.5, 3.0, 1.4), box(0, 0), box(9.9, 0.05, 1.1, 1.0, 1.8, 0.0)],
        ]
    )
    return kind, boxes


def perfect_outputs(kind: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    heat = torch.logit(detection.heat_targets(kind, boxes).clamp(1e-4, 1 - 1e-4))
    said = torch.zeros(len(kind), 7, 48, 48)
    wanted = detection.box_targets(boxes)
    for row, slot in np.argwhere(kind.numpy() >= 0):
        cell = ((boxes[row, slot, :2] - torch.tensor([world.BEV_X, world.BEV_Y])) / world.CELL).floor().long()
        said[row, :, cell[0], cell[1]] = wanted[row, slot]
    return heat, said


def test_heat_maps_peak_at_one_in_the_cells_of_centres_and_fall_as_gaussians() -> None:
    kind, boxes = some_truth()
    heat = detection.heat_targets(kind, boxes)
    assert heat.shape == (2, 3, 48, 48)
    assert [(heat[row, number] == 1).sum().item() for row in range(2) for number in range(3)] == [1, 0, 1, 0, 1, 1]
    row, column = np.argwhere(heat[1, 1].numpy() == 1)[0]
    assert (row, column) == (int((12.0 - 2.0) / 0.4), int((6.0 + 9.6) / 0.4))
    sigma = 2.5 / 1.6
    assert heat[1, 1, row + 2, column - 1].item() == pytest.approx(math.exp(-5 / (2 * sigma**2)), rel=1e-5)
    assert not heat[0, 1].any()


def test_targets_losses_and_decoding_stay_on_the_device_of_their_inputs() -> None:
    """The meta device stands for an accelerator: mixing it with the CPU fails in the same way."""
    kind, boxes = (value.to("meta") for value in some_truth())
    heat, said = torch.zeros(2, 3, 48, 48, device="meta"), torch.zeros(2, 7, 48, 48, device="meta")
    target = detection.heat_targets(kind, boxes)
    made = [target, detection.box_targets(boxes), detection.focal_loss(heat, target)]
    made += [detection.box_loss(said, kind, boxes), *detection.decode(heat, said)]
    assert {str(value.device) for value in made} == {"meta"}


def test_decoding_inverts_the_targets() -> None:
    kind, boxes = some_truth()
    confidence, category, found = detection.decode(*perfect_outputs(kind, boxes))
    for row in range(2):
        there = kind[row] >= 0
        assert (confidence[row] > 0.5).sum() == there.sum()
        for number, truth in zip(kind[row][there], boxes[row][there], strict=True):
            place = int((category[row] == number).nonzero()[0])
            error = metrics.box_errors(found[row, place].numpy().astype(float), truth.numpy().astype(float))
            assert error == pytest.approx([0, 0, 0], abs=1e-3)
            assert found[row, place, 2].item() == pytest.approx(truth[2].item(), rel=1e-4)


def test_decoding_keeps_local_maxima_in_view_only_and_fills_up_with_zeros() -> None:
    heat = torch.full((1, 3, 48, 48), -9.0)
    heat[0, 0, 20, 20], heat[0, 0, 20, 21] = 3.0, 2.0  # neighbours: one object
    heat[0, 1, 20, 21] = 1.0  # another class beside it
    heat[0, 2, 0, 0] = 5.0  # beside the camera's view
    confidence, category, _ = detection.decode(heat, torch.zeros(1, 7, 48, 48), top=6)
    assert confidence[0, :2].tolist() == pytest.approx([1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-1))])
    assert not confidence[0, 2:].any()
    assert category[0, :2].tolist() == [0, 1]


def test_losses_vanish_at_the_truth_and_grow_away_from_it() -> None:
    kind, boxes = some_truth()
    target = detection.heat_targets(kind, boxes)
    _, said = perfect_outputs(kind, boxes)
    hard = torch.where(target == 1, 12.0, -12.0)
    assert detection.focal_loss(hard, target).item() < 1e-3
    assert detection.focal_loss(-hard, target).item() > 10
    assert detection.box_loss(said, kind, boxes).item() == pytest.approx(0.0, abs=1e-6)
    # only the cells of boxes count, and all seven numbers equally
    assert detection.box_loss(said + 0.5, kind, boxes).item() == pytest.approx(0.5, rel=1e-5)
    assert detection.box_loss(torch.full_like(said, 9.0), torch.full_like(kind, -1), boxes).item() == 0.0


def test_the_focal_loss_by_hand_on_one_cell() -> None:
    """(1 - p)^2 log p at a centre, (1 - y)^4 p^2 log(1 - p) elsewhere; the rest of the map is silent."""
    heat, target = torch.full((1, 1, 48, 48), -40.0), torch.zeros(1, 1, 48, 48)
    heat[0, 0, 20, 20], target[0, 0, 20, 20] = 0.4, 1.0
    heat[0, 0, 20, 22], target[0, 0, 20, 22] = -0.3, 0.25
    p, q = 1 / (1 + math.exp(-0.4)), 1 / (1 + math.exp(0.3))
    expected = -((1 - p) ** 2 * math.log(p) + 0.75**4 * q**2 * math.log(1 - q))
    assert detection.focal_loss(heat, target).item() == pytest.approx(expected, rel=1e-5)


def test_cells_beside_the_view_cost_nothing() -> None:
    kind, boxes = some_truth()
    target = detection.heat_targets(kind, boxes)
    heat = torch.zeros_like(target)
    loud = torch.where(detection.in_view(), heat, 9.0)
    assert detection.focal_loss(loud, target).item() == pytest.approx(detection.focal_loss(heat, target).item())
    assert not detection.in_view().all()


# ------------------------------------------------------------------------------------------------------------ network


def test_the_detecting_network_can_be_pruned_up_to_its_outputs() -> None:
    torch.manual_seed(0)
    frames = world.sense(world.draw_scenes("train", 0, [0, 1]))
    inputs = {name: torch.from_numpy(getattr(frames, name)) for name in ("image", "points", "cells")}
    model = detection.StreetDetection(0.25).eval()
    with torch.no_grad():
        shapes = {name: tuple(value.shape[1:]) for name, value in model(**inputs).items()}
    assert shapes == {"segmentation": (6, 48, 48), "heat": (3, 48, 48), "box": (7, 48, 48)}
    graph = find_groups(model, inputs, {"camera": ["camera"], "lidar": ["lidar"]}, blocks=False)
    assert {"fuser.0.weight", "head.conv.0.weight", "detection.conv.0.weight"} <= set(graph.widths)
    assert {frozen.module for frozen in graph.frozen} == {"head.out", "detection.heat", "detection.box"}
