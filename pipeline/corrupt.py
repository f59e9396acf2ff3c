"""Sensor failures: the task's own, else defaults that act on a modality's inputs.

A task answers for its own failures with `corrupt(batch, failure, severity)`. It may list them as `failures`, then it
is asked for those only; otherwise it is asked first for every failure, and declines by returning None or raising
NotImplementedError. The defaults need `inputs_by_modality` (modality -> input names), and for a modality M are

* of every input: `M_blank` (dead: zeros), `M_noise`, `M_half` (every fourth, third or second row, point or beam is
  lost) and `M_stale` (the inputs of one, two or three frames ago in the same group of the split);
* of cameras: `M_dark`, `M_bright`;
* by what the dimensions mean (`input_layouts`): `M_lost` (one, two or three of several sensors), `M_narrow` (field of
  view), `M_sparse` (returns; not of cameras), `M_rotate` and `M_shift` (calibration).

What they do is in `sensors.py`, at severity 1, 2 and 3. All of them keep shapes and types, are deterministic, depend on
the sample and not on its batch, and leave the targets alone. `check_failure` refuses one that does nothing.
"""

from __future__ import annotations

import difflib
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fusepress.pipeline.errors import FusepressError, RecipeError, TaskError
from fusepress.pipeline.task import Batch, LoadedTask, Split, first_batch

if TYPE_CHECKING:
    from torch import Tensor

    from fusepress.pipeline.sensors import Layout

Corrupt = Callable[[Batch], Batch]

SEVERITIES = (1, 2, 3)
STALE_FRAMES = (0, 1, 2, 3)  # by severity
LOOKED_AT = 64  # samples that must hold two neighbours of one group, or nothing can be stale
KINDS = ("blank", "noise", "half", "dark", "bright", "lost", "stale", "narrow", "sparse", "rotate", "shift")
CAMERAS_ONLY = frozenset({"dark", "bright"})
NO_CAMERAS = frozenset({"sparse"})
BY_SAMPLE = frozenset(
    {"noise", "lost", "sparse", "stale"}
)  # training batches need no names, and one may go blank in them
BY_LAYOUT = frozenset({"bright", "lost", "narrow", "sparse", "rotate", "shift"})


def failures_of(task: LoadedTask) -> list[str]:
    """Names of the failures that `corrupt` knows for a task: its own `failures`, then the defaults.

    Raises:
        TaskError: `inputs_by_modality` names an unknown modality, or is no mapping to input names.
    """
    defaults = [f"{m}_{kind}" for m in inputs_by_modality(task) for kind in KINDS if _suits(task, m, kind)]
    return list(dict.fromkeys([*getattr(task.user, "failures", ()), *defaults]))


def watched(task: LoadedTask) -> list[str]:
    """Failures that every compressed fusion model is looked at under, whether a gate names them or not.

    Each modality dead, and half of what is not a camera: `camera_blank`, `lidar_blank`, `lidar_half`. None where there
    is one modality only, and those of a modality only where the task says which inputs are its.

    Raises:
        TaskError: `inputs_by_modality` names an unknown modality, or is no mapping to input names.
    """
    known = inputs_by_modality(task) if len(task.branches) > 1 else {}
    return [f"{m}_{kind}" for m in known for kind in ("blank", "half") if kind == "blank" or "camera" not in m]


def corrupt(task: LoadedTask, batch: Batch, failure: str, severity: int = 3) -> Batch:
    """A batch as a failing sensor would give it; of many batches `failing` is quicker for what is stale.

    Args:
        task: whose own `corrupt` is asked first.
        batch: any batch (for `M_stale` of the eval split); it is not changed.
        failure: a name of `failures_of(task)`, or any that the task's own `corrupt` answers to.
        severity: 1, 2 or 3 (worst); 0 is a healthy sensor.

    Returns:
        A batch with the same names, shapes and types of inputs.

    Raises:
        RecipeError: the failure is unknown (the known ones are listed), or the severity is.
        TaskError: the task's own `corrupt` fails or breaks the batch, or a default cannot act on the inputs.
    """
    return failing(task, failure, severity)(batch)


def failing(task: LoadedTask, failure: str, severity: int = 3, split: Split = "eval") -> Corrupt:
    """What `corrupt` does, for one batch of a split after the other.

    Raises:
        RecipeError: the severity is unknown.
    """
    if severity not in (0, *SEVERITIES):
        raise RecipeError(
            f"expected a severity of 1, 2 or 3; got {severity!r} for the failure {failure!r}; correct the recipe"
        )
    history = _History(task, split)
    return partial(_corrupted, task, failure=failure, severity=severity, history=history)


