"""Our training loop: the state of a run, one step of it, and how it is saved and taken up again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusepress.pipeline.distributed import broadcast_object, gather_objects, rank, sum_gradients_, world
from fusepress.pipeline.recipe import FinetuneConfig
from fusepress.pipeline.recovery import rng
from fusepress.pipeline.recovery.batchnorm import tracking_norms
from fusepress.pipeline.recovery.checkpoint import TrainState, load_checkpoint, save_checkpoint, tensors_sha256
from fusepress.pipeline.recovery.compiled import try_compile
from fusepress.pipeline.recovery.contract import HISTORY_POINTS, FinetuneResult, Look, Masks, TrainProgress
from fusepress.pipeline.recovery.distill import Distiller
from fusepress.pipeline.recovery.distributed import (
    adopt_buffers_,
    average_norms_,
    draw_apart,
    sum_losses,
)
from fusepress.pipeline.recovery.early_stop import EarlyStop
from fusepress.pipeline.recovery.objective import Objective
from fusepress.pipeline.recovery.optim import adamw, learning_rate
from fusepress.pipeline.recovery.placement import all_tensors, on_device
from fusepress.pipeline.recovery.precision import Amp
from fusepress.pipeline.recovery.sharding import is_sharded, put_, whole
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
        amp: Amp,
        masks: Masks | None,
        stop: EarlyStop | None,
    ) -> None:
        self.student, self.task, self.config = student, task, config
        self.seed, self.device, self.amp, self.masks, self.stop = seed, amp.device, amp, masks, stop
        self.objective = Objective(student, distiller, task, config, seed, amp)
        self._train_mode()
        if config.compile:
            compiled = try_compile(student, self._first_inputs(), amp)
            self.objective.compiled = compiled if all(gather_objects(compiled is not None)) else None
        self.identity = self._identity(distiller)
        self.trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self.optimizer = adamw(self.trained, config)
        self.average = {name: p.detach().clone() for name, p in self.trained.items()} if config.ema else {}
        self.step = 0
        self.losses: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []
        self.looks: list[Look] = []

    def run(self, workdir: Path, progress: Callable[[TrainProgress], None] | None) -> FinetuneResult:
        """All steps that are still to be made, then the averaged weights into the model."""
        steps = self.config.steps
        draw_apart(self.seed)
        resumed_from = self._resume(workdir)
        first, began = self.step, time.monotonic()
        batches = self._batches()
        while not self._done():
            lr = learning_rate(self.config, self.step)
            self.losses = self._train_step(batches, lr)
            self.step += 1
            look = self._look()
            if self.step % max(1, steps // HISTORY_POINTS) == 0 or self._done():
                weights = self.objective.weighting.weights
                point = {"step": self.step, "lr": lr, "losses": self.losses}
                self.history.append({**point, "weights": weights} if weights else point)
            if self.step % self.config.checkpoint_every == 0 or self._done():
                self._save(workdir)
            if progress is not None:
                pace = (time.monotonic() - began) / (self.step - first)
                eta = 0.0 if self._done() else pace * (steps - self.step)
                told = dict(self.losses)
                progress(TrainProgress(step=self.step, steps=steps, losses=told, lr=lr, eta_s=eta, look=look))
        self._take_average()
        return FinetuneResult(
            final_losses=dict(self.losses),
            history=self.history,
            steps=self.step,
            resumed_from=resumed_from,
            precision=self.amp.format,
            compiled=self.objective.compiled is not None,
            looks=self.looks,
        )

    def _done(self) -> bool:
        return self.step >= self.config.steps or (bool(self.looks) and self.looks[-1].met)

    def _train_mode(self) -> None:
        self.student.train()
        if self.config.freeze_batchnorm:
            for norm in tracking_norms(self.student):
                norm.eval()

    def _first_inputs(self) -> dict[str, Tensor]:
        batch = rng.draw(self.task.train_batches(self.seed), self.seed, 0)
        return on_device(batch, self.device).inputs

    def _batches(self) -> Iterator[Batch]:
        """This rank's share, from the next step on."""
        return self.task.train_batches(self.seed, start=self.step * self.config.accumulate, rank=rank(), world=world())

    def _train_step(self, batches: Iterator[Batch], lr: float) -> dict[str, float]:
        """One step on `accumulate` batches a rank, each of which counts as much as it has samples."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        first = self.step * self.config.accumulate
        numbers = [(first + part) * world() + rank() for part in range(self.config.accumulate)]
        parts = [rng.draw(batches, self.seed, number) for number in numbers]
        samples = sum_losses({"samples": sum(batch.size for batch in parts)})["samples"]
        losses: dict[str, float] = {}
        for number, batch in zip(numbers, parts, strict=True):
            share = batch.size / samples
            for name, loss in self._backward(batch, number, share, self._where([batch], lr)).items():
                losses[name] = losses.get(name, 0.0) + share * loss
        sum_gradients_(p for p in self.trained.values() if not is_sharded(p))
        average_norms_([norm for norm in tracking_norms(self.student) if norm.training])
        self.amp.unscale(self.optimizer)
        if self.masks is not None:
            self.masks.apply_to_gradients(self.student)
        self.amp.step(self.optimizer, self.student, self.config.clip, self._where(parts, lr))
        if self.masks is not None:
            self.masks.apply(self.student)
        self.objective.weighting.update()
        self._update_average()
        return sum_losses(losses)

    def _backward(self, batch: Batch, number: int, share: float, where: str) -> dict[str, float]:
        losses = self.objective.losses(on_device(batch, self.device), number)
        total = self.objective.total(losses, where, share)
        self.amp.backward(total if share == 1 else share * total)
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def _where(self, batches: Sequence[Batch], lr: float) -> str:
        samples = _some([str(sample_id) for batch in batches for sample_id in batch.sample_ids])
        return f"step {self.step + 1} of {self.config.steps} (learning rate {lr:.2e}, samples {samples})"

    def _look(self) -> Look | None:
        """At what the model would be, were this the last step."""
        if self.stop is None or self.step % self.config.eval_every:
            return None
        with self._averaged(), rng.kept(self.device):
            look = broadcast_object(self.stop.look(self.student, self.step))
        self._train_mode()
        self.looks.append(look)
        return look

    def _update_average(self) -> None:
        """Exponential average; its decay grows from 0.18, so that a short run does not keep its start."""
        decay = min(self.config.ema, (self.step + 2) / (self.step + 11))
        with torch.no_grad():
            for name, value in self.average.items():
                value.lerp_(self.trained[name], 1 - decay)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights inside; those in training come back."""
        kept = {name: self.trained[name].detach().clone() for name in self.average}
        self._take_average()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    self.trained[name].copy_(value)

    def _take_average(self) -> None:
        with torch.no_grad():
            for name, value in self.average.items():
                self.trained[name].copy_(value)
        if self.masks is not None:
            self.masks.apply(self.student)

    def _save(self, workdir: Path) -> None:
        """Rank 0 writes; what only the others know is where their generators are."""
        adopt_buffers_(self.student)
        state = self._state(gather_objects(rng.capture(self.device)))
        if rank() == 0:
            save_checkpoint(workdir, state, self.identity)

    def _state(self, drawn: Sequence[tuple[dict[str, Tensor], dict[str, Any]]]) -> TrainState:
        tensors = {f"model/{name}": whole(value) for name, value in all_tensors(self.student).items()}
        tensors |= {f"average/{name}": whole(value) for name, value in self.average.items()}
        tensors |= {f"weighting/{name}": value for name, value in self.objective.weighting.state().items()}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"adamw/{key}/{name}"] = whole(value)
        tensors |= {f"rng/{r}/{name}": value for r, (words, _) in enumerate(drawn) for name, value in words.items()}
        looks = [asdict(look) for look in self.looks]
        rest = {
            "rng": [info for _, info in drawn],
            "amp": self.amp.state(),
            "losses": self.losses,
            "history": self.history,
            "looks": looks,
        }
        return TrainState(step=self.step, tensors=tensors, info=rest)

    def _resume(self, workdir: Path) -> int | None:
        state = broadcast_object(load_checkpoint(workdir, self.identity) if rank() == 0 else None)
        if state is None:
            return None
        saved = state.tensors
        with torch.no_grad():
            for name, value in all_tensors(self.student).items():
                put_(value, saved[f"model/{name}"])
            for name, value in self.average.items():
                put_(value, saved[f"average/{name}"])
            self._resume_moments(saved)
        prefix = "weighting/"
        learned = {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
        self.objective.weighting.load(learned)
        prefix = f"rng/{rank()}/"
        words = {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
        rng.restore(words, state.info["rng"][rank()], self.device)
        self.amp.load(state.info["amp"])
        self.step, self.losses, self.history = state.step, state.info["losses"], state.info["history"]
        self.looks = [Look(**look) for look in state.info["looks"]]
        return state.step

    def _resume_moments(self, saved: Mapping[str, Tensor]) -> None:
        """AdamW's moments lie like their parameter (channels last, too); its step counter stays where it was made."""
        for name, parameter in self.trained.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = saved.get(f"adamw/{key}/{name}")
                if value is None:  # a parameter that had no gradient yet
                    continue
                like = value.clone() if key == "step" else torch.empty_like(parameter)
                if key != "step":
                    put_(like, value)
                self.optimizer.state[parameter][key] = like

    def _identity(self, distiller: Distiller | None) -> str:
        """Hash of all that a run's result depends on, but for the data and the task's source."""
        parts = {
            "version": VERSION,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "processes": world(),
            "config": self.config.model_dump(mode="json", exclude={"log"}),
            "seed": self.seed,
            "precision": self.amp.format,
            "compiled": self.objective.compiled is not None,
            "stop": self.stop.identity if self.stop is not None else None,
            "student": tensors_sha256({name: whole(value) for name, value in all_tensors(self.student).items()}),
            "trainable": sorted(name for name, p in self.student.named_parameters() if p.requires_grad),
            "teacher": tensors_sha256(distiller.tensors()) if distiller else None,
            "masks": tensors_sha256(self.masks.masks) if self.masks is not None else None,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:4]) + (", ..." if len(ids) > 4 else "")
