"""This machine in a device's place: the same program and phases as over SSH, without a connection.

Not executed by us on a machine with a GPU: what was tried is the runner, on a double of a device.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from fusepress.pipeline.errors import UsageError
from fusepress.targets.host import THIS_MACHINE
from fusepress.targets.ssh import CALL_TIMEOUT_S, CallFailed, ConnectionLost, SshDevice


class LocalDevice(SshDevice):
    """This machine, with the calls of a device; to be used in a `with` statement.

    Args:
        poll_s: longest wait in one look at a running job.

    Raises:
        UsageError: no POSIX shell.
    """

    def __init__(self, *, poll_s: float = 10.0) -> None:
        super().__init__("localhost", poll_s=poll_s)
        self.host = THIS_MACHINE

    def __enter__(self) -> LocalDevice:
        """Put the program in its place."""
        if shutil.which("sh") is None:
            raise UsageError("expected a POSIX shell; got none in PATH; measure on Linux")
        self._install()
        return self

    def _reconnect(self) -> None:
        """Nothing to make again."""

    def _ssh(self, command: Sequence[str], *, stdin: bytes = b"", timeout_s: float = CALL_TIMEOUT_S) -> bytes:
        """One command in the home folder, as sshd would run it; no shell reads its words."""
        try:
            done = subprocess.run(
                command, input=stdin, capture_output=True, timeout=timeout_s, check=False, cwd=Path.home()
            )
        except subprocess.TimeoutExpired as error:
            raise ConnectionLost(f"no answer within {timeout_s:g} s") from error
        if done.returncode != 0:
            raise CallFailed.of(command, self.host, done.returncode, done.stderr)
        return done.stdout
