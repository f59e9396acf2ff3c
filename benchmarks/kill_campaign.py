"""Kill a run with SIGKILL at random moments and run it again: the ONNX must end as in the undisturbed run.

    python benchmarks/kill_campaign.py [--kills 20] [--seed 0] [--recipe RECIPE] [-o key=value ...]

Without --recipe it takes the task and recipe that `fusepress init` writes. Exit code 0 when every run ended with the
same sha256.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DENSE_STEPS, FEWER_STEPS = "self.build_model(), 400", "self.build_model(), 60"  # training is not what is tested
COMMAND = [sys.executable, "-m", "fusepress.pipeline.main"]


def compress(recipe: Path, run: Path, overrides: list[str], kill_after_s: float | None = None) -> int | None:
    """Run compress; None when it was killed."""
    arguments = [*COMMAND, "compress", str(recipe), "--run", str(run)]
    for override in overrides:
        arguments += ["-o", override]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return process.wait(timeout=kill_after_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return None


def onnx_sha256(run: Path) -> str:
    record = json.loads((run / "run.json").read_text())
    return str(record["artifacts"]["onnx"]["sha256"])


def stage_at_work(run: Path) -> str:
    try:
        record = json.loads((run / "run.json").read_text())
    except FileNotFoundError:
        return "before the first stage"
    running = [stage["name"] for stage in record["stages"] if stage["status"] == "running"]
    return running[0] if running else "between stages"


def one_kill(recipe: Path, folder: Path, overrides: list[str], moment_s: float) -> dict[str, Any]:
    """Kill once, then run to the end."""
    run = folder / "run"
    code = compress(recipe, run, overrides, moment_s)
    where = "finished before" if code is not None else stage_at_work(run)
    if code is None:
        code = compress(recipe, run, overrides)
    return {"moment_s": round(moment_s, 2), "killed_in": where, "exit_code": code, "onnx_sha256": onnx_sha256(run)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("-o", "--override", action="append", default=[])
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = arguments.recipe
        if recipe is None:
            subprocess.run([*COMMAND, "init", str(folder / "task")], check=True, stdout=subprocess.DEVNULL)
            recipe = folder / "task" / "recipe.yaml"
            task = folder / "task" / "task.py"
            task.write_text(task.read_text().replace(DENSE_STEPS, FEWER_STEPS))
        started = time.monotonic()
        code = compress(recipe, folder / "whole" / "run", arguments.override)
        whole_s = time.monotonic() - started
        expected = onnx_sha256(folder / "whole" / "run")
        print(f"undisturbed: exit code {code}, {whole_s:.1f} s, ONNX {expected[:16]}", flush=True)
        rows = []
        for kill in range(arguments.kills):
            row = one_kill(recipe, folder / f"kill{kill}", arguments.override, generator.uniform(0.2, whole_s))
            rows.append(row)
            same = "same" if row["onnx_sha256"] == expected else "DIFFERENT"
            print(f"kill {kill + 1:2d}: after {row['moment_s']:6.2f} s in {row['killed_in']:<22} {same}", flush=True)
    equal = sum(row["onnx_sha256"] == expected for row in rows)
    print(f"{equal} of {len(rows)} runs ended with the ONNX of the undisturbed run")
    if arguments.results:
        result = {
            "command": " ".join(["python benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
            "python": platform.python_version(),
            "seed": arguments.seed,
            "undisturbed": {"seconds": round(whole_s, 1), "onnx_sha256": expected},
            "kills": rows,
            "equal": equal,
        }
        arguments.results.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if equal == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
