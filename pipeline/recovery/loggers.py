"""Loss curves for TensorBoard and MLflow, beside the report's own. Both are extras, imported when they are asked for.

A run that was killed goes on in the same log: TensorBoard drops the points of steps that are made again, MLflow keeps
its run and gets the same values once more.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from fusepress.pipeline.errors import UsageError
from fusepress.pipeline.recipe import LoggerName
from fusepress.pipeline.recovery.contract import TrainProgress
from fusepress.pipeline.store import atomic_write_text

FLUSH_EVERY = 20
_MODULES = {"tensorboard": "torch.utils.tensorboard", "mlflow": "mlflow"}


class RunLogger(Protocol):
    """Where scalars of a step go."""

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Scalars of a step, by name."""

    def close(self) -> None:
        """Write what is still held back."""


def log_folder(workdir: Path, name: LoggerName) -> Path:
    """Where a logger keeps its files: `tensorboard --logdir` of it, or the folder of `mlflow.db`."""
    return workdir / name


@contextlib.contextmanager
def logging_to(names: Sequence[LoggerName], workdir: Path) -> Iterator[Callable[[TrainProgress], None]]:
    """A listener that writes every step's losses and learning rate to each logger.

    Args:
        names: which loggers.
        workdir: files go into a folder of it named after the logger; MLflow's into the server that the environment
            variable MLFLOW_TRACKING_URI names, if it does.

    Raises:
        UsageError: a logger's package is not installed.
    """
    modules = {name: _module(name) for name in names}
    loggers: list[RunLogger] = []
    with contextlib.ExitStack() as stack:

        def tell(now: TrainProgress) -> None:
            if len(loggers) < len(modules):  # the first step says where the run goes on
                for name, module in modules.items():
                    logger = _MAKERS[name](module, log_folder(workdir, name), now.step)
                    stack.callback(logger.close)
                    loggers.append(logger)
            scalars = {f"loss/{name}": value for name, value in now.losses.items()} | {"lr": now.lr}
            if now.look is not None:
                looked = {"calib/metric": now.look.value, "calib/drop": now.look.drop}
                scalars |= {name: value for name, value in looked.items() if value is not None}
            for logger in loggers:
                logger.write(now.step, scalars)

        yield tell


def check_loggers(names: Sequence[LoggerName]) -> None:
    """Import what the loggers need.

    Raises:
        UsageError: a logger's package is not installed.
    """
    for name in names:
        _module(name)


def _module(name: LoggerName) -> Any:
    try:
        return importlib.import_module(_MODULES[name])
    except ImportError as error:
        raise UsageError(
            f"expected the package {name} for finetune.log; got {error}; pip install fusepress[{name}], or remove "
            f"{name} from finetune.log"
        ) from error


class _TensorBoard:
    def __init__(self, module: Any, folder: Path, first: int) -> None:
        self._writer = module.SummaryWriter(str(folder), purge_step=first)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Mlflow:
    """Metrics are sent in batches, for each is a transaction."""

    def __init__(self, module: Any, folder: Path, first: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(folder / 'mlflow.db').resolve()}"
        self._client = module.MlflowClient(tracking_uri=uri)
        self._metric = importlib.import_module("mlflow.entities").Metric
        self._run = self._resume(folder / "run.json", uri)
        self._waiting: list[Any] = []

    def _resume(self, note: Path, uri: str) -> str:
        with contextlib.suppress(OSError, ValueError, KeyError):
            kept = json.loads(note.read_text())
            if kept["uri"] == uri:
                return str(kept["run"])
        found = self._client.get_experiment_by_name("fusepress")
        experiment = found.experiment_id if found is not None else self._client.create_experiment("fusepress")
        run = str(self._client.create_run(experiment).info.run_id)
        atomic_write_text(note, json.dumps({"uri": uri, "run": run}) + "\n")
        return run

    def write(self, step: int, scalars: dict[str, float]) -> None:
        when_ms = time.time_ns() // 1_000_000
        self._waiting += [self._metric(name, value, when_ms, step) for name, value in scalars.items()]
        if step % FLUSH_EVERY == 0:
            self._send()

    def close(self) -> None:
        self._send()
        self._client.set_terminated(self._run)

    def _send(self) -> None:
        if self._waiting:
            self._client.log_batch(self._run, metrics=self._waiting)
            self._waiting = []


_MAKERS: dict[LoggerName, Callable[[Any, Path, int], RunLogger]] = {"tensorboard": _TensorBoard, "mlflow": _Mlflow}
