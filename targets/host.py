"""The machine we run on: what it is, and the peak that its CPU could reach."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusepress.targets.profile import Profile

CPUINFO = Path("/proc/cpuinfo")
CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq")
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
FALLBACK_MHZ = 2500.0
NVIDIA_SMI_S = 30.0
THIS_MACHINE = "this machine"  # in messages, where a device has its host name


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPeak:
    """Peak of this CPU in FP32, from its cores, clock and vector width: an upper bound, not a measurement.

    Attributes:
        cores: logical cores that this process may use, less what a container's quota forbids.
        mhz: highest clock that the system reports, else its present one, else an assumed one.
        fp32_ops_per_clock: operations a clock and core (a multiply-add counts two).
    """

    cores: int
    mhz: float
    fp32_ops_per_clock: int
    source: str

    @property
    def fp32_gflops(self) -> float:
        """Peak in 10^9 operations a second."""
        return self.cores * self.mhz * self.fp32_ops_per_clock * 1e-3


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and a container's CPU quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _text(CGROUP_QUOTA).split()
    if len(quota) == 2 and quota[0].isdigit() and int(quota[1]) > 0:
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def _clock_mhz(cpuinfo: str) -> tuple[float, str]:
    limit = _text(CPUFREQ / "cpuinfo_max_freq")
    if limit.isdigit():
        return int(limit) / 1e3, "cpufreq"
    found = re.search(r"^cpu MHz\s*:\s*([\d.]+)", cpuinfo, re.MULTILINE)
    if found and float(found[1]) > 0:
        return float(found[1]), "cpuinfo"
    return FALLBACK_MHZ, "assumed clock"


def _vector_ops(cpuinfo: str) -> tuple[int, str]:
    """FP32 operations a clock: two multiply-add units of the widest vectors that the CPU names."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    if "avx512f" in flags:
        return 64, "AVX-512"
    if {"avx2", "fma"} <= flags:
        return 32, "AVX2"
    if "asimd" in flags or platform.machine() in ("aarch64", "arm64"):
        return 16, "NEON"
    return 8, "SSE"


def host_profile_peak() -> HostPeak:
    """Cores, clock and vector width of this CPU."""
    cpuinfo = _text(CPUINFO)
    mhz, clock_source = _clock_mhz(cpuinfo)
    ops, vectors = _vector_ops(cpuinfo)
    return HostPeak(cores=usable_cores(), mhz=mhz, fp32_ops_per_clock=ops, source=f"{vectors}, {clock_source}")


def with_host(profile: Profile, peak: HostPeak) -> Profile:
    """The host's profile with its priors replaced by what this machine reports; bandwidth stays a prior."""
    name = profile.default_mode
    mode = profile.power_modes[name].model_copy(update={"sm_count": peak.cores, "gpu_mhz": peak.mhz})
    factor = peak.fp32_ops_per_clock / profile.ops_per_clock_per_sm["fp32"].value
    rates = {
        rate: figure.model_copy(update={"value": figure.value * factor})
        for rate, figure in profile.ops_per_clock_per_sm.items()
    }
    return profile.model_copy(update={"power_modes": {name: mode}, "ops_per_clock_per_sm": rates})


def gpu_name() -> str | None:
    """What nvidia-smi calls the first GPU of this machine, None where it names none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    names = done.stdout.strip().splitlines()
    return names[0].strip() if done.returncode == 0 and names else None


def host_description() -> dict[str, Any]:
    """What a measured latency depends on beside the model: CPU, cores, governor, load, threads. No host name."""
    cpuinfo = _text(CPUINFO)
    model = re.search(r"^(?:model name|Model)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    load = os.getloadavg() if hasattr(os, "getloadavg") else (0.0, 0.0, 0.0)
    threads = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ}
    return {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "cores": usable_cores(),
        "mhz": round(_clock_mhz(cpuinfo)[0], 1),
        "governor": _text(CPUFREQ / "scaling_governor") or "unknown",
        "load_average": [round(value, 2) for value in load],
        "threads": threads,
    }
