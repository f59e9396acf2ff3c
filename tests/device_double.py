"""A double of a Jetson behind a real OpenSSH server on loopback: the server is OpenSSH's own, the device is a folder.

Its `trtexec` builds nothing: it is a shell script that answers with prepared files in the formats of a version
(`trtexec_formats`), and `nvpmodel`, `jetson_clocks` and `tegrastats` keep a state in files. It proves the branches of
our code and of `device.sh`, nothing about a device.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fusepress.targets.ssh import SshDevice
from tests import trtexec_formats as formats

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
MODES = {"MAXN": "0", "MODE_15W": "1", "MODE_30W": "2", "MODE_50W": "3"}

TRTEXEC = r"""#!/bin/sh
here=@HERE@
printf '%s\n' "$*" >>"$here/calls"
for each; do
  case $each in
  --help) cat "$here/banner"; exit 0 ;;
  --onnx=*) onnx=${each#*=} ;;
  --saveEngine=*) plan=${each#*=} ;;
  --loadEngine=*) load=${each#*=} ;;
  --exportTimes=*) times=${each#*=} ;;
  --exportLayerInfo=*) layers=${each#*=} ;;
  --exportProfile=*) profile=${each#*=} ;;
  --exportOutput=*) outputs=${each#*=} ;;
  --loadInputs=*) inputs=${each#*=} ;;
  esac
done
pause() { if [ -e "$here/slow-$1" ]; then : >"$here/in-$1"; sleep "$(cat "$here/slow-$1")"; fi; }
if [ -n "${onnx:-}" ]; then
  pause build
  if [ -e "$here/fail-build" ]; then cat "$here/fail-build"; exit 1; fi
  sha256sum <"$onnx" | cut -d ' ' -f 1 >"$plan" || exit 1
  cp "$here/layers.json" "$layers"
  cat "$here/log-build"
  exit 0
fi
[ -f "$load" ] || { echo "[E] cannot open the engine"; exit 1; }
which=$(cut -c 1-16 <"$load")
[ -e "$here/times-$which" ] || which=any
if [ -n "${times:-}" ]; then
  pause time
  # this one ends at once; a real one is long enough for its sampler
  patience=100
  until [ -s "../${times%.times.json}/samples" ] || [ "$patience" = 0 ]; do sleep 0.05; patience=$((patience - 1)); done
  if [ -e "$here/fail-time" ]; then cat "$here/fail-time"; exit 1; fi
  cp "$here/times-$which" "$times"
  cat "$here/log-$which"
fi
if [ -n "${profile:-}" ]; then pause profile; cp "$here/profile.json" "$profile"; cat "$here/log-any"; fi
if [ -n "${outputs:-}" ]; then
  pause outputs
  set -f
  IFS=,
  for item in $inputs; do [ -f "${item#*:}" ] || { echo "[11/21/2026-10:00:00] [E] no input"; exit 1; }; done
  cp "$here/outputs.json" "$outputs"
  cat "$here/log-any"
fi
"""
NVPMODEL = r"""#!/bin/sh
here=@HERE@
case $1 in
-q)
  name=$(sed -n "s/^< POWER_MODEL ID=$(cat "$here/mode") NAME=\(.*\) >/\1/p" "$here/root/etc/nvpmodel.conf")
  printf 'NV Power Mode: %s\n%s\n' "$name" "$(cat "$here/mode")"
  ;;
-m)
  [ ! -e "$here/stuck" ] || exit 1
  printf '%s\n' "$2" >"$here/mode"
  printf 'mode %s\n' "$2" >>"$here/power.log"
  ;;
esac
"""
JETSON_CLOCKS = r"""#!/bin/sh
here=@HERE@
case ${1:-} in
--show)
  if [ "$(cat "$here/clocks")" = locked ]; then low=1300500000 emc=3199000000; else low=306000000 emc=204000000; fi
  echo "SOC family:tegra234  Machine:NVIDIA Jetson AGX Orin Developer Kit"
  echo "cpu0: Online=1 Governor=schedutil MinFreq=729600 MaxFreq=2201600 CurrentFreq=729600 IdleStates: WFI=1 c7=1"
  echo "GPU MinFreq=$low MaxFreq=1300500000 CurrentFreq=$low"
  echo "EMC MinFreq=$emc MaxFreq=3199000000 CurrentFreq=3199000000 FreqOverride=0"
  ;;
--store)
  if [ -e "$2" ]; then echo "File $2 already exists. Can I overwrite it? Y/N:"; read -r answer; exit 1; fi
  cat "$here/clocks" >"$2"
  ;;
