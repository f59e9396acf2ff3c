"""What is read of a device's state, in formats that users published, and what of it makes a latency worthless."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fusepress.pipeline.errors import DeviceError
from fusepress.targets.doctor import (
    Clock,
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
from fusepress.targets.profile import load_profile
from fusepress.targets.trtexec import Banner

ORIN = load_profile("jetson-agx-orin-64gb")

# jetson_clocks --show of an Orin Nano at 25 W, JetPack 6
CLOCKS = """SOC family:tegra234  Machine:NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super
Online CPUs: 0-5
cpu0:  Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1344000 CurrentFreq=729600 IdleStates: WFI=1 c7=1
GPU MinFreq=306000000 MaxFreq=918000000 CurrentFreq=306000000
Active GPU TPCs: 4
EMC MinFreq=204000000 MaxFreq=3199000000 CurrentFreq=2133000000 FreqOverride=0
FAN Dynamic Speed Control=nvfancontrol hwmon0_pwm1=69
NV Power Mode: 25W"""
# nvpmodel -q of older and newer releases
NVPMODEL = [
    ("NV Power Mode: 25W\n1\n", "25W", "1"),
    ("NVPM WARN: fan mode is not set!\nNV Power Mode: MODE_15W_6CORE\n2\n", "15W_6CORE", "2"),
    ("NV Fan Mode:quiet\nNV Power Mode: MAXN_SUPER\n2\n", "MAXN_SUPER", "2"),
    ("", None, None),
]
# tegrastats of JetPack 5.1.2 (Xavier NX), and of 6.2 (Orin Nano, AGX Orin)
XAVIER = (
    "07-09-2024 13:31:31 RAM 3168/6851MB (lfb 2x4MB) SWAP 161/3426MB (cached 0MB) CPU [23%@1397,17%@1192] EMC_FREQ "
    "2%@204 GR3D_FREQ 0%@[114] VIC_FREQ 115 APE 150 AUX@45C CPU@46.5C PMIC@50C VDD_IN 2763mW/2846mW"
)
NANO = (
    "10-08-2026 04:35:02 RAM 6712/7620MB (lfb 12x4MB) CPU [38%@1497,2%@729] EMC_FREQ 61%@2133 GR3D_FREQ 99%@[612] "
    "APE 200 cpu@57.125C gpu@58.5C tj@58.75C VDD_IN 12251mW/8535mW VDD_CPU_GPU_CV 512mW/1944mW"
)
AGX = (
    "05-09-2026 18:42:06 RAM 18207/62841MB (lfb 466x4MB) CPU [14%@2188] EMC_FREQ 3%@2133 GR3D_FREQ 97%@[1300,1290] "
    "cpu@52.562C CV0@-256C tj@52.562C VDD_GPU_SOC 2412mW/2412mW VDD_CPU_CV 1607mW/1607mW VIN_SYS_5V0 4707mW/4707mW"
)


def fit() -> DeviceFacts:
    locked = Clock(low_mhz=1300.5, high_mhz=1300.5, now_mhz=1300.5)
    return DeviceFacts(
        trtexec="/usr/src/tensorrt/bin/trtexec",
        tensorrt=Banner(version="10.3.0"),
        compute_capability="8.7",
        modes={"MAXN": "0", "MODE_30W": "2"},
        sudo=True,
        free_memory_mib=30_000,
        free_disk_mib=30_000,
        power=PowerState(mode="MAXN", clocks={"gpu": locked, "emc": locked}, hottest_c=50.0),
    )


def told(found: list[Finding], level: str) -> list[str]:
    return [f"{f.what}: {f.text}" for f in found if f.level == level]


def test_clocks_are_read_with_whether_they_can_move() -> None:
    found = parse_power(f"== clocks\n{CLOCKS}\n== time\n1\n")
    assert found.clocks["gpu"] == Clock(low_mhz=306, high_mhz=918, now_mhz=306)
    assert found.clocks["emc"].now_mhz == 2133
    assert not found.clocks["emc"].locked
    without_sudo = parse_power("== clocks\n\n== gpu\ncur=510000000 min=306000000 max=918000000\n== time\n1\n")
    assert without_sudo.clocks["gpu"].now_mhz == 510


@pytest.mark.parametrize(("said", "mode", "number"), NVPMODEL)
def test_power_modes_are_read_as_profiles_name_them(said: str, mode: str | None, number: str | None) -> None:
    found = parse_power(f"== power\n{said}\n== time\n1\n")
    assert (found.mode, found.mode_id) == (mode, number)
    assert mode_name("MODE_30W") == "30W"


def test_heat_and_throttling() -> None:
    found = parse_power(
        "== thermal\n49468 cpu-thermal\n-256000 cv0-thermal\n71000 tj-thermal\n\n== events\n3 oc1_event_cnt\n"
    )
    assert (found.hottest_c, found.overcurrent_events) == (71.0, 3)
    line = "== nvidia-smi\nNVIDIA RTX A4000, 8.6, 550.1, 1560, 2100, 83, {}\n"
    assert not parse_power(line.format("0x0000000000000001")).throttling  # idle
    assert not parse_power(line.format("0x0000000000000002")).throttling  # clocks that somebody set
    assert parse_power(line.format("0x0000000000000004")).throttling  # its power limit
    assert parse_power(line.format("0x1")).hottest_c == 83


def test_samples_of_three_boards() -> None:
    idle = parse_samples(XAVIER + "\n")
    assert (idle.n, idle.gpu_mhz, idle.hottest_c, idle.board_mw) == (1, None, 50.0, None)
    nano = parse_samples(NANO + "\n" + NANO.replace("612", "306") + "\n" + "half a li")
    assert (nano.n, nano.gpu_mhz, nano.hottest_c, nano.board_mw) == (2, (306.0, 612.0), 58.75, 12251.0)
    assert nano.clock_dropped
    agx = parse_samples(AGX)
    assert (agx.gpu_mhz, agx.board_mw) == ((1300.0, 1300.0), None)  # its rails are parts of the board
    assert not agx.clock_dropped
    desktop = parse_samples("210, 50, 71, 0\n1560, 61, 70.25, 99\n1545, 62, 71.75, 98\n")  # the engine is loaded first
    assert (desktop.n, desktop.gpu_mhz, desktop.board_mw) == (3, (1545.0, 1560.0), 71_000.0)
    assert not desktop.clock_dropped
    load, warm, timed = "210, 50, 30, 0\n", "1560, 61, 60, 99\n", "1560, 61, 90.5, 99\n"
    told = parse_samples(load * 3 + warm * 4 + timed * 2 + load, warmup_s=2.0)
    assert (told.n, told.board_mw) == (10, 90_500.0)  # neither the load nor two seconds of warm-up
    assert parse_samples(load * 3 + warm * 4, warmup_s=2.0).board_mw is None
    assert parse_samples("") == parse_samples("tegrastats: not found")


def test_a_device_that_is_fit_is_not_refused() -> None:
    found = examine(fit(), profile=ORIN)
    assert told(found, "refuse") == told(found, "warn") == []
    assert told(found, "note") == ["tensorrt: 10.3.0, JetPack 6.2"]
    refuse(found, "orin")


@pytest.mark.parametrize(
    ("change", "level", "text"),
    [
        ({"trtexec": None}, "refuse", "trtexec: no trtexec"),
        ({"tensorrt": None}, "refuse", "does not say its TensorRT version"),
        ({"tensorrt": Banner(version="9.2.0")}, "refuse", "expected TensorRT 10.3 (JetPack 6.2)"),
        ({"tensorrt": Banner(version="10.7.0")}, "warn", "got 10.7.0; other kernels may be picked"),
        ({"compute_capability": "7.2"}, "refuse", "its compute capability is 7.2, that of jetson-agx-orin-64gb is 8.7"),
        ({"free_disk_mib": 100}, "refuse", "disk: 100 MiB of disk left; expected 1024"),
        ({"free_memory_mib": 100}, "warn", "memory: 100 MiB of memory left"),
        (
            {"users": ("12 Xorg", "99 python3", "100 python3")},
            "warn",
            "other processes have the GPU open: Xorg, python3",
        ),
        ({"sudo": False}, "warn", "sudo: sudo asks for a password"),
        ({"leftover": True}, "note", "a measurement that was killed left the power state changed"),
    ],
)
def test_what_is_amiss_is_told(change: dict[str, object], level: str, text: str) -> None:
    found = examine(replace(fit(), **change), profile=ORIN)  # type: ignore[arg-type]  # the table mixes types
    assert any(text in line for line in told(found, level)), found


@pytest.mark.parametrize(
    ("change", "level", "text"),
    [
        ({"mode": "30W"}, "refuse", "expected power mode MAXN; got 30W; `sudo nvpmodel -m 0` there, or --set-mode"),
        ({"mode": None}, "warn", "nvpmodel does not tell the power mode"),
        ({"hottest_c": 91.0}, "refuse", "temperature: 91 C; expected less than 85"),
        ({"throttling": True}, "refuse", "throttling: the GPU is throttled"),
        ({"overcurrent_events": 2}, "warn", "throttling: 2 over-current events"),
        ({"clocks": {"gpu": Clock(low_mhz=306, high_mhz=918, now_mhz=306)}}, "note", "it is locked while measuring"),
    ],
)
def test_a_power_state_that_is_amiss_is_told(change: dict[str, object], level: str, text: str) -> None:
    power = replace(fit().power, **change)  # type: ignore[arg-type]  # the table mixes types
    found = examine(replace(fit(), power=power), profile=ORIN)
    assert any(text in line for line in told(found, level)), found


def test_refusing_names_every_reason_and_the_gravest_come_first() -> None:
    facts = replace(fit(), free_disk_mib=1, free_memory_mib=1, power=replace(fit().power, mode="30W"))
    found = examine(facts, profile=ORIN, mode="50W")
    assert [f.level for f in found] == sorted((f.level for f in found), key=["refuse", "warn", "note"].index)
    with pytest.raises(DeviceError, match=r"got 2 reason\(s\) against it.*\n  power mode: .*50W.*\n  disk: 1 MiB"):
        refuse(found, "orin")


def test_a_probe_that_was_cut_short_is_no_probe() -> None:
    with pytest.raises(DeviceError, match=r"expected a whole probe; got one that was cut short"):
        parse_probe("== system\nLinux aarch64\n== model\nNVIDIA Jetson")
    whole = parse_probe("== system\nLinux aarch64\n== packages\ntensorrt 10.3.0.30-1+cuda12.5\n== time\n1\n")
    assert (whole.system, whole.trtexec, whole.free_disk_mib, whole.users) == ("Linux aarch64", None, None, ())
