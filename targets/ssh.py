"""A device over the OpenSSH program: the user's own configuration, host keys checked, nothing unquoted in a shell.

The device runs `device.sh`, which is sent there under its hash. Every call is one verb of it; its arguments are quoted
for the shell that sshd starts. A connection that drops is made again, and what can be said twice is said again.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from fusepress.pipeline.errors import DeviceError, UsageError
from fusepress.pipeline.store import sha256_file

PROGRAM = Path(__file__).parent / "device.sh"
FOLDER = ".cache/fusepress"
CALL_TIMEOUT_S = 120.0
CONNECT_TIMEOUT_S = 15
CHUNK_BYTES = 4 << 20
LOSSES = 5  # connections that one call may lose: each is made again, and something may end them all
SSH_FAILED = 255
# What a user's configuration may hold for a terminal and would break a run: another command or none, forwardings that
# end the connection, a connection that leaves us for the background, no standard input, too few words.
_PLAIN = (
    "RemoteCommand=none", "RequestTTY=no", "ClearAllForwardings=yes", "ForwardAgent=no", "ForwardX11=no", "Tunnel=no",
    "PermitLocalCommand=no", "ControlPersist=no", "LogLevel=INFO", "VisualHostKey=no",
)  # fmt: skip
_PLAIN_SINCE_8_7 = ("ForkAfterAuthentication=no", "StdinNull=no")  # older programs refuse the words
_SESSION_SINCE_8_7 = "SessionType=default"
MARK = b"== fusepress\n"  # our program's first line; what a login shell prints comes before it
USAGE, OTHER_HASH, MISSING, UNRESTORED, CANNOT_WRITE, BUSY = 64, 65, 69, 70, 73, 75

# ssh's own words, and what to do about them; none of these goes away by trying again
_FINAL: tuple[tuple[str, str, str], ...] = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED",
        "the host key that is known",
        "another one; ask who set the device up anew, then `ssh-keygen -R HOST` and connect once by hand",
    ),
    (r"Host key verification failed", "a known host key", "an unknown one; connect once by hand: `ssh HOST`"),
    (r"Permission denied", "to log in without a password", "refused; add your key there: `ssh-copy-id HOST`"),
    (r"Could not resolve hostname", "a host that ssh knows", "no such name; add it to your ssh configuration"),
    (r"(?i)bad configuration option|terminating, \d+ bad", "a valid ssh configuration", "a bad one; correct it"),
)
# a name that ssh may hand to a proxy command's shell
_HOST = re.compile(r"(?:[\w.-]+@)?(?:[A-Za-z0-9_][\w.-]*|\[?[0-9A-Fa-f:.]+\]?)")


class ConnectionLost(Exception):
    """The connection dropped, or a call took too long."""


class CallFailed(DeviceError):
    """A verb ended with an exit code of its own; `code` is it, and `said` its words."""

    def __init__(self, message: str, code: int, said: str) -> None:
        super().__init__(message)
        self.code = code
        self.said = said

    @classmethod
    def of(cls, command: Sequence[str], host: str, code: int, stderr: bytes) -> CallFailed:
        """From what a command on a host left: `sh PROGRAM VERB ...`."""
        said = "; ".join(stderr.decode(errors="replace").strip().splitlines()) or f"exit code {code}"
        verb = command[2] if len(command) > 2 else shlex.join(command)
        return cls(f"expected {verb} to work on {host}; got {said}", code, said)


def check_host(host: str) -> str:
    """The host as it is, if it is a name, an address or `user@` one of them.

    Raises:
        UsageError: it could be read as an option, or by a shell.
    """
    if not _HOST.fullmatch(host) or host.startswith("-"):
        raise UsageError(
            f"expected a host such as orin or user@10.0.0.5; got {host!r}; ports, keys and jumps belong into your ssh "
            "configuration"
        )
    return host


class SshDevice:
    """A connection, to be used in a `with` statement.

    Args:
        host: a name in the user's ssh configuration, an address, or `user@` one of them.
        config: another ssh configuration file (ssh -F).
        reconnect_s: how long a dropped connection is tried again.
        poll_s: longest wait in one look at a running job.
        sleep, clock: for tests.

    Raises:
        UsageError: not a host, or no ssh program.
        DeviceError: the device cannot be reached.
    """

    def __init__(
        self,
        host: str,
        *,
        config: Path | None = None,
        reconnect_s: float = 120.0,
        poll_s: float = 10.0,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.host = check_host(host)
        self._program = "ssh"
        self._config = config
        self._reconnect_s = reconnect_s
        self.poll_s = poll_s
        self._sleep = sleep
        self._clock = clock
        self._private: Path | None = None
        self._modern = False
        self._master: subprocess.Popen[bytes] | None = None
        self._script = f"{FOLDER}/bin/device-{sha256_file(PROGRAM)[:16]}.sh"
        self.drops = 0

    def __enter__(self) -> SshDevice:
        """Connect, and send the device's program."""
        found = shutil.which("ssh")
        if found is None:
            raise UsageError("expected the ssh program; got none in PATH; install OpenSSH's client")
        self._program = found
        self._modern = _version(found) >= (8, 7)
        # a socket's path may have about 100 bytes, so that the usual place for temporary files can be too deep
        self._private = Path(tempfile.mkdtemp(prefix="fp-", dir="/tmp" if Path("/tmp").is_dir() else None))  # noqa: S108
        try:
            self._connect()
            self._install()
        except ConnectionLost as error:
            self._close()
            raise DeviceError(
                f"expected to reach {self.host}; got no connection ({error}); is it on, and does `ssh {self.host}` "
                "work by hand?"
            ) from error
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect; what runs on the device goes on."""
        self._close()

    # ------------------------------------------------------------------------------------------------------ connection

    def _options(self) -> list[str]:
        assert self._private is not None
        return [
            *(["-F", str(self._config)] if self._config is not None else []),
            "-o", "BatchMode=yes",
            "-o", "StrictHostKeyChecking=yes",
            "-o", f"ConnectTimeout={CONNECT_TIMEOUT_S}",
            "-o", "ServerAliveInterval=5",
            "-o", "ServerAliveCountMax=3",
            "-o", f"ControlPath={self._private}/s",
            *(word for option in _PLAIN + _PLAIN_SINCE_8_7 * self._modern for word in ("-o", option)),
        ]  # fmt: skip

    def _connect(self) -> None:
        """Start the one connection that all calls share; without it they would connect each by itself."""
        assert self._private is not None
        self._end_master()
        log = self._private / "master.log"
        with log.open("wb") as file:
            self._master = subprocess.Popen(
                [self._program, *self._options(), "-o", "ControlMaster=yes", "-N", "--", self.host],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        deadline = time.monotonic() + CONNECT_TIMEOUT_S + 15
        while not (self._private / "s").exists():
            if self._master.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace")
                self._end_master()
                self._raise_final(said)
                raise ConnectionLost(_last_line(said))
            time.sleep(0.02)

    def _raise_final(self, said: str) -> None:
        for pattern, expected, got in _FINAL:
            if re.search(pattern, said):
                raise DeviceError(f"expected {expected}; got {got.replace('HOST', self.host)} ({_last_line(said)})")

    def _reconnect(self) -> None:
        self.drops += 1
        started, pause = self._clock(), 0.2
        while True:
            try:
                self._connect()
                return
            except ConnectionLost as error:
                if self._clock() - started >= self._reconnect_s:
                    raise self._unreachable(str(error)) from error
                self._sleep(pause)
                pause = min(2 * pause, 10.0)

    def _unreachable(self, said: str) -> DeviceError:
        return DeviceError(
            f"expected to reach {self.host} within {self._reconnect_s:g} s; got no connection ({said}); when it is "
            "back, run the same command again: finished phases are kept, and a running one goes on"
        )

    def _end_master(self) -> None:
        if self._master is not None:
            self._master.terminate()
            try:
                self._master.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._master.kill()
                self._master.wait()
            self._master = None
        if self._private is not None:
            (self._private / "s").unlink(missing_ok=True)

    def _close(self) -> None:
        self._end_master()
        if self._private is not None:
            shutil.rmtree(self._private, ignore_errors=True)
            self._private = None

    # ----------------------------------------------------------------------------------------------------------- calls

    def _install(self) -> None:
        program = PROGRAM.read_bytes()
        folder, part = f"{FOLDER}/bin", f"{self._script}.{hashlib.sha256(self.host.encode()).hexdigest()[:8]}"
        command = 'umask 077; mkdir -p "$1" && cat >"$2" && mv "$2" "$3"'
        try:
            self._ssh(["sh", "-c", command, "install", folder, part, self._script], stdin=program)
        except CallFailed as error:
            raise DeviceError(
                f"expected to write into {FOLDER} on {self.host}; got {error.said}; free some space there, or make "
                "its home folder writable"
            ) from error

    def _ssh(self, command: Sequence[str], *, stdin: bytes = b"", timeout_s: float = CALL_TIMEOUT_S) -> bytes:
        """One remote command, every word of it quoted; `ConnectionLost` where ssh itself failed."""
        line = shlex.join(command)
        session = ["-o", _SESSION_SINCE_8_7] if self._modern else []
        try:
            done = subprocess.run(
                [self._program, *self._options(), *session, "-o", "ControlMaster=no", "--", self.host, line],
                input=stdin,
                capture_output=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ConnectionLost(f"no answer within {timeout_s:g} s") from error
        said = done.stderr.decode(errors="replace").strip()
        if done.returncode == SSH_FAILED or done.returncode < 0:
            self._raise_final(said)
            raise ConnectionLost(_last_line(said))
        if done.returncode != 0:
            raise CallFailed.of(command, self.host, done.returncode, done.stderr)
        return done.stdout

    def call(self, verb: str, *arguments: str, timeout_s: float = CALL_TIMEOUT_S) -> str:
        """One verb of device.sh that may be said twice; a dropped connection is made again.

        Raises:
            CallFailed: it ended with an exit code.
            DeviceError: the device cannot be reached any more, or gives no answer.
        """
        losses = 0
        while True:
            try:
                return self._verb(verb, *arguments, timeout_s=timeout_s).decode(errors="replace")
            except ConnectionLost as error:
                losses += 1
                self._again(verb, losses, error)

    def _again(self, verb: str, losses: int, error: ConnectionLost) -> None:
        """Connect once more, unless one thing was tried often enough."""
        if losses >= LOSSES:
            raise DeviceError(
                f"expected an answer to {verb!r} from {self.host}; got none over {losses} connections ({error}); does "
                f"`ssh {self.host} echo yes` work by hand? Then run the same command again: finished phases are kept"
            ) from error
        self._reconnect()

    def _verb(self, verb: str, *arguments: str, stdin: bytes = b"", timeout_s: float = CALL_TIMEOUT_S) -> bytes:
        _, mark, out = self._ssh(["sh", self._script, verb, *arguments], stdin=stdin, timeout_s=timeout_s).partition(
            MARK
        )
        if not mark:
            raise ConnectionLost("the answer was cut short")
        return out

    # ----------------------------------------------------------------------------------------------------------- files

    def upload(self, path: Path, name: str, sha256: str, progress: Callable[[float], None] | None = None) -> bool:
        """Copy a file to the device unless it is there; a copy that was cut short goes on where it stopped.

        Returns:
            Whether anything was sent.

        Raises:
            DeviceError: the disk there is full, or the copy comes out different twice.
        """
        known, there = self.call("have", name).split()
        if known == sha256:
            return False
        for _ in range(2):
            self._send(path, name, int(there), progress)
            there = "0"
            try:
                self.call("seal", name, sha256)
            except CallFailed as error:
                if error.code == OTHER_HASH:
                    continue  # a rest of another copy; it was removed
                raise self._no_room(name, error) from error
            return True
        raise DeviceError(
            f"expected {path.name} on {self.host} with the hash {sha256[:16]}; got another one twice; is the file "
            "changing, or the device's disk damaged?"
        )

    def _send(self, path: Path, name: str, there: int, progress: Callable[[float], None] | None) -> None:
        """Append what is missing; more than there should be is of something else, as the hash will say."""
        total, losses = path.stat().st_size, 0
        with path.open("rb") as file:
            while there < total or total == 0:
                file.seek(there)
                chunk = file.read(CHUNK_BYTES)
                if progress is not None:
                    progress(there / max(total, 1))
                try:
                    self._verb("append", name, stdin=chunk)
                    there, losses = there + len(chunk), 0
                except ConnectionLost as error:
                    losses += 1
                    self._again("append", losses, error)
                    there = int(self.call("have", name).split()[1])
                except CallFailed as error:
                    raise self._no_room(name, error) from error
                if total == 0:
                    return

    def _no_room(self, name: str, error: CallFailed) -> DeviceError:
        return DeviceError(
            f"expected room for {name} on {self.host}; got {error.said}; free some space there and run the same "
            "command again: what was copied is kept"
        )

    def fetch(self, *names: str) -> dict[str, bytes | None]:
        """Files of the device, each with the hash that it has there; None where there is none.

        Raises:
            DeviceError: they come in other bytes each time.
        """
        for _ in range(3):
            try:
                return dict(_files(self._verb("fetch", *names), names))
            except ConnectionLost:
                self._reconnect()
            except ValueError:
                continue
        raise DeviceError(
            f"expected {', '.join(names)} of {self.host} in one piece; got other bytes in each of 3 tries; run the "
            "same command again when the connection is better"
        )

    def read(self, *names: str) -> list[str]:
        """Texts of files that have to be there.

        Raises:
            DeviceError: one is missing.
        """
        texts = []
        for name, data in self.fetch(*names).items():
            if data is None:
                raise DeviceError(f"expected the file {name} on {self.host}; got none; run the same command again")
            texts.append(data.decode(errors="replace"))
        return texts

    # ------------------------------------------------------------------------------------------------------------ jobs

    def run_job(
        self,
        job: str,
        command: Sequence[str],
        *,
        work: str,
        limit_s: int,
        lock_clocks: bool = False,
        mode_id: str | None = None,
        waiting: Callable[[], None] | None = None,
    ) -> int:
        """Run a command that outlives the connection, and wait for it; one that is done or runs is not begun again.

        Args:
            job: its folder on the device.
            command: program and arguments.
            work: folder that it runs in.
            limit_s: when it is ended.
            lock_clocks: hold the clocks of the power mode at their highest meanwhile.
            mode_id: power mode to set meanwhile, by nvpmodel's number.
            waiting: called between looks.

        Returns:
            Its exit code; 143 where it was ended.

        Raises:
            DeviceError: it died without an exit code twice, or the device is gone.
        """
        clocks, mode, patience = "1" if lock_clocks else "0", mode_id or "-", str(max(1, round(self.poll_s)))
        for _ in range(3):
            state = self._start(job, patience, str(limit_s), clocks, mode, work, *command)
            while state == "running":
                if waiting is not None:
                    waiting()
                state = self.call("wait_for", job, patience).strip()
            if state.startswith("done"):
                return int(state.split()[1])
        raise DeviceError(
            f"expected {job.rsplit('/', 1)[-1]} to end with an exit code on {self.host}; got none in 3 tries; is the "
            "device running out of memory or restarting? See `dmesg` there"
        )

    def _start(self, *arguments: str) -> str:
        try:
            return self.call("start", *arguments).strip()
        except CallFailed as error:
            if error.code == CANNOT_WRITE:
                raise self._no_room(arguments[0], error) from error
            raise

    def try_call(self, verb: str, *arguments: str) -> None:
        """One verb if the device is there, for when the user gives up."""
        with contextlib.suppress(DeviceError, ConnectionLost):
            self._verb(verb, *arguments, timeout_s=30.0)


def _version(program: str) -> tuple[int, int]:
    """Of OpenSSH's client; (0, 0) where it does not say."""
    done = subprocess.run([program, "-V"], capture_output=True, text=True, timeout=CALL_TIMEOUT_S, check=False)
    found = re.search(r"OpenSSH\D*(\d+)\.(\d+)", done.stdout + done.stderr)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _files(data: bytes, names: Sequence[str]) -> Iterator[tuple[str, bytes | None]]:
    """Files from what `fetch` printed; ValueError where one was cut short."""
    for name in names:
        _, mark, rest = data.partition(b"\n== " + name.encode() + b" ")
        head, _, rest = rest.partition(b"\n")
        if not mark or len(head.split()) != 2:
            raise ValueError(name)
        size, sha256 = int(head.split()[0]), head.split()[1].decode()
        if size < 0:
            yield name, None
            data = rest
            continue
        content, data = rest[:size], rest[size:]
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(name)
        yield name, content


def _last_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip() and not set(line) <= {"@", " "}]
    return lines[-1] if lines else "no word from ssh"
