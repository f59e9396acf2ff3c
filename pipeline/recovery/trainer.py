"""Our training loop: the state of a run, one step of it, and how it is saved and taken up again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusepress.pipeline.recipe import FinetuneConfig
from fusepress.pipeline.recovery import rng
from fusepress.pipeline.recovery.checkpoint import TrainState, load_checkpoint, save_checkpoint, tensors_sha256
from fusepress.pipeline.recovery.contract import HISTORY_POINTS, FinetuneResult, Masks, TrainProgress
from fusepress.pipeline.recovery.distill import Distiller
from fusepress.pipeline.recovery.objective import Objective
from fusepress.pipeline.recovery.optim import adamw, learning_rate
from fusepress.pipeline.recovery.placement import all_tensors, on_device
from fusepress.pipeline.recovery.precision import Amp
from fusepress.pipeline.task import Batch, LoadedTask

VERSION = 1


class Trainer:
    """The state of a run and one step of it."""

    def __init__(
        self,
        student: nn.Module,
        distiller: Distiller | None,
        task: LoadedTask,
        config: FinetuneConfig,
        seed: int,
        device: torch.device,
        amp: Amp,
        masks: Masks | None,
    ) -> None:
        self.student, self.task, self.config = student, task, config
        self.seed, self.device, self.amp, self.masks = seed, device, amp, masks
        self.objective = Objective(student, distiller, task, config, seed, amp)
        self.identity = _identity(student, distiller, config, seed, amp.format, masks)
        self.trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self.optimizer = adamw(self.trained, config)
        self.average = {name: p.detach().clone() for name, p in self.trained.items()} if config.ema else {}
        self.step = 0
        self.losses: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []

    def run(self, workdir: Path, progress: Callable[[TrainProgress], None] | None) -> FinetuneResult:
        """All steps that are still to be made, then the averaged weights into the model."""
        steps = self.config.steps
        resumed_from = self._resume(workdir)
        first, began = self.step, time.monotonic()
        batches = self.task.train_batches(self.seed, start=self.step)
        self.student.train()
        while self.step < steps:
            lr = learning_rate(self.config, self.step)
            self.losses = self._train_step(rng.draw(batches, self.seed, self.step), lr)
            self.step += 1
            if self.step % max(1, steps // HISTORY_POINTS) == 0 or self.step == steps:
                self.history.append({"step": self.step, "lr": lr, "losses": self.losses})
            if self.step % self.config.checkpoint_every == 0 or self.step == steps:
                save_checkpoint(workdir, self._state(), self.identity)
            if progress is not None:
                pace = (time.monotonic() - began) / (self.step - first)
                eta = pace * (steps - self.step)
                progress(TrainProgress(step=self.step, steps=steps, losses=dict(self.losses), lr=lr, eta_s=eta))
        self._take_average()
        return FinetuneResult(
            final_losses=dict(self.losses), history=self.history, steps=self.step, resumed_from=resumed_from
        )

    def _train_step(self, batch: Batch, lr: float) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        where = f"step {self.step + 1} of {self.config.steps} (learning rate {lr:.2e}, samples {_some(batch)})"
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.objective.losses(on_device(batch, self.device), self.step)
        total = self.objective.total(losses, where)
        self.amp.backward(total, self.optimizer)
        if self.masks is not None:
            self.masks.apply_to_gradients(self.student)
        self.amp.step(self.optimizer, self.student, self.config.clip, where)
        if self.masks is not None:
            self.masks.apply(self.student)
        self._update_average()
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def _update_average(self) -> None:
        """Exponential average; its decay grows from 0.18, so that a short run does not keep its start."""
        decay = min(self.config.ema, (self.step + 2) / (self.step + 11))
        with torch.no_grad():
            for name, value in self.average.items():
                value.lerp_(self.trained[name], 1 - decay)

    def _take_average(self) -> None:
        with torch.no_grad():
            for name, value in self.average.items():
                self.trained[name].copy_(value)
        if self.masks is not None:
            self.masks.apply(self.student)

    def _state(self) -> TrainState:
        tensors = {f"model/{name}": value for name, value in all_tensors(self.student).items()}
        tensors |= {f"average/{name}": value for name, value in self.average.items()}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"adamw/{key}/{name}"] = value
        drawn, info = rng.capture(self.device)
        tensors |= {f"rng/{name}": value for name, value in drawn.items()}
        rest = {"rng": info, "amp": self.amp.state(), "losses": self.losses, "history": self.history}
        return TrainState(step=self.step, tensors=tensors, info=rest)

    def _resume(self, workdir: Path) -> int | None:
        state = load_checkpoint(workdir, self.identity)
        if state is None:
            return None
        saved = state.tensors
        with torch.no_grad():
            for name, value in all_tensors(self.student).items():
                value.copy_(saved[f"model/{name}"])
            for name, value in self.average.items():
                value.copy_(saved[f"average/{name}"])
            self._resume_moments(saved)
        drawn = {name.removeprefix("rng/"): value for name, value in saved.items() if name.startswith("rng/")}
        rng.restore(drawn, state.info["rng"], self.device)
        self.amp.load(state.info["amp"])
        self.step, self.losses, self.history = state.step, state.info["losses"], state.info["history"]
        return state.step

    def _resume_moments(self, saved: Mapping[str, Tensor]) -> None:
        """AdamW's moments lie like their parameter (channels last, too); its step counter stays where it was made."""
        for name, parameter in self.trained.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = saved.get(f"adamw/{key}/{name}")
                if value is None:  # a parameter that had no gradient yet
                    continue
                like = value.clone() if key == "step" else torch.empty_like(parameter).copy_(value)
                self.optimizer.state[parameter][key] = like


def _identity(
    student: nn.Module,
    distiller: Distiller | None,
    config: FinetuneConfig,
    seed: int,
    precision: str,
    masks: Masks | None,
) -> str:
    """Hash of all that a run's result depends on, but for the data and the task's source."""
    parts = {
        "version": VERSION,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "config": config.model_dump(mode="json"),
        "seed": seed,
        "precision": precision,
        "student": tensors_sha256(all_tensors(student)),
        "trainable": sorted(name for name, p in student.named_parameters() if p.requires_grad),
        "teacher": tensors_sha256(all_tensors(distiller.teacher)) if distiller else None,
        "masks": tensors_sha256(masks.masks) if masks is not None else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _some(batch: Batch) -> str:
    ids = [str(sample_id) for sample_id in batch.sample_ids]
    return ", ".join(ids[:4]) + (", ..." if len(ids) > 4 else "")
