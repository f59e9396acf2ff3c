"""Run a part of Fusepress in a process of its own: third parties' state, noise and crashes stay in it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from fusepress.export.fork_server import ForkedJob, ForkServer, shared_server

TAIL_LINES = 12
POLL_S = 0.2
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h: a killed parent cannot end its worker, which would build on for an hour
Progress = Callable[[float, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a worker ended.

    Attributes:
        code: its exit status; negative for a signal, None when it ran past the limit.
        seconds: how long it ran.
        tail: the last lines that it wrote, or what it raised.
    """

    code: int | None
    seconds: float
    tail: str

    def says(self, timeout_s: float) -> str:
        """The outcome in words."""
        if self.code is None:
            return f"no answer within {timeout_s:g} s"
        if self.code < 0:
            return f"a crash by {signal.Signals(-self.code).name}"
        return f"exit status {self.code}"


class _Waited(Protocol):
    """What is asked of a process: one that was spawned, or a fork of a server."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...


def run_job(
    module: str,
    job: Mapping[str, Any],
    *,
    log: Path,
    timeout_s: float,
    progress: Progress | None = None,
    warm: Sequence[str] = (),
) -> tuple[Outcome, dict[str, Any] | None]:
    """Run `python -m module` on a job; stdout and stderr go to `log`, and nothing of it outlives the call.

    Args:
        module: dotted name; found by the installed package, never in the working directory.
        job: what to do, as JSON values; the worker gets it from `read_job` and answers with `answer`.
        log: file that receives what the worker writes.
        timeout_s: seconds after which it is killed.
        progress: called with a fraction and a word whenever the worker told something new with `tell_progress`.
        warm: modules that take seconds to import; the worker is forked from a process that has imported them, and
            which later jobs that name the same ones share.

    Returns:
        How it ended, and its answer where it gave one; nothing is raised for a failure of the worker.
    """
    # hash seed: libraries iterate over sets, and the order shows in the bytes of what they write
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONWARNINGS": "ignore"}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fusepress-") as folder, log.open("wb") as output:
        answer_path, told = Path(folder) / "answer.json", Path(folder) / "progress.json"
        text = json.dumps({**job, "answer": str(answer_path), "progress": str(told)})
        with _started(module, text, log, output, environment, warm) as process:
            try:
                code = _wait(process, begin + timeout_s, told, progress)
            finally:
                if process.poll() is None:  # too slow, or we were interrupted
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        result = json.loads(answer_path.read_text()) if answer_path.exists() else None
    return Outcome(code=code, seconds=time.monotonic() - begin, tail=tail_of(log)), result


@contextlib.contextmanager
def _started(
    module: str, text: str, log: Path, output: IO[bytes], environment: Mapping[str, str], warm: Sequence[str]
) -> Iterator[_Waited]:
    server = shared_server(warm, environment) if warm else None
    if server is not None and server.lock.acquire(blocking=False):  # another thread's job: this one has its own process
        try:
            forked = _forked(server, module, text, log, environment)
            if forked is not None:
                yield forked
                return
        finally:
            server.lock.release()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", module],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:  # it may die before it reads
        process.stdin.write(text.encode())
    yield process


def _forked(server: ForkServer, module: str, text: str, log: Path, environment: Mapping[str, str]) -> ForkedJob | None:
    """None where the server is gone, as where an import fails: a process of its own will say why."""
    with contextlib.suppress(BrokenPipeError):
        return server.start(module, text, log, environment)
    return None


def _wait(process: _Waited, end: float, told: Path, progress: Progress | None) -> int | None:
    """Its exit status, or None where it is still at work at `end` (monotonic seconds)."""
    last = ""
    while True:
        left = end - time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=max(0.0, left if progress is None else min(left, POLL_S)))
        if left <= 0:
            return None
        text = told.read_text() if progress is not None and told.exists() else ""
        if progress is not None and text != last:
            entry = json.loads(text)
            progress(float(entry["fraction"]), str(entry["note"]))
            last = text


def read_job() -> dict[str, Any]:
    """In the worker: what to do; its memory limit is set, and it ends with its parent."""
    with contextlib.suppress(AttributeError, OSError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    job: dict[str, Any] = json.load(sys.stdin)
    limit = job.get("memory_limit")
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))
    return job


def answer(job: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """In the worker: answer, whole or not at all."""
    _write_whole(Path(job["answer"]), result)


def tell_progress(job: Mapping[str, Any], fraction: float, note: str) -> None:
    """In the worker: how far it is, between 0 and 1, and with what."""
    _write_whole(Path(job["progress"]), {"fraction": fraction, "note": note})


def _write_whole(path: Path, content: Mapping[str, Any]) -> None:
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(content))
    aside.replace(path)


def tail_of(log: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log file; of one that ends in a traceback, what was raised."""
    text = log.read_text(errors="replace") if log.exists() else ""
    kept = [line for line in text.splitlines() if line.strip()]
    if "Traceback (most recent call last):" in kept:  # what was raised, not where in a third party's code
        indented = [i for i, line in enumerate(kept) if line.startswith("  ")]
        kept = kept[indented[-1] + 1 :]
    return "\n".join(kept[-lines:])
