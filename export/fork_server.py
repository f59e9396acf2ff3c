"""A process that has imported slow libraries once and forks itself for every job: no job pays for the imports again.

Each job still runs in a process of its own, which begins as the imports left it: what a library patches, prints or
crashes in one job is gone in the next. The server ends with the process that started it, whatever ends that.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import io
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

POLL_S = 0.02
CLOSE_S = 5.0  # for a server to see its input end
# what is read while libraries are imported, and so cannot be changed for a job
READ_EARLY = ("PYTHON", "OMP_", "MKL_", "OPENBLAS_", "LD_")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class ForkedJob:
    """A job in a fork of the server, waited for as a `subprocess.Popen` is.

    Attributes:
        pid: of the job's process, which leads a process group of its own.
    """

    def __init__(self, server: ForkServer) -> None:
        self._server = server
        self._code: int | None = None
        self.pid = int(server.answer(None, "pid"))

    def poll(self) -> int | None:
        """Its exit status (negative for a signal), or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0.0)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status.

        Raises:
            subprocess.TimeoutExpired: it is still at work after so many seconds.
        """
        if self._code is None:
            self._code = int(self._server.answer(timeout, "code"))
        return self._code


class ForkServer:
    """Starts the server; jobs are run one at a time.

    Args:
        modules: what it imports before the first job.
        environment: its environment variables.
    """

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self.lock = threading.Lock()
        self._pending = b""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(environment),
            start_new_session=True,
        )

    def alive(self) -> bool:
        """Whether it takes jobs."""
        return self._process.poll() is None

    def start(self, module: str, job: str, log: Path, environment: Mapping[str, str]) -> ForkedJob:
        """Run a module as `python -m` would, with `job` on its standard input; what it writes goes to `log`.

        Raises:
            BrokenPipeError: the server ended, as where an import fails.
        """
        assert self._process.stdin is not None
        order = {"module": module, "job": job, "log": str(log.resolve()), "environment": dict(environment)}
        order["folder"] = str(Path.cwd())  # the server's own is where it was started, which may be gone
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
            return ForkedJob(self)
        except BaseException:  # interrupted in between: what it says next would be taken for the next job's
            self.close()
            raise

    def answer(self, timeout: float | None, key: str) -> int:
        """The next line of the server, which tells a job's process or its exit status.

        Raises:
            subprocess.TimeoutExpired: none came within so many seconds.
            BrokenPipeError: the server ended before the job began.
        """
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        end = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._pending:
            left = None if end is None else max(0.0, end - time.monotonic())
            ready, _, _ = select.select([descriptor], [], [], left)
            if not ready:
                raise subprocess.TimeoutExpired(self._process.args, timeout or 0.0)
            read = os.read(descriptor, 4096)
            if not read:
                if key == "pid":
                    raise BrokenPipeError("the fork server ended")
                return self._process.wait() or -signal.SIGKILL  # it was killed, and its job with it
            self._pending += read
        line, _, self._pending = self._pending.partition(b"\n")
        return int(json.loads(line)[key])

    def close(self) -> None:
        """End it, and the job that it runs."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:  # a fork of ours (a loader of data) has the pipe too, and so it does not end
            self._process.kill()
            self._process.wait()


_servers: dict[tuple[int, tuple[str, ...]], tuple[dict[str, str], ForkServer]] = {}


def shared_server(modules: Sequence[str], environment: Mapping[str, str]) -> ForkServer | None:
    """This process's server with these imports, started where there is none; None where forking is not to be trusted.

    One that was started with other variables that are read early (`READ_EARLY`) is replaced.
    """
    if sys.platform != "linux":
        return None
    key = (os.getpid(), tuple(modules))  # a fork of this process must not share its pipes
    early = {name: value for name, value in environment.items() if name.startswith(READ_EARLY)}
    held = _servers.get(key)
    if held is not None and held[1].alive() and held[0] == early:
        return held[1]
    if held is not None:
        if not held[1].lock.acquire(blocking=False):  # another thread's job is on it
            return None
        held[1].close()
    server = ForkServer(modules, environment)
    _servers[key] = (early, server)
    return server


@atexit.register
def _close_all() -> None:
    for (pid, _), (_, server) in _servers.items():
        if pid == os.getpid():
            server.close()


def _serve(modules: Sequence[str]) -> None:
    """In the server: import, then a fork for every line on standard input until that ends."""
    told = os.dup(sys.stdout.fileno())
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries print; only our lines may reach the parent
    for name in modules:
        importlib.import_module(name)
    pending = b""
    while True:
        while b"\n" not in pending:
            read = os.read(0, 65536)
            if not read:
                return
            pending += read
        line, _, pending = pending.partition(b"\n")
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.close(told)
            _run(order)
        _lead_group(pid)
        _tell(told, pid=pid)
        code = _watch(pid)
        if code is None:
            return
        _tell(told, code=code)


def _lead_group(pid: int) -> None:
    """Done by both sides of a fork, so that the group is there whichever goes on first."""
    with contextlib.suppress(PermissionError, ProcessLookupError):
        os.setpgid(pid, pid)


def _tell(descriptor: int, **facts: int) -> None:
    os.write(descriptor, json.dumps(facts).encode() + b"\n")


def _watch(pid: int) -> int | None:
    """The job's exit status; None where our parent is gone, and then the job is, too."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        ready, _, _ = select.select([0], [], [], POLL_S)
        if ready:  # the parent writes nothing while a job runs: this is its end
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None


def _run(order: dict[str, Any]) -> None:
    """In the fork: the job, and never back into the server's loop."""
    code = 1
    try:
        _lead_group(0)
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdin = io.StringIO(order["job"])
        os.environ.clear()
        os.environ.update(order["environment"])
        os.chdir(order["folder"])
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001  whatever it is, it belongs into the log
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1:])
