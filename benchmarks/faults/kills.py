"""SIGKILL at random moments over all stages: one run is killed again and again until it comes to its end.

For each stage in turn the run is started, waited for until that stage is at work (or done), left alone for a random
part of the time that the stage took in the undisturbed run, and killed. After each kill run.json must be readable and
every committed result whole, and what was committed before must still be there. At the end of a chain of kills the run
must come to the same hash as the undisturbed one: all files of all stages, figures and verdicts.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.faults.project import (
    committed,
    compress,
    finish,
    ran,
    reached,
    result_sha256,
    stage_at_work,
    start,
    written,
)


def chain(recipe: Path, folder: Path, seconds: Mapping[str, float], most: int, generator: random.Random) -> Any:
    """Kill one run in each stage, at most so many times, and let it end.

    Args:
        recipe: of the project.
        folder: a new one, for the run and its store.
        seconds: stage -> how long it took undisturbed.
        most: number of kills.
        generator: of the moments.
    """
    folder.mkdir(parents=True)
    run, log = folder / "run", folder / "log"
    kept: set[str] = set()
    kills: list[dict[str, Any]] = []
    for stage, stage_s in seconds.items():
        if len(kills) == most:
            break
        before = written(run)
        process = start(compress(recipe, run), log)
        delay_s = generator.uniform(0, stage_s)
        if not reached(process, run, stage, before):
            continue
        time.sleep(delay_s)
        os.kill(process, signal.SIGKILL)
        if finish(process) != -signal.SIGKILL:
            continue  # it had come to its end
        now = committed(run)
        kills.append(
            {"aimed_at": stage, "after_s": round(delay_s, 3), "in": stage_at_work(run), "lost": len(kept - now)}
        )
        kept = now
    code, said = ran(compress(recipe, run), log)
    return {"kills": kills, "exit_code": code, "sha256": result_sha256(run), "warned": said.count("damaged")}
