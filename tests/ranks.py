"""Real processes for tests of distributed work: `run_ranks` calls one function in each of them.

`python -m tests.ranks MODULE:FUNCTION ARGUMENTS RESULT` is what each process runs.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def rank_environment(world: int, port: int, rank: int) -> dict[str, str]:
    """What a launcher sets, and one thread for each process."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return os.environ | {name: str(value) for name, value in own.items()} | {"OMP_NUM_THREADS": "1"}


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start_ranks(arguments: list[list[str]], **environment: str) -> list[subprocess.Popen[str]]:
    """One Python process for each entry of `arguments` (those after the interpreter)."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *given],
            cwd=ROOT,
            env=rank_environment(len(arguments), port, number) | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, given in enumerate(arguments)
    ]


def run_ranks(function: str, *, world: int = 2, timeout_s: float = 120, **arguments: Any) -> list[Any]:
    """Call `module:function(**arguments)` in `world` processes that are joined by `distributed.session`.

    Args:
        function: importable, e.g. `tests.test_distributed:scores`; returns what fits JSON.
        world: number of processes.
        timeout_s: after which they are killed.
        arguments: what fits JSON.

    Returns:
        What the function returned, by rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / f"{number}.json" for number in range(world)]
        given = [["-m", "tests.ranks", function, json.dumps(arguments), str(path)] for path in results]
        processes = start_ranks(given)
        try:
            told = [process.communicate(timeout=timeout_s)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        failed = [number for number, process in enumerate(processes) if process.returncode]
        assert not failed, "\n".join(f"--- rank {number}\n{told[number]}" for number in failed)
        return [json.loads(path.read_text()) for path in results]


def main(function: str, arguments: str, result: str) -> None:
    """One rank."""
    from fusepress.pipeline import distributed

    module, _, name = function.partition(":")
    with distributed.session():
        value = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    Path(result).write_text(json.dumps(value))


if __name__ == "__main__":
    main(*sys.argv[1:])
