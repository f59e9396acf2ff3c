"""A device's health before and while it is measured: what a probe says, and what of it makes a latency worthless.

Formats: nvpmodel -q, jetson_clocks --show and tegrastats of JetPack 5 and 6 as published by users; nvidia-smi's CSV.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fusepress.pipeline.errors import DeviceError
from fusepress.targets.host import THIS_MACHINE
from fusepress.targets.profile import Profile
from fusepress.targets.trtexec import Banner, parse_banner
from fusepress.targets.trtexec_command import tensorrt_version

Level = Literal["refuse", "warn", "note"]

HOT_C = 85.0  # NVIDIA's software throttling of Orin begins around 95; boards cap clocks earlier when they heat up
CLOCK_DROP = 0.95  # of the highest clock while the GPU is busy
NEED_MIB = 1024  # of disk, for models, engines and logs
NEED_MEMORY_MIB = 1024
BUSY_PERCENT = 50
SAMPLE_S = 0.5  # between two lines of a sampler, as device.sh asks for
_SECTION = re.compile(r"^== ([\w-]+)$", re.MULTILINE)
_CLOCK = re.compile(r"^(GPU|EMC) MinFreq=(\d+) MaxFreq=(\d+) CurrentFreq=(\d+)", re.MULTILINE)
_GR3D = re.compile(r"GR3D_FREQ (\d+)%(?:@\[?(\d+)[\d,]*\]?)?")
_TEMPERATURE = re.compile(r"\b[\w-]+@(-?[\d.]+)C\b")
_POWER = re.compile(r"\b(V[A-Z0-9_]+|POM_5V_IN) (\d+)(?:mW)?/\d+(?:mW)?")
_MODE = re.compile(r"POWER_MODEL ID=(\d+) NAME=(\S+)")
# rails that the whole board draws from; the others are parts of them
_BOARD_RAILS = ("VDD_IN", "POM_5V_IN")


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """One clock domain in MHz; it is locked where lowest and highest are the same."""

    low_mhz: float
    high_mhz: float
    now_mhz: float

    @property
    def locked(self) -> bool:
        """Whether it cannot change."""
        return self.low_mhz == self.high_mhz


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerState:
    """What can change from minute to minute.

    Attributes:
        mode: name of the power mode, None where the device has none.
        mode_id: nvpmodel's number of it.
        clocks: `gpu`, `emc` -> Clock, as far as they can be read.
        hottest_c: of all sensors.
        overcurrent_events: count since the device started.
        throttling: nvidia-smi's reasons of the moment other than an idle GPU.
        load: average over a minute.
        clock_s: seconds by the device's clock.
    """

    mode: str | None = None
    mode_id: str | None = None
    clocks: Mapping[str, Clock] = field(default_factory=dict)
    hottest_c: float | None = None
    overcurrent_events: int = 0
    throttling: bool = False
    load: float | None = None
    clock_s: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "mode": self.mode,
            "clocks_mhz": {name: [c.low_mhz, c.now_mhz, c.high_mhz] for name, c in self.clocks.items()},
            "locked": sorted(name for name, clock in self.clocks.items() if clock.locked),
            "hottest_c": self.hottest_c,
            "overcurrent_events": self.overcurrent_events,
            "throttling": self.throttling,
            "load": self.load,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """What a probe found out.

    Attributes:
        trtexec: its path there, None where there is none.
        tensorrt: version and build that it names.
        modes: power mode -> nvpmodel's number.
        sudo: whether it works without a password.
        users: other processes that have the GPU open, as `pid name`.
        leftover: a killed measurement left the power state changed.
    """

    system: str = ""
    model: str = ""
    release: str = ""
    jetpack: str | None = None
    gpu_name: str | None = None
    compute_capability: str | None = None
    trtexec: str | None = None
    tensorrt: Banner | None = None
    cuda: str | None = None
    modes: Mapping[str, str] = field(default_factory=dict)
    sudo: bool = False
    memory_mib: int | None = None
    free_memory_mib: int | None = None
    free_disk_mib: int | None = None
    users: tuple[str, ...] = ()
    leftover: bool = False
    power: PowerState = PowerState()

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; no path, no user, no name of a host."""
        return {
            "system": self.system,
            "model": self.model,
            "release": self.release,
            "jetpack": self.jetpack,
            "gpu": self.gpu_name,
            "compute_capability": self.compute_capability,
            "tensorrt": self.tensorrt.version if self.tensorrt else None,
            "tensorrt_build": self.tensorrt.build if self.tensorrt else None,
            "cuda": self.cuda,
            "sudo": self.sudo,
            "memory_mib": self.memory_mib,
            "power": self.power.to_dict(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing about a device that matters to a latency: `refuse` means that measuring would mislead."""

    level: Level
    what: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """A sampler's lines while a command ran.

    Attributes:
        n: lines that could be read.
        gpu_mhz: lowest and highest clock while the GPU was busy.
        hottest_c: of all sensors.
        board_mw: mean power of the whole board while inferences were timed, so without load and warm-up; None where
            the rails of this board do not tell, or too few lines are left.
    """

    n: int
    gpu_mhz: tuple[float, float] | None = None
    hottest_c: float | None = None
    board_mw: float | None = None

    @property
    def clock_dropped(self) -> bool:
        """Whether the busy GPU ran below its own highest clock at times."""
        return self.gpu_mhz is not None and self.gpu_mhz[0] < CLOCK_DROP * self.gpu_mhz[1]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"n": self.n, "gpu_mhz": self.gpu_mhz, "hottest_c": self.hottest_c, "board_mw": self.board_mw}


def sections(text: str) -> dict[str, str]:
    """The parts of a probe by name."""
    parts = _SECTION.split(text)
    return {name: body.strip() for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def parse_probe(text: str) -> DeviceFacts:
    """Facts from what `device.sh probe` prints.

    Raises:
        DeviceError: it was cut short.
    """
    part = sections(text)
    if "time" not in part:  # its last section
        raise DeviceError("expected a whole probe; got one that was cut short; run the same command again")
    packages = dict(line.split(maxsplit=1) for line in part.get("packages", "").splitlines() if " " in line)
    memory = dict(re.findall(r"^(\w+):\s+(\d+) kB", part.get("memory", ""), re.MULTILINE))
    disk = part.get("disk", "").split()
    gpu = [item.strip() for item in _lines(part, "nvidia-smi")[0].split(",")] if _lines(part, "nvidia-smi") else []
    cuda = re.search(r'"version"\s*:\s*"([\d.]+)"', part.get("cuda", ""))
    return DeviceFacts(
        system=part.get("system", ""),
        model=part.get("model", ""),
        release=part.get("release", ""),
        jetpack=packages.get("nvidia-jetpack"),
        gpu_name=gpu[0] if gpu else None,
        compute_capability=gpu[1] if len(gpu) > 1 else _tegra_capability(part),
        trtexec=part.get("trtexec") or None,
        tensorrt=parse_banner(part.get("banner", "")),
        cuda=cuda[1] if cuda else None,
        modes={name: number for number, name in _MODE.findall(part.get("modes", ""))},
        sudo=part.get("sudo") == "yes",
        memory_mib=int(memory["MemTotal"]) // 1024 if "MemTotal" in memory else None,
        free_memory_mib=int(memory["MemAvailable"]) // 1024 if "MemAvailable" in memory else None,
        free_disk_mib=int(disk[3]) // 1024 if len(disk) > 3 and disk[3].isdigit() else None,
        users=tuple(_lines(part, "users")),
        leftover=part.get("leftover") == "yes",
        power=_power(part),
    )


def _lines(part: Mapping[str, str], name: str) -> list[str]:
    return [line.strip() for line in part.get(name, "").splitlines() if line.strip()]


def _tegra_capability(part: Mapping[str, str]) -> str | None:
    """Orin's compute capability, which no tool there prints without CUDA's samples."""
    return "8.7" if "Orin" in part.get("model", "") else None


def parse_power(text: str) -> PowerState:
    """The power state of a section list."""
    return _power(sections(text))


def _power(part: Mapping[str, str]) -> PowerState:
    said = part.get("power", "")
    mode = re.search(r"NV Power Mode\s*:\s*(\S+)", said)
    numbers = [line for line in said.splitlines() if line.strip().isdigit()]
    load = part.get("load", "").split()
    return PowerState(
        mode=mode_name(mode[1]) if mode else None,
        mode_id=numbers[-1].strip() if numbers else None,
        clocks=_clocks(part),
        hottest_c=_hottest(part),
        overcurrent_events=sum(int(line.split()[0]) for line in _lines(part, "events") if line.split()[0].isdigit()),
        throttling=_throttles(part),
        load=float(load[0]) if load else None,
        clock_s=int(part["time"]) if part.get("time", "").isdigit() else None,
    )


def mode_name(text: str) -> str:
    """A power mode's name as profiles write it: nvpmodel of some boards says MODE_30W for 30W."""
    return text.removeprefix("MODE_")


def _clocks(part: Mapping[str, str]) -> dict[str, Clock]:
    found = {
        name.lower(): Clock(low_mhz=int(low) / 1e6, high_mhz=int(high) / 1e6, now_mhz=int(now) / 1e6)
        for name, low, high, now in _CLOCK.findall(part.get("clocks", ""))
    }
    plain = re.search(r"cur=(\d+) min=(\d+) max=(\d+)", part.get("gpu", ""))
    if "gpu" not in found and plain:  # readable without sudo
        now, low, high = (int(value) / 1e6 for value in plain.groups())
        found["gpu"] = Clock(low_mhz=low, high_mhz=high, now_mhz=now)
    return found


def _hottest(part: Mapping[str, str]) -> float | None:
    degrees = [int(line.split()[0]) / 1000 for line in _lines(part, "thermal") if re.match(r"-?\d+\b", line)]
    for line in _lines(part, "nvidia-smi"):
        items = line.split(",")
        if len(items) > 5 and items[5].strip().isdigit():
            degrees.append(float(items[5]))
    real = [value for value in degrees if value > -100]  # -256 says that a sensor's rail is off
    return max(real, default=None)


def _throttles(part: Mapping[str, str]) -> bool:
    """nvidia-smi's bit mask; bit 0 is an idle GPU, bit 1 clocks that an application set."""
    for line in _lines(part, "nvidia-smi"):
        last = line.rsplit(",", 1)[-1].strip()
        if re.fullmatch(r"0x[0-9a-fA-F]+", last) and int(last, 16) & ~0b11:
            return True
    return False


def parse_samples(text: str, *, warmup_s: float = 0.0) -> Samples:
    """Lines of tegrastats, or of nvidia-smi with `clocks.sm,temperature.gpu,power.draw,utilization.gpu`.

    Args:
        text: the lines, one every `SAMPLE_S`.
        warmup_s: how long the GPU is busy before anything counts, for the power.
    """
    clocks: list[float] = []
    hot: list[float] = []
    power: list[float] = []
    n = 0
    for line in text.splitlines():
        if "GR3D_FREQ" in line:
            n += 1
            gpu = _GR3D.search(line)
            busy = gpu is not None and int(gpu[1]) >= BUSY_PERCENT
            if gpu and gpu[2] and busy:
                clocks.append(float(gpu[2]))
            hot += [float(value) for value in _TEMPERATURE.findall(line) if float(value) > -100]
            rails = {name: float(value) for name, value in _POWER.findall(line)}
            power += [rails[name] for name in _BOARD_RAILS if name in rails and busy][:1]
        elif re.fullmatch(r"\s*\d+(?:\.\d+)?, \d+, [\d.]+, \d+\s*", line):
            n += 1
            clock, celsius, watts, busy_percent = (float(value) for value in line.split(","))
            if busy_percent >= BUSY_PERCENT:  # an idle GPU clocks down, as while an engine is loaded
                clocks.append(clock)
                power.append(1000 * watts)
            hot.append(celsius)
    timed = power[math.ceil(warmup_s / SAMPLE_S) :]  # an engine's load leaves the GPU idle, its warm-up does not
    return Samples(
        n=n,
        gpu_mhz=(min(clocks), max(clocks)) if clocks else None,
        hottest_c=max(hot, default=None),
        board_mw=sum(timed) / len(timed) if timed else None,
    )


def examine(
    facts: DeviceFacts, *, profile: Profile | None = None, mode: str | None = None, need_mib: int = NEED_MIB
) -> list[Finding]:
    """What matters to a latency, the gravest first.

    Args:
        facts: of the probe.
        profile: the target that the device should be; None to judge the device alone.
        mode: power mode that the latency is judged in; the profile's default when None.
        need_mib: disk space that the work takes.
    """
    found = [*_software(facts, profile), *_power_findings(facts, profile, mode), *_room(facts, need_mib)]
    order = {"refuse": 0, "warn": 1, "note": 2}
    return sorted(found, key=lambda finding: order[finding.level])


def _software(facts: DeviceFacts, profile: Profile | None) -> list[Finding]:
    if facts.trtexec is None:
        text = (
            "no trtexec; install the TensorRT samples of the device (libnvinfer-bin), or set TRTEXEC there to its path"
        )
        return [Finding(level="refuse", what="trtexec", text=text)]
    if facts.tensorrt is None:
        text = f"{facts.trtexec} does not say its TensorRT version; run it there by hand: a library may be missing"
        return [Finding(level="refuse", what="trtexec", text=text)]
    found = []
    if profile is not None:
        found += _version_fit(facts.tensorrt, profile)
        if facts.compute_capability not in (None, profile.compute_capability):
            text = (
                f"its compute capability is {facts.compute_capability}, that of {profile.name} is "
                f"{profile.compute_capability}: another device; name the right --target"
            )
            found.append(Finding(level="refuse", what="device", text=text))
    return found


def _version_fit(banner: Banner, profile: Profile) -> list[Finding]:
    have = tensorrt_version(banner.version)
    known = {tensorrt_version(release.tensorrt): release for release in profile.software}
    listed = ", ".join(f"{release.tensorrt} ({release.platform})" for release in profile.software)
    if have in known:
        return [Finding(level="note", what="tensorrt", text=f"{banner.version}, {known[have].platform}")]
    text = f"expected TensorRT {listed}; got {banner.version}"
    if have[0] in {major for major, _ in known}:
        return [Finding(level="warn", what="tensorrt", text=text + "; other kernels may be picked")]
    advice = f"; flags and typing differ: add this platform to a copy of the profile (`targets cp {profile.name} FILE`)"
    return [Finding(level="refuse", what="tensorrt", text=text + advice)]


def _power_findings(facts: DeviceFacts, profile: Profile | None, mode: str | None) -> list[Finding]:
    power, found = facts.power, []
    if profile is not None and power.mode is not None:
        wanted = mode or profile.default_mode
        if power.mode != wanted:
            number = facts.modes.get(wanted) or facts.modes.get(f"MODE_{wanted}")
            text = f"expected power mode {wanted}; got {power.mode}; " + (
                f"`sudo nvpmodel -m {number}` there, or --set-mode" if number else "set it with nvpmodel, or name it"
            )
            found.append(Finding(level="refuse", what="power mode", text=text))
    elif profile is not None and profile.family == "jetson":
        found.append(Finding(level="warn", what="power mode", text="nvpmodel does not tell the power mode"))
    for name in ("gpu", "emc"):
        clock = power.clocks.get(name)
        if clock is not None and not clock.locked:
            text = f"the {name.upper()} clock moves between {clock.low_mhz:g} and {clock.high_mhz:g} MHz"
            text += ": it is locked while measuring" if facts.sudo else "; `sudo jetson_clocks` locks it"
            found.append(Finding(level="note" if facts.sudo else "warn", what="clocks", text=text))
    if not facts.sudo and profile is not None and profile.family == "jetson":
        text = "sudo asks for a password: clocks cannot be locked nor power modes set from here"
        found.append(Finding(level="warn", what="sudo", text=text))
    if power.hottest_c is not None and power.hottest_c >= HOT_C:
        text = f"{power.hottest_c:.0f} C; expected less than {HOT_C:.0f}: let it cool down, or mend its fan"
        found.append(Finding(level="refuse", what="temperature", text=text))
    if power.throttling:
        text = "the GPU is throttled at this moment; see `nvidia-smi -q -d PERFORMANCE` there"
        found.append(Finding(level="refuse", what="throttling", text=text))
    if power.overcurrent_events:
        text = f"{power.overcurrent_events} over-current events since it started; is its supply strong enough?"
        found.append(Finding(level="warn", what="throttling", text=text))
    return found


def _room(facts: DeviceFacts, need_mib: int) -> list[Finding]:
    found = []
    if facts.free_disk_mib is not None and facts.free_disk_mib < need_mib:
        text = f"{facts.free_disk_mib} MiB of disk left; expected {need_mib}: free some space"
        found.append(Finding(level="refuse", what="disk", text=text))
    if facts.free_memory_mib is not None and facts.free_memory_mib < NEED_MEMORY_MIB:
        text = f"{facts.free_memory_mib} MiB of memory left: the builder may find only slow kernels, or none"
        found.append(Finding(level="warn", what="memory", text=text))
    if facts.users:
        names = ", ".join(sorted({user.split(maxsplit=1)[-1] for user in facts.users}))
        found.append(Finding(level="warn", what="GPU users", text=f"other processes have the GPU open: {names}"))
    if facts.leftover:
        text = "a measurement that was killed left the power state changed; it is put back first"
        found.append(Finding(level="note", what="power mode", text=text))
    return found


def refuse(findings: list[Finding], host: str) -> None:
    """Stop where measuring would mislead.

    Raises:
        DeviceError: one of the findings refuses.
    """
    grave = [finding for finding in findings if finding.level == "refuse"]
    if grave:
        lines = "\n  ".join(f"{finding.what}: {finding.text}" for finding in grave)
        where = "" if host == THIS_MACHINE else f" at `fusepress targets doctor {host}`"
        raise DeviceError(
            f"expected {host} to be fit for a measurement; got {len(grave)} reason(s) against it{where}; mend them:\n"
            f"  {lines}"
        )
