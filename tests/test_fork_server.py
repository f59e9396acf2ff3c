"""Workers forked from a process that has imported their libraries (export/fork_server.py, export/worker.py)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusepress.export import fork_server
from fusepress.export.worker import Outcome, run_job
from tests.test_self_test import _lives

LIBRARY = "import os\nstate = []\nimported_by = os.getpid()\n"
JOB = """
import os, sys, time
import slow_library
from fusepress.export.worker import answer, read_job

job = read_job()
print("from the job")
slow_library.state.append(job["say"])
if job["say"] == "raise":
    raise ValueError("a fault of the job")
if job["say"] == "crash":
    os.abort()
if job["say"] == "sleep":
    time.sleep(60)
answer(job, {"state": slow_library.state, "imported_by": slow_library.imported_by, "pid": os.getpid(),
             "marker": os.environ.get("MARKER"), "hash": hash("fusepress"),
             "folder": os.getcwd()})
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "slow_library.py").write_text(LIBRARY)
    (tmp_path / "forked_job.py").write_text(JOB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(fork_server, "_servers", {})
    yield tmp_path
    for _, server in fork_server._servers.values():
        server.close()


def job(folder: Path, say: str, timeout_s: float = 60) -> tuple[Outcome, dict[str, Any] | None]:
    return run_job(
        "forked_job", {"say": say}, log=folder / "log", timeout_s=timeout_s, warm=("slow_library", "fusepress.export")
    )


def test_every_job_begins_as_the_imports_left_it(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = job(work, "a")
    monkeypatch.setenv("MARKER", "new")
    monkeypatch.chdir(work)
    outcome, second = job(work, "b")
    assert first is not None
    assert second is not None
    assert (first["state"], second["state"]) == (["a"], ["b"])
    assert first["imported_by"] == second["imported_by"] != os.getpid()
    assert first["pid"] != second["pid"]
    assert (first["marker"], second["marker"]) == (None, "new")
    assert first["folder"] != second["folder"] == str(work)
    assert (outcome.code, outcome.tail) == (0, "from the job")
    spawned = run_job("forked_job", {"say": "c"}, log=work / "log", timeout_s=60)[1]
    assert spawned is not None
    assert spawned["imported_by"] == spawned["pid"]
    assert spawned["hash"] == first["hash"]


def test_a_job_that_fails_crashes_or_hangs_does_not_harm_the_next(work: Path) -> None:
    outcome, answered = job(work, "raise")
    assert (outcome.code, answered) == (1, None)
    assert outcome.tail == "ValueError: a fault of the job"
    outcome, _ = job(work, "crash")
    assert (outcome.code, outcome.says(1)) == (-signal.SIGABRT, "a crash by SIGABRT")
    outcome, _ = job(work, "sleep", timeout_s=1.0)
    assert (outcome.code, outcome.says(1)) == (None, "no answer within 1 s")
    assert job(work, "d")[1] is not None
    assert len(fork_server._servers) == 1


def test_a_variable_that_libraries_read_early_gets_a_new_server(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = job(work, "a")[1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    second = job(work, "a")[1]
    assert first is not None
    assert second is not None
    assert first["imported_by"] != second["imported_by"]


def test_where_the_imports_fail_a_process_of_its_own_says_why(work: Path) -> None:
    (work / "slow_library.py").write_text("raise ImportError('the library is broken')\n")
    outcome, answered = job(work, "a")
    assert (outcome.code, answered) == (1, None)
    assert outcome.tail == "ImportError: the library is broken"


def test_a_server_ends_although_a_fork_of_ours_holds_its_pipe(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "CLOSE_S", 0.5)
    server = fork_server.ForkServer(("slow_library",), dict(os.environ))
    running = server.start("forked_job", '{"say": "sleep"}', work / "log", dict(os.environ))
    assert server._process.stdin is not None
    held = os.dup(server._process.stdin.fileno())  # as a process has it that was forked meanwhile
    try:
        server.close()
        assert not server.alive()
        end = time.monotonic() + 30
        while _lives(running.pid):
            assert time.monotonic() < end, "a job outlived its server"
            time.sleep(0.05)
    finally:
        os.close(held)


def test_an_interrupt_between_order_and_answer_leaves_no_stale_answer(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job(work, "a")[1] is not None

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fork_server.ForkServer, "answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            job(work, "b")
    outcome, answered = job(work, "c")
    assert (outcome.code, answered is not None) == (0, True)


def test_server_and_job_end_with_their_parent(work: Path) -> None:
    code = (
        "from pathlib import Path\nfrom fusepress.export.worker import run_job\n"
        f"log = Path({str(work / 'log')!r})\n"
        "run_job('forked_job', {'say': 'a'}, log=log, timeout_s=60, warm=('slow_library',))\n"
        "from fusepress.export import fork_server\n"
        "(_, server), = fork_server._servers.values()\n"
        "job = server.start('forked_job', '{\"say\": \"sleep\"}', log, {})\n"
        "print(server._process.pid, job.pid, flush=True)\nimport time\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 30
    while any(_lives(pid) for pid in pids):
        assert time.monotonic() < end, "a worker outlived its parent"
        time.sleep(0.05)
