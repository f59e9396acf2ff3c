"""Measuring over a real OpenSSH server on loopback, on a double of a device (`device_double`) that speaks trtexec's
formats: phases, dropped connections, refusals, and a power state that is always put back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fusepress.export.inspector import parse_inspection, parse_profile
from fusepress.pipeline.errors import BuildError, DeviceError, MeasureError, UsageError
from fusepress.pipeline.store import sha256_file
from fusepress.targets import remote, ssh
from fusepress.targets.profile import load_profile
from fusepress.targets.remote import measure_remote, probe_device
from fusepress.targets.remote_result import EngineOrder, RemoteResult, RemoteSettings
from fusepress.targets.ssh import SshDevice, check_host
from tests import trtexec_formats as formats
from tests.device_double import BOARD_MW, SSHD, DeviceDouble, Server, connect

ORIN = load_profile("jetson-agx-orin-64gb")
QUICK = RemoteSettings(seconds=1.0, rounds=1)
PHASES = ("build", "time", "profile", "outputs")

pytestmark = pytest.mark.skipif(SSHD is None, reason="needs OpenSSH's server: apt-get install openssh-server")


@pytest.fixture
def order(tmp_path: Path) -> EngineOrder:
    path = tmp_path / 'o\'model; $(touch harm) `id` "x".onnx'
    path.write_bytes(bytes(range(256)) * 40)
    return EngineOrder(name="mo'del; $(touch harm)", onnx=path, precision="int8")


@pytest.fixture
def references(tmp_path: Path) -> Path:
    """One sample with one input and one output, as a build kit has it."""
    folder = tmp_path / "kit"
    (folder / "references").mkdir(parents=True)
    np.arange(6, dtype=np.float32).tofile(folder / "references" / "in.bin")
    np.array([1.0, -4.0, 2.0], dtype=np.float32).tofile(folder / "references" / "out.bin")
    np.arange(3, dtype=np.int64).tofile(folder / "references" / "index.bin")
    entry = {
        "inputs": [
            {"name": "x; $(touch harm)", "shape": [1, 6], "type": "float32", "file": "references/in.bin"},
            {"name": "index", "shape": [1, 3], "type": "int64", "file": "references/index.bin"},
        ],
        "outputs": [{"name": "score", "shape": [1, 3], "type": "float32", "file": "references/out.bin"}],
    }
    (folder / "references.json").write_text(json.dumps([entry]))
    return folder


def harmed(tmp_path: Path) -> list[Path]:
    return [*tmp_path.rglob("harm")] + [p for p in (Path("harm"), Path.home() / "harm") if p.exists()]


def clean(double: DeviceDouble, state: tuple[str, str] = ("0", "free")) -> bool:
    """Nobody holds the device, and its power state is as it was."""
    return double.state == state and not (double.store / "lock").exists() and not (double.store / "power").exists()


@pytest.mark.parametrize("version", formats.BANNERS)
def test_a_model_is_built_timed_profiled_and_compared_in_the_formats_of_each_version(
    version: str, tmp_path: Path, server: Server, double: DeviceDouble, order: EngineOrder, references: Path
) -> None:
    double = DeviceDouble(tmp_path / "one of that version", version)
    server.use(double)
    double.write("outputs.json", formats.outputs({"score": [1.0, -3.0, 2.0]}))
    profile = ORIN if version == "10.3" else None
    with connect(server) as device:
        found = measure_remote(device, [order], references=references, profile=profile, settings=QUICK)
    engine = found.engines[order.name]
    assert found.tensorrt == {"8.5": "8.5.2", "10.3": "10.3.0", "11.1": "11.1.0"}[version]
    assert engine.latency.n == 400
    assert engine.latency.mean_ms == pytest.approx(2.0, abs=0.01)
    assert not engine.unstable
    assert engine.energy_mj == pytest.approx(BOARD_MW * 2e-3, rel=0.01)  # for 2 ms
    assert [(d.output, d.relative) for d in found.differences] == [("score", 0.25)]  # 1 of a scale of 4
    assert [layer.name for layer in parse_inspection(engine.layers).layers] == ["camera/stem/Conv", "head/Conv"]
    assert parse_profile(engine.profile) == {'camera/"stem"/Conv': 0.5, "head/Conv": 0.25}
    assert double.calls("--fp16 --int8") == (version == "8.5")
    assert double.calls("--stronglyTyped") == (version == "10.3")
    # before TensorRT 10, int64 is bound as int32
    index = np.arange(3, dtype=np.int32 if version == "8.5" else np.int64).tobytes()
    assert (double.store / "models" / f"{hashlib.sha256(index).hexdigest()}.bin").exists()
    assert found.clocks_locked
    assert found.during.clocks["gpu"].locked
    assert found.during.clocks["emc"].locked
    assert found.restored
    assert clean(double)
    assert not list((double.store / "runs").iterdir())
    assert not harmed(tmp_path)
    json.dumps(found.to_dict())


def test_engines_take_turns_and_stay_on_the_device_for_the_next_time(
    tmp_path: Path, server: Server, double: DeviceDouble, order: EngineOrder
) -> None:
    dense = EngineOrder(name="dense", onnx=tmp_path / "dense.onnx", precision="fp16")
    dense.onnx.write_bytes(b"dense")
    random = np.random.default_rng(1)
    double.times(sha256_file(dense.onnx)[:16], random.normal(4.0, 0.02, 400))
    settings = RemoteSettings(seconds=2.0, rounds=2)
    with connect(server) as device:
        found = measure_remote(device, [order, dense], profile=ORIN, settings=settings)
        assert not any(engine.reused for engine in found.engines.values())
        again = measure_remote(device, [order], profile=ORIN, settings=QUICK)
    assert found.speedups["dense"].value == pytest.approx(2.0, rel=0.01)
    assert found.speedups["dense"].differs
    assert found.engines["dense"].latency.n == 800
    timed = [line.split("=")[-1] for line in double.read("calls").splitlines() if "--noDataTransfers" in line]
    assert timed[:4] == [f"time-0-{index}-{turn}.times.json" for index, turn in ((0, 0), (1, 0), (1, 1), (0, 1))]
    assert again.engines[order.name].reused
    assert double.calls("--onnx=") == 2


def test_connections_that_are_killed_in_every_phase_cost_nothing_but_time(
    server: Server,
    double: DeviceDouble,
    order: EngineOrder,
    references: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ssh, "CHUNK_BYTES", 4096)
    double.write("outputs.json", formats.outputs({"score": [1.0, -4.0, 2.0]}))
    for phase in PHASES:
        double.write(f"slow-{phase}", "1\n")
    dropped: list[str] = []

    def cable() -> None:
        deadline = time.monotonic() + 500
        while len(dropped) < len(PHASES) and time.monotonic() < deadline:
            for phase in PHASES:
                if phase not in dropped and (double.folder / f"in-{phase}").exists():
                    assert server.drop() > 0
                    dropped.append(phase)
            time.sleep(0.05)

    def say(_fraction: float, word: str) -> None:
        if word.startswith("shipping mo") and "shipping" not in shipping:
            shipping.append("shipping")
            server.drop()

    shipping: list[str] = []
    thread = threading.Thread(target=cable)
    thread.start()
    with connect(server) as device:
        found = measure_remote(device, [order], references=references, profile=ORIN, settings=QUICK, say=say)
    thread.join()
    assert sorted(dropped) == sorted(PHASES)
    assert shipping
    assert found.drops >= 1  # of those that a call was under way in; the others' next call connects by itself
    assert found.engines[order.name].latency.n == 400
    assert found.differences[0].relative == 0.0
    assert double.calls("--onnx=") == 1  # what ran went on
    assert clean(double)


def test_a_device_that_is_gone_for_good_ends_its_job_alone_and_the_same_command_resumes(
    server: Server, double: DeviceDouble, order: EngineOrder
) -> None:
    double.write("slow-build", "2\n")

    def gone() -> None:
        wait_for(lambda: (double.folder / "in-build").exists())
        server.stop()

    thread = threading.Thread(target=gone)
    thread.start()
    message = r"expected to reach double within 0.5 s; got no connection .* run the same command again: finished phases"
    with pytest.raises(DeviceError, match=message), connect(server, reconnect_s=0.5) as device:
        measure_remote(device, [order], profile=ORIN, settings=QUICK)
    thread.join()
    assert (double.store / "lock").exists()
    wait_for(lambda: bool(list(double.store.glob("engines/*/build/rc"))))
    assert double.state == ("0", "free")  # the trap of the job, with nobody connected
    server.start()
    with connect(server) as device:
        found = measure_remote(device, [order], profile=ORIN, settings=QUICK)
    assert found.engines[order.name].reused
    assert double.calls("--onnx=") == 1
    assert clean(double)


def test_rounds_of_different_hours_are_timed_anew_for_they_did_not_meet_the_same_state(
    server: Server, double: DeviceDouble, order: EngineOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RemoteSettings(seconds=2.0, rounds=2)

    def dies(_fraction: float, word: str) -> None:
        if "round 2 of 2" in word:
            raise DeviceError("gone") from ssh.ConnectionLost()

    for hours, timed in ((0, 1), (2, 3)):
        with connect(server) as device:
            with pytest.raises(DeviceError, match="gone"):
                measure_remote(device, [order], profile=ORIN, settings=settings, say=dies)
            for state in ("before", "after"):
                (path,) = double.store.glob(f"runs/*/time-0-0-0/{state}")
                head, mark, clock = path.read_text().rpartition("== time\n")
                path.write_text(f"{head}{mark}{int(clock) - 3600 * hours}\n")
            found = measure_remote(device, [order], profile=ORIN, settings=settings)
        assert found.engines[order.name].latency.n == 800
        assert double.calls("time-0-0-0.times") == timed  # again only where hours lie between
    assert double.calls("time-0-0-1.times") == 3
    monkeypatch.setattr(remote, "APART_S", -1)
    with connect(server) as device:
        message = r"expected rounds that follow one another on double; got a pause of \d+ s between two of them, twice"
        with pytest.raises(MeasureError, match=message):
            measure_remote(device, [order], profile=ORIN, settings=settings)
    assert clean(double)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_giving_up_ends_the_work_and_leaves_the_device(
    server: Server, double: DeviceDouble, order: EngineOrder
) -> None:
    double.write("slow-build", "600\n")

    def say(_fraction: float, _word: str) -> None:
        if (double.folder / "in-build").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), connect(server) as device:
        measure_remote(device, [order], profile=ORIN, settings=QUICK, say=say)
    assert next(double.store.glob("engines/*/build/rc")).read_text() == "143\n"
    assert clean(double)


def test_what_was_given_up_or_failed_while_timing_is_timed_anew(
    server: Server, double: DeviceDouble, order: EngineOrder
) -> None:
    double.write("slow-time", "600\n")

    def say(_fraction: float, _word: str) -> None:
        if (double.folder / "in-time").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), connect(server) as device:
        measure_remote(device, [order], profile=ORIN, settings=QUICK, say=say)
    assert clean(double)
    (double.folder / "slow-time").unlink()
    times = double.read("times-any")
    double.write("times-any", "[")
    with connect(server) as device:
        with pytest.raises(MeasureError, match=r"expected the times of inferences; got no JSON at time-0-0-0"):
            measure_remote(device, [order], profile=ORIN, settings=QUICK)
        assert clean(double)
        double.write("times-any", times)
        assert measure_remote(device, [order], profile=ORIN, settings=QUICK).engines[order.name].reused
    assert clean(double)


def test_a_power_mode_that_does_not_come_leaves_nothing_that_says_it_did(
    server: Server, double: DeviceDouble, order: EngineOrder
) -> None:
    settings = RemoteSettings(seconds=1.0, rounds=1, set_mode=True, lock_clocks=False)
    double.write("mode", "2\n")
    double.write("stuck", "")
    with connect(server) as device:
        with pytest.raises(
            DeviceError, match=r"expected power mode MAXN on double while timing; got 30W; some changes"
        ):
            measure_remote(device, [order], profile=ORIN, settings=settings)
        assert clean(double, ("2", "free"))
        (double.folder / "stuck").unlink()
        found = measure_remote(device, [order], profile=ORIN, settings=settings)
    assert (found.during.mode, found.engines[order.name].reused) == ("MAXN", False)
    assert clean(double, ("2", "free"))


def test_a_power_mode_that_cannot_be_read_is_not_changed(server: Server, double: DeviceDouble) -> None:
    """For it could not be put back."""
    query = double.folder / "bin" / "nvpmodel"
    query.write_text(query.read_text().replace("-q)", "-q) exit 1 ;;\n-Q)"))
    double.write("mode", "2\n")
    with connect(server) as device:
        assert device.run_job("runs/a/job", ["true"], work="runs/a/out", limit_s=60, mode_id="0") == 0
    assert double.state == ("2", "free")
    assert "mode" not in double.read("power.log")


def test_a_host_that_never_answers_is_given_up(server: Server, double: DeviceDouble) -> None:
    double.program("sh", "#!/bin/sh\nexit 0\n")
    message = (
        r"expected an answer to 'probe' from double; got none over 5 connections \(the answer was cut short\); does"
    )
    with connect(server) as device, pytest.raises(DeviceError, match=message):
        probe_device(device)


def test_a_failing_build_says_why_and_is_tried_again(server: Server, double: DeviceDouble, order: EngineOrder) -> None:
    double.write("fail-build", formats.LOG_10_3_FAILED)
    with connect(server) as device:
        message = r"expected trtexec of TensorRT 10.3.0 to build .*; got exit code 1: .*Cask convolution isConsistent"
        with pytest.raises(BuildError, match=message):
            measure_remote(device, [order], profile=ORIN, settings=QUICK)
        assert clean(double)
        double.write(
            "fail-build", "[E] Saving engine to file failed.\n&&&& FAILED TensorRT.trtexec [TensorRT v100300]\n"
        )
        with pytest.raises(DeviceError, match=r"expected room for the engine of .*; got a full disk; free some space"):
            measure_remote(device, [order], profile=ORIN, settings=QUICK)
        assert clean(double)
        (double.folder / "fail-build").unlink()
        double.write("slow-build", "600\n")
        with pytest.raises(
            BuildError, match=r"expected trtexec to build .* within 1 s; got no engine by then on double"
        ):
            measure_remote(device, [order], profile=ORIN, settings=RemoteSettings(build_limit_s=1))
        assert clean(double)
        (double.folder / "slow-build").unlink()
        double.write("fail-time", "[11/21/2026-10:00:00] [E] out of memory\n")
        with pytest.raises(
            MeasureError, match=r"expected trtexec to run the engine on double; got exit code 1: out of"
        ):
            measure_remote(device, [order], profile=ORIN, settings=QUICK)
    assert clean(double)


def test_a_full_disk_keeps_what_was_copied(
    server: Server, double: DeviceDouble, order: EngineOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "CHUNK_BYTES", 4096)
    sent: list[float] = []

    def progress(fraction: float) -> None:
        sent.append(fraction)
        if len(sent) == 2:  # the device's own words, from a `cat` that has no file to read
            words = '#!/bin/sh\n[ $# -gt 0 ] && exec /bin/cat "$@"\necho "cat: No space left on device" >&2\nexit 1\n'
            double.program("cat", words)

    sha = sha256_file(order.onnx)
    with connect(server) as device:
        message = r"expected room for models/x on double; got cat: No space left on device.*what was copied is kept"
        with pytest.raises(DeviceError, match=message):
            device.upload(order.onnx, "models/x", sha, progress)
        (double.folder / "bin" / "cat").unlink()
        assert (double.store / "models" / "x.part").stat().st_size == 4096
        sent.clear()
        assert device.upload(order.onnx, "models/x", sha, sent.append)
        assert sent[0] == pytest.approx(0.4)
        assert not device.upload(order.onnx, "models/x", sha)
        device.call("seal", "models/x", sha)  # said again where the answer was lost
        with pytest.raises(ssh.CallFailed, match="the copy has the hash"):
            device.call("seal", "models/x", "0" * 64)
        # a rest of something else, longer or shorter than the file
        for rest in (b"else", bytes(20_000)):
            (double.store / "models" / "y.part").write_bytes(rest)
            assert device.upload(order.onnx, "models/y", sha)
            (double.store / "models" / "y").unlink()
    double.program(
        "df", '#!/bin/sh\necho "Filesystem 1024-blocks Used Available Capacity Mounted on"\necho "d 9 9 10240 99% /"\n'
    )
    with connect(server) as device, pytest.raises(DeviceError, match=r"disk: 10 MiB of disk left; expected 1024"):
        measure_remote(device, [order], profile=ORIN, settings=QUICK)
    assert clean(double)


def test_a_device_without_trtexec_or_with_another_tensorrt_is_refused(
    server: Server, double: DeviceDouble, order: EngineOrder
) -> None:
    with connect(server) as device:
        double.write("banner", "&&&& RUNNING TensorRT.trtexec [TensorRT v90200] # trtexec --help\n")
        message = (
            r"expected double to be fit .*\n  tensorrt: expected TensorRT 10.3 \(JetPack 6.2\).*; got 9.2.0; flags"
        )
        with pytest.raises(DeviceError, match=message):
            measure_remote(device, [order], profile=ORIN, settings=QUICK)
        double.write("banner", "trtexec: error while loading shared libraries: libnvinfer.so.10\n")
        with pytest.raises(DeviceError, match=r"trtexec: .* does not say its TensorRT version; run it there by hand"):
            measure_remote(device, [order], profile=ORIN, settings=QUICK)
        (double.folder / "bin" / "trtexec").unlink()
        with pytest.raises(DeviceError, match=r"trtexec: no trtexec; install the TensorRT samples"):
            measure_remote(device, [order], profile=ORIN, settings=QUICK)
    assert clean(double)
    assert not (double.store / "models").exists()  # nothing was shipped


def test_unstable_clocks_are_told_after_a_second_try(server: Server, double: DeviceDouble, order: EngineOrder) -> None:
    random = np.random.default_rng(2)
    double.times("any", np.abs(random.normal(2.0, 0.8, 400)) + 0.1, unstable=True)
    lines = [f"GR3D_FREQ 99%@[{mhz},{mhz}] tj@50C VDD_IN 9000mW/9000mW" for mhz in (1300, 612)]
    double.write("tegrastats.txt", "\n".join(lines) + "\n")
    with connect(server) as device:
        found = measure_remote(device, [order], profile=ORIN, settings=QUICK).engines[order.name]
    assert any(why.startswith("coefficient of variation") for why in found.unstable)
    assert "the busy GPU's clock moved between 612 and 1300 MHz" in found.unstable
    assert found.warnings[0].startswith("GPU compute time is unstable")
    assert double.calls("time-0-0-0") == double.calls("time-1-0-0") == 1
    assert clean(double)


def test_a_power_mode_is_refused_unless_it_may_be_set_and_then_it_is_put_back(
    server: Server, double: DeviceDouble, order: EngineOrder
) -> None:
    double.write("mode", "2\n")
    with connect(server) as device:
        message = r"power mode: expected power mode MAXN; got 30W; `sudo nvpmodel -m 0` there, or --set-mode"
        with pytest.raises(DeviceError, match=message):
            measure_remote(device, [order], profile=ORIN, settings=QUICK)
        settings = RemoteSettings(seconds=1.0, rounds=1, set_mode=True, lock_clocks=False)
        found = measure_remote(device, [order], profile=ORIN, settings=settings)
        assert found.during.mode == "MAXN"
        assert not found.clocks_locked
        assert clean(double, ("2", "free"))
        with pytest.raises(DeviceError, match=r"expected a power mode of double, one of MAXN, .*; got 'x; \$\(id\)'"):
            measure_remote(device, [order], mode="x; $(id)", settings=settings)
    assert clean(double, ("2", "free"))


def test_without_sudo_clocks_stay_as_they_are_and_the_result_says_so(
    server: Server, double: DeviceDouble, order: EngineOrder
) -> None:
    double.program("id", "#!/bin/sh\necho 1000\n")
    double.program("sudo", "#!/bin/sh\nexit 1\n")
    with connect(server) as device:
        found: RemoteResult = measure_remote(device, [order], profile=ORIN, settings=QUICK)
        with pytest.raises(DeviceError, match=r"expected sudo without a password on double, to set the power mode"):
            measure_remote(device, [order], profile=ORIN, settings=RemoteSettings(set_mode=True))
    assert not found.clocks_locked
    assert any(f.level == "warn" and f.what == "sudo" for f in found.findings)
    assert double.read("power.log") == ""


def test_a_state_that_cannot_be_put_back_is_told_and_kept_for_the_next_try(
    server: Server, double: DeviceDouble
) -> None:
    with connect(server) as device:
        (double.store / "power").mkdir()  # as a job leaves it that was killed with its watchdog
        (double.store / "power" / "mode").write_text("3\n")
        (double.store / "power" / "armed").touch()
        assert probe_device(device).leftover
        double.write("stuck", "")
        with pytest.raises(DeviceError, match=r"the power state could not be put back: run sudo nvpmodel -m 3"):
            device.call("restore")
        (double.folder / "stuck").unlink()
        device.call("restore")
        assert clean(double, ("3", "free"))


@pytest.mark.parametrize("both", [False, True], ids=["the job", "the job and its watchdog"])
def test_a_killed_job_is_cleaned_up_after(both: bool, server: Server, double: DeviceDouble) -> None:
    command = [str(double.folder / "bin" / "trtexec"), "--onnx=none", "--saveEngine=plan"]
    double.write("slow-build", "600\n")
    with connect(server) as device:
        arguments = ["runs/r/j", "1", "900", "1", "-", "runs/r/out", *command]
        assert device.call("start", *arguments).strip() == "running"
        wait_for(lambda: (double.folder / "in-build").exists())
        assert double.state == ("0", "locked")
        job = int((double.store / "runs/r/j/pid").read_text())
        pids = [job, *_children(job)] if both else [job]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        if both:
            assert double.state == ("0", "locked")
            device.call("restore")
        else:
            assert device.call("wait_for", "runs/r/j", "20").strip() == "done 137"
    assert clean(double)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_one_user_at_a_time_but_a_stale_lock_is_taken_over(
    server: Server, double: DeviceDouble, order: EngineOrder
) -> None:
    lock = double.store / "lock"
    with connect(server) as device:
        device.call("lock", "someone", "90", "alice; $(touch harm) on ci")
        message = (
            r"expected double to be free; got alice; \$\(touch harm\) on ci, last heard of \d+ s ago at work there"
        )
        with pytest.raises(DeviceError, match=message):
            measure_remote(device, [order], profile=ORIN, settings=QUICK)
        device.call("unlock", "nobody")  # not theirs
        assert lock.exists()
        device.call("lock", "someone", "90", "alice again")  # a killed client's successor
        (lock / "beat").write_text(str(int(time.time()) - 1000))
        device.call("lock", "another", "90", "bob")
        assert (lock / "owner").read_text() == "bob\n"
        device.call("unlock", "another")
    assert clean(double)


def test_another_host_key_or_none_or_no_login_ends_with_what_to_do(
    tmp_path: Path, server: Server, double: DeviceDouble
) -> None:
    try:
        server.know_host(server.folder / "user.pub")
        with pytest.raises(DeviceError, match=r"expected the host key that is known; got another one; .*ssh-keygen -R"):
            connect(server).__enter__()
        (server.folder / "known").write_text("")
        with pytest.raises(DeviceError, match=r"expected a known host key; got an unknown one; connect once by hand"):
            connect(server).__enter__()
    finally:
        server.know_host()
    text = server.config.read_text()
    (tmp_path / "other").write_text(text.replace(f"IdentityFile {server.folder}/user", "IdentityFile /dev/null"))
    with pytest.raises(DeviceError, match=r"expected to log in without a password; got refused; .*ssh-copy-id double"):
        SshDevice("double", config=tmp_path / "other").__enter__()
    (tmp_path / "other").write_text(text.replace(f"Port {server.port}", "Port 1"))
    with pytest.raises(DeviceError, match=r"expected to reach double; got no connection \(.*refused\); is it on"):
        SshDevice("double", config=tmp_path / "other").__enter__()
    assert not double.store.exists()


def test_a_configuration_made_for_terminals_breaks_nothing(
    tmp_path: Path, server: Server, double: DeviceDouble, order: EngineOrder
) -> None:
    """Another command, forwardings of a port that is taken, a shared connection that stays, no input, no words."""
    hostile = f"""
      IgnoreUnknown SessionType,ForkAfterAuthentication,StdinNull,NoSuchOption
      NoSuchOption yes
      RemoteCommand echo another command
      RequestTTY force
      LocalForward 127.0.0.1:{server.port} 127.0.0.1:1
      RemoteForward 127.0.0.1:{server.port} 127.0.0.1:1
      DynamicForward 127.0.0.1:{server.port}
      ExitOnForwardFailure yes
      ControlMaster auto
      ControlPath {tmp_path}/shared
      ControlPersist yes
      PermitLocalCommand yes
      LocalCommand touch {tmp_path}/harm
      SessionType none
      ForkAfterAuthentication yes
      StdinNull yes
      Tunnel yes
      ForwardX11 yes
      VisualHostKey yes
      LogLevel QUIET
    """
    config = tmp_path / "config"
    config.write_text(server.config.read_text() + hostile)
    with connect(server, config) as device:
        private = device._private
        assert device.upload(order.onnx, "models/x", sha256_file(order.onnx))
        assert device.read("models/x")[0].encode(errors="replace")
        assert probe_device(device).model == "NVIDIA Jetson AGX Orin Developer Kit"
        assert server.drop() > 0
        assert probe_device(device).trtexec is not None
    assert (double.store / "models" / "x").read_bytes() == order.onnx.read_bytes()
    assert not harmed(tmp_path)
    assert not (tmp_path / "shared").exists()
    assert not _processes_naming(str(private))  # no connection stays behind
    config.write_text(config.read_text().replace(f"Port {server.port}", "Port 1"))
    with pytest.raises(DeviceError, match=r"got no connection \(.*refused\)"):  # told although QUIET
        connect(server, config).__enter__()


def _processes_naming(word: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = process.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found += [line] if word in line else []
    return found


@pytest.mark.parametrize("named", ["bin/my trtexec", "my-trtexec", "../bin/trtexec"])
def test_a_trtexec_that_is_named_relatively_is_found_from_everywhere(
    named: str, server: Server, double: DeviceDouble
) -> None:
    program = double.folder / "bin" / "trtexec"
    (double.home / "bin").mkdir()
    for path in (double.home / "bin" / "my trtexec", double.folder / "bin" / "my-trtexec"):
        path.write_bytes(program.read_bytes())
        path.chmod(0o755)
    server.use(double, TRTEXEC=named)
    with connect(server) as device:
        facts = probe_device(device)
        assert facts.trtexec is not None
        assert device.run_job("runs/a/job", [facts.trtexec, "--help"], work="runs/a/out", limit_s=60) == 0
    assert facts.tensorrt is not None
    assert facts.trtexec.startswith("/")
    assert facts.trtexec.endswith(named.rpartition("/")[2])


def test_a_trtexec_that_is_named_and_not_there_is_not_replaced_by_another(server: Server, double: DeviceDouble) -> None:
    server.use(double, TRTEXEC="/opt/other/trtexec")
    with connect(server) as device:
        assert probe_device(device).trtexec is None


@pytest.mark.parametrize(
    "host",
    ["-oProxyCommand=touch harm", "a b", "orin;id", "$(id)", "`id`", "o'rin", "a|b", "", "user@", "@host", "a\nb"],
)
def test_hosts_that_a_shell_or_ssh_could_misread_are_refused(host: str) -> None:
    with pytest.raises(UsageError, match=r"expected a host such as orin or user@10.0.0.5; got "):
        check_host(host)


@pytest.mark.parametrize("host", ["orin", "user@10.0.0.5", "ci_bench-1.lab", "fe80::1", "[::1]", "me@jetson.local"])
def test_hosts_are_taken_as_they_are(host: str) -> None:
    assert check_host(host) == host


def test_names_that_leave_the_folder_are_refused_by_the_device(server: Server, double: DeviceDouble) -> None:
    with connect(server) as device:
        for name in ("../x", "/etc/passwd", "a b", "a;b", "$(id)"):
            with pytest.raises(DeviceError, match="not a name of ours"):
                device.call("have", name)
        with pytest.raises(DeviceError, match="only runs and engines are removed"):
            device.call("tidy", "bin")