--restore)
  [ -e "$2" ] || exit 1
  cat "$2" >"$here/clocks"
  echo "clocks $(cat "$2")" >>"$here/power.log"
  ;;
*)
  echo locked >"$here/clocks"
  echo "clocks locked" >>"$here/power.log"
  ;;
esac
"""
TEGRASTATS = r"""#!/bin/sh
here=@HERE@
cat "$here/tegrastats.txt"
exec sleep 600
"""
SESSION = r"""#!/bin/sh
echo "a login shell's own words"
cd @HOME@ || exit 1
HOME=@HOME@ PATH=@HERE@/bin:$PATH FUSEPRESS_DEVICE_ROOT=@HERE@/root
export HOME PATH FUSEPRESS_DEVICE_ROOT @MORE@
exec sh -c "$SSH_ORIGINAL_COMMAND"
"""
TEGRASTATS_LINE = (
    "11-21-2026 10:00:00 RAM 18207/62841MB (lfb 466x4MB) SWAP 86/31420MB (cached 0MB) CPU [14%@2188,5%@2112] "
    "EMC_FREQ 3%@3199 GR3D_FREQ {busy}%@[{mhz},{mhz}] NVENC off APE 174 cpu@52.562C soc2@48.437C tj@52.562C cv0@-256C "
    "VDD_GPU_SOC 2412mW/2412mW VDD_CPU_CV 1607mW/1607mW VIN_SYS_5V0 4707mW/4707mW VDD_IN {milliwatts}mW/{milliwatts}mW"
)
BOARD_MW = 20_000  # while inferences are timed
# every half second: the engine is loaded, two seconds of warm-up, inferences are timed
TEGRASTATS_LINES = "".join(
    TEGRASTATS_LINE.format(mhz=1300, busy=busy, milliwatts=milliwatts) + "\n"
    for busy, milliwatts in [(0, 5000)] * 2 + [(99, 12_000)] * 4 + [(99, BOARD_MW)] * 4
)


class DeviceDouble:
    """The folder that plays the device; its attributes change how it behaves.

    Args:
        folder: new.
        version: of TensorRT, one of `trtexec_formats.BANNERS`.
        compute_ms: times of any model's inferences.
    """

    def __init__(self, folder: Path, version: str = "10.3", compute_ms: Sequence[float] | None = None) -> None:
        self.folder = folder
        self.version = version
        # a home that only a quoting shell gets right
        self.home = folder / "home of o'neil; $(touch harm)"
        for path in (self.home, folder / "bin", folder / "root" / "etc"):
            path.mkdir(parents=True)
        self._root()
        programs = {
            "trtexec": TRTEXEC, "nvpmodel": NVPMODEL, "jetson_clocks": JETSON_CLOCKS, "tegrastats": TEGRASTATS,
        }  # fmt: skip
        for name, text in programs.items():
            self.program(name, text)
        # the machine that the tests run on may be an ordinary user's, or have a GPU
        self.program("sudo", '#!/bin/sh\n[ "$1" = -n ] && shift\nexec "$@"\n')
        self.program("nvidia-smi", "#!/bin/sh\nexit 1\n")
        self.write("mode", "0\n")
        self.write("clocks", "free\n")
        self.write("tegrastats.txt", TEGRASTATS_LINES)
        self.write("banner", formats.banner(version) + "\n=== Model Options ===\n")
        self.write("layers.json", formats.layers(["camera/stem/Conv", "head/Conv"], version))
        self.write("profile.json", formats.profile({'camera/"stem"/Conv': 0.5, "head/Conv": 0.25}))
        self.write("outputs.json", "[]")
        self.times("any", np.random.default_rng(0).normal(2.0, 0.02, 400) if compute_ms is None else compute_ms)
        self.write("log-build", formats.log(version, [1.0]))

    def _root(self) -> None:
        root = self.folder / "root"
        modes = "".join(f"< POWER_MODEL ID={number} NAME={name} >\n" for name, number in MODES.items())
        (root / "etc" / "nvpmodel.conf").write_text("# comment\n" + modes)
        (root / "etc" / "nv_tegra_release").write_text("# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic\n")
        for path, text in {
            "proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 50000000 kB\n",
            "proc/loadavg": "0.10 0.20 0.30 1/100 42\n",
            "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
            "sys/class/thermal/thermal_zone0/temp": "49468\n",
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "usr/local/cuda/version.json": '{"cuda" : {\n  "name" : "CUDA SDK",\n  "version" : "12.6.68"\n}}\n',
        }.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)

    def program(self, name: str, text: str) -> None:
        """Put a program where the device finds it first."""
        path = self.folder / "bin" / name
        path.write_text(text.replace("@HERE@", shlex.quote(str(self.folder))))
        path.chmod(0o755)

    def write(self, name: str, text: str) -> None:
        """One of the files that say how the double behaves."""
        (self.folder / name).write_text(text)

    def read(self, name: str) -> str:
        """The same, empty where there is none."""
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def times(self, which: str, compute_ms: Sequence[float] | np.ndarray, *, unstable: bool = False) -> None:
        """Times of a model, by the first 16 digits of its hash; they begin after the warm-up."""
        text = formats.times(list(compute_ms), start_ms=2001.0, old=self.version.startswith("8"))
        self.write(f"times-{which}", text)
        self.write(f"log-{which}", formats.log(self.version, list(compute_ms), unstable=unstable))

    def root(self, path: str, text: str) -> None:
        """A file below the device's /."""
        target = self.folder / "root" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    @property
    def store(self) -> Path:
        """Where Fusepress keeps its things there."""
        return self.home / ".cache" / "fusepress"

    @property
    def state(self) -> tuple[str, str]:
        """Power mode's number, and whether clocks are free or locked."""
        return self.read("mode").strip(), self.read("clocks").strip()

    def calls(self, having: str) -> int:
        """How often trtexec was called with an argument."""
        return sum(having in line for line in self.read("calls").splitlines())

    def end_jobs(self) -> None:
        """End what a test left running."""
        for pid in self.store.rglob("pid"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(pid.read_text()), signal.SIGTERM)


