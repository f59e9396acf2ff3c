"""A small real run with every stage but QAT, and what is compared of it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from fusepress.pipeline.errors import StoreError
from fusepress.pipeline.evidence import RUN_JSON, read_run
from fusepress.pipeline.runner import STORE
from fusepress.pipeline.store import Store, sha256_file

QUICK = {  # of the task that `fusepress init` writes: training and figures are not what is tested
    "self.build_model(), 400": "self.build_model(), 12",
    '{"calib": 64, "eval": 128}': '{"calib": 16, "eval": 32}',
}
RECIPE: dict[str, Any] = {
    "task": "task.py:MyTask",
    "checkpoint": "dense.safetensors",
    "target": "jetson-agx-orin-64gb",  # predicted: a latency that is measured is another one each time
    "score": {"method": "magnitude"},
    "prune": {"macs": 0.6, "align": 8},
    "finetune": {"steps": 6, "lr": 1e-4},
    "sparsify": {"pattern": "2:4", "recover": "none"},
    "quantize": {"precision": "int8", "samples": 8, "method": "max", "search": False, "sensitivity": False},
    "verify": {"replicates": 200},
    "gates": {"floors": {"miou": 0.01}},
}
OVER = ("running", "done", "cached", "failed")
POLL_S = 0.005

Prepare = Callable[[], None]


def make_project(folder: Path) -> Path:
    """Write task, recipe and dense checkpoint into a new folder; returns the recipe."""
    import torch

    from fusepress.pipeline.scaffold import write_scaffold
    from fusepress.pipeline.task import load_task

    torch.set_num_threads(1)
    write_scaffold(folder)
    task = folder / "task.py"
    text = task.read_text()
    for before, after in QUICK.items():
        if before not in text:
            raise RuntimeError(f"expected {before!r} in the task of `fusepress init`; got none; correct QUICK")
        text = text.replace(before, after)
    task.write_text(text)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    load_task(RECIPE["task"], base=folder).user.train_dense(folder / RECIPE["checkpoint"], lambda *_: None)
    return recipe


def compress(recipe: Path, run: Path, *more: str) -> list[str]:
    """The command."""
    return ["compress", str(recipe), "--run", str(run), *more]


def preload() -> None:
    """Import what a run imports, so that forks of this process need not: they take a tenth of the time."""
    import onnx
    import onnxruntime
    import torch
    import torch_pruning

    from fusepress.pipeline import api, stages
    from fusepress.pipeline.report import html

    del onnx, onnxruntime, torch_pruning, api, stages, html
    torch.set_num_threads(1)


def start(command: Sequence[str], log: Path, prepare: Prepare | None = None) -> int:
    """Run a command in a fork of this process, which is a process of its own to everybody else; returns its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        from fusepress.pipeline.cli import run

        if prepare is not None:
            prepare()
        code = run(list(command))
    except BaseException:  # noqa: BLE001  nothing may reach the parent's frames
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(process: int) -> int:
    """Wait for a process; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def ran(command: Sequence[str], log: Path, prepare: Prepare | None = None) -> tuple[int, str]:
    """Exit code of a command, and what it said."""
    before = log.stat().st_size if log.exists() else 0
    code = finish(start(command, log, prepare))
    with log.open("rb") as file:
        file.seek(before)
        return code, file.read().decode(errors="replace")


def result_sha256(run: Path) -> str:
    """One hash of all that a run came to: every file of every stage, every figure, every verdict; no times, no host."""
    record = read_run(run)
    files = {
        path.relative_to(run).as_posix(): sha256_file(path)
        for stage in record.stages
        for path in sorted((run / stage.name).rglob("*"))
        if path.is_file()
    }
    figures = [
        (s.name, s.key, [m.model_dump() for m in s.measurements], [v.model_dump() for v in s.verdicts])
        for s in record.stages
    ]
    plain = {"files": files, "figures": figures, "verdict": record.verdict}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def written(run: Path) -> int:
    """Which run.json is there: each one is a new file."""
    path = run / RUN_JSON
    return path.stat().st_ino if path.is_file() else 0


def reached(process: int, run: Path, stage: str, before: int) -> bool:
    """Wait until this process says that a stage is at work or over; false where it ended before."""
    while True:
        try:
            found = read_run(run).stage(stage) if written(run) != before else None
        except StoreError:
            os.kill(process, signal.SIGKILL)
            raise
        if found is not None and found.status in OVER:
            return True
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            finish(process)
            return False
        time.sleep(POLL_S)


def stage_at_work(run: Path) -> str:
    """Which stage is at work, by run.json; between two of them it is the next one that is told as pending."""
    if not (run / RUN_JSON).is_file():
        return "before the first stage"
    stages = read_run(run).stages
    running = [stage.name for stage in stages if stage.status == "running"]
    if running:
        return running[0]
    pending = [stage.name for stage in stages if stage.status == "pending"]
    return f"before {pending[0]}" if pending else "after the last stage"


def committed(run: Path) -> set[str]:
    """Keys of the results in the store, each of which is whole.

    Raises:
        RuntimeError: one is damaged.
    """
    store, keys = Store(run.parent / STORE), set()
    for path in store.root.glob("*/stage.json"):
        told: list[str] = []
        if store.get(path.parent.name, told.append) is None:
            raise RuntimeError(told[0])
        keys.add(path.parent.name)
    return keys