def check_failure(task: LoadedTask, failure: str, severity: int) -> None:
    """Check on the first batches of the eval split that a failure can act on the task's inputs, and does.

    Raises:
        RecipeError: the failure is unknown.
        TaskError: it cannot act on the inputs, or changes none of them.
    """
    import torch

    batch = first_batch(task, "eval")
    seen = corrupt(task, batch, failure, severity)
    if any(not torch.equal(value, seen.inputs[name]) for name, value in batch.inputs.items()):
        return
    if failure.endswith("_stale") and _own(task, batch, failure, severity) is None:
        _check_neighbours(task, failure)
        return
    raise TaskError(
        f"expected {failure} at severity {severity} to change an input; got the first eval batch as it was; "
        f"mend {task.name}.corrupt, or name the inputs that the sensor gives in inputs_by_modality and input_layouts"
    )


def blank(task: LoadedTask, batch: Batch, modality: str) -> Batch | None:
    """A batch with one modality dead, or None where the task says neither how nor which inputs."""
    own = _own(task, batch, f"{modality}_blank", 3)
    if own is not None:
        return own
    names = inputs_by_modality(task).get(modality)
    return None if names is None else _default(task, batch, _Failure(modality, names, "blank", 3), None)


def inputs_by_modality(task: LoadedTask) -> dict[str, list[str]]:
    """The task's `inputs_by_modality`, checked; empty where it has none.

    Raises:
        TaskError: it names an unknown modality, or is no mapping to input names.
    """
    declared: Any = getattr(task.user, "inputs_by_modality", {})
    if not isinstance(declared, dict) or not all(isinstance(names, list | tuple) for names in declared.values()):
        raise TaskError(
            f"expected {task.name}.inputs_by_modality to map each modality to a list of input names; got "
            f'{declared!r}; write for example {{"camera": ["image"]}}'
        )
    unknown = [modality for modality in declared if modality not in task.branches]
    if unknown:
        raise TaskError(
            f"expected the modalities {list(task.branches)} of {task.name}.branches; got {unknown} at "
            "inputs_by_modality; use the same names in both"
        )
    return {str(modality): [str(name) for name in names] for modality, names in declared.items()}


def input_layouts(task: LoadedTask) -> dict[str, Layout | None]:
    """The task's `input_layouts`, checked; empty where it has none, None for an input that failures leave as it is.

    Raises:
        TaskError: it is no mapping, or a layout does not exist.
    """
    from fusepress.pipeline.sensors import parse_layout

    declared: Any = getattr(task.user, "input_layouts", {})
    if not isinstance(declared, dict):
        raise TaskError(
            f"expected {task.name}.input_layouts to map input names to layouts; got {declared!r}; write for example "
            '{"image": "image", "points": "points"}'
        )
    where = f"{task.name}.input_layouts[{{!r}}]"
    return {
        name: None if layout is None else parse_layout(layout, where.format(name)) for name, layout in declared.items()
    }


def _own(task: LoadedTask, batch: Batch, failure: str, severity: int) -> Batch | None:
    listed = getattr(task.user, "failures", None)
    if not task.offers("corrupt") or (listed is not None and failure not in listed):
        return None
    try:
        answer = task.user.corrupt(batch, failure, severity)
    except NotImplementedError:
        return None
    except FusepressError:
        raise
    except Exception as error:
        raise TaskError(
            f"expected {task.name}.corrupt to answer; got {type(error).__name__}: {error} at the failure {failure!r}, "
            f"severity {severity}; mend it, or return None for a failure that it does not know"
        ) from error
    if answer is not None:
        _check_same_shapes(task, batch, answer, failure)
    return answer  # type: ignore[no-any-return]


def _check_same_shapes(task: LoadedTask, batch: Batch, answer: object, failure: str) -> None:
    wanted = {name: (tuple(value.shape), value.dtype) for name, value in batch.inputs.items()}
    found = (
        {name: (tuple(value.shape), value.dtype) for name, value in answer.inputs.items()}
        if isinstance(answer, Batch)
        else type(answer).__name__
    )
    if found != wanted:
        raise TaskError(
            f"expected {task.name}.corrupt to return a Batch with the inputs {wanted}; got {found} at the failure "
            f"{failure!r}; return batch.with_inputs(...) with the same shapes and types"
        )