class Server:
    """OpenSSH's server on a loopback port, whose every session is on the double."""

    def __init__(self, folder: Path, device: DeviceDouble) -> None:
        assert SSHD is not None
        self.folder = folder
        folder.mkdir(parents=True)
        self.port = _free_port()
        for name in ("host", "user"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)],
                check=True, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self.session = folder / "session"
        self.use(device)
        lines = [
            f"Port {self.port}", "ListenAddress 127.0.0.1", f"HostKey {folder}/host", "UsePAM no", "StrictModes no",
            f"AuthorizedKeysFile {folder}/user.pub", "PasswordAuthentication no", "PidFile none",
            "PermitRootLogin yes", f"ForceCommand {self.session}", "MaxStartups 100", "LogLevel ERROR",
        ]  # fmt: skip
        (folder / "sshd_config").write_text("\n".join(lines) + "\n")
        self.know_host()
        self.config = folder / "config"
        self.config.write_text(
            f"Host double\n  HostName 127.0.0.1\n  Port {self.port}\n  User {getpass.getuser()}\n"
            f"  IdentityFile {folder}/user\n  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known\n"
            "  GlobalKnownHostsFile /dev/null\n"
        )
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def use(self, device: DeviceDouble, **environment: str) -> None:
        """Let every session from now on be on this double, with these variables."""
        text = SESSION.replace("@HERE@", shlex.quote(str(device.folder)))
        text = text.replace("@MORE@", " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items()))
        self.session.write_text(text.replace("@HOME@", shlex.quote(str(device.home))))
        self.session.chmod(0o755)

    def know_host(self, key: Path | None = None) -> None:
        """Make a host key the known one."""
        public = (key or self.folder / "host.pub").read_text().split()
        (self.folder / "known").write_text(f"[127.0.0.1]:{self.port} {public[0]} {public[1]}\n")

    def start(self) -> None:
        """Listen, in a process group of its own."""
        assert SSHD is not None
        if os.geteuid() == 0:  # what a started system has
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.05)
        raise RuntimeError((self.folder / "log").read_text())

    def sessions(self) -> list[int]:
        """Processes of this server's connections."""
        assert self.process is not None
        found = [self.process.pid]
        for pid in found:
            children = Path(f"/proc/{pid}/task/{pid}/children")
            with contextlib.suppress(OSError):
                names = [(int(c), Path(f"/proc/{c}/comm").read_text().strip()) for c in children.read_text().split()]
                found += [child for child, name in names if name.startswith("sshd")]
        return found[1:]

    def drop(self) -> int:
        """Kill every connection of the moment, as a pulled cable does; the server goes on. How many there were."""
        pids = self.sessions()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)

    def stop(self) -> None:
        """Kill connections and server."""
        self.drop()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def connect(server: Server, config: Path | None = None, *, reconnect_s: float = 30.0) -> SshDevice:
    """A connection to the double that the server's sessions are on."""
    return SshDevice("double", config=config or server.config, poll_s=1.0, reconnect_s=reconnect_s)


@contextlib.contextmanager
def served(folder: Path, device: DeviceDouble) -> Iterator[Server]:
    """A server for a while."""
    server = Server(folder / "ssh", device)
    try:
        yield server
    finally:
        server.stop()
