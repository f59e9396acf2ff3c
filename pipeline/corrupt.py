"""Sensor failures: the task's own, else defaults that act on a modality's inputs.

A task answers for its own failures with `corrupt(batch, failure, severity)`. It may list them as `failures`, then it
is asked for those only; otherwise it is asked first for every failure, and declines by returning None or raising
NotImplementedError. The defaults need `inputs_by_modality` (modality -> input names), and for a modality M are:

* `M_blank`: all inputs of M are zero, at every severity (a dead sensor).
* `M_noise`: Gaussian noise of 0.1, 0.25 or 0.5 (severity 1, 2, 3) times the sample's own standard deviation is added
  to the floating inputs. It is drawn by sample id, so a sample gets the same noise in any batch and any process.
* `M_half`: every fourth, third or second element (severity 1, 2, 3) along the last dimension but one is zero: rows of
  an image `[B, C, H, W]`, points of a list `[B, N, F]`, beams of a range image. A `[B, N]` input loses entries of N.
* `M_dark`, for modalities with "camera" in their name: the floating inputs times 0.5, 0.25 or 0.1.

All of them keep shapes and types, are deterministic, and leave the targets alone.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fusepress.pipeline.errors import FusepressError, RecipeError, TaskError
from fusepress.pipeline.task import Batch, LoadedTask

if TYPE_CHECKING:
    from torch import Tensor

SEVERITIES = (1, 2, 3)
NOISE = {1: 0.1, 2: 0.25, 3: 0.5}
DARK = {1: 0.5, 2: 0.25, 3: 0.1}
DROP_EVERY = {1: 4, 2: 3, 3: 2}
KINDS = ("blank", "noise", "half", "dark")


def failures_of(task: LoadedTask) -> list[str]:
    """Names of the failures that `corrupt` knows for a task: its own `failures`, then the defaults.

    Raises:
        TaskError: `inputs_by_modality` names an unknown modality, or is no mapping to input names.
    """
    defaults = [f"{m}_{kind}" for m in inputs_by_modality(task) for kind in KINDS if kind != "dark" or "camera" in m]
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
    """A batch as a failing sensor would give it.

    Args:
        task: whose own `corrupt` is asked first.
        batch: any batch; it is not changed.
        failure: a name of `failures_of(task)`, or any that the task's own `corrupt` answers to.
        severity: 1, 2 or 3 (worst).

    Returns:
        A batch with the same names, shapes and types of inputs.

    Raises:
        RecipeError: the failure is unknown (the known ones are listed), or the severity is.
        TaskError: the task's own `corrupt` fails or breaks the batch, or a default needs `inputs_by_modality`.
    """
    if severity not in SEVERITIES:
        raise RecipeError(
            f"expected a severity of 1, 2 or 3; got {severity!r} for the failure {failure!r}; correct the recipe"
        )
    own = _own(task, batch, failure, severity)
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
    return _default(task, batch, modality, names, kind, severity)


def blank(task: LoadedTask, batch: Batch, modality: str) -> Batch | None:
    """A batch with one modality dead, or None where the task says neither how nor which inputs."""
    own = _own(task, batch, f"{modality}_blank", 3)
    if own is not None:
        return own
    names = inputs_by_modality(task).get(modality)
    return None if names is None else _default(task, batch, modality, names, "blank", 3)


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


def _parse(task: LoadedTask, failure: str) -> tuple[str, str]:
    modality, _, kind = failure.rpartition("_")
    if kind in KINDS and modality in task.branches and (kind != "dark" or "camera" in modality):
        return modality, kind
    known = failures_of(task)
    close = difflib.get_close_matches(failure, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"add it to {task.name}.corrupt"
    raise RecipeError(f"expected a failure of {known or 'which the task knows none'}; got {failure!r}; {hint}")


def _default(task: LoadedTask, batch: Batch, modality: str, names: list[str], kind: str, severity: int) -> Batch:
    absent = [name for name in names if name not in batch.inputs]
    if absent:
        raise TaskError(
            f"expected the inputs {list(batch.inputs)}; got {absent} at {task.name}.inputs_by_modality[{modality!r}]; "
            "name inputs of the batch"
        )
    change = _CHANGES[kind]
    changed: dict[str, Tensor] = {}
    for name in names:
        value = change(batch, name, severity)
        if value is not None:
            changed[name] = value
    if not changed:
        raise TaskError(
            f"expected an input that {modality}_{kind} can act on; got {names}, whose types or shapes do not suit, at "
            f"{task.name}.inputs_by_modality[{modality!r}]; write a corrupt() of your own"
        )
    return batch.with_inputs(**changed)


def _blank(batch: Batch, name: str, severity: int) -> Tensor:
    del severity  # dead is dead
    import torch

    return torch.zeros_like(batch.inputs[name])


def _noise(batch: Batch, name: str, severity: int) -> Tensor | None:
    import torch

    value = batch.inputs[name]
    if not value.is_floating_point():
        return None
    if len(batch.sample_ids) != batch.size:
        raise TaskError(
            f"expected {batch.size} sample_ids, which noise is drawn by; got {len(batch.sample_ids)}; name every sample"
        )
    noisy = []
    for sample, sample_id in zip(value, batch.sample_ids, strict=True):
        seed = hashlib.sha256(f"{sample_id}\0{name}\0{severity}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)
        drawn = torch.randn(sample.shape, generator=generator, dtype=torch.float32).to(sample)
        noisy.append(sample + NOISE[severity] * sample.float().std(correction=0).to(sample) * drawn)
    return torch.stack(noisy)


def _half(batch: Batch, name: str, severity: int) -> Tensor | None:
    import torch

    value = batch.inputs[name]
    if value.dim() < 2:
        return None
    dim = max(value.dim() - 2, 1)
    every = DROP_EVERY[severity]
    dropped = torch.arange(value.shape[dim], device=value.device) % every == every - 1
    shape = [-1 if d == dim else 1 for d in range(value.dim())]
    return value.masked_fill(dropped.reshape(shape), 0)


def _dark(batch: Batch, name: str, severity: int) -> Tensor | None:
    value = batch.inputs[name]
    return value * DARK[severity] if value.is_floating_point() else None


_CHANGES: dict[str, Callable[[Batch, str, int], Any]] = {
    "blank": _blank,
    "noise": _noise,
    "half": _half,
    "dark": _dark,
}
