"""Runs the stages of a recipe in order: reuse by key, atomic commits, resume, and run.json after every step.

Where several processes share a run, rank 0 decides what is done, keeps the locks, writes and commits. The others follow
(`follow_stages`): they take part in stages that share work over samples, with a folder of their own that is thrown
away, wait for the others, and go on with the files that rank 0 has placed in the run folder.
"""

from __future__ import annotations

import logging
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from fusepress.pipeline.distributed import alone, hear, tell, trouble
from fusepress.pipeline.errors import FusepressError, RankError, StageError, UsageError
from fusepress.pipeline.evidence import RUN_JSON, Artifact, Measurement, RunRecord, StageRecord
from fusepress.pipeline.stages.base import Context, Stage, StageOutput, tool_versions
from fusepress.pipeline.store import (
    Entry,
    KeyParts,
    Store,
    atomic_write_text,
    content_key,
    disk_error,
    folder_lock,
    place,
    sha256_tree,
)

STORE = ".store"
SKIPPED = "skipped"
PUBLIC_ARTIFACTS = {
    "onnx": "onnx",
    "engine": "engine",
    "build_kit": "build_kit",
    "weights": "checkpoint",
    "plan": "plan",
    "masks": "masks",
    "dense_onnx": "dense_onnx",
    "replicates": "replicates",
    "references": "references",
}


class Interrupted(FusepressError):
    """The user stopped the run; the same command resumes it."""

    exit_code = 130


