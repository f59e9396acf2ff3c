"""What changes on this machine while a latency is measured: clocks, heat, throttling, other work, memory, energy."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROC_STAT = Path("/proc/stat")
PROC_STATUS = Path("/proc/self/status")
CPUINFO = Path("/proc/cpuinfo")
THERMAL = Path("/sys/class/thermal")
THROTTLES = Path("/sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count")
ENERGY = Path("/sys/class/powercap/intel-rapl:0")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostState:
    """Counters at one moment; None where this machine does not tell.

    Attributes:
        seconds: monotonic.
        busy_s: CPU time of everything on the machine.
        own_s: CPU time of this process.
        mhz: mean clock of the cores.
        hottest_c: of all sensors.
        throttles: count since the machine started.
        energy_uj: of the CPU package, and at which value it begins anew.
    """

    seconds: float
    own_s: float
    busy_s: float | None = None
    mhz: float | None = None
    hottest_c: float | None = None
    throttles: int | None = None
    energy_uj: tuple[int, int] | None = None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def read_state() -> HostState:
    """The counters of this moment."""
    cpu = _read(PROC_STAT).splitlines()[:1]
    ticks = [int(value) for value in cpu[0].split()[1:]] if cpu else []
    clocks = [float(value) for value in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _read(CPUINFO), re.MULTILINE)]
    degrees = [_read(zone) for zone in THERMAL.glob("thermal_zone*/temp")]
    real = [int(value) / 1000 for value in degrees if re.fullmatch(r"\d+", value)]
    throttles, energy, span = _read(THROTTLES), _read(ENERGY / "energy_uj"), _read(ENERGY / "max_energy_range_uj")
    return HostState(
        seconds=time.monotonic(),
        own_s=sum(os.times()[:2]),
        # user, nice, system, irq, softirq, steal: all but idle and waiting
        busy_s=(sum(ticks[:3]) + sum(ticks[5:8])) / os.sysconf("SC_CLK_TCK") if len(ticks) >= 8 else None,
        mhz=sum(clocks) / len(clocks) if clocks else None,
        hottest_c=max(real, default=None),
        throttles=int(throttles) if throttles.isdigit() else None,
        energy_uj=(int(energy), int(span)) if energy.isdigit() and span.isdigit() else None,
    )


def state_change(before: HostState, after: HostState, *, runs: int = 0) -> dict[str, Any]:
    """What happened between two moments, as plain JSON values; what this machine does not tell is left out.

    Args:
        before: at the first moment.
        after: at the second.
        runs: inferences between them, for the energy of one: of the whole CPU package, so with all other work on it;
            0 to leave it out.
    """
    found: dict[str, Any] = {}
    seconds = after.seconds - before.seconds
    if before.busy_s is not None and after.busy_s is not None and seconds > 0:
        others = (after.busy_s - before.busy_s - (after.own_s - before.own_s)) / seconds
        found["cores_busy_with_others"] = round(max(others, 0.0), 2)
    if after.mhz is not None and before.mhz is not None:
        found["mhz_before_after"] = [round(before.mhz, 1), round(after.mhz, 1)]
    if after.hottest_c is not None:
        found["hottest_c"] = after.hottest_c
    if after.throttles is not None and before.throttles is not None:
        found["throttle_events"] = after.throttles - before.throttles
    if runs and before.energy_uj is not None and after.energy_uj is not None:
        used = (after.energy_uj[0] - before.energy_uj[0]) % (after.energy_uj[1] + 1)
        found["package_energy_mj"] = round(used * 1e-3 / runs, 3)
    memory = re.search(r"^VmHWM:\s+(\d+) kB", _read(PROC_STATUS), re.MULTILINE)
    if memory:
        found["peak_memory_mib"] = round(int(memory[1]) / 1024, 1)
    return found