def _suits(task: LoadedTask, modality: str, kind: str) -> bool:
    """Whether a kind of failure is one of such a sensor at all."""
    return kind not in (NO_CAMERAS if _is_camera(task, modality) else CAMERAS_ONLY)


def _is_camera(task: LoadedTask, modality: str) -> bool:
    """By its name, or because its inputs are declared to be images."""
    if "camera" in modality:
        return True
    layouts = [input_layouts(task).get(name) for name in inputs_by_modality(task).get(modality, ())]
    return any(layout is not None and layout.is_image for layout in layouts)


@dataclass(frozen=True, slots=True)
class _Failure:
    """A default failure."""

    modality: str
    names: list[str]
    kind: str
    severity: int


def _corrupted(task: LoadedTask, batch: Batch, *, failure: str, severity: int, history: _History) -> Batch:
    if severity == 0 and failure in getattr(task.user, "failures", ()):
        return batch  # nobody asks a task for a healthy sensor
    own = _own(task, batch, failure, severity) if severity else None
    if own is not None:
        return own
    modality, kind = _parse(task, failure)
    names = inputs_by_modality(task).get(modality)
    if names is None:
        raise TaskError(
            f"expected {task.name}.inputs_by_modality to name the inputs of {modality!r} for the failure "
            f"{failure!r}; got nothing; add for example inputs_by_modality = "
            f'{{"{modality}": {[next(iter(batch.inputs))]}}}, or a corrupt() of your own'
        )
    return _default(task, batch, _Failure(modality, names, kind, severity), history)


