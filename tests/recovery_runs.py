"""What tests of training share: runs of `recovery_toy.py`, killed and compared; a project of `sparsify_toy.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from fusepress.pipeline.graph.apply import weights_bytes
from fusepress.pipeline.recipe import FinetuneConfig
from fusepress.pipeline.recovery.contract import TrainProgress
from fusepress.pipeline.recovery.finetune import FinetuneResult, finetune
from fusepress.pipeline.task import LoadedTask, load_task

TESTS = Path(__file__).parent


def toy(task: LoadedTask) -> Any:
    return sys.modules[type(task.user).__module__]


def trained(
    task: LoadedTask, workdir: Path, config: FinetuneConfig, **options: Any
) -> tuple[FinetuneResult, dict[str, Tensor]]:
    """The result, and every tensor of the student."""
    student, teacher = toy(task).models()
    result = finetune(student, teacher, task, config, **{"seed": 3, "workdir": workdir, **options})
    return result, toy(task).everything(student)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


class Killed(Exception):
    pass


def kill_at(step: int) -> Callable[[TrainProgress], None]:
    def progress(now: TrainProgress) -> None:
        if now.step == step:
            raise Killed

    return progress


def toy_project(folder: Path, recipe: dict[str, Any], *, steps: int) -> Path:
    """A folder with `sparsify_toy.py`, its recipe, and its checkpoint, trained a little so that norms are settled."""
    (folder / "sparsify_toy.py").write_text((TESTS / "sparsify_toy.py").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    task = load_task("sparsify_toy.py:Toy", base=folder)
    model = task.build_model()
    finetune(model, None, task, FinetuneConfig(steps=steps, lr=5e-3), seed=0, workdir=folder / "work")
    (folder / "dense.safetensors").write_bytes(weights_bytes(model))
    return folder
