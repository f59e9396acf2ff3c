"""Run a part of Fusepress in a process of its own: third parties' state, noise and crashes stay in it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TAIL_LINES = 12


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


def run_job(
    module: str, job: Mapping[str, Any], *, log: Path, timeout_s: float
) -> tuple[Outcome, dict[str, Any] | None]:
    """Run `python -m module` on a job; stdout and stderr go to `log`, and nothing of it outlives the call.

    Args:
        module: dotted name; found by the installed package, never in the working directory.
        job: what to do, as JSON values; the worker gets it from `read_job` and answers with `answer`.
        log: file that receives what the worker writes.
        timeout_s: seconds after which it is killed.

    Returns:
        How it ended, and its answer where it gave one; nothing is raised for a failure of the worker.
    """
    # hash seed: libraries iterate over sets, and the order shows in the bytes of what they write
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONWARNINGS": "ignore"}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fusepress-") as folder, log.open("wb") as output:
        answer_path = Path(folder) / "answer.json"
        text = json.dumps({**job, "answer": str(answer_path)})
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            process.communicate(text.encode(), timeout=timeout_s)
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:  # too slow, or we were interrupted
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        result = json.loads(answer_path.read_text()) if answer_path.exists() else None
    return Outcome(code=code, seconds=time.monotonic() - begin, tail=tail_of(log)), result


def read_job() -> dict[str, Any]:
    """In the worker: what to do; its memory limit is set."""
    job: dict[str, Any] = json.load(sys.stdin)
    limit = job.get("memory_limit")
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))
    return job


def answer(job: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """In the worker: answer, whole or not at all."""
    path = Path(job["answer"])
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(result))
    aside.replace(path)


def tail_of(log: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log file; of one that ends in a traceback, what was raised."""
    text = log.read_text(errors="replace") if log.exists() else ""
    kept = [line for line in text.splitlines() if line.strip()]
    if "Traceback (most recent call last):" in kept:  # what was raised, not where in a third party's code
        indented = [i for i, line in enumerate(kept) if line.startswith("  ")]
        kept = kept[indented[-1] + 1 :]
    return "\n".join(kept[-lines:])