def _parse(task: LoadedTask, failure: str) -> tuple[str, str]:
    modality, _, kind = failure.rpartition("_")
    if kind in KINDS and modality in task.branches and _suits(task, modality, kind):
        return modality, kind
    known = failures_of(task)
    close = difflib.get_close_matches(failure, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"add it to {task.name}.corrupt"
    raise RecipeError(f"expected a failure of {known or 'which the task knows none'}; got {failure!r}; {hint}")


def _default(task: LoadedTask, batch: Batch, failure: _Failure, history: _History | None) -> Batch:
    modality, names, kind = failure.modality, failure.names, failure.kind
    absent = [name for name in names if name not in batch.inputs]
    if absent:
        raise TaskError(
            f"expected the inputs {list(batch.inputs)}; got {absent} at {task.name}.inputs_by_modality[{modality!r}]; "
            "name inputs of the batch"
        )
    if kind in BY_SAMPLE and len(batch.sample_ids) != batch.size:
        raise TaskError(
            f"expected {batch.size} sample_ids, which failures are drawn by; got {len(batch.sample_ids)}; name every "
            "sample"
        )
    if kind == "stale":
        assert history is not None
        return batch.with_inputs(**history.older(batch, names, STALE_FRAMES[failure.severity]))
    changed = _changed(task, batch, failure)
    if not changed:
        raise TaskError(
            f"expected an input that {modality}_{kind} can act on; got {names}, whose types or shapes do not suit, at "
            f"{task.name}.inputs_by_modality[{modality!r}]; write a corrupt() of your own"
        )
    return batch.with_inputs(**changed)


def _changed(task: LoadedTask, batch: Batch, failure: _Failure) -> dict[str, Tensor]:
    """The inputs that a failure acts on, changed."""
    from fusepress.pipeline import sensors

    layouts = _layouts(task, batch, failure)
    if failure.kind == "lost":
        values = {name: batch.inputs[name].clone() for name in layouts}
        sensors.lose_views(values, layouts, failure.severity, batch.sample_ids)
        return values
    wanted = layouts if failure.kind in BY_LAYOUT else failure.names
    found = {name: _one(batch, name, failure, layouts.get(name)) for name in wanted}
    return {name: value for name, value in found.items() if value is not None}


def _one(batch: Batch, name: str, failure: _Failure, layout: Layout | None) -> Tensor | None:
    """One input under a failure, or None where the failure is of another kind of input."""
    from fusepress.pipeline import sensors

    value, severity = batch.inputs[name], failure.severity
    match failure.kind:
        case "blank":
            return sensors.blank(value, severity)
        case "half" if layout is not None and layout.ring is not None:
            return sensors.drop_rings(value, severity, layout)
        case "half":
            return sensors.drop_every(value, severity)
    if not value.is_floating_point():
        return None
    match failure.kind:
        case "noise":
            return sensors.noise(value, severity, batch.sample_ids, name)
        case "dark":
            return sensors.expose(value, sensors.DARK_GAIN[severity], layout or sensors.Layout(kind="image"))
    assert layout is not None
    match failure.kind:
        case "bright":
            return sensors.expose(value, sensors.BRIGHT_GAIN[severity], layout)
        case "narrow":
            return sensors.narrow(value, severity, layout)
        case "sparse":
            return sensors.sparse(value, severity, layout, batch.sample_ids, name)
        case "rotate":
            return sensors.rotate(value, sensors.ROTATED_DEG[severity], layout)
    return sensors.shift(value, severity, layout)


def _layouts(task: LoadedTask, batch: Batch, failure: _Failure) -> dict[str, Layout]:
    """The layouts of a modality's inputs: declared, else what a camera's floating [N, C, H, W] and [N, V, C, H, W] are.

    Raises:
        TaskError: a failure that goes by layouts meets an input of another sensor without one: what the other inputs
            say would no longer agree with it.
    """
    from fusepress.pipeline.sensors import Layout

    declared = input_layouts(task)
    found = {name: layout for name in failure.names if (layout := declared.get(name)) is not None}
    if _is_camera(task, failure.modality):
        for name in failure.names:
            value = batch.inputs[name]
            if name not in declared and value.is_floating_point() and value.dim() in (4, 5):
                found[name] = Layout(kind="image" if value.dim() == 4 else "images")
    elif failure.kind in BY_LAYOUT:
        unknown = [name for name in failure.names if name not in declared]
        if unknown:
            raise TaskError(
                f"expected {task.name}.input_layouts to say what {unknown} are for {failure.modality}_{failure.kind}; "
                f'got nothing; write for example {{"{unknown[0]}": "points"}} (None for an input that such a failure '
                "leaves as it is), or a corrupt() of your own"
            )
    return found


class _History:
    """Frames of a split in their order, to find what a sample's sensor saw some frames ago.

    Args:
        task: whose batches.
        split: of the samples that are asked for.
    """

    def __init__(self, task: LoadedTask, split: Split) -> None:
        self._task, self._split = task, split
        self._seen: deque[tuple[str, str, dict[str, Tensor]]] = deque(maxlen=1 + max(STALE_FRAMES))
        self._frames: Iterator[tuple[str, str, dict[str, Tensor]]] = iter(())

    def older(self, batch: Batch, names: list[str], frames: int) -> dict[str, Tensor]:
        """The named inputs of so many frames before each sample, of fewer at the beginning of its group.

        Raises:
            TaskError: a sample is not in the split.
        """
        import torch

        found = [self._before(str(sample_id), frames) for sample_id in batch.sample_ids]
        return {name: torch.stack([inputs[name] for inputs in found]).to(batch.inputs[name].device) for name in names}

    def _before(self, sample_id: str, frames: int) -> dict[str, Tensor]:
        self._go_to(sample_id)
        own = next(place for place, frame in enumerate(self._seen) if frame[0] == sample_id)
        place = own
        while place > max(0, own - frames) and self._seen[place - 1][1] == self._seen[own][1]:
            place -= 1
        return self._seen[place][2]

    def _go_to(self, sample_id: str) -> None:
        """Read on until the sample is among the last ones seen; once around, where it lies behind."""
        for begun_again in (False, True):
            if begun_again:
                self._frames = _frames(self._task, self._split)
                self._seen.clear()
            while not self._seen or self._seen[-1][0] != sample_id:
                frame = next(self._frames, None)
                if frame is None:
                    break
                self._seen.append(frame)
            else:
                return
        raise TaskError(
            f"expected samples of batches({self._split!r}, 0), whose earlier frames are looked up; got {sample_id!r}, "
            "which is none; give the same samples every time"
        )


def _frames(task: LoadedTask, split: Split) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """Id, group and inputs of every sample."""
    for batch in task.batches(split, 0):
        for row, (sample_id, group) in enumerate(zip(batch.sample_ids, batch.groups, strict=True)):
            yield str(sample_id), str(group), {name: value[row] for name, value in batch.inputs.items()}


def _check_neighbours(task: LoadedTask, failure: str) -> None:
    groups = [group for _, group, _ in itertools.islice(_frames(task, "eval"), LOOKED_AT)]
    if any(one == other for one, other in itertools.pairwise(groups)):
        return
    raise TaskError(
        f"expected neighbouring frames of one group (scene, drive) for {failure}; got none in the first "
        f"{len(groups)} samples of the eval split; order them by time and group them, or remove the failure"
    )