def run_stages(
    ctx: Context, stages: Sequence[Stage], record: RunRecord, folder: Path, *, from_stage: str | None = None
) -> bool:
    """Run or reuse every stage; `record` and run.json follow each step.

    Args:
        ctx: the checked inputs.
        stages: in order.
        record: filled in place.
        folder: the run folder, `runs/NAME`.
        from_stage: this stage and all later ones are made anew even where a result is stored.

    Returns:
        Whether any stage did work (false: everything was there).

    Raises:
        FusepressError: a stage failed; the record says which and why.
    """
    names = [stage.name for stage in stages]
    if from_stage is not None and from_stage not in names:
        raise UsageError(f"expected --from to name a stage; got {from_stage!r}; the stages are {', '.join(names)}")
    forced = set(names[names.index(from_stage) :]) if from_stage is not None else set()
    store = Store(folder.parent / STORE)
    with folder_lock(folder), _log_to(folder / "log.txt"), _terminate_as_interrupt():
        store.forget_asides()
        for left in folder.glob(f".{RUN_JSON}.*"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        record.stages = [StageRecord(name=name) for name in names]
        worked = False
        for position, stage in enumerate(stages):
            label = f"[{position + 1}/{len(stages)}]"
            worked |= _one_stage(ctx, stage, record, folder, store, label, force=stage.name in forced)
        _remove_stale(folder, record)
        save_record(record, folder)
        return worked


def follow_stages(ctx: Context, stages: Sequence[Stage], folder: Path) -> None:
    """What the ranks above 0 do while rank 0 is in `run_stages`.

    Args:
        ctx: the checked inputs; its artifacts follow those of rank 0.
        stages: as given to rank 0.
        folder: the run folder, which all ranks see.

    Raises:
        FusepressError: a stage failed here, or on another rank.
    """
    store = Store(folder.parent / STORE)
    with _silenced(), _terminate_as_interrupt():
        for stage in stages:
            try:
                _follow_stage(ctx, stage, store, folder)
            except KeyboardInterrupt as error:
                raise Interrupted(f"interrupted in stage {stage.name}") from error
            except FusepressError:
                raise
            except Exception as error:
                raise trouble() or StageError(f"{type(error).__name__}: {error} at stage {stage.name}") from error


def _follow_stage(ctx: Context, stage: Stage, store: Store, folder: Path) -> None:
    order = hear()
    if order == SKIPPED:
        return
    if order["run"]:
        with tempfile.TemporaryDirectory(prefix="fusepress-") as scratch:
            stage.run(ctx, Path(scratch), store.work_path(order["key"]))
    for name, (relative, sha) in hear().items():
        ctx.add_artifact(name, folder / stage.name / relative, sha)


def save_record(record: RunRecord, folder: Path) -> None:
    """Write run.json atomically."""
    atomic_write_text(folder / RUN_JSON, record.to_json())


def _one_stage(
    ctx: Context, stage: Stage, record: RunRecord, folder: Path, store: Store, label: str, *, force: bool
) -> bool:
    entry_of = record.stage(stage.name)
    assert entry_of is not None
    reason = stage.skip(ctx)
    if reason is not None:
        entry_of.status, entry_of.why = "skipped", reason
        tell(SKIPPED)
        return False
    with _recorded(entry_of, record, folder):
        key = content_key(stage.key_parts(ctx))
        entry_of.key = key
        with store.locked(key):
            entry = None if force else store.get(key, ctx.reporter.warn)
            cached = entry is not None
            if entry is None:
                entry_of.status = "running"
                save_record(record, folder)
                store.work_folder(key)
            tell({"key": key, "run": entry is None and stage.every_rank})
            if entry is None:
                entry = _make(ctx, stage, store, key, label)
            place(entry, folder / stage.name)
        _adopt(ctx, record, entry_of, entry, folder / stage.name)
        tell({name: (relative, ctx.shas[name]) for name, relative in entry.payload["artifacts"].items()})
        with alone():
            timed = _assess(ctx, stage, entry_of, store, key, force=force)
        entry_of.status = "cached" if cached and not timed else "done"
        entry_of.seconds = entry.payload["seconds"]
        save_record(record, folder)
    ctx.reporter.line(f"{label} {stage.name:<9} {entry_of.status:<7} {_headline(entry_of)}")
    return entry_of.status == "done"


def _assess(ctx: Context, stage: Stage, record: StageRecord, store: Store, key: str, *, force: bool) -> bool:
    """Add the stage's latency on the target, stored or made now; returns whether it was made now."""
    parts = KeyParts(
        stage=f"{stage.name}.latency",
        version=stage.version,
        config={"target": ctx.target_identity(), "precision": ctx.final_precision},
        inputs={"stage": key},
        tools=tool_versions("onnx", "onnxruntime-gpu", "fusepress"),
    )
    latency_key = content_key(parts)
    with store.locked(latency_key):
        entry = None if force else store.get(latency_key, ctx.reporter.warn)
        made = entry is None
        if entry is None:
            work, aside = store.work_folder(latency_key), store.aside(latency_key)
            try:
                rows = stage.assess(ctx, work)
                entry = store.commit(latency_key, aside, _payload(StageOutput(measurements=rows)))
            except OSError as error:
                raise disk_error(error, aside) from error
            finally:
                store.discard_work(latency_key)
                shutil.rmtree(aside, ignore_errors=True)
    record.measurements += [Measurement.model_validate(m) for m in entry.payload["measurements"]]
    return made and bool(record.measurements)


def _make(ctx: Context, stage: Stage, store: Store, key: str, label: str) -> Entry:
    work, aside = store.work_folder(key), store.aside(key)
    ctx.reporter.begin(stage.name, label)
    try:
        started = time.monotonic()
        with nullcontext() if stage.every_rank else alone():
            output = stage.run(ctx, aside, work)
        seconds = round(time.monotonic() - started, 2)
        entry = store.commit(key, aside, _payload(output) | {"seconds": seconds})
    except OSError as error:
        raise disk_error(error, aside) from error
    finally:
        ctx.reporter.end()
        shutil.rmtree(aside, ignore_errors=True)
    store.discard_work(key)
    return entry


def _payload(output: StageOutput) -> dict[str, Any]:
    measurements = [m.model_dump(exclude_none=True) for m in output.measurements]
    return {"measurements": measurements, "details": output.details, "artifacts": output.artifacts}


def _adopt(ctx: Context, record: RunRecord, stage: StageRecord, entry: Entry, folder: Path) -> None:
    payload = entry.payload
    stage.measurements = [Measurement.model_validate(m) for m in payload["measurements"]]
    stage.details, stage.files = payload["details"], entry.files
    if stage.name == "quantize":
        ctx.ended_in = record.final_precision
    for name, relative in payload["artifacts"].items():
        path = folder / relative
        ctx.add_artifact(name, path, entry.files.get(relative) or sha256_tree(path))
        if name in PUBLIC_ARTIFACTS:
            record.artifacts[PUBLIC_ARTIFACTS[name]] = Artifact(
                path=path.relative_to(folder.parent).as_posix(), sha256=ctx.shas[name]
            )


@contextmanager
def _recorded(stage: StageRecord, record: RunRecord, folder: Path) -> Iterator[None]:
    """A failure is written into run.json before it leaves."""
    try:
        yield
    except KeyboardInterrupt as error:
        stage.status, stage.why = "interrupted", "stopped by the user; the same command resumes"
        save_record(record, folder)
        elsewhere = trouble()  # a launcher stops all processes when one of them ends
        if elsewhere is not None:
            raise _failed(stage, record, folder, elsewhere) from error
        raise Interrupted(f"interrupted in stage {stage.name}; run the same command again to resume") from error
    except FusepressError as error:
        _failed(stage, record, folder, error)
        raise
    except Exception as error:
        logging.getLogger(__name__).exception("stage %s failed", stage.name)
        elsewhere = trouble()
        if elsewhere is not None:
            raise _failed(stage, record, folder, elsewhere) from error
        stage.status, stage.why = "failed", f"{type(error).__name__}: {error}"
        _try_save(record, folder)
        raise StageError(
            f"expected stage {stage.name} to finish; got {type(error).__name__}: {error}; the traceback is in "
            f"{folder.name}/log.txt (or use --debug)"
        ) from error


def _failed(stage: StageRecord, record: RunRecord, folder: Path, error: FusepressError) -> FusepressError:
    """The error, after it was written down."""
    stage.status, stage.why = "failed", str(error)
    if isinstance(error, RankError) and error.details:
        logging.getLogger(__name__).error("on another rank: %s", error.details)
    _try_save(record, folder)
    return error


def _try_save(record: RunRecord, folder: Path) -> None:
    try:
        save_record(record, folder)
    except FusepressError as error:  # a full disk must not hide the first failure
        logging.getLogger(__name__).warning("run.json could not be written: %s", error)


def _headline(stage: StageRecord) -> str:
    """The figures of a stage in one line."""
    parts = []
    shown = 0
    for measurement in stage.measurements:
        name = measurement.name
        if name.startswith("accuracy.") and shown == 0:
            parts.append(f"{name.removeprefix('accuracy.')} {measurement.value:.4f} ({measurement.kind})")
            shown = 1
        elif name == "latency.mean_ms":
            parts.append(f"latency {measurement.value:.3g} ms ({measurement.kind})")
        elif name == "macs":
            parts.append(f"{measurement.value / 1e6:.1f} MMACs")
    if stage.status == "done":
        parts.append(f"{stage.seconds:.1f} s")
    return ", ".join(parts)


def _remove_stale(folder: Path, record: RunRecord) -> None:
    """Stage folders of an earlier recipe in the same run folder would mislead: they go."""
    skipped = {stage.name for stage in record.stages if stage.status == "skipped"}
    for name in skipped:
        shutil.rmtree(folder / name, ignore_errors=True)


def _log_to(path: Path) -> AbstractContextManager[None]:
    """Warnings and log records of libraries go into the run's log, not on the screen."""
    handler = logging.FileHandler(path, mode="a", encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return _handled_by(handler)


def _silenced() -> AbstractContextManager[None]:
    """Warnings of ranks above 0 are those of rank 0, which logs them."""
    return _handled_by(logging.NullHandler())


@contextmanager
def _handled_by(handler: logging.Handler) -> Iterator[None]:
    """Warnings and log records of libraries go to this handler."""
    root = logging.getLogger()
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        handler.close()


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM (a CI system's stop) is told like Ctrl-C; only the main thread can set a handler."""

    def stop(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # the caller's own handling stays
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
