"""Measuring on a device: ship, build, time, profile, compare outputs, and leave it as it was.

Every phase is a job of `device.sh`, which outlives the connection and puts the power state back whatever ends it. A
phase that is done is not done again: the same call after a dropped connection or a killed client goes on where the
device is. Engines stay there under a key of {model, TensorRT version and build, GPU, power mode, flags}, timing caches
under a key of the same without model and flags. No Python is needed on the device.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fusepress.pipeline.errors import BuildError, DeviceError, MeasureError, UsageError
from fusepress.pipeline.store import folder_lock, sha256_file
from fusepress.targets.doctor import (
    DeviceFacts,
    Finding,
    PowerState,
    examine,
    mode_name,
    parse_power,
    parse_probe,
    parse_samples,
    refuse,
)
from fusepress.targets.latency import LatencyMeasurement, summarize
from fusepress.targets.profile import Profile
from fusepress.targets.remote_result import (
    KEPT_A_ROUND,
    Difference,
    EngineOrder,
    EngineResult,
    RemoteResult,
    RemoteSettings,
    Throughput,
    Timing,
    compare_outputs,
    longest_pause_s,
    speedups,
)
from fusepress.targets.ssh import BUSY, UNRESTORED, CallFailed, ConnectionLost, SshDevice
from fusepress.targets.trtexec import TrtexecLog, parse_log, parse_outputs, parse_times
from fusepress.targets.trtexec_command import (
    WARMUP_MS,
    tensorrt_version,
    trtexec_bench,
    trtexec_build,
    trtexec_outputs,
    trtexec_profile,
)

REFERENCES = "references.json"
STALE_LOCK_S = 90
ATTEMPTS = 2  # of unstable timings
APART_S = 300  # rounds with such a pause between them did not meet the same state: reconnecting takes at most 120 s
RUN_LIMIT_S = 300  # beyond the seconds that a timed run is asked for
LOCAL_LOCKS = Path.home() / ".cache" / "fusepress" / "devices"
DAY_S = 86_400

Array = npt.NDArray[np.float64]
Say = Callable[[float, str], None]


def probe_device(device: SshDevice) -> DeviceFacts:
    """What the device is and which state it is in."""
    return parse_probe(device.call("probe"))


def measure_remote(
    device: SshDevice,
    orders: Sequence[EngineOrder],
    *,
    references: Path | None = None,
    profile: Profile | None = None,
    mode: str | None = None,
    settings: RemoteSettings | None = None,
    say: Say | None = None,
) -> RemoteResult:
    """Build engines on a device, time them in turns, profile them, and compare the first one's outputs.

    Args:
        device: connected.
        orders: the engines; the first is the one whose outputs are compared.
        references: folder with references.json as a build kit has it; None to compare nothing.
        profile: the target that the device is; None to judge the device alone.
        mode: power mode that the latency is judged in; the profile's default when None.
        settings: how long, in which state.
        say: called with a fraction and a word.

    Raises:
        UsageError: nothing to build.
        DeviceError: the device is in use, unfit, gone or full.
        BuildError: trtexec refuses a model.
        MeasureError: a run fails.
    """
    if not orders:
        raise UsageError("expected at least one model to measure; got none; name an ONNX file")
    session = _Session(device, settings or RemoteSettings(), profile, mode, say or (lambda _fraction, _word: None))
    with folder_lock(LOCAL_LOCKS / session.client, purpose=f"device {device.host}"), session.locked():
        return session.measure(orders, references)


class _Session:
    """One measurement; `run` is its folder on the device."""

    def __init__(
        self, device: SshDevice, settings: RemoteSettings, profile: Profile | None, mode: str | None, say: Say
    ) -> None:
        self.device = device
        self.settings = settings
        self.profile = profile
        self.mode = mode or (profile.default_mode if profile is not None else None)
        self.say = say
        # who holds the device, the same for every try from here: a killed client's lock is its successor's
        identity = f"{getpass.getuser()}@{platform.node()} {device.host}"
        self.client = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self.owner = f"{getpass.getuser()} on {platform.node()}"
        self.run = ""
        self.facts = DeviceFacts()
        self.restored = True

    # ------------------------------------------------------------------------------------------------------------ lock

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the device; what runs there is ended when the user gives up, and a lost connection leaves it running."""
        self._lock()
        try:
            yield
        except DeviceError as error:
            # one that is gone keeps its lock until we come back or it is stale
            if not isinstance(error.__cause__, ConnectionLost):
                self._leave()
            raise
        except (BuildError, MeasureError):
            if self.run:
                self.device.call("tidy", self.run)  # the next try shall not find what failed
            self._leave()
            raise
        except BaseException:
            self.device.try_call("restore")
            if self.run:
                self.device.try_call("tidy", self.run)  # the exit code of what was ended tells nothing of the engine
            self.device.try_call("unlock", self.client)
            raise
        else:
            self._leave()

    def _lock(self) -> None:
        deadline = time.monotonic() + self.settings.wait_s
        while True:
            try:
                self.device.call("lock", self.client, str(STALE_LOCK_S), self.owner)
                return
            except CallFailed as error:
                if error.code != BUSY:
                    raise
                if time.monotonic() >= deadline:
                    raise DeviceError(
                        f"expected {self.device.host} to be free; got {error.said} at work there; wait for it (--wait "
                        "SECONDS), or measure later"
                    ) from error
            time.sleep(min(2.0, self.device.poll_s))

    def _leave(self) -> None:
        try:
            self.device.call("restore")
        except CallFailed as error:
            if error.code == UNRESTORED:
                self.restored = False
        self.device.call("unlock", self.client)

    # ---------------------------------------------------------------------------------------------------------- phases

    def measure(self, orders: Sequence[EngineOrder], references: Path | None) -> RemoteResult:
        self.say(0.0, "looking at the device")
        self._restore_leftover()
        self.facts = probe_device(self.device)
        findings = self._examine()
        shipped = {order.name: self._ship(order.onnx, f"shipping {order.name}") for order in orders}
        keys = {order.name: self._key(order, shipped[order.name]) for order in orders}
        self.run = "runs/" + self._digest([self.client, sorted(keys.items()), self._day(), str(self.settings)])
        reused = {order.name: self._build(order, shipped[order.name], keys[order.name]) for order in orders}
        timed, during, locked = self._time(orders, keys)
        results = {}
        for order in orders:
            self.say(0.8, f"profiling {order.name}")
            results[order.name] = self._result(
                order, keys[order.name], shipped[order.name], reused[order.name], timed[order.name], orders[0] is order
            )
        differences = self._differences(orders[0], keys[orders[0].name], references)
        self.device.call("tidy", self.run)
        self._restore_leftover()
        return RemoteResult(
            facts=self.facts,
            findings=findings,
            engines=results,
            differences=differences,
            during=during,
            clocks_locked=locked,
            restored=self.restored,
            drops=self.device.drops,
            speedups=speedups(orders, timed),
        )

    def _restore_leftover(self) -> None:
        try:
            self.device.call("restore")
        except CallFailed as error:
            if error.code != UNRESTORED:
                raise
            self.restored = False

    def _examine(self) -> tuple[Finding, ...]:
        findings = examine(self.facts, profile=self.profile, mode=self.mode)
        if self.settings.set_mode:
            if not self.facts.sudo:
                raise DeviceError(
                    f"expected sudo without a password on {self.device.host}, to set the power mode; got none; allow "
                    "it for nvpmodel and jetson_clocks, or set the mode by hand"
                )
            if self._mode_id() is None:
                raise DeviceError(
                    f"expected a power mode of {self.device.host}, one of {', '.join(self.facts.modes) or 'none'}; got "
                    f"{self.mode!r}; name one of these, or leave --set-mode out"
                )
            findings = [f for f in findings if not (f.what == "power mode" and f.level == "refuse")]
        refuse(findings, self.device.host)
        return tuple(findings)

    def _mode_id(self) -> str | None:
        names = {mode_name(name): number for name, number in self.facts.modes.items()}
        return names.get(self.mode or "")

    def _day(self) -> int:
        """Days by the device's clock: what a killed client left behind is taken up on the same day."""
        return int(self.device.call("clock")) // DAY_S

    @staticmethod
    def _digest(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]

    def _place(self) -> list[Any]:
        """What an engine depends on beside the model and the flags."""
        assert self.facts.tensorrt is not None
        mode = self.mode if self.settings.set_mode else self.facts.power.mode
        return [
            self.facts.tensorrt.version,
            self.facts.tensorrt.build,
            self.facts.compute_capability,
            self.facts.model or self.facts.gpu_name,
            mode,
        ]

    def _key(self, order: EngineOrder, sha256: str) -> str:
        return self._digest([*self._place(), sha256, self._build_arguments(order, sha256)])

    def _timing_cache(self) -> str:
        return f"../{self._digest(self._place())}.cache"

    def _build_arguments(self, order: EngineOrder, sha256: str) -> list[str]:
        assert self.facts.tensorrt is not None
        return trtexec_build(
            f"../../models/{sha256}.onnx",
            "model.plan",
            self.facts.tensorrt.version,
            order.precision,
            sparse=order.sparse,
            timing_cache=self._timing_cache(),
        )

    def _ship(self, path: Path, word: str) -> str:
        sha256 = sha256_file(path)
        name = f"models/{sha256}{'.onnx' if path.suffix == '.onnx' else '.bin'}"
        self.device.upload(path, name, sha256, lambda fraction: self.say(0.02 + 0.08 * fraction, word))
        return sha256

    def _build(self, order: EngineOrder, sha256: str, key: str) -> bool:
        """Build an engine unless it is there; whether it was."""
        folder = f"engines/{key}"
        job = f"{folder}/build"
        state = self.device.call("state", job).strip()
        if state == "done 0":
            return True
        if state.startswith("done"):  # of an earlier try that failed
            self.device.call("tidy", folder)
        arguments = self._build_arguments(order, sha256)
        code = self._job(job, arguments, folder, self.settings.build_limit_s, f"building {order.name}", 0.1)
        if code != 0:
            files = self.device.fetch(f"{job}/log", f"{job}/late")
            said = (files[f"{job}/log"] or b"").decode(errors="replace")
            self.device.call("tidy", folder)
            raise self._build_failed(order, code, said, late=files[f"{job}/late"] is not None)
        return False

    def _build_failed(self, order: EngineOrder, code: int, said: str, *, late: bool) -> BuildError | DeviceError:
        log = parse_log(said)
        if late:
            return BuildError(
                f"expected trtexec to build {order.name} within {self.settings.build_limit_s} s; got no engine by then "
                f"on {self.device.host}; give it longer (--build-limit), or build in a faster power mode"
            )
        if "No space left" in said or "Saving engine to file failed" in said:
            return DeviceError(
                f"expected room for the engine of {order.name} on {self.device.host}; got a full disk; free some space "
                "there and run the same command again"
            )
        return BuildError(
            f"expected trtexec of TensorRT {log.banner.version if log.banner else 'an unknown version'} to build "
            f"{order.name} on {self.device.host}; got exit code {code}: {log.reason}; `fusepress plan` names operators "
            "that a target refuses"
        )

    def _job(self, job: str, arguments: Sequence[str], work: str, limit_s: int, word: str, fraction: float) -> int:
        assert self.facts.trtexec is not None
        self.say(fraction, word)
        try:
            code = self.device.run_job(
                job,
                [self.facts.trtexec, *arguments],
                work=work,
                limit_s=limit_s,
                lock_clocks=self.settings.lock_clocks and self.facts.sudo,
                mode_id=self._mode_id() if self.settings.set_mode else None,
                waiting=lambda: self.say(fraction, word),
            )
        except KeyboardInterrupt:
            self.device.try_call("stop", job)
            raise
        return code

    def _run(
        self, name: str, arguments: Sequence[str], seconds: float, word: str, fraction: float, *wanted: str
    ) -> tuple[TrtexecLog, list[str]]:
        """A run of an engine that has to succeed: its log, and the files that it should leave in `out`, or by it."""
        job = f"{self.run}/{name}"
        code = self._job(job, arguments, f"{self.run}/out", int(seconds) + RUN_LIMIT_S, word, fraction)
        paths = [f"{job}/log", f"{job}/unrestored", *(f"{self.run}/{path}" for path in wanted)]
        files = self.device.fetch(*paths)
        log = parse_log((files[paths[0]] or b"").decode(errors="replace"))
        if files[paths[1]] is not None:
            self.restored = False
        missing = [path for path in paths[2:] if files[path] is None]
        if code != 0 or missing:
            reason = log.reason if code != 0 else f"no {missing[0].rsplit('/', 1)[-1]}"
            raise MeasureError(
                f"expected trtexec to run the engine on {self.device.host}; got exit code {code}: {reason}; is "
                "something else using its memory? `fusepress targets doctor` looks"
            )
        return log, [(files[path] or b"").decode(errors="replace") for path in paths[2:]]

    # ---------------------------------------------------------------------------------------------------------- timing

    def _time(
        self, orders: Sequence[EngineOrder], keys: Mapping[str, str]
    ) -> tuple[dict[str, Timing], PowerState, bool]:
        """All engines in turns; once more from the start where a timing is unstable."""
        for attempt in range(ATTEMPTS):
            timed = self._in_turns(orders, keys, attempt)
            if not any(timing.unstable() for timing in timed.values()):
                break
        job = f"{self.run}/time-{attempt}-0-{self.settings.rounds - 1}"
        files = self.device.fetch(f"{job}/after", f"{job}/locked")
        during = parse_power((files[f"{job}/after"] or b"").decode(errors="replace"))
        if self.settings.set_mode and during.mode != self.mode:
            for folder in (self.run, *(f"engines/{key}" for key in keys.values())):  # of another mode than they say
                self.device.call("tidy", folder)
            raise DeviceError(
                f"expected power mode {self.mode} on {self.device.host} while timing; got {during.mode}; some changes "
                "take a restart: set it by hand with nvpmodel, restart, and measure again"
            )
        return timed, during, files[f"{job}/locked"] is not None

    def _in_turns(self, orders: Sequence[EngineOrder], keys: Mapping[str, str], attempt: int) -> dict[str, Timing]:
        """Every engine once in each round. What a killed client timed long ago is timed anew with the rest.

        Raises:
            MeasureError: there was a long pause between rounds, twice.
        """
        turns = [
            ((turn + position) % len(orders), turn)
            for turn in range(self.settings.rounds)
            for position in range(len(orders))
        ]
        jobs = {(index, turn): f"time-{attempt}-{index}-{turn}" for index, turn in turns}
        for _ in range(2):
            timed = {order.name: Timing() for order in orders}
            ends: list[PowerState] = []
            for index, turn in turns:
                order = orders[index]
                word = f"timing {order.name}, round {turn + 1} of {self.settings.rounds}"
                ends += self._round(timed[order.name], jobs[index, turn], keys[order.name], word)
            pause_s = longest_pause_s(ends)
            if pause_s <= APART_S:
                return timed
            for job in jobs.values():
                self.device.call("tidy", f"{self.run}/{job}")
        raise MeasureError(
            f"expected rounds that follow one another on {self.device.host}; got a pause of {pause_s:.0f} s between "
            "two of them, twice; keep this computer awake and measure again"
        )

    def _round(self, timing: Timing, job: str, key: str, word: str) -> tuple[PowerState, PowerState]:
        """One engine once more; the power state before and after."""
        times = f"{job}.times.json"
        arguments = self._bench(key, times)
        wanted = (f"out/{times}", f"{job}/samples", f"{job}/before", f"{job}/after")
        log, (timed, samples, before, after) = self._run(job, arguments, self._seconds(), word, 0.4, *wanted)
        timing.logs.append(log)
        timing.times.append(parse_times(timed, warmup_ms=WARMUP_MS, where=times))
        timing.samples.append(parse_samples(samples, warmup_s=WARMUP_MS / 1e3))
        return parse_power(before), parse_power(after)

    def _seconds(self) -> int:
        """Of one round."""
        return max(1, round(self.settings.seconds / self.settings.rounds))

    def _bench(self, key: str, times: str, *, copies: bool = False, streams: int = 1) -> list[str]:
        assert self.facts.tensorrt is not None
        plan, version = f"../../../engines/{key}/model.plan", self.facts.tensorrt.version
        return trtexec_bench(plan, version, seconds=self._seconds(), copies=copies, times=times, streams=streams)

    def _result(
        self, order: EngineOrder, key: str, sha256: str, reused: bool, timing: Timing, first: bool
    ) -> EngineResult:
        name = f"profile-{key[:8]}"
        arguments = trtexec_profile(f"../../../engines/{key}/model.plan", profile=f"{name}.json")
        _, (profile,) = self._run(name, arguments, 60.0, f"profiling {order.name}", 0.8, f"out/{name}.json")
        return EngineResult(
            name=order.name,
            onnx_sha256=sha256,
            key=key,
            reused=reused,
            latency=timing.latency(),
            with_copies=self._with_copies(key) if first else None,
            throughput=self._throughput(key) if first and self.settings.streams > 1 else None,
            warnings=timing.warnings(),
            unstable=timing.unstable(),
            energy_mj=timing.energy_mj(),
            layers=self.device.read(f"engines/{key}/model.layers.json")[0],
            profile=profile,
        )

    def _with_copies(self, key: str) -> LatencyMeasurement:
        name = f"copies-{key[:8]}"
        times = f"{name}.times.json"
        arguments = self._bench(key, times, copies=True)
        _, (text,) = self._run(name, arguments, self._seconds(), "timing with copies", 0.85, f"out/{times}")
        return summarize(parse_times(text, warmup_ms=WARMUP_MS, where=times).latency_ms[:KEPT_A_ROUND])

    def _throughput(self, key: str) -> Throughput:
        name, streams = f"streams-{key[:8]}", self.settings.streams
        times = f"{name}.times.json"
        arguments = self._bench(key, times, streams=streams)
        log, (text,) = self._run(name, arguments, self._seconds(), f"timing {streams} streams", 0.87, f"out/{times}")
        if log.throughput_qps is None:
            raise MeasureError(
                f"expected trtexec to tell its throughput on {self.device.host}; got a log without one; run it "
                f"there by hand with {' '.join(arguments)}"
            )
        found = parse_times(text, warmup_ms=WARMUP_MS, where=times).compute_ms[: streams * KEPT_A_ROUND]
        return Throughput(streams=streams, per_second=log.throughput_qps, latency=summarize(found))

    # -------------------------------------------------------------------------------------------------------- numerics

    def _ship_input(self, references: Path, item: Mapping[str, Any]) -> str:
        """Where an input lies for an engine; before TensorRT 10, int64 is bound as int32."""
        assert self.facts.tensorrt is not None
        path, word = references / item["file"], "shipping references"
        if item["type"] == "int64" and tensorrt_version(self.facts.tensorrt.version)[0] < 10:
            with tempfile.TemporaryDirectory(prefix="fusepress-") as folder:
                narrow = Path(folder) / "input.bin"
                np.fromfile(path, dtype=np.int64).astype(np.int32).tofile(narrow)
                return f"../../../models/{self._ship(narrow, word)}.bin"
        return f"../../../models/{self._ship(path, word)}.bin"

    def _differences(self, order: EngineOrder, key: str, references: Path | None) -> tuple[Difference, ...]:
        if references is None or not (references / REFERENCES).is_file():
            return ()
        found = []
        for index, entry in enumerate(json.loads((references / REFERENCES).read_text())):
            feeds = {item["name"]: self._ship_input(references, item) for item in entry["inputs"]}
            name = f"outputs-{index}.json"
            arguments = trtexec_outputs(f"../../../engines/{key}/model.plan", feeds, name)
            word = f"comparing outputs of {order.name}"
            _, (text,) = self._run(f"outputs-{index}", arguments, 60.0, word, 0.9, f"out/{name}")
            found += compare_outputs(index, parse_outputs(text, where=name), entry["outputs"], references)
        return tuple(found)
